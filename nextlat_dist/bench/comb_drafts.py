"""Tree drafts against chains. A comb is the drafted chain and at each depth the drafter's second choice: would it pay?

    python -m nextlat_dist.bench.comb_drafts --export DIR --prompts FILE|DIR … [--json FILE] [--quick]

`comb_to_chain`   tokens/s of the best comb over the best chain: greedy, batch 1, all lengths alternating
`second_choice`   share of the rejections, at the best comb's length, where the second choice was the token

A comb's second choices are read off logits that the chain needs anyway; what they cost is a verification of 1 + 2k
tokens instead of 1 + k. A hit is worth one token. The engine drafts chains.
Invariant: both loops emit the base model's greedy tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nextlat_dist.bench.timing import Rates, alternate, cores
from nextlat_dist.errors import UserError
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.engine.llama import Block
from nextlat_dist.inference.loading import load
from nextlat_dist.inference.prompts import load_prompts
from nextlat_dist.reporting.console import Progress
from nextlat_dist.reporting.publish import run_benchmark
from nextlat_dist.reporting.report import Report
from nextlat_dist.reporting.tables import table

COMMAND = "python -m nextlat_dist.bench.comb_drafts"
COLUMNS = {
    "drafts": "{drafts}",
    "depth": "{depth}",
    "tokens/s": "{tokens_per_second:.0f}",
    "speedup": "{speedup:.2f}",
    "tokens/cycle": "{tokens_per_cycle:.2f}",
    "second choice": "{second_choice:.2f}",
}
KINDS = ("chain", "comb")
FULL = {"rounds": 6, "prompts_per_domain": 4, "tokens": 96, "depths": 8}
QUICK = {"rounds": 1, "prompts_per_domain": 1, "tokens": 16, "depths": 2}


class CombLoop:
    """Greedy decoding of one prompt at batch 1; `teeth` depths have a second choice (0: a chain)."""

    def __init__(self, decoder: Decoder, depth: int, teeth: int) -> None:
        assert decoder.drafter is not None
        self.llama, self.drafter = decoder.llama, decoder.drafter
        self.depth, self.teeth = depth, teeth
        self.cycles = self.rejections = self.hits = 0

    @torch.inference_mode()
    def run(self, prompt: list[int], tokens: int) -> list[int]:
        """`tokens` greedy tokens after `prompt`; stop tokens do not count."""
        cache = self.llama.new_cache(1, len(prompt) + tokens + 2 * self.depth)
        memory = self.drafter.start(1, cache.capacity)
        for states, counts in self.llama.prefill([prompt], cache):
            memory.observe(states, counts, counts)
        h = states[-1:]
        emitted: list[int] = self.llama.logits(h).argmax(dim=-1).tolist()
        blocks = {depth: self._layout(depth, min(depth, self.teeth)) for depth in range(self.depth + 1)}
        while len(emitted) < tokens:
            depth = min(self.depth, tokens - len(emitted) - 1)
            chain, teeth = self._draft(memory, h, emitted[-1], depth)
            length = cache.lengths[0]
            block = self._block(length, *blocks[depth])
            states = self.llama.run(torch.tensor([emitted[-1], *chain, *teeth]), block, cache)
            choices = self.llama.logits(states).argmax(dim=-1).tolist()
            kept = next((i for i in range(depth) if choices[i] != chain[i]), depth)
            new, node = [*chain[:kept], choices[kept]], kept
            if kept < depth:
                self.rejections += 1
                if kept < len(teeth) and teeth[kept] == choices[kept]:
                    self.hits += 1
                    node = 1 + depth + kept
                    if len(emitted) + len(new) < tokens:
                        new.append(choices[node])
                    for stored in (*cache.keys, *cache.values):
                        stored[:, :, length + kept + 1] = stored[:, :, length + node]
                    kept += 1
            cache.lengths = [length + kept + 1]
            h = states[node : node + 1]
            emitted += new
            self.cycles += 1
        return emitted

    def _draft(self, memory: Any, h: torch.Tensor, token: int, depth: int) -> tuple[list[int], list[int]]:
        """The chain, and the second choice at each of its first depths."""
        memory.begin(h)
        last, best = torch.tensor([token]), []
        for step in range(depth):
            logits = memory.logits(last, None)
            top = logits.topk(2, dim=-1).indices if step < self.teeth else logits.argmax(dim=-1, keepdim=True)
            if self.drafter.vocabulary is not None:
                top = self.drafter.vocabulary[top]
            last = top[:, 0]
            best.append(top[0])
        drafted = [own.tolist() for own in best]
        return [own[0] for own in drafted], [own[1] for own in drafted[: self.teeth]]

    @staticmethod
    def _layout(depth: int, teeth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of a block's tokens after the first, and which of them each sees; the second choice at depth j + 1
        stands where the chain's token does and sees what that sees, without it.
        """
        positions = torch.tensor([*range(depth + 1), *range(1, teeth + 1)])
        sees = torch.zeros(1 + depth + teeth, 1 + depth + teeth, dtype=torch.bool)
        sees[: depth + 1, : depth + 1] = torch.ones(depth + 1, depth + 1, dtype=torch.bool).tril()
        for tooth in range(teeth):
            sees[1 + depth + tooth, : tooth + 1] = True
            sees[1 + depth + tooth, 1 + depth + tooth] = True
        return positions, sees

    def _block(self, length: int, positions: torch.Tensor, sees: torch.Tensor) -> Block:
        width = len(positions)
        visible = torch.cat([sees.new_ones(width, length), sees], dim=1)
        group = self.llama.config.num_attention_heads // self.llama.config.num_key_value_heads
        # A tooth that overruns the context is never kept: the chain ends there.
        at = (length + positions).clamp(max=self.llama.config.max_position_embeddings - 1)
        mask = self.llama.mask(visible[None], group)
        return Block(1, width, self.llama.rotations[at][:, None], mask, length, length + width, None, None)


@dataclass(frozen=True)
class Shape:
    """What is drafted: a chain or a comb of `depth` tokens; plain decoding is a chain of none."""

    drafts: str
    depth: int


PLAIN = Shape("plain", 0)


@dataclass(frozen=True)
class ShapeRow:
    """How fast one shape decodes; `second_choice` is a share of the rejections."""

    drafts: str
    depth: int
    tokens_per_second: float
    speedup: float
    tokens_per_cycle: float
    second_choice: float


def bench_comb_drafts(export: Path, prompts: list[Path], sizes: dict[str, int]) -> Report:
    """A row per shape, and the best comb over the best chain.

    Raises:
        UserError: bad prompts, an export without a latent predictor.
    """
    decoder = load(export, "cpu")
    if decoder.drafter is None or decoder.drafter.longest is not None:
        raise UserError(
            f"{export} has no latent predictor; give the export of a run trained with objective.name=nextlat"
        )
    texts = [decoder.encode(prompt.text) for prompt in load_prompts(prompts, sizes["prompts_per_domain"])]
    loops = {PLAIN: CombLoop(decoder, 0, 0)}
    for depth in range(1, sizes["depths"] + 1):
        loops[Shape("chain", depth)] = CombLoop(decoder, depth, 0)
        loops[Shape("comb", depth)] = CombLoop(decoder, depth, depth)

    def decode(loop: CombLoop) -> int:
        return sum(len(loop.run(ids, sizes["tokens"])) - 1 for ids in texts)

    shown = Progress("comb drafts", len(loops) * (sizes["rounds"] + 1), True)
    with cores(1):
        rates = alternate(
            {shape: partial(decode, loop) for shape, loop in loops.items()},
            sizes["rounds"],
            lambda _: shown.add(len(texts) * sizes["tokens"]),
        )
    tokens = len(texts) * (sizes["rounds"] + 1) * (sizes["tokens"] - 1)
    rows = {shape: _row(shape, loop, rates, tokens) for shape, loop in loops.items()}
    chain, comb = (
        max((shape for shape in rows if shape.drafts == kind), key=lambda shape: rows[shape].speedup) for kind in KINDS
    )
    ratio = rates[comb].ratio_to(rates[chain])
    summary = {
        "comb_to_chain": ratio,
        "chain_depth": chain.depth,
        "comb_depth": comb.depth,
        "second_choice": rows[comb].second_choice,
    }
    text = f"{table(COLUMNS, list(rows.values()))}\nbest comb / best chain: {ratio:.3f}"
    return Report(COMMAND, sizes, summary, list(rows.values()), text=text)


def _row(shape: Shape, loop: CombLoop, rates: Mapping[Shape, Rates], tokens: int) -> ShapeRow:
    return ShapeRow(
        drafts=shape.drafts,
        depth=shape.depth,
        tokens_per_second=rates[shape].median,
        speedup=rates[shape].ratio_to(rates[PLAIN]),
        tokens_per_cycle=tokens / loop.cycles,
        second_choice=loop.hits / loop.rejections if loop.rejections else 0.0,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return run_benchmark(COMMAND, __doc__.split("\n", 1)[0], _measure, arguments, _add_options)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--export", type=Path, required=True, help="written by `nextlat export`, with a latent predictor"
    )
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="files of prompts, or folders of them")


def _measure(options: argparse.Namespace) -> Report:
    return bench_comb_drafts(options.export, options.prompts, QUICK if options.quick else FULL)


if __name__ == "__main__":
    sys.exit(main())
