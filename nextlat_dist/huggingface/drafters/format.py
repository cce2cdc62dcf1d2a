"""The folder of a drafter in an export: which files it holds, how they are written and read.

    export/KIND/    config.json, model.safetensors; draft_vocabulary.safetensors, if it drafts from fewer ids than the
                    base has; calibration.json, once it is calibrated

Loaders that glob `*.safetensors` in the export's root never see a drafter. A drafter names the base weights it was
trained with by content hash, so that it is refused next to any other base. Needs torch and safetensors only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch

from nextlat_dist.config.entries import resolve
from nextlat_dist.errors import UserError
from nextlat_dist.files import whole_path, writing
from nextlat_dist.huggingface.base import WEIGHTS_FILE, LlamaConfig, save_tensors
from nextlat_dist.huggingface.stored import check_tensors, read_fields, read_tensors

if TYPE_CHECKING:
    from nextlat_dist.config.schema import RunConfig

CONFIG_FILE = "config.json"
DRAFT_VOCABULARY_FILE = "draft_vocabulary.safetensors"
DRAFT_VOCABULARY_TENSOR = "draft_vocabulary"  # int64 [draft vocabulary], ascending
CALIBRATION_FILE = "calibration.json"
ADVICE = "export the checkpoint again"
FORMAT_VERSION = 1  # of every kind's config.json

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class DrafterKind:
    """One way to draft: how a checkpoint's tensors become a folder of an export, and who drafts with them.

    Attributes:
        name: that of the folder.
        algorithm: `speculators_model_type` of config.json, speculators' name of the method.
        architecture: `architectures` of config.json.
        config: frozen dataclass of the further keys of config.json, `base_weights_sha256` (str) among them. A field
            with a default is written only where it differs, so that older exports and readers stay valid.
        tensor_names: config → the names of the tensors in model.safetensors; None: whatever the checkpoint has.
        from_checkpoint: "module:function", (canonical tensors, the run's config, hash of the base weights) → its config
            and tensors; imported for exporting.
        drafter: "module:function" of what drafts: (StoredDrafter, Llama, Graphs | None) → Drafter; imported when an
            export is opened for decoding.
        constants: keys of config.json that are the same for every export.
        speculative_tokens: config → most tokens that it drafts at a time; None: any number.
        draft_vocabulary: whether it can draft from fewer ids than the base has.
        shapes: config and the base's config → names and shapes of the tensors, checked when they are read.
        verifier: transformers' class of the base.
    """

    name: str
    algorithm: str
    architecture: str
    config: type[Any]
    tensor_names: Callable[[Any], Sequence[str] | None]
    from_checkpoint: str
    drafter: str
    constants: Mapping[str, Any] = field(default_factory=dict)
    speculative_tokens: Callable[[Any], int | None] = lambda config: None
    draft_vocabulary: bool = False
    shapes: Callable[[Any, LlamaConfig], Mapping[str, tuple[int, ...]]] | None = None
    verifier: str = "LlamaForCausalLM"

    def to_json(self, config: Any) -> dict[str, Any]:
        """config.json: what speculators' configurations have in common, then what is the kind's own."""
        own = {
            parameter.name: asdict(config)[parameter.name]
            for parameter in fields(config)
            if parameter.default is MISSING or getattr(config, parameter.name) != parameter.default
        }
        proposal = {"proposal_type": "sample", "speculative_tokens": self.speculative_tokens(config)}
        return {
            "format_version": FORMAT_VERSION,
            "architectures": [self.architecture],
            "speculators_model_type": self.algorithm,
            "speculators_config": {
                "algorithm": self.algorithm,
                "proposal_methods": [proposal],
                "verifier": {"name_or_path": "..", "architectures": [self.verifier]},
            },
            **self.constants,
            **own,
        }

    def build(self, stored: StoredDrafter, llama: Any, graphs: Any) -> Any:
        """What drafts with the stored tensors for `llama` (`inference.drafting.Drafter`)."""
        return resolve(self.drafter)(stored, llama, graphs)

    def of_checkpoint(self, canonical: Tensors, run: RunConfig, base_sha256: str) -> tuple[Any, Tensors]:
        """The config and tensors that a run's checkpoint gives."""
        config, tensors = resolve(self.from_checkpoint)(canonical, run, base_sha256)
        return config, tensors


@dataclass(frozen=True)
class StoredDrafter:
    """A drafter as its folder holds it.

    Attributes:
        directory: the folder.
        config: an instance of `kind.config`.
        weights: on the CPU, in the stored dtype.
        draft_vocabulary: int64, ascending; None: it drafts from all ids.
    """

    kind: DrafterKind
    directory: Path
    config: Any
    weights: Tensors
    draft_vocabulary: torch.Tensor | None


def save_drafter(export: Path, kind: DrafterKind, config: Any, weights: Tensors) -> None:
    """Write the folder of `kind` in `export`; `weights` holds exactly the tensors that the kind names."""
    names = kind.tensor_names(config)
    assert names is None or sorted(weights) == sorted(names), sorted(weights)
    target = export / kind.name
    target.mkdir(parents=True, exist_ok=True)
    save_tensors(target / WEIGHTS_FILE, {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    (target / CONFIG_FILE).write_text(json.dumps(kind.to_json(config), indent=2) + "\n")


def load_drafter(
    export: Path, kind: DrafterKind, base_sha256: str, base: LlamaConfig | None = None
) -> StoredDrafter | None:
    """The drafter of `kind` next to the base weights in `export`; None if the export has none.

    Args:
        base: the base's configuration, which the drafter's sizes are compared with.

    Raises:
        UserError: it was trained with other base weights than `base_sha256`, its format is unknown, it is of another
            kind than its folder, or one of its files is damaged.
    """
    target = export / kind.name
    if not target.is_dir():
        return None
    config = _read_config(target, kind)
    if config.base_weights_sha256 != base_sha256:
        raise UserError(
            f"{target} belongs to base weights {config.base_weights_sha256[:12]}…, but {export} holds "
            f"{base_sha256[:12]}…; export base and predictor together again"
        )
    vocabulary = _load_draft_vocabulary(target, config.vocab_size) if kind.draft_vocabulary else None
    weights = read_tensors(target / WEIGHTS_FILE, ADVICE)
    if base is not None:
        for name in ("hidden_size", "vocab_size"):
            own, expected = getattr(config, name, None), getattr(base, name)
            if own not in (None, expected):
                raise UserError(f"{target / CONFIG_FILE} has {name} {own}, but the base has {expected}; {ADVICE}")
        if kind.shapes is not None:
            check_tensors(target, weights, iter(kind.shapes(config, base).items()), ADVICE)
    return StoredDrafter(kind, target, config, weights, vocabulary)


def _read_config(target: Path, kind: DrafterKind) -> Any:
    stored = read_fields(target / CONFIG_FILE, ADVICE)
    raw = stored.values
    if raw.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{target} has format_version {raw.get('format_version')}, this release reads {FORMAT_VERSION}; "
            "export the checkpoint again"
        )
    algorithm = raw.get("speculators_model_type", kind.algorithm)
    if algorithm != kind.algorithm:
        raise UserError(
            f"{target / CONFIG_FILE} has speculators_model_type {algorithm!r}, but the folder {kind.name} holds "
            f"{kind.algorithm!r}: a drafter's kind comes from this package or an installed distribution, never from "
            "code next to the weights; export the checkpoint again"
        )
    missing = [f.name for f in fields(kind.config) if f.default is MISSING and f.name not in raw]
    if missing:
        raise UserError(f"{target / CONFIG_FILE} has no {missing[0]}; export the checkpoint again")
    types = get_type_hints(kind.config)
    readers: dict[Any, Callable[[str], Any]] = {
        int: lambda name: stored.integer(name, minimum=1),
        float: lambda name: stored.number(name, above=0),
        str: stored.text,
        bool: stored.flag,
    }
    present = [f.name for f in fields(kind.config) if f.name in raw]
    return kind.config(**{name: readers.get(types[name], raw.__getitem__)(name) for name in present})


def write_draft_vocabulary(drafter: Path, ids: torch.Tensor | None) -> None:
    """Give the drafter in the folder `drafter` these ids to draft from (int64, ascending); None: all of them.

    A calibration measured with other ids is removed.
    """
    if ids is None:
        with writing(drafter):
            (drafter / CALIBRATION_FILE).unlink(missing_ok=True)
            (drafter / DRAFT_VOCABULARY_FILE).unlink(missing_ok=True)
        return
    with whole_path(drafter / DRAFT_VOCABULARY_FILE) as temporary:
        save_tensors(temporary, {DRAFT_VOCABULARY_TENSOR: ids.contiguous()})
        # Between the two: a full disk costs no calibration, and none is ever next to ids that it was not measured with.
        (drafter / CALIBRATION_FILE).unlink(missing_ok=True)


def _load_draft_vocabulary(target: Path, vocab_size: int) -> torch.Tensor | None:
    path = target / DRAFT_VOCABULARY_FILE
    if not path.is_file():
        return None
    advice = "write it again with `nextlat calibrate --draft-vocabulary`"
    ids = read_tensors(path, advice).get(DRAFT_VOCABULARY_TENSOR)
    if (
        ids is None
        or ids.dtype != torch.int64
        or ids.dim() != 1
        or not 0 < ids.numel() < vocab_size
        or not 0 <= int(ids[0]) <= int(ids[-1]) < vocab_size
        or not bool((ids.diff() > 0).all())
    ):
        raise UserError(f"{path} is not an ascending list of some of the {vocab_size} token ids; {advice}")
    return ids
