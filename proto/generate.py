"""Generate the Python code of ``proto/`` into ``dumont/<package>/v1``.

Runs as the wheel's build hook and by hand: ``python proto/generate.py``. The googleapis files
that our protos import come from the wheel ``googleapis-common-protos``, the one whose modules
the generated code imports, so the two always agree and nothing is vendored.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
PACKAGES = ("inference", "controller", "snapshotd", "model_host")
DESCRIBED = ("controller", "snapshotd")


def copy_includes(target: Path) -> None:
    """Copy the googleapis ``.proto`` files into ``target``, under the names they import each other by.

    The wheel stores ``google/longrunning/operations.proto`` as ``operations_proto.proto`` but
    registers its descriptor under the real name, so the copy must carry the real name.
    """
    google = Path(str(files("google.rpc").joinpath(""))).parent
    for folder in ("api", "rpc", "longrunning"):
        (target / "google" / folder).mkdir(parents=True, exist_ok=True)
        for source in (google / folder).glob("*.proto"):
            name = "operations.proto" if source.name == "operations_proto.proto" else source.name
            shutil.copyfile(source, target / "google" / folder / name)


def generate(output: Path = ROOT) -> None:
    """Write modules, stubs, type stubs and descriptor sets below ``output``, in place of earlier ones.

    Raises:
        RuntimeError: protoc refused a file; what it said is on standard error.
    """
    from grpc_tools import protoc

    well_known = str(files("grpc_tools").joinpath("_proto"))
    with tempfile.TemporaryDirectory() as includes:
        copy_includes(Path(includes))
        for package in PACKAGES:
            sources = sorted((PROTO / "dumont" / package / "v1").glob("*.proto"))
            folder = output / "dumont" / package / "v1"
            shutil.rmtree(folder.parent, ignore_errors=True)
            folder.mkdir(parents=True)
            for initial in (folder.parent, folder):
                (initial / "__init__.py").touch()
            arguments = ["protoc", f"-I{PROTO}", f"-I{includes}", f"-I{well_known}"]
            outputs = ["--python_out", "--grpc_python_out"]
            if shutil.which("protoc-gen-mypy") and shutil.which("protoc-gen-mypy_grpc"):
                outputs += ["--mypy_out", "--mypy_grpc_out"]
            arguments += [f"{flag}={output}" for flag in outputs]
            if protoc.main([*arguments, *map(str, sources)]) != 0:
                raise RuntimeError(f"protoc failed on proto/dumont/{package}/v1")
        for package in DESCRIBED:
            # Everything that other languages and tools need, in one file: imports and comments included.
            sources = sorted((PROTO / "dumont" / package / "v1").glob("*.proto"))
            described = output / "dumont" / package / "api.binpb"
            arguments = ["protoc", f"-I{PROTO}", f"-I{includes}", f"-I{well_known}", "--include_imports"]
            arguments += ["--include_source_info", f"--descriptor_set_out={described}"]
            if protoc.main([*arguments, *map(str, sources)]) != 0:
                raise RuntimeError(f"protoc failed on proto/dumont/{package}/v1")


class GenerateProtos(BuildHookInterface[Any]):
    """Hatch build hook: generate before the wheel or the editable install is made."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the code; hatch calls this before it builds."""
        generate()
        if version == "editable":
            # hatch would copy what is listed under force-include, and Python would find the copies before the
            # sources. An empty directory in place of that list copies nothing.
            self._nothing = tempfile.TemporaryDirectory()
            build_data["force_include_editable"] = {self._nothing.name: "dumont"}


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
