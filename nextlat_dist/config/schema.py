"""The sections of a run's configuration: every key with its type, what it is, its bounds and its default.

A key is `name: Annotated[type, "what it is", bounds] = default` (keys.py). The sentence stands in what `nextlat init`
writes and in the configuration reference; the rules between values are in rules.py. Names are upstream's:
Megatron-Core's for the model, DeepSpeed's for the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from nextlat_dist.config.entries import OBJECTIVES, PREDICTORS, ObjectiveEntry, PredictorEntry
from nextlat_dist.config.keys import ANY, LOCATION, NOT_NEGATIVE, POINTS, POSITIVE, Bounds, value_at

BETAS = Bounds("be two numbers in [0, 1)", lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas))
# Beyond these no run makes sense: they catch a slip of units or of an exponent before anything is built.
LAYERS = POSITIVE.at_most(10_000)
WIDTH = POSITIVE.at_most(1 << 20)
VOCABULARY = POSITIVE.at_most(1 << 24)
LENGTH = POSITIVE.at_most(1 << 27)
RANKS = POSITIVE.at_most(1 << 20)
ROWS = POSITIVE.at_most(1 << 24)
TOKENS = POSITIVE.at_most(10**18)
TOKENS_OR_NONE = NOT_NEGATIVE.at_most(10**18)
STEPS = POSITIVE.at_most(10**12)
LOSS = POSITIVE.within(1e-9, 100.0)
STEPS_OR_NONE = NOT_NEGATIVE.at_most(10**12)
WEIGHTS = Bounds("be at most 1e+12 each", lambda weights: all(weight <= 1e12 for weight in weights.values()))
COUNTS = Bounds("be positive numbers", lambda counts: all(count > 0 for count in counts))
SHARE = POSITIVE.at_most(1.0)
LAMBDA = NOT_NEGATIVE.within(1e-9, 1e6)


def swiglu_ffn_hidden_size(hidden_size: int) -> int:
    """The paper's feed-forward width: 128 * round((8 * hidden / 3) / 128), at least 128."""
    return max(128, 128 * round(8 * hidden_size / 3 / 128))


def fetch_heads(attention_heads: int) -> int:
    """Heads of jtp's own attention in a model with so many: at most 4, as in the release of NextLat's paper."""
    return min(4, attention_heads)


@dataclass
class ModelConfig:
    """A Llama-family decoder: pre-norm, RMSNorm, SwiGLU, RoPE, grouped-query attention, no biases."""

    num_layers: Annotated[int, "decoder layers", LAYERS] = 8
    hidden_size: Annotated[int, "width of the latent state", WIDTH] = 256
    num_attention_heads: Annotated[int, "query heads; each of an even size", WIDTH] = 4
    num_query_groups: Annotated[int | None, "key/value heads; null: num_attention_heads", WIDTH] = None
    ffn_hidden_size: Annotated[int | None, "null: 128 * round((8 * hidden_size / 3) / 128)", WIDTH] = None
    vocab_size: Annotated[int, "ids of the tokenizer", VOCABULARY] = 4096
    make_vocab_size_divisible_by: Annotated[
        int, "the embedding is padded to a multiple; never depends on tensor parallelism", WIDTH
    ] = 128
    max_position_embeddings: Annotated[int | None, "longest sequence; null: data.sequence_length", LENGTH] = None
    rotary_base: Annotated[float, "theta of RoPE", POSITIVE.within(1.0, 1e12)] = 10000.0
    norm_epsilon: Annotated[float, "of RMSNorm", POSITIVE.within(1e-15, 0.1)] = 1e-5
    tie_embeddings: Annotated[bool, "the output head is the token embedding"] = False
    init_method_std: Annotated[float, "standard deviation of initial weights", POSITIVE.within(1e-9, 10.0)] = 0.02

    @property
    def query_groups(self) -> int:
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def ffn_size(self) -> int:
        return swiglu_ffn_hidden_size(self.hidden_size) if self.ffn_hidden_size is None else self.ffn_hidden_size

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple


@dataclass
class PredictorConfig:
    """The latent predictor p_psi: its form and its width `hidden_size` (the paper's H)."""

    hidden_size: Annotated[int | None, "width of its hidden layers; null: model.hidden_size", WIDTH] = None
    fusion: Annotated[str, "how it joins h and e(x); concat: the paper's, three matrices over [h, e(x)]"] = "concat"

    @property
    def entry(self) -> PredictorEntry:
        return PREDICTORS.find(self.fusion)


@dataclass
class ObjectiveConfig:
    """What is minimised: lambda_next_token * L_ntp; with `nextlat` + lambda_hidden * L_h + lambda_kl * L_kl (arXiv
    2511.05963); with `mtp` + lambda_mtp * L_mtp (arXiv 2404.19737); with `jtp` + lambda_jtp * L_jtp (arXiv 2503.21801);
    with `bst` (lambda_next_token * L_next + lambda_previous * L_previous) / 2 over pairs (arXiv 2410.23506).
    The paper's loss is the default; a term with lambda 0 is still logged.
    """

    name: Annotated[str, "next_token, nextlat, mtp, jtp, bst, an entry point, or my_module:MyEntry"] = "nextlat"
    horizon: Annotated[
        int,
        "the paper's d: rollout steps of the latent predictor, extra layers of mtp, tokens of jtp besides the next",
        POSITIVE.at_most(65_536),
    ] = 1
    lambda_next_token: Annotated[float, "weight of the next-token loss L_ntp", LAMBDA] = 1.0
    lambda_hidden: Annotated[float, "nextlat: weight of the latent loss L_h", LAMBDA] = 1.0
    lambda_kl: Annotated[float, "nextlat: weight of the token loss L_kl", LAMBDA] = 1.0
    lambda_mtp: Annotated[float, "mtp: weight of the losses of the tokens after the next", LAMBDA] = 1.0
    lambda_jtp: Annotated[float, "jtp: weight of the losses of the tokens after the next", LAMBDA] = 1.0
    lambda_previous: Annotated[float, "bst: weight of the loss of the token before a pair's end", LAMBDA] = 1.0
    pair_rate: Annotated[
        float, "bst: share of a document's pairs that are drawn; those with its end are always there", SHARE
    ] = 1.0
    least_gap: Annotated[int, "bst: least distance of a pair", POSITIVE.at_most(65_536)] = 1
    largest_gap: Annotated[
        int | None, "bst: largest distance of a pair that is not with the end; null: any", POSITIVE.at_most(1 << 27)
    ] = None
    stop_gradient_target: Annotated[bool, "false: L_h also moves the state that it predicts"] = True
    stop_gradient_head: Annotated[
        bool, "false: L_kl also moves the output head, through the student; never the teacher"
    ] = True
    lambda_schedule: Annotated[
        dict[str, list[list[float]]],
        "lambda_…: [[tokens, value], …] instead of one value; linear between, constant before and after",
        POINTS,
    ] = field(default_factory=dict)
    semantics: Annotated[
        Literal["paper", "release"],
        "release: as the authors' code: means per micro-batch, rollouts past a document's end, which opens the next",
    ] = "paper"
    detach_base: Annotated[
        bool,
        "nextlat: the base learns as with next_token alone, to the bit; the predictor learns from its states",
    ] = False
    options: Annotated[dict[str, Any], "settings of an objective that is not ours, under its own names"] = field(
        default_factory=dict
    )

    @property
    def entry(self) -> ObjectiveEntry:
        return OBJECTIVES.find(self.name)

    @property
    def steps_ahead(self) -> int:
        """How many steps beyond the next token the loss looks."""
        return self.entry.steps_ahead(self)

    @property
    def apart(self) -> str | None:
        """What is trained apart from the base, by the first word of its parameters' names: it has its own gradient
        norm, clipping and verdict.
        """
        return self.entry.apart if self.detach_base else None

    def option(self, name: str) -> Any:
        """A setting of the objective's own: as given, or its default."""
        return self.options.get(name, self.entry.options[name])

    def weight(self, key: str, tokens: int = 0) -> float:
        """The lambda under `objective.KEY` for the step that begins after so many tokens."""
        points = self.lambda_schedule.get(key)
        if points:
            return value_at(points, tokens)
        option = key.removeprefix("options.")
        return float(getattr(self, key) if option == key else self.option(option))

    def ever_weighs(self, key: str) -> bool:
        """Whether that lambda is positive at some time of the run."""
        points = self.lambda_schedule.get(key)
        return any(value > 0 for _, value in points) if points else self.weight(key) > 0


@dataclass
class ParallelConfig:
    """How ranks divide the work; data-parallel size is what remains of the world."""

    tensor_model_parallel_size: Annotated[int, "ranks that share every layer", RANKS] = 1
    sequence_parallel: Annotated[
        bool, "norms and the residual stream hold a part of the sequence; needs tensor_model_parallel_size > 1"
    ] = False
    pipeline_model_parallel_size: Annotated[int, "stages that the layers are divided into", RANKS] = 1
    pipeline_layers: Annotated[
        list[int] | None, "decoder layers of each stage, first to last; null: by cost, the objective's included", COUNTS
    ] = None
    zero_stage: Annotated[Literal[0, 1, 2, 3], "DeepSpeed's ZeRO; a pipeline allows 0 and 1"] = 1


@dataclass
class SourceConfig:
    """One dataset of a mixture."""

    name: Annotated[str, "by which weight_changes and metrics call it"]
    path: Annotated[str, "directory or URL with manifest.json", LOCATION]
    weight: Annotated[
        float,
        "share of the rows, relative to the other sources'; 0 until a weight change says otherwise",
        NOT_NEGATIVE.within(1e-9, 1e12),
    ] = 1.0


@dataclass
class WeightChange:
    """New weights from the first row on that begins at or after `at_tokens` tokens of training."""

    at_tokens: Annotated[int, "when; each change a row or more after the one before", ANY.at_most(10**18)]
    weights: Annotated[dict[str, float], "of every source, by name; none negative, one positive", WEIGHTS]


@dataclass
class DataConfig:
    """Datasets of `nextlat-data shard` or `nextlat-data index`: directories or URLs (http, s3, gs)."""

    train: Annotated[str | None, "directory or URL with manifest.json; or else `sources`", LOCATION] = None
    sources: Annotated[list[SourceConfig], "several datasets, mixed by weight"] = field(default_factory=list)
    weight_changes: Annotated[list[WeightChange], "new weights of the sources, during the run"] = field(
        default_factory=list
    )
    validation: Annotated[str | None, "held-out dataset; null: no validation", LOCATION] = None
    tokenizer: Annotated[str | None, "when given, must be the file that the datasets were tokenized with", LOCATION] = (
        None
    )
    sequence_length: Annotated[int, "positions per row; a row reads sequence_length + 1 tokens", LENGTH] = 256
    packing: Annotated[
        Literal["concat", "pad"], "concat: rows are cut from the joined documents; pad: a document per row"
    ] = "concat"
    shuffle: Annotated[bool, "false: the order in which the documents were written"] = True
    shuffle_window_records: Annotated[int, "records whose documents are shuffled together", POSITIVE.at_most(10**9)] = 1
    workers: Annotated[int, "threads per reading rank that prepare batches ahead", NOT_NEGATIVE.at_most(256)] = 1
    verify: Annotated[
        Literal["always", "first", "never"], "when sha256 of whole shards is checked; each record's crc32 always is"
    ] = "first"
    on_damage: Annotated[Literal["fail", "quarantine"], "quarantine: padding replaces a damaged record"] = "fail"
    max_quarantined_fraction: Annotated[
        float, "of a source's tokens; more stops the run", NOT_NEGATIVE.at_most(1.0)
    ] = 0.01
    cache_dir: Annotated[
        str | None, "keeps records of remote datasets; null: nextlat_dist in the user's cache directory", LOCATION
    ] = None
    cache_bytes: Annotated[int, "size of that cache; 0: no cache", NOT_NEGATIVE.at_most(10**18)] = 10_000_000_000
    log_batch_hashes: Annotated[bool, "SHA-256 of every global batch into batch_hashes.jsonl"] = False

    @property
    def train_sources(self) -> list[SourceConfig]:
        """`sources`, or `train` as the only one."""
        return self.sources if self.train is None else [SourceConfig("train", self.train)]

    @property
    def weight_changes_by_row(self) -> list[tuple[int, dict[str, float]]]:
        return [(-(-change.at_tokens // self.sequence_length), change.weights) for change in self.weight_changes]


@dataclass
class OptimizerConfig:
    """AdamW; norms are not decayed."""

    lr: Annotated[float, "peak learning rate", POSITIVE.within(1e-15, 100.0)] = 1e-3
    betas: Annotated[list[float], "decay of AdamW's two averages", BETAS] = field(default_factory=lambda: [0.9, 0.95])
    eps: Annotated[float, "AdamW's epsilon", POSITIVE.within(1e-30, 1.0)] = 1e-8
    weight_decay: Annotated[float, "decoupled, as in AdamW", NOT_NEGATIVE.within(1e-15, 1000.0)] = 0.1
    clip_grad: Annotated[float, "global gradient norm; 0 switches clipping off", NOT_NEGATIVE.within(1e-9, 1e9)] = 1.0


@dataclass
class ScheduleConfig:
    """Learning rate over tokens."""

    name: Annotated[Literal["constant", "cosine", "wsd"], "its form after the warm-up"] = "wsd"
    warmup_tokens: Annotated[int, "length of the linear rise from 0", TOKENS_OR_NONE] = 0
    decay_tokens: Annotated[int, "wsd: length of the linear decay at the end", TOKENS_OR_NONE] = 0
    min_lr: Annotated[float, "where a decay ends", NOT_NEGATIVE.at_most(100.0)] = 0.0


@dataclass
class TrainingConfig:
    """How long, in which batches and in which precision; what is logged."""

    train_tokens: Annotated[int, "rounded up to whole global batches", TOKENS] = 1_000_000
    micro_batch_size: Annotated[int, "rows per rank and forward pass", ROWS] = 8
    global_batch_size: Annotated[int, "rows per optimizer step, all data-parallel ranks together", ROWS] = 16
    precision: Annotated[Literal["fp32", "bf16"], "of activations; bf16 keeps fp32 master weights"] = "fp32"
    communication_data_type: Annotated[
        Literal["fp32", "bf16"],
        "in which gradients are summed over ranks; bf16 halves the traffic and rounds every sum",
    ] = "fp32"
    recompute: Annotated[
        Literal["none", "selective", "full"],
        "what the backward pass computes again, to save memory: attention and the MLP's activation, or whole layers",
    ] = "none"
    fused_losses: Annotated[bool, "losses and their gradients in chunks; false: whole logits, slower, larger"] = True
    compile: Annotated[
        Literal["auto", "always", "never"],
        "pointwise pieces into one kernel each by torch.compile; auto: on a GPU where a compiler works",
    ] = "auto"
    deterministic: Annotated[
        bool, "GPUs: kernels that give the same bits every time, for a bit-identical resume; slower. CPUs always do"
    ] = False
    seed: Annotated[int, "of the weights and of the order of the data", NOT_NEGATIVE] = 1234
    log_interval: Annotated[int, "steps", STEPS] = 10
    validation_interval: Annotated[int, "steps; 0: at the end only", STEPS_OR_NONE] = 0
    validation_batches: Annotated[int, "global batches", NOT_NEGATIVE.at_most(10**9)] = 4
    target_loss: Annotated[float | None, "a validation's, of the next token; bst: `decoded`: it ends the run", LOSS] = (
        None
    )
    peak_tflops_per_device: Annotated[
        float | None,
        "for MFU; null: GPUs by name or by a short bf16 matrix product, no MFU on a CPU",
        POSITIVE.within(1e-6, 1e6),
    ] = None


@dataclass
class CheckpointConfig:
    """When checkpoints are written, which ones stay, and what a start resumes from."""

    save_interval: Annotated[int, "steps; 0: at the end only", STEPS_OR_NONE] = 0
    keep_last: Annotated[int, "newest checkpoints that stay", STEPS] = 2
    keep_every: Annotated[int, "steps; checkpoints at multiples of it are kept for ever, 0: none", STEPS_OR_NONE] = 0
    background: Annotated[bool, "write while training continues"] = True
    fallback: Annotated[bool, "resume from an older checkpoint when the newest is damaged; false: stop"] = True
    resume: Annotated[Literal["auto", "never", "must"], "must: an error when there is nothing to resume"] = "auto"


@dataclass
class GuardsConfig:
    """Steps that are not applied. A loss or gradient norm that is NaN or infinite always is one."""

    spike_zscore: Annotated[
        float,
        "loss or gradient norm above the median, in robust standard deviations; 0: off",
        NOT_NEGATIVE.within(0.1, 1e9),
    ] = 0.0
    window_steps: Annotated[
        int,
        "applied steps that the median is of; spikes are looked for once there are as many",
        POSITIVE.at_most(1_000_000),
    ] = 128
    max_bad_steps: Annotated[
        int, "as many in a row: back to the last checkpoint, and on after their rows; 0: never", STEPS_OR_NONE
    ] = 10


@dataclass
class WatchdogConfig:
    """Ends a run of which a rank no longer moves."""

    timeout_seconds: Annotated[
        float,
        "without progress of a rank; longer than any save or validation; 0: no watchdog",
        NOT_NEGATIVE.within(1.0, 1e7),
    ] = 1800.0


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: Annotated[Literal["online", "offline", "disabled"], "offline: files that `wandb sync` sends later"] = (
        "disabled"
    )
    project: Annotated[str, "where the run is listed"] = "nextlat"
    name: Annotated[str | None, "of the run; null: wandb makes one up"] = None


@dataclass
class RunConfig:
    """One training run. `output_dir` holds checkpoints/, metrics.jsonl and the resolved config."""

    output_dir: Annotated[str, "directory of the run: checkpoints/, metrics.jsonl, the resolved config", LOCATION] = (
        "runs/default"
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    deepspeed: Annotated[dict[str, Any], "raw DeepSpeed settings, merged under ours"] = field(default_factory=dict)

    @property
    def predictor_hidden_size(self) -> int:
        return self.model.hidden_size if self.predictor.hidden_size is None else self.predictor.hidden_size

    @property
    def max_position_embeddings(self) -> int:
        given = self.model.max_position_embeddings
        return self.data.sequence_length if given is None else given

    @property
    def tokens_per_step(self) -> int:
        """Positions trained on per optimizer step."""
        return self.training.global_batch_size * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        return -(-self.training.train_tokens // self.tokens_per_step)
