"""Exported models are used, and checkpoints exported, where neither DeepSpeed nor Megatron-Core is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.exports import copying_model, tiny_config, write_export, write_tokenizer

CHECKPOINTS = Path(__file__).parents[1] / "fixtures" / "formats" / "run" / "checkpoints"
WITHOUT = "import sys\nsys.modules.update(deepspeed=None, megatron=None, wandb=None)\n"


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + program, *arguments], capture_output=True, text=True, check=False, timeout=240
    )


def nextlat(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("from nextlat_dist.cli import main\nsys.exit(main(sys.argv[1:]))", *arguments)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    config = tiny_config(vocab_size=write_tokenizer(directory), hidden_size=64)
    return write_export(directory, config, *copying_model(config))


def test_load_and_generate(export: Path) -> None:
    program = (
        "from nextlat_dist import load\n"
        "print(load(sys.argv[1]).generate([[1, 5]], max_new_tokens=4, ignore_eos=True)[0].token_ids)\n"
        "print('nextlat_dist.training' in sys.modules, 'nextlat_dist.model' in sys.modules)"
    )
    result = run(program, str(export))
    assert run("import megatron.core").returncode == 1  # the negative control
    assert result.stdout.splitlines()[1:] == ["False False"], result.stderr
    assert nextlat("generate", "--export", str(export), "--prompt", "alpha", "--max-new-tokens", "4").returncode == 0


def test_evaluate_speculative(export: Path, tmp_path: Path) -> None:
    prompts, report = tmp_path / "code.txt", tmp_path / "report.json"
    prompts.write_text("return self")
    options = ["--draft-length", "0,2", "--temperature", "0", "--max-new-tokens", "6", "--json", str(report)]
    result = nextlat("evaluate", "speculative", "--export", str(export), "--prompts", str(prompts), *options)
    assert result.returncode == 0, result.stderr
    assert report.is_file()


def test_export_says_what_comparing_logits_needs(tmp_path: Path) -> None:
    command = ["export", "--checkpoint", str(CHECKPOINTS), "--output", str(tmp_path / "export")]
    result = nextlat(*command)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: comparing logits with the training forward pass (--no-verify leaves it out) needs")
    assert line.endswith("pip install 'nextlat-dist[train]'")
    assert not (tmp_path / "export").exists()
    result = nextlat(*command, "--no-verify")
    assert result.returncode == 0, result.stderr
    assert run("from nextlat_dist import load; load(sys.argv[1])", str(tmp_path / "export")).returncode == 0
