"""The options of every command that reads documents, and the source they name.

Invariant: `tokenizer` and `shard` read the same documents for the same options.
"""

from __future__ import annotations

import argparse

from data_tools.text.find import STDIN, find_inputs
from data_tools.text.hf_source import SCHEME, HfSource
from data_tools.text.json_lines import Fields
from data_tools.text.sources import FileSource, TextSource
from nextlat_dist.errors import UserError
from nextlat_dist.reporting.console import say


def input_options() -> argparse.ArgumentParser:
    """A parent parser: where the documents are and which fields hold them."""
    inputs = argparse.ArgumentParser(add_help=False)
    source = inputs.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="SRC",
        help="folders, globs, text files (one document each), JSON lines (.jsonl, .ndjson, .json), .parquet, any of "
        f"them compressed (gzip, zstd, bzip2, xz), or {STDIN} for standard input (a document per line)",
    )
    source.add_argument(
        "--source",
        metavar=f"{SCHEME}NAME",
        help="a dataset of the Hugging Face hub, a local folder of one, or a format with --hf-data-files; streamed",
    )
    inputs.add_argument(
        "--glob", nargs="+", default=[], metavar="PATTERN", help="take only these files of a folder (default: all)"
    )
    inputs.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="leave out these files of a folder (default: none)"
    )
    inputs.add_argument("--field", default="text", help="text field of JSONL and Parquet (default: text)")
    inputs.add_argument(
        "--format", choices=("lines", "jsonl"), help="of standard input (default: lines; must be given for JSON)"
    )
    inputs.add_argument(
        "--hf-config", metavar="NAME", help="configuration of the dataset of --source (default: its own)"
    )
    inputs.add_argument("--hf-split", default="train", metavar="NAME", help="its split (default: train)")
    inputs.add_argument(
        "--hf-data-files", nargs="+", default=[], metavar="PATTERN", help="take only these of its files (default: all)"
    )
    return inputs


def open_source(options: argparse.Namespace, *, prompt: str | None = None, split: str | None = None) -> TextSource:
    """The source that the options of `input_options` name; `prompt` and `split` are fields to read as well.

    Raises:
        UserError: an input does not exist or has no file, or the dataset of --source cannot be opened.
    """
    fields = Fields(text=options.field, prompt=prompt, split=split)
    if options.source is not None:
        name = options.source.removeprefix(SCHEME)
        if name in ("", options.source):
            raise UserError(f"--source is {options.source!r}; it must be {SCHEME}NAME (files are given with --input)")
        return HfSource(
            name, fields, config=options.hf_config, split=options.hf_split, data_files=options.hf_data_files
        )
    found = find_inputs(options.input, options.glob, options.exclude)
    if found.left_out:
        say(found.describe(), error=True)
    return FileSource(found.files, fields, options.format)
