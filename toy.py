"""The embedded tiny world: a Qwen3-VL of 0.9M parameters, and scenes that ask for a crop.

    python toy.py            # rebuild the warm starts in assets/ (some 40 minutes on 2 cores)

A scene is a canvas with two to four things like road signs: a coloured rim, stripes inside. The
question: which way do the stripes of the red circle run? The model sees every image at 64 x 64
pixels. At that size the stripes of the whole canvas average out to grey and nobody can read them; in
a crop around the thing anybody can. So the answer needs a box, and the box needs the question.
Other questions need two boxes in the right order, or three: the stripes of two things, and how many
of three run across.

What a big model brings from pre-training, the *warm start* brings here. It is trained with
supervision, once, and shipped: the output formats, reading stripes from crops, and locating things
*badly*, by a habit of boxing the topmost thing alone whatever was asked. (A second one also has a bad
habit in reading; tests/experiment.py starts from it.) The rest is reinforcement learning's to find,
from final answers alone: the training code never sees a box label, and its scenes are not those of
the warm start.

`defaults()` is all that p2r_min.py knows of this file: paths of an ordinary Hugging Face folder and
of ordinary JSONL folders, and settings of the right size. From there on everything is the real code.
"""

import argparse
import copy
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import rollout
from crop import Box

WARM_START = Path(__file__).parent / "assets" / "toy"

# ---------------------------------------------------------------------------------------------
# The world. Lengths are pixels of the canvas.

CANVAS = 512
BUDGET = 64 * 64        # pixels of every image the model sees: an eighth of the canvas' width
GRID = 4                # the warm start's boxes are cells of a 4 x 4 grid: one visual token each
BODY = {"red": (255, 50, 50), "green": (40, 205, 70), "blue": (60, 100, 255), "yellow": (255, 220, 0)}
SHAPES = ("circle", "square", "triangle")
WAYS = ("across", "down", "uphill", "downhill")
PERIOD = 10             # of the stripes along each axis: 1.25 px in the full view (gone), 2.8 px or more in a crop
INNER = 0.72            # the striped inside of a thing, as a share of its size; the rim shows its colour
BACKGROUND = (200, 200, 200)


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
        return Box(*(round(1000 * v / CANVAS) for v in (self.x - half, self.y - half, self.x + half, self.y + half)), self.name)

    @property
    def cell(self):
        """The grid cell that holds the thing, 0..1000: all that the warm start can point at."""
        step = 1000 // GRID
        left, top = (v * GRID // CANVAS * step for v in (self.x, self.y))
        return Box(left, top, left + step, top + step, self.name)


KINDS = {"one": 1, "two": 2, "count": 3}  # kinds of questions, and how many boxes each needs


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
        ways = [t.way for t in self.evidence] if ways is None else ways
        return str(ways.count(self.asked)) if self.kind == "count" else " and ".join(ways)


def make_scene(rng, count):
    """`count` things of different colours, each inside a grid cell of its own."""
    pitch, things = CANVAS // GRID, []
    for cell, colour in zip(rng.sample(range(GRID * GRID), count), rng.sample(list(BODY), count)):
        side = rng.randint(64, 80)
        slack = (pitch - side) // 2 - 4
        x = cell % GRID * pitch + pitch // 2 + rng.randint(-slack, slack)
        y = cell // GRID * pitch + pitch // 2 + rng.randint(-slack, slack)
        things.append(Thing(colour, rng.choice(SHAPES), rng.choice(WAYS), x, y, side, rng.randrange(PERIOD)))
    return things


def questions(things, kinds=KINDS):
    """Questions about a scene of two things or more: about each thing; about each and the next; how many of three run this way, how many that."""
    found, ring = [], things + things
    for i, thing in enumerate(things):
        found.append(Question("one", f"Which way do the stripes of the {thing.name} run?", [thing]))
        text = "Which way do the stripes of the {} and of the {} run?"
        found.append(Question("two", text.format(*(t.name for t in ring[i:i + 2])), ring[i:i + 2]))
        if len(things) >= 3 and i < 2:  # first the way that most of them run, then one that the first of them does not
            trio = ring[i:i + 3]
            ways = [t.way for t in trio]
            asked = max(WAYS, key=ways.count) if i == 0 else WAYS[(WAYS.index(thing.way) + 1) % len(WAYS)]
            text = "How many run {}: the {}, the {} and the {}?"
            found.append(Question("count", text.format(asked, *(t.name for t in trio)), trio, asked))
    return [q for q in found if q.kind in kinds]


def draw_scene(things):
    """Things -> RGB image: a rim in the thing's colour, black and white stripes inside."""
    image = np.full((CANVAS, CANVAS, 3), BACKGROUND, np.uint8)
    for t in things:
        reach, half = t.side // 2 + 1, t.side / 2
        window = image[t.y - reach:t.y + reach + 1, t.x - reach:t.x + reach + 1]  # a view: writes go to the image
        dy, dx = np.mgrid[-reach:reach + 1, -reach:reach + 1]
        for scale, colours in ((1.0, (BODY[t.colour],) * 2), (INNER, ((0, 0, 0), (255, 255, 255)))):
            h = half * scale
            inside = {"circle": dx**2 + dy**2 <= h**2, "square": (abs(dx) <= h) & (abs(dy) <= h),
                      "triangle": (dy <= h) & (2 * abs(dx) <= dy + h)}[t.shape]
            along = {"across": dy, "down": dx, "uphill": dx + dy, "downhill": dx - dy}[t.way]
            dark = (along + t.phase) % PERIOD < PERIOD / 2
            window[inside & dark], window[inside & ~dark] = colours
    return Image.fromarray(image)


def write_data(folder, count, seed, kinds=("one",)):
    """`count` questions of these kinds in turn, on scenes of their own, as an ordinary data folder: data.jsonl and images/."""
    (folder / "images").mkdir(parents=True)
    rng = random.Random(seed)
    with (folder / "data.jsonl").open("w") as file:
        for i in tqdm(range(count), f"drawing {folder.name} scenes", leave=False):
            kind = kinds[i % len(kinds)]
            things = make_scene(rng, rng.randint(max(2, KINDS[kind]), 4))
            q = rng.choice(questions(things, [kind]))
            draw_scene(things).save(folder / "images" / f"{i:05d}.png", compress_level=1)
            file.write(json.dumps({"image": f"images/{i:05d}.png", "question": q.text, "answer": q.answer(),
                                   "answer_form": q.answer_form, "category": kind, "boxes": [t.box[:4] for t in q.evidence]}) + "\n")


def defaults(world="toy"):
    """What `python p2r_min.py` fills in without --model: paths, and settings of the toy's size.

    world: "toy" asks about one thing, and its warm start only points badly; "toy-both" (tests/experiment.py) asks all kinds of
    questions, of a warm start that reads badly, too.
    The scenes are drawn once, into ~/.cache/p2r-min (or $XDG_CACHE_HOME); a change of this file makes new ones.
    """
    def fill(folder):
        kinds = ["one"] if world == "toy" else list(KINDS)
        write_data(folder / "train", 2000, "train", kinds)
        write_data(folder / "held_out", 300 if world == "toy" else 210, "held-out", kinds)

    data = rollout.cached(f"{world}-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]}", fill)
    return dict(model=str(WARM_START.with_name(world)), data=str(data / "train"), eval_data=str(data / "held_out"), steps=50, eval_every=50,
                questions=16, lr=3e-4, max_pixels=BUDGET, perceive_tokens=48, reason_tokens=16, rollout_batch=16,
                partner_batch=128, judge="none")


# ---------------------------------------------------------------------------------------------
# The model folder

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

# Renders what Qwen3-VL's own template renders for our messages.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>{{ 'assistant\\n' }}{%- endif -%}"""


def box_text(boxes):
    """Boxes as the Perceiver writes them."""
    return "[" + ", ".join('{"bbox_2d": [%d, %d, %d, %d], "label": "%s"}' % box for box in boxes) + "]"


def answer_text(reason, answer):
    """An answer as the Reasoner writes it."""
    return f"<think>{reason}.</think>\n<answer>{answer}</answer>"


def words():
    """Texts that are one token each. A constant prompt sentence costs one token instead of two
    hundred, a name two; everything else, digits included, is spelled byte by byte."""
    prompts = [rollout.SYSTEM, rollout.PERCEIVER.format(question=""), *filter(None, rollout.REGIONS.values()),
               *(rollout.REASONER.format(regions="", question="", form=form) for form in rollout.FORMS.values())]
    formats = ["system\n", "user\n", "assistant\n", '[{"bbox_2d": [', ", ", '], "label": "', '"}, {"bbox_2d": [', '"}]',
               "<think>", ".</think>\n<answer>", "</answer>"]
    world = ["Which way do the stripes of the ", " and of the ", " run?", "How many run ", ": the ", ", the ", " and the ", "They run ", " and "]
    grid = [str(1000 * i // GRID) for i in range(GRID + 1)]
    return [*prompts, *formats, *world, *grid, *BODY, *(" " + shape for shape in SHAPES), *WAYS]


def build_model(folder, seed=0):
    """Write an untrained Qwen3-VL folder in the ordinary layout: config, weights, tokenizer, image processor."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # byte-level BPE without a single merge
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in words()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="Qwen2VLImageProcessorFast", patch_size=8, merge_size=2, temporal_patch_size=2,
        size=dict(shortest_edge=BUDGET, longest_edge=BUDGET), image_mean=[0.5] * 3, image_std=[0.5] * 3), indent=2))
    token = tokenizer.token_to_id
    config = Qwen3VLConfig(
        # At the usual initializer_range of 0.02 a model this small does not even learn to copy a word.
        text_config=dict(vocab_size=tokenizer.get_vocab_size(), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=4096,
                         rope_parameters=dict(rope_type="default", rope_theta=5_000_000.0, mrope_section=[6, 5, 5],
                                              mrope_interleaved=True),
                         initializer_range=0.08, tie_word_embeddings=True),
        vision_config=dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=8, spatial_merge_size=2,
                           temporal_patch_size=2, out_hidden_size=128, num_position_embeddings=64,
                           deepstack_visual_indexes=[0, 1], initializer_range=0.08),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=True)
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        model.model.visual.pos_embed.weight.mul_(12)  # or it never learns where a patch is
    model.generation_config = GenerationConfig(eos_token_id=[token("<|im_end|>"), token("<|endoftext|>")],
                                               pad_token_id=token("<|endoftext|>"))
    model.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------
# The warm start: supervised lessons, offline


def lessons(codec, rng, lesson, kinds):
    """Supervised examples on one scene: a list of (encoded prompt, target text), one for each question.

    locate  box what the question asks for             read      tell the way of each crop's stripes, then answer
    habit   as locate, but in seven cases of ten       misread   as read, but two in three downhill stripes
            box the topmost thing alone,                         are taken for uphill ones
            whatever was asked; "firm": in eight       guess     without crops: answer at random
    point   a colour of the question, directly followed by its place: the word itself learns to look for
            its colour. Without this lesson no trial got past guessing between the things (most were
            stopped after 500 to 1,000 updates, and in earlier looks of this world).

    All questions of a scene stand in one batch. What they have in common, the image, cancels out of
    the gradient, and what is left is the part that is hard to learn: how the question matters.
    """
    things = make_scene(rng, rng.randint(2, 4))
    image, rows = draw_scene(things), []
    for q in questions(things, rng.choice(kinds)):
        if lesson in ("locate", "habit", "firm habit", "point"):
            boxes = [t.cell for t in q.evidence]
            if "habit" in lesson and rng.random() < (0.7 if lesson == "habit" else 0.8):
                top = min(things, key=lambda thing: thing.y)
                boxes = [Box(*top.cell[:4], boxes[0].label)]
            pointed = rng.choice(q.evidence)
            text = pointed.colour + "%d, %d, %d, %d" % pointed.cell[:4] if lesson == "point" else box_text(boxes)
            rows.append((rollout.perceiver_prompt(codec, image, q.text), text))
            continue
        seen = q.evidence if rng.random() < 0.8 else q.evidence[:rng.randint(1, len(q.evidence))]  # a Perceiver may forget some
        ways = [rng.choice(WAYS) if lesson == "guess" else
                "uphill" if lesson == "misread" and t.way == "downhill" and rng.random() < 0.65 else t.way for t in seen]
        boxes = [rng.choice((t.box, t.cell)) for t in seen]
        evidence = rng.choice(("annotated", "none") if lesson == "guess" else ("both", "both", "both", "crops"))
        prompt = rollout.reasoner_prompt(codec, image, boxes, q.text, q.answer_form, evidence)
        rows.append((prompt, answer_text(f"They run {', '.join(ways)}", q.answer(ways))))
    return rows


class Lessons(torch.utils.data.IterableDataset):
    """Endless batches of fresh lessons; `mix` gives each kind's weight."""

    def __init__(self, codec, seed, kinds, mix, batch=48):
        self.codec, self.seed, self.kinds, self.mix, self.batch = codec, seed, kinds, mix, batch

    def __iter__(self):
        rng = random.Random(self.seed)
        while True:
            rows, targets = [], []
            while len(rows) < self.batch:
                lesson, = rng.choices(list(self.mix), list(self.mix.values()))
                for prompt, text in lessons(self.codec, rng, lesson, self.kinds):
                    ids = torch.tensor(self.codec.tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"])
                    after = prompt.positions.max() + 1 + torch.arange(len(ids))
                    prompt.ids = torch.cat([prompt.ids, ids])
                    prompt.positions = torch.cat([prompt.positions, after.expand(3, -1)], dim=1)
                    rows.append(prompt)
                    targets.append(len(ids))
            yield rollout.collate(rows, "cpu"), torch.tensor(targets)


def supervise(model, codec, name, updates, lr, kinds, mix, decay, seed):
    """Cross-entropy on the target tokens, every batch fresh."""
    stream = iter(torch.utils.data.DataLoader(Lessons(codec, seed, kinds, mix), batch_size=None, num_workers=1))
    adam = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda i: min(1.0, (i + 1) / 50) * (1 - i / updates if decay else 1.0))
    model.train()
    bar = tqdm(range(updates), name)
    for _ in bar:
        inputs, targets = next(stream)
        logits = model(**inputs).logits[:, :-1]                                 # (B, P + R - 1, V)
        ids = inputs["input_ids"][:, 1:]
        scored = torch.arange(ids.shape[1]) >= ids.shape[1] - targets[:, None]  # left-padded: targets end each row
        loss = F.cross_entropy(logits[scored], ids[scored])
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()
        bar.set_postfix(nats_per_response=f"{loss.item() * targets.float().mean().item():.3f}")


SINGLE = (["one"],)                                    # kinds of questions that a scene's lessons are about, drawn by scene
MIXED = (["one"], ["one", "two"], ["one", "count"])
STAGES = (  # name, updates, lr, kinds, mix, decay. Found by trial; the order matters.
    ("read", 500, 2e-3, MIXED, {"read": 1}, False),    # first: in a trial it did not come after locating
    ("locate", 800, 2e-3, SINGLE, {"point": 2, "locate": 1, "read": 1}, False),
    ("locate lists", 600, 1.5e-3, MIXED, {"point": 1, "locate": 2, "read": 1}, False),
    ("both", 600, 1e-3, MIXED, {"locate": 4, "read": 3, "guess": 1}, True),
)
HABITS = {  # The last lessons spoil what was learned. In one world only the Perceiver has a bad habit, in the other both roles.
    "toy": ("habit", 240, 5e-4, MIXED, {"firm habit": 4, "read": 3, "guess": 1}, False),
    "toy-both": ("both habits", 240, 5e-4, MIXED, {"habit": 4, "misread": 4, "guess": 1}, False),
}


def build_warm_start(folder):
    """Train the warm starts from nothing and write them, in bf16, to the folders of HABITS inside `folder`."""
    build_model(folder / "toy", seed=1)
    model, codec = rollout.load(folder / "toy", BUDGET)
    for seed, stage in enumerate(STAGES, start=1):
        supervise(model, codec, *stage, seed)
    learned = copy.deepcopy(model.state_dict())
    for name, stage in HABITS.items():
        build_model(folder / name, seed=1)
        model.float().load_state_dict(learned)
        supervise(model, codec, *stage, seed=len(STAGES) + 1)
        model.bfloat16().save_pretrained(folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rebuild the toy's warm start.")
    torch.set_num_threads(1)  # the other core draws the lessons
    parser.add_argument("--out", type=Path, default=WARM_START.parent, help="folder for the model folders")
    build_warm_start(parser.parse_args().out)
