"""Shared by the tests: small random Qwen3-VL folders in the ordinary layout. Nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same on every machine; a GPU has tests/gpu.py

import json
import random
import signal
import zlib

import pytest
import torch
import transformers
from PIL import Image

import build_toy
import eval as evaluation
import rollout
from crop import Box, Parsed
from eval import Score
from p2r_min import Run, Settings, train


# Started by nohup, or by a script's &, these would stay ignored; the tests send them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The toy's architecture with fresh random weights, initialised widely so that logits differ."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    build_toy.build_model(path, seed=1)
    return path


@pytest.fixture
def tiny(folder):
    """(model, codec) at a budget of 64 x 64 pixels an image; a fresh copy for every test."""
    return rollout.load(folder, max_pixels=64 * 64)


def noise(width, height, seed=0):
    """An RGB image without structure: any mix-up of images or patches changes the result."""
    rng = random.Random(f"{width}-{height}-{seed}")
    small = Image.frombytes("RGB", (16, 16), rng.randbytes(16 * 16 * 3))
    return small.resize((width, height), Image.Resampling.NEAREST)


BOXES = {0: [], 1: [Box(100, 200, 400, 500, "a")],
         3: [Box(0, 0, 300, 300, "a"), Box(500, 100, 900, 400, "b"), Box(50, 600, 950, 990, "c")]}


def prompts_of(codec, shapes=((300, 200), (160, 400), (512, 512))):
    """Three reasoner prompts of different lengths, with 0, 1 and 3 crops, from different images."""
    return [rollout.reasoner_prompt(codec, noise(*size), BOXES[count], "Which way?", "free_form")
            for size, count in zip(shapes, BOXES)]


# --- a run on a random model, whose own texts hold neither boxes nor right answers

LISTS = ([], [Box(100, 100, 400, 400, "a")],
         [Box(0, 0, 200, 200, "a"), Box(300, 300, 500, 500, "b"), Box(600, 600, 900, 900, "c")])


def boxes_from(text):
    """0, 1 or 3 boxes: like the real reader, a pure function of the text."""
    return Parsed(LISTS[zlib.crc32(text.encode()) % 3], True)


def chance(text, example, whole_text=False):
    """Right or wrong, by the text alone."""
    return Score(float(zlib.crc32(text.encode()) % 2), True)


@pytest.fixture
def scripted(monkeypatch):
    """Boxes and scores made from the model's texts by these two functions."""
    def use(read_boxes=boxes_from, score=chance):
        monkeypatch.setattr(rollout, "parse_boxes", read_boxes)
        monkeypatch.setattr(evaluation, "score", score)
    use()
    return use


def write_data(path):
    """Four questions on noise, with boxes to measure against; two of them as held_out.jsonl."""
    rows = []
    for i in range(4):
        noise(200, 120, i).save(path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": f"Which way, {i}?", "answer": "down",
                     "id": f"q{i}", "boxes": [[100, 100, 300, 300]]})
    for name, some in (("data", rows), ("held_out", rows[:2])):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return path / "data.jsonl"


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


def small(folder, data, out, **more):
    """Settings of a run that takes a second: two phases of two steps."""
    values = dict(
        model=str(folder), data=str(data), out=str(out), steps=2, questions=2, group=3, lr=1e-3,
        max_pixels=64 * 64, perceive_tokens=6, reason_tokens=5, rollout_batch=2, sample_every=1,
        judge="none", checkpointing=False)
    return Settings(**values | more)


def go(s, resumed=False):
    """A run from Python, as p2r_min.main makes it."""
    with Run(s, resumed) as run:
        return train(s, run)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]
