"""The Belief State Transformer, transcribed: the terms of `objective: bst` in plain float64 torch.

Written from the equations alone, with a loop over rows and pairs; slow on purpose. Imports nothing of the package, so
that it can share no mistake with it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kit.reference import NO_DOCUMENT, decoder_layer, mean_of, rms_norm


def stack(
    x: Tensor, weights: dict[str, Tensor], prefix: str, documents: Tensor, norm: str, sizes: dict[str, Any]
) -> Tensor:
    """One stack on one row [s, h] -> its final-normed states."""
    layers = len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})
    for layer in range(layers):
        x = decoder_layer(x, weights, f"{prefix}{layer}", documents, **sizes)
    return rms_norm(x, weights[norm], sizes["norm_epsilon"])


def text_head(before: Tensor, after: Tensor, weights: dict[str, Tensor], epsilon: float) -> tuple[Tensor, Tensor]:
    """Of one pair of states [h] each."""
    x = torch.cat([before, after])
    gate, up = (weights["text_head.linear_fc1"] @ x).chunk(2)
    x = x + weights["text_head.linear_fc2"] @ (gate * torch.sigmoid(gate) * up)
    following, previous = rms_norm(x, weights["text_head.layer_norm.weight"], epsilon).chunk(2)
    return following, previous


def bst_terms(
    weights: dict[str, Tensor],
    tokens: Tensor,
    document_ids: Tensor,
    loss_mask: Tensor,
    *,
    num_attention_heads: int,
    num_query_groups: int,
    rotary_base: float,
    norm_epsilon: float,
    lambda_next_token: float,
    lambda_previous: float,
    least_gap: int,
    largest_gap: int | None,
    labels: Tensor,
    drawn: Callable[[int, int, int], bool] = lambda row, t, j: True,
) -> dict[str, Tensor]:
    """`loss`, `next_token`, `previous`, `decoded`; see `reference.reference_terms`. `drawn`: whether a pair is."""
    weights = {name: weight.double() for name, weight in weights.items()}
    embedding = weights["model.embed_tokens.weight"]
    head = weights.get("lm_head.weight", embedding)
    sizes: dict[str, Any] = {
        "num_attention_heads": num_attention_heads,
        "num_query_groups": num_query_groups,
        "rotary_base": rotary_base,
        "norm_epsilon": norm_epsilon,
    }
    batch, s = tokens.shape[0], tokens.shape[1] - 1
    nexts, previous, decoded = [], [], []
    for row in range(batch):
        own = document_ids[row]
        f = stack(embedding[tokens[row, :s]], weights, "model.layers.", own[:s], "model.norm.weight", sizes)
        turned = torch.arange(s, 0, -1)  # x_s .. x_1
        b = stack(
            embedding[tokens[row, turned]],
            weights,
            "backward.layers.",
            own[turned],
            "backward.final_layernorm.weight",
            sizes,
        )
        state_of = {int(j): b[place] for place, j in enumerate(turned)}
        for t in range(s):
            for j in range(t + 1, s + 1):
                if int(own[t]) == NO_DOCUMENT or any(int(own[k]) != int(own[t]) for k in range(t, j + 1)):
                    continue
                at_end = j == s or int(own[j + 1]) != int(own[t])
                following, before = text_head(f[t], state_of[j], weights, norm_epsilon)
                of_next = -F.log_softmax(head @ following, dim=0)[labels[row, t + 1]]
                of_previous = -F.log_softmax(head @ before, dim=0)[labels[row, j - 1]]
                if at_end and j < s and j - t >= least_gap and bool(loss_mask[row, t + 1]):
                    decoded.append(of_next)
                near = largest_gap is None or j - t <= largest_gap
                if j - t < least_gap or not (at_end or (near and drawn(row, t, j))):
                    continue
                if bool(loss_mask[row, t + 1]):
                    nexts.append(of_next)
                if bool(loss_mask[row, j - 1]):
                    previous.append(of_previous)
    terms = {"next_token": mean_of(nexts), "previous": mean_of(previous), "decoded": mean_of(decoded).detach()}
    loss = (lambda_next_token * terms["next_token"] + lambda_previous * terms["previous"]) / 2
    return {"loss": loss, **terms}
