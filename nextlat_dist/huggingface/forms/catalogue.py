"""The forms of base model that an export can have, by `model_type` of its config.json: what each has besides a Llama.

`llama` is a plain one, which transformers, lm-eval and servers load as it is. The next token of another form comes from
more than a Llama: its weights lie in the same file under names of their own, and transformers knows it once the module
`integration` is imported. Torch-free; what must be built is named as `module:attribute`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nextlat_dist.config.schema import RunConfig, fetch_heads, swiglu_ffn_hidden_size

if TYPE_CHECKING:
    from nextlat_dist.huggingface.base import LlamaConfig

CONDITION = "text_head.condition"  # of bst: the second stack's state of the end token alone, which decoding has
Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class BaseForm:
    """One form.

    Attributes:
        model_type: in config.json.
        architecture: the same, in `architectures`.
        engine: `module:class` of the decoder's forward, a `Llama` or a subclass of it.
        static_engine: the same in static shapes, a `StaticLlama`.
        fields: what config.json has besides a Llama's, positive whole numbers, from a run's config.
        field_names: of these.
        parts: first words of canonical names whose tensors the base has besides a Llama's, under these names.
        shapes: their names and shapes.
        finish: `module:function`, (canonical tensors, run's config, EOS id or None) -> tensors that are made of them.
        integration: module that registers the form with transformers; None: it knows it.
    """

    model_type: str
    architecture: str
    engine: str
    static_engine: str
    fields: Callable[[RunConfig], Mapping[str, int]] = lambda run: {}
    field_names: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    shapes: Callable[[LlamaConfig], Shapes] = lambda config: iter(())
    finish: str | None = None
    integration: str | None = None

    def register(self) -> None:
        """Let transformers know the form."""
        if self.integration is not None:
            import_module(self.integration)

    def to_json(self, run: RunConfig) -> dict[str, Any]:
        """The keys of config.json that tell the form."""
        found: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **self.fields(run),
        }
        if self.integration is not None:
            # transformers says this text where nobody has imported the module; the class is one that it then knows.
            advice = f"`import {self.integration}` (of nextlat-dist) before this model is loaded"
            found["auto_map"] = {"AutoConfig": f"{advice}--{self.architecture}"}
        return found


def _fetch_shapes(config: LlamaConfig) -> Shapes:
    hidden, places = config.hidden_size, config.own["horizon"] + 1
    yield "fetch.layer_norm.weight", (hidden,)
    yield "fetch.layer_norm.bias", (hidden,)
    yield "fetch.scale", (1,)
    yield "fetch.linear_qkv", (3 * hidden, hidden)
    yield "fetch.linear_proj", (hidden, hidden)
    yield "fetch.relative_bias", (config.own["fetch_heads"], places, places)


def _text_head_shapes(config: LlamaConfig) -> Shapes:
    width, inner = 2 * config.hidden_size, config.own["text_head_size"]
    yield "text_head.linear_fc1", (2 * inner, width)
    yield "text_head.linear_fc2", (width, inner)
    yield "text_head.layer_norm.weight", (width,)
    yield CONDITION, (config.hidden_size,)


LLAMA = BaseForm(
    model_type="llama",
    architecture="LlamaForCausalLM",
    engine="nextlat_dist.inference.engine.llama:Llama",
    static_engine="nextlat_dist.inference.engine.graphs:StaticLlama",
)
JTP = BaseForm(
    model_type="nextlat_jtp",
    architecture="NextLatJTPForCausalLM",
    engine="nextlat_dist.inference.engine.fetch:FetchLlama",
    static_engine="nextlat_dist.inference.engine.fetch:StaticFetchLlama",
    fields=lambda run: {
        "horizon": run.objective.horizon,
        "fetch_heads": fetch_heads(run.model.num_attention_heads),
    },
    field_names=("horizon", "fetch_heads"),
    parts=("fetch",),
    shapes=_fetch_shapes,
    integration="nextlat_dist.integrations.jtp",
)
BST = BaseForm(
    model_type="nextlat_bst",
    architecture="NextLatBSTForCausalLM",
    engine="nextlat_dist.inference.engine.text_head:TextHeadLlama",
    static_engine="nextlat_dist.inference.engine.text_head:StaticTextHeadLlama",
    fields=lambda run: {"text_head_size": swiglu_ffn_hidden_size(2 * run.model.hidden_size)},
    field_names=("text_head_size",),
    parts=("text_head",),
    shapes=_text_head_shapes,
    finish="nextlat_dist.huggingface.forms.end_state:end_state",
    integration="nextlat_dist.integrations.bst",
)
FORMS = {form.model_type: form for form in (LLAMA, JTP, BST)}
