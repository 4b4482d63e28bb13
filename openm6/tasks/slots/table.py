"""A table: rows of named cells.

    <|table|> <|row|> 品类 <|cell|> 连衣裙 <|cell|> 颜色 <|cell|> 红色 <|row|> ... <|/table|>

Each cell is the name of its column and its value; rows may have different columns. A model with a chat template reads
and writes JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from openm6.core.errors import DataError
from openm6.tasks.piece import Piece
from openm6.tasks.processor import Processor
from openm6.tasks.slots.text import find_json, from_json, spoken


def schema() -> dict[str, Any]:
    row = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
    return {"oneOf": [row, {"type": "array", "items": row}]}


def source(value: Any, processor: Processor) -> Piece:
    if processor.chat:
        return spoken(_json(value), processor)
    return Piece(target(value, processor))


def target(value: Any, processor: Processor) -> list[int]:
    """Encode one row (a mapping), several (a list of them), or either as JSON text. A cell of None is left out."""
    tokenizer = processor.tokenizer
    if processor.chat:
        return tokenizer.encode(_json(value))
    ids = [tokenizer.table_id]
    for row in _rows(value):
        mark = tokenizer.row_id
        for name, cell in row.items():
            if cell is None:
                continue
            ids += (mark, *tokenizer.encode_often(str(name)), tokenizer.cell_id, *tokenizer.encode(_cell(cell)))
            mark = tokenizer.cell_id
    if len(ids) == 1:
        raise DataError("is a table without cells.")
    return [*ids, tokenizer.table_end_id]


def read(ids: Sequence[int], processor: Processor) -> list[dict[str, str]]:
    """The rows; a name without a value has an empty one."""
    tokenizer = processor.tokenizer
    if processor.chat:
        try:
            return [{str(name): str(cell) for name, cell in row.items()} for row in _rows(find_json(ids, processor))]
        except DataError:
            return []
    inside = [i for i in ids if i not in (tokenizer.table_id, tokenizer.table_end_id)]
    rows = []
    for row in split(inside, tokenizer.row_id)[1:]:
        cells = [tokenizer.decode(cell) for cell in split(row, tokenizer.cell_id)]
        cells += [""] * (len(cells) % 2)
        rows.append(dict(zip(cells[::2], cells[1::2], strict=True)))
    return rows


def split(ids: Sequence[int], mark: int) -> list[list[int]]:
    """Runs of ids between marks."""
    runs: list[list[int]] = [[]]
    for i in ids:
        if i == mark:
            runs.append([])
        else:
            runs[-1].append(i)
    return runs


def cells_of(value: Any) -> Iterator[tuple[str, str]]:
    """Name and value of every cell of a table in any of its forms; nothing for other values."""
    try:
        rows = _rows(value)
    except DataError:
        return
    for row in rows:
        yield from ((str(name), str(cell)) for name, cell in row.items() if cell is not None)


def _rows(value: Any) -> list[Mapping[str, Any]]:
    value = from_json(value, "is a text, but not the JSON of a table.")
    rows = [value] if isinstance(value, Mapping) else value
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, Mapping) for row in rows):
        raise DataError('has to be a table: {"name": value, ...}, or a list of such rows.')
    return list(rows)


def _json(value: Any) -> str:
    """One row as a JSON object, several as an array of them: the form in which a chat model has seen tables."""
    rows = [{str(name): _cell(cell) for name, cell in row.items() if cell is not None} for row in _rows(value)]
    if not any(rows):
        raise DataError("is a table without cells.")
    return json.dumps(rows if len(rows) > 1 else rows[0], ensure_ascii=False)


def _cell(value: Any) -> str:
    if not isinstance(value, (str, int, float)):
        raise DataError(f"has a cell that is a {type(value).__name__}: cells are texts or numbers.")
    return str(value)
