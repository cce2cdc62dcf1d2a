"""Training state in a checkpoint: fp32 master weights and Adam's moments by canonical name, cut as ranks held them.

    weights/tp0_pp0_dp0.safetensors      what this rank held of every master weight
    optimizer/tp0_pp0_dp0.safetensors    the same of exp_avg and exp_avg_sq

A tensor in these files is a piece `NAME/KEY/START` of a tensor-parallel shard, flattened, from element START on; the
file's metadata holds the shards' shapes. Every rank writes what it holds and nothing is gathered; any layout can read
what any other wrote. Plain safetensors: nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nextlat_dist.checkpoint.commit import verify
from nextlat_dist.errors import UserError
from nextlat_dist.model.sharding import Rules, merge, sharding_of

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
DIRECTORIES = {WEIGHT: "weights", **dict.fromkeys(MOMENTS, "optimizer")}
_FILE = re.compile(r"tp(\d+)_pp(\d+)_dp(\d+)\.safetensors")


@dataclass(frozen=True)
class Fragment:
    """What one rank holds of one parameter.

    Attributes:
        name: canonical name.
        shape: of the tensor-parallel shard.
        start: first element of the flattened shard that is here.
        values: {"weight", "exp_avg", "exp_avg_sq"}: fp32 [elements], views of the optimizer's own memory.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: dict[str, torch.Tensor]


def rank_name(tensor_rank: int, pipeline_rank: int, data_rank: int) -> str:
    """Name of a rank's files, without suffix."""
    return f"tp{tensor_rank}_pp{pipeline_rank}_dp{data_rank}"


class HostCopies:
    """Copies in host memory that training no longer touches. The memory is kept: new memory costs more than copying.

    A copy is overwritten by the next one of the same fragment.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str, int], torch.Tensor] = {}

    def take(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        return [
            Fragment(
                f.name, f.shape, f.start, {key: self._copy((f.name, key, f.start), v) for key, v in f.values.items()}
            )
            for f in fragments
        ]

    def _copy(self, key: tuple[str, str, int], value: torch.Tensor) -> torch.Tensor:
        memory = self._memory.get(key)
        if memory is None or memory.shape != value.shape:
            memory = self._memory[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return memory.copy_(value.detach())


def write_fragments(directory: Path, fragments: Sequence[Fragment], rank: str) -> list[str]:
    """Write the fragments of the rank named `rank` ("tp0_pp1_dp0"); names of the files, relative to `directory`."""
    files: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for fragment in fragments:
        for key, value in fragment.values.items():
            files[DIRECTORIES[key]][f"{fragment.name}/{key}/{fragment.start}"] = value.contiguous()
    metadata = {"shapes": json.dumps({fragment.name: fragment.shape for fragment in fragments})}
    names = []
    for folder, tensors in files.items():
        (directory / folder).mkdir(exist_ok=True)
        names.append(f"{folder}/{rank}.safetensors")
        save_file(tensors, directory / names[-1], metadata=metadata)
    return names


class TensorReader:
    """Full tensors of a committed checkpoint, whatever layout wrote it. Use as a context manager.

    Args:
        folders: which of the directories to open.
        rules: how the run's parameters were split (`model.sharding`); None: as those of every built-in objective are.

    Raises:
        UserError: pieces are missing.
    """

    def __init__(
        self, checkpoint: Path, folders: Sequence[str] = ("weights", "optimizer"), rules: Rules | None = None
    ) -> None:
        self._rules = rules
        self._checkpoint = checkpoint
        self._stack = ExitStack()
        self._shapes: dict[str, tuple[int, ...]] = {}
        # (name, key) -> tensor rank -> pieces (start, open file, key in it)
        self._pieces: dict[tuple[str, str], dict[int, list[tuple[int, Any, str]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for folder in folders:
            for path in sorted((checkpoint / folder).glob("*.safetensors")):
                self._open(path)

    def _open(self, path: Path) -> None:
        matched = _FILE.fullmatch(path.name)
        assert matched is not None, path
        file = self._stack.enter_context(safe_open(path, framework="pt"))
        shapes = {name: tuple(shape) for name, shape in json.loads(file.metadata()["shapes"]).items()}
        self._shapes |= shapes
        for full_key in file.keys():  # noqa: SIM118
            name, key, start = full_key.rsplit("/", 2)
            self._pieces[name, key][int(matched[1])].append((int(start), file, full_key))

    @property
    def names(self) -> list[str]:
        """Canonical names of all parameters."""
        return sorted({name for name, _ in self._pieces})

    def full(self, name: str, key: str = WEIGHT) -> torch.Tensor:
        """The whole tensor of a parameter, fp32, tensor-parallel shards merged."""
        shards = self._pieces.get((name, key))
        if not shards:
            raise UserError(f"{self._checkpoint} holds no {key} of {name}; it was saved by a run of another model")
        parts = [self._shard(name, key, pieces) for _, pieces in sorted(shards.items())]
        return merge(parts, sharding_of(name, self._rules))

    def _shard(self, name: str, key: str, pieces: list[tuple[int, Any, str]]) -> torch.Tensor:
        shape = self._shapes[name]
        flat = torch.cat(
            [file.get_tensor(full_key) for _, file, full_key in sorted(pieces, key=lambda piece: piece[0])]
        )
        if flat.numel() != math.prod(shape):
            raise UserError(
                f"{self._checkpoint} is incomplete: it holds {flat.numel()} of {math.prod(shape)} elements of {key} of "
                f"{name}; choose another checkpoint"
            )
        return flat.view(shape)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def load_full_weights(checkpoint: Path, rules: Rules | None = None) -> dict[str, torch.Tensor]:
    """All parameters of a committed checkpoint {canonical name: fp32 tensor}; `rules` as for `TensorReader`.

    Raises:
        UserError: a weight file is missing or damaged.
    """
    folder = DIRECTORIES[WEIGHT] + "/"
    wanted: Callable[[str], bool] = lambda name: name.startswith(folder)  # noqa: E731
    verify(checkpoint, wanted)
    with TensorReader(checkpoint, ["weights"], rules) as reader:
        return {name: reader.full(name) for name in reader.names}
