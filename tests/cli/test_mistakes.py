"""A mistake is told before PyTorch is imported, which takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.core import TyperGroup
from typer.main import get_command

from openm6.cli import commands

pytestmark = pytest.mark.slow

DRAWN = "caption=红色"
COMPRESSED = ["--task", "a", "--data", "b", "--validation", "c", "--target", "size=2MB"]
ANSWERED = ["--data", "good.csv", "--output", "out.csv"]
EXTENDED = ["--picture", "gone.png", "--side", "left", "--pixels", "8"]
PRIVACY_TWICE = ["--set", "privacy=nothing", "--set", "privacy=all"]

CONTINUED = ["--picture", "b.png", "--side", "left", "--pixels", "8", DRAWN]
CLEARED = ["--picture", "clear.png", "--side", "left", "--pixels", "8", DRAWN]
NOWHERE = "good.csv/x"  # below a file, where not even an administrator can make a folder
UNWRITABLE = [
    (["images", "extend", "model", *CONTINUED, "--output", f"{NOWHERE}/y.png"], NOWHERE),
    (["images", "extend", "model", *CONTINUED, "--output", "/proc/x/y.png"], "/proc/x"),
    (["images", "draw", "model", DRAWN, "--output", NOWHERE], NOWHERE),
    (["images", "edit", "model", DRAWN, "--picture", "b.png", "--output", NOWHERE], NOWHERE),
    (["images", "vary", "model", DRAWN, "--picture", "b.png", "--output", NOWHERE], NOWHERE),
    (["images", "batch", "model", "--prompts", "good.csv", "--output", NOWHERE], NOWHERE),
    (["images", "measure", "model", "--judge", "model", "--grid", f"{NOWHERE}/y.png"], NOWHERE),
    (["run", "model", "text_to_image", DRAWN, "--output", f"{NOWHERE}/y.png"], NOWHERE),
    (["predict", "model", "vqa", "--data", "good.csv", "--output", f"{NOWHERE}/y.csv"], NOWHERE),
    (["eval", "model", "--task", "vqa", "--data", "good.csv", "--output", f"{NOWHERE}/y.jsonl"], NOWHERE),
    (["eval", "model", "--task", "vqa", "--data", "good.csv", "--report", NOWHERE], NOWHERE),
    (["train", "demo", f"output={NOWHERE}"], NOWHERE),
    (["demo", "--output", NOWHERE], NOWHERE),
    (["demo-images", "--output", NOWHERE], NOWHERE),
    (["finetune", "model", "--task", "vqa", "--data", "good.csv", "--output", NOWHERE], NOWHERE),
    (["copy", "batch", "model", "--items", "good.csv", "--output", NOWHERE], NOWHERE),
    (["compress", "model", "--task", "vqa", "--data", "good.csv", "--validation", "good.csv", "--target", "size=2MB",
      "--output", NOWHERE], NOWHERE),
    (["models", "quantize", "model", NOWHERE], NOWHERE),
    (["models", "export", "model", NOWHERE], NOWHERE),
    (["models", "merge", "model", NOWHERE], NOWHERE),
    (["models", "upcycle", "model", NOWHERE, "--num-experts", "4"], NOWHERE),
    (["models", "import", "model", NOWHERE], NOWHERE),
    (["models", "prune", "model", NOWHERE, "--task", "vqa", "--data", "good.csv"], NOWHERE),
    (["recommend", "fit", NOWHERE, "--index", "nowhere", "--visits", "good.csv"], NOWHERE),
    (["cascade", "init", NOWHERE, "--model", "model"], NOWHERE),
    (["deploy", "model", "--to", "compose", "--output", NOWHERE], NOWHERE),
    (["bench", "decode", "--out", NOWHERE], NOWHERE),
    (["reproduce", "capacity", "--out", NOWHERE], NOWHERE),
]  # fmt: skip
"""Commands whose output cannot be written, and the folder that is told."""

CASES: list[tuple[int, list[str], str]] = [
    (2, ["trian"], "No such command 'trian'"),
    (2, ["run", "nowhere", "caption", "photo=a.png"], "nowhere is no OpenM6 model"),
    (2, ["run", "model", "capton", "photo=a.png"], 'There is no task "capton". Did you mean "caption"?'),
    (2, ["run", "model", "caption", "photo"], '"photo" is not of the form name=value'),
    (2, ["run", "model", "caption", "phto=a.png"], 'The task caption has no slot phto. Did you mean "photo"?'),
    (2, ["run", "model", "vqa", "photo=a.png"], "question is missing"),
    (2, ["run", "model", "caption", "photo=a.png", "-o", "seed=x"], "seed has to be a number"),
    (2, ["run", "model", "caption", "photo=a.png", "-o", "seed=1", "-o", "seed=2"], 'seed is given twice: "1" and "2"'),
    (2, ["run", "model", "text_vector", "text=a", "-o", "seed=1"], "its only option is dims; leave out seed"),
    (2, ["eval", "model", "--task", "text_vector", "--data", "good.csv", "-o", "top_k=1"], "is dims; leave out top_k"),
    (2, ["predict", "model", "text_vector", *ANSWERED, "-o", "top_k=1"], "its only option is dims; leave out top_k"),
    (2, ["run", "model", "caption", "photo=a.png", "photo=b.png"], "photo is given twice"),
    (2, ["run", "model", "caption", "photo=a.png", "--outptu", "b"], "No such option: --outptu"),
    (1, ["run", "model", "caption", "photo=gone.png"], "gone.png does not exist"),
    (1, ["run", "model", "caption", "photo=a.png", "--examples", "gone.csv"], "There is no file gone.csv"),
    (2, ["run", "goods@live", "caption", "photo=a.png"], "is not a model directory, and the catalogue is empty"),
    (2, ["eval", "nowhere", "--task", "vqa", "--data", "good.csv"], "nowhere is no OpenM6 model"),
    (2, ["eval", "--task", "vqaa", "--data", "good.csv", "model"], 'Did you mean "vqa"?'),
    (1, ["eval", "model", "--task", "vqa", "--data", "gone.csv"], "There is no file gone.csv"),
    (2, ["eval", "model", "--task", "vqa", "--data", "demo:question"], 'Did you mean "questions"?'),
    (2, ["eval", "model", "--task", "vqa", "--data", "good.csv", "-c", "photo"], "is not of the form name=value"),
    (2, ["predict", "nowhere", "vqa", *ANSWERED], "nowhere is no OpenM6 model"),
    (2, ["predict", "model", "vqaa", *ANSWERED], 'Did you mean "vqa"?'),
    (1, ["predict", "model", "vqa", "--data", "gone.csv", "--output", "out.csv"], "There is no file gone.csv"),
    (2, ["predict", "model", "vqa", "--data", "good.csv", "--output", "out.doc"], "out.doc"),
    (2, ["train", "nowhere.yaml"], "There is no recipe nowhere.yaml"),
    (2, ["train", "demo", "train.stpes=5"], "unknown key train.stpes"),
    (2, ["train", "demo", "train.steps=5", "train.steps=9"], 'train.steps is given twice: "5" and "9"'),
    (2, ["train", "demo", "data.0.task=capton"], 'Did you mean "caption"?'),
    (1, ["train", "demo", "data.0.source=gone.csv"], "There is no file gone.csv"),
    (2, ["train", "demo", "model.preset=smal"], 'There is no preset "smal". Did you mean "small"?'),
    (2, ["plan", "m6-10bb"], 'There is no preset "m6-10bb". Did you mean "m6-10b"?'),
    (2, ["plan", "nowhere.yaml"], "There is no recipe nowhere.yaml"),
    (2, ["plan", "m6-10b", "--hardware", "h10"], "h10"),
    (2, ["plan", "m6-10b", "--gpu-memory", "80XB"], "--gpu-memory has to be a number of GiB"),
    (2, ["plan", "m6-10b", "--interconnect", "fast"], "--interconnect has to be a number above 0"),
    (2, ["plan", "m6-10b", "--machine", "memroy=80"], 'Did you mean "memory"?'),
    (2, ["train", "vectors", "model.path=nowhere"], "nowhere is no OpenM6 model"),
    (2, ["train", "demo", "model.codec=modle"], 'there is no such path. Did you mean "model"?'),
    (2, ["train", "demo", "tokenizer.path=nowhere"], "nowhere is no model directory"),
    (2, ["train", "codec.yaml"], 'modle is no model directory: there is no such path. Did you mean "model"?'),
    (2, ["train", "codec_64", "codec.perceptual_model=modle"], 'there is no such path. Did you mean "model"?'),
    (2, ["compress", "steps.yaml", "--output", "x"], "--output does nothing here: a chain is done as it is written"),
    (2, ["plan", "codec_64", "--gpu-memory", "80GB"], "--gpu-memory does nothing here: a recipe alone is timed"),
    (2, ["compress", "steps.yaml"], 'modle is no OpenM6 model: there is no such path. Did you mean "model"?'),
    (2, ["models", "add", "goods", "modle"], 'modle is not a model directory. Did you mean "model"?'),
    (1, ["data", "check", "goods.csv", "--task", "vqa"], 'Did you mean "good.csv"?'),
    (1, ["data", "check", "good.csv", "--task", "vqa", "--against", "gone.csv"], "There is no file gone.csv"),
    (1, ["data", "add", "goods", "gone.csv"], "There is no file gone.csv"),
    (1, ["eval", "model", "--task", "vqa", "--data", "dmo:questions/test"], 'Did you mean "demo"?'),
    (1, ["models", "prune", "model", "new", "--task", "vqa", "--data", "gone.csv"], "There is no file gone.csv"),
    (1, ["finetune", "model", "--task", "vqa", "--data", "good.csv", "--validation", "gone.csv"], "no file gone.csv"),
    (1, ["finetune", "model", "--task", "vqa", "--unlabelled", "gone.csv"], "There is no file gone.csv"),
    (1, ["eval", "model", "--task", "vqa", "--data", "good.csv", "--shots-from", "gone.csv"], "no file gone.csv"),
    (2, ["serve", "model", "--adapter", "copy=modle"], 'modle is no OpenM6 model: there is no such path.'),
    (2, ["index", "build", "i", "--model", "modle", "--task", "a", "--data", "b"], 'Did you mean "model"?'),
    (1, ["copy", "batch", "model", "--items", "good.csv", "--lexicon", "gone.txt", "--output", "o"], "no file gone"),
    (1, ["images", "measure", "model", "--judge", "model", "--data", "gone.csv"], "There is no file gone.csv"),
    (2, ["cascade", "init", "device", "--model", "modle"], 'modle is no OpenM6 model: there is no such path.'),
    (2, ["cascade", "init", "new", "--model", "model", "--cloud-model", "modle"], 'Did you mean "model"?'),
    (2, ["finetune", "nowhere", "--task", "vqa", "--data", "good.csv"], "nowhere is no OpenM6 model"),
    (2, ["finetune", "model", "--task", "vqaa", "--data", "good.csv"], 'Did you mean "vqa"?'),
    (1, ["finetune", "model", "--task", "vqa", "--data", "gone.csv"], "There is no file gone.csv"),
    (2, ["finetune", "model", "--task", "vqa", "--data", "good.csv", "--method", "lroa"], "Did you mean \"lora\"?"),
    (2, ["finetune", "model", "--task", "vqa", "--data", "good.csv", "--teacher", "nowhere"], "nowhere is no OpenM6"),
    (2, ["compress", "nowhere", "--target", "size=2MB"], "Give --task, --data, --validation and --target"),
    (2, ["compress", "chain.yaml"], "chain.yaml cannot be read"),
    (2, ["compress", "nowhere", *COMPRESSED], "nowhere is no OpenM6 model"),
    (2, ["compress", "model", *COMPRESSED, "--max-loss", "nan"], "--max-loss is 'nan': give a fraction"),
    (2, ["compress", "model", *COMPRESSED, "--max-loss=-1%"], "--max-loss is '-1%': give a fraction"),
    (2, ["serve", "nowhere"], "nowhere is no OpenM6 model"),
    (2, ["serve", "model", "--adapter", "a"], "is not of the form name=value"),
    (2, ["serve", "model", "--origin", "http://[::1"], "http://[::1 is not an origin of web pages: write it as https://shop."),
    (2, ["serve", "model", "--origin", "https://a.example:x"], "https://a.example:x is not an origin of web pages"),
    (2, ["serve", "model", "--origin", "https://a.example:443"], "write it as https://a.example."),
    (2, ["serve", "model", "--origin", "https://B.example/"], "write it as https://b.example."),
    (2, ["serve", "model", "--origin", "http://商店.example:80"], "write it as http://xn--czrs0t.example."),
    (2, ["serve", "model", "--host", "0.0.0.0"], "give --keys FILE"),
    (2, ["deploy", "nowhere"], "nowhere is no OpenM6 model"),
    (2, ["deployments", "stop", "goods"], "goods"),
    (2, ["keys", "remove", "anna", "--keys", "keys.json"], "anna"),
    (2, ["tasks", "show", "vqaa"], 'Did you mean "vqa"?'),
    (1, ["data", "check", "gone.csv", "--task", "caption"], "There is no file gone.csv"),
    (2, ["data", "check", "good.csv", "--task", "capton"], 'Did you mean "caption"?'),
    (2, ["data", "check", "good.csv", "--task", "caption", "--model", "goods@live"], "the catalogue is empty"),
    (2, ["finetune", "model", "--task", "vqa"], "Say what to learn from, by --data"),
    (2, ["models", "import", "nowhere", "new"], "nowhere is not a checkpoint"),
    (2, ["models", "import", "nowhere", "model"], "model exists already"),
    (2, ["models", "merge", "model", "new"], "model is not an adapter"),
    (2, ["models", "upcycle", "nowhere", "new", "--num-experts", "4"], "nowhere is no OpenM6 model"),
    (2, ["models", "prune", "model", "new", "--task", "vqaa", "--data", "good.csv"], 'Did you mean "vqa"?'),
    (2, ["models", "quantize", "nowhere", "new"], "nowhere is no OpenM6 model"),
    (2, ["models", "export", "nowhere", "new"], "nowhere is no OpenM6 model"),
    (2, ["models", "export", "model", "model"], "model exists already"),
    (2, ["models", "export", "lonely", "new"], "lonely is an adapter of the model gone, which is not there"),
    (2, ["models", "consolidate", "nowhere", "new"], "nowhere is not a checkpoint"),
    (2, ["models", "add", "goods", "nowhere", "--metric", "a=b"], "--metric is name=value, the value a number"),
    (2, ["index", "build", "i", "--model", "nowhere", "--task", "a", "--data", "b"], "nowhere is no OpenM6 model"),
    (2, ["index", "build", "i", "--model", "model", "--task", "vqaa", "--data", "b"], 'Did you mean "vqa"?'),
    (1, ["index", "build", "i", "--model", "model", "--task", "text_vector", "--data", "gone.csv"], "There is no file"),
    (2, ["index", "add", "nowhere", "--data", "good.csv"], "nowhere is not an index"),
    (2, ["index", "search", "nowhere", "text"], '"text" is not of the form name=value'),
    (2, ["index", "search", "nowhere", "text=a"], "nowhere is not an index"),
    (2, ["index", "show", "nowhere"], "nowhere is not an index"),
    (2, ["recommend", "fit", "r", "--index", "nowhere", "--visits", "good.csv"], "nowhere is not an index"),
    (2, ["recommend", "for", "nowhere"], "nowhere is not a recommender"),
    (2, ["copy", "batch", "nowhere", "--items", "good.csv", "--output", "o"], "nowhere is no OpenM6 model"),
    (1, ["copy", "batch", "model", "--items", "gone.csv", "--output", "o"], "There is no file gone.csv"),
    (2, ["images", "draw", "nowhere", DRAWN], "nowhere is no OpenM6 model"),
    (2, ["images", "draw", "model", "capton=a"], 'Did you mean "caption"?'),
    (1, ["images", "edit", "model", DRAWN, "--picture", "gone.png", "--mask", "a.png"], "gone.png does not exist"),
    (1, ["images", "vary", "model", DRAWN, "--picture", "gone.png"], "gone.png does not exist"),
    (1, ["images", "extend", "model", *EXTENDED], "gone.png does not exist"),
    *[(2, words, f"Nothing can be written to {place}") for words, place in UNWRITABLE],
    (2, ["images", "extend", "model", *CONTINUED, "--output", "x.xyz"], "x.xyz ends in .xyz; it has to end in .png"),
    (2, ["images", "extend", "model", *CONTINUED, "--output", "model"], "model ends in nothing; it has to end in .png"),
    (2, ["images", "extend", "model", *CLEARED, "--output", "x.jpg"], "x.jpg ends in .jpg; it has to end in .png"),
    (2, ["run", "model", "text_to_image", DRAWN, "--output", "x.xyz"], "x.xyz ends in .xyz; it has to end in .png"),
    (2, ["eval", "model", "--task", "vqa", "--data", "good.csv", "--output", "model"], "model is a folder"),
    (2, ["images", "measure", "model", "--judge", "nowhere"], "nowhere is no OpenM6 model"),
    (1, ["images", "batch", "model", "--prompts", "gone.csv", "--output", "o"], "There is no file gone.csv"),
    (2, ["cascade", "init", "device", "--model", "nowhere"], "nowhere is no OpenM6 model"),
    (2, ["cascade", "init", "new", "--model", "model", "--set", "keep=1"], "unknown key keep"),
    (2, ["cascade", "init", "new", "--model", "model", "--set", "privacy=some"], "can be all, features, nothing"),
    (2, ["cascade", "init", "new", "--model", "model", "--privacy", "some"], "can be all, features, nothing"),
    (2, ["cascade", "init", "new", "--model", "model", "--set", "cloud=m6:80"], "give an address"),
    (2, ["cascade", "init", "new", "--model", "model", "--cloud", "http://m6:x"], "give an address"),
    (2, ["cascade", "init", "new", "--model", "model", "--set", "keep_mb="], "has to be int"),
    (2, ["cascade", "init", "new", "--model", "model", "--set", "audit_rate=nan"], "has to be a number"),
    (2, ["cascade", "init", "new", "--model", "model", "--set", "offline=yes"], "has to be bool"),
    (2, ["cascade", "init", "new", "--model", "model", "--set", "key=m6-4f1c"], "the name of an environment variable"),
    (2, ["cascade", "init", "new", "--model", "model", *PRIVACY_TWICE], 'privacy is given twice: "nothing" and "all"'),
    (2, ["cascade", "calibrate", "nowhere", "--task", "vqa", "--data", "good.csv"], "nowhere is not an edge device"),
    (2, ["cascade", "learn", "nowhere"], "nowhere is not an edge device"),
    (2, ["cascade", "status", "nowhere"], "nowhere is not an edge device"),
    (2, ["bench", "trainstep"], 'Did you mean "train-step"?'),
    (2, ["reproduce", "capasity"], 'Did you mean "capacity"?'),
    (2, ["jobs", "show", "none"], "none"),
]  # fmt: skip
"""Exit code, command, and what it says."""


def below(command: object, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The words of every command and group under one, and whether it is a group."""
    inner = command.commands if isinstance(command, TyperGroup) else {}
    yield words, bool(inner)
    for name, one in inner.items():
        yield from below(one, (*words, name))


HELP = dict(below(get_command(commands())))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """What each of the commands above, and each with --help, says where PyTorch cannot be imported."""
    room = tmp_path_factory.mktemp("room")
    for name in ("model", "lonely"):
        (room / name).mkdir()
        (room / name / "openm6.json").write_text('{"format": 1, "max_length": 8, "tasks": []}')
    (room / "lonely" / "adapter_config.json").write_text('{"base_model_name_or_path": "gone"}')
    (room / "codec.yaml").write_text("codec: {path: modle}\ndata: [{source: good.csv}]\ntrain: {steps: 1}\n")
    (room / "steps.yaml").write_text(
        "model: modle\noutput: c\nsteps: []\ntasks: [{task: vqa, data: good.csv, validation: good.csv}]\n"
    )
    (room / "good.csv").write_text("photo,question,answer\na.png,好吗?,好\n", "utf-8")
    (room / "a.png").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(room / "b.png")
    Image.new("RGBA", (8, 8)).save(room / "clear.png")
    asked = [words for _, words, _ in CASES] + [[*words, "--help"] for words in HELP]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("mistakes.py")],
        cwd=room,
        input=json.dumps(asked),
        env={**os.environ, "OPENM6_HOME": str(room / "home"), "OPENM6_CACHE": str(room / "cache"), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {" ".join(words): tuple(answer) for words, answer in zip(asked, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize(
    ("code", "words", "said"), CASES, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else ""
)
def test_a_mistake_is_told_without_pytorch(
    answers: dict[str, tuple[int, str]], code: int, words: list[str], said: str
) -> None:
    found, text = answers[" ".join(words)]
    assert said in text
    assert found == code
    assert "Traceback" not in text


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_needs_no_pytorch(answers: dict[str, tuple[int, str]], words: tuple[str, ...]) -> None:
    code, text = answers[" ".join([*words, "--help"])]
    assert code == 0 and "Usage: openm6" in text


def test_every_command_has_a_mistake_here() -> None:
    tried = {tuple(words[:length]) for _, words, _ in CASES for length in (1, 2)}
    missing = {words for words, is_group in HELP.items() if not is_group} - tried
    assert missing == {
        ("data", "list"), ("data", "show"),
        ("models", "fetch"), ("models", "lineage"), ("models", "list"), ("models", "promote"), ("models", "rollback"),
        ("models", "show"), ("index", "delete"), ("index", "tune"), ("recommend", "eval"), ("copy", "labels"),
        ("images", "labels"), ("cascade", "rollback"), ("deployments", "list"), ("keys", "add"), ("keys", "list"),
        ("jobs", "list"), ("jobs", "logs"), ("jobs", "remove"), ("jobs", "resume"), ("jobs", "stop"),
        ("jobs", "submit"), ("jobs", "work"),
    }  # fmt: skip
