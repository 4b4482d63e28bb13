import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from openm6.core.errors import DataError, UsageError
from openm6.core.images import MAX_BYTES
from openm6.data.readers import FORMATS, format_of, read, with_options
from openm6.data.rejects import Reject
from openm6.data.source import open_source
from openm6.data.store import Record
from tests.data.conftest import picture_bytes


def load(source: Any, format: str | None = None, images_root: str | None = None) -> tuple[list[Record], list[Reject]]:
    rejected: list[Reject] = []
    return list(read(source, format, images_root, rejected.append)), rejected


def plain(record: Record) -> Record:
    return {key: value for key, value in record.items() if not key.startswith("_")}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def write_json(path: Path, content: Any) -> Path:
    return write(path, json.dumps(content, ensure_ascii=False))


def test_json_lines_carry_their_place_and_bad_ones_are_rejected_with_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "一"}\n\n{"text": \n[1]\n{"text": "二"}\n')
    records, rejected = load(path)
    assert [plain(r) for r in records] == [{"text": "一"}, {"text": "二"}]
    assert [r["_where"] for r in records] == [f"{path}:1", f"{path}:5"]
    assert [r.where for r in rejected] == [f"{path}:3", f"{path}:4"]
    assert "not valid JSON" in rejected[0].reason


def test_a_line_that_is_not_utf8_is_rejected_and_the_others_stay(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "好"}\n'.encode() + '{"text": "坏"}\n'.encode("gbk"))
    records, rejected = load(tmp_path / "a.jsonl")
    assert len(records) == 1
    assert "UTF-8" in rejected[0].reason


def test_a_text_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff一条红裙子\r\n\n  二 \n".encode() + "坏".encode("gbk") + "\n三".encode())
    records, rejected = load(path)
    assert [plain(r) for r in records] == [{"text": "一条红裙子"}, {"text": "二"}, {"text": "三"}]
    assert [r["_where"] for r in records] == [f"{path}:1", f"{path}:3", f"{path}:5"]
    assert [r.where for r in rejected] == [f"{path}:4"]
    path.write_bytes("一條紅裙子\n".encode("big5"))
    assert load(path, "?encoding=big5")[0][0]["text"] == "一條紅裙子"


def test_a_json_list(tmp_path: Path) -> None:
    records, _ = load(write_json(tmp_path / "a.json", [{"image": "x.jpg", "text": "一"}]))
    assert plain(records[0]) == {"image": "x.jpg", "text": "一"}
    assert records[0]["_root"] == str(tmp_path)


def test_a_plain_list_of_records() -> None:
    records, _ = load([{"image": "x.jpg", "text": "一"}])
    assert plain(records[0]) == {"image": "x.jpg", "text": "一"}
    assert records[0]["_where"] == "record 0"


def test_json_that_is_cut_off_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json:2"):
        load(write(tmp_path / "a.json", '[{"a": 1},\n{"a": '))


def test_csv_with_quotes_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffimage,text\na.jpg,"一,二"\n')
    assert plain(load(path)[0][0]) == {"image": "a.jpg", "text": "一,二"}


def test_a_tsv_line_with_a_missing_field_is_rejected_by_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'image\ttext\nx.jpg\t一"\nb.jpg\nc.jpg\t三\t多\n')
    records, rejected = load(path)
    assert [plain(r) for r in records] == [{"image": "x.jpg", "text": '一"'}]
    assert [r.where for r in rejected] == [f"{path}:3", f"{path}:4"]
    assert rejected[0].reason == f"{path}:3 has 1 fields where the first line names 2 (missing: text)."


REVIEWS = (
    "酒店环境很好,服务也不错,下次还会再来。\n房间太小,隔音差,早餐一般,不推荐入住。\n位置方便,就在地铁旁边,性价比高。\n"
)
KOREAN = "이 제품은 정말 좋아요 배송도 빠르고 마음에 듭니다 다음에도 구매하겠습니다\n" * 3


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "utf-16", "utf-8-sig", "utf-32"])
def test_chinese_text_files_of_excel_are_told_by_themselves(
    tmp_path: Path, encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = REVIEWS.replace(",", "").split("\n")[:-1]
    (tmp_path / "a.csv").write_bytes(
        ("评论,编号\r\n" + "".join(f"{row},{i}\r\n" for i, row in enumerate(rows))).encode(encoding)
    )
    (tmp_path / "a.jsonl").write_bytes(
        "".join(json.dumps({"评论": r}, ensure_ascii=False) + "\n" for r in rows).encode(encoding)
    )
    (tmp_path / "a.json").write_bytes(json.dumps([{"评论": r} for r in rows], ensure_ascii=False).encode(encoding))
    for name in ("a.csv", "a.jsonl", "a.json"):
        assert [r["评论"] for r in load(tmp_path / name)[0]] == rows
    assert ("read as GB18030" in caplog.text) == encoding.startswith("gb")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [(KOREAN, "euc-kr"), (REVIEWS, "big5"), ("これはとても良い商品でした。また買います。" * 9, "shift-jis"),
     ("これはとても良い商品でした。また買います。" * 9, "euc-jp"), ("Crème brûlée, déjà vu, élan\n" * 9, "latin-1"),
     ("Это очень хороший отель, спасибо\n" * 9, "cp1251")],
)  # fmt: skip
def test_what_may_be_another_encoding_is_refused_and_read_when_it_is_named(
    tmp_path: Path, text: str, encoding: str
) -> None:
    text = text.encode(encoding, "ignore").decode(encoding)
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode(encoding))
    with pytest.raises(DataError, match="name its encoding by --encoding"):
        load(path)
    assert load(path, with_options(None, encoding))[0][0]["text"] == text


def test_options_of_a_format(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a.jpg,一\nb.jpg,二\n")
    records, _ = load(path, with_options(None, names="image,text"))
    assert [plain(r) for r in records] == [{"image": "a.jpg", "text": "一"}, {"image": "b.jpg", "text": "二"}]
    assert load(path, "csv?names=image,text")[0] == records
    for format, told in (
        ("csv?name=a", "no option name; it has: encoding, names"), ("muge?names=a", "it has: none"),
        ("csv?names=a,,b", "each once"), ("csv?encoding=klingon", "no encoding 'klingon'"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=told):
            load(path, format)


@pytest.mark.parametrize("separator", [";", "|", "\t"])
def test_other_separators_of_a_csv_are_told_by_its_first_lines(tmp_path: Path, separator: str) -> None:
    rows = [["image", "text"], ["a.jpg", "一,二"], ["b.jpg", "三"]]
    path = write(tmp_path / "a.csv", "".join(separator.join(row) + "\n" for row in rows))
    assert [r["text"] for r in load(path)[0]] == ["一,二", "三"]
    both = write(tmp_path / "b.csv", f"image,text\na.jpg,x{separator}y\nb.jpg,z\n")
    assert load(both)[0][0]["text"] == f"x{separator}y"


CODE = base64.urlsafe_b64encode(picture_bytes(251)).decode()


def test_pictures_in_base64_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    for name, text in (
        ("a.tsv", f"image\ttext\n{CODE}\t一\n"), ("a.csv", f"image,text\n{CODE},一\n"),
        ("a.jsonl", json.dumps({"image": f"data:image/png;base64,{CODE}", "text": "一"})),
        ("a.json", json.dumps([{"image": {"bytes": CODE.rstrip("="), "path": None}, "text": "一"}])),
    ):  # fmt: skip
        assert [plain(r) for r in load(write(tmp_path / name, text))[0]] == [
            {"image": picture_bytes(251), "text": "一"}
        ]
    other = {"text": "0123456789abcdef" * 8, "image": "a/" * 40 + "b"}
    assert plain(load([other])[0][0]) == other


def test_a_table_without_a_header_is_refused_with_what_to_write(tmp_path: Path) -> None:
    for name, row in (
        ("a.tsv", f"1\ta\t{CODE}\n"),
        ("b.csv", "100234,好评\n100235,差评\n"),
        ("c.csv", "好" * 300 + ",1\n"),
    ):
        with pytest.raises(DataError, match=r"--names column1,column2") as told:
            load(write(tmp_path / name, row))
        assert len(str(told.value)) < 500


def test_the_tables_of_ofa(tmp_path: Path) -> None:
    told = {
        f"79\t79\tis it red?\t0.3|!+no&&1.0|!+yes\tcat&&sky\t{CODE}\n": {
            "id": "79", "image_id": "79", "question": "is it red?", "answer": "yes", "answers": ["yes", "no"],
            "objects": ["cat", "sky"], "image": picture_bytes(251),
        },
        f"1\t12\ta sun&&the sun\t\t{CODE}\n": {
            "id": "1", "image_id": "12", "caption": ["a sun", "the sun"], "objects": [], "image": picture_bytes(251),
        },
        f"a#1\t25\t{CODE}\ta man\ta man & a dog\tneutral\n": {
            "id": "a#1", "image_id": "25", "image": picture_bytes(251), "hypothesis": "a man",
            "caption": "a man & a dog", "label": "neutral",
        },
    }  # fmt: skip
    for line, record in told.items():
        assert plain(load(write(tmp_path / "a.tsv", line), "ofa")[0][0]) == record
    with pytest.raises(DataError, match="no picture"):
        load(write(tmp_path / "a.tsv", "a\tb\n"), "ofa")


def test_the_boxes_of_ofa_are_fractions_of_their_picture(tmp_path: Path) -> None:
    with Image.open(io.BytesIO(picture_bytes(251))) as image:
        width, height = image.size
    boxes = (f"0.0,1,{width / 2},{height}", f"0,0,{width + 1},2", "3,0,2,2")
    lines = "".join(f"1\t2\tthe sun\t{box}\t{CODE}\n" for box in boxes)
    records, rejected = load(write(tmp_path / "a.tsv", lines), "ofa")
    assert [(r["phrase"], r["box"]) for r in records] == [("the sun", [0, 1 / height, 0.5, 1])]
    assert [r.where for r in rejected] == [f"{tmp_path / 'a.tsv'}:2", f"{tmp_path / 'a.tsv'}:3"]


def test_json_lines_that_are_named_json_and_endings_in_capitals(tmp_path: Path) -> None:
    lines = '{"text": "一"}\n{bad\n{"text": "二"}\n'
    records, rejected = load(write(tmp_path / "a.json", lines))
    assert ([r["text"] for r in records], len(rejected)) == (["一", "二"], 1)
    assert len(load(write(tmp_path / "A.JSONL", lines))[0]) == 2
    assert len(load(write(tmp_path / "A.CSV", "text\n一\n"))[0]) == 1
    pq.write_table(pa.table({"text": ["一"]}), tmp_path / "A.PARQUET")
    assert len(load(tmp_path / "A.PARQUET")[0]) == 1
    assert len(load(write_tar(tmp_path / "A.TAR", [("1.TXT", b"a")]))[0]) == 1
    assert load(picture_folder(tmp_path / "p", "A.TIFF", "b.JPG"))[1] == []


def test_a_table_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text\n你好\n".encode("gbk"))
    with pytest.raises(DataError, match="not UTF-8"):
        load(tmp_path / "a.csv")


def test_gzip_is_unpacked(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert plain(load(tmp_path / "a.jsonl.gz")[0][0]) == {"text": "a"}


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ('image,text\na.jpg,"open\nb.jpg,fine\nc.jpg,fine\n', ["fine", "fine"], [2]),
        ('image,text\na.jpg,"open\nb.jpg,fine\nc.jpg,"quoted, text"\nd.jpg,"x"\n', ["fine", "quoted, text", "x"], [2]),
        ('image,text\na.jpg,"two\nlines"\nb.jpg,"open\n', ["two\nlines"], [4]),
        ('image,text\na.jpg,"a"b\nb.jpg,"say ""yes"""\n', ['say "yes"'], [2]),
        ('image,text\na.jpg,"back\\"slash"\nb.jpg,13" wide\n', ['13" wide'], [2]),
    ],
)  # fmt: skip
def test_a_quote_that_is_not_closed_costs_its_line_alone(
    tmp_path: Path, text: str, good: list[str], bad: list[int]
) -> None:
    path = write(tmp_path / "a.csv", text)
    records, rejected = load(path)
    assert [r["text"] for r in records] == good
    assert [r.where for r in rejected] == [f"{path}:{line}" for line in bad]
    assert "opens a quote" in rejected[0].reason


def test_a_quote_that_is_not_closed_in_the_first_line_of_a_csv(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv:1 has to name the columns, and opens a quote"):
        load(write(tmp_path / "a.csv", 'image,"text\na.jpg,b\n'))


DEEP = "[" * 5000 + "]" * 5000
FAULTS = [
    ('{"text": "\\ud83d"}', "half a character"), ('{"\\ud83d": 1}', "half a character"),
    ('{"a": [{"b": "x\\udc00"}]}', "half a character"), (f'{{"a": {"9" * 5000}}}', "number of 5000 digits"),
    ('{"a": NaN}', "holds NaN"), ('{"a": -Infinity}', "holds -Infinity"), ('{"a": 1e999}', "too large"),
    ('{"text": "a", "text": "b"}', "names the key 'text' twice"), ('{"a": {"b": 1, "b": 2}}', "twice"),
    (f'{{"a": {"[" * 200 + "]" * 200}}}', "nests more than 100 levels"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), [*FAULTS, (f'{{"a": {DEEP}}}', "nests more than 100 levels")])
def test_a_json_value_that_cannot_be_used_costs_its_line(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "一"}}\n{line}\n{{"text": "\\ud83d\\ude00"}}\n')
    records, rejected = load(path)
    assert [r["text"] for r in records] == ["一", "😀"]
    assert [r.where for r in rejected] == [f"{path}:2"]
    assert reason in rejected[0].reason


@pytest.mark.parametrize(("element", "reason"), FAULTS)
def test_it_costs_an_element_of_a_json_list_and_a_record_of_a_tar(tmp_path: Path, element: str, reason: str) -> None:
    path = write(tmp_path / "a.json", f'[{{"text": "一"}}, {element}, {{"text": "二"}}]')
    records, rejected = load(path)
    assert [r["text"] for r in records] == ["一", "二"]
    assert [r.where for r in rejected] == [f"{path}#1"]
    members = [("1.txt", b"a"), ("1.json", element.encode()), ("1.cls", b"\xff"), ("2.txt", b"b")]
    records, again = load(write_tar(tmp_path / "a.tar", members))
    assert [plain(r) for r in records] == [{"text": "b"}] and len(again) == 1  # half a record is none
    assert reason in rejected[0].reason and reason in again[0].reason
    notes = f'[{element}, {{"image_id": 1, "caption": "一"}}]'
    rows = f'{{"images": [{{"id": 1, "file_name": "a.jpg"}}], "annotations": {notes}}}'
    records, rejected = load(write(tmp_path / "coco.json", rows))
    assert [r["caption"] for r in records] == [["一"]]
    assert reason in rejected[0].reason


def test_an_element_that_nests_too_deeply_costs_itself(tmp_path: Path) -> None:
    good = '{"text": "[}],\\"{"}'
    text = f'\n[{good}, {{"a": {DEEP}}}, {good}, {{"b": [{{"c": 9e999}}]}}\n,{DEEP}, {good}] '
    path = write(tmp_path / "a.json", text)
    records, rejected = load(path)
    assert [r["text"] for r in records] == ['[}],"{'] * 3
    assert [r.where for r in rejected] == [f"{path}#1", f"{path}#3", f"{path}#4"]
    assert ["nests more than 100 levels" in r.reason for r in rejected] == [True, False, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'{{"images": {DEEP}}}', r"a\.json is not valid JSON: it nests more than 100 levels"),
        (f"[1,\n{DEEP}", r"a\.json:2 is not valid JSON"),
        (f"[1,\n{DEEP}}}", r"a\.json:2 is not valid JSON"),
        (f"[{DEEP},\n1 2]", r"a\.json:2 is not valid JSON"),
        (f"[{DEEP}]\n]", r"a\.json:1 is not valid JSON"),
    ],
)
def test_json_that_is_wrong_elsewhere_is_refused_in_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load(write(tmp_path / "a.json", text))


def test_lines_that_end_in_carriage_returns_and_marks_inside_of_files(tmp_path: Path) -> None:
    for end in ("\r", "\r\n"):
        path = tmp_path / "a.jsonl"
        path.write_bytes(f'\ufeff{{"text": "一"}}{end}\ufeff{{"text": "二"}}{end}'.encode())
        assert [(r["text"], r["_where"]) for r in load(path)[0]] == [("一", f"{path}:1"), ("二", f"{path}:2")]
        (tmp_path / "a.csv").write_bytes(f"\ufeffimage,text{end}a.jpg,一{end}b.jpg,二{end}".encode())
        assert [r["text"] for r in load(tmp_path / "a.csv")[0]] == ["一", "二"]


def test_nul_bytes_and_lines_in_another_encoding_cost_a_row_of_a_table(tmp_path: Path) -> None:
    good = "".join(f"{i},好\n" for i in range(5)).encode()
    for name, separator in (("a.csv", b","), ("a.tsv", b"\t")):
        rows = b"id,text\n" + good + b"5,a\0b\n" + "6,坏了\n".encode("gbk") + b"7,end\n"
        (tmp_path / name).write_bytes(rows.replace(b",", separator))
        records, rejected = load(tmp_path / name)
        assert [r["text"] for r in records] == ["好"] * 5 + ["end"]
        assert [r.where for r in rejected] == [f"{tmp_path / name}:7", f"{tmp_path / name}:8"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.JSON.GZ", "a.tar.gz"])
def test_a_gzip_file_that_is_torn_gives_what_is_whole_or_is_refused(tmp_path: Path, name: str) -> None:
    import gzip

    noise = np.random.default_rng(0).integers(0, 10**9, 2000).tolist()
    lines = "".join(f'{{"text": "{n}"}}\n' for n in noise) if "jsonl" in name else "text\n" + "\n".join(map(str, noise))
    content = json.dumps([{"text": n} for n in noise]) if "JSON" in name else lines
    packed = gzip.compress(content.encode())
    if name == "a.tar.gz":
        packed = gzip.compress(
            write_tar(tmp_path / "b.tar", [(f"{n}.txt", str(n).encode()) for n in noise]).read_bytes()
        )
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    if "JSON" in name:
        with pytest.raises(DataError, match="truncated or damaged"):
            load(tmp_path / name)
    else:
        records, rejected = load(tmp_path / name)
        assert 100 < len(records) < 2000
        assert [str(r["text"]) for r in records] == [str(n) for n in noise[: len(records)]]
        assert "truncated or damaged after" in rejected[-1].reason
    (tmp_path / name).write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match="no gzip file|no tar file"):
        load(tmp_path / name)


def test_coco_captions_give_one_record_a_picture(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 1, "caption": "一 "}, {"image_id": 1, "caption": "二"},
            {"image_id": 9, "caption": "三"}, {"image_id": 1},
        ],
    }  # fmt: skip
    records, rejected = load(write_json(tmp_path / "c.json", content), images_root="/pictures")
    assert [plain(r) for r in records] == [{"image": "a.jpg", "caption": ["一", "二"], "image_id": 1}]
    assert records[0]["_root"] == "/pictures"
    assert len(rejected) == 3


def test_vqa_questions_find_their_annotations_and_pictures(tmp_path: Path) -> None:
    questions = {
        "data_subtype": "val2014",
        "questions": [
            {"question_id": 10, "image_id": 42, "question": "什么颜色?"},
            {"question_id": 11, "image_id": 43, "question": "几件?"},
            {"question_id": 12, "image_id": 44, "question": "?"},
        ],
    }
    notes = {
        "annotations": [
            {"question_id": 10, "multiple_choice_answer": "红", "answers": [{"answer": "红"}, {"answer": "粉"}]},
            {"question_id": 11, "answers": [{"answer": "一"}, {"answer": "两"}, {"answer": "两"}]},
        ]
    }
    path = write_json(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", questions)
    write_json(tmp_path / "v2_mscoco_val2014_annotations.json", notes)
    records, rejected = load(path)
    assert [(r["image"], r["answer"]) for r in records] == [
        ("COCO_val2014_000000000042.jpg", "红"),
        ("COCO_val2014_000000000043.jpg", "两"),
    ]
    assert records[0]["answers"] == ["红", "粉"]
    assert "no annotation" in rejected[0].reason


def test_vqa_questions_without_annotations_say_where_to_put_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"my_annotations\.json"):
        load(write_json(tmp_path / "my_questions.json", {"questions": []}))


def muge(folder: Path) -> Path:
    code = base64.b64encode(picture_bytes(1)).decode()
    write(folder / "train_imgs.tsv", f"7\t{code}\n8\t{code}\n9\t???\n10\n11\t{code}\n")
    lines = [
        {"text_id": 1, "text": "红色连衣裙", "image_ids": [7, 8]}, {"text_id": 2, "text": "夏装", "image_ids": [7]},
        {"text_id": 3, "text": "没有图", "image_ids": [99]}, {"text_id": 4},
    ]  # fmt: skip
    return write(folder / "train_texts.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def test_the_layout_of_muge_gives_one_record_a_picture_with_all_its_texts(tmp_path: Path) -> None:
    path = muge(tmp_path)
    for source in (path, tmp_path):
        assert format_of(str(source)) == "muge"
        records, rejected = load(source)
        assert [(r["image_id"], r["text"]) for r in records] == [("7", ["红色连衣裙", "夏装"]), ("8", ["红色连衣裙"])]
        assert records[0]["image"] == picture_bytes(1)
        assert records[0]["_where"] == f"{tmp_path / 'train_imgs.tsv'}:1"
        reasons = " ".join(r.reason for r in rejected)
        for part in (
            "not base64",
            "one field",
            "no text names the picture 11",
            "picture 99",
            "no text or no image_ids",
        ):
            assert part in reasons


def test_an_id_twice_among_the_pictures_of_muge_is_told_as_that(tmp_path: Path) -> None:
    path = muge(tmp_path)
    images = tmp_path / "train_imgs.tsv"
    images.write_text(images.read_text() + f"7\t{base64.b64encode(picture_bytes(2)).decode()}\n")
    records, rejected = load(path)
    assert [r["image_id"] for r in records] == ["7", "8"]
    assert f"{images}:6: the picture 7 stands in {images}:1 already, which is used." in [r.reason for r in rejected]


def test_a_picture_of_muge_that_cannot_be_read_is_not_told_as_missing(tmp_path: Path) -> None:
    path = muge(tmp_path)
    lines = [{"text": "坏的图", "image_ids": [9]}, {"text": "先坏后好", "image_ids": [12]}]
    path.write_text(path.read_text("utf-8") + "".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    images = tmp_path / "train_imgs.tsv"
    images.write_text(images.read_text() + f"12\t???\n12\t{base64.b64encode(picture_bytes(2)).decode()}\n")
    records, rejected = load(path)
    assert [(r["image_id"], r["text"]) for r in records][2:] == [("12", ["先坏后好"])]
    missing = [r.reason for r in rejected if "is not in" in r.reason]
    assert missing == [f"{path}: the picture 99 of its image_ids is not in {images}."]
    assert [r.where for r in rejected if "not base64" in r.reason] == [f"{images}:3", f"{images}:6"]


def test_the_layout_of_muge_for_captions(tmp_path: Path) -> None:
    code = base64.urlsafe_b64encode(picture_bytes(251)).decode()
    write(tmp_path / "IC_train.tsv", f"ab1\t{code}\n")
    path = write(
        tmp_path / "IC_train.jsonl", '{"image_id": "ab1", "text": ["一", "二"]}\n{"image_id": "cd2", "text": "三"}\n'
    )
    for source in (path, tmp_path):
        assert format_of(str(source)) == "muge"
        records, rejected = load(source)
        assert [plain(r) for r in records] == [{"image": picture_bytes(251), "text": ["一", "二"], "image_id": "ab1"}]
        assert "cd2" in rejected[0].reason


def test_parquet_with_bytes_and_with_the_structs_of_hugging_face(tmp_path: Path) -> None:
    rows = {
        "image": [{"bytes": b"abc", "path": None}, {"bytes": None, "path": "x.jpg"}],
        "raw": [b"\x00", b"\x01"],
        "texts": [["一", "二"], ["三"]],
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    for source in (tmp_path / "a.parquet", tmp_path):
        records, _ = load(source)
        assert [plain(r) for r in records] == [
            {"image": b"abc", "raw": b"\x00", "texts": ["一", "二"]},
            {"image": "x.jpg", "raw": b"\x01", "texts": ["三"]},
        ]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_told_with_the_order_of_its_bytes(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\na,b\n".encode(encoding))
    with pytest.raises(DataError, match=f"say so by --encoding {encoding}"):
        load(tmp_path / "a.csv")
    assert len(load(tmp_path / "a.csv", f"?encoding={encoding}")[0]) == 1


def test_a_number_that_pandas_says_is_missing_is_no_value(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1.0, float("nan")]}), tmp_path / "a.parquet")
    assert [r["label"] for r in load(tmp_path / "a.parquet")[0]] == [1.0, None]
    (tmp_path / "a.parquet").rename(tmp_path / "A.PARQUET")
    for place in (tmp_path, tmp_path / "A.PARQUET"):
        assert open_source(place, stream=True)[1]["label"] is None


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="no Parquet file"):
        load(tmp_path / "a.parquet")


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_neighbouring_members_of_a_webdataset_tar_make_a_record(tmp_path: Path) -> None:
    picture = picture_bytes(1)
    path = write_tar(
        tmp_path / "a.tar",
        [("0001.jpg", picture), ("0001.txt", "一".encode()), ("0001.json", b'{"width": 8}'), ("0002.png", picture),
         ("0002.cls", b"5"), ("x/0002.png", picture), ("x/0002.mask.png", b"m")],
    )  # fmt: skip
    records, rejected = load(path)
    assert [plain(r) for r in records] == [
        {"image": picture, "text": "一", "width": 8}, {"image": picture, "label": "5"},
        {"image": picture, "mask": b"m"},
    ]  # fmt: skip
    assert records[0]["_where"] == f"{path}#0001"
    assert rejected == []


def test_what_macos_and_tar_leave_in_archives_and_folders_is_no_data(tmp_path: Path) -> None:
    picture = picture_bytes(1)
    clutter = ["._0001.jpg", "__MACOSX/0001.jpg", "__MACOSX/._0001.jpg", ".DS_Store", "d/.DS_Store",
               "PaxHeader/0001.jpg", "./PaxHeaders.12/0001.jpg"]  # fmt: skip
    members = [(name, b"\0\5\x16\7") for name in clutter] + [
        ("./0001.jpg", picture),
        ("./._0001.txt", b"x"),
        ("./0001.txt", b"a"),
    ]
    records, rejected = load(write_tar(tmp_path / "a.tar", members))
    assert [plain(r) for r in records] == [{"image": picture, "text": "a"}]
    folder = tmp_path / ".hidden" / "d"
    for name, content in members:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    records, more = load(folder)
    assert [plain(r) for r in records] == [{"image": str(folder / "0001.jpg"), "text": "a"}]
    assert rejected == more == []


def test_names_that_lead_out_of_a_tar_write_nothing(tmp_path: Path) -> None:
    inside = tmp_path / "data"
    inside.mkdir()
    members = [("../../escaped.txt", b"a"), ("/tmp/openm6-escaped.txt", b"b"), ("..", b"c")]
    path = write_tar(inside / "a.tar", members)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = set(tmp_path.rglob("*"))
    records, _ = load(path)
    assert set(tmp_path.rglob("*")) == before
    assert not Path("/tmp/openm6-escaped.txt").exists()
    assert not any("root:" in str(r) for r in records)


def test_a_truncated_tar_keeps_the_whole_records_before_the_damage(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.txt", str(i).encode() * 600) for i in range(6)])
    path.write_bytes(path.read_bytes()[: 3 * 1536 + 700])
    records, rejected = load(path)
    assert [r["text"][0] for r in records] == ["0", "1", "2"]
    assert "truncated" in rejected[0].reason
    (tmp_path / "b.tar").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(DataError, match="no tar file"):
        load(tmp_path / "b.tar")


def test_a_member_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.txt", b"a"), ("2.jpg", bytes(MAX_BYTES + 1)), ("3.txt", b"c")])
    records, rejected = load(path)
    assert [r["text"] for r in records] == ["a", "c"]
    assert rejected[0].where == f"{path}#2.jpg"


def picture_folder(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture_bytes(number))
    return folder


def test_a_folder_of_pictures_with_texts_beside_them(tmp_path: Path) -> None:
    picture_folder(tmp_path, "a.png", "b.JPG", "c.png")
    write(tmp_path / "a.txt", "一\n")
    write(tmp_path / "b.txt", "二")
    records, rejected = load(tmp_path)
    assert [plain(r) for r in records] == [
        {"image": str(tmp_path / "a.png"), "text": "一"},
        {"image": str(tmp_path / "b.JPG"), "text": "二"},
    ]
    assert "c.txt" in rejected[0].reason


def test_a_folder_a_label(tmp_path: Path) -> None:
    picture_folder(tmp_path, "cat/a.png", "dog/b.png", ".hidden/c.png", "dog/.d.png")
    assert [r["label"] for r in load(tmp_path)[0] if "hidden" not in r["image"]] == ["cat", "dog"]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_with_metadata(tmp_path: Path, name: str) -> None:
    picture_folder(tmp_path, "a.png", "b.png")
    write(
        tmp_path / name,
        '{"file_name": "a.png", "text": "一"}\n' if name.endswith("l") else "file_name,text\na.png,一\n",
    )
    records, _ = load(tmp_path)
    assert [plain(r) for r in records] == [{"image": "a.png", "text": "一"}]
    assert records[0]["_root"] == str(tmp_path)


def test_an_empty_folder_says_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no pictures"):
        load(tmp_path)


def test_a_glob_reads_its_files_in_order(tmp_path: Path) -> None:
    for name in "ba":
        write(tmp_path / f"{name}.jsonl", json.dumps({"text": name}))
    assert [r["text"] for r in load(str(tmp_path / "*.jsonl"))[0]] == ["a", "b"]


def test_missing_files_and_unknown_formats(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match='Did you mean "jsonl"'):
        load(write(tmp_path / "a.jsonl", ""), "jsonll")
    with pytest.raises(UsageError, match="cannot be told"):
        load(write(tmp_path / "a.xyz", ""))
    assert format_of(str(write(tmp_path / "b.xyz", "")), "tsv") in FORMATS
