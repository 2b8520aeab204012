"""The command line of training: a recipe by name or file, and its fields as `field=value`."""

import argparse
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import os
import pkgutil
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from tqdm import tqdm

from configuration import Recipe, load_recipe, recipes

DESCRIPTION = (
    "Train a segmenter by a recipe, in one process; `accelerate launch -m train ...` takes any number of them."
)
EXAMPLES = """\
examples:
  python -m train own_folder dataset=data/my-tools                     fine-tune on your own pictures
  python -m train own_folder dataset=data/my-tools steps=200 --out runs/try
  python -m train own_folder dataset=data/my-tools --resume            go on where a killed run was saved
  python -m train coco_clip_r50 --show                                 the settings, without training
  accelerate launch --config_file configuration/accelerate/8gpu.yaml -m train coco_clip_r50
  python -m train my_recipe.py learning_rate=1e-4 scale_range=0.5,2 model.num_queries=50 eval_split=none

A recipe of your own is a .py file that holds RECIPE, such as
  from dataclasses import replace
  from configuration import load_recipe
  RECIPE = replace(load_recipe("own_folder"), dataset="data/my-tools", steps=1000)

DIR gets checkpoint-<step> folders, tensorboard/, pictures/ of every evaluation and, at the end, the model:
  gkc segment photo.jpg --model DIR
"""
_INDENT = "      "
_NEAR = 0.5  # names at least so alike are proposed for an unknown one
_ALMOST_EQUAL = 0.8  # a field of the recipe so alike is meant, not one of the model


def is_main_process() -> bool:
    """Whether this process speaks for all of an `accelerate launch`."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print a line, above any progress bar; one process speaks for all."""
    if is_main_process():
        tqdm.write(text)


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line asks for.

    Attributes:
        name: Of the recipe.
        recipe: With the changes.
        changed: Names of the fields that were given.
        out: Output folder.
        resume, show: The flags.
        report_to: Reporters, as `TrainingArguments.report_to`.
    """

    name: str
    recipe: Recipe
    changed: frozenset[str]
    out: Path
    resume: bool
    show: bool
    report_to: str


def parse(argv: Sequence[str] | None) -> Command:
    """Read a command line.

    Raises:
        ValueError: there is no such recipe or field, or a value cannot be.
        SystemExit: arguments that cannot be parsed, or `--help`.
    """
    options = _parser().parse_intermixed_args(argv)
    name, recipe = read_recipe(options.recipe)
    changes = parse_changes(recipe, options.changes)
    return Command(
        name=name,
        recipe=dataclasses.replace(recipe, **changes),
        changed=frozenset(changes),
        out=options.out or Path("runs") / name,
        resume=options.resume,
        show=options.show,
        report_to=options.report_to or ("tensorboard" if importlib.util.find_spec("tensorboard") else "none"),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description=DESCRIPTION,
        epilog=f"{EXAMPLES}\nrecipes:\n{_recipe_list()}\n\nfields, with their defaults:\n{_field_list()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a name of the list below, or a .py file")
    add("changes", metavar="field=value", nargs="*", help="settings that differ from the recipe's")
    add("--out", type=Path, metavar="DIR", help="output folder (default: runs/RECIPE)")
    add("--resume", action="store_true", help="go on from the last checkpoint in DIR")
    add("--show", action="store_true", help="print the settings that would be used, and stop")
    add("--report-to", metavar="NAME", help="tensorboard (default where installed), wandb, ... or none")
    return parser


def recipe_names() -> list[str]:
    """Names of the recipes of `configuration.recipes`."""
    return sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))


def _recipe_list() -> str:
    modules = {name: importlib.import_module(f"{recipes.__name__}.{name}") for name in recipe_names()}
    width = max(map(len, modules))
    return "\n".join(f"  {name:<{width}}  {module.__doc__.splitlines()[0]}" for name, module in modules.items())


def _field_list() -> str:
    """Every field with its default, under it what the docstring of `Recipe` says."""
    lines = []
    for names, text in _field_descriptions():
        lines.append("  " + " ".join(_as_argument(name, getattr(Recipe(), name)) for name in names))
        lines += textwrap.wrap(text, width=110, initial_indent=_INDENT, subsequent_indent=_INDENT)
    return "\n".join(lines)


def _field_descriptions() -> list[tuple[list[str], str]]:
    """(names, description) of the entries under `Attributes:` in the docstring of `Recipe`."""
    section = inspect.getdoc(Recipe).partition("Attributes:\n")[2]
    entries = re.split(r"\n(?= {4}\S)", section.rstrip())
    pairs = (re.sub(r"\s+", " ", entry).strip().partition(": ") for entry in entries)
    return [(names.split(", "), text) for names, _, text in pairs]


def read_recipe(given: str) -> tuple[str, Recipe]:
    """Name and recipe of a packaged name or of a .py file that holds `RECIPE`.

    Raises:
        ValueError: there is none.
    """
    if not given.endswith(".py"):
        if given not in recipe_names():
            raise ValueError(f"There is no recipe {given!r}{_near(given, recipe_names())}; a file must end in .py.")
        return given, load_recipe(given)
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"There is no file {given}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{given} holds no RECIPE = Recipe(...); see configuration/recipes for examples.")
    return path.stem, recipe


def parse_changes(recipe: Recipe, arguments: Iterable[str]) -> dict[str, Any]:
    """Values by field of `field=value` arguments; `model.<field>=value` changes one field of `GKCConfig`.

    Raises:
        ValueError: naming the field and what it can be.
    """
    types = {field.name: field.type for field in dataclasses.fields(Recipe)}
    changes, seen = {}, set()
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument!r} is no field=value; write for example steps=1000.")
        if name in seen:
            raise ValueError(f"`{name}` is given twice.")
        seen.add(name)
        if name.startswith("model."):
            changes["model"] = _changed_model(changes.get("model", recipe.model), name, text)
        elif name == "model" or name not in types:
            known = [field for field in types if field != "model"]
            if not difflib.get_close_matches(name, known, cutoff=_ALMOST_EQUAL):
                known += _model_fields("model.")
            raise ValueError(f"A recipe has no field {name!r}{_near(name, known)}.")
        else:
            changes[name] = parse_value(name, text, types[name])
    return changes


def _near(name: str, known: Sequence[str]) -> str:
    """The known names most like one, all of them if few, or where to find them."""
    near = difflib.get_close_matches(name, known, n=4, cutoff=_NEAR)
    if near:
        return f"; did you mean {' or '.join(near)}"
    return f"; there are {', '.join(known)}" if len(known) < 20 else "; `python -m train --help` lists them"


def _model_fields(prefix: str = "") -> list[str]:
    from modeling_gkc.configuration_gkc import GKCConfig  # needs torch, which help and most slips do without

    return [prefix + name for name in GKCConfig.__annotations__ if not name.startswith("vocabulary")]


def _changed_model(model: Mapping[str, Any], name: str, text: str) -> dict[str, Any]:
    """The mapping with one value changed, however deep, such as `model.backbone_config.depths=[3,4,23,3]`."""
    _, *path = name.split(".")
    if path[0] not in _model_fields():
        raise ValueError(f"`GKCConfig` has no field {path[0]!r}{_near(name, _model_fields('model.'))}.")
    value = _literal(text) if len(path) > 1 else _model_value(name, path[0], text)
    changed = dict(model)
    inner = changed
    for key in path[:-1]:
        inner[key] = dict(inner.get(key) or {})
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def _model_value(name: str, field: str, text: str) -> Any:
    from modeling_gkc.configuration_gkc import GKCConfig

    kind = GKCConfig.__annotations__[field]
    simple = {int, float, bool, str, NoneType}
    return parse_value(name, text, kind) if {kind, *get_args(kind)} - {kind} <= simple else _literal(text)


def _literal(text: str) -> Any:
    """JSON where it is that, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_value(name: str, text: str, kind: Any) -> Any:
    """A text as a value of a type: `int`, `float`, `bool`, `str`, a tuple of them, or one of several with None.

    Raises:
        ValueError: naming the field.
    """
    if get_origin(kind) is UnionType:
        if NoneType in get_args(kind) and text.lower() == "none":
            return None
        kind = next(part for part in (float, int, bool, str) if part in get_args(kind))
    if get_origin(kind) is tuple:
        return _parse_tuple(name, text, get_args(kind))
    try:
        return _PARSERS[kind](text)
    except ValueError:
        raise ValueError(f"`{name}` must be {_KINDS[kind]}, got {text!r}.") from None


def _parse_tuple(name: str, text: str, kinds: tuple) -> tuple:
    parts = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(parts)
    if len(parts) != len(kinds):
        raise ValueError(f"`{name}` must be {len(kinds)} values with a comma between, got {text!r}.")
    return tuple(parse_value(name, part, kind) for part, kind in zip(parts, kinds, strict=True))


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


_PARSERS = {int: int, float: _parse_float, bool: _parse_bool, str: str}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def format_recipe(command: Command) -> str:
    """The settings as they could be typed; what was given is marked."""
    fields = {field.name: getattr(command.recipe, field.name) for field in dataclasses.fields(Recipe)}
    lines = [f"{command.name}, to {command.out}"]
    for name, value in fields.items():
        lines.append(f"  {_as_argument(name, value)}{'   (given)' if name in command.changed else ''}")
    return "\n".join(lines)


def _as_argument(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}.{key}={json.dumps(part, default=str)}" for key, part in value.items()) or f"{name}.*"
    if isinstance(value, tuple):
        return f"{name}={','.join(map(str, value))}"
    return f"{name}={str(value).lower() if value is None or isinstance(value, bool) else value}"
