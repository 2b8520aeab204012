"""Words in every form, refused with their position when they cannot be."""

import json
import re
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_gkc.vocabulary import Vocabulary, _oklab, color_palette
from modeling_gkc.vocabulary_files import packaged_path

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
def test_all_input_forms_are_equivalent(text):
    vocabulary = Vocabulary.parse(text)
    assert vocabulary.names == NAMES
    assert len(vocabulary) == 3
    assert vocabulary.labels == ["dog", "sofa", "lamp"]
    assert vocabulary.flat_names == ["dog", "sofa", "couch", "lamp"]
    assert vocabulary.class_ids == [0, 1, 1, 2]


def test_a_vocabulary_is_parsed_to_itself():
    vocabulary = Vocabulary(NAMES)
    assert Vocabulary.parse(vocabulary) is vocabulary


def test_a_vocabulary_of_another_copy_of_the_library_is_one():
    twin = type("Vocabulary", (), {"names": [["dog"]], "is_thing": [True], "colors": None, "templates": [["a {}"]]})()
    assert Vocabulary.parse(twin) == Vocabulary([["dog"]], is_thing=[True], templates=[["a {}"]])


def test_list_items_are_not_split():
    """Official names of ADE20K-847 hold commas."""
    assert Vocabulary.parse(["wall", "building, edifice"]).names == [["wall"], ["building, edifice"]]


def test_spaces_are_normalized_and_repeated_names_of_a_class_are_dropped():
    assert Vocabulary.parse("traffic   light;  sofa, couch, Sofa").names == [["traffic light"], ["sofa", "couch"]]
    assert Vocabulary.parse(["traffic \t light", ["sofa", "couch", "Sofa"]]).names == [
        ["traffic light"],
        ["sofa", "couch"],
    ]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", r"Label 1 \(index 0\)"),
        ("   ", r"Label 1 \(index 0\)"),
        ("dog; ; lamp", r"Label 2 \(index 1\)"),
        ("dog; sofa;;", r"Label 3 \(index 2\)"),
        (";", r"Label 1 \(index 0\)"),
        (["dog", ""], r"Label 2 \(index 1\)"),
        (["dog", []], r"Label 2 \(index 1\)"),
        ("dog; sofa,, couch", r"Name 2 of label 2 \(index 1\)"),
        (["dog", ["sofa", "\t"]], r"Name 2 of label 2 \(index 1\)"),
    ],
)
def test_an_empty_label_is_refused_with_its_position(text, place):
    with pytest.raises(ValueError, match=f"^{place} is empty"):
        Vocabulary.parse(text)


@pytest.mark.parametrize(
    "label", ["\u200b", " \u2060 \ufeff", "\u3164", "\u2800\u2800", "\x00", "\u200d\ufe0f", "\u00ad"]
)
def test_invisible_label_raises_with_its_position(label):
    for names in (["dog", label], [["dog"], ["sofa", label]], f"dog; {label}"):
        with pytest.raises(ValueError, match=r"[Ll]abel 2 \(index 1\) contains only invisible characters \(U\+"):
            Vocabulary.parse(names)


def test_characters_without_width_are_dropped():
    assert Vocabulary.parse(["\ufeffdog", "so\u00adfa\u200b", "trafﬁc\u2060 light"]).labels == [
        "dog",
        "sofa",
        "trafﬁc light",
    ]
    assert Vocabulary.parse(["می\u200cخواهم", "👩\u200d🔬"]).labels == ["می\u200cخواهم", "👩\u200d🔬"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("Stra\u00dfe", "strasse"),
        ("dog", "do\u200bg"),
        ("dog", "do\u3164g"),
        ("İ", "i\u0307"),
    ],
)
def test_one_label_in_two_forms_is_the_same_class_twice(first, second):
    with pytest.raises(ValueError, match=r"Labels 1 and 3 \(indexes 0 and 2\) are both"):
        Vocabulary.parse([first, "cat", second])
    with pytest.raises(ValueError, match="is a void label and a name of the class"):
        Vocabulary.parse([first]).with_void([second])
    assert len(Vocabulary.parse([[first, second]]).flat_names) == 1


def test_the_characters_are_shown_where_two_labels_look_the_same():
    with pytest.raises(ValueError, match=r"when displayed \('caf\\xe9' and 'cafe\\u0301'\)"):
        Vocabulary.parse(["caf\u00e9", "cafe\u0301"])


def test_lone_surrogate_raises():
    for names in (["dog", "\ud83d"], "dog; \ud83d", [["dog"], ["sofa", "x\udc00"]]):
        with pytest.raises(
            ValueError, match=r"[Ll]abel 2 \(index 1\) contains U\+D[8C]3?[D0]0?, half of a surrogate pair"
        ):
            Vocabulary.parse(names)
    with pytest.raises(ValueError, match=r"The prompt template .* contains U\+D83D, half"):
        Vocabulary([["dog"]], templates=["a \ud83d {}"])


def test_no_labels_are_refused():
    with pytest.raises(ValueError, match="No labels"):
        Vocabulary.parse([])


@pytest.mark.parametrize("text", ["dog; cat; dog", ["Dog", "cat", " dog "], "dog, hound; cat; DOG, puppy"])
def test_the_same_class_twice_is_refused_with_both_positions(text):
    with pytest.raises(ValueError, match=r"Labels 1 and 3 \(indexes 0 and 2\)"):
        Vocabulary.parse(text)


@pytest.mark.parametrize("text", [5, None, [5], [["dog", 5]], b"dog"])
def test_non_text_labels_raise(text):
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


def test_kinds_and_colors():
    vocabulary = Vocabulary([["dog"], ["lawn"], ["sky"], ["rock"]], is_thing=[True, False, False, None])
    assert vocabulary.stuff_ids == {1, 2}
    assert vocabulary.palette == color_palette(4)
    assert Vocabulary([["dog"]]).stuff_ids == set()
    assert Vocabulary([["dog"]], colors=[[1, 2, 3]]).palette == [(1, 2, 3)]


class TestTrusted:
    def test_stored_values_are_checked_without_a_warning(self):
        names = [["stool", "seat"], ["chair", " Seat "]]
        fields = ([np.True_, None], [[1, 2, 3], None], ["photo", None])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stored = Vocabulary.from_stored(names, *fields)
        with pytest.warns(UserWarning, match="'seat'"):
            assert stored == Vocabulary(names, *fields)

    @pytest.mark.parametrize("fields", [([],), ([["dog"], ["Dog"]],), ([["dog"]], ["yes"]), ([["dog"]], None, [])])
    def test_invalid_vocabularies_raise(self, fields):
        with pytest.raises(ValueError) as expected:
            Vocabulary(*fields)
        with pytest.raises(ValueError) as caught:
            Vocabulary.from_stored(*fields)
        assert str(caught.value) == str(expected.value)


class TestKindsOfAnother:
    STORED = Vocabulary([["dog", "hound"], ["sky", "air"], ["rock"]], is_thing=[True, False, None])

    def test_any_name_of_the_other_counts_in_any_case(self):
        words = Vocabulary([["Sky"], ["HOUND", "air"], ["rock"], ["unicorn", "dog"]], templates=["photo", *[None] * 3])
        described = words.with_is_thing_from(self.STORED)
        assert described.is_thing == [False, True, None, None]
        assert (described.names, described.templates) == (words.names, words.templates) and words.is_thing is None

    def test_a_label_goes_before_synonyms_and_those_must_agree(self):
        stored = Vocabulary.from_stored(
            [["plant"], ["tree", "plant", "wood"], ["table", "wood"], ["bush", "shrub"], ["hedge", "shrub"]],
            is_thing=[True, False, True, False, False],
        )
        words = Vocabulary.parse("plant; wood; shrub")
        assert words.with_is_thing_from(stored).is_thing == [True, None, False]
        swapped = Vocabulary.from_stored(stored.names[1::-1], [False, True])
        assert words.with_is_thing_from(swapped).is_thing == [True, False, None]

    def test_none_adds_no_classes(self):
        words, kinds = Vocabulary.parse("sky; unicorn"), Vocabulary([["sky"]], is_thing=[True])
        assert kinds.with_is_thing_from(self.STORED) is kinds
        for other in (None, Vocabulary.parse("sky"), Vocabulary([["rock"]], [True])):
            assert words.with_is_thing_from(other) is words

    def test_a_shared_name_is_not_warned_of_again(self):
        words = Vocabulary.from_stored([["sky", "air"], ["cloud", "air"]])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert words.with_is_thing_from(self.STORED).is_thing == [False, None]


@pytest.mark.parametrize("field", ["is_thing", "colors", "templates"])
def test_lists_of_another_length_are_refused(field):
    with pytest.raises(ValueError, match=f"`{field}` must have one entry for each of the 2 classes, got 1"):
        Vocabulary([["dog"], ["cat"]], **{field: [None]})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "is_thing",
            "yes",
            r"Label 2 \(index 1\): is_thing must be true \(thing\), false \(stuff\) or null, got 'yes'",
        ),
        ("is_thing", 1, r"Label 2 \(index 1\): is_thing .* got 1"),
        ("colors", (1, 2), r"Label 2 \(index 1\): a color must be three whole numbers.*\(1, 2\)"),
        ("colors", "red", r"Label 2 \(index 1\): a color must be three"),
        ("colors", (1, 2, 0.5), r"Label 2 \(index 1\): a color must be three"),
        ("colors", (1, 2, True), r"Label 2 \(index 1\): a color must be three"),
        ("colors", (1, 2, 256), r"Label 2 \(index 1\): a color must lie in 0\.\.255"),
        ("colors", (-1, 2, 3), r"Label 2 \(index 1\): a color must lie in 0\.\.255"),
        ("templates", ["a photo"], r"Label 2 \(index 1\): A prompt template needs exactly one '{}'"),
        ("templates", [], r"Label 2 \(index 1\): No prompt template"),
        ("templates", "vild15", r"Label 2 \(index 1\): 'vild15' is neither"),
    ],
)
def test_a_wrong_value_is_refused_with_its_position(field, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Vocabulary([["dog"], ["cat"]], **{field: [None, value]})


def test_values_come_in_one_form():
    vocabulary = Vocabulary(
        [["dog"], ["cat"], ["sky"]],
        is_thing=[np.True_, None, False],
        colors=[np.array([1, 2, 3], dtype=np.uint8), None, [4, 5, 6]],
        templates=["photo", None, ("the {}",)],
    )
    assert vocabulary.is_thing == [True, None, False]
    assert json.dumps(vocabulary.colors) == "[[1, 2, 3], null, [4, 5, 6]]"
    assert vocabulary.templates == [["a photo of a {}."], None, ["the {}"]]


def test_classes_without_a_color_get_one_that_is_free():
    first, second, third = color_palette(3)
    vocabulary = Vocabulary([["a"], ["b"], ["c"], ["d"]], colors=[None, first, None, (1, 2, 3)])
    assert vocabulary.palette == [second, first, third, (1, 2, 3)]
    everything = color_palette(3000)
    assert (
        len(Vocabulary([[f"n{i}"] for i in range(3000)], colors=[*everything[:1500], *[None] * 1500]).palette) == 3000
    )


def test_classes_without_a_color_get_one_even_when_all_are_taken():
    everything = list(dict.fromkeys(color_palette(5000)))
    names = [[f"n{index}"] for index in range(len(everything) + 2)]
    palette = Vocabulary(names, colors=[*everything, None, None]).palette
    assert palette[:-2] == everything and palette[-2:] == everything[:2]


class TestVoid:
    def test_void_words_come_last_and_all_fields_stay_aligned(self):
        vocabulary = Vocabulary([["dog"], ["sky", "air"]], is_thing=[True, False], templates=[["my {}"], None])
        void = Vocabulary([["wall"], ["floor", "ground"]], colors=[None, (1, 2, 3)], is_thing=[False, False])
        joined, void_ids = vocabulary.with_void(void)
        assert void_ids == [2, 3]
        assert joined.names == [["dog"], ["sky", "air"], ["wall"], ["floor", "ground"]]
        assert joined.is_thing == [True, False, False, False]
        assert joined.colors == [None, None, None, (1, 2, 3)]
        assert joined.templates == [["my {}"], None, None, None]
        assert vocabulary.names == [["dog"], ["sky", "air"]] and vocabulary.colors is None

    def test_void_templates_stay_with_void(self):
        joined, _ = Vocabulary([["dog"]]).with_void(Vocabulary([["wall"]], templates=["photo"]))
        assert joined.templates == [None, ["a photo of a {}."]]
        assert joined.is_thing is None and joined.colors is None

    @pytest.mark.parametrize("form", ["wall; floor", ["wall", "floor"], Vocabulary([["wall"], ["floor"]])])
    def test_forms(self, form):
        joined, void_ids = Vocabulary.parse("dog").with_void(form)
        assert joined.labels == ["dog", "wall", "floor"] and void_ids == [1, 2]

    def test_none_adds_nothing(self):
        vocabulary = Vocabulary.parse("dog; cat")
        assert vocabulary.with_void(None) == (vocabulary, [])

    @pytest.mark.parametrize(
        ("text", "void", "message"),
        [
            ("dog; sofa, couch", "wall; Sofa", "'Sofa' is a void label and a name of the class 'sofa'"),
            ("dog; sofa, couch", "wall; bench, couch", "'couch' is a void label and a name of the class 'sofa'"),
            ("dog", "", r"^Void labels: Label 1 \(index 0\) is empty"),
            ("dog", "wall; wall", r"^Void labels: Labels 1 and 2"),
            ("dog", "ade20k_151", "^Void labels: .*'ade20k_150'"),
        ],
    )
    def test_invalid_void_labels_raise(self, text, void, message):
        with pytest.raises(ValueError, match=message):
            Vocabulary.parse(text).with_void(void)

    def test_a_shared_name_is_warned_of_once(self):
        with pytest.warns(UserWarning, match="'seat'") as caught:
            Vocabulary.parse("stool, seat; chair, seat").with_void("wall")
        assert len(caught) == 1


def test_without_synonyms():
    vocabulary = Vocabulary(
        [["dog"], ["sofa", "couch"]], is_thing=[True, None], colors=[None, (1, 2, 3)], templates=[None, ["my {}"]]
    )
    plain = vocabulary.without_synonyms()
    assert plain.names == [["dog"], ["sofa"]] and vocabulary.names[1] == ["sofa", "couch"]
    for field in ("is_thing", "colors", "templates"):
        assert getattr(plain, field) == getattr(vocabulary, field)


class TestTyped:
    """Strings that would be one odd label."""

    @pytest.mark.parametrize("text", ["dog\nsofa\nlamp", "dog; sofa, couch\nlamp", "dog\r\nsofa", "dog,\nsofa"])
    def test_a_line_break_inside_a_class_is_refused(self, text):
        with pytest.raises(
            ValueError, match=r"contain a line break: .*; separate classes by ';', or give a \.txt file"
        ):
            Vocabulary.parse(text)

    def test_a_line_break_between_classes_is_space(self):
        assert Vocabulary.parse("\ndog;\n  sofa, couch;\r\nlamp\n").names == NAMES
        assert Vocabulary.parse(["fire\nhydrant"]).labels == ["fire hydrant"]

    @pytest.mark.parametrize("name", ["words.md", "o5/w.safetensors", "o5/words"])
    def test_the_path_of_another_file_is_refused(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "o5").mkdir()
        (tmp_path / name).write_text("dog")
        for text in (name, f" {name}\n", str(tmp_path / name), Path(name)):
            with pytest.raises(
                ValueError, match=r"not a vocabulary file: its name must end in \.json, \.csv or \.txt"
            ) as e:
                Vocabulary.parse(text)
            assert ("`gkc segment --vocab` reads class embeddings" in str(e.value)) == name.endswith(".safetensors")

    def test_missing_embeddings_file_is_not_parsed_as_labels(self):
        with pytest.raises(ValueError, match=r"gone\.safetensors is not a vocabulary file.*--vocab"):
            Vocabulary.parse("gone.safetensors")

    def test_label_equal_to_a_file_name_stays_a_label(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "dog").write_text("")
        for label in ("dog", "st. bernard", "and/or", "x" * 5000, "nul\0l"):
            assert Vocabulary.parse(label).labels == [label]

    @pytest.mark.parametrize(
        ("text", "others"), [("dog, sofa, lamp", "sofa, lamp"), (" dog,sofa\n", "sofa"), ("dog, Dog, hound", "hound")]
    )
    def test_names_separated_by_commas_alone_warn_once_at_the_caller(self, text, others):
        with pytest.warns(UserWarning) as caught:
            vocabulary = Vocabulary.parse(text)
        assert len(vocabulary) == 1 and len(caught) == 1 and caught[0].filename == __file__
        assert str(caught[0].message) == (
            f"1 class: dog (also: {others}); separate classes by ';', or end the text with ';' if it is a single "
            "class."
        )

    @pytest.mark.parametrize(
        ("text", "mark"),
        [
            ("red disc | sky", "|"),
            ("sky . grass .", "."),
            ("sky .", "."),
            ("a cat. a remote control.", "."),
            ("red disc；sky", "；"),
            ("red disc，sky", "，"),
            ("红色、天空", "、"),
            ("sky ｜ grass", "｜"),
            ("sky; grass | lawn", "|"),
            ("sky · grass", "·"),
        ],
    )
    def test_separators_of_others_are_refused(self, text, mark, tmp_path):
        with pytest.raises(ValueError, match=rf"separated by ';' and .* by ',', not by '{re.escape(mark)}'"):
            Vocabulary.parse(text)
        if ";" not in text:
            with pytest.raises(ValueError, match=rf"x\.txt, line 2: .* not by '{re.escape(mark)}'"):
                Vocabulary.parse(write(tmp_path, "x.txt", f"dog\n{text}"))
        assert Vocabulary.parse([text.replace(";", ",")]).labels  # in a list all is taken as it stands

    @pytest.mark.parametrize("mark", ["\t", "\t\t", " \t ", "\v", "\f", "\x1c"])
    @pytest.mark.parametrize("text", ["red disc{}sky", "red disc{}sky; lawn", "lawn; red disc, circle{}sky"])
    def test_tabs_between_words_are_refused(self, text, mark, tmp_path):
        kind = "a tab" if "\t" in mark else rf"U\+{ord(mark):04X}"
        with pytest.raises(
            ValueError, match=rf"^Classes are separated by ';' and .* not by {kind}: .* Replace it by ';'"
        ):
            Vocabulary.parse(text.format(mark))

    def test_tabs_beside_separators_are_harmless(self):
        assert Vocabulary.parse("\tdog;\tsofa,\tcouch\t; lamp\t").names == NAMES

    @pytest.mark.parametrize("mark", ["/", "&", "+", "-", "\\", "*", ":", "->", "–"])
    def test_ambiguous_punctuation_warns_that_all_is_one_class(self, mark):
        with pytest.warns(UserWarning) as caught:
            assert Vocabulary.parse(f"black {mark} white").labels == [f"black {mark} white"]
        assert [str(warning.message) for warning in caught] == [
            f"1 class: black {mark} white; separate classes by ';', or end the text with ';' if it is a single class."
        ]

    @pytest.mark.parametrize(
        "text", ["black & white;", "black & white; sky", "and/or", "st. bernard", ["a / b"], "c +"]
    )
    def test_other_punctuation_does_not_warn(self, text):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Vocabulary.parse(text)

    @pytest.mark.parametrize("text", ['["dog", "cat"]', "[['dog'], ['cat']]", '{"0": "dog"}'])
    def test_string_of_a_python_list_raises(self, text):
        with pytest.raises(ValueError, match="must not be a JSON list"):
            Vocabulary.parse(text)

    def test_a_semicolon_at_the_end_is_harmless(self):
        assert Vocabulary.parse("dog; sofa, couch; lamp; ").names == NAMES
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Vocabulary.parse("sofa, couch;").names == [["sofa", "couch"]]

    @pytest.mark.parametrize("text", ["sofa, couch;", "dog, Dog, dog", "sofa, couch, settee; dog", [["a", "b", "c"]]])
    def test_other_synonyms_do_not_warn(self, text):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Vocabulary.parse(text)


SAME_FILES = {
    "list.json": '["dog", ["sofa", "couch"], "lamp"]',
    "lists.json": '[["dog"], ["sofa", "couch"], ["lamp"]]',
    "object.json": '{"dog": [], "sofa": ["couch"], "lamp": []}',
    "classes.json": '{"name": "mine", "classes": ["dog", ["sofa", "couch"], {"name": "lamp"}]}',
    "classes-object.json": '{"classes": {"dog": [], "sofa": ["couch"], "lamp": []}}',
    "layout.json": '[{"name": "dog", "synonyms": null}, {"name": "sofa", "synonyms": ["couch"]}, {"name": "lamp"}]',
    "indented.JSON": '\n[\n  "dog",\n\n  [ "sofa" , "couch" ] ,\n  "lamp"\n]\n\n',
    "commas.csv": "name,synonyms\ndog,\nsofa,couch\nlamp,\n",
    "semicolons.csv": "Name; Synonyms\ndog;\n\nsofa; couch\n;\nlamp\n",
    "tabs.csv": "synonyms\tname\n\tdog\ncouch\tsofa\n\tlamp",
    "blank.csv": "\n \n;;\nname;synonyms\ndog\nsofa;couch\nlamp",
    "quotes.csv": 'name,synonyms\n"dog",""\n"sofa","couch"\n"lamp"\n',
    "lines.txt": "dog\nsofa, couch\nlamp",
    "comments.txt": "# my words\n\n  dog  # the best\nsofa,couch\n\t# not this: cat\nlamp\n\n",
}


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


class TestFiles:
    @pytest.mark.parametrize("name", SAME_FILES)
    @pytest.mark.parametrize("encode", [str.encode, lambda text: b"\xef\xbb\xbf" + text.encode()], ids=["utf8", "bom"])
    @pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old"])
    def test_all_input_forms_are_equivalent(self, tmp_path, name, encode, ends):
        path = write(tmp_path, name, encode(SAME_FILES[name].replace("\n", ends)))
        for text in (path, str(path), f" {path}\n"):
            assert Vocabulary.parse(text).names == NAMES
        assert Vocabulary.from_file(str(path)).names == NAMES

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            (
                "all.json",
                '[{"name": "dog", "is_thing": true, "color": "#010aFF", "templates": "photo"},\n'
                '{"name": "sky", "is_thing": false, "color": [4, 5, 6], "templates": ["{}", "the {}"]}, "rock"]',
            ),
            (
                "all.csv",
                "name,is_thing,color,templates,synonyms\n"
                "dog,Thing,#010aFF,photo\nsky,stuff,#040506,{}|the {}\nrock,,,,",
            ),
            ("true.csv", "name,is_thing,color,templates\ndog,TRUE,#010aff,photo\nsky,false,#040506,{}|the {}\nrock"),
        ],
    )
    def test_kinds_colors_and_templates(self, tmp_path, name, text):
        vocabulary = Vocabulary.from_file(write(tmp_path, name, text))
        assert vocabulary.names == [["dog"], ["sky"], ["rock"]]
        assert vocabulary.is_thing == [True, False, None]
        assert vocabulary.colors == [(1, 10, 255), (4, 5, 6), None]
        assert vocabulary.templates == [["a photo of a {}."], ["{}", "the {}"], None]

    def test_fields_without_values_are_none(self, tmp_path):
        vocabulary = Vocabulary.from_file(write(tmp_path, "x.csv", "name,is_thing,color,templates\ndog,,,\n"))
        assert vocabulary.is_thing is vocabulary.colors is vocabulary.templates is None

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("fcclip.txt", "0:invalid_class_id\n1:dog\n2:invalid_class_id\n3:sofa,couch\n 7 : lamp"),
            ("id2label.json", '{"0": "dog", "2": "lamp", "1": ["sofa", "couch"]}'),
            ("id2label.json", '{"1": "dog", "2": ["sofa", "couch"], "3": "lamp"}'),
            ("config.json", '{"model_type": "x", "id2label": {"0": "dog", "1": ["sofa", "couch"], "2": "lamp"}}'),
        ],
    )
    def test_files_of_other_projects(self, tmp_path, name, text):
        assert Vocabulary.parse(write(tmp_path, name, text)).names == NAMES

    def test_a_label2id_is_read(self, tmp_path):
        assert Vocabulary.parse(write(tmp_path, "x.json", '{"sky": 1, "wall, brick": 0}')).labels == [
            "wall, brick",
            "sky",
        ]

    @pytest.mark.parametrize("head", ["", '{"info": {}, "images": [], "annotations": [], "categories": '])
    def test_categories_of_coco_are_read(self, tmp_path, head):
        categories = [
            {
                "supercategory": "animal",
                "isthing": 1,
                "color": [1, 2, 3],
                "id": 18,
                "name": "dog",
                "keypoints": ["nose"],
            },
            {"supercategory": "plant", "isthing": 0, "color": [4, 5, 6], "id": 3, "name": "grass"},
        ]
        read = Vocabulary.parse(write(tmp_path, "x.json", head + json.dumps(categories) + ("}" if head else "")))
        assert (read.labels, read.is_thing, read.colors) == (["dog", "grass"], [True, False], [(1, 2, 3), (4, 5, 6)])

    def test_names_are_taken_as_they_stand(self, tmp_path):
        names = [["building, edifice"], ['5" nail', "Größe 草 😀"]]
        assert Vocabulary.from_file(write(tmp_path, "x.json", json.dumps(names))).names == names
        text = 'name,synonyms\n"building, edifice",\n"5"" nail",Größe 草 😀\n'
        assert Vocabulary.from_file(write(tmp_path, "x.csv", text)).names == names
        lines = write(tmp_path, "x.txt", "C#\njersey\u2028shirt\n")
        assert Vocabulary.from_file(lines).names == [["C#"], ["jersey shirt"]]

    @pytest.mark.parametrize(("name", "text"), [("x.json", '[["sky; heaven"]]'), ("x.csv", "name\nsky; heaven\n")])
    def test_a_semicolon_in_a_name_is_refused_as_in_a_list(self, tmp_path, name, text):
        with pytest.raises(ValueError, match=r"'sky; heaven': a ';' separates classes"):
            Vocabulary.from_file(write(tmp_path, name, text))

    def test_a_name_over_two_lines_of_csv(self, tmp_path):
        text = 'name,synonyms\n"fire\nhydrant",\ndog,\n"Dog",\n'
        with pytest.raises(ValueError, match=r"Entries 2 and 3 \(lines 4 and 5\)"):
            Vocabulary.from_file(write(tmp_path, "x.csv", text))
        assert Vocabulary.from_file(write(tmp_path, "x.csv", text[:-7])).labels == ["fire hydrant", "dog"]

    def test_copied_packaged_file(self, tmp_path):
        copy = write(tmp_path, "mine.json", packaged_path("ade20k_150").read_bytes())
        assert Vocabulary.parse(copy) == Vocabulary.named("ade20k_150")

    def test_parsing_time_is_linear(self, tmp_path):
        """A search for the line of each class from the start of the file would take several seconds."""
        names = [{"name": f"class {index}", "synonyms": ["a" * 30 + str(index)]} for index in range(10_000)]
        path = write(tmp_path, "x.json", json.dumps(names, indent=1))
        start = time.process_time()
        assert len(Vocabulary.from_file(path)) == 10_000
        assert time.process_time() - start < 3

    def test_a_shared_name_warns(self, tmp_path):
        with pytest.warns(UserWarning, match="'seat' belongs to 'stool' and 'chair'"):
            Vocabulary.from_file(write(tmp_path, "x.txt", "stool, seat\nchair, seat"))


BAD_FILES = [
    # Names, in every form, at the line where they stand.
    ("x.txt", "dog\n\nsofa,, couch", r"Name 2 of entry 2 \(line 3\) of .*x\.txt is empty"),
    ("x.txt", "dog\n,\n", r"Name 1 of entry 2 \(line 2\) of .*x\.txt is empty"),
    ("x.txt", "dog\n# no\ncat\nDog, hound", r"Entries 1 and 3 \(lines 1 and 4\) of .*x\.txt are both 'Dog'"),
    ("x.txt", "dog; cat", r"x\.txt, line 1: a ';' separates classes only in a string"),
    ("x.txt", "", r"x\.txt contains no class"),
    ("x.txt", "# nothing\n\n", r"x\.txt contains no class"),
    ("x.csv", "name,synonyms\ndog,\n,couch", r"Name 1 of entry 2 \(line 3\) of .*x\.csv is empty"),
    ("x.csv", "name\ndog\n\n\ndog", r"Entries 1 and 2 \(lines 2 and 5\) of .*x\.csv are both 'dog'"),
    ("x.csv", "name,synonyms\nsofa,couch|\n", r"Name 3 of entry 1 \(line 2\) of .* is empty"),
    ("x.csv", "name,synonyms\n", r"x\.csv contains no class"),
    ("x.csv", "\n\n,\n", r"x\.csv contains no class"),
    ("x.csv", "\n\ndog,hound\n", r"x\.csv, line 3: the header must have the column name"),
    ("x.csv", '\nname,synonyms\nsofa,"couch, settee"\n', r"x\.csv, line 3: separate synonyms by '\|', not by ','"),
    ("x.csv", "name;synonyms\nsofa;couch, settee\n", r"x\.csv, line 2: separate synonyms by '\|', not by ','"),
    ("x.csv", "", r"x\.csv contains no class"),
    (
        "x.csv",
        "dog,hound\ncat,\n",
        r"x\.csv, line 1: the header must have the column name and some of synonyms.*'hound'",
    ),
    ("x.csv", "name,sinonyms\ndog,\n", r"x\.csv, line 1: the header .* got \['name', 'sinonyms'\]"),
    ("x.csv", "name,name\ndog,\n", r"x\.csv, line 1: the header"),
    ("x.csv", "synonyms\ndog\n", r"x\.csv, line 1: the header"),
    ("x.csv", "name,synonyms\ndog\nbuilding, edifice, house\n", r"x\.csv, line 3: 3 cells for 2 columns; quote names"),
    ("x.csv", "name,synonyms\nsofa,couch;settee\n", r"x\.csv, line 2: separate synonyms by '\|'"),
    ("x.csv", "name,is_thing\ndog,yes\n", r"x\.csv, line 2: is_thing must be thing, stuff or empty, got 'yes'"),
    ("x.csv", "name,color\ndog,\ncat,red\n", r"x\.csv, line 3: a color must be written as #rrggbb, got 'red'"),
    ("x.csv", "name,templates\ndog,a photo\n", r"Entry 1 \(line 2\) of .*x\.csv: 'a photo' is neither a set"),
    ("x.csv", 'name\ndog\n"cat\n', r"x\.csv, line 3: invalid CSV: unexpected end of data"),
    ("x.json", '[\n"dog",\n"cat"\n"cow"]', r"x\.json, line 4: invalid JSON: Expecting ',' delimiter \(column 1\)"),
    ("x.json", "", r"x\.json, line 1: invalid JSON"),
    ("x.json", "[]", r"x\.json contains no class"),
    ("x.json", "{}", r"x\.json contains no class"),
    ("x.json", '{"classes": []}', r"x\.json contains no class"),
    ("x.json", '\n"dog"', r"x\.json, line 2: classes must be a list"),
    ("x.json", '{\n"classes":\n 3}', r"x\.json, line 3: classes must be a list"),
    ("x.json", '["dog",\n""]', r"Entry 2 \(line 2\) of .*x\.json is empty"),
    ("x.json", '["dog",\n[]]', r"Entry 2 \(line 2\) of .*x\.json is empty"),
    ("x.json", '["dog",\n["cat",\n 5]]', r"Name 2 of entry 2 \(line 2\) of .*x\.json must be a string, got 5"),
    ("x.json", '["dog", null]', r"Name 1 of entry 2 \(line 1\) of .*x\.json must be a string, got None"),
    ("x.json", '["dog",\n\n"Dog"]', r"Entries 1 and 2 \(lines 1 and 3\) of .*x\.json are both 'Dog'"),
    ("x.json", '{"dog": [],\n"dog":\n ["hound"]}', r"Entries 1 and 2 \(lines 1 and 2\) of .*x\.json are both 'dog'"),
    ("x.json", '{"dog": [],\n"cat": "kitty"}', r"x\.json, line 2: the synonyms of 'cat' must be a list of names"),
    ("x.json", '{"dog": [],\n"cat": {"a": 1}}', r"x\.json, line 2: the synonyms of 'cat' must be a list of names"),
    ("x.json", '[{"name": "dog", "synonyms": "hound"}]', r"x\.json, line 1: the synonyms of 'dog' must be a list"),
    ("x.json", '[\n{"label": "dog"}]', r"x\.json, line 2: the key 'label' is unknown; there are name, synonyms"),
    (
        "x.json",
        '[\n{"name": "dog",\n"is_thng": true}]',
        r"x\.json, line 2: the key 'is_thng' .*did you mean 'is_thing'",
    ),
    ("x.json", '[{"synonyms": ["dog"]}]', r"x\.json, line 1: the class has no 'name'"),
    ("x.json", '[{"name": "dog", "name": "cat"}]', r"x\.json, line 1: the key 'name' is given twice"),
    ("x.json", '{"classes": ["dog"],\n"clases": []}', r"x\.json, line 2: the key 'clases' .*did you mean 'classes'"),
    ("x.json", '{"classes": ["dog"],\n"classes": []}', r"x\.json, line 2: the key 'classes' is given twice"),
    ("x.json", '{"labels": ["dog", "cat"]}', r"x\.json, line 1: rename the key 'labels' to 'classes'"),
    ("x.json", '["cat",\n{"name": "dog", "color": "red"}]', r"x\.json, line 2: a color must be written as #rrggbb"),
    (
        "x.json",
        '["cat",\n{"name": "dog", "color": [1, 2]}]',
        r"Entry 2 \(line 2\) of .*x\.json: a color must be three",
    ),
    ("x.json", '["cat",\n{"name": "dog", "is_thing": 1}]', r"Entry 2 \(line 2\) of .*x\.json: is_thing must be true"),
    ("x.json", '[{"name": "dog", "templates": ["{} {}"]}]', r"Entry 1 \(line 1\) of .*x\.json: A prompt template"),
    ("x.json", '["dog", ' + "9" * 5000 + "]", r"x\.json contains a number that cannot be read: Exceeds the limit"),
    (
        "x.json",
        '["dog",\n' + "[" * 500 + "]" * 500 + "]",
        r"Name 1 of entry 2 \(line 2\) of .*x\.json must be a string",
    ),
    (
        "x.json",
        "[" * 3000 + '"dog"' + "]" * 3000,
        r"x\.json is nested too deeply|must be a string, got a list|got \[\[",
    ),
    ("x.json", '["dog",\n"\\ud83d"]', r"Entry 2 \(line 2\) of .*x\.json contains U\+D83D"),
    (
        "x.json",
        '{"0": "dog",\n"2": "cat"}',
        r"x\.json, line 2: the class ids .* got 2 instead of 1: give the names as a list",
    ),
    ("x.json", '{"dog": 0,\n"cat": 0}', r"x\.json, line 2: the class ids must be 0, 1, 2"),
    ("x.json", '{"5": "dog"}', r"x\.json, line 1: the class ids .* got 5 instead of 1"),
    ("x.json", '[{"name": "dog",\n"isthing": 2}]', r"x\.json, line 1: COCO's 'isthing' must be 0 or 1, got 2"),
    ("x.txt", "0:invalid_class_id\n1:dog\ncat", r"x\.txt, line 3: this line must start with a number and ':'"),
    ("x.txt", "1:dog\n1:cat", r"x\.txt, line 2: the numbers of the classes must ascend, got 1 after 1"),
    ("x.txt", "1:dog\n2:", r"Entry 2 \(line 2\) of .*x\.txt is empty"),
    ("x.json", "[" * 100_000, r"x\.json is nested too deeply|invalid JSON"),
    # Files that are no text.
    ("x.txt", "dog\nK\xe4se".encode("latin-1"), r"x\.txt, line 2: byte 0xe4 is not valid UTF-8; save the file"),
    ("x.json", '["dog"]'.encode("utf-16"), r"x\.json, line 1: byte 0xff is not valid UTF-8"),
    ("x.csv", "name\ndog".encode("utf-16-le"), r"x\.csv contains zero bytes and is not UTF-8"),
    ("x.yaml", "- dog", r"x\.yaml is not a vocabulary file: its name must end in \.json, \.csv or \.txt"),
]


class TestBadFiles:
    @pytest.mark.parametrize(("name", "text", "message"), BAD_FILES)
    def test_errors_name_file_and_line(self, tmp_path, name, text, message):
        path = write(tmp_path, name, text)
        with pytest.raises(ValueError, match=message) as caught:
            Vocabulary.parse(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize("form", [str, Path])
    def test_missing_file_raises(self, tmp_path, form):
        with pytest.raises(ValueError, match=r"file .*gone\.txt cannot be read: No such file"):
            Vocabulary.parse(form(tmp_path / "gone.txt"))
        (tmp_path / "folder.csv").mkdir()
        with pytest.raises(ValueError, match=r"folder\.csv cannot be read: Is a directory"):
            Vocabulary.parse(form(tmp_path / "folder.csv"))

    def test_string_with_a_semicolon_is_not_a_file(self):
        assert Vocabulary.parse("dog; notes.txt").labels == ["dog", "notes.txt"]


# The characters that `str.isprintable` accepts; filtering others out would reject most of the drawn texts.
PRINTABLE = st.characters(exclude_categories=("C", "Z")) | st.just(" ")
JSON_NAME = st.text(PRINTABLE, min_size=1, max_size=6).filter(str.strip)


@settings(max_examples=40)
@given(st.lists(st.lists(JSON_NAME, min_size=1, max_size=3), min_size=1, max_size=5), st.sampled_from([None, 1, 3]))
def test_json_in_any_layout_equals_the_list(tmp_path_factory, names, indent):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(names, indent=indent, ensure_ascii=bool(indent)), encoding="utf-8")

    def result(text):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return Vocabulary.parse(text).names
            except ValueError:
                return "refused"

    assert result(path) == result(names)


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


def test_palette_is_deterministic_and_well_separated():
    palette = color_palette(40)
    assert palette[:7] == color_palette(7)
    assert len(set(color_palette(847))) == 847
    assert len(color_palette(5000)) == 5000 and color_palette(0) == []
    lab = _oklab(np.array(palette))
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + np.eye(40)
    assert distances.min() > 0.08  # neighbours in a legend stay apart; a just noticeable difference is near 0.02
    assert np.linalg.norm(_oklab(np.array([[255, 255, 255]])) - [[1, 0, 0]]) < 1e-3


@pytest.mark.parametrize(
    "given",
    [
        np.array(["dog", "lamp"]),
        np.array(["dog", "lamp"], dtype=object),
        {"lamp", "dog"},
        frozenset({"lamp", "dog"}),
        {0: "dog", 1: "lamp"},
        {1: "lamp", 0: "dog"},
        {"0": "dog", "1": "lamp"},
        {np.int64(0): "dog", np.int64(1): ["lamp"]},
        {"dog": 5, "lamp": 3}.keys(),
        {5: "dog", 3: "lamp"}.values(),
        iter(["dog", "lamp"]),
        (word for word in ("dog", "lamp")),
    ],
    ids=lambda given: type(given).__name__,
)
def test_every_container_of_words(given):
    """A set has no order: its classes are sorted, so that they have the same numbers in every process."""
    assert Vocabulary.parse(given).labels == ["dog", "lamp"]


@pytest.mark.parametrize(
    "given, message",
    [
        (["sky; heaven"], r"Label 1 \(index 0\) is 'sky; heaven': a ';' separates classes"),
        (["dog", ["lamp", "sky; heaven"]], r"Label 2 \(index 1\) is 'sky; heaven'"),
        ({1: "dog", 2: "lamp"}, r"class ids 0\.\.1 to names, as `id2label` does; got the keys \[1, 2\]"),
        ({"dog": 0, "lamp": 1}, "got the key 'dog'"),
        ({0.5: "dog"}, "got the key 0.5"),
        ({True: "sky", False: "lawn"}, "class ids 0..1 to names, as `id2label` does; got the key True"),
        ({"0": "dog", 0: "lamp"}, "got the keys"),
        ({}, "No labels"),
        ([], "No labels"),
    ],
)
def test_refused_containers(given, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary.parse(given)


@pytest.mark.parametrize("given", [5, None, b"dog", [{"dog", "cat"}], [{0: "dog"}], {1, "dog"}])
def test_unsupported_containers_raise(given):
    with pytest.raises(TypeError, match=r"(?i)label"):
        Vocabulary.parse(given)


@pytest.mark.parametrize(
    "given, message",
    [
        ([b"sky"], r"^The name of label 1 \(index 0\) must be text, got b'sky': decode the bytes to text\."),
        (np.array(["sky"], dtype="S"), "got b'sky': decode the bytes"),
        (np.array("sky; lawn"), r"got array\('sky; lawn'.*\. Give the array's text, `\.item\(\)`\.$"),
        (np.array(b"sky"), "Decode the bytes to text"),
        (b"sky; lawn", "Decode the bytes to text"),
    ],
)
def test_text_in_another_container_is_refused_with_what_to_give(given, message):
    with pytest.raises(TypeError, match=message):
        Vocabulary.parse(given)


def test_long_labels_are_shortened_in_messages():
    long = "x" * 50_000
    calls = (lambda: Vocabulary.parse([long, long]), lambda: Vocabulary.parse("a").with_void([long, long]))
    for call in (
        *calls,
        lambda: Vocabulary.parse([f"a;{long}"]),
        lambda: Vocabulary.parse([["a", long], ["b", long]]),
    ):
        with warnings.catch_warnings(), pytest.raises((ValueError, UserWarning)) as caught:
            warnings.simplefilter("error")
            call()
        assert len(str(caught.value)) < 1000
