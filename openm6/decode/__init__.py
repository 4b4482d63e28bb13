"""From a prompt to token ids: greedy, sampling, beam; cached, batched, constrained."""

from openm6.decode.generate import Decoding, Generated, generate, stream

__all__ = ["Decoding", "Generated", "generate", "stream"]
