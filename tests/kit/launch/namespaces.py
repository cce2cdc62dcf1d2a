"""Two hosts that are network namespaces of this machine, with ssh between them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.kit.launch.checkout import CHECKOUT
from tests.kit.training.runs import training_config

NAMESPACES = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
NEEDED = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "/usr/sbin/sshd", "pdsh")


def why_not() -> str:
    """Why there cannot be two hosts here; empty when there can."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    probe = "mount -t tmpfs none /run && mkdir /run/netns && ip netns add a && ip -n a link add x type veth peer name y"
    result = subprocess.run([*NAMESPACES, "sh", "-c", probe], capture_output=True, text=True, check=False)
    return f"no privileges for namespaces: {result.stderr.strip()}" if result.returncode else ""


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
        """The output directory of run `name`, and its config next to it."""
        output = self.root / name
        raw = training_config(
            output, self._dataset, parallel, {"train_tokens": steps * 4 * 48, "validation_batches": 0}
        )
        raw["checkpoint"] = {"save_interval": save_interval, "keep_last": 2}
        output.with_suffix(".yaml").write_text(yaml.safe_dump(raw))
        return output

    def here(self, name: str, ranks: int) -> None:
        """Run `name` on this machine."""
        with self.running_here(name, ranks) as process:
            code = process.wait(timeout=300)
        assert code == 0, (self.root / "output.txt").read_text()

    @contextmanager
    def running_here(
        self, name: str, ranks: int, script: str = "single_node.sh", **environment: str
    ) -> Iterator[subprocess.Popen[str]]:
        """Run `name` on this machine, until the block is left at the latest; what it says is added to `output.txt`."""
        settings = {"NPROC": str(ranks), "RESTART_SECONDS": "0", **environment}
        process = self._start(["bash", f"launch/{script}", f"{name}.yaml"], settings)
        try:
            yield process
        finally:
            process.kill()
            process.wait(timeout=30)

    def _start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.root,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.root), **environment},
            stdin=subprocess.DEVNULL,
            stdout=(self.root / "output.txt").open("a"),
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start_on_two_hosts(self, *command: str) -> subprocess.Popen[str]:
        """Start `command` on alpha, in the project."""
        keys = self.root / "keys"
        keys.mkdir()
        arguments = [
            *NAMESPACES,
            "bash",
            str(CHECKOUT / "tests" / "launch" / "two_hosts.sh"),
            str(keys),
            "bash",
            *command,
        ]
        (self.root / "output.txt").unlink(missing_ok=True)
        return self._start(arguments, {"RESTART_SECONDS": "0"})

    def on_two_hosts(self, *command: str, seconds: float = 300) -> str:
        """What `command` says; it must end well."""
        process = self.start_on_two_hosts(*command)
        try:
            code = process.wait(timeout=seconds)
        finally:
            process.kill()
        output = (self.root / "output.txt").read_text()
        assert code == 0, output
        return output
