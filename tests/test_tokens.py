"""Claims about JSON Web Tokens: which are taken, that all others are refused alike, and where keys come from."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from conftest import Client, event, running_server, timestamp
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from faults import Fault, fault_of, read_fault, until
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from streaming import ALONE, NARROW
from structlog.testing import capture_logs

from metering.v1 import billable_metric_pb2, customer_pb2, event_pb2, usage_pb2
from service.auth import TRUST_S, new_api_key, tokens
from service.auth.tokens import LEEWAY_S, TokenSettings
from service.config import Config
from service.database import Database
from service.server import CannotServe, serving
from service.store import organizations

ISSUER, AUDIENCE = "https://issuer.example/realm", "metering"
REFUSED = ("UNAUTHENTICATED", "CREDENTIAL_INVALID", None)
RSA, OTHER_RSA, NEW, WEAK = (rsa.generate_private_key(65537, bits) for bits in (2048, 2048, 2048, 1024))
EC, EC384, ED = (
    ec.generate_private_key(ec.SECP256R1()),
    ec.generate_private_key(ec.SECP384R1()),
    ed25519.Ed25519PrivateKey.generate(),
)


def jwk(key: Any, kid: str | None = None, **more: Any) -> dict[str, Any]:
    """The public half of a key, as a set of keys has it."""
    public = key.public_key()
    kind = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    if isinstance(key, ed25519.Ed25519PrivateKey):
        kind = OKPAlgorithm
    made = json.loads(kind.to_jwk(public)) | more
    made.pop("key_ops", None)
    return made if kid is None else {**made, "kid": kid}


KEYS = [jwk(RSA, "r", alg="RS256", use="sig"), jwk(EC, "e", alg="ES256"), jwk(OTHER_RSA, "o"), jwk(EC384, "e384")]


def claims(**changes: Any) -> dict[str, Any]:
    """What a good token says, with changes; None takes a claim away."""
    now = int(time.time())
    good = {
        "iss": ISSUER, "aud": AUDIENCE, "sub": "somebody", "iat": now, "exp": now + 300,
        "organization": "default", "roles": ["admin"],
    }  # fmt: skip
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def signed(
    key: Any = RSA, algorithm: str = "RS256", *, kid: str | None = "r", headers: Any = None, **changes: Any
) -> str:
    """A token."""
    headers = {**({} if kid is None else {"kid": kid}), **(headers or {})}
    return jwt.encode(claims(**changes), key, algorithm, headers=headers)


def part(value: Any) -> str:
    """A part of a token, of whatever content."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def by_hand(header: dict[str, Any], payload: Any, signature: bytes | Callable[[bytes], bytes] = b"x") -> str:
    """A token that no library would make."""
    text = f"{part(header)}.{part(payload)}"
    return f"{text}.{part(signature if isinstance(signature, bytes) else signature(text.encode()))}"


def with_crit(token_header: dict[str, Any]) -> str:
    """A token with a sound signature over whatever header."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    return by_hand(token_header, claims(), lambda text: RSA.sign(text, padding.PKCS1v15(), hashes.SHA256()))


class Keys:
    """A server of keys that can be changed, broken and watched."""

    def __init__(self) -> None:
        self.keys: Any = {"keys": KEYS}
        self.status = 200
        self.headers: dict[str, str] = {}
        self.raw: bytes | None = None
        self.delay_s = 0.0
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                time.sleep(outer.delay_s)
                body = json.dumps(outer.keys).encode()
                if outer.raw is not None:
                    self.wfile.write(outer.raw)
                    return
                self.send_response(outer.status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/keys"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def keys() -> Iterator[Keys]:
    """A server of keys."""
    server = Keys()
    yield server
    server.close()


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """A file of keys."""
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": KEYS}))
    return path


def settings(where: Any, *algorithms: str, **more: str) -> TokenSettings:
    """What the servers here take."""
    return TokenSettings(ISSUER, AUDIENCE, str(where), algorithms or ("RS256", "ES256"), **more)


def bearer(token: str) -> list[tuple[str, str]]:
    """The headers of a call with a token."""
    return [("authorization", f"Bearer {token}")]


async def listed(client: Client, token: str) -> list[str]:
    """The ids of the caller's customers."""
    answer = await client.customers.ListCustomers(customer_pb2.ListCustomersRequest(), metadata=bearer(token))
    return [one.id for one in answer.customers]


async def refused(client: Client, token: str) -> Fault:
    """Call with a token that must be refused; returns what of the answer could tell why."""
    fault = await fault_of(listed(client, token))
    assert fault.brief == REFUSED, token
    return fault._replace(request_id=None, trailers_size=0)


async def is_taken(client: Client, token: str) -> bool:
    """Whether a token works now."""
    try:
        await listed(client, token)
    except grpc.aio.AioRpcError as error:
        if read_fault(error).brief != REFUSED:
            raise
        return False
    return True


@pytest.fixture
async def client(database_url: str, keys_file: Path) -> AsyncIterator[Client]:
    """A client of a server that takes tokens, by keys from a file."""
    async with running_server(database_url, tokens=settings(keys_file)) as client:
        yield client


# --- Which tokens are taken


async def test_good_tokens(client: Client, database: Database) -> None:
    """Signed by a key of the issuer, for us, in time: taken, of either algorithm, in every form that is allowed."""
    now = int(time.time())
    good = [
        signed(),
        signed(EC, "ES256", kid="e"),
        signed(OTHER_RSA, kid="o"),  # a key that does not say what it is for
        signed(aud=["other", AUDIENCE]),
        signed(exp=now - LEEWAY_S + 5, iat=now - 300),
        signed(iat=now + LEEWAY_S - 5, nbf=now + LEEWAY_S - 5),
        signed(exp=now + 3600.75),
        signed(roles="read"),
        signed(roles="openid read  profile"),
        signed(roles=["billing:write", "read", 7, None, {"admin": "admin"}, ["admin"]]),
        signed(headers={"typ": "at+jwt"}),
        signed(headers={"typ": "JWT", "x": {"y": 1}}),
    ]
    for token in good:
        assert await listed(client, token) == [], jwt.decode_complete(token, options={"verify_signature": False})
        answer = client.customers.ListCustomers(
            customer_pb2.ListCustomersRequest(), metadata=[("authorization", f"key {token}")]
        )
        await answer
    # Beside them, API keys go on.
    key = new_api_key()
    async with database.engine.begin() as connection:
        await organizations.create_api_key(connection, "default", key.id, "test", key.secret_hash)
    assert await listed(client, key.text) == []
    fault = await fault_of(client.customers.ListCustomers(customer_pb2.ListCustomersRequest()))
    assert fault.reason == "CREDENTIAL_MISSING"


def bad_tokens() -> dict[str, str]:
    """Tokens that must be refused, and why."""
    now = int(time.time())
    public = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    head, body, signature = signed().split(".")
    ours = {"alg": "RS256", "kid": "r", "typ": "JWT"}

    def hs256(secret: bytes, header: dict[str, Any] | None = None) -> str:
        return by_hand(
            header or {"alg": "HS256", "kid": "r"},
            claims(),
            lambda text: hmac.new(secret, text, hashlib.sha256).digest(),
        )

    modulus = base64.urlsafe_b64decode(KEYS[0]["n"] + "==")
    url = "http://127.0.0.1:9/keys"
    return {
        "expired": signed(exp=now - LEEWAY_S - 2, iat=now - 300),
        "expired long ago": signed(exp=1, iat=0),
        "not yet": signed(nbf=now + LEEWAY_S + 5),
        "of the future": signed(iat=now + LEEWAY_S + 5),
        **{
            f"no {name}": signed(**{name: None})
            for name in ("exp", "iat", "iss", "aud", "sub", "organization", "roles")
        },
        **{f"null {name}": by_hand(ours, claims() | {name: None}) for name in ("exp", "iss", "aud")},
        "exp is a word": signed(exp="never"),
        "exp is huge": signed(exp=10**400),
        "exp is infinite": signed(exp=float("inf")),
        "exp is no number": signed(exp=float("nan")),
        "exp is a list": signed(exp=[now + 300]),
        "exp is true": signed(exp=True),
        "iat is a word": signed(iat="now"),
        "nbf is a word": signed(nbf="now"),
        "sub is a number": signed(sub=7),
        "iss is a prefix": signed(iss=ISSUER[:-1]),
        "iss is longer": signed(iss=ISSUER + "/"),
        "iss is in capitals": signed(iss=ISSUER.upper()),
        "iss is a list": by_hand(ours, claims(iss=[ISSUER])),
        "iss is empty": signed(iss=""),
        "aud is a prefix": signed(aud=AUDIENCE[:-1]),
        "aud is longer": signed(aud=AUDIENCE + "-admin"),
        "aud is in capitals": signed(aud=AUDIENCE.upper()),
        "aud is empty": signed(aud=""),
        "aud is an empty list": signed(aud=[]),
        "aud is others": signed(aud=["other", AUDIENCE + "2"]),
        "aud is an object": signed(aud={AUDIENCE: AUDIENCE}),
        "alg none": by_hand({"alg": "none"}, claims(), b""),
        "alg none with kid": by_hand({"alg": "none", "kid": "r"}, claims(), b""),
        "alg None": by_hand({"alg": "None", "kid": "r"}, claims(), b""),
        "alg nOnE": by_hand({"alg": "nOnE", "kid": "r"}, claims(), b""),
        "alg null": by_hand({"alg": None, "kid": "r"}, claims(), b""),
        "alg is a list": by_hand({"alg": ["RS256"], "kid": "r"}, claims()),
        "no alg": by_hand({"kid": "r"}, claims()),
        "HS256 by the public key": hs256(public),
        "HS256 by the stripped public key": hs256(public.strip()),
        "HS256 by the modulus": hs256(modulus),
        "HS256 by nothing": hs256(b""),
        "HS256 that says RS256": hs256(public, {"alg": "RS256", "kid": "r"}),
        "RS512, not pinned": signed(algorithm="RS512"),
        "PS256, not pinned": signed(algorithm="PS256"),
        "ES384, not pinned": signed(EC384, "ES384", kid="e384"),
        "the key of another algorithm": by_hand({"alg": "ES256", "kid": "r"}, claims(), b"x" * 64),
        "an empty ES256 signature": by_hand({"alg": "ES256", "kid": "e"}, claims(), b""),
        "a zero ES256 signature": by_hand({"alg": "ES256", "kid": "e"}, claims(), bytes(64)),
        "unknown kid": signed(kid="nobody"),
        "empty kid": signed(kid=""),
        "no kid, of several keys": signed(kid=None),
        "kid of another key": signed(kid="o"),
        "kid of a key of another kind": signed(kid="e"),
        "kid is a number": by_hand({"alg": "RS256", "kid": 7}, claims()),
        "kid is a list": by_hand({"alg": "RS256", "kid": ["r"]}, claims()),
        "kid is a path": signed(kid="../../../../dev/null"),
        "somebody else's key": signed(OTHER_RSA, kid="r"),
        "a key in the token": signed(OTHER_RSA, kid="r", headers={"jwk": jwk(OTHER_RSA, "r")}),
        "a key in the token, of no kid": signed(OTHER_RSA, kid=None, headers={"jwk": jwk(OTHER_RSA)}),
        "a key elsewhere": signed(OTHER_RSA, kid="r", headers={"jku": url, "x5u": url}),
        "a new key elsewhere": signed(OTHER_RSA, kid="new", headers={"jku": url, "x5u": url}),
        "crit unknown": with_crit({**ours, "crit": ["x"], "x": 1}),
        "crit empty": with_crit({**ours, "crit": []}),
        "crit is a text": with_crit({**ours, "crit": "exp"}),
        "b64 false": with_crit({**ours, "b64": False, "crit": ["b64"]}),
        "tampered payload": f"{head}.{part(claims(organization='other'))}.{signature}",
        "tampered header": f"{part({**ours, 'x': 1})}.{body}.{signature}",
        "signature of another": f"{head}.{body}.{signed(sub='else').split('.')[2]}",
        "signature cut": f"{head}.{body}.{signature[:-4]}",
        "no signature": f"{head}.{body}.",
        "no payload": f"{head}..{signature}",
        "no header": f".{body}.{signature}",
        "nothing": "..",
        "two parts": f"{head}.{body}",
        "four parts": f"{head}.{body}.{signature}.x",
        "five parts, as encrypted ones": f"{part({'alg': 'dir', 'enc': 'A256GCM'})}....",
        "not base64": f"{head}.%%%.{signature}",
        "header is a list": by_hand([], claims()),  # type: ignore[arg-type]
        "header nests": by_hand(b"[" * 4000, claims()),  # type: ignore[arg-type]
        "payload is a list": by_hand(ours, []),
        "payload is garbage": by_hand(ours, b"\xff\xfe"),
        "over 8 KiB": signed(padding="x" * 6200),
        "organization is unknown": signed(organization="nobody"),
        "organization is empty": signed(organization=""),
        "organization is a number": signed(organization=7),
        "organization is a list": signed(organization=["default"]),
        "organization in capitals": signed(organization="Default"),
        "organization with a blank": signed(organization="default "),
        "organization with a NUL": signed(organization="default\0"),
        "organization with control characters": signed(organization="default\r\x1b[2J"),
        "organization with a line": signed(organization="default\nlevel=error event=forged"),
        "organization is half a character": signed(organization="\ud800"),
        "organization is long": signed(organization="x" * 4000),
        "roles are empty": signed(roles=[]),
        "roles are blank": signed(roles=" "),
        "roles are others'": signed(roles=["administrator", "Admin", "ADMIN", "admin ", "write", "*"]),
        "roles are an object": signed(roles={"admin": True}),
        "roles are a number": signed(roles=7),
        "roles are nested": signed(roles=[["admin"], {"admin": 1}]),
        "roles with commas": signed(roles="admin,read"),
    }


async def test_all_bad_tokens_are_refused_alike(client: Client) -> None:
    """Whatever is wrong with a token, the answer is the same, and the log names a reason without the token."""
    answers = set()
    with capture_logs() as logs:
        for why, token in bad_tokens().items():
            fault = await fault_of(listed(client, token))
            assert fault.brief == REFUSED, why
            answers.add((fault.text, *fault.metadata, fault.retry_s))
            assert not [entry for entry in logs if entry["log_level"] == "error"], why
    assert len(answers) == 1
    assert await is_taken(client, signed())
    assert all(str(value).isprintable() for entry in logs for value in entry.values())
    told = [entry for entry in logs if entry["event"] == "token refused"]
    assert len(told) > 60
    assert not [
        entry for entry in logs for token in bad_tokens().values() if len(token) > 9 and token[8:] in str(entry)
    ]


async def test_what_a_token_may_do(client: Client, database: Database) -> None:
    """Its organization and roles are what its claims say, and nothing else."""
    async with database.engine.begin() as connection:
        await organizations.create_organization(connection, "acme")
    create = client.customers.CreateCustomer
    request = customer_pb2.CreateCustomerRequest(customer={"name": "x"})
    made = (await create(request, metadata=bearer(signed(organization="acme")))).customer.id
    assert await listed(client, signed(organization="acme", roles=["read"])) == [made]
    assert await listed(client, signed()) == []
    for roles in (["read"], ["ingest"], "read ingest"):
        fault = await fault_of(create(request, metadata=bearer(signed(roles=roles))))
        assert (fault.code, fault.reason) == ("PERMISSION_DENIED", "ROLE_REQUIRED")
    assert (await fault_of(listed(client, signed(roles=["ingest"])))).reason == "ROLE_REQUIRED"


async def test_claims_of_other_names(database_url: str, keys_file: Path) -> None:
    """The two claims are named by the operator; those of the usual names then mean nothing."""
    named = settings(keys_file, organization_claim="https://acme.example/tenant", roles_claim="scope")
    async with running_server(database_url, tokens=named) as client:
        await refused(client, signed())
        own = {"https://acme.example/tenant": "default", "scope": "read"}
        assert await is_taken(client, signed(**own, organization=None, roles=None))
        assert await is_taken(client, signed(**own, organization="nobody", roles=["root"]))


async def test_the_address_of_a_key_is_never_a_tokens(
    database_url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`jku`, `x5u` and `jwk` are ignored: nobody is asked, and a token that is good without them is good."""
    monkeypatch.setattr(tokens, "KEYS_RETRY_S", 0.0)
    trap = Keys()
    trap.keys = {"keys": [jwk(OTHER_RSA, "r"), jwk(OTHER_RSA, "new")]}
    try:
        async with running_server(database_url, tokens=settings(keys.url)) as client:
            elsewhere = {"jku": trap.url, "x5u": trap.url, "jwk": jwk(OTHER_RSA, "r")}
            for kid in ("r", "new", None):
                await refused(client, signed(OTHER_RSA, kid=kid, headers=elsewhere))
            assert await is_taken(client, signed(headers=elsewhere))
        assert set(keys.asked) == {"/keys"}
        assert not trap.asked
    finally:
        trap.close()


@pytest.mark.parametrize(
    ("algorithm", "key", "public"),
    [
        ("PS256", RSA, jwk(RSA, "k")),
        ("RS512", RSA, jwk(RSA, "k")),
        ("PS384", RSA, jwk(RSA, "k", alg="PS384")),
        ("ES384", EC384, jwk(EC384, "k")),
        ("EdDSA", ED, jwk(ED, "k")),
    ],
)
async def test_other_algorithms(
    database_url: str, tmp_path: Path, algorithm: str, key: Any, public: dict[str, Any]
) -> None:
    """Each algorithm can be pinned, whether keys say what they are for or not; then no other is taken."""
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [public]}))
    async with running_server(database_url, tokens=settings(path, algorithm)) as client:
        assert await is_taken(client, signed(key, algorithm, kid="k"))
        assert await is_taken(client, signed(key, algorithm, kid=None))  # there is only one key
        for other in ("RS256", "RS512", "PS256"):
            if other != algorithm:
                await refused(client, signed(RSA, other, kid="k"))


# --- Where keys come from, and how old they may be


async def test_keys_are_rotated(database_url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new key is taken once it is published, the old one as long as it is; calls in a burst wait for the new keys."""
    monkeypatch.setattr(tokens, "KEYS_RETRY_S", 0.5)
    monkeypatch.setattr(tokens, "KEYS_AGE_S", 1.0)
    async with running_server(database_url, tokens=settings(keys.url)) as client:
        assert await is_taken(client, signed())
        new = signed(NEW, kid="new")
        assert not await is_taken(client, new)
        keys.keys = {"keys": [*KEYS, jwk(NEW, "new")]}
        await asyncio.sleep(0.6)
        keys.delay_s = 0.3
        assert all(await asyncio.gather(*(is_taken(client, signed(NEW, kid="new", n=i)) for i in range(20))))
        assert await is_taken(client, signed())
        # The old one goes.
        keys.delay_s = 0
        keys.keys = {"keys": [jwk(NEW, "new")]}
        await until(lambda: _not(is_taken(client, signed())), TRUST_S + 3)
        assert await is_taken(client, new)


async def _not(answer: Any) -> bool:
    return not await answer


async def test_unknown_keys_are_asked_for_seldom(
    database_url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A burst of tokens of made-up keys makes one request in each KEYS_RETRY_S at most; others are served meanwhile."""
    monkeypatch.setattr(tokens, "KEYS_RETRY_S", 2.0)
    async with running_server(database_url, tokens=settings(keys.url)) as client:
        assert len(keys.asked) == 1
        await asyncio.sleep(2)
        keys.delay_s = 1.5
        began = time.monotonic()
        good, number = signed(), 0
        while time.monotonic() - began < 5:
            burst = [refused(client, signed(OTHER_RSA, kid=f"made up {number} {i}")) for i in range(20)]
            answers = asyncio.gather(*burst)
            for _ in range(5):
                at = time.monotonic()
                assert await is_taken(client, good)
                assert time.monotonic() - at < 1.2
            await answers
            number += 1
        assert number > 1
        assert 2 <= len(keys.asked) - 1 <= 1 + (time.monotonic() - began) / 2.0


async def test_keys_outlive_an_outage_but_not_for_ever(
    database_url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While keys cannot be read the last ones are used, and the log warns; after KEYS_AGE_MAX_S none are."""
    monkeypatch.setattr(tokens, "KEYS_RETRY_S", 0.2)
    monkeypatch.setattr(tokens, "KEYS_AGE_S", 0.2)
    monkeypatch.setattr("service.auth.TRUST_S", 0.0)
    with capture_logs() as logs:
        async with running_server(database_url, tokens=settings(keys.url)) as client:
            for status, raw in (
                (503, None),
                (404, None),
                (302, None),
                (200, b"garbage"),
                (200, b"HTTP/1.1 200 OK\r\n\r\n{"),
            ):
                keys.status, keys.raw = status, raw
                keys.headers = {"location": keys.url + "/other"} if status == 302 else {}
                before, warned = len(keys.asked), len(_warned(logs))
                await asyncio.sleep(0.25)
                assert await is_taken(client, signed())
                assert len(keys.asked) == before + 1
                assert len(_warned(logs)) == warned + 1
            assert not [path for path in keys.asked if path != "/keys"]
            for nonsense in ({"keys": []}, {}, [], {"keys": 7}, {"keys": [7]}, {"keys": [{"kty": "oct", "k": "AAAA"}]}):
                keys.status, keys.raw, keys.keys = 200, None, nonsense
                await asyncio.sleep(0.25)
                assert await is_taken(client, signed())
            assert not [entry for entry in logs if entry["log_level"] == "error"]
            monkeypatch.setattr(tokens, "KEYS_AGE_MAX_S", 0.5)
            await asyncio.sleep(0.3)
            assert not await is_taken(client, signed())
            # It comes back.
            keys.keys = {"keys": KEYS}
            await asyncio.sleep(0.25)
            assert await is_taken(client, signed())


def _warned(logs: Sequence[Any]) -> list[Any]:
    return [entry for entry in logs if entry["log_level"] == "warning" and "keys of tokens" in entry["event"]]


async def test_a_file_of_keys_is_read_again(
    database_url: str, keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is a source like any other: it may change, and be away for a while."""
    monkeypatch.setattr(tokens, "KEYS_RETRY_S", 0.2)
    async with running_server(database_url, tokens=settings(keys_file)) as client:
        await asyncio.to_thread(keys_file.unlink)
        await asyncio.sleep(0.25)
        await refused(client, signed(NEW, kid="new"))
        assert await is_taken(client, signed())
        await asyncio.to_thread(keys_file.write_text, json.dumps({"keys": [*KEYS, jwk(NEW, "new")]}))
        await asyncio.sleep(0.25)
        assert await is_taken(client, signed(NEW, kid="new"))


async def test_tokens_without_a_key_id_see_new_keys(
    database_url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there was a second key for a while, tokens that leave theirs unsaid are taken again when it is gone."""
    monkeypatch.setattr(tokens, "KEYS_RETRY_S", 0.2)
    monkeypatch.setattr(tokens, "KEYS_AGE_S", 0.2)
    async with running_server(database_url, tokens=settings(keys.url)) as client:
        await refused(client, signed(kid=None))
        keys.keys = {"keys": [jwk(RSA)]}
        await asyncio.sleep(0.25)
        assert await is_taken(client, signed(kid=None))


PRIVATE = {**json.loads(RSAAlgorithm.to_jwk(RSA)), "kid": "r"}
UNUSABLE: dict[str, tuple[Any, str]] = {
    "too large": ({"keys": KEYS, "x": "x" * 1024 * 1024}, "it is too large"),
    "shared secrets only": ({"keys": [{"kty": "oct", "k": "AAAA", "kid": "r"}]}, "no key that verifies signatures"),
    "no keys": ({"keys": []}, "no key that verifies signatures"),
    "encryption only": ({"keys": [jwk(RSA, "r", use="enc")]}, "no key that verifies signatures"),
    "other algorithms only": ({"keys": [jwk(EC384, "r")]}, "no key that verifies signatures by RS256, ES256"),
    "a key of none": ({"keys": [jwk(RSA, "r", alg="none")]}, "no key that verifies signatures"),
    "a key of HS256": ({"keys": [jwk(RSA, "r", alg="HS256")]}, "no key that verifies signatures"),
    "a weak key": ({"keys": [jwk(WEAK, "r")]}, "no key that verifies signatures"),
    "a private key": ({"keys": [PRIVATE]}, "private key"),
    "an empty object": ({}, "not a JSON Web Key Set"),
    "a list": ([], "not a JSON Web Key Set"),
    "keys are an object": ({"keys": {"r": KEYS[0]}}, "not a JSON Web Key Set"),
    "a key is a text": ({"keys": ["x"]}, "not a JSON Web Key Set"),
    "an id is a list": ({"keys": [jwk(RSA) | {"kid": []}]}, "not a JSON Web Key Set"),
}


@pytest.mark.parametrize("why", UNUSABLE)
async def test_unusable_keys_keep_it_from_starting(database: Database, keys: Keys, tmp_path: Path, why: str) -> None:
    """Keys that cannot be used are told at the start, in a sentence with their address; from a URL and from a file."""
    content, said = UNUSABLE[why]
    keys.keys = content
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(content))
    for where in (keys.url, path):
        assert said in await cannot_serve(database, settings(where))


async def cannot_serve(database: Database, given: TokenSettings) -> str:
    """Start a server that must not start; returns what it says."""
    with pytest.raises(CannotServe) as caught:
        async with serving(Config(listen=("127.0.0.1:0",), allow_unsafe_database=True, tokens=given), database):
            pass
    return str(caught.value)


async def test_sources_that_cannot_be_used(
    database: Database, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain http from elsewhere, redirections, what is not there, no JSON or no HTTP at all: told at the start."""
    for url in (
        "http://issuer.example/keys",
        "HTTP://10.0.0.1/keys",
        "http://127.0.0.1.evil.example/",
        "http://[::2]/",
    ):
        assert "use https" in await cannot_serve(database, settings(url))
    for where in (tmp_path / "none", tmp_path, "file:///etc/passwd", "ftp://issuer.example/keys", "https://[x/keys"):
        assert str(where) in await cannot_serve(database, settings(where))
    (tmp_path / "garbage").write_bytes(b"\xff\x00 garbage")
    (tmp_path / "deep").write_text("[" * 100_000)
    for name in ("garbage", "deep"):
        assert "not a JSON Web Key Set" in await cannot_serve(database, settings(tmp_path / name))
    trap = Keys()
    try:
        for status in (301, 302, 303, 307, 308):
            keys.status, keys.headers = status, {"location": trap.url}
            assert str(status) in await cannot_serve(database, settings(keys.url))
        assert not trap.asked
    finally:
        trap.close()
    keys.status, keys.headers, keys.raw = 200, {}, b"SSH-2.0-OpenSSH_9.6\r\n"
    assert keys.url in await cannot_serve(database, settings(keys.url))
    monkeypatch.setattr(tokens, "_FETCH_MAX_S", 0.3)
    keys.raw, keys.delay_s = None, 1.0
    assert "TimeoutError" in await cannot_serve(database, settings(keys.url))
    for algorithms in (("HS256",), ("none",), ("RS256", "HS256"), ("",)):
        assert "is none of RS256" in await cannot_serve(database, settings(keys.url, *algorithms))
    assert "is none of RS256" in await cannot_serve(database, replace(settings(keys.url), algorithms=()))


async def test_a_proxy_is_not_asked_for_keys_on_loopback(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain http stays on the machine, whatever proxy the environment names."""
    trap = Keys()
    try:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{trap.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        # No server, as gRPC's clients would call that through the proxy.
        await tokens.Tokens(settings(keys.url)).start()
        assert (len(keys.asked), trap.asked) == (1, [])
    finally:
        trap.close()


async def test_a_missing_extra_is_told(database: Database, keys_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PyJWT the server does not start, and says what to install."""
    monkeypatch.setitem(sys.modules, "jwt", None)
    assert "pip install 'metering[jwt]'" in await cannot_serve(database, settings(keys_file))


# --- Streams, and many calls


async def test_a_token_that_expires_ends_its_streams(
    database_url: str, keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream ends with UNAUTHENTICATED when its token does, leeway included; nothing sent after that is stored."""
    async with (
        running_server(database_url, tokens=settings(keys_file)) as server,
        grpc.aio.insecure_channel(server.address, options=(*ALONE, *NARROW)) as channel,
    ):
        client, admin = Client(server.address, channel), bearer(signed())
        request = customer_pb2.CreateCustomerRequest(customer={"name": "Acme", "ingest_aliases": ["acme"]})
        customer = (await client.customers.CreateCustomer(request, metadata=admin)).customer.id
        metric = billable_metric_pb2.BillableMetric(name="m", aggregation_type="AGGREGATION_TYPE_COUNT")
        making = billable_metric_pb2.CreateBillableMetricRequest(billable_metric=metric)
        metric = (await client.metrics.CreateBillableMetric(making, metadata=admin)).billable_metric

        async def counted() -> bool:
            getting = billable_metric_pb2.GetBillableMetricRequest(id=metric.id)
            answer = await client.metrics.GetBillableMetric(getting, metadata=admin)
            return not answer.billable_metric.HasField("backfill_progress")

        await until(counted)
        ends = int(time.time()) + 6
        metadata = bearer(signed(exp=ends - LEEWAY_S, iat=ends - 100, roles=["read", "ingest"]))
        start = datetime(2020, 1, 1, tzinfo=UTC)
        usage = client.usage.StreamUsage(
            usage_pb2.StreamUsageRequest(
                window_size="WINDOW_SIZE_HOUR",
                starting_on=timestamp(start),
                ending_before=timestamp(start + timedelta(hours=20_000)),
                customer_ids=[customer],
                billable_metrics=[{"id": metric.id}],
            ),
            metadata=metadata,
        )
        events = client.events.StreamEvents(metadata=metadata)
        assert (await usage.read()).windows
        await events.write(event_pb2.StreamEventsRequest(sequence=1, events=[event("before")]))
        assert (await events.read()).sequence == 1
        # Checked a moment before its end, so that it would be trusted for a moment longer.
        await asyncio.sleep(ends - time.time() - 0.5)
        await client.customers.ListCustomers(customer_pb2.ListCustomersRequest(), metadata=metadata)
        await asyncio.sleep(ends - time.time() + 0.1)
        await events.write(event_pb2.StreamEventsRequest(sequence=2, events=[event("after")]))
        assert (await fault_of(events.read())).brief == REFUSED
        assert (await fault_of(_end(usage))).brief == REFUSED
        found = await client.events.SearchEvents(event_pb2.SearchEventsRequest(), metadata=admin)
        assert [one.event.transaction_id for one in found.events] == ["before"]


async def _end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_flood_of_made_up_keys_does_not_keep_tokens_out(
    database_url: str, keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While made-up keys are looked up, callers with tokens are served, and their organization looked up again."""
    find, stop = organizations.find_api_key, asyncio.Event()

    async def slow(connection: Any, key_id: str) -> Any:
        await asyncio.sleep(0.05)
        return await find(connection, key_id)

    monkeypatch.setattr(organizations, "find_api_key", slow)

    async def flood(client: Client) -> None:
        while not stop.is_set():
            await asyncio.gather(*(fault_of(listed(client, new_api_key().text)) for _ in range(250)))

    async with running_server(database_url, tokens=settings(keys_file)) as client:
        assert await is_taken(client, signed())
        flooding = asyncio.create_task(flood(client))
        try:
            await asyncio.sleep(0.5)
            ends = time.monotonic() + 2.5 * TRUST_S
            while time.monotonic() < ends:
                began = time.monotonic()
                # Each of its own, so that every one is checked.
                await asyncio.gather(*(listed(client, signed(n=i)) for i in range(5)))
                assert time.monotonic() - began < 3
                await asyncio.sleep(0.05)
        finally:
            stop.set()
            await flooding
