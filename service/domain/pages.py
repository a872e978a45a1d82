"""Owns page and resume tokens: what they carry, how they are signed, and when one is refused."""

import base64
import binascii
import hmac
import json
from collections.abc import Mapping
from hashlib import blake2b, sha256
from typing import Any

from service.errors import InvalidArgument, Reason, Violation, invalid
from service.limits import limit

PAGE_SIZE_MAX = limit(
    "PAGE_SIZE",
    1_000,
    most=1_000,
    about="rows of a page of anything but usage; who asks for more gets as many",
    field="page_size",
    error="",
)
PAGE_SIZE_DEFAULT = limit(
    "PAGE_SIZE_DEFAULT",
    min(100, PAGE_SIZE_MAX),
    most=PAGE_SIZE_MAX,
    about="rows of such a page if the call does not say (of usage record groups: PAGE_SIZE)",
    field="page_size",
    error="",
)
SKIP_MAX = limit(
    "SKIP",
    1_000_000,
    most=1_000_000,
    about="rows that a page may leave out before it begins",
    field="skip",
    error="INVALID_ARGUMENT, FIELD_INVALID",
)
_SIGNATURE_BYTES = 16
# A token may have to name the last group of a page, whose values can be 16 KiB of JSON within JSON.
_TOKEN_CHARACTERS_MAX = 64 * 1024


def fingerprint(query: bytes) -> str:
    """Return a short digest of a query, by which a token is bound to it."""
    return blake2b(query, digest_size=12).hexdigest()


def encode(key_id: int, secret: bytes, scope: str, state: Mapping[str, Any]) -> str:
    """Make a token of a JSON-ready state. `scope` names the organization, the method and the query it belongs to."""
    body = key_id.to_bytes(4, "big") + json.dumps(state, separators=(",", ":"), ensure_ascii=False).encode()
    return base64.urlsafe_b64encode(body + _signature(secret, scope, body)).rstrip(b"=").decode()


def key_id(field: str, token: str) -> int:
    """Return the id of the secret that a token says it was signed with; raises InvalidArgument on garbage."""
    return int.from_bytes(_raw(field, token)[:4], "big")


def decode(field: str, token: str, secret: bytes, scope: str) -> dict[str, Any]:
    """Return the state of a token made by `encode` with the same secret and scope; raises InvalidArgument else."""
    raw = _raw(field, token)
    body, signature = raw[:-_SIGNATURE_BYTES], raw[-_SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _signature(secret, scope, body)):
        raise refused(field)
    state: dict[str, Any] = json.loads(body[4:])
    return state


def refused(field: str) -> InvalidArgument:
    """Build the error for a token that is not ours; the same whatever is wrong with it."""
    source = "next_page_token of the page" if field == "page_token" else "resume_token of the message"
    message = f"is not a token of this query; take {source} before as it is, with the same request"
    return InvalidArgument([Violation(field, Reason.PAGE_TOKEN_INVALID, message)])


def page_size(requested: int, default: int = PAGE_SIZE_DEFAULT, most: int = PAGE_SIZE_MAX) -> int:
    """Return the page size to use: 0 = default, above the maximum = the maximum; raises InvalidArgument if negative."""
    if requested < 0:
        raise invalid("page_size", Reason.FIELD_INVALID, f"must not be negative; 0 means {default}, at most {most}")
    return min(requested or default, most)


def skip_violation(requested: int) -> Violation | None:
    """Say what is wrong with the number of rows to leave out before a page; None if nothing is."""
    if 0 <= requested <= SKIP_MAX:
        return None
    return Violation("skip", Reason.FIELD_INVALID, f"must be 0..{SKIP_MAX:,}; page_token leads anywhere")


def _raw(field: str, token: str) -> bytes:
    if len(token) > _TOKEN_CHARACTERS_MAX:
        raise refused(field)
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise refused(field) from None
    # One encoding per token: the spare bits of the last character must not say anything.
    if len(raw) <= 4 + _SIGNATURE_BYTES or base64.urlsafe_b64encode(raw).rstrip(b"=").decode() != token:
        raise refused(field)
    return raw


def _signature(secret: bytes, scope: str, body: bytes) -> bytes:
    head = len(scope.encode()).to_bytes(4, "big") + scope.encode()
    return hmac.digest(secret, head + body, sha256)[:_SIGNATURE_BYTES]
