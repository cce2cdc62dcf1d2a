"""An objective of one's own: next-token prediction that also keeps neighbouring states close. Nothing is installed.

python examples/custom_objective.py DATASET OUTPUT      # DATASET as `nextlat-data shard` wrote it
"""

import sys

import torch

from nextlat_dist import train
from nextlat_dist.config import load_config
from nextlat_dist.config.entries import ObjectiveEntry, Term
from nextlat_dist.model.rows import ObjectiveInputs
from nextlat_dist.objective.masks import masked_sum, state_mask
from nextlat_dist.objective.next_token import NextTokenObjective


class SmoothObjective(NextTokenObjective):
    """ObjectiveInputs -> term sums [2]: next_token, and the squared step between states of one document."""

    def forward(self, inputs: ObjectiveInputs) -> torch.Tensor:
        step = (inputs.hidden[1:] - inputs.hidden[:-1]).float().square().mean(dim=-1)  # [s - 1, b]
        return torch.cat([super().forward(inputs), masked_sum(step, state_mask(inputs.batch, 1))[None]])


SMOOTH = ObjectiveEntry(
    name="smooth",
    module="custom_objective:SmoothObjective",
    terms=(Term("smooth", "options.lambda_smooth", "nextlat_dist.objective.masks:state_mask"),),
    steps_ahead=lambda objective: 1,
    options={"lambda_smooth": 0.1},
)

if __name__ == "__main__":
    dataset, output = sys.argv[1:]
    settings = ["objective.name=custom_objective:SMOOTH", f"data.train={dataset}", f"output_dir={output}"]
    settings += ["model.num_layers=2", "model.hidden_size=32", "model.vocab_size=600", "data.sequence_length=32"]
    train(load_config(None, [*settings, "training.train_tokens=4096", "training.log_interval=1"]))
