"""Script that loads published folders with transformers only, run by `test_remote_code.py`.

Each scenario runs in a process forked right after the import of transformers, so that it is the first to import this
library's code; starting an interpreter for each would take a minute.

    python remote_code_reader.py WORK

WORK contains `folder`, `tower` and, in the Hub's cache, `someone/gkc`.
"""

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# This library, the packages that only training needs, and those that depend on them.
ABSENT = ("modeling_gkc", "train", "tests", "scipy", "sklearn", "accelerate", "datasets", "torchvision")
ABSENT_DISTRIBUTIONS = ("gkc", "scipy", "scikit-learn", "accelerate", "datasets", "torchvision")


class FinderWithoutAbsent:
    """Import finder that hides modules and, from `importlib.metadata`, distributions that are to be absent."""

    def __init__(self, finder: Any):
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, fullname: str, *args):
        return None if fullname.partition(".")[0] in ABSENT else self.finder.find_spec(fullname, *args)

    def find_distributions(self, *args):
        found = getattr(self.finder, "find_distributions", lambda *args: ())(*args)
        return (distribution for distribution in found if distribution.name not in ABSENT_DISTRIBUTIONS)


# This must precede the first import of transformers, which caches the packages it has found.
sys.meta_path[:] = map(FinderWithoutAbsent, sys.meta_path)
assert not any(importlib.util.find_spec(name) for name in ABSENT)

import numpy as np  # noqa: E402 -- all imports below must come after the above
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForUniversalSegmentation,
    AutoProcessor,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: E402
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # noqa: E402

WORK = Path(sys.argv[1])
FOLDER = WORK / "folder"
HUB = "someone/gkc"
TRUST = {"trust_remote_code": True}
SETTINGS = {"threshold": 0.0, "overlap_mask_area_threshold": 0.0}


def image() -> Image.Image:
    return Image.open(WORK / "image.png")


def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, WORK / f"{name}.safetensors")


def computed(model, processor) -> dict[str, torch.Tensor]:
    """Return the logits and the results of all tasks."""
    with torch.no_grad():
        outputs = model(**processor(images=image(), text="dog; sofa, couch; lamp", return_tensors="pt"))
    size = {"target_sizes": [(80, 120)]}
    return {
        "class_queries_logits": outputs.class_queries_logits,
        "masks_queries_logits": outputs.masks_queries_logits,
        "semantic": processor.post_process_semantic_segmentation(outputs, **size)[0],
        "instance": processor.post_process_instance_segmentation(outputs, **size, **SETTINGS)[0]["segmentation"],
        "panoptic": processor.post_process_panoptic_segmentation(outputs, **size, **SETTINGS)[0]["segmentation"],
    }


def segmented(segmenter) -> dict[str, torch.Tensor]:
    """Return the masks and scores of a pipeline by label."""
    results = segmenter(image(), labels="dog; sofa, couch; lamp", subtask="semantic")
    masks = {result["label"]: torch.from_numpy(np.array(result["mask"])) for result in results}
    return masks | {f"{result['label']} score": torch.tensor(result["score"]) for result in results}


def model_first() -> None:
    model = AutoModel.from_pretrained(FOLDER, **TRUST)
    for auto in (AutoModelForImageSegmentation, AutoModelForUniversalSegmentation):
        assert type(auto.from_pretrained(FOLDER, **TRUST)) is type(model)
    assert type(AutoConfig.from_pretrained(FOLDER, **TRUST)) is type(model.config)
    processor = AutoProcessor.from_pretrained(FOLDER, **TRUST)
    save("model_first", computed(model, processor))
    model.set_vocabulary("star; sky, air", processor)
    model.save_pretrained(WORK / "saved_again")
    processor.save_pretrained(WORK / "saved_again")


def processor_first() -> None:
    processor = AutoProcessor.from_pretrained(FOLDER, **TRUST)
    assert type(AutoImageProcessor.from_pretrained(FOLDER, **TRUST)) is type(processor.image_processor)
    save("processor_first", computed(AutoModel.from_pretrained(FOLDER, **TRUST), processor))
    processor.save_pretrained(WORK / "processor_again")


def image_processor_first() -> None:
    image_processor = AutoImageProcessor.from_pretrained(FOLDER, **TRUST)
    save("image_processor_first", dict(image_processor(image(), return_tensors="pt")))
    image_processor.save_pretrained(WORK / "image_processor_again")


def pipeline_first() -> None:
    segmenter = pipeline("image-segmentation", model=str(FOLDER), **TRUST)
    save("pipeline_first", segmented(segmenter))
    segmenter.save_pretrained(WORK / "pipeline_again")
    segmenter.model.save_pretrained(WORK / "model_again")


def predictor_first() -> None:
    predictor = get_class_from_dynamic_module("hub_entry.GKCPredictor", str(FOLDER)).from_pretrained(FOLDER)
    predictor.set_vocabulary("dog; sofa, couch; lamp")
    results = {
        "semantic": predictor.predict(image()),
        "instance": predictor.predict(image(), "instance", **SETTINGS),
        "panoptic": predictor.predict(image(), "panoptic", **SETTINGS),
    }
    save("predictor_first", {task: result.segmentation for task, result in results.items()})


def from_hub() -> None:
    """Load by the name of a repository, then a second folder in the same process."""
    save("from_hub", segmented(pipeline("image-segmentation", model=HUB, **TRUST)))
    save("second_folder", segmented(pipeline("image-segmentation", model=str(FOLDER), **TRUST)))
    model = AutoModel.from_pretrained(HUB, **TRUST)
    save("from_hub_model", computed(model, AutoProcessor.from_pretrained(HUB, **TRUST)))


def saved_again() -> None:
    segmenter = pipeline("image-segmentation", model=str(WORK / "saved_again"), **TRUST)
    assert segmenter(image(), subtask="semantic")[0]["label"] in ("star", "sky")
    save("saved_again", computed(segmenter.model, segmenter.processor))


def image_tower() -> None:
    tower = AutoModel.from_pretrained(WORK / "tower", **TRUST)
    backbone = AutoBackbone.from_config(tower.config, **TRUST)
    pixel_values = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    with torch.no_grad():
        assert len(backbone(pixel_values).feature_maps) == 4
        save("image_tower", {"image_embeds": tower(pixel_values).image_embeds})


def zero_shot() -> None:
    model = AutoModel.from_pretrained(WORK / "zero_shot", **TRUST)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    save("zero_shot", computed(model, AutoProcessor.from_pretrained(WORK / "zero_shot", **TRUST)))
    segmented(pipeline("image-segmentation", model=str(WORK / "zero_shot"), **TRUST))


def run(scenario: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        scenario()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ABSENT:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        sys.exit(f"{name} can be imported, so the scenarios would not run as they do without it")
    scenarios = (
        model_first,
        processor_first,
        image_processor_first,
        pipeline_first,
        predictor_first,
        from_hub,
        saved_again,
        image_tower,
        zero_shot,
    )
    failed = [scenario.__name__ for scenario in scenarios if run(scenario)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
