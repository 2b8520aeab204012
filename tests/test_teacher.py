import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from modeling_gkc.cli.main import main as gkc
from modeling_gkc.vocabulary import Vocabulary
from train.data import read_row
from train.losses.distillation import text_guided_distillation_loss
from train.miniworld.clip import MiniCLIP, save_clip
from train.teacher.clip_towers import load_clip_towers, load_vision_tower
from train.teacher.crops import crop_box, crop_region, crop_regions, resample_regions
from train.teacher.precompute import write_cache
from train.teacher.region_teacher import OnlineTeacher, RegionTeacher, TeacherCache, TeacherEmbeddings
from train.teacher.text_bank import TextBank

from .conftest import small_config
from .openai_clip import random_weights, save_archive
from .training_toys import (
    VOCABULARY,
    toy_dataset,
    toy_model,
    toy_processor,
    toy_row,
    toy_tokenizer,
    toy_vision_model,
)


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


def test_pixels_are_normalized_as_for_clip():
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
    ("dataset", "teacher", "differing"),
    [
        (lambda: toy_dataset(4), lambda: RegionTeacher(toy_vision_model()), "data"),
        (lambda: toy_dataset(3, change=repainted), lambda: RegionTeacher(toy_vision_model()), "data"),
        (lambda: toy_dataset(3), lambda: RegionTeacher(toy_vision_model(seed=1)), "teacher"),
        (lambda: toy_dataset(3), lambda: RegionTeacher(toy_vision_model(), keep_aspect=True), "crops"),
    ],
    ids=["more images", "other pictures", "other weights", "other crops"],
)
def test_a_stale_cache_file_is_refused_by_name(tmp_path, dataset, teacher, differing):
    path = tmp_path / "teacher.safetensors"
    RegionTeacher(toy_vision_model()).embed_dataset(toy_dataset(3), cache_file=path, progress=False)
    with pytest.raises(ValueError, match=rf"teacher\.safetensors was made with another {differing} than"):
        teacher().embed_dataset(dataset(), cache_file=path, progress=False)


def test_fingerprint_is_the_same_in_every_run():
    first, second = (RegionTeacher(toy_vision_model()).fingerprint(toy_dataset(3)) for _ in range(2))
    assert first == second and set(first) == {"data", "teacher", "crops"}


def test_save_and_load_with_explicit_fingerprint(tmp_path):
    embeddings = TeacherEmbeddings(torch.eye(3), torch.tensor([1, 2, 1]), {"a": (0, 2), "b": (2, 3)}, {"data": "abc"})
    embeddings.save(tmp_path / "e.safetensors")
    loaded = TeacherEmbeddings.load(tmp_path / "e.safetensors", {"data": "abc"})
    assert loaded.rows == embeddings.rows and torch.equal(loaded.embeddings, torch.eye(3))


def test_text_bank_encodes_every_name_once(capsys):
    model, processor = toy_model(), toy_processor()
    bank = TextBank.from_vocabulary(VOCABULARY, model, processor)
    assert "Embedding names" in capsys.readouterr().err
    assert bank.names == ("disc", "round", "square", "block", "box", "grass", "lawn")
    assert bank.class_ids.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert bank.name_prompts.tolist() == [0, 2, 5] and bank.num_classes == 3
    inputs = processor(text=list(bank.names), return_tensors="pt")
    expected = model.embed_prompts(inputs["input_ids"], inputs["attention_mask"])
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
    assert torch.equal(bank.embeds[1], bank.embeds[3]) and bank.names == ("disc", "Round", "square", "round")


# ---- crops


def random_region(generator: np.random.Generator, largest: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Noise of any size, and a ragged mask somewhere in it; some are thin, some a single pixel."""
    height, width = generator.integers(1, largest, 2)
    image = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
    top, left = generator.integers(height), generator.integers(width)
    bottom, right = generator.integers(top, height) + 1, generator.integers(left, width) + 1
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = generator.random((bottom - top, right - left)) > 0.3
    mask[top, left] = True
    return image, mask


@pytest.mark.parametrize("keep_aspect", [False, True])
def test_crops_made_on_an_accelerator_are_those_of_pillow(keep_aspect, within):
    generator = np.random.default_rng(0)
    for size in [32] * 30 + [224] * 3:
        image, mask = random_region(generator)
        expected = crop_region(image, mask, size, keep_aspect).astype(int)
        masks = torch.from_numpy(np.stack([np.ones_like(mask), mask]))
        found = resample_regions(torch.from_numpy(image), masks, size, keep_aspect)[1].numpy()
        within("crops as products of matrices, against Pillow, of 255", np.abs(found - expected).max(), 2)
        within("crops as products of matrices, share of other values", (found != expected).mean(), 1e-3)


def test_empty_region_raises_in_all_crop_functions():
    image = torch.zeros(4, 5, 3, dtype=torch.uint8)
    for crop in (crop_region, crop_box):
        with pytest.raises(ValueError, match="empty"):
            crop(image.numpy(), np.zeros((4, 5), dtype=bool), 8)
    with pytest.raises(ValueError, match="empty"):
        resample_regions(image, torch.zeros(1, 4, 5, dtype=torch.bool), 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_crops_on_a_gpu():
    image, mask = random_region(np.random.default_rng(0))
    ids = torch.from_numpy(mask.astype(np.int32))
    found = crop_regions(torch.from_numpy(image).cuda(), ids.cuda(), torch.tensor([1]), 64)[0].cpu().numpy()
    assert np.abs(found.astype(int) - crop_region(image, mask, 64)).max() <= 1


def test_center_crop_of_a_box_is_given_to_clip(within):
    """Against resizing the whole box, in x and in y, and then cutting the middle out."""
    generator = np.random.default_rng(0)
    for _ in range(30):
        image, _ = random_region(generator)
        shorter = min(image.shape[:2])
        height, width = (int(32 * side / shorter) if side > shorter else 32 for side in image.shape[:2])
        whole = Image.fromarray(image).resize((width, image.shape[0]), 3).resize((width, height), 3)
        left, top = round((width - 32) / 2), round((height - 32) / 2)
        expected = np.asarray(whole.crop((left, top, left + 32, top + 32))).astype(int)
        found = crop_box(image, np.ones(image.shape[:2], dtype=bool), 32)
        within("the middle of a box, against resizing all of it, of 255", np.abs(found - expected).max(), 2)
        within("the middle of a box, share of other values", (found != expected).mean(), 5e-3)


# ---- the teacher in every step


def batch_of(dataset) -> dict:
    """Return the collator's batch of rows without augmentation, padded by 8 pixels."""
    pictures = [read_row(row) for row in dataset]
    segmentation = torch.zeros(len(dataset), 72, 72, dtype=torch.int32)
    for padded, (_, ids) in zip(segmentation, pictures, strict=True):
        padded[:64, :64] = torch.from_numpy(ids)
    return {
        "images": [torch.tensor(image) for image, _ in pictures],
        "segmentation": segmentation,
        "segment_ids": [torch.tensor([segment["id"] for segment in row["segments"]]) for row in dataset],
        "image_ids": dataset["image_id"][:],
    }


@pytest.mark.parametrize("keep_aspect", [False, True])
@pytest.mark.parametrize("relation", ["cosine", "euclidean"])
def test_online_and_cached_teacher_give_one_loss(tmp_path, keep_aspect, relation, within):
    dataset = toy_dataset(4)
    teacher = RegionTeacher(toy_vision_model(), keep_aspect)
    fingerprint = teacher.fingerprint(dataset, progress=False)
    write_cache(teacher, dataset, tmp_path, fingerprint, batch_size=5, images_per_shard=3, progress=False)
    batch = batch_of(dataset)
    with torch.autocast("cpu", torch.bfloat16):  # the training step's precision is not the teacher's
        online = OnlineTeacher(teacher).embed(batch)
    cached = TeacherCache.open(tmp_path, fingerprint).lookup(batch["image_ids"], batch["segment_ids"])
    assert [len(rows) for rows in online] == [len(rows) for rows in cached] == list(map(len, batch["segment_ids"]))
    assert not any(rows.requires_grad for rows in online)
    within("online against cached embeddings", (torch.cat(online) - torch.cat(cached)).abs().max(), 3e-4)
    counts = torch.tensor([len(rows) for rows in online])
    student, text = torch.nn.functional.normalize(torch.randn(2, int(counts.sum()), 16), dim=-1)
    image_index = torch.arange(len(counts)).repeat_interleave(counts)
    losses = [
        text_guided_distillation_loss(student, torch.cat(rows), text, image_index, torch.tensor(1.0), relation)
        for rows in (online, cached)
    ]
    for name, of_online, of_cached in zip(("feature", "relation", "joint"), *losses, strict=True):
        within(f"{name} loss, online against cached teacher", (of_online - of_cached).abs(), 1e-3)


def test_online_teacher_embeds_augmented_regions_and_accepts_images_without_regions():
    teacher = OnlineTeacher(RegionTeacher(toy_vision_model()))
    batch = batch_of(toy_dataset(2))
    first = teacher.embed(batch)
    batch["images"][0] = batch["images"][0].flip(1)
    batch["segmentation"][0, :64, :64] = batch["segmentation"][0, :64, :64].flip(1)
    batch["segment_ids"][1] = torch.tensor([], dtype=torch.int64)
    flipped, nothing = teacher.embed(batch)
    assert nothing.shape == (0, 16) and not torch.allclose(flipped, first[0], atol=1e-3)
    batch["segment_ids"][1] = torch.tensor([300, 5])
    with pytest.raises(ValueError, match=r"Image 'toy-1', segments \[300, 5\]: The mask of the region is empty"):
        teacher.embed(batch)


# ---- loading a CLIP


def tiny_clip_model(folder: Path) -> CLIPModel:
    """Return a CLIPModel of transformers with another temperature."""
    text = small_config().text_config.to_dict()
    model = CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config=vit_vision_model().config.to_dict() | {"projection_dim": 16},
            projection_dim=16,
        )
    )
    torch.nn.init.constant_(model.logit_scale, math.log(37))
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def test_towers_of_a_clip_model_of_transformers(tmp_path):
    model = tiny_clip_model(tmp_path)
    vision, text, tokenizer, scale = load_clip_towers(tmp_path)
    pixels, tokens = torch.randn(2, 3, 32, 32), tokenizer(["disc", "grass lawn"], padding=True, return_tensors="pt")
    outputs = model(pixel_values=pixels, **tokens)
    image_embeds = torch.nn.functional.normalize(vision(pixel_values=pixels).image_embeds, dim=-1)
    text_embeds = torch.nn.functional.normalize(text(**tokens).text_embeds, dim=-1)
    torch.testing.assert_close(image_embeds, outputs.image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(text_embeds, outputs.text_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(scale * text_embeds @ image_embeds.T, outputs.logits_per_text, rtol=0, atol=1e-4)


@torch.no_grad()
def test_towers_of_the_mini_world(tmp_path):
    model = MiniCLIP.from_scratch(0).eval()
    save_clip(model, tmp_path)
    (tmp_path / "clip.json").write_text(json.dumps({"logit_scale": 11.5}))
    vision, text, tokenizer, scale = load_clip_towers(tmp_path)
    assert scale == 11.5 and not vision.training and not text.training
    crops = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    torch.testing.assert_close(RegionTeacher(vision).embed_crops(crops), model.embed_images(crops), rtol=0, atol=1e-5)
    tokens = tokenizer(["red disc", "star"], padding=True, return_tensors="pt")
    expected = model.embed_texts(["red disc", "star"])
    found = torch.nn.functional.normalize(text(**tokens).text_embeds, dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_towers_of_gkc_convert(tmp_path):
    save_archive(random_weights(), str(tmp_path / "clip.pt"))
    assert gkc(["convert", "clip-resnet", str(tmp_path / "clip.pt"), "--out", str(tmp_path / "image")]) == 0
    assert load_vision_tower(tmp_path / "image").config.model_type == "clip_resnet"
    with pytest.raises(ValueError, match=r"has no text encoder: convert it again with .* --text"):
        load_clip_towers(tmp_path / "image")
    gkc(["convert", "clip-resnet", str(tmp_path / "clip.pt"), "--out", str(tmp_path / "both"), "--text"])
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_clip_towers(tmp_path / "both")
    toy_tokenizer().save_pretrained(tmp_path / "both" / "text")
    towers = load_clip_towers(tmp_path / "both")
    assert towers.logit_scale == 100 and towers.vision_model.config.projection_dim == (
        towers.text_model.config.projection_dim
    )


def test_folders_without_a_clip_or_with_missing_weights_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="contains no CLIP"):
        load_vision_tower(tmp_path)
    model = toy_vision_model()
    state = {name: value for name, value in model.state_dict().items() if "out_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights: attention_pooling\.out_proj"):
        load_vision_tower(tmp_path)
