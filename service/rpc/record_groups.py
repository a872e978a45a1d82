"""The RPCs of UsageRecordGroupService."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from weakref import WeakValueDictionary

from metering.v1 import usage_record_group_pb2 as pb
from metering.v1 import usage_record_group_pb2_grpc
from service.database import Database
from service.domain import pages
from service.domain.partners import Rules
from service.domain.record_groups import PAGE_SIZE_MAX, NewGroup
from service.errors import Violation
from service.rpc.interceptor import Context, is_admin, organization
from service.rpc.pages import PageTokens, fitting, scope
from service.rpc.wire import in_slices
from service.rpc.wire import record_groups as wire
from service.store import group_intake as intake
from service.store import record_groups as store
from service.turns import Rate


class UsageRecordGroupService(usage_record_group_pb2_grpc.UsageRecordGroupServiceServicer):
    """Takes usage record groups; see usage_record_group.proto."""

    def __init__(self, database: Database, tokens: PageTokens, rules: Rules, rate: Rate | None = None) -> None:
        """Judge groups by the partners' `rules`; an organization's records may come at this `rate` (None = any)."""
        self._rate = rate
        self._database = database
        self._tokens = tokens
        self._rules = rules
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def BatchValidateUsageRecordGroups(
        self,
        request: wire.Sent,  # type: ignore[override]  # see wire.DECODERS
        context: Context,
    ) -> pb.BatchValidateUsageRecordGroupsResponse:
        """See usage_record_group.proto."""
        items = await wire.new_groups(request, ids_required=False)
        found = await self.validate(items, context)
        results = await in_slices(lambda one: one, wire.validations(items, found))
        return pb.BatchValidateUsageRecordGroupsResponse(results=results)

    async def validate(self, items: Sequence[intake.Item], context: Context) -> list[Sequence[Violation]]:
        """Return the faults of each of the caller's groups."""
        org, admin = organization(), is_admin()
        return await self._database.read(
            org,
            lambda c: intake.validate_groups(c, org, items, self._rules, admin=admin),
            timeout_s=context.time_remaining(),
        )

    async def ReportUsageRecordGroups(
        self,
        request: wire.Sent,  # type: ignore[override]  # see wire.DECODERS
        context: Context,
    ) -> pb.ReportUsageRecordGroupsResponse:
        """See usage_record_group.proto."""
        found = await self.report(await wire.new_groups(request, ids_required=True))
        results = await in_slices(lambda one: one, wire.results(found, organization()))
        return pb.ReportUsageRecordGroupsResponse(results=results)

    async def report(self, items: Sequence[intake.Item], *, all_or_nothing: bool = False) -> intake.Reported:
        """Store the caller's groups; see `intake.report_groups`."""
        org, admin = organization(), is_admin()
        if self._rate is not None:
            groups = [item if isinstance(item, NewGroup) else item[0] for item in items]
            self._rate.take(org, sum(len(one.records) + len(one.billable_records) for one in groups))
        # One organization's batches take turns, as they would in the database, and leave the other places to others.
        async with self._turns.setdefault(org, asyncio.Lock()):
            return await self._database.write(
                org,
                lambda c: intake.report_groups(
                    c,
                    org,
                    items,
                    self._rules,
                    admin=admin,
                    shown_bytes_max=wire.ANSWER_BYTES_MAX,
                    all_or_nothing=all_or_nothing,
                ),
            )

    async def ListUsageRecordGroups(
        self, request: pb.ListUsageRecordGroupsRequest, context: Context
    ) -> pb.ListUsageRecordGroupsResponse:
        """See usage_record_group.proto."""
        limit, org = pages.page_size(request.page_size, PAGE_SIZE_MAX, PAGE_SIZE_MAX), organization()
        query_scope = scope("ListUsageRecordGroups", request)
        state = await self._tokens.decode(query_scope, request.page_token)
        # What "today" means is settled by the first page.
        asked_at = datetime.fromisoformat(state["asked_at"]) if state else datetime.now(UTC)
        query, skip = wire.group_query(request, asked_at)
        after = (datetime.fromisoformat(state["created_at"]), int(state["serial_id"])) if state else None
        found = await self._database.read(
            org, lambda c: store.list_groups(c, org, query, after, skip, limit), timeout_s=context.time_remaining()
        )
        messages = await in_slices(lambda one: wire.group(one, org), found.groups)
        page, following = fitting(messages, limit), found.following
        if len(page) < len(messages):
            last = found.groups[len(page) - 1]
            following = (last.created_at, last.serial_id)
        response = pb.ListUsageRecordGroupsResponse(usage_record_groups=page)
        if following is not None:
            state = {
                "asked_at": asked_at.isoformat(),
                "created_at": following[0].isoformat(),
                "serial_id": following[1],
            }
            response.next_page_token = await self._tokens.encode(query_scope, state)
        return response

    async def GetUsageRecordGroup(
        self, request: pb.GetUsageRecordGroupRequest, context: Context
    ) -> pb.GetUsageRecordGroupResponse:
        """See usage_record_group.proto."""
        group_id, org = wire.group_id(request.id), organization()
        found = await self._database.read(
            org, lambda c: store.get_group(c, org, group_id), timeout_s=context.time_remaining()
        )
        return pb.GetUsageRecordGroupResponse(group=wire.group(found, org))

    async def DeleteUsageRecordGroup(
        self, request: pb.DeleteUsageRecordGroupRequest, context: Context
    ) -> pb.DeleteUsageRecordGroupResponse:
        """See usage_record_group.proto."""
        group_id, org = wire.group_id(request.id), organization()
        deleted = await self._database.write(org, lambda c: store.delete_group(c, org, group_id))
        return pb.DeleteUsageRecordGroupResponse(group=wire.group(deleted, org))

    async def RetryUsageRecordGroup(
        self, request: pb.RetryUsageRecordGroupRequest, context: Context
    ) -> pb.RetryUsageRecordGroupResponse:
        """See usage_record_group.proto."""
        group_id, org = wire.group_id(request.id), organization()
        group = await self._database.write(org, lambda c: store.retry_group(c, org, group_id))
        return pb.RetryUsageRecordGroupResponse(group=wire.group(group, org))
