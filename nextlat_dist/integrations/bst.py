"""Bases of `objective: bst` in transformers: importing this module registers `model_type: nextlat_bst`.

    import nextlat_dist.integrations.bst
    model = AutoModelForCausalLM.from_pretrained(export)

A Llama whose states go through the text head, given that the text ends; see `objective.bst.text_head`, `objective.bst`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class NextLatBSTConfig(LlamaConfig):
    """A Llama's, with the inner size of the text head."""

    model_type = "nextlat_bst"
    text_head_size: int = 128


class NextTokenTextHead(nn.Module):
    """(f [..., h]) -> what the output head reads of the next token [..., h]."""

    def __init__(self, hidden_size: int, inner_size: int, epsilon: float) -> None:
        super().__init__()
        self.linear_fc1 = nn.Parameter(torch.empty(2 * inner_size, 2 * hidden_size).normal_(0, 0.02))
        self.linear_fc2 = nn.Parameter(torch.empty(2 * hidden_size, inner_size).normal_(0, 0.02))
        self.layer_norm = LlamaRMSNorm(2 * hidden_size, eps=epsilon)
        self.condition = nn.Parameter(torch.zeros(hidden_size))  # the state of the end token alone

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        x = torch.cat([states, self.condition.expand_as(states)], dim=-1)
        gate, up = nn.functional.linear(x, self.linear_fc1).chunk(2, dim=-1)
        x = x + nn.functional.linear(nn.functional.silu(gate) * up, self.linear_fc2)
        following, _ = self.layer_norm(x).chunk(2, dim=-1)
        return following


class NextLatBSTForCausalLM(LlamaForCausalLM):
    """logits(x_{t+1}) = W text_head(f_t, b(end))."""

    config_class = NextLatBSTConfig

    def __init__(self, config: NextLatBSTConfig) -> None:
        super().__init__(config)
        self.text_head = NextTokenTextHead(config.hidden_size, config.text_head_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """As `LlamaForCausalLM.forward`, whose arguments it has."""
        outputs = self.model(input_ids, **others)
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.text_head(outputs.last_hidden_state[:, last]))
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


AutoConfig.register(NextLatBSTConfig.model_type, NextLatBSTConfig)
AutoModelForCausalLM.register(NextLatBSTConfig, NextLatBSTForCausalLM)
