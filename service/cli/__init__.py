"""Owns the `metering` command: its help, and the table of subcommands, each imported only when it is called."""

import importlib
import os
from importlib import metadata

import click

# name -> (where it is, what it does). The text stands here so that `metering --help` imports none of them.
CLIENT_COMMANDS = {
    "ingest": ("service.cli.ingest:ingest", "Send events from JSON lines; repeating a run is safe."),
    "usage": ("service.cli.usage:usage", "Read usage windows as a table, JSON lines or CSV."),
    "events": ("service.cli.events:events", "Look up stored events, and why one is counted or not."),
    "groups": ("service.cli.groups:groups", "Validate, report and list usage record groups for cloud marketplaces."),
    "health": ("service.cli.health:health", "Ask whether the server and its services can answer."),
}
OPERATOR_COMMANDS = {
    "serve": ("service.cli.serve:serve", "Run the server."),
    "gateway": ("service.cli.gateway:gateway", "Run Envoy in front of a server, for Metronome's and Suger's SDKs."),
    "migrate": ("service.cli.operate:migrate", "Bring the database to this version's tables."),
    "verify": ("service.cli.operate:verify", "Compare stored aggregates with the raw events."),
    "report": ("service.cli.operate:report", "Make an hour's reports for the cloud marketplaces now."),
    "orgs": ("service.cli.operate:orgs", "Make and list organizations."),
    "keys": ("service.cli.operate:keys", "Make, list and revoke API keys."),
    "limits": ("service.cli.limits:limits", "Show what a request may hold, and how to change it."),
    "demo": ("service.cli.demo:demo", "Show the whole path, from events to usage, in one run."),
    "bench": ("service.cli.bench:bench", "Measure how fast the service is, against the physical limits."),
}
COMMANDS = CLIENT_COMMANDS | OPERATOR_COMMANDS


class LazyGroup(click.Group):
    """A group whose subcommands are the table above."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the one command that is called."""
        if cmd_name not in COMMANDS:
            return None
        if cmd_name in CLIENT_COMMANDS or cmd_name == "bench":
            # gRPC, which reads this once it is imported, would write lines about handshakes between ours.
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the table into the help, clients first."""
        for title, commands in (("Client commands", CLIENT_COMMANDS), ("Operator commands", OPERATOR_COMMANDS)):
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, (_, text) in commands.items()])


def _print_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    try:
        click.echo(f"metering {metadata.version('metering')}")
    except metadata.PackageNotFoundError:
        click.echo("metering (source tree, not installed)")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
def main() -> None:
    """Usage metering over gRPC: events in exactly once, exact usage windows out.

    Start a server, send it events, read what they add up to:

    \b
      metering serve
      metering ingest events.jsonl
      metering usage --window day --from 2026-01-01 --to 2026-02-01

    An event is one JSON object on one line:

    \b
      {"transaction_id": "req-1", "customer_id": "acme", "event_type": "api_request",
       "timestamp": "2026-01-01T10:00:00Z", "properties": {"bytes": 512}}

    The transaction id is yours and is kept for ever: whatever is sent twice counts once, so the answer to a failure
    is always to run the same command again.

    Client commands find the server by --address (or METERING_ADDRESS) and sign in with --api-key (or, better, since
    other users of the machine cannot see it, METERING_API_KEY). A server with TLS is called with --tls, or --tls-ca.
    """
