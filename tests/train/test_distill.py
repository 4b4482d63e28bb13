"""A student that learns from a teacher, from nothing or pruned out of it: what it is asked for, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from openm6.cli import commands
from openm6.core.batch import Batch, pack
from openm6.core.errors import UsageError
from openm6.core.sequence import IGNORE
from openm6.core.tokenizer import Tokenizer
from openm6.data.source import open_source
from openm6.inference.session import Session
from openm6.model.loss import Teacher
from openm6.tasks.encode import encode_example
from openm6.tasks.library import get
from openm6.train.distill import AT_ONCE, DistillationTeacher, relation_loss, teacher_answers
from openm6.train.distributed import Group
from openm6.train.finetune import finetune_recipe
from openm6.train.recipe import DistillSection
from openm6.train.trainer import train
from tests.train.conftest import SIZES, losses, tiny_recipe


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    train(tiny_recipe(folder, steps=30, learning_rate=5e-3, checkpoint_every=30))
    return folder / "model"


def student(output: Path, teacher: Path, **changes: Any) -> Any:
    sizes = {**SIZES, "hidden_size": 16, "num_hidden_layers": 1}
    given = {"teacher": str(teacher), **changes.pop("distill", {})}
    return tiny_recipe(output, model={"preset": "demo", "sizes": sizes}, distill=given, **changes)


def asked(session: Session, pictures: int) -> Batch:
    """Questions that no training record has."""
    task = session.task("vqa")
    records = ({"photo": r["image"], **r} for r in open_source(f"demo:questions/test?pictures={pictures}"))
    names = ("photo", "question", "answer")
    examples = [encode_example(task, {name: r[name] for name in names}, session.processor, None) for r in records]
    return pack(examples, 64, session.processor.tokenizer.pad_id)


@torch.no_grad()
def said(model: Path, batch: Batch) -> Tensor:
    """Logits at the trained positions."""
    session = Session.load(model, trainable=True)
    with session.precision():
        return session.model.logits(session.model(batch).hidden.flatten(0, 1)[(batch.labels != IGNORE).flatten()])


@pytest.mark.slow
def test_what_a_teacher_says_is_its_own_distribution_at_the_trained_positions(teacher: Path) -> None:
    session = Session.load(teacher, trainable=True)
    batch = asked(session, 10)
    told, hidden = DistillationTeacher(DistillSection(teacher=teacher), session.processor, torch.device("cpu")).outputs(
        batch
    )
    expected = said(teacher, batch)
    torch.testing.assert_close(told.logits(slice(2, 7)), expected[2:7], atol=0.1, rtol=0.05)
    assert len(told.logits(slice(0, None))) == len(expected)
    assert hidden.shape == (*batch.shape, 32)
    # And a student that is the teacher has nothing to learn from it.
    with torch.no_grad(), session.precision():
        assert abs(session.model(batch, Teacher(lambda part: expected[part], weight=1.0)).loss) < 0.01 * len(expected)


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher_than_by_the_labels(teacher: Path, tmp_path: Path) -> None:
    """Two students that differ only in the loss, after the same number of steps."""
    way = {"steps": 60, "learning_rate": 5e-3, "checkpoint_every": 60, "log_every": 20}
    batch = asked(Session.load(teacher), 40)
    expected, apart = said(teacher, batch).log_softmax(1), []
    for weight in (1.0, 0.0):
        settings = {"weight": weight, "temperature": 1.0}
        found = said(train(student(tmp_path / str(weight), teacher, **way, distill=settings)), batch).log_softmax(1)
        apart.append(torch.nn.functional.kl_div(found, expected, reduction="batchmean", log_target=True))
    assert apart[0] < 0.8 * apart[1]


def test_relations_do_not_ask_for_the_same_width(teacher: Path, tmp_path: Path) -> None:
    some, other = torch.randn(2, 6, 8), torch.randn(2, 6, 16)
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [3, 3, 3, 3, 3, 3]])
    turned = some @ torch.linalg.qr(torch.randn(8, 8))[0]
    torch.testing.assert_close(relation_loss(some, turned * 3, segments), torch.tensor(0.0), atol=1e-10, rtol=0)
    changed = some.clone()
    changed[0, 5] = 100.0  # padding
    assert relation_loss(some, other, segments) == relation_loss(changed, other, segments) > 0
    train(student(tmp_path, teacher, distill={"relations": 1.0}))
    assert len(losses(tmp_path)) == 6


def test_a_student_from_a_preset_has_its_teachers_tokenizer(teacher: Path, tmp_path: Path) -> None:
    model = train(student(tmp_path, teacher))
    assert Tokenizer.load(model).is_like(Tokenizer.load(teacher))
    assert not (tmp_path / "tokenizer").exists()


def test_a_teacher_that_reads_otherwise_is_refused(teacher: Path, tmp_path: Path) -> None:
    other = train(
        tiny_recipe(tmp_path / "other", steps=1, data=[{"source": "demo:texts/train?pictures=5", "task": "infilling"}])
    )
    with pytest.raises(UsageError, match="another tokenizer"):
        train(tiny_recipe(tmp_path / "a", model={"path": str(other)}, distill={"teacher": str(teacher)}))
    with pytest.raises(UsageError, match="at most 4 patches .* the student into 9"):
        sizes = {**SIZES, "image_max_patches": 9}
        train(tiny_recipe(tmp_path / "b", model={"preset": "demo", "sizes": sizes}, distill={"teacher": str(teacher)}))
    with pytest.raises(UsageError, match="no openm6.json"):
        train(tiny_recipe(tmp_path / "c", model={"path": str(other)}, distill={"teacher": str(tmp_path)}))


@pytest.mark.slow
def test_a_model_is_pruned_and_mended_from_the_command_line(teacher: Path, tmp_path: Path) -> None:
    def call(*words: object) -> Any:
        return CliRunner().invoke(commands(), [*map(str, words)])

    given = ("--task", "vqa", "--data", "demo:questions/train?pictures=10")
    less = ("--layers", 1, "--width", 24, "--key-value-heads", 1)
    result = call("models", "prune", teacher, tmp_path / "less", *given, *less, "--json")
    assert result.exit_code == 0, result.output
    small = Session.load(tmp_path / "less", trainable=True)
    assert json.loads(result.output)["parameters"] == sum(p.numel() for p in small.model.parameters())
    config = small.model.config
    assert (config.num_hidden_layers, config.intermediate_size, config.num_attention_heads) == (1, 24, 1)
    assert set(small.tasks) == set(Session.load(teacher).tasks)
    mended = ("--steps", 2, "--teacher", teacher, "--output", tmp_path / "mended", "train.workers=0")
    assert call("finetune", tmp_path / "less", *given, *mended).exit_code == 0
    assert isinstance(Session.load(tmp_path / "mended" / "model"), Session)
    for words, told in ((("--layers", 3), "layers is 3; the model has 2"), ((), "Give a size to prune to")):
        with pytest.raises(UsageError, match=told):
            raise call("models", "prune", teacher, tmp_path / "never", *given, *words).exception
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_a_teacher_answers_what_has_no_answers(tmp_path: Path) -> None:
    """Its own answers are learned, in the place of the data's; kept in a file, and gone on with after a kill."""
    known = [{"source": "demo:questions/train?pictures=30", "task": "vqa"}]
    teacher = train(tiny_recipe(tmp_path / "teacher", data=known, steps=100, learning_rate=1e-2, checkpoint_every=100))
    unlabelled = {"source": "demo:questions/train?pictures=60&seed=5", "task": "vqa", "answers": "teacher"}
    recipe = student(tmp_path / "run", teacher, data=[unlabelled], steps=2)
    train(recipe)
    [file] = (tmp_path / "run/answers").iterdir()
    lines = file.read_text("utf-8").splitlines()
    source = open_source(unlabelled["source"])
    assert len(lines) == len(source) > 256
    session = Session.load(teacher)
    for number in (0, 100, len(lines) - 1):
        record = source[number]
        expected = session.run("vqa", photo=record["image"], question=record["question"])
        assert json.loads(lines[number]) == {"answer": expected}
    assert sum(json.loads(line)["answer"] != "" for line in lines) > 100
    file.write_text("\n".join([*lines[: AT_ONCE - 1], '{"answer": "bro']), "utf-8")  # in the midst of a part
    group = Group(0, 1, torch.device("cpu"))
    found = teacher_answers(source, session.task("vqa"), {}, teacher, tmp_path / "run", group)
    assert file.read_text("utf-8").splitlines() == lines
    told = [(json.loads(line)["answer"], source[n]["question"]) for n, line in enumerate(lines)]
    assert [(r["answer"], r["question"]) for r in found] == [one for one in told if one[0]]
    with pytest.raises(UsageError, match="distill.teacher"):
        tiny_recipe(tmp_path / "x", data=[unlabelled])
    with pytest.raises(UsageError, match="not answered in text"):
        teacher_answers(source, get("item_vector"), {}, teacher, tmp_path, group)
    values = finetune_recipe(teacher, "vqa", [], teacher=teacher, unlabelled=["a.jsonl"])
    assert [section["answers"] for section in values["data"]] == ["teacher"]
