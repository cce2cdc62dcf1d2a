"""A thin class over sentencepiece that gives every text back: decode(encode(text)) == text.

Invariant: for a model trained by `nextlat-data tokenizer` (byte fallback, identity normalisation, no dummy prefix) the
round trip is exact for all Unicode text. Other sentencepiece models work too; what they change is counted by
`nextlat-data shard`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from nextlat_dist.errors import UserError

# sentencepiece writes a space as this character, so that a literal one would come back as a space.
SPACE_SYMBOL = "\u2581"


class Tokenizer:
    """A sentencepiece model file.

    Attributes:
        model: content of the file.
        sha256: of the file.
        vocab_size: number of ids.
        bos_id, eos_id, pad_id: -1 where the model has no such token.

    Raises:
        UserError: the file is missing or no sentencepiece model.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.model = Path(path).read_bytes()
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
        self._space_symbol_ids = space_bytes if all(map(self._processor.is_byte, space_bytes)) else None

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS and EOS. `text` must be encodable as UTF-8 (no lone surrogates)."""
        if self._space_symbol_ids is None or SPACE_SYMBOL not in text:
            return list(self._processor.encode(text))
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE_SYMBOL)):
            ids += self._space_symbol_ids if number else []
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; BOS, EOS and padding give nothing."""
        return str(self._processor.decode([int(token) for token in ids]))
