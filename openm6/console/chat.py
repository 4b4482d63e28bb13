"""The page Chat: a conversation with a model that has the task chat, with pictures where it reads them."""

from __future__ import annotations

import html
import mimetypes
import shlex
import time
from asyncio import to_thread
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr

from openm6.console.context import PageContext, listing, note
from openm6.core.files import dumps
from openm6.serve.openai_api import CONVERSE, converses
from openm6.serve.server import TaskRequest

PAUSE = 0.05
"""Seconds between two updates of an answer: each sends the whole conversation through Gradio."""
HERE = '(talk, form) => [talk, form, new URL("../v1", location.href).href]'
"""Script that tells the address of the API, as the browser sees it."""


@dataclass
class Turn:
    """A message; `pictures`: paths of uploaded files."""

    role: str
    text: str = ""
    pictures: list[str] = field(default_factory=list)
    reasoning: str = ""


@dataclass
class Conversation:
    """The turns of one browser tab, and of its last request the system text and the other fields, as OpenAI's API
    names them."""

    turns: list[Turn] = field(default_factory=list)
    system: str = ""
    fields: dict[str, Any] = field(default_factory=dict)

    def messages(self, ui: PageContext, has_reasoning: bool = False) -> list[dict[str, Any]]:
        """In the layout of OpenAI's API. Raises PageError for a picture that is no longer there."""
        found: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            parts = [*(_picture(ui, path) for path in turn.pictures), {"type": "text", "text": turn.text}]
            more = {"reasoning_content": turn.reasoning} if has_reasoning and turn.reasoning else {}
            content = (parts if turn.text else parts[:-1]) if turn.pictures else turn.text
            found.append({"role": turn.role, "content": content, **more})
        return found

    def shown(self, ui: PageContext, is_running: bool = False) -> list[dict[str, Any]]:
        """For gr.Chatbot, which takes a text for HTML even without Markdown."""
        found: list[dict[str, Any]] = []
        for turn in self.turns:
            said, thought = (
                [{"type": "text", "text": html.escape(text, quote=False)}] if text else []
                for text in (turn.text, turn.reasoning)
            )
            if thought:
                status = "pending" if is_running and not said else "done"
                about = {"title": ui.say("Reasoning"), "status": status}
                found.append({"role": turn.role, "content": thought, "metadata": about})
            found.append({"role": turn.role, "content": [*({"path": path} for path in turn.pictures), *said]})
        return found

    def unanswered(self) -> Conversation:
        """The conversation without its last answer."""
        turns = self.turns[:-1] if self.turns and self.turns[-1].role == "assistant" else self.turns
        return Conversation(turns, self.system, self.fields)

    def copied(self, ui: PageContext, form: str, url: str) -> str:
        """The conversation as a line of data, or the request of its last answer."""
        if form == "jsonl":
            return dumps({"messages": self.messages(ui, has_reasoning=True)})
        body = {**self.fields, "messages": self.unanswered().messages(ui)}
        if form == "curl":
            key = ' -H "Authorization: Bearer $M6_KEY"' if ui.server.keys else ""
            address = shlex.quote(f"{url}/chat/completions")
            return f"curl {address} -H 'Content-Type: application/json'{key} -d @- <<'END'\n{dumps(body)}\nEND"
        ours = {name: body.pop(name) for name in ("adapter", "enable_thinking") if name in body}
        arguments = [f"{name}={value!r}" for name, value in body.items()] + [f"extra_body={ours!r}"] * bool(ours)
        key = 'os.environ["M6_KEY"]' if ui.server.keys else '"none"'
        return (
            f"{'import os' * bool(ui.server.keys)}\nfrom openai import OpenAI\n\n"
            f"client = OpenAI(base_url={url!r}, api_key={key})\n"
            f"answer = client.chat.completions.create(\n    {', '.join(arguments)},\n)\n"
            "print(answer.choices[0].message.content)\n"
        ).lstrip()


def page(ui: PageContext) -> None:
    say, first, talk, base = (
        ui.say,
        gr.HTML(apply_default_css=False),
        gr.State(Conversation()),
        gr.Textbox(visible=False),
    )
    with gr.Column(visible=False) as whole:
        who = gr.Dropdown(label=say("Model"), interactive=True, elem_id="who")
        others = gr.HTML(elem_classes="quiet", apply_default_css=False)
        shown = gr.Chatbot(
            label=say("Conversation"), elem_id="conversation", height="50vh", min_height=240, buttons=[],
            render_markdown=False, latex_delimiters=[], allow_tags=False, allow_file_downloads=False,
            feedback_options=None, placeholder=say("Write a message below."),
        )  # fmt: skip
        line, wrong = gr.Markdown(elem_classes="quiet"), {"": note()}
        box = gr.MultimodalTextbox(
            label=say("Message"), show_label=False, placeholder=say("Message"), elem_id="message", sources=[],
            file_types=["image"], file_count="multiple", max_plain_text_length=2**24, max_lines=12,
        )  # fmt: skip
        with gr.Row(elem_classes="buttons"):
            stop = gr.Button(say("Stop"), elem_id="chat-stop", min_width=80)
            again = gr.Button(say("Regenerate"), elem_id="chat-again", min_width=80)
            clear = gr.Button(say("Clear"), elem_id="chat-clear", min_width=80)
        with gr.Accordion(say("Options"), open=False):
            system = gr.Textbox(label=say("System text"), lines=2, max_lines=8, elem_id="system")
            with gr.Row():
                temperature = gr.Textbox(label=say("Temperature"), min_width=110, elem_id="temperature")
                length = gr.Textbox(label=say("Max tokens"), min_width=110, elem_id="length")
            thinking = gr.Checkbox(label=say("Reason before the answer"), visible=False, elem_id="thinking")
        with gr.Accordion(say("Copy the conversation"), open=False) as section:
            forms = [(say("JSON lines"), "jsonl"), ("curl", "curl"), ("Python (openai)", "python")]
            form = gr.Radio(forms, value="jsonl", label=say("Form"), elem_id="form")
            copied = gr.Textbox(
                label=say("Conversation"), lines=4, max_lines=12, interactive=False, buttons=["copy"], elem_id="copied"
            )

    async def models() -> list[Any]:
        every = [(label, value, converses(*ui.deployment(value))) for label, value in ui.choices()]
        found = [(label, value) for label, value, able in every if able]
        text = say(
            "No model here was trained on conversations (the task chat): import an open chat model and serve it."
        )
        steps = "openm6 models import Qwen3-8B runs/qwen && openm6 serve runs/qwen"
        silent = ", ".join(label for label, _, able in every if not able)
        hint = say(
            "{names}: not offered, because the task chat was not trained; fine-tune it on conversations first.",
            names=silent,
        )
        left_out = html.escape(hint) if silent and found else ""
        return [*listing(found, found[0][1] if found else None, text, steps), left_out]

    async def adapted(model: str | None) -> list[Any]:
        """The fields that depend on the model."""
        if model is None:  # none is served that converses
            return [gr.skip()] * 4
        about = ui.deployment(model)[0].about
        decode = about["tasks"][CONVERSE]["decode"]
        return [
            gr.MultimodalTextbox(sources=["upload"] if about["image_encoder"] else []),
            gr.Textbox(placeholder=str(decode.get("temperature", 0))),
            gr.Textbox(placeholder=str(decode.get("max_new_tokens", ""))), gr.Checkbox(visible=about["reasons"]),
        ]  # fmt: skip

    async def ask(
        request: gr.Request, event: gr.EventData, given: Any, talk: Conversation, model: str, system: str,
        temperature: str, length: str, thinking: bool,
    ) -> AsyncGenerator[Any, None]:  # fmt: skip
        """Answer the message, or the last one again. `talk` is changed in place, so that what a stopped answer has
        written stays; a message without any answer goes back into its field."""
        before = replace(talk)
        try:
            chosen: dict[str, Any] = {"temperature": ui.number(temperature), "max_tokens": ui.number(length)}
            is_again = getattr(event.target, "elem_id", "") == "chat-again"
            turns = talk.unanswered().turns if is_again else [*talk.turns, await to_thread(_turn, ui, given)]
            if not turns:
                raise ui.error("There is no answer yet to regenerate.")
            about, (name, _, adapter) = ui.deployment(model)[0].about, model.partition(":")
            if not about["image_encoder"] and any(turn.pictures for turn in turns):
                raise ui.error("This model reads no pictures: clear the conversation, or choose another model.")
            messages = await to_thread(Conversation(turns, system.strip()).messages, ui)
            chosen |= {
                "model": name,
                "adapter": adapter or None,
                "enable_thinking": thinking if about["reasons"] else None,
            }
            answer = Turn("assistant")
            talk.turns, talk.system = [*turns, answer], system.strip()
            talk.fields = {key: value for key, value in chosen.items() if value is not None}
            box = gr.skip() if is_again else None
            yield [*ui.beside(wrong), box, talk.shown(ui, True), "", gr.Accordion(open=False)]
            async for caption in _written(ui, request, model, messages, chosen, talk, answer):
                yield [gr.skip(), gr.skip(), talk.shown(ui, not caption), caption, gr.skip()]
            if not answer.text:
                raise ui.error("The model wrote no answer: allow more tokens, or regenerate it.")
        except Exception as error:
            back: Any = gr.skip()
            if talk.turns is not before.turns and not (answer.text or answer.reasoning):
                vars(talk).update(vars(before))
                back = gr.skip() if is_again else given
            yield [*ui.beside(wrong, ui.unforeseen(error)), back, talk.shown(ui), gr.skip(), gr.skip()]

    def copy(talk: Conversation, form: str, url: str) -> str:
        return talk.copied(ui, form, url) if talk.turns else ""

    def cleared(talk: Conversation) -> list[Any]:
        talk.turns = []
        return [*ui.beside(wrong), [], "", gr.Accordion(open=False)]

    ui.on(None, models, outputs=[first, whole, who, others])
    ui.on(who.change, adapted, [who], [box, temperature, length, thinking], show_progress="hidden")
    options, seen = [system, temperature, length, thinking], [shown, line, section]
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    asked = gr.on(
        [box.submit, again.click], ask, [box, talk, who, *options], [*wrong.values(), box, *seen],
        concurrency_limit=None, **quiet,
    )  # fmt: skip
    stop.click(None, cancels=[asked], **quiet).then(lambda talk: talk.shown(ui), talk, shown, **quiet)
    gr.on([clear.click, shown.clear], None, cancels=[asked], **quiet).then(
        cleared, talk, [*wrong.values(), *seen], **quiet
    )
    ui.on([section.expand, form.change], copy, [talk, form, base], [copied], wrong, js=HERE)


async def _written(
    ui: PageContext, request: gr.Request, model: str, messages: list[dict[str, Any]], chosen: Mapping[str, Any],
    talk: Conversation, answer: Turn,
) -> AsyncGenerator[str, None]:  # fmt: skip
    """Write the answer as it arrives. Yields "" now and then, and at its end what it took. Raises OpenM6Error."""
    options = {"temperature": chosen["temperature"], "max_new_tokens": chosen["max_tokens"]}
    decoding = {name: value for name, value in options.items() if value is not None}
    asked = TaskRequest(inputs={"messages": messages}, decoding=decoding, thinking=chosen["enable_thinking"])
    started, first, last = time.perf_counter(), 0.0, 0.0
    async for event in ui.ask(request, model, CONVERSE, asked):
        now = time.perf_counter() - started
        first = first or now
        if "value" in event:
            answer.text, answer.reasoning = event["value"], event.get("reasoning", "")
            talk.fields |= {} if event["seed"] is None else {"seed": event["seed"]}
            took = {"tokens": event["tokens"], "seconds": f"{now:.2f}", "first": f"{first:.2f}"}
            text = ui.say("{tokens} tokens in {seconds} s, the first after {first} s", **took)
            yield text if event["finished"] else text + " · " + ui.say("ended at the maximum number of tokens")
            return
        answer.reasoning += event.get("reasoning", "")
        answer.text += event.get("piece", "")
        if now - last > PAUSE:
            last = now
            yield ""


def _turn(ui: PageContext, given: Any) -> Turn:
    """A message of the visitor. Raises PageError for an empty one and for a file that is no picture."""
    text, files = given["text"], given["files"]
    if not text.strip() and not files:
        raise ui.error("Write a message first.")
    for path in files:
        ui.picture(path)
    return Turn("user", text, files)


def _picture(ui: PageContext, path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ui.error("A picture of this conversation was deleted after an hour: clear the conversation.")
    kind = mimetypes.guess_type(path)[0] or "image/jpeg"
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{ui.picture(path)}"}}
