"""The web page: try every task, compare models, look at data, teach, review, see what is live. Gradio, in our server.

It is mounted into the API's application once for each language, at /en and /zh; / sends a browser to the one it
prefers. It asks the fleet as the API does, in the same process; where there are keys, one is asked for here too, and
what changes anything takes a key that manages.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse

from openm6.core.extras import require
from openm6.serve.server import Server


async def _not_fetched(url: str) -> NoReturn:
    """In the place of Gradio's own, which fetches a picture whose address a browser sends, from any public host."""
    raise ValueError("Pictures are not fetched: send the picture itself.")


LANGUAGES = ("en", "zh")
IN_LANGUAGE = """;
(language => {
  document.documentElement.lang = language;
  for (const [name, value] of [["language", language], ["languages", [language]]])
    Object.defineProperty(navigator, name, {get: () => value});
})(/\\/zh(\\/|$)/.test(location.pathname) ? "zh-CN" : "en")"""
"""Gradio's own words are in the language of the page, whatever the browser prefers."""
FOLDER = "openm6-console-"


@cache
def visitors_files() -> Path:
    """The folder of this process for what visitors upload and models draw. It is removed at exit, and one that a killed
    process has left when the next one begins: a folder is in use as long as it is locked."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with suppress(OSError):  # in use, or another user's
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=FOLDER))
        with suppress(FileNotFoundError):  # another process has taken it for one that was left
            fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)
            if folder.is_dir():
                break
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def add_console(app: FastAPI, server: Server, batches: Path | None = None) -> None:
    """Mount the pages. `batches`: folder below which batches of texts and pictures wait for review.

    Raises UsageError where Gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(visitors_files())
    require("console", "gradio")
    import gradio as gr
    from gradio import processing_utils, routes
    from markupsafe import Markup
    from PIL import Image

    from openm6.console.desk import Desk
    from openm6.console.site import HEAD, ICON, STYLE, build, theme
    from openm6.core.images import MAX_PIXELS

    # Gradio opens what is uploaded by itself: no larger than what the API takes.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    processing_utils.async_ssrf_protected_get = _not_fetched
    # Gradio writes a page's configuration as the first script of it, and what is to come before its own scripts has no
    # other place.
    routes.templates.env.filters["toorjson"] = lambda value: (
        routes.toorjson(value) + Markup(IN_LANGUAGE if isinstance(value, dict) and "components" in value else "")
    )

    @app.get("/", include_in_schema=False)
    async def home(request: Request) -> RedirectResponse:
        wanted = request.headers.get("accept-language", "").lower()
        return RedirectResponse("zh" if wanted.startswith("zh") else "en")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(ICON, media_type="image/svg+xml")

    for language in LANGUAGES:
        desk = Desk(server, language, batches)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="SSR mode is not supported", category=UserWarning)
            gr.mount_gradio_app(
                app, build(desk), f"/{language}", auth=desk.lets_in if server.keys else None,
                auth_message=desk.say("The key's name, and the key."), footer_links=[], run_history=False,
                allowed_paths=[], show_error=False, max_file_size=server.options.body_mib * 2**20, ssr_mode=False,
                enable_monitoring=False, mcp_server=False, css=STYLE, head=HEAD, theme=theme(),
            )  # fmt: skip
