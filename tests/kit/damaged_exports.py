"""Copies of exports, each damaged in a way drawn at random: cut, edited, replaced, foreign.

what = damage(folder, draw)          a sentence about what was done, for the report of a finding
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 10**30, 1e-30, 1e300, 0.5, -0.5, "", "x", "0", "1", "llama", "<s>"),
    *("\x00", "\x1b[31m", "../..", "/etc/passwd", "x" * 2000, [], [1], [[]], {}, {"a": 1}, [None], ["x"], float("nan")),
    *(float("inf"), -float("inf"), {"rope_type": "llama3", "rope_theta": 5}, "float16", "int4", "LlamaForCausalLM"),
]
TEXTS = [
    "",
    "{",
    "[]",
    "null",
    "1",
    '"x"',
    "{}",
    '{"a": 1, "a": 2}',
    "[" * 200_000,
    '{"a": ' + "9" * 5000 + "}",
    "\ufeff{}",
]
FOREIGN = ["os:system", "tests.kit.exports:write_export", "gated", "unknown_kind", "mtp", "nextlat", "eagle3"]


def jsons(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.json"))


def tensors(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value; of long lists and objects the first few."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for key, item in list(inner)[:12]:
        found += _places(item, (*path, key))
    return found


def edited_value(folder: Path, draw: random.Random) -> str:
    """One value of one JSON file becomes another, goes, or gets another name."""
    file = draw.choice(jsons(folder))
    root = json.loads(file.read_text())
    place = draw.choice(_places(root))
    parent = root
    for key in place[:-1]:
        parent = parent[key]
    key, how = place[-1], draw.randrange(8)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[draw.choice(["x", "", str(key).upper(), f" {key}", "0", "1e3", "auto_map"])] = parent.pop(key)
    elif how == 2 and isinstance(parent[key], int | float):
        parent[key] *= draw.choice([-1, 0.5, 2, 1000])
    elif how == 3 and isinstance(parent[key], list | dict):
        parent[key] = draw.choice(list(parent[key].values() if isinstance(parent[key], dict) else parent[key]) or [0])
    else:
        parent[key] = draw.choice(VALUES)
    file.write_text(json.dumps(root))
    return (
        f"{file.name}: {place} by {how}, now {str(parent.get(key, '-') if isinstance(parent, dict) else parent)[:60]}"
    )


def replaced_text(folder: Path, draw: random.Random) -> str:
    file, text = draw.choice(jsons(folder)), draw.choice(TEXTS)
    file.write_text(text)
    return f"{file.name} is {text[:20]!r}"


def cut(folder: Path, draw: random.Random) -> str:
    file = draw.choice(files(folder))
    content = file.read_bytes()
    length = draw.choice([0, 1, 7, 8, 9, draw.randrange(len(content) + 1), max(0, len(content) - 1)])
    file.write_bytes(content[:length])
    return f"{file.name} cut to {length} bytes"


def changed_bytes(folder: Path, draw: random.Random) -> str:
    file = draw.choice(files(folder))
    content = bytearray(file.read_bytes())
    end = len(content) if draw.random() < 0.5 else min(len(content), 200)
    for _ in range(draw.choice([1, 1, 4, 50])):
        content[draw.randrange(end)] = draw.randrange(256)
    file.write_bytes(content)
    return f"{file.name} has other bytes"


def gone(folder: Path, draw: random.Random) -> str:
    file = draw.choice(files(folder))
    how = draw.randrange(5)
    file.unlink()
    if how == 1:
        file.mkdir()
    elif how == 2:
        file.symlink_to(file.name)
    elif how == 3:
        file.symlink_to("/nowhere")
    elif how == 4:
        file.write_bytes(draw.randbytes(draw.randrange(3000)))
    return f"{file.name} is gone, and there is {('nothing', 'a folder', 'a loop', 'a dangling link', 'noise')[how]}"


def changed_header(folder: Path, draw: random.Random) -> str:
    """The header of a safetensors file, its content untouched."""
    file = draw.choice(tensors(folder))
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = draw.choice([name for name in header if name != "__metadata__"])
    how = draw.randrange(6)
    if how == 0:
        header[name]["dtype"] = draw.choice(["I64", "F8_E4M3", "BOOL", "F64", "x", 3, "U8", "BF16"])
    elif how == 1:
        header[name]["shape"] = draw.choice(
            [[], [0], [1, 1], [2**62, 4], [-1], "x", [*header[name]["shape"], 1], [1.5]]
        )
    elif how == 2:
        header[name]["data_offsets"] = draw.choice([[0, 0], [0, 4], [-4, 4], [10**12, 10**13], "x", [4, 0]])
    elif how == 3:
        header[draw.choice(["x", "", "\x1b[31m", name + ".x"])] = header.pop(name)
    elif how == 4:
        del header[name]
    else:
        header["__metadata__"] = draw.choice(VALUES)
    new = json.dumps(header).encode()
    size = draw.choice([len(new), len(new), len(new), len(new) - 1, 2**63, 0])
    file.write_bytes(struct.pack("<Q", size) + new + content[8 + length :])
    return f"{file.name}: header of {name} by {how}, size {size}"


def other_tensors(folder: Path, draw: random.Random) -> str:
    """A whole safetensors file with one tensor of another shape, type or value."""
    file = draw.choice(tensors(folder))
    found = {name: tensor.clone() for name, tensor in load_file(file).items()}
    name, how = draw.choice(sorted(found)), draw.randrange(8)
    tensor = found[name]
    changes: list[Callable[[], torch.Tensor]] = [
        tensor[:-1].clone,
        tensor.flatten,
        lambda: tensor.to(torch.int32),
        lambda: torch.full_like(tensor, 2**20 if tensor.dtype == torch.int64 else float("nan")),
        tensor.unsqueeze(0).clone,
        lambda: tensor.to(torch.float8_e4m3fn),
        lambda: tensor.new_zeros(0),
    ]
    if how == 7:
        del found[name]
    else:
        found[name] = changes[how]()
    save_file(found, file)
    return f"{file.name}: {name} by {how}"


def other_index(folder: Path, draw: random.Random) -> str:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    target = draw.choice(
        ["../model.safetensors", "/etc/passwd", "model.bin", "", ".", "nothing.safetensors", 3, None, []]
    )
    names = sorted(index["weight_map"])
    for name in names if draw.random() < 0.3 else [draw.choice(names)]:
        index["weight_map"][name] = target
    if draw.random() < 0.2:
        index["weight_map"] = draw.choice(VALUES)
    file.write_text(json.dumps(index))
    return f"the index names {target!r}"


def foreign(folder: Path, draw: random.Random) -> str:
    """As somebody else may have arranged it."""
    how = draw.randrange(7)
    drafter = next(path for path in (folder / "latent_predictor", folder / "mtp") if path.is_dir())
    if how == 0:
        drafter.rename(folder / draw.choice(["mtp", "latent_predictor", "unknown", "eagle"]))
    elif how == 1:
        shutil.copytree(drafter, folder / ("mtp" if drafter.name != "mtp" else "latent_predictor"))
    elif how == 2:
        config = json.loads((drafter / "config.json").read_text())
        config[draw.choice(["fusion", "speculators_model_type", "architectures"])] = draw.choice(FOREIGN)
        (drafter / "config.json").write_text(json.dumps(config))
    elif how == 3:
        (folder / "model.safetensors.index.json").unlink()
        if draw.random() < 0.5:
            shutil.rmtree(drafter)
    elif how == 4:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        (folder / "model.safetensors.index.json").unlink()
    elif how == 5:
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
            if draw.random() < 0.6:
                (folder / name).unlink()
    else:
        shutil.rmtree(drafter)
        drafter.touch()
    return f"arranged otherwise, {how}"


DAMAGES: list[Callable[[Path, random.Random], str]] = [
    *[edited_value] * 8,
    replaced_text,
    cut,
    cut,
    changed_bytes,
    gone,
    gone,
    changed_header,
    changed_header,
    other_tensors,
    other_tensors,
    other_index,
    foreign,
    foreign,
]


def damage(folder: Path, draw: random.Random) -> str:
    """Damage the whole export in `folder` in one way; what was done."""
    return draw.choice(DAMAGES)(folder, draw)
