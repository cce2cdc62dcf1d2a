"""Next-Latent Prediction (NextLat) pretraining: Megatron-Core layers, DeepSpeed engine, WebDataset streams.

    from nextlat_dist import export, load, train

Importing this package imports neither torch nor DeepSpeed: what it exports is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nextlat_dist import moved

if TYPE_CHECKING:
    from nextlat_dist.huggingface.export import export_checkpoint as export
    from nextlat_dist.inference.loading import load
    from nextlat_dist.training.run import train

__version__ = "0.1.0"
__all__ = ["__version__", "export", "load", "train"]

_EXPORTS = {
    "export": ("nextlat_dist.huggingface.export", "export_checkpoint"),
    "load": ("nextlat_dist.inference.loading", "load"),
    "train": ("nextlat_dist.training.run", "train"),
}

moved.install()

if not TYPE_CHECKING:  # else every misspelt attribute would pass the type checker

    def __getattr__(name: str) -> Any:
        if name not in _EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = _EXPORTS[name]
        return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
