"""The README's and the docs' commands do what they say: each tested block runs as printed against a real server."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path

import click
import pytest
from conftest import Process, start_server

from service.cli import main
from service.domain.partners import DEFAULT_RULES, Partner
from service.domain.record_reports import Used, lines
from service.gateway import GatewayError, find_envoy

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
MARKETPLACES = (REPOSITORY / "docs" / "marketplaces.md").read_text()
PRINTED_ADDRESS = "localhost:50051"
PRINTED_GATEWAY = "localhost:8080"
# Where tools that came with this interpreter lie, also when its environment is not activated.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

BLOCKS = {
    name: (language, text)
    for name, language, text in re.findall(
        r"<!-- tested: (\S+) -->\n```(\w+)\n(.*?)```", README + MARKETPLACES, re.DOTALL
    )
}
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README + MARKETPLACES, re.DOTALL)).replace("\\\n", " ")


@pytest.fixture
def server(database_url: str) -> Iterator[Process]:
    """A server in a process of its own, on an empty database."""
    process = start_server(METERING_DATABASE_URL=database_url)
    yield process
    assert process.stop() == 0


def run_block(
    name: str, server: Process, times: int = 1, before: str | None = None, gateway: str = "", **settings: str
) -> str:
    """Run a block as printed, but for the addresses; returns what it wrote. Skips if its tool is not installed.

    It runs in a directory of its own, which is gone afterwards, with `settings` in its environment; if told so, only
    the lines `before` those words.
    """
    language, text = BLOCKS[name]
    if before is not None:
        assert before in text
        text = text[: text.index(before)]
    assert PRINTED_ADDRESS in text or PRINTED_GATEWAY in text
    text = text.replace(PRINTED_ADDRESS, server.address).replace(PRINTED_GATEWAY, gateway)
    if language == "python":
        command = [sys.executable, "-W", "error", "-c", text]
    else:
        # Neither assignments nor the end of what `cat` reads.
        for tool in set(re.findall(r"^\w+(?= )", text, re.MULTILINE)):
            if shutil.which(tool, path=PATH) is None:
                pytest.skip(f"{tool} is not installed: the README's {name} block is not tested")
        command = ["sh", "-euc", text]
    environment = {**os.environ, "PATH": PATH, "METERING_ADDRESS": server.address, **settings}
    outputs = []
    with tempfile.TemporaryDirectory() as place:
        for _ in range(times):
            done = subprocess.run(
                command, cwd=place, env=environment, capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            outputs.append(done.stdout)
    return "".join(outputs)


def test_every_marked_block_is_run_here() -> None:
    """No block of the README and the docs is marked as tested without a test."""
    assert set(BLOCKS) == {"grpcurl", "buf", "python", "groups", "json", "reporter"}
    assert (README + MARKETPLACES).count("<!-- tested:") == len(BLOCKS)


def test_grpcurl_block(server: Process) -> None:
    """With grpcurl: the metric, the customer, the event accepted, and its 512 bytes in the answer at once."""
    printed = run_block("grpcurl", server)
    assert '"verdicts": [\n    "VERDICT_ACCEPTED"\n  ]' in printed
    assert re.findall(r'"value": "(.*)"', printed) == ["512"]
    # Versions of grpcurl differ in how they print names. Two days, of which the second has no usage.
    assert len(re.findall(r'"(?:billable_metric_name|billableMetricName)": "Traffic"', printed)) == 2


def test_grpcurl_block_may_be_repeated(server: Process) -> None:
    """Pasting the commands a second time fails nowhere and counts nothing twice."""
    printed = run_block("grpcurl", server, times=2)
    assert re.findall(r'"(VERDICT_\w+)"', printed) == ["VERDICT_ACCEPTED", "VERDICT_DUPLICATE"]
    assert re.findall(r'"value": "(.*)"', printed) == ["512", "512"]


def test_buf_block(server: Process) -> None:
    """With buf: the value, and the same by region."""
    run_block("grpcurl", server)
    printed = re.sub(r"\s", "", run_block("buf", server))
    assert '"value":"512","groups":{"eu":{"value":"512"}}' in printed


def test_python_block(server: Process) -> None:
    """From Python: the second event accepted, and an hour with each of the two events."""
    run_block("grpcurl", server)
    assert run_block("python", server).splitlines() == [
        "['VERDICT_ACCEPTED']",
        "2026-01-01T10:00:00Z 512",
        "2026-01-01T11:00:00Z 1024.5",
    ]


def test_json_block(database_url: str) -> None:
    """With curl through the gateway: an event is stored, and is in the usage of its customer at once."""
    try:
        find_envoy()
    except GatewayError as error:
        pytest.skip(str(error))
    server = start_server("--gateway", "127.0.0.1:0", METERING_DATABASE_URL=database_url)
    try:
        assert server.process.stdout is not None
        gateway = server.process.stdout.readline().strip().removeprefix("JSON for the SDKs is ready on http://")
        run_block("grpcurl", server)
        answer = json.loads(run_block("json", server, gateway=gateway))
        assert [(row["value"], row["value_decimal"]) for row in answer["data"]] == [(512, "512"), (0.5, "0.5")]
    finally:
        assert server.stop() == 0


def test_groups_block(server: Process, database_url: str) -> None:
    """Groups: stored, listed and counted at once; rolled up in whole numbers; leased and completed."""
    run_block("grpcurl", server)
    printed = run_block("groups", server, METERING_DATABASE_URL=database_url)
    # The server may have been the first to make the report.
    rows = re.findall(r"^ +(job-[12]) .* AWS +(?:CREATED|REPORT_PENDING) +cpu_h ([0-9.]+)", printed, re.MULTILINE)
    assert rows == [("job-2", "2.5"), ("job-1", "1.75")]
    assert len(re.findall(r" 4\.25 ", printed)) == 1
    assert re.search("^(1 report of|No report of) the hour ", printed, re.MULTILINE)
    # Versions of grpcurl differ in how they print names.
    told = re.findall(r'"quantity": "(.*)",\s+"used_?[qQ]uantity": "(.*)"', printed)
    assert told == [("4", "4.25")] * 2
    assert re.findall(r'"decimal_?[pP]arts_?[aA]fter": "(.*)"', printed) == ["0.25"] * 2
    assert re.findall(r'"USAGE_RECORD_REPORT_STATUS_(\w+)"', printed) == ["PENDING", "SUCCEEDED"]


def test_reporter_block(server: Process, database_url: str) -> None:
    """The reporter of the docs tells what was reported, once: 4 of 4.25 hours."""
    run_block("grpcurl", server)
    run_block("groups", server, before="grpcurl -plaintext -d '{\"lease_token", METERING_DATABASE_URL=database_url)
    (told,) = run_block("reporter", server, times=2).splitlines()
    assert told.endswith(":00:00Z 04ca7e72-4229-4a6e-ab11-9f7376fccbcb cpu_h 4")


def test_the_rules_of_marketplaces_are_as_documented() -> None:
    """The table of the docs has every rule of every marketplace, with its default."""
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \| (\S+) \|", MARKETPLACES, re.MULTILINE)
    for partner, column in ((Partner.AWS, 1), (Partner.AZURE, 2), (Partner.GCP, 3)):
        documented = {row[0]: int(row[column]) for row in rows}
        assert documented == {name: int(value) for name, value in asdict(DEFAULT_RULES[partner]).items()}


def test_the_ledger_is_as_documented() -> None:
    """The example of what is carried is what the service makes of it, and so is the one of a failure."""
    rows = re.findall(r"^\| \d+ \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", MARKETPLACES, re.MULTILINE)
    assert len(rows) == 3
    carried = Decimal(0)
    for row in rows:
        before, used, told, after = map(Decimal, row)
        (line,) = lines({"cpu": Used(used, 1)}, {"cpu": carried}, DEFAULT_RULES[Partner.AWS])
        assert (line.carried_before, line.quantity, line.carried_after) == (before, told, after)
        carried = after


def test_demo() -> None:
    """`metering demo --exit` shows totals of what it ingested, counts the repeat once, and leaves nothing behind."""
    place = Path(tempfile.mkdtemp(prefix="metering readme "))
    place.chmod(0o755)  # as root, Postgres runs as another user and must get through
    try:
        done = subprocess.run(
            [sys.executable, "-m", "service", "demo", "--exit"],
            cwd=REPOSITORY,
            env={**os.environ, "TMPDIR": str(place), "COLUMNS": "120"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        first, second = re.findall(r"^ +([\d,]+) accepted, ([\d,]+) duplicates$", done.stdout, re.MULTILINE)
        assert first[0] == second[1] != "0"
        assert first[1] == second[0] == "0"
        for word in ("eu-central", "us-east", "ap-south"):
            assert word in done.stdout
        assert re.search(r"\d{6,}", done.stdout), "no total of bytes"
        assert list(place.iterdir()) == []
        assert not _processes_in(place)
    finally:
        shutil.rmtree(place)


def _processes_in(place: Path) -> list[str]:
    """The processes that work in a directory, on systems that tell."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "cwd").startswith(str(place)):
                found.append(entry.name)
        except OSError:
            continue
    return found


METERING = sorted(
    {line.split("#")[0].strip() for line in re.findall(r"(?:^|[|&] *)(metering .*)", SHELL, re.MULTILINE)}
)


@pytest.mark.parametrize("line", METERING)
def test_commands_that_are_shown_exist(line: str) -> None:
    """Every `metering …` line of the README names a command and options that there are."""
    words = shlex.split(line)[1:]
    command: click.Command = main
    context = click.Context(main)
    while words and isinstance(command, click.Group) and (found := command.get_command(context, words[0])):
        command, words = found, words[1:]
    assert not isinstance(command, click.Group), line
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("variable", sorted(set(re.findall(r"METERING_[A-Z_]*[A-Z]", README + MARKETPLACES))))
def test_variables_that_are_named_exist(variable: str) -> None:
    """Every METERING_… variable of the README is one that `metering serve` reads."""
    serve = main.get_command(click.Context(main), "serve")
    assert serve is not None
    assert variable in {parameter.envvar for parameter in serve.params if isinstance(parameter, click.Option)}


def test_tasks_that_are_shown_exist() -> None:
    """Every `poe …` line of the README names a task."""
    tasks = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["poe"]["tasks"]
    shown = re.findall(r"^poe (\S+)", SHELL, re.MULTILINE)
    assert shown
    assert set(shown) <= set(tasks)


LINKS = sorted(
    {link for link in re.findall(r"\]\(([^)#\s]+)", README) if not re.match(r"\w+:", link)}
    | {f"docs/{link}" for link in re.findall(r"\]\(([^)#\s]+)", MARKETPLACES) if not re.match(r"\w+:", link)}
)


@pytest.mark.parametrize("link", LINKS)
def test_relative_links_lead_somewhere(link: str) -> None:
    """What the README and the docs link to is in the repository, and is not empty."""
    target = REPOSITORY / link
    assert target.exists()
    assert target.is_dir() or target.stat().st_size
