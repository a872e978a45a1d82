"""Owns `metering limits`: what a request may hold, as it is set here, and how to set it."""

import click

from service.cli import client

_TEXT = """Set a limit for the server that is started with it, in the environment:

  METERING_LIMIT_EVENTS_PER_CALL=500 metering serve

Each number may be 1 to the one under "at most"; with any other, or a misspelt name, the server does not start. A call
that goes beyond is answered with the error, which names the field; "none" = the limit itself is taken. What is stored
stays as it is. All replicas need the same limits. docs/limits.md says more.
"""


@click.command()
def limits() -> None:
    """Show what a request may hold, and how to change it.

    The numbers are those of a server that is started with the environment of this command. Nothing is asked of one
    that runs.

    Exit code: 0 if a server can start with them, 1 if a METERING_LIMIT_* variable is wrong.
    """
    from rich import box
    from rich.table import Table

    import service.server  # noqa: F401  # brings every module that has limits
    from service.limits import all_limits, faults

    table = Table(box=box.SIMPLE_HEAD)
    for title in ("METERING_LIMIT_…", "now", "default", "at most"):
        table.add_column(title, justify="left" if title.endswith("…") else "right", no_wrap=True)
    for title in ("what it bounds", "error"):
        table.add_column(title)
    for one in all_limits():
        now = f"[bold]{one.value}[/bold]" if one.value != one.default else str(one.value)
        table.add_row(one.name, now, str(one.default), str(one.most), one.about, one.error or "none")
    client.console().print(table)
    click.echo(_TEXT)
    wrong = faults()
    for fault in wrong:
        click.echo(fault, err=True)
    if wrong:
        raise click.exceptions.Exit(1)
