"""The page Serving: load, throughput and energy of the served models; deployments on this machine."""

from __future__ import annotations

from asyncio import to_thread
from pathlib import Path
from typing import Any

import gradio as gr

from openm6.console.desk import Desk, first_step, table
from openm6.hub.deployments import Deployments


def page(desk: Desk) -> None:
    say = desk.say
    heads = [
        say("model"), say("parameters"), say("waiting"), say("in progress"), say("tokens per second"), say("answered"),
        say("restarts"), say("energy"), say("directory"),
    ]  # fmt: skip
    models = gr.HTML(apply_default_css=False)
    with gr.Row():
        names = {"tokens": say("tokens per second"), "requests": say("requests per second")}
        names |= {"open": say("waiting and in progress"), "watts": say("watts (estimated)")}
        charts = [
            gr.LinePlot(
                x="time", y=what, color="model", color_title=say("model"), x_title=" ", y_title=" ", title=title,
                y_axis_format="~r", height=220, min_width=420,
                x_axis_format="%H:%M:%S", sort="x", elem_id=f"chart-{what}",
            )
            for what, title in names.items()
        ]  # fmt: skip
    others = gr.HTML(apply_default_css=False)

    async def look(request: gr.Request) -> Any:
        import pandas as pd

        desk.key(request)
        history = desk.server.history
        await history.sample()
        points = pd.DataFrame(history.points)
        points["time"] = pd.to_datetime(points["time"], unit="s")
        served = table(heads, _rows(desk), say("Models of this server"))
        return [served, *[points] * len(charts), await to_thread(_deployed, desk)]

    shown = [models, *charts, others]
    desk.on(None, look, outputs=shown)
    desk.on(gr.Timer(3).tick, look, outputs=shown, show_progress="hidden")


def _rows(desk: Desk) -> list[list[str]]:
    rows = []
    for name, now in desk.server.history.now.items():
        deployment = desk.server.fleet.deployments[name]
        rows.append([
            name, f"{deployment.about['parameters'] / 1e6:,.1f} M", str(now["waiting"]), str(now["running"]),
            f"{now['tokens']:.0f}", str(now["answered"]), str(deployment.restarts), f"{now['wh']:.2f} Wh",
            _place(deployment.place.model),
        ])  # fmt: skip
    return rows


def _place(directory: Path) -> str:
    """The path, relative to the server's working directory if it is below it."""
    return str(directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory)


def _deployed(desk: Desk) -> str:
    say, found = desk.say, Deployments().list()
    if not found:
        return first_step(
            say("No model is deployed on this machine. Deploy one with:"),
            "openm6 deploy runs/demo/model",
        )
    heads = [say("name"), say("address"), say("model"), say("state"), say("since")]
    rows = [
        [one.name, one.url, one.model, say("serving") if one.lives else say("exited"), desk.time(one.created)]
        for one in found
    ]
    return table(heads, rows, say("Deployments on this machine (openm6 deploy)"))
