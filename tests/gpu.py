"""What only a GPU can tell: is it right there, how fast is it, in how much memory.

    python tests/gpu.py --json gpu.json            # all sections, some ten minutes on an H100
    python tests/gpu.py --only decode,phases       # some of them
    python tests/gpu.py --tiny                     # small sizes: tries the script itself on a CPU

    check      a packed row and the sampler against plain forwards, --offload against none
    toy        `python p2r_min.py` as a stranger types it
    resume     the toy in two parts against the toy at once
    full       the 2B model by the command line: a step of each phase, from a model folder to a
               checkpoint and a model folder again (48 GB of disk)
    kernels    the patch embedding as a convolution and as a linear layer; attention by the flash
               kernel and by cuDNN
    phases     both phases with their updates at the paper's budgets (bench.row_phases)
    peak       an update of eight responses of the longest length, and of typical ones
    rows       tests/bench.py's rows `update` and `rollout`
    offload    AdamW on the GPU and in the computer's memory
    decode     a step of the sampler: as it is, with cuDNN's attention, as a captured graph

Weights are random, as speed and memory do not depend on them. A section that fails costs itself
only. The file is written after every row; sections that it has from before stay. assets/gpu.json
was put together from three calls of earlier forms of this script, for want of time on the GPU;
tests/README.md explains it, and tests/hours.py makes the hours of a run of it.
"""

import argparse
import copy
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as in p2r_min.py

import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import bench
import grpo
import p2r_min
import rollout
import toy
from bench import (DEVICE, build, endless, full_config, make_prompt, small_config, text_ids, timed,
                   wait)

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = DEVICE == "cuda"


def forget():
    """Give freed memory back to the card."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def milliseconds(run, repeats=5):
    """Median of `repeats` calls after two others, each waited for."""
    times = []
    for _ in range(2 + repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


# ---------------------------------------------------------------------------------------------
# check: the same numbers as plain forwards


def section_check(args):
    """Float32 shows whether it is right, bf16 how far its rounding reaches."""
    P, R, G = (200, 12, 4) if args.tiny else (2180, 60, 8)
    generator = torch.Generator().manual_seed(0)
    texts = [text_ids(R, generator) for _ in range(G)]
    weights = torch.randn(G * R, generator=generator).to(DEVICE)

    exact = None
    for dtype in (torch.float32, torch.bfloat16):
        model = build(small_config(), dtype)
        banned, name = endless(model).banned, str(dtype)[6:]

        # Log-probs and gradients of a packed row, and of a padded batch of G rows.
        prompt = make_prompt(model, P)
        model.train()
        row = grpo.pack(prompt, texts, DEVICE)
        packed = bench.backward(model, grpo.response_logprobs(model, row, banned)[0], weights)
        padded = bench.backward(model, bench.padded_logprobs(model, prompt, texts, banned), weights)
        exact = exact or padded
        yield {"dtype": name, "packed_from_padded": apart(packed, padded),
               "packed_from_float32": apart(packed, exact),
               "padded_from_float32": apart(padded, exact)}

        # Greedy sampling and the library's own. (In bf16 ties may fall either way, and all that
        # follows is different then.)
        prompts = [make_prompt(model, length, seed) for seed, length in enumerate((P, P // 2, 150))]
        codec, same = endless(model), 0
        ours = list(rollout.sample(model, codec, prompts, greedy=True, max_tokens=R, rows=2))
        for prompt, group in zip(prompts, ours):
            theirs = bench.generate(model, prompt, R, do_sample=False, temperature=None,
                                    top_k=None, top_p=None, suppress_tokens=banned.tolist())
            same += (theirs[0].cpu() == group.completions[0].ids).sum().item()

        # Log-probs when sampled and when trained.
        groups = list(rollout.sample(model, codec, prompts, group=G, max_tokens=R, rows=2,
                                     generator=torch.Generator(DEVICE).manual_seed(0)))
        gaps = []
        for group in groups:
            row = grpo.pack(group.prompt, [c.ids for c in group.completions], DEVICE)
            with torch.no_grad():
                logps, _ = grpo.response_logprobs(model, row, banned)
            sampled = torch.cat([c.logps for c in group.completions])
            gaps.append((sampled - logps.cpu()).abs())
        yield {"dtype": name, "greedy_as_generate": f"{same} of {3 * R}",
               "sampler_gap": torch.cat(gaps).mean().item()}

    # An update of the bf16 model with AdamW on the GPU, and in the computer's memory.
    for group in groups:
        group.advantages = grpo.group_advantages(torch.arange(float(G)) % 3)
    masters = []
    for offload in (False, True):
        policy = copy.deepcopy(model)
        optimizer = grpo.MasterAdamW(policy, 1e-4, offload=offload)
        grpo.update_batch(policy, model.eval(), optimizer, groups, banned=banned, kl=0.01,
                          clip=0.2, max_norm=1.0)
        masters.append(torch.cat([master.cpu().flatten() for master in optimizer.masters]))
    before = torch.cat([p.detach().float().cpu().flatten() for p in model.parameters()])
    yield {"update_moved_by": (masters[0] - before).abs().mean().item(),
           "offload_differs_by": (masters[0] - masters[1]).abs().mean().item()}


def apart(mine, other):
    """Two results of bench.backward: largest difference of a log-prob, and the norm of the
    gradients' difference relative to their norm."""
    squares = sum(((a - b)**2).sum() for a, b in zip(mine[1], other[1]))
    norm = sum((b**2).sum() for b in other[1])
    return {"logprob": (mine[0] - other[0]).abs().max().item(),
            "gradient": (squares / norm).sqrt().item()}


# ---------------------------------------------------------------------------------------------
# toy, resume, full: the program


def program(folder, *arguments):
    """p2r_min.py with these arguments -> (seconds, what it printed). Raises RuntimeError if it
    fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, ROOT / "p2r_min.py", *map(str, arguments)], cwd=folder,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout[-3000:])
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stdout[-300:]}")
    return time.perf_counter() - start, done.stdout


def lines_of(file):
    return [json.loads(line) for line in file.open()]


def section_toy(args):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        seconds, text = program(folder, "--out", run, *(["--steps", "2"] if args.tiny else []))
        rows = lines_of(run / "metrics.jsonl")
        mean = {name: statistics.mean(row[name] for row in rows) for name in
                ("sampler_gap", "seconds_rollout", "seconds_partner", "seconds_update")}
        yield {"seconds": seconds, "warnings": text.lower().count("warning"), **mean,
               "accuracy": [{key: row[key] for key in ("step", "p2r", "hit", "plain", "oracle")}
                            for row in lines_of(run / "accuracy.jsonl")]}


def section_resume(args):
    timing = ("seconds_rollout", "seconds_partner", "seconds_update", "peak_gib")

    def steps_of_run(run):
        return [{key: value for key, value in row.items() if key not in timing}
                for row in lines_of(run / "metrics.jsonl")]

    # (A GPU need not sum in the same order twice, so two whole runs say what to expect.)
    with tempfile.TemporaryDirectory() as folder:
        folder, common = Path(folder), ("--eval-data", "", "--steps", 2, "--sample-every", 0)
        program(folder, *common, "--iterations", 2, "--out", folder / "whole")
        program(folder, *common, "--iterations", 2, "--out", folder / "again")
        program(folder, *common, "--out", folder / "parts")
        program(folder, "--resume", folder / "parts", "--iterations", 2)
        whole, again, parts = map(steps_of_run, map(folder.joinpath, ("whole", "again", "parts")))
        yield {"again_equal": [a == b for a, b in zip(whole, again)],
               "parts_equal": [a == b for a, b in zip(whole, parts)],
               "last_step": {key: (whole[-1][key], again[-1][key], parts[-1][key])
                             for key in ("reward_mean", "kl", "entropy", "grad_norm")}}


def section_full(args):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model_folder = folder / "model"
        model_folder.mkdir()
        config = args.config()
        bench.write_codec(model_folder, config, 512 * 512)
        build(config).save_pretrained(model_folder)
        forget()
        seconds, text = program(
            folder, "--data", toy.defaults()["data"], "--model", model_folder, "--questions", 2,
            "--judge", "none", "--perceive-tokens", 64, "--reason-tokens", 64, "--save-every", 0,
            "--sample-every", 0, "--steps", 1, "--out", folder / "run")
        sizes = {str(path.relative_to(folder)): path.stat().st_size / 2**30
                 for path in folder.rglob("*.safetensors")}
        yield {"seconds": seconds, "gib_on_disk": sizes,
               "steps": lines_of(folder / "run" / "metrics.jsonl"),
               "said": [line for line in text.splitlines() if line.startswith("memory")]}


# ---------------------------------------------------------------------------------------------
# kernels, decode: single calls


@torch.no_grad()
def section_kernels(args):
    """One image at the paper's budget: 8192 patches."""
    model = args.model()
    layer, vision = model.model.visual.patch_embed, model.config.vision_config
    n = 64 if args.tiny else 8192
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.randn(n, patch, device=DEVICE, dtype=model.dtype)

    def convolution():
        return rollout.Qwen3VLVisionPatchEmbed.forward(layer, patches)
    yield {"patch_embedding": n, "linear_ms": milliseconds(lambda: layer(patches)),
           "convolution_ms": milliseconds(convolution),
           "differ_by": (layer(patches) - convolution()).abs().max().item()}

    # The vision tower's attention and a prompt's in the language model. cuDNN plans for every new
    # length, forward and backward: the first call says how long that takes. (The first one of a
    # kind loads kernels, too.)
    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for place, heads, kv_heads, size in (("vision", 16, 16, 64), ("prompt", 16, 8, 128)):
        for kernel, backend in kinds.items() if ON_GPU else ():
            for length in (8192, 8060, 8000, 7996, 2180):
                shapes = [(1, length, h, size) for h in (heads, kv_heads, kv_heads)]
                yield {"attention": place, "kernel": kernel, "length": length,
                       **attention_times(backend, shapes, causal=place == "prompt")}


@torch.enable_grad()
def attention_times(backend, shapes, causal):
    """Seconds of the first call, then milliseconds forward, and with the backward pass; bf16."""
    inputs = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
              .requires_grad_() for shape in shapes]

    def forward():
        return F.scaled_dot_product_attention(
            *inputs, is_causal=causal, enable_gqa=shapes[0] != shapes[1])

    def both():
        output = forward()
        torch.autograd.grad(output, inputs, torch.ones_like(output))

    with sdpa_kernel(backend):
        start = time.perf_counter()
        both()
        wait()
        return {"first_call_s": time.perf_counter() - start, "forward_ms": milliseconds(forward),
                "with_backward_ms": milliseconds(both)}


@torch.no_grad()
def section_decode(args):
    shapes = [(12, 8, 2180, 80), (12, 8, 8492, 250), (24, 1, 8492, 250), (48, 1, 8492, 250)]
    if args.tiny:
        shapes = [(3, 2, 100, 5)]
    model = args.model()

    # Bytes that a step has to read: the weights, and the prompt's and responses' keys and values.
    c = model.config.text_config
    column = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize
    weights = sum(p.numel() for p in model.model.language_model.parameters()) * model.dtype.itemsize

    # The profile comes last, as all that follows one is slower by its hooks.
    for profiled in (False, True):
        for n, G, P, t in shapes:
            table, active = filled_table(model, n, G, P, t)
            row = {"rows": n, "G": G, "P": P, "t": t}
            if profiled:
                row |= busy(lambda: rollout.decode_step(model, table, active))
            else:
                size = weights + n * (P + G * t) * column
                row |= {"read_gb": size / 1e9, **step_times(model, table, active)}
                row["bound_ms"] = 1000 * size / args.card[1] if args.card[1] else None
            yield row
            del table, active
            forget()


def filled_table(model, n, G, P, t, room=1024):
    """(table, its n rows in use): the same prompt of P tokens in each, t tokens of G responses."""
    prompt, active = make_prompt(model, P), []
    for order in range(n):
        row = rollout.InProgress(order, prompt, G)
        row.t, row.newest = t, [100 + g for g in range(G)]
        active.append(row)
    table = rollout.Table()
    table.reserve(n, P + G * room)
    rollout.prefill(model, table, 0, active[:1])
    for layer in table.layers:
        for stored in layer:
            stored[0, P:] = torch.randn_like(stored[0, P:])
    for place in range(1, n):
        table.move(0, place)
    return table, active


def step_times(model, table, active):
    """Milliseconds of a decode step; until its last launch; with cuDNN, its plans made before; as a
    graph."""
    step, launched = steps_of(model, table, active)
    found = {"step_ms": step, "last_launch_ms": launched}
    if not ON_GPU:
        return found
    torch.backends.cuda.enable_cudnn_sdp(True)
    steps_of(model, table, active)
    found["with_cudnn_ms"], _ = steps_of(model, table, active)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return found | graph_times(model, table, active)


def steps_of(model, table, active, count=50):
    """`count` decode steps -> (milliseconds of one, milliseconds until its last launch). The rows
    are again at the same t afterwards."""
    t = active[0].t
    for _ in range(3):
        rollout.decode_step(model, table, active)
    wait()
    launching, start = 0.0, time.perf_counter()
    for _ in range(count):
        begun = time.perf_counter()
        logits = rollout.decode_step(model, table, active)
        launching += time.perf_counter() - begun

        # As in sampling, the drawn ids go to the computer, which waits for them.
        ids = logits.float().log_softmax(-1).argmax(-1).tolist()
        for row, row_ids in zip(active, ids):
            row.t, row.newest = row.t + 1, row_ids
    seconds = time.perf_counter() - start
    for row in active:
        row.t = t
    return 1000 * seconds / count, 1000 * launching / count


def graph_times(model, table, active):
    """The model's part of a decode step, without the making of its inputs and the drawing, as a
    CUDA graph for the shapes of now."""
    # The inputs that decode_step makes are kept: the graph reads them where they lie.
    inputs = {}

    class Keep:
        device, dtype, config = model.device, model.dtype, model.config

        def __call__(self, **given):
            inputs.update(given)
            return SimpleNamespace(logits=None)
    rollout.decode_step(Keep(), table, active)

    eager = model(**inputs).logits
    wait()
    graph, start = torch.cuda.CUDAGraph(), time.perf_counter()
    with torch.cuda.graph(graph):
        logits = model(**inputs).logits
    wait()
    captured = 1000 * (time.perf_counter() - start)
    graph.replay()
    wait()
    return {"graph_ms": milliseconds(graph.replay, 20), "graph_capture_ms": captured,
            "graph_differs_by": (logits - eager).abs().max().item()}


def busy(run, calls=3):
    """What the GPU does during `run`: milliseconds, kernels, and the longest of them, a call."""
    if not ON_GPU:
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            run()
        wait()
    kernels = [event for event in seen.key_averages() if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    return {"gpu_ms": sum(event.self_device_time_total for event in kernels) / 1000 / calls,
            "kernels": sum(event.count for event in kernels) / calls,
            "longest": [(event.key[:60], event.count / calls,
                         event.self_device_time_total / 1000 / calls) for event in kernels[:8]]}


# ---------------------------------------------------------------------------------------------
# phases, peak, rows, offload: at full size


def section_phases(args):
    yield from bench.row_phases(SimpleNamespace(
        config=args.config, questions=4 if args.tiny else 12))


def section_peak(args):
    """As the estimate has it: a long prompt, every response as long as it may be, and the sum of
    earlier groups' gradients. Then typical groups of both phases. (A step of AdamW is in each.)"""
    s, model = p2r_min.Settings(), args.model()
    frozen = copy.deepcopy(model).requires_grad_(False)
    optimizer = grpo.MasterAdamW(model, 1e-6)
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 20)] if args.tiny else [(8492, s.reason_tokens), (2180, 80), (8492, 250)]
    for P, R in shapes:
        responses = [text_ids(R, generator) for _ in range(s.group)]
        completions = [rollout.Completion(ids, torch.zeros(R), True, "") for ids in responses]
        group = rollout.Group(make_prompt(model, P), completions)
        group.advantages = grpo.group_advantages(torch.arange(float(s.group)) % 2)

        def update():
            grpo.update_batch(model, frozen, optimizer, [group], banned=endless(model).banned,
                              kl=0.01, clip=0.2, max_norm=1.0)
        update()
        optimizer.sums = [torch.zeros_like(p, dtype=torch.float32) for p in optimizer.params]
        seconds, _, _ = timed(update)
        work = 4 * bench.forward_flops(model, group.prompt, [R] * s.group)
        estimate = p2r_min.estimate_memory(
            model.config, model.num_parameters(), model.dtype.itemsize, s)["updating"]
        yield {"shape": [P, R, s.group], "seconds": seconds, "update_tflop": work / 1e12,
               "mfu": work / seconds / args.card[0] if args.card[0] else None,
               "peak_gib": bench.peak(), "estimate_gib": estimate}


def section_rows(args):
    shapes = [(100, 6, 3)] if args.tiny else [(2180, 80, 8), (8300, 250, 8)]
    for kind, repeats in ((bench.row_update, 2), (bench.row_rollout, 1)):
        yield from kind(SimpleNamespace(config=args.config, shapes=shapes, warmup=1,
                                        repeats=repeats))


def section_offload(args):
    """`MasterAdamW.step` alone. The first one makes the moments."""
    model = args.model()
    for offload in (False, True):
        making, _, optimizer = timed(lambda: grpo.MasterAdamW(model, 1e-6, offload=offload))
        yield {"offload": offload, "making_s": making}
        for step in range(3):
            optimizer.sums = [torch.full_like(p, 1e-3, dtype=torch.float32)
                              for p in optimizer.params]
            seconds, _, _ = timed(lambda: optimizer.step(1.0))
            yield {"offload": offload, "step": step, "seconds": seconds}
        del optimizer
        forget()


# ---------------------------------------------------------------------------------------------

SECTIONS = {"check": section_check, "toy": section_toy, "resume": section_resume,
            "full": section_full, "kernels": section_kernels, "phases": section_phases,
            "peak": section_peak, "rows": section_rows, "offload": section_offload,
            "decode": section_decode}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    args = parser.parse_args(arguments)
    unknown = set(args.only.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; choose from {', '.join(SECTIONS)}")

    # What sections ask for: the model, and the card's FLOP/s and bytes/s.
    args.config = small_config if args.tiny else full_config
    args.model = lambda: build(args.config())
    name = torch.cuda.get_device_name() if ON_GPU else "CPU"
    args.card = next((speeds for card, speeds in bench.CARDS.items() if card in name), (None, None))

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(args.json.read_text()) if args.json.exists() else {}
    report |= {"date": str(datetime.date.today()), "device": name, "torch": torch.__version__,
               "transformers": transformers.__version__}

    def note(section, row):
        report[section].append(row)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(section, json.dumps(row), flush=True)

    for section in args.only.split(","):
        start, report[section] = time.perf_counter(), []
        try:
            for row in SECTIONS[section](args):
                note(section, row)
        except Exception as error:
            traceback.print_exc()
            told = " ".join(str(error).split())[:300]
            note(section, {"failed": f"{type(error).__name__}: {told}"})
        note(section, {"section_seconds": time.perf_counter() - start})
        forget()


if __name__ == "__main__":
    main()
