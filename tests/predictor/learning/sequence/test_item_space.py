"""Whitening, terms, residuals: vectors in the model's space, in training and as published."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foretell.vectors import Vectors
from predictor.learning.sequence.item_space import ItemSpace, TextReader, Whitening

TITLES = ("red soap bar", "red soap dish", "blue soap bar", "", "red dish", "red soap bar bar")
POPULARITY = np.array([4, 0, 1, 2, 0, 9])
DIMS = 8


def text_vectors(rows: int, seed: int = 0) -> Vectors:
    rng = np.random.default_rng(seed)
    scale = [9, 3, 1, 1, 0.1, 0.1, 0]
    return (rng.standard_normal((rows, 7)) * scale + 2).astype(np.float32)


def reader(*, use_terms: bool = True) -> TextReader:
    return TextReader(text_vectors(6), TITLES, 5, most_terms=100 if use_terms else 0)


def space(
    row_dropout: float = 0.0, term_dropout: float = 0.0, *, use_terms: bool = True
) -> ItemSpace:
    torch.manual_seed(0)
    read = reader(use_terms=use_terms)
    return ItemSpace(
        read.read(text_vectors(6), TITLES),
        read.read(text_vectors(3, seed=1), ("soap", "soap dish red", "unheard of")),
        POPULARITY,
        DIMS,
        terms=len(read.terms),
        row_dropout=row_dropout,
        term_dropout=term_dropout,
    )


@pytest.mark.parametrize("use_terms", [True, False])
def test_the_published_projection_gives_what_training_saw(use_terms: bool) -> None:
    vectors, texts = text_vectors(6), TITLES
    learned = space(use_terms=use_terms).eval()
    with torch.no_grad():
        learned.term_rows.normal_()
        items, others = learned.items().numpy(), learned.texts().numpy()
    projection = learned.projection(reader(use_terms=use_terms))
    assert (projection.terms is not None) == use_terms
    found = projection.apply(vectors, texts=texts, residuals=learned.residuals())
    assert found == pytest.approx(items, abs=1e-4)
    found = projection.apply(text_vectors(3, seed=1), texts=("soap", "soap dish red", "unheard of"))
    assert found == pytest.approx(others, abs=1e-4)


def test_whitening_evens_axes_out_and_ignores_empty_texts() -> None:
    rng = np.random.default_rng(0)
    texts = (rng.standard_normal((500, 4)) * [8, 4, 2, 1]).astype(np.float32)
    with_empty = np.concatenate([texts, np.zeros((100, 4), np.float32)])
    white = Whitening(with_empty, 3).apply(texts)
    assert white.shape == (500, 3)
    assert np.sqrt((white**2).mean()) == pytest.approx(1, rel=1e-3)
    spread = white.std(axis=0)
    assert spread[0] / spread[2] == pytest.approx(2, rel=0.1)  # was 4: half-way to 1
    assert Whitening(np.zeros((2, 4), np.float32), 3).apply(texts).shape == (500, 3)


def test_items_without_training_events_stand_on_their_text_alone() -> None:
    learned = space().eval()
    with torch.no_grad():
        items = learned.items()
        learned.residual.add_(1)
        moved = (learned.items() - items).abs().max(dim=1).values
    assert moved.numpy() == pytest.approx((POPULARITY > 0).astype(float), abs=1e-5)
    assert np.abs(learned.residuals()[POPULARITY == 0]).max() == 0


def test_some_items_are_as_among_all() -> None:
    learned = space().eval()
    with torch.no_grad():
        learned.term_rows.normal_()
        chosen = torch.tensor([5, 3, 1, 5])
        assert torch.allclose(learned.items(chosen), learned.items()[chosen], atol=1e-6)
        assert torch.allclose(learned.texts(torch.tensor([2])), learned.texts()[2:], atol=1e-6)


def test_the_gradient_of_terms_is_that_of_a_plain_product() -> None:
    learned = space()
    bags = learned.item_inputs.bags()
    plain = torch.zeros(len(TITLES), len(learned.term_rows))
    text = torch.repeat_interleave(torch.arange(len(TITLES)), bags.first.diff())
    plain[text, bags.term] = bags.weight
    asked = torch.randn(len(TITLES), DIMS)
    (learned.items() * asked).sum().backward()  # type: ignore[no-untyped-call]
    assert learned.term_rows.grad is not None
    assert torch.allclose(learned.term_rows.grad, plain.T @ asked, atol=1e-5)


def test_residual_rows_are_dropped_whole_and_only_in_training() -> None:
    learned = space(row_dropout=0.5, use_terms=False)
    with torch.no_grad():
        by_text = learned.affine(learned.item_inputs.vectors)
        rows = torch.stack([(learned.items() != by_text).all(1) for _ in range(200)])
        some = torch.stack([(learned.items() != by_text).any(1) for _ in range(200)])
        assert torch.equal(learned.eval().items(), learned.items())
    assert 0.35 < rows[:, 0].float().mean() < 0.65
    assert 0.35 < some[:, 5].float().mean() < 0.65


def test_terms_are_dropped_one_by_one_and_only_in_training() -> None:
    learned = space(term_dropout=0.5)
    with torch.no_grad():
        learned.term_rows.normal_()
        drawn = torch.stack([learned.items() for _ in range(600)])
        whole = learned.eval().items()
        assert torch.equal(learned.items(), whole)
    assert len(torch.unique(drawn[:, 0], dim=0)) > 4
    assert torch.allclose(drawn.mean(0), whole, atol=0.35)  # what is left weighs more
    assert (drawn[:, 3] == whole[3]).all()  # no text


def test_a_vocabulary_is_as_large_as_can_be_published() -> None:
    read = TextReader(text_vectors(6), TITLES, 5, most_terms=2)
    assert read.terms == ("red", "soap")  # the commonest
