"""The sentences around names: published wording, and "a" or "an" by ear."""

import pytest

from modeling_gkc.prompt_templates import (
    PROMPT_TEMPLATES,
    fill_template,
    resolve_templates,
    starts_with_vowel_sound,
)
from modeling_gkc.vocabulary import Vocabulary

AN = """
apple; airplane; Umbrella; elephant; ice; oven; urn; usher; umpire; uncle; unidentified object; uninvited guest
unmade bed; undershirt
hour; hourglass; honest man; heirloom; honor guard; honour
X-ray; x-ray machine; xray; S-bend; F-16; f16; M&M; R2D2; e-bike; n
SUV; suv; SUVs; LED lamp; LCD; MRI scanner; MP3 player; HDMI cable; RV; FM radio; SOS; ATM; HTML page
8; 8-ball; 80; 11; 18-wheeler
éclair; Öresund bridge; 'eyed' needle; onion; onerous task; orange; hors d'oeuvre; oneiric scene
""".replace("\n", ";")
A = """
dog; Sofa; car; house; horse; hammer; hat; herb; honeycomb; yacht; year; yo-yo; yttrium
university; uniform; unicorn; unicycle; unit; union; unique vase; unidirectional sign; united flag
utensil; utility pole; urinal; uranium rod; ukulele; Ukrainian flag; usual chair; used car; user; utopia
ubiquitous sign
ewe; ewer; euro; eucalyptus; European flag; one-way sign; one; ouija board; onesie
T-shirt; t-shirt; U-turn; K9; b; TV; CD player; DVD; PC; USB stick; UFO; UV lamp; US flag; Dr; UAV; gym; sky; sphynx
Mr Potato Head; St Bernard; xylophone; 1; 4x4; 100; 110 m hurdle; 3D printer; 70s sofa
草; 😀; -; --; "; кот
""".replace("\n", ";")


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(";") if word.strip()]


class TestArticle:
    @pytest.mark.parametrize("name", words(AN))
    def test_article_an(self, name):
        assert fill_template("a photo of a {}.", name) == f"a photo of an {name}."

    @pytest.mark.parametrize("name", words(A))
    def test_article_a(self, name):
        assert fill_template("a photo of a {}.", name) == f"a photo of a {name}."

    def test_exceptions_among_the_benchmarks_names(self):
        """All names where ear and letter differ; the list was read by a person."""
        names = {name for packaged in Vocabulary.packaged_names() for name in Vocabulary.named(packaged).flat_names}
        assert len(names) > 1900
        differing = {name for name in names if starts_with_vowel_sound(name) != (name[0].casefold() in "aeiou")}
        assert differing == {"ewe", "ewer", "mp3 player", "urinal", "utensils"}

    @pytest.mark.parametrize(
        ("template", "dog", "oven"),
        [
            ("{}", "dog", "oven"),
            ("A {} here", "A dog here", "An oven here"),
            ("an {}", "a dog", "an oven"),
            ("An {}", "A dog", "An oven"),
            ("a small {}", "a small dog", "a small oven"),
            ("the {}", "the dog", "the oven"),
            ("a photo of a ({})", "a photo of a (dog)", "a photo of a (oven)"),
            ("banana {}", "banana dog", "banana oven"),
            ("a\n{}", "a\ndog", "a\noven"),
        ],
    )
    def test_only_the_word_right_before_the_name_changes(self, template, dog, oven):
        assert fill_template(template, "dog") == dog and fill_template(template, "oven") == oven

    def test_name_is_inserted_unchanged(self):
        assert fill_template("a {}!", r"{} \1 {0}") == r"a {} \1 {0}!"


class TestSets:
    def test_published_sets(self):
        assert list(PROMPT_TEMPLATES) == ["plain", "photo", "vild14", "fc_clip"]
        assert PROMPT_TEMPLATES["plain"] == ("{}",)
        assert PROMPT_TEMPLATES["photo"] == ("a photo of a {}.",)
        assert len(set(PROMPT_TEMPLATES["vild14"])) == 14

    def test_vild14_is_its_scheme(self):
        """Two sentences in three sizes and plain, and one more; full stops stand as published."""
        sizes = ("small", "medium", "large")
        expected = {
            "a photo of a {}.",
            "This is a photo of a {}",
            "There is a {} in the scene",
            "There is the {} in the scene",
            "a photo of a {} in the scene",
        }
        for sentence in ("a photo of a {} {{}}.", "This is a photo of a {} {{}}.", "There is a {} {{}} in the scene."):
            expected |= {sentence.format(size) for size in sizes}
        assert set(PROMPT_TEMPLATES["vild14"]) == expected

    def test_forms_of_the_setting(self):
        assert resolve_templates("plain") == ["{}"]
        assert resolve_templates("vild14") == list(PROMPT_TEMPLATES["vild14"])
        assert resolve_templates("an image of {}") == ["an image of {}"]
        assert resolve_templates(("{}", "my {}")) == ["{}", "my {}"]

    def test_a_set_cannot_be_changed_through_its_copy(self):
        resolve_templates("photo").append("{}")
        assert resolve_templates("photo") == ["a photo of a {}."]

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("vild", "'vild' is neither a set of prompt templates nor .*did you mean 'vild14'"),
            ("imagenet", "there are plain, photo, vild14"),
            ("", "there are plain, photo, vild14"),
            ("{} and {}", "exactly one .*'{} and {}'"),
            (["a photo"], "exactly one .*'a photo'"),
            (["{}", "a {name}"], "exactly one .*'a {name}'"),
            (["{}", 5], "exactly one .*5"),
            ([], "No prompt template was given"),
            (5, "No prompt template was given"),
        ],
    )
    def test_invalid_templates_raise(self, value, message):
        with pytest.raises(ValueError, match=message):
            resolve_templates(value)
