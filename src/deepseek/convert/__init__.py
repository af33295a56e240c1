"""Checkpoint -> checkpoint, some megabytes at a time: quantize, and back; merge an adapter; upcycle a dense model;
install expert packages (grown.py); put a ready model together of all that (pulling.py).

    1. plan     from config.json and the names and shapes of the source: every tensor of the result, in its order and
                with its size, divided into files. What is missing or too big for the disk is an error here
    2. write    file by file: the header, then the tensors, made from row blocks that are read, converted and written
                one after the other. A file appears under its name when it is whole, and is entered in a journal
    3. publish  config.json, index, report, tokenizer and manifest beside them; the folder takes its place in one step

All this happens in `OUT.partial`. The same command after a crash finds the journal there and goes on behind the last
whole file. Everything is a function of the source, so the result has the same bytes as without the crash.

The order of the tensors gives the alignment that docs/formats.md promises without holes, which safetensors forbids:
first the ranges that are padded to whole pages, then packed matrices, which are multiples of 64 bytes, then the rest by
the size of its elements.
"""

from __future__ import annotations

from .dequantizing import dequantize
from .grown import Group, Grown
from .merging import PROVENANCE, Merged, merge
from .packages import Installed, export, install, install_all, installed, open_package, remove, verify_model
from .pulling import pull
from .quantizing import Report, quantize, quantize_tensors
from .upcycling import Comparison, Upcycled, compare, upcycle
from .writing import GROWN, REPORT

__all__ = [
    "GROWN", "PROVENANCE", "REPORT", "Comparison", "Group", "Grown", "Installed", "Merged", "Report", "Upcycled",
    "compare", "dequantize", "export", "install", "install_all", "installed", "merge", "open_package", "pull",
    "quantize", "quantize_tensors", "remove", "upcycle", "verify_model",
]
