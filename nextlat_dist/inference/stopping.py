"""The end of a continuation: at a stop token, or at the token that completes a stop string.

New tokens come in blocks; what lies after the end is cut off, so the result does not depend on how blocks fall.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# (context ids, ids) -> the text that the ids add after the context
ContinuationText = Callable[[Sequence[int], Sequence[int]], str]
CONTEXT_TOKENS = 8  # enough for a tokenizer to know whether it is at the beginning, and inside which character


@dataclass(frozen=True)
class Stops:
    """Stop tokens, and stop strings with what turns tokens into the text to look for them in."""

    tokens: frozenset[int]
    strings: tuple[str, ...] = ()
    text: ContinuationText | None = None

    def cut(self, prompt: Sequence[int], settled: Sequence[int], new: Sequence[int]) -> tuple[int, bool]:
        """How many of the `new` tokens after `prompt` and `settled` stay, and whether the continuation ends there.

        A stop string counts once all of it lies in the continuation.
        """
        end = next((index + 1 for index, token in enumerate(new) if token in self.tokens), None)
        kept = len(new) if end is None else end
        if self.strings and self._found(prompt, settled, new[:kept]):
            return next(n for n in range(1, kept + 1) if self._found(prompt, settled, new[:n])), True
        return kept, end is not None

    def _found(self, prompt: Sequence[int], settled: Sequence[int], new: Sequence[int]) -> bool:
        """Is there a stop string that the new tokens complete? It has as many tokens as bytes at most (special tokens
        inside it aside).
        """
        assert self.text is not None
        window = len(new) + max(len(string.encode()) for string in self.strings) + CONTEXT_TOKENS
        seen = settled[-window:] if len(settled) > window else settled
        context = settled[: len(settled) - len(seen)] or prompt
        text = self.text(context[-CONTEXT_TOKENS:], [*seen, *new])
        return any(string in text for string in self.strings)

    def before(self, text: str) -> str:
        """The text up to the first stop string."""
        return text[: min((at for string in self.strings if (at := text.find(string)) >= 0), default=len(text))]
