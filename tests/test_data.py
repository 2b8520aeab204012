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
    expand_masks,
    read_row,
)
from train.data.samples import augmented_row
from train.data.schema import annotated_segments, ids_within, learnable_ids, semantic_map
from train.data.transforms import resize_window, scaled_size

from .training_toys import VOCABULARY, toy_dataset, toy_row

NO_CHANGE = JointTransform(crop_size=None, flip_probability=0.0)


def alter(index: int, **changes):
    """Return a `change` for `toy_dataset` that replaces columns of one row."""
    return lambda position, row: {**row, **changes} if position == index else row


def test_ids_survive_the_coding():
    ids = np.array([[0, 1, 255], [256, 65_536, 2**24 - 1]], dtype=np.int32)
    colors = encode_ids(ids)
    assert colors.dtype == np.uint8 and colors[1, 0].tolist() == [0, 1, 0] and colors[1, 1].tolist() == [0, 0, 1]
    assert np.array_equal(decode_ids(colors), ids) and decode_ids(colors).dtype == np.int32
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
        ({"segments": [{"id": 7, "category_id": 2, "iscrowd": False}]}, r"sample 'toy-1': Ids \[300, 70000, 70001\]"),
        ({"segmentation": Image.new("RGB", (32, 64))}, r"sample 'toy-1': The segmentation is \(64, 32\)"),
        (
            {"segments": [{"id": 0, "category_id": 2, "iscrowd": False}]},
            r"'toy-1': Segment ids must be unique and not 0",
        ),
        ({"image_id": "toy-0"}, "'toy-0': Another sample has the same image_id"),
    ],
)
def test_wrong_samples_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        check_dataset(toy_dataset(3, change=alter(1, **changes)), VOCABULARY.labels, progress=False)


def test_categories_outside_the_vocabulary_are_named():
    with pytest.raises(ValueError, match=r"'toy-0': Category ids \[2\] are not in the vocabulary of 2 classes"):
        check_dataset(toy_dataset(2), VOCABULARY.labels[:2], progress=False)


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="segments"):
        check_dataset(toy_dataset(2).remove_columns("segments"), VOCABULARY.labels, progress=False)


def whole(shape: tuple[int, int], factor: float) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    scaled = scaled_size(shape, factor)
    return scaled, (0, 0, *scaled)


def test_resizing_moves_image_and_ids_alike():
    ids = np.zeros((40, 60), dtype=np.int32)
    ids[10:30, 20:50] = 9
    image = np.repeat((ids == 9)[..., None] * np.uint8(255), 3, axis=2)
    for factor in (0.5, 1.0, 1.7):
        resized, resized_ids = resize_window(image, ids, *whole(ids.shape, factor))
        assert resized.shape[:2] == resized_ids.shape == (round(40 * factor), round(60 * factor))
        inside = resized[..., 0] > 127
        assert ((resized_ids == 9) == inside).mean() > 0.97


@pytest.mark.parametrize("factor", [0.13, 0.7, 1.0, 1.37, 3.3])
def test_a_window_is_that_of_the_whole_scaled_image(factor, within):
    generator = np.random.default_rng(3)
    image = generator.integers(0, 256, (123, 187, 3), dtype=np.uint8)
    ids = generator.integers(0, 9, (123, 187), dtype=np.int32)
    expected_image, expected_ids = resize_window(image, ids, *whole(ids.shape, factor))
    by_pillow = Image.fromarray(image).resize(expected_image.shape[1::-1], Image.Resampling.BILINEAR)
    assert np.array_equal(expected_image, np.asarray(by_pillow))
    differences = []
    for _ in range(20):
        height, width = (int(generator.integers(1, side + 1)) for side in expected_ids.shape)
        top = int(generator.integers(0, expected_ids.shape[0] - height + 1))
        left = int(generator.integers(0, expected_ids.shape[1] - width + 1))
        window = slice(top, top + height), slice(left, left + width)
        cropped, cropped_ids = resize_window(image, ids, expected_ids.shape, (top, left, height, width))
        assert np.array_equal(cropped_ids, expected_ids[window])
        differences.append(np.abs(cropped.astype(int) - expected_image[window]).ravel())
    # At a scale such as 187 : 256 many values lie exactly between two of 0..255 and go either way.
    differences = np.concatenate(differences)
    within("cropped then scaled - scaled then cropped, values 0..255 of noise", differences.max(), 1)
    within("cropped then scaled - scaled then cropped, share that differs", (differences > 0).mean(), 0.1)


def test_flip_mirrors_both():
    image, ids = read_row(toy_row(0))
    flipped, flipped_ids = JointTransform(None, flip_probability=1.0)(image, ids, np.random.default_rng(0))
    assert np.array_equal(flipped, image[:, ::-1]) and np.array_equal(flipped_ids, ids[:, ::-1])


@pytest.mark.parametrize("shape", [(50, 80), (80, 50), (64, 64), (7, 200)])
def test_result_is_square_and_padded_with_gray_void(shape):
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


def test_batch_has_ids_classes_and_seeds():
    augmented = AugmentedDataset(toy_dataset(2), NO_CHANGE, seed=0)
    rows = [augmented[0], augmented[1]]
    batch = SegmentationCollator(GKCImageProcessor(), num_classes=3)(rows)
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["pixel_mask"].shape == (2, 64, 64)
    assert batch["segmentation"].shape == (2, 64, 64) and batch["segmentation"].dtype == torch.int32
    assert batch["image_ids"] == ["toy-0", "toy-1"] and batch["nouns"] == [[], []]
    assert batch["draw_seeds"] == [row["draw_seed"] for row in rows]
    assert [ids.tolist() for ids in batch["segment_ids"]] == [[7, 300, 70_000], [7, 300, 70_000, 70_001]]
    assert [labels.tolist() for labels in batch["class_labels"]] == [[2, 0, 1], [2, 0, 1, 1]]
    assert {ids.dtype for ids in batch["segment_ids"] + batch["class_labels"]} == {torch.int64}
    assert np.array_equal(batch["segmentation"][0].numpy(), read_row(toy_row(0))[1])
    assert "images" not in batch and "mask_labels" not in batch


def test_batch_keeps_the_pictures_when_asked():
    augmented = AugmentedDataset(toy_dataset(2), JointTransform(crop_size=48), seed=0)
    collate = SegmentationCollator(GKCImageProcessor(), num_classes=3, keep_images=True)
    images = collate([augmented[0], augmented[1]])["images"]
    assert all(image.dtype == torch.uint8 and image.shape == (48, 48, 3) for image in images)
    assert np.array_equal(images[1].numpy(), augmented[1]["image"])


def test_masks_are_those_of_the_ids():
    augmented = AugmentedDataset(toy_dataset(3), NO_CHANGE, seed=0)
    batch = SegmentationCollator(GKCImageProcessor(), num_classes=3)([augmented[index] for index in range(3)])
    masks = expand_masks(batch["segmentation"], batch["segment_ids"])
    for index, image_masks in enumerate(masks):
        ids = read_row(toy_row(index))[1]
        expected = [ids == segment["id"] for segment in toy_row(index)["segments"]]
        assert image_masks.dtype == torch.bool and np.array_equal(image_masks.numpy(), np.stack(expected))
    nothing = expand_masks(batch["segmentation"], [ids[:0] for ids in batch["segment_ids"]])
    assert [tuple(image_masks.shape) for image_masks in nothing] == [(0, 64, 64)] * 3


def test_segmentations_are_padded_with_the_images():
    rows = [AugmentedDataset(toy_dataset(1, size=size), NO_CHANGE, seed=0)[0] for size in (40, 64)]
    batch = SegmentationCollator(GKCImageProcessor(), num_classes=3)(rows)
    assert batch["pixel_values"].shape[-2:] == (64, 64)
    assert torch.equal(batch["segmentation"][0] != 0, batch["pixel_mask"][0].bool())
    assert batch["pixel_mask"][0].sum() == 40 * 40


def test_crowds_and_vanished_segments_are_left_out():
    crowd = alter(0, segments=[{**s, "iscrowd": s["id"] == 300} for s in toy_row(0)["segments"]])
    row = AugmentedDataset(toy_dataset(1, change=crowd), NO_CHANGE, seed=0)[0]
    assert [segment["id"] for segment in row["segments"]] == [7, 70_000] and set(np.unique(row["ids"])) == {
        0,
        7,
        70_000,
    }
    row["ids"][row["ids"] == 70_000] = 7
    collate = SegmentationCollator(GKCImageProcessor(), num_classes=3)
    batch = collate([row])
    assert batch["segment_ids"][0].tolist() == [7] and batch["class_labels"][0].tolist() == [2]
    batch = collate([{**row, "segments": []}])
    assert batch["segment_ids"][0].shape == batch["class_labels"][0].shape == (0,)


def test_segments_without_a_class_are_void():
    row = toy_row(1)
    row["segments"][0]["category_id"] = -1
    assert [segment["id"] for segment in annotated_segments(row)] == [300, 70_000, 70_001]
    ids = read_row(row)[1]
    assert np.array_equal(learnable_ids(row, ids), np.where(ids == 7, 0, ids))
    check_dataset(toy_dataset(2, change=alter(1, segments=row["segments"])), VOCABULARY.labels, progress=False)


def test_nouns_of_the_caption_come_along():
    row = augmented_row(toy_row(0) | {"nouns": ["disc", "grass"]}, NO_CHANGE, (0, 0, 0))
    assert row["nouns"] == ["disc", "grass"]
    assert SegmentationCollator(GKCImageProcessor(), 3)([row])["nouns"] == [["disc", "grass"]]


def test_the_nouns_of_one_caption_are_drawn_by_the_key_of_the_sample():
    captions = [["disc"], ["grass", "lawn"], []]
    drawn = [augmented_row(toy_row(0) | {"nouns": captions}, NO_CHANGE, (0, epoch, 0))["nouns"] for epoch in range(30)]
    assert {tuple(nouns) for nouns in drawn} == {("disc",), ("grass", "lawn"), ()}
    again = augmented_row(toy_row(0) | {"nouns": captions}, NO_CHANGE, (0, 7, 0))
    assert again["nouns"] == drawn[7]


def test_draw_seeds_depend_on_seed_epoch_and_place_only():
    def seeds(seed: int, epoch: int) -> list[int]:
        augmented = AugmentedDataset(toy_dataset(4), JointTransform(crop_size=32), seed)
        augmented.set_epoch(epoch)
        return [augmented[index]["draw_seed"] for index in range(4)]

    drawn = [*seeds(0, 0), *seeds(0, 1), *seeds(1, 0)]
    assert seeds(0, 0) == drawn[:4] and len(set(drawn)) == 12
    assert all(0 <= seed < 2**63 for seed in drawn)


def test_ids_within_are_all_of_them():
    generator = np.random.default_rng(0)
    for shape in ((1, 1), (1, 7), (7, 1), (30, 40)):
        ids = generator.integers(0, 20, shape).astype(np.int32)
        assert np.array_equal(ids_within(ids), np.unique(ids)) and np.array_equal(ids_within(ids.T), np.unique(ids))


def test_class_outside_the_vocabulary_raises():
    augmented = AugmentedDataset(toy_dataset(1), NO_CHANGE, seed=0)
    with pytest.raises(ValueError, match=r"'toy-0': Category ids \[2\]"):
        SegmentationCollator(GKCImageProcessor(), num_classes=2)([augmented[0]])


def test_segmentation_of_another_mode_raises():
    grey = {**toy_row(0), "segmentation": Image.new("L", (64, 64), 7)}
    with pytest.raises(ValueError, match="'toy-0': The image has mode L; store segment ids as an RGB image"):
        read_row(grey)


def test_a_quick_check_reads_some_rows_of_the_whole():
    dataset = toy_dataset(9, change=alter(8, segments=[]))
    with pytest.raises(ValueError, match="'toy-8': Ids"):
        check_dataset(dataset, VOCABULARY.labels, progress=False, sample=2)
    check_dataset(dataset.select(range(8)), VOCABULARY.labels, progress=False, sample=2)
    check_dataset(toy_dataset(9, change=alter(5, segments=[])), VOCABULARY.labels, progress=False, sample=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"segments": [{"id": 7, "category_id": 3, "iscrowd": False}]},
            r"Category ids \[3\] are not in the vocabulary",
        ),
        ({"segments": [{"id": 7, "category_id": -2, "iscrowd": False}]}, r"Category ids \[-2\] are not in"),
        ({"segments": [{"id": 0, "category_id": 2, "iscrowd": False}]}, r".* unique and not 0 \(void\), got \[0\]"),
        ({"segments": [{"id": 7, "category_id": c, "iscrowd": False} for c in (0, 2)]}, r".* unique .*, got \[7, 7\]"),
        ({"segments": [{"id": 7, "category_id": None, "iscrowd": False}]}, "Segments or parts of them are missing"),
        ({"segments": None}, "Segments or parts of them are missing: None"),
        ({"image_id": "toy-3"}, "Another sample has the same image_id"),
        ({"image_id": None}, "The image_id is missing"),
    ],
)
def test_a_quick_check_looks_at_the_segments_of_all_rows(changes, message):
    dataset = toy_dataset(7, change=alter(5, **changes))
    image_id = changes.get("image_id", "toy-5")
    with pytest.raises(ValueError, match=rf"sample {image_id!r}: {message}"):
        check_dataset(dataset, VOCABULARY.labels, progress=False, sample=2)


def test_segments_listed_twice_are_found_while_training():
    twice = [{"id": 7, "category_id": c, "iscrowd": False} for c in (0, 2)]
    row = toy_row(0) | {"segments": twice + toy_row(0)["segments"][1:]}
    ids = read_row(row)[1]
    for read in (learnable_ids, semantic_map):
        with pytest.raises(ValueError, match=r"Sample 'toy-0': Segment ids must be unique"):
            read(row, ids)
