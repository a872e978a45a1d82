"""Claims about `metering groups` and `metering report`: against real servers, with files of every kind."""

import asyncio
import io
import itertools
import json
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result
from conftest import Client, running_server
from hypothesis import given
from hypothesis import strategies as st
from marketplace import group as new_group
from marketplace import lease, reported, sell

from metering.v1 import usage_pb2
from metering.v1 import usage_record_group_pb2 as pb
from service.cli import client as cli_client
from service.cli import groups, groups_input, main
from service.domain.windows import cell_floor
from service.store import roll_up as store

EXACT = "123456789012345678901234567890.5"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes from the environment, and waits between tries are too short to notice."""
    for name in ("ADDRESS", "API_KEY", "DATABASE_URL", "PARTNER_RULE"):
        monkeypatch.delenv(f"METERING_{name}", raising=False)
    monkeypatch.setattr(cli_client, "BACKOFF_FIRST_S", 0.01)


async def run(client: Client | str, *arguments: str | Path, stdin: str | bytes = "") -> Result:
    """Run a client command against a server."""
    address = client if isinstance(client, str) else client.address
    command = [*map(str, arguments), "--address", address]
    return await asyncio.to_thread(CliRunner().invoke, main, command, input=stdin)


async def operate(database_url: str, *arguments: str) -> Result:
    """Run an operator command on a database."""
    return await asyncio.to_thread(CliRunner().invoke, main, [*arguments, "--database-url", database_url])


def counts(result: Result) -> dict[str, int]:
    """The totals on stderr."""
    found = re.findall(r"^(accepted|duplicate|conflict|rejected|valid) +(\d+)$", result.stderr, re.MULTILINE)
    return {name: int(number) for name, number in found}


def rows(result: Result) -> list[dict[str, Any]]:
    """The JSON lines on stdout."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def told(result: Result) -> list[str]:
    """The faults on stderr."""
    return [line for line in result.stderr.splitlines() if re.match(r"\S+:\d+(\[\d+\])?: ", line)]


def as_json(group_id: str | None = "g1", entitlement_id: str = "ent", **fields: Any) -> dict[str, Any]:
    """A valid group as JSON; None leaves a field out."""
    found = {"id": group_id, "entitlement_id": entitlement_id, "records": {"cpu": "1"}, **fields}
    return {name: value for name, value in found.items() if value is not None}


def lines(*values: Any) -> str:
    """JSON lines; text is a line as it is."""
    return "".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values)


async def stored(client: Client, group_id: str) -> pb.UsageRecordGroup:
    """A group as the server has it."""
    return (await client.groups.GetUsageRecordGroup(pb.GetUsageRecordGroupRequest(id=group_id))).group  # type: ignore[no-any-return]


class Between(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Stands between client and server: keeps the requests, and deals with answers as told, call by call."""

    def __init__(self, address: str) -> None:
        self.requests: list[bytes] = []
        self.timeouts: list[float | None] = []
        self.plan: Iterator[Callable[[bytes, grpc.ServicerContext], bytes]] = iter(())
        self._address = address

    @contextmanager
    def listening(self, *plan: Callable[[bytes, grpc.ServicerContext], bytes]) -> Iterator[str]:
        """Forward calls; the first of them by the plan."""
        self.plan = iter(plan)
        server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", 4 * 1024 * 1024)])
        server.add_generic_rpc_handlers((self,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with grpc.insecure_channel(self._address) as self._channel:
            yield f"127.0.0.1:{port}"
        server.stop(None).wait()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Forward any unary call."""

        def forward(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.requests.append(request)
            self.timeouts.append(context.time_remaining())
            answer: bytes = self._channel.unary_unary(details.method)(request)
            return next(self.plan, lambda same, _: same)(answer, context)

        return grpc.unary_unary_rpc_method_handler(forward)


def lose(answer: bytes, context: grpc.ServicerContext) -> bytes:
    """The answer is lost on its way, after the server has done its work."""
    context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
    return answer


# ---------------------------------------------------------------- reading files


@pytest.mark.parametrize(
    ("literal", "text"),
    [
        ("0.1", "0.1"),
        ("1.50", "1.50"),
        (EXACT, EXACT),
        ("12345678901234567890", "12345678901234567890"),
        ("1e2", "100"),
        ("1.25E1", "12.5"),
        ("1.5e3", "1500"),
        ("5e-7", "0.0000005"),
        ("0.000000000000000001", "0.000000000000000001"),
        ("1e999", "1e999"),
        ("1e99999999999999999999", "1e99999999999999999999"),
    ],
)
@pytest.mark.parametrize("field", ["records", "billable", "origin", "allocation", "amount"])
def test_numbers_arrive_digit_by_digit(field: str, literal: str, text: str) -> None:
    """A quantity that is a JSON number is taken as its plain decimal text, wherever a quantity can stand."""
    shape, path = {
        "records": ('{"records": {"cpu": NUMBER}}', lambda one: one.records["cpu"]),
        "billable": (
            '{"billable_records": [{"key": "k", "quantity": NUMBER}]}',
            lambda one: one.billable_records[0].quantity,
        ),
        "origin": ('{"meta_info": {"origin_records": {"a": NUMBER}}}', lambda one: one.meta_info.origin_records["a"]),
        "allocation": (
            '{"metaInfo": {"usageAllocations": {"a": {"allocations": [{"quantity": NUMBER}]}}}}',
            lambda one: one.meta_info.usage_allocations["a"].allocations[0].quantity,
        ),
        "amount": ('{"meta_info": {"lago_amount": NUMBER}}', lambda one: one.meta_info.lago_amount),
    }[field]
    (entry,) = read(shape.replace("NUMBER", literal))
    assert entry.group is not None, entry.faults
    assert path(entry.group) == text


def read(text: str | bytes, *, needs_id: bool = False) -> list[groups_input.Entry]:
    """What is read from a file."""
    data = text if isinstance(text, bytes) else text.encode()
    return list(groups_input.read_groups("f", io.BytesIO(data), needs_id=needs_id))


@given(st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,2})?", fullmatch=True))
def test_no_number_changes_its_value(literal: str) -> None:
    """Whatever number JSON can hold, its text has the same value, and no exponent unless it would be endless."""
    text = groups_input.decimal_text(literal)
    assert Decimal(text) == Decimal(literal)
    assert "e" not in text.lower() or abs(Decimal(literal).adjusted()) >= 64
    (entry,) = read(
        '{"billable_records": [{"key": "k", "quantity": 1, "properties": {"n": NUMBER}}]}'.replace("NUMBER", literal)
    )
    assert entry.group is not None, entry.faults
    value = entry.group.billable_records[0].properties["n"]
    assert (Decimal(repr(value)) if isinstance(value, float) else Decimal(value)) == Decimal(literal)


def test_both_forms_of_names_and_times() -> None:
    """Names are snake_case or lowerCamelCase; times have any offset; null is as good as nothing; enums have names."""
    found = [
        {
            "id": "a",
            "entitlement_id": "e",
            "timestamp": "2026-01-31T15:45:00.25+05:30",
            "meta_info": {"erp_invoice_id": "x"},
        },
        {"id": "a", "entitlementId": "e", "timestamp": "2026-01-31T10:15:00.250Z", "metaInfo": {"erpInvoiceId": "x"}},
        {
            "id": "a",
            "entitlementId": "e",
            "timestamp": "2026-01-31t10:15:00.250z",
            "meta_info": {"erpInvoiceId": "x"},
            "records": None,
        },
    ]
    one, *others = (entry.group for entry in read(lines(*found)))
    assert one is not None
    assert others == [one] * 2
    assert (one.timestamp.seconds, one.timestamp.nanos) == (1769854500, 250_000_000)
    meta = {"source": "USAGE_RECORD_GROUP_SOURCE_LAGO", "stripe_usage_record_summary_total_usage": 9007199254740993}
    (entry,) = read(json.dumps({"meta_info": meta}))
    assert entry.group is not None
    assert entry.group.meta_info.stripe_usage_record_summary_total_usage == 9007199254740993
    assert entry.group.meta_info.source == pb.USAGE_RECORD_GROUP_SOURCE_LAGO


FORMS = {
    "lines": lambda values: lines(*values),
    "lines with blanks": lambda values: "\n \n" + "\r\n\r\n".join(map(json.dumps, values)),
    "array": json.dumps,
    "pretty array": lambda values: json.dumps(values, indent=2),
    "objects one after another": lambda values: "\n".join(json.dumps(one, indent=2) for one in values),
    "byte order mark": lambda values: "\ufeff" + lines(*values),
    "byte order mark, array": lambda values: "\ufeff" + json.dumps(values, indent=1),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_file_gives_the_same_groups(form: str) -> None:
    """JSON lines, an array, and objects one after another hold the same groups, in order."""
    values = [as_json(f"g{number}", records={"ü [{": number}) for number in range(4)]
    found = read(FORMS[form](values), needs_id=True)
    assert [entry.faults for entry in found] == [[]] * 4
    assert [entry.group.id for entry in found if entry.group] == ["g0", "g1", "g2", "g3"]


def test_places() -> None:
    """A place is the line where the group begins, and in an array which element it is too."""
    values = [as_json(f"g{number}") for number in range(3)]
    assert [str(entry.place) for entry in read(lines("", *values))] == ["f:2", "f:3", "f:4"]
    assert [str(entry.place) for entry in read("\n" + json.dumps(values))] == ["f:2[0]", "f:2[1]", "f:2[2]"]
    pretty = json.dumps(values, indent=1)
    starts = [number for number, line in enumerate(pretty.splitlines(), 1) if line == " {"]
    assert [str(entry.place) for entry in read(pretty)] == [f"f:{start}[{i}]" for i, start in enumerate(starts)]
    several = "\n\n".join(json.dumps(one, indent=1) for one in values)
    starts = [number for number, line in enumerate(several.splitlines(), 1) if line == "{"]
    assert [str(entry.place) for entry in read(several)] == [f"f:{start}" for start in starts]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[\n{"id": "a"},\n{"id": "b"', 3, "expecting ',' delimiter"),
        ('[\n{"id": "a"},\n{"id": "b"}', 3, "expected ',' or ']'"),
        ('[{"id": "a"}\n{"id": "b"}]', 2, "expected ',' or ']'"),
        ('[{"id": "a"},\n]', 2, "expecting value"),
        ('[{"id": "a"}]\n\n[]', 3, "expected nothing after the array"),
        ("[", 1, "expecting value"),
        ('{\n"id": "a",\n"records": {"ü": }\n}', 3, "expecting value"),
        ('{\n"id": "a",\n"id": "b"\n}', 1, "'id' stands twice"),
        ('[\n{"records": {"cpu": NaN}}]', 2, "NaN is not a JSON value"),
        ("[" * 100_000, 1, "nested too deeply"),
        ("id,records\na,1\n", 1, "expecting value"),
        (b'[\n"\xff"]', 2, "not UTF-8"),
        (b"\x00\xff\xfe", 1, "not UTF-8"),
        ('{"id": "a\n"}', 1, "invalid control character"),
    ],
)
def test_what_is_not_json_is_one_fault(text: str | bytes, line: int, message: str) -> None:
    """A document that breaks off or is not JSON gives no group at all, and tells the line."""
    (entry,) = read(text)
    assert (entry.group, entry.place.line, entry.faults[0].code) == (None, line, "MALFORMED_JSON")
    assert message in entry.faults[0].message


@pytest.mark.parametrize("bad", ["{", '{"id": "x"} garbage', '{"id": "x", "id": "y"}', "nonsense"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_bad_line_stops_no_other(bad: str, at: int) -> None:
    """Of JSON lines, only the bad line is left out, wherever it is."""
    values: list[Any] = [as_json("g1"), as_json("g2")]
    values.insert(at, bad)
    found = read(lines(*values))
    assert [entry.place.line for entry in found if entry.faults] == [at + 1]
    assert [entry.group.id for entry in found if entry.group] == ["g1", "g2"]


@pytest.mark.parametrize(
    ("value", "path", "message"),
    [
        (7, "", "not a JSON object"),
        ([as_json()], "", "not a JSON object"),
        (as_json(nonsense=1), "nonsense", "unknown field; there are id, entitlement_id, records"),
        (as_json(meta_info={"nonsense": 1}), "meta_info.nonsense", "unknown field"),
        (as_json(billable_records=[{"kay": 1}]), "billable_records[0].kay", "unknown field; there are key"),
        (as_json(entitlementId="x"), "entitlementId", "stands twice, as entitlement_id and as entitlementId"),
        (as_json(id=7), "id", "must be a JSON string"),
        (as_json(records=[]), "records", "must be a JSON object"),
        (as_json(records={"a": True}), "records.a", "must be a JSON string or number"),
        (as_json(records={"a": None}), "records.a", "must be a JSON string or number"),
        (as_json(billable_records={}), "billable_records", "must be a JSON array"),
        (as_json(billable_records=[1]), "billable_records[0]", "must be a JSON object"),
        (as_json(meta_info="x"), "meta_info", "must be a JSON object"),
        (as_json(timestamp="2026-01-31T10:00:00"), "timestamp", "has no offset"),
        (as_json(timestamp="2026-02-30T10:00:00Z"), "timestamp", "no such time"),
        (as_json(timestamp=1769854500), "timestamp", "must be a JSON string, an RFC 3339 time"),
        (as_json(meta_info={"source": "API"}), "meta_info.source", "must be one of USAGE_RECORD_GROUP_SOURCE_"),
        (as_json(meta_info={"source": 2}), "meta_info.source", "must be one of USAGE_RECORD_GROUP_SOURCE_"),
        (as_json(meta_info={"source": []}), "meta_info.source", "must be one of USAGE_RECORD_GROUP_SOURCE_"),
        (as_json(meta_info={"skip_validation": 1}), "meta_info.skip_validation", "must be true or false"),
        (as_json(meta_info={"stripe_usage_record_summary_total_usage": 1.5}), "", "stripe_usage_record_summary"),
        (as_json(entitlement_id="\ud800"), "", "surrogate"),
        (as_json(**{"\ud800": 1}), "?", "unknown field"),
    ],
)
def test_what_makes_no_group_is_told(value: Any, path: str, message: str) -> None:
    """What the form of a group rules out is told with its path, and nothing is guessed."""
    text = json.dumps([value])
    (entry,) = read(text)
    assert entry.group is None
    assert [fault.field for fault in entry.faults] == [path]
    assert message in entry.faults[0].message
    entry.faults[0].message.encode()


def test_too_much_for_one_request_is_told() -> None:
    """A group that is nested too deeply or too large for any request is a fault of its own, not of its batch."""
    nested: Any = 1
    for _ in range(47):
        nested = [nested]
    deep = as_json(records=None, billable_records=[{"key": "k", "quantity": 1, "properties": {"n": nested}}])
    wide = as_json(records={f"{number:0128}": "1" for number in range(30_000)})
    deepest = lines(as_json(billable_records=[{"properties": "X"}])).replace('"X"', '{"n":' * 300 + "1" + "}" * 300)
    many = as_json(records={str(number): 1 for number in range(10_001)})
    good, *others = read(lines(as_json("good"), deep, wide, deepest.strip(), many))
    assert good.group is not None
    assert [entry.group for entry in others] == [None] * 4
    for entry, message in zip(others, ("deep", "bytes, too many", "deep", "10,001 records, too many"), strict=True):
        assert message in entry.faults[0].message


def test_ids_are_never_made_up() -> None:
    """Without an id a group is refused where ids are needed, with the reason; else it may be missing."""
    for value in (as_json(None), as_json(""), as_json(id=None)):
        (entry,) = read(lines(value), needs_id=True)
        assert entry.group is None
        (fault,) = entry.faults
        assert (fault.code, fault.field) == ("FIELD_REQUIRED", "id")
        assert "never made up here: it must come from where the usage was measured" in fault.message
        (entry,) = read(lines(value))
        assert entry.group is not None


def test_json_lines_are_read_as_they_come() -> None:
    """Of JSON lines no more is read than asked for, so that a pipe need not end."""
    asked = 0

    class Pipe(io.RawIOBase):
        def readline(self, size: int | None = -1, /) -> bytes:
            nonlocal asked
            asked += 1
            return lines(as_json(f"g{asked}")).encode()

        def __next__(self) -> bytes:
            return self.readline()

    found: Iterator[groups_input.Entry] = groups_input.read_groups("f", Pipe(), needs_id=True)  # type: ignore[arg-type]
    assert [entry.id for entry in itertools.islice(found, 3)] == ["g1", "g2", "g3"]
    assert asked == 3


# ---------------------------------------------------------------- validate and report


async def test_report_stores_and_counts(client: Client, tmp_path: Path) -> None:
    """What is in the files is stored and counted exactly, whatever their form; again, it is a duplicate."""
    await sell(client)
    at = datetime.now(UTC) - timedelta(hours=1)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.json"
    one.write_text(
        '{"id": "a", "entitlement_id": "ent", "records": {"cpu": 0.1, "Memory": 1e2}, "timestamp": "AT"}\n'
        '{"id": "b", "entitlementId": "ent", "records": {"cpu": "0.2"}}\n'.replace("AT", at.isoformat())
    )
    skipped = {"skip_validation": True, "source": "USAGE_RECORD_GROUP_SOURCE_INTERNAL"}
    two.write_text(json.dumps([as_json("c", meta_info=skipped)]).replace('"1"', EXACT))
    result = await run(client, "groups", "report", one, two)
    assert (result.exit_code, result.stdout) == (0, "")
    assert counts(result) == {"accepted": 3, "duplicate": 0, "conflict": 0, "rejected": 0}
    assert (await stored(client, "a")).records == {"cpu": "0.1", "mem": "100"}
    assert (await stored(client, "a")).meta_info.timestamp.ToDatetime(tzinfo=UTC) == at
    assert (await stored(client, "c")).records == {"cpu": EXACT}
    start, end = cell_floor(at) - timedelta(hours=1), cell_floor(datetime.now(UTC)) + timedelta(hours=1)
    request = usage_pb2.ListUsageRequest(window_size="WINDOW_SIZE_NONE")
    request.starting_on.FromDatetime(start)
    request.ending_before.FromDatetime(end)
    windows = (await client.usage.ListUsage(request)).windows
    assert sorted(window.value for window in windows) == ["100", "123456789012345678901234567890.8"]

    again = await run(client, "groups", "report", one, "-", stdin=two.read_text())
    assert (again.exit_code, counts(again)) == (0, {"accepted": 0, "duplicate": 3, "conflict": 0, "rejected": 0})


async def test_report_tells_every_fault(client: Client, tmp_path: Path) -> None:
    """A fault is told with file and line, id, code, path and reason, and stops nothing; the exit code is 1."""
    await sell(client)
    await reported(client, new_group("old", records={"cpu": "1"}))
    file = tmp_path / "some groups.jsonl"
    file.write_text(
        lines(
            as_json("good"),
            '{"id": "broken", ',
            as_json("unknown", "nobody", records={"cpu": "-1", "disk": "0"}),
            as_json("old", records={"cpu": 2}),
            as_json(None),
            as_json("field", quantity=3),
            as_json("esc\x1b[2J", "nobody"),
            as_json("good", records={"cpu": "7"}),
        )
    )
    result = await run(client, "groups", "report", file)
    assert result.exit_code == 1
    assert counts(result) == {"accepted": 1, "duplicate": 0, "conflict": 2, "rejected": 5}
    found = [line.removeprefix(f"{file}:") for line in result.stderr.splitlines() if line.startswith(str(file))]
    assert [line.split(":", 2)[:2] for line in found] == [
        ["2", " REJECTED (no id) MALFORMED_JSON"],
        ["3", " REJECTED unknown QUANTITY_INVALID records.cpu"],
        ["3", " REJECTED unknown ENTITLEMENT_NOT_FOUND entitlement_id"],
        ["4", " CONFLICT old IDEMPOTENCY_CONFLICT id"],
        ["5", " REJECTED (no id) FIELD_REQUIRED id"],
        ["6", " REJECTED field FIELD_INVALID quantity"],
        ["7", " REJECTED esc\\x1b[2J FIELD_INVALID id"],
        ["7", " REJECTED esc\\x1b[2J ENTITLEMENT_NOT_FOUND entitlement_id"],
        ["8", " CONFLICT good IDEMPOTENCY_CONFLICT id"],
    ]
    assert "not valid JSON: expecting property name" in found[0]
    assert "see ListEntitlements" in found[2]
    assert "\x1b" not in result.output


async def test_validate_finds_the_same_and_stores_nothing(client: Client, tmp_path: Path) -> None:
    """`validate` tells what `report` would refuse, in terms of the files, needs no ids, and leaves nothing behind."""
    await sell(client)
    file = tmp_path / "groups.json"
    values = [as_json("a"), as_json("b", records={"disk": 1}), as_json("a"), as_json(None), as_json(None)]
    file.write_text(json.dumps(values))
    result = await run(client, "groups", "validate", file)
    assert (result.exit_code, counts(result)) == (1, {"valid": 2, "rejected": 3})
    unknown, twice, same = (line.split(": ", 3) for line in result.stderr.splitlines() if line.startswith(str(file)))
    assert unknown[:2] == [f"{file}:1[1]", "REJECTED b DIMENSION_UNKNOWN records.disk"]
    assert twice[:2] == [f"{file}:1[2]", "REJECTED a DUPLICATE_ITEM id"]
    assert twice[2] == f"is also the id of {file}:1[0]; every group of a batch needs its own"
    assert same[:2] == [f"{file}:1[4]", "REJECTED (no id) DUPLICATE_ITEM id"]
    assert f"and {file}:1[3] has the same content" in same[2]
    request = pb.ListUsageRecordGroupsRequest()
    assert not (await client.groups.ListUsageRecordGroups(request)).usage_record_groups
    fine = await run(client, "groups", "validate", "-", stdin=json.dumps(as_json(None), indent=2))
    assert (fine.exit_code, counts(fine)) == (0, {"valid": 1, "rejected": 0})


async def test_validate_knows_ids_of_other_batches(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """That an id stands twice is found however far apart, each fault told once."""
    monkeypatch.setattr(groups, "GROUPS_MAX", 2)
    await sell(client)
    values = [as_json("a"), as_json("b"), as_json("a"), as_json("c"), as_json("c")]
    result = await run(client, "groups", "validate", "-", stdin=lines(*values, as_json("c")))
    assert counts(result) == {"valid": 3, "rejected": 3}
    assert [line.rpartition(": ")[2] for line in told(result)] == [
        "is also the id of -:1; every group needs its own",
        "is also the id of -:4; every group needs its own",
        "is also the id of -:5; every group of a batch needs its own",
    ]


async def test_json_has_every_group(client: Client, tmp_path: Path) -> None:
    """JSON is a line per group, in order: where it stands, its verdict, all faults, and what is stored of it."""
    await sell(client)
    file = tmp_path / "groups.json"
    file.write_text(
        json.dumps([as_json("a", records={"cpu": 1.5}), as_json("b", nonsense=1), as_json("c", "nobody")], indent=1)
    )
    result = await run(client, "groups", "report", file, "--format", "json")
    assert (result.exit_code, told(result)) == (1, [])
    assert counts(result)["rejected"] == 2
    one, two, three = rows(result)
    assert {name: value for name, value in one.items() if name != "group"} == {
        "file": str(file),
        "line": 2,
        "element": 0,
        "id": "a",
        "verdict": "ACCEPTED",
        "violations": [],
        "violation_count": 0,
    }
    assert {name: one["group"][name] for name in ("id", "partner", "records", "status", "reported_time")} == {
        "id": "a",
        "partner": "PARTNER_AWS",
        "records": {"cpu": "1.5"},
        "status": "USAGE_RECORD_GROUP_STATUS_CREATED",
        "reported_time": None,
    }
    assert (two["verdict"], two["group"], two["violation_count"]) == ("REJECTED", None, 1)
    assert two["violations"][0]["field"] == "nonsense"
    assert three["violations"][0]["code"] == "ENTITLEMENT_NOT_FOUND"
    valid = rows(await run(client, "groups", "validate", file, "--format", "json"))
    assert [(row["verdict"], "group" in row) for row in valid] == [("VALID", False), *[("REJECTED", False)] * 2]


async def test_many_faults_are_counted(client: Client) -> None:
    """Text tells the first faults and how many more there are, those too that the server only counts."""
    await sell(client)
    wrong = as_json("w", records={f"k{number}": "1" for number in range(60)})
    result = await run(client, "groups", "validate", "-", stdin=json.dumps(wrong))
    assert (result.exit_code, len(told(result))) == (1, 20)
    assert "… and 40 more; --format json tells more" in result.stderr


@pytest.mark.parametrize("command", ["validate", "report"])
@pytest.mark.parametrize("text", ["", "\n \n", "[]", "[ ]\n"])
async def test_a_file_without_groups_is_told(client: Client, tmp_path: Path, command: str, text: str) -> None:
    """Nothing to send is no failure, as an hour without usage is none; but it is told."""
    file = tmp_path / "empty"
    file.write_text(text)
    result = await run(client, "groups", command, file)
    assert (result.exit_code, f"{file} holds no groups" in result.stderr) == (0, True)
    assert not any(counts(result).values())


@pytest.mark.parametrize("command", ["validate", "report"])
@pytest.mark.parametrize("arguments", [[], ["nowhere.json"], ["."], ["-", "--format", "csv"]])
async def test_wrong_usage_of_files(command: str, arguments: list[str]) -> None:
    """No file, one that is not there, a directory or an unknown format: exit code 2, before any call."""
    assert (await run("localhost:1", "groups", command, *arguments)).exit_code == 2


async def test_batches_are_what_the_server_takes(client: Client) -> None:
    """Any number of groups goes out, each once: 1,000, 10,000 records and 3 MiB at most at once, under the deadline."""
    await sell(client)
    between = Between(client.address)
    values = [as_json(f"g{number}") for number in range(2001)]
    with between.listening() as address:
        result = await run(address, "groups", "report", "-", "--timeout", "25", stdin=lines(*values))
        assert (result.exit_code, counts(result)["accepted"]) == (0, 2001)
        sent = [pb.ReportUsageRecordGroupsRequest.FromString(one).groups for one in between.requests]
        assert [len(one) for one in sent] == [1000, 1000, 1]
        assert [one.id for batch in sent for one in batch] == [one["id"] for one in values]
        assert all(left is not None and left < 26 for left in between.timeouts)
        between.requests.clear()
        large = [as_json(f"l{number}", meta_info={"erp_invoice_id": "x" * 400_000}) for number in range(20)]
        result = await run(address, "groups", "validate", "-", stdin=json.dumps(large))
        assert counts(result) == {"valid": 0, "rejected": 20}
        assert [len(one) < 3 * 1024 * 1024 for one in between.requests] == [True] * 3
        between.requests.clear()
        full = [as_json(f"f{number}", records={f"k{key}": 1 for key in range(150)}) for number in range(100)]
        result = await run(address, "groups", "validate", "-", stdin=lines(*full))
        assert counts(result) == {"valid": 0, "rejected": 100}
        sent = [pb.BatchValidateUsageRecordGroupsRequest.FromString(one).groups for one in between.requests]
        assert [len(one) for one in sent] == [66, 34]


async def test_a_lost_answer_counts_once(client: Client) -> None:
    """When answers are lost the same groups are sent again: each counts once, and shows as duplicate."""
    await sell(client)
    between = Between(client.address)
    with between.listening(lose, lose) as address:
        result = await run(address, "groups", "report", "-", stdin=lines(as_json("a"), as_json("b")))
    assert (result.exit_code, counts(result)["duplicate"], len(between.requests)) == (0, 2, 3)
    assert len(set(between.requests)) == 1
    assert result.stderr.count("UNAVAILABLE: sending again in ") == 2
    listed = (await client.groups.ListUsageRecordGroups(pb.ListUsageRecordGroupsRequest())).usage_record_groups
    assert sorted(one.id for one in listed) == ["a", "b"]


@pytest.mark.parametrize("command", ["validate", "report"])
async def test_an_answer_that_makes_no_sense_is_told(client: Client, command: str) -> None:
    """An answer without a result for each group ends the run with exit code 3, and is not taken for success."""
    await sell(client)
    with Between(client.address).listening(lambda answer, context: b"") as address:
        result = await run(address, "groups", command, "-", stdin=lines(as_json("a")))
    assert (result.exit_code, "one result to each of 1 groups" in result.stderr) == (3, True)
    assert not any(counts(result).values())


@pytest.mark.parametrize("command", [["report", "-"], ["validate", "-"], ["list"]])
async def test_no_server_is_told(tmp_path: Path, command: list[str]) -> None:
    """Nobody listening: exit code 3, what was done, and what to try; after --retry-for, where it is safe to retry."""
    address = f"unix:{tmp_path}/none.sock"
    retry = [] if command == ["list"] else ["--retry-for", "0.2"]
    result = await run(address, "groups", *command, *retry, stdin=lines(as_json()))
    assert (result.exit_code, f"hint: is the server running at {address}?" in result.stderr) == (3, True)
    assert ("stopped: 0 groups were answered" in result.stderr) == (command != ["list"])
    assert ("sending again" in result.stderr) == (command != ["list"])
    assert "Traceback" not in result.output


async def test_ctrl_c_tells_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the run with exit code 130, the totals, and that it may be repeated."""

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(groups, "sleep", interrupt)
    result = await run(f"unix:{tmp_path}/none.sock", "groups", "report", "-", stdin=lines(as_json()))
    assert (result.exit_code, counts(result)["accepted"]) == (130, 0)
    assert "Running the same command again is safe" in result.stderr


async def test_a_refused_call_is_not_repeated(database_url: str, client: Client) -> None:
    """A missing key is told at once: it would be refused again."""
    await sell(client)
    made = await operate(database_url, "keys", "create", "--role", "ingest", "--role", "read")
    assert made.exit_code == 0
    key = made.stdout.strip()
    async with running_server(database_url) as locked:
        result = await run(locked, "groups", "report", "-", stdin=lines(as_json()))
        assert (result.exit_code, "hint: give an API key" in result.stderr) == (3, True)
        assert "sending again" not in result.stderr
        result = await run(locked, "groups", "report", "-", "--api-key", key, stdin=lines(as_json()))
        assert (result.exit_code, counts(result)["accepted"]) == (0, 1)
        forbidden = as_json("g2", meta_info={"skip_validation": True})
        result = await run(locked, "groups", "report", "-", "--api-key", key, stdin=lines(forbidden))
        assert (result.exit_code, "SKIP_VALIDATION_FORBIDDEN" in result.stderr) == (1, True)


# ---------------------------------------------------------------- list


@pytest.fixture
async def many(client: Client) -> Client:
    """Groups that differ in everything that a list can ask for."""
    await sell(client, "aws")
    await sell(client, "gcp", partner="GCP")
    await reported(
        client,
        new_group("a1", "aws"),
        new_group("a2", "aws", {"CPU hours": "2.5", "mem": "7"}, meta_info={"erp_invoice_id": "inv-7"}),
        new_group("a3", "aws", meta_info={"source": "USAGE_RECORD_GROUP_SOURCE_LAGO", "lago_amount": "1.5"}),
        new_group("g1", "gcp", meta_info={"source": "USAGE_RECORD_GROUP_SOURCE_NONE"}),
    )
    await client.groups.DeleteUsageRecordGroup(pb.DeleteUsageRecordGroupRequest(id="a1"))
    return client


TODAY = datetime.now(UTC).date()


def day(days: int) -> str:
    """A day, so many from today; tests may run over midnight."""
    return (TODAY + timedelta(days=days)).isoformat()


FILTERS: list[tuple[list[str], list[str]]] = [
    ([], ["g1", "a3", "a2", "a1"]),
    (["--partner", "AWS"], ["a3", "a2", "a1"]),
    (["--partner", "gcp"], ["g1"]),
    (["--product", "p-gcp"], ["g1"]),
    (["--entitlement", "aws"], ["a3", "a2", "a1"]),
    (["--buyer", "b-aws"], ["a3", "a2", "a1"]),
    (["--buyer", "nobody"], []),
    (["--status", "created"], ["g1", "a3", "a2"]),
    (["--status", "DELETED"], ["a1"]),
    (["--status", "REPORT_FAILED"], []),
    (["--source", "lago"], ["a3"]),
    (["--source", "NONE"], ["g1"]),
    (["--source", "API", "--status", "CREATED", "--entitlement", "aws"], ["a2"]),
    (["--meta-info", "erp_invoice_id=inv-7"], ["a2"]),
    (["--meta-info", '{"origin_records": {"CPU hours": "2.5"}}'], ["a2"]),
    (["--from", day(-1)], ["g1", "a3", "a2", "a1"]),
    (["--from", day(-1), "--to", day(2)], ["g1", "a3", "a2", "a1"]),
    (["--from", day(-40), "--to", day(0)], []),
    (["--to", day(-1)], []),
    (["--skip", "1"], ["a3", "a2", "a1"]),
    (["--skip", "3"], ["a1"]),
    (["--skip", "9"], []),
    (["--limit", "2"], ["g1", "a3"]),
    (["--skip", "1", "--limit", "2"], ["a3", "a2"]),
]


@pytest.mark.parametrize("page", [1, 3, 1000])
async def test_list_filters(many: Client, monkeypatch: pytest.MonkeyPatch, page: int) -> None:
    """Each filter narrows the list as it says, the newest first, over however many pages."""
    monkeypatch.setattr(groups, "PAGE_SIZE_MAX", page)
    for options, ids in FILTERS:
        result = await run(many, "groups", "list", *options, "--format", "json")
        assert result.exit_code == 0, result.stderr
        assert [row["id"] for row in rows(result)] == ids, options
        assert ("there are more" in result.stderr) == ("--limit" in options), options


async def test_list_asks_for_whole_days(client: Client) -> None:
    """--from and --to are half-open as everywhere: the API's last day is the one before --to."""
    between = Between(client.address)
    with between.listening() as address:
        await run(address, "groups", "list", "--from", "2026-01-01", "--to", "2026-02-01")
        await run(address, "groups", "list")
    asked, plain = map(pb.ListUsageRecordGroupsRequest.FromString, between.requests)
    assert (asked.start_date, asked.end_date, asked.HasField("source")) == ("2026-01-01", "2026-01-31", False)
    assert (plain.start_date, plain.end_date, plain.page_size) == ("", "", 1000)


@pytest.mark.parametrize(
    "options",
    [
        ["--partner", "ALIBABA"],
        ["--status", "unspecified"],
        ["--source", "nonsense"],
        ["--from", "yesterday"],
        ["--from", "2026-02-30"],
        ["--to", "2026-01-01T00:00:00Z"],
        ["--to", "0001-01-01"],
        ["--from", "2026-01-02", "--to", "2026-01-02"],
        ["--skip", "-1"],
        ["--limit", "0"],
        ["--partner", "AWS", "--buyer", "b"],
        ["--product", "p", "--entitlement", "e"],
    ],
)
async def test_bad_filters_are_found_before_any_call(options: list[str]) -> None:
    """What cannot be meant is a usage error, exit code 2."""
    assert (await run("localhost:1", "groups", "list", *options)).exit_code == 2


async def test_a_filter_that_only_the_server_knows_is_told(client: Client) -> None:
    """What the server refuses is told with its field, exit code 3."""
    result = await run(client, "groups", "list", "--meta-info", "nonsense=1")
    assert (result.exit_code, "INVALID_ARGUMENT" in result.stderr, "meta_info" in result.stderr) == (3, True, True)


async def test_list_as_json(many: Client) -> None:
    """A line per group with every field of the API's message, under the API's names; null is what is not known."""
    result = await run(many, "groups", "list", "--format", "json", "--meta-info", "erp_invoice_id=inv-7")
    (row,) = rows(result)
    assert list(row) == [one.name for one in pb.UsageRecordGroup.DESCRIPTOR.fields]
    assert row["records"] == {"cpu": "2.5", "mem": "7"}
    assert row["meta_info"]["origin_records"] == {"CPU hours": "2.5", "mem": "7"}
    assert (row["status"], row["reported_time"]) == ("USAGE_RECORD_GROUP_STATUS_CREATED", None)


async def test_list_as_a_table(many: Client) -> None:
    """A row per group, whole ids and exact quantities, and nothing that steers a terminal; more is told."""
    await reported(many, new_group("esc[2J", "aws", {"cpu": "0.000000000000000001"}))
    result = await run(many, "groups", "list", "--limit", "3")
    text = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert text[0] == ["id", "created", "(UTC)", "buyer", "entitlement", "partner", "status", "records"]
    assert [[row[0], *row[3:]] for row in text[2:]] == [
        ["esc[2J", "b-aws", "aws", "AWS", "CREATED", "cpu", "0.000000000000000001"],
        ["g1", "b-gcp", "gcp", "GCP", "CREATED", "cpu", "1"],
        ["a3", "b-aws", "aws", "AWS", "CREATED", "cpu", "1"],
    ]
    assert result.stderr == "stopped after 3; there are more (see --limit)\n"
    none = await run(many, "groups", "list", "--status", "INVALID")
    assert (none.exit_code, none.stdout) == (0, "No groups found.\n")


async def test_a_table_shows_the_first_records(client: Client) -> None:
    """A group of many records shows some of them, and how many more there are."""
    dimensions = [{"key": f"d{number:02}"} for number in range(10)]
    await sell(client, dimensions=dimensions)
    await reported(client, new_group("g", records={one["key"]: "1" for one in dimensions}))
    text = " ".join((await run(client, "groups", "list")).stdout.split())
    assert ("d07 1" in text, "d08" in text, "and 2 more" in text) == (True, False, True)


# ---------------------------------------------------------------- report --hour


async def sold(client: Client, *entitlements: str) -> datetime:
    """Sell, and report a group in the hour before the last one; returns that hour."""
    hour = cell_floor(datetime.now(UTC)) - timedelta(hours=2)
    for name in entitlements:
        await sell(client, name)
        await reported(client, new_group(f"g-{name}", name, {"cpu": "2.5"}, at=hour + timedelta(minutes=59)))
    return hour


@pytest.fixture
async def quiet(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    """A server that makes no reports by itself."""

    async def nothing(self: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("service.reporting.Reporting.run", nothing)
    async with running_server(database_url) as client:
        yield client


async def test_report_makes_the_reports_of_an_hour(quiet: Client, database_url: str) -> None:
    """Each entitlement's records of the hour become one report, told as it is made; repeated, it changes nothing."""
    hour = await sold(quiet, "one", "two")
    result = await operate(database_url, "report", "--hour", f"{hour:%Y-%m-%dT%H}")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "     1  organization default  entitlement one",
        "     2  organization default  entitlement two",
        f"2 reports of the hour {hour:%Y-%m-%dT%H:00:00Z} made.",
    ]
    first = await lease(quiet, "t", max_reports=100)
    assert [one.marketplace_time.ToDatetime(tzinfo=UTC) for one in first] == [hour] * 2
    assert [[record.quantity for record in one.records] for one in first] == [["2"]] * 2
    for form in ("%Y-%m-%dT%H", "%Y-%m-%dT%HZ", "%Y-%m-%dT%H:00Z", "%Y-%m-%dT%H:00:00Z"):
        again = await operate(database_url, "report", "--hour", hour.strftime(form))
        assert (again.exit_code, again.stdout.startswith("No report of the hour ")) == (0, True)
    assert await lease(quiet, "t", max_reports=100) == first


async def test_report_takes_the_last_hour_by_default(quiet: Client, database_url: str) -> None:
    """Without --hour the hour that ended last is meant, and takes what is older along, but nothing of this hour."""
    hour = await sold(quiet, "one")
    await reported(quiet, new_group("now", "one", at=datetime.now(UTC)))
    before = cell_floor(datetime.now(UTC))
    result = await operate(database_url, "report")
    assert result.exit_code == 0, result.output
    (made,) = await lease(quiet, "t")
    if cell_floor(datetime.now(UTC)) == before:  # else the hour ended meanwhile
        assert made.marketplace_time.ToDatetime(tzinfo=UTC) == hour + timedelta(hours=1)
        assert result.stdout.endswith(f"1 report of the hour {hour + timedelta(hours=1):%Y-%m-%dT%H:00:00Z} made.\n")
        assert (await stored(quiet, "now")).status == pb.USAGE_RECORD_GROUP_STATUS_CREATED
        assert made.group_count == 1


@pytest.mark.parametrize("ahead", [0, 1, 24 * 400])
async def test_an_hour_that_has_not_ended_is_refused(database_url: str, ahead: int) -> None:
    """The running hour and those to come cannot be told to a marketplace yet."""
    hour = cell_floor(datetime.now(UTC)) + timedelta(hours=ahead + 1)
    hour -= timedelta(hours=1) if datetime.now(UTC).minute < 59 else timedelta()
    result = await operate(database_url, "report", "--hour", f"{hour:%Y-%m-%dT%H}")
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert f"the hour {hour:%Y-%m-%dT%H} (UTC) has not ended" in said
    assert "the last hour that ended is" in said


@pytest.mark.parametrize(
    "arguments", [("--hour", "10"), ("--hour", "2026-01-31"), ("--partner-rule", "AWS.nonsense=1")]
)
async def test_bad_options_of_report(database_url: str, arguments: tuple[str, ...]) -> None:
    """What is no hour or no rule is a usage error."""
    assert (await operate(database_url, "report", *arguments)).exit_code == 2


async def test_report_goes_by_the_rules_given(quiet: Client, database_url: str) -> None:
    """--partner-rule says what the marketplace takes: here, one decimal place."""
    hour = await sold(quiet, "one")
    result = await operate(
        database_url, "report", "--hour", f"{hour:%Y-%m-%dT%H}", "--partner-rule", "AWS.reported_places=1"
    )
    assert result.exit_code == 0
    (made,) = await lease(quiet, "t")
    assert [(record.quantity, record.decimal_parts_after) for record in made.records] == [("2.5", "0")]


async def test_a_report_that_fails_is_told(quiet: Client, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entitlement whose report fails keeps no other from its own, and makes the exit code 1."""
    hour = await sold(quiet, "bad", "good")
    original = store.roll_up

    async def failing(connection: Any, organization: str, entitlement_id: str, *rest: Any) -> uuid.UUID | None:
        if entitlement_id == "bad":
            raise ArithmeticError("out of range")
        return await original(connection, organization, entitlement_id, *rest)

    monkeypatch.setattr("service.store.roll_up.roll_up", failing)
    result = await operate(database_url, "report", "--hour", f"{hour:%Y-%m-%dT%H}")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("1 report of the hour ")
    assert "Records still wait for a report of the hour" in result.stderr
    assert "under the entitlements bad of default" in result.stderr
    assert "out of range" in result.stderr


async def test_a_database_that_is_not_there_is_told(tmp_path: Path) -> None:
    """No database: one line, exit code 1."""
    result = await operate(f"postgresql://metering@/metering?host={tmp_path}", "report")
    assert (result.exit_code, result.stderr.startswith("Error: ")) == (1, True)
