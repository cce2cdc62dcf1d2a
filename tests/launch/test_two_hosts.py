"""launch/multi_node.sh on two real hosts: ssh, pdsh, DeepSpeed's launcher and gloo over a network.

The hosts are namespaces of this machine (two_hosts.sh); the training is the real one, on real text.
Command: `pytest tests/launch/test_two_hosts.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.conftest import CHECKOUT
from tests.training.state.test_resume import logged, training_config

NAMESPACES = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
NEEDED = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "/usr/sbin/sshd", "pdsh", "pgrep", "pkill")


def why_not() -> str:
    """Why there cannot be two hosts here; empty when there can."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    probe = "mount -t tmpfs none /run && mkdir /run/netns && ip netns add a && ip -n a link add x type veth peer name y"
    result = subprocess.run([*NAMESPACES, "sh", "-c", probe], capture_output=True, text=True, check=False)
    return f"no privileges for namespaces: {result.stderr.strip()}" if result.returncode else ""


NO_HOSTS = why_not()
pytestmark = pytest.mark.skipif(bool(NO_HOSTS), reason=NO_HOSTS)


class Site:
    """A project that both hosts see, and runs of it."""

    def __init__(self, root: Path, dataset: Path) -> None:
        self.root, self._dataset = root, dataset
        shutil.copytree(CHECKOUT / "launch", root / "launch")
        (root / ".venv").symlink_to(sys.prefix)
        (root / "nextlat_dist").symlink_to(CHECKOUT / "nextlat_dist")
        (root / "hosts").write_text("alpha slots=1\nbeta slots=1\n")
        (root / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n")

    def configure(self, name: str, parallel: dict[str, Any], steps: int, save_interval: int = 0) -> Path:
        """The output directory of run `name`, and its config beside it."""
        output = self.root / name
        raw = training_config(
            output, self._dataset, parallel, {"train_tokens": steps * 4 * 48, "validation_batches": 0}
        )
        raw["checkpoint"] = {"save_interval": save_interval, "keep_last": 2}
        output.with_suffix(".yaml").write_text(yaml.safe_dump(raw))
        return output

    def here(self, name: str, ranks: int) -> None:
        """Run `name` on this machine."""
        command = ["bash", "launch/single_node.sh", f"{name}.yaml"]
        environment = {"NPROC": str(ranks), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.root)}
        subprocess.run(command, cwd=self.root, env=environment, check=True, capture_output=True, timeout=300)

    def start_on_two_hosts(self, *command: str) -> subprocess.Popen[str]:
        """Start `command` on alpha, in the project."""
        keys = self.root / "keys"
        keys.mkdir()
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.root), "RESTART_SECONDS": "0"}
        arguments = [*NAMESPACES, "bash", str(Path(__file__).with_name("two_hosts.sh")), str(keys), "bash", *command]
        return subprocess.Popen(
            arguments,
            cwd=self.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=(self.root / "output.txt").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )

    def on_two_hosts(self, *command: str) -> str:
        """What `command` says; it must end well."""
        process = self.start_on_two_hosts(*command)
        try:
            code = process.wait(timeout=300)
        finally:
            process.kill()
        output = (self.root / "output.txt").read_text()
        assert code == 0, output
        return output


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
    """Its plug is pulled: no process says goodbye. The other host goes on from the last checkpoint."""
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
    assert "going on without beta, on 1 of the hosts that answer: alpha" in text
    assert "2 ranks = tensor 1 x pipeline 1 x data 2" in text
    assert "1 ranks = tensor 1 x pipeline 1 x data 1" in text


def wait_for_text(path: Path, text: str, process: subprocess.Popen[str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while text not in path.read_text():
        assert process.poll() is None, path.read_text()
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.3)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    wait_for_text(run / "metrics.jsonl", f'"step": {step},', process)
