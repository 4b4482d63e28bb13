"""Texts that are written together, all by one adapter or by none: read, joined, stepped, left."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openm6.batches import by_length, pad
from openm6.bundle import Bundle
from openm6.decode import Generated
from openm6.decode.generate import chance, choose
from openm6.decode.permitted import permitted
from openm6.decode.pieces import Pieces
from openm6.errors import ContextLengthError
from openm6.model.precision import fast_dtype
from openm6.serve.recent import Recent
from openm6.serve.slots import Prefix, Slots, key_of, prefixes_of
from openm6.serve.work import Request, Told

if TYPE_CHECKING:
    from openm6.serve.engine import Settings


@dataclass(slots=True, eq=False)
class _Row:
    """A text that is being written."""

    request: Request
    pieces: Pieces | None
    """Of a text that is told as it is written."""
    chance: torch.Generator | None
    score: float = 0.0
    last: int = 0
    ids: list[int] = field(default_factory=list)

    def add(self, token: int) -> str:
        """What can be told after it."""
        self.ids.append(token)
        return self.pieces.add(token) if self.pieces else ""


class Texts:
    """`waiting` come in as there is room; `rows` are being written, row i in slot i."""

    def __init__(self, bundle: Bundle, adapter: str | None, settings: Settings):
        self.view, self.adapter = bundle.adapter(adapter) if adapter else bundle, adapter
        self.waiting: deque[Request] = deque()
        self.rows: list[_Row] = []
        self._settings, self._shares = settings, 1 + len(bundle.adapters)
        self._slots: Slots | None = None
        self.prefixes: Recent[Prefix] = Recent(settings.prefix_mib * 2**20 // self._shares)

    def step(self) -> list[Told]:
        """Let come in who fits, then one token for everybody."""
        told: list[Told] = []
        with torch.inference_mode(), self.view.precision():
            if self.rows:
                told += self._advance()
            if self.waiting:
                told += self._admit()
        return told

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

    def _advance(self) -> list[Told]:
        assert self._slots is not None
        device = self.view.model.embed.weight.device
        tokens = torch.tensor([row.last for row in self.rows], device=device)
        try:
            hidden = self._slots.step(self.view.model, tokens)
        except (torch.OutOfMemoryError, MemoryError) as error:
            # Whoever came last goes; the others try again at the next step.
            newest = self.rows[-1]
            self._leave(len(self.rows) - 1)
            return [Told(newest.request.id, error=error, done=True)]
        told, ended = self._chosen(self.rows, hidden)
        for slot in sorted(ended, reverse=True):
            self._leave(slot)
        return told

    def _admit(self) -> list[Told]:
        """Read prompts, the longest waiting first, and choose their first tokens."""
        chosen, prefixes, told = self._read()
        if not chosen:
            return told
        tokenizer = self.view.processor.tokenizer
        rows = [_Row(r, Pieces(tokenizer) if r.pieces else None, chance(r.options)) for r in chosen]
        more, ended = self._chosen(rows, torch.stack([prefix.hidden for prefix in prefixes]))
        staying = [i for i in range(len(rows)) if i not in ended]
        if staying:
            assert self._slots is not None
            self._slots.add([prefixes[i] for i in staying], max(_positions(rows[i].request) for i in staying))
            self.rows += [rows[i] for i in staying]
        return told + more

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
                    f"A prompt and its answer take {needed} positions; the server has {slots.limit} for a text."
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
        new = [(request, key) for request, key, known in taken if known is None]
        found, failed = self._prefill([request for request, _ in new])
        told += failed
        for request, key in new:
            if request.id in found:
                self.prefixes.put(key, found[request.id], found[request.id].nbytes)
        ready = [(r, known or found.get(r.id)) for r, _, known in taken]
        kept = [(r, prefix) for r, prefix in ready if prefix is not None]
        return [r for r, _ in kept], [prefix for _, prefix in kept], told

    def _prefill(self, requests: list[Request]) -> tuple[dict[str, Prefix], list[Told]]:
        """What was read by the requests' ids; where reading together fails, one by one, whose fault it is."""
        found: dict[str, Prefix] = {}
        told: list[Told] = []
        prompts = [r.prompt for r in requests if r.prompt is not None]
        parts = [[requests[i] for i in chosen] for chosen in by_length(prompts, self._settings.batch)]
        while parts:
            part = parts.pop(0)
            batch = pad([r.prompt for r in part if r.prompt is not None], pad_id=0, even=True)
            model = self.view.model
            try:
                hidden, cache = model.prefill(batch.to(model.embed.weight.device), batch.shape[1])
                found |= {r.id: prefix for r, prefix in zip(part, prefixes_of(hidden, cache), strict=True)}
            except Exception as error:
                if len(part) == 1:
                    told.append(Told(part[0].id, error=error, done=True))
                else:
                    parts = [*([one] for one in part), *parts]
        return found, told

    def _chosen(self, rows: list[_Row], hidden: Tensor) -> tuple[list[Told], set[int]]:
        """The next token of each row, what is to be told of it, and the rows that came to an end."""
        end = self.view.processor.tokenizer.end_id
        prompts = [row.request.prompt for row in rows if row.request.prompt is not None]
        options = [row.request.options for row in rows]
        logits = permitted(self.view.model.logits(hidden), prompts, [row.ids for row in rows], options, end)
        tokens, log_probs = choose(logits, options, [row.chance for row in rows])
        told, ended = [], set()
        for number, (row, token, log_prob) in enumerate(zip(rows, tokens.tolist(), log_probs.tolist(), strict=True)):
            row.score += log_prob
            row.last = token
            piece = "" if token == end else row.add(token)
            finished = token == end
            if finished or len(row.ids) >= row.request.options.max_new_tokens:
                ended.add(number)
                told.append(self._answer(row, piece + (row.pieces.rest() if row.pieces else ""), finished))
            elif piece:
                told.append(Told(row.request.id, piece=piece))
        return told, ended

    def _answer(self, row: _Row, piece: str, finished: bool) -> Told:
        task, prompt = row.request.made, row.request.prompt
        assert task is not None
        assert prompt is not None
        told = Told(
            row.request.id, piece, done=True, finished=finished, tokens=len(row.ids) + finished,
            prompt_tokens=len(prompt),
        )  # fmt: skip
        try:
            told.value = self.view.read(task, Generated(row.ids, row.score, finished))
        except Exception as error:
            told.error = error
        return told


def _positions(request: Request) -> int:
    """That a text and its prompt have in the end."""
    assert request.prompt is not None
    return len(request.prompt) + int(request.options.max_new_tokens)
