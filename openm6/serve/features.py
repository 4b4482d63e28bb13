"""A cache of image features: a second request with the same picture does not encode it again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from openm6.serve.recent import Recent


class Features:
    """Replaces `forward` of a network's image embedder, for inference: uint8 [N, H, W, 3] to [N * h * w, D], cached by
    the pixels of each picture. The parameters keep their names."""

    def __init__(self, embedder: nn.Module, budget: int):
        self.read: Callable[[Tensor], Tensor] = embedder.forward
        self.recent: Recent[Tensor] = Recent(budget)
        embedder.forward = self  # type: ignore[assignment]

    @classmethod
    def of(cls, embedder: nn.Module, budget: int) -> Features:
        """The cache of an embedder, created once."""
        return embedder.forward if isinstance(embedder.forward, Features) else cls(embedder, budget)

    def __call__(self, pixels: Tensor) -> Tensor:
        keys = [_key(one) for one in pixels]
        found = {key: self.recent.get(key) for key in keys}
        new = [number for number, key in enumerate(keys) if found[key] is None]
        new = list({keys[number]: number for number in new}.values())  # each picture once
        if new:
            read = self.read(pixels[new]).unflatten(0, (len(new), -1))
            for number, features in zip(new, read, strict=True):
                found[keys[number]] = features
                self.recent.put(keys[number], features.clone(), features.nbytes)
        return torch.cat([features for key in keys if (features := found[key]) is not None])


def _key(pixels: Tensor) -> bytes:
    digest = hashlib.blake2b(repr(tuple(pixels.shape)).encode(), digest_size=16)
    digest.update(pixels.cpu().contiguous().numpy().tobytes())
    return digest.digest()
