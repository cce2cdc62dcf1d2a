"""The report of `nextlat-data shard` on documents that it left out or changed, in the manifest and on the screen.

Invariant: every such document is counted; the first of each kind are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.shards.encode import OnInvalid, Remark
from nextlat_dist.data.shard_format import Manifest

REPORTED_NAMES = 20
MEANINGS: dict[Remark, str] = {
    "empty": "empty documents left out",
    "binary": "binary files left out",
    "utf16": "files in UTF-16 or UTF-32 left out",
    "bad_line": "lines that hold no document left out",
    "without": "records without the member left out",
    "invalid_utf8": "documents that are not UTF-8",
    "not_lossless": "documents whose text does not come back from their tokens",
    "cut": "documents that were tokenised in pieces whose tokens may differ from those of the whole",
    "long": "documents of more than 16.8 million tokens, each in a record that training holds in memory",
}
# Older releases have these in every report; the others are there when there is something to say.
ALWAYS: frozenset[Remark] = frozenset({"empty", "binary", "invalid_utf8", "not_lossless"})
# Reasons to leave a document out; the others remark on one that is there.
LEFT_OUT: frozenset[Remark] = frozenset({"empty", "binary", "utf16", "bad_line", "without", "invalid_utf8"})
LONG_TOKENS = 1 << 24  # the 16.8 million of `MEANINGS`: 67 MB of uint32 in the memory of training


class ShardReport:
    """Counts and first names of the documents of one split that were left out or changed.

    Args:
        before: `to_json` of the report to continue.
    """

    def __init__(self, on_invalid: OnInvalid, before: Mapping[str, Any] | None = None) -> None:
        self._on_invalid = on_invalid
        known = before or {}
        self._counts = {remark: known[remark]["count"] if remark in known else 0 for remark in MEANINGS}
        self._names = {remark: list(known[remark]["names"]) if remark in known else [] for remark in MEANINGS}

    def add(self, remark: Remark, name: str) -> None:
        self._counts[remark] += 1
        if self._counts[remark] <= REPORTED_NAMES:
            self._names[remark].append(name)

    def to_json(self) -> dict[str, Any]:
        report: dict[str, Any] = {"on_invalid": self._on_invalid}
        for remark in MEANINGS:
            if remark in ALWAYS or self._counts[remark]:
                report[remark] = {"count": self._counts[remark], "names": list(self._names[remark])}
        return report


def merged(lists: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One {"count", "names"} of several."""
    names = [name for found in lists for name in found["names"]]
    return {"count": sum(found["count"] for found in lists), "names": names[:REPORTED_NAMES]}


def describe(manifest: Manifest, directory: Path | str) -> str:
    """One line on the dataset, one for each kind of document that was left out or changed."""
    lines = [
        f"{directory}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {manifest.records:,} records, "
        f"{len(manifest.shards):,} shards"
    ]
    for remark, meaning in MEANINGS.items():
        found = manifest.report.get(remark)  # a task's documents are made, so none was left out
        if found is not None and found["count"]:
            policy = f" ({manifest.report['on_invalid']})" if remark == "invalid_utf8" else ""
            more = ", …" if found["count"] > len(found["names"]) else ""
            lines.append(f"  {found['count']} {meaning}{policy}: {', '.join(found['names'])}{more}")
    return "\n".join(lines)
