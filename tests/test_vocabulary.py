"""Words in every form, refused with their position when they cannot be."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_gkc.vocabulary import Vocabulary, _oklab, color_palette

NAMES = [["dog"], ["sofa", "couch"], ["lamp"]]


@pytest.mark.parametrize(
    "text",
    [
        "dog; sofa, couch; lamp",
        "  dog ;sofa ,  couch;lamp",
        ["dog", ["sofa", "couch"], "lamp"],
        ("dog", ("sofa", "couch"), "lamp"),
        [["dog"], ["sofa", "couch"], ["lamp"]],
        Vocabulary(NAMES),
    ],
)
def test_all_forms_say_the_same(text):
    vocabulary = Vocabulary.parse(text)
    assert vocabulary.names == NAMES
    assert len(vocabulary) == 3
    assert vocabulary.labels == ["dog", "sofa", "lamp"]
    assert vocabulary.flat_names == ["dog", "sofa", "couch", "lamp"]
    assert vocabulary.class_ids == [0, 1, 1, 2]


def test_a_vocabulary_is_parsed_to_itself():
    vocabulary = Vocabulary(NAMES)
    assert Vocabulary.parse(vocabulary) is vocabulary


def test_items_of_a_list_are_taken_as_they_stand():
    """Official names of ADE20K-847 hold commas."""
    assert Vocabulary.parse(["wall", "building, edifice; house"]).names == [["wall"], ["building, edifice; house"]]


def test_spaces_are_tidied_and_a_name_repeated_in_its_class_counts_once():
    assert Vocabulary.parse("traffic \t light;  sofa, couch, Sofa").names == [["traffic light"], ["sofa", "couch"]]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", r"label 1 \(index 0\)"),
        ("   ", r"label 1 \(index 0\)"),
        ("dog; ; lamp", r"label 2 \(index 1\)"),
        ("dog; sofa;", r"label 3 \(index 2\)"),
        (["dog", ""], r"label 2 \(index 1\)"),
        (["dog", []], r"label 2 \(index 1\)"),
        ("dog; sofa,, couch", r"name 2 of label 2 \(index 1\)"),
        (["dog", ["sofa", "\t"]], r"name 2 of label 2 \(index 1\)"),
    ],
)
def test_an_empty_label_is_refused_with_its_position(text, place):
    with pytest.raises(ValueError, match=f"^{place} is empty"):
        Vocabulary.parse(text)


def test_no_labels_are_refused():
    with pytest.raises(ValueError, match="no labels"):
        Vocabulary.parse([])


@pytest.mark.parametrize("text", ["dog; cat; dog", ["Dog", "cat", " dog "], "dog, hound; cat; DOG, puppy"])
def test_the_same_class_twice_is_refused_with_both_positions(text):
    with pytest.raises(ValueError, match=r"labels 1 and 3 \(indexes 0 and 2\)"):
        Vocabulary.parse(text)


@pytest.mark.parametrize("text", [5, None, [5], [["dog", 5]], {"dog"}, b"dog"])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(TypeError):
        Vocabulary.parse(text)


def test_a_name_of_two_classes_is_accepted_with_one_warning_naming_them():
    with pytest.warns(UserWarning) as caught:
        vocabulary = Vocabulary.parse("stool, seat; chair, Seat; sofa, chair; lamp")
    assert vocabulary.names == [["stool", "seat"], ["chair", "Seat"], ["sofa", "chair"], ["lamp"]]
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "'seat' belongs to 'stool' and 'chair'" in message and "'chair' belongs to 'chair' and 'sofa'" in message
    assert "lamp" not in message


def test_a_clean_vocabulary_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Vocabulary.parse(Vocabulary.parse("dog; sofa, couch"))


def test_kinds_and_colours():
    vocabulary = Vocabulary([["dog"], ["lawn"], ["sky"], ["rock"]], is_thing=[True, False, False, None])
    assert vocabulary.stuff_ids == {1, 2}
    assert vocabulary.palette == color_palette(4)
    assert Vocabulary([["dog"]]).stuff_ids == set()
    assert Vocabulary([["dog"]], colors=[[1, 2, 3]]).palette == [(1, 2, 3)]


@pytest.mark.parametrize("field", ["is_thing", "colors"])
def test_lists_of_another_length_are_refused(field):
    with pytest.raises(ValueError, match=f"`{field}` has 1 entries for 2 classes"):
        Vocabulary([["dog"], ["cat"]], **{field: [None]})


NAME = st.text("abcdefghij ", min_size=1, max_size=8).filter(str.strip)


@given(st.lists(st.lists(NAME, min_size=1, max_size=3), min_size=1, max_size=5))
def test_a_string_and_a_nested_list_agree(names):
    def result(text):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return Vocabulary.parse(text).names
            except ValueError as error:
                return str(error)

    assert result(names) == result("; ".join(", ".join(synonyms) for synonyms in names))


def test_palette_is_always_the_same_and_spread_out():
    palette = color_palette(40)
    assert palette[:7] == color_palette(7)
    assert len(set(color_palette(847))) == 847
    assert len(color_palette(5000)) == 5000 and color_palette(0) == []
    lab = _oklab(np.array(palette))
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + np.eye(40)
    assert distances.min() > 0.08  # neighbours in a legend stay apart; a just noticeable difference is near 0.02
    assert np.linalg.norm(_oklab(np.array([[255, 255, 255]])) - [[1, 0, 0]]) < 1e-3
