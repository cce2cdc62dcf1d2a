"""The map from a checkpoint's canonical tensors to a Llama's."""

from __future__ import annotations

import pytest
import torch

from nextlat_dist.config.load import load_config
from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.weights import to_llama
from tests.kit.launch.checkout import CHECKOUT


def test_what_no_part_of_the_objective_names_is_refused_by_its_name() -> None:
    config = load_config(CHECKOUT / "configs" / "quickstart.yaml")
    weight = torch.zeros(2)
    assert to_llama({"latent_predictor.layer_norm.weight": weight}, config) == {}
    with pytest.raises(UserError, match=r"smoother\.gain .* objective\.name nextlat does not list 'smoother'"):
        to_llama({"smoother.gain": weight}, config)
