"""Protection of a server against web pages of other sites."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "::1", "localhost")

Headers = Mapping[bytes, bytes]


def from_another_site(headers: Headers, method: str = "") -> bool:
    """Whether a browser sends the request from a page of another site, other than by a link that was followed (GET).
    The request would carry the console's cookie, and Gradio lets any origin read the response."""
    followed = method == "GET" and headers.get(b"sec-fetch-mode") == b"navigate"
    return headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin") and not followed


def from_here(headers: Headers) -> bool:
    """Whether a request names this machine, and no page of another site sends it. A foreign name for the loopback
    address (DNS rebinding) would otherwise let any page send requests."""
    host = urlsplit("//" + headers.get(b"host", b"").decode("latin-1"))
    origin = headers.get(b"origin", b"").decode("latin-1")
    return host.hostname in LOOPBACK and (not origin or urlsplit(origin).netloc == host.netloc)
