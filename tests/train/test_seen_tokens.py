"""Tokens that a model has not met: they are written down, and LoRA trains their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from openm6.cli import commands
from openm6.compress.convert import quantize_model
from openm6.core.batch import pad
from openm6.core.errors import OpenM6Error
from openm6.inference.session import Session
from openm6.model.cache import prefill
from openm6.model.files import load_model
from openm6.tasks.card import read_seen_tokens
from openm6.train.trainer import train
from tests.train.conftest import SIZES, PowerCutError, cut_at, losses, tiny_recipe

ROWS = "base_model.model.embed.token_adapter.trainable_tokens_delta"
TASK = "words"
"""A task without its classes, whose new words would be in every prompt."""
KNOWN, NEW = "红黄蓝绿", "鱼鸟马牛"


def written(folder: Path, words: str) -> str:
    """Texts that say one of four words, and which."""
    lines = [{"text": f"一{word}二", "label": word} for word in words]
    (folder / f"{words}.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    return str(folder / f"{words}.jsonl")


def task_file(folder: Path) -> str:
    (folder / f"{TASK}.yaml").write_text("instruction: '[text:text] 这段文字属于哪一类? -> [label:label]'\n", "utf-8")
    return str(folder / f"{TASK}.yaml")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    data = [{"source": written(folder, KNOWN), "task": task_file(folder)}]
    sizes = {**SIZES, "tie_word_embeddings": request.param, "image_embedder": "none"}
    recipe = tiny_recipe(
        folder / "run", data=data, model={"preset": "demo", "sizes": sizes}, steps=60, learning_rate=1e-2,
        checkpoint_every=60,
    )  # fmt: skip
    recipe.tokenizer.vocab_size, recipe.tokenizer.characters, recipe.tokenizer.max_token_length = 3072, 2048, 1
    return train(recipe)


def adapting(base: Path, output: Path, words: str, method: str = "lora", **changes: Any) -> Any:
    output.parent.mkdir(parents=True, exist_ok=True)
    data = [{"source": written(output.parent, words), "task": task_file(output.parent)}]
    settings = {"learning_rate": 2e-2, "steps": 120, "checkpoint_every": 60, **changes}
    return tiny_recipe(output, model={"path": str(base)}, adapt={"method": method, "rank": 4}, data=data, **settings)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return train(adapting(base, folder / "run", NEW, steps=300, checkpoint_every=300))


def ids_of(session: Session, words: str) -> set[int]:
    return {number for word in words for number in session.processor.tokenizer.encode(word)}


def state(session: Session, word: str) -> torch.Tensor:
    """Logits at the beginning of the answer."""
    prompt = session.prompt(session.task(TASK), {"text": f"一{word}二"})
    with torch.inference_mode(), session.precision(), torch.autocast("cpu", enabled=False):
        found, _ = prefill(session.model, pad([prompt], 0), len(prompt) + 4)
        return session.model.logits(found)[0]


@pytest.mark.slow
def test_a_model_says_what_it_has_met_in_training(base: Path, adapter: Path, tmp_path: Path) -> None:
    session = Session.load(base, "cpu", trainable=True)
    taught = read_seen_tokens(base)
    assert taught is not None and ids_of(session, KNOWN) <= taught and not ids_of(session, NEW) & taught
    assert {session.processor.tokenizer.answer_id, session.processor.tokenizer.end_id} <= taught
    assert read_seen_tokens(adapter) == taught | ids_of(session, NEW)
    quantize_model(adapter, tmp_path / "few", 8)
    assert read_seen_tokens(tmp_path / "few") == read_seen_tokens(adapter)
    data = [{"source": written(tmp_path, NEW), "task": task_file(tmp_path)}]
    more = tiny_recipe(tmp_path / "more", data=data, model={"path": str(base)}, steps=4, checkpoint_every=2)
    with pytest.raises(PowerCutError):
        train(more, cut_at(3))
    assert read_seen_tokens(train(more)) == read_seen_tokens(adapter)


@pytest.mark.slow
def test_words_that_are_new_to_the_model_are_learned_by_lora(base: Path, adapter: Path) -> None:
    told = losses(adapter.parent)
    assert told[max(told)] < 0.2 * told[1]
    session = Session.load(adapter, "cpu")
    assert sum(session.run(TASK, text=f"一{word}二") == word for word in NEW) >= 3
    weights = load_file(adapter / "adapter_model.safetensors")
    rows = sorted(ids_of(session, NEW))
    before, after = (Session.load(path, "cpu", trainable=True).model for path in (base, adapter))
    others = [number for number in range(before.config.vocab_size) if number not in rows]
    for name in ("embed",) if before.head is None else ("embed", "head"):
        old, new = (model.get_parameter(f"{name}.weight") for model in (before, after))
        assert torch.equal(new[rows], weights[ROWS.replace("embed", name)]) and torch.equal(new[others], old[others])
        assert bool((new[rows] != old[rows]).any(1).all())


def test_words_that_it_knows_take_no_rows(base: Path, tmp_path: Path) -> None:
    adapter = train(adapting(base, tmp_path / "run", KNOWN, steps=1))
    assert not [name for name in load_file(adapter / "adapter_model.safetensors") if "token" in name]


def test_marks_that_it_has_not_met_have_rows_too(base: Path, tmp_path: Path) -> None:
    recipe = adapting(base, tmp_path / "run", KNOWN, steps=1)
    recipe.data[0].task = "text_denoising"
    content = json.loads((train(recipe) / "adapter_config.json").read_text("utf-8"))
    rows, tokenizer = content["trainable_token_indices"]["embed"], Session.load(base, "cpu").processor.tokenizer
    assert tokenizer.mask_id in rows and tokenizer.table_id not in rows


@pytest.mark.slow
def test_peft_reads_the_rows(base: Path, adapter: Path) -> None:
    theirs = PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload().state_dict()
    ours = Session.load(adapter, "cpu", trainable=True).model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [True, False])
def test_beside_a_model_each_adapter_has_its_own_rows(
    base: Path, adapter: Path, tmp_path: Path, trainable: bool
) -> None:
    other = train(adapting(base, tmp_path / "other", NEW[::-1] + "羊", steps=20, checkpoint_every=20))
    shared = Session.load(base, "cpu", trainable, adapters={"one": adapter, "two": other})
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if trainable else {"atol": 0.1, "rtol": 0.05}
    for name, path in (("one", adapter), (None, base), ("two", other)):
        for word in (NEW[0], KNOWN[0]):
            torch.testing.assert_close(
                state(shared.adapter(name), word), state(Session.load(path, "cpu", trainable), word), **tolerance
            )


def test_an_interrupted_run_goes_on_bit_for_bit(base: Path, tmp_path: Path) -> None:
    whole, cut = (adapting(base, tmp_path / name, NEW, steps=6, checkpoint_every=3) for name in ("whole", "cut"))
    expected = load_file(train(whole) / "adapter_model.safetensors")
    with pytest.raises(PowerCutError):
        train(cut, cut_at(4))
    found = load_file(train(cut) / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def test_other_adapters_say_what_they_leave_out(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(adapting(base, tmp_path / "ia3", NEW, "ia3", steps=1))
    told = " ".join(capsys.readouterr().err.split())
    assert (
        "The model has not seen 4 tokens" in told and "which ia3 leaves as they are: lora and full train them" in told
    )


def test_merged_it_is_a_model_like_any(adapter: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(commands(), ["models", "merge", str(adapter), str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(
        state(Session.load(tmp_path / "merged", "cpu", True), NEW[0]), state(Session.load(adapter, "cpu", True), NEW[0])
    )


def test_a_card_that_is_no_mapping_is_damaged(tmp_path: Path) -> None:
    for content in ("5", "[1]", '{"format": 1, "seen_tokens": 7}'):
        (tmp_path / "openm6.json").write_text(content, "utf-8")
        with pytest.raises(OpenM6Error, match="openm6.json is damaged"):
            read_seen_tokens(tmp_path)
