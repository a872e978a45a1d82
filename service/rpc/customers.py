"""The RPCs of CustomerService."""

import uuid

from metering.v1 import customer_pb2 as pb
from metering.v1 import customer_pb2_grpc
from service.database import Database
from service.domain import pages
from service.rpc.interceptor import Context, organization
from service.rpc.pages import PageTokens, fitting, scope
from service.rpc.wire import customers as wire
from service.rpc.wire import one_id
from service.store import customers as store


class CustomerService(customer_pb2_grpc.CustomerServiceServicer):
    """Keeps customers; see customer.proto."""

    def __init__(self, database: Database, tokens: PageTokens) -> None:
        self._database = database
        self._tokens = tokens

    async def CreateCustomer(self, request: pb.CreateCustomerRequest, context: Context) -> pb.CreateCustomerResponse:
        """See customer.proto."""
        customer, org = wire.new_customer(request.customer), organization()
        stored = await self._database.write(org, lambda c: store.create_customer(c, org, customer))
        return pb.CreateCustomerResponse(customer=wire.customer(stored))

    async def GetCustomer(self, request: pb.GetCustomerRequest, context: Context) -> pb.GetCustomerResponse:
        """See customer.proto."""
        customer_id, org = one_id("id", request.id), organization()
        found = await self._database.read(
            org, lambda c: store.get_customer(c, org, customer_id), timeout_s=context.time_remaining()
        )
        return pb.GetCustomerResponse(customer=wire.customer(found))

    async def ListCustomers(self, request: pb.ListCustomersRequest, context: Context) -> pb.ListCustomersResponse:
        """See customer.proto."""
        limit, org = pages.page_size(request.page_size), organization()
        key, ids = wire.customer_key_filter(request.customer_key), wire.customer_ids_filter(request.ids)
        archived = True if request.only_archived else None if request.include_archived else False
        query_scope = scope("ListCustomers", request)
        state = await self._tokens.decode(query_scope, request.page_token)
        rows = await self._database.read(
            org,
            lambda c: store.list_customers(
                c,
                org,
                archived=archived,
                key=key,
                ids=ids,
                after=uuid.UUID(state["after"]) if state else None,
                limit=limit + 1,
            ),
            timeout_s=context.time_remaining(),
        )
        page = fitting([wire.customer(row) for row in rows], limit)
        response = pb.ListCustomersResponse(customers=page)
        if len(rows) > len(page):
            state = {"after": page[-1].id}
            response.next_page_token = await self._tokens.encode(query_scope, state)
        return response

    async def SetIngestAliases(
        self, request: pb.SetIngestAliasesRequest, context: Context
    ) -> pb.SetIngestAliasesResponse:
        """See customer.proto."""
        customer_id, org = one_id("id", request.id), organization()
        aliases = wire.new_aliases(request)
        stored = await self._database.write(org, lambda c: store.set_ingest_aliases(c, org, customer_id, aliases))
        return pb.SetIngestAliasesResponse(customer=wire.customer(stored))

    async def SetBillingPeriod(
        self, request: pb.SetBillingPeriodRequest, context: Context
    ) -> pb.SetBillingPeriodResponse:
        """See customer.proto."""
        customer_id, org = one_id("id", request.id), organization()
        period = wire.new_billing_period(request)
        stored = await self._database.write(org, lambda c: store.set_billing_period(c, org, customer_id, period))
        return pb.SetBillingPeriodResponse(customer=wire.customer(stored))

    async def UpdateCustomer(self, request: pb.UpdateCustomerRequest, context: Context) -> pb.UpdateCustomerResponse:
        """See customer.proto."""
        customer_id, org = one_id("customer.id", request.customer.id), organization()
        changes = wire.customer_changes(request)
        stored = await self._database.write(org, lambda c: store.update_customer(c, org, customer_id, changes))
        return pb.UpdateCustomerResponse(customer=wire.customer(stored))

    async def ArchiveCustomer(self, request: pb.ArchiveCustomerRequest, context: Context) -> pb.ArchiveCustomerResponse:
        """See customer.proto."""
        customer_id, org = one_id("id", request.id), organization()
        stored = await self._database.write(org, lambda c: store.archive_customer(c, org, customer_id))
        return pb.ArchiveCustomerResponse(customer=wire.customer(stored))
