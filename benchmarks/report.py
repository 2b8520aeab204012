# Copyright 2026 The GKC Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Report of the benchmark results in Markdown; all its numbers are those of results.json."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modeling_gkc.atomic_files import atomic_write

from .harness import CLOCKS

BEGIN = "<!-- written by `python -m benchmarks`: begin -->"
END = "<!-- written by `python -m benchmarks`: end -->"


def markdown(record: dict[str, Any]) -> str:
    """Format a record as Markdown: the machine, then the tables of each result."""
    parts = [machine_line(record), method_line(record)]
    measured = record["measurements"]
    parts += [f"**{name}** failed: {each['failed']}" for name, each in measured.items() if "failed" in each]
    for result in merge_results(each for found in measured.values() for each in found.get("results", [])):
        parts.append("\n\n".join(result_parts(result, record["machine"])))
    if missing := [name for name in record["planned"] if name not in measured]:
        parts.append("Not measured (the run was interrupted): " + ", ".join(missing) + ".")
    if record["options"]["device"] == "cpu":
        has_none = record["machine"]["accelerator"] is None
        reason = "no CUDA device on this machine" if has_none else "run with `--device cuda`"
        parts.append(f"On a GPU: not measured ({reason}).")
    return "\n\n".join(parts) + "\n"


def machine_line(record: dict[str, Any]) -> str:
    """Describe the machine on which the results were measured."""
    about = record["machine"]
    has = ", ".join(about["instructions"]) or "no known vector extension"
    lacks = "" if about["has_amx"] else "; no AMX"
    accelerator = f"; {about['accelerator']}" if about["accelerator"] else ""
    load = "unknown" if about["load_average"] is None else f"{about['load_average']:.2f}"
    return (
        f"Machine: {about['processor']}, {about['cores']} cores ({has}{lacks}){accelerator}; "
        f"{about['threads']} threads; torch {about['torch']}, transformers {about['transformers']}, "
        f"Python {about['python']}; load average at the start {load}."
    )


def method_line(record: dict[str, Any]) -> str:
    """Describe the command and how to read the tables."""
    return (
        f"`{record['command']}`, preset `{record['options']['preset']}`, {record['date']}. Seconds are those of one "
        "call, median (minimum - maximum) over interleaved rounds: wall-clock time, and processor time summed over "
        "all cores. Ratios are computed within each round; goals are for the wall-clock time."
    )


def merge_results(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge results of the same title: memory is measured in one process per candidate."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        known = found.setdefault(result["title"], {**result, "megabytes": {}, "not_measured": {}})
        known["megabytes"] = known["megabytes"] | result["megabytes"]
        known["not_measured"] = known["not_measured"] | result["not_measured"]
    return list(found.values())


def result_parts(result: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """Format the heading, tables and notes of one result."""
    parts = [f"### {result['title']}"]
    if result["ratios"]:
        parts.append(ratio_table(result["ratios"], about))
    if result["seconds"]:
        parts.append(seconds_table(result["seconds"]))
    if result["megabytes"]:
        parts.append(memory_table(result["megabytes"]))
    if result["agreement"]:
        parts.append(agreement_table(result["agreement"]))
    if result["rounds"]:
        loads = " and ".join(f"{load:.1f}" for load in result["load_average"])
        rounds = ", ".join(map(str, result["rounds"]))
        parts.append(f"Rounds: {rounds}." + (f" Load average before and after: {loads}." if loads else ""))
    parts += result["notes"]
    parts += [f"{candidate}: not measured ({reason})." for candidate, reason in result["not_measured"].items()]
    return parts


def _rows(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ratio_table(ratios: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Format the table of time ratios."""
    return _rows(
        ["time ratio", "wall clock", "processor", "goal"],
        [[each["name"], *(_spread(each.get(clock), 2) for clock in CLOCKS), _goal(each, about)] for each in ratios],
    )


def seconds_table(seconds: dict[str, dict]) -> str:
    """Format the table of the seconds of a call by candidate."""
    return _rows(
        ["seconds per call", "wall clock", "processor"],
        [[candidate, *(_spread(clocks[clock], 4) for clock in CLOCKS)] for candidate, clocks in seconds.items()],
    )


def memory_table(megabytes: dict[str, dict]) -> str:
    """Format the table of memory by candidate."""
    return _rows(
        ["memory in MB", "before the first call", "peak including the first calls", "peak of later calls"],
        [
            [candidate, *(f"{found[key]:.0f}" for key in ("before", "peak", "later"))]
            for candidate, found in megabytes.items()
        ],
    )


def agreement_table(agreement: list[dict[str, Any]]) -> str:
    """Format the table of the differences between outputs that were checked before the timing."""
    return _rows(
        [
            "difference between outputs",
            "max abs",
            "max, standard deviations",
            "rms, standard deviations",
            "sign flips",
        ],
        [
            [
                each["name"],
                *(f"{each[key]:.2g}" for key in ("max_abs", "largest", "rms")),
                f"{100 * each['differing_signs']:.3f} %",
            ]
            for each in agreement
        ],
    )


def _spread(values: dict[str, float] | None, digits: int) -> str:
    if values is None:
        return "-"
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f} - {values['max']:.{digits}f})"


def _goal(ratio: dict[str, Any], about: dict[str, Any]) -> str:
    goal, median = ratio["goal"], ratio["clock"]["median"]
    if "at_least" in goal:
        text, is_met = f"at least {goal['at_least']:g}", median >= goal["at_least"]
    elif "at_most" in goal:
        text, is_met = f"at most {goal['at_most']:g}", median <= goal["at_most"]
    else:
        return ""
    if goal.get("needs") == "amx" and not about["has_amx"]:
        text += " on processors with AMX"
    return f"{text}: {'met' if is_met else 'missed'}"


def update_document(path: Path, text: str) -> None:
    """Replace the tables between the markers of a document and leave the rest as it is.

    Raises:
        ValueError: The document does not contain both markers, in order.
    """
    document = path.read_text(encoding="utf-8")
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} has no place for the tables: add a line {BEGIN} and after it a line {END}")
    atomic_write(path, f"{before}{BEGIN}\n\n{text}\n{END}{after}")
