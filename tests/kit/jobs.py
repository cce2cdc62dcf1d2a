"""Jobs for the ranks of distributed tests: functions of a configuration, importable by the rank processes."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from nextlat_dist.config.load import config_from_dict
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.model.initialize import canonical_parameters
from nextlat_dist.model.rows import Batch
from nextlat_dist.model.sharding import Rules, merge, sharding_of
from nextlat_dist.objective.terms import named_terms, term_counts, term_weights
from nextlat_dist.parallel.dims import ParallelDims, all_reduce_sum
from nextlat_dist.training.engine.build import build_engine
from nextlat_dist.training.engine.deepspeed_engine import DeepSpeedEngine

VOCAB = 250  # padded to 256: the padding lies on the last tensor-parallel rank
LENGTH = 24


def tiny_config(**sections: dict[str, Any]) -> dict[str, Any]:
    """A four-layer model with grouped queries; `sections` are merged over it."""
    config: dict[str, Any] = {
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 64,
            "vocab_size": VOCAB,
            "make_vocab_size_divisible_by": 8,
        },
        "predictor": {"hidden_size": 48},
        "objective": {"name": "nextlat", "horizon": 3, "lambda_hidden": 0.7, "lambda_kl": 1.3},
        "data": {"sequence_length": LENGTH},
        "parallel": {"zero_stage": 0},
        "training": {"micro_batch_size": 4, "global_batch_size": 8},
        "optimizer": {"clip_grad": 0.5, "lr": 1e-3},
    }
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values}
    return config


def ragged_rows(rows: int, seed: int, vocab: int = VOCAB, length: int = LENGTH) -> Batch:
    """Rows of length + 1 tokens: documents of ragged length, ragged prompt masks, padding at some ends, and labels
    that are not the tokens in some places.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    tokens = torch.randint(0, vocab, (rows, length + 1), generator=generator)
    documents = torch.full((rows, length + 1), -1)
    loss_mask = torch.zeros(rows, length + 1, dtype=torch.bool)
    for row in range(rows):
        start, number = 0, 0
        end_of_row = length + 1 - (draw(0, 6) if row % 2 else 0)
        while start < end_of_row:
            end = min(end_of_row, start + draw(1, 12))
            prompt = draw(1, 5)
            documents[row, start:end] = number
            loss_mask[row, start + prompt : end] = True
            start, number = end, number + 1
    others = torch.randint(0, vocab, tokens.shape, generator=generator)
    labels = torch.where(torch.rand(tokens.shape, generator=generator) < 0.3, others, tokens)
    return Batch.of(tokens, documents, loss_mask, labels)


def set_up(raw: dict[str, Any]) -> tuple[RunConfig, ParallelDims]:
    """Process groups of this layout, in place of those of the job before."""
    from deepspeed.utils import groups
    from megatron.core import parallel_state

    for engine in [found for found in gc.get_objects() if issubclass(type(found), DeepSpeedEngine)]:
        engine.close()
    gc.collect()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    # A gloo group wakes its threads a hundred times a second for as long as it lives: a few hundred groups take a core.
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    for name, value in vars(groups).items():  # DeepSpeed keeps what it created
        if isinstance(value, dist.ProcessGroup) or name == "mpu":
            setattr(groups, name, None)
    config = config_from_dict(raw)
    return config, ParallelDims.initialize(config.parallel)


def train_steps(engine: DeepSpeedEngine, config: RunConfig, dims: ParallelDims, steps: range) -> list[dict[str, float]]:
    """Loss terms and gradient norm of each step; step i trains on `ragged_rows(seed=i)`, whatever the layout."""
    results = []
    for step in steps:
        whole, rows = ragged_rows(config.training.global_batch_size, seed=step), config.training.micro_batch_size
        if config.objective.semantics == "release":
            whole = whole.as_released()
        batch = whole.chunk(dims.data_size)[dims.data_rank]
        counts = all_reduce_sum(term_counts(batch, config.objective, rows), dims.data_group)
        micro_batches = batch.split(rows)
        sums = engine.train_step(micro_batches, term_weights(counts, config.objective))
        dist.all_reduce(sums)
        terms = named_terms(sums / dims.tensor_size, counts, config.objective)
        results.append({**terms, "gradient_norm": engine.gradient_norm()})
    return results


def first_steps(raw: dict[str, Any], steps: int) -> dict[str, Any] | None:
    """On rank 0: the first step's gradients {canonical name: full tensor} and the metrics of `steps` steps."""
    config, dims = set_up(raw)
    engine = build_engine(config, dims)
    metrics = train_steps(engine, config, dims, range(1))
    gradients = gather_full(_first_gradients(engine, config), dims, engine.sharding)
    metrics += train_steps(engine, config, dims, range(1, steps))
    return {"gradients": gradients, "metrics": metrics} if dims.rank == 0 else None


def _first_gradients(engine: DeepSpeedEngine, config: RunConfig) -> dict[str, torch.Tensor]:
    """What the optimizer saw in its only step so far: Adam's first moment is then (1 - beta1) times the gradient."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed 0.19.8 links every group's state after the first group's first step, when the others have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    gradients = {}
    for name, parameter in canonical_parameters(engine.module):
        if config.parallel.zero_stage == 0:
            moment = engine.optimizer.state[parameter]["exp_avg"]
        else:
            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        assert moment is not None, name
        gradients[name] = moment.float() / (1 - config.optimizer.betas[0])
    return gradients


def gather_full(
    local: dict[str, torch.Tensor], dims: ParallelDims, rules: Rules | None = None
) -> dict[str, torch.Tensor]:
    """Full tensors from every rank's shards; replicas (data ranks, tied stages) must agree exactly or nearly."""
    everything: list[Any] = [None] * dims.world_size
    dist.all_gather_object(everything, (dims.tensor_rank, dims.data_rank, dims.pipeline_rank, local))
    full: dict[str, torch.Tensor] = {}
    for pipeline_rank in range(dims.pipeline_size):
        shards = sorted(
            ((t, tensors) for t, d, p, tensors in everything if d == 0 and p == pipeline_rank), key=lambda item: item[0]
        )
        for name in shards[0][1]:
            parts = [tensors[name] for _, tensors in shards]
            sharding = sharding_of(name, rules)
            if not sharding.splits(len(parts)):
                for part in parts[1:]:
                    torch.testing.assert_close(part, parts[0], rtol=1e-5, atol=1e-9)
            tensor = merge(parts if sharding.splits(len(parts)) else parts[:1], sharding)
            if name in full:
                torch.testing.assert_close(tensor, full[name], rtol=1e-5, atol=1e-9)
            full[name] = tensor
    return full
