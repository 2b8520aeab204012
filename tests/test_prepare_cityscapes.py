"""Cityscapes: miniature copies of the published folder against maps made by hand."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_gkc.vocabulary import Vocabulary
from train.data.benchmarks.cityscapes import BENCHMARKS
from train.data.prepare import main as prepare_main
from train.data.prepared import load_prepared
from train.data.schema import decode_ids, encode_ids, semantic_map

SEMANTIC, PANOPTIC = (benchmark for benchmark in BENCHMARKS)

# The official table, typed by hand: label id -> (train id, name).
TABLE = {
    7: (0, "road"),
    8: (1, "sidewalk"),
    11: (2, "building"),
    12: (3, "wall"),
    13: (4, "fence"),
    17: (5, "pole"),
    19: (6, "traffic light"),
    20: (7, "traffic sign"),
    21: (8, "vegetation"),
    22: (9, "terrain"),
    23: (10, "sky"),
    24: (11, "person"),
    25: (12, "rider"),
    26: (13, "car"),
    27: (14, "truck"),
    28: (15, "bus"),
    31: (16, "train"),
    32: (17, "motorcycle"),
    33: (18, "bicycle"),
}
LABELS = np.array([[7, 7, 8, 0, 3], [26, 26, 8, 33, 30], [23, 11, 6, 4, 29]], dtype=np.uint8)
CLASSES = np.array([[0, 0, 1, -1, -1], [13, 13, 1, 18, -1], [10, 2, -1, -1, -1]])
# Two cars, a group of cars, a group of people, a bicycle; trailer 2, a group of caravans, and other void.
INSTANCES = np.array([[7, 7, 26000, 26001, 26001], [24, 24, 26, 33012, 30002], [23, 11, 26, 0, 29]], dtype=np.uint16)
INSTANCE_IDS = np.array([[7, 7, 26000, 26001, 26001], [24, 24, 26, 33012, 0], [23, 11, 26, 0, 0]])
INSTANCE_SEGMENTS = {  # id -> (train id, crowd)
    7: (0, False),
    11: (2, False),
    23: (10, False),
    24: (11, True),
    26: (13, True),
    26000: (13, False),
    26001: (13, False),
    33012: (18, False),
}


def write_pair(root: Path, name: str, labels=LABELS, instances=INSTANCES, split: str = "val") -> dict[str, Path]:
    """Write an image of noise and its two label images in the published format."""
    city = name.split("_")[0]
    files = {
        "image": root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png",
        "labelIds": root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png",
        "instanceIds": root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png",
    }
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(name)).integers(0, 255, (*labels.shape, 3), dtype=np.uint8)
    Image.fromarray(noise).save(files["image"])
    Image.fromarray(labels).save(files["labelIds"])
    Image.fromarray(instances).save(files["instanceIds"])
    # What lies beside them in the archive must not be taken for labels.
    Image.fromarray(noise).save(files["labelIds"].with_name(f"{name}_gtFine_color.png"))
    files["labelIds"].with_name(f"{name}_gtFine_polygons.json").write_text("{}")
    return files


def classes_of(picture, shape=LABELS.shape) -> np.ndarray:
    """(H, W) train ids of what a picture's reader gives, -1 for void."""
    ids, segments = picture.read(shape)
    assert ids.dtype == np.int32
    classes = np.full(ids.shape, -1)
    for segment in segments:
        classes[ids == segment["id"]] = segment["category_id"]
    return classes


def test_images_of_all_cities_are_found_in_order(tmp_path):
    for name in ("munster_000001_000019", "frankfurt_000001_000576", "frankfurt_000000_000294"):
        write_pair(tmp_path, name)
    write_pair(tmp_path, "aachen_000000_000019", split="train")
    for benchmark in BENCHMARKS:
        pictures = benchmark.find(tmp_path, "val")
        assert [picture.image_id for picture in pictures] == [
            "frankfurt_000000_000294",
            "frankfurt_000001_000576",
            "munster_000001_000019",
        ]
        assert [p.path.name for p in pictures] == [f"{p.image_id}_leftImg8bit.png" for p in pictures]
        assert all(picture.path.is_file() and picture.video_id == "" for picture in pictures)
        assert [picture.image_id for picture in benchmark.find(tmp_path, "train")] == ["aachen_000000_000019"]
        assert benchmark.splits == {"train": 2975, "val": 500}


def test_semantic_maps_match_manual_maps(tmp_path):
    write_pair(tmp_path, "ulm_000000_000019")
    (picture,) = SEMANTIC.find(tmp_path, "val")
    assert np.array_equal(classes_of(picture), CLASSES)
    _, segments = picture.read(LABELS.shape)
    assert [segment["category_id"] for segment in segments] == [0, 1, 2, 10, 13, 18]  # one per class
    assert not any(segment["iscrowd"] for segment in segments)


def test_every_label_id_has_the_official_train_id_and_name(tmp_path):
    labels = np.arange(34, dtype=np.uint8)[None]
    write_pair(tmp_path, "ulm_000000_000019", labels=labels)
    (picture,) = SEMANTIC.find(tmp_path, "val")
    assert classes_of(picture, (1, 34))[0].tolist() == [TABLE.get(label, (-1,))[0] for label in range(34)]
    names = Vocabulary.named(SEMANTIC.vocabulary).labels
    assert names == [name for _, name in TABLE.values()] and len(names) == 19


def test_panoptic_segments_match_manual_segments(tmp_path):
    write_pair(tmp_path, "ulm_000000_000019")
    (picture,) = PANOPTIC.find(tmp_path, "val")
    ids, segments = picture.read(INSTANCES.shape)
    assert np.array_equal(ids, INSTANCE_IDS) and ids.dtype == np.int32
    assert {s["id"]: (s["category_id"], s["iscrowd"]) for s in segments} == INSTANCE_SEGMENTS
    assert np.array_equal(decode_ids(encode_ids(ids)), INSTANCE_IDS)  # ids above 255 survive what is stored
    assert [s["id"] for s in segments] == sorted(INSTANCE_SEGMENTS)


@pytest.mark.parametrize("label", sorted({24, 25, 26, 27, 28, 31, 32, 33}))
def test_the_eight_things_have_instances_and_crowds(label, tmp_path):
    instances = np.array([[label, label * 1000, label * 1000 + 999]], dtype=np.uint16)
    write_pair(tmp_path, "ulm_000000_000019", instances=instances)
    _, segments = PANOPTIC.find(tmp_path, "val")[0].read((1, 3))
    assert [(s["id"], s["iscrowd"]) for s in segments] == [
        (label, True),
        (label * 1000, False),
        (label * 1000 + 999, False),
    ]
    assert {s["category_id"] for s in segments} == {TABLE[label][0]}


@pytest.mark.parametrize("value", [34, 255], ids=["above the last label", "void of *_labelTrainIds.png"])
def test_unexpected_label_id_is_rejected_with_file_and_value(value, tmp_path):
    labels = LABELS.copy()
    labels[2, 2] = value
    files = write_pair(tmp_path, "ulm_000000_000019", labels=labels)
    with pytest.raises(ValueError, match=rf"{value}") as error:
        SEMANTIC.find(tmp_path, "val")[0].read(LABELS.shape)
    assert str(files["labelIds"]) in str(error.value)


@pytest.mark.parametrize("value", [34, 34001, 17001, 7000, 65535])
def test_unexpected_instance_id_is_rejected_with_file_and_value(value, tmp_path):
    instances = INSTANCES.copy()
    instances[2, 2] = value
    files = write_pair(tmp_path, "ulm_000000_000019", instances=instances)
    with pytest.raises(ValueError, match=rf"{value}") as error:
        PANOPTIC.find(tmp_path, "val")[0].read(INSTANCES.shape)
    assert str(files["instanceIds"]) in str(error.value)


def test_label_images_of_another_mode_or_size_are_rejected(tmp_path):
    files = write_pair(tmp_path, "ulm_000000_000019")
    Image.fromarray((INSTANCES % 256).astype(np.uint8)).save(files["instanceIds"])
    with pytest.raises(ValueError, match=r"instanceIds.png: .*mode L"):
        PANOPTIC.find(tmp_path, "val")[0].read(INSTANCES.shape)
    with pytest.raises(ValueError, match=r"labelIds.png: .*\(3, 5\)"):
        SEMANTIC.find(tmp_path, "val")[0].read((5, 3))
    Image.fromarray(np.zeros((*LABELS.shape, 3), dtype=np.uint8)).save(files["labelIds"])
    with pytest.raises(ValueError, match=r"labelIds.png: .*mode RGB"):
        SEMANTIC.find(tmp_path, "val")[0].read(LABELS.shape)


def test_missing_and_damaged_files_are_named_and_stay_in_the_list(tmp_path):
    _good, damaged, missing, alone = (write_pair(tmp_path, f"ulm_00000{number}_000019") for number in range(4))
    damaged["labelIds"].write_bytes(damaged["labelIds"].read_bytes()[:50])
    missing["labelIds"].unlink()
    alone["image"].unlink()
    pictures = SEMANTIC.find(tmp_path, "val")
    assert [picture.image_id[4:10] for picture in pictures] == ["000000", "000001", "000002", "000003"]
    assert np.array_equal(classes_of(pictures[0]), CLASSES)
    for picture, files in ((pictures[1], damaged), (pictures[2], missing)):
        with pytest.raises((ValueError, OSError)) as error:
            picture.read(LABELS.shape)
        assert str(files["labelIds"]) in str(error.value)
    assert pictures[3].path == alone["image"]  # whoever opens it learns which file is missing


def test_folder_of_another_layout_is_rejected_with_the_missing_part(tmp_path):
    with pytest.raises(ValueError, match="leftImg8bit/val"):
        SEMANTIC.find(tmp_path, "val")
    files = write_pair(tmp_path, "ulm_000000_000019")
    files["instanceIds"].unlink()
    with pytest.raises(ValueError, match=r"gtFine_instanceIds.png"):
        PANOPTIC.find(tmp_path, "val")
    with pytest.raises(ValueError, match="leftImg8bit/train"):
        SEMANTIC.find(tmp_path, "train")
    (tmp_path / "gtFine").rename(tmp_path / "gtCoarse")
    with pytest.raises(ValueError, match="gtFine/val"):
        SEMANTIC.find(tmp_path, "val")


def run(benchmark: str, source: Path, out: Path, *options: str) -> int:
    return prepare_main([benchmark, "--source", str(source), "--out", str(out), "--split", "val", *options])


def color_ids(row: dict) -> np.ndarray:
    """Decode the ids of a stored segmentation by the published rule."""
    red, green, blue = np.moveaxis(np.asarray(row["segmentation"]).astype(int), -1, 0)
    return red + 256 * green + 256 * 256 * blue


def test_command_stores_manual_maps(tmp_path):
    names = ["aachen_000000_000019", "ulm_000000_000019", "ulm_000001_000019"]
    files = [write_pair(tmp_path / "source", name) for name in names]
    for benchmark in BENCHMARKS:
        out = tmp_path / benchmark.name
        assert run(benchmark.name, tmp_path / "source", out, "--any-count", "--images-per-shard", "2") == 0
        prepared = load_prepared(out, "val")
        assert list(prepared.dataset["image_id"]) == names
        for row, pair in zip(prepared.dataset, files, strict=True):
            assert np.array_equal(np.asarray(row["image"]), np.asarray(Image.open(pair["image"])))
            if benchmark is PANOPTIC:
                assert np.array_equal(color_ids(row), INSTANCE_IDS)
                found = {s["id"]: (s["category_id"], s["iscrowd"]) for s in row["segments"]}
                assert found == INSTANCE_SEGMENTS
            else:
                assert np.array_equal(color_ids(row), CLASSES + 1)
                assert np.array_equal(semantic_map(row, color_ids(row).astype(np.int32)), CLASSES)


def test_command_names_broken_files_and_skips_them_on_request(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    _good, damaged, missing, alone = (write_pair(source, f"ulm_00000{number}_000019") for number in range(4))
    damaged["labelIds"].write_bytes(damaged["labelIds"].read_bytes()[:50])
    missing["labelIds"].unlink()
    alone["image"].unlink()
    assert run("cityscapes_19", source, out, "--any-count") == 1
    told = capsys.readouterr().out
    assert all(str(path) in told for path in (damaged["labelIds"], missing["labelIds"], alone["image"]))
    with pytest.raises(ValueError, match="incomplete"):
        load_prepared(out, "val")
    assert run("cityscapes_19", source, out, "--any-count", "--skip-broken", "3") == 1
    assert list(load_prepared(out, "val").dataset["image_id"]) == ["ulm_000000_000019"]


def test_command_rejects_an_unpublished_number_of_images(tmp_path, capsys):
    write_pair(tmp_path / "source", "ulm_000000_000019")
    assert run("cityscapes_19", tmp_path / "source", tmp_path / "out") == 1
    assert "Found 1 images, but 500 are published" in capsys.readouterr().out
