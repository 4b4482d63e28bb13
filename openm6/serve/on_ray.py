"""The API on a Ray cluster: replicas of the server, each with its model's process, autoscaled under load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openm6.core.extras import require
from openm6.core.ray_cluster import connect
from openm6.serve.fleet import Fleet
from openm6.serve.server import Options
from openm6.serve.wire import Place

ONGOING = 16
"""Number of requests of a replica above which another one is started."""


def deploy_on_ray(
    name: str, model: Path, options: Options, *, replicas: int = 1, most: int = 4, cpus: float = 1.0,
    host: str = "127.0.0.1", port: int = 8000, address: str | None = None,
) -> str:  # fmt: skip
    """Serve a model directory on the cluster at `address` (one is started here where there is none). Returns the URL;
    the deployment stays when this process ends, on a cluster that does. Raises UsageError without Ray."""
    require("ray", "ray")
    import ray
    from ray import serve

    if not ray.is_initialized():
        connect(address, log_to_driver=False)
    serve.start(http_options={"host": host, "port": port})

    def app() -> Any:
        from openm6.serve.api import create_app

        return create_app(Fleet(), options, {name: Place(model)})

    scaling: dict[str, Any] = {
        "min_replicas": replicas, "max_replicas": max(replicas, most), "target_ongoing_requests": ONGOING,
    }  # fmt: skip

    @serve.deployment(
        name=name, autoscaling_config=scaling, ray_actor_options={"num_cpus": cpus}, max_ongoing_requests=4 * ONGOING,
        graceful_shutdown_timeout_s=options.drain,
    )  # fmt: skip
    @serve.ingress(app)
    class Server:
        pass

    serve.run(Server.bind(), name=name, route_prefix="/")  # type: ignore[attr-defined]
    return f"http://{host}:{port}"
