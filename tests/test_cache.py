"""Tests of `python -m train.cache`: shards of several processes, interrupted runs and stale caches."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image
from transformers import CLIPTextModelWithProjection

from modeling_gkc.vocabulary import Vocabulary
from train.data import dataset_features, load, read_row
from train.storage import fingerprints, shards
from train.storage.checksums import SUM, write_checksummed_json
from train.storage.fingerprints import data_fingerprint
from train.storage.shards import StoreSettings, StoreWriter
from train.teacher import precompute
from train.teacher.clip_towers import CLIPTowers, load_clip_towers, load_vision_tower
from train.teacher.region_teacher import RegionTeacher, SynonymProbabilities, TeacherCache
from train.teacher.synonym_probabilities import BoxSynonyms

from .conftest import small_config
from .processes import as_rank, exit_code, free_port, start_child
from .training_toys import VOCABULARY, toy_dataset, toy_row, toy_tokenizer, toy_vision_model
from .wordnet_miniature import write_wordnet

IMAGES, PER_SHARD = 7, 3  # so there are 3 shards; with manifest, index and manifest again, 6 files are written


def save_clip(folder: Path, seed: int = 0) -> Path:
    """Write a CLIP as `gkc convert clip-resnet --text` does, with its tokenizer."""
    toy_vision_model(seed).save_pretrained(folder)
    torch.manual_seed(seed + 100)
    CLIPTextModelWithProjection(small_config().text_config).save_pretrained(folder / "text")
    toy_tokenizer().save_pretrained(folder / "text")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def data(tmp_path) -> Path:
    toy_dataset(IMAGES).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


def run(*arguments: object, command: str = "teacher") -> int:
    options = ["--num-workers", "0", "--images-per-shard", str(PER_SHARD), "--batch-size", "4"]
    return precompute.main([command, *map(str, arguments), *options])


def folder_of(data: Path, kind: str = "teacher") -> Path:
    return precompute.cache_folder(data, "train", kind)


def fingerprint(data: Path, clip: Path, keep_aspect: bool = False) -> dict[str, str]:
    teacher = RegionTeacher(load_vision_tower(clip), keep_aspect)
    return teacher.fingerprint(load_from_disk(str(data)), progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_child(action: Callable[[], object]) -> int:
    """Exit code of something in a process of its own, or the negative number of the signal that ended it."""
    return exit_code(start_child(action))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, clip) -> tuple[Path, dict[str, bytes]]:
    """Return a dataset and the files of its cache after an uninterrupted run."""
    data = tmp_path_factory.mktemp("whole") / "data"
    toy_dataset(IMAGES).save_to_disk(data)
    assert in_child(lambda: run(data, "--clip", clip)) == 0
    return data, contents(folder_of(data))


@pytest.fixture
def undisturbed(whole) -> dict[str, bytes]:
    """Return the paths of files that do not exist."""
    data, files = whole
    shutil.rmtree(folder_of(data))
    folder_of(data).mkdir()
    return files


@pytest.fixture
def bare(whole) -> Path:
    """Return the dataset, without a cache in tests that request `undisturbed`."""
    return whole[0]


def kill_after_rename(number: int) -> None:
    """From now on the process is killed once it has given that many files their names."""
    done = []

    def counted(write: Callable) -> Callable:
        def written(path, *arguments, **options):
            write(path, *arguments, **options)
            done.append(path)
            if len(done) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        return written

    shards._save, shards.write_checksummed_json = counted(shards._save), counted(shards.write_checksummed_json)


def kill_while_writing(number: int) -> None:
    """From now on the process is killed in the middle of its file of that number."""
    done, save_file = [], shards.save_file

    def half_saved(tensors, path, metadata):
        save_file(tensors, path, metadata)
        done.append(path)
        if len(done) == number:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    shards.save_file = half_saved


@pytest.mark.parametrize(
    "kill",
    [
        *(pytest.param((kill_after_rename, number), id=f"after file {number}") for number in (1, 3, 4, 5)),
        *(pytest.param((kill_while_writing, number), id=f"in file {number}") for number in (2, 4)),
    ],
)
def test_killed_writer_resumes_and_the_reader_waits(bare, clip, undisturbed, kill, capfd):
    arrange, number = kill

    def killed() -> int:
        arrange(number)
        return run(bare, "--clip", clip)

    assert in_child(killed) == -signal.SIGKILL
    command = f"python -m train.cache teacher {bare} --clip {clip}"
    with pytest.raises(ValueError, match=rf"teacher is incomplete, \d of 3 shards .* complete it with `{command} "):
        TeacherCache.open(folder_of(bare), fingerprint(bare, clip))
    assert in_child(lambda: run(bare, "--clip", clip)) == 0
    assert contents(folder_of(bare)) == undisturbed
    assert len(TeacherCache.open(folder_of(bare), fingerprint(bare, clip))) > 2 * IMAGES


def test_resuming_embeds_only_missing_regions(bare, clip, undisturbed, monkeypatch):
    folder = folder_of(bare)
    for name, content in undisturbed.items():
        (folder / name).write_bytes(content)
    (folder / shards.shard_name(1)).write_bytes(undisturbed[shards.shard_name(1)][:-1])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is missing or damaged: `python -m train.cache"):
        TeacherCache.open(folder, fingerprint(bare, clip))
    written = []
    write = StoreWriter.write
    monkeypatch.setattr(StoreWriter, "write", lambda self, *args: (written.append(args[0]), write(self, *args)))
    assert run(bare, "--clip", clip) == 0 and written == [1]
    assert contents(folder) == undisturbed
    assert run(bare, "--clip", clip) == 0 and written == [1]
    assert contents(folder) == undisturbed


def test_two_processes_write_what_one_writes(bare, clip, undisturbed):
    port = free_port()
    children = [start_child(as_rank(number, 2, port, lambda: run(bare, "--clip", clip))) for number in range(2)]
    assert [exit_code(child) for child in children] == [0, 0]
    assert contents(folder_of(bare)) == undisturbed


def test_one_process_resumes_two_killed_ones(bare, clip, undisturbed):
    def killed() -> int:
        kill_while_writing(1)  # shard 1
        return run(bare, "--clip", clip)

    port = free_port()
    first = start_child(as_rank(0, 2, port, lambda: run(bare, "--clip", clip)))
    assert in_child(as_rank(1, 2, port, killed)) == -signal.SIGKILL
    while not (folder_of(bare) / shards.shard_name(2)).exists():  # the first one writes shards 0 and 2, and then waits
        time.sleep(0.02)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert sorted(path.name for path in folder_of(bare).glob("shard*")) == [shards.shard_name(n) for n in (0, 2)]
    assert in_child(lambda: run(bare, "--clip", clip)) == 0
    assert contents(folder_of(bare)) == undisturbed


def relabelled(index: int, row: dict) -> dict:
    if index == 5:
        row["segments"][0]["category_id"] = 1
    return row


@pytest.mark.parametrize("differing", ["data", "teacher", "crops"])
@pytest.mark.parametrize("state", ["complete", "half-written"])
def test_stale_cache_raises_and_names_the_difference(tmp_path, data, clip, differing, state, capsys):
    assert run(data, "--clip", clip) == 0
    folder = folder_of(data)
    if state == "half-written":
        manifest = folder / shards.MANIFEST
        content = json.loads(manifest.read_text())
        write_checksummed_json(manifest, {name: content[name] for name in content if name not in ("shards", SUM)})
    before = contents(folder)
    other_data, other_clip, options = data, clip, []
    if differing == "data":
        other_data = tmp_path / "other"
        toy_dataset(IMAGES, change=relabelled).save_to_disk(other_data)
    elif differing == "teacher":
        other_clip = save_clip(tmp_path / "other-clip", seed=1)
    else:
        options = ["--keep-aspect"]
    capsys.readouterr()
    assert run(other_data, "--clip", other_clip, "--out", folder, *options) == 2
    message = capsys.readouterr().err
    assert f"{folder} was made with another {differing} than now requested" in message and f"rm -r {folder}" in message
    with pytest.raises(ValueError, match=rf"{folder} was made with another {differing} than"):
        TeacherCache.open(folder, fingerprint(other_data, other_clip, bool(options)))
    assert contents(folder) == before


def test_resuming_in_another_precision_raises(data, clip, capsys):
    assert run(data, "--clip", clip) == 0
    assert run(data, "--clip", clip, "--dtype", "bfloat16") == 2
    assert "made with another dtype" in capsys.readouterr().err


def test_embeddings_are_those_of_the_teacher_in_half_precision(data, clip, within):
    assert run(data, "--clip", clip) == 0
    dataset = load_from_disk(str(data))
    store = TeacherCache.open(folder_of(data), fingerprint(data, clip))
    expected = RegionTeacher(load_vision_tower(clip)).embed_dataset(dataset, dtype=torch.float32, progress=False)
    image_ids = list(reversed(dataset["image_id"][:]))
    ids = [torch.tensor([s["id"] for s in row["segments"]][::-1]) for row in reversed(list(dataset))]
    error = torch.cat(store.lookup(image_ids, ids)) - torch.cat(expected.lookup(image_ids, ids))
    within("cached embeddings, fp16 against fp32", error.abs().max(), 3e-4)
    (nothing,) = store.lookup(["toy-0"], [torch.tensor([], dtype=torch.long)])
    assert nothing.shape == (0, 16)


def test_missing_segments_are_named(data, clip):
    assert run(data, "--clip", clip) == 0
    store = TeacherCache.open(folder_of(data), fingerprint(data, clip))
    with pytest.raises(KeyError, match=r"no teacher embeddings of the segments \[8, 9\] of image 'toy-3'"):
        store.lookup(["toy-2", "toy-3"], [torch.tensor([300]), torch.tensor([8, 300, 9])])
    with pytest.raises(KeyError, match=r"segments \[300\] of image 'elsewhere'"):
        store.lookup(["elsewhere"], [torch.tensor([300])])


def pixel_and_nothing(index: int, row: dict) -> dict:
    """Return a row with regions of one pixel and of no pixel and a crowd; the second image has nothing else."""
    ids = np.asarray(row["segmentation"]).copy()
    ids[5, 9] = (77, 0, 0)
    row["segments"][-1]["iscrowd"] = True
    row["segments"] += [{"id": number, "category_id": 1, "iscrowd": False} for number in (77, 78)]
    if index == 1:
        ids[...] = 0
    return {**row, "segmentation": Image.fromarray(ids)}


def test_one_pixel_segment_is_embedded_and_empty_one_is_skipped(tmp_path, clip):
    toy_dataset(3, change=pixel_and_nothing).save_to_disk(tmp_path / "data")
    assert run(tmp_path / "data", "--clip", clip) == 0
    store = TeacherCache.open(folder_of(tmp_path / "data"), fingerprint(tmp_path / "data", clip))
    image, ids = read_row(load_from_disk(str(tmp_path / "data"))[0])
    teacher = RegionTeacher(load_vision_tower(clip))
    expected = teacher.embed_crops(torch.tensor(image[5, 9]).expand(1, 64, 64, 3))
    (found,) = store.lookup(["toy-0"], [torch.tensor([77])])
    assert (ids == 77).sum() == 1 and (found - expected).abs().max() < 1e-3
    for image_id, segment in (("toy-0", 78), ("toy-0", 70_001), ("toy-1", 77)):
        with pytest.raises(KeyError, match=rf"\[{segment}\] of image {image_id!r}"):
            store.lookup([image_id], [torch.tensor([segment])])


def test_a_dataset_without_regions_is_refused(tmp_path, clip, capsys):
    toy_dataset(2, change=lambda index, row: {**row, "segments": []}).save_to_disk(tmp_path / "data")
    assert run(tmp_path / "data", "--clip", clip) == 2
    assert "nothing to embed" in capsys.readouterr().err


def test_repeated_image_ids_are_refused(tmp_path, clip, capsys):
    toy_dataset(3, change=lambda index, row: {**row, "image_id": "same"}).save_to_disk(tmp_path / "data")
    assert run(tmp_path / "data", "--clip", clip) == 2
    assert "have the image_id 'same'" in capsys.readouterr().err


def broken(index: int, row: dict) -> dict:
    return {**row, "image": {"bytes": b"no picture", "path": None}} if index in (2, 3) else row


def test_unreadable_images_are_skipped_up_to_a_limit(tmp_path, clip, capsys):
    toy_dataset(5, change=broken).save_to_disk(tmp_path / "data")
    assert run(tmp_path / "data", "--clip", clip, "--max-broken-samples", 1) == 2
    assert "More than 1 images cannot be read" in capsys.readouterr().err
    assert run(tmp_path / "data", "--clip", clip) == 0
    assert "Skipped an image that cannot be read" in capsys.readouterr().err
    store = TeacherCache.open(folder_of(tmp_path / "data"), fingerprint(tmp_path / "data", clip))
    assert store.lookup(["toy-4"], [torch.tensor([300])])[0].shape == (1, 16)


def test_split_and_output_folder_can_be_chosen(tmp_path, clip, capsys):
    DatasetDict(train=toy_dataset(2), val=toy_dataset(4)).save_to_disk(tmp_path / "data")
    assert run(tmp_path / "data", "--clip", clip, "--split", "val") == 0
    assert (tmp_path / "data" / "gkc_cache" / "val" / "teacher" / shards.shard_name(1)).exists()
    assert set(load_from_disk(str(tmp_path / "data"))) == {"train", "val"}
    assert run(tmp_path / "data", "--clip", clip, "--out", tmp_path / "there") == 0
    assert (tmp_path / "there" / shards.INDEX).exists()
    capsys.readouterr()
    assert run(tmp_path / "data", "--clip", clip, "--split", "test") == 2
    assert "no split 'test', it has train, val" in capsys.readouterr().err
    assert run(tmp_path / "data", "--clip", tmp_path / "nothing") == 2
    assert "contains no CLIP" in capsys.readouterr().err


def rss_mb() -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of used memory")
def test_memory_does_not_grow_with_lookups(tmp_path, within):
    images, regions, columns = 2000, 100, 128  # 51 MB of rows
    settings = StoreSettings("teacher", {"data": "a"}, columns, images, images_per_shard=1000)
    writer = StoreWriter(tmp_path, settings)
    writer.begin()
    for number in range(settings.num_shards):
        names = [f"image-{position}" for position in settings.images_of(number)]
        rows = np.arange(len(names) * regions, dtype=np.float32)[:, None] % 100 + np.zeros((1, columns), np.float32)
        writer.write(number, names, [regions] * len(names), np.tile(np.arange(1, regions + 1), len(names)), rows)
    writer.finish()
    store = TeacherCache.open(tmp_path, {"data": "a"})
    assert len(store) == 200_000
    segment_ids = [torch.arange(regions, 0, -1)] * 100
    order = np.random.default_rng(0).permutation(images)
    store.lookup([f"image-{position}" for position in order[:100]], segment_ids)
    before = rss_mb()
    for start in range(100, images, 100):
        found = store.lookup([f"image-{position}" for position in order[start : start + 100]], segment_ids)
    within("memory that lookups of 1,900 images hold, MB of 51", rss_mb() - before, 6)
    first = (order[-1] % 1000 * regions) % 100
    assert found[-1][:, 0].tolist() == [(first + row) % 100 for row in reversed(range(regions))]


def test_rows_that_are_not_finite_are_refused(tmp_path):
    writer = StoreWriter(tmp_path, StoreSettings("teacher", {}, 2, 2))
    writer.begin()
    rows = np.array([[1, 2], [3, 1e6]], np.float32)  # more than fp16 holds
    with pytest.raises(ValueError, match="image 'b' is not finite"):
        writer.write(0, ["a", "b"], [1, 1], np.array([1, 1]), rows)


# ---- the data's fingerprint


def change_of(index: int, **values: object) -> Callable[[int, dict], dict]:
    return lambda position, row: {**row, **values} if position == index else row


def other_pixel(index: int, column: str) -> Callable[[int, dict], dict]:
    def change(position: int, row: dict) -> dict:
        if position == index:
            pixels = np.asarray(row[column]).copy()
            pixels[-1, -1, 0] ^= 1
            row[column] = Image.fromarray(pixels)
        return row

    return change


def other_segment(index: int, **values: object) -> Callable[[int, dict], dict]:
    def change(position: int, row: dict) -> dict:
        if position == index:
            row["segments"][-1] |= values
        return row

    return change


CHANGES = {
    "a pixel": other_pixel(53, "image"),
    "a pixel of the segmentation": other_pixel(78, "segmentation"),
    "a class": other_segment(31, category_id=2),
    "a crowd": other_segment(97, iscrowd=True),
    "a segment's id": other_segment(11, id=5),
    "an image's id": change_of(64, image_id="toy-0064"),
}


def small_dataset(change: Callable = lambda index, row: row) -> Dataset:
    """100 pictures of 16 x 16: more than could be looked at by a sample."""
    return toy_dataset(100, size=16, change=change)


@pytest.fixture(scope="module")
def plain_fingerprint() -> str:
    return data_fingerprint(small_dataset(), progress=False)


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_any_row_changes_the_fingerprint(plain_fingerprint, change):
    assert data_fingerprint(small_dataset(CHANGES[change]), progress=False) != plain_fingerprint


def test_removed_or_reordered_rows_change_the_fingerprint(plain_fingerprint):
    dataset = small_dataset()
    rows = list(range(100))
    others = [rows[:-1], rows[1:], [1, 0, *rows[2:]], [*rows, 99]]
    found = {data_fingerprint(dataset.select(other), progress=False) for other in others}
    assert len(found | {plain_fingerprint}) == 5
    assert data_fingerprint(dataset.select(rows), progress=False) == plain_fingerprint


def test_fingerprint_ignores_storage_captions_and_other_columns(tmp_path, plain_fingerprint):
    dataset = small_dataset(lambda index, row: {**row, "captions": [str(index)]})
    dataset = dataset.add_column("nouns", [["disc"]] * 100)
    dataset.save_to_disk(tmp_path / "data", num_shards=3)
    assert data_fingerprint(load_from_disk(str(tmp_path / "data")), progress=False) == plain_fingerprint


def test_images_are_read_once(tmp_path, monkeypatch, capsys):
    small_dataset().save_to_disk(tmp_path / "data")
    load = lambda: load_from_disk(str(tmp_path / "data"))  # noqa: E731
    remember = precompute.fingerprint_file(tmp_path / "data", "train")
    first = data_fingerprint(load(), remember)
    assert "Fingerprint of the data" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints, "_RowsDigest", None)
        assert data_fingerprint(load(), remember) == first
    (arrow,) = (tmp_path / "data").glob("*.arrow")
    content = arrow.read_bytes()
    place = content.index(b"\x89PNG") + 60
    arrow.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert data_fingerprint(load(), remember) != first
    assert data_fingerprint(load().select(range(50)), remember) != first


def test_image_files_are_identified_by_size_and_modification_time(tmp_path):
    def in_file(index: int, row: dict) -> dict:
        path = tmp_path / f"{index}.png"
        row["image"].save(path)
        return {**row, "image": str(path)}

    toy_dataset(3, change=in_file).save_to_disk(tmp_path / "data")
    dataset = Dataset.from_list(
        [{**toy_row(index), "image": str(tmp_path / f"{index}.png")} for index in range(3)],
        features=dataset_features(),
    )
    first = data_fingerprint(dataset, tmp_path / "kept.json", progress=False)
    assert data_fingerprint(dataset, progress=False) == first and not (tmp_path / "kept.json").exists()
    os.utime(tmp_path / "2.png", ns=(1, 1))
    assert data_fingerprint(dataset, progress=False) != first
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png', which cannot be read"):
        data_fingerprint(dataset, progress=False)


# ---- probabilities of synonyms


WORDS = '[["disc", "round"], ["square", "block", "box"], ["grass", "lawn"]]'


def wide_row(index: int, row: dict) -> dict:
    """Pictures that are not square, with a thin region, a crowd and a region of one pixel."""
    image, ids = (np.asarray(row[column])[: 40 + 4 * index].copy() for column in ("image", "segmentation"))
    ids[:, 3], ids[2, 10:50], ids[0, 0] = (90, 0, 0), (91, 0, 0), (92, 0, 0)
    row["segments"][0]["iscrowd"] = True
    row["segments"] += [{"id": 90 + number, "category_id": 1 + number % 2, "iscrowd": False} for number in range(3)]
    present = set(np.unique(ids.astype(int) @ [1, 256, 65536]).tolist())
    row["segments"] = [segment for segment in row["segments"] if segment["id"] in present]
    return {**row, "image": Image.fromarray(image), "segmentation": Image.fromarray(ids)}


@torch.no_grad()
def slow_probabilities(row: dict, segment: dict, towers: CLIPTowers, scale: float) -> list[float]:
    """One region, one word at a time, as the published script describes it."""
    vision, text, tokenizer, _ = towers
    image, ids = read_row(row)
    y, x = np.nonzero(ids == segment["id"])
    crop = Image.fromarray(image).crop((x.min(), y.min(), x.max() + 1, y.max() + 1))
    width, height = crop.size
    factor = 64 / min(width, height)
    crop = crop.resize((max(64, int(width * factor + 1e-9)), max(64, int(height * factor + 1e-9))), 3)
    left, top = round((crop.width - 64) / 2), round((crop.height - 64) / 2)
    pixels = torch.tensor(np.asarray(crop.crop((left, top, left + 64, top + 64))) / 255).float()
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = (pixels - torch.tensor(mean)) / torch.tensor(std)
    seen = vision(pixel_values=pixels.permute(2, 0, 1)[None]).image_embeds[0]
    logits = []
    for word in VOCABULARY.names[segment["category_id"]]:
        read = text(**tokenizer(f"a photo of {word}", return_tensors="pt")).text_embeds[0]
        logits.append(scale * torch.cosine_similarity(seen, read, dim=0))
    return torch.stack(logits).softmax(dim=0).tolist()


def test_probabilities_are_those_of_one_region_and_one_word_at_a_time(tmp_path, clip, within):
    toy_dataset(4, change=wide_row).save_to_disk(tmp_path / "data")
    (tmp_path / "words.json").write_text(WORDS)
    arguments = tmp_path / "data", "--clip", clip, "--vocabulary", tmp_path / "words.json"
    assert run(*arguments, "--logit-scale", 20, command="synonyms") == 0
    dataset = load_from_disk(str(tmp_path / "data"))
    towers = load_clip_towers(clip)
    source = BoxSynonyms(towers, VOCABULARY, logit_scale=20)
    store = SynonymProbabilities.open(folder_of(tmp_path / "data", "synonyms"), source.fingerprint(dataset))
    compared = 0
    for row in dataset:
        ids = torch.tensor([segment["id"] for segment in row["segments"]])
        (found,) = store.lookup([row["image_id"]], [ids])
        assert found.shape == (len(ids), 3) and torch.allclose(found.sum(dim=1), torch.ones(len(ids)), atol=2e-3)
        for probabilities, segment in zip(found.tolist(), row["segments"], strict=True):
            expected = slow_probabilities(row, segment, towers, 20)
            assert probabilities[len(expected) :] == [0] * (3 - len(expected))
            error = max(abs(p - q) for p, q in zip(probabilities, expected, strict=False))
            within("probabilities of synonyms, against one at a time", error, 2e-3)
            compared += 1
    assert compared == len(store) >= 20


def test_other_names_or_another_temperature_make_probabilities_stale(tmp_path, clip, data, capsys):
    arguments = data, "--clip", clip
    (tmp_path / "words.json").write_text(WORDS)
    (tmp_path / "fewer.json").write_text(WORDS.replace(', "box"', ""))
    assert run(*arguments, "--vocabulary", tmp_path / "words.json", command="synonyms") == 0
    for name, options in (("fewer", []), ("words", ["--logit-scale", 50])):
        assert run(*arguments, "--vocabulary", tmp_path / f"{name}.json", *options, command="synonyms") == 2
        assert "made with another words than" in capsys.readouterr().err
    dataset = load_from_disk(str(data))
    with pytest.raises(ValueError, match="does not hold teacher embeddings but 'synonyms'"):
        TeacherCache.open(folder_of(data, "synonyms"), fingerprint(data, clip))
    few = BoxSynonyms(load_clip_towers(clip), Vocabulary([["disc"], ["square"]]))
    with pytest.raises(ValueError, match=r"category ids \[2\], but the vocabulary has 2 classes"):
        few.rows(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), torch.tensor([0, 2]))
    assert len(dataset) == IMAGES


# ---- nouns


def test_nouns_are_written_to_a_new_dataset_that_keeps_its_caches(tmp_path, clip, capsys):
    wordnet = write_wordnet(tmp_path / "wordnet")
    captioned = toy_dataset(4, change=change_of(1, captions=["a dog and a dog", "on it"]))
    DatasetDict(train=captioned).save_to_disk(tmp_path / "data")
    assert run(tmp_path / "data", "--clip", clip) == 0
    arguments = ["nouns", str(tmp_path / "data"), "--wordnet", str(wordnet)]
    (tmp_path / ".data-nouns-ab12cd_9.part").mkdir()  # of a killed run
    assert precompute.main(arguments) == 0
    found = load_from_disk(str(tmp_path / "data-nouns"))["train"]
    assert found["nouns"][1] == [["dog"], []]
    assert "nouns" not in load_from_disk(str(tmp_path / "data"))["train"].column_names
    teacher = RegionTeacher(load_vision_tower(clip))
    store = TeacherCache.open(folder_of(tmp_path / "data-nouns"), teacher.fingerprint(found, progress=False))
    assert store.lookup(["toy-3"], [torch.tensor([300])])[0].shape == (1, 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data-nouns", "wordnet"]
    capsys.readouterr()
    assert precompute.main(arguments) == 2
    assert "data-nouns exists already" in capsys.readouterr().err
    assert precompute.main(["nouns", str(tmp_path / "nothing")]) == 2
    assert "is not a directory" in capsys.readouterr().err


# ---- the command


@pytest.mark.parametrize("arguments", [["--help"], ["teacher", "--help"], ["synonyms", "--help"], ["nouns", "--help"]])
def test_help_shows_examples(arguments, capsys):
    with pytest.raises(SystemExit, match="0"):
        precompute.main(arguments)
    text = capsys.readouterr().out
    assert "examples:" in text and "python -m train.cache" in text and "data/coco" in text
    assert max(map(len, text.splitlines())) < 120


def test_a_dataset_of_the_hub_needs_an_output_folder(clip, monkeypatch, capsys):
    monkeypatch.setattr(load, "load_split", lambda name, split: toy_dataset(1))
    assert run("someone/pictures", "--clip", clip) == 2
    assert "someone/pictures is not a local folder: give the folder of the cache with --out" in capsys.readouterr().err
