"""Tests of `gkc segment` and of the `gkc` command: result files, printed lines and exit codes."""

import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import modeling_gkc
from modeling_gkc import GKCForOpenVocabSegmentation, GKCImageProcessor, GKCProcessor, Vocabulary
from modeling_gkc.cli import common
from modeling_gkc.cli.checks import find_images
from modeling_gkc.cli.common import UserError, default_model_path
from modeling_gkc.cli.main import main
from modeling_gkc.post_processing import decode_rle
from modeling_gkc.visualization import DrawnSegment, draw_overlay, label_map

from .conftest import small_config, word_tokenizer
from .processes import exit_code, start_child, without_third_party_lines

ROOT = Path(__file__).parent.parent
LABELS = "red disc; blue square, box; lawn, grass; sky"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Write a random model with a stored vocabulary whose queries prefer real classes to "no object"."""
    torch.manual_seed(0)
    processor = GKCProcessor(GKCImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}), word_tokenizer())
    model = GKCForOpenVocabSegmentation(small_config()).eval()
    with torch.no_grad():
        model.classifier.no_object_embedding.copy_(-model.classifier.stage_projections[-1].weight.mean(dim=1))
    model.set_vocabulary(Vocabulary([["disc"], ["box"], ["lawn", "grass"]], is_thing=[True, True, False]), processor)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bare_checkpoint(checkpoint, tmp_path_factory) -> Path:
    """Write the same model without a stored vocabulary."""
    folder = tmp_path_factory.mktemp("bare")
    torch.manual_seed(0)
    GKCForOpenVocabSegmentation(small_config()).save_pretrained(folder)
    GKCProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, name in enumerate(["a.png", "b.jpg", "c.PNG"]):
        pixels = np.random.default_rng(seed).integers(0, 256, (40 + 9 * seed, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def stripes(monkeypatch):
    """Replace the forward pass of the model by one that segments ten vertical stripes of alternating classes."""
    original = GKCForOpenVocabSegmentation.forward

    def forward(self, *args, **kwargs):
        outputs = original(self, *args, **kwargs)
        masks = outputs.masks_queries_logits
        stripe = torch.arange(masks.shape[-1]) * 10 // masks.shape[-1]
        outputs.masks_queries_logits = (16.0 * (stripe == torch.arange(10)[:, None]) - 8)[None, :, None].expand_as(
            masks
        )
        classes = torch.arange(10) % (outputs.class_queries_logits.shape[-1] - 1)
        outputs.class_queries_logits = 9.0 * torch.eye(outputs.class_queries_logits.shape[-1])[classes][None]
        return outputs

    monkeypatch.setattr(GKCForOpenVocabSegmentation, "forward", forward)


def read_result(folder: Path, name: str) -> tuple[dict, np.ndarray, Image.Image]:
    result = json.loads((folder / f"{name}.json").read_text())
    return result, np.asarray(Image.open(folder / f"{name}.labels.png")), Image.open(folder / f"{name}.overlay.png")


class TestSegment:
    @pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
    def test_results_agree_with_each_other(self, checkpoint, pictures, tmp_path, capsys, stripes, task):
        out = tmp_path / "out"
        arguments = ["segment", str(pictures), "--labels", LABELS, "--model", str(checkpoint), "--task", task]
        assert main([*arguments, "--out", str(out)]) == 0
        printed = capsys.readouterr()
        assert printed.out.splitlines() == [str(out / f"{name}.overlay.png") for name in "abc"]
        assert printed.err.startswith(f"gkc: {pictures}: skipped 1 files") and printed.err.count("\n") == 1
        assert len(list(out.iterdir())) == 9
        for name, size in (("a", [40, 70]), ("b", [49, 70]), ("c", [58, 70])):
            result, ids, overlay = read_result(out, name)
            assert result["size"] == size == list(ids.shape)
            assert result["task"] == task and result["model"] == str(checkpoint)
            assert result["labels"] == ["red disc", "blue square", "lawn", "sky"]
            assert overlay.mode == "RGB" and min(overlay.size) >= 480
            void = result["void_id"]
            assert void == (255 if task == "semantic" else 0)
            assert {segment["id"] for segment in result["segments"]} == set(np.unique(ids).tolist()) - {void}
            assert len(result["segments"]) == 4 if task == "semantic" else len(result["segments"]) >= 6
            for segment in result["segments"]:
                inside = ids == segment["id"]
                rows, columns = np.nonzero(inside)
                assert segment["label"] == result["labels"][segment["label_id"]]
                assert segment["area"] == inside.sum()
                left, top, width, height = segment["bbox"]
                assert (left, top) == (columns.min(), rows.min())
                assert (left + width - 1, top + height - 1) == (columns.max(), rows.max())
                np.testing.assert_array_equal(decode_rle(segment["segmentation"]), inside)
                assert 0.9 < segment["score"] < 1.1

    def test_result_equals_that_of_the_library(self, checkpoint, pictures, tmp_path):
        assert main(["segment", str(pictures / "a.png"), "--labels", LABELS, "--model", str(checkpoint),
                     "--out", str(tmp_path)]) == 0  # fmt: skip
        processor = GKCProcessor.from_pretrained(checkpoint)
        model = GKCForOpenVocabSegmentation.from_pretrained(checkpoint).eval()
        image = Image.open(pictures / "a.png")
        with torch.no_grad():
            outputs = model(**processor(images=image, text=LABELS, return_tensors="pt"))
        expected = processor.post_process_semantic_segmentation(outputs, [(image.height, image.width)])[0]
        np.testing.assert_array_equal(read_result(tmp_path, "a")[1], expected)

    def test_words_of_the_checkpoint(self, checkpoint, pictures, tmp_path, stripes):
        image = str(pictures / "a.png")
        command = ["segment", image, "--model", str(checkpoint), "--out", str(tmp_path), "--task", "panoptic"]
        assert main(command) == 0
        result, _, _ = read_result(tmp_path, "a")
        assert result["labels"] == ["disc", "box", "lawn"]
        labels = [segment["label"] for segment in result["segments"]]
        assert [labels.count(label) for label in result["labels"]] == [4, 3, 1]  # stuff is one segment

    def test_typed_names_take_is_thing_from_the_checkpoint(self, checkpoint, pictures, tmp_path, monkeypatch):
        seen = []
        original = GKCProcessor.post_process_panoptic_segmentation

        def spy(self, *args, **kwargs):
            seen.append(kwargs["label_ids_to_fuse"])
            return original(self, *args, **kwargs)

        monkeypatch.setattr(GKCProcessor, "post_process_panoptic_segmentation", spy)
        command = ["segment", str(pictures / "a.png"), "--model", str(checkpoint), "--out", str(tmp_path)]
        main([*command, "--task", "panoptic", "--labels", "sky; Grass; disc"])
        main([*command, "--task", "panoptic"])
        vocab = str(tmp_path / "words.safetensors")
        main(["embed", "--labels", "grass; disc", "--model", str(checkpoint), "--out", vocab])
        main([*command, "--task", "panoptic", "--vocab", vocab])
        (tmp_path / "words.csv").write_text("name,is_thing\ngrass,true\ndisc,false\n")
        main([*command, "--task", "panoptic", "--labels", str(tmp_path / "words.csv")])  # the file states is_thing
        assert seen == [{1}, {2}, {0}, {1}]

    @pytest.mark.parametrize("task", ["instance", "panoptic"])
    def test_segments_have_shades_of_their_class_colors(self, checkpoint, pictures, tmp_path, stripes, task):
        (tmp_path / "words.csv").write_text("name,is_thing,color\ndisc,true,#0000c8\nlawn,false,#00c800\n")
        command = ["segment", str(pictures / "a.png"), "--model", str(checkpoint), "--out", str(tmp_path)]
        assert main([*command, "--task", task, "--labels", str(tmp_path / "words.csv")]) == 0
        result = read_result(tmp_path, "a")[0]
        palette = np.array(Image.open(tmp_path / "a.labels.png").getpalette()).reshape(-1, 3)
        for label, channel, color in (("disc", 2, [0, 0, 200]), ("lawn", 1, [0, 200, 0])):
            colors = [palette[s["id"]].tolist() for s in result["segments"] if s["label"] == label]
            assert colors[0] == color and len({tuple(c) for c in colors}) == len(colors)
            assert all(np.argmax(c) == channel for c in colors)

    @pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
    def test_void_threshold(self, checkpoint, pictures, tmp_path, stripes, task):
        command = ["segment", str(pictures / "a.png"), "--model", str(checkpoint), "--out", str(tmp_path)]
        assert main([*command, "--task", task]) == 0
        assert read_result(tmp_path, "a")[0]["segments"]
        assert main([*command, "--task", task, "--void-threshold", "1"]) == 0
        result, ids, _ = read_result(tmp_path, "a")
        # In a semantic map, pixels remain where the scores of several queries sum to at least 1.
        assert all(segment["score"] == 1 for segment in result["segments"])
        assert task == "semantic" or result["segments"] == []
        assert (ids == result["void_id"]).any()

    @pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
    @pytest.mark.parametrize("words", ["typed", "stored", "file"])
    def test_void_labels(self, checkpoint, pictures, tmp_path, stripes, task, words):
        vocab = tmp_path / "words.safetensors"
        options = {"typed": ["--labels", "disc; box; lawn, grass"], "stored": [], "file": ["--vocab", str(vocab)]}
        if words == "file":
            assert main(["embed", *options["typed"], "--model", str(checkpoint), "--out", str(vocab)]) == 0
        command = ["segment", str(pictures / "a.png"), "--model", str(checkpoint), "--out", str(tmp_path)]
        assert main([*command, *options[words], "--task", task, "--void-labels", "sky; star, air"]) == 0
        result, ids, _ = read_result(tmp_path, "a")
        assert result["labels"] == ["disc", "box", "lawn"]
        assert result["void_labels"] == ["sky", "star"]
        assert {segment["label"] for segment in result["segments"]} == set(result["labels"])
        stripe = np.arange(ids.shape[1]) * 10 // ids.shape[1] % 5  # of five classes, two void
        assert (ids[:, np.isin(stripe, [3, 4])] == result["void_id"]).mean() > 0.8
        assert (ids[:, np.isin(stripe, [0, 1, 2])] != result["void_id"]).mean() > 0.8

    def test_encoded_and_typed_vocabularies_give_equal_results(self, checkpoint, pictures, tmp_path):
        vocab, image = tmp_path / "words.safetensors", str(pictures / "a.png")
        common = ["--model", str(checkpoint), "--out"]
        assert main(["embed", "--labels", LABELS, *common, str(vocab)]) == 0
        assert main(["segment", image, "--vocab", str(vocab), *common, str(tmp_path / "file")]) == 0
        assert main(["segment", image, "--labels", LABELS, *common, str(tmp_path / "typed")]) == 0
        files = [read_result(tmp_path / name, "a") for name in ("file", "typed")]
        assert files[0][0] == files[1][0]

    def test_packaged_vocabularies_have_colors(self, checkpoint, pictures, tmp_path, stripes):
        image = str(pictures / "a.png")
        command = ["segment", image, "--labels", "pascal_voc_20", "--model", str(checkpoint), "--out", str(tmp_path)]
        assert main(command) == 0
        result = read_result(tmp_path, "a")[0]
        assert len(result["labels"]) == 20 and result["labels"][0] == "aeroplane"
        picture = Image.open(tmp_path / "a.labels.png")
        assert picture.getpalette()[:3] == [128, 0, 0]

    def test_templates(self, checkpoint, pictures, tmp_path, monkeypatch):
        asked = []
        original = GKCForOpenVocabSegmentation.embed_prompts

        def spy(self, input_ids, attention_mask=None):
            asked.append(len(input_ids))
            return original(self, input_ids, attention_mask)

        monkeypatch.setattr(GKCForOpenVocabSegmentation, "embed_prompts", spy)
        command = ["segment", str(pictures / "a.png"), "--model", str(checkpoint), "--out", str(tmp_path)]
        assert main([*command, "--labels", "red; lawn, grass", "--templates", "photo"]) == 0
        assert asked == [3]

    def test_text_is_encoded_once(self, checkpoint, pictures, tmp_path, monkeypatch):
        calls = []
        original = GKCForOpenVocabSegmentation.embed_prompts
        monkeypatch.setattr(
            GKCForOpenVocabSegmentation,
            "embed_prompts",
            lambda self, *args, **kwargs: calls.append(1) or original(self, *args, **kwargs),
        )
        main(["segment", str(pictures), "--labels", LABELS, "--model", str(checkpoint), "--out", str(tmp_path)])
        assert calls == [1]

    def test_images_without_segments_are_reported(self, checkpoint, pictures, tmp_path, capsys):
        image = str(pictures / "a.png")
        command = ["segment", image, "--model", str(checkpoint), "--task", "panoptic", "--out", str(tmp_path)]
        assert main([*command, "--threshold", "1"]) == 0
        assert f"gkc: {image}: no segments were found" in capsys.readouterr().err

    def test_bad_files_do_not_stop_the_others(self, checkpoint, pictures, tmp_path, capsys):
        (pictures / "b.jpg").write_bytes((pictures / "b.jpg").read_bytes()[:300])
        images = [str(pictures), str(pictures / "gone.png"), str(pictures / "notes.txt")]
        out = tmp_path / "out"
        assert main(["segment", *images, "--model", str(checkpoint), "--out", str(out)]) == 1
        printed = capsys.readouterr()
        assert [Path(line).name for line in printed.out.splitlines()] == ["a.overlay.png", "c.overlay.png"]
        first, *errors = printed.err.splitlines()
        assert "skipped" in first and len(errors) == 4 and errors[-1] == "gkc: 3 of 5 images could not be segmented"
        for line, name in zip(errors, ["b.jpg", "gone.png", "notes.txt"], strict=False):
            assert line.startswith("gkc: skipped: ") and line.count(name) == 1

    def test_program_with_the_model_of_the_environment_variable(self, checkpoint, pictures, tmp_path):
        (pictures / "broken.png").write_bytes(b"hello")
        environment = os.environ | {"GKC_MODEL": str(checkpoint)}
        command = [
            sys.executable,
            "-m",
            "modeling_gkc",
            "segment",
            str(pictures),
            "--labels",
            "lawn, zebra; sky, lawn",
        ]
        finished = subprocess.run(
            [*command, "--out", str(tmp_path / "out"), "--threads", "1", "--device", "cpu"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 1
        assert len(finished.stdout.splitlines()) == 3
        lines = without_third_party_lines(finished.stderr)
        assert lines[0] == "gkc: warning: A name is shared by several classes: 'lawn' belongs to 'lawn' and 'sky'."
        assert lines[1].startswith("gkc: warning: The text encoder does not know these words: 'zebra'.")
        assert lines[2].startswith(f"gkc: {pictures}: skipped 1 files")
        assert lines[3].startswith("gkc: skipped: ") and lines[3].count("broken.png") == 1
        assert lines[4:] == ["gkc: 1 of 4 images could not be segmented"]


class TestUserErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--labels", "dog;;cat"], "--labels: Label 2 (index 1) is empty"),
            (["--labels", "dog;dog"], "--labels: Labels 1 and 2"),
            (["--labels", "sky . grass ."], "--labels: Classes are separated by ';'"),
            (["--labels", "sky", "--void-labels", "red | blue"], "--void-labels: "),
            (
                ["--labels", "sky; <end>"],
                "--labels: The label '<end>' contains the tokenizer's special token",
            ),
            (["--labels", "dog " * 15], "--labels: The prompt 'dog dog"),
            (["--labels", ""], "--labels: Label 1 (index 0) is empty"),
            (["--device", "toaster"], "--device: "),
            (["--device", "cuda:99"], "--device: this machine has no device cuda:99"),
            (["--threshold", "0.3"], "--threshold needs --task instance or panoptic"),
            (["--labels", "ade20k_151"], "--labels: "),
            (["--labels", "nowhere.json"], "--labels: "),
            (["--vocab", "nowhere.safetensors"], "--vocab: "),
            (["--vocab", "words.safetensors", "--templates", "photo"], "--templates needs --labels"),
            (["--templates", "photo"], "--templates needs --labels"),
            (["--void-labels", "lawn;;sky"], "--void-labels: Label 2 (index 1) is empty"),
            (["--void-labels", "sky; Disc"], "--void-labels: "),
            (["--labels", "red", "--templates", "nonsense"], "--templates: "),
            (["--model", "./nowhere"], "--model: ./nowhere is not a directory"),
        ],
    )
    def test_one_line_and_exit_code_2(self, checkpoint, pictures, tmp_path, capsys, options, message):
        command = ["segment", str(pictures), "--model", str(checkpoint), "--out", str(tmp_path / "out"), *options]
        assert main(command) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and len(printed.err.splitlines()) == 1
        assert printed.err.startswith(f"gkc: error: {message}")
        assert not (tmp_path / "out").exists()

    def test_a_checkpoint_without_vocabulary_needs_labels(self, bare_checkpoint, pictures, capsys):
        assert main(["segment", str(pictures), "--model", str(bare_checkpoint)]) == 2
        assert capsys.readouterr().err == ("gkc: error: the checkpoint stores no vocabulary: give one with --labels\n")

    def test_a_folder_that_is_not_a_checkpoint(self, pictures, capsys):
        assert main(["segment", str(pictures), "--model", str(pictures)]) == 2
        assert f"--model: {pictures} is not a GKC checkpoint" in capsys.readouterr().err

    def test_a_checkpoint_of_another_model(self, pictures, tmp_path, capsys):
        small_config().text_config.save_pretrained(tmp_path)
        assert main(["segment", str(pictures), "--model", str(tmp_path)]) == 2
        assert capsys.readouterr().err.endswith(
            "is not a GKC checkpoint: its model_type is 'clip_text_model', not 'gkc' or 'gkc_zero_shot'.\n"
        )

    @pytest.mark.parametrize("damage", ["missing", "truncated", "shapes"])
    def test_weights_that_do_not_fit_are_never_replaced_by_random_ones(
        self, checkpoint, pictures, tmp_path, capsys, damage
    ):
        folder = tmp_path / "damaged"
        shutil.copytree(checkpoint, folder)
        file = folder / "model.safetensors"
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[:-1000])
        else:
            weights = load_file(file)
            name = "model.mask_decoder.query_features.weight"
            weight = weights.pop(name)
            if damage == "shapes":
                weights[name] = weight[:, :-1].contiguous()
            save_file(weights, file, {"format": "pt"})
        assert main(["segment", str(pictures), "--model", str(folder), "--out", str(tmp_path / "out")]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"gkc: error: --model: {folder} ")
        assert damage != "missing" or last.endswith("lacks weights: model.mask_decoder.query_features.weight.")
        assert not (tmp_path / "out").exists()

    def test_a_folder_without_images(self, checkpoint, tmp_path, capsys):
        assert main(["segment", str(tmp_path), "--model", str(checkpoint)]) == 2
        assert f"{tmp_path} contains no images" in capsys.readouterr().err

    def test_an_output_folder_that_cannot_be_created(self, checkpoint, pictures, capsys):
        command = ["segment", str(pictures), "--model", str(checkpoint), "--out", str(pictures / "notes.txt")]
        assert main(command) == 2
        assert "cannot create the folder" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "command",
        [[], ["segment"], ["segment", "a.png", "--task", "other"], ["segment", "a.png", "--threshold", "2"],
         ["segment", "a.png", "--threads", "0"], ["segment", "a.png", "--labels", "dog", "--vocab", "b"], ["unknown"],
         ["segment", "a.png", "--void-threshold", "nan"], ["segment", "a.png", "--void-threshold", "-5"],
         ["segment", "a.png", "--void-threshold", "1.01"]],
    )  # fmt: skip
    def test_usage(self, command, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2
        assert "usage: gkc" in capsys.readouterr().err

    @pytest.mark.parametrize("command", [["--help"], ["segment", "--help"]])
    def test_help_shows_examples(self, command, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 0
        assert 'gkc segment scene.png --labels "red disc; lawn, grass; sky"' in capsys.readouterr().out


class TestDefaultModel:
    @pytest.fixture
    def package(self, tmp_path, monkeypatch) -> Path:
        package = tmp_path / "site" / "modeling_gkc"
        package.mkdir(parents=True)
        monkeypatch.setattr(common, "__file__", str(package / "cli" / "common.py"))
        monkeypatch.setattr("sys.prefix", str(tmp_path / "environment"))
        monkeypatch.delenv("GKC_MODEL", raising=False)
        return package

    def make(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        return folder

    def test_order_of_the_default_checkpoints(self, package, tmp_path, monkeypatch):
        with pytest.raises(UserError, match="no checkpoint is installed"):
            default_model_path()
        installed = self.make(tmp_path / "environment" / "share" / "gkc" / "gkc-mini")
        assert default_model_path() == installed
        beside = self.make(package.parent / "hub_card" / "gkc-mini")
        assert default_model_path() == beside
        named = self.make(tmp_path / "named")
        monkeypatch.setenv("GKC_MODEL", str(named))
        assert default_model_path() == named
        monkeypatch.setenv("GKC_MODEL", str(tmp_path / "gone"))
        with pytest.raises(UserError, match="GKC_MODEL is not a directory"):
            default_model_path()

    def test_missing_default_checkpoint_is_one_line(self, package, pictures, capsys):
        assert main(["segment", str(pictures), "--labels", "dog"]) == 2
        assert (
            capsys.readouterr()
            .err.splitlines()[-1]
            .startswith("gkc: error: no checkpoint is installed with this package")
        )


class TestNames:
    def test_images_are_listed_once_and_in_order(self, pictures):
        (pictures / "a.overlay.png").write_bytes(b"")
        (pictures / "a.labels.png").write_bytes(b"")
        (pictures / "deeper.png").mkdir()
        found, _ = find_images([str(pictures / "c.PNG"), str(pictures), str(pictures / ".." / "pictures" / "a.png")])
        assert [(image.path.name, str(image.name)) for image in found] == [
            ("c.PNG", "c"),
            ("a.png", "a"),
            ("b.jpg", "b"),
        ]

    @pytest.mark.parametrize("others", [["x/b.png"], ["y/a.b.png", "y/c.png"]])
    def test_result_names_do_not_depend_on_other_images(self, tmp_path, others):
        for path in ["x/a.png", *others]:
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).touch()
        found, _ = find_images([str(tmp_path / path) for path in [*others, "x/a.png"]])
        assert str(found[-1].name) == "a" and [str(image.name) for image in found[:-1]] == [
            Path(path).stem for path in others
        ]

    @pytest.mark.parametrize("paths", [["x/a.png", "y/a.png"], ["x/a.png", "x/a.jpg"], ["x/a.png", "x/A.png"]])
    def test_equal_result_names_raise_errors(self, tmp_path, paths):
        for path in paths:
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).touch()
        way = "give their common parent folder with --recursive" if "y/a.png" in paths else "rename one of them"
        message = rf"a\.png and .*would both be written as [aA]\.overlay\.png: .*different --out folders, or {way}$"
        with pytest.raises(UserError, match=message):
            find_images([str(tmp_path / path) for path in paths])
        with pytest.raises(UserError, match=r"rename one of them$"):
            (tmp_path / "x" / "a.webp").touch()
            find_images([str(tmp_path / "x"), str(tmp_path / "x" / ".." / "x" / "a.webp")], recursive=True)

    @pytest.mark.parametrize("url", ["http://x/a.png", "HTTPS://x/a.png", "file:///a.png", "data:image/png;base64,AA"])
    def test_urls_raise_errors(self, pictures, url):
        for inputs in ([url], [str(pictures / "a.png"), url]):
            with pytest.raises(UserError, match=f"IMAGE: {url} is a URL: give a file, and download an image"):
                find_images(inputs)

    def test_skipped_files_are_reported(self, pictures):
        for name in ("below/d.png", "below/deep/a.png", "gkc-out/x.png", "notes.txt", "a.json", ".hidden/e.png"):
            (pictures / name).parent.mkdir(parents=True, exist_ok=True)
            (pictures / name).touch()
        (pictures / "a.overlay.png").touch()  # which makes a.json a result
        found, said = find_images([str(pictures)])
        folders = "2 sub-folders (use --recursive to include them): below, gkc-out"
        assert len(found) == 3 and said[0] == f"{pictures}: skipped {folders}"
        assert said[1].endswith(": notes.txt") and len(said) == 2
        found, said = find_images([str(pictures)], recursive=True, out=pictures / "gkc-out")
        assert {str(image.name) for image in found} == {"a", "b", "c", "below/d", "below/deep/a"} and len(said) == 1
        with pytest.raises(UserError, match=r"contains no images; use --recursive"):
            (pictures / "below" / "d.png").unlink()
            find_images([str(pictures / "below")])

    def test_results_mirror_sub_folders(self, checkpoint, pictures, tmp_path):
        (pictures / "below").mkdir()
        Image.new("RGB", (9, 5)).save(pictures / "below" / "a.png")
        out = tmp_path / "out"
        command = ["segment", str(pictures), "--recursive", "--model", str(checkpoint), "--out", str(out)]
        assert main(command) == 0
        assert read_result(out, "a")[0]["size"] == [40, 70]
        assert read_result(out / "below", "a")[0]["size"] == [5, 9]


class TestEnds:
    def test_version(self, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["--version"])
        assert ended.value.code == 0 and capsys.readouterr().out == f"gkc {modeling_gkc.__version__}\n"

    def test_the_package_can_be_run_as_a_module(self, monkeypatch, capsys):
        monkeypatch.setattr("sys.argv", ["gkc", "vocab", "list"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("modeling_gkc.cli", run_name="__main__")
        assert ended.value.code == 0 and "ade20k_150" in capsys.readouterr().out

    def test_missing_inputs_are_reported(self, capsys):
        assert main(["segment", "absent.jpg", "absent-too.jpg", "--labels", "cat"]) == 2
        assert capsys.readouterr().err == "gkc: error: IMAGE: absent.jpg does not exist\n"

    def test_a_missing_image_is_named_without_error_numbers(self, checkpoint, pictures, tmp_path, capsys):
        images = [str(pictures / "a.png"), str(pictures / "absent.jpg")]
        assert main(["segment", *images, "--model", str(checkpoint), "--out", str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err
        assert f"gkc: skipped: {images[1]}: No such file or directory\n" in said and "Errno" not in said

    def test_ctrl_c_is_one_line(self, checkpoint, pictures, tmp_path, capsys, monkeypatch):
        def interrupted(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr("modeling_gkc.cli.segment._write_result", interrupted)
        command = ["segment", str(pictures), "--model", str(checkpoint), "--out", str(tmp_path / "out")]
        assert main(command) == 130
        assert capsys.readouterr().err.splitlines()[-1] == "gkc: stopped."

    def test_a_full_disk_leaves_only_complete_results(self, checkpoint, pictures, tmp_path, capsys, monkeypatch):
        """The disk is full after the first file of the second image and half of the next."""
        out = tmp_path / "out"
        written = []
        save = Image.Image.save

        def save_until_full(picture, path, *arguments, **options):
            if len(written) == 3:
                Path(path).write_bytes(b"\x89PNG")
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(path)
            save(picture, path, *arguments, **options)

        monkeypatch.setattr(Image.Image, "save", save_until_full)
        assert main(["segment", str(pictures), "--model", str(checkpoint), "--out", str(out)]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"gkc: error: --out: cannot write the results of {pictures / 'b.jpg'}: No space left on device"
        )
        names = {"a.overlay.png", "a.labels.png", "a.json", "b.overlay.png"}
        assert {path.name for path in out.iterdir()} == names
        for path in out.glob("*.png"):
            Image.open(path).load()

    @pytest.mark.parametrize("after", range(4))
    def test_a_kill_leaves_only_complete_results(self, checkpoint, pictures, tmp_path, monkeypatch, after):
        """Kill the process by SIGKILL after a number of bytes of a result were written."""
        out = tmp_path / "out"
        out.mkdir()
        saved = []

        def save_and_die(picture, path, *arguments, **options):
            save(picture, path, *arguments, **options)
            saved.append(path)
            if len(saved) > after:
                content = Path(path).read_bytes()
                Path(path).write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

        save = Image.Image.save
        monkeypatch.setattr(Image.Image, "save", save_and_die)
        command = ["segment", str(pictures), "--model", str(checkpoint), "--out", str(out)]
        assert exit_code(start_child(lambda: main(command))) == -signal.SIGKILL
        whole = [path for path in out.iterdir() if not path.name.startswith(".")]
        assert len(whole) == after + after // 2
        for path in whole:
            json.loads(path.read_text()) if path.suffix == ".json" else Image.open(path).load()


class TestPictures:
    @pytest.mark.parametrize("size", [(1, 1), (3, 200), (96, 96), (300, 900), (2500, 40)])
    def test_overlay_of_any_size(self, size):
        segmentation = np.zeros(size, dtype=np.int64)
        segmentation[size[0] // 2 :] = 300
        segments = [
            DrawnSegment(0, "sky", (0, 0, 255)),
            DrawnSegment(300, "lawn 😀 草", (0, 255, 0), 0.5),
            DrawnSegment(7, "absent", (255, 0, 0)),
        ]
        overlay = draw_overlay(Image.new("L", size[::-1], 128), segmentation, segments)
        assert overlay.mode == "RGB" and max(overlay.size) <= 4096

    def test_colors_equal_those_of_the_legend(self):
        segmentation = np.zeros((100, 100), dtype=np.uint8)
        segmentation[:, 50:] = 1
        segmentation[90:] = 9
        segments = [DrawnSegment(0, "a", (255, 0, 0)), DrawnSegment(1, "b", (0, 0, 255))]
        overlay = np.asarray(draw_overlay(Image.new("RGB", (100, 100), (0, 255, 0)), segmentation, segments)).astype(
            int
        )
        left, right, void = overlay[60, 60], overlay[60, 400], overlay[460, 240]
        assert left[0] - left[2] > 100 and right[2] - right[0] > 100
        assert void[1] > 100 and void[0] == void[2] == 0
        assert (overlay[:, 480:].reshape(-1, 3) == [255, 0, 0]).all(axis=1).any()  # the legend's swatch

    def test_overlay_needs_the_size_of_the_image(self):
        with pytest.raises(ValueError, match=r"\(4, 5\).*\(5, 4\)"):
            draw_overlay(Image.new("RGB", (4, 5)), np.zeros((4, 5), dtype=int), [])

    def test_label_maps(self, tmp_path):
        ids = np.array([[0, 1, 255]])
        label_map(ids, {0: (10, 20, 30), 300: (1, 1, 1)}).save(tmp_path / "small.png")
        small = Image.open(tmp_path / "small.png")
        assert np.array_equal(np.asarray(small), ids)
        assert np.asarray(small.convert("RGB")).tolist() == [[[10, 20, 30], [0, 0, 0], [0, 0, 0]]]
        for values, max_id in ((ids * 257, 255), (ids, 65535)):
            label_map(values, {}, max_id).save(tmp_path / "large.png")
            large = Image.open(tmp_path / "large.png")
            assert large.mode.startswith("I") and np.array_equal(np.asarray(large), values)
        with pytest.raises(ValueError, match=r"0\.\.65535"):
            label_map(np.array([[-1]]), {})


def test_errors_about_long_arguments_are_shortened(capsys):
    assert main(["segment", "x" * 300_000 + ".png"]) == 2
    assert len(capsys.readouterr().err) < 3000
