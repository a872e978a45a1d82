"""Owns the answer to "whose call is this?", and how API keys are made and checked."""

import asyncio
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from hashlib import sha256
from typing import Any, NamedTuple, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from service.database import Database
from service.errors import Reason, Unauthenticated
from service.store import organizations

Answer = TypeVar("Answer")

# How long a checked credential, or the absence of any, is trusted without asking the database again: the time that
# a revocation, or the first key, may take to be felt.
TRUST_S = 2.0
_CACHE_MAX = 10_000
_HEADER_MAX = 8192
_PREFIX = "mtr"


class NewApiKey(NamedTuple):
    """A credential just made. `text` is what the caller sends; only its hash is kept."""

    id: str
    text: str
    secret_hash: bytes


class Caller(NamedTuple):
    """Whose call it is, and whether the caller is an administrator of the organization.

    `is_anyone` means that the server is open: no credential says whose call it is.
    """

    organization: str
    is_admin: bool = True
    is_anyone: bool = False


class _Trusted(NamedTuple):
    caller: Caller
    secret_hash: bytes
    until: float


def new_api_key() -> NewApiKey:
    """Make a credential with 256 random bits."""
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    return NewApiKey(key_id, f"{_PREFIX}_{key_id}_{secret}", sha256(secret.encode()).digest())


class Auth:
    """Tells the organization of a call from its credential, and from nothing else.

    While no API key was ever made (open mode), every call belongs to the organization `default` and whatever
    credential it presents is ignored; such a server listens on loopback and unix sockets only.
    """

    def __init__(self, database: Database) -> None:
        """Look credentials up in `database`."""
        self._database = database
        self._trusted: dict[str, _Trusted] = {}
        self._open_until = 0.0
        # Keys are never deleted: once there is one, the server stays closed.
        self._closed = False
        # Look-ups under way: a burst of calls with one credential asks the database once.
        self._asking: dict[str, asyncio.Task[Any]] = {}

    async def caller(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Return whose call it is that has this metadata.

        Raises Unauthenticated when a credential is needed and missing, malformed, unknown or revoked; the text does
        not tell which of the last three.
        """
        if time.monotonic() < self._open_until or await self.is_open():
            return Caller(organizations.DEFAULT_ORGANIZATION, is_anyone=True)
        sent = [value for name, value in metadata if name == "authorization"]
        if not sent:
            raise Unauthenticated(
                Reason.CREDENTIAL_MISSING, "This server needs an API key: send `authorization: Bearer <key>`."
            )
        parts = (
            sent[0].split(" ") if len(sent) == 1 and isinstance(sent[0], str) and len(sent[0]) <= _HEADER_MAX else []
        )
        if len(parts) != 2 or parts[0].lower() not in {"bearer", "key"}:
            raise _refused()
        return await self._caller_of(parts[1])

    async def is_open(self) -> bool:
        """Say whether no API key was ever made; true answers are trusted for a moment."""
        # The empty text is no key's id.
        if self._closed or await self._ask("", organizations.any_api_key):
            self._closed = True
            return False
        self._open_until = time.monotonic() + TRUST_S
        return True

    async def _caller_of(self, key: str) -> Caller:
        prefix, _, rest = key.partition("_")
        key_id, _, secret = rest.partition("_")
        if prefix != _PREFIX or not secret:
            raise _refused()
        trusted = self._trusted.get(key_id)
        if trusted is None or trusted.until < time.monotonic():
            trusted = await self._look_up(key_id)
        sent = sha256(secret.encode()).digest()
        if trusted is None or not hmac.compare_digest(sent, trusted.secret_hash):
            raise _refused()
        return trusted.caller

    async def _look_up(self, key_id: str) -> _Trusted | None:
        self._trusted.pop(key_id, None)
        if len(key_id) > 64 or "\0" in key_id:
            return None
        stored = await self._ask(key_id, lambda connection: organizations.find_api_key(connection, key_id))
        if stored is None or stored.revoked_at is not None:
            return None
        if len(self._trusted) >= _CACHE_MAX:
            self._trusted.clear()
        trusted = _Trusted(Caller(stored.organization, stored.is_admin), stored.secret_hash, time.monotonic() + TRUST_S)
        self._trusted[key_id] = trusted
        return trusted

    async def _ask(self, key_id: str, work: Callable[[AsyncConnection], Awaitable[Answer]]) -> Answer:
        task: asyncio.Task[Answer] | None = self._asking.get(key_id)
        if task is None:
            task = asyncio.create_task(self._database.look_up(work))
            self._asking[key_id] = task
            task.add_done_callback(lambda done: self._answered(key_id, done))
        # Shielded: a caller that leaves must not take the answer from those that wait with it.
        return await asyncio.shield(task)

    def _answered(self, key_id: str, task: asyncio.Task[Any]) -> None:
        del self._asking[key_id]
        if not task.cancelled():
            task.exception()  # if every caller left, nobody else fetches it


def _refused() -> Unauthenticated:
    return Unauthenticated(Reason.CREDENTIAL_INVALID, "The credential is not valid.")
