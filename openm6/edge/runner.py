"""Inference with an ONNX bundle (package.py), without PyTorch and transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openm6.core.errors import ContextLengthError, ErrorKind, OpenM6Error, UsageError, suggest
from openm6.core.images import Features, ImageGrid, check_features
from openm6.core.sequence import Banned, Sequence, allowed_after
from openm6.core.tokenizer import Tokenizer
from openm6.tasks.card import read_card, read_chat
from openm6.tasks.encode import encode_prompt
from openm6.tasks.lengths import check_truncate
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task

KIND = "openm6-edge"
FORMAT = 4
"""Version of edge.json and image_encoder.json. Format 1 had no digests of the files; format 2 called the image encoder
`eyes`, format 3 did not say how a source is read."""
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of the model.

    value        the task's value
    confidence   geometric mean of the probabilities of the written tokens; 1 for a vector and a head
    finished     whether a text came to its end by itself
    state        of a text: the network's last state of the prompt, fp32 [D]
    truncated    positions of the prompt that were left out
    """

    value: Any
    confidence: float
    finished: bool
    state: np.ndarray | None = None
    truncated: int = 0


class ImageEncoder:
    """The image encoder of a model (`picture.onnx`), described in edge.json or image_encoder.json."""

    def __init__(self, path: Path, threads: int = 0, about: Mapping[str, Any] | None = None):
        """`about`: the content of edge.json, for an ONNX bundle whose files have been checked; without it
        image_encoder.json is read and its files are checked. Raises OpenM6Error for damaged files."""
        if about is None:
            about = _about(path, "image_encoder.json")
            check_files(path, about)
        self.grid = ImageGrid(about["stride"], about["max_patches"])
        self.name, self.width = str(about["image_encoder"]), int(about["width"])
        self._session = _session(path, "picture.onnx", threads)

    def read(self, pixels: np.ndarray) -> np.ndarray:
        """Features fp32 [P, D] of pixels, uint8 [H, W, 3], or of features of patches, [rows, columns, D]."""
        check_features(pixels, self.width)
        if pixels.dtype == np.float32:
            return pixels.reshape(-1, self.width)
        found: np.ndarray = self._session.run(None, {"pixels": pixels})[0]
        return found

    def features(self, picture: Any) -> Features:
        """Features of a picture: a path, bytes, a PIL image, or features already, which are returned."""
        if (given := Features.of(picture)) is not None:
            return given
        pixels = self.grid.read(picture)
        rows, columns = (side // self.grid.stride for side in pixels.shape[:2])
        return Features(self.read(pixels).astype(np.float16).tobytes(), rows, columns, self.name)


def about_of(path: Path) -> dict[str, Any]:
    """The content of an ONNX bundle's edge.json. Raises UsageError where there is none, or one of another format,
    OpenM6Error for a damaged one."""
    if not (path / "edge.json").is_file():
        raise UsageError(f"{path} is not an ONNX bundle: it has no edge.json. `openm6 models export` makes one.")
    return _about(path, "edge.json")


def digest_of(about: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of the content of edge.json or image_encoder.json without its `sha256`."""
    content = {name: value for name, value in about.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def check_files(path: Path, about: Mapping[str, Any]) -> None:
    """Raises OpenM6Error, with the name of the file, where one is missing or is not the file that was exported."""
    for name, digest in about["files"].items():
        try:
            found = file_digest(path / name)
        except OSError as error:
            raise OpenM6Error(f"{path} is damaged: {name} cannot be read ({error.strerror}).") from None
        if found != digest:
            raise OpenM6Error(
                f"{path} is damaged: {name} is not the file that was exported. It has changed, or belongs to another "
                "ONNX bundle; copy the whole folder again, or export the model again."
            )


def _about(path: Path, name: str) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((path / name).read_text("utf-8"))
        found, digest = about.get("format", 1), about.get("sha256")
    except (OSError, ValueError, AttributeError):
        raise OpenM6Error(f"{path} is damaged: {name} cannot be read.") from None
    if found != FORMAT:
        raise UsageError(
            f"{path / name} has the format {found}, and this program reads the format {FORMAT}: export the model again "
            "with the OpenM6 of this program."
        )
    if digest != digest_of(about):
        raise OpenM6Error(f"{path} is damaged: {name} is not as it was written.")
    return about


def _session(path: Path, name: str, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path / name, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise OpenM6Error(f"{path} is damaged: {str(error).splitlines()[0][:200]}") from None


class EdgeModel:
    """`EdgeModel("package").run("vqa", photo="a.jpg", question="...")`."""

    def __init__(self, path: str | Path, threads: int = 0):
        """`threads` 0: ONNX Runtime's default. Raises UsageError for a folder that is no ONNX bundle, OpenM6Error where
        one of its files is not the exported one."""
        self.path = Path(path)
        self.about = about_of(self.path)
        check_files(self.path, self.about)
        tasks, longest, _ = read_card(self.path)
        self.tasks = {task.name: task for task in tasks}
        self._network = _session(self.path, "model.onnx", threads)
        self._image_encoder = ImageEncoder(self.path, threads, self.about) if self.about["pictures"] else None
        grid = ImageGrid(self.about["stride"], self.about["max_patches"])
        tokenizer, source = Tokenizer.load(self.path), self.about["source"]
        self.processor = Processor(tokenizer, grid, longest, source=source, chat=read_chat(self.path))

    @property
    def image_encoder(self) -> ImageEncoder:
        """The image encoder. Raises UsageError for a model without one."""
        if self._image_encoder is None:
            raise UsageError("This ONNX bundle's model reads no pictures.")
        return self._image_encoder

    def task(self, name: str) -> Task:
        if name not in self.tasks:
            raise UsageError(
                f"There is no task {name} here.{suggest(name, list(self.tasks))} There are: {', '.join(self.tasks)}.",
                kind=ErrorKind.NOT_FOUND,
                code="task_not_found",
            )
        return self.tasks[name]

    def run(self, task: str, *, max_new_tokens: int | None = None, truncate: str | None = None, **slots: Any) -> Any:
        """One answer: the value of a task's one output, or the dict of its outputs. `truncate`: see `answer`."""
        return self.answer(task, slots, max_new_tokens, truncate).value

    def answer(
        self, task: str, record: Record, max_new_tokens: int | None = None, truncate: str | None = None
    ) -> Answer:
        """One answer with its confidence. `truncate="start"` shortens the longest text of a prompt that is too long for
        the model, which raises ContextLengthError otherwise."""
        chosen = self.task(task)
        chosen.check(record)
        check_truncate(truncate)
        prompt = encode_prompt(chosen, record, self.processor, truncate=truncate)
        if chosen.embeds:
            state = self._read(prompt)[1]
            return Answer(state / np.linalg.norm(state), 1.0, True, truncated=prompt.truncated)
        if chosen.head:
            from openm6.tasks.heads import HEADS

            outputs = self._read(prompt)[3 + self.about["heads"].index(chosen.head)]
            return Answer(HEADS[chosen.head].read(outputs.tolist()), 1.0, True, truncated=prompt.truncated)
        most = max_new_tokens or int(chosen.decode.get("max_new_tokens", 64))
        if (limit := self.about["positions"]) is not None and len(prompt) + most > limit:
            raise ContextLengthError(
                f"A prompt of {len(prompt)} positions and {most} new tokens; the model has {limit} positions."
            )
        ids, chances, finished, first = [], [], False, self._read(prompt)
        for token, chance in self._steps(prompt, first, most):
            chances.append(chance)
            finished = token in self.processor.tokenizer.end_ids
            if not finished:
                ids.append(token)
        confidence = float(np.exp(np.log(np.maximum(chances, 1e-12)).mean()))
        return Answer(chosen.value(ids, self.processor), confidence, finished, first[1], prompt.truncated)

    def run_many(self, task: str, records: Iterable[Record], *, truncate: str | None = None) -> Iterator[Any]:
        for record in records:
            yield self.answer(task, record, truncate=truncate).value

    def _steps(self, prompt: Sequence, first: list[np.ndarray], most: int) -> Iterator[tuple[int, float]]:
        """Greedy decoding: token by token with its probability, until the end token; `first`: the network's outputs for
        the prompt."""
        ends, length = self.processor.tokenizer.end_ids, len(prompt)
        logits, _, present, *_ = first
        cache = np.empty((length + most, *present.shape[1:]), np.float32)
        cache[:length] = present
        ids: list[int] = []
        for place in range(length, length + most):
            token, chance = _likeliest(logits, allowed_after(prompt, ids, ends[0]))
            yield token, chance
            if token in ends:
                return
            ids.append(token)
            if len(ids) == most:
                return
            feed = self._feed(np.array([token]), np.array([place]), np.zeros((1, place + 1), np.float32), cache[:place])
            logits, _, present, *_ = self._network.run(None, feed)
            cache[place] = present[0]

    def _read(self, prompt: Sequence) -> list[np.ndarray]:
        """The network's outputs for a prompt."""
        length, blocks = len(prompt), prompt.blocks
        together = (blocks[:, None] == blocks) & (blocks[:, None] >= 0)
        seen = np.tri(length, dtype=bool) | together
        mask = np.where(seen, np.float32(0), np.float32("-inf"))
        sizes = (0, self.about["layers"], 2, self.about["key_value_heads"], self.about["head_dim"])
        feed = self._feed(prompt.ids, np.arange(length), mask, np.zeros(sizes, np.float32))
        if some := prompt.pictures:
            feed["features"] = np.concatenate([self.image_encoder.read(picture.pixels) for picture in some])
            feed["places"] = np.concatenate([np.arange(one.start, one.start + one.patches) for one in some])
        found: list[np.ndarray] = self._network.run(None, feed)
        return found

    def _feed(self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray, past: np.ndarray) -> dict[str, Any]:
        return {
            "ids": ids.astype(np.int64), "positions": positions.astype(np.int64), "mask": mask, "past": past,
            "features": np.zeros((0, self.about["width"]), np.float32), "places": np.zeros(0, np.int64),
        }  # fmt: skip


def _likeliest(logits: np.ndarray, allowed: Items[int] | None) -> tuple[int, float]:
    if allowed is not None:
        masked = np.full_like(logits, -np.inf) if not isinstance(allowed, Banned) else logits.copy()
        some = list(allowed)
        masked[some] = -np.inf if isinstance(allowed, Banned) else logits[some]
        logits = masked
    best = int(logits.argmax())
    return best, float(1 / np.exp(logits - logits[best]).sum())
