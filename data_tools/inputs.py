"""The options of every command that reads documents, and the source they name.

Invariant: `tokenizer` and `shard` read the same documents for the same options.
"""

from __future__ import annotations

import argparse

from data_tools.sources import STDIN, Fields, FileSource, find_files


def input_options() -> argparse.ArgumentParser:
    """A parent parser: where the documents are and which fields hold them."""
    inputs = argparse.ArgumentParser(add_help=False)
    inputs.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="SRC",
        help=f"folders, globs, text files, .jsonl[.gz|.zst], .parquet, or {STDIN} for standard input",
    )
    inputs.add_argument("--glob", nargs="+", default=[], metavar="PATTERN", help="take only these files of a folder")
    inputs.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="leave out these files of a folder")
    inputs.add_argument("--field", default="text", help="text field of JSONL and Parquet (default: text)")
    inputs.add_argument("--format", choices=("lines", "jsonl"), default="lines", help="of standard input")
    return inputs


def open_source(options: argparse.Namespace, *, prompt: str | None = None, split: str | None = None) -> FileSource:
    """The source that the options of `input_options` name; `prompt` and `split` are fields to read as well.

    Raises:
        UserError: an input does not exist or has no file.
    """
    fields = Fields(text=options.field, prompt=prompt, split=split)
    return FileSource(find_files(options.input, options.glob, options.exclude), fields, options.format)
