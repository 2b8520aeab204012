"""Tests of text embeddings: the cache, and averages over templates."""

import copy
import gc
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_gkc import GKCForOpenVocabSegmentation, GKCImageProcessor, GKCProcessor
from modeling_gkc.class_embeddings import (
    TextEmbeddingCache,
    average_templates,
    equal_classes,
)

from .conftest import small_config, word_tokenizer

NUMBERED = [f"word{index}" for index in range(847)]


@pytest.fixture
def model():
    return GKCForOpenVocabSegmentation(small_config()).eval()


@pytest.fixture
def processor():
    return GKCProcessor(GKCImageProcessor(size={"height": 64, "width": 64}), word_tokenizer())


@pytest.fixture
def encoded(model, monkeypatch):
    """Record the number of prompts in each call of the text encoder."""
    calls = []
    original = type(model)._encode_prompts

    def counted(self, input_ids, attention_mask):
        calls.append(len(input_ids))
        return original(self, input_ids, attention_mask)

    monkeypatch.setattr(type(model), "_encode_prompts", counted)
    return calls


def large_vocabulary() -> tuple[GKCForOpenVocabSegmentation, GKCProcessor]:
    config = small_config()
    config.text_config.vocab_size = 1000
    processor = GKCProcessor(GKCImageProcessor(), word_tokenizer(" ".join([*NUMBERED, "other"])))
    return GKCForOpenVocabSegmentation(config).eval(), processor


def test_equal_classes_have_equal_sets_of_embeddings():
    first, second, third = torch.eye(3, 8)
    near = torch.nn.functional.normalize(first + 1e-4 * third, dim=0)  # equal up to rounding
    rows = torch.stack([first, second, first, near, second, second, third, second])
    class_ids = torch.tensor([0, 0, 1, 2, 3, 4, 4, 5])
    assert equal_classes(rows, class_ids) == [[1, 2], [3, 5]]
    assert equal_classes(rows.bfloat16(), class_ids) == [[1, 2], [3, 5]]
    assert equal_classes(torch.eye(3, 8), torch.arange(3)) == []


class TestCache:
    def test_changing_one_of_847_names_encodes_one_prompt(self, monkeypatch):
        model, processor = large_vocabulary()
        calls = []
        original = type(model)._encode_prompts
        monkeypatch.setattr(
            type(model), "_encode_prompts", lambda self, ids, mask: calls.append(len(ids)) or original(self, ids, mask)
        )
        first = model.get_class_embeddings(**processor(text=NUMBERED, return_tensors="pt")).class_embeds
        changed = [*NUMBERED[:400], "other", *NUMBERED[401:]]
        second = model.get_class_embeddings(**processor(text=changed, return_tensors="pt")).class_embeds
        assert calls == [847, 1]
        assert [index for index in range(847) if not torch.equal(first[index], second[index])] == [400]
        model.get_class_embeddings(**processor(text=changed[::-1], return_tensors="pt"))
        assert calls == [847, 1]

    def test_cached_embeddings_match_new_ones_in_any_order(self, model, processor, within):
        model.embed_prompts(**tokens(processor, "red; blue disc"))
        mixed = model.embed_prompts(**tokens(processor, "blue disc; lawn grass star; red"))
        afresh = model._encode_prompts(**tokens(processor, "blue disc; lawn grass star; red"))
        within("cached text embeddings against fresh ones, max abs", (mixed - afresh).abs().max(), 1e-6)

    def test_cache_ignores_right_padding(self, model, processor, encoded):
        model.embed_prompts(**tokens(processor, "red"))
        model.embed_prompts(**tokens(processor, "lawn grass star sky; red"))
        assert encoded == [1, 1]

    def test_repeated_prompt_is_encoded_once(self, model, processor, encoded):
        ids = tokens(processor, "red")["input_ids"].repeat(5, 1)
        features = model.embed_prompts(ids)
        assert encoded == [1]
        assert features.unique(dim=0).shape[0] == 1

    def test_forward_and_set_vocabulary_use_the_cache(self, model, processor, encoded):
        words = tokens(processor, "red; lawn, grass", class_ids=True)
        pixel_values = torch.zeros(1, 3, 64, 64)
        with torch.no_grad():
            first = model(pixel_values, **words).class_queries_logits
            again = model(pixel_values, **words).class_queries_logits
        model.set_vocabulary("grass; red", processor)
        assert encoded == [3]
        assert torch.equal(first, again)

    def test_new_weights_dtypes_and_autocast_invalidate_the_cache(self, model, processor, encoded):
        words = tokens(processor, "red; blue")
        before = model.embed_prompts(**words)
        with torch.no_grad():
            model.text_model.text_projection.weight.mul_(-1)
        torch.testing.assert_close(model.embed_prompts(**words), -before)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.embed_prompts(**words)
        assert model.to(torch.bfloat16).embed_prompts(**words).dtype == torch.bfloat16
        assert model.float().embed_prompts(**words).dtype == torch.float32
        assert encoded == [2] * 5

    def test_weight_changes_through_data_invalidate_the_cache(self, model, processor):
        words = tokens(processor, "red; blue")
        before = model.embed_prompts(**words)
        model.text_model.text_projection.weight.data.mul_(-1)
        torch.testing.assert_close(model.embed_prompts(**words), -before)

    def test_text_encoders_with_adapters_are_not_cached(self, model, processor):
        words = tokens(processor, "red; blue")
        plain = model.embed_prompts(**words)
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        learned = adapted.embed_prompts(**words)
        assert (learned - plain).abs().max() > 1e-3
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted.embed_prompts(**words), plain)
        merged = adapted.merge_and_unload()
        for _ in range(2):
            torch.testing.assert_close(merged.embed_prompts(**words), learned, rtol=0, atol=1e-5)

    def test_cache_does_not_ignore_other_padding(self, model):
        ids = torch.tensor([[1, 5, 3, 0, 0], [0, 0, 1, 5, 3]])
        right, left = model.embed_prompts(ids, (ids > 0).long())
        torch.testing.assert_close(right, model._encode_prompts(ids, (ids > 0).long())[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(left, model._encode_prompts(ids, (ids > 0).long())[1], rtol=0, atol=1e-6)
        assert (right - left).abs().max() > 1e-3
        mixed = torch.tensor([[1, 0, 5, 0, 3, 0]], dtype=torch.int32)
        expected = model._encode_prompts(mixed, None)
        torch.testing.assert_close(model.embed_prompts(mixed), expected, rtol=0, atol=1e-6)

    def test_embeddings_of_inference_mode_can_be_used_in_training(self, model, processor):
        words = tokens(processor, "red; blue", class_ids=True)
        with torch.inference_mode():
            model.get_class_embeddings(**words)
            model.set_vocabulary("sky; red", processor)
        pixel_values = torch.rand(1, 3, 64, 64)
        for kwargs in (words, {}):
            model.zero_grad()
            model.train()(pixel_values, **kwargs).class_queries_logits.sum().backward()
            assert model.classifier.no_object_embedding.grad is not None

    def test_cache_is_bounded_and_evicts_the_least_recently_used(self):
        cache = TextEmbeddingCache(max_prompts=3)
        calls = []

        def encode(ids, mask):
            calls.append(ids[:, 0].tolist())
            return ids.float()

        for asked in ([1, 2, 3], [1], [4], [2], [1]):
            rows = torch.tensor(asked)[:, None]
            assert torch.equal(cache.embed(rows, None, encode, state=0), rows.float())
            assert len(cache) <= 3
        assert calls == [[1, 2, 3], [4], [2]]
        many = torch.arange(10)[:, None]
        assert torch.equal(cache.embed(many, None, encode, state=0), many.float())
        assert len(cache) == 3
        cache.clear()
        assert len(cache) == 0

    def test_cached_rows_do_not_share_memory(self, model, processor):
        features = model.embed_prompts(**tokens(processor, "red; blue; disc"))
        (entry, *_) = model.text_cache._entries.values()
        assert entry.untyped_storage().nbytes() == entry.numel() * entry.element_size()
        assert entry.untyped_storage().data_ptr() != features.untyped_storage().data_ptr()

    def test_cache_is_thread_safe(self, model):
        cache = TextEmbeddingCache(max_prompts=50)
        wrong = []

        def ask(seed):
            generator = torch.Generator().manual_seed(seed)
            for step in range(150):
                ids = torch.randint(0, 120, (20, 1), generator=generator)
                state = step // 50
                embeds = cache.embed(ids, None, lambda ids, mask, state=state: ids.float() + 1000 * state, state)
                if not torch.equal(embeds, ids.float() + 1000 * state):
                    wrong.append((seed, step))

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(8) as threads:
                list(threads.map(ask, range(8)))  # raises the errors of the threads
        finally:
            sys.setswitchinterval(interval)
        assert not wrong
        assert len(cache) <= 50

    def test_embeddings_are_not_cached_if_the_model_changes_meanwhile(self):
        cache = TextEmbeddingCache()
        ids = torch.tensor([[5]])

        def encode_while_another_thread_changes_the_model(ids, mask):
            cache.embed(torch.tensor([[6]]), None, lambda ids, mask: ids + 100.0, state="new")
            return ids.float()

        assert cache.embed(ids, None, encode_while_another_thread_changes_the_model, state="old").item() == 5
        assert cache.embed(ids, None, lambda ids, mask: ids + 100.0, state="new").item() == 105

    def test_offloaded_text_encoder_gives_equal_embeddings(self, model, processor, tmp_path):
        model.save_pretrained(tmp_path)
        offloaded = GKCForOpenVocabSegmentation.from_pretrained(
            tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "offload"
        )
        assert offloaded.device.type == "meta"
        for twin in (model, offloaded):
            twin.set_vocabulary("red; lawn, grass", processor)
        assert torch.equal(offloaded.vocabulary_embeds, model.vocabulary_embeds)

    def test_copies_and_pickles_start_empty(self, model, processor):
        model.embed_prompts(**tokens(processor, "red; blue"))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(twin.text_cache) == 0
            assert twin.text_cache.max_prompts == model.text_cache.max_prompts
            assert twin.text_cache is not model.text_cache
        gc.collect()
        assert len(model.text_cache) == 2


class TestTemplates:
    def test_templates_are_averaged_per_name(self, model, processor):
        ids = tokens(processor, "red disc; blue disc; lawn square; grass square; sky")["input_ids"]
        name_ids, class_ids = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 1])
        embeddings = model.get_class_embeddings(ids, class_ids=class_ids, name_ids=name_ids)
        rows = model.embed_prompts(ids)
        expected = [rows[:2].mean(0), rows[2:4].mean(0), rows[4]]
        torch.testing.assert_close(
            embeddings.class_embeds, torch.stack([row / row.norm() for row in expected]), rtol=0, atol=1e-6
        )
        assert embeddings.class_ids.tolist() == [0, 1, 1]

    def test_forward_averages_templates(self, model, processor):
        words = tokens(processor, "red disc; blue disc; lawn square; grass square; sky")
        words |= {"class_ids": torch.tensor([0, 0, 1, 1, 1]), "name_ids": torch.tensor([0, 0, 1, 1, 2])}
        pixel_values = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            at_once = model(pixel_values, **words).class_queries_logits
            cached = model(pixel_values, **model.get_class_embeddings(**words)).class_queries_logits
        assert torch.equal(at_once, cached)
        assert at_once.shape[-1] == 3

    def test_names_without_class_ids(self):
        embeds, classes = average_templates(torch.eye(4), None, torch.tensor([0, 0, 1, 1]))
        assert classes is None
        assert embeds.shape == (2, 4)

    @pytest.mark.parametrize(
        ("name_ids", "class_ids", "message"),
        [
            ([0, 0, 2], [0, 0, 1], "`name_ids` must contain every number from 0: smallest 0, missing \\[1\\]"),
            (
                [0, 0, 2**40],
                [0, 0, 1],
                "contain every number from 0: smallest 0, missing \\[1, 2, 3, 4, 5, 6, 7, 8, 9, 10\\]",
            ),
            ([0, 0, 1], [0, 1, 1], "prompts of several classes to one name"),
            ([0, 1], [0, 1, 1], "`name_ids` must have shape"),
        ],
    )
    def test_invalid_ids_raise(self, name_ids, class_ids, message):
        with pytest.raises(ValueError, match=message):
            average_templates(torch.eye(3), torch.tensor(class_ids), torch.tensor(name_ids))

    def test_name_ids_without_input_ids_raise(self, model):
        with pytest.raises(ValueError, match="`name_ids` need `input_ids`"):
            model(torch.zeros(1, 3, 64, 64), class_embeds=torch.eye(2, 16), name_ids=torch.tensor([0, 1]))


def tokens(processor, text, class_ids=False):
    keys = ("input_ids", "attention_mask", *(["class_ids"] if class_ids else []))
    encoded = processor(text=text, return_tensors="pt")
    return {key: encoded[key] for key in keys}
