"""A small command line that works for every command, and the files that it needs."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from data_tools.cli import _parser as data_parser
from nextlat_dist.cli import _parser as parser
from tests.kit.pages import ROOT
from tests.kit.parsers import leaves

FORMATS = ROOT / "tests/fixtures/formats"
RUN = """\
output_dir: out/run
model: {num_layers: 1, hidden_size: 32, num_attention_heads: 2, vocab_size: 600}
data: {train: data/train, validation: data/validation, sequence_length: 32}
training: {train_tokens: 64, micro_batch_size: 1, global_batch_size: 1}
"""
GRID = """\
base: run.yaml
seeds: [0]
variants: {gpt: {objective.name: next_token, data.train: nowhere}}
training: {loss: loss}
"""
_EXPORT = "--export export --max-new-tokens 4"
_TASK = "--output out/task --train 20 --test 10"
LINES = {
    "nextlat train": "--config run.yaml --dry-run training.seed=3",
    "nextlat export": "--checkpoint run/checkpoints --output out/export --no-verify --dtype fp32",
    "nextlat fit-drafter": "--model export --data data/train --output out/fitted --steps 2 --rows 1 --length 16",
    "nextlat calibrate": "--export export --prompts prompts --temperature 0 --batch-size 1 --prompts-per-domain 1 "
    "--max-new-tokens 4 --json out/calibrate.json",
    "nextlat generate": f"--prompt What {_EXPORT} --temperature 0.5 --top-k 5 --top-p 0.9 --seed 3 --stop x",
    "nextlat chat": f"{_EXPORT} --draft-length 2 --color never",
    "nextlat evaluate speculative": "--export a=export --prompts prompts --draft-length 0,2 --temperature 0 "
    "--batch-size 1 --max-new-tokens 4 --prompts-per-domain 1 --json out/speculative.json",
    "nextlat evaluate task": "--export a=export --data labels/test --documents 2 --temperature 0 --json out/task.json",
    "nextlat evaluate belief": "--export a=export --data beliefs/test --documents 4 --fit-documents 4 --no-controls",
    "nextlat evaluate probes": "--export a=export --data data/validation --sequences 4 --length 8 --steps 2 "
    "--offsets 1..2",
    "nextlat evaluate lm": "--export a=export --tasks nothing --limit 1 --batch-size 1",
    "nextlat ablate": "--config broken.yaml --output out/grid --seeds 0,1 --jobs 1 training.seed=3",
    # Hours, were it not refused for two reasons.
    "nextlat experiments field": "--scale cpu --output out/field --seeds 0,1 --parts chess training.seed=three",
    "nextlat experiments price": "--scale cpu --output out/price --seeds 0,1 training.seed=three",
    "nextlat init": "--preset quickstart --output out/init.yaml training.seed=3",
    "nextlat configs": "quickstart --output out/quickstart.yaml",
    "nextlat doctor": "--quick --config run.yaml --json out/doctor.json",
    "nextlat checkpoint list": "run/checkpoints",
    "nextlat checkpoint verify": "run/checkpoints",
    "nextlat checkpoint prune": "out/none --keep-last 2 --keep-every 10",
    "nextlat checkpoint reshape": "run/checkpoints --output out/reshaped",
    "nextlat report": "--run out/none",
    "nextlat-data stdlib": "--output out/stdlib --validation-fraction 2",
    "nextlat-data tokenizer": "--input text.txt --output out/t.model --vocab-size 300 --input-bytes 2000 --seed 1",
    "nextlat-data shard": "--input text.txt --tokenizer t.model --output out/data --workers 0 --record-tokens 64",
    "nextlat-data index": "somebody.tar --tokenizer t.model --output out/index --text-member txt",
    "nextlat-data verify": "data/train --json out/verify.json",
    "nextlat-data inspect": "data/train --samples 2 --sample-tokens 20 --json out/inspect.json",
    "nextlat-data reshard": "data/train data/validation --output out/all --split train --record-tokens 64",
    "nextlat-data mix-preview": "--source a=data/train:0.5 --source b=data/validation:1 --tokens 1e5 "
    "--sequence-length 32",
    "nextlat-data task path-star": f"--arms 2 --length 3 {_TASK}",
    "nextlat-data task countdown": f"--inputs 3 {_TASK}",
    "nextlat-data task state-tracking": f"--group A5 --length 6 {_TASK}",
    "nextlat-data task hmm": f"--process mess3 --length 8 {_TASK}",
    "nextlat-data task city": f"{_TASK}",
}


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command without commands of its own."""
    return {**dict(leaves(parser(), "nextlat")), **dict(leaves(data_parser(), "nextlat-data"))}


def words_of(command: str) -> list[str]:
    """The command and its small line, without the program."""
    return [*command.split()[1:], *LINES[command].split()]


def write_inputs(folder: Path) -> None:
    """What the lines read, and a folder `out` that they write to."""
    for name in ("data", "labels", "beliefs", "export", "prompts"):
        shutil.copytree(FORMATS / name, folder / name)
    shutil.copytree(FORMATS / "run", folder / "run")
    shutil.copy(FORMATS / "data/train/tokenizer.model", folder / "t.model")
    shutil.copy(FORMATS / "adopted/somebody.tar", folder / "somebody.tar")
    (folder / "text.txt").write_text("".join(f"line {number} of some text\n" for number in range(200)))
    (folder / "run.yaml").write_text(RUN)
    (folder / "grid.yaml").write_text(GRID)
    (folder / "broken.yaml").write_text(GRID.replace("base", "bse"))
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("not yours")
    (folder / "out").mkdir()
