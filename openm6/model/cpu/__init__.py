"""Kernels written for CPUs, behind one switch. The network is complete without them.

norm.py        RMSNorm in fewer passes over memory
attention.py   attention by plain products, and masks that keep a row's sums independent of its neighbours
experts.py     one expert after the other, for training
packed.py      products with weights laid out once, in bf16, fp32, int8 or int4, for inference
pack.py        a network with such products
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

enabled = True
"""False: PyTorch's own operations run on CPUs too. A network that `pack_for_cpu` has packed is not affected."""


def takes(x: Tensor) -> bool:
    """True for a tensor that these kernels process: one on a CPU, while they are enabled."""
    return enabled and x.device.type == "cpu"
