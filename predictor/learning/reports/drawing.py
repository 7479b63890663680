"""All pictures of a version that was measured."""

from __future__ import annotations

from collections.abc import Sequence

from predictor.learning.measures.comparison import Comparison
from predictor.learning.measures.evaluation import line_probabilities
from predictor.learning.reports.item_map import item_map
from predictor.learning.reports.plots import ItemResults, TypeResults, pictures
from predictor.learning.sequence.fitting import Epoch
from predictor.learning.sources import Dataset
from predictor.models.history import NONE


def draw(found: Comparison, dataset: Dataset, curve: Sequence[Epoch] = ()) -> dict[str, bytes]:
    """PNG by file name.

    Args:
        found: what was measured.
        dataset: on what.
        curve: how the sequence model learned; of a version that was not trained just now, none.
    """
    answers = found.answers
    targets = answers.targets
    types = items = space = None
    if "types" in found.report:
        likely, true = line_probabilities(answers.type_scorer, targets)
        chosen = answers.chosen_types[targets.row[targets.type != NONE]]
        types = TypeResults(targets.events.behavior_types, likely, true, chosen)
    if found.hits:
        items = ItemResults(found.hits, found.popularity, found.item_probabilities)
        space = item_map(
            answers.space.items, found.popularity, dataset.item_texts, dataset.categories
        )
    return pictures(curve, types, items, space)
