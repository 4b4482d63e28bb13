"""The network: configuration and presets, embedders, attention, blocks, backbone."""

from openm6.model.config import ModelConfig
from openm6.model.m6 import M6, Output

__all__ = ["M6", "ModelConfig", "Output"]
