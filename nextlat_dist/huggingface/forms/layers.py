"""A decoder layer's canonical tensors taken apart into those of a Llama's layer."""

from __future__ import annotations

import torch

from nextlat_dist.config.schema import RunConfig


def layer_parts(part: str, tensor: torch.Tensor, config: RunConfig) -> dict[str, torch.Tensor]:
    """A decoder layer's canonical tensor as those of a Llama's layer, by name without `.weight`."""
    plain = {
        "input_layernorm.weight": "input_layernorm",
        "pre_mlp_layernorm.weight": "post_attention_layernorm",
        "self_attention.linear_proj.weight": "self_attn.o_proj",
        "mlp.linear_fc2.weight": "mlp.down_proj",
    }
    if part in plain:
        return {plain[part]: tensor}
    if part == "mlp.linear_fc1.weight":  # [gate; up]
        gate, up = tensor.chunk(2)
        return {"mlp.gate_proj": gate, "mlp.up_proj": up}
    assert part == "self_attention.linear_qkv.weight", part
    # One block per query group: its queries, its key, its value.
    groups, heads = config.model.query_groups, config.model.num_attention_heads
    head_size = config.model.hidden_size // heads
    blocks = tensor.view(groups, heads // groups + 2, head_size, -1)
    queries, key, value = blocks[:, :-2], blocks[:, -2], blocks[:, -1]
    return {
        "self_attn.q_proj": queries.reshape(heads * head_size, -1),
        "self_attn.k_proj": key.reshape(groups * head_size, -1),
        "self_attn.v_proj": value.reshape(groups * head_size, -1),
    }
