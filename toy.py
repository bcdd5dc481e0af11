"""The embedded tiny world: a Qwen3-VL of 0.9M parameters, and scenes that ask for a crop.

    python toy.py            # rebuild the warm start in assets/toy (some 15 minutes on 2 cores)

A scene is a canvas with two to four things like road signs: a coloured rim, stripes inside. The
question: which way do the stripes of the red circle run? The model sees every image at 64 x 64
pixels. At that size the stripes of the whole canvas average out to grey and nobody can read them; in
a crop around the thing anybody can. So the answer needs a box, and the box needs the question.

What a big model brings from pre-training, the *warm start* brings here. It is trained with
supervision, once, and shipped: the output formats, reading stripes from a crop, and locating things
*badly*, by a habit of boxing the topmost thing whatever was asked. The rest is reinforcement
learning's to find, from final answers alone: the training code never sees a box label, and its
scenes are not those of the warm start.

`defaults()` is all that p2r_min.py knows of this file: paths of an ordinary Hugging Face folder and
of ordinary JSONL folders, and settings of the right size. From there on everything is the real code.

Other questions can join the world: `questions` gives each one's text, answer, answer form, and the
things that hold its evidence, one box each.
"""

import argparse
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


@dataclass
class Question:
    text: str
    answer: str
    answer_form: str
    evidence: list    # the things one has to look at, the most important first


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


def questions(things):
    """All Questions about a scene."""
    return [Question(f"Which way do the stripes of the {thing.name} run?", thing.way, "free_form", [thing]) for thing in things]


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


def write_data(folder, count, seed):
    """`count` questions on scenes of their own, as an ordinary data folder: data.jsonl and images/."""
    (folder / "images").mkdir(parents=True)
    rng = random.Random(seed)
    with (folder / "data.jsonl").open("w") as file:
        for i in tqdm(range(count), f"drawing {folder.name} scenes", leave=False):
            things = make_scene(rng, rng.randint(2, 4))
            q = rng.choice(questions(things))
            draw_scene(things).save(folder / "images" / f"{i:05d}.png", compress_level=1)
            file.write(json.dumps({"image": f"images/{i:05d}.png", "question": q.text, "answer": q.answer,
                                   "answer_form": q.answer_form, "boxes": [t.box[:4] for t in q.evidence]}) + "\n")


def defaults():
    """What `python p2r_min.py` fills in without --model: paths, and settings of the toy's size.

    The scenes are drawn once, into ~/.cache/p2r-min (or $XDG_CACHE_HOME); a change of this file makes new ones.
    """
    def fill(folder):
        write_data(folder / "train", 1600, "train")
        write_data(folder / "held_out", 300, "held-out")

    data = rollout.cached(f"toy-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]}", fill)
    return dict(model=str(WARM_START), data=str(data / "train"), eval_data=str(data / "held_out"), steps=50, eval_every=50,
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
    prompts = [rollout.SYSTEM, rollout.PERCEIVER.format(question=""), rollout.REGIONS["both"],
               *(rollout.REASONER.format(regions="", question="", form=form) for form in rollout.FORMS.values())]
    formats = ["system\n", "user\n", "assistant\n", '[{"bbox_2d": [', ", ", '], "label": "', '"}, {"bbox_2d": [', '"}]',
               "<think>", ".</think>\n<answer>", "</answer>"]
    world = ["Which way do the stripes of the ", " run?", "They run "]
    return [*prompts, *formats, *world, *BODY, *(" " + shape for shape in SHAPES), *WAYS]


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


def lessons(codec, rng, kind, counts):
    """Supervised examples on one scene: a list of (encoded prompt, target text), one for each question.

    locate  box what the question asks for             read      answer from the true evidence
    habit   as locate, but in seven cases of ten       guess     answer the plain image at random
            box the topmost thing, whatever was asked
    point   the colour's word, directly followed by its place: the word itself learns to look for its
            colour. Without this lesson no trial got past guessing between the things (most were stopped
            after 500 to 1,000 updates, and in earlier looks of this world).

    All questions of a scene stand in one batch. What they have in common, the image, cancels out of
    the gradient, and what is left is the part that is hard to learn: how the question matters.
    """
    things = make_scene(rng, rng.randint(*counts))
    image, rows = draw_scene(things), []
    for q in questions(things):
        boxes = [rng.choice((t.box, t.cell)) for t in q.evidence]
        if kind == "locate":
            row = rollout.perceiver_prompt(codec, image, q.text), box_text([t.cell for t in q.evidence])
        elif kind == "habit":
            top = min(things, key=lambda thing: thing.y)
            seen = [top if rng.random() < 0.7 else thing for thing in q.evidence]
            named = [(*s.cell[:4], thing.name) for s, thing in zip(seen, q.evidence)]
            row = rollout.perceiver_prompt(codec, image, q.text), box_text(named)
        elif kind == "point":
            thing = q.evidence[0]
            row = rollout.perceiver_prompt(codec, image, q.text), thing.colour + "%d, %d, %d, %d" % thing.cell[:4]
        else:
            answer = rng.choice(WAYS) if kind == "guess" else q.answer
            prompt = rollout.reasoner_prompt(codec, image, boxes if kind == "read" else [], q.text, q.answer_form)
            row = prompt, answer_text(f"They run {answer}", answer)
        rows.append(row)
    return rows


class Lessons(torch.utils.data.IterableDataset):
    """Endless batches of fresh lessons; `mix` gives each kind's weight."""

    def __init__(self, codec, seed, counts, mix, batch=48):
        self.codec, self.seed, self.counts, self.mix, self.batch = codec, seed, counts, mix, batch

    def __iter__(self):
        rng = random.Random(self.seed)
        while True:
            rows, targets = [], []
            while len(rows) < self.batch:
                kind, = rng.choices(list(self.mix), list(self.mix.values()))
                for prompt, text in lessons(self.codec, rng, kind, self.counts):
                    ids = torch.tensor(self.codec.tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"])
                    after = prompt.positions.max() + 1 + torch.arange(len(ids))
                    prompt.ids = torch.cat([prompt.ids, ids])
                    prompt.positions = torch.cat([prompt.positions, after.expand(3, -1)], dim=1)
                    rows.append(prompt)
                    targets.append(len(ids))
            yield rollout.collate(rows, "cpu"), torch.tensor(targets)


def supervise(model, codec, name, updates, lr, counts, mix, decay, seed):
    """Cross-entropy on the target tokens, every batch fresh."""
    stream = iter(torch.utils.data.DataLoader(Lessons(codec, seed, counts, mix), batch_size=None, num_workers=1))
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


STAGES = (  # name, updates, lr, things in a scene, mix, decay. Found by trial; the order matters.
    ("read", 400, 2e-3, (2, 4), {"read": 1}, False),       # first: in a trial it did not come after locating
    ("locate", 700, 2e-3, (2, 4), {"point": 2, "locate": 1, "read": 1}, False),
    ("locate, slower", 600, 1.5e-3, (2, 4), {"point": 2, "locate": 1, "read": 1}, False),
    ("both", 500, 1e-3, (2, 4), {"locate": 4, "read": 3, "guess": 1}, True),
    # Acquire a bad habit: the most likely box holds the topmost thing, not the one that is asked for.
    ("habit", 240, 5e-4, (2, 4), {"habit": 4, "read": 3, "guess": 1}, False),
)


def build_warm_start(folder):
    """Train the warm start from nothing and write it, in bf16, to `folder`."""
    build_model(folder, seed=1)
    model, codec = rollout.load(folder, BUDGET)
    for seed, stage in enumerate(STAGES, start=1):
        supervise(model, codec, *stage, seed)
    model.bfloat16().save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rebuild the toy's warm start.")
    torch.set_num_threads(1)  # the other core draws the lessons
    parser.add_argument("--out", type=Path, default=WARM_START, help="model folder to write")
    build_warm_start(parser.parse_args().out)
