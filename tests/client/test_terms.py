"""Terms of a text and their rows."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell import limits
from foretell.terms import TermRows, fit_vocabulary, most_terms, split_terms, term_weights
from foretell.vectors import Vectors

TEXTS = [
    "Rose Hand Cream, 50 ml",
    "Rose face cream",
    "Hand soap ROSE rose",
    "Blue sports car",
    "",
]


@pytest.mark.parametrize(
    ("text", "words", "bigrams"),
    [
        ("", [], []),
        (" -- !", [], []),
        ("Rose", ["rose"], []),
        ("Rose cream", ["rose", "cream"], ["rose cream"]),
        ("a b c d", ["a", "b", "c", "d"], ["a b", "b c"]),
        ("2-in-1 (50ml)", ["2", "in", "1", "50ml"], ["2 in", "in 1"]),
        ("tea Tea TEA", ["tea", "tea", "tea"], ["tea tea", "tea tea"]),
        ("foo_bar", ["foo", "bar"], ["foo bar"]),
        ("L'Oréal", ["l", "oréal"], ["l oréal"]),
        ("Straße STRASSE", ["strasse", "strasse"], ["strasse strasse"]),
        ("\ufb01ne \uff15\uff10", ["fine", "50"], ["fine 50"]),
        ("हिन्दी चाय", ["हिन्दी", "चाय"], ["हिन्दी चाय"]),
    ],
)
def test_terms_are_words_and_the_first_bigrams(
    text: str, words: list[str], bigrams: list[str]
) -> None:
    assert split_terms(text) == [*words, *bigrams]


def test_a_word_is_the_same_however_it_is_encoded() -> None:
    assert split_terms("Cafe\u0301") == split_terms("caf\u00e9") == ["caf\u00e9"]


@given(st.text(max_size=60))
def test_terms_of_terms_are_themselves(text: str) -> None:
    """What is in a vocabulary is found again in a text that is just this."""
    found = split_terms(text)
    assert found == split_terms(text)
    words = [term for term in found if " " not in term]
    assert [term for term in split_terms(" ".join(words)) if " " not in term] == words
    for term in found:
        assert term in split_terms(term)
        assert term == term.strip()
        assert term


@given(st.lists(st.text("ab c", max_size=12), max_size=12), st.integers(1, 3))
def test_a_vocabulary_has_the_terms_of_enough_texts(texts: list[str], min_texts: int) -> None:
    terms, idf = fit_vocabulary(texts, min_texts)
    assert list(terms) == sorted(terms)
    for term in set(itertools.chain.from_iterable(map(split_terms, texts))):
        count = sum(term in split_terms(text) for text in texts)
        assert (term in terms) == (count >= min_texts)
        if term in terms:
            expected = 1 + math.log((1 + len(texts)) / (1 + count))
            assert idf[terms.index(term)] == pytest.approx(expected)
    again, idf_again = fit_vocabulary(reversed(texts), min_texts)
    assert again == terms
    assert np.array_equal(idf_again, idf)


def test_of_too_many_terms_the_commonest_are_kept() -> None:
    assert fit_vocabulary(TEXTS, 1, most=3)[0] == ("cream", "hand", "rose")
    assert fit_vocabulary(TEXTS, 2, most=0)[0] == ()


def test_terms_that_no_collection_takes_are_left_out() -> None:
    longest = "x" * limits.TERM_CHARS
    assert fit_vocabulary([longest, longest + "x"], 1)[0] == (longest,)


@pytest.mark.parametrize("cols", [1, 128, 256, limits.COLS])
def test_as_many_terms_fit_into_a_message(cols: int) -> None:
    size = 4 * cols + 4 + limits.TERM_CHARS * 4
    assert 0 < most_terms(cols) * size < limits.MESSAGE_BYTES * 0.8
    assert most_terms(cols) <= limits.TERMS


def rows_of(texts: list[str], cols: int = 3) -> TermRows:
    terms, idf = fit_vocabulary(texts, 1)
    rows = np.random.default_rng(3).normal(size=(len(terms), cols)).astype(np.float32)
    return TermRows(terms, idf, rows)


def plain_sum(made: TermRows, text: str) -> Vectors:
    """The definition, term by term."""
    found = split_terms(text)
    weights = {
        term: (1 + math.log(found.count(term))) * float(made.idf[made.terms.index(term)])
        for term in set(found) & set(made.terms)
    }
    length = math.sqrt(sum(weight * weight for weight in weights.values()))
    total = np.zeros(made.cols)
    for term, weight in weights.items():
        total += weight / length * made.rows[made.terms.index(term)]
    return total.astype(np.float32)


@given(st.lists(st.text("abc ", max_size=14), max_size=9))
def test_a_sum_is_weighted_by_tf_idf(texts: list[str]) -> None:
    made = rows_of(["a b c", "a b", "aa b", "ab", "c c"])
    found = made.sum(texts)
    assert found.shape == (len(texts), 3)
    assert found.dtype == np.float32
    for row, text in zip(found, texts, strict=True):
        np.testing.assert_allclose(row, plain_sum(made, text), atol=1e-5)
        np.testing.assert_array_equal(made.sum([text])[0], row)  # alone as with others


def test_texts_are_summed_in_parts_of_any_number() -> None:
    made = rows_of(TEXTS)
    many = [TEXTS[number % 5] for number in range(2_500)]
    np.testing.assert_array_equal(made.sum(many), np.tile(made.sum(TEXTS), (500, 1)))


def test_weights_are_sorted_and_have_length_1() -> None:
    terms, idf = fit_vocabulary(TEXTS, 1)
    found = term_weights(TEXTS, {term: at for at, term in enumerate(terms)}, idf)
    assert [array.dtype.str for array in found] == ["<i8", "<i8", "<f4"]
    pairs = list(zip(found.text.tolist(), found.term.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert set(found.text.tolist()) == {0, 1, 2, 3}  # the empty text has none
    lengths = np.bincount(found.text, weights=found.weight.astype(np.float64) ** 2)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)


def test_unknown_terms_count_for_nothing() -> None:
    made = rows_of(["rose"])
    assert not made.sum(["a blue car", ""]).any()
    np.testing.assert_array_equal(made.sum(["a rose"]), made.rows)
    assert not TermRows((), np.zeros(0, np.float32), np.zeros((0, 3), np.float32)).sum(["a"]).any()


@pytest.mark.parametrize(
    ("terms", "idf", "rows", "message"),
    [
        (("a", "b"), (3,), (2, 3), "do not fit"),
        (("a", "b"), (2, 1), (2, 3), "do not fit"),
        (("a", "b"), (2,), (1, 3), "do not fit"),
        (("a", "b"), (2,), (2,), "do not fit"),
        (("a", "a"), (2,), (2, 3), "twice"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    terms: tuple[str, ...], idf: tuple[int, ...], rows: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TermRows(terms, np.ones(idf, np.float32), np.ones(rows, np.float32))
