"""Measuring against answers that are known, and reports that can be read."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openm6.core.errors import DataError, OpenM6Error, UsageError
from openm6.core.images import ImageGrid
from openm6.core.sequence import IGNORE
from openm6.core.tokenizer import Tokenizer
from openm6.evaluate import evaluate
from openm6.evaluate.command import measure
from openm6.evaluate.labels import LabelFigures
from openm6.evaluate.measure import Case, Evaluation
from openm6.evaluate.report import write_answers, write_report
from openm6.evaluate.retrieval import evaluate_retrieval
from openm6.inference import Generated
from openm6.inference.session import Session
from openm6.model import M6
from openm6.tasks.encode import encode_example
from openm6.tasks.file import task_from_dict
from openm6.tasks.metrics import Score
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from tests.conftest import drawing_session, tiny_config
from tests.tasks.conftest import picture


@pytest.fixture
def session() -> Session:
    tokenizer = Tokenizer.train(["图中是红色"], 600, num_codes=0)
    config = tiny_config(vocab_size=tokenizer.vocab_size)
    return Session(M6(config).eval(), Processor(tokenizer, ImageGrid(8, 16), 64))


class Says(Session):
    """A session whose model says what it is told to."""

    def __init__(self, session: Session, answers: list[str]):
        super().__init__(session.model, session.processor)
        self.answers = iter(answers)

    def generate(self, task: Task, prompts: list[Any], *_: Any) -> list[Generated]:
        return [Generated(self.processor.tokenizer.encode(next(self.answers)), 0.0, True) for _ in prompts]


VQA = task_from_dict(
    {"name": "vqa", "instructions": ["[text:question] -> [text:answer]"], "metrics": ["accuracy", "exact_match"]}
)


def test_some_records_of_an_ordered_file_are_the_first_ones_or_spread_over_it(session: Session, tmp_path: Path) -> None:
    lines = [json.dumps({"question": str(number), "answer": "红" if number < 5 else "蓝"}) for number in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    for spread, chosen in ((False, "0123"), (True, "0257")):
        found = measure(session, VQA, str(tmp_path / "a.jsonl"), limit=4, spread=spread, decoding={"max_new_tokens": 1})
        assert "".join(case.record["question"] for case in found.cases) == chosen
    whole = measure(session, VQA, str(tmp_path / "a.jsonl"), limit=99, spread=True, decoding={"max_new_tokens": 1})
    assert len(whole.cases) == 10


def test_records_that_are_longer_than_the_model_takes_are_named_or_truncated(session: Session) -> None:
    records = [{"question": "红" * length, "answer": "红色", "_where": f"a.csv:{length}"} for length in (3, 300, 400)]
    refused = evaluate(Says(session, ["红色"]), VQA, records)
    assert (len(refused.cases), refused.rejected, refused.cut) == (1, 2, 0)
    (note,) = refused.notes
    assert (
        note.startswith("2 of 3 records are longer than the model's 64 positions") and "(a.csv:300, a.csv:400)" in note
    )
    for metrics in ((), ("perplexity",)):
        found = evaluate(Says(session, ["红色"] * 3), VQA, records, truncate="start", metrics=metrics)
        assert found.cut == found.to_dict()["cut"] == 2 and not found.rejected
        assert found.notes == ["2 of 3 records were too long for the model and were truncated at their start."]


def test_a_pair_that_is_too_long_is_left_out_of_retrieval(session: Session) -> None:
    task = Task.from_instruction("[text:text] -> [vector:vector]", name="seen")
    records = [{"text": text, "_where": f"a.csv:{line}"} for line, text in enumerate(("红", "蓝" * 90, "色"), 1)]
    found = evaluate_retrieval(session, task, task, records, records, ["a", "b", "c"])
    assert (len(found.cases), found.rejected) == (2, 1) and "(a.csv:2)" in found.notes[0]
    whole = evaluate_retrieval(session, task, task, records, records, truncate="start")
    assert len(whole.cases) == 3 and not whole.notes


def test_answers_are_scored_against_all_references(session: Session) -> None:
    records = [
        {"question": "a", "answer": "红色"},
        {"question": "b", "answer": ["蓝", "蓝色"]},
        {"question": "c", "answer": "绿色"},
        {"question": "d"},
    ]
    result = evaluate(Says(session, ["红色。", "蓝色", "黄色"]), VQA, records)
    assert result.scores["accuracy"].value == pytest.approx(2 / 3)
    assert result.scores["exact_match"].value == pytest.approx(1 / 3)
    assert result.rejected == 1
    assert [c.answer for c in result.cases] == ["红色。", "蓝色", "黄色"]
    score = result.scores["accuracy"]
    assert 0 <= score.low <= score.value <= score.high <= 1


def test_sampled_answers_do_not_depend_on_the_batch_and_are_not_repeated(session: Session) -> None:
    records = [{"question": "红", "answer": "a"}] * 12
    sampled = {"temperature": 1.0, "max_new_tokens": 16}
    one, many = (evaluate(session, VQA, records, batch_size=size, decoding=sampled).cases for size in (1, 64))
    assert [case.answer for case in one] == [case.answer for case in many]
    assert len({case.answer for case in one}) > 6


def test_without_answers_only_what_a_metric_asks_for_is_answered(session: Session) -> None:
    records = [{"question": "a", "answer": "红色"}]
    assert evaluate(Says(session, ["红色"]), VQA, records, answers=False).scores["accuracy"].value == 1
    likely = task_from_dict({**VQA.to_dict(), "metrics": ["perplexity"]})
    silent = evaluate(Says(session, []), likely, records, answers=False)  # an answer would be a StopIteration
    assert silent.scores == evaluate(session, likely, records).scores
    assert [case.record for case in silent.cases] == records


SENTIMENT = task_from_dict(
    {
        "name": "sentiment",
        "instructions": ["[text:text] -> [label:label]"],
        "metrics": ["accuracy"],
        "labels": {"label": ["红", "蓝"]},
    }
)


def test_labels_get_figures_of_their_own_and_references_outside_are_told(session: Session) -> None:
    records = [{"text": "a", "label": label} for label in ("红", "蓝", "红色", "蓝 ")]
    result = evaluate(Says(session, ["红", "红", "红", "蓝"]), SENTIMENT, records)
    assert result.scores["accuracy"].value == 0.5
    assert result.scores["macro_f1"].value == pytest.approx((0.5 + 2 / 3 + 0) / 3)
    found = result.to_dict()
    assert found["confusion"] == {"红": {"红": 1}, "蓝": {"红": 1, "蓝": 1}, "红色": {"红": 1}}
    assert "1 of 4 references are not labels of the task sentiment" in found["notes"][0]
    assert "confusion" not in evaluate(Says(session, ["a"]), VQA, [{"question": "a", "answer": "b"}]).to_dict()


def test_of_several_outputs_it_says_which_is_measured(session: Session) -> None:
    task = task_from_dict(
        {"name": "two", "instructions": ["[text:text] -> [label:kind] [label:colour]"], "metrics": ["accuracy"]}
    )
    result = evaluate(Says(session, ["鞋"]), task, [{"text": "a", "kind": "鞋", "colour": "红"}])
    assert result.notes == ["Only kind is measured, not colour."]


def test_other_metrics_than_the_tasks_own(session: Session) -> None:
    records = [{"text": "a", "label": "红"}]
    result = evaluate(Says(session, ["红"]), SENTIMENT, records, metrics=["exact_match", "rouge_l"])
    assert list(result.scores) == ["exact_match", "rouge_l"]


@pytest.mark.parametrize(
    ("instruction", "metric", "said"),
    [
        ("[text:a] -> [text:b]", "acuracy", 'There is no metric acuracy. Did you mean "accuracy"?'),
        ("[text:a] -> [text:b]", "recall@1", "recall@1 does not suit the task t: it measures vectors"),
        ("[text:a] -> [text:b]", "iou", "it measures a box, and the task gives a text"),
        ("[text:a] -> [text:b]", "macro_f1", "it measures a label, and the task gives a text"),
        ("[text:a] -> [text:b]", "parent", "it measures texts that are written from a table"),
        ("[text:a] -> [image:b]", "accuracy", "the task draws: measure it by perplexity"),
    ],
)
def test_metrics_that_do_not_suit_are_refused_before_anything_is_answered(
    session: Session, instruction: str, metric: str, said: str
) -> None:
    task = Task.from_instruction(instruction, "t")
    with pytest.raises(UsageError, match=re.escape(said)):
        evaluate(Says(session, []), task, [{"a": "红", "b": "蓝"}], metrics=[metric])


def test_answers_are_written_in_order_bad_records_marked(session: Session, tmp_path: Path) -> None:
    lines = ['{"question": "a", "answer": "红"}', "{", '{"question": "b"}', '{"question": "c", "answer": ["蓝"]}', "[]"]
    data, output = tmp_path / "data.jsonl", tmp_path / "new" / "answers.jsonl"
    data.write_text("\n".join(lines), "utf-8")
    result = measure(Says(session, ["红", "绿"]), VQA, str(data))
    assert len(result.cases) == 2 and result.rejected == 3
    write_answers(output, result)
    found = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [row["where"].rpartition(":")[2] for row in found] == ["1", "2", "3", "4", "5"]
    assert found[0] == {
        "where": f"{data}:1", "inputs": {"question": "a"}, "answer": "红", "references": ["红"],
        "scores": {"accuracy": 1.0, "exact_match": 1.0},
    }  # fmt: skip
    assert found[3]["scores"]["accuracy"] == 0
    assert "is not valid JSON" in found[1]["error"] and "has no answer" in found[2]["error"] and "error" in found[4]
    with pytest.raises(OpenM6Error, match="could not be written"):
        write_answers(tmp_path / "new", result)


def test_more_examples_than_there_are_is_refused(session: Session, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"question": "a", "answer": "红"}\n', "utf-8")
    with pytest.raises(UsageError, match=r"d\.jsonl has 1 records, too few for 2 examples"):
        measure(Says(session, []), VQA, str(data), shots=2, shots_from=str(data))


def test_a_task_without_metrics_is_told_to_name_some(session: Session, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"a": "b", "b": "c"}\n')
    with pytest.raises(UsageError, match="has no metrics: choose one by --metric"):
        measure(session, Task.from_instruction("[text:a] -> [text:b]", "t"), str(tmp_path / "d.jsonl"))


def test_a_report_of_labels_shows_a_matrix_and_no_markup_takes_effect(tmp_path: Path) -> None:
    names = ["<b>红</b>", "蓝|*色*"]
    cases = [Case({"text": "a"}, names[i % 2], [names[i % 3 == 0]]) for i in range(6)]
    labels = LabelFigures.of([c.answer for c in cases], [c.references for c in cases], names)
    evaluation = Evaluation("t", "d", {"accuracy": Score(0.5, 0.1, 0.9, 6)}, cases, labels=labels, notes=["A *note*."])
    page = write_report(tmp_path, "A report", [evaluation]).read_text("utf-8")
    assert "Confusion matrix" in page and "<strong>" in page
    assert "<b>" not in page and "<em>" not in page


def test_nothing_to_measure_is_told(session: Session) -> None:
    with pytest.raises(DataError, match="Nothing to evaluate in x: there are no records"):
        evaluate(session, VQA, [], "x")
    with pytest.raises(DataError, match="Nothing to evaluate .*has no answer to compare with"):
        evaluate(session, VQA, [{"question": "a", "_where": "f:1"}])


def test_perplexity_is_that_of_the_single_probabilities(session: Session) -> None:
    task = task_from_dict(
        {
            "name": "t",
            "instructions": ["[text:a] -> [text:b]"],
            "metrics": ["perplexity"],
            "decode": {"max_new_tokens": 2},
        }
    )
    records = [{"a": "图中", "b": "红色"}, {"a": "图", "b": "是红色图中"}, {"a": "色", "b": "红"}]
    found = evaluate(session, task, records, batch_size=2).scores["perplexity"].value
    losses = []
    for record in records:
        sequence = encode_example(task, record, session.processor)
        from openm6.core.batch import pad

        with torch.no_grad(), session.precision():
            logits = session.model.logits(session.model(pad([sequence], 0)).hidden[0]).double()
        log_probs = logits.log_softmax(-1)
        losses += [-float(log_probs[t, label]) for t, label in enumerate(sequence.labels) if label != IGNORE]
    packed = session.model.packed_head
    tolerance = 2e-2 if packed is not None and packed.dtype == torch.bfloat16 else 1e-4
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=tolerance)


def test_words_of_its_own_are_no_mistake_where_nothing_is_right_or_wrong(tmp_path: Path) -> None:
    cases = [Case({"photo": picture()}, "一件红T恤。", ["红色的T恤。"])]
    evaluation = Evaluation("caption", "data", {"bleu": Score(9.0, 1.0, 20.0, 1)}, cases, inputs={"photo": "image"})
    text = write_report(tmp_path / "report", "A report", [evaluation]).read_text("utf-8")
    assert "一件红T恤。" in text
    assert "✗" not in text


def test_a_report_shows_figures_and_pictures_and_no_markup_takes_effect(tmp_path: Path) -> None:
    cases = [
        Case({"photo": picture(), "question": "<script>alert(1)</script>"}, "红[x](y)", ["蓝"]),
        Case({"photo": picture(seed=1), "question": "b"}, "蓝", ["蓝"]),
    ]
    inputs = {"photo": "image", "question": "text"}
    evaluation = Evaluation("vqa", "data", {"accuracy": Score(0.5, 0.1, 0.9, 2)}, cases, inputs=inputs)
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": i, "loss": 2 / i, "loss_by_task": {"vqa": 2 / i}, "tokens_per_second": 9} for i in (1, 2, 3)]
    metrics.write_text("\n".join(map(json.dumps, lines)))
    figures = [{"name": "colour", "value": 0.5, "low": 0.1, "high": 0.9, "n": 2}]
    page = write_report(tmp_path / "report", "A report", [evaluation], figures=figures, metrics=metrics)
    text = page.read_text("utf-8")
    assert "<script>" not in text
    assert "href" not in text
    assert "50.0%" in text
    assert text.count("<img") == 3
    assert len(list((tmp_path / "report" / "pictures").glob("*.png"))) == 3
    assert "✗ 红" in (tmp_path / "report" / "report.md").read_text("utf-8")


def test_perplexity_of_a_picture_is_that_of_its_codes() -> None:
    session, rng = drawing_session(), np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)) for _ in range(5)]
    records = [{"caption": "红色的杯子", "picture": picture} for picture in pictures]
    found = evaluate(session, session.task("text_to_image"), records).scores["perplexity"]
    coded = [{**record, "picture": session.codec.encode(record["picture"]).tolist()} for record in records]
    losses, counts = session.target_losses("text_to_image", coded)
    assert found.value == pytest.approx(math.exp(losses.sum() / counts.sum())) and found.n == 5
