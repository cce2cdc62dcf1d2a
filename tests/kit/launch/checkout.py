"""A throw-away project root for the launch scripts: their files, and a `nextlat_dist.cli` that only reports."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).parents[3]
# A stand-in for the training command: one file per rank with its rank, settings and environment.
REPORTING_CLI = """
import json, os, pathlib, signal, sys, time
watched = "watched=yes" in sys.argv  # as the real ranks, which end with their launcher and leave marks
if watched:
    from nextlat_dist.training.health import launcher
if sys.argv[1] == "doctor" and "RANK" not in os.environ:
    pathlib.Path("doctor.json").write_text(json.dumps(sys.argv[2:]))
    pathlib.Path("doctor.launch").write_text(os.environ.get("NEXTLAT_LAUNCH", ""))
    if watched:
        launcher.mark_checked()
    sys.exit(int(os.environ.get("DOCTOR_SAYS", "0")))
if "--dry-run" in sys.argv:
    if int(os.environ["WORLD_SIZE"]) not in map(int, os.environ.get("RANKS_THAT_FIT", "1").split()):
        sys.exit("error: " + os.environ["WORLD_SIZE"] + " ranks do not fit")
    sys.exit(0)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR",
         "TORCH_EXTENSIONS_DIR", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "PATH", "NEXTLAT_LAUNCH",
         "NEXTLAT_LAUNCHER")
if watched:
    launcher.end_with_launcher()
    launcher.mark_began()
report = {"arguments": sys.argv[1:], **{name: os.environ.get(name) for name in names}}
def stop(number, _):
    time.sleep(0.5)  # as saving a checkpoint would take a while
    pathlib.Path(f"stopped.{os.environ['RANK']}").write_text(signal.Signals(number).name)
    if watched:
        launcher.mark_end(75)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, signal.SIG_IGN if "deaf=yes" in sys.argv else stop)
starts = pathlib.Path(f"starts.{os.environ['RANK']}")
with starts.open("a") as file:
    file.write(os.environ["WORLD_SIZE"] + "\\n")
temporary = pathlib.Path(f".report.{os.environ['RANK']}")
temporary.write_text(json.dumps(report))
temporary.rename(temporary.name[1:])
if "wait=yes" in sys.argv or ("waits=once" in sys.argv and len(starts.read_text().split()) == 1):
    time.sleep(60)
# exits=3,75,0: the exit code of each start in turn
codes = next((a.split("=")[1].split(",") for a in sys.argv if a.startswith("exits=")), ["0"])
code = int(codes[min(len(starts.read_text().split()), len(codes)) - 1])
if watched and code == 0:
    launcher.mark_end(code)
sys.exit(code)
"""


@dataclass
class Project:
    """A copy of the launch scripts at `root`, and the environment they run in."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def add_command(self, name: str, text: str, folder: str = "commands") -> Path:
        """Put an executable script on the PATH (`commands`) or into the virtual environment (`.venv/bin`)."""
        path = self.root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", *command],
            cwd=self.root,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*command, **environment)
        output, errors = process.communicate(timeout=240)
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def add_real_venv(self) -> None:
        """Use the packages that run this test, and the reporting command instead of the real one."""
        (self.root / ".venv").symlink_to(sys.prefix)
        package = self.root / "nextlat_dist"
        package.mkdir()
        # What the stand-in does not have is the real one's.
        (package / "__init__.py").write_text(f"__path__.append({str(CHECKOUT / 'nextlat_dist')!r})\n")
        (package / "cli.py").write_text(REPORTING_CLI)


def assert_one_sentence(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2 and a single line `error: …` with all parts in it."""
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in errors[0]
