"""The configuration page is what the schema says."""

from __future__ import annotations

import dataclasses
import re

from nextlat_dist.config import reference
from nextlat_dist.config.schema import RunConfig
from tests.kit.pages import ROOT

PAGE = ROOT / "docs/config.md"
HEADING = "## Top level\n\n"


def tables() -> str:
    return PAGE.read_text().partition(HEADING)[2]


def test_the_tables_are_generated() -> None:
    written, generated = tables().splitlines(), reference.reference_markdown().splitlines()
    differing = [number for number, pair in enumerate(zip(written, generated, strict=False)) if len(set(pair)) > 1]
    hint = "put what `python -m nextlat_dist.config.reference` prints under `## Top level` of docs/config.md"
    assert not differing, f"{written[differing[0]]}\nis not\n{generated[differing[0]]}\n{hint}"
    assert len(written) == len(generated), hint


def test_every_section_and_key_of_the_schema_is_on_the_page() -> None:
    headings = re.findall(r"^## (\S+)$", tables(), flags=re.MULTILINE)
    sections = [f.name for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(getattr(RunConfig(), f.name))]
    assert sections == [heading for heading in headings if "." not in heading]
    for section in sections:
        for key in dataclasses.fields(getattr(RunConfig(), section)):
            assert f"| `{key.name}` |" in tables(), f"{section}.{key.name}"
