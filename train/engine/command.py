"""Command line of training: the name or file of a recipe, and changes of its fields as `section.field=value`."""

import argparse
import dataclasses
import difflib
import importlib.util
import inspect
import json
import os
import re
import textwrap
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from tqdm import tqdm

from configuration import Recipe, load_recipe, recipe_names, recipes
from configuration.sections import Section
from modeling_gkc.cli.common import output_folder
from modeling_gkc.label_text import error_line, shown

DESCRIPTION = (
    "Train a segmentation model with a recipe. This command starts one process, `accelerate launch -m train ...` "
    "several."
)
EXAMPLES = """\
examples:
  python -m train custom dataset=data/my-tools                         fine-tune on your own images
  python -m train custom dataset=data/my-tools steps=200 --out runs/try
  python -m train custom dataset=data/my-tools --resume                continue from the last checkpoint
  python -m train distil photos/ --teacher any-words --words "dog; sofa, couch; lamp"   learn from a teacher's labels
  python -m train coco_clip_r50 --show                                 print the settings without training
  accelerate launch --config_file configuration/accelerate/8gpu.yaml -m train coco_clip_r50
  python -m train my_recipe.py optimizer.learning_rate=1e-4 data.scale_range=0.5,2 model.config.num_queries=50

A field is given as section.field=value. The section may be left out where only one section has a field of that name:
steps=200 is short for optimizer.steps=200. Names from before recipes had sections, such as synonym_mode, are accepted
too. The value none unsets a field.

A recipe of your own is a .py file that defines RECIPE, for example:
  from configuration import load_recipe
  RECIPE = load_recipe("custom", {"data.dataset": "data/my-tools", "optimizer.steps": 1000})

The output folder receives checkpoint-<step> folders, tensorboard/, pictures/ of every evaluation and, at the end, the
model, which can then be used:
  gkc segment photo.jpg --model DIR
"""
_INDENT = "      "
_MODEL_CONFIG = "model.config"
_ALMOST_EQUAL = 0.8  # similarity above which an unknown name is taken for a misspelled field


def is_main_process() -> bool:
    """Return whether this is the first process of an `accelerate launch`, the only one that prints."""
    return int(os.environ.get("RANK", "0")) == 0


def print_rank0(text: str) -> None:
    """Print a line above any progress bar, in the main process only."""
    if is_main_process():
        tqdm.write(text)


@dataclasses.dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
        name: Name of the recipe.
        recipe: Recipe with the changed fields.
        changed: Names of the changed fields, as `section.field`.
        out: Output folder.
        resume: Whether `--resume` was given.
        show: Whether `--show` was given.
        report_to: Where metrics are logged, as in `TrainingArguments.report_to`.
    """

    name: str
    recipe: Recipe
    changed: frozenset[str]
    out: Path
    resume: bool
    show: bool
    report_to: str

    def prepare(self) -> None:
        """Make what the training needs besides the recipe, in a locked output folder."""

    def summarize(self) -> str | None:
        """Return what is to be printed after the training, before the place of the model."""


def report_target(given: str | None) -> str:
    """Return where metrics are logged: as given, or else to TensorBoard if it is installed."""
    return given or ("tensorboard" if importlib.util.find_spec("tensorboard") else "none")


def parse(argv: Sequence[str] | None) -> Command:
    """Parse a command line.

    Args:
        argv: Arguments without the program's name; None uses those of the process.

    Raises:
        ValueError: There is no such recipe or field, or a value is impossible.
        SystemExit: The arguments cannot be parsed, or `--help` was given.
    """
    options = _parser().parse_intermixed_args(argv)
    name, recipe = read_recipe(options.recipe)
    changes = parse_changes(recipe, options.changes)
    return Command(
        name=name,
        recipe=recipe.replace(changes),
        changed=frozenset(changes),
        out=options.out or Path("runs") / name,
        resume=options.resume,
        show=options.show,
        report_to=report_target(options.report_to),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train",
        usage="python -m train RECIPE [section.field=value ...] [--out DIR] [--resume] [--show] [--report-to NAME]",
        description=DESCRIPTION,
        epilog=f"{EXAMPLES}\nrecipes:\n{_recipe_list()}\n\nfields by section, with their defaults:\n{_field_list()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="name of a recipe listed below, or path of a .py file that defines RECIPE")
    add("changes", metavar="section.field=value", nargs="*", help="fields to set to another value than the recipe's")
    add("--out", type=output_folder, metavar="DIR", help="output folder (default: runs/RECIPE)")
    add("--resume", action="store_true", help="continue from the last complete checkpoint in the output folder")
    add("--show", action="store_true", help="print all settings and exit without training")
    reporters = "where to log metrics: tensorboard, wandb, ... or none (default: tensorboard if it is installed)"
    add("--report-to", metavar="NAME", help=reporters)
    return parser


def _recipe_list() -> str:
    """Return a line for every recipe with its name and the first line of its docstring."""
    modules = {name: importlib.import_module(f"{recipes.__name__}.{name}") for name in recipe_names()}
    width = max(map(len, modules))
    return "\n".join(f"  {name:<{width}}  {module.__doc__.splitlines()[0]}" for name, module in modules.items())


def _field_list() -> str:
    """Return the summary of every section, and the default and description of every field."""
    lines = []
    for each in dataclasses.fields(Recipe):
        section = each.default_factory()
        doc = inspect.getdoc(type(section))
        lines += ["", f"{each.name}: {doc.splitlines()[0]}"]
        for name, text in _attribute_descriptions(doc):
            lines.append(f"  {_as_argument(f'{each.name}.{name}', getattr(section, name))}")
            lines += textwrap.wrap(text, width=110, initial_indent=_INDENT, subsequent_indent=_INDENT)
    return "\n".join(lines)


def _attribute_descriptions(doc: str) -> Iterator[tuple[str, str]]:
    """Yield name and description of each entry under `Attributes:` of a docstring."""
    for entry in re.split(r"\n(?= {4}\S)", doc.partition("Attributes:\n")[2].rstrip()):
        name, _, text = re.sub(r"\s+", " ", entry).strip().partition(": ")
        yield name, text


def read_recipe(given: str) -> tuple[str, Recipe]:
    """Load a recipe.

    Args:
        given: Name of a recipe in `configuration/recipes`, or path of a .py file that defines `RECIPE`.

    Returns:
        Name of the recipe, and the recipe.

    Raises:
        ValueError: There is no such recipe or file, or the file does not define `RECIPE`.
    """
    if not given.endswith(".py"):
        try:
            return given, load_recipe(given)
        except ValueError as error:
            raise ValueError(f"{error} The path of a recipe file must end in .py.") from None
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"The recipe file {given} does not exist: give the path of a .py file that defines RECIPE.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever is wrong with the file
        raise ValueError(f"{_place_in_file(error, path)}: {error_line(error)}") from error
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{given} does not define RECIPE = Recipe(...); see configuration/recipes for examples.")
    return path.stem, recipe


def _place_in_file(error: BaseException, path: Path) -> str:
    """Return the file and the line of it at which an error was raised."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}, line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def parse_changes(recipe: Recipe, arguments: Iterable[str]) -> dict[str, Any]:
    """Parse arguments of the form `section.field=value`.

    Args:
        recipe: Recipe whose fields are changed.
        arguments: Texts of the form `name=value` with a name that `Recipe.full_name` accepts, or
            `model.config.<field>=value` for a field of `GKCConfig` or a nested value of one.

    Returns:
        Values by `section.field`.

    Raises:
        ValueError: A name or value is impossible; the message names the field.
    """
    changes: dict[str, Any] = {}
    given: set[str] = set()
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument!r} does not have the form section.field=value, such as optimizer.steps=1000.")
        path = _full_path(recipe, name)
        if path in given:
            raise ValueError(f"`{path}` is given twice: give it once.")
        given.add(path)
        if "${" in text or "???" in text:
            raise ValueError(
                f"`{path}`: {shown(text)} refers to another value, which recipes do not do: give the value."
            )
        if path.startswith(f"{_MODEL_CONFIG}."):
            config = changes.get(_MODEL_CONFIG, recipe.model.config)
            changes[_MODEL_CONFIG] = _parse_model_field(config, path.removeprefix(f"{_MODEL_CONFIG}."), text)
        else:
            section, _, each = path.partition(".")
            changes[path] = _parse_field(type(getattr(recipe, section)), section, each, text)
    return changes


def _full_path(recipe: Recipe, name: str) -> str:
    """Return the `section.field` or `model.config.field` of a name, such as `model.field`."""
    head, _, rest = name.partition(".")
    if head == "model" and rest and f"{head}.{rest}" not in recipe.field_names():
        rest = rest.removeprefix("config.")
        return f"{_MODEL_CONFIG}.{rest}"
    try:
        path = recipe.full_name(name)
    except ValueError:
        known = [full.partition(".")[2] for full in recipe.field_names()]
        if difflib.get_close_matches(name, known, cutoff=_ALMOST_EQUAL):
            raise
        if near := difflib.get_close_matches(name, _model_config_class().__dataclass_fields__, cutoff=_ALMOST_EQUAL):
            raise ValueError(f"A recipe has no field {name!r}; did you mean {_MODEL_CONFIG}.{near[0]}?") from None
        raise
    if path == _MODEL_CONFIG:
        raise ValueError(f"`{_MODEL_CONFIG}` is set field by field, such as {_MODEL_CONFIG}.num_queries=50.")
    return path


def _parse_field(section: type[Section], section_name: str, name: str, text: str) -> Any:
    """Convert a text to the type of a section's field."""
    kind = next(each.type for each in dataclasses.fields(section) if each.name == name)
    if not text.strip() and get_origin(kind) is not tuple:
        raise ValueError(f"`{section_name}.{name}` has no value: give one, or `none` to unset a field.")
    value: Any = text
    if text.lower() == "none" and get_origin(kind) is UnionType and NoneType in get_args(kind):
        value = None
    elif get_origin(kind) is tuple:
        value = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
    return _convert(section, section_name, name, value)


def _parse_model_field(config: Mapping[str, Any], path: str, text: str) -> dict[str, Any]:
    """Return fields of `GKCConfig` with one field, or a value nested in one, set to the value of a text."""
    from omegaconf import OmegaConf

    field, _, nested = path.partition(".")
    literal = OmegaConf.to_container(OmegaConf.from_dotlist([f"{path}={text}"]))[field]
    if nested:
        _convert(_model_config_class(), _MODEL_CONFIG, field, None)
        return OmegaConf.to_container(OmegaConf.merge({field: {}}, dict(config), {field: literal}))
    return {**config, field: _convert(_model_config_class(), _MODEL_CONFIG, field, literal)}


def _convert(schema: type, prefix: str, name: str, value: Any) -> Any:
    """Convert a value to the type of a dataclass field; raise a `ValueError` if it is impossible."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        converted = OmegaConf.structured(schema)
        OmegaConf.set_readonly(converted, False)
        OmegaConf.update(converted, name, value)
        plain = OmegaConf.to_container(converted, resolve=False)[name]
    except OmegaConfBaseException as error:
        kinds = {each.name: each.type for each in dataclasses.fields(schema)}
        if name in kinds and isinstance(value, str | list):
            given = ",".join(value) if isinstance(value, list) else value
            raise ValueError(f"`{prefix}.{name}` must be {_type_name(kinds[name])}, got {shown(given)}.") from None
        raise ValueError(f"`{prefix}.{name}`: {str(error).splitlines()[0]}") from None
    return tuple(plain) if isinstance(plain, list) and isinstance(value, list) else plain


def _type_name(kind: Any) -> str:
    """Describe the type of a field, such as "a whole number"."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "none"}
    if get_origin(kind) is tuple:
        parts = [part for part in get_args(kind) if part is not Ellipsis]
        what = {int: "whole numbers", float: "numbers"}.get(parts[0], "values")
        return f"{'' if Ellipsis in get_args(kind) else f'{len(parts)} '}{what} separated by commas"
    parts = get_args(kind) or (kind,)
    return " or ".join(names.get(part, getattr(part, "__name__", str(part))) for part in parts)


def _model_config_class() -> type:
    """Return a dataclass with the fields of `GKCConfig`, where fields of other than simple types accept any value."""
    from modeling_gkc.configuration_gkc import GKCConfig  # imported here, because it needs torch

    def checked(kind: Any) -> Any:
        return kind | None if {*(get_args(kind) or (kind,))} <= {int, float, bool, str, NoneType} else Any

    kinds = {name: kind for name, kind in GKCConfig.__annotations__.items() if not name.startswith("vocabulary")}
    fields = [(name, checked(kind), dataclasses.field(default=None)) for name, kind in kinds.items()]
    return dataclasses.make_dataclass("GKCConfig", fields)


def format_recipe(command: Command) -> str:
    """Return all settings in the form of command line arguments, with a mark on those that were given."""
    lines = [f"Settings of {command.name}; output folder: {command.out}"]
    for name in command.recipe.field_names():
        lines.append(
            f"  {_as_argument(name, command.recipe.get(name))}{'   (given)' if name in command.changed else ''}"
        )
    return "\n".join(lines)


def _as_argument(name: str, value: Any) -> str:
    """Return the command line argument that sets a field to a value."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}.{key}={json.dumps(part, default=str)}" for key, part in value.items()) or f"{name}.*"
    if isinstance(value, tuple):
        return f"{name}={','.join(map(str, value))}"
    return f"{name}={str(value).lower() if value is None or isinstance(value, bool) else value}"
