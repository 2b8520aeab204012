"""Checks of stored files: JSON of a known shape with a checksum of itself, and checksums of other files.

Every damage becomes a `DamagedFileError` of one line, which names the file and says how to make it again. Checksums
find damage, and files that were exchanged or written by something else. They are no signatures: whoever rewrites a
file on purpose can write its checksum too. SHA-256 stands where a result tells which data it was measured on, xxHash
(xxh3, 128 bits) where speed matters: 24 GB a second from memory on one core, SHA-256 1.6.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from modeling_gkc.atomic_files import atomic_write
from modeling_gkc.file_checksums import BLOCK_BYTES, DamagedFileError

SUM = "checksum"


class Each:
    """
    Shape of an object with any keys, whose values are alike.

    Args:
        value: shape of the values.
    """

    def __init__(self, value: Any):
        self.value = value


class Perhaps:
    """
    Shape of an entry that may be missing.

    Args:
        value: its shape where it is there.
    """

    def __init__(self, value: Any):
        self.value = value


def shape_problems(value: Any, shape: Any, place: str = "") -> list[str]:
    """
    List how a JSON value differs from a shape, one line each.

    Args:
        value: what `json.loads` gave.
        shape: a type, a tuple of types, a list of one shape, `Each`, or an object of shapes, whose further keys are
            not looked at. A number must be finite, and true is no number.
        place: of the value, for the messages.
    """
    if isinstance(shape, Each | dict):
        return _object_problems(value, shape, place)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{place or 'the file'}: must be a list, got {type(value).__name__}"]
        return [
            line for index, item in enumerate(value) for line in shape_problems(item, shape[0], f"{place}[{index}]")
        ]
    kinds = shape if isinstance(shape, tuple) else (shape,)
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, shape):
        return [f"{place or 'the file'}: must be {' or '.join(kind.__name__ for kind in kinds)}, got {value!r:.60}"]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{place}: is {value}"]
    return []


def _object_problems(value: Any, shape: Each | dict[str, Any], place: str) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"{place or 'the file'}: must be an object, got {type(value).__name__}"]
    if isinstance(shape, Each):
        return [line for key, item in value.items() for line in shape_problems(item, shape.value, _join(place, key))]
    missing = [
        f"{_join(place, key)}: is missing"
        for key, kind in shape.items()
        if key not in value and not isinstance(kind, Perhaps)
    ]
    inner = [
        shape_problems(value[key], kind.value if isinstance(kind, Perhaps) else kind, _join(place, key))
        for key, kind in shape.items()
        if key in value
    ]
    return missing + [line for lines in inner for line in lines]


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else str(key)


def write_checksummed_json(path: str | Path, content: Mapping[str, Any], sync: bool = False) -> None:
    """
    Write an object atomically as a JSON file with a checksum of itself.

    Args:
        path: file to write.
        content: what JSON can hold; NaN and Infinity are refused.
        sync: bring it to the disk before it gets its name.

    Raises:
        ValueError: the content holds NaN or Infinity.
        OSError: the file cannot be written.
    """
    content = json.loads(json.dumps(content))  # as it will be read: keys are strings
    sealed = {**content, SUM: _json_sum(content)}
    atomic_write(path, json.dumps(sealed, indent=1, ensure_ascii=False, allow_nan=False) + "\n", sync=sync)


def read_json(path: str | Path, remedy: str | None = None, shape: Any = None, unique_keys: bool = False) -> Any:
    """
    Read a JSON file in UTF-8.

    Args:
        path: The file.
        remedy: How to make a file that a command wrote again, the end of a sentence. None for files of users.
        shape: Shape of the content, as in `shape_problems`; None accepts any.
        unique_keys: Refuse an object that has a key twice, of which JSON's reader would keep the last.

    Raises:
        DamagedFileError: with a remedy, if the file is missing, cannot be read, is invalid JSON or of another shape.
        OSError: without a remedy, if the file is missing or cannot be read.
        ValueError: without a remedy, if it is invalid JSON or of another shape; file and line are named.
    """
    place = str(path) if remedy is None else f"{path} is damaged"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except OSError as error:
        if remedy is None:
            raise
        raise DamagedFileError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            problem = f"{place}, line {error.lineno}: invalid JSON: {error.msg}"
        elif isinstance(error, UnicodeDecodeError):
            problem = f"{place}: it is not UTF-8 ({error})"
        else:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            problem = f"{place}: it cannot be read as JSON: {reason}"
        raise _file_error(problem, remedy) from error
    if shape is not None and (problems := shape_problems(content, shape)):
        more = f" and {len(problems) - 2} more" if len(problems) > 2 else ""
        raise _file_error(f"{place}{':' if remedy is None else ','} {'; '.join(problems[:2])}{more}", remedy)
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the keys {sorted({key for key in keys if keys.count(key) > 1})} are given twice")
    return content


def _file_error(problem: str, remedy: str | None) -> ValueError:
    return ValueError(f"{problem}.") if remedy is None else DamagedFileError(f"{problem}: {remedy}")


def read_checksummed_json(path: str | Path, shape: Mapping[str, Any], remedy: str) -> dict[str, Any]:
    """
    Read what `write_checksummed_json` wrote, without its checksum.

    Args:
        path: the file.
        shape: of its content, as in `shape_problems`.
        remedy: what to do about a damaged file, the end of a sentence.

    Raises:
        DamagedFileError: it is missing, invalid JSON, of another shape or edited; the message says which.
    """
    content = read_json(path, remedy, {**shape, SUM: str})
    stored = content.pop(SUM)
    if stored != _json_sum(content):
        raise DamagedFileError(f"{path} is damaged or was edited, its checksum is another than when written: {remedy}")
    return content


def _json_sum(content: Mapping[str, Any]) -> str:
    """SHA-256 of an object, however it is laid out in its file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file; raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_xxh3(path: str | Path) -> str:
    """The 128 bits of xxh3 of a file in hexadecimal digits; raises OSError if it cannot be read."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


# Shape of what `describe_files` gives.
FILES = Each({"bytes": int, "xxh3": str})


def describe_files(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size in bytes and xxh3 of files, by their paths within a folder."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "xxh3": file_xxh3(path)}
        for path in sorted(paths)
    }


def require_files(folder: Path, files: Mapping[str, Mapping[str, Any]], remedy: str) -> None:
    """
    Compare files with what `describe_files` gave of them; all of them are read.

    Args:
        folder: where they are.
        files: what `describe_files` gave.
        remedy: what to do about a damaged file, the end of a sentence.

    Raises:
        DamagedFileError: naming the first file that is missing or does not hold what was written.
    """
    for name, file in files.items():
        path = folder / name
        try:
            is_whole = path.stat().st_size == file["bytes"] and file_xxh3(path) == file["xxh3"]
        except OSError as error:
            raise DamagedFileError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
        if not is_whole:
            raise DamagedFileError(f"{path} is damaged, its checksum is another than when written: {remedy}")
