"""Loader of the test mixins that transformers publishes, in the installed version.

    python -m tests.published_suites        # downloads them into the environment; `make test` does so in its setup

They come from the source distribution on the package index, whose `tests/` contains the modules that transformers'
own model tests inherit from, without the sub-folders that some of them import; those are replaced by empty modules.
"""

import ast
import functools
import importlib
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import transformers

PACKAGE = "transformers_published_tests"
FOLDER = Path(sys.prefix) / "transformers-tests" / transformers.__version__
MODULES = (
    "test_modeling_common",
    "test_backbone_common",
    "test_configuration_common",
    "test_training_mixin",
    "test_image_processing_common",
    "test_processing_common",
    "test_pipeline_mixin",
)
# Modules that the mixins import and the distribution lacks, with the names imported from them.
MISSING = {
    f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": {}},
    "fetch_hub_objects_for_ci": {"url_to_local_path": str},
}


def fetch() -> Path:
    """Download and unpack the mixins of the installed transformers unless they exist, and return their folder."""
    if (FOLDER / "complete").exists():
        return FOLDER
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-build-isolation", "--no-binary", "transformers", "--dest", temporary]
        subprocess.run([*command, f"transformers=={transformers.__version__}"], check=True)
        (archive,) = Path(temporary).glob("transformers-*.tar.gz")
        with tarfile.open(archive) as members:
            for member in members:
                parts = Path(member.name).parts
                if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                    (FOLDER / parts[2]).write_bytes(members.extractfile(member).read())
    (FOLDER / "__init__.py").touch()
    (FOLDER / "complete").touch()
    return FOLDER


def source(module: str) -> Path:
    """Return the file of one of the `MODULES`.

    Raises:
        FileNotFoundError: The mixins were not downloaded; the message says how to do so.
    """
    path = FOLDER / f"{module}.py"
    if not (FOLDER / "complete").exists():
        raise FileNotFoundError(
            f"{path} is missing: run `python -m tests.published_suites`, which `make test` does in its setup"
        )
    return path


def load(module: str) -> types.ModuleType:
    """Import one of the `MODULES`.

    Raises:
        FileNotFoundError: See `source`.
    """
    source(module)
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(FOLDER)]
        sys.modules[PACKAGE] = package
        for name, contents in MISSING.items():
            for parent in [name.rpartition(".")[0], name]:
                if parent and parent not in sys.modules:
                    sys.modules[parent] = types.ModuleType(parent)
            vars(sys.modules[name]).update(contents)
    return importlib.import_module(f"{PACKAGE}.{module}")


@functools.cache
def checks(module: str, mixin: str) -> tuple[str, ...]:
    """Return the names of the checks that a mixin class defines, parameterized ones once.

    Raises:
        FileNotFoundError: See `source`.
    """
    (found,) = [
        node
        for node in ast.parse(source(module).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == mixin
    ]
    return tuple(
        node.name
        for node in found.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith(("test_", "create_and_test_", "check_config"))
    )


if __name__ == "__main__":
    sys.stdout.write(f"{fetch()}\n")
