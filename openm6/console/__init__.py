"""The web console (Gradio, inside the server): try tasks, compare models, inspect data, fine-tune, review, monitor.

It is mounted into the API's application once per language, at /en and /zh; / redirects to the language that the browser
prefers. It sends requests to the fleet as the API does, in the same process. A server with keys requires a login, and
changes require a key with the role manage.
"""

from __future__ import annotations

import asyncio
import atexit
import fcntl
import gc
import os
import shutil
import tempfile
import warnings
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from openm6.core.extras import require
from openm6.serve.server import Server


async def _not_fetched(url: str) -> NoReturn:
    """Replacement of Gradio's fetcher, which downloads any public URL that a browser sends."""
    raise ValueError("Pictures are not fetched: send the picture itself.")


LANGUAGES = ("en", "zh")
IN_LANGUAGE = """;
(language => {
  document.documentElement.lang = language;
  for (const [name, value] of [["language", language], ["languages", [language]]])
    Object.defineProperty(navigator, name, {get: () => value});
})(/\\/zh(\\/|$)/.test(location.pathname) ? "zh-CN" : "en")"""
"""Script that sets the language of Gradio's own texts to that of the page, whatever the browser prefers."""
FOLDER = "openm6-console-"


@cache
def visitors_files() -> Path:
    """The folder of this process for uploads and generated pictures. It is removed at exit; the folder of a killed
    process is removed when the next process starts. A folder in use is locked."""
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


def add_console(app: FastAPI, server: Server, batches: Path | None = None) -> Callable[[], Awaitable[object]]:
    """Mount the pages. They are built beside the event loop at their first request, or by the coroutine function that
    is returned, because the import of Gradio takes longer than the rest of a server's start. `batches`: root folder of
    the batches of texts and pictures to review. Raises UsageError when Gradio is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(visitors_files())
    require("console", "gradio")
    pages: asyncio.Future[dict[str, ASGIApp]] | None = None

    async def built() -> dict[str, ASGIApp]:
        nonlocal pages
        if pages is None:
            pages = asyncio.get_running_loop().create_future()
            # The loop itself holds its tasks weakly.
            app.state.console = asyncio.create_task(_run_pages(app, server, batches, pages))
        return await asyncio.shield(pages)  # a visitor who leaves does not stop it

    @app.get("/", include_in_schema=False)
    async def home(request: Request) -> RedirectResponse:
        wanted = request.headers.get("accept-language", "").lower()
        return RedirectResponse("zh" if wanted.startswith("zh") else "en")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        await built()
        from openm6.console.site import ICON

        return Response(ICON, media_type="image/svg+xml")

    def page(language: str) -> ASGIApp:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            await (await built())[language](scope, receive, send)

        return answer

    for language in LANGUAGES:
        app.mount(f"/{language}", page(language))
    return built


async def _run_pages(
    app: FastAPI, server: Server, batches: Path | None, pages: asyncio.Future[dict[str, ASGIApp]]
) -> None:
    """Run the pages, which `pages` then has by language, until the event loop ends."""
    try:
        parent = await asyncio.to_thread(_built, app, server, batches)
        async with parent.router.lifespan_context(parent):
            pages.set_result({route.path.strip("/"): route.app for route in parent.routes if isinstance(route, Mount)})
            with suppress(asyncio.CancelledError):  # so that Gradio ends as at the end of its own server
                await asyncio.Event().wait()
    except Exception as error:
        if pages.done():  # the end of the pages failed
            raise
        pages.set_exception(error)


def _built(app: FastAPI, server: Server, batches: Path | None) -> FastAPI:
    """An application with the pages of all languages."""
    import gradio as gr
    from gradio import processing_utils, routes
    from markupsafe import Markup
    from PIL import Image

    from openm6.console.context import PageContext
    from openm6.console.site import HEAD, STYLE, build, theme
    from openm6.core.images import MAX_PIXELS

    # Gradio opens uploaded pictures itself; this is the limit of the API.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    processing_utils.async_ssrf_protected_get = _not_fetched
    # The configuration is the page's first script, and the only place before Gradio's own scripts.
    routes.templates.env.filters["toorjson"] = lambda value: (
        routes.toorjson(value) + Markup(IN_LANGUAGE if isinstance(value, dict) and "components" in value else "")
    )
    parent = FastAPI(openapi_url=None)
    parent.user_middleware = app.user_middleware  # Gradio asks it for the origins that are allowed
    for language in LANGUAGES:
        ui = PageContext(server, language, batches)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="SSR mode is not supported", category=UserWarning)
            gr.mount_gradio_app(
                parent, build(ui), f"/{language}", auth=ui.lets_in if server.keys else None,
                auth_message=ui.say("Enter the key's name and the key."), footer_links=[], run_history=False,
                allowed_paths=[], show_error=False, max_file_size=server.options.body_mib * 2**20, ssr_mode=False,
                enable_monitoring=False, mcp_server=False, css=STYLE, head=HEAD, theme=theme(),
            )  # fmt: skip
    gc.collect()
    gc.freeze()  # as in create_app, which the pages are too late for
    return parent
