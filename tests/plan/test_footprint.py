"""The planner's bytes against those of real networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openm6.core.batch import Batch, pack
from openm6.core.sequence import IGNORE
from openm6.model import M6, ModelConfig
from openm6.model.count import count_parameters
from openm6.model.files import meta_model
from openm6.model.roles import Role
from openm6.plan.footprint import (
    Layout,
    States,
    Work,
    activations,
    buffers,
    image_bytes,
    states_by_layer,
    states_of,
    weights_of,
)
from openm6.plan.planner import dry_run
from openm6.train.distributed import Group
from openm6.train.optimizer import make_optimizers
from openm6.train.parallel import Parallel
from openm6.train.recipe import ParallelSection, TrainSection
from tests.conftest import EXPERTS, YARN, example, tiny_config

ALONE = Group(0, 1, torch.device("cpu"))
PAPER = {"norm": "layer", "activation": "gelu", "positions": "learned"}
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_hidden_layers": 3}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"qk_norm": True, "num_key_value_heads": 2},
    "biased": {"qkv_bias": True, "rotary_scaling": YARN},
    "paper": PAPER,
    "experts": {**EXPERTS, "num_experts": 8},
    "paper-experts": {**PAPER, "num_experts": 8, "expert_interval": 3},
}


class Living(TorchDispatchMode):
    """Bytes of all tensors that operations made and that somebody still holds, `known` ones excepted, and the most at
    any time. What a kernel takes and gives back within one operation is not seen."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor.is_mkldnn:  # a weight laid out for one product
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        self.made = {k: v for k, v in self.made.items() if not v[0].expired()}
        return sum(size for _, size in self.made.values())


def tensors_of(batch: Batch) -> list[Tensor]:
    return [batch.ids, batch.segments, batch.blocks, batch.positions, batch.labels, *(i.pixels for i in batch.images)]


def measured(model: M6, batch: Batch, recompute: str, low: int) -> tuple[int, int]:
    """Bytes between the forward and the backward pass, and the most until its end, without parameters and gradients."""
    parallel = Parallel(model.train(), ParallelSection(recompute=recompute), ALONE, torch.float32)  # type: ignore[arg-type]
    gradients = [torch.zeros_like(p) for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    with Living([*model.parameters(), *model.buffers(), *gradients, *tensors_of(batch)]) as living:
        with torch.autocast("cpu", torch.bfloat16, enabled=low == 2):
            output = parallel.run(batch)
            between = living.now()
        output.loss.backward()
    return between, living.peak


def batch_of(rows: int, length: int, images: int = 0) -> Batch:
    """Rows of one example each, all but 16 of its positions source."""
    rng = np.random.default_rng(0)
    pictures = ((1, images),) if images else ()
    return pack([example(rng, length - 16 - images, 16, pictures) for _ in range(rows)], length, 0)


def check_activations(config: ModelConfig, batch: Batch, recompute: str, low: int, images: int = 0) -> None:
    between, peak = measured(M6(config), batch, recompute, low)
    rows, length = batch.shape
    layout = Layout(1, "none", 1, recompute)
    work = Work(rows, length, images, int((batch.labels != IGNORE).sum()))
    counted = activations(config, layout, work, low, gpu=False, images=image_bytes(config, work, low))
    copies = buffers(config, weights_of(meta_model(config)), layout, work, low, gpu=False)
    assert counted.saved + copies == pytest.approx(between, rel=0.02)
    assert counted.peak + copies == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("low", [4, 2])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_those_of_a_real_step(name: str, recompute: str, low: int) -> None:
    check_activations(tiny_config(**{**SIZES, **MODELS[name]}), batch_of(16, 128), recompute, low)


@pytest.mark.parametrize(
    ("sizes", "rows", "length", "images"),
    [
        ({"router": "topk", "normalize_expert_weights": True, "router_z_loss": 0.1}, 16, 128, 0),
        ({"num_key_value_heads": 4}, 1, 512, 0),
        (PAPER, 1, 512, 0),
        ({}, 1, 2304, 0),
        ({"vocab_size": 3000}, 16, 128, 0),
        ({"distinct_layers": 1}, 16, 128, 0),
        ({"image_embedder": "patch"}, 16, 128, 64),
        ({"image_embedder": "stem", "stem_widths": [8, 16, 32]}, 16, 128, 16),
    ],
)
def test_other_shapes_too(sizes: dict[str, Any], rows: int, length: int, images: int) -> None:
    more = EXPERTS if "router" in sizes else {}
    check_activations(tiny_config(**{**SIZES, **more, **sizes, "max_position_embeddings": 4096}),
                      batch_of(rows, length, images), "none", 4, images)  # fmt: skip


def test_on_a_gpu_attention_keeps_no_probabilities() -> None:
    config, layout = tiny_config(**SIZES), Layout(1, "none", 1, "none")
    short, long = (
        [activations(config, layout, Work(512 // n, n), 2, gpu).saved for n in (64, 128)] for gpu in (True, False)
    )
    assert short[0] == short[1]
    assert long[1] - long[0] == 3 * 512 * 4 * 64 * 2  # layers, positions, heads, more keys, bytes


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor", "adam8bit"])
@pytest.mark.parametrize("name", MODELS)
def test_states_of_one_process_are_exact(name: str, optimizer: str) -> None:
    config = tiny_config(**{**SIZES, **MODELS[name]})
    if optimizer == "adam8bit":
        pytest.importorskip("torchao")
    model = M6(config).train()
    optimizers = make_optimizers(model, TrainSection(steps=1, optimizer=optimizer))  # type: ignore[arg-type]
    model(batch_of(2, 64)).loss.backward()
    for each in optimizers:
        each.step()
    planned = states(config, Layout(1, "none", 1, "none"), optimizer)
    assert planned.parameters == sum(p.nbytes for p in model.parameters())
    assert planned.gradients == sum(p.grad.nbytes for p in model.parameters())  # type: ignore[union-attr]
    kept = [value for each in optimizers for state in each.state.values() for value in state.values()]
    assert planned.optimizer == sum(bytes_of(value) for value in kept)


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor; of a quantized one, those of its parts."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])


def test_smaller_optimizers_keep_less() -> None:
    """[64, 4096]: rows and columns; a byte a moment and two scales a block."""
    assert states_of(Role.MATRIX, (64, 4096), "adafactor").optimizer == 4 * (64 + 4096) + 4
    assert states_of(Role.MATRIX, (3, 64, 4096), "adafactor").optimizer == 3 * 4 * (64 + 4096) + 4
    assert states_of(Role.MATRIX, (64, 4096), "adam8bit").optimizer == 2 * 64 * 4096 + 8 * 1024 + 2 * 1024 + 4
    assert states_of(Role.MATRIX, (64,), "adam8bit").optimizer == 8 * 64 + 4


def states(config: ModelConfig, layout: Layout, optimizer: str = "adamw") -> States:
    return sum(states_by_layer(weights_of(meta_model(config)), layout, optimizer).values(), States())


@pytest.mark.parametrize(
    "layout",
    [Layout(7, "zero2", 1, "none"), Layout(6, "zero3", 2, "full"), Layout(6, "zero2", 6, "none"),
     Layout(3, "none", 1, "none")],
)  # fmt: skip
def test_a_dry_run_finds_what_is_computed(layout: Layout) -> None:
    config = tiny_config(num_experts=6, experts_per_token=2, hidden_size=40, num_hidden_layers=3, expert_interval=2)
    found = dry_run(config, layout, "adamw")
    assert found == states_by_layer(weights_of(meta_model(config)), layout, "adamw")
    assert len(found) == 4
    if layout.sharding == "none":
        assert found[None].parameters + sum(found[n].parameters for n in range(3)) == 4 * total(config)


def total(config: ModelConfig) -> int:
    return sum(count_parameters(config).values())
