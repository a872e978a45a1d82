"""Claims about `metering bench`: every scenario runs, its figures are what they say, and wrong answers are found.

How fast anything is, is not asserted.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import start_server

from service.bench import (
    Comparison,
    Result,
    Side,
    Stopwatch,
    Summary,
    Target,
    Work,
    WrongAnswer,
    at_least,
    at_least_of_best,
    best,
    compare,
    must_be,
    ratio,
)
from service.bench import ground as grounds
from service.bench.ground import Ground
from service.bench.ingest import Bench, Events, draw
from service.cli import main
from service.cli.bench import SCENARIOS, figures

# A comparison of each scenario, or two; all of them would take minutes.
TITLES = {
    "ingest-batch": ["3 metrics, 20 % duplicates"],
    "ingest-small": ["one event per call"],
    "usage-query": ["(a) 1 customer, 31 days HOUR, SUM"],
    "stream": ["windows to one client", "memory with 50 clients"],
    "groups": ["batches of 1,000", "by meta_info that is rare"],
    "scaling": ["8 StreamEvents clients", "16 concurrent ListUsage callers"],
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What one quick run of all scenarios prints, and its JSON."""
    file = tmp_path_factory.mktemp("bench") / "figures.json"
    only = [part for titles in TITLES.values() for title in titles for part in ("--only", title)]
    command = [sys.executable, "-m", "service", "bench", "--quick", "--json", str(file), *only]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("METERING_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(file.read_text())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_runs(quick: tuple[str, dict[str, Any]], scenario: str) -> None:
    """Each scenario makes its comparisons, on real servers and a Postgres that keeps what it acknowledges."""
    printed, found = quick
    titles = [one["title"] for one in found["comparisons"] if one["scenario"] == scenario]
    assert len(titles) == len(TITLES[scenario])
    for title, part in zip(titles, TITLES[scenario], strict=True):
        assert part in title
        assert title in printed
    assert found["machine"]["postgres.fsync"] == found["machine"]["postgres.synchronous_commit"] == "on"


def test_json_has_everything(quick: tuple[str, dict[str, Any]]) -> None:
    """The JSON holds every run of every side, and what is printed follows from it."""
    _, found = quick
    assert set(found) == {"began", "settings", "machine", "comparisons"}
    assert found["settings"]["scenarios"] == list(SCENARIOS)
    for one in found["comparisons"]:
        assert set(one) == {"scenario", "title", "unit", "rounds", "limits", "sides", "targets", "notes"}
        for side in one["sides"]:
            assert set(side) == {"name", "is_limit", "rate", "wait_ms", "cpu_us", "ratios", "runs"}
            assert len(side["runs"]) == one["rounds"] == 1
            for run in side["runs"]:
                assert set(run) == {"done", "seconds", "waits_ms"}
                assert run["done"] > 0
                assert run["seconds"] > 0
            assert side["rate"]["median"] == pytest.approx(side["runs"][0]["done"] / side["runs"][0]["seconds"])
            assert side["is_limit"] == side["name"].startswith(tuple(one["limits"]))
            measured = {
                limit for limit in one["limits"] if any(other["name"].startswith(limit) for other in one["sides"])
            }
            assert measured or not one["limits"]
            assert set(side["ratios"]) == (set() if side["is_limit"] else measured)
            assert (side["wait_ms"] is None) == (side["runs"][0]["waits_ms"] == [])
        assert not all(side["is_limit"] for side in one["sides"])
        for target in one["targets"]:
            assert set(target) == {"text", "value", "bound", "at_most", "met"}


def test_targets_are_judged(quick: tuple[str, dict[str, Any]]) -> None:
    """Whether a target is met is printed and does not decide over the exit code."""
    printed, found = quick
    targets = [target for one in found["comparisons"] for target in one["targets"]]
    assert {"IngestEvents, 1 event / echo, same request", "2 processes / 1 process"} <= {one["text"] for one in targets}
    assert printed.count("NOT MET") == [one["met"] for one in targets].count(False)


# --- the command ------------------------------------------------------------------------------------------------------


def test_unsafe_database_is_refused(database_url: str) -> None:
    """A database that could lose what it acknowledged is not measured: its figures would promise too much."""
    done = CliRunner().invoke(main, ["bench", "--quick", "--database-url", database_url])
    assert done.exit_code == 1
    assert "This database can lose acknowledged events (fsync is off, full_page_writes is off)" in done.output
    assert "Do not measure on one that you need" in done.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--server", "127.0.0.1:1"], "--server needs the --database-url"),
        (["--server", "127.0.0.1:1", "--database-url", "postgresql://x/y", "scaling"], "scaling starts servers by"),
        (["--rounds", "0"], "0 is not in the range"),
        (["no-such"], "'no-such' is not one of"),
        (["--json", "/nowhere/at/all.json"], "/nowhere/at/all.json cannot be written"),
    ],
)
def test_wrong_use_is_told_at_once(arguments: list[str], text: str) -> None:
    """What cannot be measured is said before anything is started."""
    done = CliRunner().invoke(main, ["bench", *arguments])
    assert done.exit_code in {1, 2}
    assert text in " ".join(done.output.split())


def test_environment_names_no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that a server is configured with does not make the bench write into that server's database."""
    monkeypatch.setenv("METERING_DATABASE_URL", "postgresql://nowhere.invalid/x")
    done = CliRunner().invoke(main, ["bench", "--server", "127.0.0.1:1"])
    assert "--server needs the --database-url" in done.output


# --- wrong answers ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def place(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ground]:
    """Ground on the tests' own Postgres, safe or not."""

    async def safe(*_: object, **__: object) -> None:
        return None

    monkeypatch.setattr("service.database.Database.check", safe)
    async with grounds.ground(database_url) as found:
        yield found


async def test_lost_events_are_found(place: Ground, database_url: str) -> None:
    """A side is wrong if an event is not stored, is not counted, is answered otherwise, or counts twice."""
    async with place.server("--allow-unsafe-database") as server:
        bench = Bench(place, [server], draw(200, batch=100), 2)
        await bench.calls(2)
        await bench.streams(2)
        await bench.statements(1, 100)

        class Losing(Events):
            def of_run(self) -> tuple[list[bytes], Any]:
                requests, rows = super().of_run()
                return requests[:-1], [rows[0], rows[1][:-1]]

        losing = Losing(*(getattr(bench.events, field.name) for field in dataclasses.fields(Events)))
        lossy = Bench(place, [server], losing, 2)
        for run in (lossy.calls(1), lossy.streams(1), lossy.copy(), lossy.statements(1, 100)):
            with pytest.raises(WrongAnswer):
                await run

        tenant = await bench.tenant()
        with pytest.raises(WrongAnswer, match="stored events must be 200 and is 0"):
            await bench.check(tenant, None)
        with pytest.raises(WrongAnswer, match="accepted events must be 200 and is 199"):
            await bench.check(tenant, [1] * 199 + [2])


async def test_deleted_row_is_found(place: Ground) -> None:
    """An event that is acknowledged and gone, or a sum that is off by one, is found in the database."""
    async with place.server("--allow-unsafe-database") as server:
        bench = Bench(place, [server], draw(100, batch=100), 2)
        original, tenants = bench.check, []

        async def kept(tenant: Any, verdicts: Any) -> None:
            tenants.append(tenant)
            await original(tenant, verdicts)

        bench.check = kept  # type: ignore[method-assign]
        await bench.calls(1)
        organization = tenants[0].organization
        connection = await place.bare()
        try:
            one = (
                "UPDATE usage_cells SET sum = sum + 1 WHERE ctid IN (SELECT ctid FROM usage_cells WHERE sum IS NOT NULL"
            )
            await connection.execute(f"{one} AND organization_id = $1 LIMIT 1)", organization)
            with pytest.raises(WrongAnswer, match="sums must be"):
                await original(tenants[0], None)
            one = "SELECT ctid FROM usage_events WHERE organization_id = $1 LIMIT 1"
            await connection.execute(f"DELETE FROM usage_events WHERE ctid = ({one})", organization)  # noqa: S608
            with pytest.raises(WrongAnswer, match="stored events must be 100 and is 99"):
                await original(tenants[0], None)
        finally:
            await connection.close()


def test_wrong_answer_ends_the_command(monkeypatch: pytest.MonkeyPatch, database_url: str) -> None:
    """A wrong answer ends the run with exit code 1 and says where and what; no figures of that comparison are told."""

    async def safe(*_: object, **__: object) -> None:
        return None

    async def wrong() -> Work:
        must_be("windows", 23, 24)
        return Work(1, 1)

    async def comparisons(*_: object) -> AsyncIterator[Comparison]:
        yield Comparison("the title", "things/s", [Side("one", wrong)])

    monkeypatch.setattr("service.database.Database.check", safe)
    monkeypatch.setitem(SCENARIOS, "groups", comparisons)  # type: ignore[arg-type]
    done = CliRunner().invoke(main, ["bench", "groups", "--quick", "--database-url", database_url])
    assert done.exit_code == 1
    assert "the title: WRONG ANSWER" in done.output
    assert "windows must be 24 and is 23" in done.output
    assert "things/s" not in done.output


def test_another_server_is_measured(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --server that server is measured; if it is on another database, nothing is."""

    async def safe(*_: object, **__: object) -> None:
        return None

    monkeypatch.setattr("service.database.Database.check", safe)
    process = start_server(METERING_DATABASE_URL=database_url)
    other = start_server(METERING_DATA_DIR=str(tmp_path / "data"))
    try:
        command = ["bench", "groups", "--quick", "--only", "batches", "--database-url", database_url, "--server"]
        done = CliRunner().invoke(main, [*command, process.address])
        assert done.exit_code == 0, done.output
        assert "Report, 4 clients" in done.output
        done = CliRunner().invoke(main, [*command, other.address])
        assert done.exit_code == 1
        assert "WRONG ANSWER" in done.output
    finally:
        assert process.stop() == 0
        assert other.stop() == 0


# --- statistics -------------------------------------------------------------------------------------------------------


def sides(**runs: list[Work]) -> Mapping[str, Summary]:
    """Summaries by name."""
    return {name: Summary(name, found) for name, found in runs.items()}


def test_rate_is_the_median_over_the_runs() -> None:
    """A run that was disturbed does not move the rate."""
    summary = Summary("a", [Work(10, 1), Work(10, 100), Work(10, 2)])
    assert summary.rates == [10, 0.1, 5]
    assert summary.rate == 5


def test_percentiles_are_of_the_waits_of_all_runs() -> None:
    """p50, p95 and p99 are taken of all single waits together, and the longest is the end of them."""
    first, second = [i / 1000 for i in range(1, 51)], [i / 1000 for i in range(51, 101)]
    summary = Summary("a", [Work(50, 1, second), Work(50, 1, first)])
    assert summary.has_waits
    assert [summary.wait(percent) for percent in (0, 50, 95, 99, 100)] == [0.001, 0.051, 0.096, 0.1, 0.1]
    assert not Summary("b", [Work(50, 1)]).has_waits


def test_ratio_is_the_median_of_the_ratios_of_each_round() -> None:
    """A round in which the whole machine was slow counts as any other; the ratio of medians would differ."""
    found = sides(one=[Work(10, 1), Work(1, 1), Work(9, 1)], limit=[Work(20, 1), Work(2, 1), Work(90, 1)])
    assert ratio(found, "one", "limit") == 0.5
    assert found["one"].rate / found["limit"].rate == 0.45


def test_best_limit_is_the_fastest_of_its_prefix() -> None:
    """Of several limits of a kind the service is set against the one that is hardest to beat."""
    found = sides(one=[Work(3, 1)], limit_a=[Work(4, 1)], limit_b=[Work(6, 1)], other=[Work(9, 1)])
    assert best("limit", found) == "limit_b"
    assert at_least_of_best("one", "limit", 0.5).value(found) == 0.5
    assert at_least_of_best("one", "limit", 0.5).is_met(found)
    assert not at_least("one", "other", 0.5).is_met(found)


def test_targets_are_at_least_or_at_most() -> None:
    """A value that is the bound itself meets it, from either side."""
    for value, least, most in ((0.9, False, True), (1.0, True, True), (1.1, True, False)):
        assert Target("", lambda _, value=value: value, 1).is_met({}) is least  # type: ignore[misc]
        assert Target("", lambda _, value=value: value, 1, at_most=True).is_met({}) is most  # type: ignore[misc]


def test_figures_name_the_limit_of_the_same_thing() -> None:
    """A side is set against the best limit that is about the same as itself, if the limits tell that apart."""
    found = {
        name: Summary(name, [Work(rate, 1)])
        for name, rate in (("service, 10", 1), ("service, 20", 1), ("SQL, 10", 2), ("SQL, 20", 4), ("COPY", 10))
    }
    told = figures(Result(Comparison("t", "u", [], ["SQL", "COPY"]), found))
    assert [one["ratios"] for one in told["sides"]] == [
        {"SQL": {"limit": "SQL, 10", "value": 0.5}, "COPY": {"limit": "COPY", "value": 0.1}},
        {"SQL": {"limit": "SQL, 20", "value": 0.25}, "COPY": {"limit": "COPY", "value": 0.1}},
        {},
        {},
        {},
    ]


async def test_sides_take_turns_in_changing_order() -> None:
    """Each side runs once to warm up; then all run in every round, and another one begins each time."""
    ran: list[str] = []

    def side(name: str) -> Side:
        async def run() -> Work:
            watch = Stopwatch()
            ran.append(name)
            work = watch.done(2)
            Stopwatch().done(1)  # what is done outside of the time, as checking, takes processor of its own
            return work

        return Side(name, run)

    seconds = iter(range(1000))
    result = await compare(
        Comparison("t", "u", [side("a"), side("b"), side("c")]),
        4,
        cpu=lambda: {"client": float(next(seconds))},
        progress=lambda _: None,
    )
    assert ["".join(ran[i : i + 3]) for i in range(0, len(ran), 3)] == ["abc", "abc", "bca", "cab", "abc"]
    assert {name: len(one.runs) for name, one in result.sides.items()} == {"a": 4, "b": 4, "c": 4}
    # A second of processor for each run of two items; neither the warming up counts, nor what is done after the time.
    assert {one.cpu["client"] for one in result.sides.values()} == {0.5}


async def test_rounds_can_be_bounded() -> None:
    """A comparison that takes long is made less often than asked for."""

    async def run() -> Work:
        return Work(1, 1)

    comparison = Comparison("t", "u", [Side("a", run)], rounds_max=2)
    result = await compare(comparison, 5, cpu=dict, progress=lambda _: None)
    assert len(result.sides["a"].runs) == 2


async def test_waits_are_timed_one_by_one() -> None:
    """A stopwatch keeps the time of each call, and hands on its answer."""
    watch = Stopwatch()

    async def answer() -> str:
        return "answer"

    assert await watch.timed(answer()) == "answer"
    assert len(watch.waits) == 1
    assert 0 <= watch.waits[0] <= watch.seconds


def test_must_be_tells_both() -> None:
    """What is wrong is told with what was found and what was expected."""
    must_be("number", 1, 1)
    with pytest.raises(WrongAnswer, match="number must be 2 and is 1"):
        must_be("number", 1, 2)
