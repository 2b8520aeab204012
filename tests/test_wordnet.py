"""WordNet through nltk's reader: where it is found, what is read from memory, what is said when it is missing."""

import pickle
import shutil

import nltk
import pytest

from tests.wordnet_miniature import SYNSETS, hide_wordnet, real_wordnet, write_wordnet
from train.data.wordnet import database as module
from train.data.wordnet.database import FILES, WORDNET_VARIABLE, find_wordnet, lexnames_table, open_wordnet


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path_factory):
    """No WordNet but what a test writes."""
    hide_wordnet(monkeypatch, tmp_path_factory.mktemp("debian"))


@pytest.fixture
def miniature(tmp_path):
    return write_wordnet(tmp_path / "wordnet")


def names(senses) -> list[str]:
    return [sense.name() for sense in senses]


class TestReading:
    def test_every_synset_can_be_read_by_name(self, miniature):
        wordnet = open_wordnet(miniature)
        read = {
            (sense.lemma_names()[0], sense.definition(), sense.lexname())
            for part in "nvar"
            for sense in wordnet.all_synsets(part)
        }
        table = [line.split()[1] for line in lexnames_table().splitlines()]
        assert read == {(next(iter(words)), gloss, table[topic]) for _, _, topic, words, _, gloss in SYNSETS}

    def test_senses_in_order_plurals_exceptions_and_blanks(self, miniature):
        wordnet = open_wordnet(miniature)
        assert names(wordnet.nouns("kite")) == ["kite.n.01", "kite.n.02", "kite.n.03"]
        assert names(wordnet.nouns("mice")) == names(wordnet.nouns("mouse"))
        assert names(wordnet.nouns("Wine bottles")) == ["wine_bottle.n.01"]
        assert wordnet.nouns("unicorn") == [] == wordnet.nouns(" ")

    def test_synset_types(self, miniature):
        dog = open_wordnet(miniature).synset("dog.n.01")
        assert set(names(dog.hyponyms())) == {"dalmatian.n.01", "puppy.n.01"} and names(dog.hypernyms()) == [
            "animal.n.01"
        ]
        assert dog.lemma_names() == ["dog", "domestic_dog", "Canis_familiaris"]

    def test_counts(self, miniature):
        wordnet = open_wordnet(miniature)
        first, second = wordnet.nouns("mouse")[0].lemmas()[0], wordnet.nouns("mouse")[2].lemmas()[0]
        assert (wordnet.count(first), wordnet.count(second)) == (7, 0) == (first.count(), second.count())
        assert wordnet.gloss_count("wine bottle") == 2 and wordnet.gloss_count("bottle of wine") == 0
        assert wordnet.word_count(wordnet.synset("dog.n.01"), "DOG") == 42

    def test_without_tagged_texts_nothing_was_counted(self, miniature):
        (miniature / "cntlist.rev").unlink()
        assert open_wordnet(miniature).tag_counts == {}

    def test_a_folder_s_own_lexnames_is_read(self, tmp_path):
        wordnet = open_wordnet(write_wordnet(tmp_path / "own", with_lexnames=True))
        assert wordnet.synset("dog.n.01").lexname() == "noun.own5"

    def test_another_process_opens_its_own(self, miniature):
        wordnet = open_wordnet(miniature)
        copied = pickle.loads(pickle.dumps(wordnet))
        assert copied is not wordnet and names(copied.nouns("dog")) == ["dog.n.01"]

    def test_opening_writes_nothing(self, miniature):
        before = {path: path.stat().st_mtime_ns for path in miniature.parent.rglob("*")}
        open_wordnet(miniature).nouns("dog")
        assert {path: path.stat().st_mtime_ns for path in miniature.parent.rglob("*")} == before

    def test_the_table_of_the_manual(self):
        rows = [line.split("\t") for line in lexnames_table().splitlines()]
        assert [int(number) for number, _, _ in rows] == list(range(45))
        spots = {0: "adj.all", 2: "adv.all", 3: "noun.Tops", 4: "noun.act", 28: "noun.time", 29: "verb.body"}
        spots |= {43: "verb.weather", 44: "adj.ppl"}
        assert {index: rows[index][1] for index in spots} == spots
        kinds = {"noun": "1", "verb": "2", "adj": "3", "adv": "4"}
        assert all(kinds[name.partition(".")[0]] == kind for _, name, kind in rows)


class TestFinding:
    def test_search_order_of_wordnet_folders(self, tmp_path, monkeypatch):
        places = {name: write_wordnet(tmp_path / name) for name in ("told", "variable", "debian")}
        places["nltk"] = write_wordnet(tmp_path / "data" / "corpora" / "wordnet", with_lexnames=True)
        monkeypatch.setattr(module, "DEBIAN_FOLDER", places["debian"])
        assert str(find_wordnet()) == str(places["debian"])
        nltk.data.path.append(str(tmp_path / "data"))
        assert str(find_wordnet()) == str(places["nltk"])
        monkeypatch.setenv(WORDNET_VARIABLE, str(places["variable"]))
        assert str(find_wordnet()) == str(places["variable"])
        assert str(find_wordnet(places["told"])) == str(places["told"])

    def test_an_archive_as_nltk_downloads_it(self, tmp_path):
        write_wordnet(tmp_path / "files" / "wordnet", with_lexnames=True)
        (tmp_path / "data" / "corpora").mkdir(parents=True)
        shutil.make_archive(str(tmp_path / "data" / "corpora" / "wordnet"), "zip", tmp_path / "files", "wordnet")
        nltk.data.path.append(str(tmp_path / "data"))
        wordnet = open_wordnet()
        assert names(wordnet.nouns("mice"))[0] == "mouse.n.01" and wordnet.tag_counts
        assert wordnet.gloss_count("wine bottle") == 2
        assert names(pickle.loads(pickle.dumps(wordnet)).nouns("dog")) == ["dog.n.01"]

    def test_missing_wordnet_names_the_install_command(self):
        with pytest.raises(RuntimeError, match=r"apt-get install wordnet-base.*nltk\.downloader wordnet.*--wordnet"):
            find_wordnet()

    @pytest.mark.parametrize("by_variable", [False, True])
    def test_incomplete_folder_raises_and_names_missing_files(self, miniature, monkeypatch, by_variable):
        (miniature / "noun.exc").unlink()
        if by_variable:
            monkeypatch.setenv(WORDNET_VARIABLE, str(miniature))
        with pytest.raises(RuntimeError, match=r"lacks noun\.exc: install it") as caught:
            find_wordnet(None if by_variable else miniature)
        assert (WORDNET_VARIABLE in str(caught.value)) is by_variable

    def test_unrelated_folder_raises(self, tmp_path):
        with pytest.raises(RuntimeError, match=f"lacks {', '.join(FILES)}"):
            find_wordnet(tmp_path)


class TestRealWordNet:
    @pytest.fixture(autouse=True)
    def elsewhere(self):
        """Check that the real WordNet is found where it is installed."""

    def test_it_is_wordnet_3_0(self):
        """Offsets equal the ids of ImageNet; as many nouns as its manual says, wnstats(7WN)."""
        wordnet = real_wordnet()
        wnids = {"dog.n.01": 2084071, "person.n.01": 7846, "teddy.n.01": 4399382, "kite.n.03": 3621473}
        assert {name: wordnet.synset(name).offset() for name in wnids} == wnids
        assert sum(1 for _ in wordnet.all_lemma_names("n")) == 117798
        topics = {"dog.n.01": "noun.animal", "kite.n.03": "noun.artifact", "person.n.01": "noun.Tops"}
        assert {name: wordnet.synset(name).lexname() for name in topics} == topics

    def test_counts_equal_those_of_nltk(self):
        wordnet = real_wordnet()
        for lemma in [lemma for word in ("dog", "kite", "mouse") for lemma in wordnet.lemmas(word)]:
            assert wordnet.count(lemma) == lemma.count()
