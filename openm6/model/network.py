"""What the networks of this package share: they say how each parameter starts, whoever fills it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Network(PreTrainedModel):
    adapted: bool = False
    """Whether an adapter is trained in it: checkpoints then hold what is trained alone."""

    @abstractmethod
    def initial(self, module: nn.Module) -> Iterator[tuple[Tensor, float, float]]:
        """A module's own parameters, each with the mean and the standard deviation that it starts with."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        from transformers import initialization as init

        for parameter, mean, std in self.initial(module):
            if std:
                init.normal_(parameter, mean, std)
            else:
                init.constant_(parameter, mean)
