"""One rank of a training run that is killed before its n-th durable operation or optimizer step.

    python -m tests.kit.fault_rank OPERATION_NUMBER CONFIG     (0: never)

The operations are those of a commit and of a step, in the order in which this rank does them; the kill is SIGKILL.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any


def install(number: int) -> None:
    """Kill this process before its `number`-th operation, and say which one that is."""
    from nextlat_dist.checkpoint import commit, tensors, writer
    from nextlat_dist.training.engine.deepspeed_engine import DeepSpeedEngine as Engine

    lock = threading.Lock()
    done = 0

    def guarded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            with lock:
                done += 1
                if done == number:
                    print(f"killed before {name}", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return operation

    places: list[tuple[Any, str]] = [
        (Engine, "train_step"),
        (tensors, "save_file"),
        (os, "fsync"),
        (commit, "write_durably"),
        (os, "rename"),
        (os, "replace"),
        (writer, "prune"),
        (writer.CheckpointWriter, "save"),
    ]
    for owner, name in places:
        setattr(owner, name, guarded(name, getattr(owner, name)))


def main() -> int:
    from nextlat_dist.parallel.device import quiet_third_parties, use_cpu_where_no_cuda

    use_cpu_where_no_cuda()
    quiet_third_parties()
    install(int(sys.argv[1]))
    from nextlat_dist import cli

    return cli.main(["train", "--config", sys.argv[2]])


if __name__ == "__main__":
    sys.exit(main())
