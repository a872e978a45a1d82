"""Claims about docs/compatibility.md: it names every operation, parameter and field that the protos define."""

import re
from pathlib import Path

from google.api import annotations_pb2, httpbody_pb2
from google.protobuf.descriptor import Descriptor, MethodDescriptor

from compat.metronome.v1 import billable_metric_pb2, customer_pb2, usage_pb2
from compat.suger.v1 import billable_metric_pb2 as suger_metric_pb2
from compat.suger.v1 import entitlement_pb2, usage_record_group_pb2, usage_record_report_pb2
from service.server import COMPAT_SERVICES

DOCS = (Path(__file__).parent.parent / "docs" / "compatibility.md").read_text()
FILES = [
    module.DESCRIPTOR
    for module in (
        billable_metric_pb2,
        customer_pb2,
        usage_pb2,
        suger_metric_pb2,
        entitlement_pb2,
        usage_record_group_pb2,
        usage_record_report_pb2,
    )
]
# Parts of messages that are not fields of anybody's JSON.
WRAPPERS = {"body", "data"}


def methods() -> list[MethodDescriptor]:
    """Every RPC of the services for other APIs."""
    return [method for file in FILES for service in file.services_by_name.values() for method in service.methods]


def test_every_operation_is_named() -> None:
    """Each verb and path of the protos stands in the page, with its parameters under their JSON names."""
    assert {file.services_by_name[name].full_name for file in FILES for name in file.services_by_name} == set(
        COMPAT_SERVICES
    )
    missing = []
    for method in methods():
        rule = method.GetOptions().Extensions[annotations_pb2.http]
        verb = rule.WhichOneof("pattern")
        path = getattr(rule, verb)
        if "org_id" in path:
            path = re.sub(r"{(\w+)}", lambda found: "{" + camel(found[1]) + "}", path)
        if f"{verb.upper()} {path}" not in DOCS:
            missing.append(f"{verb.upper()} {path}")
    assert not missing


def test_every_field_is_named() -> None:
    """Each JSON name of each message stands in the page as code."""
    code = set(re.findall(r"[A-Za-z_]+", " ".join(re.findall(r"`[^`]*`|{\w+}", DOCS))))
    missing = {
        f"{message.name}.{field.json_name}"
        for file in FILES
        for message in file.message_types_by_name.values()
        for field in message.fields
        if field.json_name not in code
        and field.message_type not in {httpbody_pb2.HttpBody.DESCRIPTOR}
        and field.json_name not in WRAPPERS
        and not entry(message)
        and not field.json_name.endswith("Decimal")
    }
    assert not missing


def entry(message: Descriptor) -> bool:
    """Whether it is the entry of a map."""
    return message.GetOptions().map_entry


def camel(name: str) -> str:
    """Return a name of a proto file as protobuf's JSON writes it."""
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)
