"""Exported tokenizers give the ids of training, whatever `spm_train` made, or are refused."""

from __future__ import annotations

import inspect
import json
import shutil
import textwrap
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.fast_tokenizer import model_of
from nextlat_dist.huggingface.tokenizer import _Difference, _equally_likely, compare, export_tokenizer
from nextlat_dist.inference import load
from tests.kit.exports import random_weights, tiny_config, write_export

LOSSLESS = {
    "normalization_rule_name": "identity",
    "byte_fallback": True,
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
}
USER = {"user_defined_symbols": ["<sep>", "    "], "control_symbols": ["<mask>"], "pad_id": 3}
MODELS: dict[str, dict[str, Any]] = {
    "default-unigram": {"model_type": "unigram"},
    "default-bpe": {"model_type": "bpe"},
    "default-char": {"model_type": "char"},
    "default-bpe-user": {"model_type": "bpe", "user_defined_symbols": ["<sep>", "<cls>"]},
    "bytes-bpe": {"model_type": "bpe", "byte_fallback": True},
    "folded-bpe": {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc_cf"},
    "llama-unigram": {**LOSSLESS, "model_type": "unigram", "add_dummy_prefix": True},
    "lossless-unigram": {**LOSSLESS, "model_type": "unigram"},
    "lossless-unigram-user": {**LOSSLESS, **USER, "model_type": "unigram"},
    "lossless-bpe": {**LOSSLESS, "model_type": "bpe"},
    "lossless-bpe-user": {**LOSSLESS, **USER, "model_type": "bpe"},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "word": ({"model_type": "word"}, "a model of whole words"),
    "suffix": ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "writes a space after its word"),
    "spaces": ({"model_type": "bpe", "user_defined_symbols": ["    "]}, "user-defined pieces with spaces"),
}
TEXTS = [
    "def main(x):",
    "Ｆｕｌｌ ｗｉｄｔｈ ＡＢＣ　１２３ ﬁne ½",
    "a  b   c",
    " lead",
    "trail ",
    "a <s>b</s> c",
    "</s>",
    "x<unk>y <pad> <mask>",
    "byte <0x0A> here",
    "<0x41>",
    "<sep> a    b <cls>",
    "<sep>",
    "tab\there\r\n\n",
    "\u2581low",
    " \u2581 a \u2581b\u2581 ",
    "e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\0nul",
    *(unicodedata.normalize("NFD", text) for text in ("Tiếng Việt có dấu, ộ", "한국어", "ᾧ λόγος", "é")),
    "ﾊﾝｶｸ ﾊﾞﾋﾟ",
]


def train(directory: Path, options: dict[str, Any]) -> Path:
    source = inspect.getsource(textwrap)
    lines = [line for line in source.splitlines() if line.strip()] + ["Ｆｕｌｌ ﬁne é 한국어 ハンカク Tiếng Việt ộ"] * 5
    (directory / "corpus.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"),
        model_prefix=str(directory / "made"),
        vocab_size=600,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return directory / "made.model"


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_training(name: str, tmp_path: Path) -> None:
    model = train(tmp_path, MODELS[name])
    export_tokenizer(model, tmp_path, 128)
    ours, theirs = Tokenizer(model), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
    assert theirs.bos_token_id == ours.bos_id
    assert theirs.eos_token_id == ours.eos_id
    assert theirs("def f")["input_ids"] == [ours.bos_id, *ours.encode("def f")]
    if name.startswith("lossless"):
        for text in TEXTS:
            assert theirs.decode(ours.encode(text), skip_special_tokens=True) == text
    report = compare(ours, tmp_path, ["def f", "return x"])
    assert report["tokenizer_ids_identical"] or "unigram" in name
    assert report["tokenizer_round_trip"]
    assert report["tokenizer_texts_compared"] > 1000


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_such_form_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    options, reason = REFUSED[name]
    with pytest.raises(
        UserError, match=f"no Hugging Face form that gives the ids of training.*{reason}.*--no-tokenizer"
    ):
        export_tokenizer(train(tmp_path, options), tmp_path, 128)


def test_other_ids_for_raw_text_are_refused(tmp_path: Path) -> None:
    """The negative control: a file that normalises nothing, next to a tokenizer that does. What training data decode
    to is normalised already and would not show it.
    """
    model = train(tmp_path, MODELS["default-bpe"])
    export_tokenizer(model, tmp_path, 128)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    steps = raw["normalizer"]["normalizers"]
    raw["normalizer"]["normalizers"] = [step for step in steps if step["type"] not in ("Precompiled", "NFC")]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"gives the ids of training: '.+' is \[.*\] in training and \[.*\] there"):
        compare(Tokenizer(model), tmp_path, ["def f"])


def test_chat_tokens_added_later_are_found_and_kept(tmp_path: Path) -> None:
    model = train(tmp_path, MODELS["lossless-bpe"])
    export_tokenizer(model, tmp_path, 128)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is False
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    added = tokenizer.convert_tokens_to_ids("<|user|>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "chat")):
        ours = Tokenizer(model)
        chat = found.apply_chat_template([{"role": "user", "content": "a <s>"}], return_dict=False)
        assert chat == [ours.bos_id, added, *ours.encode("a <s>"), ours.eos_id]


def test_a_prefix_is_said_to_be_there(tmp_path: Path) -> None:
    export_tokenizer(train(tmp_path, MODELS["default-bpe"]), tmp_path, 128)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_prefix_space"] is True


def test_only_rounding_makes_segmentations_equally_likely(tmp_path: Path) -> None:
    tokenizer = Tokenizer(train(tmp_path, MODELS["lossless-unigram"]))
    proto = model_of(tokenizer)
    one, two, three = (tokenizer.encode("def return self import")[i] for i in (0, 1, 2))
    assert _equally_likely(proto, _Difference("", [one, two, three], [two, one, three]))
    assert not _equally_likely(proto, _Difference("", [one, two], [one, three]))
    assert not _equally_likely(proto, _Difference("", [one, tokenizer.bos_id], [one, tokenizer.eos_id]))


def test_sentencepieces_file_alone_decodes(tmp_path: Path) -> None:
    """As `nextlat export --no-tokenizer` leaves it."""
    model = train(tmp_path, REFUSED["word"][0])
    tokenizer = Tokenizer(model)
    config = tiny_config(vocab_size=tokenizer.vocab_size + 5)
    export = write_export(tmp_path / "export", config, random_weights(config), None)
    shutil.copy(model, export / "tokenizer.model")
    decoder = load(export, "cpu")
    ids = tokenizer.encode("def main (x) :")
    assert decoder.encode("def main (x) :") == [1, *ids]
    assert (
        decoder.continuation_text([1, *ids[:2]], [*ids[2:], 2, tokenizer.vocab_size + 1])
        == tokenizer.decode(ids)[len(tokenizer.decode(ids[:2])) :]
    )
    [row] = decoder.generate(["def main"], max_new_tokens=4, ignore_eos=True)
    assert len(row.token_ids) == 4
