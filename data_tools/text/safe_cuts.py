"""Safe places to cut a long text: tokenising the pieces gives the tokens of the whole.

A sentencepiece model never joins two characters that stand next to each other in none of its pieces: nothing on one
side of such a place can change the tokens on the other. Guaranteed for models of type bpe and char; for unigram too,
except where two segmentations of the whole text differ by less than the rounding of their summed scores (float32). For
other types (word) and for normalisation rules of one's own no place is safe.
"""

from __future__ import annotations

import itertools

from nextlat_dist.data.tokenizer import SPACE_SYMBOL

_KNOWN_RULES = ("", "identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")
_WINDOW_BYTES = 1 << 14  # searched at once, from the end


class SafeCuts:
    """Finds the cuts for one model. Args: `model` is the content of its file."""

    def __init__(self, model: bytes) -> None:
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        rules, trained = proto.normalizer_spec, proto.trainer_spec
        self._prefix = rules.add_dummy_prefix
        self._trims = rules.remove_extra_whitespaces
        self._changes = bool(rules.precompiled_charsmap)
        self._possible = (
            trained.model_type in (trained.UNIGRAM, trained.BPE, trained.CHAR)
            and not trained.treat_whitespace_as_suffix
            and rules.escape_whitespaces
            and (not self._changes or rules.name in _KNOWN_RULES)
        )
        pieces = [piece.piece for piece in proto.pieces if piece.type not in (piece.BYTE, piece.CONTROL, piece.UNKNOWN)]
        self._joined = {pair for piece in pieces for pair in itertools.pairwise(piece)}
        # Unknown characters next to each other become one token, unless there are bytes for them.
        self._known = None if trained.byte_fallback else {piece for piece in pieces if len(piece) == 1}

    def last(self, text: bytes, first: int = 1) -> tuple[int, int] | None:
        """The last safe cut at byte `first` or later: (end of the piece, begin of the next), None where there is none.

        A space between them goes when the tokenizer puts one before every text.
        """
        if not self._possible:
            return None
        end = len(text)
        while end > first:
            begin = max(end - _WINDOW_BYTES, first - 4, 0)
            while begin > 0 and text[begin] & 0xC0 == 0x80:  # inside a character
                begin -= 1
            window = text[begin:end].decode("utf-8", "surrogateescape")
            for at in range(len(window) - 1, 0, -1):
                if self._is_safe(window, at):
                    cut = end - len(window[at:].encode("utf-8", "surrogateescape"))
                    if cut < first:
                        return None
                    return cut, cut + self._prefix
            if begin == 0:
                return None
            # Two characters again, since a cut lies between two.
            end = begin + 4 if begin + 4 < end else begin
        return None

    def _is_safe(self, text: str, at: int) -> bool:
        left, right = text[at - 1], text[at]
        if self._prefix:
            # At a single space, which the prefix of the next piece stands for.
            if right != " " or at + 1 == len(text) or not _is_word(left) or not _is_word(text[at + 1]):
                return False
        elif (self._changes or self._trims) and not (_is_word(left) and _is_word(right)):
            return False
        if _is_special(left) or _is_special(right):
            return False
        left, right = (SPACE_SYMBOL if each == " " else each for each in (left, right))
        pairs = {(left, right), (left.lower(), right.lower())} if self._changes else {(left, right)}
        return pairs.isdisjoint(self._joined) and (self._known is None or left in self._known)


def _is_word(character: str) -> bool:
    """A character that no rule of normalisation joins with a neighbour like it."""
    return character.isascii() and character.isalnum()


def _is_special(character: str) -> bool:
    """The space symbol itself, or a byte that is not UTF-8."""
    return character == SPACE_SYMBOL or "\ud800" <= character <= "\udfff"
