"""Names in a configuration that stand for code: objectives (`objective.name`) and predictors (`predictor.fusion`).

A name is one of ours, that of an installed entry point, or `my_module:MyEntry` in what the user passes. It stands for
one frozen entry, which says all that the rest of the package must know. Entries are plain data without torch: what has
to be built, they name as `module:attribute`, imported by whoever builds it.

Which way imports point: the catalogues (`objective.catalogue`, `model.predictors`) import this module, as a third
party's does; this module reaches them by reference, as it reaches a third party's. So no rule of the configuration
imports what stands above it.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from nextlat_dist.errors import UserError

if TYPE_CHECKING:
    from nextlat_dist.config.schema import ObjectiveConfig, RunConfig


@dataclass(frozen=True)
class Sharding:
    """How a parameter is split over tensor-parallel ranks.

    Attributes:
        dim: the dimension that is split; None: every rank holds the parameter whole.
        blocks: so many equal blocks along `dim` are split one by one: a gated `linear_fc1` is [gate; up] on every rank,
            so its two halves are sharded separately.
        partial: every rank holds the parameter whole, but it acts on a part of what is computed (a norm over sharded
            heads), so a rank's gradient is one summand: the engine sums it over the tensor ranks in every backward
            pass, so for each micro-batch, before it is accumulated and clipped.
        units: what is split cannot be cut smaller (heads): where so many do not divide over the ranks, every rank holds
            the parameter whole.
    """

    dim: int | None
    blocks: int = 1
    partial: bool = False
    units: int | None = None

    def __post_init__(self) -> None:
        assert self.dim is None or not self.partial, "a sharded parameter has the whole gradient of its part"

    def splits(self, size: int) -> bool:
        """Whether each of `size` tensor ranks has a part of its own."""
        return self.dim is not None and (self.units is None or self.units % size == 0)


@dataclass(frozen=True)
class Sizes:
    """What entries count with.

    Attributes:
        layer: parameters of a decoder layer.
        head: weights of the output head, without the padding of the vocabulary.
        attention_flops: of one position, forward and backward, in a layer's scores and values.
    """

    layer: int
    head: int
    attention_flops: float


@dataclass(frozen=True)
class Term:
    """One term of a loss besides next_token: a mean over the positions that count at each step, then over the steps.

    Attributes:
        name: in metrics.
        weight: the key under `objective.` that holds its lambda: a field of `ObjectiveConfig` or `options.NAME`; None:
            it is logged only.
        mask: `module:function`, (batch, step) -> bool [s - step, b]: which positions count.
    """

    name: str
    weight: str | None
    mask: str


@dataclass(frozen=True)
class ObjectiveEntry:
    """All that the package must know of an objective.

    Attributes:
        name: in a config.
        module: `module:class` of the layer list's last layer, built as `class(settings)` from `layer_list.HeadSettings`
            and called with `rows.ObjectiveInputs`; it returns term sums [1 + terms * steps]: next_token, then each
            term's steps in order.
        terms: besides next_token.
        steps_ahead: how many steps beyond the next token the loss looks; each term has as many.
        reads_embedding: the module needs e(x) of the input tokens.
        parts: what its parameters are called: {first word of their names: (in a sentence, afterwards)}.
        parameters: (config, sizes) -> {part: number of parameters}, besides the base model's.
        flops: (config, sizes) -> FLOPs per position of a training step, besides the base model's.
        sharding: config -> {pattern of canonical names: rule}, besides the base model's; see `model.sharding`.
        options: the keys that `objective.options` may have, and their defaults.
        check: raises UserError for a config that this objective cannot train.
        drafter: the kind of drafter that an export has; None: none.
        before: `module:function`, (HeadSettings, the token embedding's entry) -> entries of the layer list that stand
            between the trunk and the module; see `layer_list`.
        pipeline: whether the layer list can be cut into stages.
        counts: `module:function`, (batch, objective's config) -> how much enters each term, float64 [terms]; None: as
            many as the masks say.
        scale: of the whole loss.
        next_token_trains_parts: the loss of the next token reaches `parts`, so it alone is something to learn from.
        final_norm: the list has the model's final norm before the module; if not, the module has it, under its name.
        model_type: of the base model in an export; see `huggingface.forms.catalogue`.
        apart: the one of `parts` that `objective.detach_base` trains apart from the base; None: there is none. The
            module keeps the promise: nothing but next_token's term has a gradient outside of it.
        decoded_term: the loss of the next token under decoding's own conditions.
        released: `objective.semantics: release` is known for it; its module is a `FusedObjective`.
    """

    name: str
    module: str
    terms: tuple[Term, ...] = ()
    steps_ahead: Callable[[ObjectiveConfig], int] = lambda objective: objective.horizon
    reads_embedding: bool = False
    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    parameters: Callable[[RunConfig, Sizes], Mapping[str, int]] = lambda config, sizes: {}
    flops: Callable[[RunConfig, Sizes], float] = lambda config, sizes: 0
    sharding: Callable[[RunConfig], Mapping[str, Sharding]] = lambda config: {}
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[RunConfig], None] = lambda config: None
    drafter: str | None = None
    before: str | None = None
    pipeline: bool = True
    counts: str | None = None
    scale: float = 1.0
    next_token_trains_parts: bool = False
    final_norm: bool = True
    model_type: str = "llama"
    apart: str | None = None
    decoded_term: str = "next_token"
    released: bool = False

    @property
    def weights(self) -> tuple[str, ...]:
        """Keys under `objective.` of which one must be positive, or what the terms train would be built for nothing."""
        weighted = tuple(term.weight for term in self.terms if term.weight is not None)
        return (*weighted, "lambda_next_token") if self.next_token_trains_parts or not weighted else weighted


@dataclass(frozen=True)
class PredictorEntry:
    """All that the package must know of a form of latent predictor: (h [s, b, h], e(x) [s, b, h]) -> next h.

    Attributes:
        name: the value of `predictor.fusion`.
        module: `module:class`, built as `class(transformer_config, predictor_hidden_size, process_groups)`. If it has
            the methods `read(e(x)) -> (NamedTuple of tensors [positions, …], anything)` and `step(h, *that) -> next h`,
            what it takes from a token is computed once for all steps of a rollout.
        drafting: `module:function`, (weights of an export, epsilon of its norms) -> (h [rows, h], e(x) [rows, h]) ->
            next h [rows, h], on one device.
        parameters: (hidden size, width) -> number of parameters.
        sharding: {pattern of names within the predictor: rule}.
        norm_epsilon: of its norms; an export records it.
    """

    name: str
    module: str
    drafting: str
    parameters: Callable[[int, int], int]
    sharding: Mapping[str, Sharding]
    norm_epsilon: float = 1e-5


class Named(Protocol):
    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)


class Entries(Generic[Entry]):
    """The entries of one kind by name.

    Args:
        key: where the name is written, for messages.
        kind: class of the entries.
        group: entry points of installed distributions.
        built_in: `module:attribute`, a tuple of our own entries.
    """

    def __init__(self, key: str, kind: type[Entry], group: str, built_in: str) -> None:
        self._key, self._kind, self._group, self._built_in = key, kind, group, built_in
        self._allowed: set[str] = set()
        self._found: dict[str, Entry] = {}  # entries that are not ours

    def built_in(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in resolve(self._built_in)}

    def allow(self, name: str) -> None:
        """`name` stands in a config or an option that the user passed: what it names may be imported.

        The working folder is looked in, too.

        Without this, `my_module:MyEntry` in a file that came with a checkpoint would import whatever it names.
        """
        if ":" in name:
            self._allowed.add(name)
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())

    def find(self, name: str) -> Entry:
        """Raises UserError for an unknown name, and one that cannot be imported or is no entry."""
        built_in = self.built_in()
        if name in built_in:
            return built_in[name]
        if name in self._found:
            return self._found[name]
        installed = {} if ":" in name else self._installed()
        if ":" in name or name in installed:
            found = self._imported(name) if ":" in name else installed[name].load()
            self._found[name] = self._checked(name, found)
            return self._found[name]
        known = [*built_in, *installed]
        nearest = difflib.get_close_matches(name, known, n=1)
        raise UserError(
            f"{self._key} is {name!r}, it must be one of {', '.join(known)}"
            + (f"; the nearest is {nearest[0]}" if nearest else ", or my_module:MyEntry")
        )

    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self._group)}

    def _imported(self, reference: str) -> Any:
        if reference not in self._allowed:
            raise UserError(
                f"{self._key} is {reference!r}, which is imported only for a config that you pass, never for one that "
                f"comes with a checkpoint; give --allow-import {reference}, or install it as an entry point of the "
                f"group {self._group}"
            )
        try:
            return resolve(reference)
        except (ModuleNotFoundError, AttributeError) as error:
            raise UserError(f"{self._key} is {reference!r}, which cannot be imported: {error}") from None

    def _checked(self, name: str, found: Any) -> Entry:
        if not isinstance(found, self._kind):
            raise UserError(
                f"{self._key} is {name!r}, which names a {type(found).__name__}; it must name a {self._kind.__name__}"
            )
        return found


def resolve(reference: str) -> Any:
    """What `module:attribute` names."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


OBJECTIVES: Entries[ObjectiveEntry] = Entries(
    "objective.name", ObjectiveEntry, "nextlat_dist.objectives", "nextlat_dist.objective.catalogue:BUILT_IN"
)
PREDICTORS: Entries[PredictorEntry] = Entries(
    "predictor.fusion", PredictorEntry, "nextlat_dist.predictors", "nextlat_dist.model.predictors:BUILT_IN"
)
