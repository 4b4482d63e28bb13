"""What comes in by JSON, as the values that tasks take: pictures above all, and from nowhere but the request itself
unless hosts are listed.

A text in the place of a picture is never taken for a path. A URL is fetched only from a listed host, only over HTTPS or
as the list says, only from a public address, which is checked on the address that is connected to, at every redirect.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

from openm6.core.errors import DataError, UsageError, cut, suggest
from openm6.core.images import MAX_BYTES, Features, from_base64
from openm6.tasks.lengths import check_value

QUICK = 2**18
"""Characters of base64 that are decoded in less time than another thread takes to begin."""
_URL = re.compile(r"https?://", re.I)
REDIRECTS = 3
SECONDS = 10.0


class Pictures:
    """Reads pictures of requests; `hosts`: from which they may be fetched."""

    def __init__(self, hosts: Iterable[str] = ()):
        self._hosts = frozenset(host.lower() for host in hosts)

    def read(self, value: Any) -> bytes:
        """Base64, a data URL, or a URL of a listed host, to the bytes of a file. Raises DataError for anything else."""
        value = _given(value)
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise DataError("A picture is given as base64, or as a data URL.")
        if _URL.match(value):
            return self._fetch(value)
        return from_base64(value)

    def quick(self, value: Any) -> bool:
        """Whether `read` takes no time to speak of: a small picture, sent along."""
        if isinstance(value, Mapping) and "features" in value:
            value = value["features"]
        value = _given(value)
        return isinstance(value, bytes) or (isinstance(value, str) and len(value) <= QUICK and not _URL.match(value))

    def _fetch(self, url: str) -> bytes:
        for _ in range(REDIRECTS + 1):
            status, headers, body = self._get(url)
            if status in (301, 302, 303, 307, 308) and "location" in headers:
                url = urljoin(url, headers["location"])
                continue
            if status != 200:
                raise DataError(f"The picture's host answered with {status}.")
            return body
        raise DataError("The picture's host sends on and on.")

    def _get(self, url: str) -> tuple[int, dict[str, str], bytes]:
        import http.client
        import ssl

        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
        ambiguous = "\\" in url or "@" in parts.netloc  # others may read another host out of it
        if parts.scheme not in ("http", "https") or host not in self._hosts or ambiguous:
            raise DataError("Pictures are not fetched from there: send the picture itself, as base64.")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        address = _public(host, port)
        target = parts.path or "/"
        if parts.query:
            target += "?" + parts.query
        # Connected to the very address that was checked: asked again, a name may give another one.
        connection = http.client.HTTPConnection(address, port, timeout=SECONDS)
        try:
            connection.connect()
            if parts.scheme == "https":
                context = ssl.create_default_context()
                connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
            connection.request("GET", target, headers={"Host": parts.netloc, "Accept": "image/*"})
            answer = connection.getresponse()
            body = answer.read(MAX_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"The picture cannot be fetched ({type(error).__name__}).") from None
        finally:
            connection.close()
        if len(body) > MAX_BYTES:
            raise DataError(f"A picture has more than {MAX_BYTES / 2**20:.0f} MiB.")
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


def _given(value: Any) -> Any:
    """The picture itself, out of what OpenAI's clients put around it."""
    if isinstance(value, Mapping):
        value = value.get("url") or value.get("image_url") or value.get("b64_json")
        if isinstance(value, Mapping):
            value = value.get("url")
    return value


def _public(host: str, port: int) -> str:
    """An address of a host that is on the public network. Raises DataError where any of its addresses is not."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError:
        raise DataError("The picture's host is not known.") from None
    if not found or not all(map(_is_public, found)):
        raise DataError("Pictures are not fetched from there: send the picture itself, as base64.")
    return sorted(found)[0]


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(found, "ipv4_mapped", None)
    return (inner or found).is_global and not found.is_multicast


def record_of(
    inputs: Mapping[str, Any],
    slots: Mapping[str, str],
    pictures: Pictures,
    positions: int | None = None,
    truncate: str | None = None,
) -> dict[str, Any]:
    """A request's inputs by the types of the task's slots. Raises DataError for a picture that is none and for a text
    that is no text, UsageError for a slot that the task has not, ContextLengthError for what is too long for a model of
    so many `positions` whatever its tokens are (texts that are to be truncated aside)."""
    record = {}
    for name, value in inputs.items():
        kind = slots.get(name)
        if kind is None:
            raise UsageError(
                f"The task has no slot {cut(name)}.{suggest(name, list(slots))} Its slots: {', '.join(slots)}.",
                param=cut(name),
            )
        if value is None:
            continue
        try:
            if kind == "image":
                features = Features.of(value)
                value = pictures.read(value) if features is None else features.mapping()
            else:
                check_value(value, None if truncate and kind == "text" else positions)
        except DataError as error:
            raise type(error)(f"{name}: {error}", param=name) from None
        if kind in ("text", "label") and not isinstance(value, (str, int, float)):
            raise DataError(f"{name} has to be a text, not {type(value).__name__}.", param=name)
        record[name] = value
    return record
