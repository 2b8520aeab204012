"""Tests of exported graphs and of the runner that uses them without torch."""

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import ConvNextConfig

from modeling_gkc import GKCForOpenVocabSegmentation, GKCImageProcessor, GKCProcessor, Vocabulary
from modeling_gkc.class_embeddings import GKCClassEmbeddings
from modeling_gkc.cli.main import main
from modeling_gkc.encoded_vocabulary import EncodedVocabulary
from modeling_gkc.export import exporter
from modeling_gkc.export import graph as export_graph
from modeling_gkc.export.exporter import export_segmenter, write_class_embeds
from modeling_gkc.export.graph import ExportableSegmenter, one_embed_per_class
from modeling_gkc.image_processing_gkc import read_image
from modeling_gkc.post_processing import semantic_segmentation

from .common_models import STAGES, convex_config, swin_config, tiny_config
from .conftest import small_config, word_tokenizer
from .image_kinds import KINDS, encode_image

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "hub_card" / "gkc-mini"
IMAGE = ROOT / "examples" / "scene-1.png"
SIZE = (96, 128)
WORDS = "red disc; lawn, grass; sky; square, box"
BATCHES, CLASSES = (1, 3), (1, 20, 150)
OUTPUTS = ("class_queries_logits", "masks_queries_logits", "query_embeds")
LAYERS = {"encoder_layers": 1, "decoder_layers": 1}


def convnext_config():
    backbone = ConvNextConfig(hidden_sizes=[16, 16, 32, 32], depths=[1] * 4, out_features=STAGES)
    return tiny_config(backbone_config=backbone, class_feature="pooled", **LAYERS)


def processor() -> GKCProcessor:
    return GKCProcessor(GKCImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}), word_tokenizer())


def toy(config) -> GKCForOpenVocabSegmentation:
    model = GKCForOpenVocabSegmentation(config).eval()
    if config.classifier == "convex_combination":
        names = EncodedVocabulary.encode([["dog"], ["sofa", "couch"], ["lamp"]], model, processor())
        head = nn.Linear(config.hidden_size, 4)
        model.classifier.set_source(head, names.class_embeds, names.class_ids)
    return model


def onnx_runner(folder: Path):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def run(**inputs):
        values = session.run(list(OUTPUTS), {name: value.numpy() for name, value in inputs.items()})
        return dict(zip(OUTPUTS, map(torch.from_numpy, values), strict=True))

    return run


def program_runner(folder: Path):
    return torch.export.load(folder / "model.pt2").module()


@torch.no_grad()
def check(within, name: str, run, model, size, numbers, words=None) -> None:
    """Compare all outputs for several batch sizes and, unless `words` are fixed in the graph, numbers of classes."""
    for batch, num_classes in numbers:
        pixel_values = torch.randn(batch, 3, *size)
        inputs = {"pixel_values": pixel_values}
        if words is None:
            inputs["class_embeds"] = F.normalize(torch.randn(num_classes, model.config.projection_dim), dim=-1)
        given = {"class_embeds": inputs["class_embeds"]} if words is None else words.model_inputs()
        expected = model(pixel_values, **given)
        found = run(**inputs)
        for key in OUTPUTS:
            assert found[key].shape == expected[key].shape and found[key].dtype == torch.float32
            within(f"{name}: {key}", (found[key] - expected[key]).abs().max(), 1e-3)


# The shipped checkpoint, through the command


@pytest.fixture(scope="module")
def shipped() -> tuple[GKCForOpenVocabSegmentation, GKCProcessor]:
    return GKCForOpenVocabSegmentation.from_pretrained(SHIPPED).eval(), GKCProcessor.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "words"
    size = "x".join(map(str, SIZE))
    arguments = ["export", SHIPPED, "--vocab", WORDS, "--size", size, "--out", folder]
    assert main([str(argument) for argument in arguments]) == 0
    return folder


def test_onnx_matches_model_for_any_batch_size_and_number_of_classes(folder, shipped, within):
    numbers = [(batch, classes) for batch in BATCHES for classes in CLASSES]
    check(within, "ONNX, gkc-mini", onnx_runner(folder), shipped[0], SIZE, numbers)


def test_logits_of_classes_with_synonyms_match_model(folder, shipped, within):
    model, processor = shipped
    words = EncodedVocabulary.encode(WORDS, model, processor)
    assert model.config.prompt_reduction == "mean" and len(words.class_ids) > 4
    stored = np.load(folder / "class_embeds.npz")
    assert stored["names"].tolist() == ["red disc", "lawn", "sky", "square"]
    pixel_values = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        expected = model(pixel_values, **words.model_inputs()).class_queries_logits
    found = onnx_runner(folder)(pixel_values=pixel_values, class_embeds=torch.from_numpy(stored["class_embeds"]))
    within("ONNX, synonyms: class_queries_logits", (found["class_queries_logits"] - expected).abs().max(), 1e-3)


def test_folder_describes_inputs_outputs_and_preprocessing(folder, shipped):
    _, processor = shipped
    runner = {"run.py", "image_reading.py", "atomic_files.py"}
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "export.json", "class_embeds.npz", *runner}
    assert [path.name for path in folder.parent.iterdir()] == ["words"]
    settings = json.loads((folder / "export.json").read_text())
    images = processor.image_processor
    assert settings["size"] == list(SIZE) and settings["opset"] == 18 and settings["words"] == "input"
    assert settings["image_mean"] == list(images.image_mean) and settings["image_std"] == list(images.image_std)
    assert settings["rescale_factor"] == 1 / 255 and settings["resample"] == "bilinear"
    assert settings["versions"] == {
        "torch": torch.__version__,
        "transformers": sys.modules["transformers"].__version__,
    }
    assert 0 <= settings["largest_mask_difference"] <= 1e-3
    lawn = settings["classes"][1]
    assert lawn["name"] == "lawn" and lawn["synonyms"] == ["grass"] and lawn["is_thing"] is False
    assert lawn["color"] == list(Vocabulary.parse(WORDS).palette[1])
    session = onnxruntime.InferenceSession(folder / settings["graph"])
    assert {value.name: value.shape for value in session.get_inputs()} == settings["inputs"]
    shapes = {value.name: value.shape for value in session.get_outputs()}
    assert list(shapes) == list(settings["outputs"]) and shapes == settings["outputs"]


def run_without_torch(folder: Path, *commands: list) -> list[tuple[int, str, str]]:
    """Return exit code, stdout and stderr of run.py for each command, with torch and this library not importable."""
    code = (
        "import contextlib, io, json, runpy, sys\n"
        "for name in ('torch', 'transformers', 'modeling_gkc', 'safetensors'): sys.modules[name] = None\n"
        "results = []\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv, out, err = [arguments[0], *arguments[1:]], io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        sys.path[0], code = str(arguments[0]).rpartition('/')[0], 0\n"
        "        try: runpy.run_path(arguments[0], run_name='__main__')\n"
        "        except SystemExit as end: code = end.code\n"
        "    results.append([code, out.getvalue(), err.getvalue()])\n"
        "print(json.dumps(results))\n"
    )
    arguments = json.dumps([[str(folder / "run.py"), *map(str, command)] for command in commands])
    finished = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def runner(folder):
    """Import the folder's run.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        spec = importlib.util.spec_from_file_location("exported_run", folder / "run.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
        sys.modules.pop("image_reading", None)


def label_map_of(model, processor, image, size, words) -> np.ndarray:
    height, width = size
    inputs = processor(images=image, size={"height": height, "width": width}, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, **words.model_inputs())
    target = read_image(image).size[::-1]
    return processor.post_process_semantic_segmentation(outputs, target_sizes=[target])[0].numpy()


def encode_all_image_kinds() -> dict[str, bytes]:
    """Return image files of all kinds, and an image with each EXIF orientation."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 4), dtype=np.uint8)
    noise = np.asarray(Image.fromarray(noise[::8, ::8]).resize((56, 40)))
    files = {
        f"{kind} as {file_format}": data
        for kind, make in KINDS.items()
        for file_format, data in make(noise).files.items()
    }
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"orientation {orientation}"] = encode_image(Image.fromarray(noise[..., :3]), "jpeg", exif=exif)
    return files


def test_runner_preprocesses_all_image_kinds_like_the_library(folder, shipped, runner, within):
    """Graph and model get equal inputs from each file, and the label maps match."""
    model, processor = shipped
    settings = json.loads((folder / "export.json").read_text())
    words = EncodedVocabulary.encode(WORDS, model, processor)
    _, _, inputs = runner.load_classes(folder, settings)
    files, differing, pixels = encode_all_image_kinds(), 0, 0
    assert len(files) > 40
    session = onnx_runner(folder)
    seen = {name: runner.pixel_values(runner.open_rgb(io.BytesIO(data)), settings) for name, data in files.items()}
    height, width = SIZE
    for name, data in files.items():
        expected = processor(images=data, size={"height": height, "width": width}, return_tensors="pt").pixel_values
        np.testing.assert_array_equal(seen[name], expected.numpy(), err_msg=name)
    class_embeds = torch.from_numpy(inputs["class_embeds"])
    found = session(pixel_values=torch.from_numpy(np.concatenate(list(seen.values()))), class_embeds=class_embeds)
    for index, (name, data) in enumerate(files.items()):
        if index % 3 and "16-bit" not in name and "orientation" not in name:
            continue
        expected = label_map_of(model, processor, data, SIZE, words)
        logits = (found[key][index].numpy() for key in OUTPUTS[:2])
        labels = runner.label_map(*logits, expected.shape)
        differing, pixels = differing + (labels != expected).sum(), pixels + expected.size
    within("run.py, all kinds of images: fraction of differing pixels", differing / pixels, 1e-3)


def test_runner_segments_without_torch(folder, shipped, tmp_path, within):
    """The label map matches the model's for the exported classes, and the classes can be replaced afterwards."""
    model, processor = shipped
    other, copied = Vocabulary.parse("water; star; ring; wood; brick"), tmp_path / "words"
    shutil.copytree(folder, copied)
    write_class_embeds(copied / "class_embeds.npz", model, EncodedVocabulary.encode(other, model, processor))
    plain, changed = run_without_torch(
        folder,
        [folder, IMAGE, tmp_path / "labels.png"],
        [copied, IMAGE, tmp_path / "others.png"],
    )
    assert (plain[0], changed[0]) == (0, 0), plain[2] + changed[2]
    vocabulary = Vocabulary.parse(WORDS)
    image = Image.open(tmp_path / "labels.png")
    found = np.array(image)
    expected = label_map_of(model, processor, IMAGE, SIZE, EncodedVocabulary.encode(WORDS, model, processor))
    assert found.shape == expected.shape and len(np.unique(expected)) > 1
    within("run.py without torch: fraction of differing pixels", (found != expected).mean(), 1e-3)
    printed = {line.partition(":")[0] for line in plain[1].splitlines()}
    assert printed == {vocabulary.labels[index] for index in np.unique(found)}
    np.testing.assert_array_equal(np.array(image.convert("RGB")), np.array(vocabulary.palette)[found])
    assert {line.partition(":")[0] for line in changed[1].splitlines()} <= set(other.labels)
    shown = np.array(Image.open(tmp_path / "others.png").convert("RGB")).reshape(-1, 3)
    assert set(map(tuple, shown.tolist())) <= set(other.palette)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: run.py"),
        (["FOLDER", "IMAGE", "labels.jpg"], r"labels\.jpg: name a \.png file"),
        (["FOLDER", "gone.png", "labels.png"], r"gone\.png cannot be read as an image: .*No such file"),
        (["FOLDER", "FOLDER/export.json", "labels.png"], r"export\.json cannot be read as an image"),
    ],
)
def test_runner_reports_usage_errors_in_one_line(folder, runner, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    names = {"FOLDER": str(folder), "IMAGE": str(IMAGE), "labels.png": str(tmp_path / "labels.png")}
    arguments = [names.get(name, name.replace("FOLDER", str(folder))) for name in arguments]
    with pytest.raises(SystemExit) as end:
        runner.main(arguments)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.startswith("usage: run.py") and re.search(message, printed)
    assert not list(tmp_path.iterdir())


def test_runner_label_maps_match_library_at_any_size(runner, monkeypatch):
    """Covers sizes below that of the masks, more than 256 classes and blocks of few rows."""
    monkeypatch.setattr(runner, "_MAX_BLOCK_NUMBERS", 5000)
    class_logits, mask_logits = 3 * torch.randn(7, 301), 5 * torch.randn(7, 12, 16)
    for size in [(48, 64), (5, 7), (100, 33), (12, 16), (1, 1)]:
        expected, _ = semantic_segmentation(class_logits, mask_logits, target_size=size)
        found = runner.label_map(class_logits.numpy(), mask_logits.numpy(), size)
        assert found.dtype == np.uint16
        assert (found != expected.numpy()).mean() <= 1e-3


# Other configurations


def test_swin_with_fixed_vocabulary_and_max_reduction(tmp_path, within):
    config = swin_config()
    config.decoder_layers, config.prompt_reduction = 1, "max"
    model = toy(config)
    vocabulary = "lamp; red disc, box, star; sofa, couch"
    words = EncodedVocabulary.encode(vocabulary, model, processor())
    exported = export_segmenter(model, processor(), tmp_path / "fixed", size=64, vocabulary=vocabulary, fixed=True)
    assert exported.settings["words"] == "fixed" and not (tmp_path / "fixed" / "class_embeds.npz").exists()
    run = onnx_runner(tmp_path / "fixed")
    check(within, "ONNX, Swin, fixed vocabulary", run, model, (64, 64), [(1, 3), (3, 3)], words)


def test_onnx_matches_model_with_convex_combination(tmp_path, within):
    config = convex_config()
    config.decoder_layers = 1
    model = toy(config)
    export_segmenter(model, processor(), tmp_path / "convex", size=64)
    numbers = [(1, 1), (3, 20)]
    check(within, "ONNX, convex combination", onnx_runner(tmp_path / "convex"), model, (64, 64), numbers)


def test_torch_export_matches_model_with_convnext_and_pooled_features(tmp_path, within):
    model = toy(convnext_config())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    exported = export_segmenter(model, processor(), tmp_path / "program", format="torch-export", size=(64, 96))
    assert {path.name for path in exported.folder.iterdir()} == {"model.pt2", "export.json"}
    assert exported.settings["classes"] == [] and exported.difference <= 1e-3
    numbers = [(batch, classes) for batch in BATCHES for classes in CLASSES]
    check(within, "torch.export, ConvNeXt", program_runner(exported.folder), model, (64, 96), numbers)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.config.deformable_attention is None and model.config._attn_implementation == "sdpa"


# Without tracing: the traceable module, and errors


@pytest.mark.parametrize("reduction", ["mean", "max", "embedding_mean"])
@pytest.mark.parametrize("make", [tiny_config, convex_config])
@pytest.mark.parametrize("is_fixed", [True, False])
@torch.no_grad()
def test_traceable_module_matches_model(make, reduction, is_fixed, within):
    config = make()
    config.prompt_reduction = reduction
    model = toy(config)
    words = EncodedVocabulary.encode("dog; sofa, couch, red box; lamp, star", model, processor())
    pixel_values = torch.randn(2, 3, 64, 96)
    expected = model(pixel_values, **words.model_inputs())
    if is_fixed:
        found = ExportableSegmenter(model, words)(pixel_values)
    elif reduction == "embedding_mean" or (reduction == "mean" and model.config.classifier == "projection"):
        found = ExportableSegmenter(model)(pixel_values, one_embed_per_class(model, words))
    else:
        with pytest.raises(ValueError, match="export with `fixed=True`"):
            one_embed_per_class(model, words)
        return
    for key in OUTPUTS:
        within("traceable module against the model", (found[key] - expected[key]).abs().max(), 2e-5)


def test_embeddings_per_class_are_ordered_by_class_id():
    model = toy(tiny_config())
    embeds = F.normalize(torch.randn(3, 16), dim=-1)
    words = GKCClassEmbeddings(class_embeds=embeds, class_ids=torch.tensor([2, 0, 1]))
    assert torch.equal(one_embed_per_class(model, words), embeds[[1, 2, 0]])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"size": 100}, ValueError, "multiples of 32, got 100x100: use 96x96"),
        ({"size": (64, 0)}, ValueError, "multiples of 32, got 64x0: use 64x32"),
        ({"format": "tflite"}, ValueError, "one of onnx, torch-export, got 'tflite'"),
        ({"opset": 17}, ValueError, "at least 18, got 17"),
        ({"fixed": True}, ValueError, "A fixed graph needs a vocabulary"),
        (
            {"vocabulary": EncodedVocabulary(Vocabulary([["dog"]]), torch.eye(1, 8), torch.zeros(1).long())},
            ValueError,
            r"\(1, 8\), but this model's text embedding space has the width 16",
        ),
        (
            {
                "vocabulary": EncodedVocabulary(
                    Vocabulary([["dog"], ["sky"]]), torch.eye(2, 16), torch.arange(2), void_ids=(1,)
                )
            },
            ValueError,
            "neither void classes nor a reduction of its own",
        ),
    ],
)
def test_invalid_arguments_are_errors_and_write_nothing(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export_segmenter(toy(tiny_config()), processor(), tmp_path / "new", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_file", [True, False])
def test_existing_files_are_not_overwritten(is_file, tmp_path):
    target = tmp_path / "there"
    kept = target if is_file else target / "kept.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(FileExistsError, match="already exists: name a new folder"):
        export_segmenter(toy(tiny_config()), processor(), target)
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("missing", [["onnx"], ["onnx", "onnxscript"]])
def test_missing_packages_are_named(missing, tmp_path, monkeypatch):
    find_spec = exporter.importlib.util.find_spec
    monkeypatch.setattr(
        exporter.importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
    )
    with pytest.raises(ImportError, match=f"pip install {' '.join(missing)}$"):
        export_segmenter(toy(tiny_config()), processor(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_comparison_is_skipped_without_onnxruntime_unless_requested(monkeypatch):
    find_spec = exporter.importlib.util.find_spec
    absent = "onnxruntime"
    monkeypatch.setattr(exporter.importlib.util, "find_spec", lambda name: None if name == absent else find_spec(name))
    assert exporter.check_packages("onnx") is False and exporter.check_packages("torch-export") is True
    with pytest.raises(ImportError, match=r"pip install onnxruntime$"):
        exporter.check_packages("onnx", check=True)


@pytest.fixture
def quick_graphs(monkeypatch):
    """Skip tracing and ONNX conversion, which take seconds."""
    monkeypatch.setattr(exporter, "trace", lambda segmenter, *sizes: segmenter)
    monkeypatch.setattr(exporter, "write_onnx", lambda program, path, *settings: torch.save(0, path))
    monkeypatch.setattr(export_graph, "CHECKED_IMAGES", 2)


@pytest.mark.parametrize("key", OUTPUTS[:2])
def test_graph_with_wrong_logits_is_an_error_and_not_written(key, quick_graphs, monkeypatch, tmp_path):
    model = toy(small_config())
    segmenter = ExportableSegmenter(model)

    def run(inputs):
        outputs = segmenter(**inputs)
        outputs[key] = outputs[key] + 2e-3
        return outputs

    monkeypatch.setattr(exporter, "load_graph", lambda graph: run)
    with pytest.raises(ValueError, match=r"differ from the model's by .*0\.002.* it was not written"):
        export_segmenter(model, processor(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_export_leaves_no_folder(quick_graphs, monkeypatch, tmp_path):
    def interrupted(graph):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "load_graph", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_segmenter(toy(small_config()), processor(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_half_precision_model_is_exported_in_fp32(quick_graphs, monkeypatch, tmp_path):
    traced = []
    monkeypatch.setattr(exporter, "trace", lambda segmenter, *sizes: traced.append(segmenter))
    model = toy(small_config()).bfloat16()
    exported = export_segmenter(model, processor(), tmp_path / "new", vocabulary="dog; lamp", fixed=True, check=False)
    assert {value.dtype for value in traced[0].state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert exported.difference is None and exported.settings["largest_mask_difference"] is None
    assert model.dtype == torch.bfloat16
