"""Tests of `gkc export`: passed options, printed lines and errors."""

import argparse
import json
import shlex
from pathlib import Path

import pytest
import torch

from modeling_gkc import GKCForOpenVocabSegmentation, GKCImageProcessor, GKCProcessor
from modeling_gkc.cli import export as export_command
from modeling_gkc.cli import main
from modeling_gkc.cli.common import UserError
from modeling_gkc.cli.parsers import add_export
from modeling_gkc.encoded_vocabulary import EncodedVocabulary
from modeling_gkc.export import exporter

from .conftest import small_config, word_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = small_config(encoder_layers=1, decoder_layers=1)
    GKCForOpenVocabSegmentation(config).bfloat16().save_pretrained(folder)
    GKCProcessor(GKCImageProcessor(), word_tokenizer()).save_pretrained(folder)
    return folder


def gkc(*arguments) -> int:
    parser = argparse.ArgumentParser(prog="gkc")
    add_export(parser.add_subparsers(required=True))
    parsed = parser.parse_args([str(argument) for argument in arguments])
    return parsed.run(parsed)


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """Record the arguments of `export_segmenter` and skip writing the graph."""
    asked = []
    write = exporter.export_segmenter

    def export_segmenter(model, processor, folder, **settings):
        asked.append(settings | {"templates": processor.prompt_templates})
        return write(model, processor, folder, **settings | {"check": False})

    monkeypatch.setattr(export_command, "export_segmenter", export_segmenter)
    monkeypatch.setattr(exporter, "trace", lambda *arguments: None)
    monkeypatch.setattr(exporter, "write_onnx", lambda program, path, *settings: path.write_bytes(b"graph"))
    return asked


def test_torch_export_end_to_end(checkpoint, tmp_path, capsys):
    out = tmp_path / "two words"
    arguments = ("--vocab", "dog; sofa, couch", "--format", "torch-export", "--size", "64x96", "--out", out)
    assert gkc("export", checkpoint, *arguments) == 0
    assert {path.name for path in out.iterdir()} == {"model.pt2", "export.json", "class_embeds.npz"}
    printed = capsys.readouterr()
    graph, dtype, _, hint = printed.out.splitlines()
    assert graph.startswith(f"{out / 'model.pt2'}: ") and "images of 64 x 96, 2 classes (in class_embeds.npz" in graph
    assert "masks within " in graph and dtype == "the checkpoint's weights are bfloat16, the graph's float32"
    assert hint.strip() == f"torch.export.load({str(out / 'model.pt2')!r}).module()" + (
        "(pixel_values=pixel_values, class_embeds=class_embeds)"
    )
    steps = printed.err.splitlines()
    assert steps[0] == "gkc: tracing the image path at 64 x 96" and len(steps) == 3
    settings = json.loads((out / "export.json").read_text())
    assert [entry["name"] for entry in settings["classes"]] == ["dog", "sofa"]
    assert settings["inputs"]["pixel_values"] == ["batch", 3, 64, 96]


def test_the_printed_command_can_be_run(checkpoint, tmp_path, calls, capsys):
    out = tmp_path / "two words"
    assert gkc("export", checkpoint, "--labels", "dog; lamp", "--out", out) == 0
    graph, _, _, hint = capsys.readouterr().out.splitlines()
    assert "not compared with the model" in graph and "opset 18" in graph
    assert shlex.split(hint) == ["python", str(out / "run.py"), str(out), "photo.jpg", "labels.png"]
    assert Path(shlex.split(hint)[1]).is_file()


def test_options_are_passed_to_the_exporter(checkpoint, tmp_path, calls):
    options = ("--size", "480×640", "--fixed", "--opset", "20", "--templates", "photo", "--no-check")
    assert gkc("export", checkpoint, "--vocab", "dog; lamp", *options, "--out", tmp_path / "new") == 0
    (asked,) = calls
    assert asked["format"] == "onnx" and asked["size"] == (480, 640) and asked["opset"] == 20
    assert asked["fixed"] and not asked["check"] and asked["templates"] == ["a photo of a {}."]
    assert asked["vocabulary"].labels == ["dog", "lamp"]


def test_vocabulary_encoded_by_gkc_embed(checkpoint, tmp_path, calls):
    model = GKCForOpenVocabSegmentation.from_pretrained(checkpoint).eval()
    encoded = EncodedVocabulary.encode("star; air, sky", model, GKCProcessor.from_pretrained(checkpoint))
    encoded.save(tmp_path / "words.safetensors", model)
    assert gkc("export", checkpoint, "--vocab", tmp_path / "words.safetensors", "--out", tmp_path / "new") == 0
    assert calls[0]["vocabulary"].labels == ["star", "air"]
    assert torch.equal(calls[0]["vocabulary"].class_embeds, encoded.class_embeds)


def test_words_of_the_checkpoint(checkpoint, tmp_path, calls):
    model, processor = (
        GKCForOpenVocabSegmentation.from_pretrained(checkpoint),
        GKCProcessor.from_pretrained(checkpoint),
    )
    model.set_vocabulary("dog; sofa, couch; lamp", processor)
    model.save_pretrained(tmp_path / "stored")
    processor.save_pretrained(tmp_path / "stored")
    assert gkc("export", tmp_path / "stored", "--out", tmp_path / "new") == 0
    settings = json.loads((tmp_path / "new" / "export.json").read_text())
    assert [entry["name"] for entry in settings["classes"]] == ["dog", "sofa", "lamp"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab", "dog", "--size", "500"], "--size: The sides must be multiples of 32, got 500x500: use 512x512"),
        (["--vocab", "dog", "--size", "big"], "--size: give one side or HEIGHTxWIDTH in pixels"),
        (["--vocab", "dog; ;lamp"], "--vocab: "),
        (["--vocab", "ade20k_15"], "--vocab: "),
        (["--vocab", "absent.safetensors"], "--vocab: "),
        (["--templates", "photo"], "--templates needs typed words: give --vocab"),
        (["--vocab", "dog", "--templates", "photos"], "--templates: "),
        (["--vocab", "dog", "--opset", "9"], "export: The opset must be at least 18, got 9"),
        ([], "the checkpoint stores no vocabulary: give one with --vocab"),
    ],
)
def test_errors_are_one_line_and_write_nothing(checkpoint, tmp_path, options, message):
    with pytest.raises(UserError) as raised:
        gkc("export", checkpoint, *options, "--out", tmp_path / "new")
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_not_overwritten(checkpoint, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--out: .* already exists: name a new folder"):
        gkc("export", checkpoint, "--vocab", "dog", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_an_empty_output_folder_is_accepted(checkpoint, tmp_path, calls):
    (tmp_path / "new").mkdir()
    assert gkc("export", checkpoint, "--vocab", "dog", "--out", tmp_path / "new") == 0
    assert (tmp_path / "new" / "run.py").is_file()


def test_missing_packages(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as raised:
        gkc("export", checkpoint, "--vocab", "dog", "--out", tmp_path / "new")
    assert str(raised.value) == "--format onnx: Cannot import onnx and onnxscript: run pip install onnx onnxscript"


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"DIR: .*absent is not a directory"):
        gkc("export", tmp_path / "absent", "--vocab", "dog", "--out", tmp_path / "new")


def test_export_is_listed_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    printed = capsys.readouterr().out
    assert "run.py" in printed and max(map(len, printed.splitlines())) <= 120
    assert main(["export", "--vocab", "dog", "--size", "31", "--out", "absent-folder"]) == 2
    assert capsys.readouterr().err.startswith("gkc: error: --size: ")
