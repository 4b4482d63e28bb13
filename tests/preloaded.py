"""Modules that most commands import: loaded once, by the server that forks (tests/processes.py), without threads."""

import torch.distributed.checkpoint  # noqa: F401

import openm6.cli
import openm6.inference.session
import openm6.train.parallel
import openm6.train.trainer  # noqa: F401
