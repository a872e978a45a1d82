"""What a fuzzer sends: requests drawn from descriptors and from what exists, damaged as messages, JSON or bytes."""

import base64
import copy
import functools
import gzip
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from google.api.httpbody_pb2 import HttpBody
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

# Stands in properties only; whoever finds it in a log line has found a leak.
CANARY = "canary-4f9c2e71d0b8"
REQUEST_BYTES_MAX = 3 * 1024 * 1024
HOUR_S = 3600
NOW_S = int(time.time()) // HOUR_S * HOUR_S

# No words here that would look like a leaked statement when an error repeats them.
NULS = ("\0", "a\0b", "a\0", '{"source":"\0"}', "2026-01-31\0", "1\0")
TEXTS = (
    "", " ", "\n", "a\r\nb", "\t", "\x7f", "\u0085", "\u2028", "\u202eabc", "\u200b", "\ufeff",
    "\U0001f600", "\U0001f600" * 128, "\U0001f600" * 129, "e\u0301", "\u00e9", "\ud7ff", "\uffff", "\U0010ffff",
    "x" * 36, "x" * 37, "x" * 128, "x" * 129, "x" * 160, "x" * 161, "x" * 1024, "x" * 1025, "x" * 20_000,
    "'", '"', "\\", "`", "%", "%s", "%(x)s", ":x", "$1", "?", "{}", "{0}", "'; DROP TABLE usage_events;--",
    "' OR 1=1--", "1); TRUNCATE customers;--", "' UNION TABLE api_keys--", "a->>'b'", "a.b", "__proto__", "$where",
    "null", "None", "true", "../../etc/passwd", "urg:x:0", "urg:", "default", "'a.b' c_d \"e_f\"",
)  # fmt: skip
NUMBERS = (
    "0", "1", "2.5", "-1", "-0", "-0.0", "0.1", "0.000000000000000001", "0.0000000000000000001", "9" * 38, "9" * 39,
    "9" * 20 + "." + "9" * 18, "1e5", "1E+1000000", "1e999999999", "-1e-999999999", "1E+131072", "1e400", "NaN", "sNaN",
    "Infinity", "-Infinity", "inf", "", "-", ".5", "5.", "+1", " 1", "1 ", "1\n", "1,5", "\uff11", "\u0663", "1_000",
    "0x10", "9007199254740993", "9223372036854775807", "9223372036854775808", "01.10", "1" * 5000,
)  # fmt: skip
TIMES = (
    "", "2026-01-31", "2026-02-30", "2026-W01-1", "0000-01-01", "0001-01-01", "0001-01-02", "9999-12-30", "9999-12-31",
    "10000-01-01", "2026-01-31T00:00:00Z", "2026-01-31T23:59:60Z", "2026-01-31 00:00:00", "2026-01-31T00:00:00+23:59",
    "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999999Z", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00Z",
    "2026-01-31T00:00:00.1234567890Z", "2026-01-31T00:00:00+99:99", "now", "1769817600", "2026-01-31T24:00:00Z",
    "\uff12026-01-31", "2026-01-31\n",
)  # fmt: skip
ZONES = (
    "", "UTC", "Asia/Kolkata", "America/New_York", "Pacific/Apia", "Mars/X", "EST5EDT4", "../etc/passwd", "/etc/passwd",
    "europe/berlin", "Europe", "Etc/GMT+12", "localtime", "posixrules", "Factory", "UTC\0", "x" * 300,
)  # fmt: skip
FILTERS = (
    "source=API", "source=", "=", "timestamp=1e400", '{"source":"API"}', '{"source":"\\ud800"}', '{"a":1,"a":2}',
    '{"lago_amount":1e400}', '{"lagoAmount":1E+999999}', '{"origin_records":{"cpu":1.0}}', "{" * 500, '{"a":' * 2000,
    '{"source":NaN}', '{"source":"\\u0000"}', '{"billable_records":[{"quantity":1e400}]}', "skip_validation=true",
    '{"billableRecords":[{"quantity":12345678901234567890.5}]}', '{"usageAllocations":{"cpu":[{"quantity":1e3}]}}',
    "stripe_usage_record_summary_total_usage=9999999999999999999", '{"timestamp":' + "9" * 5000 + "}", "[]", "{}",
)  # fmt: skip
IDS = (
    "00000000-0000-0000-0000-000000000000", "00000000-0000-4000-8000-00000000DEAD",
    "{00000000-0000-4000-8000-00000000dead}", "urn:uuid:00000000-0000-4000-8000-00000000dead", "0000000000004000",
)  # fmt: skip
INTEGERS = (
    0, 1, 2, -1, 10, 100, 101, 1_000, 1_001, 10_000, 10_001, 2**31 - 1, -(2**31), 2**32 - 1, 2**53, 2**63 - 1, -(2**63),
    2**64 - 1,
)  # fmt: skip
DOUBLES = (0.0, -0.0, 1.0, 2.5, -7.0, 0.1, 5e-324, 1e-19, 1e308, 2.0**53, -(2.0**53), 1e22, float("nan"), float("inf"),
           -float("inf"))  # fmt: skip
SECONDS = (-62135596801, -62135596800, -62135510400, -62135510401, -1, 0, 253402214399, 253402214400, 253402300799,
           253402300800, 2**62, -(2**63), 2**63 - 1)  # fmt: skip
NANOS = (0, 1, 999, 999_999_999, -1, 10**9, 2**31 - 1, -(2**31))
COUNTS = (2, 3, 11, 33, 51, 65, 101, 257, 1_001, 10_001, 60_000)
DEPTHS = (5, 24, 25, 26, 33, 49, 60)
# What JSON writes as it stands, whatever it is.
LITERALS = (
    "1e400", "-1e400", "1E+1000000", "1e-1000000", "9007199254740993", "12345678901234567890.123456789", "NaN",
    "Infinity", "-Infinity", "-0", "-0.0", "01", "1.", "'x'", "", "undefined", "9" * 5000, '"\\ud800"', '"\\u0000"',
    '"\\ud83d\\ude00"', '{"a":1,"a":2}', "[" * 200 + "]" * 200, "[" * 5000, '{"a":' * 60 + "1" + "}" * 60, "1e22",
    "true",
)  # fmt: skip
BODIES = (
    b"", b" ", b"null", b"[]", b"{}", b"[{}]", b"[[]]", b"1", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"{}{}", b"[1,]",
    b"{'a':1}", b"[" * 100_000, b'{"a":' * 50_000, b"[" + b"1," * 60_000 + b"1]", b"{}\0",
    '{"name":"x"}'.encode("utf-16"),
    b'{"id":"\xed\xa0\x80"}', b'{"":""}', b'{"body":{}}', b'[{"transaction_id":1}]',
)  # fmt: skip
# Instead of what stands in a field: half a character, a NUL, what is no UTF-8, and fields that never end.
SCRAPS = (b"", b"\xed\xa0\x80", b"\x00", b"\xff\xfe", b"\xc0\x80", b"\x0a", b"\x0a\x7f", b"\x0b", b"\x0c", b"\xff" * 11,
          b"\x0a" * 400, b"\x0b" * 200, b"\x02\x00", b"\x0e\x00", b"x" * 5_000)  # fmt: skip


class Method(NamedTuple):
    """An RPC, with the types of its messages."""

    path: str
    request: type[Message]
    response: type[Message]
    many_requests: bool
    many_responses: bool

    @property
    def name(self) -> str:
        """The RPC without its package."""
        return self.path.rpartition("/")[2]

    @property
    def is_compat(self) -> bool:
        """Whether it is of another service's API."""
        return self.path.startswith("/compat.")


class Request(NamedTuple):
    """What one call sends: its messages as bytes, and its metadata."""

    messages: tuple[bytes, ...]
    metadata: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        size = sum(map(len, self.messages))
        return f"<{len(self.messages)} messages of {size:,} bytes, metadata {dict(self.metadata)}>"


def methods(services: Sequence[str]) -> list[Method]:
    """Find all RPCs of services in their descriptors."""
    pool, to_class = descriptor_pool.Default(), message_factory.GetMessageClass
    return [
        Method(
            f"/{service}/{one.name}",
            to_class(one.input_type),
            to_class(one.output_type),
            one.client_streaming,
            one.server_streaming,
        )
        for service in services
        for one in pool.FindServiceByName(service).methods
    ]


class Known:
    """What is known of a server: texts that stand in its fields, requests that it answered, the JSON that it reads."""

    def __init__(self, all_methods: Sequence[Method]) -> None:
        """Learn the names of all enum values."""
        self.texts: dict[str, dict[str, None]] = {}
        self.requests: dict[str, list[Request]] = {one.path: [] for one in all_methods}
        # Of a method with a body: what is read from it, and whether in an array.
        self.bodies: dict[str, set[tuple[Descriptor, bool]]] = {}
        self._choices: dict[str, list[str]] = {}
        files = {one.request.DESCRIPTOR.file.name: one.request.DESCRIPTOR.file for one in all_methods}
        for file in files.values():
            for name, enum in file.enum_types_by_name.items():
                names = [value.name for value in enum.values]
                prefix = names[0].removesuffix("UNSPECIFIED")
                self._choices[_snake(name)] = [one.removeprefix(prefix) for one in names]

    def learn(self, message: Message) -> None:
        """Remember the texts of a message, by what they are."""
        for one, field in _fields(message):
            value = getattr(one, field.name)
            if field.type != FieldDescriptor.TYPE_STRING or one.DESCRIPTOR is HttpBody.DESCRIPTOR:
                continue
            for text in value if field.is_repeated else [value]:
                # New ones last; bounded, as tokens are new with every answer.
                known = self.texts.setdefault(_noun(field), {})
                if text and len(text) < 500 and len(known) < 40:
                    known[text] = None

    def answered(self, path: str, request: Request) -> None:
        """Remember a request that was answered OK, if it is small."""
        if sum(map(len, request.messages)) < 20_000 and request not in self.requests[path]:
            del self.requests[path][40:]
            self.requests[path].append(request)

    def like(self, field: FieldDescriptor) -> list[str]:
        """Return texts that such a field may hold."""
        name = field.name
        for key, choices in self._choices.items():
            if key == name or key.endswith(f"_{name}"):
                return choices
        if name == "time_zone":
            return list(ZONES)
        if name in {"quantity", "amount", "value"} or "amount" in name:
            return ["1", "2.5", "0", "3", "0.000001", "12"]
        found = self.texts.get(_noun(field))
        return list(found) if found else [text for texts in self.texts.values() for text in texts][:200] or ["x"]


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _noun(field: FieldDescriptor) -> str:
    """Return what a text is: `customer` for an id of one, whoever has it."""
    name, holder = field.name, _snake(field.containing_type.name)
    if field.containing_type.GetOptions().map_entry:
        return holder.removesuffix("_entry") + "." + name
    if name in {"id", "ids"}:
        nouns = ("usage_record_group", "usage_record_report", "billable_metric", "customer", "product", "entitlement")
        return next((noun for noun in nouns if noun in holder), "id")
    if "token" in name or name == "next_page":
        return "lease_token" if "lease" in name else "token"
    return re.sub(r"_ids?$", "", name)


def _fields(message: Message) -> Iterator[tuple[Message, FieldDescriptor]]:
    """Walk through all fields that are set, with the messages that hold them."""
    for field, value in message.ListFields():
        yield message, field
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is not None:
                for one in value.values():
                    yield from _fields(one)
        else:
            for one in value if field.is_repeated else [value]:
                yield from _fields(one)


# --- Values

_TIME = re.compile(r"(time|timestamp|_on|before|date|since|deadline)$")
# Not `st.text` and `st.binary`: they also draw words of our own code, which would look like leaks when told back.
_ANY_TEXT = st.lists(st.integers(0, 0x10F7FF), max_size=20).map(
    lambda found: "".join(chr(one if one < 0xD800 else one + 0x800) for one in found)
)
_ANY_BYTES = st.lists(st.integers(0, 255), min_size=1, max_size=12).map(bytes)


_upto = functools.cache(lambda most: st.integers(0, most))


def _often(draw: Draw, times: int) -> bool:
    """Say no once in so many times; simplest is yes."""
    return bool(draw(_upto(times - 1)) < times - 1)


def _pick(draw: Draw, values: Sequence[Any]) -> Any:
    return values[draw(_upto(len(values) - 1))]


def _hostile_text(draw: Draw, name: str = "") -> str:
    """Draw a text that may be wrong where it stands: of the field's own kind, if it has one, or of any."""
    kinds: list[Sequence[str]] = [TEXTS, NULS, TEXTS, IDS, NUMBERS]
    if _TIME.search(name):
        kinds += [TIMES, TIMES, TIMES]
    elif name == "time_zone":
        kinds += [ZONES, ZONES, ZONES]
    elif name == "meta_info":
        kinds += [FILTERS] * 5
    elif not name or name == "value" or "quantity" in name or "amount" in name:
        kinds += [NUMBERS, NUMBERS, NUMBERS]
    which = draw(_upto(len(kinds)))
    return str(_pick(draw, kinds[which])) if which < len(kinds) else draw(_ANY_TEXT)


def _seconds(draw: Draw) -> int:
    """Draw a time of the last weeks, or a little ahead; often on the hour."""
    return NOW_S + HOUR_S * int(draw(st.integers(-40 * 24, 26))) + int(_pick(draw, (0, 0, 0, 1, 1800)))


def _time_text(draw: Draw) -> str:
    form = _pick(draw, ("%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d", "%Y-%m-%dT00:00:00Z", "%Y-%m-%d %H:%M:%S"))
    return time.strftime(form, time.gmtime(_seconds(draw)))


def _text(draw: Draw, field: FieldDescriptor, known: Known) -> str:
    """Draw what a field should hold: mostly what exists, sometimes what is new."""
    if _TIME.search(field.name):
        return _time_text(draw)
    if field.name == "meta_info":
        return str(_pick(draw, FILTERS))
    if _often(draw, 4):
        return str(_pick(draw, known.like(field)))
    return str(uuid.UUID(int=draw(_upto(2**64)))) if _often(draw, 2) else f"new-{draw(_upto(99))}"


def _json(draw: Draw, depth: int = 0) -> Any:
    """Draw JSON as properties have it."""
    match draw(_upto(8 if depth < 3 else 6)):
        case 0:
            return draw(st.integers(-5, 100))
        case 1:
            return CANARY
        case 2:
            return _pick(draw, NUMBERS)
        case 3:
            return _pick(draw, ("a", "b", "eu", "us", "", "60"))
        case 4:
            return _pick(draw, (True, False, None))
        case 5:
            return _pick(draw, DOUBLES)
        case 6:
            return _hostile_text(draw)
        case 7:
            return [_json(draw, depth + 1) for _ in range(draw(_upto(3)))]
        case _:
            return {_hostile_text(draw): _json(draw, depth + 1) for _ in range(draw(_upto(3)))}


def _properties(draw: Draw) -> dict[str, Any]:
    names = ("q", "g", "h", "quantity", "cpu")
    found = {name: _json(draw) for name in names if _often(draw, 2)}
    if not _often(draw, 6):
        inner: Any = CANARY
        for _ in range(_pick(draw, DEPTHS)):
            inner = {"d": inner} if _often(draw, 2) else [inner]
        found["deep"] = inner
    if not _often(draw, 12):
        found |= {f"p{i}": CANARY for i in range(_pick(draw, COUNTS[:7]))}
    return found


def _scalar(draw: Draw, field: FieldDescriptor, known: Known, *, hostile: bool) -> Any:
    kinds = FieldDescriptor
    match field.cpp_type:
        case kinds.CPPTYPE_STRING if field.type == kinds.TYPE_BYTES:
            return draw(_ANY_BYTES)
        case kinds.CPPTYPE_STRING:
            return _hostile_text(draw, field.name) if hostile else _text(draw, field, known)
        case kinds.CPPTYPE_BOOL:
            return draw(st.booleans())
        case kinds.CPPTYPE_ENUM:
            numbers = [one.number for one in field.enum_type.values]
            return _pick(draw, [*numbers, 99, -1, 2**31 - 1, -(2**31)] if hostile else numbers)
        case kinds.CPPTYPE_DOUBLE | kinds.CPPTYPE_FLOAT:
            return _pick(draw, DOUBLES)
        case _:
            bits = 32 if field.cpp_type in {kinds.CPPTYPE_INT32, kinds.CPPTYPE_UINT32} else 64
            signed = field.cpp_type in {kinds.CPPTYPE_INT32, kinds.CPPTYPE_INT64}
            low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
            fitting = [one for one in INTEGERS if low <= one < high]
            return _pick(draw, fitting) if hostile else draw(_upto(12))


def _fill(draw: Draw, message: Message, known: Known, path: str, metadata: list[tuple[str, str]], depth: int) -> None:
    """Give a message fields as it should have them, mostly."""
    kind = message.DESCRIPTOR
    match kind.full_name:
        case "google.protobuf.Timestamp":
            message.seconds = _seconds(draw)
        case "google.protobuf.Struct":
            message.update(_properties(draw))
        case "google.protobuf.Value":
            message.CopyFrom(_value(_json(draw)))
        case "google.protobuf.ListValue":
            message.CopyFrom(_value([_json(draw)]).list_value)
        case "google.api.HttpBody":
            assert isinstance(message, HttpBody)
            _fill_body(draw, message, known, path, metadata)
        case _:
            for field in kind.fields:
                if depth > 6 or not _often(draw, 3 if depth < 2 else 2):
                    continue
                _set(draw, message, field, known, path, metadata, depth, hostile=False)


def _value(found: Any) -> Value:
    made = Value()
    holder = Struct()
    holder.update({"x": found})
    made.CopyFrom(holder.fields["x"])
    return made


def _set(
    draw: Draw,
    message: Message,
    field: FieldDescriptor,
    known: Known,
    path: str,
    metadata: list[tuple[str, str]],
    depth: int,
    *,
    hostile: bool,
) -> None:
    """Give a field of a message another value, or one more."""
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        entries, value = getattr(message, field.name), kind.fields_by_name["value"]
        for _ in range(draw(st.integers(1, 2))):
            key = _scalar(draw, kind.fields_by_name["key"], known, hostile=hostile)
            if value.message_type is not None:
                _fill(draw, entries[key], known, path, metadata, depth + 1)
            else:
                entries[key] = _scalar(draw, value, known, hostile=hostile)
    elif kind is not None:
        for _ in range(draw(st.integers(1, 3)) if field.is_repeated else 1):
            inner = getattr(message, field.name).add() if field.is_repeated else getattr(message, field.name)
            inner.SetInParent()
            if kind.full_name == "google.protobuf.FieldMask":
                holders = [one for one in message.DESCRIPTOR.fields if one.message_type not in {None, kind}]
                names = [one.name for holder in holders for one in holder.message_type.fields] or ["name"]
                inner.paths.extend(_pick(draw, (*names, "", "a.b", "*")) for _ in range(draw(_upto(2))))
            elif hostile and kind.full_name in {"google.protobuf.Timestamp", "google.protobuf.Duration"}:
                inner.seconds, inner.nanos = _pick(draw, SECONDS), _pick(draw, NANOS)
            else:
                _fill(draw, inner, known, path, metadata, depth + 1)
    elif field.is_repeated:
        number = draw(st.integers(1, 3))
        getattr(message, field.name).extend(_scalar(draw, field, known, hostile=hostile) for _ in range(number))
    else:
        setattr(message, field.name, _scalar(draw, field, known, hostile=hostile))


# --- Messages


@st.composite
def requests(draw: Draw, method: Method, known: Known) -> Request:
    """Draw what one call of a method sends: like a request that was answered, or new; then with faults, or none."""
    metadata: list[tuple[str, str]] = []
    raw: list[bytes] = []
    examples = known.requests[method.path]
    number = 1
    if examples and _often(draw, 5):
        example = _pick(draw, examples)
        raw, metadata = list(example.messages), list(example.metadata)
        if method.many_requests and not _often(draw, 3):
            raw += raw[-1:] * draw(st.integers(1, 3))
    else:
        number = draw(_upto(3)) if method.many_requests else 1
        for _ in range(number):
            made = method.request()
            _fill(draw, made, known, method.path, metadata, 0)
            raw.append(made.SerializeToString())
    # One fault more often than none or many: the first that is noticed hides the others.
    faults = _pick(draw, (0, 1, 1, 1, 2, 4))
    renewed = draw(_upto(999)) if draw(st.booleans()) else None
    for change in range(faults + (renewed is not None)):
        if not raw:
            break
        i = draw(_upto(len(raw) - 1))
        message = method.request()
        try:
            message.ParseFromString(raw[i])
        except Exception:  # broken by an example that was taken with its faults
            break
        if change == faults:
            _renew(draw, message, renewed)
        else:
            _mutate(draw, message, known, method.path, metadata)
        if message.ByteSize() <= REQUEST_BYTES_MAX:
            raw[i] = message.SerializeToString()
    if raw and not _often(draw, 4):
        i = draw(_upto(len(raw) - 1))
        for _ in range(draw(st.integers(1, 3))):
            raw[i] = damaged(draw, raw[i])
    if not _often(draw, 10):
        metadata.append(("idempotency-key", _pick(draw, ("a", "b", "key-1", "~", "k" * 255, "k" * 256, " ", ""))))
    return Request(tuple(raw), tuple(dict(metadata).items()))


def _renew(draw: Draw, message: Message, number: int | None) -> None:
    """Change all texts of one kind that look like ids, as if it were about others."""
    body = getattr(message, "body", None)
    if isinstance(body, HttpBody):
        names = list(dict.fromkeys(re.findall(rb'"((?:\w+_)?i[dD])": ?"', body.data)))
        if names:
            name = names[0] if draw(st.booleans()) else _pick(draw, names)
            tail = f"{number:03}".encode()
            body.data = re.sub(rb'("%b": ?"[^"]*?)[^"]{0,3}"' % name, lambda found: found[1] + tail + b'"', body.data)
        return
    kinds: dict[str, list[tuple[Message, FieldDescriptor]]] = {}
    for holder, field in _fields(message):
        if field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated and re.search(r"(^|_)id$", field.name):
            kinds.setdefault(_noun(field), []).append((holder, field))
    if kinds:
        # What stands first is mostly the thing's own id.
        chosen = next(iter(kinds.values())) if draw(st.booleans()) else _pick(draw, list(kinds.values()))
        for i, (holder, field) in enumerate(chosen):
            text = getattr(holder, field.name)
            # As long as it was: UUIDs stay such.
            setattr(holder, field.name, f"{text[:-6]}{i:03}{number:03}" if len(text) == 36 else f"{text}-{number}")


def _mutate(draw: Draw, message: Message, known: Known, path: str, metadata: list[tuple[str, str]]) -> None:
    """Change one thing about a message: a field is taken away, added, replaced or multiplied."""
    body = next((one for one in (getattr(message, "body", None),) if isinstance(one, HttpBody)), None)
    if body is not None and _often(draw, 4):
        _mutate_body(draw, body, known, path, metadata)
        return
    places = list(_fields(message))[:300]
    if not places or not _often(draw, 5):
        holders: list[Message] = [message]
        for holder, field in places:
            if field.message_type is not None and not field.is_repeated:
                holders.append(getattr(holder, field.name))
            elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
                holders += getattr(holder, field.name)
        holder = _pick(draw, [one for one in holders if one.DESCRIPTOR.fields] or [message])
        if holder.DESCRIPTOR.fields:
            field = _pick(draw, holder.DESCRIPTOR.fields)
            _set(draw, holder, field, known, path, metadata, 1, hostile=draw(st.booleans()))
        return
    holder, field = _pick(draw, places)
    value = getattr(holder, field.name)
    what = draw(_upto(5))
    if what == 0:
        holder.ClearField(field.name)
    elif what == 1 and field.is_repeated and not (field.message_type and field.message_type.GetOptions().map_entry):
        each = max(1, message.ByteSize() // max(1, len(value)))
        times = _pick(draw, COUNTS if not _often(draw, 4) else COUNTS[:7])
        if times * each <= REQUEST_BYTES_MAX:
            value.extend([value[0]] * times)
    elif what == 2:
        _set(draw, holder, field, known, path, metadata, 1, hostile=False)
    else:
        if not field.is_repeated and field.message_type is not None:
            holder.ClearField(field.name)
        _set(draw, holder, field, known, path, metadata, 1, hostile=True)


# --- JSON


class _Literal(str):
    """What is written into JSON as it stands."""


def _fill_body(draw: Draw, body: HttpBody, known: Known, path: str, metadata: list[tuple[str, str]]) -> None:
    body.content_type = "application/json" if _often(draw, 20) else _pick(draw, ("", "text/plain", "x" * 5000))
    kinds = sorted(known.bodies.get(path, set()), key=lambda one: (one[0].full_name, one[1]))
    if not kinds or not _often(draw, 8):
        body.data = _pick(draw, BODIES)
        return
    kind, in_array = _pick(draw, kinds)
    found: Any = _document(draw, kind, known, 0)
    if in_array:
        found = [found, *(_document(draw, kind, known, 0) for _ in range(draw(_upto(2))))]
    body.data = _written(found).encode(errors="surrogatepass")
    _pack(draw, body, metadata)


def _document(draw: Draw, kind: Descriptor, known: Known, depth: int) -> dict[str, Any]:
    """Draw a JSON object of a message's fields."""
    found: dict[str, Any] = {}
    for field in kind.fields:
        if depth > 5 or not _often(draw, 3):
            continue
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            value = inner.fields_by_name["value"]
            key = _scalar(draw, inner.fields_by_name["key"], known, hostile=not _often(draw, 4))
            found[field.json_name] = {key: _json_field(draw, value, known, depth + 1)}
        elif field.is_repeated:
            number = draw(_upto(2))
            found[field.json_name] = [_json_field(draw, field, known, depth + 1) for _ in range(number)]
        else:
            found[field.json_name] = _json_field(draw, field, known, depth + 1)
    return found


def _json_field(draw: Draw, field: FieldDescriptor, known: Known, depth: int) -> Any:
    if not _often(draw, 15):
        return _hostile_json(draw)
    kind = field.message_type
    if kind is None:
        found = _scalar(draw, field, known, hostile=False)
        return base64.b64encode(found).decode() if isinstance(found, bytes) else found
    if kind is Struct.DESCRIPTOR:
        return _properties(draw)
    if kind is ListValue.DESCRIPTOR:
        return [_json(draw) for _ in range(draw(_upto(3)))]
    if kind is Value.DESCRIPTOR:
        return _json(draw)
    return _document(draw, kind, known, depth)


def _hostile_json(draw: Draw) -> Any:
    return _Literal(_pick(draw, LITERALS)) if _often(draw, 2) else _json(draw)


def _written(found: Any) -> str:
    """Write JSON; floats that are none, and literals, as they stand."""
    match found:
        case _Literal():
            return str(found)
        case dict():
            return "{" + ",".join(f"{json.dumps(key)}:{_written(one)}" for key, one in found.items()) + "}"
        case list():
            return "[" + ",".join(map(_written, found)) + "]"
        case str():
            return json.dumps(found, ensure_ascii=len(found) % 2 == 0)
        case _:
            return json.dumps(found)


def _mutate_body(draw: Draw, body: HttpBody, known: Known, path: str, metadata: list[tuple[str, str]]) -> None:
    """Change one thing about a body: of its document if it has one, else all of it."""
    try:
        document = json.loads(body.data)
        json.dumps(document).encode()
    except (ValueError, RecursionError):
        _fill_body(draw, body, known, path, metadata)
        return
    places: list[tuple[Any, Any]] = []
    _places(document, places)
    if not places or not _often(draw, 8):
        _fill_body(draw, body, known, path, metadata)
        return
    holder, key = _pick(draw, places[:300])
    value = holder[key]
    match draw(_upto(5)):
        case 0:
            del holder[key]
        case 1:
            holder[key] = _hostile_json(draw)
        case 2:
            like = [one for known_texts in known.texts.values() for one in known_texts][:300]
            holder[key] = _pick(draw, like or ["x"])
        case 3:
            holder[key] = _hostile_text(draw)
        case 4 if isinstance(value, list) and value:
            times = _pick(draw, COUNTS[:8])
            if len(_written(value)) * times < REQUEST_BYTES_MAX:
                holder[key] = [copy.deepcopy(value[i % len(value)]) for i in range(times)]
        case _:
            if isinstance(holder, dict):
                # The same name twice, or one more that nobody knows.
                name = json.dumps(key)[1:-1] if _often(draw, 2) else "unknown"
                holder[key] = _Literal(f'{_written(value)},"{name}":{_written(_json(draw))}')
            else:
                holder.append(_json(draw))
    body.data = _written(document).encode(errors="surrogatepass")
    _pack(draw, body, metadata)


def _places(found: Any, places: list[tuple[Any, Any]], depth: int = 0) -> None:
    items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for key, value in items:
        places.append((found, key))
        if depth < 50:
            _places(value, places, depth + 1)


def _pack(draw: Draw, body: HttpBody, metadata: list[tuple[str, str]]) -> None:
    """Damage a body's text now and then, or pack it, rightly or not."""
    if not _often(draw, 8):
        body.data = _bytes_changed(draw, body.data)
    if not _often(draw, 10):
        metadata.append(("x-body-encoding", _pick(draw, ("gzip", "gzip", "gzip", "br", ""))))
        packed = gzip.compress(body.data, mtime=0)
        body.data = _pick(draw, (packed, packed + packed, packed[:-4], packed * 17, body.data))
        if not _often(draw, 3):
            body.data = _bytes_changed(draw, body.data)


# --- Bytes


class _Piece(NamedTuple):
    """A field as it lies in bytes: its tag, where its content begins, and where it ends."""

    start: int
    body: int
    end: int
    tag: int


def varint(number: int, *, more: int = 0) -> bytes:
    """Write a varint, longer than it needs to be by some bytes."""
    out = bytearray()
    while number > 0x7F or more > 0:
        more -= number <= 0x7F
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while shift < 70:
        number |= (raw[at] & 0x7F) << shift
        at += 1
        if raw[at - 1] < 0x80:
            return number, at
        shift += 7
    raise IndexError


def _pieces(raw: bytes) -> list[_Piece]:
    """Find the fields in bytes, up to where they are broken."""
    found: list[_Piece] = []
    at = 0
    try:
        while at < len(raw):
            tag, body = _read_varint(raw, at)
            match tag & 7:
                case 0:
                    end = _read_varint(raw, body)[1]
                case 1:
                    end = body + 8
                case 2:
                    size, body = _read_varint(raw, body)
                    end = body + size
                case 5:
                    end = body + 4
                case _:
                    break
            if end > len(raw):
                break
            found.append(_Piece(at, body, end, tag))
            at = end
    except IndexError:
        pass
    return found


def damaged(draw: Draw, raw: bytes) -> bytes:
    """Do one thing to a message that no writer of messages does."""
    found = _pieces(raw)[:200]
    if not found or not _often(draw, 4):
        return _bytes_changed(draw, raw)
    one = _pick(draw, found)
    before, piece, content, after = raw[: one.start], raw[one.start : one.end], raw[one.body : one.end], raw[one.end :]
    if one.tag & 7 == 2 and content and _often(draw, 2):
        inner = damaged(draw, content)
        return before + varint(one.tag) + varint(len(inner)) + inner + after
    number = one.tag >> 3
    match draw(_upto(11)):
        case 0:
            return before + after
        case 1:
            return before + piece + piece + after
        case 2:
            return before + after + piece
        case 3:
            return before + varint(one.tag, more=_pick(draw, (1, 4, 9, 10))) + raw[one.start + 1 : one.end] + after
        case 4 if one.tag & 7 == 2:
            return before + varint(one.tag) + varint(len(content), more=_pick(draw, (1, 4, 9))) + content + after
        case 5 if one.tag & 7 == 2:
            size = len(content) + _pick(draw, (1, -1, 100, 2**31 - len(content), 2**32, 2**63))
            return before + varint(one.tag) + varint(max(0, size)) + content + after
        case 6:
            return before + varint(one.tag & ~7 | _pick(draw, (0, 1, 2, 3, 4, 5, 6, 7))) + content + after
        case 7:
            return before + varint(number << 3 | 3) + piece + varint(number << 3 | 4) + after
        case 8:
            scrap = _pick(draw, SCRAPS)
            return before + varint(number << 3 | 2) + varint(len(scrap)) + scrap + after
        case 9:
            unknown = _pick(draw, (15, 100, 5_000, 2**29 - 1)) << 3
            return before + varint(unknown | 2) + varint(len(content)) + content + piece + after
        case 10:
            return before + varint(number << 3) + varint(_pick(draw, (0, 1, 99, 2**31, 2**63, 2**64 - 1))) + after
        case _:
            return before + after + _pick(draw, SCRAPS)


def _bytes_changed(draw: Draw, raw: bytes) -> bytes:
    at = draw(_upto(max(0, len(raw) - 1)))
    to = min(len(raw), at + draw(_upto(40)))
    match draw(_upto(5)):
        case 0:
            return raw[:at]
        case 1 if raw:
            return raw[:at] + bytes([raw[at] ^ (1 << draw(_upto(7)))]) + raw[at + 1 :]
        case 2:
            return raw[:at] + draw(_ANY_BYTES) + raw[at:]
        case 3:
            return raw[:at] + raw[to:]
        case 4:
            return raw[:to] + raw[at:]
        case _:
            return raw[:at] + _pick(draw, SCRAPS) + raw[to:]
