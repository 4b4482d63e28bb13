"""What is one's own: a head with its loss and metric learns, is saved, answers; mistakes are told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from openm6.core.errors import DataError, UsageError
from openm6.evaluate.command import measure
from openm6.inference.session import Session
from openm6.tasks import extend
from openm6.tasks.grammar import ATTRIBUTES
from openm6.tasks.heads import HEADS
from openm6.tasks.metrics import METRICS
from openm6.tasks.slots import TYPES
from openm6.train.trainer import train
from tests.processes import call_openm6, run_openm6, run_ranks
from tests.tasks.conftest import picture
from tests.train.conftest import recipe_file, tiny_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
DEPTH = str(EXAMPLES / "depth.yaml")


@pytest.fixture
def depth() -> Iterator[Any]:
    """The example's head, taken out again."""
    tables: list[Any] = [TYPES, ATTRIBUTES, HEADS, METRICS]
    before = [dict(table) for table in tables]
    extend.load_extension(EXAMPLES / "depth_head.py")
    yield HEADS["depth"]
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def test_the_example_is_short() -> None:
    assert len((EXAMPLES / "depth_head.py").read_text("utf-8").splitlines()) < 60


@pytest.mark.slow
def test_a_head_learns_an_order_beside_other_tasks(depth: Any, tmp_path: Path) -> None:
    data = [
        {"source": "scenes/train?pictures=200", "task": DEPTH, "name": "depth"},
        {"source": "demo:questions/train?pictures=20", "task": "vqa"},
    ]
    base = train(tiny_recipe(tmp_path / "base", steps=2, checkpoint_every=2))
    recipe = tiny_recipe(
        tmp_path / "run", model={"path": str(base)}, data=data, steps=150, checkpoint_every=150, learning_rate=5e-3,
        batch_size=32, evaluation={"every": 150, "data": [{"source": "scenes/test?pictures=40", "task": DEPTH}]},
    )  # fmt: skip
    model = train(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [line["loss_by_source"]["depth"] for line in lines if "depth" in line.get("loss_by_source", {})]
    assert len(losses) == 150 and sum(losses[-20:]) < 0.95 * sum(losses[:20])
    session = Session.load(model)
    assert isinstance(session.run(DEPTH, photo=picture(64, 64), phrase="红色的鞋"), float)
    assert session.run("vqa", photo=picture(), question="?") is not None
    assert 0 <= measure(session, DEPTH, "scenes/test?pictures=40").values()["ordered"] <= 1
    weights = session.model.state_dict()
    again = train(tiny_recipe(tmp_path / "on", model={"path": str(model)}, data=data, steps=1, learning_rate=1e-9))
    kept = Session.load(again).model.state_dict()
    torch.testing.assert_close(kept["heads.depth.weight"], weights["heads.depth.weight"], atol=1e-6, rtol=1e-5)


def test_the_loss_is_that_of_all_pairs(depth: Any) -> None:
    outputs, wanted = torch.tensor([[0.5], [2.0], [1.0]]), torch.tensor([[1.0], [3.0], [3.0]])
    pair = torch.nn.functional.softplus
    expected = [
        (pair(torch.tensor(0.5 - 2.0)) + pair(torch.tensor(0.5 - 1.0))) / 2,
        pair(-torch.tensor(2.0 - 0.5)) / 2,
        pair(-torch.tensor(1.0 - 0.5)) / 2,
    ]
    torch.testing.assert_close(depth.loss(outputs, wanted), torch.stack(expected))


@pytest.mark.slow
def test_the_command_takes_the_extension_to_further_processes(depth: Any, tmp_path: Path) -> None:
    data = [{"source": "scenes/train?pictures=20", "task": DEPTH}]
    file = recipe_file(tiny_recipe(tmp_path / "run", data=data, steps=2, checkpoint_every=2), tmp_path)
    words = [str(Path(sys.executable).with_name("openm6")), "--extension", str(EXAMPLES / "depth_head.py")]
    done = subprocess.run([*words, "train", str(file), "--processes", "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    words += ["eval", str(tmp_path / "run" / "model"), "--task", DEPTH, "--data", "scenes/test?pictures=9", "--json"]
    done = run_openm6(*words[1:])
    assert done.returncode == 0 and json.loads(done.stdout)["scores"]["ordered"]["n"] == 9, done.stderr[-2000:]


@pytest.mark.slow
def test_a_head_that_no_task_trains_stays_as_it_is(depth: Any, tmp_path: Path) -> None:
    data = [{"source": "scenes/train?pictures=20", "task": DEPTH}]
    base = train(tiny_recipe(tmp_path / "base", data=data, steps=2))
    file = recipe_file(tiny_recipe(tmp_path / "on", model={"path": str(base)}, steps=3, learning_rate=1e-2), tmp_path)
    run_ranks(2, call_openm6, ["--extension", str(EXAMPLES / "depth_head.py"), "train", str(file)])
    before, after = (Session.load(path, "cpu", True).model.state_dict() for path in (base, tmp_path / "on" / "model"))
    assert torch.equal(before["heads.depth.weight"], after["heads.depth.weight"])
    assert not torch.equal(before["embed.weight"], after["embed.weight"])


def test_a_new_head_takes_all_weights(depth: Any, tmp_path: Path) -> None:
    base = train(tiny_recipe(tmp_path / "base", steps=1))
    data = [{"source": "scenes/train?pictures=20", "task": DEPTH}]
    with pytest.raises(UsageError, match="head depth is new to .*an adapter holds no heads"):
        train(tiny_recipe(tmp_path / "run", model={"path": str(base)}, data=data, adapt={}))


def test_what_cannot_be_is_told(depth: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot name a head"):
        extend.register_head("text", depth)
    with pytest.raises(UsageError, match="cannot name a slot type"):
        extend.register_slot("box", TYPES["box"])
    with pytest.raises(UsageError, match="is not there"):
        extend.load_extension(tmp_path / "none.py")
    session = Session.load(train(tiny_recipe(tmp_path / "run", steps=1)))
    with pytest.raises(UsageError, match="has no head depth"):
        session.run(DEPTH, photo=picture(), phrase="红")
    task = "[image:photo] -> [depth:box]"
    data = [{"source": "demo:items/train?pictures=5", "task": task, "columns": {"box": "colour"}}]
    with pytest.raises(DataError, match="box: has to be a box"):
        train(tiny_recipe(tmp_path / "bad", data=data))
