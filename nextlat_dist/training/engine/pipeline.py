"""The layer list as stages of a DeepSpeed pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from nextlat_dist.model.layer_list import LayerEntry
from nextlat_dist.parallel.dims import ParallelDims
from nextlat_dist.training.engine.step_terms import StepTerms


def stage_bounds(entries: Sequence[LayerEntry], stage_layers: Sequence[int]) -> list[int]:
    """Where each stage begins in the list, with so many decoder layers in each; and the list's length."""
    first = next(i for i, entry in enumerate(entries) if entry.cls.__name__ == "DecoderLayer")
    return [0, *(first + sum(stage_layers[: stage + 1]) for stage in range(len(stage_layers) - 1)), len(entries)]


def pipeline_module(
    entries: list[LayerEntry], dims: ParallelDims, loss: StepTerms, stage_layers: Sequence[int]
) -> nn.Module:
    """The layer list as a DeepSpeed pipeline with `loss` at its end, and so many decoder layers in each stage."""
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
    bounds = stage_bounds(entries, stage_layers)

    class Pipeline(PipelineModule):
        def _partition_layers(self, method: str = "") -> None:
            self.parts = bounds
            self._set_bounds(start=bounds[dims.pipeline_rank], stop=bounds[dims.pipeline_rank + 1])

    topology = PipeModelDataParallelTopology(num_pp=dims.pipeline_size, num_mp=dims.tensor_size, num_dp=dims.data_size)
    module = Pipeline(specs, topology=topology, loss_fn=loss)
    grid = module.mpu()
    assert grid.get_slice_parallel_rank() == dims.tensor_rank
    assert grid.get_data_parallel_rank() == dims.data_rank
    assert grid.get_stage_id() == dims.pipeline_rank
    # A message between stages is (hidden, message of the batch): no stage may begin after the last decoder layer.
    last_decoder_layer = max(i for i, entry in enumerate(entries) if entry.cls.__name__ == "DecoderLayer")
    assert all(0 < start <= last_decoder_layer for start in module.parts[1:-1]), module.parts
    return module
