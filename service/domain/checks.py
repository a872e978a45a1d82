"""Owns the checks that fields of many kinds share: required, length, characters, ids."""

import re
import uuid
from collections.abc import Mapping

from service.errors import Reason, Violation
from service.limits import limit

# An index entry may have 2,700 bytes. At most it holds an identifier, of 4 bytes a character, beside an organization
# (63), the id of an entitlement (144) and some 60 bytes of ids, digests and times.
IDENTIFIER_MAX = limit(
    "IDENTIFIER_CHARACTERS",
    128,
    most=256,
    about="characters of the id of an event, a customer key, an event type, a key or name that metrics and records use",
    field="customer.ingest_aliases[0]",
)
NAME_MAX = limit(
    "NAME_CHARACTERS",
    160,
    most=256,
    about="characters of the name of a customer, metric, product or entitlement",
    field="customer.name",
)
TEXT_BYTES_MAX = limit(
    "TEXT_BYTES",
    1024,
    most=4096,
    about="bytes of UTF-8 of a text: in properties, filters, custom fields and meta_info",
    field="customer.custom_fields.note",
)
CUSTOM_FIELDS_MAX = limit(
    "CUSTOM_FIELDS", 64, most=64, about="custom fields of a customer or metric", field="customer.custom_fields"
)

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def is_plain(value: str) -> bool:
    """Say whether a text is an identifier without a fault; some that are not plain have none either."""
    return 0 < len(value) <= IDENTIFIER_MAX and value.isprintable() and not value.isspace()


def identifier(field: str, value: str, *, most: int = IDENTIFIER_MAX) -> Violation | None:
    """Check a required id-like string: 1..`most` characters, no control characters, not only blanks."""
    if not value:
        return Violation(field, Reason.FIELD_REQUIRED, f"is required: 1..{most} characters")
    if len(value) > most:
        return Violation(field, Reason.LIMIT_EXCEEDED, f"has {len(value)} characters; at most {most} are allowed")
    # Printable and not blank is the normal case; only what is not needs the closer look.
    if not value.isprintable() and _CONTROL.search(value):
        return Violation(field, Reason.FIELD_INVALID, "must not contain control characters")
    if value.isspace():
        return Violation(field, Reason.FIELD_INVALID, "must not be only blanks")
    return None


def text(field: str, value: str) -> Violation | None:
    """Check free text: its bytes of UTF-8, and no NUL (Postgres cannot store one)."""
    if len(value) > TEXT_BYTES_MAX or (not value.isascii() and len(value.encode()) > TEXT_BYTES_MAX):
        return Violation(field, Reason.LIMIT_EXCEEDED, f"is longer than {TEXT_BYTES_MAX} bytes of UTF-8")
    if "\0" in value:
        return Violation(field, Reason.FIELD_INVALID, "must not contain a NUL character")
    return None


def custom_fields(field: str, values: Mapping[str, str]) -> list[Violation]:
    """Check a map of the caller's notes: not too many entries, names as identifiers, values as text."""
    if len(values) > CUSTOM_FIELDS_MAX:
        message = f"has {len(values)} entries; at most {CUSTOM_FIELDS_MAX} are allowed"
        return [Violation(field, Reason.LIMIT_EXCEEDED, message)]
    faults = []
    for name, value in values.items():
        faults += [identifier(f"{field} key", name), text(f"{field}.{name}", value)]
    return [fault for fault in faults if fault]


def as_uuid(field: str, value: str) -> uuid.UUID | Violation:
    """Read a required UUID in its 36-character form, any letter case."""
    if not value:
        return Violation(field, Reason.FIELD_REQUIRED, "is required: a UUID")
    if not _UUID.fullmatch(value):
        return Violation(field, Reason.FIELD_INVALID, "must be a UUID such as 04ca7e72-4229-4a6e-ab11-9f7376fccbcb")
    return uuid.UUID(value)


def customer_key(value: str) -> str:
    """Return the form in which a customer key is stored and compared: UUIDs in lower case, all else as sent."""
    return value.lower() if len(value) == 36 and _UUID.fullmatch(value) else value
