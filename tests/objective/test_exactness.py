"""In float64 the loss terms and every gradient equal the transcription of the method in `tests/kit/reference.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nextlat_dist.config.load import config_from_dict
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.huggingface.forms.catalogue import CONDITION
from nextlat_dist.huggingface.forms.layers import layer_parts
from nextlat_dist.huggingface.weights import mtp_tensors, to_llama
from nextlat_dist.model.rows import Batch
from nextlat_dist.objective.bst.pairs import uniform
from tests.kit import jobs
from tests.kit.harness import Ranks
from tests.kit.reference import reference_terms
from tests.kit.reference_bst import bst_terms
from tests.kit.reference_jtp import jtp_terms

TOLERANCE = 1e-10
OF_THE_METHOD = ("horizon", "lambda_hidden", "lambda_kl", "lambda_mtp", "stop_gradient_target", "stop_gradient_head")
REFERENCES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "jtp": (jtp_terms, ("horizon", "lambda_jtp")),
    "bst": (bst_terms, ("lambda_previous", "least_gap", "largest_gap")),
}


def term_gradients(raw: dict[str, Any]) -> dict[str, Any]:
    """Weights, the value of every term and its gradient for every parameter, from the production path in float64."""
    from nextlat_dist.model.initialize import canonical_parameters
    from nextlat_dist.model.layer_list import LayerStack, initialize, layer_list
    from nextlat_dist.objective.terms import named_terms, term_counts, term_groups, term_weights, weighted_sum

    config, dims = jobs.set_up(raw)
    stack = LayerStack(layer_list(config, dims, torch.float64))
    initialize(stack, config, dims)
    parameters = dict(canonical_parameters(stack))
    with torch.no_grad():  # norms at 1 and biases at 0 would hide a missing factor
        generator = torch.Generator().manual_seed(9)
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise)
    rows = jobs.ragged_rows(4, seed=3)
    counts = term_counts(rows, config.objective)
    sums = stack(rows.message)
    means = torch.where(counts > 0, 1 / counts.clamp(min=1), torch.zeros_like(counts))
    steps, place = config.objective.steps_ahead, torch.arange(len(counts))
    select = {"loss": term_weights(counts, config.objective), "next_token": means * (place == 0)}
    for number, group in enumerate(term_groups(config.objective)):
        select[group.name] = means * ((place - 1).div(steps, rounding_mode="floor") == number) / steps
    gradients = {}
    for name, weights in select.items():
        loss = weighted_sum(sums, weights)
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        gradients[name] = {
            key: torch.zeros_like(p) if g is None else g.detach()
            for (key, p), g in zip(parameters.items(), found, strict=True)
        }
    return {
        "rows": rows,
        "weights": {name: p.detach() for name, p in parameters.items()},
        "terms": named_terms(sums.detach(), counts, config.objective),
        "gradients": gradients,
    }


def _in_llama_names(canonical: dict[str, torch.Tensor], config: RunConfig) -> dict[str, torch.Tensor]:
    own = ("latent_predictor.", "fetch.", "text_head.", "backward.final_layernorm")
    predictor = {name: tensor for name, tensor in canonical.items() if name.startswith(own)}
    for name, tensor in canonical.items():  # the second stack's layers, as those of a Llama
        if name.startswith("backward.layers."):
            _, _, index, part = name.split(".", 3)
            pieces = layer_parts(part, tensor, config)
            predictor |= {f"backward.layers.{index}.{piece}.weight": value for piece, value in pieces.items()}
    mtp = {f"mtp.{name}": tensor for name, tensor in mtp_tensors(canonical, config).items()}
    llama = to_llama(canonical, config, eos_token_id=0)
    llama.pop(CONDITION, None)  # a constant that is made of weights
    return {**llama, **predictor, **mtp}


def _reference(result: dict[str, Any], config: RunConfig, **more: Any) -> tuple[dict[str, float], dict[str, Any]]:
    weights = {n: t.clone().requires_grad_() for n, t in _in_llama_names(result["weights"], config).items()}
    rows, objective = result["rows"], config.objective
    terms_of, keys = REFERENCES.get(objective.name, (reference_terms, OF_THE_METHOD))
    terms = terms_of(
        weights,
        rows.tokens,
        rows.document_ids,
        rows.loss_mask,
        num_attention_heads=config.model.num_attention_heads,
        num_query_groups=config.model.query_groups,
        rotary_base=config.model.rotary_base,
        norm_epsilon=config.model.norm_epsilon,
        labels=rows.labels,
        **{key: getattr(objective, key) for key in ("lambda_next_token", *keys)},
        **more,
    )
    gradients = {}
    for name in result["gradients"]:
        found: Any = [None] * len(weights)
        if terms[name].requires_grad:
            found = torch.autograd.grad(terms[name], list(weights.values()), retain_graph=True, allow_unused=True)
        gradients[name] = {
            key: torch.zeros_like(w) if g is None else g for (key, w), g in zip(weights.items(), found, strict=True)
        }
    return {name: float(terms[name].detach()) for name in gradients}, gradients


@pytest.fixture(scope="module", params=[1, 2, 3])
def exact(request: pytest.FixtureRequest, one_rank: Ranks) -> tuple[dict[str, Any], RunConfig]:
    raw = jobs.tiny_config(objective={"horizon": request.param})
    return one_rank.run(term_gradients, raw)[0], config_from_dict(raw)


@pytest.fixture(scope="module", params=[1, 3])
def exact_mtp(request: pytest.FixtureRequest, one_rank: Ranks) -> tuple[dict[str, Any], RunConfig]:
    raw = jobs.tiny_config(objective={"name": "mtp", "horizon": request.param, "lambda_mtp": 0.7})
    return one_rank.run(term_gradients, raw)[0], config_from_dict(raw)


def _assert_equal_the_equations(result: dict[str, Any], config: RunConfig, **more: Any) -> None:
    terms, gradients = _reference(result, config, **more)
    assert terms.keys() == result["terms"].keys()
    for name in terms:
        assert terms[name] > 0
        assert result["terms"][name] == pytest.approx(terms[name], rel=TOLERANCE), name
        ours = _in_llama_names(result["gradients"][name], config)
        assert ours.keys() == gradients[name].keys()
        for key, expected in gradients[name].items():
            scale = max(float(expected.norm()), 1e-12)
            assert float((ours[key] - expected).norm()) <= TOLERANCE * scale, f"{name}: {key}"


def test_terms_and_gradients_equal_the_equations(exact: tuple[dict[str, Any], RunConfig]) -> None:
    _assert_equal_the_equations(*exact)


FREE: dict[str, Any] = {"stop_gradient_target": False, "stop_gradient_head": False, "lambda_next_token": 0.4}


@pytest.mark.parametrize(("objective", "tied"), [(FREE | {"horizon": 3}, False), (FREE | {"horizon": 2}, True)])
def test_without_stop_gradients_all_equals_the_equations(
    objective: dict[str, Any], tied: bool, one_rank: Ranks
) -> None:
    raw = jobs.tiny_config(objective=objective, model={"tie_embeddings": tied})
    result = one_rank.run(term_gradients, raw)[0]
    _assert_equal_the_equations(result, config_from_dict(raw))


@pytest.mark.parametrize("unweighted", [["lambda_next_token", "lambda_kl"], ["lambda_hidden"]])
def test_a_term_without_weight_has_a_value_and_no_gradient(unweighted: list[str], one_rank: Ranks) -> None:
    objective = {"stop_gradient_target": False, "stop_gradient_head": False, **dict.fromkeys(unweighted, 0)}
    raw = jobs.tiny_config(objective=objective)
    result, config = one_rank.run(term_gradients, raw)[0], config_from_dict(raw)
    terms, gradients = _reference(result, config)
    assert result["terms"] == pytest.approx(terms, rel=TOLERANCE)
    ours = _in_llama_names(result["gradients"]["loss"], config)
    for key, expected in gradients["loss"].items():
        assert float((ours[key] - expected).norm()) <= TOLERANCE * max(float(expected.norm()), 1e-12), key
    for name in {"hidden", "kl"} & {name.removeprefix("lambda_") for name in unweighted}:
        assert not any(gradient.any() for gradient in result["gradients"][name].values()), name


def test_mtp_terms_and_gradients_equal_the_equations(exact_mtp: tuple[dict[str, Any], RunConfig]) -> None:
    _assert_equal_the_equations(*exact_mtp)
    gradients = exact_mtp[0]["gradients"]["mtp"]
    assert all(gradient.any() for gradient in gradients.values())  # trunk, head and embedding too


@pytest.mark.parametrize(("horizon", "tied"), [(1, False), (3, False), (2, True)])
def test_jtp_terms_and_gradients_equal_the_equations(horizon: int, tied: bool, one_rank: Ranks) -> None:
    objective = {"name": "jtp", "horizon": horizon, "lambda_jtp": 0.7, "lambda_next_token": 0.4}
    raw = jobs.tiny_config(objective=objective, model={"tie_embeddings": tied})
    result = one_rank.run(term_gradients, raw)[0]
    _assert_equal_the_equations(result, config_from_dict(raw))
    assert all(gradient.any() for gradient in result["gradients"]["jtp"].values())


@pytest.mark.parametrize(
    ("objective", "tied"),
    [
        ({}, False),
        ({"least_gap": 2, "lambda_previous": 0.3, "lambda_next_token": 0.7}, True),
        ({"largest_gap": 3}, False),
        ({"pair_rate": 0.4}, False),
        ({"pair_rate": 0.2, "least_gap": 2, "largest_gap": 5}, False),
    ],
    ids=str,
)
def test_bst_terms_and_gradients_equal_the_equations(objective: dict[str, Any], tied: bool, one_rank: Ranks) -> None:
    raw = jobs.tiny_config(objective={"name": "bst", **objective}, model={"tie_embeddings": tied, "num_layers": 2})
    result, config = one_rank.run(term_gradients, raw)[0], config_from_dict(raw)

    def drawn(row: int, t: int, j: int) -> bool:
        number, *place = (torch.tensor(value) for value in (int(result["rows"].row_numbers[row]), t, j))
        return float(uniform(number, *place)) < config.objective.pair_rate

    _assert_equal_the_equations(result, config, drawn=drawn)
    assert all(gradient.any() for gradient in result["gradients"]["loss"].values())


def test_the_next_token_objective_equals_the_equations(one_rank: Ranks) -> None:
    raw = jobs.tiny_config(objective={"name": "next_token", "lambda_next_token": 0.4})
    _assert_equal_the_equations(one_rank.run(term_gradients, raw)[0], config_from_dict(raw))


def test_head_gets_no_gradient_from_the_latent_terms(exact: tuple[dict[str, Any], RunConfig]) -> None:
    result, _ = exact
    for name in ("kl", "hidden"):
        assert not result["gradients"][name]["output_layer.weight"].any(), name
    assert result["gradients"]["next_token"]["output_layer.weight"].any()


def test_gradients_reach_predictor_trunk_and_embedding(exact: tuple[dict[str, Any], RunConfig]) -> None:
    result, _ = exact
    for name in ("kl", "hidden"):
        for key in ("latent_predictor.linear_in.weight", "decoder.layers.0.mlp.linear_fc1.weight"):
            assert result["gradients"][name][key].any(), (name, key)
        assert result["gradients"][name]["embedding.word_embeddings.weight"].any(), name


def target_gradients(raw: dict[str, Any]) -> list[bool]:
    """Whether the targets of L_h and L_kl get a gradient: states are a leaf, the last position is a pure target."""
    from nextlat_dist.model.layer_list import LayerStack, initialize, layer_list

    config, dims = jobs.set_up(raw)
    stack = LayerStack(layer_list(config, dims, torch.float64))
    initialize(stack, config, dims)
    length = config.data.sequence_length
    tokens = torch.arange(length + 1)[None] % config.model.vocab_size
    inputs = stack.run(Batch.of(tokens, torch.zeros_like(tokens), torch.ones_like(tokens)).message, stop=-1)
    leaf = inputs.hidden.detach().requires_grad_()
    sums = stack.layers[-1](inputs._replace(hidden=leaf, embedded=inputs.embedded.detach()))
    reached = []
    for index in range(1, len(sums)):
        (gradient,) = torch.autograd.grad(sums[index], leaf, retain_graph=True)
        assert gradient[0].any()  # position 0 starts a rollout
        reached.append(bool(gradient[-1].any()))  # the last position is only ever a target
    return reached


@pytest.mark.parametrize(("free", "hidden", "kl"), [({}, False, False), (FREE, True, False)], ids=["stopped", "free"])
def test_whether_target_states_get_a_gradient(free: dict[str, Any], hidden: bool, kl: bool, one_rank: Ranks) -> None:
    reached = one_rank.run(target_gradients, jobs.tiny_config(objective={**free, "horizon": 3}))[0]
    assert reached == [hidden] * 3 + [kl] * 3
