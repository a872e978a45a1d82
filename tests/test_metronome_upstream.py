"""The tests that come with Metronome's SDKs, as they are, against metering behind Envoy.

upstream_metronome.toml names those that must fail, with the reason and what the server says. Any other failure is one
of ours; and a named test that passes, or fails in another way, means that the list is wrong.
"""

import asyncio
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import Client
from test_examples import EXAMPLES, PATH, REPOSITORY, Unavailable, download, execute, need

# What the tests ask for by id.
METRICS = (
    "13117714-3f05-48e5-a6e9-a66093f13b4d",
    "182bd5e5-6e1a-4fe4-a799-aa6d9a6ab26e",
    "222796fd-d29c-429e-89b2-549fabda4ed6",
    "8deed800-1b7a-495d-a207-6c52bac54dc9",
)
CUSTOMERS = (
    "04ca7e72-4229-4a6e-ab11-9f7376fccbcb",
    "182bd5e5-6e1a-4fe4-a799-aa6d9a6ab26e",
    "6a37bb88-8538-48c5-b37b-a41c836328bd",
    "8deed800-1b7a-495d-a207-6c52bac54dc9",
    "d7abd0cd-4ae9-4db7-8676-e986a4ebd8dc",
)
FILES = ("usage", "billable_metrics", "customers")
NODE_SOURCE = "METRONOME_NODE_SOURCE"

# What each variant of a test said when it failed; "" = it passed.
Outcomes = dict[str, list[str]]


def expected(language: str) -> dict[str, str]:
    """Return the tests of a language that must fail, with what they must say."""
    groups = tomllib.loads((REPOSITORY / "tests" / "upstream_metronome.toml").read_text())["expected"]
    assert all(group["why"].strip() for group in groups)
    return {name: group["says"] for group in groups for name in group.get(language, ())}


def compare(language: str, outcomes: Outcomes) -> None:
    """Compare how the tests ended with the list."""
    wrong = []
    listed = expected(language)
    for name in sorted(listed.keys() - outcomes.keys()):
        wrong.append(f"{name} is listed, but there is no such test")
    for name, variants in outcomes.items():
        said = next((one for one in variants if one), "")
        if name not in listed and said:
            wrong.append(f"{name} failed: {said[:1_000]}")
        elif name in listed and not all(variants):
            wrong.append(f"{name} is listed, but passed ({variants.count('')} of {len(variants)})")
        elif name in listed and not all(listed[name] in one for one in variants):
            wrong.append(f"{name} failed for another reason than is listed: {said[:1_000]}")
    assert not wrong, "\n".join(wrong)
    assert sum(not any(variants) for variants in outcomes.values()), "not one test passed"


async def create_what_they_ask_for(client: Client) -> None:
    """Make metrics and customers of the ids that stand in the tests."""
    for one in METRICS:
        await client.create_metric(id=one, group_keys=[{"properties": ["region"]}, {"properties": ["key"]}])
    for one in CUSTOMERS:
        await client.create_customer(id=one)


async def run_suite(folder: Path, base_url: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a suite against a base URL; that some of its tests fail is known from what it reports."""
    return await asyncio.to_thread(execute, folder, 300, "env", f"TEST_API_BASE_URL={base_url}", *command)


@pytest.fixture
def python_source(pytestconfig: pytest.Config, tmp_path: Path) -> Path:
    """The source of the Python SDK of the version that is installed; skips where it cannot be had."""
    version = importlib.metadata.version("metronome-sdk")
    # Kept between runs: it takes seconds to get, as pip builds its metadata to know what it is.
    kept = pytestconfig.cache.mkdir("metronome-sdk") / f"metronome_sdk-{version}.tar.gz"
    if not kept.exists():
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:")
        options = ("--disable-pip-version-check", "--retries", "0", "--timeout", "20", "--dest", str(tmp_path))
        try:
            download(tmp_path, 120, "invalid requirement", *pip, *options, f"metronome-sdk=={version}")
        except Unavailable as reason:
            pytest.skip(f"the tests of Metronome's Python SDK are not run: {reason}")
        # At once, whole: other runs may use the same place.
        part = kept.with_suffix(f".{os.getpid()}")
        shutil.copy(tmp_path / kept.name, part)
        part.replace(kept)
    with tarfile.open(kept) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / f"metronome_sdk-{version}"


async def test_python(client: Client, base_url: str, python_source: Path) -> None:
    """All 435 tests of usage, metrics and customers of the Python SDK end as the list says.

    They check the types of answers, also strictly, and read them as plain, raw and streamed, with httpx and aiohttp.
    """
    await create_what_they_ask_for(client)
    report = python_source / "report.xml"
    # The file's own order, and none of the suite's options: they need plug-ins that are not here.
    options = ("-o", "addopts=", "-p", "no:randomly", "-p", "no:cacheprovider", "--tb=line", f"--junitxml={report}")
    files = [f"tests/api_resources/v1/test_{name}.py" for name in FILES]
    command = (sys.executable, "-m", "pytest", "-q", *options, *files)
    done = await run_suite(python_source, base_url, *command)
    assert report.exists(), done.stdout + done.stderr
    outcomes: Outcomes = defaultdict(list)
    # Written by the pytest that we started.
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314
        file = case.attrib["classname"].split(".")[-2].removeprefix("test_")
        failure = next((one for one in case if one.tag in {"failure", "error", "skipped"}), None)
        said = "" if failure is None else failure.attrib.get("message") or "failed"
        outcomes[f"{file}::{case.attrib['name'].split('[')[0]}"].append(said)
    compare("python", outcomes)


async def test_go(client: Client, base_url: str, tmp_path: Path) -> None:
    """The tests of usage, metrics and customers of the Go SDK, of the version of the example, end as the list says."""
    module = "github.com/Metronome-Industries/metronome-go"
    folder = Path(shutil.copytree(EXAMPLES / "clients" / "metronome_go", tmp_path / "metronome_go"))
    try:
        need("go")
        download(folder, 60, "checksum mismatch|go.sum", "go", "mod", "download")
    except Unavailable as reason:
        pytest.skip(f"the tests of Metronome's Go SDK are not run: {reason}")
    await create_what_they_ask_for(client)
    source = Path(execute(folder, 60, "go", "list", "-m", "-f", "{{.Dir}}", module).stdout.strip())
    files = [source / name for name in ("v1usage_test.go", "v1billablemetric_test.go", "v1customer_test.go")]
    names = re.findall(
        r"^func (Test\w+)", "".join(file.read_text() for file in (*files, source / "usage_test.go")), re.M
    )
    # One of the SDK's packages, compiled with our go.mod: the same that the example is made of.
    command = ("go", "test", "-json", "-vet=off", "-count=1", "-run", f"^({'|'.join(names)})$", module)
    done = await run_suite(folder, base_url, *command)
    printed: dict[str, str] = defaultdict(str)
    outcomes: Outcomes = {}
    for entry in map(json.loads, done.stdout.splitlines()):
        if name := entry.get("Test"):
            printed[name] += entry.get("Output", "")
            if entry["Action"] in {"pass", "fail", "skip"}:
                outcomes[name] = ["" if entry["Action"] == "pass" else printed[name]]
    assert outcomes.keys() == set(names), done.stdout + done.stderr
    compare("go", outcomes)


async def test_node(client: Client, base_url: str) -> None:
    """The tests of usage, metrics and customers of the Node SDK end as the list says, where its source is at hand.

    The package has none. METRONOME_NODE_SOURCE is a checkout of version 3.10 that has its development dependencies.
    """
    if NODE_SOURCE not in os.environ:
        pytest.skip(f"the tests of Metronome's Node SDK are not run: {NODE_SOURCE} does not name its source")
    source = Path(os.environ[NODE_SOURCE])
    jest = source / "node_modules" / "jest" / "bin" / "jest.js"
    if shutil.which("node", path=PATH) is None or not jest.exists():
        pytest.skip(f"the tests of Metronome's Node SDK are not run: there is no {jest}, or no node")
    await create_what_they_ask_for(client)
    files = [f"tests/api-resources/v1/{name}.test.ts" for name in ("usage", "billable-metrics", "customers/customers")]
    command = ("node", str(jest), "--json", "--runInBand", *files)
    done = await run_suite(source, base_url, *command)
    results = json.loads(done.stdout)["testResults"]
    outcomes: Outcomes = {}
    for file in results:
        assert file["assertionResults"], file["message"]
        for one in file["assertionResults"]:
            outcomes[one["fullName"]] = ["".join(one["failureMessages"])]
    assert len(results) == len(files)
    compare("node", outcomes)
