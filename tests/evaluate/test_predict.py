"""Every row of a table is answered for, in order, also after a kill."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from openm6.cli.output import counted
from openm6.core.errors import ContextLengthError, DataError, UsageError
from openm6.core.files import lock_output
from openm6.core.images import ImageGrid
from openm6.core.tokenizer import Tokenizer
from openm6.evaluate import predict
from openm6.evaluate.predict import Prediction
from openm6.inference.session import Session
from openm6.model import M6
from openm6.tasks.library import task_from_dict
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from tests.conftest import command, tiny_config

LABELS = task_from_dict(
    {"name": "mood", "instructions": ["[text:text] -> [label:label]"], "labels": {"label": ["红", "蓝", "红蓝"]}}
)
WORDS = task_from_dict(
    {"name": "say", "instructions": ["[text:text] -> [text:words]"], "decode": {"max_new_tokens": 4}}
)
TWO = task_from_dict(
    {
        "name": "two",
        "instructions": ["[text:text] -> [label:kind] [label:colour]"],
        "labels": {"kind": ["鞋"], "colour": ["红", "蓝"]},
    }
)
VECTOR = task_from_dict({"name": "vector", "instructions": ["[text:text] -> [vector:v]"]})


def make(seed: int = 0) -> Session:
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(["图中是红色蓝鞋"], 600, num_codes=0)
    config = tiny_config(vocab_size=tokenizer.vocab_size)
    tasks = [LABELS, WORDS, TWO, VECTOR]
    return Session(M6(config).eval(), Processor(tokenizer, ImageGrid(8, 16), 64), tasks)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    make().save(folder)
    return folder


@pytest.fixture(scope="module")
def session(model: Path) -> Session:
    return Session.load(model)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def table(path: Path, count: int) -> Path:
    path.write_text("id,text\n" + "".join(f"{n},{'红色蓝'[n % 3] * (n % 5 + 1)}\n" for n in range(count)), "utf-8")
    return path


def test_the_command_adds_answer_probability_and_error(model: Path, session: Session, tmp_path: Path) -> None:
    data, output = tmp_path / "in.csv", tmp_path / "new" / "out.csv"
    data.write_text("id,text,label\n7,红色,蓝\n8,,红\n9\n10,蓝,红\n", "utf-8")
    done = command("predict", model, "mood", "--data", data, "--output", output)
    assert done.exit_code == 0
    assert "4 records: text from text; new columns: label_predicted, probability, error" in done.stderr
    assert "2 of 4 records were answered" in done.stdout and "see the column error of" in done.stdout
    rows = rows_of(output)
    assert list(rows[0]) == ["id", "text", "label", "label_predicted", "probability", "error"]
    assert [row["id"] for row in rows] == ["7", "8", "", "10"] and [row["label"] for row in rows] == [
        "蓝",
        "红",
        "",
        "红",
    ]
    assert rows[0]["label_predicted"] == session.run("mood", text="红色") and rows[0]["error"] == ""
    assert "in.csv:3 has no text" in rows[1]["error"] and rows[1]["label_predicted"] == ""
    assert "in.csv:4 has 1 fields" in rows[2]["error"]
    assert 1 / 3 <= float(rows[3]["probability"]) <= 1
    assert [path.name for path in output.parent.iterdir()] == ["out.csv"]
    with pytest.raises(UsageError, match="out.csv exists already: name another output, or delete it"):
        Prediction(session, "mood", str(data), output)


lines = st.lists(
    st.one_of(
        st.builds(lambda text: json.dumps({"text": text}), st.text("红蓝色 a", max_size=5)),
        st.sampled_from(["{", "[]", '{"other": 1}', '{"text": null}', '{"text": {"a": 1}}']),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=lines)
def test_rows_in_are_rows_out_in_order(
    lines: list[str], session: Session, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "PART", 5)
    folder = tmp_path_factory.mktemp("p")
    (folder / "in.jsonl").write_text('{"text": "红"}\n' + "\n".join(lines), "utf-8")
    done = Prediction(session, WORDS, str(folder / "in.jsonl"), folder / "out.jsonl").run()
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == len(lines) + 1 == done["records"] and done["bad"] == sum(
        row["error"] is not None for row in rows
    )
    for line, row in zip(lines, rows[1:], strict=True):
        try:
            given = json.loads(line)
        except ValueError:
            given = []
        if isinstance(given, dict):
            assert {k: v for k, v in row.items() if k not in ("words", "error")} == given
        good = isinstance(given, dict) and isinstance(given.get("text"), str) and given["text"] != ""
        assert (row["error"] is None) == good == (row["words"] is not None)


def test_answers_are_those_of_run_many_in_every_format(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "PART", 4)
    data = table(tmp_path / "in.csv", 11)
    expected = list(session.run_many("say", rows_of(data)))
    for ending in ("csv", "jsonl", "parquet"):
        output = tmp_path / f"out.{ending}"
        Prediction(session, "say", str(data), output, batch_size=3).run()
        found = (
            pq.read_table(output).to_pylist() if ending == "parquet"
            else rows_of(output) if ending == "csv"
            else [json.loads(line) for line in output.read_text("utf-8").splitlines()]
        )  # fmt: skip
        assert [row["words"] for row in found] == expected and [row["id"] for row in found] == [
            str(n) for n in range(11)
        ]


def test_probabilities_of_all_labels_add_up_and_hold_that_of_the_answer(session: Session, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    Prediction(session, "mood", str(table(tmp_path / "in.csv", 5)), output, all_probabilities=True).run()
    for row in map(json.loads, output.read_text("utf-8").splitlines()):
        assert set(row["probabilities"]) == {"红", "蓝", "红蓝"}
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert row["probability"] == row["probabilities"][row["label"]]
    with pytest.raises(UsageError, match="say has no probabilities"):
        Prediction(session, "say", str(tmp_path / "in.csv"), tmp_path / "o.csv", all_probabilities=True)


def test_several_outputs_and_vectors_have_columns(session: Session, tmp_path: Path) -> None:
    data = table(tmp_path / "in.csv", 3)
    Prediction(session, "two", str(data), tmp_path / "two.csv").run()
    assert {(row["kind"], row["colour"] in "红蓝") for row in rows_of(tmp_path / "two.csv")} == {("鞋", True)}
    Prediction(session, "vector", str(data), tmp_path / "v.parquet", decoding={"dims": 4}).run()
    found = np.array(pq.read_table(tmp_path / "v.parquet")["v"].to_pylist())
    np.testing.assert_allclose(found, list(session.vectors("vector", rows_of(data), dims=4)), atol=1e-6)
    with pytest.raises(UsageError, match="A CSV has no cells for vectors"):
        Prediction(session, "vector", str(data), tmp_path / "v.csv")
    drawing = Task.from_instruction("[text:text] -> [image:p]", "draw")
    with pytest.raises(UsageError, match="draw draws pictures: use `openm6 images batch`"):
        Prediction(session, drawing, str(data), tmp_path / "v.csv")


class StoppedError(Exception):
    pass


def stop_after(prediction: Prediction, rows: int) -> None:
    def look(done: int, total: int) -> None:
        if done >= rows:
            raise StoppedError

    with pytest.raises(StoppedError):
        prediction.run(look)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_resumed_run_gives_the_same_file_and_answers_nothing_twice(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    monkeypatch.setattr(predict, "PART", 4)
    data = tmp_path / "in.csv"
    data.write_text("text\n" + "红\n" * 18, "utf-8")

    def prediction(name: str, batch_size: int = 64) -> Prediction:
        options = {"temperature": temperature, "max_new_tokens": 24}
        return Prediction(session, "say", str(data), tmp_path / name, decoding=options, batch_size=batch_size)

    prediction("whole.csv").run()
    stop_after(prediction("out.csv"), 8)
    assert not (tmp_path / "out.csv").exists()
    assert prediction("out.csv", batch_size=2).run()["resumed"] == 8
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    if temperature:  # parts do not repeat each other's random numbers
        assert len({row["words"] for row in rows_of(tmp_path / "out.csv")}) > 9


def test_a_run_is_not_resumed_with_anything_else(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "PART", 4)
    data, output = table(tmp_path / "in.csv", 9), tmp_path / "out.csv"
    stop_after(Prediction(session, "say", str(data), output), 4)

    def refused(said: str, session: Session = session, task: Any = "say", **options: Any) -> None:
        with pytest.raises(
            UsageError, match=f"out.csv was started with other {said}.*delete the folder .*out.csv.parts"
        ):
            Prediction(session, task, str(data), output, **options)

    refused("options", decoding={"max_new_tokens": 2})
    refused("task", task=task_from_dict({**WORDS.to_dict(), "decode": {"max_new_tokens": 3}}))
    make(seed=1).save(tmp_path / "other")
    refused("model", session=Session.load(tmp_path / "other"))
    data.write_text(data.read_text("utf-8").replace("8,", "9,"), "utf-8")
    refused("data .*in.csv has changed")
    table(data, 9)
    assert Prediction(session, "say", str(data), output).run()["resumed"] == 4


def test_what_stands_there_is_not_written_over(session: Session, tmp_path: Path) -> None:
    data = table(tmp_path / "in.csv", 2)
    (tmp_path / "out.csv.parts").mkdir()
    with pytest.raises(UsageError, match="out.csv.parts exists already"):
        Prediction(session, "say", str(data), tmp_path / "out.csv")
    (tmp_path / "taken.csv").write_text("id,text,words,words_predicted\n1,红,a,b\n", "utf-8")
    with pytest.raises(UsageError, match="columns words and words_predicted already"):
        Prediction(session, "say", str(tmp_path / "taken.csv"), tmp_path / "o.csv")


def test_options_that_cannot_be_meant_begin_nothing(session: Session, tmp_path: Path) -> None:
    data = table(tmp_path / "in.csv", 2)
    for task, options in (("say", {"max_new_tokns": 3}), ("vector", {"dims": 10**6})):
        with pytest.raises(UsageError, match=next(iter(options))):
            Prediction(session, task, str(data), tmp_path / "out.jsonl", decoding=options)
    assert list(tmp_path.iterdir()) == [data]


def test_where_nothing_could_be_answered_it_fails_and_tells_why(session: Session, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('id,text\n1,""\n', "utf-8")
    with pytest.raises(DataError, match="None of the 1 records could be answered, see .*in.csv:2 has no text"):
        Prediction(session, "say", str(tmp_path / "in.csv"), tmp_path / "out.csv").run()
    assert "has no text" in rows_of(tmp_path / "out.csv")[0]["error"]


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openm6.cli.output.EVERY", 0)
    with counted("records") as on_progress:
        for done in (700, 800, 10**9):
            on_progress(done, 10**9)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(", about ")[0] for line in said] == [f"{done} of {10**9} records" for done in (800, 10**9)]
    assert said[1].endswith("about 0:00:00 left.") and max(map(len, said)) < 80


@pytest.mark.slow
def test_after_kill_9_the_same_command_gives_the_same_file(model: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "in.csv", 4000)
    words = [str(Path(sys.executable).with_name("openm6")), "predict", str(model), "say", "--data", str(data)]
    done = subprocess.run([*words, "--output", str(tmp_path / "whole.csv")], capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    output = tmp_path / "out.csv"
    started = subprocess.Popen([*words, "--output", str(output)], stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "out.csv.parts").glob("0*.jsonl"))) < 3:
        assert started.poll() is None
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not output.exists()
    done = subprocess.run([*words, "--output", str(output), "--json"], capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["resumed"] >= 768 and told["answered"] == 4000
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_the_eval_command_shows_labels_and_writes_answers(model: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "test.csv", tmp_path / "answers.jsonl"
    data.write_text("text,label\n红色,红\n蓝,蓝\n红蓝,绿\n蓝色\n", "utf-8")
    words = ["eval", model, "--task", "mood", "--data", data]
    said = command(*words, "--output", output).stdout
    assert "macro_f1" in said and "confusion matrix" in said and "Records that could not be used: 1" in said
    assert "1 of 3 references are not labels of the task mood (红, 蓝, 红蓝)" in said.replace("\n", " ")
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [row.get("references") for row in rows] == [["红"], ["蓝"], ["绿"], None] and "error" in rows[3]
    found = json.loads(command(*words, "--metric", "exact_match", "--metric", "accuracy", "--json").stdout)
    assert list(found["scores"]) == ["exact_match", "accuracy"] and sum(found["confusion"]["绿"].values()) == 1
    with pytest.raises(UsageError, match='no metric exactmatch. Did you mean "exact_match"'):
        command(*words, "--metric", "exactmatch")


def test_a_row_that_is_too_long_costs_itself_or_is_truncated(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n红\n" + "蓝" * 100 + "\n色\n", "utf-8")
    for task in ("say", "mood", "vector"):
        for words, bad in (((), 1), (("--truncate", "start"), 0)):
            output = tmp_path / f"{task}{bad}.jsonl"
            done = command("predict", model, task, "--data", tmp_path / "a.csv", "--output", output, "--json", *words)
            assert json.loads(done.stdout)["bad"] == bad
            rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
            assert [bool(row["error"]) for row in rows] == [False, bool(bad), False]
            assert not bad or ("a.csv:3" in rows[1]["error"] and "the model takes 64" in rows[1]["error"])


def test_a_question_on_the_command_line_is_refused_or_truncated(model: Path) -> None:
    with pytest.raises(ContextLengthError, match="takes 64"):
        command("run", model, "say", "text=" + "蓝" * 100)
    found = json.loads(command("run", model, "mood", "text=" + "蓝" * 100, "--truncate", "start", "--json").stdout)
    assert found["truncated"] > 30 and found["answer"] in found["probabilities"]
    found = json.loads(command("run", model, "mood", "text=蓝", "--truncate", "start", "--json").stdout)
    assert found["truncated"] == 0
    assert command("run", model, "say", "text=蓝", "--truncate", "end").exit_code == 2


def test_an_output_takes_one_prediction_at_a_time(session: Session, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    prediction = Prediction(session, "mood", str(table(tmp_path / "in.csv", 3)), output)
    with lock_output(output), pytest.raises(UsageError, match="out.csv is being written by another process"):
        prediction.run()
    assert prediction.run()["answered"] == 3
