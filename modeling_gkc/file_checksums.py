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
"""Checksums of safetensors files: a SHA-256 in the header, by which damage is detected before tensors are read.

The checksum is the metadata entry `sha256` of the header. It is computed over the whole file with 64 zeros in place of
the checksum itself. It detects damaged and exchanged files, but is not a signature: anyone who rewrites a file can
also rewrite its checksum.
"""

import hashlib
import json
import os
import re
from pathlib import Path

BLOCK_BYTES = 1 << 22
# Metadata to pass to `save_file`; `write_checksum` then replaces the zeros by the checksum.
EMPTY_CHECKSUM = {"sha256": "0" * 64}
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')


class DamagedFileError(ValueError):
    """Error for a stored file that is missing or damaged; the message names the file and how to restore it."""


def write_checksum(path: str | Path) -> None:
    """Write the checksum of a safetensors file into its header, and sort the metadata by name.

    safetensors writes metadata in arbitrary order; sorted metadata makes files with equal content identical.

    Args:
        path: File that `save_file` wrote with the metadata `EMPTY_CHECKSUM`.

    Raises:
        ValueError: If the file was written without `EMPTY_CHECKSUM`.
    """
    with open(path, "rb+") as file:
        header = _in_order(_header(file) or b"")
        found = _SEAL.search(header)
        if found is None or found[1] != b"0" * 64:
            raise ValueError(f"{path} has no place for a checksum: write it with the metadata `EMPTY_CHECKSUM`.")
        digest = _digest(file, header).encode()
        file.seek(0)
        file.write(header[: found.start(1)] + digest + header[found.end(1) :])


def verify_checksum(path: str | Path, remedy: str) -> str:
    """Verify the checksum of a safetensors file, which reads the whole file at 1 to 2 GB per second.

    Args:
        path: File to which `write_checksum` was applied.
        remedy: End of the error message, which says what to do about a damaged file.

    Returns:
        The checksum as 64 hexadecimal digits.

    Raises:
        DamagedFileError: If the file is missing, cannot be read, has no checksum, or has another checksum than its
            content.
    """
    try:
        with open(path, "rb") as file:
            header = _header(file)
            found = None if header is None else _SEAL.search(header)
            if found is None:
                raise DamagedFileError(f"{path} is damaged, its header has no checksum: {remedy}")
            zeroed = header[: found.start(1)] + b"0" * 64 + header[found.end(1) :]
            if _digest(file, zeroed) != found[1].decode():
                raise DamagedFileError(f"{path} is damaged, its content does not match its checksum: {remedy}")
            return found[1].decode()
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read ({error.strerror}): {remedy}") from error


def _header(file) -> bytes | None:
    """Read the header, 8 bytes of its length followed by JSON; return None if the file is too short."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        return None
    file.seek(0)
    return file.read(8 + length)


def _in_order(header: bytes) -> bytes:
    """Sort the metadata of a header, unless that changes its length, on which the tensors' offsets depend."""
    content = json.loads(header[8:] or b"{}")
    if "__metadata__" in content:
        content["__metadata__"] = dict(sorted(content["__metadata__"].items()))
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(header) - 8)
    return header[:8] + text if len(text) == len(header) - 8 else header


def _digest(file, header: bytes) -> str:
    """Compute the SHA-256 of a header and of the rest of the file."""
    digest = hashlib.sha256(header)
    file.seek(len(header))
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


__all__ = ["EMPTY_CHECKSUM", "DamagedFileError", "verify_checksum", "write_checksum"]
