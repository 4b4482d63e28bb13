"""Every task of the library does what it says, on its own example."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from openm6.core.errors import UsageError
from openm6.core.sequence import CAUSAL, IGNORE, SOURCE, SketchTarget
from openm6.inference import Decoding
from openm6.inference.draw import Drawing
from openm6.model.codec import Codec, CodecConfig
from openm6.tasks.encode import encode_example, encode_prompt
from openm6.tasks.library import get, names, task_from_dict
from openm6.tasks.pictures import PictureCodec
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from tests.tasks.conftest import picture

FIRST = {
    "text_denoising", "language_modelling", "image_captioning", "image_text_denoising", "masked_captioning", "caption",
    "vqa", "image_classification", "text_continuation", "infilling", "title", "text_classification",
}  # fmt: skip


def example(task: Task) -> dict:
    return {name: picture() if task.slots[name].type == "image" else value for name, value in task.example.items()}


def test_the_first_dozen_is_there() -> None:
    assert set(names()) >= FIRST


@pytest.mark.parametrize("name", [name for name in names() if get(name).draws])
def test_a_task_that_draws_works_on_its_example(processor: Processor, name: str) -> None:
    task = get(name)
    assert task.description and task.metrics == ("perplexity",) and set(task.example) == set(task.slots)
    codec = PictureCodec(Codec(CodecConfig(image_size=16, widths=[8, 16], patch=2, levels=[4, 4], depth=1)))
    processor = Processor(processor.tokenizer, processor.grid, 128, codec)
    for seed in range(6):
        found = encode_example(task, example(task), processor, np.random.default_rng(seed))
        assert (found.labels != IGNORE).any()
    assert encode_prompt(task, example(task), processor).ids[-1] == processor.tokenizer.image_id
    assert Drawing.of(**task.decode).guidance > 0
    assert task_from_dict(task.to_dict()) == task


@pytest.mark.parametrize("name", [name for name in names() if get(name).embeds])
def test_a_task_that_gives_a_vector_works_on_its_example(processor: Processor, name: str) -> None:
    task = get(name)
    assert task.description and "recall@1" in task.metrics and set(task.example) == set(task.slots)
    for rng in (None, np.random.default_rng(0)):
        found = encode_example(task, example(task), processor, rng)
        assert found.ids[-1] == processor.tokenizer.answer_id and not (found.labels != IGNORE).any()
    assert task_from_dict(task.to_dict()) == task


@pytest.mark.parametrize("name", [name for name in names() if get(name).sketch])
def test_a_task_that_is_written_from_a_sketch_works_on_its_example(processor: Processor, name: str) -> None:
    task = get(name)
    assert task.description and task.metrics and set(task.example) == set(task.slots)
    processor = Processor(processor.tokenizer, processor.grid, 256)
    for seed in range(8):
        found = encode_example(task, example(task), processor, np.random.default_rng(seed))
        assert (found.labels != IGNORE).any()
    prompt = encode_prompt(task, example(task), processor)
    assert isinstance(prompt.target, SketchTarget) and prompt.ids[-1] == processor.tokenizer.answer_id
    assert task_from_dict(task.to_dict()) == task


PLAIN = [name for name in names() if not (get(name).draws or get(name).embeds or get(name).sketch)]


@pytest.mark.parametrize("name", PLAIN)
def test_a_task_works_on_its_example(processor: Processor, name: str) -> None:
    task = get(name)
    assert task.name == name and task.description and task.metrics and set(task.example) == set(task.slots)
    processor = Processor(processor.tokenizer, processor.grid, 128)
    for seed in range(6):
        found = encode_example(task, example(task), processor, np.random.default_rng(seed))
        answer = task.read(found.labels[found.labels != IGNORE].tolist(), processor)
        assert list(answer) == list(task.outputs) and all(answer.values())
    prompt = encode_prompt(task, example(task), processor)
    assert prompt.ids[-1] == processor.tokenizer.answer_id
    assert Decoding.of(**task.decode).max_new_tokens >= 16
    assert task_from_dict(task.to_dict()) == task
    assert set(task.schema()["inputs"]["properties"]) == set(task.inputs)


@pytest.mark.parametrize("name", [name for name in names() if not get(name).converses])
def test_a_causal_source_changes_the_blocks_of_the_source_alone(processor: Processor, name: str) -> None:
    """Drafts of a sketch, and codes of a picture that are learned by masks, go on seeing each other both ways."""
    task = get(name)
    codec = PictureCodec(Codec(CodecConfig(image_size=16, widths=[8, 16], patch=2, levels=[4, 4], depth=1)))
    both = replace(processor, max_length=512, codec=codec)
    shots = [] if task.draws or task.produces_no_tokens or task.sketch else [example(task)]
    for encode in (encode_prompt, lambda *x, **y: encode_example(*x, rng=np.random.default_rng(len(name)), **y)):
        one, other = (encode(task, example(task), way, shots=shots) for way in (both, replace(both, source="causal")))
        assert SOURCE in one.blocks and SOURCE not in other.blocks
        assert np.array_equal(other.blocks, np.where(one.blocks == SOURCE, CAUSAL, one.blocks))
        assert np.array_equal(other.ids, one.ids) and np.array_equal(other.labels, one.labels)


def test_a_task_is_found_by_name_path_or_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("instruction: '[image:photo] -> [text:poem]'\n", "utf-8")
    assert get("vqa") is get("vqa")
    assert get(tmp_path / "mine.yaml").outputs == ("poem",) and get(str(tmp_path / "mine.yaml")).name == "mine"
    assert get("[image:photo] 写诗 -> [text:poem]").inputs == ("photo",)


def test_an_unknown_task_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r'There is no task "captoin"\. Did you mean "caption"'):
        get("captoin")
    with pytest.raises(UsageError, match="cannot be read"):
        get("nowhere.yaml")
