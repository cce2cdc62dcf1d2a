"""A sentencepiece model as Hugging Face tokenizer files, loadable by `AutoTokenizer` with no flag.

The pieces, their order and the byte fallback are taken over one to one; the result is checked against sentencepiece
itself on real text, so a model that cannot be expressed is noticed at export and not at use.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nextlat_dist.data.tokenizer import SPACE_SYMBOL, Tokenizer

UNIGRAM, BPE = 1, 2  # sentencepiece's TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # sentencepiece's ModelProto.SentencePiece.Type


def export_tokenizer(model: Path, output: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the sentencepiece model itself into `output`."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    proto = protobuf.ModelProto()
    proto.ParseFromString(model.read_bytes())
    tokenizer = _build(proto)
    # Not by `tokenizer.save`: what the system refuses there is an Exception without a kind.
    (output / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    special = _special_tokens(proto)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "<s>" in a text is text, as in training; BOS is put in front all the same
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",  # a batch of prompts continues at its right
        **special,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(model, output / "tokenizer.model")


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """bos_token_id, eos_token_id and pad_token_id; None where the model has none."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {name: value if value >= 0 else None for name, value in ids.items()}


def compare(tokenizer: Tokenizer, output: Path, texts: list[str]) -> dict[str, bool]:
    """Whether the exported files give every text back, and whether their ids are sentencepiece's own."""
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(str(output))
    encoded = [exported.encode(text, add_special_tokens=False) for text in texts]
    decoded = [exported.decode(ids, skip_special_tokens=True) for ids in encoded]
    return {
        "tokenizer_round_trip": decoded == texts,
        "tokenizer_ids_identical": encoded == [tokenizer.encode(text) for text in texts],
    }


def _build(proto: Any) -> Any:
    from tokenizers import AddedToken, decoders, normalizers, processors
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import BPE as BpeModel
    from tokenizers.models import Unigram as UnigramModel

    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown = proto.trainer_spec.unk_id
    byte_fallback = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == BPE:
        model: Any = BpeModel(
            vocab={piece: index for index, (piece, _) in enumerate(pieces)},
            merges=_merges(proto),
            unk_token=pieces[unknown][0],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    else:
        model = UnigramModel(pieces, unk_id=unknown, byte_fallback=byte_fallback)
    fast = FastTokenizer(model)
    prefix = proto.normalizer_spec.add_dummy_prefix
    steps: list[Any] = [normalizers.Prepend(SPACE_SYMBOL)] if prefix else []
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE_SYMBOL)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_SYMBOL, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for piece in proto.pieces:
        if piece.type in (CONTROL, UNKNOWN, USER_DEFINED):
            special = piece.type != USER_DEFINED
            token = AddedToken(piece.piece, normalized=False, special=special)
            (fast.add_special_tokens if special else fast.add_tokens)([token])
    bos = proto.trainer_spec.bos_id
    if bos >= 0:  # as in training, where every document begins with BOS
        name = pieces[bos][0]
        fast.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, bos)]
        )
    return fast


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to cut a piece in two, best piece first: sentencepiece joins the pair with the best result."""
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces) if piece.type == NORMAL}
    merges = []
    for piece, index in sorted(ids.items(), key=lambda item: item[1]):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(left, right) for left, right in cuts if left in ids and right in ids]
        merges += [(proto.pieces[index].score, pair) for pair in sorted(pairs, key=lambda p: (ids[p[0]], ids[p[1]]))]
    return [pair for _, pair in sorted(merges, key=lambda item: -item[0])]


def _special_tokens(proto: Any) -> dict[str, str]:
    spec = proto.trainer_spec
    ids = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    return {name: proto.pieces[index].piece for name, index in ids.items() if index >= 0}
