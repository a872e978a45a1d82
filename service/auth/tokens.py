"""Owns JSON Web Tokens as credentials: whose signature is trusted, what a token must say, and the keys' freshness.

Needs the extra `jwt`.
"""

import asyncio
import json
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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
        url = urllib.parse.urlsplit(settings.jwks)
        if url.scheme == "http" and url.hostname not in {"localhost", "127.0.0.1", "::1"}:
            raise BadTokenSettings("keys that come by plain http could be anyone's: use https")
        self._is_url = url.scheme in {"http", "https"}
        self._keys: Mapping[str | None, Any] = {}
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
        key = await self._key(kid)
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
        known = frozenset(Role(role) for role in roles if role in set(Role)) if isinstance(roles, list) else frozenset()
        if not known:
            raise BadToken(f"its claim {self._settings.roles_claim} has none of {', '.join(Role)}")
        return Claims(organization, known, float(claims["exp"]) + LEEWAY_S)

    async def _key(self, kid: Any) -> Any:
        age = time.monotonic() - self._read_at
        since = time.monotonic() - self._tried_at
        if kid not in self._keys if isinstance(kid, str) else len(self._keys) != 1:
            if isinstance(kid, str) and since >= KEYS_RETRY_S:
                await self._refresh()
        elif age >= KEYS_AGE_S and since >= KEYS_RETRY_S:
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
        text = await asyncio.to_thread(self._fetch)
        try:
            found = json.loads(text)
            keys = {}
            for one in found["keys"]:
                # Keys for encryption, and of kinds not known here, are no fault.
                if one.get("use", "sig") != "sig" or one.get("kty") == "oct":
                    continue
                try:
                    key = self._jwt.PyJWK(one)
                except self._jwt.PyJWTError:
                    continue
                keys[one.get("kid")] = key
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _NoKeysError("it is not a JSON Web Key Set") from error
        if not keys:
            raise _NoKeysError("there is no key that verifies signatures")
        self._keys, self._read_at = keys, time.monotonic()

    def _fetch(self) -> bytes:
        try:
            if self._is_url:
                # The scheme was checked; the address is the operator's, never a token's nor a redirection's.
                with urllib.request.build_opener(_Stay).open(self._settings.jwks, timeout=_FETCH_S) as answer:
                    text: bytes = answer.read(_KEYS_BYTES_MAX + 1)
            else:
                text = Path(self._settings.jwks).read_bytes()
        except OSError as error:
            raise _NoKeysError(str(error)) from error
        if len(text) > _KEYS_BYTES_MAX:
            raise _NoKeysError("it is too large")
        return text


class _NoKeysError(Exception):
    pass


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Take what is answered as an error: keys come from where the operator said."""
