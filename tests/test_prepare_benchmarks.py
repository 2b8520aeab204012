"""The image benchmarks: miniature copies of the published folders against maps made by hand."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coder
from scipy.io import loadmat, savemat

from modeling_gkc.vocabulary import Vocabulary
from train.data.benchmarks import all_benchmarks, benchmark_named
from train.data.benchmarks.ade20k import full_indices, instance_classes
from train.data.benchmarks.base import look_up, raw_ids, read_table
from train.data.prepare import Settings, prepare
from train.data.prepared import load_prepared
from train.data.schema import decode_ids, read_row, semantic_map

from . import benchmark_miniatures as minis
from .benchmark_miniatures import Miniature

ALL = Settings(any_count=True, progress=False)
BUILDERS = {
    "coco_panoptic_133": minis.coco_panoptic,
    "coco_stuff_171": minis.coco_stuff,
    "ade20k_150": minis.ade20k,
    "ade20k_847": minis.ade20k_full,
    **{name: lambda folder, name=name: minis.pascal_voc(folder, name) for name in minis.VOC_TRUTHS},
    **{name: lambda folder, name=name: minis.pascal_context(folder, name) for name in minis.CONTEXT_TRUTHS},
}
MERGED = {
    f"{name} from the JSON": lambda folder, name=name: minis.pascal_context_merged(folder, name)
    for name in minis.CONTEXT_TRUTHS
}


def rows_of(mini: Miniature, out: Path, split: str) -> dict[str, dict]:
    """Return the written rows by image id."""
    record = prepare(benchmark_named(mini.benchmark), mini.source, out, [split], ALL)[split]
    assert record["complete"] and not record["problems"], record["problems"]
    return {row["image_id"]: row for row in load_prepared(out, split).dataset}


def problems_of(mini: Miniature, out: Path, split: str = "val") -> list[str]:
    record = prepare(benchmark_named(mini.benchmark), mini.source, out, [split], ALL)[split]
    assert not record["complete"]
    return record["problems"]


@pytest.mark.parametrize("case", [*BUILDERS, *MERGED])
def test_rows_match_manual_maps(case, tmp_path):
    mini = (BUILDERS | MERGED)[case](tmp_path / "source")
    for split in mini.names:
        rows, truths = rows_of(mini, tmp_path / "out", split), mini.truth(split)
        assert list(rows) == list(mini.names[split].values())
        for image_id, row in rows.items():
            image, ids = read_row(row)
            assert np.array_equal(semantic_map(row, ids), truths[image_id]), (split, image_id)
            assert image.shape[:2] == truths[image_id].shape and row["video_id"] == "" and row["frame"] == 0


@pytest.mark.parametrize("case", BUILDERS)
def test_images_keep_their_bytes(case, tmp_path):
    mini = BUILDERS[case](tmp_path / "source")
    prepare(benchmark_named(mini.benchmark), mini.source, tmp_path / "out", ["val"], ALL)
    stored = load_prepared(tmp_path / "out", "val").dataset.with_format("arrow")[:]["image"].to_pylist()
    files = [mini.images[image_id] for image_id in mini.names["val"].values()]
    assert stored == [{"bytes": path.read_bytes(), "path": path.name} for path in files]


@pytest.mark.parametrize("case", BUILDERS)
def test_the_vocabulary_is_kept_and_counted(case, tmp_path):
    mini = BUILDERS[case](tmp_path / "source")
    record = prepare(benchmark_named(mini.benchmark), mini.source, tmp_path / "out", ["val"], ALL)["val"]
    found = load_prepared(tmp_path / "out", "val")
    truths = mini.truth("val").values()
    for index, label in enumerate(found.vocabulary.labels):
        assert record["classes"][label]["images"] == sum((truth == index).any() for truth in truths)
    assert found.benchmark == mini.benchmark and found.info == record
    if mini.benchmark in raw_vocabularies():
        named = Vocabulary.named(mini.benchmark)
        assert (found.vocabulary.names, found.vocabulary.is_thing) == (named.names, named.is_thing)
        assert found.vocabulary.colors == named.colors


def raw_vocabularies() -> set[str]:
    return {name for name, benchmark in all_benchmarks().items() if benchmark.vocabulary == name}


# ---- what is wrong


@pytest.mark.parametrize("case", BUILDERS)
def test_every_fault_is_named(case, tmp_path):
    """A file of each kind is spoilt in a copy of its own; all other pictures are in order."""
    damages = {
        "unexpected": lambda mini, name: mini.spoil(name),
        "size": lambda mini, name: mini.crop(name),
        "no annotation": lambda mini, name: mini.annotations[name].unlink(),
        "truncated annotation": lambda mini, name: cut(mini.annotations[name]),
        "no image": lambda mini, name: mini.images[name].unlink(),
        "truncated image": lambda mini, name: cut(mini.images[name]),
        "no picture": lambda mini, name: mini.images[name].write_bytes(b"hello"),
    }
    said = {
        "unexpected": r"Unexpected values|not in the segments_info",
        "size": r"its image \(",
        "no annotation": "missing",
        "truncated annotation": "cannot be read",
        "no image": "missing",
        "truncated image": "cannot be read",
        "no picture": "cannot be read",
    }
    for number, (damage, apply) in enumerate(damages.items()):
        mini = BUILDERS[case](tmp_path / f"source-{number}")
        name = mini.names["val"]["first"]
        apply(mini, name)
        (problem,) = problems_of(mini, tmp_path / f"out-{number}")
        file = mini.images[name] if "image" in damage or "picture" in damage else mini.annotations[name]
        assert problem.startswith(f"{file}:") and re.search(said[damage], problem), (damage, problem)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.mark.parametrize("case", BUILDERS)
def test_folder_of_another_benchmark_is_rejected(case, tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match="There is no"):
        prepare(benchmark_named(case), tmp_path, tmp_path / "out", ["val"], ALL)


@pytest.mark.parametrize(
    ("case", "value", "wrong"),
    [
        ("coco_stuff_171", 11, "11"),
        ("coco_stuff_171", 182, "182"),
        ("ade20k_150", 255, "255"),
        ("pascal_voc_21", 21, "21"),
    ],
)
def test_annotations_of_another_size_are_rejected(case, value, wrong, tmp_path):
    """Maps that count from 1 in place of 0, or the other way, meet a value that no annotation has."""
    mini = BUILDERS[case](tmp_path / "source")
    mini.unexpected = value
    mini.spoil(mini.names["val"]["first"])
    (problem,) = problems_of(mini, tmp_path / "out")
    assert f"Unexpected values {wrong} (1 pixels)" in problem


@pytest.mark.parametrize("case", ["ade20k_150", "ade20k_847", "coco_panoptic_133"])
def test_annotations_of_another_mode_are_rejected(case, tmp_path):
    mini = BUILDERS[case](tmp_path / "source")
    name = mini.names["val"]["first"]
    with Image.open(mini.annotations[name]) as picture:
        picture.convert("P").save(mini.annotations[name])
    (problem,) = problems_of(mini, tmp_path / "out")
    assert "mode P" in problem


# ---- COCO


def test_coco_segments_and_captions(tmp_path):
    mini = minis.coco_panoptic(tmp_path / "coco")
    rows = rows_of(mini, tmp_path / "out", "val")
    first, second = rows["000000000139"], rows["000000000140"]
    assert first["captions"] == ["A first one.", "A second sentence."] and second["captions"] == ["Only one."]
    assert sorted(first["segments"], key=lambda segment: segment["id"]) == [
        {"id": 5, "category_id": 0, "iscrowd": True},
        {"id": 300, "category_id": 1, "iscrowd": False},
        {"id": 1792, "category_id": 132, "iscrowd": False},
        {"id": 131075, "category_id": 0, "iscrowd": False},
    ]
    assert np.array_equal(
        read_row(first)[1], minis.translated("first", {"a": 131075, "b": 1792, "c": 5, "x": 300, "-": 0})
    )
    assert all(row["captions"] == [] for row in rows_of(mini, tmp_path / "out", "train").values())


def test_coco_without_captions_or_with_pngs_beside_the_json(tmp_path):
    mini = minis.coco_panoptic(tmp_path / "coco")
    (mini.source / "annotations" / "captions_val2017.json").unlink()
    (mini.source / "panoptic_val2017").rename(mini.source / "annotations" / "panoptic_val2017")
    assert [row["captions"] for row in rows_of(mini, tmp_path / "out", "val").values()] == [[], []]


VARIANTS = {  # benchmark: split: image -> (base or novel) train ids of the letters a, b, c, x
    "coco_panoptic_base_ignore": {"val": ["000000000139", "000000000140"], "train": ["first", "second", "third"]},
    "coco_panoptic_base_delete": {"val": ["000000000139", "000000000140"], "train": ["second"]},
    "coco_panoptic_novel": {"val": ["000000000139"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_coco_zero_shot_variants(variant, tmp_path):
    """Novel raw ids, typed by hand: bicycle, the second class of all, is the first of the 18."""
    mini = minis.coco_panoptic(tmp_path / "coco", variant)
    novel = variant.endswith("novel")
    mini.train_ids = (
        {"a": -1, "b": -1, "c": -1, "x": 0, "-": -1} if novel else {"a": 0, "b": 114, "c": 0, "x": -1, "-": -1}
    )
    for split, expected in VARIANTS[variant].items():
        rows = rows_of(mini, tmp_path / "out", split)
        assert sorted(rows) == sorted(mini.names[split].get(name, name) for name in expected)
        for image_id, row in rows.items():
            assert np.array_equal(semantic_map(row, read_row(row)[1]), mini.truth(split)[image_id])
        info = load_prepared(tmp_path / "out", split).info
        assert info["left_out"] == info["found"] - len(expected)
    labels = load_prepared(tmp_path / "out", "val").vocabulary.labels
    assert len(labels) == (18 if novel else 115) and ("bicycle" in labels) == novel


def test_inconsistent_coco_lists_are_named(tmp_path):
    mini = minis.coco_panoptic(tmp_path / "coco")
    path = mini.source / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    by_image = {annotation["image_id"]: annotation for annotation in content["annotations"]}
    by_image[139]["segments_info"][0]["category_id"] = 12  # a gap of COCO's numbers
    del content["annotations"][content["annotations"].index(by_image[140])]
    path.write_text(json.dumps(content))
    first, second = problems_of(mini, tmp_path / "out")
    assert "does not contain the categories [12]" in first and "panoptic_val2017.json" in first
    assert "no annotation of this image" in second and "000000000140" in second
    path.write_text("{")
    with pytest.raises(ValueError, match=r"panoptic_val2017\.json, line 1: invalid JSON"):
        prepare(benchmark_named(mini.benchmark), mini.source, tmp_path / "other", ["val"], ALL)


# ---- ADE20K


def test_ade20k_objects_lie_over_stuff(tmp_path):
    """Instance class 1 is bed, train id 7; class 100 is flag, train id 149; wall is stuff."""
    source = tmp_path / "ADEChallengeData2016"
    place = source / "annotations" / "validation" / "ADE_val_00000001.png"
    minis.write_photo(source / "images" / "validation" / "ADE_val_00000001.jpg", (2, 6))
    place.parent.mkdir(parents=True)
    minis.save_gray(np.array([[1, 1, 8, 8, 0, 8], [1, 4, 8, 8, 0, 8]]), place)
    objects = np.zeros((2, 6, 3), dtype=np.uint8)
    objects[:, 2:4, :2] = 1, 1
    objects[0, 1, :2] = 100, 2  # over the wall
    objects[:, 4, :2] = 1, 3  # where the semantic map is void
    instances = source / "annotations_instance" / "validation" / "ADE_val_00000001.png"
    instances.parent.mkdir(parents=True)
    minis.save_colors(objects, instances)
    benchmark = benchmark_named("ade20k_150_panoptic")
    prepare(benchmark, source, tmp_path / "out", ["val"], ALL)
    (row,) = load_prepared(tmp_path / "out", "val").dataset
    ids = read_row(row)[1]
    # The bed of the semantic map that is no object is void.
    expected = np.array([[0, 149, 7, 7, 7, -1], [0, 3, 7, 7, 7, -1]])
    assert np.array_equal(semantic_map(row, ids), expected)
    assert len(row["segments"]) == 5 and ids[0, 2] == ids[1, 3] != ids[0, 4]
    objects[0, 2, 0] = 100
    minis.save_colors(objects, instances)
    (problem,) = prepare(benchmark, source, tmp_path / "mixed", ["val"], ALL)["val"]["problems"]
    assert "objects [1] have pixels of several classes" in problem and problem.startswith(str(instances))
    objects[0, 2, 0] = 0
    minis.save_colors(objects, instances)
    (problem,) = prepare(benchmark, source, tmp_path / "classless", ["val"], ALL)["val"]["problems"]
    assert "1 pixels have an object without a class" in problem
    with pytest.raises(ValueError, match="annotations_instance"):
        instances.unlink()
        instances.parent.rmdir()
        prepare(benchmark, source, tmp_path / "none", ["val"], ALL)


def test_ade20k_instance_classes():
    table, labels = instance_classes(), Vocabulary.named("ade20k_150").labels
    assert list(table) == list(range(1, 101)) and sorted(table.values()) == list(table.values())
    # The first five and the last of the challenge's table, typed by hand.
    assert [labels[table[number]] for number in (1, 2, 3, 4, 5, 100)] == [
        "bed", "windowpane", "cabinet", "person", "door", "flag",
    ]  # fmt: skip


def test_pickle_is_read_without_executing_it(tmp_path):
    """The miniature's index_ade20k.pkl runs a program when it is unpickled; and parts are no annotations."""
    mini = minis.ade20k_full(tmp_path / "source")
    assert sorted(rows_of(mini, tmp_path / "out", "train")) == ["ADE_frame_00000007", "ADE_train_00000001"]


# ---- what other libraries read back


def test_written_maps_equal_what_scipy_reads(tmp_path):
    mini = minis.pascal_context(tmp_path / "source", "pascal_context_459")
    for image_id, row in rows_of(mini, tmp_path / "out", "val").items():
        labels = loadmat(mini.annotations[image_id])["LabelMap"].astype(int)
        assert np.array_equal(semantic_map(row, read_row(row)[1]), labels - 1)


def test_written_segments_equal_what_pycocotools_reads(tmp_path):
    mini = minis.pascal_context_merged(tmp_path / "source", "pascal_context_459")
    content = json.loads((mini.source / "VOC2010" / "trainval_merged.json").read_text())
    rows = rows_of(mini, tmp_path / "out", "val")
    compared = 0
    for image in content["images"]:
        if (row := rows.get(Path(image["file_name"]).stem)) is None:
            continue
        ids = read_row(row)[1]
        for annotation in content["annos_segmentation"]:
            if annotation["image_id"] == image["image_id"]:
                code = annotation["segmentation"]
                code = coder.frPyObjects(code, *code["size"]) if isinstance(code["counts"], list) else code
                assert np.array_equal(coder.decode(code), ids == annotation["category_id"])
                compared += 1
    assert compared == 7


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("annotations", "image_id", None, r"annotations\[0\].image_id: is missing"),
        ("annotations", "segments_info", [5], r"annotations\[0\].segments_info\[0\]: must be an object"),
        ("annotations", "segments_info", [{"id": 2**70, "category_id": 1}], "is too large"),
        ("images", "file_name", 5, r"images\[0\].file_name: must be str, got 5"),
        ("images", "id", True, r"images\[0\].id: must be int, got True"),
    ],
)
def test_values_of_wrong_types_in_a_published_json_are_named(part, key, value, message, tmp_path):
    mini = minis.coco_panoptic(tmp_path / "coco")
    path = mini.source / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    if value is None:
        del content[part][0][key]
    else:
        content[part][0][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        benchmark_named("coco_panoptic_133").find(mini.source, "val")


def test_written_ids_equal_what_the_png_holds(tmp_path):
    mini = minis.coco_panoptic(tmp_path / "coco")
    for image_id, row in rows_of(mini, tmp_path / "out", "val").items():
        published = np.asarray(Image.open(mini.annotations[image_id])).astype(int)
        assert np.array_equal(read_row(row)[1], published @ [1, 256, 65536])
        assert np.array_equal(decode_ids(np.asarray(row["segmentation"])), published @ [1, 256, 65536])


# ---- PASCAL-Context


def test_context_masks_that_overlap_or_are_missing_are_named(tmp_path):
    mini = minis.pascal_context_merged(tmp_path / "source", "pascal_context_59")
    path = mini.source / "VOC2010" / "trainval_merged.json"
    content = json.loads(path.read_text())
    content["annos_segmentation"] = [a for a in content["annos_segmentation"] if a["image_id"] != 6]
    content["annos_segmentation"] += [dict(content["annos_segmentation"][0], category_id=7)]
    content["annos_segmentation"] += [
        {"image_id": 6, "category_id": 2, "segmentation": minis.run_lengths(np.ones((2, 2), dtype=bool))}
    ]
    path.write_text(json.dumps(content))
    first, second = problems_of(mini, tmp_path / "out")
    assert "overlap" in first and "2008_first.jpg" in first
    assert re.search(r"2008_third.jpg: .* encoding is \(2, 2\)", second)


@pytest.mark.parametrize("counts", [[10], "oooooooooo0", [1.5, 4.5], None])
def test_context_run_lengths_that_make_no_mask_are_named(counts, tmp_path):
    mini = minis.pascal_context_merged(tmp_path / "source", "pascal_context_59")
    path = mini.source / "VOC2010" / "trainval_merged.json"
    content = json.loads(path.read_text())
    content["annos_segmentation"][0]["segmentation"]["counts"] = counts
    path.write_text(json.dumps(content))
    (problem,) = problems_of(mini, tmp_path / "out")
    assert "2008_first.jpg" in problem and "of the encoding" in problem


def test_context_splits_follow_the_merged_json_where_it_is_there(tmp_path):
    mini = minis.pascal_context(tmp_path / "source", "pascal_context_59")
    images = [{"image_id": 1, "file_name": "2008_second.jpg", "phase": "val"}]
    minis.write_json(mini.source / "trainval_merged.json", {"images": images, "annos_segmentation": []})
    mini.names["val"] = {"second": "2008_second"}
    assert list(rows_of(mini, tmp_path / "out", "val")) == ["2008_second"]


def test_a_mat_file_without_a_label_map_is_named(tmp_path):
    mini = minis.pascal_context(tmp_path / "source", "pascal_context_59")
    savemat(mini.annotations["2008_first"], {"other": np.zeros((3, 3))})
    (problem,) = problems_of(mini, tmp_path / "out")
    assert "LabelMap cannot be read" in problem and "2008_first.mat" in problem


# ---- counts and tables


def test_published_counts():
    """Typed by hand from the papers and the datasets' pages."""
    counts = {name: dict(benchmark.splits) for name, benchmark in all_benchmarks().items()}
    assert counts["coco_panoptic_133"] == counts["coco_stuff_171"] == {"train": 118287, "val": 5000}
    assert counts["ade20k_150"] == counts["ade20k_150_panoptic"] == {"train": 20210, "val": 2000}
    assert counts["ade20k_847"] == {"train": 25574, "val": 2000}
    for name in minis.VOC_TRUTHS:
        assert counts[name] == {"train": 1464, "val": 1449}
    for name in minis.CONTEXT_TRUTHS:
        assert counts[name] == {"train": 4998, "val": 5105}
        assert all_benchmarks()[name].other_counts == {"val": (5104,)}


SIZES = {  # classes, lowest and highest raw value, things
    "coco_panoptic_133": (133, 1, 200, 80),
    "coco_stuff_171": (171, 0, 181, 80),
    "ade20k_150": (150, 1, 150, 100),
    "ade20k_847": (847, 6, 3156, None),
    "pascal_voc_20": (20, 1, 20, 20),
    "pascal_voc_21": (21, 0, 20, 20),
    "pascal_context_59": (59, 2, 458, None),
    "pascal_context_459": (459, 1, 459, None),
}


@pytest.mark.parametrize("name", SIZES)
def test_tables(name):
    table, (count, lowest, highest, things) = raw_ids(name), SIZES[name]
    assert (len(table), min(table), max(table)) == (count, lowest, highest)
    assert sorted(table.values()) == list(range(count))
    kinds = Vocabulary.named(name).is_thing
    assert things is None or sum(map(bool, kinds)) == things


def test_tables_agree_with_each_other():
    stuff, panoptic = Vocabulary.named("coco_stuff_171"), Vocabulary.named("coco_panoptic_133")
    assert stuff.labels[:80] == panoptic.labels[:80]
    assert raw_ids("pascal_context_59").keys() < raw_ids("pascal_context_459").keys()
    for raw, index in raw_ids("pascal_context_59").items():
        label = Vocabulary.named("pascal_context_459").labels[raw_ids("pascal_context_459")[raw]]
        assert label.split()[0][:3] == Vocabulary.named("pascal_context_59").labels[index].split()[0][:3]
    # COCO-Stuff's things count from 0, COCO panoptic's from 1.
    stuff_table, panoptic_table = raw_ids("coco_stuff_171"), raw_ids("coco_panoptic_133")
    assert {raw + 1 for raw, index in stuff_table.items() if index < 80} == {
        raw for raw, index in panoptic_table.items() if index < 80
    }
    never_annotated = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}  # of labels.txt, from 1
    assert set(range(1, 183)) - {raw + 1 for raw in stuff_table} == never_annotated


def test_the_table_from_the_full_ade20k_to_150_classes():
    table = read_table("ade20k_full_to_150")
    assert len(table) == 153 and set(table.values()) == set(range(1, 151))
    indices = {pixel: [index for index in table if table[index] == pixel] for pixel in range(1, 151)}
    labels, full = Vocabulary.named("ade20k_150").names, Vocabulary.named("ade20k_847").names
    twice = {labels[pixel - 1][0]: found for pixel, found in indices.items() if len(found) > 1}
    assert twice == {"door": [774, 783], "wardrobe": [2985, 533], "booth": [246, 247]}
    full_ids, shared = raw_ids("ade20k_847"), 0
    for index, pixel in table.items():
        if index in full_ids:
            words = [
                set(" ".join(names).replace(",", " ").split()) for names in (labels[pixel - 1], full[full_ids[index]])
            ]
            shared += bool(words[0] & words[1])
    assert shared >= 148
    assert full_indices("ade20k_150")[2978] == 0 and full_indices("ade20k_150")[954] == 149


def test_the_table_from_coco_stuff_to_coco_panoptic():
    table = read_table("coco_stuff_171_to_panoptic_133")
    stuff, panoptic = Vocabulary.named("coco_stuff_171").labels, Vocabulary.named("coco_panoptic_133").labels
    assert len(table) == 171 - 12 and set(table.values()) == set(range(133))
    assert all(table[index] == index for index in range(80))
    merged = [new for new in set(table.values()) if list(table.values()).count(new) > 1]
    assert len(merged) == 17 and sum(new in merged for new in table.values()) == 43
    kept = {stuff[old]: panoptic[new] for old, new in table.items() if new not in merged}
    assert all(old.split()[0] == new.split()[0] for old, new in kept.items() if old != new)
    assert {old: panoptic[table[stuff.index(old)]] for old in ("fog", "straw", "skyscraper", "carpet")} == {
        "fog": "sky", "straw": "grass", "skyscraper": "building", "carpet": "rug",
    }  # fmt: skip


RELABELED = {  # benchmark: miniature, its letters with other classes
    "coco_stuff_133": (minis.coco_stuff, {"a": 0, "b": -1, "c": 11, "x": -1, "-": -1}),
    "ade20k_full_150": (minis.ade20k_full, {"a": 0, "b": -1, "c": 14, "x": -1, "-": -1}),
}


@pytest.mark.parametrize("variant", RELABELED)
def test_relabeled_benchmarks_match_manual_maps(variant, tmp_path):
    """COCO-Stuff's wood is void, ADE20K-Full's adding machine too."""
    build, train_ids = RELABELED[variant]
    mini = build(tmp_path / "source")
    mini.benchmark, mini.train_ids = variant, train_ids
    for image_id, row in rows_of(mini, tmp_path / "out", "val").items():
        assert np.array_equal(semantic_map(row, read_row(row)[1]), mini.truth("val")[image_id])


def test_look_up_names_file_values_and_pixels():
    raw = np.array([[3, 3, 9], [3, 700, 0]], dtype=np.uint16)
    assert np.array_equal(look_up(raw, {3: 0, 9: 5, 700: 1}, (0,), "a.png"), [[0, 0, 5], [0, 1, -1]])
    with pytest.raises(ValueError, match=r"a\.png: Unexpected values 9 \(1 pixels\), 700 \(1 pixels\)$"):
        look_up(raw, {3: 0}, (0,), "a.png")
    assert np.array_equal(look_up(np.array([[-1, 2]]), {2: 0}, (-1,), "a.png"), [[-1, 0]])
    with pytest.raises(ValueError, match="expected integers"):
        look_up(raw.astype(float), {3: 0}, (0,), "a.png")


# ---- one's own


def test_custom_folders(tmp_path):
    for index in range(10):
        minis.write_photo(tmp_path / "mine" / "images" / f"{index}.jpg", (3, 4))
        (tmp_path / "mine" / "masks").mkdir(exist_ok=True)
        minis.save_gray(np.array([[0, 1, 2, 2]] * 3), tmp_path / "mine" / "masks" / f"{index}.png")
    (tmp_path / "mine" / "names.json").write_text('{"1": "cat", "2": "dog", "0": null}')
    splits = prepare(benchmark_named("folder"), tmp_path / "mine", tmp_path / "out", None, ALL)
    assert {split: record["images"] for split, record in splits.items()} == {"train": 9, "val": 1, "test": 0}
    prepared = load_prepared(tmp_path / "out", "val")
    assert prepared.vocabulary.labels == ["cat", "dog"]
    row = prepared.dataset[0]
    assert np.array_equal(semantic_map(row, read_row(row)[1]), [[-1, 0, 1, 1]] * 3)
    (tmp_path / "mine" / "masks" / "4.png").unlink()
    record = prepare(benchmark_named("folder"), tmp_path / "mine", tmp_path / "other", ["train"], ALL)["train"]
    assert not record["complete"] and "4.jpg: No mask" in record["problems"][0]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_custom_list_files(kind, tmp_path):
    rows = []
    for index, letter in enumerate("abc"):
        minis.write_photo(tmp_path / "mine" / "photos" / f"{letter}.jpg", (3, 4))
        minis.save_gray(np.array([[0, 7, 2, 2]] * 3), tmp_path / "mine" / f"{letter}-mask.png")
        row = {"image": f"photos/{letter}.jpg", "mask": f"{letter}-mask.png", "split": "val" if index < 2 else "train"}
        rows.append(row | {"caption": f"It is {letter}.", "video_id": "v", "frame": index})
    (tmp_path / "mine" / "names.json").write_text('{"7": "cat", "2": "dog", "0": null}')
    write_list(tmp_path / "mine" / f"list.{kind}", rows)
    splits = prepare(benchmark_named("list"), tmp_path / "mine", tmp_path / "out", None, ALL)
    assert {split: record["images"] for split, record in splits.items()} == {"train": 1, "val": 2, "test": 0}
    second = load_prepared(tmp_path / "out", "val").dataset[1]
    assert np.array_equal(semantic_map(second, read_row(second)[1]), [[-1, 0, 1, 1]] * 3)
    kept = {name: second[name] for name in ("image_id", "captions", "video_id", "frame")}
    assert kept == {"image_id": "photos/b", "captions": ["It is b."], "video_id": "v", "frame": 1}
    write_list(tmp_path / "mine" / f"list.{kind}", [rows[0] | {"split": "rest"}])
    with pytest.raises(ValueError, match=r"row 1: The split must be train, val or test, got 'rest'"):
        prepare(benchmark_named("list"), tmp_path / "mine", tmp_path / "other", ["val"], ALL)
    write_list(tmp_path / "mine" / f"list.{kind}", [rows[0] | {"picture": "x"}])
    with pytest.raises(ValueError, match=r"Unknown columns \['picture'\]"):
        prepare(benchmark_named("list"), tmp_path / "mine", tmp_path / "third", ["val"], ALL)
    (tmp_path / "mine" / f"list.{kind}").write_bytes(b'{"a" "\xff')
    with pytest.raises(ValueError, match=rf"list.{kind} cannot be read"):
        prepare(benchmark_named("list"), tmp_path / "mine", tmp_path / "fourth", ["val"], ALL)


def write_list(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
