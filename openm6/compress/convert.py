"""Conversion of models: an open checkpoint imported, a model exported, upcycled to experts, quantized, or pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from openm6.core.bases import CONFIG
from openm6.core.batch import pack
from openm6.core.errors import UsageError
from openm6.core.files import require_new, write_whole
from openm6.core.tokenizer import Tokenizer
from openm6.data.columns import SlotView
from openm6.data.source import open_source
from openm6.inference.session import Session
from openm6.model import M6, ModelConfig
from openm6.model.adapters import check_mergeable
from openm6.model.block import Block
from openm6.model.feed_forward import FeedForward
from openm6.model.files import meta_model
from openm6.model.lowbit import stored
from openm6.model.norm import RMSNorm
from openm6.model.roles import role_of
from openm6.tasks.encode import encode_example
from openm6.weights.directory import describe, make_processor
from openm6.weights.export_checkpoint import open_model, write_huggingface
from openm6.weights.export_gguf import write_gguf
from openm6.weights.import_checkpoint import import_weights, open_checkpoint
from openm6.weights.lora import export_adapter
from openm6.weights.prune import prune
from openm6.weights.upcycle import upcycle


def import_model(
    path: Path, output: Path, image_embedder: str, num_codes: int, max_length: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ModelConfig:  # fmt: skip
    """A model directory with the weights of an open checkpoint (weights/import_checkpoint.py) as its backbone, in their
    precision, and its licence files; an image encoder starts at random. `progress` gets the megabytes written and their
    total. Raises UsageError for a checkpoint that cannot be imported or an `output` that exists."""
    require_new(output)
    checkpoint = open_checkpoint(path)
    fast = checkpoint.fast()
    chat, start_at = checkpoint.chat(fast), checkpoint.config.vocab_size
    tokenizer = Tokenizer.wrap(fast, num_codes, start_at, chat.ends if chat else ())
    config = replace(
        checkpoint.config, vocab_size=tokenizer.vocab_size, num_codes=num_codes, image_embedder=image_embedder
    )
    known = frozenset(range(tokenizer.first_new_id))
    processor = replace(
        make_processor(config, tokenizer, max_length, seen_tokens=known), origin=checkpoint.origin,
        checkpoint=checkpoint.kept, chat=chat.format if chat else None,
    )  # fmt: skip

    def write(folder: Path) -> None:
        describe(folder, meta_model(config), processor, (), made_from=path)
        import_weights(checkpoint, config, folder, progress)

    write_whole(output, write)
    return config


def export_model(
    path: Path, output: Path, form: str, dtype: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:  # fmt: skip
    """Write a model directory for others: as a directory of Hugging Face's form ("huggingface", where an adapter
    becomes PEFT's) or with a GGUF file ("gguf"), in the precision that it has or in `dtype` (f32, f16, bf16; gguf:
    q8_0). Licence files and a model card go along. `progress` gets the megabytes written and their total. Raises
    UsageError for what the form does not express."""
    require_new(output)
    if form == "huggingface" and (path / CONFIG).is_file():
        if dtype:
            raise UsageError("An adapter keeps its precision: leave --dtype out.")
        export_adapter(path, output)
        return
    exported = open_model(path)
    if form == "gguf":
        write_whole(output, lambda folder: write_gguf(exported, folder, output.name, dtype, progress))
    else:
        write_whole(output, lambda folder: write_huggingface(exported, folder, dtype, progress))


def upcycle_model(path: Path, output: Path, num_experts: int, chosen: int, router: str, interval: int) -> Session:
    """A model directory with experts in place of the feed-forward layers of the dense model at `path`."""
    require_new(output)
    check_mergeable(path)
    session = Session.load(path, device="cpu", trainable=True)
    torch.manual_seed(0)
    session.model = upcycle(session.model, num_experts, chosen, router, interval)
    write_whole(output, session.save)
    return session


def quantize_model(path: Path, output: Path, bits: int) -> Session:
    """A model directory with weights in 8 or 4 bits (model/lowbit.py), for which a CPU has kernels."""
    require_new(output)
    from safetensors.torch import save_file

    check_mergeable(path)
    session = Session.load(path, "cpu", trainable=True)
    session.model.config = ModelConfig(**{**session.model.config.to_dict(), "weight_bits": bits})
    _fold_norms(session.model)
    kept: dict[str, Tensor] = {}
    for name, weight in session.model.state_dict().items():
        kept |= stored(name, role_of(session.model, name), weight, bits)

    def write(folder: Path) -> None:
        session.describe(folder)
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    write_whole(output, write)
    return session


@torch.no_grad()
def _fold_norms(model: M6) -> None:
    """Fold the weights of norms into the products behind them before these are rounded, as kernels do (cpu/pack.py)."""
    for block in model.blocks:
        assert isinstance(block, Block)
        pairs = [(block.attention_norm, block.attention.qkv)]
        if isinstance(block.feed_forward, FeedForward):
            pairs.append((block.feed_forward_norm, block.feed_forward.up))
        for norm, product in pairs:
            if isinstance(norm, RMSNorm):
                product.weight *= norm.weight
                norm.weight.fill_(1.0)


def prune_model(
    path: Path, output: Path, task: str, data: str, columns: Mapping[str, str], records: int, **sizes: int | None
) -> Session:
    """A model directory with fewer layers, heads, units or experts (`sizes`: weights/prune.py): those are removed that
    the first records of `data` need least for `task`."""
    require_new(output)
    if not any(sizes.values()):
        raise UsageError(f"Give a size to prune to: {', '.join(sizes)}.")
    check_mergeable(path)
    session = Session.load(path, trainable=True)
    chosen, source = session.task(task), open_source(data)
    view = SlotView.of(chosen, source, columns)
    examples = [encode_example(chosen, view(one), session.processor, None) for one in islice(source, records)]
    device = session.model.embed.weight.device
    length, pad_id = max(map(len, examples)), session.processor.tokenizer.pad_id
    batches = [pack(examples[i : i + 8], length, pad_id).to(device) for i in range(0, len(examples), 8)]
    with session.precision():
        session.model = prune(session.model, batches, **sizes)
    write_whole(output, session.save)
    return session
