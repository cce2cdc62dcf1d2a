"""A sentencepiece model as Hugging Face tokenizer files, loadable by `AutoTokenizer` with no flag.

The files are compared with sentencepiece itself on raw text (`huggingface.raw_texts`), so that a model that cannot be
expressed is refused at export and not noticed at use. What is written stands in `huggingface.fast_tokenizer`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from nextlat_dist.files import TOKENIZER_FILE
from nextlat_dist.huggingface.fast_tokenizer import ADVICE, NORMAL, REFUSED, UNIGRAM, express, model_of, token_name
from nextlat_dist.huggingface.raw_texts import raw_texts
from nextlat_dist.huggingface.stored import read_fields

FAST_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
# Two segmentations of a unigram model are equally likely up to the rounding of sentencepiece's float32 sums.
_ROUNDING_RELATIVE, _ROUNDING_ABSOLUTE = 2e-6, 1e-4


def export_tokenizer(model: Path, output: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the sentencepiece model itself into `output`.

    Raises:
        UserError: the model has no Hugging Face form.
    """
    tokenizer = Tokenizer(model)
    # Not by `save`: what the system refuses there is an Exception without a kind.
    (output / FAST_FILE).write_text(express(tokenizer).to_str(pretty=True), encoding="utf-8")
    proto = model_of(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": bool(proto.normalizer_spec.add_dummy_prefix),  # llama.cpp and others assume one
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",  # a batch of prompts continues at its right
        **_special_tokens(proto),
    }
    (output / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(model, output / TOKENIZER_FILE)


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """bos_token_id, eos_token_id and pad_token_id; None where the model has none."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {name: value if value >= 0 else None for name, value in ids.items()}


@dataclass(frozen=True)
class _Difference:
    text: str
    training: list[int]
    exported: list[int]


def compare(tokenizer: Tokenizer, output: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Compare the exported files with sentencepiece, on `texts` and on raw text; what is reported of it.

    `tokenizer_round_trip`: whether every one of `texts` comes back. `tokenizer_ids_identical`: whether all ids are
    those of training. A unigram model may segment a text in another, equally likely way, where the two libraries round
    their sums differently: then `tokenizer_texts_with_other_ids` counts them.

    Raises:
        UserError: other ids for a text.
    """
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(str(output), trust_remote_code=False)
    everything = [*texts, *raw_texts(tokenizer)]
    encoded = exported.backend_tokenizer.encode_batch(everything, add_special_tokens=False)
    theirs: list[list[int]] = [text.ids for text in encoded]
    ours = [ids.tolist() for ids in tokenizer.encode_all(everything)]
    differences = [_Difference(*found) for found in zip(everything, ours, theirs, strict=True) if found[1] != found[2]]
    proto = model_of(tokenizer)
    wrong = [found for found in differences if not _equally_likely(proto, found)]
    if wrong:
        shown = min(wrong, key=lambda found: len(found.text))
        raise UserError(
            f"{REFUSED}: {_short(shown.text)} is {_short(shown.training)} in training and {_short(shown.exported)} "
            f"there; {ADVICE}"
        )
    decoded = [exported.decode(ids, skip_special_tokens=True) for ids in theirs[: len(texts)]]
    report: dict[str, Any] = {
        "tokenizer_round_trip": decoded == list(texts),
        "tokenizer_ids_identical": not differences,
        "tokenizer_texts_compared": len(everything),
    }
    return report | ({"tokenizer_texts_with_other_ids": len(differences)} if differences else {})


def _equally_likely(proto: Any, found: _Difference) -> bool:
    if proto.trainer_spec.model_type != UNIGRAM:
        return False
    pieces = proto.pieces
    sums, others = [], []
    for ids in (found.training, found.exported):
        sums.append([pieces[index].score for index in ids if pieces[index].type == NORMAL])
        others.append([index for index in ids if pieces[index].type != NORMAL])
    allowed = _ROUNDING_ABSOLUTE + _ROUNDING_RELATIVE * sum(map(abs, sums[0]))
    return others[0] == others[1] and abs(sum(sums[0]) - sum(sums[1])) <= allowed


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _special_tokens(proto: Any) -> dict[str, str]:
    spec = proto.trainer_spec
    ids = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    return {name: token_name(proto.pieces[index]) for name, index in ids.items() if index >= 0}


class TrainingTokenizer:
    """sentencepiece's own file with the two methods of a `transformers` tokenizer that decoding needs."""

    def __init__(self, model: Path) -> None:
        """Raises UserError: the file is no sentencepiece model."""
        self._tokenizer = Tokenizer(model)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`; with `add_special_tokens` after BOS, if there is one."""
        bos = self._tokenizer.bos_id
        return [*([bos] if add_special_tokens and bos >= 0 else []), *self._tokenizer.encode(text)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; special tokens give nothing, ids that the tokenizer does not have neither."""
        assert skip_special_tokens
        return self._tokenizer.decode([index for index in ids if index < self._tokenizer.vocab_size])


def load_tokenizer(export: Path) -> Any:
    """The `transformers` tokenizer in `export`; `TrainingTokenizer` where there is sentencepiece's file alone.

    Raises:
        UserError: there is none that transformers loads without code from there, or a file is damaged.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    fast = os.path.isfile(export / FAST_FILE)
    if not fast and os.path.isfile(export / TOKENIZER_FILE) and not os.path.isfile(export / CONFIG_FILE):
        return TrainingTokenizer(export / TOKENIZER_FILE)
    for name in (FAST_FILE, CONFIG_FILE):
        if os.path.isfile(export / name):
            read_fields(export / name, "export the run again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=False)
        tokenizer.decode(tokenizer.encode("a b", add_special_tokens=False), skip_special_tokens=True)  # it works
        return tokenizer
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, StrictDataclassError) as error:
        # The files are read by transformers, which answers foreign values in them in all these ways.
        raise _refused(export, error) from None
    except Exception as error:
        if type(error) is not Exception:  # the Rust library's own errors have no class
            raise
        raise _refused(export, error) from None


def _refused(export: Path, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return UserError(
        f"{export} has no tokenizer that transformers loads without code from there ({reason}); export the run again"
    )
