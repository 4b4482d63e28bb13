"""Pictures that are drawn: their codes in a sequence, masked or one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openm6.core.errors import DataError, UsageError
from openm6.core.images import ImageGrid
from openm6.core.sequence import CAUSAL, IGNORE, SOURCE
from openm6.core.tokenizer import Tokenizer
from openm6.model.codec import Codec, CodecConfig
from openm6.tasks.drawn import VERDICT_WEIGHT, draw_mask
from openm6.tasks.encode import encode_example, encode_prompt
from openm6.tasks.pictures import PictureCodec
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task

TASK = Task.from_instruction("画: [text:caption|drop=0.1] -> [image:picture]", "drawing")


@pytest.fixture(scope="module")
def processor() -> Processor:
    torch.manual_seed(0)
    codec = Codec(CodecConfig(image_size=16, widths=[8, 16], patch=2, levels=[4, 4], depth=1))
    return Processor(Tokenizer.train(["红色的杯子", "画: "], 600, 16), ImageGrid(8, 4), 64, PictureCodec(codec))


def record() -> dict[str, object]:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return {"caption": "红色的杯子", "picture": picture}


def codes_of(processor: Processor) -> np.ndarray:
    assert processor.codec is not None
    codes: np.ndarray = processor.tokenizer.code_start + processor.codec.encode(record()["picture"])  # type: ignore[arg-type]
    return codes


def test_codes_follow_one_another_when_measured(processor: Processor) -> None:
    sequence, codes = encode_example(TASK, record(), processor), codes_of(processor)
    tokenizer = processor.tokenizer
    assert sequence.ids[-18:].tolist() == [tokenizer.answer_id, tokenizer.image_id, *codes]
    assert sequence.labels[-18:].tolist() == [tokenizer.image_id, *codes, tokenizer.end_id]
    assert set(sequence.blocks[:-18]) == {SOURCE}
    assert set(sequence.blocks[-18:]) == {CAUSAL}


def test_in_training_four_in_ten_are_learned_by_masks(processor: Processor) -> None:
    rng, codes, tokenizer = np.random.default_rng(0), codes_of(processor), processor.tokenizer
    masked = 0
    for _ in range(200):
        sequence = encode_example(TASK, record(), processor, rng)
        if sequence.blocks[-1] == CAUSAL:
            assert sequence.labels[-1] == tokenizer.end_id
            continue
        masked += 1
        assert (sequence.blocks[-16:] == 1).all()
        assert sequence.blocks[-17] == CAUSAL
        assert (sequence.labels[:-16] == IGNORE).all()
        open_ = sequence.ids[-16:] == tokenizer.mask_id
        assert open_.any()
        assert np.array_equal(np.where(open_, sequence.labels[-16:], sequence.ids[-16:]), codes)
        assert (sequence.labels[-16:][~open_] == IGNORE).all()
    assert 0.3 < masked / 200 < 0.5


def test_a_prompt_ends_where_codes_begin(processor: Processor) -> None:
    with_text = encode_prompt(TASK, {"caption": "红色的杯子"}, processor)
    without = encode_prompt(TASK, {}, processor)
    tokenizer = processor.tokenizer
    for prompt in (with_text, without):
        assert prompt.ids[-2:].tolist() == [tokenizer.answer_id, tokenizer.image_id]
        assert (prompt.labels == IGNORE).all()
        assert prompt.blocks[-2:].tolist() == [CAUSAL, CAUSAL]
    assert len(without) < len(with_text)


def test_masks_are_of_all_kinds() -> None:
    rng = np.random.default_rng(0)
    masks = [draw_mask(6, rng) for _ in range(400)]
    assert all(mask.shape == (6, 6) and mask.any() for mask in masks)
    whole = sum(bool(mask.all()) for mask in masks)
    assert 30 < whole < 110

    def box(mask: np.ndarray) -> bool:
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        return bool(mask.any()) and bool(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())

    inside = sum(box(mask) and not mask.all() for mask in masks)
    outside = sum(box(~mask) and not mask.all() for mask in masks)
    assert inside > 40
    assert outside > 40
    assert len({int(mask.sum()) for mask in masks}) > 20


def test_codes_are_remembered_and_drawn_back(processor: Processor) -> None:
    codec = processor.codec
    assert codec is not None
    first = codec.encode(record()["picture"])  # type: ignore[arg-type]
    assert np.array_equal(codec.encode(record()["picture"]), first)  # type: ignore[arg-type]
    picture = TASK.read([processor.tokenizer.image_id, *codes_of(processor), processor.tokenizer.end_id], processor)
    assert picture["picture"].size == (16, 16)
    assert np.array_equal(np.asarray(picture["picture"]), np.asarray(codec.decode(first)))


def test_what_cannot_be_drawn_is_told(processor: Processor) -> None:
    bare = Processor(processor.tokenizer, processor.grid, 64)
    with pytest.raises(UsageError, match="this model has no image codec"):
        encode_example(TASK, record(), bare)
    with pytest.raises(DataError, match=r"picture: has to be a picture .*, not int"):
        encode_example(TASK, {**record(), "picture": 3}, processor)
    short = Processor(processor.tokenizer, processor.grid, 20, processor.codec)
    with pytest.raises(DataError, match=r"the 16 codes of a picture do not fit: the model takes 20 positions"):
        encode_example(TASK, record(), short)
    with pytest.raises(UsageError, match="stands alone on the right side"):
        Task.from_instruction("[text:caption] -> 好的 [image:picture]")


def test_a_record_with_verdicts_is_judged_whole(processor: Processor) -> None:
    codes, tokenizer = codes_of(processor), processor.tokenizer
    rng = np.random.default_rng(0)
    for number in range(40):
        given = {**record(), "verdict_fidelity": 0, "verdict_quality": "true"}
        found = encode_example(TASK, given, processor, rng if number else None)
        assert len(found) == len(encode_example(TASK, record(), processor)) + 3  # nothing is dropped
        assert found.image is not None and found.image.weight == VERDICT_WEIGHT
        assert found.ids[-19:].tolist() == [*codes, *tokenizer.estimate_ids]
        assert (found.blocks[-19:] == 1).all()
        assert found.labels[-3:].tolist() == [IGNORE, tokenizer.no_id, tokenizer.yes_id]
        assert (found.labels[:-3] == IGNORE).all()
    with pytest.raises(DataError, match="verdict_quality is 'fine'; a verdict on a picture is 1 or 0"):
        encode_example(TASK, {**record(), "verdict_quality": "fine"}, processor)


def test_some_are_judged_with_another_records_picture(processor: Processor) -> None:
    """Half of the judged ones: the picture is not theirs; and where nothing was asked for there is no verdict on it."""
    assert processor.codec is not None
    other = {"caption": "蓝色的帽子", "picture": np.zeros((16, 16, 3), np.uint8)}
    own, theirs = codes_of(processor), processor.tokenizer.code_start + processor.codec.encode(other["picture"])
    rng, seen = np.random.default_rng(0), {"own": 0, "theirs": 0, "unasked": 0, "else": 0}
    for _ in range(1200):
        found = encode_example(TASK, record(), processor, rng, another=lambda: other)
        if found.ids[-1] != processor.tokenizer.estimate_ids[-1]:
            seen["else"] += 1
            continue
        relevance, fidelity, quality = found.labels[-3:]
        assert (fidelity, quality) == (processor.tokenizer.yes_id, IGNORE)
        swapped = np.array_equal(found.ids[-19:-3], theirs)
        assert swapped or np.array_equal(found.ids[-19:-3], own)
        if relevance == IGNORE:
            seen["unasked"] += 1
        else:
            assert relevance == (processor.tokenizer.no_id if swapped else processor.tokenizer.yes_id)
            seen["theirs" if swapped else "own"] += 1
    assert 0.03 < 1 - seen["else"] / 1200 < 0.07
    assert min(seen["own"], seen["theirs"]) > 15 and 0 < seen["unasked"] < 20


def test_codes_may_stand_for_a_picture(processor: Processor) -> None:
    given = list(range(16))
    found = encode_example(TASK, {**record(), "picture": given}, processor)
    assert found.ids[-16:].tolist() == [processor.tokenizer.code_start + code for code in given]
    for wrong in (given[:-1], [*given[:-1], 16], [0.5] * 16):
        with pytest.raises(DataError, match="picture: has to be a picture, or 16 codes from 0 to 15"):
            encode_example(TASK, {**record(), "picture": wrong}, processor)


def test_several_controls_are_dropped_together_too(processor: Processor) -> None:
    """In every combination, and a tenth of the time all of them, whatever their own shares are."""
    line = "甲[text:a|drop=0.1]乙[text:b|drop=0.1] -> [image:picture]"
    task, rng = Task.from_instruction(line, "two"), np.random.default_rng(0)
    shortest = len(encode_prompt(task, {"picture": record()["picture"]}, processor))
    texts = {"a": "红色", "b": "的杯子"}
    seen: dict[tuple[bool, bool], int] = {}
    for _ in range(1000):
        ids = encode_example(task, {**record(), **texts}, processor, rng).ids.tolist()
        text = processor.tokenizer.decode(ids)
        found = ("红色" in text, "的杯子" in text)
        seen[found] = seen.get(found, 0) + 1
    assert set(seen) == {(True, True), (True, False), (False, True), (False, False)}
    assert 0.08 < seen[False, False] / 1000 < 0.15
    assert shortest < len(encode_prompt(task, texts, processor))
