from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_tools.shards.encode import Encoded, Encoder, OnInvalid, encode_all
from data_tools.text.sources import TextDocument
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from tests.kit.datasets import tiny_tokenizer


def document(text: bytes, prompt: bytes | None = None, in_folder: bool = False) -> TextDocument:
    return TextDocument("name", text, prompt, None, len(text), in_folder)


def encoder(on_invalid: OnInvalid = "replace", *, bos: bool = True, eos: bool = True) -> Encoder:
    return Encoder(Tokenizer(tiny_tokenizer()), bos=bos, eos=eos, on_invalid=on_invalid)


def one(document: TextDocument, encode: Encoder | None = None) -> Encoded:
    (found,) = (encode or encoder())([document])
    return found


def test_a_document_is_bos_prompt_text_eos() -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    prompt, text = tokenizer.encode("Question? "), tokenizer.encode("Answer.")
    found = one(document(b"Answer.", b"Question? "))
    assert found.tokens is not None
    assert found.tokens.dtype == np.uint16
    assert found.tokens.tolist() == [1, *prompt, *text, 2]
    assert found.prompt_tokens == 1 + len(prompt)
    assert found.remark is None
    bare = one(document(b"Answer.", b"Question? "), encoder(bos=False, eos=False))
    assert bare.tokens is not None
    assert bare.tokens.tolist() == prompt + text
    assert bare.prompt_tokens == len(prompt)


def test_what_is_left_out_says_why() -> None:
    for found, remark in (
        (one(document(b"")), "empty"),
        (one(document(b"", b"")), "empty"),
        (one(document(b"ELF\0\1", in_folder=True)), "binary"),
        (one(document(b"a\xff"), encoder("skip")), "invalid_utf8"),
    ):
        assert (found.tokens, found.remark) == (None, remark)
    assert one(document(b"a\0b")).tokens is not None, "a file that was named is taken as text"
    assert one(document(b"", b"only a prompt")).tokens is not None


def test_bytes_that_are_no_utf8_are_replaced_and_marked() -> None:
    found = one(document(b"a\xffb"))
    assert found.tokens is not None
    assert found.remark == "invalid_utf8"
    assert Tokenizer(tiny_tokenizer()).decode(found.tokens) == "a\ufffdb"
    refused = one(document(b"a\xffb"), encoder("fail"))
    assert (refused.tokens, refused.remark) == (None, "invalid_utf8")
    assert (refused.refusal or "").startswith("name is not UTF-8 at byte 1")


def foreign_tokenizer(path: Path, **options: object) -> Path:
    """A model trained as sentencepiece trains by default: it normalises and has unknown characters."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words in a line"] * 10),
        model_prefix=str(path.with_suffix("")),
        vocab_size=25,
        model_type="bpe",
        minloglevel=2,
        **options,
    )
    return path


def test_text_that_a_foreign_tokenizer_changes_is_marked(tmp_path: Path) -> None:
    tokenizer = Tokenizer(foreign_tokenizer(tmp_path / "foreign.model"))
    encode = Encoder(tokenizer, bos=True, eos=True, on_invalid="replace")
    assert one(document(b"few words"), encode).remark is None
    assert one(document(b"few  words"), encode).remark == "not_lossless"
    assert one(document("few wörds".encode()), encode).remark == "not_lossless"


@pytest.mark.parametrize("options", [{}, {"remove_extra_whitespaces": False}, {"treat_whitespace_as_suffix": True}])
def test_the_remark_is_what_the_decoder_says(tmp_path: Path, options: dict[str, object]) -> None:
    """Where a model adds or removes spaces, pieces that spell a text need not decode to it."""
    tokenizer = Tokenizer(foreign_tokenizer(tmp_path / "foreign.model", **options))
    encode = Encoder(tokenizer, bos=True, eos=True, on_invalid="replace")
    texts = ["a few words", " few words", "few words ", "  a  few", "wörds", "few\nwords", " "]
    found = encode([document(text.encode()) for text in texts])
    for text, each in zip(texts, found, strict=True):
        assert each.tokens is not None
        assert (each.remark is None) == (tokenizer.decode(each.tokens) == text), text
    assert {each.remark for each in found} == {None, "not_lossless"}


def test_documents_together_are_what_they_are_alone() -> None:
    """Left out ones among them, with prompts and without."""
    raw = [b"one", b"", b"\xff", "a▁b ▁".encode(), b"x" * 5000, b"\xffy", "▁".encode(), b"last"]
    documents = [document(text, prompt) for text in raw for prompt in (None, b"", b"ask ", "▁?".encode())]
    for policy in ("replace", "skip"):
        together = encoder(policy)(documents)  # type: ignore[arg-type]
        for given, found in zip(documents, together, strict=True):
            alone = one(given, encoder(policy))  # type: ignore[arg-type]
            assert (found.remark, found.prompt_tokens) == (alone.remark, alone.prompt_tokens)
            assert (found.tokens is None) == (alone.tokens is None)
            if found.tokens is not None and alone.tokens is not None:
                assert found.tokens.tolist() == alone.tokens.tolist()
    assert encoder()([]) == []


def test_a_tokenizer_without_bos_needs_the_option(tmp_path: Path) -> None:
    tokenizer = Tokenizer(foreign_tokenizer(tmp_path / "foreign.model", bos_id=-1))
    with pytest.raises(UserError, match="no BOS token; pass --no-bos"):
        Encoder(tokenizer, bos=True, eos=True, on_invalid="replace")
    Encoder(tokenizer, bos=False, eos=True, on_invalid="replace")


def test_processes_give_the_same_documents_in_the_same_order() -> None:
    documents = [document(f"{number} ".encode() * (20000 if number % 7 == 0 else 50)) for number in range(200)]

    def run(workers: int) -> list[bytes]:
        settings = {"bos": True, "eos": True, "on_invalid": "replace"}
        found = encode_all(iter(documents), tiny_tokenizer(), workers=workers, **settings)  # type: ignore[arg-type]
        return [each.tokens.tobytes() for each in found if each.tokens is not None]

    expected = run(1)
    assert len(expected) == 200
    assert run(3) == expected


def test_the_mistake_a_worker_finds_reaches_the_caller() -> None:
    documents = [document(b"good"), document(b"\xff")]
    with pytest.raises(UserError, match="not UTF-8 at byte 0"):
        list(encode_all(documents, tiny_tokenizer(), bos=True, eos=True, on_invalid="fail", workers=2))


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_before_a_refused_one_are_through(workers: int) -> None:
    documents = [document(b"good"), document(b"also good"), document(b"\xff"), document(b"never seen")]
    encoding = encode_all(documents, tiny_tokenizer(), bos=True, eos=True, on_invalid="fail", workers=workers)
    assert [next(encoding).remark, next(encoding).remark] == [None, None]
    with pytest.raises(UserError, match="not UTF-8 at byte 0"):
        next(encoding)


def test_what_a_worker_cannot_start_with_is_said_before_it_starts(tmp_path: Path) -> None:
    model = foreign_tokenizer(tmp_path / "foreign.model", eos_id=-1)
    with pytest.raises(UserError, match="no EOS token; pass --no-eos"):
        list(encode_all([document(b"x")], model, bos=True, eos=True, on_invalid="fail", workers=2))
