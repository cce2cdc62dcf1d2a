"""The method, transcribed: the Llama forward and the three NextLat terms in plain float64 torch.

Purpose: the oracle that the model and the objective are tested with. Written from the equations alone, with a loop over
rows, positions and horizons where the equations have an index; slow on purpose.
Invariant: imports nothing of the package, so that it can share no mistake with it.
Command: `pytest tests/kit/test_reference.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPSILON = 1e-5
NO_DOCUMENT = -1


def counts_for_next_token(document_ids: Tensor, loss_mask: Tensor, row: int, t: int) -> bool:
    """Whether position t of the row counts for L_ntp: x_{t+1} is a loss token of the document that holds x_t."""
    document = int(document_ids[row, t])
    return document != NO_DOCUMENT and int(document_ids[row, t + 1]) == document and bool(loss_mask[row, t + 1])


def counts_for_hidden(document_ids: Tensor, row: int, t: int, i: int) -> bool:
    """Whether the pair (t, i) counts for L_h: the target state exists and t … t+i lie in one document."""
    last_position = document_ids.shape[1] - 2  # the last token is only ever a target and has no state
    document = int(document_ids[row, t])
    if t + i > last_position or document == NO_DOCUMENT:
        return False
    return all(int(document_ids[row, t + step]) == document for step in range(i + 1))


def counts_for_kl(document_ids: Tensor, loss_mask: Tensor, row: int, t: int, i: int) -> bool:
    """Whether the pair (t, i) counts for L_kl: it counts for L_h, and position t+i counts for L_ntp."""
    return counts_for_hidden(document_ids, row, t, i) and counts_for_next_token(document_ids, loss_mask, row, t + i)


def counts_for_mtp(document_ids: Tensor, loss_mask: Tensor, row: int, t: int, i: int) -> bool:
    """Whether the pair (t, i) counts for L_mtp: x_{t+1+i} is a loss token and t … t+1+i lie in one document."""
    target, document = t + 1 + i, int(document_ids[row, t])
    if target >= document_ids.shape[1] or document == NO_DOCUMENT:
        return False
    return bool(loss_mask[row, target]) and all(int(document_ids[row, j]) == document for j in range(t, target + 1))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + epsilon)


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of [s, heads, d]: dimension j turns with dimension j + d/2, by the angle t·base^(-2j/d)."""
    s, _, d = x.shape
    half = d // 2
    rows = []
    for t in range(s):
        angle = torch.tensor([t * base ** (-2 * j / d) for j in range(half)], dtype=x.dtype)
        cos, sin = torch.cos(angle), torch.sin(angle)
        first, second = x[t, :, :half], x[t, :, half:]
        rows.append(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))
    return torch.stack(rows)


def attention(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor) -> Tensor:
    """q [s, heads, d], k and v [s, groups, d], document_ids [s] -> [s, heads·d]: causal, inside one document."""
    s, heads, d = q.shape
    groups = k.shape[1]
    rows = []
    for t in range(s):
        seen = [j for j in range(t + 1) if int(document_ids[j]) == int(document_ids[t])]
        outputs = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = k[seen, group] @ q[t, head] / math.sqrt(d)
            outputs.append(torch.softmax(scores, dim=0) @ v[seen, group])
        rows.append(torch.cat(outputs))
    return torch.stack(rows)


def decoder_layer(
    x: Tensor,
    weights: dict[str, Tensor],
    prefix: str,
    document_ids: Tensor,
    *,
    num_attention_heads: int,
    num_query_groups: int,
    rotary_base: float,
    norm_epsilon: float,
) -> Tensor:
    """One pre-norm layer on one row, [s, h] -> [s, h]."""
    s = x.shape[0]
    normed = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], norm_epsilon)
    q = (normed @ weights[f"{prefix}.self_attn.q_proj.weight"].T).reshape(s, num_attention_heads, -1)
    k = (normed @ weights[f"{prefix}.self_attn.k_proj.weight"].T).reshape(s, num_query_groups, -1)
    v = (normed @ weights[f"{prefix}.self_attn.v_proj.weight"].T).reshape(s, num_query_groups, -1)
    attended = attention(rotate(q, rotary_base), rotate(k, rotary_base), v, document_ids)
    x = x + attended @ weights[f"{prefix}.self_attn.o_proj.weight"].T

    normed = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], norm_epsilon)
    gate = normed @ weights[f"{prefix}.mlp.gate_proj.weight"].T
    up = normed @ weights[f"{prefix}.mlp.up_proj.weight"].T
    return x + (gate * torch.sigmoid(gate) * up) @ weights[f"{prefix}.mlp.down_proj.weight"].T


def predict(state: Tensor, embedding: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """p_psi(h, x) = h + MLP(LayerNorm(concat(h, e(x)))) for one state [h] and one embedding [h]."""
    joint = torch.cat([state, embedding])
    centred = joint - joint.mean()
    normed = centred / torch.sqrt((centred * centred).mean() + LAYER_NORM_EPSILON)
    y = normed * weights["latent_predictor.layer_norm.weight"] + weights["latent_predictor.layer_norm.bias"]
    for name in ("linear_in", "linear_mid"):
        y = weights[f"latent_predictor.{name}.weight"] @ y
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    return state + weights["latent_predictor.linear_out.weight"] @ y


def smooth_l1(target: Tensor, value: Tensor) -> Tensor:
    """Mean over elements of: half the squared difference below one, the difference minus one half above."""
    difference = (target - value).abs()
    return torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()


def mean_of(values: list[Tensor]) -> Tensor:
    """Sum over the count; a mean over nothing is zero."""
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def reference_terms(
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
    lambda_hidden: float,
    lambda_kl: float,
    lambda_mtp: float = 1.0,
    lambda_next_token: float = 1.0,
    stop_gradient_target: bool = True,
    stop_gradient_head: bool = True,
    labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """Loss terms of one global batch, differentiable with respect to every tensor in `weights`.

    weights: Hugging Face Llama names (without `lm_head.weight` the head is the embedding) plus `latent_predictor.*` or
    `mtp.layers.*`; without the former, or with horizon 0, `hidden` and `kl` are zero, without the latter `mtp` is.
    tokens, document_ids (-1 is padding), loss_mask (token j may be a target): [b, s+1].
    labels: [b, s+1], what is predicted in a token's place; without it the token.
    Returns float64 scalars `loss`, `next_token`, `hidden`, `kl`, `mtp`, and `logits` [b, s, vocab], `hidden_states`
    [b, s, h].
    """
    weights = {name: weight.double() for name, weight in weights.items()}
    labels = tokens if labels is None else labels
    embedding_weight = weights["model.embed_tokens.weight"]
    head_weight = weights.get("lm_head.weight", embedding_weight)
    num_layers = len({name.split(".")[2] for name in weights if name.startswith("model.layers.")})
    mtp_layers = len({name.split(".")[2] for name in weights if name.startswith("mtp.layers.")})
    if not any(name.startswith("latent_predictor.") for name in weights):
        horizon = 0
    batch, s = tokens.shape[0], tokens.shape[1] - 1

    hidden_states = []
    for row in range(batch):
        x = embedding_weight[tokens[row, :s]]
        for layer in range(num_layers):
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
        hidden_states.append(rms_norm(x, weights["model.norm.weight"], norm_epsilon))
    h = torch.stack(hidden_states)
    logits = h @ head_weight.T
    positions = [(row, t) for row in range(batch) for t in range(s)]

    next_token = mean_of(
        [
            -F.log_softmax(logits[row, t], dim=0)[labels[row, t + 1]]
            for row, t in positions
            if counts_for_next_token(document_ids, loss_mask, row, t)
        ]
    )

    hidden = torch.zeros((), dtype=torch.float64)
    kl = torch.zeros((), dtype=torch.float64)
    predicted = {(row, t): h[row, t] for row, t in positions}  # ĥ_{t+i} reached from t; at i = 0 it is h_t itself
    for i in range(1, horizon + 1):
        hidden_values, kl_values = [], []
        for row, t in positions:
            if not counts_for_hidden(document_ids, row, t, i):
                continue
            predicted[row, t] = predict(predicted[row, t], embedding_weight[tokens[row, t + i]], weights)
            target = h[row, t + i].detach()
            moving = target if stop_gradient_target else h[row, t + i]
            hidden_values.append(smooth_l1(moving, predicted[row, t]))
            if counts_for_kl(document_ids, loss_mask, row, t, i):
                teacher = F.log_softmax(head_weight.detach() @ target, dim=0)
                student_weight = head_weight.detach() if stop_gradient_head else head_weight
                student = F.log_softmax(student_weight @ predicted[row, t], dim=0)
                kl_values.append((teacher.exp() * (teacher - student)).sum())
        hidden = hidden + mean_of(hidden_values) / horizon
        kl = kl + mean_of(kl_values) / horizon

    mtp = torch.zeros((), dtype=torch.float64)
    for i in range(1, mtp_layers + 1):
        values = []
        for row in range(batch):
            prefix = f"mtp.layers.{i - 1}"
            x = decoder_layer(
                h[row],
                weights,
                prefix,
                document_ids[row, :s],
                num_attention_heads=num_attention_heads,
                num_query_groups=num_query_groups,
                rotary_base=rotary_base,
                norm_epsilon=norm_epsilon,
            )
            ahead = rms_norm(x, weights[f"{prefix}.norm.weight"], norm_epsilon) @ head_weight.T
            values += [
                -F.log_softmax(ahead[t], dim=0)[labels[row, t + 1 + i]]
                for t in range(s)
                if counts_for_mtp(document_ids, loss_mask, row, t, i)
            ]
        mtp = mtp + mean_of(values) / mtp_layers

    return {
        "loss": lambda_next_token * next_token + lambda_hidden * hidden + lambda_kl * kl + lambda_mtp * mtp,
        "next_token": next_token,
        "hidden": hidden,
        "kl": kl,
        "mtp": mtp,
        "logits": logits,
        "hidden_states": h,
    }
