"""The file that one evaluation writes: what stands in it, and whether a file is such a one."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA_NAME = "gkc-evaluation-1"
NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))


class _Each:
    """An object with any keys, whose values are alike."""

    def __init__(self, value: Any):
        self.value = value


# Key -> type, tuple of types, list [item], `_Each` or an object with keys of its own; docs/evaluation.md explains all.
SCHEMA: dict[str, Any] = {
    "schema": str,
    "fingerprint": str,
    "benchmark": str,
    "split": str,
    "tasks": [str],
    "scores": _Each(_Each(OPTIONAL_NUMBER)),
    "per_cent": _Each(_Each(OPTIONAL_NUMBER)),
    "groups": _Each(dict),
    "classes": [{"name": str, "scores": _Each(_Each(OPTIONAL_NUMBER))}],
    "images": {"evaluated": int, "prepared": int, "published": (int, type(None)), "broken": [str]},
    "protocol": dict,
    "prompts": dict,
    "model": {"name": str, "sha256": str, "parameters": int, "notes": dict},
    "data": {"folder": str, "fingerprint": str, "vocabulary_sha256": str},
    "settings": dict,
    "versions": _Each(str),
    "command": str,
    "machine": dict,
    "times": {
        "images_per_second": OPTIONAL_NUMBER,
        "processes": int,
        "seconds": _Each(NUMBER),
        "milliseconds_per_image": _Each(NUMBER),
    },
    "profile": (dict, type(None)),
}


def check_result(result: Any) -> list[str]:
    """What is wrong with a result, one line each; an empty list if nothing is."""
    problems = _check(result, SCHEMA, "")
    if not problems and result["schema"] != SCHEMA_NAME:
        problems.append(f"schema: is {result['schema']!r}, this version reads {SCHEMA_NAME!r}")
    if not problems:
        problems += [
            f"scores.{task}.{name}: {value} does not lie between 0 and 1"
            for task, scores in result["scores"].items()
            for name, value in scores.items()
            if value is not None and not 0 <= value <= 1
        ]
    return problems


def _check(value: Any, expected: Any, place: str) -> list[str]:
    if isinstance(expected, _Each | dict):
        if not isinstance(value, Mapping):
            return [f"{place or 'the file'}: must be an object, got {type(value).__name__}"]
        if isinstance(expected, _Each):
            return [line for key, item in value.items() for line in _check(item, expected.value, _join(place, key))]
        missing = [f"{_join(place, key)}: is missing" for key in expected if key not in value]
        inner = [_check(value[key], kind, _join(place, key)) for key, kind in expected.items() if key in value]
        return missing + [line for lines in inner for line in lines]
    if isinstance(expected, list):
        if not isinstance(value, list):
            return [f"{place}: must be a list, got {type(value).__name__}"]
        return [line for index, item in enumerate(value) for line in _check(item, expected[0], f"{place}[{index}]")]
    if isinstance(value, bool) or not isinstance(value, expected):
        kinds = expected if isinstance(expected, tuple) else (expected,)
        return [f"{place}: must be {' or '.join(kind.__name__ for kind in kinds)}, got {value!r:.60}"]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{place}: is {value}"]
    return []


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else str(key)


def write_result(result: Mapping[str, Any], path: Path) -> None:
    """
    Write a result, whole or not at all.

    Raises:
        ValueError: it does not follow the schema.
    """
    problems = check_result(result)
    if problems:
        raise ValueError("the result does not follow its own schema: " + "; ".join(problems))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_result(path: Path) -> dict[str, Any]:
    """
    Read a result.

    Raises:
        ValueError: the file cannot be read or is no result; the message says what is wrong where.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON: {error}") from error
    problems = check_result(result)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path}: is no result of train.evaluate: {'; '.join(problems[:3])}{more}")
    return result


def per_cent(value: float | None, digits: int = 2) -> float | None:
    """A score of 0..1 in per cent."""
    return None if value is None else round(100 * value, digits)
