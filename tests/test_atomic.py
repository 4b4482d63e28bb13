"""Files of lines that grow: what a kill leaves of the last line is cut, damage elsewhere is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from openm6.atomic import cut_torn_line, whole_lines
from openm6.errors import DataError

LINES = '{"text": "一"}\n' + '{"text": "二\\u2028"}\n'


@pytest.mark.parametrize("left", range(len(LINES.encode()) + 1))
def test_a_file_torn_anywhere_keeps_its_whole_lines(tmp_path: Path, left: int) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(LINES.encode()[:left])
    whole = LINES.encode()[:left].count(b"\n")
    values = [{"text": "一"}, {"text": "二\u2028"}][:whole]
    assert list(whole_lines(file)) == values
    assert file.stat().st_size == left  # another process may be writing
    cut_torn_line(file)
    with file.open("a", encoding="utf-8") as more:
        more.write("3\n")
    assert list(whole_lines(file)) == [*values, 3]


def test_a_damaged_line_is_told_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    assert list(whole_lines(file)) == []
    cut_torn_line(file)
    assert not file.exists()
    for damaged in (b'{"text": \n', b"\xff\n", b"\x00\x00\n"):
        file.write_bytes(b"1\n" + damaged + b"3\n")
        with pytest.raises(DataError, match=r"lines\.jsonl:2 is damaged"):
            list(whole_lines(file))
