"""A second stack of decoder layers that reads every document from its end: entries of the layer list, before the
objective.

It runs causally over the row in reverse: state j has read x_j and what follows it in its document, rotary positions
counted from the row's end. Reversed tokens are x_s .. x_1, so that the last token of a row is read too, which the
forward stack only ever predicts.
"""

from __future__ import annotations

from typing import Any

import torch

from nextlat_dist.model.decoder_layer import DecoderLayer, FinalNorm, scatter_sequence
from nextlat_dist.model.embedding import TokenEmbedding
from nextlat_dist.model.rows import Batch, ObjectiveInputs


class BackwardLayer(DecoderLayer):
    def __init__(self, layer_index: int, **decoder_layer: Any) -> None:
        super().__init__(layer_index=layer_index, **decoder_layer)
        self.canonical_prefix = f"backward.layers.{layer_index}"


class BackwardNorm(FinalNorm):
    canonical_prefix = "backward.final_layernorm"


def reversed_message(message: torch.Tensor) -> torch.Tensor:
    """The message of the rows from their ends; made once for all layers that see this message."""
    known: torch.Tensor | None = getattr(message, "_reversed", None)
    if known is None:
        batch = Batch(message)
        parts = (batch.tokens, batch.document_ids, batch.loss_mask, batch.labels)
        turned = Batch.of(*(part.flip(1) for part in parts))
        known = message._reversed = turned.message  # type: ignore[attr-defined]
    return known


def embed_backward(embedding: TokenEmbedding, inputs: ObjectiveInputs) -> ObjectiveInputs:
    """Entry of the list: adds the embedded tokens x_s .. x_1 [s (local), b, h]."""
    whole = embedding.whole(reversed_message(inputs.message))
    return inputs._replace(backward=scatter_sequence(whole, embedding.scattered_over))


def layer_backward(layer: DecoderLayer, inputs: ObjectiveInputs) -> ObjectiveInputs:
    """Entry of the list: one layer of the second stack."""
    assert inputs.backward is not None
    state, _ = layer((inputs.backward, reversed_message(inputs.message)))
    return inputs._replace(backward=state)


def norm_backward(norm: BackwardNorm, inputs: ObjectiveInputs) -> ObjectiveInputs:
    """Its last entry: states of x_1 .. x_s, in the order of the row [s, b, h]."""
    assert inputs.backward is not None
    states = norm((inputs.backward, inputs.message)).hidden  # called as a module: ZeRO-3 gathers its weight then
    return inputs._replace(backward=states.flip(0))
