"""The contact sheet: that names, colors, shares and frames are those of the data."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from modeling_gkc.visualization import COLOR_OPACITY, VOID_BRIGHTNESS, shade
from modeling_gkc.vocabulary import Vocabulary
from train.data.contact_sheet import Sample, SheetRow, draw_sheet, enlarged, legend, overlay, shade_steps
from train.data.prepared import read_manifest, write_manifest
from train.data.schema import dataset_features, encode_ids
from train.data.view import choose, main, open_dataset
from train.storage.checksums import file_sha256

CITY = Vocabulary.named("cityscapes_19")
ROAD, CAR, PERSON = CITY.labels.index("road"), CITY.labels.index("car"), CITY.labels.index("person")
GRAY = 100
BIG = 2**24 - 1
# 100 pixels: 50 road; 9, 6 and 5 of two cars and a group of cars; 10 of nothing, 20 of a segment without a class.
IDS = np.zeros((10, 10), dtype=np.int32)
IDS[:5], IDS[5, :9], IDS[6, :6], IDS[7, :5], IDS[8:] = 7, 26000, 26001, BIG, 5
SEGMENTS = [
    {"id": 7, "category_id": ROAD, "iscrowd": False},
    {"id": 26000, "category_id": CAR, "iscrowd": False},
    {"id": 26001, "category_id": CAR, "iscrowd": False},
    {"id": BIG, "category_id": CAR, "iscrowd": True},
    {"id": 5, "category_id": -1, "iscrowd": False},
]


def sample(ids=IDS, segments=SEGMENTS) -> Sample:
    return Sample(np.full((*ids.shape, 3), GRAY, dtype=np.uint8), ids, segments)


def png(pixels: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def row(name: str, video: str = "", frame: int = 0, ids=IDS, segments=SEGMENTS) -> dict:
    """Return a row in its stored form."""
    image = np.full((*ids.shape, 3), GRAY, dtype=np.uint8)
    return {
        "image": png(image),
        "segmentation": png(encode_ids(ids)),
        "segments": segments,
        "captions": [],
        "image_id": name,
        "video_id": video,
        "frame": frame,
    }


def save_dataset(folder: Path, rows: list[dict], vocabulary: Vocabulary | None = CITY) -> Path:
    """Save a dataset with the splits train (its first row) and val."""
    splits = {"train": rows[:1], "val": rows}
    made = {name: Dataset.from_list(part, features=dataset_features()) for name, part in splits.items()}
    DatasetDict(made).save_to_disk(folder)
    if vocabulary is not None:
        (folder / "vocabulary.json").write_text(json.dumps({"classes": [{"name": n[0]} for n in vocabulary.names]}))
    return folder


def save_prepared(folder: Path, rows: list[dict], per_shard: int = 5, per_group: int = 2) -> Path:
    """Write a prepared folder of several files with several row groups each."""
    folder.mkdir()
    shards, schema = [], dataset_features().arrow_schema
    for start in range(0, len(rows), per_shard):
        part, file = rows[start : start + per_shard], f"val-{start}.parquet"
        pq.write_table(pa.Table.from_pylist(part, schema=schema), folder / file, row_group_size=per_group)
        shards.append({"file": file, "images": len(part), "sha256": file_sha256(folder / file)})
    record = {"complete": True, "images": len(rows), "shards": shards}
    (folder / "vocabulary.json").write_text(json.dumps({"classes": [{"name": name} for name in CITY.labels]}))
    manifest = {"benchmark": "cityscapes_19", "source": "here", "options": {}, "splits": {"val": record}}
    write_manifest(folder, manifest)
    return folder


VIDEO_ROWS = [row(f"{video}/{frame}", video, frame) for video in ("a", "b", "c") for frame in range(6)]


# --- the picture ---


def test_legend_counts_pixels_objects_and_crowds_as_by_hand():
    entries = [(e.label, e.color, round(e.share, 9), e.objects, e.crowds) for e in legend([sample()], CITY)]
    assert entries == [
        ("road", (128, 64, 128), 0.5, 1, 0),
        ("car", (0, 0, 142), 0.2, 2, 1),
        ("(void)", None, 0.3, 0, 0),
    ]
    assert [entry.text for entry in legend([sample()], CITY)] == [
        "road   50 %",
        "car   20 %   2 objects   1 crowd",
        "(void)   30 %",
    ]


def test_legend_of_a_video_counts_an_object_once():
    ids = np.where(IDS == 26001, 7, IDS)
    ids[0, 0] = 26002
    segments = [*SEGMENTS, {"id": 26002, "category_id": CAR, "iscrowd": False}]
    entries = {entry.label: entry for entry in legend([sample(), sample(ids, segments)], CITY)}
    assert entries["car"].objects == 3 and entries["car"].crowds == 1
    assert entries["road"].share == pytest.approx((50 + 50 + 6 - 1) / 200)


def test_overlay_has_the_vocabulary_s_colors_where_the_segments_are(within):
    """Around the middle of each square, away from outlines and names."""
    ids = np.repeat(np.repeat([[7, 24000], [24001, 0]], 50, axis=0), 50, axis=1).astype(np.int32)
    segments = [
        {"id": 7, "category_id": ROAD, "iscrowd": False},
        {"id": 24000, "category_id": PERSON, "iscrowd": False},
        {"id": 24001, "category_id": PERSON, "iscrowd": False},
    ]
    picture = np.asarray(overlay(sample(ids, segments), CITY)).astype(int)
    assert picture.shape == (480, 480, 3)
    expected = {
        (60, 60): CITY.palette[ROAD],
        (60, 300): CITY.palette[PERSON],
        (300, 60): shade(CITY.palette[PERSON], 1),
    }
    for (top, left), color in expected.items():
        blended = (1 - COLOR_OPACITY) * GRAY + COLOR_OPACITY * np.array(color)
        patch = picture[top : top + 20, left : left + 20]
        within("color of a segment in the overlay", np.abs(patch - blended).max(), 1)
    void = picture[300:400, 300:400].reshape(-1, 3)
    assert {tuple(color) for color in void.tolist()} == {
        (round(VOID_BRIGHTNESS * GRAY),) * 3,
        (round(VOID_BRIGHTNESS * 255),) * 3,
    }


def test_an_object_keeps_its_shade_over_the_frames_of_a_video():
    later = sample(np.where(IDS == 26000, 0, IDS).astype(np.int32), SEGMENTS[:1] + SEGMENTS[2:])
    assert shade_steps([sample(), later]) == {7: 0, 26000: 0, 26001: 1, BIG: 2}
    assert shade_steps([later]) == {7: 0, 26001: 0, BIG: 1}


def test_sheet_shows_only_colors_of_present_classes():
    sheet = draw_sheet("heading", [SheetRow("first", [sample()]), SheetRow("second", [sample(), sample()])], CITY)
    colors = {color for _, color in sheet.getcolors(maxcolors=2**24)}
    assert CITY.palette[ROAD] in colors and CITY.palette[CAR] in colors
    assert CITY.palette[PERSON] not in colors and CITY.palette[CITY.labels.index("sky")] not in colors
    alone = draw_sheet("heading", [SheetRow("first", [sample()])], CITY)
    assert sheet.height > alone.height + 2 * 480  # the row of two frames has images above and overlays below


@pytest.mark.parametrize("shape", [(1, 1), (3, 900), (700, 2), (37, 53)])
def test_images_of_any_shape_are_drawn(shape):
    ids = np.full(shape, BIG, dtype=np.int32)
    drawn = sample(ids, [{"id": BIG, "category_id": CAR, "iscrowd": False}])
    assert overlay(drawn, CITY).size == enlarged(drawn.image).size
    assert draw_sheet("x", [SheetRow("one", [drawn])], CITY).height > 200


def test_a_legend_of_all_classes_is_drawn_and_a_vocabulary_without_colors_has_some():
    words = Vocabulary.named("vspw_124")
    ids = np.repeat(np.arange(1, 125, dtype=np.int32)[:, None], 4, axis=1)
    segments = [{"id": number + 1, "category_id": number, "iscrowd": False} for number in range(124)]
    sheet = draw_sheet("all", [SheetRow("all", [sample(ids, segments)])], words)
    assert set(words.palette) <= {color for _, color in sheet.getcolors(maxcolors=2**24)}


# --- which rows ---


def test_rows_are_spread_over_the_images(tmp_path):
    viewed = open_dataset(save_dataset(tmp_path / "data", [row(f"i{n}") for n in range(9)]))
    assert choose(viewed, rows=3) == [[0], [4], [8]]
    assert choose(viewed, rows=20) == [[n] for n in range(9)]
    assert choose(viewed, ids=["i7", "i2"]) == [[7], [2]]
    with pytest.raises(ValueError, match=r"no image or video i9; it has i0, i1, i2"):
        choose(viewed, ids=["i7", "i9"])


def test_a_row_shows_frames_of_one_video_in_order(tmp_path):
    mixed = [VIDEO_ROWS[index] for index in np.random.default_rng(0).permutation(len(VIDEO_ROWS))]
    viewed = open_dataset(save_dataset(tmp_path / "data", mixed))
    for chosen in (choose(viewed, rows=2, frames=3), choose(viewed, rows=3, frames=6)):
        for numbers in chosen:
            frames = [viewed.places[number][2] for number in numbers]
            assert len({viewed.places[number][1] for number in numbers}) == 1
            assert frames in ([0, 2, 5], [0, 1, 2, 3, 4, 5])
    assert [viewed.places[number][0] for number in choose(viewed, frames=2, ids=["b"])[0]] == ["b/0", "b/5"]
    assert [viewed.places[number][0] for number in choose(viewed, ids=["b/3"])[0]] == ["b/3"]


def test_rows_of_parquet_files_are_those_that_were_written(tmp_path):
    ids = [np.full((2, 3), number + 1, dtype=np.int32) for number in range(12)]
    segments = [[{"id": number + 1, "category_id": number, "iscrowd": False}] for number in range(12)]
    rows = [row(f"i{n}", ids=ids[n], segments=segments[n]) for n in range(12)]
    viewed = open_dataset(save_prepared(tmp_path / "data", rows))
    assert viewed.places == [(f"i{n}", "", 0) for n in range(12)]
    for number in (0, 1, 4, 5, 9, 11):
        assert viewed.read(number) == rows[number]
    with pytest.raises(IndexError):
        viewed.read(12)


# --- the command ---


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("save", [save_dataset, save_prepared], ids=["save_to_disk", "prepared"])
def test_the_command_writes_a_sheet(save, tmp_path, capsys):
    folder = save(tmp_path / "data", VIDEO_ROWS)
    assert run(folder, "--rows", 2, "--frames", 2, "--out", tmp_path / "new" / "sheet.png") == 0
    assert "sheet.png: 2 rows" in capsys.readouterr().out
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.height > 4 * 480 and sheet.width > 2 * 480
    assert run(folder, "--ids", "a/0", "c", "--out", tmp_path / "sheet.jpg") == 0
    assert Image.open(tmp_path / "sheet.jpg").format == "JPEG"


def test_a_dataset_without_vocabulary_takes_the_one_that_is_named(tmp_path, capsys):
    folder = save_dataset(tmp_path / "data", [row("i0")], vocabulary=None)
    out = tmp_path / "sheet.png"
    assert run(folder, "--out", out) == 2
    assert "no vocabulary.json: name its classes with --vocabulary" in capsys.readouterr().err and not out.exists()
    assert run(folder, "--out", out, "--vocabulary", "cityscapes_19", "--split", "train") == 0
    colors = {color for _, color in Image.open(out).getcolors(maxcolors=2**24)}
    assert CITY.palette[ROAD] in colors and CITY.palette[CAR] in colors


def test_broken_samples_are_named_and_the_others_drawn(tmp_path, capsys):
    cut = row("cut")
    cut["image"]["bytes"] = cut["image"]["bytes"][:40]
    rows = [
        row("good"),
        cut,
        row("odd", segments=SEGMENTS[1:]),
        row("far", segments=[SEGMENTS[0] | {"category_id": 19}]),
    ]
    rows[3]["segmentation"] = png(encode_ids(np.where(IDS == 7, 7, 0)))
    folder = save_dataset(tmp_path / "data", rows)
    assert run(folder, "--out", tmp_path / "sheet.png") == 1
    told = capsys.readouterr().out
    assert "image of sample 'cut'" in told and "'odd': Ids [7]" in told and "'far' has class ids [19]" in told
    assert Image.open(tmp_path / "sheet.png").height > 480


def test_usage_errors_are_one_line(tmp_path, capsys):
    folder = save_dataset(tmp_path / "data", [row("i0")])
    prepared = save_prepared(tmp_path / "prepared", [row("i0")])
    manifest = read_manifest(prepared)
    manifest["splits"]["val"]["complete"] = False
    write_manifest(prepared, manifest)
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ([tmp_path / "nowhere"], "is not a directory"),
        ([tmp_path / "empty", "--vocabulary", "cityscapes_19"], "neither a prepared benchmark nor"),
        ([folder, "--split", "test"], "no split 'test'. Its splits are: train, val"),
        ([folder, "--ids", "i5"], "no image or video i5"),
        ([prepared], "incomplete: finish it with `python -m train.data.prepare cityscapes_19"),
    ]:
        assert run(*arguments, "--out", tmp_path / "sheet.png") == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "train.data.view" in line]
        assert len(lines) == 1 and message in lines[0]
    for wrong in (["--out", "sheet.gif"], ["--rows", "0"], ["--rows", "101"]):
        with pytest.raises(SystemExit, match="2"):
            run(folder, *wrong)
