"""A batch of token rows, the one tensor that carries it between layers, and what an objective is called with.

Between layers travels `(hidden, message)`: `hidden` is [s, b, h]; `message` is one integer tensor that holds a whole
`Batch`, so that every pipeline stage has what it needs and a message between stages has exactly one tensor with a
gradient. Its layout is known here alone: a layer that needs a part of it asks `Batch(message)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Batch:
    """Rows of s + 1 tokens, of which the first s are read and the last s predicted.

    Attributes:
        message: int64 [b, 4 (s + 1) + 1]: of each row the tokens, document numbers, loss mask and labels, then the
            number of the row; and one column more where masks are the release's. The rest are views of it.
        documents: no fewer than its rows have, padding at their ends included, where the host knows; see `attention`.
    """

    message: torch.Tensor
    documents: int | None = None

    @classmethod
    def of(
        cls,
        tokens: torch.Tensor,
        document_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        first_row: int | torch.Tensor = 0,
    ) -> Batch:
        """From [b, s + 1] each; the tokens are their own labels where none are given, rows count from `first_row`."""
        numbers = first_row + torch.arange(len(tokens), device=tokens.device)[:, None]
        parts = (tokens, document_ids, loss_mask, tokens if labels is None else labels, numbers)
        return cls(torch.cat([part.long() for part in parts], dim=1))

    def as_released(self) -> Batch:
        """With documents, targets and masks as the authors' release has them (`objective.semantics`).

        The last token of a document, its end, is the first of the next one; the token that follows it is a target where
        the token after that is one. The last token of the row stays: whether its document ends there is not known.
        """
        documents, targets = self.document_ids, self.loss_mask.clone()
        ends = torch.zeros_like(targets)
        ends[:, :-1] = (documents[:, :-1] >= 0) & (documents[:, :-1] != documents[:, 1:])
        follows = ends[:, :-2] & (documents[:, 1:-1] >= 0) & (documents[:, 1:-1] == documents[:, 2:])
        targets[:, 1:-1] |= follows & targets[:, 2:]
        parts = (self.tokens, documents + ends, targets, self.labels, self.row_numbers[:, None])
        return Batch(torch.cat([*(part.long() for part in parts), torch.ones_like(parts[-1])], dim=1), self.documents)

    @property
    def width(self) -> int:
        """s + 1."""
        return (self.message.shape[1] - 1) // 4

    @property
    def released(self) -> bool:
        """Whether masks are the release's."""
        return self.message.shape[1] % 4 == 2

    def _part(self, number: int) -> torch.Tensor:
        return self.message[:, number * self.width : (number + 1) * self.width]

    @property
    def tokens(self) -> torch.Tensor:
        """[b, s + 1]."""
        return self._part(0)

    @property
    def document_ids(self) -> torch.Tensor:
        """[b, s + 1]: number of the document inside its row, growing along it; -1 on padding."""
        return self._part(1)

    @property
    def loss_mask(self) -> torch.Tensor:
        """bool [b, s + 1]: where the token is a training target."""
        return self._part(2).bool()

    @property
    def labels(self) -> torch.Tensor:
        """[b, s + 1]: what is predicted instead of each token, mostly the token."""
        return self._part(3)

    @property
    def row_numbers(self) -> torch.Tensor:
        """[b]: of the rows in the stream of the run."""
        return self.message[:, 4 * self.width]

    @property
    def inputs(self) -> torch.Tensor:
        """[b, s]: the tokens that are read."""
        return self.tokens[:, :-1]

    @property
    def input_documents(self) -> torch.Tensor:
        """[b, s]: the document numbers of the tokens that are read."""
        return self.document_ids[:, :-1]

    @property
    def real_tokens(self) -> torch.Tensor:
        """How many of the tokens are no padding: int64 scalar."""
        return (self.document_ids >= 0).sum()

    def most_documents(self, rows: int) -> torch.Tensor:
        """Of so many rows together, the most that follow one another; padding in a row is one: int64 scalar."""
        begins = first_of_document(self.input_documents).sum(dim=1)
        return torch.stack([part.sum() for part in begins.split(rows)]).max()

    @property
    def attended(self) -> torch.Tensor:
        """How many keys the tokens that are read attend to, all together: of a document of n tokens, 1 + 2 + … + n;
        of padding none. int64 scalar.
        """
        documents = self.input_documents
        place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
        first = torch.where(first_of_document(documents), place, 0).cummax(dim=1).values
        return torch.where(documents >= 0, place - first + 1, 0).sum()

    @property
    def targets(self) -> torch.Tensor:
        """[s, b]: what is to be predicted at each position."""
        return self.labels[:, 1:].t()

    def __len__(self) -> int:
        return len(self.message)

    def split(self, rows: int) -> list[Batch]:
        """Batches of `rows` rows each."""
        return [Batch(part, self.documents) for part in self.message.split(rows)]

    def chunk(self, parts: int) -> list[Batch]:
        """So many equal batches."""
        return [Batch(part) for part in self.message.chunk(parts)]


def first_of_document(document_ids: torch.Tensor) -> torch.Tensor:
    """Of [b, s]: bool [b, s], whether the position is the first of its document, or of padding, in its row."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return begins


class ObjectiveInputs(NamedTuple):
    """What the last layer of the list is called with."""

    hidden: torch.Tensor  # final hidden states h [s, b, h]
    message: torch.Tensor
    embedded: torch.Tensor | None = None  # e(x) [s, b, h], for objectives that read the embedding
    tied_weight: torch.Tensor | None = None  # the embedding's weight [vocab (local), h], where the head is tied to it
    backward: torch.Tensor | None = None  # states of x_1 .. x_s from their documents' ends [s, b, h], where there are

    @property
    def batch(self) -> Batch:
        return Batch(self.message)
