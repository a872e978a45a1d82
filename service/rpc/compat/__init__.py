"""The APIs of other services, told in ours. Here is what they share: lenient times, choices, ids, and words.

A JSON transcoder in front (deploy/envoy) turns paths and queries into messages and hands bodies over raw. Servicers
here translate and call the native servicers; no rule is judged twice.
"""

import contextlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue, Value

from service.errors import InvalidArgument, Reason, Violation, invalid
from service.limits import limit
from service.rpc.interceptor import Context, organization

_IDEMPOTENCY_KEY = "idempotency-key"
_IDEMPOTENCY_KEY_MAX = limit(
    "IDEMPOTENCY_KEY_CHARACTERS",
    255,
    most=255,
    about="characters of an Idempotency-Key header",
    field="Idempotency-Key",
    error="INVALID_ARGUMENT, FIELD_INVALID",
)
_IDS = uuid.UUID("b7f9a1f4-7b0e-5c3b-9a54-0c5d5f0c7c1e")
# A date and a time as RFC 3339 has them, but the offset may be missing, and a blank may stand for the T.
_INSTANT = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?\s*([Zz]|[+-]\d\d:\d\d)?", re.ASCII)
# A name in a field path; what callers named themselves (in quotes, or below these fields) is kept as one piece.
_PATH_NAME = re.compile(r"""(?:properties|custom_fields|records)\..*|'[^']*'|"[^"]*"|[a-z][a-z_]*""", re.DOTALL)
# The same in a text; what is quoted is the caller's.
_TEXT_NAME = re.compile(r"""'[^']*'|"[^"]*"|[a-z]+(?:_[a-z]+)+""")


def number_or_null(decimal: str | None) -> Value:
    """Write a decimal as a JSON number, rounded to a double; None as null."""
    return Value(null_value=0) if decimal is None else Value(number_value=float(decimal))  # type: ignore[arg-type]


def text_or_null(text: str | None) -> Value:
    """Write a string; None or an empty one as null."""
    return Value(string_value=text) if text else Value(null_value=0)  # type: ignore[arg-type]


def read_instant(path: str, text: str, faults: list[Violation]) -> datetime | None:
    """Read an optional time in RFC 3339, UTC if it has no offset; notes what is wrong with it.

    Metronome's own examples send times without an offset (document 001).
    """
    if not text:
        return None
    found = _INSTANT.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        day, time, fraction, offset = found.groups()
        zone = "+00:00" if offset is None or offset in "Zz" else offset
        return datetime.fromisoformat(f"{day}T{time}.{(fraction or '0'):0<6.6}{zone}").astimezone(UTC)
    except (ValueError, OverflowError):
        message = "must be a time in RFC 3339, such as 2026-01-31T12:00:00Z"
        faults.append(Violation(path, Reason.FIELD_INVALID, message))
        return None


def read_texts(path: str, sent: ListValue, faults: list[Violation]) -> list[str]:
    """Read a list that must hold nothing but strings; notes it when it holds something else."""
    if any(one.WhichOneof("kind") != "string_value" for one in sent.values):
        faults.append(Violation(path, Reason.FIELD_INVALID, "must be a list of strings"))
        return []
    return [one.string_value for one in sent.values]


def read_choice(path: str, text: str, values: Iterable[tuple[str, int]], faults: list[Violation]) -> Any:
    """Read the name of an enum value, without its prefix, in any letter case; 0 if it is empty.

    `values` are those of the proto enum, the unspecified first. Notes it when there is no such value.
    """
    if not text:
        return 0
    names = dict(values)
    prefix = next(iter(names)).removesuffix("UNSPECIFIED")
    found = names.get(f"{prefix}{text.upper()}", 0)
    if not found:
        known = ", ".join(name.removeprefix(prefix) for name, number in names.items() if number)
        faults.append(Violation(path, Reason.FIELD_INVALID, f"must be one of {known}"))
    return found


def read_limit(message: Message, default: int, most: int) -> int:
    """Read the `limit` of a list call; raises InvalidArgument."""
    if not message.HasField("limit"):
        return default
    limit: int = getattr(message, "limit")  # noqa: B009  # the message is of any kind
    if not 1 <= limit <= most:
        raise invalid("limit", Reason.FIELD_INVALID, f"is {limit} and must be 1..{most:,}")
    return limit


def chosen_id(context: Context, *what: object) -> str:
    """Return the id for something new: by the call's `Idempotency-Key` and `what` it is, or else a new one.

    The same key gives the same id, so that a retry meets what the first call stored.
    """
    sent = [value for name, value in context.invocation_metadata() or () if name == _IDEMPOTENCY_KEY]
    if not sent:
        return str(uuid.uuid4())
    key = sent[0] if isinstance(sent[0], str) else ""
    if not key.strip() or len(key) > _IDEMPOTENCY_KEY_MAX or len(sent) > 1:
        text = f"must be one header of 1..{_IDEMPOTENCY_KEY_MAX} characters"
        raise invalid("Idempotency-Key", Reason.FIELD_INVALID, text)
    return str(uuid.uuid5(_IDS, json.dumps([organization(), key, *map(str, what)])))


def names_of(*kinds: type[Message]) -> dict[str, str]:
    """Return the JSON names of all fields of message types, by their names in the proto file."""
    return {field.name: field.json_name for kind in kinds for field in kind.DESCRIPTOR.fields}


@contextlib.contextmanager
def in_their_words(names: Mapping[str, str], prefixes: Sequence[str] = ()) -> Iterator[None]:
    """Give field paths and texts of errors that the block raises in the caller's names.

    `prefixes` of native paths are left out, and each name in a path is looked up in `names`; in texts, those that no
    one takes for a word.
    """
    try:
        yield
    except InvalidArgument as error:
        faults = [
            replace(
                one,
                field=their_path(one.field, names, prefixes),
                message=_TEXT_NAME.sub(lambda found: names.get(found[0], found[0]), one.message),
            )
            for one in error.violations
        ]
        raise InvalidArgument(faults) from error


def their_path(path: str, names: Mapping[str, str], prefixes: Sequence[str] = ()) -> str:
    """Return a native field path as the caller knows it."""
    # Lists in maps need a message around them, which no caller wrote.
    path = path.replace(".allocations[", "[")
    for prefix in prefixes:
        path = path.removeprefix(prefix)

    def theirs(found: re.Match[str]) -> str:
        name, dot, chosen = found[0].partition(".")
        return f"{names.get(name, name)}{dot}{chosen}"

    return _PATH_NAME.sub(theirs, path) or "body"
