"""The second stack's state of the end token alone, with which a base of `objective: bst` decodes.

A token that follows nothing attends to itself, so its state is a constant of the model; an export holds that instead of
the second stack.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from nextlat_dist.config.schema import RunConfig
from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.forms.catalogue import CONDITION
from nextlat_dist.huggingface.forms.layers import layer_parts


def end_state(
    canonical: dict[str, torch.Tensor], config: RunConfig, eos_token_id: int | None
) -> dict[str, torch.Tensor]:
    """{name in the export: b [h]}, in the weights' dtype.

    Raises:
        UserError: the run's tokenizer has no end token.
    """
    if eos_token_id is None:
        raise UserError(
            "a run with objective.name bst decodes given the state of the end token, but its tokenizer has no end "
            "token; train it on data with a tokenizer that has one"
        )
    model = config.model
    heads, groups = model.num_attention_heads, model.query_groups
    wide = {name: tensor.double() for name, tensor in canonical.items() if name.startswith("backward.")}

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], wide[name], model.norm_epsilon)

    embedding = canonical["embedding.word_embeddings.weight"]
    x = embedding[eos_token_id].double()
    for index in range(model.num_layers):
        prefix = f"backward.layers.{index}."
        parts: dict[str, torch.Tensor] = {}
        for name, tensor in wide.items():
            if name.startswith(prefix):
                parts |= layer_parts(name.removeprefix(prefix), tensor, config)
        value = parts["self_attn.v_proj"] @ normed(x, f"{prefix}input_layernorm.weight")
        x = x + parts["self_attn.o_proj"] @ value.view(groups, -1).repeat_interleave(heads // groups, dim=0).flatten()
        read = normed(x, f"{prefix}pre_mlp_layernorm.weight")
        gated = functional.silu(parts["mlp.gate_proj"] @ read) * (parts["mlp.up_proj"] @ read)
        x = x + parts["mlp.down_proj"] @ gated
    return {CONDITION: normed(x, "backward.final_layernorm.weight").to(embedding.dtype)}
