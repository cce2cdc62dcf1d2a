"""Single-device decoding of an export: torch, safetensors and a tokenizer, never the training stack.

`from nextlat_dist.inference import load; load(export_dir).generate(["def "], max_new_tokens=64)`
"""

from nextlat_dist.inference.decoder import Decoder, load
from nextlat_dist.inference.engine.engine import Generation, Piece

__all__ = ["Decoder", "Generation", "Piece", "load"]
