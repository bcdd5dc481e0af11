"""eval.py: asking a model, the tables, resuming, and one picture of one's own. Expected numbers are worked out by hand."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import noise
from PIL import Image

import eval as evaluation
import rollout
import toy
from crop import Box, parse_boxes
from eval import Example, Protocol, accuracy, add_flags, printable, run_program, wilson
from rollout import InputError

ROOT = Path(evaluation.__file__).parent


def main(arguments):
    return run_program("eval.py", evaluation.main, arguments)


def group(text):
    """What `perceive` yields; the other verbs leave `parsed` alone."""
    return SimpleNamespace(completions=[SimpleNamespace(text=text, parsed=parse_boxes(text))])


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
    same = {"greedy": True, "rows": 5, "penalty": 1.0}
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
    for n in range(1, 400):                                               # rounding must not lead outside
        assert wilson(1.0, n)[1] <= 1 and wilson(0.0, n)[0] >= 0


def table(capsys, records, spec):
    evaluation.print_benchmark(records, "m in mode p2r", spec)
    return {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()[1:-1]}


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
    rows = table(capsys, records, "yifanzhang114/MME-RealWorld-lite-lmms-eval")
    assert rows[""] == ["p-OCR", "p-RS", "r-AD", "overall"] and rows["this run"] == ["100.0", "0.0", "0.0", "33.3"]
    assert rows["P2R-2B, published"] == ["88.4", "43.3", "35.5", "51.3"] and rows["Qwen3-VL-4B, published"] == ["-", "-", "-", "47.7"]
    for spec in ("yifanzhang114/MME-RealWorld-lite-lmms-eval/data/test.parquet", "MME-RealWorld-Lite.tsv"):
        assert "P2R-2B, published" in table(capsys, records, spec)
    evaluation.print_benchmark(records, "m", "yifanzhang114/MME-RealWorld-Lmms-eval")          # the full set is not the Lite one
    assert "Lite" not in (said := capsys.readouterr().out) and "published" not in said


def test_rows_that_contradict_themselves_are_marked():
    """HR-Bench's overall value is the mean of its halves, which have 400 questions each. Where the paper's is not, by more
    than rounding (0.15 at most), the row must be marked; no other may be."""
    tables = json.loads((ROOT / "assets" / "published.json").read_text())
    for title in ("HR-Bench 4K", "HR-Bench 8K"):
        off = [who for who, (single, cross, overall) in tables[title]["rows"].items() if abs((single + cross) / 2 - overall) > 0.2]
        assert off == tables[title]["doubtful"] and len(off) == 1
    marked = [tables[title]["doubtful"] for title in ("V*", "MME-RealWorld-Lite")]
    assert marked == [[], []]


def test_a_marked_row_is_printed_so(capsys):
    rows = table(capsys, [record("single", 1, "cycle_0")], "HRBench4K.tsv")
    assert rows["P2R-8B, published *"] == ["93.5", "81.5"] and "P2R-4B, published" in rows

def test_the_line_below_the_table(capsys):
    """Two boxes of 1 % and 3 % on two questions, one unparsable, one without an answer."""
    evaluation.print_benchmark([record("x", 1, boxes=[[0, 0, 100, 100, "a"], [0, 0, 100, 300, "b"]]),
                                record("x", 0, parsable=False, answered=False)], "m", "own.jsonl", 2.5)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("1.00 boxes a question of 2.0% of the image, without an answer 50.0%, judged 0.0%, unparsable boxes 50.0%; "
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
    return ["--model", str(folder), "--data", str(data), "--out", str(out), "--max-pixels", "4096",
            "--perceive-tokens", "6", "--reason-tokens", "5", "--batch", "1", "--pictures", "2", *more]


def test_a_folder_that_holds_something_else_is_left_alone(folder, data, tmp_path, capsys):
    """A model's folder as --out lost its config.json to ours, a training run's could not be resumed."""
    out = tmp_path / "model"
    shutil.copytree(folder, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert main(flags(folder, data, out)) == 2
    assert "holds something, but no results" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


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
    assert main(flags(folder, data, tmp_path / "cut")) == 128 + signal.SIGINT
    assert "eval.py: stopped by SIGINT" in capsys.readouterr().err
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


def test_results_of_other_code_or_other_weights_are_not_taken_for_these(folder, data, tmp_path, monkeypatch, capsys):
    model = shutil.copytree(folder, tmp_path / "model")
    code = tmp_path / "code" / "rollout.py"
    code.parent.mkdir()
    code.write_text("PERCEIVER = 1\n")
    monkeypatch.setattr(evaluation, "HERE", code.parent)
    asked = flags(model, data, tmp_path / "out", "--limit", "1", "--mode", "direct", "--pictures", "0")
    monkeypatch.setattr(evaluation, "print_benchmark", lambda *a: None)
    assert main(asked) == 0 and main(asked) == 0

    code.write_text("PERCEIVER = 2\n")
    assert main(asked) == 2 and "version_of_code" in capsys.readouterr().err
    code.write_text("PERCEIVER = 1\n")
    assert main(asked) == 0
    os.utime(next(model.glob("*.safetensors")), ns=(1, 1))
    assert main(asked) == 2 and "version_of_weights" in capsys.readouterr().err


def test_results_of_other_images_are_not_taken_for_these(folder, data, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for image in tmp_path.glob("*.png"):
        shutil.copy(image, other)
    asked = flags(folder, data, tmp_path / "out", "--limit", "1", "--mode", "direct", "--pictures", "0")
    assert main(asked) == 0 and main([*asked, "--images", str(other)]) == 2
    assert "images was" in capsys.readouterr().err


def test_what_is_thought_unasked_is_not_part_of_a_direct_answer(folder, monkeypatch):
    example = Example(None, "Which?", "B", "mca", ("blue", "red"))
    for text, reward in (("A or B? It is red.</think>\n\nB", 1), ("<think>It is red", 0)):
        monkeypatch.setattr(evaluation, "direct", lambda *a, text=text, **how: iter([group(text)]))
        [record] = evaluation.ask(None, None, [example], Protocol(mode="direct"))
        assert record["reward"] == reward


def test_oracle_asks_where_there_are_boxes_and_nowhere_else(folder, tmp_path, capsys):
    noise(20, 20).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "What?", "answer": "red"} for _ in range(3)]
    rows[1]["boxes"] = [[0, 0, 500, 500]]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = flags(folder, file, tmp_path / "out", "--mode", "oracle", "--pictures", "0")
    assert main(asked) == 0 and len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 1
    assert "1 of 3 questions that have boxes" in capsys.readouterr().out
    file.write_text(json.dumps(rows[0]) + "\n")
    assert main(asked) == 2 and "true boxes" in capsys.readouterr().err


@pytest.mark.parametrize("model, limit, name", [
    ("runs/X-1/final", 0, "X-1-final-d-p2r"), ("runs/X-2/final", 60, "X-2-final-d-p2r-60"),
    ("runs/X-1/phases/2-reasoning", 0, "X-1-2-reasoning-d-p2r"), ("Qwen/Qwen3-VL-2B-Instruct", 0, "Qwen3-VL-2B-Instruct-d-p2r")])
def test_every_model_and_every_limit_has_a_folder_of_its_own(model, limit, name):
    task = evaluation.Task(model=model, data="x/d.jsonl", limit=limit)
    assert evaluation.default_folder(task, Protocol()) == f"runs/eval-{name}"


def test_an_error_leaves_nothing_in_the_way(folder, data, tmp_path, capsys):
    assert main(flags(folder, data, tmp_path / "run", "--judge", "typo")) == 2 and "--judge typo" in capsys.readouterr().err
    assert main(flags(folder, data, tmp_path / "run", "--limit", "1")) == 0
    (tmp_path / "run" / "results.jsonl").write_text("{\n")
    assert main(flags(folder, data, tmp_path / "run", "--limit", "1")) == 2 and "not JSON" in capsys.readouterr().err


def test_limit_draws_the_same_questions_every_time(folder, data, tmp_path):
    for name in ("a", "b"):
        assert main(flags(folder, data, tmp_path / name, "--limit", "3", "--mode", "direct")) == 0
    assert (tmp_path / "a" / "results.jsonl").read_text() == (tmp_path / "b" / "results.jsonl").read_text()
    records = [json.loads(line) for line in (tmp_path / "a" / "results.jsonl").read_text().splitlines()]
    assert len(records) == 3 and len({r["id"] for r in records}) == 3
    assert all(r["answered"] and r["perceived"] is None for r in records)


def test_an_image_that_breaks_in_the_middle_is_left_out_and_the_run_goes_on(folder, data, tmp_path, capsys):
    """The fifth image's body is cut off. The run stops there, names the file and the way out; with --skip-bad the same
    command keeps what was answered and ends as if the image had never been in the data."""
    sound = tmp_path / "sound.jsonl"
    sound.write_text("".join(line + "\n" for line in data.read_text().splitlines() if '"4.png"' not in line))
    rows = [json.loads(line) | {"id": i} for i, line in enumerate(data.read_text().splitlines())]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sound.write_text("".join(json.dumps(row) + "\n" for row in rows if row["id"] != 4))
    whole = (tmp_path / "4.png").read_bytes()
    (tmp_path / "4.png").write_bytes(whole[:len(whole) // 2])
    assert main(flags(folder, data, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith("eval.py: ") and "4.png" in last and "--skip-bad" in last
    results = tmp_path / "run" / "results.jsonl"
    before = results.read_text()
    assert len(before.splitlines()) == 4
    assert main(flags(folder, data, tmp_path / "run", "--skip-bad")) == 0
    assert results.read_text().startswith(before) and len(results.read_text().splitlines()) == 5
    assert main(flags(folder, sound, tmp_path / "sound")) == 0
    assert (tmp_path / "sound" / "results.jsonl").read_text() == results.read_text()


def test_limit_keeps_its_questions_when_one_is_left_out(folder, data, tmp_path):
    def asked(name, *more):
        assert main(flags(folder, data, tmp_path / name, "--limit", "4", "--mode", "direct", *more)) == 0
        return [json.loads(line)["question"] for line in (tmp_path / name / "results.jsonl").read_text().splitlines()]
    first = asked("a")
    rows = [json.loads(line) | {"id": i} for i, line in enumerate(data.read_text().splitlines(), start=1)]
    gone = first[2]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows if row["question"] != gone))
    then = asked("b")
    assert then[:2] == first[:2] and then[2] == first[3] and gone not in then and len(then) == 4


def test_a_picture_of_ones_own(folder, tmp_path, capsys):
    noise(300, 200).save(tmp_path / "photo.png")
    arguments = ["--model", str(folder), "--image", str(tmp_path / "photo.png"), "--question", "What is it?", "--out", str(tmp_path / "pictures"),
                 "--max-pixels", "4096", "--perceive-tokens", "4", "--reason-tokens", "4"]
    for file in ("photo-1.png", "photo-2.png"):                                    # never written over
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert "answer   (none" in said and file in said
        assert Image.open(tmp_path / "pictures" / file).width == 1200


def test_boxes_and_answer_are_printed_in_pixels_and_without_control_characters(folder, tmp_path, capsys, monkeypatch):
    noise(400, 200).save(tmp_path / "photo.png")
    boxes = json.dumps([{"bbox_2d": [0, 0, 500, 500], "label": "sign\x1b[2J"}])
    monkeypatch.setattr(evaluation, "perceive", lambda *a, **how: iter([group(boxes)]))
    monkeypatch.setattr(evaluation, "reason", lambda *a, **how: iter([group("<answer>EXIT\x07\u202e</answer>")]))
    assert main(["--model", str(folder), "--image", str(tmp_path / "photo.png"), "--question", "What?", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "red      sign\\x1b[2J: pixels (0, 0, 200, 100)" in said and "answer   EXIT\\x07\\u202e" in said
    assert printable("caf\u00e9 \u7b54") == "caf\u00e9 \u7b54"


def test_without_a_model_a_picture_is_refused_in_one_sentence(tmp_path, capsys):
    noise(20, 20).save(tmp_path / "a.png")
    assert main(["--image", str(tmp_path / "a.png"), "--question", "What?"]) == 2
    error = capsys.readouterr().err
    assert "toy" in error and "--model Qwen/Qwen3-VL-2B-Instruct" in error and error.count("\n") == 1


def test_a_trained_model_brings_its_budgets(folder, data, tmp_path, capsys):
    """final/p2r.json fills in what no flag says; a flag wins."""
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    for file in Path(folder).iterdir():
        (final / file.name).symlink_to(file)
    own = {"max_pixels": 4096, "perceive_tokens": 6, "reason_tokens": 7, "evidence": "crops"}
    (final / "p2r.json").write_text(json.dumps(own))
    given = ["--model", str(final), "--data", str(data), "--limit", "1", "--reason-tokens", "5", "--pictures", "0"]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: config[name] for name in own} == own | {"reason_tokens": 5} and config["penalty"] == 1.05
    assert "perceive_tokens 6" in capsys.readouterr().out
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert main(["--model", str(tmp_path / "run"), "--data", str(data)]) == 2
    assert f"{tmp_path / 'run' / 'final'}" in capsys.readouterr().err


@pytest.mark.parametrize("more, message", [
    (["--model", "m", "--image", "none.png", "--question", "What?"], "--image none.png: there is no such file"),
    (["--model", "m", "--image", "a.png"], "--question"),
    (["--model", "m", "--image", "a.png", "--question", "Q\udcff?"], "--question holds"),
    (["--model", "m", "--image", "a.png", "--question", "hi <|im_end|> x"], "--question holds a token"),
    (["--model", "m", "--image", "a.png", "--question", "  "], "--question together"),
    (["--model", "m", "--image", "a.png", "--question", "What?", "--data", "d.jsonl"], "either"),
    (["--model", "toy", "--image", "a.png", "--question", "What?", "--mode", "oracle"], "oracle"),
    (["--reason-tokens", "99999999999"], "positions of this model"),
    (["--question", "What?"], "--image"),
    (["--model", "none"], "--data"),
    (["--model", "none", "--image", "a.png", "--question", "What?"], "--model none"),
    (["--data", "none.jsonl"], "--data none.jsonl"),
    (["--data", ""], "--data is empty"), (["--image", "", "--question", "What?"], "--image is empty"), (["--model", ""], "--model is empty"),
    (["--batch", "0"], "--batch 0"), (["--batch", "-1"], "--batch -1"), (["--penalty", "0"], "--penalty 0"), (["--penalty", "nan"], "--penalty nan"),
    (["--penalty", "inf"], "--penalty inf"), (["--limit", "-1"], "--limit -1"), (["--pictures", "-1"], "--pictures -1"),
    (["--max-pixels", "0"], "--max-pixels 0"), (["--mode", "guess"], "--mode guess"), (["--evidence", "all"], "--evidence all"),
    (["--answer-form", "essay"], "--answer-form essay"),
    (["--out", "a.png", "--limit", "1"], "a.png"),
])
def test_bad_input_is_one_sentence(folder, more, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    noise(20, 20).save(tmp_path / "a.png")
    (tmp_path / "world.jsonl").write_text(json.dumps({"image": "a.png", "question": "What?", "answer": "red"}) + "\n")
    toys = {"model": str(folder), "eval_data": str(tmp_path / "world.jsonl"), "max_pixels": 4096, "perceive_tokens": 4, "reason_tokens": 4}
    monkeypatch.setattr(toy, "defaults", lambda *a: toys)
    monkeypatch.chdir(tmp_path)
    assert main(more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "field" not in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_program_with_one_line(number, capsys):
    before = signal.getsignal(number)

    def work(arguments):
        os.kill(os.getpid(), number)
        time.sleep(5)

    assert run_program("prog", work, hint="the same command goes on") == 128 + number
    assert capsys.readouterr().err.strip() == f"prog: stopped by {number.name}; the same command goes on"
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    """As nohup and a script's & want it."""
    for number in (signal.SIGINT, signal.SIGHUP):
        before = signal.signal(number, signal.SIG_IGN)
        try:
            assert number not in evaluation.ending_signals() and signal.SIGTERM in evaluation.ending_signals()
        finally:
            signal.signal(number, before)


def test_a_disk_without_locks_is_no_second_process(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    evaluation.lock(tmp_path / "lock").close()


def test_what_a_user_can_mend_is_one_line_and_a_fault_of_ours_is_not_hidden(capsys):
    def fails(error):
        def work(arguments):
            raise error
        return work
    assert run_program("prog", fails(InputError("--data x: no"))) == 2 and capsys.readouterr().err == "prog: --data x: no\n"
    assert run_program("prog", fails(PermissionError(13, "denied", "x"))) == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ZeroDivisionError):
        run_program("prog", fails(ZeroDivisionError()))
    assert run_program("prog", lambda arguments: None) == 0


def test_ctrl_c_while_torch_is_imported_prints_no_traceback():
    """The module sets the signal's default action before anything heavy is imported."""
    process = subprocess.Popen([sys.executable, str(ROOT / "eval.py"), "--help"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 0) and b"Traceback" not in error


# ---------------------------------------------------------------------------------------------
# Flags


@dataclass
class Knobs:
    """Not # a comment."""
    # What is asked
    name: str = ""        # a name, with a colon: and 10 % of something
    share: float = 0.5    # a help text that goes on
                          # in a second line

    # How long
    steps: int = 3        # how many
    fast: bool = False    # hurry up

    def check(self):
        # not a help text
        limit: int = 3    # neither
        return limit


def test_flags_come_from_the_comments(capsys):
    import argparse
    parser = argparse.ArgumentParser()
    add_flags(parser, Knobs)
    assert vars(parser.parse_args([])) == {}                                       # only what was given comes back
    assert vars(parser.parse_args(["--share", "0.25", "--fast", "--name", ""])) == {"share": 0.25, "fast": True, "name": ""}
    assert vars(parser.parse_args(["--no-fast"])) == {"fast": False}
    text = " ".join(parser.format_help().split("show this help")[1].split())
    assert "a help text that goes on in a second line (default: 0.5)" in text and "and 10 % of something --share" in text
    assert text.index("What is asked:") < text.index("--name") < text.index("--share") < text.index("How long:") < text.index("--steps")
    assert "neither" not in text and "not a help" not in text


def test_a_columns_table(capsys):
    """One column for each measurement, kinds of questions below where there are several."""
    row = {"p2r": 0.5, "hit": None, "plain": 0.25, "oracle": 1.0, "n": 12, "categories": {"one": [0.5, 0.2]}}
    evaluation.print_accuracy([("before", row), ("step 50", row | {"p2r": 0.75})])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert lines[0][-3:] == ["before", "step", "50"] and lines[1][-2:] == ["0.500", "0.750"] and lines[2][-2:] == ["-", "-"]
    assert len(lines) == 5
    both = row | {"categories": {"one": [0.5, 0.2], "two": [0.125, 0.2]}}
    evaluation.print_accuracy([("before", both)])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["p2r,", "two", "0.125"]


def test_the_judge_of_a_vision_model_and_of_its_folder_are_one(folder, tiny):
    model, codec = tiny
    loaded, own = evaluation.Judge.load(str(folder), "cpu"), evaluation.Judge(model, codec.tokenizer)
    cases = [(f"answer {i}", Example(None, "Which colour?" * i, "navy")) for i in range(8)]
    for loaded.yes, loaded.no in ((40, 41), (50, 60), (70, 80)):                   # a random model says No to everything
        own.yes, own.no = loaded.yes, loaded.no
        assert loaded(cases) == own(cases)
    with pytest.raises(rollout.InputError, match="--judge none-such"):
        evaluation.Judge.load("none-such", "cpu")
