"""Files for containers: valid by the schemas of those who read them, and closed where they can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from openm6.core.errors import UsageError
from openm6.hub.deployments import PORT, Plan, compose, kubernetes, write


def test_kubernetes_takes_them() -> None:
    import kubernetes_validate

    files = kubernetes(Plan("goods", replicas=3, most=5))
    assert set(files) == {"deployment.yaml", "service.yaml", "autoscaler.yaml", "disruption.yaml"}
    for content in files.values():
        kubernetes_validate.validate(yaml.safe_load(content), "1.29", strict=True)
    wrong = yaml.safe_load(files["deployment.yaml"])
    wrong["spec"]["replicas"] = "many"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.29", strict=True)


def test_a_pod_may_hardly_do_anything() -> None:
    files = {name: yaml.safe_load(content) for name, content in kubernetes(Plan("goods")).items()}
    pod: dict[str, Any] = files["deployment.yaml"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")} == {"/tmp"}
    assert "--keys" in container["args"] and container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    labels = files["deployment.yaml"]["spec"]["template"]["metadata"]["labels"]
    assert files["service.yaml"]["spec"]["selector"] == labels
    assert files["autoscaler.yaml"]["spec"]["scaleTargetRef"]["name"] == "goods"


def test_a_pod_has_the_time_that_its_server_takes_to_end() -> None:
    """No request comes to a socket that is closed, and nothing that runs is killed."""
    import inspect

    from openm6.cli.serve import serve
    from openm6.serve.server import Options

    pod = yaml.safe_load(kubernetes(Plan("goods"))["deployment.yaml"])["spec"]["template"]["spec"]
    container = pod["containers"][0]
    command, pause = container["lifecycle"]["preStop"]["exec"]["command"]
    probe = container["readinessProbe"]
    linger = inspect.signature(serve).parameters["linger"].default
    assert command == "sleep" and int(pause) > 0 and linger > 0
    assert pod["terminationGracePeriodSeconds"] > int(pause) + linger + 2 * Options.drain
    assert probe["httpGet"]["path"] == "/readyz" and probe["timeoutSeconds"] <= probe["periodSeconds"]


def test_compose_is_as_closed(tmp_path: Path) -> None:
    service = yaml.safe_load(compose(Plan("goods"), tmp_path / "model", tmp_path / "keys.json"))["services"]["goods"]
    assert service["read_only"] and service["user"].startswith("10001") and service["cap_drop"] == ["ALL"]
    assert all(volume["read_only"] for volume in service["volumes"])
    assert service["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]


def test_they_are_written_with_a_dockerfile(tmp_path: Path) -> None:
    found = write("k8s", Plan("goods"), tmp_path / "out", tmp_path, tmp_path / "keys.json")
    assert {path.name for path in found} >= {"Dockerfile", "deployment.yaml"}
    text = (tmp_path / "out" / "Dockerfile").read_text("utf-8")
    assert "USER 10001" in text and "{" not in text.replace("${", "")


@pytest.mark.parametrize("name", ["", "Goods", "goods_1", "-goods", "a" * 60, "goods/../x", "goods\n"])
def test_a_name_has_to_be_one_of_a_service(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a service"):
        Plan(name)


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="replicas"):
        Plan("goods", replicas=9, most=3)
    with pytest.raises(UsageError, match="--to is"):
        write("moon", Plan("goods"), tmp_path, tmp_path, tmp_path)
