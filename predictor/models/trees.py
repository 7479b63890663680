"""Trees in LightGBM's text format, checked before LightGBM reads them.

Its reader trusts the text: one number too few ends the process, a wrong size or index reads foreign
memory, and a cycle of nodes never ends. A version directory may come from a stranger.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import lightgbm

_INTEGER = r"-?\d{1,9}"
_NUMBER = r"-?(?:\d+(?:\.\d*)?(?:e[+-]?\d+)?|inf|nan)"
_INTEGERS = re.compile(rf"{_INTEGER}(?: {_INTEGER})*")
_NUMBERS = re.compile(rf"{_NUMBER}(?: {_NUMBER})*")
_FINITE = re.compile(r"[-+.e\d ]+")
_TAIL = re.compile(
    r"end of trees\n\nfeature_importances:\n(?:[^\n=]+=\d+\n)*"
    r"\nparameters:\n(?:\[\w+: [^\n\[\]\"\\]*\]\n)*\nend of parameters\n"
    r"(?:\npandas_categorical:(?:null|\[\])\n)?"
)
"""What follows the trees; LightGBM makes JSON of the parameters without escaping anything."""

_OF_NODES = {"split_feature": _INTEGERS, "left_child": _INTEGERS, "right_child": _INTEGERS,
             "decision_type": _INTEGERS, "threshold": _NUMBERS, "split_gain": _NUMBERS,
             "internal_value": _NUMBERS, "internal_weight": _NUMBERS,
             "internal_count": _INTEGERS}  # fmt: skip
_OF_LEAVES = {"leaf_value": _NUMBERS, "leaf_weight": _NUMBERS, "leaf_count": _INTEGERS}
_HEADER = {"version", "num_class", "num_tree_per_iteration", "label_index", "max_feature_idx",
           "objective", "feature_names", "feature_infos", "tree_sizes"}  # fmt: skip


def read_trees(text: str) -> lightgbm.Booster:
    """LightGBM's own object of checked trees.

    Raises:
        ValueError: LightGBM cannot read them.
    """
    # Here: with what it reads in itself it takes over a second, as long as the rest of a start, and
    # many a service has no trees.
    import lightgbm

    try:
        return lightgbm.Booster(model_str=text)
    except lightgbm.basic.LightGBMError as error:
        raise ValueError(str(error)) from None


def check_trees(text: str) -> None:
    """Checks what LightGBM does not.

    Args:
        text: a model of numerical splits, with constant leaves, as LightGBM writes it.

    Raises:
        ValueError: it is no such text; says what is wrong and where.
    """
    if not re.fullmatch(r"[\n -~]*", text):
        _wrong("there are characters that no trees have")
    head, found, _ = text.partition("\n\nTree=")
    if not found or not head.startswith("tree\n"):
        _wrong("it does not begin as trees do")
    header = _pairs(head.removeprefix("tree\n"), "the header")
    if not header.keys() <= _HEADER:
        _wrong(f"the header has {min(header.keys() - _HEADER)}")
    sizes = _integers(header, "tree_sizes", None, "the header")
    classes, each, last = (
        _integers(header, name, 1, "the header")[0]
        for name in ("num_class", "num_tree_per_iteration", "max_feature_idx")
    )
    if classes < 1 or each != classes or len(sizes) % classes or last < 0:
        _wrong(f"{len(sizes)} trees, {each} at a time, are not of {classes} classes")
    at = len(head) + 2
    for number, size in enumerate(sizes):
        name, block = f"Tree={number}", text[at : at + max(size, 0)]
        if not block.startswith(f"{name}\n") or not block.endswith("\n\n\n"):
            _wrong(f"{name} is not where tree_sizes says")
        _check_tree(_pairs(block.removeprefix(f"{name}\n").rstrip("\n"), name), last + 1, name)
        at += size
    if not _TAIL.fullmatch(text, at):
        _wrong("what follows the trees is not what LightGBM writes")


def _check_tree(tree: dict[str, str], features: int, name: str) -> None:
    leaves = _integers(tree, "num_leaves", 1, name)[0]
    usual = {"num_leaves", "num_cat", "is_linear", "shrinkage", *_OF_NODES, *_OF_LEAVES}
    if not tree.keys() <= usual or tree.get("num_cat") != "0" or tree.get("is_linear", "0") != "0":
        _wrong(f"{name} has categories, linear leaves or something unknown")
    if leaves < 1 or not _NUMBERS.fullmatch(tree.get("shrinkage", "")):
        _wrong(f"{name} has {leaves} leaves, or no shrinkage")
    for key, kind in (_OF_NODES | _OF_LEAVES).items():
        _check_values(tree, key, leaves - (key in _OF_NODES), kind, name)
    if not _FINITE.fullmatch(tree["leaf_value"]):
        _wrong(f"{name} has leaf values that are not finite")
    if leaves > 1:
        _check_nodes(tree, leaves, features, name)


def _check_values(
    tree: dict[str, str], key: str, count: int, kind: re.Pattern[str], name: str
) -> None:
    """That there are so many numbers; a lone leaf goes without all but its value."""
    values = tree.get(key, "")
    if not values and (not count or (count == 1 and key in ("leaf_weight", "leaf_count"))):
        return
    if not kind.fullmatch(values) or values.count(" ") + 1 != count:
        _wrong(f"{name} has no {count} numbers {key}")


def _check_nodes(tree: dict[str, str], leaves: int, features: int, name: str) -> None:
    nodes = leaves - 1
    left, right = (_integers(tree, f"{side}_child", nodes, name) for side in ("left", "right"))
    # Every node but the root, and every leaf (-1, -2, ...), is the child of one node before it.
    children = sorted([*left, *right])
    if children != [*range(-leaves, 0), *range(1, nodes)] or any(
        0 <= child <= node for side in (left, right) for node, child in enumerate(side)
    ):
        _wrong(f"{name} is not a tree: its children are wrong")
    if not all(0 <= at < features for at in _integers(tree, "split_feature", nodes, name)):
        _wrong(f"{name} splits by features outside 0 to {features - 1}")
    if not all(
        0 <= at < 16 and at % 2 == 0 for at in _integers(tree, "decision_type", nodes, name)
    ):
        _wrong(f"{name} has splits that are not numerical")


def _pairs(lines: str, where: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for line in lines.split("\n"):
        key, equals, value = line.partition("=")
        if not equals or key in pairs:
            _wrong(f"{where} has the line {line[:40]!r}")
        pairs[key] = value
    return pairs


def _integers(pairs: dict[str, str], key: str, count: int | None, where: str) -> list[int]:
    if not _INTEGERS.fullmatch(pairs.get(key, "")):
        _wrong(f"{where} has no integers {key}")
    values = [int(value) for value in pairs[key].split(" ")]
    if count not in (None, len(values)):
        _wrong(f"{where} has not {count} numbers {key}")
    return values


def _wrong(what: str) -> NoReturn:
    raise ValueError(f"no trees that can be read: {what}")
