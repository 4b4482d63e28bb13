"""Bytes of a training step on the fullest process, by arithmetic: nothing is allocated.

The model follows the code: shards as FSDP2 cuts them (train/parallel.py), and the tensors that the autograd
functions of model/cpu, experts.py and loss.py keep. Legend of sizes: that of model/attention.py and
model/experts.py. The stream between the layers and all states are fp32; products run in `low` bytes (2 or 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from openm6.model import M6, ModelConfig
from openm6.model.cpu.attention import PLAIN_LIMIT, QUERY_CHUNK
from openm6.model.files import layer_of
from openm6.model.loss import CHUNK
from openm6.model.roles import Role, role_of
from openm6.train.offload import Offload
from openm6.train.optimizer import is_inner_matrix


@dataclass(frozen=True, slots=True)
class Work:
    """A micro-batch of one process, and the number of micro-batches in a step (train.accumulate).

    rows, length   positions, padding included
    images         positions of a row that are patches of pictures
    trained        positions with a label, of all rows; None: all
    """

    rows: int
    length: int
    images: int = 0
    trained: int | None = None
    micro_batches: int = 1

    @property
    def positions(self) -> int:
        return self.rows * self.length

    @property
    def labels(self) -> int:
        return self.positions if self.trained is None else self.trained


@dataclass(frozen=True, slots=True)
class Layout:
    """The section `parallel` of a recipe, over `world` processes."""

    world: int
    sharding: str
    experts: int
    recompute: str
    offload: Offload = field(default_factory=Offload)

    @property
    def data(self) -> int:
        """Number of processes that share one part of the experts."""
        return self.world // self.experts


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter; `layer` is None outside the blocks."""

    role: Role
    shape: tuple[int, ...]
    layer: int | None

    @property
    def expert(self) -> bool:
        """True for experts, which are distributed over the processes separately."""
        return self.role is Role.EXPERT

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class States:
    """Bytes of the fullest process: fp32 parameters and gradients, and what the optimizer keeps."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    def __add__(self, other: States) -> States:
        return States(
            self.parameters + other.parameters, self.gradients + other.gradients, self.optimizer + other.optimizer
        )


def weights_of(model: M6) -> list[Weight]:
    parameters = model.named_parameters()
    return [Weight(role_of(model, name), tuple(weight.shape), layer_of(name)) for name, weight in parameters]


def local_shape(weight: Weight, layout: Layout) -> tuple[int, ...]:
    """The part on process 0, which has the most: FSDP2 cuts the first dimension into parts of equal size, the last
    ones shorter or empty; experts are first divided over the columns."""
    if layout.sharding == "none":
        return weight.shape
    first, *rest = weight.shape
    spread = weight.expert and layout.experts > 1
    first = first // layout.experts if spread else first
    return (math.ceil(first / (layout.data if spread else layout.world)), *rest)


def states_of(role: Role, shape: tuple[int, ...], optimizer: str) -> States:
    """Bytes of one local tensor [..., R, C]. AdamW keeps two fp32 moments and a step; torchao's in 8 bits a byte a
    moment, an fp32 scale a block of 256 and a table of 256 values, where blocks fit (Dettmers et al. 2022); Adafactor a
    mean of squares a row and a column (Shazeer and Stern 2018); Muon one fp32 moment of the matrices."""
    count = math.prod(shape)
    adamw = 8 * count + 4
    if optimizer == "adafactor":
        kept = 4 * (count // shape[-1] + count // shape[-2] if count and len(shape) > 1 else count) + 4
    elif optimizer == "adam8bit" and count >= 4096 and count % 256 == 0:
        kept = 2 * (count + 4 * count // 256 + 1024) + 4
    elif optimizer == "muon" and is_inner_matrix(role, len(shape)):
        kept = 4 * count
    else:
        kept = adamw
    return States(4 * count, 4 * count, kept)


def states_by_layer(weights: list[Weight], layout: Layout, optimizer: str) -> dict[int | None, States]:
    """Bytes of every distinct layer, and under None of the parameters outside the blocks."""
    found: dict[int | None, States] = {}
    for weight in weights:
        states = states_of(weight.role, local_shape(weight, layout), optimizer)
        found[weight.layer] = found.get(weight.layer, States()) + states
    return found


@dataclass(frozen=True, slots=True)
class Places:
    """The placement of a process's states: on its `device` or in its host's memory.

    resident   on the host with the parameters of their layers, and updated there
    guest      on the host, but visiting the device for their layer's update; at most `visit` bytes at a time
    """

    device: States
    resident: States
    guest: States
    visit: int

    @property
    def host(self) -> States:
        return self.resident + self.guest


def places(by_layer: dict[int | None, States], offload: Offload) -> Places:
    """The placement of train/offload.py: the first layers are offloaded."""
    device, resident, guest, visit = by_layer[None], States(), States(), 0
    for number in sorted(n for n in by_layer if n is not None):
        layer = by_layer[number]
        if number < offload.parameters:
            resident += layer
            continue
        gradients = layer.gradients if number < offload.gradients else 0
        optimizer = layer.optimizer if number < offload.optimizer else 0
        guest += States(0, gradients, optimizer)
        device += States(layer.parameters, layer.gradients - gradients, layer.optimizer - optimizer)
        visit = max(visit, 2 * (gradients + optimizer))  # one layer's, and the next one's on their way
    return Places(device, resident, guest, visit)


def gathered(weights: list[Weight], layout: Layout) -> dict[int | None, int]:
    """Elements of every layer (under None, of the rest) that a process holds while it computes the layer."""
    found: dict[int | None, int] = {}
    for weight in weights:
        processes = layout.experts if weight.expert else 1
        found[weight.layer] = found.get(weight.layer, 0) + weight.numel // processes
    return found


def buffers(config: ModelConfig, weights: list[Weight], layout: Layout, work: Work, low: int, gpu: bool) -> int:
    """Bytes that are neither state nor activation: gathered weights, gradients before their reduction, and rows in
    transfer between experts."""
    if layout.sharding == "none":
        # Autocast's copies; on a CPU experts are cast one by one. DistributedDataParallel reduces gradients where they
        # are.
        roles = (Role.MATRIX, Role.IMAGE_ENCODER, *((Role.EXPERT,) if gpu else ()))
        cast = [w for w in weights if w.role in roles]
        return low * sum(w.numel for w in cast) if low < 4 else 0
    elements = gathered(weights, layout)
    rest = elements.pop(None)
    largest = max(elements.values())
    # zero3: a layer's weights and the next one's, on their way. zero2: all, and one in the buffer it arrives in.
    weights_held = low * (2 * largest if layout.sharding == "zero3" else sum(elements.values()) + largest)
    if low < 4:  # routers choose in fp32: a copy that is kept for the backward pass
        routers = sum(w.numel for w in weights if w.role is Role.ROUTER)
        alone = layout.recompute != "none" and routers
        weights_held += 4 * (routers // len(config.expert_layers()) if alone else routers)
    # A layer's gradients as they come, while those of the one before are reduced in fp32. Outside of the blocks
    # everything is fp32, and the gradient of a tied embedding exists from the loss on.
    gradients = (low + 4) * largest + 8 * rest
    if work.micro_batches > 1:  # only the last one reduces: until then whole gradients add up
        gradients += 4 * (sum(elements.values()) + rest)
    travelling = 0
    if layout.experts > 1:  # sent and received
        travelling = 2 * low * config.experts_per_token * work.positions * config.hidden_size
    staged = 0
    if layout.offload.layers:  # a layer's gradients on their way to the host, its fp32 shard on its way from there
        shard = max(sum(math.prod(local_shape(w, layout)) for w in weights if w.layer == n) for n in elements)
        staged = 4 * shard * ((layout.offload.gradients > 0) + (layout.offload.parameters > 0))
    return weights_held + gradients + travelling + staged


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes: `saved` from the forward to the backward pass, `working` on top of it at the worst moment."""

    saved: int
    working: int

    @property
    def peak(self) -> int:
        return self.saved + self.working


def activations(config: ModelConfig, layout: Layout, work: Work, low: int, gpu: bool, images: int = 0) -> Activations:
    """Activations of the forward and backward pass of a micro-batch; `images`: the result of `image_bytes`.

    The peak is reached either in the loss, or in the backward pass of the last layer, when a recomputed layer stands
    beside everything that was saved. On a GPU attention is FlexAttention's, which keeps no probabilities. Experts are
    taken to be loaded evenly; on a CPU every query is taken to see its whole row.
    """
    d, positions, labels = config.hidden_size, work.positions, work.labels
    sparse = set(config.expert_layers())
    whole = [_layer(config, n in sparse, layout, work, low, gpu) for n in range(config.num_hidden_layers)]
    entry = 4 * d + 1  # the stream, and which positions are real
    products = [
        _products(config, n in sparse, low, gpu) if layout.recompute == "selective" else 0 for n in range(len(whole))
    ]
    if layout.recompute == "none":
        layers, again = sum(whole), 0
    else:
        layers = sum(products) + entry * len(whole)
        # A first LayerNorm's input is the stream that was kept.
        same = 4 * d if config.norm == "layer" else 0
        again = max(w - p for w, p in zip(whole, products, strict=True)) - same
    once = _norm(config, d, gpu) + 4 * d + 1  # last norm, its output
    once += 2 * low * config.head_dim if config.positions == "rotary" else 0
    if not gpu and (layout.recompute != "none" or work.length > PLAIN_LIMIT):
        once += low * work.length  # the mask waits for the recomputation, or SDPA keeps it
    # The loss takes the gradients of its inputs in its forward pass (model/loss.py).
    loss = labels * (16 + low * d) + 4 * config.vocab_size * d
    saved = positions * (layers + once) + loss + images
    # Logits of a chunk with their exponentials or their gradient; the head in low precision and its gradient.
    logits = min(CHUNK, labels) * config.vocab_size * 8 + low * config.vocab_size * d * (2 if low < 4 else 1)
    backward = positions * again + max(
        _backward(config, n in sparse, layout, work, low, gpu) for n in range(len(whole))
    )
    return Activations(saved, max(logits, backward))


def _layer(config: ModelConfig, sparse: bool, layout: Layout, work: Work, low: int, gpu: bool) -> int:
    """Bytes a position that one layer keeps without recomputation."""
    attention = _norm(config, config.hidden_size, gpu) + _attention(config, work, low, gpu)
    inner = _norm(config, config.hidden_size, gpu)
    if not sparse:
        return attention + inner + low * config.hidden_size + _wide(config, config.intermediate_size, low)
    return attention + inner + _experts(config, layout, low, gpu)


def _norm(config: ModelConfig, width: int, gpu: bool) -> int:
    """LayerNorm keeps its input, mean and scale; RMSNorm (cpu/norm.py) x / rms and the scale, on a GPU its input
    too."""
    if config.norm == "layer":
        return 4 * width + 8
    return (8 if gpu else 4) * width + 4


def _attention(config: ModelConfig, work: Work, low: int, gpu: bool) -> int:
    heads, width = config.num_attention_heads, config.head_dim
    query, key = heads * width, config.num_key_value_heads * width
    turned = config.qk_norm or config.positions == "rotary"
    total = low * config.hidden_size + low * query  # inputs of both projections
    if config.qk_norm:
        unit = low if gpu else 4
        total += unit * (query + key) + 4 * (heads + config.num_key_value_heads)
    # Views keep alive what they look at: the projection, and what norms and rotation made of queries and keys.
    views = low * (query + 2 * key) + (low * (query + key) if turned else 0)
    if gpu or work.length > PLAIN_LIMIT:  # FlexAttention, SDPA: besides, a logsumexp a head; the output is counted
        return total + views + 4 * heads
    grouped = heads != config.num_key_value_heads
    copied = work.rows > 1 or grouped  # keys and values; scaled queries always are
    return total + low * query + (2 * low * query if copied else views) + low * heads * work.length


def _wide(config: ModelConfig, width: int, low: int) -> int:
    """SwiGLU keeps gate, up, silu(gate) and the product; GELU what goes in and comes out."""
    return low * width * (4 if config.activation == "swiglu" else 2)


def _experts(config: ModelConfig, layout: Layout, low: int, gpu: bool) -> int:
    d, f, chosen = config.hidden_size, config.expert_intermediate_size, config.experts_per_token
    gated = config.activation == "swiglu"
    # Router: its input, all scores, and for each choice its expert, its place and its weight.
    total = low * d + 4 * config.num_experts + chosen * (8 + 8 + 4)
    total += 4 * config.num_experts if config.router_z_loss else 0
    total += 4 * chosen + 4 if config.normalize_expert_weights else 0
    # A row into its expert and its answer; on a CPU `ExpertLoop` keeps no product of the gate.
    inner = _wide(config, f, low) + 2 if gpu else low * f * (2 if gated else 1)
    total += chosen * (2 * low * d + inner)
    total += chosen * 16 if layout.experts > 1 else 0  # the order in which rows arrived, and back
    if config.shared_intermediate_size:
        total += _wide(config, config.shared_intermediate_size, low)
    return total


def _products(config: ModelConfig, sparse: bool, low: int, gpu: bool) -> int:
    """Bytes a position that selective recomputation keeps: results of products with weights, and of fused attention.
    On a CPU the experts write into memory that they have, which cannot be kept."""
    d, width, up = config.hidden_size, config.head_dim, 2 if config.activation == "swiglu" else 1
    query = config.num_attention_heads * width
    total = low * (query + 2 * config.num_key_value_heads * width) + low * d
    total += low * query + 4 * config.num_attention_heads if gpu else 0
    if not sparse:
        return total + low * (up * config.intermediate_size + d)
    if gpu:
        total += 4 * config.num_experts + low * config.experts_per_token * (up * config.expert_intermediate_size + d)
    shared = config.shared_intermediate_size
    return total + (low * (up * shared + d) if shared else 0)


def _backward(config: ModelConfig, sparse: bool, layout: Layout, work: Work, low: int, gpu: bool) -> int:
    """Bytes of the gradients inside a layer at the worst moment: in the feed-forward, or in attention, when what the
    feed-forward had kept is gone."""
    d, positions, query = config.hidden_size, work.positions, config.num_attention_heads * config.head_dim
    up = 2 if config.activation == "swiglu" else 1
    width = config.experts_per_token * config.expert_intermediate_size if sparse else config.intermediate_size
    inner = positions * low * up * width
    kept = _layer(config, sparse, layout, work, low, gpu) - _norm(config, d, gpu) - _attention(config, work, low, gpu)
    attention = positions * (low * 4 * query - kept)
    if not gpu and work.length <= PLAIN_LIMIT:  # of the scores of a chunk of queries, before and after the softmax
        attention += 2 * low * work.rows * config.num_attention_heads * min(QUERY_CHUNK, work.length) * work.length
    return positions * (4 + low) * d + max(inner, attention)


def image_bytes(config: ModelConfig, work: Work, low: int) -> int:
    """Bytes that the image embedder keeps, by running it on tensors without memory: one long picture a row costs what
    any pictures of as many patches do."""
    if not work.images or config.image_embedder == "none":
        return 0
    from torch._subclasses.fake_tensor import FakeTensorMode

    from openm6.model.embed import ImageEmbedder

    kept: dict[Any, int] = {}
    with FakeTensorMode():
        embedder = ImageEmbedder(config)
        own = {p.untyped_storage()._cdata for p in embedder.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        stride = config.image_stride
        pixels = torch.empty(work.rows, stride, work.images * stride, 3, dtype=torch.uint8)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=low < 4),
        ):
            embedder(pixels)
    return sum(kept.values())
