"""A model in use: sessions, text generation (greedy, sampling, beam search), image generation and ranking, editing,
sketch-and-refine decoding."""

from openm6.inference.decoding import Decoding, Generated
from openm6.inference.generate import generate, stream

__all__ = ["Decoding", "Generated", "generate", "stream"]
