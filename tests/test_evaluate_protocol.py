"""Tests of the protocols of the benchmarks: prompts, image sizes, annotation ids, class groups and videos."""

import numpy as np
import pytest
from PIL import Image

from modeling_gkc import GKCForOpenVocabSegmentation, GKCImageProcessor, GKCProcessor
from modeling_gkc.vocabulary import Vocabulary
from train.data.benchmarks import all_benchmarks, benchmark_named, protocol_of
from train.data.benchmarks.protocol import Protocol
from train.data.schema import NO_CLASS
from train.evaluate.command import main
from train.evaluate.groups import class_facts, class_groups, group_scores
from train.evaluate.loop import predict
from train.evaluate.predictions import PredictionWriter
from train.evaluate.result import read_result
from train.evaluate.run import published_images
from train.evaluate.samples import read_sample, reduced_size, resize_bilinear, resize_nearest
from train.evaluate.vocabulary import BenchmarkVocabulary
from train.metrics import SemanticMetric, VideoConsistencyMetric, VideoPanopticMetric
from train.metrics.consistency import VideoConsistencyScore
from train.metrics.score import Prediction, Sample, flatten
from train.metrics.video_panoptic import VideoPanopticScore, link_segments

from .conftest import small_config, word_tokenizer
from .test_evaluate import row, write_prepared

# Benchmarks whose protocol is their own; variants take that of the benchmark whose classes they have.
PROTOCOLS = {
    *("coco_panoptic_133", "coco_stuff_133", "coco_stuff_171", "ade20k_150", "ade20k_150_panoptic", "ade20k_847"),
    *("pascal_voc_20", "pascal_voc_21", "pascal_voc_20b", "pascal_context_59", "pascal_context_459", "cityscapes_19"),
    *("cityscapes_panoptic_19", "vspw_124", "vipseg_124", "miniworld"),
}


def test_every_benchmark_has_a_protocol():
    benchmarks = all_benchmarks()
    for benchmark in benchmarks.values():
        if benchmark.make_vocabulary is None:
            protocol = protocol_of(benchmark.name)
            assert "no published protocol" not in protocol.note, benchmark.name
            BenchmarkVocabulary.from_protocol(
                benchmark.classes(), protocol
            )  # raises if the background is not one of the classes
    stated = {name for name, benchmark in benchmarks.items() if benchmark.protocol is not None}
    assert stated == PROTOCOLS


def test_image_sizes_match_published_protocols():
    usual = [protocol_of(name) for name in PROTOCOLS - {"vipseg_124", "miniworld"}]
    assert all((protocol.short_side, protocol.long_side) == (800, 1333) for protocol in usual)
    assert protocol_of("ade20k_847").shrink_above == 512
    assert protocol_of("coco_panoptic_novel") is benchmark_named("coco_panoptic_133").protocol
    assert protocol_of("pascal_voc_20b").background_class == 20
    assert protocol_of("pascal_voc_20").background_class is None


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((600, 800), (512, 683)),
        ((1600, 1067), (768, 512)),
        ((513, 513), (512, 512)),
        ((512, 2000), (512, 2000)),
        ((400, 1000), (400, 1000)),
        ((100, 100), (100, 100)),
    ],
)
def test_ade20k_847_downsamples_images_above_512_pixels(size, expected):
    assert reduced_size(size, 512) == expected
    assert reduced_size(size, None) == size


def test_resizing_matches_its_formula(within):
    """Compare bilinear and nearest resizing without antialiasing with their formulas."""
    rng = np.random.default_rng(0)
    picture, ids = rng.integers(0, 256, (23, 31, 3), dtype=np.uint8), rng.integers(0, 9, (23, 31)).astype(np.int32)
    size = (11, 15)
    expected = np.zeros((*size, 3))
    for i in range(size[0]):
        for j in range(size[1]):
            y, x = (i + 0.5) * 23 / 11 - 0.5, (j + 0.5) * 31 / 15 - 0.5
            y0, x0 = int(y), int(x)
            corners = picture[y0 : y0 + 2, x0 : x0 + 2].astype(float)
            rows = corners[0] * (1 - (y - y0)) + corners[1] * (y - y0)
            expected[i, j] = rows[0] * (1 - (x - x0)) + rows[1] * (x - x0)
            assert resize_nearest(ids, size)[i, j] == ids[i * 23 // 11, j * 31 // 15]
    within("levels of a bilinearly shrunk image", np.abs(resize_bilinear(picture, size) - expected).max(), 0.51)


def test_sample_is_scored_at_the_reduced_size():
    ids = np.ones((60, 80), dtype=np.int32)
    ids[30:] = 2
    stored = row("a", np.zeros((60, 80, 3), dtype=np.uint8), ids, [4, NO_CLASS])
    sample = read_sample(stored, 40)
    assert sample.image.shape == (40, 53, 3) and sample.size == (40, 53)
    assert set(np.unique(sample.truth[:20])) == {4} and set(np.unique(sample.truth[20:])) == {NO_CLASS}
    assert read_sample(stored).size == (60, 80)


def test_prompts():
    vocabulary = Vocabulary([["sofa", "couch"], ["dog"]], templates=[["one {}"], None])
    plain, synonyms = (
        BenchmarkVocabulary.from_protocol(vocabulary, Protocol(), prompts) for prompts in ("plain", "synonyms")
    )
    assert plain.vocabulary.names == [["sofa"], ["dog"]] and synonyms.vocabulary.names == vocabulary.names
    assert plain.vocabulary.templates is None and plain.templates == ["{}"]
    assert len(BenchmarkVocabulary.from_protocol(vocabulary, Protocol(), "templates").templates) == 14
    assert plain.class_of.tolist() == [0, 1]


def test_voc_21_background_is_one_class_with_many_names():
    words = BenchmarkVocabulary.from_protocol(Vocabulary.named("pascal_voc_21"), protocol_of("pascal_voc_21"))
    background = Vocabulary.named("pascal_voc_background_39").labels
    assert words.vocabulary.names[0] == ["background", *background] and words.class_of.tolist() == list(range(21))
    assert words.reduction == "max" and len(words.vocabulary.flat_names) == 21 + 39
    assert Vocabulary.named("pascal_voc_21").names[0] == ["background"]  # the packaged vocabulary is unchanged


def test_voc_20b_background_merges_39_classes():
    objects = Vocabulary.named("pascal_voc_20").labels
    vocabulary = Vocabulary([[name] for name in (*objects, "background")])
    words = BenchmarkVocabulary.from_protocol(vocabulary, protocol_of("pascal_voc_20b"))
    assert words.vocabulary.labels == [*objects, *Vocabulary.named("pascal_voc_background_39").labels]
    assert words.class_of.tolist() == [*range(20), *[20] * 39]

    class Finds:
        class_of = words.class_of

        def semantic(self, outputs, index, size):
            return np.array([[0, 19, 20], [58, -1, 37]], dtype=np.int32)

    found = predict(Finds(), None, 0, (2, 3), frozenset({"classes"})).classes
    assert found.tolist() == [[0, 19, 20], [20, -1, 20]]


def test_voc_20_ignores_the_background():
    metric = SemanticMetric(20)
    truth = np.array([[-1, -1, 3, 3]])  # background and boundary after preparation
    metric.update(np.array([[3, 7, 3, 5]]), truth)
    assert metric.compute()["miou"] == 0.5 and metric.compute()["iou"][7] is None


@pytest.mark.parametrize("name", ["coco_panoptic_133", "vipseg_124"])
def test_base_and_novel_classes_match_published_splits(name):
    vocabulary = Vocabulary.named(name)
    facts = class_facts(benchmark_named(name), len(vocabulary))
    groups = class_groups(vocabulary, facts, {}, None).members
    labels = {vocabulary.labels[index] for index in groups["novel"]}
    expected = {"coco_panoptic_133": (115, 18, "bicycle"), "vipseg_124": (112, 12, "grandstand")}[name]
    assert (len(groups["base"]), len(groups["novel"])) == expected[:2]
    if name == "vipseg_124":
        assert {"basket", "bathtub", "blackboard", "box", "fan", "ice", "instrument", "printer"} <= labels
    assert not set(groups["base"]) & set(groups["novel"])


def test_seen_classes_share_a_name_with_training():
    vocabulary = Vocabulary([["sofa", "couch"], ["Dog"], ["lamp"]])
    facts = class_facts(benchmark_named("miniworld"), 3)
    groups = class_groups(vocabulary, facts, {}, Vocabulary([["couch"], ["dog"], ["cat"]]))
    assert groups.members == {"seen": [0, 1], "unseen": [2]}
    columns = {"semantic": {"iou": [0.5, None, 0.25], "accuracy": [1.0, None, 0.5]}}
    scores = group_scores(groups, columns)
    assert scores["seen"]["semantic"] == {"miou": 0.5, "mean_accuracy": 1.0}  # the absent class is excluded
    assert scores["harmonic mean of seen and unseen"]["semantic"]["miou"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("name", "bits"), [("cityscapes_19", np.uint8), ("ade20k_847", np.uint16)])
def test_predictions_are_written_with_annotation_ids(name, bits, tmp_path):
    vocabulary = Vocabulary.named(name)
    facts = class_facts(benchmark_named(name), len(vocabulary))
    writer = PredictionWriter(tmp_path, facts.raw_ids)
    classes = np.array([[0, len(vocabulary) - 1, -1]], dtype=np.int32)
    blank = np.zeros((1, 3), dtype=np.int32)
    sample = Sample(np.zeros((1, 3, 3), dtype=np.uint8), blank, blank, [], "../val/munster_1")
    assert writer.write(sample, Prediction(classes)) == []
    written = np.asarray(Image.open(tmp_path / "semantic" / "val" / "munster_1.png")).astype(bits)
    expected = {"cityscapes_19": [7, 33, 255], "ade20k_847": [2978, facts.raw_ids[-1], 65535]}[name]
    assert written.tolist() == [expected]
    assert (Image.open(tmp_path / "semantic" / "val" / "munster_1.png").mode == "L") == (bits == np.uint8)


def test_flatten_scores():
    numbers, columns = flatten(
        {
            "pq": 0.5,
            "things": {"pq": 0.25, "iou": [1]},
            "videos": {"8": 3},
            "tracks": 7,
            "iou": [0.5, None],
            "per_class": [{"sq": 1.0}, {"sq": None}],
        }
    )
    assert numbers == {"pq": 0.5, "things_pq": 0.25} and columns == {"iou": [0.5, None], "sq": [1.0, None]}


def _frame(image_id: str, video: str, ids: np.ndarray, classes: list[int]) -> Sample:
    segments = [{"id": i, "category_id": label, "iscrowd": False} for i, label in enumerate(classes, 1)]
    truth = np.array([-1, *classes], dtype=np.int32)[ids]
    return Sample(np.zeros((*ids.shape, 3), dtype=np.uint8), ids, truth, segments, image_id, video)


def test_video_scores_receive_whole_videos():
    score, direct = VideoConsistencyScore(VideoConsistencyMetric([2])), VideoConsistencyMetric([2])
    rng = np.random.default_rng(0)
    truths, found = rng.integers(0, 2, (2, 5, 4, 4)).astype(np.int32)
    truths[:, 0] = 0
    for number in range(5):
        sample = _frame(str(number), "a" if number < 3 else "b", truths[number] + 1, [0, 1])
        score.update(sample, Prediction(found[number]))
    score.finish()
    direct.update(found[:3], truths[:3])
    direct.update(found[3:], truths[3:])
    assert score.compute()[0] == {"mVC2": direct.compute()["mVC2"]} and direct.compute()["mVC2"] is not None


def test_objects_are_tracked_by_overlap():
    """Track two things that move by a pixel per frame while their ids change, with stuff around them."""
    is_thing, frames, truths = [True, True, False], [], []
    for number in range(4):
        ids = np.full((8, 16), 1, dtype=np.int32)
        ids[2:5, number : number + 4], ids[2:5, number + 8 : number + 12] = 2, 3
        truths.append((ids, [{"id": 1, "category_id": 2}, {"id": 2, "category_id": 0}, {"id": 3, "category_id": 0}]))
        order = np.random.default_rng(number).permutation(3) + 1
        renamed = np.array([0, *order], dtype=np.int32)[ids]
        classes = {int(order[0]): 2, int(order[1]): 0, int(order[2]): 0}
        frames.append((renamed, [{"id": key, "category_id": value} for key, value in classes.items()]))
    linked = link_segments(frames, is_thing)
    first = linked[0][0]
    for (ids, segments), (truth, _) in zip(linked, truths, strict=True):
        assert [len(np.unique(ids[truth == number])) for number in (1, 2, 3)] == [1, 1, 1]
        assert ids[2, int(np.argmax(truth[2] == 2))] == first[2, 0] and ids[0, 0] == 3
        assert {segment["id"] for segment in segments} == set(np.unique(ids).tolist())
    score = VideoPanopticScore(VideoPanopticMetric(is_thing, [1, 4]), is_thing)
    for number, ((ids, segments), (truth, _)) in enumerate(zip(frames, truths, strict=True)):
        score.update(_frame(str(number), "a", truth, [2, 0, 0]), Prediction(ids=ids, segments=segments))
    score.finish()
    assert score.compute()[0]["vpq"] == 1.0

    ids, segments = frames[1]
    renamed = [{**s, "category_id": 1 if s["category_id"] == 0 else 2} for s in segments]
    swapped = link_segments([frames[0], (ids, renamed)], is_thing)
    assert not {s["id"] for s in swapped[1][1] if s["category_id"] == 1} & {s["id"] for s in swapped[0][1]}


def test_video_benchmark_end_to_end(tmp_path):
    """Evaluate frames of two videos with the classes of VIPSeg; chunks end between videos only."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(5):
        ids = rng.integers(1, 3, (6, 8)).repeat(8, 0).repeat(8, 1).astype(np.int32)
        place = {"video_id": "a" if number < 3 else "b", "frame": number if number < 3 else number - 3}
        picture = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        rows.append(row(f"frame-{number}", picture, ids, [0, 60], **place))
    vocabulary = Vocabulary.named("vipseg_124")
    data = write_prepared(tmp_path / "data", "vipseg_124", vocabulary, rows)
    tokenizer = word_tokenizer(" ".join(dict.fromkeys(" ".join(vocabulary.flat_names).lower().split())))
    text_config = small_config().text_config
    text_config.vocab_size = len(tokenizer)
    GKCForOpenVocabSegmentation(small_config(text_config=text_config)).save_pretrained(tmp_path / "model")
    GKCProcessor(GKCImageProcessor(), tokenizer).save_pretrained(tmp_path / "model")
    given = [
        "--model",
        tmp_path / "model",
        "--benchmark",
        "vipseg_124",
        "--data",
        data,
        "--cpu",
        "--images-per-chunk",
        2,
    ]
    given += ["--short-side", 64, "--long-side", 96, "--out", tmp_path / "result.json"]
    assert main(list(map(str, given))) == 0
    result = read_result(tmp_path / "result.json")
    assert set(result["scores"]) == {"semantic", "video", "video_panoptic", "tracking"}
    assert {"base", "novel"} <= set(result["groups"]) and len(result["classes"]) == 124
    assert result["protocol"]["short_side"] == 64
    sizes = "short side 64 from the command line, long side 96 from the command line"
    assert result["model"]["notes"]["image_size"] == sizes


def test_images_excluded_by_a_variant_are_not_expected():
    assert published_images({"expected": 5000, "left_out": 900}) == 4100
    assert published_images({"expected": None, "left_out": 9}) is None and published_images({"expected": 7}) == 7
