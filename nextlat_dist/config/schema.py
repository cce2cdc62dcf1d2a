"""The sections of a run's configuration and the rules between them.

Every rule that can be checked without building anything is checked here, once, and its message gives the values, the
rule and the key to change. Names are upstream's: Megatron-Core's for the model, DeepSpeed's for the engine.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

from nextlat_dist.errors import UserError


def swiglu_ffn_hidden_size(hidden_size: int) -> int:
    """The paper's feed-forward width: 128 * round((8 * hidden / 3) / 128), at least 128."""
    return max(128, 128 * round(8 * hidden_size / 3 / 128))


@dataclass
class ModelConfig:
    """A Llama-family decoder: pre-norm, RMSNorm, SwiGLU, RoPE, grouped-query attention, no biases."""

    num_layers: int = 8
    hidden_size: int = 256
    num_attention_heads: int = 4
    num_query_groups: int | None = None  # key/value heads; null: num_attention_heads
    ffn_hidden_size: int | None = None  # null: 128 * round((8 * hidden_size / 3) / 128)
    vocab_size: int = 4096
    make_vocab_size_divisible_by: int = (
        128  # the embedding is padded to a multiple; never depends on tensor parallelism
    )
    max_position_embeddings: int | None = None  # null: data.sequence_length
    rotary_base: float = 10000.0
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    init_method_std: float = 0.02

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
    """The latent predictor p_psi: three matrices of width `hidden_size` (the paper's H)."""

    hidden_size: int | None = None  # null: model.hidden_size


@dataclass
class ObjectiveConfig:
    """What is minimised: lambda_next_token * L_ntp; with `nextlat` + lambda_hidden * L_h + lambda_kl * L_kl (arXiv
    2511.05963); with `mtp` + lambda_mtp * L_mtp (arXiv 2404.19737). The paper's loss is the default; a term with lambda
    0 is still logged.
    """

    name: Literal["next_token", "nextlat", "mtp"] = "nextlat"
    horizon: int = 1  # the paper's d: rollout steps of the latent predictor, or extra layers of mtp
    lambda_next_token: float = 1.0
    lambda_hidden: float = 1.0
    lambda_kl: float = 1.0
    lambda_mtp: float = 1.0
    stop_gradient_target: bool = True  # false: L_h also moves the state that it predicts
    stop_gradient_head: bool = True  # false: L_kl also moves the output head, through the student; never the teacher

    @property
    def steps_ahead(self) -> int:
        """How many steps beyond the next token the loss looks: `horizon`, or 0 for next_token."""
        return 0 if self.name == "next_token" else self.horizon


@dataclass
class ParallelConfig:
    """How ranks divide the work; data-parallel size is what remains of the world."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    zero_stage: Literal[0, 1, 2, 3] = 1


@dataclass
class SourceConfig:
    """One dataset of a mixture."""

    name: str
    path: str  # directory or URL with manifest.json
    weight: float = 1.0  # share of the rows, relative to the other sources'; 0 until a weight change says otherwise


@dataclass
class WeightChange:
    """New weights from the first row on that begins at or after `at_tokens` tokens of training."""

    at_tokens: int
    weights: dict[str, float]  # of every source, by name


@dataclass
class DataConfig:
    """Datasets of `nextlat-data shard` or `nextlat-data index`: directories or URLs (http, s3, gs)."""

    train: str | None = None  # directory or URL with manifest.json; or else `sources`
    sources: list[SourceConfig] = field(default_factory=list)
    weight_changes: list[WeightChange] = field(default_factory=list)
    validation: str | None = None
    tokenizer: str | None = None  # when given, must be the file that the datasets were tokenized with
    sequence_length: int = 256  # positions per row; a row reads sequence_length + 1 tokens
    packing: Literal["concat", "pad"] = "concat"
    shuffle: bool = True
    shuffle_window_records: int = 1  # records whose documents are shuffled together
    workers: int = 1  # threads per reading rank that prepare batches ahead
    verify: Literal["always", "first", "never"] = "first"  # sha256 of whole shards; each record's crc32 always is
    on_damage: Literal["fail", "quarantine"] = "fail"  # quarantine: padding takes the place of a damaged record
    max_quarantined_fraction: float = 0.01  # of a source's tokens; more stops the run
    cache_dir: str | None = None  # keeps records of remote datasets; null: nextlat_dist in the user's cache directory
    cache_bytes: int = 10_000_000_000  # 0: no cache
    log_batch_hashes: bool = False  # SHA-256 of every global batch into batch_hashes.jsonl

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

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0  # global gradient norm; 0 switches clipping off


@dataclass
class ScheduleConfig:
    """Learning rate over tokens."""

    name: Literal["constant", "cosine", "wsd"] = "wsd"
    warmup_tokens: int = 0
    decay_tokens: int = 0  # wsd: length of the linear decay at the end
    min_lr: float = 0.0


@dataclass
class TrainingConfig:
    train_tokens: int = 1_000_000  # rounded up to whole global batches
    micro_batch_size: int = 8  # rows per rank and forward pass
    global_batch_size: int = 16  # rows per optimizer step, all data-parallel ranks together
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    seed: int = 1234
    log_interval: int = 10  # steps
    validation_interval: int = 0  # steps; 0: at the end only
    validation_batches: int = 4  # global batches
    peak_tflops_per_device: float | None = None  # for MFU; null: known GPUs by name, CPUs by a short measurement


@dataclass
class CheckpointConfig:
    save_interval: int = 0  # steps; 0: at the end only
    keep_last: int = 2
    keep_every: int = 0  # steps; checkpoints at multiples of it are kept for ever, 0: none
    background: bool = True  # write while training goes on
    fallback: bool = True  # resume from an older checkpoint when the newest is damaged; false: stop
    resume: Literal["auto", "never", "must"] = "auto"  # must: an error when there is nothing to resume


@dataclass
class GuardsConfig:
    """Steps that are not applied. A loss or gradient norm that is NaN or infinite always is one."""

    spike_zscore: float = 0.0  # loss or gradient norm above the median, in robust standard deviations; 0: off
    window_steps: int = 128  # applied steps that the median is of; spikes are looked for once there are as many
    max_bad_steps: int = 10  # as many in a row: back to the last checkpoint, and on after their rows; 0: never


@dataclass
class WatchdogConfig:
    timeout_seconds: float = 1800.0  # without progress of a rank; longer than any save or validation; 0: no watchdog


@dataclass
class WandbConfig:
    mode: Literal["online", "offline", "disabled"] = "disabled"
    project: str = "nextlat"
    name: str | None = None


@dataclass
class RunConfig:
    """One training run. `output_dir` holds checkpoints/, metrics.jsonl and the resolved config."""

    output_dir: str = "runs/default"
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
    deepspeed: dict[str, Any] = field(default_factory=dict)  # raw DeepSpeed settings, merged under ours

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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def validate(config: RunConfig, world_size: int | None = None) -> None:
    """Check every rule between values; with `world_size`, also those that depend on the number of ranks.

    Raises:
        UserError: the first broken rule.
    """
    _validate_positive(config)
    _validate_sources(config)
    _validate_model(config)
    _validate_objective(config.objective)
    _validate_schedule(config)
    _validate_parallel(config)
    if world_size is not None:
        _validate_world(config, world_size)


def _validate_positive(config: RunConfig) -> None:
    model, training = config.model, config.training
    for key, value in {
        "model.num_layers": model.num_layers,
        "model.hidden_size": model.hidden_size,
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.query_groups,
        "model.ffn_hidden_size": model.ffn_size,
        "model.vocab_size": model.vocab_size,
        "model.make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "data.sequence_length": config.data.sequence_length,
        "data.shuffle_window_records": config.data.shuffle_window_records,
        "model.max_position_embeddings": config.max_position_embeddings,
        "model.rotary_base": model.rotary_base,
        "model.norm_epsilon": model.norm_epsilon,
        "model.init_method_std": model.init_method_std,
        "predictor.hidden_size": config.predictor_hidden_size,
        "objective.horizon": config.objective.horizon,
        "parallel.tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "parallel.pipeline_model_parallel_size": config.parallel.pipeline_model_parallel_size,
        "training.train_tokens": training.train_tokens,
        "training.micro_batch_size": training.micro_batch_size,
        "training.global_batch_size": training.global_batch_size,
        "training.log_interval": training.log_interval,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "optimizer.lr": config.optimizer.lr,
        "optimizer.eps": config.optimizer.eps,
        "guards.window_steps": config.guards.window_steps,
    }.items():
        _require(value > 0, f"{key} is {value}, it must be positive")
    for key, value in {
        "objective.lambda_next_token": config.objective.lambda_next_token,
        "objective.lambda_hidden": config.objective.lambda_hidden,
        "objective.lambda_kl": config.objective.lambda_kl,
        "objective.lambda_mtp": config.objective.lambda_mtp,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "optimizer.clip_grad": config.optimizer.clip_grad,
        "schedule.warmup_tokens": config.schedule.warmup_tokens,
        "schedule.decay_tokens": config.schedule.decay_tokens,
        "schedule.min_lr": config.schedule.min_lr,
        "data.workers": config.data.workers,
        "data.cache_bytes": config.data.cache_bytes,
        "data.max_quarantined_fraction": config.data.max_quarantined_fraction,
        "training.seed": training.seed,
        "training.validation_interval": training.validation_interval,
        "training.validation_batches": training.validation_batches,
        "checkpoint.save_interval": config.checkpoint.save_interval,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "guards.spike_zscore": config.guards.spike_zscore,
        "guards.max_bad_steps": config.guards.max_bad_steps,
        "watchdog.timeout_seconds": config.watchdog.timeout_seconds,
    }.items():
        _require(value >= 0, f"{key} is {value}, it must not be negative")
    peak = training.peak_tflops_per_device
    _require(peak is None or peak > 0, f"training.peak_tflops_per_device is {peak}, it must be positive or null")
    _require(
        len(config.optimizer.betas) == 2 and all(0 <= beta < 1 for beta in config.optimizer.betas),
        f"optimizer.betas is {config.optimizer.betas}, it must be two numbers in [0, 1)",
    )


def _validate_sources(config: RunConfig) -> None:
    data = config.data
    names = [source.name for source in data.train_sources]
    _require(
        data.train is None or not data.sources,
        f"data.train={data.train} and data.sources are both set; put every dataset into data.sources",
    )
    _require(len(set(names)) == len(names), f"data.sources has the names {', '.join(names)}; give each its own")
    for source in data.sources:
        _require(source.weight >= 0, f"the weight of source {source.name} is {source.weight}; it must not be negative")
    _require(
        not data.sources or any(source.weight > 0 for source in data.sources),
        "every weight in data.sources is 0; one must be positive",
    )
    at = [0, *(row for row, _ in data.weight_changes_by_row)]
    _require(
        all(one < next_one for one, next_one in itertools.pairwise(at)),
        f"data.weight_changes are at {', '.join(str(c.at_tokens) for c in data.weight_changes)} tokens; each must be a "
        f"row of data.sequence_length={data.sequence_length} tokens or more after the one before, the first after 0",
    )
    for change in data.weight_changes:
        _require(
            set(change.weights) == set(names),
            f"data.weight_changes at {change.at_tokens} tokens names {', '.join(change.weights) or 'nothing'}; it must "
            f"give a weight for each of {', '.join(names)}",
        )
        _require(
            all(weight >= 0 for weight in change.weights.values()) and any(change.weights.values()),
            f"data.weight_changes at {change.at_tokens} tokens has the weights "
            f"{', '.join(map(str, change.weights.values()))}; none may be negative and one must be positive",
        )


def _validate_model(config: RunConfig) -> None:
    model, objective, data = config.model, config.objective, config.data
    heads, groups = model.num_attention_heads, model.query_groups
    _require(
        model.hidden_size % heads == 0 and (model.hidden_size // heads) % 2 == 0,
        f"model.hidden_size={model.hidden_size} over model.num_attention_heads={heads} must give an even head size",
    )
    _require(
        heads % groups == 0,
        f"model.num_attention_heads={heads} is not divisible by model.num_query_groups={groups}",
    )
    _require(
        data.sequence_length <= config.max_position_embeddings,
        f"data.sequence_length={data.sequence_length} is longer than "
        f"model.max_position_embeddings={config.max_position_embeddings}",
    )
    _require(
        objective.steps_ahead < data.sequence_length,
        f"objective.horizon={objective.horizon} must be smaller than data.sequence_length={data.sequence_length}",
    )


def _validate_objective(objective: ObjectiveConfig) -> None:
    """A latent predictor, or mtp's layers, that no term trains would be built for nothing; a pipeline would hang."""
    lambdas = {
        "next_token": {"lambda_next_token": objective.lambda_next_token},
        "nextlat": {"lambda_hidden": objective.lambda_hidden, "lambda_kl": objective.lambda_kl},
        "mtp": {"lambda_mtp": objective.lambda_mtp},
    }[objective.name]
    instead = "" if objective.name == "next_token" else ", or objective.name=next_token"
    _require(
        any(lambdas.values()),
        f"objective.name={objective.name} with {' and '.join(f'objective.{name}=0' for name in lambdas)} has nothing "
        f"to learn; make {'one of them' if len(lambdas) > 1 else 'it'} positive{instead}",
    )


def _validate_schedule(config: RunConfig) -> None:
    schedule, total = config.schedule, config.training.train_tokens
    decay = schedule.decay_tokens if schedule.name == "wsd" else 0
    _require(
        schedule.warmup_tokens + decay <= total,
        f"schedule.warmup_tokens={schedule.warmup_tokens} and schedule.decay_tokens={decay} together exceed "
        f"training.train_tokens={total}",
    )
    _require(
        schedule.min_lr <= config.optimizer.lr,
        f"schedule.min_lr={schedule.min_lr} is above optimizer.lr={config.optimizer.lr}",
    )


def _validate_parallel(config: RunConfig) -> None:
    model, parallel = config.model, config.parallel
    tp, pp, zero = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.zero_stage
    for key, value in {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.query_groups,
        "model.ffn_hidden_size": model.ffn_size,
        "predictor.hidden_size": config.predictor_hidden_size,
    }.items():
        _require(
            value % tp == 0,
            f"{key}={value} is not divisible by parallel.tensor_model_parallel_size={tp}",
        )
    _require(
        model.padded_vocab_size % tp == 0,
        f"the vocabulary padded to {model.padded_vocab_size} is not divisible by "
        f"parallel.tensor_model_parallel_size={tp}; change model.make_vocab_size_divisible_by",
    )
    _require(
        pp == 1 or zero <= 1,
        f"parallel.zero_stage={zero} cannot be used with parallel.pipeline_model_parallel_size={pp}: "
        "a pipeline allows parallel.zero_stage 0 or 1",
    )
    _require(
        pp <= model.num_layers,
        f"parallel.pipeline_model_parallel_size={pp} exceeds model.num_layers={model.num_layers}: "
        "every stage needs a decoder layer",
    )
    _require(
        config.training.precision != "bf16" or zero >= 1,
        "training.precision=bf16 with parallel.zero_stage=0 would accumulate gradients in bf16; "
        "use parallel.zero_stage=1 or more, which accumulates in fp32",
    )
    _require(
        not (model.tie_embeddings and zero == 3),
        "model.tie_embeddings=true cannot be used with parallel.zero_stage=3: the head would read a weight that the "
        "embedding has released; use parallel.zero_stage=2 or less",
    )


def _validate_world(config: RunConfig, world_size: int) -> None:
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    micro, total = config.training.micro_batch_size, config.training.global_batch_size
    _require(
        world_size % (tp * pp) == 0,
        f"{world_size} ranks cannot be divided into groups of parallel.tensor_model_parallel_size={tp} x "
        f"parallel.pipeline_model_parallel_size={pp}",
    )
    dp = world_size // (tp * pp)
    _require(
        total % (micro * dp) == 0,
        f"training.global_batch_size={total} is not a multiple of training.micro_batch_size={micro} x "
        f"{dp} data-parallel ranks",
    )
