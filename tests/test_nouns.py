"""Nouns of captions: by WordNet, by nltk's tagger, and as a column of a dataset."""

import json

import nltk
import pytest
from datasets import Dataset, load_from_disk
from nltk.tag.perceptron import PerceptronTagger

from tests.wordnet_miniature import hide_wordnet, real_wordnet, write_wordnet
from train.data.wordnet.caption_nouns import LexiconTagger, PerceptronNouns, add_nouns, caption_nouns, open_tagger
from train.data.wordnet.database import open_wordnet

CAPTIONS = [
    "A white dog and two Dogs standing in the park.",
    "The dog's bottle is here, a wine bottle",
    "Mice don't park",
    "",
    None,
]
NOUNS = [["dog", "dogs", "park"], ["dog", "bottle"], ["mice", "park"], [], []]
# Of four images: two captions, one, an empty one, none.
IMAGES = [CAPTIONS[:2], [CAPTIONS[2]], [CAPTIONS[3]], []]
IMAGE_NOUNS = [NOUNS[:2], [NOUNS[2]], [NOUNS[3]], []]
# Enough for the tagger to learn its own tests.
TAGGED = [
    [("A", "DT"), ("white", "JJ"), ("dog", "NN"), ("stands", "VBZ"), ("in", "IN"), ("London", "NNP")],
    [("Two", "CD"), ("dogs", "NNS"), ("park", "VBP"), ("a", "DT"), ("car", "NN")],
    [("The", "DT"), ("dog", "NN"), ("'s", "POS"), ("bottle", "NN"), ("is", "VBZ"), ("white", "JJ"), (".", ".")],
]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path_factory):
    """No data of nltk's and no WordNet but what a test writes."""
    hide_wordnet(monkeypatch, tmp_path_factory.mktemp("debian"))


@pytest.fixture
def folder(tmp_path):
    return write_wordnet(tmp_path / "wordnet")


@pytest.fixture
def tagger_data(tmp_path):
    """Return a tagger in nltk's format, trained on three sentences."""
    tagger = PerceptronTagger(load=False)
    tagger.train(TAGGED * 5)
    place = tmp_path / "nltk_data" / "taggers" / "averaged_perceptron_tagger_eng"
    place.mkdir(parents=True)
    names = ("weights", "tagdict", "classes")
    for name, values in zip(names, tagger.encode_json_obj(), strict=True):
        (place / f"averaged_perceptron_tagger_eng.{name}.json").write_text(json.dumps(values))
    nltk.data.path.append(str(tmp_path / "nltk_data"))


class TestLexicon:
    @pytest.mark.parametrize(("caption", "nouns"), list(zip(CAPTIONS, NOUNS, strict=True)))
    def test_captions(self, folder, caption, nouns):
        assert caption_nouns(caption, open_tagger(folder)) == nouns

    def test_what_is_more_often_a_noun(self, folder):
        tagger = LexiconTagger(open_wordnet(folder))
        assert all(tagger.is_noun(word) for word in ("park", "Puppies", "mice"))
        assert not any(tagger.is_noun(word) for word in ("white", "standing", "stand", "here", "a", "zzz"))

    def test_hyphens_belong_to_a_word_and_digits_do_not(self, folder):
        tagger = open_tagger(folder)
        assert caption_nouns("3 dogs, a dog-dog; dog2dog", tagger) == ["dogs", "dog"]
        assert caption_nouns("dog’s car", tagger) == ["dog", "car"]

    def test_the_real_wordnet(self, monkeypatch):
        monkeypatch.undo()
        tagger = LexiconTagger(real_wordnet())
        expected = {
            "A man riding a wave on top of a surfboard.": ["man", "wave", "surfboard"],
            "Two giraffes standing in a grassy field near some trees": ["giraffes", "field", "trees"],
            "a woman is sitting on a bench with her white dog": ["woman", "bench", "dog"],
            "Children play soccer while a bus stops at the traffic light": ["children", "soccer", "bus", "traffic"],
            "a kitchen with a stove, a microwave and a refrigerator": [
                "kitchen",
                "stove",
                "microwave",
                "refrigerator",
            ],
            "The cat's bowl is next to a very old wooden chair": ["cat", "bowl", "chair"],
        }
        found = {caption: caption_nouns(caption, tagger) for caption in expected}
        missing = {caption: set(nouns) - set(found[caption]) for caption, nouns in expected.items()}
        assert not any(missing.values()), missing
        extra = {word for caption, nouns in expected.items() for word in set(found[caption]) - set(nouns)}
        assert extra <= {"light", "play", "stops"}


class TestTagger:
    def test_wordnet_is_used_where_its_data_is_installed(self, tagger_data):
        tagger = open_tagger()
        assert isinstance(tagger, PerceptronNouns)
        assert caption_nouns("A white dog stands in London", tagger) == ["dog", "london"]
        assert caption_nouns("The dog's bottle is white.", tagger) == ["dog", "bottle"]
        assert caption_nouns("Two dogs park a car", tagger) == ["dogs", "car"]

    def test_given_wordnet_folder_takes_precedence(self, tagger_data, folder):
        assert isinstance(open_tagger(folder), LexiconTagger)
        assert isinstance(open_tagger(open_wordnet(folder)), LexiconTagger)

    def test_missing_wordnet_error_names_the_install_commands(self, tmp_path):
        with pytest.raises(
            RuntimeError, match=r"downloader averaged_perceptron_tagger_eng.*apt-get install wordnet-base"
        ):
            open_tagger()
        with pytest.raises(RuntimeError, match=r"lacks index\.noun"):
            open_tagger(tmp_path)


class TestColumn:
    def dataset(self) -> Dataset:
        rows = {"captions": IMAGES, "image_id": [str(index) for index in range(len(IMAGES))]}
        return Dataset.from_dict(rows)

    def test_noun_source_is_stored_with_the_dataset(self, folder, tmp_path):
        dataset = add_nouns(self.dataset(), folder)
        dataset.save_to_disk(tmp_path / "saved")
        loaded = load_from_disk(tmp_path / "saved")
        assert loaded["nouns"][:] == IMAGE_NOUNS and loaded["captions"][:] == IMAGES
        assert loaded["image_id"][:] == self.dataset()["image_id"][:]
        assert add_nouns(loaded.select([2, 0]), folder)["nouns"][:] == [IMAGE_NOUNS[2], IMAGE_NOUNS[0]]

    def test_dataset_without_nouns_has_an_empty_column(self, folder):
        features = add_nouns(self.dataset().select([2, 3]), folder).features
        assert features == add_nouns(self.dataset(), folder).features

    def test_several_processes_find_equal_nouns(self, folder):
        assert add_nouns(self.dataset(), folder, num_proc=2)["nouns"][:] == IMAGE_NOUNS

    def test_other_columns_are_not_read(self, folder):
        def explode(rows):
            raise AssertionError(f"read {list(rows)}")

        dataset = self.dataset()
        dataset.set_transform(explode, columns=["image_id"])
        assert add_nouns(dataset, folder).data.column("nouns").to_pylist() == IMAGE_NOUNS

    def test_without_captions(self, folder):
        with pytest.raises(ValueError, match=r"no column 'captions'.*\['image_id'\]"):
            add_nouns(self.dataset().remove_columns("captions"), folder)
