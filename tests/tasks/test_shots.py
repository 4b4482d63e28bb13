"""Examples before a record: the same tokens that answers are learned as, all of them source."""

from __future__ import annotations

import numpy as np
import pytest

from openm6.core.errors import DataError, UsageError
from openm6.core.sequence import IGNORE, SOURCE
from openm6.tasks.encode import encode_example, encode_prompt
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from tests.tasks.conftest import picture

TASK = Task.from_instruction("[image:photo] [text:question] -> [text:answer]")
RECORDS = [{"photo": picture(seed=n), "question": "什么" + "?" * n, "answer": word} for n, word in enumerate("红黄蓝")]


def wide(processor: Processor, length: int = 256) -> Processor:
    return Processor(processor.tokenizer, processor.grid, length)


def test_examples_stand_before_with_their_answers(processor: Processor) -> None:
    processor = wide(processor)
    tokenizer = processor.tokenizer
    alone = [encode_example(TASK, record, processor) for record in RECORDS]
    found = encode_example(TASK, RECORDS[2], processor, shots=RECORDS[:2])
    expected = [i for one in alone[:2] for i in (*one.ids.tolist(), tokenizer.end_id)] + alone[2].ids.tolist()
    assert found.ids.tolist() == expected and len(found.pictures) == 3
    own = len(alone[2])
    assert (found.blocks[: len(found) - own] == SOURCE).all() and (found.labels[: len(found) - own] == IGNORE).all()
    assert found.labels[-own:].tolist() == alone[2].labels.tolist()
    for shown, one in zip(found.pictures, alone, strict=True):
        assert np.array_equal(shown.pixels, one.pictures[0].pixels)
        assert (found.ids[shown.start : shown.start + shown.patches] == tokenizer.patch_id).all()


def test_training_leaves_out_the_first_of_too_many_and_use_tells(processor: Processor) -> None:
    length = (
        len(encode_example(TASK, RECORDS[2], wide(processor)))
        + len(encode_example(TASK, RECORDS[1], wide(processor)))
        + 3
    )
    tight = wide(processor, length)
    found = encode_example(TASK, RECORDS[2], tight, np.random.default_rng(0), shots=RECORDS[:2])
    assert len(found.pictures) == 2
    for shots, fit in ((RECORDS[:2], "the last 1 of them fit"), (RECORDS[:2] * 2, "the last 1 of them fit")):
        with pytest.raises(DataError, match=f"{len(shots)} examples and the record do not fit: .* {fit}"):
            encode_prompt(TASK, RECORDS[2], tight, shots=shots)
    encode_prompt(TASK, RECORDS[2], tight, shots=RECORDS[1:2])
    tight = wide(processor, len(encode_example(TASK, RECORDS[2], wide(processor))) + 3)
    with pytest.raises(DataError, match="2 examples and the record do not fit: .* none of them fits"):
        encode_prompt(TASK, RECORDS[2], tight, shots=RECORDS[:2])


def test_tasks_that_answer_in_no_words_take_none(processor: Processor) -> None:
    task = Task.from_instruction("[text:a] -> [vector:v]")
    with pytest.raises(UsageError, match="takes no examples"):
        encode_example(task, {"a": "红"}, processor, shots=[{"a": "蓝"}])


def test_a_bad_example_is_told(processor: Processor) -> None:
    with pytest.raises(DataError, match="answer is missing"):
        encode_example(TASK, RECORDS[0], wide(processor), shots=[{"photo": picture(), "question": "?"}])
