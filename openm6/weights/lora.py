"""LoRA adapters in PEFT's form on Hugging Face's module names, and on ours.

A model joins queries, keys and values, and gate and up (families.py). The product B A of a joined layer is that of its
parts with their A below each other and their B block-diagonal; where all parts have the same A, as those of an adapter
that was trained here, it is theirs with their B below each other. The ranks of the parts are kept in openm6.json, so
that an adapter comes out as it came in, bit by bit.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openm6.core.bases import CONFIG, read_adapter_config, require_model
from openm6.core.errors import UsageError
from openm6.core.files import require_new, write_json, write_whole
from openm6.core.tokenizer import Tokenizer, open_fast
from openm6.model.adapters import (
    ALONE,
    LINEAR,
    PREFIX,
    ROWS,
    WEIGHTS,
    check_whole,
    lora_scale,
    method_of,
    stored_weights,
)
from openm6.model.config import ModelConfig
from openm6.model.files import read_config
from openm6.tasks.card import read_checkpoint, read_origin, write_card
from openm6.weights.directory import open_processor
from openm6.weights.export_checkpoint import open_model, write_papers, write_tokenizer
from openm6.weights.families import Joined, Part, tensors
from openm6.weights.huggingface import is_pickled_adapter, json_of
from openm6.weights.origin import copy_papers, read_origin as read_papers, with_other

_log = logging.getLogger(__name__)

_DELTA = f"{ROWS}.trainable_tokens_delta"
_MATRICES = {"embed": "model.embed_tokens", "head": "lm_head"}
"""Matrices with a row for each token, and their modules."""
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the weights of the base model as they are."""
_NOTHING: tuple[Any, ...] = (None, False, "none", [], {})


class _Low(NamedTuple):
    """A [r, in] and B [out, r] of a layer, whose product is multiplied by `scale`."""

    a: Tensor
    b: Tensor
    scale: float


def import_adapter(path: Path, base: Path, output: Path) -> None:
    """Write the directory of an adapter of the model directory `base` with the weights of one that PEFT has trained on
    the checkpoint from which that model was imported. Raises UsageError for what it changes beside linear layers and
    rows of tokens, by the key of its configuration, and for an adapter of another model."""
    require_new(output)
    require_model(base)
    check_whole(base)
    config, content = read_config(base), json_of(path / CONFIG)
    _check(path, content)
    low, rows = _read(path, content)
    ranks: dict[str, list[int]] = {}
    scales: dict[str, float] = {}
    weights: dict[str, Tensor] = {}
    for joined in _layers(config):
        found = [low.pop(_module(part.name), None) for part in joined.parts]
        if any(found):
            name = _module(joined.name)
            one, parts = _join(path, joined, found)
            if parts:
                ranks[name] = parts
            weights |= {f"{PREFIX}{name}.lora_A.weight": one.a, f"{PREFIX}{name}.lora_B.weight": one.b}
            scales[name] = one.scale
    if low:
        reason = (
            "weights of experts cannot be converted" if ".experts." in min(low) else "is it an adapter of another one"
        )
        raise UsageError(f"{path} adapts {min(low)}, which is no linear layer of the model {base}: {reason}.")
    processor, tasks = open_processor(base)
    indices = {}
    for ours, theirs in _MATRICES.items():
        if (found_rows := rows.pop(theirs, None)) is not None:
            indices[ours] = _token_ids(path, content, theirs, found_rows, processor.tokenizer)
            weights[f"{PREFIX}{ours}{_DELTA}"] = found_rows
    if rows:
        raise UsageError(f"{path} trains rows of {min(rows)}, which {base} has not.")
    adapter = _config(weights, scales, content.get("lora_dropout") or 0.0, base.resolve(), indices)
    seen = processor.seen_tokens
    processor = replace(
        processor, seen_tokens=None if seen is None else seen.union(*indices.values()),
        origin=with_other(processor.origin, read_papers(path), "adapter"),
        checkpoint={**(processor.checkpoint or {}), "adapter_config": content, "adapter_ranks": ranks},
    )  # fmt: skip
    named = str(content.get("base_model_name_or_path") or "")
    if named and processor.origin and Path(named).name != Path(processor.origin.get("name", "")).name:
        _log.warning("%s names %s as its base; its shapes fit %s, which it changes now.", path, named, base)

    def write(folder: Path) -> None:
        _save(folder, adapter, weights)
        write_card(folder, processor, tasks)
        copy_papers(path, folder)
        copy_papers(base, folder)

    write_whole(output, write)


def export_adapter(path: Path, output: Path) -> None:
    """Write a LoRA adapter for PEFT, on the export of its base model. Raises UsageError for adapters of other methods,
    of experts, and of models that cannot be exported."""
    require_new(output)
    if (method := method_of(path)) != "lora":
        raise UsageError(f"{path} is an adapter of the method {method}; only LoRA has a form that PEFT reads.")
    content = read_adapter_config(path)
    base = Path(content["base_model_name_or_path"])
    require_model(base)
    if others := [key for key in ALONE if content.get(key) not in _NOTHING]:
        raise UsageError(
            f"{path} is an adapter with {others[0]}, which cannot be exported: merge it, and export the model."
        )
    exported, kept = open_model(base), read_checkpoint(path) or {}
    low, rows = _read(path, content)
    ranks: Mapping[str, list[int]] = kept.get("adapter_ranks", {})
    theirs: dict[str, _Low] = {}
    for joined in _layers(config := read_config(base)):
        if found := low.pop(_module(joined.name), None):
            if config.num_experts and ".feed_forward." in joined.name:
                raise UsageError(f"{path} adapts {_module(joined.name)}, which PEFT would take for one of the experts.")
            theirs |= {_module(p.name): one for p, one in _parts(joined, found, ranks.get(_module(joined.name)))}
    if low or rows.keys() - _MATRICES.keys():
        raise UsageError(f"{path} changes {min([*low, *rows])}, which cannot be exported.")
    weights = {f"{PREFIX}{_MATRICES[ours]}{_DELTA}": values for ours, values in rows.items()}
    for name, one in theirs.items():
        factor = one.scale / lora_scale(kept["adapter_config"], name, len(one.a)) if "adapter_config" in kept else 1
        b = one.b if factor == 1 else one.b * factor
        weights |= {f"{PREFIX}{name}.lora_A.weight": one.a, f"{PREFIX}{name}.lora_B.weight": b}
    indices = {_MATRICES[ours].rpartition(".")[2]: list(content["trainable_token_indices"][ours]) for ours in rows}
    name = (read_origin(base) or {}).get("name", str(base))
    scales, dropout = {module: one.scale for module, one in theirs.items()}, content.get("lora_dropout") or 0.0
    adapter: Any = kept.get("adapter_config") or _config(weights, scales, dropout, name, indices, "CAUSAL_LM")
    last = max((number + 1 for ids in indices.values() for number in ids), default=0)
    checkpoint = replace(exported.checkpoint, source=path, origin=read_origin(path) or {})
    tokenizer, count = Tokenizer.load(base), exported.checkpoint.config.vocab_size
    more = ""
    if last > count:
        checkpoint = replace(checkpoint, fast=lambda: tokenizer.without_new(last))
        more = (
            f"\n\nIt has rows for tokens that its base has not: call `model.resize_token_embeddings({last}, "
            "mean_resizing=False)` before PeftModel.from_pretrained, and take the tokenizer from here."
        )
        _log.warning(
            "The adapter has rows for tokens that its base has not: see %s before you open it.", output / "README.md"
        )

    def write(folder: Path) -> None:
        _save(folder, adapter, weights)
        if last > count:
            write_tokenizer(checkpoint, folder)
        write_papers(checkpoint, folder, "peft", more)

    write_whole(output, write)


def _layers(config: ModelConfig) -> Iterator[Joined]:
    """The linear layers of the blocks, with theirs."""
    return (one for one in tensors(config) if re.fullmatch(rf"blocks\..*\.({'|'.join(LINEAR)})\.weight", one.name))


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _check(path: Path, content: Mapping[str, Any]) -> None:
    if (kind := content.get("peft_type")) != "LORA":
        raise UsageError(f"{path / CONFIG}: peft_type is {kind!r}; only LORA can be imported.")
    if found := [key for key in (*ALONE, "fan_in_fan_out", "megatron_config") if content.get(key) not in _NOTHING]:
        raise UsageError(
            f"{path / CONFIG}: {found[0]} is {content[found[0]]!r}; only products beside linear layers and rows of "
            "tokens can be imported (merge it by PEFT's merge_and_unload, and import the model)."
        )
    if (start := content.get("init_lora_weights", True)) not in _STARTS:
        raise UsageError(
            f"{path / CONFIG}: init_lora_weights is {start!r}, which changes the base model: convert the adapter by "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if not (path / WEIGHTS).is_file() and (path / "adapter_model.bin").is_file():
        raise is_pickled_adapter(path / "adapter_model.bin")


def _read(path: Path, content: Mapping[str, Any]) -> tuple[dict[str, _Low], dict[str, Tensor]]:
    """The products of an adapter by the module that each changes, and rows of tokens by their matrix. Raises UsageError
    for any other tensor."""
    matrices: dict[str, dict[str, Tensor]] = {}
    rows = {}
    for key, value in stored_weights(path).items():
        name = key.removeprefix(PREFIX)
        if name.endswith(_DELTA):
            rows[name.removesuffix(_DELTA)] = value
            continue
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if not found or value.ndim != 2:
            raise UsageError(f"{path} holds {key} {list(value.shape)}, which cannot be converted.")
        matrices.setdefault(found[1], {})[found[2]] = value
    for name, pair in matrices.items():
        if pair.keys() != {"A", "B"} or len(pair["A"]) != pair["B"].shape[1]:
            raise UsageError(f"{path} is damaged: {name} has no lora_A and lora_B that can be multiplied.")
    low = {n: _Low(p["A"], p["B"], lora_scale(dict(content), n, len(p["A"]))) for n, p in matrices.items()}
    return low, rows


def _join(path: Path, joined: Joined, found: list[_Low | None]) -> tuple[_Low, list[int]]:
    """The product of a joined layer, and the rank of each part; no ranks where all parts have one A."""
    for part, one in zip(joined.parts, found, strict=True):
        if one and (len(one.b), one.a.shape[1]) != part.shape:
            raise UsageError(
                f"{path}: {_module(part.name)} is [{len(one.b)}, {one.a.shape[1]}] there and {list(part.shape)} here: "
                "it is an adapter of another model."
            )
    there = [one for one in found if one]
    first = there[0]
    alike = all(one.scale == first.scale and torch.equal(one.a, first.a) for one in there)
    if alike and len(there) == len(found):
        return _Low(first.a, torch.cat([one.b for one in there]), first.scale), []
    ranks = [len(one.a) if one else 0 for one in found]
    b, row, column = first.b.new_zeros(joined.shape[0], sum(ranks)), 0, 0
    for part, one, rank in zip(joined.parts, found, ranks, strict=True):
        if one:
            factor = one.scale / first.scale
            b[row : row + part.shape[0], column : column + rank] = one.b if factor == 1 else one.b * factor
        row, column = row + part.shape[0], column + rank
    return _Low(torch.cat([one.a for one in there]), b, first.scale), ranks


def _parts(joined: Joined, one: _Low, ranks: list[int] | None) -> Iterator[tuple[Part, _Low]]:
    """The product of each part of a joined layer: the inverse of `_join`."""
    fits = ranks is not None and len(ranks) == len(joined.parts) and sum(ranks) == len(one.a)
    row, column = 0, 0
    for place, part in enumerate(joined.parts):
        b = one.b[row : row + part.shape[0]]
        row += part.shape[0]
        if not fits:
            yield part, _Low(one.a.clone(), b.contiguous(), one.scale)
            continue
        columns = slice(column, column := column + ranks[place])  # type: ignore[index]
        if ranks[place]:  # type: ignore[index]
            yield part, _Low(one.a[columns].contiguous(), b[:, columns].contiguous(), one.scale)


def _token_ids(path: Path, content: Mapping[str, Any], matrix: str, rows: Tensor, tokenizer: Tokenizer) -> list[int]:
    """The ids whose rows an adapter holds. Raises UsageError for tokens that the model of this tokenizer has not."""
    given = content.get("trainable_token_indices") or []
    ids = given if isinstance(given, list) else next((v for k, v in given.items() if matrix.endswith(k)), [])
    if len(ids) != len(rows) or not all(type(number) is int and 0 <= number < tokenizer.code_start for number in ids):
        raise UsageError(
            f"{path / CONFIG}: trainable_token_indices are not the ids of the {len(rows)} rows of {matrix}."
        )
    new = [number for number in ids if number >= tokenizer.first_new_id]
    if new:
        own = tokenizer.without_new(tokenizer.code_start)
        there = open_fast(path) if (path / "tokenizer.json").is_file() else None
        if there is None or any(there.id_to_token(number) != own.id_to_token(number) for number in new):
            raise UsageError(
                f"{path / CONFIG}: trainable_token_indices has the id {new[0]}, a token that was added to the "
                "checkpoint and that the model has not."
            )
    return list(ids)


def _config(
    weights: Mapping[str, Tensor], scales: Mapping[str, float], dropout: float, base: object,
    indices: dict[str, list[int]], task_type: str | None = None,
) -> Any:  # fmt: skip
    """PEFT's configuration: the most frequent rank and alpha, and patterns for the layers with others."""
    from peft import LoraConfig

    ranks = {name: len(weights[f"{PREFIX}{name}.lora_A.weight"]) for name in scales}
    alphas = {name: scales[name] * ranks[name] for name in scales}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else rank
    return LoraConfig(
        r=rank, lora_alpha=_whole(alpha), lora_dropout=dropout, target_modules=sorted(scales), task_type=task_type,
        rank_pattern={_exactly(name): one for name, one in ranks.items() if one != rank},
        alpha_pattern={_exactly(name): _whole(one) for name, one in alphas.items() if one != alpha},
        trainable_token_indices=indices or None, base_model_name_or_path=str(base), inference_mode=True,
    )  # fmt: skip


def _exactly(name: str) -> str:
    """A pattern of PEFT for one module."""
    return re.escape(name)


def _whole(value: float) -> Any:
    return int(value) if value == int(value) else value


def _save(folder: Path, adapter: Any, weights: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(adapter, dict):
        write_json(folder / CONFIG, adapter)
    else:
        adapter.save_pretrained(folder)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
