"""The objective of M6: sequences of pictures and text for tasks, and the loss of their targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openm6.core.batch import Batch, pack, pad, pad_drawn
from openm6.core.errors import UsageError
from openm6.core.sequence import CAUSAL, IGNORE, ContrastTarget, HeadTarget, Sequence
from openm6.data.loader import Entry
from openm6.inference.session import Session
from openm6.model import M6
from openm6.model.adapters import adapter_config, add_adapter, prompt_length
from openm6.model.count import attention_pairs, training_flops
from openm6.model.files import meta_model
from openm6.tasks.heads import HEADS
from openm6.train.contrastive import contrast
from openm6.train.distill import DistillationTeacher, relation_loss
from openm6.train.distributed import Group
from openm6.train.objective import MicroBatchResult, Objective
from openm6.train.recipe import AdaptSection, Recipe
from openm6.train.report import Losses
from openm6.train.seen_tokens import SeenTokens, unseen_token_ids
from openm6.train.setup import (
    build_entries,
    build_session,
    check_evaluation,
    data_notes,
    evaluate_entries,
    make_loader,
    source_notes,
)
from openm6.train.start import start_codes
from openm6.weights.origin import copy_papers


class SequenceObjective(Objective):
    """The Objective of M6: sequences of text and images, and the losses of their targets."""

    def __init__(self, recipe: Recipe, group: Group):
        self.recipe, self.settings, self.device = recipe, recipe.train, group.device
        self.path = recipe.model.path
        self.adapter: Any = None
        self.notes: list[str] = []
        self.session = build_session(recipe, group)
        self.notes += source_notes(recipe, self.session) if group.first else []
        entries, rejects = build_entries(recipe, self.session, group)
        self.seen_tokens = SeenTokens(self.session.processor, recipe.output, group)
        if recipe.adapt and self.path:
            self.adapter = self._adapter(recipe.adapt, self.path.resolve(), entries)
            self.session.processor = replace(self.session.processor, prompt=prompt_length(self.adapter))
        self.loader = make_loader(recipe, group, entries, self.session.processor, rejects)
        self.notes += data_notes(recipe, entries) if group.first else []
        both = [task for entry in entries for task in (entry.task, entry.against) if task]
        self.session.tasks |= {task.name: task for task in both}
        check_evaluation(recipe, self.session)
        self.heads = {entry.task.head: HEADS[entry.task.head].outputs for entry in entries if entry.task.head}
        if self.adapter is not None and (new := self.heads.keys() - (self.session.model.config.heads or {}).keys()):
            raise UsageError(
                f"The head {min(new)} is new to {self.path}, and an adapter holds no heads: train all weights "
                "(leave adapt out, --method full)."
            )
        self.group, self.contrasts = group, any(entry.against for entry in entries)
        if self.contrasts and self.session.model.config.picture_side:
            raise UsageError("A model with picture_side learns no vectors: leave data.*.against out.")
        distill = recipe.distill
        self.teacher = DistillationTeacher(distill, self.session.processor, group.device) if distill else None
        width = self.session.model.config.hidden_size
        self.dims = recipe.vectors.dims or [width]
        if max(self.dims) > width:
            raise UsageError(f"vectors.dims has {max(self.dims)}; vectors of this model have {width} numbers.")

    def _adapter(self, settings: AdaptSection, base: Path, entries: list[Entry]) -> Any:
        """The adapter's configuration; LoRA gets embedding rows for ids that the model has not seen."""
        unseen, fraction = unseen_token_ids(entries, self.session.processor)
        rows = None
        if unseen and settings.method == "lora":
            tied = self.session.model.config.tie_word_embeddings
            rows = dict.fromkeys(("embed",) if tied else ("embed", "head"), unseen)
            self.seen_tokens.add_ids(unseen)
            end = ": their rows of the embedding and the output are trained too"
        else:
            end = f", which {settings.method} leaves as they are: lora and full train them"
        if unseen:
            text = f"The model has not seen {len(unseen):,} tokens ({fraction:.1%} of the texts' tokens){end}."
            self.notes.append(text)
        return adapter_config(base, **settings.model_dump(), rows=rows)

    def network(self, shared: bool) -> M6:
        config = self.session.model.config
        if self.recipe.pseudo and not shared:
            config = replace(config, distinct_layers=None)
        self.session.model = model = meta_model(replace(config, heads={**(config.heads or {}), **self.heads}))
        if self.adapter is not None:
            add_adapter(model, self.adapter)
        for name, head in model.heads.items():
            if name not in self.heads:
                head.requires_grad_(False)  # it stays as it is
        if self.settings.freeze_image_encoder and model.image is not None:
            model.image.requires_grad_(False)  # a gradient that nobody takes would count in the norm
        model.label_smoothing = self.settings.label_smoothing
        return model

    def initialize(self, model: M6) -> None:
        """Embeddings of image codes, of a codec that is new to the model."""
        if self.recipe.model.codec is None:
            return
        vectors, first = self.session.codec.vectors(), self.session.processor.tokenizer.code_start
        for weight in {model.embed.weight, model.head_weight}:
            start_codes(weight, first, vectors, self.recipe.seed, model.config.initializer_range)

    def loss_weight(self, examples: list[Sequence]) -> tuple[float, int, int]:
        every = _flat(examples)
        if self.adapter is None:  # its rows alone are trained
            self.seen_tokens.add(every)
        trained = sum(
            (e.image.weight if e.image else 1) * int((e.labels != IGNORE).sum())
            + isinstance(e.target, (ContrastTarget, HeadTarget))
            for e in examples
        )
        return trained, sum(len(e) for e in every), sum(any(one.truncated for one in _flat([e])) for e in examples)

    def micro_batches(self, examples: list[Sequence]) -> list[list[Sequence]]:
        """Sequences, partners and negatives behind their example. One micro-batch, but for a network with block-sparse
        pictures: there sequences without a drawn picture, with one whose codes see each other both ways, and with one
        whose codes are written one after the other are worked on apart. All processes have a kind that one has."""
        sequences = _flat(examples)
        if self.session.model.config.picture_side is None:
            return [sequences]
        kinds: tuple[list[Sequence], ...] = ([], [], [])
        for sequence in sequences:
            image = sequence.image
            kinds[0 if image is None else 1 if sequence.blocks[image.codes.start] != CAUSAL else 2].append(sequence)
        numbers = self.group.sum(torch.tensor([len(kind) for kind in kinds], device=self.device)).tolist()
        return [kind for kind, number in zip(kinds, numbers, strict=True) if number]

    def gather(self) -> None:
        self.session.processor = replace(self.session.processor, seen_tokens=self.seen_tokens.from_all_processes())

    def micro_batch_loss(self, run: Callable[..., Any], examples: list[Sequence]) -> MicroBatchResult:
        batch = self._batch(examples)
        teacher, seen = self.teacher.outputs(batch) if self.teacher else (None, None)
        output = run(batch, teacher)
        loss, trained = output.loss, int((batch.labels != IGNORE).sum())
        if seen is not None and self.recipe.distill and self.recipe.distill.relations and trained:
            # As much a trained position as the others' losses, of which a step takes the mean.
            loss = loss + self.recipe.distill.relations * trained * relation_loss(output.hidden, seen, batch.segments)
        losses = _by_example(output, batch)
        if self.contrasts:
            values, contrasted = self._contrast(output.hidden, batch, examples)
            loss = loss + values.sum()
            told = zip(contrasted, values.tolist(), strict=True)
            losses += [(pair.task, pair.origin, value, 1) for pair, value in told]
        for name in self.heads:
            targets = [(i, e, e.target) for i, e in enumerate(examples) if isinstance(e.target, HeadTarget)]
            answered = [(i, e, target.values) for i, e, target in targets if target.head == name]
            outputs = output.heads[name][[i for i, *_ in answered]]
            wanted = torch.tensor([v for *_, v in answered], dtype=torch.float32, device=outputs.device)
            values = HEADS[name].loss(outputs, wanted) if answered else outputs.sum(1)
            loss = loss + values.sum()
            losses += [(e.task, e.origin, v, 1) for (_, e, _), v in zip(answered, values.tolist(), strict=True)]
        config, positions = self.session.model.config, int((batch.segments > 0).sum())
        flops = training_flops(config, positions, attention_pairs(config, batch), trained)
        return MicroBatchResult(loss, losses, flops, positions, batch.ids.numel(), output.router_statistics)

    def _contrast(self, hidden_BTD: Tensor, batch: Batch, examples: list[Sequence]) -> tuple[Tensor, list[Sequence]]:
        """The loss of every pair among the examples, fp32 [pairs], and those pairs; the positive and the negatives of a
        contrast follow their example."""
        vectors = hidden_BTD.flatten(0, 1)[batch.ends()]
        pairs = [(place, e.target) for place, e in enumerate(examples) if isinstance(e.target, ContrastTarget)]
        queries = [place for place, _ in pairs]
        keys = [place + 1 for place in queries]
        negatives = [place + 2 + i for place, target in pairs for i in range(len(target.negatives))]
        groups, temperature = [target.group for _, target in pairs], self.recipe.vectors.temperature
        losses = contrast(vectors[queries], vectors[keys + negatives], groups, temperature, self.dims, self.group)
        return losses, [examples[place] for place in queries]

    def evaluate(self, model: M6) -> Iterator[tuple[str, Mapping[str, float]]]:
        session = Session(model.eval(), self.session.processor, self.session.tasks.values())
        yield from evaluate_entries(self.recipe, session)

    def describe(self, path: Path) -> None:
        self.session.describe(path, self.adapter)
        if self.recipe.distill:
            copy_papers(self.recipe.distill.teacher, path, "teacher")

    def _batch(self, sequences: list[Sequence]) -> Batch:
        pad_id = self.session.processor.tokenizer.pad_id
        if self.session.model.config.picture_side and any(s.image for s in sequences):
            return pad_drawn(sequences, pad_id).to(self.device)
        if sequences and not self.settings.packing:
            return pad(sequences, pad_id).to(self.device)
        # A GPU wants few shapes: its kernels are compiled and its memory is cut for each.
        even = self.device.type == "cpu"
        return pack(sequences, self.settings.row_length, pad_id, balance_rows=even).to(self.device)


def _flat(examples: list[Sequence]) -> list[Sequence]:
    """Each with the positive and the negatives of its contrast behind it."""
    flat: list[Sequence] = []
    for example in examples:
        flat.append(example)
        if isinstance(example.target, ContrastTarget):
            flat += (example.target.positive, *example.target.negatives)
    return flat


def _by_example(output: Any, batch: Batch) -> Losses:
    """(task, origin, sum of losses, positions) of every example that was trained."""
    if output.losses is None:
        return []
    sums, numbers = output.by_example(len(batch.tasks))
    every = zip(batch.tasks, batch.origins, sums.tolist(), numbers.tolist(), strict=True)
    return [example for example in every if example[-1]]
