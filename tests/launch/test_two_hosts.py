"""launch/multi_node.sh on two real hosts: ssh, pdsh, DeepSpeed's launcher and gloo over a network.

The hosts are namespaces of this machine (two_hosts.sh); the training is the real one, on real text.
Command: `pytest tests/launch/test_two_hosts.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.kit.launch.namespaces import Site, why_not
from tests.kit.training.runs import logged

NO_HOSTS = why_not()
pytestmark = pytest.mark.skipif(bool(NO_HOSTS), reason=NO_HOSTS)


@pytest.fixture
def site(tmp_path: Path, text_dataset: Path) -> Site:
    return Site(tmp_path, text_dataset)


def losses(output: Path) -> dict[int, float]:
    return {step: line["loss"] for step, line in logged(output).items()}


def test_tensor_parallel_across_two_hosts(site: Site) -> None:
    """Every layer's all-reduce crosses the network; the losses are those of one rank."""
    alone = site.configure("alone", {"zero_stage": 0}, steps=3)
    across = site.configure("across", {"tensor_model_parallel_size": 2, "zero_stage": 0}, steps=3)
    site.here("alone", 1)
    site.on_two_hosts("launch/multi_node.sh", "hosts", "across.yaml")
    assert losses(across) == pytest.approx(losses(alone), rel=1e-5)
    assert len(losses(across)) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel", [{"tensor_model_parallel_size": 2, "zero_stage": 1}, {"zero_stage": 2}], ids=["tp2", "dp2"]
)
def test_two_hosts_train_as_one(parallel: dict[str, Any], site: Site) -> None:
    one = site.configure("one", parallel, steps=6)
    two = site.configure("two", parallel, steps=6)
    site.here("one", 2)
    site.on_two_hosts("launch/multi_node.sh", "hosts", "two.yaml")
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    assert len(losses(two)) == 6


@pytest.mark.slow
def test_a_host_without_power_is_named_and_left_out(site: Site) -> None:
    """Its plug is pulled: no process says goodbye. The other host resumes from the last checkpoint."""
    whole = site.configure("whole", {"zero_stage": 0}, steps=2000, save_interval=5)
    process = site.start_on_two_hosts("launch/multi_node.sh", "hosts", "whole.yaml")
    output = site.root / "output.txt"
    try:
        wait_for_text(output, "checkpoint saved", process)
        (site.root / "keys/power_off_beta").touch()
        wait_for_text(output, "resumed at step", process)
        before = max(json.loads(line)["step"] for line in (whole / "metrics.jsonl").read_text().splitlines())
        wait_for_step(whole, before + 10, process)
    finally:
        process.kill()
        process.wait(timeout=30)
    text = output.read_text()
    assert "host beta does not answer over ssh" in text
    assert "continuing without beta, on 1 of the hosts that answer: alpha" in text
    assert "2 ranks = tensor 1 x pipeline 1 x data 2" in text
    assert "1 ranks = tensor 1 x pipeline 1 x data 1" in text


KILLED = {
    "script": "^bash launch/multi_node.sh ",
    "runner": "^[^ ]*python[^ ]* [^ ]*bin/deepspeed ",
    "pdsh": "^pdsh ",
    "ssh": "^ssh .*beta",
    "launcher": "^[^ ]*python[^ ]* -u -m deepspeed.launcher.launch ",
    "rank": "^[^ ]*python[^ ]* -u -m nextlat_dist.cli ",
}


LONG: dict[str, Any] = {"parallel": {"zero_stage": 1}, "steps": 300, "save_interval": 5}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text_dataset: Path) -> Path:
    """A run that was left alone."""
    site = Site(tmp_path_factory.mktemp("whole"), text_dataset)
    output = site.configure("whole", **LONG)
    site.here("whole", 2)
    return output


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_whatever_is_killed_nothing_is_left_over_and_a_restart_is_the_same_run(
    name: str, site: Site, whole: Path
) -> None:
    """No process of the run is there after ten seconds; the same command then gives the weights of a run that was left
    alone."""
    cut = site.configure("cut", **LONG)
    text = site.on_two_hosts("-c", SURVIVE, "survive", KILLED[name], "cut", seconds=500)
    here, there = map(int, re.findall(r"^running: (\d+) and (\d+)$", text, re.MULTILINE)[0])
    assert here >= 5, text  # the runner, pdsh, ssh to a host, launcher and rank
    assert there >= 2, text  # launcher and rank
    assert "left over: 0 and 0" in text, text
    assert "ended with 0" not in text
    assert "resumed at step" in text, text
    assert "steps of this run are done" not in text, text  # it was over before anything was killed
    assert losses(cut) == losses(whole)
    final = "checkpoints/step_00000300"
    names = sorted(p.relative_to(whole) for part in ("weights", "optimizer") for p in (whole / final / part).iterdir())
    assert names
    for path in names:
        assert (whole / path).read_bytes() == (cut / path).read_bytes(), path


# On alpha: start, kill the first process of that kind (on this host, where ids are seen), count what is left of the run
# on both hosts after ten seconds, start again.
SURVIVE = r"""
source launch/processes.sh
count_processes() {
    local run=' nextlat_dist[.]cli train ' # which this script and ssh, that have it in their lines, do not match
    here="$(processes_like "$run" | wc -l)"
    there="$(ssh beta "bash -c 'source $PWD/launch/processes.sh; processes_like \"$run\"'" | wc -l)"
}
export MAX_RESTARTS=0 NEXTLAT_SKIP_DOCTOR=1
bash launch/multi_node.sh hosts "$2.yaml" &
script=$!
until grep -qs '"step": 7,' "$2/metrics.jsonl"; do kill -0 "$script" || exit 9; sleep 0.1; done
count_processes
echo "running: $here and $there"
mapfile -t found < <(processes_like "$1")
kill -KILL "${found[0]}"
status=0
wait "$script" || status=$?
echo "ended with $status"
sleep 10
count_processes
echo "left over: $here and $there"
export MAX_RESTARTS=3
exec bash launch/multi_node.sh hosts "$2.yaml"
"""


def wait_for_text(path: Path, text: str, process: subprocess.Popen[str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while text not in path.read_text():
        assert process.poll() is None, path.read_text()
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.3)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    wait_for_text(run / "metrics.jsonl", f'"step": {step},', process)
