"""Tests of `gkc open` from saved folders: checkpoints that segment, and errors in one line."""

import json
import re
from pathlib import Path

import pytest
from transformers import CLIPVisionModel

from modeling_gkc import GKCForZeroShotSegmentation, GKCImageProcessor, GKCProcessor
from modeling_gkc.cli.main import main

from .conftest import word_tokenizer
from .test_zero_shot import photo
from .zero_shot_toys import CLASSES, SETTINGS, make_segmenter, make_tower


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Write segmenters and image-text models as they lie on the Hub."""
    work = tmp_path_factory.mktemp("open")
    for kind in ("mask2former", "maskformer", "oneformer", "eomt", "gkc"):
        make_segmenter(kind).save_pretrained(work / kind)
        (work / kind / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    word_tokenizer().save_pretrained(work / "oneformer")
    (work / "gkc" / "preprocessor_config.json").unlink()
    GKCProcessor(GKCImageProcessor(**SETTINGS), word_tokenizer()).save_pretrained(work / "gkc")
    for kind in ("clip", "siglip", "clip_resnet"):
        tower, text_model = make_tower(kind)
        tower.save_pretrained(work / kind)
        if text_model is not None:
            text_model.save_pretrained(work / kind / "text")
        word_tokenizer().save_pretrained(work / kind)
    tower_settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    (work / "clip" / "preprocessor_config.json").write_text(json.dumps(tower_settings))
    photo().save(work / "photo.png")
    return work


@pytest.mark.parametrize(
    ("segmenter", "tower"),
    [
        ("mask2former", "clip"),
        ("maskformer", "siglip"),
        ("oneformer", "clip"),
        ("eomt", "clip_resnet"),
        ("gkc", "clip"),
    ],
)
def test_opened_checkpoint_segments(segmenter, tower, folders, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["open", str(folders / segmenter), "--with", str(folders / tower), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert f"{segmenter} with {tower}, 5 classes: {'; '.join(CLASSES)}" in printed.out and printed.err == ""
    arguments = ["--model", str(out), "--labels", "star; sofa, couch; lawn", "--out", str(tmp_path / "results")]
    assert main(["segment", str(folders / "photo.png"), *arguments]) == 0
    result = json.loads((tmp_path / "results" / "photo.json").read_text())
    assert {segment["label"] for segment in result["segments"]} <= {"star", "sofa", "lawn"} and result["segments"]


def test_settings_of_both_models_are_kept(folders, tmp_path):
    out = tmp_path / "out"
    arguments = ["--class-scores", "regions", "--class-names", "cat; couch; lamp; sky; lawn, grass"]
    paths = [str(folders / "mask2former"), "--with", str(folders / "clip"), "--out", str(out)]
    assert main(["open", *paths, *arguments]) == 0
    model = GKCForZeroShotSegmentation.from_pretrained(out)
    assert model.config.class_scores == "regions" and model.config.source_vocabulary[4] == ["lawn", "grass"]
    assert model.config.tower_mean == [0.1, 0.2, 0.3] and model.config.image_mean == SETTINGS["image_mean"]
    processor = GKCProcessor.from_pretrained(out)
    assert processor.image_processor.size == SETTINGS["size"] and processor.prompt_templates == ["{}"]


def test_errors_are_one_line_and_write_nothing(folders, tmp_path, capsys):
    CLIPVisionModel(make_tower("clip")[0].config.vision_config).save_pretrained(tmp_path / "vision")
    capsys.readouterr()
    cases = [
        (("clip", "clip"), "SEGMENTER: .*clip is a clip; supported are mask2former, maskformer, oneformer"),
        (("mask2former", "mask2former"), "--with: .*mask2former is a mask2former; supported are clip, metaclip_2"),
        (("mask2former", str(tmp_path / "vision")), "--with: .*vision is a clip_vision_model; supported are"),
        (("absent/absent/absent", "clip"), "SEGMENTER: .* is not a directory"),
        (("mask2former", "clip", "--class-names", "a; b"), "--class-names: `class_names` has 2 classes, but the sour"),
        (("mask2former", "clip_resnet", "--text-model", str(tmp_path)), "--text-model: cannot load"),
        (("mask2former", "clip", "--text-model", str(tmp_path)), "--text-model: a clip has a text encoder of its own"),
        (("mask2former/config.json", "clip"), "SEGMENTER: .*config.json is a file: give the folder of the checkpoint"),
        (("mask2former", "clip", "--tokenizer", str(tmp_path)), "--tokenizer: .* has no tokenizer"),
    ]
    for (segmenter, tower, *more), message in cases:
        paths = [str(folders / segmenter), "--with", str(folders / tower)]
        assert main(["open", *paths, "--out", str(tmp_path / "out"), *more]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
