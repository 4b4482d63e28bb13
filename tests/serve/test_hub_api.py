"""What a team keeps, by HTTP: jobs, the catalogue, and what a live model was made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from openm6.core.environment import ARTIFACTS, CATALOGUE, HOME
from openm6.hub.catalogue import Catalogue
from openm6.hub.jobs import Jobs
from openm6.inference.session import Session
from openm6.serve.keys import Keys
from openm6.serve.server import Options
from openm6.serve.wire import Place
from tests.serve.test_api import Served

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME, str(place))
        patch.delenv(CATALOGUE, raising=False)
        patch.delenv(ARTIFACTS, raising=False)
        yield place


@pytest.fixture(scope="module")
def asked(session: Session, home: Path) -> Iterator[dict[str, httpx2.Client]]:
    """Clients with a key of each role, and without one, of a server whose model is of the catalogue."""
    (home / "talks.jsonl").write_text(json.dumps({"text": "红"}) + "\n", "utf-8")
    session.save(home / "run" / "model")
    catalogue = Catalogue()
    catalogue.add_data("talks", str(home / "talks.jsonl"))
    version = catalogue.add_model("goods", home / "run" / "model", made_of=["data:talks@1"])
    keys = Keys(home / "keys.json")
    secrets = {"use": keys.add("reader"), "manage": keys.add("chief", "manage"), "none": "m6-no"}
    served = Served({"goods": Place(catalogue.local(version))}, Options(keys=home / "keys.json"))
    yield {
        role: httpx2.Client(base_url=served.url, headers={"Authorization": f"Bearer {secret}"}, timeout=60)
        for role, secret in secrets.items()
    }
    served.stop()


def test_jobs_are_submitted_and_stopped_by_those_who_manage(asked: dict[str, Any], home: Path) -> None:
    command = {"command": ["eval", "--help"], "name": "help"}
    for role, status in (("none", 401), ("use", 403)):
        assert asked[role].post("/v1/jobs", json=command).status_code == status
    assert Jobs().list() == []
    made = asked["manage"].post("/v1/jobs", json=command)
    assert made.status_code == 201 and made.json()["state"] == "waiting"
    identity = made.json()["id"]
    assert [one["id"] for one in asked["use"].get("/v1/jobs").json()["data"]] == [identity]
    assert asked["use"].post(f"/v1/jobs/{identity}/stop").status_code == 403
    assert asked["manage"].post(f"/v1/jobs/{identity}/stop").json()["state"] == "stopped"
    assert asked["manage"].post(f"/v1/jobs/{identity}/resume").json()["state"] == "waiting"
    Jobs().work(until_empty=True, seconds=0.05)
    assert asked["use"].get(f"/v1/jobs/{identity}").json()["state"] == "done"
    assert "Usage" in asked["use"].get(f"/v1/jobs/{identity}/log").text
    assert asked["manage"].delete(f"/v1/jobs/{identity}").status_code == 204
    assert asked["use"].get(f"/v1/jobs/{identity}").status_code == 404


@pytest.mark.parametrize("command", [[], ["rm"], ["keys", "add", "x"], ["--extension", "evil.py", "train"]])
def test_only_commands_that_are_jobs_are(asked: dict[str, Any], command: list[str]) -> None:
    assert asked["manage"].post("/v1/jobs", json={"command": command}).status_code == 400


def test_the_catalogue_is_read_by_all_and_changed_by_those_who_manage(asked: dict[str, Any], home: Path) -> None:
    assert [one["name"] for one in asked["use"].get("/v1/catalogue/data").json()["data"]] == ["talks"]
    told = asked["use"].get("/v1/catalogue/models/goods@1").json()
    assert told["made_of"][0]["name"] == "talks" and told["made_of"][0]["records"] == 1
    new = {"name": "goods", "place": str(home / "run" / "model"), "made_of": ["goods@1"]}
    assert asked["use"].post("/v1/catalogue/models", json=new).status_code == 403
    assert asked["manage"].post("/v1/catalogue/models", json=new).json()["version"] == 2
    for path in ("models/none", "models/goods@9", "models/..%2F..", "data/goods"):
        assert asked["use"].get(f"/v1/catalogue/{path}").status_code == 404
    assert asked["manage"].post("/v1/catalogue/data", json={"name": "../x", "place": "a"}).status_code == 400


def test_from_an_answers_model_back_to_its_data(asked: dict[str, Any], home: Path) -> None:
    told = asked["use"].get("/v1/models/goods/lineage").json()
    assert (told["name"], told["version"]) == ("goods", 1) and told["made_of"][0]["source"].endswith("talks.jsonl")
    swapped = asked["manage"].post("/v1/models/goods/promote", json={"path": "goods@1"})
    assert swapped.status_code == 200, swapped.text
    assert asked["manage"].post("/v1/models/goods/promote", json={"path": str(home / "run" / "model")}).is_success
    assert asked["use"].get("/v1/models/goods/lineage").status_code == 404
    assert asked["use"].get("/v1/models/none/lineage").status_code == 404
