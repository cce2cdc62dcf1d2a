"""The decoding loop: rows of a batch drafted, verified and settled together, each at its own pace.

    for piece in DecodingEngine(llama, drafter, prompts, request, policy, seeds).run(): …

A cycle drafts for every row, runs the base model once over all rows' last tokens and drafts, and keeps of each row
what verification allows: rows accept different numbers of tokens, and none waits for another. A row that ends is
replaced by the last one, so nothing is computed for it any more.

Invariants: a row's tokens, random numbers and decisions come from itself (its neighbours change the rounding of sums,
no more); after a cycle a row's state is the verified h of the last token it kept, and the slots of rejected tokens are
out of reach until they are overwritten.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from nextlat_dist.inference.drafting import Chooser, Drafter
from nextlat_dist.inference.engine.llama import Llama
from nextlat_dist.inference.generation import Cycle, Generation, Piece, Request
from nextlat_dist.inference.speculative.policy import Pace, Policy
from nextlat_dist.inference.speculative.verify import Drafts, DraftStep, verify_greedy, verify_sampled


@dataclass
class _Row:
    number: int
    prompt: list[int]
    limit: int  # tokens that it may emit
    generator: random.Random
    pace: Pace | None
    result: Generation = field(default_factory=Generation)

    @property
    def budget(self) -> int:
        """Tokens that may be drafted: one less than may be emitted, since a cycle always adds one."""
        return self.limit - len(self.result.token_ids) - 1

    def uniforms(self, count: int) -> list[float]:
        return [self.generator.random() for _ in range(count)]


class DecodingEngine:
    """Prompts decoded together; `run` once."""

    def __init__(
        self,
        llama: Llama,
        drafter: Drafter | None,
        prompts: Sequence[list[int]],
        request: Request,
        policy: Policy | None,
        seeds: Sequence[int],
        on_cycle: Callable[[Cycle], None] | None = None,
    ) -> None:
        """`drafter` may be None if nothing is to be drafted; `policy` decides how much is, if that is adaptive."""
        context = llama.config.max_position_embeddings
        self.llama, self.drafter, self.request, self.on_cycle = llama, drafter, request, on_cycle
        self.rows = [
            _Row(
                number,
                prompt,
                min(request.max_new_tokens, context - len(prompt)),
                random.Random(seed),
                policy.pace() if policy else None,
            )
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        self.results = [row.result for row in self.rows]
        # The last emitted token is never fed back.
        capacity = max(len(row.prompt) + row.limit - 1 for row in self.rows)
        self.cache = llama.new_cache(len(prompts), capacity)
        self.memory = drafter.start(len(prompts), capacity) if drafter and request.draft_length != 0 else None
        self.chooser = Chooser(request.sampling, drafter.vocabulary if drafter else None)
        self.h = torch.empty(0)  # [rows, hidden], the verified states that the rows' last tokens were picked from
        self.started = self.prefilled = 0.0

    @torch.inference_mode()
    def run(self) -> Iterator[Piece]:
        """Decode to the end; `results` are complete when the iterator is."""
        try:
            self.started = self.now()
            first = self.prefill()
            self.prefilled = self.now()
            for row in self.rows:
                row.result.prefill_seconds = self.prefilled - self.started
            yield from self.settle([[token] for token in first], [0] * len(first))
            while self.rows:
                yield from self.cycle()
        finally:
            self.cache.release()

    def prefill(self) -> list[int]:
        """Read the prompts and pick each row's first token."""
        prompts = [row.prompt for row in self.rows]
        last: list[torch.Tensor | None] = [None] * len(prompts)
        done = 0
        for states, counts in self.llama.prefill(prompts, self.cache):
            if self.memory:
                self.memory.observe(states, counts, counts)
            ends = torch.tensor(counts).cumsum(0).tolist()
            done += max(counts)
            for row, (count, end) in enumerate(zip(counts, ends, strict=True)):
                if count and len(prompts[row]) <= done:
                    last[row] = states[end - 1].clone()
        self.h = torch.stack([state for state in last if state is not None])
        return self.verify(self.llama.logits(self.h), Drafts(len(self.rows)))[1]

    def cycle(self) -> list[Piece]:
        """Draft, verify, settle; the pieces of all rows."""
        started = self.now()
        drafts, confidences = self.draft()
        drafted_at = self.now()
        tokens = drafts.tokens()
        blocks = [[row.result.token_ids[-1], *tokens[r]] for r, row in enumerate(self.rows)]
        counts = [len(block) for block in blocks]
        flat = torch.tensor([token for block in blocks for token in block], device=self.llama.device)
        states = self.llama.forward(flat, counts, self.cache)
        accepted, following = self.verify(self.llama.logits(states), drafts)
        verified_at = self.now()
        settled = [kept + 1 for kept in accepted]
        if self.memory:
            self.memory.observe(states, counts, settled)
        self.cache.lengths = [
            length - count + kept for length, count, kept in zip(self.cache.lengths, counts, settled, strict=True)
        ]
        ends, start = [], 0
        for count, kept in zip(counts, settled, strict=True):
            ends.append(start + kept - 1)
            start += count
        self.h = states[ends[0] : ends[0] + 1] if len(ends) == 1 else states[torch.tensor(ends, device=states.device)]
        numbers = [row.number for row in self.rows]
        for row, drafted, kept in zip(self.rows, tokens, accepted, strict=True):
            row.result.count(len(drafted), 0)
            if row.pace:
                row.pace.settle(kept)
        pieces = self.settle(
            [[*drafted[:kept], token] for drafted, kept, token in zip(tokens, accepted, following, strict=True)],
            accepted,
        )
        if self.on_cycle:
            spent = (drafted_at - started, verified_at - drafted_at, self.now() - started)
            self.on_cycle(Cycle(numbers, confidences, accepted, *spent))
        return pieces

    def draft(self) -> tuple[Drafts, list[list[float]]]:
        """What every row drafts, and the confidences that were looked at on the way."""
        drafts = Drafts(len(self.rows), self.drafter.vocabulary if self.drafter else None)
        confidences: list[list[float]] = [[] for _ in self.rows]
        if self.memory and self.rows[0].pace:
            self.draft_while_it_pays(drafts, confidences)
        elif self.memory and isinstance(self.request.draft_length, int) and self.request.draft_length:
            self.draft_fixed(self.request.draft_length, drafts, confidences)
        return drafts, confidences

    def draft_fixed(self, length: int, drafts: Drafts, confidences: list[list[float]]) -> None:
        """`length` tokens for every row; rows with a smaller budget leave theirs out whatever they are."""
        budgets = [min(row.budget, length) for row in self.rows]
        steps = max(budgets)
        if steps == 0:
            return
        assert self.memory is not None
        greedy, device = self.request.sampling.greedy, self.llama.device
        numbers = [row.uniforms(0 if greedy else budget) for row, budget in zip(self.rows, budgets, strict=True)]
        uniforms = torch.tensor(
            [own + [0.0] * (steps - len(own)) for own in numbers], dtype=torch.float64, device=device
        )
        tokens = torch.tensor([row.result.token_ids[-1] for row in self.rows], device=device)
        drawn = self.memory.roll(self.chooser, self.h, tokens, uniforms, self.on_cycle is not None)
        ids, values, confident = drawn.tokens.tolist(), drawn.values.tolist(), drawn.confidences.tolist()
        for step in range(steps):
            rows = [row for row, budget in enumerate(budgets) if step < budget]
            draft_step = DraftStep(rows, [ids[row][step] for row in rows])
            if not greedy:
                q = drawn.scores[:, step]
                draft_step.q = q if len(rows) == len(budgets) else q[torch.tensor(rows, device=device)]
                draft_step.q_token = [values[row][step] for row in rows]
            drafts.steps.append(draft_step)
            for row in rows:
                confidences[row] += confident[row][step : step + 1]

    def draft_while_it_pays(self, drafts: Drafts, confidences: list[list[float]]) -> None:
        """Row by row, as long as its pace says so; never after a stop token, which would end the row."""
        assert self.memory is not None
        greedy, device, stops = self.request.sampling.greedy, self.llama.device, self.request.stops.tokens
        paces = [row.pace for row in self.rows if row.pace]
        going = [r for r, row in enumerate(self.rows) if row.budget > 0 and paces[r].begins()]
        if going:
            everyone = len(going) == len(self.rows)
            self.memory.begin(self.h if everyone else self.h[torch.tensor(going, device=device)], going)
        last = torch.tensor([self.rows[r].result.token_ids[-1] for r in going], device=device)
        kept = None
        while going:
            scores = self.chooser.scores(self.memory.logits(last, kept), True)
            confident = self.chooser.confidences(scores).tolist()
            taking = [i for i, r in enumerate(going) if paces[r].takes(confident[i])]
            if not taking:
                return
            if len(taking) < len(going):
                scores = scores[torch.tensor(taking, device=device)]
            rows = [going[i] for i in taking]
            drawn = [0.0 if greedy else self.rows[r].generator.random() for r in rows]
            numbers = torch.tensor(drawn, dtype=torch.float64, device=device)
            chosen, values = self.chooser.choose(scores, numbers)
            tokens = chosen.tolist()
            drafts.steps.append(DraftStep(rows, tokens) if greedy else DraftStep(rows, tokens, scores, values.tolist()))
            on = []  # indices into `rows`
            for index, (r, token) in enumerate(zip(rows, tokens, strict=True)):
                confidences[r].append(confident[taking[index]])
                if token not in stops and len(drafts.steps) < self.rows[r].budget and paces[r].continues():
                    on.append(index)
            kept = None if len(on) == len(going) else torch.tensor([taking[index] for index in on], device=device)
            last = chosen if len(on) == len(rows) else chosen[torch.tensor(on, dtype=torch.int64, device=device)]
            going = [rows[index] for index in on]

    def verify(self, logits: torch.Tensor, drafts: Drafts) -> tuple[list[int], list[int]]:
        """Per row the number of drafts kept and the token after them, from the base model's logits."""
        if self.request.sampling.greedy:
            accepted, following = verify_greedy(logits.argmax(dim=-1).tolist(), drafts)
            if self.llama.half_precision:
                self.note_near_ties(near_ties(logits, self.llama.embedding.dtype).tolist(), drafts, accepted)
            return accepted, following
        counts = [len(tokens) + 1 for tokens in drafts.tokens()]
        uniforms = [row.uniforms(count) for row, count in zip(self.rows, counts, strict=True)]
        return verify_sampled(self.request.sampling.probabilities(logits), drafts, uniforms)

    def note_near_ties(self, tied: list[bool], drafts: Drafts, accepted: list[int]) -> None:
        """Of the tokens that stay; `tied` is laid out as the logits are."""
        start = 0
        for row, drafted, kept in zip(self.rows, drafts.tokens(), accepted, strict=True):
            first = len(row.result.token_ids)
            row.result.near_ties += [first + i for i, tie in enumerate(tied[start : start + kept + 1]) if tie]
            start += len(drafted) + 1

    def settle(self, new: list[list[int]], accepted: list[int]) -> list[Piece]:
        """Add the new tokens to their rows, cut where a row ends, and let ended rows go."""
        pieces, ended, now = [], [], self.now()
        for index, row in enumerate(self.rows):
            result = row.result
            kept, stopped = self.request.stops.cut(row.prompt, result.token_ids, new[index])
            tokens, drafted = new[index][:kept], min(accepted[index], kept)
            result.token_ids += tokens
            while result.near_ties and result.near_ties[-1] >= len(result.token_ids):  # they lay after the end
                result.near_ties.pop()
            result.from_draft += [position < drafted for position in range(kept)]
            for position in range(drafted):
                result.accepted_by_position[position] += 1
            pieces.append(Piece(row.number, tokens, drafted))
            if stopped or len(result.token_ids) == row.limit:
                result.finish_reason = "stop" if stopped else "length"
                result.decode_seconds = now - self.prefilled
                ended.append(index)
        for index in reversed(ended):
            self.remove(index)
        return pieces

    def remove(self, index: int) -> None:
        """Row `index` is done; the last one replaces it."""
        last = len(self.rows) - 1
        if index != last:
            self.cache.move(last, index)
            if self.memory:
                self.memory.move(last, index)
            self.rows[index] = self.rows[last]
            self.h = self.h.clone()
            self.h[index] = self.h[last]
        self.rows.pop()
        self.h = self.h[:last]
        self.cache.shrink(last)

    def now(self) -> float:
        if self.llama.device.type == "cuda" and self.on_cycle:
            torch.cuda.synchronize()
        return time.perf_counter()


def near_ties(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """logits [rows, vocab] of a model in `dtype` → [rows], whether rounding may have chosen between the best two."""
    best = logits.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1] <= torch.finfo(dtype).eps * best[:, 0].abs()
