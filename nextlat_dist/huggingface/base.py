"""The base model of an export on disk: `config.json` of a plain Llama, its weights with their index, their hash.

export/    config.json, generation_config.json, model.safetensors, model.safetensors.index.json, tokenizer files
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nextlat_dist.config.entries import resolve
from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.stored import JsonFields, read_fields, read_tensors

if TYPE_CHECKING:
    from nextlat_dist.huggingface.forms.catalogue import BaseForm

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
ADVICE = "export the run again, or fetch the model again"
_MOST = 1 << 22  # of anything that a configuration counts: a table of positions of this length has gigabytes


def forms() -> dict[str, Any]:
    """Those of `huggingface.forms.catalogue`, by `model_type`."""
    found: dict[str, Any] = resolve("nextlat_dist.huggingface.forms.catalogue:FORMS")
    return found


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of `config.json` that the forward needs, named as there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    model_type: str = "llama"
    own: Mapping[str, int] = field(default_factory=dict)  # the numbers that the form has besides a Llama's

    @property
    def form(self) -> BaseForm:
        found: BaseForm = forms()[self.model_type]
        return found

    @staticmethod
    def from_directory(directory: Path) -> LlamaConfig:
        """Raises UserError: the model is no plain Llama, and which field says so."""
        fields = read_fields(directory / CONFIG_FILE, ADVICE)
        raw = fields.values
        older = fields.object("rope_scaling").values if "rope_scaling" in fields else {}  # that form is flat
        known = raw.get("model_type")
        form = forms().get(known if isinstance(known, str) else "", forms()["llama"])
        rope = fields.object("rope_parameters") if "rope_parameters" in fields else None
        rope = rope or JsonFields(fields.path, {**raw, **older}, ADVICE)
        plain = {
            "model_type": (raw.get("model_type"), form.model_type),
            "hidden_act": (raw.get("hidden_act"), "silu"),
            "attention_bias": (raw.get("attention_bias", False), False),
            "mlp_bias": (raw.get("mlp_bias", False), False),
            "rope_type": (rope.values.get("rope_type", rope.values.get("type", "default")), "default"),
            "partial_rotary_factor": (rope.values.get("partial_rotary_factor", 1.0), 1.0),
            "quantization_config": (raw.get("quantization_config"), None),
        }
        for key, (value, expected) in plain.items():
            if value != expected or isinstance(value, bool) is not isinstance(expected, bool):
                raise UserError(
                    f"{directory / CONFIG_FILE} has {key} {value!r}, but this decoder runs {expected!r} only"
                )
        heads = fields.integer("num_attention_heads", minimum=1, maximum=_MOST)
        hidden = fields.integer("hidden_size", minimum=1, maximum=_MOST)
        config = LlamaConfig(
            vocab_size=fields.integer("vocab_size", minimum=1, maximum=_MOST),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size", minimum=1, maximum=_MOST),
            num_hidden_layers=fields.integer("num_hidden_layers", minimum=1, maximum=_MOST),
            num_attention_heads=heads,
            num_key_value_heads=fields.integer("num_key_value_heads", minimum=1, maximum=heads, default=heads),
            head_dim=fields.integer("head_dim", minimum=2, maximum=_MOST, default=hidden // heads),
            rms_norm_eps=fields.number("rms_norm_eps", minimum=0, maximum=1),
            rope_theta=rope.number("rope_theta", above=0, default=10000.0),
            max_position_embeddings=fields.integer("max_position_embeddings", minimum=1, maximum=_MOST),
            tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
            model_type=form.model_type,
            own={name: fields.integer(name, minimum=1, maximum=_MOST) for name in form.field_names},
        )
        if heads % config.num_key_value_heads:
            raise fields.wrong("num_key_value_heads", f"divide num_attention_heads {heads}")
        if config.head_dim < 2 or config.head_dim % 2:
            raise UserError(f"{fields.path} has heads of {config.head_dim} numbers, but that must be even; {ADVICE}")
        return config

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the base's tensors."""
        yield "model.embed_tokens.weight", (self.vocab_size, self.hidden_size)
        for index in range(self.num_hidden_layers):
            yield from self.layer_shapes(f"model.layers.{index}.")
        yield "model.norm.weight", (self.hidden_size,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, self.hidden_size)
        yield from self.form.shapes(self)

    def layer_shapes(self, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Those of one decoder layer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        for name, shape in {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            yield f"{prefix}{name}.weight", shape


def weights_sha256(weights: dict[str, torch.Tensor]) -> str:
    """Content hash of named tensors: independent of file layout and metadata."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file. Raises OSError where the system refuses; safetensors has its own error for that."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if "I/O error" not in str(error):
            raise
        raise OSError(str(error).rpartition("I/O error: ")[2]) from error


def save_base_weights(directory: Path, weights: dict[str, torch.Tensor]) -> str:
    """Write one safetensors file and its index; return the content hash.

    The index is written even for one file: some servers load every `*.safetensors` they find when it is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(weights.items())}
    save_tensors(directory / WEIGHTS_FILE, weights)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(weights, WEIGHTS_FILE)}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return weights_sha256(weights)


def load_base_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Every base tensor, on the CPU, in its stored dtype: those of the files that the index names, or of the one file.

    Raises:
        UserError: the directory is no export, or a file is missing or damaged.
    """
    check_is_export(directory)
    if not (directory / INDEX_FILE).is_file():
        return read_tensors(directory / WEIGHTS_FILE, ADVICE)
    placed = read_fields(directory / INDEX_FILE, ADVICE).object("weight_map")
    for name, file in placed.values.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise placed.wrong(name, "be the name of a safetensors file next to it")
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(set(placed.values.values())):
        weights.update(read_tensors(directory / file, ADVICE))
    return weights


def is_export(directory: Path) -> bool:
    """Whether there are base weights and a configuration: `nextlat export` wrote it, or it is another Llama."""
    return any(os.path.isfile(directory / name) for name in (INDEX_FILE, WEIGHTS_FILE)) and os.path.isfile(
        directory / CONFIG_FILE
    )


def check_is_export(directory: Path) -> None:
    """Raises UserError: the directory has no configuration or no base weights."""
    if is_export(directory):
        return
    missing = CONFIG_FILE
    if not any(os.path.isfile(directory / name) for name in (INDEX_FILE, WEIGHTS_FILE)):
        missing = f"{INDEX_FILE} and no {WEIGHTS_FILE}"
        pickled = os.path.isdir(directory) and any(directory.glob("*.bin"))
        missing += ", and weights in pickles (*.bin) are never opened" if pickled else ""
    raise UserError(f"{directory} is not an export: it has no {missing}; write one with `nextlat export`")
