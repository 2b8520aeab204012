"""Tests of `hub_card.publish_all` with small stand-ins for the public checkpoints."""

import argparse
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

from hub_card import publish_all
from hub_card.publish_all import MODELS, PublicModel, main, model_table
from modeling_gkc.cli import parsers
from modeling_gkc.image_processing_gkc import GKCImageProcessor
from train.data import prepare
from train.data.benchmarks import miniworld

from .zero_shot_toys import SETTINGS, TEXT, make_segmenter

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "hub_card" / "gkc-mini"
WORDS = "round; square; triangle; grass; sky"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, Path]:
    """Write a small Mask2Former and the CLIP text encoder of its five words."""
    folder = tmp_path_factory.mktemp("stand-ins")
    make_segmenter("mask2former").save_pretrained(folder / "segmenter")
    values = GKCImageProcessor(**SETTINGS).to_dict() | {"image_processor_type": "Mask2FormerImageProcessor"}
    (folder / "segmenter" / "preprocessor_config.json").write_text(json.dumps(values))
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    lengths = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    torch.manual_seed(0)
    text = CLIPTextConfig(**TEXT | tokens | lengths)
    CLIPTextModelWithProjection(text).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return {"owner/segmenter": folder / "segmenter", "owner/text": folder / "text"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Prepare three drawn scenes."""
    folder = tmp_path_factory.mktemp("data")
    world = str(folder / "world")
    assert miniworld.main(["--out", world, "--train-scenes", "1", "--val-scenes", "3"]) == 0
    assert prepare.main(["miniworld", "--source", world, "--out", str(folder / "miniworld"), "--split", "val"]) == 0
    return folder


@pytest.fixture
def models(monkeypatch) -> tuple[PublicModel, PublicModel]:
    """Replace the table by a model with stand-ins and one whose source must be downloaded by hand."""
    facts = {
        "license": "mit",
        "license_note": "Segmenter: MIT; text encoder: MIT",
        "published": "none",
        "parameters": 1,
        "speed": "fast",
        "benchmarks": ("miniworld", "ade20k_150"),
    }
    command = ("convert", "mask2former", "{0}", "--text-model", "{1}", "--class-names", WORDS)
    rows = (
        PublicModel("absent", ("absent.pth",), ("convert", "fc-clip", "{0}"), **facts),
        PublicModel("small", ("owner/segmenter", "owner/text"), command, **facts),
    )
    monkeypatch.setattr(publish_all, "MODELS", rows)
    return rows


def run(stand_ins: dict[str, Path], *arguments) -> int:
    sources = [value for pair in stand_ins.items() for value in ("--source", "{}={}".format(*pair))]
    return main([*sources, *map(str, arguments)])


def test_models_are_converted_evaluated_and_written_for_the_hub(models, stand_ins, data, tmp_path, capfd):
    arguments = ("--data", data, "--out", tmp_path, "--only", "absent", "small", "--dry-run")
    assert run(stand_ins, *arguments) == 1, "a failing model does not stop the others"
    out, err = capfd.readouterr()
    hint = "absent: error: absent.pth is not on the Hub: download it and give it by --source absent.pth=PATH"
    assert hint in err and len(err.splitlines()) == 1
    assert f"not evaluated on ade20k_150: {data / 'ade20k_150'} is not a directory" in out
    hub = tmp_path / "small" / "hub"
    assert f"files ({sum(p.stat().st_size for p in hub.iterdir()) / 1e6:.1f} MB) of {hub} to USER/small" in out
    card = (hub / "README.md").read_text()
    _, front_matter, text = card.split("---\n", 2)
    metadata = yaml.safe_load(front_matter)
    assert metadata["base_model"] == ["owner/segmenter", "owner/text"] and metadata["license"] == "mit"
    (result,) = (json.loads(path.read_text()) for path in (tmp_path / "small" / "results").glob("*.json"))
    recorded = {entry["type"]: entry["value"] for entry in metadata["model-index"][0]["results"][0]["metrics"]}
    assert result["per_cent"]["semantic"]["miou"] in [pytest.approx(value, abs=0.06) for value in recorded.values()]
    assert "<<" not in card and f"--class-names '{WORDS}' --out small" in text

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "small" / "checkpoint").iterdir()}
    assert run({}, *arguments[:4], "--only", "small", "--dry-run") == 0, "finished steps need no source"
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "small" / "checkpoint").iterdir()}
    assert not list((tmp_path / "small").glob("tmp*"))


def test_folder_is_uploaded_to_the_named_user(models, tmp_path, monkeypatch):
    calls = []
    shutil.copytree(SHIPPED, tmp_path / "small" / "checkpoint")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **_: calls.append(name))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **options: calls.append(options))
    assert run({}, "--out", tmp_path, "--only", "small", "--to", "someone") == 0
    assert calls[0] == "someone/small" and calls[1]["folder_path"] == tmp_path / "small" / "hub"
    assert "has not been evaluated" in (tmp_path / "small" / "hub" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--to: name the Hub user"),
        (["--to", "someone"], "no Hub token"),
        (["--dry-run", "--source", "nothing=x"], "--source: nothing=x: expected CHECKPOINT=PATH with one of"),
        (["--dry-run", "--source", "owner/text=/absent"], "--source: /absent does not exist"),
    ],
)
def test_errors_are_one_line_before_any_work(arguments, message, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main([*arguments, "--out", str(tmp_path / "out"), "--only", "small"]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_failed_step_is_one_line(models, stand_ins, tmp_path, capfd):
    wrong = stand_ins | {"owner/text": stand_ins["owner/segmenter"]}
    assert run(wrong, "--out", tmp_path, "--only", "small", "--dry-run") == 1
    err = capfd.readouterr().err
    assert "small: error: -m modeling_gkc convert: gkc: error: --text-model" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "small" / "checkpoint").exists()


def test_table_of_the_documentation_is_that_of_the_command(capsys):
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.strip() == model_table(MODELS)
    assert model_table(MODELS) in (ROOT / "docs" / "photographs.md").read_text()


def test_commands_of_the_table_can_be_parsed():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for add in (parsers.add_convert, parsers.add_open):
        add(commands)
    for model in MODELS:
        command = [argument.format(*model.sources) for argument in model.command]
        assert parser.parse_args([*command, "--out", "x"]).out == "x"
