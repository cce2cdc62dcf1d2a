"""One bias-free matrix, laid out so that one row and a handful of rows are both fast on the device at hand.

Decoding multiplies a matrix by 1 row (plain step) or by k + 1 rows (verification), over and over. In fp32 on a CPU the
stock GEMM takes 1.2-3 times as long for four rows as for one, which would eat the gain of drafting; oneDNN's blocked
layout takes four rows in about the time of one, and one row about as fast as the stock kernel does or faster (measured
with weights out of cache, one and two threads, AVX-512). The layout changes speed and rounding, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

PACK_FROM_ELEMENTS = 1 << 16  # below this oneDNN's fixed cost per call (~20 µs) outweighs the better layout
PACK_ROWS_HINT = 4  # the row count that the blocked layout is chosen for


def linear(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The map `x [rows, in] → x weightᵀ [rows, out]` for `weight [out, in]`, in the weight's dtype, on its device."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return lambda x: functional.linear(x, weight)
    if weight.numel() >= PACK_FROM_ELEMENTS and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS_HINT)
        apply = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: apply(x, packed, None, "none", [], "")
    transposed = weight.t().contiguous()
    return lambda x: torch.mm(x, transposed)
