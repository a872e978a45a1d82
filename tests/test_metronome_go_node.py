"""Metronome's Go and Node SDKs, as they are, against metering behind Envoy: the same calls, the same exact numbers."""

import asyncio
import json
import os
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Client, event, running_gateway, running_server
from test_examples import (
    ENVIRONMENT,
    EXAMPLES,
    REPOSITORY,
    Command,
    Done,
    Proxy,
    Unavailable,
    build,
    build_node,
    download,
    need,
)

from service.auth import new_api_key
from service.database import Database
from service.store import organizations

LANGUAGES = ("go", "node")
ALIASES = ("ada@example.com", "bob@example.com")
REGIONS = ("ap", "eu", "us")
JANUARY = datetime(2026, 1, 1, tzinfo=UTC)
METRIC = {
    "name": "Transfers",
    "aggregation_type": "SUM",
    "aggregation_key": "megabytes",
    "event_type_filter": {"in_values": ["transfer"]},
    "group_keys": [["region"]],
}
# What an error is to each SDK: Go's has one type for all, with the status.
TYPES = {
    "go": defaultdict(lambda: "metronome.Error"),
    "node": {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 409: "ConflictError"},
}


class Programs(NamedTuple):
    """What is run in one language: the example, and the driver that makes any calls."""

    example: Command
    driver: Command


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Programs]:
    """How to run the programs of a language; built once, outside of the repository, or skipped."""
    place = tmp_path_factory.mktemp("clients")
    outcomes: dict[str, Programs | str] = {}

    def find(language: str) -> Programs:
        if language not in outcomes:
            try:
                outcomes[language] = {"go": build_go_programs, "node": build_node_programs}[language](place)
            except Unavailable as reason:
                outcomes[language] = f"Metronome's SDK for {language} is not tested: {reason}"
        found = outcomes[language]
        if isinstance(found, str):
            pytest.skip(found)
        return found

    return find


def build_go_programs(place: Path) -> Programs:
    """Build the Go example and the driver, in one go: most of the time is for the SDK, which they share."""
    folder = copy_client("metronome_go", place)
    need("go")
    (folder / "driver").mkdir(exist_ok=True)
    shutil.copy(REPOSITORY / "tests" / "metronome_driver.go", folder / "driver" / "main.go")
    download(folder, 60, "checksum mismatch|go.sum", "go", "mod", "download")
    assert build(folder, "gofmt", "-l", ".") == ""
    build(folder, "go", "build", "-o", "bin/", ".", "./driver")
    return Programs([str(folder / "bin" / "metronome")], [str(folder / "bin" / "driver")])


@pytest.fixture(scope="session")
def printed_program(tmp_path_factory: pytest.TempPathFactory) -> Command | str:
    """The Go program as it is printed, with the version of the SDK that it was written for; or why it cannot be had."""
    folder = copy_client("metronome_go_printed", tmp_path_factory.mktemp("printed"))
    try:
        need("go")
        if source := os.environ.get("METRONOME_GO_SOURCE"):
            build(folder, "go", "mod", "edit", f"-replace=github.com/Metronome-Industries/metronome-go={source}")
        else:
            download(folder, 60, "checksum mismatch|go.sum", "go", "mod", "download")
        build(folder, "go", "build", "-o", "program", ".")
    except Unavailable as reason:
        return f"the printed Go program is not tested: {reason}; METRONOME_GO_SOURCE can name its SDK's source, v0.1.0"
    return [str(folder / "program")]


def build_node_programs(place: Path) -> Programs:
    """Install the SDK for the Node example; the driver takes it from there."""
    folder = copy_client("metronome_node", place)
    shutil.copy(REPOSITORY / "tests" / "metronome_driver.js", folder / "driver.js")
    return Programs(build_node(folder), ["node", str(folder / "driver.js")])


def copy_client(name: str, place: Path) -> Path:
    """Copy an example as git would have it in a fresh clone."""
    ignored = shutil.ignore_patterns("node_modules", "metronome")
    return Path(shutil.copytree(EXAMPLES / "clients" / name, place / name, ignore=ignored, dirs_exist_ok=True))


async def run(command: Command, url: str, sent: str = "", key: str = "any") -> Done:
    """Run a program of an SDK against a base URL."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**ENVIRONMENT, "METRONOME_BASE_URL": url, "METRONOME_BEARER_TOKEN": key},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            printed, errors = await process.communicate(sent.encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Done(process.returncode, printed.decode().splitlines(), errors.decode())


async def make(driver: Command, url: str, *calls: dict[str, Any], key: str = "any") -> list[dict[str, Any]]:
    """Make calls with an SDK; what each gave, and how many HTTP requests it took."""
    done = await run(driver, url, json.dumps(calls), key)
    assert (done.code, done.errors) == (0, "")
    return json.loads("".join(done.printed))


async def results(driver: Command, url: str, *calls: dict[str, Any]) -> list[Any]:
    """Make calls that succeed; the result of each."""
    outcomes = await make(driver, url, *calls)
    assert [one["error"] for one in outcomes if "error" in one] == []
    return [one["result"] for one in outcomes]


class Sent(NamedTuple):
    """What a test sends: (transaction id, alias, time, region or none, megabytes)."""

    id: str
    alias: str
    at: datetime
    region: str | None
    megabytes: Decimal

    def wire(self) -> dict[str, Any]:
        """Return the event as Metronome's API takes it; the quantity now as a number, now as text."""
        properties: dict[str, Any] = {"region": self.region} if self.region else {}
        properties["megabytes"] = float(self.megabytes) if len(self.id) % 2 else str(self.megabytes)
        return {
            "transaction_id": self.id,
            "customer_id": self.alias,
            "event_type": "transfer",
            "timestamp": rfc3339(self.at),
            "properties": properties,
        }


def some_events(seed: int) -> list[Sent]:
    """Draw events of two customers on 1, 2 and 4 January, of which the second has nothing but zeros and no `us`."""
    draw = random.Random(seed)
    events = []
    for number in range(180):
        day = draw.choice((1, 2, 4))
        at = JANUARY + timedelta(days=day - 1, seconds=draw.randrange(86_400))
        region = draw.choice((*REGIONS[: 2 if day == 2 else 3], None))
        megabytes = Decimal(0) if day == 2 else Decimal(draw.randrange(1, 10**6)).scaleb(-3)
        events.append(Sent(f"t-{number}", draw.choice(ALIASES), at, region, megabytes))
    return events


def ingests(events: list[Sent]) -> list[dict[str, Any]]:
    """Return the calls that send events, in batches as large as Metronome takes them."""
    return [{"do": "ingest", "params": [one.wire() for one in events[i : i + 100]]} for i in range(0, len(events), 100)]


CATALOG = (
    {"do": "metric", "params": METRIC, "key": "metric"},
    *({"do": "customer", "params": {"name": one, "ingest_aliases": [one]}, "key": one} for one in ALIASES),
)


def rfc3339(at: datetime) -> str:
    """Write a time as both SDKs' callers do."""
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def day(number: int) -> str:
    """Write midnight of a day of January, which may be 32."""
    return rfc3339(JANUARY + timedelta(days=number - 1))


def total(events: Iterable[Sent]) -> float | None:
    """Add up exactly, as a double at the end; None without events, which is not zero."""
    values = [one.megabytes for one in events]
    return float(sum(values)) if values else None


def usage_call(metric: str, size: str = "DAY", until: int = 6, **more: Any) -> dict[str, Any]:
    """Return a call of `usage` from 1 January on; `more` is for the metric."""
    bounds = {"starting_on": day(1), "ending_before": day(until)}
    return {"do": "usage", "params": {**bounds, "window_size": size, "billable_metrics": [{"id": metric, **more}]}}


@pytest.mark.parametrize("language", LANGUAGES)
async def test_usage_by_days_and_groups(programs: Callable[[str], Programs], base_url: str, language: str) -> None:
    """Everything sent twice, by two runs: the same ids, and values and group maps are what the events add up to.

    A day of zeros is 0, one without events null; a group without usage in a window is null in its map, not left out.
    """
    driver = programs(language).driver
    events = some_events(1)
    wanted = [*REGIONS, "xx"]
    first, second = [await results(driver, base_url, *CATALOG, *ingests(events)) for _ in range(2)]
    assert first == second
    metric, *ids = first[:3]
    (rows,) = await results(driver, base_url, usage_call(metric, group_by={"key": "region", "values": wanted}))
    expected = []
    for customer, alias in sorted(zip(ids, ALIASES, strict=True)):
        for number in range(1, 6):
            mine = [one for one in events if one.alias == alias and one.at.day == number]
            expected.append(
                {
                    "customer": customer,
                    "metric": metric,
                    "start": day(number),
                    "end": day(number + 1),
                    "value": total(mine),
                    "groups": {key: total(one for one in mine if one.region == key) for key in wanted},
                }
            )
    typed = [one.pop("typed") for one in rows]
    assert rows == expected
    assert [one["value"] for one in rows[1:3]] == [0, None]
    assert rows[1]["groups"] == {"ap": 0, "eu": 0, "us": None, "xx": None}
    # Go's map of the SDK has no nulls: there they are zeros, by its own reading.
    nulls = 0 if language == "go" else None
    assert typed == [{key: nulls if one is None else one for key, one in row["groups"].items()} for row in expected]
    (plain,) = await results(driver, base_url, usage_call(metric))
    assert [one["value"] for one in plain] == [one["value"] for one in expected]
    assert all(one.get("groups") is None for one in plain)


@pytest.mark.parametrize("language", LANGUAGES)
async def test_groups_page_by_page(programs: Callable[[str], Programs], base_url: str, language: str) -> None:
    """Read two rows at a time, the groups of each day come to the end, once each: also the events without a region.

    A day without usage is one row that is null throughout.
    """
    driver = programs(language).driver
    events = some_events(2)
    metric, customer, *_ = await results(driver, base_url, *CATALOG, *ingests(events))
    asked = {
        "starting_on": day(1),
        "ending_before": day(6),
        "window_size": "DAY",
        "customer_id": customer,
        "billable_metric_id": metric,
    }
    call = {"do": "groups", "params": {**asked, "group_by": {"key": "region"}}, "limit": 2}
    (outcome,) = await make(driver, base_url, call)
    expected = []
    for number in range(1, 6):
        mine = [one for one in events if one.alias == ALIASES[0] and one.at.day == number]
        for region in sorted({one.region for one in mine}, key=lambda one: (one is None, one)) or [None]:
            value = total(one for one in mine if one.region == region)
            expected.append({"start": day(number), "key": "region", "group": region, "value": value})
    if language == "node":
        # The newer form: any number of properties, told in a map.
        newer = {"do": "groups", "params": {**asked, "group_key": ["region"]}, "limit": 3}
        filtered = {**newer, "params": {**newer["params"], "group_filters": {"region": ["eu", "us"]}}}
        whole, part = await results(driver, base_url, newer, filtered)
        assert [one.pop("all").get("region") for one in whole] == [one["group"] for one in expected]
        assert whole == expected
        found = [(one["start"], one["group"], one["value"]) for one in part if one["value"] is not None]
        assert found == [(one["start"], one["group"], one["value"]) for one in expected if one["group"] in {"eu", "us"}]
        for one in outcome["result"]:
            one.pop("all")
    assert outcome["result"] == expected
    assert outcome["requests"] == -(-len(expected) // 2)


@pytest.mark.parametrize("language", LANGUAGES)
async def test_usage_comes_to_the_end(programs: Callable[[str], Programs], base_url: str, language: str) -> None:
    """A month of hours of two customers is more than a page: iterating gives every hour once, in order."""
    driver = programs(language).driver
    events = some_events(3)
    metric, *ids = (await results(driver, base_url, *CATALOG, *ingests(events)))[:3]
    hours, known = await make(
        driver, base_url, usage_call(metric, "HOUR", until=32), {"do": "customers", "limit": 1, "params": {}}
    )
    by_hour = defaultdict(list)
    for one in events:
        by_hour[one.alias, rfc3339(one.at.replace(minute=0, second=0))].append(one)
    expected = [
        (customer, start, total(by_hour[alias, start]))
        for customer, alias in sorted(zip(ids, ALIASES, strict=True))
        for start in (rfc3339(JANUARY + timedelta(hours=number)) for number in range(31 * 24))
    ]
    assert [(one["customer"], one["start"], one["value"]) for one in hours["result"]] == expected
    assert hours["requests"] == 2
    assert [one["id"] for one in known["result"]] == sorted(ids)
    assert known["requests"] == 2


@pytest.mark.parametrize("language", LANGUAGES)
async def test_events_are_found(programs: Callable[[str], Programs], base_url: str, language: str) -> None:
    """A search tells stored events with the customers they count for; one that was never sent is not there."""
    driver = programs(language).driver
    events = some_events(4)
    _, *ids = (await results(driver, base_url, *CATALOG, *ingests(events)))[:3]
    sent = events[:3]
    asked = [one.id for one in sent]
    (found,) = await results(driver, base_url, {"do": "search", "params": {"transactionIds": [*asked, "never"]}})
    of = dict(zip(ALIASES, ids, strict=True))
    assert sorted((one["id"], one["customer"]) for one in found) == sorted((one.id, of[one.alias]) for one in sent)


@pytest.mark.parametrize("language", LANGUAGES)
async def test_errors(programs: Callable[[str], Programs], base_url: str, language: str) -> None:
    """A refusal is the SDK's own error with status and a text that names the field, and is asked for only once.

    Also a conflict, which the SDKs would repeat by themselves were they not told that it is of no use.
    """
    driver = programs(language).driver
    metric, customer, *_ = await results(driver, base_url, *CATALOG)
    nobody = "00000000-0000-4000-8000-000000000000"
    bad_time = {"transaction_id": "a", "customer_id": "a", "event_type": "transfer", "timestamp": "soon"}
    taken = {"name": "Eve", "ingest_aliases": [ALIASES[0]]}
    cases = [
        (usage_call(metric, "WEEK"), 400, "window_size"),
        (usage_call(metric, group_by={"key": "color"}), 400, "group_by"),
        (usage_call(nobody), 404, nobody),
        ({"do": "ingest", "params": [bad_time]}, 400, "[0].timestamp"),
        ({"do": "ingest", "params": []}, 400, "1..100"),
        ({"do": "metric", "params": {"name": "M", "aggregation_type": "SUM"}}, 400, "aggregation_key"),
        ({"do": "name", "params": {"id": nobody}}, 404, nobody),
        ({"do": "name", "params": {"id": "x"}}, 400, "customer_id"),
        ({"do": "customer", "params": taken}, 409, ALIASES[0]),
        # The key of a creation, with other content.
        ({"do": "customer", "params": taken, "key": ALIASES[0]}, 409, customer),
    ]
    outcomes = await make(driver, base_url, *(call for call, _, _ in cases))
    for outcome, (call, status, named) in zip(outcomes, cases, strict=True):
        assert "result" not in outcome, call
        error = outcome["error"]
        assert (error["type"], error["status"], outcome["requests"]) == (TYPES[language][status], status, 1), call
        assert named in error["message"], call


@pytest.mark.parametrize("language", LANGUAGES)
async def test_lost_answers(programs: Callable[[str], Programs], base_url: str, language: str) -> None:
    """Answers to creations, to events and to questions get lost on the way: the SDK asks again, and nothing doubles."""
    driver = programs(language).driver
    events = some_events(5)[:60]
    proxy = Proxy(base_url.removeprefix("http://"))
    made = []
    async with proxy.listening() as address:
        for call in (*CATALOG[:2], *ingests(events), usage_call):
            # The first bytes of the answer break the connection, when the call is done.
            proxy.plan.append(("down", 10))
            one = call(made[0]["result"], "NONE") if callable(call) else call
            made += await make(driver, f"http://{address}", one)
            assert not proxy.plan, "the cut did not come"
    assert [(one["requests"], "error" in one) for one in made] == [(2, False)] * 4
    _, customer, _, read = made
    mine = [one for one in events if one.alias == ALIASES[0]]
    assert [(one["customer"], one["value"]) for one in read["result"]] == [(customer["result"], total(mine))]


@pytest.mark.parametrize("language", LANGUAGES)
async def test_keys(programs: Callable[[str], Programs], database_url: str, database: Database, language: str) -> None:
    """A server with keys answers 401 to another bearer token, which is the SDK's error, and works with a key."""
    driver, key = programs(language).driver, new_api_key()
    async with database.engine.begin() as connection:
        await organizations.create_organization(connection, "acme")
        await organizations.create_api_key(connection, "acme", key.id, "test", key.secret_hash)
    async with running_server(database_url) as client, running_gateway(client.address) as url:
        (refused,) = await make(driver, url, CATALOG[1])
        assert (refused["error"]["type"], refused["error"]["status"]) == (TYPES[language][401], 401)
        assert refused["requests"] == 1
        (made,) = await make(driver, url, CATALOG[1], key=key.text)
        assert made["result"]


@pytest.mark.parametrize("version", ["present", "printed"])
async def test_the_go_program(
    programs: Callable[[str], Programs],
    printed_program: Command | str,
    client: Client,
    base_url: str,
    version: str,
) -> None:
    """Metronome's printed Go program, which asks from now to now, prints the usage of today by customer and metric."""
    if version == "printed" and isinstance(printed_program, str):
        pytest.skip(printed_program)
    program = programs("go").example if version == "present" else printed_program
    metric = await client.create_metric(name="Transfers", aggregation_type="AGGREGATION_TYPE_SUM", aggregation_key="mb")
    sent = {"Ada": ("0.1", "0.2", "12"), "Bob": ("0",)}
    ids = {name: (await client.create_customer(name=name)).id for name in sent}
    # The same usage today and tomorrow: midnight may come while this runs.
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    await client.ingest(
        *(
            event(customer_id=ids[name], at=today + timedelta(days=days), properties={"mb": one})
            for days in (0, 1)
            for name, megabytes in sent.items()
            for one in megabytes
        )
    )
    done = await run(program, base_url)
    assert (done.code, done.errors) == (0, "")
    row = (
        r"BillableMetricID:(\S+) BillableMetricName:Transfers CustomerID:(\S+) "
        r"EndTimestamp:(\S+) 00:00:00 \+0000 UTC StartTimestamp:(\S+) 00:00:00 \+0000 UTC Value:(\S+) Groups:map\[\]"
    )
    found = re.findall(row, "\n".join(done.printed))
    start = datetime.fromisoformat(found[0][3]).replace(tzinfo=UTC)
    assert start in {today, today + timedelta(days=1)}
    days = (f"{start + timedelta(days=1):%Y-%m-%d}", f"{start:%Y-%m-%d}")
    totals = {name: f"{sum(map(Decimal, megabytes))}" for name, megabytes in sent.items()}
    assert found == sorted((metric.id, ids[name], *days, totals[name]) for name in sent)


async def test_the_go_program_fails_loudly(programs: Callable[[str], Programs], database_url: str) -> None:
    """With strict windows the program's bounds are refused, and it says which and why."""
    program = programs("go").example
    async with (
        running_server(database_url, strict_compat_windows=True) as client,
        running_gateway(client.address) as url,
    ):
        done = await run(program, url)
    assert done.code == 2
    assert "400 Bad Request" in done.errors
    assert "starting_on" in done.errors


async def test_the_node_program(programs: Callable[[str], Programs], base_url: str) -> None:
    """Two runs of the Node example print the same exact numbers, no usage where there is none, and the SDK's error."""
    program = programs("node").example
    sent = {
        (number, region): [Decimal(f"{100 * number + 10 * place}.{hour}") for hour in range(24)]
        for number in (1, 2, 3)
        for place, region in enumerate(("EU-Central", "US-East", "US-West"))
    }
    days = [sum(sum(values) for key, values in sent.items() if key[0] == number) for number in (1, 2, 3)]
    regions = ("EU-Central", "US-East", "US-West")
    groups = [sum(sum(values) for key, values in sent.items() if key[1] == region) for region in regions]
    expected = [
        f"sent {24 * len(sent)} events",
        *(f"2026-01-0{number} {value.normalize():f}" for number, value in enumerate(days, 1)),
        "2026-01-04 no usage",
        *(f"{region} {value.normalize():f}" for region, value in zip(regions, groups, strict=True)),
    ]
    for _ in range(2):
        done = await run(program, base_url)
        assert (done.code, done.errors) == (0, "")
        *printed, error = done.printed
        assert printed == expected
        assert error.startswith("BadRequestError: 400 group_key")


async def test_no_gateway(programs: Callable[[str], Programs]) -> None:
    """Where nothing listens, the Node example gives up within seconds, with the address and exit code 1."""
    done = await run(programs("node").example, "http://127.0.0.1:1")
    assert (done.code, done.printed) == (1, [])
    assert done.errors.startswith("failed at http://127.0.0.1:1: ")
    assert len(done.errors.splitlines()) == 1


@pytest.mark.parametrize("name", ["metronome_node/package-lock.json", "metronome_go/go.sum", "metronome_go/go.mod"])
def test_locks_name_no_registry(name: str) -> None:
    """Pinned dependencies are named by version and hash, so that they come from the registry that a user has set."""
    assert "://" not in (EXAMPLES / "clients" / name).read_text()
