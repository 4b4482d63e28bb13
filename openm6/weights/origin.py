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
PERMISSIVE = frozenset({
    "apache-2.0", "mit", "mit-0", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "0bsd", "bsl-1.0", "cc0-1.0",
    "unlicense", "cc-by-4.0",
})  # fmt: skip
"""Licences, by the names of model cards, that ask for no more than to be named."""
_PAPERS = re.compile(r"(licen[cs]e|notice|use_policy|copying)(\b|[-_.]).*", re.I)
_TEXTS = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"MIT License|Permission is hereby granted, free of charge",
}
"""Licences by a part of their texts, with the names that model cards have for them."""


def read_origin(path: Path) -> dict[str, str]:
    """`name` of a checkpoint's directory, and, where its README.md (front matter) or its licence file says so,
    `license`, `license_name`, `license_link` and `base_model`, in the terms of Hugging Face's model cards."""
    found = {"name": _name(path.resolve()), **_front_matter(path / "README.md")}
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


def copy_papers(path: Path, folder: Path, of: str = "") -> None:
    """Copy the licence files of a directory, if it is one. `of`: whose they are, where others have the same names."""
    for file in papers(path) if path.is_dir() else ():
        target = folder / (f"{file.name}.{of}" if of else file.name)
        if not target.exists():
            shutil.copy(file, target)


def with_other(origin: dict[str, str] | None, other: dict[str, str] | None, role: str) -> dict[str, str] | None:
    """An origin and, under names that begin with `role`, that of weights that a model owes something to: its `teacher`,
    or an `adapter`."""
    if not other or other == origin:
        return origin
    return {**(origin or {}), **{f"{role}_{key}": value for key, value in other.items()}}


def licences(origin: Mapping[str, str] | None) -> dict[str, str]:
    """The licence of each checkpoint of an origin by its name, "unknown" where it has none."""
    found, origin = {}, origin or {}
    for key, name in origin.items():
        role, _, last = key.rpartition("_")
        if last == "name" and not key.endswith("license_name"):
            before = f"{role}_license" if role else "license"
            terms = [origin[part] for part in (before, f"{before}_name", f"{before}_link") if part in origin]
            found[name] = ", ".join(terms) or "unknown"
    return found


def licence_note(origin: Mapping[str, str] | None) -> str:
    """A sentence for those who put a model to use, where a licence is unknown or not a permissive one; else ""."""
    every = licences(origin).items()
    if not (strict := [f"{name}: {terms}" for name, terms in every if terms.split(",")[0] not in PERMISSIVE]):
        return ""
    return f"Read the licence of these weights before you serve others with them ({'; '.join(strict)})."


def model_card(origin: Mapping[str, str] | None, title: str, library: str, text: str) -> str:
    """README.md of an export, with the front matter of Hugging Face's model cards."""
    origin = origin or {}
    before = "" if "name" in origin else "teacher_"  # of a student that began at random
    matter: dict[str, Any] = {key: origin[before + key] for key in _FIELDS[:3] if before + key in origin}
    if name := origin.get("name"):
        matter["base_model"] = name
    matter |= {"library_name": library, "pipeline_tag": "text-generation", "tags": ["openm6"]}
    lines = [f"- {name}: {terms}" for name, terms in licences(origin).items()]
    made = ["\nMade from weights under these licences:\n", *lines] if lines else []
    front = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    return "\n".join([f"---\n{front}---\n\n# {title}\n\n{text}", *made]) + "\n"


def _name(path: Path) -> str:
    """The name of a checkpoint's directory, ORGANIZATION/NAME in the cache of huggingface_hub."""
    cached = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/[^/]+$", path.as_posix())
    return f"{cached[1]}/{cached[2]}" if cached else path.name


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
