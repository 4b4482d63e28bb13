"""Where imported weights come from, and under which licence: what a model directory keeps of a checkpoint's papers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

LIMIT = 2**20
"""Bytes of a text that is read, at most."""
_FIELDS = ("license", "license_name", "license_link", "base_model")
_PAPERS = re.compile(r"(licen[cs]e|notice|use_policy|copying)(\b|[-_.]).*", re.I)
_TEXTS = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"MIT License|Permission is hereby granted, free of charge",
}
"""Licences by a part of their texts, with the names that model cards have for them."""


def read_origin(path: Path) -> dict[str, str]:
    """`name` of a checkpoint's directory, and, where its README.md (front matter) or its licence file says so,
    `license`, `license_name`, `license_link` and `base_model`, in the terms of Hugging Face's model cards."""
    found = {"name": path.resolve().name, **_front_matter(path / "README.md")}
    if "license" not in found and (file := next(iter(papers(path)), None)):
        text = _text(file)
        known = next((name for name, part in _TEXTS.items() if re.search(part, text)), None)
        title = next((line.strip() for line in text.splitlines() if line.strip()), "")
        found |= {"license": known} if known else {"license": "other", "license_name": title[:100]}
    return found


def gguf_origin(fields: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The same of a GGUF file."""
    keys = {
        "name": "general.name", "license": "general.license", "license_name": "general.license.name",
        "license_link": "general.license.link", "base_model": "general.base_model.0.repo_url",
    }  # fmt: skip
    return {"name": path.stem} | {name: fields[key] for name, key in keys.items() if isinstance(fields.get(key), str)}


def papers(path: Path) -> list[Path]:
    """The files with licence, notice and policy in a directory, the licence first."""
    found = [file for file in path.iterdir() if file.is_file() and _PAPERS.fullmatch(file.name)]
    return sorted(file for file in found if file.stat().st_size <= LIMIT)


def copy_papers(path: Path, folder: Path) -> None:
    for file in papers(path):
        shutil.copy(file, folder / file.name)


def _front_matter(readme: Path) -> dict[str, str]:
    if not readme.is_file():
        return {}
    matter = re.match(r"\s*---\s*\n(.*?)\n---", _text(readme), re.S)
    try:
        values = yaml.safe_load(matter[1]) if matter else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    firsts = {key: value[0] if isinstance(value, list) and value else value for key, value in values.items()}
    return {key: firsts[key] for key in _FIELDS if isinstance(firsts.get(key), str)}


def _text(file: Path) -> str:
    with file.open("rb") as data:
        return data.read(LIMIT).decode("utf-8", "replace")
