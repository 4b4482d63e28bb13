"""The form of a task, generated from its slots, and the display of its answers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw

from openm6.console.context import PageContext, note, plain
from openm6.core.files import lines_of
from openm6.core.images import open_image
from openm6.serve.server import TaskRequest

Description = Mapping[str, Any]
"""A task as a worker describes it (worker.described)."""

SMALL = 512
"""Longer side in pixels below which a picture is enlarged before boxes are drawn on it."""
SHOWN = 8
"""Number of dimensions of a vector that are shown."""

OPTIONS = {
    "picture": (("passes", 8), ("guidance", None), ("temperature", None), ("seed", None)),
    "text": (("max_new_tokens", 64), ("temperature", 0), ("num_beams", 1), ("seed", None)),
}
"""Decoding options with a field here, by the kind of a task, each with its default. Without a seed one is drawn."""

SAMPLES = {
    "grounding": "scenes", "visual_entailment": "scenes", "image_text_matching": "demo:matches", "ocr": "writing",
    "try_on": "tryon", "image_editing": "edits", "vqa": "demo:questions", "image_classification": "digits",
}  # fmt: skip
"""Built-in data that fill in the example of a form with a picture, by task; for all other tasks `demo:items`."""


class Form:
    """The input fields of a task, rendered on construction, each with a note below it for its error.

    `notes` has the notes by slot, and under "" the general one, which the page renders beside its button.
    """

    def __init__(self, ui: PageContext, name: str, about: Description):
        self.ui, self.name, self.about = ui, name, about
        self.slots = {slot: about["slots"][slot] for slot in about["inputs"]}
        self.fields: list[Any] = []
        self.notes: dict[str, Any] = {}
        for slot, kind in self.slots.items():
            self.fields.append(self._field(slot, kind))
            self.notes[slot] = note()
        self.notes[""] = gr.HTML(elem_classes="note", apply_default_css=False, render=False)
        say, defaults = ui.say, OPTIONS.get(about["kind"], ())
        labels = {
            "passes": say("Decoding passes"), "guidance": say("Guidance scale"), "temperature": say("Temperature"),
            "seed": say("Seed"), "max_new_tokens": say("Max tokens"), "num_beams": say("Beam width"),
        }  # fmt: skip
        with gr.Accordion(say("Options"), open=False):
            with gr.Row():
                # Without `interactive` a field with a value that is made when its section is opened takes no input.
                self.options = [  # not gr.Number, which turns an empty field into 0
                    gr.Textbox(
                        _text(about["decode"].get(option, default)), label=labels[option], min_width=110,
                        interactive=True,
                    )
                    for option, default in defaults
                ]  # fmt: skip
                self.count = gr.Slider(1, 16, 4, step=1, label=say("Pictures"), visible=self.draws, interactive=True)
            text = say("Few-shot examples with answers, one JSON object per line")
            self.examples = gr.Textbox(label=text, lines=2, visible=about["kind"] == "text")
            gr.Textbox(about["instructions"][0], label=say("Instruction"), interactive=False, lines=2, max_lines=2)

    @property
    def enters(self) -> list[Any]:
        """The events of the Enter key."""
        return [field.submit for field in self.fields if isinstance(field, gr.Textbox)]

    @property
    def draws(self) -> bool:
        return bool(self.about["kind"] == "picture")

    @property
    def inputs(self) -> list[Any]:
        """The components whose values `request` takes."""
        return [*self.fields, *self.options, self.count, self.examples]

    def _field(self, slot: str, kind: str) -> Any:
        example = self.about["example"].get(slot)
        label = self.ui.slot(slot)
        if kind == "image":
            field = gr.Image(type="filepath", label=label, sources=["upload", "clipboard"], height=220)
            field.preprocess = _path  # type: ignore[method-assign]
            return field
        if kind == "table" and isinstance(example, list):
            columns = list(example[0])
            return gr.Dataframe(
                [[row.get(column, "") for column in columns] for row in example], headers=columns, label=label,
                type="pandas", interactive=True,
            )  # fmt: skip
        if kind in ("table", "triples"):
            say = self.ui.say
            headers = [say("name")] if kind == "table" else [say("subject"), say("relation")]
            headers.append(say("value"))
            rows = [list(row) for row in (example.items() if isinstance(example, dict) else example or [])]
            return gr.Dataframe(
                rows or [[""] * len(headers)], headers=headers, label=label, type="array", interactive=True,
                column_count=len(headers),
            )  # fmt: skip
        return gr.Textbox(label=label, lines=1, max_lines=8, placeholder=_filled(kind, example) or "")

    def request(self, values: Sequence[Any]) -> TaskRequest:
        """The request for these values of `inputs`. Raises PageError."""
        given = list(values)
        examples, count = given.pop(), given.pop()
        fields, options = given[: len(self.fields)], given[len(self.fields) :]
        inputs = {
            slot: self._given(slot, kind, value) for (slot, kind), value in zip(self.slots.items(), fields, strict=True)
        }
        names = [name for name, _ in OPTIONS.get(self.about["kind"], ())]
        numbers = zip(names, map(self.ui.number, options), strict=True)
        decoding = {name: number for name, number in numbers if number is not None}
        try:
            records = [json.loads(line) for line in lines_of(examples or "")]
            return TaskRequest(
                inputs={slot: value for slot, value in inputs.items() if value is not None}, decoding=decoding,
                examples=records, candidates=int(count) if self.draws else 1,
            )  # fmt: skip
        except (ValueError, RecursionError):
            raise self.ui.error("Each example is one JSON object on its own line.") from None

    def _given(self, slot: str, kind: str, value: Any) -> Any:
        return self.ui.picture(value, slot) if kind == "image" and value is not None else _given(kind, value)

    def example(self) -> Any:
        """Example values of the fields; for a task with a picture, from a record of the built-in data."""
        from openm6.data.source import open_source

        example = dict(self.about["example"])
        if "image" in self.slots.values():
            record = open_source(f"{SAMPLES.get(self.name, 'demo:items')}/test")[7]
            for slot, kind in self.slots.items():
                if kind == "image":
                    example[slot] = open_image(record[slot] if slot in record else record["image"])
                elif slot in record and isinstance(record[slot], str):
                    example[slot] = record[slot]
        filled = [_filled(kind, example.get(slot)) for slot, kind in self.slots.items()]
        return filled if len(filled) > 1 else filled[0]


class Answer:
    """The components that show an answer."""

    def __init__(self, ui: PageContext, about: Description, label: str | None = None):
        self.ui, self.about = ui, about
        self.shows_pictures = about["kind"] == "picture" or "box" in _outputs(about).values()
        self.text = gr.Textbox(
            label=label or ui.say("Answer"), lines=3, interactive=False, buttons=["copy"], elem_classes="said",
            placeholder=ui.say("The answer appears here."), visible=about["kind"] != "picture",
        )  # fmt: skip
        self.pictures = gr.Gallery(
            label=label or ui.say("Pictures"), columns=2, height="auto", object_fit="contain", format="png",
            visible=self.shows_pictures, elem_classes="drawn",
        )  # fmt: skip
        self.caption_line = gr.Markdown(elem_classes="quiet")

    @property
    def outputs(self) -> list[Any]:
        return [self.text, self.pictures, self.caption_line]

    def nothing(self) -> tuple[Any, ...]:
        return "", [], ""

    def written(self, text: str) -> tuple[Any, ...]:
        """Values of `outputs` while the answer is being generated."""
        return text, gr.skip(), gr.skip()

    def whole(self, event: Mapping[str, Any], asked: TaskRequest, seconds: float, first: float) -> tuple[Any, ...]:
        """Values of `outputs` for the complete answer; `first`: seconds to the first token."""
        value, say = event["value"], self.ui.say
        took, seed = say("{seconds} s", seconds=f"{seconds:.2f}"), event.get("seed")
        seed = "" if seed is None else " · " + say("seed {seed}", seed=f"{seed:.0f}")
        if self.about["kind"] == "picture":
            shown = [(Image.open(io.BytesIO(one["image"])), self._caption(one, one is value[0])) for one in value]
            doubt = say("The model does not recognize the prompt in the best picture.") + " "
            return "", shown, doubt * bool(value[0].get("uncertain")) + took + seed
        if self.about["kind"] == "text" and event["tokens"]:
            took = say(
                "{tokens} tokens in {seconds} s, the first after {first} s", tokens=event["tokens"],
                seconds=f"{seconds:.2f}", first=f"{first:.2f}",
            )  # fmt: skip
        return self._said(value), self._boxes(value, asked), took + seed

    def _caption(self, one: Mapping[str, Any], is_best: bool) -> str:
        """The model's estimates of a generated picture as text; the best of several pictures comes first."""
        say = self.ui.say
        names = {
            "relevance": say("relevance"), "fidelity": say("fidelity"), "quality": say("quality"),
            "reading": say("read back"),
        }  # fmt: skip
        found = [f"{names.get(name, name)} {value:.1f}" for name, value in one.get("estimates", {}).items()]
        return " · ".join([say("best")] * is_best + found)

    def _said(self, value: Any) -> str:
        outputs = _outputs(self.about)
        if self.about["kind"] == "vector":
            some = ", ".join(f"{number:.3f}" for number in value[:SHOWN])
            return self.ui.say("{size} dimensions: {some} ...", size=len(value), some=some)
        if len(outputs) > 1 and isinstance(value, Mapping):
            return "\n".join(f"{self.ui.slot(slot)}: {plain(value.get(slot))}" for slot in outputs)
        return plain(value)

    def _boxes(self, value: Any, asked: TaskRequest) -> list[Any]:
        """The input picture with the answered boxes drawn on it."""
        if "box" not in _outputs(self.about).values():
            return []
        boxes = value if isinstance(value, Mapping) else {self.about["outputs"][0]: value}
        given = next(asked.inputs[slot] for slot in self.about["inputs"] if self.about["slots"][slot] == "image")
        picture = open_image(base64.b64decode(given))  # upright, as the model saw it
        picture = picture.resize([side * max(1, SMALL // max(picture.size)) for side in picture.size])  # type: ignore[arg-type]
        pen = ImageDraw.Draw(picture)
        for slot, kind in _outputs(self.about).items():
            if kind == "box" and boxes.get(slot):
                left, top, right, bottom = boxes[slot]
                w, h = picture.size
                pen.rectangle((left * w, top * h, right * w, bottom * h), outline="red", width=max(2, w // 100))
        return [(picture, "")]


def _outputs(about: Description) -> dict[str, str]:
    return {slot: about["slots"][slot] for slot in about["outputs"]}


def _path(payload: Any) -> str | None:
    """The uploaded file, unread: Gradio's own decoding shows "Error" for an invalid picture."""
    return payload and payload.path


def _given(kind: str, value: Any) -> Any:
    """A field's value as the API takes it; None for an empty field."""
    if value is None or (isinstance(value, str) and not value):
        return None
    if kind == "messages":  # JSON of a conversation, or its only message
        with suppress(ValueError, RecursionError):
            if isinstance(found := json.loads(value), list):
                return found
        return [{"role": "user", "content": value}]
    if kind == "triples":
        return [row for row in value if any(row)] or None
    if kind == "table":  # rows with names of columns, or names with values
        if hasattr(value, "to_dict"):
            return value.to_dict("records")
        return {row[0]: row[1] for row in value if row[0]} or None
    return value


def _text(value: Any) -> str:
    """The first of several reference texts; "" for None."""
    value = value[0] if isinstance(value, list) and value else value
    return "" if value is None else str(value)


def _filled(kind: str, value: Any) -> Any:
    if kind in ("text", "label"):
        return _text(value)
    if kind == "choices":
        return ",".join(value or ())
    if kind == "messages":
        return plain(value)
    if isinstance(value, dict):
        return [list(row) for row in value.items()]
    if kind == "table" and isinstance(value, list):
        return [list(row.values()) for row in value]
    return value
