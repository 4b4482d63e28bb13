"""A new subject from 5, 10 and 20 pictures: adapt the demo's model to a pet, and let a judge look.

    make demo-images
    .venv/bin/python examples/few_samples.py runs/demo-images runs/few-samples

The judge, a small model of its own, has learned to tell twelve pets apart from 200 pictures of each; an adapted model
draws 100 pictures of its own. Beside it: what the judge says of real pictures, of what the model draws before
it is adapted, and what the demo's judge says of the adapted model's goods.

Not run by the tests: it takes the model of `make demo-images`, and most of an hour.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

from openm6.data.source import open_source
from openm6.evaluate.demo_images import DATA, TASK
from openm6.evaluate.pictures import Judge, judged, read_prompts
from openm6.inference.session import Session
from openm6.train.recipe import load_recipe
from openm6.train.trainer import train
from openm6.worlds.pets import pet

PETS, DRAWN, GOODS = 12, 100, 200
COUNTS, SEEDS = (5, 10, 20), 3


def make_judge(output: Path) -> Judge:
    """Tells the pets apart; trained on other pictures than those that models are adapted to."""
    data = [
        {"source": f"pets/test?seed={n}&pictures=200", "task": "image_classification", "columns": {"label": "name"}}
        for n in range(PETS)
    ]
    changes = [f"output={output}", f"data={json.dumps(data, ensure_ascii=False)}", "evaluation.data=[]"]
    model = output / "model"
    if not model.is_dir():
        train(load_recipe("judge", [*changes, "train.steps=500"]))
    return Judge(Session.load(model), "image_classification")


def right(judge: Judge, pictures: list[object], name: str) -> float:
    rows = judged(judge, pictures, [{"label": name}] * len(pictures))
    return sum(row["all"] for row in rows) / len(rows)


def drawn(session: Session, name: str) -> list[object]:
    asked = [{"caption": f"{name}的照片。"}] * DRAWN
    return list(session.run_many(TASK, asked, decoding={"seed": 0}))


def goods(session: Session, judge: Judge) -> float:
    """Share of the drawn goods that show all that was asked for."""
    records, wanted = read_prompts(session, TASK, judge, DATA, GOODS)
    asked = [{"caption": r["caption"]} for r in records]
    rows = judged(judge, list(session.run_many(TASK, asked, decoding={"seed": 0})), wanted)
    return sum(row["all"] for row in rows) / len(rows)


def run(demo: Path, output: Path) -> dict[str, list[float]]:
    """{what: the share that the judge names right, by pet}."""
    judge = make_judge(output / "judge")
    shop, base = Judge(Session.load(demo / "judge" / "model")), Session.load(demo / "model")
    found: dict[str, list[float]] = {"goods, not adapted": [goods(base, shop)]}
    for seed in range(SEEDS):
        name = pet(seed)[0]
        real = [record["image"] for record in open_source(f"pets/train?seed={seed}&pictures=100")]
        found.setdefault("real pictures", []).append(right(judge, real, name))
        found.setdefault("not adapted", []).append(right(judge, drawn(base, name), name))
        for count in COUNTS:
            folder = output / f"pet-{seed}-{count}"
            changes = [
                f"output={folder}", f"seed={seed}", f"model.path={demo / 'model'}",
                f"data.0.source=pets/train?seed={seed}&pictures={count}",
            ]  # fmt: skip
            if not (folder / "model").is_dir():
                train(load_recipe("few_samples", changes))
            adapted = Session.load(folder / "model")
            pictures = drawn(adapted, name)
            for number, one in enumerate(pictures[:12]):
                one.save(folder / f"{number}.png")  # type: ignore[attr-defined]
            found.setdefault(f"{count} pictures", []).append(right(judge, pictures, name))
            found.setdefault(f"goods, after {count}", []).append(goods(adapted, shop))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    found = run(options.demo, options.output)
    (options.output / "figures.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    for what, shares in found.items():
        print(f"{what:24} {median(shares):6.1%}   {', '.join(f'{share:.0%}' for share in shares)}")


if __name__ == "__main__":
    main()
