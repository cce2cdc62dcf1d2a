"""Failed ranks are started again, at most MAX_RESTARTS times; what was stopped on purpose, or is a mistake, is not.

The training command is a stand-in that ends with the exit codes it is told; DeepSpeed's launcher and torchrun are real.
Command: `pytest tests/launch/test_restarts.py`.
"""

from __future__ import annotations

import json
import signal

import pytest

from tests.kit.harness import free_port
from tests.kit.launch.checkout import Project, assert_one_sentence
from tests.kit.launch.starting import add_hosts, reports, starts, stopped, wait_for

# A launcher that is the rank, for the arithmetic of restarts.
PLAIN_DEEPSPEED = """#!/bin/bash
for argument in "$@"; do
    [[ "$argument" != --hostfile=/* ]] || hostfile="${argument#*=}"
    [[ "$argument" == --*=* || "$argument" == --force_multi || "$argument" == --no_local_rank ]] || break
    shift
done
world=1
[[ "$hostfile" == /dev/null ]] || world="$(grep -c slots "$hostfile")"
[[ "$hostfile" == /dev/null ]] || awk '{print $1}' "$hostfile" | paste -sd, >>ran_on
RANK=0 LOCAL_RANK=0 WORLD_SIZE="$world" exec python -m nextlat_dist.cli "${@:3}"
"""


@pytest.fixture
def plain(project: Project) -> Project:
    project.add_real_venv()
    project.add_command("deepspeed", PLAIN_DEEPSPEED)
    # The scripts put the virtual environment first: this one's deepspeed must come after the stand-in.
    ranks = project.root / "launch/ranks.sh"
    ranks.write_text(ranks.read_text() + f'\nexport PATH="{project.root}/commands:$PATH"\n')
    return project


@pytest.mark.parametrize(
    ("codes", "most", "code", "times"),
    [
        ("1,0", "3", 0, 2),
        ("1,7,137,9", "3", 9, 4),  # three restarts, then the last code
        ("1,0", "0", 1, 1),
        ("75,75,1,75,0", "1", 0, 5),  # saved and stopped: that is no failure
        ("2", "3", 2, 1),
        ("130", "3", 130, 1),
        ("1,2", "3", 2, 2),
    ],
    ids=str,
)
def test_what_is_started_again(plain: Project, codes: str, most: str, code: int, times: int) -> None:
    result = plain.run("launch/single_node.sh", "run.yaml", f"exits={codes}", MAX_RESTARTS=most)
    assert result.returncode == code, result.stderr
    assert len(starts(plain)) == times
    assert ("giving up" in result.stderr) == (times == int(most) + 1 and code not in (0, 2, 130))


def test_every_start_has_the_same_arguments(plain: Project) -> None:
    assert plain.run("launch/single_node.sh", "run.yaml", "exits=1,0", "data.note=two words").returncode == 0
    [rank] = reports(plain, 1)
    assert rank["arguments"] == ["train", "--config", "run.yaml", "exits=1,0", "data.note=two words"]


@pytest.mark.slow
def test_restart_under_the_real_launcher(project: Project) -> None:
    project.add_real_venv()
    result = project.run("launch/single_node.sh", "run.yaml", "exits=9,0")
    assert result.returncode == 0, result.stderr
    assert starts(project) == starts(project, 1) == ["2"] * 2
    assert "restart 1 of at most 3" in result.stderr


def test_interrupt_ends_the_ranks_and_stays_so(project: Project) -> None:
    project.add_real_venv()
    process = project.start("launch/single_node.sh", "run.yaml", "wait=yes")
    wait_for([project.root / f"report.{rank}" for rank in range(2)], process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "KeyboardInterrupt" in errors, "it reached a rank, and the launcher ends the other"
    assert starts(project) == ["2"]


@pytest.mark.parametrize("wanted", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_torchrun_ranks_save_when_asked_to_stop(project: Project, wanted: signal.Signals) -> None:
    project.add_real_venv()
    process = project.start("launch/torchrun.sh", "run.yaml", "wait=yes")
    wait_for([project.root / f"report.{rank}" for rank in range(2)], process)
    process.send_signal(wanted)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert set(stopped(project)) == {"stopped.0", "stopped.1"}
    assert wanted.name in stopped(project).values()
    for number, rank in enumerate(reports(project, 2)):
        assert rank["arguments"] == ["train", "--config", "run.yaml", "wait=yes"]
        assert (rank["RANK"], rank["WORLD_SIZE"], rank["LOCAL_SIZE"]) == (str(number), "2", "2")


@pytest.mark.parametrize(("codes", "code", "times"), [("2", 2, 1), pytest.param("5,0", 0, 2, marks=pytest.mark.slow)])
def test_torchrun_passes_on_why_it_failed(project: Project, codes: str, code: int, times: int) -> None:
    project.add_real_venv()
    result = project.run("launch/torchrun.sh", "run.yaml", f"exits={codes}", NPROC="1")
    assert result.returncode == code, result.stderr
    assert len(starts(project)) == times


def test_torchrun_hosts_find_one_another(project: Project) -> None:
    project.add_real_venv()
    settings = {"NNODES": "2", "NPROC": "1", "RDZV_ENDPOINT": f"localhost:{free_port()}", "LOCAL_ADDR": "127.0.0.1"}
    both = [project.start("launch/torchrun.sh", "run.yaml", **settings) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert [rank["WORLD_SIZE"] for rank in reports(project, 2)] == ["2", "2"]


def run_on_hosts(project: Project, down: str, *arguments: str, **environment: str) -> tuple[str, list[str], int]:
    """What stderr says, the hosts of every start, and the exit code; `down` hosts go away after the first start."""
    add_hosts(project, "first", "second", "third")
    deepspeed = project.root / "commands/deepspeed"
    text = deepspeed.read_text().replace("world=1\n", f"world=1\nprintf '{down}' >down\n", 1)
    deepspeed.write_text(text)
    result = project.run("launch/multi_node.sh", "hosts", "run.yaml", *arguments, **environment)
    return result.stderr, (project.root / "ran_on").read_text().split(), result.returncode


def test_multi_node_goes_on_without_a_host_that_is_gone(plain: Project) -> None:
    errors, ran_on, code = run_on_hosts(plain, "first\\n", "exits=255,0", RANKS_THAT_FIT="1 2 3")
    assert code == 0, errors
    assert ran_on == ["first,second,third", "second,third"]
    assert "host first does not answer over ssh: ssh: connect to host first port 22: No route to host" in errors
    assert "continuing without first, on 2 of the hosts that answer: second third" in errors


def test_multi_node_leaves_out_more_where_the_batch_asks_for_it(plain: Project) -> None:
    errors, ran_on, code = run_on_hosts(plain, "second\\n", "exits=255,0", RANKS_THAT_FIT="1 3")
    assert code == 0, errors
    assert ran_on == ["first,second,third", "first"]
    assert "continuing without second, on 1 of the hosts that answer: first" in errors


def test_multi_node_stops_where_nothing_fits(plain: Project) -> None:
    errors, ran_on, code = run_on_hosts(plain, "second\\n", "exits=255,0", RANKS_THAT_FIT="3")
    assert code == 255
    assert ran_on == ["first,second,third"]
    assert "not starting again without second: error: 1 ranks do not fit" in errors


def test_multi_node_stops_when_nobody_answers(plain: Project) -> None:
    errors, ran_on, code = run_on_hosts(plain, "first\\nsecond\\nthird\\n", "exits=255,0")
    assert code == 255
    assert ran_on == ["first,second,third"]
    assert "no host of hosts answers" in errors


def test_multi_node_uses_all_hosts_again_where_all_answer(plain: Project) -> None:
    errors, ran_on, code = run_on_hosts(plain, "", "exits=255,0", RANKS_THAT_FIT="")
    assert code == 0, errors
    assert ran_on == ["first,second,third"] * 2
    assert "signal_children KILL" in (plain.root / "pdsh.log").read_text(), "ranks after a broken connection"


def test_multi_node_does_not_start_without_a_host(plain: Project) -> None:
    add_hosts(plain, "first", "second")
    (plain.root / "down").write_text("second\n")
    result = plain.run("launch/multi_node.sh", "hosts", "run.yaml")
    assert_one_sentence(result, "not every host of hosts answers", "repair second")
    assert not (plain.root / "ran_on").exists()


def test_multi_node_asked_to_stop_lets_the_ranks_finish(project: Project) -> None:
    """The ranks of every host get the signal, and not the launchers, which would grant them seconds."""
    project.add_real_venv()
    add_hosts(project, "first", "second")
    process = project.start("launch/multi_node.sh", "hosts", "run.yaml", "wait=yes", MASTER_PORT=str(free_port()))
    wait_for([project.root / f"report.{rank}" for rank in range(2)], process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert stopped(project) == {"stopped.0": "SIGTERM", "stopped.1": "SIGTERM"}


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("single_node.sh", []), ("torchrun.sh", []), ("multi_node.sh", ["hosts"])],
    ids=["single_node", "torchrun", "multi_node"],
)
def test_the_doctor_is_asked_first(plain: Project, script: str, arguments: list[str]) -> None:
    add_hosts(plain, "first")
    command = [f"launch/{script}", *arguments, "run.yaml", "training.seed=7", "--dry-run"]
    result = plain.run(*command, DOCTOR_SAYS="1")
    assert result.returncode == 2
    assert "NEXTLAT_SKIP_DOCTOR=1" in result.stderr
    asked = json.loads((plain.root / "doctor.json").read_text())
    assert asked == ["--quick", "--config", "run.yaml", "training.seed=7"]
    assert not list(plain.root.glob("starts.*"))


def test_the_doctor_of_a_host_that_joins_knows_the_run(plain: Project) -> None:
    """To the doctor the run's ranks on another host are the same run, which this host may join."""
    settings = {"NNODES": "1:2", "RDZV_ENDPOINT": "first:29400", "NPROC": "1", "DOCTOR_SAYS": "1"}
    assert plain.run("launch/torchrun.sh", "run.yaml", **settings).returncode == 2
    assert (plain.root / "doctor.launch").read_text() == "torchrun-first:29400-nextlat"
    assert plain.run("launch/torchrun.sh", "run.yaml", RDZV_ID="seven", **settings).returncode == 2
    assert (plain.root / "doctor.launch").read_text() == "torchrun-first:29400-seven"


def test_the_doctor_can_be_skipped(project: Project) -> None:
    project.add_real_venv()
    skipped = project.run("launch/single_node.sh", "run.yaml", "watched=yes", DOCTOR_SAYS="1", NEXTLAT_SKIP_DOCTOR="1")
    assert skipped.returncode == 0, skipped.stderr
    assert not (project.root / "doctor.json").exists()


def test_the_doctor_can_be_started_everywhere(plain: Project) -> None:
    everywhere = plain.run("launch/single_node.sh", "--doctor", "run.yaml", "exits=1,0")
    assert everywhere.returncode == 1, "an answer, which is not asked for again"
    assert reports(plain, 1)[0]["arguments"] == ["doctor", "--config", "run.yaml", "exits=1,0"]
    assert len(starts(plain)) == 1
