"""PRA-GRPO for Perceive-to-Reason, on one GPU, in plain PyTorch.

    python p2r_min.py                                        # a tiny world, on a laptop's CPU
    python p2r_min.py --model Qwen/Qwen3-VL-2B-Instruct      # the paper's data, from the hub

One vision-language model plays two roles. As *Perceiver* it looks at the whole image and answers
with boxes around the evidence. As *Reasoner* it sees the boxes drawn and the crops enlarged, and
answers the question. Training knows only whether the final answer is right. It alternates two
phases; in each, one role is sampled and trained with GRPO while a frozen copy of the model plays
the other role:

    for every phase of the schedule (the paper's: perception, then reasoning):
        frozen <- copy of the policy            # the other role, and the reference of the KL
        for every step of the phase:
            perception: policy writes G box lists; frozen Reasoner answers from each
            reasoning:  frozen Perceiver writes one box list; policy writes G answers
            reward = is the final answer right? advantage = (reward - mean) / std of its group
            one GRPO update of the policy, on the tokens it sampled:
            loss = - min(ratio x advantage, clipped ratio x advantage) + 0.01 KL(policy | frozen),
            a mean over all of the tokens of the step

Read in this order: p2r_min.py, rollout.py, crop.py, grpo.py, eval.py, toy.py. In every file the
method comes first; what follows a line "skip on a first reading" can wait.

Paper: arXiv 2607.01191. Where we depart from it, or from the authors' code, and why: README.md.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

# On a GPU sampling and updating take turns with tensors of other sizes. Segments that can grow keep
# the holes between them from adding up. (PyTorch reads this when it is imported.)
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

import eval as evaluation
import grpo
import toy
from crop import MAX_CROPS, WHOLE, picture, violation
from eval import mean
from rollout import (PREFILL, REGIONS, STRIDE, TEXT_TOKENS, Completion, InputError, NotANumber,
                     find, fitting, load, need, out_of_memory, perceive, progress, reason)

# ---------------------------------------------------------------------------------------------
# Settings


# A schedule's phases, --steps steps each. `alternate` is the paper's; the others are for comparing
# with it. `think` has one phase only, as the authors train their baseline in one go: for as many
# updates as the others it needs twice the --steps.
SCHEDULES = {
    "alternate": ("perception", "reasoning"),
    "joint": ("joint", "joint"),                # every update trains both roles
    "perceiver": ("perception", "perception"),  # only this role is ever trained
    "reasoner": ("reasoning", "reasoning"),
    "think": ("thinking",),                     # the authors' baseline: no roles, the plain image
}


@dataclass
class Settings:
    """Everything that can be chosen; the command line is made from it, its help from the comments.
    Defaults are the paper's, except for the departures that README.md lists."""

    # What is trained on what
    model: str = ""                   # Qwen3-VL: a hub id or a folder; without it the embedded toy
    data: str = "hongxingli/P2R-10k"  # training questions: a file, folder or hub id
    eval_data: str = ""               # held-out questions; without them accuracy is not measured
    images: str = ""                  # where relative image paths start; default: beside the data
    skip_bad: bool = False            # skip and count bad rows and images instead of stopping
    out: str = ""                     # run folder; default: the first free runs/NAME-1, -2, ...

    # The schedule
    schedule: str = "alternate"       # alternate (the paper), joint, perceiver, reasoner, think
    iterations: int = 1               # times that the schedule's phases are run
    steps: int = 156                  # steps of a phase
    questions: int = 64               # questions of a step (Q)
    eval_every: int = 0               # steps between measurements; 0: only before and after
    save_every: int = 10              # steps between checkpoints; 0: only at the end
    sample_every: int = 10            # steps between sample pictures; 0: none
    seed: int = 0                     # of the order of the data and of the sampler

    # The algorithm
    group: int = 8                    # samples of a question (G)
    lr: float = 1e-6                  # learning rate, constant
    kl: float = 0.01                  # coefficient of the KL to the frozen copy; 0: none
    clip: float = 0.2                 # the ratio is clipped to 1 +- this
    updates: int = 1                  # optimizer steps on each batch; with 1 the clip never acts
    weight_decay: float = 0.01        # of AdamW; its betas are 0.9 and 0.999
    max_grad_norm: float = 1.0        # the gradient is scaled down to this norm
    evidence: str = "both"            # what the Reasoner sees: both, annotated, crops or none
    judge: str = "self"               # who decides on free-form answers in other words than the
                                      # truth: self (the frozen copy; only in training), none, or
                                      # a model (in training, and where --eval-data is measured)

    # Limits and memory
    max_pixels: int = 2_097_152       # pixel budget of every image the model sees, crops too
    perceive_tokens: int = 1024       # longest Perceiver response
    reason_tokens: int = 2048         # longest Reasoner response
    rollout_batch: int = 12           # questions sampled together, G responses each
    partner_batch: int = 24           # prompts that the frozen copy, or evaluation, takes together
    checkpointing: bool = True        # recompute activations in the backward pass: slower, smaller
    offload: bool = False             # float32 weights and Adam's moments in the computer's memory

    @property
    def total(self):
        """Steps of the whole run."""
        return self.iterations * len(SCHEDULES[self.schedule]) * self.steps

    def phase_of(self, step):
        """The phase of a step, 0 .. total - 1."""
        phases = SCHEDULES[self.schedule]
        return phases[step // self.steps % len(phases)]

    def measures_at(self, step):
        """Is accuracy measured after this many steps?"""
        due = self.eval_every and step % self.eval_every == 0
        return bool(self.eval_data and (due or step in (0, self.total)))


# ---------------------------------------------------------------------------------------------
# The phases: from a step's questions to groups and advantages


@dataclass
class Players:
    """Who plays. `frozen` is the policy as it was when the phase began: it plays the other role, as
    the *partner* of the policy, and is the reference of the KL."""
    policy: torch.nn.Module
    frozen: torch.nn.Module
    codec: object                     # rollout.Codec: text and images <-> tensors, for both
    judge: object                     # "self", None or an eval.Judge

    def judge_of_training(self):
        """Who decides whether other words mean the same. "self" is the frozen copy, also of its own
        answers; the policy that is being trained never judges."""
        if self.judge == "self":
            return evaluation.Judge(self.frozen, self.codec.tokenizer)
        return self.judge


@dataclass
class Rollout:
    """One sample on its way from the question to the reward."""
    example: object                   # eval.Example: the question, its image and its answer
    sampled: Completion               # what the policy wrote, and learns from: it is `perceived` in
                                      # the perception phase, `answer` in the reasoning phase
    perceived: Completion = None      # what the Perceiver wrote; None: nobody perceived
    void: str = None                  # "label" or "overlap": the rule that its boxes break, if any
    answer: Completion = None         # what the Reasoner wrote; None: it was not asked
    score: evaluation.Score = None
    reward: float = 0.0

    @property
    def boxes(self):
        return self.perceived.parsed.boxes if self.perceived else []


@dataclass
class Experience:
    """What a phase hands to the update, and to those who look on. (A phase of your own may leave
    groups out, but not all of them: a mean over no token is no number.)"""
    groups: list                      # of rollout.Group, each with its rollouts and advantages
    partner_calls: int = 0            # prompts that the partner answered (a judge's not counted)
    partner_seconds: float = 0.0

    @property
    def rollouts(self):
        return [rollout for group in self.groups for rollout in group.rollouts]

    def __add__(self, other):
        calls = self.partner_calls + other.partner_calls
        seconds = self.partner_seconds + other.partner_seconds
        return Experience(self.groups + other.groups, calls, seconds)


def perception(players, questions, s, generator):
    """Train the Perceiver: the policy writes box lists, the frozen copy answers from each."""
    # 1. The policy perceives, G times for each question. Every sample is one rollout.
    groups = list(perceive(
        players.policy, players.codec, progress(questions, "sampling boxes"), group=s.group,
        max_tokens=s.perceive_tokens, rows=s.rollout_batch, generator=generator))
    rollouts = []
    for example, group in zip(questions, groups):
        group.rollouts = [Rollout(example, sampled=c, perceived=c) for c in group.completions]
        rollouts += group.rollouts

    # 2. A list of boxes is void if two of them overlap (IoU > 0.5), or if a label is missing or
    #    copied from the prompt's example: it earns 0, and the Reasoner is not asked. This is the
    #    paper's only rule on boxes. Text that cannot be parsed is not void, but read as no boxes.
    for rollout in rollouts:
        rollout.void = violation(rollout.boxes)

    # 3. The frozen copy answers. It is greedy, so equal evidence gets equal answers: each distinct
    #    list of boxes is asked once.
    cases = {}
    for rollout in rollouts:
        if not rollout.void:
            cases[evidence_of(rollout)] = (rollout.example, rollout.boxes)

    started = time.perf_counter()
    answers = [group.completions[0] for group in reason(
        players.frozen, players.codec, progress(cases.values(), "frozen Reasoner"), s.evidence,
        greedy=True, max_tokens=s.reason_tokens, rows=s.partner_batch)]
    seconds = time.perf_counter() - started

    answer_to = dict(zip(cases, answers))
    for rollout in rollouts:
        if not rollout.void:
            rollout.answer = answer_to[evidence_of(rollout)]

    # 4. The boxes earn the answer's reward. If the frozen Reasoner has forgotten the <answer> tags,
    #    all after its <think>..</think> is read (whole_text): the Perceiver must not pay for it.
    pay(rollouts, players.judge_of_training(), whole_text=True)
    set_advantages(groups)
    return Experience(groups, len(cases), seconds)


def evidence_of(rollout):
    """What a greedy Reasoner's answer depends on: the question and the boxes, in their order. (Not
    their labels, which never reach it.)"""
    return id(rollout.example), tuple(box[:4] for box in rollout.boxes)


def reasoning(players, questions, s, generator):
    """Train the Reasoner: the frozen copy writes one box list, the policy answers G times from it.
    """
    # 1. The frozen copy perceives, greedily: one box list for each question.
    started = time.perf_counter()
    perceived = [group.completions[0] for group in perceive(
        players.frozen, players.codec, progress(questions, "frozen Perceiver"),
        greedy=True, max_tokens=s.perceive_tokens, rows=s.partner_batch)]
    seconds = time.perf_counter() - started

    # 2. The policy answers, G times for each question, all from the same evidence.
    cases = [(example, seen.parsed.boxes) for example, seen in zip(questions, perceived)]
    groups = list(reason(
        players.policy, players.codec, progress(cases, "sampling answers"), s.evidence,
        group=s.group, max_tokens=s.reason_tokens, rows=s.rollout_batch, generator=generator))

    # 3. Every answer is one rollout. (No boxes are void here: nobody is trained to write them.)
    rollouts = []
    for example, seen, group in zip(questions, perceived, groups):
        group.rollouts = [Rollout(example, sampled=c, perceived=seen, answer=c)
                          for c in group.completions]
        rollouts += group.rollouts

    # 4. Each answer earns its own reward. One without <answer> tags earns 0: the policy can learn
    #    to write them.
    pay(rollouts, players.judge_of_training())
    set_advantages(groups)
    return Experience(groups, len(questions), seconds)


# The other schedules' phases, `joint` and `thinking`, are added after the skip line.
PHASES = {"perception": perception, "reasoning": reasoning}


def reward_of(rollout):
    """What a rollout earns: 1 for a right final answer; 0 for a wrong one, for void boxes and, of
    the trained Reasoner, for one without <answer> tags (its score is 0 then, see eval.score).

    This is the place for another reward: rollout.example (with .boxes, where the data has them),
    rollout.boxes, rollout.answer.text and rollout.score are at hand.
    """
    if rollout.void:
        return 0.0
    return rollout.score.reward


def pay(rollouts, judge, whole_text=False):
    """Set .score of all answered rollouts and .reward of all, by evaluation's own check."""
    # All at once: a judge answers a batch in one forward.
    answered = [rollout for rollout in rollouts if rollout.answer]
    pairs = [(rollout.answer.text, rollout.example) for rollout in answered]
    for rollout, score in zip(answered, evaluation.grade(pairs, judge, whole_text)):
        rollout.score = score
    for rollout in rollouts:
        rollout.reward = float(reward_of(rollout))


def set_advantages(groups):
    """Set .advantages of all groups: each sample's reward against those of its own question."""
    for group in groups:
        rewards = torch.tensor([rollout.reward for rollout in group.rollouts])   # (G,)
        group.advantages = grpo.group_advantages(rewards)                        # (G,)


# ---------------------------------------------------------------------------------------------
# The loop


@out_of_memory("training", "free the GPU of other programs, or add --offload")
def train(s, run):
    """Run PRA-GRPO with Settings `s`; `run` is the Run that holds its folder. Returns the folder.

    Raises InputError for what the user can mend. A reward is never invented.
    """
    # What a bad flag, row or model folder can break is found here, before anything is trained.
    examples, held_out, policy, codec, judge = prepare(s)
    players = Players(policy, frozen=None, codec=codec, judge=judge)
    optimizer = grpo.MasterAdamW(policy, s.lr, weight_decay=s.weight_decay, offload=s.offload)

    # A resumed run takes masters, moments, frozen copy and step number from its newest checkpoint.
    # All else that a step needs follows from the settings and the step.
    run.begin(players, optimizer)

    for step in range(run.step, s.total):
        phase = s.phase_of(step)

        # A phase begins. A frozen copy of the policy plays the other role until it ends, and
        # anchors the KL. Adam starts afresh: the paper launches each phase anew.
        if step % s.steps == 0:
            players.frozen = frozen_copy(policy)
            optimizer.forget_moments()

        # Held-out accuracy, now and then. (A run that was resumed may have measured here before.)
        if s.measures_at(step) and step not in run.accuracy:
            run.log_accuracy(step, measure(players, held_out, s))

        # 1. Roll out: both roles play, the final answer pays the role that is trained.
        started = time.perf_counter()
        questions = questions_of(examples, step, s)
        generator = torch.Generator(policy.device).manual_seed(s.seed * 1_000_003 + step)
        experience = PHASES[phase](players, questions, s, generator)

        # 2. Learn: one GRPO update on what that role sampled. (`banned` are token ids, such as that
        #    of an image, which are masked out when sampling, and so have to be in the update.)
        rolled_out = time.perf_counter()
        update = grpo.update_batch(
            policy, players.frozen, optimizer, experience.groups, banned=codec.banned, kl=s.kl,
            clip=s.clip, max_norm=s.max_grad_norm, updates=s.updates)

        # 3. Record: the step is done, and its metrics say how it went.
        seconds = {"seconds_rollout": rolled_out - started - experience.partner_seconds,
                   "seconds_partner": experience.partner_seconds,
                   "seconds_update": time.perf_counter() - rolled_out}
        update["nonfinite"] = [group.rollouts[0].example.id for group in update["nonfinite"]]
        run.step = step + 1
        run.log({"step": run.step, "phase": phase, **metrics_of(experience), **update, **seconds})

        # 4. Keep: the weights of every finished phase, now and then a picture, and a checkpoint.
        if run.step % s.steps == 0:
            run.save_model(f"phases/{run.step // s.steps}-{phase}")
        if s.sample_every and (step == 0 or run.step % s.sample_every == 0):
            save_sample(run.folder / "samples", run.step, phase, experience.rollouts[0], codec)
        del experience  # gigabytes of pixels, which the next rollout's need not lie beside
        run.checkpoint_if_due()

    if s.measures_at(s.total) and s.total not in run.accuracy:
        run.log_accuracy(s.total, measure(players, held_out, s))
    run.save_model("final")
    return run.folder


def frozen_copy(policy):
    """The policy as it is now. One copy serves as the other role and as the reference of the KL.

    Here all weights are trained, the vision tower's included, so all are copied. What a fork does
    not train (with LoRA, README.md: all but the adapter) the two models share.
    """
    # What stands in deepcopy's memo, {id: object}, is used as it is, not copied.
    shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
    return copy.deepcopy(policy, shared).eval().requires_grad_(False)


def questions_of(examples, step, s):
    """The Q questions of a step: shuffled passes over the data, one after another.

    A function of the settings and the step alone: there is no cursor to save, and the questions of
    any step can be looked up.
    """
    # Place p of the endless sequence is in pass p // (number of examples). A step may see the end
    # of one pass and the beginning of the next.
    order, chosen = {}, []
    for place in range(step * s.questions, (step + 1) * s.questions):
        epoch, index = divmod(place, len(examples))
        if epoch not in order:
            order[epoch] = random.Random(f"{s.seed}-{epoch}").sample(examples, len(examples))
        chosen.append(order[epoch][index])
    return chosen


def main(arguments=None):
    """The command line: settings, one run in its folder, the table of what came out."""
    s, resumed = settings_from(arguments)
    with Run(s, resumed) as run:
        train(s, run)
    report(s, run)


# =============================================================================================
# Skip on a first reading: the other schedules; what train() is given, how a run is watched, and
# the run's folder


def joint(players, questions, s, generator):
    """Both roles in one update: half of the questions train the Perceiver, half the Reasoner.

    The loss is one mean over all tokens, so the role that writes more weighs more.
    """
    # A question trains one role only, so each half is played as in a phase of its own.
    half = len(questions) // 2
    first = perception(players, questions[:half], s, generator)
    return first + reasoning(players, questions[half:], s, generator)


def thinking(players, questions, s, generator):
    """The authors' baseline, without roles: the policy thinks and answers on the plain image."""
    cases = [(example, []) for example in questions]
    groups = list(reason(
        players.policy, players.codec, progress(cases, "sampling answers"), group=s.group,
        max_tokens=s.reason_tokens, rows=s.rollout_batch, generator=generator))

    # Nobody perceived, and there is no partner.
    rollouts = []
    for example, group in zip(questions, groups):
        group.rollouts = [Rollout(example, sampled=c, answer=c) for c in group.completions]
        rollouts += group.rollouts
    pay(rollouts, players.judge_of_training())
    set_advantages(groups)
    return Experience(groups)


PHASES["joint"] = joint
PHASES["thinking"] = thinking


def settings_from(arguments):
    """The command line, made from Settings -> (Settings, is a run resumed?).

    A given flag wins over the toy's value, or over the run's (see `settings_of_run`). Raises
    InputError.
    """
    # Only flags that were given are in `given`.
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    evaluation.add_flags(parser, Settings)
    parser.add_argument("--resume", metavar="RUN",
                        help="go on with this run; most flags given here win")
    given = vars(parser.parse_args(arguments))
    for name, value in given.items():
        need(value != "", f"--{name.replace('_', '-')} is empty: give it a value, or leave it out")
    resume = given.pop("resume")
    for name in {"model", "data", "eval_data", "images", "judge"} & given.keys():
        given[name] = from_anywhere(given[name])
    if "out" in given:
        given["out"] = os.path.expanduser(given["out"])

    # Settings come from the run that goes on, or from the toy where no model is named.
    if resume is not None:
        s = settings_of_run(resume, given)
    elif "model" in given:
        s = Settings(**given)
    else:
        world = toy.defaults()
        if "data" in given:
            del world["eval_data"]  # the toy's held-out questions belong to the toy's data
        s = Settings(**world | given)
    check(s)

    # All settings are printed if a flag was given.
    phases = " and ".join(dict.fromkeys(SCHEDULES[s.schedule]))
    print(f"{s.total} steps ({phases}), {s.questions} questions x {s.group} samples a step.")
    if s.schedule != "think":
        print("A frozen copy of the model, made when a phase begins, plays the other role.")
    if given:
        for name, value in dataclasses.asdict(s).items():
            print(f"  {name:16} {value}")
    return s, resume is not None


def from_anywhere(name):
    """The path of a file or folder that is here as an absolute one: --resume may be typed in
    another folder. Hub ids and words stay as they are."""
    path = Path(name).expanduser()
    if name in ("", "self", "none") or not path.exists():
        return name
    return str(path.absolute())


def check(s):
    """Raises InputError for the first setting that cannot work."""
    evaluation.check_numbers(s, may_be_0=(
        "eval_every", "save_every", "sample_every", "seed", "kl", "weight_decay"))

    # What no single range tells.
    need(s.seed < 2**32, f"--seed {s.seed} must be less than {2**32}")
    need(s.group > 1, f"--group {s.group}: GRPO compares samples, so it needs at least 2")
    for name, choices in (("schedule", SCHEDULES), ("evidence", REGIONS)):
        value = getattr(s, name)
        need(value in choices, f"--{name} {value} must be {', '.join(choices)}")
    for name in ("model", "data", "judge"):
        need(getattr(s, name), f"--{name} is empty")
    need(s.schedule != "joint" or s.questions > 1,
         "--schedule joint needs --questions 2 or more: each role gets half")


def prepare(s):
    """Load everything -> (training examples, held-out examples, policy, codec, judge)."""
    # A mistyped model is told at once. Then the data: a bad row should not cost the minutes that a
    # model takes to load.
    source = find(s.model)
    examples = evaluation.load_data(s.data, s.images, s.skip_bad)
    held_out = []
    if s.eval_data:
        held_out = evaluation.load_data(s.eval_data, s.images, s.skip_bad, "--eval-data")

    # Whether questions fit into a prompt is known once there is a tokenizer.
    policy, codec = load(source, s.max_pixels)
    longest = max(s.perceive_tokens, s.reason_tokens)
    examples = fitting(codec, examples, longest, s.skip_bad)
    held_out = fitting(codec, held_out, longest, s.skip_bad)
    if s.checkpointing:
        grpo.checkpoint_activations(policy)

    # "self" stays a word: the frozen copy that it means does not exist yet.
    judge = None if s.judge == "none" else s.judge
    if judge not in ("self", None):
        judge = evaluation.Judge.load(s.judge, policy.device)
    check_memory(policy, s)
    return examples, held_out, policy, codec, judge


def check_memory(policy, s):
    """Print what memory a real run takes. Raises InputError where the GPU has less, before the
    other copies of the model are made."""
    if policy.num_parameters() < 10**8:
        return  # the toy fits anywhere
    trained = policy.num_parameters(only_trainable=True)
    peaks = estimate_memory(
        policy.config, policy.num_parameters(), policy.dtype.itemsize, s, trained)
    told = ", ".join(f"{gib:.1f} GiB while {doing}" for doing, gib in peaks.items())

    # In the computer's memory a parameter takes 17.2 bytes: its master 4, or 5.2 as pinned blocks
    # are powers of two; two moments 8; in a step the gradient 4.
    if s.offload:
        told += f", {trained * 17.2 / 2**30:.0f} GiB of the computer's memory"
    if policy.device.type != "cuda":
        print(f"memory, computed: {told}")
        return

    # What is free decides, before frozen copy and float32 weights are made, with what the allocator
    # has in reserve and what the policy takes itself. (A judge's memory is none of these.)
    card = policy.device
    reserve = torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card)
    free = torch.cuda.mem_get_info(card)[0] + reserve + policy.get_memory_footprint()
    free = free / 2**30
    if max(peaks.values()) < free:
        print(f"memory, computed: {told}; the GPU has {free:.1f} for it")
        return
    remedy = "lower --max-pixels, --group or --reason-tokens"
    if peaks["sampling"] > peaks["updating"]:
        remedy = "lower --rollout-batch and --partner-batch"
    if not s.offload:
        remedy += ", or add --offload"
    raise InputError(f"this run would take {told}, but the GPU has {free:.1f} for it: {remedy}")


def estimate_memory(config, parameters, size, s, trained=None):
    """Peak GiB on a GPU, {"sampling": .., "updating": ..}: arithmetic on the model's config, its
    number of parameters, the bytes of a value in its compute type, the Settings, and how many of
    the parameters are trained (None: all; of the others there is no second copy).

    Every prompt and response is taken as long as it may be, and both roles as trained. 1 GiB is
    added for the driver and the kernels' own; a judge model comes on top. tests/test_memory.py
    compares it with the real code.
    """
    text, vision = config.text_config, config.vision_config
    hidden, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    queries = text.num_attention_heads * text.head_dim
    keys_values = 2 * text.num_key_value_heads * text.head_dim
    pixels = 3 * vision.temporal_patch_size * vision.patch_size**2  # values of a patch
    features = len(vision.deepstack_visual_indexes)                 # DeepStack: besides the last

    # Policy and frozen copy; float32 masters and two moments.
    trained = parameters if trained is None else trained
    static = (parameters + trained) * size
    if not s.offload:
        static += trained * 3 * 4

    sampling, updating = [], []
    for images, R in ((1, s.perceive_tokens), (1 + MAX_CROPS, s.reason_tokens)):
        patches = images * (s.max_pixels // vision.patch_size**2)
        visual = patches // vision.spatial_merge_size**2
        P = visual + TEXT_TOKENS

        # One prefill has its peak in the vision tower, which rotates queries and keys in float32,
        # or in a layer of the language model.
        tower = patches * (vision.hidden_size * (5 * size + 28) + pixels * size)
        tower += features * visual * hidden * size
        layer = P * (3 * inner + 6 * hidden) * size

        # Beside it are the sampler's table of keys and values, which a longer prompt may make an
        # eighth larger than it needs, and the logits of a step. The table is the trained role's or
        # its partner's.
        for rows, G in ((min(s.rollout_batch, s.questions), s.group), (s.partner_batch, 1)):
            prefill = min(rows, max(1, PREFILL // P)) * max(tower, layer)
            columns = math.ceil((P + G * R) * 9 / 8 / STRIDE) * STRIDE
            logits = rows * G * text.vocab_size * (size + 2 * 4)
            sampling.append(prefill + rows * columns * layers * keys_values * size + logits)

        # An update keeps for the backward pass the inputs of all layers of both towers (`inputs`),
        # and what is inside of them (`tower`, `layer`). Every response attends to keys and values
        # of its own, the prompt's and its.
        L = P + s.group * R
        inputs = patches * (pixels + vision.hidden_size * (vision.depth + 1 + 3 * (1 + features)))
        inputs += L * hidden * layers + visual * hidden * features
        tower = patches * (10 * vision.hidden_size + 2 * vision.intermediate_size)
        layer = L * (4 * inner + 3 * hidden + 4 * queries + 1.5 * keys_values)
        layer += s.group * (P + R) * keys_values

        # With checkpointing the inside of one layer is alive at a time, else that of all. Beside
        # it are the gradients of its MLP; or, before the backward pass reaches a layer, a chunk of
        # logits.
        gradients = L * (2 * inner + hidden) * size
        logits = 4 * min(512, s.group * R) * text.vocab_size * 4
        work = max(layer * size + gradients, logits)
        if not s.checkpointing:
            work = (vision.depth * tower + layers * layer) * size + max(gradients, logits)

        # The float32 sum of all gradients, and the embedding's gradient before it is added to it.
        embedding = text.vocab_size * hidden * size if trained == parameters else 0
        updating.append(4 * trained + inputs * size + work + embedding)
    return {"sampling": (static + max(sampling)) / 2**30 + 1,
            "updating": (static + max(updating)) / 2**30 + 1}


def measure(players, held_out, s):
    """Held-out accuracy of the policy in both roles, as eval.evaluate returns it: greedy, and under
    the budgets of training. Only a separate judge model is asked: nobody grades itself here."""
    # Without the repetition penalty of the authors' evaluation, as training has none.
    protocol = evaluation.Protocol(
        evidence=s.evidence, max_pixels=s.max_pixels, perceive_tokens=s.perceive_tokens,
        reason_tokens=s.reason_tokens, penalty=1.0, batch=s.partner_batch)
    judge = None if players.judge == "self" else players.judge
    return evaluation.evaluate(players.policy, players.codec, held_out, protocol, judge)


def report(s, run):
    """Print what came out, and where to look next."""
    if run.accuracy:
        titles = {0: "before", s.total: "after"}
        columns = [(titles.get(step, f"step {step}"), row) for step, row in run.accuracy.items()]
        evaluation.print_accuracy(columns)
    print(f"\npictures    {run.folder}/samples/   what was boxed, answered and paid")
    print(f"curves      {run.folder}/metrics.jsonl   (drawn by python tests/plot.py {run.folder})")
    if s.model == str(toy.WARM_START):
        print("a real run  python p2r_min.py --model Qwen/Qwen3-VL-2B-Instruct")
    else:
        print(f"weights     {run.folder}/final/   (python eval.py --model {run.folder}/final ...)")


def metrics_of(experience):
    """What a step's rollouts say, as a dict for metrics.jsonl. A mean of nothing is None.

    What the update adds to it is explained at grpo.update_batch.
    """
    # What the trained role wrote, and what it earned.
    rollouts = experience.rollouts
    completions = [rollout.sampled for rollout in rollouts]
    tokens = sum(len(c.ids) for c in completions)
    by_group = []
    for group in experience.groups:
        by_group.append(torch.tensor([rollout.reward for rollout in group.rollouts]))    # (G,)

    # What the Perceiver wrote, whoever played it.
    lists = [rollout.perceived.parsed for rollout in rollouts if rollout.perceived]
    boxes = [box for parsed in lists for box in parsed.boxes]

    # What the Reasoner wrote. Only the trained role's answers need tags.
    scored = [rollout for rollout in rollouts if rollout.score]
    own = [rollout.score for rollout in scored if rollout.answer is rollout.sampled]
    partners = [rollout.score for rollout in scored if rollout.answer is not rollout.sampled]

    return {
        # Rises over tens of steps. The spread inside a group is what GRPO learns from.
        "reward_mean": torch.cat(by_group).mean().item(),
        "reward_std": mean(group.std() for group in by_group),

        # Groups whose samples all earned the same teach nothing. Near 1: the questions are too easy
        # or too hard, or --group is too small.
        "zero_variance": mean((group == group[0]).all() for group in by_group),

        # Sampled tokens of the trained role. Responses that shrink with the reward: lower --lr.
        # Cut off by the limit: raise --perceive-tokens or --reason-tokens.
        "tokens": tokens,
        "response_tokens": tokens / len(completions),
        "truncated": mean(not c.ended for c in completions),

        # Rollouts that earned 0 by the paper's rule on boxes. Rising: lower --lr.
        "void": mean(bool(rollout.void) for rollout in rollouts),

        # Perceiver outputs without a box list: they earn what [] earns. Rising: lower --lr.
        "unparsable": mean(not parsed.parsable for parsed in lists),

        # Boxes of an output; share of the image that a box covers; boxes that cover nearly all of
        # it. The paper pays for those, too: if they grow with the reward, nobody points any more.
        "boxes": mean(len(parsed.boxes) for parsed in lists),
        "box_area": mean(box.area for box in boxes),
        "whole_boxes": mean(box.area >= WHOLE for box in boxes),

        # Answers without <answer>: of the trained Reasoner (they earn 0), of the frozen one (they
        # are read after their thoughts).
        "unanswered": mean(not score.answered for score in own),
        "untagged": mean(not score.answered for score in partners),

        # Answers that went to the judge. A jump together with the reward: it may be fooled.
        "judged": mean(rollout.score.judged for rollout in scored),

        # Prompts that the frozen copy answered.
        "partner_calls": experience.partner_calls,
    }


def save_sample(folder, step, phase, rollout, codec):
    """One rollout as a picture for people: the evidence, what the model sees of it, all texts."""
    # What each role wrote, as people are shown it.
    example = rollout.example
    unasked = f"(not asked: the boxes are void, {rollout.void})"
    texts = [("perceiver", str(rollout.perceived or "(nobody perceives)")),
             ("reasoner", str(rollout.answer or unasked)),
             ("truth", example.answer),
             ("reward", f"{rollout.reward:g}")]
    page = picture(example.load_image(), rollout.boxes, example.question, texts, codec.scaled)
    folder.mkdir(exist_ok=True)
    page.save(folder / f"{step:05d}-{phase}.png")


class Run:
    """A run's folder, as a context: `with Run(s, resumed) as run: train(s, run)`.

        config.json, lock      the settings; what tells a second process that this one is at work
        metrics.jsonl          a line a step: metrics_of, grpo.update_batch, seconds_*, peak_gib
        accuracy.jsonl         a line a measurement: eval.evaluate
        samples/               pictures
        phases/1-perception/   bf16 weights at the end of each phase, an ordinary model folder
        final/                 the same, at the end of the run
        checkpoints/step-N/    float32 masters, Adam's moments, frozen copy; the newest two stay

    Killed at any moment and resumed, a run ends with the same bits as an undisturbed one (on a CPU;
    some GPU kernels add in no fixed order). This rests on three things. What is not in a checkpoint
    is a function of (settings, step). A folder is written beside its place, flushed, then renamed.
    Both logs are cut back to the checkpoint that the run goes on from.
    """

    def __init__(self, s, resumed):
        self.s, self.resumed, self.folder = s, resumed, Path(s.out)  # without out: see `begin`
        self.step, self.accuracy = 0, {}      # steps done; step -> eval.evaluate's dict
        self.interrupt = None                 # number of the signal that asked to stop
        self.players = self.optimizer = None  # what a checkpoint is made of, once the run has begun
        self.lock, self.handlers, self.ticker = None, {}, Ticker(s)
        need(resumed or not s.out or not in_use(Path(s.out)),
             f"--out {s.out} is not empty: choose another, or --resume {s.out}")

    def begin(self, players, optimizer):
        """Make the folder, or take players and optimizer back to its newest checkpoint."""
        self.folder = Path(self.s.out or evaluation.next_free(f"runs/{Path(self.s.model).name}"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = evaluation.lock(self.folder / "lock")  # two runs would spoil each other's logs

        saved = checkpoints_of(self.folder)
        if self.resumed and saved:
            self.step = restore(players, optimizer, saved[-1], self.s.total)

        # Both logs are cut back to the step that the run goes on from. (Settings are written before
        # anything else, as --resume needs them, but not over those of a finished run.)
        self.players, self.optimizer = players, optimizer
        if self.step < self.s.total:
            write_whole(self.folder / "config.json", json.dumps(vars(self.s), indent=2))
        cut_back(self.folder / "metrics.jsonl", self.step)
        for row in cut_back(self.folder / "accuracy.jsonl", self.step):
            self.accuracy[row["step"]] = row
        for number in evaluation.ending_signals():
            self.handlers[number] = signal.signal(number, self.save_on_interrupt)

    def save_on_interrupt(self, number, frame):
        """The first signal asks the loop to save after its step; a second one acts at once."""
        self.interrupt = number
        for other in self.handlers:
            signal.signal(other, stop_at_once)
        say_or_be_silent(b"\nfinishing what is under way, then saving; once more stops at once\n")

    def log_accuracy(self, step, found):
        self.accuracy[step] = {"step": step, **found}
        append_json(self.folder / "accuracy.jsonl", self.accuracy[step])
        if self.interrupt:  # while it was measured
            self.checkpoint_if_due()

    def log(self, metrics):
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        append_json(self.folder / "metrics.jsonl", metrics | {"peak_gib": peak})
        self.ticker.show(metrics)

    def checkpoint_if_due(self):
        """Save if it is time, if the run is done, or if a signal asked for it: then leave, too."""
        every = self.s.save_every
        if self.interrupt or self.step == self.s.total or (every and self.step % every == 0):
            self.save()
        if self.interrupt:
            raise SystemExit(128 + self.interrupt)

    def save(self):
        """A checkpoint. The newest two stay: should one be unreadable, the other is there."""
        save_checkpoint(self.players, self.optimizer, self.step, self.folder)
        for old in checkpoints_of(self.folder)[:-2]:
            shutil.rmtree(old)

    def save_model(self, name):
        """The policy as a bf16 model folder."""
        (self.folder / name).parent.mkdir(exist_ok=True)
        with written(self.folder / name) as new:
            write_model(self.players.policy, self.s, new)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Say how to go on, where that helps; after an error that a user can mend, save first."""
        if not self.lock:
            return
        self.ticker.close()
        # What a user can mend is told together with the command that goes on.
        again = f"go on with: python p2r_min.py --resume {shlex.quote(str(self.folder))}"
        try:
            if isinstance(error, NotANumber):
                raise InputError(f"{error}; not saved. With a lower --lr, {again}") from error
            if isinstance(error, InputError) and self.players and self.players.frozen:
                if self.s.updates == 1:  # of several some may be done: that is no step to save
                    save_after(error, self)
                raise InputError(f"{error}; {again}") from error
            if isinstance(error, (OSError, SafetensorError)):
                raise InputError(f"cannot read or write: {error}; mend it; {again}") from error
            if isinstance(error, (SystemExit, KeyboardInterrupt)):
                print(f"stopped after step {self.step}; {again}")
        finally:  # all outside the run is again as it was before `begin`
            self.lock.close()
            for number, handler in self.handlers.items():
                signal.signal(number, handler)


class Ticker:
    """What a run prints: a bar for each phase, or off a terminal a line now and then."""

    def __init__(self, s):
        self.s, self.bar = s, None

    def show(self, metrics):
        """One step's metrics, as they are logged."""
        step, phase = metrics["step"], metrics["phase"]
        reward, kl = f"{metrics['reward_mean']:.2f}", f"{metrics['kl']:.3f}"
        seconds = sum(value for name, value in metrics.items() if name.startswith("seconds"))

        # (With disable=None the bar shows on a terminal only.)
        done = (step - 1) % self.s.steps
        if done == 0 or self.bar is None:
            self.bar = tqdm(total=self.s.steps, initial=done, desc=f"{phase} phase", disable=None)
        self.bar.set_postfix({"reward": reward, "kl": kl})
        self.bar.update()
        if done + 1 == self.s.steps:
            self.bar.close()
        if self.bar.disable and (step % 5 == 0 or step == 1):
            hours = seconds * (self.s.total - step) / 3600
            print(f"step {step}/{self.s.total} {phase}: reward {reward}, kl {kl}, "
                  f"{seconds:.1f} s a step, {hours:.1f} h left", flush=True)

        if metrics["nonfinite"]:
            tqdm.write(f"step {step} left an update out: loss or gradient is not finite for "
                       f"question {', '.join(metrics['nonfinite'])}; look at it, or lower --lr")

    def close(self):
        if self.bar:
            self.bar.close()


def save_after(error, run):
    """Save a run that an error has ended, if that can be."""
    # It may be that the GPU's memory ran out (rollout.out_of_memory made an InputError of it). To
    # save takes some, and the frames of the error still hold tensors.
    run.optimizer.discard()
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    # Should the disk be full, too, or the weights damaged, the user hears of the first error.
    with contextlib.suppress(OSError, SafetensorError, InputError):
        run.save()


def checkpoints_of(folder):
    """A run's checkpoints, oldest first. Whatever else lies there is not ours."""
    found = (folder / "checkpoints").glob("step-*")
    ours = [path for path in found if re.fullmatch(r"step-\d{5,}", path.name)]
    return sorted(ours, key=lambda path: int(path.name[5:]))


def save_checkpoint(players, optimizer, step, folder):
    """All that the next step depends on. Raises InputError for weights that are not finite."""
    # Weights that are not a number would stay so for ever. (The sum tells, and takes no memory.)
    tensors = grpo.optimizer_state(optimizer)
    tensors["frozen"] = kept_of(players.frozen, optimizer)
    for name, master in tensors["masters"].items():
        if not master.sum().isfinite():
            raise InputError(f"{name} is not finite after step {step}: not saved; resume with a "
                             f"lower --lr")

    # What a kill has left half-written would stay for ever.
    for half in (folder / "checkpoints").glob("step-*.new"):
        shutil.rmtree(half)
    with written(folder / "checkpoints" / f"step-{step:05d}") as new:
        new.mkdir(parents=True)
        for name, group in tensors.items():
            save_file(group, new / f"{name}.safetensors")


def restore(players, optimizer, checkpoint, total):
    """Take players and optimizer back to a checkpoint. Returns the steps that were done by then.

    Raises InputError if it cannot be read, or if these are more than the `total` of this run.
    """
    step = int(checkpoint.name[5:])
    need(step <= total, f"{checkpoint.parents[1]} has done {step} steps, but these settings make "
                        f"{total}: give more --iterations")

    # (If a phase begins there, it makes its own frozen copy.)
    try:
        grpo.load_optimizer(optimizer, checkpoint)
        players.frozen = frozen_copy(players.policy)
        kept = kept_of(players.frozen, optimizer)
        grpo.load_into(kept, checkpoint / "frozen.safetensors")
    except torch.cuda.OutOfMemoryError:
        raise  # a RuntimeError, too, but not the checkpoint's fault
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{checkpoint} cannot be read ({error}): move it away to go on from the "
                         f"checkpoint before it") from error
    return step


def say_or_be_silent(text):
    """Write to stderr. If nobody is there any more (the terminal was closed, or the same Ctrl-C has
    ended `tee`), whatever is printed from now on goes nowhere, and stops nothing."""
    try:
        os.write(2, text)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


def stop_at_once(number, frame):
    raise KeyboardInterrupt(number)


def kept_of(frozen, optimizer):
    """{name: tensor} of the frozen copy that a checkpoint keeps: only of what is trained. The rest
    is as in the model that the run began with."""
    return {name: frozen.get_parameter(name) for name in optimizer.names}


def write_model(policy, s, folder):
    """An ordinary model folder: bf16 weights, every other file of the folder that the policy was
    loaded from, and the budgets of training, which eval.py takes over."""
    # Tokenizer, image processor and configuration come along; weights of any format do not, nor
    # folders (a run's own might be among them).
    others = (".*", "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5")
    folder.mkdir()
    for file in Path(policy.name_or_path).iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in others):
            shutil.copyfile(file, folder / file.name)
    save_file(weights_of(policy), folder / "model.safetensors", metadata={"format": "pt"})

    # A model is best asked as it was trained.
    shared = ("max_pixels", "perceive_tokens", "reason_tokens", "evidence")
    budgets = {setting: getattr(s, setting) for setting in shared}
    (folder / "p2r.json").write_text(json.dumps(budgets))


def weights_of(policy):
    """{name: bf16 tensor} as the original file has them: tied weights once."""
    return {name: p.detach().to(torch.bfloat16) for name, p in policy.named_parameters()}


def in_use(folder):
    """Does the folder hold anything, but for what a run leaves that was killed before it began: a
    lock, half a file?"""
    left = list(folder.iterdir()) if folder.is_dir() else []
    return any(path.name != "lock" and path.suffix != ".new" for path in left)


def settings_of_run(name, given):
    """The Settings of the run folder `name`, changed by the flags `given` with --resume."""
    need(name and Path(name).is_dir(), f"--resume {name or 'is empty'}: there is no such folder; "
                                       f"name a run's, which holds its config.json")

    # RUN/final, RUN/phases/... and RUN/checkpoints/... mean RUN.
    folder = Path(name)
    for candidate in (folder, *folder.absolute().parents[:2]):
        if (candidate / "metrics.jsonl").is_file():
            folder = candidate
            break
    try:
        known = json.loads((folder / "config.json").read_text())
        if "schedule" not in known:
            raise ValueError("it is a model's, not a run's")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume {name}: {folder} is no run folder, for its config.json cannot "
                         f"be read ({error}); start the run with its own command") from error

    # A given flag wins. Whether it makes sense in the middle of a run is the user's to know; what
    # cannot work is refused.
    refuse_changes(folder, known, given)
    for key, value in given.items():
        if value != known.get(key):
            print(f"changed: --{key.replace('_', '-')} from {known.get(key)} to {value}")
    known = {key: value for key, value in known.items() if key in Settings.__dataclass_fields__}
    return Settings(**known | given | {"out": str(folder)})


def refuse_changes(folder, known, given):
    """Raises InputError if the run in `folder`, made with the settings `known`, cannot go on with
    the flags `given`."""
    need("out" not in given, f"--resume goes on in {folder}: leave --out away")

    # It would begin again, over its own results.
    saved = checkpoints_of(folder)
    need(saved or not (folder / "final").is_dir(),
         f"{folder} is finished, and its checkpoints are gone: begin a new run with --model "
         f"{folder / 'final'}")

    # After its first phase a run's other phases would begin at other steps than they did.
    done = int(saved[-1].name[5:]) if saved else 0
    steps = known.get("steps", 0)
    new_steps = given.get("steps", steps)
    need(steps == new_steps or done <= min(steps, new_steps),
         f"--steps cannot change from {steps} to {new_steps} any more, as {done} steps are done: "
         f"give --iterations")

    # One table would compare different questions.
    measured = known.get("eval_data")
    need(not measured or given.get("eval_data", measured) == measured,
         f"{folder} is measured with {measured}: ask its weights other questions with python "
         f"eval.py --data")


@contextlib.contextmanager
def written(path):
    """Yields path.new, to be made into a file or a folder, then flushes it and renames it to
    `path`, which so appears as a whole or not at all."""
    new = path.with_name(path.name + ".new")
    shutil.rmtree(new, ignore_errors=True)  # what a kill has left
    try:
        yield new
    except Exception:  # half a checkpoint would keep a full disk full
        shutil.rmtree(new, ignore_errors=True)
        raise

    # Files get the mode that every new file gets here (safetensors makes them private), and all is
    # on the disk before its new name is.
    mask = os.umask(0)
    os.umask(mask)
    for part in (new, *new.rglob("*")):
        if part.is_file():
            part.chmod(0o666 & ~mask)
        flush(part)
    if path.is_dir():
        shutil.rmtree(path)
    new.replace(path)
    flush(path.parent)


def flush(path):
    """Wait until a file, or a folder's list of names, is on the disk. (Windows knows no such call
    for a folder.)"""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_whole(path, text):
    with written(path) as new:
        new.write_text(text)


def append_json(path, row):
    """Add one line to a log. What is not finite becomes null, which every JSON reader knows."""
    # (Python would write NaN, which is no JSON.)
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            row = row | {key: None}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def cut_back(log, step):
    """Leave the rows of a log up to this step, and return them."""
    rows = [row for row in evaluation.read_jsonl(log) if row["step"] <= step]
    write_whole(log, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


if __name__ == "__main__":
    sys.exit(evaluation.run_program("p2r_min.py", main))
