"""Records from layouts with pictures and texts in different files: COCO captions, VQA, MUGE."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from openm6.core.errors import DataError, cut
from openm6.core.files import Fault, fault_of
from openm6.core.images import from_base64, held_picture
from openm6.data.files import is_folder, is_remote, list_folder, open_file
from openm6.data.rejects import OnReject, Reject
from openm6.data.store import Record
from openm6.data.tables import load_json, read_jsonl, read_tsv
from openm6.data.text import numbered_lines


def read_coco(path: str, images_root: str | None, on_reject: OnReject) -> Iterator[Record]:
    """COCO captions: one record a picture, {image, caption: [...], image_id}."""
    content = load_json(path)
    images = [row for _, row in _rows(content, "images", path, on_reject)]
    names = {row["id"]: row["file_name"] for row in images if "id" in row and "file_name" in row}
    captions: dict[Any, list[str]] = {}
    for where, row in _rows(content, "annotations", path, on_reject):
        if row.get("image_id") not in names:
            on_reject(
                Reject(where, f"{where} speaks of picture {cut(row.get('image_id'))}, which is not under images.")
            )
        elif not isinstance(row.get("caption"), str):
            on_reject(Reject(where, f"{where} has no caption."))
        else:
            captions.setdefault(row["image_id"], []).append(row["caption"].strip())
    for key, name in names.items():
        where = f"{path}#{key}"
        if key in captions:
            yield {"image": name, "caption": captions[key], "image_id": key, "_where": where}
        else:
            on_reject(Reject(where, f"{where}: the picture {cut(name)} has no caption."))


def read_vqa(path: str, images_root: str | None, on_reject: OnReject) -> Iterator[Record]:
    """VQA 2 and similar data sets: {image, question, answer, answers, question_id}.

    The annotations are in the same file, or in the file beside it that has `annotations` for `questions` in its name.
    `answer` is the most frequent one. Pictures are named in the question (`image`, `file_name`), under `images`, or by
    COCO's rule from `data_subtype` and `image_id`."""
    content = notes = _object(path)
    if "annotations" not in content:
        other = vqa_annotations(path)
        if other is None:
            raise DataError(
                f"{path} has questions without answers: put the annotations beside it, as {_renamed(path)[0]}."
            )
        notes = _object(other)
    answers = {n.get("question_id"): n for _, n in _rows(notes, "annotations", path, on_reject)}
    images = _rows(content, "images", path, on_reject) if "images" in content else []
    names = {i.get("id"): i.get("file_name") for _, i in images}
    subtype = content.get("data_subtype") or notes.get("data_subtype")
    for where, row in _rows(content, "questions", path, on_reject):
        note, name = (
            answers.get(row.get("question_id")),
            row.get("image") or row.get("file_name") or names.get(row.get("image_id")),
        )
        if name is None and subtype and isinstance(row.get("image_id"), int):
            name = f"COCO_{subtype}_{row['image_id']:012d}.jpg"
        if note is None:
            on_reject(Reject(where, f"{where} has no annotation with its question_id {cut(row.get('question_id'))}."))
        elif name is None:
            on_reject(Reject(where, f"{where} names no picture that can be found ({cut(row.get('image_id'))})."))
        elif not isinstance(row.get("question"), str):
            on_reject(Reject(where, f"{where} has no question."))
        else:
            listed = note.get("answers") if isinstance(note.get("answers"), list) else []
            given = [a.get("answer") if isinstance(a, dict) else a for a in listed or ()]
            given = [a for a in given if isinstance(a, (str, int, float))]
            best = (
                note.get("multiple_choice_answer")
                or note.get("answer")
                or (Counter(given).most_common(1)[0][0] if given else None)
            )
            if best is None:
                on_reject(Reject(where, f"{where} has an annotation without an answer."))
                continue
            yield {
                "image": name, "question": row["question"], "answer": best, "answers": given or [best],
                "question_id": row.get("question_id"), "_where": where,
            }  # fmt: skip


def _object(path: str) -> dict[str, Any]:
    content = load_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} has to hold an object with questions or annotations.")
    return content


def vqa_annotations(path: str) -> str | None:
    """The annotations file of a file of questions, if it exists beside it."""
    if is_remote(path):
        return _renamed(path)[0] if "questions" in path.rsplit("/", 1)[-1] and path.endswith(".json") else None
    return next((name for name in _renamed(path) if name != path and Path(name).is_file()), None)


def _renamed(path: str) -> list[str]:
    folder, _, name = path.rpartition("/")
    plain = name.replace("questions", "annotations")
    # VQA 2 calls them v2_OpenEnded_mscoco_train2014_questions.json and v2_mscoco_train2014_annotations.json.
    return [
        f"{folder}/{n}" if folder else n
        for n in (plain, plain.replace("OpenEnded_", "").replace("MultipleChoice_", ""))
    ]


def read_muge(path: str, images_root: str | None, on_reject: OnReject) -> Iterator[Record]:
    """The layouts of MUGE and Chinese-CLIP: NAME_texts.jsonl ({"text_id", "text", "image_ids"}) and NAME_imgs.tsv
    (id, tab, the picture in base64), or, for captions, NAME.jsonl ({"image_id", "text": [...]}) and NAME.tsv.
    One record a picture: {image, text: [...], image_id}.

    `path` is the texts' file, or a folder with one pair or several.
    """
    if is_folder(path):
        pairs = [name for name in list_folder(path) if muge_images(name)]
        for name in pairs:
            yield from read_muge(name, images_root, on_reject)
        return
    images = muge_images(path)
    if images is None:
        raise DataError(
            f"{path} has no pictures beside it: the layout wants NAME_texts.jsonl and NAME_imgs.tsv "
            "(or NAME.jsonl and NAME.tsv) in one folder."
        )
    texts: dict[str, list[str]] = {}
    for row in read_jsonl(path, images_root, on_reject):
        said, keys = row.get("text"), row.get("image_ids")
        said = [said] if isinstance(said, str) else said
        keys = [row["image_id"]] if keys is None and "image_id" in row else keys
        if said and isinstance(said, list) and all(isinstance(t, str) for t in said) and isinstance(keys, list):
            for key in keys:
                texts.setdefault(str(key), []).extend(said)
        else:
            on_reject(Reject(row["_where"], f"{row['_where']} has no text or no image_ids."))
    met: dict[str, str] = {}
    unreadable: set[str] = set()
    with open_file(images) as file:
        for number, line in enumerate(file, 1):
            where = f"{images}:{number}"
            key, tab, code = line.rstrip(b"\r\n").partition(b"\t")
            name = key.decode("utf-8", "replace")
            try:
                image = from_base64(code.decode("ascii"))
            except (DataError, UnicodeDecodeError):
                image = b""
            if not tab:
                on_reject(
                    Reject(where, f"{where} has one field; it has to be an id, a tab, and the picture in base64.")
                )
            elif not image:
                unreadable.add(name)
                on_reject(Reject(where, f"{where}: what stands after the tab is not base64."))
            elif name in met:
                on_reject(
                    Reject(where, f"{where}: the picture {cut(name)} stands in {met[name]} already, which is used.")
                )
            elif name not in texts:
                on_reject(Reject(where, f"{where}: no text names the picture {cut(name)}."))
            else:
                met[name] = where
                yield {"image": image, "text": texts.pop(name), "image_id": name, "_where": where}
    for name in texts:
        if name not in unreadable:
            on_reject(Reject(f"{path}#{name}", f"{path}: the picture {cut(name)} of its image_ids is not in {images}."))


def muge_images(path: str) -> str | None:
    """The pictures file of a file of texts in MUGE's layout, if it exists beside it."""
    if path.endswith("_texts.jsonl"):
        images = path.removesuffix("_texts.jsonl") + "_imgs.tsv"
        return images if is_remote(path) or Path(images).is_file() else None
    images = path.removesuffix(".jsonl") + ".tsv"
    if is_remote(path) or not path.endswith(".jsonl") or not Path(images).is_file():
        return None
    first = next(read_jsonl(path, None, lambda reject: None), {})
    return images if {"image_id", "text"} <= first.keys() and "image" not in first else None


OFA = {
    (5, 4): ("id", "image_id", "caption", "objects", "image"),
    (6, 5): ("id", "image_id", "question", "answer", "objects", "image"),
    (6, 2): ("id", "image_id", "image", "hypothesis", "caption", "label"),
}
"""Columns of OFA's files for captions, questions and entailment, by the number of columns, and the index of the
picture."""

_PIXELS = re.compile(r" *\d+(\.\d*)?( *, *\d+(\.\d*)?){3} *")


def read_ofa(path: str, images_root: str | None, on_reject: OnReject) -> Iterator[Record]:
    """The tables of OFA, without a header, with the picture in base64: captions, questions, entailment (see `OFA`), or
    phrases with their boxes in pixels.

    `caption` and `objects` are lists (OFA separates them by &&); `answer` is the most certain one and `answers` are
    all; `box` is in fractions of the picture's width and height."""
    first = next((line for _, line in numbered_lines(path, on_reject)), "").rstrip("\r\n").split("\t")
    place = next((number for number, cell in enumerate(first) if held_picture(cell)), -1)
    names = OFA.get((len(first), place))
    if names is None:
        found = f"its picture in column {place + 1}" if place >= 0 else "no picture"
        raise DataError(
            f"{path} has {len(first)} columns and {found}: OFA's captions have 5 columns with the picture last, its "
            "questions 6 with the picture last, its entailment 6 with the picture third; name others by --names."
        )
    if _PIXELS.fullmatch(first[3]):
        names = ("id", "image_id", "phrase", "box", "image")
    for row in read_tsv(path, images_root, on_reject, names=names):
        for name in ("objects", *(["caption"] if "label" not in row else [])):
            if name in row:
                row[name] = [part.strip() for part in row[name].split("&&") if part.strip()]
        if "answer" in row:
            told = [part.partition("|!+")[::2] for part in row["answer"].split("&&")]
            if not all(answer and _is_number(share) for share, answer in told):
                on_reject(Reject(row["_where"], f"{row['_where']} has an answer that is not written as 0.6|!+no."))
                continue
            row["answers"] = [answer for _, answer in sorted(told, key=lambda one: -float(one[0]))]
            row["answer"] = row["answers"][0]
        if "box" in row:
            box = _fractions(row["box"], held_picture(row["image"]))
            if box is None:
                on_reject(Reject(row["_where"], f"{row['_where']} has no box of pixels inside its picture."))
                continue
            row["box"] = box
        yield row


def _fractions(pixels: str, picture: bytes | None) -> list[float] | None:
    """Left, top, right and bottom, from pixels separated by commas, as fractions of the picture's width and height;
    None for a box outside the picture."""
    if picture is None or not _PIXELS.fullmatch(pixels):
        return None
    with Image.open(io.BytesIO(picture)) as image:
        sizes = image.size * 2
    left, top, right, bottom = (float(place) / size for place, size in zip(pixels.split(","), sizes, strict=True))
    return [left, top, right, bottom] if left < right <= 1 and top < bottom <= 1 else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _rows(content: Any, key: str, path: str, on_reject: OnReject) -> list[tuple[str, dict[str, Any]]]:
    """(place, object) of the usable objects in the list under `key`."""
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, (dict, Fault)) for row in rows):
        raise DataError(f"{path} has to hold a list of objects under {key!r}.")
    good = []
    for number, row in enumerate(rows):
        where, fault = f"{path}#{key}.{number}", fault_of(row)
        for name in ("id", "image_id", "question_id"):
            if not fault and isinstance(row.get(name), (list, dict)):
                fault = f"has an {name} that is neither a number nor a text"
        if fault:
            on_reject(Reject(where, f"{where} {fault}."))
        else:
            good.append((where, row))
    return good
