"""What an example is, how it is loaded, what counts as correct, and accuracy on a set.

    python eval.py --model M --data SPEC --mode p2r     # or think, or direct: a benchmark's table
    python eval.py --model M --image photo.jpg --question "What is written on the red sign?"

The reward of training *is* the check of evaluation: both call `grade`. Training rewards exactly
what the tables report, in the format that the tables expect.

Data. SPEC is a file (.jsonl, .json, .tsv, .csv, .parquet), a folder that holds one, or a hub id
(owner/name, or owner/name/file). COLUMNS lists the names under which each field is found. A file with the
images inside is unpacked once into an ordinary folder, in the cache; from there on there is one loader.

Protocol. As the authors evaluate (greedy, 4,194,304 pixels an image, at least 16,384, repetition penalty 1.05,
256 tokens for the Perceiver and 1024 for the Reasoner, an answer without <answer> is wrong), but for this:
 1. Prompts are worded by us, so a published checkpoint meets words it was not trained on.
 2. Option letters, numbers and boxes are read by the rules of `option_letter`, `number_in` and crop.parse_boxes.
 3. `think` and `direct` run under the same budgets and penalty; the papers' baselines may not have.
"""

import argparse
import base64
import binascii
import contextlib
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import random
import re
import string
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

import toy
from crop import COLOURS, MAX_CROPS, MAX_RATIO, Box, parse_boxes, picture, to_rect, to_rgb
from rollout import FORMS, REGIONS, InputError, cached, direct, find, load, perceive, reason

LETTERS = "ABCDEF"


# ---------------------------------------------------------------------------------------------
# Examples


@dataclass(frozen=True)
class Example:
    image: Path
    question: str         # with its options, as the model reads it
    answer: str
    answer_form: str = "free_form"
    options: tuple = ()
    category: str = ""
    rotation: str = ""    # HR-Bench asks each question four times, its options rotated
    id: str = ""
    boxes: tuple = ()     # of Box; only ever used to measure
    size: tuple = dataclasses.field(default=(), compare=False)  # (width, height) of the image, from its header

    def load_image(self):
        """The image at its original resolution, upright, as RGB. Raises InputError."""
        try:
            with Image.open(self.image) as image:  # refuses "decompression bombs", above 179 million pixels
                return to_rgb(image)
        except Exception as error:  # Pillow raises a dozen kinds for a broken file
            raise InputError(f"cannot read the image {self.image} of example {self.id}: {error}") from error


def inside(root, name):
    """root / name, links resolved. Raises InputError if that leaves the folder `root`: data must not name files elsewhere.
    (The files of a hub snapshot are links into its repository's folder, which counts as inside.)"""
    path, top = (root / name).resolve(), root.resolve()
    top = next((p.parent for p in (top, *top.parents) if p.name == "snapshots"), top)
    if not path.is_relative_to(top):
        raise InputError(f"the field 'image' names {name}, which lies outside {root}: give --images a folder that holds it")
    return path


COLUMNS = {  # a field of Example: the columns it is read from. The first that a row has wins; a dot goes inside.
    "image": ("image", "images", "original_images", "image_path", "bytes"),
    "question": ("question", "problem", "text", "prompt"),                          # prompt: chat messages (verl)
    "answer": ("answer", "solution", "label", "reward_model.ground_truth", "ground_truth"),
    "answer_form": ("answer_form", "extra_info.answer_form"),  # mca (option letter), na (number), free_form
    "options": ("options", "multi-choice options"),            # a list of texts, or columns A, B, C, ...
    "category": ("category", "data_source"),
    "rotation": ("cycle_category",),
    "id": ("id", "index", "question_id", "doc_id", "extra_info.index"),
    "boxes": ("boxes",),  # [x1, y1, x2, y2], 0..1000: where the evidence is. Only to measure; no training code reads it
}


def load_data(spec, images=None, skip_bad=False, flag="--data"):
    """A file, folder or hub id of questions -> list of Example; prints what was read.

    Every row and every image header is checked now, before a model is loaded; pixels stay on disk.
    images: the folder that relative paths start from; default: the data file's.
    Raises InputError that names file, row and field; with skip_bad bad rows are left out and counted.
    """
    examples, bad, used = [], [], {}
    for file in data_files(spec, flag):
        unpacked = _unpack(file) if file.suffix in (".tsv", ".csv", ".parquet") else None
        for number, row in tqdm(_rows(unpacked / "data.jsonl" if unpacked else file), f"checking {file.name}", delay=2, leave=False):
            try:
                examples.append(_example(row, Path(images) if images else file.parent, unpacked, number, used))
            except InputError as error:
                bad.append(f"{file}, {'line' if file.suffix == '.jsonl' else 'row'} {number}: {error}")
                _need(skip_bad, bad[0])
    _need(examples, f"{flag} {spec} holds no example; " + (f"the first bad row is {bad[0]}" if bad else "it is empty"))
    print(f"read {len(examples):,} examples from {spec}: "
          + ", ".join(f"{n:,} {form}" for form, n in Counter(e.answer_form for e in examples).items())
          + "; columns " + ", ".join(f"{field} <- {column}" for field, column in used.items()))
    if bad:
        print(f"skipped {len(bad):,} bad rows; the first is {bad[0]}")
    return examples


def data_files(spec, flag="--data"):
    """The data files that SPEC names: one, or the shards of one. Raises InputError where it is not clear which."""
    path, known = find(spec, flag, "dataset"), (".jsonl", ".json", ".tsv", ".csv", ".parquet")
    files = [path] if path.is_file() else [path / "data.jsonl"] if (path / "data.jsonl").is_file() else sorted(
        f for f in path.rglob("*") if f.suffix in known and not f.relative_to(path).parts[0].startswith("."))
    _need(files and files[0].suffix in known, f"{flag} {spec}: there is no {', '.join(known[:-1])} or {known[-1]} file")
    _need(len({re.sub(r"-\d+-of-\d+$", "", str(f.with_suffix(""))) for f in files}) == 1, f"{flag} {spec} holds several data files: "
          f"name one of them, as {spec}/" + f" or {spec}/".join(str(f.relative_to(path)) for f in files[:4] if f != path))
    return files


def _rows(file):
    """(number, row) of every row of a data file; a line that is no JSON comes as its InputError."""
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except (ValueError, RecursionError) as error:
                        yield number, InputError(f"not a JSON object ({error})")
    elif file.suffix == ".json":
        try:
            rows = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file} is not JSON ({error})") from error
        _need(isinstance(rows, list), f"{file} must hold a JSON list of examples, not a {type(rows).__name__}")
        yield from enumerate(rows, start=1)
    elif file.suffix == ".parquet":
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise InputError(f"reading {file} needs pyarrow: pip install -e \".[data]\"") from error
        try:  # row by row, unbuffered; with images inside, Arrow still holds two row groups (the hub's have 100 rows)
            batches = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False).iter_batches(batch_size=1)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
        except (ArrowException, OSError) as error:
            raise InputError(f"{file} cannot be read as parquet: {error}") from error
    else:
        csv.field_size_limit(1 << 30)  # an image is one field
        with file.open(newline="", encoding="utf-8-sig") as text:
            try:
                yield from enumerate(csv.DictReader(text, delimiter="\t" if file.suffix == ".tsv" else ","), start=1)
            except (csv.Error, UnicodeDecodeError) as error:
                raise InputError(f"{file} cannot be read as {file.suffix}: {error}") from error


def _unpack(file):
    """Write the rows of `file` as data.jsonl and the images inside it as files, once -> that folder, in the cache."""
    def fill(folder):
        rows, places = [], {}  # VLMEvalKit stores an image once; other rows hold the index of the row that has it
        (folder / "images").mkdir()
        for number, row in tqdm(_rows(file), f"unpacking {file.name}, once", delay=2, unit="row"):
            for column in COLUMNS["image"]:
                content = _content(row.get(column))
                if isinstance(content, bytes):
                    name = "images/" + hashlib.sha256(content).hexdigest()[:32]  # equal images are stored once
                    (folder / name).write_bytes(content)
                    row[column] = places[str(row.get("index"))] = {"unpacked": name}
            rows.append(row)
        with (folder / "data.jsonl").open("w") as out:
            for row in rows:
                row |= {c: places[row[c]] for c in COLUMNS["image"] if isinstance(row.get(c), str) and row[c] in places}
                out.write(json.dumps(row, default=lambda value: f"({type(value).__name__})") + "\n")

    key = f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}"
    return cached("data-" + hashlib.sha256(key.encode()).hexdigest()[:16], fill)


def _content(value):
    """The encoded image inside a cell as bytes; any other cell as it is."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and len(value) > 64 and "." not in value[:1000]:  # base64 has no dot; a path's extension has one
        with contextlib.suppress(binascii.Error):
            return base64.b64decode(re.sub(r"^data:[^,]*,|\s", "", value), validate=True)
    return value


def _given(value):
    return value not in (None, "", []) and value == value  # not NaN, which pandas writes for what is missing


def _need(fine, problem):
    if not fine:
        raise InputError(problem)


def _example(row, root, unpacked, number, used):
    """One raw row -> Example. Raises InputError that names the field. `used` collects {field: column}."""
    _need(not isinstance(row, InputError), str(row))
    _need(isinstance(row, dict), f"not a JSON object but a {type(row).__name__}")
    fields = {}
    for field, columns in COLUMNS.items():
        for column in columns:
            value = row
            for key in column.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if _given(value) and field not in fields:
                fields[field] = value
                used.setdefault(field, column)
    for field in ("image", "question", "answer"):
        _need(field in fields, f"the field {field!r} is missing or empty; it is read from {' or '.join(COLUMNS[field])}")
    question, answer, boxes = fields["question"], fields["answer"], fields.get("boxes", [])
    if isinstance(question, list):  # chat messages: the text of what the user says
        said = next((m.get("content") for m in question if isinstance(m, dict) and m.get("role") == "user"), None)
        question = "".join(part.get("text") or "" for part in said) if isinstance(said, list) else said
    _need(isinstance(question, str), f"the field 'question' must be text, not {str(question)[:80]!r}")
    _need(isinstance(answer, str) or _is_number(answer), f"the field 'answer' must be text, not {str(answer)[:80]!r}")
    answer = (answer_in(str(answer)) or str(answer)).strip()
    _need(answer, "the field 'answer' is empty")

    letters = [letter for letter in LETTERS if _given(row.get(letter))]
    _need("".join(letters) == LETTERS[:len(letters)], f"the options {', '.join(letters)} are given, but not those between them")
    options = [row[letter] for letter in letters] or fields.get("options", [])
    if not options:
        question, options = split_options(question)
    _need(isinstance(options, list) and len(options) <= len(LETTERS) and all(isinstance(o, str) or _is_number(o) for o in options),
          f"the field 'options' must be a list of at most {len(LETTERS)} texts, not {str(options)[:80]!r}")
    question, options = clean_question(question), [str(option) for option in options]
    _need(question, "the field 'question' is empty")
    labels = [re.match(rf"\(?{letter}[).:]\s*", option) for letter, option in zip(LETTERS, options)]
    if all(labels):  # "(A) red" -> "red"; the letter comes back below
        options = [option[label.end():] for label, option in zip(labels, options)]
    question = "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options))])

    letter = option_letter(answer, options)
    form = fields.get("answer_form", "mca" if options else "free_form")  # of a row that does not say
    _need(isinstance(form, str) and form in FORMS, f"the field 'answer_form' must be one of {', '.join(FORMS)}, not {form!r}")
    for fine, problem in ((form != "free_form" or plain_words(answer), "which holds no word to compare with"),
                          (form != "mca" or letter, "which names no option" if options else "which names no option letter A to F"),
                          (form != "mca" or not (options and letter) or letter in LETTERS[:len(options)], f"but there are only {len(options)} options"),
                          (form != "na" or number_in(answer), "which is not a number")):
        _need(fine, f"the field 'answer' is {answer!r}, {problem}")
    _need(isinstance(boxes, list) and all(
        isinstance(b, list) and len(b) == 4 and all(_is_number(v) and 0 <= v <= 1000 for v in b) and b[0] < b[2] and b[1] < b[3]
        for b in boxes), f"the field 'boxes' must be a list of [x1, y1, x2, y2] between 0 and 1000, x1 < x2 and y1 < y2, not {boxes!r}")
    path, size = _check_image(fields["image"], root, unpacked)
    return Example(path, question, answer, form, tuple(options),
                   str(fields.get("category", "")), str(fields.get("rotation", "")), str(fields.get("id", number)),
                   tuple(Box(*map(float, b)) for b in boxes), size)


def _check_image(value, root, unpacked):
    """An image cell -> (its path, (width, height)). Raises InputError unless the header can be read and the path stays inside root."""
    if isinstance(value, list):
        _need(len(value) == 1, f"the field 'image' holds {len(value)} images; P2R asks about one")
        value = value[0]
    if unpacked and isinstance(value, dict) and "unpacked" in value:
        path = unpacked / value["unpacked"]
    else:
        value = value.get("path") if isinstance(value, dict) else value
        _need(isinstance(value, str) and len(value) < 1000, f"the field 'image' must be a path, not {str(value)[:80]!r}")
        path = inside(root, value)
    try:
        with Image.open(path) as header:
            (width, height), mode = header.size, header.mode
    except FileNotFoundError as error:
        archives = _archives(root)
        raise InputError(f"the field 'image' names {path}, which does not exist; " + (
            f"images may still be inside {', '.join(archives)}: unpack them, and say where with --images" if archives else
            "--images says where paths start")) from error
    except Exception as error:  # Pillow raises a dozen kinds for a broken file
        raise InputError(f"the field 'image' names {path}, which cannot be read: {error}") from error
    _need(max(width, height) <= MAX_RATIO * min(width, height), f"the field 'image' names {path}, which is {width} x {height}: "
          f"Qwen3-VL takes images up to {MAX_RATIO} times as long as wide")
    _need(mode != "F", f"the field 'image' names {path}, whose pixels are floating point numbers: convert it to 8 bits a channel")
    return path, (width, height)


@functools.cache
def _archives(root):
    """Archives in the image folder or beside it."""
    found = [f for folder in (root, root.parent) if folder.is_dir() for f in sorted(folder.iterdir())]
    return [f.name for f in found if f.suffix in (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar")][:4]


# What data sets add to a question to say how to answer, not what is asked. It contradicts our prompts. Matched against
# whole sentences, and narrow: a question must never be lost to it.
_INSTRUCTION = re.compile(r"""
      .*(<think>|<answer>|<tool_call>|\\boxed|_tool\b|reasoning\ process|step\ by\ step).*
    | (hint:\ )?(please\ |just\ |only\ |directly\ )*(answer|respond|reply|output)\b
          .*\b(letter|option|options|choice|choices|word|phrase|directly|short|nothing|question)\b.*
    | (please\ |only\ )*(select|choose|pick)\ (the|an?)\ ((best|correct|right|most\ appropriate)\ )?(answer|option|choice|letter)
          ((,|\ from|\ to|\ among|\ of|\ based|\ below|\ above)\b.*)?
    | (please\ |only\ )*(put|give|provide|write|return|output)\ (your|the)\ ((final|best|correct|right|chosen)\ )?(answer|option\ letter
          |letter\ of\ the\ (correct|right|best|chosen)\ (answer|option|choice))\b.*
    | (your|the)\ ((final|best|correct|right)\ )?(answer|response)\ (should|must)\b.*
    | (your|the)\ (final|best|correct|right)\ answer(\ is)? | (options|choices|answer|the\ (options|choices)\ are(\ listed)?\ below)
    """, re.IGNORECASE | re.DOTALL | re.VERBOSE)


def clean_question(text):
    """A data set's question without <image> tags and without sentences on how to answer.

    A sentence that ends in a question mark always stays, and so does a text that would vanish.
    """
    text = re.sub(r"<image>|^\s*Question:", "", text).strip()
    sentences = re.split(r"(?<=[.!?])(?=\s)|(?<=\n)", text)
    kept = [s for s in sentences if s.strip().endswith("?") or not _INSTRUCTION.fullmatch(s.strip().rstrip(".:! "))]
    return "".join(kept).strip() or text


def split_options(question):
    """Options written into a question as lines "(A) red", "B. blue" ... -> (question without them, options)."""
    lines = question.split("\n")
    found = [re.fullmatch(r"\s*\(?([A-Z])[).:]\s*(\S.*?)\s*", line) for line in lines]
    letters = "".join(m[1] for m in found if m)
    if len(letters) < 2 or letters != string.ascii_uppercase[:len(letters)]:
        return question, []
    return "\n".join(line for line, m in zip(lines, found) if not m).strip(), [m[2] for m in found if m]


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------
# What counts as correct


class Score(NamedTuple):
    reward: float         # 1.0 or 0.0
    answered: bool        # False: no <answer>..</answer> in the text, which earns 0 and is counted
    open: bool = False    # a free-form answer in other words than the truth: a judge may still accept it
    judged: bool = False  # a judge was asked


def grade(pairs, judge=None, rule=None):
    """(text, example) pairs -> a Score each. Training's reward and evaluation's verdict are this one function.

    `rule` (default: score) decides alone, but for free-form answers in other words; those go to the
    `judge` where there is one, all in one call, and are wrong where there is none.
    """
    pairs = list(pairs)
    scores = [(rule or score)(text, example) for text, example in pairs]
    unsettled = [i for i, s in enumerate(scores) if s.open and judge]
    if unsettled:
        for i, yes in zip(unsettled, judge([(answer_in(pairs[i][0]), pairs[i][1]) for i in unsettled])):
            scores[i] = Score(float(yes), True, judged=True)
    return scores


def score(text, example):
    """A Reasoner's text -> Score. Only what stands inside the last <answer>..</answer> counts.

    (The authors score the whole text in training where the tags are missing, and call it wrong in evaluation.)
    """
    answer = answer_in(text)
    if answer is None:
        return Score(0.0, False)
    right = correct(answer, example)
    # What is longer than a short phrase, or would put control tokens into the judge's prompt, is wrong unasked.
    short = 0 < len(answer.split()) <= 20 and len(answer) <= 200 and "<|" not in answer
    return Score(float(right), True, open=short and not right and example.answer_form == "free_form")


def answer_in(text):
    """What stands inside the last <answer>..</answer>, or None."""
    found = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", text, re.DOTALL)
    return found[-1].strip() if found else None


def correct(answer, example):
    """Is this answer the example's answer, word for word, number for number, letter for letter?"""
    if example.answer_form == "mca":
        letter = option_letter(answer, example.options)
        return letter is not None and letter == option_letter(example.answer, example.options)
    if example.answer_form == "na":
        return same_number(answer, example.answer)
    _need(example.answer_form == "free_form", f"the answer form {example.answer_form!r} of example {example.id} is unknown")
    return plain_words(answer) == plain_words(example.answer) != ""


_PREFIX = re.compile(r"(?:(?:so|thus|therefore|hence),?\s)?(?:(?:(?:the|my)\s)?(?:(?:final|correct|right|best)\s)?"
                     r"(?:answer|option|choice|letter)(?:\s(?:is|should\sbe))?\s?:?\s?){1,2}(?=\S)", re.IGNORECASE)


def option_letter(text, options=()):
    """The one option letter A..F that a text names, or None.

    Accepts "C", "c", "(C)", "C.", "C. blue", "**C**", "The answer is C", "C is correct" and the full text of an
    option. Refuses "A or B", "Apple", "A blue car", "", letters somewhere in a sentence, essays, and
    a letter before the text of another option.
    """
    text = re.sub(r"\s*\n\s*", ". ", unicodedata.normalize("NFKC", text).strip())
    bare = " ".join(re.sub(r"\\boxed|\\text|[*`$#<>\"\u201c\u201d\\{}\[\]]", " ", text).split()).strip(" .,'\u3002")
    bare = re.sub(r"^\(\s?(\w)\s?\)", r"(\1)", _PREFIX.sub("", bare, count=1) if _PREFIX.match(bare) else bare)
    if re.fullmatch(r"\(?[A-Fa-f]\)?[.:]?", bare):
        return bare.strip("().:").upper()
    texts = {letter: plain_words(option) for letter, option in zip(LETTERS, options)}
    found = re.fullmatch(r"(\(?)([A-Fa-f])\b(.*)", bare)
    if found:
        letter, rest = found[2].upper(), found[3]
        marked = re.match(r"(\)[.:]?|[.:]+)(?=\s)" if found[1] else r"([).:]+|\s[-:\u2013\u2014])(?=\s)", rest)
        tail = rest[marked.end():] if marked else rest
        words = plain_words(tail)
        if words == texts.get(letter) or re.fullmatch(r"is (the )?(correct|right|best)( (answer|option|choice))?|is the answer", words):
            return letter                                      # "C. green" and "C green": its own option; "C is correct"
    if not re.match(r"\(?\w[).:]", bare):                       # an option's own text, with no letter before it
        named = [letter for letter, words in texts.items() if words and words in (plain_words(text), plain_words(bare))]
        if len(named) == 1:
            return named[0]
    if not found or not marked:                                # a sentence; "A blue car"
        return None
    if words in texts.values() or len(words.split()) > 10:     # "B. green", the text of another option; an essay
        return None
    tokens = re.sub(r"^A(?=\s[a-z])", "", tail.strip()).split()
    if tokens[0].lower() in ("or", "and", "&", "/") or any(t.strip("().,:;") in (*"ABCDEF", *"bcdef") for t in tokens):
        return None                                            # "A. or B."; but "B. A cat" is fine
    return letter


_NUMBER = re.compile(r"(?<![\w,/])(?<!\d\.)([-+]?)[$\u20ac\u00a3]?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(e[-+]?\d{1,2}\b)?"
                     r"(?:\s?/\s?(\d+))?(?![\d/_]|[.,]\d)\s?(%|percent\b)?(thousand\b|million\b|billion\b)?", re.IGNORECASE)
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_POWERS = {"thousand": 10**3, "million": 10**6, "billion": 10**9}


def number_in(text):
    """The one number of a text as (exact Fraction, has a percent sign), or None for none or several.

    "1,200 m", "1200.0", "-2.5", "3/4", "75%", "1.5e3", "$5", "2 million", and "three people": zero to twelve as words.
    """
    text = re.sub("[\u2212\u2013]", "-", text)
    first = re.match(r"(?:there (?:is|are) )?(\w+)", plain_words(text))
    if first and first[1] in _NUMBER_WORDS and sum(word in _NUMBER_WORDS for word in plain_words(text).split()) == 1 \
            and not re.search(r"\d", text):
        return Fraction(_NUMBER_WORDS.index(first[1])), False
    found = list(_NUMBER.finditer(text))
    if len(found) != 1 or re.search(r"\d", text[:found[0].start()]):
        return None
    sign, digits, exponent, below, percent, power = found[0].groups()
    if below and not int(below):
        return None
    value = Fraction(f"{sign}{digits.replace(',', '')}{exponent or ''}") * _POWERS.get((power or "").lower(), 1)
    return value / int(below or 1), bool(percent)


def same_number(answer, truth):
    """Whole numbers exactly, others to one part in a million. 75% is 0.75; where only one of the two has the sign, also 75."""
    a, b = number_in(answer), number_in(truth)
    if a is None or b is None:
        return False
    readings = [[n, n / 100] if percent and not other[1] else [n] for (n, percent), other in ((a, b), (b, a))]
    return any(x == y or (x.denominator * y.denominator > 1 and abs(x - y) <= abs(y) / 10**6)
               for x in readings[0] for y in readings[1])


def plain_words(text):
    """Lower case, one form of each character, no punctuation around words, extra spaces or leading article."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    words = [bare for w in words if (bare := re.sub(r"^(?!\.\d)[^\w\s$\u20ac\u00a3+%-]+|[^\w\s%+]+$", "", w))]
    article = len(words) > 1 and words[0] in ("a", "an", "the") and words[1][0].isalpha()
    return " ".join(words[article:])


JUDGE = """Question: {question}
Correct answer: {truth}
Given answer: {given}

Does the given answer mean the same as the correct answer? Reply with Yes or No."""


class Judge:
    """A frozen language model that says whether an answer in other words is right. Text only, greedy.

    It is asked for Yes or No, and the verdict is whichever is more likely as the first token: one forward
    for a batch of answers. In training the default is the frozen copy that is in memory anyway;
    the paper uses a separate verifier (`--judge MODEL`).
    """

    def __init__(self, model, tokenizer, batch=32):
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.yes, self.no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
        if self.yes == self.no:
            raise InputError("--judge: Yes and No begin with the same token in this model's vocabulary; choose another")

    @classmethod
    def load(cls, name, device):
        """A hub id or folder of a chat model, text or vision -> Judge. Raises InputError."""
        folder = find(name, "--judge")
        try:
            vision = hasattr(transformers.AutoConfig.from_pretrained(folder), "vision_config")
            kind = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
            model = kind.from_pretrained(folder, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(f"--judge {name} cannot be loaded: {' '.join(str(error).split())}") from error
        if tokenizer.chat_template is None:
            raise InputError(f"--judge {name} has no chat template: choose an instruction-tuned model")
        return cls(model.to(device).eval().requires_grad_(False), tokenizer)

    @torch.no_grad()
    def __call__(self, cases):
        """(answer, example) pairs -> a bool each."""
        verdicts = []
        for start in range(0, len(cases), self.batch):
            texts = [self.tokenizer.apply_chat_template(
                [{"role": "user", "content": JUDGE.format(question=e.question, truth=e.answer, given=" ".join(answer.split()))}],
                tokenize=False, add_generation_prompt=True, enable_thinking=False) for answer, e in cases[start:start + self.batch]]
            rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            width = max(map(len, rows))
            ids = torch.tensor([[self.no] * (width - len(r)) + r for r in rows], device=self.model.device)        # (B, P)
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=self.model.device)  # (B, P)
            logits = self.model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                                use_cache=False, logits_to_keep=1).logits[:, -1]                                  # (B, V)
            verdicts += (logits[:, self.yes] > logits[:, self.no]).tolist()
        return verdicts


# ---------------------------------------------------------------------------------------------
# Asking a model


def setting(default, group, text, choices=None):
    return dataclasses.field(default=default, metadata={"group": group, "help": text, "choices": choices})


def add_flags(parser, settings):
    """One flag for every field of a dataclass made of `setting`s; only flags that are given come back."""
    groups = {}
    for field in dataclasses.fields(settings):
        group, kind = field.metadata["group"], {"action": argparse.BooleanOptionalAction} if field.type is bool else {
            "type": field.type, "choices": field.metadata["choices"]}
        groups.setdefault(group, parser.add_argument_group(group)).add_argument(
            "--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
            help=f"{field.metadata['help']} (default: {'none' if field.default == '' else field.default})".replace("%", "%%"))


@dataclass(frozen=True)
class Protocol:
    """How a model is asked. The defaults are the authors' evaluation."""
    mode: str = setting("p2r", "protocol", "two stages; think and answer on the plain image; answer at once on the plain image; "
                        "reason with the data's true boxes", ("p2r", "think", "direct", "oracle"))
    evidence: str = setting("both", "protocol", "what the Reasoner sees of the boxes", tuple(REGIONS))
    max_boxes: int = setting(0, "protocol", "use only so many of the boxes; 0: all (three are cropped)")
    max_pixels: int = setting(4_194_304, "protocol", "pixel budget of every image the model sees, crops too")
    min_pixels: int = setting(16_384, "protocol", "smaller images are scaled up to this")
    perceive_tokens: int = setting(256, "protocol", "longest Perceiver response")
    reason_tokens: int = setting(1024, "protocol", "longest Reasoner response")
    penalty: float = setting(1.05, "protocol", "repetition penalty; 1: none")
    batch: int = setting(8, "protocol", "questions asked together")

    def check(self):
        """Raises InputError for the first setting that cannot work."""
        for name in ("perceive_tokens", "reason_tokens", "penalty", "batch"):
            _need(getattr(self, name) > 0, f"--{name.replace('_', '-')} {getattr(self, name)} must be more than 0")


def ask(model, codec, examples, how, judge=None):
    """Yields a record, a dict ready for JSON, for each Example. Greedy, so deterministic.

    boxes are the Perceiver's (or, in mode "oracle", the true ones), perceived and reasoned the two texts.
    """
    limits = dict(greedy=True, batch=how.batch, penalty=how.penalty)
    for start in range(0, len(examples), 4 * how.batch):  # a killed run loses no more than this
        chunk = examples[start:start + 4 * how.batch]
        perceived, parsed = [None] * len(chunk), [None] * len(chunk)
        boxes = [e.boxes if how.mode == "oracle" else () for e in chunk]
        if how.mode == "p2r":
            perceived = [g.completions[0].text for g in perceive(model, codec, chunk, max_tokens=how.perceive_tokens, **limits)]
            parsed = [parse_boxes(text) for text in perceived]
            boxes = [p.boxes[:how.max_boxes or None] for p in parsed]
        groups = direct(model, codec, chunk, max_tokens=how.reason_tokens, **limits) if how.mode == "direct" else \
            reason(model, codec, list(zip(chunk, boxes)), how.evidence, max_tokens=how.reason_tokens, **limits)
        texts = [g.completions[0].text for g in groups]
        if how.mode == "direct":  # the whole text is the answer, unless the model is used to tags
            texts = [f"<answer>{text}</answer>" if answer_in(text) is None else text for text in texts]
        scores = grade(zip(texts, chunk), judge)
        for e, text, seen, p, found, s in zip(chunk, texts, perceived, parsed, boxes, scores):
            yield {"id": e.id, "category": e.category, "rotation": e.rotation, "image": str(e.image), "question": e.question,
                   "options": list(e.options), "answer": e.answer, "answer_form": e.answer_form, "boxes": [list(b) for b in found],
                   "parsable": p.parsable if p else None, "perceived": seen, "reasoned": text,
                   "reward": s.reward, "answered": s.answered, "judged": s.judged}


def hits(boxes, example):
    """Is the centre of every true box inside one of the predicted boxes that are cropped?"""
    centres = [((t.x1 + t.x2) / 2, (t.y1 + t.y2) / 2) for t in example.boxes]
    return all(any(b[0] <= x <= b[2] and b[1] <= y <= b[3] for b in boxes[:MAX_CROPS]) for x, y in centres)


def evaluate(model, codec, examples, how, judge=None):
    """Accuracy of one model in both roles, for training's report. Returns fractions, or None where not measurable:

    p2r     perceive, crop, reason: the method
    hit     the boxes contain the centres of all true boxes (needs `boxes`)
    plain   reason on the plain image, without boxes: the baseline
    oracle  reason with the true boxes: what the Reasoner could do with a perfect Perceiver
    n       number of examples; unparsable, unanswered: shares of the p2r outputs
    categories: {category: [p2r, plain]}
    """
    def run(mode, examples):
        records = ask(model, codec, examples, dataclasses.replace(how, mode=mode), judge)
        return list(tqdm(records, f"eval {mode}", total=len(examples), leave=False, unit="q"))

    p2r, plain = run("p2r", examples), run("think", examples)
    by_category = {c: [mean(r["reward"] for r in records if r["category"] == c) for records in (p2r, plain)]
                   for c in sorted({e.category for e in examples})}
    return {
        "p2r": mean(r["reward"] for r in p2r),
        "hit": mean(hits(r["boxes"], e) for r, e in zip(p2r, examples) if e.boxes),
        "plain": mean(r["reward"] for r in plain),
        "oracle": mean(r["reward"] for r in run("oracle", [e for e in examples if e.boxes])),
        "n": len(examples),
        "unparsable": mean(not r["parsable"] for r in p2r),
        "unanswered": mean(not r["answered"] for r in p2r),
        "categories": by_category,
    }


def print_report(report):
    """Print p2r_min's report as a small table: {"before": ..., "during": [...], "after": ...} of `evaluate` results."""
    rows = {"before": report["before"], **{f"step {r['step']}": r for r in report["during"]}, "after": report["after"]}
    print(f"\n{'held-out, n = ' + str(report['after']['n']):52}" + "".join(f"{name:>9}" for name in rows))
    for name, text in (("p2r", "perceive, then reason"), ("hit", "the boxes hold all that was asked about"),
                       ("plain", "reason on the plain image"), ("oracle", "reason with the true boxes")):
        cells = ("-" if row[name] is None else f"{row[name]:.3f}" for row in rows.values())
        print(f"{name:7}{text:45}" + "".join(f"{cell:>9}" for cell in cells))
    kinds = report["after"]["categories"]
    for kind in kinds if len(kinds) > 1 else ():
        print(f"{'':7}{'p2r, ' + kind:45}" + "".join(f"{row['categories'][kind][0]:9.3f}" for row in rows.values()))


def mean(values):
    """The mean of some numbers as a float, or None of none at all."""
    values = [float(v) for v in values]
    return sum(values) / len(values) if values else None


# ---------------------------------------------------------------------------------------------
# Benchmarks: the tables that papers print

CATEGORIES = {  # a data set's category -> the papers' column
    "direct_attributes": "attribute", "relative_position": "spatial", "single": "FSP", "cross": "FCP",
    **{f"{task}/{name}": f"{task[0]}-{short}" for task in ("perception", "reasoning") for name, short in (
        ("ocr with complex context", "OCR"), ("remote sensing", "RS"), ("diagram and table", "DT"), ("monitoring", "MO"),
        ("autonomous_driving", "AD"))},
}


def accuracy(records):
    """(share of right answers, how many independent questions stand behind it).

    HR-Bench asks every question once for each rotation of its options: the accuracy of each rotation is
    averaged, and as the rotations of a question are not independent, it counts once.
    """
    rotations = {}
    for r in records:
        rotations.setdefault(r["rotation"], []).append(r["reward"])
    return mean(mean(rewards) for rewards in rotations.values()), max(map(len, rotations.values()))


def wilson(share, n, z=1.96):
    """The 95 % confidence interval of a share of n: Wilson's score interval (1927), which stays inside 0..1."""
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def print_benchmark(records, title, spec, speed=None):
    """The table that papers print: accuracy by category and overall in percent, with 95 % intervals."""
    named = [CATEGORIES.get(r["category"].lower(), r["category"] or "all") for r in records]
    published = json.loads((Path(__file__).parent / "assets" / "published.json").read_text())  # the papers' rows, in percent
    name = next((n for n, rows in published.items() if set(named) <= set(rows["columns"])
                 and ("HR" not in n or n[-2:].lower() in Path(spec).stem.lower())), None)
    papers = published.get(name, {"columns": list(dict.fromkeys(named)) + ["overall"]})
    full = papers.pop("columns")
    columns = [c for c in full if c in named and c != "all"]
    found = [accuracy([r for r, c in zip(records, named) if c == column]) for column in columns] + [accuracy(records)]
    rows = {"this run": [f"{100 * share:.1f}" for share, _ in found],
            "  95 % interval": ["{:.0f}-{:.0f}".format(*(100 * x for x in wilson(*f))) for f in found]}
    for who, values in papers.items():
        values = dict(zip(full, values))
        rows[f"{who}, published"] = ["-" if values[c] is None else f"{values[c]:.1f}" for c in [*columns, "overall"]]
    print(f"\n{title}: {name or spec}, {len(records):,} questions")
    width = max([10] + [len(c) + 2 for c in columns])
    for head, cells in {"": [*columns, "overall"], **rows}.items():
        print(f"{head:24}" + "".join(f"{cell:>{width}}" for cell in cells))
    boxes = [b for r in records for b in r["boxes"]]
    area = mean((b[2] - b[0]) * (b[3] - b[1]) / 1e6 for b in boxes)
    shares = {"without an answer": mean(not r["answered"] for r in records), "judged": mean(r["judged"] for r in records),
              "unparsable boxes": mean(not r["parsable"] for r in records if r["parsable"] is not None)}
    print(f"{len(boxes) / len(records):.2f} boxes a question" + (f" of {area:.1%} of the image" if boxes else "") + "; "
          + ", ".join(f"{what} {share:.1%}" for what, share in shares.items() if share is not None)
          + (f"; {speed:.2f} questions/s" if speed else ""))


def read_records(file):
    """The records of a results.jsonl, without a last line that a killed run left half. Raises InputError."""
    whole = [line for line in (file.read_text().splitlines(keepends=True) if file.exists() else []) if line.endswith("\n")]
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise InputError(f"{file} holds a line that is not JSON ({error}): remove the file, or choose another --out") from error


def draw(record, example):
    """One record -> the picture that tells its story."""
    texts = [("perceiver", record["perceived"]), ("reasoner", record["reasoned"]), ("truth", record["answer"])]
    return picture(example.load_image(), [Box(*b) for b in record["boxes"]], record["question"], [t for t in texts if t[1]])


# ---------------------------------------------------------------------------------------------
# The command line


@dataclass
class What:
    """What is asked, of whom, and where it goes."""
    model: str = setting("", "what", "Qwen3-VL: a hub id or a folder; without it the embedded toy")
    data: str = setting("", "what", "questions: a file, folder or hub id; without it (and --image) the toy's")
    images: str = setting("", "what", "folder that relative image paths start from; default: the data file's")
    skip_bad: bool = setting(False, "what", "leave bad rows out, and count them, instead of stopping")
    limit: int = setting(0, "what", "ask only so many questions, drawn at random once and for all; 0: all")
    judge: str = setting("none", "what", "who settles free-form answers in other words: none, self, or a model")
    out: str = setting("", "what", "folder for results.jsonl and pictures; default: runs/eval-MODEL-DATA-MODE")
    pictures: int = setting(8, "what", "draw the first so many questions")
    score: str = setting("", "what", "a results.jsonl: score its texts again and print the table, without a model")
    image: str = setting("", "any picture", "a picture of your own: prints boxes and answer, writes one picture")
    question: str = setting("", "any picture", "what to ask about it")
    answer_form: str = setting("free_form", "any picture", "the kind of answer", tuple(FORMS))


def run_data(what, how):
    """Every question of a data set -> results.jsonl, pictures and the table; goes on where a killed run stopped."""
    examples = load_data(what.data, what.images, what.skip_bad)
    if 0 < what.limit < len(examples):
        examples = [examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), what.limit))]
    out = Path(what.out or "runs/eval-{}-{}-{}".format(Path(what.model).name, Path(what.data).stem, how.mode))
    out.mkdir(parents=True, exist_ok=True)
    records = read_records(out / "results.jsonl")
    config = {"model": what.model, "data": what.data, "judge": what.judge, **asdict(how)}
    known = json.loads((out / "config.json").read_text()) if records else config
    changed = [f"{name} was {known.get(name)} and is {value}" for name, value in config.items() if known.get(name) != value]
    if [(r["id"], r["question"], r["answer"]) for r in records] != [(e.id, e.question, e.answer) for e in examples[:len(records)]]:
        changed.append("the questions are not the same")
    _need(not changed, f"{out} holds other results ({'; '.join(changed)}): choose another --out")
    model, codec = load(find(what.model), how.max_pixels, device(), how.min_pixels)
    codec.check(e.question for e in examples)
    judge = {"none": lambda: None, "self": lambda: Judge(model, codec.tokenizer)}.get(
        what.judge, lambda: Judge.load(what.judge, device()))()
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    if len(records) < len(examples):
        del records[len(records) // (4 * how.batch) * (4 * how.batch):]  # whole batches, as an undisturbed run asks them
    (out / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    rest, start = examples[len(records):], time.perf_counter()
    with (out / "results.jsonl").open("a") as lines:
        for record in tqdm(ask(model, codec, rest, how, judge), "asking", initial=len(records), total=len(examples), unit="q"):
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            records.append(record)
    speed = len(rest) / (time.perf_counter() - start) if rest else None
    for number, (record, example) in enumerate(list(zip(records, examples))[:what.pictures], start=1):
        draw(record, example).save(out / f"{number:05d}.png")
    print_benchmark(records, f"{Path(what.model).name} in mode {how.mode}", what.data, speed)
    print(f"results and pictures: {out}")


def run_picture(what, how):
    """One picture and one question of the user's own."""
    if not what.question:
        raise InputError("--image needs --question: what shall be asked about it?")
    example = Example(_check_image(str(Path(what.image).resolve()), Path("/"), None)[0], what.question, "", what.answer_form)
    model, codec = load(find(what.model), how.max_pixels, device(), how.min_pixels)
    record, = ask(model, codec, [example], how)
    size = example.load_image().size
    for box, colour in zip(record["boxes"], itertools.cycle(COLOURS)):
        print(f"{colour:8} {box[4]}: pixels {to_rect(box, size)}")
    answer = answer_in(record["reasoned"])
    print(f"answer   {'(none: the text has no <answer>)' if answer is None else answer}")
    out = Path(what.out or "runs")
    out.mkdir(parents=True, exist_ok=True)
    file = next(f for i in itertools.count(1) if not (f := out / f"{Path(what.image).stem}-{i}.png").exists())
    draw(record, example).save(file)
    print(f"picture  {file}")


def rescore(file):
    """Score the texts of a results.jsonl again and print the table. A judge's verdicts are kept as they are."""
    if not file.is_file() or not (file.parent / "config.json").is_file():
        raise InputError(f"--score {file}: there must be such a file, and config.json beside it")
    how = json.loads((file.parent / "config.json").read_text())
    records = read_records(file)
    _need(records, f"--score {file}: there is no result in it")
    for r in records:
        example = Example(Path(r["image"]), r["question"], r["answer"], r["answer_form"], tuple(r["options"]))
        r["reward"] = r["reward"] if r["judged"] else score(r["reasoned"], example).reward
    print_benchmark(records, f"{Path(how['model']).name} in mode {how['mode']}", how["data"])


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Ask a model: a benchmark, or one picture.")
    add_flags(parser, What)
    add_flags(parser, Protocol)
    given = vars(parser.parse_args(arguments))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    what = What(**{k: v for k, v in given.items() if k in What.__dataclass_fields__})
    given = {k: v for k, v in given.items() if k in Protocol.__dataclass_fields__}
    try:
        if what.score:
            rescore(Path(what.score))
            return 0
        if not what.model:
            world = toy.defaults()
            what.model, what.data = world["model"], what.data or ("" if what.image else world["eval_data"])
            given = dict(max_pixels=toy.BUDGET, min_pixels=toy.BUDGET, penalty=1.0, batch=64,
                         perceive_tokens=world["perceive_tokens"], reason_tokens=world["reason_tokens"]) | given
            print("no --model: this is the embedded toy, which knows nothing but the striped signs of its own small world")
        if not what.data and not what.image:
            raise InputError("--model needs --data (a benchmark, or questions of your own), or --image and --question")
        how = Protocol(**given)
        how.check()
        run_picture(what, how) if what.image else run_data(what, how)
    except (InputError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
