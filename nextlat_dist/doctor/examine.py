"""`nextlat doctor`: every check in order, as a table.

    nextlat doctor                                              this host
    nextlat doctor --config run.yaml --hostfile hosts           and the disk for this run, and the hosts
    bash launch/multi_node.sh --doctor hosts run.yaml           the same checks on every host, under the launcher

Nothing is changed: what is missing is said in a sentence, with how to repair it.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

from nextlat_dist.config.rules import validate
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.doctor import hosts, machine, software
from nextlat_dist.doctor.findings import Finding, problems, table
from nextlat_dist.parallel.environment import is_first_rank, launched_number
from nextlat_dist.plan.describe import describe

MEETING = timedelta(seconds=60)


def examine(config: RunConfig | None, hostfile: Path | None, quick: bool, strict: bool = False) -> list[Finding]:
    """All findings of this host, and without `quick` of the others; `strict` is `machine.check_output_dir`'s.

    Raises:
        UserError: the hostfile is not one, or this number of ranks cannot train `config`.
    """
    world_size = launched_number("WORLD_SIZE", 1, least=1)
    names = [] if hostfile is None else list(hosts.read_hostfile(hostfile))
    if config is not None:
        ranks = sum(hosts.read_hostfile(hostfile).values()) if hostfile is not None else world_size
        if ranks > 1:
            validate(config, ranks)
    gpus = software.gpus()
    findings = [
        software.check_python(),
        *software.check_packages(),
        software.check_accelerator(gpus, quick),
        software.check_extensions(software.extension_directory()),
        machine.check_threads(),
        machine.check_open_files(),
        machine.check_shared_memory(bool(gpus)),
        *hosts.check_interfaces(os.environ, several_hosts=_under_launcher_on_several_hosts(world_size)),
    ]
    output_dir = None
    if config is not None:
        findings += [machine.check_output_dir(config, strict), machine.check_disk(config)]
        output_dir = Path(config.output_dir)
    if names:
        findings += hosts.check_programs()
    if quick:
        return findings
    if names:
        findings += hosts.check_hosts(names, output_dir)
    if world_size > 1 and "RANK" in os.environ:
        findings += hosts.check_ranks(launched_number("RANK", 0), world_size, output_dir, MEETING)
    return findings


def description(config: RunConfig, hostfile: Path | None) -> str:
    """What the run is, as `nextlat train` prints it, on the ranks of the hostfile or the launcher, or the fewest."""
    parallel = config.parallel
    ranks = (
        sum(hosts.read_hostfile(hostfile).values())
        if hostfile is not None
        else launched_number("WORLD_SIZE", 1, least=1)
    )
    return describe(config, max(ranks, parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size))


def _under_launcher_on_several_hosts(world_size: int) -> bool:
    local = launched_number("LOCAL_WORLD_SIZE", world_size, least=1)
    return world_size > launched_number("LOCAL_SIZE", local, least=1)


def shown(findings: list[Finding], quick: bool) -> list[str]:
    """What this rank shows: rank 0 the table; with `quick`, and on the first rank of another host, an `error: …` for
    each problem."""
    if not quick and is_first_rank():
        return [table(findings)]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        where = f"{socket.gethostname()}: " if "RANK" in os.environ else ""
        return [f"error: {where}{text}" for text in problems(findings)]
    return []
