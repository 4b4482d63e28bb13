"""Checkpoints with a chat template become models that are asked by it."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from openm6.compress.convert import import_model
from openm6.core.batch import pad
from openm6.core.errors import OpenM6Error, UsageError
from openm6.core.sequence import IGNORE, Banned, Sequence
from openm6.inference.request import Request
from openm6.inference.session import Session
from openm6.tasks.encode import encode_example
from openm6.tasks.library import get
from tests.conftest import exact
from tests.tasks.templates import CHATML, FAMILIES, fast_tokenizer, named_tokens, theirs
from tests.weights.checkpoints import network


def checkpoint(path: Path, name: str = "chatml", generation: dict[str, Any] | None = None, **more: Any) -> Any:
    """A random Qwen3 with a tokenizer and a template, as transformers saves it; the model."""
    family, tokenizer = FAMILIES[name], theirs(name)
    model = network("qwen3", vocab_size=len(tokenizer), **more)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    eos = [fast_tokenizer(name).token_to_id(token) for token in family.ends]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, **(generation or {})}), "utf-8")
    return model


@torch.no_grad()
def greedy(model: Any, prompt: Sequence, ends: list[int], count: int) -> list[int]:
    """The most probable tokens by transformers' class, of those that make whole characters."""
    found: list[int] = []
    while len(found) < count:
        ids = torch.tensor([[*prompt.ids.tolist(), *found]])
        scores = model(ids).logits[0, -1]
        assert prompt.constraint is not None
        allowed = prompt.constraint.next(found)
        banned = set(allowed) if isinstance(allowed, Banned) else set(range(len(scores))) - set(allowed)
        scores[[i for i in banned if i < len(scores)]] = float("-inf")
        found.append(int(scores.argmax()))
        if found[-1] in ends:
            return found[:-1]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Random weights write any ids; ours never writes its own, appended ones."""
    model = checkpoint(tmp_path / "theirs", name)
    import_model(tmp_path / "theirs", tmp_path / "m6", "none", 16, 256)
    session, tokenizer = exact(Session.load(tmp_path / "m6", trainable=True)), theirs(name)
    assert session.processor.chat is not None and session.processor.tokenizer.ends == FAMILIES[name].ends
    day = date.fromisoformat(session.processor.chat.date).strftime("%d %b %Y")
    ends = [tokenizer.convert_tokens_to_ids(token) for token in FAMILIES[name].ends]
    for text in ("the cat", "今天天气很好", "hello\n", "a"):
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, return_dict=False, date_string=day
        )
        prompt = session.prompt(get("chat"), {"messages": messages})
        assert prompt.ids.tolist() == ids
        found = session.generate(get("chat"), [prompt], decoding={"max_new_tokens": 12})[0]
        assert found.ids == greedy(model, prompt, ends, 12)


@pytest.mark.parametrize("end", CHATML.ends)
def test_every_end_token_ends_an_answer(end: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "m6", "none", 0, 256)
    session = Session.load(tmp_path / "m6", trainable=True)
    prompt = session.prompt(get("chat"), {"messages": [{"role": "user", "content": "a"}]})
    with torch.no_grad():  # the end is the most probable token after this prompt
        last = session.model(pad([prompt], 0)).hidden[0, -1]
        session.model.head.weight.zero_()
        session.model.head.weight[fast_tokenizer("chatml").token_to_id(end)] = last
    found = session.generate(get("chat"), [prompt])[0]
    assert found.finished and found.ids == []


def test_the_settings_are_kept_and_survive_saving(tmp_path: Path) -> None:
    checkpoint(tmp_path / "theirs", "headers", {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20})
    import_model(tmp_path / "theirs", tmp_path / "m6", "none", 16, 256)
    session = Session.load(tmp_path / "m6", trainable=True)
    session.save(tmp_path / "again")
    again = Session.load(tmp_path / "again", trainable=True)
    assert again.processor.chat == session.processor.chat
    assert again.processor.tokenizer.ends == session.processor.tokenizer.ends == FAMILIES["headers"].ends
    assert again.processor.chat is not None
    assert again.processor.chat.sampling == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert again.processor.chat.tokens["bos_token"] == named_tokens("headers")["bos_token"]
    free = again.prepare(get("chat"), Request({"messages": [{"role": "user", "content": "a"}]})).options
    assert (free.temperature, free.top_k) == (0.6, 20)
    labels = get("text_classification").with_labels({"label": ["yes", "no"]})
    assert again.prepare(labels, Request({"text": "a"})).options.temperature == 0
    assert again.run(labels, text="the cat") in ("yes", "no")


def test_a_checkpoint_without_a_template_is_asked_in_our_own_form(tmp_path: Path) -> None:
    checkpoint(tmp_path / "theirs")
    (tmp_path / "theirs" / "chat_template.jinja").unlink()
    import_model(tmp_path / "theirs", tmp_path / "m6", "none", 16, 256)
    session = Session.load(tmp_path / "m6", trainable=True)
    tokenizer = session.processor.tokenizer
    assert session.processor.chat is None and tokenizer.ends == ()
    assert session.prompt(get("question_answering"), {"question": "a"}).ids[-1] == tokenizer.answer_id


def test_a_template_in_the_tokenizer_config_is_read(tmp_path: Path) -> None:
    """The layout of older checkpoints, also with several templates."""
    checkpoint(tmp_path / "theirs")
    (tmp_path / "theirs" / "chat_template.jinja").unlink()
    file = tmp_path / "theirs" / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML.template}]
    for number, template in enumerate((CHATML.template, named)):
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
        import_model(tmp_path / "theirs", tmp_path / f"m6-{number}", "none", 16, 256)
        chat = Session.load(tmp_path / f"m6-{number}", trainable=True).processor.chat
        assert chat is not None and chat.template == CHATML.template


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{% for %}", OpenM6Error, "theirs: The chat template is damaged"),
        (
            "{{ raise_exception('never') }}",
            OpenM6Error,
            "theirs: The model's chat template refuses the messages: never",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            UsageError,
            "theirs: The chat template writes no special",
        ),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", OpenM6Error, "longer than"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(
    template: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openm6.tasks.sandbox.SECONDS", 0.2)
    checkpoint(tmp_path / "theirs")
    (tmp_path / "theirs" / "chat_template.jinja").write_text(template)
    with pytest.raises(error, match=message):
        import_model(tmp_path / "theirs", tmp_path / "m6", "none", 16, 256)
    assert not (tmp_path / "m6").exists()


def test_a_model_directory_without_its_template_is_damaged(tmp_path: Path) -> None:
    checkpoint(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "m6", "none", 16, 256)
    (tmp_path / "m6" / "chat_template.jinja").unlink()
    with pytest.raises(OpenM6Error, match="its chat_template.jinja is missing"):
        Session.load(tmp_path / "m6")


@torch.no_grad()
def test_a_later_turn_changes_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    """Of equal length: bit by bit; of another length, where sums are split otherwise, within 1e-5."""
    checkpoint(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "m6", "none", 0, 256)
    session = exact(Session.load(tmp_path / "m6", trainable=True))

    def losses(third: str) -> torch.Tensor:
        turns = [("user", "the cat"), ("assistant", "sat on the mat"), ("user", "the dog"), ("assistant", "sat")]
        messages = [{"role": role, "content": text} for role, text in (*turns, ("user", third))]
        example = encode_example(get("chat"), {"messages": messages, "answer": "on the log"}, session.processor)
        assert (example.labels == session.processor.tokenizer.end_id).sum() == 3
        labels = torch.from_numpy(example.labels).long()
        logits = session.model.logits(session.model(pad([example], 0)).hidden)[0]
        found = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
        return found[: int((labels == session.processor.tokenizer.end_id).nonzero()[0]) + 1]

    first = losses("the mat")
    assert (first > 0).sum() > 3
    assert torch.equal(losses("the log"), first)
    torch.testing.assert_close(losses("the mat, the log and all the others"), first, atol=1e-5, rtol=0)
