"""What counts as correct: a table of answers, each with the verdict that a person gives, and more made from templates."""

import random
import re
import string
import time
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
from eval import Example, Judge, Score, grade, number_in, option_letter, same_number, score

COLOURS = ("red", "blue", "green", "yellow")
SIDES = ("left", "right", "in front of the bus", "behind the bus")
COUNTS = ("1", "2", "3", "4")
YES = ("Yes", "No", "It cannot be determined")
SIGNS = ("STOP", "Main St.", "No Parking", "Exit 12B", "The image does not show it.")
GATES = ("Gate E", "red and blue", "Vitamin C", "5 or 6", "a man and a dog")
LONE = ("B", "A", "D", "C")  # which letter is on the sign?

# options, then {what a person reads: the texts}. "-" is: names no option, several, or takes it back.
LETTERS = [
    ((), {
        "D": ["D", "d", "(D)", "(d)", "D.", "D)", "d)", "D:", "D!", " D \n", "**D**", "_D_", "D \u2705", "`D`", "$D$", '"D"', "'D'", "\u201cD\u201d", "[D]", "( D )",
              "D\u3002", "\uff08D\uff09", "- D", "* D", "> D", "### D", "```\nD\n```", "<b>D</b>", "<p>D</p>", "| D |", r"\boxed{D}", r"\(D\)",
              r"$\boxed{\text{D}}$", r"\mathrm{D}", r"\boxed{\textbf{(D)}}", '{"answer": "D"}',
              # announced
              "The answer is D", "The answer is D.", "the answer is (d).", "Answer: D", "Answer: **D**", "### Answer\nD", "Ans: D", "Option D", "option d",
              "The correct option is (D).", "The answer is option D", "Final answer: D", "My answer is D", "So the answer is D", "Therefore, D.",
              "It is D.", "It's D", "I think the answer is D.", "I believe it is D", "Based on the image, the answer is D", "Based on the sign, D",
              "The answer must be D", "The answer should be D", "It has to be D", "Choose D", "I would go with D.", "I'd say D", "Definitely D",
              "The answer is:\n\nD", "D, I think", "After a close look at the jersey of the player, the correct choice is D.",
              "\u7b54\u6848\u662fD", "\u7b54\u6848\uff1aD", "\u6b63\u786e\u7b54\u6848\u662f D\u3002", "\u6545\u9009D", "\u7b54\u6848\u4e3aD",
              # with a reason, or words that may well be its text
              "D. blue", "D) blue", "(D) blue", "D: blue", "D - blue", "D \u2013 blue", "D.blue", "D, because it is blue", "D because it is blue",
              "D is correct", "D is the correct answer.", "D\n\nThe car is blue.", "D. It'd rain", "D. A man and a dog", "D. 25 \u00b0C",
              "D. Because the light comes from the left side and the shadow of the tree falls to the right"],
        "A": ["a", "A", "It is a.", "A. 25 \u00b0C", "A: a person", "option a"],
        "C": ["C. S. Lewis"],
        "F": ["F", "f."],
        "-": ["", "?", "G", "D?", "AB", "ABCD", "A dog", "a dog", "A blue car", "Apple", "e.g. the red one", "E.g. the red one", "D'accord", "D-Day", "B-52",
              "F150", "25\u00b0C", "Vitamin C", "Plan B", "A.M.", "Based on what I see", "choose a car", "Answer: A person", "yesterday",
              "A or B", "(A) or (B)", "A, D", "A/B", "A & C", "A and C", "A B", "A\nB", "Either A or B", "Both A and B", "A, B, C, D", "Option A and option B",
              "A. no, wait: b", "A is wrong. B is right.", "The answer is A. B is also possible.", "Between B and C", '["A", "B"]',
              "Not A", "not A.", "It is not A", "It isn\u2019t A", "The answer is not A", "A is wrong", "A is incorrect.", "A is not correct", "never B",
              "Anything but A", "All except A", "A instead of B", "\u4e0d\u662fA", "\u4e0d\u9009B",
              "N/A", "n/a", "None", "None of the above", "All of the above", "Maybe A", "It could be A", "It might be A", "Possibly A", "I doubt it is A", "Unlikely A", "I'm not sure, A?",
              "I cannot tell", "Unclear", "Can't say", "Please select A, B, C, or D", "Sorry, I don't know.", "A" * 10_000, "(" * 10_000,
              "D. " + "the sign says so " * 20]}),
    (COLOURS, {
        "B": ["blue", "Blue.", "BLUE", "**blue**", "It is blue.", "The colour of the car is **blue**.", "The answer is blue", "Answer: blue", "blue (B)",
              "blue, option B", "blue (option B)", "B. blue", "B blue", "B, blue", "B (blue)", "b. blue", r"\boxed{B. blue}", "Final Answer: (B) blue.",
              "B, because it is blue", "B\nblue", "The car is clearly blue, so B.", "I see a blue car, so the answer is B.", "Color: blue", "B = blue"],
        "A": ["A", "a", "A man in red", "A red"],
        "-": ["A blue", "A. blue", "B. green", "The answer is B. green", "green (B)", "Option B: green", "A blue car", "blue-green", "bluish", "blue?",
              "not blue", "far from blue", "the opposite of blue", "lacks blue", "It is not blue", "isn't blue", "neither red nor blue", "red or blue", "red, green", "red and blue", "maybe blue", "Red or A",
              "B (blue), not A", "A. red B. blue", "The second option", "Option 2"]}),
    (SIDES, {
        "A": ["left", "It is on the left.", "A left", "A. It is on the left of the sign"],
        "B": ["right", "to the right", "The man is on the right side", "B"],
        "C": ["in front of the bus", "It stands in front of the bus, so the answer is C.", "C. In front of the bus."],
        "-": ["A right", "left or right", "to the left, not the right", "A. right", "the bus"]}),
    (COUNTS, {
        "C": ["3", "C.3", "C. 3", "C (3)", "There are 3 people.", "Count: 3", "3."],
        "-": ["B.3", "B. 3", "13", "3.5", "1, 2, 3", "3 or 4", "more than 3", "There are 3 cars and 1 bus"]}),
    (YES, {
        "A": ["Yes", "Yes.", "yes", "A. Yes", "A Yes", "Yes, the man wears a hat."],
        "B": ["No", "no", "B. No", "B No", "B. No, there is no dog."],
        "C": ["It cannot be determined.", "C. It cannot be determined", "C"],
        "-": ["A No", "A. No", "B Yes", "Yes or no", "Yes, no"]}),
    (SIGNS, {
        "A": ["The sign says STOP.", "stop"], "B": ["Main St", "B. Main St."], "C": ['The sign reads "No Parking"', "C. No Parking"],
        "D": ["Exit 12B", "D. Exit 12B"], "E": ["the image does not show it", "E. The image does not show it."],
        "-": ["C. Exit 12B", "It does not say"]}),
    (GATES, {
        "A": ["Gate E", "(A) Gate E", "It is Gate E."], "B": ["red and blue", "B. red and blue"], "C": ["C. Vitamin C", "Vitamin C"],
        "D": ["D. 5 or 6", "5 or 6", "D. 5"], "E": ["A man and a dog", "a man and a dog", "E. A man and a dog", "E", "man and a dog"],
        "-": ["C. Vitamin C or E", "A. red and blue", "D. Gate E"]}),
    (LONE, {"A": ["A", "(A)", "A. B"], "D": ["D", "D. C"], "-": ["A. D", "The sign says C or D"]}),
]


def verdicts():
    """(text, options, what a person reads or None) of the table."""
    for options, readings in LETTERS:
        for reading, texts in readings.items():
            for text in texts:
                yield text, options, None if reading == "-" else reading


def report(rows, read=option_letter):
    """Print how many outputs were read as meant, read wrongly and refused -> their shares, failures listed."""
    counts, failures = Counter(), []
    for text, options, meant in rows:
        found = read(text, options)
        outcome = "as meant" if found == meant else "refused" if found is None else "wrong"
        counts[outcome] += 1
        if outcome != "as meant":
            failures.append(f"{outcome}: {text[:70]!r} of {options}: {found}, meant {meant}")
    total = sum(counts.values())
    print(f"{total} outputs: " + ", ".join(f"{n} {outcome} ({n / total:.2%})" for outcome, n in counts.items()))
    print("\n".join(failures[:40]))
    return {outcome: counts[outcome] / total for outcome in ("as meant", "wrong", "refused")}


def test_the_table_of_letters():
    rows = list(verdicts())
    assert len(rows) >= 250
    shares = report(rows)
    assert shares["wrong"] < 0.01 and shares["refused"] < 0.06


def test_nothing_is_paid_that_a_person_refuses():
    """The rows that name nothing, several or take it back earn nothing whatever the truth is."""
    for text, options, meant in verdicts():
        if meant is None:
            for truth in "ABCDEF"[:len(options) or 6]:
                assert score(f"<answer>{text}</answer>", example(truth, "mca", options)).reward == 0, text


# The second corpus: other words than the table's, every option of every list, each with its letter.
OPTIONS = [COLOURS, SIDES, COUNTS, YES, SIGNS, ("a man in a black coat", "a woman with an umbrella", "two children", "a dog"),
           ("$5.99", "$15.99", "$25", "50%"), ("only buses", "no parking", "allowed"), ("Caf\u00e9 Rouge", "B&B Hotel", "Bank", "A bus stop", "Tea")]
NAMING = ["{L}", "({l})", "The letter is {L}", "Selected option: {L}", "ANSWER: {L}", "Thus, the answer is: {L}", "Hence {L}", "The right choice is {L}",
          "Looking at the image, I choose {L}.", "The final answer is $\\boxed{{{L}}}$.", "<strong>{L}</strong>", "\u9009\u9879{L}", "I pick {L}",
          "\n\n{L}\n", "{L}; the sign is clear", "The best answer would be ({L})", "Correct answer: {L}", "clearly {L}"]
TELLING = ["{o}", "{L}. {o}", "({L}) {o}", "**{L}.** {o}", "The answer is {L}. {o}", "{o} ({L})", "Answer: {o}", "{L}: **{o}**", "{L}, because it is {o}",
           "The correct answer is {o} ({L}).", "I read {o} there", "Option {L}, {o}", "{ou}", '{L}. "{o}"']
REFUSED = ["{L} or {M}", "{L}, {M}", "not {L}", "the answer is not {L}", "{L} is wrong", "either {L} or {M}", "neither {L} nor {M}", "{L}?", "{L} and {M}",
           "could be {L}", "perhaps {L}", "{L}/{M}", "rather {M} than {L}", "{L}. {p}", "({L}) {p}", "the answer is {L}, {p}", "{p} ({L})", "{o} or {p}",
           "Option {L}: {p}", "{o}, {p}", "both {o} and {p}", "anything but {L}", "{L} {p}"]


def generated():
    for options in OPTIONS:
        for place, own in enumerate(options):
            other = (place + 1) % len(options)
            words = {"L": "ABCDEF"[place], "l": "abcdef"[place], "M": "ABCDEF"[other], "o": own, "p": options[other], "ou": own.upper()}
            for templates, meant in ((NAMING + TELLING, words["L"]), (REFUSED, None)):
                for template in templates:
                    yield template.format(**words), options, meant
            for template in NAMING:
                yield template.format(**words), (), words["L"]


def test_the_generated_corpus():
    rows = list(generated())
    assert len(rows) > 2000
    shares = report(rows)
    assert shares["wrong"] < 0.01 and shares["refused"] < 0.06


def first_capital(text, options=()):
    """The benchmarks' rule in its usual form: the first of A..E in the text, standing anywhere."""
    found = re.search("[ABCDE]", text)
    return found and found[0]


def test_the_benchmarks_rule_errs_more_often():
    """On bare letters the two agree. On the table theirs is fooled more than ten times as often."""
    for letter in "ABCDE":
        for clean in ("{}", "({})", "{}.", "{}) blue", "({}) blue", "{}. blue", "**{}**"):
            text = clean.format(letter)
            assert option_letter(text) == first_capital(text) == letter
    rows = list(verdicts())
    assert report(rows, first_capital)["wrong"] > 10 * report(rows)["wrong"]


# ---------------------------------------------------------------------------------------------
# Numbers: what a person reads, as a fraction, or "-"

NUMBERS = {
    "3": ["3", "3.0", "three", "three people", "There are three.", "There are 3 people", "3.", "**3**", "$3$", r"\boxed{3}", "<b>3</b>", "+3", "the 3rd", "3 m2", "3 m\u00b2",
          "- 3", "Answer: 3", "The answer is three", "about 3", "\uff13", "3 people in the 1st row"],
    "-3": ["-3", "minus 3", "negative three", "\u22123", "\u20133 \u00b0C", "-$3"],
    "1": ["one", "One.", "There is one", "1", "just one dog"],
    "12": ["12", "twelve", "1 dozen", "Twelve."],
    "36": ["3 dozen", "36"],
    "100": ["one hundred", "100", "100 km/h", "1e2"],
    "2000": ["two thousand", "2,000", "2 000", "2000.0", "2 thousand", "2\u00a0000"],
    "10000": ["10 000", "10,000", "10 000 people", "10\u202f000"],
    "300000": ["three hundred thousand"],
    "1234567.5": ["1,234,567.5"],
    "2000000": ["2 million", "two million"],
    "7/2": ["3 1/2", "3\u00bd", "3.5", r"3\frac{1}{2}", "7/2"],
    "1/2": ["1/2", "\u00bd", r"\frac{1}{2}", r"$\dfrac{1}{2}$", ".5", "0.5", "1 / 2"],
    "-5/2": ["-2.5 m", "-2 1/2"],
    "40": ["40km/h", "40 km/h", "about 40 people", "40"],
    "5": ["No.5", "No. 5", "$5", "five", "\u20ac5"],
    "-": ["", "many", "none", "the red one", "not 3", "not three", "at least 3", "more than 3", "over 3", "up to 3", "less than 3", ">3", "\u2265 3", "3+", "almost 3", "3?",
          "maybe 3", "3 or 4", "three or four", "3-5", "3 to 5", "between 2 and 5", "3,4", "1,2,3", "1,2000", "12:30", "1.2.3", "2024-01-05", "1/0", "1/2/3",
          "x5", "1_000", "three of twelve", "10^2", "10\u00b2", "3 x 4", "3 and a half", "twenty-one", "thirteen", "3k", "5M", "two hundred five",
          "3 hundred fifty", "9" * 4301, "9" * 30 + " 9", "-\\frac{1}{2}", "cannot see 3", "3 - 1 = 2", "one or two", "N/A"],
}


def test_the_table_of_numbers():
    rows = [(text, (), None if value == "-" else Fraction(value)) for value, texts in NUMBERS.items() for text in texts]
    assert len(rows) >= 120
    shares = report(rows, lambda text, _: number_in(text) and number_in(text)[0])
    assert shares["wrong"] < 0.01 and shares["refused"] < 0.06


@pytest.mark.parametrize("answer, truth, same", [
    ("1200.0", "1,200", True), ("1201", "1,200", False), ("0.75", "3/4", True), ("75%", "3/4", True), ("75%", "0.75", True), ("75", "75%", True),
    ("0.75", "75%", True), ("75%", "75", True), ("75%", "75%", True), ("0.75%", "75%", False), ("0.75", "75", False), ("7.5", "75%", False),
    ("40 km/h", "40", True), ("three", "3", True), ("-3", "3", False), ("0", "0", True), ("0.0001", "0", False), ("12 or 13", "12", False),
    ("1000001", "1000000", False), ("5551239", "5551234", False), ("75 percent", "3/4", True),
    ("one hundred", "1", False), ("two thousand", "2", False), ("minus 3", "3", False), ("not 3", "3", False), ("at least 3", "3", False),
    ("3 dozen", "3", False), ("3\u00bd", "3", False),
    ("0.33333333", "1/3", True), ("0.3333", "1/3", False), ("1.5 million", "1500000", True), ("9" * 400, "9" * 400, True), ("", "0", False),
    ("9" * 4301, "9" * 4301, False),
])
def test_same_number(answer, truth, same):
    assert same_number(answer, truth) == same


# ---------------------------------------------------------------------------------------------
# A whole text


def example(answer, form="free_form", options=()):
    return Example(None, "q", answer, form, options)


@pytest.mark.parametrize("text, truth, reward, answered, still_open", [
    ("<think>It is red.</think>\n<answer>red</answer>", example("Red"), 1, True, False),
    ("<answer> The red. </answer>", example("red"), 1, True, False),
    ("<answer>reddish</answer>", example("red"), 0, True, True),
    ("<answer>not red</answer>", example("red"), 0, True, True),
    ("<answer>yesterday</answer>", example("yes"), 0, True, True),
    ("<answer>A</answer>", example("A"), 1, True, False),                        # an article only before another word
    ("<answer>Gate</answer>", example("Gate A"), 0, True, True),
    ("<answer>the plan</answer>", example("Plan A"), 0, True, True),
    ("<answer></answer>", example("red"), 0, True, False),                       # an empty answer is an answer, and wrong
    ("<answer>.</answer>", example("..."), 0, True, True),
    ("red", example("red"), 0, False, False),                                    # no tags
    ("<answer>red", example("red"), 0, False, False),                            # cut off
    ("red</answer>", example("red"), 0, False, False),
    ("<answer>blue</answer> no, <answer>red</answer>", example("red"), 1, True, False),   # the last one counts
    ("<answer>red</answer> or <answer>blue", example("red"), 1, True, False),    # the last closed one
    ("<answer>" + "red " * 21 + "</answer>", example("red"), 0, True, False),    # an essay is not worth asking about
    ("<answer>r<|im_end|></answer>", example("red"), 0, True, False),            # nothing that could steer the judge's prompt
    ("<answer>\u201cred\u201d</answer>", example("red"), 1, True, False),
    ("<answer>.5</answer>", example("5"), 0, True, True),                        # a decimal point is no punctuation
    ("<answer>A 12</answer>", example("12"), 0, True, True),                     # gates and plates
    ("<answer>caf\u00e9</answer>", example("cafe\u0301"), 1, True, False),        # one form of each character
    ("<answer>red</answer> so </answer>", example("red"), 1, True, False),
    ("<answer>A or B or C</answer>", example("A", "mca"), 0, True, False),
    ("<answer>B</answer>", example("(B)", "mca"), 1, True, False),
    ("<answer>b</answer>", example("B. blue", "mca", ("red", "blue")), 1, True, False),
    ("<answer>blue</answer>", example("B", "mca", ("red", "blue")), 1, True, False),
    ("<answer>A</answer>", example("B", "mca", ("red", "blue")), 0, True, False),
    ("<answer>1200.0</answer>", example("1,200", "na"), 1, True, False),
    ("<answer>12 or 13</answer>", example("12", "na"), 0, True, False),
])
def test_score(text, truth, reward, answered, still_open):
    assert score(text, truth) == (reward, answered, still_open, False)
    assert score(text, truth, whole_text=True)[:2] == (reward, answered) or not answered


@pytest.mark.parametrize("text, truth, reward, answered", [
    ("B", example("B", "mca"), 1, False),
    ("<think>A or B? The sign is blue.</think> The answer is B.", example("B", "mca", ("red", "blue")), 1, False),
    ("<think>The sign is blue.</think> blue", example("blue"), 1, False),
    ("<answer>blue", example("blue"), 1, False),
    ("<answer>red</answer> blue", example("blue"), 0, True),                     # tags still come first
    ("<think>blue", example("blue"), 0, False),                                  # cut off in the middle of its thoughts
    ("<think>The sign is blue", example("B", "mca", ("red", "blue")), 0, False),
    ("<think>a</think> <think>The sign is blue", example("B", "mca", ("red", "blue")), 0, False),
    ("", example("blue"), 0, False),
])
def test_a_frozen_reasoner_without_tags_is_read_as_a_whole(text, truth, reward, answered):
    assert score(text, truth, whole_text=True)[:2] == (reward, answered)
    assert not score(text, truth).reward
    assert grade([(text, truth)], whole_text=True)[0][:2] == (reward, answered)


def test_no_text_breaks_the_rules():
    """Anything printable, anywhere: a verdict, never an exception, and never a right answer where the truth is not in the text."""
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice(string.printable + "\u2212\u0663\u00bd") for _ in range(rng.randint(0, 40)))
        for truth in (example("quagga"), example("123456", "na")):
            assert score(f"<answer>{text}</answer>", truth).reward == 0
        assert score(f"<answer>{text}</answer>", example("B", "mca", ("red", "blue"))).reward <= ("b" in text.lower())
        assert score(text, example("quagga")) == (0, False, False, False)


HOSTILE = ["a" + "-" * 100_000 + "a", "-" * 100_000, "(" * 100_000, "<answer>" * 12_000, "</answer>" * 12_000, "<answer>" + "</answer" * 12_000,
           "A, " * 33_000, "9" * 100_000, "9 " * 50_000, "1," * 50_000, " " * 100_000, "\n" * 100_000, "a " * 50_000, "\\frac{1}{" * 11_000, "<" * 100_000,
           "<a" * 50_000, "the answer is " * 7_000, "red " * 25_000, "r" + "." * 99_998 + "d", "\u00bd" * 100_000, "{}" * 50_000, "not " * 25_000,
           "\ufdfa" * 30_000, "x" + "\u3000" * 100_000 + "x"]


def test_every_reader_takes_100_kilobytes_in_a_moment():
    """Strings that quadratic patterns choke on, for seconds, bare and inside tags, and strings made from the same characters."""
    rng = random.Random(1)
    made = ["".join(rng.choices(["-", "a", " ", ".", "9", ",", "<answer>", "A", "\n", "(", "\\frac{"], k=60_000))[:100_000] for _ in range(6)]
    truths = [example("red"), example("3", "na"), example("B", "mca", ("red", "blue car", "a - a")), example("B", "mca")]
    slowest = 0
    for text in HOSTILE + made:
        for body in (text, f"<answer>{text}</answer>"):
            for truth in truths:
                start = time.process_time()
                score(body, truth, whole_text=True)
                slowest = max(slowest, time.process_time() - start)
    print(f"slowest {slowest * 1000:.0f} ms")
    assert slowest < 0.5


def test_short_texts_are_read_quickly_too():
    """The limit on the length is no excuse: a thousand hostile characters take a few milliseconds."""
    for text in HOSTILE:
        start = time.process_time()
        option_letter(text[:1000], COLOURS)
        number_in(text[:1000])
        assert time.process_time() - start < 0.25, text[:20]


# ---------------------------------------------------------------------------------------------
# The judge


def test_the_judge_is_asked_once_for_what_is_open_and_nothing_else():
    asked = []

    def judge(cases):
        asked.append(cases)
        return [answer == "crimson" for answer, _ in cases]

    red, three = example("red"), example("3", "na")
    pairs = [("<answer>red</answer>", red), ("<answer>crimson</answer>", red), ("crimson", red), ("<answer>4</answer>", three),
             ("<answer>blue</answer>", red)]
    assert [s.reward for s in grade(pairs)] == [1, 0, 0, 0, 0]                     # without a judge: word for word
    assert grade(pairs, judge) == [Score(1, True), Score(1, True, judged=True), Score(0, False), Score(0, True), Score(0, True, judged=True)]
    assert asked == [[("crimson", red), ("blue", red)]]
    grade([("<answer>red</answer>", red)], judge)
    assert len(asked) == 1                                                        # nothing open, nothing asked
    assert grade([("<think>hm</think>crimson", red)], judge, whole_text=True) == [Score(1, False, judged=True)]
    assert asked[1:] == [[("crimson", red)]]                                      # ... about the answer alone


def test_equal_answers_to_a_question_get_one_verdict(tiny):
    """In bf16 a batch's padding can turn a near tie: eight equal answers once earned 0 0 0 0 1 1 1 1."""
    model, codec = tiny
    judge, asked = Judge(model, codec.tokenizer, batch=4), []

    class Moody:
        """Says Yes to the first row of every batch, and No to all others."""
        device = "cpu"

        def __call__(self, input_ids, **_):
            asked.append(len(input_ids))
            logits = torch.zeros(len(input_ids), 1, model.config.text_config.vocab_size)
            logits[:, :, judge.no] = 1
            logits[0, :, judge.yes] = 2
            return SimpleNamespace(logits=logits)

    judge.model = Moody()
    red, blue = example("red"), Example(None, "which?", "blue")
    pairs = [("<answer>crimson</answer>", red)] * 5 + [("<answer>crimson</answer>", blue)] + [("<answer> crimson </answer>", red)] * 2
    assert [s.reward for s in grade(pairs, judge)] == [1, 1, 1, 1, 1, 0, 1, 1]
    assert asked == [2]


def test_the_judges_verdict_is_the_librarys_next_token(tiny):
    """Batched and padded = one by one, through generate's own scores: whichever of Yes and No it finds likelier."""
    model, codec = tiny
    cases = [(f"colour number {i} " * (i + 1), Example(None, "Which " * (5 - i), "red")) for i in range(5)]
    judge = Judge(model, codec.tokenizer, batch=4)
    scores = []
    for answer, e in cases:
        text = codec.tokenizer.apply_chat_template([{"role": "user", "content": evaluation.JUDGE.format(
            question=e.question, truth="red", given=answer.strip())}], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([codec.tokenizer(text, add_special_tokens=False)["input_ids"]])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False,
                             output_logits=True, return_dict_in_generate=True)
        scores.append(out.logits[0][0])
    scores = torch.stack(scores)                                                  # (5, V)
    assert [judge.yes, judge.no] == [codec.tokenizer(word)["input_ids"][0] for word in ("Yes", "No")]
    assert judge(cases) == (scores[:, judge.yes] > scores[:, judge.no]).tolist()
    # A random model says No to everything; two tokens that it is undecided about tell more.
    wins = (scores[:, :, None] > scores[:, None, :]).sum(0)                       # (V, V) how often one beats the other
    judge.yes, judge.no = divmod(((wins == 2) | (wins == 3)).flatten().nonzero()[0].item(), scores.shape[1])
    verdicts = judge(cases)
    assert verdicts == (scores[:, judge.yes] > scores[:, judge.no]).tolist() and len(set(verdicts)) == 2


def test_an_option_that_is_made_of_letters_is_a_word():
    assert option_letter("It is a CD", ("CD", "DVD")) == "A"
    assert option_letter("It says AB, of course", ("cd", "ab")) == "B"


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("F", "B"), ("E", None), ("The answer is B, F.", "B"), ("The letter on the sign is F, so B.", "B")])
def test_a_letter_beyond_the_options_is_no_option(text, letter):
    """Which letter is on the sign? A. K  B. F  C. P  D. T"""
    assert option_letter(text, ("K", "F", "P", "T")) == letter


@pytest.mark.parametrize("truth, right, wrong", [
    ("B-", ["B-", "b-."], ["B", "B+"]), ("C#", ["C#", "c#."], ["C"]), ("A", ["A", "A."], ["A-"]), ("5", ["5"], ["\u20135", "\u22125"]),
    ("-5", ["\u22125", "-5"], ["5"]), ("McDonald\u2019s", ["McDonald's"], ["McDonald"]), ("2010\u20132015", ["2010-2015"], ["2010"])])
def test_signs_that_belong_to_a_word(truth, right, wrong):
    for text in right:
        assert score(f"<answer>{text}</answer>", example(truth)).reward == 1, text
    for text in wrong:
        assert score(f"<answer>{text}</answer>", example(truth)).reward == 0, text


def test_blood_groups_are_told_apart():
    options = ("A+", "B+", "O-", "B-")
    assert [option_letter(text, options) for text in ("A+", "B-", "D", "D. B-", "B. B+")] == ["A", "D", "D", "D", "B"]


@pytest.mark.parametrize("text, number", [
    ("three (3)", 3), ("3 (three)", 3), ("one (1)", 1), ("Answer: one", 1), ("one dog and one cat", None),
    ("3 on the left and one on the right", None), ("3 (4)", None), ("the red one", None)])
def test_a_number_told_twice_is_one_and_two_numbers_are_none(text, number):
    found = number_in(text)
    assert (found and found[0]) == number
