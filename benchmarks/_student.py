"""One student: `python -m benchmarks._student OUTPUT PRUNED SEED RATE STEPS [TEACHER]`; prints its accuracy. With 0
steps that of PRUNED."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from openm6.evaluate.command import measure
from openm6.inference.session import Session
from openm6.model.count import count_parameters
from openm6.train.finetune import finetune_recipe
from openm6.train.recipe import check_recipe
from openm6.train.trainer import train

TRAIN, TEST = "demo:questions/train", "demo:questions/test"
RECORDS = 2000


def main(output: Path, pruned: Path, seed: int, rate: float, steps: int, teacher: Path | None) -> None:
    if steps and not (output / "model" / "config.json").is_file():  # kept by an earlier call
        values = finetune_recipe(
            pruned, "vqa", [TRAIN], output=output, steps=steps, batch_size=32, seed=seed, teacher=teacher
        )
        values["train"] |= {"learning_rate": rate, "matrix_learning_rate": 2 * rate, "checkpoint_every": steps}
        train(check_recipe(values))
    session = Session.load(output / "model" if steps else pruned)
    accuracy = next(iter(measure(session, "vqa", TEST, {}, limit=RECORDS).values().values()))
    print(json.dumps({"parameters": sum(count_parameters(session.model.config).values()), "accuracy": accuracy}))


if __name__ == "__main__":
    output, pruned, seed, rate, steps, *teacher = sys.argv[1:]
    main(Path(output), Path(pruned), int(seed), float(rate), int(steps), Path(teacher[0]) if teacher else None)
