"""The model, tokenizer, tasks and data of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from openm6.core.errors import DataError, UsageError
from openm6.core.files import write_whole
from openm6.core.tokenizer import Tokenizer, common_characters
from openm6.data.columns import SlotView, count_classes
from openm6.data.conversations import TurnRecords, conversation_of
from openm6.data.loader import Entry, Loader
from openm6.data.overlap import find_overlap
from openm6.data.rejects import Rejects
from openm6.data.source import Source, open_source
from openm6.data.store import Records
from openm6.evaluate.command import measure, measure_retrieval
from openm6.evaluate.measure import check_metrics
from openm6.inference.session import Session
from openm6.model import ModelConfig
from openm6.model.adapters import check_whole
from openm6.model.files import meta_model, read_config
from openm6.tasks.card import read_origin
from openm6.tasks.encode import asked_of
from openm6.tasks.library import get as get_task, names as library_names
from openm6.tasks.pictures import PictureCodec
from openm6.tasks.processor import Processor
from openm6.tasks.slots.label import normalize_label
from openm6.tasks.slots.messages import text_of
from openm6.tasks.task import Task
from openm6.tasks.turns import keeps_turns
from openm6.train.checkpoint import latest_checkpoint
from openm6.train.distill import teacher_answers
from openm6.train.distributed import Group
from openm6.train.recipe import AnyRecipe, DataSection, ModelSection, Recipe, SourceSection, TrainSection
from openm6.weights.directory import make_processor, open_processor
from openm6.weights.origin import with_other

TOKENIZER = "tokenizer"
"""Folder of a run with the tokenizer that was trained for it."""

TOKENIZER_TEXTS = 200_000
"""Texts that a tokenizer is trained on at most."""

MAX_LABELS = 10_000
"""Labels up to which a set is taken from the data; more are no closed set."""

COMPARED = 1_000_000
"""Records of a source that are compared with those that are measured on."""


def build_session(recipe: Recipe, group: Group) -> Session:
    """The model to start from, without weights yet, and its tokenizer. A resumed run takes that of its first start. A
    student keeps the licence of its teacher."""
    session = _session(recipe, group)
    if recipe.distill:
        origin = with_other(session.processor.origin, read_origin(recipe.distill.teacher), "teacher")
        session.processor = replace(session.processor, origin=origin)
    return session


def _session(recipe: Recipe, group: Group) -> Session:
    section = recipe.model
    codec = PictureCodec.load(section.codec) if section.codec else None
    if section.path is not None:
        check_whole(section.path)
        session = Session.load(section.path, device="meta", trainable=True)
        if section.max_length:
            length = _longest(session.model.config, section.max_length, 0)
            session.processor = replace(session.processor, max_length=length)
        if codec is not None:
            session.processor = replace(session.processor, codec=_fitting(codec, session, section))
        session.processor = _asked_otherwise(session.processor, section)
        if section.sizes:  # `source` alone (ModelSection)
            session.model.config = config = replace(session.model.config, **section.sizes)
            session.processor = replace(session.processor, source=config.source)
        return session
    tokenizer = _tokenizer(recipe, group, codec)
    sizes = {**section.sizes, "vocab_size": tokenizer.vocab_size, "num_codes": tokenizer.num_codes}
    teacher = open_processor(recipe.distill.teacher)[0] if recipe.distill else None
    if teacher and "source" not in sizes:  # student and teacher read the same batch
        sizes["source"] = teacher.source
    if "vocab_size" in section.sizes:
        raise UsageError(
            "model.sizes.vocab_size follows from the tokenizer: set tokenizer.vocab_size and tokenizer.num_codes."
        )
    if recipe.pseudo:
        sizes["distinct_layers"] = recipe.pseudo.layers
    config = ModelConfig.preset(section.preset or "", **sizes)
    length = _longest(config, section.max_length, recipe.train.row_length)
    processor = make_processor(config, tokenizer, length, codec, seen_tokens=frozenset())
    if teacher and tokenizer.is_like(teacher.tokenizer):
        processor = replace(processor, checkpoint=teacher.checkpoint)
    return Session(meta_model(config), processor)


def _asked_otherwise(processor: Processor, section: ModelSection) -> Processor:
    """The processor with the recipe's settings of a chat template, or in OpenM6's own form."""
    settings = {name: value for name, value in section.chat.model_dump().items() if value is not None}
    if processor.chat is None:
        if settings or section.prompt_format:
            raise UsageError(f"{section.path} has no chat template: leave model.chat and model.prompt_format out.")
        return processor
    if section.prompt_format:
        if settings:
            raise UsageError("model.chat belongs to a chat template, which model.prompt_format: openm6 leaves out.")
        return replace(processor, chat=None, tokenizer=processor.tokenizer.with_ends(()))
    return replace(processor, chat=replace(processor.chat, **settings))


def source_notes(recipe: Recipe, session: Session) -> list[str]:
    """A sentence where the model is trained on with another source than it had."""
    path, now = recipe.model.path, session.processor.source
    if path is None or (before := read_config(path).source) == now:
        return []
    return [f"The model {path} had a {before} source; it is trained on with a {now} one (model.sizes.source)."]


def _longest(config: ModelConfig, asked: int | None, otherwise: int) -> int:
    """Positions that an example may have: what is asked for, else the rows' or, if learned ones end before, theirs."""
    most = config.max_position_embeddings if config.positions == "learned" else None
    if asked and most and asked > most:
        raise UsageError(
            f"model.max_length is {asked:,}; the model has {most:,} positions (model.sizes.max_position_embeddings), "
            "and learned ones end there."
        )
    return asked or min(otherwise, most or otherwise)


def _fitting(codec: PictureCodec, session: Session, section: ModelSection) -> PictureCodec:
    """The codec, for a model without one that has ids for its codes."""
    if session.processor.codec is not None:
        raise UsageError(f"{section.path} has a codec already: leave model.codec out.")
    ids = session.processor.tokenizer.num_codes
    if ids < codec.num_codes:
        raise UsageError(
            f"{section.path} has ids for {ids} image codes; the codec {section.codec} has {codec.num_codes}."
        )
    return codec


def _tokenizer(recipe: Recipe, group: Group, codec: PictureCodec | None) -> Tokenizer:
    """The tokenizer of a run; with a codec it has the ids of its codes."""
    section = recipe.tokenizer
    num_codes = codec.num_codes if codec else section.num_codes
    path = section.path or (recipe.distill.teacher if recipe.distill else None)
    if path is not None:
        tokenizer = Tokenizer.load(path)
        if codec and tokenizer.num_codes < num_codes:
            raise UsageError(
                f"The tokenizer {path} has ids for {tokenizer.num_codes} image codes; the codec "
                f"{recipe.model.codec} has {num_codes}."
            )
        return tokenizer
    place = recipe.output / TOKENIZER
    # Before the first checkpoint nothing depends on it, and the data may have been corrected since it was made.
    if group.first and latest_checkpoint(recipe.output / "checkpoints") is None:
        characters = common_characters(section.characters)
        trained = Tokenizer.train(_texts(recipe), section.vocab_size, num_codes, characters, section.max_token_length)
        write_whole(place, trained.save)
    group.wait()
    return Tokenizer.load(place)


def _texts(recipe: Recipe) -> Iterator[str]:
    """The texts of all the recipe's data, and those of its tasks' instructions."""
    for section in recipe.data:
        task = get_task(section.task)
        yield from get_task(section.against).texts() if section.against else ()
        yield from texts_of(task, open_section(section), section.columns, TOKENIZER_TEXTS // len(recipe.data))


def texts_of(task: Task, records: Records, columns: Mapping[str, str], limit: int) -> Iterator[str]:
    """The texts of a task's instructions, and those that its slots have in the first `limit` records."""
    yield from task.texts()
    mapping = SlotView.of(task, records, columns).mapping
    spoken = ("text", "label", "table", "messages")
    kinds = {name: slot.type for name, slot in task.slots.items() if slot.type in spoken}
    used = [(column, kinds[name]) for name, column in mapping.items() if name in kinds]
    for index in range(min(len(records), limit)):
        record = records[index]
        for column, kind in used:
            if kind == "messages":
                with suppress(DataError):  # reported when the record is read
                    yield from map(text_of, conversation_of(record, column))
                continue
            texts = _strings(record.get(column))
            yield from map(normalize_label, texts) if kind == "label" else texts


def _strings(value: Any) -> Iterator[str]:
    """Every text inside a value: of a list, of a table's names and cells."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif value is not None and not isinstance(value, bytes):
        yield str(value)


def open_section(section: SourceSection, rejects: Rejects | None = None) -> Source:
    return open_source(
        section.source, section.format, section.images, stream=section.stream, limit=section.limit, rejects=rejects
    )


def make_loader(
    recipe: AnyRecipe, group: Group, entries: list[Entry], processor: Processor | None, rejects: Rejects
) -> Loader:
    """The recipe's loader for this process; an image codec's pictures need no processor."""
    order = {"seed": recipe.seed, "rank": group.rank, "world": group.world, "threads": recipe.train.workers}
    return Loader(entries, processor, recipe.train.batch_size, **order, rejects=rejects)  # type: ignore[arg-type]


def open_rejects(output: Path, settings: TrainSection, group: Group) -> Rejects:
    """The rejects file of this process."""
    name = "rejects.jsonl" if group.first else f"rejects-{group.rank}.jsonl"
    return Rejects(output / name, settings.max_rejected_fraction)


def build_entries(recipe: Recipe, session: Session, group: Group) -> tuple[list[Entry], Rejects]:
    """The recipe's data, each source with its task; and the rejects file.

    A label slot without a set of its own gets the labels that the data have.
    """
    rejects = open_rejects(recipe.output, recipe.train, group)
    entries: list[Entry] = []
    labels: dict[str, dict[str, tuple[str, ...]]] = {}
    for section in recipe.data:
        task = _task(section.task, session)
        source = open_section(section, rejects)
        if section.answers == "teacher" and recipe.distill:
            source = teacher_answers(source, task, section.columns, recipe.distill.teacher, recipe.output, group)
        source = _by_turns(source, task, section, session.processor)
        classes = {} if section.stream else count_classes(task, source, section.columns)
        for slot, values in classes.items():
            if slot not in task.labels and 0 < len(values.counts) <= MAX_LABELS:
                found = labels.setdefault(task.name, {})
                found[slot] = tuple(dict.fromkeys((*found.get(slot, ()), *sorted(values.counts))))
        against = _task(section.against, session) if section.against else None
        if (against or task).embeds != task.embeds or (task.embeds and against is None):
            raise UsageError(
                f"{section.source}: the tasks {task.name} and {section.against or '(no against)'}: a vector is learned "
                "by two tasks that give one, task and against."
            )
        entries.append(
            Entry(
                section.name or section.source, source, task, section.weight, section.columns, section.start,
                section.noise, against, section.against_columns, tuple(section.same), section.shots, classes,
            )
        )  # fmt: skip
    for entry in entries:  # two sources of one task share its labels
        entry.task = entry.task.with_labels(labels.get(entry.task.name, {}))
    return entries, rejects


def _by_turns(source: Source, task: Task, section: DataSection, processor: Processor) -> Source:
    """Conversations with an example for each answer, where one for all cannot be made; others unchanged."""
    if not task.converses or (section.turns == "all" and keeps_turns(processor)):
        return source
    if section.stream and section.turns == "all":
        raise UsageError(
            f"{section.source}: this model needs an example for each answer of a conversation, whose number a streamed "
            "source does not tell: take turns: last, or leave stream out."
        )
    key = SlotView.of(task, source, section.columns).mapping[task.converses]
    return Source(source.name, TurnRecords(source, key, section.turns), source.rejected)


def _task(name: str, session: Session) -> Task:
    """The task of this name: the library's, or one that only the model has."""
    own = name in session.tasks and name not in library_names()
    return asked_of(session.tasks[name] if own else get_task(name), session.processor)


def check_evaluation(recipe: Recipe, session: Session) -> None:
    """Raises now the error that the first evaluation would, hours later, for tasks, data, columns or metrics that do
    not fit."""
    for section in recipe.evaluation.data:
        task, source = session.task(section.task), open_section(section)
        SlotView.of(task, source, section.columns)
        if section.against:
            SlotView.of(session.task(section.against), source, section.against_columns)
        else:
            check_metrics(task)


def evaluate_entries(recipe: Recipe, session: Session) -> Iterator[tuple[str, dict[str, float]]]:
    """Each source of the recipe's evaluation, and its task's metrics on the first `limit` records."""
    for section in recipe.evaluation.data:
        limit = min(section.limit or recipe.evaluation.limit, recipe.evaluation.limit)
        if section.against:
            found = measure_retrieval(
                session, section.task, section.against, section.source, section.columns, section.against_columns,
                section.same, section.format, section.images, limit, truncate="start",
            )  # fmt: skip
        else:
            found = measure(
                session, section.task, section.source, section.columns, section.format, section.images, limit,
                answers=False, spread=True, truncate="start",
            )  # fmt: skip
        yield section.name or f"{found.task} {section.source}", found.values()


def data_notes(recipe: Recipe, entries: list[Entry]) -> list[str]:
    """Sentences on the classes of each source's labels, and on records that are both trained and measured on;
    `entries` are those of the recipe's data, in their order."""
    classes = [
        f"{entry.name}: {text}"
        for entry in entries
        for slot, found in entry.classes.items()
        for text in found.sentences(slot)
    ]
    return [*classes, *_overlaps(recipe, entries)]


def _overlaps(recipe: Recipe, entries: list[Entry]) -> Iterator[str]:
    """A warning for each source that is measured on, for each one of the same task that is trained on."""
    for measured in recipe.evaluation.data:
        limit = min(measured.limit or recipe.evaluation.limit, recipe.evaluation.limit)
        for section, entry in zip(recipe.data, entries, strict=True):
            if section.task != measured.task or section.stream or not isinstance(entry.records, Source):
                continue
            test = open_section(measured)
            found = find_overlap(entry.task, entry.records, entry.columns, test, measured.columns, limit, COMPARED)
            if found.found:
                yield (
                    f"Warning: {len(found.found):,} of the {found.total:,} records of {test.name} that are measured on "
                    f"have inputs that are trained on, in {entry.name} (first: {found.first})."
                )
