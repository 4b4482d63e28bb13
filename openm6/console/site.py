"""All pages of one language: layout, theme, menu and status bar."""

from __future__ import annotations

import html
from importlib import resources
from typing import Any

import gradio as gr
from gradio.themes.utils import colors

from openm6.console import chat, compare, data, deployments, jobs, models, play, review
from openm6.console.context import PageContext

STYLE = resources.files("openm6.console").joinpath("style.css").read_text("utf-8")
ICON = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16' width='28' height='28' aria-hidden='true'>"
    "<rect width='16' height='16' rx='4' fill='#0f766e'/><path d='M3 12V4.5l3 4 3-4V12' fill='none' stroke='white' "
    "stroke-width='1.7' stroke-linejoin='round'/><circle cx='12.2' cy='10.4' r='1.6' fill='#5eead4'/></svg>"
)
CODES = {"en": "en", "zh": "zh-CN"}
"""BCP 47 codes of the languages."""
HEAD = """<script>
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
  const button = document.getElementById({a: "accept", r: "reject", u: "back"}[event.key] || "none");
  if (button) { event.preventDefault(); button.click(); }
});
new MutationObserver(changes => {
  for (const change of changes) for (const node of change.addedNodes) {
    const alert = node.nodeType === 1 && (node.matches("[role=alert]") ? node : node.querySelector("[role=alert]"));
    if (alert && alert.closest(".note")) alert.scrollIntoView({block: "nearest"});
  }
}).observe(document, {childList: true, subtree: true});
</script>"""
"""Keyboard shortcuts of the page Review; scrolling to an error."""

PAGES = (
    ("Try", "", play.page, "Choose a task and fill in the form; the answer is streamed."),
    ("Chat", "chat", chat.page, "Converse with a model; the answer is streamed."),
    ("Compare", "compare", compare.page, "Run the same input through two models or adapters."),
    ("Data", "data", data.page, "Inspect data sets and their rejected records."),
    ("Fine-tune", "finetune", jobs.page, "Fine-tune a model on your own data."),
    ("Review", "review", review.page, "Accept or reject generated texts and pictures."),
    ("Models", "models", models.page, "Inspect a model's lineage and promote a version."),
    ("Serving", "serving", deployments.page, "Monitor the served models and their load."),
)
"""Name, path, contents and purpose of each page."""


def theme() -> Any:
    found = gr.themes.Base(
        primary_hue=colors.teal, secondary_hue=colors.teal, neutral_hue=colors.slate, radius_size="lg",
        font=["system-ui", "Segoe UI", "PingFang SC", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )  # fmt: skip
    return found.set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_900", body_text_color="*neutral_900",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        background_fill_primary_dark="*neutral_800", background_fill_secondary_dark="*neutral_800",
        block_label_text_color="*neutral_700", block_title_text_color="*neutral_700", block_title_text_weight="600",
        input_background_fill="white", input_background_fill_dark="*neutral_900", input_border_width="1px",
        input_border_color="*neutral_400", input_border_color_dark="*neutral_500",
        input_border_color_focus="*primary_700", input_border_color_focus_dark="*primary_300",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800", button_primary_background_fill_hover_dark="*primary_800",
        button_secondary_background_fill="*neutral_100", button_secondary_background_fill_dark="*neutral_700",
        button_secondary_background_fill_hover="*neutral_200",
        button_secondary_background_fill_hover_dark="*neutral_600", button_secondary_text_color="*neutral_900",
        button_secondary_text_color_dark="*neutral_100", button_secondary_border_color="*neutral_300",
        link_text_color="*primary_700", link_text_color_dark="*primary_300", link_text_color_hover="*primary_800",
        link_text_color_hover_dark="*primary_200", link_text_color_visited="*primary_700",
        link_text_color_visited_dark="*primary_300", color_accent="*primary_700", slider_color_dark="*primary_400",
    )  # fmt: skip


def build(ui: PageContext) -> gr.Blocks:
    with gr.Blocks(title="OpenM6", analytics_enabled=False, delete_cache=(SWEEP, AGE)) as site:
        _page(ui, *PAGES[0])
    for page in PAGES[1:]:
        with site.route(ui.say(page[0]), page[1]):
            _page(ui, *page)
    return site


SWEEP, AGE = 600, 3600
"""Interval of the deletion of visitors' files, and the age at which they are deleted, in seconds."""


def _page(ui: PageContext, name: str, path: str, contents: Any, purpose: str) -> None:
    gr.HTML(_top(ui, path), elem_classes="top", apply_default_css=False)
    live = gr.HTML(elem_classes="live", apply_default_css=False)

    async def look() -> str:
        return _live(ui)

    ui.on(None, look, outputs=[live], show_progress="hidden")
    ui.on(gr.Timer(5).tick, look, outputs=[live], show_progress="hidden")
    gr.HTML(f"<h1>{ui.say(name)}</h1><p>{ui.say(purpose)}</p>", elem_classes="title", apply_default_css=False)
    contents(ui)


def _top(ui: PageContext, here: str) -> str:
    """Brand and menu. Links are relative, so that they work behind a proxy with a path prefix."""
    links = "".join(
        f'<a href="./{path}"{" aria-current=page" if path == here else ""}>{ui.say(name)}</a>'
        for name, path, _, _ in PAGES
    )
    other, shown = ("zh", "中文") if ui.language == "en" else ("en", "English")
    language = f'href="../{other}/{here}" lang="{CODES[other]}" hreflang="{CODES[other]}"'
    return (
        f'<header><a class="brand" href="./">{ICON}<span>OpenM6</span></a><nav aria-label="OpenM6">{links}</nav>'
        f'<a class="language" {language}>{shown}</a></header>'
    )


def _live(ui: PageContext) -> str:
    """The status bar: each model, the tasks it was trained on, its open requests."""
    shown = []
    for name, deployment in ui.server.fleet.deployments.items():
        worker = deployment.worker
        if worker is None:
            continue
        trained = [title for title, _ in ui.tasks(name, True)]
        what = ui.say("trained tasks: {count}", count=len(trained)) if trained else ui.say("not trained on any task")
        open_now = ui.say("requests now: {count}", count=deployment.open_requests)
        named = html.escape(("、" if ui.language == "zh" else ", ").join(trained), quote=True)
        state = "on" if worker.alive else "off"
        shown.append(
            f'<li class="{state}"><b>{html.escape(name)}</b> <span title="{named}">{what}</span> · {open_now}</li>'
        )
    return f"<ul>{''.join(shown)}</ul>" if shown else f"<p>{ui.say('No model is loaded yet.')}</p>"
