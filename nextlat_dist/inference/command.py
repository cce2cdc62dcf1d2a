"""`nextlat generate` and `nextlat chat`: an export's text in the terminal.

nextlat generate --export DIR --prompt TEXT --show-drafts
nextlat chat --export DIR
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from nextlat_dist.errors import UserError


def add_command(commands: Any) -> None:
    generate = commands.add_parser("generate", help="continue a text, several tokens a step")
    generate.add_argument("--prompt", required=True, help="the text, or - to read it from stdin")
    _add_decoding(generate)
    generate.set_defaults(run_command=_generate)
    chat = commands.add_parser("chat", help="write a text together with the model, in the terminal")
    _add_decoding(chat)
    chat.set_defaults(run_command=_chat)


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    shown = "(default: %(default)s)"
    parser.add_argument("--export", type=Path, required=True, help="written by `nextlat export`")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help=f"longest continuation {shown}")
    parser.add_argument(
        "--draft-length",
        type=_draft_length,
        metavar="N|adaptive",
        help="tokens drafted per cycle; 0: plain decoding (default: adaptive where calibrated, else 3)",
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="(default: %(default)s, greedy)")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="(default: %(default)s, off)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="(default: %(default)s, off)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=f"of the sampling {shown}")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated (default: none)"
    )
    parser.add_argument(
        "--show-drafts", action="store_true", help="colour the tokens that were drafted (default: do not)"
    )
    parser.add_argument(
        "--color",
        choices=["auto", "always", "never"],
        default="auto",
        help=f"of drafted tokens; auto: on a terminal {shown}",
    )


def _draft_length(text: str) -> int | str:
    if text != "adaptive" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor adaptive")
    return text if text == "adaptive" else int(text)


def _generate(options: argparse.Namespace) -> None:
    from nextlat_dist.inference.arguments import text
    from nextlat_dist.inference.loading import load
    from nextlat_dist.inference.terminal import generate, read_all

    decoding = _decoding(options)
    decoder = load(options.export)
    generate(decoder, read_all() if options.prompt == "-" else text("--prompt", options.prompt), *decoding)


def _chat(options: argparse.Namespace) -> None:
    from nextlat_dist.inference.loading import load
    from nextlat_dist.inference.terminal import chat, read_line

    decoding = _decoding(options)
    chat(load(options.export), *decoding, read_line)


def _decoding(options: argparse.Namespace) -> tuple[Any, Any]:
    from nextlat_dist.inference.arguments import text
    from nextlat_dist.inference.terminal import Screen, Settings, wants_colour

    if sys.stdout is None:
        raise UserError("standard output is closed, and the text goes there; leave it open")
    settings = Settings(
        max_new_tokens=options.max_new_tokens,
        draft_length=options.draft_length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop_strings=tuple(text("--stop", stop) for stop in options.stop),
    )
    colour = options.show_drafts and wants_colour(options.color, sys.stdout)
    return settings, Screen(sys.stdout, sys.stderr or io.StringIO(), colour=colour)
