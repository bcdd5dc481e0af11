"""Hours of the paper's run, 2 x 156 steps of the 2B model on one H100, modelled from single steps.

    python tests/hours.py                              # from the numbers below
    python tests/hours.py --mfu 0.35 --step-ms 14      # from those of another machine

Counted: prefill and updates as matrix products (bench.forward_flops) at a share of the card's peak;
decode steps, each as long as the slower of the computer, which launches kernels, and the GPU, which
reads weights and table. Not counted: loading, checkpoints, evaluation, waiting for images. The
machine's numbers are those of an H100 (assets/gpu.json, 2026-11-26); no whole run was made.
"""

import argparse
import heapq
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
import torch
from transformers import Qwen3VLForConditionalGeneration

import eval as evaluation
import p2r_min
from bench import CARDS, forward_flops, full_config
from p2r_min import Settings
from rollout import Prompt

PEAK, BANDWIDTH = CARDS["H100"]
PERCEIVER, REASONER = 1, 4         # images of a prompt: the whole one; that one and three crops
TEXT = {PERCEIVER: 132, REASONER: 300}  # text tokens of a prompt
IMAGE = 2048                            # visual tokens of an image that fills the paper's budget


@dataclass
class Numbers:
    """What the hours follow from."""

    # Of the machine, derived from the sections of gpu.json that are named
    mfu: float = 0.26              # share of the card's peak that prefill and update reach:
                                   # `phases`, reasoning, the recomputed forward counted
    step_ms: float = 23.0          # of the computer for the launches of a decode step, at least:
                                   # `phases`, two machines
    kernels_ms: float = 2.2        # of the GPU for the small kernels of a decode step: `decode`
    bandwidth: float = 0.48        # share of the card's bandwidth that attention reaches: `decode`,
                                   # 24 rows (12 x 8 rows: 0.3)
    update_ms: float = 680.0       # of the computer for the update by one group, at least:
                                   # `phases`, perception, two machines

    # Assumed
    offload_s: float = 5.0         # seconds that --offload adds to a step: gradients and weights
                                   # cross, and AdamW works through 60 GB of the computer's memory

    # Of the task, assumed
    perceiver_tokens: float = 80   # mean length of a box list; lengths are log-normal (sigma 0.4)
    reasoner_tokens: float = 250   # mean length of an answer (sigma 0.5)
    distinct: int = 450            # different evidences of 64 x 8 box lists, which the partner sees
    crop_tokens: int = IMAGE       # visual tokens of a crop; small ones are not scaled up to the
                                   # budget


def decode_steps(prompts, rows, G, mean, sigma, limit):
    """(decode steps of `prompts` prompts on a table of rows, tokens of their longest responses).
    A row is free when the longest of its G responses has ended. Mean of 20 trials."""
    rng = numpy.random.default_rng(0)
    lengths = rng.lognormal(numpy.log(mean) - sigma**2 / 2, sigma, (20, prompts, G))
    longest = lengths.clip(max=limit).max(axis=2)                                # (20, prompts)

    # A heap of the rows, by when each is free: the first that is takes the next prompt.
    steps = []
    for trial in longest:
        busy_until = [0] * rows
        for length in trial:
            heapq.heapreplace(busy_until, busy_until[0] + length)
        steps.append(max(busy_until))
    return numpy.mean(steps), longest.mean()


def cost(model, n, images, responses=0, R=0):
    """(P, FLOPs of a forward) of a prompt and responses of R tokens. The whole image has the
    paper's pixel budget; 2 x 2 patches are a visual token."""
    tokens = [IMAGE] + [n.crop_tokens] * (images - 1)
    P = sum(tokens) + TEXT[images]
    grids = torch.tensor([[1, 2, 2 * count] for count in tokens])
    pixels = torch.empty(4 * sum(tokens), 1536, device="meta")
    return P, forward_flops(model, Prompt(torch.zeros(P), None, pixels, grids), [R] * responses)


def sampling(model, n, prompts, rows, images, G, length):
    """Seconds until `prompts` prompts have G responses each."""
    P, flops = cost(model, n, images)
    steps, R = decode_steps(prompts, rows, G, *length)

    # The GPU reads the rows in use to their ends (the last prompts leave some rows free), 112 KiB
    # a column, and the language model's weights.
    c = model.config.text_config
    column = 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    weights = 2 * sum(p.numel() for p in model.model.language_model.parameters())
    gpu = (prompts * R / steps) * (P + G * R) * column / (n.bandwidth * BANDWIDTH)
    gpu += weights / (0.8 * BANDWIDTH) + n.kernels_ms / 1000

    # A step waits for the slower of the two.
    return prompts * flops / (n.mfu * PEAK) + steps * max(n.step_ms / 1000, gpu)


def updating(model, n, s, images, R):
    """Seconds of an update: forward, its recomputation, backward (2), the reference's forward."""
    flops = 5 * cost(model, n, images, s.group, R)[1]
    seconds = s.questions * max(flops / (n.mfu * PEAK), n.update_ms / 1000)
    return seconds + n.offload_s if s.offload else seconds


def hours(model, n, s):
    """(seconds of a perception step, of a reasoning step, hours of 2 x s.steps of them)"""
    boxes = (n.perceiver_tokens, 0.4, s.perceive_tokens)
    answer = (n.reasoner_tokens, 0.5, s.reason_tokens)

    # One role is sampled G times and trained; its partner is greedy, on distinct evidence only.
    perception = (
        sampling(model, n, s.questions, s.rollout_batch, PERCEIVER, s.group, boxes)
        + sampling(model, n, n.distinct, s.partner_batch, REASONER, 1, answer)
        + updating(model, n, s, PERCEIVER, n.perceiver_tokens))
    reasoning = (
        sampling(model, n, s.questions, s.partner_batch, PERCEIVER, 1, boxes)
        + sampling(model, n, s.questions, s.rollout_batch, REASONER, s.group, answer)
        + updating(model, n, s, REASONER, n.reasoner_tokens))
    return perception, reasoning, s.steps * (perception + reasoning) / 3600


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    evaluation.add_flags(parser, Numbers)
    numbers = Numbers(**vars(parser.parse_args(arguments)))

    # Without weights: only shapes are asked for.
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(full_config(), dtype=torch.bfloat16)

    print(f"{numbers}\n\nmodelled on an H100, rows of   seconds of a step with")
    print("sampler  partner              perception  reasoning   hours    GiB")
    for rows, partner, flag in ((8, 16, ""), (12, 24, ""), (16, 48, "--offload")):
        s = Settings(rollout_batch=rows, partner_batch=partner, offload=bool(flag))
        perception, reasoning, total = hours(model, numbers, s)
        with mock.patch.object(p2r_min, "STRIDE", 256):  # columns are rounded as on a GPU
            peaks = p2r_min.estimate_memory(model.config, model.num_parameters(), 2, s)
        print(f"{rows:7} {partner:8}  {flag:10} {perception:11.0f} "
              f"{reasoning:10.0f} {total:7.1f} {max(peaks.values()):6.1f}")


if __name__ == "__main__":
    main()
