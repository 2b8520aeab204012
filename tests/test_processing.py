"""Tests of `GKCProcessor`: tokenization, preprocessing of images, saving and loading."""

import json
import logging
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import CLIPTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import AutoProcessor

from modeling_gkc.image_processing_gkc import GKCImageProcessor
from modeling_gkc.modeling_gkc import GKCForOpenVocabSegmentation
from modeling_gkc.processing_gkc import GKCProcessor
from modeling_gkc.prompt_templates import PROMPT_TEMPLATES
from modeling_gkc.vocabulary import UNKNOWN_WORDS_HINT, Vocabulary

from .conftest import small_config, word_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def processor() -> GKCProcessor:
    return GKCProcessor(GKCImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}), word_tokenizer())


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8))


def clip_tokenizer(folder) -> CLIPTokenizer:
    """Build a CLIP tokenizer with the letters and the word "dog" as tokens."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "do", "dog</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=12)


def prompts_of(processor: GKCProcessor, inputs) -> list[str]:
    return processor.tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)


class TestText:
    @pytest.mark.parametrize("text", ["dog; sofa, couch; lamp", ["dog", ["sofa", "couch"], "lamp"]])
    def test_names_are_grouped_by_class(self, processor, text):
        inputs = processor(text=text, return_tensors="pt")
        assert set(inputs) == {"input_ids", "attention_mask", "class_ids", "names_per_class"}
        assert prompts_of(processor, inputs) == ["dog", "sofa", "couch", "lamp"]
        assert inputs["class_ids"].tolist() == [0, 1, 1, 2]
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (4, 3)
        assert all(value.dtype == torch.int64 for value in inputs.values())

    def test_prompts_are_right_padded_with_mask(self, processor):
        inputs = processor(text="dog; red dog sofa", return_tensors="pt")
        tokenizer = processor.tokenizer
        alone = tokenizer("dog")["input_ids"]
        assert inputs["input_ids"][0].tolist() == [*alone, tokenizer.pad_token_id, tokenizer.pad_token_id]
        assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
        assert inputs["input_ids"][1].tolist() == tokenizer("red dog sofa")["input_ids"]

    def test_prompts_are_grouped_by_name(self, image):
        processor = GKCProcessor(GKCImageProcessor(), word_tokenizer("a red dog sofa couch"), ["{}", "a red {}"])
        inputs = processor(text="dog; sofa, couch", return_tensors="pt")
        assert prompts_of(processor, inputs) == ["dog", "a red dog", "sofa", "a red sofa", "couch", "a red couch"]
        assert inputs["class_ids"].tolist() == [0, 0, 1, 1, 1, 1]

    def test_name_ids_are_returned_only_with_several_templates(self, processor):
        inputs = processor(text="dog; sofa, couch", prompt_templates=["{}", "red {}"], return_tensors="pt")
        words = ["input_ids", "attention_mask", "class_ids", "names_per_class", "name_ids", "prompts_per_name"]
        assert list(inputs) == words
        assert inputs["names_per_class"].tolist() == [1, 2] and inputs["prompts_per_name"].tolist() == [2, 2, 2]
        assert inputs["name_ids"].tolist() == [0, 0, 1, 1, 2, 2] and inputs["name_ids"].dtype == torch.int64
        assert "name_ids" not in processor(text="dog; sofa, couch", prompt_templates=["red {}"], return_tensors="pt")
        processor.prompt_templates = ["{}", "red {}"]
        assert "name_ids" not in processor(text="dog; sofa, couch", prompt_templates="plain", return_tensors="pt")
        assert processor(text="dog", return_tensors="np")["name_ids"].tolist() == [0, 0]

    def test_name_ids_let_the_model_average_the_templates(self, within):
        """A class with three templates has the average of their embeddings, beside a class with one prompt."""
        tokenizer = word_tokenizer("a red dog sofa couch lamp")
        model = GKCForOpenVocabSegmentation(small_config()).eval()
        plain = GKCProcessor(GKCImageProcessor(), tokenizer)
        inputs = plain(text="dog; sofa, couch", prompt_templates=["{}", "red {}", "a {}"], return_tensors="pt")
        embeds = model.get_class_embeddings(**inputs)
        assert embeds.class_ids.tolist() == [0, 1, 1]
        prompts = [f"{start}{name}" for name in ("dog", "sofa", "couch") for start in ("", "red ", "a ")]
        separate = model.get_class_embeddings(**plain(text=prompts, return_tensors="pt")).class_embeds
        expected = torch.nn.functional.normalize(separate.reshape(3, 3, -1).mean(dim=1), dim=-1)
        within("class embeddings: average of templates", (embeds.class_embeds - expected).abs().max(), 1e-6)

    def test_class_templates_replace_processor_templates(self, processor):
        vocabulary = Vocabulary(
            [["dog"], ["sofa", "couch"], ["lamp"]], templates=[["red {}"], None, ["{}", "blue {}", "red {}"]]
        )
        inputs = processor(text=vocabulary, return_tensors="pt")
        assert prompts_of(processor, inputs) == ["red dog", "sofa", "couch", "lamp", "blue lamp", "red lamp"]
        assert inputs["class_ids"].tolist() == [0, 1, 1, 2, 2, 2]
        assert inputs["name_ids"].tolist() == [0, 1, 2, 3, 3, 3]
        inputs = processor(text=vocabulary, prompt_templates=["blue {}"], void_labels="sky", return_tensors="pt")
        assert prompts_of(processor, inputs)[:3] == ["red dog", "blue sofa", "blue couch"]
        assert prompts_of(processor, inputs)[-1] == "blue sky"

    @pytest.mark.parametrize("where", ["init", "call", "attribute"])
    def test_named_template_sets(self, where):
        tokenizer = word_tokenizer("a an photo of . red air dog")
        processor = GKCProcessor(GKCImageProcessor(), tokenizer, "photo" if where == "init" else None)
        if where == "attribute":
            processor.prompt_templates = "photo"
        inputs = processor(
            text="dog; air", **({"prompt_templates": "photo"} if where == "call" else {}), return_tensors="pt"
        )
        assert prompts_of(processor, inputs) == ["a photo of a dog .", "a photo of an air ."]

    def test_braces_in_a_name_are_kept(self, processor):
        processor.prompt_templates = ["red {}"]
        with pytest.warns(UserWarning, match=r"\{0\}"):
            processor(text=["dog", "{0}"], return_tensors="pt")

    @pytest.mark.parametrize("templates", [[], ["a photo"], ["{} and {}"], "fotos"])
    def test_invalid_templates_raise(self, templates, processor):
        with pytest.raises(ValueError, match="template"):
            GKCProcessor(GKCImageProcessor(), word_tokenizer(), templates)
        with pytest.raises(ValueError, match="template"):
            processor(text="dog", prompt_templates=templates, return_tensors="pt")

    def test_void_labels_are_the_last_classes(self, processor):
        inputs = processor(text="dog; sofa, couch", void_labels=["sky", ["lawn", "grass"]], return_tensors="pt")
        assert prompts_of(processor, inputs) == ["dog", "sofa", "couch", "sky", "lawn", "grass"]
        assert inputs["class_ids"].tolist() == [0, 1, 1, 2, 3, 3]
        with pytest.raises(ValueError, match="'couch' is a void label and a name of the class 'sofa'"):
            processor(text="dog; sofa, couch", void_labels="couch", return_tensors="pt")

    def test_packaged_and_stored_vocabularies(self, processor, tmp_path):
        (tmp_path / "words.txt").write_text("dog\nsofa, couch\n")
        for text in (tmp_path / "words.txt", str(tmp_path / "words.txt")):
            assert prompts_of(processor, processor(text=text, return_tensors="pt")) == ["dog", "sofa", "couch"]
        with pytest.warns(UserWarning, match="does not know these words: 'road'"):
            inputs = processor(text="cityscapes_19", return_tensors="pt")
        assert inputs["class_ids"].max() == 18 and len(inputs["class_ids"]) == 35

    @pytest.mark.parametrize(
        ("text", "match"), [([], "No labels"), ("dog;;", "Label 2"), ("dog;dog", "Labels 1 and 2")]
    )
    def test_invalid_vocabularies_raise(self, processor, text, match):
        with pytest.raises(ValueError, match=match):
            processor(text=text, return_tensors="pt")

    def test_too_long_label_raises_and_is_not_truncated(self, processor, recwarn, transformers_log):
        longest = "dog " * 14
        assert processor(text=longest, return_tensors="pt")["input_ids"].shape == (1, 16)
        with pytest.raises(ValueError, match=r"'red dog dog .*17 tokens.* at most 16"):
            processor(text=["dog", "red " + longest], return_tensors="pt")
        assert transformers_log.records == [] and list(recwarn) == []

    def test_template_tokens_count_towards_the_limit(self, processor):
        processor.prompt_templates = ["red {}"]
        with pytest.raises(ValueError, match="17 tokens"):
            processor(text="dog " * 14, return_tensors="pt")

    def test_unknown_words_give_one_warning(self, processor):
        with pytest.warns(UserWarning) as caught:
            inputs = processor(text="red zebra; dog; okapi, zebra lamp", return_tensors="pt")
        assert len(caught) == 1
        assert str(caught[0].message) == "The text encoder does not know these words: 'zebra', 'okapi'."
        assert inputs["input_ids"].shape[0] == 4

    def test_unknown_words_of_templates_and_of_many_labels(self, processor):
        with pytest.warns(UserWarning) as caught:
            processor(
                text=["dog", *(f"beast{index}" for index in range(25))],
                prompt_templates=["a red {}."],
                return_tensors="pt",
            )
        listed = ", ".join(repr(word) for word in ["a", *(f"beast{index}" for index in range(19))])
        message = str(caught[0].message)
        assert message.startswith(
            f"The text encoder does not know these words: {listed} and 6 more. Classes without a"
        )
        assert message.endswith(f" and 5 more. {UNKNOWN_WORDS_HINT}")

    def test_warning_lists_classes_with_unknown_words_only(self, processor):
        with pytest.warns(UserWarning, match="results are meaningless: 'zebra', 'big okapi'. Use a checkpoint"):
            processor(text="red disc; zebra, gnu; big okapi; okapi, sofa")
        with pytest.warns(UserWarning, match="results are meaningless: 'okapi'"):
            processor(text="red disc", void_labels="lamp; okapi")

    @pytest.mark.parametrize(
        ("text", "void"),
        [("zebra", None), ("zebra, gnu; big okapi", None), (["zebra"], "sky"), ("sky", ["zebra", "!"])],
    )
    @pytest.mark.parametrize("templates", ["plain", ["a red {}"]])
    def test_vocabulary_without_known_words_raises(self, processor, text, void, templates):
        with pytest.raises(ValueError, match=r"knows none of these words.*'zebra'.*gkc open --help"):
            processor(text=text, void_labels=void, prompt_templates=templates)

    def test_byte_level_tokenizer_knows_all_words(self, tmp_path):
        processor = GKCProcessor(GKCImageProcessor(), clip_tokenizer(tmp_path))
        assert processor.unknown_classes(Vocabulary.parse("zebra; okapi")) == []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            processor(text="zebra; okapi")

    def test_labels_with_equal_tokens_raise(self, processor):
        with pytest.raises(ValueError, match=r"Labels 1 and 3 \('red disc' and 'red-disc'\) have the same tokens"):
            plain = word_tokenizer()
            plain.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s-]"), "removed")
            GKCProcessor(processor.image_processor, plain)(text=["red disc", "sky", "red-disc"])
        with pytest.warns(UserWarning, match="does not know"):  # the warning about unknown words is expected
            processor(text="dog; unicorn; dragon")

    def test_label_without_tokens_raises(self, processor):
        processor.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
        with pytest.raises(ValueError, match="The tokenizer has no token for the label '~~': write it in other"):
            processor(text="dog; ~~")

    @pytest.mark.parametrize("label", ["<end>", "dog <end> sofa", "<pad>"])
    def test_label_with_a_special_token_raises(self, processor, label):
        with pytest.raises(ValueError, match=f"The label '{label}' contains the tokenizer's special token"):
            processor(text=["dog", ["sofa", label]])

    def test_known_words_do_not_warn(self, processor):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            processor(text=Vocabulary([["Red Dog"], ["lawn", "grass"]]), return_tensors="pt")

    def test_tokenizer_without_pad_token_raises(self, processor):
        processor.tokenizer.pad_token = None
        assert processor(text="dog; lamp", return_tensors="pt")["input_ids"].shape == (2, 3)
        with pytest.raises(ValueError, match="pad_token"):
            processor(text="dog; red lamp", return_tensors="pt")

    def test_clip_tokenizer(self, tmp_path):
        """CLIP uses one token for padding, end of text and unknown words, which must not count as an unknown word."""
        processor = GKCProcessor(GKCImageProcessor(), clip_tokenizer(tmp_path))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            inputs = processor(text="Dog; cat", return_tensors="pt")
        start, end = processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
        dog, letters = 53, [2, 0, 26 + 19]
        assert inputs["input_ids"].tolist() == [[start, dog, end, end, end], [start, *letters, end]]
        assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
        with pytest.raises(ValueError, match=r"'abcdefghijkl' has 14 tokens"):
            processor(text="abcdefghijkl", return_tensors="pt")


class TestCalls:
    def test_images_and_text(self, processor, image):
        inputs = processor(images=[image, image], text="dog; lamp", return_tensors="pt")
        assert list(inputs) == processor.model_input_names
        with_names = processor(images=image, text="dog; lamp", prompt_templates=["{}", "red {}"], return_tensors="pt")
        assert list(with_names) == [*processor.model_input_names, "name_ids", "prompts_per_name"]
        assert torch.equal(
            inputs["pixel_values"], processor.image_processor([image, image], return_tensors="pt")["pixel_values"]
        )
        assert set(processor(image, return_tensors="pt")) == {"pixel_values", "pixel_mask", "original_sizes"}

    def test_numpy(self, processor, image):
        inputs = processor(image, "dog", "np")
        assert all(isinstance(value, np.ndarray) for value in inputs.values())

    def test_image_arguments_of_a_call(self, processor, image):
        assert processor(image, size={"height": 32, "width": 64}, return_tensors="pt")["pixel_values"].shape == (
            1,
            3,
            32,
            64,
        )
        with pytest.raises(TypeError, match="sise"):
            processor(image, sise=5, return_tensors="pt")
        with pytest.raises(TypeError, match="size"):
            processor(text="dog", size=5, return_tensors="pt")

    def test_call_without_inputs_raises(self, processor):
        for inputs in ({"text": "dog"}, {"images": image}, {"images": image, "text": "dog"}):
            with pytest.raises(ValueError, match=r"`return_tensors` must be 'pt', 'np' or None.* got 'foo'"):
                processor(**inputs, return_tensors="foo")
        with pytest.raises(ValueError, match="`images`, `text`, or both"):
            processor()

    @pytest.mark.parametrize("words", [{"void_labels": "sky"}, {"prompt_templates": "photo"}])
    def test_text_arguments_without_text_raise(self, processor, image, words):
        with pytest.raises(ValueError, match="need `text`"):
            processor(image, **words, return_tensors="pt")

    def test_inputs_move(self, processor, image):
        inputs = processor(image, "dog", return_tensors="pt").to(torch.float16)
        assert inputs["pixel_values"].dtype == torch.float16 and inputs["input_ids"].dtype == torch.int64

    def test_post_processing_matches_the_image_processor(self, processor):
        outputs = {"class_queries_logits": torch.randn(1, 4, 6), "masks_queries_logits": torch.randn(1, 4, 8, 8)}
        for task in ("semantic", "instance", "panoptic"):
            name = f"post_process_{task}_segmentation"
            ours, theirs = (
                getattr(owner, name)(outputs, target_sizes=[(9, 7)])[0]
                for owner in (processor, processor.image_processor)
            )
            assert torch.equal(*(r if task == "semantic" else r["segmentation"] for r in (ours, theirs)))


class TestSaving:
    @pytest.mark.parametrize("kind", ["words", "clip"])
    @pytest.mark.parametrize("auto", [True, False])
    def test_round_trip(self, kind, auto, tmp_path, image, transformers_log, recwarn):
        tokenizer = word_tokenizer() if kind == "words" else clip_tokenizer(tmp_path)
        image_processor = GKCImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}, size_divisor=16)
        processor = GKCProcessor(image_processor, tokenizer, ["{}", "dog {}"])
        folder = tmp_path / "saved"
        with transformers_log.at_level(logging.WARNING):
            processor.save_pretrained(folder)
            loaded = (AutoProcessor if auto else GKCProcessor).from_pretrained(folder)
        assert transformers_log.records == [] and list(recwarn) == []
        assert type(loaded) is GKCProcessor and loaded.prompt_templates == ["{}", "dog {}"]
        assert loaded.tokenizer.model_max_length == tokenizer.model_max_length
        inputs, expected = (each(image, "dog; sofa, lamp", "pt") for each in (loaded, processor))
        assert all(torch.equal(inputs[key], expected[key]) for key in processor.model_input_names)
        alone = AutoImageProcessor.from_pretrained(folder)
        assert type(alone) is GKCImageProcessor and alone.to_dict() == image_processor.to_dict()

    def test_templates_can_be_changed_while_loading(self, processor, tmp_path):
        processor.save_pretrained(tmp_path)
        assert GKCProcessor.from_pretrained(tmp_path).prompt_templates == ["{}"]
        assert GKCProcessor.from_pretrained(tmp_path, prompt_templates=["red {}"]).prompt_templates == ["red {}"]

    def test_named_template_set_is_saved_in_full(self, tmp_path):
        """A later version of the library must not change the templates of a checkpoint."""
        GKCProcessor(GKCImageProcessor(), word_tokenizer(), "vild14").save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "processor_config.json").read_text())["prompt_templates"]
        assert stored == list(PROMPT_TEMPLATES["vild14"])
        assert GKCProcessor.from_pretrained(tmp_path).prompt_templates == stored
        assert GKCProcessor.from_pretrained(tmp_path, prompt_templates="photo").prompt_templates == [
            "a photo of a {}."
        ]

    def test_swapped_constructor_arguments_raise(self):
        with pytest.raises(TypeError):
            GKCProcessor(word_tokenizer(), GKCImageProcessor())


class TestCommonCalls:
    """Arguments that other processors of transformers accept, with the same meaning."""

    LABELS = ["dog", "red dog sofa", "lamp"]

    def test_calls_of_published_examples(self, processor, image):
        """The processor takes the calls of the published examples for CLIP, OWLv2 and OneFormer."""
        expected = processor(images=image, text=self.LABELS, return_tensors="pt")
        for settings in (
            {"padding": True, "return_tensors": "pt"},
            {"padding": "longest", "truncation": True, "return_tensors": "pt"},
            {"text_kwargs": {"padding": True}, "images_kwargs": {"do_pad": True}, "return_tensors": "pt"},
            {"common_kwargs": {"return_tensors": "pt"}},
            {"text_kwargs": {"return_tensors": "pt"}, "images_kwargs": {"return_tensors": "pt"}},
        ):
            called = processor(text=self.LABELS, images=image, **settings)
            assert called.keys() == expected.keys()
            assert all(torch.equal(called[name], expected[name]) for name in expected)

    @pytest.mark.parametrize(
        "settings",
        [
            {"padding": "max_length"},
            {"padding": "max_length", "max_length": 9},
            {"padding": True, "padding_side": "left"},
            {"padding": True, "pad_to_multiple_of": 8},
            {"padding": True, "truncation": True, "max_length": 4},
            {"padding": True, "truncation": "longest_first", "max_length": 3},
            {"padding": True, "add_special_tokens": False},
            {"padding": False},
            {"padding": "do_not_pad"},
        ],
        ids=str,
    )
    def test_prompts_match_the_tokenizer(self, processor, settings):
        tensors = None if settings["padding"] in (False, "do_not_pad") else "pt"
        theirs = processor.tokenizer(self.LABELS, return_tensors=tensors, **settings)
        for ours in (
            processor(text=self.LABELS, return_tensors=tensors, **settings),
            processor(text=self.LABELS, text_kwargs=settings, return_tensors=tensors),
            processor(text=self.LABELS, common_kwargs=settings | {"return_tensors": tensors}),
        ):
            for name in ("input_ids", "attention_mask"):
                assert type(ours[name]) is type(theirs[name])
                assert [list(row) for row in ours[name]] == [list(row) for row in theirs[name]]

    def test_tokenizer_settings_are_defaults(self, processor):
        padded = word_tokenizer()
        padded.init_kwargs |= {"padding": "max_length", "max_length": 11}
        other = GKCProcessor(processor.image_processor, padded)
        assert other(text="dog", return_tensors="pt")["input_ids"].shape == (1, 11)
        assert other(text="dog", padding=True, return_tensors="pt")["input_ids"].shape == (1, 3)

    def test_lists_without_return_tensors(self, processor, image):
        called = processor(images=image, text=self.LABELS)
        assert all(type(value) is list for value in called.values())
        assert [len(ids) for ids in called["input_ids"]] == [5, 5, 5] and called["class_ids"] == [0, 1, 2]

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"max_length": 3}, "'red dog sofa' has 5 tokens .* at most 3"),
            ({"max_length": 400}, "`max_length` must be at most 16.* got 400"),
            ({"max_length": 0}, "`max_length`"),
            ({"padding": "all"}, "all"),
            ({"truncation": "some"}, "some"),
            ({"padding_side": "top"}, "`padding_side`"),
            ({"pad_to_multiple_of": 0}, "`pad_to_multiple_of`"),
            ({"padding": False}, "without padding"),
            ({"text_kwargs": {"padding": True}, "padding": False}, "padding either in `text_kwargs` or"),
            ({"text_kwargs": [1]}, "`text_kwargs` must be a dict"),
        ],
    )
    def test_unsupported_arguments_raise(self, processor, settings, message):
        with pytest.raises(ValueError, match=message):
            processor(text=self.LABELS, return_tensors="pt", **settings)

    @pytest.mark.parametrize("settings", [{"sise": 1}, {"images_kwargs": {"sise": 1}}, {"text_kwargs": {"size": 1}}])
    def test_unknown_arguments_raise(self, processor, image, settings):
        with pytest.raises(TypeError, match=r"no argument '(sise|size)'"):
            processor(images=image, text="dog", **settings)

    def test_model_input_names(self, processor, image):
        several = GKCProcessor(processor.image_processor, processor.tokenizer, ["{}", "red {}"])
        for each in (processor, several):
            assert set(each(images=image, text="dog", return_tensors="pt")) == set(each.model_input_names)
