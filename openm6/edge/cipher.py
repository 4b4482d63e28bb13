"""Encryption of the answer store: Fernet (AES and an HMAC) without its base64, which would take a third more space."""

from __future__ import annotations

import base64
from typing import Any

from openm6.core.errors import UsageError


class Cipher:
    def __init__(self, key: str):
        """`key`: as `new_key` makes it. Raises UsageError for an invalid one, or without cryptography installed."""
        try:
            self._fernet = _fernet()(key)
        except ValueError:
            raise UsageError("The key of the encryption is invalid: `openm6-edge new-key` makes one.") from None

    def encrypt(self, body: bytes) -> bytes:
        return base64.urlsafe_b64decode(self._fernet.encrypt(body))

    def decrypt(self, body: bytes) -> bytes:
        """Raises UsageError for a body that was encrypted with another key."""
        from cryptography.fernet import InvalidToken

        try:
            return bytes(self._fernet.decrypt(base64.urlsafe_b64encode(body)))
        except InvalidToken:
            raise UsageError("The answer was encrypted with another key.") from None


def new_key() -> str:
    return str(_fernet().generate_key().decode())


def _fernet() -> Any:
    try:
        from cryptography.fernet import Fernet
    except ImportError:
        raise UsageError("Encryption needs a package: pip install cryptography.") from None
    return Fernet
