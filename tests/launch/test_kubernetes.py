"""The Kubernetes example agrees with the script that it starts. Command: `pytest tests/launch/test_kubernetes.py`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.kit.launch.checkout import CHECKOUT

SERVICE, JOB = yaml.safe_load_all((CHECKOUT / "launch/kubernetes.yaml").read_text())
POD: dict[str, Any] = JOB["spec"]["template"]["spec"]
[RANKS] = POD["containers"]
SETTINGS = {entry["name"]: entry.get("value") for entry in RANKS["env"]}


def test_pods_find_one_another_by_name() -> None:
    """An indexed Job names its pods JOB-INDEX; the headless service makes that a name in the network."""
    assert (SERVICE["kind"], JOB["kind"], JOB["spec"]["completionMode"]) == ("Service", "Job", "Indexed")
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["selector"] == {"job-name": JOB["metadata"]["name"]}
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    assert SETTINGS["RDZV_ENDPOINT"].split(":")[0] == f"{JOB['metadata']['name']}-0.{SERVICE['metadata']['name']}"


def test_all_pods_run_at_once_and_know_how_many_they_are() -> None:
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == int(SETTINGS["NNODES"])


def test_command_exists_and_knows_every_variable() -> None:
    command = RANKS["command"]
    assert command[0] == "bash"
    for path in command[1:]:
        assert (CHECKOUT / path).is_file(), path
    assert all("=" in argument for argument in RANKS["args"])
    usage = (CHECKOUT / command[1]).read_text().partition("\n\n")[0]
    for name in SETTINGS:
        assert re.search(rf"^#   {name}=", usage, re.MULTILINE), name


@pytest.mark.parametrize(("action", "constants"), [("FailJob", ["MISTAKE", "INTERRUPTED"]), ("Ignore", ["SAVED"])])
def test_exit_codes_are_those_of_the_scripts(action: str, constants: list[str]) -> None:
    """The first rule that matches decides; a rule of exit codes must name our container."""
    script = (CHECKOUT / "launch/ranks.sh").read_text()
    codes = [int(re.search(rf"^{name}=(\d+)", script, re.MULTILINE)[1]) for name in constants]  # type: ignore[index]
    rules = [rule for rule in JOB["spec"]["podFailurePolicy"]["rules"] if rule["action"] == action]
    assert rules[0]["onExitCodes"] == {"containerName": RANKS["name"], "operator": "In", "values": codes}
    assert POD["restartPolicy"] == "Never", "what podFailurePolicy asks for"


def test_volumes_are_mounted() -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in RANKS["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in POD["volumes"]}
    assert "/dev/shm" in mounts.values()
    [output] = [argument.partition("=")[2] for argument in RANKS["args"] if argument.startswith("output_dir=")]
    assert any(output.startswith(f"{place}/") for place in mounts.values()), "the pods share the checkpoints"
