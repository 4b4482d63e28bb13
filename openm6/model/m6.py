"""M6: one Transformer over image and text (KDD 2021, section 4).

Read this file first, then block.py, attention.py and experts.py. Shapes: see the legend in attention.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.utils import ModelOutput

from openm6.batches import Batch, cells_of
from openm6.errors import OpenM6Error
from openm6.model.attention import (
    EVEN_KEYS,
    Cache,
    additive,
    build_mask,
    build_picture_mask,
    build_prompt_mask,
    rotary_angles,
    row_mask,
)
from openm6.model.block import Block
from openm6.model.changed import ChangedRows, Prompt
from openm6.model.config import ModelConfig
from openm6.model.embed import ImageEmbedder, cell_features, scatter_images
from openm6.model.experts import Experts, Load, Router
from openm6.model.loss import Teacher, linear_cross_entropy
from openm6.model.lowbit import INT4, INT8, kernel_of
from openm6.model.network import Network
from openm6.model.norm import make_norm
from openm6.model.packed import Packed, kernel_dtype, packed
from openm6.model.picture_mask import PictureMask
from openm6.model.precision import product_dtype
from openm6.model.sparse import SparsePattern, block_mask, cached_places
from openm6.sequence import IGNORE


@dataclass
class Output(ModelOutput):
    """What a forward gives.

    loss      sum of the losses of all M trained positions, each by its example's weight (divide by the sum of those, or
              by that of all processes)
    losses    fp32 [M], the single losses, without gradient
    segments  int64 [M], to which example of the batch each belongs
    hidden    [B, T, D] after the last norm
    heads     by name what each head gives at the end of every example, fp32 [examples, outputs]
    loads     what each layer of experts saw
    """

    loss: Tensor | None = None
    losses: Tensor | None = None
    segments: Tensor | None = None
    hidden: Tensor | None = None
    heads: dict[str, Tensor] | None = None
    loads: list[Load] | None = None

    def by_example(self, count: int) -> tuple[Tensor, Tensor]:
        """Of a batch of `count` examples each one's sum of losses, fp64, and trained positions, int64: [count]."""
        assert self.losses is not None and self.segments is not None
        rows = self.segments - 1
        sums = torch.zeros(count, dtype=torch.float64, device=rows.device).index_add_(0, rows, self.losses.double())
        return sums, torch.bincount(rows, minlength=count)


class M6(Network):
    config_class = ModelConfig
    config: ModelConfig
    base_model_prefix = "openm6"
    main_input_name = "batch"
    _no_split_modules: ClassVar[list[str]] = ["Block"]  # type: ignore[misc]
    _supports_sdpa = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.place = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.positions == "learned" else None
        )
        self.image = ImageEmbedder(config) if config.image_embedder != "none" else None
        distinct = config.distinct_layers or config.num_hidden_layers
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(distinct))
        self.norm = make_norm(config, config.hidden_size)
        self.head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.heads = nn.ModuleDict({n: nn.Linear(config.hidden_size, k) for n, k in (config.heads or {}).items()})
        self.prompt: Prompt | None = None
        self.label_smoothing = 0.0  # in training
        self.packed_head: Packed | None = None
        self.post_init()

    def initial(self, module: nn.Module) -> Iterator[tuple[Tensor, float, float]]:
        """Normal(0, initializer_range); what writes into the stream is scaled by 1/sqrt(2 layers) (GPT-2),
        convolutions by their inputs (He et al. 2015)."""
        std, last = self.config.initializer_range, 1 / math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if getattr(module, "writes_to_stream", False):
                std *= last
            elif isinstance(module, nn.Linear) and getattr(module, "enters_stream", False):
                # Its inputs have unit scale; its outputs get a token's.
                std /= math.sqrt(module.in_features)
            yield module.weight, 0.0, std
        elif isinstance(module, (nn.RMSNorm, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
            yield module.weight, 1.0, 0.0
        elif isinstance(module, nn.Conv2d):
            inputs = module.weight[0].numel()
            if self.config.image_embedder == "resnet":  # transformers' rule: by its outputs
                inputs = module.weight[:, 0].numel()
            patches = self.image is not None and module is self.image.features  # the patch projection
            yield module.weight, 0.0, std if patches else math.sqrt(2 / inputs)
        elif isinstance(module, Router):
            yield module.weight, 0.0, std
        elif isinstance(module, Experts):
            yield module.up, 0.0, std
            yield module.down, 0.0, std * last
        elif isinstance(module, ImageEmbedder):
            yield module.row, 0.0, std
            yield module.column, 0.0, std
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            yield bias, 0.0, 0.0

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; the embedding itself when tied."""
        matrix = self.embed if self.head is None else self.head
        return matrix.changed() if isinstance(matrix, ChangedRows) else matrix.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head = value  # type: ignore[assignment]

    def train(self, mode: bool = True) -> M6:
        """A reader of pictures that is not trained keeps its statistics too."""
        super().train(mode)
        if self.image is not None and not any(p.requires_grad for p in self.image.parameters()):
            self.image.eval()
        return self

    def forward(self, batch: Batch, teacher: Teacher | None = None) -> Output:
        """Hidden states of a packed or padded batch, and the loss where it has labels: against those alone, or against
        a `teacher` too, whose positions are the trained ones, in the flattened batch's order."""
        x_BTD = self._embed(batch)
        dtype = self._product_dtype(x_BTD)
        mask: Any
        if batch.codes is not None and self.config.picture_side:
            mask = build_picture_mask(self.config, batch, dtype)
        else:
            mask = build_mask(batch.segments, batch.blocks, dtype)
        rope, real = rotary_angles(self.config, batch.positions, dtype), batch.segments > 0
        x_BTD, loads = self._backbone(x_BTD, rope, mask, real_BT=real, positions_BT=batch.positions)
        heads = self.at_ends(x_BTD, batch) if len(self.heads) else None
        trained = (batch.labels != IGNORE).flatten().nonzero().squeeze(1)
        if not len(trained) and not self.training:  # in training a loss of nothing gives every process all gradients
            return Output(hidden=x_BTD, heads=heads, loads=loads)
        hidden = x_BTD.flatten(0, 1).index_select(0, trained).to(dtype)
        segments = batch.segments.flatten()[trained]
        shares = None if batch.weights is None else batch.weights[segments - 1]
        labels, smoothing = batch.labels.flatten()[trained], self.label_smoothing if self.training else 0.0
        total, losses = linear_cross_entropy(hidden, self.head_weight, labels, shares, smoothing, teacher)
        return Output(loss=total, losses=losses, segments=segments, hidden=x_BTD, heads=heads, loads=loads)

    def at_ends(self, hidden_BTD: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What every head gives at the last position of each example, fp32."""
        ends = hidden_BTD.flatten(0, 1)[batch.ends()].float()
        with torch.autocast(ends.device.type, enabled=False):
            return {name: F.linear(ends, *(p.float() for p in head.parameters())) for name, head in self.heads.items()}

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to fp32 [..., V]."""
        matrix = self.embed if self.head is None else self.head
        product = hidden @ matrix.weight.to(hidden.dtype).T if self.packed_head is None else self.packed_head(hidden)
        return matrix.logits(product.float(), hidden) if isinstance(matrix, ChangedRows) else product.float()

    def pack_for_cpu(self, dtype: torch.dtype | None = None) -> M6:
        """Lay the weights of all products out for the CPU's kernels, in bf16 or fp32 (the default is what this CPU
        runs best), or in int8 or int4 (the default of a network with `weight_bits`): inference only.

        Decoding is then 1.6 to 2 times as fast as by transformers (benchmarks/decode.py); the network can no longer be
        trained or saved.
        """
        dtype = dtype or kernel_of(self.config) or kernel_dtype()
        self.packed_head = packed(self.head_weight, None, INT8 if dtype == INT4 else dtype)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.pack(dtype)
        return self

    # Decoding: fill the cache with a prompt, then one position at a time.

    def prefill(self, batch: Batch, capacity: int) -> tuple[Tensor, Cache]:
        """Run padded prompts (one a row, from column 0) and keep their keys and values.

        Returns the hidden state at the last position of every row, [B, D], and the cache.
        """
        x_BTD, cache = self.prefill_all(batch, capacity)
        return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), cache.lengths - 1], cache

    def prefill_all(self, batch: Batch, capacity: int) -> tuple[Tensor, Cache]:
        """As `prefill`, with the hidden states at all positions, [B, T, D]."""
        x_BTD = self._embed(batch)
        dtype = self._product_dtype(x_BTD)
        cache = Cache(self.config, (batch.segments > 0).sum(1), capacity, dtype)
        length = min(x_BTD.shape[1], capacity)  # beyond it is padding

        def write(layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
            cache.keys[layer][:, :, :length] = k_BKTE[:, :, :length]
            cache.values[layer][:, :, :length] = v_BKTE[:, :, :length]
            return k_BKTE, v_BKTE

        if batch.ids.is_cuda:
            mask = build_mask(batch.segments, batch.blocks, dtype)
        else:
            mask = build_prompt_mask(batch.segments, batch.blocks, cache.counts, dtype)
        rope, real = rotary_angles(self.config, batch.positions, dtype), batch.segments > 0
        x_BTD, _ = self._backbone(x_BTD, rope, mask, write, real, batch.positions)
        return x_BTD, cache

    def step(
        self, ids_B: Tensor, cache: Cache, code: int | None = None, codes: int = 0, reproducible: bool = False
    ) -> Tensor:
        """One further (causal) position for every row of the cache; hidden states [B, D]. `reproducible`: see row_mask.

        `code`: it is that one of the `codes` of a picture, row by row, and the codes before it stand last in the cache;
        of a model with `picture_side` it then looks at those alone that the pattern keeps.
        """
        cell = None if code is None else cells_of(codes)[code].to(ids_B.device)
        if code is not None and self.config.picture_side:
            return self._sparse_step(ids_B, cache, code, cell)
        positions_B1 = cache.lengths[:, None]
        x_B1D = self._embed_ids(ids_B[:, None], positions_B1, cell)
        filled = max(cache.counts) + 1
        even, on_cpu = min(cache.counts) + 1 == filled, ids_B.device.type == "cpu"
        # On a CPU a row's sums over its keys would else depend on the longest row beside it, in the last bit.
        keys_seen = min(-(-filled // EVEN_KEYS) * EVEN_KEYS, cache.keys[0].shape[2]) if on_cpu else filled
        rope, mask = cache.rope, None
        if even:
            rope = rope and (rope[0][:, filled - 1 : filled], rope[1][:, filled - 1 : filled])
        else:
            rows = torch.arange(len(ids_B), device=ids_B.device)
            rope = cache.rope_at(positions_B1)
        if on_cpu or not even:
            seen = torch.arange(keys_seen, device=ids_B.device) <= positions_B1
            mask = row_mask(seen[:, None, None], cache.keys[0].dtype, reproducible)

        def write(layer: int, k_BK1E: Tensor, v_BK1E: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = cache.keys[layer], cache.values[layer]
            if even:
                keys[:, :, filled - 1 : filled], values[:, :, filled - 1 : filled] = k_BK1E, v_BK1E
            else:
                keys[rows, :, cache.lengths] = k_BK1E[:, :, 0].to(keys.dtype)
                values[rows, :, cache.lengths] = v_BK1E[:, :, 0].to(values.dtype)
            return keys[:, :, :keys_seen], values[:, :, :keys_seen]

        x_B1D, _ = self._backbone(x_B1D, rope, mask, write)
        cache.grow()
        return x_B1D[:, 0]

    def _sparse_step(self, ids_B: Tensor, cache: Cache, code: int, cell: Tensor | None) -> Tensor:
        pattern = SparsePattern.of(self.config, causal=True)
        positions_B1, rows = cache.lengths[:, None], torch.arange(len(ids_B), device=ids_B.device)
        x_B1D, rope = self._embed_ids(ids_B[:, None], positions_B1, cell), cache.rope_at(positions_B1)
        texts_B = cache.lengths - code
        longest = max(cache.counts) - code
        codes_S = cached_places(pattern, code, 0).to(ids_B.device)
        text_L = torch.arange(longest, device=ids_B.device)
        keys_BS = torch.cat((text_L.expand(len(ids_B), -1), texts_B[:, None] + codes_S), 1)
        mask = None
        even = min(cache.counts) == max(cache.counts)
        if not even:
            seen = torch.cat((text_L < texts_B[:, None], keys_BS.new_ones(len(ids_B), len(codes_S)).bool()), 1)
            mask = additive(seen[:, None, None], cache.keys[0].dtype)

        def write(layer: int, k_BK1E: Tensor, v_BK1E: Tensor) -> tuple[Tensor, Tensor]:
            kept = []
            for stored, new in ((cache.keys[layer], k_BK1E), (cache.values[layer], v_BK1E)):
                stored[rows, :, cache.lengths] = new[:, :, 0].to(stored.dtype)
                if even:
                    kept.append(stored.index_select(2, keys_BS[0]))
                else:
                    kept.append(stored.transpose(1, 2)[rows[:, None], keys_BS].transpose(1, 2))
            return kept[0], kept[1]

        x_B1D, _ = self._backbone(x_B1D, rope, mask, write)
        cache.grow()
        return x_B1D[:, 0]

    def fill(self, ids_BN: Tensor, cache: Cache, codes: int, lengths_B: Tensor | None = None) -> Tensor:
        """N further positions of every row, which see the cache and, both ways, each other; hidden states [B, N, D].
        The first `codes` of them are those of a picture, row by row; only the first `lengths_B` of a row are seen.

        The cache stays as it is: positions to be filled in (masked codes) can be asked again and again.
        """
        rows, count = ids_BN.shape
        positions_BN = cache.lengths[:, None] + torch.arange(count, device=ids_BN.device)
        cells_N2 = F.pad(cells_of(codes).to(ids_BN.device), (0, 0, 0, count - codes), value=-1)
        x_BND, rope = self._embed_ids(ids_BN, positions_BN, cells_N2), cache.rope_at(positions_BN)
        longest, on_cpu = max(cache.counts), ids_BN.device.type == "cpu"
        mask: Any = None
        if self.config.picture_side:
            mask = self._filling_mask(count, cache)
        elif min(cache.counts) < longest or lengths_B is not None or on_cpu:
            longest = -(-longest // EVEN_KEYS) * EVEN_KEYS if on_cpu else longest  # as in a step
            seen = torch.arange(longest, device=ids_BN.device) < cache.lengths[:, None]
            last = count if lengths_B is None else lengths_B[:, None]
            own = (torch.arange(count, device=ids_BN.device) < last).expand(rows, count)
            seen = torch.cat((seen, own), 1)
            mask = row_mask(seen[:, None, None], cache.keys[0].dtype, reproducible=True)

        def write(layer: int, k_BKNE: Tensor, v_BKNE: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = cache.keys[layer][:, :, :longest], cache.values[layer][:, :, :longest]
            return torch.cat((keys, k_BKNE.to(keys.dtype)), 2), torch.cat((values, v_BKNE.to(values.dtype)), 2)

        x_BND, _ = self._backbone(x_BND, rope, mask, write)
        return x_BND

    def _filling_mask(self, count: int, cache: Cache) -> PictureMask:
        """For a picture's codes and what follows them, after the texts of a cache."""
        pattern, longest, device = SparsePattern.of(self.config), max(cache.counts), cache.lengths.device
        tail = count - pattern.codes
        if tail < 0:
            raise OpenM6Error(f"{count} codes; model.picture_side makes a picture of {pattern.codes}.")
        text_BL = torch.arange(longest, device=device) < cache.lengths[:, None]
        seen = F.pad(text_BL, (0, tail), value=True)
        after = F.pad(text_BL, (0, count), value=True)[:, None, None].expand(-1, 1, tail, -1)
        mask = block_mask(pattern, longest + tail, seen, device) if device.type == "cuda" else None
        return PictureMask(pattern, longest, 0, additive(after, cache.keys[0].dtype), seen, mask)

    def _embed(self, batch: Batch) -> Tensor:
        x_BTD = self.embed(batch.ids)
        if self.image is not None:
            x_BTD = scatter_images(x_BTD, batch.images, self.image, self.image.training)
        elif batch.images:
            raise OpenM6Error('The batch has pictures, but this model reads none (image_embedder is "none").')
        if self.place is not None:
            x_BTD = x_BTD + self.place(batch.positions)
        return self._at(x_BTD, batch.cells)

    def _embed_ids(self, ids_BN: Tensor, positions_BN: Tensor, cells: Tensor | None = None) -> Tensor:
        x_BND = self.embed(ids_BN)
        if self.place is not None:
            x_BND = x_BND + self.place(positions_BN)
        return self._at(x_BND, cells)

    def _at(self, x: Tensor, cells: Tensor | None) -> Tensor:
        """With the rows and columns of a picture's codes, in the precision that x has."""
        if cells is None:
            return x
        return x + cell_features(cells, self.config.hidden_size, self.config.initializer_range).to(x.dtype)

    def layers(self) -> list[Block]:
        """The blocks in the order in which they are applied; a shared one several times."""
        return [self.blocks[n % len(self.blocks)] for n in range(self.config.num_hidden_layers)]  # type: ignore[misc]

    def _backbone(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Any,
        write: Any = None,
        real_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> tuple[Tensor, list[Load]]:
        """All layers and the last norm. `positions_BT` where examples begin in this call: a prompt is put there."""
        loads = []
        for layer, block in enumerate(self.layers()):
            if self.prompt is not None and positions_BT is not None:
                x_BTD = self.prompt(layer, x_BTD, positions_BT)
            x_BTD, load = block(x_BTD, rope, mask, write and partial(write, layer), real_BT)
            if load is not None:
                loads.append(load)
        return self.norm(x_BTD), loads

    def _product_dtype(self, x: Tensor) -> torch.dtype:
        """The precision in which matrix products run: packed weights' (bf16), autocast's, or the weights'."""
        if self.packed_head is not None:
            return self.packed_head.dtype
        return product_dtype(x)


AutoConfig.register("openm6", ModelConfig)
AutoModel.register(ModelConfig, M6)
