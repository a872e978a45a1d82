"""Owns TLS: the server's credentials from files that may be replaced while it runs."""

import os
import ssl
from pathlib import Path

import grpc
import structlog

from service.config import Tls

log = structlog.get_logger("metering.tls")


class BadCertificate(Exception):
    """The files of a certificate cannot be used; the text says why."""


def credentials(tls: Tls) -> grpc.ServerCredentials:
    """Return credentials that follow the files: handshakes use what the files hold, those before keep what they had.

    While the files cannot be used (a key that is not the certificate's, say, because only one was replaced yet), the
    last that could are used. Raises BadCertificate.
    """
    files = _Files(tls)
    return grpc.dynamic_ssl_server_credentials(
        files.configuration(),
        files.changed,  # type: ignore[arg-type]  # None = nothing changed, as its documentation says
        require_client_authentication=tls.client_ca is not None,
    )


class _Files:
    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._paths = [path for path in (tls.certificate, tls.key, tls.client_ca) if path is not None]
        self._seen = self._stamps()

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """Read the files; raises BadCertificate."""
        content = [_read(path) for path in self._paths]
        _check(self._tls)
        return grpc.ssl_server_certificate_configuration(
            [(content[1], content[0])], content[2] if self._tls.client_ca is not None else None
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what the files hold if they changed. Called for every handshake, by threads of gRPC."""
        try:
            stamps = self._stamps()
            if stamps == self._seen:
                return None
            found = self.configuration()
        except BadCertificate as error:
            log.warning("the certificate could not be read again; the last one is used", error=str(error))
            return None
        self._seen = stamps
        log.info("certificate read again", certificate=str(self._tls.certificate))
        return found

    def _stamps(self) -> list[tuple[int, int, int]]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise BadCertificate(f"{path}: {error.strerror}") from error
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadCertificate(f"{path}: {error.strerror}") from error


def _check(tls: Tls) -> None:
    """Raise BadCertificate unless the key is the certificate's: gRPC would fail handshakes, with no word of why."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.certificate, tls.key, password=lambda: "")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise BadCertificate(f"{tls.certificate} and {tls.key} are not a certificate and its key: {error}") from error
    if tls.client_ca is not None:
        try:
            context.load_verify_locations(tls.client_ca)
        except (ssl.SSLError, OSError) as error:
            raise BadCertificate(f"{tls.client_ca} holds no certificates: {error}") from error
