"""Put expert packages into the source tree, as those that `mini` ships: the files, and the manifest that pins them.

    python recipes/mini/ship.py BASE PACKAGE... --calibration calibration.json

BASE: the exact form of the base in float32 (`deepseek upcycle`). The packages are installed in the order given. Their
biases are found here, on the general text, so that no one who installs moe-dr has to wait for it.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from deepseek.checkpoint import read_package
from deepseek.checkpoint.ready import WEIGHTS
from deepseek.convert.packages import CALIBRATION, calibrate
from deepseek.files import read_json, sha256, write_json

MOST = 40 << 20  # bytes that ship


def ship(base: Path, packages: list[Path], calibration: Path, folder: Path) -> None:
    """Write the manifest in `folder` anew, but for what it says of the base."""
    opened = [read_package(path) for path in packages]
    biases = calibrate(base, opened, read_json(calibration)["tokens"])
    for old in folder.glob("*.safetensors"):
        if old not in packages:
            old.unlink()
    entries = []
    for package, bias in zip(opened, biases, strict=True):
        file = folder / f"{package.info.name}.safetensors"
        if not (file.exists() and file.samefile(package.path)):
            shutil.copyfile(package.path, file)
        entries.append({"file": file.name, "sha256": sha256(file), "bias": bias})
        print(f"{file.name}: {file.stat().st_size:,} bytes, {package.info.license}")
    if calibration != folder / CALIBRATION:
        shutil.copyfile(calibration, folder / CALIBRATION)
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | {
        "calibration": {"file": CALIBRATION, "sha256": sha256(folder / CALIBRATION)}, "packages": entries})
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size:,} bytes")
    if size > MOST:
        raise SystemExit(f"{size:,} bytes: must be at most {MOST:,}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", type=Path)
    parser.add_argument("packages", metavar="PACKAGE", nargs="+", type=Path)
    parser.add_argument("--calibration", required=True, metavar="FILE", type=Path)
    args = parser.parse_args()
    ship(args.base, args.packages, args.calibration, WEIGHTS / "mini")
