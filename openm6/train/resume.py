"""The test whether a run may be resumed: its data, model and tasks have to be those that its recipe names now.

Compared with the newest checkpoint: its `recipe.yaml`, and the hashes of the contents of all that the recipe names.

    free      length, intervals, machine and name of the run: changed silently
    warned    other settings of the training: changed from here on, with a warning
    refused   everything else: model, data, tasks, columns, adapter, seed, and what the optimizer's states depend on
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openm6.core.bases import directory_hash
from openm6.core.errors import UsageError
from openm6.data.digest import json_hash
from openm6.tasks.library import get as get_task
from openm6.train.checkpoint import latest_checkpoint, state_of, step_of
from openm6.train.recipe import AnyRecipe, load_recipe
from openm6.train.setup import open_section

RECIPE = "recipe.yaml"
FREE = (
    "name", "output", "parallel.", "evaluation.", "train.steps", "train.keep", "train.log_every",
    "train.checkpoint_every", "train.workers", "train.accumulate", "train.compile", "train.country",
    "train.max_rejected_fraction",
)  # fmt: skip
WARNED = ("train.", "distill.", "vectors.")
REFUSED = ("train.optimizer", "train.freeze_image_encoder")
BY_CONTENT = (
    "model.path", "model.codec", "tokenizer.path", "distill.teacher", "codec.path", "codec.perceptual_model",
)  # fmt: skip
"""Model directories: compared by content, not by path."""


@dataclass(frozen=True, slots=True)
class Resumption:
    """`content`: hashes of what the recipe names, by key; `warnings`: changes for the remaining steps; `finished`:
    nothing is left to do; `stopped_early`: because the measures got no better."""

    content: dict[str, str]
    warnings: list[str]
    finished: bool
    step: int = 0
    stopped_early: bool = False

    def messages(self, recipe: AnyRecipe) -> list[str]:
        """Sentences for the user."""
        changes = "; ".join(self.warnings)
        if self.finished:
            more, why = f"train.steps=N, above {self.step}", ""
            if self.stopped_early:
                more = f"evaluation.patience=N, above {recipe.evaluation.patience}"
                why = "; it stopped because the measures got no better"
            text = (
                f"This run is finished ({self.step} steps{why}): nothing was trained. For more steps: {more}; "
                f"to train anew: choose another output, or delete {recipe.output}."
            )
            return [text + (f" These changes had no effect: {changes}." if changes else "")]
        return [f"The steps to come use what changed since the last checkpoint: {changes}."] if changes else []


def check_resumption(recipe: AnyRecipe) -> Resumption:
    """Look at what is in the recipe's output, and change nothing.

    Raises UsageError, with every reason, where a run is there that this recipe cannot resume.
    """
    content = _content(recipe)
    latest = latest_checkpoint(recipe.output / "checkpoints")
    if latest is None or not (latest / RECIPE).is_file():
        return Resumption(content, [], False)
    state = state_of(latest)
    before, now = (_flat(one.model_dump(mode="json")) for one in (load_recipe(latest / RECIPE), recipe))
    refused: list[str] = []
    warnings: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        was, is_now = _shown(before.get(key)), _shown(now.get(key))
        if was != is_now and not key.startswith(FREE) and key not in content and key not in state["content"]:
            changes = warnings if key.startswith(WARNED) and key not in REFUSED else refused
            changes.append(f"{key} was {was} and is {is_now}")
    for key in content.keys() & state["content"].keys():
        if content[key] != state["content"][key]:
            refused.append(f"{key} ({_shown(now.get(key))}) has another content than before")
    refused += [f"{key} was not there or is there no more" for key in content.keys() ^ state["content"].keys()]
    if refused:
        raise UsageError(
            f"The run in {recipe.output} cannot be resumed: {'; '.join(sorted(refused))}. Choose another output, or "
            f"delete {recipe.output} to train anew."
        )
    step, patience = step_of(latest), recipe.evaluation.patience
    stopped_early = patience is not None and step < recipe.train.steps and state["waited"] >= patience
    finished = (stopped_early or step >= recipe.train.steps) and _has_ended(recipe.output, step)
    return Resumption(content, warnings, finished, step, stopped_early)


def _content(recipe: AnyRecipe) -> dict[str, str]:
    values = _flat(recipe.model_dump(mode="json"))
    found = {key: directory_hash(Path(values[key])) for key in BY_CONTENT if values.get(key)}
    places: list[tuple[str, Any]] = [(f"data.{number}", section) for number, section in enumerate(recipe.data)]
    if recipe.evaluation.patience:  # what is measured decides when it stops, and which weights are the best
        places += [(f"evaluation.data.{number}", section) for number, section in enumerate(recipe.evaluation.data)]
    for place, section in places:
        found[f"{place}.source"] = open_section(section).content_hash()
        for role in ("task", "against"):
            if name := getattr(section, role, None):
                found[f"{place}.{role}"] = _task_hash(name)
    return found


def _task_hash(name: str) -> str:
    """Hash of a task's definition; a task that only the model has is part of the model's hash."""
    try:
        return json_hash(get_task(name).to_dict())
    except UsageError:
        return json_hash(name)


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    """Every single value by its key path: train.steps, data.0.source."""
    parts: Iterator[tuple[Any, Any]]
    if isinstance(value, Mapping) and value:
        parts = iter(value.items())
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        parts = iter(enumerate(value))
    else:
        return {place: value}
    return {k: v for name, one in parts for k, v in _flat(one, f"{place}.{name}" if place else str(name)).items()}


def _shown(value: Any) -> str:
    return "not given" if value is None or value == {} else str(value)


def _has_ended(output: Path, step: int) -> bool:
    """True where the final model is written, by the last line of the log."""
    try:
        last = json.loads((output / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return False
    return bool(last.get("finished")) and last["step"] == step and (output / "model").is_dir()
