"""Conversations in the form of a chat template, against transformers' apply_chat_template."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from openm6.core.errors import DataError, OpenM6Error, UsageError
from openm6.core.images import ImageGrid
from openm6.core.sequence import CAUSAL, IGNORE
from openm6.core.tokenizer import Tokenizer
from openm6.tasks.chat import ChatFormat, end_of, sampling_of
from openm6.tasks.encode import encode_example, encode_prompt
from openm6.tasks.library import get
from openm6.tasks.piece import Piece
from openm6.tasks.processor import Processor
from openm6.tasks.sandbox import SECONDS, compiled_template
from openm6.tasks.task import Task
from tests.tasks.conftest import picture
from tests.tasks.templates import FAMILIES, ours, theirs

CHAT = get("chat")
TEXTS = st.text("the cat sat\n  今天天气很好，12", min_size=1, max_size=24).filter(lambda text: bool(text.strip()))


def processor(name: str, max_length: int = 512, source: str = "causal", **settings: Any) -> Processor:
    chat, tokenizer = ours(name, **settings)
    return Processor(tokenizer, ImageGrid(8, 16), max_length, source=source, chat=chat)


PROCESSORS = {name: processor(name) for name in FAMILIES}


@st.composite
def conversations(draw: st.DrawFn, has_system: bool = True) -> list[dict[str, str]]:
    count = draw(st.integers(1, 3))
    system = [{"role": "system", "content": draw(TEXTS)}] if has_system and draw(st.booleans()) else []
    turns = [
        {"role": role, "content": draw(TEXTS)} for _ in range(count) for role in ("user", "assistant")
    ]  # fmt: skip
    return [*system, *turns]


def expected_ids(name: str, messages: list[dict[str, Any]], is_open: bool) -> list[int]:
    return theirs(name).apply_chat_template(  # type: ignore[no-any-return]
        messages, add_generation_prompt=is_open, enable_thinking=False, date_string="01 Jan 2025",
        tokenize=True, return_dict=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=50)
@given(data=st.data())
def test_a_prompt_has_the_ids_of_apply_chat_template(name: str, data: st.DataObject) -> None:
    messages = data.draw(conversations(has_system=name != "brackets"))[:-1]
    prompt = encode_prompt(CHAT, {"messages": messages}, PROCESSORS[name])
    assert prompt.ids.tolist() == expected_ids(name, messages, is_open=True)
    assert set(prompt.blocks.tolist()) == {CAUSAL} and set(prompt.labels.tolist()) == {IGNORE}


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=50)
@given(data=st.data())
def test_an_example_has_the_ids_of_apply_chat_template(name: str, data: st.DataObject) -> None:
    """Up to the last end token, which is only predicted; the labels are the answers with their end tokens."""
    *messages, answer = data.draw(conversations(has_system=name != "brackets"))
    one = PROCESSORS[name]
    example = encode_example(CHAT, {"messages": messages, "answer": answer["content"]}, one)
    whole = expected_ids(name, [*messages, answer], is_open=False)
    end = max(place for place, token in enumerate(whole) if token == one.tokenizer.end_id)
    assert example.ids.tolist() == whole[:end]
    assert one.chat is not None
    learned = [m["content"] for m in (*messages, answer) if m["role"] == "assistant"]
    learned = learned if one.chat.keeps_turns else learned[-1:]
    said = one.tokenizer.decode(example.labels[example.labels != IGNORE].tolist())
    assert "".join(said.split()) == "".join("".join(learned).split())
    assert (example.labels == one.tokenizer.end_id).sum() == len(learned)
    following = np.array([*example.ids[1:], one.tokenizer.end_id])
    is_learned = example.labels != IGNORE
    assert (example.labels[is_learned] == following[is_learned]).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_names_of_special_tokens_in_a_text_are_text(name: str) -> None:
    one, evil = PROCESSORS[name], "a" + "".join(FAMILIES[name].special) + "<|pad|>b"
    prompt = encode_prompt(CHAT, {"messages": [{"role": "user", "content": evil}]}, one)
    plain = encode_prompt(CHAT, {"messages": [{"role": "user", "content": "ab"}]}, one)
    special = set(one.tokenizer.special.values())
    assert [i for i in prompt.ids.tolist() if i in special] == [i for i in plain.ids.tolist() if i in special]
    assert evil in one.tokenizer.decode(prompt.ids.tolist())


@settings(max_examples=30)
@given(text=TEXTS, private=st.text("\ue000\ue001\uf8ff0", max_size=5))
def test_private_characters_of_a_text_stay(text: str, private: str) -> None:
    one, said = PROCESSORS["chatml"], text + private + "<|im_end|>" + private
    prompt = encode_prompt(CHAT, {"messages": [{"role": "user", "content": said}]}, one)
    assert said in one.tokenizer.decode(prompt.ids.tolist())


def test_another_turn_leaves_the_labels_of_the_first_as_they_are() -> None:
    one, task = PROCESSORS["chatml"], CHAT
    turns = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    made = [
        encode_example(task, {"messages": [*turns, {"role": "user", "content": c}], "answer": "x"}, one) for c in "ef"
    ]
    assert made[0].labels.tolist() == made[1].labels.tolist()
    assert made[0].ids.tolist() != made[1].ids.tolist()


def test_a_task_is_a_user_turn_and_examples_are_earlier_turns() -> None:
    one = PROCESSORS["chatml"]
    task = Task.from_instruction("Is it good? [text:text] -> [label:label|set=yes,no]")
    shot = {"text": "the cat", "label": "yes"}
    prompt = encode_prompt(task, {"text": "the dog"}, one, [shot], system="Be short.")
    messages = [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "Is it good?\nthe cat"},
        {"role": "assistant", "content": "yes"}, {"role": "user", "content": "Is it good?\nthe dog"},
    ]  # fmt: skip
    assert prompt.ids.tolist() == expected_ids("chatml", messages, is_open=True)
    assert prompt.constraint is not None
    ids = one.tokenizer.encode("no")
    assert prompt.constraint.next(ids) == [one.tokenizer.end_id]
    assert task.value([*ids, one.tokenizer.end_id], one) == "no"


def test_a_system_text_without_a_role_begins_the_first_user_turn() -> None:
    prompt = encode_prompt(
        CHAT, {"messages": [{"role": "user", "content": "hi"}]}, PROCESSORS["brackets"], system="Be short."
    )
    messages = [{"role": "user", "content": "Be short.\n\nhi"}]
    assert prompt.ids.tolist() == expected_ids("brackets", messages, is_open=True)


def test_tables_are_json_and_pictures_stand_in_their_places() -> None:
    one = PROCESSORS["chatml"]
    prompt = encode_prompt(get("product_copy"), {"attributes": {"颜色": "红色"}}, one)
    assert '{"颜色": "红色"}' in one.tokenizer.decode(prompt.ids.tolist())
    text, image = {"type": "text", "text": "a"}, {"type": "image", "image": picture(16, 16)}
    content = [text, image, text, image]
    prompt = encode_prompt(CHAT, {"messages": [{"role": "user", "content": content}]}, one)
    assert [(p.start, p.patches) for p in prompt.pictures] == [
        (place + 1, count)
        for place, count in zip(np.flatnonzero(prompt.ids == one.tokenizer.image_id), (16, 16), strict=True)
    ]


def test_the_longest_text_of_a_task_is_cut_and_nothing_else() -> None:
    one, task = processor("chatml", max_length=60), Task.from_instruction("About: [text:text] Answer: -> [text:answer]")
    record = {"text": "  the cat sat on the mat " * 20}
    prompt = encode_prompt(task, record, one, truncate="start")
    said = one.tokenizer.decode(prompt.ids.tolist())
    assert prompt.truncated and len(prompt) <= 60
    assert said.startswith("system\nYou help.\nuser\nAbout:\n") and said.endswith("\nAnswer:\nassistant\n"), said


def test_the_first_turns_of_a_long_conversation_are_left_out() -> None:
    one = processor("chatml", max_length=60)
    turns = [
        {"role": role, "content": f"{role} {n} the cat sat on"} for n in range(9) for role in ("user", "assistant")
    ]
    asked = {"messages": [{"role": "system", "content": "Be short."}, *turns, {"role": "user", "content": "last"}]}
    prompt = encode_prompt(CHAT, asked, one, truncate="start")
    said = one.tokenizer.decode(prompt.ids.tolist())
    assert said.startswith("system\nBe short.") and said.endswith("last\nassistant\n") and prompt.truncated > 60
    with pytest.raises(OpenM6Error, match="model takes 60"):
        encode_prompt(CHAT, asked, one)


def test_reasoning_is_kept_apart_and_constrained_answers_come_after_it() -> None:
    one = PROCESSORS["reasoning"]
    chat, tokenizer = one.chat, one.tokenizer
    assert chat is not None and not chat.keeps_turns and ours("chatml")[0].keeps_turns
    ids = tokenizer.encode("<think>\nthe cat\n</think>\n\nyes")
    thought, rest = chat.split_reasoning(ids, tokenizer)
    assert (thought, tokenizer.decode(rest)) == ("the cat", "yes")
    assert chat.split_reasoning(tokenizer.encode("yes"), tokenizer) == ("", tokenizer.encode("yes"))
    assert chat.split_reasoning(tokenizer.encode("<think>\nthe"), tokenizer) == ("the", [])
    task = Task.from_instruction("[text:text] -> [label:label|set=yes,no]")
    prompt = encode_prompt(task, {"text": "a"}, one, thinking=True)
    shut = encode_prompt(task, {"text": "a"}, one)
    assert "</think>" in tokenizer.decode(shut.ids.tolist()) and "</think>" not in tokenizer.decode(prompt.ids.tolist())
    assert prompt.constraint is not None and shut.constraint is not None
    before = tokenizer.encode("<think>\nthe cat\n</think>\n\n")
    starts = {tokenizer.encode(label)[0] for label in ("yes", "no")}
    assert set(prompt.constraint.next(before)) == set(shut.constraint.next([])) == starts
    assert task.value([*before, *tokenizer.encode("no")], one) == "no"


def test_a_reasoned_answer_is_learned_with_its_reasoning() -> None:
    one = PROCESSORS["reasoning"]
    answer = {"role": "assistant", "content": "yes", "reasoning_content": "the cat"}
    record = {"messages": [{"role": "user", "content": "a"}], "answer": "yes", "_answer": answer}
    example = encode_example(CHAT, record, one)
    said = one.tokenizer.decode(example.labels[example.labels != IGNORE].tolist())
    assert said == "<think>\nthe cat\n</think>\n\nyes"


def test_a_bidirectional_source_learns_the_last_answer_alone() -> None:
    one = processor("chatml", source="bidirectional")
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    example = encode_example(CHAT, {"messages": turns, "answer": "the dog"}, one)
    assert one.tokenizer.decode(example.labels[example.labels != IGNORE].tolist()) == "the dog"
    first = int(np.flatnonzero(example.labels != IGNORE)[0])
    assert (example.blocks[:first] == 0).all() and (example.blocks[first:] == CAUSAL).all()


BAD = [
    ({"messages": []}, "has to be messages"),
    ({"messages": [{"role": "judge", "content": "a"}]}, "message 1 has the role 'judge'; there are: system, user"),
    ({"messages": [{"role": "user", "content": ""}]}, "message 1 is empty"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "has a part that is neither"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "can only be the first"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_what_is_no_conversation_is_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_prompt(CHAT, record, PROCESSORS["chatml"])


def test_what_a_template_refuses_is_told_in_its_words() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(DataError, match=r"^The model's chat template refuses the messages: Roles have to alternate\."):
        encode_prompt(CHAT, {"messages": turns}, PROCESSORS["brackets"])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "takes longer than 0.2 s",
        ),
        ("{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "writes more than"),
        ("{{ messages.pop() }}", "refuses the messages"),
        ("{{ messages.__class__.__mro__ }}", "refuses the messages"),
        ("{{ nothing.at.all }}", "refuses the messages"),
        (
            "{% set ns = namespace(s='x') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "MiB of memory",
        ),
    ],
)
def test_a_template_is_bounded(template: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openm6.tasks.sandbox.SECONDS", 0.2 if "longer" in message else SECONDS)
    with pytest.raises(DataError, match=message):
        ChatFormat(template).render([{"role": "user", "content": "a"}])


def test_a_damaged_template_is_told() -> None:
    with pytest.raises(OpenM6Error, match="The chat template is damaged"):
        ChatFormat("{% for %}").render([{"role": "user", "content": "a"}])


def test_a_template_that_does_not_end_an_answer_is_refused() -> None:
    chat = ChatFormat("{% for m in messages %}{{ m.content }} {% endfor %}")
    with pytest.raises(UsageError, match="writes no special token after an answer"):
        end_of(chat, ["<|im_end|>"])
    assert [end_of(ours(name)[0], family.special) for name, family in FAMILIES.items()] == [
        family.ends[0] for family in FAMILIES.values()
    ]


def test_sampling_is_that_of_the_generation_config() -> None:
    assert sampling_of({}) == {}
    assert sampling_of({"do_sample": True, "temperature": 0.6}) == {"temperature": 0.6, "top_k": 50, "top_p": 1.0}
    assert sampling_of({"repetition_penalty": 1.1}) == {"repetition_penalty": 1.1}


def test_the_answer_of_a_conversation_in_our_own_form(tokenizer: Tokenizer) -> None:
    """Turns stand as few-shot examples do."""
    turns = [
        {"role": r, "content": c} for r, c in (("system", "左"), ("user", "红"), ("assistant", "黄"), ("user", "蓝"))
    ]
    for source in ("bidirectional", "causal"):
        one = Processor(tokenizer, ImageGrid(8, 16), 64, source=source)
        example = encode_example(CHAT, {"messages": turns, "answer": "绿"}, one)
        ids = [tokenizer.encode(text)[0] for text in "左红黄蓝绿"]
        t = tokenizer
        assert example.ids.tolist() == [
            ids[0],
            t.row_id,
            ids[1],
            t.answer_id,
            ids[2],
            t.end_id,
            ids[3],
            t.answer_id,
            ids[4],
        ]
        earlier = [ids[2], t.end_id] if source == "causal" else []
        assert example.labels[example.labels != IGNORE].tolist() == [*earlier, ids[4], t.end_id]
        prompt = encode_prompt(CHAT, {"messages": turns}, one)
        assert prompt.ids.tolist() == example.ids.tolist()[:-1]


def test_a_piece_of_ids_passes_through() -> None:
    chat, tokenizer = ours("chatml")
    pieces = chat.lay_out([{"role": "user", "content": ["a", Piece((tokenizer.image_id, 5))]}], tokenizer)
    assert (tokenizer.image_id, 5) in [tuple(piece.ids) for piece in pieces]
    assert re.search("user", tokenizer.decode([i for piece in pieces for i in piece.ids]))


@pytest.mark.parametrize("name", FAMILIES)
def test_without_transformers_a_template_writes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an edge device."""
    messages = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", " 你好 "))]
    expected = ours(name)[0].render(messages, is_open=True)
    compiled_template.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers.utils.chat_template_utils", None)
    assert ours(name)[0].render(messages, is_open=True) == expected
    with pytest.raises(DataError, match="refuses the messages"):
        ChatFormat("{{ messages.__class__.__mro__ }}").render(messages)
    compiled_template.cache_clear()


def test_lines_of_an_instruction(tokenizer: Tokenizer) -> None:
    """A text, a table or triples outside of a group begin and end lines where the instruction has blanks; all else runs
    on as it is written."""
    one = PROCESSORS["chatml"]
    task = get("product_copy_en")
    record = {"attributes": {"colour": "red"}, "style": "playful"}
    said = one.tokenizer.decode(encode_prompt(task, record, one).ids.tolist())
    assert "Write a short product description from these attributes. Style: playful.\n{" in said
    said = one.tokenizer.decode(encode_prompt(get("reading_en"), get("reading_en").example, one).ids.tolist())
    assert said.count("\n") > 4
    poem = Task.from_instruction("以[text:theme]为题写一首[text:form]。 -> [text:poem]")
    said = one.tokenizer.decode(encode_prompt(poem, {"theme": "春", "form": "诗"}, one).ids.tolist())
    assert "以春为题写一首诗。" in said
