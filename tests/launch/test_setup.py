"""Set-up installs once and repeats nothing.

The virtual environments are real; pip in them is a stand-in that keeps a log.
Command: `pytest tests/launch/test_setup.py`.
"""

import fcntl
import subprocess
import sys

import pytest

from tests.kit.launch.checkout import Project, assert_one_sentence

STAND_IN_PIP = """
import os, pathlib, sys
root = pathlib.Path(sys.prefix).parent
if "--version" not in sys.argv:
    with (root / "calls.log").open("a") as log:
        print("pip", *sys.argv[1:], file=log)
    sys.exit(1 if (root / "pip_fails").exists() else 0)
"""
# Makes a virtual environment without pip and puts the stand-ins in.
STAND_IN_PYTHON = f"""#!{sys.executable}
import pathlib, subprocess, sys
arguments = sys.argv[1:]
subprocess.run([{sys.executable!r}, *arguments, *(["--without-pip"] if "venv" in arguments else [])], check=True)
if "venv" in arguments:
    site = next(pathlib.Path(arguments[-1]).glob("lib/python3*/site-packages"))
    (site / "pip").mkdir()
    (site / "pip/__main__.py").write_text({STAND_IN_PIP!r})
"""


@pytest.fixture
def fresh(project: Project) -> Project:
    project.environment["PYTHON"] = str(project.add_command("stand-in-python", STAND_IN_PYTHON))
    return project


def calls(project: Project) -> list[str]:
    log = project.root / "calls.log"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def test_second_call_does_nothing(fresh: Project) -> None:
    first = fresh.run("launch/setup.sh")
    assert first.returncode == 0, first.stderr
    assert calls(fresh) == ["pip", "pip"]
    log = (fresh.root / "calls.log").read_text()
    assert "install torch==" in log
    assert "+cpu -c launch/constraints.txt" in log
    assert "install -c launch/constraints.txt -e .[train]" in log

    second = fresh.run("launch/setup.sh")
    assert second.returncode == 0
    assert "===" not in second.stdout, "no step, so no headline"
    assert calls(fresh) == ["pip", "pip"]


def test_what_the_tests_need_is_added_and_stays(fresh: Project) -> None:
    fresh.run("launch/setup.sh")
    assert fresh.run("launch/setup.sh", "--dev").returncode == 0
    installs = [line for line in (fresh.root / "calls.log").read_text().splitlines() if " -e " in line]
    assert [line.split()[-1] for line in installs] == [".[train]", ".[dev]"]
    assert "===" not in fresh.run("launch/setup.sh").stdout, "the tests' packages are there, training's with them"
    assert "===" not in fresh.run("launch/setup.sh", "--dev").stdout
    with (fresh.root / "launch/constraints.txt").open("a") as constraints:
        constraints.write("another==1.0\n")
    fresh.run("launch/setup.sh")
    assert (fresh.root / "calls.log").read_text().splitlines()[-1].endswith(" .[dev]"), "kept in step with the rest"


def test_changed_constraints_install_again(fresh: Project) -> None:
    fresh.run("launch/setup.sh")
    with (fresh.root / "launch/constraints.txt").open("a") as constraints:
        constraints.write("another==1.0\n")
    assert fresh.run("launch/setup.sh").returncode == 0
    assert calls(fresh) == ["pip", "pip"] * 2


def test_failed_install_is_not_taken_for_done(fresh: Project) -> None:
    (fresh.root / "pip_fails").touch()
    assert_one_sentence(fresh.run("launch/setup.sh"), "pip could not install", "constraints.txt")
    (fresh.root / "pip_fails").unlink()
    (fresh.root / "calls.log").unlink()
    assert fresh.run("launch/setup.sh").returncode == 0
    assert calls(fresh) == ["pip", "pip"]


def test_no_cpu_torch_is_said_and_survived(fresh: Project) -> None:
    fresh.run("launch/setup.sh")
    pip = next((fresh.root / ".venv").glob("lib/python3*/site-packages/pip/__main__.py"))
    pip.write_text(pip.read_text().replace("1 if", "1 if any('+cpu' in a for a in sys.argv) or"))
    (fresh.root / ".venv/setup.stamp").unlink()
    result = fresh.run("launch/setup.sh")
    assert result.returncode == 0
    assert "note: pip found no CPU build of torch" in result.stdout


def test_gpu_machine_takes_the_default_torch(fresh: Project) -> None:
    fresh.add_command("nvidia-smi", "#!/bin/sh\necho 'GPU 0: something'\n")
    assert fresh.run("launch/setup.sh").returncode == 0
    assert calls(fresh) == ["pip"]


def test_hidden_gpus_count_as_none(fresh: Project) -> None:
    fresh.add_command("nvidia-smi", "#!/bin/sh\necho 'GPU 0: something'\n")
    assert fresh.run("launch/setup.sh", CUDA_VISIBLE_DEVICES="").returncode == 0
    assert calls(fresh) == ["pip", "pip"]


def test_second_set_up_waits_for_the_first(fresh: Project) -> None:
    fresh.run("launch/setup.sh")
    with (fresh.root / ".cache/setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = fresh.start("launch/setup.sh")
        assert waiting.stdout is not None
        assert "another set-up of this project is running" in waiting.stdout.readline()
        assert waiting.poll() is None
    output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    assert "up to date" in output


def test_scripts_copied_from_a_wheel_use_its_environment(project: Project) -> None:
    (project.root / "pyproject.toml").unlink()
    commands = f"{project.root}/commands:/usr/bin:/bin"
    assert_one_sentence(project.run("launch/setup.sh", PATH=commands), "no virtual environment")
    for name in ("nextlat", "python"):
        project.add_command(name, "#!/bin/sh\n", folder="elsewhere/bin")
    result = project.run("launch/setup.sh", PATH=f"{project.root}/elsewhere/bin:{commands}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"of {project.root}/elsewhere\n")
    assert not (project.root / ".venv").exists()


@pytest.mark.parametrize("version", ["2.7", "3.10"])
def test_old_python(project: Project, version: str) -> None:
    old = project.add_command("old-python", f"#!/bin/sh\necho {version}\n")
    result = project.run("launch/setup.sh", PYTHON=str(old))
    assert_one_sentence(result, f"Python {version}", "3.11 or newer", "PYTHON")
    assert not (project.root / ".venv").exists()


def test_missing_python(project: Project) -> None:
    assert_one_sentence(
        project.run("launch/setup.sh", PYTHON="no-such-python"), "no-such-python does not run", "PYTHON"
    )


def test_no_venv_module(project: Project) -> None:
    python = project.add_command("bare-python", '#!/bin/sh\n[ "$1" = -c ] && echo 3.11 || exit 1\n')
    result = project.run("launch/setup.sh", PYTHON=str(python))
    assert_one_sentence(result, "cannot create", "python3-venv")


def test_no_compiler_is_needed(fresh: Project) -> None:
    """Training loads no extension, so none is built."""
    assert fresh.run("launch/setup.sh", CXX="no-such-compiler").returncode == 0
    assert not (fresh.root / ".venv/torch_extensions").exists()


def test_broken_venv_is_made_again(fresh: Project) -> None:
    fresh.run("launch/setup.sh")
    (fresh.root / ".venv/bin/python").unlink()
    (fresh.root / ".venv/bin/python").symlink_to("/nowhere/python")
    result: subprocess.CompletedProcess[str] = fresh.run("launch/setup.sh")
    assert result.returncode == 0, result.stderr
    assert calls(fresh) == ["pip", "pip"] * 2
