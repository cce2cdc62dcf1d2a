"""Documents that `packing: pad` cuts to the length of a row: said when the first is seen, counted, and said at the end.

A row holds one document and no more of it than its length; the rest is in no row, in no epoch.
"""

from __future__ import annotations

from typing import Any

from nextlat_dist.config.schema import RunConfig
from nextlat_dist.training.batches import GlobalBatch
from nextlat_dist.training.metrics import MetricsLog, NoLog


class CutDocuments:
    """Counts of one run, since it was started or resumed."""

    def __init__(self, config: RunConfig, log: MetricsLog | NoLog) -> None:
        self._rows, self._length = config.training.global_batch_size, config.data.sequence_length
        self._counts = config.data.packing == "pad"
        self._log = log
        self._since_report, self._all = Count(), Count()

    def note(self, batch: GlobalBatch, step: int) -> None:
        """Count the documents of the batch of `step`; the first that is cut is worth a warning."""
        if not self._counts:
            return
        first = not self._all.cut
        for count in (self._since_report, self._all):
            count.add(self._rows, batch)
        if first and self._all.cut:
            self._warn(step, "this batch")

    def since_last(self) -> dict[str, float]:
        """For a line of the metrics: what was cut since the line before."""
        count, self._since_report = self._since_report, Count()
        counted = {"documents": count.documents, "document_tokens": count.tokens, "cut_tokens": count.cut_tokens}
        return {**count.entry(), **counted} if self._counts else {}

    def warn_at_the_end(self, step: int) -> None:
        """Say again what was cut, over all batches."""
        if self._all.cut:
            self._warn(step, "all batches")

    def _warn(self, step: int, of: str) -> None:
        self._log.say(f"step {step}  warning: {self._all.sentence(of, self._length)}")
        self._log.write_event({"step": step, "warning": {"cut_in": of, **self._all.entry()}})


class Count:
    """Documents and tokens of some batches."""

    def __init__(self) -> None:
        self.documents = self.cut = self.tokens = self.cut_tokens = 0

    def add(self, documents: int, batch: GlobalBatch) -> None:
        self.documents += documents
        self.cut += batch.cut_documents
        self.tokens += batch.real_tokens + batch.cut_tokens
        self.cut_tokens += batch.cut_tokens

    def entry(self) -> dict[str, Any]:
        return {
            "cut_documents": self.cut,
            "cut_documents_share": self.cut / max(self.documents, 1),
            "cut_tokens_share": self.cut_tokens / max(self.tokens, 1),
        }

    def sentence(self, of: str, length: int) -> str:
        documents, tokens = self.cut / self.documents, self.cut_tokens / self.tokens
        return (
            f"data.packing=pad cut {self.cut:,} of {self.documents:,} documents of {of} ({documents:.1%}) to a row of "
            f"{length} + 1 tokens: {self.cut_tokens:,} of {self.tokens:,} tokens ({tokens:.1%}) are in no row; raise "
            "data.sequence_length or use data.packing=concat"
        )
