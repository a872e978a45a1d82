"""Owns `metering bench`: which comparisons are made, and how their figures are told to people and to programs."""

import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.operate import log_to_stderr, run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from service.bench import Comparison, Result, Summary
    from service.bench.ground import Ground

Say = Callable[[str], None]
Making = AsyncIterator["Comparison"]

_PERCENTILES = (50, 95, 99)
# As many questions, and pages of groups, as make a run of some seconds.
_QUESTIONS, _PAGES = 2_000, 24


@dataclass(frozen=True)
class Sizes:
    """How much each scenario does."""

    rounds: int
    events: int
    usage: Sequence[int]
    groups: int
    pages: int
    windows: int
    questions: int

    @property
    def calls(self) -> int:
        """Calls with one event, and groups reported: each costs as much as many events of a batch."""
        return max(1, self.events // 10)


def _ingest_batch(ground: "Ground", sizes: Sizes, _say: Say) -> Making:
    from service.bench.ingest import batches

    return batches(ground, sizes.events)


def _ingest_small(ground: "Ground", sizes: Sizes, _say: Say) -> Making:
    from service.bench.small import calls

    return calls(ground, sizes.calls)


def _usage_query(ground: "Ground", sizes: Sizes, say: Say) -> Making:
    from service.bench.usage import queries

    return queries(ground, sizes.usage, progress=say)


def _stream(ground: "Ground", sizes: Sizes, say: Say) -> Making:
    from service.bench.streams import streams

    return streams(ground, sizes.windows, progress=say)


def _groups(ground: "Ground", sizes: Sizes, _say: Say) -> Making:
    from service.bench.groups import groups

    return groups(ground, sizes.calls, sizes.groups, sizes.pages)


def _scaling(ground: "Ground", sizes: Sizes, _say: Say) -> Making:
    from service.bench.scaling import scaling

    return scaling(ground, sizes.events, sizes.questions)


SCENARIOS: Mapping[str, Callable[["Ground", Sizes, Say], Making]] = {
    "ingest-batch": _ingest_batch,
    "ingest-small": _ingest_small,
    "usage-query": _usage_query,
    "stream": _stream,
    "groups": _groups,
    "scaling": _scaling,
}

_AT_LEAST_ONE = click.IntRange(min=1)
_QUICK = Sizes(rounds=1, events=2_000, usage=(2_000,), groups=2_000, pages=2, windows=5_000, questions=32)


@click.command()
@click.argument("scenarios", metavar="[SCENARIO]...", nargs=-1, type=click.Choice(list(SCENARIOS)))
@click.option("--rounds", type=_AT_LEAST_ONE, default=5, show_default=True, help="How often each side has its turn.")
@click.option("--events", type=_AT_LEAST_ONE, default=200_000, show_default=True, help="Events of a run of ingest.")
@click.option(
    "--sizes",
    type=click.IntRange(min=1_000),
    multiple=True,
    default=(100_000, 1_000_000),
    show_default=True,
    help="Events stored that usage-query asks about; repeatable.",
)
@click.option("--groups", type=_AT_LEAST_ONE, default=100_000, show_default=True, help="Groups stored that are listed.")
@click.option("--quick", is_flag=True, help="Once, and small: shows that all of it works. Its figures say little.")
@click.option("--only", metavar="TEXT", multiple=True, help="Only comparisons whose title contains this; repeatable.")
@click.option(
    "--json", "file", type=click.Path(path_type=Path, dir_okay=False), help="Also write every figure there, as JSON."
)
@click.option(
    # Not by an environment variable: one that was set for the server must not be written into by accident.
    "--database-url",
    help="Measure on this Postgres, which must be safe (fsync on) and gets gigabytes of organizations named bench-*. "
    "Without it one of its own is run and thrown away.",
)
@click.option("--pg-bin", envvar="METERING_PG_BIN", help="Directory of the Postgres programs of its own one.")
@click.option(
    "--server",
    metavar="HOST:PORT",
    help="Measure the server that runs there, on the database of --database-url. Without it servers are started here.",
)
def bench(
    scenarios: tuple[str, ...],
    rounds: int,
    events: int,
    sizes: tuple[int, ...],
    groups: int,
    quick: bool,
    only: tuple[str, ...],
    file: Path | None,
    database_url: str | None,
    pg_bin: str | None,
    server: str | None,
) -> None:
    """Measure how fast the service is, against the physical limits, in one run.

    \b
    ingest-batch   batches of 1,000 events, against COPY and the bare statements
    ingest-small   one event per call, against calls that are answered with nothing
    usage-query    usage windows, against SQL over the aggregates and over the events
    stream         a long stream, against one of the same messages; memory with slow readers
    groups         usage record groups, against COPY and bare SQL
    scaling        two server processes, against one

    Without a name all of them are run, which takes an hour or two; --quick takes a minute or two.

    A LIMIT is what nothing that keeps the same promises can beat by much: the same rows copied straight into the same
    table, the service's own SQL by a bare connection, an empty call on the same gRPC settings. A RATIO is the rate of
    the service by the rate of the limit: 0.50 means that the service does in two seconds what the limit does in one.
    All sides take turns, each round in another order, after one turn each that does not count; the ratio is taken
    within each round, and the median over the rounds is shown. So it says much the same on another machine, and on one
    that is not idle; absolute rates do not.

    It is measured as it is run: fsync on, an API key with every call, metrics that count, servers in processes of
    their own. Requests are serialised before the clock starts, since what is measured is the server; the client still
    takes its share of the same cores. Every answer is checked outside of the time.

    Exit code: 0 it was measured, whether targets are met or not; 1 a wrong answer was found, or something failed.
    """
    if server is not None and database_url is None:
        raise click.UsageError("--server needs the --database-url of that server: limits are measured there.")
    names = scenarios or tuple(name for name in SCENARIOS if server is None or name != "scaling")
    if server is not None and "scaling" in names:
        raise click.UsageError("scaling starts servers by itself; leave it out, or --server.")
    wanted = _QUICK if quick else Sizes(rounds, events, sizes, groups, _PAGES, 1_000_000, _QUESTIONS)
    if file is not None:
        _write(file, "")  # before an hour's work, not after it
    if database_url is not None:
        click.secho(
            "This writes millions of rows into the database named, as organizations bench-*, and leaves them there. "
            "Do not measure on one that you need.",
            fg="yellow",
            err=True,
        )
    log_to_stderr(logging.ERROR)
    report: dict[str, Any] = {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {
            "scenarios": list(names),
            "rounds": wanted.rounds,
            "events": wanted.events,
            "sizes": list(wanted.usage),
            "groups": wanted.groups,
            "quick": quick,
            "server": server,
            "own_postgres": database_url is None,
        },
        "comparisons": [],
    }
    with _progress() as say:
        run(_measure(names, wanted, only, (database_url, pg_bin, server), report, file, say))
    if not report["comparisons"]:
        raise click.ClickException(f"No comparison has {' or '.join(map(repr, only))} in its title.")


async def _measure(
    names: Sequence[str],
    sizes: Sizes,
    only: Sequence[str],
    where: tuple[str | None, str | None, str | None],
    report: dict[str, Any],
    file: Path | None,
    say: Say,
) -> None:
    import grpc

    from service.bench import WrongAnswer, compare
    from service.bench.ground import ground, machine

    say("starting Postgres" if where[0] is None else "preparing the database")
    title = ""
    try:
        async with ground(*where) as place:
            report["machine"] = await machine(place)
            _tell_machine(report["machine"])
            for name in names:
                title = name
                say(f"{name}: preparing")
                async for comparison in SCENARIOS[name](place, sizes, say):
                    if only and not any(text in comparison.title for text in only):
                        continue
                    title = comparison.title
                    if not report["settings"]["quick"]:
                        await place.settle()
                    result = await compare(comparison, sizes.rounds, cpu=place.cpu, progress=say)
                    found = {"scenario": name, **figures(result)}
                    report["comparisons"].append(found)
                    _tell(found)
                    if file is not None:
                        _write(file, json.dumps(report, indent=1))
    except WrongAnswer as error:
        raise click.ClickException(f"{title}: WRONG ANSWER, no figure is worth anything: {error}") from error
    except grpc.aio.AioRpcError as error:
        raise click.ClickException(f"{title}: a call failed with {error.code().name}: {error.details()}") from error


def figures(result: "Result") -> dict[str, Any]:
    """Return all that a comparison found, as JSON has it: rates a second, waits in ms, processor in µs per item."""
    from service.bench import ratio

    comparison, sides = result.comparison, result.sides
    told = []
    for name, side in sides.items():
        limits = {} if _is_limit(name, comparison) else {one: _limit(name, one, sides) for one in comparison.limits}
        told.append(
            {
                "name": name,
                "is_limit": _is_limit(name, comparison),
                "rate": {"median": side.rate, "min": min(side.rates), "max": max(side.rates)},
                "wait_ms": {f"p{one}": side.wait(one) * 1e3 for one in _PERCENTILES} if side.has_waits else None,
                "cpu_us": {process: seconds * 1e6 for process, seconds in side.cpu.items()},
                "ratios": {
                    prefix: {"limit": limit, "value": ratio(sides, name, limit)}
                    for prefix, limit in limits.items()
                    if limit is not None and all(sides[limit].rates)
                },
                "runs": [
                    {
                        "done": one.done,
                        "seconds": one.seconds,
                        "waits_ms": [round(wait * 1e3, 3) for wait in one.waits],
                    }
                    for one in side.runs
                ],
            }
        )
    targets = [
        {
            "text": one.text,
            "value": one.value(sides),
            "bound": one.bound,
            "at_most": one.at_most,
            "met": one.is_met(sides),
        }
        for one in comparison.targets
    ]
    return {
        "title": comparison.title,
        "unit": comparison.unit,
        "rounds": max(len(side.runs) for side in sides.values()),
        "limits": list(comparison.limits),
        "sides": told,
        "targets": targets,
        "notes": list(comparison.notes),
    }


def _is_limit(side: str, comparison: "Comparison") -> bool:
    return side.startswith(tuple(comparison.limits))


def _limit(side: str, prefix: str, sides: Mapping[str, "Summary"]) -> str | None:
    """Return the side to set another against: the best with the prefix, of those about the same if there are any."""
    _, _, about = side.partition(", ")
    limits = {name: found for name, found in sides.items() if name.startswith(prefix)}
    same = {name: found for name, found in limits.items() if about and name.partition(", ")[2] == about}
    return max(same or limits, key=lambda name: limits[name].rate, default=None)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise click.ClickException(f"{file} cannot be written: {error.strerror}") from error


@contextmanager
def _progress() -> Iterator[Say]:
    """Give what tells what is being done: a line that changes on a terminal, else a line each."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: click.echo(text, err=True)
        return
    with console.status("") as status:
        yield lambda text: status.update(_plain(text))


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _console() -> "Console":
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a pipe has no width; rich would take 80 and fold the names
    return console


def _tell_machine(machine: Mapping[str, str]) -> None:
    console = _console()
    console.print(_plain(f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"))
    rest = (f"{name} {value}" for name, value in machine.items() if name not in {"cpu", "cores", "system"})
    console.print(_plain(", ".join(rest)))


def _tell(found: Mapping[str, Any]) -> None:
    console = _console()
    console.print()
    console.print(f"[bold]{_plain(found['title'])}[/], {_plain(found['unit'])}, {found['rounds']} rounds")
    console.print(_table(found))
    for one in found["targets"]:
        verdict = "[green]met[/]" if one["met"] else "[red]NOT MET[/]"
        bound = f"{'at most' if one['at_most'] else 'at least'} {_number(one['bound'])}"
        console.print(f"  target: {_plain(one['text'])} = {_number(one['value'])}, {bound}: {verdict}")
    for note in found["notes"]:
        console.print(f"  {_plain(note)}")


def _table(found: Mapping[str, Any]) -> "Table":
    from rich import box
    from rich.table import Table

    sides = found["sides"]
    limits = [one for one in found["limits"] if any(one in side["ratios"] for side in sides)]
    processes = list(dict.fromkeys(process for side in sides for process in side["cpu_us"]))
    with_waits = any(side["wait_ms"] for side in sides)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("side", no_wrap=True)
    for heading in (
        *("median/s", "min", "max"),
        *((f"p{one} ms" for one in _PERCENTILES) if with_waits else ()),
        *(f"{process} µs" for process in processes),
        "cores",
        *(f"/ {limit}" for limit in limits),
    ):
        table.add_column(_plain(heading), justify="right")
    for side in sides:
        waits = side["wait_ms"] or {}
        table.add_row(
            _plain(side["name"]),
            *(_number(side["rate"][one]) for one in ("median", "min", "max")),
            *((_number(waits.get(f"p{one}")) for one in _PERCENTILES) if with_waits else ()),
            *(_number(side["cpu_us"].get(process)) for process in processes),
            _number(_cores(side)),
            *(_number(side["ratios"][limit]["value"] if limit in side["ratios"] else None) for limit in limits),
            style="dim" if side["is_limit"] else None,
        )
    return table


def _cores(side: Mapping[str, Any]) -> float | None:
    """Return how many cores were busy; None = not known."""
    done, seconds = (sum(one[name] for one in side["runs"]) for name in ("done", "seconds"))
    return float(sum(side["cpu_us"].values()) / 1e6 * done / seconds) if side["cpu_us"] else None


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
