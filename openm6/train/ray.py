"""The same recipe on a Ray cluster: one worker a process, restarted by Ray, going on from the last checkpoint."""

from __future__ import annotations

from typing import Any

from openm6.core.errors import OpenM6Error
from openm6.core.extras import require
from openm6.core.ray_cluster import connect
from openm6.train.recipe import AnyRecipe


def train_on_ray(recipe: AnyRecipe, workers: int, address: str | None = None, failures: int = 3) -> None:
    """Train with `workers` Ray workers, each with one GPU where the cluster has as many, on the cluster at `address` or
    one that is started here. The recipe's output has to be on a file system that all workers share.

    Raises OpenM6Error when the workers fail more than `failures` times.
    """
    require("ray", "ray")
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ours = not ray.is_initialized()
    if ours:
        connect(address, log_to_driver=True)
    try:
        gpu = ray.cluster_resources().get("GPU", 0) >= workers
        output = recipe.output.resolve()
        trainer = TorchTrainer(
            _work,
            train_loop_config={"recipe": {**recipe.model_dump(mode="json", exclude_unset=True), "output": str(output)}},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
            run_config=RunConfig(
                name=recipe.name, storage_path=str(output / "ray"), failure_config=FailureConfig(max_failures=failures)
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise OpenM6Error(f"The Ray workers failed: {str(error).strip().splitlines()[-1]}") from None
    finally:
        if ours:
            ray.shutdown()


def _work(config: dict[str, Any]) -> None:
    from openm6.train.recipe import check_recipe
    from openm6.train.trainer import train

    train(check_recipe(config["recipe"]))
