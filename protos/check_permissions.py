"""Fails if a method of the API has no row in the table of permissions, or a row has no method."""

import sys
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Compare the table with the descriptors in generated/."""
    sys.path[:0] = [str(ROOT)]
    from service.auth.permissions import PERMISSIONS

    descriptors = FileDescriptorSet.FromString((ROOT / "generated/metering/descriptors.binpb").read_bytes())
    methods = {
        (f"{file.package}.{service.name}", method.name)
        for file in descriptors.file
        for service in file.service
        for method in service.method
    }
    rows = {
        (service, method)
        for service, methods_of_it in PERMISSIONS.items()
        for method in methods_of_it
        if not service.startswith("grpc.")
    }
    for service, method in sorted(methods - rows):
        print(f"{service}/{method} has no row in service/auth/permissions.py: say which roles may call it")
    for service, method in sorted(rows - methods):
        print(f"service/auth/permissions.py has a row for {service}/{method}, which is no method")
    if methods != rows:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
