"""Objectives and predictors by name: ours, installed ones, and those of a module that the user's config names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nextlat_dist.config import config_from_dict, config_to_dict, load_config
from nextlat_dist.config.entries import OBJECTIVES, PREDICTORS
from nextlat_dist.errors import UserError
from nextlat_dist.model.sharding import Sharding, sharding_of, sharding_rules
from nextlat_dist.objective.catalogue import BUILT_IN, objective_entry
from nextlat_dist.plan.counting import flops_per_token, parameter_counts

PACKAGE = Path(__file__).parents[2] / "nextlat_dist"
TOY = """
from nextlat_dist.config.entries import ObjectiveEntry, Sharding, Term
from nextlat_dist.errors import UserError

def check(config):
    if config.data.sequence_length % 2:
        raise UserError("data.sequence_length must be even for toy")

ENTRY = ObjectiveEntry(
    name="toy", module="toy:Module", terms=(Term("echo", "options.lambda_echo", "toy:mask"),),
    parameters=lambda config, sizes: {"toy": 7 * config.objective.option("width")}, flops=lambda config, sizes: 11.0,
    options={"lambda_echo": 0.5, "width": 3}, sharding=lambda config: {"toy.*.weight": Sharding(1)}, check=check,
)
NOT_AN_ENTRY = 3
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module `toy`, and a distribution there with the entry point `installed_toy`."""
    (tmp_path / "toy.py").write_text(TOY)
    described = tmp_path / "toy-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[nextlat_dist.objectives]\ninstalled_toy = toy:ENTRY\n")
    monkeypatch.setattr(OBJECTIVES, "_found", {})
    monkeypatch.setattr(OBJECTIVES, "_allowed", set())
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def refusal(name: str) -> str:
    with pytest.raises(UserError) as caught:
        objective_entry(name)
    return str(caught.value)


def test_built_in_entries_are_found_by_their_names() -> None:
    assert [objective_entry(entry.name) for entry in BUILT_IN] == list(BUILT_IN)
    assert {entry.name: entry.drafter for entry in BUILT_IN} == {
        "next_token": None, "nextlat": "latent_predictor", "mtp": "mtp", "jtp": "jtp", "bst": None,
    }  # fmt: skip


def test_an_unknown_name_is_answered_with_the_known_ones(toy: Path) -> None:
    known = "it must be one of next_token, nextlat, mtp, jtp, bst, installed_toy"
    assert refusal("nextlt") == f"objective.name is 'nextlt', {known}; the nearest is nextlat"
    assert refusal("?") == f"objective.name is '?', {known}, or my_module:MyEntry"
    with pytest.raises(UserError, match=r"predictor\.fusion is 'concatt', it must be one of concat; the nearest is"):
        load_config(None, ["predictor.fusion=concatt"])


@pytest.mark.parametrize("name", ["installed_toy", "toy:ENTRY"])
def test_an_entry_of_a_third_party_rules_its_part_of_the_config(name: str, toy: Path) -> None:
    chosen = [f"objective.name={name}", "data.sequence_length=64"]
    config = load_config(None, chosen)
    assert config.objective.entry.name == "toy"
    assert (config.objective.weight("options.lambda_echo"), config.objective.option("width")) == (0.5, 3)
    config = load_config(None, [*chosen, "objective.options.lambda_echo=2", "objective.options.width=5"])
    assert (config.objective.weight("options.lambda_echo"), config.objective.option("width")) == (2.0, 5)
    base = load_config(None, ["objective.name=next_token", "data.sequence_length=64"])
    assert parameter_counts(config)["toy"] == 35
    assert parameter_counts(config)["total"] == parameter_counts(base)["total"] + 35
    assert flops_per_token(config) == flops_per_token(base) + 11
    assert sharding_of("toy.3.weight", sharding_rules(config)) == Sharding(1)
    with pytest.raises(AssertionError, match="no sharding rule"):
        sharding_of("toy.3.4.weight", sharding_rules(config))
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "objective.options.widht=1",
            "objective.options.widht is not an option of objective.name=installed_toy, which",
        ),
        ("objective.options.width=wide", "objective.options.width is 'wide', it must be of type int"),
        ("objective.options.width=true", "objective.options.width is True, it must be of type int"),
        ("objective.options.lambda_echo=-1", "objective.options.lambda_echo is -1.0, it must not be negative"),
        ("objective.options.lambda_echo=0", "with objective.options.lambda_echo=0 has nothing to learn; make it"),
        ("data.sequence_length=63", "data.sequence_length must be even for toy"),
    ],
)
def test_rules_of_an_entry_are_rules_of_the_config(override: str, sentence: str, toy: Path) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_config(None, ["objective.name=installed_toy", "data.sequence_length=64", override])


def test_options_are_for_entries_that_have_some() -> None:
    with pytest.raises(UserError, match=r"objective\.options\.x is not an option .* has none; remove it"):
        load_config(None, ["objective.options.x=1"])


def test_a_module_is_imported_for_a_config_that_the_user_passes_only(toy: Path) -> None:
    raw = config_to_dict(load_config(None, [])) | {"objective": {"name": "toy:ENTRY"}}
    with pytest.raises(UserError, match="never for one that comes with a checkpoint"):
        config_from_dict(raw)
    assert "toy" not in sys.modules
    load_config(None, ["objective.name=toy:ENTRY"])
    assert config_from_dict(raw).objective.entry.name == "toy"  # the user has named it by now


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("toy:NOT_AN_ENTRY", "objective.name is 'toy:NOT_AN_ENTRY', which names a int; it must name a ObjectiveEntry"),
        ("toy:MISSING", "objective.name is 'toy:MISSING', which cannot be imported: module 'toy' has no attribute"),
        ("toyy:ENTRY", "objective.name is 'toyy:ENTRY', which cannot be imported: No module named 'toyy'"),
    ],
)
def test_what_is_no_entry_is_said(name: str, sentence: str, toy: Path) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_config(None, [f"objective.name={name}"])


def test_a_module_in_the_working_folder_is_found(toy: Path) -> None:
    program = (
        "from nextlat_dist.config import load_config\n"
        "print(load_config(None, ['objective.name=toy:ENTRY']).objective.entry.name)"
    )
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=toy, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (result.stdout, result.stderr) == ("toy\n", "")


def test_the_catalogues_need_no_torch() -> None:
    program = (
        "import sys\nfrom nextlat_dist.config import load_config\n"
        "from nextlat_dist.plan.counting import flops_per_token, parameter_counts\n"
        "from nextlat_dist.model.sharding import sharding_rules\n"
        "config = load_config(None, [])\nparameter_counts(config), flops_per_token(config), sharding_rules(config)\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60, check=False)
    assert (result.stdout, result.stderr) == ("False\n", "")


def test_objectives_are_told_apart_by_name_in_the_catalogue_only() -> None:
    comparison = re.compile(r"objective\.name *(==|!=|in\b|not in)")
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if comparison.search(line)
    }
    assert found <= {"objective/catalogue.py"}


def test_every_form_of_predictor_has_a_name_of_its_own() -> None:
    assert list(PREDICTORS.built_in()) == ["concat"]
