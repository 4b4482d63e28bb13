"""Inputs of requests, from JSON to the values that tasks take. Pictures come from the request itself, or from hosts
that the operator has listed.

For an edit, a worker is sent the square of the picture that is redrawn, and its result is pasted into the whole picture
here, so that large pictures delay no other request.

A text in the place of a picture is never taken for a path. A URL is fetched from a listed host alone, and only if all
of its addresses are public: the connection goes to the very address that was checked, at every redirect again.
"""

from __future__ import annotations

import asyncio
import io
import ipaddress
import math
import re
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from openm6.core.errors import DataError, UsageError, cut, suggest
from openm6.core.images import MAX_BYTES, Features, Source, from_base64, open_image, png
from openm6.inference.edit import Cut, cut_of
from openm6.serve.fleet import Deployment
from openm6.tasks.lengths import check_value

if TYPE_CHECKING:
    import httpx2

QUICK = 2**18
"""Characters of base64 that are decoded in less time than another thread takes to begin."""
_URL = re.compile(r"https?://", re.I)
REDIRECTS = 3
SECONDS = 10.0
"""Time limit of a fetch, redirects and the whole body included."""
NOT_FROM_THERE = "Pictures are not fetched from there: send the picture itself, as base64."


def public_address(host: str, port: int) -> str:
    """An address of a host on the public network. Raises DataError where one of its addresses is not public."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError:
        raise DataError("The picture's host is not known.") from None
    if not found or not all(map(_is_public, found)):
        raise DataError(NOT_FROM_THERE)
    return sorted(found)[0]


class Pictures:
    """Reads the pictures of requests.

    hosts        names of the hosts from which pictures may be fetched
    seconds      time limit of a fetch
    address_of   the address to connect to, for a host and a port
    """

    def __init__(
        self,
        hosts: Iterable[str] = (),
        seconds: float = SECONDS,
        address_of: Callable[[str, int], str] = public_address,
    ):
        self._hosts = frozenset(host.lower() for host in hosts)
        self._seconds, self._address_of = seconds, address_of

    def read(self, value: Any) -> bytes:
        """The bytes of a picture's file, from base64, a data URL or a URL of a listed host. To be called outside of an
        event loop where `is_quick` is false. Raises DataError for anything else."""
        value = _given(value)
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise DataError("A picture is given as base64, or as a data URL.")
        if _URL.match(value):
            return asyncio.run(self._fetch(value))
        return from_base64(value)

    def is_quick(self, value: Any) -> bool:
        """Whether `read` takes next to no time: for a small picture in the request itself."""
        if isinstance(value, Mapping) and "features" in value:
            value = value["features"]
        value = _given(value)
        return isinstance(value, bytes) or (isinstance(value, str) and len(value) <= QUICK and not _URL.match(value))

    async def _fetch(self, text: str) -> bytes:
        import httpx2

        url = self._listed(httpx2.URL(), text)  # before certificates are loaded: a refusal has to be cheap
        tls = ssl.create_default_context()
        try:
            # No proxy or .netrc of the environment; redirects are followed here, after the same checks.
            async with (
                asyncio.timeout(self._seconds),
                httpx2.AsyncClient(verify=tls, trust_env=False, timeout=self._seconds) as client,
            ):
                for _ in range(REDIRECTS + 1):
                    async with self._send(client, url) as answer:
                        if answer.has_redirect_location:
                            url = self._listed(url, answer.headers["location"])
                            continue
                        if answer.status_code != 200:
                            raise DataError(f"The picture's host answered with {answer.status_code}.")
                        return await _body(answer)
        except (OSError, httpx2.HTTPError) as error:
            raise DataError(f"The picture cannot be fetched ({type(error).__name__}).") from None
        raise DataError(f"The picture's host redirects more than {REDIRECTS} times.")

    def _listed(self, base: httpx2.URL, text: str) -> httpx2.URL:
        """The URL, relative to a base. Raises DataError where its host is not listed."""
        import httpx2

        try:
            url = base.join(text)
        except httpx2.InvalidURL:
            raise DataError(NOT_FROM_THERE) from None
        is_ambiguous = "\\" in text or url.userinfo  # others may read another host out of it
        if url.scheme not in ("http", "https") or url.host.lower() not in self._hosts or is_ambiguous:
            raise DataError(NOT_FROM_THERE)
        return url

    def _send(self, client: httpx2.AsyncClient, url: httpx2.URL) -> Any:
        """A request to the checked address of the URL's host: resolved again, a name may have another address. TLS and
        the header Host have the name."""
        address = self._address_of(url.host, url.port or (443 if url.scheme == "https" else 80))
        headers = {"Host": url.netloc.decode(), "Accept": "image/*", "Accept-Encoding": "identity"}
        return client.stream(
            "GET", url.copy_with(host=address), headers=headers, extensions={"sni_hostname": url.raw_host.decode()}
        )


async def _body(answer: httpx2.Response) -> bytes:
    """The bytes as they come, never decompressed. Raises DataError for more than MAX_BYTES."""
    body = bytearray()
    async for part in answer.aiter_raw():
        body += part
        if len(body) > MAX_BYTES:
            raise DataError(f"A picture has more than {MAX_BYTES / 2**20:.0f} MiB.")
    return bytes(body)


def _given(value: Any) -> Any:
    """The picture itself, without the mappings in which OpenAI's clients wrap it."""
    if isinstance(value, Mapping):
        value = value.get("url") or value.get("image_url") or value.get("b64_json")
        if isinstance(value, Mapping):
            value = value.get("url")
    return value


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
    """A request's inputs by the types of the task's slots. Raises DataError for an invalid picture or text, UsageError
    for an unknown slot, ContextLengthError for a value that is too long for a model of so many `positions` whatever its
    tokens are (except for a text that is to be truncated)."""
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
            elif kind == "messages":
                value = _messages(value, pictures, None if truncate else positions)
            else:
                check_value(value, None if truncate and kind == "text" else positions)
        except DataError as error:
            raise type(error)(f"{name}: {error}", param=name) from None
        if kind in ("text", "label") and not isinstance(value, (str, int, float)):
            raise DataError(f"{name} has to be a text, not {type(value).__name__}.", param=name)
        record[name] = value
    return record


def pictures_in(value: Any) -> list[Any]:
    """The pictures in the messages of a request, as they were sent."""
    messages = value if isinstance(value, list) else []
    contents = [one.get("content") for one in messages if isinstance(one, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [picture for part in parts if (picture := _picture_of(part)) is not None]


def _picture_of(part: Any) -> Any:
    """The picture of a part of a message; None for one without."""
    if not isinstance(part, Mapping):
        return None
    return part.get("image_url", part.get("image"))


def _messages(value: Any, pictures: Pictures, positions: int | None) -> Any:
    """The messages with pictures read as those of slots are, so that none is a path. Raises as `record_of`."""
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise DataError('has to be messages: [{"role": "user", "content": "..."}, ...].')
    found = []
    for message in value:
        content = message.get("content")
        if isinstance(content, list):
            content = [
                part if _picture_of(part) is None else {"type": "image", "image": pictures.read(_picture_of(part))}
                for part in content
            ]
            texts = [part for part in content if not isinstance(part, Mapping) or part.get("type") != "image"]
        else:
            texts = [content or ""]
        found.append({**message, "content": content})
        check_value([{**message, "content": None}, *texts], positions)
    return found


def cut_for(deployment: Deployment, picture: Source, mask: Source | np.ndarray | None) -> Cut:
    """The region of a picture that a model redraws (see inference/edit.cut_of). Raises DataError and UsageError with
    the field, `image` or `mask`, as their param."""
    if mask is not None and not isinstance(mask, np.ndarray):
        mask = _opened("mask", mask)
    about = deployment.about
    return cut_of(about["picture"], math.isqrt(about["codes"]), _opened("image", picture), mask)


def sent(cut: Cut) -> dict[str, Any]:
    """The `edit` of a message to a worker."""
    return {"pixels": png(Image.fromarray(cut.pixels)), "open_blocks": cut.open_blocks.ravel().tolist()}


def put_back(cut: Cut, candidates: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A worker's candidates with the whole picture (PNG) as their `image`."""
    return [{**one, "image": png(cut.put_back(Image.open(io.BytesIO(one["image"]))))} for one in candidates]


def _opened(field: str, picture: Source) -> Image.Image:
    try:
        return open_image(picture, alpha=True)
    except DataError as error:
        raise DataError(str(error), param=field) from None
