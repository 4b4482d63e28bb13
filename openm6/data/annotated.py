"""Records from layouts in which pictures and texts lie in different files: COCO captions, VQA, MUGE."""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openm6.data.files import is_folder, is_remote, list_folder, open_file
from openm6.data.rejects import Reject
from openm6.data.store import Record
from openm6.data.tables import OnReject, load_json, read_jsonl
from openm6.errors import DataError


def read_coco(path: str, images_root: str | None, on_reject: OnReject) -> Iterator[Record]:
    """COCO captions: one record a picture, {image, caption: [...], image_id}."""
    content = load_json(path)
    names = {i["id"]: i["file_name"] for i in _rows(content, "images", path) if "id" in i and "file_name" in i}
    captions: dict[Any, list[str]] = {}
    for number, row in enumerate(_rows(content, "annotations", path)):
        where = f"{path}#annotations.{number}"
        if row.get("image_id") not in names:
            on_reject(Reject(where, f"{where} speaks of picture {row.get('image_id')!r}, which is not under images."))
        elif not isinstance(row.get("caption"), str):
            on_reject(Reject(where, f"{where} has no caption."))
        else:
            captions.setdefault(row["image_id"], []).append(row["caption"].strip())
    for key, name in names.items():
        where = f"{path}#{key}"
        if key in captions:
            yield {"image": name, "caption": captions[key], "image_id": key, "_where": where}
        else:
            on_reject(Reject(where, f"{where}: the picture {name} has no caption."))


def read_vqa(path: str, images_root: str | None, on_reject: OnReject) -> Iterator[Record]:
    """VQA 2 and its kin: {image, question, answer, answers, question_id}.

    The annotations stand in the same file, or in the file beside it that has `annotations` for `questions` in
    its name. `answer` is the most frequent one. Pictures are named in the question (`image`, `file_name`), under
    `images`, or by COCO's rule from `data_subtype` and `image_id`.
    """
    content = load_json(path)
    notes = content
    if "annotations" not in content:
        other = vqa_annotations(path)
        if other is None:
            raise DataError(
                f"{path} has questions without answers: put the annotations beside it, as {_renamed(path)[0]}."
            )
        notes = load_json(other)
    answers = {n.get("question_id"): n for n in _rows(notes, "annotations", path)}
    names = {i.get("id"): i.get("file_name") for i in content.get("images", ())}
    subtype = content.get("data_subtype") or notes.get("data_subtype")
    for number, row in enumerate(_rows(content, "questions", path)):
        where = f"{path}#questions.{number}"
        note, name = (
            answers.get(row.get("question_id")),
            row.get("image") or row.get("file_name") or names.get(row.get("image_id")),
        )
        if name is None and subtype and isinstance(row.get("image_id"), int):
            name = f"COCO_{subtype}_{row['image_id']:012d}.jpg"
        if note is None:
            on_reject(Reject(where, f"{where} has no annotation with its question_id {row.get('question_id')!r}."))
        elif name is None:
            on_reject(Reject(where, f"{where} names no picture that can be found ({row.get('image_id')!r})."))
        elif not isinstance(row.get("question"), str):
            on_reject(Reject(where, f"{where} has no question."))
        else:
            given = [a["answer"] if isinstance(a, dict) else a for a in note.get("answers", ())]
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


def vqa_annotations(path: str) -> str | None:
    """The annotations that belong to a file of questions, when they lie beside it."""
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
    """The layout of MUGE and Chinese-CLIP: NAME_texts.jsonl ({"text_id", "text", "image_ids"}) and NAME_imgs.tsv
    (id, tab, the picture in base64). One record a picture: {image, text: [...], image_id}.

    `path` is the texts' file, or a folder with one pair or several.
    """
    if is_folder(path):
        pairs = [name for name in list_folder(path) if name.endswith("_texts.jsonl")]
        for name in pairs:
            yield from read_muge(name, images_root, on_reject)
        return
    images = muge_images(path)
    if images is None:
        raise DataError(
            f"{path} has no pictures beside it: the layout wants NAME_texts.jsonl and NAME_imgs.tsv in one folder."
        )
    texts: dict[str, list[str]] = {}
    for row in read_jsonl(path, images_root, on_reject):
        if isinstance(row.get("text"), str) and isinstance(row.get("image_ids"), list):
            for key in row["image_ids"]:
                texts.setdefault(str(key), []).append(row["text"])
        else:
            on_reject(Reject(row["_where"], f"{row['_where']} has no text or no image_ids."))
    with open_file(images) as file:
        for number, line in enumerate(file, 1):
            where = f"{images}:{number}"
            key, tab, code = line.rstrip(b"\r\n").partition(b"\t")
            name = key.decode("utf-8", "replace")
            try:
                image = base64.b64decode(code, validate=True)
            except binascii.Error:
                image = b""
            if not tab:
                on_reject(
                    Reject(where, f"{where} has one field; it has to be an id, a tab, and the picture in base64.")
                )
            elif not image:
                on_reject(Reject(where, f"{where}: what stands after the tab is not base64."))
            elif name not in texts:
                on_reject(Reject(where, f"{where}: no text names the picture {name}."))
            else:
                yield {"image": image, "text": texts.pop(name), "image_id": name, "_where": where}
    for name in texts:
        on_reject(Reject(f"{path}#{name}", f"{path}: the picture {name} of its image_ids is not in {images}."))


def muge_images(path: str) -> str | None:
    """The pictures that belong to a file of texts in MUGE's layout, when they lie beside it."""
    if not path.endswith("_texts.jsonl"):
        return None
    images = path.removesuffix("_texts.jsonl") + "_imgs.tsv"
    return images if is_remote(path) or Path(images).is_file() else None


def _rows(content: Any, key: str, path: str) -> list[dict[str, Any]]:
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} has to hold a list of objects under {key!r}.")
    return rows
