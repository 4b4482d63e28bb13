"""Export of a model as an ONNX bundle, a folder that answers without PyTorch:

model.onnx, picture.onnx      the network, and its image encoder
tokenizer.json, openm6.json   as in a model directory, with the tasks that a bundle can do
edge.json                     sizes, the model, and the SHA-256 of every other file
openm6-edge                   the program: `python openm6-edge run vqa photo=a.jpg question=...`
requirements.txt              the packages that it needs
"""

from __future__ import annotations

import logging
import os
import warnings
import zipapp
from collections.abc import Mapping
from pathlib import Path
from shutil import copyfile, copytree, ignore_patterns
from tempfile import TemporaryDirectory
from typing import Any

import torch

import openm6
from openm6.core.bases import base_of
from openm6.core.errors import UsageError
from openm6.core.extras import require
from openm6.core.files import require_new, write_json, write_whole
from openm6.edge.graph import INPUTS, Graph, ImageEncoder, examples, quantize_graph
from openm6.edge.runner import FORMAT, KIND, about_of, check_files, digest_of, file_digest
from openm6.inference.session import Session
from openm6.model import M6
from openm6.model.adapters import check_mergeable
from openm6.model.count import count_parameters
from openm6.model.files import image_encoder_id, load_model
from openm6.tasks.card import write_card
from openm6.tasks.task import Task
from openm6.weights.origin import copy_papers

_log = logging.getLogger(__name__)

OPSET = 20
BITS = (8, 4)
CORE = ("__init__", "errors", "extras", "files", "images", "origins", "sequence", "tokenizer")
PARTS = ("__init__.py", "_version.py", *(f"core/{name}.py" for name in CORE), "edge", "tasks")
"""Modules and folders of this package that the program needs."""
EXPORT = ("package.py", "graph.py")
"""Modules of `edge` that need PyTorch, which the program leaves out."""
LONG_AGO = 1_000_000_000
"""Time of all files inside of the program, so that the same modules give the same digest."""
NEEDS = (
    "numpy>=1.26", "onnxruntime>=1.30", "tokenizers>=0.22,<0.24", "pillow>=11,<13", "pydantic>=2.11,<3", "pyyaml>=6",
    "starlette", "anyio", "uvicorn>=0.34", "jinja2>=3.1.6",
)  # fmt: skip
"""Packages that the program imports; a test compares them with its imports and with pyproject.toml."""


def export(path: Path, output: Path, bits: int | None = None) -> dict[str, Any]:
    """Write the ONNX bundle of a model directory. Returns the content of edge.json. `bits` 8: products with weights and
    inputs in 8 bits; 4: weights in 4.

    Raises UsageError for a model that cannot be exported, or without the packages that exporting takes.
    """
    require_new(output)
    if bits not in (None, *BITS):
        raise UsageError(f"bits is {bits}; it can be 8, 4, or left out.")
    require("edge", "onnx", "onnxruntime", "onnxscript")
    check_mergeable(path)
    session = Session.load(path, "cpu", trainable=True)
    session.model.eval()
    tasks = [task for task in session.tasks.values() if is_exportable(task)]
    if not tasks:
        raise UsageError(f"An ONNX bundle can do no task of {path}: {', '.join(session.tasks) or 'it has none'}.")
    about = _describe(session, path, bits)

    def write(folder: Path) -> None:
        auto, model = torch.export.Dim.AUTO, session.model
        shapes = ({0: auto}, {0: auto}, {0: auto}, {0: auto}, {0: auto, 1: auto}, {0: auto})
        names = ["logits", "state", "present", *(f"head.{name}" for name in model.heads)]
        _export(Graph(model), examples(model), shapes, INPUTS, names, folder / "model.onnx")
        if model.image is not None:
            _write_image_encoder(model, folder)
        about["graph_bytes"] = {"32": _graph_bytes(folder)}
        if bits:
            about["graph_bytes"] |= _quantize(folder, bits)
        session.processor.tokenizer.save(folder)
        write_card(folder, session.processor, tasks)
        copy_papers(path, folder)
        (folder / "requirements.txt").write_text("\n".join(NEEDS) + "\n", "utf-8")
        write_program(folder / "openm6-edge")
        _write_about(folder, "edge.json", about)

    write_whole(output, write)
    if gainless := smaller_variant_hint(about):
        _log.warning(gainless)
    return about


def smaller_variant_hint(about: Mapping[str, Any]) -> str:
    """A sentence where fewer bits than those of edge.json take no more bytes; else ""."""
    sizes: dict[str, int] = about["graph_bytes"]
    chosen = str(about["bits"] or 32)
    best = min(sizes, key=lambda bits: (sizes[bits], -int(bits)))
    if int(best) <= int(chosen):
        return ""
    return (
        f"{chosen} bits gain nothing here: the graphs take {sizes[chosen]:,} bytes, and {sizes[best]:,} in {best} bits "
        f"({'no --bits' if best == '32' else f'--bits {best}'}), whose answers are nearer to the model's."
    )


def quantize_bundle(path: Path, output: Path, bits: int) -> dict[str, Any]:
    """Write the bundle that `export` gives with `bits` from the one that it gives without, without exporting again.
    Raises UsageError for a folder that is no such bundle."""
    require_new(output)
    about = about_of(path)
    check_files(path, about)
    if about["bits"] or bits not in BITS:
        raise UsageError(f"{path} has {about['bits'] or 32} bits: 32 can be rounded to 8 or 4, not to {bits}.")
    about["bits"] = bits

    def write(folder: Path) -> None:
        for name in about["files"]:
            copyfile(path / name, folder / name)
        about["graph_bytes"] |= _quantize(folder, bits)
        _write_about(folder, "edge.json", about)

    write_whole(output, write)
    return about


def is_exportable(task: Task) -> bool:
    """True for a task that a bundle can do: texts generated one token after the other, vectors, and heads."""
    return not task.draws and not task.sketch


def export_image_encoder(path: Path, output: Path) -> dict[str, Any]:
    """Write the image encoder of a model alone, with which an edge device computes the features that it sends. Raises
    UsageError for a model that reads no pictures."""
    require_new(output)
    path = base_of(path) or path  # an adapter does not change the image encoder
    model = load_model(path)
    if model.image is None:
        raise UsageError(f"{path} reads no pictures.")
    config = model.config
    about: dict[str, Any] = {
        "image_encoder": image_encoder_id(path), "stride": config.image_stride, "max_patches": config.image_max_patches,
        "width": config.hidden_size,
    }  # fmt: skip

    def write(folder: Path) -> None:
        _write_image_encoder(model, folder)
        _write_about(folder, "image_encoder.json", about)

    write_whole(output, write)
    return about


def _write_about(folder: Path, name: str, about: dict[str, Any]) -> None:
    """Write the description of a folder, with the digests of its files, which are added to `about`."""
    files = sorted(file for file in folder.iterdir() if file.name != name)
    about |= {"format": FORMAT, "files": {file.name: file_digest(file) for file in files}}
    about["sha256"] = digest_of(about)
    write_json(folder / name, about)


def _write_image_encoder(model: M6, folder: Path) -> None:
    side = 2 * model.config.image_stride
    pixels = torch.zeros(side, 2 * side, 3, dtype=torch.uint8)
    auto = torch.export.Dim.AUTO
    _export(ImageEncoder(model), (pixels,), ({0: auto, 1: auto},), ("pixels",), ["features"], folder / "picture.onnx")


def _describe(session: Session, path: Path, bits: int | None) -> dict[str, Any]:
    config = session.model.config
    return {
        "kind": KIND, "version": openm6.__version__, "bits": bits,
        "parameters": sum(count_parameters(config).values()), "layers": config.num_hidden_layers,
        "key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim, "width": config.hidden_size,
        "positions": config.max_position_embeddings if config.positions == "learned" else None,
        "stride": config.image_stride, "max_patches": config.image_max_patches,
        "pictures": config.image_embedder != "none", "image_encoder": image_encoder_id(base_of(path) or path),
        "heads": list(config.heads or {}), "source": config.source,
    }  # fmt: skip


def _quantize(folder: Path, bits: int) -> dict[str, int]:
    """Quantize the graphs in place. Returns their bytes by bits: with 4 also those in 8, which may be no more."""
    sizes: dict[str, int] = {}
    if bits == 4:
        with TemporaryDirectory() as place:
            for file in folder.glob("*.onnx"):
                copyfile(file, Path(place) / file.name)
            sizes = _quantize(Path(place), 8)
    quantize_graph(folder / "model.onnx", bits)
    if (picture := folder / "picture.onnx").is_file():
        quantize_graph(picture, 8)
    return sizes | {str(bits): _graph_bytes(folder)}


def _graph_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.onnx"))


def _export(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], shapes: Any, given: Any, names: list[str], file: Path
) -> None:
    exporter = logging.getLogger("torch.onnx")
    before = exporter.level
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exporter.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                module.eval(), inputs, dynamo=True, dynamic_shapes=shapes, input_names=list(given), output_names=names,
                opset_version=OPSET, verbose=False,
            )  # fmt: skip
        finally:
            exporter.setLevel(before)
    assert program is not None
    program.save(file)
    _strip_source_lines(file)


def _strip_source_lines(file: Path) -> None:
    """Remove the lines of code, with their folders, from which the exporter derived each operation."""
    import onnx

    model = onnx.load(file)
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    del model.graph.value_info[:]
    onnx.save(model, file)


def write_program(file: Path) -> None:
    """Write the program as one file: the modules of this package that need no PyTorch, and __main__.py."""
    source = Path(openm6.__file__).parent
    with TemporaryDirectory() as place:
        inside = Path(place) / "openm6"
        (inside / "core").mkdir(parents=True)
        for name in PARTS:
            if (source / name).is_dir():
                copytree(source / name, inside / name, ignore=ignore_patterns("__pycache__", *EXPORT))
            else:
                copyfile(source / name, inside / name)
        (inside / "edge" / "__main__.py").rename(Path(place) / "__main__.py")
        for path in Path(place).rglob("*"):
            os.utime(path, (LONG_AGO, LONG_AGO))
        zipapp.create_archive(place, file, "/usr/bin/env python3", compressed=True)
