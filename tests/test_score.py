"""What counts as correct: a pile of answers, each with its expected verdict, written by hand."""

import random
import re
import string
from fractions import Fraction

import pytest

import eval as evaluation
from eval import Example, Judge, Score, grade, number_in, option_letter, score

COLOURS = ("red", "a blue car", "green", "Apple")
NOTES = ("Gate E", "red and blue", "Vitamin C", "5 or 6", "The image does not show it.")


@pytest.mark.parametrize("text, options, letter", [
    # one letter, however it is dressed
    ("C", (), "C"), ("c", (), "C"), ("(C)", (), "C"), ("(c)", (), "C"), ("C.", (), "C"), ("C)", (), "C"), ("C:", (), "C"),
    ("**C**", (), "C"), ("`C`", (), "C"), (" C \n", (), "C"), ("$C$", (), "C"), (r"\boxed{C}", (), "C"), ("F", (), "F"), ("a", (), "A"),
    ('"C"', (), "C"), ("\u201cC\u201d", (), "C"), ("[C]", (), "C"), (r"\(C\)", (), "C"), ("( C )", (), "C"), ("C\u3002", (), "C"), ("\uff08C\uff09", (), "C"),
    # a letter is a letter, also where some option's text is that letter (which letter is on the sign?)
    ("A", ("B", "A", "D", "C"), "A"), ("(A)", ("B", "A", "D", "C"), "A"), ("A. B", ("B", "A", "D", "C"), "A"), ("D", ("B", "A", "D", "C"), "D"),
    # with its option's text
    ("C. blue", (), "C"), ("C) blue", (), "C"), ("(C) blue", (), "C"), ("C: blue", (), "C"), ("C - blue", (), "C"), ("**C.** blue", (), "C"),
    ("C. green", COLOURS, "C"), ("C green", COLOURS, "C"), ("C, green", COLOURS, "C"), ("B. A blue car.", COLOURS, "B"), ("B. A cat", (), "B"),
    ("C \u2013 green", (), "C"), ("C \u2014 green", COLOURS, "C"), ("C\n\nThe car is green.", (), "C"), ("C.\n\nThe car is green.", (), "C"),
    ("C.green", COLOURS, "C"), ("(C)green", COLOURS, "C"), ("B. A man and a dog", (), "B"), ("A. 25 \u00b0C", (), "A"), ("D. It'd rain", (), "D"),
    ("A. The bus and a car", ("the bus", "the car", "none"), "A"),
    # announced
    ("### Answer: C", (), "C"), ("So the answer is C", (), "C"), ("Therefore, the answer is C.", (), "C"), ("The answer should be C", (), "C"),
    ("The letter is C", (), "C"), ("C is the correct answer", (), "C"), ("C is correct.", (), "C"),
    ("The answer is C", (), "C"), ("The answer is C.", (), "C"), ("the answer is (c).", (), "C"), ("Answer: C", (), "C"), ("Option C", (), "C"),
    ("The correct answer is (C)", (), "C"), ("The correct option is C", (), "C"), ("Final answer: C", (), "C"), ("My answer is C", (), "C"),
    ("The answer is option C", (), "C"), ("The answer is C. green", COLOURS, "C"),
    # an option's full text
    ("green", COLOURS, "C"), ("Green.", COLOURS, "C"), ("blue car", COLOURS, "B"), ("The blue car", COLOURS, "B"), ("Apple", COLOURS, "D"),
    ("The answer is green", COLOURS, "C"), ("the image does not show it", NOTES, "E"), ("Gate E", NOTES, "A"), ("red and blue", NOTES, "B"),
    ("C. Vitamin C", NOTES, "C"), ("(A) Gate E", NOTES, "A"), ("B. red and blue", NOTES, "B"), ("D. 5 or 6", NOTES, "D"),
    # no letter, or more than one
    ("", (), None), ("?", (), None), ("G", (), None), ("Apple", (), None), ("Apple", ("red", "blue"), None), ("AB", (), None), ("a dog", (), None),
    ("A or B", (), None), ("A or B or C", (), None), ("A. or B.", (), None), ("A, B", (), None), ("A/B", (), None), ("A and C", (), None),
    ("A & C", (), None), ("(A) or (B)", (), None), ("A. red B. a blue car", COLOURS, None), ("A: no, B", (), None), ("A. no, wait: b", (), None),
    ("Either A or B", (), None), ("not C", (), None), ("C is wrong", (), None), ("C. Vitamin C or E", NOTES, None),
    # a letter and another option's text contradict each other
    ("B. green", COLOURS, None), ("A. red and blue", NOTES, None), ("A blue bus", COLOURS, None),
    # sentences and essays
    ("Based on the sign, C", (), None), ("Because it is", (), None), ("yesterday", (), None), ("e.g. the red one", (), None),
    ("I cannot see the car clearly, but it may be a dark one", (), None), ("C because the sign is green", (), None),
    ("C. " + "the sign says so " * 20, (), None), ("D'accord", (), None), ("A" * 10_000, (), None), ("(" * 10_000, (), None),
])
def test_option_letters(text, options, letter):
    assert option_letter(text, options) == letter


def first_capital(text):
    """The benchmarks' rule in its usual form: the first of A..E in the text, standing anywhere."""
    found = re.search("[ABCDE]", text)
    return found and found[0]


def test_agreement_with_the_benchmarks_rule():
    """On clean outputs the two agree. Where the benchmarks' rule is fooled, ours is not."""
    for letter in "ABCDE":
        for clean in ("{}", "({})", "{}.", "{}) blue", "({}) blue", "{}. blue", "**{}**"):
            assert option_letter(clean.format(letter)) == first_capital(clean.format(letter)) == letter
    for fooled, ours, theirs in (("Based on the sign, C", None, "B"), ("c", "C", None), ("Apple", None, "A"), ("Don't know", None, "D")):
        assert (option_letter(fooled), first_capital(fooled)) == (ours, theirs)


@pytest.mark.parametrize("text, value, percent", [
    ("3", 3, False), ("3.0", 3, False), ("1,200", 1200, False), ("1200.0", 1200, False), ("1,234,567.5", 1234567.5, False), (".5", 0.5, False),
    ("-2.5 m", -2.5, False), ("\u22125", -5, False), ("+7", 7, False), ("3/4", 0.75, False), ("75%", 75, True), ("75 percent", 75, True),
    ("1.5e3", 1500, False), ("$5", 5, False), ("-$5", -5, False), ("\u20135", -5, False), ("No.5", 5, False), ("2 million", 2_000_000, False),
    ("three people", 3, False), ("There are three.", 3, False), ("about 40 people", 40, False), ("40km/h", 40, False), ("5 m2", 5, False),
    ("three", 3, False), ("Twelve.", 12, False), ("5.", 5, False), ("0", 0, False), ("the 5th", 5, False),
])
def test_numbers(text, value, percent):
    assert number_in(text) == (Fraction(str(value)), percent)


@pytest.mark.parametrize("text", ["", "three or four", "many", "3 or 4", "between 2 and 5", "3-5", "3,4", "1,2,3", "1,2000", "12:30", "1.2.3",
                                  "2024-01-05", "1/0", "1/2/3", "x5", "none", "9" * 30 + " 9", "1_000", "the red one", "three of twelve"])
def test_no_number(text):
    assert number_in(text) is None


@pytest.mark.parametrize("answer, truth, same", [
    ("1200.0", "1,200", True), ("1201", "1,200", False), ("0.75", "3/4", True), ("75%", "3/4", True), ("75%", "0.75", True), ("75", "75%", True),
    ("0.75", "75%", True), ("75%", "75", True), ("75%", "75%", True), ("0.75%", "75%", False), ("0.75", "75", False), ("7.5", "75%", False),
    ("40 km/h", "40", True), ("three", "3", True), ("-3", "3", False), ("0", "0", True), ("0.0001", "0", False), ("12 or 13", "12", False),
    ("1000001", "1000000", False), ("5551239", "5551234", False),
    ("0.33333333", "1/3", True), ("0.3333", "1/3", False), ("1.5 million", "1500000", True), ("9" * 400, "9" * 400, True), ("", "0", False),
])
def test_same_number(answer, truth, same):
    assert evaluation.same_number(answer, truth) == same


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


def test_no_text_breaks_the_rules():
    """Anything printable, anywhere: a verdict, never an exception, and never a right answer where the truth is not in the text."""
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice(string.printable + "\u2212\u0663\u00bd") for _ in range(rng.randint(0, 40)))
        for truth in (example("quagga"), example("123456", "na")):
            assert score(f"<answer>{text}</answer>", truth).reward == 0
        assert score(f"<answer>{text}</answer>", example("B", "mca", ("red", "blue"))).reward <= ("b" in text.lower())
        assert score(text, example("quagga")) == (0, False, False, False)


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
    assert grade([("x", red)], judge, rule=lambda text, e: Score(0.5, True)) == [Score(0.5, True)]


def test_the_judges_verdict_is_the_librarys_next_token(tiny):
    """Batched and padded = one by one, through generate's own scores: whichever of Yes and No it finds likelier."""
    import torch
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
