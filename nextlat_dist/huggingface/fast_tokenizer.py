"""A sentencepiece model as a tokenizer of the `tokenizers` library that gives its ids, on any text.

    express(Tokenizer(path)) -> tokenizers.Tokenizer

What differs between the two libraries, and what is done about it:

- A space is a space in the pieces here, not U+2581 as sentencepiece writes it: U+2581 in a text is then a character
  like any other, as it is to `data.tokenizer`.
- sentencepiece finds the names of control, unknown and byte pieces in no text: "<s>" is three characters. `tokenizers`
  finds special tokens in every text, so their names here end in a character that no text has (`NAME_END`). Names of
  bytes have to stay; only a unigram model would find one, so "<" is written as another character to it (`LESS`).
- A user-defined piece is one token before anything else happens. Where nothing happens to a text it is an added token;
  where a text is normalised, its text becomes one private character first. One with a space is found in no text.
- `Precompiled` applies sentencepiece's rules of normalisation to single characters, and loses marks of longer clusters
  (decomposed Vietnamese); `NFC` before and after it composes (Hangul, Greek, halfwidth Katakana), as those rules do.

sentencepiece's models of words, pieces that are unused, whitespace as a suffix and unescaped whitespace have no
counterpart and are refused.
"""

from __future__ import annotations

from typing import Any

from nextlat_dist.data.tokenizer import SPACE_SYMBOL, Tokenizer
from nextlat_dist.errors import UserError

UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4  # sentencepiece's TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # sentencepiece's ModelProto.SentencePiece.Type

# Noncharacters: Unicode promises that they are never assigned, so that no text has them.
NAME_END = "\uffff"
LESS = "\ufdd0"
SYMBOL = "\ufdd1"  # U+2581 of a text, while it is normalised
COMPOSING = ("nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")  # sentencepiece's own sets of rules
FIRST_USER_DEFINED = 0x100000  # private use, plane 16
REFUSED = "the tokenizer of this run has no Hugging Face form that gives the ids of training"
ADVICE = "export with --no-tokenizer, which keeps sentencepiece's own file alone (nextlat decodes with that)"


def model_of(tokenizer: Tokenizer) -> Any:
    """sentencepiece's description of the model."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)


def token_name(piece: Any) -> str:
    """What the piece is called where it is a special token."""
    return str(piece.piece) + NAME_END


def express(tokenizer: Tokenizer) -> Any:
    """The `tokenizers.Tokenizer` of a sentencepiece model, with a BOS in front if it has one.

    Raises:
        UserError: the model has something that `tokenizers` cannot do.
    """
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import processors

    proto = model_of(tokenizer)
    _check(proto)
    plan = _Pieces(proto)
    fast = FastTokenizer(plan.model())
    fast.normalizer = _normalizer(plan, tokenizer.space_symbol_is_text)
    fast.decoder = _decoder(plan)
    fast.add_special_tokens([_added(token_name(p), special=True) for p in proto.pieces if p.type in (CONTROL, UNKNOWN)])
    fast.add_tokens([_added(name, special=False) for name in plan.added])
    bos = proto.trainer_spec.bos_id
    if bos >= 0:  # as in training, where every document begins with BOS
        token = {"id": "BOS", "ids": [bos], "tokens": [token_name(proto.pieces[bos])]}
        fast.post_processor = processors.TemplateProcessing(
            single="BOS $A", pair="BOS $A BOS $B", special_tokens=[token]
        )
    return fast


def _check(proto: Any) -> None:
    spec = proto.trainer_spec
    reason = None
    if spec.model_type not in (UNIGRAM, BPE, CHAR):
        reason = "it is a model of whole words (--model_type=word)"
    elif spec.treat_whitespace_as_suffix:
        reason = "it writes a space after its word (--treat_whitespace_as_suffix)"
    elif not proto.normalizer_spec.escape_whitespaces:
        reason = "its spaces are not escaped"
    elif any(piece.type == UNUSED for piece in proto.pieces):
        reason = "some of its pieces are unused"
    elif _changes_text(proto) and any(
        piece.type == USER_DEFINED and {" ", SPACE_SYMBOL} & set(piece.piece) for piece in proto.pieces
    ):
        reason = "it has user-defined pieces with spaces and changes the spaces of a text"
    if reason:
        raise UserError(f"{REFUSED}: {reason}; {ADVICE}")


def _changes_text(proto: Any) -> bool:
    rules = proto.normalizer_spec
    return bool(rules.add_dummy_prefix or rules.remove_extra_whitespaces or rules.precompiled_charsmap)


class _Pieces:
    """The names of a model's pieces in the exported vocabulary."""

    def __init__(self, proto: Any) -> None:
        self.proto = proto
        self.byte_fallback: bool = proto.trainer_spec.byte_fallback
        self.hides_less = proto.trainer_spec.model_type == UNIGRAM and self.byte_fallback
        self.changes_text = _changes_text(proto)
        self.added: list[str] = []  # user-defined pieces that are found before anything else happens
        self.private: list[tuple[str, str]] = []  # text of a user-defined piece, longest first, its private character
        self.names = [self._name(piece) for piece in proto.pieces]
        self.private.sort(key=lambda pair: -len(pair[0]))

    def _name(self, piece: Any) -> str:
        text: str = piece.piece.replace(SPACE_SYMBOL, " ")
        if piece.type in (CONTROL, UNKNOWN) or (piece.type == USER_DEFINED and " " in piece.piece):
            return token_name(piece)
        if piece.type == BYTE:
            return str(piece.piece)
        if piece.type == USER_DEFINED:
            if not self.changes_text:
                self.added.append(text)
                return text
            self.private.append((text, chr(FIRST_USER_DEFINED + len(self.private))))
            return self.private[-1][1]
        return text.replace("<", LESS) if self.hides_less else text

    def model(self) -> Any:
        from tokenizers.models import BPE as BpeModel
        from tokenizers.models import Unigram as UnigramModel

        spec = self.proto.trainer_spec
        if spec.model_type == UNIGRAM:
            scored = [(name, piece.score) for name, piece in zip(self.names, self.proto.pieces, strict=True)]
            return UnigramModel(scored, unk_id=spec.unk_id, byte_fallback=self.byte_fallback)
        return BpeModel(
            vocab={name: index for index, name in enumerate(self.names)},
            merges=self._merges() if spec.model_type == BPE else [],
            unk_token=self.names[spec.unk_id],
            fuse_unk=True,
            byte_fallback=self.byte_fallback,
        )

    def _merges(self) -> list[tuple[str, str]]:
        """Every way to cut a piece in two, best piece first: sentencepiece joins the pair with the best result."""
        ids = {name: index for index, name in enumerate(self.names) if self.proto.pieces[index].type == NORMAL}
        merges = []
        for name, index in ids.items():
            cuts = [(name[:i], name[i:]) for i in range(1, len(name))]
            pairs = [(left, right) for left, right in cuts if left in ids and right in ids]
            pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
            merges += [(self.proto.pieces[index].score, pair) for pair in pairs]
        return [pair for _, pair in sorted(merges, key=lambda item: -item[0])]


def _normalizer(plan: _Pieces, symbol_is_text: bool) -> Any:
    """sentencepiece's normalizer, step by step; where U+2581 is text, what lies between two of them is a text of its
    own, as in `Tokenizer.encode_all`.
    """
    from tokenizers import Regex, normalizers

    rules = plan.proto.normalizer_spec
    steps: list[Any] = [normalizers.Replace(text, private) for text, private in plan.private]
    if symbol_is_text and plan.changes_text:
        steps.append(normalizers.Replace(SPACE_SYMBOL, SYMBOL))
    if rules.precompiled_charsmap:
        compose: list[Any] = [normalizers.NFC()] if rules.name in COMPOSING else []
        steps += [*compose, normalizers.Precompiled(rules.precompiled_charsmap), *compose]
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        ends = rf"\A +| +\z| +(?={SYMBOL})|(?<={SYMBOL}) +"
        steps.append(normalizers.Replace(Regex(ends if symbol_is_text else rf"\A +|[ {SPACE_SYMBOL}]+\z"), ""))
    if rules.add_dummy_prefix:
        starts = rf"\A(?=[^{SYMBOL}])|(?<={SYMBOL})(?=[^{SYMBOL}])"
        steps.append(normalizers.Replace(Regex(starts if symbol_is_text else r"\A"), " "))
    if not symbol_is_text:
        steps.append(normalizers.Replace(SPACE_SYMBOL, " "))
    elif plan.changes_text:
        steps.append(normalizers.Replace(SYMBOL, SPACE_SYMBOL))
    if plan.hides_less:
        # "<" → LESS, and LESS itself → the names of its bytes; a comma keeps the two apart meanwhile.
        names = "".join(f"<0x{byte:02X}>" for byte in LESS.encode())
        steps += [normalizers.Replace(*pair) for pair in (("<", "<,"), (LESS, names), ("<,", LESS))]
    return normalizers.Sequence(steps) if steps else None


def _decoder(plan: _Pieces) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(LESS, "<")] if plan.hides_less else []
    steps += [decoders.Replace(private, text) for text, private in plan.private]
    steps += [decoders.ByteFallback(), decoders.Fuse()]
    if plan.proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _added(name: str, *, special: bool) -> Any:
    from tokenizers import AddedToken

    return AddedToken(name, normalized=False, special=special)
