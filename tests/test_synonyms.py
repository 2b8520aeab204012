"""Lists of synonyms from WordNet: the rules on a miniature, the curated list of COCO, and the real thing."""

import json
import re
import warnings

import pytest

from modeling_gkc.vocabulary import Vocabulary
from modeling_gkc.vocabulary_files import packaged_facts
from modeling_gkc.vocabulary_provenance import (
    ORIGINS,
    WordOrigin,
    packaged_provenance,
    provenance_path,
    read_provenance,
    write_provenance,
)
from tests.wordnet_miniature import real_wordnet, write_wordnet
from train.data.wordnet.database import open_wordnet
from train.data.wordnet.synonyms import (
    Correction,
    NamedClass,
    build_synonyms,
    choose_sense,
    main,
    read_corrections,
    spellings,
    word_key,
)

FROM_WORDNET = {"lemma", "hyponym", "deeper hyponym", "hypernym", "sister"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wordnet(tmp_path_factory.mktemp("miniature"))


@pytest.fixture(scope="module")
def wordnet(folder):
    return open_wordnet(folder)


def built(wordnet, *classes, **limits) -> list[list[str]]:
    named = [NamedClass(item) if isinstance(item, str) else item for item in classes]
    return [[origin.word for origin in row] for row in build_synonyms(named, wordnet, **limits)]


def sense(wordnet, label, **facts) -> str | None:
    chosen = choose_sense(NamedClass(label, **facts), wordnet)
    return chosen and chosen.name()


class TestSense:
    def test_sense_is_chosen_by_supercategory_then_kind_then_order(self, wordnet):
        assert sense(wordnet, "kite", supercategory="sports") == "kite.n.03"
        assert sense(wordnet, "kite", supercategory="animal") == "kite.n.02"
        assert sense(wordnet, "kite", is_thing=True) == "kite.n.02"  # the first that can be seen
        assert sense(wordnet, "kite", is_thing=False) == "kite.n.03"  # no animal is stuff
        assert sense(wordnet, "kite", supercategory="water") == "kite.n.01"  # none fits: the first
        assert sense(wordnet, "mouse") == "mouse.n.01" and sense(wordnet, "mouse", supercategory="electronic") == (
            "mouse.n.03"
        )
        assert sense(wordnet, "banana", supercategory="food") == "banana.n.02"

    def test_given_synonyms_decide_the_sense_first(self, wordnet):
        assert sense(wordnet, "mouse", given=("computer mouse",), supercategory="animal") == "mouse.n.03"
        assert sense(wordnet, "banana", given=("banana-tree",), supercategory="food") == "banana.n.01"

    @pytest.mark.parametrize(
        ("label", "found"),
        {
            "wine bottle": "wine_bottle.n.01",
            "wine_bottles": "wine_bottle.n.01",
            "wine glass": "wineglass.n.01",
            "wine-glass": "wineglass.n.01",
            "wall-stone": "stone_wall.n.01",
            "Bottle": "bottle.n.01",
            "dog-other-merged": "dog.n.01",
            "mice": "mouse.n.01",
            "unicorn": None,
        }.items(),
    )
    def test_spellings_of_a_label(self, wordnet, label, found):
        assert sense(wordnet, label) == found

    def test_label_comes_before_its_other_spellings(self):
        assert spellings("wall-stone") == ["wall-stone", "wall stone", "wallstone", "stone wall"]


class TestRules:
    def test_label_first_then_lemmas_then_kinds_without_latin_and_breeds(self, wordnet):
        assert built(wordnet, "dog") == [["dog", "domestic dog", "puppy"]]

    def test_a_word_that_first_means_something_else_is_left_out(self, wordnet):
        assert built(wordnet, "car") == [["car", "auto"]]  # machine

    def test_kinds_are_tagged_or_used_compounds(self, wordnet):
        assert built(wordnet, "bottle") == [["bottle", "flask", "wine bottle"]]  # neither phial nor ampulla bottle
        assert built(wordnet, "bottle", max_kinds=1) == [["bottle", "flask"]]
        assert built(wordnet, "bottle", max_words=2) == [["bottle", "flask"]]

    def test_hyponym_that_is_a_class_is_not_a_synonym(self, wordnet):
        assert built(wordnet, "bottle", "wine-bottle") == [["bottle", "flask"], ["wine-bottle", "wine bottle"]]
        assert built(wordnet, "dog", NamedClass("whelp", given=("Puppies",)))[0] == ["dog", "domestic dog"]

    def test_word_of_two_classes_is_given_to_neither(self, wordnet):
        assert built(wordnet, "wall stone", "rubble-wall") == [["wall stone"], ["rubble-wall", "rubble wall"]]
        device = NamedClass("cursor mouse", correction=Correction(synset="mouse.n.03"))
        other = NamedClass("pointer", correction=Correction(synset="mouse.n.03"))
        assert built(wordnet, device, other) == [["cursor mouse"], ["pointer"]]

    def test_given_synonyms_are_kept_before_those_of_wordnet(self, wordnet):
        row = build_synonyms([NamedClass("dog", given=("hound",))], wordnet)[0]
        assert [(origin.word, origin.origin) for origin in row] == [
            ("dog", "name"),
            ("hound", "given"),
            ("domestic dog", "lemma"),
            ("puppy", "hyponym"),
        ]
        assert {origin.synset for origin in row} == {"dog.n.01"}
        offset = wordnet.synset("dog.n.01").offset()
        assert {origin.wnid for origin in row} == {f"n{offset:08d}"}

    def test_corrections(self, wordnet):
        def corrected(label, **fields):
            return built(wordnet, NamedClass(label, correction=Correction(**fields)))[0]

        assert corrected("kite", synset="kite.n.02") == ["kite"]
        assert corrected("dog", synset=None) == ["dog"]
        assert corrected("dog", drop=("Puppies",)) == ["dog", "domestic dog"]
        assert corrected("dog", add=("hound",)) == ["dog", "hound", "domestic dog", "puppy"]
        assert corrected("dog", words=("hound",)) == ["dog", "hound"]
        with pytest.raises(ValueError, match=r"'dog' the sense 'dog\.n\.07', which WordNet does not have"):
            corrected("dog", synset="dog.n.07")
        with pytest.raises(ValueError, match="add 'Cars' to 'dog', but it is a word of 'car'"):
            built(wordnet, NamedClass("dog", correction=Correction(add=("Cars",))), "car")

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("Wine glass", "wineglasses"),
            ("T-shirt", "tshirts"),
            ("berry", "berries"),
            ("box", "boxes"),
            ("bus", "buss"),
        ],
    )
    def test_spellings_that_collide(self, first, second):
        assert (word_key(first) == word_key(second)) is (first != "bus")


class TestCommand:
    def run(self, folder, vocabulary, out, *options):
        main(["--vocabulary", str(vocabulary), "--out", str(out), "--wordnet", str(folder), *options])

    def test_from_typed_file_to_vocabulary(self, folder, tmp_path, capsys):
        words, out = tmp_path / "words.csv", tmp_path / "new" / "words.json"
        words.write_text("name,synonyms,is_thing,color\ndog,hound,thing,#ff0000\nkite,,,\nunicorn,,stuff,\n")
        self.run(folder, words, out)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vocabulary = Vocabulary.from_file(out)
        assert vocabulary.names == [["dog", "hound", "domestic dog", "puppy"], ["kite"], ["unicorn"]]
        assert vocabulary.is_thing == [True, None, False] and vocabulary.colors[0] == (255, 0, 0)
        rows = read_provenance(provenance_path(out))
        assert [row.word for row in rows] == vocabulary.flat_names
        text = capsys.readouterr().out
        assert "3 classes, 6 words: the labels, 1 given, 1 hyponym, 1 lemma" in text
        assert "2 classes have only their label: kite, unicorn" in text
        assert sorted(path.name for path in out.parent.iterdir()) == ["words.json", "words.provenance.csv"]

    def test_output_is_deterministic(self, folder, tmp_path):
        outputs = [tmp_path / name / "coco.json" for name in ("first", "second")]
        for out in outputs:
            self.run(folder, "coco_panoptic_133", out, "--labels-only")
        first, second = ([path.read_bytes() for path in sorted(out.parent.iterdir())] for out in outputs)
        assert first == second and len(first) == 2
        vocabulary, packaged = Vocabulary.from_file(outputs[0]), Vocabulary.named("coco_panoptic_133")
        assert vocabulary.labels == packaged.labels and vocabulary.is_thing == packaged.is_thing
        assert dict(zip(vocabulary.labels, vocabulary.names, strict=True))["mouse"] == ["mouse", "computer mouse"]
        facts = json.loads(outputs[0].read_text())
        assert facts["novel_ids"] == packaged_facts("coco_panoptic_133")["novel_ids"]

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ('{"cat": {}}', r"corrects \['cat'\], which are not labels of the vocabulary"),
            ('{"dog": {"sense": null}}', "'dog'.*any of synset, words, add, drop"),
            ('{"dog": {"add": "hound"}}', "'add' must be a list of words"),
            ('{"dog": {"synset": 7}}', "'synset' must be a name"),
            ("[]", "must contain an object"),
            ("{", "line 1: invalid JSON"),
        ],
    )
    def test_invalid_corrections_are_rejected(self, tmp_path, content, expected):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(ValueError, match=expected):
            read_corrections(tmp_path / "c.json", ["dog"])

    def test_corrections_are_read_from_a_file(self, folder, tmp_path):
        (tmp_path / "words.json").write_text('[{"name": "kite", "templates": ["a {}"]}, "mouse"]')
        (tmp_path / "c.json").write_text('{"kite": {"synset": "kite.n.03", "add": ["toy kite"]}}')
        self.run(folder, tmp_path / "words.json", tmp_path / "o.json", "--overrides", str(tmp_path / "c.json"))
        vocabulary = Vocabulary.from_file(tmp_path / "o.json")
        assert vocabulary.names == [["kite", "toy kite"], ["mouse"]] and vocabulary.templates == [["a {}"], None]

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--vocabulary", "ade20k_151", "--out", "o.json"], "did you mean 'ade20k_150'"),
            (["--vocabulary", "cityscapes_19", "--out", "o.txt"], "--out must end in .json"),
            (["--vocabulary", "cityscapes_19", "--out", "o.json", "--wordnet", "nowhere"], "apt-get install"),
        ],
    )
    def test_errors_are_one_line(self, arguments, expected, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(expected, line) and list(tmp_path.iterdir()) == []

    def test_help_describes_the_rules(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["--help"])
        text = capsys.readouterr().out
        assert all(word in text for word in ("python -m train.synonyms --vocabulary", "--overrides", "cake.n.03"))


class TestCuratedList:
    rows = packaged_provenance("coco_panoptic_133")

    def test_origin_of_every_word_is_recorded(self):
        vocabulary = Vocabulary.named("coco_panoptic_133")
        assert [row.word for row in self.rows] == vocabulary.flat_names and len(self.rows) == 562
        assert [row.label for row in self.rows] == [names[0] for names in vocabulary.names for _ in names]
        assert [row.word for row in self.rows if row.origin == "name"] == vocabulary.labels

    def test_lengths_and_origins(self):
        lengths = [len(names) for names in Vocabulary.named("coco_panoptic_133").names]
        assert {length: lengths.count(length) for length in set(lengths)} == {
            2: 9,
            3: 34,
            4: 35,
            5: 35,
            6: 15,
            7: 3,
            8: 2,
        }
        counts = {origin: sum(row.origin == origin for row in self.rows) for origin in ORIGINS}
        assert counts == {
            "name": 133,
            "given": 0,
            "lemma": 96,
            "hyponym": 179,
            "deeper hyponym": 11,
            "hypernym": 15,
            "sister": 15,
            "merged member": 24,
            "manual": 89,
        }

    def test_no_synonym_is_a_word_of_another_class(self):
        owners = {}
        for row in self.rows:
            assert owners.setdefault(word_key(row.word), row.label) == row.label

    def test_other_vocabularies_have_no_provenance(self):
        with pytest.raises(ValueError, match="words of 'ade20k_150' are not recorded"):
            packaged_provenance("ade20k_150")

    def test_every_recorded_word_is_in_its_wordnet_sense(self):
        wordnet = real_wordnet()
        wrong = [row for row in self.rows if row.synset and not _is_true(row, wordnet)]
        assert wrong == [] and sum(row.origin in FROM_WORDNET for row in self.rows) == 316
        assert {row.label for row in self.rows if not row.synset} == {"stop sign", "tile wall", "wood wall"}


class TestProvenanceFile:
    def test_round_trip(self, tmp_path):
        rows = [
            WordOrigin("dog", 'a "word", quoted', "lemma", "dog.n.01", "n02084071"),
            WordOrigin("草", "草", "name"),
        ]
        write_provenance(tmp_path / "x.provenance.csv", rows)
        assert read_provenance(tmp_path / "x.provenance.csv") == rows

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("label,word\n", "must have the columns label, word, origin, synset, wnid"),
            ("", "columns"),
            ("label,word,origin,synset,wnid\ndog,dog,guess,,\n", r"origins must be among .*\['guess'\]"),
        ],
    )
    def test_invalid_provenance_is_rejected(self, tmp_path, text, expected):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ValueError, match=expected):
            read_provenance(tmp_path / "x.csv")


@pytest.fixture(scope="module")
def coco():
    wordnet = real_wordnet()
    entries = packaged_facts("coco_panoptic_133")["classes"]
    classes = [NamedClass(e["name"], (), e["is_thing"], e["supercategory"]) for e in entries]
    return {row[0].label: row for row in build_synonyms(classes, wordnet)}


class TestRealLists:
    def test_senses_are_the_curated_ones_but_for_those_set_by_hand(self, coco):
        curated = {row.label: row.synset for row in packaged_provenance("coco_panoptic_133")}
        differ = {label for label, row in coco.items() if row[0].synset != curated[label]}
        absent = {"sports ball", "potted plant", "wood floor", "brick wall"}
        wrong = {"cake", "toilet", "net", "railroad", "fruit", "playing field"}
        narrower = {"keyboard", "bowl", "flower", "pavement"}
        assert differ == absent | wrong | narrower

    def test_homonyms_have_their_visible_sense(self, coco):
        words = {label: {origin.word for origin in row} for label, row in coco.items()}
        assert words["mouse"] == {"mouse", "computer mouse"} and "necktie" in words["tie"]
        nonsense = {
            "mouse": "black eye,shiner",
            "tie": "draw,crosstie",
            "grass": "pot,weed",
            "mountain": "batch,deal,heap",
            "house": "sign of the zodiac",
            "toilet": "can,john,gutter",
            "book": "koran,volume",
            "car": "machine",
            "bus": "coach",
        }
        assert all(not words[label] & set(bad.split(",")) for label, bad in nonsense.items())

    def test_the_list_keeps_its_own_rules(self, coco):
        keys = {}
        for label, row in coco.items():
            assert 1 <= len(row) <= 8 and row[0].word == label
            for origin in row:
                assert keys.setdefault(word_key(origin.word), label) == label
                assert origin.origin == "name" or _is_true(origin, real_wordnet())

    def test_closeness_to_the_curated_list(self, coco):
        curated = {(row.label, row.word): row.origin for row in packaged_provenance("coco_panoptic_133")}
        made = {(row.label, row.word): row.origin for rows in coco.values() for row in rows}
        lemmas = [key for key, origin in curated.items() if origin == "lemma"]
        assert sum(key in made for key in lemmas) / len(lemmas) > 0.65
        made_lemmas = [key for key, origin in made.items() if origin == "lemma"]
        assert sum(key in curated for key in made_lemmas) / len(made_lemmas) > 0.8


def _is_true(row: WordOrigin, wordnet) -> bool:
    """Whether WordNet has a word where its row says."""
    chosen = wordnet.synset(row.synset)
    parents = chosen.hypernyms()
    places = {
        "lemma": [chosen],
        "hyponym": chosen.hyponyms(),
        "deeper hyponym": list(chosen.closure(lambda s: s.hyponyms())),
        "hypernym": list(chosen.closure(lambda s: s.hypernyms())),
        "sister": [sister for parent in parents for sister in parent.hyponyms()],
    }
    words = {word_key(name) for place in places.get(row.origin, []) for name in place.lemma_names()}
    is_there = row.origin not in FROM_WORDNET or word_key(row.word) in words
    return is_there and row.wnid == f"n{chosen.offset():08d}"
