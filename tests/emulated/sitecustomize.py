"""Puts the native kernels with emulated AMX tiles (tests/helpers/isa.py builds them) instead of the installed ones.

Python imports this module as it starts, in every process that has this folder in PYTHONPATH.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).parents[2] / "build/emulated" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"


class Emulated:
    @staticmethod
    def find_spec(name: str, *_: Any) -> ModuleSpec | None:
        return spec_from_file_location(name, LIBRARY) if name == "deepseek._native" else None


sys.meta_path.insert(0, Emulated)
