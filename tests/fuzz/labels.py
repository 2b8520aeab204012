"""Fuzzer of labels in all supported forms: strings, lists, and files of this and other projects.

A valid vocabulary is written in one form. It is then kept, changed harmlessly (spaces, zero-width characters, a ';' at
the end) and must give the same classes; or made invalid and must be rejected by an error that names the position; or
bytes of its file are damaged, and what is accepted must equal the result of a plain reader of the file.
"""

import csv
import io
import json
import random
import re
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from modeling_gkc import GKCImageProcessor, GKCProcessor, Vocabulary

WORDS = [
    "dog",
    "sofa",
    "traffic light",
    "café",
    "Straße",
    "naïve art",
    "стол",
    "桌子",
    "木",
    "می‌خواهم",
    "👩‍🔬",
    "x-ray",
]
WORDS += [
    "st. bernard",
    "and/or",
    "T-shirt",
    "crème brûlée",
    "Ångström",
    "ไม้",
    "🚲",
    "t1",
    "a",
    "it's",
    "R2-D2",
    "50 %",
]
INVISIBLE = ["\u200b", "\ufeff", "\u2060", "\u00ad", "\u200e", "\u202a"]
FILLERS = ["\u3164", "\u2800", "\u115f", "\u200d", "\ufe0f", "\x00", "\x1b"]
SURROGATES = ["\ud83d", "\udc00", "\udfff"]
SEPARATORS = [" | ", "|", "；", "，", "、", " . ", "｜", "；  ", " · "]
SPACES = ["  ", "\t", "\u00a0", "\u3000", " \u2003 "]
INVALID_NAMES = [5, 1.5, None, True, {}, [["x"]], float("nan")]
FORMS = [
    "typed",
    "list",
    "tuple",
    "txt",
    "csv",
    "json",
    "json of names",
    "json objects",
    "fc-clip",
    "id2label",
    "coco",
]


@dataclass
class Tools:
    """Folder for files, and a processor whose tokenizer knows every byte."""

    folder: Path
    processor: GKCProcessor


def setup(folder: Path) -> Tools:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<start>", "<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("~", "")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=200, **special)
    return Tools(folder, GKCProcessor(GKCImageProcessor(), fast))


def check(tools: Tools, rng: random.Random) -> str:
    warnings.simplefilter("ignore", UserWarning)
    words = rng.sample(WORDS, rng.randint(1, 6))
    names, form = _grouped(words, rng), rng.choice(FORMS)
    if form in ("typed", "txt", "fc-clip"):
        names = [[name for name in group if not re.search("[,;]", name)] for group in names]
    kind = rng.choice(["clean", "harmless", "spoiled", "spoiled", "damaged", "token"])
    if kind == "damaged":
        return _check_damage(tools, names, form, rng)
    if kind == "token":
        return _check_tokens(tools, names, rng)
    spoiled, expected = names, names
    if kind == "harmless":
        spoiled = [[_decorated(name, rng) for name in group] for group in names]
        if rng.random() < 0.3:
            spoiled = [[*group, group[0].upper() if group[0].upper().casefold() == group[0].casefold() else group[0]]
                       for group in spoiled]  # fmt: skip
    if kind == "spoiled":
        spoiled = _spoiled(names, form, rng)
    given = _write(tools.folder, spoiled, form, rng, ends=kind == "harmless")
    if form == "typed" and kind == "spoiled" and rng.random() < 0.3 and len(words) > 1:
        given = rng.choice(SEPARATORS).join(words)
    try:
        vocabulary = Vocabulary.parse(given)
    except (ValueError, TypeError) as error:
        assert kind == "spoiled", f"{form} {given!a} was refused: {error}"
        assert not isinstance(error, TypeError) or form in ("list", "tuple"), f"{given!a}: {error!r}"
        _assert_helps(str(error), given)
        return "refused"
    assert kind != "spoiled", f"{form} {given!a} was accepted as {vocabulary.names!a}"
    firsts = [group[:1] for group in expected] if form == "coco" else expected
    assert vocabulary.names == firsts, f"{form} {given!a}: {vocabulary.names!a} instead of {firsts!a}"
    _check_processor(tools.processor, vocabulary)
    return "accepted"


def _assert_helps(message: str, given: Any) -> None:
    """Assert that the error has one printable line and names a position, a line or the text itself."""
    message.encode()
    assert "\n" not in message and len(message) < 1500, f"{given!a}: {message!a}"
    assert re.search(
        r"[Ll]abel|[Ee]ntr|line|Classes are separated|contains no class|cannot be read|nested|UTF-8|'", message
    ), message


def _check_processor(processor: GKCProcessor, vocabulary: Vocabulary) -> None:
    """Assert that the processor returns the vocabulary's class ids and prompts that decode to its names."""
    inputs = processor(text=vocabulary, return_tensors="pt")
    assert inputs["class_ids"].tolist() == vocabulary.class_ids
    decoded = processor.tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    expected = [unicodedata.normalize("NFC", name) for name in vocabulary.flat_names]
    assert decoded == expected, f"{decoded!a} instead of {expected!a}"


def _grouped(words: list[str], rng: random.Random) -> list[list[str]]:
    groups: list[list[str]] = []
    for word in words:
        if groups and rng.random() < 0.3:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


def _decorated(name: str, rng: random.Random) -> str:
    """Insert spaces and zero-width characters that do not change a name."""
    for _ in range(rng.randint(0, 2)):
        place = rng.randrange(len(name) + 1)
        name = name[:place] + rng.choice(INVISIBLE) + name[place:]
    name = name.replace(" ", rng.choice([" ", *SPACES]))
    return rng.choice(["", *SPACES]) + name + rng.choice(["", *SPACES])


def _spoiled(names: list[list[str]], form: str, rng: random.Random) -> list[list[str]]:
    """Make one of the classes invalid."""
    spoiled = [list(group) for group in names]
    group = rng.randrange(len(spoiled))
    kind = rng.choice(["empty", "invisible", "surrogate", "twice", "other form", "filler"])
    if kind == "empty":
        empty = rng.choice(["", " ", "\t\u3000"])
        # Empty lines of a file and a ';' at the end are allowed.
        spoiled[group] = [names[group][0], "zebra", empty] if form in ("typed", "txt", "csv") else [empty]
    elif kind == "invisible":
        spoiled[group] = ["".join(rng.choices(INVISIBLE + FILLERS, k=rng.randint(1, 4)))]
        if spoiled[group][0].strip() == "":
            spoiled[group] = ["\u200b"]
    elif kind == "surrogate":
        place = 0 if form == "coco" else rng.randrange(len(spoiled[group]))
        spoiled[group][place] += rng.choice(SURROGATES)
    else:
        label = names[group][0]
        if kind == "other form":
            label = rng.choice([str.upper, str.title, lambda text: unicodedata.normalize("NFD", text)])(label)
            label = (
                label if label.casefold() == names[group][0].casefold() or kind == "other form" else names[group][0]
            )
            if unicodedata.normalize("NFC", label.casefold()) != unicodedata.normalize(
                "NFC", names[group][0].casefold()
            ):
                label = names[group][0]
        elif kind == "filler":
            place = rng.randrange(len(label) + 1)
            label = label[:place] + rng.choice(FILLERS) + label[place:]
        spoiled.insert(rng.randrange(len(spoiled) + 1), [label])
    return spoiled


def _write(folder: Path, names: list[list[str]], form: str, rng: random.Random, ends: bool = False) -> Any:
    """Return the classes in a form; for files, the path."""
    if form in ("list", "tuple"):
        return (list if form == "list" else tuple)(group[0] if len(group) == 1 else group for group in names)
    if form == "typed":
        return rng.choice(["; ", ";", " ;"]).join(", ".join(group) for group in names) + rng.choice(
            ["", ";", " ; "]
        ) * (ends and len(names) > 1)
    text, suffix = _text(names, form, rng)
    path = folder / f"words.{suffix}"
    path.write_bytes(rng.choice(["", "\ufeff"]).encode() + text.encode("utf-8", "surrogatepass"))
    return path


def _text(names: list[list[str]], form: str, rng: random.Random) -> tuple[str, str]:
    if form == "txt":
        return "# words\n" * rng.randint(0, 1) + "\n".join(", ".join(group) for group in names) + "\n", "txt"
    if form == "fc-clip":
        first = rng.choice([0, 1, 7])
        lines = [f"{index}:{','.join(group)}" for index, group in enumerate(names, start=first + 1)]
        return "\n".join([f"{first}:invalid_class_id", *lines]), "txt"
    if form == "csv":
        table = io.StringIO()
        rows = [{"name": group[0], "synonyms": "|".join(group[1:])} for group in names]
        writer = csv.DictWriter(table, ["name", "synonyms"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        return table.getvalue(), "csv"
    values: Any = {
        "json": names,
        "json of names": {"classes": names},
        "json objects": [{"name": group[0], "synonyms": group[1:], "is_thing": True} for group in names],
        "id2label": {str(index): group for index, group in enumerate(names)},
        "coco": {"images": [], "categories": [{"id": 3 * i, "isthing": 1, "name": g[0]} for i, g in enumerate(names)]},
    }[form]
    return json.dumps(values, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])), "json"


def _check_damage(tools: Tools, names: list[list[str]], form: str, rng: random.Random) -> str:
    """Change bytes of a file, or values of its JSON."""
    form = rng.choice(["txt", "csv", "json", "json objects", "id2label", "coco", "fc-clip"])
    path = _write(tools.folder, names, form, rng)
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "cut", "repeat", "value", "huge", "deep"])
    if kind == "flip":
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "repeat":
        data += data[rng.randrange(len(data)) :]
    elif path.suffix == ".json":
        nested = "[" * (depth := rng.choice([10, 500, 3000, 100_000])) + "]" * depth
        value = {"huge": "9" * 5000, "deep": nested, "value": json.dumps(rng.choice(INVALID_NAMES))}[kind]
        data = bytearray(re.sub(r'"[^"]*"(?!\s*:)', lambda match: value, data.decode(), count=1).encode())
    path.write_bytes(data)
    try:
        vocabulary = Vocabulary.parse(path)
        _check_processor(tools.processor, vocabulary)
    except ValueError as error:
        _assert_helps(str(error), bytes(data[:300]))
        assert str(path) in str(error) or "label" in str(error), f"{bytes(data[:300])}: {error}"
        return "refused"
    expected = _plain_reading(path)
    assert expected is None or [list(dict.fromkeys(group)) for group in expected] == vocabulary.names, (
        f"{bytes(data[:300])}: {vocabulary.names!a} instead of {expected!a}"
    )
    return "accepted"


def _plain_reading(path: Path) -> list[list[str]] | None:
    """Read the classes of a file in a few lines of code; None for files that need more, such as CSV."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv" or any(
        unicodedata.category(char) in ("Cc", "Cf") for char in text if char not in "\r\n\t"
    ):
        return None
    if path.suffix == ".txt":
        lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
        lines = [re.sub(r"^\d+\s*:", "", line) for line in lines if line and not line.endswith("invalid_class_id")]
        return [[" ".join(name.split()) for name in line.split(",")] for line in lines]
    values = json.loads(text)
    values = values.get("categories", values.get("classes", values)) if isinstance(values, dict) else values
    if isinstance(values, dict):
        values = [values[key] for key in sorted(values, key=int)]
    classes = []
    for value in values:
        if isinstance(value, dict):
            value = [value["name"], *(value.get("synonyms") or [])]
        classes.append([" ".join(name.split()) for name in ([value] if isinstance(value, str) else value)])
    return classes


def _check_tokens(tools: Tools, names: list[list[str]], rng: random.Random) -> str:
    """Check that the processor rejects labels that tokenize to nothing or to the same tokens."""
    label = names[0][0]
    bad = rng.choice([[["~~"]], [["<end>"]], [[f"{label} <pad>"]], [[label.replace(label[0], f"~{label[0]}", 1)]]])
    vocabulary = Vocabulary.parse([*names, *bad])
    try:
        tools.processor(text=vocabulary)
    except ValueError as error:
        _assert_helps(str(error), bad)
        return "refused"
    raise AssertionError(f"{vocabulary.names!a} was accepted by the processor")
