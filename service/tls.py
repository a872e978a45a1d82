"""Owns TLS: the server's credentials from files that may be replaced while it runs."""

import os
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import structlog

if TYPE_CHECKING:
    from service.config import Tls

log = structlog.get_logger("metering.tls")

# How long a client may resume a session, in which its certificate, expired by then perhaps, is not looked at again.
_RESUMED_S = 60.0


class BadCertificate(Exception):
    """The files of a certificate cannot be used; the text says why."""


def credentials(tls: "Tls") -> grpc.ServerCredentials:
    """Return credentials that follow the files: handshakes use what the files hold, those before keep what they had.

    For one address only: each must be told of a change. While the files cannot be used (a key that is not the
    certificate's, say, because only one was replaced yet), the last that could are used. Raises BadCertificate.
    """
    files = _Files(tls)
    return grpc.dynamic_ssl_server_credentials(
        files.given,
        files.changed,  # type: ignore[arg-type]  # None = nothing changed, as its documentation says
        require_client_authentication=tls.client_ca is not None,
    )


class _Files:
    def __init__(self, tls: "Tls") -> None:
        self._tls = tls
        self._paths = [path for path in (tls.certificate, tls.key, tls.client_ca) if path is not None]
        self._seen = self._stamps()
        self._fault = ""
        self.given = self.configuration()
        self._given_at = time.monotonic()

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """Read the files; raises BadCertificate."""
        content = [_read(path) for path in self._paths]
        check_key(self._tls.certificate, self._tls.key)
        if self._tls.client_ca is not None:
            check_authorities(self._tls.client_ca)
        return grpc.ssl_server_certificate_configuration(
            [(content[1], content[0])], content[2] if self._tls.client_ca is not None else None
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what the files hold if they changed. Called for every handshake, by threads of gRPC, in turns.

        The same is returned again from time to time: sessions from before cannot be resumed then.
        """
        try:
            stamps = self._stamps()
            if stamps == self._seen:
                return self._same()
            try:
                found = self.configuration()
            finally:
                # What was checked and what was read must be the same: files that change meanwhile are read again by the
                # next handshake. What cannot be used is not read again until it changes.
                if is_same := self._stamps() == stamps:
                    self._seen = stamps
        except BadCertificate as error:
            if str(error) != self._fault:
                log.warning("the certificate could not be read again; the last one is used", error=str(error))
            self._fault = str(error)
            return self._same()
        if not is_same:
            return self._same()
        self._fault = ""
        log.info("certificate read again", certificate=str(self._tls.certificate))
        return self._give(found)

    def _same(self) -> grpc.ServerCertificateConfiguration | None:
        return self._give(self.given) if time.monotonic() - self._given_at > _RESUMED_S else None

    def _give(self, found: grpc.ServerCertificateConfiguration) -> grpc.ServerCertificateConfiguration:
        self.given, self._given_at = found, time.monotonic()
        return found

    def _stamps(self) -> list[tuple[int, int, int]]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise BadCertificate(f"{path}: {error.strerror}.") from error
    # Whatever changes a file, its permissions too, moves this time.
    return found.st_ctime_ns, found.st_size, found.st_ino


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadCertificate(f"{path}: {error.strerror}.") from error


def check_authorities(path: Path) -> None:
    """Raise BadCertificate unless a file holds certificates: gRPC would fail handshakes, with no word of why."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        _read(path)
        context.load_verify_locations(path)
    except ssl.SSLError:
        pass
    if not context.cert_store_stats()["x509"]:
        raise BadCertificate(f"{path} holds no certificate in PEM that can be read.")


def check_key(certificate: Path, key: Path) -> None:
    """Raise BadCertificate unless the files hold a certificate and its key, as check_authorities does."""

    def encrypted() -> str:
        raise BadCertificate(
            f"{key} is encrypted: give the key without a passphrase, in a file that only you can read."
        )

    check_authorities(certificate)
    _read(key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=encrypted)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise BadCertificate(f"{key} is not the key of the certificate in {certificate}.") from error
        if error.reason is not None and error.reason != "PEM lib":
            said = error.reason.replace("_", " ").lower()
            raise BadCertificate(f"{certificate} and {key} cannot be used: {said}.") from error
        raise BadCertificate(f"{key} holds no key in PEM that can be read.") from error
