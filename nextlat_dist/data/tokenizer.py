"""A thin class over sentencepiece that gives every text back: decode(encode(text)) == text.

Invariant: for a model trained by `nextlat-data tokenizer` (byte fallback, identity normalisation, no dummy prefix) the
round trip is exact for all Unicode text. Other sentencepiece models work too; what they change is counted by
`nextlat-data shard`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import sentencepiece

from nextlat_dist.errors import UserError

# sentencepiece writes a space as this character, so that a literal one would come back as a space.
SPACE_SYMBOL = "\u2581"


class Tokenizer:
    """A sentencepiece model file.

    Args:
        path: of the file.
        model: its content, where that is known; the file is not read then.

    Attributes:
        model: content of the file.
        sha256: of the file.
        vocab_size: number of ids.
        bos_id, eos_id, pad_id: -1 where the model has no such token.

    Raises:
        UserError: the file is missing or no sentencepiece model.
    """

    def __init__(self, path: Path, model: bytes | None = None) -> None:
        try:
            self.model = Path(path).read_bytes() if model is None else model
        except OSError as error:
            raise UserError(
                f"tokenizer {path} cannot be read ({error.strerror}); train one with `nextlat-data tokenizer`"
            ) from None
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self.model)
        except RuntimeError:
            raise UserError(
                f"tokenizer {path} is not a sentencepiece model; train one with `nextlat-data tokenizer`"
            ) from None
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int = self._processor.pad_id()
        space_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
        has_bytes = all(map(self._processor.is_byte, space_bytes))
        self._space_symbol_ids = np.array(space_bytes, dtype=np.int32) if has_bytes else None

    @property
    def space_symbol_is_text(self) -> bool:
        """Whether U+2581 in a text is a character of its own; to a model without bytes it is a space."""
        return self._space_symbol_ids is not None

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS and EOS. `text` must be encodable as UTF-8 (no lone surrogates)."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """int32 [tokens]: as `encode`, without a Python object for every token."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_array` of each text."""
        symbol = self._space_symbol_ids
        if symbol is None or not any(SPACE_SYMBOL in text for text in texts):
            return self._encode(texts)
        pieces = iter(self._encode([piece for text in texts for piece in text.split(SPACE_SYMBOL)]))
        joined: list[np.ndarray] = []
        for text in texts:
            parts = [next(pieces)]
            for piece in islice(pieces, text.count(SPACE_SYMBOL)):
                parts += [symbol, piece]
            joined.append(np.concatenate(parts))
        return joined

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids: list[np.ndarray] = self._processor.encode(list(texts), return_type="numpy", num_threads=1)
        return ids

    def given_back(self, ids: np.ndarray, ends: Sequence[int], texts: Sequence[str]) -> list[bool]:
        """For each text whether `decode` of its ids gives it; mostly found without it, in a third of the time.

        Args:
            ids: [tokens] of all texts, with or without BOS and EOS.
            ends: of each text in `ids`, exclusive.
        """
        spelling = self._spelling[ids].tolist() if self._spelling is not None else None
        same: list[bool] = []
        begin = 0
        for end, text in zip(ends, texts, strict=True):
            spelled = spelling is not None and b"".join(spelling[begin:end]) == text.encode()
            same.append(spelled or self.decode(ids[begin:end]) == text)
            begin = end
        return same

    @cached_property
    def _spelling(self) -> np.ndarray | None:
        """object [vocab_size]: UTF-8 bytes of every id, for a model whose texts are their pieces joined, else None."""
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(self.model)
        rules = model.normalizer_spec
        if (
            rules.add_dummy_prefix  # decoding removes spaces again that were never in the text
            or rules.remove_extra_whitespaces
            or model.trainer_spec.treat_whitespace_as_suffix
            or model.denormalizer_spec.precompiled_charsmap
        ):
            return None
        spelling = np.empty(len(model.pieces), dtype=object)
        for number, piece in enumerate(model.pieces):
            if piece.type == piece.BYTE:
                spelling[number] = bytes([int(piece.piece[3:-1], 16)])
            elif piece.type == piece.CONTROL:
                spelling[number] = b""
            elif piece.type in (piece.NORMAL, piece.USER_DEFINED):
                spelling[number] = piece.piece.replace(SPACE_SYMBOL, " ").encode()
            else:
                spelling[number] = b"\xff"  # unknown: in no text, so that the decoder decides
        return spelling

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; BOS, EOS and padding give nothing."""
        return str(self._processor.decode(np.asarray(ids, dtype=np.int32)))  # type: ignore[arg-type]
