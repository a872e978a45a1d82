"""The RPCs of EntitlementService."""

from metering.v1 import entitlement_pb2 as pb
from metering.v1 import entitlement_pb2_grpc
from service.database import Database
from service.domain import pages
from service.rpc.interceptor import Context, organization
from service.rpc.pages import PageTokens, fitting, scope
from service.rpc.wire import entitlements as wire
from service.rpc.wire import in_slices
from service.store import entitlements as store


class EntitlementService(entitlement_pb2_grpc.EntitlementServiceServicer):
    """Keeps products and entitlements; see entitlement.proto."""

    def __init__(self, database: Database, tokens: PageTokens) -> None:
        self._database = database
        self._tokens = tokens

    async def CreateProduct(self, request: pb.CreateProductRequest, context: Context) -> pb.CreateProductResponse:
        """See entitlement.proto."""
        product, org = wire.new_product(request.product), organization()
        stored = await self._database.write(org, lambda c: store.create_product(c, org, product))
        return pb.CreateProductResponse(product=wire.product(stored))

    async def GetProduct(self, request: pb.GetProductRequest, context: Context) -> pb.GetProductResponse:
        """See entitlement.proto."""
        product_id, org = wire.stored_id("id", request.id), organization()
        found = await self._database.read(
            org, lambda c: store.get_product(c, org, product_id), timeout_s=context.time_remaining()
        )
        return pb.GetProductResponse(product=wire.product(found))

    async def ListProducts(self, request: pb.ListProductsRequest, context: Context) -> pb.ListProductsResponse:
        """See entitlement.proto."""
        limit, org = pages.page_size(request.page_size), organization()
        query_scope = scope("ListProducts", request)
        state = await self._tokens.decode(query_scope, request.page_token)
        rows = await self._database.read(
            org,
            lambda c: store.list_products(c, org, after=state["after"] if state else None, limit=limit + 1),
            timeout_s=context.time_remaining(),
        )
        page = fitting(await in_slices(wire.product, rows), limit)
        response = pb.ListProductsResponse(products=page)
        if len(rows) > len(page):
            response.next_page_token = await self._tokens.encode(query_scope, {"after": page[-1].id})
        return response

    async def UpdateProduct(self, request: pb.UpdateProductRequest, context: Context) -> pb.UpdateProductResponse:
        """See entitlement.proto."""
        changes, org = wire.product_changes(request), organization()
        stored = await self._database.write(org, lambda c: store.update_product(c, org, request.product.id, changes))
        return pb.UpdateProductResponse(product=wire.product(stored))

    async def CreateEntitlement(
        self, request: pb.CreateEntitlementRequest, context: Context
    ) -> pb.CreateEntitlementResponse:
        """See entitlement.proto."""
        entitlement, org = wire.new_entitlement(request.entitlement), organization()
        stored = await self._database.write(org, lambda c: store.create_entitlement(c, org, entitlement))
        return pb.CreateEntitlementResponse(entitlement=wire.entitlement(stored))

    async def GetEntitlement(self, request: pb.GetEntitlementRequest, context: Context) -> pb.GetEntitlementResponse:
        """See entitlement.proto."""
        entitlement_id, org = wire.stored_id("id", request.id), organization()
        found = await self._database.read(
            org, lambda c: store.get_entitlement(c, org, entitlement_id), timeout_s=context.time_remaining()
        )
        return pb.GetEntitlementResponse(entitlement=wire.entitlement(found))

    async def ListEntitlements(
        self, request: pb.ListEntitlementsRequest, context: Context
    ) -> pb.ListEntitlementsResponse:
        """See entitlement.proto."""
        limit, org = pages.page_size(request.page_size), organization()
        filters = wire.entitlement_filters(request)
        query_scope = scope("ListEntitlements", request)
        state = await self._tokens.decode(query_scope, request.page_token)
        rows = await self._database.read(
            org,
            lambda c: store.list_entitlements(
                c,
                org,
                **filters._asdict(),
                after=state["after"] if state else None,
                skip=request.skip,
                limit=limit + 1,
            ),
            timeout_s=context.time_remaining(),
        )
        page = fitting(await in_slices(wire.entitlement, rows), limit)
        response = pb.ListEntitlementsResponse(entitlements=page)
        if len(rows) > len(page):
            response.next_page_token = await self._tokens.encode(query_scope, {"after": page[-1].id})
        return response

    async def UpdateEntitlement(
        self, request: pb.UpdateEntitlementRequest, context: Context
    ) -> pb.UpdateEntitlementResponse:
        """See entitlement.proto."""
        changes, org = wire.entitlement_changes(request), organization()
        stored = await self._database.write(
            org, lambda c: store.update_entitlement(c, org, request.entitlement.id, changes)
        )
        return pb.UpdateEntitlementResponse(entitlement=wire.entitlement(stored))
