"""Network and item space with their common loss.

Loss: cross-entropy of the next behavior type and of the next item at every position, and the error
of the log time gap. The items' softmax is over the whole catalogue where it is small, else over one
shared uniform sample of it, reweighted; few negatives are the main reason for weak published
results (Klenitskiy and Vasilev, 2023, "Turning dross into gold loss"; Petrov and Macdonald, 2023,
gSASRec).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from predictor.learning.sequence.item_space import ItemSpace
from predictor.learning.sequence.losses import full_cross_entropy
from predictor.learning.sequence.recipe import Recipe
from predictor.learning.sequence.windows import Batch
from predictor.models.sequence.network import SequenceNetwork


class Losses(NamedTuple):
    """Means over a batch, in nats; 0 where it has no targets of the kind."""

    items: Tensor
    types: Tensor
    gaps: Tensor


class _Vectors(NamedTuple):
    """Vectors of the items that a step needs."""

    of: Tensor
    """(vectors, dims)."""
    place: Tensor
    """(items,) where an item's vector lies in `of`."""


class Learner(nn.Module):
    """What is trained."""

    def __init__(self, network: SequenceNetwork, space: ItemSpace, recipe: Recipe) -> None:
        super().__init__()
        self.network = network
        self.space = space
        self.recipe = recipe
        # Items that training never meets stay out of the softmax: as targets of nothing they would
        # only learn to be nobody's, and could never be found by their text.
        self.warm_items: Tensor
        self.register_buffer("warm_items", torch.nonzero(space.warm[:, 0]).squeeze(1), False)
        self.place: Tensor
        self.register_buffer("place", torch.cumsum(space.warm[:, 0].long(), 0) - 1, False)
        # Logit adjustment (Menon et al., 2021): what is popular anyway need not be learned, and
        # then counts less in scores, by as much as validation says.
        self.offset: Tensor
        offset = recipe.popularity_discount * torch.log1p(space.popularity[self.warm_items])
        self.register_buffer("offset", offset, False)
        for tower in network.towers:
            head = tower.query_head
            if recipe.traces and isinstance(head, nn.Linear):
                with torch.no_grad():
                    # Popularity, see ItemSpace: from the bias alone, not from the traces as well.
                    head.bias.zero_()
                    head.bias[0] = 1.0
                    tower.trace_weight[:, 0] = 0.0

    def forward(self, batch: Batch) -> Losses:
        """The losses of a batch."""
        device = self.network.start.device
        item, text, row, target, line_type, weight, context, log_gap = (
            torch.from_numpy(values).to(device)
            for values in (
                batch.item, batch.text, batch.row, batch.line_item, batch.line_type, batch.weight,
                batch.context, batch.log_gap,
            )
        )  # fmt: skip
        sample = self._sample(device)
        vectors = self._item_vectors(item, target, sample)
        states = self.network.encode(
            self._token_vectors(item, text, vectors),
            (item >= 0) | (text >= 0),
            torch.from_numpy(batch.type).to(device),
            torch.from_numpy(batch.gap).to(device),
            torch.from_numpy(batch.hour).to(device),
        )
        states = torch.where(
            (context < 0).unsqueeze(1),
            self.network.start,
            states.flatten(0, 1)[context.clamp(min=0)],
        )
        type_logits, queries, gaps = self.network.heads(states)
        some = target >= 0
        lines = row[some], target[some], weight[some]
        items = torch.stack(
            [
                self._item_loss(query, _Vectors(of, vectors.place), sample, *lines)
                for query, of in self._by_tower(queries, vectors.of)
            ]
        ).mean()
        types = _type_loss(type_logits.float(), row, line_type, weight)
        return Losses(items, types, _gap_loss(gaps.float(), log_gap))

    def total(self, losses: Losses) -> Tensor:
        """What is minimised."""
        recipe = self.recipe
        return losses.items + recipe.type_weight * losses.types + recipe.gap_weight * losses.gaps

    def _sample(self, device: torch.device) -> Tensor | None:
        """Warm items to compare with, drawn uniformly; None: all of them."""
        size, count = len(self.warm_items), self.recipe.negatives
        return self.warm_items[torch.randint(size, (count,), device=device)] if count else None

    def _item_vectors(self, item: Tensor, target: Tensor, sample: Tensor | None) -> _Vectors:
        if sample is None:
            return _Vectors(self.space.items(), torch.arange(len(self.place), device=item.device))
        needed = torch.unique(torch.cat([item[item >= 0], target[target >= 0], sample]))
        place = torch.zeros_like(self.place)
        place[needed] = torch.arange(len(needed), device=item.device)
        return _Vectors(self.space.items(needed), place)

    def _token_vectors(self, item: Tensor, text: Tensor, vectors: _Vectors) -> Tensor:
        """(windows, time, dims): the item's vector, else the text's, else zero."""
        by_item, by_text = item >= 0, (item < 0) & (text >= 0)
        found = torch.zeros(*item.shape, self.recipe.dims, device=item.device)
        if bool(by_item.any()):
            chosen = nn.functional.embedding(vectors.place[item[by_item]], vectors.of)
            found = found.masked_scatter(by_item.unsqueeze(-1), chosen)
        if bool(by_text.any()):
            read, position = torch.unique(text[by_text], return_inverse=True)
            chosen = nn.functional.embedding(position, self.space.texts(read))
            found = found.masked_scatter(by_text.unsqueeze(-1), chosen)
        return found

    def _by_tower(self, queries: Tensor, items: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Each tower's queries and item vectors: it learns by its own scores."""
        towers = self.recipe.towers
        return zip((queries * towers).chunk(towers, 1), items.chunk(towers, 1), strict=True)

    def _item_loss(
        self,
        queries: Tensor,
        vectors: _Vectors,
        sample: Tensor | None,
        row: Tensor,
        target: Tensor,
        weight: Tensor,
    ) -> Tensor:
        if not len(row):
            return torch.zeros((), device=row.device)
        if sample is None:
            warm = vectors.of[self.warm_items]
            place = self.place[target]
            return full_cross_entropy(queries.float(), warm, self.offset, row, place, weight)
        # Each sampled item stands for size / count others.
        others = math.log(len(self.warm_items) / len(sample)) + self.offset[self.place[sample]]
        negatives = (queries @ vectors.of[vectors.place[sample]].T).float() + others
        positives = nn.functional.embedding(vectors.place[target], vectors.of)
        own = (queries[row].float() * positives).sum(1) + self.offset[self.place[target]]
        loss = torch.logaddexp(own, negatives.logsumexp(1)[row]) - own
        return (loss * weight).sum() / weight.sum()


def _type_loss(logits: Tensor, row: Tensor, line_type: Tensor, weight: Tensor) -> Tensor:
    if logits.shape[1] < 2:
        return torch.zeros((), device=logits.device)
    some = line_type >= 0
    loss = nn.functional.cross_entropy(logits[row[some]], line_type[some], reduction="none")
    return (loss * weight[some]).sum() / weight[some].sum().clamp(min=1e-9)


def _gap_loss(found: Tensor, log_gap: Tensor) -> Tensor:
    """Mean absolute error: a few very long pauses do not rule it."""
    some = ~log_gap.isnan()
    if not bool(some.any()):
        return torch.zeros((), device=found.device)
    return (found[some] - log_gap[some]).abs().mean()
