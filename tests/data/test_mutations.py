"""Good files of every format, damaged at random: no traceback, and no other record than the damaged one is lost."""

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openm6.core.errors import OpenM6Error
from openm6.core.images import open_image
from openm6.data.rejects import Reject
from openm6.data.source import open_source
from openm6.data.store import Record
from tests.data.conftest import picture_bytes

TEXTS = ("这条连衣裙很好看,面料也舒服", '他说"还不错",就是有点贵', "颜色和图片上的一样,喜欢", "尺码偏小,建议买大一号")
ROWS = [{"id": f"r{i}", "text": f"{TEXTS[i % 4]} {i}", "label": "好评" if i % 3 else "差评"} for i in range(30)]
CODE = base64.b64encode(picture_bytes(1)).decode()
SEEDS = 19


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if '"' in text or "," in text else text


def table(columns: list[str], separator: str, cell: Callable[[str], str] = str) -> str:
    rows = [columns, *([cell(row[name]) for name in columns] for row in ROWS)]
    return "".join(separator.join(row) + "\n" for row in rows)


LINES = {
    "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "a.csv": table(["id", "text", "label"], ",", quoted),
    "a.tsv": table(["id", "text", "label"], "\t"),
}


def packed_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, row in enumerate(ROWS[:8]):
            for ending, content in (("json", json.dumps(row).encode()), ("png", picture_bytes(number))):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def packed(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "xlsx":
        book = openpyxl.Workbook()
        for row in [list(ROWS[0]), *([*row.values()] for row in ROWS)]:
            book.active.append(row)
        book.save(buffer)
    else:
        pq.write_table(pa.Table.from_pylist([{**row, "image": picture_bytes(1)} for row in ROWS]), buffer)
    return buffer.getvalue()


COCO = {
    "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(9)],
    "annotations": [{"image_id": i % 9, "caption": row["text"]} for i, row in enumerate(ROWS)],
}
VQA = {
    "questions": [{"question_id": i, "image": "a.jpg", "question": row["text"]} for i, row in enumerate(ROWS)],
    "annotations": [{"question_id": i, "answers": [{"answer": row["label"]}]} for i, row in enumerate(ROWS)],
}
OTHERS: dict[str, bytes] = {
    "a.json": json.dumps(ROWS, ensure_ascii=False).encode(), "coco.json": json.dumps(COCO).encode(),
    "vqa.json": json.dumps(VQA).encode(), "a.jsonl.gz": gzip.compress(LINES["a.jsonl"].encode(), mtime=0),
    "a.csv.gz": gzip.compress(LINES["a.csv"].encode(), mtime=0), "a.tar": packed_tar(), "a.xlsx": packed("xlsx"),
    "a.parquet": packed("parquet"), "ofa.tsv": f"1\t2\ta&&b\tc&&d\t{CODE}\n".encode() * 9,
    "m_imgs.tsv": "".join(f"{i}\t{CODE}\n" for i in range(9)).encode(),
    "m_texts.jsonl": "".join(json.dumps({"text": "一", "image_ids": [i]}) + "\n" for i in range(9)).encode(),
}  # fmt: skip


def load(path: Path, format: str | None = None) -> tuple[list[Record], tuple[Reject, ...]] | None:
    """The records and rejects as training gets them, None where the file is refused in one sentence."""
    try:
        source = open_source(path, format)
    except OpenM6Error as error:
        assert len(str(error)) < 2000
        return None
    return list(source), source.rejected


def plain(record: Record) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not key.startswith("_")}


@pytest.fixture(scope="module", autouse=True)
def the_good_files_are_good(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("good")
    for name, content in {**OTHERS, **{n: t.encode() for n, t in LINES.items()}}.items():
        (folder / name).write_bytes(content)
    for name in (*LINES, *OTHERS):
        if name != "m_imgs.tsv":
            found = load(folder / name, "ofa" if name == "ofa.tsv" else None)
            assert found is not None and found[0] and not found[1], name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("harm", ["flip", "cut"])
@pytest.mark.parametrize("name", LINES)
def test_a_damaged_line_costs_no_other_line(tmp_path: Path, name: str, harm: str, seed: int) -> None:
    rng = np.random.default_rng([seed, len(name)])
    lines = LINES[name].encode().splitlines()
    number = int(rng.integers(1, len(lines)))
    line = bytearray(lines[number])
    if harm == "cut":
        del line[int(rng.integers(1, len(line))) :]
    else:
        for place in rng.integers(0, len(line), 1 + seed % 3):
            line[place] = int(rng.integers(256))
    whole = not set(line) & set(b"\r\n") and line.strip()
    (tmp_path / name).write_bytes(b"\n".join([*lines[:number], bytes(line), *lines[number + 1 :]]) + b"\n")
    found = load(tmp_path / name)
    assert found is not None
    records, rejected = found
    hurt = number - (0 if name == "a.jsonl" else 1)
    seen = [plain(record) for record in records]
    assert [row for row in ROWS if row not in seen] in ([], [ROWS[hurt]])
    if whole:
        assert len(records) + len(rejected) == len(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoding", ["gb18030", "gbk", "utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32", "utf-7"]
)
@pytest.mark.parametrize("name", LINES)
def test_another_encoding_gives_the_same_records_or_none(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(LINES[name].encode(encoding))
    found = load(tmp_path / name)
    if encoding != "utf-7":  # which is ASCII to look at
        assert found is None or [plain(record) for record in found[0]] == ROWS
    again = load(tmp_path / name, f"?encoding={encoding}")
    assert again is not None and [plain(record) for record in again[0]] == ROWS


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_swapped_columns_give_the_same_records(tmp_path: Path, seed: int) -> None:
    columns = np.random.default_rng(seed).permutation(["id", "text", "label"]).tolist()
    for name, text in (("a.csv", table(columns, ",", quoted)), ("a.tsv", table(columns, "\t"))):
        (tmp_path / name).write_text(text, "utf-8")
        found = load(tmp_path / name)
        assert found is not None and [plain(record) for record in found[0]] == ROWS


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", OTHERS)
def test_a_damaged_file_of_another_format_is_read_or_refused(tmp_path: Path, name: str, seed: int) -> None:
    rng = np.random.default_rng([seed, len(name)])
    for other, content in OTHERS.items():
        (tmp_path / other).write_bytes(content)
    content = bytearray(OTHERS[name])
    if seed % 4 == 0:
        del content[int(rng.integers(len(content))) :]
    for place in rng.integers(0, max(len(content), 1), 1 + seed % 4):
        content[place : place + 1] = bytes([int(rng.integers(256))])
    (tmp_path / name).write_bytes(content)
    found = load(tmp_path / ("m_texts.jsonl" if name == "m_imgs.tsv" else name), "ofa" if name == "ofa.tsv" else None)
    for record in found[0] if found else ():
        if isinstance(record.get("image"), bytes):
            try:
                open_image(record["image"])
            except OpenM6Error as error:
                assert "The picture" in str(error)
    if name == "a.json" and found:
        assert len(found[0]) + len(found[1]) == len(ROWS)
