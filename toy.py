"""The embedded tiny world: scenes that ask for a crop, for a Qwen3-VL of 0.9M parameters.

A scene is a canvas with two to four things like road signs: a coloured rim, stripes inside. The
question: which way do the stripes of the red circle run? The model sees every image at 64 x 64
pixels. At that size the stripes of the whole canvas average out to grey and nobody can read them;
in a crop around the thing anybody can. So the answer needs a box, and the box needs the question.
Harder kinds of questions need two boxes in the right order, or three (tests/experiment.py).

What a big model brings from pre-training, the *warm start* in assets/toy/ brings here. It was
trained with supervision, once (tests/build_toy.py), to write the output formats, to point and to
read, and to do both badly: it boxes the topmost thing, whatever was asked, in most cases, and it
takes most downhill stripes for uphill ones. Each role has something to unlearn. That is left to
reinforcement learning, from final answers alone: training never uses the true boxes, and its scenes
are not those of the warm start.

`defaults()` and WARM_START are all that p2r_min.py knows of this file: paths of an ordinary Hugging
Face folder and of ordinary JSONL folders, and settings of the right size. All the rest is the real
code.
"""

# =============================================================================================
# Skip on a first reading: all of it

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import rollout
from crop import Box

WARM_START = Path(__file__).parent / "assets" / "toy"

CANVAS = 512            # side of a scene; this and all lengths below are pixels of it
BUDGET = 64 * 64        # pixels of every image that the model sees: an eighth of the canvas' width
GRID = 4                # at most one thing in each cell of a 4 x 4 grid
WAYS = ("across", "down", "uphill", "downhill")
# Of the stripes, along each axis: 1.25 px in the full view (gone), 2.6 px or more in a crop.
PERIOD = 10
KINDS = {"one": 1, "two": 2, "count": 3}  # kinds of questions, and how many boxes each needs


def defaults(kinds=("one",)):
    """What `python p2r_min.py` fills in without --model: paths, and settings of the toy's size.

    kinds: the kinds of questions. Their scenes are drawn once, into ~/.cache/p2r-min (or
    $XDG_CACHE_HOME); a change of this file makes new ones.
    """
    def fill(folder):
        # 1,600 scenes to train on, so none comes twice in 100 steps of 16; others to measure with.
        write_data(folder / "train", 1600, "train", kinds)
        write_data(folder / "held_out", 300 if len(kinds) == 1 else 210, "held-out", kinds)

    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    data = rollout.cached(f"toy-{'-'.join(kinds)}-{version}", fill)

    # At lr 3e-4 nothing more is learned, and one of eight seeds unlearned how to answer after 40
    # steps of perception: the roles share their weights.
    return dict(
        model=str(WARM_START), data=str(data / "train"), eval_data=str(data / "held_out"),
        steps=40, eval_every=40, questions=16, lr=2e-4, max_pixels=BUDGET, perceive_tokens=48,
        reason_tokens=16, rollout_batch=16, partner_batch=128, judge="none", checkpointing=False)


def write_data(folder, count, seed, kinds=("one",)):
    """`count` questions of these kinds in turn, each on a scene of its own, as an ordinary data
    folder: data.jsonl and images/. A pure function of the seed."""
    (folder / "images").mkdir(parents=True)
    rng = random.Random(seed)
    lines = []
    for number in range(count):
        # Enough things for the kind of question; then one of the scene's questions of this kind.
        kind = kinds[number % len(kinds)]
        things = make_scene(rng, rng.randint(max(2, KINDS[kind]), 4))
        question = rng.choice(questions(things, [kind]))

        # The true boxes are for measuring (hit, oracle): no training reads them.
        name = f"images/{number:05d}.png"
        draw_scene(things).save(folder / name, compress_level=1)
        lines.append(json.dumps({
            "image": name, "question": question.text, "answer": question.answer(),
            "answer_form": question.answer_form, "category": kind,
            "boxes": [thing.box[:4] for thing in question.evidence]}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------------------
# Scenes

INNER = 0.72            # the striped inside, as a share of a thing's size; the rim has its colour
SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow")

# Scenes are drawn in palette colours, which is three times less to write and to read: first those
# of the things, in the order of COLOURS, then black, white and the background.
PALETTE = np.array([(255, 50, 50), (40, 205, 70), (60, 100, 255), (255, 220, 0),
                    (0, 0, 0), (255, 255, 255), (200, 200, 200)], np.uint8)
BLACK, WHITE, BACKGROUND = 4, 5, 6


@dataclass
class Thing:
    colour: str
    shape: str
    way: str      # which way its stripes run: the detail that is asked for
    x: int        # centre
    y: int
    side: int
    phase: int    # of the stripes

    @property
    def name(self):
        return f"{self.colour} {self.shape}"

    @property
    def box(self):
        """The true box of the thing, 0..1000."""
        half = self.side / 2
        edges = (self.x - half, self.y - half, self.x + half, self.y + half)
        return Box(*[round(1000 * edge / CANVAS) for edge in edges], self.name)


def make_scene(rng, count):
    """`count` things of different colours, each inside a grid cell of its own."""
    # Different colours, so that a name tells which thing is meant.
    pitch = CANVAS // GRID
    cells = rng.sample(range(GRID * GRID), count)
    colours = rng.sample(COLOURS, count)
    things = []
    for cell, colour in zip(cells, colours):
        # Anywhere in its cell, but at least 4 pixels away from the edges.
        side = rng.randint(64, 80)
        slack = (pitch - side) // 2 - 4
        x = cell % GRID * pitch + pitch // 2 + rng.randint(-slack, slack)
        y = cell // GRID * pitch + pitch // 2 + rng.randint(-slack, slack)
        shape, way, phase = rng.choice(SHAPES), rng.choice(WAYS), rng.randrange(PERIOD)
        things.append(Thing(colour, shape, way, x, y, side, phase))
    return things


def draw_scene(things):
    """Things -> a palette image (mode P): a rim in the thing's colour, stripes inside."""
    canvas = np.full((CANVAS, CANVAS), BACKGROUND, np.uint8)
    for thing in things:
        # A view of the canvas around the thing: what is written to it is on the canvas.
        reach = thing.side // 2 + 1
        window = canvas[thing.y - reach:thing.y + reach + 1, thing.x - reach:thing.x + reach + 1]
        dy, dx = np.mgrid[-reach:reach + 1, -reach:reach + 1]

        # The whole thing in its colour.
        body = _inside(thing.shape, dx, dy, thing.side / 2)
        window[body] = COLOURS.index(thing.colour)

        # A smaller one of stripes in it: they change where `along` passes half a period.
        along = {"across": dy, "down": dx, "uphill": dx + dy, "downhill": dx - dy}[thing.way]
        stripes = np.where((along + thing.phase) % PERIOD < PERIOD / 2, BLACK, WHITE)
        inner = _inside(thing.shape, dx, dy, INNER * thing.side / 2)
        window[inner] = stripes[inner]

    image = Image.fromarray(canvas)
    image.putpalette(PALETTE.tobytes())
    return image


def _inside(shape, dx, dy, half):
    """Which pixels, given by their distance from the centre, a shape of this half side covers."""
    if shape == "circle":
        return dx**2 + dy**2 <= half**2
    if shape == "square":
        return (abs(dx) <= half) & (abs(dy) <= half)
    return (dy <= half) & (2 * abs(dx) <= dy + half)


# ---------------------------------------------------------------------------------------------
# Questions


@dataclass
class Question:
    kind: str
    text: str
    evidence: list    # the things one has to look at, in the order of the question
    asked: str = ""   # the way that is counted

    @property
    def answer_form(self):
        return "na" if self.kind == "count" else "free_form"

    def answer(self, ways=None):
        """What follows from having read these ways, one for each thing; without them, the truth."""
        if ways is None:
            ways = [thing.way for thing in self.evidence]
        if self.kind == "count":
            return str(ways.count(self.asked))
        return " and ".join(ways)


def questions(things, kinds=tuple(KINDS)):
    """All questions of these kinds about a scene of two things or more.

    About each thing; about each and the next; about three of them how many run one way.
    """
    found = []
    for i, thing in enumerate(things):
        # This one and the next two, round again at the end.
        trio = (things[i:] + things[:i])[:3]
        names = [t.name for t in trio]
        found.append(Question("one", f"Which way do the stripes of the {names[0]} run?", trio[:1]))
        text = f"Which way do the stripes of the {names[0]} and of the {names[1]} run?"
        found.append(Question("two", text, trio[:2]))

        # The first thing's question asks for the commonest way of the three, the second's for a
        # way that this thing does not run.
        if len(trio) == 3 and i < 2:
            ways = [t.way for t in trio]
            asked = max(WAYS, key=ways.count)
            if i == 1:
                asked = WAYS[(WAYS.index(thing.way) + 1) % len(WAYS)]
            text = f"How many run {asked}: the {names[0]}, the {names[1]} and the {names[2]}?"
            found.append(Question("count", text, trio, asked))
    return [question for question in found if question.kind in kinds]
