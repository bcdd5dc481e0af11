"""What an example is, what counts as correct, how a model is asked, and accuracy.

    python eval.py --model M --data SPEC    # a benchmark's table; --mode p2r, think, direct, oracle
    python eval.py --model M --image photo.jpg --question "What is written on the red sign?"

The reward of training *is* the check of evaluation: both call `grade`. (They differ where a frozen
Reasoner forgot its tags, see `score`, and in who is asked about other words, see --judge.) After
the line that says "skip on a first reading" follow: how a model is asked, in evaluation; how a
letter, a number and words are read; data files; the papers' tables, and where our protocol differs
from the authors'; the command line.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import argparse
import ast
import base64
import contextlib
import csv
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import string
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

# (As in p2r_min.py, for a table that grows.)
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

import toy
from crop import COLOURS, MAX_CROPS, MAX_RATIO, Box, picture, to_rect, to_rgb
from rollout import (DATA_FILES, FORMS, REGIONS, SHARD, InputError, cached, direct, find, load,
                     need, one_data_set, out_of_memory, perceive, reason)

HERE = Path(__file__).parent
LETTERS = "ABCDEF"  # no benchmark gives more than six options


@dataclass(frozen=True)
class Example:
    """One question about one image. Everything that trains or measures works on these."""
    image: Path
    question: str                    # with its options, as the model reads it
    answer: str                      # the truth
    answer_form: str = "free_form"   # free_form (words), mca (an option's letter) or na (a number)
    options: tuple = ()              # their texts, without letters
    category: str = ""
    rotation: str = ""               # HR-Bench asks each question four times, its options rotated
    id: str = ""
    boxes: tuple = ()                # of crop.Box: where the evidence is. Only ever used to measure

    def load_image(self):
        """The image at its original resolution, upright, as RGB. Raises InputError."""
        try:
            with Image.open(self.image) as image:
                return to_rgb(image)
        except Exception as error:  # Pillow raises a dozen kinds for a broken file
            raise InputError(f"cannot read the image {self.image} of example {self.id} ({error}): "
                             f"mend it, or go on with --skip-bad, which leaves it out") from error


# ---------------------------------------------------------------------------------------------
# What counts as correct


class Score(NamedTuple):
    """The verdict on one text."""
    reward: float         # 1.0 or 0.0
    answered: bool        # False: there is no <answer>..</answer> in the text
    open: bool = False    # free-form, in other words than the truth: a judge may still accept it
    judged: bool = False  # a judge was asked


def grade(pairs, judge=None, whole_text=False):
    """(text, example) pairs -> a Score each. Training's reward and evaluation's verdict are this.

    `score` decides everything except free-form answers in other words than the truth: those go to
    the judge, all in one call, and are wrong where there is none.
    """
    pairs = list(pairs)
    scores = [score(text, example, whole_text) for text, example in pairs]

    # The judge sees the answer alone, never the reasoning that led to it.
    unsettled = [i for i, verdict in enumerate(scores) if verdict.open]
    if judge and unsettled:
        cases = [(answer_in(pairs[i][0], whole_text), pairs[i][1]) for i in unsettled]
        for i, yes in zip(unsettled, judge(cases)):
            scores[i] = Score(float(yes), scores[i].answered, judged=True)
    return scores


def score(text, example, whole_text=False):
    """One text -> Score. What stands inside the last <answer>..</answer> counts, and nothing else.

    whole_text: of a text without these tags all that follows its thoughts is read. So it is with
    the frozen Reasoner of the perception phase, as the authors do: it cannot learn the tags, and
    the Perceiver should not pay for them. The trained role and evaluation need the tags.
    """
    answer = answer_in(text, whole_text)
    answered = answer_in(text) is not None
    if answer is None:
        return Score(0.0, answered)

    # All or nothing: there is no partial credit for a format, a length or a near miss.
    right = correct(answer, example)

    # A judge is only asked about a short phrase. One that is long, or that would put control tokens
    # into the judge's prompt, is wrong unasked.
    short = 0 < len(answer.split()) <= 20 and len(answer) <= 200 and "<|" not in answer
    is_open = example.answer_form == "free_form" and short and not right
    return Score(float(right), answered, open=is_open)


def answer_in(text, whole_text=False):
    """What stands inside the last closed <answer>..</answer>, or None.

    With whole_text a text without these tags is an answer itself, but for its <think>..</think>;
    an empty one, if it never stopped thinking.
    """
    # Two searches from the end: linear, however many tags a text may hold.
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return text[start + len("<answer>"):].partition("</answer>")[0].strip()
    if whole_text:
        said = text.rpartition("</think>")[2]
        return "" if "<think>" in said else said.replace("<answer>", "").strip()
    return None


def correct(answer, example):
    """Is this answer the example's: the same letter, the same number, or the same words?"""
    # The truth is read by the same rule as the answer, so "(B)" and "B. blue" are truths, too.
    if example.answer_form == "mca":
        letter = option_letter(answer, example.options)
        return letter is not None and letter == option_letter(example.answer, example.options)
    if example.answer_form == "na":
        return same_number(answer, example.answer)
    if example.answer_form != "free_form":
        raise InputError(f"example {example.id}: {example.answer_form!r} is no answer form")
    words = plain_words(answer)
    return bool(words) and without_article(words) == without_article(plain_words(example.answer))


# =============================================================================================
# Skip on a first reading: asking a model, and accuracy; how answers are read; the judge; data
# files; benchmark tables; the command line
#
# Asking a model

MODES = ("p2r", "think", "direct", "oracle")

# Batches that are answered before any of them is handed out: a run that is killed loses no more.
CHUNK = 4


@dataclass(frozen=True)
class Protocol:
    """How a model is asked. The defaults are the authors' evaluation."""
    # How the model is asked
    mode: str = "p2r"             # p2r: two stages; think or direct: think and answer, or answer at
                                  # once, on the plain image; oracle: reason with the true boxes
    evidence: str = "both"        # what the Reasoner sees: both, annotated, crops or none
    max_pixels: int = 4_194_304   # pixel budget of every image the model sees, crops too
    perceive_tokens: int = 256    # longest Perceiver response
    reason_tokens: int = 1024     # longest Reasoner response
    penalty: float = 1.05         # repetition penalty; 1: none
    batch: int = 8                # questions asked together

    def check(self):
        """Raises InputError for the first setting that cannot work."""
        need(self.mode in MODES, f"--mode {self.mode} is not one of {', '.join(MODES)}")
        need(self.evidence in REGIONS,
             f"--evidence {self.evidence} is not one of {', '.join(REGIONS)}")
        check_numbers(self)


def ask(model, codec, examples, protocol, judge=None):
    """Yields a record, a dict ready for JSON, for each Example. Greedy, so nothing is drawn. (In
    bf16 near ties may fall otherwise where other questions share the batch.)

    boxes are the Perceiver's (or, in mode "oracle", the true ones), perceived and reasoned the two
    texts; parsable is None where no boxes were asked for.
    """
    limits = dict(greedy=True, rows=protocol.batch, penalty=protocol.penalty)
    size = CHUNK * protocol.batch
    for start in range(0, len(examples), size):
        chunk = examples[start:start + size]

        # 1. Boxes: the Perceiver's, the true ones, or none.
        looks = [None] * len(chunk)
        boxes = [()] * len(chunk)
        if protocol.mode == "oracle":
            boxes = [example.boxes for example in chunk]
        elif protocol.mode == "p2r":
            groups = perceive(model, codec, chunk, max_tokens=protocol.perceive_tokens, **limits)
            looks = [group.completions[0] for group in groups]
            boxes = [look.parsed.boxes for look in looks]

        # 2. The answer.
        if protocol.mode == "direct":
            groups = direct(model, codec, chunk, max_tokens=protocol.reason_tokens, **limits)
        else:
            groups = reason(model, codec, list(zip(chunk, boxes)), protocol.evidence,
                            max_tokens=protocol.reason_tokens, **limits)
        texts = [group.completions[0].text for group in groups]

        # 3. The verdict, and all that is needed to look into it later. In mode direct nobody asks
        #    for tags: the whole text is the answer, but for what a model thinks unasked.
        whole_text = protocol.mode == "direct"
        scores = grade(zip(texts, chunk), judge, whole_text)
        for example, look, found, text, verdict in zip(chunk, looks, boxes, texts, scores):
            record = {name: getattr(example, name) for name in
                      ("id", "category", "rotation", "question", "answer", "answer_form")}
            yield record | {
                "image": str(example.image), "options": list(example.options),
                "boxes": [list(box) for box in found],
                "parsable": look and look.parsed.parsable, "perceived": look and look.text,
                "reasoned": text, "reward": verdict.reward,
                "answered": verdict.answered or whole_text, "judged": verdict.judged}


# ---------------------------------------------------------------------------------------------
# Accuracy


def hits(boxes, example):
    """Is the centre of every true box inside one of the predicted boxes that are cropped?"""
    # The centre, not the overlap: a box may be generous, and its crop is larger still.
    for true in example.boxes:
        x, y = (true.x1 + true.x2) / 2, (true.y1 + true.y2) / 2
        if not any(b[0] <= x <= b[2] and b[1] <= y <= b[3] for b in boxes[:MAX_CROPS]):
            return False
    return True


def evaluate(model, codec, examples, protocol, judge=None):
    """Accuracy of one model in both roles, for training's report: fractions, or None where no
    example can tell.

    p2r     perceive, crop, reason: the method
    hit     the first three boxes contain the centres of all true boxes (needs `boxes`)
    plain   reason on the plain image, without boxes (mode "think"): the baseline
    oracle  reason with the true boxes: what the Reasoner could do with a perfect Perceiver
    n       number of examples; unparsable, unanswered: shares of the p2r outputs
    categories: {category: [p2r, plain]}
    """
    # The same questions three times; the true boxes only where there are any.
    boxed = [example for example in examples if example.boxes]
    asked = {}
    for mode, some in (("p2r", examples), ("think", examples), ("oracle", boxed)):
        records = ask(model, codec, some, dataclasses.replace(protocol, mode=mode), judge)
        asked[mode] = list(tqdm(records, f"eval {mode}", total=len(some), leave=False, unit="q",
                                  disable=None))

    # By category: the method and the baseline side by side.
    categories = {}
    for category in sorted({example.category for example in examples}):
        categories[category] = []
        for mode in ("p2r", "think"):
            rewards = [r["reward"] for r in asked[mode] if r["category"] == category]
            categories[category].append(mean(rewards))

    # All fractions are of the examples asked; "hit" only of those with true boxes.
    pairs = zip(asked["p2r"], examples)
    return {
        "p2r": mean(r["reward"] for r in asked["p2r"]),
        "hit": mean(hits(r["boxes"], example) for r, example in pairs if example.boxes),
        "plain": mean(r["reward"] for r in asked["think"]),
        "oracle": mean(r["reward"] for r in asked["oracle"]),
        "n": len(examples),
        "unparsable": mean(not r["parsable"] for r in asked["p2r"]),
        "unanswered": mean(not r["answered"] for r in asked["p2r"]),
        "categories": categories,
    }


def mean(values):
    """The mean of some numbers as a float, or None of none at all."""
    values = [float(value) for value in values]
    return sum(values) / len(values) if values else None


# ---------------------------------------------------------------------------------------------
# How a letter, a number and words are read

# In characters. A longer text is an essay, which is not read for a letter or a number. It also
# bounds the time that any pattern below can take.
LONGEST = 1000

# With these an answer takes itself back, or keeps a second way open. It earns nothing.
DOUBT = re.compile(
    r"\b(?:not|nor|neither|none|never|or|either|maybe|perhaps|possibly|might|may|could|cannot"
    r"|unsure|unclear|unlikely|unknown|doubt|wrong|incorrect|wait|except|instead|rather|but"
    r"|than|without|unlike|lacks|opposite|far|no(?!\.? ?\d))\b|n't\b|n/a\b|\bn\.a\b|[?不非]",
    re.IGNORECASE)

# A letter names an option where it comes first, in brackets or after one of a few words, and where
# then the text ends or pauses. "A blue car" and "vitamin C" name nothing.
CUE = (r"^\W*|[(:,;=是为选项案]\s*|(?i:\b(?:is|be|it's|say|with|choose|pick|select|option|answer"
       r"|ans|choice|letter|so|therefore|thus|hence|definitely|clearly|surely|probably)\W{1,3})")
PAUSE = r"\s*(?:[).:,;!=>·。]|'(?!\w)|\W*$|(?:because|since|as|is|and|or)\b)|\s-|-\s"
NAMED = re.compile(rf"(?:{CUE})([A-F](?!\.\w\.)(?={PAUSE})|[a-f](?=[).:,;!]+(?:\s|$)|$))")

# Any other capital that stands alone is only mentioned. "A cat" mentions no letter.
MENTIONED = re.compile(r"(?<![\w°'])(?:A(?!\s\w)|[B-F])(?![\w'])")


def option_letter(text, options=()):
    """The one option A..F that a text names, by its letter or in the option's own words, or None.

    All that the text names must be the same option, and no word of doubt may be left beside it:
    "D", "(d) blue", "The answer is D.", "It is blue" and "blue (D)" are read; "B or C", "not A",
    "A blue" (another option's text), an essay and what names nothing are refused.
    """
    if len(text) > LONGEST:
        return None
    text = undressed(text)
    texts = [plain_words(undressed(option)) for option in options]
    texts = dict(zip(LETTERS, texts))
    letters = LETTERS[:len(options)] or LETTERS  # where options are not known, any may be meant

    # 1. An option's own text and nothing else, with or without its letter.
    said, own = plain_words(text), []
    for letter, words in texts.items():
        if said in (words, f"{letter.lower()} {words}"):
            own.append(letter)
    if len(own) == 1 and said.upper() not in letters and "?" not in text:
        return own[0]

    # 2. Options' own words anywhere. They are set aside, the longest first: "red and blue" is not
    #    "red", and what they say raises no doubt. (A letter as an option's text is still a letter.)
    named = set()
    for letter, words in sorted(texts.items(), key=lambda pair: -len(pair[1])):
        core = without_article(words)
        own_letter = len(words) == 1 and words.upper() in letters
        if words and not own_letter and list(texts.values()).count(words) == 1:
            phrase = r"\W+".join(re.escape(word) for word in core.split())
            if core != words:
                phrase = rf"(?:{words.split()[0]}\W+)?{phrase}"
            phrase = rf"(?<![\w+-])(?<!\d[.,]){phrase}(?![\w%]|-\w|[.,:/]\d)"
            text, times = re.subn(phrase, "·", text, flags=re.IGNORECASE)
            if times:
                named.add(letter)

    # 3. Letters. One that is only mentioned names nothing, but must not contradict. Of four options
    #    none is F: that is a letter on a sign.
    for match in NAMED.finditer(text):
        named.add(match[1].upper())
    named &= set(letters)
    mentioned = set(MENTIONED.findall(text)) & set(letters)

    # 4. What is left must be short: in an essay some option is always named by chance.
    if len(named) != 1 or mentioned - named or DOUBT.search(text) or len(text.split()) > 25:
        return None
    return named.pop()


# Bigger number words are left out: "twenty-one" would need a grammar, and is refused instead.
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
POWERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}

# Digits with what may belong to them. What stands directly before and behind must not make another
# number of it: not a time, a date, a range, a power, a version, a name such as x5.
NUMBER = re.compile(rf"""
    (?<![\w,/:^])(?<!\d\.)(?<!-\ )                                     # not inside something else
    (?P<sign>[-+]?)[€£]?
    (?P<digits>\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?|\d{{1,3}}(?:\ \d{{3}})+|\d+(?:\.\d+)?|\.\d+)
    (?P<exponent>e[-+]?\d{{1,2}}\b)?
    (?:\ (?P<over>\d+)/(?P<under>\d+)|\ ?/\ ?(?P<below>\d+))?          # 3 1/2, or 1/2
    (?![\d/_^+]|[.,:]\d|(?-i:\ ?[kKMB]\b))                             # not 12:30, 10^2, 3+, 3k
    \ ?(?P<percent>%|percent\b)?(?P<powers>(?:\ ?(?:{"|".join(POWERS)})s?\b)*)
    """, re.IGNORECASE | re.VERBOSE)

# Limits, and words of numbers that are not read: half a number must not be taken for the whole.
NO_NUMBER = re.compile(
    r"[<>≤≥]|\b(?:less|more|fewer|least|most|up to|over|under|almost|nearly|half|quarter"
    r"|third|\w+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)\b", re.IGNORECASE)


def number_in(text):
    """The one number of a text as (exact Fraction, has a percent sign), or None.

    "1,200 m", "10 000", "-2.5", "3/4", "3½", "75%", "1.5e3", "$5", "2 million", "three people".
    None for no number, several, a range, a limit ("at least 3") and a word of doubt.
    """
    text = undressed(text) if len(text) <= LONGEST else ""
    if DOUBT.search(text) or NO_NUMBER.search(text):
        return None

    # Words become digits. "One" is a number at the start or after a few words; else ("the red one")
    # it stands for a thing.
    text = re.sub(r"\b(?:minus|negative) ", "-", text, flags=re.IGNORECASE)
    one = r"(^|\b(?:is|are|only|just|exactly|and) |: ?)one\b"
    text = re.sub(one, r"\g<1>1", text, flags=re.IGNORECASE)
    for value, word in enumerate(WORDS):
        if word != "one":
            text = re.sub(rf"\b{word}\b", str(value), text, flags=re.IGNORECASE)
    text = re.sub(r"\b(\d+) ?\( ?\1 ?\)", r"\1", text)  # "three (3)" is one number

    # Exactly one number, and no digit before it. (After it there may be one, as in "5 m2".)
    found = list(NUMBER.finditer(text))
    if len(found) != 1 or re.search(r"\d", text[:found[0].start()]):
        return None

    # A whole number with a fraction behind it is a sum, a fraction alone a quotient. Both are kept
    # exactly, so no rounding decides: 0.1 and 1/10 are one number.
    part = found[0].groupdict()
    below = int(part["below"] or part["under"] or 1)
    if below == 0:
        return None
    value = Fraction(re.sub("[, ]", "", part["digits"]) + (part["exponent"] or ""))
    value = value / below if part["below"] else value + Fraction(int(part["over"] or 0), below)

    # "Three hundred thousand": each word multiplies.
    for power in part["powers"].lower().split():
        value *= POWERS[power.removesuffix("s")]
    return (-value if part["sign"] == "-" else value), bool(part["percent"])


def same_number(answer, truth):
    """Whole numbers exactly, others to one part in a million."""
    a, b = number_in(answer), number_in(truth)
    if a is None or b is None:
        return False
    (x, x_percent), (y, y_percent) = a, b

    # 75% is 0.75; where only one of the two has the sign, it may also be meant as 75.
    pairs = [(x, y)]
    if x_percent and not y_percent:
        pairs.append((x / 100, y))
    if y_percent and not x_percent:
        pairs.append((x, y / 100))
    for value, true_value in pairs:
        whole = value.denominator == true_value.denominator == 1
        close = abs(value - true_value) <= abs(true_value) / 10**6
        if value == true_value or (close and not whole):
            return True
    return False


def undressed(text):
    """An answer on one line without LaTeX, HTML, markdown and quotes; fractions as 1/2."""
    # A bullet is not a minus. A small 2 above the line must not become a digit of the number before
    # it, nor ½: 10² is not 102, and 3½ not 31/2.
    text = re.sub(r"^\s*[-•]\s+", "", text)
    text = re.sub("[¹²³⁰⁴-⁹]+", "^", text)
    text = re.sub("([¼-¾⅐-⅞])", r" \1", text)

    # One form for characters that look alike: wide letters, dashes, spaces of all kinds.
    text = unicodedata.normalize("NFKC", text).translate(str.maketrans("’⁄−–—", "'/---"))

    # Markup goes. Dollars too: they stand around LaTeX more often than before money.
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r" \1/\2", text)
    text = re.sub(r"</?[a-z][^<>]{0,80}>|\\(?:boxed|text\w*|math\w*|left|right)", " ", text)
    text = re.sub(r'\b_+|_+\b|[*`#"“”{}\[\]\\|]', " ", text.replace("$", ""))

    # A new line is a pause.
    return " ".join(re.sub(r"\s*[\n\r]\s*", "; ", text.strip()).split())


# Punctuation that never belongs to a word, but for the # of C#. $ + - % and the dot may: "-5",
# "$5", "C++", ".5".
MARKS = "!\"#&'()*,/:;<=>?@[\\]^_`{|}~“”‘’«»…。、·¿¡—–"


def plain_words(text):
    """Lower case, one form of each character, no punctuation around words, single spaces."""
    # A dash before a digit is a minus or a hyphen, never punctuation.
    text = unicodedata.normalize("NFKC", text).replace("’", "'").replace("−", "-")
    text = re.sub("[–—](?=[0-9])", "-", text)

    # Character by character from both ends, not by a pattern: linear in the length of any text.
    words = []
    for whole in text.casefold().split():
        word = whole.rstrip(MARKS + "$-.")
        bare = word.lstrip(MARKS + ".")

        # "B-" and "C#" are not "B" and "C".
        sign = whole[len(word):len(word) + 1]
        if len(bare) == 1 and bare.isalpha() and sign in ("-", "#"):
            bare += sign

        # A decimal point is no punctuation: ".5" is not "5".
        if bare[:1].isdigit() and word.endswith("." + bare):
            bare = "." + bare
        words.append(bare)
    return " ".join(word for word in words if word)


def without_article(words):
    """Plain words without a leading article, unless that is all or stands before a number."""
    article, _, rest = words.partition(" ")
    return rest if article in ("a", "an", "the") and rest[:1].isalpha() else words


# ---------------------------------------------------------------------------------------------
# The judge

JUDGE = """Question: {question}
Correct answer: {truth}
Given answer: {given}

Does the given answer mean the same as the correct answer? Reply with Yes or No."""


class Judge:
    """A frozen language model that says whether an answer in other words is right. Text only.

    The verdict is whichever of Yes and No is more likely as its first token: one forward for a
    batch of answers. In training the default is the frozen copy, which is in memory anyway; the
    paper uses a separate verifier (`--judge MODEL`).
    """

    def __init__(self, model, tokenizer, batch=32):
        self.model, self.tokenizer, self.batch = model, tokenizer, batch

        # Only the first token of a reply is looked at, so there the two must differ.
        self.yes, self.no = (self.tokens(word)[0] for word in ("Yes", "No"))
        need(self.yes != self.no, "--judge: Yes and No begin with the same token of this model's "
                                  "vocabulary; choose another")

    @classmethod
    def load(cls, name, device):
        """A hub id or folder of a chat model, text or vision -> Judge. Raises InputError."""
        folder = find(name, "--judge")

        # Safetensors only and no code of the repository's own: a judge is somebody else's file.
        safe = {"trust_remote_code": False}
        try:
            config = transformers.AutoConfig.from_pretrained(folder, **safe)
            kind = transformers.AutoModelForCausalLM
            if hasattr(config, "vision_config"):
                kind = transformers.AutoModelForImageTextToText
            dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
            model = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, **safe)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **safe)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            problem = " ".join(str(error).split())
            raise InputError(f"--judge {name} cannot be loaded: {problem}") from error
        need(tokenizer.chat_template, f"--judge {name} has no chat template: choose an instruction-"
                                      f"tuned model")
        return cls(model.to(device).eval().requires_grad_(False), tokenizer)

    def tokens(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def __call__(self, cases):
        """(answer, example) pairs -> a bool each."""
        # White space in an answer is flattened: it could imitate the lines of the prompt.
        texts = []
        for answer, example in cases:
            given = " ".join(answer.split())
            texts.append(JUDGE.format(
                question=example.question, truth=example.answer, given=given))

        # Equal cases are one: in bf16 even the padding of a batch can turn a verdict, and equal
        # answers of a group must earn the same.
        verdict_on, distinct = {}, list(dict.fromkeys(texts))
        for start in range(0, len(distinct), self.batch):
            part, rows = distinct[start:start + self.batch], []
            for text in part:
                rows.append(self.tokens(self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False,
                    add_generation_prompt=True, enable_thinking=False)))

            # Padded on the left, so that the last column is every row's last token; positions
            # count from its first.
            width = max(len(row) for row in rows)
            pads = [width - len(row) for row in rows]
            ids = torch.tensor([[self.no] * pad + row for pad, row in zip(pads, rows)])    # (B, P)
            mask = torch.arange(width)[None] >= torch.tensor(pads)[:, None]                # (B, P)
            ids, mask = ids.to(self.model.device), mask.long().to(self.model.device)
            positions = (mask.cumsum(1) - 1).clamp(min=0)                                  # (B, P)
            logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions,
                                use_cache=False, logits_to_keep=1).logits[:, -1]           # (B, V)
            verdicts = (logits[:, self.yes] > logits[:, self.no]).tolist()
            verdict_on |= dict(zip(part, verdicts))
        return [verdict_on[text] for text in texts]


def check_numbers(settings, may_be_0=()):
    """Raises InputError for the first number of a dataclass that is negative, not finite, or 0."""
    for field in dataclasses.fields(settings):
        value, flag = getattr(settings, field.name), "--" + field.name.replace("_", "-")
        if field.type in (int, float):
            # (NaN fails every comparison.)
            fine = 0 < value < math.inf or (value == 0 and field.name in may_be_0)
            least = "0 or more" if field.name in may_be_0 else "more than 0"
            need(fine, f"{flag} {value} must be finite, and {least}")


# ---------------------------------------------------------------------------------------------
# Data files. SPEC is a file, a folder that holds one, or a hub id (owner/name, owner/name/file).

# A field of Example: the columns it is read from. The first that a row has wins, so our own names
# come before those of the data sets that are known.
COLUMNS = {
    "image": ("image", "images", "original_images", "image_path", "bytes"),
    "question": ("question", "problem", "text", "prompt"),            # prompt: chat messages (verl)
    "answer": ("answer", "solution", "label", "reward_model.ground_truth", "ground_truth"),
    "answer_form": ("answer_form", "extra_info.answer_form"),
    "options": ("options", "multi-choice options"),                   # or columns A, B, C, ...
    "category": ("category", "data_source"),
    "rotation": ("cycle_category",),
    "id": ("id", "index", "question_id", "doc_id", "extra_info.index"),
    "boxes": ("boxes",),  # [x1, y1, x2, y2], 0..1000. Only to measure; no training code reads it
}


def load_data(spec, images=None, skip_bad=False, flag="--data"):
    """A file, folder or hub id of questions -> list of Example; prints what was read.

    Every row and every image header is checked now, before a model is loaded; pixels stay on disk.
    images: the folder that relative paths start from; default: the data file's.
    Raises InputError that names file, row and field. With skip_bad bad rows are left out and
    counted, and every image is read to its end, which may be missing.
    """
    examples, bad, used, reread = [], [], {}, []
    for file in data_files(spec, flag):
        kind = "line" if file.suffix == ".jsonl" else "row"
        rows = tqdm(rows_of(file), f"checking {file.name}", delay=2, leave=False,
                    disable=None)

        # Whatever is wrong with a row becomes one sentence that says where it stands.
        for number, row, image in rows:
            try:
                if isinstance(row, InputError):
                    raise row
                example = to_example(row, number, used)
                path = image or inside(Path(images or file.parent), row_value(row, "image")[1])
                problem = image_problem(path, fully=skip_bad)
                need(not problem, f"the field 'image' names {path}, {problem}")
            except InputError as error:
                bad.append(f"{file}, {kind} {number}: {error}")
                need(skip_bad, bad[0])
                continue

            # A number that our own rule cannot read is compared word by word.
            if example.answer_form == "na" and number_in(example.answer) is None:
                reread.append(example.answer)
                example = dataclasses.replace(example, answer_form="free_form")
            examples.append(dataclasses.replace(example, image=path))

    # Say what was read, and from where.
    first = f"the first bad row is {bad[0]}" if bad else "it is empty"
    need(examples, f"{flag} {spec} holds no example; {first}")
    forms = Counter(example.answer_form for example in examples)
    forms = ", ".join(f"{count:,} {form}" for form, count in forms.items())
    renamed = [f"{field} <- {column}" for field, column in used.items() if field != column]
    columns = "; columns " + ", ".join(renamed) if renamed else ""
    print(f"read {len(examples):,} examples from {spec}: {forms}{columns}")
    if reread:
        print(f"answers of form na that are not one number: {len(reread):,}, such as "
              f"{reread[0]!r}; they are compared as free-form")
    if bad:
        print(f"bad rows skipped: {len(bad):,}; the first is {bad[0]}")
    return examples


def data_files(spec, flag="--data"):
    """The files that SPEC names: one, or all shards of one. Raises InputError if it is unclear."""
    # A shard (x-00001-of-00007.parquet) stands for all of them.
    path = find(spec, flag, "dataset")
    if path.is_file():
        base = SHARD.sub("-of-", path.name)
        files = sorted(f for f in path.parent.iterdir() if SHARD.sub("-of-", f.name) == base)
    else:
        inside = [file.relative_to(path).as_posix() for file in path.rglob("*")]
        files = [path / file for file in one_data_set(inside, spec, flag)]
    need(files and files[0].suffix in DATA_FILES,
         f"{flag} {spec}: there is no file that ends in {', '.join(DATA_FILES)}")

    # A part would pass for the whole.
    total = re.search(r"-\d+-of-(\d+)\.\w+$", files[0].name)
    if total:
        numbers = [int(re.search(r"-(\d+)-of-", file.name)[1]) for file in files]
        first = min(numbers[0], 1)  # some begin at 0, some at 1
        wanted = list(range(first, first + int(total[1])))
        need(numbers == wanted, f"{flag} {spec}: of its {len(wanted)} shards {len(files)} are "
                                f"here, with the numbers {numbers}")
    return files


def rows_of(file):
    """(number, row, image) of each row of a data file; a line that is no JSON as its InputError.

    image is the path of an image that was inside the row, else None.
    """
    if file.suffix != ".jsonl":
        yield from unpacked_rows(file)
        return

    # A bad line costs only itself: those after it can still be read.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    row = InputError(f"not a JSON object ({error})")
                yield number, row, None


def table_rows(file):
    """The rows of a .json, .csv, .tsv or .parquet file. Raises InputError."""
    try:
        if file.suffix == ".json":
            rows = json.loads(file.read_bytes())
            need(isinstance(rows, list), f"it holds a {type(rows).__name__}, not a list of rows")
            yield from rows
        elif file.suffix == ".parquet":
            from pyarrow import parquet

            # One row at a time and unbuffered, as images may be inside.
            table = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
            for batch in table.iter_batches(batch_size=1):
                yield from batch.to_pylist()
        else:
            # An image is one field, far beyond the limit that the library sets.
            csv.field_size_limit(1 << 30)
            with file.open(newline="", encoding="utf-8-sig") as text:
                yield from csv.DictReader(text, delimiter="\t" if file.suffix == ".tsv" else ",")
    except ImportError as error:
        raise InputError(f'reading {file} needs pyarrow: pip install -e ".[data]"') from error
    except (csv.Error, ValueError, NotImplementedError, RecursionError, OSError) as error:
        raise InputError(f"{file} cannot be read as {file.suffix[1:]}: {error}") from error


def unpacked_rows(file):
    """`rows_of` a table whose cells may hold images.

    They are written into the cache once, so that from there on there is one loader. VLMEvalKit
    stores an image once; its other rows hold the index of the row that has it.
    """
    def fill(folder):
        places = {}  # a row's index -> the image that is stored in it
        (folder / "images").mkdir()
        with (folder / "rows.jsonl").open("w") as out:
            for row in tqdm(table_rows(file), f"unpacking {file.name}, once", delay=2,
                            disable=None):
                column, cell = row_value(row, "image")
                content, image = encoded_image(cell), None
                if content is not None:
                    # Named by its content, so equal images are one file.
                    image = hashlib.sha256(content).hexdigest()[:32]
                    (folder / "images" / image).write_bytes(content)
                    row[column] = places[str(row.get("index"))] = image

                out.write(json.dumps([row, image], default=json_value) + "\n")
        (folder / "places.json").write_text(json.dumps(places))

    # A file that was changed is another file. The image stands beside its row, not in it: no cell
    # can claim to be one that was unpacked, and so name a path of its own choice.
    state = file.stat()
    key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode()
    folder = cached("rows-2-" + hashlib.sha256(key).hexdigest()[:16], fill)
    places = json.loads((folder / "places.json").read_text())
    with (folder / "rows.jsonl").open() as lines:
        for number, line in enumerate(lines, start=1):
            row, image = json.loads(line)
            image = image or places.get(str(row_value(row, "image")[1]))
            yield number, row, folder / "images" / image if image else None


def json_value(cell):
    """A cell that JSON does not know, as one that it does: bytes as text, a decimal as a number.
    Of anything else (a date, or bytes that are no text) only the type: no field can be one."""
    if isinstance(cell, Decimal):
        return float(cell)
    if isinstance(cell, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return cell.decode()
    return {"type": type(cell).__name__}


def encoded_image(cell):
    """The image inside a cell (bytes, or text in base64) as bytes, or None of any other cell."""
    if isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")

    # Base64 has no dot, and a path's extension has one.
    if isinstance(cell, str) and len(cell) > 64 and "." not in cell[:1000]:
        try:
            cell = base64.b64decode(re.sub(r"^data:[^,]*,|\s", "", cell), validate=True)
        except ValueError:
            return None  # then it is taken for a path, and refused as one
    return cell if isinstance(cell, bytes) else None


def row_value(row, field):
    """(column, value) of a field: the first of its COLUMNS that holds something, or (None, None).
    A dot in a column's name goes inside; NaN is what pandas writes for nothing."""
    for column in COLUMNS[field]:
        value = row
        for key in column.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value not in (None, "", []) and value == value:
            return column, value
    return None, None


def to_example(row, number, used):
    """One raw row -> Example, all but its image. Raises InputError that names the field.

    `used` collects {field: column}.
    """
    need(isinstance(row, dict), f"not a JSON object but a {type(row).__name__}")

    # (The library collects what is too much under None, which JSON calls null.)
    need(None not in row and "null" not in row, "there are more cells than columns in the header")

    # 1. The fields, wherever this data set has them.
    fields = {}
    for field in COLUMNS:
        column, value = row_value(row, field)
        if column:
            fields[field] = value
            used.setdefault(field, column)
    for field in ("image", "question", "answer"):
        need(field in fields, f"the field {field!r} is missing or empty; it is read from "
                              f"{' or '.join(COLUMNS[field])}, of {str(list(row))[:200]}")

    # 2. The question without its options and without sentences on how to answer; then the options,
    #    lettered anew. No text may hold a token that steers the model.
    question, options = question_and_options(row, fields)
    lettered = [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]
    question = "\n".join([question, *lettered])
    controls = CONTROL.findall(question)
    need(not controls, f"the field 'question' holds {' and '.join(controls)}: remove it")

    # 3. The answer, in a form that its text can have. A lone letter without options is an option's
    #    letter whose options were not found, unless the row says that it is not.
    answer = as_text(fields["answer"], "answer")
    answer = (answer_in(answer) or answer).strip()
    form = fields.get("answer_form", "mca" if options else "free_form")
    need(isinstance(form, str) and form in FORMS,
         f"the field 'answer_form' must be one of {', '.join(FORMS)}, not {form!r}")
    lettered = re.fullmatch(r"\(?[A-Fa-f]\)?[.:]?", answer)
    if not lettered and answer in question:
        lettered = re.match(r"\(?[A-F][).:]\s+\S", answer)  # "A. red", options in one line
    need("answer_form" in fields or options or not lettered,
         f"the answer names a letter {answer!r}, but there are no options in the columns "
         f"{', '.join(row)}: give them as 'options', as A, B, ... or as lines of the question, or "
         f"say that 'answer_form' is free_form")

    # A truth that our own rule cannot read would make every answer wrong.
    if form == "mca":
        known = LETTERS[:len(options)] or LETTERS
        need(option_letter(answer, options),
             f"the field 'answer' is {answer!r}, which names no option ({known[0]} to {known[-1]})")
    need(plain_words(answer), f"the field 'answer' is {answer!r}, which holds no word to compare")

    # 4. The rest is only to measure with.
    boxes = []
    for box in as_list(fields.get("boxes", []), "boxes"):
        fine = isinstance(box, list) and len(box) == 4
        fine = fine and all(isinstance(v, (int, float)) and 0 <= v <= 1000 for v in box)
        need(fine and box[0] < box[2] and box[1] < box[3], f"the field 'boxes' must hold [x1, y1, "
             f"x2, y2] between 0 and 1000, x1 < x2 and y1 < y2, not {str(box)[:80]!r}")
        boxes.append(Box(*map(float, box)))
    return Example(
        image=None, question=question, answer=answer, answer_form=form, options=tuple(options),
        category=as_text(fields.get("category", ""), "category"),
        rotation=as_text(fields.get("rotation", ""), "rotation"),
        id=as_text(fields.get("id", number), "id"), boxes=tuple(boxes))


# Half a surrogate pair (JSON can hold one) stops the tokenizer, NUL the file system. And a token
# such as <|im_end|> steers the model.
NO_TEXT = re.compile("[\0\ud800-\udfff]")
CONTROL = re.compile(r"<\|\w+\|>")


def as_text(value, field):
    """A text or number as text. Raises InputError for all else, and for what no tokenizer takes."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    need(isinstance(value, str) or number and field != "question",
         f"the field {field!r} must be text, not {str(value)[:80]!r}")

    # pandas writes a column of whole numbers with a gap in it as 3.0.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    need(not NO_TEXT.search(text),
         f"the field {field!r} holds characters that are no text: {text[:80]!r}")
    return text


def as_list(value, field):
    """A list as it is. A text that holds one (MME-RealWorld-Lite's TSV) is read as Python's."""
    # A literal, never code: literal_eval takes nothing that could act.
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass  # said below
    need(isinstance(value, list), f"the field {field!r} must be a list, not {str(value)[:80]!r}")
    return value


def question_and_options(row, fields):
    """The question's clean text and its options' texts, wherever they stand. Raises InputError."""
    # In chat messages the question is what the user says first, without its images.
    question = fields["question"]
    if isinstance(question, list):
        users = [m for m in question if isinstance(m, dict) and m.get("role") == "user"]
        question = users[0].get("content") if users else None
    if isinstance(question, list):
        parts, question = question, ""
        for part in parts:
            need(isinstance(part, dict),
                 f"the field 'question' holds a chat part that is no object: {str(part)[:80]!r}")
            if part.get("type") != "image":
                question += as_text(part.get("text"), "question")
    question = as_text(question, "question")

    # Options are columns A, B, ..., or a list, or lines of the question.
    letters = [letter for letter in LETTERS if row.get(letter) not in (None, "") and
               row[letter] == row[letter]]
    need("".join(letters) == LETTERS[:len(letters)],
         f"the options {', '.join(letters)} are given, but not those between them")
    options = [row[letter] for letter in letters] or as_list(fields.get("options", []), "options")
    rest, written = split_options(question)
    if not options or len(options) == len(written):  # as a column and in the question: once
        question, options = rest, options or written
    question = clean_question(question)
    need(question, "the field 'question' is empty")
    seventh = row.get("G") if letters == list(LETTERS) else None
    need(len(options) <= len(LETTERS) and (seventh in (None, "") or seventh != seventh),
         f"the field 'options' holds more than {len(LETTERS)}")
    need(len(options) != 1, f"the field 'options' holds one option only: {str(options)[:80]}")
    options = [as_text(option, "options") for option in options]

    # "(A) red" -> "red": letters are given back to all of them alike.
    labels = [re.match(rf"\(?{letter}[).:]\s*", text) for letter, text in zip(LETTERS, options)]
    if all(labels):
        options = [text[label.end():] for label, text in zip(labels, options)]
    return question, options


def inside(root, cell):
    """The path that an image cell names, below the folder `root`. Raises InputError outside it.

    (A hub snapshot's files are links into the `blobs` of its repository, which are let through.)
    """
    if isinstance(cell, list):
        need(len(cell) == 1, f"the field 'image' holds {len(cell)} images; P2R asks about one")
        cell = cell[0]
    if isinstance(cell, dict):
        cell = cell.get("path")
    need(isinstance(cell, str) and len(cell) < 1000,
         f"the field 'image' must be a path, not {str(cell)[:80]!r}")
    path = (root / as_text(cell, "image")).absolute()

    # Neither as written (..) nor where links lead may it lie outside.
    allowed = [root.resolve()]
    for folder in root.resolve().parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("datasets--"):
            allowed.append(folder.parent / "blobs")
    fine = Path(os.path.normpath(path)).is_relative_to(os.path.normpath(root.absolute()))
    fine = fine and any(path.resolve().is_relative_to(folder) for folder in allowed)
    need(fine, f"the field 'image' names {cell}, which lies outside {root}: give --images a folder "
               f"that holds it")
    return path


def image_problem(path, fully=False):
    """Why an image cannot be used, as the end of a sentence, or None. Reads its header, or all."""
    try:
        with Image.open(path) as image:  # refuses "decompression bombs", above 179 million pixels
            (width, height), mode = image.size, image.mode
            if fully:
                to_rgb(image)
    except FileNotFoundError:
        return "which does not exist: --images says where paths start; archives must be unpacked"
    except Exception as error:  # Pillow raises a dozen kinds for a broken file
        return f"which cannot be read: {error}"

    # What the model's image processor, or our conversion to RGB, would stumble over later.
    if max(width, height) > MAX_RATIO * min(width, height):
        return (f"which is {width} x {height}: Qwen3-VL takes images up to {MAX_RATIO} times as "
                f"long as wide")
    if mode == "F":
        return "whose pixels are floating point numbers: convert it to 8 bits a channel"
    return None


# What data sets add to a question to say how to answer, not what is asked. It contradicts our
# prompts. Matched against whole sentences, and narrow: a question must never be lost to it.
INSTRUCTION = re.compile(r"""
      .*(<think>|<answer>|<tool_call>|\\boxed|_tool\b|reasoning\ process).*
    | (.*\b)?(think|reason|explain|answer|solve|work|proceed)\b.*\bstep\ by\ step\b.*
    | (?!.*question:\s*\w)(hint:\ )?(please\ |just\ |only\ |directly\ )*
          (answer|respond|reply|output)\b
          .*\b(letter|option|options|choice|choices|word|phrase|directly|short|nothing|question)\b.*
    | (please\ |only\ )*(select|choose|pick)\ (the|an?)\ ((best|correct|right|most\ appropriate)\ )?
          (answer|option|choice|letter)((,|\ from|\ to|\ among|\ of|\ based|\ below|\ above)\b.*)?
    | (please\ |only\ )*(put|give|provide|write|return|output)\ (your|the)
          \ ((final|best|correct|right|chosen)\ )?(answer(?!\ to\b)|option\ letter
          |letter\ of\ the\ (correct|right|best|chosen)\ (answer|option|choice))\b.*
    | (your|the)\ ((final|best|correct|right)\ )?(answer|response)\ (should|must)\b.*
    | (your|the)\ (final|best|correct|right)\ answer(\ is)?
    | (options|choices|answer|the\ (options|choices)\ are(\ listed)?\ below)
    """, re.IGNORECASE | re.DOTALL | re.VERBOSE)


def clean_question(text):
    """A data set's question without <image> tags and without sentences on how to answer.

    A sentence that ends in a question mark always stays, and so does a text that would vanish.
    """
    text = re.sub(r"<image>|^\s*Question:", "", text).strip()
    kept = []
    # Sentences end in . ! ? before white space (not in "3.5" or "U.S.A") or with the line.
    for sentence in re.split(r"(?<=[.!?])(?=\s)|(?<=\n)", text):
        bare = sentence.strip()
        if bare.endswith("?") or not INSTRUCTION.fullmatch(bare.rstrip(".:! ")):
            kept.append(sentence)
    return "".join(kept).strip() or text


def split_options(question):
    """Options written into a question as lines "(A) red", "B. blue" ... -> (the rest, options)."""
    # Only letters from A on, in order, are options: a line "U.S. mail" is not one.
    rest, letters, options = [], "", []
    for line in question.split("\n"):
        found = re.fullmatch(r"\s*\(?([A-Z])[).:]\s*(\S.*?)\s*", line)
        if found:
            letters += found[1]
            options.append(found[2])
        else:
            rest.append(line)
    if len(letters) < 2 or not string.ascii_uppercase.startswith(letters):
        return question, []
    return "\n".join(rest).strip(), options


# ---------------------------------------------------------------------------------------------
# Benchmarks: the tables that papers print
#
# Protocol. As the authors evaluate (greedy, at most 4,194,304 pixels an image and at least what the
# checkpoint's own image processor says, repetition penalty 1.05, 256 tokens for the Perceiver and
# 1024 for the Reasoner, an answer without <answer> is wrong), but for departures 2, 3, 5 and 6 of
# README.md: which <answer> counts, the words of prompts and questions, images, how answers and
# boxes are read. And a model that training wrote is asked under the limits of its training (its
# p2r.json), unless a flag says otherwise; `think` and `direct` run under the same budgets and
# penalty, `direct` with the Reasoner's limit, which is longer than a plain answer needs (the
# papers' baselines may not have).


def accuracy(records):
    """(share of right answers, how many independent questions stand behind it).

    HR-Bench asks every question once for each rotation of its options: the accuracy of each is
    averaged, and as the rotations of a question are not independent, it counts once.
    """
    # Other sets have one rotation, "", and the mean of means is the mean.
    rotations = {}
    for record in records:
        rotations.setdefault(record["rotation"], []).append(record["reward"])
    share = mean(mean(rewards) for rewards in rotations.values())
    return share, max(len(rewards) for rewards in rotations.values())


def wilson(share, n, z=1.96):
    """The 95 % confidence interval of a share of n: Wilson's score interval (1927), in 0..1."""
    # Clamped, as rounding can lead outside by one unit in the last place.
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return max(low, 0.0), min(high, 1.0)


def print_accuracy(columns):
    """Print (title, result of `evaluate`) pairs as a small table, one column each."""
    last = columns[-1][1]
    heads = "".join(f"{title:>10}" for title, _ in columns)
    print(f"\n{'held-out, n = ' + str(last['n']):52}{heads}")
    for name, text in (("p2r", "perceive, then reason"),
                       ("hit", "the boxes hold the centres of what was asked"),
                       ("plain", "reason on the plain image"),
                       ("oracle", "reason with the true boxes")):
        values = [result[name] for _, result in columns]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        print(f"{name:7}{text:45}" + "".join(f"{cell:>10}" for cell in cells))

    # Kinds of questions, where there is more than one.
    if len(last["categories"]) > 1:
        for kind in last["categories"]:
            # (None: the held-out file was changed since then, and has other kinds now.)
            shares = [result["categories"].get(kind, [None])[0] for _, result in columns]
            cells = ["-" if share is None else f"{share:.3f}" for share in shares]
            print(f"{'':7}{'p2r, ' + kind:45}" + "".join(f"{cell:>10}" for cell in cells))


def published_table(categories, spec):
    """(title, entry) of these categories' benchmark in assets/published.json; else (None, None).

    The entry's mark ("4k", "lite") must be part of SPEC; of two marks the one that it holds last.
    """
    file = HERE / "assets" / "published.json"
    # Categories alone don't tell 4K from 8K, nor the full MME-RealWorld from its Lite.
    best, found = -1, (None, None)
    for title, entry in json.loads(file.read_text()).items():
        place = str(spec).lower().rfind(entry["mark"])
        if categories <= set(entry["categories"]) and place > best:
            best, found = place, (title, entry)
    return found


def print_benchmark(records, title, spec, speed=None):
    """The papers' table: accuracy by category and overall in percent, with 95 % intervals."""
    # A set that no paper reports has the columns that it brings, in its own order.
    categories = {record["category"].lower() for record in records}
    name, entry = published_table(categories, spec)
    if entry is None:
        own = {r["category"].lower(): r["category"] for r in records if r["category"]}
        entry = {"categories": own, "rows": {}, "doubtful": []}

    # A column for each category that was asked, in the papers' order, and one for all.
    heads, shares, intervals = [], [], []
    for category, head in [*entry["categories"].items(), (None, "overall")]:
        some = [r for r in records if category in (None, r["category"].lower())]
        if some:
            share, n = accuracy(some)
            low, high = wilson(share, n)
            heads.append(head)
            shares.append(f"{100 * share:.1f}")
            intervals.append(f"{100 * low:.0f}-{100 * high:.0f}")

    # The papers' rows below it, for comparison; a dash is what no paper reports.
    rows = {"": heads, "this run": shares, "  95 % interval": intervals}
    for who, values in entry["rows"].items():
        values = dict(zip([*entry["categories"].values(), "overall"], values))
        cells = ["-" if values[head] is None else f"{values[head]:.1f}" for head in heads]
        star = " *" if who in entry["doubtful"] else ""
        rows[f"{who}, published{star}"] = cells

    print(f"\n{title}: {name or spec}, {len(records):,} questions")
    width = max(10, *(len(head) + 2 for head in heads))
    for head, cells in rows.items():
        print(f"{head:26}" + "".join(f"{cell:>{width}}" for cell in cells))
    if entry["doubtful"]:
        print("* as the paper prints it: the overall value is not the mean of its two halves")

    # What the accuracy does not tell.
    boxes = [Box(*box) for record in records for box in record["boxes"]]
    line = f"{len(boxes) / len(records):.2f} boxes a question"
    if boxes:
        line += f" of {mean(box.area for box in boxes):.1%} of the image"
    shares = {
        "without an answer": mean(not r["answered"] for r in records),
        "judged": mean(r["judged"] for r in records),
        "unparsable boxes": mean(not r["parsable"] for r in records if r["parsable"] is not None)}
    for what, share in shares.items():
        if share is not None:
            line += f", {what} {share:.1%}"
    print(line + (f"; {speed:.2f} questions/s" if speed else ""))


def draw(record, example, codec):
    """One record -> the picture that tells its story."""
    boxes = [Box(*box) for box in record["boxes"]]
    texts = [("perceiver", record["perceived"]), ("reasoner", record["reasoned"]),
             ("truth", record["answer"])]
    texts = [(title, text) for title, text in texts if text]
    return picture(example.load_image(), boxes, record["question"], texts, codec.scaled)


# ---------------------------------------------------------------------------------------------
# The command line, and what both programs share of it


def add_flags(parser, settings):
    """One flag for every field of a dataclass, from its source: `name: type = default  # help`.

    Fields stand in blocks, with a blank line between them. A comment on a line of its own is the
    title of a block; comment lines further right continue a field's help. Only flags that were
    given come back from the parser.
    """
    # A dataclass keeps names, types and defaults, but not the comments beside them.
    fields = settings.__dataclass_fields__
    for block in inspect.getsource(settings).split("\n\n"):
        title = re.search(r"^    # (.*)", block, re.MULTILINE)
        group = parser.add_argument_group(title[1]) if title else parser
        found = re.findall(r"^    (\w+): .*?  # (.*(?:\n {8,}# .*)*)", block, re.MULTILINE)
        for name, comment in found:
            text = re.sub(r"\n +# ", " ", comment)
            if fields[name].default != "":
                text += f" (default: {fields[name].default})"
            how = {"type": fields[name].type}
            if fields[name].type is bool:
                how = {"action": argparse.BooleanOptionalAction}

            # argparse.SUPPRESS: what was not given must not hide what a run or the toy says.
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **how)


def run_program(name, main, arguments=None, hint=""):
    """Run main(arguments) as the program `name` -> its exit status.

    What a user can mend is one line on stderr and status 2. Ctrl-C, SIGTERM and SIGHUP end it with
    one line, too (`hint` says how to go on), and status 128 + signal.
    """
    def stop(number, frame):
        raise KeyboardInterrupt(number)

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    # The handlers that were here before are put back: tests run programs inside their own.
    before = {number: signal.signal(number, stop) for number in ending_signals()}
    try:
        main(arguments)
        return 0
    except (InputError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        told = f"{name}: stopped by {signal.Signals(number).name}"
        print(f"\n{told}; {hint}" if hint else f"\n{told}", file=sys.stderr)
        return 128 + number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending_signals():
    """The signals that ask a program to end: Ctrl-C, SIGTERM, and SIGHUP, which Windows does not
    know. Not those that are ignored: nohup, or a script that starts it with &, wants it so."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def next_free(path, ending=""):
    """path-1, or the first -2, -3, ... that does not exist yet: nothing is written over."""
    number = 1
    while Path(f"{path}-{number}{ending}").exists():
        number += 1
    return Path(f"{path}-{number}{ending}")


def lock(path):
    """An open file that no other process can lock as long as this one lives.

    Raises InputError where one has it. (Windows and some network disks have no such locks: there
    nobody is warned.)
    """
    file = path.open("w")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{path.parent} is being used by another process") from error
    except (ImportError, OSError):
        pass
    return file


def printable(text):
    """A model's text for a terminal: control characters, which could steer it, are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass
class Task:
    """What is asked, of whom, and where it goes."""
    # A benchmark, or questions of your own
    model: str = ""          # Qwen3-VL: a hub id or a folder; without it the embedded toy
    data: str = ""           # questions: a file, folder or hub id; without it the toy's
    images: str = ""         # folder that relative image paths start from; default: the data file's
    skip_bad: bool = False   # leave bad rows out, and count them, instead of stopping
    limit: int = 0           # ask only so many questions, drawn once and for all; 0: all
    judge: str = "none"      # who settles free-form answers in other words: none, self, or a model
    out: str = ""            # folder for results.jsonl and pictures; default: one in runs/
    pictures: int = 8        # draw the first so many questions

    # A picture of your own
    image: str = ""          # a picture: prints boxes and answer, writes one picture
    question: str = ""       # what to ask about it
    answer_form: str = "free_form"  # the answer: mca (a letter), na (a number) or free_form

    def check(self):
        """Raises InputError for the first setting that cannot work."""
        check_numbers(self, may_be_0=("limit", "pictures"))
        need(self.answer_form in FORMS,
             f"--answer-form {self.answer_form} is not one of {', '.join(FORMS)}")

        # A picture needs a question, and a model that has seen the world.
        need(bool(self.image) == bool(self.question.strip()),
             "give --image and --question together")
        need(not self.image or Path(self.image).is_file(),
             f"--image {self.image}: there is no such file")
        need(not self.image or not self.data, "give either --data, or --image and --question")
        need(not NO_TEXT.search(self.question), "--question holds characters that are no text")
        need(not CONTROL.search(self.question), "--question holds a token that steers the model")
        need(self.model or not self.image,
             "--image needs --model, such as --model Qwen/Qwen3-VL-2B-Instruct: the embedded toy "
             "knows nothing but the striped signs of its own small world")
        need(self.data or self.image or not self.model,
             "--model needs --data (a benchmark, or questions of your own), or --image, --question")


def read_jsonl(path):
    """The rows of a file that grows line by line; a last one that a kill left half is no row."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def earlier_records(out, config, examples):
    """The records that an earlier run left in the folder `out`; [] where there are none.

    Raises InputError where other results are in the way.
    """
    results, config_file = out / "results.jsonl", out / "config.json"
    if not results.exists() or not config_file.exists():
        return []
    try:
        records = read_jsonl(results)
        known = json.loads(config_file.read_text())
    except ValueError as error:
        raise InputError(f"{out} holds what is not JSON ({error}): choose another --out") from error

    # Another protocol, or other questions? (More of them than records is what resuming is for.)
    changed = []
    for key, value in config.items():
        if known.get(key) != value:
            changed.append(f"{key} was {known.get(key)} and is {value}")
    then = [(record["id"], record["image"], record["question"], record["answer"],
             record["answer_form"]) for record in records]
    now = [(example.id, str(example.image), example.question, example.answer,
            example.answer_form) for example in examples]
    if then != now[:len(then)]:
        changed.append("the questions are not the same")
    need(not changed, f"{out} holds other results ({'; '.join(changed)}): choose another --out")
    return records


def default_folder(task, protocol):
    """The folder of results: one for each model, data set, mode and limit."""
    # Every training run has a `final`, and its own phases.
    model = Path(task.model)
    name = model.name
    if name == "final":
        name = f"{model.parent.name}-final"
    elif model.parent.name == "phases":
        name = f"{model.parents[1].name}-{name}"
    limit = f"-{task.limit}" if task.limit else ""
    return f"runs/eval-{name}-{Path(task.data).stem}-{protocol.mode}{limit}"


def versions(task):
    """What results depend on besides settings, as a dict: this code, and the model's weights."""
    # Whoever changes a prompt must not be shown the results of before; nor whoever trains on, and
    # has new weights in the same folder.
    code, weights = hashlib.sha256(), hashlib.sha256()
    for file in sorted(HERE.glob("*.py")):
        code.update(file.read_bytes())
    for file in sorted(find(task.model).glob("*.safetensors")):
        state = file.stat()
        weights.update(f"{file.name} {state.st_size} {state.st_mtime_ns}".encode())
    return {"version_of_code": code.hexdigest()[:12],
            "version_of_weights": weights.hexdigest()[:12]}


def run_data(task, protocol):
    """Every question of a data set -> results.jsonl, pictures, the table. A killed run goes on."""
    examples = load_data(task.data, task.images, task.skip_bad)
    if task.limit:
        # In an order of their own, so that leaving a bad one out moves no other.
        examples.sort(key=lambda example: random.Random(example.id + example.question).random())
        examples = examples[:task.limit]

    # True boxes can only be shown where there are any.
    if protocol.mode == "oracle":
        boxed = [example for example in examples if example.boxes]
        need(boxed, f"--mode oracle: no row of {task.data} has true boxes (the field 'boxes')")
        if len(boxed) < len(examples):
            print(f"asked are the {len(boxed):,} of {len(examples):,} questions that have boxes")
        examples = boxed

    out = Path(task.out or default_folder(task, protocol)).expanduser()
    out.mkdir(parents=True, exist_ok=True)

    # A model's folder, or a training run's, has a config.json of its own.
    names = {file.name for file in out.iterdir()} - {"lock"}
    need(not names or "results.jsonl" in names,
         f"--out {out} holds something, but no results of eval.py: choose another")
    held = lock(out / "lock")  # two processes would write every record twice
    config = {name: getattr(task, name) for name in ("model", "data", "images", "judge")}
    config = config | dataclasses.asdict(protocol) | versions(task)
    records = earlier_records(out, config, examples)

    # Go on after whole chunks only: in bf16 an answer may depend on who shares its batch.
    if len(records) < len(examples):
        size = CHUNK * protocol.batch
        records = records[:len(records) // size * size]

    # A model and a judge that cannot be loaded must not leave anything in the way.
    model, codec = load_for(task, protocol)
    judge = None
    if task.judge == "self":
        judge = Judge(model, codec.tokenizer)
    elif task.judge != "none":
        judge = Judge.load(task.judge, model.device)
    results = out / "results.jsonl"
    results.write_text("".join(json.dumps(record) + "\n" for record in records))
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    # Ask the rest. Records come a chunk at a time, and are on disk as soon as they come.
    rest, start = examples[len(records):], time.perf_counter()
    asked = ask(model, codec, rest, protocol, judge)
    with results.open("a") as lines:
        for record in tqdm(asked, "asking", initial=len(records), total=len(examples), unit="q",
                           disable=None):
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            records.append(record)
    speed = len(rest) / (time.perf_counter() - start)

    # Show: the first pictures, then the table.
    for number, (record, example) in enumerate(zip(records[:task.pictures], examples), start=1):
        draw(record, example, codec).save(out / f"{number:05d}.png")
    print_benchmark(records, f"{Path(task.model).name} in mode {protocol.mode}", task.data, speed)
    print(f"results and pictures: {out}")
    held.close()


def run_picture(task, protocol):
    """One picture and one question of the user's own."""
    # Looked at before the model is loaded, as everything that can be wrong is.
    path = Path(task.image)
    problem = image_problem(path, fully=True)
    need(not problem, f"--image names {path}, {problem}")
    example = Example(path, task.question, "", task.answer_form, id=path.name)
    model, codec = load_for(task, protocol)
    record = next(ask(model, codec, [example], protocol))

    # Boxes in pixels of the picture, each with the colour in which it is drawn.
    size = example.load_image().size
    boxes = [Box(*box) for box in record["boxes"]]
    for box, colour in zip(boxes, itertools.cycle(COLOURS)):
        print(f"{colour:8} {printable(box.label)}: pixels {to_rect(box, size)}")
    answer = answer_in(record["reasoned"], whole_text=protocol.mode == "direct")
    print(f"answer   {'(none: no <answer> in the text)' if answer is None else printable(answer)}")

    out = Path(task.out or "runs").expanduser()
    out.mkdir(parents=True, exist_ok=True)
    file = next_free(out / path.stem, ".png")
    draw(record, example, codec).save(file)
    print(f"picture  {file}")


def load_for(task, protocol):
    """The task's model and its Codec. Raises InputError if it cannot write as much as is asked."""
    model, codec = load(find(task.model), protocol.max_pixels)
    for name in ("perceive_tokens", "reason_tokens"):
        limit = getattr(protocol, name)
        need(limit < codec.max_positions, f"--{name.replace('_', '-')} {limit} is more than the "
                                          f"{codec.max_positions} positions of this model")
    return model, codec


def fitting_protocol(task):
    """The protocol's values that fit the model: of the toy, or of the run that it is from."""
    if not task.model:
        print("no --model: this is the embedded toy, which knows its own small world only")
        # The toy's images are tiny, and its answers so short that a penalty would bend them.
        world = toy.defaults()
        task.model, task.data = world["model"], task.data or world["eval_data"]
        own = {name: world[name] for name in ("max_pixels", "perceive_tokens", "reason_tokens")}
        return own | {"penalty": 1.0, "batch": 64}

    # A folder that training wrote says under which budgets.
    saved = find(task.model) / "p2r.json"
    if not saved.is_file():
        return {}
    own = json.loads(saved.read_text())
    told = ", ".join(f"{name} {value}" for name, value in own.items())
    print(f"asked as it was trained, where no flag says otherwise: {told}")
    return own


@out_of_memory("evaluating", "lower --batch or --max-pixels, or free the GPU of other programs")
def main(arguments=None):
    """The command line, made from Task and Protocol. Raises InputError."""
    parser = argparse.ArgumentParser(description="Ask a model: a benchmark, or one picture.")
    add_flags(parser, Task)
    add_flags(parser, Protocol)
    flags = vars(parser.parse_args(arguments))

    # An empty text is what a shell makes of a variable that is not set: never what was meant.
    for name, value in flags.items():
        need(value != "", f"--{name.replace('_', '-')} is empty: give it a value, or leave it out")

    # A given flag wins over the model's own values, and those over the authors' protocol.
    task = Task(**{name: flags.pop(name) for name in list(flags)
                   if name in Task.__dataclass_fields__})
    task.check()
    need(not task.image or flags.get("mode") != "oracle",
         "--mode oracle needs --data with true boxes, not --image")
    protocol = Protocol(**(fitting_protocol(task) | flags))
    protocol.check()
    if task.image:
        run_picture(task, protocol)
    else:
        run_data(task, protocol)


if __name__ == "__main__":
    sys.exit(run_program("eval.py", main, hint="with --data the same command goes on from there"))
