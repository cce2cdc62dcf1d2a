"""Single-device decoding of an export: torch, safetensors and a tokenizer, never the training stack.

`from nextlat_dist.inference import load; load(export_dir).generate(["def "], max_new_tokens=64)`

The names are imported when they are first asked for: the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextlat_dist.inference.decoder import Decoder
    from nextlat_dist.inference.generation import Generation, Piece
    from nextlat_dist.inference.loading import load

__all__ = ["Decoder", "Generation", "Piece", "load"]

_MODULES = {"Decoder": "decoder", "Generation": "generation", "Piece": "generation", "load": "loading"}

if not TYPE_CHECKING:  # else every misspelt attribute would pass the type checker

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
