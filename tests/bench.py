"""Speed and memory, measured against what people would use instead. A script, not a test.

    python tests/bench.py                              # every row but `phases`, on a CPU or a GPU
    python tests/bench.py --rows update,rollout --json bench.json
    python tests/bench.py --gpu --json gpu.json        # the 2B model at the paper's budgets

A row is a ratio, theirs over ours, of medians taken in turn in one process on the same inputs:

    update      forward + backward of one group: a packed row against a padded batch of G rows
    rollout     sampling a group: `rollout.sample` against `model.generate`
    steps       decode forwards of scripted lengths: the table of rows against chunks. No model
    partner     the frozen Reasoner of one toy step: distinct evidence against one call a rollout
    evaluation  questions with both roles: a table of rows against one `generate` after another
    step        a whole GRPO step against TRL's GRPOTrainer, where TRL is installed
    phases      (--gpu) both phases and their updates at full size; boxes, pay, lengths scripted

Shapes are [P, R, G]: prompt tokens, response tokens, samples a group. GiB is what a run adds to
what was there before it (weights, optimizer); of `phases` all of it. Weights are random, as speed
does not depend on them.
"""

import argparse
import copy
import ctypes
import datetime
import gc
import json
import math
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
import torch
import transformers
from PIL import Image
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import eval as evaluation
import grpo
import p2r_min
import rollout
import toy
from crop import Box, Parsed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UPDATE_SHAPES = [(512, 32, 8), (2180, 80, 8), (2180, 1024, 8)]
if DEVICE == "cuda":
    UPDATE_SHAPES.append((8300, 250, 8))
ROLLOUT_SHAPES = [(2180, 80, 8)]
TINY_SHAPES = [(100, 6, 3)]

# ---------------------------------------------------------------------------------------------
# Models and inputs


def small_config(language=8, vision=4):
    """The CPU's model: hidden 512, 8 language layers, 4 vision layers, 40M parameters."""
    return Qwen3VLConfig(
        text_config=dict(
            initializer_range=0.08, vocab_size=8192, hidden_size=512, intermediate_size=1536,
            num_hidden_layers=language, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
            tie_word_embeddings=True, max_position_embeddings=65536,
            rope_parameters=dict(rope_type="default", rope_theta=5_000_000.0,
                                 mrope_section=[12, 10, 10], mrope_interleaved=True)),
        vision_config=dict(
            initializer_range=0.08, depth=vision, hidden_size=256, num_heads=4,
            intermediate_size=1024, patch_size=16, out_hidden_size=512,
            num_position_embeddings=2304,
            deepstack_visual_indexes=[0, 1, 2]),
        image_token_id=8, video_token_id=9, vision_start_token_id=6, vision_end_token_id=7,
        tie_word_embeddings=True)


def tiny_config():
    """With as few layers as DeepStack allows: to try the code itself."""
    return small_config(language=3, vision=3)


def full_config():
    """Qwen3-VL-2B-Instruct: 2,127,532,032 parameters."""
    return Qwen3VLConfig(
        text_config=dict(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
            max_position_embeddings=262144,
            rope_parameters=dict(rope_type="default", rope_theta=5_000_000.0,
                                 mrope_section=[24, 20, 20], mrope_interleaved=True)),
        vision_config=dict(
            depth=24, hidden_size=1024, num_heads=16, intermediate_size=4096, patch_size=16,
            out_hidden_size=2048, num_position_embeddings=2304,
            deepstack_visual_indexes=[5, 11, 17]),
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652,
        vision_end_token_id=151653, tie_word_embeddings=True)


def build(config, dtype=None):
    """A random model on DEVICE as rollout.load and training have it: float32 on a CPU, bf16 on a
    GPU (or of `dtype`), activations checkpointed."""
    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = dtype or (torch.float32 if DEVICE == "cpu" else torch.bfloat16)
    with torch.device(DEVICE):
        model = Qwen3VLForConditionalGeneration._from_config(
            config, dtype=dtype,
            attn_implementation={"text_config": "group", "vision_config": "sdpa"})
    grpo.checkpoint_activations(model)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return rollout.quicken(model).eval()


def endless(model):
    """As much of a rollout.Codec as sampling needs, without stop ids: every response is cut off."""
    c = model.config
    banned = torch.tensor([c.image_token_id, c.video_token_id, c.vision_start_token_id,
                           c.vision_end_token_id])
    return SimpleNamespace(banned=banned, stop_ids=torch.tensor([], dtype=torch.long),
                           decode=lambda ids: "")


def make_prompt(model, P, seed=0):
    """A rollout.Prompt of P tokens: images of up to 2048 visual tokens, at least 64 of text."""
    generator = torch.Generator().manual_seed(seed)
    config, vision = model.config, model.config.vision_config

    # As many images of full height as there is room for, parted by a token.
    height, left, grids, parts = min(32, P // 16), P - 64, [], [text_ids(32, generator)]
    while left // height > 0:
        width = min(left, 2048) // height
        grids.append([1, 2 * height, 2 * width])
        parts.append(torch.tensor([config.vision_start_token_id]))
        parts.append(torch.full((height * width,), config.image_token_id))
        left -= height * width + 1
    parts.append(text_ids(P - sum(map(len, parts)), generator))

    ids, grids = torch.cat(parts), torch.tensor(grids)                          # (P,)
    types = (ids == config.image_token_id).int()
    positions, _ = model.model.get_rope_index(ids[None], mm_token_type_ids=types[None],
                                              image_grid_thw=grids)
    size = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(grids.prod(1).sum()), size, generator=generator)
    return rollout.Prompt(ids, positions[:, 0], pixels.to(model.dtype), grids)


def text_ids(count, generator):
    return torch.randint(100, 300, (count,), generator=generator)


def write_codec(folder, config, max_pixels):
    """Writes the files that a Codec reads: the toy's, with patches of 16 pixels. `config` gets the
    special ids of its tokenizer."""
    for file in toy.WARM_START.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    file = folder / "preprocessor_config.json"
    changes = {"patch_size": 16, "size": {"shortest_edge": 4096, "longest_edge": max_pixels}}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    small = Qwen3VLConfig.from_pretrained(folder)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id",
                 "vision_end_token_id"):
        setattr(config, name, getattr(small, name))


# ---------------------------------------------------------------------------------------------
# Measuring

clock = time.perf_counter  # or time.process_time, for a machine that others use too


def memory(key):
    """`VmRSS` (now) or `VmHWM` (peak) of this process in GiB; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(key):
            return int(line.split()[1]) / 2**20


def wait():
    """Until the GPU has done all that it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak():
    """Peak GiB since `Watch` was started last, weights and all."""
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else memory("VmHWM")


class Watch:
    """Started when it is made; stop() gives (seconds, GiB added at the peak)."""

    def __init__(self):
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**30
        else:
            # Hand freed memory back to the system, and forget the peak so far (Linux only).
            try:
                ctypes.CDLL("libc.so.6").malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")
            except (OSError, AttributeError):
                pass
            self.before = memory("VmRSS")
        self.start = clock()

    def stop(self):
        wait()
        seconds = clock() - self.start
        return seconds, None if self.before is None else max(0.0, peak() - self.before)


def timed(run):
    """(seconds, GiB added at the peak, what `run` returned)."""
    watch = Watch()
    result = run()
    return *watch.stop(), result


def versus(name, ours, theirs, args):
    """Runs the two in turn. Returns a row's figures and the last result of each."""
    measured, results = ([], []), [None, None]
    for i in tqdm(range(args.warmup + args.repeats), name, leave=False):
        for side, run in enumerate((ours, theirs)):
            seconds, gib, results[side] = timed(run)
            if i >= args.warmup:
                measured[side].append((seconds, gib))
    return figures(*measured), *results


def figures(ours, theirs):
    """Lists of (seconds, GiB) -> a row's figures."""
    row = {}
    for name, runs in (("ours", ours), ("theirs", theirs)):
        seconds, gib = zip(*runs)
        row[f"{name}_s"] = statistics.median(seconds)
        row[f"{name}_gib"] = None if None in gib else max(gib)
    return row | {"ratio": row["theirs_s"] / row["ours_s"]}


# ---------------------------------------------------------------------------------------------
# update and rollout


def padded_logprobs(model, prompt, texts, banned, chunk=512):
    """What others do: G rows of prompt + response as one batch, the images G times. (G R,)"""
    # G copies of the prompt, a response after each.
    G, P = len(texts), len(prompt.ids)
    texts = torch.stack(texts).to(model.device)                                 # (G, R)
    after = prompt.positions.max() + 1 + torch.arange(texts.shape[1])
    inputs = rollout.right_padded([prompt] * G, model.device)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], texts], dim=1)        # (G, P + R)
    inputs["position_ids"] = torch.cat(
        [inputs["position_ids"], after.expand(3, G, -1).to(model.device)], dim=2)

    # As in grpo.response_logprobs, logits exist a chunk at a time.
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, P - 1:-1]
    banned = banned.to(model.device)

    def score(hidden, target):
        logits = model.lm_head(hidden).float().index_fill(-1, banned, float("-inf"))
        return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]

    parts = zip(hidden.flatten(0, 1).split(chunk), texts.flatten().split(chunk))
    return torch.cat([checkpoint(score, *part, use_reentrant=False) for part in parts])


def backward(model, logp, weights):
    """(log-probs, gradients); leaves no gradient behind."""
    (logp * weights).sum().backward()
    grads = [p.grad.float() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return logp.detach(), grads


def row_update(args):
    model = build(args.config())
    banned = endless(model).banned
    for P, R, G in args.shapes or UPDATE_SHAPES:
        generator = torch.Generator().manual_seed(0)
        prompt, texts = make_prompt(model, P), [text_ids(R, generator) for _ in range(G)]
        weights = torch.randn(G * R, generator=generator).to(DEVICE)
        model.train()

        def ours():
            row = grpo.pack(prompt, texts, DEVICE)
            return backward(model, grpo.response_logprobs(model, row, banned)[0], weights)

        def theirs():
            return backward(model, padded_logprobs(model, prompt, texts, banned), weights)

        # Gradients are compared parameter by parameter, relative to their norm.
        found, mine, other = versus(f"update {P} {R} {G}", ours, theirs, args)
        gaps = [(a - b).norm() / b.norm().clamp_min(1e-12) for a, b in zip(mine[1], other[1])]
        yield dict(row="update", shape=[P, R, G], **found, our_tokens=P + G * R,
                   their_tokens=G * (P + R), max_gradient_diff=max(gaps).item(),
                   max_logprob_diff=(mine[0] - other[0]).abs().max().item())


@torch.no_grad()
def generate(model, prompt, R, **how):
    """`model.generate` at temperature 1 without top-k and top-p, exactly R tokens: (rows, R)."""
    inputs = rollout.right_padded([prompt], model.device)
    del inputs["position_ids"]
    types = (inputs["input_ids"] == model.config.image_token_id).int()
    plain = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
                 min_new_tokens=R, max_new_tokens=R)
    return model.eval().generate(**inputs, mm_token_type_ids=types,
                                 **(plain | how))[:, len(prompt.ids):]


def row_rollout(args):
    model = build(args.config())
    codec = endless(model)
    for P, R, G in args.shapes or ROLLOUT_SHAPES:
        prompt = make_prompt(model, P)

        def ours():
            generator = torch.Generator(DEVICE).manual_seed(0)
            return list(rollout.sample(model, codec, [prompt], group=G, max_tokens=R, rows=1,
                                       generator=generator))[0].completions

        def theirs():
            return generate(model, prompt, R, num_return_sequences=G)

        found, mine, other = versus(f"rollout {P} {R} {G}", ours, theirs, args)
        assert other.shape == (G, R) and all(len(c.ids) == R for c in mine)

        # The sampler's log-probs against those of separate rows.
        with torch.no_grad():
            logp = padded_logprobs(model, prompt, [c.ids for c in mine], codec.banned).cpu()
        gap = (logp - torch.cat([c.logps for c in mine])).abs().max().item()
        yield dict(row="rollout", shape=[P, R, G], **found, tokens_per_s=G * R / found["ours_s"],
                   max_logprob_diff=gap)


# ---------------------------------------------------------------------------------------------
# steps: the sampler's own schedule, with scripted lengths in place of a model


def scripted(lengths, rows):
    """Sample without a model: response g of prompt i ends after lengths[i][g] >= 2 tokens.

    Returns (groups, steps): the prompts in the table at each decode forward.
    """
    steps = []

    def logits(active):
        # Token 1 goes on, token 0 ends.
        script = torch.tensor([lengths[row.order] for row in active])           # (n, G)
        ends = torch.tensor([row.t + 1 for row in active])[:, None] >= script
        return 100.0 * torch.stack([ends, ~ends], dim=-1)                       # (n, G, 2)

    def prefill(model, table, place, newcomers):
        return logits(newcomers)[:, 0]

    def decode_step(model, table, active):
        steps.append([row.order for row in active])
        return logits(active)

    end, none = torch.tensor([0]), torch.tensor([], dtype=torch.long)
    model = SimpleNamespace(eval=lambda: None, device=torch.device("cpu"))
    codec = SimpleNamespace(banned=none, stop_ids=end, decode=lambda ids: "")
    prompts = [rollout.Prompt(end, end.expand(3, 1), None, None) for _ in lengths]
    with mock.patch.multiple(rollout, prefill=prefill, decode_step=decode_step):
        return list(rollout.sample(model, codec, prompts, group=len(lengths[0]), greedy=True,
                                   max_tokens=max(map(max, lengths)), rows=rows)), steps


def row_steps(args):
    """Lengths are log-normal: mean 250, sigma 0.5, at most 2048 tokens."""
    for Q, G, rows in ((512, 1, 16), (64, 8, 8)):
        normal = torch.randn(Q, G, generator=torch.Generator().manual_seed(0))
        lengths = (0.5 * normal + math.log(250) - 0.5**2 / 2).exp().round().clamp(2, 2048)
        _, steps = scripted(lengths.int().tolist(), rows)

        # A chunk of rows goes on until its longest response ends; nothing beats full rows.
        longest = lengths.amax(dim=1)                                           # (Q,)
        chunks = sum(chunk.max().item() for chunk in longest.split(rows))
        ideal = longest.sum().item() / rows
        assert len(steps) <= 1.1 * ideal, (len(steps), ideal)
        yield dict(row="steps", shape=[None, 250, G], questions=Q, rows=rows,
                   ratio=chunks / len(steps), our_forwards=len(steps), chunks=chunks, ideal=ideal,
                   over_ideal=len(steps) / ideal)


# ---------------------------------------------------------------------------------------------
# partner and evaluation: the embedded toy


def toy_setting(args):
    """(Settings, examples, model, codec) of the embedded toy; with --tiny a few questions."""
    fewer = dict(questions=4, group=4) if args.tiny else {}
    s = p2r_min.Settings(**toy.defaults() | fewer)
    return s, evaluation.load_data(s.eval_data), *rollout.load(s.model, s.max_pixels, DEVICE)


def row_partner(args):
    s, examples, model, codec = toy_setting(args)
    generator = torch.Generator(DEVICE).manual_seed(0)
    batch = examples[:s.questions]
    groups = list(rollout.perceive(model, codec, batch, group=s.group, rows=s.rollout_batch,
                                   max_tokens=s.perceive_tokens, generator=generator))

    # Labels never reach the Reasoner, so evidence is the question and the coordinates in order.
    every, distinct = [], {}
    for q, group in enumerate(groups):
        for completion in group.completions:
            boxes = completion.parsed.boxes
            key = q, tuple(box[:4] for box in boxes)
            every.append((key, (batch[q], boxes)))
            distinct[key] = batch[q], boxes

    def answers(cases):
        found = rollout.reason(model, codec, cases, greedy=True, max_tokens=s.reason_tokens,
                               rows=s.partner_batch)
        return [group.completions[0].text for group in found]

    found, ours, theirs = versus("partner", lambda: answers(distinct.values()),
                                 lambda: answers([case for _, case in every]), args)
    by_key = dict(zip(distinct, ours))
    assert theirs == [by_key[key] for key, _ in every], "asking once must not change an answer"
    P = statistics.mean(len(group.prompt.ids) for group in groups)
    yield dict(row="partner", shape=[round(P), s.reason_tokens, s.group], **found,
               our_calls=len(distinct), their_calls=len(every))


def row_evaluation(args):
    s, examples, model, codec = toy_setting(args)
    examples = examples[:8 if args.tiny else 64]
    stops = codec.stop_ids.tolist()
    how = dict(do_sample=False, temperature=None, top_k=None, top_p=None, min_new_tokens=None,
               eos_token_id=stops, pad_token_id=stops[0], suppress_tokens=codec.banned.tolist())

    # Both sides are greedy and write the same limits of tokens.
    def ours():
        looks = list(rollout.perceive(model, codec, examples, greedy=True, rows=s.partner_batch,
                                      max_tokens=s.perceive_tokens))
        cases = [(e, look.completions[0].parsed.boxes) for e, look in zip(examples, looks)]
        return [group.completions[0].text for group in rollout.reason(
            model, codec, cases, greedy=True, rows=s.partner_batch, max_tokens=s.reason_tokens)]

    def theirs():
        answers = []
        for e in examples:
            prompt = rollout.perceiver_prompt(codec, e.load_image(), e.question)
            text = codec.decode(generate(model, prompt, s.perceive_tokens, **how)[0])
            prompt = rollout.reasoner_prompt(codec, e.load_image(), rollout.parse_boxes(text).boxes,
                                             e.question, e.answer_form)
            answers.append(codec.decode(generate(model, prompt, s.reason_tokens, **how)[0]))
        return answers

    found, mine, other = versus("evaluation", ours, theirs, args)
    yield dict(row="evaluation", **found, same_answers=mean_of(a == b for a, b in zip(mine, other)),
               questions_per_s=len(examples) / found["ours_s"],
               their_questions_per_s=len(examples) / found["theirs_s"])


def mean_of(values):
    return statistics.mean(map(float, values))


# ---------------------------------------------------------------------------------------------
# step: against TRL


class ImageOnly(transformers.Qwen3VLProcessor):
    """The library's processor without its video part, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def row_step(args):
    """TRL as its users run it without a serving engine: one group a micro-batch, activations
    checkpointed, sampled lengths forced to be the same."""
    try:
        import trl
        from datasets import Dataset
    except ImportError as error:
        yield dict(row="step", failed=f"skipped, TRL is not installed here ({error})")
        return
    Q, R, G, side = (2, 6, 3, 96) if args.tiny else (2, 32, 8, 704)
    question = "Which way do the stripes of the red circle run?"
    images = [Image.effect_noise((side, side), 90).convert("RGB") for _ in range(Q)]

    def reward(text):
        return float(len(text) % 2)

    def trl_rewards(completions, **_):
        texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
        return [reward(text) for text in texts]

    with tempfile.TemporaryDirectory() as folder:
        folder, config = Path(folder), small_config()
        write_codec(folder, config, side**2)
        model = build(config)
        model.save_pretrained(folder)
        codec = rollout.Codec(folder, model, side**2)
        codec.stop_ids = torch.tensor([], dtype=torch.long)
        frozen = copy.deepcopy(model).requires_grad_(False)
        optimizer = grpo.MasterAdamW(model, 1e-6)
        examples = [SimpleNamespace(load_image=image.copy, question=question) for image in images]

        def ours():
            generator = torch.Generator(DEVICE).manual_seed(0)
            groups = list(rollout.perceive(model, codec, examples, group=G, max_tokens=R, rows=Q,
                                           generator=generator))
            for group in groups:
                rewards = torch.tensor([reward(c.text) for c in group.completions])
                group.advantages = grpo.group_advantages(rewards)
            grpo.update_batch(model, frozen, optimizer, groups, banned=codec.banned, kl=0.01,
                              clip=0.2, max_norm=1.0)
            return groups

        # Both sides in turn, as in `versus`: a step of theirs, then one of ours.
        measured, lengths = ([], []), []

        class InTurn(transformers.TrainerCallback):
            """Measures each of TRL's steps, and one of ours after it."""

            def on_step_begin(self, *_, **__):
                self.watch = Watch()

            def on_step_end(self, *_, **__):
                measured[1].append(self.watch.stop())
                *mine, groups = timed(ours)
                measured[0].append(mine)
                lengths.append(len(groups[0].prompt.ids))

        codec.image_processor.size = codec.size
        processor = ImageOnly(codec.image_processor, codec.tokenizer, None,
                              chat_template=codec.tokenizer.chat_template)
        prompt = [{"role": "system", "content": rollout.SYSTEM},
                  {"role": "user", "content": rollout.PERCEIVER.format(question=question)}]
        trl.GRPOTrainer(
            model=Qwen3VLForConditionalGeneration.from_pretrained(
                folder, dtype=model.dtype, attn_implementation="sdpa"),
            reward_funcs=trl_rewards, processing_class=processor, callbacks=[InTurn()],
            train_dataset=Dataset.from_list([dict(prompt=prompt, image=i) for i in images]),
            args=trl.GRPOConfig(
                output_dir=str(folder / "trl"), per_device_train_batch_size=G, num_generations=G,
                gradient_accumulation_steps=Q, max_completion_length=R, beta=0.01, epsilon=0.2,
                temperature=1.0, top_p=1.0, top_k=0, loss_type="dapo", learning_rate=1e-6,
                lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=1.0,
                gradient_checkpointing=True, max_steps=args.warmup + args.repeats,
                generation_kwargs=dict(min_new_tokens=R), bf16=DEVICE == "cuda",
                use_cpu=DEVICE == "cpu", save_strategy="no", report_to=[], disable_tqdm=True,
                logging_steps=10**6, seed=0)).train()
    ours_theirs = [side[args.warmup:] for side in measured]
    yield dict(row="step", shape=[lengths[0], R, G], **figures(*ours_theirs), questions=Q,
               theirs=f"TRL {trl.__version__}")


# ---------------------------------------------------------------------------------------------
# phases: the 2B model at the paper's budgets

CARDS = {  # dense bf16 FLOP/s and bytes/s, from the SXM data sheets
    "H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12)}


def forward_flops(model, prompt, lengths):
    """Matrix products of one forward of a packed row: what must be computed, each score once."""
    c, language, visual = model.config.text_config, model.model.language_model, model.model.visual
    P, T, patches = len(prompt.ids), sum(lengths), len(prompt.pixels)

    def weights(module):
        return sum(p.numel() for p in module.parameters() if p.ndim > 1)

    # Two operations a weight and token; scores and weighted sums four a pair of query and key.
    pairs = P**2 / 2 + sum(R * (P + R / 2) for R in lengths)
    text = 2 * weights(language.layers) * (P + T) + 2 * c.hidden_size * c.vocab_size * T
    text += 4 * c.num_attention_heads * c.head_dim * c.num_hidden_layers * pairs
    pixels = 2 * (weights(visual.blocks) + weights(visual.patch_embed)) * patches
    merged = patches // visual.spatial_merge_size**2
    pixels += 2 * (weights(visual.merger) + weights(visual.deepstack_merger_list)) * merged
    for n in prompt.grids.prod(1).tolist():
        pixels += 4 * n**2 * model.config.vision_config.hidden_size * len(visual.blocks)
    return text + pixels


def noise_example(seed, side):
    """An image of far more pixels than the budget, so that every crop fills the budget, too."""
    values = numpy.random.default_rng(seed).integers(0, 256, (side, side * 3 // 2, 3), numpy.uint8)
    return SimpleNamespace(load_image=Image.fromarray(values).copy, answer_form="free_form",
                           question="Which way do the stripes of the red circle run?")


def row_phases(args):
    """Both phases with their update. Three boxes a list, half of a group's lists distinct; lengths
    as tests/hours.py has them, log-normal around 80 and 250 tokens. (The table is made for the
    longest that are allowed; an update's memory is that of these lengths.)"""
    small = DEVICE == "cpu"
    smaller = dict(group=4, max_pixels=64 * 1024, perceive_tokens=6, reason_tokens=8)
    s = p2r_min.Settings(questions=args.questions, **smaller if small else {})
    config = args.config()
    with tempfile.TemporaryDirectory() as folder:
        write_codec(Path(folder), config, s.max_pixels)
        model = build(config)
        codec = rollout.Codec(Path(folder), model, s.max_pixels)
    codec.stop_ids = torch.tensor([], dtype=torch.long)
    players = p2r_min.Players(model, copy.deepcopy(model).requires_grad_(False), codec, None)
    optimizer = grpo.MasterAdamW(model, 1e-6)
    examples = [noise_example(seed, 512 if small else 4000) for seed in range(s.questions)]
    card = (None, None)
    for name, speeds in CARDS.items():
        if not small and name in torch.cuda.get_device_name():
            card = speeds

    # Boxes and pay are scripted: a random model writes none, and earns nothing.
    looked = []

    def boxes(text):
        at = 20 * (len(looked) % s.group // 2)
        looked.append(at)
        three = [Box(10 + at, 10, 280 + at, 300, "a"), Box(10 + at, 400, 280 + at, 690, "b"),
                 Box(500, 10 + at, 800, 300 + at, "c")]
        return Parsed(three, True)

    def pay(rollouts, *_, **__):
        for i, sampled in enumerate(rollouts):
            sampled.reward = float(i % 2)

    for phase in tqdm(p2r_min.SCHEDULES["alternate"], "phases"):
        generator = torch.Generator(DEVICE).manual_seed(0)
        spent = {}
        stand_ins = dict(
            parse_boxes=boxes, InProgress=Scripted, prefetch=waited(rollout.prefetch, spent),
            prefill=watched(rollout.prefill, spent),
            decode_step=watched(rollout.decode_step, spent))
        with mock.patch.object(p2r_min, "pay", pay), mock.patch.multiple(rollout, **stand_ins):
            sampling, _, experience = timed(
                lambda: p2r_min.PHASES[phase](players, examples, s, generator))
        rollout_gib = peak()
        groups = experience.groups
        updating, _, metrics = timed(lambda: grpo.update_batch(
            model, players.frozen, optimizer, groups, banned=codec.banned, kl=s.kl, clip=s.clip,
            max_norm=s.max_grad_norm))
        update_gib = peak()
        estimate = p2r_min.estimate_memory(
            config, model.num_parameters(), model.dtype.itemsize, s)
        yield phase_figures(phase, s, model, experience, sampling, updating, *card) | dict(
            ours_gib=max(rollout_gib, update_gib), rollout_gib=rollout_gib, update_gib=update_gib,
            estimate_gib=estimate, sampler_gap=metrics["sampler_gap"], kl=metrics["kl"],
            entropy=metrics["entropy"], **spent)


class Scripted(rollout.InProgress):
    """A row of the sampler whose responses end after scripted lengths."""

    def __init__(self, order, prompt, group):
        super().__init__(order, prompt, group)
        mean, sigma = (80, 0.4) if len(prompt.grids) == 1 else (250, 0.5)
        rng = numpy.random.default_rng(order)
        self.lengths = rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, group).clip(2)

    def take(self, ids, logps, stops, max_tokens):
        super().take(ids, logps, stops, max_tokens)
        self.alive = {g for g in self.alive if self.t < self.lengths[g]}


def watched(function, spent):
    """The function, its calls counted and their seconds summed in `spent`."""
    name = function.__name__

    def run(*inputs):
        wait()
        start = clock()
        result = function(*inputs)
        wait()
        spent[f"{name}_calls"] = spent.get(f"{name}_calls", 0) + 1
        spent[f"{name}_s"] = spent.get(f"{name}_s", 0) + clock() - start
        return result
    return run


def waited(prefetch, spent):
    """`prefetch`, with the seconds that the sampler waits for it summed in `spent`."""
    def run(*inputs):
        prompts = prefetch(*inputs)
        while True:
            start = clock()
            try:
                prompt = next(prompts)
            except StopIteration:
                return
            finally:
                spent["prompts_s"] = spent.get("prompts_s", 0) + clock() - start
            yield prompt
    return run


def phase_figures(phase, s, model, experience, sampling, updating, flops, bandwidth):
    """A phase's row: seconds, and how far decoding and the update are from the card's limits."""
    groups, Q = experience.groups, s.questions
    lengths = [[len(c.ids) for c in group.completions] for group in groups]
    own = sampling - experience.partner_seconds

    # The update: three times a forward for the policy, once the reference. Decoding reads all
    # weights and the rows in use once a step.
    work = sum(4 * forward_flops(model, group.prompt, R) for group, R in zip(groups, lengths))
    R, tokens = mean_of(map(mean_of, lengths)), sum(map(sum, lengths))
    c, width = model.config.text_config, model.dtype.itemsize
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * width
    rows, P = min(s.rollout_batch, Q), max(len(group.prompt.ids) for group in groups)
    head = sum(p.numel() for p in model.model.language_model.parameters()) * width
    step_bytes = head + kv * rows * (P + s.group * R / 2)
    return dict(
        row=phase, shape=[round(mean_of(len(g.prompt.ids) for g in groups)), round(R), s.group],
        ours_s=sampling + updating, parameters=model.num_parameters(), questions=Q,
        partner_calls=experience.partner_calls, rollout_s_per_question=own / Q,
        partner_s_per_question=experience.partner_seconds / Q,
        update_s_per_question=updating / Q, tokens_per_s=tokens / own,
        decode_bound_tokens_per_s=rows * s.group * bandwidth / step_bytes if bandwidth else None,
        update_tflop=work / 1e12, update_mfu=work / updating / flops if flops else None)


# ---------------------------------------------------------------------------------------------
# The table and the command line

ROWS = {"update": row_update, "rollout": row_rollout, "steps": row_steps, "partner": row_partner,
        "evaluation": row_evaluation, "step": row_step, "phases": row_phases}
COLUMNS = {"row": 14, "shape": 18, "ours_s": 10, "theirs_s": 10, "ratio": 8, "ours_gib": 10,
           "theirs_gib": 11, "max_logprob_diff": 18}


def cell(value):
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
    return "-" if value is None else str(value)


def print_table(rows):
    print("\n" + "".join(f"{name:<{width}}" for name, width in COLUMNS.items()))
    for row in rows:
        if "failed" in row:
            print(f"{row['row']:<14}{row['failed']}")
            continue
        print("".join(f"{cell(row.get(name)):<{width}}" for name, width in COLUMNS.items()))
        rest = [f"{name} {cell(value)}" for name, value in row.items() if name not in COLUMNS]
        if rest:
            print(" " * 14 + ", ".join(rest))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--rows", help=f"which, of {','.join(ROWS)}; default: all but phases; with --gpu "
                       "phases,update,rollout,steps")
    add("--json", type=Path, help="file for the figures, written anew after every row")
    add("--repeats", type=int, default=3, help="measured runs of each side")
    add("--warmup", type=int, default=1, help="runs of each side before those")
    add("--shape", action="append", metavar="P,R,G", help="of update and rollout; may be repeated")
    add("--tiny", action="store_true", help="toy sizes, to try the code itself in seconds")
    add("--gpu", action="store_true", help="the 2B model; without a GPU small sizes, same code")
    add("--questions", type=int, default=4, help="questions a phase of `phases`")
    add("--cpu-seconds", action="store_true", help="processor seconds, for a CPU others use too")
    args = parser.parse_args(arguments)

    default = "phases,update,rollout,steps" if args.gpu else ",".join([*ROWS][:-1])
    names = (args.rows or default).split(",")
    unknown = set(names) - set(ROWS)
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    args.tiny |= args.gpu and DEVICE == "cpu"
    args.config = full_config if args.gpu and DEVICE == "cuda" else small_config
    args.shapes = [tuple(map(int, shape.split(","))) for shape in args.shape or ()]
    if args.tiny:
        args.config = tiny_config
        args.shapes = args.shapes or TINY_SHAPES
    global clock
    clock = time.process_time if args.cpu_seconds else time.perf_counter

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{datetime.date.today()}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}, {card}, {torch.get_num_threads()} threads")
    rows = []
    for name in names:
        # One failing row must not cost the others.
        try:
            for row in ROWS[name](args):
                rows.append(row)
                save(args.json, rows)
        except Exception as error:
            traceback.print_exc()
            reason = " ".join(str(error).split())[:200]
            rows.append({"row": name, "failed": f"failed: {type(error).__name__}: {reason}"})
            save(args.json, rows)
    print_table(rows)
    return rows


def save(path, rows):
    if path:
        path.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
