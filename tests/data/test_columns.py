from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from openm6.core.errors import DataError, UsageError
from openm6.data.columns import SlotView, map_columns
from openm6.data.store import ListRecords
from tests.data.conftest import NumberTask, number_slot

VQA = NumberTask(
    "vqa",
    slots={
        "photo": number_slot("photo", "image"),
        "question": number_slot("question", "text"),
        "answer": number_slot("answer", "text"),
    },
    inputs=("photo", "question"),
    outputs=("answer",),
    aliases={"question": ("ask",)},
)
CAPTION = NumberTask(
    "caption",
    slots={"photo": number_slot("photo", "image"), "caption": number_slot("caption", "text")},
    inputs=("photo",),
    outputs=("caption",),
)


def test_the_users_word_comes_first_then_the_name_then_aliases() -> None:
    assert map_columns(VQA, ["photo", "question", "answer"], {}) == {
        "photo": "photo",
        "question": "question",
        "answer": "answer",
    }
    assert map_columns(VQA, ["img", "ask", "answers"], {}) == {"photo": "img", "question": "ask", "answer": "answers"}
    assert map_columns(VQA, ["image", "q1", "question", "answer"], {"question": "q1"})["question"] == "q1"
    assert map_columns(CAPTION, ["image", "text"], {}) == {"photo": "image", "caption": "text"}


def test_the_only_column_of_a_type_is_taken_and_of_two_none() -> None:
    rows = [{"文件": "a.JPG", "说明": ["一", "二"], "n": 3}]
    assert map_columns(CAPTION, ["文件", "说明", "n"], {}, rows) == {"photo": "文件", "caption": "说明"}
    with pytest.raises(UsageError, match=r"needs caption \(\[text:caption\]\).*文件, 甲, 乙.*columns: \{caption:"):
        map_columns(CAPTION, ["文件", "甲", "乙"], {}, [{"文件": b"x", "甲": "一", "乙": "二"}])


def test_a_slot_that_may_be_dropped_needs_no_column() -> None:
    slots = {"hint": number_slot("hint", "text", drop=0.5), "caption": number_slot("caption", "text")}
    task = NumberTask("hinted", slots=slots, inputs=("hint",))
    assert map_columns(task, ["caption"], {}) == {"caption": "caption"}
    assert map_columns(task, ["caption", "hint"], {}) == {"hint": "hint", "caption": "caption"}


def test_a_slot_in_a_group_takes_a_column_by_its_name_alone() -> None:
    """An optional style does not make the one text of a table unclear, nor take it."""
    style = replace(number_slot("style", "text", 0.5), before="风格:")
    task = NumberTask("styled", slots={"style": style, "copy": number_slot("copy", "text")}, inputs=("style",))
    assert map_columns(task, ["文案"], {}, [{"文案": "好看"}]) == {"copy": "文案"}
    assert map_columns(task, ["copy", "备注"], {}, [{"copy": "好看", "备注": "急"}]) == {"copy": "copy"}
    assert map_columns(task, ["copy", "style"], {}) == {"style": "style", "copy": "copy"}


def test_wrong_mappings_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r'no slot \'foto\'\. Did you mean "photo"'):
        map_columns(VQA, ["image"], {"foto": "image"})
    with pytest.raises(UsageError, match=r'no column \'imag\'\. Did you mean "image"'):
        map_columns(VQA, ["image"], {"photo": "imag"})


def test_of_several_texts_one_is_drawn_in_training_and_all_are_kept_for_evaluation() -> None:
    records = ListRecords([{"image": "a.jpg", "text": ["一", "二", "三"], "kind": "x"}])
    view = SlotView.of(CAPTION, records, {})
    drawn = {view(records[0], np.random.default_rng(seed))["caption"] for seed in range(40)}
    assert drawn == {"一", "二", "三"}
    assert view(records[0])["caption"] == ["一", "二", "三"]
    assert view(records[0])["kind"] == "x"


def test_an_input_with_several_texts_takes_the_first_without_a_draw() -> None:
    records = ListRecords([{"photo": "a.jpg", "question": ["一?", "二?"], "answer": 3}])
    seen = SlotView.of(VQA, records, {})(records[0])
    assert (seen["question"], seen["answer"]) == ("一?", "3")


def test_a_missing_or_empty_value_is_left_out() -> None:
    records = ListRecords([{"photo": "a.jpg", "question": None, "answer": []}])
    seen = SlotView.of(VQA, records, {})(records[0])
    assert "question" not in seen
    assert "answer" not in seen


def test_picture_paths_are_completed_and_absolute_ones_kept() -> None:
    records = ListRecords(
        [
            {"photo": "a.jpg", "caption": "一", "_root": "/data"},
            {"photo": "/else/b.jpg", "caption": "二", "_root": "/data"},
        ]
    )
    view = SlotView.of(CAPTION, records, {})
    assert [view(r)["photo"] for r in (records[0], records[1])] == [str(Path("/data/a.jpg")), "/else/b.jpg"]


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/a.jpg",
        "https://other.org/a.jpg",
        "https://cdn.org/pictures/../a.jpg",
        "file:///etc/passwd",
    ],
)
@pytest.mark.parametrize("root", ["", "/data", "https://cdn.org/pictures"])
def test_a_picture_elsewhere_is_not_fetched(url: str, root: str) -> None:
    records = ListRecords([{"photo": url, "caption": "一", "_root": root}])
    with pytest.raises(DataError, match="is elsewhere"):
        SlotView.of(CAPTION, records, {})(records[0])


REVIEW = NumberTask(
    "review",
    slots={"text": number_slot("text", "text"), "label": number_slot("label", "label")},
    inputs=("text",),
    outputs=("label",),
)


@pytest.mark.parametrize("name", ["id", "image_id", "itemId", "key", "row_index", "商品编号", "picture_url"])
def test_a_column_with_a_keys_name_is_not_guessed(name: str) -> None:
    rows = [{"image": "a.jpg", name: "一只猫"}, {"image": "b.jpg", name: "一只狗"}]
    with pytest.raises(UsageError, match=rf"{name} looks like a key.*-c caption=COLUMN"):
        map_columns(CAPTION, ["image", name], {}, rows)


@pytest.mark.parametrize("values", [["0001", "0002"], ["3fa9b1", "bbe004"], ["a-17", "a-18"], ["x.txt", "y.txt"]])
def test_a_column_of_unique_codes_is_not_guessed(values: list[str]) -> None:
    with pytest.raises(UsageError, match="looks like a key"):
        map_columns(CAPTION, ["image", "甲"], {}, [{"image": "a.jpg", "甲": v} for v in values])
    # Numbers that come again are classes.
    rows = [{"image": "a.jpg", "甲": "0"}, {"image": "b.jpg", "甲": "1"}, {"image": "b.jpg", "甲": "1"}]
    assert map_columns(CAPTION, ["image", "甲"], {}, rows)["caption"] == "甲"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("split", ["train", "validation", "train"]),
        ("语言", ["zh", "en", "zh"]),
        ("来源", ["淘宝", "微博", "淘宝"]),
        ("时间", ["2026-01-02 10:30:00", "2026-01-02T10:31:00", "2026-01-03 08:00"]),
    ],
)
def test_what_says_where_a_record_is_from_is_not_guessed(name: str, values: list[str]) -> None:
    rows = [{"image": f"{i}.jpg", "text": f"好{i}", name: value} for i, value in enumerate(values)]
    with pytest.raises(UsageError, match=rf"needs caption .*none of .*{name}"):
        map_columns(CAPTION, ["image", name], {}, rows)
    with pytest.raises(UsageError, match=rf"needs label .*none of .*{name}"):
        map_columns(REVIEW, ["text", name], {}, rows)
    assert map_columns(CAPTION, ["image", name], {"caption": name}, rows)["caption"] == name


def test_a_text_that_is_the_same_in_all_records_is_not_guessed_as_their_answer() -> None:
    rows = [{"image": f"{i}.jpg", "甲": "coco"} for i in range(3)]
    with pytest.raises(UsageError, match=r"needs caption .*甲 is the likeliest.*-c 'caption=甲'"):
        map_columns(CAPTION, ["image", "甲"], {}, rows)
    # Classes may stand in the data one after the other.
    assert map_columns(REVIEW, ["text", "sentiment"], {}, [{"text": i, "sentiment": "好"} for i in "甲乙"])


def test_beside_a_key_the_only_text_is_taken() -> None:
    rows = [{"image": "a.jpg", "编号": "0001", "说明": "一只猫"}]
    assert map_columns(CAPTION, ["编号", "image", "说明"], {}, rows)["caption"] == "说明"


def test_a_column_known_as_something_else_is_not_guessed_but_advised() -> None:
    rows = [{"image": "a.jpg", "question": "是什么?"}]
    with pytest.raises(UsageError, match=r"question is the likeliest.*-c photo=image -c caption=question"):
        map_columns(CAPTION, ["image", "question"], {"photo": "image"}, rows)


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["评论", "情感"], {"text": "评论", "label": "情感"}),
        (["标签", "内容"], {"text": "内容", "label": "标签"}),
        (["评论", "评价"], {"text": "评论", "label": "评价"}),
        (["标题", "正文", "类别"], {"text": "正文", "label": "类别"}),
        (["Text", " Label "], {"text": "Text", "label": " Label "}),
    ],
)
def test_usual_names_of_columns_are_known(columns: list[str], found: dict[str, str]) -> None:
    assert map_columns(REVIEW, columns, {}) == found
    assert map_columns(VQA, ["图片", "问题", "回答"], {}) == {"photo": "图片", "question": "问题", "answer": "回答"}
    assert map_columns(CAPTION, ["图片", "名称"], {}) == {"photo": "图片", "caption": "名称"}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["评论", "内容", "标签"], "内容, 评论 are as likely"),
        (["标题", "描述", "标签"], "描述, 标题 are as likely"),
        (["评价", "评分"], "评价 is the likeliest"),  # it may be the text or the label
    ],
)
def test_of_two_that_are_as_likely_none_is_taken(columns: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=f"needs text .*{said}"):
        map_columns(REVIEW, columns, {})


def test_a_long_name_does_not_flood_the_message() -> None:
    with pytest.raises(UsageError) as caught:
        map_columns(CAPTION, ["a" * 5000, "b"], {})
    assert len(str(caught.value)) < 500


def test_a_picture_as_a_list_of_one_is_taken_and_one_of_several_refused() -> None:
    records = ListRecords([{"photo": ["a.jpg"], "caption": "一"}, {"photo": ["a.jpg", "b.jpg"], "caption": "二"}])
    view = SlotView.of(CAPTION, records)
    assert view(records[0])["photo"] == "a.jpg"
    with pytest.raises(DataError, match="holds a list of 2 pictures where the task reads one"):
        view(records[1])
    assert view({"photo": [3, 5, 9], "caption": "三"})["photo"] == [3, 5, 9]  # a picture's codes
