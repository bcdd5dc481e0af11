"""toy.py: the world asks for a crop, and what is shipped is what the recipe describes."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import build_toy
import rollout
import toy
from conftest import go, metrics
from crop import gather, to_rect
from eval import load_data
from p2r_min import Settings


def view(codec, image):
    """The pixels that the model sees of an image, -1..1, after the library's own resizing."""
    seen = codec.image_processor(images=[image.convert("RGB")], size=codec.size,
                                 return_tensors="pt")
    return seen["pixel_values"]


# -------------------------------------------------------------------------------------------------
# The world


def test_the_stripes_are_gone_in_the_full_view_and_there_in_a_crop(tiny):
    """The same scenes with stripes running another way: in what the model sees of the whole canvas
    the inside of a thing hardly changes; in what it sees of the crop it changes by a lot."""
    _, codec = tiny
    rng = random.Random(0)
    far, near = [], []
    for _ in range(20):
        thing = toy.make_scene(rng, 1)[0]
        others = [way for way in toy.WAYS if way != thing.way]
        other = dataclasses.replace(thing, way=rng.choice(others), phase=rng.randrange(toy.PERIOD))
        scenes = [toy.draw_scene([t]).convert("RGB") for t in (thing, other)]
        crops = [gather(scene, [build_toy.cell(thing)])[1][0] for scene in scenes]

        # Mean change per pixel of the thing, on a scale from -1 to 1.
        for found, (a, b) in ((far, scenes), (near, crops)):
            change = (view(codec, a) - view(codec, b)).abs().mean().item()
            found.append(change / thing.side**2 * a.width * a.height)

    # What is left in the full view is the rim of the stripes.
    assert max(far) < 0.08 < 0.16 < min(near) and sum(near) > 6 * sum(far)


def test_a_thing_lies_inside_its_cell_and_its_box_around_it():
    rng = random.Random(1)
    for _ in range(200):
        for thing in toy.make_scene(rng, 4):
            size = (toy.CANVAS, toy.CANVAS)
            left, top, right, bottom = to_rect(build_toy.cell(thing), size)
            assert left < thing.x - thing.side / 2 and thing.x + thing.side / 2 < right
            assert top < thing.y - thing.side / 2 and thing.y + thing.side / 2 < bottom
            pixels = np.asarray(toy.draw_scene([thing])) != toy.BACKGROUND
            ys, xs = pixels.nonzero()
            drawn = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert np.allclose(drawn, to_rect(thing.box, size), atol=2.5)


@pytest.mark.parametrize("way, step", [("across", (3, 0)), ("down", (0, 3)),
                                       ("uphill", (3, -3)), ("downhill", (3, 3))])
def test_stripes_run_the_way_that_is_asked_for(way, step):
    """Along a stripe nothing changes; half a period aside, black and white change places."""
    thing = toy.Thing("red", "square", way, 100, 100, 80, phase=0)
    pixels = np.asarray(toy.draw_scene([thing]).convert("RGB")).astype(int)
    inside = pixels[80:120, 80:120]
    along = pixels[80 + step[1]:120 + step[1], 80 + step[0]:120 + step[0]]
    aside = pixels[85:125, 80:120] if way == "across" else pixels[80:120, 85:125]
    assert {tuple(p) for p in inside.reshape(-1, 3)} == {(0, 0, 0), (255, 255, 255)}
    assert (inside == along).all() and (inside + aside == 255).all()


def test_the_things_of_a_scene_are_told_apart_by_their_names():
    rng = random.Random(2)
    for _ in range(100):
        things = toy.make_scene(rng, 4)
        assert len({t.colour for t in things}) == 4
        assert len({build_toy.cell(t)[:4] for t in things}) == 4


def test_the_questions_of_a_scene_by_hand():
    """Four things whose ways are known: what is asked, what is true, and what has to be looked at,
    in order."""
    ways = dict(red="across", green="down", blue="down", yellow="uphill")
    things = [toy.Thing(colour, "circle", way, 64 + 128 * i, 64, 70, 0)
              for i, (colour, way) in enumerate(ways.items())]
    asked = {}
    for q in toy.questions(things):
        asked[q.text] = q.answer_form, q.answer(), " ".join(t.colour for t in q.evidence)
    assert len(asked) == 4 + 4 + 2
    for text, expected in {
        "Which way do the stripes of the blue circle run?": ("free_form", "down", "blue"),
        "Which way do the stripes of the yellow circle and of the red circle run?":
            ("free_form", "uphill and across", "yellow red"),
        "How many run down: the red circle, the green circle and the blue circle?":
            ("na", "2", "red green blue"),
        "How many run uphill: the green circle, the blue circle and the yellow circle?":
            ("na", "1", "green blue yellow"),
    }.items():
        assert asked[text] == expected

    # Three things are needed to count; kinds can be chosen.
    assert [q.kind for q in toy.questions(things[:2])] == ["one", "two"] * 2
    assert {q.kind for q in toy.questions(things, ["count"])} == {"count"}


# -------------------------------------------------------------------------------------------------
# Its data


def test_scenes_of_training_and_of_measuring_differ(tmp_path):
    toy.write_data(tmp_path / "a", 30, "train")
    toy.write_data(tmp_path / "b", 30, "held-out")
    images = {e.load_image().tobytes() for name in "ab" for e in load_data(tmp_path / name)}
    assert len(images) == 60

    # And the same seed draws the same scenes.
    toy.write_data(tmp_path / "c", 30, "train")
    texts = [(tmp_path / name / "data.jsonl").read_text() for name in "ac"]
    assert texts[0] == texts[1]


def test_data_with_all_kinds_holds_as_many_boxes_as_each_needs(tmp_path):
    toy.write_data(tmp_path, 12, "kinds", list(toy.KINDS))
    examples = load_data(tmp_path)
    assert [e.category for e in examples] == ["one", "two", "count"] * 4
    assert [len(e.boxes) for e in examples] == [1, 2, 3] * 4
    answers = {"one": toy.WAYS, "two": [f"{a} and {b}" for a in toy.WAYS for b in toy.WAYS],
               "count": "0123"}
    assert all(e.answer in answers[e.category] for e in examples)


def test_the_defaults_show_no_training_scene_twice():
    """And the experiment's harder questions come with other data, in a folder of its own."""
    s, harder = Settings(**toy.defaults()), Settings(**toy.defaults(tuple(toy.KINDS)))
    assert s.total * s.questions <= len(load_data(s.data))
    assert (len(load_data(s.eval_data)), len(load_data(harder.eval_data))) == (300, 210)
    assert {e.category for e in load_data(s.data)} == {"one"}
    assert {e.category for e in load_data(harder.data)} == set(toy.KINDS)


def test_no_box_label_reaches_training(tmp_path):
    """Training on data with its boxes removed is the same training."""
    toy.write_data(tmp_path / "with", 8, "x")
    toy.write_data(tmp_path / "without", 8, "x")
    file = tmp_path / "without" / "data.jsonl"
    rows = [json.loads(line) for line in file.open()]
    for row in rows:
        del row["boxes"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = []
    for name in ("with", "without"):
        s = Settings(**toy.defaults() | dict(
            data=str(tmp_path / name), eval_data="", out=str(tmp_path / f"run-{name}"), steps=1,
            questions=3, group=4, sample_every=0))
        results.append([])
        for row in metrics(go(s)):
            kept = [key for key in row if not key.startswith("seconds") and key != "peak_gib"]
            results[-1].append({key: row[key] for key in kept})
    assert results[0] == results[1]
    assert results[0][0]["reward_std"] > 0


# -------------------------------------------------------------------------------------------------
# The warm start


@pytest.fixture(scope="module")
def warm():
    return rollout.load(toy.WARM_START, toy.BUDGET)


def test_what_is_shipped_fits_the_code(warm):
    """It was trained on these prompts: its tokenizer still spells each as a single token."""
    _, codec = warm
    for text in build_toy.words():
        assert len(codec.tokenizer(text, add_special_tokens=False)["input_ids"]) == 1, text
    assert sum(file.stat().st_size for file in toy.WARM_START.iterdir()) < 3_000_000


@torch.no_grad()
def choices(model, codec, prompts, start, words):
    """Which of these single-token words the model would write first after `start`, by prompt."""
    batches = build_toy.Batches(codec, 0, None, {})
    inputs, _ = batches.collate([(prompt, start) for prompt in prompts])
    logits = model(**inputs).logits[:, -2]      # the last token is <|im_end|>
    ids = [codec.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    return [words[best] for best in logits[:, ids].argmax(dim=1)]


def test_each_role_of_the_warm_start_has_something_to_unlearn(warm):
    """Most boxes go to the topmost thing; most downhill stripes, and no others, are taken for
    uphill ones."""
    model, codec = warm
    rng = random.Random(3)
    edges = [str(1000 * i // toy.GRID) for i in range(toy.GRID)]
    asked, topmost, looks, reads = [], [], [], []
    for _ in range(60):
        things = toy.make_scene(rng, 3)
        image = toy.draw_scene(things).convert("RGB")
        question = toy.questions(things, ["one"])[0].text
        asked.append(things[0])
        topmost.append(min(things, key=lambda thing: thing.y))
        looks.append(rollout.perceiver_prompt(codec, image, question))
        boxes = [build_toy.cell(things[0])]
        reads.append(rollout.reasoner_prompt(codec, image, boxes, question, "free_form"))

    # Where its first box begins, where that tells the two apart.
    habit, right = [], []
    for thing, top, edge in zip(asked, topmost,
                                choices(model, codec, looks, '[{"bbox_2d": [', edges)):
        if build_toy.cell(thing).x1 != build_toy.cell(top).x1:
            habit.append(int(edge) == build_toy.cell(top).x1)
            right.append(int(edge) == build_toy.cell(thing).x1)
    assert sum(habit) > 0.5 * len(habit) and sum(right) > 0.1 * len(right)

    # Which way it says that they run.
    told = choices(model, codec, reads, "<think>They run ", toy.WAYS)
    downhill = [word for thing, word in zip(asked, told) if thing.way == "downhill"]
    others = [thing.way == word for thing, word in zip(asked, told) if thing.way != "downhill"]
    assert len(downhill) > 5 and downhill.count("uphill") > 0.6 * len(downhill)
    assert sum(others) > 0.9 * len(others)


def test_lessons_teach_what_they_are_named_after(tiny):
    """The share of wrong boxes and wrong ways in the targets, counted by hand."""
    _, codec = tiny
    rng = random.Random(4)
    firsts, labels, misread, read = 0, 0, 0, 0
    for _ in range(100):
        things = toy.make_scene(rng, 3)
        bottom = max(things, key=lambda thing: thing.y)
        question = toy.Question("one", "?", [bottom])
        image = toy.draw_scene(things).convert("RGB")
        _, text = build_toy.perceiver_lesson(codec, rng, "habit", image, things, question)
        box = json.loads(text)[0]
        firsts += box["bbox_2d"] != list(build_toy.cell(bottom)[:4])
        labels += box["label"] == bottom.name
        downhill = toy.Question("one", "?", [dataclasses.replace(bottom, way="downhill")])
        _, text = build_toy.reasoner_lesson(codec, rng, "misread", image, things, downhill)
        misread += text == "<think>They run uphill.</think>\n<answer>uphill</answer>"
        read += text == "<think>They run downhill.</think>\n<answer>downhill</answer>"
    assert labels == 100 and 70 <= firsts <= 90
    assert misread + read == 100 and 50 <= misread <= 80


def test_a_batch_of_lessons_is_its_lessons_one_by_one(tiny):
    """Padding, positions and images of a batch: each target gets the loss that it gets alone."""
    model, codec = tiny
    rng = random.Random(5)
    rows = [row for name in ("locate", "misread", "guess")
            for row in build_toy.lesson(codec, rng, name, build_toy.MIXED)]
    batches = build_toy.Batches(codec, 0, None, {})

    def losses(rows):
        inputs, targets = batches.collate(rows)
        with torch.no_grad():
            logits = model(**inputs).logits
        return [F.cross_entropy(logits[i, -n - 1:-1], inputs["input_ids"][i, -n:]).item()
                for i, n in enumerate(targets)]

    alone = [losses([row])[0] for row in rows]
    assert len({len(prompt.ids) for prompt, _ in rows}) > 3
    assert losses(rows) == pytest.approx(alone, abs=1e-4)


# -------------------------------------------------------------------------------------------------
# The curves of a run


def test_the_curves_of_a_run_are_those_of_its_log(tmp_path):
    """Two phases of three steps, a step without boxes, two measurements: all of it is drawn."""
    pytest.importorskip("matplotlib")
    import plot
    phases = ["perception"] * 3 + ["reasoning"] * 3
    (tmp_path / "config.json").write_text(json.dumps({"steps": 3}))
    rows = [{"step": i, "phase": phase, "reward_mean": i / 10, "boxes": 1.0,
             "box_area": None if i == 2 else 0.1} for i, phase in enumerate(phases, start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "accuracy.jsonl").write_text(
        '{"step": 0, "p2r": 0.5, "hit": 0.4, "plain": 0.2, "oracle": 0.7}\n'
        '{"step": 6, "p2r": 0.9, "hit": 0.8, "plain": 0.2, "oracle": 1.0}\n')
    figure = plot.draw(tmp_path)
    reward, accuracy, _, area = figure.axes
    assert reward.lines[0].get_xydata().tolist() == [[i, i / 10] for i in range(1, 7)]
    assert np.isnan(area.lines[0].get_ydata()).tolist() == [False, True] + [False] * 4
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [
        [0.5, 0.9], [0.4, 0.8], [0.7, 1.0], [0.2, 0.2]]
    assert [text.get_text() for text in reward.texts] == ["perception", "reasoning"]
    figure.savefig(tmp_path / "curves.png")
    plot.plt.close(figure)
