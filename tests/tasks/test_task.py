"""A record becomes a Sequence, and what the model wrote an answer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from openm6.core.errors import DataError, UsageError
from openm6.core.images import ImageGrid
from openm6.core.sequence import CAUSAL, IGNORE, SOURCE, Sequence
from openm6.tasks.encode import encode_example, encode_prompt
from openm6.tasks.file import read_task, task_from_dict
from openm6.tasks.forms import answer_constraint
from openm6.tasks.processor import Processor
from openm6.tasks.slots.label import normalize_label
from openm6.tasks.task import Task
from tests.tasks.conftest import picture

VQA = Task.from_instruction("[image:photo] [text:question] -> [text:answer]", "vqa")
ASKED = {"photo": picture(), "question": "是什么颜色？", "answer": "红色"}


def shown(sequence: Sequence, processor: Processor) -> str:
    """A Sequence as text, special tokens by their names."""
    tokenizer = processor.tokenizer
    names = {getattr(tokenizer, f"{n}_id"): f"<{n}>" for n in ("answer", "image", "image_end", "mask", "row", "cell")}
    names |= {tokenizer.patch_id: ".", tokenizer.table_id: "<table>", tokenizer.table_end_id: "</table>"}
    runs, text = [], ""
    for token in sequence.ids.tolist():
        if token in names:
            text, _ = text + tokenizer.decode(runs) + names[token], runs.clear()
        else:
            runs.append(token)
    return text + tokenizer.decode(runs)


def target_ids(sequence: Sequence) -> list[int]:
    return sequence.labels[sequence.labels != IGNORE].tolist()


# Layout


def test_a_question_about_a_picture(processor: Processor) -> None:
    found = encode_example(VQA, ASKED, processor)
    assert shown(found, processor) == "<image>" + "." * 16 + "<image_end>是什么颜色？<answer>红色"
    (photo,) = found.pictures
    assert photo.pixels.shape == (32, 32, 3) and (photo.start, photo.patches) == (1, 16)
    answer = found.ids.tolist().index(processor.tokenizer.answer_id)
    assert (found.blocks[:answer] == SOURCE).all() and (found.blocks[answer:] == CAUSAL).all()
    assert VQA.read(target_ids(found), processor) == {"answer": "红色"} and found.task == "vqa"


def test_a_prompt_is_the_same_up_to_the_answer(processor: Processor) -> None:
    whole = encode_example(VQA, ASKED, processor)
    prompt = encode_prompt(VQA, {k: v for k, v in ASKED.items() if k != "answer"}, processor)
    assert prompt.ids.tolist() == whole.ids[: len(prompt)].tolist()
    assert prompt.ids[-1] == processor.tokenizer.answer_id and (prompt.labels == IGNORE).all()


def test_the_patches_follow_the_pictures_shape(processor: Processor) -> None:
    for width, height in ((64, 16), (10, 90), (31, 32)):
        (photo,) = encode_example(VQA, {**ASKED, "photo": picture(width, height)}, processor).pictures
        assert photo.patches == photo.pixels.shape[0] // 8 * (photo.pixels.shape[1] // 8) <= 16


def test_several_pictures_and_texts_that_touch(processor: Processor) -> None:
    task = Task.from_instruction("[image:a] [image:b] 甲: [text:x] [text:y] [label:z] 乙 -> [text:t]")
    processor = Processor(processor.tokenizer, ImageGrid(8, 4), 64)
    record = {"a": picture(), "b": picture(seed=1), "x": "红", "y": "黄", "z": 7, "t": "蓝"}
    found = encode_example(task, record, processor)
    image = "<image>....<image_end>"
    assert shown(found, processor) == f"{image}{image}甲:红<row>黄<row>7乙<answer>蓝"
    assert [p.start for p in found.pictures] == [1, 7]


def test_writing_from_nothing(processor: Processor) -> None:
    task = Task.from_instruction("-> [text:text]")
    assert shown(encode_example(task, {"text": "红色"}, processor), processor) == "<answer>红色"
    assert encode_prompt(task, {}, processor).ids.tolist() == [processor.tokenizer.answer_id]


def test_tables_are_read_and_written(processor: Processor) -> None:
    task = Task.from_instruction("[table:t] 是什么 -> [table:u]")
    rows = [{"品类": "包", "颜色": "红色"}, {"品类": "帽子", "价": 3, "无": None}]
    found = encode_example(task, {"t": rows[0], "u": rows}, processor)
    first = "<table><row>品类<cell>包<cell>颜色<cell>红色</table>是什么<answer>"
    second = "<table><row>品类<cell>包<cell>颜色<cell>红色<row>品类<cell>帽子<cell>价<cell>3</table>"
    assert shown(found, processor) == first + second
    assert task.read(target_ids(found), processor)["u"] == [rows[0], {"品类": "帽子", "价": "3"}]
    same = encode_example(task, {"t": json.dumps(rows[0]), "u": json.dumps(rows)}, processor)
    assert same.ids.tolist() == found.ids.tolist()


word = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)
label = word.map(normalize_label).filter(bool)


@settings(deadline=None)
@given(word, word, label, st.lists(st.dictionaries(word, word, min_size=1, max_size=3), min_size=1, max_size=3))
def test_all_that_is_written_is_read_back(processor: Processor, a: str, b: str, c: str, rows: list) -> None:
    processor = Processor(processor.tokenizer, processor.grid, 2000)
    task = Task.from_instruction("-> 甲[text:a] [table:t] [text:b] 丙 [label:c] 丁")
    record = {"a": a, "b": b, "c": c, "t": rows}
    found = task.read(target_ids(encode_example(task, record, processor)), processor)
    if "丙" not in b:  # a text that holds the very words that end it cannot be told from them
        assert found == record
    one = Task.from_instruction("-> [text:a]")
    assert one.read(target_ids(encode_example(one, {"a": a}, processor)), processor) == {"a": a}


@settings(deadline=None)
@given(st.lists(st.integers(0, 915), max_size=30))
def test_any_ids_can_be_read(processor: Processor, ids: list[int]) -> None:
    task = Task.from_instruction("-> 甲[text:a] 乙 [table:t] [label:c] 丁")
    assert list(task.read(ids, processor)) == ["a", "t", "c"]


# Corruption


def test_training_masks_and_restores(processor: Processor) -> None:
    task = Task.from_instruction("[text:text|mask=0.3] -> [text:text]")
    text = "红色条纹连衣裙在蓝色帽子的左边。"
    seen = {
        shown(encode_example(task, {"text": text}, processor, np.random.default_rng(i)), processor) for i in range(8)
    }
    assert len(seen) > 4
    for one in seen:
        source, target = one.split("<answer>")
        assert target == text and "<mask>" in source
        assert len(source.replace("<mask>", "")) == len(text) - round(0.3 * len(text))


def test_training_cuts_and_continues(processor: Processor) -> None:
    task = Task.from_instruction("[text:text|prefix] 续 -> [text:text]")
    found = shown(encode_example(task, {"text": "红色条纹连衣裙"}, processor, np.random.default_rng(0)), processor)
    assert found.replace("续<answer>", "") == "红色条纹连衣裙" and not found.endswith("<answer>")


def test_use_takes_the_source_as_it_is_with_its_gaps(processor: Processor) -> None:
    infill = Task.from_instruction("[text:text|mask=0.3] -> [text:text]")
    prompt = encode_prompt(infill, {"text": "红色____连衣裙"}, processor)
    assert shown(prompt, processor) == "红色<mask>连衣裙<answer>"
    go_on = Task.from_instruction("[text:text|prefix] -> [text:text]")
    assert shown(encode_prompt(go_on, {"text": "红色____"}, processor), processor) == "红色____<answer>"


def test_measuring_corrupts_alike_each_time(processor: Processor) -> None:
    for slot in ("mask=0.3", "prefix"):
        task = Task.from_instruction(f"[text:text|{slot}] -> [text:text]")
        one, two = (encode_example(task, {"text": "红色条纹连衣裙在左边"}, processor) for _ in range(2))
        assert one.ids.tolist() == two.ids.tolist()
        assert shown(one, processor).split("<answer>")[0] != "红色条纹连衣裙在左边"


def test_a_droppable_slot_may_be_absent(processor: Processor) -> None:
    task = Task.from_instruction("[text:hint|drop=0.5] 写: -> [text:text]")
    record = {"hint": "红", "text": "蓝"}
    rng = np.random.default_rng(0)
    seen = [shown(encode_example(task, record, processor, rng), processor) for _ in range(400)]
    assert set(seen) == {"红写:<answer>蓝", "写:<answer>蓝"} and 150 < seen.count("写:<answer>蓝") < 250
    assert shown(encode_example(task, record, processor), processor) == "红写:<answer>蓝"
    assert shown(encode_example(task, {"text": "蓝"}, processor), processor) == "写:<answer>蓝"
    assert task.schema()["inputs"]["required"] == []


def test_training_draws_among_variants_and_references(processor: Processor) -> None:
    task = task_from_dict({"name": "t", "instructions": ["甲 -> [text:t]", "乙 -> [text:t]"]})
    rng = np.random.default_rng(0)
    record = {"t": ["红", "蓝"]}
    seen = {shown(encode_example(task, record, processor, rng), processor) for _ in range(50)}
    assert seen == {"甲<answer>红", "甲<answer>蓝", "乙<answer>红", "乙<answer>蓝"}
    assert shown(encode_example(task, record, processor), processor) == "甲<answer>红"


def test_the_same_numbers_give_the_same_example(processor: Processor) -> None:
    task = task_from_dict({"name": "t", "instructions": [f"{v} [text:t|mask=0.4] -> [text:t]" for v in "甲乙丙"]})
    for seed in range(5):
        one, two = (
            encode_example(task, {"t": "红色条纹连衣裙"}, processor, np.random.default_rng(seed)) for _ in range(2)
        )
        assert one.ids.tolist() == two.ids.tolist()


# Labels


def test_labels_come_from_the_instruction_the_file_or_the_data(processor: Processor) -> None:
    written = Task.from_instruction("-> [label:c|set=红色,蓝色]")
    given_ = Task.from_instruction("-> [label:c]", labels={"c": ["红色", "蓝色"]})
    told = Task.from_instruction("-> [label:c]").with_labels({"c": ["红色", "蓝色", "红色"]})
    assert written.labels == given_.labels == told.labels == {"c": ("红色", "蓝色")}
    assert answer_constraint(Task.from_instruction("-> [label:c]"), {}, processor.tokenizer) is None
    assert told.schema()["outputs"]["properties"]["c"] == {"type": "string", "enum": ["红色", "蓝色"]}


def spelt(task: Task, processor: Processor) -> list[str]:
    """All answers that the constraint lets through."""
    trie = answer_constraint(task, {}, processor.tokenizer)
    assert trie is not None
    found, open_ends = [], [[]]
    while open_ends:
        prefix = open_ends.pop()
        for token in trie.next(prefix):
            if token == processor.tokenizer.end_id:
                found.append(json.dumps(task.read(prefix, processor), ensure_ascii=False))
            else:
                open_ends.append([*prefix, token])
    return sorted(found)


@settings(deadline=None, max_examples=50)
@given(st.lists(label | st.integers(0, 10**12).map(str), min_size=1, max_size=30, unique=True))
def test_the_constraint_lets_through_the_labels_and_nothing_else(processor: Processor, labels: list[str]) -> None:
    task = Task.from_instruction("[image] 哪类? -> [label:c]", labels={"c": labels})
    assert spelt(task, processor) == sorted(json.dumps({"c": label}, ensure_ascii=False) for label in labels)


def test_several_labels_and_plain_text_are_constrained_together(processor: Processor) -> None:
    task = Task.from_instruction("-> 颜色是[label:a|set=红,蓝]，图案是[label:b|set=条纹,圆点] [label:c|set=1,2]。")
    assert len(spelt(task, processor)) == 8 and '{"a": "红", "b": "圆点", "c": "2"}' in spelt(task, processor)
    trie, found = (
        answer_constraint(task, {}, processor.tokenizer),
        encode_example(task, {"a": "蓝", "b": "条纹", "c": 1}, processor),
    )
    assert trie is not None
    for place, token in enumerate(target_ids(found)):
        assert token in trie.next(target_ids(found)[:place])
    assert answer_constraint(Task.from_instruction("-> [label:a|set=红,蓝] [text:t]"), {}, processor.tokenizer) is None


def test_a_label_outside_of_the_set_is_bad_data(processor: Processor) -> None:
    task = Task.from_instruction("-> [label:c|set=连衣裙,帽子]")
    with pytest.raises(DataError, match=r'a\.jsonl:3: c: .* none of the task.s labels\. Did you mean "连衣裙"'):
        encode_example(task, {"c": "连衣", "_where": "a.jsonl:3"}, processor)
    for labels, problem in (({"d": ["x"]}, "no label slot d"), ({"c": []}, "empty set")):
        with pytest.raises(UsageError, match=problem):
            task.with_labels(labels)


# Mistakes


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"question": None}, r"^question is missing: the task vqa needs it, and the record has photo, question"),
        ({"question": ""}, "^question: is empty"),
        ({"question": b"x"}, "^question: has to be a text, not bytes"),
        ({"question": True}, "^question: has to be a text, not bool"),
        ({"question": "\ud83d"}, "^question: The text .* is broken"),
        ({"answer": {"a": 1}}, "^answer: has to be a text, not dict"),
        ({"answer": []}, "^answer: has to be a text, not list"),
        ({"photo": 3}, "^photo: has to be a picture"),
        ({"photo": ""}, "^photo: is empty"),
        ({"photo": "/no/such.jpg"}, r"^photo: The picture /no/such\.jpg does not exist"),
        ({"photo": picture()[:200]}, "^photo: The picture is truncated or damaged"),
        ({"_where": "b.tsv:7", "answer": ""}, r"^b\.tsv:7: answer: is empty"),
    ],
)
def test_bad_records_are_named(processor: Processor, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        encode_example(VQA, {**ASKED, **changes}, processor)


def test_a_missing_slot_suggests_the_key_that_may_be_meant(processor: Processor) -> None:
    with pytest.raises(DataError, match=r'has photo, qestion, answer\. Did you mean "qestion"'):
        encode_example(VQA, {"photo": ASKED["photo"], "qestion": "?", "answer": "红"}, processor)


@pytest.mark.parametrize("value", ["no json", "3", [], {}, {"a": None}, ["x"], {"a": []}, 3])
def test_what_is_no_table_is_bad_data(processor: Processor, value: Any) -> None:
    with pytest.raises(DataError, match=r"^t: "):
        encode_example(Task.from_instruction("[table:t] -> [text]"), {"t": value, "text": "红"}, processor)


def test_a_vector_is_no_input(processor: Processor) -> None:
    with pytest.raises(UsageError, match=r"^\[vector:b\]: a vector is what a model gives"):
        encode_example(Task.from_instruction("[vector:b] -> [text:a]"), {"a": "红", "b": [0, 0, 1, 1]}, processor)


def test_a_picture_that_does_not_fit_is_bad_data(processor: Processor) -> None:
    with pytest.raises(DataError, match=r"needs 19 positions .* takes 19"):
        encode_example(VQA, ASKED, Processor(processor.tokenizer, processor.grid, 19))


def test_long_texts_are_cut_in_training(processor: Processor) -> None:
    found = encode_example(VQA, {**ASKED, "question": "红" * 500}, processor)
    assert len(found) == 64 and VQA.read(target_ids(found), processor) == {"answer": "红色"}


# Task files


def test_a_task_is_kept_whole_as_json() -> None:
    task = task_from_dict(
        {
            "name": "n", "description": "d",
            "instructions": ["甲 [image:p] -> [label:l]", "[image:p] 乙 -> [label:l|set=a,b]"],
            "metrics": ["accuracy"], "decode": {"max_new_tokens": 3, "temperature": 0.5}, "labels": {"l": ["x", 7]},
            "example": {"p": "a.jpg", "l": "x"}, "aliases": {"p": ["foto"]},
        }
    )  # fmt: skip
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task
    assert task.labels == {"l": ("x", "7")} and list(task.texts()) == ["甲", "乙", "x", "7"]
    assert task.slots.keys() == {"p", "l"} and (task.inputs, task.outputs) == (("p",), ("l",))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("instruction: '-> [text]'\nmetric: [bleu]", r't\.yaml: there is no key metric\. Did you mean "metrics"'),
        ("description: d", r"t\.yaml: the key instructions is missing"),
        ("instruction: '-> [txt]'", r"t\.yaml: There is no slot type 'txt'"),
        ("instruction: '-> [text]'\nmetrics: [blue]", r't\.yaml: metrics: there is no blue\. Did you mean "bleu"'),
        ("instruction: '-> [text]'\nmetrics: bleu", r"t\.yaml: metrics: Input should be a valid list, not 'bleu'"),
        ("instruction: '-> [text]'\ndecode: {max_new_tokens: many}", r"t\.yaml: decode\.max_new_tokens"),
        (
            "instruction: '-> [text]'\nexample: {txt: x}",
            r't\.yaml: example\.txt: .* no such slot\. Did you mean "text"',
        ),
        ("instruction: '-> [text]'\nexample: {text: 2024-01-01}", r"t\.yaml: example: .* put it in quotes"),
        ("instruction: '-> [text]'\naliases: {x: [y]}", r"t\.yaml: aliases\.x"),
        ("instruction: '-> [text]'\nlabels: {text: [y]}", r"t\.yaml: The task t has no label slot text"),
        ("instructions: ['-> [text:a]', '-> [text:b]']", r"t\.yaml: The task t has instructions with different slots"),
        ("instructions: ['[text:a] -> [text:b]', '[label:a] -> [text:b]']", "different slots"),
        ("instructions: [\n  a: ]]", r"t\.yaml:2 is no YAML"),
        ("- x", r"t\.yaml has to hold keys such as `instructions`, not list"),
        ("", r"t\.yaml has to hold keys"),
    ],
)
def test_mistakes_in_a_task_file_are_named(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "t.yaml").write_text(text, "utf-8")
    with pytest.raises(UsageError, match=problem):
        read_task(tmp_path / "t.yaml")


def test_unreadable_task_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_task(tmp_path / "t.yaml")
    (tmp_path / "t.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UsageError, match="no UTF-8"):
        read_task(tmp_path / "t.yaml")
