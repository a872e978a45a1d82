"""Owns what callers may do: the roles."""

import enum


class Role(enum.StrEnum):
    """What a credential is for. A credential has one or more; an administrator's is for everything."""

    INGEST = "ingest"
    READ = "read"
    ADMIN = "admin"


EVERY_ROLE = frozenset(Role)
