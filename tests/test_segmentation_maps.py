"""Annotations given to the image processor become the labels of training, as with transformers' Mask2Former."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from modeling_gkc import GKCForOpenVocabSegmentation, GKCImageProcessor, GKCProcessor

from .conftest import small_config, word_tokenizer

RANDOM = np.random.default_rng(0)


def picture(height: int = 64, width: int = 96) -> np.ndarray:
    return RANDOM.integers(0, 255, (height, width, 3), dtype=np.uint8)


def blocks(height: int = 64, width: int = 96, values: int = 6) -> np.ndarray:
    """Return a map of blocks of 8 x 8 pixels."""
    small = RANDOM.integers(0, values, (-(-height // 8), -(-width // 8)), dtype=np.uint8)
    return np.kron(small, np.ones((8, 8), np.uint8))[:height, :width]


def both(images, maps, *annotations, **settings) -> list[dict]:
    """Return the results of transformers' processor and of this library's for the same call."""
    return [
        processor_class(**settings)(images, maps, *annotations, return_tensors="pt")
        for processor_class in (Mask2FormerImageProcessorPil, GKCImageProcessor)
    ]


def assert_same_labels(theirs, ours) -> None:
    for name in ("mask_labels", "class_labels"):
        assert len(ours[name]) == len(theirs[name])
        for mine, other in zip(ours[name], theirs[name], strict=True):
            assert mine.dtype == other.dtype and torch.equal(mine, other), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ignore_index": 255},
        {"ignore_index": 2},
        {"ignore_index": 255, "do_reduce_labels": True},
        {"ignore_index": 3, "do_reduce_labels": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "size", [{"height": 64, "width": 96}, {"height": 32, "width": 64}, {"height": 96, "width": 64}]
)
def test_labels_are_those_of_mask2former(size, settings):
    images, maps = [picture() for _ in range(2)], [blocks() for _ in range(2)]
    assert_same_labels(*both(images, maps, size=size, **settings))
    mapping = {value: 5 + value // 2 for value in range(6)}
    for mappings in (mapping, [mapping, {value: value + 1 for value in range(6)}]):
        assert_same_labels(*both(images, maps, mappings, size=size, **settings))


def test_masks_are_zero_at_padding():
    """Padding is left out of the masks; transformers labels it `ignore_index`, which its losses read as a mask."""
    images, maps = [picture(), picture(40, 70)], [blocks(), blocks(40, 70)]
    theirs, ours = both(images, maps, do_resize=False, ignore_index=255)
    masks = ours["mask_labels"]
    assert {tuple(mask.shape[1:]) for mask in masks} == {tuple(ours["pixel_values"].shape[2:])}
    assert torch.equal(masks[1][:, :40, :70], theirs["mask_labels"][1][:, :40, :70])
    assert masks[1][:, 40:].sum() == masks[1][:, :, 70:].sum() == 0
    assert torch.equal(ours["class_labels"][1], theirs["class_labels"][1])


@pytest.mark.parametrize(
    "form",
    [
        Image.fromarray,
        torch.from_numpy,
        lambda values: values[None],
        lambda values: [values.astype(np.int64)],
        lambda values: Image.fromarray(values).convert("I"),
        lambda values: values.astype(np.float32),
    ],
)
def test_every_kind_of_map(form):
    values = blocks()
    processor = GKCImageProcessor(do_resize=False)
    expected = processor(picture(), values, return_tensors="pt")
    assert_same_labels(expected, processor(picture(), form(values), return_tensors="pt"))


def test_instances_above_255_stay_apart(tmp_path):
    values = np.arange(64 * 96, dtype=np.int32).reshape(64, 96) // 12
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "map.png")
    labels = GKCImageProcessor(size={"height": 32, "width": 96})(picture(), tmp_path / "map.png", return_tensors="pt")
    assert len(labels["class_labels"][0]) == 256 and labels["class_labels"][0].max() > 500
    assert (labels["mask_labels"][0].sum(dim=0) == 1).all()


def test_crops_have_only_visible_labels():
    values = blocks()
    settings = {"do_resize": False, "do_center_crop": True, "return_tensors": "pt"}
    inner = GKCImageProcessor()(picture(), values, crop_size={"height": 32, "width": 64}, **settings)
    assert_same_labels(
        inner, GKCImageProcessor(do_resize=False)(picture(32, 64), values[16:48, 16:80], return_tensors="pt")
    )
    outer = GKCImageProcessor()(picture(), values, crop_size={"height": 96, "width": 128}, **settings)
    assert torch.equal(outer["mask_labels"][0].sum(dim=0)[16:80, 16:112], torch.ones(64, 96))
    assert outer["mask_labels"][0].sum() == 64 * 96 and outer["original_sizes"].tolist() == [[96, 128]]


def test_map_without_segments():
    labels = GKCImageProcessor(ignore_index=255)(picture(), np.full((64, 96), 255), do_resize=False)
    assert labels["mask_labels"][0].shape == (0, 64, 96) and labels["class_labels"][0].shape == (0,)


def test_rotated_image_needs_a_rotated_map(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(picture()).save(tmp_path / "a.jpg", exif=exif)
    processor = GKCImageProcessor(do_resize=False)
    with pytest.raises(ValueError, match=r"map 1 \(index 0\) is \(64, 96\).* EXIF orientation: turn the map"):
        processor(tmp_path / "a.jpg", blocks())
    upright = processor(tmp_path / "a.jpg", np.rot90(blocks(), -1), return_tensors="pt")
    assert upright["mask_labels"][0].shape[1:] == (96, 64)


@pytest.mark.parametrize(
    "maps, settings, message",
    [
        ([blocks(), blocks()], {}, "map for each image: got 2 for 1"),
        (blocks(32, 96), {}, r"map 1 \(index 0\) is \(32, 96\) \(height, width\), but its image \(64, 96\)"),
        (picture(), {}, "one number per pixel"),
        (blocks() + 0.5, {}, "whole numbers"),
        (np.full((64, 96), np.nan), {}, "whole numbers"),
        (np.full((64, 96), 2.0**40), {}, "whole numbers of 32 bits"),
        ("nowhere.png", {}, r"map 1 \(index 0\).*nowhere"),
        (b"no picture", {}, r"map 1 \(index 0\)"),
        (np.full((64, 96), -1), {}, "negative"),
        (blocks(), {"do_reduce_labels": True}, "`ignore_index`"),
        (blocks(), {"instance_id_to_semantic_id": {0: 1}}, r"no class for the values \[1, 2"),
        (blocks(), {"instance_id_to_semantic_id": dict.fromkeys(range(256), "a")}, r"instance_id_to_semantic_id\["),
        (blocks(), {"instance_id_to_semantic_id": dict.fromkeys(range(256), 1.5)}, r"instance_id_to_semantic_id\["),
        (blocks(), {"instance_id_to_semantic_id": [{}, {}]}, "for each of the 1 maps"),
        (blocks(), {"instance_id_to_semantic_id": 5}, "must be a dict"),
        (blocks(), {"ignore_index": "255"}, "`ignore_index`"),
        (blocks(), {"ignore_index": 0.5}, "`ignore_index`"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_refused_annotations(maps, settings, message):
    with pytest.raises(ValueError, match=message):
        GKCImageProcessor(do_resize=False)(picture(), maps, **settings)


def test_calls_of_published_fine_tuning_examples():
    processor = GKCProcessor(GKCImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}), word_tokenizer())
    batch = processor(
        images=[Image.fromarray(picture()), Image.fromarray(picture(50, 64))],
        segmentation_maps=[blocks(values=3), blocks(50, 64, values=3)],
        text=["dog", "sofa", "lamp"],
        ignore_index=255,
        return_tensors="pt",
    ).to("cpu")
    model = GKCForOpenVocabSegmentation(small_config())
    model(**batch).loss.backward()
    with pytest.raises(ValueError, match="`segmentation_maps` need `images`"):
        processor(text="dog", segmentation_maps=blocks())
