"""eval.py: asking a model, the tables, resuming, and one picture of one's own. Expected numbers are worked out by hand."""

import json
from types import SimpleNamespace

import pytest
from conftest import noise
from PIL import Image

import eval as evaluation
import rollout
import toy
from crop import Box
from eval import Example, Protocol, accuracy, main, wilson


def group(text):
    return SimpleNamespace(completions=[SimpleNamespace(text=text)])


@pytest.fixture
def scripted(monkeypatch):
    """A model that follows a script. The Perceiver writes what `written` says; the Reasoner is right if it is shown a
    box that starts left of 500, and for question 3 always; for question 1 it forgets its tags when it is wrong."""
    seen = []
    written = {"0": [150, 150, 250, 250], "1": [800, 0, 900, 100], "2": [600, 600, 700, 700], "3": None}

    def perceive(model, codec, some, **how):
        seen.append(("perceive", how))
        for e in some:
            yield group(json.dumps([{"bbox_2d": written[e.question], "label": "x"}]) if written[e.question] else "no list")

    def reason(model, codec, cases, evidence, **how):
        seen.append((evidence, how))
        for e, boxes in cases:
            right = e.question == "3" or (boxes and boxes[0].x1 < 500)
            yield group("<answer>yes</answer>" if right else "yes" if e.question == "1" else "<answer>no</answer>")

    monkeypatch.setattr(evaluation, "perceive", perceive)
    monkeypatch.setattr(evaluation, "reason", reason)
    monkeypatch.setattr(evaluation, "direct", lambda model, codec, some, **how: (group(" Yes. " if e.question == "2" else "no") for e in some))
    return seen


def make(i, *boxes, **more):
    return Example(None, str(i), "yes", boxes=tuple(boxes), **more)


EXAMPLES = [make(0, Box(100, 100, 300, 300)), make(1, Box(400, 0, 500, 100)), make(2, Box(600, 600, 700, 700)), make(3)]


def test_hit_is_about_the_centres_of_all_true_boxes():
    left, right = Box(400, 400, 600, 600), Box(0, 700, 100, 800)          # centres (500, 500) and (50, 750)
    one, two = (Example(None, "q", "a", boxes=true) for true in ((left,), (left, right)))
    on_left, on_right, beside = Box(450, 450, 510, 510), Box(40, 740, 60, 760), Box(400, 400, 480, 600)
    assert evaluation.hits([on_left], one) and evaluation.hits([beside, on_left], one)
    assert not evaluation.hits([beside], one) and not evaluation.hits([], one)
    assert evaluation.hits([on_right, on_left], two) and not evaluation.hits([on_left, beside], two)
    assert not evaluation.hits([beside] * 3 + [on_left], one)             # the fourth is not cropped


def test_accuracy_by_hand(scripted):
    """Four examples, one without true boxes: four different fractions. p2r: examples 0 and 3 of four are right; plain:
    3 of four; oracle: 0 and 1 of the three with true boxes. The boxes hit in 0 and 2 of three. Example 1's p2r answer has no tags."""
    how = Protocol(perceive_tokens=7, reason_tokens=9, batch=5, penalty=1.0)
    assert evaluation.evaluate(None, None, EXAMPLES, how) == {
        "p2r": 2 / 4, "hit": 2 / 3, "plain": 1 / 4, "oracle": 2 / 3, "n": 4, "unparsable": 1 / 4, "unanswered": 1 / 4,
        "categories": {"": [2 / 4, 1 / 4]}}
    same = {"greedy": True, "batch": 5, "penalty": 1.0}
    assert scripted == [("perceive", {**same, "max_tokens": 7}), *[("both", {**same, "max_tokens": 9})] * 3]


def test_the_modes(scripted):
    def rewards(**how):
        return [r["reward"] for r in evaluation.ask(None, None, EXAMPLES, Protocol(**how))]
    assert rewards(mode="p2r") == [1, 0, 0, 1]
    assert rewards(mode="think") == [0, 0, 0, 1]
    assert rewards(mode="direct") == [0, 0, 1, 0]                                  # the whole text is the answer
    assert rewards(mode="oracle") == [1, 1, 0, 1]
    scripted.clear()
    rewards(mode="p2r", evidence="crops")
    assert [name for name, _ in scripted] == ["perceive", "crops"]
    records = list(evaluation.ask(None, None, EXAMPLES[:1] * 9, Protocol(batch=2)))
    assert len(records) == 9 and records[8]["perceived"] == records[0]["perceived"] and records[0]["boxes"] == [[150, 150, 250, 250, "x"]]


def test_at_most_so_many_boxes(scripted, monkeypatch):
    three = json.dumps([{"bbox_2d": [x, 0, x + 50, 50], "label": "x"} for x in (600, 100, 300)])
    monkeypatch.setattr(evaluation, "perceive", lambda model, codec, some, **how: (group(three) for _ in some))
    assert [[b[0] for b in r["boxes"]] for r in evaluation.ask(None, None, EXAMPLES[:1], Protocol(max_boxes=2))] == [[600, 100]]
    assert len(next(evaluation.ask(None, None, EXAMPLES[:1], Protocol()))["boxes"]) == 3


# ---------------------------------------------------------------------------------------------
# Tables


def record(category, reward, rotation="", **more):
    return dict(dict(category=category, rotation=rotation, reward=reward, boxes=[], parsable=True, answered=True, judged=False), **more)


def test_hr_bench_averages_the_rotations():
    """Four questions; their rotations are right 4, 2, 0 and 1 times, and of the last rotation only two were asked:
    (4/4 + 2/4 + 0/4 + 1/2) / 4 = 0.5, where the plain mean would be 7/14. Four questions stand behind it, not 14."""
    right = {"cycle_0": [1, 1, 1, 1], "cycle_1": [1, 1, 0, 0], "cycle_2": [0, 0, 0, 0], "cycle_3": [1, 0]}
    records = [record("single", r, c) for c, rewards in right.items() for r in rewards]
    assert accuracy(records) == (0.5, 4)
    right["cycle_3"] = [1, 1]
    assert accuracy([record("single", r, c) for c, rewards in right.items() for r in rewards])[0] == 0.625   # not 8/14
    assert accuracy([record("", 1), record("", 0), record("", 0)]) == (1 / 3, 3)


def test_wilson_interval():
    """Against the values of the R documentation's prop.test(..., correct = FALSE) family, worked out by hand for 8 of 10,
    and the two ends, where a normal interval would leave 0..1."""
    assert wilson(0.8, 10) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0.0, 10) == (pytest.approx(0, abs=1e-12), pytest.approx(0.2775, abs=1e-4))
    assert wilson(1.0, 10)[1] == pytest.approx(1)


def table(capsys, records, spec):
    evaluation.print_benchmark(records, "m in mode p2r", spec)
    return {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()[2:-1]}


def test_vstar_table_beside_the_published_rows(capsys):
    """Micro average: 2 of 3 attribute and 0 of 1 spatial is 50.0 overall, not 33.3."""
    rows = table(capsys, [record("direct_attributes", 1), record("direct_attributes", 1), record("relative_position", 0),
                          record("direct_attributes", 0)], "vstar-bench")
    assert rows[""] == ["attribute", "spatial", "overall"] and rows["this run"] == ["66.7", "0.0", "50.0"]
    assert rows["P2R-2B, published"] == ["84.3", "84.2", "84.3"] and rows["Qwen3-VL-8B, published"] == ["84.3", "82.9", "83.8"]


@pytest.mark.parametrize("spec, row", [("DreamMr/HR-Bench/hr_bench_8k.parquet", ["86.8", "62.7", "74.8"]), ("HRBench4K.tsv", ["89.8", "60.1", "75.1"]),
                                       ("my_copy.tsv", None),
                                       ("bench_4k_8k/hr_bench_8k.tsv", ["86.8", "62.7", "74.8"])])
def test_hr_bench_by_resolution(capsys, spec, row):
    rows = table(capsys, [record("single", 1, "cycle_0"), record("cross", 0, "cycle_0")], spec)
    assert rows["this run"] == ["100.0", "0.0", "50.0"] and rows.get("P2R-2B, published") == row


def test_mme_columns(capsys):
    records = [record(f"{task}/{name}", i % 2) for i, (task, name) in enumerate(
        [("Perception", "Remote Sensing"), ("Perception", "OCR with Complex Context"), ("Reasoning", "Autonomous_Driving")])]
    rows = table(capsys, records, "mme")
    assert rows[""] == ["p-OCR", "p-RS", "r-AD", "overall"] and rows["this run"] == ["100.0", "0.0", "0.0", "33.3"]
    assert rows["P2R-2B, published"] == ["88.4", "43.3", "35.5", "51.3"] and rows["Qwen3-VL-4B, published"] == ["-", "-", "-", "47.7"]


def test_the_line_below_the_table(capsys):
    """Two boxes of 1 % and 3 % on two questions, one unparsable, one without an answer."""
    evaluation.print_benchmark([record("x", 1, boxes=[[0, 0, 100, 100, "a"], [0, 0, 100, 300, "b"]]),
                                record("x", 0, parsable=False, answered=False)], "m", "own.jsonl", 2.5)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("1.00 boxes a question of 2.0% of the image; without an answer 50.0%, judged 0.0%, unparsable boxes 50.0%; "
                    "2.50 questions/s")


# ---------------------------------------------------------------------------------------------
# The program


@pytest.fixture
def data(tmp_path):
    for i in range(6):
        noise(200, 120, i).save(tmp_path / f"{i}.png")
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(
        {"image": f"{i}.png", "question": f"Which way, {i}?", "answer": "down", "category": "ab"[i % 2]}) + "\n" for i in range(6)))
    return tmp_path / "own.jsonl"


def flags(folder, data, out, *more):
    return ["--model", str(folder), "--data", str(data), "--out", str(out), "--max-pixels", "4096", "--min-pixels", "4096",
            "--perceive-tokens", "6", "--reason-tokens", "5", "--batch", "1", "--pictures", "2", *more]


def test_a_killed_run_goes_on_where_it_stopped(folder, data, tmp_path, monkeypatch, capsys):
    """Batches of 1, written after every four questions. Killed in the fifth, with half a line on disk, the second run
    asks only what is missing, and the file ends up as an undisturbed run leaves it."""
    assert main(flags(folder, data, tmp_path / "whole")) == 0
    whole = (tmp_path / "whole" / "results.jsonl").read_text()
    assert len(whole.splitlines()) == 6 and sorted(f.name for f in (tmp_path / "whole").glob("*.png")) == ["00001.png", "00002.png"]
    printed = capsys.readouterr().out

    real, asked = evaluation.perceive, []

    def killed(model, codec, some, **how):
        asked.append([e.question for e in some])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(model, codec, some, **how)

    monkeypatch.setattr(evaluation, "perceive", killed)
    with pytest.raises(KeyboardInterrupt):
        main(flags(folder, data, tmp_path / "cut"))
    results = tmp_path / "cut" / "results.jsonl"
    assert len(results.read_text().splitlines()) == 4
    results.write_text(results.read_text()[:-20])                                  # ... and the disk lost the end of the fourth
    asked += [None]                                                                # no more killing
    assert main(flags(folder, data, tmp_path / "cut")) == 0
    # Three whole lines are no whole batch of four, so all are asked again: bf16 rounds by the batch.
    assert [len(a) for a in asked if a] == [4, 2, 4, 2] and results.read_text() == whole
    results.write_text("".join(whole.splitlines(True)[:5]))
    assert main(flags(folder, data, tmp_path / "cut")) == 0
    assert [len(a) for a in asked if a][4:] == [2] and results.read_text() == whole
    strip = [line for line in printed.splitlines() if "questions/s" not in line and "results and" not in line]
    again = capsys.readouterr().out.splitlines()
    assert all(line in again for line in strip)

    assert main(flags(folder, data, tmp_path / "cut", "--penalty", "1.2")) == 2    # not the same protocol
    assert "penalty was 1.05 and is 1.2" in capsys.readouterr().err
    data.write_text(data.read_text().replace("down", "up"))                        # nor the same questions
    assert main(flags(folder, data, tmp_path / "cut")) == 2
    assert "the questions are not the same" in capsys.readouterr().err


def test_an_error_leaves_nothing_in_the_way(folder, data, tmp_path, capsys):
    assert main(flags(folder, data, tmp_path / "run", "--judge", "typo")) == 2 and "--judge typo" in capsys.readouterr().err
    assert main(flags(folder, data, tmp_path / "run", "--limit", "1")) == 0
    (tmp_path / "run" / "results.jsonl").write_text("{\n")
    assert main(flags(folder, data, tmp_path / "run", "--limit", "1")) == 2 and "not JSON" in capsys.readouterr().err


def test_the_score_is_recomputed_without_a_model(folder, data, tmp_path, capsys):
    assert main(flags(folder, data, tmp_path / "run")) == 0
    file = tmp_path / "run" / "results.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    records[0] |= {"reasoned": "<answer>Down!</answer>", "reward": 0.0}
    records[1] |= {"reasoned": "<answer>downwards</answer>", "reward": 1.0, "judged": True}    # a judge said yes: kept
    records[2] |= {"reasoned": "<answer>up</answer>", "reward": 1.0}
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    capsys.readouterr()
    assert main(["--score", str(file)]) == 0
    assert "this run                      33.3      33.3      33.3" in capsys.readouterr().out
    assert main(["--score", str(tmp_path / "none.jsonl")]) == 2


def test_limit_draws_the_same_questions_every_time(folder, data, tmp_path):
    for name in ("a", "b"):
        assert main(flags(folder, data, tmp_path / name, "--limit", "3", "--mode", "direct")) == 0
    assert (tmp_path / "a" / "results.jsonl").read_text() == (tmp_path / "b" / "results.jsonl").read_text()
    records = [json.loads(line) for line in (tmp_path / "a" / "results.jsonl").read_text().splitlines()]
    assert len(records) == 3 and [r["id"] for r in records] == sorted({r["id"] for r in records})
    assert all(evaluation.answer_in(r["reasoned"]) is not None and r["perceived"] is None for r in records)


def test_without_a_model_it_is_the_toy_and_says_so(data, tmp_path, capsys, monkeypatch):
    scene = toy.make_scene(__import__("random").Random(5), 3)
    toy.draw_scene(scene).save(tmp_path / "photo.png")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(toy, "write_data", lambda folder, count, seed, kinds: folder.mkdir())
    question = toy.questions(scene)[0]
    for file in ("photo-1.png", "photo-2.png"):                                    # never written over
        assert main(["--image", str(tmp_path / "photo.png"), "--question", question.text, "--out", str(tmp_path / "pictures")]) == 0
        said = capsys.readouterr().out
        assert "embedded toy" in said and "pixels (" in said and file in said
        assert any(f"answer   {way}" in said for way in toy.WAYS)
        assert Image.open(tmp_path / "pictures" / file).width == 1200


@pytest.mark.parametrize("more, message", [
    (["--image", "none.png", "--question", "What?"], "none.png"),
    (["--image", "none.png"], "--question"),
    (["--model", "none"], "--data"),
    (["--model", "none", "--image", "a.png", "--question", "What?"], "--model none"),
    (["--data", "none.jsonl"], "--data none.jsonl"),
    (["--image", "a.png", "--question", "What?", "--batch", "0"], "--batch 0"),
    (["--image", "a.png", "--question", "What?", "--penalty", "0"], "--penalty 0"),
    (["--image", "a.png", "--question", "What?", "--out", "a.png"], "a.png"),
    (["--score", "a.png"], "--score a.png"),
])
def test_bad_input_is_one_sentence(more, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(toy, "write_data", lambda folder, count, seed, kinds: folder.mkdir())
    monkeypatch.chdir(tmp_path)
    noise(20, 20).save("a.png")
    assert main(more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_unknown_choices_are_refused():
    for flag in (["--evidence", "all"], ["--mode", "guess"]):
        with pytest.raises(SystemExit):
            main(flag)


def test_the_judge_of_a_vision_model_and_of_its_folder_are_one(folder, tiny):
    model, codec = tiny
    loaded, own = evaluation.Judge.load(str(folder), "cpu"), evaluation.Judge(model, codec.tokenizer)
    cases = [(f"answer {i}", Example(None, "Which colour?" * i, "navy")) for i in range(8)]
    for loaded.yes, loaded.no in ((40, 41), (50, 60), (70, 80)):                   # a random model says No to everything
        own.yes, own.no = loaded.yes, loaded.no
        assert loaded(cases) == own(cases)
    with pytest.raises(rollout.InputError, match="--judge none-such"):
        evaluation.Judge.load("none-such", "cpu")
