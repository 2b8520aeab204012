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
"""Reader of the weights of a TorchScript archive that does not run its code.

`torch.jit.load` runs code of the archive, and `torch.load(weights_only=True)` does not accept such archives. The
weights are stored as plain data: a zip file with one entry of raw numbers per storage (`data/0`, `data/1`, ...) and a
pickle (`data.pkl`) of the module tree, whose tensors refer to a storage with offset, sizes and strides. The pickle is
read by an unpickler that supports tensors, lists and attribute containers, and imports nothing. Entries must be
uncompressed and tensors must not repeat elements, so that reading needs no more memory than the size of the file.
"""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGE_TYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_LIST_MAKERS = ("build_boollist", "build_doublelist", "build_intlist", "build_tensorlist")


class _ScriptObject:
    """Module or other object of the archive, reduced to its attributes."""

    def __setstate__(self, state: Any):
        self.attributes = state


class _WeightUnpickler(pickle.Unpickler):
    """Unpickler that supports only tensors, containers and `_ScriptObject`s.

    Args:
        archive: The opened zip file.
        root: Name of the top-level folder in the zip file.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(_stored_entry(archive, f"{root}/data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of a global name of the pickle."""
        if module.split(".")[0] == "__torch__":
            # A new class each time, because a pickle can set attributes of the object returned here.
            return type(name, (_ScriptObject,), {})
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor_maker()
        if module == "torch.jit._pickle" and name in _LIST_MAKERS:
            return list
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return lambda value, _: value
        if module == "torch" and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is neither a tensor nor a module")

    def persistent_load(self, pid: Any) -> Tensor:
        """Load the storage of ("storage", type, key, device, number of elements) as a flat tensor."""
        kind, dtype, key, _, num_elements = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to a {kind!r}")
        if key not in self._storages:
            self._storages[key] = self._read_storage(key, dtype, num_elements)
        return self._storages[key]

    def _read_storage(self, key: str, dtype: torch.dtype, num_elements: int) -> Tensor:
        entry = _stored_entry(self._archive, f"{self._root}/data/{key}")
        if entry.file_size != num_elements * dtype.itemsize:
            raise pickle.UnpicklingError(f"its storage {key} has {entry.file_size} bytes, not {num_elements} numbers")
        if not num_elements:
            return torch.empty(0, dtype=dtype)
        values = bytearray(entry.file_size)
        with self._archive.open(entry) as file:
            num_read = file.readinto(values)
        if num_read != len(values):
            raise pickle.UnpicklingError(f"its storage {key} ends early")
        return torch.frombuffer(values, dtype=dtype)


def _tensor_maker() -> Callable[..., Tensor]:
    def make_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
        _check_no_overlap(storage, size, stride)
        return storage.as_strided(size, stride, offset)

    return make_tensor


def _check_no_overlap(storage: Tensor, size: tuple, stride: tuple) -> None:
    """Check that a tensor does not repeat elements of its storage, since its copy could then be of any size.

    When axes are sorted by stride, the stride of each must exceed the extent of the previous axes.
    """
    if len(size) != len(stride) or not all(type(number) is int and number >= 0 for number in (*size, *stride)):
        raise pickle.UnpicklingError(f"it has a tensor of size {size} and strides {stride}")
    if 0 in size:
        return
    span = 1
    for step, length in sorted((step, length) for step, length in zip(stride, size, strict=True) if length > 1):
        if step < span:
            raise pickle.UnpicklingError(
                f"it has a tensor of size {size} and strides {stride}, which repeats the numbers of its storage"
            )
        span = step * (length - 1) + span
    if span > len(storage):
        raise pickle.UnpicklingError(f"it has a tensor of size {size} out of bounds of its storage of {len(storage)}")


def _stored_entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Return an entry of the zip file, checked to be uncompressed and not larger than the file.

    torch writes no other entries, and a compressed entry of megabytes could expand to gigabytes.
    """
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise pickle.UnpicklingError(f"its entry {name} is compressed, which torch never writes")
    size = archive.fp.seek(0, 2)
    if entry.header_offset + entry.file_size > size:
        raise pickle.UnpicklingError(f"its entry {name} says it has {entry.file_size} bytes, in a file of {size}")
    return entry


def is_torchscript_archive(path: Path) -> bool:
    """Return whether a file is a readable zip file with the entries of a TorchScript archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except Exception:  # a damaged directory can raise errors of any type
        return False
    return {"data.pkl", "constants.pkl"} <= names


def read_torchscript_weights(path: Path) -> dict[str, Tensor]:
    """Read all tensors of the modules of a TorchScript archive in their stored types.

    Args:
        path: The archive.

    Returns:
        Tensors by their names in `state_dict()`.

    Raises:
        ValueError: If the archive is damaged, refers to objects other than tensors and modules, or shares a module
            with weights between several places.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).partition("/")[0]
            order = f"{root}/byteorder"
            if order in archive.namelist() and archive.read(_stored_entry(archive, order)) != b"little":
                raise pickle.UnpicklingError("it was written on a big-endian machine")
            module = _WeightUnpickler(archive, root).load()
            return dict(_named_tensors(module, "", {}))
    except Exception as error:  # a damaged or hostile pickle can raise errors of any type
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as a TorchScript archive of weights: {reason}.") from error


def _named_tensors(module: Any, prefix: str, has_tensors: dict[int, bool]) -> list[tuple[str, Tensor]]:
    """List the name and tensor of every tensor attribute, depth first.

    Args:
        module: Root module.
        prefix: Prefix of the names.
        has_tensors: By `id`, whether a visited module has tensors; True for modules that are still being visited. Each
            module is visited once, because nested shared modules could have 2^depth names.
    """
    if id(module) in has_tensors:
        if has_tensors[id(module)]:
            raise pickle.UnpicklingError(f"its module {prefix.rstrip('.')} is in another place too")
        return []
    has_tensors[id(module)] = True
    attributes = getattr(module, "attributes", None)
    if not isinstance(module, _ScriptObject) or not isinstance(attributes, dict):
        raise pickle.UnpicklingError(f"{prefix.rstrip('.') or 'its top level'} is no plain module")
    tensors = []
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            tensors.append((f"{prefix}{name}", value))
        elif isinstance(value, _ScriptObject):
            tensors += _named_tensors(value, f"{prefix}{name}.", has_tensors)
    has_tensors[id(module)] = bool(tensors)
    return tensors


__all__ = ["is_torchscript_archive", "read_torchscript_weights"]
