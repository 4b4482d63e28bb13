"""Every task of the library does what it says, on its own example."""

from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from openm6.core.errors import UsageError
from openm6.core.sequence import CAUSAL, IGNORE, SOURCE, SketchTarget
from openm6.inference import Decoding
from openm6.inference.draw import Drawing
from openm6.model.codec import Codec, CodecConfig
from openm6.tasks.encode import encode_example, encode_prompt
from openm6.tasks.grammar import Slot
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
    assert task.name == name and task.description and task.metrics
    assert set(task.slots) - set(task.example) <= {s.name for s in task.slots.values() if s.is_grouped}
    processor = Processor(processor.tokenizer, processor.grid, 512)
    for seed in range(6):
        found = encode_example(task, example(task), processor, np.random.default_rng(seed))
        answer = task.read(found.labels[found.labels != IGNORE].tolist(), processor)
        assert list(answer) == list(task.outputs) and all(answer.values())
    prompt = encode_prompt(task, example(task), processor)
    assert prompt.ids[-1] == processor.tokenizer.answer_id
    assert Decoding.of(**task.decode).max_new_tokens >= 16
    assert task_from_dict(task.to_dict()) == task
    assert set(task.schema()["inputs"]["properties"]) == set(task.inputs)


ENGLISH = [name for name in names() if name.endswith("_en")]
FEW = {
    "language_modelling", "text_denoising", "image_captioning", "image_text_denoising", "masked_captioning", "caption",
    "chat", "vqa", "ocr", "grounding", "product_attributes", "placed_attributes", "located_attributes",
    "worn_attributes",
}  # fmt: skip
"""Pretraining objectives, which have no words, and tasks on pictures that classify nothing."""


@pytest.mark.parametrize("name", [name for name in names() if name in PLAIN or get(name).sketch])
def test_a_task_has_six_different_instructions(name: str) -> None:
    instructions = get(name).instructions
    assert name in FEW or len({(one.source, one.target) for one in instructions}) == len(instructions) >= 6


@pytest.mark.parametrize("name", [name for name in PLAIN if any(s.type == "label" for s in get(name).slots.values())])
def test_classification_names_its_classes(processor: Processor, name: str) -> None:
    """But for the attributes of a picture, whose sets are those of the data."""
    task = get(name)
    if name in FEW:
        return
    label = task.outputs[0]
    labels = task.labels.get(label) or ("好评", "差评")
    task = task.with_labels({label: labels})
    tokenizer = processor.tokenizer
    processor = Processor(tokenizer, processor.grid, 512)
    record = {name: value for name, value in example(task).items() if name != "choices"} | {label: labels[0]}
    mark = ", " if all(map(str.isascii, labels)) else "、"
    for instruction in task.instructions:
        (slot,) = (part for part in instruction.source if isinstance(part, Slot) and part.type == "choices")
        ids = encode_prompt(replace(task, instructions=(instruction,)), record, processor).ids.tolist()
        assert slot.of == label and mark.join(labels) in tokenizer.decode(ids)


@pytest.mark.parametrize("name", [name for name in names() if any(s.is_optional for s in get(name).slots.values())])
def test_what_is_left_out_leaves_no_words(processor: Processor, name: str) -> None:
    """With every subset of the optional slots the prompt is that of an instruction without the others, in each of the
    task's instructions."""
    codec = PictureCodec(Codec(CodecConfig(image_size=16, widths=[8, 16], patch=2, levels=[4, 4], depth=1)))
    processor = Processor(processor.tokenizer, processor.grid, 1024, codec)
    # Choices are the record's here: labels that the task knows are listed without it.
    task = replace(get(name), labels={})
    record = {name: "七" for name in task.slots} | {"choices": ["七", "八"]} | example(task)
    optional = [name for name in task.inputs if task.slots[name].is_optional]
    for count, instruction in product(range(len(optional) + 1), task.instructions):
        for kept in combinations(optional, count):
            given = {name: value for name, value in record.items() if name not in optional or name in kept}
            source = tuple(p for p in instruction.source if isinstance(p, str) or p.name in given)
            whole, shorter = (
                encode_prompt(replace(task, instructions=(one,)), given, processor).ids
                for one in (instruction, replace(instruction, source=source))
            )
            assert np.array_equal(whole, shorter)


@pytest.mark.parametrize("name", ENGLISH)
def test_an_english_task_is_the_chinese_one_in_other_words(name: str) -> None:
    task, other = get(name), get(name.removesuffix("_en"))
    assert {n: s.type for n, s in task.slots.items() if s.type != "choices"} == {
        n: s.type for n, s in other.slots.items() if s.type != "choices"
    }
    assert (task.metrics, task.aliases, task.outputs) == (other.metrics, other.aliases, other.outputs)
    assert all(map(str.isascii, task.texts())) and set(task.example) >= set(task.outputs)


@pytest.mark.parametrize("name", [name for name in names() if not get(name).converses])
def test_a_causal_source_changes_the_blocks_of_the_source_alone(processor: Processor, name: str) -> None:
    """Drafts of a sketch, and codes of a picture that are learned by masks, go on seeing each other both ways."""
    task = get(name)
    codec = PictureCodec(Codec(CodecConfig(image_size=16, widths=[8, 16], patch=2, levels=[4, 4], depth=1)))
    both = replace(processor, max_length=1024, codec=codec)
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
