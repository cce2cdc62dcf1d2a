"""Datasets that somebody made up: changed at random, with every digest right again."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    -(2**63),
    1,
    2**31,
    2**64,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "7",
    "train",
    "/etc/passwd",
    "../outside/secret.tar",
    "file:///etc/passwd",
    "http://127.0.0.1:9/x.tar",
    "nosuch://x/y.tar",
    "a\x00b.tar",
    "\x1b[2J\x1b]0;title\x07.tar",
    "\ud800",
    "x" * 5000,
    [],
    [1],
    {},
    {"a": 1},
    [[[[]]]],
)
Path_ = tuple[Any, ...]


def craft(source: Path, target: Path, draw: random.Random) -> str:
    """Write a changed copy of a dataset; what was changed, in words."""
    shutil.copytree(source, target)
    manifest = json.loads((target / "manifest.json").read_text())
    change = draw.choice([_value, _value, _value, _key, _index, _index, _index_kind, _records, _tar, _tokenizer])
    said = change(manifest, target, draw)
    write_manifest(target, manifest)
    return f"{change.__name__}: {said}"


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with the digest that belongs to it."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps({**body, "digest": digest}))


def write_index(directory: Path, manifest: dict[str, Any], content: bytes) -> None:
    """Write the index of the first shard, and its hash into the manifest."""
    name = manifest["shards"][0]["name"].removesuffix(".tar") + ".index.npy"
    (directory / name).write_bytes(content)
    manifest["shards"][0]["index_sha256"] = hashlib.sha256(content).hexdigest()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _places(value: Any, at: Path_ = ()) -> list[Path_]:
    """The paths of everything inside a JSON value, format and digest excepted."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, each in inside:
        if at or key not in ("format", "format_version", "digest"):
            found += [(*at, key), *_places(each, (*at, key))]
    return found


def _parent(manifest: dict[str, Any], place: Path_) -> Any:
    value: Any = manifest
    for key in place[:-1]:
        value = value[key]
    return value


def _value(manifest: dict[str, Any], _: Path, draw: random.Random) -> str:
    place = draw.choice(_places(manifest))
    new = copy.deepcopy(draw.choice(VALUES))
    _parent(manifest, place)[place[-1]] = new
    return f"{place} = {new!r:.60}"


def _key(manifest: dict[str, Any], _: Path, draw: random.Random) -> str:
    place = draw.choice(_places(manifest))
    parent = _parent(manifest, place)
    value = parent.pop(place[-1])
    if draw.random() < 0.5 and isinstance(parent, dict):
        parent["x\x1b[31m"] = value
    return f"without {place}"


def _table(directory: Path, manifest: dict[str, Any]) -> np.ndarray:
    name = manifest["shards"][0]["name"].removesuffix(".tar") + ".index.npy"
    table: np.ndarray = np.load(directory / name)
    return table


def _index(manifest: dict[str, Any], directory: Path, draw: random.Random) -> str:
    table = _table(directory, manifest)
    row, column = draw.randrange(len(table)), draw.randrange(5)
    table[row, column] = draw.choice([-1, 0, 1, 7, 2**31, 2**62, -(2**63), int(table[row, column]) + 1])
    write_index(directory, manifest, npy(table))
    return f"index[{row}, {column}] = {table[row, column]}"


def _index_kind(manifest: dict[str, Any], directory: Path, draw: random.Random) -> str:
    table = _table(directory, manifest)
    kinds: dict[str, Callable[[], bytes]] = {
        "floats": lambda: npy(table.astype(np.float64)),
        "objects": lambda: npy(table.astype(object)),
        "strings": lambda: npy(table.astype(str)),
        "unsigned": lambda: npy(table.astype(np.uint64)),
        "a row less": lambda: npy(table[:-1]),
        "a row more": lambda: npy(np.concatenate([table, table[-1:]])),
        "a column less": lambda: npy(np.ascontiguousarray(table[:, :4])),
        "one row": lambda: npy(table.reshape(-1)),
        "nothing": lambda: b"",
        "noise": lambda: draw.randbytes(300),
        "a huge shape": lambda: npy(table).replace(b"(%d, 5)" % len(table), b"(%d, 5)" % 10**18),
        "fortran": lambda: npy(np.asfortranarray(table)),
    }
    kind = draw.choice(list(kinds))
    write_index(directory, manifest, kinds[kind]())
    return kind


def _records(manifest: dict[str, Any], _: Path, draw: random.Random) -> str:
    shard = draw.choice(manifest["shards"])
    name = draw.choice(["records", "documents", "tokens", "bytes"])
    shard[name] = max(0, shard[name] + draw.choice([-1, 1, 10, 10**12]))
    return f"{name} = {shard[name]}"


def _tar(manifest: dict[str, Any], directory: Path, draw: random.Random) -> str:
    """Other bytes in the first record, with the crc32 and the hashes that belong to them."""
    import zlib

    shard = manifest["shards"][0]
    path, table = directory / shard["name"], _table(directory, manifest)
    data = bytearray(path.read_bytes())
    offset, length = int(table[0, 0]), int(table[0, 1])
    for _ in range(draw.choice([1, 5, 200])):
        data[offset + draw.randrange(length)] = draw.choice([0, 255, draw.randrange(256)])
    table[0, 4] = zlib.crc32(data[offset : offset + length])
    path.write_bytes(data)
    shard["sha256"] = hashlib.sha256(data).hexdigest()
    write_index(directory, manifest, npy(table))
    return "bytes of a record"


def _tokenizer(manifest: dict[str, Any], directory: Path, draw: random.Random) -> str:
    content = draw.choice([b"", b"no model", draw.randbytes(500), (directory / "tokenizer.model").read_bytes()[:-50]])
    (directory / "tokenizer.model").write_bytes(content)
    manifest["tokenizer"]["sha256"] = hashlib.sha256(content).hexdigest()
    return f"tokenizer of {len(content)} bytes"
