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
"""Results of the benchmarks as Markdown; all its numbers are those of the JSON."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modeling_gkc.atomic_files import atomic_write

from .harness import CLOCKS

BEGIN = "<!-- written by `python -m benchmarks`: begin -->"
END = "<!-- written by `python -m benchmarks`: end -->"


def markdown(record: dict[str, Any]) -> str:
    """The machine, then the tables of each result."""
    parts = [machine_line(record), how_line(record)]
    measured = record["measurements"]
    parts += [f"**{name}** failed: {each['failed']}" for name, each in measured.items() if "failed" in each]
    for result in merged(each for found in measured.values() for each in found.get("results", [])):
        parts.append("\n\n".join(result_parts(result, record["machine"])))
    if missing := [name for name in record["planned"] if name not in measured]:
        parts.append("Not measured (the run was ended before): " + ", ".join(missing) + ".")
    if record["options"]["device"] == "cpu":
        has_none = record["machine"]["accelerator"] is None
        reason = "no CUDA device on this machine" if has_none else "run with `--device cuda`"
        parts.append(f"On a GPU: not measured ({reason}).")
    return "\n\n".join(parts) + "\n"


def machine_line(record: dict[str, Any]) -> str:
    """What the numbers belong to."""
    about = record["machine"]
    has = ", ".join(about["instructions"]) or "none of those looked for"
    lacks = "" if about["has_amx"] else "; no AMX"
    accelerator = f"; {about['accelerator']}" if about["accelerator"] else ""
    load = "unknown" if about["load_average"] is None else f"{about['load_average']:.2f}"
    return (
        f"Machine: {about['processor']}, {about['cores']} cores ({has}{lacks}){accelerator}; "
        f"{about['threads']} threads; torch {about['torch']}, transformers {about['transformers']}, "
        f"Python {about['python']}; load average at the start {load}."
    )


def how_line(record: dict[str, Any]) -> str:
    """What was run, and how to read it."""
    return (
        f"`{record['command']}`, preset `{record['options']['preset']}`, {record['date']}. Seconds are those of one "
        "call, median (least - most) over rounds in which the arms take turns: by the clock, and of all processor "
        "cores together. A ratio is taken within each round; the goal is for the clock."
    )


def merged(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of one title as one: the arms of memory have a process each."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        known = found.setdefault(result["title"], {**result, "megabytes": {}, "not_measured": {}})
        known["megabytes"] = known["megabytes"] | result["megabytes"]
        known["not_measured"] = known["not_measured"] | result["not_measured"]
    return list(found.values())


def result_parts(result: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """Heading, tables and notes of one result."""
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
    parts += [f"{arm}: not measured ({reason})." for arm, reason in result["not_measured"].items()]
    return parts


def _rows(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ratio_table(ratios: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """How many times as long."""
    return _rows(
        ["times as long", *(f"by {clock}" for clock in CLOCKS), "goal"],
        [[each["name"], *(_spread(each.get(clock), 2) for clock in CLOCKS), _goal(each, about)] for each in ratios],
    )


def seconds_table(seconds: dict[str, dict]) -> str:
    """Of each arm."""
    return _rows(
        ["seconds of a call", *CLOCKS],
        [[arm, *(_spread(clocks[clock], 4) for clock in CLOCKS)] for arm, clocks in seconds.items()],
    )


def memory_table(megabytes: dict[str, dict]) -> str:
    """Of each arm."""
    return _rows(
        ["MB of the process", "before the first call", "the most, first calls included", "the most of later calls"],
        [[arm, *(f"{found[key]:.0f}" for key in ("before", "peak", "later"))] for arm, found in megabytes.items()],
    )


def agreement_table(agreement: list[dict[str, Any]]) -> str:
    """Differences before anything was timed."""
    return _rows(
        ["differences before the timing", "largest", "in standard deviations", "their rms", "other sign"],
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
    return f"{values['median']:.{digits}f} ({values['least']:.{digits}f} - {values['most']:.{digits}f})"


def _goal(ratio: dict[str, Any], about: dict[str, Any]) -> str:
    goal, median = ratio["goal"], ratio["clock"]["median"]
    if "at_least" in goal:
        text, is_met = f"at least {goal['at_least']:g}", median >= goal["at_least"]
    elif "at_most" in goal:
        text, is_met = f"at most {goal['at_most']:g}", median <= goal["at_most"]
    else:
        return ""
    if goal.get("needs") == "amx" and not about["has_amx"]:
        text += " where there is AMX"
    return f"{text}: {'met' if is_met else 'missed'}"


def update_document(path: Path, text: str) -> None:
    """Puts the tables between the marks of a document and leaves the rest as it is.

    Raises:
        ValueError: the document does not have both marks, in order.
    """
    document = path.read_text(encoding="utf-8")
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} has no place for the tables: it needs a line {BEGIN} and after it a line {END}.")
    atomic_write(path, f"{before}{BEGIN}\n\n{text}\n{END}{after}")
