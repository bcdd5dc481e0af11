"""Is it the two roles, is it the alternation, or is it just more reinforcement learning?

    python tests/experiment.py run                  # every run; stopped, the same command goes on
    python tests/experiment.py collect              # finished runs -> assets/experiment.json
    python tests/figures.py table                   # what came out; see there for the figures
    python tests/experiment.py run --jobs 1 --seeds 3 --updates 312 --out runs/experiment-2b \\
        -- --model Qwen/Qwen3-VL-2B-Instruct --eval-data FILE

Every run is p2r_min.train with another list of phases: SCHEDULES below. All else is equal: warm
start, data and their order, questions and samples of an update, evaluation. Two of the lists hold
phases that the product does not have, shuffled rewards and a dense reward: the forks below.

What is expected of the runs, and how they are analysed, was written down before they were made:
tests/README.md, "The experiment". The analysis itself is tests/figures.py.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import eval as evaluation
import grpo
import p2r_min
import toy
from crop import violation
from eval import mean
from p2r_min import Experience, Players, Rollout, Run, Settings
from rollout import REGIONS, InputError, find, load, perceive, reason, reasoner_prompt

UPDATES = 168                    # at which schedules are compared; shared by 2, 4, 6 and 8 phases
SEEDS = 12

# All kinds of the toy's questions: they need one box, two in the right order, and three.
KINDS = ("one", "two", "count")


@dataclass(frozen=True)
class Schedule:
    phases: tuple
    share: float  # of the UPDATES that one phase lasts


# Some call the model less often than `alternate` does in an update. They get half as many updates
# more, and so can be compared at equal calls, too.
BOTH = ("perception", "reasoning")
SCHEDULES = {
    "alternate": Schedule(BOTH, 1 / 2),                 # the paper's
    "alternate x 2": Schedule(2 * BOTH, 1 / 4),         # as --iterations 2
    "alternate x 3": Schedule(3 * BOTH, 1 / 6),         # the paper's three iterations
    "alternate x 4": Schedule(4 * BOTH, 1 / 8),
    "joint": Schedule(3 * ("joint",), 1 / 2),
    "perceiver": Schedule(2 * ("perception",), 1 / 2),
    "reasoner": Schedule(3 * ("reasoning",), 1 / 2),
    "think": Schedule(("thinking",), 3 / 2),            # one launch: no new frozen copy half-way
    "shuffled": Schedule(("shuffled-perception", "shuffled-reasoning"), 1 / 2),
    "dense": Schedule(("dense-perception", "reasoning"), 1 / 2),
}

# ---------------------------------------------------------------------------------------------
# The forks: phases that the product does not have


def shuffled(phase):
    """The control: `phase`, but each group's advantages are dealt out anew among its samples.

    They are as large, and as often zero, as the real ones; only which sample gets which is chance.
    Whatever moves in such a run moves by itself. The reward that is logged is still the true one.
    """
    def phase_with_shuffled_advantages(players, questions, s, generator):
        experience = phase(players, questions, s, generator)
        for group in experience.groups:
            # The step's own generator, so that a resumed run deals out the same.
            G = len(group.advantages)
            order = torch.randperm(G, generator=generator, device=generator.device)
            group.advantages = group.advantages[order.cpu()]                     # (G,)
        return experience

    return phase_with_shuffled_advantages


FLOOR = -10.0  # nats: what void boxes earn, and the least that any boxes earn


def dense_perception(players, questions, s, generator):
    """The perception phase with a dense reward: how likely the frozen Reasoner finds the truth.

    CropVLM's idea (arXiv 2511.19820): log p(true answer | evidence), one forward, nothing decoded.
    Boxes that help a little earn a little; the paper's reward needs the answer to turn.
    """
    # 1. The policy perceives, as in p2r_min.perception.
    groups = list(perceive(
        players.policy, players.codec, questions, group=s.group, max_tokens=s.perceive_tokens,
        rows=s.rollout_batch, generator=generator))

    # 2. The frozen copy reads the truth, once for each distinct list of boxes, and every sample is
    #    paid. There is no answer to score.
    started = time.perf_counter()
    calls = 0
    for example, group in zip(questions, groups):
        known = {}  # boxes -> nats
        group.rollouts = [Rollout(example, c, c, reward=FLOOR) for c in group.completions]
        for rollout in group.rollouts:
            rollout.void = violation(rollout.boxes)
            coordinates = tuple(box[:4] for box in rollout.boxes)
            if not rollout.void and coordinates not in known:
                known[coordinates] = log_likelihood(players, rollout, s.evidence)
            if not rollout.void:
                rollout.reward = max(known[coordinates], FLOOR)
        calls += len(known)
    p2r_min.set_advantages(groups)
    return Experience(groups, calls, time.perf_counter() - started)


@torch.no_grad()
def log_likelihood(players, rollout, evidence):
    """log p(true answer | evidence, question) under the frozen Reasoner, in nats.

    The sum is over all texts that give this answer (`right_texts`).
    """
    example = rollout.example
    prompt = reasoner_prompt(
        players.codec, example.load_image(), rollout.boxes, example.question, example.answer_form,
        evidence)

    # One group, one row: all texts share the prompt, as the samples of a group do in training.
    responses = []
    for text in right_texts(example):
        ids = players.codec.tokenizer(text, add_special_tokens=False)["input_ids"]
        responses.append(torch.tensor(ids))                                      # (R,)
    row = grpo.pack(prompt, responses, players.frozen.device)
    logps, _ = grpo.response_logprobs(players.frozen, row, players.codec.banned)  # (T,)
    each = torch.stack([part.sum() for part in logps.split(row.lengths.tolist())])
    return each.logsumexp(0).item()


def right_texts(example):
    """The texts that a Reasoner can write whose answer is right.

    One that answers at once has one. One that thinks first finds an answer without a thought
    impossible, and the likelihood of the answer is a sum over thoughts. The toy's are few: they
    list the ways that it reads, one for each of up to three things.
    """
    if example.category not in toy.KINDS:
        return [f"<answer>{example.answer}</answer>"]

    # Whatever it may read of the crops, one to three of them: kept where it leads to the truth.
    texts = []
    for length in (1, 2, 3):
        for ways in itertools.product(toy.WAYS, repeat=length):
            answer = " and ".join(ways)
            if example.category == "count":  # "How many run uphill: the ..."
                asked = example.question.split()[3].rstrip(":")
                answer = str(ways.count(asked))
            if answer == example.answer:
                thought = f"<think>They run {', '.join(ways)}.</think>"
                texts.append(f"{thought}\n<answer>{answer}</answer>")
    return texts


FORKS = {
    "shuffled-perception": shuffled(p2r_min.perception),
    "shuffled-reasoning": shuffled(p2r_min.reasoning),
    "dense-perception": dense_perception,
}

# ---------------------------------------------------------------------------------------------
# One run


def settings(name, seed, updates, folder, more=None):
    """The Settings of one run: the toy's, unless `more` names a model.

    Raises InputError if the updates cannot be shared out among the phases of every schedule.
    """
    more = more or {}
    if updates <= 0 or updates % 24:
        raise InputError(f"--updates {updates} cannot be shared among 2, 4, 6 and 8 phases: give a "
                         f"multiple of 24")
    # The toy's world, unless another model brings its own.
    world = {}
    if "model" not in more:
        world = toy.defaults(KINDS) | {"questions": 10}
    elif "eval_data" not in more:
        raise InputError("--model needs --eval-data, or there is nothing to compare")

    # Measured at every eighth, so at the end of every phase. (Six phases end on sixths.)
    steps = round(SCHEDULES[name].share * updates)
    every = updates // 6 if name == "alternate x 3" else updates // 8
    own = {"schedule": name, "steps": steps, "seed": seed, "out": str(folder), "eval_every": every}
    return Settings(**world | {"sample_every": 0, "save_every": steps} | more | own)


def play(name, s, updates):
    """Start one run or go on with it, then ask its weights what `ask_afterwards` asks."""
    # The product knows phases and schedules by name; the experiment adds its own.
    p2r_min.PHASES.update(FORKS)
    p2r_min.SCHEDULES[name] = SCHEDULES[name].phases
    p2r_min.check(s)

    # A folder with other settings belongs to another experiment.
    folder = Path(s.out)
    begun = (folder / "config.json").exists()
    if begun:
        known = json.loads((folder / "config.json").read_text())
        for setting, value in dataclasses.asdict(s).items():
            if known[setting] != value:
                raise InputError(f"{folder} holds another run ({setting} was {known[setting]} and "
                                 f"is {value}): choose another --out")

    # The last file is the mark of a finished run. What only a resumed run needs can go then.
    if not (folder / "final").exists():
        with Run(s, resumed=begun) as run:
            p2r_min.train(s, run)
    found = ask_afterwards(folder, name, s, updates)
    p2r_min.write_whole(folder / "afterwards.json", json.dumps(found))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def ask_afterwards(folder, name, s, updates):
    """What only the weights can tell, as they are after `updates`. Returns a dict:

    evidence  accuracy by what the Reasoner sees
    swapped   accuracy where only this role is played by the trained weights, the other by the warm
              start
    overlap   `overlap` at the start and at the end of every phase, of the schedules without forks
    """
    # The same questions as in the run.
    examples = evaluation.load_data(s.data, s.images, s.skip_bad)
    held_out = evaluation.load_data(s.eval_data, s.images, s.skip_bad, "--eval-data")
    before, codec = load(find(s.model), s.max_pixels)

    # The longer runs are asked as they were then, not as they ended. (`think` saves no weights
    # in the middle: it is asked at its end.)
    ends = sorted((folder / "phases").iterdir(), key=lambda path: int(path.name.split("-")[0]))
    ends = ends[:max(1, updates // s.steps)]
    after, _ = load(ends[-1], s.max_pixels)

    # Less evidence than in training; then one role taken back to the warm start.
    found = {"evidence": {}, "swapped": {}, "overlap": {}}
    for kind in REGIONS:
        found["evidence"][kind] = accuracy(after, after, codec, held_out, s, kind)
    found["swapped"]["perceiver"] = accuracy(after, before, codec, held_out, s, s.evidence)
    found["swapped"]["reasoner"] = accuracy(before, after, codec, held_out, s, s.evidence)

    # Only where it could decide between schedules, and not of every seed: it takes as long as 16
    # updates, and 12 seeds tell the cosines between the two roles to a hundredth.
    if name in ("alternate", "joint", "perceiver", "reasoner") and s.seed < SEEDS:
        found["overlap"]["0-start"] = overlap(before, codec, examples, s)
        for end in ends:
            policy, _ = load(end, s.max_pixels)
            found["overlap"][end.name] = overlap(policy, codec, examples, s)
    return found


def accuracy(perceiver, reasoner, codec, examples, s, evidence):
    """Accuracy where one model perceives and another one, or the same, reasons; both greedy."""
    how = {"greedy": True, "rows": s.partner_batch}
    looks = perceive(perceiver, codec, examples, max_tokens=s.perceive_tokens, **how)
    boxes = [group.completions[0].parsed.boxes for group in looks]
    answers = reason(reasoner, codec, list(zip(examples, boxes)), evidence,
                     max_tokens=s.reason_tokens, **how)
    texts = [group.completions[0].text for group in answers]
    return mean(score.reward for score in evaluation.grade(zip(texts, examples)))


class Gradient(grpo.MasterAdamW):
    """An optimizer that never steps: it keeps a batch's gradient as one vector."""

    def step(self, max_norm):
        # A parameter that no response depends on has a gradient of zero.
        parts = []
        for param, total in zip(self.params, self.sums):
            part = torch.zeros_like(param) if total is None else total
            parts.append(part.flatten().float())
        self.vector = torch.cat(parts)
        self.discard()
        return self.vector.norm().item()


def overlap(policy, codec, examples, s, steps=4):
    """What would a step that trains one role do to the other one, on these very weights?

    Returns a dict {"A on B": cosine} between a step of Adam for role A and the gradient of role B,
    both of GRPO's loss, on the questions of `steps` steps each, and never the same questions. More
    than 0: the step helps B; less: it harms B. "A on A" shows what a step does to its own role on
    questions that it was not made for, so how much of it is noise. None where a gradient is zero,
    because in no group the rewards differ.
    """
    players = Players(policy, p2r_min.frozen_copy(policy), codec, judge=None)
    keeper = Gradient(policy, s.lr)
    gradients = {"perception": [], "reasoning": []}
    for phase, found in gradients.items():
        for half in (0, 1):
            # Other questions for the second half.
            questions = []
            for step in range(half * steps, (half + 1) * steps):
                questions += p2r_min.questions_of(examples, step, s)
            generator = torch.Generator(policy.device).manual_seed(s.seed * 1_000_003 + half)
            experience = p2r_min.PHASES[phase](players, questions, s, generator)
            grpo.update_batch(
                policy, players.frozen, keeper, experience.groups, banned=codec.banned,
                kl=s.kl, clip=s.clip, max_norm=s.max_grad_norm)
            found.append(keeper.vector)

    # Adam's first step is close to the sign of the gradient: what is steep weighs no more in it
    # than what is flat. Cosines between the gradients themselves would speak of another optimizer.
    found = {}
    for one, (made, _) in gradients.items():
        for other, (_, met) in gradients.items():
            step = made / (made.abs() + 1e-8)
            found[f"{one} on {other}"] = cosine(step, met)
    return found


def cosine(a, b):
    # A zero vector has no direction: an angle to it would be made up.
    if not a.any() or not b.any():
        return None
    return F.cosine_similarity(a, b, dim=0).item()


# =============================================================================================
# Skip on a first reading: many runs, and their results in one file


def run_all(args, more, flags):
    """Play every schedule with every seed, args.jobs at a time, each in a process of its own.

    more: the settings that follow `--`, as a dict; flags: the same as they were typed.
    """
    # Seed by seed, so that a part of the experiment is balanced, too. A bad flag is found here.
    waiting = []
    for seed in range(args.first, args.seeds):
        for name in args.only:
            folder = folder_of(args.out, name, seed)
            settings(name, seed, args.updates, folder, more)
            if not (folder / "afterwards.json").exists():
                waiting.append((name, seed, folder))
    args.out.mkdir(parents=True, exist_ok=True)
    running = []

    def play_one(run):
        name, seed, folder = run
        command = [sys.executable, __file__, "play", "--only", name, "--seed", str(seed),
                   "--out", str(args.out), "--updates", str(args.updates), "--", *flags]

        # In a session of its own a run does not hear the terminal's Ctrl-C: see below.
        with folder.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True)
        running.append(process)
        return process.wait()

    # All of them. When this process is stopped nothing new begins, and what runs is asked, once,
    # to save.
    failed = []
    pool = ThreadPoolExecutor(args.jobs)
    try:
        statuses = tqdm(pool.map(play_one, waiting), "runs", total=len(waiting))
        for status, (_, _, folder) in zip(statuses, waiting):
            if status:
                failed.append(f"{folder}.log (status {status})")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            if process.poll() is None:
                process.terminate()
    if failed:
        raise InputError(f"{len(failed)} runs failed and the others are finished: read "
                         f"{', '.join(failed)}, then give the same command again")


def folder_of(out, name, seed):
    return out / f"{name.replace(' ', '')}-seed{seed}"


BLOCK = 7  # updates: what is logged at every update is kept as the mean of so many


def collect(out, updates):
    """All finished runs of a folder -> what assets/experiment.json holds."""
    runs = []
    for name in SCHEDULES:
        for folder in out.glob(f"{name.replace(' ', '')}-seed*/"):
            if (folder / "afterwards.json").exists():
                runs.append(collect_run(folder, name, updates))
    if not runs:
        raise InputError(f"there is no finished run in {out}: python tests/experiment.py run first")
    return {"updates": updates, "runs": sorted(runs, key=lambda run: run["seed"])}


def added(known, new):
    """Two results in one; where both have a run of the same schedule and seed, the new one stays.
    Raises InputError if they were compared at different updates."""
    if known["updates"] != new["updates"]:
        raise InputError(f"the results are of {known['updates']} updates, the runs of "
                         f"{new['updates']}: give another --results")
    runs = {(run["schedule"], run["seed"]): run for run in known["runs"] + new["runs"]}
    return {"updates": new["updates"], "runs": sorted(runs.values(), key=lambda run: run["seed"])}


def collect_run(folder, name, updates):
    """One run as a dict: what was measured (`curve`), what was logged, what was asked afterwards.

    A call is a prompt that the policy or the frozen copy answered once.
    """
    config = json.loads((folder / "config.json").read_text())
    metrics = evaluation.read_jsonl(folder / "metrics.jsonl")
    measured = evaluation.read_jsonl(folder / "accuracy.jsonl")
    if updates not in [row["step"] for row in measured]:
        raise InputError(f"{folder} was not measured at {updates} updates: give the --updates that "
                         f"it was made with")

    # Calls and seconds that it took to get to each step.
    calls, seconds = [0], [0.0]
    for row in metrics:
        calls.append(calls[-1] + config["questions"] * config["group"] + row["partner_calls"])
        parts = ("seconds_rollout", "seconds_partner", "seconds_update")
        seconds.append(seconds[-1] + sum(row[part] for part in parts))

    # A run without roles is measured as it is trained: without roles.
    mode = "plain" if name == "think" else "p2r"
    curve = {}
    for key in ("step", "p2r", "plain", "hit", "oracle"):
        curve[key] = [row[key] for row in measured]
    curve["accuracy"] = curve[mode]
    curve["calls"] = [calls[step] for step in curve["step"]]
    curve["seconds"] = [seconds[step] for step in curve["step"]]

    # Kinds of questions, at the updates that are compared. (A pair is [p2r, plain].)
    last = measured[curve["step"].index(updates)]
    kinds = {}
    for kind, (p2r, plain) in last["categories"].items():
        kinds[kind] = plain if mode == "plain" else p2r

    # The logs, thinned out. No value of a block may exist: no boxes have no size.
    logged = {"step": list(range(BLOCK, len(metrics) + BLOCK, BLOCK))}
    for key in ("reward_mean", "boxes", "box_area", "zero_variance", "entropy"):
        logged[key] = []
        for start in range(0, len(metrics), BLOCK):
            values = [row[key] for row in metrics[start:start + BLOCK]]
            logged[key].append(mean(value for value in values if value is not None))

    afterwards = json.loads((folder / "afterwards.json").read_text())
    return {"schedule": name, "seed": config["seed"], "n": last["n"], "kinds": kinds,
            "curve": curve, "logged": logged, **afterwards}


def main(arguments=None):
    """Raises InputError for what the user can mend."""
    # What follows `--` are settings of p2r_min.py.
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    flags = []
    if "--" in arguments:
        place = arguments.index("--")
        arguments, flags = arguments[:place], arguments[place + 1:]
    of_settings = argparse.ArgumentParser(prog="experiment.py ... --")
    evaluation.add_flags(of_settings, Settings)
    more = vars(of_settings.parse_args(flags))

    # The flags of the experiment itself.
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "collect", "play"),
                        help="all runs, their results in one file, or one run in this process")
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"), help="of the runs")
    parser.add_argument("--only", nargs="+", choices=SCHEDULES, default=list(SCHEDULES),
                        metavar="NAME", help=", ".join(SCHEDULES))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of `run`: 0, 1, ... below this")
    parser.add_argument("--first", type=int, default=0, help="of `run`: the first seed")
    parser.add_argument("--seed", type=int, default=0, help="of `play`")
    parser.add_argument("--updates", type=int, default=UPDATES, help="at which is compared")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; 1 on a GPU")
    parser.add_argument("--results", type=Path, default=ROOT / "assets" / "experiment.json")
    parser.add_argument("--add", action="store_true",
                        help="of `collect`: keep the runs that the results hold already")
    args = parser.parse_args(arguments)
    args.out = args.out.resolve()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    if args.what == "run":
        run_all(args, more, flags)
    elif args.what == "play":
        folder = folder_of(args.out, args.only[0], args.seed)
        s = settings(args.only[0], args.seed, args.updates, folder, more)
        play(args.only[0], s, args.updates)
    else:
        found = collect(args.out, args.updates)
        if args.add:
            found = added(json.loads(args.results.read_text()), found)
        # Four digits are more than a seed is worth, and a third of the size.
        text = json.dumps(found)
        found = json.loads(text, parse_float=lambda number: round(float(number), 4))
        args.results.write_text(json.dumps(found) + "\n")
        print(f"{len(found['runs'])} runs in {args.results}")


if __name__ == "__main__":
    sys.exit(evaluation.run_program("experiment.py", main,
                                    hint="the same command goes on where it stopped"))
