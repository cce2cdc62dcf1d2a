"""The GPUs that CUDA lets a process use, of those that nvidia-smi lists; `launch/env.sh` knows the same for scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence


def visible_gpus(listing: str, choice: str | None) -> list[str]:
    """Names of the GPUs in `listing`, what `nvidia-smi -L` prints, that CUDA_VISIBLE_DEVICES=`choice` leaves.

    As CUDA reads it: numbers or beginnings of ids, up to the first entry that is none; nothing at all where one comes
    twice. Of MIG instances CUDA shows a process one.
    """
    lines = [line.strip() for line in listing.splitlines()]
    names = [line.split(" (UUID")[0] for line in lines if re.match(r"GPU \d+:", line)]
    ids = [found[1] if (found := re.search(r"UUID: ([^)]+)", line)) else "?" for line in lines if line[:4] == "GPU "]
    mig = any(line.startswith("MIG ") for line in lines)
    chosen: list[str] = names if choice is None else []
    for entry in [] if choice is None else choice.split(","):
        name = _one(entry.strip(), names, ids, mig)
        if name is None:
            break
        if name in chosen:
            return []
        chosen.append(name)
    return chosen[:1] if mig else chosen


def _one(entry: str, names: Sequence[str], ids: Sequence[str], mig: bool) -> str | None:
    if number := re.match(r"\d+", entry, re.ASCII):
        index = int(number[0][:9])
        return names[index] if index < len(names) else None
    if entry.startswith("GPU-"):
        matching = [name for name, gpu_id in zip(names, ids, strict=True) if gpu_id.startswith(entry)]
        return matching[-1] if matching else None
    return entry if entry.startswith("MIG-") and mig else None
