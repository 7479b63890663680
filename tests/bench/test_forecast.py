import numpy as np
import pytest

from bench.forecast import Level, measured, most_bought
from foretell.importing import EventColumns
from predictor.learning.forecasting.demand import demand_of
from predictor.learning.forecasting.periods import Period
from predictor.learning.sources import Source


@pytest.fixture
def source() -> Source:
    """Three items over 30 weeks: `a` twice a day, `b` once, `c` often, but only at the end."""
    noon = 43_200_000_000 + 86_400_000_000 * np.arange(4, 4 + 30 * 7)  # from a Monday on
    item = np.concatenate([np.full(420, 0), np.full(210, 1), np.full(140, 2)])
    at = np.concatenate([np.repeat(noon, 2), noon, np.repeat(noon[-7:], 20)])
    zeros = np.zeros(len(item), np.int64)
    columns = EventColumns(["u"], ["buy"], ["a", "b", "c"], [], zeros, zeros, item, zeros - 1, at)
    return Source(columns, None, None, {})


def test_items_are_chosen_by_what_was_before_the_instants(source: Source) -> None:
    level = Level("item", "week", 4, most_bought=2)
    chosen = most_bought(demand_of(source, "item", Period("week")), level)
    assert chosen.names == ["a", "b"]
    assert chosen.counts.shape == (2, 30)
    assert most_bought(chosen, Level("item", "week", 4)) is chosen


def test_figures_of_a_level(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    figures = measured("few", Level("item", "week", 4, most_bought=2), source)
    assert figures["few_series"] == 2
    assert figures["few_foretell_wape"] == figures["few_last_period_wape"] == 0
    assert figures["few_over_last_period_wape"] == 0
    assert figures["few_over_last_period_wape_low"] is None
    assert figures["few_coverage_95"] == 1
    assert "few: 2 series" in capsys.readouterr().err
