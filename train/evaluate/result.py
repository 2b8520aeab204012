"""Result file of an evaluation: its schema, and functions that write, read and check it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..storage.checksums import Each, read_checksummed_json, read_json, shape_problems, write_checksummed_json

SCHEMA_NAME = "gkc-evaluation-1"
NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))


# Key -> type, tuple of types, list [item], `Each` or nested object; docs/evaluation.md describes the fields.
SCHEMA: dict[str, Any] = {
    "schema": str,
    "fingerprint": str,
    "benchmark": str,
    "split": str,
    "tasks": [str],
    "scores": Each(Each(OPTIONAL_NUMBER)),
    "per_cent": Each(Each(OPTIONAL_NUMBER)),
    "groups": Each(dict),
    "classes": [{"name": str, "scores": Each(Each(OPTIONAL_NUMBER))}],
    "images": {"evaluated": int, "prepared": int, "published": (int, type(None)), "broken": [str]},
    "protocol": dict,
    "prompts": dict,
    "model": {"name": str, "sha256": str, "parameters": int, "notes": dict},
    "data": {"folder": str, "fingerprint": str, "vocabulary_sha256": str},
    "settings": dict,
    "versions": Each(str),
    "command": str,
    "machine": dict,
    "times": {
        "images_per_second": OPTIONAL_NUMBER,
        "processes": int,
        "seconds": Each(NUMBER),
        "milliseconds_per_image": Each(NUMBER),
    },
    "profile": (dict, type(None)),
}


def check_result(result: Any) -> list[str]:
    """Check a result against the schema, and return one line per problem."""
    problems = shape_problems(result, SCHEMA)
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


def write_result(result: Mapping[str, Any], path: Path) -> None:
    """Write a result file atomically.

    Raises:
        ValueError: The result does not follow the schema.
    """
    problems = check_result(result)
    if problems:
        raise ValueError("The result does not follow the schema: " + "; ".join(problems))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checksummed_json(path, result)


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file, and return the result without its checksum.

    Raises:
        ValueError: The file cannot be read, is not a result file, or was edited or damaged after it was written.
    """
    remedy = "run the command of `train.evaluate` that wrote it again, with another --out."
    problems = check_result(read_json(path, remedy))
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path} is not a result file of train.evaluate: {'; '.join(problems[:3])}{more}")
    return read_checksummed_json(path, SCHEMA, remedy)


def per_cent(value: float | None, digits: int = 2) -> float | None:
    """Convert a score in 0..1 to percent; None stays None."""
    return None if value is None else round(100 * value, digits)
