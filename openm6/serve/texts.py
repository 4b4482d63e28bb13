"""Texts that are written together, all by one adapter or by none: read, joined, stepped, left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from openm6.core.batch import by_length, pad
from openm6.core.errors import ContextLengthError
from openm6.core.sequence import Sequence
from openm6.inference import Generated
from openm6.inference.generate import chance, choose
from openm6.inference.permitted import permitted
from openm6.inference.pieces import Pieces, StopFilter
from openm6.inference.session import Session
from openm6.model.cache import prefill
from openm6.model.precision import fast_dtype
from openm6.serve.recent import Recent
from openm6.serve.slots import Prefix, Slots, key_of, prefixes_of
from openm6.serve.work import Request, Told, cut_value

if TYPE_CHECKING:
    from openm6.serve.settings import Settings

T = TypeVar("T")
R = TypeVar("R")

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


@dataclass(slots=True, eq=False)
class _Row:
    """A text that is being written."""

    request: Request
    pieces: Pieces | None
    """Of a text that is told as it is written, or that ends at a stop string."""
    stopped: StopFilter
    chance: torch.Generator | None
    score: float = 0.0
    last: int = 0
    ids: list[int] = field(default_factory=list)

    def add(self, token: int) -> str:
        """What can be told after it."""
        self.ids.append(token)
        return self.stopped.add(self.pieces.add(token)) if self.pieces else ""

    def rest(self) -> str:
        """What can be told at the end of the text."""
        return self.stopped.add(self.pieces.rest()) + self.stopped.rest() if self.pieces else ""


class Texts:
    """`waiting` come in as there is room; `rows` are being written, row i in slot i."""

    def __init__(self, session: Session, adapter: str | None, settings: Settings):
        self.view, self.adapter = session.adapter(adapter) if adapter else session, adapter
        self.waiting: deque[Request] = deque()
        self.rows: list[_Row] = []
        self._settings, self._shares = settings, 1 + len(session.adapters)
        self._slots: Slots | None = None
        self.prefixes: Recent[Prefix] = Recent(settings.prefix_mib * 2**20 // self._shares)

    def remove(self, request: Request) -> None:
        """It is not wanted any more."""
        if request in self.waiting:
            self.waiting.remove(request)
        for slot, row in enumerate(self.rows):
            if row.request is request:
                self._leave(slot)
                return

    def clear(self) -> None:
        """Give up all that are being written."""
        self.rows, self._slots = [], None

    def _leave(self, slot: int) -> None:
        assert self._slots is not None
        self._slots.drop(slot)
        self.rows[slot] = self.rows[-1]
        self.rows.pop()

    def advance(self) -> list[Told]:
        """Write one token of every text."""
        if not self.rows:
            return []
        with torch.inference_mode(), self.view.precision():
            hidden = each_or_error(self._step, list(range(len(self.rows))))
            told, ended, chosen = list[Told](), set[int](), list[tuple[int, Tensor]]()
            scarce = [slot for slot, found in enumerate(hidden) if isinstance(found, OUT_OF_MEMORY)]
            for slot, found in enumerate(hidden):
                if isinstance(found, Tensor):
                    chosen.append((slot, found))
                elif slot not in scarce[:-1]:  # of memory the last one leaves; the others try again at the next step
                    told.append(Told(self.rows[slot].request.id, error=found, done=True))
                    ended.add(slot)
            more, done = self._chosen([self.rows[slot] for slot, _ in chosen], [found for _, found in chosen])
        for slot in sorted(ended | {chosen[number][0] for number in done}, reverse=True):
            self._leave(slot)
        return told + more

    def _step(self, slots: list[int]) -> list[Tensor]:
        """Hidden states [D] of the next position of these slots: of all, or of one."""
        assert self._slots is not None
        device = self.view.model.embed.weight.device
        tokens = torch.tensor([self.rows[slot].last for slot in slots], device=device)
        only = slots[0] if len(slots) < len(self.rows) else None
        sampled = any(row.chance is not None for row in self.rows)
        return list(self._slots.step(self.view.model, tokens, only, reproducible=sampled))

    def admit(self) -> list[Told]:
        """Read prompts, the longest waiting first, and choose their first tokens."""
        if not self.waiting:
            return []
        with torch.inference_mode(), self.view.precision():
            chosen, prefixes, told = self._read()
            rows = [self._row(request) for request in chosen]
            more, ended = self._chosen(rows, [prefix.hidden for prefix in prefixes])
            staying = [(rows[i], prefixes[i]) for i in range(len(rows)) if i not in ended]
            for (row, _), error in zip(staying, each_or_error(self._join, staying), strict=True):
                if error is not None:
                    more.append(Told(row.request.id, error=error, done=True))
        return told + more

    def _row(self, request: Request) -> _Row:
        pieces = Pieces(self.view.processor.tokenizer) if request.pieces or request.stop else None
        return _Row(request, pieces, StopFilter(request.stop), chance(request.options))

    def _join(self, staying: list[tuple[_Row, Prefix]]) -> list[None]:
        slots = self._opened()
        slots.add([prefix for _, prefix in staying], max(_positions(row.request) for row, _ in staying))
        self.rows += [row for row, _ in staying]
        return [None] * len(staying)

    def _opened(self) -> Slots:
        if self._slots is None:
            model = self.view.model
            limit = self._settings.capacity or model.config.max_position_embeddings
            budget = self._settings.cache_mib * 2**20 // self._shares
            self._slots = Slots(model, limit, budget, fast_dtype(model.embed.weight.device.type))
        return self._slots

    def _read(self) -> tuple[list[Request], list[Prefix], list[Told]]:
        """As many of those that wait as fit, with their prompts read; those that were read before cost nothing."""
        slots = self._opened()
        taken: list[tuple[Request, bytes, Prefix | None]] = []
        told, positions, longest = [], 0, 0
        while self.waiting:
            request = self.waiting[0]
            assert request.prompt is not None
            needed = _positions(request)
            if needed > slots.limit:
                error = ContextLengthError(
                    f"A prompt and its answer take {needed} positions; the server has {slots.limit} for a text.",
                    param="max_new_tokens",
                )
                told.append(Told(self.waiting.popleft().id, error=error, done=True))
                continue
            longest = max(longest, needed)
            if len(taken) >= slots.room(longest):
                break
            key = key_of(request.prompt)
            known = self.prefixes.get(key)
            positions += 0 if known else len(request.prompt)
            if positions > self._settings.prefill and taken:
                break
            taken.append((self.waiting.popleft(), key, known))
        new = {key: request for request, key, known in taken if known is None}
        found = dict(zip(new, self._prefill(list(new.values())), strict=True))
        ready: list[tuple[Request, Prefix]] = []
        for request, key, known in taken:
            prefix = known or found[key]
            if isinstance(prefix, Prefix):
                self.prefixes.put(key, prefix, prefix.nbytes)
                request.prompt_tokens = prefix.positions
                ready.append((request, prefix))
            else:
                told.append(Told(request.id, error=prefix, done=True))
        return [request for request, _ in ready], [prefix for _, prefix in ready], told

    def _prefill(self, requests: list[Request]) -> list[Prefix | Exception]:
        """The requests' prompts, read together where their lengths are alike."""
        prompts = [r.prompt for r in requests if r.prompt is not None]
        found: dict[int, Prefix | Exception] = {}
        for part in by_length(prompts, self._settings.batch):
            found |= dict(zip(part, each_or_error(self._prefixes, [prompts[i] for i in part]), strict=True))
        return [found[i] for i in range(len(prompts))]

    def _prefixes(self, prompts: list[Sequence]) -> list[Prefix]:
        model = self.view.model
        batch = pad(prompts, pad_id=0, even=True)
        return prefixes_of(*prefill(model, batch.to(model.embed.weight.device), batch.shape[1]))

    def _chosen(self, rows: list[_Row], hidden: list[Tensor]) -> tuple[list[Told], set[int]]:
        """The next token of each row, what is to be told of it, and the rows that came to an end."""
        told, ended = list[Told](), set[int]()
        found = each_or_error(self._tokens, list(zip(rows, hidden, strict=True)))
        for number, (row, choice) in enumerate(zip(rows, found, strict=True)):
            if isinstance(choice, Exception):
                ended.add(number)
                told.append(Told(row.request.id, error=choice, done=True))
                continue
            row.last, log_prob = choice
            row.score += log_prob
            row.request.tokens += 1
            is_end = row.last == self.view.processor.tokenizer.end_id
            piece = "" if is_end else row.add(row.last)
            if is_end or row.stopped.is_stopped or len(row.ids) >= row.request.options.max_new_tokens:
                ended.add(number)
                told.append(self._answer(row, piece + row.rest(), is_end))
            elif piece and row.request.pieces:
                told.append(Told(row.request.id, piece=piece))
        return told, ended

    def _tokens(self, rows: list[tuple[_Row, Tensor]]) -> list[tuple[int, float]]:
        """The next token of each row and its log-probability."""
        end = self.view.processor.tokenizer.end_id
        every = [row for row, _ in rows]
        prompts = [row.request.prompt for row in every if row.request.prompt is not None]
        options = [row.request.options for row in every]
        logits = self.view.model.logits(torch.stack([hidden for _, hidden in rows]))
        logits = permitted(logits, prompts, [row.ids for row in every], options, end)
        tokens, log_probs = choose(logits, options, [row.chance for row in every])
        return list(zip(tokens.tolist(), log_probs.tolist(), strict=True))

    def _answer(self, row: _Row, piece: str, is_end: bool) -> Told:
        task = row.request.made
        assert task is not None
        finished = is_end or row.stopped.is_stopped
        told = Told(row.request.id, piece if row.request.pieces else "", done=True, finished=finished)
        try:
            told.value = cut_value(self.view.read(task, Generated(row.ids, row.score, finished)), row.request.stop)
        except Exception as error:
            told.error = error
        return told


def each_or_error(act: Callable[[list[T]], Items[R]], items: list[T]) -> list[R | Exception]:
    """What `act` gives for each of the items, all at once. Where that fails, each item is tried by itself, so that only
    an item that fails alone gets an error. `act` leaves things as they were when it fails."""
    if not items:
        return []
    try:
        return [*act(items)]
    except Exception as error:
        if len(items) == 1:
            return [error]
        return [found for item in items for found in each_or_error(act, [item])]


def _positions(request: Request) -> int:
    """That a text and its prompt have in the end."""
    assert request.prompt is not None
    return len(request.prompt) + int(request.options.max_new_tokens)
