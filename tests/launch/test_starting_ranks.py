"""Every launch script starts the right ranks with the right settings, and stops them in order.

DeepSpeed's launcher is the real one; the training command is a stand-in that reports what it was given. pdsh, ssh and
Slurm are stand-ins that run the remote command here, in an environment as bare as that of a login over ssh.
Command: `pytest tests/launch/test_starting_ranks.py`.
"""

import contextlib
import shutil
import signal
import subprocess
import time

import psutil
import pytest

from tests.kit.launch.checkout import Project
from tests.kit.launch.starting import add_hosts, reports, starts, stopped, wait_for

# A list of nodes longer than a pipe's buffer: whoever reads only its first line must not end the writer's pipeline.
SCONTROL = """#!/bin/bash
echo "$*" >>scontrol.log
case "$*" in
    "show hostnames"*) seq -f node%.0f 7 20000 ;;
    "show job"*) echo "JobState=${JOB_STATE:-RUNNING}" ;;
esac
"""
# srun OPTION… bash -c TEXT rank …: two tasks on two nodes.
SRUN = """#!/bin/bash
echo "$*" >srun.log
while [[ "$1" == -* ]]; do shift; done
export SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_NNODES=2
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
trap 'kill -USR1 $first $second' USR1
trap 'kill -TERM $first $second' TERM
wait -n; status=$?
wait $first || status=$?
wait $second || status=$?
exit $status
"""


def end_everything(process: subprocess.Popen[str]) -> None:
    """Kill the script and all that it started, as Slurm does: ranks are in process groups of their own."""
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # the first ones' end may be the next one's
            child.kill()
    process.kill()
    process.communicate(timeout=30)


def test_single_node_starts_two_cpu_ranks(project: Project) -> None:
    project.add_real_venv()
    result = project.run("launch/single_node.sh", "run.yaml", "training.seed=7", "data.note=two words")
    assert result.returncode == 0, result.stderr
    ranks = reports(project, 2)
    for number, rank in enumerate(ranks):
        assert rank["arguments"] == ["train", "--config", "run.yaml", "training.seed=7", "data.note=two words"]
        assert (rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) == (str(number), str(number), "2")
        assert rank["DS_ACCELERATOR"] == "cpu"
        assert rank["OMP_NUM_THREADS"] == "1"
        assert rank["TORCH_EXTENSIONS_DIR"] == str(project.root / ".venv/torch_extensions")
        assert str(project.root / ".venv/bin") in rank["PATH"].split(":"), "just-in-time builds look for ninja"
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]


def test_single_node_returns_the_exit_code_of_a_rank(project: Project) -> None:
    project.add_real_venv()
    result = project.run(
        "launch/single_node.sh", "run.yaml", "exits=3", NPROC="1", MASTER_PORT="29876", MAX_RESTARTS="0"
    )
    assert result.returncode == 3, result.stderr
    assert reports(project, 1)[0]["MASTER_PORT"] == "29876"


def test_single_node_asked_to_stop_lets_the_ranks_finish(project: Project) -> None:
    """Only the script gets the signal; it ends when both ranks have stopped in their own time."""
    project.add_real_venv()
    process = project.start("launch/single_node.sh", "run.yaml", "wait=yes")
    wait_for([project.root / f"report.{rank}" for rank in range(2)], process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert stopped(project) == {"stopped.0": "SIGTERM", "stopped.1": "SIGTERM"}
    assert starts(project) == ["2"], "a run that was asked to stop stays so"
    process.communicate()


@pytest.mark.parametrize("ranks", ["", "4"])
def test_single_node_on_gpus_leaves_the_number_to_deepspeed(project: Project, ranks: str) -> None:
    project.add_command("nvidia-smi", "#!/bin/sh\necho 'GPU 0: something'\n")
    project.add_command("python", "#!/bin/sh\necho 29000\n", folder=".venv/bin")
    project.add_command("deepspeed", '#!/bin/sh\necho "$DS_ACCELERATOR" "$@"\n', folder=".venv/bin")
    result = project.run("launch/single_node.sh", "run.yaml", **({"NPROC": ranks} if ranks else {}))
    assert result.returncode == 0, result.stderr
    assert ("--num_gpus=4" in result.stdout) == bool(ranks)
    assert "--num_gpus=2" not in result.stdout
    assert not result.stdout.startswith("cpu")


def test_multi_node_starts_a_rank_per_host(project: Project) -> None:
    project.add_real_venv()
    add_hosts(project, "first", "second")
    (project.root / ".deepspeed_env").write_text("# interface between the hosts\nGLOO_SOCKET_IFNAME=veth0\n\n")
    odd = ["a=it's", "b=50%n", "c=x;touch pwned", 'd={"e": [1, 2]}', 'f=$HOME `id` "q" 5%n \\ &', "g=#1"]
    result = project.run("launch/multi_node.sh", "hosts", "run.yaml", "training.seed=7", *odd, OMP_NUM_THREADS="3")
    assert result.returncode == 0, result.stderr
    for number, rank in enumerate(reports(project, 2)):
        assert rank["arguments"] == ["train", "--config", "run.yaml", "training.seed=7", *odd]
        assert (rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) == (str(number), "0", "2")
        assert (rank["MASTER_ADDR"], rank["MASTER_PORT"]) == ("127.0.0.1", "29500")
        assert (rank["DS_ACCELERATOR"], rank["OMP_NUM_THREADS"], rank["GLOO_SOCKET_IFNAME"]) == ("cpu", "3", "veth0")
        assert rank["TORCH_EXTENSIONS_DIR"] == str(project.root / ".venv/torch_extensions")
        assert str(project.root / ".venv/bin") in rank["PATH"].split(":")


def test_multi_node_with_one_host_still_goes_there(project: Project) -> None:
    add_hosts(project, "first")
    project.add_command("python", "#!/bin/sh\n", folder=".venv/bin")
    text = '#!/bin/sh\nfor a in "$@"; do case $a in --hostfile=*) cat "${a#*=}" ;; esac; done; echo "$@"\n'
    project.add_command("deepspeed", text, folder=".venv/bin")
    result = project.run("launch/multi_node.sh", "hosts", "run.yaml", MASTER_ADDR="10.0.0.1", MASTER_PORT="29876")
    assert result.stdout.splitlines()[0] == "first slots=1"
    for option in ("--force_multi", "--master_addr=10.0.0.1", "--master_port=29876"):
        assert option in result.stdout.split()


def start_slurm_job(project: Project, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    project.add_real_venv()
    project.add_command("scontrol", SCONTROL)
    project.add_command("srun", SRUN)
    spooled = project.root / "spool/job"  # Slurm runs a copy from elsewhere
    spooled.parent.mkdir()
    shutil.copy(project.root / "launch/slurm.sbatch", spooled)
    job = {"SLURM_JOB_ID": "10042", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_SUBMIT_DIR": str(project.root)}
    return project.start(str(spooled), "run.yaml", *arguments, **job, **environment)


def test_slurm_tells_every_task_its_rank(project: Project) -> None:
    process = start_slurm_job(project, "training.seed=7", "data.note=two words", "watched=yes")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    for number, rank in enumerate(reports(project, 2)):
        assert rank["arguments"] == [
            "train",
            "--config",
            "run.yaml",
            "training.seed=7",
            "data.note=two words",
            "watched=yes",
        ]
        assert (rank["NEXTLAT_LAUNCH"], rank["NEXTLAT_LAUNCHER"]) == ("slurm--10042", None), "its parent is Slurm's"
        assert (rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) == (str(number), "0", "2")
        assert (rank["LOCAL_SIZE"], rank["MASTER_ADDR"], rank["MASTER_PORT"]) == ("1", "node7", "20042")
    assert "--wait=30" in (project.root / "srun.log").read_text(), "a failed rank ends the others"


def test_slurm_returns_the_exit_code_of_a_rank(project: Project) -> None:
    process = start_slurm_job(project, "exits=3", MAX_RESTARTS="1")
    process.communicate(timeout=60)
    assert process.returncode == 3
    assert len(starts(project)) == 2, "restarted inside the job"
    assert "requeue" not in (project.root / "scontrol.log").read_text()


def test_slurm_saves_and_requeues_before_the_time_limit(project: Project) -> None:
    process = start_slurm_job(project, "wait=yes")
    wait_for([project.root / f"report.{rank}" for rank in range(2)], process)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert stopped(project) == {"stopped.0": "SIGUSR1", "stopped.1": "SIGUSR1"}
    assert (project.root / "scontrol.log").read_text().splitlines()[-1] == "requeue 10042"


def test_slurm_requeues_when_the_ranks_take_too_long(project: Project) -> None:
    process = start_slurm_job(project, "wait=yes", "deaf=yes", SAVE_SECONDS="1")
    wait_for([project.root / f"report.{rank}" for rank in range(2)], process)
    process.send_signal(signal.SIGUSR1)
    log, deadline = project.root / "scontrol.log", time.monotonic() + 30
    while "requeue 10042" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "requeue 10042" in log.read_text()
    assert process.poll() is None, "the ranks run until Slurm ends them"
    end_everything(process)


def test_slurm_requeues_what_was_preempted(project: Project) -> None:
    process = start_slurm_job(project, "exits=75")
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert (project.root / "scontrol.log").read_text().splitlines()[-1] == "requeue 10042"
    assert len(starts(project)) == 1, "not run on in a job that is about to go"


def test_slurm_leaves_a_cancelled_job_alone(project: Project) -> None:
    process = start_slurm_job(project, "exits=75", JOB_STATE="CANCELLED")
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert "requeue" not in (project.root / "scontrol.log").read_text()
