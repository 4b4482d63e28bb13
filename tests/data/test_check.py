"""`openm6 data check`: what it says of a file before anything is trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openm6.core.errors import UsageError
from openm6.core.sequence import SOURCE_BLOCKS
from tests.conftest import command, drawing_session
from tests.data.conftest import picture_bytes


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def checked(file: Path, task: str, *words: object, code: int = 0) -> dict[str, Any]:
    result = command("data", "check", file, "--task", task, "--json", *words)
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_three_records_are_shown_as_they_will_be_trained(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture_bytes())
    file = lines(tmp_path / "a.jsonl", *[{"image": "a.png", "caption": f"第{n}张图片"} for n in range(5)])
    examples = checked(file, "caption")["examples"]
    assert [e["target"] for e in examples] == ["第0张图片", "第1张图片", "第2张图片"]
    assert examples[0]["source"] == "[a.png, 8 x 8]描述这张图片。" and examples[0]["where"].endswith("a.jsonl:1")
    shown = command("data", "check", file, "--task", "caption").output.replace("\n", "")
    assert "[a.png, 8 x 8]描述这张图片。 -> 第0张图片" in shown


@pytest.mark.parametrize(
    ("task", "record", "source", "target"),
    [
        ("[text:a] 与 [text:b] -> [label:c]", {"a": "一", "b": "二", "c": "是"}, "一与二", "是"),
        ("[text:a] -> [text:b] [text:c]", {"a": "一", "b": "二", "c": "三"}, "一", "二<|row|>三"),
        ("[table:t] -> [text:b]", {"t": {"色": "红"}, "b": "二"}, "<|table|><|row|>色<|cell|>红<|/table|>", "二"),
        ("[text:a] -> [vector:v]", {"a": "一"}, "一", "(a vector)"),
        ("[text:a] -> [image:p]", {"a": "一", "p": "a.png"}, "一", "[a.png, 8 x 8]"),
        ("[text:a] -> [text:b]", {"a": "一" * 300, "b": "二"}, "一" * 80 + " ... " + "一" * 80, "二"),
    ],
)
def test_every_kind_of_slot_can_be_shown(tmp_path: Path, task: str, record: Any, source: str, target: str) -> None:
    (tmp_path / "a.png").write_bytes(picture_bytes())
    (example,) = checked(lines(tmp_path / "a.jsonl", record), task)["examples"]
    assert (example["source"], example["target"]) == (source, target)


@pytest.mark.parametrize("source", SOURCE_BLOCKS)
def test_a_models_own_reading_of_a_source_changes_nothing_shown(tmp_path: Path, source: str) -> None:
    drawing_session(max_length=64, source=source).save(tmp_path / "model")
    (tmp_path / "a.png").write_bytes(picture_bytes())
    record = {"a": "杯子", "b": "红", "p": "a.png"}
    for task, target in (("[text:a] -> [text:b]", "红"), ("[text:a] -> [image:p]", "[a.png, 8 x 8]")):
        (example,) = checked(lines(tmp_path / "a.jsonl", record), task, "--model", tmp_path / "model")["examples"]
        assert (example["source"], example["target"]) == ("杯子", target)


def test_a_masked_text_is_shown_with_its_gaps(tmp_path: Path) -> None:
    (example,) = checked(lines(tmp_path / "a.jsonl", {"text": "今天天气很好我们去公园"}), "text_denoising")["examples"]
    assert "____" in example["source"] and example["target"] == "今天天气很好我们去公园"


def test_ids_are_not_trained_and_the_refusal_gives_the_whole_command(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "一只猫"}]
    (tmp_path / "a.png").write_bytes(picture_bytes())
    file = lines(tmp_path / "a b.jsonl", *[{"id": f"00{n}", "image": "a.png", "talk": talk} for n in range(3)])
    with pytest.raises(UsageError) as caught:
        command("data", "check", file, "--task", "caption", "--images", tmp_path)
    said = str(caught.value)
    assert f"openm6 data check '{file}' --task caption --images {tmp_path} -c caption=COLUMN" in said
    assert "id looks like a key" in said
    # A user may mean it.
    assert checked(file, "caption", "-c", "caption=id")["columns"] == {"photo": "image", "caption": "id"}


def test_classes_are_counted_and_those_that_are_alike_are_told(tmp_path: Path) -> None:
    labels = ["正面", "正面 ", "负面", "Ｇood", "good", "Good"]
    file = lines(tmp_path / "a.jsonl", *[{"text": f"第{n}条", "label": label} for n, label in enumerate(labels)])
    found = checked(file, "text_classification")["classes"]["label"]
    assert found["counts"] == {"正面": 2, "Good": 2, "负面": 1, "good": 1}
    assert found["respelled"] == {"正面 ": "正面", "Ｇood": "Good"} and found["alike"] == [["Good", "good"]]
    shown = command("data", "check", file, "--task", "text_classification").output
    assert "label has 4 classes: 正面 2, Good 2, 负面 1, good 1." in shown
    assert "such as '正面 ' for '正面'" in shown and "'Good' and 'good' differ in capitals or blanks alone" in shown


def test_a_label_of_another_spelling_belongs_to_the_tasks_set(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"a": "一", "b": "是 "}, {"a": "二", "b": "也许"})
    found = checked(file, "[text:a] -> [label:b|set=是,否]", code=1)
    assert found["good"] == 1 and "none of the task's labels" in found["problems"][0]["reason"]


def test_with_a_model_tokens_are_counted_and_what_is_cut(tmp_path: Path) -> None:
    drawing_session(max_length=64).save(tmp_path / "model")
    texts = ["杯" * 20, "杯" * 100, "杯" * 200]
    file = lines(tmp_path / "a.jsonl", *[{"question": text, "answer": "红"} for text in texts])
    found = checked(file, "[text:question] -> [text:answer]", "--model", tmp_path / "model")
    # The answer's mark is a token, and the end of the answer is only ever predicted.
    assert (
        found["max_length"] == 64
        and found["tokens"]["(example)"]["longest"] == found["tokens"]["question"]["longest"] + 2
    )
    tokens = found["tokens"]["question"]
    assert found["cut"] == {
        "records": 2,
        "median": (tokens["median"] + tokens["longest"]) // 2 + 2 - 64,
        "longest": tokens["longest"] + 2 - 64,
    }
    shown = command("data", "check", file, "--task", "[text:question] -> [text:answer]", "--model", tmp_path / "model")
    assert "2 of 3 records are longer than 64 tokens" in shown.output


def test_records_that_repeat_and_inputs_with_two_answers_are_told(tmp_path: Path) -> None:
    pairs = [("好看", "正面"), ("难看", "负面"), ("好看 ", "正面"), ("难看", "正面"), ("好看", "正面 ")]
    file = lines(tmp_path / "a.jsonl", *[{"text": text, "label": label} for text, label in pairs])
    found = checked(file, "text_classification")
    assert found["duplicates"] == {"count": 2, "first": [f"{file}:1", f"{file}:3"]}
    assert found["conflicts"] == {"count": 1, "first": [f"{file}:2", f"{file}:4"]}
    shown = " ".join(command("data", "check", file, "--task", "text_classification").output.split())
    assert f"Records that repeat another: 2, such as {file}:1 and {file}:3." in shown
    assert f"Inputs with several answers: 1, such as {file}:2 and {file}:4." in shown


def test_leaks_from_the_data_that_are_measured_on_are_found_by_content(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2), ("copy", 1), ("c", 3)):
        (tmp_path / f"{name}.png").write_bytes(picture_bytes(value))
    train = lines(
        tmp_path / "train.jsonl", *[{"image": f"{n}.png", "question": "什么？", "answer": "包"} for n in "ab"]
    )
    test = lines(
        tmp_path / "test.jsonl",
        {"image": "c.png", "question": "什么？", "answer": "包"},
        {"image": "copy.png", "question": "什么?", "answer": "鞋"},
        {"image": "copy.png", "question": "颜色?", "answer": "红"},
    )
    sizes = {(tmp_path / f"{name}.png").stat().st_size for name in ("a", "b", "c")}
    assert len(sizes) == 1  # so that it is not the size that tells them apart
    assert checked(train, "vqa", "--against", test)["overlap"] == {"found": 1, "total": 3, "first": f"{test}:2"}
    assert "overlap" not in checked(train, "vqa")
    shown = " ".join(command("data", "check", train, "--task", "vqa", "--against", test).output.split())
    assert f"1 of 3 records that are measured on have inputs of these data (first: {test}:2)." in shown


@pytest.mark.parametrize(
    ("task", "good", "bad"),
    [
        ("[table:t] -> [text:a]", {"t": {"色": "红"}, "a": "一"}, {"t": "红", "a": "一"}),
        ("[text:a] -> [box:b]", {"b": [0, 0.1, 0.5, 1], "a": "一"}, {"b": [1, 2], "a": "一"}),
    ],
)
def test_a_value_of_another_type_is_found(tmp_path: Path, task: str, good: Any, bad: Any) -> None:
    found = checked(lines(tmp_path / "a.jsonl", good, bad), task, code=1)
    assert found["good"] == 1 and found["problems"][0]["where"].endswith("a.jsonl:2")
