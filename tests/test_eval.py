"""eval.py: the loader's errors, the scoring rules, and accuracy. Verdicts are written by hand."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

import eval as evaluation
from crop import Box
from eval import Example, load_data, number_in, option_letter, score
from rollout import InputError

GOOD = {"image": "a.png", "question": "What colour?", "answer": "red"}


def write(folder, *rows):
    Image.new("RGB", (8, 6), "red").save(folder / "a.png")
    Image.new("RGB", (2010, 10), "red").save(folder / "sliver.png")
    file = folder / "data.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_a_line_becomes_an_example(tmp_path):
    file = write(tmp_path, GOOD, "", {**GOOD, "answer": "B", "answer_form": "mca", "options": ["red", "blue"],
                                      "category": "colour", "id": 7, "boxes": [[0, 10, 500.5, 1000]]},
                 {**GOOD, "answer": 3, "answer_form": "na"})
    plain, choice, number = load_data(file)
    assert plain == Example(tmp_path / "a.png", "What colour?", "red", id="1")
    assert choice.question == "What colour?\nA. red\nB. blue" and choice.options == ("red", "blue")
    assert (choice.category, choice.id, choice.boxes) == ("colour", "7", (Box(0, 10, 500.5, 1000),))
    assert number.answer == "3" and number.load_image().size == (8, 6)
    assert load_data(tmp_path)[0] == plain                       # a folder that holds data.jsonl
    (tmp_path / "elsewhere").mkdir()
    moved = write(tmp_path / "elsewhere", GOOD).rename(tmp_path / "moved.jsonl")
    assert load_data(moved, images=tmp_path / "elsewhere")[0].image == tmp_path / "elsewhere" / "a.png"


@pytest.mark.parametrize("row, needles", [
    ("{", ["line 2", "not a JSON object"]),
    ("[1]", ["line 2", "list"]),
    ({k: v for k, v in GOOD.items() if k != "question"}, ["line 2", "'question'", "missing"]),
    ({**GOOD, "question": 3}, ["line 2", "'question'"]),
    ({**GOOD, "answer": " "}, ["line 2", "'answer'", "empty"]),
    ({**GOOD, "answer": None}, ["line 2", "'answer'"]),
    ({**GOOD, "answer_form": "essay"}, ["line 2", "'answer_form'", "mca, na, free_form"]),
    ({**GOOD, "answer_form": "mca", "answer": "Apple"}, ["line 2", "'answer'", "Apple"]),
    ({**GOOD, "answer_form": "na", "answer": "many"}, ["line 2", "'answer'", "many"]),
    ({**GOOD, "options": "red"}, ["line 2", "'options'"]),
    ({**GOOD, "answer_form": ["mca"]}, ["line 2", "'answer_form'"]),
    ({**GOOD, "answer_form": "mca", "answer": "E", "options": ["red", "blue"]}, ["line 2", "'answer'", "only 2 options"]),
    ({**GOOD, "answer": "?!"}, ["line 2", "'answer'", "no word"]),
    ({**GOOD, "image": "sliver.png"}, ["line 2", "'image'", "2010 x 10"]),
    ({**GOOD, "boxes": [[0, 0, 1200, 10]]}, ["line 2", "'boxes'"]),
    ({**GOOD, "boxes": [[10, 0, 5, 10]]}, ["line 2", "'boxes'"]),
    ({**GOOD, "image": "b.png"}, ["line 2", "'image'", "b.png"]),
    ({**GOOD, "image": "data.jsonl"}, ["line 2", "'image'", "cannot be read"]),
])
def test_a_bad_line_is_named(tmp_path, row, needles):
    file = write(tmp_path, GOOD, row)
    with pytest.raises(InputError) as error:
        load_data(file)
    assert all(needle in str(error.value) for needle in [str(file), *needles])
    assert "\n" not in str(error.value)


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    file = write(tmp_path, GOOD)
    file.write_bytes(file.read_bytes() + b'{"image": "\xff"}\n')
    with pytest.raises(InputError, match="line 2"):
        load_data(file)


def test_no_data(tmp_path):
    with pytest.raises(InputError, match="no data file"):
        load_data(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="empty"):
        load_data(write(tmp_path))


def test_a_truncated_image_is_an_error_by_name(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1000])
    example = Example(tmp_path / "cut.png", "q", "a", id="9")
    with pytest.raises(InputError, match="cut.png of example 9"):
        example.load_image()


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                              # the camera was held upright
    Image.new("RGB", (40, 20)).save(tmp_path / "r.jpg", exif=exif)
    assert Example(tmp_path / "r.jpg", "q", "a").load_image().size == (20, 40)


OPTIONS = ("red", "a blue car", "green", "Apple")


@pytest.mark.parametrize("text, letter", [
    ("C", "C"), ("c", "C"), ("(C)", "C"), ("C.", "C"), ("C)", "C"), ("**C**", "C"), (" C \n", "C"), ("C. green", "C"),
    ("(C) green", "C"), ("C: green", "C"), ("The answer is C", "C"), ("The answer is C.", "C"), ("Answer: C", "C"),
    ("The correct answer is (C)", "C"), ("Option C", "C"), ("green", "C"), ("Green.", "C"), ("blue car", "B"),
    ("Apple", "D"), ("", None), ("A or B", None), ("A or B or C", None), ("A. or B.", None), ("A blue bus", None),
    ("Based on the sign, C", None), ("G", None), ("a dog", None), ("Because it is", None), ("AB", None), ("?", None),
    ("yesterday", None), ("A and C", None), ("A. red B. a blue car", None),
])
def test_option_letters(text, letter):
    assert option_letter(text, OPTIONS) == letter


@pytest.mark.parametrize("text, letter", [
    ("C. Vitamin C", "C"), ("(A) Gate E", "A"), ("B. red and blue", "B"), ("red and blue", "B"), ("D. 5 or 6", "D"), ("Gate E", "A"),
    ("C. Vitamin C or E", None), ("A. red and blue", None),
])
def test_options_whose_own_text_looks_like_two_answers(text, letter):
    assert option_letter(text, ("Gate E", "red and blue", "Vitamin C", "5 or 6")) == letter


def test_apple_is_no_letter_without_that_option():
    assert option_letter("Apple", ("red", "blue")) is None


@pytest.mark.parametrize("text, value", [
    ("3", 3), ("3.0", 3), ("1,200", 1200), ("-2.5 m", -2.5), ("about 40 people", 40), (".5", 0.5),
    ("\u22125", -5), ("1,234,567.5", 1234567.5), ("3,4", None), ("1,2,3", None),
    ("", None), ("three", None), ("3 or 4", None), ("between 2 and 5", None),
])
def test_numbers(text, value):
    assert number_in(text) == value


def example(answer, form="free_form", options=()):
    return Example(None, "q", answer, form, options)


@pytest.mark.parametrize("text, truth, reward, answered", [
    ("<think>It is red.</think>\n<answer>red</answer>", example("Red"), 1, True),
    ("<answer> The red. </answer>", example("red"), 1, True),
    ("<answer>reddish</answer>", example("red"), 0, True),
    ("<answer>not red</answer>", example("red"), 0, True),
    ("<answer>yesterday</answer>", example("yes"), 0, True),
    ("<answer>A</answer>", example("A"), 1, True),                        # an article only before another word
    ("<answer>Gate</answer>", example("Gate A"), 0, True),
    ("<answer>the plan</answer>", example("Plan A"), 0, True),
    ("<answer></answer>", example("red"), 0, True),                       # an empty answer is an answer, and wrong
    ("<answer>.</answer>", example("..."), 0, True),
    ("red", example("red"), 0, False),                                    # no tags
    ("<answer>red", example("red"), 0, False),                            # cut off
    ("red</answer>", example("red"), 0, False),
    ("<answer>blue</answer> no, <answer>red</answer>", example("red"), 1, True),   # the last one counts
    ("<answer>A or B or C</answer>", example("A", "mca"), 0, True),
    ("<answer>B</answer>", example("(B)", "mca"), 1, True),
    ("<answer>b</answer>", example("B. blue", "mca", ("red", "blue")), 1, True),
    ("<answer>blue</answer>", example("B", "mca", ("red", "blue")), 1, True),
    ("<answer>A</answer>", example("B", "mca", ("red", "blue")), 0, True),
    ("<answer>1200.0</answer>", example("1,200", "na"), 1, True),
    ("<answer>1201</answer>", example("1,200", "na"), 0, True),
    ("<answer>12 or 13</answer>", example("12", "na"), 0, True),
])
def test_score(text, truth, reward, answered):
    assert score(text, truth) == (reward, answered)


def test_hit_is_about_the_first_box_and_the_centre():
    asked = Example(None, "q", "a", boxes=(Box(400, 400, 600, 600),))     # centre (500, 500)
    assert evaluation.hits([Box(450, 450, 510, 510)], asked)
    assert not evaluation.hits([Box(400, 400, 480, 600), Box(450, 450, 510, 510)], asked)
    assert not evaluation.hits([], asked)


def test_accuracy_by_hand(monkeypatch):
    """Four examples, one without true boxes, and a scripted model: four different fractions.

    The scripted Reasoner is right if it is shown a box that starts left of 500, and for the last
    example always. So p2r: examples 0 and 3 of four; plain: 3 of four; oracle: 0 and 1 of the three with true boxes.
    The first box hits in 0 and 2 of three. Example 1's p2r answer has no tags.
    """
    def make(i, *boxes):
        return Example(None, str(i), "yes", boxes=tuple(boxes))

    examples = [make(0, Box(100, 100, 300, 300)), make(1, Box(400, 0, 500, 100)), make(2, Box(600, 600, 700, 700)), make(3)]
    written = {"0": [150, 150, 250, 250], "1": [800, 0, 900, 100], "2": [600, 600, 700, 700], "3": None}

    def group(text):
        return SimpleNamespace(completions=[SimpleNamespace(text=text)])

    def perceive(model, codec, some, **how):
        assert how == {"greedy": True, "max_tokens": 7, "batch": 5}
        for e in some:
            yield group(json.dumps([{"bbox_2d": written[e.question], "label": "x"}]) if written[e.question] else "no list")

    def reason(model, codec, cases, **how):
        assert how == {"greedy": True, "max_tokens": 9, "batch": 5}
        for e, boxes in cases:
            right = e.question == "3" or (boxes and boxes[0].x1 < 500)
            yield group("<answer>yes</answer>" if right else "yes" if e.question == "1" else "<answer>no</answer>")

    monkeypatch.setattr(evaluation, "perceive", perceive)
    monkeypatch.setattr(evaluation, "reason", reason)
    assert evaluation.evaluate(None, None, examples, perceive_tokens=7, reason_tokens=9, batch=5) == {
        "p2r": 2 / 4, "hit": 2 / 3, "plain": 1 / 4, "oracle": 2 / 3, "n": 4, "unparsable": 1 / 4, "unanswered": 1 / 4}
