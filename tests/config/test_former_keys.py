"""Keys of former versions still say what they said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.config.load import config_from_dict, load_config
from nextlat_dist.errors import UserError


def test_true_means_full_and_warns(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("training: {activation_checkpointing: true, seed: 7}\n")
    with pytest.warns(FutureWarning, match=r"training\.recompute=full"):
        config = load_config(path)
    assert (config.training.recompute, config.training.seed) == ("full", 7)


@pytest.mark.parametrize("training", [{"activation_checkpointing": False}, {}])
def test_false_says_nothing(training: dict[str, Any]) -> None:
    given = {"training": {**training, "recompute": "selective"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = config_from_dict(given)
    assert config.training.recompute == "selective"
    assert given == {"training": {**training, "recompute": "selective"}}


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"activation_checkpointing": True, "recompute": "none"}, "both set"),
        ({"activation_checkpointing": "often"}, "must be true or false"),
        ({"activation_checkpointing": 1}, "must be true or false"),
        ({"recompute": "some"}, "must be one of none, selective, full"),
    ],
)
def test_what_it_cannot_mean_is_refused(training: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config_from_dict({"training": training})
