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
"""Publishing of checkpoints with their code, for users of transformers who have not installed this library.

`save_pretrained` of a model or processor writes weights and settings only. To publish a checkpoint, save it with its
code:

    from modeling_gkc import GKCSegmentationPipeline
    from modeling_gkc.remote_code import add_code, save_with_code

    save_with_code(model, processor, "folder")
    add_code("folder")  # to what was saved plainly
    GKCSegmentationPipeline(model=model, processor=processor).push_to_hub("user/name")  # the same, uploaded

It can then be loaded with transformers alone:

    AutoModel.from_pretrained("user/name", trust_remote_code=True)
    AutoProcessor.from_pretrained("user/name", trust_remote_code=True)
    pipeline("image-segmentation", model="user/name", trust_remote_code=True)(image, labels="dog; sofa, couch")

A model loaded in this way is saved with its code again. The packaged vocabularies ("ade20k_150") are not included;
they need the installed library.

If this library has been imported, its own classes are used, and models and processors load with or without
`trust_remote_code`. Only `pipeline()` rejects a folder with a custom pipeline unless `trust_remote_code=True` or
`pipeline_class` is given: `GKCSegmentationPipeline`, or transformers' `ImageSegmentationPipeline`.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .atomic_files import atomic_write

ENTRY_MODULE = "hub_entry"
LIBRARY_ENTRY = '''\
"""Entry module that gives transformers the classes of the installed library for `trust_remote_code=True`."""

from modeling_gkc.hub_entry import *  # noqa: F403
'''
CARD_NAME = "README.md"
CARD = """\
---
library_name: transformers
pipeline_tag: image-segmentation
tags:
- gkc
- open-vocabulary-segmentation
- semantic-segmentation
- panoptic-segmentation
---

# An open-vocabulary segmentation model of GKC

<<method>>

```python
from transformers import pipeline

segmenter = pipeline("image-segmentation", model="THIS REPOSITORY", trust_remote_code=True)
segments = segmenter("photo.jpg", labels="dog; sofa, couch; lamp")  # classes by ";", names of one class by ","
```

<<words>>
To be completed by its author: training data, results, limits, and the license of the weights.
"""
SEGMENTATION_AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForImageSegmentation",
    "AutoModelForInstanceSegmentation",
    "AutoModelForSemanticSegmentation",
    "AutoModelForUniversalSegmentation",
)
# The paragraph of a model card by the model type of a segmentation model.
CARD_METHODS = {
    "gkc": """\
Segments images with a text vocabulary given at inference (Han, Liu et al., *Global Knowledge Calibration for Fast
Open-Vocabulary Segmentation*, ICCV 2023, [arXiv 2303.09181](https://arxiv.org/abs/2303.09181)).""",
    "gkc_zero_shot": """\
Segments images with a text vocabulary given at inference: the masks are those of a <<segmenter>> with fixed classes,
and a <<tower>> compares each region with the words, without training. The licenses of both models apply.""",
}
AUTO_CLASSES = {
    "gkc": {
        "AutoConfig": "GKCConfig",
        "AutoImageProcessor": "GKCImageProcessor",
        **dict.fromkeys(SEGMENTATION_AUTO_CLASSES, "GKCForOpenVocabSegmentation"),
        "AutoProcessor": "GKCProcessor",
    },
    "gkc_zero_shot": {
        "AutoConfig": "GKCZeroShotConfig",
        "AutoImageProcessor": "GKCImageProcessor",
        **dict.fromkeys(SEGMENTATION_AUTO_CLASSES, "GKCForZeroShotSegmentation"),
        "AutoProcessor": "GKCProcessor",
    },
    "clip_convnext": {
        "AutoBackbone": "CLIPConvNextBackbone",
        "AutoConfig": "CLIPConvNextConfig",
        "AutoModel": "CLIPConvNextVisionModel",
    },
    "clip_resnet": {
        "AutoBackbone": "CLIPResNetBackbone",
        "AutoConfig": "CLIPResNetConfig",
        "AutoModel": "CLIPResNetVisionModel",
    },
}
PIPELINES = {
    "image-segmentation": {
        "impl": f"{ENTRY_MODULE}.GKCSegmentationPipeline",
        "pt": ["AutoModelForUniversalSegmentation"],
    }
}
# Published folders contain the code of exactly these classes, not of derived classes.
_PUBLISHED = {name for names in AUTO_CLASSES.values() for name in names.values()}
_KEYS_OF_CODE = ("auto_map", "custom_pipelines")


def save_with_code(model: Any, processor: Any, folder: str | Path, **kwargs) -> None:
    """Save a checkpoint together with its code and, if it has none, a model card.

    Args:
        model: A `GKCForOpenVocabSegmentation`, or an image encoder or backbone of CLIP (`CLIPResNetVisionModel`,
            `CLIPResNetBackbone`, `CLIPConvNextVisionModel`, `CLIPConvNextBackbone`).
        processor: Processor of the model, or None.
        folder: Folder to write to; it is created if it does not exist.
        kwargs: Arguments of the model's `save_pretrained`.

    Raises:
        ValueError: If no Auto class of transformers loads this model class, if it is not a class of this library, or
            if `push_to_hub` is given, which would upload the model without its code.
    """
    if kwargs.get("push_to_hub"):
        raise ValueError(
            "`push_to_hub=True` would upload the model only, without code and processor: use "
            "`GKCSegmentationPipeline(model=model, processor=processor).push_to_hub(repo_id)`."
        )
    published = AUTO_CLASSES.get(model.config.model_type, {})
    if type(model).__name__ not in published.values() or not model.has_code():
        raise ValueError(
            f"No Auto class loads a {type(model).__name__}: publish the GKCForOpenVocabSegmentation, or an image "
            "tower or backbone of CLIP."
        )
    model.save_pretrained(folder, **kwargs)
    if processor is not None:
        processor.save_pretrained(folder)
    add_code(folder)
    write_card(folder)


def add_code(folder: str | Path) -> None:
    """Add code to a saved checkpoint, and references to it to its JSON files.

    Args:
        folder: Folder with `config.json`, `processor_config.json` or `preprocessor_config.json` of this library.

    Raises:
        ValueError: If it has none of these files, one was written by another library, or no Auto class loads the
            model.
    """
    for path, values in _marked_files(Path(folder)).items():
        _write_values(path, values)
    _copy_code(Path(folder))


def add_library_entry(folder: str | Path) -> None:
    """Make a saved checkpoint loadable by transformers with the installed library, without `import modeling_gkc`.

    This writes a module that imports the library's classes and refers to it in the checkpoint's JSON files, so that
    `AutoModel.from_pretrained(folder, trust_remote_code=True)` finds them. It is meant for checkpoints that are part
    of the library; a checkpoint for the Hub needs `add_code`. No custom pipeline is registered, so that `pipeline()`
    loads the checkpoint without further arguments.

    Args:
        folder: As in `add_code`.

    Raises:
        ValueError: As in `add_code`.
    """
    folder = Path(folder)
    for path, values in _marked_files(folder).items():
        values.pop("custom_pipelines", None)
        _write_values(path, values)
    atomic_write(folder / f"{ENTRY_MODULE}.py", LIBRARY_ENTRY)


def write_card(folder: str | Path) -> None:
    """Write a model card with the usage and stored vocabulary of a saved model, to be completed by its author.

    Args:
        folder: Folder of a saved `GKCForOpenVocabSegmentation`. An existing README.md is not changed.
    """
    folder = Path(folder)
    path, config = folder / CARD_NAME, folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if path.exists() or values.get("model_type") not in CARD_METHODS:
        return
    method = CARD_METHODS[values["model_type"]]
    for part in ("segmenter", "tower"):
        method = method.replace(f"<<{part}>>", str(values.get(f"{part}_config", {}).get("model_type")))
    stored = [names[0] for names in values.get("vocabulary") or []]
    words = f"Without `labels` it uses its {len(stored)} stored classes: {', '.join(stored)}.\n" if stored else ""
    atomic_write(path, CARD.replace("<<method>>", method).replace("<<words>>", words))


def code_files() -> list[Path]:
    """Return the files of a published checkpoint's code: the entry module and all modules that it imports."""
    entry = Path(__file__).with_name(f"{ENTRY_MODULE}.py")
    return sorted({entry, *map(Path, get_relative_import_files(entry))})


def _copy_code(folder: Path) -> None:
    for path in code_files():
        atomic_write(folder / path.name, path.read_bytes())


def _marked_files(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the contents of the JSON files of a saved checkpoint, with references to the code."""
    paths = [folder / name for name in _MARKS if (folder / name).is_file()]
    if not paths:
        raise ValueError(f"{folder} is not a saved checkpoint: it has none of the files {', '.join(_MARKS)}.")
    return {path: _marked(path) for path in paths}


def _marked(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file of a saved checkpoint, with references to the code."""
    values = json.loads(path.read_text(encoding="utf-8"))
    unpublished = _unpublished(values.get("architectures"))
    try:
        _MARKS[path.name](values)
    except KeyError as error:
        raise ValueError(f"{path} was not saved by an object of this library: it lacks {error}.") from error
    if unpublished:
        raise ValueError(f"{path} belongs to a {unpublished[0]}, which no Auto class loads from this library's code.")
    # Only the top-level keys are sorted, because the keys of `id2label` are in the order of the classes.
    return dict(sorted(values.items()))


def _write_values(path: Path, values: Mapping[str, Any]) -> None:
    atomic_write(path, json.dumps(values, indent=2) + "\n")


def _unpublished(architectures: list[str] | None) -> list[str]:
    return [name for name in architectures or () if name not in _PUBLISHED]


def _auto_map(model_type: str, *auto_classes: str) -> dict[str, str]:
    names = AUTO_CLASSES[model_type]
    return {auto_class: f"{ENTRY_MODULE}.{names[auto_class]}" for auto_class in auto_classes or names}


def _mark_config(values: dict[str, Any]) -> None:
    values["auto_map"] = _auto_map(values["model_type"])
    if values["model_type"] in CARD_METHODS:
        values["custom_pipelines"] = PIPELINES


def _mark_image_processor(values: dict[str, Any]) -> None:
    values["auto_map"] = _auto_map("gkc", "AutoImageProcessor")


def _mark_processor(values: dict[str, Any]) -> None:
    values["auto_map"] = _auto_map("gkc", "AutoProcessor")
    _mark_image_processor(values["image_processor"])


_MARKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "config.json": _mark_config,
    "preprocessor_config.json": _mark_image_processor,
    "processor_config.json": _mark_processor,
}


def register_segmentation_model(config_class: type, model_class: type) -> None:
    """Register a segmentation model with transformers' Auto classes and its image-segmentation pipeline."""
    from transformers.models.auto import modeling_auto  # of which configurations and processors need nothing

    for name in SEGMENTATION_AUTO_CLASSES:
        getattr(modeling_auto, name).register(config_class, model_class, exist_ok=True)
    # The pipeline accepts a class only by its name in this table.
    names = modeling_auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
    names[config_class.model_type] = model_class.__name__


class CodeRegistrationMixin:
    """Mixin by which the registration of one class enables saving the code of all classes of this library.

    transformers registers the classes that it loads from remote code, so that they are saved with their code. Its own
    implementation copies the modules of a single class, which may be incompatible with those of another class in the
    same folder; this one always copies all modules.
    """

    _saves_code = False

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type | None = None) -> None:
        """Make `save_pretrained` of all objects of this library write the code too, for the rest of the process.

        Objects of derived classes are still saved without code, because their code is not part of this library.

        Args:
            auto_class: Ignored, because a folder with code always serves all Auto classes of the model.

        Raises:
            ValueError: If the class is not part of this library, or no Auto class loads it.
        """
        if cls.has_code():
            CodeRegistrationMixin._saves_code = True
        # transformers calls this for every class loaded from remote code, which must not fail for foreign classes.
        elif not cls.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
            raise ValueError(
                f"{cls.__module__}.{cls.__name__} is not among the classes whose code can be saved: "
                f"{', '.join(sorted(_PUBLISHED))}. Save it plainly, and publish it as transformers documents for "
                "custom code: with a `model_type` of its own, and your module beside config.json, where `auto_map` "
                "names it."
            )

    @classmethod
    def has_code(cls) -> bool:
        """Return whether this library's published code contains this exact class."""
        return cls.__name__ in _PUBLISHED and cls.__module__.rpartition(".")[0] == __name__.rpartition(".")[0]


class CodeSavingMixin(CodeRegistrationMixin):
    """Mixin of configurations and processors whose files refer to code only if the code is saved too."""

    def to_dict(self) -> dict[str, Any]:
        """Return all settings without the references to code of the folder that they were loaded from."""
        return {name: value for name, value in super().to_dict().items() if name not in _KEYS_OF_CODE}

    def to_json_file(self, json_file_path: str | Path, *args, **kwargs) -> None:
        """Write the settings to a JSON file, and the code beside it if `register_for_auto_class` was called.

        The code is written only where transformers looks for it: beside files with the names of `save_pretrained`, and
        not beside the configuration of a model that no Auto class loads.

        Args:
            json_file_path: File to write.
            args: Arguments of transformers' method.
            kwargs: Arguments of transformers' method.
        """
        super().to_json_file(json_file_path, *args, **kwargs)
        path = Path(json_file_path)
        published = self.has_code() and not _unpublished(getattr(self, "architectures", None))
        if self._saves_code and published and path.name in _MARKS:
            _write_values(path, _marked(path))
            _copy_code(path.parent)


__all__ = [
    "AUTO_CLASSES",
    "CodeRegistrationMixin",
    "CodeSavingMixin",
    "add_code",
    "add_library_entry",
    "code_files",
    "register_segmentation_model",
    "save_with_code",
]
