"""Pointwise pieces of a model, which torch.compile makes one kernel of where a run wants that.

A piece is a function of tensors without autograd: forward and backward passes of our own call it. Eager and compiled it
does the same, so that the eager one is the test oracle of the other. Pieces are compiled for any number of rows (the
first dimension), so that a run compiles in its first steps and then never.

    @piece
    def gate(x): ...

    with compiled_pieces("auto", device):
        gate(x)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, TypeVar

import torch

from nextlat_dist.reporting.log import logger

log = logger(__name__)

Compile = Literal["auto", "always", "never"]
BACKEND = "inductor"
P = ParamSpec("P")
R = TypeVar("R")


class _Switch:
    """Of the process, not of a thread: backward passes of a GPU run in a thread of their own."""

    on = False


def compiling() -> bool:
    """Whether pieces are compiled now."""
    return _Switch.on


def piece(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, compiled inside `compiled_pieces`."""
    compiled: dict[str, Callable[..., R]] = {}

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        if not compiling():
            return function(*arguments, **named)
        import torch._dynamo as dynamo

        for argument in arguments:
            if isinstance(argument, torch.Tensor) and argument.ndim:
                dynamo.maybe_mark_dynamic(argument, 0)
        if BACKEND not in compiled:
            compiled[BACKEND] = torch.compile(function, backend=BACKEND)
        return compiled[BACKEND](*arguments, **named)

    return call


@contextmanager
def compiled_pieces(wanted: Compile, device: torch.device) -> Iterator[None]:
    """Inside, pieces are compiled: always, or on a GPU where a compiler works ("auto")."""
    works = wanted == "always" or (wanted == "auto" and device.type == "cuda" and _compiler_works(device))
    before, _Switch.on = _Switch.on, works
    try:
        yield
    finally:
        _Switch.on = before


def _compiler_works(device: torch.device) -> bool:
    def probe(values: Any) -> Any:
        return values * 2 + 1

    try:
        torch.compile(probe, backend=BACKEND)(torch.zeros(8, device=device))
    except Exception as error:  # of triton, of a C compiler, of their caches: there are many
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("training.compile=auto: torch.compile does not work here (%s); kernels are not fused", reason)
        return False
    return True
