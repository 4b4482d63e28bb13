"""Files to deploy a model elsewhere: Dockerfile, Docker Compose, Kubernetes.

All run without root on a read-only file system with a temporary folder, mount the model read-only and the keys from a
secret, probe /healthz and /readyz, and drain running requests before the end. Kubernetes stops sending requests first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from openm6._version import __version__
from openm6.core.errors import UsageError

PORT, USER = 8000, 10001
PRESTOP = 5
"""Seconds before SIGTERM in which Kubernetes stops sending requests to a terminating pod."""
GRACE = 90
"""Seconds until a server is killed: PRESTOP, the time in which it refuses new requests, and twice its drain time (once
for the connections, once for the models' processes)."""

DOCKERFILE = f"""\
# The server without a model, which is mounted at /model. Build it in the root of the project:
#     docker build -f {{where}}Dockerfile -t openm6 .
# Without a GPU (1.4 GB instead of 6): --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
FROM python:3.12-slim

ARG TORCH_INDEX=https://pypi.org/simple
RUN pip install --no-cache-dir --index-url $TORCH_INDEX 'torch>=2.13,<2.14'
COPY pyproject.toml README.md /openm6/
COPY openm6 /openm6/openm6
RUN pip install --no-cache-dir '/openm6[serve]' && useradd --uid {USER} --no-create-home openm6

USER {USER}
ENV HOME=/tmp OPENM6_CACHE=/tmp/openm6 HF_HUB_OFFLINE=1
EXPOSE {PORT}
ENTRYPOINT ["openm6"]
CMD ["serve", "model=/model", "--host", "0.0.0.0", "--port", "{PORT}", "--keys", "/keys/keys.json"]
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """A deployment: name of the service (a DNS label), container image, minimum and maximum number of servers, limits
    of one server."""

    name: str
    image: str = f"openm6:{__version__}"
    replicas: int = 2
    most: int = 8
    cpus: float = 2.0
    memory_gib: float = 4.0
    claim: str = "openm6-models"
    """Kubernetes: the volume claim with the model directory, under `name`."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?", self.name):
            raise UsageError(f"{self.name!r} cannot name a service: use at most 52 lower-case letters, digits and -.")
        if not 1 <= self.replicas <= self.most:
            raise UsageError(f"replicas is {self.replicas}; it has to be 1 to the maximum, {self.most}.")


def serving(name: str) -> list[str]:
    """The command line inside a container."""
    return ["serve", f"{name}=/model", "--host", "0.0.0.0", "--port", str(PORT), "--keys", "/keys/keys.json"]


def compose(plan: Plan, model: Path, keys: Path) -> str:
    """The contents of a compose.yaml."""
    probe = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{PORT}/readyz', timeout=3)"
    service = {
        "image": plan.image, "command": serving(plan.name), "user": f"{USER}:{USER}", "read_only": True,
        "tmpfs": ["/tmp"], "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"],
        "ports": [f"127.0.0.1:{PORT}:{PORT}"],
        "volumes": [
            {"type": "bind", "source": str(model.resolve()), "target": "/model", "read_only": True},
            {"type": "bind", "source": str(keys.resolve()), "target": "/keys/keys.json", "read_only": True},
        ],
        "healthcheck": {
            "test": ["CMD", "python", "-c", probe], "interval": "10s", "timeout": "5s", "retries": 3,
            "start_period": "120s",
        },
        "restart": "unless-stopped", "stop_grace_period": f"{GRACE}s",
        "deploy": {"resources": {"limits": {"cpus": str(plan.cpus), "memory": f"{plan.memory_gib:g}g"}}},
    }  # fmt: skip
    return _dump({"name": plan.name, "services": {plan.name: service}})


def kubernetes(plan: Plan) -> dict[str, str]:
    """Contents of the Deployment, Service, HorizontalPodAutoscaler and PodDisruptionBudget, by file name."""
    labels = {"app.kubernetes.io/name": plan.name, "app.kubernetes.io/part-of": "openm6"}

    def probe(path: str, **more: int) -> dict[str, Any]:
        return {"httpGet": {"path": path, "port": "http"}, "timeoutSeconds": 3, **more}

    container = {
        "name": "server", "image": plan.image, "args": serving(plan.name),
        "ports": [{"name": "http", "containerPort": PORT}],
        "startupProbe": probe("/readyz", periodSeconds=5, failureThreshold=60),
        "readinessProbe": probe("/readyz", periodSeconds=5, failureThreshold=2),
        "livenessProbe": probe("/healthz", periodSeconds=10, failureThreshold=3),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PRESTOP)]}}},
        "resources": {
            "requests": {"cpu": f"{plan.cpus:g}", "memory": f"{plan.memory_gib:g}Gi"},
            "limits": {"memory": f"{plan.memory_gib:g}Gi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "model", "mountPath": "/model", "subPath": plan.name, "readOnly": True},
            {"name": "keys", "mountPath": "/keys", "readOnly": True}, {"name": "tmp", "mountPath": "/tmp"},
        ],
    }  # fmt: skip
    pod = {
        "automountServiceAccountToken": False, "terminationGracePeriodSeconds": GRACE,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "model", "persistentVolumeClaim": {"claimName": plan.claim, "readOnly": True}},
            {"name": "keys", "secret": {"secretName": f"{plan.name}-keys", "defaultMode": 0o440}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "2Gi"}},
        ],
    }  # fmt: skip
    deployment = {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": plan.name, "labels": labels},
        "spec": {
            "replicas": plan.replicas, "selector": {"matchLabels": labels},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }  # fmt: skip
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": plan.name, "labels": labels},
        "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    }  # fmt: skip
    scaler = {
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": plan.name, "labels": labels},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": plan.name},
            "minReplicas": plan.replicas, "maxReplicas": plan.most,
            "metrics": [{
                "type": "Resource",
                "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}},
            }],
        },
    }  # fmt: skip
    budget = {
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": plan.name, "labels": labels},
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": labels}},
    }  # fmt: skip
    every = {"deployment": deployment, "service": service, "autoscaler": scaler, "disruption": budget}
    return {f"{name}.yaml": _dump(content) for name, content in every.items()}


def write(to: str, plan: Plan, output: Path, model: Path, keys: Path) -> list[Path]:
    """Write the files for `compose` or `k8s` into a folder. Raises UsageError for anything else."""
    if to == "compose":
        files = {"compose.yaml": compose(plan, model, keys)}
    elif to == "k8s":
        files = kubernetes(plan)
    else:
        raise UsageError(f"--to is here, compose, k8s or ray, not {to}.")
    files["Dockerfile"] = DOCKERFILE.format(where=f"{output}/")
    output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (output / name).write_text(content, "utf-8")
    return [output / name for name in files]


def _dump(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
