"""What is longer than the model takes: refused with both numbers, or truncated by choice, and never the question."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from openm6.core.errors import ContextLengthError, DataError, OpenM6Error, UsageError
from openm6.tasks.encode import encode_example, encode_prompt
from openm6.tasks.lengths import CHARACTERS, check_value
from openm6.tasks.library import get, names
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from tests.tasks.conftest import picture

READING = get("reading")
ENDING = "商品是什么颜色?"


def use(task: Task, record: dict[str, Any], processor: Processor, **more: Any) -> Any:
    return encode_prompt(task, record, processor, **more)


def refusal(task: Task, record: dict[str, Any], processor: Processor, **more: Any) -> ContextLengthError:
    with pytest.raises(ContextLengthError) as raised:
        use(task, record, processor, **more)
    assert raised.value.code == "context_length_exceeded"
    return raised.value


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(processor: Processor) -> None:
    record = {"passage": "红" * 100, "question": ENDING, "_where": "a.csv:7"}
    found = use(READING, record, replace(processor, max_length=500))
    error = refusal(READING, record, processor)
    assert str(error) == (
        f"a.csv:7: The prompt has {len(found)} positions; the model takes 64 (max_length). "
        'Shorten passage, its longest text (100 positions), or let truncate="start" leave out its beginning.'
    )
    assert error.param == "passage"
    assert len(use(READING, record, replace(processor, max_length=len(found)))) == len(found)


def test_a_record_that_is_too_long_is_a_bad_record_and_a_wrong_request(processor: Processor) -> None:
    error = refusal(get("text_vector"), {"text": "红" * 100}, processor)
    assert isinstance(error, DataError) and isinstance(error, UsageError) and error.exit_code == 2


@pytest.mark.parametrize("order", ["[text:passage] 问: [text:question]", "[text:question] 答案在下面: [text:passage]"])
def test_truncated_the_passage_loses_its_beginning_and_the_question_nothing(order: str, processor: Processor) -> None:
    task = Task.from_instruction(f"{order} -> [text:answer]")
    passage = "".join("红黄蓝绿"[i % 4] for i in range(203))
    found = use(task, {"passage": passage, "question": ENDING}, processor, truncate="start")
    said = processor.tokenizer.decode(found.ids)
    kept = passage[found.truncated :]
    assert len(found) <= 64 and found.truncated > 0 and kept
    assert said == task.instructions[0].text.split(" -> ")[0].replace("[text:passage]", kept).replace(
        "[text:question]", ENDING
    ).replace(" ", "")


def test_of_a_conversation_the_end_stays(processor: Processor) -> None:
    found = use(get("question_answering"), {"question": "红色。\n" * 100 + ENDING}, processor, truncate="start")
    assert processor.tokenizer.decode(found.ids).endswith("红色。\n" + ENDING) and len(found) == 33


@given(
    st.sampled_from(sorted(n for n in names() if get(n).inputs and not get(n).draws and not get(n).converses)),
    st.data(), st.integers(2, 80), st.sampled_from([None, "start"]), st.integers(0, 5),
)  # fmt: skip
def test_no_prompt_is_longer_than_the_model(
    processor: Processor, name: str, data: st.DataObject, longest: int, truncate: str | None, adapter: int
) -> None:
    """And a truncated one has all tokens of all slots but the longest text, and the end of that."""
    task = get(name)
    if "choices" in task.slots:  # how many labels are listed depends on the model's length
        task = replace(task, labels={})
    limited = replace(processor, max_length=longest, prompt=adapter)
    unlimited = replace(processor, max_length=10**6, prompt=adapter)
    texts = st.text("红黄蓝绿ab。 ", min_size=1, max_size=60)
    values = {
        "text": texts, "label": texts, "image": st.just(picture(16, 16)), "box": st.just([0.1, 0.1, 0.5, 0.5]),
        "table": st.dictionaries(texts, texts, min_size=1, max_size=3),
        "triples": st.lists(st.lists(texts, min_size=3, max_size=3), min_size=1, max_size=3),
    }  # fmt: skip
    record = {slot: data.draw(values[task.slots[slot].type]) for slot in task.inputs if slot != "choices"}
    for slot, known in task.labels.items():
        record |= {slot: known[0]} if slot in record else {}
    record |= {"form": "五言绝句"} if "form" in record else {}
    whole = use(task, record, unlimited)
    try:
        found = use(task, record, limited, truncate=truncate)
    except ContextLengthError as error:
        reserve = int(task.decode.get("max_new_tokens", 0)) if truncate else 0
        assert len(whole) + reserve > longest and f"{longest} " in str(error)
        return
    assert len(found) <= longest and len(found) + found.truncated == len(whole)
    if found.truncated:
        assert truncate == "start"
        lost = next(i for i in range(len(found) + 1) if i == len(found) or found.ids[i] != whole.ids[i])
        # One run of tokens is gone: it begins where a slot's text began, and nothing else is missing.
        assert any(
            (found.ids == [*whole.ids[:start], *whole.ids[start + found.truncated :]]).all()
            for start in range(lost + 1)
        )


def test_what_else_does_not_fit_is_refused_with_truncation_too(processor: Processor) -> None:
    table = {"品类": "红" * 100}
    assert refusal(get("table_question"), {"table": table, "question": ENDING}, processor).param == "question"
    error = refusal(get("table_question"), {"table": table, "question": ENDING}, processor, truncate="start")
    assert "takes 64" in str(error)
    both = {"passage": "红" * 70, "question": "蓝" * 65}
    assert "all but its longest text" in str(refusal(READING, both, processor, truncate="start"))


def test_examples_that_do_not_fit_are_told(processor: Processor) -> None:
    task = get("question_answering")
    shots = [{"question": "红" * 20, "answer": "蓝"}] * 4
    for truncate in (None, "start"):
        error = refusal(task, {"question": ENDING}, processor, shots=shots, truncate=truncate)
        assert "4 examples and the record do not fit: they have " in str(error) and "takes 64" in str(error)
        assert "the last 2 of them fit" in str(error) and error.param == "examples"
    assert not use(task, {"question": ENDING}, processor, shots=shots[:2]).truncated


def test_a_sketch_is_never_shortened(processor: Processor) -> None:
    task = get("live_script_edit")
    for truncate in (None, "start"):
        assert "takes 64" in str(refusal(task, {"asr": "红" * 100}, processor, truncate=truncate))
    assert not use(task, {"asr": "红" * 30}, processor).truncated


# Before anything is cut into tokens


@pytest.mark.parametrize(
    ("task", "record", "slot"),
    [
        ("question_answering", {"question": "红" * 10**7}, "question"),
        ("[label:kind] 是什么? -> [text:answer]", {"kind": "Ａ" * 10**7}, "kind"),
        ("[label:kind|set=红,蓝] 是什么? -> [text:answer]", {"kind": "红" * 10**7}, "kind"),
        ("table_question", {"table": [{"a": "b"}] * 10**6, "question": "红"}, "table"),
        ("table_question", {"table": {str(i): None for i in range(10**6)}, "question": "红"}, "table"),
        ("table_question", {"table": '{"a": "b"}' * 10**6, "question": "红"}, "table"),
        ("[triples:facts] -> [text:text]", {"facts": [["a", "b", "c"]] * 10**6}, "facts"),
        ("[box:box] -> [text:text]", {"box": [0.5] * 10**6}, "box"),
        ("question_answering", {"question": 10 ** (10**5)}, "question"),
    ],
)  # fmt: skip
def test_what_is_much_too_long_is_refused_by_its_size(
    task: str, record: dict[str, Any], slot: str, processor: Processor
) -> None:
    found = Task.from_instruction(task) if "->" in task else get(task)
    error = refusal(found, record, processor)
    assert str(error).startswith(f"{slot}: has ") and f"takes {CHARACTERS * 64:,} at most" in str(error)
    assert error.param == slot


def test_much_too_long_an_example_is_refused_too(processor: Processor) -> None:
    for shot in ({"question": "红" * 10**6, "answer": "蓝"}, {"question": "红", "answer": "蓝" * 10**6}):
        assert "characters" in str(refusal(get("question_answering"), {"question": "红"}, processor, shots=[shot]))


def test_a_much_too_long_text_can_be_truncated(processor: Processor) -> None:
    task, long = get("question_answering"), "红黄" * 10**6 + ENDING
    found = use(task, {"question": long}, processor, truncate="start")
    assert found.ids.tolist() == use(task, {"question": long[-1000:]}, processor, truncate="start").ids.tolist()
    assert 10**6 / CHARACTERS < found.truncated < 2 * 10**6


def test_training_takes_what_it_took(processor: Processor) -> None:
    record = {"question": "红" * (CHARACTERS * 64 + 1), "answer": "蓝"}
    assert len(encode_example(get("question_answering"), record, processor)) == 64


def test_an_unknown_slot_and_a_missing_one_are_told_briefly(processor: Processor) -> None:
    many = {f"key{i}" + "x" * 1000: 1 for i in range(10**5)}
    for act in (lambda: READING.check(many), lambda: use(READING, many, processor)):
        with pytest.raises(OpenM6Error) as raised:
            act()
        assert len(str(raised.value)) < 2000


# Half a character


@pytest.mark.parametrize("half", ["\ud800", "红\udfff色"])
@pytest.mark.parametrize(
    ("task", "record"),
    [
        ("question_answering", {"question": "HALF"}), ("table_question", {"table": {"HALF": "a"}, "question": "红"}),
        ("table_question", {"table": [{"a": "HALF"}], "question": "红"}),
        ("[label:kind] -> [text:text]", {"kind": "HALF"}), ("[box:box] -> [text:text]", {"box": "HALF"}),
        ("[triples:facts] -> [text:text]", {"facts": [["a", "HALF", "c"]]}),
        ("[label:kind|set=红,蓝] -> [text:text]", {"kind": "HALF"}),
    ],
)  # fmt: skip
def test_half_a_character_is_refused_by_its_slot(
    task: str, record: dict[str, Any], half: str, processor: Processor
) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {filled(k): filled(v) for k, v in value.items()}
        return [filled(v) for v in value] if isinstance(value, list) else value.replace("HALF", half)

    found = Task.from_instruction(task) if "->" in task else get(task)
    with pytest.raises(DataError, match=r"^\w+: is no text: character \d is half of a surrogate pair") as raised:
        use(found, {slot: filled(value) for slot, value in record.items()}, processor)
    assert raised.value.code == "invalid" and raised.value.param == next(iter(record))


def test_every_message_can_be_printed() -> None:
    with pytest.raises(UsageError, match="ud800") as raised:
        READING.check({"\ud800": 1})
    str(raised.value).encode()


def test_a_list_that_holds_itself_comes_to_an_end() -> None:
    endless: list[Any] = []
    endless += [endless, endless]
    with pytest.raises(ContextLengthError):
        check_value(endless, 64)
