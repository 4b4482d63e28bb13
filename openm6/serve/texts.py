"""Continuous batching of texts: requests join at any step, and leave when their text ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from openm6.core.batch import by_length, pad
from openm6.core.errors import ContextLengthError
from openm6.core.sequence import Sequence
from openm6.inference.decoding import Decoding, Generated
from openm6.inference.generate import pieces_of, row_generator, select_tokens
from openm6.inference.permitted import permitted
from openm6.inference.pieces import Pieces, StopFilter
from openm6.inference.session import Session
from openm6.model.cache import prefill
from openm6.model.precision import fast_dtype
from openm6.serve.caches import Prefix, Recent, Slots, key_of, prefixes_of
from openm6.serve.wire import OUT_OF_MEMORY, Settings
from openm6.serve.work import EngineRequest, RequestEvent, read

T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True, eq=False)
class _Row:
    """A text in progress. `pieces` decodes it on the way, for a request with pieces or stop strings."""

    request: EngineRequest
    prompt: Sequence
    options: Decoding
    pieces: Pieces | None
    stopped: StopFilter
    generator: torch.Generator | None
    score: float = 0.0
    last: int = 0
    ids: list[int] = field(default_factory=list)

    def add(self, token: int) -> str:
        """Append a token; the piece of text that is certain with it."""
        self.ids.append(token)
        return self.stopped.add(self.pieces.add(token)) if self.pieces else ""

    @property
    def thought(self) -> str:
        """The piece of reasoning that is certain with the last token."""
        return self.pieces.thought if self.pieces else ""

    def rest(self) -> str:
        """The piece that is left at the end of the text."""
        return self.stopped.add(self.pieces.rest()) + self.stopped.rest() if self.pieces else ""


class TextScheduler:
    """Generates the texts of one adapter, or of the base model. Requests in `waiting` join as memory allows; `rows` are
    the texts in progress, row i in slot i."""

    def __init__(self, session: Session, adapter: str | None, settings: Settings):
        self.view, self.adapter = session.adapter(adapter) if adapter else session, adapter
        self.waiting: deque[EngineRequest] = deque()
        self._settings, self._shares = settings, 1 + len(session.adapters)  # the adapters share the memory
        self.prefixes: Recent[Prefix] = Recent(settings.prefix_mib * 2**20 // self._shares)
        self.clear()

    def remove(self, request: EngineRequest) -> None:
        """Drop a request, if it is here."""
        if request in self.waiting:
            self.waiting.remove(request)
        for slot, row in enumerate(self.rows):
            if row.request is request:
                self._leave(slot)
                return

    def clear(self) -> None:
        """Drop all texts in progress."""
        model, settings = self.view.model, self._settings
        limit, budget = settings.capacity or model.config.max_position_embeddings, settings.cache_mib * 2**20
        dtype = fast_dtype(model.embed.weight.device.type)
        self.rows: list[_Row] = []
        self._slots = Slots(model, limit, budget // self._shares, dtype)

    def _leave(self, slot: int) -> None:
        self._slots.drop(slot)
        self.rows[slot] = self.rows[-1]
        self.rows.pop()

    def advance(self) -> list[RequestEvent]:
        """Generate one token of every text."""
        if not self.rows:
            return []
        with torch.inference_mode(), self.view.precision():
            hidden = each_or_error(self._step, list(range(len(self.rows))))
            events, ended, stepped = list[RequestEvent](), set[int](), list[tuple[int, Tensor]]()
            scarce = [slot for slot, found in enumerate(hidden) if isinstance(found, OUT_OF_MEMORY)]
            for slot, found in enumerate(hidden):
                if isinstance(found, Tensor):
                    stepped.append((slot, found))
                elif slot not in scarce[:-1]:  # of texts without memory the last one fails; the others try again
                    events.append(RequestEvent(self.rows[slot].request.id, error=found, done=True))
                    ended.add(slot)
            more, done = self._extend([self.rows[slot] for slot, _ in stepped], [found for _, found in stepped])
        for slot in sorted(ended | {stepped[number][0] for number in done}, reverse=True):
            self._leave(slot)
        return events + more

    def _step(self, slots: list[int]) -> list[Tensor]:
        """Hidden states [D] of the next position of these slots: of all, or of one."""
        device = self.view.model.embed.weight.device
        tokens = torch.tensor([self.rows[slot].last for slot in slots], device=device)
        only = slots[0] if len(slots) < len(self.rows) else None
        sampled = any(row.generator is not None for row in self.rows)
        return list(self._slots.step(self.view.model, tokens, only, reproducible=sampled))

    def admit(self) -> list[RequestEvent]:
        """Read prompts, the longest waiting first, and select their first tokens."""
        if not self.waiting:
            return []
        with torch.inference_mode(), self.view.precision():
            chosen, prefixes, events = self._read()
            rows = [self._row(request) for request in chosen]
            more, ended = self._extend(rows, [prefix.hidden for prefix in prefixes])
            staying = [(rows[i], prefixes[i]) for i in range(len(rows)) if i not in ended]
            for (row, _), error in zip(staying, each_or_error(self._join, staying), strict=True):
                if error is not None:
                    more.append(RequestEvent(row.request.id, error=error, done=True))
        return events + more

    def _row(self, request: EngineRequest) -> _Row:
        item = request.prepared
        pieces = pieces_of(self.view.processor, item.request) if request.pieces or request.stop else None
        return _Row(request, item.prompt, item.options, pieces, StopFilter(request.stop), row_generator(item.options))

    def _join(self, staying: list[tuple[_Row, Prefix]]) -> list[None]:
        self._slots.add([prefix for _, prefix in staying], max(_positions(row.request) for row, _ in staying))
        self.rows += [row for row, _ in staying]
        return [None] * len(staying)

    def _read(self) -> tuple[list[EngineRequest], list[Prefix], list[RequestEvent]]:
        """As many waiting requests as fit, with their prompts read; recently read prompts cost nothing."""
        taken: list[tuple[EngineRequest, bytes, Prefix | None]] = []
        events, positions, longest = list[RequestEvent](), 0, 0
        while self.waiting:
            request = self.waiting[0]
            prompt, needed = request.prepared.prompt, _positions(request)
            if needed > self._slots.limit:
                error = ContextLengthError(
                    f"A prompt and its answer take {needed} positions; the server has {self._slots.limit} for a text.",
                    param="max_new_tokens",
                )
                events.append(RequestEvent(self.waiting.popleft().id, error=error, done=True))
                continue
            longest = max(longest, needed)
            if len(taken) >= self._slots.room(longest):
                break
            key = key_of(prompt)
            known = self.prefixes.get(key)
            positions += 0 if known else len(prompt)
            if positions > self._settings.prefill and taken:
                break
            taken.append((self.waiting.popleft(), key, known))
        new = {key: request for request, key, known in taken if known is None}
        found = dict(zip(new, self._prefill([request.prepared.prompt for request in new.values()]), strict=True))
        ready: list[tuple[EngineRequest, Prefix]] = []
        for request, key, known in taken:
            prefix = known or found[key]
            if isinstance(prefix, Prefix):
                self.prefixes.put(key, prefix, prefix.nbytes)
                request.prompt_tokens = prefix.positions
                ready.append((request, prefix))
            else:
                events.append(RequestEvent(request.id, error=prefix, done=True))
        return [request for request, _ in ready], [prefix for _, prefix in ready], events

    def _prefill(self, prompts: list[Sequence]) -> list[Prefix | Exception]:
        """The prompts, read in batches of similar length."""
        found: dict[int, Prefix | Exception] = {}
        for part in by_length(prompts, self._settings.batch):
            found |= dict(zip(part, each_or_error(self._prefixes, [prompts[i] for i in part]), strict=True))
        return [found[i] for i in range(len(prompts))]

    def _prefixes(self, prompts: list[Sequence]) -> list[Prefix]:
        model = self.view.model
        batch = pad(prompts, pad_id=0, rounded=True)
        return prefixes_of(*prefill(model, batch.to(model.embed.weight.device), batch.shape[1]))

    def _extend(self, rows: list[_Row], hidden: list[Tensor]) -> tuple[list[RequestEvent], set[int]]:
        """Append the next token to each row; the events, and the rows that ended."""
        events, ended = list[RequestEvent](), set[int]()
        found = each_or_error(self._tokens, list(zip(rows, hidden, strict=True)))
        for number, (row, choice) in enumerate(zip(rows, found, strict=True)):
            if isinstance(choice, Exception):
                ended.add(number)
                events.append(RequestEvent(row.request.id, error=choice, done=True))
                continue
            row.last, log_prob = choice
            row.score += log_prob
            row.request.tokens += 1
            is_end = row.last in self.view.processor.tokenizer.end_ids
            piece = "" if is_end else row.add(row.last)
            if is_end or row.stopped.is_stopped or len(row.ids) >= row.options.max_new_tokens:
                ended.add(number)
                events.append(self._answer(row, piece + row.rest(), is_end))
            elif row.request.pieces and (piece or row.thought):
                events.append(RequestEvent(row.request.id, piece=piece, reasoning=row.thought))
        return events, ended

    def _tokens(self, rows: list[tuple[_Row, Tensor]]) -> list[tuple[int, float]]:
        """The next token of each row and its log-probability."""
        every = [row for row, _ in rows]
        options = [row.options for row in every]
        logits = self.view.model.logits(torch.stack([hidden for _, hidden in rows]))
        end_id = self.view.processor.tokenizer.end_id
        logits = permitted(logits, [row.prompt for row in every], [row.ids for row in every], options, end_id)
        tokens, log_probs = select_tokens(logits, options, [row.generator for row in every])
        return list(zip(tokens.tolist(), log_probs.tolist(), strict=True))

    def _answer(self, row: _Row, piece: str, is_end: bool) -> RequestEvent:
        event = RequestEvent(row.request.id, piece if row.request.pieces else "", done=True)
        event.finished = is_end or row.stopped.is_stopped
        try:
            answer = read(self.view, row.request, Generated(row.ids, row.score, event.finished))
            event.value, event.reasoning = answer.value, answer.reasoning
        except Exception as error:
            event.error = error
        return event


def each_or_error(act: Callable[[list[T]], Items[R]], items: list[T]) -> list[R | Exception]:
    """The results of `act` for all items at once. Where that fails, each item is tried alone, so that only an item that
    fails alone gets an error. A failing `act` must leave no trace."""
    if not items:
        return []
    try:
        return [*act(items)]
    except Exception as error:
        if len(items) == 1:
            return [error]
        return [found for item in items for found in each_or_error(act, [item])]


def _positions(request: EngineRequest) -> int:
    """Maximum number of positions of a prompt with its text."""
    item = request.prepared
    return len(item.prompt) + int(item.options.max_new_tokens)
