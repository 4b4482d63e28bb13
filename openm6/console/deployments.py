"""What is live: the models that answer, how much they have to do and what it costs."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr

from openm6.console.desk import Desk
from openm6.hub.deployments import Deployments


def page(desk: Desk) -> None:
    say = desk.say
    heads = [
        say("model"), say("parameters"), say("waiting"), say("worked at"), say("tokens a second"), say("answered"),
        say("restarts"), say("energy"), say("directory"),
    ]  # fmt: skip
    models = gr.Dataframe(headers=heads, label=say("Served here"), interactive=False, type="array")
    with gr.Row():
        names = {"tokens": say("tokens a second"), "requests": say("requests a second")}
        names |= {"open": say("waiting and worked at"), "watts": say("watts (estimated)")}
        charts = [
            gr.LinePlot(
                x="time", y=what, color="model", x_title=" ", y_title=" ", title=title, height=220, min_width=300,
                x_axis_format="%H:%M:%S", sort="x", elem_id=f"chart-{what}",
            )
            for what, title in names.items()
        ]  # fmt: skip
    others = gr.Dataframe(
        headers=[say(h) for h in ("name", "address", "model", "state", "since")], interactive=False, wrap=True,
        label=say("Deployments on this machine (openm6 deploy)"), type="array",
    )  # fmt: skip

    async def look(request: gr.Request) -> Any:
        import pandas as pd

        desk.key(request)
        history = desk.server.history
        await history.sample()
        points = pd.DataFrame(history.points)
        points["time"] = pd.to_datetime(points["time"], unit="s")
        return [_rows(desk), *[points] * len(charts), await desk.do(lambda: _deployed(desk))]

    shown = [models, *charts, others]
    gr.on(None, look, None, shown, api_visibility="private")
    gr.Timer(3).tick(look, None, shown, api_visibility="private", show_progress="hidden")


def _rows(desk: Desk) -> list[list[str]]:
    rows = []
    for name, now in desk.server.history.now.items():
        deployment = desk.server.fleet.deployments[name]
        rows.append([
            name, f"{deployment.about['parameters'] / 1e6:,.1f} M", str(now["waiting"]), str(now["running"]),
            f"{now['tokens']:.0f}", str(now["answered"]), str(deployment.restarts), f"{now['wh']:.2f} Wh",
            str(deployment.place.model),
        ])  # fmt: skip
    return rows


def _deployed(desk: Desk) -> list[list[str]]:
    say = desk.say
    return [
        [one.name, one.url, one.model, say("serves") if one.lives else say("has ended"), time.ctime(one.created)]
        for one in Deployments().list()
    ]
