"""The packaged vocabularies: facts of the benchmarks, held against what is known about them from elsewhere."""

import configparser
import hashlib
import itertools
import json
import warnings
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_gkc import vocabulary_files
from modeling_gkc.vocabulary import Vocabulary
from modeling_gkc.vocabulary_files import PACKAGED_NAMES, packaged_entries, packaged_facts

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "modeling_gkc" / "vocabularies"
# Classes, things, classes with a colour, synonyms, void value, and a digest of ids, official names, kinds and colours,
# computed from the official lists by a program that shares nothing with the library.
FACTS = {
    "ade20k_150": (150, 100, 150, 176, 255, "51a1b29ef292de9f"),
    "ade20k_847": (847, 0, 0, 394, 65535, "3515427542c84751"),
    "cityscapes_19": (19, 8, 19, 16, 255, "71ecab91e87977de"),
    "coco_panoptic_133": (133, 80, 133, 429, 255, "e29559122901d8b3"),
    "coco_stuff_171": (171, 80, 116, 469, 255, "4105d1393ea68427"),
    "pascal_context_459": (459, 0, 0, 74, 65535, "cca9750097c4e560"),
    "pascal_context_59": (59, 0, 0, 44, 255, "ee5687e7663be2af"),
    "pascal_voc_20": (20, 20, 20, 14, 255, "e0824149e2a4168b"),
    "pascal_voc_21": (21, 20, 21, 14, 255, "9ae1add23318928c"),
    "vipseg_124": (124, 58, 124, 63, 255, "f0079e5668db48a9"),
    "vspw_124": (124, 0, 0, 63, 255, "4888b34f764e8af0"),
}
BACKGROUND = "pascal_voc_background_39"


def classes(name: str) -> list[dict]:
    return packaged_facts(name)["classes"]


def ids(name: str) -> list[int]:
    return [entry["id"] for entry in classes(name)]


def official(entry: dict) -> str:
    return entry.get("official_name", entry["name"])


@pytest.fixture
def fresh_cache():
    packaged_entries.cache_clear()
    yield
    packaged_entries.cache_clear()


class TestFacts:
    @pytest.mark.parametrize("name", FACTS)
    def test_against_the_official_lists(self, name):
        facts = packaged_facts(name)
        rows = [[entry["id"], official(entry), entry["is_thing"], entry["color"]] for entry in facts["classes"]]
        num_classes, num_things, num_colors, num_synonyms, void, digest = FACTS[name]
        assert len(rows) == num_classes
        assert sum(bool(row[2]) for row in rows) == num_things
        assert sum(row[3] is not None for row in rows) == num_colors
        assert sum(len(entry["synonyms"]) for entry in facts["classes"]) == num_synonyms
        assert facts["ignore_index"] == void
        assert hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16] == digest

    @pytest.mark.parametrize(
        ("name", "spots"),
        {
            "ade20k_150": {0: "wall", 1: "building", 8: "windowpane", 12: "person", 20: "car", 149: "flag"},
            "ade20k_847": {0: "wall", 3: "tree", 114: "bag", 130: "pot, flowerpot", 846: "adding machine"},
            "cityscapes_19": {0: "road", 10: "sky", 11: "person", 12: "rider", 13: "car", 18: "bicycle"},
            "coco_panoptic_133": {0: "person", 79: "toothbrush", 80: "banner", 116: "tree", 132: "rug"},
            "coco_stuff_171": {0: "person", 79: "toothbrush", 80: "banner", 170: "wood"},
            "pascal_context_59": {0: "aeroplane", 1: "bag", 31: "keyboard", 33: "motorbike", 58: "wood"},
            "pascal_context_459": {0: "accordion", 1: "aeroplane", 430: "unknown", 458: "wool"},
            "pascal_voc_20": {0: "aeroplane", 14: "person", 19: "tv monitor"},
            "pascal_voc_21": {0: "background", 15: "person", 20: "tv monitor"},
            "vipseg_124": {0: "wall", 1: "ceiling", 123: "train"},
            "vspw_124": {0: "wall", 1: "ceiling", 123: "train"},
        }.items(),
    )
    def test_training_order_at_well_known_places(self, name, spots):
        labels = Vocabulary.named(name).labels
        assert {index: labels[index] for index in spots} == spots

    def test_ids_of_the_annotation_files(self):
        assert ids("ade20k_150") == list(range(1, 151))
        assert ids("pascal_context_459") == list(range(1, 460))
        assert ids("pascal_voc_20") == list(range(1, 21)) and ids("pascal_voc_21") == list(range(21))
        assert ids("vspw_124") == list(range(1, 125)) and ids("vipseg_124") == list(range(124))
        assert ids("cityscapes_19") == [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
        assert ids("pascal_context_59") == sorted(ids("pascal_context_59"))
        things = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # COCO's first 90 ids without those never annotated
        assert ids("coco_panoptic_133")[:80] == [index for index in range(1, 91) if index not in things]
        assert ids("coco_panoptic_133")[80:] == sorted(ids("coco_panoptic_133")[80:])

    def test_colors_of_pascal_voc_follow_its_formula(self):
        """The devkit spreads the bits of a class over the channels, highest bit first."""

        def formula(index: int) -> list[int]:
            color = [0, 0, 0]
            for shift in range(8):
                for channel in range(3):
                    color[channel] |= (index >> (3 * shift + channel) & 1) << (7 - shift)
            return color

        assert [entry["color"] for entry in classes("pascal_voc_21")] == [formula(index) for index in range(21)]
        assert classes("pascal_voc_21")[1:] == classes("pascal_voc_20")

    def test_lists_of_one_dataset_agree(self):
        """Classes that two lists share have the same name, kind, and ids that differ as the formats say."""
        panoptic, stuff = classes("coco_panoptic_133"), classes("coco_stuff_171")
        assert [(c["name"], c["id"] - 1) for c in panoptic[:80]] == [(c["name"], c["id"]) for c in stuff[:80]]
        assert all(c["is_thing"] for c in panoptic[:80] + stuff[:80])
        assert not any(c["is_thing"] for c in panoptic[80:] + stuff[80:])
        video, frames = classes("vipseg_124"), classes("vspw_124")
        assert [(c["name"], c["id"] + 1) for c in video] == [(c["name"], c["id"]) for c in frames]
        all_context = {c["id"]: c["name"] for c in classes("pascal_context_459")}
        assert all(all_context[c["id"]] == c["name"] for c in classes("pascal_context_59"))

    def test_background_words_are_pascal_context_without_pascal_voc(self):
        objects = {name.casefold() for name in Vocabulary.named("pascal_voc_20").flat_names}
        expected = {label for label in Vocabulary.named("pascal_context_59").labels if label not in objects}
        words = Vocabulary.named(BACKGROUND)
        assert set(words.labels) == expected and len(words) == 39 and words.flat_names == words.labels
        context = {c["name"]: c["id"] for c in classes("pascal_context_59")}
        assert {c["name"]: c["id"] for c in classes(BACKGROUND)}.items() <= context.items()
        assert packaged_facts("pascal_voc_21")["background"] == BACKGROUND
        assert len(Vocabulary.named("pascal_voc_20").with_void(BACKGROUND)[1]) == 39

    @pytest.mark.parametrize(
        ("name", "novel"),
        [
            (
                "coco_panoptic_133",
                "bicycle, suitcase, cow, giraffe, bridge, keyboard, apple, carrot, toilet, playing field, scissors, "
                "wine glass, stop sign, cardboard, frisbee, skateboard, stone wall, river",
            ),
            (
                "vipseg_124",
                "basket, bathtub, blackboard, box, fan, ice, instrument, printer, trash can, tyre, grandstand, pillar",
            ),
        ],
    )
    def test_classes_held_out_by_the_method(self, name, novel):
        labels = {entry["id"]: entry["name"] for entry in classes(name)}
        assert sorted(labels[index] for index in packaged_facts(name)["novel_ids"]) == sorted(novel.split(", "))

    def test_benchmark_facts_are_kept(self):
        ade = classes("ade20k_150")
        assert sum(entry["stuff35"] for entry in ade) == 35
        assert not any(entry["stuff35"] and entry["is_thing"] for entry in ade)
        assert sum("detectron2_name" in entry for entry in ade) == 42
        lines = [entry["labels59_txt_id"] for entry in classes("pascal_context_59")]
        assert sorted(lines) == list(range(1, 60)) and lines[0] == 1
        assert {entry["name"]: entry.get("gkc_name") for entry in classes("coco_panoptic_133")}["door"] == "door stuff"
        assert len({entry["supercategory"] for entry in classes("coco_stuff_171")}) == 27


class TestWords:
    @pytest.mark.parametrize("name", PACKAGED_NAMES)
    def test_loading_is_silent_and_matches_the_file(self, name):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vocabulary = Vocabulary.named(name)
        entries = classes(name)
        assert vocabulary.names == [[entry["name"], *entry["synonyms"]] for entry in entries]
        assert vocabulary.palette == Vocabulary.parse(name).palette
        for index, entry in enumerate(entries):
            assert entry["is_thing"] == (vocabulary.is_thing[index] if vocabulary.is_thing else None)
            color = vocabulary.colors[index] if vocabulary.colors else None
            assert entry["color"] == (None if color is None else list(color))
        assert vocabulary.templates is None

    @pytest.mark.parametrize("name", PACKAGED_NAMES)
    def test_every_word_stands_for_one_class(self, name):
        entries = classes(name)
        words = Counter(word.casefold() for entry in entries for word in [entry["name"], *entry["synonyms"]])
        assert [word for word, count in words.items() if count > 1] == []
        for entry in entries:
            for word in [entry["name"], *entry["synonyms"]]:
                assert word and "_" not in word and word == " ".join(word.split())

    def test_repeated_first_names_of_ade20k_847_are_told_apart(self):
        """Nine first names stand for two or three classes, which then go by all their words."""
        whole = [entry["name"] for entry in classes("ade20k_847") if ", " in entry["name"]]
        first = {label.partition(", ")[0] for label in whole}
        assert first == {"bag", "pot", "basket", "screen", "pier", "control panel", "pipe", "grill", "patio"}
        labels = Vocabulary.named("ade20k_847").labels
        counts = Counter(label.partition(", ")[0] for label in labels)
        assert {word: counts[word] for word in first} == dict.fromkeys(first, 2) | {"bag": 3}
        assert len(set(labels)) == 847

    @pytest.mark.parametrize("name", ["ade20k_150", "ade20k_847"])
    def test_official_names_of_ade20k_are_complete(self, name):
        """What is not a synonym stands for another class too."""
        entries = classes(name)
        official_words = [official(entry).split(", ") for entry in entries]
        counts = Counter(word.casefold() for words in official_words for word in words)
        for entry, words in zip(entries, official_words, strict=True):
            missing = set(words) - {entry["name"], *entry["synonyms"]}
            assert all(counts[word.casefold()] > 1 for word in missing)
            assert set(entry["synonyms"]) <= set(words)

    def test_colors_are_seen_apart_where_the_benchmark_gives_none(self):
        palette = Vocabulary.named("coco_stuff_171").palette
        given = {tuple(entry["color"]) for entry in classes("coco_stuff_171") if entry["color"]}
        chosen = [color for entry, color in zip(classes("coco_stuff_171"), palette, strict=True) if not entry["color"]]
        assert len(chosen) == len(set(chosen)) == 55 and not given & set(chosen)


class TestPackage:
    def test_listed_vocabularies_are_the_packaged_files(self):
        assert sorted(path.stem for path in FOLDER.glob("*.json")) == list(PACKAGED_NAMES)
        assert Vocabulary.packaged_names() == sorted([*FACTS, BACKGROUND])
        for name in PACKAGED_NAMES:
            facts = packaged_facts(name)
            assert facts["name"] == name and name.endswith(f"_{len(facts['classes'])}")
            assert all(facts[key] and "\n" not in facts[key] for key in ("description", "source", "ids"))

    def test_all_files_go_into_the_wheel(self):
        config = configparser.ConfigParser()
        config.read(ROOT / "setup.cfg")
        patterns = config["options.package_data"]["modeling_gkc"].split()
        files = [str(path.relative_to(FOLDER.parent)) for path in FOLDER.iterdir()]
        assert [file for file in files if not any(fnmatch(file, pattern) for pattern in patterns)] == []
        assert "modeling_gkc/vocabularies/WORDNET-LICENSE.txt" in config["metadata"]["license_files"].split()

    def test_code_beside_a_checkpoint_finds_the_installed_package(self, monkeypatch, tmp_path, fresh_cache):
        monkeypatch.setattr(vocabulary_files, "__file__", str(tmp_path / "vocabulary_files.py"))
        assert len(Vocabulary.parse("ade20k_150")) == 150

    def test_error_without_the_package_names_the_source_of_the_vocabulary(self, monkeypatch, tmp_path, fresh_cache):
        monkeypatch.setattr(vocabulary_files, "__file__", str(tmp_path / "vocabulary_files.py"))
        monkeypatch.setattr(vocabulary_files.importlib.util, "find_spec", lambda name: None)
        for call in (Vocabulary.named, Vocabulary.parse):
            with pytest.raises(ValueError, match=r"'ade20k_150' is part of the package.*pip install"):
                call("ade20k_150")
        assert Vocabulary.parse("dog; cat").labels == ["dog", "cat"]

    def test_code_beside_a_checkpoint_has_every_module(self):
        copied = {Path(path).stem for path in get_relative_import_files(ROOT / "modeling_gkc" / "processing_gkc.py")}
        assert {"vocabulary", "vocabulary_files", "prompt_templates"} <= copied


class TestNames:
    @pytest.mark.parametrize("text", ["ade20k_150", " ade20k_150\n"])
    def test_a_packaged_name_is_parsed(self, text):
        assert Vocabulary.parse(text) == Vocabulary.named("ade20k_150")

    def test_changing_one_does_not_change_the_next(self):
        vocabulary = Vocabulary.named("cityscapes_19")
        vocabulary.names[0].append("motorway")
        vocabulary.is_thing[0] = None
        assert Vocabulary.named("cityscapes_19").names[0] != vocabulary.names[0]
        assert Vocabulary.named("cityscapes_19").is_thing[0] is False

    @pytest.mark.parametrize(
        ("text", "meant"),
        [
            ("ade20k_151", "'ade20k_150'"),
            ("ADE20K-150", "'ade20k_150'"),
            ("ade20k 847", "'ade20k_847'"),
            ("ade20k", "'ade20k_150' or 'ade20k_847'"),
            ("cityscapes", "'cityscapes_19'"),
            ("cityscape_19", "'cityscapes_19'"),
            ("coco_133", "'coco_panoptic_133'"),
            ("voc_20", "'pascal_voc_20'"),
            ("pascal_voc_background", "'pascal_voc_background_39'"),
        ],
    )
    def test_a_misspelled_name_is_refused_with_the_nearest(self, text, meant):
        with pytest.raises(ValueError, match=f"did you mean {meant}.*") as caught:
            Vocabulary.parse(text)
        assert Vocabulary.parse([text]).labels == [text] and f"['{text}']" in str(caught.value)

    @pytest.mark.parametrize("text", ["voc_2012", "coco_80", " lvis_1203\n", "my_words2"])
    def test_a_word_that_can_only_be_a_name_is_refused(self, text):
        with pytest.raises(
            ValueError, match=f"no packaged vocabulary '{text.strip()}'; .*`gkc vocab list` lists them"
        ):
            Vocabulary.parse(text)
        assert Vocabulary.parse([text]).labels == [text.strip()]
        assert Vocabulary.parse(f"{text}; dog").labels == [text.strip(), "dog"]

    @pytest.mark.parametrize(
        "label",
        ["dog", "coco", "pascal", "coconut", "city", "route66", "f-16", "iphone 15", "4x4", "t_shirt", "1", "草"],
    )
    def test_plain_word_is_a_label(self, label):
        assert Vocabulary.parse(label).labels == [label]

    def test_no_label_of_a_packaged_vocabulary_looks_like_a_misspelled_name(self):
        for label in itertools.chain.from_iterable(Vocabulary.named(name).flat_names for name in PACKAGED_NAMES):
            vocabulary_files.check_packaged_name(label)

    def test_an_unknown_name_lists_the_known(self):
        with pytest.raises(ValueError, match=r"no packaged vocabulary 'lvis'; there are ade20k_150, .*, vspw_124"):
            Vocabulary.named("lvis")
        with pytest.raises(ValueError, match=r"did you mean 'vspw_124'"):
            Vocabulary.named("vspw_125")

    def test_a_packaged_name_among_labels_is_refused(self):
        with pytest.raises(ValueError, match="'ade20k_150' is a packaged vocabulary"):
            Vocabulary.parse("unicorn; ade20k_150")
