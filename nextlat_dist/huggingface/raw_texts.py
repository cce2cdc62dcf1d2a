"""Texts as people write them, on which an exported tokenizer is compared with the one of training.

Not what the run's data decode to: a tokenizer that normalises has changed those already.
"""

from __future__ import annotations

import inspect
import json.decoder
import string
import textwrap
import unicodedata
from collections.abc import Iterator
from typing import Any

from nextlat_dist.data.tokenizer import SPACE_SYMBOL, Tokenizer

_WHITESPACE = ("", " ", "  ", " lead", "trail ", "a  b   c", "     deep", "tab\there", "crlf\r\n", "\n\n  x\n", "\0nul")
_SYMBOLS = (
    f"{SPACE_SYMBOL}low",
    SPACE_SYMBOL,
    f"{SPACE_SYMBOL}{SPACE_SYMBOL} {SPACE_SYMBOL}",
    f" {SPACE_SYMBOL} a {SPACE_SYMBOL}b ",
    f"load {SPACE_SYMBOL}\u2582\u2583\u2585 end",
    "<0x41>",
    "byte <0x0A> here, <0xE2><0x96><0x81>",
    "<,<<,>",
)
_LANGUAGES = (
    "Der Fluß überquert die Straße, ½ Liter für 3 €.",
    "Tiếng Việt có rất nhiều dấu, ộ và ữ.",
    "ἐν ἀρχῇ ἦν ὁ λόγος, ᾧ",
    "Съешь ещё этих мягких французских булок, йо",
    "한국어 텍스트입니다.",
    "日本語のテキスト、ガギグ ﾊﾝｶｸ ﾊﾞﾋﾟ １２３ ㌔",
    "中文文本，没有空格。",
    "نص عربي مع تَشكيل",
    "עברית עם נִקּוּד",
    "हिन्दी का पाठ क़",
    "ข้อความภาษาไทย น้ำ",
    "Ｆｕｌｌ ｗｉｄｔｈ ＡＢＣ ～ ﬁne ﬂow ① ② №",
    "e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \ufeff\u00ad\u200b",
)
_CODE = (textwrap, json.decoder, string)


def raw_texts(tokenizer: Tokenizer) -> list[str]:
    """Hard cases, several languages in every normal form, code, characters of the first plane (all that a rule of
    normalisation may change, if the model has rules), and the names of the model's own special pieces; the same for the
    same tokenizer.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    languages = [unicodedata.normalize(form, text) for text in _LANGUAGES for form in ("NFC", "NFD", "NFKC", "NFKD")]
    return [*_WHITESPACE, *_SYMBOLS, *_LANGUAGES, *languages, *_named(model), *_code(), *_characters(model)]


def _named(model: Any) -> Iterator[str]:
    for piece in model.pieces:
        if piece.type not in (piece.NORMAL, piece.BYTE):
            name = piece.piece.replace(SPACE_SYMBOL, " ")
            yield from (name, f"a {name}b{name} c", f"{name}{name}x", f" {name}")


def _code() -> Iterator[str]:
    for module in _CODE:
        source = inspect.getsource(module)
        yield source
        yield from source.splitlines(keepends=True)


def _characters(model: Any) -> Iterator[str]:
    rules = bool(model.normalizer_spec.precompiled_charsmap)
    for code in range(1, 0x10000):
        ideograph = 0x3400 <= code < 0xD7A4  # and Hangul: no rule changes one of them
        wanted = (rules and not ideograph) or code % 64 == 0
        if wanted and unicodedata.category(chr(code)) not in ("Cs", "Cn", "Co"):
            yield chr(code)
