from __future__ import annotations

import string

from hypothesis import given
from hypothesis import strategies as st

from data_tools.text.splits import PASSAGE_CHARACTERS, hold_out, related, split_of, unit_hash


def test_the_hash_is_the_same_on_every_machine() -> None:
    expected = {"a.py": 0.940888, "sub/b.py": 0.303924, "corpus.jsonl:17": 0.702329}
    assert {name: round(unit_hash(name), 6) for name in expected} == expected


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_only_moves_documents_to_validation(name: str, one: float, other: float) -> None:
    if split_of(name, min(one, other)) == "validation":
        assert split_of(name, max(one, other)) == "validation"
    assert (split_of(name, 0), split_of(name, 1)) == ("train", "validation")


def lines(first: int, count: int) -> str:
    return "".join(f"line number {number} of some text\n" for number in range(first, first + count))


def test_texts_that_share_a_passage_are_related_whatever_their_indentation() -> None:
    indented = "".join("\n    " + line for line in lines(5, 20).splitlines())
    texts = {
        "a": [lines(0, 20)],
        "b": ["unrelated", "head\n" + indented],
        "c": ["tail\n" + lines(15, 30)],  # shares enough with b alone
        "d": [lines(100, 20)],
        "e": [lines(0, PASSAGE_CHARACTERS // 40)],  # too little to be a passage
    }
    assert related(texts) == [["a", "b", "c"], ["d"], ["e"]]
    assert related({}) == []


def test_holding_out_goes_by_size() -> None:
    texts = {f"{number}": [string.ascii_letters * 10 + str(number) * number] for number in range(1, 200)}
    total = sum(len(text) for (text,) in texts.values())
    held = hold_out({name: [text[::-1]] for name, (text,) in texts.items()}, 0.1)
    size = sum(len(texts[name][0]) for name in held)
    assert 0.1 * total <= size < 0.1 * total + 1200
    assert sorted(held, key=unit_hash)[-1] != sorted(texts, key=unit_hash)[-1]


def test_related_texts_are_held_out_together_unless_they_are_too_large() -> None:
    alone = {f"alone {number}": [lines(1000 * number, 20)] for number in range(1, 50)}
    for surname in string.ascii_letters:  # some of them come first by hash, some last
        family = {f"{surname} {number}": [lines(0, 20)] for number in range(6)}
        for fraction in (0.02, 0.05, 0.15, 0.5, 0.8):
            held = hold_out(alone | family, fraction)
            assert held
            assert held.isdisjoint(family) or family.keys() <= held
        assert hold_out(alone | family, 0.05).isdisjoint(family)
        assert family.keys() <= hold_out(alone | family, 0.99)
