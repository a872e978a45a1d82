"""Owns which client certificates are known: a file that maps their SPIFFE ids and DNS names to callers."""

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import structlog

from service.domain.roles import Role

log = structlog.get_logger("metering.auth")


class BadClients(Exception):
    """The file of clients cannot be used; the text says why."""


class Clients:
    """The callers that certificates speak for.

    The file is TOML, a table per name of a certificate, which is matched whole:

        ["spiffe://prod.example/ns/billing/sa/sender"]
        organization = "acme"
        roles = ["ingest"]

    It is read again when it changes; while what it says cannot be used, the last that could is used.
    """

    def __init__(self, path: Path) -> None:
        """Read the file; raises BadClients."""
        self._path = path
        self._seen: object = None
        self._known: Mapping[str, tuple[str, frozenset[Role]]] = {}
        self._seen, self._known = self._stamp(), _read(path)

    def find(self, names: Iterable[str]) -> tuple[str, frozenset[Role]] | None:
        """Return the organization and roles of the first of a certificate's names that is known."""
        return next((self._known[name] for name in names if name in self._known), None)

    def refresh(self) -> None:
        """Read the file again if it changed."""
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                self._known = _read(self._path)
                log.info("client certificates read again", clients=len(self._known))
        except BadClients as error:
            log.warning("the file of client certificates cannot be used; the last one still is", error=str(error))

    def _stamp(self) -> object:
        try:
            found = os.stat(self._path)
        except OSError as error:
            raise BadClients(f"{self._path}: {error.strerror}") from error
        return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> dict[str, tuple[str, frozenset[Role]]]:
    try:
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise BadClients(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadClients(f"{path} is not TOML: {error}") from error
    return {name: _client(path, name, entry) for name, entry in found.items()}


def _client(path: Path, name: str, entry: Any) -> tuple[str, frozenset[Role]]:
    fault = f"{path}: [{name!r}] needs `organization`, a text, and `roles`, a list of {', '.join(Role)}"
    if not isinstance(entry, dict) or set(entry) != {"organization", "roles"}:
        raise BadClients(fault)
    organization, roles = entry["organization"], entry["roles"]
    if not isinstance(organization, str) or not organization or not isinstance(roles, list) or not roles:
        raise BadClients(fault)
    if not all(isinstance(role, str) and role in set(Role) for role in roles):
        raise BadClients(fault)
    return organization, frozenset(map(Role, roles))
