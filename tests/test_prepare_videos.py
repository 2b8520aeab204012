"""VSPW and VIPSeg: miniature copies of the published folders against maps made by hand."""

import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_gkc.vocabulary import Vocabulary
from modeling_gkc.vocabulary_files import packaged_facts
from train.data.benchmarks.videos import BENCHMARKS
from train.data.prepare import main as prepare_main
from train.data.prepared import load_prepared
from train.data.schema import decode_ids, encode_ids, semantic_map

VSPW, VIPSEG, VIPSEG_BASE, VIPSEG_NOVEL = BENCHMARKS
ONE_SPLIT = "ignore:.* videos; .* are published"
LOW = "ignore:frames of .* pixels high"
pytestmark = [pytest.mark.filterwarnings(ONE_SPLIT), pytest.mark.filterwarnings(LOW)]

SHAPE = (3, 5)
# Both kinds of void, the first class, the last one, and two whose names are known from the release.
MASK = np.array([[0, 255, 1, 1, 124], [61, 61, 1, 255, 124], [0, 124, 124, 2, 2]], dtype=np.uint8)
CLASSES = np.array([[-1, -1, 0, 0, 123], [60, 60, 0, -1, 123], [-1, 123, 123, 1, 1]])

# 6100 and 6101: two persons; 12400: a train; 12: a pillar; 10199: a washing machine; 5: a thing without a number.
RAW = np.array([[0, 1, 6100, 6100, 6101], [12400, 1, 12, 12, 6101], [0, 5, 10199, 10199, 1]], dtype=np.uint16)
RAW_SEGMENTS = {1: 0, 5: 4, 12: 11, 6100: 60, 6101: 60, 10199: 100, 12400: 123}


def write_picture(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def noise(shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)


def write_vspw(root: Path, videos: dict[str, dict[str, np.ndarray]], split: str = "val") -> Path:
    """Videos by name, their masks by the name of the frame, in the published layout."""
    for video, masks in videos.items():
        for frame, mask in masks.items():
            write_picture(root / "data" / video / "origin" / f"{frame}.jpg", noise(mask.shape))
            write_picture(root / "data" / video / "mask" / f"{frame}.png", mask)
    (root / f"{split}.txt").write_text("".join(f"{video}\n" for video in videos))
    return root


def write_vipseg(root: Path, videos: dict[str, dict[str, np.ndarray]], split: str = "val") -> Path:
    """Return the same for VIPSeg's archive."""
    for video, masks in videos.items():
        for frame, mask in masks.items():
            write_picture(root / "imgs" / video / f"{frame}.jpg", noise(mask.shape))
            write_picture(root / "panomasks" / video / f"{frame}.png", mask)
    (root / f"{split}.txt").write_text("".join(f"{video}\n" for video in videos))
    return root


def categories() -> list[dict]:
    """panoVIPSeg_categories.json: official names, counted from 0."""
    return [
        {"id": c["id"], "name": c.get("official_name", c["name"]), "isthing": int(c["is_thing"]), "color": c["color"]}
        for c in packaged_facts("vipseg_124")["classes"]
    ]


# What the owners' scripts make of a video: other ids, as far as 2**24 - 1, which stay over its frames.
BIG = 2**24 - 1
JSON_IDS = {
    "00000001": np.array([[0, 7, 7, 70000, BIG], [0, 7, 7, 70000, BIG], [300, 300, 7, 70000, 0]]),
    "00000003": np.array([[7, 7, 7, 7, BIG], [0, 0, 0, 7, BIG], [300, 300, 300, 0, 0]]),
}
JSON_CATEGORIES = {7: 0, 300: 60, 70000: 60, BIG: 123}


def write_vipseg_json(folder: Path, videos: dict, name: str = "panoptic_gt_VIPSeg_val.json") -> Path:
    """Write the folder VIPSeg_720P with the ids (H, W) of each video's frames."""
    annotations = []
    for video, frames in videos.items():
        for frame, ids in frames.items():
            write_picture(folder / "images" / video / f"{frame}.jpg", noise(ids.shape))
            write_picture(folder / "panomasksRGB" / video / f"{frame}.png", encode_ids(ids))
        described = [describe(frame, ids) for frame, ids in frames.items()]
        annotations.append({"video_id": video, "annotations": described})
    content = {"videos": [], "annotations": annotations, "categories": categories()}
    (folder / name).write_text(json.dumps(content))
    return folder / name


def describe(frame: str, ids: np.ndarray) -> dict:
    present = {int(number): int((ids == number).sum()) for number in np.unique(ids) if number}
    infos = [{"id": k, "category_id": JSON_CATEGORIES[k], "iscrowd": 0, "area": area} for k, area in present.items()]
    return {"image_id": frame, "file_name": f"{frame}.png", "segments_info": infos}


def classes_of(picture, shape=SHAPE) -> np.ndarray:
    ids, segments = picture.read(shape)
    assert ids.dtype == np.int32
    classes = np.full(ids.shape, -1)
    for segment in segments:
        classes[ids == segment["id"]] = segment["category_id"]
    return classes


def places(pictures) -> list[tuple[str, str, int]]:
    return [(picture.image_id, picture.video_id, picture.frame) for picture in pictures]


# --- VSPW ---


def test_vspw_maps_match_manual_maps(tmp_path):
    write_vspw(tmp_path, {"12_abc": {"00000005": MASK}})
    (picture,) = VSPW.find(tmp_path, "val")
    assert np.array_equal(classes_of(picture), CLASSES)
    labels = Vocabulary.named("vspw_124").labels
    assert (labels[0], labels[1], labels[60], labels[123]) == ("wall", "ceiling", "person", "train")


def test_vspw_values_are_classes_plus_one_and_0_and_255_are_void(tmp_path):
    values = np.append(np.arange(125), 255).astype(np.uint8)[None]
    write_vspw(tmp_path, {"12_abc": {"00000005": values}})
    assert classes_of(VSPW.find(tmp_path, "val")[0], (1, 126))[0].tolist() == [-1, *range(124), -1]


@pytest.mark.parametrize("value", [125, 254], ids=["one too many", "255 moved down by one"])
def test_vspw_unexpected_value_is_rejected_with_file_and_value(value, tmp_path):
    write_vspw(tmp_path, {"12_abc": {"00000005": np.where(MASK == 2, value, MASK).astype(np.uint8)}})
    with pytest.raises(ValueError, match=rf"12_abc/mask/00000005.png: .*{value}"):
        VSPW.find(tmp_path, "val")[0].read(SHAPE)


def test_vspw_frames_are_sorted_by_video_and_frame(tmp_path):
    videos = {"9_b": dict.fromkeys(("00000010", "00000002", "00000100"), MASK), "10_a": {"00000001": MASK}}
    write_vspw(tmp_path, videos)
    (tmp_path / "data" / "9_b" / "origin" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "data" / "9_b" / "origin" / "._00000002.jpg").write_bytes(b"x")
    (tmp_path / "val.txt").write_text("9_b\r\n10_a\r\n\r\n")  # as an editor may leave it
    write_picture(tmp_path / "data" / "of_another_split" / "origin" / "1.jpg", noise())
    pictures = VSPW.find(tmp_path, "val")
    assert places(pictures) == [
        ("9_b/00000002", "9_b", 0),
        ("9_b/00000010", "9_b", 1),
        ("9_b/00000100", "9_b", 2),
        ("10_a/00000001", "10_a", 0),
    ]
    for picture in pictures:
        video, frame = picture.image_id.split("/")
        assert picture.path == tmp_path / "data" / video / "origin" / f"{frame}.jpg"


def test_vspw_source_may_be_the_archive_folder_or_its_parent(tmp_path):
    write_vspw(tmp_path / "VSPW_480p", {"12_abc": {"00000005": MASK}})
    assert places(VSPW.find(tmp_path, "val")) == places(VSPW.find(tmp_path / "VSPW_480p", "val"))


def test_vspw_damaged_and_missing_files_are_named_and_frames_keep_their_places(tmp_path):
    write_vspw(tmp_path, {"988_f_Xvy_DCPt8": {f"{n:08d}": MASK for n in range(5)}, "lost": {"1": MASK}})
    video = tmp_path / "data" / "988_f_Xvy_DCPt8"
    (video / "mask" / "00000000.png").write_bytes(b"")  # as in the first release
    (video / "mask" / "00000001.png").write_bytes((video / "mask" / "00000001.png").read_bytes()[:60])
    (video / "mask" / "00000002.png").unlink()
    (video / "origin" / "00000003.jpg").unlink()
    (tmp_path / "data" / "lost").rename(tmp_path / "elsewhere")
    pictures = VSPW.find(tmp_path, "val")
    assert [picture.frame for picture in pictures] == [0, 1, 2, 3, 4, 0]
    for number in range(3):
        with pytest.raises((ValueError, OSError), match=f"988_f_Xvy_DCPt8/mask/0000000{number}.png"):
            pictures[number].read(SHAPE)
    assert pictures[3].path == video / "origin" / "00000003.jpg" and not pictures[3].path.exists()
    assert np.array_equal(classes_of(pictures[4]), CLASSES)
    assert pictures[5].image_id == "lost" and not pictures[5].path.exists() and "lost" in str(pictures[5].path)
    assert "988_f_Xvy_DCPt8" in VSPW.discrepancy and VSPW.splits == {"train": None, "val": 24502}


def test_vspw_mask_of_another_size_or_mode_is_rejected(tmp_path):
    write_vspw(tmp_path, {"12_abc": {"00000005": MASK}})
    with pytest.raises(ValueError, match=r"00000005.png: .*\(3, 5\).*\(5, 3\)"):
        VSPW.find(tmp_path, "val")[0].read((5, 3))
    write_vspw(tmp_path, {"12_abc": {"00000005": MASK.astype(np.uint16)}})
    with pytest.raises(ValueError, match=r"00000005.png: .*mode I"):
        VSPW.find(tmp_path, "val")[0].read(SHAPE)


def test_vspw_full_size_frames_and_other_numbers_of_videos_warn(tmp_path):
    tall = np.ones((480, 2), dtype=np.uint8)
    write_vspw(tmp_path, {f"v{n}": {"1": tall, "2": MASK} for n in range(343)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VSPW.find(tmp_path, "val")
    write_picture(tmp_path / "data" / "v7" / "origin" / "1.jpg", noise((1080, 2)))
    with pytest.warns(UserWarning, match=r"1 of 343 videos are not 480 pixels high \(v7: 1080\).*VSPW_480p"):
        VSPW.find(tmp_path, "val")
    write_vspw(tmp_path, {"v0": {"1": tall}})
    with pytest.warns(UserWarning, match=r"val.txt names 1 videos; 343 are published"):
        VSPW.find(tmp_path, "val")


def test_vspw_invalid_folders_and_lists_are_rejected_with_their_path(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/data"):
        VSPW.find(tmp_path, "val")
    write_vspw(tmp_path, {"12_abc": {"00000005": MASK}})
    with pytest.raises(ValueError, match=r"train.txt"):
        VSPW.find(tmp_path, "train")
    (tmp_path / "val.txt").write_text("12_abc\n12_abc\n")
    with pytest.raises(ValueError, match=r"val.txt names .*12_abc.* more than once"):
        VSPW.find(tmp_path, "val")
    (tmp_path / "val.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"val.txt names no video"):
        VSPW.find(tmp_path, "val")


# --- VIPSeg ---


def test_vipseg_raw_masks_match_manual_maps(tmp_path):
    write_vipseg(tmp_path, {"0_abc": {"00000001": RAW, "00000004": RAW[:, ::-1]}})
    pictures = VIPSEG.find(tmp_path, "val")
    assert places(pictures) == [("0_abc/00000001", "0_abc", 0), ("0_abc/00000004", "0_abc", 1)]
    ids, segments = pictures[0].read(SHAPE)
    assert np.array_equal(ids, RAW.astype(int)) and ids.dtype == np.int32 and ids.max() == 12400
    assert {segment["id"]: segment["category_id"] for segment in segments} == RAW_SEGMENTS
    assert not any(segment["iscrowd"] for segment in segments)
    assert np.array_equal(decode_ids(encode_ids(ids)), RAW)
    later, same = pictures[1].read(SHAPE)
    assert same == segments and np.array_equal(later, RAW[:, ::-1])  # the same ids over the video
    vocabulary = Vocabulary.named("vipseg_124")
    assert [vocabulary.labels[index] for index in (0, 4, 11, 60, 100, 123)] == [
        "wall",
        "ladder",
        "pillar",
        "person",
        "washing machine",
        "train",
    ]
    assert sum(map(bool, vocabulary.is_thing)) == 58


def test_vipseg_every_value_of_raw_masks(tmp_path):
    """All numbers of all things and of all classes alone, against the rule written out class by class."""
    is_thing = [bool(entry["is_thing"]) for entry in packaged_facts("vipseg_124")["classes"]]
    expected = {0: -1} | {number: number - 1 for number in range(1, 125)}
    for number in range(1, 125):
        if is_thing[number - 1] and number > 1:
            expected |= {
                number * 100 + instance: number - 1 for instance in range(100) if number * 100 + instance > 124
            }
    values = np.array(sorted(expected), dtype=np.uint16)[None]
    write_vipseg(tmp_path, {"0_abc": {"1": values}})
    found = classes_of(VIPSEG.find(tmp_path, "val")[0], values.shape)[0]
    assert found.tolist() == [expected[value] for value in values[0].tolist()]


@pytest.mark.parametrize("value", [125, 255, 12500, 65535, 1200])
def test_vipseg_unexpected_raw_value_is_rejected_with_file_and_value(value, tmp_path):
    """No class, no thing: 1200 would be a pillar with a number, 125 and 255 wall and ceiling with one."""
    write_vipseg(tmp_path, {"0_abc": {"1": np.where(RAW == 5, value, RAW).astype(np.uint16)}})
    with pytest.raises(ValueError, match=rf"panomasks/0_abc/1.png: .*{value}"):
        VIPSEG.find(tmp_path, "val")[0].read(SHAPE)


def test_vipseg_8_bit_masks_are_rejected(tmp_path):
    write_vipseg(tmp_path, {"0_abc": {"1": (RAW % 256).astype(np.uint8)}})
    with pytest.raises(ValueError, match=r"panomasks/0_abc/1.png: .*mode L"):
        VIPSEG.find(tmp_path, "val")[0].read(SHAPE)


def check_json_frames(pictures) -> None:
    assert places(pictures) == [("0_abc/00000001", "0_abc", 0), ("0_abc/00000003", "0_abc", 1)]
    for picture, expected in zip(pictures, JSON_IDS.values(), strict=True):
        ids, segments = picture.read(SHAPE)
        assert np.array_equal(ids, expected) and ids.dtype == np.int32
        present = set(np.unique(expected).tolist()) - {0}
        assert {s["id"]: s["category_id"] for s in segments} == {k: JSON_CATEGORIES[k] for k in present}
        assert np.array_equal(decode_ids(encode_ids(ids)), expected)


def test_vipseg_json_of_one_split_matches_manual_maps(tmp_path):
    write_vipseg_json(tmp_path, {"0_abc": JSON_IDS})
    check_json_frames(VIPSEG.find(tmp_path, "val"))


def test_vipseg_json_of_all_splits_needs_the_list_and_precedes_raw_masks(tmp_path):
    small = tmp_path / "VIPSeg_720P"
    write_vipseg_json(small, {"5_train": JSON_IDS, "0_abc": JSON_IDS}, "panoptic_gt_VIPSeg.json")
    with pytest.raises(ValueError, match=r"val.txt"):
        VIPSEG.find(tmp_path, "val")
    write_vipseg(tmp_path, {"0_abc": {"00000001": RAW}})
    for folder in (tmp_path, small):  # the lists lie beside VIPSeg_720P
        check_json_frames(VIPSEG.find(folder, "val"))


def test_vipseg_720p_raw_masks_precede_full_size_masks(tmp_path):
    write_vipseg(tmp_path, {"0_abc": {"1": RAW}})
    (tmp_path / "VIPSeg_720P").mkdir()
    (tmp_path / "imgs").rename(tmp_path / "VIPSeg_720P" / "images")
    (tmp_path / "panomasks").rename(tmp_path / "VIPSeg_720P" / "panomasks")
    (picture,) = VIPSEG.find(tmp_path, "val")
    assert picture.path == tmp_path / "VIPSeg_720P" / "images" / "0_abc" / "1.jpg"
    assert np.array_equal(picture.read(SHAPE)[0], RAW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["categories"].pop(), "Category 123 is None, but in VIPSeg 'train'"),
        (lambda c: [x.update(id=x["id"] + 1) for x in c["categories"]], "Category 0 is None, but .* 'wall'"),
        (lambda c: c.pop("categories"), r"categories: is missing: create it again with the authors' script"),
    ],
    ids=["a class too few", "counted from 1", "no categories"],
)
def test_vipseg_json_with_other_categories_is_rejected(change, message, tmp_path):
    path = write_vipseg_json(tmp_path, {"0_abc": JSON_IDS})
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"panoptic_gt_VIPSeg_val.json.*{message}"):
        VIPSEG.find(tmp_path, "val")


def first_infos(content: dict) -> list[dict]:
    return content["annotations"][0]["annotations"][0]["segments_info"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: first_infos(c)[0].update(category_id=124), r"categories \[124\], expected 0 to 123"),
        (lambda c: first_infos(c)[0].update(category_id=1), r"segments \[7\] have another category in other frames"),
        (lambda c: first_infos(c).pop(), rf"Ids only in the image \[{BIG}\]"),
        (lambda c: first_infos(c).append({"id": 99, "category_id": 0, "iscrowd": 0}), r"only in .* \[99\]"),
        (lambda c: c["annotations"][0]["annotations"].pop(0), "does not describe this frame"),
    ],
    ids=["category counted from 1", "other class in another frame", "unlisted", "no pixel", "frame left out"],
)
def test_vipseg_json_that_contradicts_its_masks_is_rejected(change, message, tmp_path):
    path = write_vipseg_json(tmp_path, {"0_abc": JSON_IDS})
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"panomasksRGB/0_abc/00000001.png: .*{message}"):
        VIPSEG.find(tmp_path, "val")[0].read(SHAPE)


def test_vipseg_damaged_and_missing_files_are_named(tmp_path):
    path = write_vipseg_json(tmp_path, {"0_abc": JSON_IDS, "1_def": JSON_IDS})
    masks = tmp_path / "panomasksRGB" / "0_abc"
    (masks / "00000001.png").write_bytes((masks / "00000001.png").read_bytes()[:70])
    (masks / "00000003.png").unlink()
    (tmp_path / "images" / "1_def" / "00000003.jpg").unlink()
    (tmp_path / "panomasksRGB" / "1_def" / "00000003.png").unlink()
    pictures = VIPSEG.find(tmp_path, "val")
    assert [picture.image_id for picture in pictures] == [
        f"{v}/0000000{n}" for v in ("0_abc", "1_def") for n in (1, 3)
    ]
    for picture, name in ((pictures[0], "0_abc/00000001.png"), (pictures[1], "0_abc/00000003.png")):
        with pytest.raises((ValueError, OSError), match=f"panomasksRGB/{name}"):
            picture.read(SHAPE)
    assert not pictures[3].path.exists()
    path.write_text(path.read_text()[:200])
    with pytest.raises(
        ValueError, match=r"VIPSeg_val.json is damaged, line 1: invalid JSON: .*create it again with the auth"
    ):
        VIPSEG.find(tmp_path, "val")


def test_vipseg_frames_of_another_height_than_720_warn(tmp_path):
    write_vipseg(tmp_path, {f"v{n}": {"1": np.ones((720, 2), dtype=np.uint16)} for n in range(343)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VIPSEG.find(tmp_path, "val")
    write_picture(tmp_path / "imgs" / "v3" / "1.jpg", noise((1080, 2)))
    with pytest.warns(UserWarning, match=r"1 of 343 videos are not 720 pixels high \(v3: 1080\)"):
        VIPSEG.find(tmp_path, "val")


def test_vipseg_base_and_novel_classes_are_numbered_separately():
    novel_names = {
        "basket",
        "bathtub",
        "blackboard",
        "box",
        "fan",
        "ice",
        "instrument",
        "printer",
        "trash can",
        "tyre",
        "grandstand",
        "pillar",
    }
    labels = Vocabulary.named("vipseg_124").labels
    novel = VIPSEG_NOVEL.classes()
    assert set(novel.labels) == novel_names and len(novel) == 12
    base = VIPSEG_BASE.classes()
    assert base.labels == [label for label in labels if label not in novel_names] and len(base) == 112
    segments = [{"id": number, "category_id": number, "iscrowd": False} for number in range(124)]
    for benchmark, vocabulary in ((VIPSEG_BASE, base), (VIPSEG_NOVEL, novel)):
        for segment in benchmark.renumbered(segments):
            label = labels[segment["id"]]
            expected = vocabulary.labels.index(label) if label in vocabulary.labels else -1
            assert segment["category_id"] == expected
        assert benchmark.keeps("val", segments[:1])  # a video stays whole


def test_frames_can_be_pickled(tmp_path):
    write_vspw(tmp_path, {"12_abc": {"00000005": MASK}})
    write_vipseg_json(tmp_path / "vip", {"0_abc": JSON_IDS})
    for pictures in (VSPW.find(tmp_path, "val"), VIPSEG.find(tmp_path / "vip", "val")):
        copies = pickle.loads(pickle.dumps(pictures))
        for picture, copy in zip(pictures, copies, strict=True):
            assert np.array_equal(picture.read(SHAPE)[0], copy.read(SHAPE)[0])


# --- the command ---


def run(benchmark: str, source: Path, out: Path, *options: str) -> int:
    return prepare_main([benchmark, "--source", str(source), "--out", str(out), "--split", "val", *options])


def color_ids(row: dict) -> np.ndarray:
    """Decode the ids of a stored segmentation by the published rule."""
    red, green, blue = np.moveaxis(np.asarray(row["segmentation"]).astype(int), -1, 0)
    return red + 256 * green + 256 * 256 * blue


def stored(out: Path) -> list[dict]:
    return list(load_prepared(out, "val").dataset)


def test_command_stores_vspw_frames_and_reports_a_damaged_video(tmp_path, capsys):
    videos = {"12_abc": {"00000005": MASK, "00000012": MASK[:, ::-1]}, "988_f_Xvy_DCPt8": {"1": MASK, "2": MASK}}
    source = write_vspw(tmp_path / "VSPW_480p", videos)
    (source / "data" / "988_f_Xvy_DCPt8" / "origin" / "1.jpg").write_bytes(b"")
    assert run("vspw_124", source, tmp_path / "out", "--any-count") == 1
    told = capsys.readouterr().out
    assert str(source / "data" / "988_f_Xvy_DCPt8" / "origin" / "1.jpg") in told
    assert "Frames of the video 988_f_Xvy_DCPt8 are empty files" in told and "--skip-broken 1" in told
    assert run("vspw_124", source, tmp_path / "out", "--any-count", "--skip-broken", "1") == 1
    rows = stored(tmp_path / "out")
    assert [(row["image_id"], row["video_id"], row["frame"]) for row in rows] == [
        ("12_abc/00000005", "12_abc", 0),
        ("12_abc/00000012", "12_abc", 1),
        ("988_f_Xvy_DCPt8/2", "988_f_Xvy_DCPt8", 1),
    ]
    for row, expected in zip(rows, (CLASSES, CLASSES[:, ::-1], CLASSES), strict=True):
        assert np.array_equal(color_ids(row), expected + 1)
        assert np.array_equal(semantic_map(row, color_ids(row).astype(np.int32)), expected)


def test_command_stores_vipseg_from_raw_masks_and_json(tmp_path):
    write_vipseg(tmp_path / "raw", {"0_abc": {"1": RAW}})
    write_vipseg_json(tmp_path / "json", {"0_abc": JSON_IDS})
    assert run("vipseg_124", tmp_path / "raw", tmp_path / "a") == 0
    (row,) = stored(tmp_path / "a")
    assert np.array_equal(color_ids(row), RAW)
    assert {segment["id"]: segment["category_id"] for segment in row["segments"]} == RAW_SEGMENTS
    assert run("vipseg_124", tmp_path / "json", tmp_path / "b") == 0
    for row, expected in zip(stored(tmp_path / "b"), JSON_IDS.values(), strict=True):
        assert np.array_equal(color_ids(row), expected)
        assert all(segment["category_id"] == JSON_CATEGORIES[segment["id"]] for segment in row["segments"])


def test_command_numbers_base_and_novel_classes_separately(tmp_path):
    """A pillar (raw 12) is novel, the eleventh class of the whole list; all before it are base."""
    write_vipseg(tmp_path / "raw", {"0_abc": {"1": RAW}})
    expected = {
        "base": {1: "wall", 5: "ladder", 6100: "person", 6101: "person", 10199: "washing machine", 12400: "train"},
        "novel": {12: "pillar"},
    }
    for kind, names in expected.items():
        out = tmp_path / kind
        assert run(f"vipseg_124_{kind}", tmp_path / "raw", out) == 0
        prepared = load_prepared(out, "val")
        labels, (row,) = prepared.vocabulary.labels, prepared.dataset
        assert len(labels) == {"base": 112, "novel": 12}[kind]
        classes = {segment["id"]: segment["category_id"] for segment in row["segments"]}
        assert {number: labels[category] for number, category in classes.items() if category >= 0} == names
        truth = semantic_map(row, color_ids(row).astype(np.int32))
        assert np.array_equal(truth >= 0, np.isin(RAW, list(names))) and truth.max() < len(labels)
