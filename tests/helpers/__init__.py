"""What tests share: a module for each thing, imported by name; some are programs that tests run."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT.parent / "shared" / "data"  # files of others, beside the repository
