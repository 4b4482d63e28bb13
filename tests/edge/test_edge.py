"""An ONNX bundle gives the answers of its model, in another program, without PyTorch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from typer.testing import CliRunner

from openm6.cli import commands
from openm6.compress.convert import import_model
from openm6.core.batch import pad
from openm6.core.errors import ContextLengthError, OpenM6Error, UsageError
from openm6.core.images import ImageGrid
from openm6.core.sequence import SOURCE_BLOCKS
from openm6.core.tokenizer import Tokenizer
from openm6.edge.device import IMAGE_ENCODER
from openm6.edge.graph import Graph
from openm6.edge.package import export, quantize_bundle, smaller_variant_hint
from openm6.edge.program import main
from openm6.edge.runner import FORMAT, EdgeModel, ImageEncoder
from openm6.inference.session import Session
from openm6.model import M6
from openm6.model.cache import prefill, step
from openm6.tasks.library import get
from openm6.tasks.processor import Processor
from openm6.weights.directory import make_processor
from tests.conftest import EXPERTS, LLAMA3, YARN, ExactSession, drawing_session, example, tiny_config, tiny_model
from tests.edge.conftest import ASKED
from tests.tasks.conftest import picture
from tests.weights.test_chat_files import checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "layer", "activation": "gelu", "positions": "learned"},
        {"num_key_value_heads": 2, "qk_norm": True},
        {"tie_word_embeddings": False},
        {"num_hidden_layers": 4, "distinct_layers": 2},
        {"heads": {"number": 1}},
        {"qkv_bias": True, "rotary_scaling": YARN},
        {"rotary_scaling": LLAMA3},
    ],
)
def test_the_graph_is_the_network(changes: dict[str, Any]) -> None:
    """A prompt with a picture, and two tokens more, against prefill and step."""
    model = tiny_model(**changes)
    prompt = example(np.random.default_rng(0), 5, 1, ((2, 3),))
    graph = Graph(model)
    count, config = len(prompt), model.config
    blocks = torch.from_numpy(prompt.blocks)
    seen = torch.ones(count, count).tril().bool() | ((blocks[:, None] == blocks) & (blocks[:, None] >= 0))
    mask = torch.zeros(count, count).masked_fill(~seen, float("-inf"))
    places = torch.arange(prompt.pictures[0].start, prompt.pictures[0].start + prompt.pictures[0].patches)
    past = torch.zeros(0, config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
    with torch.no_grad():
        features = model.image(torch.from_numpy(prompt.pictures[0].pixels)[None])
        logits, state, past, *heads = graph(
            torch.from_numpy(prompt.ids).long(), features, places, torch.arange(count), mask, past
        )
        batch = pad([prompt], 0)
        hidden, cache = prefill(model, batch, count + 2)
        torch.testing.assert_close(state, hidden[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits, model.logits(hidden)[0], atol=1e-4, rtol=1e-4)
        if model.heads:
            torch.testing.assert_close(heads[0], model(batch).heads["number"][0], atol=1e-5, rtol=1e-4)
        none = (torch.zeros(0, config.hidden_size), torch.zeros(0, dtype=torch.int64))
        for place in (count, count + 1):
            hidden = step(model, torch.tensor([place]), cache)
            place_1 = torch.tensor([place])
            logits, _, new, *_ = graph(place_1, *none, place_1, torch.zeros(1, place + 1), past)
            past = torch.cat((past, new))
            torch.testing.assert_close(logits, model.logits(hidden)[0], atol=1e-4, rtol=1e-4)


def test_a_package_answers_what_the_model_answers(session: Session, package: Path) -> None:
    edge = EdgeModel(package)
    assert set(edge.tasks) == set(ASKED)
    for task, record in ASKED.items():
        expected, answer = session.run(task, **record), edge.answer(task, record)
        if isinstance(expected, np.ndarray):
            assert expected @ answer.value > 0.9999
            continue
        assert answer.value == expected
        assert 0 < answer.confidence <= 1
        prompt = session.prompt(session.task(task), record)
        score = session.generate(session.task(task), [prompt])[0]
        length = len(score.ids) + score.finished
        if prompt.constraint is None:
            assert np.log(answer.confidence) == pytest.approx(score.score / length, abs=1e-3)
    assert list(edge.run_many("vqa", [ASKED["vqa"]] * 2)) == [session.run("vqa", **ASKED["vqa"])] * 2
    assert len(edge.run("caption", max_new_tokens=2, **ASKED["caption"])) <= 16


@pytest.fixture(scope="module", params=SOURCE_BLOCKS)
def exported(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: Any) -> tuple[Session, EdgeModel]:
    """A model that reads a source in this way, and its package."""
    torch.manual_seed(3)
    config, place = tiny_config(vocab_size=tokenizer.vocab_size, source=request.param), tmp_path_factory.mktemp("read")
    made = ExactSession(M6(config).eval(), make_processor(config, tokenizer, 96), [get("vqa"), get("item_vector")])
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            parameter.mul_(3 if parameter.ndim == 2 and "image" not in name else 1)
    made.save(place / "model")
    export(place / "model", place / "package")
    return made, EdgeModel(place / "package")


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text("红色帽子是什么？", min_size=1, max_size=12), st.sampled_from([(16, 8), (24, 24), (40, 16)]))
def test_a_package_reads_a_source_as_its_model(exported: tuple[Session, EdgeModel], text: str, size: tuple) -> None:
    session, edge = exported
    assert edge.processor.source == session.model.config.source == edge.about["source"]
    record = {"photo": picture(*size), "question": text}
    found = edge.answer("vqa", record, max_new_tokens=5)
    with torch.no_grad():
        prompt = session.prompt(session.task("vqa"), record)
        state = session.model(pad([prompt], 0)).hidden[0, -1]
    np.testing.assert_allclose(found.state, state.numpy(), atol=1e-4, rtol=1e-3)
    assert found.value == session.run("vqa", decoding={"max_new_tokens": 5}, **record)
    vectors = [one.run("item_vector", photo=record["photo"], title=text) for one in (session, edge)]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-4)


@pytest.mark.parametrize("characters", [600, 6000])
def test_a_question_that_is_too_long_is_refused_as_the_model_refuses_it(
    characters: int, session: Session, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {**ASKED["vqa"], "question": "这" * (characters - 11) + ASKED["vqa"]["question"]}
    edge, told = EdgeModel(package), []
    for model in (session, edge):
        with pytest.raises(ContextLengthError) as refused:
            model.run("vqa", **long)
        told.append(str(refused.value))
    assert told[0] == told[1]
    # Both numbers: those of the question and of the model.
    assert re.search("takes 96 " if characters == 600 else "6,000 characters; a model of 96 positions", told[0])
    assert edge.run("vqa", truncate="start", **long) == session.run("vqa", truncate="start", **long)
    (tmp_path / "a.jpg").write_bytes(long["photo"])
    words = ["--package", str(package), "run", "vqa", f"photo={tmp_path / 'a.jpg'}", f"question={long['question']}"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and capsys.readouterr().err.strip() == told[0]
    main([*words, "--truncate", "start"])
    assert capsys.readouterr().out.strip() == edge.run("vqa", truncate="start", **long)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("question=什么商品？", 'question is given twice: "什么颜色？" and "什么商品？"'),
        ("=红色", '"=红色" is not of the form slot=value'), ("红色", '"红色" is not of the form slot=value'),
    ],
)  # fmt: skip
def test_a_slot_of_the_program_has_one_value(
    word: str, sentence: str, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--package", str(package), "run", "vqa", "question=什么颜色？", word])
    assert end.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize("bits", [8, 4])
def test_in_few_bits_it_is_smaller_and_nearly_the_same(bits: int, package: Path, tmp_path: Path) -> None:
    place = tmp_path / "few"
    about = quantize_bundle(package, place, bits)
    assert about["bits"] == bits
    sizes = [sum((one / f"{name}.onnx").stat().st_size for name in ("model", "picture")) for one in (package, place)]
    assert sizes[1] < 0.6 * sizes[0]  # so small a network is half names of operations
    assert about["graph_bytes"]["32"] == sizes[0] and about["graph_bytes"][str(bits)] == sizes[1]
    # No weight is stored twice: the output matrix, which is the embedding too, stays in 8 bits.
    names = {one.name for one in onnx.load(place / "model.onnx").graph.initializer}
    assert "head_DV.int8" in names and not {"head_DV", "head_DV_Q4"} & names
    assert any(name.endswith("_Q4") for name in names) == (bits == 4)
    whole, few = EdgeModel(package), EdgeModel(place)
    vectors = [one.run("item_vector", **ASKED["item_vector"]) for one in (whole, few)]
    assert vectors[0] @ vectors[1] > (0.99 if bits == 8 else 0.9)
    assert few.run("text_classification", text="很好") in ("好", "不好", "还行")
    with pytest.raises(UsageError, match=f"has {bits} bits"):
        quantize_bundle(place, tmp_path / "never", 4)


def test_an_export_in_few_bits_is_the_bundle_of_the_same_model_rounded(
    model: Path, package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In 4 bits, which measures 8 too."""
    exported, rounded = tmp_path / "exported", tmp_path / "rounded"
    about = export(model, exported, 4)
    assert bool(smaller_variant_hint(about)) == ("bits gain nothing here" in caplog.text)
    assert quantize_bundle(package, rounded, 4) == about
    files = [sorted(file.relative_to(one) for file in one.rglob("*")) for one in (exported, rounded)]
    assert files[0] == files[1] and (exported / "edge.json").read_bytes() == (rounded / "edge.json").read_bytes()
    vectors = [EdgeModel(one).run("item_vector", **ASKED["item_vector"]) for one in (exported, rounded)]
    assert (vectors[0] == vectors[1]).all()


def test_other_shapes_are_rounded_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """An output apart from the embedding, learned positions, biases; pictures by patches."""
    torch.manual_seed(2)
    config = tiny_config(vocab_size=tokenizer.vocab_size, norm="layer", activation="gelu", positions="learned",
                         tie_word_embeddings=False)  # fmt: skip
    other = ExactSession(
        M6(config).eval(), Processor(tokenizer, ImageGrid(8, 16), 96), [get("item_vector"), get("caption")]
    )
    other.save(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "package", 8)
    edge = EdgeModel(tmp_path / "package")
    assert edge.run("item_vector", **ASKED["item_vector"]) @ other.run("item_vector", **ASKED["item_vector"]) > 0.99
    assert isinstance(edge.run("caption", max_new_tokens=3, **ASKED["caption"]), str)


def test_the_program_needs_neither_pytorch_nor_this_package(package: Path, session: Session, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(ASKED["caption"]["photo"])
    (tmp_path / "start.py").write_text(
        "import runpy, sys\n"
        "for name in ('torch', 'transformers'):\n    sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )

    def call(*words: object) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-I", str(tmp_path / "start.py"), str(package / "openm6-edge")]
        return subprocess.run([*start, *map(str, words)], capture_output=True, text=True, cwd=tmp_path)

    told = call("--json", "run", "caption", "photo=a.jpg")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["value"] == session.run("caption", photo=ASKED["caption"]["photo"])
    about = json.loads(call("about").stdout)
    assert about["bytes"] > 1000 and about["start_seconds"] > 0
    assert "vqa: photo, question -> answer" in call("tasks").stdout.splitlines()
    for code, words, sentence in (
        (2, ("run", "vqaa"), 'Did you mean "vqa"?'), (2, ("run", "vqa", "photo=a.jpg"), "question is missing"),
        (2, ("run", "vqa", "photo"), "not of the form slot=value"), (1, ("run", "caption", "photo=b.jpg"), "b.jpg"),
        (2, ("--package", tmp_path, "tasks"), "it has no edge.json"),
    ):  # fmt: skip
        wrong = call(*words)
        assert wrong.returncode == code and sentence in wrong.stderr and "Traceback" not in wrong.stderr


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_file_that_is_not_the_one_that_was_exported_is_refused_by_its_name(package: Path, tmp_path: Path) -> None:
    files = sorted(file.name for file in package.iterdir())
    assert {"model.onnx", "picture.onnx", "tokenizer.json", "openm6.json", "openm6-edge", "edge.json"} <= set(files)
    for name in files:
        place = Path(shutil.copytree(package, tmp_path / f"flipped-{name}"))
        if name == "edge.json":
            text = (place / name).read_text("utf-8")
            (place / name).write_text(text.replace('"stride": 8', '"stride": 4'), "utf-8")
        else:
            _flip(place / name)
        with pytest.raises(OpenM6Error, match=f"is damaged: {name} is not"):
            EdgeModel(place)
        (place / name).unlink()
        with pytest.raises(OpenM6Error, match=name):
            EdgeModel(place)


def test_parts_of_two_packages_are_refused(package: Path, made: Path, tmp_path: Path) -> None:
    """The pictures' graph of a package in few bits beside the network of one in 32, and the other way around."""
    quantize_bundle(package, tmp_path / "other", 8)
    mixed = Path(shutil.copytree(package, tmp_path / "mixed"))
    shutil.copy(tmp_path / "other/picture.onnx", mixed)
    with pytest.raises(OpenM6Error, match="picture.onnx is not the file that was exported"):
        EdgeModel(mixed)
    with pytest.raises(OpenM6Error, match="picture.onnx is not the file that was exported"):
        quantize_bundle(mixed, tmp_path / "never", 8)
    shutil.copytree(made / IMAGE_ENCODER, tmp_path / "image_encoder")
    assert ImageEncoder(tmp_path / "image_encoder").name == EdgeModel(package).image_encoder.name
    shutil.copy(tmp_path / "other/picture.onnx", tmp_path / "image_encoder")
    with pytest.raises(OpenM6Error, match="picture.onnx is not the file that was exported"):
        ImageEncoder(tmp_path / "image_encoder")


def test_a_package_of_another_format_is_refused(package: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(package, tmp_path / "package"))
    about = json.loads((place / "edge.json").read_text("utf-8"))
    for found, told in ((None, 1), (FORMAT + 1, FORMAT + 1)):
        about["format"] = found
        (place / "edge.json").write_text(json.dumps({k: v for k, v in about.items() if v is not None}), "utf-8")
        with pytest.raises(UsageError, match=f"has the format {told}, and this program reads the format {FORMAT}"):
            EdgeModel(place)


def test_bits_that_gain_nothing_are_told() -> None:
    bytes_of = {"32": 900, "8": 300, "4": 300}
    assert "take 300 bytes, and 300 in 8 bits (--bits 8)" in smaller_variant_hint({"bits": 4, "graph_bytes": bytes_of})
    assert "and 900 in 32 bits (no --bits)" in smaller_variant_hint({"bits": 8, "graph_bytes": {"32": 900, "8": 901}})
    for bits, sizes in ((4, {"32": 900, "8": 300, "4": 200}), (8, {"32": 900, "8": 300}), (None, {"32": 900})):
        assert smaller_variant_hint({"bits": bits, "graph_bytes": sizes}) == ""


def test_nothing_of_the_machine_is_in_it(package: Path) -> None:
    for name in ("model.onnx", "picture.onnx", "edge.json"):
        assert str(Path(torch.__file__).parents[1]).encode() not in (package / name).read_bytes()
        assert b"openm6/edge" not in (package / name).read_bytes()


def test_what_cannot_be_is_told(model: Path, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(commands(), ["models", "export", str(model), str(package)])
    assert isinstance(result.exception, UsageError)  # it is there already
    with pytest.raises(UsageError, match="bits is 3"):
        export(model, tmp_path / "never", 3)
    sparse = Session(M6(tiny_config(vocab_size=700, **EXPERTS)), drawing_session().processor, [get("caption")])
    sparse.save(tmp_path / "sparse")
    with pytest.raises(UsageError, match="has experts"):
        export(tmp_path / "sparse", tmp_path / "never")
    drawing_session().save(tmp_path / "draws")
    with pytest.raises(UsageError, match="can do no task"):
        export(tmp_path / "draws", tmp_path / "never")
    assert not (tmp_path / "never").exists()
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in package.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 2000 if file.name == "model.onnx" else None])
    with pytest.raises(OpenM6Error, match="damaged"):
        EdgeModel(broken)
    (broken / "edge.json").write_text("{")
    with pytest.raises(SystemExit) as end:
        main(["--package", str(broken), "tasks"])
    assert end.value.code == 1 and "damaged" in capsys.readouterr().err


def test_a_bundle_takes_the_chat_template_along(tmp_path: Path) -> None:
    """It asks as the model does, and the program has no transformers."""
    checkpoint(tmp_path / "theirs", "headers")
    import_model(tmp_path / "theirs", tmp_path / "m6", "none", 0, 256)
    session = Session.load(tmp_path / "m6", "cpu", trainable=True)
    labels = get("text_classification").with_labels({"label": ["yes", "no"]})
    tasks = [labels, get("summary"), get("chat")]
    made = ExactSession(session.model, session.processor, tasks)
    made.save(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "bundle")
    edge = EdgeModel(tmp_path / "bundle")
    turns = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "a"},
    ]
    asked = {"text_classification": {"text": "the cat"}, "summary": {"passage": "the dog"}, "chat": {"messages": turns}}
    for name, record in asked.items():
        found = edge.answer(name, record, max_new_tokens=8)
        assert found.value == made.run(name, decoding={"max_new_tokens": 8}, **record)
    program = [sys.executable, str(tmp_path / "bundle" / "openm6-edge"), "run", "text_classification", "text=the cat"]
    done = subprocess.run(program, check=True, text=True, capture_output=True)
    assert done.stdout.strip() in ("yes", "no")
