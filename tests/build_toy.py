"""Build the toy's warm start: what is shipped in assets/toy/, from nothing.

    python tests/build_toy.py            # some 15 minutes on 2 cores; --out elsewhere than assets/

A tiny Qwen3-VL is trained with supervision on scenes of toy.py, in stages (STAGES). It learns the
output formats, to point with boxes, and to read stripes from crops; and it learns two bad habits,
one for each role, that reinforcement learning has to find and undo (`lesson`).

The order of random draws is part of the recipe: change it, and the weights are others. So are the
prompts of rollout.py, each sentence of which is one token here.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (GenerationConfig, PreTrainedTokenizerFast, Qwen3VLConfig,
                          Qwen3VLForConditionalGeneration)

sys.path.insert(0, str(Path(__file__).parents[1]))

import rollout
import toy
from crop import Box

# -------------------------------------------------------------------------------------------------
# The model folder

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>")

# Renders what Qwen3-VL's own template renders for our messages.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>{{ 'assistant\\n' }}{%- endif -%}"""


def words():
    """Texts that are one token each, so that a constant sentence costs one token instead of two
    hundred and a name costs two. Everything else, digits included, is spelled byte by byte."""
    # What stands in every prompt.
    prompts = [rollout.SYSTEM, rollout.PERCEIVER.format(question="")]
    prompts += [text for text in rollout.REGIONS.values() if text]
    for form in rollout.FORMS.values():
        prompts.append(rollout.REASONER.format(regions="", question="", form=form))

    # What stands in every response, and in the chat format.
    formats = ["system\n", "user\n", "assistant\n", '[{"bbox_2d": [', ", ", '], "label": "',
               '"}, {"bbox_2d": [', '"}]', "<think>", ".</think>\n<answer>", "</answer>"]

    # What the questions and answers of this world are made of.
    world = ["Which way do the stripes of the ", " and of the ", " run?", "How many run ", ": the ",
             ", the ", " and the ", "They run ", " and "]
    grid = [str(1000 * i // toy.GRID) for i in range(toy.GRID + 1)]
    shapes = [" " + shape for shape in toy.SHAPES]
    return [*prompts, *formats, *world, *grid, *toy.COLOURS, *shapes, *toy.WAYS]


def build_model(folder, seed=0):
    """Write an untrained Qwen3-VL folder in the ordinary layout: config, weights, tokenizer,
    image processor."""
    folder.mkdir(parents=True, exist_ok=True)

    # Tokenizer: byte-level BPE without a single merge, and the words of this world.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: i for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in words()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)

    # Image processor: every image gets BUDGET pixels; one visual token is 16 x 16 of them.
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="Qwen2VLImageProcessorFast", patch_size=8, merge_size=2,
        temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size=dict(shortest_edge=toy.BUDGET, longest_edge=toy.BUDGET)), indent=2))

    # At the usual initializer_range of 0.02 a model this small does not even learn to copy a word.
    token = tokenizer.token_to_id
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=128, intermediate_size=256,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            max_position_embeddings=4096, initializer_range=0.08, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=5_000_000.0,
                                 mrope_section=[6, 5, 5], mrope_interleaved=True)),
        vision_config=dict(
            depth=2, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=8,
            spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=128,
            num_position_embeddings=64, deepstack_visual_indexes=[0, 1], initializer_range=0.08),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=True)
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)

    # Louder position embeddings, or it never learns where a patch is.
    with torch.no_grad():
        model.model.visual.pos_embed.weight.mul_(12)
    model.generation_config = GenerationConfig(
        eos_token_id=[token("<|im_end|>"), token("<|endoftext|>")],
        pad_token_id=token("<|endoftext|>"))
    model.save_pretrained(folder)


# -------------------------------------------------------------------------------------------------
# Lessons: a prompt, and the text that is to be written

SINGLE = (["one"],)     # kinds of questions that a scene's lessons are about, drawn by scene
MIXED = (["one"], ["one", "two"], ["one", "count"])


def cell(thing):
    """The grid cell that holds the thing, as a Box: all that the warm start can point at."""
    step = 1000 // toy.GRID
    left = thing.x * toy.GRID // toy.CANVAS * step
    top = thing.y * toy.GRID // toy.CANVAS * step
    return Box(left, top, left + step, top + step, thing.name)


def lesson(codec, rng, name, kinds):
    """One lesson on one scene: a list of (encoded prompt, target text), one for each question.

    For the Perceiver:
        locate   box what the question asks for
        habit    as locate, but in eight cases of ten box the topmost thing alone, whatever was
                 asked: the Perceiver's bad habit
        point    a colour of the question, directly followed by its place: the word itself learns
                 to look for its colour. Without this lesson no trial got past guessing between
                 the things (most were stopped after 500 to 1,000 updates).
    For the Reasoner:
        misread  tell the way of each crop's stripes, then answer, but take two in three downhill
                 stripes for uphill ones: the Reasoner's bad habit
        guess    without crops, answer at random

    All questions of a scene stand in one batch. What they have in common, the image, cancels out
    of the gradient, and what is left is the part that is hard to learn: how the question matters.
    """
    things = toy.make_scene(rng, rng.randint(2, 4))
    image = toy.draw_scene(things).convert("RGB")
    make = perceiver_lesson if name in ("locate", "habit", "point") else reasoner_lesson
    return [make(codec, rng, name, image, things, question)
            for question in toy.questions(things, rng.choice(kinds))]


def perceiver_lesson(codec, rng, name, image, things, question):
    """See `lesson` -> (prompt, target text)."""
    boxes = [cell(thing) for thing in question.evidence]
    if name == "habit" and rng.random() < 0.8:
        topmost = min(things, key=lambda thing: thing.y)
        boxes = [Box(*cell(topmost)[:4], boxes[0].label)]
    written = ['{"bbox_2d": [%d, %d, %d, %d], "label": "%s"}' % box for box in boxes]
    text = "[" + ", ".join(written) + "]"

    # Drawn even where it is not used: the order of draws is part of the recipe.
    pointed = rng.choice(question.evidence)
    if name == "point":
        text = pointed.colour + "%d, %d, %d, %d" % cell(pointed)[:4]
    return rollout.perceiver_prompt(codec, image, question.text), text


def reasoner_lesson(codec, rng, name, image, things, question):
    """See `lesson` -> (prompt, target text)."""
    # What it is shown: in one case of five less than was asked for, as a Perceiver may forget some.
    seen = question.evidence
    if rng.random() >= 0.8:
        seen = seen[:rng.randint(1, len(seen))]

    # What it is to read of it.
    ways = []
    for thing in seen:
        way = thing.way
        if name == "guess":
            way = rng.choice(toy.WAYS)
        elif way == "downhill" and rng.random() < 0.65:
            way = "uphill"
        ways.append(way)
    text = f"<think>They run {', '.join(ways)}.</think>\n<answer>{question.answer(ways)}</answer>"

    # Boxes of both sizes: a trained Perceiver may learn tighter ones.
    boxes = [rng.choice((thing.box, cell(thing))) for thing in seen]
    evidence = rng.choice(("annotated", "none") if name == "guess" else
                          ("both", "both", "both", "crops"))
    prompt = rollout.reasoner_prompt(codec, image, boxes, question.text, question.answer_form,
                                     evidence)
    return prompt, text


class Batches(torch.utils.data.IterableDataset):
    """Endless batches of fresh lessons: (model inputs, tokens of each row's target).

    mix: lesson -> its weight. A worker process draws them while the model learns.
    """

    def __init__(self, codec, seed, kinds, mix, size=48):
        self.codec, self.seed, self.kinds, self.mix, self.size = codec, seed, kinds, mix, size

    def __iter__(self):
        rng = random.Random(self.seed)
        names, weights = list(self.mix), list(self.mix.values())
        while True:
            rows = []
            while len(rows) < self.size:
                name = rng.choices(names, weights)[0]
                rows += lesson(self.codec, rng, name, self.kinds)
            yield self.collate(rows)

    def collate(self, rows):
        """[(prompt, target text)] -> one left-padded batch. Positions come along with the tokens,
        so padding moves none."""
        targets = [torch.tensor(self.codec.tokenizer(text + "<|im_end|>",
                                                     add_special_tokens=False)["input_ids"])
                   for _, text in rows]
        width = max(len(prompt.ids) + len(target) for (prompt, _), target in zip(rows, targets))
        ids = torch.zeros(len(rows), width, dtype=torch.long)               # (B, P + R)
        mask = torch.zeros(len(rows), width, dtype=torch.long)              # 1 = a real token
        positions = torch.zeros(3, len(rows), width, dtype=torch.long)      # (3, B, P + R)
        for row, ((prompt, _), target) in enumerate(zip(rows, targets)):
            # The target goes on where the prompt ends, on all three rows of positions.
            start = width - len(prompt.ids) - len(target)
            after = prompt.positions.max() + 1 + torch.arange(len(target))
            ids[row, start:] = torch.cat([prompt.ids, target])
            mask[row, start:] = 1
            positions[:, row, start:] = torch.cat([prompt.positions, after.expand(3, -1)], dim=1)
        inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions,
                      pixel_values=torch.cat([prompt.pixels for prompt, _ in rows]),
                      image_grid_thw=torch.cat([prompt.grids for prompt, _ in rows]))
        return inputs, torch.tensor([len(target) for target in targets])


# -------------------------------------------------------------------------------------------------
# The recipe

STAGES = (  # name, updates, learning rate, kinds, lessons, does the rate fall to 0?
    # Found by trial. Reading comes first: in a trial it did not come after locating. Misreading is
    # taught from the first lesson on: taught in the last ones only, undoing one habit undid both.
    ("read", 500, 2e-3, MIXED, {"misread": 1}, False),
    ("locate", 800, 2e-3, SINGLE, {"point": 2, "locate": 1, "misread": 1}, False),
    ("lists", 600, 1.5e-3, MIXED, {"point": 1, "locate": 2, "misread": 1}, False),
    ("both", 600, 1e-3, MIXED, {"locate": 4, "misread": 3, "guess": 1}, True),
    ("habit", 240, 5e-4, MIXED, {"habit": 4, "misread": 3, "guess": 1}, False),
)


def supervise(model, codec, seed, name, updates, lr, kinds, mix, decay):
    """One stage: cross-entropy on the target tokens, every batch fresh."""
    batches = iter(torch.utils.data.DataLoader(Batches(codec, seed, kinds, mix), batch_size=None,
                                               num_workers=1))
    adam = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    model.train()
    bar = tqdm(range(updates), name)
    for update in bar:
        # The learning rate rises over 50 updates; in a stage with decay it also falls to nothing.
        warmup = min(1.0, (update + 1) / 50)
        fall = 1 - update / updates if decay else 1.0
        for group in adam.param_groups:
            group["lr"] = lr * (warmup * fall)

        # Left-padded rows end with their targets: only those are scored.
        inputs, targets = next(batches)
        logits = model(**inputs).logits[:, :-1]                                 # (B, P + R - 1, V)
        ids = inputs["input_ids"][:, 1:]                                        # (B, P + R - 1)
        scored = torch.arange(ids.shape[1]) >= ids.shape[1] - targets[:, None]
        loss = F.cross_entropy(logits[scored], ids[scored])

        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        nats = loss.item() * targets.float().mean().item()
        bar.set_postfix(nats_per_response=f"{nats:.3f}")


def main():
    parser = argparse.ArgumentParser(description="Build the toy's warm start.")
    parser.add_argument("--out", type=Path, default=toy.WARM_START, help="the model folder")
    folder = parser.parse_args().out

    # One core for the model: the other draws the lessons.
    torch.set_num_threads(1)
    build_model(folder, seed=1)
    model, codec = rollout.load(folder, toy.BUDGET)
    for seed, stage in enumerate(STAGES, start=1):
        supervise(model, codec, seed, *stage)
    model.bfloat16().save_pretrained(folder)


if __name__ == "__main__":
    main()
