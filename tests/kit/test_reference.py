"""The oracle itself is held against Hugging Face's Llama, tables filled in by hand, and the stop-gradients.

Command: `pytest tests/kit/test_reference.py`.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kit.reference import counts_for_hidden, counts_for_kl, counts_for_mtp, counts_for_next_token, reference_terms

VOCAB, HIDDEN, FFN, HEADS, GROUPS, LAYERS, PREDICTOR = 23, 16, 24, 4, 2, 2, 20
ROTARY_BASE, NORM_EPSILON = 500.0, 1e-2  # an epsilon large enough that a wrong one shows


def terms(
    weights: dict[str, Tensor], tokens: Tensor, documents: Tensor, mask: Tensor, **changes: Any
) -> dict[str, Tensor]:
    settings: dict[str, Any] = {
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "rotary_base": ROTARY_BASE,
        "norm_epsilon": NORM_EPSILON,
        "horizon": 2,
        "lambda_hidden": 1.0,
        "lambda_kl": 1.0,
    }
    return reference_terms(weights, tokens, documents, mask, **{**settings, **changes})


def predictor_weights(hidden: int, inner: int, generator: torch.Generator) -> dict[str, Tensor]:
    shapes = {
        "layer_norm.weight": (2 * hidden,),
        "layer_norm.bias": (2 * hidden,),
        "linear_in.weight": (inner, 2 * hidden),
        "linear_mid.weight": (inner, inner),
        "linear_out.weight": (hidden, inner),
    }
    return {
        f"latent_predictor.{name}": torch.randn(shape, generator=generator, dtype=torch.float64) / 2
        for name, shape in shapes.items()
    }


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A random LlamaForCausalLM whose float32 islands (norms, rotary table) are lifted to float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with monkeypatch.context() as lifted:
        lifted.setattr(torch, "float32", torch.float64)
        lifted.setattr(torch, "float", torch.float64)
        lifted.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            rms_norm_eps=NORM_EPSILON,
            rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) / 2)
        yield model


def test_logits_equal_hugging_face(llama: Any) -> None:
    tokens = torch.randint(VOCAB, (3, 13))
    documents = torch.zeros_like(tokens)
    result = terms(dict(llama.state_dict()), tokens, documents, torch.ones_like(tokens, dtype=torch.bool))
    with torch.no_grad():
        output = llama(tokens[:, :-1], output_hidden_states=True)
        expected_loss = F.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert output.logits.dtype == torch.float64
    torch.testing.assert_close(result["logits"], output.logits, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(result["hidden_states"], output.hidden_states[-1], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(result["next_token"], expected_loss, rtol=1e-12, atol=0)


def test_packed_document_reads_as_if_alone(llama: Any) -> None:
    """Rotary positions are relative, so a document packed after others has the logits it has on its own."""
    tokens = torch.randint(VOCAB, (1, 14))
    documents = torch.tensor([[0] * 4 + [1] * 6 + [2] * 2 + [-1] * 2])
    result = terms(dict(llama.state_dict()), tokens, documents, torch.ones_like(tokens, dtype=torch.bool))
    for first, last in ((0, 4), (4, 10), (10, 12)):
        with torch.no_grad():
            alone = llama(tokens[:, first:last]).logits
        torch.testing.assert_close(result["logits"][:, first:last], alone, rtol=1e-10, atol=1e-10)


def test_what_counts_table_filled_in_by_hand() -> None:
    # index           0  1  2  3  4  5  6  7  8   9
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, -1, -1]])
    loss_mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 0]], dtype=torch.bool)
    # x_4 and x_7 may be targets but begin a document; x_8 is padding whatever the mask says.
    s = 9
    assert [t for t in range(s) if counts_for_next_token(documents, loss_mask, 0, t)] == [1, 2, 5]

    def hidden_pairs(i: int) -> list[int]:
        return [t for t in range(s) if counts_for_hidden(documents, 0, t, i)]

    def kl_pairs(i: int) -> list[int]:
        return [t for t in range(s) if counts_for_kl(documents, loss_mask, 0, t, i)]

    assert [hidden_pairs(i) for i in (1, 2, 3, 4)] == [[0, 1, 2, 4, 5], [0, 1, 4], [0], []]
    assert [kl_pairs(i) for i in (1, 2, 3, 4)] == [[0, 1, 4], [0], [], []]
    for i in (1, 2, 3, 4):  # what looks as far ahead counts for both
        assert [t for t in range(s) if counts_for_mtp(documents, loss_mask, 0, t, i)] == kl_pairs(i)


def test_last_token_is_a_target_without_a_state() -> None:
    documents = torch.zeros(1, 4, dtype=torch.long)
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert [t for t in range(3) if counts_for_next_token(documents, mask, 0, t)] == [0, 1, 2]
    assert [t for t in range(3) if counts_for_hidden(documents, 0, t, 1)] == [0, 1]
    assert [t for t in range(3) if counts_for_kl(documents, mask, 0, t, 1)] == [0, 1]


def test_a_repeated_document_id_is_one_span_only_where_it_is_unbroken() -> None:
    documents = torch.tensor([[0, 1, 0, 0]])
    assert not counts_for_hidden(documents, 0, 0, 2)


def bigram_weights(**changes: Tensor) -> dict[str, Tensor]:
    """No layers and two dimensions: every number of the loss can be worked out on paper.

    e(0) = (1, 0), e(1) = (0, 1), e(2) = (-1, 0), all of mean square 1/2, so with epsilon 0 the state is √2·e(x); a
    predictor whose last matrix is zero leaves the state as it was.
    """
    weights = {
        "model.embed_tokens.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64),
        "model.norm.weight": torch.ones(2, dtype=torch.float64),
        "lm_head.weight": torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64),
        **predictor_weights(2, 3, torch.Generator().manual_seed(1)),
    }
    weights["latent_predictor.linear_out.weight"] = torch.zeros(2, 3, dtype=torch.float64)
    return {**weights, **changes}


def test_loss_terms_worked_out_by_hand() -> None:
    """Two rows with unequal counts: the means are over the batch, not over rows, and per horizon step."""
    tokens = torch.tensor([[0, 0, 2, 1, 1], [1, 0, 0, 0, 0]])
    documents = torch.tensor([[0, 0, 0, 0, 0], [0, 0, -1, -1, -1]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
    result = terms(bigram_weights(), tokens, documents, mask, norm_epsilon=0.0, lambda_hidden=2.0, lambda_kl=3.0)

    # Logits are (√2, 0, 0) after token 0, (0, 0, 0) after token 1, (-√2, 0, 0) after token 2.
    up, down = math.exp(math.sqrt(2)), math.exp(-math.sqrt(2))
    odds = {0: (up, 1, 1), 1: (1, 1, 1), 2: (down, 1, 1)}
    probability = {token: [value / sum(values) for value in values] for token, values in odds.items()}
    steps = [(0, 0), (0, 2), (2, 1), (1, 1), (1, 0)]  # the last one is the second row's only one
    next_token = sum(-math.log(probability[x][y]) for x, y in steps) / 5

    # SmoothL1 of states √2·e: 0→2 differs by 2√2 in one of two elements; 0→1 and 2→1 by √2 in both.
    far = (2 * math.sqrt(2) - 0.5) / 2
    near = math.sqrt(2) - 0.5
    hidden = ((0 + far + near + near) / 4 + (far + near) / 2) / 2  # i = 1: 0→0, 0→2, 2→1, 1→0 (row 2); i = 2: 0→2, 0→1

    def divergence(teacher: int, student: int) -> float:
        pairs = zip(probability[teacher], probability[student], strict=True)
        return sum(p * math.log(p / q) for p, q in pairs)

    # The second row's pair ends at position 1, whose next token is padding: it counts for L_h, not for L_kl.
    kl = ((0 + divergence(2, 0) + divergence(1, 2)) / 3 + (divergence(2, 0) + divergence(1, 0)) / 2) / 2

    assert float(result["next_token"]) == pytest.approx(next_token, rel=1e-12)
    assert float(result["hidden"]) == pytest.approx(hidden, rel=1e-12)
    assert float(result["kl"]) == pytest.approx(kl, rel=1e-12)
    assert float(result["loss"]) == pytest.approx(next_token + 2 * hidden + 3 * kl, rel=1e-12)


def test_predictor_equals_torch_modules() -> None:
    """One horizon step against torch's own LayerNorm, Linear, GELU, SmoothL1 and KL divergence."""
    weights = bigram_weights(**predictor_weights(2, 3, torch.Generator().manual_seed(2)))
    tokens = torch.tensor([[0, 1, 2]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    result = terms(weights, tokens, torch.zeros_like(tokens), mask, horizon=1)
    h0, h1 = result["hidden_states"][0]
    part = {name.removeprefix("latent_predictor."): weight for name, weight in weights.items()}
    y = torch.cat([h0, weights["model.embed_tokens.weight"][1]])
    y = F.layer_norm(y, (4,), part["layer_norm.weight"], part["layer_norm.bias"])
    y = F.gelu(F.linear(y, part["linear_in.weight"]))
    y = F.gelu(F.linear(y, part["linear_mid.weight"]))
    predicted = h0 + F.linear(y, part["linear_out.weight"])
    torch.testing.assert_close(result["hidden"], F.smooth_l1_loss(predicted, h1), rtol=1e-12, atol=0)
    teacher, student = ((weights["lm_head.weight"] @ state).log_softmax(0) for state in (h1, predicted))
    expected = F.kl_div(student, teacher, reduction="sum", log_target=True)
    torch.testing.assert_close(result["kl"], expected, rtol=1e-12, atol=0)


def test_rollout_feeds_its_own_prediction_back() -> None:
    """At horizon 2 the second step starts from the first step's prediction and reads the token it arrives at."""
    weights = bigram_weights(**predictor_weights(2, 3, torch.Generator().manual_seed(3)))
    tokens = torch.tensor([[0, 1, 2, 0]])
    documents = torch.zeros_like(tokens)
    mask = torch.ones(1, 4, dtype=torch.bool)
    one = terms(weights, tokens, documents, mask, horizon=1)["hidden"]
    two = terms(weights, tokens, documents, mask, horizon=2)
    h = two["hidden_states"][0]

    def step(state: Tensor, token: int) -> Tensor:
        y = torch.cat([state, weights["model.embed_tokens.weight"][token]])
        norm = (weights["latent_predictor.layer_norm.weight"], weights["latent_predictor.layer_norm.bias"])
        y = F.gelu(weights["latent_predictor.linear_in.weight"] @ F.layer_norm(y, (4,), *norm))
        y = F.gelu(weights["latent_predictor.linear_mid.weight"] @ y)
        return state + weights["latent_predictor.linear_out.weight"] @ y

    second = F.smooth_l1_loss(step(step(h[0], 1), 2), h[2])
    torch.testing.assert_close(two["hidden"], (one + second) / 2, rtol=1e-12, atol=0)


def test_horizon_zero_or_no_predictor_leaves_the_next_token_term() -> None:
    tokens = torch.tensor([[0, 1, 2, 0]])
    documents, mask = torch.zeros_like(tokens), torch.ones(1, 4, dtype=torch.bool)
    weights = bigram_weights()
    bare = {name: weight for name, weight in weights.items() if not name.startswith("latent_predictor.")}
    for result in (terms(weights, tokens, documents, mask, horizon=0), terms(bare, tokens, documents, mask)):
        assert float(result["hidden"]) == float(result["kl"]) == 0.0
        assert torch.equal(result["loss"], result["next_token"])


def test_terms_that_nothing_counts_for_are_zero() -> None:
    tokens = torch.tensor([[0, 1, 2, 0]])
    documents, mask = torch.full_like(tokens, -1), torch.ones(1, 4, dtype=torch.bool)
    assert float(terms(bigram_weights(), tokens, documents, mask)["loss"]) == 0.0


def gradient(term: Tensor, weight: Tensor) -> Tensor:
    (value,) = torch.autograd.grad(term, weight, retain_graph=True, allow_unused=True)
    return torch.zeros_like(weight) if value is None else value


def test_stop_gradients() -> None:
    """One pair (0, 1) of tokens 0 → 1: the target state comes from token 1 alone, the start from token 0 alone."""
    weights = {name: weight.clone().requires_grad_() for name, weight in bigram_weights().items()}
    tokens = torch.tensor([[0, 1, 2]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    result = terms(weights, tokens, torch.zeros_like(tokens), mask, horizon=1, norm_epsilon=0.5)
    assert not gradient(result["kl"], weights["lm_head.weight"]).any()
    for term in ("hidden", "kl"):
        embedding = gradient(result[term], weights["model.embed_tokens.weight"])
        assert embedding[0].any(), "the start state h_t carries a gradient"
        assert not embedding[1].any(), "the target state carries none (and a zero predictor does not read e(x))"
        assert gradient(result[term], weights["latent_predictor.linear_out.weight"]).any()
    assert gradient(result["next_token"], weights["lm_head.weight"]).any()


def test_gradients_reach_the_embedding_of_the_token_read_by_the_predictor() -> None:
    random = bigram_weights(**predictor_weights(2, 3, torch.Generator().manual_seed(4)))
    weights = {name: weight.clone().requires_grad_() for name, weight in random.items()}
    tokens = torch.tensor([[0, 1, 2]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    result = terms(weights, tokens, torch.zeros_like(tokens), mask, horizon=1, norm_epsilon=0.5)
    for term in ("hidden", "kl"):
        assert gradient(result[term], weights["model.embed_tokens.weight"])[1].any()
    for name, weight in weights.items():
        assert gradient(result["loss"], weight).any(), name


def test_head_tied_to_the_embedding_is_frozen_in_the_kl() -> None:
    """With a tied head the embedding moves by what flows through states and e(x) only, as with an untied copy."""
    untied = bigram_weights(**predictor_weights(2, 3, torch.Generator().manual_seed(5)))
    untied["lm_head.weight"] = untied["model.embed_tokens.weight"].clone()
    tied = {name: weight.clone() for name, weight in untied.items() if name != "lm_head.weight"}
    tokens = torch.tensor([[0, 1, 2, 1]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    gradients = []
    for weights in (untied, tied):
        embedding = weights["model.embed_tokens.weight"].requires_grad_()
        result = terms(weights, tokens, torch.zeros_like(tokens), mask, norm_epsilon=0.5)
        gradients.append(gradient(result["kl"], embedding))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-15)
