"""The turns of a conversation as pieces, in the form in which the model is asked.

OpenM6's own form, with the answers of earlier turns and of few-shot examples where their own prompts put them:

    system <|row|> user <|answer|> answer <|end|> user <|answer|>

A model with a chat template has its form instead (chat.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Items
from typing import Any, NamedTuple

from openm6.core.errors import DataError
from openm6.tasks.piece import Piece
from openm6.tasks.processor import Processor


class Turn(NamedTuple):
    """A turn: `role` (chat.ROLES), its pieces, and what else of a message a template reads (`tool_calls`, ...)."""

    role: str
    pieces: list[Piece]
    more: Mapping[str, Any] = {}


def lay_out_turns(
    turns: Items[Turn], processor: Processor, thinking: bool | None = None, tools: Items[Mapping[str, Any]] = (),
    learn: str = "",
) -> list[Piece]:  # fmt: skip
    """The pieces of turns, up to where an answer begins. With `learn` the last turn is an answer, and marked as
    learned; "all": earlier ones too, which needs `keeps_turns`.

    Raises DataError for turns that the model's form does not express."""
    if processor.chat is not None:
        messages = [{**turn.more, "role": turn.role, "content": turn.pieces} for turn in turns]
        return processor.chat.lay_out(messages, processor.tokenizer, thinking, tools, learn)
    if tools or any(turn.more.get("tool_calls") for turn in turns):
        raise DataError("has tools: this model has no chat template that lays them out.")
    tokenizer, pieces = processor.tokenizer, list[Piece]()
    for number, (turn, before) in enumerate(zip(turns, [None, *turns], strict=False)):
        if turn.role == "assistant":
            is_learned = learn == "all" or (learn == "last" and number == len(turns) - 1)
            ids = [token for piece in turn.pieces for token in piece.ids]
            pieces += [Piece((tokenizer.answer_id,)), Piece((*ids, tokenizer.end_id), learned=is_learned)]
        else:
            if before is not None and before.role != "assistant":
                pieces.append(Piece((tokenizer.row_id,)))
            pieces += turn.pieces
    return pieces if learn else [*pieces, Piece((tokenizer.answer_id,))]


def keeps_turns(processor: Processor) -> bool:
    """Whether all answers of a conversation can be learned in one example: each is then read as it was written, and a
    source that is read in both directions would show an answer what follows it."""
    return processor.source == "causal" and (processor.chat is None or processor.chat.keeps_turns)
