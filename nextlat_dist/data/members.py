"""From the members of a WebDataset record to its documents.

Invariant: what a record decodes to depends on its bytes, the manifest and the tokenizer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nextlat_dist.data.shard_format import Manifest, Record


def record_decoder(manifest: Manifest, tokenizer: bytes | None) -> Callable[[Mapping[str, bytes]], Record]:
    """The function that makes a `Record` of a record's members, given as {extension: content}.

    Args:
        tokenizer: content of the sentencepiece model, needed for `text` members only.

    The function raises ValueError for members that are not what the manifest says.
    """
    assert manifest.members.kind == "block"
    return Record.from_members
