"""The fake, beyond what the contract tests ask of it and of the real services."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import foretell
import foretell.testing
from foretell.testing.collections import COLS, encode

TEA = {148: -0.5, 215: 0.5, 306: 0.5, 323: 0.5}
"""The numbers of the vector of "tea" that are not zero."""


@pytest.fixture
def fakes() -> Iterator[foretell.testing.FakeServices]:
    with foretell.testing.FakeServices() as found:
        yield found


@pytest.fixture
def client(fakes: foretell.testing.FakeServices) -> Iterator[foretell.Client]:
    with foretell.Client(
        embedder=fakes.embedder_address, predictor=fakes.predictor_address
    ) as found:
        yield found


def shop(client: foretell.Client) -> None:
    """Two kinds of items, and a user who had one of each."""
    texts = {"t1": "green tea", "t2": "black tea", "c1": "blue car", "c2": "red car"}
    client.upsert_items(foretell.Item(item, text) for item, text in texts.items())
    client.ingest_events(
        [
            foretell.Event("ann", "view", item_id="c1"),
            foretell.Event("ann", "buy", item_id="t1"),
            foretell.Event("bob", "buy", item_id="t1"),
        ]
    )


def test_it_needs_neither_torch_nor_faiss_nor_the_services() -> None:
    program = (
        "import sys, foretell.testing\n"
        "with foretell.testing.FakeServices(): pass\n"
        "print([n for n in ('torch', 'faiss', 'sqlite3', 'serving', 'embedder', 'predictor')"
        " if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert ast.literal_eval(done.stdout) == []


def test_two_fakes_share_nothing() -> None:
    with foretell.testing.FakeServices() as one, foretell.testing.FakeServices() as other:
        addresses = {one.embedder_address, one.predictor_address}
        assert addresses.isdisjoint({other.embedder_address, other.predictor_address})
        with foretell.Client(one.embedder_address) as client:
            client.upsert_items([foretell.Item("a", "tea")])
        with foretell.Client(other.embedder_address) as client:
            assert client.get_items(["a"]).missing_ids == ("a",)


def test_after_the_block_nobody_answers() -> None:
    with foretell.testing.FakeServices() as fakes:
        address = fakes.embedder_address
        watching = foretell.Client(address)
        next(iter(watching.watch_items()))
    with foretell.Client(address, timeout_s=2) as client, pytest.raises(foretell.ForetellError):
        client.embedder_info()
    watching.close()


def test_text_vectors_are_the_same_in_every_process() -> None:
    vector = encode("Green tea")
    assert vector.shape == (COLS,)
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1)
    np.testing.assert_array_equal(vector, encode("green  TEA"))
    # Written down: whoever keeps expected answers in files relies on it.
    tea = encode("tea")
    assert {int(at): float(tea[at]) for at in np.flatnonzero(tea)} == TEA


def test_blank_texts_have_the_zero_vector_and_others_have_not() -> None:
    assert not encode(" \n").any()
    for text in ("a", "!", "字", "🙂", "1", "_"):
        assert encode(text).any()


def test_a_registered_model_answers_once_it_is_active(
    fakes: foretell.testing.FakeServices, client: foretell.Client
) -> None:
    shop(client)
    fakes.register_model(
        "v1",
        behavior_types=["buy", "view", "share"],
        metrics={"hits@10": 0.25},
        repeats=foretell.Repeats.EXCLUDED,
    )
    (model,) = client.list_models().elements
    assert (model.version, model.active, model.metrics) == ("v1", False, {"hits@10": 0.25})
    assert client.predict("ann").fallback_reason is foretell.FallbackReason.NO_MODEL
    client.activate_model("v1")
    prediction = client.predict("bob")
    assert prediction.model_version == "v1"
    assert prediction.fallback_reason is None
    assert [item.item_id for item in prediction.items] == ["t2", "c1", "c2"]
    assert {item.method for item in prediction.items} == {foretell.Method.MODEL}
    assert prediction.items[0].interest_score == pytest.approx(
        float(encode("green tea") @ encode("black tea"))
    )
    assert prediction.shortfall_reason is foretell.ShortfallReason.FILTERED
    # bob's one purchase and everybody's shares of 2/3 and 1/3, in proportion
    shares = {each.behavior_type: each.probability for each in prediction.behavior_types}
    assert shares == pytest.approx({"buy": 5 / 6, "view": 1 / 6, "share": 0})


def test_a_model_of_types_only(
    fakes: foretell.testing.FakeServices, client: foretell.Client
) -> None:
    shop(client)
    fakes.register_model("types", behavior_types=["buy"], items=0)
    client.activate_model("types")
    prediction = client.predict("ann")
    assert prediction.fallback_reason is foretell.FallbackReason.NO_ITEM_HEAD
    assert len(prediction.items) == 4
    assert [each.behavior_type for each in prediction.behavior_types] == ["buy"]


@pytest.mark.parametrize(("version", "types"), [("Bad Name", ["buy"]), ("v1", [])])
def test_a_bad_model_is_refused(
    fakes: foretell.testing.FakeServices, version: str, types: list[str]
) -> None:
    with pytest.raises(foretell.InvalidArgumentError):
        fakes.register_model(version, behavior_types=types)


def test_a_version_is_registered_once(fakes: foretell.testing.FakeServices) -> None:
    fakes.register_model("v1", behavior_types=["buy"])
    with pytest.raises(foretell.AlreadyExistsError):
        fakes.register_model("v1", behavior_types=["buy"])


def test_without_the_embedder_predictions_fall_back(
    fakes: foretell.testing.FakeServices, client: foretell.Client
) -> None:
    shop(client)
    fakes.register_model("v1", behavior_types=["buy", "view"])
    client.activate_model("v1")
    fakes.set_embedder_available(False)
    prediction = client.predict("ann")
    assert prediction.fallback_reason is foretell.FallbackReason.EMBEDDER_UNAVAILABLE
    methods = [item.method for item in prediction.items]
    assert methods == [foretell.Method.PERSONAL_FREQUENCY] * 2 + [foretell.Method.POPULAR] * 2
    assert not client.predictor_info().embedder_available
    fakes.set_embedder_available(True)
    assert client.predict("ann").fallback_reason is None


def test_popular_items_are_those_of_most_events(client: foretell.Client) -> None:
    shop(client)
    prediction = client.predict("stranger")
    assert prediction.fallback_reason is foretell.FallbackReason.NO_HISTORY
    scores = {item.item_id: item.interest_score for item in prediction.items}
    assert scores == pytest.approx({"t1": 2 / 3, "c1": 1 / 3, "c2": 0, "t2": 0})
    assert list(scores) == ["t1", "c1", "c2", "t2"]


def test_the_next_call_fails_as_asked_for_and_the_one_after_does_not(
    fakes: foretell.testing.FakeServices, client: foretell.Client
) -> None:
    fakes.fail_next(
        "IngestEvents",
        foretell.ResourceExhaustedError(
            "too much", reason="BUSY", metadata={"queue": "9"}, retry_after_s=1.5
        ),
    )
    event = foretell.Event("ann", "view", text="tea")
    with pytest.raises(foretell.ResourceExhaustedError) as caught:
        client.ingest_events([event])
    error = caught.value
    assert (error.message, error.reason, error.metadata) == ("too much", "BUSY", {"queue": "9"})
    assert error.retry_after_s == 1.5
    assert client.list_events("ann").elements == ()
    assert client.ingest_events([event]).accepted == 1


def test_the_client_repeats_what_was_unavailable(
    fakes: foretell.testing.FakeServices, client: foretell.Client
) -> None:
    error = foretell.UnavailableError("gone")
    fakes.fail_next("Predict", error)
    client.predict("ann")
    fakes.fail_next("Predict", error, times=5)
    with pytest.raises(foretell.UnavailableError):
        client.predict("ann")
    client.predict("ann")


def test_one_services_method_can_fail_alone(
    fakes: foretell.testing.FakeServices, client: foretell.Client
) -> None:
    fakes.fail_next("ModelService/GetInfo", foretell.InternalError("broken"))
    client.embedder_info()
    with pytest.raises(foretell.InternalError):
        client.predictor_info()


def test_a_watch_can_fail(fakes: foretell.testing.FakeServices, client: foretell.Client) -> None:
    fakes.fail_next("WatchItems", foretell.PermissionDeniedError("no"))
    with pytest.raises(foretell.PermissionDeniedError):
        next(iter(client.watch_items()))


def test_only_methods_that_exist_can_fail(fakes: foretell.testing.FakeServices) -> None:
    with pytest.raises(ValueError, match="Guess"):
        fakes.fail_next("Guess", foretell.InternalError("never"))


def test_behavior_texts_are_searchable_until_no_event_has_them(client: foretell.Client) -> None:
    client.ingest_events(
        [
            foretell.Event("ann", "search", text="green tea"),
            foretell.Event("ann", "search", text="only ann's"),
            foretell.Event("bob", "search", text="green tea"),
        ]
    )

    def texts() -> set[str]:
        return {item.text for item in client.list_items(collection="behaviors").elements}

    assert texts() == {"green tea", "only ann's"}
    client.delete_user("ann")
    assert texts() == {"green tea"}


def test_the_documentation_names_a_client_that_works(tmp_path: Path) -> None:
    documentation = foretell.testing.__doc__ or ""
    lines = [line[4:] for line in documentation.splitlines() if line.startswith("    ")]
    program = "\n".join(["import foretell, foretell.testing", *lines, "    client.close()"])
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=tmp_path)
