"""`openm6 images` on a small untrained model: files, tables, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from openm6.cli import commands
from openm6.cli.images import save_next
from openm6.core.errors import ContextLengthError, OpenM6Error
from openm6.inference.session import Session
from openm6.tasks.task import Task
from tests.conftest import command, drawing_session, full_disk

QUICK = ("-o", "passes=2", "-o", "guidance=0")
SEEN = "[image:photo] -> [label:colour|set=红,蓝] [label:kind|set=鞋,包]"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a picture, masks, and six goods."""
    folder = tmp_path_factory.mktemp("images")
    session = drawing_session()
    session.tasks["seen"] = Task.from_instruction(SEEN, "seen")
    session.save(folder / "model")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        told = {"caption": "红色的杯子", "image": f"{number}.png", "colour": "红", "kind": "鞋包"[number % 2]}
        lines.append(json.dumps(told, ensure_ascii=False) + "\n")
    (folder / "goods.jsonl").write_text("".join(lines), "utf-8")
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[:, :8]).save(folder / "narrow.png")
    (folder / "words.png").write_text("no picture", "utf-8")
    return folder


def call(*arguments: Any) -> str:
    result = CliRunner().invoke(commands(), ["images", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_with_several_controls_each_candidate_tells_which_it_follows(room: Path, tmp_path: Path) -> None:
    controls = ("caption=红色的杯子", f"style={room / '0.png'}", f"sketch={room / '1.png'}")
    wish = (
        "draw",
        room / "model",
        *controls,
        "--task",
        "controlled_image",
        "-n",
        2,
        "--output",
        tmp_path,
        *QUICK,
        "-o",
        "seed=1",
    )
    rows = json.loads(call(*wish, "--json"))
    assert all({"follows caption", "follows style", "follows sketch"} <= row.keys() for row in rows)
    told = call(*wish)
    odds = {name: rows[0][f"follows {name}"] for name in ("caption", "style", "sketch")}
    won, lost = ([n for n, value in odds.items() if (value > 0) is side] for side in (True, False))
    assert ("contradict" in told) == bool(won and lost)
    if won and lost:
        assert f"3.png follows {', '.join(won)}, not {', '.join(lost)}." in told
    assert "follows caption" not in call("draw", room / "model", controls[0], "-n", 2, "--output", tmp_path, *QUICK)


def test_candidates_are_files_best_first(room: Path, tmp_path: Path) -> None:
    model, wish = room / "model", "caption=红色的杯子"
    rows = json.loads(call("draw", model, wish, "-n", 3, "--output", tmp_path, "--json", *QUICK))
    assert [Path(row["file"]).name for row in rows] == ["1.png", "2.png", "3.png"]
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert all(Image.open(row["file"]).size == (16, 16) for row in rows)
    assert "relevance" in call("draw", model, wish, "--output", tmp_path, *QUICK, "-o", "branches=2")


@pytest.mark.slow
def test_each_candidate_is_drawn_again_alone_from_what_its_file_says(room: Path, tmp_path: Path) -> None:
    """Nothing of another wish is overwritten: a second call counts on."""
    model, few = room / "model", ("-n", 3, "--output", tmp_path, *QUICK)
    rows = json.loads(call("draw", model, "caption=红色的杯子", *few, "--json"))
    content = {row["file"]: Path(row["file"]).read_bytes() for row in rows}
    other = json.loads(call("draw", model, "caption=杯子", *few, "--json"))
    assert [Path(row["file"]).name for row in other] == ["4.png", "5.png", "6.png"]
    assert content == {file: Path(file).read_bytes() for file in content}
    for row in [*rows, *other]:
        told = json.loads(Image.open(row["file"]).text["openm6"])
        slots = [f"{name}={value}" for name, value in told["slots"].items()]
        options = [word for name, value in told["options"].items() for word in ("-o", f"{name}={value}")]
        alone = ("-n", 1, "--task", told["task"], "--output", tmp_path / "alone", "--json")
        [again] = json.loads(call("draw", model, *slots, *options, *alone))
        assert np.array_equal(np.asarray(Image.open(again["file"])), np.asarray(Image.open(row["file"])))
        assert told["options"]["seed"] == row["seed"] == again["seed"]
    said = call("draw", model, "caption=红色的杯子", *few)
    assert "seed" in said and str(json.loads(Image.open(tmp_path / "7.png").text["openm6"])["options"]["seed"]) in said


def test_a_picture_of_run_has_its_seed_too(room: Path, tmp_path: Path) -> None:
    asked = ("run", room / "model", "text_to_image", "caption=红色的杯子", "--output", tmp_path / "a.png", *QUICK)
    told = json.loads(command(*asked, "--json").stdout)
    assert json.loads(Image.open(tmp_path / "a.png").text["openm6"])["options"]["seed"] == told["seed"]
    again = json.loads(command(*asked, "--json").stdout)
    assert again["seed"] != told["seed"]


@pytest.mark.parametrize("way", ["draw", "edit"])
def test_filler_before_a_wish_is_refused_and_never_drawn(room: Path, tmp_path: Path, way: str) -> None:
    """1,980 characters, with both numbers; with --truncate start the wish at the end stays."""
    filler = "很好" * 990
    given = ("--picture", room / "0.png", "--mask", room / "mask.png") if way == "edit" else ()
    asked = (way, room / "model", f"caption={filler}红色的杯子", "-n", 1, "--output", tmp_path, *given, *QUICK)
    with pytest.raises(ContextLengthError, match=r"has [\d,]+ positions and its answer 17; the model takes 256 "):
        call(*asked)
    assert list(tmp_path.iterdir()) == []
    if way == "draw":
        [row] = json.loads(call(*asked, "--truncate", "start", "-o", "seed=4", "--json"))
        told = json.loads(Image.open(row["file"]).text["openm6"])
        assert told["slots"]["caption"].endswith("红色的杯子")


def test_a_folder_that_is_a_file_is_told_before_anything_is_drawn(room: Path) -> None:
    result = CliRunner().invoke(
        commands(), ["images", "draw", "gone", "caption=杯子", "--output", str(room / "goods.jsonl")]
    )
    assert result.exit_code == 2 and "goods.jsonl" in result.output


def test_pictures_are_edited_varied_and_continued(room: Path, tmp_path: Path) -> None:
    model, wish, picture = room / "model", "caption=红色的杯子", room / "0.png"
    given = np.asarray(Image.open(picture))
    some = ("--picture", picture, "-n", 2, "--output", tmp_path, *QUICK)
    call("edit", model, wish, "--mask", room / "mask.png", *some)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "1.png"))[:, :8], given[:, :8])
    assert json.loads(Image.open(tmp_path / "1.png").text["openm6"])["kept"] > 0
    call("vary", model, wish, "--fraction", 0.5, *some)
    target = tmp_path / "wide.png"
    said = call(
        "extend", model, wish, "--picture", picture, "--side", "left", "--pixels", 8, "--output", target, *QUICK
    )
    assert said.strip() == str(target)
    assert np.array_equal(np.asarray(Image.open(target))[:, 8:], given)
    assert json.loads(Image.open(target).text["openm6"])["edited"]


@pytest.mark.slow
def test_a_model_is_measured_by_a_judge(room: Path, tmp_path: Path) -> None:
    judge = ("--judge", room / "model", "--judge-task", "seen", "--data", room / "goods.jsonl", "-n", 2)
    grid = tmp_path / "sheet.png"
    rows = json.loads(call("measure", room / "model", *judge, "--grid", grid, "--json", *QUICK))
    assert list(rows) == ["real", "reconstructed", "drawn", "best of 2"]
    assert rows["real"]["precision"] == rows["real"]["recall"] == 1.0
    # What the table says of real pictures is what the model answers when it is asked.
    session = Session.load(room / "model")
    said = [session.run("seen", photo=str(room / f"{i}.png")) for i in range(6)]
    right = [s["colour"] == "红" and s["kind"] == "鞋包"[i % 2] for i, s in enumerate(said)]
    assert rows["real"]["all"] == pytest.approx(sum(right) / 6)
    assert Image.open(grid).size == (2 * 12 * 16, 2 * 4 * 16)
    assert "diversity" in call("measure", room / "model", *judge, "--limit", 5, *QUICK)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["draw", "MODEL", "caption="], "caption: is empty"),
        (["draw", "MODEL", "caption=  "], "caption: holds blanks alone"),
        (["draw", "MODEL"], "nothing is asked for: give caption"),
        (["draw", "MODEL", "captoin=杯子"], "has no slot captoin. Did you mean"),
        (["draw", "MODEL", "caption=杯子", "-o", "branches=100"], "branches is 100; it has to be between 1 and 64"),
        (["draw", "MODEL", "caption=杯子", "--task", "caption"], "The task caption does not draw"),
        (["edit", "MODEL", "--picture", "0.png", "--mask", "narrow.png"], "The mask has 8 x 16 pixels"),
        (["edit", "MODEL", "--picture", "words.png", "--mask", "mask.png"], "in no picture format"),
        (["vary", "MODEL", "--picture", "gone.png"], "gone.png does not exist"),
        (["draw", "MODEL", "--task", "controlled_image", "reference=words.png"], "in no picture format"),
    ],
)
def test_bad_input_is_told(room: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    monkeypatch.chdir(room)
    with pytest.raises(OpenM6Error, match=said):
        call(*("model" if a == "MODEL" else a for a in arguments))


def test_a_full_disk_leaves_no_half_picture(tmp_path: Path) -> None:
    with full_disk(100), pytest.raises(OpenM6Error, match="could not be written"):
        save_next(Image.effect_noise((64, 64), 50), tmp_path)
    assert not list(tmp_path.iterdir())
