"""What all pages share: the server, what a team keeps, whoever looks, and the words of a language."""

from __future__ import annotations

import asyncio
import html
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
import yaml

from openm6.errors import OpenM6Error, UsageError
from openm6.hub.catalogue import Catalogue, Version
from openm6.hub.jobs import Jobs
from openm6.serve.fleet import Deployment
from openm6.serve.keys import MANAGE, Key
from openm6.serve.server import LOCAL, Server, TaskRequest

T = TypeVar("T")


@cache
def _chinese() -> dict[str, str]:
    found: dict[str, str] = yaml.safe_load(resources.files("openm6.console").joinpath("zh.yaml").read_text("utf-8"))
    return found


class Desk:
    """Of one language."""

    def __init__(self, server: Server, language: str, batches: Path | None = None):
        self.server, self.language = server, language
        self.batches = batches or Path("runs")
        self.jobs = Jobs()
        self.catalogue = Catalogue()

    def say(self, english: str, **values: Any) -> str:
        """A text of the page in its language; {names} in it stand for the values."""
        text = _chinese()[english] if self.language == "zh" else english
        return text.format(**values) if values else text

    # Who looks

    def lets_in(self, name: str, secret: str) -> bool:
        """Whether these are a key's name and the key."""
        key = self.server.keys.find(secret.strip()) if self.server.keys else LOCAL
        return key is not None and key.name == name.strip()

    def key(self, request: gr.Request) -> Key:
        """Of whoever looks, as it is now: one that was removed may nothing any more."""
        if self.server.keys is None:
            return LOCAL
        found = next((key for key in self.server.keys.list() if key.name == request.username), None)
        if found is None:
            raise refusal(self.say("This key is valid no more."))
        return found

    def manager(self, request: gr.Request) -> Key:
        """Likewise, of someone who may change things."""
        key = self.key(request)
        if not key.may(MANAGE):
            raise refusal(self.say("This takes a key that manages."))
        return key

    # What is asked

    def choices(self) -> list[tuple[str, str]]:
        """The models and their adapters, as (shown, value)."""
        found = []
        for name, deployment in self.server.fleet.deployments.items():
            found += [name, *(f"{name}:{adapter}" for adapter in deployment.about["adapters"])]
        return [(one.replace(":", " · "), one) for one in found]

    def tasks(self, who: str) -> list[tuple[str, str]]:
        """Of a model, those that it was taught first, as (shown, value)."""
        known = self.deployment(who)[0].about["tasks"]
        ordered = sorted(known, key=lambda name: (not known[name]["trained"], name))
        return [(f"{'★ ' if known[name]['trained'] else ''}{name}", name) for name in ordered]

    def deployment(self, who: str) -> tuple[Deployment, str | None]:
        """The model and the adapter of a choice."""
        name, _, adapter = who.partition(":")
        return self.server.fleet.get(name or None), adapter or None

    async def ask(
        self, request: gr.Request, who: str, task: str, asked: TaskRequest, edit: Mapping[str, bytes] | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """What becomes of a request (Deployment.ask). Raises an error that the page shows."""
        key = self.key(request)
        try:
            if (beyond := self.server.meter.count(key)) is not None:
                raise UsageError(self.say("Too often: again in {seconds} s.", seconds=round(beyond.seconds) + 1))
            deployment, adapter = self.deployment(who)
            # The page says of a task that the model was not trained on it.
            chosen = asked.model_copy(update={"adapter": adapter, "allow_untrained": True})
            message = await self.server.message(deployment, task, chosen)
            if edit is not None:
                message["edit"] = dict(edit)
            async with aclosing(self.server.answer(key, deployment, message)) as events:
                async for event in events:
                    yield event
        except OpenM6Error as error:
            raise refusal(str(error)) from None

    # What is kept

    def kept(self, kind: str) -> list[Version]:
        """All versions in the catalogue; none where it cannot be opened (it needs MLflow)."""
        try:
            return self.catalogue.every(kind)
        except OpenM6Error:
            return []

    def time(self, seconds: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))

    async def do(self, act: Callable[[], T]) -> T:
        """Something that takes a while. Raises an error that the page shows."""
        try:
            return await asyncio.to_thread(act)
        except OpenM6Error as error:
            raise refusal(str(error)) from None


def refusal(message: str) -> gr.Error:
    """Shown as it is: Gradio takes what an error says for HTML."""
    return gr.Error(html.escape(message), print_exception=False)


def plain(value: Any) -> str:
    """As a text: JSON of what is none."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shortened(value: Any, most: int) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= most else text[: most - 1] + "…"
