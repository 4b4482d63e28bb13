"""State and helpers shared by all pages: server, catalogue, jobs, the visitor's key, texts in one language, errors."""

from __future__ import annotations

import base64
import html
import json
import logging
import re
import time
from asyncio import to_thread
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import cache
from importlib import resources
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

import gradio as gr
import yaml

from openm6.core.errors import DataError, OpenM6Error, Refusal, UsageError
from openm6.core.images import open_image
from openm6.hub.catalogue import Catalogue, Version
from openm6.hub.jobs import Jobs
from openm6.inference.edit import Cut
from openm6.serve.fleet import Deployment
from openm6.serve.incoming import put_back, sent
from openm6.serve.keys import MANAGE, Key
from openm6.serve.meter import Charge
from openm6.serve.server import LOCAL, Server, TaskRequest

log = logging.getLogger("openm6.console")


class PageError(UsageError):
    """An error whose message is already in the language of the page."""


@cache
def _file(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(resources.files("openm6.console").joinpath(name).read_text("utf-8"))
    return found


class PageContext:
    """The state and helpers shared by all pages of one language; the pages call it `ui`."""

    def __init__(self, server: Server, language: str, batches: Path | None = None):
        self.server, self.language = server, language
        self.batches = batches or Path("runs")
        self.jobs = Jobs()
        self.catalogue = Catalogue()

    # Words

    def say(self, english: str, **values: Any) -> str:
        """The text in the language of the page, with `values` in the place of its {names}."""
        text = _file("zh.yaml")[english] if self.language == "zh" else english
        return text.format(**values) if values else text

    def title(self, task: str, description: str) -> str:
        """The title of a task; for a task outside the library, the start of its description or its name."""
        if self.language == "en" and task in _file("words.yaml")["tasks"]:
            return str(_file("words.yaml")["tasks"][task])
        return re.split(r"：| \(", description)[0] or task

    def slot(self, name: str) -> str:
        """The label of a slot; for a slot outside the library, its name."""
        return str(_file("words.yaml")["slots"].get(name, [name, name])[self.language == "zh"])

    def time(self, seconds: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))

    # The visitor

    def lets_in(self, name: str, secret: str) -> bool:
        """True if `name` and `secret` belong to the same key."""
        key = self.server.keys.find(secret.strip()) if self.server.keys else LOCAL
        return key is not None and key.name == name.strip()

    def key(self, request: gr.Request) -> Key:
        """The visitor's key, read again at each call. Raises PageError for a removed key."""
        if self.server.keys is None:
            return LOCAL
        found = next((key for key in self.server.keys.list() if key.name == request.username), None)
        if found is None:
            raise self.error("This key is no longer valid.")
        return found

    def manager(self, request: gr.Request) -> Key:
        """The visitor's key. Raises PageError for a key without the role manage."""
        key = self.key(request)
        if not key.may(MANAGE):
            raise self.error("This action requires a key with the role manage.")
        return key

    # Models and tasks

    def choices(self) -> list[tuple[str, str]]:
        """The models and their adapters, as (label, value)."""
        found = []
        for name, deployment in self.server.fleet.deployments.items():
            found += [name, *(f"{name}:{adapter}" for adapter in deployment.about["adapters"])]
        return [(one.replace(":", " · "), one) for one in found]

    def tasks(self, who: str, trained: bool) -> list[tuple[str, str]]:
        """The tasks that a model was trained on, or the others, as (title, name), in the same order on every page."""
        known, english = self.deployment(who)[0].about["tasks"], _file("words.yaml")["tasks"]
        found = [name for name, one in known.items() if one["trained"] == trained]
        found.sort(key=lambda name: english.get(name, name))
        return [(self.title(name, known[name]["description"]), name) for name in found]

    def deployment(self, who: str) -> tuple[Deployment, str | None]:
        """The deployment and the adapter of a value of `choices`."""
        name, _, adapter = who.partition(":")
        return self.server.fleet.get(name or None), adapter or None

    async def ask(
        self, request: gr.Request, who: str, task: str, asked: TaskRequest, region: Cut | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a request (Server.answer), each with its seed. `region`: the part of a picture to redraw. Tasks
        that the model was not trained on are allowed, since the page warns about them. Raises OpenM6Error.
        """
        key = self.key(request)
        try:
            self.server.meter.count(key)
        except Refusal as error:
            seconds = round(error.retry_after or 0) + 1
            raise self.error("Too many requests: retry in {seconds} s.", seconds=seconds) from None
        deployment, adapter = self.deployment(who)
        asked = asked.model_copy(update={"adapter": adapter, "allow_untrained": True})
        message = await self.server.message(deployment, task, asked)
        if region is not None:
            message["edit"] = sent(region)
        async with aclosing(self.server.answer(Charge(self.server.meter, key), deployment, message)) as events:
            async for event in events:
                if region is not None and "value" in event:
                    event["value"] = await to_thread(put_back, region, event["value"])
                yield {**event, "seed": message["decoding"].get("seed")}

    def kept(self, kind: str) -> list[Version]:
        """All versions in the catalogue; none if it cannot be opened (it needs MLflow)."""
        try:
            return self.catalogue.every(kind)
        except OpenM6Error:
            return []

    # What visitors give

    def number(self, text: str | None) -> int | float | None:
        """The number in a field, None for an empty one. Raises PageError for anything else."""
        text = (text or "").strip()
        try:
            return None if not text else int(text) if text.isdecimal() else float(text)
        except ValueError:
            raise self.error("An option has to be a number, not {text}.", text=shortened(text, 20)) from None

    def picture(self, path: str, param: str | None = None) -> str:
        """An uploaded picture's file as base64. Raises PageError for a file that is no picture."""
        try:
            open_image(path)
        except DataError:
            raise self.error(
                "This file cannot be read as a picture: use a JPEG, PNG, WebP or TIFF file of at most 32 MiB.",
                param=param,
            ) from None
        return base64.b64encode(Path(path).read_bytes()).decode()

    # Errors

    def error(self, english: str, param: str | None = None, **values: Any) -> PageError:
        return PageError(self.say(english, **values), param=param)

    def alert(self, error: OpenM6Error | None) -> str:
        """An error as HTML, "" for None. On a Chinese page the English message stands below in small type."""
        if error is None:
            return ""
        text = html.escape(str(error), quote=False)
        if self.language == "zh" and not isinstance(error, PageError):
            known = _file("words.yaml")["errors"]
            text = f'{known.get(error.code, known["failed"])}<small lang="en">{text}</small>'
        return f'<p role="alert">{text}</p>'

    def beside(self, notes: Mapping[str, Any], error: OpenM6Error | None = None) -> list[str]:
        """The contents of `notes`, which are keyed by field ("": no field): the error at its field, "" elsewhere."""
        field = (error.param or "").rpartition(".")[2] if error else ""
        place = field if field in notes else ""
        return [self.alert(error) if name == place else "" for name in notes]

    def unforeseen(self, error: Exception) -> OpenM6Error:
        """The error itself if it is an OpenM6Error; otherwise a general message, and the traceback in the log."""
        if isinstance(error, OpenM6Error):
            return error
        log.error("The console failed.", exc_info=error)
        return self.error("Internal error: see the server's log.")

    def on(
        self,
        events: Any,
        act: Callable[..., Any],
        inputs: Sequence[Any] = (),
        outputs: Sequence[Any] = (),
        notes: Mapping[str, Any] | None = None,
        manage: bool = False,
        **more: Any,
    ) -> Any:
        """Fill the outputs by `act(*inputs)` at these events, or at page load if `events` is None. The visitor's key is
        checked first, with `manage` also its role. A function that is not async runs in a thread. Errors are shown
        in `notes`, without them in a pop-up message."""
        notes = notes or {}

        async def acting(request: gr.Request, *values: Any) -> Any:
            try:
                (self.manager if manage else self.key)(request)
                found = await (act(*values) if iscoroutinefunction(act) else to_thread(act, *values))
                shown = [*self.beside(notes), *(found if len(outputs) > 1 else [found][: len(outputs)])]
            except Exception as failed:
                error = self.unforeseen(failed)
                if not notes:
                    raise gr.Error(self.alert(error), title=self.say("Error"), print_exception=False) from None
                shown = [*self.beside(notes, error), *[gr.skip()] * len(outputs)]
            return shown if len(shown) != 1 else shown[0]

        return gr.on(events, acting, list(inputs), [*notes.values(), *outputs], api_visibility="private", **more)


def note() -> Any:
    """A component for an error message; hidden while it is empty."""
    return gr.HTML(elem_classes="note", apply_default_css=False)


def notes(*fields: str) -> dict[str, Any]:
    return {field: note() for field in fields}


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """HTML of a table that scrolls by itself on a narrow page."""
    head = "".join(f"<th scope='col'>{html.escape(one)}</th>" for one in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(one))}</td>" for one in row) + "</tr>" for row in rows)
    named = html.escape(caption, quote=True)
    return (
        f'<h2>{named}</h2><div class="wide" role="region" tabindex="0" aria-label="{named}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def first_step(sentence: str, command: str = "") -> str:
    """HTML for an empty page: what to do first, and the command for it."""
    code = f"<code>{html.escape(command)}</code>" if command else ""
    return f'<div class="first"><p>{html.escape(sentence)}</p>{code}</div>'


def listing(choices: Sequence[Any], value: Any, sentence: str, command: str = "") -> list[Any]:
    """Updates of a page that lists something: what to do first if there is nothing, the visibility of the rest of the
    page, and the dropdown with its value."""
    first = "" if choices else first_step(sentence, command)
    return [first, gr.Column(visible=bool(choices)), gr.Dropdown(choices=choices, value=value)]


def plain(value: Any) -> str:
    """A text as it is, any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shortened(value: Any, most: int, keep_end: bool = False) -> str:
    """The value as text of at most `most` characters; `keep_end` cuts the beginning, as suits a path."""
    text = "" if value is None else str(value)
    if len(text) <= most:
        return text
    return "…" + text[1 - most :] if keep_end else text[: most - 1] + "…"
