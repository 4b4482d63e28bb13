"""Modules that most commands import: loaded once, by the server that forks (tests/processes.py). None starts threads."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch.distributed.checkpoint  # noqa: F401

import openm6.cli  # noqa: F401
import openm6.inference.session  # noqa: F401
import openm6.train.parallel  # noqa: F401
import openm6.train.trainer  # noqa: F401
