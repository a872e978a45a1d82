"""Writes the stubs, type stubs and descriptor set in generated/ from the .proto files beside this script.

`python protos/generate.py` rewrites them; `--check` writes nothing and fails when they are not what the .proto files
say, which is how the check command proves them fresh.
"""

import filecmp
import importlib.resources
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).parent
GENERATED = PROTOS.parent / "generated"
PACKAGES = ("metering", "compat")


def generate(out: Path) -> None:
    """Compile every .proto of this directory into `out`; raises SystemExit when protoc refuses one."""
    sources = sorted(str(path) for root in PACKAGES for path in (PROTOS / root).rglob("*.proto"))
    google = Path(sysconfig.get_paths()["purelib"])  # googleapis-common-protos puts google/rpc/*.proto there
    includes = [f"-I{PROTOS}", f"-I{importlib.resources.files('grpc_tools') / '_proto'}", f"-I{google}"]
    stubs = [
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
    ]
    descriptors = out / "metering" / "descriptors.binpb"
    descriptors.parent.mkdir(parents=True, exist_ok=True)
    _protoc([*includes, *stubs, *sources])
    # Error details are part of the set, or tools that read it cannot decode them.
    _protoc(
        [
            *includes,
            "--include_imports",
            f"--descriptor_set_out={descriptors}",
            *sources,
            "google/rpc/error_details.proto",
        ]
    )
    for package in PACKAGES:
        (out / package / "py.typed").touch()


def _protoc(arguments: list[str]) -> None:
    # The bin directory of this interpreter holds the mypy plugins even when the environment is not activated.
    if protoc.main(["protoc", *_plugins(), *arguments]) != 0:
        raise SystemExit("protoc failed")


def _plugins() -> list[str]:
    scripts = Path(sysconfig.get_path("scripts"))
    return [f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]


def _files(root: Path) -> set[Path]:
    return {path.relative_to(root) for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def main(arguments: list[str]) -> None:
    """Generate into generated/, or with --check compare it with a fresh run."""
    with tempfile.TemporaryDirectory() as directory:
        fresh = Path(directory)
        generate(fresh)
        if "--check" in arguments:
            names = _files(fresh) | _files(GENERATED)
            stale = sorted(str(n) for n in names if not _same(fresh / n, GENERATED / n))
            if stale:
                raise SystemExit("generated/ is not what protos/ say; run `poe generate`:\n  " + "\n  ".join(stale))
            return
        shutil.rmtree(GENERATED, ignore_errors=True)
        shutil.copytree(fresh, GENERATED)


def _same(left: Path, right: Path) -> bool:
    return left.is_file() and right.is_file() and filecmp.cmp(left, right, shallow=False)


if __name__ == "__main__":
    main(sys.argv[1:])
