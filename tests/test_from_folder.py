"""A folder of one's own pictures becomes a dataset, a training run, and a segmentation."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk
from PIL import Image

from modeling_gkc.cli.main import main as gkc_main
from modeling_gkc.vocabulary import Vocabulary
from train.data import check_dataset, encode_ids, read_row
from train.data.drawn_world.words import SHAPES
from train.data.drawn_world.world import draw_scene
from train.data.from_folder import convert, main
from train.engine.main import main as train_main

ROOT = Path(__file__).parent.parent

NAMES = {"0": None, "1": "grass", "2": ["disc", "round"], "3": "square"}
PIXELS = np.zeros((24, 32), dtype=np.uint8)
PIXELS[8:], PIXELS[2:6, 2:6], PIXELS[2:6, 20:26], PIXELS[12:20, 10:16] = 1, 2, 2, 3


def write_folder(folder: Path, names=NAMES, masks: dict | None = None, pictures: int = 4) -> Path:
    """Pictures of noise with the mask `PIXELS`, or others by number."""
    generator = np.random.default_rng(0)
    for place in ("images", "masks"):
        (folder / place).mkdir(parents=True)
    for number in range(pictures):
        picture = Image.fromarray(generator.integers(0, 255, (*PIXELS.shape, 3), dtype=np.uint8))
        picture.save(folder / "images" / f"{number}.{'jpg' if number % 2 else 'png'}")
        mask = (masks or {}).get(number, Image.fromarray(PIXELS))
        mask.save(folder / "masks" / f"{number}.png")
    (folder / "names.json").write_text(json.dumps(names))
    return folder


def classes_of(row: dict) -> np.ndarray:
    """(H, W) class of every pixel, -1 for void."""
    _, ids = read_row(row)
    classes = np.full(ids.shape, -1)
    for segment in row["segments"]:
        classes[ids == segment["id"]] = segment["category_id"]
    return classes


def all_rows(out: Path) -> dict[str, dict]:
    splits = load_from_disk(out)
    vocabulary = Vocabulary.from_file(out / "vocabulary.json")
    for split in splits.values():
        check_dataset(split, vocabulary.labels, progress=False)
    return {row["image_id"]: row for split in splits.values() for row in split}


def test_images_and_masks_become_a_dataset(tmp_path, capsys):
    folder = write_folder(tmp_path / "mine", pictures=10)
    assert main([str(folder), "--out", str(tmp_path / "data"), "--val-share", "0.2"]) == 0
    rows = all_rows(tmp_path / "data")
    assert {split: len(part) for split, part in load_from_disk(tmp_path / "data").items()} == {"train": 8, "val": 2}
    assert sorted(rows) == [str(number) for number in range(10)]
    assert Vocabulary.from_file(tmp_path / "data" / "vocabulary.json").names == [
        ["grass"],
        ["disc", "round"],
        ["square"],
    ]
    for name, row in rows.items():
        assert np.array_equal(classes_of(row), PIXELS.astype(int) - 1)
        assert np.array_equal(np.asarray(row["image"]), np.asarray(Image.open(next(folder.glob(f"images/{name}.*")))))
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["classes"]["disc"] == {"segments": 10, "images": 10} and report["problems"] == []
    assert "8 train, 2 val" in capsys.readouterr().out
    assert not [path.name for path in tmp_path.iterdir() if ".part" in path.name]


def test_void_pixels_are_counted_and_reported(tmp_path, capsys):
    mask = np.zeros_like(PIXELS)
    mask[:6, :16] = 1  # an eighth
    write_folder(tmp_path / "mine", {"1": "circle"}, {0: Image.fromarray(mask)}, pictures=1)
    assert main([str(tmp_path / "mine"), "--out", str(tmp_path / "data")]) == 0
    said = capsys.readouterr().out
    assert "87.5 % of the pixels are void" in said and "a semantic prediction assigns them" in said
    assert json.loads((tmp_path / "data" / "report.json").read_text())["void_share"] == 0.875
    (tmp_path / "mine" / "names.json").write_text('{"1": "circle", "0": "background"}')
    assert main([str(tmp_path / "mine"), "--out", str(tmp_path / "named")]) == 0
    assert "0.0 % of the pixels are void." in capsys.readouterr().out


def test_classes_with_equal_embeddings_are_reported(tmp_path, capsys, monkeypatch):
    """Warn for the recipe's default checkpoint; fail for a named checkpoint and in training."""
    monkeypatch.chdir(ROOT)
    masks = {number: Image.fromarray(np.minimum(PIXELS, 2)) for number in (0, 1)}
    write_folder(tmp_path / "mine", {"1": "hammer", "2": ["spanner", "wrench"]}, masks, pictures=2)
    command = [str(tmp_path / "mine"), "--out", str(tmp_path / "data"), "--val-share", "0.5"]
    assert main([*command, "--init-from", "hub_card/gkc-mini"]) == 2
    assert "--init-from: hub_card/gkc-mini: The text encoder knows none of these words" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
    assert main(command) == 0
    error = capsys.readouterr().err
    assert "warning: The recipe custom cannot start from" in error and "init_from=CHECKPOINT" in error
    assert train_main(["custom", f"dataset={tmp_path / 'data'}", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "'hammer', 'spanner'" in error and "Name another checkpoint with model.init_from=" in error
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_parts_of_an_instance_class_are_objects(tmp_path):
    convert(write_folder(tmp_path / "mine", pictures=2), tmp_path / "data", instances=["disc"])
    for row in all_rows(tmp_path / "data").values():
        assert [segment["category_id"] for segment in row["segments"]] == [0, 1, 1, 2]
        assert np.array_equal(classes_of(row), PIXELS.astype(int) - 1)
    assert Vocabulary.from_file(tmp_path / "data" / "vocabulary.json").is_thing == [False, True, False]
    with pytest.raises(ValueError, match=r"names.json has no class \['cat'\]"):
        convert(tmp_path / "mine", tmp_path / "other", instances=["cat"])


COLORS = np.array([[0, 0, 0], [0, 128, 0], [255, 0, 0], [10, 20, 30]], dtype=np.uint8)
COLORED = Image.fromarray(COLORS[PIXELS])
PALETTE = Image.fromarray(PIXELS).convert("P")
PALETTE.putpalette(COLORS.tobytes())


@pytest.mark.parametrize(
    ("names", "mask"),
    [
        (NAMES, PALETTE),
        (NAMES, Image.fromarray(PIXELS.astype(np.uint16))),
        ([None, "grass", ["disc", "round"], "square"], Image.fromarray(PIXELS)),
        (
            {"0,128,0": "grass", "#FF0000": ["disc", "round"], "(10, 20, 30)": "square"},
            Image.fromarray(COLORS[PIXELS]),
        ),
        ({"1": "grass", "2": "disc", "3": "square", "9": "disc"}, Image.fromarray(np.where(PIXELS == 2, 9, PIXELS))),
    ],
    ids=["palette", "16 bits", "list", "colors", "two values of one class"],
)
def test_palette_16_bit_and_color_masks_are_read(names, mask, tmp_path):
    folder = write_folder(tmp_path / "mine", names, dict.fromkeys(range(2), mask), pictures=2)
    assert convert(folder, tmp_path / "data")["problems"] == []
    assert all(np.array_equal(classes_of(row), PIXELS.astype(int) - 1) for row in all_rows(tmp_path / "data").values())


def test_folders_named_train_and_val_are_the_splits(tmp_path):
    folder = write_folder(tmp_path / "mine", pictures=5)
    for place in ("images", "masks"):
        for number in range(5):
            split = "val" if number == 3 else "train"
            (folder / place / split).mkdir(exist_ok=True)
            path = next((folder / place).glob(f"{number}.*"))
            path.rename(folder / place / split / path.name)
    convert(folder, tmp_path / "data")
    splits = load_from_disk(tmp_path / "data")
    assert splits["val"]["image_id"] == ["val/3"] and len(splits["train"]) == 4


def test_unusable_images_are_left_out_and_named(tmp_path, capsys):
    masks = {1: Image.fromarray(PIXELS[:20]), 2: Image.fromarray(np.where(PIXELS == 3, 77, PIXELS))}
    folder = write_folder(tmp_path / "mine", masks=masks, pictures=7)
    (folder / "images" / "3.jpg").write_bytes((folder / "images" / "3.jpg").read_bytes()[:100])
    (folder / "masks" / "4.png").unlink()
    (folder / "masks" / "5.png").write_bytes(b"no picture")
    assert main([str(folder), "--out", str(tmp_path / "data")]) == 1
    assert sorted(all_rows(tmp_path / "data")) == ["0", "6"]
    shown = capsys.readouterr().out
    problems = json.loads((tmp_path / "data" / "report.json").read_text())["problems"]
    assert len(problems) == 5 and all(problem in shown for problem in problems)
    for words in (
        ["images/1.jpg", "masks/1.png: The annotation is (20, 32) (height, width), its image (24, 32)"],
        ["images/2.png", "masks/2.png: The values [77] have no name in names.json"],
        ["images/3.jpg", "cannot be read as an image"],
        ["images/4.png: No mask"],
        ["images/5.jpg", "masks/5.png"],
    ):
        assert any(all(word in problem for word in words) for problem in problems), words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"1": "cat",\n "2" "dog"}', "names.json, line 2: invalid JSON"),
        ('{"1": "cat", "red": "dog"}', "all numbers or all colors"),
        ('{"#12345": "cat"}', 'names.json, key "#12345"'),
        ('{"1": "cat", "2": " "}', "names.json: .*empty"),
        ("{}", "give an object"),
    ],
)
def test_invalid_names_raise(text, message, tmp_path):
    folder = write_folder(tmp_path / "mine", pictures=1)
    (folder / "names.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_interrupted_run_leaves_no_dataset(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "mine")

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("train.data.from_folder.vocabulary_json", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    (tmp_path / ".data-ab12cd_9.part").mkdir()  # of a run that was killed by force
    (tmp_path / ".others-ab12cd_9.part").mkdir()
    convert(folder, tmp_path / "data")
    assert len(all_rows(tmp_path / "data")) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [".others-ab12cd_9.part", "data", "mine"]
    assert main([str(folder), "--out", str(tmp_path / "data")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([str(tmp_path), "--out", str(tmp_path / "new")]) == 2
    assert "neither the folders images and masks" in capsys.readouterr().err


def test_help_shows_the_layouts(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "DIR/images/a.jpg" in shown and "instances_train.json" in shown and '"#ff0000"' in shown


CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 3, "name": "grass", "synonyms": ["lawn"]}]


def coco_folder(folder: Path, annotations: list[dict], **changes) -> Path:
    write_folder(folder, pictures=1)
    shutil.rmtree(folder / "masks")
    (folder / "names.json").unlink()
    (folder / "annotations").mkdir()
    content = {
        "images": [{"id": 5, "file_name": "0.png", "height": 24, "width": 32}],
        "annotations": annotations,
        "categories": CATEGORIES,
    }
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content | changes))
    return folder


def box(left: int, top: int, right: int, bottom: int) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def test_coco_polygons_and_run_lengths(tmp_path):
    run_length = {"size": [24, 32], "counts": [24 * 20, 24 * 2, 24 * 10]}
    annotations = [
        {"id": 1, "image_id": 5, "category_id": 7, "segmentation": [box(4, 4, 10, 12)], "iscrowd": 0},
        {"id": 2, "image_id": 5, "category_id": 3, "segmentation": [box(0, 2, 16, 20)], "iscrowd": 0},
        {"id": 3, "image_id": 5, "category_id": 7, "segmentation": run_length, "iscrowd": 1},
    ]
    convert(coco_folder(tmp_path / "mine", annotations), tmp_path / "data")
    row = all_rows(tmp_path / "data")["0"]
    expected = np.full((24, 32), -1)
    expected[2:20, :16], expected[4:12, 4:10], expected[:, 20:22] = 0, 1, 1
    assert np.array_equal(classes_of(row), expected)
    crowds = [(segment["category_id"], segment["iscrowd"]) for segment in row["segments"]]
    assert crowds == [(0, False), (1, False), (1, True)]  # by falling size: 288, 48 and 48 pixels
    assert Vocabulary.from_file(tmp_path / "data" / "vocabulary.json").names == [["grass", "lawn"], ["disc"]]


def test_coco_panoptic(tmp_path):
    infos = [{"id": 1, "category_id": 3, "iscrowd": 0}, {"id": 70_002, "category_id": 7, "iscrowd": 0}]
    annotation = {"id": 1, "image_id": 5, "file_name": "0.png", "segments_info": infos}
    folder = coco_folder(tmp_path / "mine", [])
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    categories = [{**c, "isthing": c["name"] == "disc"} for c in CATEGORIES]
    text = json.dumps(content | {"annotations": [annotation], "categories": categories})
    (folder / "annotations" / "panoptic_val.json").write_text(text)
    (folder / "annotations" / "panoptic_val").mkdir()
    ids = np.where(PIXELS == 2, 70_002, (PIXELS == 1).astype(int))
    Image.fromarray(encode_ids(ids)).save(folder / "annotations" / "panoptic_val" / "0.png")
    convert(folder, tmp_path / "data")
    rows = load_from_disk(tmp_path / "data")["val"]
    assert np.array_equal(read_row(rows[0])[1], ids)
    assert [segment["category_id"] for segment in rows[0]["segments"]] == [0, 1]
    assert Vocabulary.from_file(tmp_path / "data" / "vocabulary.json").is_thing == [False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category_id": 9}, "instances_train.json, annotation 1: Unknown category 9"),
        ({"segmentation": {"size": [9, 9], "counts": [81]}}, r"annotation 1: .*encoding is \(9, 9\)"),
        ({"segmentation": {"size": [9, 9]}}, "annotation 1: The segmentation cannot be read"),
    ],
)
def test_invalid_annotations_are_named(changes, message, tmp_path):
    annotation = {"id": 1, "image_id": 5, "category_id": 7, "segmentation": [box(4, 4, 10, 12)], "iscrowd": 0}
    with pytest.raises(ValueError, match=message):
        convert(coco_folder(tmp_path / "mine", [annotation | changes]), tmp_path / "data")


def test_a_missing_image_is_named(tmp_path):
    folder = coco_folder(tmp_path / "mine", [], images=[{"id": 5, "file_name": "gone.jpg"}])
    with pytest.raises(ValueError, match=r"instances_train.json, image 5: The file gone.jpg does not exist"):
        convert(folder, tmp_path / "data")


def test_a_new_user_trains_on_a_folder_and_segments(tmp_path, capsys, monkeypatch):
    """Pictures of the mini-world with two of its words, drawn into masks as a painting program would."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "masks").mkdir()
    for index in range(6):
        scene = draw_scene((5, 77), index, 96)
        concepts = [region["concept"] for region in scene.regions]
        value = np.array([1 + (concept in SHAPES) for concept in concepts] + [0], dtype=np.uint8)
        Image.fromarray(scene.image).save(tmp_path / "mine" / "images" / f"photo {index}.png")
        Image.fromarray(value[scene.region_index]).save(tmp_path / "mine" / "masks" / f"photo {index}.png")
    (tmp_path / "mine" / "names.json").write_text('{"1": "grass", "2": ["circle", "disc"]}')
    data, out = str(tmp_path / "data"), str(tmp_path / "model")
    assert main([str(tmp_path / "mine"), "--out", data]) == 0
    assert "5 train, 1 val" in capsys.readouterr().out
    changes = ["steps=2", "batch_size=2", "num_workers=0", "log_every=1", "save_every=2", "evaluate_every=2"]
    assert train_main(["custom", f"dataset={data}", *changes, "--out", out]) == 0
    photo, shown = tmp_path / "mine" / "images" / "photo 0.png", tmp_path / "segmented"
    assert gkc_main(["segment", str(photo), "--model", out, "--out", str(shown)]) == 0
    assert any(path.stat().st_size for path in shown.rglob("*") if path.is_file())
