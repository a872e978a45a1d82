"""Owns how usage record groups are read: files of JSON in, groups or their faults out, each with its place.

Numbers never pass through a float: a quantity is what stands in the file, digit by digit.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, BinaryIO, NamedTuple

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, EncodeError

from metering.v1 import usage_record_group_pb2 as pb
from service.cli import client
from service.cli.ingest import MESSAGE_BYTES_MAX, NumberText

# Text fields that hold decimals: what stands there as a JSON number is taken as its text.
_DECIMALS = {
    "metering.v1.NewUsageRecordGroup.RecordsEntry.value",
    "metering.v1.BillableRecord.quantity",
    "metering.v1.UsageAllocation.quantity",
    *(
        f"metering.v1.UsageRecordGroupMetaInfo.{name}"
        for name in (
            "OriginRecordsEntry.value",
            "lago_amount",
            "metronome_daily_cost_amount",
            "metronome_monthly_invoice_amount",
            "metronome_monthly_invoice_amount_adjusted",
            "metronome_invoice_credit_back_amount",
        )
    ),
}
RECORDS_MAX = 10_000
"""Records of all groups of a batch together: what the server takes."""

_SAFE_INTEGER = 2**53 - 1
_BLANKS = " \t\r\n"
_NO_ID = (
    "missing, and never made up here: it must come from where the usage was measured, so that a retry sends the same "
    "id and the usage counts once"
)


class Place(NamedTuple):
    """Where a group stands: its file, the line on which it begins, and which element it is, from 0, if in an array."""

    file: str
    line: int
    element: int | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + ("" if self.element is None else f"[{self.element}]")


class Fault(NamedTuple):
    """One reason why a group is not taken."""

    code: str
    field: str
    message: str


@dataclass(slots=True)
class Entry:
    """What stands at a place: a group, or why there is none that could be sent."""

    place: Place
    id: str | None = None
    group: pb.NewUsageRecordGroup | None = None
    faults: list[Fault] = field(default_factory=list)
    message_bytes: int = 0
    records: int = 0


class _NotJSONError(ValueError):
    """What is not JSON; `position` is where in the text."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


def read_groups(name: str, stream: BinaryIO, *, needs_id: bool) -> Iterator[Entry]:
    """Read a file: JSON lines are read no further than asked, anything else whole."""
    for number, line in _numbered(stream):
        if not line.strip():
            continue
        if _holds_object(line):
            for found, text in itertools.chain([(number, line)], _numbered(stream, number + 1)):
                yield from _line(Place(name, found), text, needs_id=needs_id)
        else:
            yield from _document(name, number, line + stream.read(), needs_id=needs_id)
        return


def _numbered(stream: Iterable[bytes], first: int = 1) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(stream, first):
        # A byte order mark is how some systems begin a file; it is no part of the first group.
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _holds_object(line: bytes) -> bool:
    try:
        return [type(value) for _, _, value in _values(line.decode())] == [dict] and line.lstrip()[:1] == b"{"
    except ValueError:
        return False


def _line(place: Place, line: bytes, *, needs_id: bool) -> Iterator[Entry]:
    try:
        values = list(_values(line.decode()))
    except ValueError as fault:
        yield _malformed(place, fault)
        return
    for _, _, value in values:
        yield _entry(place, value, needs_id=needs_id)


def _document(name: str, first: int, data: bytes, *, needs_id: bool) -> Iterator[Entry]:
    """Read an array, an object or several of them; what is not JSON leaves nothing of it, unless it is JSON lines."""
    lines = data.split(b"\n")
    try:
        text = data.decode()
        values = list(_values(text))
    except ValueError as fault:
        if not data.lstrip().startswith(b"[") and any(map(_holds_object, lines)):
            for number, line in enumerate(lines, first):
                yield from _line(Place(name, number), line, needs_id=needs_id)
        else:
            yield _malformed(Place(name, first + data.count(b"\n", 0, _byte(data, fault))), fault)
        return
    line_number, counted = first, 0
    for at, index, value in values:
        line_number, counted = line_number + text.count("\n", counted, at), at
        yield _entry(Place(name, line_number, index), value, needs_id=needs_id)


def _byte(data: bytes, fault: ValueError) -> int:
    """Where in the data the fault is."""
    if isinstance(fault, UnicodeDecodeError):
        return fault.start
    return len(data.decode()[: fault.position].encode()) if isinstance(fault, _NotJSONError) else 0


def _malformed(place: Place, fault: ValueError) -> Entry:
    is_text = not isinstance(fault, UnicodeDecodeError)
    message = f"not valid JSON: {fault}" if is_text else "not UTF-8"
    return Entry(place, faults=[Fault("MALFORMED_JSON", "", _sendable(message))])


def _values(text: str) -> Iterator[tuple[int, int | None, Any]]:
    """Yield JSON values that follow one another, or the elements of one array, with positions; raises _NotJSONError."""
    at = _after_blanks(text, 0)
    is_array = text[at : at + 1] == "["
    if is_array:
        at = _after_blanks(text, at + 1)
    for index in itertools.count():
        if at == len(text) and not is_array:
            return
        if is_array and index == 0 and text[at : at + 1] == "]":
            break
        value, end = _value(text, at)
        yield at, index if is_array else None, value
        at = _after_blanks(text, end)
        if not is_array:
            continue
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise _NotJSONError("expected ',' or ']' after an element", at)
        at = _after_blanks(text, at + 1)
    if (end := _after_blanks(text, at + 1)) < len(text):
        raise _NotJSONError("expected nothing after the array", end)


def _value(text: str, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as fault:
        raise _NotJSONError(f"{fault.msg[0].lower()}{fault.msg[1:]}", fault.pos) from None
    except RecursionError:
        raise _NotJSONError("nested too deeply", at) from None
    except ValueError as fault:
        raise _NotJSONError(str(fault), at) from None


def _after_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at] in _BLANKS:
        at += 1
    return at


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} stands twice in one object")
        found[name] = value
    return found


_DECODER = json.JSONDecoder(
    parse_int=NumberText, parse_float=NumberText, parse_constant=_no_constant, object_pairs_hook=_object
)


def _entry(place: Place, value: Any, *, needs_id: bool) -> Entry:
    """Make a group of a JSON value, or say why it makes none. What its fields say is the server's to judge."""
    entry = Entry(place)
    if type(value) is not dict:
        entry.faults.append(Fault("FIELD_INVALID", "", "not a JSON object"))
        return entry
    if type(value.get("id")) is str:
        entry.id = _sendable(value["id"])
    reading = _Reading(entry.faults)
    group = pb.NewUsageRecordGroup()
    try:
        json_format.ParseDict(reading.message(value, group.DESCRIPTOR, ""), group)
        _check_nesting(group)
    except (DecodeError, EncodeError, RecursionError):
        reading.fault("", "nested too deeply", code="LIMIT_EXCEEDED")
    except (json_format.ParseError, TypeError, ValueError) as fault:
        if not entry.faults:
            reading.fault("", str(fault))
    entry.message_bytes = group.ByteSize() + 8  # 8: the field's tag and length within the request
    if entry.message_bytes > MESSAGE_BYTES_MAX:
        reading.fault("", f"takes {entry.message_bytes:,} bytes, too many for one request", code="LIMIT_EXCEEDED")
    entry.records = len(group.records) + max(len(group.billable_records), len(group.meta_info.billable_records))
    if entry.records > RECORDS_MAX:
        reading.fault("", f"has {entry.records:,} records, too many for one request", code="LIMIT_EXCEEDED")
    if needs_id and value.get("id") in (None, ""):
        reading.fault("id", _NO_ID, code="FIELD_REQUIRED")
    if not entry.faults:
        entry.group = group
    return entry


def _check_nesting(group: pb.NewUsageRecordGroup) -> None:
    """Raise if a group is nested more deeply than messages may be, which would sink its whole batch.

    Answers nest it deepest, with its billable records among what is known about it.
    """
    records = [*group.billable_records, *group.meta_info.billable_records]
    if records:
        stored = pb.UsageRecordGroup(meta_info=pb.UsageRecordGroupMetaInfo(billable_records=records))
        answer = pb.ReportUsageRecordGroupsResponse(results=[pb.UsageRecordGroupResult(group=stored)])
        answer.FromString(answer.SerializeToString())


@dataclass(slots=True)
class _Reading:
    """Turns a value into what the proto JSON form allows, exactly, and collects what it does not allow."""

    faults: list[Fault]

    def fault(self, path: str, message: str, code: str = "FIELD_INVALID") -> None:
        """Note what is wrong."""
        self.faults.append(Fault(code, _sendable(path), _sendable(message)))

    def message(self, value: dict[str, Any], descriptor: Descriptor, path: str) -> dict[str, Any]:
        """Read an object by the fields that it may have, under either of their names."""
        fields = {name: one for one in descriptor.fields for name in (one.name, one.json_name)}
        found: dict[str, Any] = {}
        for name, one in value.items():
            here = f"{path}{name}"
            if name not in fields:
                self.fault(here, f"unknown field; there are {', '.join(one.name for one in descriptor.fields)}")
            elif fields[name].name in found:
                self.fault(here, f"stands twice, as {fields[name].name} and as {fields[name].json_name}")
            else:
                found[fields[name].name] = self._field(fields[name], one, here)
        return found

    def _field(self, descriptor: FieldDescriptor, value: Any, here: str) -> Any:
        kind = descriptor.message_type
        if value is None:
            return None
        if kind is not None and kind.GetOptions().map_entry:
            if type(value) is not dict:
                self.fault(here, "must be a JSON object")
                return None
            entry = kind.fields_by_name["value"]
            return {name: self._single(entry, one, f"{here}.{name}") for name, one in value.items()}
        if descriptor.is_repeated:
            if type(value) is not list:
                self.fault(here, "must be a JSON array")
                return None
            return [self._single(descriptor, one, f"{here}[{i}]") for i, one in enumerate(value)]
        return self._single(descriptor, value, here)

    def _single(self, descriptor: FieldDescriptor, value: Any, here: str) -> Any:
        kind = descriptor.message_type
        if descriptor.type == FieldDescriptor.TYPE_STRING:
            return self._text(descriptor, value, here)
        if descriptor.enum_type is not None:
            names = list(descriptor.enum_type.values_by_name)
            if value not in names:
                self.fault(here, f"must be one of {', '.join(names)}")
            return value
        if descriptor.type == FieldDescriptor.TYPE_BOOL:
            if type(value) is not bool:
                self.fault(here, "must be true or false")
            return value
        if kind is None:  # whole numbers
            return str(decimal_text(value)) if type(value) is NumberText else value
        if kind.full_name == "google.protobuf.Timestamp":
            return self._time(value, here)
        if type(value) is not dict:
            self.fault(here, "must be a JSON object")
            return None
        return (
            _properties(value) if kind.full_name == "google.protobuf.Struct" else self.message(value, kind, f"{here}.")
        )

    def _text(self, descriptor: FieldDescriptor, value: Any, here: str) -> Any:
        if type(value) is NumberText and descriptor.full_name in _DECIMALS:
            return decimal_text(value)
        if type(value) is not str:
            number = " or number" if descriptor.full_name in _DECIMALS else ""
            self.fault(here, f"must be a JSON string{number}")
        return value

    def _time(self, value: Any, here: str) -> str | None:
        try:
            if type(value) is not str:
                raise ValueError("must be a JSON string, an RFC 3339 time such as 2026-01-01T10:00:00Z")
            return client.parse_timestamp(value).ToJsonString()
        except ValueError as fault:
            self.fault(here, str(fault))
            return None


def decimal_text(literal: str) -> str:
    """Return a JSON number as a plain decimal of the same value: 1e2 is 100. 1e999 is left as it is, to be refused."""
    if "e" not in literal and "E" not in literal:
        return str(literal)
    try:
        number = Decimal(literal)
    except InvalidOperation:  # an exponent of 19 digits
        return str(literal)
    return format(number, "f") if abs(number.adjusted()) < 64 else str(literal)


def _properties(value: Any) -> Any:
    """Return a JSON value for a Struct, whose numbers are doubles: one that a double would change becomes its text."""
    match value:
        case NumberText():
            number, text = float(value), decimal_text(value)
            # Beyond ±(2^53-1) a double stands for several integers, and the server refuses it.
            is_plain = "e" not in text and "E" not in text and abs(number) <= _SAFE_INTEGER
            return number if is_plain and Decimal(repr(number)) == Decimal(text) else text
        case dict():
            return {name: _properties(one) for name, one in value.items()}
        case list():
            return [_properties(one) for one in value]
        case _:
            return value


def _sendable(text: str) -> str:
    """The text without halves of surrogate pairs, which cannot be written anywhere."""
    return text.encode(errors="replace").decode()
