"""The tokenizer of a task: a sentencepiece model with one token for every word.

Invariant: for any words of the task, `encode(" ".join(words))` are their ids in order and `decode` gives the text back;
the ids are those of `nextlat_dist.tasks`; the same words give the same bytes.
"""

from __future__ import annotations

from sentencepiece import sentencepiece_model_pb2 as protobuf

from nextlat_dist.data.members import load_tokenizer
from nextlat_dist.data.tokenizer import SPACE_SYMBOL, Tokenizer
from nextlat_dist.tasks import BOS_ID, EOS_ID, PAD_ID, Task
from nextlat_dist.tasks.documents import SPECIAL_WORDS, UNK_ID


def task_tokenizer(task: Task) -> Tokenizer:
    """A unigram model whose pieces are the special tokens and, with a space in front, the words of the task.

    No piece is part of another word, so a text of the words has only one way to be cut.
    """
    piece = protobuf.ModelProto.SentencePiece
    kinds = {UNK_ID: piece.UNKNOWN, BOS_ID: piece.CONTROL, EOS_ID: piece.CONTROL, PAD_ID: piece.CONTROL}
    special = [piece(piece=word, score=0.0, type=kinds[number]) for number, word in enumerate(SPECIAL_WORDS)]
    words = [piece(piece=SPACE_SYMBOL + word, score=0.0, type=piece.NORMAL) for word in task.symbols]
    assert len(set(task.symbols)) == len(words), "a word twice"
    assert all(word and not set(word) & {" ", SPACE_SYMBOL} for word in task.symbols), "a word with a space"
    model = protobuf.ModelProto(
        pieces=[*special, *words],
        trainer_spec=protobuf.TrainerSpec(
            model_type=protobuf.TrainerSpec.UNIGRAM,
            vocab_size=len(special) + len(words),
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
        ),
        normalizer_spec=protobuf.NormalizerSpec(
            name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False, escape_whitespaces=True
        ),
    )
    return load_tokenizer(model.SerializeToString(deterministic=True))
