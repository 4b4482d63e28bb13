"""The page Models: versions in the catalogue with lineage, metrics and energy; promotion and rollback."""

from __future__ import annotations

import html
from asyncio import to_thread
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from openm6.console.context import PageContext, listing, note, shortened, table
from openm6.hub.catalogue import LIVE, MODEL, Lineage, Version
from openm6.serve.wire import Place

BOX, GAP = (220, 54), (36, 18)
"""Width and height of a node of the lineage graph, and the gaps between nodes, in pixels."""


def page(ui: PageContext) -> None:
    say = ui.say
    heads = [say("version"), say("metrics"), say("energy"), say("added"), say("note")]
    empty, unreadable = gr.HTML(apply_default_css=False), {"": note()}
    with gr.Column(visible=False) as whole:
        versions = gr.HTML(apply_default_css=False)
        chosen = gr.Dropdown(label=say("Model"), interactive=True, elem_id="model")
        with gr.Row(elem_classes="buttons"):
            promote = gr.Button(say("Promote to live"), variant="primary", elem_id="promote", min_width=120)
            rollback = gr.Button(say("Roll back"), elem_id="rollback", min_width=120)
        done = gr.Markdown()
        wrong = {"": note()}
        gr.Markdown("## " + say("Lineage"))
        graph = gr.HTML(elem_id="lineage", apply_default_css=False)
        recipe = gr.HTML(elem_classes="recipe", apply_default_css=False)
    with gr.Accordion(say("Add a model"), open=False):
        with gr.Row():
            name = gr.Textbox(label=say("Name"), placeholder="goods", elem_id="model-name")
            directory = gr.Textbox(label=say("Directory"), placeholder="runs/demo/model", elem_id="model-directory")
            made_of = gr.Textbox(label=say("Derived from"), placeholder="goods@1 data:items@2")
        add = gr.Button(say("Add"), variant="primary", elem_id="add")
        added_wrong = {"": note()}

    def all_versions(select: str | None = None) -> list[Any]:
        every = ui.catalogue.every(MODEL)
        names = [one.full_name for one in every]
        text = say("The catalogue has no model yet. Fine-tune and save one, or add one below or with this command.")
        value = select if select in names else names[-1] if names else None
        listed = table(heads, [_row(ui, one) for one in every], say("Models"))
        return [*listing(names, value, text, "openm6 models add goods runs/demo/model"), listed]

    def look(which: str | None) -> list[str]:
        if not which:
            return ["", ""]
        version = ui.catalogue.named(which)
        text = html.escape(ui.catalogue.recipe(version))
        text = f'<h2>{say("Recipe")}</h2><pre tabindex="0">{text}</pre>' if text else ""
        return [drawn(ui.catalogue.lineage(version)), text]

    def going(change: Callable[[str], Version]) -> Any:
        async def act(which: str | None) -> list[Any]:
            if not which:
                raise ui.error("Choose a model first.")
            version = await to_thread(change, which)
            return [await _go_live(ui, version), *await to_thread(all_versions, version.full_name)]

        return act

    def promoted(which: str) -> Version:
        version = ui.catalogue.named(which)
        ui.catalogue.promote(version)
        return version

    def added(called: str, path: str, parents: str) -> list[Any]:
        if not called.strip() or not path.strip():
            raise ui.error("Enter the model's name and directory.")
        place = Path(path.strip())
        run = place.parent if (place.parent / "recipe.yaml").is_file() else None
        version = ui.catalogue.add_model(called.strip(), place, made_of=parents.split(), run=run)
        return all_versions(version.full_name)

    shown = [empty, whole, chosen, versions]
    ui.on(None, all_versions, outputs=shown, notes=unreadable)
    ui.on(chosen.change, look, [chosen], [graph, recipe], wrong)
    ui.on(promote.click, going(promoted), [chosen], [done, *shown], wrong, manage=True)
    back = going(lambda which: ui.catalogue.rollback(which.partition("@")[0]))
    ui.on(rollback.click, back, [chosen], [done, *shown], wrong, manage=True)
    fields = [name, directory, made_of]
    ui.on([add.click, *(field.submit for field in fields)], added, fields, shown, added_wrong, manage=True)


async def _go_live(ui: PageContext, version: Version) -> str:
    """Switch the served model of this name to the version. Returns the message to show."""
    deployment = ui.server.fleet.deployments.get(version.name)
    if deployment is None:
        return ui.say(
            "{version} is live; this server has no model named {name}.", version=version.full_name, name=version.name
        )
    directory = (await to_thread(ui.catalogue.local, version)).resolve()
    await deployment.swap(Place(directory, deployment.place.adapters))
    return ui.say("{version} is live and now serves requests here.", version=version.full_name)


def _row(ui: PageContext, one: Version) -> list[str]:
    energy = one.about.get("energy_kwh")
    return [
        one.title, one.measures, "" if energy is None else f"{1000 * energy:.1f} Wh",
        ui.time(one.created), one.about.get("note", ""),
    ]  # fmt: skip


def drawn(lineage: Lineage) -> str:
    """A lineage as SVG, each version with its parents to the right."""
    parts: list[str] = []
    size = [0, 0]

    def put(one: Lineage, depth: int, row: int) -> int:
        """Draw a version and its parents. Returns the first free row below."""
        x, y = depth * (BOX[0] + GAP[0]), row * (BOX[1] + GAP[1])
        size[0], size[1] = max(size[0], x + BOX[0]), max(size[1], y + BOX[1])
        v, below = one.version, row
        for part in one.made_of:
            middle = below * (BOX[1] + GAP[1]) + BOX[1] / 2
            start, end, level = x + BOX[0], x + BOX[0] + GAP[0], y + BOX[1] / 2
            bend = (start + end) / 2
            parts.append(
                f'<path d="M{start} {level} C{bend} {level} {bend} {middle} {end} {middle}" fill="none" '
                f'stroke="currentColor" opacity=".5"/>'
            )
            below = put(part, depth + 1, below)
        records = "" if v.kind == MODEL else f"{v.about['records']} × "
        second = v.measures if v.kind == MODEL else records + shortened(v.about["source"], 30 - len(records), True)
        colour = "#2563eb" if LIVE in v.aliases else "#64748b" if v.kind == MODEL else "#16a34a"
        parts.append(
            f'<g transform="translate({x} {y})"><rect width="{BOX[0]}" height="{BOX[1]}" rx="8" fill="{colour}" '
            f'fill-opacity=".12" stroke="{colour}"/><text x="12" y="22" fill="currentColor" font-weight="600">'
            f'{html.escape(shortened(v.title, 26))}</text><text x="12" y="42" fill="currentColor" opacity=".75" '
            f'font-size="12">{html.escape(shortened(second, 30))}</text></g>'
        )
        return max(below, row + 1)

    put(lineage, 0, 0)
    text = html.escape("; ".join(line.strip() for line in lineage.lines()), quote=True)
    name = html.escape(lineage.version.title, quote=True)
    return (
        f'<div class="lineage" role="region" tabindex="0" aria-label="{name}">'
        f'<svg role="img" aria-label="{text}" width="{size[0] + 2}" height="{size[1] + 2}" '
        f'viewBox="-1 -1 {size[0] + 2} {size[1] + 2}" font-size="14" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(parts)}</svg></div>"
    )
