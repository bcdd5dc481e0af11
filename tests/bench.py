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

Shapes are [P, R, G]: prompt tokens, response tokens, samples a group. GiB is what a run adds to what
was there before it (weights, optimizer). Values do not matter to speed, so all weights are random.
"""

import argparse
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
from crop import parse_boxes

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


def build(config, dtype=None):
    """A random model on DEVICE, checkpointing as in training: float32 on a CPU, bf16 on a GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype or (torch.float32 if DEVICE == "cpu" else torch.bfloat16))
    try:
        with torch.device(DEVICE):
            model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(torch.float32)
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


def now():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


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
    result = run()
    seconds = now() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else memory("VmHWM")
    return seconds, None if peak is None else max(0.0, peak - before), result


def versus(name, ours, theirs, repeats, warmup=1):
    """Runs the two in turn. -> (a row's figures, our last result, their last result)."""
    times, peaks, results = ([], []), ([], []), [None, None]
    for i in tqdm(range(warmup + repeats), name, leave=False):
        for side, run in enumerate((ours, theirs)):
            seconds, gib, results[side] = timed(run)
            if i >= warmup:
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

        figures, (mine, my_grads), (other, their_grads) = versus(f"update {P} {R} {G}", ours, theirs, args.repeats)
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
    for P, R, G in args.shapes[:1] if args.tiny else args.shapes[1:2]:
        prompt = make_prompt(model, P)

        def ours():
            generator = torch.Generator(DEVICE).manual_seed(0)
            return next(iter(rollout.sample(model, codec, [prompt], group=G, max_tokens=R, batch=1, generator=generator)))

        figures, group, ids = versus(f"rollout {P} {R} {G}", ours, lambda: generate(model, [prompt], R, num_return_sequences=G),
                                     args.repeats)
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
    play = p2r_min.Players(model, model, codec, parse_boxes, evaluation.score, fixed={})
    distinct, lengths = p2r_min.evidence, []
    partner = {}

    def step(key):
        def run():
            p2r_min.evidence = key
            try:
                done = p2r_min.perception(play, examples[:s.questions], s, torch.Generator(DEVICE).manual_seed(0))
            finally:
                p2r_min.evidence = distinct
            lengths[:] = [(len(g.prompt.ids), len(c.ids)) for g in done.groups for c in g.completions]
            partner.setdefault(key, []).append(done.seconds_partner)
            return done
        return run

    every = lambda q, parsed: (q, id(parsed))  # noqa: E731: each rollout is evidence of its own
    figures, ours, theirs = versus("partner", step(distinct), step(every), args.repeats)
    mine, other = (statistics.median(partner[key][1:]) for key in (distinct, every))  # the partner's part of the step
    assert torch.equal(ours.rewards, theirs.rewards), "asking once must not change a reward"
    yield dict(row="partner", shape=mean_shape(lengths, s.group), **figures | dict(ours_s=mine, theirs_s=other, ratio=other / mine),
               max_logprob_diff=None, our_calls=ours.partner_calls, their_calls=theirs.partner_calls)


def mean_shape(lengths, G):
    return [round(statistics.mean(column)) for column in zip(*lengths)] + [G]


def row_evaluation(args):
    s, examples, model, codec = toy_setting(args)
    examples = examples[:8 if args.tiny else 64]
    stops, batch = codec.stop_ids.tolist(), s.rollout_batch * s.group

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

    figures, mine, other = versus("evaluation", ours, theirs, args.repeats)
    yield dict(row="evaluation", shape=mean_shape(lengths, 1), **figures, max_logprob_diff=None,
               same_answers=sum(c.text == text for c, text in zip(mine, other)) / len(other),
               questions_per_s=len(examples) / figures["ours_s"], their_questions_per_s=len(examples) / figures["theirs_s"])


# ---------------------------------------------------------------------------------------------
# The table and the command line

ROWS = {"update": row_update, "rollout": row_rollout, "partner": row_partner, "evaluation": row_evaluation}
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
    parser.add_argument("--rows", default=",".join(ROWS), help=f"which rows, of {','.join(ROWS)}")
    parser.add_argument("--json", type=Path, help="file for the figures; written anew after every row")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each side, after one to warm up")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the code itself in seconds")
    args = parser.parse_args(arguments)
    names = args.rows.split(",")
    if unknown := set(names) - set(ROWS):
        parser.error(f"there is no row {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.config = small_config
    args.shapes = [(100, 6, 3)] if args.tiny else SHAPES
    print(f"{datetime.date.today()}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}")
    rows = []
    for name in names:
        try:
            for row in ROWS[name](args):
                rows.append(row)
                save(args.json, rows)
        except Exception as error:  # one failing row must not cost the others
            traceback.print_exc()
            rows.append({"row": name, "failed": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"})
            save(args.json, rows)
    print_table(rows)
    return rows


def save(path, rows):
    if path:
        path.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
