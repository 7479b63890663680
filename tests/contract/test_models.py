"""ModelService: the contract of the fake and of the real one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from foretell.embedder.v1 import embedder_service_pb2 as embedder_pb
from foretell.predictor.v1 import model_service_pb2 as pb
from foretell.predictor.v1 import prediction_service_pb2 as prediction_pb

if TYPE_CHECKING:
    from tests.contract.conftest import Refused, Services

TYPES = ["buy", "view"]
INVALID = "INVALID_ARGUMENT"


@pytest.fixture
def versions(services: Services, unique: str) -> Iterator[list[str]]:
    """Three registered versions, oldest first."""
    names = [f"{unique}-{number}" for number in range(3)]
    for name in names:
        services.register_model(name, TYPES)
    yield names
    active = services.models.GetInfo(pb.GetInfoRequest()).model_version
    for name in names:
        if name != active and name in listed(services):
            services.models.DeleteModel(pb.DeleteModelRequest(version=name), timeout=60)


def listed(services: Services) -> dict[str, pb.Model]:
    answer = services.models.ListModels(pb.ListModelsRequest(page_size=1_000), timeout=60)
    return {model.version: model for model in answer.models}


def activate(services: Services, version: str) -> pb.ActivateModelResponse:
    return services.models.ActivateModel(pb.ActivateModelRequest(version=version), timeout=60)


def collections(services: Services) -> set[str]:
    answer = services.embedder.ListCollections(embedder_pb.ListCollectionsRequest(), timeout=60)
    return {collection.name for collection in answer.collections}


def test_registered_versions_are_listed_newest_first(
    services: Services, versions: list[str]
) -> None:
    found = listed(services)
    assert list(found)[:3] == versions[::-1]
    model = found[versions[0]]
    assert sorted(model.behavior_types) == TYPES
    assert not model.active
    assert model.model_type
    assert model.items == 1
    assert model.repeats == prediction_pb.REPEATS_ALLOWED
    assert model.registered_at.seconds > 1_700_000_000


def test_pages_follow_one_another(services: Services, versions: list[str]) -> None:
    found: list[str] = []
    token, sizes = "", list[int]()
    while not sizes or token:
        page = services.models.ListModels(pb.ListModelsRequest(page_size=2, page_token=token))
        found += [model.version for model in page.models]
        sizes.append(len(page.models))
        token = page.next_page_token
    assert found == list(listed(services))
    assert set(sizes[:-1]) == {2}


def test_bad_pages_are_refused(services: Services, refused: Refused) -> None:
    call = services.models.ListModels
    refused(call, pb.ListModelsRequest(page_size=-1), INVALID, "BAD_PAGE", "page_size")
    for token in ("garbage!", "AAAA", "ü", "MTox"):
        request = pb.ListModelsRequest(page_token=token)
        refused(call, request, INVALID, "BAD_PAGE_TOKEN", "page_token")


def test_an_activated_version_answers_and_is_published(
    services: Services, versions: list[str]
) -> None:
    before = services.models.GetInfo(pb.GetInfoRequest()).model_version
    answer = activate(services, versions[0])
    assert (answer.model.version, answer.model.active) == (versions[0], True)
    assert answer.previous_version == before
    assert activate(services, versions[1]).previous_version == versions[0]
    assert [name for name, model in listed(services).items() if model.active] == [versions[1]]
    assert services.models.GetInfo(pb.GetInfoRequest()).model_version == versions[1]
    names = {f"{version}.items" for version in versions[:2]}
    assert names <= collections(services)
    query = prediction_pb.PredictionQuery()
    answered = services.predictions.Predict(prediction_pb.PredictRequest(query=query), timeout=60)
    assert answered.prediction.model_version == versions[1]


def test_the_version_before_can_come_back(services: Services, versions: list[str]) -> None:
    for version in (versions[0], versions[1], versions[0]):
        activate(services, version)
    assert services.models.GetInfo(pb.GetInfoRequest()).model_version == versions[0]


def test_a_deleted_version_is_gone_with_its_collections(
    services: Services, refused: Refused, versions: list[str]
) -> None:
    activate(services, versions[0])
    activate(services, versions[1])
    request = pb.DeleteModelRequest(version=versions[0])
    services.models.DeleteModel(request, timeout=60)
    assert versions[0] not in listed(services)
    assert not [name for name in collections(services) if name.startswith(f"{versions[0]}.")]
    call = services.models.DeleteModel
    refused(call, request, "NOT_FOUND", "VERSION_NOT_FOUND", "version")
    services.register_model(versions[0], TYPES)  # its name is free
    assert not listed(services)[versions[0]].active


def test_the_active_version_is_not_deleted(
    services: Services, refused: Refused, versions: list[str]
) -> None:
    activate(services, versions[0])
    request = pb.DeleteModelRequest(version=versions[0])
    call, code = services.models.DeleteModel, "FAILED_PRECONDITION"
    refused(call, request, code, "VERSION_ACTIVE", "version")
    assert listed(services)[versions[0]].active


@pytest.mark.parametrize("version", ["", "x" * 65, "Upper", "a b", ".a"])
def test_bad_names_are_refused(services: Services, refused: Refused, version: str) -> None:
    models = services.models
    activation = pb.ActivateModelRequest(version=version)
    refused(models.ActivateModel, activation, INVALID, "BAD_NAME", "version")
    deletion = pb.DeleteModelRequest(version=version)
    refused(models.DeleteModel, deletion, INVALID, "BAD_NAME", "version")


def test_an_unknown_version_is_not_found(services: Services, refused: Refused, unique: str) -> None:
    models, code, reason = services.models, "NOT_FOUND", "VERSION_NOT_FOUND"
    before = models.GetInfo(pb.GetInfoRequest()).model_version
    activation = pb.ActivateModelRequest(version=unique)
    refused(models.ActivateModel, activation, code, reason, "version")
    deletion = pb.DeleteModelRequest(version=unique)
    refused(models.DeleteModel, deletion, code, reason, "version")
    assert models.GetInfo(pb.GetInfoRequest()).model_version == before


def test_info_says_what_runs(services: Services) -> None:
    info = services.models.GetInfo(pb.GetInfoRequest(), timeout=60)
    assert info.version
    assert info.libraries["grpcio"]
    assert info.embedder_address == services.embedder_address
    assert info.embedder_available
