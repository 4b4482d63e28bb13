"""The common base of this package's networks: a configuration in JSON, and the initial values of parameters."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openm6._version import __version__
from openm6.core.bases import require_model
from openm6.core.errors import OpenM6Error, UsageError, suggest
from openm6.core.files import require_format, write_json

FORMAT = 1
"""Version of config.json and of the tensors' names."""


@dataclass
class NetworkConfig:
    """The sizes of a network, as stored in config.json."""

    model_type: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write config.json into a directory."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        about = {"model_type": self.model_type, "format": FORMAT, "openm6": __version__}
        write_json(path / "config.json", about | self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The sizes of a model directory. Raises UsageError where there is none, OpenM6Error where it is damaged, of
        another kind, or of another format."""
        require_model(Path(path))
        file = Path(path) / "config.json"
        try:
            content = dict(json.loads(file.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            raise OpenM6Error(f"{file} is damaged.") from None
        if (kind := content.get("model_type")) != cls.model_type:
            raise OpenM6Error(f"{file} is of a model of the type {kind!r}; {cls.model_type!r} is needed here.")
        require_format(file, content.get("format"), FORMAT)
        sizes = {key: value for key, value in content.items() if key not in ("model_type", "format", "openm6")}
        known = [field.name for field in fields(cls)]
        for key in sizes:
            if key not in known:
                raise OpenM6Error(f"{file}: unknown key {key}.{suggest(key, known)}")
        try:
            return cls(**sizes)
        except UsageError as error:
            raise OpenM6Error(f"{file}: {error}") from None


class Network(nn.Module):
    config_class: ClassVar[type[NetworkConfig]]
    config: Any
    adapted: bool = False
    """True where an adapter is trained: checkpoints then hold only the trained parameters."""

    @abstractmethod
    def initial(self, module: nn.Module) -> Iterator[tuple[Tensor, float, float]]:
        """A module's own parameters, each with the mean and the standard deviation of its initial values."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to the values of `initial`, by PyTorch's random numbers."""
        self.apply(self._reset)

    def _reset(self, module: nn.Module) -> None:
        for parameter, mean, std in self.initial(module):
            if not parameter.is_meta:
                parameter.normal_(mean, std) if std else parameter.fill_(mean)


class _Unfilled(TorchFunctionMode):
    """Modules do not fill their parameters. Filling a parameter without memory takes PyTorch a second the first time:
    it imports its compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules constructed inside have shapes but no memory."""
    with torch.device("meta"), _Unfilled():
        yield
