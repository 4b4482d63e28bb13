"""Batches of pictures: resumed they are what they would have been, alike ones go, people's verdicts become records."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openm6.core.candidates import Candidate
from openm6.core.errors import DataError, OpenM6Error, UsageError
from openm6.core.files import lock_output
from openm6.data.columns import SlotView
from openm6.data.source import open_source
from openm6.inference.session import Session
from openm6.studio.images import distinct, make_batch, read_labels, write_labelled
from openm6.tasks.encode import encode_example
from openm6.train.recipe import check_recipe
from openm6.train.trainer import train
from tests.conftest import drawing_session
from tests.processes import run_openm6
from tests.tasks.conftest import picture

TASK = "text_to_image"
QUICK = {"passes": 2, "guidance": 0}
CAPTIONS = [f"红色的杯子第{number}个" for number in range(11)]


@pytest.fixture(scope="module")
def session() -> Session:
    return drawing_session()


def prompts(folder: Path, lines: list[Any] | None = None) -> Path:
    file = folder / "prompts.jsonl"
    rows = [{"caption": text, "id": number} for number, text in enumerate(CAPTIONS)] if lines is None else lines
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def made(session: Session, folder: Path, **changes: Any) -> dict[str, Any]:
    """A batch in folder / "batch" of the prompts in folder; 16 candidates make groups of four prompts."""
    file = folder / "prompts.jsonl"
    file = file if file.exists() else prompts(folder)
    options = {"task": TASK, "candidates": 16, "keep": 3, "decoding": QUICK, **changes}
    return make_batch(session, options.pop("task"), file, folder / "batch", **options)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "batch" / "candidates.jsonl").read_text("utf-8").splitlines()]


def labelled(folder: Path, lines: list[dict[str, Any]]) -> Path:
    file = folder / "labels.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return file


def test_the_best_candidates_of_every_prompt_are_kept(session: Session, tmp_path: Path) -> None:
    found = made(session, tmp_path)
    assert found["prompts"] == 11 and found["bad"] == 0
    assert found["pictures"] == len(rows(tmp_path))
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for row in rows(tmp_path):
        by_prompt.setdefault(row["prompt"], []).append(row)
        saved = np.asarray(Image.open(tmp_path / "batch" / row["file"]))
        assert np.array_equal(saved, np.asarray(session.codec.decode(np.array(row["codes"]))))
        assert set(row["estimates"]) == {"relevance", "fidelity", "quality"}
    assert list(by_prompt) == list(range(11))
    for number, some in by_prompt.items():
        assert [row["rank"] for row in some] == list(range(1, len(some) + 1))
        assert {row["of"] for row in some} == {len(some)}
        assert {row["asked"]["caption"] for row in some} == {CAPTIONS[number]}
        scores = [row["score"] for row in some]
        assert scores == sorted(scores, reverse=True)
    # Prompts of other groups have random numbers of their own.
    assert by_prompt[0][0]["codes"] != by_prompt[4][0]["codes"]


@pytest.mark.parametrize("left", [0.0, 0.15, 0.5, 0.85, 1.0])
def test_after_a_kill_it_goes_on_to_the_same_pictures(session: Session, tmp_path: Path, left: float) -> None:
    made(session, tmp_path)
    file = tmp_path / "batch" / "candidates.jsonl"
    whole = file.read_bytes()
    pages = (tmp_path / "batch" / "review.html").read_bytes()
    file.write_bytes(whole[: int(left * len(whole))])  # mostly a torn line
    for row in whole.decode().splitlines()[-3:]:
        (tmp_path / "batch" / json.loads(row)["file"]).write_bytes(b"torn")
    found = made(session, tmp_path)
    assert file.read_bytes() == whole
    assert (tmp_path / "batch" / "review.html").read_bytes() == pages
    assert found["prompts"] == 11 and found["pictures"] == len(rows(tmp_path))
    if left < 1:
        Image.open(tmp_path / "batch" / rows(tmp_path)[-1]["file"]).load()


def test_a_whole_line_without_the_rest_of_its_prompt_is_drawn_again(session: Session, tmp_path: Path) -> None:
    made(session, tmp_path)
    file = tmp_path / "batch" / "candidates.jsonl"
    whole = file.read_text("utf-8")
    lines = whole.splitlines(keepends=True)
    assert json.loads(lines[0])["of"] > 1
    file.write_text(lines[0], "utf-8")
    made(session, tmp_path)
    assert file.read_text("utf-8") == whole


def test_a_list_that_has_changed_since_a_kill_is_refused(session: Session, tmp_path: Path) -> None:
    """By its first record that is known to have changed: of those that were not drawn yet the list's name is known."""
    made(session, tmp_path)
    file, same = tmp_path / "batch" / "candidates.jsonl", [{"caption": c, "id": n} for n, c in enumerate(CAPTIONS)]
    file.write_text("".join(line for line in file.read_text("utf-8").splitlines(True) if '"prompt": 4' not in line))
    left = file.read_bytes()
    other = {"caption": "蓝色的雨伞", "id": 9}
    for changed, name in (
        ([*same[:3], other, *same[4:]], "prompts.jsonl:4"), ([other, *same], "prompts.jsonl:1"),
        ([*same[:4], other, *same[5:]], "prompts.jsonl"), ([*same, other], "prompts.jsonl"),
        (same[:10], "prompts.jsonl"), ([*same[:2], {"caption": " "}, *same[3:]], "prompts.jsonl:3"),
    ):  # fmt: skip
        prompts(tmp_path, changed)
        with pytest.raises(UsageError, match=rf"{name} has changed since .* was started"):
            made(session, tmp_path)
        assert file.read_bytes() == left
    prompts(tmp_path)
    assert made(session, tmp_path)["prompts"] == 11


def test_a_model_that_has_changed_since_a_kill_is_refused(session: Session, tmp_path: Path) -> None:
    session.save(tmp_path / "model")
    model = Session.load(tmp_path / "model")
    made(model, tmp_path, candidates=2, keep=2)
    (tmp_path / "model" / "more.json").write_text("{}", "utf-8")
    with pytest.raises(UsageError, match=r"The model .*model has changed since .* was started"):
        made(model, tmp_path, candidates=2, keep=2)


def test_a_damaged_line_is_refused(session: Session, tmp_path: Path) -> None:
    made(session, tmp_path)
    file = tmp_path / "batch" / "candidates.jsonl"
    lines = file.read_text("utf-8").splitlines(keepends=True)
    file.write_text("".join([lines[0], lines[1][:40] + "\n", *lines[2:]]), "utf-8")
    with pytest.raises(DataError, match="candidates.jsonl:2 is damaged"):
        made(session, tmp_path)
    assert file.read_text("utf-8").endswith(lines[-1])  # nothing has been cut


def test_what_is_whole_is_not_drawn_again(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(session, tmp_path)
    asked: list[int] = []
    drawing = Session.draw_many

    def counted(self: Session, task: Any, records: Any, **options: Any) -> Iterator[list[Candidate]]:
        asked.append(len(list(records)))
        return drawing(self, task, records, **options)

    monkeypatch.setattr(Session, "draw_many", counted)
    made(session, tmp_path)
    assert asked == [0]  # the question whether it could be asked
    keep = [row for row in rows(tmp_path) if row["prompt"] < 5]
    file = tmp_path / "batch" / "candidates.jsonl"
    file.write_text("".join(file.read_text("utf-8").splitlines(keepends=True)[: len(keep)]), "utf-8")
    asked.clear()
    made(session, tmp_path)
    assert asked == [0, 4, 3]  # the group that was begun, and the last one


def test_another_request_for_the_same_folder_is_refused(session: Session, tmp_path: Path) -> None:
    made(session, tmp_path)
    with pytest.raises(UsageError, match=r"was started with keep 3, not 2: use another directory"):
        made(session, tmp_path, keep=2)
    with pytest.raises(UsageError, match=r"was started with quality 0.0, not 1.0"):
        made(session, tmp_path, decoding={**QUICK, "quality": 1.0})
    with pytest.raises(UsageError, match="exists already"):
        made(session, tmp_path, resume=False)
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        make_batch(session, TASK, tmp_path / "prompts.jsonl", tmp_path / "other")


def test_a_batch_has_one_seed_and_each_picture_its_own(session: Session, tmp_path: Path) -> None:
    """A fresh one, which a call that goes on takes too; by its own seed a picture is drawn again alone."""
    first = made(session, tmp_path)
    assert made(session, tmp_path)["seed"] == first["seed"]
    with pytest.raises(UsageError, match=f"was started with seed {first['seed']}, not 3"):
        made(session, tmp_path, decoding={**QUICK, "seed": 3})
    for row in rows(tmp_path)[:5]:
        with Image.open(tmp_path / "batch" / row["file"]) as image:
            told = json.loads(image.text["openm6"])  # type: ignore[attr-defined]
            assert told["options"]["seed"] == row["seed"] and told["slots"] == row["asked"]
            [alone] = session.draw(TASK, decoding=told["options"], **told["slots"])
            assert np.array_equal(np.asarray(alone.image), np.asarray(image))
    shutil.rmtree(tmp_path / "batch")
    assert made(session, tmp_path)["seed"] != first["seed"]


def test_a_folder_takes_one_batch_at_a_time(session: Session, tmp_path: Path) -> None:
    with lock_output(tmp_path / "batch"), pytest.raises(UsageError, match="batch is being written by another process"):
        made(session, tmp_path)
    assert made(session, tmp_path)["prompts"] == 11


@pytest.mark.parametrize(("candidates", "most"), [(2, 2), (16, 4)])
def test_what_is_kept_by_default_is_never_more_than_is_drawn(
    session: Session, tmp_path: Path, candidates: int, most: int
) -> None:
    prompts(tmp_path, [{"caption": CAPTIONS[0]}])
    assert 1 <= made(session, tmp_path, candidates=candidates, keep=None)["pictures"] <= most
    assert json.loads((tmp_path / "batch" / "batch.json").read_text("utf-8"))["keep"] == most


def test_prompts_are_lines_of_a_text_file_too(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{CAPTIONS[0]}\r\n\n  {CAPTIONS[1]} \n \n{CAPTIONS[2]}", "utf-8")
    make_batch(session, TASK, file, tmp_path / "batch", candidates=2, decoding=QUICK)
    assert [row["asked"]["caption"] for row in rows(tmp_path) if row["rank"] == 1] == CAPTIONS[:3]


def test_a_prompt_that_is_too_long_is_left_out_or_shortened_by_choice(session: Session, tmp_path: Path) -> None:
    """1,980 characters before the wish never stand for it."""
    short = drawing_session(max_length=96)
    long = "很好" * 990 + CAPTIONS[3]
    prompts(tmp_path, [{"caption": CAPTIONS[0]}, {"caption": long}])
    found = made(short, tmp_path, candidates=2, keep=2)
    assert found["prompts"] == 1 and found["bad"] == 1
    [reject] = (tmp_path / "batch" / "rejects.jsonl").read_text("utf-8").splitlines()
    assert re.search(r"prompts.jsonl:2.* has [\d,]+ positions and its answer 17; the model takes 96 ", reject)
    shutil.rmtree(tmp_path / "batch")
    assert made(short, tmp_path, candidates=2, keep=2, truncate="start")["prompts"] == 2
    assert {row["asked"]["caption"] for row in rows(tmp_path)} == {CAPTIONS[0], long}


def test_wrong_requests_leave_nothing_behind(session: Session, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"keep is 20; it can be 1 to the number of candidates, 16\."):
        made(session, tmp_path, keep=20)
    with pytest.raises(UsageError, match="no option qualty"):
        made(session, tmp_path, decoding={"qualty": 1})
    with pytest.raises(UsageError, match="The task caption does not draw"):
        made(session, tmp_path, task="caption")
    with pytest.raises(UsageError, match="has no column 'text'"):
        made(session, tmp_path, columns={"caption": "text"})
    prompts(tmp_path, [{"a": 1, "b": [2]}])
    with pytest.raises(
        UsageError, match=r"None of the columns .*\(a, b\) matches an input slot of text_to_image \(caption\)"
    ):
        made(session, tmp_path)
    assert not (tmp_path / "batch").exists()


def test_bad_prompts_are_counted_and_written_down(session: Session, tmp_path: Path) -> None:
    good = [{"caption": text} for text in CAPTIONS]
    prompts(
        tmp_path,
        [good[0], {"caption": " \u3000"}, "no json\n", good[1], {"caption": ["一", "二"]}, {"caption": {"a": 1}}],
    )
    for _ in range(2):  # counted anew, not twice
        found = made(session, tmp_path)
        assert found["prompts"] == 3 and found["bad"] == 3
        lines = (tmp_path / "batch" / "rejects.jsonl").read_text("utf-8").splitlines()
        assert len(lines) == 3
        assert "caption is empty" in lines[1] and "prompts.jsonl:2" in lines[1]
    assert [row["asked"]["caption"] for row in rows(tmp_path) if row["rank"] == 1] == [*CAPTIONS[:2], "一"]
    prompts(tmp_path, [*good, *[{"caption": ""}] * 25])
    shutil.rmtree(tmp_path / "batch")
    with pytest.raises(DataError, match=r"could not be used .*at most 5% may be"):
        made(session, tmp_path)


def test_pictures_that_were_asked_with_are_kept_beside(session: Session, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(20, 20))
    prompts(
        tmp_path,
        [{"caption": "杯子", "sketch": "a.jpg"}, {"caption": "杯子"}, {"caption": "杯子", "sketch": "gone.jpg"}],
    )
    found = made(session, tmp_path, task="controlled_image")
    assert found["prompts"] == 2 and found["bad"] == 1
    first, last = rows(tmp_path)[0], rows(tmp_path)[-1]
    assert first["asked"] == {"caption": "杯子", "sketch": "pictures/000000-sketch.png"}
    assert last["asked"] == {"caption": "杯子"}
    assert '"pictures": ["pictures/000000-sketch.png"]' in (tmp_path / "batch" / "review.html").read_text("utf-8")
    labels = labelled(tmp_path, [{"file": row["file"], "accepted": True} for row in (first, last)])
    source = open_source(write_labelled(tmp_path / "batch", labels)["file"])
    task = session.task("controlled_image")
    view = SlotView.of(task, source)
    # No other column stands in for a slot that was not asked for.
    assert set(view(source[1])) & set(task.inputs) == {"caption"}
    assert Path(view(source[0])["sketch"]).is_file()
    for record in source:
        encode_example(task, view(record), session.processor)


def candidate(shade: float, score: float) -> Candidate:
    pixels = np.full((16, 16, 3), 100.0)
    pixels[:, :8] += shade
    return Candidate(Image.fromarray(pixels.astype(np.uint8)), 0, np.zeros(1, np.int64), {}, score)


def test_near_duplicates_go_and_the_better_one_stays() -> None:
    some = [candidate(0, 5), candidate(4, 4), candidate(60, 3), candidate(66, 2), candidate(120, 1)]
    assert [p.score for p in distinct(some, 5)] == [5, 3, 1]
    assert [p.score for p in distinct(some, 2)] == [5, 3]
    noise = np.random.default_rng(0).normal(0, 8, (16, 16, 3))
    noisy = Image.fromarray((np.asarray(some[0].image) + noise).clip(0, 255).astype(np.uint8))
    assert len(distinct([some[0], Candidate(noisy, 1, np.zeros(1, np.int64), {}, 0.0)], 2)) == 1


def test_alike_candidates_of_a_prompt_are_kept_once(session: Session, tmp_path: Path) -> None:
    found = made(session, tmp_path, decoding={"passes": 2, "guidance": 0, "temperature": 0, "noise": 0})
    assert found["pictures"] == found["prompts"] == 11


def test_verdicts_become_records_to_train_on(session: Session, tmp_path: Path) -> None:
    made(session, tmp_path)
    verdicts = {row["file"]: row["rank"] == 1 for row in rows(tmp_path)[:-4]}
    labels = labelled(tmp_path, [{"file": file, "accepted": verdict} for file, verdict in reversed(verdicts.items())])
    records = list(read_labels(tmp_path / "batch", labels))
    assert len(records) == len(verdicts)
    for record, row in zip(records, rows(tmp_path), strict=False):
        assert record == {
            "caption": row["asked"]["caption"], "picture": row["codes"], "verdict_quality": int(row["rank"] == 1),
        }  # fmt: skip
    told = write_labelled(tmp_path / "batch", labels)
    assert told["labelled"] == len(records)
    assert told["by_rank"][1]["accepted"] == 1 and told["by_rank"][2]["accepted"] == 0
    source = open_source(told["file"])
    task, tokenizer = session.task(TASK), session.processor.tokenizer
    for record, seen in zip(records, map(SlotView.of(task, source), source), strict=True):
        sequence = encode_example(task, seen, session.processor, np.random.default_rng(0))
        assert sequence.ids[-3:].tolist() == list(tokenizer.estimate_ids)
        assert sequence.labels[-1] == (tokenizer.yes_id if record["verdict_quality"] else tokenizer.no_id)
        assert (sequence.ids[-19:-3] - tokenizer.code_start).tolist() == record["picture"]


def test_bad_labels_are_told(session: Session, tmp_path: Path) -> None:
    made(session, tmp_path)
    good = {"file": rows(tmp_path)[0]["file"], "accepted": True}
    for lines, said in (
        (
            [good, {"file": "pictures/999999-1.png", "accepted": True}],
            r"labels.jsonl:2: .* no picture 'pictures/999999-1",
        ),
        ([{**good, "accepted": "yes"}], r"labels.jsonl:1: accepted is 'yes'; a verdict is true or false"),
        ([{"file": good["file"]}], r"accepted is 'None'"),
        (
            [good, good, {**good, "accepted": False}],
            r"labels.jsonl:3: .* is rejected here, and accepted in .*labels.jsonl:1",
        ),
        ([{"accepted": True}], r"labels.jsonl:1 names no picture"),
        ([{**good, "text": "一只杯子"}], r"labels.jsonl:1: text is '一只杯子'; it is the edited form of a text"),
        ([], "has no labels"),
    ):
        with pytest.raises(DataError, match=said):
            write_labelled(tmp_path / "batch", labelled(tmp_path, lines))
        assert not (tmp_path / "batch" / "labelled.jsonl").exists()
    with pytest.raises(DataError, match="gone.jsonl cannot be read"):
        list(read_labels(tmp_path / "batch", tmp_path / "gone.jsonl"))
    with pytest.raises(UsageError, match="is not a batch"):
        list(read_labels(tmp_path, labelled(tmp_path, [good])))
    assert [p.name for p in (tmp_path / "batch").iterdir() if p.name.startswith(".")] == []


def test_texts_of_prompts_are_no_html(session: Session, tmp_path: Path) -> None:
    prompts(tmp_path, [{"caption": "</script><script>alert(1)</script>"}])
    made(session, tmp_path, candidates=1, keep=1)
    page = (tmp_path / "batch" / "review.html").read_text("utf-8")
    assert "alert(1)" in page and "<script>alert" not in page
    assert page.count("</script>") == 2


def test_a_full_disk_is_told(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(OpenM6Error, match="could not be written .no space left on device"):
            made(session, tmp_path)
    assert made(session, tmp_path)["prompts"] == 11


@pytest.mark.slow
def test_a_model_learns_what_people_accept(session: Session, tmp_path: Path) -> None:
    """Trained on verdicts by a rule that it is not told, it ranks other pictures by it."""
    session.save(tmp_path / "model")

    def reviewed() -> dict[str, Any]:
        # The codec is untrained: what people see is in the codes, not in the pixels.
        verdicts = {row["file"]: sum(code < 8 for code in row["codes"]) > 8 for row in rows(tmp_path)}
        lines = [{"file": file, "accepted": verdict} for file, verdict in verdicts.items()]
        return write_labelled(tmp_path / "batch", labelled(tmp_path, lines))

    wishes = [{"caption": f"{text}，{other}"} for text in CAPTIONS for other in range(6)]
    prompts(tmp_path, wishes)
    made(session, tmp_path, keep=16, decoding={**QUICK, "seed": 0})
    recipe = check_recipe({
        "name": "verdicts", "output": str(tmp_path / "run"), "model": {"path": str(tmp_path / "model")},
        "data": [{"source": reviewed()["file"], "task": TASK}],
        "train": {
            "steps": 150, "batch_size": 32, "row_length": 64, "learning_rate": 4e-3, "warmup": 10, "precision": "fp32",
            "checkpoint_every": 150, "workers": 0,
        },
    })  # fmt: skip
    learned = Session.load(train(recipe))
    shutil.rmtree(tmp_path / "batch")
    prompts(tmp_path, wishes[:24])
    weights = {"relevance": 0, "fidelity": 0, "quality": 1, "seed": 1}
    made(learned, tmp_path, keep=16, decoding={**QUICK, **weights})
    found = reviewed()
    # How much of what it draws fits the rule is chance, of the pictures that it was taught with.
    assert found["by_rank"][1]["accepted"] > 0.75 and found["by_rank"][16]["accepted"] < 0.25


@pytest.mark.slow
def test_the_commands(session: Session, tmp_path: Path) -> None:
    session.save(tmp_path / "model")
    (tmp_path / "prompts.csv").write_text("wish,note\n红色的杯子,a\n杯子,b\n,c\n", "utf-8")

    def run(*arguments: str, code: int = 0) -> str:
        done = run_openm6("images", *arguments, folder=tmp_path)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr

    asked = ["batch", "model", "--prompts", "prompts.csv", "--output", "out", "-n4", "--keep", "2", "-ccaption=wish"]
    said = run(*asked, "-o", "quality=1", "-o", "passes=2")
    assert "pictures for 2 prompts" in said and "1 of 3 prompts could not be used: see out/rejects.jsonl" in said
    assert "was started with quality 1, not 0.0" in run(*asked, "-o", "passes=2", code=2)
    lines = [json.loads(line) for line in (tmp_path / "out" / "candidates.jsonl").read_text("utf-8").splitlines()]
    labels = labelled(tmp_path, [{"file": line["file"], "accepted": line["rank"] == 1} for line in lines])
    told = json.loads(run("labels", "out", str(labels), "--json"))
    assert told["by_rank"]["1"] == {"labelled": 2, "accepted": 1.0}
    assert "100.0%" in run("labels", "out", str(labels))
    assert "has no labels" in run("labels", "out", str(labelled(tmp_path, [])), code=1)
