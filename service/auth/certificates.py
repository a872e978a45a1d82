"""Owns which client certificates are known: their SPIFFE ids and DNS names, and a file that maps these to callers."""

import functools
import os
import re
import ssl
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

from service.domain.roles import Role

log = structlog.get_logger("metering.auth")

# As DER: the id of the extension "subject alternative name", and what marks it and the names in it.
_ALTERNATIVE_NAMES = bytes.fromhex("551d11")
_EXTENSIONS, _DNS, _URI = 0xA3, 0x82, 0x86
_NAME = re.compile(r"spiffe://[^\s*]+|[A-Za-z0-9._-]+")


class BadClients(Exception):
    """The file of clients cannot be used; the text says why."""


@functools.lru_cache(1024)
def names_of(certificate: str) -> tuple[str, ...]:
    """Return the SPIFFE id and then the DNS names of a verified certificate in PEM; never its common name.

    Read from the certificate, because gRPC hands names on only as far as a NUL in them. There is a SPIFFE id only if
    there is no other URI, as SPIFFE has it, and DNS names that are spelt like URIs are none.
    """
    found = list(_alternative_names(ssl.PEM_cert_to_DER_cert(certificate)))
    ids = [name for tag, name in found if tag == _URI]
    if len(ids) != 1 or not ids[0].startswith("spiffe://"):
        ids = []
    return (*ids, *(name for tag, name in found if tag == _DNS and ":" not in name))


def _alternative_names(der: bytes) -> Iterator[tuple[int, str]]:
    """Give what marks each name in a certificate, and the name. What is not a certificate never gets here."""
    ((_, certificate),) = _parts(der)
    (_, signed), *_ = _parts(certificate)
    for _, wrapped in (one for one in _parts(signed) if one[0] == _EXTENSIONS):
        ((_, extensions),) = _parts(wrapped)
        for _, extension in _parts(extensions):
            (_, kind), *_, (_, content) = _parts(extension)
            if kind == _ALTERNATIVE_NAMES:
                ((_, names),) = _parts(content)
                yield from ((tag, name.decode(errors="replace")) for tag, name in _parts(names))


def _parts(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Give what is put together in DER: what marks each part, and its content."""
    at = 0
    while at < len(der):
        tag, size, at = der[at], der[at + 1], at + 2
        if size & 0x80:
            longer = size & 0x7F
            size, at = int.from_bytes(der[at : at + longer]), at + longer
        yield tag, der[at : at + size]
        at += size


class Clients:
    """The callers that certificates speak for.

    The file is TOML, a table per name of a certificate, which is matched whole:

        ["spiffe://prod.example/ns/billing/sa/sender"]
        organization = "acme"
        roles = ["ingest"]

    It is read again when it changes; while what it says cannot be used, the last that could is used. It is best
    replaced by renaming: a file without tables is one that knows nobody.
    """

    def __init__(self, path: Path) -> None:
        """Read the file; raises BadClients."""
        self._path = path
        self._seen = self._stamp()
        self._known: Mapping[str, tuple[str, frozenset[Role]]] = _read(path)
        self._fault = ""

    def find(self, names: Iterable[str]) -> tuple[str, frozenset[Role]] | None:
        """Return the organization and roles of the first of a certificate's names that is known."""
        return next((self._known[name] for name in names if name in self._known), None)

    def refresh(self) -> None:
        """Read the file again if it changed."""
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                return
            try:
                known = _read(self._path)
            finally:
                # A file that changes while it is read is read again next time.
                if is_same := self._stamp() == stamp:
                    self._seen = stamp
        except BadClients as error:
            if str(error) != self._fault:
                log.warning("the file of client certificates cannot be used; the last one still is", error=str(error))
            self._fault = str(error)
            return
        if is_same:
            self._known, self._fault = known, ""
            log.info("client certificates read again", clients=len(known))

    def _stamp(self) -> object:
        try:
            found = os.stat(self._path)
        except OSError as error:
            raise BadClients(f"{self._path}: {error.strerror}.") from error
        return found.st_ctime_ns, found.st_size, found.st_ino


def _read(path: Path) -> dict[str, tuple[str, frozenset[Role]]]:
    try:
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise BadClients(f"{path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadClients(f"{path} is not TOML: {error}.") from error
    return {name: _client(path, name, entry) for name, entry in found.items()}


def _client(path: Path, name: str, entry: Any) -> tuple[str, frozenset[Role]]:
    if not _NAME.fullmatch(name):
        raise BadClients(
            f"{path}: {name!r} is neither a SPIFFE id (spiffe://…) nor a DNS name. "
            "Names are matched whole, without wildcards."
        )
    fault = f'{path}: ["{name}"], in quotes, needs `organization`, a text, and `roles`, a list of {", ".join(Role)}.'
    if not isinstance(entry, dict) or set(entry) != {"organization", "roles"}:
        raise BadClients(fault)
    organization, roles = entry["organization"], entry["roles"]
    if not isinstance(organization, str) or not organization or not isinstance(roles, list) or not roles:
        raise BadClients(fault)
    if not all(isinstance(role, str) and role in set(Role) for role in roles):
        raise BadClients(fault)
    return organization, frozenset(map(Role, roles))
