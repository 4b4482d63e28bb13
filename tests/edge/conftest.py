from tests.tasks.conftest import tokenizer

__all__ = ["tokenizer"]
