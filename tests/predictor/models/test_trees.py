"""Trees that LightGBM would crash on are refused before it sees them."""

import re
from typing import Any

import lightgbm
import numpy as np
import pytest

from predictor.models.trees import check_trees


def grown(classes: int = 1, leaves: int = 7) -> str:
    rng = np.random.default_rng(0)
    parameters: dict[str, Any] = {"verbose": -1, "num_threads": 1, "min_data_in_leaf": 5}
    parameters["num_leaves"] = leaves
    if classes > 1:
        parameters |= {"objective": "multiclass", "num_class": classes}
    data = lightgbm.Dataset(rng.standard_normal((200, 6)), rng.integers(0, max(2, classes), 200))
    return lightgbm.train(parameters, data, 3).model_to_string()


@pytest.fixture(scope="module")
def trees() -> str:
    return grown()


def test_what_lightgbm_writes_is_good(trees: str) -> None:
    check_trees(trees)
    check_trees(grown(classes=3))
    rng = np.random.default_rng(1)
    constant = lightgbm.Dataset(rng.standard_normal((50, 2)), np.ones(50))
    check_trees(lightgbm.train({"verbose": -1, "num_threads": 1}, constant, 2).model_to_string())


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5, 0.8, 0.99])
def test_cut_off_text_is_refused(trees: str, share: float) -> None:
    with pytest.raises(ValueError, match="no trees that can be read"):
        check_trees(trees[: int(len(trees) * share)])


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("split_feature", "99999", "outside 0 to 5"),
        ("split_feature", "-1", "outside 0 to 5"),
        ("left_child", "0", "not a tree"),
        ("left_child", "99999", "not a tree"),
        ("right_child", "-99999", "not a tree"),
        ("leaf_value", "nan", "not finite"),
        ("leaf_value", "1 1", "no 7 numbers leaf_value"),
        ("threshold", "", "threshold"),
        ("decision_type", "1", "not numerical"),
        ("num_leaves", "1000000", "numbers"),
        ("num_leaves", "0", "0 leaves"),
        ("num_cat", "5", "categories"),
        ("is_linear", "1", "linear"),
        ("tree_sizes", "99999", "tree_sizes"),
        ("tree_sizes", "-50", "tree_sizes"),
        ("num_tree_per_iteration", "0", "at a time"),
        ("num_class", "0", "classes"),
    ],
)
def test_values_that_would_crash_lightgbm(trees: str, key: str, value: str, complaint: str) -> None:
    """The first of the key's values is replaced, in the header or in the first tree."""
    before, line, rest = re.split(rf"^({key}=.*\n)", trees, maxsplit=1, flags=re.MULTILINE)
    changed = re.sub(r"=[^ \n]+", f"={value}", line, count=1)
    if "\nTree=0" in before:  # so that it is not the size of the tree that is noticed
        sizes = re.search(r"tree_sizes=(\d+)", before)
        assert sizes
        size = int(sizes[1]) + len(changed) - len(line)
        before = before.replace(sizes[0], f"tree_sizes={size}")
    with pytest.raises(ValueError, match=complaint):
        check_trees(before + changed + rest)


def test_parameters_that_are_no_json_are_refused(trees: str) -> None:
    with pytest.raises(ValueError, match="what follows the trees"):
        check_trees(trees.replace("[time_out: 120]", "[time_ou20]"))
