"""A published folder loads where only transformers is, and computes there the same to the last bit."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, pipeline
from transformers.dynamic_module_utils import get_imports
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline

from modeling_gkc import (
    CLIPResNetVisionModel,
    GKCConfig,
    GKCForOpenVocabSegmentation,
    GKCForZeroShotSegmentation,
    GKCImageProcessor,
    GKCModel,
    GKCProcessor,
    GKCSegmentationPipeline,
)
from modeling_gkc.remote_code import CodeRegistrationMixin, add_code, code_files, save_with_code

from .conftest import small_config, word_tokenizer
from .test_zero_shot import opened

READER = Path(__file__).with_name("remote_code_reader.py")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATA_FILES = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
INFERENCE = {"torch", "transformers", "huggingface_hub", "numpy", "PIL", "safetensors", "tqdm"}


@pytest.fixture(scope="module")
def processor() -> GKCProcessor:
    return GKCProcessor(GKCImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}), word_tokenizer())


@pytest.fixture(scope="module")
def model(processor) -> GKCForOpenVocabSegmentation:
    torch.manual_seed(0)
    model = GKCForOpenVocabSegmentation(small_config()).eval()
    model.set_vocabulary("red disc; blue square, box; lawn, grass", processor)
    return model


@pytest.fixture(scope="module")
def work(tmp_path_factory, model, processor) -> Path:
    """Write the files that `remote_code_reader` reads, except for the Hub's cache."""
    work = tmp_path_factory.mktemp("work")
    save_with_code(model, processor, work / "folder")
    tower = CLIPResNetVisionModel(small_config().backbone_config).eval()
    save_with_code(tower, None, work / "tower")
    save_with_code(*opened("gkc"), work / "zero_shot")
    values = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(values).save(work / "image.png")
    return work


@pytest.fixture(scope="module")
def pushed(work, model, processor) -> set[str]:
    """Write the files that `push_to_hub` uploads into the Hub's cache."""
    repository = work / "hub" / "models--someone--gkc"
    uploaded = set()

    def create_commit(api, repo_id, operations, **kwargs):
        assert repo_id == "someone/gkc"
        for operation in operations:
            uploaded.add(operation.path_in_repo)
            path = repository / "snapshots" / COMMIT / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(Path(operation.path_or_fileobj).read_bytes())
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "create_repo", lambda api, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
        patch.setattr(HfApi, "create_commit", create_commit)
        GKCSegmentationPipeline(model=model, processor=processor).push_to_hub("someone/gkc")
    return uploaded


@pytest.fixture(scope="module")
def read(work, pushed) -> Path:
    """Return the folder with the results of an interpreter without this library."""
    environment = os.environ | {
        "HF_HUB_CACHE": str(work / "hub"),
        "HF_MODULES_CACHE": str(work / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    finished = subprocess.run(
        [sys.executable, READER, work], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return work


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def code(folder: Path) -> set[str]:
    return {name for name in files(folder) if name.endswith(".py")}


def marks(path: Path) -> dict:
    """All that a JSON file says about code."""
    values = json.loads(path.read_text())
    found = {key: values[key] for key in ("auto_map", "custom_pipelines") if key in values}
    return found | {"image_processor": values.get("image_processor", {}).get("auto_map")}


def assert_same_tensors(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


# What the folder holds


def test_folder_holds_only_what_is_needed(work):
    assert files(work / "folder") == DATA_FILES | {path.name for path in code_files()} | {"README.md"}
    not_needed = {"cli.py", "__init__.py", "__main__.py", "conversion.py", "visualization.py"}
    assert not code(work / "folder") & not_needed
    reached, to_read = set(), ["hub_entry"]
    while to_read:
        name = to_read.pop()
        reached.add(f"{name}.py")
        tree = ast.parse((work / "folder" / f"{name}.py").read_text())
        relative = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        to_read += [module for module in relative if f"{module}.py" not in reached]
    assert code(work / "folder") == reached


def test_code_in_the_folder_imports_only_its_neighbors_and_what_inference_has(work):
    for path in (work / "folder").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and (path.parent / f"{node.module}.py").is_file()
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not any(name.startswith("modeling_gkc") for name in names)
        assert set(get_imports(path)) <= INFERENCE | set(sys.stdlib_module_names)


def test_push_uploads_the_folder(work, pushed):
    assert pushed == files(work / "folder")


def test_a_published_folder_has_a_model_card(work, pushed, model, processor, tmp_path):
    card = ModelCard.load(work / "folder" / "README.md")
    assert card.data.pipeline_tag == "image-segmentation" and card.data.library_name == "transformers"
    assert "trust_remote_code=True" in card.text and "its 3 stored classes: red disc, blue square, lawn." in card.text
    assert next((work / "hub").rglob("README.md")).read_text() == (work / "folder" / "README.md").read_text()
    (tmp_path / "README.md").write_text("a card of the author's own")
    save_with_code(model, processor, tmp_path)
    assert (tmp_path / "README.md").read_text() == "a card of the author's own"


def test_folder_without_code_has_no_code_entries(tmp_path, work, model, processor):
    """Also when the checkpoint was loaded from a folder with code."""
    loaded = AutoModel.from_pretrained(work / "folder", trust_remote_code=True)
    for folder, saved in ((tmp_path / "own", (model, processor)), (tmp_path / "loaded", (loaded, processor))):
        for part in saved:
            part.save_pretrained(folder)
        assert files(folder) == DATA_FILES
        assert not any("auto_map" in path.read_text() for path in folder.glob("*.json"))
        assert not any("custom_pipelines" in path.read_text() for path in folder.glob("*.json"))


# Where only transformers is


def test_logits_and_results_are_those_of_the_library(read, model, processor):
    image = Image.open(read / "image.png")
    with torch.no_grad():
        outputs = model(**processor(images=image, text="dog; sofa, couch; lamp", return_tensors="pt"))
    size, settings = {"target_sizes": [(80, 120)]}, {"threshold": 0.0, "overlap_mask_area_threshold": 0.0}
    instances = processor.post_process_instance_segmentation(outputs, **size, **settings)
    panoptic = processor.post_process_panoptic_segmentation(outputs, **size, **settings)
    expected = {
        "class_queries_logits": outputs.class_queries_logits,
        "masks_queries_logits": outputs.masks_queries_logits,
        "semantic": processor.post_process_semantic_segmentation(outputs, **size)[0],
        "instance": instances[0]["segmentation"],
        "panoptic": panoptic[0]["segmentation"],
    }
    for name in ("model_first", "processor_first", "from_hub_model", "saved_again"):
        assert_same_tensors(read / f"{name}.safetensors", expected)
    maps = {name: expected[name] for name in ("semantic", "instance", "panoptic")}
    assert_same_tensors(read / "predictor_first.safetensors", maps)
    assert_same_tensors(
        read / "image_processor_first.safetensors", dict(processor.image_processor(image, return_tensors="pt"))
    )


def test_pipeline_gives_what_that_of_the_library_gives(read, model, processor):
    segmenter = GKCSegmentationPipeline(model=model, processor=processor)
    results = segmenter(str(read / "image.png"), labels="dog; sofa, couch; lamp", subtask="semantic")
    expected = {result["label"]: torch.from_numpy(np.array(result["mask"])) for result in results}
    expected |= {f"{result['label']} score": torch.tensor(result["score"]) for result in results}
    for name in ("pipeline_first", "from_hub", "second_folder"):
        assert_same_tensors(read / f"{name}.safetensors", expected)


def test_image_tower(read):
    tower = CLIPResNetVisionModel.from_pretrained(read / "tower")
    with torch.no_grad():
        embeds = tower(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)).image_embeds
    assert_same_tensors(read / "image_tower.safetensors", {"image_embeds": embeds})


def test_zero_shot_model(read):
    model = GKCForZeroShotSegmentation.from_pretrained(read / "zero_shot")
    processor = GKCProcessor.from_pretrained(read / "zero_shot")
    inputs = processor(images=Image.open(read / "image.png"), text="dog; sofa, couch; lamp", return_tensors="pt")
    logits = model(**inputs).class_queries_logits
    found = load_file(read / "zero_shot.safetensors")["class_queries_logits"]
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("again", ["saved_again", "processor_again", "image_processor_again", "pipeline_again"])
def test_folder_saved_again_is_complete(read, again):
    """The code, and what the JSON files say about it, are those of the folder that was loaded."""
    assert code(read / again) == code(read / "folder")
    for name in code(read / "folder"):
        assert (read / again / name).read_bytes() == (read / "folder" / name).read_bytes()
    for path in (read / again).glob("*config.json"):
        if path.name == "preprocessor_config.json":
            assert marks(path)["auto_map"] == marks(read / "folder" / "processor_config.json")["image_processor"]
        else:
            assert marks(path) == marks(read / "folder" / path.name)
    if again != "image_processor_again":
        assert files(read / again) >= DATA_FILES - {"config.json", "model.safetensors"}


def test_a_model_alone_is_saved_there_with_its_code(read):
    assert files(read / "model_again") == {"config.json", "model.safetensors"} | code(read / "folder")


# Where the library is


@pytest.mark.parametrize("trust", [True, False, None])
def test_library_uses_its_own_classes(work, trust):
    assert type(AutoModel.from_pretrained(work / "folder", trust_remote_code=trust)) is GKCForOpenVocabSegmentation
    assert type(AutoProcessor.from_pretrained(work / "folder", trust_remote_code=trust)) is GKCProcessor


def test_pipelines_where_the_library_is(work):
    folder = str(work / "folder")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("image-segmentation", model=folder)
    trusted = pipeline("image-segmentation", model=folder, trust_remote_code=True)
    assert type(trusted) is GKCSegmentationPipeline and type(trusted.model) is GKCForOpenVocabSegmentation
    for pipeline_class in (GKCSegmentationPipeline, ImageSegmentationPipeline):
        segmenter = pipeline("image-segmentation", model=folder, pipeline_class=pipeline_class)
        assert type(segmenter) is pipeline_class


def test_registration_as_transformers_documents_it(tmp_path, work, model, processor, monkeypatch):
    monkeypatch.setattr(CodeRegistrationMixin, "_saves_code", False)
    GKCForOpenVocabSegmentation.register_for_auto_class("AutoModel")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert files(tmp_path) == files(work / "folder") - {"README.md"}  # plain saving writes no card
    assert marks(tmp_path / "config.json") == marks(work / "folder" / "config.json")
    assert marks(tmp_path / "processor_config.json") == marks(work / "folder" / "processor_config.json")


def test_code_can_be_added_later(tmp_path, work, model, processor):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    add_code(tmp_path)
    assert files(tmp_path) == files(work / "folder") - {"README.md"}  # plain saving writes no card
    add_code(tmp_path)
    assert marks(tmp_path / "config.json") == marks(work / "folder" / "config.json")


def test_unpublishable_classes_raise(tmp_path, processor):
    with pytest.raises(ValueError, match="No Auto class loads a GKCModel"):
        save_with_code(GKCModel(small_config()), processor, tmp_path)
    with pytest.raises(ValueError, match="is not a saved checkpoint"):
        add_code(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mask2former"}')
    with pytest.raises(ValueError, match="was not saved by an object of this library"):
        add_code(tmp_path)
    assert not code(tmp_path)


class Derived(GKCForOpenVocabSegmentation):
    """What a user makes of the model."""


SameName = type("GKCForOpenVocabSegmentation", (GKCForOpenVocabSegmentation,), {"__module__": __name__})


@pytest.mark.parametrize("model_class", [Derived, SameName, GKCModel])
def test_code_outside_of_the_library_is_not_published(tmp_path, processor, model_class, monkeypatch):
    monkeypatch.setattr(CodeRegistrationMixin, "_saves_code", False)
    with pytest.raises(ValueError, match="is not among the classes whose code can be saved"):
        model_class.register_for_auto_class("AutoModel")
    assert not CodeRegistrationMixin._saves_code
    with pytest.raises(ValueError, match="No Auto class loads a"):
        save_with_code(model_class(small_config()), processor, tmp_path)
    assert not files(tmp_path)


@pytest.mark.parametrize("model_class", [Derived, GKCModel])
def test_it_is_saved_plainly_where_the_library_saves_code(tmp_path, processor, model_class, monkeypatch):
    monkeypatch.setattr(CodeRegistrationMixin, "_saves_code", True)
    model_class(small_config()).save_pretrained(tmp_path)
    assert files(tmp_path) == {"config.json", "model.safetensors"}
    assert marks(tmp_path / "config.json") == {"image_processor": None}
    with pytest.raises(ValueError, match=rf"config\.json belongs to a {model_class.__name__}"):
        add_code(tmp_path)


def test_own_model_type_is_saved_plainly_where_the_library_saves_code(tmp_path, monkeypatch):
    own = type("OwnConfig", (GKCConfig,), {"model_type": "own", "__module__": __name__})
    monkeypatch.setattr(CodeRegistrationMixin, "_saves_code", True)
    own(**small_config().to_dict() | {"model_type": "own"}).save_pretrained(tmp_path)
    assert files(tmp_path) == {"config.json"} and marks(tmp_path / "config.json") == {"image_processor": None}


def test_a_derived_class_that_came_with_its_own_code_can_be_loaded(monkeypatch):
    """Registering the class with transformers must not fail."""
    monkeypatch.setattr(CodeRegistrationMixin, "_saves_code", False)
    loaded = type("Derived", (GKCForOpenVocabSegmentation,), {"__module__": "transformers_modules.other.modeling"})
    loaded.register_for_auto_class("AutoModel")
    assert not CodeRegistrationMixin._saves_code


def test_settings_in_other_files_are_written_without_code(tmp_path, model, processor, monkeypatch):
    monkeypatch.setattr(CodeRegistrationMixin, "_saves_code", True)
    for part in (model.config, processor, processor.image_processor):
        part.to_json_file(tmp_path / "my.json")
        assert files(tmp_path) == {"my.json"} and marks(tmp_path / "my.json") == {"image_processor": None}


def test_only_the_file_that_is_written_is_marked(tmp_path, processor, monkeypatch):
    """A folder may hold other libraries' files too."""
    foreign = json.dumps({"model_type": "mask2former"})
    (tmp_path / "config.json").write_text(foreign)
    monkeypatch.setattr(CodeRegistrationMixin, "_saves_code", True)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == foreign
    assert "auto_map" in marks(tmp_path / "processor_config.json")


def test_an_upload_without_code_is_refused(tmp_path, model, processor):
    segmenter = GKCSegmentationPipeline(model=model, processor=processor)
    for save in (segmenter.save_pretrained, lambda folder, **kw: save_with_code(model, processor, folder, **kw)):
        with pytest.raises(ValueError, match=r"\.push_to_hub\(repo_id\)"):
            save(tmp_path, push_to_hub=True, repo_id="someone/gkc")
    assert not files(tmp_path)
