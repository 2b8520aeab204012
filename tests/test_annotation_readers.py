"""Readers of other people's annotations: COCO, labelme, YOLO and mask folders, and what each refuses or reports."""

import base64
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk
from PIL import Image, ImageOps

from train.data import encode_ids, read_row
from train.data.from_folder import convert, find_source, main
from train.data.prepare import main as prepare
from train.data.readers.list_file import read_list
from train.data.sources import Source, read_annotated, split_named, split_of_folders

HEIGHT, WIDTH = 20, 30
PIXELS = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
CATEGORIES = [{"id": 1, "name": "disc"}, {"id": 2, "name": "grass"}]


def box(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def save_picture(path: Path, orientation: int = 1, pixels: np.ndarray = PIXELS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif)


def annotation(number: int = 1, **changes) -> dict:
    return {"id": number, "image_id": 7, "category_id": 1, "segmentation": [box(2, 3, 8, 9)], "iscrowd": 0} | changes


def image(number: int = 7, name: str = "a.png", **changes) -> dict:
    return {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH} | changes


def write_coco(path: Path, annotations: list | None = None, images: list | None = None, categories=CATEGORIES) -> Path:
    """Write a COCO file without its images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images or [image()], "annotations": [annotation()] if annotations is None else annotations}
    path.write_text(json.dumps({**content, "categories": categories}))
    return path


def coco_folder(folder: Path, annotations: list | None = None, images: list | None = None, **options) -> Path:
    save_picture(folder / "images" / "a.png")
    write_coco(folder / "annotations" / "instances_train.json", annotations, images, **options)
    return folder


def classes_of(source: Source, name: str = "a") -> tuple[np.ndarray, list[str]]:
    """Class (H, W) of each pixel of a picture, -1 for void, and what was left out of its annotation."""
    (picture,) = (picture for picture in source.images if picture.image_id == name)
    _, ids, segments = read_annotated(picture)
    classes = np.full(ids.shape, -1)
    for segment in segments:
        classes[ids == segment["id"]] = segment["category_id"]
    return classes, picture.notes


def rectangle(left: int, top: int, right: int, bottom: int, category: int = 0) -> np.ndarray:
    classes = np.full((HEIGHT, WIDTH), -1)
    classes[top:bottom, left:right] = category
    return classes


class TestSizes:
    """A COCO picture has the size that was annotated, as it is stored or upright."""

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_polygons_lie_where_they_were_drawn(self, tmp_path, orientation):
        """Drawn on the upright picture, or on the stored one where the JSON says that size."""
        for name, declared_upright in (("upright", True), ("stored", False)):
            folder, sideways = tmp_path / name, orientation > 4
            marked = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
            picture_shape = (WIDTH, HEIGHT) if sideways and declared_upright else (HEIGHT, WIDTH)
            if declared_upright or not sideways:  # equal sizes: the upright picture is what tools show
                drawn = np.zeros((*picture_shape, 3), dtype=np.uint8)
                drawn[3:9, 2:8] = 255
                stored = Image.fromarray(drawn)
                stored = stored.transpose(INVERSE[orientation]) if orientation > 1 else stored
                marked = np.asarray(stored)
            else:
                marked[3:9, 2:8] = 255
            save_picture(folder / "images" / "a.png", orientation, marked)
            height, width = picture_shape
            images = [image(height=height, width=width)]
            write_coco(folder / "annotations" / "instances_train.json", images=images)
            classes, _ = classes_of(find_source(folder))
            with Image.open(folder / "images" / "a.png") as stored:
                shown = np.asarray(ImageOps.exif_transpose(stored))[..., 0] > 0
            assert np.array_equal(classes == 0, shown) and shown.sum() == 36

    def test_image_of_another_size_is_left_out_and_named(self, tmp_path, capsys):
        folder = coco_folder(tmp_path / "mine", images=[image(), image(8, "b.png", height=40, width=60)])
        save_picture(folder / "images" / "b.png")
        assert main([str(folder), "--out", str(tmp_path / "data")]) == 1
        shown = capsys.readouterr().out
        assert "b.png: The annotation is (40, 60) (height, width), its image (20, 30): the image was resized" in shown
        assert "1 train" in shown and "Read as COCO JSON, 1 file: annotations/instances_train.json" in shown

    def test_missing_image_size_is_noted(self, tmp_path):
        source = find_source(coco_folder(tmp_path, images=[{"id": 7, "file_name": "a.png"}]))
        assert len(source.images) == 1 and "1 images have no width and height" in source.notes[0]

    @pytest.mark.parametrize("height", ["20", 20.5, math.nan, -20, True, None])
    def test_invalid_image_size_is_rejected(self, tmp_path, height):
        with pytest.raises(ValueError, match="image 7: Height and width must be positive integers"):
            find_source(coco_folder(tmp_path, images=[image(height=height)]))

    def test_masks_are_rotated_like_their_images(self, tmp_path):
        save_picture(tmp_path / "images" / "a.png", 6)
        mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        mask[3:9, 2:8] = 1
        (tmp_path / "masks").mkdir()
        (tmp_path / "names.json").write_text('{"1": "disc"}')
        for stored in (Image.fromarray(mask), Image.fromarray(np.rot90(mask, -1))):
            stored.save(tmp_path / "masks" / "a.png")
            assert np.array_equal(classes_of(find_source(tmp_path))[0] == 0, np.rot90(mask, -1) > 0)


INVERSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class TestSplits:
    """Pictures of a test split are never trained on."""

    @pytest.mark.parametrize(
        ("name", "split"),
        [
            ("instances_train2017", "train"),
            ("panoptic_val", "val"),
            ("test", "test"),
            ("image_info_test-dev2017", "test"),
            ("dev", "val"),
            ("valid", "val"),
            ("trainval", None),
            ("train_val", None),
            ("latest", None),
        ],
    )
    def test_words_of_names(self, name, split):
        assert split_named(name) == split

    def test_split_is_read_from_folders_not_from_file_names(self):
        assert split_of_folders("test/train_7") == "test"
        assert split_of_folders("train_station") is None

    @pytest.mark.parametrize("layout", ["masks", "coco folder", "coco file", "list"])
    def test_test_images_form_their_own_split(self, tmp_path, layout, capsys):
        folder, names = tmp_path / "mine", ["train/a", "val/b", "test/c"]
        for name in names:
            save_picture(folder / "images" / f"{name}.png")
        if layout in ("masks", "list"):
            for name in names:
                (folder / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.ones((HEIGHT, WIDTH), dtype=np.uint8)).save(folder / "masks" / f"{name}.png")
            (folder / "names.json").write_text('{"1": "disc"}')
            rows = [f"images/{name}.png,masks/{name}.png,{name.split('/')[0]}" for name in names]
            (folder / "list.csv").write_text("\n".join(["image,mask,split", *rows]))
        elif layout == "coco folder":
            images = [image(number, f"images/{name}.png") for number, name in enumerate(names)]
            write_coco(folder / "all.json", [annotation(n, image_id=n) for n in range(3)], images)
        else:
            for name in names:
                split, bare = name.split("/")
                write_coco(folder / f"{split}.json", images=[image(name=f"{bare}.png")])
        source = read_list(folder) if layout == "list" else find_source(folder)
        assert [picture.split for picture in source.images] in (["train", "val", "test"], ["test", "train", "val"])
        if layout != "list":
            convert(folder, tmp_path / "data")
            assert {split: len(rows) for split, rows in load_from_disk(tmp_path / "data").items()} == dict.fromkeys(
                ("train", "val", "test"), 1
            )
        if layout == "coco folder":
            assert prepare(["folder", "--source", str(folder), "--out", str(tmp_path / "prepared")]) == 0
            shown = capsys.readouterr()
            assert "folder test: finished, 1 images" in shown.out
            assert "test: read as COCO JSON, 1 file: all.json" in shown.err


class TestPlaces:
    """Where the pictures of a COCO file are looked for."""

    def test_folder_of_the_split_takes_precedence(self, tmp_path):
        save_picture(tmp_path / "val" / "0001.jpg")
        save_picture(tmp_path / "thumbnails" / "0001.jpg", pixels=PIXELS[::4, ::4])
        write_coco(tmp_path / "val.json", images=[image(name="0001.jpg")])
        assert find_source(tmp_path).images[0].path == tmp_path / "val" / "0001.jpg"

    def test_image_in_two_folders_is_rejected_as_ambiguous(self, tmp_path):
        for place in ("one", "two"):
            save_picture(tmp_path / place / "a.png")
        write_coco(tmp_path / "result.json")
        with pytest.raises(ValueError, match=r"image 7: The image a.png is ambiguous: .*one/a.png and .*two/a.png"):
            find_source(tmp_path)

    def test_images_of_another_split_are_not_used(self, tmp_path):
        save_picture(tmp_path / "train" / "a.png")
        write_coco(tmp_path / "val.json")
        with pytest.raises(ValueError, match=r"The file a\.png"):
            find_source(tmp_path)

    def test_equal_image_names_in_two_splits_get_different_ids(self, tmp_path):
        for split in ("train", "val"):
            save_picture(tmp_path / split / "a.png")
            write_coco(tmp_path / f"{split}.json")
        source = find_source(tmp_path)
        assert {p.image_id: p.path.parent.name for p in source.images} == {"train/a": "train", "val/a": "val"}

    @pytest.mark.parametrize(
        "name", ["images\\a.png", "..\\data\\images\\a.png", "C:\\me\\a.png", "/home/me/images/a.png"]
    )
    def test_paths_of_other_machines(self, tmp_path, name):
        source = find_source(coco_folder(tmp_path, images=[image(name=name)]))
        assert source.images[0].path == tmp_path / "images" / "a.png"

    def test_nothing_outside_the_folder_is_read(self, tmp_path):
        save_picture(tmp_path / "b.png")
        for name in ("../b.png", str(tmp_path / "b.png")):
            with pytest.raises(ValueError, match=r"The file .* does not exist"):
                find_source(coco_folder(tmp_path / "mine", images=[image(name=name)]))


class TestTypes:
    """Values of a wrong type are read as what they say, or refused by name."""

    def test_flags_and_ids_may_be_text(self, tmp_path):
        categories = [{"id": "1", "name": "disc", "isthing": "0"}, {"id": 2, "name": "grass", "isthing": 1}]
        entries = [annotation(image_id="7", iscrowd="0"), annotation(2, category_id="2", iscrowd=True)]
        entries[1]["segmentation"] = [box(12, 3, 18, 9)]
        source = find_source(coco_folder(tmp_path, entries, categories=categories))
        assert source.vocabulary.is_thing == [False, True] and not source.problems
        _, _, segments = read_annotated(source.images[0])
        assert [(s["category_id"], s["iscrowd"]) for s in segments] == [(0, False), (1, True)]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"iscrowd": "no"}, "annotation 1: iscrowd must be 0 or 1, got 'no'"),
            ({"iscrowd": 2}, "annotation 1: iscrowd must be 0 or 1"),
            ({"category_id": None}, "annotation 1: category_id must be a whole number or text, got nothing"),
            ({"category_id": [1]}, "annotation 1: category_id must be a whole number"),
        ],
    )
    def test_image_with_an_invalid_annotation_is_left_out(self, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            read_annotated(find_source(coco_folder(tmp_path, [annotation(**changes)])).images[0])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"images": 5}, "`images` must be a list, got 5"),
            ({"images": [5]}, "images: Entry 1 must be an object, got 5"),
            ({"images": [{"file_name": "a.png"}]}, "images: entry 1, id must be a whole number or text, got nothing"),
            ({"images": [image(), image()]}, r"images: The ids \['7'\] are given twice"),
            ({"images": [{"id": 7}]}, "image 7: The file_name must be text, got nothing"),
            ({"categories": [{"id": 1}]}, "category 1: The name must be text, got nothing"),
            ({"categories": [{"id": 1, "name": "a", "isthing": "yes"}]}, "category 1: isthing must be 0 or 1"),
            ({"categories": [{"id": 1, "name": "a", "synonyms": "b"}]}, "category 1: The synonyms must be a list"),
            ({"categories": [{"id": 1, "name": "a"}, {"id": "1", "name": "b"}]}, r"The ids \['1'\] are given twice"),
        ],
    )
    def test_invalid_parts_of_a_coco_file_are_named(self, tmp_path, changes, message):
        path = coco_folder(tmp_path) / "annotations" / "instances_train.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        with pytest.raises(ValueError, match=f"instances_train.json.*{message}"):
            find_source(tmp_path)

    def test_annotations_of_unlisted_images_are_reported(self, tmp_path, capsys):
        entries = [annotation(), annotation(2, image_id=99), annotation(3, image_id=None)]
        del entries[2]["image_id"]
        folder = coco_folder(tmp_path / "mine", entries)
        assert main([str(folder), "--out", str(tmp_path / "data")]) == 1
        shown = capsys.readouterr().out
        assert "1 annotations are of images that it does not list, left out: image_id 99" in shown
        assert "annotation 3: image_id must be a whole number or text, got nothing; left out" in shown

    def test_different_categories_are_listed(self, tmp_path):
        folder = coco_folder(tmp_path)
        others = [CATEGORIES[0], {"id": 2, "name": "lawn"}]
        write_coco(folder / "annotations" / "instances_val.json", categories=others)
        with pytest.raises(ValueError, match=r"different categories \(2: grass, 2: lawn\)"):
            find_source(folder)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"\xff\xfe{}", "instances_train.json: it is not UTF-8"),
            (b"[" * 100_000, "instances_train.json: it cannot be read as JSON: it is nested too deeply"),
            (b'{"images": ' + b"1" * 5000 + b"}", "instances_train.json: it cannot be read as JSON"),
        ],
    )
    def test_invalid_json_files_are_named(self, tmp_path, content, message):
        (coco_folder(tmp_path) / "annotations" / "instances_train.json").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            find_source(tmp_path)


class TestOutlines:
    """Segmentations that outline nothing are left out by name, those that cannot be meant refuse their picture."""

    @pytest.mark.parametrize(
        ("segmentation", "note"),
        [
            (None, "The annotation has no segmentation"),
            ([], "The annotation has no segmentation"),
            ([[4, 5, 4, 9, 4, 7]], "it covers no pixel"),
            ([box(40, 3, 44, 9)], "it covers no pixel"),
            ([box(3, 4, 6, 7)], "Smaller objects cover it wholly"),
            ([[4, 5]], "None of its polygons has three points"),
            ([[4, 5, 6, 7]], "None of its polygons has three points"),
            ([[]], "None of its polygons has three points"),
            ([[4, 5], [8, 5], [8, 8], [4, 8]], "write a polygon as one list [x1, y1, x2, y2, ...]"),
            ([[*box(12, 3, 18, 9), 5]], "has 9 numbers, an odd one"),
            ([box(0.1, 0.2, 0.5, 1)], "lie in 0..1: they must be pixels"),
            ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, "it covers no pixel"),
        ],
    )
    def test_objects_without_area_are_left_out_and_named(self, tmp_path, segmentation, note):
        covering = annotation(3, segmentation=[box(3, 4, 6, 7)], category_id=2)
        folder = coco_folder(tmp_path, [annotation(), annotation(2, segmentation=segmentation), covering])
        classes, notes = classes_of(find_source(folder))
        expected = rectangle(2, 3, 8, 9)
        expected[4:7, 3:6] = 1
        assert np.array_equal(classes, expected)
        assert len(notes) >= 1 and "annotation 2: " in notes[-1] and note in "; ".join(notes)

    def test_ring_with_two_points_is_left_out_and_named(self, tmp_path):
        folder = coco_folder(tmp_path, [annotation(segmentation=[box(2, 3, 8, 9), [1, 1, 5, 5]])])
        classes, notes = classes_of(find_source(folder))
        assert np.array_equal(classes, rectangle(2, 3, 8, 9))
        assert "annotation 1: ring 2 of its polygons has 2 points and encloses no area, left out" in notes[0]

    def test_left_out_objects_are_shown_and_counted(self, tmp_path, capsys):
        folder = coco_folder(tmp_path / "mine", [annotation(), annotation(2, segmentation=None)])
        assert main([str(folder), "--out", str(tmp_path / "data")]) == 1
        shown = capsys.readouterr().out
        assert "1 train" in shown and "Skipped annotations of images that are kept, 1 in total" in shown
        assert prepare(["folder", "--source", str(folder), "--out", str(tmp_path / "prepared")]) == 0
        assert "annotation 2: The annotation has no segmentation" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "segmentation",
        [
            {"size": [HEIGHT, WIDTH], "counts": [10]},
            {"size": [HEIGHT, WIDTH], "counts": [1.5, 598.5]},
            {"size": [2**20, 2**20], "counts": [2**40]},
            {"size": [WIDTH, HEIGHT], "counts": [600]},
            {"size": [HEIGHT, WIDTH], "counts": "0"},
            [box(2, 3, math.nan, 9)],
            [box(2, 3, math.inf, 9)],
            [box(2, 3, 1e9, 9)],
            [box(2, 3, 10**400, 9)],
            [box(2, 3, "8", 9)],
            [box(2, 3, True, 9)],
            [[[2, 3], [4, 5], [6, 7]]],
            "polygon",
            5,
        ],
        ids=str,
    )
    def test_segmentation_that_pycocotools_cannot_decode_leaves_only_its_image_out(self, tmp_path, segmentation):
        images = [image(), image(8, "b.png")]
        folder = coco_folder(tmp_path, [annotation(segmentation=segmentation), annotation(2, image_id=8)], images)
        save_picture(folder / "images" / "b.png")
        source = find_source(folder)
        with pytest.raises(ValueError, match="annotation 1: The segmentation cannot be read"):
            read_annotated(source.images[0])
        assert np.array_equal(classes_of(source, "b")[0], rectangle(2, 3, 8, 9))


def panoptic_folder(folder: Path, infos: list, ids: np.ndarray) -> Path:
    save_picture(folder / "a.png")
    entry = {"id": 1, "image_id": 7, "file_name": "a.png", "segments_info": infos}
    path = write_coco(folder / "panoptic_train.json", [entry])
    path.with_suffix("").mkdir(exist_ok=True)
    Image.fromarray(encode_ids(ids)).save(path.with_suffix("") / "a.png")
    return folder


class TestPanoptic:
    @pytest.mark.parametrize(
        ("infos", "message"),
        [
            ([{"id": 1, "category_id": 1}, {"id": 1, "category_id": 2}], r"The ids of its segments repeat: \[1, 1\]"),
            ([{"id": 1, "category_id": 1}, {"id": 0, "category_id": 2}], "whole numbers from 1 to 2"),
            ([{"id": "1", "category_id": 1}], "whole numbers from 1 to 2"),
            ([{"category_id": 1}], "whole numbers from 1 to 2"),
            ([{"id": 2, "category_id": 1}], r"The ids \[1\] are not in the segments_info"),
            ([5], "Each of its segments_info must be an object"),
        ],
    )
    def test_ids_that_prepare_rejects_are_rejected_by_every_writer(self, tmp_path, infos, message):
        folder = panoptic_folder(tmp_path / "mine", infos, np.ones((HEIGHT, WIDTH), dtype=int))
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / "data")

    def test_segment_without_pixels_is_noted(self, tmp_path):
        infos = [{"id": 1, "category_id": 1}, {"id": 9, "category_id": 2}]
        classes, notes = classes_of(find_source(panoptic_folder(tmp_path, infos, np.ones((HEIGHT, WIDTH), dtype=int))))
        assert (classes == 0).all() and "Segment 9 has no pixel" in notes[0]

    def test_two_panoptic_annotations_of_one_image_are_rejected(self, tmp_path):
        folder = panoptic_folder(tmp_path, [{"id": 1, "category_id": 1}], np.ones((HEIGHT, WIDTH), dtype=int))
        content = json.loads((folder / "panoptic_train.json").read_text())
        content["annotations"] *= 2
        (folder / "panoptic_train.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="2 annotations are of this image"):
            read_annotated(find_source(folder).images[0])


class TestReports:
    """Faults that users of other projects met."""

    def test_masks_of_0_and_255_without_a_name_for_255(self, tmp_path):
        save_picture(tmp_path / "images" / "a.png")
        save_mask(tmp_path / "masks" / "a.png", 255)
        (tmp_path / "names.json").write_text('{"1": "road"}')
        with pytest.raises(ValueError, match=r"No image has a segment of any class.*add a name for 255"):
            convert(tmp_path, tmp_path / "data")
        assert not (tmp_path / "data").exists()

    def test_dataset_of_crowds_only_is_reported(self, tmp_path, capsys):
        main([str(coco_folder(tmp_path / "mine", [annotation(iscrowd=1)])), "--out", str(tmp_path / "data")])
        assert "1 of 1 segments are crowds (iscrowd 1), which training ignores" in capsys.readouterr().out

    def test_jpeg_masks_are_rejected(self, tmp_path):
        save_picture(tmp_path / "images" / "a.png")
        save_mask(tmp_path / "masks" / "a.jpg")
        (tmp_path / "names.json").write_text('["nothing", "disc"]')
        with pytest.raises(ValueError, match=r"a\.jpg: A mask is stored as JPEG, which changes its values"):
            read_annotated(find_source(tmp_path).images[0])

    def test_run_lengths_of_the_box_only_are_rejected(self, tmp_path):
        """Run lengths of the box alone, the form in which CVAT stores masks, are refused."""
        code = {"size": [HEIGHT, WIDTH], "counts": [0, 36]}
        with pytest.raises(ValueError, match=r"annotation 1: .*cover 36 pixels"):
            read_annotated(find_source(coco_folder(tmp_path, [annotation(segmentation=code)])).images[0])

    def test_annotation_ids_need_not_be_unique_over_images(self, tmp_path):
        folder = coco_folder(tmp_path, [annotation(0), annotation(0, image_id=8)], [image(), image(8, "b.png")])
        save_picture(folder / "images" / "b.png")
        source = find_source(folder)
        for name in ("a", "b"):
            assert np.array_equal(classes_of(source, name)[0], rectangle(2, 3, 8, 9))


class TestLists:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("5", "row 1: The row must be an object, got 5"),
            ('{"image": 5, "mask": "b.png"}', "row 1: image must be text, got '5'"),
            ('{"image": "a.png", "mask": "b.png", "frame": "x"}', "row 1: The frame must be a whole number"),
            ('{"image": "a.png", "mask": "b.png", "frame": -1}', "row 1: The frame must be a whole number"),
            ('{"image": "a.png", "mask": "b.png", "captions": [5]}', "row 1: The captions must be a list of texts"),
            ('{"image": "a.png", "mask": "b.png", "split": ["train"]}', "row 1: split must be text"),
        ],
    )
    def test_rows_of_wrong_types_are_named(self, tmp_path, row, message):
        (tmp_path / "list.jsonl").write_text(row)
        (tmp_path / "names.json").write_text('["nothing", "disc"]')
        with pytest.raises(ValueError, match=f"list.jsonl, {message}"):
            read_list(tmp_path)


class TestMaskNames:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"1": 5}', r'names.json, key "1": give a name, a list of names, or null; got 5'),
            ('{"1": ["cat", 5]}', r'key "1": give a name'),
            ('{"1": {}}', r'key "1": give a name'),
            ('{"1": []}', r'key "1": give a name'),
            ('{"1": "cat", "1": "dog"}', r"names.json.*\['1'\] are given twice"),
            ('{"1": "cat", "01": "dog"}', r'key "01": Another key names the same pixels'),
            ("5", "give an object"),
        ],
    )
    def test_names_of_wrong_types_are_rejected(self, tmp_path, text, message):
        (tmp_path / "images").mkdir()
        (tmp_path / "masks").mkdir()
        (tmp_path / "names.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            find_source(tmp_path)

    @pytest.mark.parametrize(
        ("names", "mask", "message"),
        [
            ('{"#ff0000": "cat"}', np.full((HEIGHT, WIDTH, 3), [128, 0, 64]), r"The values \[#800040\] have no name"),
            ('{"1": "cat"}', np.full((HEIGHT, WIDTH, 3), 1), "names numbers, but the mask is a color image"),
            ('{"#ff0000": "cat"}', np.full((HEIGHT, WIDTH), 127), r"The values \[#7f7f7f\] have no name"),
        ],
    )
    def test_masks_with_unnamed_values_are_rejected(self, tmp_path, names, mask, message):
        save_picture(tmp_path / "images" / "a.png")
        (tmp_path / "masks").mkdir()
        (tmp_path / "names.json").write_text(names)
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "masks" / "a.png")
        with pytest.raises(ValueError, match=message):
            read_annotated(find_source(tmp_path).images[0])


def roboflow_coco(folder: Path) -> str:
    parent = {"id": 0, "name": "tools", "supercategory": "none"}
    categories = [parent, *({**entry, "supercategory": "tools"} for entry in CATEGORIES)]
    for split in ("train", "valid", "test"):
        save_picture(folder / split / "a.png")
        write_coco(folder / split / "_annotations.coco.json", categories=categories)
    return "COCO JSON, 3 files"


def kaggle_masks(folder: Path) -> str:
    for split in ("train", "valid", "test"):
        save_picture(folder / split / "images" / "a.png")
        save_mask(folder / split / "masks" / "a_mask.png")
    (folder / "names.json").write_text('["nothing", "disc", "grass"]')
    return "images and masks"


def mmsegmentation(folder: Path) -> str:
    for split in ("train", "valid", "test"):
        save_picture(folder / "img_dir" / split / "a.png")
        save_mask(folder / "ann_dir" / split / "a.png")
    (folder / "names.json").write_text('{"0": null, "1": "disc", "2": "grass"}')
    return "images and masks"


def save_mask(path: Path, value: int = 1) -> None:
    path.parent.mkdir(parents=True)
    Image.fromarray(((rectangle(2, 3, 8, 9) + 1) * value).astype(np.uint8)).save(path)


def label_studio(folder: Path) -> str:
    for split in ("train", "valid", "test"):
        save_picture(folder / "images" / split / "a.png")
    images = [image(number, f"images\\{split}\\a.png") for number, split in enumerate(("train", "valid", "test"))]
    write_coco(folder / "result.json", [annotation(n, image_id=n) for n in range(3)], images)
    return "COCO JSON, 1 file"


def labelme(folder: Path) -> str:
    for split in ("train", "valid", "test"):
        save_picture(folder / split / "a.png")
        shapes = [
            {"label": "disc", "points": [[2, 3], [8, 3], [8, 9], [2, 9]], "shape_type": "polygon", "group_id": None},
            {"label": "grass", "points": [[0, 0], [0, 1]], "shape_type": "line"},
            {"label": "grass", "points": [[5, 5]], "shape_type": "point"},
        ]
        content = {"shapes": shapes, "imagePath": "a.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
        (folder / split / "a.json").write_text(json.dumps({"version": "5.5.0", "imageData": None, **content}))
    return "JSON of labelme, 3 files"


def yolo(folder: Path) -> str:
    corners = " ".join(str(v / side) for v, side in zip(box(2, 3, 8, 9), (WIDTH, HEIGHT) * 4, strict=True))
    for split in ("train", "valid", "test"):
        save_picture(folder / split / "images" / "a.png")
        (folder / split / "labels").mkdir()
        (folder / split / "labels" / "a.txt").write_text(f"0 {corners}\n1 0.5 0.5 0.2 0.2\n")
    (folder / "data.yaml").write_text("train: ../train/images\nnc: 2\nnames: ['disc', 'grass']\n")
    return "YOLO segmentation, 3 text files"


def yolo_of_ultralytics(folder: Path) -> str:
    yolo(folder)
    for split in ("train", "valid", "test"):
        for kind in ("images", "labels"):
            (folder / kind).mkdir(exist_ok=True)
            (folder / split / kind).rename(folder / kind / split)
        (folder / split).rmdir()
    (folder / "data.yaml").write_text("path: mine\ntrain: images/train\nnames:\n  0: disc\n  1: grass\n")
    return "YOLO segmentation, 3 text files"


def yolo_of_label_studio(folder: Path) -> str:
    yolo(folder)
    (folder / "data.yaml").unlink()
    (folder / "classes.txt").write_text("disc\ngrass\n")
    return "YOLO segmentation, 3 text files"


LAYOUTS = (
    roboflow_coco,
    kaggle_masks,
    mmsegmentation,
    label_studio,
    labelme,
    yolo,
    yolo_of_ultralytics,
    yolo_of_label_studio,
)


class TestLayouts:
    @pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
    def test_common_layouts_are_detected_and_read(self, tmp_path, write, capsys):
        layout = write(tmp_path / "mine")
        main([str(tmp_path / "mine"), "--out", str(tmp_path / "data")])
        assert f"Read as {layout}" in capsys.readouterr().out
        rows = load_from_disk(tmp_path / "data")
        classes = json.loads((tmp_path / "data" / "vocabulary.json").read_text())["classes"]
        assert [entry["name"] for entry in classes][-2:] == ["disc", "grass"]
        for split in ("train", "val", "test"):
            (row,) = rows[split]
            _, ids = read_row(row)
            (segment,) = [s for s in row["segments"] if classes[s["category_id"]]["name"] == "disc"]
            assert np.array_equal(ids == segment["id"], rectangle(2, 3, 8, 9) == 0)

    def test_labelme_shapes_are_drawn(self, tmp_path):
        labelme(tmp_path)
        png = io.BytesIO()
        Image.fromarray(np.eye(4, dtype=bool)).save(png, "PNG")
        shapes = [
            {"label": "disc", "points": [[8, 9], [2, 3]], "shape_type": "rectangle", "group_id": 4},
            {"label": "disc", "points": [[12, 3], [18, 9]], "shape_type": "rectangle", "group_id": 4},
            {"label": "disc", "points": [[20, 10], [24, 10]], "shape_type": "circle"},
            {
                "label": "grass",
                "points": [[1, 14], [4, 17]],
                "shape_type": "mask",
                "mask": base64.b64encode(png.getvalue()).decode(),
            },
            {"label": "__ignore__", "points": [[3, 4], [5, 6]], "shape_type": "rectangle"},
        ]
        path = tmp_path / "train" / "a.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"shapes": shapes}))
        source = find_source(tmp_path)
        classes, notes = classes_of(source, "train/a")
        y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
        distance = np.hypot(x - 20, y - 10)
        expected = rectangle(2, 3, 8, 9)
        expected[3:9, 12:18], expected[4:6, 3:5] = 0, -1
        expected[distance < 4] = 0
        expected[14:18, 1:5][np.eye(4, dtype=bool)] = 1
        certain = abs(distance - 4) > 0.8
        assert np.array_equal(classes[certain], expected[certain]) and not notes
        _, _, segments = read_annotated(source.images[1])
        assert sum(segment["category_id"] == 0 for segment in segments) == 2

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"points": [[2, 3], [math.nan, 3], [8, 9]]}, "a.json, shape 1: The segmentation cannot be read"),
            ({"points": [[2, 3], [1e9, 3], [8, 9]]}, "a.json, shape 1: The segmentation cannot be read"),
            ({"points": [2, 3, 4]}, "a.json, shape 1: The points must be a list of"),
            ({"points": None}, "a.json, shape 1: The points must be a list of"),
            ({"points": [[2, 3], [8, 9]], "shape_type": "mask", "mask": "x"}, "shape 1: The mask cannot be read"),
            ({"points": [[2, 3]], "shape_type": "circle"}, "shape 1: A circle needs two points"),
            (
                {"points": [[2, 3]], "shape_type": "point"},
                "None of its shapes can be used.*The shape .point. encloses no area",
            ),
        ],
    )
    def test_invalid_labelme_shapes_are_named(self, tmp_path, changes, message):
        labelme(tmp_path)
        path = tmp_path / "train" / "a.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"shapes": [content["shapes"][0] | changes]}))
        with pytest.raises(ValueError, match=message):
            classes_of(find_source(tmp_path), "train/a")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("5 0.1 0.1 0.2 0.1 0.2 0.2", "line 1: Unknown class '5'"),
            ("x 0.1 0.1 0.2 0.1 0.2 0.2", "line 1: Unknown class 'x'"),
            ("0 0.1 0.1 0.2 nan 0.2 0.2", "line 1: Corners are shares"),
            ("0 10 10 20 10 20 20", "line 1: Corners are shares"),
            ("0 0.1 0.1 0.2 a 0.2 0.2", "line 1: Corners must be numbers"),
            ("0 0.1 0.1 0.2 0.1 0.2 0.2 0.3", "None of its lines can be used.*has 7 numbers, an odd one"),
            ("0 0.5 0.5 0.1 0.1", "None of its lines can be used.*The line has a box only"),
        ],
    )
    def test_invalid_yolo_lines_are_named(self, tmp_path, line, message):
        yolo(tmp_path)
        (tmp_path / "train" / "labels" / "a.txt").write_text(line)
        with pytest.raises(ValueError, match=message):
            classes_of(find_source(tmp_path), "train/a")

    @pytest.mark.parametrize("names", ["[disc, no]", "[1, 2]", "{a: disc}", "disc", "[]"])
    def test_invalid_yolo_names_are_rejected(self, tmp_path, names):
        yolo(tmp_path)
        (tmp_path / "data.yaml").write_text(f"names: {names}")
        with pytest.raises(ValueError, match=r"data.yaml.*names"):
            find_source(tmp_path)

    def test_image_without_a_yolo_file_has_no_object_and_is_noted(self, tmp_path):
        yolo(tmp_path)
        (tmp_path / "train" / "labels" / "a.txt").unlink()
        source = find_source(tmp_path)
        assert "1 images have no text file" in source.notes[0] and (classes_of(source, "train/a")[0] == -1).all()

    def test_damaged_file_beside_valid_files_is_reported(self, tmp_path):
        labelme(tmp_path / "labelme")
        (tmp_path / "labelme" / "test" / "a.json").write_text("[]")
        assert "test/a.json: Not a labelme file" in find_source(tmp_path / "labelme").problems[0]
        path = coco_folder(tmp_path / "coco") / "annotations" / "instances_val.json"
        path.write_text(json.dumps({"images": [], "annotations": []}))
        assert find_source(tmp_path / "coco").notes == [f"{path} is not read: it lacks categories"]

    @pytest.mark.parametrize("text", ["[]", "null", '"x"', "{}", "3", '[{"image_id": 1}]', '{"images": []}'])
    def test_json_file_without_coco_parts_is_named_with_the_missing_parts(self, tmp_path, text):
        path = coco_folder(tmp_path / "coco") / "annotations" / "instances_val.json"
        path.write_text(text)
        (note,) = find_source(tmp_path / "coco").notes
        assert note.startswith(f"{path} is not read: it ") and note.count("categories") == 1
        (tmp_path / "alone").mkdir()
        (tmp_path / "alone" / "annotations.json").write_text(text)
        with pytest.raises(ValueError, match=r"\n  .*annotations\.json is not read: it (lacks|must be an object of) "):
            find_source(tmp_path / "alone")

    def test_unknown_layout_is_rejected(self, tmp_path):
        shutil.copytree(Path(__file__).parent / "golden", tmp_path / "mine", dirs_exist_ok=True)
        with pytest.raises(ValueError, match="neither the folders images and masks"):
            find_source(tmp_path / "mine")
        with pytest.raises(ValueError, match="is not a directory"):
            find_source(tmp_path / "none")
