"""Tars as others write them, for the tests of adopted datasets."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_tar(path: Path, files: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    """A plain tar of the files, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def text_files(texts: Mapping[str, str]) -> list[tuple[str, bytes]]:
    """A `.txt` of each text, with a picture and a pickle next to it."""
    files: list[tuple[str, bytes]] = []
    for key, text in texts.items():
        files += [
            (f"{key}.jpg", b"\xff\xd8" * 700),
            (f"{key}.txt", text.encode()),
            (f"{key}.pkl", b"cposix\nabort\n(tR."),
        ]
    return files


def npy(ids: Sequence[int], dtype: Any = np.int64) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(ids, dtype=dtype))
    return buffer.getvalue()
