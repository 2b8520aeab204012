"""Tests that a metric and a benchmark can each be added by one file."""

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train.data.benchmarks
import train.metrics
from train.data import prepare
from train.data.drawn_world.world import draw_scene
from train.evaluate.command import main, parser
from train.evaluate.result import read_result
from train.metrics.score import all_scores, all_tasks, make_scores

from .test_evaluate import SHIPPED

METRIC = '''
    """Void share: a toy.

    | number | how it is taken |
    | --- | --- |
    | `void_share` | pixels of which the model says nothing / all pixels |
    """

    import numpy as np

    from train.metrics.base import Metric, ratio
    from train.metrics.score import ReportedScore, Score


    class VoidMetric(Metric):
        sums = ("void", "pixels", "classes")

        def __init__(self):
            self.void, self.pixels, self.classes = (np.zeros(size, dtype=np.int64) for size in (1, 1, 2))

        def update(self, classes):
            self.void += (classes < 0).sum()
            self.pixels += classes.size
            self.classes += [(classes == number).sum() for number in range(2)]

        def compute(self):
            shares = [ratio(number, int(self.pixels[0])) for number in self.classes.tolist()]
            return {"void_share": ratio(int(self.void[0]), int(self.pixels[0])), "mean_share": 0.5, "share": shares}


    class VoidScore(Score):
        name, task = "void_of_model", "void"
        class_means = {"mean_share": "share"}
        report = (ReportedScore("void_share", "void_share", "void"),)

        @classmethod
        def from_vocabulary(cls, vocabulary):
            return cls(VoidMetric())

        def update(self, sample, prediction):
            self.metric.update(prediction.classes)

        @classmethod
        def warnings(cls, scores, columns, labels):
            return [f"{labels} may be hollow"] if scores["void_share"] < 1 else []


    SCORES = (VoidScore,)
'''
BENCHMARK = """
    from functools import partial

    from modeling_gkc.vocabulary import Vocabulary
    from train.data.benchmarks.base import Benchmark, read_numbers, semantic_segments
    from train.data.benchmarks.protocol import GKC_R50, Protocol, ReportColumn
    from train.data.sources import AnnotatedImage


    def find(source, split):
        images = sorted(source.glob("*.jpg"))
        return [AnnotatedImage(path.stem, path, partial(read, path.with_suffix(".png")), split) for path in images]


    def read(path, shape):
        return semantic_segments(read_numbers(path, shape) - 1)


    BENCHMARKS = (
        Benchmark(
            name="toy_pair",
            vocabulary="",
            layout="A toy of two classes.",
            find=find,
            splits={"val": 2},
            make_vocabulary=lambda source: Vocabulary([["circle"], ["ring"]]),
            protocol=Protocol(tasks=("semantic", "void"), short_side=64, groups={"base": ("circle",)}),
            column=ReportColumn("Toy", published={GKC_R50: 12.5, "A new paper": 99.9}),
        ),
    )
"""


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """Add one file each to the packages of metrics and benchmarks."""
    caches = all_scores.cache_clear, train.data.benchmarks.all_benchmarks.cache_clear
    for package, name, text in (
        (train.metrics, "toy_metric", METRIC),
        (train.data.benchmarks, "toy_pair", BENCHMARK),
    ):
        folder = tmp_path / f"of_{name}"
        folder.mkdir()
        (folder / f"{name}.py").write_text(textwrap.dedent(text).lstrip())
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    for clear in caches:
        clear()
    yield
    monkeypatch.undo()
    for clear in caches:
        clear()
    for package, name in ((train.metrics, "toy_metric"), (train.data.benchmarks, "toy_pair")):
        sys.modules.pop(f"{package.__name__}.{name}", None)
        vars(package).pop(name, None)


def test_a_new_metric_and_a_new_benchmark_are_one_file_each(extended, tmp_path, capsys):
    source, data, out = tmp_path / "source", tmp_path / "data", tmp_path / "result.json"
    source.mkdir()
    for index in range(2):
        scene = draw_scene((0, 1), index, 64)
        Image.fromarray(scene.image).save(source / f"{index}.jpg")
        Image.fromarray((scene.region_index % 3).astype(np.uint8)).save(source / f"{index}.png")
    assert prepare.main(["toy_pair", "--source", str(source), "--out", str(data)]) == 0

    assert "void" in all_tasks() and "toy_pair" in " ".join(parser().format_help().split())
    command = ["--model", SHIPPED, "--benchmark", "toy_pair", "--data", data, "--cpu", "--images-per-chunk", 1]
    assert main([*map(str, command), "--out", str(out)]) == 0
    text = capsys.readouterr()
    assert "void_share 0.00" in text.out and "['circle', 'ring'] may be hollow" in text.err

    result = read_result(out)
    assert result["tasks"] == ["semantic", "void"] and set(result["scores"]) == {"semantic", "void_of_model"}
    assert result["scores"]["void_of_model"]["void_share"] == 0
    shares = [entry["scores"]["void_of_model"]["share"] for entry in result["classes"]]
    assert sum(shares) == pytest.approx(1) and result["groups"]["base"]["void_of_model"] == {"mean_share": shares[0]}
    assert result["protocol"]["short_side"] == 64 and result["images"]["published"] == 2

    assert main(["report", str(out)]) == 0
    report = capsys.readouterr().out
    miou = f"{100 * result['scores']['semantic']['miou']:.1f}"
    assert "| model | Toy |" in report and f"| {miou} |" in report
    assert (
        "| GKC, CLIP R-50 (Han et al., ICCV 2023, table 1) | 12.5 |" in report and "| A new paper | 99.9 |" in report
    )
    assert "| toy_pair | void | 0.0 |" in report
    assert main(["report", str(out), "--model-index"]) == 0
    assert "type: void_share" in capsys.readouterr().out
    assert "Void share: a toy." in train.metrics.describe()


def test_duplicate_score_names_raise(extended, tmp_path):
    folder = Path(train.metrics.__path__[-1])
    (folder / "twin_metric.py").write_text("from train.metrics.toy_metric import SCORES\n")
    all_scores.cache_clear()
    with pytest.raises(RuntimeError, match="Two scores have the name 'void_of_model'"):
        all_scores()


def test_unavailable_scores_are_omitted_or_raise():
    from modeling_gkc.vocabulary import Vocabulary

    plain, kinds = Vocabulary([["a"], ["b"]]), Vocabulary([["a"], ["b"]], is_thing=[True, False])
    assert list(make_scores(["video"], plain)) == ["video"]
    assert set(make_scores(["video"], kinds)) == {"video", "video_panoptic", "tracking"}
    assert list(make_scores(["video"], kinds, ("classes",))) == ["video"]  # for a model without segments
    with pytest.raises(
        ValueError, match=r"panoptic results require classes divided into things and stuff.*use the task semantic"
    ):
        make_scores(["semantic", "panoptic"], plain)
    with pytest.raises(ValueError, match="the model with these options does not predict panoptic, instance results"):
        make_scores(["semantic", "panoptic", "instance"], kinds, ("classes",))


def test_evaluation_modules_name_no_metric():
    """Check that no module of the evaluation names a metric, so that a new one needs no change there."""
    folder = Path(__file__).parent.parent / "train" / "evaluate"
    names = {*all_scores(), *(shown.name for score in all_scores().values() for shown in score.report)} - {"video"}
    for module in ("session", "report", "result", "command", "groups", "run", "chunks"):
        text = (folder / f"{module}.py").read_text()
        quoted = {name for name in names if f'"{name}"' in text or f"'{name}'" in text}
        assert not quoted, f"{module}.py names {quoted}"
