"""Which usage record groups are taken, with every fault of those that are not, and what becomes of those that are.

One table of cases is validated and then reported over the wire, so each row is a claim about both. Rules that need a
clock of their own are asked of the domain's function, which is the one that the server asks.
"""

import asyncio
import itertools
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

import grpc
import pytest
import sqlalchemy as sa
from conftest import Client, event, running_server, timestamp
from faults import fault_of, until
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st
from marketplace import group, report, reported, sell, validate
from sqlalchemy.ext.asyncio import create_async_engine

from metering.v1 import (
    billable_metric_pb2,
    entitlement_pb2,
    error_reason_pb2,
    event_pb2,
    usage_pb2,
    usage_record_group_pb2,
)
from service.auth import new_api_key
from service.database import Database
from service.domain.entitlements import Dimension, Entitlement, EntitlementStatus, StatusChange
from service.domain.partners import DEFAULT_RULES, SKEW, Partner, with_changes
from service.domain.record_groups import Circumstances, NewGroup, violations
from service.domain.roles import Role
from service.errors import Reason
from service.postgres import EmbeddedPostgres
from service.store import organizations
from service.store.tables import organizations as organizations_table
from service.store.tables import usage_events, usage_record_groups, usage_records
from service.verify import Finding, verify_cells

New = usage_record_group_pb2.NewUsageRecordGroup
Faults = list[tuple[str, str]]

ACCEPTED, DUPLICATE, CONFLICT, REJECTED = (
    event_pb2.VERDICT_ACCEPTED,
    event_pb2.VERDICT_DUPLICATE,
    event_pb2.VERDICT_CONFLICT,
    event_pb2.VERDICT_REJECTED,
)
MICROSECOND = timedelta(microseconds=1)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
BATCH_BYTES = 3 * 1024 * 1024

# Names as hard as they come: one of two dimensions, one that is another's key, one that is missing.
DIMENSIONS = (
    {"key": "cpu", "name": "CPU hours"},
    {"key": "mem", "name": "Memory"},
    {"key": "a", "name": "Twin"},
    {"key": "b", "name": "Twin"},
    {"key": "x", "name": "y"},
    {"key": "y", "name": "Why"},
    {"key": "unnamed"},
)
FILTERS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "requests": [
        {"name": "region", "in_values": ["us", "eu"]},
        {"name": "tier", "exists": True},
        {"name": "debug", "exists": False},
        {"name": "env", "not_in_values": ["test"]},
    ],
    "sized": [{"name": "size", "in_values": ["60", "1.5", "true", "[1, 2]", '{"b": 1, "aa": null}', "-0.001"]}],
    "strict": [
        {"name": "env", "exists": True, "not_in_values": ["test"]},
        {"name": "zone", "in_values": ["a", "b"], "not_in_values": ["b"]},
    ],
    "any": [{"name": "p", "exists": True}],
    "counted": [{"name": "quantity", "exists": True}],
    "bare": [],
    "archived": [],
    "foreign": [],
}
GOOD = {"region": "us", "tier": "gold"}


# --- The world in which the table is judged


@dataclass
class World:
    """What is sold, and when the entitlements' states changed."""

    now: datetime
    since: dict[str, list[datetime]] = field(default_factory=dict)


Make = Callable[[World], New]


class Case(NamedTuple):
    """A group, and all its faults: codes with the paths relative to the group."""

    name: str
    make: Make
    faults: Faults


async def set_status(client: Client, entitlement_id: str, status: str) -> entitlement_pb2.Entitlement:
    """Bring an entitlement into a state."""
    changed = entitlement_pb2.Entitlement(
        id=entitlement_id,
        status=status,  # type: ignore[arg-type]  # protobuf takes the names of enum values
    )
    request = entitlement_pb2.UpdateEntitlementRequest(entitlement=changed)
    return (await client.entitlements.UpdateEntitlement(request)).entitlement  # type: ignore[no-any-return]


async def build_world(client: Client) -> World:
    """Sell everything that the table needs, and let its states change."""
    world = World(datetime.now(UTC))
    for key, filters in FILTERS.items():
        made = await client.create_metric(key=key, property_filters=filters)
        if key == "archived":
            request = billable_metric_pb2.ArchiveBillableMetricRequest(id=made.id)
    allowed = [key for key in FILTERS if key != "foreign"]
    for name, partner in (("aws", "AWS"), ("azure", "AZURE"), ("gcp", "GCP")):
        await sell(client, name, partner=partner, dimensions=DIMENSIONS, billable_metric_keys=allowed)
    await client.metrics.ArchiveBillableMetric(request)
    wide = [{"key": f"d{i:03}"} for i in range(200)]
    await sell(client, "wide", dimensions=wide)
    term: dict[str, Any] = {"starting_on": timestamp(world.now - 10 * DAY), "ending_before": timestamp(world.now - DAY)}
    await sell(client, "ended", partner="GCP", **term)
    for name, first, *states in (
        ("suspended", "ACTIVE", "SUSPENDED"),
        ("resumed", "ACTIVE", "SUSPENDED", "ACTIVE"),
        ("ending", "ACTIVE", "PENDING_CANCEL"),
        ("cancelled", "ACTIVE", "CANCELLED"),
        ("deleted", "ACTIVE", "CANCELLED", "DELETED"),
        ("waiting", "PENDING_START"),
        ("begun", "PENDING_START", "ACTIVE"),
    ):
        sold = await sell(client, name, partner="GCP", dimensions=DIMENSIONS, status=f"ENTITLEMENT_STATUS_{first}")
        for state in states:
            sold = await set_status(client, name, f"ENTITLEMENT_STATUS_{state}")
        world.since[name] = [one.since.ToDatetime(UTC) for one in sold.status_changes]
        assert len(world.since[name]) == len(states) + 1
    return world


def faults_of(found: Any) -> Faults:
    """The codes and paths of a result, sorted, the paths relative to its group."""
    prefix = f"groups[{found.index}]."
    assert found.violation_count >= len(found.violations)
    for one in found.violations:
        assert one.field.startswith(prefix), one
        assert one.message, one
    names = [error_reason_pb2.ErrorReason.Name(one.code).removeprefix("ERROR_REASON_") for one in found.violations]
    return sorted(zip(names, (one.field.removeprefix(prefix) for one in found.violations), strict=True))


def batches(groups: Sequence[New], most: int = 60) -> Iterable[Sequence[New]]:
    """Cut groups into batches that fit a request."""
    batch: list[New] = []
    size = 0
    for one in groups:
        if batch and (len(batch) == most or size + one.ByteSize() > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(one)
        size += one.ByteSize()
    yield batch


async def stored_counts(database: Database) -> dict[str, int]:
    """How many rows the tables hold that a report writes."""
    async with database.engine.connect() as connection:
        return {
            table.name: (await connection.execute(sa.select(sa.func.count()).select_from(table))).scalar_one()
            for table in (usage_record_groups, usage_records, usage_events)
        }


# --- Groups in few words


def v1(records: Mapping[str, str] | None = None, entitlement_id: str = "aws", **fields: Any) -> Make:
    """A group of records, one unit of cpu by default; a callable `at` is asked for the time."""

    def make(world: World) -> New:
        given = {"records": {"cpu": "1"} if records is None else records, **fields}
        if callable(given.get("at")):
            given["at"] = given["at"](world)
        return group("", entitlement_id, **given)

    return make


def v2(*records: Mapping[str, Any], entitlement_id: str = "aws", **fields: Any) -> Make:
    """A group of billable records."""
    return v1({}, entitlement_id, billable_records=records, **fields)


def used(key: str, quantity: str = "1", /, **properties: Any) -> dict[str, Any]:
    """A billable record."""
    return {"key": key, "properties": properties, "quantity": quantity}


def allocated(*parts: Any) -> dict[str, Any]:
    """Allocations: quantities, or quantities with their tags."""
    pairs = [(part, ()) if isinstance(part, str) else part for part in parts]
    return {
        "allocations": [
            {"quantity": quantity, "tags": [{"key": key, "value": value} for key, value in tags]}
            for quantity, tags in pairs
        ]
    }


def tagged(*tags: tuple[str, str]) -> Make:
    """A unit of cpu for one allocation with these tags."""
    return v1(meta_info={"usage_allocations": {"cpu": allocated(("1", tags))}})


def split(records: Mapping[str, str], entitlement_id: str = "aws", /, **parts: Any) -> Make:
    """A group of records with allocations."""
    return v1(records, entitlement_id, meta_info={"usage_allocations": parts})


def ago(delta: timedelta) -> Callable[[World], datetime]:
    """A time before the world was built."""
    return lambda world: world.now - delta


def since(name: str, change: int, delta: timedelta = timedelta()) -> Make:
    """A group of an entitlement at the moment when it came into one of its states, or near it."""
    return v1(entitlement_id=name, at=lambda world: world.since[name][change] + delta)


def at_raw(seconds: int, nanos: int = 0) -> Make:
    """A group at a moment that need not be one."""

    def make(world: World) -> New:
        made = v1()(world)
        made.timestamp.CopyFrom(Timestamp(seconds=seconds, nanos=nanos))
        return made

    return make


def named(group_id: str, quantity: str) -> Make:
    """A group with an id of its own."""

    def make(world: World) -> New:
        made = v1({"cpu": quantity})(world)
        made.id = group_id
        return made

    return make


# --- The table

FAULTLESS: Faults = []
NOT_ACTIVE = [("ENTITLEMENT_NOT_ACTIVE", "entitlement_id")]
EXCLUSIVE = [("RECORDS_EXCLUSIVE", "records")]
MISMATCH = "PROPERTIES_MISMATCH"
CPU_INVALID = [("QUANTITY_INVALID", "records.cpu")]
ALLOCATIONS = "meta_info.usage_allocations"
PART = f"{ALLOCATIONS}.cpu.allocations[0]"

ENTITLEMENTS = [
    Case("an entitlement that exists", v1(), FAULTLESS),
    Case("no entitlement", v1(entitlement_id=""), [("FIELD_REQUIRED", "entitlement_id")]),
    Case("an unknown entitlement", v1(entitlement_id="nobody"), [("ENTITLEMENT_NOT_FOUND", "entitlement_id")]),
    Case("an id in other letters", v1(entitlement_id="AWS"), [("ENTITLEMENT_NOT_FOUND", "entitlement_id")]),
    Case("ending, not ended", v1(entitlement_id="ending"), FAULTLESS),
    Case("suspended now", v1(entitlement_id="suspended"), NOT_ACTIVE),
    Case("in the moment of its suspension", since("suspended", 1), NOT_ACTIVE),
    Case("just before its suspension", since("suspended", 1, -MICROSECOND), FAULTLESS),
    Case("before its creation it was as created", since("suspended", 0, -DAY), FAULTLESS),
    Case("cancelled now", v1(entitlement_id="cancelled"), NOT_ACTIVE),
    Case("just before its cancellation", since("cancelled", 1, -MICROSECOND), FAULTLESS),
    Case("deleted now", v1(entitlement_id="deleted"), NOT_ACTIVE),
    Case("just before its end, deleted since", since("deleted", 1, -MICROSECOND), FAULTLESS),
    Case("cancelled then, deleted now", since("deleted", 2, -MICROSECOND), NOT_ACTIVE),
    Case("not begun", v1(entitlement_id="waiting"), NOT_ACTIVE),
    Case("not begun then", since("begun", 1, -MICROSECOND), NOT_ACTIVE),
    Case("in the moment of its beginning", since("begun", 1), FAULTLESS),
    Case("suspended then, resumed now", since("resumed", 1), NOT_ACTIVE),
    Case("just before it was resumed", since("resumed", 2, -MICROSECOND), NOT_ACTIVE),
    Case("in the moment in which it was resumed", since("resumed", 2), FAULTLESS),
]

KINDS = [
    Case("billable records alone", v2(used("bare")), FAULTLESS),
    Case("billable records in meta_info alone", v1({}, meta_info={"billable_records": [used("bare")]}), FAULTLESS),
    Case("neither records", v1({}), EXCLUSIVE),
    Case("both records", v1({"cpu": "1"}, billable_records=[used("bare")]), EXCLUSIVE),
    Case("records, and others in meta_info", v1(meta_info={"billable_records": [used("bare")]}), EXCLUSIVE),
]

KEYS = [
    Case("a name", v1({"CPU hours": "1"}), FAULTLESS),
    Case("keys and names", v1({"CPU hours": "1", "mem": "2", "unnamed": "3"}), FAULTLESS),
    Case("an unknown key", v1({"disk": "1"}), [("DIMENSION_UNKNOWN", "records.disk")]),
    Case("a key in other letters", v1({"CPU": "1"}), [("DIMENSION_UNKNOWN", "records.CPU")]),
    Case("a key with a blank", v1({" cpu": "1"}), [("DIMENSION_UNKNOWN", "records. cpu")]),
    Case(
        "unknown keys among known ones",
        v1({"disk": "1", "cpu": "1", "net": "1"}),
        [("DIMENSION_UNKNOWN", "records.disk"), ("DIMENSION_UNKNOWN", "records.net")],
    ),
    Case("the name of two", v1({"Twin": "1"}), [("DIMENSION_AMBIGUOUS", "records.Twin")]),
    Case("the keys of twins", v1({"a": "1", "b": "2"}), FAULTLESS),
    Case(
        "the name of two beside a key of them", v1({"Twin": "1", "a": "1"}), [("DIMENSION_AMBIGUOUS", "records.Twin")]
    ),
    Case("a key wins over the name of another", v1({"x": "1", "y": "2"}), FAULTLESS),
    Case("a key, not the name, is doubled", v1({"Why": "1", "y": "2"}), [("DUPLICATE_ITEM", "records.y")]),
    Case("key and name of one", v1({"CPU hours": "1", "cpu": "2"}), [("DUPLICATE_ITEM", "records.cpu")]),
    Case("200 records", v1({f"d{i:03}": "1" for i in range(200)}, "wide"), FAULTLESS),
    Case(
        "201 records", v1({f"d{i:03}": "1" for i in range(200)} | {"z": "1"}, "wide"), [("LIMIT_EXCEEDED", "records")]
    ),
]

METRICS = [
    Case("properties equal to the filters", v2(used("requests", **GOOD)), FAULTLESS),
    Case(
        "a value of another set",
        v2(used("requests", region="ap", tier="gold")),
        [(MISMATCH, "billable_records[0].properties.region")],
    ),
    Case(
        "no value where one of a set is needed",
        v2(used("requests", tier="gold")),
        [(MISMATCH, "billable_records[0].properties.region")],
    ),
    Case(
        "no value where one is needed",
        v2(used("requests", region="eu")),
        [(MISMATCH, "billable_records[0].properties.tier")],
    ),
    Case(
        "null is no value",
        v2(used("requests", region="eu", tier=None)),
        [(MISMATCH, "billable_records[0].properties.tier")],
    ),
    Case(
        "null is none of a set",
        v2(used("requests", region=None, tier=1)),
        [(MISMATCH, "billable_records[0].properties.region")],
    ),
    Case("an empty string is a value", v2(used("requests", region="us", tier="")), FAULTLESS),
    Case("false and lists are values", v2(used("requests", region="us", tier=False), used("any", p=[])), FAULTLESS),
    Case(
        "a value that must not be",
        v2(used("requests", **GOOD, debug="1")),
        [(MISMATCH, "billable_records[0].properties.debug")],
    ),
    Case("null where none must be", v2(used("requests", **GOOD, debug=None, env=None, other=None)), FAULTLESS),
    Case(
        "a value that only not_in_values names",
        v2(used("requests", **GOOD, env="prod")),
        [(MISMATCH, "billable_records[0].properties.env")],
    ),
    Case(
        "a property of no filter",
        v2(used("requests", **GOOD, zone="a")),
        [(MISMATCH, "billable_records[0].properties.zone")],
    ),
    Case(
        "everything wrong with properties",
        v2(used("requests", region="ap", zone="a"), used("bare"), used("any")),
        [
            (MISMATCH, "billable_records[0].properties.region"),
            (MISMATCH, "billable_records[0].properties.tier"),
            (MISMATCH, "billable_records[0].properties.zone"),
            (MISMATCH, "billable_records[2].properties.p"),
        ],
    ),
    *(
        Case(f"{value!r} equals its canonical text", v2(used("sized", size=value)), FAULTLESS)
        for value in (60, "60", 60.0, 1.5, "1.5", True, "true", [1, 2], "[1, 2]", {"aa": None, "b": 1}, -0.001)
    ),
    *(
        Case(
            f"{value!r} equals none", v2(used("sized", size=value)), [(MISMATCH, "billable_records[0].properties.size")]
        )
        for value in ("60.0", "060", " 60", 61, "True", 1, [2, 1], "[1,2]", ["1", 2], {"b": 1}, "", [60])
    ),
    Case("in the set, and not excluded", v2(used("strict", env="prod", zone="a")), FAULTLESS),
    Case(
        "in the set, and excluded",
        v2(used("strict", env="test", zone="b")),
        [(MISMATCH, "billable_records[0].properties.env"), (MISMATCH, "billable_records[0].properties.zone")],
    ),
    Case("a metric without filters", v2(used("bare", extra=1)), [(MISMATCH, "billable_records[0].properties.extra")]),
    Case(
        "an unknown metric", v2(used("nothing", **GOOD)), [("BILLABLE_METRIC_KEY_INVALID", "billable_records[0].key")]
    ),
    Case(
        "a metric that is not allowed",
        v2(used("foreign")),
        [("BILLABLE_METRIC_KEY_INVALID", "billable_records[0].key")],
    ),
    Case(
        "a metric where none is allowed",
        v2(used("bare"), entitlement_id="wide"),
        [("BILLABLE_METRIC_KEY_INVALID", "billable_records[0].key")],
    ),
    Case("an archived metric", v2(used("archived")), [("BILLABLE_METRIC_KEY_INVALID", "billable_records[0].key")]),
    Case("a metric that was not archived then", v2(used("archived"), at=ago(HOUR / 60)), FAULTLESS),
    Case("a dimension is no metric", v2(used("cpu")), [("BILLABLE_METRIC_KEY_INVALID", "billable_records[0].key")]),
    Case("a metric is no dimension", v1({"bare": "1"}), [("DIMENSION_UNKNOWN", "records.bare")]),
    Case("no key", v2(used("")), [("FIELD_REQUIRED", "billable_records[0].key")]),
    Case("one metric, other properties", v2(used("any", p="1"), used("any", p="2")), FAULTLESS),
    Case(
        "one metric, same properties",
        v2(used("any", p="1"), used("bare"), used("any", p="1"), used("any", p="1")),
        [("DUPLICATE_ITEM", "billable_records[2]"), ("DUPLICATE_ITEM", "billable_records[3]")],
    ),
    Case(
        "one faulty metric twice",
        v2(used("nothing"), used("nothing")),
        [
            ("BILLABLE_METRIC_KEY_INVALID", "billable_records[0].key"),
            ("BILLABLE_METRIC_KEY_INVALID", "billable_records[1].key"),
            ("DUPLICATE_ITEM", "billable_records[1]"),
        ],
    ),
    Case("200 billable records", v2(*(used("any", p=i) for i in range(200))), FAULTLESS),
    Case("201 billable records", v2(*(used("any", p=i) for i in range(201))), [("LIMIT_EXCEEDED", "billable_records")]),
]

NO_QUANTITIES = (
    "1e400", "1e5", "1E2", "NaN", "nan", "Infinity", "-inf", "-1", "-0.5", " 1", "1 ", "\t1", "1\n", "+1", "0x1",
    "0b1", "1_000", "1,5", "1.", ".5", ".", "-", "1.2.3", "--1", "null", "true", "one", "\u0661\u0662", "\uff11", "1\0",
    "\u00bd", "1" * 1000,
    "9" * 39, "0." + "1" * 19, "1.0000000000000000000",
)  # fmt: skip
QUANTITIES = (
    "1", "1.0", "007", "0.5", "0" * 100 + "1", "0." + "0" * 17 + "1", "2147483647", "2147483647.000",
    "1.123456789012345678",
)  # fmt: skip

AMOUNTS = [
    *(Case(f"{text[:20]!r} is a quantity", v1({"cpu": text}), FAULTLESS) for text in QUANTITIES),
    *(Case(f"{text[:20]!r} is a v2 quantity", v2(used("bare", text)), FAULTLESS) for text in QUANTITIES),
    *(Case(f"{text[:20]!r} is no quantity", v1({"cpu": text, "mem": "1"}), CPU_INVALID) for text in NO_QUANTITIES),
    *(
        Case(
            f"{text[:20]!r} is no v2 quantity",
            v2(used("bare", text)),
            [("QUANTITY_INVALID", "billable_records[0].quantity")],
        )
        for text in NO_QUANTITIES
    ),
    Case("no quantity", v1({"cpu": ""}), [("FIELD_REQUIRED", "records.cpu")]),
    Case("no v2 quantity", v2(used("bare", "")), [("FIELD_REQUIRED", "billable_records[0].quantity")]),
    Case("zero with a minus", v1({"cpu": "-0.0", "mem": "1"}), FAULTLESS),
    Case("only zeros with a minus", v2(used("bare", "-0")), [("QUANTITIES_ZERO", "billable_records")]),
    Case("a minus and 19 places", v1({"cpu": "-0." + "0" * 19, "mem": "1"}), CPU_INVALID),
    Case("only zero", v1({"cpu": "0"}), [("QUANTITIES_ZERO", "records")]),
    Case("only zeros", v1({"cpu": "0", "mem": "0.000"}), [("QUANTITIES_ZERO", "records")]),
    Case("one that is not zero", v1({"cpu": "0", "mem": "0.000000000000000001"}), FAULTLESS),
    Case("only zeros of v2", v2(used("bare", "0"), used("any", "0.0", p=1)), [("QUANTITIES_ZERO", "billable_records")]),
    Case("one of v2 that is not zero", v2(used("bare", "0"), used("any", "1", p=1)), FAULTLESS),
    Case("a zero beside one that is no number", v1({"cpu": "x", "mem": "0"}), CPU_INVALID),
    *(
        Case(f"{entitlement_id} takes {quantity}", v1({"cpu": quantity}, entitlement_id), FAULTLESS)
        for entitlement_id, quantity in (
            ("azure", "999999999"),
            ("azure", "999999998.999999"),
            ("azure", "0.000001"),
            ("azure", "0.0000010"),
            ("gcp", "9223372036854775807"),
            ("gcp", "9223372036854775806.999999999999999999"),
        )
    ),
    *(
        Case(f"{entitlement_id} refuses {quantity}", v1({"cpu": quantity}, entitlement_id), CPU_INVALID)
        for entitlement_id, quantity in (
            ("aws", "2147483648"),
            ("aws", "2147483647.000000000000000001"),
            ("azure", "999999999.000001"),
            ("azure", "0.0000001"),
            ("azure", "1.0000001"),
            ("gcp", "9223372036854775808"),
        )
    ),
    Case("too large and too precise", v1({"cpu": "1000000000.0000001", "mem": "1"}, "azure"), CPU_INVALID * 2),
    Case(
        "a v2 quantity too large",
        v2(used("bare"), used("any", "2147483648", p=1)),
        [("QUANTITY_INVALID", "billable_records[1].quantity")],
    ),
]

TIMES = [
    Case("five minutes ahead", v1(at=ago(-SKEW)), FAULTLESS),
    Case(
        "more than that ahead", v1(at=ago(-SKEW - 2 * timedelta(minutes=1))), [("TIMESTAMP_TOO_FAR_AHEAD", "timestamp")]
    ),
    Case("first moment of the term", v1(entitlement_id="ended", at=ago(10 * DAY)), FAULTLESS),
    Case(
        "before the term",
        v1(entitlement_id="ended", at=ago(10 * DAY + MICROSECOND)),
        [("TIMESTAMP_OUTSIDE_TERM", "timestamp")],
    ),
    Case("last moment of the term", v1(entitlement_id="ended", at=ago(DAY + MICROSECOND)), FAULTLESS),
    Case("end of the term", v1(entitlement_id="ended", at=ago(DAY)), [("TIMESTAMP_OUTSIDE_TERM", "timestamp")]),
    Case("now, after the term", v1(entitlement_id="ended"), [("TIMESTAMP_OUTSIDE_TERM", "timestamp")]),
    Case("a day late on AWS", v1(at=ago(DAY)), [("TIMESTAMP_TOO_OLD", "timestamp")]),
    Case("a day late on Azure", v1(entitlement_id="azure", at=ago(DAY)), [("TIMESTAMP_TOO_OLD", "timestamp")]),
    Case(
        "less than a day late on Azure", v1(entitlement_id="azure", at=ago(DAY - 10 * timedelta(minutes=1))), FAULTLESS
    ),
    Case("29 days late on GCP", v1(entitlement_id="gcp", at=ago(29 * DAY)), FAULTLESS),
    Case(
        "before the term, and too late",
        v1(entitlement_id="gcp", at=ago(31 * DAY)),
        [("TIMESTAMP_OUTSIDE_TERM", "timestamp"), ("TIMESTAMP_TOO_OLD", "timestamp")],
    ),
    Case(
        "the year 1",
        at_raw(-62135510400),
        [("TIMESTAMP_OUTSIDE_TERM", "timestamp"), ("TIMESTAMP_TOO_OLD", "timestamp")],
    ),
    Case("the year 9999", at_raw(253402214399, 999_999_999), [("TIMESTAMP_TOO_FAR_AHEAD", "timestamp")]),
    *(
        Case(f"{moment} is no moment", at_raw(*moment), [("FIELD_INVALID", "timestamp")])
        for moment in (
            (-62135510401,),
            (253402300800,),
            (2**63 - 1,),
            (-(2**63),),
            (0, -1),
            (0, 1_000_000_000),
            (0, 2**31 - 1),
        )
    ),
]

TAG = "k" * 100, "v" * 256
PARTS = [
    Case(
        "two parts without tags",
        split({"cpu": "0.3"}, cpu=allocated("0.1", "0.2")),
        [("ALLOCATION_INVALID", f"{ALLOCATIONS}.cpu.allocations[1]")],
    ),
    Case(
        "allocations with different tags",
        split({"cpu": "0.3"}, cpu=allocated("0.1", ("0.2", [("team", "a")]))),
        FAULTLESS,
    ),
    Case("allocations by name, records by key", split({"cpu": "1"}, **{"CPU hours": allocated("1.0")}), FAULTLESS),
    Case("allocations by key, records by name", split({"CPU hours": "1"}, cpu=allocated("1")), FAULTLESS),
    Case("allocations of one record of two", split({"cpu": "1", "mem": "2"}, mem=allocated("2")), FAULTLESS),
    Case(
        "allocations of a metric",
        v2(used("any", "1.5", p=1), used("any", "2", p=2), meta_info={"usage_allocations": {"any": allocated("3.5")}}),
        FAULTLESS,
    ),
    Case(
        "allocations of one record of a metric",
        v2(used("any", "1.5", p=1), used("any", "2", p=2), meta_info={"usage_allocations": {"any": allocated("2")}}),
        [("ALLOCATION_INVALID", f"{ALLOCATIONS}.any")],
    ),
    Case(
        "a sum too small",
        split({"cpu": "1"}, cpu=allocated("0.999999999999999999")),
        [("ALLOCATION_INVALID", f"{ALLOCATIONS}.cpu")],
    ),
    Case(
        "a sum too large",
        split({"cpu": "1"}, cpu=allocated("1", ("0.000000000000000001", [("k", "v")]))),
        [("ALLOCATION_INVALID", f"{ALLOCATIONS}.cpu")],
    ),
    Case("a part of zero", split({"cpu": "1"}, cpu=allocated("1", ("0", [("k", "v")]))), FAULTLESS),
    Case(
        "no allocations",
        split({"cpu": "0", "mem": "1"}, cpu=allocated()),
        [("ALLOCATION_INVALID", f"{ALLOCATIONS}.cpu")],
    ),
    Case(
        "no allocations of something",
        split({"cpu": "1"}, cpu=allocated()),
        [("ALLOCATION_INVALID", f"{ALLOCATIONS}.cpu")] * 2,
    ),
    Case(
        "2,500 allocations",
        split({"cpu": "2500"}, cpu=allocated(*(("1", [("k", str(i))]) for i in range(2500)))),
        FAULTLESS,
    ),
    Case(
        "2,501 allocations",
        split({"cpu": "2501"}, cpu=allocated(*(("1", [("k", str(i))]) for i in range(2501)))),
        [("LIMIT_EXCEEDED", f"{ALLOCATIONS}.cpu")],
    ),
    Case(
        "allocations of no record",
        split({"cpu": "1"}, mem=allocated("1")),
        [("ALLOCATION_INVALID", f"{ALLOCATIONS}.mem")],
    ),
    Case(
        "allocations of no dimension",
        split({"cpu": "1"}, disk=allocated("1"), cpu=allocated("1")),
        [("ALLOCATION_INVALID", f"{ALLOCATIONS}.disk")],
    ),
    Case(
        "allocations on Azure", split({"cpu": "1"}, "azure", cpu=allocated("1")), [("ALLOCATION_INVALID", ALLOCATIONS)]
    ),
    Case(
        "allocations on GCP",
        split({"cpu": "1"}, "gcp", cpu=allocated("2"), mem=allocated("1")),
        [("ALLOCATION_INVALID", ALLOCATIONS)],
    ),
    Case(
        "a part that is no number",
        split({"cpu": "1"}, cpu=allocated("1e0")),
        [("QUANTITY_INVALID", f"{PART}.quantity")],
    ),
    Case("a part without a number", split({"cpu": "1"}, cpu=allocated("")), [("FIELD_REQUIRED", f"{PART}.quantity")]),
    Case(
        "a negative part",
        split({"cpu": "1"}, cpu=allocated("2", ("-1", [("k", "v")]))),
        [("QUANTITY_INVALID", f"{ALLOCATIONS}.cpu.allocations[1].quantity")],
    ),
    Case("a record that is no number", split({"cpu": "x"}, cpu=allocated("1")), CPU_INVALID),
    Case("five tags", tagged(*((f"k{i}", "v") for i in range(5))), FAULTLESS),
    Case("six tags", tagged(*((f"k{i}", "v") for i in range(6))), [("ALLOCATION_INVALID", PART)]),
    Case("the longest tag", tagged(TAG), FAULTLESS),
    Case("a longer key", tagged((TAG[0] + "k", "v")), [("ALLOCATION_INVALID", f"{PART}.tags[0].key")]),
    Case("a longer value", tagged(("j", "v"), ("k", TAG[1] + "v")), [("ALLOCATION_INVALID", f"{PART}.tags[1].value")]),
    Case(
        "an empty tag",
        tagged(("", "")),
        [("ALLOCATION_INVALID", f"{PART}.tags[0].key"), ("ALLOCATION_INVALID", f"{PART}.tags[0].value")],
    ),
    Case("every character of tags", tagged(("aZ09 +-=._:\\/@", "@/\\:_.=-+ 90Za")), FAULTLESS),
    *(
        Case(f"{text!r} in a tag", tagged(("k", f"v{text}")), [("ALLOCATION_INVALID", f"{PART}.tags[0].value")])
        for text in ("é", "!", "\n", "\0", "\t", ",", "\u0663", "\u00a0")
    ),
    Case("one tag twice", tagged(("k", "1"), ("k", "2")), [("ALLOCATION_INVALID", PART)]),
    Case(
        "the same tags in another order",
        split({"cpu": "2"}, cpu=allocated(("1", [("a", "1"), ("b", "2")]), ("1", [("b", "2"), ("a", "1")]))),
        [("ALLOCATION_INVALID", f"{ALLOCATIONS}.cpu.allocations[1]")],
    ),
    Case(
        "tags with other values",
        split({"cpu": "2"}, cpu=allocated(("1", [("a", "1")]), ("1", [("a", "2")]))),
        FAULTLESS,
    ),
    Case(
        "the same tags of two dimensions",
        split({"cpu": "1", "mem": "1"}, cpu=allocated(("1", [("a", "1")])), mem=allocated(("1", [("a", "1")]))),
        FAULTLESS,
    ),
]

SKIP = {"skip_validation": True}
# The server is in open mode, so the caller is an administrator.
SKIPPED = [
    Case("skipped: unknown dimensions", v1({"disk": "1", "Twin": "2"}, meta_info=SKIP), FAULTLESS),
    Case("skipped: unknown metrics", v2(used("nothing", p=1), meta_info=SKIP), FAULTLESS),
    Case("skipped: other properties", v2(used("requests", x=1), meta_info=SKIP), FAULTLESS),
    Case("skipped: zeros", v1({"cpu": "0"}, meta_info=SKIP), FAULTLESS),
    Case("skipped: cancelled", v1(entitlement_id="cancelled", meta_info=SKIP), FAULTLESS),
    Case("skipped: years late", v1(at=ago(3000 * DAY), meta_info=SKIP), FAULTLESS),
    Case(
        "skipped, but years ahead", v1(at=ago(-3000 * DAY), meta_info=SKIP), [("TIMESTAMP_TOO_FAR_AHEAD", "timestamp")]
    ),
    Case("skipped: more than the partner takes", v1({"cpu": "2147483648"}, meta_info=SKIP), FAULTLESS),
    Case("skipped: finer than the partner takes", v1({"cpu": "0.0000001"}, "azure", meta_info=SKIP), FAULTLESS),
    Case(
        "skipped: allocations on Azure",
        v1(entitlement_id="azure", meta_info={**SKIP, "usage_allocations": {"cpu": allocated("3")}}),
        FAULTLESS,
    ),
    Case("skipped: 38 digits", v1({"cpu": "9" * 38}, meta_info=SKIP), FAULTLESS),
    Case("skipped: 39 digits", v1({"cpu": "9" * 39}, meta_info=SKIP), CPU_INVALID),
    Case("skipped: 20 digits and 18", v1({"cpu": "9" * 20 + "." + "9" * 18}, meta_info=SKIP), FAULTLESS),
    Case("skipped: 21 digits and 18", v1({"cpu": "9" * 21 + "." + "9" * 18}, meta_info=SKIP), CPU_INVALID),
    Case(
        "skipped: zeros before the point are no digits",
        v1({"cpu": "0" * 30 + "." + "9" * 18}, meta_info=SKIP),
        FAULTLESS,
    ),
    Case("skipped, but negative", v1({"cpu": "-1"}, meta_info=SKIP), CPU_INVALID),
    Case(
        "skipped, but of no entitlement",
        v1(entitlement_id="nobody", meta_info=SKIP),
        [("ENTITLEMENT_NOT_FOUND", "entitlement_id")],
    ),
    Case("skipped, but both records", v1(billable_records=[used("bare")], meta_info=SKIP), EXCLUSIVE),
    Case(
        "skipped, but two for one dimension",
        v1({"cpu": "1", "CPU hours": "1"}, meta_info=SKIP),
        [("DUPLICATE_ITEM", "records.cpu")],
    ),
    Case(
        "skipped, but twice the same record",
        v2(used("new"), used("new"), meta_info=SKIP),
        [("DUPLICATE_ITEM", "billable_records[1]")],
    ),
    Case(
        "skipped, but a property called quantity",
        v2(used("new", quantity=1), meta_info=SKIP),
        [("FIELD_INVALID", "billable_records[0].properties.quantity")],
    ),
]


def meta(**fields: Any) -> Make:
    """A unit of cpu with fields of meta_info."""
    return v1(meta_info=fields)


def times(outer: int | None, inner: int | None) -> Make:
    """A group with its time in nanoseconds after the world's, outside and inside of meta_info."""

    def make(world: World) -> New:
        made = v1()(world)
        for place, nanos in ((made, outer), (made.meta_info, inner)):
            if nanos is not None:
                moment = Timestamp(seconds=int(world.now.timestamp()) - 60, nanos=nanos)
                place.timestamp.CopyFrom(moment)
        return made

    return make


META = [
    Case("the time inside only", times(None, 5000), FAULTLESS),
    Case("the same time twice", times(5000, 5000), FAULTLESS),
    Case("times that are cut to the same", times(5999, 5000), FAULTLESS),
    Case("two times", times(5000, 6000), [("META_INFO_MISMATCH", "meta_info.timestamp")]),
    Case("a time inside that is none", times(5000, -1), [("FIELD_INVALID", "meta_info.timestamp")]),
    Case(
        "the time inside counts",
        v1(meta_info={"timestamp": timestamp(datetime(2020, 1, 1, tzinfo=UTC))}),
        [("TIMESTAMP_OUTSIDE_TERM", "timestamp"), ("TIMESTAMP_TOO_OLD", "timestamp")],
    ),
    Case(
        "the same billable records twice",
        v2(used("any", "1.50", p=60), meta_info={"billable_records": [used("any", "1.5", p=60)]}),
        FAULTLESS,
    ),
    Case(
        "other quantities inside",
        v2(used("bare", "1"), meta_info={"billable_records": [used("bare", "2")]}),
        [("META_INFO_MISMATCH", "meta_info.billable_records")],
    ),
    Case(
        "fewer records inside",
        v2(used("bare"), used("any", p=1), meta_info={"billable_records": [used("bare")]}),
        [("META_INFO_MISMATCH", "meta_info.billable_records")],
    ),
    Case(
        "faulty records inside",
        v2(used("bare"), meta_info={"billable_records": [used("bare", "x")]}),
        [
            ("META_INFO_MISMATCH", "meta_info.billable_records"),
            ("QUANTITY_INVALID", "meta_info.billable_records[0].quantity"),
        ],
    ),
    Case(
        "201 records inside",
        v1({}, meta_info={"billable_records": [used("any", p=i) for i in range(201)]}),
        [("LIMIT_EXCEEDED", "meta_info.billable_records")],
    ),
    Case(
        "the same records twice",
        v1({"CPU hours": "1.50"}, meta_info={"origin_records": {"CPU hours": "1.5"}}),
        FAULTLESS,
    ),
    Case(
        "other quantities of origin",
        meta(origin_records={"cpu": "2"}),
        [("META_INFO_MISMATCH", "meta_info.origin_records")],
    ),
    Case(
        "more records of origin",
        meta(origin_records={"cpu": "1", "mem": "1"}),
        [("META_INFO_MISMATCH", "meta_info.origin_records")],
    ),
    Case(
        "other names of origin",
        meta(origin_records={"CPU hours": "1"}),
        [("META_INFO_MISMATCH", "meta_info.origin_records")],
    ),
    Case(
        "records of origin beside billable ones",
        v2(used("bare"), meta_info={"origin_records": {"bare": "1"}}),
        [("META_INFO_MISMATCH", "meta_info.origin_records")],
    ),
    Case(
        "faulty records of origin",
        meta(origin_records={"cpu": "1e400"}),
        [("META_INFO_MISMATCH", "meta_info.origin_records"), ("QUANTITY_INVALID", "meta_info.origin_records.cpu")],
    ),
    *(Case(f"source {number}", meta(source=number), FAULTLESS) for number in range(8)),
    *(
        Case(f"source {number} is none", meta(source=number), [("FIELD_INVALID", "meta_info.source")])
        for number in (8, 99, -1, 2**31 - 1)
    ),
    *(
        Case(f"an amount of {amount}", meta(lago_amount=amount), FAULTLESS)
        for amount in ("0", "-5", "12.50", "9" * 20 + "." + "9" * 18)
    ),
    *(
        Case(f"{name}: {amount[:20]!r}", meta(**{name: amount}), [("FIELD_INVALID", f"meta_info.{name}")])
        for name, amount in itertools.product(
            (
                "lago_amount",
                "metronome_daily_cost_amount",
                "metronome_monthly_invoice_amount",
                "metronome_monthly_invoice_amount_adjusted",
                "metronome_invoice_credit_back_amount",
            ),
            ("12,5", "9" * 39, "$5"),
        )
    ),
    *(
        Case(f"{amount!r} is no amount", meta(lago_amount=amount), [("FIELD_INVALID", "meta_info.lago_amount")])
        for amount in ("1e3", "+1", " 1", "NaN", "1.", ".1", "\u0661", "1" * 21 + "." + "1" * 18, "1\n", "1\0")
    ),
    *(
        Case(f"{name}: {why}", meta(**{name: text}), [(code, f"meta_info.{name}")] if code else FAULTLESS)
        for name in (
            "lago_subscription_id",
            "metronome_invoice_id",
            "stripe_invoice_id",
            "stripe_subscription_item_id",
            "stripe_usage_record_summary_id",
            "erp_invoice_id",
        )
        for why, text, code in (
            ("1,024 bytes", "é" * 512, ""),
            ("1,025 bytes", "é" * 512 + "x", "LIMIT_EXCEEDED"),
            ("NUL", "a\0", "FIELD_INVALID"),
            ("control characters", "a\r\n\x1b\\u0000", ""),
        )
    ),
    *(
        Case(f"{name} is no moment", meta(**{name: {"seconds": 2**60}}), [("FIELD_INVALID", f"meta_info.{name}")])
        for name in ("timestamp", "lago_usage_start_time", "stripe_period_start_time", "stripe_period_end_time")
    ),
]

BAD = [
    *(
        Case(f"an id with {why}", named(text, f"0.{i + 1}"), [(code, "id")] if code else FAULTLESS)
        for i, (why, text, code) in enumerate(
            (
                ("36 characters", "é" * 36, ""),
                ("37 characters", "x" * 37, "LIMIT_EXCEEDED"),
                ("100,000 characters", "x" * 100_000, "LIMIT_EXCEEDED"),
                ("NUL", "a\0b", "FIELD_INVALID"),
                ("a line break", "a\nb", "FIELD_INVALID"),
                ("a C1 character", "a\x9b", "FIELD_INVALID"),
                ("blanks only", "  ", "FIELD_INVALID"),
            )
        )
    ),
    *(
        Case(f"an entitlement_id with {why}", v1(entitlement_id=text), [(code, "entitlement_id")])
        for why, text, code in (
            ("37 characters", "x" * 37, "LIMIT_EXCEEDED"),
            ("NUL", "aws\0", "FIELD_INVALID"),
            ("a tab", "aws\t", "FIELD_INVALID"),
            ("blanks only", " ", "FIELD_INVALID"),
        )
    ),
    *(
        Case(
            f"a record's key with {why}",
            v1({text: "1"}),
            [("DIMENSION_UNKNOWN", f"records.{text}"[:245]), (code, "records")],
        )
        for why, text, code in (
            ("NUL", "c\0", "FIELD_INVALID"),
            ("DEL", "c\x7f", "FIELD_INVALID"),
            ("nothing", "", "FIELD_REQUIRED"),
            ("129 characters", "c" * 129, "LIMIT_EXCEEDED"),
        )
    ),
    *(
        Case(f"a billable key with {why}", v2(used(text)), [(code, "billable_records[0].key")])
        for why, text, code in (
            ("NUL", "c\0", "FIELD_INVALID"),
            ("129 characters", "c" * 129, "LIMIT_EXCEEDED"),
            ("blanks", " ", "FIELD_INVALID"),
        )
    ),
    Case("NUL in a property", v2(used("any", p="a\0")), [("FIELD_INVALID", "billable_records[0].properties.p")]),
    Case(
        "NUL deep in a property",
        v2(used("any", p=[{"q": ["\0"]}])),
        [("FIELD_INVALID", "billable_records[0].properties.p[0].q[0]")],
    ),
    Case(
        "NUL in a name deep in a property",
        v2(used("any", p={"\0": 1})),
        [("FIELD_INVALID", "billable_records[0].properties.p")],
    ),
    Case("control characters in a property", v2(used("any", p="\x01\r\n\\u0000")), FAULTLESS),
    Case(
        "1,025 bytes in a property",
        v2(used("any", p="é" * 512 + "x")),
        [("LIMIT_EXCEEDED", "billable_records[0].properties.p")],
    ),
    Case(
        "a property called quantity",
        v2(used("any", p=1, quantity=1)),
        [
            ("FIELD_INVALID", "billable_records[0].properties.quantity"),
        ],
    ),
    Case(
        "a property called quantity that is asked for",
        v2(used("counted", quantity="1")),
        [("FIELD_INVALID", "billable_records[0].properties.quantity")],
    ),
    Case("a property within called quantity", v2(used("any", p={"quantity": 1})), FAULTLESS),
    Case(
        "a group of more than 1 MiB",
        split(
            {"cpu": "600"},
            cpu=allocated(*(("1", [(f"{i} {j} ".ljust(100, "k"), TAG[1]) for j in range(5)]) for i in range(600))),
        ),
        [("LIMIT_EXCEEDED", "records")],
    ),
    Case(
        "everything at once",
        v1(
            {"CPU hours": "1", "cpu": "-1", "disk": "0", "mem": "2147483648"},
            "cancelled",
            at=ago(40 * DAY),
            billable_records=[used("any"), used("", "")],
            meta_info={
                "source": 42,
                "lago_amount": "x",
                "origin_records": {"cpu": "1"},
                "usage_allocations": {"cpu": allocated("1")},
            },
        ),
        [
            ("ALLOCATION_INVALID", ALLOCATIONS),
            ("BILLABLE_METRIC_KEY_INVALID", "billable_records[0].key"),
            ("DIMENSION_UNKNOWN", "records.disk"),
            ("DUPLICATE_ITEM", "records.cpu"),
            ("FIELD_INVALID", "meta_info.lago_amount"),
            ("FIELD_INVALID", "meta_info.source"),
            ("FIELD_REQUIRED", "billable_records[1].key"),
            ("FIELD_REQUIRED", "billable_records[1].quantity"),
            ("META_INFO_MISMATCH", "meta_info.origin_records"),
            ("QUANTITY_INVALID", "records.cpu"),
            ("RECORDS_EXCLUSIVE", "records"),
            ("TIMESTAMP_OUTSIDE_TERM", "timestamp"),
            ("TIMESTAMP_TOO_OLD", "timestamp"),
        ],
    ),
    Case(
        "several at once",
        v1({"disk": "0", "Twin": "0"}, "suspended", meta_info={"usage_allocations": {"cpu": allocated("1")}}),
        [
            ("ALLOCATION_INVALID", ALLOCATIONS),
            ("DIMENSION_AMBIGUOUS", "records.Twin"),
            ("DIMENSION_UNKNOWN", "records.disk"),
            ("QUANTITIES_ZERO", "records"),
            *NOT_ACTIVE,
        ],
    ),
]

CASES = [*ENTITLEMENTS, *KINDS, *KEYS, *METRICS, *AMOUNTS, *TIMES, *PARTS, *SKIPPED, *META, *BAD]


class Subtle(NamedTuple):
    """Groups of a batch with all the faults that each has, of a kind that is easily overlooked, or said twice."""

    name: str
    faults: Sequence[Faults]
    groups: Sequence[Make]


def subtle(name: str, faults: Sequence[Faults], *groups: Make) -> Subtle:
    """Write a case in the order in which it is read."""
    return Subtle(name, faults, groups)


SUBTLE = [
    subtle(
        "a name with NUL",
        [[("FIELD_INVALID", "billable_records[0].properties")]],
        v2(used("any", "1", **{"p": 1, "q\0": 1})),
    ),
    subtle(
        "an inexact number",
        [[("NUMBER_NOT_EXACT", "billable_records[0].properties.p")]],
        v2(used("any", p=2**60)),
    ),
    subtle(
        "65 properties",
        [[("LIMIT_EXCEEDED", "billable_records[0].properties")]],
        v2(used("any", "1", p=1, **{f"p{i}": None for i in range(64)})),
    ),
    subtle(
        "more than 16 KiB",
        [[("LIMIT_EXCEEDED", "billable_records[0].properties")]],
        v2(used("any", p=["x" * 1000] * 17)),
    ),
    subtle(
        "two other ids that are too long",
        [[("LIMIT_EXCEEDED", "id")], [("LIMIT_EXCEEDED", "id")]],
        named("x" * 37, "1"),
        named("y" * 37, "1"),
    ),
    subtle("two other texts that are no quantities", [CPU_INVALID] * 2, v1({"cpu": "x"}), v1({"cpu": "y"})),
    subtle(
        "key and name of one dimension",
        [[("ALLOCATION_INVALID", f"{ALLOCATIONS}.cpu")]],
        split({"cpu": "1"}, cpu=allocated("1"), **{"CPU hours": allocated("1")}),
    ),
    subtle(
        "a number and its text",
        [[("DUPLICATE_ITEM", "billable_records[1]")]],
        v2(used("sized", size=60), used("sized", size="60")),
    ),
    subtle(
        "null and nothing",
        [[("DUPLICATE_ITEM", "billable_records[1]")]],
        v2(used("bare"), used("bare", p=None)),
    ),
    subtle(
        "a value that not_in_values excludes",
        [[(MISMATCH, "billable_records[0].properties.env")]],
        v2(used("requests", **GOOD, env="test")),
    ),
    subtle(
        "allocations of an unknown entitlement",
        [[("ENTITLEMENT_NOT_FOUND", "entitlement_id")]],
        split({"cpu": "1"}, "nobody", **{"CPU hours": allocated("1")}),
    ),
]


class Answers(NamedTuple):
    """What the server said of every case, and what it had stored when it had only validated."""

    validated: Mapping[str, Faults]
    reported: Mapping[str, tuple[int, Faults]]
    stored_by_validating: Mapping[str, int]
    good: list[Faults]
    subtle: Mapping[str, list[Faults]]


@asynccontextmanager
async def own_database(postgres: EmbeddedPostgres, template: str) -> AsyncIterator[str]:
    """A database that outlives a test."""
    url, name = sa.make_url(postgres.url), f"rules_{uuid.uuid4().hex}"
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(sa.text(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'))
        yield url.set(database=name).render_as_string(hide_password=False)
        await connection.execute(sa.text(f'DROP DATABASE "{name}" WITH (FORCE)'))
    await engine.dispose()


@pytest.fixture(scope="module")
async def answers(postgres: EmbeddedPostgres, template: str) -> AsyncIterator[Answers]:
    """Validate every case, each batch with a good group in its middle, and then report them all."""
    async with own_database(postgres, template) as url, running_server(url) as client:
        database = Database(url)
        world = await build_world(client)
        made = [case.make(world) for case in CASES]
        for i, one in enumerate(made):
            one.id = one.id or f"case-{i}"
        found: list[Faults] = []
        good = []
        for batch in batches(made):
            middle = len(batch) // 2
            results = await validate(client, *batch[:middle], group("good", "aws"), *batch[middle:])
            assert [one.index for one in results] == list(range(len(batch) + 1))
            good.append(faults_of(results.pop(middle)))
            found += map(faults_of, results)
        told = {
            one.name: [faults_of(result) for result in await validate(client, *(make(world) for make in one.groups))]
            for one in SUBTLE
        }
        stored = await stored_counts(database)
        verdicts = [(one.verdict, faults_of(one)) for batch in batches(made) for one in await report(client, *batch)]
        names = [case.name for case in CASES]
        await database.close()
        yield Answers(dict(zip(names, found, strict=True)), dict(zip(names, verdicts, strict=True)), stored, good, told)


def test_the_table_names_each_case_once() -> None:
    """No case hides another of the same name."""
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_every_fault_is_found(answers: Answers, case: Case) -> None:
    """A group has all the faults that the table says, and no other."""
    assert answers.validated[case.name] == sorted(case.faults)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_reporting_judges_as_validating_does(answers: Answers, case: Case) -> None:
    """What validates is stored when reported; what does not is REJECTED for the same faults, alone in its batch."""
    assert answers.reported[case.name] == (REJECTED if case.faults else ACCEPTED, sorted(case.faults))


@pytest.mark.parametrize("case", [pytest.param(one, id=one.name) for one in SUBTLE])
def test_no_fault_is_made_up_or_missed(answers: Answers, case: Subtle) -> None:
    """One fault is one violation: it brings no others that the group does not have, and none is overlooked."""
    assert answers.subtle[case.name] == case.faults


def test_faulty_groups_leave_the_others_alone(answers: Answers) -> None:
    """A good group has no fault, whatever stands beside it in the batch."""
    assert len(answers.good) > 3
    assert all(found == FAULTLESS for found in answers.good)


def test_validating_writes_nothing(answers: Answers) -> None:
    """After all cases were validated no group, record or event is stored."""
    assert answers.stored_by_validating == {"usage_record_groups": 0, "usage_records": 0, "usage_events": 0}


def test_the_table_has_every_code(answers: Answers) -> None:
    """Each code that a group can be refused with is in the table; the others belong to other tests here."""
    codes = {code for case in CASES for code, _ in case.faults}
    of_groups = {
        one.name for one in Reason if 70 <= error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{one.name}") < 90
    }
    assert of_groups - codes == {"SKIP_VALIDATION_FORBIDDEN"}


# --- Rules that need a clock of their own


NOW = datetime(2026, 4, 1, 5, 59, 59, 999_999, tzinfo=UTC)
SOLD = Entitlement(
    id="ent",
    name="",
    product_id="p",
    buyer_id="b",
    partner=Partner.AWS,
    status=EntitlementStatus.ACTIVE,
    starting_on=datetime(2026, 1, 1, tzinfo=UTC),
    dimensions=(Dimension("cpu", "CPU"),),
)


def judged(at: datetime | None, now: datetime | None, partner: Partner = Partner.AWS, **changes: Any) -> Faults:
    """The faults of a unit of cpu at a time, by another clock."""
    entitlement = replace(SOLD, partner=partner, **changes)
    made = NewGroup("g", "ent", records={"cpu": Decimal(1)}, timestamp=at)
    found = violations(made, Circumstances({"ent": entitlement}, {}, DEFAULT_RULES, now))
    return [(one.reason.value, one.field) for one in found]


@pytest.mark.parametrize(
    ("partner", "at", "last"),
    [
        (Partner.AWS, "2026-03-15T10:00:00", "2026-03-16T10:00:00"),
        (Partner.AWS, "2026-03-31T05:00:00", "2026-04-01T05:00:00"),
        (Partner.AWS, "2026-03-31T23:59:59.999999", "2026-04-01T06:00:00"),
        (Partner.AWS, "2026-04-01T00:00:00", "2026-04-02T00:00:00"),
        (Partner.AWS, "2026-12-31T12:00:00", "2027-01-01T06:00:00"),
        (Partner.AZURE, "2026-03-31T23:59:59.999999", "2026-04-01T23:59:59.999999"),
        (Partner.GCP, "2026-03-01T00:00:00", "2026-03-31T00:00:00"),
    ],
)
def test_usage_is_too_old_from_the_deadline_on(partner: Partner, at: str, last: str) -> None:
    """Usage is taken up to one microsecond before the partner's deadline, and not at it."""
    used_at, deadline = (datetime.fromisoformat(text).replace(tzinfo=UTC) for text in (at, last))
    assert judged(used_at, deadline - MICROSECOND, partner) == FAULTLESS
    assert judged(used_at, deadline, partner) == [("TIMESTAMP_TOO_OLD", "timestamp")]
    assert judged(used_at, deadline + 400 * DAY, partner) == [("TIMESTAMP_TOO_OLD", "timestamp")]
    # Without a clock, as when an hour is rolled up, nothing is late.
    assert judged(used_at, None, partner) == FAULTLESS


def test_the_operator_decides_how_late() -> None:
    """The window is the partner's rule as configured, not a constant."""
    made = NewGroup("g", "ent", records={"cpu": Decimal(1)}, timestamp=NOW - 6 * HOUR)
    for changes, expected in (
        (["AWS.window_hours=6"], 1),
        (["AWS.window_hours=7"], 0),
        (["AWS.window_hours=7", "AZURE.window_hours=1"], 0),
    ):
        circumstances = Circumstances({"ent": SOLD}, {}, with_changes(changes), NOW)
        assert len(violations(made, circumstances)) == expected, changes


@pytest.mark.parametrize(
    ("ahead", "faults"),
    [
        (SKEW, FAULTLESS),
        (SKEW + MICROSECOND, [("TIMESTAMP_TOO_FAR_AHEAD", "timestamp")]),
        (timedelta(), FAULTLESS),
        (1000 * DAY, [("TIMESTAMP_TOO_FAR_AHEAD", "timestamp")]),
    ],
)
def test_clocks_may_differ_by_five_minutes(ahead: timedelta, faults: Faults) -> None:
    """A group may be exactly five minutes ahead of the server's clock and not a microsecond more."""
    assert judged(NOW + ahead, NOW) == faults
    assert judged(NOW + ahead, None) == FAULTLESS


@pytest.mark.parametrize("at", [None, NOW])
def test_a_missing_time_is_the_time_of_reporting(at: datetime | None) -> None:
    """A group without a timestamp is judged as one of now: by the term and the state at that moment."""
    assert judged(at, NOW, ending_before=NOW + MICROSECOND) == FAULTLESS
    assert judged(at, NOW, ending_before=NOW) == [("TIMESTAMP_OUTSIDE_TERM", "timestamp")]
    assert judged(at, NOW, starting_on=NOW) == FAULTLESS
    assert judged(at, NOW, starting_on=NOW + MICROSECOND) == [("TIMESTAMP_OUTSIDE_TERM", "timestamp")]


@pytest.mark.parametrize("status", list(EntitlementStatus))
def test_only_active_and_ending_entitlements_are_in_force(status: EntitlementStatus) -> None:
    """Usage is judged by the new state from the moment of a change on, and before it by the old one."""
    good = status in {EntitlementStatus.ACTIVE, EntitlementStatus.PENDING_CANCEL}
    first, then = StatusChange(EntitlementStatus.ACTIVE, NOW - DAY), StatusChange(status, NOW - HOUR)
    changed: dict[str, Any] = {"status": status, "status_changes": (first, then)}
    assert judged(NOW - HOUR - MICROSECOND, NOW, **changed) == FAULTLESS
    assert judged(NOW - HOUR, NOW, **changed) == ([] if good else NOT_ACTIVE)
    assert judged(None, NOW, **changed) == ([] if good else NOT_ACTIVE)
    # The first state known holds for all time before it too.
    assert judged(NOW - 2 * HOUR, NOW, status=status, status_changes=(then,)) == ([] if good else NOT_ACTIVE)


# --- Batches: their size, and what stands twice in them


@pytest.mark.parametrize("number", [0, 1_001])
async def test_a_batch_has_up_to_a_thousand_groups(client: Client, number: int) -> None:
    """No group at all, or 1,001, is a fault of the request, not of a group; 1,000 groups are answered one by one."""
    request = usage_record_group_pb2.BatchValidateUsageRecordGroupsRequest(groups=[group("g")] * number)
    reason = "LIMIT_EXCEEDED" if number else "FIELD_REQUIRED"
    fault = await fault_of(client.groups.BatchValidateUsageRecordGroups(request))
    assert fault.brief == ("INVALID_ARGUMENT", reason, "groups")
    other = usage_record_group_pb2.ReportUsageRecordGroupsRequest(groups=request.groups)
    assert (await fault_of(client.groups.ReportUsageRecordGroups(other))).brief == fault.brief
    results = await validate(client, *(group(f"g{i}") for i in range(1_000)))
    assert {tuple(faults_of(one)) for one in results} == {(("ENTITLEMENT_NOT_FOUND", "entitlement_id"),)}
    assert [(one.index, one.id) for one in results] == [(i, f"g{i}") for i in range(1_000)]


async def test_a_batch_has_up_to_ten_thousand_records(client: Client) -> None:
    """Records are counted over the groups of a batch: 10,001 are a fault of the request, 10,000 are judged."""
    await sell(client, dimensions=[{"key": f"d{i:03}"} for i in range(200)])
    groups = [group(f"g{i}", records={f"d{j:03}": "1" for j in range(200)}) for i in range(50)]
    assert {one.violation_count for one in await validate(client, *groups)} == {0}
    for other in (group("x", records={"d000": "1"}), group("x", records={}, billable_records=[used("any")])):
        for call in (validate, report):
            fault = await fault_of(call(client, *groups, other))
            assert fault.brief == ("INVALID_ARGUMENT", "LIMIT_EXCEEDED", "groups")


async def test_what_stands_twice_is_told_apart(client: Client) -> None:
    """In a batch an id may stand once; without ids content may. Groups that differ in either are not the same."""
    await sell(client)
    now = datetime.now(UTC)
    results = await validate(
        client,
        group("a"),
        group(""),
        group("b"),
        group("a", records={"cpu": "2"}),
        group("", records={"cpu": "1.000"}),
        group("", records={"cpu": "2"}),
        group("", at=now),
        group("", at=now - MICROSECOND),
        group("", meta_info={"lago_amount": "1"}),
        group("", meta_info={"source": "USAGE_RECORD_GROUP_SOURCE_API"}),
        group("a"),
        group("", "nobody"),
    )
    twice = [("DUPLICATE_ITEM", "id")]
    expected = {3: twice, 4: twice, 9: twice, 10: twice, 11: [("ENTITLEMENT_NOT_FOUND", "entitlement_id")]}
    assert {one.index: faults_of(one) for one in results if one.violations} == expected


async def test_many_faults_are_counted(client: Client) -> None:
    """Of a group with more than 50 faults 50 are told, and how many there are."""
    await sell(client)
    (found,) = await validate(client, group("", records={f"k{i:03}": "x" for i in range(200)}))
    assert (len(found.violations), found.violation_count) == (50, 400)
    assert {code for code, _ in faults_of(found)} == {"QUANTITY_INVALID"}


async def test_an_answer_stays_within_its_bytes(client: Client) -> None:
    """A batch of nothing but faults with long paths is answered, every group with their number, within 4 MiB."""
    await sell(client)
    groups = [group("", records={f"{i}-{j}-{'k' * 100}": "x" for j in range(10)}) for i in range(1_000)]
    results = await validate(client, *groups)
    assert {one.violation_count for one in results} == {20}
    assert len(results[0].violations) == 20
    assert not results[-1].violations
    assert sum(one.ByteSize() for one in results) < 3.5 * 1024 * 1024


async def test_what_is_nested_too_deep_is_a_fault_of_its_group(client: Client, database: Database) -> None:
    """Properties nested deeper than protobuf reads at all sink neither the call nor other groups."""
    await client.create_metric(key="any", property_filters=FILTERS["any"])
    await sell(client, billable_metric_keys=["any"])
    good = usage_record_group_pb2.ReportUsageRecordGroupsRequest(groups=[group("good")]).SerializeToString()
    for method, answer in (
        ("BatchValidateUsageRecordGroups", usage_record_group_pb2.BatchValidateUsageRecordGroupsResponse),
        ("ReportUsageRecordGroups", usage_record_group_pb2.ReportUsageRecordGroupsResponse),
    ):
        send: Any = client.channel.unary_unary(f"/metering.v1.UsageRecordGroupService/{method}")
        for depth in (100, 300, 30_000):
            found = answer.FromString(await send(_deep_request(depth) + good)).results
            assert faults_of(found[1]) == FAULTLESS
            assert faults_of(found[0])[-1] == ("MALFORMED_REQUEST", "billable_records[0]"), depth
        fault = await fault_of(send(_deep_request(100) + good * 1_000))
        assert fault.brief == ("INVALID_ARGUMENT", "LIMIT_EXCEEDED", "groups")
    assert (await stored_counts(database))["usage_record_groups"] == 1


def _deep_request(depth: int) -> bytes:
    # Written by hand from the inside out, since the library would refuse to build it: the property p of a billable
    # record is a list of a list of a list.
    inner = b"\x1a\x01x"
    heads, length = [], len(inner)
    # Two per level, Value.list_value and ListValue.values; then the value of an entry named p, and what holds it.
    for tag in [b"\x0a", b"\x32"] * depth + [b"\x0a\x01p\x12", b"\x0a", b"\x12", b"\x22", b"\x0a"]:
        head = tag + _varint(length)
        heads.append(head)
        length += len(head)
    return b"".join(reversed(heads)) + inner


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


@pytest.mark.parametrize(("depth", "taken"), [(24, True), (25, True), (26, False), (46, False), (47, False)])
async def test_what_can_be_sent_can_be_read(client: Client, depth: int, taken: bool) -> None:
    """Properties are taken up to 25 levels deep, and then shown; deeper ones could spoil an answer and are refused."""
    await client.create_metric(key="any", property_filters=FILTERS["any"])
    await sell(client, billable_metric_keys=["any"])
    request = usage_record_group_pb2.ReportUsageRecordGroupsRequest.FromString(_deep_request(depth))
    (made,) = request.groups
    made.id, made.entitlement_id = "deep", "ent"
    made.billable_records[0].key, made.billable_records[0].quantity = "any", "1"
    (result,) = await report(client, made)
    if taken:
        assert (result.verdict, faults_of(result)) == (ACCEPTED, FAULTLESS)
        assert (await stored(client, "deep")).usage_records[0].properties == made.billable_records[0].properties
        assert set(await search(client, "urg:deep:0")) == {"urg:deep:0"}
    else:
        assert result.verdict == REJECTED
        assert faults_of(result) == [("LIMIT_EXCEEDED", "billable_records[0].properties")]


async def test_tags_are_text_even_without_rules(client: Client) -> None:
    """A tag that cannot be stored is a fault of its group, skip_validation or not, and sinks no other group."""
    await sell(client)
    parts = {"usage_allocations": {"cpu": allocated(("1", [("team", "a\0")]))}}
    groups = [group("bad", meta_info={**SKIP, **parts}), group("good")]
    results = await report(client, *groups)
    assert [one.verdict for one in results] == [REJECTED, ACCEPTED]
    assert [one.violation_count > 0 for one in await validate(client, groups[0], group("fresh"))] == [True, False]


# --- Who may skip the rules


class _Credential(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, text: str) -> None:
        self._text = text

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(("authorization", f"Bearer {self._text}"))
        return await continuation(details._replace(metadata=metadata), request)


async def test_only_administrators_skip_the_rules(database_url: str, database: Database) -> None:
    """For any other caller skip_validation is a fault beside all the others, and the rules hold."""
    keys = {is_admin: new_api_key() for is_admin in (True, False)}
    async with database.engine.begin() as connection:
        await organizations.create_organization(connection, "one")
        for is_admin, key in keys.items():
            roles = (Role.ADMIN,) if is_admin else (Role.INGEST, Role.READ)
            await organizations.create_api_key(connection, "one", key.id, "k", key.secret_hash, roles)
    forbidden = [("SKIP_VALIDATION_FORBIDDEN", "meta_info.skip_validation")]
    async with running_server(database_url) as server:
        admin, other = (
            Client(server.address, grpc.aio.insecure_channel(server.address, interceptors=[_Credential(key.text)]))
            for key in keys.values()
        )
        await sell(admin)
        groups = [
            group("a", meta_info=SKIP),
            group("b", records={"disk": "0"}, meta_info=SKIP),
            group("c"),
        ]
        broken = sorted([*forbidden, ("DIMENSION_UNKNOWN", "records.disk"), ("QUANTITIES_ZERO", "records")])
        for call in (validate, report):
            results: Sequence[Any] = await call(other, *groups)
            assert [faults_of(one) for one in results] == [forbidden, broken, FAULTLESS]
        assert [faults_of(one) for one in await validate(admin, *groups)] == [FAULTLESS] * 3
        results = await report(admin, *groups)
        assert [one.verdict for one in results] == [ACCEPTED, ACCEPTED, DUPLICATE]
        # What is stored is what was sent, by anybody: the same content again is a duplicate and not judged.
        assert [one.verdict for one in await report(other, *groups)] == [DUPLICATE] * 3
        await asyncio.gather(*(one.channel.close() for one in (admin, other)))


# --- Validating is reporting without storing

# What a group may have, by part of it: first what is right, then what is wrong in most ways.
CHOICES: Mapping[str, tuple[Sequence[Any], Sequence[Any]]] = {
    "entitlement_id": (["ent"], ["azure", "gone", "nobody", "", "x" * 37]),
    "names": (["cpu", "CPU hours", "mem"], ["disk", "a\0", "", "Memory"]),
    "quantities": (["0.5", "1", "1.50"], ["0", "0.0000001", "2147483648", "-1", "x", ""]),
    "keys": (["any"], ["bare", "nothing", ""]),
    "properties": ([{"p": 1}, {"p": "x"}], [{}, {"p": None}, {"p": "1", "q": 1}, {"quantity": 1, "p": "\0"}]),
    "minutes": ([None, 0, 1], [-10, -4, 1500, 50_000]),
    "meta_info": (
        [{}, {"source": 3, "lago_amount": "1.50"}],
        [
            {"skip_validation": True},
            {"source": 99},
            {"lago_amount": "x"},
            {"usage_allocations": {"cpu": allocated("1")}},
            {
                "usage_allocations": {
                    "CPU hours": allocated(("1.5", [("k", "v")])),
                    "mem": allocated(("1", [("k!", "")])),
                }
            },
        ],
    ),
}


@st.composite
def batches_of_groups(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Groups of which each is wrong in a few parts or none; v1, v2, rarely both or neither."""
    found = []
    for _ in range(draw(st.integers(1, 6))):
        wrong = draw(st.sets(st.sampled_from(sorted(CHOICES)), max_size=2))
        pick = {
            name: st.sampled_from([*right, *(bad if name in wrong else ())]) for name, (right, bad) in CHOICES.items()
        }
        kind = draw(st.sampled_from(["v1", "v1", "v1", "v2", "v2", "both", "neither"]))
        records = draw(st.dictionaries(pick["names"], pick["quantities"], min_size=1, max_size=2))
        billable = draw(
            st.lists(st.tuples(pick["keys"], pick["quantities"], pick["properties"]), min_size=1, max_size=2)
        )
        found.append(
            {
                "entitlement_id": draw(pick["entitlement_id"]),
                "records": records if kind in {"v1", "both"} else {},
                "billable_records": [used(*one[:2], **one[2]) for one in billable] if kind in {"v2", "both"} else [],
                "minutes": draw(pick["minutes"]),
                "meta_info": draw(pick["meta_info"]),
            }
        )
    return found


@pytest.fixture
async def shop(client: Client) -> AsyncIterator[tuple[Client, Counter[int]]]:
    """A server with something to sell, and a count of the verdicts that its test has seen."""
    for key, filters in (("bare", ()), ("any", FILTERS["any"])):
        await client.create_metric(key=key, property_filters=filters)
    keys = ["bare", "any"]
    await sell(client, billable_metric_keys=keys)
    await sell(client, "azure", partner="AZURE", billable_metric_keys=keys)
    await sell(client, "gone", partner="GCP")
    await set_status(client, "gone", "ENTITLEMENT_STATUS_CANCELLED")
    seen: Counter[int] = Counter()
    yield client, seen
    # It would say nothing if all were refused.
    assert min(seen[ACCEPTED], seen[REJECTED]) > 10, seen


@settings(max_examples=60)
@given(sent=batches_of_groups())
async def test_validating_is_reporting_without_storing(
    shop: tuple[Client, Counter[int]], sent: list[dict[str, Any]]
) -> None:
    """For any batch of new ids, what BatchValidate finds is what Report refuses for, group by group."""
    client, seen = shop
    groups = []
    for one in sent:
        minutes, fields = one["minutes"], {key: value for key, value in one.items() if key != "minutes"}
        at = None if minutes is None else datetime.now(UTC) - timedelta(minutes=minutes)
        groups.append(group(str(uuid.uuid4()), at=at, **fields))
    validated, results = await validate(client, *groups), await report(client, *groups)
    for found, result in zip(validated, results, strict=True):
        assert [(one.code, one.field) for one in found.violations] == [
            (one.code, one.field) for one in result.violations
        ]
        assert found.violation_count == result.violation_count
        assert result.verdict == (REJECTED if found.violation_count else ACCEPTED)
        assert result.HasField("group") is (result.verdict == ACCEPTED)
        seen[result.verdict] += 1


async def test_a_stored_id_is_answered_before_any_rule(client: Client) -> None:
    """What is stored has no faults for ever, whatever becomes of the catalog; other content is a conflict."""
    await sell(client)
    at = datetime.now(UTC) - HOUR / 60
    first, timeless = group("a", at=at, records={"CPU hours": "1.0"}), group("b", meta_info={"lago_amount": "1"})
    await reported(client, first, timeless)
    await set_status(client, "ent", "ENTITLEMENT_STATUS_CANCELLED")
    narrowed = entitlement_pb2.Entitlement(id="ent", dimensions=[entitlement_pb2.Dimension(key="other")])
    await client.entitlements.UpdateEntitlement(entitlement_pb2.UpdateEntitlementRequest(entitlement=narrowed))
    same = [first, timeless, group("a", at=at, records={"CPU hours": "1"})]
    others = [
        group("a", records={"CPU hours": "1"}),
        group("a", at=at + MICROSECOND, records={"CPU hours": "1"}),
        group("a", at=at, records={"cpu": "1"}),
        group("a", at=at, records={"CPU hours": "2"}),
        group("a", "nobody", at=at, records={"CPU hours": "1"}),
        group("a", at=at, records={"CPU hours": "1"}, meta_info={"source": "USAGE_RECORD_GROUP_SOURCE_ORB"}),
        group("a", at=at, records={"CPU hours": "1"}, meta_info=SKIP),
        group("a", at=at, records={"CPU hours": "1"}, meta_info={"usage_allocations": {"cpu": allocated("1")}}),
        group("b", meta_info={"lago_amount": "1.0"}),
        group("b", at=at, meta_info={"lago_amount": "1"}),
    ]
    malformed = group("a", at=at, records={"CPU hours": "x"})
    for sent, verdict, faults in (
        *((one, DUPLICATE, FAULTLESS) for one in same),
        *((one, CONFLICT, [("IDEMPOTENCY_CONFLICT", "id")]) for one in others),
    ):
        (validated,), (result,) = await validate(client, sent), await report(client, sent)
        assert faults_of(validated) == faults_of(result) == faults, sent
        assert result.verdict == verdict, sent
        assert result.group.id == sent.id, sent
        assert validated.violation_count == result.violation_count == len(faults), sent
    # What is malformed is no content that could be compared.
    (validated,), (result,) = await validate(client, malformed), await report(client, malformed)
    assert faults_of(validated) == faults_of(result)
    assert ("QUANTITY_INVALID", "records.CPU hours") in faults_of(result)
    assert result.verdict == REJECTED
    # All of it in one batch, too: nothing of what is stored is judged as standing twice.
    results = await report(client, *same, *others, group("fresh"))
    assert [one.verdict for one in results] == [DUPLICATE] * 3 + [CONFLICT] * len(others) + [REJECTED]
    assert [faults_of(one) for one in await validate(client, *same)] == [FAULTLESS] * 3


# --- Verdicts


async def everything(client: Client, **fields: Any) -> list[usage_pb2.UsageWindow]:
    """All usage of yesterday, today and tomorrow, as one window per customer and metric that have any."""
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return await client.all_usage(
        **{
            "window_size": "WINDOW_SIZE_NONE",
            "starting_on": timestamp(today - DAY),
            "ending_before": timestamp(today + 2 * DAY),
            "omit_empty_windows": True,
            **fields,
        }
    )


async def record_metric_ids(client: Client) -> dict[str, str]:
    """The ids of the record metrics, by key."""
    request = billable_metric_pb2.ListBillableMetricsRequest(page_size=1_000)
    metrics = (await client.metrics.ListBillableMetrics(request)).billable_metrics
    return {one.record_key: one.id for one in metrics if one.record_key}


async def counted(client: Client) -> dict[str, str]:
    """The usage of all customers by the key of the record metric."""
    keys = {one: key for key, one in (await record_metric_ids(client)).items()}
    return {keys[one.billable_metric_id]: one.value for one in await everything(client) if one.value}


async def stored(client: Client, group_id: str) -> usage_record_group_pb2.UsageRecordGroup:
    """A group as it is stored."""
    request = usage_record_group_pb2.GetUsageRecordGroupRequest(id=group_id)
    return (await client.groups.GetUsageRecordGroup(request)).group  # type: ignore[no-any-return]


async def test_every_verdict_in_one_batch(client: Client) -> None:
    """Each group of a batch gets its own verdict, in order, and only those ACCEPTED are stored and count."""
    await sell(client)
    await reported(client, group("old"), group("older"))
    results = await report(
        client,
        group("new"),
        group("old"),
        group("older", records={"cpu": "5"}),
        group("bad", records={"disk": "1"}),
        group("", records={"cpu": "100"}),
        group("x" * 37, records={"cpu": "1000"}),
        group("new2", records={"mem": "0.5"}),
        group("malformed", records={"cpu": "1e400"}),
    )
    assert [(one.index, one.id, one.verdict) for one in results] == [
        (0, "new", ACCEPTED),
        (1, "old", DUPLICATE),
        (2, "older", CONFLICT),
        (3, "bad", REJECTED),
        (4, "", REJECTED),
        (5, "", REJECTED),
        (6, "new2", ACCEPTED),
        (7, "malformed", REJECTED),
    ]
    assert [faults_of(one) for one in results] == [
        FAULTLESS,
        FAULTLESS,
        [("IDEMPOTENCY_CONFLICT", "id")],
        [("DIMENSION_UNKNOWN", "records.disk")],
        [("FIELD_REQUIRED", "id")],
        [("LIMIT_EXCEEDED", "id")],
        FAULTLESS,
        CPU_INVALID,
    ]
    for one in results:
        assert one.HasField("group") is (one.verdict != REJECTED)
        if one.HasField("group"):
            assert one.group == await stored(client, one.id)
    assert await counted(client) == {"cpu": "3", "mem": "0.5"}


async def test_an_id_that_stands_twice_in_a_batch(client: Client, database: Database) -> None:
    """The first group of an id that is valid wins; the same content after it is DUPLICATE, other content CONFLICT."""
    await sell(client)
    results = await report(
        client,
        group("same"),
        group("same", records={"cpu": "1.0"}),
        group("same"),
        group("other"),
        group("other", records={"cpu": "2"}),
        group("bad", records={"disk": "1"}),
        group("bad"),
        group("good"),
        group("good", records={"disk": "1"}),
        group("form"),
        group("form", records={"cpu": "x"}),
        group("form2", records={"cpu": "x"}),
        group("form2"),
    )
    assert [(one.id, one.verdict) for one in results] == [
        ("same", ACCEPTED),
        ("same", DUPLICATE),
        ("same", DUPLICATE),
        ("other", ACCEPTED),
        ("other", CONFLICT),
        ("bad", REJECTED),
        ("bad", REJECTED),
        ("good", ACCEPTED),
        ("good", CONFLICT),
        ("form", ACCEPTED),
        ("form", REJECTED),
        ("form2", REJECTED),
        ("form2", REJECTED),
    ]
    assert faults_of(results[4]) == faults_of(results[8]) == [("IDEMPOTENCY_CONFLICT", "id")]
    assert faults_of(results[6]) == faults_of(results[12]) == [("DUPLICATE_ITEM", "id")]
    assert await stored_counts(database) == {"usage_record_groups": 4, "usage_records": 4, "usage_events": 4}
    assert await counted(client) == {"cpu": "4"}


async def test_a_time_that_was_left_out_is_no_content(client: Client) -> None:
    """A group without a time has that of its first report; a retry without it is a DUPLICATE and changes nothing."""
    await sell(client)
    before = datetime.now(UTC)
    (first,) = await reported(client, group("a"))
    assert before <= first.meta_info.timestamp.ToDatetime(UTC) <= datetime.now(UTC)
    await asyncio.sleep(0.01)
    (again,) = await report(client, group("a"))
    assert (again.verdict, again.group) == (DUPLICATE, first)
    (timed,) = await report(client, group("a", at=first.meta_info.timestamp.ToDatetime(UTC)))
    assert timed.verdict == CONFLICT
    assert await stored(client, "a") == first


async def test_content_is_compared_by_what_it_means(client: Client) -> None:
    """Content is the same with other digits of a number, another order of names, or values inside of meta_info."""
    await client.create_metric(
        key="any", property_filters=[{"name": "p", "exists": True}, {"name": "q", "exists": True}]
    )
    await sell(client, billable_metric_keys=["any"])
    at = datetime.now(UTC)
    records = {f"k{i}": "1" for i in range(3)}
    admin = {**SKIP, "source": "USAGE_RECORD_GROUP_SOURCE_API"}
    tags = [("a", "1"), ("b", "2")]
    same: list[tuple[New, New]] = [
        (group("a", records={"cpu": "1.0"}), group("a", records={"cpu": "01"})),
        (group("b", records={"cpu": "0.0", "mem": "1"}), group("b", records={"mem": "1.000", "cpu": "-0"})),
        (group("c", at=at), group("c", meta_info={"timestamp": timestamp(at)})),
        (
            group("d", records={}, billable_records=[used("any", "1", p=1, q=[{"x": 1, "y": 2}])]),
            group("d", records={}, meta_info={"billable_records": [used("any", "1.0", q=[{"y": 2, "x": 1}], p=1.0)]}),
        ),
        (group("e"), group("e", meta_info={"origin_records": {"cpu": "1.0"}})),
        (group("f", records=records, meta_info=SKIP), group("f", records=records, meta_info=admin)),
        (
            group("g", billable_records=[used("any", p=1, q=1), used("any", "2", p=2, q=2)]),
            group("g", billable_records=[used("any", "2", p=2, q=2), used("any", p=1, q=1)]),
        ),
        (
            group("h", meta_info={"usage_allocations": {"cpu": allocated(("0.5", [*tags]), ("0.5", [*tags[:1]]))}}),
            group("h", meta_info={"usage_allocations": {"cpu": allocated(("0.50", [*tags[:1]]), ("0.5", tags[::-1]))}}),
        ),
    ]
    assert [one.verdict for one in await report(client, *(first for first, _ in same))] == [ACCEPTED] * len(same)
    assert [one.verdict for one in await report(client, *(other for _, other in same))] == [DUPLICATE] * len(same)


async def test_many_reports_at_once_count_once(client: Client, database: Database) -> None:
    """Of twenty concurrent reports of one batch each group is ACCEPTED once, and counts once."""
    await sell(client)
    groups = [group(f"g{i:02}", records={"cpu": "1", "Memory": "0.5"}) for i in range(25)]
    orders = [groups if i % 2 else groups[::-1] for i in range(20)]
    answers = await asyncio.gather(*(report(client, *order) for order in orders))
    verdicts = Counter((one.id, one.verdict) for answer in answers for one in answer)
    assert verdicts == {
        (one.id, verdict): count for one in groups for verdict, count in ((ACCEPTED, 1), (DUPLICATE, 19))
    }
    assert await counted(client) == {"cpu": "25", "mem": "12.5"}
    assert await stored_counts(database) == {"usage_record_groups": 25, "usage_records": 50, "usage_events": 50}
    shown = [await stored(client, one.id) for one in groups]
    assert len({one.serial_id for one in shown}) == 25


async def test_batches_that_were_judged_before_either_was_stored(
    client: Client, database: Database, database_url: str
) -> None:
    """Reports at two replicas that both found the ids free store each group once, with its records."""
    await sell(client)
    blocked = sa.select(sa.func.count()).select_from(sa.text("pg_locks")).where(sa.text("NOT granted"))
    async with (
        running_server(database_url) as replica,
        database.engine.connect() as holder,
        database.engine.connect() as watcher,
    ):
        # All reports take their serial ids from this row, after they have judged and before they store.
        await holder.execute(sa.select(organizations_table).with_for_update())

        async def waiting() -> bool:
            return bool((await watcher.execute(blocked)).scalar_one() >= 2)

        sent = [group("a"), group("b"), group("own"), group("c", records={"cpu": "2"})]
        others = [group("c"), group("b"), group("other"), group("a")]
        calls = [asyncio.create_task(report(one, *groups)) for one, groups in ((client, sent), (replica, others))]
        await until(waiting)
        await holder.rollback()
        answers = await asyncio.gather(*calls)
    verdicts = {(one.id, one.verdict) for answer in answers for one in answer}
    assert verdicts == {
        *((name, ACCEPTED) for name in ("a", "b", "c", "own", "other")),
        *((name, DUPLICATE) for name in ("a", "b")),
        ("c", CONFLICT),
    }
    assert await stored_counts(database) == {"usage_record_groups": 5, "usage_records": 5, "usage_events": 5}
    assert await counted(client) == {"cpu": str(4 + int((await stored(client, "c")).records["cpu"]))}


async def test_of_many_contents_at_once_one_wins(client: Client) -> None:
    """Of concurrent reports of other contents under one id one is ACCEPTED and counts; the others CONFLICT."""
    await sell(client)
    sent = [group("a", records={"cpu": str(i + 1)}) for i in range(10)]
    results = [one for answer in await asyncio.gather(*(report(client, one) for one in sent)) for one in answer]
    assert Counter(one.verdict for one in results) == {ACCEPTED: 1, CONFLICT: 9}
    winner = next(i for i, one in enumerate(results) if one.verdict == ACCEPTED)
    assert await counted(client) == {"cpu": str(winner + 1)}
    assert {one.group.records["cpu"] for one in results} == {str(winner + 1)}


async def test_records_keep_their_order(client: Client) -> None:
    """Billable records are kept as they were sent, however many; each is the event of its place."""
    await client.create_metric(key="any", property_filters=FILTERS["any"])
    await sell(client, billable_metric_keys=["any"])
    order = [(i * 7) % 15 for i in range(15)]
    (shown,) = await reported(client, group("a", billable_records=[used("any", str(i + 1), p=i) for i in order]))
    assert [(one.quantity, one.properties["p"]) for one in shown.usage_records] == [(str(i + 1), i) for i in order]
    assert [one.quantity for one in shown.meta_info.billable_records] == [str(i + 1) for i in order]
    found = await search(client, *(f"urg:a:{i}" for i in range(16)))
    assert {key: one.event.properties["p"] for key, one in found.items()} == {
        f"urg:a:{place}": i for place, i in enumerate(order)
    }


# --- What is reported is read back as it was sent


def unset(message: Message, seen: dict[str, set[str]], kinds: dict[str, Any]) -> None:
    """Note which fields of which of our messages are set, all the way down."""
    descriptor = message.DESCRIPTOR
    if not descriptor.full_name.startswith("metering."):
        return
    kinds[descriptor.full_name] = descriptor
    names = seen.setdefault(descriptor.full_name, set())
    for one, value in message.ListFields():
        names.add(one.name)
        is_map = one.message_type is not None and one.message_type.GetOptions().map_entry
        values = value.values() if is_map else value if one.is_repeated else [value]
        for inner in values:
            if isinstance(inner, Message):
                unset(inner, seen, kinds)


async def test_every_field_comes_back_as_it_was_sent(client: Client, database: Database) -> None:
    """A payload of every field of the contract, of v1 and of v2, is read back exactly."""
    await client.create_metric(
        key="requests",
        property_filters=[{"name": name, "exists": True} for name in ("region", "n", "list", "object", "yes")],
    )
    await sell(client, billable_metric_keys=["requests"])
    at = datetime.now(UTC) - timedelta(seconds=1)
    properties = {
        "region": 'us \u2603 "\\',
        "n": -12.25,
        "list": [1, None, {"a": "b"}],
        "object": {"z": 1},
        "yes": True,
    }
    billable = used("requests", "0.000000000000000001", **properties)
    known = {
        "source": "USAGE_RECORD_GROUP_SOURCE_STRIPE",
        "timestamp": timestamp(at),
        "lago_amount": "12.50",
        "lago_subscription_id": "lago \u2603",
        "lago_usage_start_time": timestamp(at - 300 * DAY),
        "metronome_daily_cost_amount": "0.10",
        "metronome_invoice_id": "met\n1",
        "metronome_monthly_invoice_amount": "99999999999999999999.999999999999999999",
        "metronome_monthly_invoice_amount_adjusted": "-1.0",
        "metronome_invoice_credit_back": True,
        "metronome_invoice_credit_back_amount": "007",
        "stripe_invoice_id": 'in_1"\\',
        "stripe_period_start_time": timestamp(datetime(1, 1, 2, tzinfo=UTC)),
        "stripe_period_end_time": timestamp(datetime(9999, 12, 30, 23, 59, 59, 999_999, tzinfo=UTC)),
        "stripe_subscription_item_id": "si_1",
        "stripe_usage_record_summary_id": "sis_1",
        "stripe_usage_record_summary_total_usage": 2**63 - 1,
        "erp_invoice_id": "erp-1",
    }
    origin = {"CPU hours": "1.5", "mem": "2"}
    parts = {"CPU hours": allocated(("1", [("team", "a b"), ("cost:center", "/x@y")]), "0.5")}
    one = group("v1", at=at, records=origin, meta_info={**known, "origin_records": origin, "usage_allocations": parts})
    two = group("v2", at=at, billable_records=[billable], meta_info={**known, "billable_records": [billable]})
    three = group("skipped", at=at, records=origin, meta_info={**known, **SKIP, "origin_records": origin})
    seen: dict[str, set[str]] = {}
    kinds: dict[str, Any] = {}
    for sent in (one, two, three):
        unset(sent, seen, kinds)
    assert {kind.rpartition(".")[2] for kind in seen} == {
        "NewUsageRecordGroup",
        "UsageRecordGroupMetaInfo",
        "BillableRecord",
        "UsageAllocations",
        "UsageAllocation",
        "UsageTag",
    }
    assert {kind: {one.name for one in kinds[kind].fields} for kind in seen} == seen
    # One validates as well, alone and with the others.
    assert [faults_of(found) for found in await validate(client, one, two, three)] == [FAULTLESS] * 3
    before = datetime.now(UTC)
    answered = await reported(client, one, two, three)
    for sent, answer in zip((one, two, three), answered, strict=True):
        got = await stored(client, sent.id)
        assert got == answer
        assert got.meta_info == sent.meta_info
        assert (got.id, got.entitlement_id, got.buyer_id, got.product_id) == (sent.id, "ent", "b-ent", "p-ent")
        assert (got.organization_id, got.partner) == ("default", entitlement_pb2.PARTNER_AWS)
        assert got.status == usage_record_group_pb2.USAGE_RECORD_GROUP_STATUS_CREATED
        assert before <= got.create_time.ToDatetime(UTC) <= datetime.now(UTC)
        assert got.create_time == got.update_time
        assert not got.HasField("reported_time")
        assert (got.usage_record_report_id, list(got.invalid_reasons)) == ("", [])
        assert {record.state for record in got.usage_records} == {usage_record_group_pb2.USAGE_RECORD_STATE_CREATED}
    assert answered[0].serial_id < answered[1].serial_id < answered[2].serial_id
    for answer in (answered[0], answered[2]):
        assert dict(answer.records) == {"cpu": "1.5", "mem": "2"}
        assert [(record.key, record.quantity) for record in answer.usage_records] == [("cpu", "1.5"), ("mem", "2")]
    assert not answered[1].records
    async with database.engine.connect() as connection:
        # By this time the hourly report finds them.
        times = (await connection.execute(sa.select(usage_records.c.timestamp))).scalars()
        assert set(times) == {at}
    (record,) = answered[1].usage_records
    assert (record.key, record.quantity) == ("requests", "0.000000000000000001")
    assert record.properties == two.billable_records[0].properties


# --- Groups are usage


async def search(client: Client, *ids: str) -> dict[str, event_pb2.StoredEvent]:
    """Stored events by id."""
    answer = await client.events.SearchEvents(event_pb2.SearchEventsRequest(transaction_ids=ids))
    return {one.event.transaction_id: one for one in answer.events}


async def verified(database: Database) -> int:
    """Compare all cells with their events; returns how many metrics were compared."""
    wrong: list[Finding] = []
    checked = await verify_cells(database, wrong.append)
    assert [str(one) for one in wrong] == []
    return checked


async def delete(client: Client, group_id: str) -> None:
    """Delete a group."""
    await client.groups.DeleteUsageRecordGroup(usage_record_group_pb2.DeleteUsageRecordGroupRequest(id=group_id))


async def test_groups_are_usage_of_their_buyer_at_once(client: Client, database: Database) -> None:
    """An accepted group shows in ListUsage and StreamUsage of its buyer, exactly, until it is deleted."""
    customer, other = await client.create_customer(buyer_id="buyer"), await client.create_customer(buyer_id="other")
    await client.create_metric(key="any", property_filters=FILTERS["any"])
    await sell(client, buyer_id="buyer", partner="GCP", billable_metric_keys=["any"])
    await sell(client, "second", buyer_id="other", partner="GCP")
    metrics = await record_metric_ids(client)
    assert set(metrics) == {"cpu", "mem", "any"}

    async def usage() -> dict[str, str]:
        """Usage by customer and metric, listed and streamed alike."""
        listed = await everything(client)
        today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        request = usage_pb2.StreamUsageRequest(
            window_size=usage_pb2.WINDOW_SIZE_NONE,
            starting_on=timestamp(today - DAY),
            ending_before=timestamp(today + 2 * DAY),
            omit_empty_windows=True,
        )
        assert [one async for message in client.usage.StreamUsage(request) for one in message.windows] == listed
        assert not any(one.skipped_count for one in listed)
        names = {(customer.id, one): key for key, one in metrics.items()}
        names |= {(other.id, one): f"other's {key}" for key, one in metrics.items()}
        return {names[one.customer_id, one.billable_metric_id]: one.value for one in listed if one.value}

    assert await usage() == {}
    await reported(
        client,
        group("a", records={"CPU hours": "0.1", "mem": "0"}),
        group("b", records={"cpu": "9223372036854775806.000000000000000001"}),
        group("c", billable_records=[used("any", "1.5", p=1), used("any", "2.25", p=2)]),
        group("d", "second", records={"cpu": "7"}),
    )
    first = {"cpu": "9223372036854775806.100000000000000001", "mem": "0", "any": "3.75", "other's cpu": "7"}
    assert await usage() == first
    # The record metrics of the three keys, and the ordinary metric.
    assert await verified(database) == 4
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    late, early = hour - MICROSECOND, hour
    await reported(client, group("late", at=late, records={"mem": "3"}), group("early", at=early, records={"mem": "4"}))
    windows = await client.all_usage(
        window_size="WINDOW_SIZE_HOUR",
        starting_on=timestamp(hour - HOUR),
        ending_before=timestamp(hour + HOUR),
        customer_ids=[customer.id],
        billable_metrics=[{"id": metrics["mem"]}],
    )
    assert [one.value for one in windows] == ["3", "4"]
    assert await usage() == {**first, "mem": "7"}
    # Twice what is stored changes nothing; what is deleted leaves, once.
    await report(client, group("late", at=late, records={"mem": "3"}), group("a", records={"cpu": "5"}))
    assert await usage() == {**first, "mem": "7"}
    for name in ("b", "c", "late", "late"):
        await delete(client, name)
    assert await usage() == {"cpu": "0.1", "mem": "4", "other's cpu": "7"}
    assert await verified(database) == 4
    (again,) = await report(client, group("late", at=late, records={"mem": "3"}))
    assert again.verdict == DUPLICATE
    assert await usage() == {"cpu": "0.1", "mem": "4", "other's cpu": "7"}


async def test_no_other_metric_counts_records(client: Client, database: Database) -> None:
    """Ordinary metrics of any aggregation, made before or after, do not count records; SearchEvents says which does."""
    customer = await client.create_customer(buyer_id="buyer")
    kinds = [name for name, number in billable_metric_pb2.AggregationType.items() if number]

    async def ordinary(when: str) -> list[str]:
        """Metrics that would count the records if they were events."""
        return [
            (
                await client.create_metric(
                    name=f"{when} {kind}",
                    aggregation_type=kind,
                    aggregation_key="" if kind == "AGGREGATION_TYPE_COUNT" else "quantity",
                    event_type_filter={"in_values": ["cpu", "any"]},
                )
            ).id
            for kind in kinds
        ]

    before = await ordinary("before")
    await client.create_metric(key="any", property_filters=FILTERS["any"])
    await sell(client, buyer_id="buyer", billable_metric_keys=["any"])
    await reported(
        client,
        group("a", records={"cpu": "2", "mem": "3"}),
        group("b", billable_records=[used("any", "4", p={"x": [1]})]),
    )
    # An event of the same type and shape counts in them, and not in the record metric.
    at = datetime.now(UTC)
    await client.ingest(event("plain", customer_id=customer.id, event_type="cpu", at=at, properties={"quantity": "50"}))
    after = await ordinary("after")
    metrics = await record_metric_ids(client)
    values = {one.billable_metric_id: one.value for one in await everything(client) if one.value}
    expected = {"cpu": "2", "mem": "3", "any": "4"}
    assert {key: values[one] for key, one in metrics.items()} == expected
    counts = {"AGGREGATION_TYPE_COUNT": "1", "AGGREGATION_TYPE_UNIQUE": "1"}
    for made in (before, after):
        assert [values[one] for one in made] == [counts.get(kind, "50") for kind in kinds]
    found = await search(client, "urg:a:0", "urg:a:1", "urg:a:2", "urg:b:0", "plain")
    assert set(found) == {"urg:a:0", "urg:a:1", "urg:b:0", "plain"}
    outcomes = {
        name: {one.billable_metric_id: (one.outcome, one.rule) for one in explained.metrics}
        for name, explained in found.items()
    }
    for name, key in (("urg:a:0", "cpu"), ("urg:a:1", "mem"), ("urg:b:0", "any")):
        assert outcomes[name].pop(metrics[key]) == (event_pb2.METRIC_OUTCOME_COUNTED, "")
        assert set(outcomes[name]) >= {*before, *after}
        assert set(outcomes[name].values()) == {(event_pb2.METRIC_OUTCOME_NOT_MATCHED, "record_key")}
        assert found[name].matched_customer_id == found[name].event.customer_id == customer.id
        assert found[name].event.event_type == key
    assert found["urg:b:0"].event.properties == event(properties={"quantity": "4", "p": {"x": [1]}}).properties
    assert all(outcomes["plain"][one][0] == event_pb2.METRIC_OUTCOME_COUNTED for one in (*before, *after))
    assert event_pb2.METRIC_OUTCOME_COUNTED not in {
        outcome for one, (outcome, _) in outcomes["plain"].items() if one in metrics.values()
    }
    await verified(database)


async def test_what_is_the_services_own_stays_so(client: Client) -> None:
    """Clients cannot send the ids that records have, nor archive what counts them, before or after usage."""
    await sell(client)
    (result,) = (await client.ingest(event("urg:a:0"))).issues
    assert error_reason_pb2.ErrorReason.Name(result.reason) == "ERROR_REASON_TRANSACTION_ID_RESERVED"
    metrics = await record_metric_ids(client)
    for _ in range(2):
        for metric_id in metrics.values():
            request = billable_metric_pb2.ArchiveBillableMetricRequest(id=metric_id)
            fault = await fault_of(client.metrics.ArchiveBillableMetric(request))
            assert (fault.code, fault.reason) == ("FAILED_PRECONDITION", "RECORD_METRIC")
        (accepted,) = await report(client, group("a"))
        assert accepted.verdict in {ACCEPTED, DUPLICATE}
    assert await counted(client) == {"cpu": "1"}


async def test_aggregates_are_what_records_say(client: Client, database: Database) -> None:
    """After concurrent reports, retries and deletions of many groups every cell is what the records left say."""
    await sell(client, partner="GCP")
    now = datetime.now(UTC)
    groups = [
        group(f"g{i}", at=now - (i % 5) * HOUR, records={"cpu": f"0.{i + 1:03}", "mem": str(i % 3 + 1)})
        for i in range(60)
    ]
    await asyncio.gather(
        *(report(client, *groups[i::6]) for i in range(6)), *(report(client, *groups) for _ in range(3))
    )
    gone = groups[::4]
    await asyncio.gather(*(delete(client, one.id) for one in gone), *(report(client, *groups) for _ in range(3)))
    left = [one for one in groups if one not in gone]
    expected = {key: sum(Decimal(one.records[key]) for one in left) for key in ("cpu", "mem")}
    assert {key: Decimal(value) for key, value in (await counted(client)).items()} == expected
    assert await verified(database) == 2
