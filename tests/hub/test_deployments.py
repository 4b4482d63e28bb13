"""A model served in the background by one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from openm6 import Client
from openm6.cli import commands
from openm6.core.environment import HOME
from openm6.core.errors import OpenM6Error, UsageError
from openm6.hub.deployments import Deployments
from tests.conftest import drawing_session


def call(*words: object) -> Any:
    done = CliRunner().invoke(commands(), [*map(str, words), "--json"])
    if isinstance(done.exception, OpenM6Error):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.slow
def test_one_command_serves_a_model_until_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    drawing_session(tasks=("text_vector",)).save(tmp_path / "goods" / "model")
    made = call("deploy", tmp_path / "goods" / "model")
    try:
        assert made["name"] == "goods"
        assert Client(made["url"], retries=0).run("text_vector", text="红").shape == (32,)
        (listed,) = call("deployments", "list")
        assert (listed["name"], listed["state"]) == ("goods", "serving")
        with pytest.raises(UsageError, match="is already served"):
            call("deploy", tmp_path / "goods" / "model")
    finally:
        Deployments().stop("goods")
    assert call("deployments", "list") == []
    with pytest.raises(UsageError, match="There is no deployment goods"):
        Deployments().stop("goods")


@pytest.mark.slow
def test_a_server_that_does_not_come_up_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", "utf-8")
    with pytest.raises(OpenM6Error, match="did not start"):
        Deployments().start("goods", tmp_path / "model")
    assert Deployments().list() == []
    with pytest.raises(UsageError, match="is not a valid name of a deployment"):
        Deployments().start("../goods", tmp_path / "model")
    with pytest.raises(UsageError, match="is no OpenM6 model"):
        call("deploy", tmp_path)


def test_files_for_elsewhere(tmp_path: Path) -> None:
    drawing_session().save(tmp_path / "model")
    found = call("deploy", tmp_path / "model", "--to", "k8s", "--name", "goods", "--output", tmp_path / "out")
    assert any(name.endswith("deployment.yaml") for name in found["files"])
    assert "goods" in (tmp_path / "out" / "service.yaml").read_text("utf-8")
