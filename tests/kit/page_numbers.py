"""Numbers on README and docs that come from committed measurements: where they stand, and what the JSONs say.

`python -m tests.kit.page_numbers` writes what the JSONs say onto the pages, after a new measurement.

A sentence is a template whose `{}` are numbers; spaces stand for any line break. Numbers are compared as they are
printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("code", "docstrings", "prose")


@dataclass(frozen=True)
class Sentence:
    page: str
    template: str
    values: tuple[str, ...]

    @property
    def pattern(self) -> re.Pattern[str]:
        parts = [r"\s+".join(map(re.escape, part.split(" "))) for part in self.template.split("{}")]
        return re.compile(r"([0-9][0-9.,e+-]*)".join(parts))

    def found(self, text: str) -> re.Match[str]:
        matches = list(self.pattern.finditer(text))
        assert len(matches) == 1, f"{self.page} has {len(matches)} times: {self.template}"
        return matches[0]


def sentences() -> Iterator[Sentence]:
    yield from _speedup(_read("speculative"))
    yield from _batches(_read("speculative_batches"), _read("speculative_batch128"))
    combs, paths = _read("comb_drafts")["summary"], _read("path_star")["summary"]
    yield Sentence(
        "docs/benchmarks.md",
        "finds the second choice right in {}% of the rejections, yet the best comb at {} of the best chain's speed",
        (f"{100 * combs['second_choice']:.0f}", f"{combs['comb_to_chain']:.2f}"),
    )
    yield Sentence(
        "README.md",
        "**Planning**: {} of the paths of a small Path-Star task are right with NextLat, {} with a GPT twin",
        (f"{paths['nextlat_exact_greedy']:.3f}", f"{paths['gpt_exact_greedy']:.3f}"),
    )
    yield from _quickstart(_read("quickstart"))


def _speedup(measured: dict[str, Any]) -> Iterator[Sentence]:
    cells = {(cell["temperature"], cell["domain"]): cell for cell in measured["cells"]}
    single = [cells[temperature, domain] for temperature in (0.0, 1.0) for domain in DOMAINS]
    greedy, sampled = cells[0.0, "all"], cells[1.0, "all"]
    assert measured["summary"]["greedy_identical"], "the pages say that it is"
    adaptive = _range(cell["speedup_adaptive"] for cell in single)
    yield Sentence(
        "README.md", "**Speed**: {}–{}× the tokens per second of plain decoding with adaptive draft lengths", adaptive
    )
    for cell in single:
        yield Sentence(
            "docs/speedup.md",
            f"| {cell['temperature']:g} | {cell['domain']} "
            "| {} | {}× ({}) | {}× ({}–{}) | {} ({}–{}) | {} | {} ({}–{}) |",
            (
                f"{cell['baseline_tokens_per_second']:.0f}",
                f"{cell['speedup_fixed_best']:.2f}",
                str(cell["draft_length_fixed_best"]),
                *_estimate(cell, "speedup_adaptive"),
                *_estimate(cell, "adaptive_over_fixed_best"),
                f"{cell['accepted_adaptive']:.2f}",
                *_estimate(cell, "nextlat_over_mtp"),
            ),
        )
    yield Sentence(
        "docs/speedup.md",
        "`generate` ran at {} (greedy) and {} (temperature 1) of our plain decoding, with prompt lookup at {} and {}.",
        tuple(
            f"{cell[name]:.2f}"
            for name in ("hugging_face_over_baseline", "hugging_face_prompt_lookup_over_baseline")
            for cell in (greedy, sampled)
        ),
    )
    yield Sentence(
        "docs/speedup.md",
        "MTP's drafts hardly paid for themselves: {}–{}× at the best fixed length, with {}–{} accepted per cycle where "
        "NextLat has {}–{}",
        (
            *_range(cell["mtp_speedup_fixed_best"] for cell in single),
            *_range(cell["mtp_accepted_held_out"] for cell in single),
            *_range(cell["accepted_held_out"] for cell in single),
        ),
    )


def _batches(batches: dict[str, Any], batch128: dict[str, Any]) -> Iterator[Sentence]:
    cells = [cell for cell in batches["cells"] if cell["domain"] in DOMAINS]
    by_size = [[cell for cell in cells if cell["batch_size"] == size] for size in (8, 32)]
    yield Sentence(
        "docs/speedup.md",
        "at batch 8 it is {}–{}× plain decoding, at batch 32 {}–{}×, and its ratio to the best fixed length has an "
        "interval that reaches 1 in {} of {} cells ({}–{})",
        (
            *(value for part in by_size for value in _range(cell["speedup_adaptive"] for cell in part)),
            str(sum(cell["adaptive_keeps_up"] for cell in cells)),
            str(len(cells)),
            *_range(cell["adaptive_over_fixed_best"] for cell in cells),
        ),
    )
    large = [cell for cell in batch128["cells"] if cell["domain"] in DOMAINS]
    yield Sentence(
        "docs/speedup.md",
        "At batch 128 draft length 1 is {}–{}× plain decoding on this CPU, and adaptive is {}–{}×, with {}–{} drafts "
        "per cycle",
        (
            *_range(cell["speedup_fixed_best"] for cell in large),
            *_range(cell["speedup_adaptive"] for cell in large),
            *_range(cell["drafted_adaptive"] for cell in large),
        ),
    )


def _quickstart(report: dict[str, Any]) -> Iterator[Sentence]:
    train, measured = report["train"], report["speculative"]
    assert measured["greedy_identical"], "the page says that it is"
    page = "docs/quickstart.md"
    yield Sentence(
        page,
        "| training loss, first → last logged | {} → {} |",
        (f"{train['loss_first']:.2f}", f"{train['loss_last']:.2f}"),
    )
    yield Sentence(
        page,
        "| validation loss (L_ntp + L_h + L_kl) | {} after {} tokens, {} tokens/s |",
        (f"{train['validation_loss']:.2f}", f"{train['tokens']:,}", f"{train['tokens_per_second']:,.0f}"),
    )
    yield Sentence(
        page,
        "| largest logit difference, training forward against transformers | {} |",
        (f"{report['export']['max_logit_difference']:.1e}",),
    )
    both = [(prefix, name) for name in ("speedup", "accepted_tokens_per_cycle") for prefix in ("", "sampled_")]
    yield Sentence(
        page,
        "| best fixed draft length | {} greedy, {} at temperature 1 |",
        (str(measured["draft_length"]), str(measured["sampled_draft_length"])),
    )
    for (first, name), title in zip(
        both[::2], ("speedup over plain decoding at it", "drafted tokens accepted per cycle"), strict=True
    ):
        times = "×" if name == "speedup" else ""
        yield Sentence(
            page,
            f"| {title}, held out | {{}}{times} greedy, {{}}{times} at temperature 1 |",
            (f"{measured[first + name]:.2f}", f"{measured['sampled_' + name]:.2f}"),
        )
    yield Sentence(
        page,
        "| speedup of adaptive draft lengths | {}× greedy, {}× at temperature 1 |",
        (f"{measured['speedup_adaptive']:.2f}", f"{measured['sampled_speedup_adaptive']:.2f}"),
    )
    yield Sentence(page, "text loops ({}% of its", (f"{100 * measured['repeated_4gram_share']:.0f}",))
    yield Sentence(
        "README.md",
        "[its page](docs/quickstart.md): {}× plain decoding (greedy, adaptive draft lengths)",
        (f"{measured['speedup_adaptive']:.2f}",),
    )


def _range(values: Any) -> tuple[str, str]:
    listed = list(values)
    return f"{min(listed):.2f}", f"{max(listed):.2f}"


def _estimate(cell: dict[str, Any], name: str) -> tuple[str, ...]:
    return tuple(f"{cell[name + end]:.2f}" for end in ("", "_low", "_high"))


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "results" / f"{name}.json").read_text())
    return content


def corrected(text: str, sentence: Sentence) -> str:
    """The page with the numbers of the JSON, its line breaks as they are."""
    match, values = sentence.found(text), sentence.values
    for group in range(len(values), 0, -1):
        start, end = match.span(group)
        text = text[:start] + values[group - 1] + text[end:]
    return text


def write(found: Sequence[Sentence]) -> None:
    for sentence in found:
        path = ROOT / sentence.page
        path.write_text(corrected(path.read_text(), sentence))


if __name__ == "__main__":
    write(list(sentences()))
