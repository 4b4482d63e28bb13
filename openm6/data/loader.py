"""The loader: several sources mixed by weight, shuffled, spread over processes, resumed to the record.

Every draw depends only on the seed and on its number in the run, not on the number of processes or threads: source s
gives its i-th draw from its shuffle (a new one each epoch), the mixture determines the draw at place g of the whole
run, and step k takes the places k * N to (k + 1) * N - 1, dealt out to the processes in turn. So the state is one
number, and a resumed run equals one that was never interrupted."""

from __future__ import annotations

import logging
import sys
from bisect import bisect_right
from collections.abc import Callable, Generator, Mapping, Sequence as Items
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from openm6.core.errors import DataError, UsageError
from openm6.core.sequence import ContrastTarget, Sequence
from openm6.data.classes import Classes
from openm6.data.columns import SlotView
from openm6.data.rejects import Rejects
from openm6.data.source import Source
from openm6.data.store import Record, Records
from openm6.tasks.corrupt import noised
from openm6.tasks.encode import encode_example

if TYPE_CHECKING:
    from openm6.tasks.processor import Processor
    from openm6.tasks.task import Task

_TRIES = 64  # records tried to replace a bad one
_DECK = 2**16  # largest number of records whose order is stored, not computed


class Encoder(Protocol):
    """A function that makes an example of a record by slots; see `encode_example`."""

    def __call__(
        self,
        task: Task,
        record: Mapping[str, Any],
        processor: Processor,
        rng: np.random.Generator | None,
        another: Callable[[], Mapping[str, Any]],
        shots: Items[Mapping[str, Any]],
        /,
    ) -> Sequence: ...


@dataclass(slots=True)
class Entry:
    """One source for one task.

    columns    the data's columns of the task's slots, where names differ
    start      first step at which the source is drawn (a curriculum)
    noise      fraction of noise in the input texts (see corrupt)
    against    the task that encodes the same record from another side, whose vector has to be near; a record's column
               `negatives` may hold other records as negatives
    same       columns by which records are grouped: those that agree in all are not told apart
    shots      maximum number of other records, with their answers, before each
    classes    the classes of the labels to be written, where they were counted
    encode     makes the examples
    """

    name: str
    records: Records
    task: Task
    weight: float = 1.0
    columns: Mapping[str, str] = field(default_factory=dict)
    start: int = 0
    noise: float = 0.0
    against: Task | None = None
    against_columns: Mapping[str, str] = field(default_factory=dict)
    same: tuple[str, ...] = ()
    shots: int = 0
    classes: Mapping[str, Classes] = field(default_factory=dict)
    encode: Encoder = encode_example


class Loader:
    """Endless steps of training examples.

    `batch_size` examples make a step over all `world` processes; this one, `rank`, takes every world-th of them.
    `threads` prepare examples ahead. Bad records are counted in `rejects` and replaced by the next good one of their
    source; without `rejects` the first one raises its DataError. Raises UsageError where the arguments are
    inconsistent."""

    def __init__(
        self,
        entries: list[Entry],
        processor: Processor,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
        rejects: Rejects | None = None,
    ):
        if batch_size % world:
            raise UsageError(
                f"A step of {batch_size} examples cannot be shared evenly by {world} processes: "
                f"choose a multiple of {world}."
            )
        for entry in entries:
            if len(entry.records) == 0:
                raise DataError(f"{entry.name} holds no records.")
            if entry.weight <= 0:
                raise UsageError(f"The weight of {entry.name} is {entry.weight}; it has to be above 0.")
        if not entries:
            raise UsageError("There is nothing to train on: name at least one source.")
        self.entries, self.batch_size, self.seed = entries, batch_size, seed
        self.rank, self.world, self.threads = rank, world, threads
        self._examples = 0
        self._deck = _Deck(batch_size, _derived(seed, len(entries)))
        draws = [_Draws(e, processor, rejects) for e in entries]
        starts = sorted({entry.start for entry in entries})
        if starts[0] > 0:
            raise UsageError(f"Nothing is trained before step {starts[0]}: let at least one source start at 0.")
        self._stages = [start * batch_size for start in starts]
        self._mixtures = [
            _mixture([d for d in draws if d.entry.start <= start], _derived(seed, -1 - number) if number else seed)
            for number, start in enumerate(starts)
        ]

    def __iter__(self) -> Generator[list[Sequence], None, None]:
        """Examples of this process for each step, from the current state."""
        import grain

        share = self.batch_size // self.world
        ahead = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=4 * share if self.threads else 0)
        own = grain.MapDataset.range(sys.maxsize).map(lambda number: self._example(self._place(number)))
        examples = iter(own.to_iter_dataset(ahead))
        grain.experimental.set_next_index(examples, self._examples // self.world)
        try:
            while True:
                step = list(islice(examples, share))
                self._examples += self.batch_size
                yield step
        finally:
            examples.close()

    def _example(self, place: int) -> Sequence:
        stage = bisect_right(self._stages, place) - 1
        example: Sequence = self._mixtures[stage][place - self._stages[stage]]
        return example

    def _place(self, number: int) -> int:
        """The place in the whole run of this process's `number`-th example.

        The mixture alternates evenly, so that of two sources each might fall to one of two processes: hence the places
        of a step are dealt out in random order."""
        return self._deck[number * self.world + self.rank]

    def get_state(self) -> dict[str, Any]:
        """The state after the completed steps, the same for every process."""
        return {"examples": self._examples, "seed": self.seed, "sources": self._sources()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state, from the next iteration on. The number of processes may differ.

        Raises UsageError when seed or data differ from those of the state: the run could not be resumed exactly."""
        now = {"seed": self.seed, "sources": self._sources()}
        for key, value in now.items():
            if state[key] != value:
                raise UsageError(
                    f"The data of this run has changed: {key} was {state[key]} and is {value}; "
                    "put it back, choose another output, or delete this one to train anew."
                )
        if state["examples"] % self.batch_size:
            raise UsageError(
                f"The run stands at {state['examples']} examples: "
                f"take a batch_size that divides this, not {self.batch_size}."
            )
        self._examples = int(state["examples"])

    def _sources(self) -> list[list[Any]]:
        return [[e.name, e.task.name, len(e.records), e.weight, e.start] for e in self.entries]


class _Draws:
    """The examples of one entry: the i-th draw is the i-th record of the shuffle, encoded."""

    def __init__(self, entry: Entry, processor: Processor, rejects: Rejects | None):
        self.entry, self._processor, self._rejects = entry, processor, rejects
        self._view = SlotView.of(entry.task, entry.records, entry.columns)
        self._other_view: SlotView | None = None
        if entry.against:
            self._other_view = SlotView.of(entry.against, entry.records, entry.against_columns)

    def __len__(self) -> int:
        return len(self.entry.records)

    @property
    def window(self) -> int:
        return self.entry.records.window if isinstance(self.entry.records, Source) else 0

    def encode(self, index: int, rng: np.random.Generator) -> Sequence:
        """The example of record `index` (counted through the epochs), or of the next usable one."""
        reason = ""
        for other in range(min(_TRIES, len(self))):
            record = self.entry.records[(index + other) % len(self)]
            try:
                seen = self._noised(self._view(record, rng), rng)
                another = partial(self._another, rng)
                shots = [another() for _ in range(int(rng.integers(self.entry.shots + 1)))] if self.entry.shots else []
                example = self.entry.encode(self.entry.task, seen, self._processor, rng, another, shots)
                if self.entry.against:
                    example.target = self._contrast(record, rng)
            except DataError as error:
                if self._rejects is None:
                    raise
                reason = str(error)
                self._rejects.count(str(record.get("_where", f"{self.entry.name}#{index}")), reason, self.entry.name)
                continue
            if self._rejects is not None:
                self._rejects.saw()
            example.origin = self.entry.name
            return example
        raise DataError(f"{self.entry.name}: {other + 1} records in a row could not be used (the last: {reason})")

    def _contrast(self, record: Record, rng: np.random.Generator) -> ContrastTarget:
        entry, view = self.entry, self._other_view
        assert entry.against is not None and view is not None
        positive = encode_example(entry.against, view(record, rng), self._processor, rng)
        negatives = record.get("negatives") or []
        if not isinstance(negatives, list) or not all(isinstance(other, Mapping) for other in negatives):
            raise DataError(f"{record.get('_where', entry.name)}: negatives has to be a list of records.")
        root = {"_root": record.get("_root", "")}
        others = [
            encode_example(entry.against, view({**root, **other}, rng), self._processor, rng) for other in negatives
        ]
        return ContrastTarget(positive, others, "|".join(str(record.get(name)) for name in entry.same))

    def _noised(self, seen: Mapping[str, Any], rng: np.random.Generator) -> Mapping[str, Any]:
        entry = self.entry
        if not entry.noise:
            return seen
        given = [name for name in entry.task.inputs if entry.task.slots[name].type == "text"]
        texts = {name: seen[name] for name in given if isinstance(seen.get(name), str) and seen[name]}
        # Noise in the question must not change the answer.
        free = {name: text for name, text in texts.items() if name not in entry.task.outputs}
        return {**seen, **{name: noised(text, entry.noise, rng) for name, text in free.items()}}

    def _another(self, rng: np.random.Generator) -> Mapping[str, Any]:
        return self._view(self.entry.records[int(rng.integers(len(self)))], rng)


class _Deck:
    """Random orders of 0 to size - 1, one for each round, the last few cached.

    grain's own shuffle needs no memory, but its cipher works on at least 16 bits and so takes 65,536 / size rounds a
    draw: milliseconds where there are few records."""

    def __init__(self, size: int, seed: int):
        self.size = size
        self._order = lru_cache(maxsize=16)(lambda turn: np.random.default_rng([seed, turn]).permutation(size))

    def __getitem__(self, number: int) -> int:
        """The `number`-th element of the endless sequence, counted through all rounds: round * size + the element."""
        turn, place = divmod(number, self.size)
        return turn * self.size + int(self._order(turn)[place])


def _mixture(draws: list[_Draws], seed: int) -> Any:
    """grain's data set of the whole run, with an encoded example at each place."""
    noisy = logging.getLogger("absl")
    level, noisy.level = noisy.level, logging.ERROR  # grain warns that JAX, which it does not need, is absent
    try:
        import grain
    finally:
        noisy.level = level
    parts = []
    for number, draw in enumerate(draws):
        own = _derived(seed, number)
        if len(draw) > _DECK and not draw.window:
            order = grain.MapDataset.range(len(draw)).shuffle(seed=own).repeat()
        else:
            order = grain.MapDataset.range(sys.maxsize).map(_Deck(draw.window or len(draw), own).__getitem__)
        parts.append(order.random_map(draw.encode, seed=own))
    return grain.MapDataset.mix(parts, [d.entry.weight for d in draws])


def _derived(seed: int, number: int) -> int:
    """A seed for each part, in the 32 bits that grain takes."""
    return int(np.random.SeedSequence([seed, number & 0xFFFFFFFF]).generate_state(1)[0])
