"""The edges of the SDKs' way in: what looks like a condition, a parameter, a number or a body, and is none."""

import asyncio
import contextlib
import gzip
import json
import os
import re
import signal
import subprocess
import tempfile
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import sqlalchemy as sa
from conftest import Client, event
from faults import fault_of
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from marketplace import group, reported, roll_up, sell
from test_gateway import (
    JSON,
    OPERATIONS,
    UNKNOWN,
    WITH_BODY,
    Operation,
    envoys,
    every,
    is_refused,
    named,
    needs_envoy,
    unchanged,
)
from test_suger_python import Suger

from metering.v1 import billable_metric_pb2, customer_pb2, event_pb2
from service.database import Database
from service.gateway import Gateway, GatewayError, gateway
from service.rpc.compat import metronome
from service.server import COMPAT_SERVICES
from service.store import metrics as metric_store
from service.store.tables import METADATA

ORG = "/org/default"
METRIC = "/v1/billable-metrics/create"
MB = 1_000_000
DAY = {"window_size": "DAY", "starting_on": "2026-01-01T00:00:00Z", "ending_before": "2026-01-02T00:00:00Z"}


@pytest.fixture
async def http(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the gateway."""
    async with httpx.AsyncClient(base_url=base_url, timeout=30, headers=JSON) as http:
        yield http


async def contents(database: Database) -> dict[str, list[str]]:
    """Every row of every table."""
    async with database.engine.connect() as connection:
        return {
            table.name: sorted(map(repr, (await connection.execute(sa.select(table))).all()))
            for table in METADATA.sorted_tables
        }


@contextlib.asynccontextmanager
async def untouched(database: Database) -> AsyncIterator[None]:
    """Prove that the block neither stored nor changed anything."""
    before = await contents(database)
    yield
    after = await contents(database)
    assert {name for name, rows in after.items() if rows != before[name]} == set()


async def done(answer: Any) -> Any:
    """Await a call that must succeed; returns its document."""
    got = await answer
    assert got.status_code == 200, (got.status_code, got.text[:500])
    return got.json() if got.content else None


def event_of(transaction_id: str, properties: str = "{}", **fields: Any) -> str:
    """An event as JSON text, with properties that are JSON text too."""
    common = {"customer_id": "acme", "event_type": "request", "timestamp": "2026-01-01T00:00:00Z"}
    document = json.dumps({"transaction_id": transaction_id, **common, **fields})
    return f'{document[:-1]},"properties":{properties}}}'


def suger_metric(value: Any, operation: str = "IS") -> dict[str, Any]:
    """A metric of Suger's with one filter."""
    info = {"filterGroups": [{"filters": [{"name": "region", "operation": operation, "value": value}]}]}
    return {"name": "name", "aggregationType": "COUNT", "info": info}


# --- Conditions


async def test_an_empty_list_of_values_is_no_condition(
    client: Client, http: httpx.AsyncClient, database: Database
) -> None:
    """A condition that nothing could meet is refused and named, and is never stored as no condition at all."""
    base = {"name": "metric", "aggregation_type": "count"}
    async with untouched(database):
        for name in ("in_values", "not_in_values"):
            sent = base | {"event_type_filter": {name: []}}
            assert f"event_type_filter.{name}" in (await is_refused(http, "POST", METRIC, 400, json=sent)).text
            for more in ({}, {"exists": True}, {"not_in_values": ["a"], "in_values": ["b"]}):
                sent = base | {"property_filters": [{"name": "ok"}, {"name": "region", **more, name: []}]}
                answer = await is_refused(http, "POST", METRIC, 400, json=sent)
                assert "property_filters" in answer.text
                assert name in answer.text
        for operation in ("IS", "EQ", "NOT_IS", "NOT_EQ"):
            for value in ([], {"value": []}, None, {}, [[]], [None], {"value": None}):
                sent = suger_metric(value, operation)
                answer = await is_refused(http, "POST", f"{ORG}/billableMetric", 400, json=sent, why=value)
                assert "info.filterGroups[0].filters[0].value" in answer.text
    # Without values there is no condition, and null is as if absent.
    nothing = {"in_values": None, "not_in_values": None}
    for filters in (
        {},
        {"event_type_filter": None, "property_filters": None, "group_keys": None, "custom_fields": None},
        {"event_type_filter": nothing},
        {"event_type_filter": {}, "property_filters": []},
        {"property_filters": [{"name": "region", "exists": None, **nothing}]},
    ):
        made = (await done(http.post(METRIC, json=base | filters)))["data"]
        shown = (await done(http.get(f"/v1/billable-metrics/{made['id']}")))["data"]
        values = [shown.get("event_type_filter") or {}, *shown["property_filters"]]
        assert not any(one.get("in_values") or one.get("not_in_values") for one in values)
        found = billable_metric_pb2.GetBillableMetricRequest(id=made["id"])
        await client.counted((await client.metrics.GetBillableMetric(found)).billable_metric)
    # Lists that narrow a query are another thing: an empty one asks for all.
    assert (await done(http.post("/v1/usage", json=DAY | {"customer_ids": [], "billable_metrics": []})))["data"] == []


# --- What stands in the query


def camel(name: str) -> str:
    """A name of a proto file as JSON usually has it."""
    return re.sub(r"_(\w)", lambda found: found[1].upper(), name)


def spelled(name: str) -> Iterator[str]:
    """A name as it is, and percent-encoded in part and as a whole."""
    yield name
    yield f"%{ord(name[0]):02x}{name[1:]}"
    yield f"{name[:-1]}%{ord(name[-1]):02X}"
    yield "".join(f"%{byte:02x}" for byte in name.encode())


def stand_ins(operation: Operation) -> Iterator[str]:
    """The names of query parameters that would take the place of a part of the path or of the body."""
    service, _, name = operation.name.rpartition(".")
    fields = descriptor_pool.Default().FindServiceByName(service).FindMethodByName(name).input_type.fields_by_name
    taken = re.findall(r"\{(\w+)\}", operation.template)
    for part in taken:
        for called in sorted({part, fields[part].json_name, camel(part)}):
            yield from spelled(called)
            yield f"{called}.x"
    assert operation.has_body == ("body" in fields)
    for called in ("body", "body.data", "body.content_type", "body.contentType", "body.extensions.value"):
        yield from spelled(called)
    yield "body%2Edata"
    yield "bod%79%2edat%61"


async def test_the_query_takes_no_place_of_path_or_body(
    client: Client, http: httpx.AsyncClient, database: Database
) -> None:
    """Of no operation a query parameter, however written, names what path and body name: 400, with nothing done."""
    ours, theirs = [await client.create_customer(name=name) for name in ("ours", "theirs")]
    mine, other = [await client.create_metric(key=key, name=key) for key in ("mine", "other")]
    await sell(client, "ent")
    await sell(client, "ent2")
    await reported(client, group("g1"), group("g2"), group("g3", "ent2"))
    paths = {"org_id": "default", "customer_id": ours.id, "entitlement_id": "ent", "usage_record_group_id": "g1"}
    values = [theirs.id, other.id, "other", "ent2", "g2", "e30=", "application/json", ""]

    def path(one: Operation) -> str:
        metric = "mine" if one.template.startswith("/org/") else mine.id
        return re.sub(r"\{(\w+)\}", lambda found: {**paths, "billable_metric_id": metric}[found[1]], one.template)

    # By the end of the operation's name: what it takes. These go last, as they end something.
    bodies: dict[str, Any] = {
        "IngestEvents": json.loads(f"[{event_of('e')}]"),
        "metronome.v1.UsageService.ListUsage": DAY,
        "ListUsageWithGroups": DAY | {"customer_id": ours.id, "billable_metric_id": mine.id},
        "SearchEvents": {"transactionIds": ["e"]},
        "metronome.v1.BillableMetricService.CreateBillableMetric": {"name": "new", "aggregation_type": "max",
                                                                    "aggregation_key": "n"},
        "metronome.v1.BillableMetricService.UpdateBillableMetric": {"name": "renamed"},
        "CreateCustomer": {"name": "new"},
        "SetIngestAliases": {"ingest_aliases": ["alias"]},
        "SetName": {"name": "renamed"},
        "BatchValidateUsageRecordGroups": [{"entitlementID": "ent", "records": {"cpu": 1}}],
        "BatchCreateUsageRecordGroups": [{"entitlementID": "ent", "records": {"cpu": 1}}],
        "ReportUsageRecordGroup": {"records": {"cpu": 1}},
        "suger.v1.BillableMetricService.CreateBillableMetric": {"name": "name", "aggregationType": "COUNT"},
        "suger.v1.BillableMetricService.UpdateBillableMetric": {"name": "renamed"},
        "ArchiveCustomer": {"id": ours.id},
        "metronome.v1.BillableMetricService.ArchiveBillableMetric": {"id": mine.id},
    }  # fmt: skip
    sent = {named(name).name: body for name, body in bodies.items()}
    assert sent.keys() == {one.name for one in WITH_BODY}
    assert {one.name.rpartition(".")[0] for one in OPERATIONS} == set(COMPAT_SERVICES)

    async def refused(one: Operation, query: str) -> None:
        body = {"json": sent[one.name]} if one.has_body else {}
        answer = await is_refused(http, one.verb, f"{path(one)}?{query}", 400, why=query, **body)
        told = ("is not a query parameter of this call", "must be name=value", "stands twice in the query")
        assert any(words in answer.text for words in told), query

    cases = [(one, name) for one in OPERATIONS for name in stand_ins(one)]
    assert len(cases) > 29 * 20
    async with untouched(database):
        await every(*(refused(one, f"{name}={values[i % len(values)]}") for i, (one, name) in enumerate(cases)))
        # Nor behind, before or between others, nor without a value.
        shapes = ("&{}=x", "limit=1&{}=x", "{}=x&limit=1", "{}", "&&{}", "x=%26&{}=x", "{}==", "{}=x&{}=y")
        await every(*(refused(one, shapes[i % 8].replace("{}", name)) for i, (one, name) in enumerate(cases[::3])))
    # All of that is said of the query: without it each call does what it is for.
    last = ("ArchiveCustomer", "ArchiveBillableMetric", "DeleteUsageRecordGroup", "RetryUsageRecordGroup")
    for one in sorted(OPERATIONS, key=lambda one: one.name.endswith(last)):
        answer = await http.request(one.verb, path(one), **({"json": sent[one.name]} if one.has_body else {}))
        # A group that did not fail is not retried.
        assert answer.status_code == (400 if one.name.endswith(".RetryUsageRecordGroup") else 200), (one, answer.text)


async def test_query_parameters_that_there_are(client: Client, http: httpx.AsyncClient, database: Database) -> None:
    """Parameters called as parts of other operations' paths narrow their lists, written as they may be."""
    ours, theirs = [await client.create_customer(name=name, ingest_aliases=[name]) for name in ("ours", "theirs")]
    for name in ("ent", "ent2"):
        await sell(client, name)
    await reported(client, group("g1"), group("g2", "ent2"))
    everybody = {one["id"] for one in (await done(http.get("/v1/customers")))["data"]}
    assert len(everybody) == 4

    async def customers(query: str) -> set[str]:
        return {one["id"] for one in (await done(http.get(f"/v1/customers?{query}")))["data"]}

    for query in (
        f"customer_ids={ours.id}", f"%63ustomer_ids={ours.id}", f"customer%5Fids={ours.id}", "ingest_alias=ours",
        f"limit=5&customer_ids={ours.id}", f"customer_ids={ours.id}&&",
    ):  # fmt: skip
        assert await customers(query) == {ours.id}, query
    both = {ours.id, theirs.id}
    for joint in (",", "%2C", "%2c+", "&customer_ids="):
        assert await customers(f"customer_ids={ours.id}{joint}{theirs.id}") == both
    assert await customers(f"customer_ids={UNKNOWN}") == set()
    assert await customers("") == await customers("limit=100") == everybody
    metric = await client.create_metric()
    for query in ("limit=1", "include_archived=true"):
        found = await done(http.get(f"/v1/customers/{ours.id}/billable-metrics?{query}"))
        assert metric.id in {one["id"] for one in found["data"]} or query == "limit=1"

    async def groups(query: str) -> list[str]:
        found = await done(http.get(f"{ORG}/usageRecordGroup?{query}"))
        return sorted(one["id"] for one in found["usageRecordGroups"])

    for name in ("entitlementId", "%65ntitlementId", "entitlement%49d"):
        assert await groups(f"{name}=ent2") == ["g2"]
        assert await groups(f"limit=5&{name}=ent") == ["g1"]
    assert await groups("buyerId=b-ent") == await groups("productId=p-ent&offset=0") == ["g1"]
    assert await groups("metaInfo=erpInvoiceID%3Dbody.data") == []
    await roll_up(database)
    for name, value in (("entitlementId", "ent2"), ("buyerId", "b-ent2"), ("%65ntitlementId", "ent2")):
        found = await done(http.get(f"{ORG}/usageRecordReport?{name}={value}"))
        assert [one["entitlementID"] for one in found["usageRecordReports"]] == ["ent2"]
    for query in ("productId=p-ent2", "buyerId=b-ent2"):
        assert [one["id"] for one in await done(http.get(f"{ORG}/entitlement?{query}"))] == ["ent2"]
    # When a group was created may be said of its own calls.
    await is_refused(http, "DELETE", f"{ORG}/usageRecordGroup/g1?creationDate=2001-01-01", 404)
    assert (await done(http.get(f"{ORG}/billableMetric?status=ACTIVE"))) != []


async def test_parameters_without_a_value(http: httpx.AsyncClient, database: Database) -> None:
    """A parameter that is only named, or only a value, is refused: passed over it would narrow nothing."""
    async with unchanged(database, http):
        for query in (
            "only_archived",
            "customer_ids",
            "limit",
            "nonsense",
            "=x",
            "=",
            "limit=1&=",
            "limit=1&ingest_alias",
        ):
            answer = await is_refused(http, "GET", f"/v1/customers?{query}", 400, why=query)
            assert "must be name=value" in answer.text
        for query in ("entitlementId", "buyerId&limit=1", "x" * 5000, "%22", "%00"):
            await is_refused(http, "GET", f"{ORG}/usageRecordGroup?{query}", 400, why=query)
        # Without any there is nothing to refuse.
        for query in ("", "&", "&&limit=1&"):
            assert (await http.get(f"/v1/customers?{query}")).status_code == 200


# --- Numbers

TOO_MUCH = [
    "1e40", "-1e38", "1" + "0" * 38, "9" * 39, "123456789012345678901234567890.1234567890123456789",
    "0.1234567890123456789", "1e-19", "-0.0000000000000000001", "1e300", "1E+400", "1e-400", "1.5e99999",
]  # fmt: skip


async def test_numbers_beyond_all_quantities(client: Client, http: httpx.AsyncClient) -> None:
    """What has too many digits to be counted is taken, kept, told in `skipped_count` and matched by no metric."""
    total = await client.create_metric(name="total", aggregation_type="AGGREGATION_TYPE_SUM", aggregation_key="n",
                                       group_keys=[{"properties": ["region"]}])  # fmt: skip
    most = await client.create_metric(name="most", aggregation_type="AGGREGATION_TYPE_MAX", aggregation_key="n")
    count = await client.create_metric(name="count")
    customer = await client.create_customer(ingest_aliases=["acme"])
    # What a double holds exactly stays a number; it is too fine all the same.
    doubles = {"1e-19", "-0.0000000000000000001"}
    texts = {f"x{i}": text for i, text in enumerate(TOO_MUCH)}
    fine = {"y0": "9" * 38, "y1": "-" + "9" * 38, "y2": "12345678901234567890.123456789012345678", "y3": "1e-18"}
    bodies = [event_of(name, f'{{"n":{text},"region":"eu"}}') for name, text in (texts | fine).items()]
    assert (await http.post("/v1/ingest", content=f"[{','.join(bodies)}]")).status_code == 200
    kept = await client.events.SearchEvents(event_pb2.SearchEventsRequest(transaction_ids=list(texts | fine)))
    assert len(kept.events) == len(texts) + len(fine)
    for one in kept.events:
        if one.event.transaction_id in texts:
            text = texts[one.event.transaction_id]
            assert isinstance(one.event.properties["n"], float if text in doubles else str), text
    found = {
        one["id"]: one
        for one in await done(http.post("/v1/events/search", json={"transactionIds": list(texts | fine)}))
    }
    for name, one in found.items():
        names = {metric["name"] for metric in one["matched_billable_metrics"]}
        assert names == ({"count"} if name in texts else {"count", "total", "most"}), (name, texts.get(name))
    value = "12345678901234567890.123456789012345679"
    asked = DAY | {"billable_metrics": [{"id": one.id} for one in (total, most, count)]}
    rows = {one["billable_metric_name"]: one for one in (await done(http.post("/v1/usage", json=asked)))["data"]}
    assert {name: (one["value_decimal"], one["skipped_count"]) for name, one in rows.items()} == {
        "total": (value, len(texts)), "most": ("9" * 38, len(texts)), "count": (str(len(found)), 0),
    }  # fmt: skip
    assert all(type(one["skipped_count"]) is int for one in rows.values())
    for more in ({}, {"group_key": ["region"]}, {"group_by": {"key": "region"}}):
        asked = DAY | {"customer_id": customer.id, "billable_metric_id": total.id} | more
        (row,) = (await done(http.post("/v1/usage/groups", json=asked)))["data"]
        assert (row["value_decimal"], row["skipped_count"]) == (value, len(texts))
    # Where nothing else was counted there is no value, and still a row that says why.
    alone = event_of("z", '{"n":1e40}', timestamp="2026-01-05T00:00:00Z")
    assert (await http.post("/v1/ingest", content=f"[{alone}]")).status_code == 200
    day = {"window_size": "DAY", "starting_on": "2026-01-05T00:00:00Z", "ending_before": "2026-01-06T00:00:00Z"}
    asked = day | {"billable_metrics": [{"id": total.id}], "customer_ids": [customer.id]}
    (row,) = (await done(http.post("/v1/usage", json=asked)))["data"]
    assert (row["value"], row["skipped_count"]) == (None, 1)
    (row,) = (
        await done(
            http.post("/v1/usage/groups", json=day | {"customer_id": customer.id, "billable_metric_id": total.id})
        )
    )["data"]
    assert (row["value"], row["skipped_count"]) == (None, 1)


# --- Encodings


async def test_gzip_is_read_to_its_end(http: httpx.AsyncClient, database: Database) -> None:
    """A compressed body counts whole and undamaged, of any number of members; nothing of a damaged one is done."""
    whole = gzip.compress(b'{"name":"Ada"}')
    halves = gzip.compress(b'{"name":') + gzip.compress(b'"Ada"}')
    squeezed = {"content-encoding": "gzip"}

    async def created(content: bytes, headers: dict[str, str]) -> None:
        answer = await done(http.post("/v1/customers", content=content, headers=headers))
        assert answer["data"]["name"] == "Ada"

    wrong_sum = whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]
    wrong_size = whole[:-1] + bytes([whole[-1] ^ 1])
    middle = len(whole) // 2
    damaged = {
        "checksum": wrong_sum,
        "size": wrong_size,
        "no trailer": whole[:-8],
        "half a trailer": whole[:-3],
        "half of it": whole[:middle],
        "a header": whole[:5],
        "garbage behind": whole + b"garbage",
        "NUL behind": whole + b"\0" * 8,
        "JSON behind": whole + b" ",
        "a damaged second member": halves[:-1],
        "a second member that ends": gzip.compress(b'{"name":"Ada"}') + gzip.compress(b" ")[:12],
        "plain": b'{"name":"Ada"}',
        "zlib": zlib.compress(b'{"name":"Ada"}'),
        "twice": gzip.compress(whole),
        "two documents": whole + whole,
        "nothing": gzip.compress(b""),
        "empty": b"",
    }
    async with unchanged(database, http):
        for why, content in damaged.items():
            await is_refused(http, "POST", "/v1/customers", 400, why=why, content=content, headers=squeezed)
        # What unpacks to more than a body may have: told without unpacking all of it.
        zeros = gzip.compress(b" " * 50 * MB)
        for bomb in (zeros, gzip.compress(b"{}") + zeros, gzip.compress(b"[" + b" " * (4 * 1024 * 1024))):
            started = time.monotonic()
            await is_refused(http, "POST", "/v1/customers", 413, content=bomb, headers=squeezed)
            assert time.monotonic() - started < 2
        for coding in ("br", "deflate", "zstd", "x-gzip", "gzip, gzip", "gzip, br", "identity, gzip", "gzipp", "*"):
            headers = {"content-encoding": coding}
            answer = await is_refused(http, "POST", "/v1/customers", 415, content=whole, headers=headers)
            assert "gzip" in answer.text
            await is_refused(http, "POST", f"{ORG}/batchValidateUsageRecordGroups", 415, json=[], headers=headers)
        twice = [("content-encoding", "gzip"), ("content-encoding", "gzip")]
        await is_refused(http, "POST", "/v1/customers", 400, 415, content=whole, headers=twice)
        # How a body is encoded is said in content-encoding only.
        for coding in ({}, {"content-encoding": "identity"}):
            headers = {"x-body-encoding": "gzip", **coding}
            await is_refused(http, "POST", "/v1/customers", 400, content=whole, headers=headers)
    await created(whole, squeezed)
    await created(halves, squeezed)
    await created(gzip.compress(b"") + halves + gzip.compress(b" \n"), squeezed)
    for coding in ("GZIP", "Gzip", "gZiP"):
        await created(whole, {"content-encoding": coding})
    plain = b'{"name":"Ada"}'
    for coding in ("identity", "IDENTITY"):
        await created(plain, {"content-encoding": coding})
    for value in ("gzip", "junk", ""):
        await created(plain, {"x-body-encoding": value})
        await created(plain, {"X-Body-Encoding": value, "content-encoding": "identity"})
        await created(whole, {"x-body-encoding": value, **squeezed})
    large = b'{"name":"Ada"}' + b" " * (4 * 1024 * 1024 - 14)
    await created(gzip.compress(large), squeezed)


# --- Metronome


async def test_aliases_are_cleared_by_an_empty_list_only(http: httpx.AsyncClient, database: Database) -> None:
    """A call that leaves the aliases out, or says null, is refused and changes none; [] takes them all."""
    sent = {"name": "Ada", "ingest_aliases": ["a", "b"]}
    customer = (await done(http.post("/v1/customers", json=sent)))["data"]
    path = f"/v1/customers/{customer['id']}/setIngestAliases"
    async with untouched(database):
        for body in (
            "{}",
            '{"ingest_aliases":null}',
            "null",
            "[]",
            " ",
            '{"ingest_aliases":{}}',
            '{"ingestAliases":[]}',
        ):
            answer = await is_refused(http, "POST", path, 400, why=body, content=body)
            assert "ingest_aliases" in answer.text or "body" in answer.text
        assert "ingest_aliases" in (await is_refused(http, "POST", path, 400, content="{}")).text
        for body in ({"ingest_aliases": [None]}, {"ingest_aliases": [""]}, {"ingest_aliases": ["a", "a"]}):
            await is_refused(http, "POST", path, 400, json=body)

    async def aliases() -> list[str]:
        return (await done(http.get(f"/v1/customers/{customer['id']}")))["data"]["ingest_aliases"]  # type: ignore[no-any-return]

    assert await aliases() == ["a", "b"]
    assert (await http.post(path, json={"ingest_aliases": ["c"]})).status_code == 200
    assert await aliases() == ["c"]
    assert (await http.post(path, json={"ingest_aliases": []})).status_code == 200
    assert await aliases() == []


async def test_one_key_is_not_filtered_twice(client: Client, http: httpx.AsyncClient) -> None:
    """A key that both group_by and group_filters name is refused, whatever both say of it."""
    metric = await client.create_metric(group_keys=[{"properties": ["region"]}, {"properties": ["region", "tier"]}])
    customer = await client.create_customer(ingest_aliases=["acme"])
    await client.ingest(*(event(properties={"region": one, "tier": "x"}) for one in ("eu", "us")))
    base = DAY | {"customer_id": customer.id, "billable_metric_id": metric.id}
    for values in ({}, {"values": ["eu"]}, {"values": []}, {"values": ["us"]}):
        for filters in (["eu"], ["us"], []):
            sent = base | {"group_by": {"key": "region", **values}, "group_filters": {"region": filters}}
            answer = await is_refused(http, "POST", "/v1/usage/groups", 400, why=sent, json=sent)
            assert "group_filters" in answer.json()["message"]
    sent = base | {"group_by": {"key": "region"}, "group_key": ["region"]}
    assert "group_by" in (await is_refused(http, "POST", "/v1/usage/groups", 400, json=sent)).text
    for more in (
        {"group_by": {"key": "region", "values": ["eu"]}},
        {"group_by": {"key": "region", "values": ["eu"]}, "group_filters": {}},
        {"group_by": {"key": "region", "values": ["eu"]}, "group_filters": None},
        {"group_key": ["region"], "group_filters": {"region": ["eu"]}},
    ):
        rows = (await done(http.post("/v1/usage/groups", json=base | more)))["data"]
        assert [(one["group"], one["value"]) for one in rows] == [({"region": "eu"}, 1)], more


async def large_metrics(
    client: Client, count: int, text: str, event_type: str
) -> list[billable_metric_pb2.BillableMetric]:
    """Make metrics of about the largest definitions that there may be, which count events of one type."""
    made = []
    for number in range(count):
        each = len(json.dumps(text, ensure_ascii=False).encode()) - 2
        size = min(1000, 125_000 // each // 1000)
        values = [f"{i:03}{text * size}"[:1000] for i in range(125_000 // (each * size + 7))][:1000]
        metric = await client.create_metric(
            name=f"{event_type} {number}",
            event_type_filter={"in_values": [event_type]},
            property_filters=[{"name": "region", "not_in_values": values}],
        )
        made.append(metric)
    return made


async def test_searches_are_answered_or_told_to_be_smaller(
    client: Client, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search finds all that it names, definitions of metrics with each event, or says which list is too long."""
    ids = [f"e{i}" for i in range(100)]
    await client.ingest(*(event(one, event_type="text") for one in ids))
    (metric,) = await large_metrics(client, 1, "x" * 100, "text")
    assert metric.ByteSize() > 100_000

    async def search(count: int, prefix: str = "") -> httpx.Response:
        return await http.post("/v1/events/search", json={"transactionIds": [prefix + one for one in ids[:count]]})

    fits = metronome.ANSWER_BYTES_MAX // (metric.ByteSize() + 200) - 1
    assert 50 < fits < 99
    found = await done(search(fits))
    assert {one["id"] for one in found} == set(ids[:fits])
    assert all(one["matched_billable_metrics"][0]["id"] == metric.id for one in found)
    sent = {"transactionIds": ids}
    answer = await is_refused(http, "POST", "/v1/events/search", 400, json=sent)
    assert answer.json()["message"].startswith("transactionIds: ")
    # The limit is one of the answer's size, and each event is looked at.
    with monkeypatch.context() as patch:
        patch.setattr(metronome, "ANSWER_BYTES_MAX", 150_000)
        assert len(await done(search(1))) == 1
        await is_refused(http, "POST", "/v1/events/search", 400, json={"transactionIds": ids[:2]})
        patch.setattr(metronome, "ANSWER_BYTES_MAX", 1000)
        await is_refused(http, "POST", "/v1/events/search", 400, json={"transactionIds": ids[:1]})
        assert await done(http.post("/v1/events/search", json={"transactionIds": ["nothing"]})) == []
    # As JSON a control character takes six times as much: still an answer, or words.
    await client.ingest(*(event(f"c{one}", event_type="control") for one in ids))
    await large_metrics(client, 4, "\x01", "control")
    statuses = set()
    for count in (1, 15, 60, 75, 80, 100):
        answer = await search(count, "c")
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400), (count, answer.status_code, answer.text[:300])
        if answer.status_code == 400:
            assert answer.json()["message"].startswith("transactionIds: ")
        else:
            assert len(answer.json()) == count
    assert statuses == {200, 400}


# --- Suger

LARGEST = 2**53 - 1


async def test_totals_are_whole_numbers(client: Client, base_url: str, http: httpx.AsyncClient) -> None:
    """A total of up to 2^53-1 comes back from the SDK's list as just that integer; a larger one is refused."""
    await sell(client)
    totals = [LARGEST, 10**15, -LARGEST, 10**15 + 1, 1, -1, 2**31]
    suger = Suger(base_url, org="default")
    path = f"{ORG}/entitlement/ent/usageRecordGroup"

    def sent(total: str, group_id: str = "bad") -> str:
        meta = f'{{"stripeUsageRecordSummaryTotalUsage":{total}}}'
        return f'{{"id":"{group_id}","records":{{"cpu":1}},"metaInfo":{meta}}}'

    for number, total in enumerate(totals):
        answer = await http.post(path, content=sent(str(total), f"g{number}"))
        assert answer.status_code == 200, answer.text
        assert re.search(rf'"stripeUsageRecordSummaryTotalUsage":{total}[,}}]', answer.text)
    for number, text in enumerate(("1e15", "1000000000000000.0", '"1000000000000000"')):
        answer = await http.post(path, content=sent(text, f"t{number}"))
        assert answer.status_code == 200, answer.text
        assert '"stripeUsageRecordSummaryTotalUsage":1000000000000000' in answer.text
    listed = await asyncio.to_thread(suger.metering.list_usage_record_groups, "default")
    found = {one.id: one.meta_info.stripe_usage_record_summary_total_usage for one in listed.usage_record_groups}
    assert found == {f"g{i}": total for i, total in enumerate(totals)} | {f"t{i}": 10**15 for i in range(3)}
    assert {type(total) for total in found.values()} == {int}
    raw = (await http.get(f"{ORG}/usageRecordGroup")).text
    assert f'"stripeUsageRecordSummaryTotalUsage":{LARGEST}' in raw
    assert not re.search(r'"stripeUsageRecordSummaryTotalUsage":-?\d*[.eE"]', raw)
    beyond = [
        str(LARGEST + 1),
        str(-LARGEST - 1),
        "1e16",
        "10000000000000000",
        str(2**63 - 1),
        str(-(2**63)),
        str(2**64),
    ]
    beyond += ["9" * 40, "1e300", "1.5", "-0.1", '"x"', '"9007199254740992"', "true", "[]", "{}"]
    for text in beyond:
        answer = await is_refused(http, "POST", path, 400, why=text, content=sent(text))
        assert "metaInfo" in answer.text, text
        batch = f'[{sent(text)[:-1]},"entitlementID":"ent"}}]'
        for name in ("batchCreateUsageRecordGroups", "batchValidateUsageRecordGroups"):
            await is_refused(http, "POST", f"{ORG}/{name}", 400, why=text, content=batch)
    assert len((await done(http.get(f"{ORG}/usageRecordGroup")))["usageRecordGroups"]) == len(found)


async def test_parts_of_quantities_are_exact_and_well_formed(
    client: Client, http: httpx.AsyncClient, database: Database
) -> None:
    """Each part is answered with its exact decimal; parts and tags of any other form are refused where they stand."""
    await sell(client)
    path = f"{ORG}/entitlement/ent/usageRecordGroup"
    exact = ["1234567.891", "0.000000000000000001", "1"]
    total = "1234568.891000000000000001"
    parts = ",".join(f'{{"quantity":{one},"tags":[{{"key":"k","value":"v{i}"}}]}}' for i, one in enumerate(exact))
    for place in ('"usageAllocations":{"cpu":[%s]}', '"metaInfo":{"usageAllocations":{"cpu":[%s]}}'):
        body = f'{{"records":{{"cpu":{total}}},{place % parts}}}'
        made = await done(http.post(path, content=body))
        for shown in (made, (await done(http.get(f"{ORG}/usageRecordGroup")))["usageRecordGroups"][0]):
            assert shown["recordsDecimal"] == {"cpu": total}
            found = shown["metaInfo"]["usageAllocations"]["cpu"]
            assert [one["quantityDecimal"] for one in found] == exact
            assert [one["quantity"] for one in found] == [float(one) for one in exact]
            assert [one["tags"] for one in found] == [[{"key": "k", "value": f"v{i}"}] for i in range(3)]
    good = [{"key": "k", "value": "v"}]
    bad: list[Any] = ["x", 1, True, {}, {"key": "k", "value": "v"}, [1], ["k"], [None], [[]], [{}], [{"key": "k"}]]
    bad += [[{"value": "v"}], [{"key": "k", "value": "v", "more": "x"}], [{"key": "k", "value": 1}], [*good, 1]]
    bad += [[{"key": 1, "value": "v"}], [{"key": "k", "value": None}], [{"key": "k", "value": ["v"]}]]
    bad += [[{"key": "k", "value": True}], [{"key": "k", "value": {}}]]
    whole: list[Any] = [1, "x", None, [], {"quantity": 1, "tags": good, "more": 1}, {"tags": good}, {"quantity": None}]
    whole += [{"quantity": True}, {"quantity": {}}, {"Quantity": 1}]
    cases = [{"quantity": 1, "tags": tags} for tags in bad] + whole
    taken = []
    async with untouched(database):
        for case in cases:
            for sent in (
                {"records": {"cpu": 1}, "usageAllocations": {"cpu": [case]}},
                {"records": {"cpu": 1}, "metaInfo": {"usageAllocations": {"cpu": [case]}}},
            ):
                for call, body in (
                    (path, sent),
                    (f"{ORG}/batchValidateUsageRecordGroups", [sent | {"entitlementID": "ent"}]),
                ):
                    answer = await http.post(call, json=body)
                    if answer.status_code != 400 or "usageAllocations.cpu[0]" not in answer.text:
                        taken.append((answer.status_code, case, answer.text[:200]))
        assert not taken
    # Tags may be missing.
    for case in ({"quantity": 1}, {"quantity": 1, "tags": None}, {"quantity": "1.0", "tags": []}):
        made = await done(http.post(path, json={"records": {"cpu": 1}, "usageAllocations": {"cpu": [case]}}))
        assert made["metaInfo"]["usageAllocations"] == {"cpu": [{"quantity": 1, "quantityDecimal": "1", "tags": []}]}


# --- Nesting


@pytest.mark.parametrize("shape", ['{"d":%s}', "[%s]"], ids=["objects", "lists"])
async def test_bodies_of_any_depth(http: httpx.AsyncClient, shape: str) -> None:
    """Up to 25 levels of a property are taken, any deeper one is refused as what it is, and never as our error."""
    before, after = shape.split("%s")
    for depth in (*range(1, 121), 900, 5_000):
        nested = before * depth + "1" + after * depth
        properties = f'{{"p":{nested}}}'
        answer = await http.post("/v1/ingest", content=f"[{event_of(f'deep-{depth}', properties)}]")
        assert answer.status_code == (200 if depth <= 25 else 400), (depth, answer.text)
        info = f'[{{"entitlementID":"x","metaInfo":{{"p":{nested}}}}}]'
        answer = await http.post(f"{ORG}/batchCreateUsageRecordGroups", content=info)
        assert answer.status_code < 500, (depth, answer.text)


# --- Many values


async def test_bodies_of_very_many_values(client: Client, http: httpx.AsyncClient, database: Database) -> None:
    """Bodies that would take long to read are refused soon, and other calls are answered meanwhile."""
    keys = [f'"{i:04x}":1' for i in range(40_000)]
    repeated = "{" + ",".join([*keys, keys[20_000]]) + "}"
    assert 350_000 < len(repeated) < 370_000
    many = "[" + ",".join(["1"] * 300_000) + "]"
    nested = "[" * 20 + ",".join(["[]"] * 150_000) + "]" * 20
    cases = [
        ("/v1/customers", repeated, "stands twice"),
        ("/v1/customers", f'{{"name":"x","custom_fields":{repeated}}}', "stands twice"),
        ("/v1/ingest", f"[{event_of('many', repeated)}]", "stands twice"),
        (f"{ORG}/batchCreateUsageRecordGroups", f'[{{"entitlementID":"x","records":{repeated}}}]', "stands twice"),
        ("/v1/customers", f'{{"name":"x","ingest_aliases":{many}}}', "250,000 values"),
        ("/v1/events/search", f'{{"transactionIds":{many}}}', "250,000 values"),
        ("/v1/ingest", many, "250,000 values"),
        ("/v1/ingest", f"[{event_of('many', nested)}]", "250,000 values"),
        (f"{ORG}/batchCreateUsageRecordGroups", many, "250,000 values"),
        ("/v1/ingest", "[" + ",".join(["{}"] * 11_000) + "]", "must have 1..100"),
        (f"{ORG}/batchCreateUsageRecordGroups", "[" + ",".join(["{}"] * 11_000) + "]", "must have 1..1,000"),
    ]
    aliases = json.dumps([f"a{i}" for i in range(11_000)])
    cases += [
        ("/v1/customers", f'{{"name":"x","ingest_aliases":{aliases}}}', "ingest_aliases: "),
        ("/v1/events/search", f'{{"transactionIds":{aliases}}}', "transactionIds: "),
        (METRIC, f'{{"name":"x","event_type_filter":{{"in_values":{aliases}}}}}', "event_type_filter.in_values: "),
        (METRIC, f'{{"name":"x","property_filters":[{{"name":"x","in_values":{aliases}}}]}}', "in_values: "),
        (METRIC, f'{{"name":"x","custom_fields":{{{",".join(keys[:11_000])}}}}}', "custom_fields: "),
    ]
    over = asyncio.Event()
    slowest, answered = 0.0, 0

    async def others() -> None:
        nonlocal slowest, answered
        async with httpx.AsyncClient(base_url=http.base_url, timeout=30) as other:
            while not over.is_set():
                started = time.monotonic()
                assert (await other.get("/v1/customers")).status_code == 200
                slowest = max(slowest, time.monotonic() - started)
                answered += 1
                await asyncio.sleep(0.005)

    watch = asyncio.gather(*(others() for _ in range(3)))
    try:
        async with unchanged(database, http):
            for path, body, said in cases:
                started = time.monotonic()
                answer = await is_refused(http, "POST", path, 400, why=said, content=body)
                assert said in answer.text, (path, answer.text[:200])
                assert time.monotonic() - started < 2, (path, said)
            # Packed they are as large for whoever reads them.
            for path, body, said in cases:
                packed, headers = gzip.compress(body.encode(), 1), {"content-encoding": "gzip"}
                answer = await is_refused(http, "POST", path, 400, why=said, content=packed, headers=headers)
                assert said in answer.text, (path, answer.text[:200])
            await asyncio.gather(
                *(is_refused(http, "POST", path, 400, content=body) for path, body, _ in cases[:8] * 2)
            )
    finally:
        over.set()
    await watch
    assert answered > 20
    assert slowest < 2


# --- Web pages


async def test_what_a_web_page_could_send(
    client: Client, base_url: str, http: httpx.AsyncClient, database: Database
) -> None:
    """A body without a content type, which a page may send to any server unasked, is refused by every operation."""
    customer = await client.create_customer()
    metric = await client.create_metric(key="metric")
    await sell(client)
    bodies: dict[str, Any] = {
        "CreateCustomer": {"name": "x"}, "SetName": {"name": "x"}, "SetIngestAliases": {"ingest_aliases": ["x"]},
        "ArchiveCustomer": {"id": customer.id}, "IngestEvents": json.loads(f"[{event_of('e')}]"),
        "ReportUsageRecordGroup": {"records": {"cpu": 1}},
        "BatchCreateUsageRecordGroups": [{"entitlementID": "ent", "records": {"cpu": 1}}],
        "suger.v1.BillableMetricService.CreateBillableMetric": {"name": "name", "aggregationType": "COUNT"},
    }  # fmt: skip
    sent = {named(name).name: json.dumps(body).encode() for name, body in bodies.items()}
    values = {"org_id": "default", "customer_id": customer.id, "entitlement_id": "ent", "usage_record_group_id": "g"}
    async with httpx.AsyncClient(base_url=base_url, timeout=30) as page, untouched(database):
        for one in WITH_BODY:
            own = values | {"billable_metric_id": "metric" if "/org/" in one.template else metric.id}
            path = re.sub(r"\{(\w+)\}", lambda found, own=own: own[found[1]], one.template)
            content = sent.get(one.name, b"{}")
            answer = await is_refused(page, one.verb, path, 400, content=content)
            assert "content-type" in answer.text, one
            # As a page would do it without asking: these are the types that it may.
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
                await is_refused(page, one.verb, path, 415, 400, content=content, headers={"content-type": kind})
    assert (await http.post("/v1/customers", content=sent[named("CreateCustomer").name])).status_code == 200


async def test_foreign_names_for_this_machine(base_url: str) -> None:
    """On loopback a call must name this machine: another name in the host is 403, in JSON and in gRPC."""
    port = base_url.rpartition(":")[2]
    async with httpx.AsyncClient(base_url=base_url, timeout=30, headers=JSON) as http:
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example",
                     "10.0.0.1", f"192.168.1.1:{port}", "[::]", "[::2]", "localhostx", "xlocalhost", "*"):  # fmt: skip
            for verb, path in (("GET", "/v1/customers"), ("POST", "/v1/customers"), ("GET", f"{ORG}/entitlement"),
                               ("DELETE", f"{ORG}/usageRecordGroup/g")):  # fmt: skip
                body = {"json": {"name": "x"}} if verb == "POST" else {}
                answer = await is_refused(http, verb, path, 403, why=host, headers={"host": host}, **body)
                assert "localhost" in answer.text
        for host in (
            f"localhost:{port}",
            f"127.0.0.1:{port}",
            "localhost",
            "127.0.0.1",
            f"[::1]:{port}",
            "LOCALHOST",
            "localhost:1",
        ):
            assert (await http.get("/v1/customers", headers={"host": host})).json()["data"] == [], host
            assert (await http.get(f"{ORG}/entitlement", headers={"host": host})).json() == [], host
    async with httpx.AsyncClient(timeout=30) as http:
        assert (await http.get(f"http://localhost:{port}/v1/customers")).status_code == 200
    target = base_url.removeprefix("http://")
    async with grpc.aio.insecure_channel(target, options=[("grpc.default_authority", "evil.example")]) as channel:
        assert (await fault_of(Client("", channel).create_customer())).code == "PERMISSION_DENIED"
    async with grpc.aio.insecure_channel(target) as channel:
        listed = await Client("", channel).customers.ListCustomers(customer_pb2.ListCustomersRequest())
        assert not listed.customers


# --- The gateway's life


async def test_localhost_on_both_sides(client: Client) -> None:
    """`localhost` will do for where to listen and for where the server is, which may be on one address of it only."""
    needs_envoy()
    assert client.address.startswith("127.0.0.1:")
    port = client.address.rpartition(":")[2]
    async with gateway("localhost:0", f"localhost:{port}", drain_s=1) as front:
        assert re.fullmatch(r"(127\.0\.0\.1|\[::1\]):\d+", front.address)
        async with httpx.AsyncClient(timeout=20) as http:
            for host in (front.address, f"localhost:{front.address.rpartition(':')[2]}"):
                for _ in range(5):
                    assert (await http.get(f"http://{host}/v1/customers")).json()["data"] == []


async def test_a_gateway_that_does_not_answer_ends_all_the_same(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An Envoy that stands still is given some seconds and then ended; and one that cannot listen is told in words."""
    needs_envoy()
    started = time.monotonic()
    with pytest.raises(GatewayError) as caught:
        async with gateway("nowhere.invalid:0", client.address, drain_s=1):
            pass
    assert "nowhere.invalid" in str(caught.value)
    assert time.monotonic() - started < 15
    said = str(caught.value)
    assert not re.search(r"Traceback|\[critical\]|source/|\.cc:|proto", said), said
    # By itself it waits a little longer before it kills; that is a plain wait.
    monkeypatch.setattr("service.gateway._STOPS_WITHIN_S", 1)
    before = set(envoys(os.getpid()))
    async with gateway("127.0.0.1:0", client.address, drain_s=1):
        (envoy,) = set(envoys(os.getpid())) - before
        os.kill(envoy, signal.SIGSTOP)
        started = time.monotonic()
    assert time.monotonic() - started < 10
    assert set(envoys(os.getpid())) == before


async def test_streams_do_not_keep_calls_out(client: Client, base_url: str, http: httpx.AsyncClient) -> None:
    """While 1,100 streams stay open through the gateway, JSON calls and more streams are answered."""
    async with contextlib.AsyncExitStack() as stack:
        watches = []
        for number in range(3):
            # Each with a connection of its own: one takes a thousand streams.
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.primary_user_agent", f"test-{number}")]
            target = base_url.removeprefix("http://")
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(target, options=options))
            stub = health_pb2_grpc.HealthStub(channel)
            watches += [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(400 if number < 2 else 300)]
        assert len(watches) == 1100
        async with asyncio.timeout(30):
            states = await asyncio.gather(*(one.read() for one in watches))
        assert {one.status for one in states} == {health_pb2.HealthCheckResponse.SERVING}
        started = time.monotonic()
        for _ in range(5):
            assert (await done(http.get("/v1/customers")))["data"] == []
            assert await done(http.get(f"{ORG}/entitlement")) == []
        assert time.monotonic() - started < 5
        assert (await done(http.post("/v1/customers", json={"name": "Ada"})))["data"]["name"] == "Ada"
        answers = await asyncio.gather(*(http.get("/v1/customers") for _ in range(50)))
        assert {one.status_code for one in answers} == {200}
        assert not any(one.done() for one in watches)
        for one in watches:
            one.cancel()


# --- Keys of idempotency


async def test_one_key_for_many_operations(client: Client, http: httpx.AsyncClient) -> None:
    """The same Idempotency-Key on different operations makes different things; on the same one, the same thing."""
    for name in ("0", "1", "00"):
        await sell(client, name)
    calls: list[tuple[str, Any]] = [
        ("/v1/customers", {"name": "name"}),
        (METRIC, {"name": "name", "aggregation_type": "count"}),
        (f"{ORG}/billableMetric", {"name": "name", "aggregationType": "COUNT"}),
        *((f"{ORG}/entitlement/{name}/usageRecordGroup", {"records": {"cpu": len(name)}}) for name in ("0", "1", "00")),
        (f"{ORG}/batchCreateUsageRecordGroups", [
            {"entitlementID": "0", "records": {"cpu": 11}}, {"entitlementID": "1", "records": {"cpu": 12}},
        ]),
    ]  # fmt: skip
    for key in ("0", "key", str(uuid.uuid4()), '["', "x" * 255):
        headers = {"idempotency-key": key}

        async def ids(calls: list[tuple[str, Any]], headers: dict[str, str] = headers) -> list[str]:
            found = []
            for path, body in calls:
                document = await done(http.post(path, json=body, headers=headers))
                document = document.get("data", document) if isinstance(document, dict) else document
                found += [one["id"] for one in (document if isinstance(document, list) else [document])]
            return found

        first = await ids(calls)
        assert len(set(first)) == len(first) == 8, key
        assert await ids(list(reversed(calls))) == [*first[6:], *reversed(first[:6])]
        # The same operation with other content is another call's key.
        for path, body in calls:
            other: Any = [{**body[0], "records": {"cpu": 5}}, body[1]] if isinstance(body, list) else {**body}
            if isinstance(other, dict):
                other |= {"records": {"cpu": 99}} if "records" in other else {"name": "other"}
            await is_refused(http, "POST", path, 409, json=other, headers=headers)
    listed = (await done(http.get(f"{ORG}/usageRecordGroup")))["usageRecordGroups"]
    assert len(listed) == 5 * 5
    # Native and foreign metrics made so are all there, each once.
    names = (
        await client.metrics.ListBillableMetrics(billable_metric_pb2.ListBillableMetricsRequest())
    ).billable_metrics
    assert len([one for one in names if one.name == "name"]) == 2 * 5


async def test_a_body_takes_no_place_of_the_path(client: Client, http: httpx.AsyncClient, database: Database) -> None:
    """Calls that have no body refuse one, however it comes: its fields would name another customer, group or metric."""
    ours, theirs = [await client.create_customer(name=name) for name in ("ours", "theirs")]
    await sell(client, "ent")
    await reported(client, group("g1"), group("g2"))
    named_so = {"customer_id": theirs.id, "usage_record_group_id": "g2", "usageRecordGroupId": "g2", "ingest_alias": ""}
    paths = {"org_id": "default", "customer_id": ours.id, "entitlement_id": "ent", "usage_record_group_id": "g1"}
    bare = [one for one in OPERATIONS if not one.has_body]
    assert {one.verb for one in bare} == {"GET", "DELETE", "POST"}
    async with untouched(database):
        for one in bare:
            path = re.sub(r"\{(\w+)\}", lambda found: paths.get(found[1], "x"), one.template)
            await is_refused(http, one.verb, path, 400, why="plain", json=named_so)
            await is_refused(http, one.verb, path, 400, why="without a type", content=json.dumps(named_so))

            async def parts() -> AsyncIterator[bytes]:
                yield json.dumps(named_so).encode()

            await is_refused(http, one.verb, path, 400, why="in parts", content=parts(), headers=JSON)


async def test_gzip_of_very_many_parts(http: httpx.AsyncClient, database: Database) -> None:
    """Sixteen parts are read, 200,000 are refused at once: each would cost a copy of what follows."""
    headers = JSON | {"content-encoding": "gzip"}
    text = f"[{event_of('parts')}]".encode()
    parts = [text[i * len(text) // 16 : (i + 1) * len(text) // 16] for i in range(16)]
    async with untouched(database):
        started = time.monotonic()
        body = gzip.compress(b"", mtime=0) * 200_000
        await is_refused(http, "POST", "/v1/ingest", 400, why="parts", content=body[:4_000_000], headers=headers)
        assert time.monotonic() - started < 10
    whole = await http.post("/v1/ingest", content=b"".join(gzip.compress(part) for part in parts), headers=headers)
    assert whole.status_code == 200, whole.text


async def test_ids_in_upper_case_are_split_all_the_same(client: Client, http: httpx.AsyncClient) -> None:
    """A metric's id may be sent in upper case: its groups are there as well."""
    metric = await client.create_metric(group_keys=[billable_metric_pb2.GroupKey(properties=["r"])])
    await client.create_customer(ingest_aliases=["acme"])
    await client.ingest(event(properties={"r": "eu"}))
    for metric_id in (metric.id, metric.id.upper()):
        asked = DAY | {"billable_metrics": [{"id": metric_id, "group_by": {"key": "r"}}]}
        answer = await http.post("/v1/usage", json=asked | {"window_size": "none"})
        assert [row["groups"] for row in answer.json()["data"]] == [{"eu": 1}], answer.text


async def test_words_of_suger_in_lower_case(http: httpx.AsyncClient) -> None:
    """Kinds, operations and states of Suger's metrics may be in any letter case; EXISTS has no value."""
    condition = {"name": "os", "operation": "exists"}
    sent = {
        "id": "lower",
        "name": "lower",
        "aggregationType": "sum",
        "info": {"filterGroups": [{"filters": [condition]}]},
    }
    path = "/org/default/billableMetric"
    wrong = sent | {"info": {"filterGroups": [{"filters": [condition | {"value": {"value": False}}]}]}}
    assert "must be left out with EXISTS" in (await is_refused(http, "POST", path, 400, why="value", json=wrong)).text
    assert (await http.post(path, json=sent)).json()["aggregationType"] == "SUM"
    assert [one["id"] for one in (await http.get(f"{path}?status=active")).json()] == ["lower"]
    assert (await http.patch(f"{path}/lower", json={"status": "deleted"})).json()["status"] == "DELETED"


async def test_no_alias_is_dropped(http: httpx.AsyncClient) -> None:
    """An alias that cannot be one is refused, not left out; an external id that is an alias already stands once."""
    await is_refused(http, "POST", "/v1/customers", 400, why="empty", json={"name": "x", "ingest_aliases": ["", "al"]})
    made = await http.post("/v1/customers", json={"name": "x", "ingest_aliases": ["a", "b"], "external_id": "a"})
    assert sorted(made.json()["data"]["ingest_aliases"]) == ["a", "b"]


async def test_a_slow_gateway_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """While Envoy does not say how much is in flight, it is not taken for nothing."""
    running = Gateway(subprocess.Popen(["sleep", "30"]), tmp_path)  # noqa: ASYNC220  # gone before this ends
    answers = iter([None, b"", None, b"", None, b'{"stats": [{"value": 1}]}', None, b'{"stats": [{"value": 0}]}'])
    asked: list[str] = []

    async def ask(method: str, path: str) -> bytes | None:
        asked.append(f"{method} {path.partition('?')[0]}")
        return next(answers)

    monkeypatch.setattr(running, "_ask", ask)
    try:
        await running.drain(20)
    finally:
        running._process.kill()
        running._process.wait()
    assert asked == ["POST /drain_listeners"] * 4 + ["GET /stats"] * 4


async def test_messages_use_the_callers_names(client: Client, http: httpx.AsyncClient) -> None:
    """What an error advises is named as the API at hand has it, not as the native one."""
    answer = await is_refused(http, "GET", "/v1/customers?next_page=x", 400, why="page")
    assert "next_page" in answer.text
    assert "page_token" not in answer.text
    dates = "startDate=2026-03-02&endDate=2026-03-01"
    answer = await is_refused(http, "GET", f"{ORG}/usageRecordGroup?{dates}", 400, why="dates")
    assert answer.json() == "startDate: must not be later than endDate, which is 2026-03-01"


async def test_directories_of_killed_gateways_go(monkeypatch: pytest.MonkeyPatch, client: Client) -> None:
    """A start takes away what a killed owner left, and nothing of one that runs."""
    gone = subprocess.Popen(["true"])  # noqa: ASYNC220  # ends at once
    gone.wait()
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        monkeypatch.setattr(tempfile, "tempdir", place)
        for owner in (gone.pid, os.getppid(), "old"):
            os.mkdir(f"{place}/metering-gateway-{owner}-x")
        kept = {f"metering-gateway-{owner}-x" for owner in (os.getppid(), "old")}
        async with gateway("127.0.0.1:0", client.address, drain_s=1):
            (own,) = set(os.listdir(place)) - kept
            assert own.startswith(f"metering-gateway-{os.getpid()}-")
        assert set(os.listdir(place)) == kept


async def test_a_long_temporary_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, client: Client) -> None:
    """Where the path of a socket would be too long for the system, a shorter place is taken."""
    place = tmp_path / ("long" * 20)
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    async with gateway("127.0.0.1:0", client.address, drain_s=1) as running:
        assert running.address


async def test_a_patch_is_whole(client: Client, http: httpx.AsyncClient) -> None:
    """Of a PATCH that cannot do all of it nothing is done: a record metric keeps its name when it cannot be deleted."""
    await client.create_metric(key="calls", name="Calls")
    request = billable_metric_pb2.ListBillableMetricsRequest()
    listed = (await client.metrics.ListBillableMetrics(request)).billable_metrics
    (record,) = [one for one in listed if one.record_key == "calls"]
    path = f"{ORG}/billableMetric/{record.id}"
    sent = {"name": "other", "description": "other", "status": "DELETED"}
    await is_refused(http, "PATCH", path, 400, why="record metric", json=sent)
    asked = billable_metric_pb2.GetBillableMetricRequest(id=record.id)
    assert (await client.metrics.GetBillableMetric(asked)).billable_metric == record
    done = (await http.patch(f"{ORG}/billableMetric/calls", json=sent)).json()
    assert (done["name"], done["description"], done["status"]) == ("other", "other", "DELETED")


async def test_notes_beside_a_description_stay(client: Client, http: httpx.AsyncClient, database: Database) -> None:
    """A description is set beside the notes that others write at the same time."""
    metric = await client.create_metric(key="calls", name="Calls", custom_fields={"owner": "ada"})
    metric_id = uuid.UUID(metric.id)

    async def note(name: str) -> None:
        await database.write(
            "default", lambda c: metric_store.update_metric(c, "default", metric_id, more_custom_fields={name: name})
        )

    patch = http.patch(f"{ORG}/billableMetric/calls", json={"description": "what it is"})
    await asyncio.gather(*(note(f"n{i}") for i in range(8)), patch)
    found = (await client.metrics.GetBillableMetric(by_id(metric.id))).billable_metric
    assert dict(found.custom_fields) == {
        "owner": "ada",
        "description": "what it is",
        **{f"n{i}": f"n{i}" for i in range(8)},
    }


def by_id(metric_id: str) -> billable_metric_pb2.GetBillableMetricRequest:
    """Ask for a metric."""
    return billable_metric_pb2.GetBillableMetricRequest(id=metric_id)


async def test_notes_do_not_outgrow_a_metric(client: Client) -> None:
    """Custom fields that are changed count as much as those of a new metric: together at most 128 KiB."""
    words = [f"{i:04}{'x' * 1_000}" for i in range(100)]
    large = await client.create_metric(event_type_filter={"in_values": words})
    metric = billable_metric_pb2.BillableMetric(id=large.id, custom_fields={f"n{i}": "x" * 1_000 for i in range(60)})
    request = billable_metric_pb2.UpdateBillableMetricRequest(billable_metric=metric)
    request.update_mask.paths.append("custom_fields")
    fault = await fault_of(client.metrics.UpdateBillableMetric(request))
    assert fault.brief == ("INVALID_ARGUMENT", "LIMIT_EXCEEDED", "billable_metric")
    assert (await client.metrics.GetBillableMetric(by_id(large.id))).billable_metric == large


async def test_every_address_of_loopback_is_answered_by_its_own(client: Client) -> None:
    """A gateway on another address of loopback is called by that address too, and by no foreign name."""
    async with gateway("127.0.0.2:0", client.address, drain_s=1) as running, httpx.AsyncClient() as http:
        url = f"http://{running.address}/v1/customers"
        assert (await http.get(url)).status_code == 200
        assert (await http.get(url, headers={"host": "evil.example"})).status_code == 403
