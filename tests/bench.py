"""Speed and memory, measured against what people would use instead. A script, not a test.

    python tests/bench.py                                  # every row, on a CPU or a GPU
    python tests/bench.py --rows update,rollout --json bench.json
    python tests/bench.py --gpu --json gpu.json            # the 2B model, both phases at the paper's budgets

Every row is a ratio, theirs over ours, of medians taken in turn in one process on the same inputs:

    update      forward + backward of one group: one packed row against a padded batch of G separate rows
    rollout     sampling a group: `rollout.sample` against `model.generate(num_return_sequences=G)`
    partner     one perception step of the toy: distinct evidence against one call per rollout
    evaluation  questions in p2r mode: batched against one `model.generate` after another
    step        a whole GRPO step against TRL's GRPOTrainer, where TRL is installed
    scaling     a step as Q, G, P and R double, one at a time
    phases      (--gpu) perception() and reasoning() at full size, with injected boxes and rewards and forced lengths

Shapes are [P, R, G]: prompt tokens, response tokens, samples a group. GiB is what a run adds to what
was there before it (weights, optimizer). Values do not matter to speed, so all weights are random.
"""

import argparse
import copy
import ctypes
import datetime
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import eval as evaluation
import grpo
import p2r_min
import rollout
import toy
from crop import Box, Parsed, parse_boxes

GROUP = {"text_config": "group", "vision_config": "sdpa"}  # as rollout.load has it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(512, 32, 8), (2180, 80, 8), (2180, 1024, 8)] + [(8300, 250, 8)] * (DEVICE == "cuda")
BASE = (2, 512, 32, 4)  # Q, P, R, G that the scaling row doubles one at a time


# ---------------------------------------------------------------------------------------------
# Models and inputs


def small_config():
    """The CPU's model: hidden 512, 8 language layers, 4 vision layers, 31M parameters."""
    return Qwen3VLConfig(
        text_config=dict(initializer_range=0.08, vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
                         num_key_value_heads=4, head_dim=64, tie_word_embeddings=True, max_position_embeddings=65536,
                         rope_parameters=dict(rope_type="default", rope_theta=5_000_000.0, mrope_section=[12, 10, 10],
                                              mrope_interleaved=True)),
        vision_config=dict(initializer_range=0.08, depth=4, hidden_size=256, num_heads=4, intermediate_size=1024, patch_size=16, out_hidden_size=512,
                           num_position_embeddings=2304, deepstack_visual_indexes=[0, 1, 2]),
        image_token_id=8, video_token_id=9, vision_start_token_id=6, vision_end_token_id=7, tie_word_embeddings=True)


def build(config):
    """A random model on DEVICE, checkpointing as in training: float32 on a CPU, bf16 on a GPU."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen3VLForConditionalGeneration._from_config(
            config, dtype=torch.float32 if DEVICE == "cpu" else torch.bfloat16, attn_implementation=GROUP)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.eval()


def endless(model):
    """As much of a rollout.Codec as sampling needs; without stop ids every response reaches the token limit."""
    c = model.config
    return SimpleNamespace(banned=torch.tensor([c.image_token_id, c.video_token_id, c.vision_start_token_id, c.vision_end_token_id]),
                           stop_ids=torch.tensor([], dtype=torch.long), decode=lambda ids: "")


def make_prompt(model, P, seed=0):
    """A rollout.Prompt of P tokens: images of up to 2048 visual tokens each, and at least 64 tokens of text."""
    g, vision = torch.Generator().manual_seed(seed), model.config.vision_config
    height, left, grids, ids = min(32, P // 16), P - 64, [], [torch.randint(100, 300, (32,), generator=g)]
    while (width := min(left // height, 2048 // height)) > 0:
        grids.append([1, 2 * height, 2 * width])
        ids.append(torch.full((height * width,), model.config.image_token_id))
        ids.append(torch.tensor([model.config.vision_start_token_id]))  # parts one image's tokens from the next's
        left -= height * width + 1
    ids = torch.cat(ids)
    ids = torch.cat([ids, torch.randint(100, 300, (P - len(ids),), generator=g)])            # (P,)
    grids = torch.tensor(grids)
    positions, _ = model.model.get_rope_index(ids[None], mm_token_type_ids=(ids == model.config.image_token_id).int()[None],
                                              image_grid_thw=grids)
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * vision.temporal_patch_size * vision.patch_size**2, generator=g)
    return rollout.Prompt(ids, positions[:, 0], pixels.to(model.dtype), grids)


def responses(R, G, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(100, 300, (R,), generator=g) for _ in range(G)]


# ---------------------------------------------------------------------------------------------
# Measuring


clock = time.perf_counter  # or time.process_time: processor seconds, for a machine that others use too


def now():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return clock()


def memory(key):
    """`VmRSS` (now) or `VmHWM` (peak) of this process in GiB; None where the system does not tell."""
    try:
        line = next(line for line in open("/proc/self/status") if line.startswith(key))
        return int(line.split()[1]) / 2**20
    except (OSError, StopIteration):
        return None


def trim():
    """Hand freed memory back to the system (glibc keeps it), or the next peak would start from it."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass


def timed(run):
    """-> (seconds, GiB added at the peak, what `run` returned)."""
    watch = measuring()
    next(watch)
    result = run()
    return *next(watch), result


def measuring():
    """A stop watch of two `next`: start; then (seconds, GiB added at the peak)."""
    gc.collect()
    trim()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**30
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        except OSError:
            pass
        before = memory("VmRSS")
    start = now()
    yield
    seconds = now() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else memory("VmHWM")
    yield seconds, None if peak is None else max(0.0, peak - before)


def versus(name, ours, theirs, args):
    """Runs the two in turn. -> (a row's figures, our last result, their last result)."""
    times, peaks, results = ([], []), ([], []), [None, None]
    for i in tqdm(range(args.warmup + args.repeats), name, leave=False):
        for side, run in enumerate((ours, theirs)):
            seconds, gib, results[side] = timed(run)
            if i >= args.warmup:
                times[side].append(seconds), peaks[side].append(gib)
    mine, other = (statistics.median(t) for t in times)
    gib = [max(p) if None not in p else None for p in peaks]
    return dict(ours_s=mine, theirs_s=other, ratio=other / mine, ours_gib=gib[0], theirs_gib=gib[1]), *results


# ---------------------------------------------------------------------------------------------
# Rows


def padded_logprobs(model, prompt, texts, banned, chunk=512):
    """What peers do: G rows of prompt + response as one padded batch, images and all repeated G times."""
    G, P, R = len(texts), len(prompt.ids), max(map(len, texts))
    row = rollout.collate([prompt] * G, model.device)                                         # (G, P)
    ids = torch.zeros(G, R, dtype=torch.long)
    mask = torch.zeros(G, R, dtype=torch.long)
    for i, text in enumerate(texts):
        ids[i, :len(text)], mask[i, :len(text)] = text, 1
    after = (prompt.positions.max() + 1 + torch.arange(R)).expand(3, G, -1)                   # (3, G, R)
    row["input_ids"], row["attention_mask"] = (
        torch.cat([a, b.to(a.device)], dim=1) for a, b in ((row["input_ids"], ids), (row["attention_mask"], mask)))
    row["position_ids"] = torch.cat([row["position_ids"], after.to(model.device)], dim=2)
    hidden = model.model(**row, use_cache=False).last_hidden_state[:, P - 1:-1]               # (G, R, hidden)
    keep, banned = mask.bool().to(hidden.device), banned.to(hidden.device)

    def score(h, target):
        return model.lm_head(h).float().index_fill(-1, banned, float("-inf")).log_softmax(-1).gather(1, target[:, None])[:, 0]

    return torch.cat([checkpoint(score, h, t, use_reentrant=False)
                      for h, t in zip(hidden[keep].split(chunk), ids.to(keep.device)[keep].split(chunk))])


def row_update(args):
    model = build(args.config())
    codec = endless(model)
    for P, R, G in args.shapes:
        prompt, texts = make_prompt(model, P), responses(R, G)
        weights = torch.randn(G * R, generator=torch.Generator().manual_seed(1)).to(DEVICE)

        def ours():
            model.train()
            logp, _ = grpo.response_logprobs(model, grpo.pack(prompt, texts, DEVICE), codec.banned)
            return backward(model, logp, weights)

        def theirs():
            model.train()
            return backward(model, padded_logprobs(model, prompt, texts, codec.banned), weights)

        figures, (mine, my_grads), (other, their_grads) = versus(f"update {P} {R} {G}", ours, theirs, args)
        gap = max(((a - b).norm() / b.norm().clamp_min(1e-12)).item() for a, b in zip(my_grads, their_grads))
        yield dict(row="update", shape=[P, R, G], **figures, max_logprob_diff=(mine - other).abs().max().item(),
                   max_gradient_diff=gap, our_tokens=P + G * R, their_tokens=G * (P + R))


def backward(model, logp, weights):
    """-> (log-probs, gradients); leaves no gradient behind."""
    (logp * weights).sum().backward()
    grads = [p.grad.float() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return logp.detach(), grads


def generate(model, prompts, R, **how):
    """`model.generate` at temperature 1 without top-k and top-p, exactly R tokens. -> (rows, R)"""
    inputs = rollout.collate(prompts, model.device)
    inputs.pop("position_ids")
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    model.eval()
    with torch.no_grad():
        return model.generate(**inputs, **dict(dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
                                                    min_new_tokens=R, max_new_tokens=R), **how))[:, inputs["input_ids"].shape[1]:]


def row_rollout(args):
    model = build(args.config())
    codec = endless(model)
    for P, R, G in args.shapes if args.tiny or args.shape else SHAPES[1:2]:
        prompt = make_prompt(model, P)

        def ours():
            generator = torch.Generator(DEVICE).manual_seed(0)
            return next(iter(rollout.sample(model, codec, [prompt], group=G, max_tokens=R, batch=1, generator=generator)))

        figures, group, ids = versus(f"rollout {P} {R} {G}", ours, lambda: generate(model, [prompt], R, num_return_sequences=G),
                                     args)
        assert ids.shape == (G, R) and all(len(c.ids) == R for c in group.completions)
        with torch.no_grad():  # the sampler's log-probs against those of separate, padded rows
            logp = padded_logprobs(model, prompt, [c.ids for c in group.completions], codec.banned).cpu()
        yield dict(row="rollout", shape=[P, R, G], **figures, tokens_per_s=G * R / figures["ours_s"],
                   max_logprob_diff=(logp - torch.cat([c.logps for c in group.completions])).abs().max().item())


def toy_setting(args):
    """(Settings, examples, model, codec) of the embedded toy, in as few questions as --tiny asks for."""
    s = p2r_min.Settings(**toy.defaults() | (dict(questions=4, group=4) if args.tiny else {}))
    model, codec = rollout.load(s.model, s.max_pixels, DEVICE)
    return s, evaluation.load_data(s.eval_data), model, codec


def row_partner(args):
    s, examples, model, codec = toy_setting(args)
    play = p2r_min.Players(model, model, codec, parse_boxes, evaluation.grade, fixed={})
    distinct, reason, lengths, partner = p2r_min.evidence, p2r_min.reason, [], {}

    def step(key):
        def asked(*args, **how):
            start = now()
            answers = list(reason(*args, **how))
            partner.setdefault(key, []).append(now() - start)
            return answers

        def run():
            p2r_min.evidence, p2r_min.reason = key, asked
            try:
                done = p2r_min.perception(play, examples[:s.questions], s, torch.Generator(DEVICE).manual_seed(0))
            finally:
                p2r_min.evidence, p2r_min.reason = distinct, reason
            lengths[:] = [(len(g.prompt.ids), len(c.ids)) for g in done.groups for c in g.completions]
            return done
        return run

    every = lambda q, parsed: (q, id(parsed))  # noqa: E731: each rollout is evidence of its own
    figures, ours, theirs = versus("partner", step(distinct), step(every), args)
    mine, other = (statistics.median(partner[key][args.warmup:]) for key in (distinct, every))  # the partner's part of the step
    assert torch.equal(ours.rewards, theirs.rewards), "asking once must not change a reward"
    yield dict(row="partner", shape=mean_shape(lengths, s.group), **figures | dict(ours_s=mine, theirs_s=other, ratio=other / mine),
               max_logprob_diff=None, our_calls=ours.partner_calls, their_calls=theirs.partner_calls)


def mean_shape(lengths, G):
    return [round(statistics.mean(column)) for column in zip(*lengths)] + [G]


def row_evaluation(args):
    s, examples, model, codec = toy_setting(args)
    examples = examples[:8 if args.tiny else 64]
    stops, batch = codec.stop_ids.tolist(), s.partner_batch

    def ours():
        found = rollout.perceive(model, codec, examples, greedy=True, max_tokens=s.perceive_tokens, batch=batch)
        cases = [(e, parse_boxes(g.completions[0].text).boxes) for e, g in zip(examples, found)]
        return [g.completions[0] for g in rollout.reason(model, codec, cases, greedy=True, max_tokens=s.reason_tokens, batch=batch)]

    lengths = []

    def theirs():
        answers = []
        for e in examples:
            how = dict(do_sample=False, temperature=None, top_k=None, top_p=None, eos_token_id=stops, pad_token_id=stops[0],
                       min_new_tokens=None, suppress_tokens=codec.banned.tolist())
            prompt = rollout.perceiver_prompt(codec, e.load_image(), e.question)
            text = codec.decode(generate(model, [prompt], s.perceive_tokens, **how)[0])
            prompt = rollout.reasoner_prompt(codec, e.load_image(), parse_boxes(text).boxes, e.question, e.answer_form)
            ids = generate(model, [prompt], s.reason_tokens, **how)[0]
            lengths.append((len(prompt.ids), len(ids)))
            answers.append(codec.decode(ids))
        return answers

    figures, mine, other = versus("evaluation", ours, theirs, args)
    yield dict(row="evaluation", shape=mean_shape(lengths, 1), **figures, max_logprob_diff=None,
               same_answers=sum(c.text == text for c, text in zip(mine, other)) / len(other),
               questions_per_s=len(examples) / figures["ours_s"], their_questions_per_s=len(examples) / figures["theirs_s"])


def one_step(model, frozen, optimizer, codec, prompts, R, G):
    """Sampling and update of Q prompts; every other response earns 1."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    groups = list(rollout.sample(model, codec, prompts, group=G, max_tokens=R, batch=len(prompts), generator=generator))
    advantages = grpo.group_advantages((torch.arange(len(prompts) * G).view(-1, G) % 2).float())
    return grpo.update_batch(model, frozen, optimizer, groups, advantages, banned=codec.banned, kl=0.01, clip=0.2, max_norm=1.0)


def row_scaling(args):
    model = build(args.config())
    frozen, optimizer, codec = copy.deepcopy(model).requires_grad_(False), grpo.MasterAdamW(model, 1e-6), endless(model)
    base = dict(zip("QPRG", (2, 100, 6, 3) if args.tiny else BASE))
    runs = {"base": base} | {f"2{name}": base | {name: 2 * base[name]} for name in base}
    seconds, gib = {name: [] for name in runs}, {name: [] for name in runs}
    for i in tqdm(range(args.warmup + args.repeats), "scaling", leave=False):
        for name, c in runs.items():
            prompts = [make_prompt(model, c["P"], seed) for seed in range(c["Q"])]
            took, added, _ = timed(lambda: one_step(model, frozen, optimizer, codec, prompts, c["R"], c["G"]))
            if i >= args.warmup:
                seconds[name].append(took), gib[name].append(added)
    for name, c in runs.items():
        time_, base_time = statistics.median(seconds[name]), statistics.median(seconds["base"])
        top, base_top = (max(gib[n]) if None not in gib[n] else None for n in (name, "base"))
        yield dict(row=f"scaling {name}", shape=[c["P"], c["R"], c["G"]], ours_s=time_, theirs_s=None, ratio=None, ours_gib=top,
                   theirs_gib=None, max_logprob_diff=None, questions=c["Q"], time_growth=time_ / base_time,
                   memory_growth=top / base_top if top and base_top else None)


def codec_for(folder, config, max_pixels):
    """Writes the files a Codec reads: the toy's tokenizer, patches of 16 pixels. -> `config` with that tokenizer's special ids"""
    toy.build_model(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(patch_size=16, size=dict(shortest_edge=4096, longest_edge=max_pixels))))
    small = Qwen3VLConfig.from_pretrained(folder)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(small, name))
    return config


def row_step(args):
    """TRL as its users run it without a serving engine: one group a micro-batch, checkpointing, the same sampled lengths."""
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
        import trl
    except ImportError as error:
        yield dict(row="step", failed=f"skipped, TRL is not installed here ({error})")
        return
    from PIL import Image
    Q, R, G, side = (2, 6, 3, 96) if args.tiny else (2, 32, 8, 704)
    question = "Which way do the stripes of the red circle run?"
    images = [Image.effect_noise((side, side), 90).convert("RGB") for _ in range(Q)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        config = codec_for(folder, small_config(), side**2)
        model = build(config)
        model.save_pretrained(folder)
        codec = rollout.Codec(folder, model, side**2)
        codec.stop_ids, codec.dtype = torch.tensor([], dtype=torch.long), model.dtype
        frozen, optimizer = copy.deepcopy(model).requires_grad_(False), grpo.MasterAdamW(model, 1e-6)
        reward = lambda text: float(len(text) % 2)  # noqa: E731
        examples = [SimpleNamespace(load_image=lambda image=image: image, question=question) for image in images]

        def ours():
            generator = torch.Generator(DEVICE).manual_seed(0)
            groups = list(rollout.perceive(model, codec, examples, group=G, max_tokens=R, batch=Q, generator=generator))
            rewards = torch.tensor([[reward(c.text) for c in g.completions] for g in groups])
            grpo.update_batch(model, frozen, optimizer, groups, grpo.group_advantages(rewards), banned=codec.banned, kl=0.01,
                              clip=0.2, max_norm=1.0)
            return groups

        class ImageOnly(transformers.Qwen3VLProcessor):  # its video part alone needs torchvision
            def check_argument_for_proper_class(self, argument_name, argument):
                return type(argument)

        codec.image_processor.size = codec.size
        processor = ImageOnly(codec.image_processor, codec.tokenizer, None, chat_template=codec.tokenizer.chat_template)
        prompt = [{"role": "system", "content": rollout.SYSTEM}, {"role": "user", "content": rollout.PERCEIVER.format(question=question)}]
        theirs_model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=model.dtype, attn_implementation="sdpa")
        settings = GRPOConfig(
            output_dir=str(folder / "trl"), per_device_train_batch_size=G, gradient_accumulation_steps=Q, num_generations=G,
            max_completion_length=R, beta=0.01, epsilon=0.2, temperature=1.0, top_p=1.0, top_k=0, loss_type="dapo", learning_rate=1e-6,
            lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=1.0, gradient_checkpointing=True, max_steps=args.warmup + args.repeats,
            generation_kwargs=dict(min_new_tokens=R), bf16=DEVICE == "cuda", use_cpu=DEVICE == "cpu", save_strategy="no", report_to=[],
            disable_tqdm=True, logging_steps=10**6, seed=0)
        times, peaks, lengths = ([], []), ([], []), []
        bar = tqdm(total=args.warmup + args.repeats, desc="step", leave=False)

        class Watch(transformers.TrainerCallback):
            """Times each of TRL's steps, and one of ours after it."""
            def on_step_begin(self, *_, **__):
                self.measured = measuring()
                next(self.measured)

            def on_step_end(self, *_, **__):
                theirs = next(self.measured)
                mine = timed(ours)
                lengths[:] = [len(mine[2][0].prompt.ids)]
                for side, figures in enumerate((mine, theirs)):
                    times[side].append(figures[0]), peaks[side].append(figures[1])
                bar.update()

        def score(completions, **_):
            texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
            return [reward(text) for text in texts]

        trainer = GRPOTrainer(model=theirs_model, reward_funcs=score, args=settings, processing_class=processor, callbacks=[Watch()],
                              train_dataset=Dataset.from_list([dict(prompt=prompt, image=image) for image in images]))
        trainer.train()
        bar.close()
    mine, other = (statistics.median(t[args.warmup:]) for t in times)
    gib = [max(p[args.warmup:]) if None not in p else None for p in peaks]
    yield dict(row="step", shape=[lengths[0], R, G], ours_s=mine, theirs_s=other, ratio=other / mine, ours_gib=gib[0], theirs_gib=gib[1],
               max_logprob_diff=None, questions=Q, theirs=f"TRL {trl.__version__}")


# ---------------------------------------------------------------------------------------------
# Full size: the 2B model, both phases


def full_config():
    """Qwen3-VL-2B-Instruct: 2,127,532,032 parameters."""
    return Qwen3VLConfig(
        text_config=dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
                         num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=262144,
                         rope_parameters=dict(rope_type="default", rope_theta=5_000_000.0, mrope_section=[24, 20, 20],
                                              mrope_interleaved=True)),
        vision_config=dict(depth=24, hidden_size=1024, num_heads=16, intermediate_size=4096, patch_size=16, out_hidden_size=2048,
                           num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17]),
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653, tie_word_embeddings=True)


CARDS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12)}  # dense bf16 FLOP/s, bytes/s (SXM data sheets)


def forward_flops(model, prompt, lengths):
    """Matrix products of one forward of a packed row: what must be computed, each score once."""
    c, language, visual = model.config.text_config, model.model.language_model, model.model.visual
    P, T, patches = len(prompt.ids), sum(lengths), prompt.pixels.shape[0]
    weights = lambda module: sum(p.numel() for p in module.parameters() if p.ndim > 1)  # noqa: E731
    pairs = P**2 / 2 + sum(R * (P + R / 2) for R in lengths)                    # of query and key
    merged = patches // visual.spatial_merge_size**2
    return (2 * weights(language.layers) * (P + T) + 4 * c.num_attention_heads * c.head_dim * c.num_hidden_layers * pairs
            + 2 * c.hidden_size * c.vocab_size * T + 2 * (weights(visual.blocks) + weights(visual.patch_embed)) * patches
            + 2 * (weights(visual.merger) + weights(visual.deepstack_merger_list)) * merged
            + sum(4 * n**2 * model.config.vision_config.hidden_size * len(visual.blocks) for n in prompt.grids.prod(1).tolist()))


class Shown:
    """An example in memory: noise with far more pixels than the budget, so that every crop fills it too."""

    def __init__(self, seed, side):
        import numpy
        from PIL import Image
        self.question, self.answer, self.answer_form = "Which way do the stripes of the red circle run?", "down", "free_form"
        self.image = Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (side, side * 3 // 2, 3), dtype=numpy.uint8))

    def load_image(self):
        return self.image


def row_phases(args):
    """Both phases at the paper's budgets. Lengths are forced; three boxes a list, half of a group's lists distinct."""
    small = DEVICE == "cpu"
    s = p2r_min.Settings(questions=args.questions, **dict(
        group=4, max_pixels=64 * 1024, perceive_tokens=6, reason_tokens=8, rollout_batch=args.questions) if small else {})
    with tempfile.TemporaryDirectory() as folder:
        config = codec_for(Path(folder), args.config(), s.max_pixels)
        model = build(config)
        codec = rollout.Codec(Path(folder), model, s.max_pixels)
    codec.stop_ids, codec.dtype = torch.tensor([], dtype=torch.long), model.dtype  # no stop ids: every response has full length
    parameters = sum(p.numel() for p in model.parameters())
    assert small or parameters == 2_127_532_032, parameters
    frozen, optimizer = copy.deepcopy(model).requires_grad_(False), grpo.MasterAdamW(model, 1e-6)
    count = iter(range(10**9))

    def read_boxes(text):
        at = 20 * (next(count) % s.group // 2)
        return Parsed([Box(10 + at, 10, 280 + at, 300, "a"), Box(10 + at, 400, 280 + at, 690, "b"), Box(500, 10 + at, 800, 300 + at, "c")],
                      True, 0)

    play = p2r_min.Players(model, frozen, codec, read_boxes, lambda pairs: [evaluation.Score(float(next(count) % 2), True) for _ in pairs], {})
    batch = [Shown(seed, 512 if small else 4000) for seed in range(s.questions)]
    peak_flops, bandwidth = next((v for k, v in CARDS.items() if not small and k in torch.cuda.get_device_name()), (None, None))
    c = config.text_config
    kv = 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * (2 if small else 1)       # bytes a token
    head = sum(p.numel() for p in model.model.language_model.parameters()) * (4 if small else 2)  # bytes read at every step
    for phase in tqdm(p2r_min.SCHEDULES["alternate"], "phases"):
        collect = p2r_min.PHASES[phase]
        R = s.perceive_tokens if phase == "perception" else s.reason_tokens
        generator = torch.Generator(DEVICE).manual_seed(0)
        all_rollouts, _, rollouts = timed(lambda: collect(play, batch, s, generator))
        rollout_peak = peak_now()
        prompts = [g.prompt for g in rollouts.groups]
        updating, _, _ = timed(lambda: grpo.update_batch(
            model, frozen, optimizer, rollouts.groups, grpo.group_advantages(rollouts.rewards), banned=codec.banned, kl=s.kl,
            clip=s.clip, max_norm=s.max_grad_norm))
        update_peak = peak_now()
        preparing, _, _ = timed(lambda: list(rollout.perceive(model, codec, batch, group=s.group, max_tokens=1, batch=s.rollout_batch))
                                if phase == "perception" else list(rollout.reason(
                                    model, codec, [(e, play.fixed[e][1].boxes) for e in batch], group=s.group, max_tokens=1,
                                    batch=s.rollout_batch)))  # images, prefill and one token
        sampling = all_rollouts - rollouts.seconds_partner
        tokens = s.questions * s.group * R
        chunk = min(s.rollout_batch, s.questions)
        step_bytes = head + kv * chunk * (max(len(p.ids) for p in prompts) + s.group * R / 2)
        work = 4 * sum(forward_flops(model, g.prompt, [len(t.ids) for t in g.completions]) for g in rollouts.groups)  # 3 policy, 1 reference
        bound = chunk * s.group / (step_bytes / bandwidth) if bandwidth else None
        yield dict(row=phase, shape=[round(statistics.mean(len(p.ids) for p in prompts)), R, s.group], ours_s=all_rollouts + updating,
                   theirs_s=None, ratio=None, ours_gib=max(rollout_peak, update_peak), theirs_gib=None, max_logprob_diff=None,
                   parameters=parameters, questions=s.questions, rollout_batch=s.rollout_batch, partner_calls=rollouts.partner_calls,
                   rollout_gib=rollout_peak, update_gib=update_peak, estimate_gib=max(grpo.estimate_memory(model, s).values()),
                   rollout_s_per_question=sampling / s.questions, partner_s_per_question=rollouts.seconds_partner / s.questions,
                   update_s_per_question=updating / s.questions, prefill_s=preparing,
                   decode_tokens_per_s=tokens / (sampling - preparing) if sampling > preparing else None, decode_bound_tokens_per_s=bound,
                   update_tflop=work / 1e12, update_mfu=work / updating / peak_flops if peak_flops else None)


def peak_now():
    """Peak GiB since the last `timed` began, weights and all."""
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else memory("VmHWM") or 0.0


# ---------------------------------------------------------------------------------------------
# The table and the command line

ROWS = {"update": row_update, "rollout": row_rollout, "partner": row_partner, "evaluation": row_evaluation, "step": row_step,
        "scaling": row_scaling}
COLUMNS = {"row": 22, "shape": 18, "ours_s": 10, "theirs_s": 10, "ratio": 8, "ours_gib": 10, "theirs_gib": 11, "max_logprob_diff": 18}


def cell(value):
    if isinstance(value, float):
        return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:.4g}"
    return "-" if value is None else str(value)


def print_table(rows):
    print("\n" + "".join(f"{name:<{width}}" for name, width in COLUMNS.items()))
    for row in rows:
        if "failed" in row:
            print(f"{row['row']:<22}{row['failed']}")
            continue
        print("".join(f"{cell(row.get(name)):<{width}}" for name, width in COLUMNS.items()))
        rest = {k: v for k, v in row.items() if k not in COLUMNS}
        print(" " * 22 + ", ".join(f"{k} {cell(v)}" for k, v in rest.items()) if rest else "", end="\n" if rest else "")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", help=f"which rows, of {','.join(ROWS)},phases; default: all but phases; with --gpu: phases,update,rollout")
    parser.add_argument("--json", type=Path, help="file for the figures, written anew after every row")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each side")
    parser.add_argument("--warmup", type=int, default=1, help="runs of each side before those")
    parser.add_argument("--shape", action="append", metavar="P,R,G", help="of the rows update and rollout, instead of theirs; may be repeated")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the code itself in seconds")
    parser.add_argument("--gpu", action="store_true", help="the 2B model and the paper's budgets; without a GPU small sizes, same code")
    parser.add_argument("--questions", type=int, default=4, help="questions a phase of `phases`")
    parser.add_argument("--cpu-seconds", action="store_true", help="count this process's processor seconds: for a CPU that others use too")
    args = parser.parse_args(arguments)
    global clock
    clock = time.process_time if args.cpu_seconds and not args.gpu else time.perf_counter
    rows_of = ROWS | {"phases": row_phases}
    names = (args.rows or ("phases,update,rollout" if args.gpu else ",".join(ROWS))).split(",")
    if unknown := set(names) - set(rows_of):
        parser.error(f"there is no row {', '.join(sorted(unknown))}; choose from {', '.join(rows_of)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.config = full_config if args.gpu and DEVICE == "cuda" else small_config
    args.tiny |= args.gpu and DEVICE == "cpu"
    args.shapes = [tuple(map(int, shape.split(","))) for shape in args.shape or ()] or ([(100, 6, 3)] if args.tiny else SHAPES)
    print(f"{datetime.date.today()}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}")
    rows = []
    for name in names:
        try:
            for row in rows_of[name](args):
                rows.append(row)
                save(args.json, rows)
        except Exception as error:  # one failing row must not cost the others
            traceback.print_exc()
            rows.append({"row": name, "failed": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"})
            save(args.json, rows)
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    print_table(rows)
    return rows


def save(path, rows):
    if path:
        path.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
