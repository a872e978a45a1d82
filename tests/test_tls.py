"""TLS: who is let in, who a certificate speaks for, files that change under a running server, and the commands."""

import asyncio
import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from click.testing import CliRunner, Result
from conftest import Client, event
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from faults import read_fault, until
from structlog.testing import capture_logs

from metering.v1 import customer_pb2, event_pb2
from service import tls as service_tls
from service.auth import new_api_key
from service.cli import main, serve
from service.config import Config, Tls
from service.database import Database
from service.domain.roles import Role
from service.gateway import GatewayError, find_envoy
from service.server import CannotServe, serving
from service.store import organizations

REPOSITORY = Path(__file__).resolve().parent.parent
SENDER = "spiffe://prod.example/ns/billing/sa/sender"
UNKNOWN, INVALID = ("UNAUTHENTICATED", "CREDENTIAL_MISSING", None), ("UNAUTHENTICATED", "CREDENTIAL_INVALID", None)
ROLE_REQUIRED = ("PERMISSION_DENIED", "ROLE_REQUIRED", None)
LIST = customer_pb2.ListCustomersRequest(page_size=1)
LINE = '{"transaction_id": "one", "customer_id": "acme", "event_type": "request", "timestamp": "2026-01-01T00:00:00Z"}'
CREATE = customer_pb2.CreateCustomerRequest(customer=customer_pb2.Customer(name="Acme"))


# --- Certificates


@dataclass
class Issued:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes


@dataclass
class Authority:
    """Signs certificates."""

    name: str = "authority"
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        builder = _builder(self.name, self.name, self.key.public_key(), -1, 1)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.pem = builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        *names: str | x509.GeneralName,
        common_name: str = "nobody",
        days: tuple[int, int] = (-1, 1),
        usages: tuple[x509.ObjectIdentifier, ...] = (),
    ) -> Issued:
        """Sign a certificate for names: URIs have a colon, all else that is text is a DNS name."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(common_name, self.name, key.public_key(), *days)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(map(_general, names)), critical=False)
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        certificate = builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        return Issued(certificate, _pem(key, serialization.NoEncryption()))

    def server(self) -> Issued:
        """Sign a certificate for the server."""
        return self.issue("localhost", x509.IPAddress(ip_address("127.0.0.1")))


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePublicKey, begins: int, ends: int) -> Any:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        issuer_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]),
        subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]),
        public_key=key,
        serial_number=x509.random_serial_number(),
    )
    return builder.not_valid_before(now + timedelta(days=begins)).not_valid_after(now + timedelta(days=ends))


def _general(name: str | x509.GeneralName) -> x509.GeneralName:
    if not isinstance(name, str):
        return name
    return x509.UniformResourceIdentifier(name) if ":" in name else x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey, encryption: serialization.KeySerializationEncryption) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def replace(path: Path, content: bytes | str) -> None:
    """Put a file in the place of another, as a careful operator does."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content if isinstance(content, bytes) else content.encode())
    new.rename(path)


@dataclass
class Files:
    """What the server reads, and who signed it."""

    place: Path
    authority: Authority = field(default_factory=Authority)

    def __post_init__(self) -> None:
        self.tls = Tls(self.place / "cert.pem", self.place / "key.pem")
        self.mutual = Tls(*self.paths, self.place / "client-ca.pem", self.place / "clients.toml")
        self.put(self.authority.server())
        replace(self.place / "client-ca.pem", self.authority.pem)
        replace(self.place / "ca.pem", self.authority.pem)
        self.clients({SENDER: ("acme", ["ingest"]), "reader.example": ("acme", ["read"])})

    @property
    def paths(self) -> tuple[Path, Path]:
        """The server's certificate and its key."""
        return self.tls.certificate, self.tls.key

    def put(self, issued: Issued) -> None:
        """Replace the server's certificate, then its key."""
        replace(self.tls.certificate, issued.certificate)
        replace(self.tls.key, issued.key)

    def clients(self, known: dict[str, tuple[str, list[str]]]) -> None:
        """Replace the file of clients."""
        tables = (f'["{name}"]\norganization = "{org}"\nroles = {roles}\n' for name, (org, roles) in known.items())
        replace(self.place / "clients.toml", "\n".join(tables))

    def save(self, issued: Issued, name: str) -> tuple[str, str]:
        """Write a certificate and its key to files of their own."""
        certificate, key = self.place / f"{name}.pem", self.place / f"{name}-key.pem"
        certificate.write_bytes(issued.certificate)
        key.write_bytes(issued.key)
        return str(certificate), str(key)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """The files of a server that asks clients for certificates."""
    return Files(tmp_path)


# --- Servers and callers


@contextlib.asynccontextmanager
async def served(database: Database, tls: Tls | None, *listen: str, **settings: Any) -> AsyncIterator[list[str]]:
    """Run a server in this process and give its addresses."""
    config = Config(listen=listen or ("127.0.0.1:0",), allow_unsafe_database=True, tls=tls, **settings)
    async with serving(config, database) as addresses:
        yield addresses


@pytest.fixture
async def acme(database: Database) -> str:
    """The organization `acme`, and a key of the organization `default` for everything."""
    key = new_api_key()
    async with database.engine.begin() as connection:
        await organizations.create_organization(connection, "acme")
        await organizations.create_api_key(connection, "default", key.id, "test", key.secret_hash, [Role.ADMIN])
    return key.text


@pytest.fixture
async def address(database: Database, files: Files, acme: str) -> AsyncIterator[str]:
    """Where a server listens that asks clients for certificates."""
    async with served(database, files.mutual) as (found, *_):
        yield found


@contextlib.asynccontextmanager
async def calling(address: str, trusted: Authority, issued: Issued | None = None) -> AsyncIterator[Client]:
    """A client with a connection of its own."""
    own = (issued.key, issued.certificate) if issued else (None, None)
    credentials = grpc.ssl_channel_credentials(trusted.pem, *own)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200)]
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        yield Client(address, channel)


async def outcome(client: Client, method: str = "list", key: str | None = None) -> Any:
    """What a call came to: None, or code, reason and field."""
    metadata = [("authorization", f"Bearer {key}")] if key else []
    calls: dict[str, Any] = {
        "list": lambda: client.customers.ListCustomers(LIST, metadata=metadata, timeout=20),
        "create": lambda: client.customers.CreateCustomer(CREATE, metadata=metadata, timeout=20),
        "ingest": lambda: client.events.IngestEvents(
            event_pb2.IngestEventsRequest(events=[event()]), metadata=metadata, timeout=20
        ),
    }
    try:
        await calls[method]()
    except grpc.aio.AioRpcError as error:
        return read_fault(error).brief
    return None


async def comes_in(address: str, trusted: Authority, issued: Issued | None = None) -> bool:
    """Whether a handshake leads to an answer, of whatever kind."""
    async with calling(address, trusted, issued) as client:
        found = await outcome(client)
        assert found is None or found[0] in {"UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED"}, found
        return found is None or found[0] != "UNAVAILABLE"


def shown(address: str, version: ssl.TLSVersion | None = None) -> bytes:
    """Shake hands and return the certificate that the server shows, as PEM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if version is not None:
        context.set_ciphers("ALL:@SECLEVEL=0")  # or OpenSSL itself would not try
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = version
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as plain, context.wrap_socket(plain) as secure:
        assert version is None or secure.version() == version.name.replace("_", ".").replace("TLSv1.0", "TLSv1")
        return ssl.DER_cert_to_PEM_cert(secure.getpeercert(binary_form=True) or b"").encode()


def same(one: bytes, other: bytes) -> bool:
    """Whether two certificates are one."""
    return x509.load_pem_x509_certificate(one) == x509.load_pem_x509_certificate(other)


async def shows(address: str, issued: Issued) -> bool:
    """Whether new connections get this certificate."""
    return same(await asyncio.to_thread(shown, address), issued.certificate)


# --- Transport


async def test_tcp_takes_tls_and_nothing_else(database: Database, files: Files) -> None:
    """Calls go over TLS 1.2 and 1.3; plaintext, TLS 1.0 and 1.1 do not get through; nor do clients trust anyone."""
    async with served(database, files.tls) as (address,):
        async with calling(address, files.authority) as client:
            assert await outcome(client, "create") is None
            assert await outcome(client, "list") is None
        async with grpc.aio.insecure_channel(address) as channel:
            assert (await outcome(Client(address, channel)))[0] == "UNAVAILABLE"
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            await asyncio.to_thread(shown, address, version)
        for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.to_thread(shown, address, version)
        assert not await comes_in(address, Authority())


async def test_every_tcp_address_has_tls_and_the_socket_does_without(database: Database, files: Files) -> None:
    """Any number of addresses: each takes TLS, and each has the new certificate once it is replaced."""
    with tempfile.TemporaryDirectory() as place:
        unix = f"unix:{place}/m.sock"
        async with served(database, files.tls, unix, "127.0.0.1:0", "127.0.0.1:0") as (_, *tcp):
            async with grpc.aio.insecure_channel(unix) as channel:
                assert await outcome(Client(unix, channel)) is None
            assert os.stat(f"{place}/m.sock").st_mode & 0o777 == 0o660
            for _ in range(2):
                files.put(issued := files.authority.server())
                assert [await shows(one, issued) for one in tcp] == [True, True]


async def test_certificates_that_are_refused_at_the_handshake(address: str, files: Files) -> None:
    """A client needs a certificate of the client CA, valid today and for clients; all else has no connection."""
    good, client = files.authority, ExtendedKeyUsageOID.CLIENT_AUTH
    assert await comes_in(address, good, good.issue(SENDER))
    assert await comes_in(address, good, good.issue(SENDER, usages=(client, ExtendedKeyUsageOID.SERVER_AUTH)))
    refused: dict[str, Issued | None] = {
        "none": None,
        "unknown CA": Authority("other").issue(SENDER),
        "unknown CA of the same name": Authority(good.name).issue(SENDER),
        "expired": good.issue(SENDER, days=(-2, -1)),
        "not yet valid": good.issue(SENDER, days=(1, 2)),
        "for servers": good.issue(SENDER, usages=(ExtendedKeyUsageOID.SERVER_AUTH,)),
        "for signing code": good.issue(SENDER, usages=(ExtendedKeyUsageOID.CODE_SIGNING,)),
    }
    assert {name: await comes_in(address, good, one) for name, one in refused.items()} == dict.fromkeys(refused, False)


# --- Whose certificate it is


async def test_known_names_are_an_organization_and_roles(address: str, files: Files, database: Database) -> None:
    """A known SPIFFE id or DNS name may do what its roles say, in its organization, and nothing else."""
    async with calling(address, files.authority, files.authority.issue(SENDER)) as sender:
        assert await outcome(sender, "ingest") is None
        assert await outcome(sender, "list") == ROLE_REQUIRED
    async with calling(address, files.authority, files.authority.issue("reader.example")) as reader:
        assert await outcome(reader, "list") is None
        assert await outcome(reader, "ingest") == ROLE_REQUIRED
        assert await outcome(reader, "create") == ROLE_REQUIRED
        found = await reader.events.SearchEvents(event_pb2.SearchEventsRequest(customer_id="acme"))
        assert len(found.events) == 1, "what the sender sent is in the organization of both"


NAMES: list[tuple[str, list[str | x509.GeneralName], Any]] = [
    ("the name", ["reader.example"], None),
    ("the id", [SENDER], ROLE_REQUIRED),
    ("the name among others", ["one.example", "reader.example", "two.example"], None),
    ("the name beside a URI", ["https://other.example/", "reader.example"], None),
    ("the id before the name", ["reader.example", SENDER], ROLE_REQUIRED),
    ("another", ["writer.example"], INVALID),
    ("a prefix", ["reader.exampl"], INVALID),
    ("a longer name", ["reader.example.evil.example"], INVALID),
    ("a suffix", ["example"], INVALID),
    ("a name below", ["a.reader.example"], INVALID),
    ("a final dot", ["reader.example."], INVALID),
    ("other casing", ["Reader.Example"], INVALID),
    ("a wildcard", ["*.example"], INVALID),
    ("NUL", ["reader.example\0.evil.example"], INVALID),
    ("NUL in the id", [f"{SENDER}\0/evil"], INVALID),
    ("a blank", ["reader.example "], INVALID),
    ("a part of the id", [SENDER.rpartition("/")[0]], INVALID),
    ("below the id", [f"{SENDER}/more"], INVALID),
    ("the id with a slash", [f"{SENDER}/"], INVALID),
    ("the id with a line end", [f"{SENDER}\n"], INVALID),
    ("the id in capitals", [SENDER.upper()], UNKNOWN),
    ("the id of another trust domain", [SENDER.replace("prod", "test")], INVALID),
    ("two ids", [SENDER, "spiffe://prod.example/other"], UNKNOWN),
    ("the id as a DNS name", [x509.DNSName(SENDER)], UNKNOWN),
    ("the name as a URI", [x509.UniformResourceIdentifier("reader.example")], UNKNOWN),
    ("the name as an e-mail address", [x509.RFC822Name("reader.example")], UNKNOWN),
    ("an IP address", [x509.IPAddress(ip_address("127.0.0.1"))], UNKNOWN),
    ("the IP address as a name", ["10.0.0.1"], None),
    ("the common name alone", [], UNKNOWN),
]


async def test_names_are_matched_whole(address: str, files: Files) -> None:
    """Nothing but the exact SPIFFE id or DNS name counts; the common name is always that of the reader."""
    known = {SENDER: ("acme", ["ingest"]), "reader.example": ("acme", ["read"]), "10.0.0.1": ("acme", ["read"])}
    files.clients(known)
    found = {}
    for label, names, _ in NAMES:
        issued = files.authority.issue(*names, common_name="reader.example")
        async with calling(address, files.authority, issued) as client:
            found[label] = await outcome(client)
    assert found == {label: expected for label, _, expected in NAMES}


async def test_a_header_goes_before_the_certificate(address: str, files: Files, acme: str) -> None:
    """With an authorization header the certificate says nothing: neither more nor instead."""
    async with calling(address, files.authority, files.authority.issue(SENDER)) as client:
        assert await outcome(client, "create", key=acme) is None
        assert await outcome(client, "ingest", key=acme[:-1] + ("A" if acme[-1] != "A" else "B")) == INVALID
        assert await outcome(client, "create") == ROLE_REQUIRED
    async with calling(address, files.authority, files.authority.issue("unknown.example")) as client:
        assert await outcome(client, "create", key=acme) is None
        assert await outcome(client, "create") == INVALID


async def test_an_organization_that_does_not_exist(address: str, files: Files) -> None:
    """The file may name one; its client is refused, like an unknown one, and the log says why."""
    files.clients({"reader.example": ("nowhere", ["read"])})
    issued = files.authority.issue("reader.example")
    with capture_logs() as lines:
        async with calling(address, files.authority, issued) as client:
            assert await outcome(client) == INVALID
    (line,) = (one for one in lines if one["log_level"] == "warning")
    assert line["event"] == "a credential names an organization that does not exist"
    assert "nowhere" in line["organization"]


# --- Files that change


async def test_a_new_certificate_is_for_new_connections(address: str, files: Files) -> None:
    """Certificate and key are replaced one after the other; in between the last pair is used, and open ones live on."""
    old, new = Issued(*(path.read_bytes() for path in files.paths)), files.authority.server()
    issued = files.authority.issue("reader.example")
    with capture_logs() as lines:
        async with calling(address, files.authority, issued) as client:
            assert await outcome(client) is None
            replace(files.tls.certificate, new.certificate)
            for _ in range(3):
                assert await shows(address, old)
            replace(files.tls.key, new.key)
            assert await shows(address, new)
            assert await outcome(client) is None
        assert await comes_in(address, files.authority, issued)
    said = [(one["log_level"], one["event"]) for one in lines if "certificate" in one["event"]]
    assert said == [
        ("warning", "the certificate could not be read again; the last one is used"),
        ("info", "certificate read again"),
    ]
    assert f"{files.tls.key} is not the key of the certificate in {files.tls.certificate}." in str(lines)


@pytest.mark.parametrize("fault", ["garbage", "empty", "gone"])
@pytest.mark.parametrize("which", ["cert.pem", "key.pem", "client-ca.pem"])
async def test_files_that_cannot_be_used_change_nothing(address: str, files: Files, which: str, fault: str) -> None:
    """Until there is one that can be used the last goes on, for every new connection; it is said once."""
    path, content = files.place / which, (files.place / which).read_bytes()
    issued = files.authority.issue("reader.example")
    with capture_logs() as lines:
        if fault == "gone":
            path.unlink()
        else:
            replace(path, "-----BEGIN CERTIFICATE-----\nAAAA\n" if fault == "garbage" else "")
        for _ in range(3):
            assert await comes_in(address, files.authority, issued)
        (line,) = (one for one in lines if one["log_level"] == "warning")
        assert str(path) in line["error"]
        assert "\n" not in line["error"]
        replace(path, content)
        assert await comes_in(address, files.authority, issued)
        assert not await comes_in(address, files.authority)
        assert "certificate read again" in [one["event"] for one in lines]


async def test_a_new_client_ca_is_for_new_connections(address: str, files: Files) -> None:
    """After the file of client CAs was replaced, only certificates of the new ones open connections; both may be in."""
    old, new = files.authority, Authority("next")
    before, after = old.issue("reader.example"), new.issue("reader.example")
    async with calling(address, files.authority, before) as client:
        assert await outcome(client) is None
        assert not await comes_in(address, files.authority, after)
        replace(files.place / "client-ca.pem", old.pem + new.pem)
        assert await comes_in(address, files.authority, after)
        assert await comes_in(address, files.authority, before)
        replace(files.place / "client-ca.pem", new.pem)
        assert await comes_in(address, files.authority, after)
        assert not await comes_in(address, files.authority, before)
        assert await outcome(client) is None


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_sessions_are_not_resumed_for_long(
    address: str, files: Files, monkeypatch: pytest.MonkeyPatch, version: ssl.TLSVersion
) -> None:
    """A resumed session does not show its certificate again, so it ends with a new client CA, and after a minute."""
    issued = files.authority.issue(SENDER)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(*files.save(issued, "own"))
    port = int(address.rpartition(":")[2])

    def connect(session: ssl.SSLSession | None) -> tuple[bool | None, ssl.SSLSession | None]:
        with (
            socket.create_connection(("127.0.0.1", port), 10) as plain,
            context.wrap_socket(plain, session=session) as secure,
        ):
            secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000"))
            assert secure.recv(9), "settings, and what a session is resumed with"
            return secure.session_reused, secure.session

    async def resumed(session: ssl.SSLSession | None) -> bool | None:
        return (await asyncio.to_thread(connect, session))[0]

    _, session = await asyncio.to_thread(connect, None)
    assert await resumed(session)
    with monkeypatch.context() as patch:
        patch.setattr(service_tls, "_RESUMED_S", 0.0)
        for _ in range(5):
            assert not await resumed(session)
        # Nor while there is nothing new to read.
        _, session = await asyncio.to_thread(connect, None)
        content = files.tls.key.read_bytes()
        files.tls.key.unlink()
        assert not await resumed(session)
        replace(files.tls.key, content)
    assert not await resumed(session)
    _, session = await asyncio.to_thread(connect, None)
    assert await resumed(session)
    replace(files.place / "client-ca.pem", Authority("next").pem)
    with pytest.raises((AssertionError, OSError)):
        await resumed(session)


async def test_a_client_is_taken_out_of_the_file(address: str, files: Files) -> None:
    """It is felt within 5 seconds, on open connections and open streams; others and new roles likewise."""
    async with (
        calling(address, files.authority, files.authority.issue(SENDER)) as sender,
        calling(address, files.authority, files.authority.issue("reader.example")) as reader,
    ):
        stream = sender.events.StreamEvents()

        async def send(sequence: int) -> bool:
            await stream.write(event_pb2.StreamEventsRequest(sequence=sequence, events=[event()]))
            try:
                return await stream.read() is not grpc.aio.EOF
            except grpc.aio.AioRpcError:
                return False

        assert await send(1)
        assert await outcome(sender, "ingest") is None
        files.clients({"reader.example": ("acme", ["ingest"])})
        sequence = 1
        async with asyncio.timeout(5):
            while await send(sequence := sequence + 1):  # noqa: ASYNC110 - the server looks by itself
                await asyncio.sleep(0.1)
        assert await stream.code() is grpc.StatusCode.UNAUTHENTICATED
        assert await outcome(sender, "ingest") == INVALID
        assert await outcome(reader) == ROLE_REQUIRED
        assert await outcome(reader, "ingest") is None


async def test_a_file_of_clients_that_cannot_be_used(address: str, files: Files) -> None:
    """The last goes on, and the log says once what is wrong; an empty file is one that knows nobody."""
    path = files.place / "clients.toml"
    issued = files.authority.issue("reader.example")

    async def lasts() -> None:
        ends = asyncio.get_running_loop().time() + 5
        while asyncio.get_running_loop().time() < ends:
            assert await outcome(client) is None
            await asyncio.sleep(0.2)

    with capture_logs() as lines:
        async with calling(address, files.authority, issued) as client:
            assert await outcome(client) is None
            replace(path, "[reader.example]\n")
            await lasts()
            path.unlink()
            await lasts()
            needs = "needs `organization`, a text, and `roles`, a list of ingest, read, admin."
            assert [one["error"] for one in lines if one["log_level"] == "warning"] == [
                f'{path}: ["reader"], in quotes, {needs}',
                f"{path}: No such file or directory.",
            ]
            replace(path, "")
            async with asyncio.timeout(5):
                while await outcome(client) != INVALID:  # noqa: ASYNC110 - the server looks by itself
                    await asyncio.sleep(0.1)


async def test_certificates_rotate_under_load(address: str, files: Files) -> None:
    """Not one call fails while certificates, keys and CAs change, on old connections and on new ones."""
    done = asyncio.Event()
    counts = [0] * 4

    async def work(number: int) -> None:
        issued = files.authority.issue("reader.example")
        while not done.is_set():
            async with calling(address, files.authority, issued) as client:
                for _ in range(5):
                    await client.customers.ListCustomers(LIST, timeout=30)
                    counts[number] += 1

    with capture_logs() as lines:
        workers = [asyncio.create_task(work(number)) for number in range(len(counts))]
        for _ in range(12):
            issued = files.authority.server()
            replace(files.tls.certificate, issued.certificate)
            await asyncio.sleep(0.05)
            replace(files.tls.key, issued.key)
            replace(files.place / "client-ca.pem", files.authority.pem)
            await asyncio.sleep(0.1)
            assert await shows(address, issued)
        done.set()
        await asyncio.gather(*workers)
    assert min(counts) > 0
    assert sum(counts) >= 20
    assert sum(one["event"] == "certificate read again" for one in lines) >= 12


def descriptors() -> int:
    """How many files and sockets this process has open; 0 where that cannot be told."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc") else 0


async def test_a_handshake_costs_a_look_at_the_files(
    address: str, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are read when they changed, also once only when they cannot be used; nothing is left open."""
    reads: list[Path] = []
    read = service_tls._read
    monkeypatch.setattr(service_tls, "_read", lambda path: reads.append(path) or read(path))

    def shake(times: int) -> None:
        for _ in range(times):
            shown(address)

    await asyncio.to_thread(shake, 3)
    assert not reads
    await asyncio.sleep(0.3)  # for the sockets of those to be closed
    before = descriptors()
    await asyncio.to_thread(shake, 100)
    assert not reads
    await until(lambda: descriptors() <= before + 2)
    for content in ("garbage", files.authority.server().key):
        replace(files.tls.key, content)
        await asyncio.to_thread(shake, 2)
        assert reads
        reads.clear()
        await asyncio.to_thread(shake, 20)
        assert not reads


async def test_what_is_read_is_what_was_checked(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that change while they are read are not used, and read again by the next handshake."""
    found = service_tls._Files(files.tls)
    check = service_tls.check_key
    new = files.authority.server()

    def slow(*paths: Path) -> None:
        check(*paths)
        monkeypatch.setattr(service_tls, "check_key", check)
        files.put(new)

    monkeypatch.setattr(service_tls, "check_key", slow)
    files.put(files.authority.server())
    assert found.changed() is None
    assert found.changed() is not None
    assert found.changed() is None


# --- Start


def _faults(files: Files) -> dict[str, tuple[dict[str, bytes], str]]:
    key = ec.generate_private_key(ec.SECP256R1())
    encrypted = _pem(key, serialization.BestAvailableEncryption(b"secret"))
    place, other = files.place, files.authority.server()
    table = b'["reader.example"]\n'
    needs = f'{place}/clients.toml: ["reader.example"], in quotes, needs `organization`, a text, and `roles`, a list of'
    return {
        "the key of another": (
            {"key.pem": other.key},
            f"{place}/key.pem is not the key of the certificate in {place}/cert.pem.",
        ),
        "an encrypted key": (
            {"key.pem": encrypted},
            f"{place}/key.pem is encrypted: give the key without a passphrase",
        ),
        "a key that is none": ({"key.pem": b"garbage"}, f"{place}/key.pem holds no key in PEM that can be read."),
        "no key": ({"key.pem": b""}, f"{place}/key.pem holds no key in PEM that can be read."),
        "a certificate as key": ({"key.pem": other.certificate}, f"{place}/key.pem holds no key in PEM"),
        "a key as certificate": ({"cert.pem": other.key}, f"{place}/cert.pem holds no certificate in PEM"),
        "garbage": ({"cert.pem": b"\x00\xff"}, f"{place}/cert.pem holds no certificate in PEM that can be read."),
        "cut short": ({"cert.pem": other.certificate[:99]}, f"{place}/cert.pem holds no certificate in PEM"),
        "an empty CA": ({"client-ca.pem": b""}, f"{place}/client-ca.pem holds no certificate in PEM that can be read."),
        "a CA that is none": ({"client-ca.pem": b"garbage"}, f"{place}/client-ca.pem holds no certificate in PEM"),
        "no TOML": ({"clients.toml": b"[spiffe://x]"}, f"{place}/clients.toml is not TOML: "),
        "no text": ({"clients.toml": b"\xff"}, f"{place}/clients.toml is not TOML: "),
        "twice": ({"clients.toml": table * 2}, f"{place}/clients.toml is not TOML: "),
        "no organization": ({"clients.toml": table + b'roles = ["read"]'}, needs),
        "an empty organization": ({"clients.toml": table + b'organization = ""\nroles = ["read"]'}, needs),
        "no roles": ({"clients.toml": table + b'organization = "acme"'}, needs),
        "empty roles": ({"clients.toml": table + b'organization = "acme"\nroles = []'}, needs),
        "roles as text": ({"clients.toml": table + b'organization = "acme"\nroles = "read"'}, needs),
        "an unknown role": ({"clients.toml": table + b'organization = "acme"\nroles = ["write"]'}, needs),
        "one thing more": ({"clients.toml": table + b'organization = "a"\nroles = ["read"]\nrole = 1'}, needs),
        "a wildcard": (
            {"clients.toml": b'["*.example"]\norganization = "acme"\nroles = ["read"]'},
            f"{place}/clients.toml: '*.example' is neither a SPIFFE id (spiffe://…) nor a DNS name. Names are matched",
        ),
    }


async def test_files_that_a_server_does_not_start_with(database: Database, tmp_path: Path) -> None:
    """The one sentence names the file and what is wrong with it."""
    for number, name in enumerate(_faults(Files(tmp_path))):
        (place := tmp_path / str(number)).mkdir()
        files = Files(place)
        content, expected = _faults(files)[name]
        for file, text in content.items():
            replace(place / file, text)
        with pytest.raises(CannotServe) as caught:
            async with served(database, files.mutual):
                pass
        assert str(caught.value).startswith(expected), name
        assert "\n" not in str(caught.value).rstrip("\n"), name
    for file in ("cert.pem", "key.pem", "client-ca.pem", "clients.toml"):
        files = Files(tmp_path)
        (tmp_path / file).unlink()
        with pytest.raises(CannotServe, match=rf"{file}: No such file or directory\.$"):
            async with served(database, files.mutual):
                pass


TLS_FLAGS = {
    "tls-cert": "cert.pem",
    "tls-key": "key.pem",
    "tls-client-ca": "client-ca.pem",
    "tls-clients": "clients.toml",
}


@pytest.mark.parametrize("by", ["flags", "variables"])
def test_flags_and_variables(files: Files, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """Each flag has its variable; what is missing beside one is named, and so is a file that is not there."""
    found: list[Config] = []

    async def run_server(config: Config, _ready: Any) -> None:
        found.append(config)

    monkeypatch.setattr(serve, "run_server", run_server)
    monkeypatch.setattr(serve, "log_to_stderr", lambda _level: None)

    def run(*flags: str, place: Path = files.place) -> Result:
        chosen = {flag: str(place / TLS_FLAGS[flag]) for flag in flags}
        if by == "flags":
            return invoke("serve", *(word for flag, path in chosen.items() for word in (f"--{flag}", path)))
        return invoke("serve", **{f"METERING_{flag.upper().replace('-', '_')}": path for flag, path in chosen.items()})

    for flags, expected in (
        ((), None),
        (("tls-cert", "tls-key"), Tls(*files.paths)),
        (("tls-cert", "tls-key", "tls-client-ca"), Tls(*files.paths, files.mutual.client_ca)),
        (tuple(TLS_FLAGS), files.mutual),
    ):
        result = run(*flags)
        assert result.exit_code == 0, result.output
        assert found[-1].tls == expected
    for flags, said in (
        (("tls-cert",), "TLS needs both --tls-cert and --tls-key."),
        (("tls-key",), "TLS needs both --tls-cert and --tls-key."),
        (("tls-client-ca",), "TLS needs both --tls-cert and --tls-key."),
        (("tls-clients",), "TLS needs both --tls-cert and --tls-key."),
        (("tls-cert", "tls-key", "tls-clients"), "--tls-clients needs --tls-client-ca"),
    ):
        result = run(*flags)
        assert result.exit_code == 2
        assert said in result.output
    for flag, file in TLS_FLAGS.items():
        result = run(flag, place=files.place / "missing")
        assert result.exit_code == 2
        assert f"--{flag}" in result.output
        assert f"{file}' does not exist" in result.output


# --- The gateway


async def test_the_gateway_beside_tls(database: Database, files: Files, acme: str) -> None:
    """It goes through the unix socket, and takes credentials on loopback only; all else is refused, and why."""
    with pytest.raises(CannotServe, match="first address without TLS: let that be a unix socket"):
        async with served(database, files.mutual, gateway="127.0.0.1:0"):
            pass
    with tempfile.TemporaryDirectory() as place:
        listen = (f"unix:{place}/m.sock", "127.0.0.1:0")
        with pytest.raises(CannotServe, match=r"gateway on 0\.0\.0\.0:0 would take credentials .* without TLS"):
            async with served(database, files.mutual, *listen, gateway="0.0.0.0:0"):
                pass
        try:
            find_envoy()
        except GatewayError as error:
            pytest.skip(str(error))
        async with served(database, files.mutual, *listen, gateway="127.0.0.1:0") as addresses:
            url = f"http://{addresses.gateway.address}/v1/customers"  # type: ignore[attr-defined]
            async with httpx.AsyncClient() as http:
                assert (await http.get(url)).status_code == 401
                assert (await http.get(url, headers={"authorization": f"Bearer {acme}"})).status_code == 200
            assert await comes_in(addresses[1], files.authority, files.authority.issue(SENDER))
            assert not await comes_in(addresses[1], files.authority)


# --- The commands


def invoke(*arguments: str, **variables: str) -> Result:
    """Run a command in this process."""
    ours: dict[str, str | None] = {name: None for name in os.environ if name.startswith("METERING_")}
    return CliRunner(env={**ours, **variables}).invoke(main, list(arguments))


async def metering(*arguments: str, **variables: str) -> Result:
    """Run a command while this loop serves."""
    return await asyncio.to_thread(invoke, *arguments, **variables)


async def test_health_with_and_without_a_certificate(
    database: Database, files: Files, acme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`metering health` asks a server with TLS, one that wants certificates, and one on a unix socket."""
    certificate, key = files.save(files.authority.issue("probe.example"), "probe")
    ca = str(files.place / "ca.pem")
    with tempfile.TemporaryDirectory() as place:
        async with (
            served(database, files.tls) as (plain,),
            served(database, files.mutual, f"unix:{place}/m.sock", "127.0.0.1:0") as (unix, mutual),
        ):
            own = ("--tls-cert", certificate, "--tls-key", key)
            for arguments in (
                (plain, "--tls-ca", ca),
                (plain, "--tls-ca", ca, "--tls"),
                (plain, "--tls-ca", ca, "--tls-server-name", "localhost"),
                (mutual, "--tls-ca", ca, *own),
                (unix,),
                (unix, "--tls-ca", ca),
            ):
                result = await metering("health", "--address", *arguments)
                assert result.exit_code == 0, result.output
                assert {line.split()[0] for line in result.output.splitlines()} == {"SERVING"}
            # In the environment, beside the server's own settings, which mean nothing to a client.
            variables = {
                "METERING_ADDRESS": mutual,
                "METERING_CLIENT_TLS_CA": ca,
                "METERING_CLIENT_TLS_CERT": certificate,
                "METERING_CLIENT_TLS_KEY": key,
                "METERING_TLS_CERT": str(files.place / "missing"),
                "METERING_TLS_KEY": str(files.place / "missing"),
            }
            assert (await metering("health", **variables)).exit_code == 0
            # Whom the system trusts.
            monkeypatch.setenv("SSL_CERT_FILE", ca)
            assert (await metering("health", "--address", plain, "--tls")).exit_code == 0
            assert (await metering("health", METERING_ADDRESS=plain, METERING_CLIENT_TLS="1")).exit_code == 0


async def test_commands_call_with_a_certificate(address: str, files: Files) -> None:
    """Ingest, search, usage and groups go over TLS, as whoever the certificate speaks for."""
    everything = ("acme", ["ingest", "read", "admin"])
    files.clients({"all.example": everything})
    certificate, key = files.save(files.authority.issue("all.example"), "all")
    lines = files.place / "events.jsonl"
    lines.write_text(f"{LINE}\n")
    tls = ("--address", address, "--tls-ca", str(files.place / "ca.pem"), "--tls-cert", certificate, "--tls-key", key)
    for arguments in (
        ("ingest", str(lines)),
        ("events", "explain", "one"),
        ("events", "search", "--customer", "acme", "--from", "2026-01-01"),
        ("usage", "--window", "day", "--from", "2026-01-01", "--to", "2026-01-02"),
        ("groups", "list"),
    ):
        result = await metering(*arguments, *tls)
        assert result.exit_code == 0, (arguments, result.output)


async def test_what_is_wrong_with_a_certificate_is_told_in_a_sentence(database: Database, files: Files) -> None:
    """Each with what to do, at once, and never with the words of a library."""
    ca, tls = str(files.place / "ca.pem"), Tls(*files.paths, files.place / "client-ca.pem")
    (strange := files.place / "strange.pem").write_bytes(Authority("strange").pem)
    certificate, key = files.save(files.authority.issue("old.example", days=(-2, -1)), "old")
    (old := files.place / "old").mkdir()
    expired = Files(old, files.authority)
    expired.put(files.authority.issue("localhost", x509.IPAddress(ip_address("127.0.0.1")), days=(-2, -1)))
    async with (
        served(database, files.tls) as (plain,),
        served(database, tls) as (mutual,),
        served(database, expired.tls) as (late,),
        served(database, None) as (bare,),
    ):
        for arguments, error, hint in (
            (
                (plain, "--tls-ca", ca, "--tls-server-name", "metering.example"),
                "the server's certificate is not for metering.example",
                "call it by a name that the certificate is for, or give that name with --tls-server-name",
            ),
            (
                (plain, "--tls-ca", str(strange)),
                "the server's certificate cannot be trusted: unable to get local issuer certificate",
                "give who signed it with --tls-ca",
            ),
            ((late, "--tls-ca", ca), "the server's certificate cannot be trusted: certificate has expired", None),
            ((bare, "--tls-ca", ca), "the server does not speak TLS", "call it without the --tls options"),
            (
                (plain,),
                f"the server at {plain} closed the connection at once",
                "does it want TLS? give --tls, or --tls-ca with who signed its certificate",
            ),
            (
                (mutual, "--tls-ca", ca),
                f"the server at {mutual} closed the connection at once",
                "does it want a client certificate? give --tls-cert and --tls-key",
            ),
            (
                (mutual, "--tls-ca", ca, "--tls-cert", certificate, "--tls-key", key),
                f"the server at {mutual} closed the connection at once",
                "does it take this client certificate? it may have expired, or be signed by another",
            ),
        ):
            result = await metering("health", "--address", *arguments)
            assert result.exit_code == 1
            said = result.stderr.splitlines()
            assert said[0] == f"error: UNAVAILABLE: {error}"
            assert said[1:] == ([f"hint: {hint}"] if hint else []), said
        # As a process, where the libraries' own lines would be seen too.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("METERING_", "GRPC_V"))
        }
        command = [sys.executable, "-m", "service", "health", "--address", plain, "--tls-ca", str(strange)]
        done = await asyncio.to_thread(
            subprocess.run,
            command,
            cwd=REPOSITORY,
            env={**environment, "PYTHONPATH": f".{os.pathsep}generated"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert len(done.stderr.splitlines()) == 2, done.stderr
        # Streams try again after other failures, for a minute.
        began = asyncio.get_running_loop().time()
        (one := files.place / "one.jsonl").write_text(f"{LINE}\n")
        result = await metering("ingest", str(one), "--address", plain, "--tls-ca", str(strange))
        assert result.exit_code == 3, result.output
        assert "cannot be trusted" in result.stderr
        assert asyncio.get_running_loop().time() - began < 20


async def test_grpcurl_calls_with_a_certificate(address: str, files: Files) -> None:
    """As docs/security.md shows it."""
    program = Path(sys.executable).with_name("grpcurl")
    if not program.exists():
        pytest.skip("there is no grpcurl")
    certificate, key = files.save(files.authority.issue("reader.example"), "reader")
    command = [program, "-cacert", files.place / "ca.pem", "-cert", certificate, "-key", key]
    target = (f"localhost:{address.rpartition(':')[2]}", "metering.v1.CustomerService/ListCustomers")
    done = await asyncio.to_thread(
        subprocess.run, [*command, *target], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


def test_options_of_a_client_that_cannot_be_used(files: Files) -> None:
    """They are told before anything is called."""
    certificate, key = files.save(files.authority.issue(SENDER), "own")
    _, other = files.save(files.authority.issue(SENDER), "other")
    (files.place / "empty").touch()
    for arguments, said in (
        (("--tls-cert", certificate), "A client certificate needs both --tls-cert and --tls-key."),
        (("--tls-key", key), "A client certificate needs both --tls-cert and --tls-key."),
        (("--tls-cert", certificate, "--tls-key", other), "other-key.pem is not the key of the certificate in"),
        (("--tls-ca", str(files.place / "empty")), "empty holds no certificate in PEM that can be read."),
        (("--tls-ca", str(files.place / "missing")), "does not exist"),
    ):
        result = invoke("health", "--address", "localhost:1", *arguments)
        assert result.exit_code == 2
        assert said in " ".join(result.output.split()), result.output
