"""Tests of the import rules, by reading the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

from benchmarks import __main__ as benchmarks_command
from benchmarks.harness import DTYPES
from benchmarks.models import PRESETS
from modeling_gkc.cli import parsers
from modeling_gkc.configuration_gkc import ENSEMBLES
from modeling_gkc.configuration_gkc_zero_shot import CLASS_SCORES
from modeling_gkc.remote_code import code_files
from train.evaluate import command as evaluation_command
from train.evaluate import segmenter

from .processes import without_third_party_lines

ROOT = Path(__file__).parent.parent
FLAT = sorted((ROOT / "modeling_gkc").glob("*.py"))
# Sub-packages of the library, which are not published with a checkpoint, and those of training code, lowest first:
# a module imports from its own folder and from folders before it.
LIBRARY_PACKAGES = ("conversion", "export", "cli")
TRAIN_PACKAGES = ("storage", "metrics", "data", "teacher", "losses", "engine", "evaluate", "miniworld")
LIBRARY = [*FLAT, *(path for name in LIBRARY_PACKAGES for path in sorted((ROOT / "modeling_gkc" / name).glob("*.py")))]
OURS = ("modeling_gkc", "configuration", "train", "hub_card", "benchmarks", "tests")
# Third-party packages that inference may need, and those of single modules, imported where they are used.
INFERENCE = {"torch", "transformers", "huggingface_hub", "numpy", "PIL", "safetensors", "tqdm"}
OPTIONAL = {"runner": {"onnxruntime"}, "loss_gkc": {"scipy"}, "deformable_attention_triton": {"triton"}}
ALLOWED = {
    "train": {"modeling_gkc", "configuration", "train"},
    "hub_card": {"modeling_gkc", "hub_card"},
    "benchmarks": {"modeling_gkc", "configuration", "train", "benchmarks"},
    "configuration": {"configuration"},
}
PROCESSORS = (
    "encoded_vocabulary",
    "image_processing_gkc",
    "image_reading",
    "post_processing",
    "processing_gkc",
    "prompt_templates",
    "visualization",
    "vocabulary",
    "vocabulary_files",
)
MODELS = (
    "classifiers",
    "loss_gkc",
    "mask_decoder",
    "modeling_clip_convnext",
    "modeling_clip_resnet",
    "modeling_gkc",
    "pixel_decoder",
)


def imports(path: Path) -> list[tuple[int, str]]:
    """Return (level, module) of every import; level is the number of leading dots."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def top(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("path", FLAT, ids=lambda path: path.stem)
def test_published_modules_use_single_dot_imports(path):
    """A published folder contains the flat modules side by side, without sub-packages."""
    for level, module in imports(path):
        if level:
            assert level == 1 and module and "." not in module, f"{path.name}: 'from {'.' * level}{module}'"
            assert module not in LIBRARY_PACKAGES or path.stem == "__main__", f"{path.name} imports {module}"
        else:
            assert top(module) not in OURS, f"{path.name} imports {module} by its full name"


@pytest.mark.parametrize("package", LIBRARY_PACKAGES)
def test_library_subpackages_import_downwards(package):
    lower = LIBRARY_PACKAGES[: LIBRARY_PACKAGES.index(package)]
    for path in (ROOT / "modeling_gkc" / package).glob("*.py"):
        for level, module in imports(path):
            assert level or top(module) not in OURS, f"{path.name} imports {module} by its full name"
            assert level < 2 or top(module) not in set(LIBRARY_PACKAGES) - {*lower}, f"{path.name} imports {module}"


def train_imports(path: Path) -> list[tuple[str, ...]]:
    """Return the modules of `train` that a file imports, each split into its parts after `train`."""
    package = path.relative_to(ROOT).parts[:-1]
    found = []
    for level, module in imports(path):
        parts = tuple(filter(None, module.split(".")))
        if level:
            parts = (*package[: len(package) - level + 1], *parts)
        if parts[0] == "train":
            found.append(parts[1:])
    return found


@pytest.mark.parametrize("package", TRAIN_PACKAGES)
def test_train_subpackages_import_downwards(package):
    """There is no cycle of folders, and nothing is imported from the top of `train`."""
    lower = {package, *TRAIN_PACKAGES[: TRAIN_PACKAGES.index(package)]}
    for path in (ROOT / "train" / package).rglob("*.py"):
        for parts in train_imports(path):
            assert not parts or parts[0] in lower, f"{path.relative_to(ROOT)} imports {'.'.join(('train', *parts))}"


def test_train_has_few_top_level_entries_and_known_subpackages():
    entries = {path.name for path in (ROOT / "train").iterdir() if path.suffix == ".py" or any(path.rglob("*.py"))}
    entries -= {"__init__.py", "__main__.py"}
    assert len(entries) <= 12
    assert {name for name in entries if not name.endswith(".py")} == {*TRAIN_PACKAGES}


def test_train_modules_have_no_import_cycle():
    graph = {}
    for path in (ROOT / "train").rglob("*.py"):
        name = (*path.relative_to(ROOT / "train").with_suffix("").parts,)
        graph[name[:-1] if name[-1] == "__init__" else name] = [*train_imports(path)]
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"circle: {[*open_[open_.index(name) :], name]}"
        if name in done or name not in graph:
            return
        open_.append(name)
        for imported in map(tuple, graph[name]):
            if imported != name:
                visit(imported)
        done.add(open_.pop())

    for name in graph:
        visit(name)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_inference_imports_no_training_package(path):
    outside = {top(module) for level, module in imports(path) if not level} - set(sys.stdlib_module_names) - INFERENCE
    assert outside <= OPTIONAL.get(path.stem, set()), f"{path.name} imports {outside}"


@pytest.mark.parametrize(
    ("name", "neighbors"),
    [("image_reading", set()), ("atomic_files", set()), ("export/runner", {"image_reading", "atomic_files"})],
)
def test_runner_modules_import_no_torch(name, neighbors):
    found = imports(ROOT / "modeling_gkc" / f"{name}.py")
    assert {module for level, module in found if level} == neighbors
    outside = {top(module) for level, module in found if not level} - set(sys.stdlib_module_names)
    assert outside <= {"numpy", "PIL", "onnxruntime"}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_import_no_model(name):
    within = {module for level, module in imports(ROOT / "modeling_gkc" / f"{name}.py") if level}
    assert not within & set(MODELS)


@pytest.mark.parametrize("folder", ALLOWED)
def test_other_folders_import_only_allowed_packages(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for level, module in imports(path):
            name = folder if level else top(module)
            assert name not in OURS or name in ALLOWED[folder], f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_remote_code_requires_no_training_package(path):
    """Transformers reads the imports of a folder's code before it runs the code."""
    assert set(get_imports(path)) <= INFERENCE | set(sys.stdlib_module_names)


def test_published_code_is_flat():
    assert {path.parent for path in code_files()} == {ROOT / "modeling_gkc"}
    packages = {path.parent.name for path in (ROOT / "modeling_gkc").rglob("*.py")} - {"modeling_gkc"}
    assert packages == {*LIBRARY_PACKAGES}


# Packages that a user may not have: those of training, and optional ones of transformers and the kernels.
ABSENT = ["scipy", "sklearn", "datasets", "accelerate", "evaluate", "nltk", "torchvision", "timm", "triton"]
LIGHT_COMMANDS = """
import contextlib, io, sys
from modeling_gkc.cli import main
for command in ("--help", "segment --help", "segment", "embed --labels", "vocab list", "vocab show cityscapes_19",
                "convert mask2former --help", "export --format jpeg", "segment absent.jpg --labels sky",
                "export --out tests", "convert clip-resnet RN50.pt --out tests"):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main(command.split())
    assert not {"torch", "transformers", "PIL"} & set(sys.modules), command
"""
AUTO_CLASSES = """
import modeling_gkc
from transformers.modeling_utils import PreTrainedModel
from transformers import AutoConfig, Trainer
assert AutoConfig.for_model("gkc").model_type == "gkc"
from transformers import AutoBackbone, AutoModel, AutoProcessor
# The top level of transformers 5.17 hides it where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
found = AutoImageProcessor.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
assert [type(each).__name__ for each in found] == ["GKCImageProcessor", "GKCProcessor"]
assert type(AutoBackbone.from_config(AutoConfig.for_model("clip_resnet"))) is modeling_gkc.CLIPResNetBackbone
assert AutoModel._model_mapping[modeling_gkc.GKCConfig] is modeling_gkc.GKCForOpenVocabSegmentation
"""
WITHOUT_TRITON = """
import sys, torch
assert "modeling_gkc.deformable_attention_triton" not in sys.modules
from modeling_gkc.deformable_attention_triton import is_available, triton_deformable_attention
assert not is_available()
try:
    triton_deformable_attention(
        torch.ones(1, 1, 1, 1), [(1, 1)], torch.ones(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1)
    )
except ImportError as error:
    assert "pip install triton" in str(error)
else:
    raise AssertionError("no error")
"""
ORDERS = {
    "this package first, without optional packages": (
        f"import sys; [sys.modules.__setitem__(name, None) for name in {ABSENT}]"
        # transformers' Trainer needs accelerate.
        + AUTO_CLASSES.replace(", Trainer", "")
        + WITHOUT_TRITON
    ),
    "transformers first": "from transformers import AutoModel, AutoProcessor" + AUTO_CLASSES,
    "a module of this package first": "import modeling_gkc.modeling_gkc" + AUTO_CLASSES,
}


def run_code(code: str) -> None:
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (finished.returncode, without_third_party_lines(finished.stderr)) == (0, []), finished.stderr


def test_help_and_vocabulary_commands_import_no_torch():
    run_code(LIGHT_COMMANDS)


# Every command of the repository, with arguments that need no work: help, usage errors and existing output folders.
USAGE_ONLY = {
    "train.engine.main": [["--help"], ["no_such_recipe"], ["custom", "lerning_rate=1"], ["custom", "--show"]],
    "train.data.prepare": [["--help"], ["ade20k_150", "--help"], ["no_such_benchmark"]],
    "train.data.from_folder": [["--help"], ["tests", "--out", "tests"], ["absent", "--out", "absent-out"]],
    "train.data.view": [["--help"]],
    "train.data.benchmarks.miniworld": [["--help"]],
    "train.evaluate.command": [
        ["--help"],
        ["report", "--help"],
        ["--model", "m", "--benchmark", "ade20k_150", "--data", "absent"],
    ],
    "train.teacher.precompute": [["--help"], ["teacher", "--help"], ["teacher", "tests"]],
    "train.data.wordnet.synonyms": [["--help"]],
    "hub_card.publish_mini": [["--help"], ["absent"]],
    "hub_card.publish_all": [["--help"], ["--only", "absent"]],
    "train.miniworld.__main__": [["--help"], ["--ablations", "none"]],
    "benchmarks.__main__": [["--help"], ["--threads", "0"]],
}
RUN_ALL = """
import contextlib, importlib, io, sys
for name, lines in {commands}.items():
    main = importlib.import_module(name).main
    for line in lines:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                code = main(line)
            except SystemExit as ended:
                code = ended.code
        text = output.getvalue()
        assert text.strip() and "Traceback" not in text and "[Errno" not in text, (name, line, text)
        expected = 0 if {{"--help", "--show"}} & set(line) else 2
        assert (code or 0) == expected, (name, line, code, text)
        assert "torch" not in sys.modules, (name, line)
        if "--help" in line and name in {light}:
            assert not {heavy} & set(sys.modules), (name, line, {heavy} & set(sys.modules))
"""
# Packages that take long to import, and commands whose help needs none of them.
HEAVY = {"datasets", "pandas", "pyarrow", "nltk", "sklearn", "scipy", "accelerate", "transformers"}
LIGHT_HELP = ("train.engine.main", *(name for name in USAGE_ONLY if name.startswith(("train.data", "train.evaluate"))))
LIGHT_HELP = (*LIGHT_HELP, "train.teacher.precompute")


def test_commands_report_usage_errors_without_torch():
    run_code(RUN_ALL.format(commands=USAGE_ONLY, light=(), heavy=HEAVY))


def test_help_imports_no_slow_package():
    """Importing any of them would delay the help beyond half a second."""
    commands = {name: [["--help"]] for name in LIGHT_HELP}
    run_code(RUN_ALL.format(commands=commands, light=LIGHT_HELP, heavy=HEAVY))


def test_parser_choices_match_modules_that_need_torch():
    assert set(benchmarks_command.PRESET_NAMES) == set(PRESETS)
    assert tuple(DTYPES) == benchmarks_command.DTYPE_NAMES
    assert set(evaluation_command.DTYPES) == set(segmenter.DTYPES)
    assert parsers.CLASS_SCORES == CLASS_SCORES and parsers.ENSEMBLES == ENSEMBLES


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_are_registered_for_any_import_order(order):
    """Nothing is written to standard error."""
    folder = ROOT / "hub_card" / "gkc-mini"
    run_code(ORDERS[order].replace("FOLDER", repr(str(folder))))


def test_public_names_and_modules_are_package_attributes():
    import modeling_gkc

    assert {name for name in modeling_gkc.__all__ if hasattr(modeling_gkc, name)} == set(modeling_gkc.__all__)
    assert modeling_gkc.loss_gkc.__name__ == "modeling_gkc.loss_gkc"
    assert set(modeling_gkc.__all__) <= set(dir(modeling_gkc))
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = modeling_gkc.nothing_of_this_name


@pytest.mark.parametrize("kind", ["Image", "Instance", "Semantic", "Universal"])
def test_segmentation_auto_classes_load_the_checkpoint(kind):
    import transformers

    from modeling_gkc import GKCForOpenVocabSegmentation

    auto_class = getattr(transformers, f"AutoModelFor{kind}Segmentation")
    assert type(auto_class.from_pretrained(ROOT / "hub_card" / "gkc-mini")) is GKCForOpenVocabSegmentation
