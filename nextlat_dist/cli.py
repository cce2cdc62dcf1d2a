"""`nextlat`: lists the commands, each the `command.py` of its package, and makes exit codes of what they raise.

    nextlat train --config configs/quickstart.yaml [key=value …] [--dry-run]
    nextlat export --checkpoint runs/NAME/checkpoints --output DIR
    nextlat calibrate --export DIR --prompts FILE|DIR …
    nextlat generate --export DIR --prompt TEXT
    nextlat chat --export DIR
    nextlat evaluate speculative --export [NAME=]DIR … --prompts FILE|DIR …
    nextlat evaluate task --export NAME=DIR … --data DIR
    nextlat evaluate belief --export NAME=DIR … --data DIR
    nextlat evaluate probes --export NAME=DIR … --data DIR
    nextlat evaluate lm --export NAME=DIR …
    nextlat ablate --config GRID --output DIR
    nextlat report --run runs/NAME
    nextlat init [--preset NAME] [--output FILE]
    nextlat configs [NAME --output FILE]
    nextlat checkpoint list | verify | prune | reshape runs/NAME/checkpoints
    nextlat doctor [--config FILE] [--hostfile FILE]

A user's mistake is one sentence on stderr and exit status 2. A training run that was asked to stop and saved exits with
75, one whose rank stalled or died with 76: the same command resumes from the last checkpoint. Heavy imports happen
inside the commands.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from nextlat_dist import __version__
from nextlat_dist.checkpoint.command import add_command as add_checkpoint
from nextlat_dist.config.command import add_command as add_configs
from nextlat_dist.doctor.command import add_command as add_doctor
from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.command import add_command as add_evaluate
from nextlat_dist.evaluation.run_report.command import add_command as add_report
from nextlat_dist.experiments.command import add_command as add_ablate
from nextlat_dist.reporting.console import say
from nextlat_dist.reporting.options import integers, numbers
from nextlat_dist.training.command import add_command as add_train
from nextlat_dist.training.health.signals import EXIT_STOPPED, StoppedBySignal


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run_command(options)
        status = 0
    except UserError as error:
        # Before ranks meet, and when they agreed on it, every rank has the same error: one of them speaks.
        if os.environ.get("RANK", "0") == "0" or (_ranks_have_met() and not error.shared):
            say(f"error: {error}", error=True)
        status = 2
    except StoppedBySignal as stopped:
        if os.environ.get("RANK", "0") == "0":
            say(str(stopped), error=True)
        status = EXIT_STOPPED
    except KeyboardInterrupt:
        say("interrupted", error=True)
        status = 130
    return status


def _ranks_have_met() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nextlat", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--version", action="version", version=f"nextlat {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_train(commands)
    _add_export(commands)
    _add_calibrate(commands)
    _add_generate(commands)
    _add_chat(commands)
    add_evaluate(commands)
    add_ablate(commands)
    add_configs(commands)
    add_doctor(commands)
    add_checkpoint(commands)
    add_report(commands)
    return parser


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write a checkpoint in Hugging Face layout")
    export.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, or a directory of checkpoints")
    export.add_argument("--output", type=Path, required=True)
    export.add_argument("--dtype", choices=["fp32", "bf16"], help="default: the precision of the run")
    export.add_argument("--no-verify", action="store_true", help="skip comparing logits with the training forward pass")
    export.add_argument(
        "--draft-vocabulary", type=int, default=0, metavar="N", help="draft from the N most frequent ids (0: from all)"
    )
    export.set_defaults(run_command=_export)


def _add_calibrate(commands: Any) -> None:
    calibrate = commands.add_parser("calibrate", help="measure what adaptive draft lengths go by, on this machine")
    calibrate.add_argument("--export", type=Path, required=True, help="written by `nextlat export`")
    calibrate.add_argument(
        "--prompts", type=Path, nargs="+", required=True, help="files of prompts, or folders with a file per domain"
    )
    calibrate.add_argument("--temperature", type=numbers, default=[0.0, 0.6, 1.0], metavar="0,0.6,1")
    calibrate.add_argument("--batch-size", type=integers, default=[1, 4, 16, 64, 128], metavar="1,4,16,64,128")
    calibrate.add_argument("--prompts-per-domain", type=int, default=8)
    calibrate.add_argument("--skip", type=int, default=0, help="leave out the first prompts of each domain")
    calibrate.add_argument("--max-new-tokens", type=int, default=96)
    calibrate.add_argument("--seed", type=int, default=0)
    calibrate.add_argument(
        "--draft-vocabulary", type=int, metavar="N", help="first: draft from the N most frequent ids of --data (0: all)"
    )
    calibrate.add_argument("--data", type=Path, help="the dataset that --draft-vocabulary counts ids in")
    calibrate.add_argument("--json", type=Path, help="where to write the measurements")
    calibrate.add_argument("--pictures", type=Path, metavar="DIR", help="where to write a PNG")
    calibrate.set_defaults(run_command=_calibrate)


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="continue a text, several tokens a step")
    generate.add_argument("--prompt", required=True, help="the text, or - to read it from stdin")
    _add_decoding(generate)
    generate.set_defaults(run_command=_generate)


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser("chat", help="write a text together with the model, in the terminal")
    _add_decoding(chat)
    chat.set_defaults(run_command=_chat)


def _add_decoding(parser: Any) -> None:
    parser.add_argument("--export", type=Path, required=True, help="written by `nextlat export`")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--draft-length",
        type=_draft_length,
        metavar="N|adaptive",
        help="tokens drafted per cycle; 0: plain decoding; default: adaptive where calibrated, else 3",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0: off")
    parser.add_argument("--top-p", type=float, default=1.0, help="1: off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    parser.add_argument("--show-drafts", action="store_true", help="colour the tokens that were drafted")
    parser.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="auto: on a terminal")


def _draft_length(text: str) -> int | str:
    if text != "adaptive" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor adaptive")
    return text if text == "adaptive" else int(text)


def _export(options: argparse.Namespace) -> None:
    from nextlat_dist.parallel.device import quiet_third_parties, use_cpu_where_no_cuda

    use_cpu_where_no_cuda()
    quiet_third_parties()
    from nextlat_dist.huggingface.export import export_checkpoint

    report = export_checkpoint(
        options.checkpoint,
        options.output,
        dtype=options.dtype,
        check_logits=not options.no_verify,
        draft_vocabulary=options.draft_vocabulary,
    )
    for key, value in report.items():
        print(f"{key:24} {value}")


def _calibrate(options: argparse.Namespace) -> None:
    from nextlat_dist.calibration.calibrate import calibrate

    calibrate(
        options.export,
        options.prompts,
        temperatures=options.temperature,
        batch_sizes=options.batch_size,
        prompts_per_domain=options.prompts_per_domain,
        skip=options.skip,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        draft_vocabulary=options.draft_vocabulary,
        data=options.data,
        json_path=options.json,
        picture_dir=options.pictures,
    )


def _generate(options: argparse.Namespace) -> None:
    from nextlat_dist.inference import load
    from nextlat_dist.inference.terminal import generate

    decoder = load(options.export)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    generate(decoder, prompt, *_decoding(options))


def _chat(options: argparse.Namespace) -> None:
    from nextlat_dist.inference import load
    from nextlat_dist.inference.terminal import chat, read_line

    chat(load(options.export), *_decoding(options), read_line)


def _decoding(options: argparse.Namespace) -> tuple[Any, Any]:
    from nextlat_dist.inference.terminal import Screen, Settings, wants_colour

    settings = Settings(
        max_new_tokens=options.max_new_tokens,
        draft_length=options.draft_length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop_strings=tuple(options.stop),
    )
    colour = options.show_drafts and wants_colour(options.color, sys.stdout)
    return settings, Screen(sys.stdout, sys.stderr, colour=colour)


if __name__ == "__main__":
    sys.exit(main())
