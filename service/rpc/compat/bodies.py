"""Owns the JSON bodies of other services' APIs: numbers stay exact, what is unknown is refused, much is read aside."""

import asyncio
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

from google.api.httpbody_pb2 import HttpBody
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from service.domain import quantities
from service.domain.events import NESTING_MAX
from service.errors import InvalidArgument, Reason, invalid
from service.limits import limit
from service.rpc.interceptor import Context
from service.rpc.wire import in_slices

M = TypeVar("M", bound=Message)
T = TypeVar("T")
V = TypeVar("V")

_JSON = "application/json"
# How a body is encoded, as deploy/envoy calls it: gRPC must not take it for an encoding of its own.
_CODING = "x-body-encoding"
_BODY_BYTES_MAX = limit(
    "JSON_BODY_BYTES", 4 * 1024 * 1024, most=4 * 1024 * 1024, about="bytes of a JSON body, unpacked", field="body"
)
# Of an answer; Envoy passes twice as much on.
ANSWER_BYTES_MAX = 16 * 1024 * 1024
# Parts that were packed apart and put together; each costs a copy of what follows.
_MEMBERS_MAX = limit(
    "JSON_GZIP_PARTS", 16, most=16, about="parts of a JSON body that were packed apart and put together", field="body"
)
# A larger document is read in a thread: it would keep other calls waiting. Few at a time, as one takes many times its
# size in memory while it is read; and so a document may have only so many values, and a list so many items.
_AT_ONCE_BYTES = 32 * 1024
_READERS = ThreadPoolExecutor(2, thread_name_prefix="json")
_VALUES_MAX = limit("JSON_VALUES", 250_000, most=250_000, about="values of a JSON body", field="body")
_ITEMS_MAX = limit(
    "JSON_ITEMS", 10_000, most=10_000, about="items of a list in a JSON body", field="event_type_filter.in_values"
)
# Messages in each other, where an object of any JSON takes two (and three when protobuf reads them back, of its 100).
_NESTING_MAX = 60
# The package of Struct and Value, which take numbers wherever they stand.
_ANY_JSON = "google.protobuf"
# Digits of a number that is kept as a string because no double holds it; more are no quantity of ours either.
_EXPONENT_MAX = 400
_NAME_SHOWN = 128
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_CONDITIONS = {"in_values", "not_in_values"}


class _Digits(str):
    """A JSON number that is kept as the string of its digits."""

    __slots__ = ()


async def read_object(context: Context, body: HttpBody, kind: type[M], *, required: Sequence[str] = ()) -> M:
    """Read the body of a call that is one JSON object.

    Raises InvalidArgument, also for fields that `kind` does not have and for `required` ones that are missing.
    """

    def read() -> M:
        document = _document(body, coding, dict, "a JSON object")
        for name in required:
            if document.get(name) is None:
                raise invalid(name, Reason.FIELD_REQUIRED, "is required")
        return _message(document, kind, "")

    coding = _coding(context)
    return await _aside(body, coding, read)


async def read_array(context: Context, body: HttpBody, kind: type[M], most: int) -> list[M]:
    """Read the body of a call that is a JSON array of 1..`most` objects; raises InvalidArgument."""

    def read() -> list[M]:
        items = _document(body, coding, list, f"a JSON array of 1..{most:,} objects")
        if not 1 <= len(items) <= most:
            raise invalid("body", Reason.LIMIT_EXCEEDED, f"has {len(items):,} items; it must have 1..{most:,}")
        return [_message(one, kind, f"[{i}]") for i, one in enumerate(items)]

    coding = _coding(context)
    return await _aside(body, coding, read)


def _coding(context: Context) -> str:
    """Return how a body is encoded: what Envoy's filter made of `content-encoding`."""
    return next((str(value) for name, value in context.invocation_metadata() or () if name == _CODING), "")


async def _aside(body: HttpBody, coding: str, read: Callable[[], T]) -> T:
    """Read a body at once if it is small, else where it keeps no other call waiting."""
    if len(body.data) <= _AT_ONCE_BYTES and not coding:
        return read()
    return await asyncio.get_running_loop().run_in_executor(_READERS, read)


def _document(body: HttpBody, coding: str, shape: type, what: str) -> Any:
    """Parse a body; raises InvalidArgument unless it is JSON of the kind wanted."""
    data = _unzipped(body.data) if coding == "gzip" else body.data
    if len(data) > _BODY_BYTES_MAX:
        raise _too_large()
    if not data.strip():
        raise invalid("body", Reason.FIELD_REQUIRED, f"is required: {what}")
    if not body.content_type:
        # A web page may send such a body to any server, unasked.
        raise invalid("content-type", Reason.FIELD_REQUIRED, "is required: application/json")
    # Marks stand between values, so there are no more values than this; in strings they count too.
    if sum(data.count(mark) for mark in b"[{,") > _VALUES_MAX:
        raise invalid("body", Reason.LIMIT_EXCEEDED, f"may have more than {_VALUES_MAX:,} values; split it")
    try:
        document = _parse(data)
        if _SURROGATE.search(data):
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # Neither a protobuf string nor an answer can hold it.
        raise invalid("body", Reason.MALFORMED_REQUEST, "has half of a surrogate pair, which is no character") from None
    except UnicodeDecodeError:
        raise invalid("body", Reason.MALFORMED_REQUEST, "is not UTF-8") from None
    except RecursionError:
        raise invalid("body", Reason.MALFORMED_REQUEST, "is nested too deeply") from None
    except ValueError as error:
        raise invalid("body", Reason.MALFORMED_REQUEST, f"is not JSON: {error}") from None
    if not isinstance(document, shape):
        raise invalid("body", Reason.MALFORMED_REQUEST, f"must be {what}")
    return document


def _unzipped(data: bytes) -> bytes:
    """Unpack gzip, all members of it, each checked by its sum; raises InvalidArgument."""
    unzipped = b""
    try:
        for _ in range(_MEMBERS_MAX):
            member = zlib.decompressobj(wbits=31)
            unzipped += member.decompress(data, _BODY_BYTES_MAX + 1 - len(unzipped))
            if len(unzipped) > _BODY_BYTES_MAX or member.unconsumed_tail:
                raise _too_large()
            if not member.eof:
                raise zlib.error
            data = member.unused_data
            if not data:
                return unzipped
    except zlib.error:
        raise invalid("body", Reason.MALFORMED_REQUEST, "is not valid gzip, or not all of it came") from None
    raise invalid("body", Reason.LIMIT_EXCEEDED, f"has more than {_MEMBERS_MAX} parts of gzip")


def _too_large() -> InvalidArgument:
    return invalid("body", Reason.LIMIT_EXCEEDED, f"is larger than {_BODY_BYTES_MAX:,} bytes, unpacked")


def _parse(data: bytes) -> Any:
    return json.loads(
        data.decode("utf-8"),
        parse_float=_number,
        parse_int=_number,
        parse_constant=_no_constant,
        object_pairs_hook=_object,
    )


def _number(text: str) -> int | float | str:
    """Read a JSON number: as it is if a double holds exactly this decimal, else as the string of its digits."""
    double = float(text)
    try:
        sent = Decimal(text)
        if Decimal(quantities.from_double(double)) == sent:
            return int(double) if double.is_integer() else double
    except (quantities.NotExact, InvalidOperation):
        pass
    return _Digits(text if _is_huge(text) else quantities.plain(Decimal(text)))


def _is_huge(text: str) -> bool:
    """Whether writing a number out would take more digits than any quantity has."""
    try:
        return abs(Decimal(text).adjusted()) > _EXPONENT_MAX
    except InvalidOperation:
        return True


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:_NAME_SHOWN]!r} stands twice in one object")
        found[name] = value
    return found


def _message(document: Any, kind: type[M], path: str) -> M:
    if not isinstance(document, dict):
        raise invalid(path or "body", Reason.MALFORMED_REQUEST, "must be a JSON object")
    _check(document, kind.DESCRIPTOR, path)
    try:
        return json_format.ParseDict(document, kind(), max_recursion_depth=_NESTING_MAX)
    except json_format.ParseError as error:
        said = str(error)
        field = re.match(r"Failed to parse (\w+) field: ", said)
        place = ".".join(part for part in (path, field[1] if field else "") if part) or "body"
        if "too deep" in said:
            raise invalid(place, Reason.LIMIT_EXCEEDED, f"is nested more than {NESTING_MAX} levels deep") from None
        wanted = "must be a string" if "expected string" in said else "has a value of a wrong type"
        raise invalid(place, Reason.FIELD_INVALID, wanted) from None
    except (ValueError, TypeError, RecursionError):
        raise invalid(path or "body", Reason.MALFORMED_REQUEST, "has a value of a wrong type") from None


def _check(document: dict[str, Any], kind: Any, path: str) -> None:
    """Refuse what protobuf's reader would take or say badly.

    That are unknown fields and those under another name than their JSON one, numbers kept as strings, anything but
    objects as messages, very long lists, and empty lists of the values of a condition, which would be no condition.
    """
    known = {field.json_name: field for field in kind.fields}
    for name, value in document.items():
        field = known.get(name)
        place = f"{path}.{name[:_NAME_SHOWN]}" if path else name[:_NAME_SHOWN]
        if field is None:
            text = f"is not a field that is supported here; there are {', '.join(known)}"
            raise invalid(place, Reason.FIELD_INVALID, text)
        if value is None:
            continue
        if isinstance(value, dict | list) and len(value) > _ITEMS_MAX and not _is_any(field.message_type):
            text = f"has {len(value):,} items; at most {_ITEMS_MAX:,} are allowed"
            raise invalid(place, Reason.LIMIT_EXCEEDED, text)
        if name in _CONDITIONS and value == []:
            raise invalid(place, Reason.FIELD_INVALID, "must not be empty: leave it out for no condition")
        of_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        inner: Any = field.message_type.fields_by_name["value"] if of_map else field
        entries = value.values() if of_map and isinstance(value, dict) else [value]
        for one in value if field.is_repeated and isinstance(value, list) else entries:
            if isinstance(one, _Digits) and inner.type == FieldDescriptor.TYPE_STRING:
                raise invalid(place, Reason.FIELD_INVALID, "must be a string")
            if inner.message_type is None or of_map or _is_any(inner.message_type):
                continue
            if not isinstance(one, dict):
                raise invalid(place, Reason.FIELD_INVALID, "has a value of a wrong type")
            _check(one, inner.message_type, place)


def _is_any(kind: Any) -> bool:
    """Whether it is one of protobuf's types for JSON of any kind."""
    return kind is not None and kind.file.package == _ANY_JSON


def answer(document: Any) -> HttpBody:
    """Write a body."""
    return HttpBody(content_type=_JSON, data=_written(document).encode())


async def answer_all(values: Iterable[V], write: Callable[[V], Any], frame: str = "[{}]") -> HttpBody:
    """Write a body that is a JSON array, or has one in its `frame`, of what `write` makes of each value.

    Lets other calls have the event loop now and then.
    """
    parts = await in_slices(lambda one: _written(write(one)), values)
    return HttpBody(content_type=_JSON, data=frame.replace("{}", ",".join(parts)).encode())


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
