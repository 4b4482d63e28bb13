"""M6: one Transformer over image and text (KDD 2021, section 4).

Read this file first, then block.py, attention.py and experts.py. Shapes: see the legend in attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.core.batch import Batch, Images
from openm6.core.errors import OpenM6Error
from openm6.core.sequence import IGNORE
from openm6.model.block import Block
from openm6.model.changed import ChangedRows, Prompt
from openm6.model.config import ModelConfig
from openm6.model.embed import ImageEmbedder, cell_features, scatter_images
from openm6.model.experts import RouterStatistics
from openm6.model.initial import initial_values
from openm6.model.loss import Output, Teacher, linear_cross_entropy
from openm6.model.masks import batch_mask
from openm6.model.network import Network
from openm6.model.norm import make_norm
from openm6.model.precision import product_dtype
from openm6.model.roles import Role
from openm6.model.rotary import Rope, rotary_angles


class M6(Network):
    config_class = ModelConfig
    config: ModelConfig
    roles: ClassVar[dict[str, Role]] = {
        "embed": Role.EMBEDDING, "place": Role.EMBEDDING, "prompt": Role.EMBEDDING, "image": Role.IMAGE_ENCODER,
        "head": Role.HEAD, "heads": Role.HEAD,
    }  # fmt: skip

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        size, width, positions = config.vocab_size, config.hidden_size, config.max_position_embeddings
        self.embed = nn.Embedding(size, width)
        self.place = nn.Embedding(positions, width) if config.positions == "learned" else None
        self.image = ImageEmbedder(config) if config.image_embedder != "none" else None
        distinct = config.distinct_layers or config.num_hidden_layers
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(distinct))
        self.norm = make_norm(config, width)
        self.head = None if config.tie_word_embeddings else nn.Linear(width, size, bias=False)
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in (config.heads or {}).items()})
        self.prompt: Prompt | None = None
        self.label_smoothing = 0.0  # in training
        self.packed_head: Any = None  # by cpu/pack.py
        self.reset_parameters()

    def initial(self, module: nn.Module) -> Iterator[tuple[Tensor, float, float]]:
        return initial_values(self.config, module)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; the embedding itself when tied."""
        matrix = self.embed if self.head is None else self.head
        return matrix.changed() if isinstance(matrix, ChangedRows) else matrix.weight

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, under the name that PEFT uses."""
        return self.embed

    def get_output_embeddings(self) -> nn.Module | None:
        """The output matrix, under the name that PEFT uses; None where it is the embedding."""
        return self.head

    def train(self, mode: bool = True) -> M6:
        """An image encoder that is not trained stays in evaluation mode."""
        super().train(mode)
        if self.image is not None and not any(p.requires_grad for p in self.image.parameters()):
            self.image.eval()
        return self

    def forward(self, batch: Batch, teacher: Teacher | None = None) -> Output:
        """Hidden states of a packed or padded batch, and the loss where it has labels; with a `teacher`, whose
        positions are the trained ones in the order of the flattened batch, also against its distribution."""
        x_BTD = self.embed_batch(batch)
        dtype = self.product_dtype(x_BTD)
        rope, mask = rotary_angles(self.config, batch.positions, dtype), batch_mask(self.config, batch, dtype)
        x_BTD, router_statistics = self.backbone(x_BTD, rope, mask, batch=batch)
        heads = self.at_ends(x_BTD, batch) if len(self.heads) else None
        trained = (batch.labels != IGNORE).flatten().nonzero().squeeze(1)
        if not len(trained) and not self.training:  # in training a loss of nothing gives every process all gradients
            return Output(hidden=x_BTD, heads=heads, router_statistics=router_statistics)
        hidden = x_BTD.flatten(0, 1).index_select(0, trained).to(dtype)
        segments = batch.segments.flatten()[trained]
        weights = None if batch.weights is None else batch.weights[segments - 1]
        labels, smoothing = batch.labels.flatten()[trained], self.label_smoothing if self.training else 0.0
        total, losses = linear_cross_entropy(hidden, self.head_weight, labels, weights, smoothing, teacher)
        return Output(total, losses, segments, x_BTD, heads, router_statistics)

    def at_ends(self, hidden_BTD: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Output of every task head at the last position of each example, fp32."""
        ends = hidden_BTD.flatten(0, 1)[batch.ends()].float()
        with torch.autocast(ends.device.type, enabled=False):
            return {name: F.linear(ends, *(p.float() for p in head.parameters())) for name, head in self.heads.items()}

    def decode(self, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run a decoding pass (cache.py) on this network."""
        return run(self, *args, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to fp32 [..., V]."""
        matrix = self.embed if self.head is None else self.head
        product = hidden @ matrix.weight.to(hidden.dtype).T if self.packed_head is None else self.packed_head(hidden)
        return matrix.logits(product.float(), hidden) if isinstance(matrix, ChangedRows) else product.float()

    def embed_batch(self, batch: Batch) -> Tensor:
        """Input of the first layer, [B, T, D]: token embeddings, and image features at their positions."""
        return self.embed_ids(batch.ids, batch.positions, batch.cells, batch.images)

    def embed_ids(
        self, ids_BT: Tensor, positions_BT: Tensor, cells: Tensor | None = None, images: list[Images] | None = None
    ) -> Tensor:
        """Input of the first layer, [B, T, D]. `cells`: rows and columns of an image's codes; `images` None: tokens
        alone."""
        x_BTD = self.embed(ids_BT)
        if self.image is not None and images is not None:
            x_BTD = scatter_images(x_BTD, images, self.image, self.image.training)
        elif images:
            raise OpenM6Error('The batch has images, but this model has no image encoder (image_embedder is "none").')
        if self.place is not None:
            x_BTD = x_BTD + self.place(positions_BT)
        if cells is None:
            return x_BTD
        return x_BTD + cell_features(cells, self.config.hidden_size, self.config.initializer_range).to(x_BTD.dtype)

    def layers(self) -> list[Block]:
        """The blocks in the order in which they are applied; a shared one several times."""
        return [self.blocks[n % len(self.blocks)] for n in range(self.config.num_hidden_layers)]  # type: ignore[misc]

    def backbone(
        self, x_BTD: Tensor, rope: Rope | None, mask: Any, cache: Any = None, batch: Batch | None = None
    ) -> tuple[Tensor, list[RouterStatistics]]:
        """All layers and the last norm. `cache`: in decoding, a View of it. `batch` where examples begin in this call:
        it says where padding is, and where a prompt is put."""
        router_statistics = []
        real_BT = None if batch is None else batch.segments > 0
        for layer, block in enumerate(self.layers()):
            if self.prompt is not None and batch is not None:
                x_BTD = self.prompt(layer, x_BTD, batch.positions)
            x_BTD, statistics = block(x_BTD, rope, mask, cache, layer, real_BT)
            if statistics is not None:
                router_statistics.append(statistics)
        return self.norm(x_BTD), router_statistics

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """The precision in which matrix products run: packed weights', autocast's, or the weights'."""
        return product_dtype(x) if self.packed_head is None else self.packed_head.dtype  # type: ignore[no-any-return]
