"""The APIs of other services, told in ours: here is what they share. JSON bodies in and out, lenient times, ids.

A JSON transcoder in front (deploy/envoy) turns paths and queries into messages and hands bodies over raw. Servicers
here translate and call the native servicers; no rule is judged twice.
"""

import asyncio
import contextlib
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

from google.api.httpbody_pb2 import HttpBody
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue, Value

from service.domain import quantities
from service.errors import InvalidArgument, Reason, Violation, invalid
from service.rpc.interceptor import Context, organization
from service.rpc.wire import in_slices

M = TypeVar("M", bound=Message)
T = TypeVar("T")
V = TypeVar("V")

_JSON = "application/json"
# The package of Struct and Value, which take numbers wherever they stand.
_ANY_JSON = "google.protobuf"
# A larger document is read in a thread: it would keep other calls waiting. Few at a time, as one of 4 MB of small
# objects takes a hundred while it is read.
_AT_ONCE_BYTES = 32 * 1024
_READERS = ThreadPoolExecutor(2, thread_name_prefix="json")
# Digits of a number that is kept as a string because no double holds it; more are no quantity of ours either.
_EXPONENT_MAX = 400
_IDEMPOTENCY_KEY = "idempotency-key"
_IDEMPOTENCY_KEY_MAX = 255
_IDS = uuid.UUID("b7f9a1f4-7b0e-5c3b-9a54-0c5d5f0c7c1e")
# A date and a time as RFC 3339 has them, but the offset may be missing, and a blank may stand for the T.
_INSTANT = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?\s*([Zz]|[+-]\d\d:\d\d)?", re.ASCII)
_UNKNOWN_FIELD = re.compile(r'has no field named "([^"]*)"')
_PATH_NAME = re.compile(r"[a-z][a-z_]*")


class _Digits(str):
    """A JSON number that is kept as the string of its digits."""

    __slots__ = ()


def _number(text: str) -> int | float | str:
    """Read a JSON number: as it is if a double holds exactly this decimal, else as the string of its digits."""
    double = float(text)
    try:
        sent = Decimal(text)
        if Decimal(quantities.from_double(double)) == sent:
            return int(double) if double.is_integer() else double
    except (quantities.NotExact, InvalidOperation):
        return _Digits(text if "e" in text.lower() and _is_huge(text) else quantities.plain(Decimal(text)))
    return _Digits(quantities.plain(sent) if not _is_huge(text) else text)


def _is_huge(text: str) -> bool:
    """Whether writing a number out would take more digits than any quantity has."""
    try:
        return abs(Decimal(text).adjusted()) > _EXPONENT_MAX
    except InvalidOperation:
        return True


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


def _parse(data: bytes) -> Any:
    return json.loads(
        data.decode("utf-8"),
        parse_float=_number,
        parse_int=_number,
        parse_constant=_no_constant,
        object_pairs_hook=_object,
    )


async def read_object(body: HttpBody, kind: type[M]) -> M:
    """Read a body that is one JSON object; raises InvalidArgument, also for fields that `kind` does not have."""
    return await _aside(body, lambda: _message(_document(body, dict, "a JSON object"), kind, ""))


async def read_array(body: HttpBody, kind: type[M], most: int) -> list[M]:
    """Read a body that is a JSON array of 1..`most` objects; raises InvalidArgument."""

    def read() -> list[M]:
        items = _document(body, list, f"a JSON array of 1..{most:,} objects")
        if not 1 <= len(items) <= most:
            raise invalid("body", Reason.LIMIT_EXCEEDED, f"has {len(items):,} items; it must have 1..{most:,}")
        return [_message(one, kind, f"[{i}]") for i, one in enumerate(items)]

    return await _aside(body, read)


async def _aside(body: HttpBody, read: Callable[[], T]) -> T:
    """Read a body at once if it is small, else where it keeps no other call waiting."""
    if len(body.data) <= _AT_ONCE_BYTES:
        return read()
    return await asyncio.get_running_loop().run_in_executor(_READERS, read)


def _document(body: HttpBody, shape: type, what: str) -> Any:
    """Parse a body; raises InvalidArgument unless it is JSON of the kind wanted."""
    if not body.data.strip():
        raise invalid("body", Reason.FIELD_REQUIRED, f"is required: {what}")
    try:
        document = _parse(body.data)
    except UnicodeDecodeError:
        raise invalid("body", Reason.MALFORMED_REQUEST, "is not UTF-8") from None
    except RecursionError:
        raise invalid("body", Reason.MALFORMED_REQUEST, "is nested too deeply") from None
    except ValueError as error:
        raise invalid("body", Reason.MALFORMED_REQUEST, f"is not JSON: {error}") from None
    if not isinstance(document, shape):
        raise invalid("body", Reason.MALFORMED_REQUEST, f"must be {what}")
    return document


def _message(document: Any, kind: type[M], path: str) -> M:
    if not isinstance(document, dict):
        raise invalid(path or "body", Reason.MALFORMED_REQUEST, "must be a JSON object")
    _refuse_digits(document, kind.DESCRIPTOR, path)
    try:
        return json_format.ParseDict(document, kind())
    except json_format.ParseError as error:
        raise _unreadable(path, kind, str(error)) from None
    except (ValueError, TypeError, RecursionError):
        raise invalid(path or "body", Reason.MALFORMED_REQUEST, "has a value of a wrong type") from None


def _refuse_digits(document: dict[str, Any], kind: Descriptor, path: str) -> None:
    """Raise InvalidArgument where a string is wanted and a number stands, which protobuf's reader takes for one."""
    for field in kind.fields:
        value = document.get(field.json_name)
        if value is None:
            continue
        of_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        inner = field.message_type.fields_by_name["value"] if of_map else field
        values = (
            value.values() if isinstance(value, dict) and of_map else value if isinstance(value, list) else (value,)
        )
        for one in values:
            if isinstance(one, _Digits) and inner.type == FieldDescriptor.TYPE_STRING:
                place = ".".join(part for part in (path, field.json_name) if part)
                raise invalid(place, Reason.FIELD_INVALID, "must be a string")
            if (
                isinstance(one, dict)
                and inner.message_type is not None
                and inner.message_type.file.package != _ANY_JSON
            ):
                _refuse_digits(one, inner.message_type, ".".join(part for part in (path, field.json_name) if part))


def _unreadable(path: str, kind: type[Message], said: str) -> InvalidArgument:
    """Say what protobuf's reader found, in the caller's words."""
    if unknown := _UNKNOWN_FIELD.search(said):
        known = ", ".join(field.json_name for field in kind.DESCRIPTOR.fields)
        within = re.search(r'at "[^".]*\.?([^"]*)"', said)
        place = ".".join(part for part in (path, within[1] if within else "", unknown[1][:128]) if part)
        text = "is not a field that is supported here" + ("" if within and within[1] else f"; there are {known}")
        return invalid(place, Reason.FIELD_INVALID, text)
    field = re.match(r"Failed to parse (\w+) field: ", said)
    place = ".".join(part for part in (path, field[1] if field else "") if part) or "body"
    wanted = "must be a string" if "expected string" in said else "has a value of a wrong type"
    return invalid(place, Reason.FIELD_INVALID, wanted)


def answer(document: Any) -> HttpBody:
    """Write a body."""
    return HttpBody(content_type=_JSON, data=_written(document).encode())


async def answer_all(values: Iterable[V], write: Callable[[V], Message]) -> HttpBody:
    """Write a body that is a JSON array of messages, letting other calls have the event loop now and then."""
    parts = await in_slices(lambda one: _written(json_of(write(one))), values)
    return HttpBody(content_type=_JSON, data=f"[{','.join(parts)}]".encode())


def _written(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def json_of(message: Message) -> dict[str, Any]:
    """Return a message as JSON-ready values, as the transcoder would write it; whole numbers without a point."""
    document: dict[str, Any] = _plain(json_format.MessageToDict(message, always_print_fields_with_no_presence=True))
    return document


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(one) for key, one in value.items()}
        case list():
            return [_plain(one) for one in value]
        case float() if value.is_integer() and abs(value) <= quantities.INTEGER_MAX:
            return int(value)
        case _:
            return value


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
    """Give field paths of errors that the block raises as the caller knows them.

    `prefixes` of native paths are left out, and each name in a path is looked up in `names`.
    """
    try:
        yield
    except InvalidArgument as error:
        raise InvalidArgument(
            [replace(one, field=their_path(one.field, names, prefixes)) for one in error.violations]
        ) from error


def their_path(path: str, names: Mapping[str, str], prefixes: Sequence[str] = ()) -> str:
    """Return a native field path as the caller knows it."""
    for prefix in prefixes:
        path = path.removeprefix(prefix)
    return _PATH_NAME.sub(lambda name: names.get(name[0], name[0]), path) or "body"
