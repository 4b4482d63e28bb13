"""Protection of a server against web pages of other sites."""

from collections.abc import Mapping
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def from_another_site(headers: Mapping[bytes, bytes], method: str = "") -> bool:
    """True for a request from a web page of another site, by the browser's header Sec-Fetch-Site; false for a link that
    was followed (GET). Such a request would carry the console's cookie, and Gradio lets any origin read the
    response."""
    followed = method == "GET" and headers.get(b"sec-fetch-mode") == b"navigate"
    return headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin") and not followed


def from_here(headers: Mapping[bytes, bytes]) -> bool:
    """True if the header Host of a request is a loopback name, and its Origin, if any, is that host. Without this check
    any web page could send requests through a foreign name for the loopback address (DNS rebinding)."""
    host = urlsplit("//" + headers.get(b"host", b"").decode("latin-1"))
    origin = headers.get(b"origin", b"").decode("latin-1")
    return host.hostname in LOOPBACK and (not origin or urlsplit(origin).netloc == host.netloc)
