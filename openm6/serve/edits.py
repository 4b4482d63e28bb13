"""Image editing on the server's side: a worker is sent the square that is redrawn, and its result is pasted into the
whole picture here, so that large pictures delay no other request."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from openm6.core.errors import DataError
from openm6.core.images import Source, open_image, png
from openm6.inference.edit import Cut, cut_of
from openm6.serve.fleet import Deployment


def cut_for(deployment: Deployment, picture: Source, mask: Source | np.ndarray | None) -> Cut:
    """The region of a picture that a model redraws (see inference/edit.cut_of). Raises DataError and UsageError with
    the field, `image` or `mask`, as their param."""
    if mask is not None and not isinstance(mask, np.ndarray):
        mask = _opened("mask", mask)
    about = deployment.about
    return cut_of(about["picture"], math.isqrt(about["codes"]), _opened("image", picture), mask)


def sent(cut: Cut) -> dict[str, Any]:
    """The `edit` of a message to a worker."""
    return {"pixels": png(Image.fromarray(cut.pixels)), "open_blocks": cut.open_blocks.ravel().tolist()}


def put_back(cut: Cut, candidates: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A worker's candidates with the whole picture (PNG) as their `image`."""
    return [{**one, "image": png(cut.put_back(Image.open(io.BytesIO(one["image"]))))} for one in candidates]


def _opened(field: str, picture: Source) -> Image.Image:
    try:
        return open_image(picture, alpha=True)
    except DataError as error:
        raise DataError(str(error), param=field) from None
