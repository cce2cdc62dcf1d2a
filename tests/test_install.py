"""`pip install nextlat-dist` without extras loads, generates, evaluates and reads data, and has no training stack.

The wheel is built and installed into an environment that has only what it declares; commands run in an empty folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

import nextlat_dist
from tests.kit.base_install import CHECKOUT, base_environment, build_wheel, environment

FORMATS = CHECKOUT / "tests" / "fixtures" / "formats"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    return base_environment(tmp_path_factory.mktemp("base"), wheel)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the committed formats, copied: nothing may be written into it."""
    return Path(shutil.copytree(FORMATS / "export", tmp_path_factory.mktemp("export") / "export"))


def run(scripts: Path, folder: Path, *command: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    words = [str(scripts / str(command[0])), *map(str, command[1:])]
    result = subprocess.run(
        words, cwd=folder, env=environment(scripts), capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result


def test_contents_of_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    for package in ("nextlat_dist", "data_tools"):
        modules = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / package).rglob("*.py")}
        assert modules <= names
        assert f"{package}/py.typed" in names
    for folder in ("configs", "launch"):
        shipped = {path.relative_to(CHECKOUT) for path in (CHECKOUT / folder).rglob("*") if path.is_file()}
        assert {f"nextlat_dist/_shipped/{path}" for path in shipped} <= names
    roots = {name.partition("/")[0] for name in names}
    assert roots == {"nextlat_dist", "data_tools", f"nextlat_dist-{nextlat_dist.__version__}.dist-info"}
    assert not any(name.endswith((".pyc", ".png")) for name in names)


def test_no_training_stack(scripts: Path, tmp_path: Path) -> None:
    program = "import importlib.util as u; print([n for n in ('deepspeed', 'megatron', 'wandb', 'pyarrow', 'ninja', "
    program += "'torch', 'transformers', 'matplotlib') if u.find_spec(n)])"
    assert run(scripts, tmp_path, "python", "-c", program).stdout == "['torch', 'transformers', 'matplotlib']\n"


def test_version_and_configs(scripts: Path, tmp_path: Path) -> None:
    assert run(scripts, tmp_path, "nextlat", "--version").stdout == f"nextlat {nextlat_dist.__version__}\n"
    listed = run(scripts, tmp_path, "nextlat", "configs").stdout
    assert "quickstart" in listed
    assert "launch/single_node.sh" in listed
    run(scripts, tmp_path, "nextlat", "configs", "quickstart", "--output", "mine.yaml")
    assert (tmp_path / "mine.yaml").read_bytes() == (CHECKOUT / "configs/quickstart.yaml").read_bytes()


def test_load_and_generate(scripts: Path, tmp_path: Path, export: Path) -> None:
    program = "from nextlat_dist import load\n[text] = load({!r}).generate(['def '], max_new_tokens=4)\nprint(text)"
    assert run(scripts, tmp_path, "python", "-c", program.format(str(export))).stdout
    arguments = ["--export", export, "--prompt", "def ", "--max-new-tokens", 4]
    assert run(scripts, tmp_path, "nextlat", "generate", *arguments).stdout


def test_evaluate_speculative(scripts: Path, tmp_path: Path, export: Path) -> None:
    (tmp_path / "prompts.txt").write_text("def read(path):\n")
    arguments = ["--export", export, "--prompts", "prompts.txt", "--draft-length", "0..1", "--temperature", 0]
    arguments += ["--max-new-tokens", 4, "--json", "report.json"]
    run(scripts, tmp_path, "nextlat", "evaluate", "speculative", *arguments)
    assert (tmp_path / "report.json").is_file()


def test_read_a_dataset(scripts: Path, tmp_path: Path) -> None:
    assert run(scripts, tmp_path, "nextlat-data", "inspect", FORMATS / "data/train").stdout
    assert run(scripts, tmp_path, "nextlat-data", "verify", FORMATS / "data/train").stdout
    program = "import sys\nfrom nextlat_dist.data.records import Records\n"
    program += "from nextlat_dist.data.shard_format import read_manifest\n"
    program += "from nextlat_dist.data.storage.open import open_storage\nfrom pathlib import Path\n"
    program += "folder = Path(sys.argv[1])\nrecords = Records(open_storage(folder), read_manifest(folder))\n"
    program += "print(sum(len(records.read(n).tokens) for n in range(len(records))))"
    manifest = json.loads((FORMATS / "data/train/manifest.json").read_text())
    tokens = sum(shard["tokens"] for shard in manifest["shards"])
    assert run(scripts, tmp_path, "python", "-c", program, FORMATS / "data/train").stdout == f"{tokens}\n"


def test_export_without_the_training_forward_pass(scripts: Path, tmp_path: Path) -> None:
    checkpoint = FORMATS / "run/checkpoints"
    run(scripts, tmp_path, "nextlat", "export", "--checkpoint", checkpoint, "--output", "out", "--no-verify")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (FORMATS / "export/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (
            ["nextlat", "train", "--config", "run.yaml", f"data.train={FORMATS / 'data/train'}"],
            "training needs deepspeed, which is not installed: pip install 'nextlat-dist[train]'",
        ),
        (
            ["nextlat", "export", "--checkpoint", FORMATS / "run/checkpoints", "--output", "out"],
            "comparing logits with the training forward pass (--no-verify leaves it out) needs megatron.core, "
            "which is not installed: pip install 'nextlat-dist[train]'",
        ),
        (
            ["nextlat-data", "tokenizer", "--input", "a.parquet", "--vocab-size", "300", "--output", "x.model"],
            "reading a.parquet needs pyarrow, which is not installed: pip install 'nextlat-dist[data]'",
        ),
    ],
    ids=["train", "export", "parquet"],
)
def test_a_missing_extra_is_named(scripts: Path, tmp_path: Path, command: list[object], sentence: str) -> None:
    run(scripts, tmp_path, "nextlat", "configs", "quickstart", "--output", "run.yaml")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert run(scripts, tmp_path, *command, status=2).stderr == f"error: {sentence}\n"
