"""Tests of `gkc convert`: converted checkpoints, printed lines and errors."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    ResNetConfig,
)

from modeling_gkc import CLIPResNetVisionModel, GKCForOpenVocabSegmentation, GKCProcessor
from modeling_gkc.cli import common
from modeling_gkc.cli.common import UserError
from modeling_gkc.cli.parsers import add_convert
from modeling_gkc.conversion import clip_resnet_from_openai, clip_text_from_openai
from modeling_gkc.conversion.mask2former import image_processor_from_mask2former

from .conftest import word_tokenizer
from .fc_clip import recording, tokenizer_of_recording
from .openai_clip import random_weights, save_archive

NAMES = ["red", "blue", "disc", "lawn", "sky"]
PREPROCESSOR = {
    "image_processor_type": "Mask2FormerImageProcessor",
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "ignore_index": 255,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
    "num_labels": 5,
    "do_reduce_labels": False,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 64, "longest_edge": 96},
    "size_divisor": 32,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Write a Mask2Former in the format of the Hub."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source")
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=4,
        num_attention_heads=4,
        num_queries=8,
        id2label=dict(enumerate(NAMES)),
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Write a CLIP model with both towers and its tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    text = CLIPTextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Write a CLIP ResNet in OpenAI's format."""
    path = tmp_path_factory.mktemp("openai") / "RN-tiny.pt"
    save_archive(random_weights(), str(path))
    return path


def gkc(*arguments) -> int:
    parser = argparse.ArgumentParser(prog="gkc")
    add_convert(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["convert", *map(str, arguments)])
    return parsed.run(parsed)


class TestMask2Former:
    @torch.no_grad()
    def test_the_result_equals_the_source(self, source, clip, tmp_path, capsys, within):
        out = tmp_path / "words model"
        assert gkc("mask2former", source, "--text-model", clip, "--out", out) == 0
        printed = capsys.readouterr()
        assert f"{out}: 5 classes, 8 queries: red; blue; disc; lawn; sky\n" in printed.out
        assert f"--model '{out}' --labels" in printed.out and "replace" not in printed.out
        assert printed.err == ""

        model, processor = common.load_checkpoint(out)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
        inputs = processor(images=image, return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 64, 96) and inputs["pixel_mask"].sum() == 64 * 89
        outputs = model(**inputs)
        expected = Mask2FormerForUniversalSegmentation.from_pretrained(source).eval()(inputs["pixel_values"])
        probabilities = [each.class_queries_logits.softmax(-1) for each in (outputs, expected)]
        within(
            "class probabilities of a converted folder, max abs",
            (probabilities[0] - probabilities[1]).abs().max(),
            1e-4,
        )
        error = (outputs.masks_queries_logits - expected.masks_queries_logits).abs().max()
        within("masks of a converted folder, max abs", error, 1e-4)
        assert list(processor.image_processor.image_mean) == PREPROCESSOR["image_mean"]

    def test_class_names_and_is_thing_from_a_file(self, source, clip, tmp_path, capsys):
        names = tmp_path / "names.csv"
        names.write_text(
            "name,synonyms,is_thing\nred,,thing\nblue,,thing\ndisc,star|dog,thing\ngrass,lawn,stuff\nsky,air,stuff\n"
        )
        arguments = ("--text-model", clip, "--class-names", names, "--out", tmp_path / "out")
        assert gkc("mask2former", source, *arguments) == 0
        assert "check that they are in its order: 'lawn' is 'grass'\n" in capsys.readouterr().out
        model, _ = common.load_checkpoint(tmp_path / "out")
        assert model.config.source_vocabulary[2:4] == [["disc", "star", "dog"], ["grass", "lawn"]]
        assert model.config.vocabulary_is_thing == [True, True, True, False, False]

    def test_names_are_encoded_without_templates(self, source, clip, tmp_path, capsys):
        """The processor encodes typed names like the conversion."""
        names = tmp_path / "names.json"
        names.write_text(json.dumps([{"name": name, "templates": ["dog {}"]} for name in NAMES]))
        arguments = ("--text-model", clip, "--class-names", names, "--out", tmp_path / "out")
        assert gkc("mask2former", source, *arguments) == 0
        assert capsys.readouterr().err.startswith("gkc: warning: Prompt templates of `class_names` are ignored")
        model, processor = common.load_checkpoint(tmp_path / "out")
        assert processor.prompt_templates == ["{}"]
        typed = model.get_class_embeddings(**processor(text=NAMES, return_tensors="pt")).class_embeds
        for stored in (model.vocabulary_embeds, model.classifier.name_embeds):
            torch.testing.assert_close(stored, typed)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--class-names", "red; blue"), "--class-names: `class_names` has 2 classes, but the source has 5"),
            (("--class-names", "red; ;blue"), "--class-names: Label 2"),
            (("--tokenizer", "./nowhere"), "--tokenizer: ./nowhere is not a directory"),
        ],
    )
    def test_errors_name_the_argument(self, source, clip, tmp_path, arguments, message):
        with pytest.raises(UserError, match=message):
            gkc("mask2former", source, "--text-model", clip, *arguments, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_folders_of_other_models_raise_errors(self, source, clip, tmp_path):
        out = ("--out", tmp_path / "out")
        with pytest.raises(UserError, match=r"MASK2FORMER: \./nowhere/at/all is not a directory"):
            gkc("mask2former", "./nowhere/at/all", "--text-model", clip, *out)
        with pytest.raises(UserError, match=r"MASK2FORMER: .* is a clip, not a mask2former"):
            gkc("mask2former", clip, "--text-model", clip, *out)
        with pytest.raises(UserError, match=r"--text-model: .* is a mask2former, not a clip"):
            gkc("mask2former", source, "--text-model", source, *out)
        MaskFormerConfig().save_pretrained(tmp_path / "older")
        with pytest.raises(UserError, match="is a maskformer, not a mask2former"):
            gkc("mask2former", tmp_path / "older", "--text-model", clip, *out)
        with pytest.raises(UserError, match=r"--out: .* already exists"):
            gkc("mask2former", source, "--text-model", clip, "--out", source)

    def test_missing_weights_raise_an_error(self, source, clip, tmp_path):
        folder = tmp_path / "source"
        folder.mkdir()
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        weights = load_file(source / "model.safetensors")
        del weights["class_predictor.bias"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"lacks weights of a mask2former: class_predictor\.bias"):
            gkc("mask2former", folder, "--text-model", clip, "--out", tmp_path / "out")

    @pytest.mark.parametrize("length", [4, 1000, -8])
    def test_damaged_weight_files_raise_errors(self, source, clip, tmp_path, length):
        """Truncate the file in the length of the header, in the header and in the values; damage a pickle."""
        folder = tmp_path / "source"
        folder.mkdir()
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        weights = folder / "model.safetensors"
        weights.write_bytes((source / "model.safetensors").read_bytes()[:length])
        arguments = ("mask2former", folder, "--text-model", clip, "--out", tmp_path / "out")
        with pytest.raises(UserError, match=r"^MASK2FORMER: cannot load .*/source: .+") as refusal:
            gkc(*arguments)
        assert "\n" not in str(refusal.value)
        weights.rename(folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"^MASK2FORMER: cannot load .*/source: .+") as refusal:
            gkc(*arguments, "--allow-pickle")
        assert "\n" not in str(refusal.value)

    def test_pickled_weights_only_when_allowed(self, source, clip, tmp_path):
        folder = tmp_path / "source"
        folder.mkdir()
        for name in ("config.json", "preprocessor_config.json"):
            (folder / name).write_bytes((source / name).read_bytes())
        torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
        arguments = ("mask2former", folder, "--text-model", clip, "--out", tmp_path / "out")
        with pytest.raises(UserError, match="--allow-pickle"):
            gkc(*arguments)
        assert gkc(*arguments, "--allow-pickle") == 0

    def test_a_text_tower_without_tokenizer(self, source, clip, tmp_path):
        CLIPTextModelWithProjection.from_pretrained(clip).save_pretrained(tmp_path / "text")
        arguments = ("mask2former", source, "--text-model", tmp_path / "text", "--out", tmp_path / "out")
        with pytest.raises(UserError, match="has no tokenizer; name one with --tokenizer, such as openai/clip"):
            gkc(*arguments)
        assert gkc(*arguments, "--tokenizer", clip) == 0


def test_image_settings_of_all_formats():
    """Test current files, and earlier ones whose size is a number."""
    kept = image_processor_from_mask2former(PREPROCESSOR)
    assert dict(kept.size) == {"shortest_edge": 64, "longest_edge": 96} and list(kept.image_std) == [0.2, 0.25, 0.3]
    assert dict(image_processor_from_mask2former({"size": 640, "max_size": 2560}).size) == {
        "shortest_edge": 640,
        "longest_edge": 2560,
    }
    older = image_processor_from_mask2former(
        {"size": {"shortest_edge": 512}, "max_size": 2048, "size_divisibility": 64}
    )
    assert dict(older.size) == {"shortest_edge": 512, "longest_edge": 2048} and older.size_divisor == 64
    square = image_processor_from_mask2former({"size": {"height": 384, "width": 384}})
    assert dict(square.size) == {"height": 384, "width": 384} and square.size_divisor == 32


class TestCLIPResNet:
    def test_image_and_text_tower(self, archive, tmp_path, capsys):
        assert gkc("clip-resnet", archive, "--out", tmp_path / "out", "--text") == 0
        printed = capsys.readouterr()
        assert "image encoder, width 4, blocks 1-2-1-1, 64 x 64 pixels, D = 24" in printed.out
        assert f"{tmp_path / 'out' / 'text'}: text encoder; its tokenizer is that of openai/clip" in printed.out
        assert printed.err == ""
        towers = (
            (CLIPResNetVisionModel.from_pretrained(tmp_path / "out"), clip_resnet_from_openai(random_weights())),
            (
                CLIPTextModelWithProjection.from_pretrained(tmp_path / "out" / "text"),
                clip_text_from_openai(random_weights()),
            ),
        )
        for loaded, expected in towers:
            assert all(torch.equal(loaded.state_dict()[name], w) for name, w in expected.state_dict().items())

    def test_without_text(self, archive, tmp_path):
        assert gkc("clip-resnet", archive, "--out", tmp_path / "out") == 0
        assert not (tmp_path / "out" / "text").exists()

    def test_jit_warns(self, archive, tmp_path, capsys):
        assert gkc("clip-resnet", archive, "--out", tmp_path / "out", "--allow-jit") == 0
        assert "gkc: warning: " in (printed := capsys.readouterr().err) and "runs code of the file" in printed

    def test_errors_name_the_argument(self, archive, tmp_path):
        out = ("--out", tmp_path / "out")
        with pytest.raises(UserError, match=r"WEIGHTS: The file nothing\.pt does not exist"):
            gkc("clip-resnet", "nothing.pt", *out)
        (tmp_path / "notes.pt").write_text("no weights")
        with pytest.raises(UserError, match=r"WEIGHTS: .*notes\.pt: contains more than weights, or is damaged"):
            gkc("clip-resnet", tmp_path / "notes.pt", *out)
        torch.save({"visual.proj": torch.zeros(1)}, tmp_path / "vit.pt")
        with pytest.raises(UserError, match=r"WEIGHTS: .*vit\.pt: These are not the weights of a CLIP ResNet"):
            gkc("clip-resnet", tmp_path / "vit.pt", *out)
        image_only = {name: weight for name, weight in random_weights().items() if name.startswith("visual.")}
        save_file(image_only, tmp_path / "image.safetensors")
        with pytest.raises(UserError, match=r"image\.safetensors: These weights contain no text encoder"):
            gkc("clip-resnet", tmp_path / "image.safetensors", *out, "--text")
        (tmp_path / "damaged.pt").write_bytes(archive.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03", 1))
        with pytest.raises(UserError, match=r"^WEIGHTS: .*damaged\.pt: contains more than weights, or is damaged"):
            gkc("clip-resnet", tmp_path / "damaged.pt", *out)
        save_file(random_weights() | {"visual.conv1.weight": torch.zeros(7)}, tmp_path / "shape.safetensors")
        with pytest.raises(UserError, match=r"shape\.safetensors: .*convolution\.weight \(7,\), not \(2, 3, 3, 3\)"):
            gkc("clip-resnet", tmp_path / "shape.safetensors", *out)
        with pytest.raises(UserError, match=r"--out: .* already exists"):
            gkc("clip-resnet", archive, "--out", archive)
        assert not (tmp_path / "out").exists()


class TestFCCLIP:
    @pytest.fixture
    def files(self, tmp_path) -> dict[str, Path]:
        """Write a checkpoint without CLIP weights, one with them, the CLIP weights, and a tokenizer."""
        golden = recording("convnext")
        weights = {name: weight for name, weight in golden.weights.items() if not name.startswith("backbone.")}
        files = {name: tmp_path / name for name in ("fcclip.pth", "whole.pth", "clip.safetensors", "tokenizer")}
        torch.save({"model": weights, "iteration": 7}, files["fcclip.pth"])
        torch.save({"model": golden.weights}, files["whole.pth"])
        save_file(golden.clip_weights(), files["clip.safetensors"])
        tokenizer_of_recording().save_pretrained(files["tokenizer"])
        return files

    def convert(self, files, checkpoint, *arguments) -> int:
        names = ("--class-names", "cat, kitten; couch; road, street", "--tokenizer", files["tokenizer"])
        return gkc("fc-clip", files[checkpoint], *names, *arguments)

    def test_checkpoint(self, files, tmp_path, capsys):
        clip = ("--clip", files["clip.safetensors"], "--ensemble", "geometric")
        assert self.convert(files, "fcclip.pth", *clip, "--out", tmp_path / "out") == 0
        assert "clip_convnext, 20 queries, ensemble geometric" in (printed := capsys.readouterr()).out
        assert "3 seen classes: cat; couch; road" in printed.out and printed.err == ""
        model = GKCForOpenVocabSegmentation.from_pretrained(tmp_path / "out").eval()
        processor = GKCProcessor.from_pretrained(tmp_path / "out")
        assert (model.config.ensemble, len(processor.prompt_templates)) == ("geometric", 14)
        assert model.vocabulary.is_thing == [True, True, False], "as COCO's classes of these names"
        inputs = processor(np.zeros((40, 60, 3), np.uint8), "kitten; sky", return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        assert outputs.query_embeds.shape == (1, 20, 128) and outputs.class_queries_logits.shape == (1, 20, 3)
        (result,) = processor.post_process_panoptic_segmentation(outputs, target_sizes=inputs["original_sizes"])
        assert result["segmentation"].shape == (40, 60)

    def test_clip_of_the_checkpoint_and_no_ensemble_by_default(self, files, tmp_path, capsys):
        assert self.convert(files, "whole.pth", "--out", tmp_path / "out") == 0
        assert "ensemble none" in capsys.readouterr().out
        model = GKCForOpenVocabSegmentation.from_pretrained(tmp_path / "out")
        assert model.config.ensemble == "none" and model.vocabulary.labels == ["cat", "couch", "road"]

    def test_errors_name_the_argument(self, files, tmp_path):
        out = ("--out", tmp_path / "out")
        with pytest.raises(UserError, match=r"^CHECKPOINT: .*fcclip\.pth holds no CLIP weights: give those"):
            self.convert(files, "fcclip.pth", *out)
        with pytest.raises(UserError, match=r"^CHECKPOINT: The file .*nothing\.pth"):
            self.convert(files | {"nothing.pth": tmp_path / "nothing.pth"}, "nothing.pth", *out)
        with pytest.raises(UserError, match=r"^--clip: .*fcclip\.pth: These are not the weights of a CLIP ResNet"):
            self.convert(files, "fcclip.pth", "--clip", files["fcclip.pth"], *out)
        with pytest.raises(UserError, match=r"^CHECKPOINT: .*clip\.safetensors: These are not the weights of FC-CLIP"):
            self.convert(files, "clip.safetensors", "--clip", files["clip.safetensors"], *out)
        with pytest.raises(UserError, match=r"^--tokenizer: .*clip\.safetensors is a file: give the folder"):
            self.convert(files, "whole.pth", "--tokenizer", files["clip.safetensors"], *out)
        torch.save({"model": {"a": Path("/")}}, files["whole.pth"])
        with pytest.raises(UserError, match=r"^CHECKPOINT: .*whole\.pth: contains more than weights"):
            self.convert(files, "whole.pth", *out)
        assert not (tmp_path / "out").exists()


def test_help_shows_commands_that_exist(capsys):
    for arguments in ((), ("mask2former",), ("clip-resnet",), ("fc-clip",)):
        with pytest.raises(SystemExit) as stop:
            gkc(*arguments, "--help")
        text = capsys.readouterr().out
        assert stop.value.code == 0 and "gkc convert" in text
        assert max(map(len, text.splitlines())) <= 120
        assert ("without a prompt template" in text) == (arguments == ("mask2former",))
