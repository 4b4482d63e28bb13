"""Which web pages may ask a server that a browser can reach."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "::1", "localhost")

Headers = Mapping[bytes, bytes]


def from_another_site(headers: Headers, method: str = "") -> bool:
    """Whether a browser says that a page of another site asks, other than by a link that was followed (GET). The
    console's cookie would come with it, and Gradio lets any origin read what it answers."""
    followed = method == "GET" and headers.get(b"sec-fetch-mode") == b"navigate"
    return headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin") and not followed


def from_here(headers: Headers) -> bool:
    """Whether a request names this machine, and no page of another site sends it. A name of someone else's that stands
    for the loopback address (DNS rebinding) would let any page ask."""
    host = urlsplit("//" + headers.get(b"host", b"").decode("latin-1"))
    origin = headers.get(b"origin", b"").decode("latin-1")
    return host.hostname in LOOPBACK and (not origin or urlsplit(origin).netloc == host.netloc)
