"""Joint multi-token prediction, transcribed: the terms of `objective: jtp` in plain float64 torch.

Written from the equations alone, with a loop over rows, positions and places; slow on purpose. Imports nothing of the
package, so that it can share no mistake with it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kit.reference import counts_for_mtp, counts_for_next_token, decoder_layer, mean_of, rms_norm


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred * centred).mean() + 1e-5) * weight + bias


def fetch(state: Tensor, embedded: list[Tensor], weights: dict[str, Tensor], heads: int) -> list[Tensor]:
    """Outputs 0 .. d for one state h_t [h] and e(x_t) .. e(x_{t+d})."""
    hidden = len(state)
    size = hidden // heads
    read = [
        layer_norm(
            e + weights["fetch.scale"][0] * state, weights["fetch.layer_norm.weight"], weights["fetch.layer_norm.bias"]
        )
        for e in embedded
    ]
    queries, keys, values = (
        [weights["fetch.linear_qkv"][part * hidden : (part + 1) * hidden] @ c for c in read] for part in range(3)
    )
    outputs = []
    for i in range(len(read)):
        of_heads = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            scores = [
                queries[i][own] @ keys[j][own] / math.sqrt(size) + weights["fetch.relative_bias"][head, i, j]
                for j in range(i + 1)
            ]
            shares = torch.softmax(torch.stack(scores), dim=0)
            of_heads.append(sum((shares[j] * values[j][own] for j in range(i + 1)), torch.zeros(size).double()))
        outputs.append(weights["fetch.linear_proj"] @ torch.cat(of_heads))
    return outputs


def jtp_terms(
    weights: dict[str, Tensor],
    tokens: Tensor,
    document_ids: Tensor,
    loss_mask: Tensor,
    *,
    num_attention_heads: int,
    num_query_groups: int,
    rotary_base: float,
    norm_epsilon: float,
    horizon: int,
    lambda_jtp: float,
    lambda_next_token: float,
    labels: Tensor,
) -> dict[str, Tensor]:
    """`loss`, `next_token`, `jtp`, and what the head says of the next token, `logits` [b, s, vocab]; see
    `reference.reference_terms`.
    """
    weights = {name: weight.double() for name, weight in weights.items()}
    embedding, norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
    head = weights.get("lm_head.weight", embedding)
    layers = len({name.split(".")[2] for name in weights if name.startswith("model.layers.")})
    batch, s = tokens.shape[0], tokens.shape[1] - 1
    values: list[list[Tensor]] = [[] for _ in range(horizon + 1)]
    logits = []
    for row in range(batch):
        x = embedding[tokens[row, :s]]
        for layer in range(layers):
            x = decoder_layer(
                x,
                weights,
                f"model.layers.{layer}",
                document_ids[row, :s],
                num_attention_heads=num_attention_heads,
                num_query_groups=num_query_groups,
                rotary_base=rotary_base,
                norm_epsilon=norm_epsilon,
            )
        for t in range(s):
            reach = min(horizon, s - 1 - t)
            embedded = [embedding[tokens[row, t + i]] for i in range(reach + 1)]
            outputs = fetch(x[t], embedded, weights, min(4, num_attention_heads))
            for i, output in enumerate(outputs):
                state = rms_norm(output + x[t] if i else output, norm, norm_epsilon)
                said = F.log_softmax(head @ state, dim=0)
                if i == 0:
                    logits.append(head @ state)
                counts = (
                    counts_for_mtp(document_ids, loss_mask, row, t, i)
                    if i
                    else counts_for_next_token(document_ids, loss_mask, row, t)
                )
                if counts:
                    values[i].append(-said[labels[row, t + 1 + i]])
    next_token, *ahead = (mean_of(own) for own in values)
    jtp = torch.stack(ahead).mean()
    return {
        "loss": lambda_next_token * next_token + lambda_jtp * jtp,
        "next_token": next_token,
        "jtp": jtp,
        "logits": torch.stack(logits).view(batch, s, -1),
    }
