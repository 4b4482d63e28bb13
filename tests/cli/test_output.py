"""Tables are read at the usual 80 columns: names and numbers stay in one piece."""

from __future__ import annotations

from unicodedata import east_asian_width

import pytest

from openm6.cli.output import table

HEADS = ["step", "parameters (M)", "file (MB)", "peak memory (MiB)", "1 answer (ms)", "16 answers (ms)", "vqa accuracy"]
ROWS = [["100-export-32", "12.30", "49.20", "1234", "12.3", "123.4", "0.950 (-0.010)"],
        ["50-quantize-8", "6.10", "6.10", "900", "6.0", "60.4", "0.910 (-0.050)"]]  # fmt: skip


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    table(*words)  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert all(sum(1 + (east_asian_width(letter) in "WF") for letter in line) <= 80 for line in lines)
    return lines


@pytest.mark.usefixtures("narrow")
def test_headings_are_wrapped_before_names_and_numbers_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(shown(capsys, HEADS, ROWS))
    for cell in [cell for row in ROWS for cell in row]:
        assert all(word in text for word in cell.split())
    assert "parameters" in text and "1234" in text


@pytest.mark.usefixtures("narrow")
def test_a_table_of_too_many_columns_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    heads = [*HEADS, *(f"caption-{name}" for name in ("bleu", "rouge", "meteor"))]
    lines = shown(capsys, heads, [[*row, "0.123", "0.456", "0.789"] for row in ROWS])
    for head in heads:
        assert sum(head in line for line in lines) == 2
    assert [line for line in lines if "step" in line][1].split()[3] == "50-quantize-8"


@pytest.mark.usefixtures("narrow")
def test_long_texts_and_paths_are_folded_and_nothing_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    title, path = "红色条纹连衣裙" * 8, "/data/" + "pictures/" * 12
    lines = shown(capsys, ["id", "title", "picture"], [["A17", title, path]])
    cells = [line.strip("│┃").split("│") for line in lines if "│" in line]
    columns = ["".join(row[n].strip() for row in cells) for n in range(3)]
    assert columns == ["A17", title, path]


@pytest.mark.usefixtures("narrow")
def test_a_small_table_is_no_wider_than_it_has_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert max(map(len, shown(capsys, ["id", "score"], [["A17", "0.9"]]))) == len("┃ id  ┃ score ┃")
    assert shown(capsys, ["id", "score"], [])


@pytest.mark.usefixtures("narrow")
def test_a_table_without_rows_still_has_its_headings(capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(shown(capsys, [f"column-{number}" for number in range(20)], [], "Nothing was found"))
    assert "Nothing was found" in text
