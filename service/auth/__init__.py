"""Owns the answer to "whose call is this?": API keys, tokens and client certificates, and what their callers may do."""

import asyncio
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from hashlib import sha256
from typing import Any, NamedTuple, TypeVar

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from service.auth.certificates import Clients
from service.auth.permissions import permitted
from service.auth.tokens import BadToken, Tokens
from service.database import Database
from service.domain.roles import EVERY_ROLE, Role
from service.errors import PermissionDenied, Reason, ResourceExhausted, Unauthenticated
from service.store import organizations

log = structlog.get_logger("metering.auth")

Answer = TypeVar("Answer")

# How long a checked credential, or the absence of any, is trusted without asking again: the time that a revocation, or
# the first key, may take to be felt.
TRUST_S = 2.0
_CACHE_MAX = 10_000
_HEADER_MAX = 8192
_PREFIX = "mtr"
# How many look-ups of ids that were not seen lately wait at once. They take turns behind one another, so that a flood
# of made-up keys does not keep those in use from being looked up again.
_STRANGERS_MAX = 200


class NewApiKey(NamedTuple):
    """A credential just made. `text` is what the caller sends; only its hash is kept."""

    id: str
    text: str
    secret_hash: bytes


class Caller(NamedTuple):
    """Whose call it is, and what its credential is for.

    `is_anyone` means that the server is open: no credential says whose call it is.
    """

    organization: str
    roles: frozenset[Role] = EVERY_ROLE
    is_anyone: bool = False

    def require(self, method: str) -> None:
        """Raise PermissionDenied unless the caller may call the method, `/package.Service/Method`."""
        needed = permitted(method)
        if not needed & self.roles:
            names = " or ".join(role for role in Role if role in needed) or "no role there is"
            raise PermissionDenied(
                Reason.ROLE_REQUIRED,
                f"The credential has the role {' and '.join(sorted(self.roles))}; this call needs {names}.",
                metadata={"needed": ",".join(sorted(needed)), "method": method.removeprefix("/")},
            )


class _Trusted(NamedTuple):
    """A credential that was checked: what it stands for, until when that need not be asked again, when it expires."""

    caller: Caller
    secret_hash: bytes
    until: float
    expires: float


def new_api_key() -> NewApiKey:
    """Make a credential with 256 random bits."""
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    return NewApiKey(key_id, f"{_PREFIX}_{key_id}_{secret}", sha256(secret.encode()).digest())


class Auth:
    """Tells the organization of a call from its credential, and from nothing else.

    While no API key was ever made, and neither tokens nor certificates are taken (open mode), every call belongs to the
    organization `default` and whatever credential it presents is ignored; such a server listens on loopback and unix
    sockets only.
    """

    def __init__(self, database: Database, tokens: Tokens | None = None, clients: Clients | None = None) -> None:
        """Look API keys up in `database`; take JSON Web Tokens and client certificates if there is what tells them."""
        self._database = database
        self._tokens = tokens
        self._clients = clients
        self._clients_read_at = 0.0
        self._trusted: dict[Hashable, _Trusted] = {}
        self._open_until = 0.0
        # Keys are never deleted: once there is one, the server stays closed.
        self._closed = tokens is not None or clients is not None
        # Look-ups under way: a burst of calls with one credential asks the database once.
        self._asking: dict[Hashable, asyncio.Task[Any]] = {}
        self._strangers = asyncio.Semaphore(1)
        self._strangers_waiting = 0

    @property
    def reads_certificates(self) -> bool:
        """Whether the names of a client's certificate can say who it is."""
        return self._clients is not None

    def recalls(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Say whether the credential, if there is one, was seen lately: who it is of is then soon known."""
        sent = next((value for name, value in metadata if name == "authorization"), None)
        if self._open_until > time.monotonic() or not isinstance(sent, str) or len(sent) > _HEADER_MAX:
            return True
        text = sent.rpartition(" ")[2]
        if self._tokens is not None and text.count(".") == 2:
            return sha256(text.encode()).digest() in self._trusted
        return text.removeprefix(f"{_PREFIX}_").partition("_")[0] in self._trusted

    async def caller(
        self, metadata: Iterable[tuple[str, str | bytes]], certificate_names: Sequence[str] = ()
    ) -> Caller:
        """Return whose call it is that has this metadata and came over a connection with this client certificate.

        A credential in the metadata goes before the certificate. Raises Unauthenticated when a credential is needed and
        missing, malformed, unknown, expired or revoked; the text does not tell which of the last four.
        """
        if time.monotonic() < self._open_until or await self.is_open():
            return Caller(organizations.DEFAULT_ORGANIZATION, is_anyone=True)
        sent = [value for name, value in metadata if name == "authorization"]
        if not sent:
            return await self._caller_of_certificate(certificate_names)
        parts = (
            sent[0].split(" ") if len(sent) == 1 and isinstance(sent[0], str) and len(sent[0]) <= _HEADER_MAX else []
        )
        if len(parts) != 2 or parts[0].lower() not in {"bearer", "key"}:
            raise _refused()
        if self._tokens is not None and parts[1].count(".") == 2:
            return await self._caller_of_token(self._tokens, parts[1])
        return await self._caller_of_key(parts[1])

    async def is_open(self) -> bool:
        """Say whether anyone is let in; true answers are trusted for a moment."""
        # The empty text is no key's id.
        if self._closed or await self._ask("", organizations.any_api_key):
            self._closed = True
            return False
        self._open_until = time.monotonic() + TRUST_S
        return True

    async def _caller_of_key(self, key: str) -> Caller:
        prefix, _, rest = key.partition("_")
        key_id, _, secret = rest.partition("_")
        if prefix != _PREFIX or not secret or len(key_id) > 64 or "\0" in key_id:
            raise _refused()
        trusted = self._recall(key_id) or await self._look_up(key_id)
        sent = sha256(secret.encode()).digest()
        # Compared with something also where there is nothing: neither answer comes sooner.
        if not hmac.compare_digest(sent, trusted.secret_hash if trusted else b"") or trusted is None:
            raise _refused()
        if trusted.expires <= time.time():
            raise _refused()
        return trusted.caller

    async def _look_up(self, key_id: str) -> _Trusted | None:
        stored = await self._ask_about(key_id, lambda connection: organizations.find_api_key(connection, key_id))
        if stored is None or stored.revoked_at is not None:
            self._trusted.pop(key_id, None)
            return None
        expires = float("inf") if stored.expires_at is None else stored.expires_at.timestamp()
        return self._trust(key_id, Caller(stored.organization, stored.roles), stored.secret_hash, expires)

    async def _caller_of_token(self, tokens: Tokens, token: str) -> Caller:
        digest = sha256(token.encode()).digest()
        trusted = self._recall(digest)
        if trusted is None:
            try:
                claims = await tokens.check(token)
            except BadToken as error:
                log.info("token refused", why=str(error))
                raise _refused() from None
            await self._require_organization(claims.organization)
            trusted = self._trust(digest, Caller(claims.organization, claims.roles), b"", claims.expires)
        if trusted.expires <= time.time():
            raise _refused()
        return trusted.caller

    async def _caller_of_certificate(self, names: Sequence[str]) -> Caller:
        if self._clients is None or not names:
            raise Unauthenticated(
                Reason.CREDENTIAL_MISSING, "This server needs a credential: send `authorization: Bearer <API key>`."
            )
        if time.monotonic() - self._clients_read_at > TRUST_S:
            self._clients_read_at = time.monotonic()
            self._clients.refresh()
        found = self._clients.find(names)
        if found is None:
            log.info("client certificate not known", names=names)
            raise _refused()
        await self._require_organization(found[0])
        return Caller(*found)

    async def _require_organization(self, name: str) -> None:
        """Refuse a credential that names an organization which does not exist."""
        key = ("organization", name)
        if self._recall(key) is not None:
            return
        if not name.isprintable() or not await self._ask_about(
            key, lambda connection: organizations.organization_exists(connection, name)
        ):
            # Whatever is in a name, it must not look like something else in the log.
            log.warning("a credential names an organization that does not exist", organization=ascii(name)[:100])
            raise _refused()
        self._trust(key, Caller(name), b"", float("inf"))

    def _recall(self, key: Hashable) -> _Trusted | None:
        trusted = self._trusted.get(key)
        return trusted if trusted is not None and time.monotonic() < trusted.until else None

    def _trust(self, key: Hashable, caller: Caller, secret_hash: bytes, expires: float) -> _Trusted:
        if len(self._trusted) >= _CACHE_MAX:
            now = time.monotonic()
            self._trusted = {one: known for one, known in self._trusted.items() if now < known.until}
        if len(self._trusted) >= _CACHE_MAX:
            self._trusted.clear()
        trusted = _Trusted(caller, secret_hash, time.monotonic() + TRUST_S, expires)
        self._trusted[key] = trusted
        return trusted

    async def _ask_about(self, key: Hashable, work: Callable[[AsyncConnection], Awaitable[Answer]]) -> Answer:
        # What was good lately does not wait behind what was never seen; and many calls with one credential, as of a
        # fleet that starts, are one look-up.
        if key in self._trusted or key in self._asking:
            return await self._ask(key, work)
        if self._strangers_waiting >= _STRANGERS_MAX:
            text = "Too many unknown credentials are being looked up; nothing was done."
            raise ResourceExhausted(Reason.OVERLOADED, text, retry_after_s=1)
        return await self._ask(key, work, stranger=True)

    async def _ask(
        self, key: Hashable, work: Callable[[AsyncConnection], Awaitable[Answer]], *, stranger: bool = False
    ) -> Answer:
        task: asyncio.Task[Answer] | None = self._asking.get(key)
        if task is None:
            self._strangers_waiting += stranger
            task = asyncio.create_task(self._in_turn(work) if stranger else self._database.look_up(work))
            self._asking[key] = task
            task.add_done_callback(lambda done: self._answered(key, done))
        # Shielded: a caller that leaves must not take the answer from those that wait with it.
        return await asyncio.shield(task)

    async def _in_turn(self, work: Callable[[AsyncConnection], Awaitable[Answer]]) -> Answer:
        """Look up what was never seen, after all that was asked before."""
        try:
            async with self._strangers:
                return await self._database.look_up(work)
        finally:
            self._strangers_waiting -= 1

    def _answered(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        del self._asking[key]
        if not task.cancelled():
            task.exception()  # if every caller left, nobody else fetches it


def _refused() -> Unauthenticated:
    return Unauthenticated(Reason.CREDENTIAL_INVALID, "The credential is not valid.")
