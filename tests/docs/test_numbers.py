"""README and docs say what the committed measurements say.

After a new measurement `python -m tests.kit.page_numbers` writes its numbers onto the pages; read them afterwards: a
sentence may say more than its numbers.
"""

from __future__ import annotations

import pytest

from tests.kit.page_numbers import ROOT, Sentence, corrected, sentences


@pytest.mark.parametrize(
    "sentence", list(sentences()), ids=lambda sentence: f"{sentence.page}: {sentence.template[:50]}"
)
def test_a_number_on_a_page_is_that_of_the_json(sentence: Sentence) -> None:
    found = sentence.found((ROOT / sentence.page).read_text())
    assert found.groups() == sentence.values


def test_numbers_are_written_where_they_stand() -> None:
    sentence = Sentence("a page", "from {} to {}× (length {})", ("1.05", "2.50", "7"))
    text = "It is from 1.80 to\n2.53× (length 10), from 3 on."
    assert sentence.found(text).groups() == ("1.80", "2.53", "10")
    assert corrected(text, sentence) == "It is from 1.05 to\n2.50× (length 7), from 3 on."
    with pytest.raises(AssertionError, match="0 times"):
        sentence.found("It is from here to there.")
