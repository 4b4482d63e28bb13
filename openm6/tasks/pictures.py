"""The image codec of a model, for any thread: pictures to cached code numbers, and back."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image

from openm6.core.images import Source, read_square
from openm6.model.codec import Codec
from openm6.model.files import load_network, save_network

REMEMBERED = 2**18
"""Number of pictures whose codes are cached: every epoch uses the same pictures."""


class PictureCodec:
    """A codec in use, always in its own precision (in bf16 pictures are a level or two off)."""

    def __init__(self, codec: Codec):
        self.codec, self.size, self.side = codec.eval(), codec.config.image_size, codec.config.side
        self.num_codes, self.stride = codec.config.num_codes, self.size // self.side
        self._known: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = Lock()

    @classmethod
    def load(cls, path: Path) -> PictureCodec:
        """Open a codec. Raises UsageError where there is none."""
        return cls(load_network(Codec, path))

    def save(self, path: Path) -> None:
        save_network(self.codec, path)

    def vectors(self) -> torch.Tensor:
        """Vectors of all codes, fp32 [num_codes, dims]."""
        device = self.codec.out_of.weight.device
        return self.codec.quantizer.vectors(torch.arange(self.num_codes, device=device)).float().cpu()

    def encode(self, picture: Source) -> np.ndarray:
        """The codes of the middle square of a picture, int64 [side * side], row by row."""
        pixels = read_square(picture, self.size)
        key = blake2b(pixels.tobytes(), digest_size=16).digest()
        with self._lock:
            known = self._known.get(key)
        if known is None:
            device = self.codec.out_of.weight.device
            with torch.autocast(device.type, enabled=False):
                codes = self.codec.encode(torch.tensor(pixels)[None].to(device))
            known = codes.flatten().cpu().numpy().astype(np.uint16 if self.num_codes < 2**16 else np.int32)
            with self._lock:
                self._known[key] = known
                while len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
        return known.astype(np.int64)

    def decode(self, codes: np.ndarray) -> Image.Image:
        """The picture of codes [side * side]."""
        device = self.codec.out_of.weight.device
        grid = torch.from_numpy(codes.reshape(1, self.side, self.side)).to(device)
        with torch.autocast(device.type, enabled=False):
            return Image.fromarray(self.codec.decode(grid)[0].cpu().numpy())
