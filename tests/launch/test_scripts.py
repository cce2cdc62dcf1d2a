"""The scripts are sound shell, explain themselves, and answer bad arguments with one sentence.

Command: `pytest tests/launch/test_scripts.py`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.launch.checkout import CHECKOUT, Project, assert_one_sentence

SCRIPTS = sorted([*CHECKOUT.glob("launch/*.sh"), *CHECKOUT.glob("launch/*.sbatch"), CHECKOUT / ".ci/run"])
TOOLS = Path(sys.executable).parent
COMMANDS = [script.name for script in SCRIPTS if script.name not in ("env.sh", "processes.sh", "ranks.sh", "run")]
PYTEST = "pytest -n auto --maxprocesses 4 --dist loadfile"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shell_is_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    check = [str(TOOLS / "shellcheck"), "--external-sources", str(script.relative_to(CHECKOUT))]
    result = subprocess.run(check, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_prints_the_usage(project: Project, name: str) -> None:
    result = project.run(f"launch/{name}", "--help")
    assert result.returncode == 0, result.stderr
    header = (CHECKOUT / "launch" / name).read_text().partition("\n\n")[0].splitlines()[1:]
    assert result.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in header]
    assert f"launch/{name}" in result.stdout.partition("Usage: ")[2]
    assert not (project.root / ".venv").exists(), "help does not set up"


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        (["setup.sh", "now"], ["no argument but --dev", "now"]),
        (["clean_machine.sh", "--python", "3.9"], ["--python is 3.9", "3.11, 3.12 or 3.13"]),
        (["clean_machine.sh", "--python"], ["--python", "needs a value"]),
        (["clean_machine.sh", "--steps", "tests,all"], ["--steps has all", "quickstart"]),
        (["clean_machine.sh", "--python", "3.12"], ["no virtual environment", "setup.sh"]),
        (["clean_machine.sh", "--fast"], ["does not know --fast"]),
        (["single_node.sh"], ["no CONFIG"]),
        (["single_node.sh", "missing.yaml"], ["missing.yaml", "not a file"]),
        (["single_node.sh", "run.yaml"], ["no virtual environment", "setup.sh"]),
        (["multi_node.sh"], ["no HOSTFILE"]),
        (["multi_node.sh", "missing"], ["missing", "not a file"]),
        (["hostfile.sh"], ["no HOSTFILE"]),
        (["multi_node.sh", "hosts"], ["no CONFIG"]),
        (["multi_node.sh", "hosts", "missing.yaml"], ["missing.yaml"]),
        (["multi_node.sh", "bad_hosts", "run.yaml"], ["line 2 of bad_hosts is 'second slot=1'", "HOST slots=N"]),
        (["multi_node.sh", "no_hosts", "run.yaml"], ["names no host"]),
        (["slurm.sbatch", "run.yaml"], ["not a Slurm job", "sbatch"]),
        (["torchrun.sh"], ["no CONFIG"]),
        (["torchrun.sh", "run.yaml"], ["no virtual environment"]),
        (["quickstart.sh", "--fast"], ["--fast", "key=value"]),
        (["speculative.sh", "--fast"], ["--fast", "key=value"]),
        (["reproduce.sh"], ["--scale", "cpu", "configs/paper"]),
        (["reproduce.sh", "--scale", "gpu"], ["--scale", "gpu", "cpu"]),
        (["reproduce.sh", "--scale"], ["--scale", "value"]),
        (["reproduce.sh", "--scale", "cpu", "--fast"], ["--fast", "key=value"]),
        (["reproduce.sh", "--scale", "cpu", "--task", "chess"], ["--task", "chess", "path_star", "state_tracking"]),
        (["reproduce.sh", "--scale", "cpu", "--seeds", "0 x"], ["--seeds", "x", "whole numbers"]),
        (["reproduce.sh", "--scale", "cpu", "--seeds", "0.."], ["--seeds", "0..", "0..7"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_bad_arguments_get_one_sentence(project: Project, command: list[str], parts: list[str]) -> None:
    (project.root / "hosts").write_text("# two of them\n\nfirst slots=1\nsecond slots=1\n")
    (project.root / "bad_hosts").write_text("first slots=1\nsecond slot=1\n")
    (project.root / "no_hosts").write_text("# none yet\n")
    assert_one_sentence(project.run(f"launch/{command[0]}", *command[1:]), *parts)


@pytest.mark.parametrize("value", ["0", "two", "-1", ""])
def test_number_of_ranks_is_checked(project: Project, value: str) -> None:
    assert_one_sentence(project.run("launch/single_node.sh", "run.yaml", NPROC=value), "NPROC")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"NNODES": "two"}, ["NNODES is two", "MIN:MAX"]),
        ({"NNODES": "1:2"}, ["RDZV_ENDPOINT is not set", "HOST:PORT"]),
        ({"NPROC": "0"}, ["NPROC is 0"]),
        ({"MAX_RESTARTS": "some"}, ["MAX_RESTARTS is some"]),
        ({"RESTART_SECONDS": "-1"}, ["RESTART_SECONDS is -1"]),
    ],
    ids=str,
)
def test_settings_of_torchrun_are_checked(project: Project, settings: dict[str, str], parts: list[str]) -> None:
    assert_one_sentence(project.run("launch/torchrun.sh", "run.yaml", **settings), *parts)


def test_missing_pdsh(project: Project) -> None:
    project.add_real_venv()
    (project.root / "hosts").write_text("first slots=1\n")
    for name in ("bash", "dirname", "sed", "grep", "head", "tr", "mktemp", "rm"):  # a PATH that surely has no pdsh
        project.add_command(name, f'#!/bin/sh\nexec {shutil.which(name)} "$@"\n')
    result = project.run("launch/multi_node.sh", "hosts", "run.yaml", PATH=str(project.root / "commands"))
    assert_one_sentence(result, "pdsh is not installed")


def stub_checks(project: Project, failing: str = "") -> None:
    """Stand-ins for set-up and the checkers, which log their calls."""
    (project.root / ".ci").mkdir()
    (project.root / ".ci/run").write_text((CHECKOUT / ".ci/run").read_text())
    (project.root / "launch/setup.sh").write_text("echo setup $* >>calls.log\n")
    for name in ("ruff", "mypy", "lint-imports", "shellcheck", "pytest"):
        text = f'#!/bin/sh\necho "{name} $*" >>calls.log\nexit {int(name == failing)}\n'
        project.add_command(name, text, folder=".venv/bin")


def test_test_script_runs_every_check(project: Project) -> None:
    stub_checks(project)
    result = project.run(".ci/run", "-k", "something")
    assert result.returncode == 0, result.stderr
    calls = (project.root / "calls.log").read_text().splitlines()
    assert [call.split()[0] for call in calls] == [
        "setup",
        "ruff",
        "ruff",
        "mypy",
        "lint-imports",
        "shellcheck",
        "pytest",
    ]
    assert calls[0] == "setup --dev"
    assert calls[-1] == f"{PYTEST} -m not slow -k something"
    assert "launch/slurm.sbatch" in calls[-2]


def test_slow_tests_are_chosen_by_the_option(project: Project) -> None:
    stub_checks(project)
    assert project.run("launch/test.sh", "--slow", "-x").returncode == 0
    assert (project.root / "calls.log").read_text().splitlines()[-1] == f"{PYTEST} -x"


@pytest.mark.parametrize("failing", ["ruff", "mypy", "lint-imports", "shellcheck", "pytest"])
def test_a_failing_check_fails_the_test_script(project: Project, failing: str) -> None:
    stub_checks(project, failing)
    result = project.run("launch/test.sh")
    assert result.returncode != 0
    assert "All checks passed" not in result.stdout


def test_pre_commit_hooks_are_local_and_valid() -> None:
    config = CHECKOUT / ".pre-commit-config.yaml"
    subprocess.run([str(TOOLS / "pre-commit"), "validate-config", str(config)], check=True)
    assert config.read_text().count("repo:") == config.read_text().count("repo: local") == 1
