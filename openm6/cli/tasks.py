"""openm6 tasks."""

from __future__ import annotations

from typing import Annotated

import typer

from openm6.cli.app import app
from openm6.cli.options import Json
from openm6.cli.output import emit, table

tasks = typer.Typer(help="List the tasks of the library; show one with its schemas.", invoke_without_command=True)
app.add_typer(tasks, name="tasks")


@tasks.callback()
def list_tasks(context: typer.Context, json: Json = False) -> None:
    """List the tasks of the library."""
    if context.invoked_subcommand:
        return
    from openm6.tasks.library import get, names

    found = [get(name) for name in names()]
    if json:
        emit([task.to_dict() for task in found])
        return
    rows = [(t.name, t.instructions[0].text, t.description) for t in found]
    table(["task", "first instruction", ""], rows)


@tasks.command()
def show(name: Annotated[str, typer.Argument(help="Task by name or YAML path.")], json: Json = False) -> None:
    """Show a task: instructions, metrics, example, and the JSON schemas of inputs and outputs."""
    from openm6.tasks.library import get

    task = get(name)
    if json:
        emit({**task.to_dict(), "schema": task.schema()})
        return
    import yaml

    content = {key: value for key, value in task.to_dict().items() if value}
    typer.echo(yaml.safe_dump(content, allow_unicode=True, sort_keys=False).rstrip())
    schema = task.schema()
    for side in ("inputs", "outputs"):
        typer.echo(f"{side}:")
        for slot, kind in schema[side]["properties"].items():
            need = "" if slot in schema[side]["required"] else " (optional)"
            typer.echo(f"  {slot}: [{task.slots[slot].type}] {kind.get('enum', '')}{need}".rstrip())
