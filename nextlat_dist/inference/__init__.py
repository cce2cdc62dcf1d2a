"""Single-device decoding of an export: torch, safetensors and a tokenizer, never the training stack.

`from nextlat_dist.inference import load; load(export_dir).generate(["def "], max_new_tokens=64)`
"""

from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.generation import Generation, Piece
from nextlat_dist.inference.loading import load

__all__ = ["Decoder", "Generation", "Piece", "load"]
