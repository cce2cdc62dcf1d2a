"""One bias-free matrix, in the layout that is fastest for the rows at hand.

Decoding multiplies a matrix by 1 row (plain step) or by k + 1 rows (verification), over and over. In fp32 on a CPU no
layout is the best for both: the transposed matrix streams through one row in 0.3-0.7 of the time that oneDNN's blocked
layout takes, and the blocked one takes four to eight rows in 0.5-0.7 of the time of the transposed one (one thread, AMD
EPYC, weights of 1 MB and more, in and out of cache; smaller weights are faster transposed at every number of rows). So
a large matrix is kept in both, the blocked one from the first block of a few rows on. Rows alone choose the layout:
nothing is timed, and a text does not depend on how busy a machine was when the model was loaded. A layout changes speed
and rounding, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

BLOCK_FROM_ELEMENTS = 1 << 18  # smaller weights gain nothing from blocks
BLOCK_ROWS = range(3, 65)  # fewer rows stream the transposed matrix faster; for more the two are equal
BLOCK_ROWS_HINT = 4  # the row count that the blocks are chosen for

Product = Callable[[torch.Tensor], torch.Tensor]


def linear(weight: torch.Tensor) -> Product:
    """The map `x [rows, in] → x weightᵀ [rows, out]` for `weight [out, in]`, in the weight's dtype, on its device."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return lambda x: functional.linear(x, weight)
    transposed = weight.t().contiguous()
    if weight.numel() < BLOCK_FROM_ELEMENTS or not torch.backends.mkldnn.is_available():
        return transposed_product(transposed)
    return _ByRows(transposed)


def output_head(weight: torch.Tensor) -> Product:
    """As `linear`, with logits in fp32 at least: sums of products in half precision are not rounded back to it, which
    would make different logits equal.
    """
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return linear(weight)
    if weight.device.type == "cuda":
        return lambda x: torch.mm(x, weight.t(), out_dtype=torch.float32)
    product = linear(weight.float())  # products of two half precision numbers are exact in fp32
    return lambda x: product(x.float())


def transposed_product(transposed: torch.Tensor) -> Product:
    """From the matrix as [in, out]."""
    return lambda x: torch.mm(x, transposed)


def blocked_product(weight: torch.Tensor) -> Product:
    """From `weight [out, in]`, copied into oneDNN's blocks."""
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), BLOCK_ROWS_HINT)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, blocked, None, "none", [], "")


class _ByRows:
    """A large fp32 matrix on a CPU; its blocks are made when they are first needed."""

    def __init__(self, transposed: torch.Tensor) -> None:
        self.transposed = transposed
        self.blocked: Product | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] not in BLOCK_ROWS:
            return torch.mm(x, self.transposed)
        if self.blocked is None:
            self.blocked = blocked_product(self.transposed.t())
        return self.blocked(x)
