"""The drafter of a run with objective.name jtp in an export: `jtp/`.

Fetch drafts, and the base has its weights already: the next token comes from it too. So the folder holds a
configuration, a calibration once there is one, and no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from nextlat_dist.huggingface.drafters.format import DrafterKind


@dataclass(frozen=True)
class JTPConfig:
    """The keys of `jtp/config.json`."""

    hidden_size: int
    vocab_size: int
    horizon: int
    base_weights_sha256: str


JTP = DrafterKind(
    name="jtp",
    algorithm="jtp",
    architecture="JointTokenPrediction",
    config=JTPConfig,
    tensor_names=lambda config: (),
    from_checkpoint="nextlat_dist.huggingface.checkpoint_drafters:jtp_of_checkpoint",
    drafter="nextlat_dist.inference.drafters.jtp:build",
    speculative_tokens=lambda config: config.horizon,
    verifier="NextLatJTPForCausalLM",
)
