"""Shared by the tests: small random Qwen3-VL folders in the ordinary layout. Nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import random

import pytest
import torch
import transformers
from PIL import Image

import build_toy
import rollout
from crop import Box

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(2)


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
