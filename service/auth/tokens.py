"""Owns JSON Web Tokens as credentials: whose signature is trusted, what a token must say, and the keys' freshness.

Needs the extra `jwt`.
"""

import asyncio
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import structlog

from service.domain.roles import Role

log = structlog.get_logger("metering.auth")

# Only such that a public key verifies: a secret shared with the issuer could sign tokens too.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
# How far the issuer's clock may be from ours.
LEEWAY_S = 30
# Keys are fetched again after so long; because of a key that is not known, not more often than that.
KEYS_AGE_S = 300.0
KEYS_RETRY_S = 60.0
# Keys that cannot be fetched any more are still used for so long.
KEYS_AGE_MAX_S = 24 * 3600.0
_KEYS_BYTES_MAX = 1024 * 1024
_FETCH_S = 5.0
# Whole answers, of whatever server, take no longer than this.
_FETCH_MAX_S = 10.0


class BadTokenSettings(Exception):
    """Tokens cannot be checked with these settings; the text says why."""


class BadToken(Exception):
    """A token is not valid; the text is for logs, and holds nothing of the token."""


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """Which tokens are taken: those of `issuer` for `audience`, signed by a key of `jwks` (a file or an https URL).

    The organization and the roles of the caller are what the two claims say.
    """

    issuer: str
    audience: str
    jwks: str
    algorithms: tuple[str, ...] = ("RS256", "ES256")
    organization_claim: str = "organization"
    roles_claim: str = "roles"


class Claims(NamedTuple):
    """What a valid token says."""

    organization: str
    roles: frozenset[Role]
    expires: float  # seconds since 1970, leeway included


class Tokens:
    """Checks tokens."""

    def __init__(self, settings: TokenSettings) -> None:
        """Prepare to check; raises BadTokenSettings. Keys are read by `start`."""
        try:
            import jwt
        except ImportError as error:
            raise BadTokenSettings("JSON Web Tokens need the extra: pip install 'metering[jwt]'") from error
        self._jwt = jwt
        self._settings = settings
        if unknown := sorted(set(settings.algorithms) - set(ALGORITHMS)) or not settings.algorithms:
            raise BadTokenSettings(f"the algorithm {unknown} is none of {', '.join(ALGORITHMS)}")
        try:
            url = urllib.parse.urlsplit(settings.jwks)
        except ValueError as error:
            raise BadTokenSettings(f"{settings.jwks} is neither a file nor a URL: {error}") from error
        if url.scheme == "http" and url.hostname not in {"localhost", "127.0.0.1", "::1"}:
            raise BadTokenSettings("keys that come by plain http could be anyone's: use https")
        self._is_url = url.scheme in {"http", "https"}
        self._opener = urllib.request.build_opener(_Stay)
        if url.scheme == "http":
            # A proxy in between could be anyone too.
            self._opener = urllib.request.build_opener(_Stay, urllib.request.ProxyHandler({}))
        # By id, and then by the algorithms that each is for.
        self._keys: Mapping[str | None, Mapping[str, Any]] = {}
        self._read_at = self._tried_at = float("-inf")
        self._reading = asyncio.Lock()

    async def start(self) -> None:
        """Read the keys; raises BadTokenSettings if they cannot be."""
        try:
            await self._read()
        except _NoKeysError as error:
            raise BadTokenSettings(f"the keys at {self._settings.jwks} cannot be used: {error}") from error

    async def check(self, token: str) -> Claims:
        """Return what a token says; raises BadToken."""
        try:
            header = self._jwt.get_unverified_header(token)
        except self._jwt.PyJWTError as error:
            raise BadToken(type(error).__name__) from None
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in self._settings.algorithms:
            raise BadToken("its algorithm is not one that is taken")
        key = (await self._key(kid)).get(algorithm)
        if key is None:
            raise BadToken("its key is for another algorithm")
        try:
            claims = self._jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._settings.audience,
                issuer=self._settings.issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iat", "iss", "aud", "sub"], "strict_aud": False},
            )
        except self._jwt.PyJWTError as error:
            raise BadToken(type(error).__name__) from None
        return self._claims(claims)

    def _claims(self, claims: Mapping[str, Any]) -> Claims:
        organization, roles = claims.get(self._settings.organization_claim), claims.get(self._settings.roles_claim)
        if isinstance(roles, str):
            roles = roles.split()
        if not isinstance(organization, str) or not organization:
            raise BadToken(f"its claim {self._settings.organization_claim} is no organization")
        # Roles of other services may be among them.
        named = roles if isinstance(roles, list) else []
        known = frozenset(role for role in Role if role in named)
        if not known:
            raise BadToken(f"its claim {self._settings.roles_claim} has none of {', '.join(Role)}")
        try:
            expires = float(claims["exp"])
        except OverflowError:
            raise BadToken("its claim exp is no time") from None
        return Claims(organization, known, expires + LEEWAY_S)

    async def _key(self, kid: Any) -> Mapping[str, Any]:
        unknown = isinstance(kid, str) and kid not in self._keys
        outdated = unknown or time.monotonic() - self._read_at >= KEYS_AGE_S
        # While they are read, only calls that may need the new ones wait for them.
        if outdated and (time.monotonic() - self._tried_at >= KEYS_RETRY_S or (unknown and self._reading.locked())):
            await self._refresh()
        if time.monotonic() - self._read_at > KEYS_AGE_MAX_S:
            raise BadToken("the keys are too old")
        if isinstance(kid, str):
            key = self._keys.get(kid)
        else:
            # A token may leave its key unsaid where there is only one.
            key = next(iter(self._keys.values())) if len(self._keys) == 1 else None
        if key is None:
            raise BadToken("its key is not known")
        return key

    async def _refresh(self) -> None:
        async with self._reading:
            if time.monotonic() - self._tried_at < KEYS_RETRY_S:
                return  # another call did it meanwhile
            try:
                await self._read()
            except _NoKeysError as error:
                log.warning("keys of tokens could not be read again; the last ones are used", error=str(error))

    async def _read(self) -> None:
        self._tried_at = time.monotonic()
        try:
            async with asyncio.timeout(_FETCH_MAX_S):
                text = await asyncio.to_thread(self._fetch)
            found = self._usable(json.loads(text)["keys"])
        # A server that speaks no HTTP, and what nests too deep, are such as well.
        except (OSError, http.client.HTTPException) as error:
            raise _NoKeysError(str(error) or type(error).__name__) from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _NoKeysError("it is not a JSON Web Key Set") from error
        if not found:
            raise _NoKeysError(f"there is no key that verifies signatures by {', '.join(self._settings.algorithms)}")
        self._keys, self._read_at = found, time.monotonic()

    def _usable(self, keys: Any) -> dict[str | None, dict[str, Any]]:
        """Return the keys of a set that verify signatures as they are taken."""
        found: dict[str | None, dict[str, Any]] = {}
        for one in keys:
            # Keys for encryption, and of kinds not known here, are no fault.
            if one.get("use", "sig") != "sig" or one.get("kty") == "oct":
                continue
            if "d" in one:
                raise _NoKeysError("it holds a private key, which nobody but the issuer should have")
            # A key that does not say what it is for may be for any algorithm of its kind.
            unsaid = one.get("kty") == "RSA" and one.get("alg") is None
            for algorithm in self._settings.algorithms:
                if unsaid and not algorithm.startswith(("RS", "PS")):
                    continue
                try:
                    key = self._jwt.PyJWK(one, algorithm if unsaid else None)
                except (self._jwt.PyJWTError, NotImplementedError):
                    continue
                # RSA keys of under 2048 bits are too short.
                if key.algorithm_name == algorithm and not key.Algorithm.check_key_length(key.key):
                    found.setdefault(one.get("kid"), {})[algorithm] = key
        return found

    def _fetch(self) -> bytes:
        if self._is_url:
            # The scheme was checked; the address is the operator's, never a token's nor a redirection's.
            try:
                with self._opener.open(self._settings.jwks, timeout=_FETCH_S) as answer:
                    text: bytes = answer.read(_KEYS_BYTES_MAX + 1)
            except urllib.error.HTTPError as error:
                error.close()  # it holds the connection
                raise
        else:
            with open(self._settings.jwks, "rb") as file:
                text = file.read(_KEYS_BYTES_MAX + 1)
        if len(text) > _KEYS_BYTES_MAX:
            raise _NoKeysError("it is too large")
        return text


class _NoKeysError(Exception):
    pass


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Take what is answered as an error: keys come from where the operator said."""
