"""`EncodedVocabulary`: encoded once, checked, extended by void classes, stored in files."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modeling_gkc import EncodedVocabulary, GKCForOpenVocabSegmentation, GKCImageProcessor, GKCProcessor, Vocabulary
from modeling_gkc.file_checksums import EMPTY_CHECKSUM, write_checksum

from .conftest import small_config, word_tokenizer

WORDS = "red disc; blue square, box; lawn, grass"


@pytest.fixture
def model():
    return GKCForOpenVocabSegmentation(small_config()).eval()


@pytest.fixture
def processor():
    return GKCProcessor(GKCImageProcessor(size={"height": 64, "width": 64}), word_tokenizer())


class TestClassesThatCannotBeToldApart:
    @pytest.mark.parametrize("words", ["red; zebra; okapi, gnu", "red; zebra; big okapi"])
    def test_equal_embeddings_are_not_stored(self, model, processor, words):
        """Also those that differ only in how many unknown words they have."""
        with (
            pytest.warns(UserWarning, match="results are meaningless"),
            pytest.raises(ValueError, match=r"'zebra' = '.*oka"),
        ):
            model.set_vocabulary(words, processor)
        assert model.vocabulary is None
        with pytest.warns(UserWarning, match="does not know these words: 'zebra'"):
            model.set_vocabulary("red; zebra; dog", processor)

    def test_one_name_of_several_classes_makes_them_no_less_distinct(self, model, processor, recwarn):
        with pytest.warns(UserWarning, match="A name is shared"):
            model.set_vocabulary("dog, lamp; sofa, lamp", processor)

    def test_text_encoder_that_ignores_its_prompts_raises(self, model, processor):
        known = model.text_model.get_input_embeddings()
        with torch.no_grad():
            known.weight[processor.tokenizer.convert_tokens_to_ids("couch")] = known.weight[
                processor.tokenizer.convert_tokens_to_ids("sofa")
            ]
        with pytest.warns(UserWarning, match=r"equal embeddings.*'sofa' = 'couch'"):
            EncodedVocabulary.encode("dog; sofa; couch", model, processor)
        with pytest.raises(ValueError, match=r"equal embeddings.*'sofa' = 'couch'"):
            EncodedVocabulary.encode("sofa; couch", model, processor)


class TestParts:
    def test_inputs_are_those_of_the_model(self, model, processor):
        encoded = EncodedVocabulary.encode(WORDS, model, processor)
        expected = model.get_class_embeddings(**processor(text=WORDS, return_tensors="pt"))
        inputs = encoded.model_inputs()
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
        assert inputs["prompt_reduction"] is None and encoded.labels == ["red disc", "blue square", "lawn"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vocabulary": "dog; sofa"}, "embeddings are of 3 classes, but the vocabulary has 2"),
            ({"class_ids": [0, 0, 2]}, "must contain every number from 0"),
            ({"void_ids": (1,)}, r"must be the last of 3 classes and not all of them, got \[1\]"),
            ({"void_ids": (0, 1, 2)}, "and not all of them"),
            ({"reduction": "median"}, "`reduction` must be one of mean, max, embedding_mean, got 'median'"),
        ],
    )
    def test_mismatched_parts_raise(self, changes, message):
        parts = {"vocabulary": "dog; sofa; lamp", "class_ids": [0, 1, 2]} | changes
        parts["vocabulary"] = Vocabulary.parse(parts["vocabulary"])
        parts["class_ids"] = torch.tensor(parts["class_ids"])
        with pytest.raises(ValueError, match=message):
            EncodedVocabulary(class_embeds=torch.eye(3, 16), **parts)

    def test_void_classes_are_given_once(self, model, processor):
        encoded = EncodedVocabulary.encode("dog", model, processor).with_void("sky", model, processor)
        with pytest.raises(ValueError, match="void classes already"):
            encoded.with_void("star", model, processor)

    def test_invalid_types_raise(self, model, processor):
        encoded = EncodedVocabulary.encode("dog; sofa, couch", model, processor)
        with pytest.raises(TypeError, match="`vocabulary` must be a Vocabulary, got 'dog': encode words by"):
            dataclasses.replace(encoded, vocabulary="dog")
        with pytest.raises(TypeError, match="`void_ids` must be a tuple of class ids, got 1"):
            dataclasses.replace(encoded, void_ids=1)

    def test_embeddings_must_be_normalized(self, model, processor):
        encoded = EncodedVocabulary.encode("dog; sofa, couch", model, processor)
        with pytest.raises(ValueError, match="`class_embeds` must be L2-normalized, got lengths from 2 to 2"):
            dataclasses.replace(encoded, class_embeds=2 * encoded.class_embeds)
        dataclasses.replace(encoded, class_embeds=encoded.class_embeds.bfloat16())


class TestFiles:
    def test_folders_are_named(self, model, processor, tmp_path):
        encoded = EncodedVocabulary.encode("dog; sofa, couch", model, processor)
        with pytest.raises(IsADirectoryError, match=f"{tmp_path} is a folder: give the name of a file"):
            encoded.save(tmp_path, model)
        with pytest.raises(IsADirectoryError, match=f"{tmp_path} is a folder: give the file that"):
            EncodedVocabulary.load(tmp_path, model)
        with pytest.raises(FileNotFoundError, match=f"The folder {tmp_path / 'absent'} does not exist"):
            encoded.save(tmp_path / "absent" / "words.safetensors", model)
        assert not any(tmp_path.iterdir())

    VOCABULARY = Vocabulary([["red"], ["lawn", "grass"]], is_thing=[True, None], colors=[(1, 2, 3), (4, 5, 6)])

    def test_saved_vocabulary_equals_loaded_one(self, model, processor, tmp_path):
        encoded = EncodedVocabulary.encode(self.VOCABULARY, model, processor)
        encoded.save(tmp_path / "words.safetensors", model)
        read = EncodedVocabulary.load(tmp_path / "words.safetensors", model)
        assert torch.equal(read.class_embeds, encoded.class_embeds)
        assert torch.equal(read.class_ids, encoded.class_ids)
        vocabulary = read.vocabulary
        assert vocabulary.names == self.VOCABULARY.names
        assert vocabulary.is_thing == self.VOCABULARY.is_thing
        assert vocabulary.palette == self.VOCABULARY.palette

    @pytest.mark.parametrize("void_labels", [None, "star; sky, air"])
    @pytest.mark.parametrize("reduction", [None, "max"])
    def test_void_classes_and_reduction_are_restored(self, model, processor, tmp_path, void_labels, reduction):
        encoded = EncodedVocabulary.encode(self.VOCABULARY, model, processor, reduction=reduction)
        encoded = encoded.with_void(void_labels, model, processor)
        encoded.save(tmp_path / "words.safetensors", model)
        read = EncodedVocabulary.load(tmp_path / "words.safetensors", model)
        assert torch.equal(read.class_embeds, encoded.class_embeds) and torch.equal(read.class_ids, encoded.class_ids)
        assert (read.vocabulary, read.void_ids, read.reduction) == (encoded.vocabulary, encoded.void_ids, reduction)
        with safe_open(tmp_path / "words.safetensors", "pt") as file:
            metadata = file.metadata()
        plain = void_labels is None and reduction is None
        assert metadata["format"] == f"gkc-class-embeddings-{2 if plain else 3}"
        assert json.loads(metadata["vocabulary"])["names"] == encoded.vocabulary.names

    def test_another_text_encoder_raises_but_another_precision_does_not(self, model, processor, tmp_path):
        path = tmp_path / "words.safetensors"
        EncodedVocabulary.encode("red; blue", model, processor).save(path, model)
        EncodedVocabulary.load(path, copy.deepcopy(model).to(torch.bfloat16))
        torch.manual_seed(1)
        with pytest.raises(ValueError, match=r"words\.safetensors was written with the text encoder of another model"):
            EncodedVocabulary.load(path, GKCForOpenVocabSegmentation(small_config()))

    def test_templates_of_a_class_are_restored(self, model, processor, tmp_path):
        vocabulary = Vocabulary([["red"], ["lawn"]], templates=[["star {}"], None])
        path = tmp_path / "words.safetensors"
        EncodedVocabulary.encode(vocabulary, model, processor).save(path, model)
        assert EncodedVocabulary.load(path, model).vocabulary == vocabulary
        model.set_vocabulary(vocabulary, processor)
        model.save_pretrained(tmp_path)
        loaded = GKCForOpenVocabSegmentation.from_pretrained(tmp_path)
        before = loaded.vocabulary_embeds.clone()
        loaded.set_vocabulary(loaded.vocabulary, processor)
        torch.testing.assert_close(loaded.vocabulary_embeds, before)

    def test_slightly_different_text_encoder_raises(self, model, processor, tmp_path):
        path = tmp_path / "words.safetensors"
        EncodedVocabulary.encode("red; blue", model, processor).save(path, model)
        embedding = model.text_model.get_input_embeddings()
        with torch.no_grad():
            embedding.weight[40:].normal_()
        with pytest.raises(ValueError, match="the text encoder of another model"):
            EncodedVocabulary.load(path, model)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"class_ids": torch.tensor([0, 5])}, "contain every number from 0"),
            ({"class_ids": torch.tensor([0, 0])}, "holds embeddings of 1 classes, but names of 2"),
            ({"class_ids": None}, "is not a file of class embeddings"),
        ],
    )
    def test_inconsistent_file_raises(self, model, processor, tmp_path, change, message):
        path = tmp_path / "words.safetensors"
        EncodedVocabulary.encode("red; blue", model, processor).save(path, model)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in ("probe", "class_embeds", "class_ids")} | change
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(tensors, path, metadata | EMPTY_CHECKSUM)
        write_checksum(path)
        with pytest.raises(ValueError, match=message):
            EncodedVocabulary.load(path, model)

    def test_other_files_are_refused(self, model, tmp_path):
        with pytest.raises(FileNotFoundError):
            EncodedVocabulary.load(tmp_path / "none.safetensors", model)
        (tmp_path / "text").write_text("no safetensors")
        with pytest.raises(ValueError, match="text is not a file of class embeddings"):
            EncodedVocabulary.load(tmp_path / "text", model)
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="write one with `gkc embed`"):
            EncodedVocabulary.load(tmp_path / "model.safetensors", model)
