"""Modules that most commands import: loaded once, by the server that forks (tests/processes.py), without threads."""

import logging

import codecarbon.external.geography  # noqa: F401
import cpuinfo  # noqa: F401
import grain  # noqa: F401
import huggingface_hub.serialization  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch._dynamo
import torch.distributed.checkpoint
import torch.utils.tensorboard  # noqa: F401

import openm6.cli
import openm6.inference.session
import openm6.train.parallel
import openm6.train.trainer
import openm6.worlds.catalogue  # noqa: F401
from openm6.model.precision import fast_dtype, peak_flops

peak_flops("cpu", fast_dtype("cpu"))  # which every training measures once in its process
logging.getLogger().handlers.clear()  # grain has absl add one, and commands set up their own
