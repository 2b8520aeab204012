import numpy as np
import pytest
import torch
from PIL import Image

from modeling_gkc.image_processing_gkc import GKCImageProcessor
from train.data import (
    AugmentedDataset,
    JointTransform,
    SegmentationCollator,
    check_dataset,
    decode_ids,
    encode_ids,
    read_row,
)
from train.data.schema import annotated_segments
from train.data.transforms import resize

from .training_toys import VOCABULARY, toy_dataset, toy_row

NO_CHANGE = JointTransform(crop_size=None, flip_probability=0.0)


def alter(index: int, **changes):
    """A `change` for `toy_dataset` that replaces columns of one row."""
    return lambda position, row: {**row, **changes} if position == index else row


def test_ids_survive_the_coding():
    ids = np.array([[0, 1, 255], [256, 65_536, 2**24 - 1]], dtype=np.int32)
    colours = encode_ids(ids)
    assert colours.dtype == np.uint8 and colours[1, 0].tolist() == [0, 1, 0] and colours[1, 1].tolist() == [0, 0, 1]
    assert np.array_equal(decode_ids(colours), ids) and decode_ids(colours).dtype == np.int32
    with pytest.raises(ValueError, match="16777215"):
        encode_ids(np.array([[2**24]]))


def test_a_row_is_decoded_whatever_its_image_mode():
    row = toy_row(0)
    image, ids = read_row({**row, "image": row["image"].convert("RGBA")})
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert np.array_equal(image, np.asarray(row["image"]))
    assert set(np.unique(ids)) == {7, 300, 70_000}


def test_a_good_dataset_passes(capsys):
    check_dataset(toy_dataset(), VOCABULARY.labels)
    assert "Checking the dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": [{"id": 7, "category_id": 2, "iscrowd": False}]}, r"sample 'toy-1': ids \[300, 70000, 70001\]"),
        ({"segmentation": Image.new("RGB", (32, 64))}, r"sample 'toy-1': the segmentation is \(64, 32\)"),
        (
            {"segments": [{"id": 0, "category_id": 2, "iscrowd": False}]},
            r"'toy-1': segment ids must be unique and not 0",
        ),
        ({"image_id": "toy-0"}, "'toy-0': another sample has the same image_id"),
    ],
)
def test_wrong_samples_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        check_dataset(toy_dataset(3, change=alter(1, **changes)), VOCABULARY.labels, progress=False)


def test_categories_outside_the_vocabulary_are_named():
    with pytest.raises(ValueError, match=r"'toy-0': category ids \[2\] are not in the vocabulary of 2 classes"):
        check_dataset(toy_dataset(2), VOCABULARY.labels[:2], progress=False)


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="segments"):
        check_dataset(toy_dataset(2).remove_columns("segments"), VOCABULARY.labels, progress=False)


def test_resizing_moves_image_and_ids_alike():
    ids = np.zeros((40, 60), dtype=np.int32)
    ids[10:30, 20:50] = 9
    image = np.repeat((ids == 9)[..., None] * np.uint8(255), 3, axis=2)
    for factor in (0.5, 1.0, 1.7):
        resized, resized_ids = resize(image, ids, factor)
        assert resized.shape[:2] == resized_ids.shape == (round(40 * factor), round(60 * factor))
        inside = resized[..., 0] > 127
        assert ((resized_ids == 9) == inside).mean() > 0.97


def test_flip_mirrors_both():
    image, ids = read_row(toy_row(0))
    flipped, flipped_ids = JointTransform(None, flip_probability=1.0)(image, ids, np.random.default_rng(0))
    assert np.array_equal(flipped, image[:, ::-1]) and np.array_equal(flipped_ids, ids[:, ::-1])


@pytest.mark.parametrize("shape", [(50, 80), (80, 50), (64, 64), (7, 200)])
def test_result_is_square_and_padded_with_grey_void(shape):
    image = np.full((*shape, 3), 10, dtype=np.uint8)
    ids = np.full(shape, 5, dtype=np.int32)
    transform = JointTransform(crop_size=48, scale_range=(0.5, 1.5))
    for seed in range(10):
        cropped, cropped_ids = transform(image, ids, np.random.default_rng(seed))
        assert cropped.shape == (48, 48, 3) and cropped_ids.shape == (48, 48)
        assert np.array_equal(cropped_ids == 0, (cropped == 128).all(axis=-1))
        assert set(np.unique(cropped_ids)) <= {0, 5}


def test_scales_stay_in_their_range():
    image, ids = np.full((40, 40, 3), 10, dtype=np.uint8), np.full((40, 40), 5, dtype=np.int32)
    transform = JointTransform(crop_size=100, scale_range=(0.8, 1.2), flip_probability=0.0)
    sides = [(transform(image, ids, np.random.default_rng(seed))[1][0] == 5).sum() for seed in range(200)]
    assert min(sides) >= 80 and max(sides) == 100 and len(set(sides)) > 15


def test_augmentation_depends_on_seed_epoch_and_sample_only():
    dataset = toy_dataset(3)
    transform = JointTransform(crop_size=64)

    def draw(seed: int, epoch: int, index: int) -> np.ndarray:
        augmented = AugmentedDataset(dataset, transform, seed)
        augmented.set_epoch(epoch)
        return augmented[index]["image"]

    first = draw(0, 0, 1)
    torch.manual_seed(123)
    np.random.seed(123)
    assert np.array_equal(first, draw(0, 0, 1))
    assert not np.array_equal(first, draw(0, 1, 1))
    assert not np.array_equal(first, draw(1, 0, 1))


def test_workers_see_the_epoch_and_draw_as_the_main_process():
    augmented = AugmentedDataset(toy_dataset(4), JointTransform(crop_size=64), seed=0)
    loader = torch.utils.data.DataLoader(augmented, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        augmented.set_epoch(epoch)
        rows = [row["image"].numpy() for row in loader]
        assert all(np.array_equal(row, augmented[index]["image"]) for index, row in enumerate(rows))


def test_batch_has_masks_classes_and_ids():
    augmented = AugmentedDataset(toy_dataset(2), NO_CHANGE, seed=0)
    batch = SegmentationCollator(GKCImageProcessor(), num_classes=3)([augmented[0], augmented[1]])
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["pixel_mask"].shape == (2, 64, 64)
    assert batch["image_ids"] == ["toy-0", "toy-1"]
    assert [ids.tolist() for ids in batch["segment_ids"]] == [[7, 300, 70_000], [7, 300, 70_000, 70_001]]
    assert [labels.tolist() for labels in batch["class_labels"]] == [[2, 0, 1], [2, 0, 1, 1]]
    assert all(masks.dtype == torch.bool for masks in batch["mask_labels"])
    assert torch.equal(batch["mask_labels"][0].sum(dim=0), torch.ones(64, 64, dtype=torch.long))
    _, ids = read_row(toy_row(0))
    assert np.array_equal(batch["mask_labels"][0][1].numpy(), ids == 300)


def test_masks_are_padded_with_the_images():
    rows = [AugmentedDataset(toy_dataset(1, size=size), NO_CHANGE, seed=0)[0] for size in (40, 64)]
    batch = SegmentationCollator(GKCImageProcessor(), num_classes=3)(rows)
    assert batch["pixel_values"].shape[-2:] == (64, 64)
    assert batch["mask_labels"][0].shape == (3, 64, 64)
    assert not batch["mask_labels"][0][:, 40:].any() and not batch["mask_labels"][0][:, :, 40:].any()
    assert torch.equal(batch["mask_labels"][0].any(dim=0), batch["pixel_mask"][0].bool())


def test_crowds_and_vanished_segments_are_left_out():
    row = toy_row(0)
    row["segments"][1]["iscrowd"] = True
    assert [segment["id"] for segment in annotated_segments(row)] == [7, 70_000]
    image, ids = read_row(row)
    ids[ids == 70_000] = 7
    collate = SegmentationCollator(GKCImageProcessor(), num_classes=3)
    batch = collate([{"image": image, "ids": ids, "segments": annotated_segments(row), "image_id": "a"}])
    assert batch["segment_ids"][0].tolist() == [7] and batch["mask_labels"][0].shape == (1, 64, 64)
    batch = collate([{"image": image, "ids": ids, "segments": [], "image_id": "a"}])
    assert batch["mask_labels"][0].shape == (0, 64, 64) and batch["class_labels"][0].shape == (0,)


def test_batch_with_a_class_outside_the_vocabulary_is_refused():
    augmented = AugmentedDataset(toy_dataset(1), NO_CHANGE, seed=0)
    with pytest.raises(ValueError, match=r"'toy-0': category ids \[2\]"):
        SegmentationCollator(GKCImageProcessor(), num_classes=2)([augmented[0]])
