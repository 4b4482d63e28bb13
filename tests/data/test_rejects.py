import json
from pathlib import Path

import pytest

from openm6.core.errors import DataError
from openm6.data.rejects import Rejects


def test_every_bad_record_is_written_once_with_its_reason(tmp_path: Path) -> None:
    rejects = Rejects(tmp_path / "deep" / "rejects.jsonl")
    rejects.saw(100)
    for _ in range(2):
        rejects.count("a.tsv:3", "a.tsv:3 has 1 fields.", "a")
    lines = [json.loads(line) for line in (tmp_path / "deep" / "rejects.jsonl").read_text("utf-8").splitlines()]
    assert lines == [{"where": "a.tsv:3", "reason": "a.tsv:3 has 1 fields.", "source": "a"}]
    assert (rejects.seen, rejects.bad) == (102, 2)
    assert rejects.summary() == "2 of 102 records could not be used (most often: has 1 fields)"
    with open(rejects.path, "ab") as file:
        file.write('{"where": "甲'.encode()[:-1])  # killed as it wrote
    resumed = Rejects(rejects.path)
    resumed.count("a.tsv:3", "a.tsv:3: it is too long.")
    resumed.count("b.tsv:9", "b.tsv:9: it is too long.")
    written = [json.loads(line)["where"] for line in rejects.path.read_text("utf-8").splitlines()]
    assert written == ["a.tsv:3", "b.tsv:9"]
    assert resumed.summary() == "2 of 2 records could not be used (most often: it is too long)"


def test_too_large_a_share_stops_the_work_and_says_why(tmp_path: Path) -> None:
    rejects = Rejects(tmp_path / "r.jsonl", max_fraction=0.1, minimum=5)
    rejects.saw(20)
    for number in range(4):
        rejects.count(f"a:{number}", "is truncated.")  # 4 of 24 is above the share, but too few to judge by
    with pytest.raises(DataError, match=r"5 of 25 .*\(most often: is truncated\).*at most 10% may be\. See .*r\.jsonl"):
        rejects.count("a:5", "is truncated.", "a")


def test_a_share_below_the_limit_goes_on(tmp_path: Path) -> None:
    rejects = Rejects(tmp_path / "r.jsonl", max_fraction=0.1, minimum=5)
    for number in range(100):
        rejects.saw(9)
        rejects.count(f"a:{number}", "is bad.")
    assert rejects.bad == 100
