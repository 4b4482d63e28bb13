"""Facts as triples: subject, relation, object.

<|table|> <|row|> 云帆连衣裙 <|cell|> 颜色 <|cell|> 红色 <|row|> ... <|/table|>"""

import json
from collections.abc import Sequence
from typing import Any

from openm6.core.errors import DataError
from openm6.tasks.piece import Piece
from openm6.tasks.processor import Processor
from openm6.tasks.slots.table import split
from openm6.tasks.slots.text import find_json, from_json, spoken


def schema() -> dict[str, Any]:
    part = {"type": ["string", "number"]}
    return {"type": "array", "items": {"type": "array", "items": part, "minItems": 3, "maxItems": 3}, "minItems": 1}


def source(value: Any, processor: Processor) -> Piece:
    if processor.chat:
        return spoken(_json(value), processor)
    return Piece(target(value, processor))


def target(value: Any, processor: Processor) -> list[int]:
    """Encode a list of three texts or numbers each, or its JSON."""
    tokenizer = processor.tokenizer
    if processor.chat:
        return tokenizer.encode(_json(value))
    ids = [tokenizer.table_id]
    for subject, relation, thing in as_triples(value):
        ids += (tokenizer.row_id, *tokenizer.encode(subject), tokenizer.cell_id, *tokenizer.encode_often(relation))
        ids += (tokenizer.cell_id, *tokenizer.encode(thing))
    return [*ids, tokenizer.table_end_id]


def read(ids: Sequence[int], processor: Processor) -> list[list[str]]:
    """The triples; rows of other than three parts are left out."""
    tokenizer = processor.tokenizer
    if processor.chat:
        try:
            return [list(triple) for triple in as_triples(find_json(ids, processor))]
        except DataError:
            return []
    inside = [i for i in ids if i not in (tokenizer.table_id, tokenizer.table_end_id)]
    rows = [
        [tokenizer.decode(part) for part in split(row, tokenizer.cell_id)] for row in split(inside, tokenizer.row_id)
    ]
    return [row for row in rows if len(row) == 3]


def as_triples(value: Any) -> list[tuple[str, str, str]]:
    """A value as a list of triples. Raises DataError for any other value."""
    value = from_json(value, "is a text, but not the JSON of triples.")
    fits = isinstance(value, (list, tuple)) and len(value) > 0 and all(
        isinstance(row, (list, tuple))
        and len(row) == 3
        and all(isinstance(part, (str, int, float)) and not isinstance(part, bool) and part != "" for part in row)
        for row in value
    )  # fmt: skip
    if not fits:
        raise DataError("has to be triples: [[subject, relation, object], ...], of texts or numbers.")
    return [(str(a), str(b), str(c)) for a, b, c in value]


def _json(value: Any) -> str:
    return json.dumps(as_triples(value), ensure_ascii=False)
