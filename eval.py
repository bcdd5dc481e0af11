"""What an example is, how it is loaded, what counts as correct, and accuracy on a set.

The reward of training *is* the check of evaluation: both call `score`. Training rewards exactly
what the tables report, in the format that the tables expect.

Data is JSONL, one example a line:

    image        path of the image, relative to the data file (or to --images)
    question     text
    answer       text: an option letter, a number, or a word or short phrase
    answer_form  "mca" (option letter), "na" (number) or "free_form" (default)
    options      optional list of texts, shown as A., B., C. ...
    category, id optional, for reports
    boxes        optional list of [x1, y1, x2, y2], 0..1000: where the evidence is. Only for
                 measuring (`hit`, `oracle`); no training code reads it.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps
from tqdm import tqdm

from crop import MAX_RATIO, Box, parse_boxes
from rollout import FORMS, InputError, perceive, reason

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
    id: str = ""
    boxes: tuple = ()     # of Box; only ever used to measure
    size: tuple = field(default=(), compare=False)  # (width, height) of the image, from its header

    def load_image(self):
        """The image at its original resolution, upright, as RGB. Raises InputError."""
        try:
            with open_image(self.image) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:  # Pillow raises a dozen kinds for a broken file
            raise InputError(f"cannot read the image {self.image} of example {self.id}: {error}") from error


def open_image(file):
    """Image.open, but an InputError above Pillow's limit of 89 million pixels (8K photos have 33 to 60), up to twice which Pillow
    itself only warns: a "decompression bomb" is a few kilobytes that unpack to gigabytes."""
    image = Image.open(file)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise InputError(f"{image.width} x {image.height} pixels: the limit, against decompression bombs, is {Image.MAX_IMAGE_PIXELS}")
    return image


def inside(root, name):
    """root / name, links resolved. Raises InputError if that leaves the folder `root`: data must not name files elsewhere.
    (The files of a hub snapshot are links into its repository's folder, which counts as inside.)"""
    path, top = (root / name).resolve(), root.resolve()
    if not path.is_relative_to(top.parent.parent if top.parent.name == "snapshots" else top):
        raise InputError(f"it leaves the folder {root}; --images names the folder that holds all images")
    return path


def load_data(path, images=None):
    """A JSONL file, or a folder that holds data.jsonl -> list of Example.

    Every line and every image header is checked now, before a model is loaded; pixels stay on disk.
    Raises InputError that names file, line and field.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "data.jsonl"
    if not path.is_file():
        raise InputError(f"there is no data file {path}")
    root = Path(images) if images else path.parent
    examples = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                examples.append(_read_line(line, root, f"{path}, line {number}", number))
    if not examples:
        raise InputError(f"the data file {path} is empty")
    return examples


def _read_line(line, root, where, number):
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not a JSON object ({error})") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object but a {type(row).__name__}")
    for name in ("image", "question", "answer"):
        if name not in row:
            raise InputError(f"{where}: the field {name!r} is missing")
        if not isinstance(row[name], str) and not (name == "answer" and _is_number(row[name])):
            raise InputError(f"{where}: the field {name!r} must be text, not {row[name]!r}")
        if not str(row[name]).strip():
            raise InputError(f"{where}: the field {name!r} is empty")
    form = row.get("answer_form", "free_form")
    if not isinstance(form, str) or form not in FORMS:
        raise InputError(f"{where}: the field 'answer_form' must be one of {', '.join(FORMS)}, not {form!r}")
    options = row.get("options") or []
    if not isinstance(options, list) or len(options) > len(LETTERS) or not all(isinstance(o, str) for o in options):
        raise InputError(f"{where}: the field 'options' must be a list of at most {len(LETTERS)} texts, not {options!r}")
    boxes = row.get("boxes") or []
    for box in boxes if isinstance(boxes, list) else [None]:
        if not (isinstance(box, list) and len(box) == 4 and all(_is_number(v) and 0 <= v <= 1000 for v in box)
                and box[0] < box[2] and box[1] < box[3]):
            raise InputError(f"{where}: the field 'boxes' must be a list of [x1, y1, x2, y2] between 0 and 1000 with "
                             f"x1 < x2 and y1 < y2, not {boxes!r}")
    try:
        image = inside(root, row["image"])
        with open_image(image) as header:
            width, height = header.size
    except Exception as error:  # Pillow raises a dozen kinds for a broken file
        raise InputError(f"{where}: the field 'image' names {row['image']}, which cannot be read: {error}") from error
    if max(width, height) > MAX_RATIO * min(width, height):
        raise InputError(f"{where}: the field 'image' names {image}, which is {width} x {height}: Qwen3-VL takes images up to "
                         f"{MAX_RATIO} times as long as wide")
    answer = str(row["answer"])
    if form == "free_form" and not plain_words(answer):
        raise InputError(f"{where}: the field 'answer' is {answer!r}, which holds no word to compare with")
    if form == "mca" and option_letter(answer, options) is None:
        raise InputError(f"{where}: the field 'answer' is {answer!r}, which names no option letter A to F")
    if form == "mca" and options and option_letter(answer, options) not in LETTERS[:len(options)]:
        raise InputError(f"{where}: the field 'answer' is {answer!r}, but there are only {len(options)} options")
    if form == "na" and number_in(answer) is None:
        raise InputError(f"{where}: the field 'answer' is {answer!r}, which is not a number")
    question = "\n".join([row["question"].strip(), *(f"{letter}. {o}" for letter, o in zip(LETTERS, options))])
    return Example(image, question, answer, form, tuple(options), str(row.get("category", "")),
                   str(row.get("id", number)), tuple(Box(*map(float, box)) for box in boxes), (width, height))


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------
# What counts as correct


class Score(NamedTuple):
    reward: float    # 1.0 or 0.0
    answered: bool   # False: no <answer>..</answer> in the text, which earns 0 and is counted


def score(text, example):
    """A Reasoner's text -> Score. Training's reward and evaluation's verdict are this one function.

    Only what stands inside the last <answer>..</answer> counts. (The authors score the whole text
    in training where the tags are missing, and call it wrong in evaluation.)
    """
    before, closing, _ = text.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    if not closing or not opening:
        return Score(0.0, False)
    return Score(float(correct(answer, example)), True)


def correct(answer, example):
    """Is this answer the example's answer? The rule depends on the example's answer_form."""
    if example.answer_form == "mca":
        letter = option_letter(answer, example.options)
        return letter is not None and letter == option_letter(example.answer, example.options)
    if example.answer_form == "na":
        given, true = number_in(answer), number_in(example.answer)
        return given is not None and abs(given - true) <= 1e-6 * max(1.0, abs(true))
    if example.answer_form != "free_form":
        raise InputError(f"the answer form {example.answer_form!r} of example {example.id} is unknown")
    return plain_words(answer) == plain_words(example.answer) != ""


_LETTER = re.compile(r"(?:(?:the )?(?:(?:final|correct|right|best) )?(?:answer|option|choice)(?: is)?:? ?)?"
                     r"\(?([a-f])(?:\)|\.|:|\))*(?: .*)?", re.IGNORECASE)


def option_letter(text, options=()):
    """The one option letter A..F that a text names, or None.

    Accepts "C", "c", "(C)", "C.", "C. blue", "**C**", "The answer is C" and the full text of an
    option. Refuses "A or B", "Apple", "A blue car", "" and letters somewhere in a sentence.
    """
    text = " ".join(text.replace("*", " ").split()).rstrip(" .")
    matches = [letter for letter, option in zip(LETTERS, options) if plain_words(option) == plain_words(text) != ""]
    if len(matches) == 1 and not re.match(r"\(?\w[).:]", text):  # an option's own text, without a letter before it
        return matches[0]
    found = _LETTER.fullmatch(text)
    if not found:
        return None
    letter, rest = found[1].upper(), text[found.end(1):]
    if not rest.strip(").: "):                                  # "C", "(C)", "C."
        return letter
    own = dict(zip(LETTERS, options)).get(letter, "")
    if plain_words(rest) == plain_words(own) != "":             # "C. Vitamin C", its own option
        return letter
    marked = re.match(r"\s?[).:]", rest)                        # "C. blue", but not "A blue car"
    second = re.search(r"\b(or|and)\b|\b[A-F]\b", rest)       # "A. or B."
    return letter if marked and not second else None


def number_in(text):
    """The one number of a text, units allowed ("1,200 m" -> 1200.0), or None for none or several."""
    numbers = re.findall(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)", text.replace("\u2212", "-"))
    return float(numbers[0].replace(",", "")) if len(numbers) == 1 else None


def plain_words(text):
    """Lower case, without punctuation at the ends of words, extra spaces and a leading article."""
    words = [bare for word in text.casefold().split() if (bare := word.strip(".,;:!?\"'`()[]*"))]
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


# ---------------------------------------------------------------------------------------------
# Accuracy on a set


def hits(boxes, example):
    """Does the first predicted box contain the centre of the first true box?"""
    true = example.boxes[0]
    x, y = (true.x1 + true.x2) / 2, (true.y1 + true.y2) / 2
    return bool(boxes) and boxes[0].x1 <= x <= boxes[0].x2 and boxes[0].y1 <= y <= boxes[0].y2


def evaluate(model, codec, examples, *, perceive_tokens, reason_tokens, batch):
    """Greedy accuracy of one model in both roles. Returns fractions, or None where not measurable:

    p2r     perceive, crop, reason: the method
    hit     the first box contains the centre of the asked object (needs `boxes`)
    plain   reason on the plain image, without boxes: the baseline
    oracle  reason with the true boxes: what the Reasoner could do with a perfect Perceiver
    n       number of examples; unparsable, unanswered: shares of the p2r outputs
    """
    answer_how = dict(greedy=True, max_tokens=reason_tokens, batch=batch)

    def run(name, groups, count):
        bar = tqdm(groups, f"eval {name}", total=count, leave=False, unit="q")
        return [group.completions[0].text for group in bar]

    def accuracy(name, cases):
        scores = [score(text, e) for text, (e, _) in zip(run(name, reason(model, codec, cases, **answer_how),
                                                             len(cases)), cases)]
        return mean(s.reward for s in scores), mean(not s.answered for s in scores)

    parsed = [parse_boxes(text) for text in run("boxes", perceive(
        model, codec, examples, greedy=True, max_tokens=perceive_tokens, batch=batch), len(examples))]
    known = [e for e in examples if e.boxes]
    p2r, unanswered = accuracy("p2r", [(e, p.boxes) for e, p in zip(examples, parsed)])
    return {
        "p2r": p2r,
        "hit": mean(hits(p.boxes, e) for e, p in zip(examples, parsed) if e.boxes),
        "plain": accuracy("plain", [(e, ()) for e in examples])[0],
        "oracle": accuracy("oracle", [(e, e.boxes) for e in known])[0],
        "n": len(examples),
        "unparsable": mean(not p.parsable for p in parsed),
        "unanswered": unanswered,
    }


def print_table(report):
    """Print p2r_min's report as a small table: {"before": ..., "during": [...], "after": ...} of `evaluate` results."""
    rows = {"before": report["before"], **{f"step {r['step']}": r for r in report["during"]}, "after": report["after"]}
    print(f"\n{'held-out, n = ' + str(report['after']['n']):52}" + "".join(f"{name:>9}" for name in rows))
    for name, text in (("p2r", "perceive, then reason"), ("hit", "first box contains the asked object's centre"),
                       ("plain", "reason on the plain image"), ("oracle", "reason with the true boxes")):
        cells = ("-" if row[name] is None else f"{row[name]:.3f}" for row in rows.values())
        print(f"{name:7}{text:45}" + "".join(f"{cell:>9}" for cell in cells))


def mean(values):
    """The mean of some numbers as a float, or None of none at all."""
    values = [float(v) for v in values]
    return sum(values) / len(values) if values else None
