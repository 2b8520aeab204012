"""The writer of prepared benchmarks: killed and resumed, by one process and several, and what it refuses."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from configuration import Recipe
from modeling_gkc.vocabulary import Vocabulary
from train.data import check_dataset, read_row
from train.data.benchmarks import benchmark_named
from train.data.benchmarks.base import Benchmark, semantic_segments
from train.data.prepare import Settings, main, prepare
from train.data.prepared import is_prepared, load_prepared, read_manifest
from train.data.prepared_shards import plan_shards
from train.data.schema import dataset_features, semantic_map
from train.data.sources import AnnotatedImage
from train.data.wordnet.caption_nouns import add_nouns
from train.engine.builders import load_data, load_vocabulary
from train.teacher import precompute

from . import benchmark_miniatures as minis
from .wordnet_miniature import write_wordnet

QUICK = {"progress": False, "images_per_shard": 3}
IMAGES = 11


def toy(source: Path, images: int = IMAGES, expected: int | None = None, side: int = 6, **fields) -> Benchmark:
    """Return a benchmark of noise that records every image read in `source/read`."""
    (source / "images").mkdir(parents=True, exist_ok=True)
    for index in range(images):
        minis.write_photo(source / "images" / f"{index:03d}.jpg", (side, side))
    return Benchmark("toy", "pascal_voc_20", "A toy.", find_toy, {"val": expected}, **fields)


def find_toy(source: Path, split: str) -> list[AnnotatedImage]:
    files = sorted((source / "images").glob("*.jpg"))
    return [AnnotatedImage(path.stem, path, partial(read_toy, source, path.stem), split) for path in files]


def read_toy(source: Path, name: str, shape: tuple[int, int]):
    """Files in the folder make it stop or die at the eighth picture, so that a test can strike then."""
    with (source / "read").open("a") as file:
        file.write(f"{name}\n")
    (source / f"process-{os.getpid()}").touch()
    if name == "007" and (source / "stop").exists():
        (source / "reached").touch()
        time.sleep(120)
    if name == "007" and (source / "die").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if (source / f"{name}.broken").exists():
        raise ValueError(f"{source / name}.png: it is broken")
    return semantic_segments(np.full(shape, int(name) % 20))


def files_of(out: Path) -> dict[str, bytes]:
    """All that was written, without what `datasets` makes of it."""
    found = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".arrow")}


def was_read(source: Path) -> list[str]:
    read = (source / "read").read_text().split()
    (source / "read").unlink()
    return sorted(read)


# ---- what is written


def test_shards_hold_a_fixed_number_of_images_and_any_reader_reads_them(tmp_path):
    (record,) = prepare(
        toy(tmp_path / "source"), tmp_path / "source", tmp_path / "out", None, Settings(**QUICK)
    ).values()
    names = [f"val-{index:05d}-of-00004.parquet" for index in range(4)]
    assert [(shard["file"], shard["images"]) for shard in record["shards"]] == list(
        zip(names, [3, 3, 3, 2], strict=True)
    )
    assert sorted(files_of(tmp_path / "out")) == ["prepared.json", *names, "vocabulary.json"]
    for shard in record["shards"]:
        assert hashlib.sha256((tmp_path / "out" / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
        assert pq.read_table(tmp_path / "out" / shard["file"]).num_rows == shard["images"]
    files = {"val": str(tmp_path / "out" / "val-*.parquet")}
    rows = load_dataset("parquet", data_files=files, split="val", cache_dir=str(tmp_path / "cache"))
    assert rows.features == dataset_features() == load_prepared(tmp_path / "out", "val").dataset.features
    assert rows["image_id"][:] == [f"{index:03d}" for index in range(IMAGES)]
    check_dataset(rows, Vocabulary.named("pascal_voc_20").labels, progress=False)
    assert {index: counts for index, counts in enumerate(record["classes"].values()) if counts["images"]} == {
        index: {"segments": 1, "images": 1} for index in range(IMAGES)
    }


def test_a_split_without_a_whole_shard():
    assert [(plan.start, plan.stop) for plan in plan_shards("val", 0, 5)] == [(0, 0)]
    assert [(plan.start, plan.stop) for plan in plan_shards("val", 5, 5)] == [(0, 5)]
    assert plan_shards("val", 6, 5)[1].file == "val-00001-of-00002.parquet"


def test_processes_write_the_same_bytes(tmp_path):
    benchmark = toy(tmp_path / "source")
    (tmp_path / "source" / "004.broken").touch()
    for number in (1, 2, 3):
        settings = Settings(num_proc=number, skip_broken=1, **QUICK)
        prepare(benchmark, tmp_path / "source", tmp_path / f"out-{number}", None, settings)
    one = files_of(tmp_path / "out-1")
    assert one == files_of(tmp_path / "out-2") == files_of(tmp_path / "out-3") and len(one) == 6


def test_memory_does_not_grow_with_the_images(tmp_path, within):
    peaks = []
    for images in (70, 280):
        benchmark = toy(tmp_path / f"source-{images}", images, side=100)
        tracemalloc.start()
        settings = Settings(progress=False, images_per_shard=1000)
        prepare(benchmark, tmp_path / f"source-{images}", tmp_path / f"out-{images}", None, settings)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Lists of files grow, a kilobyte an image; the pictures are 12 kB each.
    within("memory of preparing 280 images beside 70, ratio", peaks[1] / peaks[0], 1.5)


# ---- killed, and given again


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_killed_run_goes_on_with_its_finished_shards(num_proc, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    benchmark, settings = toy(source), Settings(num_proc=num_proc, **QUICK)
    prepare(benchmark, source, tmp_path / "undisturbed", None, settings)
    was_read(source)
    (source / "stop").touch()
    child = multiprocessing.get_context("fork").Process(target=prepare, args=(benchmark, source, out, None, settings))
    child.start()
    wait_for(lambda: (source / "reached").exists() and (out / "val-00001-of-00004.parquet").exists())
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (out / "val-00002-of-00004.parquet").exists() and not read_manifest(out)["splits"]["val"]["complete"]
    with pytest.raises(ValueError, match=r"incomplete: finish it with `python -m train.data.prepare toy"):
        load_prepared(out, "val")
    # Processes of the killed one end by themselves.
    wait_for(lambda: not any(is_running(int(path.name[8:])) for path in source.glob("process-*")))
    finished = [path.name for path in out.glob("*.parquet")]
    (source / "stop").unlink()
    was_read(source)
    prepare(benchmark, source, out, None, Settings(num_proc=3 - num_proc, **QUICK))
    assert files_of(out) == files_of(tmp_path / "undisturbed")
    again = {f"val-{int(name) // 3:05d}-of-00004.parquet" for name in was_read(source)}
    assert again == {f"val-{index:05d}-of-00004.parquet" for index in range(4)} - set(finished) and len(finished) >= 2


def is_running(process: int) -> bool:
    """Whether a process that is not this one is there and no zombie."""
    stat = Path(f"/proc/{process}/stat")
    return process != os.getpid() and stat.exists() and stat.read_text().split()[2] != "Z"


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def test_killed_worker_raises(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    benchmark, settings = toy(source), Settings(num_proc=2, **QUICK)
    (source / "die").touch()
    with pytest.raises(RuntimeError, match=r"A worker process was killed.*smaller --num-proc"):
        prepare(benchmark, source, out, None, settings)
    (source / "die").unlink()
    prepare(benchmark, source, out, None, settings)
    prepare(benchmark, source, tmp_path / "undisturbed", None, settings)
    assert files_of(out) == files_of(tmp_path / "undisturbed")


def test_second_run_reports_that_nothing_is_left_to_do(tmp_path, capsys):
    mini = minis.ade20k(tmp_path / "ade")
    typed = ["ade20k_150", "--source", str(mini.source), "--out", str(tmp_path / "out"), "--any-count"]
    assert main(typed) == 0
    printed = capsys.readouterr().out
    assert "ade20k_150 val: finished, 2 images of 2000 published" in printed
    assert "Found 2 images, but 2000 are published." in printed
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    mini.source.rename(tmp_path / "elsewhere")  # not even the source is looked at
    assert main(typed) == 0
    assert "train, val is already finished and every file is undamaged" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "val-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"lacks val-00000-of-00001.parquet: run .* again"):
        load_prepared(tmp_path / "out", "val")
    assert main(typed) == 2 and "is not a directory" in capsys.readouterr().err
    (tmp_path / "elsewhere").rename(mini.source)
    assert main(typed) == 0 and len(load_prepared(tmp_path / "out", "val").dataset) == 2


def test_splits_join_one_by_one(tmp_path):
    mini, benchmark = minis.ade20k(tmp_path / "ade"), benchmark_named("ade20k_150")
    settings = Settings(any_count=True, progress=False)
    assert list(prepare(benchmark, mini.source, tmp_path / "out", ["val"], settings)) == ["val"]
    with pytest.raises(ValueError, match=r"no split 'train', only val: create it with .*--split train"):
        load_prepared(tmp_path / "out", "train")
    prepare(benchmark, mini.source, tmp_path / "out", None, settings)
    prepare(benchmark, mini.source, tmp_path / "both", None, settings)
    first, second = files_of(tmp_path / "out"), files_of(tmp_path / "both")
    assert {n: b for n, b in first.items() if n.endswith("t")} == {n: b for n, b in second.items() if n.endswith("t")}
    assert [len(load_prepared(tmp_path / "out", split).dataset) for split in ("train", "val")] == [1, 2]


def test_a_source_that_changed_is_read_again(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    benchmark, settings = toy(source), Settings(**QUICK)
    (source / "009.broken").touch()
    assert not prepare(benchmark, source, out, None, settings)["val"]["complete"]
    was_read(source)
    (source / "009.broken").unlink()
    (source / "images" / "000.jpg").unlink()
    assert prepare(benchmark, source, out, None, settings)["val"]["complete"]
    assert was_read(source) == [f"{index:03d}" for index in range(1, IMAGES)]
    assert load_prepared(out, "val").dataset["image_id"][0] == "001"


# ---- what is wrong


def test_all_problems_are_reported_and_nothing_is_complete(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    benchmark, settings = toy(source), Settings(**QUICK)
    for name in ("001", "002", "010"):
        (source / f"{name}.broken").touch()
    record = prepare(benchmark, source, out, None, settings)["val"]
    assert record["problems"] == [f"{source / name}.png: it is broken" for name in ("001", "002", "010")]
    assert not record["complete"] and was_read(source) == [f"{index:03d}" for index in range(IMAGES)]
    assert sorted(path.name[4:9] for path in out.glob("*.parquet")) == ["00001", "00002"]
    # Mended: only the files with problems are written again.
    for path in source.glob("*.broken"):
        path.unlink()
    assert prepare(benchmark, source, out, None, settings)["val"]["complete"]
    assert was_read(source) == ["000", "001", "002", "009", "010"]
    prepare(benchmark, source, tmp_path / "undisturbed", None, settings)
    assert files_of(out) == files_of(tmp_path / "undisturbed")


def test_broken_images_are_skipped_up_to_a_number(tmp_path, capsys):
    mini = minis.ade20k(tmp_path / "ade")
    mini.spoil("ADE_val_00000002")
    typed = [
        "ade20k_150",
        "--source",
        str(mini.source),
        "--out",
        str(tmp_path / "out"),
        "--any-count",
        "--split",
        "val",
    ]
    assert main([*typed, "--strict"]) == 1
    printed = capsys.readouterr().out
    assert "NOT finished" in printed and f"{mini.annotations['ADE_val_00000002']}: Unexpected values 151" in printed
    assert "--skip-broken 1" in printed
    assert main([*typed, "--skip-broken", "1"]) == 1
    printed = capsys.readouterr().out
    assert "val: finished, 1 images of 2000" in printed and "1 images cannot be used" in printed
    loaded = load_prepared(tmp_path / "out", "val")
    assert loaded.dataset["image_id"][:] == ["ADE_val_00000001"] and len(loaded.info["problems"]) == 1


def test_counts_are_compared_with_the_published_ones(tmp_path):
    source = tmp_path / "source"
    benchmark = toy(source, expected=13, discrepancy="Two were withdrawn.", other_counts={"val": (12,)})

    def outcome(name: str, **changes):
        record = prepare(benchmark, source, tmp_path / name, None, Settings(**QUICK, **changes))["val"]
        return record["complete"], record["notes"]

    complete, notes = outcome("strict")
    assert not complete and notes[0].startswith("Found 11 images, but 13 are published. Two were withdrawn.")
    assert "--any-count" in notes[0]
    assert not outcome("one", skip_broken=1)[0] and outcome("two", skip_broken=2)[0]
    assert outcome("any", any_count=True) == (True, ["Found 11 images, but 13 are published. Two were withdrawn."])
    assert outcome("limit", limit=4) == (True, [])
    minis.write_photo(source / "images" / "011.jpg", (6, 6))
    assert outcome("known") == (True, ["Found 12 images, but 13 are published. Two were withdrawn."])
    minis.write_photo(source / "images" / "012.jpg", (6, 6))
    assert outcome("right") == (True, [])


def test_other_options_for_an_existing_folder_raise(tmp_path, capsys):
    mini, out = minis.ade20k(tmp_path / "ade"), tmp_path / "out"
    typed = ["--source", str(mini.source), "--out", str(out)]
    assert main(["ade20k_150", *typed, "--limit", "1"]) == 0
    capsys.readouterr()
    assert main(["ade20k_150", *typed]) == 2
    assert (
        f"{out} was started with limit 1, now None: repeat the original options, or name another --out."
        in capsys.readouterr().err
    )
    assert main(["ade20k_150", *typed, "--limit", "1", "--images-per-shard", "7"]) == 2
    assert "images_per_shard 500, now 7" in capsys.readouterr().err
    assert main(["pascal_voc_20", *typed, "--limit", "1"]) == 2
    assert "benchmark ade20k_150, now pascal_voc_20" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    assert main(["ade20k_150", "--source", str(mini.source), "--out", str(tmp_path / "full")]) == 2
    assert "contains other files" in capsys.readouterr().err and (tmp_path / "full" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["imagenet", "--source", "a", "--out", "b"], "invalid choice: 'imagenet'"),
        (["ade20k_150", "--source", "a", "--out", "b", "--split", "test"], "invalid choice: 'test'"),
        (["ade20k_150", "--source", "a", "--out", "b", "--num-proc", "0"], "positive integer, got '0'"),
        (["ade20k_150", "--source", "a", "--out", "b", "--strict", "--skip-broken", "3"], "not allowed with"),
        (["ade20k_150", "--out", "b"], "required: --source"),
    ],
)
def test_usage_errors(typed, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(typed)
    assert said in capsys.readouterr().err


def test_missing_folders_are_reported(tmp_path, capsys):
    assert main(["ade20k_150", "--source", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert f"--source: {tmp_path / 'none'} is not a directory." in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["ade20k_150", "--source", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert f"There is no {tmp_path / 'empty' / 'images' / 'training'}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"is not a prepared benchmark.*python -m train.data.prepare BENCHMARK"):
        load_prepared(tmp_path / "empty", "val")


def test_duplicate_image_ids_raise(tmp_path):
    benchmark = Benchmark("toy", "pascal_voc_20", "A toy.", lambda *_: find_toy(tmp_path, "val") * 2, {"val": None})
    toy(tmp_path)
    with pytest.raises(ValueError, match="Several images have the id '000' \\(11 repeated ids in total\\)"):
        prepare(benchmark, tmp_path, tmp_path / "out", None, Settings(**QUICK))


def test_help_lists_the_benchmarks_and_teaches_layouts(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in ("coco_panoptic_133", "ade20k_847", "pascal_voc_20b", "folder", "vspw_124"))
    with pytest.raises(SystemExit, match="0"):
        main(["ade20k_150", "--help"])
    text = capsys.readouterr().out
    assert "DIR/annotations/validation/ADE_val_*.png" in text and "train (20,210 images)" in text


# ---- used by training


def test_recipes_and_caches_take_a_prepared_folder(tmp_path, capsys):
    mini, out = minis.coco_panoptic(tmp_path / "coco"), tmp_path / "out"
    benchmark = benchmark_named("coco_panoptic_133")
    prepare(benchmark, mini.source, out, ["val"], Settings(any_count=True, progress=False))
    assert is_prepared(out)
    with pytest.raises(ValueError, match=r"`dataset`: .* has no split 'train', only val"):
        load_data(Recipe().replace(dataset=str(out), eval_split="val"))
    prepare(benchmark, mini.source, out, None, Settings(any_count=True, progress=False))
    recipe = Recipe().replace(dataset=str(out), eval_split="val", vocabulary="dataset")
    splits = load_data(recipe)
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 3, "val": 2}
    assert load_vocabulary(recipe).labels == Vocabulary.named("coco_panoptic_133").labels
    check_dataset(splits["train"], load_vocabulary(recipe).labels, progress=False)
    wordnet = write_wordnet(tmp_path / "wordnet")
    assert precompute.main(["nouns", str(out), "--wordnet", str(wordnet)]) == 0
    capsys.readouterr()
    made = load_data(Recipe().replace(dataset=f"{out}-nouns", eval_split="val"))["val"]
    assert made["nouns"][:] == [[[], []], [[]]] and made["captions"][1] == ["Only one."]
    assert (
        load_vocabulary(Recipe().replace(dataset=f"{out}-nouns", vocabulary="dataset")).labels
        == load_vocabulary(recipe).labels
    )


def test_nouns_of_several_captions_stay_apart(tmp_path):
    rows = load_prepared_captions(tmp_path)
    assert add_nouns(rows, write_wordnet(tmp_path / "wordnet"))["nouns"][:] == [[["dog"], []], [["car"]]]


def load_prepared_captions(folder: Path):
    mini = minis.coco_panoptic(folder / "coco")
    sentences = [(1, 139, "A dog."), (2, 139, "Here."), (3, 140, "A car.")]
    captions = [{"id": number, "image_id": image, "caption": text} for number, image, text in sentences]
    minis.write_json(mini.source / "annotations" / "captions_val2017.json", {"annotations": captions})
    settings = Settings(any_count=True, progress=False)
    prepare(benchmark_named("coco_panoptic_133"), mini.source, folder / "out", ["val"], settings)
    return load_prepared(folder / "out", "val").dataset


# ---- semantic truth of a row


def test_semantic_map_writes_crowds_and_ignores_void():
    segments = [
        {"id": 3, "category_id": 0, "iscrowd": False},
        {"id": 70_000, "category_id": 5, "iscrowd": True},
        {"id": 4, "category_id": -1, "iscrowd": False},
    ]
    ids = np.array([[0, 3, 3], [4, 70_000, 3]], dtype=np.int32)
    row = {"image_id": "a", "segments": segments}
    assert np.array_equal(semantic_map(row, ids), [[-1, 0, 0], [-1, 5, 0]])
    assert np.array_equal(semantic_map(row, ids, ignore=255), [[255, 0, 0], [255, 5, 0]])
    assert semantic_map(row, ids).dtype == np.int32
    with pytest.raises(ValueError, match=r"'a'.*Ids \[9\]"):
        semantic_map(row, np.full((2, 2), 9))


def test_847_classes_go_through_without_loss(tmp_path):
    """Every class of the largest vocabulary, in one picture."""
    source, classes = tmp_path / "source", np.arange(-1, 847).reshape(16, 53)
    minis.write_photo(source / "images" / "000.jpg", (16, 53))
    benchmark = Benchmark(
        "all",
        "ade20k_847",
        "All.",
        lambda *_: [
            AnnotatedImage("000", source / "images" / "000.jpg", lambda shape: semantic_segments(classes), "val")
        ],
        {"val": 1},
    )
    prepare(benchmark, source, tmp_path / "out", None, Settings(progress=False))
    (row,) = load_prepared(tmp_path / "out", "val").dataset
    assert np.array_equal(semantic_map(row, read_row(row)[1]), classes)
    assert len(json.loads((tmp_path / "out" / "vocabulary.json").read_text())["classes"]) == 847
