"""Signs and reads page tokens for the RPCs, with the secrets that every replica finds in the database."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from service.database import Database
from service.domain import pages
from service.domain.usage import PAGE_BYTES_MAX
from service.rpc.interceptor import organization
from service.store.organizations import PageTokenKey, current_page_token_keys

M = TypeVar("M", bound=Message)

# Moves when what is inside a token does: one of another version of the service is refused, not misread.
_FORMAT = 1
_REFRESH_S = 3600.0
# A token with an unknown secret is a reason to look again, but not for every forged token that is sent.
_RETRY_S = 1.0


class PageTokens:
    """Makes tokens that only the same organization, method and query can use, on any replica."""

    def __init__(self, database: Database) -> None:
        """Find the signing secrets in `database`."""
        self._database = database
        self._keys: list[PageTokenKey] = []
        self._loaded_at = float("-inf")
        self._loading = asyncio.Lock()

    async def encode(self, scope: str, state: Mapping[str, Any]) -> str:
        """Make the token by which a query, told by its `scope`, can be continued from `state` (JSON-ready)."""
        key = (await self._current(_REFRESH_S))[0]
        return pages.encode(key.id, key.secret, scope, state)

    async def decode(self, scope: str, token: str, field: str = "page_token") -> dict[str, Any] | None:
        """Return the state in a token, None if it is empty; raises InvalidArgument if it is of another query."""
        if not token:
            return None
        key_id = pages.key_id(field, token)
        for age in (_REFRESH_S, _RETRY_S):
            for key in await self._current(age):
                if key.id == key_id:
                    return pages.decode(field, token, key.secret, scope)
        raise pages.refused(field)

    async def _current(self, age_max: float) -> list[PageTokenKey]:
        if time.monotonic() - self._loaded_at > age_max:
            await self._load(age_max)
        return self._keys

    async def _load(self, age_max: float) -> None:
        async with self._loading:
            if time.monotonic() - self._loaded_at <= age_max:
                return  # another call did it meanwhile
            self._keys = await self._database.background(current_page_token_keys)
            self._loaded_at = time.monotonic()


def fitting(messages: Sequence[M], limit: int) -> list[M]:
    """Return the first `limit` messages, or as many of them as make a page of about 1 MiB; at least one."""
    size = 0
    for i, message in enumerate(messages[:limit]):
        size += message.ByteSize()
        if size > PAGE_BYTES_MAX and i:
            return list(messages[:i])
    return list(messages[:limit])


def scope(method: str, request: Message) -> str:
    """Name what a token is bound to: the organization, and everything in the request but the paging itself."""
    query = type(request)()
    query.CopyFrom(request)
    for field in {"page_token", "page_size", "resume_token", "skip"} & set(query.DESCRIPTOR.fields_by_name):
        query.ClearField(field)
    return f"{_FORMAT} {organization()} {method} {pages.fingerprint(query.SerializeToString(deterministic=True))}"
