"""toy.py: the world asks for a crop, and what is shipped is what the recipe describes."""

import dataclasses
import json
import random

import numpy as np
import pytest

import rollout
import toy
from crop import gather, to_rect
from eval import load_data
from p2r_min import Settings, train


def view(codec, image):
    """The pixels that the model sees of an image, -1..1, after the library's own resizing."""
    return codec.image_processor(images=[image], size=codec.size, return_tensors="pt")["pixel_values"]


def test_the_stripes_are_gone_in_the_full_view_and_there_in_a_crop(tiny):
    """The same scenes with stripes running another way: in what the model sees of the whole canvas
    the inside of a thing hardly changes; in what it sees of the crop it changes by a lot."""
    _, codec = tiny
    rng = random.Random(0)
    far, near = [], []
    for _ in range(20):
        thing = toy.make_scene(rng, 1)[0]
        other = dataclasses.replace(thing, way=rng.choice([way for way in toy.WAYS if way != thing.way]), phase=rng.randrange(toy.PERIOD))
        scenes = [toy.draw_scene([t]) for t in (thing, other)]
        crops = [gather(scene, [thing.cell])[1][0] for scene in scenes]
        far.append((view(codec, scenes[0]) - view(codec, scenes[1])).abs().mean().item() / thing.side**2 * toy.CANVAS**2)
        near.append((view(codec, crops[0]) - view(codec, crops[1])).abs().mean().item() / thing.side**2 * crops[0].width * crops[0].height)
    # Mean change per pixel of the thing, on a scale from -1 to 1. What is left in the full view is the rim of the stripes.
    assert max(far) < 0.08 < 0.16 < min(near) and sum(near) > 6 * sum(far)


def test_a_thing_lies_inside_its_cell_and_its_box_around_it():
    rng = random.Random(1)
    for _ in range(200):
        for thing in toy.make_scene(rng, 4):
            left, top, right, bottom = to_rect(thing.cell, (toy.CANVAS, toy.CANVAS))
            assert left < thing.x - thing.side / 2 and thing.x + thing.side / 2 < right
            assert top < thing.y - thing.side / 2 and thing.y + thing.side / 2 < bottom
            pixels = np.asarray(toy.draw_scene([thing])) != toy.BACKGROUND
            ys, xs = pixels.any(axis=2).nonzero()
            box = to_rect(thing.box, (toy.CANVAS, toy.CANVAS))
            assert np.allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], box, atol=2.5)


def test_the_things_of_a_scene_are_told_apart_by_their_names():
    rng = random.Random(2)
    for _ in range(100):
        things = toy.make_scene(rng, 4)
        assert len({t.colour for t in things}) == 4 and len({t.cell[:4] for t in things}) == 4


def test_scenes_of_training_and_of_measuring_differ(tmp_path):
    toy.write_data(tmp_path / "a", 30, "train")
    toy.write_data(tmp_path / "b", 30, "held-out")
    images = [e.load_image().tobytes() for name in "ab" for e in load_data(tmp_path / name)]
    assert len(set(images)) == 60
    toy.write_data(tmp_path / "c", 30, "train")          # and the same seed draws the same scenes
    assert (tmp_path / "a" / "data.jsonl").read_bytes() == (tmp_path / "c" / "data.jsonl").read_bytes()


def test_the_questions_of_a_scene_by_hand():
    """Four things whose ways are known: what is asked, what is true, and what has to be looked at, in order."""
    ways = dict(red="across", green="down", blue="down", yellow="uphill")
    things = [toy.Thing(colour, "circle", way, 64 + 128 * i, 64, 70, 0) for i, (colour, way) in enumerate(ways.items())]
    asked = {q.text: (q.answer_form, q.answer(), [t.colour for t in q.evidence]) for q in toy.questions(things)}
    assert len(asked) == 4 + 4 + 2
    assert asked["Which way do the stripes of the blue circle run?"] == ("free_form", "down", ["blue"])
    assert asked["Which way do the stripes of the yellow circle and of the red circle run?"] == ("free_form", "uphill and across", ["yellow", "red"])
    assert asked["How many run down: the red circle, the green circle and the blue circle?"] == ("na", "2", ["red", "green", "blue"])
    assert asked["How many run uphill: the green circle, the blue circle and the yellow circle?"] == ("na", "1", ["green", "blue", "yellow"])
    assert [q.kind for q in toy.questions(things[:2])] == ["one", "two"] * 2      # three things are needed to count
    assert {q.kind for q in toy.questions(things, ["count"])} == {"count"}


def test_data_with_all_kinds_holds_as_many_boxes_as_each_needs(tmp_path):
    toy.write_data(tmp_path, 12, "kinds", list(toy.KINDS))
    examples = load_data(tmp_path)
    assert [e.category for e in examples] == ["one", "two", "count"] * 4
    assert [len(e.boxes) for e in examples] == [1, 2, 3] * 4
    for e in examples:
        assert all(colour in e.question for colour in (box.label.split()[0] for box in e.boxes if box.label))
        assert e.answer in (toy.WAYS if e.category == "one" else "0123" if e.category == "count" else
                            [f"{a} and {b}" for a in toy.WAYS for b in toy.WAYS])


@pytest.mark.parametrize("world", toy.HABITS)
def test_the_defaults_show_no_training_scene_twice(world):
    s = Settings(**toy.defaults(world))
    assert s.total * s.questions <= len(load_data(s.data))
    assert len(load_data(s.eval_data)) >= 200


@pytest.mark.parametrize("world", toy.HABITS)
def test_what_is_shipped_fits_the_code(world):
    """The warm starts were trained on these prompts: their tokenizer still spells each as a single token."""
    folder = toy.WARM_START.with_name(world)
    model, codec = rollout.load(folder, toy.BUDGET)
    for text in toy.words():
        assert len(codec.tokenizer(text, add_special_tokens=False)["input_ids"]) == 1, text
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3_000_000


def test_no_box_label_reaches_training(tmp_path):
    """Training on data with its boxes removed is the same training."""
    toy.write_data(tmp_path / "with", 8, "x")
    toy.write_data(tmp_path / "without", 8, "x")
    file = tmp_path / "without" / "data.jsonl"
    file.write_text("".join(json.dumps({k: v for k, v in json.loads(line).items() if k != "boxes"}) + "\n" for line in file.open()))
    results = []
    for name in ("with", "without"):
        s = Settings(**toy.defaults() | dict(data=str(tmp_path / name), eval_data="", out=str(tmp_path / f"run-{name}"), steps=1, questions=3, group=4,
                                             sample_every=0))
        lines = [json.loads(line) for line in (train(s) / "metrics.jsonl").open()]
        results.append([{k: v for k, v in m.items() if "seconds" not in k and k not in ("tokens_per_s", "peak_gib")} for m in lines])
    assert results[0] == results[1]
    assert results[0][0]["reward_std"] > 0
