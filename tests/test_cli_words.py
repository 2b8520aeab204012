"""Tests of `gkc vocab` and `gkc embed`: printed lines, written files and errors."""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from modeling_gkc import GKCForOpenVocabSegmentation, GKCImageProcessor, GKCProcessor, Vocabulary
from modeling_gkc.cli.common import UserError
from modeling_gkc.cli.parsers import add_embed, add_vocab
from modeling_gkc.encoded_vocabulary import EncodedVocabulary
from modeling_gkc.vocabulary_files import packaged_facts

from .conftest import small_config, word_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    GKCForOpenVocabSegmentation(small_config()).save_pretrained(folder)
    GKCProcessor(GKCImageProcessor(), word_tokenizer()).save_pretrained(folder)
    return folder


def gkc(*arguments) -> int:
    parser = argparse.ArgumentParser(prog="gkc")
    commands = parser.add_subparsers(required=True)
    add_vocab(commands)
    add_embed(commands)
    parsed = parser.parse_args([str(argument) for argument in arguments])
    return parsed.run(parsed)


def table(text: str) -> list[list[str]]:
    """Return the cells of a printed table below its header, which begins with INDEX."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.lstrip().startswith("INDEX"))
    starts = [lines[start].index(word) for word in ("KIND", "COLOR", "LABEL", "SYNONYMS")]
    cuts = list(zip([0, *starts], [*starts, None], strict=True))
    return [[line[begin:end].strip() for begin, end in cuts] for line in lines[start + 1 :]]


class TestList:
    def test_every_packaged_vocabulary_has_a_description(self, capsys):
        assert gkc("vocab", "list") == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["NAME", "CLASSES", "DESCRIPTION"]
        rows = [line.split(maxsplit=2) for line in lines[1:-2]]
        assert [row[0] for row in rows] == Vocabulary.packaged_names()
        for name, num_classes, description in rows:
            assert int(num_classes) == len(Vocabulary.named(name))
            assert description == packaged_facts(name)["description"]
        assert "void" in next(row[2] for row in rows if row[0] == "pascal_voc_background_39")
        assert max(map(len, lines)) <= 100


class TestShow:
    def test_a_packaged_vocabulary(self, capsys):
        assert gkc("vocab", "show", "cityscapes_19") == 0
        output = capsys.readouterr().out
        assert (
            output.startswith("Cityscapes: street scenes\nsource: ")
            and "\n19 classes\n" in output
            and "\33" not in output
        )
        assert table(output)[:2] == [
            ["0", "stuff", "#804080", "road", "street"],
            ["1", "stuff", "#f423e8", "sidewalk", "footpath"],
        ]
        assert [row[3] for row in table(output)] == Vocabulary.named("cityscapes_19").labels

    @pytest.mark.parametrize("name", ["ade20k_847", "coco_panoptic_133"])
    def test_names_are_not_truncated(self, capsys, name):
        assert gkc("vocab", "show", name) == 0
        rows = table(capsys.readouterr().out)
        assert [[row[3], *filter(None, row[4].split(", "))] for row in rows] == Vocabulary.named(name).names

    def test_a_file(self, capsys, tmp_path):
        path = tmp_path / "words.csv"
        path.write_text("name,synonyms,is_thing,color\ndog,hound|puppy,thing,#010203\nsky,,stuff,\nrock,,,\n")
        assert gkc("vocab", "show", path) == 0
        rows = table(capsys.readouterr().out)
        assert rows[0] == ["0", "thing", "#010203", "dog", "hound, puppy"]
        assert [row[1] for row in rows] == ["thing", "stuff", ""]

    def test_colors_are_shown_only_on_a_terminal(self, capsys, monkeypatch):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        assert gkc("vocab", "show", "pascal_voc_20") == 0
        lines = capsys.readouterr().out.splitlines()
        assert "\33[48;2;128;0;0m  \33[0m" in next(line for line in lines if "aeroplane" in line)
        assert sum("\33" in line for line in lines) == 20
        painted = [line.partition("\33[0m ")[2] for line in lines if "\33" in line]
        heading = next(line for line in lines if "INDEX" in line)
        assert all(line[heading.index("LABEL") - 3 :].strip() for line in painted)

    @pytest.mark.parametrize("name", Vocabulary.packaged_names())
    def test_json_of_a_packaged_vocabulary_equals_its_file(self, capsys, tmp_path, name):
        assert gkc("vocab", "show", name, "--json") == 0
        output = capsys.readouterr().out
        assert json.loads(output) == packaged_facts(name)
        (tmp_path / "copy.json").write_text(output)
        assert Vocabulary.parse(tmp_path / "copy.json") == Vocabulary.named(name)

    def test_json_of_a_file_is_equivalent(self, capsys, tmp_path):
        vocabulary = Vocabulary(
            [["dog", "草"], ["sky"]], is_thing=[True, None], colors=[None, (1, 2, 3)], templates=[["my {}"], None]
        )
        path = tmp_path / "words.csv"
        path.write_text("name,synonyms,is_thing,color,templates\ndog,草,thing,,my {}\nsky,,,#010203,\n")
        assert gkc("vocab", "show", path, "--json") == 0
        (tmp_path / "copy.json").write_text(capsys.readouterr().out)
        assert Vocabulary.from_file(tmp_path / "copy.json") == Vocabulary.from_file(path) == vocabulary

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("ade20k", "There is no packaged vocabulary 'ade20k'; did you mean 'ade20k_150' or 'ade20k_847'"),
            ("dog", "There is no packaged vocabulary 'dog'; there are ade20k_150"),
            ("gone.txt", "gone.txt cannot be read: No such file"),
        ],
    )
    def test_missing_vocabularies_raise_errors(self, text, message):
        with pytest.raises(UserError, match=message):
            gkc("vocab", "show", text)

    def test_a_file_with_another_suffix(self, tmp_path):
        (tmp_path / "words.md").write_text("dog")
        with pytest.raises(UserError, match=r"words\.md is not a vocabulary file: .*\.json, \.csv or \.txt"):
            gkc("vocab", "show", tmp_path / "words.md")

    def test_warnings_are_one_line(self, capsys, tmp_path):
        (tmp_path / "words.txt").write_text("stool, seat\nchair, seat\n")
        assert gkc("vocab", "show", tmp_path / "words.txt") == 0
        assert capsys.readouterr().err.startswith("gkc: warning: A name is shared by several classes: 'seat'")

    def test_a_closed_pipe_is_not_an_error(self, monkeypatch):
        """The command ends without an error if its reader stops early, as in `gkc vocab show ade20k_847 | head`."""
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            assert gkc("vocab", "show", "ade20k_847") == 0
            stream.write("more")  # must not raise an error


class TestEmbed:
    def test_the_file_contains_the_embeddings_of_the_model(self, checkpoint, tmp_path, capsys, within):
        out = tmp_path / "new" / "words.safetensors"
        assert gkc("embed", "--labels", "dog; sofa, couch; sky", "--model", checkpoint, "--out", out) == 0
        printed = capsys.readouterr()
        assert printed.out == (
            f"{out}: 3 classes, 4 names, 4 prompts, width 16, text encoder of {checkpoint}\n"
        ) and printed.err == ""  # fmt: skip
        model = GKCForOpenVocabSegmentation.from_pretrained(checkpoint)
        embeddings = EncodedVocabulary.load(out, model)
        vocabulary = embeddings.vocabulary
        assert vocabulary == Vocabulary.parse("dog; sofa, couch; sky")
        expected = model.get_class_embeddings(
            **GKCProcessor.from_pretrained(checkpoint)(text=vocabulary, return_tensors="pt")
        )
        assert torch.equal(embeddings.class_ids, expected.class_ids)
        within("gkc embed", (embeddings.class_embeds - expected.class_embeds).abs().max(), 1e-6)

    def test_templates_are_averaged(self, checkpoint, tmp_path, capsys, within, monkeypatch):
        monkeypatch.setattr("modeling_gkc.cli.embed.PROMPTS_PER_STEP", 5)
        monkeypatch.setattr(
            "modeling_gkc.prompt_templates.PROMPT_TEMPLATES", {"three": ("{}", "red {}", "blue disc {}")}
        )
        out, words = tmp_path / "words.safetensors", "dog; sofa, couch; sky"
        command = ["embed", "--labels", words, "--templates", "three", "--model", checkpoint, "--out", out]
        assert gkc(*command) == 0
        assert "3 classes, 4 names, 12 prompts" in capsys.readouterr().out
        model = GKCForOpenVocabSegmentation.from_pretrained(checkpoint)
        embeddings = EncodedVocabulary.load(out, model)
        prompts = GKCProcessor.from_pretrained(checkpoint)(text=words, prompt_templates="three", return_tensors="pt")
        expected = model.get_class_embeddings(**prompts)
        assert embeddings.class_embeds.shape == (4, 16)
        within("gkc embed", (embeddings.class_embeds - expected.class_embeds).abs().max(), 1e-6)

    def test_a_packaged_vocabulary_keeps_is_thing_and_colors(self, checkpoint, tmp_path, capsys):
        out = tmp_path / "words.safetensors"
        assert gkc("embed", "--labels", "cityscapes_19", "--model", checkpoint, "--out", out) == 0
        assert capsys.readouterr().err.startswith("gkc: warning: The text encoder does not know these words: 'road'")
        model = GKCForOpenVocabSegmentation.from_pretrained(checkpoint)
        assert EncodedVocabulary.load(out, model).vocabulary == Vocabulary.named("cityscapes_19")

    def test_ambiguous_single_classes_cause_a_warning(self, checkpoint, tmp_path, capsys):
        command = ["embed", "--model", checkpoint, "--out", tmp_path / "words.safetensors", "--labels"]
        assert gkc(*command, "red disc, sky") == 0
        assert capsys.readouterr().err.splitlines() == [
            "gkc: warning: 1 class: red disc (also: sky); separate classes by ';', or end the text with ';' if it "
            "is a single class."
        ]
        assert gkc(*command, "red disc, sky;") == 0
        assert capsys.readouterr().err == ""
        with pytest.raises(UserError, match=r"--labels: Classes are separated by ';' .*, not by '\|'"):
            gkc(*command, "red disc | sky")

    def test_progress_bar_on_a_terminal(self, checkpoint, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        command = ["embed", "--labels", "dog; sky", "--model", checkpoint, "--out", tmp_path / "w.safetensors"]
        assert gkc(*command) == 0
        assert "2/2" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"--labels": "dog;;"}, r"--labels: Label 2 \(index 1\) is empty"),
            ({"--labels": "dog " * 20}, "--labels: The prompt 'dog dog.* has 22 tokens"),
            ({"--labels": "ade20k_151"}, "--labels: .*'ade20k_150'"),
            ({"--labels": "gone.csv"}, r"--labels: .*gone\.csv cannot be read"),
            ({"--templates": "vild"}, "--templates: 'vild' is neither .*'vild14'"),
            ({"--out": "words.json"}, r"--out: the file name must end in \.safetensors, got words\.json"),
            (
                {"--out": "/dev/null/x/words.safetensors"},
                "--out: cannot create the folder /dev/null/x: Not a directory",
            ),
            ({"--out": "{folder}.safetensors"}, r"--out: cannot write .*folder\.safetensors"),
            ({"--model": "no/such/folder"}, "--model: no/such/folder is not a directory"),
            ({"--device": "cuda:99"}, "--device: this machine has no device cuda:99"),
        ],
    )
    def test_errors_are_one_line(self, checkpoint, tmp_path, changes, message):
        folder = tmp_path / "folder.safetensors"
        folder.mkdir()
        options = {"--labels": "dog", "--model": checkpoint, "--out": tmp_path / "words.safetensors"} | changes
        options["--out"] = str(options["--out"]).replace("{folder}.safetensors", str(folder))
        with pytest.raises(UserError, match=message) as caught:
            gkc("embed", *(part for option in options.items() for part in option))
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == [folder]
