"""End-to-end tests of `python -m train.evaluate`: scores, several processes, and interruption by `kill -9`."""

import hashlib
import io
import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from transformers import AutoModel, AutoProcessor

from modeling_gkc.vocabulary import Vocabulary
from train.data import prepare
from train.data.benchmarks import miniworld
from train.data.drawn_world.dataset import build_dataset, training_vocabulary
from train.data.drawn_world.dataset import test_vocabulary as evaluation_vocabulary
from train.data.drawn_world.words import CONCEPTS
from train.data.prepared import load_prepared, vocabulary_json, write_manifest
from train.data.schema import dataset_features, decode_ids, encode_ids, read_row, semantic_map
from train.evaluate import chunks as chunks_module
from train.evaluate.chunks import ChunkFolder, plan_chunks
from train.evaluate.command import main
from train.evaluate.result import read_result
from train.metrics import PanopticMetric, SemanticMetric
from train.miniworld.evaluate import evaluate
from train.miniworld.protocols import concepts
from train.storage.checksums import SUM

from .processes import as_rank, exit_code, free_port, start_child

SHIPPED = Path(__file__).parent.parent / "hub_card" / "gkc-mini"
TASKS = ("semantic", "panoptic", "instance", "boundary")
SCENES, PER_CHUNK = 7, 3  # three chunks, the last one smaller


def png(pixels: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def row(name: str, image: np.ndarray, ids: np.ndarray, classes: Sequence[int], **more: Any) -> dict:
    """Return a row whose segment i + 1 has the class classes[i]."""
    segments = [{"id": i, "category_id": label, "iscrowd": False} for i, label in enumerate(classes, start=1)]
    pictures = {"image": png(image), "segmentation": png(encode_ids(ids))}
    return {**pictures, "segments": segments, "captions": [], "image_id": name, "video_id": "", "frame": 0} | more


def write_prepared(folder: Path, benchmark: str, vocabulary: Vocabulary, rows: Sequence[dict]) -> Path:
    """Write a prepared benchmark of these rows as `train.data.prepare` does."""
    folder.mkdir(parents=True)
    shard = folder / "val-00000-of-00001.parquet"
    Dataset.from_list(list(rows), features=dataset_features()).to_parquet(str(shard))
    sha256 = hashlib.sha256(shard.read_bytes()).hexdigest()
    split = {"complete": True, "images": len(rows), "expected": None, "problems": []}
    split["shards"] = [{"file": shard.name, "images": len(rows), "sha256": sha256}]
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary_json(vocabulary)))
    write_manifest(folder, {"benchmark": benchmark, "source": "", "options": {}, "splits": {"val": split}})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Draw and prepare the mini-world with the documented commands."""
    folder = tmp_path_factory.mktemp("world")
    drawn = ["--out", str(folder / "drawn"), "--train-scenes", "2", "--val-scenes", str(SCENES)]
    assert miniworld.main(drawn) == 0
    prepared = ["--source", str(folder / "drawn"), "--out", str(folder / "prepared"), "--split", "val"]
    assert prepare.main(["miniworld", *prepared]) == 0
    return folder / "prepared"


def run(data: Path, out: Path, *options: object) -> int:
    given = ["--model", SHIPPED, "--benchmark", "miniworld", "--data", data, "--out", out, "--cpu"]
    return main([*map(str, given), "--images-per-chunk", str(PER_CHUNK), *map(str, options)])


def numbers(result: dict) -> dict:
    """Return the results that must not depend on how the work was distributed."""
    return {name: result[name] for name in ("scores", "per_cent", "groups", "classes", "images", "fingerprint")}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> tuple[Path, dict]:
    """Return the result of one uninterrupted process."""
    out = tmp_path_factory.mktemp("whole") / "result.json"
    assert exit_code(start_child(lambda: run(data, out, "--tasks", *TASKS))) == 0
    return out, read_result(out)


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(SHIPPED).eval()


@pytest.mark.parametrize(
    ("name", "split", "world"), [("miniworld", "val", "test"), ("miniworld_train", "train", "train")]
)
def test_prepared_drawn_world_matches_the_experiment(data, tmp_path, name, split, world):
    prepared = ["--source", str(data.parent / "drawn"), "--out", str(tmp_path / "p"), "--split", split]
    assert prepare.main([name, *prepared]) == 0
    found = load_prepared(tmp_path / "p", split)
    expected = build_dataset(world, len(found.dataset), show_progress=False)
    assert found.vocabulary.labels == (evaluation_vocabulary if world == "test" else training_vocabulary)().labels
    for ours, theirs in zip(found.dataset, expected, strict=True):
        (image, ids), (other_image, other_ids) = read_row(ours), read_row(theirs)
        np.testing.assert_array_equal(image, other_image)
        np.testing.assert_array_equal(semantic_map(ours, ids), semantic_map(theirs, other_ids))
        assert sum(part["category_id"] >= 0 for part in ours["segments"]) == len(theirs["segments"])


def test_miou_matches_an_independent_evaluation(whole, model, within):
    """Compare with the evaluation of the mini-world experiment, which has its own data loading and post-processing."""
    _, result = whole
    protocol = concepts("all", CONCEPTS)
    scenes = build_dataset("test", SCENES, show_progress=False)
    processor = AutoProcessor.from_pretrained(SHIPPED)
    expected = evaluate(model, processor, scenes, [protocol], batch_size=1, show_progress=False)["scores"]["all"]
    difference = abs(result["scores"]["semantic"]["miou"] - expected["miou"])
    within("mIoU of train.evaluate and of the mini-world's own evaluation", difference, 1e-4)
    assert result["images"] == {"evaluated": SCENES, "prepared": SCENES, "published": None, "broken": []}
    assert 0.2 < expected["miou"] < 1


def test_result_describes_the_evaluation(whole):
    _, result = whole
    assert set(result["scores"]) == set(TASKS)
    assert result["per_cent"]["semantic"]["miou"] == round(100 * result["scores"]["semantic"]["miou"], 2)
    assert result["model"]["parameters"] > 1e5 and len(result["model"]["sha256"]) == 64
    assert result["protocol"]["short_side"] == 96 and result["prompts"]["templates"] == ["{}"]
    assert result["model"]["notes"]["image_size"] == "short side 96 from the protocol, long side 192 from the protocol"
    assert result["times"]["images_per_second"] > 0 and set(result["times"]["seconds"]) > {"model", "post_processing"}
    assert [entry["name"] for entry in result["classes"]] == list(CONCEPTS)
    groups = result["groups"]
    ious = {entry["name"]: entry["scores"]["semantic"]["iou"] for entry in result["classes"]}
    novel = [iou for name, iou in ious.items() if name in ("ring", "circle", "brick", "wood", "heart", "arrow")]
    assert groups["base"]["classes"] + groups["novel"]["classes"] == len(CONCEPTS) and novel
    first, second = (groups[name]["semantic"]["miou"] for name in ("base", "novel"))
    joint = groups["harmonic mean of base and novel"]["semantic"]["miou"]
    assert joint == pytest.approx(2 / (1 / first + 1 / second))


def test_custom_data_are_evaluated_at_the_size_of_the_checkpoint(tmp_path, capsys):
    image, ids = np.zeros((48, 64, 3), np.uint8), np.ones((48, 64), np.int32)
    rows = [row(str(number), image, ids, [0]) for number in range(2)]
    data = write_prepared(tmp_path / "data", "folder", Vocabulary([["circle"], ["heart"]]), rows)
    out = tmp_path / "result.json"
    assert run(data, out, "--benchmark", "folder") == 0
    size = AutoProcessor.from_pretrained(SHIPPED).image_processor.size
    found = read_result(out)
    assert found["protocol"]["short_side"] == size["shortest_edge"] == 96
    origin = "from the image processor of the model"
    expected = f"short side 96 {origin}, long side {size['longest_edge']} {origin}"
    assert found["model"]["notes"]["image_size"] == expected
    assert f"image size: {expected}" in capsys.readouterr().out


def test_three_processes_match_one_process_exactly(data, whole, tmp_path):
    _, expected = whole
    out, port = tmp_path / "result.json", free_port()
    tasks = ["--tasks", *TASKS]
    ranks = [start_child(as_rank(number, 3, port, lambda: run(data, out, *tasks))) for number in range(3)]
    assert [exit_code(rank) for rank in ranks] == [0, 0, 0]
    result = read_result(out)
    assert numbers(result) == numbers(expected) and result["times"]["processes"] == 3
    assert not (tmp_path / "result.json.parts").exists()


@pytest.mark.parametrize("moment", ["after a chunk", "within a chunk's file"])
def test_killed_run_resumes(data, whole, tmp_path, moment, monkeypatch):
    _, expected = whole
    out = tmp_path / "result.json"
    tasks = ["--tasks", *TASKS]

    def killed() -> int:
        replace, done = os.replace, []

        def kill_at_the_second(source, target):
            if "chunk-" in str(target):
                done.append(target)
                if moment == "after a chunk":
                    replace(source, target)
                if len(done) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
            if not os.path.exists(target):
                replace(source, target)

        os.replace = kill_at_the_second
        return run(data, out, *tasks)

    assert exit_code(start_child(killed)) == -signal.SIGKILL
    (parts,) = (tmp_path / "result.json.parts").iterdir()
    finished = {path.name: path.stat().st_mtime_ns for path in parts.glob("chunk-*")}
    assert len(finished) == (2 if moment == "after a chunk" else 1) and not out.exists()

    written = []
    monkeypatch.setattr(
        chunks_module.ChunkFolder,
        "write",
        lambda self, chunk, *rest: written.append(chunk) or WRITE(self, chunk, *rest),
    )
    assert run(data, out, *tasks) == 0
    assert written == list(range(len(finished), 3))
    assert numbers(read_result(out)) == numbers(expected)


WRITE = ChunkFolder.write


def test_finished_result_is_kept_and_other_options_raise(data, whole, tmp_path, capsys):
    out = tmp_path / "result.json"
    shutil.copy(whole[0], out)
    before = out.stat().st_mtime_ns
    tasks = ["--tasks", *TASKS]
    assert run(data, out, *tasks) == 0 and out.stat().st_mtime_ns == before
    assert run(data, out, "--prompts", "synonyms") == 2
    assert "is a result with other tasks, prompts" in capsys.readouterr().err


def test_chunks_of_another_run_are_never_read(data, tmp_path, capsys):
    """A damaged chunk of the same options raises; one of other options is ignored."""
    out = tmp_path / "result.json"
    assert run(data, out, "--limit", "3", "--tasks", "semantic") == 0
    fingerprint = read_result(out)["fingerprint"]
    out.unlink()
    parts = tmp_path / "result.json.parts" / fingerprint
    parts.mkdir(parents=True)
    chunk = ChunkFolder(parts, 1).path(0)
    chunk.write_bytes(b"PK\x03\x04 cut")
    capsys.readouterr()
    assert run(data, out, "--limit", "3", "--tasks", "semantic") == 2 and not out.exists()
    assert f"{chunk} is damaged (checksum mismatch): delete it (`rm {chunk}`)" in (capsys.readouterr().err)
    assert run(data, out, "--limit", "3", "--tasks", "semantic", "--batch-size", "2") == 0
    assert read_result(out)["images"]["evaluated"] == 3


def test_broken_samples_are_named_and_counted(data, tmp_path, capsys):
    rows = [
        dict(sample)
        for sample in load_prepared(data, "val")
        .dataset.cast_column("image", _stored())
        .cast_column("segmentation", _stored())
    ]
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:200]
    rows[5]["segments"] = rows[5]["segments"][1:]
    damaged = write_prepared(tmp_path / "damaged", "miniworld", load_prepared(data, "val").vocabulary, rows)
    out = tmp_path / "result.json"
    assert run(damaged, out, "--tasks", "semantic", "--batch-size", "3") == 1
    images = read_result(out)["images"]
    assert images["evaluated"] == SCENES - 2 and len(images["broken"]) == 2
    assert rows[1]["image_id"] in images["broken"][0] and rows[5]["image_id"] in images["broken"][1]
    assert rows[5]["image_id"] in capsys.readouterr().err


def _stored():
    from datasets import Image as Pictures

    return Pictures(decode=False)


def test_written_predictions_have_the_reported_scores(data, whole, tmp_path):
    """Score the prediction files, read independently with the class ids of the benchmark."""
    folder, out = tmp_path / "predictions", tmp_path / "result.json"
    assert run(data, out, "--write-predictions", folder, "--tasks", "semantic", "panoptic") == 0
    prepared = load_prepared(data, "val")
    semantic, panoptic = SemanticMetric(len(CONCEPTS)), PanopticMetric(prepared.vocabulary.is_thing)
    listed = json.loads((folder / "panoptic.json").read_text())["annotations"]
    entries = {entry["image_id"]: entry for entry in listed}
    for sample in prepared.dataset:
        name = f"{sample['image_id']}.png"
        _, ids = read_row(sample)
        classes = np.asarray(Image.open(folder / "semantic" / name))
        assert classes.dtype == np.uint8
        semantic.update(classes.astype(int), semantic_map(sample, ids))
        found = decode_ids(np.asarray(Image.open(folder / "panoptic" / name)))
        segments = entries[sample["image_id"]]["segments_info"]
        assert all(segment["area"] == (found == segment["id"]).sum() for segment in segments)
        panoptic.update(found, segments, ids, sample["segments"])
    result = read_result(out)
    assert result["scores"]["semantic"]["miou"] == semantic.compute()["miou"] == whole[1]["scores"]["semantic"]["miou"]
    assert result["scores"]["panoptic"]["pq"] == panoptic.compute()["pq"]


def test_prompt_kinds_change_prompts_and_scores(data, tmp_path):
    results = {}
    for prompts in ("plain", "templates", "synonyms"):
        out = tmp_path / f"{prompts}.json"
        assert run(data, out, "--prompts", prompts, "--tasks", "semantic", "--limit", "3") == 0
        results[prompts] = read_result(out)
    assert len({result["fingerprint"] for result in results.values()}) == 3
    assert [len(result["prompts"]["templates"]) for result in results.values()] == [1, 14, 1]
    assert results["plain"]["scores"] != results["templates"]["scores"]  # the tiny text encoder was trained on names


def test_half_precision_and_batch_size_barely_change_scores(data, whole, tmp_path, within):
    out = tmp_path / "result.json"
    assert run(data, out, "--tasks", "semantic", "--dtype", "bfloat16", "--batch-size", "4") == 0
    difference = read_result(out)["scores"]["semantic"]["miou"] - whole[1]["scores"]["semantic"]["miou"]
    within("mIoU in bf16 and fp32", abs(difference), 0.005)
    out.unlink()
    assert run(data, out, "--tasks", "semantic", "--batch-size", "3") == 0
    difference = read_result(out)["scores"]["semantic"]["miou"] - whole[1]["scores"]["semantic"]["miou"]
    within("mIoU of batches of three and of single images", abs(difference), 1e-4)


def test_tta_and_trained_on_options(data, tmp_path):
    out = tmp_path / "result.json"
    words = "square, box; star; lawn, grass"
    assert run(data, out, "--tasks", "semantic", "--tta", "--trained-on", words, "--limit", "3") == 0
    result = read_result(out)
    assert result["model"]["notes"]["views"] == 10 and result["prompts"]["tta"]
    assert result["groups"]["seen"]["classes"] == 3 and result["groups"]["unseen"]["classes"] == len(CONCEPTS) - 3
    assert run(data, tmp_path / "other.json", "--tasks", "semantic", "--trained-on", "a; a") == 2


def test_indistinguishable_class_names_raise(data, tmp_path, capsys):
    """Rename two classes to words outside the vocabulary of the text encoder, which embeds them equally."""
    renamed = shutil.copytree(data, tmp_path / "renamed")
    vocabulary = json.loads((renamed / "vocabulary.json").read_text())
    for index, entry in enumerate(vocabulary["classes"][:2]):
        entry["name"], entry["synonyms"] = f"tool{index}", []
    (renamed / "vocabulary.json").write_text(json.dumps(vocabulary))
    manifest = json.loads((renamed / "prepared.json").read_text())
    manifest.pop("vocabulary_sha256"), manifest.pop(SUM)
    write_manifest(renamed, manifest)
    assert run(renamed, tmp_path / "result.json") == 2
    error = capsys.readouterr().err
    assert "--model: These classes have equal embeddings" in error and "'tool0' = 'tool1'" in error
    assert not (tmp_path / "result.json").exists()


def test_profile_reports_flops_and_parameters(data, tmp_path, model):
    out = tmp_path / "result.json"
    assert run(data, out, "--profile", "--limit", "1", "--tasks", "semantic") == 0
    result = read_result(out)
    assert result["profile"]["gigaflops"] > 0.05 and result["profile"]["height"] == 96
    assert result["model"]["parameters"] == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "train"], "has no split 'train'"),
        (["--tasks", "video"], "miniworld contains no videos"),
        (["--benchmark", "ade20k_150"], "holds 'miniworld', not 'ade20k_150'"),
        (["--tta"], "add --tasks semantic"),
        (["--model", "nowhere/at/all"], "holds no model"),
    ],
)
def test_invalid_options_give_one_error_line(data, tmp_path, options, message, capsys):
    assert run(data, tmp_path / "result.json", *options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1 and not (tmp_path / "result.json").exists()


def test_chunks_never_divide_a_video():
    videos = ["a"] * 3 + ["b"] * 5 + ["c"] + [""] * 6
    chunks = plan_chunks(videos, 4)
    assert [list(chunk) for chunk in chunks] == [list(range(8)), list(range(8, 12)), list(range(12, 15))]
    assert [len(chunk) for chunk in plan_chunks([""] * 9, 4)] == [4, 4, 1] and plan_chunks([], 4) == []
