"""Reads a plain checkpoint with an adapter merged in, tensor by tensor, for `merge` and `quantize`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import ConfigError
from ..model import CausalLM
from .adapter_files import Delta, LoRA, read_adapter
from .files import TORCH_DTYPES, TensorFiles, row_blocks
from .identity import check_base, stored_fingerprint
from .models import check_tensors, stored_dtype

KEPT = 0.9  # of what an adapter adds, which the base's own dtype must hold


class AdaptedFiles(TensorFiles):
    """The tensors of the checkpoint `files` with `adapter` in them, all of one dtype (gate biases stay float32).

    Sums are made in float32 and rounded once. base: the fingerprint of the checkpoint. kept: the share of what a LoRA
    adapter adds that is there after rounding, <W' - W, B A> / <B A, B A>; 1 for a delta. too_small: the checkpoint's
    own dtype and its share, where that would have held too little.
    """

    def __init__(self, files: TensorFiles, config: ModelConfig, adapter: Delta | LoRA, dtype: torch.dtype | None = None,
                 *, progress: bool = False) -> None:
        """dtype: None takes the checkpoint's own, or float32 where that would hold less than nine tenths of what the
        adapter adds, as half precision does of little steps. Raises CheckpointError for another base, ConfigError for
        an adapter that adds nothing."""
        super().__init__(files.folder, verify=False)
        self.plain, self.adapter, self.own = files, adapter, stored_dtype(files)
        check_tensors(CausalLM.on_meta(config), files)
        adapter.check_fits(config)
        if isinstance(adapter, LoRA) and adapter.untrained:
            raise ConfigError(f"{adapter.folder}: would change nothing: every B is zero, the adapter was never trained")
        self.base = stored_fingerprint(config, files, self.own, progress)
        if adapter.made_for:
            check_base([self.base], adapter.made_for, adapter.folder, adapter.base_name)
        self._changed = adapter.changed
        self.torch_dtype = dtype or self.own
        self.kept = self._share(self.torch_dtype)
        self.too_small: tuple[torch.dtype, float] | None = None
        if dtype is None and self.kept < KEPT:
            self.too_small = self.own, self.kept
            self.torch_dtype, self.kept = torch.float32, 1.0
        self._kind = {value: key for key, value in TORCH_DTYPES.items()}[self.torch_dtype]

    @classmethod
    def open(cls, files: TensorFiles, config: ModelConfig, adapter: str | Path, dtype: torch.dtype | None = None, *,
             progress: bool = False) -> AdaptedFiles:
        return cls(files, config, read_adapter(adapter), dtype, progress=progress)

    def dtype(self, name: str) -> str:
        return "F32" if name.endswith("e_score_correction_bias") else self._kind

    def file(self, name: str) -> Path:
        return self.adapter.where(name) if name in self._changed else self.plain.file(name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.read_rows(name, 0, self.shape(name)[0], dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        rows = self._as_loaded(name, start, stop)
        if name in self._changed:
            rows = self.adapter.merged(name, start, rows)
        rows = rows.to(TORCH_DTYPES[self.dtype(name)])
        return rows if dtype is None else rows.to(dtype)

    def _as_loaded(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the base in the dtype that loading gives them, on which the adapter was trained, as float32."""
        own = torch.float32 if name.endswith("e_score_correction_bias") else self.own
        return self.plain.read_rows(name, start, stop, own).float()

    def _share(self, dtype: torch.dtype) -> float:
        if dtype == torch.float32 or not isinstance(self.adapter, LoRA):
            return 1.0
        stored = added = 0.0
        for name in sorted(self._changed):
            for start, stop in row_blocks(self.shape(name)):
                w = self._as_loaded(name, start, stop)
                d = self.adapter.added(name, start, stop)
                stored += float(((w + d).to(dtype).float() - w).flatten().double() @ d.flatten().double())
                added += float(d.flatten().double().square().sum())
        return stored / added if added else 1.0
