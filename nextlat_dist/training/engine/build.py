"""From a configuration to a DeepSpeed engine: the one place that wraps the layer list.

Order: layer list -> one module or pipeline -> initial weights -> optimizer -> engine. Weights are drawn before
DeepSpeed sees the module, since ZeRO-3 partitions it; they depend on the seed and on names only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nextlat_dist.config.schema import RunConfig
from nextlat_dist.model.layer_list import LayerEntry, LayerStack, initialize, layer_list
from nextlat_dist.model.sharding import Rules, sharding_rules
from nextlat_dist.objective.terms import LossRecorder, number_of_terms
from nextlat_dist.parallel.device import communication_backend
from nextlat_dist.parallel.dims import ModelParallelUnit, ParallelDims
from nextlat_dist.training.engine.deepspeed_config import deepspeed_config
from nextlat_dist.training.engine.optimizer import build_optimizer, clip_before_step


class Engine:
    """A DeepSpeed engine that takes one global batch a step, whatever the layout."""

    def __init__(self, inner: Any, recorder: LossRecorder, dims: ParallelDims, terms: int, sharding: Rules) -> None:
        self.inner = inner
        self.dims = dims
        self.sharding = sharding
        self._recorder = recorder
        self._terms = terms

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.inner.module
        return module

    @property
    def optimizer(self) -> Any:
        return self.inner.optimizer

    @property
    def device(self) -> torch.device:
        device: torch.device = torch.device(self.inner.device)
        return device

    def gradient_norm(self) -> float:
        """Global L2 norm of the last step's gradient, before clipping."""
        norm = self.inner.get_global_grad_norm()
        assert norm is not None
        return float(norm)

    def term_sums(self) -> torch.Tensor:
        """This rank's term sums [terms] of the step under way, float64; zeros where no loss is computed."""
        return self._recorder.peek(self._terms, self.device)

    def train_step(self, micro_batches: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        """One optimizer step over this data-parallel rank's rows.

        Args:
            micro_batches: rows [micro batch, s + 1, 4] each, as many as accumulation steps.
            weights: of the term sums [terms], for the global batch (`objective.terms.term_weights`).

        Returns:
            This rank's term sums [terms], float64; zeros where no loss is computed.
        """
        # DeepSpeed averages over accumulation steps and data-parallel ranks; our weights are already global.
        scaled = (weights * len(micro_batches) * self.dims.data_size).float().to(self.device)
        if self.dims.pipeline_size > 1:
            self.inner.train_batch(self._pipeline_batches(micro_batches, scaled))
        else:
            self.inner.train()
            for rows in micro_batches:
                loss = self._recorder(self.inner(rows), scaled)
                self.inner.backward(loss)
                self.inner.step()
        return self._recorder.take(self._terms, self.device)

    @torch.no_grad()
    def evaluate(self, micro_batches: list[torch.Tensor]) -> torch.Tensor:
        """Term sums [terms] of this rank's rows, float64, without a step."""
        weights = torch.zeros(self._terms, device=self.device)
        if self.dims.pipeline_size > 1:
            self.inner.eval_batch(
                self._pipeline_batches(micro_batches, weights), reduce_output=None,
                num_micro_batches=len(micro_batches), bcast_loss=False,
            )  # fmt: skip
        else:
            self.inner.eval()
            for rows in micro_batches:
                self._recorder(self.inner(rows), weights)
        self.inner.train()
        return self._recorder.take(self._terms, self.device)

    @staticmethod
    def _pipeline_batches(
        micro_batches: list[torch.Tensor], weights: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter([(rows, weights) for rows in micro_batches])


def build_engine(config: RunConfig, dims: ParallelDims) -> Engine:
    """Model, optimizer and DeepSpeed engine of `config` on this rank.

    Raises:
        UserError: a raw DeepSpeed setting contradicts our own.
    """
    import deepspeed

    deepspeed.init_distributed(communication_backend())  # wraps the groups that exist already
    settings = deepspeed_config(config, dims.data_size)
    recorder = LossRecorder()
    entries = layer_list(config, dims, torch.float32)
    if dims.pipeline_size > 1:
        module: nn.Module = _pipeline_module(entries, dims, recorder)
        unit = None
    else:
        module = LayerStack(entries)
        unit = ModelParallelUnit()
    initialize(module, config, dims)
    optimizer = build_optimizer(module, config.optimizer)
    if config.parallel.zero_stage == 0:
        clip_before_step(optimizer, config.optimizer.clip_grad, dims.model_group, dims.tensor_rank)
    inner, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, mpu=unit, dist_init_required=False, config=settings
    )
    return Engine(inner, recorder, dims, number_of_terms(config.objective), sharding_rules(config))


def _pipeline_module(entries: list[LayerEntry], dims: ParallelDims, recorder: LossRecorder) -> nn.Module:
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    specs = [
        LayerSpec(entry.cls, **entry.arguments)
        if entry.tied_key is None
        else TiedLayerSpec(
            entry.tied_key,
            entry.cls,
            forward_fn=entry.forward_fn,
            # Only this attribute is synchronised; the embedding module holds nothing else.
            tied_weight_attr=["word_embeddings.weight"],
            **entry.arguments,
        )
        for entry in entries
    ]
    topology = PipeModelDataParallelTopology(num_pp=dims.pipeline_size, num_mp=dims.tensor_size, num_dp=dims.data_size)
    module = PipelineModule(specs, topology=topology, loss_fn=recorder, partition_method="type:DecoderLayer")
    grid = module.mpu()
    assert grid.get_slice_parallel_rank() == dims.tensor_rank
    assert grid.get_data_parallel_rank() == dims.data_rank
    assert grid.get_stage_id() == dims.pipeline_rank
    # A message between stages is (hidden, rows): no stage may begin after the last decoder layer.
    last_decoder_layer = max(i for i, entry in enumerate(entries) if entry.cls.__name__ == "DecoderLayer")
    assert all(0 < start <= last_decoder_layer for start in module.parts[1:-1]), module.parts
    return module
