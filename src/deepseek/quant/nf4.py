"""NF4: 4 bits a weight, at the quantiles of a normal distribution (arXiv 2305.14314, section 3 and appendix E).

Per block of 64 columns of a row, which a short last block ends:

    code    the nearest of the 16 codebook values to w / max |w|, ties to the lower one: the codes of bitsandbytes
    s       <w, L> / <L, L>       L: the block's integer levels (ops/panels.py), so that s L is the block's best fit
    step    max_b s_b / 255       one a row
    scale   round(s / step)       8 bits

bitsandbytes keeps s = max |w| and nests these in blocks of 256 with an offset. The fit costs nothing where weights are
used and lowers the squared error by 2.5 to 3 %, more than integer levels and linear 8-bit scales add.

Shape letters: O output rows, K columns, b blocks of 64 columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ops.panels import BLOCK, LEVELS, Quantized

CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def quantize(w_OK: Tensor) -> Quantized:
    """A matrix [O, K] (computed in float32) -> codes, 8-bit scales and steps; all its values must be finite.

    Temporaries are several times the matrix: cut a large one into row blocks, since rows do not depend on each other.
    """
    w_ObC = pad(w_OK.float(), (0, -w_OK.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    code_ObC = _codes(w_ObC)
    level_ObC = torch.tensor(LEVELS, dtype=torch.float32).index_select(0, code_ObC.flatten()).view_as(w_ObC)
    fit_Ob = (w_ObC * level_ObC).sum(-1) / level_ObC.square().sum(-1).clamp(min=1)  # a block of zeros has no levels
    step_O = fit_Ob.amax(1) / 255
    scale_Ob = (fit_Ob / step_O.clamp(min=torch.finfo().tiny).unsqueeze(1)).round().to(torch.uint8)
    return Quantized(code_ObC.to(torch.uint8).flatten(1)[:, : w_OK.shape[1]], scale_Ob, step_O)


_LEVEL = torch.tensor(CODEBOOK)
_MIDDLE = torch.cat(((_LEVEL[:-1] + _LEVEL[1:]) / 2, torch.tensor([torch.inf])))
_CELLS = 64  # over -1..1; each holds one midpoint at most, and none lies near an edge
_BELOW = torch.bucketize(torch.arange(_CELLS + 1) * (2 / _CELLS) - 1, _MIDDLE, out_int32=True)


def _codes(w_ObC: Tensor) -> Tensor:
    """int32. Bit for bit what bitsandbytes 0.50 does: a product with the reciprocal, midpoints in float32.

    The code is the number of midpoints below the quotient: those below its cell's lower edge, and perhaps one more.
    That takes a third of the time of `torch.bucketize`.
    """
    largest_Ob1 = w_ObC.abs().amax(-1, keepdim=True).clamp(min=1e-38)
    q = (w_ObC * (1 / largest_Ob1)).clamp_(-1, 1).flatten()
    below = _BELOW.index_select(0, ((q + 1) * (_CELLS / 2)).int())
    return below.add_(q > _MIDDLE.index_select(0, below)).view_as(w_ObC)
