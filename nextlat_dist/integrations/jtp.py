"""Bases of `objective: jtp` in transformers: importing this module registers `model_type: nextlat_jtp`.

    import nextlat_dist.integrations.jtp
    model = AutoModelForCausalLM.from_pretrained(export)

A Llama whose last states go through Fetch and the final norm to the output head; see `objective.jtp`. The next token
alone: drafting is `nextlat_generate`'s, or this package's decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

LAYER_NORM_EPSILON = 1e-5


class NextLatJTPConfig(LlamaConfig):
    """A Llama's, with the sizes of Fetch."""

    model_type = "nextlat_jtp"
    horizon: int = 1
    fetch_heads: int = 4


class HeldNorm(LlamaRMSNorm):
    """The final norm, kept by the trunk under its usual name and applied after Fetch."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def normalise(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = super().forward(hidden_states)
        return normed


class NextTokenFetch(nn.Module):
    """Its weights; of its places only the first is computed."""

    def __init__(self, hidden_size: int, heads: int, horizon: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)
        self.scale = nn.Parameter(torch.full((1,), 0.1))
        self.linear_qkv = nn.Parameter(torch.empty(3 * hidden_size, hidden_size).normal_(0, 0.02))
        self.linear_proj = nn.Parameter(torch.empty(hidden_size, hidden_size).normal_(0, 0.02))
        self.relative_bias = nn.Parameter(torch.zeros(heads, horizon + 1, horizon + 1))

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Output 0: one place attends to itself alone."""
        read = self.layer_norm(embedded + self.scale * hidden)
        return nn.functional.linear(nn.functional.linear(read, self.linear_qkv.chunk(3)[2]), self.linear_proj)


class NextLatJTPForCausalLM(LlamaForCausalLM):
    """logits(x_{t+1}) = W norm(Fetch(h_t, e(x_t))_0)."""

    config_class = NextLatJTPConfig

    def __init__(self, config: NextLatJTPConfig) -> None:
        super().__init__(config)
        self.model.norm = HeldNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.fetch = NextTokenFetch(config.hidden_size, config.fetch_heads, config.horizon)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """As `LlamaForCausalLM.forward`, whose arguments it has."""
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        outputs = self.model(inputs_embeds=inputs_embeds, **others)
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        fetched = self.fetch(outputs.last_hidden_state[:, last], inputs_embeds[:, last])
        logits = self.lm_head(self.model.norm.normalise(fetched))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **others)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AutoConfig.register(NextLatJTPConfig.model_type, NextLatJTPConfig)
AutoModelForCausalLM.register(NextLatJTPConfig, NextLatJTPForCausalLM)
