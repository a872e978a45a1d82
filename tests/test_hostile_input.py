"""Claims about hostile input: whatever is sent, the answer is a documented one, nothing else changes, and all goes on.

Each row is one input over the wire. After it nothing in the database is different, unless the row says ACCEPTED or
names the tables: then what was stored comes back byte for byte. The server answers a sound call on the same channel,
logs no error, and tells nothing of its insides.
"""

import asyncio
import itertools
import logging
import random
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

import grpc
import pytest
import sqlalchemy as sa
from conftest import Client, event, running_server, start_server, timestamp
from faults import LEAK, Fault, fault_of, read_fault, until
from google.protobuf import message_factory
from google.protobuf.struct_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2, health_pb2_grpc
from marketplace import group, reported, sell
from sqlalchemy.ext.asyncio import create_async_engine
from structlog.testing import capture_logs

from compat.suger.v1 import entitlement_pb2 as suger_entitlement_pb2
from metering.v1 import (
    billable_metric_pb2,
    customer_pb2,
    entitlement_pb2,
    error_reason_pb2,
    event_pb2,
    usage_pb2,
    usage_record_group_pb2,
    usage_record_report_pb2,
)
from service.auth import NewApiKey, new_api_key
from service.database import Database
from service.domain.events import NESTING_MAX
from service.postgres import EmbeddedPostgres
from service.reporting import Reporting
from service.store import organizations
from service.store.tables import METADATA

CUSTOMER, METRIC, GONE = (f"00000000-0000-4000-8000-00000000000{i}" for i in range(3))
UNKNOWN = "00000000-0000-4000-8000-00000000dead"
START = datetime(2026, 1, 1, tzinfo=UTC)
WIDE = "\U0001f600"
KIB, MIB = 1024, 1024 * 1024
SQL = "'; DROP TABLE usage_events;--"
MALFORMED = "INVALID_ARGUMENT MALFORMED_REQUEST request"
NO_PAGE = "INVALID_ARGUMENT PAGE_TOKEN_INVALID page_token"
NO_CREDENTIAL = "UNAUTHENTICATED CREDENTIAL_INVALID"
# What an accepted event may change, and an accepted group.
EVENTS = frozenset({"usage_events", "usage_cells"})
GROUPS = EVENTS | {"organizations", "usage_record_groups", "usage_records"}


class Row(NamedTuple):
    """What is sent, what must be said, and which tables may change beside those of accepted events."""

    name: str
    send: "Send"
    says: str
    changes: frozenset[str] = frozenset()


# How a number that is no plain decimal is named, and its text.
NO_NUMBERS = [
    ("B34 NaN", "NaN"),
    ("B34 sNaN", "sNaN"),
    ("B35 Infinity", "Infinity"),
    ("B35 minus Infinity", "-Infinity"),
    ("B35 inf", "inf"),
    ("B36 an exponent beyond what Postgres holds", "1E+131072"),
    ("B37 an exponent of a million", "1E+1000000"),
    ("B37 an exponent of a milliard", "1e999999999"),
    ("B37 a fraction of a milliard places", "1e-999999999"),
    ("B37 a thousand digits", "9" * 1000),
    ("B38 39 digits", "1" * 39),
    ("B38 21 digits and 18 places", "1" * 21 + "." + "1" * 18),
    ("B39 19 places", "0." + "1" * 19),
    ("B42 a decimal comma", "1,5"),
    ("B42 a full-width digit", "\uff11"),
    ("B42 an arabic digit", "\u0663"),
    ("B42 an underscore", "1_000"),
    ("B42 hexadecimal", "0x10"),
    ("B42 a plus sign", "+1"),
    ("B42 a leading blank", " 1"),
    ("B42 a trailing newline", "1\n"),
    ("B42 no digit before the point", ".5"),
    ("B42 no digit after the point", "5."),
    ("B42 two minus signs", "--1"),
    ("B42 SQL", "1); DROP TABLE usage_cells;--"),
    ("B43 nothing", ""),
    ("B46 an exponent of 400", "1e400"),
    ("B46 an exponent of 200,000", "1e200000"),
]
# Texts that mean something to Postgres, JSON, JavaScript or a regular expression, and nothing to us.
LITERALS = [
    ("B68 a prototype", "__proto__"),
    ("B68 a constructor", "constructor"),
    ("B68 a Mongo operator", "$where"),
    ("B68 a path", "a.b"),
    ("B68 a JSON operator", "a->>'b'"),
    ("B69 SQL", SQL),
    ("B69 a percent sign", "%"),
    ("B69 an underscore", "_"),
    ("B69 a backslash", "\\"),
    ("B69 a double quote", '"'),
    ("B69 a placeholder", ":x $1 %(x)s %s ?"),
    ("B72 a costly regular expression", "(a+)+$"),
    ("B72 a regular expression that matches all", ".*"),
]
# Characters that ids may hold, however they look.
IDS = [
    ("B26 right-to-left override", "b26\u202ex"),
    ("B26 a zero-width blank", "b26\u200bx"),
    ("B27 a composed letter", "b27 caf\u00e9"),
    ("B27 a decomposed letter", "b27 cafe\u0301"),
    ("B28 no trailing blank", "b28 x"),
    ("B28 a trailing blank", "b28 x "),
    ("B30 four bytes a character", f"b30 {WIDE}{WIDE}"),
    ("B24 128 characters of four bytes", WIDE * 128),
]


def rows() -> list[Row]:
    """Every input, in the order of its number."""
    e = event
    found = [
        # --- Bytes
        Row("B1 bytes that are no message", raw("IngestEvents", b"\xff\xff\xff"), MALFORMED),
        Row("B1 bytes that are no query", raw("ListUsage", b"\xff\xff\xff"), MALFORMED),
        Row("B1 bytes that are no groups", raw("ReportUsageRecordGroups", b"\xff\xff\xff"), MALFORMED),
        Row("B1 bytes that are no message of a stream", streamed(b"\xff\xff\xff"), MALFORMED),
        Row("B2 a truncated length", raw("IngestEvents", b"\x0a\x7f\x00"), MALFORMED),
        Row("B2 a truncated length of a group", raw("ReportUsageRecordGroups", b"\x0a\x7f\x00"), MALFORMED),
        Row("B2 a message cut short by its frame", cut_message, "refused, connection lives"),
        Row("B2 a message said to have 4 GiB", long_message, "refused, connection lives"),
        Row("B3 invalid UTF-8", raw("IngestEvents", b"\x0a\x04\x0a\x02\xff\xfe"), MALFORMED),
        Row("B3 invalid UTF-8 in a group's id", raw("ReportUsageRecordGroups", b"\x0a\x04\x0a\x02\xff\xfe"), MALFORMED),
        *(
            Row(
                f"B3 invalid UTF-8 in {name}",
                raw("ReportUsageRecordGroups", _field(1, _field(1, b"b3") + _field(2, b"ent") + content)),
                f"REJECTED MALFORMED_REQUEST groups[0].{field}",
            )
            for name, content, field in (
                ("a group's records", _field(3, _field(1, b"\xff") + _field(2, b"1")), "records"),
                ("a group's billable record", _field(4, _field(1, b"\xff")), "billable_records[0]"),
                ("a group's meta_info", _field(6, _field(22, b"\xff")), "meta_info"),
            )
        ),
        Row("B4 the deepest nesting allowed", ingest(nested(NESTING_MAX)), "ACCEPTED"),
        Row(
            "B4 one level deeper",
            ingest(nested(NESTING_MAX + 1)),
            "REJECTED LIMIT_EXCEEDED events[0].properties",
        ),
        Row("B4 nesting of 50", raw("IngestEvents", deep(50)), MALFORMED),
        Row("B4 nesting of 100", raw("IngestEvents", deep(100)), MALFORMED),
        Row("B5 nesting of 100,000", raw("IngestEvents", deep(100_000)), MALFORMED),
        Row(
            "B5 nesting of 100,000 in a group",
            raw("ReportUsageRecordGroups", deep(100_000, group=True)),
            "REJECTED MALFORMED_REQUEST groups[0].billable_records[0]",
        ),
        Row("B6 an empty ingest", raw("IngestEvents", b""), "INVALID_ARGUMENT FIELD_REQUIRED events"),
        Row("B6 an empty query", raw("ListUsage", b""), "INVALID_ARGUMENT FIELD_REQUIRED window_size"),
        Row("B6 an empty report", raw("ReportUsageRecordGroups", b""), "INVALID_ARGUMENT FIELD_REQUIRED groups"),
        Row(
            "B6 an empty metric",
            raw("CreateBillableMetric", b""),
            "INVALID_ARGUMENT FIELD_REQUIRED billable_metric.aggregation_type",
        ),
        Row("B7 unknown fields", unknown_fields, "ACCEPTED"),
        Row("B8 an unknown window size", usage(window_size=99), "INVALID_ARGUMENT FIELD_INVALID window_size"),
        Row(
            "B8 an unknown aggregation",
            call("CreateBillableMetric", billable_metric={"name": "m", "aggregation_type": 99}),
            "INVALID_ARGUMENT FIELD_INVALID billable_metric.aggregation_type",
        ),
        Row(
            "B8 an unknown source of a group",
            report(group("b8", meta_info={"source": 99})),
            "REJECTED FIELD_INVALID groups[0].meta_info.source",
        ),
        Row(
            "B8 an unknown status in a filter",
            call("ListUsageRecordGroups", status=99),
            "INVALID_ARGUMENT FIELD_INVALID status",
        ),
        Row("B9 a oneof twice: the last counts", oneof_twice, "ACCEPTED"),
        # --- Sizes, and what the transport makes of them
        Row("B10 a message of 4 MiB and a byte", raw("IngestEvents", bytes(4 * MIB + 1)), "RESOURCE_EXHAUSTED"),
        Row("B10 a message of a stream of 4 MiB and a byte", streamed(bytes(4 * MIB + 1)), "RESOURCE_EXHAUSTED"),
        Row("B11 50 MiB of zeros as gzip", bomb, "RESOURCE_EXHAUSTED"),
        Row("B11 bytes that are no gzip", no_gzip, "refused, connection lives"),
        Row("B12 unknown compression", unknown_compression, "refused, connection lives"),
        Row("B13 an answer of many times 4 MiB", huge_answer, "OK, a short page"),
        Row("B14 headers of 9 KB", headers(9_000), "OK"),
        Row("B14 headers of 15 KB", headers(15_000), "OK"),
        Row("B14 headers of 17 KB", headers(17_000), "RESOURCE_EXHAUSTED"),
        Row("B14 headers of 400 KB in continuation frames", continuation, "refused, connection lives"),
        Row("B15 an unknown method", path("/metering.v1.EventService/DropTables"), "UNIMPLEMENTED"),
        Row("B15 an unknown service", path("/metering.v2.EventService/IngestEvents"), "UNIMPLEMENTED"),
        Row("B15 a method with a query", path("/metering.v1.EventService/IngestEvents?x=1"), "UNIMPLEMENTED"),
        Row("B16 content-type text/plain", http2({"content-type": b"text/plain"}), "OK, connection lives"),
        Row("B16 HTTP/1.1", garbage(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc"), "closed"),
        Row("B16 a TLS handshake", garbage(bytes.fromhex("160301020001000001fc0303") + bytes(500)), "closed"),
        Row("B16 garbage", garbage(random.Random(16).randbytes(8 * KIB)), "closed"),
        Row("B16 a frame of a mebibyte", oversized_frame, "closed"),
        Row("B17 a deadline that is over", http2({"grpc-timeout": b"0n"}), "refused, connection lives"),
        Row("B17 deadlines of a millisecond", deadlines, "exactly once", EVENTS),
        Row("B18 cancelled at any time", cancellations, "exactly once", EVENTS),
        # --- Batches and ids
        Row("B19 no events", ingest(), "INVALID_ARGUMENT FIELD_REQUIRED events"),
        Row("B19 no groups", report(), "INVALID_ARGUMENT FIELD_REQUIRED groups"),
        Row("B20 10,000 events", ingest(*[e("b20")] * 10_000), "ACCEPTED, 9999 x DUPLICATE"),
        Row("B20 10,001 events", ingest(*[e()] * 10_001), "INVALID_ARGUMENT LIMIT_EXCEEDED events"),
        Row("B20 1,001 groups", report(*[group("b20")] * 1_001), "INVALID_ARGUMENT LIMIT_EXCEEDED groups"),
        Row("B21 one id twice, equal", ingest(e("b21"), e("b21")), "ACCEPTED, DUPLICATE"),
        Row(
            "B21 one group twice, equal",
            report(group("b21"), group("b21")),
            "ACCEPTED, DUPLICATE",
            GROUPS,
        ),
        Row(
            "B22 one group twice, different",
            report(group("b22"), group("b22", records={"cpu": "2"})),
            "ACCEPTED, CONFLICT IDEMPOTENCY_CONFLICT groups[1].id",
            GROUPS,
        ),
        Row(
            "B22 one id twice, different",
            ingest(e("b22"), e("b22", event_type="other")),
            "ACCEPTED, CONFLICT IDEMPOTENCY_CONFLICT events[1].transaction_id",
        ),
        Row(
            "B22 one id twice, different, all or nothing",
            ingest(e("b22 all"), e("b22 all", event_type="other"), all_or_nothing=True),
            "ALREADY_EXISTS IDEMPOTENCY_CONFLICT events[1].transaction_id",
        ),
        *(
            Row(
                f"{number} {name} as {field}",
                ingest(e(**{"transaction_id": str(uuid.uuid4()), field: text})),
                f"REJECTED {reason} events[0].{field}",
            )
            for field in ("transaction_id", "customer_id", "event_type")
            for number, name, text, reason in (
                ("B23", "nothing", "", "FIELD_REQUIRED"),
                ("B23", "blanks", "  \u2003 ", "FIELD_INVALID"),
                ("B24", "129 characters", "x" * 129, "LIMIT_EXCEEDED"),
                ("B24", "2,700 random characters", random.Random(24).randbytes(1350).hex(), "LIMIT_EXCEEDED"),
                ("B24", "a megabyte", "x" * 1_000_000, "LIMIT_EXCEEDED"),
                ("B25", "NUL", "a\0b", "FIELD_INVALID"),
                ("B26", "a newline", "a\nb", "FIELD_INVALID"),
                ("B26", "an escape sequence", "a\x1b[31m", "FIELD_INVALID"),
                ("B26", "a C1 control", "a\x85b", "FIELD_INVALID"),
            )
            if (field, text) != ("transaction_id", "")
        ),
        Row("B23 no id", ingest(without("transaction_id")), "REJECTED FIELD_REQUIRED events[0].transaction_id"),
        *(
            Row(f"{number} {name} as a group's id", report(group(text)), f"REJECTED {reason} groups[0].id")
            for number, name, text, reason in (
                ("B23", "nothing", "", "FIELD_REQUIRED"),
                ("B23", "blanks", "   ", "FIELD_INVALID"),
                ("B24", "37 characters", "x" * 37, "LIMIT_EXCEEDED"),
                ("B25", "NUL", "a\0b", "FIELD_INVALID"),
                ("B26", "a newline", "a\nb", "FIELD_INVALID"),
            )
        ),
        *(
            Row(f"{name} in an id", ingest(e(text, customer_id=text, event_type=text)), "ACCEPTED")
            for name, text in IDS
        ),
        *(Row(f"{name} in a group's id", report(group(text)), "ACCEPTED", GROUPS) for name, text in IDS[:-1]),
        Row(
            "B29 fields that run into each other",
            ingest(e("b29", customer_id="b-c", event_type="d"), e("b29", customer_id="b", event_type="c-d")),
            "ACCEPTED, CONFLICT IDEMPOTENCY_CONFLICT events[1].transaction_id",
        ),
        *(
            Row(
                f"B{31 + (name != 'quantity')} an id again with another {name}",
                ingest(e(f"b31 {name}", **first), e(f"b31 {name}", **other)),
                "ACCEPTED, CONFLICT IDEMPOTENCY_CONFLICT events[1].transaction_id",
            )
            for name, first, other in (
                ("quantity", {"properties": {"n": "1"}}, {"properties": {"n": "2"}}),
                ("timestamp", {"at": START}, {"at": START + timedelta(microseconds=1)}),
                ("property", {"properties": {"a": "x"}}, {"properties": {"b": "x"}}),
                ("kind of a value", {"properties": {"a": 1}}, {"properties": {"a": "1"}}),
            )
        ),
        Row(
            "B33 an id again with the properties in another order",
            ingest(e("b33", properties={"a": 1.0, "b": 2}), e("b33", properties={"b": 2, "a": 1.00})),
            "ACCEPTED, DUPLICATE",
        ),
        Row(
            "B33 an id again with the customer's letters in another case",
            ingest(e("b33 case", customer_id=UNKNOWN), e("b33 case", customer_id=UNKNOWN.upper())),
            "ACCEPTED, DUPLICATE",
        ),
        Row(
            "B33 a text that is another decimal of the same value is another text",
            ingest(e("b33 text", properties={"n": "1.0"}), e("b33 text", properties={"n": "1.00"})),
            "ACCEPTED, CONFLICT IDEMPOTENCY_CONFLICT events[1].transaction_id",
        ),
        Row(
            "B33 a group again with its quantity written otherwise",
            report_again(group("b33", records={"cpu": "1.50"}), group("b33", records={"cpu": "01.5"})),
            "ACCEPTED, then DUPLICATE",
            GROUPS,
        ),
        # --- Numbers
        *(Row(f"{name} as a property", measured(text), "ACCEPTED, skipped") for name, text in NO_NUMBERS),
        *(
            Row(
                f"{name} as a quantity",
                report(group("b34", records={"cpu": text, "mem": "1"})),
                f"REJECTED {'QUANTITY_INVALID' if text else 'FIELD_REQUIRED'} groups[0].records.cpu",
            )
            for name, text in NO_NUMBERS
        ),
        *(
            Row(
                f"B37 a million {name} as a quantity",
                report(group("b37", records={"cpu": text})),
                "REJECTED QUANTITY_INVALID groups[0].records.cpu",
            )
            for name, text in (
                ("digits", "9" * 1_000_000),
                ("zeros", "0" * 1_000_000),
                ("places", f"0.{'0' * 1_000_000}"),
            )
        ),
        *(
            Row(
                f"{name} as a JSON number",
                ingest(e(properties={"n": number})),
                "REJECTED NUMBER_NOT_EXACT events[0].properties.n",
            )
            for name, number in (
                ("B34 NaN", float("nan")),
                ("B35 Infinity", float("inf")),
                ("B35 minus Infinity", -float("inf")),
                ("B45 2^53", 2.0**53),
                ("B45 what a double makes of 9007199254740993", float(9007199254740993)),
                ("B46 1e308", 1e308),
            )
        ),
        Row("B38 38 digits", measured("9" * 20 + "." + "9" * 18), f"ACCEPTED, {'9' * 20}.{'9' * 18}"),
        Row("B39 18 places", measured("0." + "0" * 17 + "1"), f"ACCEPTED, 0.{'0' * 17}1"),
        Row("B39 18 places as a quantity", report(group("b39", records={"cpu": f"0.{'0' * 17}1"})), "ACCEPTED", GROUPS),
        Row("B40 minus zero", measured("-0"), "ACCEPTED, 0"),
        Row("B40 minus zero as a JSON number", measured(-0.0), "ACCEPTED, 0"),
        Row(
            "B40 minus zero as a quantity",
            report(group("b40", records={"cpu": "-0.00", "mem": "1"})),
            "ACCEPTED",
            GROUPS,
        ),
        Row(
            "B40 nothing but zeros",
            report(group("b40 zeros", records={"cpu": "-0"})),
            "REJECTED QUANTITIES_ZERO groups[0].records",
        ),
        Row("B41 a negative property", measured("-2.5"), "ACCEPTED, -2.5"),
        Row(
            "B41 a negative quantity",
            report(group("b41", records={"cpu": "-2.5"})),
            "REJECTED QUANTITY_INVALID groups[0].records.cpu",
        ),
        Row("B44 2^63 - 1", measured(str(2**63 - 1)), f"ACCEPTED, {2**63 - 1}"),
        Row("B44 2^63", measured(str(2**63)), f"ACCEPTED, {2**63}"),
        Row(
            "B44 2^63 - 1 in a field of 64 bits",
            report(group("b44", meta_info={"stripe_usage_record_summary_total_usage": 2**63 - 1})),
            "ACCEPTED",
            GROUPS,
        ),
        Row(
            "B44 2^63 - 1 as the number of a batch",
            streamed(event_pb2.StreamEventsRequest(sequence=2**63 - 1, events=[e()]).SerializeToString()),
            "INVALID_ARGUMENT FIELD_INVALID sequence",
        ),
        Row("B45 9007199254740993 as text", measured("9007199254740993"), "ACCEPTED, 9007199254740993"),
        Row("B45 2^53 - 1 as a JSON number", measured(2.0**53 - 1), "ACCEPTED, 9007199254740991"),
        Row("B47 a sum beyond 38 digits", measured("9" * 38, "9" * 38), f"2 x ACCEPTED, {2 * int('9' * 38)}"),
        # --- Times
        Row("B48 no timestamp", ingest(without("timestamp")), "REJECTED FIELD_REQUIRED events[0].timestamp"),
        Row("B48 a group without a timestamp has the server's", report(group("b48")), "ACCEPTED", GROUPS),
        *(
            Row(f"{name}", ingest(at(seconds, nanos)), "REJECTED FIELD_INVALID events[0].timestamp")
            for name, seconds, nanos in (
                ("B49 the second before the year 1", -62135596801, 0),
                ("B49 the first second after the year 9999", 253402300800, 0),
                ("B49 2^62 seconds", 2**62, 0),
                ("B49 -2^63 seconds", -(2**63), 0),
                ("B50 -1 nanoseconds", 1_760_000_000, -1),
                ("B50 10^9 nanoseconds", 1_760_000_000, 10**9),
                ("B51 the last nanosecond of the year 9999", 253402300799, 999_999_999),
            )
        ),
        Row(
            "B49 a bound after the year 9999",
            usage(ending_before=Timestamp(seconds=253402300800)),
            "INVALID_ARGUMENT WINDOW_RANGE ending_before",
        ),
        Row(
            "B49 a group after the year 9999",
            report(group("b49", timestamp=Timestamp(seconds=2**62))),
            "REJECTED FIELD_INVALID groups[0].timestamp",
        ),
        Row("B52 the instant 0, said", ingest(at(0)), "ACCEPTED"),
        Row(
            "B53 a group four minutes ahead",
            group_ahead("b53 soon", minutes=4),
            "ACCEPTED",
            GROUPS,
        ),
        Row("B53 a day ahead but for a minute", ahead(hours=23, minutes=59), "ACCEPTED"),
        Row(
            "B53 a day and a minute ahead",
            ahead(hours=24, minutes=1),
            "REJECTED TIMESTAMP_TOO_FAR_AHEAD events[0].timestamp",
        ),
        Row(
            "B53 a group six minutes ahead",
            group_ahead("b53", minutes=6),
            "REJECTED TIMESTAMP_TOO_FAR_AHEAD groups[0].timestamp",
        ),
        Row("B54 the year 1", ingest(at(-62135510400)), "ACCEPTED"),
        Row(
            "B54 a group older than its marketplace takes",
            report(group("b54", at=datetime.now(UTC) - timedelta(hours=25))),
            "REJECTED TIMESTAMP_TOO_OLD groups[0].timestamp",
        ),
        Row(
            "B54 a group before its entitlement",
            report(group("b54", at=datetime.now(UTC) - timedelta(days=31))),
            "REJECTED TIMESTAMP_OUTSIDE_TERM groups[0].timestamp, TIMESTAMP_TOO_OLD groups[0].timestamp",
        ),
        Row("B55 the leap second 23:59:60", leap_second, "ACCEPTED, in the next year"),
        Row("B56 the edge of an hour", hour_edge, "ACCEPTED, in the later hour"),
        Row("B57 nanoseconds", nanoseconds, "ACCEPTED, DUPLICATE, cut to microseconds"),
        Row(
            "B58 an end at the start",
            usage(ending_before=timestamp(START)),
            "INVALID_ARGUMENT WINDOW_RANGE ending_before",
        ),
        Row(
            "B58 an end before the start",
            usage(ending_before=timestamp(START - timedelta(hours=1))),
            "INVALID_ARGUMENT WINDOW_RANGE ending_before",
        ),
        Row(
            "B58 two thousand years of hours",
            usage(starting_on=timestamp(datetime(1, 1, 2, tzinfo=UTC)), **ONE),
            "INVALID_ARGUMENT WINDOW_COUNT window_size",
        ),
        Row(
            "B59 a hundred years of hours", usage(starting_on=timestamp(datetime(1926, 1, 1, tzinfo=UTC)), **ONE), "OK"
        ),
        *(
            Row(
                f"B60 the zone {zone[:20]!a}",
                usage(window_size="WINDOW_SIZE_DAY", time_zone=zone),
                "INVALID_ARGUMENT TIME_ZONE_INVALID time_zone",
            )
            for zone in (
                "Mars/X",
                "EST5EDT4",
                "../etc/passwd",
                "/etc/localtime",
                "utc",
                " UTC",
                "UTC\0",
                SQL,
                "U" * MIB,
            )
        ),
        Row("B60 no zone is UTC", usage(window_size="WINDOW_SIZE_DAY"), "OK"),
        # --- Properties
        Row("B61 64 properties", ingest(e(properties={f"p{i}": i for i in range(64)})), "ACCEPTED"),
        Row(
            "B61 65 properties",
            ingest(e(properties={f"p{i}": i for i in range(65)})),
            "REJECTED LIMIT_EXCEEDED events[0].properties",
        ),
        Row("B62 349,000 properties", many_properties(), "REJECTED LIMIT_EXCEEDED events[0].properties"),
        Row("B62 349,000 names in an object", many_properties("p"), "REJECTED LIMIT_EXCEEDED events[0].properties"),
        Row("B62 200,000 records of a group", many_records(200_000), "INVALID_ARGUMENT LIMIT_EXCEEDED groups"),
        Row("B62 201 records of a group", many_records(201), "REJECTED LIMIT_EXCEEDED groups[0].records"),
        *(
            Row(name, ingest(e(properties=properties)), f"REJECTED {reason} events[0].{field}")
            for name, properties, reason, field in (
                ("B63 a name of a megabyte", {"k" * 1_000_000: 1}, "LIMIT_EXCEEDED", "properties"),
                ("B63 a value of a megabyte", {"p": "v" * 1_000_000}, "LIMIT_EXCEEDED", "properties.p"),
                ("B63 a value of 1,025 bytes", {"p": WIDE * 256 + "x"}, "LIMIT_EXCEEDED", "properties.p"),
                ("B63 17 KB in all", {f"p{i}": "x" * 1000 for i in range(17)}, "LIMIT_EXCEEDED", "properties"),
                ("B64 NUL in a name", {"a\0b": 1}, "FIELD_INVALID", "properties"),
                ("B64 NUL in a value", {"p": "a\0b"}, "FIELD_INVALID", "properties.p"),
                ("B64 NUL in an inner name", {"p": {"\0": 1}}, "FIELD_INVALID", "properties.p"),
                ("B64 NUL in an inner value", {"p": ["\0"]}, "FIELD_INVALID", "properties.p[0]"),
            )
        ),
        Row("B63 a value of 1,024 bytes", ingest(e(properties={"p": WIDE * 256})), "ACCEPTED"),
        Row("B64 an escaped NUL is six characters", ingest(e(properties={"\\u0000": "\\u0000"})), "ACCEPTED"),
        Row("B65 half a character as UTF-8", raw("IngestEvents", b"\x0a\x05\x0a\x03\xed\xa0\x80"), MALFORMED),
        Row("B66 one name twice on the wire: the last counts", name_twice, "ACCEPTED"),
        *(
            Row(
                f"{name} in a filter of groups",
                call("ListUsageRecordGroups", meta_info=text),
                "INVALID_ARGUMENT FIELD_INVALID meta_info",
            )
            for name, text in (
                ("B46 1e400", '{"lago_amount":1e400}'),
                ("B46 NaN", '{"lago_amount":NaN}'),
                ("B64 NUL", '{"erp_invoice_id":"\\u0000"}'),
                ("B65 half a character", '{"erp_invoice_id":"\\ud800"}'),
                ("B66 one name twice", '{"erp_invoice_id":"a","erp_invoice_id":"b"}'),
                ("B67 nesting of 2,000", '{"billable_records":' + "[" * 2000 + "]" * 2000 + "}"),
                ("B67 nesting of 50,000", '{"billable_records":' + "[" * 50_000 + "]" * 50_000 + "}"),
                ("B68 an unknown name", "__proto__=x"),
            )
        ),
        *(
            Row(
                f"{name} as id, name and value",
                ingest(e(text, customer_id=text, event_type=text, properties={text: text, "o": {text: [text, None]}})),
                "ACCEPTED",
            )
            for name, text in LITERALS
        ),
        Row(
            "B64 NUL in a record's property",
            report(group("b64", billable_records=[record(properties={"p": "\0"})])),
            "REJECTED FIELD_INVALID groups[0].billable_records[0].properties.p",
        ),
        Row(
            "B61 65 properties of a record",
            report(group("b61", billable_records=[record(properties={f"p{i}": 1 for i in range(65)})])),
            "REJECTED LIMIT_EXCEEDED groups[0].billable_records[0].properties",
        ),
        # --- Queries
        *(Row(f"{name} as a filter", filtered(text), "OK, found nothing") for name, text in LITERALS),
        *(
            Row(
                f"{name} as a group key",
                usage(billable_metrics=[{"id": METRIC, "group_by": {"key": text}}]),
                "INVALID_ARGUMENT GROUP_KEY_NOT_DECLARED billable_metrics[0].group_by.key",
            )
            for name, text in (
                ("B70 an undeclared property", "n"),
                ("B70 a quoted property", '"region"'),
                ("B70 a property in another case", "Region"),
                ("B71 an expression", "count(*)"),
                ("B71 SQL", f"region{SQL}"),
            )
        ),
        Row(
            "B71 an expression as a compound group key",
            grouped(group_key=["region", "1 DESC"]),
            "INVALID_ARGUMENT GROUP_KEY_NOT_DECLARED group_key",
        ),
        Row(
            "B73 32,768 customers",
            usage(customer_ids=[str(uuid.UUID(int=i)) for i in range(32_768)]),
            "INVALID_ARGUMENT LIMIT_EXCEEDED customer_ids",
        ),
        Row(
            "B73 32,768 transaction ids",
            call("SearchEvents", transaction_ids=[str(i) for i in range(32_768)]),
            "INVALID_ARGUMENT LIMIT_EXCEEDED transaction_ids",
        ),
        Row(
            "B73 32,768 values of a group",
            grouped(group_key=["region"], group_filters={"region": {"values": [str(i) for i in range(32_768)]}}),
            "INVALID_ARGUMENT LIMIT_EXCEEDED group_filters",
        ),
        Row(
            "B73 32,768 values of a metric's filter",
            metric(property_filters=[{"name": "p", "in_values": [str(i) for i in range(32_768)]}]),
            "INVALID_ARGUMENT LIMIT_EXCEEDED billable_metric.property_filters[0].in_values",
        ),
        Row("B74 a group key that is different in every event", unique_groups, "OK, 200 groups and more"),
        Row(
            "B75 20 properties to group by",
            grouped(group_key=[f"p{i}" for i in range(20)]),
            "INVALID_ARGUMENT LIMIT_EXCEEDED group_key",
        ),
        Row(
            "B75 a group key of 20 properties",
            metric(group_keys=[{"properties": [f"p{i}" for i in range(20)]}]),
            "INVALID_ARGUMENT LIMIT_EXCEEDED billable_metric.group_keys[0].properties",
        ),
        *(
            Row(f"B76 a page of {size} of {method}", call(method, page_size=size, **fields), says)
            for method, fields in (
                ("ListUsage", DAY),
                ("SearchEvents", {"transaction_ids": ["known"]}),
                ("ListCustomers", {}),
                ("ListUsageRecordGroups", {}),
            )
            for size, says in (
                (-1, "INVALID_ARGUMENT FIELD_INVALID page_size"),
                (-(2**31), "INVALID_ARGUMENT FIELD_INVALID page_size"),
                (0, "OK"),
                (2**31 - 1, "OK"),
            )
        ),
        Row("B76 a skip of -1", call("ListUsageRecordGroups", skip=-1), "INVALID_ARGUMENT FIELD_INVALID skip"),
        Row("B77 tokens with one bit flipped", tokens(flipped), NO_PAGE),
        Row("B77 truncated tokens", tokens(lambda token: [token[:i] for i in range(1, len(token))]), NO_PAGE),
        Row(
            "B77 tokens with more behind", tokens(lambda token: [token + more for more in ("A", "=", "AAAA")]), NO_PAGE
        ),
        Row("B77 tokens that never were", tokens(lambda _: ["=", "AAAA", "A" * MIB, "\0", SQL, WIDE, " "]), NO_PAGE),
        Row("B77 a resume token that never was", resumed("x"), "INVALID_ARGUMENT PAGE_TOKEN_INVALID resume_token"),
        Row("B78 a token of another filter", tokens(lambda token: [token], customer_id="b78"), NO_PAGE),
        Row("B78 a token of another organization", foreign_token, NO_PAGE),
        Row("B78 a token of another method", other_method, NO_PAGE),
        # --- Callers and names
        Row(
            "B79 a key of an organization that is not there", sent_with("Bearer mtr_0000000000000000_x"), NO_CREDENTIAL
        ),
        Row(
            "B80 another organization in the request",
            call("suger.ListEntitlements", org_id="other"),
            "PERMISSION_DENIED ORGANIZATION_MISMATCH",
        ),
        Row("B81 an unknown metric", usage(billable_metrics=[{"id": UNKNOWN}]), "NOT_FOUND BILLABLE_METRIC_NOT_FOUND"),
        Row("B81 an unknown customer", usage(customer_ids=[UNKNOWN]), "NOT_FOUND CUSTOMER_NOT_FOUND"),
        Row("B81 an archived metric stays readable", usage(billable_metrics=[{"id": GONE}]), "OK"),
        Row(
            "B81 records of an archived metric",
            report(group("b81", billable_records=[record(key="gone")])),
            "REJECTED BILLABLE_METRIC_KEY_INVALID groups[0].billable_records[0].key",
        ),
        Row(
            "B82 a metric with a keyword for a name",
            keyword,
            "OK, as sent",
            frozenset({"billable_metrics", "organizations"}),
        ),
        Row(
            "B82 a metric's name of 10 KB",
            metric(name="x" * 10_000),
            "INVALID_ARGUMENT LIMIT_EXCEEDED billable_metric.name",
        ),
        Row("B83 two groups with the same record key", report(group("b83 a"), group("b83 b")), "2 x ACCEPTED", GROUPS),
        Row(
            "B83 a group with two names of one dimension",
            report(group("b83", records={"cpu": "1", "CPU hours": "1"})),
            "REJECTED DUPLICATE_ITEM groups[0].records.cpu",
        ),
        Row(
            "B84 a group's id again with other records",
            report(group("known", records={"cpu": "2"})),
            "CONFLICT IDEMPOTENCY_CONFLICT groups[0].id",
        ),
        Row("B85 no credential", sent_with(), "UNAUTHENTICATED CREDENTIAL_MISSING"),
        *(
            Row(f"B85 {name}", sent_with(text), NO_CREDENTIAL)
            for name, text in (
                ("an empty credential", ""),
                ("a scheme without a credential", "Bearer"),
                ("another scheme", "Basic YTpi"),
                ("a key of two words", "Bearer a b"),
                ("a key without a secret", "Bearer mtr_0000000000000000_"),
                ("a signed token of nobody", "Bearer eyJhbGciOiJub25lIn0.eyJvcmciOiJkZWZhdWx0In0."),
                ("a key of 9 KB", "Bearer mtr_" + "x" * 9_000),
                ("SQL", f"Bearer mtr_{SQL.replace(' ', '')}_x"),
            )
        ),
        Row("B85 a key with a wrong secret", wrong_secret, NO_CREDENTIAL),
        Row("B85 a revoked key", revoked, NO_CREDENTIAL),
        Row("B85 an expired key", expired, NO_CREDENTIAL),
        Row("B86 authorization twice", twice, NO_CREDENTIAL),
        Row("B86 authorization of two organizations", both_keys, NO_CREDENTIAL),
        # --- Connections
        Row(
            "B87 a binary header that is no base64",
            http2({"x-trace-bin": b"!not base64!"}),
            "refused, connection lives",
        ),
        Row("B87 a header with a NUL", http2({"x-request-id": b"a\0b"}), "OK, connection lives"),
        Row("B87 a header with bytes that are no text", http2({"x-request-id": b"\xff\xfe"}), "OK, connection lives"),
        Row("B87 a header with an illegal name", http2({"bad name": b"x"}), "refused, connection lives"),
        Row("B88 headers that name another organization", other_organization, "OK, its own"),
        Row("B89 an authority of a kilobyte", http2({":authority": b"a" * KIB}), "OK, connection lives"),
        Row("B89 an authority with a line break", http2({":authority": b"a\r\nx: y"}), "OK, connection lives"),
        Row("B89 a request without a path", http2({":path": None}), "refused, connection lives"),
        Row("B90 streams that say nothing", silent_streams, "served meanwhile"),
        Row("B90 connections that say nothing", silent_connections, "served meanwhile"),
        Row("B90 a byte at a time", slowly, "served meanwhile, OK"),
        Row("B90 3,000 streams opened and reset", rapid_reset, "served at once"),
        Row("B90 10,000 pings", flood(PING), "served at once"),
        Row("B90 10,000 settings", flood(SETTINGS), "served at once"),
        Row("B90 a window of nothing", no_window, "served at once"),
    ]
    assert len({row.name for row in found}) == len(found)
    return found


# --- The world that is attacked: one server with credentials, and what rows collide with


class World:
    """A server, its database, and credentials of two organizations: `default`, whose rows these are, and `other`."""

    def __init__(self, client: Client, database: Database) -> None:
        self.client = client
        self.channel = client.channel
        self.database = database
        self.key = self.other = self.revoked = self.expired = NewApiKey("", "", b"")
        self._hours = itertools.count()

    def hour(self) -> datetime:
        """Give a start of an hour in which nothing was used."""
        return datetime(2020, 1, 1, tzinfo=UTC) + timedelta(hours=next(self._hours))

    def credential(self, key: NewApiKey | None = None) -> tuple[str, str]:
        """Return the header that a key is sent in."""
        return "authorization", f"Bearer {(key or self.key).text}"

    async def call(self, method: str, request: bytes | None = None, **fields: Any) -> Any:
        """Call a method by its name, with bytes or with its request's fields; `metadata` replaces the credential."""
        options = {name: fields.pop(name) for name in ("metadata", "timeout", "compression") if name in fields}
        options.setdefault("metadata", [self.credential()])
        descriptor = METHODS[method]
        if request is None:
            request = message_factory.GetMessageClass(descriptor.input_type)(**fields).SerializeToString()
        answer = message_factory.GetMessageClass(descriptor.output_type)
        send = self.channel.unary_unary(_path(method), response_deserializer=answer.FromString)
        return await send(request, **options)

    async def alive(self) -> None:
        """Check that a sound call is answered soundly, without changing anything."""
        answer = await self.call("IngestEvents", events=[KNOWN], timeout=20)
        assert list(answer.verdicts) == [event_pb2.VERDICT_DUPLICATE]

    async def fingerprint(self) -> dict[str, tuple[int, Decimal]]:
        """Return the number of rows in every table and a digest of them, by one statement."""
        parts = []
        for table in METADATA.sorted_tables:
            if table.name not in _TEMPORARY:
                row = sa.func.hashtextextended(sa.cast(table.table_valued(), sa.Text), 0)
                parts.append(
                    sa.select(
                        sa.literal(table.name), sa.func.count(), sa.func.coalesce(sa.func.sum(row), 0)
                    ).select_from(table)
                )
        async with self.database.engine.connect() as connection:
            return {name: (count, digest) for name, count, digest in await connection.execute(sa.union_all(*parts))}

    async def used(self, start: datetime) -> usage_pb2.UsageWindow:
        """Return the usage of one hour."""
        page = await self.call(
            "ListUsage",
            **{**DAY, **ONE, "starting_on": timestamp(start), "ending_before": timestamp(start + timedelta(hours=1))},
        )
        return page.windows[0]  # type: ignore[no-any-return]

    async def check_stored(self, sent: Iterable[event_pb2.UsageEvent]) -> None:
        """Check that events come back byte for byte, in their canonical form."""
        wanted: dict[str, event_pb2.UsageEvent] = {}
        for one in sent:
            wanted.setdefault(one.transaction_id, _canonical(one))
        answer = await self.call("SearchEvents", transaction_ids=list(wanted))
        found = {one.event.transaction_id: one.event for one in answer.events}
        assert found == wanted
        assert [found[name].SerializeToString(deterministic=True) for name in wanted] == [
            one.SerializeToString(deterministic=True) for one in wanted.values()
        ]


async def new_key(database: Database, organization: str, **fields: Any) -> NewApiKey:
    """Make a credential of an organization, and the organization if it is not there."""
    key = new_api_key()
    async with database.engine.begin() as connection:
        await organizations.create_organization(connection, organization)
        await organizations.create_api_key(connection, organization, key.id, "test", key.secret_hash, **fields)
    return key


@asynccontextmanager
async def _new_database(postgres: EmbeddedPostgres, template: str) -> AsyncIterator[str]:
    url, name = sa.make_url(postgres.url), "hostile_input"
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(sa.text(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'))
        try:
            yield url.set(database=name).render_as_string(hide_password=False)
        finally:
            await connection.execute(sa.text(f'DROP DATABASE "{name}" WITH (FORCE)'))
    await engine.dispose()


@pytest.fixture(scope="module")
async def world(postgres: EmbeddedPostgres, template: str) -> AsyncIterator[World]:
    """One world for all rows: each adds to it only what it says."""

    async def idle(_: Reporting) -> None:
        await asyncio.Event().wait()

    async with AsyncExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(Reporting, "run", idle)
        url = await stack.enter_async_context(_new_database(postgres, template))
        database = Database(url)
        stack.push_async_callback(database.close)
        client = await stack.enter_async_context(running_server(url))
        made = World(client, database)
        await _fill(made)
        yield made


async def _fill(world: World) -> None:
    client = world.client
    await client.create_customer(id=CUSTOMER, ingest_aliases=["acme"])
    keys = [{"properties": ["region"]}, {"properties": ["region", "zone"]}]
    await client.create_metric(
        id=METRIC,
        aggregation_type="AGGREGATION_TYPE_SUM",
        aggregation_key="n",
        event_type_filter={"in_values": ["measured"]},
        group_keys=keys,
    )
    await client.create_metric(id=GONE, key="gone")
    await client.create_metric(key="api")
    await sell(client, billable_metric_keys=["api", "gone"])
    await client.metrics.ArchiveBillableMetric(billable_metric_pb2.ArchiveBillableMetricRequest(id=GONE))
    regions = (
        event(f"region {i}", at=REGIONS, event_type="measured", properties={"n": "1", "region": f"r{i:03}"})
        for i in range(250)
    )
    await client.ingest(KNOWN, *regions, event("token 1", customer_id="tokens"), event("token 2", customer_id="tokens"))
    await reported(client, group("known"))
    world.key, world.revoked = [await new_key(world.database, "default") for _ in range(2)]
    world.other = await new_key(world.database, "other")
    world.expired = await new_key(world.database, "default", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    async with world.database.engine.begin() as connection:
        await organizations.revoke_api_key(connection, "default", world.revoked.id)

    async def closed() -> bool:
        # Without any credential the server was open, and believes so for a moment.
        return await said(world.call("ListCustomers", metadata=[])) != "OK"

    await until(closed)
    theirs = [event(f"theirs {i}", customer_id="tokens") for i in range(2)]
    await world.call("IngestEvents", events=theirs, metadata=[world.credential(world.other)])
    await _token(world)  # makes the secret that signs tokens


# --- How things are sent, and what is said in answer


async def said(call: Awaitable[Any]) -> str:
    """Await a call, and return OK or the code, reason and first field of its status."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return _told(read_fault(error))
    return "OK"


def _told(fault: Fault) -> str:
    assert fault.code not in {"INTERNAL", "UNKNOWN"}
    assert fault.trailers_size < 8 * KIB
    return " ".join(filter(None, fault.brief))


def _each(texts: Iterable[str]) -> str:
    """Join texts; of equal ones in a row, their number and one."""
    counted = [(text, len(list(same))) for text, same in itertools.groupby(texts)]
    return ", ".join(f"{number} x {text}" if number > 1 else text for text, number in counted)


def _issue(reason: int, field: str, message: str) -> str:
    assert not LEAK.search(message.encode()), message
    assert len(message) < 400
    return f"{error_reason_pb2.ErrorReason.Name(reason).removeprefix('ERROR_REASON_')} {field}"


def _verdicts(answer: Any) -> str:
    """Tell the verdicts of events, with the first issue of each."""
    issues: dict[int, str] = {}
    for one in answer.issues:
        issues.setdefault(one.index, _issue(one.reason, one.field, one.message))
    names = [event_pb2.Verdict.Name(one).removeprefix("VERDICT_") for one in answer.verdicts]
    return _each(" ".join(filter(None, (name, issues.get(i)))) for i, name in enumerate(names))


def call(method: str, **fields: Any) -> "Send":
    """Call a method with a request's fields."""
    return lambda world: said(world.call(method, **fields))


def raw(method: str, request: bytes | Callable[[], bytes]) -> "Send":
    """Call a method with bytes; of those that answer with verdicts, these are told."""

    async def send(world: World) -> str:
        sent = request if isinstance(request, bytes) else request()
        try:
            answer = await world.call(method, sent)
        except grpc.aio.AioRpcError as error:
            return _told(read_fault(error))
        return _results(answer) if method == "ReportUsageRecordGroups" else _verdicts(answer)

    return send


def ingest(*events: event_pb2.UsageEvent, **fields: Any) -> "Send":
    """Ingest events; those that are accepted must come back."""

    async def send(world: World) -> str:
        try:
            answer = await world.call("IngestEvents", events=events, **fields)
        except grpc.aio.AioRpcError as error:
            return _told(read_fault(error))
        accepted = [
            one for one, verdict in zip(events, answer.verdicts, strict=True) if verdict == event_pb2.VERDICT_ACCEPTED
        ]
        if accepted:
            await world.check_stored(accepted)
        return _verdicts(answer)

    return send


def streamed(message: bytes) -> "Send":
    """Send one message over a stream of events."""

    async def send(world: World) -> str:
        stream = world.channel.stream_stream(_path("StreamEvents"))(iter([message]), metadata=[world.credential()])
        try:
            answers = [event_pb2.StreamEventsResponse.FromString(one) async for one in stream]
        except grpc.aio.AioRpcError as error:
            return _told(read_fault(error))
        return "; ".join(_verdicts(one) for one in answers)

    return send


def report(*groups: usage_record_group_pb2.NewUsageRecordGroup) -> "Send":
    """Report groups; those that are accepted must come back."""

    async def send(world: World) -> str:
        try:
            answer = await world.call("ReportUsageRecordGroups", groups=groups)
        except grpc.aio.AioRpcError as error:
            return _told(read_fault(error))
        for one, result in zip(groups, answer.results, strict=True):
            if result.verdict == event_pb2.VERDICT_ACCEPTED:
                found = (await world.call("GetUsageRecordGroup", id=one.id)).group
                assert (found.id, found.meta_info.stripe_usage_record_summary_total_usage) == (
                    one.id,
                    one.meta_info.stripe_usage_record_summary_total_usage,
                )
                assert {name: Decimal(text) for name, text in found.records.items()} == {
                    name: Decimal(text) for name, text in one.records.items()
                }
                assert not any(re.search(r"e|E|^-", text) for text in found.records.values())
        return _results(answer)

    return send


def _results(answer: Any) -> str:
    """Tell the verdicts of groups, with all their violations."""
    return _each(
        " ".join(
            filter(
                None,
                (
                    event_pb2.Verdict.Name(one.verdict).removeprefix("VERDICT_"),
                    ", ".join(_issue(fault.code, fault.field, fault.message) for fault in one.violations),
                ),
            )
        )
        for one in answer.results
    )


def report_again(first: usage_record_group_pb2.NewUsageRecordGroup, second: Any) -> "Send":
    """Report one group, and then another."""

    async def send(world: World) -> str:
        return f"{await report(first)(world)}, then {await report(second)(world)}"

    return send


def measured(*values: str | float) -> "Send":
    """Ingest events with these values in an hour of their own, and tell the sum of the hour."""

    async def send(world: World) -> str:
        hour = world.hour()
        verdicts = await ingest(*(event(at=hour, event_type="measured", properties={"n": one}) for one in values))(
            world
        )
        window = await world.used(hour)
        assert window.HasField("value") == (window.skipped_count == 0)
        return f"{verdicts}, {window.value or 'skipped'}"

    return send


def usage(**fields: Any) -> "Send":
    """List the usage of a day by the hour, unless told otherwise."""
    return call("ListUsage", **{**DAY, **fields})


def grouped(**fields: Any) -> "Send":
    """List the usage of a customer and metric in one window by groups."""
    fields = {"customer_id": CUSTOMER, "billable_metric_id": METRIC, "window_size": "WINDOW_SIZE_NONE", **fields}
    return call("ListUsageWithGroups", **{**DAY, **fields})


def metric(**fields: Any) -> "Send":
    """Create a metric."""
    fields = {"name": "m", "aggregation_type": "AGGREGATION_TYPE_COUNT", **fields}
    return call("CreateBillableMetric", billable_metric=fields)


def record(**fields: Any) -> usage_record_group_pb2.BillableRecord:
    """Make a billable record."""
    properties = fields.pop("properties", {})
    made = usage_record_group_pb2.BillableRecord(**{"key": "api", "quantity": "1", **fields})
    made.properties.update(properties)
    return made


def without(field: str) -> event_pb2.UsageEvent:
    """Make an event that lacks a field."""
    made = event()
    made.ClearField(field)  # type: ignore[arg-type]
    return made


def at(seconds: int, nanos: int = 0, **fields: Any) -> event_pb2.UsageEvent:
    """Make an event of a moment that need not be one."""
    made = event(**fields)
    made.timestamp.CopyFrom(Timestamp(seconds=seconds, nanos=nanos))
    return made


def ahead(**delta: float) -> "Send":
    """Ingest an event of the future, as seen from when it is sent."""

    async def send(world: World) -> str:
        return await ingest(event(at=datetime.now(UTC) + timedelta(**delta)))(world)

    return send


def group_ahead(group_id: str, **delta: float) -> "Send":
    """Report a group of the future, as seen from when it is sent."""

    async def send(world: World) -> str:
        return await report(group(group_id, at=datetime.now(UTC) + timedelta(**delta)))(world)

    return send


def nested(depth: int) -> event_pb2.UsageEvent:
    """Make an event with lists within lists."""
    value = Value(string_value="x")
    for _ in range(depth):
        outer = Value()
        outer.list_value.values.append(value)
        value = outer
    made = event()
    made.properties.fields["p"].CopyFrom(value)
    return made


def deep(depth: int, *, group: bool = False) -> Callable[[], bytes]:
    """Write a request with lists within lists by hand: the library would refuse to."""

    def write() -> bytes:
        inner = b"\x1a\x01x"
        parts, length = [], len(inner)
        for _ in range(depth):
            for tag in (b"\x0a", b"\x32"):
                head = tag + _varint(length)
                parts.append(head)
                length += len(head)
        value = b"".join(reversed(parts)) + inner
        struct = _field(1, _field(1, b"p") + _field(2, value))
        # UsageEvent.properties, or BillableRecord.properties in a group.
        whole = _field(4, _field(2, struct)) + _field(1, b"deep") + _field(2, b"ent") if group else _field(5, struct)
        return _field(1, whole)

    return write


def many_properties(inside: str = "") -> "Send":
    """Ingest an event of almost 4 MiB that has nothing but names of properties."""

    async def send(world: World) -> str:
        struct = b"".join(b"\x0a\x08\x0a\x06%06x" % i for i in range(349_000))
        if inside:
            struct = _field(1, _field(1, inside.encode()) + _field(2, _field(5, struct)))
        return await raw("IngestEvents", _field(1, event("many").SerializeToString() + _field(5, struct)))(world)

    return send


def many_records(number: int) -> "Send":
    """Report a group of so many records."""

    async def send(world: World) -> str:
        records = b"".join(_field(3, _field(1, b"%06x" % i) + _field(2, b"1")) for i in range(number))
        return await raw("ReportUsageRecordGroups", _field(1, _field(1, b"many") + _field(2, b"ent") + records))(world)

    return send


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field on the wire."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _canonical(sent: event_pb2.UsageEvent) -> event_pb2.UsageEvent:
    """Return an event as it must come back: the instant cut to microseconds, UUIDs in lower case, no minus zero."""
    made = event_pb2.UsageEvent()
    made.CopyFrom(sent)
    made.timestamp.nanos -= made.timestamp.nanos % 1000
    if made.customer_id.lower() == UNKNOWN:
        made.customer_id = UNKNOWN
    for value in made.properties.fields.values():
        if value.WhichOneof("kind") == "number_value" and value.number_value == 0:
            value.number_value = 0
    return made


# --- Inputs that take more than one call to send, or to look at


async def unknown_fields(world: World) -> str:
    """A newer client's fields, in the request and in an event."""
    one, extra = event("b7"), b"\xfa\x3f\x05extra"
    answer = await world.call("IngestEvents", _field(1, one.SerializeToString() + extra) + extra)
    await world.check_stored([one])
    return _verdicts(answer)


async def oneof_twice(world: World) -> str:
    """A property that is a number, and then a text."""
    one = event("b9")
    both = Value(number_value=7).SerializeToString() + Value(string_value="last").SerializeToString()
    one.properties.MergeFromString(_field(1, _field(1, b"p") + _field(2, both)))
    sent = event("b9").SerializeToString() + _field(5, _field(1, _field(1, b"p") + _field(2, both)))
    answer = await world.call("IngestEvents", _field(1, sent))
    await world.check_stored([event("b9", properties={"p": "last"})])
    return _verdicts(answer)


async def name_twice(world: World) -> str:
    """A map that has a name twice."""
    values = (Value(string_value=text).SerializeToString() for text in ("first", "last"))
    sent = b"".join(_field(1, _field(1, b"p") + _field(2, value)) for value in values)
    answer = await world.call("IngestEvents", _field(1, event("b66").SerializeToString() + _field(5, sent)))
    await world.check_stored([event("b66", properties={"p": "last"})])
    return _verdicts(answer)


async def bomb(world: World) -> str:
    """50 MiB that are 50 KB on the wire."""
    return await said(world.call("IngestEvents", bytes(50 * MIB), compression=grpc.Compression.Gzip))


async def huge_answer(world: World) -> str:
    """A query with an answer of some 50 MiB, in a page as large as can be asked for."""
    group_by = {"key": "region", "values": [f"r{i:03}" for i in range(200)]}
    page = await world.call(
        "ListUsage",
        **{
            **DAY,
            "customer_ids": [CUSTOMER],
            "billable_metrics": [{"id": METRIC, "group_by": group_by}],
            "starting_on": timestamp(START - timedelta(days=730)),
            "page_size": 10_000,
        },
    )
    assert page.windows
    assert page.next_page_token
    return "OK, a short page" if page.ByteSize() < 1.2 * MIB else f"OK, {page.ByteSize()} bytes"


def headers(size: int) -> "Send":
    """A sound call with so many bytes of headers beside its own."""
    return lambda world: said(
        world.call("ListCustomers", metadata=[world.credential(), ("x-filler", "x" * (size - len("x-filler") - 32))])
    )


def path(method: str) -> "Send":
    """Call a path."""
    return lambda world: said(world.channel.unary_unary(method)(b"", metadata=[world.credential()]))


async def deadlines(world: World) -> str:
    """Thirty calls that have from 0.2 to 6 milliseconds."""
    events = [event() for _ in range(30)]
    codes = await asyncio.gather(
        *(said(world.call("IngestEvents", events=[one], timeout=i / 5000)) for i, one in enumerate(events, 1))
    )
    assert set(codes) <= {"OK", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED DEADLINE_TOO_SHORT"}
    assert codes[0] != "OK"
    return await _settled(world, events)


async def cancellations(world: World) -> str:
    """Sixty calls that their callers leave within 20 milliseconds."""
    generator, events = random.Random(18), [event() for _ in range(60)]

    async def leave(one: event_pb2.UsageEvent) -> None:
        sent = asyncio.create_task(world.call("IngestEvents", events=[one]))
        await asyncio.sleep(generator.random() / 50)
        sent.cancel()
        await asyncio.gather(sent, return_exceptions=True)

    await asyncio.gather(*map(leave, events))
    return await _settled(world, events)


async def _settled(world: World, events: Sequence[event_pb2.UsageEvent]) -> str:
    """Send events again of which nobody knows whether they are stored; then each must be, once."""
    answers = await asyncio.gather(*(world.call("IngestEvents", events=[one]) for one in events))
    again = await world.call("IngestEvents", events=events)
    assert {_verdicts(one) for one in answers} <= {"ACCEPTED", "DUPLICATE"}
    await world.check_stored(events)
    return "exactly once" if set(again.verdicts) == {event_pb2.VERDICT_DUPLICATE} else _verdicts(again)


async def leap_second(world: World) -> str:
    """What a Timestamp makes of 2016-12-31T23:59:60Z counts in 2017."""
    verdict = await ingest(event("b55", at=LEAP, event_type="measured", properties={"n": "1"}))(world)
    before, after = await world.used(LEAP - timedelta(hours=1)), await world.used(LEAP)
    return f"{verdict}, in the next year" if (before.HasField("value"), after.value) == (False, "1") else "elsewhere"


async def hour_edge(world: World) -> str:
    """An event on the edge of two hours counts in the later one."""
    edge = world.hour() - timedelta(days=1000)
    verdict = await ingest(event("b56", at=edge, event_type="measured", properties={"n": "1"}))(world)
    before, after = await world.used(edge - timedelta(hours=1)), await world.used(edge)
    return f"{verdict}, in the later hour" if (before.HasField("value"), after.value) == (False, "1") else "elsewhere"


async def nanoseconds(world: World) -> str:
    """Instants that are equal to the microsecond are equal."""
    return f"{await ingest(at(1, 1_500, **B57), at(1, 1_999, **B57))(world)}, cut to microseconds"


def filtered(text: str) -> "Send":
    """A text as everything that can be asked for, where nothing has it."""

    async def send(world: World) -> str:
        name = f"nobody's {text}"[:36]
        group_by = {"key": "region", "values": [text]}
        page = await world.call(
            "ListUsage", **{**DAY, **ONE, "billable_metrics": [{"id": METRIC, "group_by": group_by}]}
        )
        filters = {"region": {"values": [text]}}
        rows = await world.call("ListUsageWithGroups", **{**GROUPED, "group_filters": filters})
        assert [dict(one.groups) for one in page.windows] == [{text: usage_pb2.GroupValue()}] * 24
        assert [(dict(one.group), one.HasField("value")) for one in rows.windows] == [({"region": text}, False)]
        found = [
            (await world.call("SearchEvents", customer_id=name)).events,
            (await world.call("SearchEvents", event_type=name)).events,
            (await world.call("SearchEvents", transaction_ids=[name])).events,
            (await world.call("ListCustomers", customer_key=name)).customers,
            (await world.call("ListEntitlements", buyer_id=name)).entitlements,
            (await world.call("ListUsageRecordGroups", buyer_id=name)).usage_record_groups,
            (await world.call("ListUsageRecordGroups", meta_info=f"erp_invoice_id={text}")).usage_record_groups,
        ]
        return "OK, found nothing" if not any(map(len, found)) else str(found)

    return send


async def unique_groups(world: World) -> str:
    """A property that is different in every event is cut in a map of groups, and paged as rows."""
    bounds = {"starting_on": timestamp(REGIONS), "ending_before": timestamp(REGIONS + timedelta(hours=1))}
    selector = {"id": METRIC, "group_by": {"key": "region"}}
    (window,) = (await world.call("ListUsage", **{**DAY, **ONE, **bounds, "billable_metrics": [selector]})).windows
    rows = await world.call("ListUsageWithGroups", **{**GROUPED, **bounds})
    assert len(rows.windows) == 250
    return f"OK, {len(window.groups)} groups{' and more' if window.groups_truncated else ''}"


async def keyword(world: World) -> str:
    """Names that are words of SQL."""
    sent = {
        "name": "SELECT",
        "key": "user",
        "aggregation_type": billable_metric_pb2.AGGREGATION_TYPE_SUM,
        "aggregation_key": "order",
        "event_type_filter": {"in_values": ["select"]},
        "property_filters": [{"name": "null", "in_values": ["(a+)+$"]}],
        "group_keys": [{"properties": ["table", "group"]}],
    }
    made = (await world.call("CreateBillableMetric", billable_metric=sent)).billable_metric

    async def counted() -> bool:
        nonlocal made
        made = (await world.call("GetBillableMetric", id=made.id)).billable_metric
        return not made.HasField("backfill_progress")

    await until(counted)
    wanted = billable_metric_pb2.BillableMetric(id=made.id, create_time=made.create_time, **sent)
    return "OK, as sent" if made == wanted else str(made)


# --- Page tokens


async def _token(world: World, key: NewApiKey | None = None) -> str:
    page = await world.call("SearchEvents", customer_id="tokens", page_size=1, metadata=[world.credential(key)])
    return str(page.next_page_token)


def tokens(make: Callable[[str], Iterable[str]], customer_id: str = "tokens") -> "Send":
    """Search with what is made of a sound token; all must be refused with the same words."""

    async def send(world: World) -> str:
        token = await _token(world)
        assert len((await world.call("SearchEvents", customer_id="tokens", page_token=token)).events) == 1
        return await _refused(
            world.call("SearchEvents", customer_id=customer_id, page_token=one) for one in make(token)
        )

    return send


async def _refused(calls: Iterable[Awaitable[Any]]) -> str:
    faults = [await fault_of(one) for one in calls]
    ((told, text),) = Counter((_told(fault), fault.text) for fault in faults)
    assert text == NO_PAGE_TEXT
    return told


def flipped(token: str) -> list[str]:
    """Return a token with one bit flipped, for each of its characters; what is no text stays out."""
    found = []
    for i, character in enumerate(token):
        other = chr(ord(character) ^ 1 << i % 7)
        found.append(token[:i] + other + token[i + 1 :])
    return found


def resumed(token: str) -> "Send":
    """Go on with a stream."""

    async def read(world: World) -> None:
        request = usage_pb2.StreamUsageRequest(**DAY, resume_token=token).SerializeToString()
        stream = world.channel.unary_stream(_path("StreamUsage"))(request, metadata=[world.credential()])
        async for _ in stream:
            pass

    return lambda world: said(read(world))


async def foreign_token(world: World) -> str:
    """A token of another organization, for the same query; in both directions."""
    pairs = [(world.key, await _token(world, world.other)), (world.other, await _token(world))]
    return await _refused(
        world.call("SearchEvents", customer_id="tokens", page_token=token, metadata=[world.credential(key)])
        for key, token in pairs
    )


async def other_method(world: World) -> str:
    """A token of a search, for lists without any filter."""
    token = await _token(world)
    methods = ("ListCustomers", "ListBillableMetrics", "ListUsageRecordGroups", "ListUnmatchedCustomerKeys")
    return await _refused(world.call(method, page_token=token) for method in methods)


# --- Credentials


def sent_with(*credentials: str) -> "Send":
    """A sound call with these credentials."""
    return lambda world: said(
        world.call("ListCustomers", metadata=[("authorization", credential) for credential in credentials])
    )


async def wrong_secret(world: World) -> str:
    """A key whose last character is another one."""
    text = world.key.text
    return await sent_with(f"Bearer {text[:-1]}{'a' if text[-1] != 'a' else 'b'}")(world)


async def revoked(world: World) -> str:
    """A key that was taken back."""
    return await sent_with(f"Bearer {world.revoked.text}")(world)


async def expired(world: World) -> str:
    """A key whose time is over."""
    return await sent_with(f"Bearer {world.expired.text}")(world)


async def twice(world: World) -> str:
    """A sound credential, and once more."""
    return await sent_with(*[f"Bearer {world.key.text}"] * 2)(world)


async def both_keys(world: World) -> str:
    """Sound credentials of two organizations."""
    return await sent_with(f"Bearer {world.key.text}", f"Bearer {world.other.text}")(world)


async def other_organization(world: World) -> str:
    """Headers by which other services are told whose call it is."""
    names = ("x-org-id", "x-organization-id", "x-organization", "x-tenant-id", "organization", "org_id")
    metadata = [world.credential(), *((name, "other") for name in names)]
    answer = await world.call("SearchEvents", transaction_ids=["known", "theirs 0"], metadata=metadata)
    return "OK, its own" if [one.event for one in answer.events] == [KNOWN] else str(answer)


# --- Connections by hand


class Wire:
    """An HTTP/2 connection on which anything can be sent, and what was said of its streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._ended: dict[int, str] = {}

    async def send(self, *parts: bytes) -> None:
        """Send bytes, as far as they are still taken."""
        try:
            self._writer.write(b"".join(parts))
            await self._writer.drain()
        except ConnectionError:
            pass

    async def end_of(self, stream: int, seconds: float = 5) -> str:
        """Wait for the end of a stream: its status, `refused`, `closed` with its connection, or `silent`."""
        try:
            async with asyncio.timeout(seconds):
                while stream not in self._ended:
                    head = await self._reader.readexactly(9)
                    payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                    self._take(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
        except TimeoutError:
            return "silent"
        except (asyncio.IncompleteReadError, ConnectionError):
            return "closed"
        return self._ended[stream]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == RST_STREAM:
            self._ended.setdefault(stream, "refused")
        elif kind == HEADERS and flags & END_STREAM:
            (code,) = re.findall(rb"grpc-status[\x01\x02](\d+)", payload)
            # gRPC itself refuses what it cannot read, with INTERNAL mostly, sometimes without a word; it knows no
            # request id. What we answer has one.
            ours = b"x-request-id" in payload
            name = _CODES[int(code)]
            assert not LEAK.search(payload)
            assert not ours or name not in {"INTERNAL", "UNKNOWN"}, payload
            self._ended.setdefault(stream, name if ours or name in {"OK", "UNIMPLEMENTED"} else "refused")

    def close(self) -> None:
        """Leave without a word."""
        self._writer.transport.abort()


@asynccontextmanager
async def wire(world: World, *, preface: bool = True) -> AsyncIterator[Wire]:
    """Connect by hand."""
    host, _, port = world.client.address.rpartition(":")
    made = Wire(*await asyncio.open_connection(host, int(port)))
    try:
        if preface:
            # With a table of size 0 the server's headers come as they are.
            await made.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", frame(SETTINGS, 0, 0, b"\0\1\0\0\0\0"))
        yield made
    finally:
        made.close()


DATA, HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
END_STREAM, END_HEADERS = 1, 4
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def header(name: bytes, value: bytes) -> bytes:
    """A header as it is, without any table."""

    def text(sent: bytes) -> bytes:
        return bytes([len(sent)]) + sent if len(sent) < 127 else b"\x7f" + _varint(len(sent) - 127) + sent

    return b"\0" + text(name) + text(value)


def opening(world: World, stream: int, changes: dict[str, bytes | None] | None = None) -> bytes:
    """The headers of an IngestEvents, with some of them changed, added or (None) left out."""
    sent: dict[str, bytes | None] = {
        ":method": b"POST",
        ":scheme": b"http",
        ":path": _path("IngestEvents").encode(),
        ":authority": b"x",
        "te": b"trailers",
        "content-type": b"application/grpc",
        "authorization": world.credential()[1].encode(),
        **(changes or {}),
    }
    block = b"".join(header(name.encode(), value) for name, value in sent.items() if value is not None)
    return frame(HEADERS, END_HEADERS, stream, block)


def body(message: bytes, flag: int = 0) -> bytes:
    """A message as gRPC frames it."""
    return bytes([flag]) + len(message).to_bytes(4, "big") + message


def sound(world: World, stream: int) -> bytes:
    """A sound call that changes nothing."""
    request = event_pb2.IngestEventsRequest(events=[KNOWN]).SerializeToString()
    return opening(world, stream) + frame(DATA, END_STREAM, stream, body(request))


async def _with_another(world: World, *parts: bytes) -> str:
    """Send bytes as stream 1, and a sound call as stream 3 of the same connection."""
    async with wire(world) as connection:
        await connection.send(*parts, sound(world, 3))
        assert await connection.end_of(3) == "OK"
        end = await connection.end_of(1, 0.3)
    return f"{'refused' if end == 'silent' else end}, connection lives"


def http2(changes: dict[str, bytes | None]) -> "Send":
    """A call with other headers, that would change nothing."""
    request = event_pb2.IngestEventsRequest(events=[KNOWN]).SerializeToString()
    return lambda world: _with_another(world, opening(world, 1, changes), frame(DATA, END_STREAM, 1, body(request)))


def _new_request() -> bytes:
    return event_pb2.IngestEventsRequest(events=[event()]).SerializeToString()


async def cut_message(world: World) -> str:
    """A message of which the end is missing."""
    return await _with_another(world, opening(world, 1), frame(DATA, END_STREAM, 1, body(_new_request())[:-9]))


async def long_message(world: World) -> str:
    """A message that says it has 4 GiB."""
    return await _with_another(world, opening(world, 1), frame(DATA, END_STREAM, 1, b"\0\xff\xff\xff\xffabc"))


async def no_gzip(world: World) -> str:
    """A message that says it is compressed, and is not."""
    start = opening(world, 1, {"grpc-encoding": b"gzip"})
    return await _with_another(world, start, frame(DATA, END_STREAM, 1, body(_new_request(), 1)))


async def unknown_compression(world: World) -> str:
    """A message in a compression that the server does not know."""
    start = opening(world, 1, {"grpc-encoding": b"zstd"})
    return await _with_another(world, start, frame(DATA, END_STREAM, 1, body(_new_request(), 1)))


async def continuation(world: World) -> str:
    """Headers that do not end for long."""
    start = bytearray(opening(world, 1))
    start[4] = 0
    more = [frame(CONTINUATION, 0, 1, header(b"x-%d" % i, b"x" * 10_000)) for i in range(40)]
    return await _with_another(world, bytes(start), *more, frame(CONTINUATION, END_HEADERS, 1))


def garbage(sent: bytes) -> "Send":
    """Bytes of another protocol, or of none."""

    async def send(world: World) -> str:
        async with wire(world, preface=False) as connection:
            await connection.send(sent)
            return await connection.end_of(1)

    return send


async def oversized_frame(world: World) -> str:
    """A frame larger than the server allows."""
    async with wire(world) as connection:
        await connection.send(frame(DATA, 0, 1, bytes(MIB)))
        return await connection.end_of(1)


async def silent_streams(world: World) -> str:
    """Fifty streams without a batch; one of them speaks at last."""
    streams = [world.channel.stream_stream(_path("StreamEvents"))(metadata=[world.credential()]) for _ in range(50)]
    await asyncio.sleep(0.5)
    await asyncio.wait_for(world.alive(), AT_ONCE_S)
    await streams[7].write(event_pb2.StreamEventsRequest(sequence=1, events=[KNOWN]).SerializeToString())
    answer = event_pb2.StreamEventsResponse.FromString(await streams[7].read())
    assert list(answer.verdicts) == [event_pb2.VERDICT_DUPLICATE]
    for stream in streams:
        stream.cancel()
    return "served meanwhile"


async def silent_connections(world: World) -> str:
    """Connections that say nothing, no more than hello, or begin a call and stop."""
    async with AsyncExitStack() as stack:
        for i in range(99):
            connection = await stack.enter_async_context(wire(world, preface=i % 3 > 0))
            if i % 3 == 2:
                await connection.send(opening(world, 1), frame(DATA, 0, 1, body(_new_request())[:-9]))
        await asyncio.wait_for(world.alive(), AT_ONCE_S)
    return "served meanwhile"


async def slowly(world: World) -> str:
    """A sound call of which a byte comes every half second, while others are answered; then the rest."""
    async with wire(world) as connection:
        sent = sound(world, 1)
        for i in range(6):
            await connection.send(sent[i : i + 1])
            await asyncio.wait_for(world.alive(), AT_ONCE_S)
            await asyncio.sleep(0.5)
        await connection.send(sent[6:])
        return f"served meanwhile, {await connection.end_of(1)}"


async def rapid_reset(world: World) -> str:
    """3,000 calls, each taken back as soon as it was sent."""
    async with wire(world) as connection:
        request = event_pb2.IngestEventsRequest(events=[KNOWN]).SerializeToString()
        for stream in range(1, 6_000, 2):
            data = frame(DATA, END_STREAM, stream, body(request)) if stream % 3 else b""
            reset = frame(RST_STREAM, 0, stream, (8).to_bytes(4, "big"))
            await connection.send(opening(world, stream), data, reset)
        await asyncio.wait_for(world.alive(), AT_ONCE_S)
    return "served at once"


def flood(kind: int) -> "Send":
    """10,000 frames that cost an answer each, none of which is read."""

    async def send(world: World) -> str:
        async with wire(world) as connection:
            one = frame(kind, 0, 0, bytes(8) if kind == PING else b"")
            sending = asyncio.create_task(connection.send(*[one] * 10_000))
            await asyncio.wait({sending}, timeout=1)
            await asyncio.wait_for(world.alive(), AT_ONCE_S)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        return "served at once"

    return send


async def no_window(world: World) -> str:
    """A caller that lets nothing come back, and leaves."""
    async with wire(world) as connection:
        await connection.send(frame(SETTINGS, 0, 0, b"\0\4\0\0\0\0"), *(sound(world, 1 + 2 * i) for i in range(50)))
        await asyncio.wait_for(world.alive(), AT_ONCE_S)
    return "served at once"


# --- What the rows name

MODULES = (
    event_pb2,
    billable_metric_pb2,
    customer_pb2,
    usage_pb2,
    entitlement_pb2,
    usage_record_group_pb2,
    usage_record_report_pb2,
    suger_entitlement_pb2,
)
# By name; those of the compatible service with its name before it.
METHODS = {
    ".".join((*module.DESCRIPTOR.package.split(".")[1:-1], method.name)): method
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
KNOWN = event("known", properties={"a": 1})
DAY = {
    "window_size": "WINDOW_SIZE_HOUR",
    "starting_on": timestamp(START),
    "ending_before": timestamp(START + timedelta(days=1)),
}
ONE = {"customer_ids": [CUSTOMER], "billable_metrics": [{"id": METRIC}]}
GROUPED = {
    **DAY,
    "customer_id": CUSTOMER,
    "billable_metric_id": METRIC,
    "window_size": "WINDOW_SIZE_NONE",
    "group_key": ["region"],
}
REGIONS = datetime(2018, 1, 1, tzinfo=UTC)
LEAP = datetime(2017, 1, 1, tzinfo=UTC)
B57 = {"transaction_id": "b57"}
NO_PAGE_TEXT = (
    "page_token: is not a token of this query; take next_page_token of the page before as it is, with the same request"
)
# In which a sound call is answered beside an attack; some hundredths of it is what it takes.
AT_ONCE_S = 2.0
_TEMPORARY = {"incoming_events"}
Send = Callable[[World], Awaitable[str]]


def _path(method: str) -> str:
    descriptor = METHODS[method]
    return f"/{descriptor.containing_service.full_name}/{descriptor.name}"


# --- The test


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
async def test_hostile_input(world: World, row: Row, caplog: pytest.LogCaptureFixture) -> None:
    """The input gets the answer of its row, changes nothing but what the row says, and the server goes on."""
    before = await world.fingerprint()
    with capture_logs() as logs, caplog.at_level(logging.WARNING):
        async with asyncio.timeout(30):
            assert await row.send(world) == row.says
            await world.alive()
    after = await world.fingerprint()
    changes = row.changes | (EVENTS if "ACCEPTED" in row.says else frozenset())
    assert {name for name in before if before[name] != after[name]} <= changes
    stored = after["usage_events"][0] - before["usage_events"][0]
    assert (stored > 0) == ("usage_events" in changes)
    assert [one for one in logs if one["log_level"] in {"error", "critical"}] == []
    assert [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR] == []


async def test_a_path_that_is_no_text(database: Database, database_url: str) -> None:
    """A path that is no text is an unknown method, and the server goes on."""
    server = start_server("--database-url", database_url)
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            world = World(Client(server.address, channel), database)
            await world.client.ingest(KNOWN)
            assert await http2({":path": b"/\xff\xfe"})(world) == "UNIMPLEMENTED, connection lives"
            await world.alive()
    finally:
        server.kill()


async def test_a_watcher_that_does_not_read_holds_up_nobody(database: Database, database_url: str) -> None:
    """One that watches health and takes nothing, without any credential, keeps neither the states nor the shutdown.

    Would catch states that are told under a lock which changes need.
    """
    began = 0.0
    async with AsyncExitStack() as stack:
        settings = {"drain": timedelta(seconds=2), "stream_stall": timedelta(seconds=60)}
        async with running_server(database_url, **settings) as client:
            world = World(client, database)
            connection = await stack.enter_async_context(wire(world))
            request = health_pb2.HealthCheckRequest(service="metering.v1.EventService").SerializeToString()
            # It lets nothing be sent to it.
            await connection.send(frame(SETTINGS, 0, 0, b"\0\4\0\0\0\0"))
            await connection.send(opening(world, 1, {":path": b"/grpc.health.v1.Health/Watch"}))
            await connection.send(frame(DATA, END_STREAM, 1, body(request)))
            await asyncio.sleep(0.5)
            stub = health_pb2_grpc.HealthStub(client.channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(service="metering.v1.EventService"))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            began = time.monotonic()
        assert time.monotonic() - began < 20
