"""Products and entitlements over the wire: creation, rules, states, record metrics, lists and races."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from conftest import Client, timestamp
from faults import fault_of, read_fault
from hypothesis import given
from hypothesis import strategies as st

from metering.v1 import billable_metric_pb2, customer_pb2, entitlement_pb2
from service.database import Database
from service.domain.entitlements import (
    STATUS_CHANGES_MAX,
    Dimension,
    Entitlement,
    EntitlementStatus,
    Product,
    StatusChange,
)
from service.domain.partners import Partner
from service.store import entitlements as store
from service.store.tables import billable_metrics, entitlement_carries

DAY = datetime(2026, 1, 1, tzinfo=UTC)
STATUSES = ("ACTIVE", "CANCELLED", "DELETED", "PENDING_CANCEL", "PENDING_START", "SUSPENDED")
# In byte order, which no language's order is.
IDS = ("B", "Z", "a", "a/b", "~", "ä", "\U0001f600")

WHOLE_PRODUCT: dict[str, Any] = {
    "name": "Warehouse",
    "partner": "PARTNER_AWS",
    "dimensions": [{"key": "hours", "name": "Compute hours"}, {"key": "bytes", "name": "bytes"}],
}
WHOLE_ENTITLEMENT: dict[str, Any] = {
    "name": "Acme's warehouse",
    "product_id": "warehouse",
    "buyer_id": "acme",
    "partner": "PARTNER_AWS",
    "status": "ENTITLEMENT_STATUS_PENDING_START",
    "starting_on": timestamp(DAY),
    "ending_before": timestamp(DAY + timedelta(days=365, microseconds=1)),
    "dimensions": [{"key": "users", "name": "Seats"}, {"key": "bytes", "name": "Traffic"}],
    "billable_metric_keys": ["traffic", "logins"],
}
# What creation needs at least.
SMALL: dict[str, Any] = {"product_id": "warehouse", "buyer_id": "acme", "starting_on": timestamp(DAY)}


# --- Short forms of the calls


async def create_product(client: Client, **fields: Any) -> entitlement_pb2.Product:
    """CreateProduct with just these fields."""
    request = entitlement_pb2.CreateProductRequest(product=fields)
    return (await client.entitlements.CreateProduct(request)).product


async def get_product(client: Client, product_id: str) -> entitlement_pb2.Product:
    """GetProduct."""
    return (await client.entitlements.GetProduct(entitlement_pb2.GetProductRequest(id=product_id))).product


async def update_product(client: Client, product_id: str, *paths: str, **fields: Any) -> entitlement_pb2.Product:
    """UpdateProduct."""
    request = entitlement_pb2.UpdateProductRequest(
        product={"id": product_id, **fields}, update_mask={"paths": paths} if paths else None
    )
    return (await client.entitlements.UpdateProduct(request)).product


async def create(client: Client, **fields: Any) -> entitlement_pb2.Entitlement:
    """CreateEntitlement with just these fields."""
    request = entitlement_pb2.CreateEntitlementRequest(entitlement=fields)
    return (await client.entitlements.CreateEntitlement(request)).entitlement


async def get(client: Client, entitlement_id: str) -> entitlement_pb2.Entitlement:
    """GetEntitlement."""
    request = entitlement_pb2.GetEntitlementRequest(id=entitlement_id)
    return (await client.entitlements.GetEntitlement(request)).entitlement


async def update(client: Client, entitlement_id: str, *paths: str, **fields: Any) -> entitlement_pb2.Entitlement:
    """UpdateEntitlement."""
    request = entitlement_pb2.UpdateEntitlementRequest(
        entitlement={"id": entitlement_id, **fields}, update_mask={"paths": paths} if paths else None
    )
    return (await client.entitlements.UpdateEntitlement(request)).entitlement


async def pages_of_products(client: Client, size: int) -> list[list[entitlement_pb2.Product]]:
    """All pages of ListProducts."""
    request, pages = entitlement_pb2.ListProductsRequest(page_size=size), []
    while not pages or request.page_token:
        response = await client.entitlements.ListProducts(request)
        pages.append(list(response.products))
        request.page_token = response.next_page_token
        assert len(pages) < 100
    return pages


async def pages_of_entitlements(client: Client, size: int, **filters: Any) -> list[list[entitlement_pb2.Entitlement]]:
    """All pages of ListEntitlements."""
    request, pages = entitlement_pb2.ListEntitlementsRequest(page_size=size, **filters), []
    while not pages or request.page_token:
        response = await client.entitlements.ListEntitlements(request)
        pages.append(list(response.entitlements))
        request.page_token = response.next_page_token
        assert len(pages) < 100
    return pages


async def listed(client: Client, **filters: Any) -> list[str]:
    """The ids of the first page of ListEntitlements."""
    response = await client.entitlements.ListEntitlements(entitlement_pb2.ListEntitlementsRequest(**filters))
    return [one.id for one in response.entitlements]


async def list_products(client: Client, **fields: Any) -> entitlement_pb2.ListProductsResponse:
    """ListProducts."""
    response: entitlement_pb2.ListProductsResponse = await client.entitlements.ListProducts(
        entitlement_pb2.ListProductsRequest(**fields)
    )
    return response


async def record_keys(client: Client) -> Counter[str]:
    """How many record metrics each key has."""
    request = billable_metric_pb2.ListBillableMetricsRequest(page_size=1000)
    metrics = (await client.metrics.ListBillableMetrics(request)).billable_metrics
    return Counter(metric.record_key for metric in metrics if metric.record_key)


async def rename_buyer(client: Client, customer_id: str, buyer_id: str) -> None:
    """Give a customer another buyer id."""
    request = customer_pb2.UpdateCustomerRequest(customer={"id": customer_id, "buyer_id": buyer_id})
    await client.customers.UpdateCustomer(request)


async def refusals(cases: dict[str, Awaitable[Any]]) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Make calls that must fail, one after the other; returns (code, reason, fields) of each by its name."""
    found = {}
    for name, call in cases.items():
        try:
            await call
        except grpc.aio.AioRpcError as error:
            fault = read_fault(error)
            found[name] = (fault.code, fault.reason, fault.fields)
        else:
            found[name] = ("OK", "", ())
    return found


def bad(reason: str, *fields: str) -> tuple[str, str, tuple[str, ...]]:
    """An INVALID_ARGUMENT, by its first reason and all its fields."""
    return "INVALID_ARGUMENT", reason, fields


async def outcomes(calls: Sequence[Awaitable[Any]]) -> Counter[str]:
    """Make all calls at once; returns how many ended with each reason, "OK" for success."""
    found: Counter[str] = Counter()
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, grpc.aio.AioRpcError):
            found[read_fault(result).reason] += 1
        elif isinstance(result, BaseException):
            raise result
        else:
            found["OK"] += 1
    return found


def states(entitlement: entitlement_pb2.Entitlement) -> list[str]:
    """The states that an entitlement was in."""
    names = [entitlement_pb2.EntitlementStatus.Name(change.status) for change in entitlement.status_changes]
    return [name.removeprefix("ENTITLEMENT_STATUS_") for name in names]


@pytest.fixture
async def shop(client: Client) -> Client:
    """A client of a server with a product, a buyer and two billable metrics."""
    await create_product(client, id="warehouse", **WHOLE_PRODUCT)
    await client.create_customer(buyer_id="acme")
    for key in ("traffic", "logins"):
        await client.create_metric(key=key)
    return client


# --- Products


async def test_a_product_is_kept_as_it_was_sent(client: Client) -> None:
    """Every field comes back from creation, by id and in the list as it was sent; the server adds only the times."""
    made = await create_product(client, id="warehouse", **WHOLE_PRODUCT, create_time=timestamp(DAY))
    assert made.create_time == made.update_time
    assert made.create_time != timestamp(DAY)
    times = {"create_time": made.create_time, "update_time": made.update_time}
    assert made == entitlement_pb2.Product(id="warehouse", **WHOLE_PRODUCT, **times)
    assert await get_product(client, "warehouse") == made
    assert await pages_of_products(client, 0) == [[made]]


async def test_a_dimension_without_a_name_is_called_by_its_key(client: Client) -> None:
    """An empty name is the key, so that sending the one or the other is the same content."""
    made = await create_product(client, id="p", name="P", partner="PARTNER_GCP", dimensions=[{"key": "hours"}])
    assert list(made.dimensions) == [entitlement_pb2.Dimension(key="hours", name="hours")]
    named = [{"key": "hours", "name": "hours"}]
    assert await create_product(client, id="p", name="P", partner="PARTNER_GCP", dimensions=named) == made
    assert await update_product(client, "p", dimensions=[{"key": "hours"}]) == made


async def test_creating_a_product_again_is_a_success(client: Client) -> None:
    """The same id with the same content, in any order of dimensions, answers with the product as it is by now."""
    made = await create_product(client, id="warehouse", **WHOLE_PRODUCT)
    reordered = {**WHOLE_PRODUCT, "dimensions": WHOLE_PRODUCT["dimensions"][::-1]}
    assert await create_product(client, id="warehouse", **reordered) == made
    changed = await update_product(client, "warehouse", name="Lake", dimensions=[{"key": "users"}])
    assert await create_product(client, id="warehouse", **WHOLE_PRODUCT) == changed
    fault = await fault_of(create_product(client, id="warehouse", **{**WHOLE_PRODUCT, "name": "Lake"}))
    assert (fault.code, fault.reason) == ("ALREADY_EXISTS", "ID_IN_USE")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Lake"},
        {"partner": "PARTNER_AZURE"},
        {"dimensions": []},
        {"dimensions": WHOLE_PRODUCT["dimensions"][:1]},
        {"dimensions": [{"key": "hours", "name": "Hours"}, {"key": "bytes"}]},
    ],
    ids=["name", "partner", "no dimensions", "fewer dimensions", "dimension name"],
)
async def test_a_product_id_stands_for_one_content(client: Client, change: dict[str, Any]) -> None:
    """The same id with another content is ID_IN_USE, in any field, and changes nothing."""
    made = await create_product(client, id="warehouse", **WHOLE_PRODUCT)
    fault = await fault_of(create_product(client, id="warehouse", **{**WHOLE_PRODUCT, **change}))
    assert (fault.code, fault.reason, fault.metadata) == ("ALREADY_EXISTS", "ID_IN_USE", {"id": "warehouse"})
    assert await get_product(client, "warehouse") == made


async def test_product_rules(client: Client) -> None:
    """Each rule of a product refuses what breaks it, naming the field; several faults are all named."""
    good = {"id": "p", "name": "P", "partner": "PARTNER_AWS"}
    path = "product.dimensions"
    many = [{"key": str(i)} for i in range(201)]
    table: dict[str, tuple[dict[str, Any], tuple[str, str, tuple[str, ...]]]] = {
        "nothing": ({}, bad("FIELD_REQUIRED", "product.partner", "product.id", "product.name")),
        "no id": ({**good, "id": ""}, bad("FIELD_REQUIRED", "product.id")),
        "long id": ({**good, "id": "i" * 37}, bad("LIMIT_EXCEEDED", "product.id")),
        "blank id": ({**good, "id": " "}, bad("FIELD_INVALID", "product.id")),
        "id with NUL": ({**good, "id": "a\0"}, bad("FIELD_INVALID", "product.id")),
        "no name": ({**good, "name": ""}, bad("FIELD_REQUIRED", "product.name")),
        "long name": ({**good, "name": "n" * 161}, bad("LIMIT_EXCEEDED", "product.name")),
        "name with newline": ({**good, "name": "a\nb"}, bad("FIELD_INVALID", "product.name")),
        "no partner": ({**good, "partner": 0}, bad("FIELD_REQUIRED", "product.partner")),
        "unknown partner": ({**good, "partner": 4}, bad("FIELD_INVALID", "product.partner")),
        "201 dimensions": ({**good, "dimensions": many}, bad("LIMIT_EXCEEDED", path)),
        "dimension without key": ({**good, "dimensions": [{"name": "N"}]}, bad("FIELD_REQUIRED", f"{path}[0].key")),
        "no key and a long one": (
            {**good, "dimensions": [{}, {"key": "k" * 129}]},
            bad("FIELD_REQUIRED", f"{path}[0].key", f"{path}[1].key"),
        ),
        "long key": ({**good, "dimensions": [{"key": "k" * 129}]}, bad("LIMIT_EXCEEDED", f"{path}[0].key")),
        "long dimension name": (
            {**good, "dimensions": [{"key": "k", "name": "n" * 129}]},
            bad("LIMIT_EXCEEDED", f"{path}[0].name"),
        ),
        "blank dimension name": (
            {**good, "dimensions": [{"key": "k", "name": " "}]},
            bad("FIELD_INVALID", f"{path}[0].name"),
        ),
        "key twice": (
            {**good, "dimensions": [{"key": "k"}, {"key": "l"}, {"key": "k", "name": "N"}]},
            bad("DUPLICATE_ITEM", f"{path}[2].key"),
        ),
        "all at once": (
            {"id": "\0", "partner": 99, "dimensions": [{"key": "\0", "name": "\n"}]},
            bad("FIELD_INVALID", "product.partner", "product.id", "product.name", f"{path}[0].key", f"{path}[0].name"),
        ),
    }
    found = await refusals({name: create_product(client, **fields) for name, (fields, _) in table.items()})
    assert found == {name: expected for name, (_, expected) in table.items()}
    assert await pages_of_products(client, 0) == [[]]
    assert await record_keys(client) == {}


async def test_product_limits_are_inclusive(client: Client) -> None:
    """What is just within every limit is taken and comes back whole."""
    dimensions = [{"key": f"{i:ä>128}", "name": f"{i:é>128}"} for i in range(200)]
    fields = {"id": "é" * 36, "name": "é" * 160, "partner": "PARTNER_AZURE", "dimensions": dimensions}
    made = await create_product(client, **fields)
    times = {"create_time": made.create_time, "update_time": made.update_time}
    assert await get_product(client, "é" * 36) == entitlement_pb2.Product(**fields, **times)
    assert await record_keys(client) == {one["key"]: 1 for one in dimensions}


async def test_products_are_updated_by_mask(client: Client) -> None:
    """Masked fields change, an empty mask means those that are set; the update time moves with real changes only."""
    made = await create_product(client, id="p", **WHOLE_PRODUCT)
    renamed = await update_product(client, "p", name="Lake", partner="PARTNER_GCP")
    assert (renamed.name, renamed.partner, renamed.dimensions) == ("Lake", made.partner, made.dimensions)
    assert renamed.create_time == made.create_time
    assert renamed.update_time.ToNanoseconds() > made.update_time.ToNanoseconds()
    for same in ({"name": "Lake"}, {"name": "Lake", "dimensions": made.dimensions}):
        assert await update_product(client, "p", **same) == renamed
    masked = await update_product(client, "p", "dimensions", name="ignored")
    assert (masked.name, list(masked.dimensions)) == ("Lake", [])
    assert masked.update_time.ToNanoseconds() > renamed.update_time.ToNanoseconds()
    both = await update_product(client, "p", "dimensions", "name", name="Pond", dimensions=[{"key": "k"}])
    assert (both.name, [one.key for one in both.dimensions]) == ("Pond", ["k"])
    assert await get_product(client, "p") == both


async def test_product_update_rules(client: Client) -> None:
    """An update that names nothing, something else or bad values is refused, and changes nothing."""
    made = await create_product(client, id="p", **WHOLE_PRODUCT)
    found = await refusals(
        {
            "nothing": update_product(client, "p"),
            "nothing known": update_product(client, "p", partner="PARTNER_GCP"),
            "partner": update_product(client, "p", "name", "partner", name="N", partner="PARTNER_GCP"),
            "everything": update_product(client, "p", "*", name="N"),
            "no name": update_product(client, "p", "name"),
            "bad dimensions": update_product(client, "p", dimensions=[{"key": "k"}, {"key": "k"}]),
            "bad all over": update_product(client, "", "name", "dimensions", dimensions=[{}]),
            "no id": update_product(client, "", name="N"),
            "no such product": update_product(client, "P", name="N"),
        }
    )
    assert found == {
        "nothing": bad("FIELD_REQUIRED", "update_mask"),
        "nothing known": bad("FIELD_REQUIRED", "update_mask"),
        "partner": bad("FIELD_INVALID", "update_mask"),
        "everything": bad("FIELD_INVALID", "update_mask"),
        "no name": bad("FIELD_REQUIRED", "product.name"),
        "bad dimensions": bad("DUPLICATE_ITEM", "product.dimensions[1].key"),
        "bad all over": bad("FIELD_REQUIRED", "product.id", "product.name", "product.dimensions[0].key"),
        "no id": bad("FIELD_REQUIRED", "product.id"),
        "no such product": ("NOT_FOUND", "PRODUCT_NOT_FOUND", ()),
    }
    assert await get_product(client, "p") == made


@pytest.mark.parametrize(
    ("call", "reason"),
    [(get_product, "PRODUCT_NOT_FOUND"), (get, "ENTITLEMENT_NOT_FOUND")],
    ids=["product", "entitlement"],
)
async def test_ids_are_checked(client: Client, call: Callable[[Client, str], Awaitable[Any]], reason: str) -> None:
    """A missing or malformed id is refused by its path; one that nothing has is NOT_FOUND and named."""
    assert (await fault_of(call(client, ""))).brief == ("INVALID_ARGUMENT", "FIELD_REQUIRED", "id")
    assert (await fault_of(call(client, "i" * 37))).brief == ("INVALID_ARGUMENT", "LIMIT_EXCEEDED", "id")
    assert (await fault_of(call(client, "a\nb"))).brief == ("INVALID_ARGUMENT", "FIELD_INVALID", "id")
    fault = await fault_of(call(client, "nowhere"))
    assert (fault.code, fault.reason, fault.metadata) == ("NOT_FOUND", reason, {"id": "nowhere"})


async def test_products_are_listed_in_byte_order_at_every_page_size(client: Client) -> None:
    """Pages of any size put together are all products, in the byte order of their ids, without an empty last page."""
    for one in reversed(IDS):
        await create_product(client, id=one, **WHOLE_PRODUCT)
    (whole,) = await pages_of_products(client, 0)
    assert [one.id for one in whole] == list(IDS)
    for size in range(1, len(IDS) + 2):
        pages = await pages_of_products(client, size)
        assert [one for page in pages for one in page] == whole
        assert [len(page) for page in pages[:-1]] == [size] * (len(pages) - 1)
        assert pages[-1]
    token = (await list_products(client, page_size=1)).next_page_token
    other, garbage = entitlement_pb2.ListEntitlementsRequest(page_token=token), "garbage"
    found = await refusals(
        {
            "negative size": list_products(client, page_size=-1),
            "garbage": list_products(client, page_token=garbage),
            "token of another list": client.entitlements.ListEntitlements(other),
        }
    )
    assert found == {
        "negative size": bad("FIELD_INVALID", "page_size"),
        "garbage": bad("PAGE_TOKEN_INVALID", "page_token"),
        "token of another list": bad("PAGE_TOKEN_INVALID", "page_token"),
    }


# --- Entitlements


async def test_an_entitlement_is_kept_as_it_was_sent(shop: Client) -> None:
    """Every field comes back from creation, by id and in the list as it was sent; the server adds times and state."""
    ignored = {"create_time": timestamp(DAY), "carried_quantities": {"users": "1"}}
    made = await create(shop, id="e", **WHOLE_ENTITLEMENT, **ignored)
    assert made.create_time == made.update_time == made.status_changes[0].since
    added = {name: getattr(made, name) for name in ("create_time", "update_time", "status_changes")}
    assert made == entitlement_pb2.Entitlement(id="e", **WHOLE_ENTITLEMENT, **added)
    assert states(made) == ["PENDING_START"]
    assert await get(shop, "e") == made
    assert await pages_of_entitlements(shop, 0) == [[made]]


async def test_what_is_left_out_is_the_products(shop: Client) -> None:
    """Partner and dimensions come from the product at creation, the state is ACTIVE, and there is no end."""
    made = await create(shop, id="e", **SMALL)
    product = await get_product(shop, "warehouse")
    assert (made.name, made.partner, made.dimensions) == ("", entitlement_pb2.PARTNER_AWS, product.dimensions)
    assert made.status == entitlement_pb2.ENTITLEMENT_STATUS_ACTIVE
    assert not made.HasField("ending_before")
    assert not made.billable_metric_keys
    await update_product(shop, "warehouse", dimensions=[{"key": "users"}])
    assert await get(shop, "e") == made
    assert [one.key for one in (await create(shop, id="later", **SMALL)).dimensions] == ["users"]


async def test_creating_an_entitlement_again_is_a_success(shop: Client) -> None:
    """The same content, in any order of what is a set, answers with the entitlement as it is by now."""
    made = await create(shop, id="e", **WHOLE_ENTITLEMENT)
    reordered = {name: WHOLE_ENTITLEMENT[name][::-1] for name in ("dimensions", "billable_metric_keys")}
    assert await create(shop, id="e", **{**WHOLE_ENTITLEMENT, **reordered}) == made
    changed = await update(shop, "e", name="Other", status="ENTITLEMENT_STATUS_ACTIVE")
    assert await create(shop, id="e", **WHOLE_ENTITLEMENT) == changed


async def test_a_retried_creation_succeeds_whatever_changed_since(shop: Client) -> None:
    """A creation that is stored is known by its content: also once its buyer and product are no longer as they were."""
    await create(shop, id="e", **SMALL)
    (customer,) = (await shop.customers.ListCustomers(customer_pb2.ListCustomersRequest())).customers
    await rename_buyer(shop, customer.id, "acme-2")
    await update_product(shop, "warehouse", dimensions=[{"key": "users"}])
    again = await create(shop, id="e", **SMALL)
    assert (again.buyer_id, [one.key for one in again.dimensions]) == ("acme-2", ["hours", "bytes"])
    fault = await fault_of(create(shop, id="new", **SMALL))
    assert (fault.code, fault.reason, fault.metadata) == ("NOT_FOUND", "BUYER_NOT_FOUND", {"buyer_id": "acme"})
    # Another customer takes the name: what is stored stays with the first one.
    await shop.create_customer(buyer_id="acme")
    assert await create(shop, id="e", **SMALL) == again
    assert (await create(shop, id="new", **SMALL)).buyer_id == "acme"
    # The content is what was sent, even if it means the same by now.
    assert (await fault_of(create(shop, id="e", **{**SMALL, "buyer_id": "acme-2"}))).reason == "ID_IN_USE"


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"product_id": "lake"},
        {"product_id": "nowhere"},
        {"buyer_id": "other"},
        {"buyer_id": "nowhere"},
        {"partner": 0},
        {"partner": "PARTNER_GCP"},
        {"status": 0},
        {"starting_on": timestamp(DAY + timedelta(microseconds=1))},
        {"ending_before": None},
        {"ending_before": timestamp(DAY + timedelta(days=365))},
        {"dimensions": []},
        {"dimensions": [{"key": "users"}, {"key": "bytes", "name": "Traffic"}]},
        {"billable_metric_keys": ["traffic"]},
        {"billable_metric_keys": ["traffic", "nowhere"]},
    ],
    ids=str,
)
async def test_an_entitlement_id_stands_for_one_content(shop: Client, change: dict[str, Any]) -> None:
    """The same id with another content is ID_IN_USE, in any field, even an impossible one, and changes nothing."""
    await create_product(shop, id="lake", **WHOLE_PRODUCT)
    await shop.create_customer(buyer_id="other")
    made, keys = await create(shop, id="e", **WHOLE_ENTITLEMENT), await record_keys(shop)
    fault = await fault_of(create(shop, id="e", **{**WHOLE_ENTITLEMENT, **change}))
    assert (fault.code, fault.reason, fault.metadata) == ("ALREADY_EXISTS", "ID_IN_USE", {"id": "e"})
    assert await get(shop, "e") == made
    assert await record_keys(shop) == keys


async def test_entitlement_rules(shop: Client) -> None:
    """Each rule of an entitlement refuses what breaks it, naming the field; several faults are all named."""
    good = {"id": "e", **SMALL}
    dimensions, keys = "entitlement.dimensions", "entitlement.billable_metric_keys"
    keys_before = await record_keys(shop)
    table: dict[str, tuple[dict[str, Any], tuple[str, str, tuple[str, ...]]]] = {
        "nothing": (
            {},
            bad(
                "FIELD_REQUIRED",
                "entitlement.starting_on",
                "entitlement.id",
                "entitlement.product_id",
                "entitlement.buyer_id",
            ),
        ),
        "long id": ({**good, "id": "i" * 37}, bad("LIMIT_EXCEEDED", "entitlement.id")),
        "id with NUL": ({**good, "id": "\0"}, bad("FIELD_INVALID", "entitlement.id")),
        "long name": ({**good, "name": "n" * 161}, bad("LIMIT_EXCEEDED", "entitlement.name")),
        "blank name": ({**good, "name": " "}, bad("FIELD_INVALID", "entitlement.name")),
        "no product": ({**good, "product_id": ""}, bad("FIELD_REQUIRED", "entitlement.product_id")),
        "long product": ({**good, "product_id": "p" * 37}, bad("LIMIT_EXCEEDED", "entitlement.product_id")),
        "no buyer": ({**good, "buyer_id": ""}, bad("FIELD_REQUIRED", "entitlement.buyer_id")),
        "long buyer": ({**good, "buyer_id": "b" * 37}, bad("LIMIT_EXCEEDED", "entitlement.buyer_id")),
        "unknown partner": ({**good, "partner": 4}, bad("FIELD_INVALID", "entitlement.partner")),
        "another partner": ({**good, "partner": "PARTNER_GCP"}, bad("FIELD_INVALID", "entitlement.partner")),
        "unknown status": ({**good, "status": 7}, bad("FIELD_INVALID", "entitlement.status")),
        "no start": ({**good, "starting_on": None}, bad("FIELD_REQUIRED", "entitlement.starting_on")),
        "start out of range": (
            {**good, "starting_on": {"seconds": 10**12}},
            bad("WINDOW_RANGE", "entitlement.starting_on"),
        ),
        "bad nanos": ({**good, "starting_on": {"nanos": -1}}, bad("WINDOW_RANGE", "entitlement.starting_on")),
        "end out of range": (
            {**good, "ending_before": {"seconds": 10**12}},
            bad("WINDOW_RANGE", "entitlement.ending_before"),
        ),
        "end at the start": (
            {**good, "ending_before": timestamp(DAY)},
            bad("FIELD_INVALID", "entitlement.ending_before"),
        ),
        "end before a bad start": (
            {**good, "starting_on": {"seconds": 10**12}, "ending_before": timestamp(DAY)},
            bad("WINDOW_RANGE", "entitlement.starting_on"),
        ),
        "201 dimensions": (
            {**good, "dimensions": [{"key": str(i)} for i in range(201)]},
            bad("LIMIT_EXCEEDED", dimensions),
        ),
        "dimension without key": ({**good, "dimensions": [{}]}, bad("FIELD_REQUIRED", f"{dimensions}[0].key")),
        "key twice": (
            {**good, "dimensions": [{"key": "k"}, {"key": "k"}]},
            bad("DUPLICATE_ITEM", f"{dimensions}[1].key"),
        ),
        "201 metric keys": (
            {**good, "billable_metric_keys": [str(i) for i in range(201)]},
            bad("LIMIT_EXCEEDED", keys),
        ),
        "empty metric key": ({**good, "billable_metric_keys": [""]}, bad("FIELD_REQUIRED", f"{keys}[0]")),
        "metric key twice": (
            {**good, "billable_metric_keys": ["traffic", "logins", "traffic"]},
            bad("DUPLICATE_ITEM", f"{keys}[2]"),
        ),
        "keys of no metric": (
            {**good, "billable_metric_keys": ["Traffic", "traffic", "hours"]},
            bad("BILLABLE_METRIC_KEY_INVALID", f"{keys}[0]", f"{keys}[2]"),
        ),
        "partner and keys": (
            {**good, "partner": "PARTNER_AZURE", "billable_metric_keys": ["x"], "dimensions": [{"key": "new"}]},
            bad("FIELD_INVALID", "entitlement.partner", f"{keys}[0]"),
        ),
        "no such product": (
            {**good, "product_id": "Warehouse", "dimensions": [{"key": "new"}]},
            ("NOT_FOUND", "PRODUCT_NOT_FOUND", ()),
        ),
        "no such buyer": ({**good, "buyer_id": "Acme"}, ("NOT_FOUND", "BUYER_NOT_FOUND", ())),
        "all at once": (
            {
                "id": "\0",
                "name": "\n",
                "partner": 9,
                "status": 9,
                "starting_on": timestamp(DAY),
                "ending_before": timestamp(DAY),
                "dimensions": [{"key": "\0"}],
                "billable_metric_keys": [" "],
            },
            bad(
                "FIELD_INVALID",
                *(f"entitlement.{name}" for name in ("partner", "status", "id", "name", "product_id", "buyer_id")),
                f"{dimensions}[0].key",
                f"{keys}[0]",
                "entitlement.ending_before",
            ),
        ),
    }
    found = await refusals({name: create(shop, **fields) for name, (fields, _) in table.items()})
    assert found == {name: expected for name, (_, expected) in table.items()}
    assert await listed(shop) == []
    assert await record_keys(shop) == keys_before
    product = await fault_of(create(shop, **{**good, "product_id": "nowhere"}))
    buyer = await fault_of(create(shop, **{**good, "buyer_id": "nowhere"}))
    assert (product.metadata, buyer.metadata) == ({"id": "nowhere"}, {"buyer_id": "nowhere"})


async def test_entitlement_limits_are_inclusive(shop: Client) -> None:
    """What is just within every limit is taken and comes back whole."""
    await create_product(shop, id="p" * 36, **WHOLE_PRODUCT)
    await shop.create_customer(buyer_id="b" * 36)
    fields: dict[str, Any] = {
        "id": "é" * 36,
        "name": "é" * 160,
        "product_id": "p" * 36,
        "buyer_id": "b" * 36,
        "status": "ENTITLEMENT_STATUS_DELETED",
        "starting_on": timestamp(DAY),
        "ending_before": timestamp(DAY + timedelta(microseconds=1)),
        "dimensions": [{"key": f"{i:k>128}", "name": f"{i:é>128}"} for i in range(200)],
    }
    made = await create(shop, **fields)
    added = {name: getattr(made, name) for name in ("create_time", "update_time", "status_changes", "partner")}
    assert await get(shop, "é" * 36) == entitlement_pb2.Entitlement(**fields, **added)


async def test_metrics_may_be_metered_by_after_they_are_archived(shop: Client) -> None:
    """Keys of archived metrics are taken, at creation and by an update."""
    metric = await shop.create_metric(key="old")
    await shop.metrics.ArchiveBillableMetric(billable_metric_pb2.ArchiveBillableMetricRequest(id=metric.id))
    assert (await create(shop, id="e", **SMALL, billable_metric_keys=["old"])).billable_metric_keys == ["old"]
    keys = ["logins", "old"]
    assert (await update(shop, "e", billable_metric_keys=keys)).billable_metric_keys == keys


async def test_entitlements_are_updated_by_mask(shop: Client) -> None:
    """Masked fields change, an empty mask means those that are set, and what cannot change is left as it is."""
    made = await create(shop, id="e", **WHOLE_ENTITLEMENT)
    later = timestamp(DAY + timedelta(days=7))
    fixed = {"product_id": "x", "buyer_id": "x", "partner": "PARTNER_GCP", "starting_on": later}
    renamed = await update(shop, "e", name="N", **fixed)
    expected = entitlement_pb2.Entitlement()
    expected.CopyFrom(made)
    expected.name = "N"
    expected.update_time.CopyFrom(renamed.update_time)
    assert renamed == expected
    assert renamed.update_time.ToNanoseconds() > made.update_time.ToNanoseconds()
    moved = await update(shop, "e", ending_before=later, dimensions=[{"key": "k"}], billable_metric_keys=["logins"])
    assert (moved.name, moved.ending_before, [one.key for one in moved.dimensions]) == ("N", later, ["k"])
    assert moved.billable_metric_keys == ["logins"]
    assert moved.status == made.status
    masked = ("name", "ending_before", "dimensions", "billable_metric_keys")
    cleared = await update(shop, "e", *masked)
    assert (cleared.name, list(cleared.dimensions), list(cleared.billable_metric_keys)) == ("", [], [])
    assert not cleared.HasField("ending_before")
    assert await get(shop, "e") == cleared


async def test_an_update_that_changes_nothing_leaves_the_time(shop: Client) -> None:
    """The same values again, a state it has already among them, are a success without a trace."""
    made = await create(shop, id="e", **WHOLE_ENTITLEMENT)
    changing = ("name", "status", "ending_before", "dimensions", "billable_metric_keys")
    same = {name: WHOLE_ENTITLEMENT[name] for name in changing}
    assert await update(shop, "e", **same) == made
    assert await update(shop, "e", *changing, **same) == made
    for status in STATUSES:
        one = await create(shop, id=status, **SMALL, status=f"ENTITLEMENT_STATUS_{status}")
        assert await update(shop, status, "status", status=f"ENTITLEMENT_STATUS_{status}") == one


async def test_entitlement_update_rules(shop: Client) -> None:
    """An update that names nothing, something else or bad values is refused, and changes nothing."""
    made, keys_before = await create(shop, id="e", **WHOLE_ENTITLEMENT), await record_keys(shop)
    dimensions, keys = "entitlement.dimensions", "entitlement.billable_metric_keys"
    table: dict[str, tuple[Awaitable[Any], tuple[str, str, tuple[str, ...]]]] = {
        "nothing": (update(shop, "e"), bad("FIELD_REQUIRED", "update_mask")),
        "nothing known": (update(shop, "e", buyer_id="x"), bad("FIELD_REQUIRED", "update_mask")),
        "buyer": (update(shop, "e", "name", "buyer_id", buyer_id="x"), bad("FIELD_INVALID", "update_mask")),
        "start": (update(shop, "e", "starting_on"), bad("FIELD_INVALID", "update_mask")),
        "no status": (update(shop, "e", "status"), bad("FIELD_REQUIRED", "entitlement.status")),
        "unknown status": (update(shop, "e", status=7), bad("FIELD_INVALID", "entitlement.status")),
        "long name": (update(shop, "e", name="n" * 161), bad("LIMIT_EXCEEDED", "entitlement.name")),
        "end at the start": (
            update(shop, "e", ending_before=timestamp(DAY)),
            bad("FIELD_INVALID", "entitlement.ending_before"),
        ),
        "end out of range": (
            update(shop, "e", ending_before={"seconds": -(10**12)}),
            bad("WINDOW_RANGE", "entitlement.ending_before"),
        ),
        "dimension twice": (
            update(shop, "e", dimensions=[{"key": "k"}, {"key": "k"}]),
            bad("DUPLICATE_ITEM", f"{dimensions}[1].key"),
        ),
        "201 metric keys": (
            update(shop, "e", billable_metric_keys=[str(i) for i in range(201)]),
            bad("LIMIT_EXCEEDED", keys),
        ),
        "keys of no metric, and the end": (
            update(
                shop,
                "e",
                billable_metric_keys=["logins", "x"],
                dimensions=[{"key": "new"}],
                ending_before=timestamp(DAY - timedelta(days=1)),
            ),
            bad("FIELD_INVALID", "entitlement.ending_before", f"{keys}[1]"),
        ),
        "bad all over": (
            update(shop, "", "status", "dimensions", name="ignored\0", dimensions=[{}]),
            bad("FIELD_REQUIRED", "entitlement.id", f"{dimensions}[0].key", "entitlement.status"),
        ),
        "no such entitlement": (
            update(shop, "E", status="ENTITLEMENT_STATUS_ACTIVE"),
            ("NOT_FOUND", "ENTITLEMENT_NOT_FOUND", ()),
        ),
    }
    found = await refusals({name: call for name, (call, _) in table.items()})
    assert found == {name: expected for name, (_, expected) in table.items()}
    assert await get(shop, "e") == made
    assert await record_keys(shop) == keys_before


# --- States

# As the contract says it: what may follow each state.
FOLLOWERS = {
    "PENDING_START": {"ACTIVE", "CANCELLED", "DELETED"},
    "ACTIVE": {"SUSPENDED", "PENDING_CANCEL", "CANCELLED", "DELETED"},
    "SUSPENDED": {"PENDING_CANCEL", "ACTIVE", "CANCELLED", "DELETED"},
    "PENDING_CANCEL": {"SUSPENDED", "ACTIVE", "CANCELLED", "DELETED"},
    "CANCELLED": {"DELETED"},
    "DELETED": set(),
}


async def test_every_change_of_state_is_allowed_or_refused(shop: Client) -> None:
    """Of the 36 pairs of states those of the contract follow, a state may stay as it is, and all else is refused."""
    for old, new in itertools.product(STATUSES, STATUSES):
        made = await create(shop, id=f"{old} {new}", **SMALL, status=f"ENTITLEMENT_STATUS_{old}")
        call = update(shop, made.id, name="Changed", status=f"ENTITLEMENT_STATUS_{new}")
        if new != old and new not in FOLLOWERS[old]:
            fault = await fault_of(call)
            assert (fault.code, fault.reason) == ("FAILED_PRECONDITION", "STATUS_TRANSITION"), (old, new)
            assert fault.metadata == {"id": made.id, "status": old}
            named = {word.strip(",.") for word in fault.text.partition("followed by")[2].partition("not by")[0].split()}
            assert named == (FOLLOWERS[old] or {"nothing"})
            assert await get(shop, made.id) == made
            continue
        changed = await call
        assert changed.status == entitlement_pb2.EntitlementStatus.Value(f"ENTITLEMENT_STATUS_{new}")
        assert changed.name == "Changed"
        assert states(changed) == ([old] if old == new else [old, new])
        assert await get(shop, made.id) == changed


async def test_states_are_kept_with_their_times(shop: Client, database: Database) -> None:
    """Every state is shown with the time it began, and usage of any time finds the one that it fell in."""
    began = datetime.now(UTC)
    made = await create(shop, id="e", **SMALL)
    order = ["ACTIVE", "SUSPENDED", "PENDING_CANCEL", "CANCELLED", "DELETED"]
    for status in order[1:]:
        await update(shop, "e", status=f"ENTITLEMENT_STATUS_{status}")
    found = await get(shop, "e")
    assert states(found) == order
    times = [change.since.ToDatetime(UTC) for change in found.status_changes]
    assert times == sorted(set(times))
    assert found.status_changes[0].since == made.create_time
    assert times[0] >= began
    assert times[-1] <= datetime.now(UTC)
    stored = (await database.read("default", lambda c: store.find_entitlements(c, "default", ["e", "nowhere"])))["e"]
    tick = timedelta(microseconds=1)
    for status, previous, since in zip(order, [order[0], *order], times, strict=False):
        assert stored.status_at(since).value == stored.status_at(since + tick).value == status
        assert stored.status_at(since - tick).value == previous
    assert stored.status_at(DAY - timedelta(days=9000)) is EntitlementStatus.ACTIVE
    assert stored.status_at(times[-1] + timedelta(days=9000)) is EntitlementStatus.DELETED


async def test_the_latest_states_are_kept(shop: Client) -> None:
    """Of more changes than are kept the oldest go, and the rest stay in order."""
    await create(shop, id="e", **SMALL)
    for _ in range(STATUS_CHANGES_MAX // 2 + 1):
        for status in ("SUSPENDED", "ACTIVE"):
            last = await update(shop, "e", status=f"ENTITLEMENT_STATUS_{status}")
    assert states(last) == ["SUSPENDED", "ACTIVE"] * (STATUS_CHANGES_MAX // 2)
    times = [change.since.ToNanoseconds() for change in last.status_changes]
    assert times == sorted(times)


@given(
    st.lists(st.sampled_from(EntitlementStatus), min_size=1, max_size=6),
    st.lists(st.integers(0, 4), min_size=6, max_size=6),
    st.integers(-1, 30),
)
def test_the_state_at_a_time_is_the_last_that_began(
    statuses: list[EntitlementStatus], gaps: list[int], asked: int
) -> None:
    """The state at any time is that of the latest change not after it, or the first one's before all of them."""
    hours = list(itertools.accumulate(gaps))[: len(statuses)]
    changes = [StatusChange(s, DAY + timedelta(hours=hour)) for s, hour in zip(statuses, hours, strict=True)]
    entitlement = Entitlement("e", "", "p", "b", Partner.AWS, statuses[-1], DAY, status_changes=tuple(changes))
    begun = [status for status, hour in zip(statuses, hours, strict=True) if hour <= asked]
    assert entitlement.status_at(DAY + timedelta(hours=asked)) is (begun or statuses[:1])[-1]


# --- Content


_DIMENSIONS = st.lists(
    st.builds(Dimension, st.text(min_size=1, max_size=3), st.text(min_size=1, max_size=3)),
    max_size=5,
    unique_by=lambda one: one.key,
)


@given(_DIMENSIONS, st.lists(st.text(min_size=1, max_size=3), max_size=5, unique=True), st.randoms())
def test_the_order_of_dimensions_and_keys_is_no_content(
    dimensions: list[Dimension], keys: list[str], random: Any
) -> None:
    """The digest of what was created is the same in any order of what is a set, and another with one item less."""
    shuffled, shuffled_keys = random.sample(dimensions, len(dimensions)), random.sample(keys, len(keys))

    def product(some: Sequence[Dimension]) -> bytes:
        return Product("p", "P", Partner.AWS, tuple(some)).digest()

    def entitlement(some: Sequence[Dimension], some_keys: Sequence[str]) -> bytes:
        status = EntitlementStatus.ACTIVE
        return Entitlement(
            "e", "", "p", "b", None, status, DAY, dimensions=tuple(some), billable_metric_keys=tuple(some_keys)
        ).digest()

    assert product(shuffled) == product(dimensions)
    assert entitlement(shuffled, shuffled_keys) == entitlement(dimensions, keys)
    if dimensions:
        assert product(shuffled[1:]) != product(dimensions)
        assert entitlement(shuffled[1:], keys) != entitlement(dimensions, keys)
    if keys:
        assert entitlement(dimensions, shuffled_keys[1:]) != entitlement(dimensions, keys)


# --- Record metrics


async def test_every_key_has_one_record_metric(client: Client) -> None:
    """A key gets its record metric once, however many products and entitlements have it, at creation and by updates."""
    await create_product(client, id="p", **WHOLE_PRODUCT)
    assert await record_keys(client) == {"hours": 1, "bytes": 1}
    await create_product(client, id="q", **{**WHOLE_PRODUCT, "dimensions": [{"key": "bytes"}, {"key": "users"}]})
    assert await record_keys(client) == {"hours": 1, "bytes": 1, "users": 1}
    await update_product(client, "q", dimensions=[{"key": "hours"}, {"key": "pages"}])
    assert await record_keys(client) == {"hours": 1, "bytes": 1, "users": 1, "pages": 1}
    await client.create_customer(buyer_id="acme")
    await client.create_metric(key="traffic")
    small = {**SMALL, "product_id": "p"}
    await create(client, id="e", **small, dimensions=[{"key": "disks"}], billable_metric_keys=["traffic"])
    await create(client, id="f", **small)
    await update(client, "f", dimensions=[{"key": "disks"}, {"key": "traffic"}, {"key": "racks"}])
    once = ("hours", "bytes", "users", "pages", "traffic", "disks", "racks")
    assert await record_keys(client) == dict.fromkeys(once, 1)


async def test_metrics_older_than_record_metrics_get_theirs(shop: Client, database: Database) -> None:
    """The key of a metric that was made when there were no record metrics gets one with the first entitlement."""
    lost = sa.delete(billable_metrics).where(billable_metrics.c.record_key.in_(["traffic", "logins"]))
    await database.background(lambda c: c.execute(lost))
    await create(shop, id="e", **SMALL, billable_metric_keys=["traffic"])
    assert await record_keys(shop) == {"hours": 1, "bytes": 1, "traffic": 1}
    await update(shop, "e", billable_metric_keys=["traffic", "logins"])
    assert await record_keys(shop) == {"hours": 1, "bytes": 1, "traffic": 1, "logins": 1}


async def test_a_record_metric_sums_what_is_reported_under_its_key(client: Client) -> None:
    """It is a SUM of the quantities of its key, with a key of no metric of its own, and cannot be archived."""
    await create_product(client, id="p", name="P", partner="PARTNER_AWS", dimensions=[{"key": "hours", "name": "H"}])
    (metric,) = (
        await client.metrics.ListBillableMetrics(billable_metric_pb2.ListBillableMetricsRequest())
    ).billable_metrics
    assert (metric.record_key, metric.key) == ("hours", "")
    assert metric.aggregation_type == billable_metric_pb2.AGGREGATION_TYPE_SUM
    assert not metric.HasField("backfill_progress")
    request = billable_metric_pb2.ArchiveBillableMetricRequest(id=metric.id)
    fault = await fault_of(client.metrics.ArchiveBillableMetric(request))
    assert (fault.code, fault.reason, fault.metadata) == ("FAILED_PRECONDITION", "RECORD_METRIC", {"id": metric.id})
    assert await record_keys(client) == {"hours": 1}


async def test_products_made_at_once_share_their_record_metrics(shop: Client) -> None:
    """Products, entitlements and updates that bring the same keys at once, in any order, all succeed with one each."""
    await create(shop, id="e", **SMALL)
    for number in range(3):
        keys = [f"{number}-{i}" for i in range(20)]
        orders = [[{"key": key} for key in (keys if i % 2 else keys[::-1])] for i in range(12)]
        calls: list[Awaitable[Any]] = []
        for i, dimensions in enumerate(orders):
            fields = {"name": "P", "partner": "PARTNER_AWS", "dimensions": dimensions}
            calls.append(create_product(shop, id=f"{number}-{i}", **fields))
            calls.append(create(shop, id=f"{number}-{i}", **SMALL, dimensions=dimensions))
        calls.append(update_product(shop, "warehouse", dimensions=orders[0]))
        calls.append(update(shop, "e", dimensions=orders[1]))
        assert await outcomes(calls) == {"OK": len(calls)}
        found = await record_keys(shop)
        assert {key: found[key] for key in keys} == dict.fromkeys(keys, 1)


# --- Lists


async def fill(client: Client) -> dict[str, tuple[str, str, str, str]]:
    """Entitlements of every mix of two products, two buyers and two states; returns what filters see, by id."""
    for partner in ("AWS", "GCP"):
        await create_product(client, id=f"on-{partner}", name="P", partner=f"PARTNER_{partner}")
    await create_product(client, id="on-AWS-too", name="P", partner="PARTNER_AWS")
    for buyer in ("acme", "bolt"):
        await client.create_customer(buyer_id=buyer)
    made = {}
    mixes = itertools.product(("on-AWS", "on-GCP", "on-AWS-too"), ("acme", "bolt"), ("ACTIVE", "SUSPENDED"))
    for i, (product, buyer, status) in enumerate(mixes):
        one = await create(
            client,
            id=f"{'zZäa~'[i % 5]}{i}",
            product_id=product,
            buyer_id=buyer,
            status=f"ENTITLEMENT_STATUS_{status}",
            starting_on=timestamp(DAY),
        )
        made[one.id] = (f"PARTNER_{product.split('-')[1]}", product, buyer, f"ENTITLEMENT_STATUS_{status}")
    return made


async def test_filters_narrow_a_list_at_every_page_size(client: Client) -> None:
    """Any mix of filters gives what matches all of them, in byte order, however the pages are cut."""
    made = await fill(client)
    names = ("partner", "product_id", "buyer_id", "status")
    choices = (
        ("", "PARTNER_AWS", "PARTNER_AZURE"),
        ("", "on-AWS", "on-GCP", "nowhere"),
        ("", "bolt", "nobody"),
        ("", "ENTITLEMENT_STATUS_ACTIVE", "ENTITLEMENT_STATUS_DELETED"),
    )
    for mix in itertools.product(*choices):
        filters = {name: value for name, value in zip(names, mix, strict=True) if value}
        expected = sorted(
            (
                one
                for one, has in made.items()
                if all(not want or want == is_ for want, is_ in zip(mix, has, strict=True))
            ),
            key=str.encode,
        )
        assert await listed(client, **filters) == expected, filters
    for filters in ({}, {"partner": "PARTNER_AWS"}, {"buyer_id": "acme"}, {"product_id": "on-GCP"}):
        (whole,) = await pages_of_entitlements(client, 1000, **filters)
        for size in range(1, len(whole) + 2):
            pages = await pages_of_entitlements(client, size, **filters)
            assert [one for page in pages for one in page] == whole
            assert [len(page) for page in pages[:-1]] == [size] * (len(pages) - 1)
            assert pages[-1]


async def test_skip_passes_over_entitlements(client: Client) -> None:
    """`skip` leaves out so many, from the beginning or from where the token leads; beyond the end is nothing."""
    await fill(client)
    (whole,) = await pages_of_entitlements(client, 1000)
    assert len(whole) == 12
    for filters, matching in (
        ({}, whole),
        ({"buyer_id": "acme"}, [one for one in whole if one.buyer_id == "acme"]),
    ):
        for size, skip in itertools.product((1, 5, 12, 13), (0, 1, 4, 11, 12, 1_000_000)):
            request = entitlement_pb2.ListEntitlementsRequest(page_size=size, skip=skip, **filters)
            answer = await client.entitlements.ListEntitlements(request)
            assert list(answer.entitlements) == matching[skip : skip + size]
            assert bool(answer.next_page_token) == (skip + size < len(matching))
            if answer.next_page_token:
                # A token goes on after the page that gave it, whatever was skipped before it.
                for more in (0, 2):
                    request.skip, request.page_token = more, answer.next_page_token
                    rest = await client.entitlements.ListEntitlements(request)
                    begin = skip + size + more
                    assert list(rest.entitlements) == matching[begin : begin + size]
    for skip in (-1, 1_000_001):
        fault = await fault_of(listed(client, skip=skip))
        assert fault.brief == ("INVALID_ARGUMENT", "FIELD_INVALID", "skip")


async def test_list_rules(client: Client) -> None:
    """Bad filters, sizes and tokens are refused with what would be right; all bad filters are named."""
    await fill(client)
    request = entitlement_pb2.ListEntitlementsRequest(partner="PARTNER_AWS", page_size=1)
    token, garbage = (await client.entitlements.ListEntitlements(request)).next_page_token, "garbage"
    found = await refusals(
        {
            "unknown partner": listed(client, partner=4),
            "unknown status": listed(client, status=-1),
            "long product": listed(client, product_id="p" * 37),
            "blank buyer": listed(client, buyer_id=" "),
            "all at once": listed(client, partner=9, status=9, product_id="\0", buyer_id="b" * 37),
            "negative size": listed(client, page_size=-1),
            "garbage": listed(client, page_token=garbage),
            "token of other filters": listed(client, partner="PARTNER_GCP", page_token=token),
            "token of no filter": listed(client, page_token=token),
        }
    )
    assert found == {
        "unknown partner": bad("FIELD_INVALID", "partner"),
        "unknown status": bad("FIELD_INVALID", "status"),
        "long product": bad("LIMIT_EXCEEDED", "product_id"),
        "blank buyer": bad("FIELD_INVALID", "buyer_id"),
        "all at once": bad("FIELD_INVALID", "partner", "status", "product_id", "buyer_id"),
        "negative size": bad("FIELD_INVALID", "page_size"),
        "garbage": bad("PAGE_TOKEN_INVALID", "page_token"),
        "token of other filters": bad("PAGE_TOKEN_INVALID", "page_token"),
        "token of no filter": bad("PAGE_TOKEN_INVALID", "page_token"),
    }
    assert "AWS, AZURE, GCP" in (await fault_of(listed(client, partner=4))).text
    text = (await fault_of(listed(client, status=7))).text
    assert all(status in text for status in STATUSES)


async def test_a_renamed_buyer_is_shown(shop: Client) -> None:
    """An entitlement is a customer's: it shows, and is found by, the buyer id that the customer has now."""
    made = await create(shop, id="e", **SMALL)
    (customer,) = (await shop.customers.ListCustomers(customer_pb2.ListCustomersRequest())).customers
    await rename_buyer(shop, customer.id, "acme-2")
    shown = await get(shop, "e")
    assert (made.buyer_id, shown.buyer_id, shown.update_time) == ("acme", "acme-2", made.update_time)
    assert await listed(shop, buyer_id="acme") == []
    assert await pages_of_entitlements(shop, 0, buyer_id="acme-2") == [[shown]]
    assert (await update(shop, "e", name="N")).buyer_id == "acme-2"


async def test_what_is_carried_is_shown_by_get_alone(shop: Client, database: Database) -> None:
    """What is left over is shown by dimension as plain decimals, without zeros, and in no other answer."""
    await create(shop, id="e", **SMALL)
    await create(shop, id="f", **SMALL)
    carried = {"hours": "0.500", "bytes": "0.000", "users": "-12.3400", "disks": "1e-18"}
    rows = [
        {"organization_id": "default", "entitlement_id": "e", "key": key, "carried": Decimal(value)}
        for key, value in carried.items()
    ]
    await database.write("default", lambda c: c.execute(sa.insert(entitlement_carries).values(rows)))
    found = await get(shop, "e")
    assert dict(found.carried_quantities) == {"hours": "0.5", "users": "-12.34", "disks": "0.000000000000000001"}
    assert not (await get(shop, "f")).carried_quantities
    (others,) = await pages_of_entitlements(shop, 0)
    again, updated = await create(shop, id="e", **SMALL), await update(shop, "e", name="N")
    assert not any(one.carried_quantities for one in (*others, again, updated))
    assert await database.read("default", lambda c: store.find_entitlements(c, "default", [])) == {}


# --- Races


async def make_product(client: Client, name: str, one_id: str) -> entitlement_pb2.Product:
    """Create a product of this name."""
    return await create_product(client, id=one_id, **{**WHOLE_PRODUCT, "name": name})


async def make_entitlement(client: Client, name: str, one_id: str) -> entitlement_pb2.Entitlement:
    """Create an entitlement of this name."""
    return await create(client, id=one_id, **{**WHOLE_ENTITLEMENT, "name": name})


both_nouns = pytest.mark.parametrize("make", [make_product, make_entitlement], ids=["product", "entitlement"])


@both_nouns
async def test_equal_creations_at_once_all_succeed(
    shop: Client, make: Callable[[Client, str, str], Awaitable[Any]]
) -> None:
    """Twenty callers that create the same id with the same content all get the one resource, round after round."""
    for number in range(5):
        made = await asyncio.gather(*(make(shop, "Same", f"id {number}") for _ in range(20)))
        assert all(one == made[0] for one in made)


@both_nouns
async def test_of_different_creations_at_once_one_wins(
    shop: Client, make: Callable[[Client, str, str], Awaitable[Any]]
) -> None:
    """Ten callers each create one id with one of two contents: one content wins, the others learn ID_IN_USE."""
    for number in range(5):
        calls = [make(shop, f"content {i % 2}", f"id {number}") for i in range(20)]
        assert await outcomes(calls) == {"OK": 10, "ID_IN_USE": 10}


async def test_equal_changes_of_state_at_once_are_one(shop: Client) -> None:
    """Of many callers that suspend an entitlement at once all succeed, and it was suspended once."""
    for number in range(3):
        one = (await create(shop, id=f"e{number}", **SMALL)).id
        calls = [update(shop, one, status="ENTITLEMENT_STATUS_SUSPENDED") for _ in range(10)]
        assert await outcomes(calls) == {"OK": 10}
        assert states(await get(shop, one)) == ["ACTIVE", "SUSPENDED"]


async def test_updates_of_different_fields_at_once_are_all_kept(shop: Client) -> None:
    """Callers that each change another field of one entitlement at once undo nothing of each other's."""
    for number in range(3):
        one = (await create(shop, id=f"e{number}", **SMALL)).id
        end = timestamp(DAY + timedelta(days=1))
        calls = [
            update(shop, one, name="N"),
            update(shop, one, status="ENTITLEMENT_STATUS_CANCELLED"),
            update(shop, one, ending_before=end),
            update(shop, one, dimensions=[{"key": "k"}]),
            update(shop, one, billable_metric_keys=["traffic"]),
        ]
        assert await outcomes(calls) == {"OK": 5}
        found = await get(shop, one)
        assert (found.name, found.ending_before, states(found)) == ("N", end, ["ACTIVE", "CANCELLED"])
        assert ([d.key for d in found.dimensions], list(found.billable_metric_keys)) == (["k"], ["traffic"])
