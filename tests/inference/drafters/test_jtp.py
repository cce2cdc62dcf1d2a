"""Joint multi-token prediction after training: its base, its drafts, and transformers' class; all of it lossless."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.base import load_base_weights, save_base_weights, weights_sha256
from nextlat_dist.huggingface.drafters.format import save_drafter
from nextlat_dist.huggingface.drafters.jtp import JTP, JTPConfig
from nextlat_dist.inference import load
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.drafters.jtp import JointTokenPrediction
from nextlat_dist.inference.engine.fetch import StaticFetchLlama
from tests.kit import jobs
from tests.kit.exports import reference_model
from tests.kit.form_exports import jtp_export
from tests.kit.harness import Ranks

HORIZON, CONTEXT, VOCAB = 2, 48, 5


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes: dict[str, Any] = {"vocab_size": VOCAB, "eos_token_id": 4, "max_position_embeddings": CONTEXT, "seed": 7}
    return jtp_export(tmp_path_factory.mktemp("jtp"), HORIZON, **changes)


@pytest.fixture(scope="module")
def decoder(export: Path) -> Decoder:
    return load(export, "cpu", torch.float64)


def outputs_of_training(raw: dict[str, Any], directory: str, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Logits of the next token, of the one after it, … on rows of one document [s - i, b, vocab]; writes an export."""
    from nextlat_dist.huggingface.weights import llama_config, to_llama
    from nextlat_dist.model.initialize import canonical_parameters
    from nextlat_dist.model.layer_list import LayerStack, initialize, layer_list
    from nextlat_dist.model.rows import Batch

    config, dims = jobs.set_up(raw)
    stack = LayerStack(layer_list(config, dims, torch.float32))
    initialize(stack, config, dims)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        message = Batch.of(tokens, torch.zeros_like(tokens), torch.ones_like(tokens)).message
        inputs = stack.run(message, stop=-1)
        objective: Any = stack.layers[-1]
        found = [objective.output_layer.logits(states) for states in objective.states(inputs)]
    canonical = {name: parameter.detach() for name, parameter in canonical_parameters(stack)}
    base = to_llama(canonical, config)
    save_base_weights(Path(directory), base)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    (Path(directory) / "config.json").write_text(json.dumps(llama_config(config, torch.float32, ids)))
    sizes = (config.model.hidden_size, config.model.vocab_size, config.objective.horizon)
    save_drafter(Path(directory), JTP, JTPConfig(*sizes, weights_sha256(base)), {})
    return [logits[..., : config.model.vocab_size] for logits in found]


def test_everybody_computes_what_training_does(tmp_path: Path, one_rank: Ranks) -> None:
    raw = jobs.tiny_config(objective={"name": "jtp", "horizon": 3})
    tokens = torch.randint(jobs.VOCAB, (2, jobs.LENGTH + 1), generator=torch.Generator().manual_seed(1))
    expected = one_rank.run(outputs_of_training, raw, str(tmp_path), tokens)[0]
    same: dict[str, Any] = {"rtol": 1e-3, "atol": 2e-4}
    with pytest.raises(ValueError, match=r"import nextlat_dist\.integrations\.jtp"):
        stock(tmp_path)
    model = reference_model(tmp_path, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[:, :-1]).logits.transpose(0, 1), expected[0], **same)
    decoder = load(tmp_path, "cpu", torch.float32)
    assert decoder.drafter is not None
    memory, cache = decoder.drafter.start(2, jobs.LENGTH), decoder.llama.new_cache(2, jobs.LENGTH)
    done = [0, 0]
    for counts in [(9, 5), (1, 1), (2, 3), (1, 6), (7, 1)]:
        new = torch.cat([tokens[row, done[row] : done[row] + count] for row, count in enumerate(counts)])
        states = decoder.llama.forward(new, counts, cache)
        done = [before + count for before, count in zip(done, counts, strict=True)]
        last = states[torch.tensor([counts[0] - 1, sum(counts) - 1])]
        logits = [decoder.llama.logits(last)]
        memory.begin(last)
        for step in range(3):
            logits.append(memory.logits(torch.stack([tokens[row, done[row] + step] for row in range(2)]), None))
        for step, found in enumerate(logits):
            for row in range(2):
                torch.testing.assert_close(found[row], expected[step][done[row] - 1, row], **same)
                assert float(found[row].std()) > 0.1


def stock(export: Path) -> Any:
    """What transformers makes of it where nobody has imported the module."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = CONFIG_MAPPING._extra_content.pop("nextlat_jtp", None)
    try:
        return AutoModelForCausalLM.from_pretrained(export, trust_remote_code=False)
    finally:
        if known is not None:
            CONFIG_MAPPING._extra_content["nextlat_jtp"] = known


PROMPTS = [[1, 2, 3], [1], [3, 0, 2, 2, 1, 3, 0, 3, 2, 1, 0, 0, 3], [2, 2], [0, 3, 1, 3, 2, 0, 1]]


@pytest.mark.parametrize("draft_length", [1, 2])
def test_greedy_output_is_that_of_no_drafts(decoder: Decoder, draft_length: int) -> None:
    plain = decoder.generate(PROMPTS, max_new_tokens=CONTEXT, draft_length=0)
    drafted = decoder.generate(PROMPTS, max_new_tokens=CONTEXT, draft_length=draft_length)
    assert [row.token_ids for row in drafted] == [row.token_ids for row in plain]
    accepted = [sum(row.accepted_by_position[step] for row in drafted) for step in range(draft_length)]
    offered = [sum(row.drafted_by_position[step] for row in drafted) for step in range(draft_length)]
    assert all(0 < some < most for some, most in zip(accepted, offered, strict=True))


def test_static_shapes_give_the_same(decoder: Decoder) -> None:
    opened = decoder.opened
    llama = StaticFetchLlama(opened.config, opened.weights, "cpu", torch.float64, capture=False)
    assert opened.drafter is not None
    static = Decoder(opened, llama, opened.drafter.kind.build(opened.drafter, llama, None))
    expected = decoder.generate(PROMPTS, max_new_tokens=20, draft_length=2)
    found = static.generate(PROMPTS, max_new_tokens=20, draft_length=2)
    assert [row.token_ids for row in found] == [row.token_ids for row in expected]


def test_a_batch_is_its_rows_alone(decoder: Decoder) -> None:
    together = decoder.generate(PROMPTS, max_new_tokens=20, draft_length=2, temperature=0.9, seed=3)
    for row, (prompt, result) in enumerate(zip(PROMPTS, together, strict=True)):
        (alone,) = decoder.generate([prompt], max_new_tokens=20, draft_length=2, temperature=0.9, seed=3 + row)
        assert alone.token_ids == result.token_ids
        assert alone.accepted_by_position == result.accepted_by_position


def test_no_more_than_its_places(decoder: Decoder) -> None:
    assert isinstance(decoder.drafter, JointTokenPrediction)
    with pytest.raises(UserError, match="proposes 2 tokens at most"):
        decoder.generate(PROMPTS, max_new_tokens=4, draft_length=3)


def test_a_base_without_fetch_is_refused(export: Path, tmp_path: Path) -> None:
    weights = load_base_weights(export)
    del weights["fetch.scale"]
    save_base_weights(tmp_path, weights)
    (tmp_path / "config.json").write_text((export / "config.json").read_text())
    with pytest.raises(UserError, match=r"fetch\.scale"):
        load(tmp_path)
