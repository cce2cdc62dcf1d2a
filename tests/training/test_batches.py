"""A global batch reaches every rank: broadcast inside a model group, counted over all, and an error is everyone's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch

from nextlat_dist.config.schema import ObjectiveConfig
from nextlat_dist.data.loader import Cursor, RowBatch, RowLoader
from nextlat_dist.data.packing import batch_digest
from nextlat_dist.errors import UserError
from nextlat_dist.model.rows import Batch
from nextlat_dist.objective.terms import term_counts
from nextlat_dist.training.batches import BatchSource
from tests.kit import jobs
from tests.kit.harness import Ranks

ROWS, BIG = 8, 2**24 + 1  # a token id that fp32 could not carry
FIRST_ROW = 2**33 + 5  # nor int32 this row
OBJECTIVE = ObjectiveConfig(horizon=2)


def global_rows() -> Batch:
    batch = jobs.ragged_rows(ROWS, seed=4)
    batch.tokens[0, 0] = batch.labels[0, 1] = BIG
    batch.row_numbers[:] = FIRST_ROW + torch.arange(ROWS)
    return batch


def as_read(batch: Batch) -> RowBatch:
    tokens, documents, labels = (
        part.to(torch.int32).contiguous().numpy() for part in (batch.tokens, batch.document_ids, batch.labels)
    )
    return RowBatch(tokens, documents, batch.loss_mask.numpy(), labels)


@dataclass
class FakeLoader:
    """This data-parallel rank's part of `global_rows`, or an error from the given batch on."""

    rank: int
    size: int
    fails_at: int | None
    batches: int = 0
    new_losses: tuple[()] = ()
    cut: tuple[int, int] = (0, 0)

    @property
    def cursor(self) -> Cursor:
        return Cursor(row=FIRST_ROW, taken={"rows": self.batches})

    def epochs(self) -> dict[str, float]:
        return {}

    @property
    def shares(self) -> dict[str, float]:
        return {}

    def next_batch(self) -> RowBatch:
        self.batches += 1
        self.cut = (1 + self.rank, 10 * self.rank)
        if self.fails_at is not None and self.batches >= self.fails_at:
            raise UserError(f"reader {self.rank} found a damaged record")
        return as_read(global_rows().chunk(self.size)[self.rank])


def read(
    parallel: dict[str, Any],
    failing_reader: int | None = None,
    ahead: bool = False,
    objective: ObjectiveConfig = OBJECTIVE,
) -> dict[str, Any]:
    """Two batches on this rank: its micro-batches and the counts, or the error of each. `ahead`: each is prepared."""
    config, dims = jobs.set_up(jobs.tiny_config(parallel=parallel))
    reads = dims.rank == dims.model_group_source
    loader = FakeLoader(dims.data_rank, dims.data_size, 2 if failing_reader == dims.data_rank else None)
    source = BatchSource(
        cast(RowLoader, loader) if reads else None,
        dims,
        rows=ROWS // dims.data_size,
        micro_batch_size=2,
        sequence_length=config.data.sequence_length,
        objective=objective,
        device=torch.device("cpu"),
        hashes=True,
    )
    answer: dict[str, Any] = {
        "loader": loader,
        "reads": reads,
        "data_rank": dims.data_rank,
        "data_size": dims.data_size,
        "errors": [],
    }
    for _ in range(2):
        try:
            if ahead:
                before = source.progress
                source.prepare()
                source.prepare()  # the batch under way
                assert source.progress == before
            batch = source.next()
            answer |= {"rows": batch.micro_batches, "counts": batch.counts, "digest": batch.digest}
            answer["sums"] = (batch.cut_documents, batch.cut_tokens, batch.real_tokens, batch.attended)
            answer["errors"].append("")
        except UserError as error:
            answer["errors"].append(str(error))
    return answer


LAYOUTS: dict[str, dict[str, int]] = {
    "dp4": {},
    "tp2-dp2": {"tensor_model_parallel_size": 2},
    "pp2-dp2": {"pipeline_model_parallel_size": 2},
    "tp2-pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_its_rows_and_the_counts_of_all(layout: str, ahead: bool, four_ranks: Ranks) -> None:
    whole = global_rows()
    for answer in four_ranks.run(read, LAYOUTS[layout], None, ahead):
        assert answer["loader"].batches == 2 * answer["reads"]
        assert answer["errors"] == ["", ""]
        assert torch.equal(
            torch.cat([batch.message for batch in answer["rows"]]),
            whole.chunk(answer["data_size"])[answer["data_rank"]].message,
        )
        assert {len(rows) for rows in answer["rows"]} == {2}
        assert torch.equal(answer["counts"], term_counts(whole, OBJECTIVE))
        ranks = range(answer["data_size"])
        cut = (sum(1 + rank for rank in ranks), sum(10 * rank for rank in ranks))
        assert answer["sums"] == (*cut, int(whole.real_tokens), int(whole.attended))
        assert answer["digest"] == (batch_digest(as_read(whole).row_digests()) if answer["reads"] else "")


def test_as_the_release_has_them(four_ranks: Ranks) -> None:
    """Documents of the release, and what is counted are the micro-batches of all ranks that have something."""
    whole, objective = global_rows().as_released(), replace(OBJECTIVE, semantics="release")
    assert not torch.equal(whole.document_ids, global_rows().document_ids)
    for answer in four_ranks.run(read, LAYOUTS["tp2-dp2"], None, False, objective):
        found = torch.cat([batch.message for batch in answer["rows"]])
        assert torch.equal(found, whole.chunk(answer["data_size"])[answer["data_rank"]].message)
        assert torch.equal(answer["counts"], term_counts(whole, objective, 2))
        assert answer["counts"][0] == ROWS / 2


@pytest.mark.parametrize("failing_reader", [0, 1])
@pytest.mark.parametrize("layout", ["tp2-dp2", "pp2-dp2"])
@pytest.mark.parametrize("ahead", [False, True])
def test_an_error_of_one_reader_is_an_error_on_every_rank(
    layout: str, failing_reader: int, ahead: bool, four_ranks: Ranks
) -> None:
    for answer in four_ranks.run(read, LAYOUTS[layout], failing_reader, ahead):
        assert answer["errors"] == ["", f"reader {failing_reader} found a damaged record"]
