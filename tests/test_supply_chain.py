"""Claims about what is shipped: the lock is whole and public, the image holds what it says, and tells what it holds."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PYPROJECT = (REPOSITORY / "pyproject.toml").read_text()
LOCK = (REPOSITORY / "uv.lock").read_text()
PROGRAMS = Path(sys.executable).parent
PUBLIC = {"https://pypi.org", "https://files.pythonhosted.org"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, rest), without comments and with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def every(word: str) -> list[str]:
    """What the instructions of one kind say."""
    return [rest for found, rest in instructions() if found == word]


def commands() -> list[str]:
    """The programs that a build runs, with their arguments."""
    return [command.strip() for run in every("RUN") for command in run.split(" && ")]


def final_stage() -> list[tuple[str, str]]:
    """The instructions that make the image, from the last FROM on."""
    lines = instructions()
    return lines[max(place for place, (word, _) in enumerate(lines) if word == "FROM") :]


def check_lock(directory: Path) -> subprocess.CompletedProcess[str]:
    """Run what `poe check` says about the lock in `directory`, where neither an index nor a cache can help it."""
    check = tomllib.loads(PYPROJECT)["tool"]["poe"]["tasks"]["check"]["sequence"]
    [command] = [step["cmd"] for step in check if step["cmd"].startswith("uv lock --check ")]
    words = [PROGRAMS / "uv", *shlex.split(command)[1:]]
    nowhere = {"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_CACHE_DIR": str(directory / "cache")}
    return subprocess.run(
        words, cwd=directory, env={**os.environ, **nowhere}, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_lock_agrees_with_the_requirements(tmp_path: Path) -> None:
    """`poe check` takes the lock as it is, without network, cache or the index that a machine has set."""
    for name in ("pyproject.toml", "uv.lock"):
        shutil.copy(REPOSITORY / name, tmp_path)
    done = check_lock(tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "to"),
    [
        ('"tzdata==', '"tzdata<'),
        ('jwt = ["pyjwt[crypto]', 'jwt = ["cffi", "pyjwt[crypto]'),
        ('image = ["hatchling', 'image = ["cffi", "hatchling'),
    ],
)
def test_a_lock_left_behind_is_noticed(tmp_path: Path, change: str, to: str) -> None:
    """A requirement that changes, joins an extra, or joins a group fails `poe check` until the lock follows."""
    assert change in PYPROJECT
    (tmp_path / "pyproject.toml").write_text(PYPROJECT.replace(change, to))
    shutil.copy(REPOSITORY / "uv.lock", tmp_path)
    assert check_lock(tmp_path).returncode != 0


def test_everything_locked_is_public_and_has_hashes() -> None:
    """Each package comes from PyPI and each of its files has a SHA-256; no other host, path or credential is named."""
    packages: list[dict[str, Any]] = tomllib.loads(LOCK)["package"]
    ours = [package for package in packages if package["name"] == "metering"]
    assert [package["source"] for package in ours] == [{"editable": "."}]
    for package in packages:
        if package in ours:
            continue
        assert package["source"] == {"registry": "https://pypi.org/simple"}, package["name"]
        files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else ())]
        assert files, package["name"]
        for file in files:
            assert re.fullmatch(r"sha256:[0-9a-f]{64}", file["hash"]), file
            assert re.fullmatch(r"[\w./%+~!-]+", urlsplit(file["url"]).path), file
    assert set(re.findall(r"[\w+.-]+://[^/\"\s]*", LOCK)) == PUBLIC  # user:password@ would be part of a match


def test_the_image_installs_only_what_is_locked() -> None:
    """Every install of the build names the lock or hashes, builds nothing of others, and nothing else fetches."""
    synced, others = [], []
    for command in commands():
        words = shlex.split(command)
        if "uv sync" in command:
            assert {"--locked", "--no-build", "--no-install-project"} <= set(words), command
            synced.append(command)
        elif "uv pip" in command:
            assert {"--offline", "--no-deps"} <= set(words), command
        elif "-m pip" in command:
            assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(words), command
        else:
            others.append(command)
    assert [command for command in synced if "--all-extras --no-extra dev" in command]
    assert not re.search(r"\b(pip|apt|apt-get|curl|wget|git|npm|uvx)\b", " ".join(others))
    assert not every("ADD")  # which fetches, too


def test_uv_comes_from_the_lock() -> None:
    """What the build hands to pip is uv in the locked version with hashes of the lock."""
    [script] = [shlex.split(command)[2] for command in commands() if "tomllib" in command]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    name, *hashes = done.stdout.split()
    [locked] = [package for package in tomllib.loads(LOCK)["package"] if package["name"] == "uv"]
    assert name == f"uv=={locked['version']}"
    assert hashes
    assert set(hashes) == {f"--hash={wheel['hash']}" for wheel in locked["wheels"]}


def test_the_image_runs_as_a_number_that_is_not_root() -> None:
    """The last user of the image is numeric and not 0, and it is the owner of the data."""
    user = [rest for word, rest in final_stage() if word == "USER"][-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    uid, gid = user.split(":")
    assert any(f"--owner {uid} --group {gid}" in rest for word, rest in final_stage() if word == "RUN")


def test_the_image_starts_programs_without_a_shell() -> None:
    """ENTRYPOINT, CMD and HEALTHCHECK are lists of words, and start the command that the wheel installs."""
    entries = [(word, rest) for word, rest in instructions() if word in {"ENTRYPOINT", "CMD", "HEALTHCHECK"}]
    assert [word for word, _ in entries] == ["HEALTHCHECK", "ENTRYPOINT", "CMD"]
    parsed = {word: json.loads(rest.removeprefix(rest.partition("[")[0])) for word, rest in entries}
    assert parsed["ENTRYPOINT"] == parsed["HEALTHCHECK"][:1] == ["metering"]
    assert re.match(r"(--\S+ )*CMD \[", dict(entries)["HEALTHCHECK"])
    assert not every("SHELL")


def test_the_service_calls_no_shell() -> None:
    """No module of the service hands a line to a shell."""
    shells = re.compile(r"shell=True|os\.(system|popen)\(|create_subprocess_shell|getoutput\(|/bin/(ba)?sh\b")
    modules = sorted((REPOSITORY / "service").rglob("*.py"))
    assert modules
    assert [module for module in modules if shells.search(module.read_text())] == []


def test_base_images_are_one_argument() -> None:
    """All stages start from one base, which a build service can pin by digest, and whose default is a whole tag."""
    bases = {rest.split()[0] for rest in every("FROM")}
    assert bases == {"${PYTHON}"}
    assert re.fullmatch(r"PYTHON=python:\d+\.\d+(\.\d+)?-slim-[a-z]+(@sha256:[0-9a-f]{64})?", every("ARG")[0])


def test_the_image_holds_no_secret() -> None:
    """No ENV or ARG has a name that asks for a secret; those are given to the running container."""
    names = re.findall(r"(?:^|\s)(\w+)=", "\n".join(every("ENV") + every("ARG")))
    assert "METERING_DATA_DIR" in names
    secret = re.compile(r"SECRET|TOKEN|PASSW|KEY|CREDENTIAL|AUTH|DATABASE_URL|INDEX", re.IGNORECASE)
    assert [name for name in names if secret.search(name)] == []


def test_the_build_is_sent_what_it_copies() -> None:
    """.dockerignore lets through exactly what the Dockerfile copies."""
    copied = {source for rest in every("COPY") if "--from" not in rest for source in rest.split()[:-1]}
    rules = [rule for rule in (REPOSITORY / ".dockerignore").read_text().splitlines() if not rule.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied


def test_the_image_lists_what_it_holds(tmp_path: Path) -> None:
    """The build's own command lists this environment in the versions that are installed, and no time or random id."""
    [command] = [shlex.split(command) for command in commands() if "cyclonedx-py" in command]
    output = command[command.index("--output-file") + 1]
    assert command[1] == "environment"
    assert command[-1].startswith("/opt/metering/")
    assert output == "/opt/metering/sbom.cdx.json"
    assert ("COPY", "--from=build /opt/metering /opt/metering") in final_stage()
    program = PROGRAMS / "cyclonedx-py"
    if not program.exists():
        pytest.skip("cyclonedx-bom is not installed (pip install -e '.[dev]')")
    here = {output: str(tmp_path / "sbom.json"), command[-1]: sys.executable}
    # The build validates its list; here, where there are more packages, that would take most of the time.
    words = [program, "environment", "--no-validate", *(here.get(word, word) for word in command[2:])]
    subprocess.run(words, cwd=REPOSITORY, capture_output=True, timeout=120, check=True)
    bill = json.loads((tmp_path / "sbom.json").read_text())
    assert "serialNumber" not in bill
    assert "timestamp" not in bill["metadata"]
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "metering"
    listed = {component["name"].lower(): component["version"] for component in bill["components"]}
    for name in ("grpcio", "protobuf", "sqlalchemy", "asyncpg"):
        assert listed[name] == version(name)
