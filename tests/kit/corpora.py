"""Texts to make datasets of, and what stands in a dataset's files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import Manifest, read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer

TEXTS = [f"def function_{number}():\n    return {'x' * (number % 50)!r}\n" * (1 + number % 9) for number in range(120)]


def contents(directory: Path) -> dict[str, str]:
    """Hash of every file below a directory, hidden ones too."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stored(dataset: Path) -> tuple[Manifest, list[tuple[str, str]]]:
    """Manifest, and prompt and text of every document as decoded from its tokens."""
    manifest = read_manifest(dataset)
    storage, tokenizer = Records(open_storage(dataset), manifest), Tokenizer(dataset / "tokenizer.model")
    found: list[tuple[str, str]] = []
    for number in range(len(storage)):
        record = storage.read(number)
        prompts = record.prompts if record.prompts is not None else np.zeros(len(record.ends), np.int64)
        for tokens, prompt in zip(np.split(record.tokens, record.ends[:-1]), prompts, strict=True):
            assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            found.append((tokenizer.decode(tokens[:prompt]), tokenizer.decode(tokens[prompt:])))
    return manifest, found
