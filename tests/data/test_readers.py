import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openm6.data.readers import FORMATS, format_of, read
from openm6.data.rejects import Reject
from openm6.data.store import Record
from openm6.errors import DataError, UsageError
from openm6.images import MAX_BYTES
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


def test_a_table_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text\n你好\n".encode("gbk"))
    with pytest.raises(DataError, match="not UTF-8"):
        load(tmp_path / "a.csv")


def test_gzip_is_unpacked(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert plain(load(tmp_path / "a.jsonl.gz")[0][0]) == {"text": "a"}


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
