"""Steps with real processes: what is kept, what is run again, what is removed, and what failed."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from nextlat_dist.experiments import processes
from nextlat_dist.experiments.processes import Processes, locked
from nextlat_dist.experiments.steps import Step, StepFailed, is_done, run_step, stamp


def run(step: Step, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory) as lock:
        run_step(step, directory, Processes(lock, 1))


def python(code: str, key: str = "k", *outputs: Path, resumes: bool = False) -> Step:
    return Step("step", (sys.executable, "-c", code), key, outputs, resumes=resumes)


def test_a_finished_step_has_a_stamp_and_a_failed_one_a_log(tmp_path: Path) -> None:
    run(python("print('done')"), tmp_path)
    found = stamp(tmp_path, python(""))
    assert found is not None
    assert found["seconds"] > 0
    assert not is_done(tmp_path, python("", key="another"))
    with pytest.raises(StepFailed, match=r"^step ended with status 3: why$") as caught:
        run(python("import sys; print('why'); sys.exit(3)", key="next"), tmp_path)
    assert caught.value.log.read_text() == "done\nwhy\n"
    assert not is_done(tmp_path, python("", key="next"))


def test_stdout_can_be_kept_apart(tmp_path: Path) -> None:
    code = "import sys; print('table'); print('progress', file=sys.stderr)"
    step = replace(python(code), stdout=tmp_path / "step.txt")
    run(step, tmp_path)
    assert (tmp_path / "step.txt").read_text() == "table\n"
    assert (tmp_path / "step.log").read_text() == "progress\n"


def test_the_progress_of_a_running_step_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "WATCH_SECONDS", 0.05)
    directory = tmp_path / "variant" / "seed-0"
    stop = tmp_path / "stop"
    code = f"""
import pathlib, time
print("step 1/2  ETA 9s", flush=True)
while not pathlib.Path({str(stop)!r}).exists():
    time.sleep(0.01)
"""
    timer = threading.Timer(1.5, stop.touch)
    timer.start()
    run(python(code), directory)
    assert capfd.readouterr().err == "variant/seed-0 step: step 1/2  ETA 9s\n"


def test_a_step_is_done_only_with_its_outputs(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(StepFailed, match=rf"^step ended without writing {output}: it said nothing$"):
        run(python("", "k", output), tmp_path)
    write = python(f"open({str(output)!r}, 'x').close()", "k", output)
    run(write, tmp_path)
    assert is_done(tmp_path, write)
    output.unlink()
    assert not is_done(tmp_path, write)


def test_inputs_are_written_before_the_command_starts(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    step = replace(python(f"print(open({str(path)!r}).read())"), inputs={path: "text"})
    run(step, tmp_path)
    assert (tmp_path / "step.log").read_text() == "text\n"


@pytest.mark.parametrize("resumes", [True, False])
def test_only_a_step_that_resumes_keeps_what_it_has_and_only_under_its_own_key(resumes: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = f"import os; os.makedirs({str(folder)!r}, exist_ok=True); print(os.listdir({str(folder)!r}))"
    for key, kept in (("a", False), ("a", resumes), ("b", False)):
        step = python(code, key, folder, resumes=resumes)
        run(step, tmp_path)
        said = (tmp_path / "step.log").read_text().splitlines()[-1]
        assert said == ("['checkpoint']" if kept else "[]"), key
        (tmp_path / "step.done").unlink()  # as if it had been interrupted
        (folder / "checkpoint").touch()


def test_what_no_step_wrote_is_never_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").touch()
    for resumes in (True, False):
        with pytest.raises(StepFailed, match=rf"^step would replace {folder}, which it did not write: move that away$"):
            run(python("", "k", folder, resumes=resumes), tmp_path)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
