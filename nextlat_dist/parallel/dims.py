"""One object owns how ranks are laid out: tensor x pipeline x data.

Rank order is Megatron-Core's default (tensor fastest, then data, then pipeline); DeepSpeed's
`PipeModelDataParallelTopology` gives the same ranks, which `ParallelDims.initialize` asserts through the pipeline grid
in `training.engine`. Model code takes its process groups from here as arguments.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nextlat_dist.config.schema import ParallelConfig
from nextlat_dist.errors import UserError
from nextlat_dist.parallel.device import communication_backend, device
from nextlat_dist.parallel.environment import check_launch, launched_number


@dataclass(frozen=True)
class ParallelDims:
    """Sizes and this rank's coordinates."""

    tensor_size: int
    pipeline_size: int
    data_size: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int

    @classmethod
    def initialize(cls, config: ParallelConfig) -> ParallelDims:
        """Create every process group; initialises `torch.distributed` if need be (one rank by default).

        Without CUDA, call it inside `device.third_parties`.
        """
        initialize_distributed()
        from megatron.core import parallel_state

        tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
        if not parallel_state.model_parallel_is_initialized():
            # Megatron-Core's gloo copies of its groups are for its own checkpoints; each is a mesh of sockets.
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                order="tp-cp-ep-dp-pp",
                create_gloo_process_groups=False,
            )
        assert parallel_state.get_tensor_model_parallel_world_size() == tp
        assert parallel_state.get_pipeline_model_parallel_world_size() == pp
        return cls(
            tensor_size=tp,
            pipeline_size=pp,
            data_size=parallel_state.get_data_parallel_world_size(),
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            data_rank=parallel_state.get_data_parallel_rank(),
        )

    @property
    def world_size(self) -> int:
        return self.tensor_size * self.pipeline_size * self.data_size

    @property
    def rank(self) -> int:
        return (self.pipeline_rank * self.data_size + self.data_rank) * self.tensor_size + self.tensor_rank

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def process_groups(self) -> Any:
        """Megatron-Core's `ProcessGroupCollection`: what model code is given."""
        from megatron.core.process_groups_config import ProcessGroupCollection

        return ProcessGroupCollection.use_mpu_process_groups()

    @property
    def data_group(self) -> dist.ProcessGroup:
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_group()

    @property
    def model_group(self) -> dist.ProcessGroup:
        """All ranks that together hold one copy of the model: tensor x pipeline."""
        from megatron.core import parallel_state

        return parallel_state.get_model_parallel_group()

    @property
    def model_group_source(self) -> int:
        """Global rank of the model group's first member, which reads the data."""
        return self.data_rank * self.tensor_size

    def describe(self) -> str:
        return f"tensor {self.tensor_size} x pipeline {self.pipeline_size} x data {self.data_size}"


class ModelParallelUnit:
    """What DeepSpeed's engine asks of a model-parallel unit when there is no pipeline."""

    def __init__(self) -> None:
        from megatron.core import parallel_state

        self.get_model_parallel_rank = parallel_state.get_tensor_model_parallel_rank
        self.get_model_parallel_world_size = parallel_state.get_tensor_model_parallel_world_size
        self.get_model_parallel_group = parallel_state.get_tensor_model_parallel_group
        self.get_tensor_model_parallel_rank = parallel_state.get_tensor_model_parallel_rank
        self.get_tensor_model_parallel_world_size = parallel_state.get_tensor_model_parallel_world_size
        self.get_tensor_model_parallel_group = parallel_state.get_tensor_model_parallel_group
        self.get_data_parallel_rank = parallel_state.get_data_parallel_rank
        self.get_data_parallel_world_size = parallel_state.get_data_parallel_world_size
        self.get_data_parallel_group = parallel_state.get_data_parallel_group


def world_size_from_environment() -> int:
    """The number of ranks the launcher started; 1 without a launcher."""
    return launched_number("WORLD_SIZE", 1, least=1)


def initialize_distributed(timeout: timedelta = timedelta(minutes=30)) -> None:
    """`torch.distributed` from the launcher's environment, or a world of one rank when there is none.

    Raises:
        UserError: that environment is not whole.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    check_launch()
    use = device()
    dist.init_process_group(communication_backend(), timeout=timeout, device_id=use if use.type == "cuda" else None)


def shutdown() -> None:
    """Destroy every process group; safe to call twice."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def raise_together(error: str) -> None:
    """Collective: raise the first rank's non-empty `error` as a UserError on every rank, so that none waits for
    another.
    """
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((e for e in errors if e), None)
    if first:
        raise UserError(first, shared=True)


def all_reduce_sum(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`values` summed over `group`, in place, on this rank's device."""
    dist.all_reduce(values, group=group)
    return values
