"""All pages of one language."""

from __future__ import annotations

import gradio as gr

from openm6.console import compare, data, deployments, jobs, models, play, review
from openm6.console.desk import Desk

STYLE = """
.gradio-container {width: 100%; max-width: 1200px !important; margin: 0 auto}
.quiet {opacity: .75; font-size: .9em}
.lineage {overflow-x: auto}
.image-frame img {width: 100%; height: 100%; object-fit: contain}
.said textarea {font-size: 1.1em; line-height: 1.6}
"""
ICON = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'><rect width='16' height='16' rx='4' fill='#f97316'/>"
    "<text x='2' y='12' font-size='9' fill='white'>M6</text></svg>"
)
HEAD = """<script>
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
  const button = document.getElementById({a: "accept", r: "reject", z: "back"}[event.key] || "none");
  if (button) { event.preventDefault(); button.click(); }
});
</script>"""
"""On the page for review, a key of the keyboard is a button."""

PAGES = (
    ("Compare", "compare", compare.page),
    ("Data", "data", data.page),
    ("Teach", "teach", jobs.page),
    ("Review", "review", review.page),
    ("Models", "models", models.page),
    ("Live", "live", deployments.page),
)


def build(desk: Desk) -> gr.Blocks:
    say = desk.say
    other = ("中文", "/zh") if desk.language == "en" else ("English", "/en")
    with gr.Blocks(title="OpenM6", analytics_enabled=False) as site:
        gr.Navbar(value=[other], main_page_name=say("Try"))
        play.page(desk)
    for name, path, page in PAGES:
        with site.route(say(name), path):
            gr.Navbar(value=[other], main_page_name=say("Try"))
            page(desk)
    return site
