# Copyright 2026 The GKC Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Safetensors files that carry a SHA-256 of themselves, by which damage is found before anything is read from them.

The checksum stands in the header as the metadata `sha256`. It is that of the whole file with 64 zeros in its own
place. It finds damage and exchanged files; it is no signature, since whoever rewrites a file can seal it anew.
"""

import hashlib
import json
import os
import re
from pathlib import Path

BLOCK_BYTES = 1 << 22
# Metadata to give to `save_file`; `write_checksum` then puts the checksum in its place.
EMPTY_CHECKSUM = {"sha256": "0" * 64}
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')


class DamagedFileError(ValueError):
    """A stored file is missing, or does not hold what was written; the message names it and how to make it again."""


def write_checksum(path: str | Path) -> None:
    """
    Put the checksum of a file into its header, and the metadata into the order of their names.

    safetensors writes metadata in another order each time; in order, equal content makes equal files.

    Args:
        path: File that `save_file` wrote with the metadata `EMPTY_CHECKSUM`.

    Raises:
        ValueError: the file was written without `EMPTY_CHECKSUM`.
    """
    with open(path, "rb+") as file:
        header = _in_order(_header(file) or b"")
        found = _SEAL.search(header)
        if found is None or found[1] != b"0" * 64:
            raise ValueError(f"{path} cannot be sealed: it was not written with the metadata `EMPTY_CHECKSUM`.")
        digest = _digest(file, header).encode()
        file.seek(0)
        file.write(header[: found.start(1)] + digest + header[found.end(1) :])


def verify_checksum(path: str | Path, remedy: str) -> str:
    """
    Refuse a safetensors file that is damaged or not sealed; all of it is read, 1 to 2 GB a second.

    Args:
        path: File that `write_checksum` sealed.
        remedy: What to do about a damaged file, the end of a sentence.

    Returns:
        Its checksum.

    Raises:
        DamagedFileError: the file is missing, cannot be read, is not sealed, or its checksum is another.
    """
    try:
        with open(path, "rb") as file:
            header = _header(file)
            found = None if header is None else _SEAL.search(header)
            if found is None:
                raise DamagedFileError(f"{path} is damaged, its header has no checksum: {remedy}")
            zeroed = header[: found.start(1)] + b"0" * 64 + header[found.end(1) :]
            if _digest(file, zeroed) != found[1].decode():
                raise DamagedFileError(f"{path} is damaged, its checksum is another than when written: {remedy}")
            return found[1].decode()
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read ({error.strerror}): {remedy}") from error


def _header(file) -> bytes | None:
    """The first 8 bytes, which hold the length, and the JSON after them; None if the file is too short."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        return None
    file.seek(0)
    return file.read(8 + length)


def _in_order(header: bytes) -> bytes:
    """The same header with sorted metadata, if it has the same length, which the positions of the tensors count on."""
    content = json.loads(header[8:] or b"{}")
    if "__metadata__" in content:
        content["__metadata__"] = dict(sorted(content["__metadata__"].items()))
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(header) - 8)
    return header[:8] + text if len(text) == len(header) - 8 else header


def _digest(file, header: bytes) -> str:
    """SHA-256 of a header and of what follows it in the file."""
    digest = hashlib.sha256(header)
    file.seek(len(header))
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


__all__ = ["EMPTY_CHECKSUM", "DamagedFileError", "verify_checksum", "write_checksum"]
