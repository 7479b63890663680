import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bench import datasets
from bench.datasets import Files
from foretell.errors import InvalidArgumentError
from predictor.learning import sources
from predictor.learning.data import Events


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "beauty").mkdir(parents=True)
    (folder / "beauty" / "sequences.txt").write_text("1 5 6 7\n2 6 5\n")
    (folder / "beauty" / "titles.tsv").write_text('5\tNail, "red"\n6\tSoap\n7\t\n')
    with zipfile.ZipFile(folder / "ml-latest-small.zip", "w") as archive:
        archive.writestr(
            "ml-latest-small/ratings.csv",
            "userId,movieId,rating,timestamp\n"
            "1,10,4.0,1000000002\n1,11,3.5,1000000001\n1,12,2.5,1000000001\n2,10,3.0,1000000001\n",
        )
        archive.writestr(
            "ml-latest-small/tags.csv",
            "userId,movieId,tag,timestamp\n1,11,slow burn,1000000001\n",
        )
        archive.writestr(
            "ml-latest-small/movies.csv",
            'movieId,title,genres\n10,"Postman, The (1994)",Drama|Comedy\n'
            "11,Heat (1995),Crime\n12,Nothing (2000),(no genres listed)\n",
        )
    return folder


def read(files: Files) -> tuple[Events, dict[str, str]]:
    source = sources.read_files(files.events, files.items)
    return source.events(), {item.id: item.text for item in source.items or ()}


def test_beauty_keeps_order_and_titles(data: Path, tmp_path: Path) -> None:
    events, texts = read(datasets.files("beauty", data, tmp_path / "cache"))
    assert [events.item_ids[item] for item in events.item] == ["5", "6", "7", "6", "5"]
    assert [events.user_ids[user] for user in events.user] == ["1", "1", "1", "2", "2"]
    assert events.behavior_types == ("review",)
    assert not events.has_times
    assert texts == {"5": 'Nail, "red"', "6": "Soap", "7": ""}


def test_movielens_is_opinions_and_tags_by_time(data: Path, tmp_path: Path) -> None:
    events, texts = read(datasets.files("movielens", data, tmp_path / "cache"))
    of_one = events.user == events.user_ids.index("1")
    types = [events.behavior_types[each] for each in events.type[of_one]]
    # Ratings of a second in file order, then its tags, then the next second.
    assert types == ["neutral", "dislike", "tag", "like"]
    assert [events.item_ids[item] for item in events.item[of_one]] == ["11", "12", "11", "10"]
    assert [events.texts[text] for text in events.text[of_one] if text >= 0] == ["slow burn"]
    assert texts == {
        "10": "Postman, The (1994), Drama, Comedy",
        "11": "Heat (1995), Crime",
        "12": "Nothing (2000)",
    }


def test_no_two_events_of_a_movielens_user_share_a_basket(data: Path, tmp_path: Path) -> None:
    events, _ = read(datasets.files("movielens", data, tmp_path / "cache"))
    assert (np.diff(events.first_of_basket) == 1).all()
    second = 1_000_000_001 * 1_000_000
    of_one = events.timestamp[events.user == events.user_ids.index("1")]
    assert of_one.tolist() == [second, second + 1_000, second + 2_000, second + 1_000_000]


@pytest.mark.parametrize(
    ("rating", "opinion"),
    [(5.0, "like"), (4.0, "like"), (3.5, "neutral"), (3.0, "neutral"), (2.5, "dislike")],
)
def test_where_opinions_begin(rating: float, opinion: str) -> None:
    assert datasets.opinion(rating) == opinion


def test_files_are_converted_once_and_anew_when_an_original_changes(
    data: Path, tmp_path: Path
) -> None:
    first = datasets.files("beauty", data, tmp_path / "cache")
    first.events.write_text("kept")
    assert datasets.files("beauty", data, tmp_path / "cache") == first
    assert first.events.read_text() == "kept"
    (data / "beauty" / "titles.tsv").write_text("5\tOther\n")
    second = datasets.files("beauty", data, tmp_path / "cache")
    assert second != first
    assert second.items.read_text().split() == ["item_id,text", "5,Other"]


def test_a_conversion_that_was_cut_short_is_not_taken(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(originals: Sequence[Path], made: Files) -> None:
        made.events.write_text("half")
        raise KeyboardInterrupt

    originals, convert = datasets.CONVERSIONS["beauty"]
    monkeypatch.setitem(datasets.CONVERSIONS, "beauty", (originals, broken))
    with pytest.raises(KeyboardInterrupt):
        datasets.files("beauty", data, tmp_path / "cache")
    monkeypatch.setitem(datasets.CONVERSIONS, "beauty", (originals, convert))
    events, _ = read(datasets.files("beauty", data, tmp_path / "cache"))
    assert len(events) == 5


def test_a_missing_original_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"sequences\.txt does not exist; see --help"):
        datasets.files("beauty", tmp_path, tmp_path / "cache")
