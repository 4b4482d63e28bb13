"""An example for people to read: the input of the network, and its target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from openm6.core.images import ImageGrid, open_image
from openm6.core.sequence import IGNORE, SOURCE
from openm6.core.tokenizer import HALF, Tokenizer
from openm6.tasks.encode import encode_example, encode_prompt
from openm6.tasks.grammar import Slot
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task

_SHOWN = 160
"""Maximum characters of a side; the middle of a longer one is left out."""


@lru_cache(maxsize=1)
def plain_processor() -> Processor:
    """A processor without a model: it lays examples out whole, in bytes."""
    return Processor(Tokenizer.train((), 300, num_codes=0), ImageGrid(16, 16), 2**31)


def preview(task: Task, record: Mapping[str, Any], processor: Processor) -> tuple[str, str]:
    """Source and target of a record, by the task's first instruction, with its corruptions: texts as truncated to the
    processor's `max_length`, pictures by name and size in pixels. Raises DataError as `encode_example` does."""
    tokenizer = processor.tokenizer
    plain = not (task.draws or task.produces_no_tokens or task.sketch)
    sequence = (encode_example if plain else encode_prompt)(task, record, processor, truncate="end")
    given = [p.name for p in task.instructions[0].source if isinstance(p, Slot) and p.type == "image"]
    pictures = [_picture(record[name]) for name in given if record.get(name) is not None]
    source = _read(sequence.ids[sequence.blocks == SOURCE].tolist(), pictures, tokenizer)
    if plain:
        target = _read(sequence.labels[sequence.labels != IGNORE].tolist(), [], tokenizer)
    else:
        value = record.get(task.outputs[0])
        value = value[0] if task.sketch and isinstance(value, list) else value
        target = "(a vector)" if task.embeds else _picture(value) if task.draws else str(value)
    if sequence.cut:  # perhaps within a character
        source, target = source.replace(HALF, ""), target.replace(HALF, "")
    return _short(source), _short(target)


def _read(ids: list[int], pictures: Iterable[str], tokenizer: Tokenizer) -> str:
    """The text of ids, with pictures by name, gaps as `____`, and the marks of tables."""
    marks = {
        tokenizer.mask_id: "____", tokenizer.table_id: "<|table|>", tokenizer.table_end_id: "<|/table|>",
        tokenizer.row_id: "<|row|>", tokenizer.cell_id: "<|cell|>",
    }  # fmt: skip
    names, text = iter(pictures), ""
    run: list[int] = []
    for token in [*ids, tokenizer.end_id]:
        if token in marks or token in (tokenizer.image_id, tokenizer.end_id):
            text += tokenizer.decode(run)
            text += marks.get(token, "") or (next(names, "") if token == tokenizer.image_id else "")
            run = []
        elif token not in (tokenizer.patch_id, tokenizer.image_end_id):
            run.append(token)
    return text


def _picture(value: Any) -> str:
    name = Path(value).name if isinstance(value, (str, Path)) else "picture"
    size = "{} x {}".format(*open_image(value).size) if isinstance(value, (str, Path, bytes)) else "features or codes"
    return f"[{name}, {size}]"


def _short(text: str) -> str:
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} ... {text[-half:]}"
