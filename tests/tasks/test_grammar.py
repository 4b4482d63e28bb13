"""Instructions read, written, and refused with a mark under the place."""

import inspect
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from openm6.core.errors import UsageError
from openm6.core.tokenizer import Tokenizer
from openm6.tasks.grammar import ATTRIBUTES, RESERVED, Slot, parse, write
from openm6.tasks.library import read_task, task_from_dict
from openm6.tasks.task import Task


def test_an_instruction_has_two_sides_of_texts_and_slots() -> None:
    found = parse("[image:photo] 图中的商品是什么颜色? -> [text:answer]")
    assert found.source == (Slot("image", "photo"), "图中的商品是什么颜色?")
    assert found.target == (Slot("text", "answer"),)
    assert found.text == "[image:photo] 图中的商品是什么颜色? -> [text:answer]"


def test_a_slot_without_a_name_is_called_by_its_type() -> None:
    assert parse("[image] -> [text]").source == (Slot("image", "image"),)


def test_an_empty_left_side_and_touching_slots() -> None:
    assert parse("->[text]").source == ()
    assert parse("[image:a][image:b]->[text]").source == (Slot("image", "a"), Slot("image", "b"))


def test_plain_text_stands_on_both_sides_and_brackets_are_doubled() -> None:
    found = parse("见[[注1] 与[[[text:a] -> 颜色是[label:b]。")
    assert found.source == ("见[注1] 与[", Slot("text", "a"))
    assert found.target == ("颜色是", Slot("label", "b"), "。")


def test_attributes() -> None:
    found = parse("[text:a|mask=0.15|drop=0.1] [text:b|prefix] -> [label:c|set=红色, 蓝色] [text:a]")
    assert found.source == (Slot("text", "a", mask=0.15, drop=0.1), Slot("text", "b", prefix=True))
    assert found.target[0] == Slot("label", "c", labels=("红色", "蓝色"))
    assert parse("[text:a] -> [text:b|verse=a]").target == (Slot("text", "b", verse="a"),)


def test_all_types_are_known() -> None:
    for kind in ATTRIBUTES.keys() - {"choices"}:
        assert parse(f"[{kind}:x] -> [text]").source == (Slot(kind, "x"),)
    assert parse("[choices:x|of=label] -> [label]").source == (Slot("choices", "x", of="label"),)


def test_a_group_goes_with_its_slot() -> None:
    found = parse("写一句。{风格: [text:style|drop=0.5]。} {[choices|of=kind] 之一} 完 -> [label:kind]")
    style = Slot("text", "style", drop=0.5, before="风格:", after="。")
    assert found.source == ("写一句。", style, Slot("choices", "choices", of="kind", after="之一"), "完")
    assert style.is_optional and style.is_grouped and not Slot("text", "style").is_optional
    assert parse("{[text:a|drop=1]} -> [text]").source == (Slot("text", "a", drop=1),)


def test_braces_are_doubled() -> None:
    found = parse("以 {{名}} 开头{ {{注: [text:a|drop=1]}}} -> [text:b]{{")
    assert found.source == ("以 {名} 开头", Slot("text", "a", drop=1, before="{注:", after="}"))
    assert found.target == (Slot("text", "b"), "{")


def test_blanks_belong_to_a_text_that_is_not_chinese() -> None:
    """One, where the line has any, and never at the ends of a side: what is dropped leaves no two of them."""
    found = parse(
        "  Sell it.  { Style: [text:style|drop=0.5].}{ Use[text:size|drop=1] words.} Text:  [text:a]!  -> Say: [text]"
    )
    assert found.source == (
        "Sell it.", Slot("text", "style", drop=0.5, before=" Style: ", after="."),
        Slot("text", "size", drop=1, before=" Use", after=" words."), " Text: ", Slot("text", "a"), "!",
    )  # fmt: skip
    assert found.target == ("Say:", Slot("text", "text"))
    assert parse("看 [image] 说 [text:a] -> [text]").source[::2] == ("看", "说")


@pytest.mark.parametrize(
    ("text", "column", "problem"),
    [
        ("[imge:photo] -> [text]", 2, r'no slot type \'imge\'\. Did you mean "image"'),
        ("[text:b|msk=1] -> [text]", 9, r'no attribute \'msk\'\. Did you mean "mask"'),
        ("[image:b|mask=1] -> [text]", 10, "can have: drop"),
        ("[text:a|mask=2] -> [text:a]", 14, "fraction above 0"),
        ("[text:a|mask] -> [text:a]", 14, "fraction above 0"),
        ("[text:a|drop=nan] -> [text]", 14, "fraction above 0"),
        ("[text:a|prefix=1] -> [text:a]", 15, "takes no value"),
        ("[text:a|mask=0.1|mask=0.2] -> [text:a]", 18, "given twice"),
        ("[text:a|mask=0.1|prefix] -> [text:a]", 2, "exclude"),
        ("[label:a|set=x,,y] -> [text]", 10, "different labels"),
        ("[label:a|set=x,x] -> [text]", 10, "different labels"),
        ("图中 [image:a -> [text]", 4, "not closed"),
        ("[image:[text]] -> [text]", 1, "not closed"),
        ("abc", 4, "no `->`"),
        ("a -> b -> [text]", 8, "second `->`"),
        ("[image] -> 红", 13, "no slot"),
        ("[image] ->", 11, "no slot"),
        ("[text] [text] -> [label]", 8, "called text"),
        ("[text:1a] -> [label]", 7, "cannot name"),
        ("[text:] -> [label]", 7, "cannot name"),
        ("[text:_where] -> [label]", 7, "cannot name"),
        ("[text:task] -> [label]", 7, "reserved"),
        ("[text:examples] -> [label]", 7, "reserved"),
        ("[text:a] -> [text:a|mask=0.1]", 13, "on the left"),
        ("[label:x] -> [text:x]", 1, "label here and text there"),
        ("[] -> [text]", 2, "no slot type"),
        ("[text:a] -> [text:b|verse=c]", 13, "names no slot"),
        ("[text:a|verse=a] -> [text:b]", 1, "on the right"),
        ("写 {风格 [text:a|drop=1] -> [text:b]", 3, "`{` is not closed; a literal one is written `{{`"),
        ("写 [text:a]} -> [text:b]", 11, "`}` closes no group; a literal one is written `}}`"),
        ("写 {风格} -> [text:b]", 3, "holds one slot, with `drop` or of choices; this has none"),
        ("{风格 [text:a]} -> [text:b]", 5, "this is a slot that is always there"),
        ("{[text:a|drop=1] 与 [text:c|drop=1]} -> [text:b]", 20, "this is a second slot"),
        ("{a {b [text:a|drop=1]}} -> [text:b]", 4, "A group holds no group; a literal brace is written `{{`"),
        ("[text:a] -> {风格 [text:b]}", 13, "A group belongs on the left"),
        ("[choices] -> [label]", 1, r"as in \[choices|of=label\]"),
        ("[choices|of=b] -> [text:b] [label:c]", 1, r"as in \[choices|of=c\]"),
        ("[text] -> [label] [choices|of=label]", 19, "they belong on the left"),
        ("[text|of=label] -> [label]", 7, "no attribute 'of'"),
    ],
)
def test_mistakes_are_shown_at_their_column(text: str, column: int, problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        parse(text)
    first, shown, mark = str(caught.value).split("\n")
    assert first.endswith(f"(column {column}).") and shown == f"  {text}" and len(mark) == 2 + column


def test_no_slot_is_called_as_a_parameter_of_the_methods_that_take_slots_by_keyword() -> None:
    from openm6.client import AsyncClient, Client
    from openm6.edge.runner import EdgeModel
    from openm6.inference.session import Session

    found = set()
    for kind in (Session, Client, AsyncClient, EdgeModel):
        for _, method in inspect.getmembers(kind, inspect.isfunction):
            parameters = inspect.signature(method).parameters
            if any(p.name == "slots" and p.kind is p.VAR_KEYWORD for p in parameters.values()):
                found |= parameters.keys() - {"slots"}
    assert found == RESERVED


def test_the_mark_stands_under_wide_characters() -> None:
    with pytest.raises(UsageError) as caught:
        parse("图a [x] -> [text]")
    assert str(caught.value).split("\n")[2] == "  \u3000   ^"


def _with_blanks(text: str, left: str, right: str) -> str:
    """With the blanks that are part of a text: of one that has letters, none of them Chinese."""
    wide = any(unicodedata.east_asian_width(c) in "WF" for c in text)
    return text if wide or not any(map(str.isalpha, text)) else left + text + right


names = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True).filter(lambda n: n not in RESERVED)
plain = (
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
    .map(str.strip)
    .filter(lambda t: t and "->" not in t and t[0] not in "{}")
)
blanks = st.sampled_from(["", " "])
shares = st.sampled_from([0.0, 0.1, 0.15, 1.0, 1e-05])
labels = st.lists(st.sampled_from(["红色", "7", "a b", "好:评"]), unique=True).map(tuple)
sources = st.one_of(
    st.builds(Slot, st.just("text"), names, shares, st.just(False), shares),
    st.builds(Slot, st.just("text"), names, st.just(0.0), st.booleans(), shares),
    st.builds(Slot, st.just("label"), names, st.just(0.0), st.just(False), shares, labels),
    st.builds(Slot, st.sampled_from(["image", "table", "box", "vector"]), names),
    st.builds(
        Slot, st.sampled_from(["text", "image"]), names, drop=st.sampled_from([0.5, 1.0]),
        before=st.just("") | st.builds(_with_blanks, plain, blanks, blanks),
        after=st.just("") | st.builds(_with_blanks, plain, blanks, st.just("")),
    ),
)  # fmt: skip
targets = st.one_of(
    st.builds(Slot, st.sampled_from(sorted(ATTRIBUTES.keys() - {"choices"})), names),
    st.builds(Slot, st.just("label"), names, labels=labels),
)


def _side(parts: list) -> tuple:
    """No two texts beside each other, no name twice, no blank at the ends or before a group."""
    side: list = []
    for part in parts:
        if isinstance(part, str) and side and isinstance(side[-1], str):
            continue
        if isinstance(part, Slot) and any(isinstance(p, Slot) and p.name == part.name for p in side):
            continue
        side.append(part)
    for place, part in enumerate(side):
        if isinstance(part, str):
            following = side[place + 1] if place + 1 < len(side) else None
            part = part if place else part.lstrip()
            side[place] = part.rstrip() if following is None or following.is_grouped else part
        elif not place:
            side[0] = replace(part, before=part.before.lstrip())
    return tuple(side)


left = st.builds(_with_blanks, plain, blanks, blanks)


@given(st.lists(left | sources, max_size=6).map(_side), st.lists(plain | targets, max_size=5).map(_side))
def test_what_is_written_is_read_back(source: tuple, target: tuple) -> None:
    slots = [p for p in target if isinstance(p, Slot)]
    types = {p.name: p.type for p in slots}
    if not slots or any(isinstance(p, Slot) and types.get(p.name, p.type) != p.type for p in source):
        return
    found = parse(write(source, target))
    assert (found.source, found.target) == (source, target)


@given(st.text(st.sampled_from("[]|:=->,图 textlabmsk.1{}"), max_size=40))
def test_nonsense_is_read_or_refused_but_never_fails(text: str) -> None:
    try:
        found = parse(text)
    except UsageError:
        return
    again = parse(write(found.source, found.target))
    assert (again.source, again.target) == (found.source, found.target)


def test_full_width_punctuation_makes_the_same_task(tmp_path: Path) -> None:
    """But a trained model's own instruction stays as it was taught, and so do the texts of records."""
    wide, narrow = "[text:a] 对吗？（是：否） -> 答：[text:b]，好。", "[text:a] 对吗?(是:否) -> 答:[text:b]，好。"
    assert Task.from_instruction(wide) == Task.from_instruction(narrow)
    (tmp_path / "t.yaml").write_text(f"instruction: '{wide}'")
    assert read_task(tmp_path / "t.yaml").instructions[0].text == narrow
    (tmp_path / "t.yaml").write_text(f"instructions: ['{wide}']")
    assert read_task(tmp_path / "t.yaml").instructions[0].text == narrow
    assert task_from_dict({"name": "t", "instructions": [wide]}).instructions[0].text == wide
    tokenizer = Tokenizer.train(["对吗？对吗?"], 300)
    assert tokenizer.encode("对吗？") != tokenizer.encode("对吗?")
