"""Tests of result files and reports: the schema, the table of results, and the metadata of a model card."""

import copy
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

from train.evaluate.command import format_result, main, score_warnings
from train.evaluate.report import columns, model_index, other_scores, published_rows, table
from train.evaluate.result import SCHEMA, SCHEMA_NAME, check_result, read_result, write_result

DOCUMENT = Path(__file__).parent.parent / "docs" / "evaluation.md"


def result(benchmark: str = "ade20k_150", miou: float | None = 0.1749, sha256: str = "a" * 64, **changes) -> dict:
    """Return a result that follows the schema."""
    scores = {"semantic": {"miou": miou, "pixel_accuracy": 0.6}}
    return {
        "schema": SCHEMA_NAME,
        "fingerprint": "f",
        "benchmark": benchmark,
        "split": "val",
        "tasks": ["semantic"],
        "scores": scores,
        "per_cent": {"semantic": {"miou": miou and 100 * miou, "pixel_accuracy": 60.0}},
        "groups": {},
        "classes": [{"name": "wall", "scores": {"semantic": {"iou": 0.25, "pixels": 7}}}],
        "images": {"evaluated": 2000, "prepared": 2000, "published": 2000, "broken": []},
        "protocol": {},
        "prompts": {"kind": "plain", "reduction": "max", "tta": False},
        "model": {"name": "gkc-r50", "sha256": sha256, "parameters": 5, "notes": {}},
        "data": {"folder": "data", "fingerprint": "d", "vocabulary_sha256": "v"},
        "settings": {},
        "versions": {"torch": "2.13"},
        "command": "python -m train.evaluate",
        "machine": {},
        "times": {
            "images_per_second": 2.0,
            "processes": 1,
            "seconds": {"model": 900.0},
            "milliseconds_per_image": {"model": 450.0},
        },
        "profile": None,
    } | changes


def cells(text: str) -> dict[str, list[str]]:
    """Rows of the first Markdown table by their first cell."""
    lines = [line for line in text.split("\n\n")[0].splitlines() if not line.startswith("| ---")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {cell[0]: cell[1:] for cell in rows}


@pytest.mark.parametrize(
    ("share", "predicted", "lines"),
    [
        (0.9, [60, 40], []),
        (0.05, [60, 40], ["Only 5.0 % of the pixels have a class and are scored"]),
        (0.9, [97, 3], ["'sky' has 97.0 % of the predictions and 70.0 % of the ground truth"]),
        (0.05, [0, 100], ["Only 5.0 %", "'tree' has 100.0 % of the predictions and 30.0 % of the ground truth"]),
        (None, [0, 0], []),
    ],
)
def test_warnings_about_overstated_scores(share, predicted, lines):
    classes = [
        {"name": name, "scores": {"semantic": {"pixels": pixels, "predicted": count}}}
        for name, pixels, count in zip(("sky", "tree"), (70, 30), predicted, strict=True)
    ]
    said = score_warnings(result(classes=classes, scores={"semantic": {"miou": 0.5, "scored_share": share}}))
    assert len(said) == len(lines) and all(line in text for line, text in zip(lines, said, strict=True))


def test_result_file_round_trip(tmp_path):
    write_result(result(), tmp_path / "deep" / "r.json")
    assert read_result(tmp_path / "deep" / "r.json") == result() and check_result(result()) == []
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "r.json"]


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (("schema",), "gkc-evaluation-0", "this version reads"),
        (("scores", "semantic", "miou"), 17.49, "does not lie between 0 and 1"),
        (("scores", "semantic", "miou"), "0.17", "scores.semantic.miou: must be"),
        (("scores", "semantic", "miou"), float("nan"), "scores.semantic.miou: is nan"),
        (("images", "evaluated"), None, "images.evaluated: must be int"),
        (("images", "broken"), [3], r"images.broken\[0\]: must be str"),
        (("tasks",), "semantic", "tasks: must be a list"),
        (("model",), None, "model: must be an object"),
        (("model", "parameters"), True, "model.parameters"),
        (("classes", 0, "name"), None, r"classes\[0\].name"),
    ],
)
def test_schema_violations_raise(place, value, problem, tmp_path):
    wrong = copy.deepcopy(result())
    owner = wrong
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = value
    (line,) = check_result(wrong)
    assert re.search(problem, line)
    with pytest.raises(ValueError, match="does not follow the schema"):
        write_result(wrong, tmp_path / "r.json")
    (tmp_path / "r.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "r.json"))):
        read_result(tmp_path / "r.json")


def test_every_key_is_required_and_documented():
    assert [line for line in check_result({}) if "is missing" in line] == [f"{key}: is missing" for key in SCHEMA]
    assert check_result([]) == ["the file: must be an object, got list"]
    text = DOCUMENT.read_text()
    assert all(f"`{key}`" in text for key in SCHEMA)


def test_published_rows():
    rows = cells(table([result(benchmark) for _, benchmark in columns()]))
    assert next(iter(rows)) == "model" and rows["model"] == [
        *("COCO", "PAS-20", "Cityscapes", "A-150", "A-847", "PC-59", "PC-459", "VSPW", "VIPSeg")
    ]
    assert [row[:7] for row in list(rows.values())[2:]] == [
        ["49.8", "78.7", "34.3", "17.5", "3.2", "41.9", "6.5"],
        ["51.2", "83.2", "34.8", "18.8", "3.5", "45.2", "7.1"],
        ["46.0", "71.2", "33.9", "16.6", "2.5", "39.0", "7.1"],
        ["", "89.5", "", "23.3", "7.1", "50.5", "12.9"],
    ]
    assert all(row[7:] == ["", ""] for row in list(rows.values())[2:])
    assert len(published_rows()) == 4


def test_table_shows_results_beside_published_rows():
    results = [
        result(),
        result("pascal_context_59", 0.4194),
        result("pascal_context_59", 0.5, settings={"dtype": "bfloat16"}),
        result("my_street", 0.25),
        result("ade20k_150", 0.2, prompts={"kind": "synonyms", "reduction": "mean", "tta": True}),
    ]
    rows = cells(table(results))
    headings = rows["model"]
    assert headings == ["A-150", "PC-59", "my_street"]
    alone = table([result("my_street", 0.25)])
    assert cells(alone)["model"] == ["my_street"] and len(cells(alone)) == 2 and "Published" not in alone
    ours = dict(zip(headings, rows["gkc-r50 (aaaaaaaa)"], strict=True))
    assert {key: value for key, value in ours.items() if value} == {
        "A-150": "17.5",
        "PC-59": "41.9",
        "my_street": "25.0",
    }
    assert rows["gkc-r50 (aaaaaaaa, synonyms, mean, TTA)"] == ["20.0", "", ""]
    assert rows["gkc-r50 (aaaaaaaa, bfloat16)"] == ["", "50.0", ""]
    with pytest.raises(ValueError, match="Two results are of"):
        table([result(), result(miou=0.3)])


def test_partial_results_are_marked():
    partial = result(images={"evaluated": 1990, "prepared": 2000, "published": 2000, "broken": ["a: b"] * 10})
    text = table([partial])
    assert cells(text)["gkc-r50 (aaaaaaaa)"] == ["17.5*"]
    assert "1990 of 2000 images, 10 unreadable" in text
    with pytest.raises(ValueError, match="None of the results covers all images"):
        model_index([partial])
    rival = result(model=result()["model"] | {"notes": {"classes_without_label": ["wall"]}})
    assert "has no label for 1 of 1 classes" in table([rival])


def test_groups_and_other_tasks_have_a_table():
    groups = {"novel": {"classes": 3, "semantic": {"miou": 0.125}}}
    scores = {"semantic": {"miou": 0.5, "pixel_accuracy": None}, "panoptic": {"pq": 0.25, "things_pq": 0.1}}
    text = other_scores([result(scores=scores, groups=groups)])
    assert "| ade20k_150 | PQ | 25.0 |" in text and "| ade20k_150 | mIoU, novel | 12.5 |" in text
    assert "| ade20k_150 | pixel accuracy | - |" in text and "mIoU |" not in text
    assert other_scores([]) == ""


def test_hub_reads_the_model_index():
    results = [result(), result("cityscapes_19", 0.343)]
    block = yaml.safe_load(model_index(results))["model-index"]
    name, entries = model_index_to_eval_results(block)
    assert name == "gkc-r50"
    found = {(entry.dataset_type, entry.metric_type): entry for entry in entries}
    assert found["ade20k_150", "mean_iou"].metric_value == 17.49
    assert found["cityscapes_19", "mean_iou"].dataset_name == "Cityscapes"
    assert found["cityscapes_19", "mean_iou"].dataset_split == "val"
    with pytest.raises(ValueError, match="Give the results of one model"):
        model_index([result(), result("cityscapes_19", sha256="b" * 64)])


def test_report_command(tmp_path, capsys):
    write_result(result(), tmp_path / "r.json")
    assert main(["report", str(tmp_path / "r.json")]) == 0
    assert "| gkc-r50 (aaaaaaaa) |" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "r.json"), "--without-published"]) == 0
    assert "OpenTrans" not in capsys.readouterr().out
    assert main(["report", str(tmp_path / "r.json"), "--model-index"]) == 0
    assert capsys.readouterr().out.startswith("model-index:")
    (tmp_path / "other.json").write_text("{")
    for wrong in ("other.json", "missing.json"):
        assert main(["report", str(tmp_path / wrong)]) == 2
        assert wrong in capsys.readouterr().err


def test_describe_gives_percent():
    text = format_result(result(images=result()["images"] | {"evaluated": 10}))
    assert "miou 17.49" in text and "the published split has 2000 images: these scores are not comparable" in text
    assert re.search(r"wall +25\.00 +7", text) and "2.00 images/s" in text
    many = [{"name": str(index), "scores": {"semantic": {"iou": None}}} for index in range(150)]
    assert " 149 " not in format_result(result(classes=many)) and re.search(
        r"149 +-", format_result(result(classes=many), True)
    )
