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
"""Checkpoints that carry their code, for people who have transformers but not this library.

`save_pretrained` of a model or processor writes weights and settings only. To publish a checkpoint, save it with the
code:

    from modeling_gkc import GKCSegmentationPipeline
    from modeling_gkc.remote_code import add_code, save_with_code

    save_with_code(model, processor, "folder")
    add_code("folder")  # to what was saved plainly
    GKCSegmentationPipeline(model=model, processor=processor).push_to_hub("user/name")  # the same, uploaded

Whoever has only transformers then loads it by

    AutoModel.from_pretrained("user/name", trust_remote_code=True)
    AutoProcessor.from_pretrained("user/name", trust_remote_code=True)
    pipeline("image-segmentation", model="user/name", trust_remote_code=True)(image, labels="dog; sofa, couch")

and what they save again is again such a folder. The packaged vocabularies ("ade20k_150") are not in it; they need the
installed library.

Where this library has been imported, its own classes are used, and models and processors load with or without
`trust_remote_code`. Only `pipeline()` refuses a folder that names a pipeline of its own, unless it is given
`trust_remote_code=True` or `pipeline_class`: `GKCSegmentationPipeline`, or transformers' `ImageSegmentationPipeline`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .atomic_files import atomic_write

ENTRY_MODULE = "hub_entry"
LIBRARY_ENTRY = "The classes of the installed library, where `trust_remote_code=True` looks for a checkpoint's code."
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

Cuts images into any words that are given at call time (Han, Liu et al., *Global Knowledge Calibration for Fast
Open-Vocabulary Segmentation*, ICCV 2023, [arXiv 2303.09181](https://arxiv.org/abs/2303.09181)).

```python
from transformers import pipeline

segmenter = pipeline("image-segmentation", model="THIS REPOSITORY", trust_remote_code=True)
segments = segmenter("photo.jpg", labels="dog; sofa, couch; lamp")  # classes by ";", names of one class by ","
```

<<words>>
To be completed by its author: training data, results, limits, and the license of the weights.
"""
AUTO_CLASSES = {
    "gkc": {
        "AutoConfig": "GKCConfig",
        "AutoImageProcessor": "GKCImageProcessor",
        "AutoModel": "GKCForOpenVocabSegmentation",
        "AutoModelForImageSegmentation": "GKCForOpenVocabSegmentation",
        "AutoModelForInstanceSegmentation": "GKCForOpenVocabSegmentation",
        "AutoModelForSemanticSegmentation": "GKCForOpenVocabSegmentation",
        "AutoModelForUniversalSegmentation": "GKCForOpenVocabSegmentation",
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
# Only these, and no class derived from them, are what a folder's code consists of.
_PUBLISHED = {name for names in AUTO_CLASSES.values() for name in names.values()}
_KEYS_OF_CODE = ("auto_map", "custom_pipelines")


def save_with_code(model: Any, processor: Any, folder: str | Path, **kwargs) -> None:
    """
    Save a checkpoint together with the code that it needs and, where there is none, a model card.

    Args:
        model: A `GKCForOpenVocabSegmentation`, or an image tower or backbone of CLIP (`CLIPResNetVisionModel`,
            `CLIPResNetBackbone`, `CLIPConvNextVisionModel`, `CLIPConvNextBackbone`).
        processor: Its processor, or None.
        folder: Made if it is not there.
        kwargs: For the model's `save_pretrained`.

    Raises:
        ValueError: no Auto class of transformers loads a model of this kind, or it is of a class that is not this
            library's own; or `push_to_hub` is asked for, which would upload the model without what is added here.
    """
    if kwargs.get("push_to_hub"):
        raise ValueError(
            "`push_to_hub=True` would upload the model only, without code and processor: use "
            "`GKCSegmentationPipeline(model=model, processor=processor).push_to_hub(repo_id)`."
        )
    published = AUTO_CLASSES.get(model.config.model_type, {})
    if type(model).__name__ not in published.values() or not model.has_code():
        raise ValueError(
            f"no Auto class loads a {type(model).__name__}: publish the GKCForOpenVocabSegmentation, or an image "
            "tower or backbone of CLIP."
        )
    model.save_pretrained(folder, **kwargs)
    if processor is not None:
        processor.save_pretrained(folder)
    add_code(folder)
    write_card(folder)


def add_code(folder: str | Path) -> None:
    """
    Add to a saved checkpoint the code that it needs, and to its JSON files where transformers finds it.

    Args:
        folder: Holds `config.json`, `processor_config.json` or `preprocessor_config.json` of this library's objects.

    Raises:
        ValueError: it holds none of them, or one of another library, or the model is none that an Auto class loads.
    """
    _mark_saved(Path(folder))
    _copy_code(Path(folder))


def add_library_entry(folder: str | Path) -> None:
    """
    Let transformers load a saved checkpoint by the classes of the installed library, without `import modeling_gkc`.

    Writes a module that imports them, and names it in the checkpoint's JSON files, so that
    `AutoModel.from_pretrained(folder, trust_remote_code=True)` finds them. It is for checkpoints that are delivered
    with the library: one for the Hub needs `add_code`.

    Args:
        folder: As in `add_code`. It names no pipeline of its own, so that `pipeline()` loads it as it is.

    Raises:
        ValueError: as in `add_code`.
    """
    folder = Path(folder)
    _mark_saved(folder, with_pipeline=False)
    names = sorted(_PUBLISHED)
    imported = "".join(f"    {name},\n" for name in names)
    listed = "".join(f'    "{name}",\n' for name in names)
    text = f'"""{LIBRARY_ENTRY}"""\n\nfrom modeling_gkc import (\n{imported})\n\n__all__ = [\n{listed}]\n'
    atomic_write(folder / f"{ENTRY_MODULE}.py", text)


def write_card(folder: str | Path) -> None:
    """
    Write the model card of a saved `GKCForOpenVocabSegmentation`, how to use it and which words it stores, for its
    author to complete.

    Args:
        folder: Holds its `config.json`. A README.md that is there already stays as it is.
    """
    folder = Path(folder)
    path, config = folder / CARD_NAME, folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if path.exists() or values.get("model_type") != "gkc":
        return
    stored = [names[0] for names in values.get("vocabulary") or []]
    words = f"Without `labels` it answers in its {len(stored)} stored words: {', '.join(stored)}.\n" if stored else ""
    atomic_write(path, CARD.replace("<<words>>", words))


def code_files() -> list[Path]:
    """The modules that a published folder needs: the one that its JSON files name, and all that this one imports."""
    entry = Path(__file__).with_name(f"{ENTRY_MODULE}.py")
    return sorted({entry, *map(Path, get_relative_import_files(entry))})


def _copy_code(folder: Path) -> None:
    for path in code_files():
        atomic_write(folder / path.name, path.read_bytes())


def _mark_saved(folder: Path, with_pipeline: bool = True) -> None:
    paths = [folder / name for name in _MARKS if (folder / name).is_file()]
    if not paths:
        raise ValueError(f"{folder} holds no saved checkpoint: it has none of {', '.join(_MARKS)}.")
    for path in paths:
        _mark(path, with_pipeline)


def _mark(path: Path, with_pipeline: bool = True) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    unpublished = _unpublished(values.get("architectures"))
    try:
        _MARKS[path.name](values)
    except KeyError as error:
        raise ValueError(f"{path} was not saved by an object of this library: it lacks {error}.") from error
    if unpublished:
        raise ValueError(f"{path} is that of a {unpublished[0]}, which this library's code loads by no Auto class.")
    if not with_pipeline:
        values.pop("custom_pipelines", None)
    # Only these keys are sorted: those of `id2label` are numbers, and their order is that of the classes.
    atomic_write(path, json.dumps(dict(sorted(values.items())), indent=2) + "\n")


def _unpublished(architectures: list[str] | None) -> list[str]:
    return [name for name in architectures or () if name not in _PUBLISHED]


def _auto_map(model_type: str, *auto_classes: str) -> dict[str, str]:
    names = AUTO_CLASSES[model_type]
    return {auto_class: f"{ENTRY_MODULE}.{names[auto_class]}" for auto_class in auto_classes or names}


def _mark_config(values: dict[str, Any]) -> None:
    values["auto_map"] = _auto_map(values["model_type"])
    if values["model_type"] == "gkc":
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


class CodeRegistrationMixin:
    """
    Registration of one class of this library turns on the saving of the code for all of them.

    transformers registers the classes that it loads from a folder's code, so that what was loaded by
    `trust_remote_code` is saved with its code. Its own way of saving code copies the modules of one class beside
    another's, which then may not fit together; here it is always the whole.
    """

    _saves_code = False

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type | None = None) -> None:
        """From now on, in this process, `save_pretrained` of every object of this library writes the code too.

        Objects of classes derived from this library's are saved plainly, as before: their code is not in it.

        Args:
            auto_class: Makes no difference: a folder with code always serves all Auto classes that know the model.

        Raises:
            ValueError: the class is not this library's own, or no Auto class loads it.
        """
        if cls.has_code():
            CodeRegistrationMixin._saves_code = True
        # transformers calls this on what it has loaded from a folder; such a class must load, whoever wrote it.
        elif not cls.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
            raise ValueError(
                f"{cls.__module__}.{cls.__name__} is not among the classes whose code can be saved: "
                f"{', '.join(sorted(_PUBLISHED))}. Save it plainly, and publish it as transformers documents for "
                "custom code: with a `model_type` of its own, and your module beside config.json, where `auto_map` "
                "names it."
            )

    @classmethod
    def has_code(cls) -> bool:
        """Whether a folder with this library's code can hold objects of this very class."""
        return cls.__name__ in _PUBLISHED and cls.__module__.rpartition(".")[0] == __name__.rpartition(".")[0]


class CodeSavingMixin(CodeRegistrationMixin):
    """For configurations and processors: their files tell of code only where the code is saved too."""

    def to_dict(self) -> dict[str, Any]:
        """All settings, without what the folder that they were loaded from says about its code."""
        return {name: value for name, value in super().to_dict().items() if name not in _KEYS_OF_CODE}

    def to_json_file(self, json_file_path: str | Path, *args, **kwargs) -> None:
        """
        Write the settings to a file, and the code beside it where `register_for_auto_class` asks for it.

        The code goes only where transformers would look for it: to files of the names that `save_pretrained` gives,
        and not to the configuration of a model that no Auto class loads.
        """
        super().to_json_file(json_file_path, *args, **kwargs)
        path = Path(json_file_path)
        published = self.has_code() and not _unpublished(getattr(self, "architectures", None))
        if self._saves_code and published and path.name in _MARKS:
            _mark(path)
            _copy_code(path.parent)


__all__ = [
    "AUTO_CLASSES",
    "CodeRegistrationMixin",
    "CodeSavingMixin",
    "add_code",
    "add_library_entry",
    "code_files",
    "save_with_code",
]
