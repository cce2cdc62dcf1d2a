"""The doctor on this host: every problem is found and said in a sentence that names what to change.

Command: `pytest tests/doctor/test_this_host.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from nextlat_dist import cli
from nextlat_dist.checkpoint.run_lock import take_lock
from nextlat_dist.config.load import load_config
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.doctor import machine, software
from nextlat_dist.doctor.findings import Finding
from nextlat_dist.files import RUN_LOCK_FILE
from tests.kit.findings import add_command, assert_problem


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(None, [f"output_dir={tmp_path / 'runs/a'}"])


def test_packages_in_range_outside_and_missing(tmp_path: Path) -> None:
    version = metadata.version("numpy")
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"# the tested set\nnumpy=={version}\npyyaml==0.1\n")
    assert [f.level for f in software.check_packages(["numpy>=1"], constraints)] == ["ok"]
    [finding] = software.check_packages(["numpy>=1,<1.5"], constraints)
    assert_problem(finding, f"numpy {version} is installed", "numpy<1.5,>=1", "launch/setup.sh")
    [finding] = software.check_packages(["no-such-package>=3"], constraints)
    assert_problem(finding, "no-such-package is not installed", "no-such-package>=3")
    [finding] = software.check_packages(["pyyaml>=6"], constraints)
    assert finding.level == "note"
    assert "(tested: 0.1)" in finding.text
    unwanted = ["no-such-package; extra == 'dev'", "other-package; python_version < '3'"]
    assert [f.level for f in software.check_packages(unwanted, tmp_path / "none")] == ["ok"]


def test_packages_that_run_this_are_in_range() -> None:
    assert not [f for f in [software.check_python(), *software.check_packages()] if f.level == "problem"]


def test_gpus_need_a_torch_that_was_built_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "#!/bin/sh\necho 'GPU 0: Some Name (UUID: GPU-1)'\necho 'GPU 1: Some Name (UUID: GPU-2)'\n"
    add_command(tmp_path / "bin", "nvidia-smi", listing)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert software.gpus() == ["GPU 0: Some Name", "GPU 1: Some Name"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert software.gpus() == []
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0+cpu")
    finding = software.check_accelerator(["GPU 0: Some Name"], quick=True)
    assert_problem(finding, "1 GPU,", "2.13.0+cpu", "CUDA_VISIBLE_DEVICES=''")
    assert software.check_accelerator([], quick=True).level == "ok"
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0+cu130")
    assert software.check_accelerator(["GPU 0: Some Name"], quick=True).level == "ok"


def test_extensions(tmp_path: Path) -> None:
    assert software.check_extensions(tmp_path / "none").level == "ok"
    lock = tmp_path / "some_op/lock"
    lock.parent.mkdir()
    assert software.check_extensions(tmp_path).level == "ok"
    with lock.open("w"):
        os.utime(lock, (0, 0))
        assert software.check_extensions(tmp_path).level == "note"
    lock.touch()  # by a process that is not seen from here, perhaps
    assert "another process holds" in software.check_extensions(tmp_path).text
    os.utime(lock, (0, 0))
    assert_problem(software.check_extensions(tmp_path), str(lock), "delete it")


def test_an_output_directory_in_use(config: RunConfig) -> None:
    output = Path(config.output_dir)
    output.mkdir(parents=True)
    lock = take_lock(output)
    assert_problem(machine.check_output_dir(config), f"pid {os.getpid()}", "in use by the run on host", "output_dir")
    lock.release()
    assert machine.check_output_dir(config).level == "ok"


def left_by_another_machine(output: Path) -> None:
    output.mkdir(parents=True)
    lock = take_lock(output, beat_seconds=1000)
    left = {**json.loads((output / RUN_LOCK_FILE).read_text()), "machine": "of another boot", "host": "elsewhere"}
    lock.release()
    (output / RUN_LOCK_FILE).write_text(json.dumps(left))


def test_a_run_that_may_be_dead_is_no_problem_to_a_run_that_waits(config: RunConfig) -> None:
    """A container that was killed and started again within a minute takes its own lock over."""
    output = Path(config.output_dir)
    left_by_another_machine(output)
    finding = machine.check_output_dir(config)
    assert finding.level == "note", finding
    assert "in use by the run on host elsewhere" in finding.text
    assert "training waits" in finding.text
    assert_problem(machine.check_output_dir(config, strict=True), "in use by the run on host elsewhere", "60 s")
    os.utime(output / RUN_LOCK_FILE, (0, 0))
    assert machine.check_output_dir(config, strict=True).level == "ok"


def test_who_would_remove_the_folder_asks_strictly(
    config: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    left_by_another_machine(Path(config.output_dir))
    command = ["doctor", "--quick", "--config", "configs/quickstart.yaml", f"output_dir={config.output_dir}"]
    with contextlib.suppress(SystemExit):  # this host may lack something
        cli.main(command)
    assert "in use" not in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        cli.main([*command, "--strict"])
    assert "in use by the run on host elsewhere" in capsys.readouterr().err


def test_room_for_checkpoints(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = machine.checkpoint_bytes(config)

    def with_free(free: int) -> Finding:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, free))
        return machine.check_disk(config)

    assert config.checkpoint.keep_last == 2
    assert with_free(3 * size).level == "ok"
    assert_problem(with_free(3 * size - 1), str(tmp_path), "checkpoint.keep_last=2", "output_dir")
    for step in range(2):  # they have taken their room already
        (tmp_path / f"runs/a/checkpoints/step_{step:08d}").mkdir(parents=True)
    assert with_free(size).level == "ok"
    assert_problem(with_free(size - 1))


def test_estimate_is_what_a_checkpoint_takes() -> None:
    """Of the paper's model: 12 bytes for each of 1.40 billion parameters."""
    paper = load_config(Path(__file__).parents[2] / "configs/fineweb_edu_1p3b.yaml")
    assert machine.checkpoint_bytes(paper) == pytest.approx(12 * 1.40e9, rel=0.01)


def test_output_directory(config: RunConfig, tmp_path: Path) -> None:
    assert machine.check_output_dir(config).level == "ok"
    assert list(tmp_path.iterdir()) == [], "nothing is left"
    config.output_dir = "/proc/runs/a"  # where even root makes no file
    assert_problem(machine.check_output_dir(config), "output_dir=/proc/runs/a", "/proc")


def test_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1023, 4096))
    assert_problem(machine.check_open_files(), "1023", "ulimit -n 1024")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, 0))
    assert machine.check_open_files().level == "ok"
    missing = tmp_path / "none"
    assert_problem(machine.check_shared_memory(True, missing), "0 GB", "--shm-size")
    assert machine.check_shared_memory(False, missing).level == "note"
    assert machine.check_shared_memory(True, Path("/")).level == "ok"


@pytest.mark.parametrize(("value", "level"), [(None, "note"), ("4", "ok"), ("0", "problem"), ("all", "problem")])
def test_threads(value: str | None, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert machine.check_threads().level == level


def test_command_prints_a_table_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "deepspeed_shm_comm").mkdir()
    monkeypatch.setenv("CXX", "sh")
    report = tmp_path / "report.json"
    assert cli.main(["doctor", "--json", str(report)]) == 0
    output = capsys.readouterr()
    assert "OK       python " in output.out
    content = json.loads(report.read_text())
    assert content["summary"]["problem"] == 0
    assert len(content["rows"]) == sum(content["summary"].values()) == len(output.out.splitlines())
    # The same with a problem.
    (tmp_path / "deepspeed_shm_comm/lock").touch()
    os.utime(tmp_path / "deepspeed_shm_comm/lock", (0, 0))
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    assert ended.value.code == 1
    assert "PROBLEM  extensions" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--quick"])
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1


def test_a_run_is_described_as_train_describes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: {tmp_path / 'run'}\nparallel: {{tensor_model_parallel_size: 2}}\n")
    cli.main(["train", "--config", str(config), "--dry-run"])
    described = capsys.readouterr().out.split("\nstage 0 ")[0]
    assert "layout      2 ranks = tensor 2 x pipeline 1 x data 1" in described
    with contextlib.suppress(SystemExit):  # this host may lack something
        cli.main(["doctor", "--config", str(config)])
    assert capsys.readouterr().out.startswith(f"{described}\n\n")


def test_a_mistake_in_the_config_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--config", "no-such.yaml"]) == 2
    assert "no-such.yaml" in capsys.readouterr().err


def test_quick_form_imports_no_torch() -> None:
    code = "import sys; from nextlat_dist.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "CXX": "sh", "OMP_NUM_THREADS": "1"}
    quick = [sys.executable, "-c", code, "doctor", "--quick", "--config", "configs/quickstart.yaml"]
    assert subprocess.run(quick, env=environment, cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_a_base_install_is_told_what_training_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra's own packages count, those of the tests do not."""
    declared = ["numpy>=1", "no-such-engine>=3; extra == 'train'", "no-such-checker; extra == 'dev'"]
    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    problems = [finding for finding in software.check_packages() if finding.level == "problem"]
    assert_problem(problems[0], "no-such-engine is not installed", "pip install 'nextlat-dist[train]'")
    assert len(problems) == 1
