import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from modeling_gkc.vocabulary import Vocabulary
from train.data import read_row
from train.regions import crop_region
from train.teacher import RegionTeacher, TeacherEmbeddings, TextBank

from .training_toys import VOCABULARY, toy_dataset, toy_model, toy_processor, toy_row, toy_vision_model


def vit_vision_model() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=8,
    )
    return CLIPVisionModelWithProjection(config)


@pytest.mark.parametrize("make_model", [toy_vision_model, vit_vision_model])
def test_every_region_gets_the_embedding_of_its_masked_crop(make_model):
    dataset = toy_dataset(3)
    teacher = RegionTeacher(make_model())
    embeddings = teacher.embed_dataset(dataset, batch_size=4, dtype=torch.float32, progress=False)
    assert len(embeddings.embeddings) == sum(len(row["segments"]) for row in dataset)
    for row in dataset:
        image, ids = read_row(row)
        for segment in row["segments"]:
            crop = crop_region(image, ids == segment["id"], teacher.image_size)
            expected = teacher.embed_crops(torch.tensor(crop)[None])
            (found,) = embeddings.lookup([row["image_id"]], [torch.tensor([segment["id"]])])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(embeddings.embeddings.norm(dim=1), torch.ones(len(embeddings.embeddings)))


def test_pixels_are_normalised_as_for_clip():
    seen = []
    model = toy_vision_model()
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True)
    crop = torch.randint(256, (1, 64, 64, 3), dtype=torch.uint8)
    RegionTeacher(model).embed_crops(crop)
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    expected = torch.from_numpy((crop[0].numpy() / 255 - mean) / std).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)


def test_teacher_is_frozen_and_shows_its_progress(capsys):
    model = toy_vision_model().train()
    teacher = RegionTeacher(model)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    teacher.embed_dataset(toy_dataset(2))
    assert "Embedding regions" in capsys.readouterr().err


def test_crowds_and_segments_without_pixels_are_left_out():
    def change(index, row):
        row["segments"][0]["iscrowd"] = True
        return {**row, "segments": [*row["segments"], {"id": 12, "category_id": 1, "iscrowd": False}]}

    embeddings = RegionTeacher(toy_vision_model()).embed_dataset(toy_dataset(2, change=change), progress=False)
    assert embeddings.segment_ids.tolist() == [300, 70_000, 300, 70_000, 70_001]
    with pytest.raises(KeyError, match=r"segments \[7, 12\] of image 'toy-0'"):
        embeddings.lookup(["toy-0"], [torch.tensor([300, 7, 12])])


def test_lookup_in_any_order_of_any_images():
    embeddings = RegionTeacher(toy_vision_model()).embed_dataset(toy_dataset(3), progress=False)
    first, nothing, last = embeddings.lookup(
        ["toy-2", "toy-1", "toy-0"],
        [torch.tensor([70_000, 7]), torch.tensor([], dtype=torch.long), torch.tensor([300])],
    )
    assert first.dtype == torch.float32 and first.shape == (2, 16) and nothing.shape == (0, 16)
    rows = {
        (image, int(embeddings.segment_ids[row])): row
        for image, (a, b) in embeddings.rows.items()
        for row in range(a, b)
    }
    assert torch.equal(first[0], embeddings.embeddings[rows["toy-2", 70_000]].float())
    assert torch.equal(last[0], embeddings.embeddings[rows["toy-0", 300]].float())
    with pytest.raises(KeyError, match="'elsewhere'"):
        embeddings.lookup(["elsewhere"], [torch.tensor([7])])


def test_a_dataset_without_regions_is_refused():
    with pytest.raises(ValueError, match="nothing to embed"):
        dataset = toy_dataset(2, change=lambda index, row: {**row, "segments": []})
        RegionTeacher(toy_vision_model()).embed_dataset(dataset, progress=False)


def test_cache_file_is_read_back_and_the_teacher_not_run_again(tmp_path):
    dataset, path = toy_dataset(3), tmp_path / "made" / "teacher.safetensors"
    teacher = RegionTeacher(toy_vision_model())
    first = teacher.embed_dataset(dataset, cache_file=path, progress=False)
    teacher.vision_model.forward = None
    second = teacher.embed_dataset(dataset, cache_file=path, progress=False)
    assert torch.equal(first.embeddings, second.embeddings) and torch.equal(first.segment_ids, second.segment_ids)
    assert first.rows == second.rows and first.embeddings.dtype == torch.float16


def repainted(index, row):
    return {**row, "image": toy_row(index + 50)["image"]}


@pytest.mark.parametrize(
    ("dataset", "teacher"),
    [
        (lambda: toy_dataset(4), lambda: RegionTeacher(toy_vision_model())),
        (lambda: toy_dataset(3, change=repainted), lambda: RegionTeacher(toy_vision_model())),
        (lambda: toy_dataset(3), lambda: RegionTeacher(toy_vision_model(seed=1))),
        (lambda: toy_dataset(3), lambda: RegionTeacher(toy_vision_model(), keep_aspect=True)),
    ],
    ids=["more images", "other pictures", "other weights", "other crops"],
)
def test_a_stale_cache_file_is_refused_by_name(tmp_path, dataset, teacher):
    path = tmp_path / "teacher.safetensors"
    RegionTeacher(toy_vision_model()).embed_dataset(toy_dataset(3), cache_file=path, progress=False)
    with pytest.raises(ValueError, match=r"teacher\.safetensors was made from another"):
        teacher().embed_dataset(dataset(), cache_file=path, progress=False)


def test_fingerprint_is_the_same_in_every_run():
    fingerprints = {RegionTeacher(toy_vision_model()).fingerprint(toy_dataset(3)) for _ in range(2)}
    assert len(fingerprints) == 1


def test_save_and_load_with_explicit_fingerprint(tmp_path):
    embeddings = TeacherEmbeddings(torch.eye(3), torch.tensor([1, 2, 1]), {"a": (0, 2), "b": (2, 3)}, "abc")
    embeddings.save(tmp_path / "e.safetensors")
    loaded = TeacherEmbeddings.load(tmp_path / "e.safetensors", "abc")
    assert loaded.rows == embeddings.rows and torch.equal(loaded.embeddings, torch.eye(3))


def test_text_bank_holds_every_word_once_encoded(capsys):
    model, processor = toy_model(), toy_processor()
    bank = TextBank.from_vocabulary(VOCABULARY, model, processor)
    assert "Embedding words" in capsys.readouterr().err
    assert bank.words == ("disc", "round", "square", "block", "box", "grass", "lawn")
    assert bank.class_ids.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert bank.name_prompts.tolist() == [0, 2, 5] and bank.num_classes == 3
    inputs = processor(text=list(bank.words), return_tensors="pt")
    expected = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(bank.embeds, expected, rtol=0, atol=1e-6)


def test_text_bank_averages_templates_and_shares_words_of_several_classes():
    model = toy_model()
    plain = TextBank.from_vocabulary(VOCABULARY, model, toy_processor(), progress=False)
    photo = TextBank.from_vocabulary(VOCABULARY, model, toy_processor(prompt_templates=["photo {}"]), progress=False)
    both = TextBank.from_vocabulary(
        VOCABULARY, model, toy_processor(prompt_templates=["{}", "photo {}"]), progress=False
    )
    expected = torch.nn.functional.normalize(plain.embeds + photo.embeds, dim=-1)
    torch.testing.assert_close(both.embeds, expected, rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="shared"):
        shared = Vocabulary([["disc", "Round"], ["square", "round"]])
    bank = TextBank.from_vocabulary(shared, model, toy_processor(), progress=False)
    assert torch.equal(bank.embeds[1], bank.embeds[3]) and bank.words == ("disc", "Round", "square", "round")
