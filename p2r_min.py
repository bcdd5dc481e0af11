"""PRA-GRPO for Perceive-to-Reason, on one GPU, in plain PyTorch.

    python p2r_min.py                                        # a tiny world, on a laptop's CPU
    python p2r_min.py --model Qwen/Qwen3-VL-2B-Instruct      # the paper's data, from the hub

One vision-language model plays two roles. As *Perceiver* it looks at the whole image and answers
with boxes around the evidence; as *Reasoner* it sees the boxes drawn, the crops enlarged, and
answers. Training knows only whether the final answer is right. It alternates two phases; in each,
one role is sampled and trained with GRPO while a frozen copy of the model plays the other role:

    for every iteration, for every phase of the schedule (the paper's: perception, then reasoning):
        frozen <- copy of the model             # the other role, and the reference of the KL
        for every batch of questions:
            perception: sample G box lists; frozen reasoner answers from each;  reward = is it right
            reasoning:  frozen perceiver gives boxes; sample G answers;         reward = is it right
            update the model with GRPO on the sampled tokens

Read in this order: p2r_min.py, rollout.py, crop.py, grpo.py, eval.py, toy.py. (The second half of
grpo.py, checkpoints and resume, can wait until a run is lost.)

Paper: arXiv 2607.01191. Where we depart from it or from the authors' code, and why: README.md, "Departures".
"""

import argparse
import copy
import dataclasses
import functools
import itertools
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import eval as evaluation
import grpo
import toy
from crop import Parsed, parse_boxes, picture, tricks, violation
from eval import setting
from rollout import REGIONS, InputError, find, fitting, load, perceive, reason, waiting

SCHEDULES = {  # the phases of an iteration; each begins with a new frozen copy and new moments, and has --steps updates
    "alternate": ("perception", "reasoning"),   # the paper
    "joint": ("joint", "joint"),                # every update trains both roles
    "perceiver": ("perception", "perception"),  # only this role is ever trained
    "reasoner": ("reasoning", "reasoning"),
    "think": ("thinking", "thinking"),          # no roles: think and answer on the plain image
}


@dataclass
class Settings:
    """Everything that can be chosen. Defaults are the paper's, but for README.md's departures; the command line is made from this."""
    model: str = setting("", "what", "Qwen3-VL: a hub id or a folder; without it the embedded toy")
    data: str = setting("hongxingli/P2R-10k", "what", "training questions: a file, folder or hub id (eval.py tells the formats)")
    eval_data: str = setting("", "what", "held-out questions; without them accuracy is not measured")
    images: str = setting("", "what", "folder that relative image paths start from; default: the data file's")
    skip_bad: bool = setting(False, "what", "leave bad rows of the data out, and count them, instead of stopping")
    out: str = setting("", "what", "run folder; default: the first free runs/NAME-1, -2, ...")

    schedule: str = setting("alternate", "schedule", "who is trained when: in turn (the paper), both in every update, one role alone, or "
                            "no roles, on the plain image", tuple(SCHEDULES))
    iterations: int = setting(1, "schedule", "times that the schedule's phases are run")
    steps: int = setting(156, "schedule", "steps a phase: batches of questions, with --updates optimizer steps each")
    questions: int = setting(64, "schedule", "questions a step (Q)")
    eval_every: int = setting(0, "schedule", "steps between measurements; 0: only before and after")
    save_every: int = setting(10, "schedule", "steps between checkpoints, of which the newest two stay; 0: only at the end")
    sample_every: int = setting(10, "schedule", "steps between sample pictures; 0: none")
    seed: int = setting(0, "schedule", "of the data order and the sampler")

    group: int = setting(8, "algorithm", "samples a question (G)")
    lr: float = setting(1e-6, "algorithm", "learning rate, constant")
    kl: float = setting(0.01, "algorithm", "coefficient of the KL to the frozen copy; 0 switches it off")
    clip: float = setting(0.2, "algorithm", "the ratio is clipped to 1 +- this; acts only from the second update on")
    evidence: str = setting("both", "algorithm", "what the Reasoner sees of the boxes", tuple(REGIONS))
    judge: str = setting("self", "algorithm", "who settles free-form answers in other words: self (the frozen copy), none, "
                         "or another model, which then also measures")
    updates: int = setting(1, "algorithm", "optimizer steps on each batch")
    weight_decay: float = setting(0.01, "algorithm", "of AdamW, betas are 0.9 and 0.999")
    max_grad_norm: float = setting(1.0, "algorithm", "the gradient is scaled down to this norm")
    strict_boxes: bool = setting(False, "algorithm", "whole-image, nested, more than three or unparsable boxes earn 0 in the "
                                 "perception phase; the paper lets them be")

    max_pixels: int = setting(2_097_152, "limits", "pixel budget of every image the model sees, crops too")
    perceive_tokens: int = setting(1024, "limits", "longest Perceiver response")
    reason_tokens: int = setting(2048, "limits", "longest Reasoner response")
    text_tokens: int = setting(512, "limits", "room for a prompt's text, beside its images at full budget")
    rollout_batch: int = setting(8, "limits", "questions sampled together, G responses each. At 2B the cache takes 112 KiB a "
                                 "token: of each prompt once, and of each response")
    partner_batch: int = setting(16, "limits", "prompts that the frozen partner, or evaluation, answers together")

    @property
    def total(self):
        """Steps of the whole run."""
        return self.iterations * len(SCHEDULES[self.schedule]) * self.steps

    def check(self):
        """Raises InputError for the first setting that cannot work."""
        if "joint" in SCHEDULES[self.schedule] and self.questions < 2:
            raise InputError(f"--schedule {self.schedule} gives each role half of the questions, so --questions must be at least 2")
        if self.group < 2:
            raise InputError(f"--group {self.group}: GRPO compares the samples of a group, so it needs at least 2")
        for name in ("iterations", "steps", "questions", "updates", "max_pixels", "perceive_tokens",
                     "reason_tokens", "text_tokens", "rollout_batch", "partner_batch", "lr", "clip", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} must be more than 0")


# ---------------------------------------------------------------------------------------------
# The two phases: from a batch of questions to groups and rewards


@dataclass
class Players:
    """Who plays, and by which rules. `frozen` and `fixed` are renewed at every phase start."""
    policy: torch.nn.Module
    frozen: torch.nn.Module   # the policy as it was when the phase began
    codec: object             # rollout.Codec of both
    read_boxes: object        # text -> crop.Parsed
    grade: object             # (text, example) pairs -> an eval.Score each
    fixed: dict               # reasoning: example -> (the frozen perceiver's text, its Parsed)


@dataclass
class Rollouts:
    """One batch, sampled and rewarded."""
    groups: list              # Q rollout.Groups, each with G completions of a trained role
    rewards: torch.Tensor     # (Q, G)
    parsed: list              # crop.Parsed of every perceiver output of the batch
    scores: list              # eval.Score of every reasoner output of the batch
    void: int                 # rollouts that earned 0 by their boxes alone
    unearned: int             # unparsable box lists that earned what the plain image earns
    partner_calls: int        # prompts that the frozen partner answered
    seconds_partner: float
    shown: tuple              # (example, boxes, perceiver's text, reasoner's text, reward) of one rollout


def perception(play, batch, s, generator):
    """The policy perceives, G times a question; the frozen copy reasons; its answer pays the boxes."""
    groups = list(perceive(play.policy, play.codec, waiting(batch, "sampling boxes"), group=s.group,
                           max_tokens=s.perceive_tokens, batch=s.rollout_batch, generator=generator))
    start = time.perf_counter()
    parsed = [[play.read_boxes(c.text) for c in group.completions] for group in groups]  # Q rows of G
    # The partner is greedy, so equal boxes get equal answers: each distinct evidence is asked once.
    # (Labels never reach it; the order of the boxes does.) Void rollouts earn 0 and need no answer.
    void = [[violation(p.boxes) or (s.strict_boxes and ", ".join(sorted(tricks(p)))) for p in row] for row in parsed]
    cases = {evidence(q, p): (batch[q], p.boxes) for q, row in enumerate(parsed) for p, why in zip(row, void[q]) if not why}
    answers = reason(play.frozen, play.codec, waiting(cases.values(), "frozen reasoner"), s.evidence, greedy=True,
                     max_tokens=s.reason_tokens, batch=s.partner_batch)
    texts = {key: group.completions[0] for key, group in zip(cases, answers)}
    scores = dict(zip(texts, play.grade([(c.text, batch[key[0]]) for key, c in texts.items()])))
    rewards = torch.tensor([[0.0 if why else scores[evidence(q, p)].reward for p, why in zip(row, void[q])]
                            for q, row in enumerate(parsed)])                            # (Q, G)
    seconds = time.perf_counter() - start
    flat, first = [p for row in parsed for p in row], evidence(0, parsed[0][0])
    shown = (batch[0], parsed[0][0].boxes, groups[0].completions[0],
             f"(not asked: {void[0][0]})" if void[0][0] else texts[first], rewards[0, 0].item())
    unearned = sum(reward > 0 and not p.parsable for p, reward in zip(flat, rewards.flatten().tolist()))
    return Rollouts(groups, rewards, flat, list(scores.values()), sum(map(bool, sum(void, []))), unearned, len(cases), seconds, shown)


def evidence(q, parsed):
    """Equal keys, equal evidence: the question's place in the batch and the coordinates in order."""
    return q, tuple(box[:4] for box in parsed.boxes)


def reasoning(play, batch, s, generator, plain=False):
    """The frozen copy perceives, once a question and phase; the policy reasons, G times; its answers pay.
    With `plain` there are no roles: the policy thinks and answers on the plain image."""
    start = time.perf_counter()
    fixed = dict.fromkeys(batch, ("(nobody perceives)", Parsed([], True, 0))) if plain else play.fixed
    new = [example for example in dict.fromkeys(batch) if example not in fixed]
    found = perceive(play.frozen, play.codec, waiting(new, "frozen perceiver"), greedy=True,
                     max_tokens=s.perceive_tokens, batch=s.partner_batch)
    texts = [group.completions[0].text for group in found]  # all of them before any is kept: an image may fail
    fixed.update((example, (text, play.read_boxes(text))) for example, text in zip(new, texts))
    seconds = time.perf_counter() - start
    cases = [(example, fixed[example][1].boxes) for example in batch]
    groups = list(reason(play.policy, play.codec, waiting(cases, "sampling answers"), s.evidence, group=s.group,
                         max_tokens=s.reason_tokens, batch=s.rollout_batch, generator=generator))
    scores = play.grade([(c.text, example) for example, group in zip(batch, groups) for c in group.completions])
    rewards = torch.tensor([score.reward for score in scores]).view(len(batch), s.group)  # (Q, G)
    shown = (*cases[0], fixed[batch[0]][0], groups[0].completions[0], rewards[0, 0].item())
    return Rollouts(groups, rewards, [fixed[example][1] for example in batch], scores, 0, 0, len(new), seconds, shown)


def joint(play, batch, s, generator):
    """Both roles in one update: the first half of the questions trains the Perceiver, the rest the Reasoner, G samples
    each. The loss is one mean over all tokens, so the role that writes more weighs more."""
    half = len(batch) // 2
    a, b = perception(play, batch[:half], s, generator), reasoning(play, batch[half:], s, generator)
    sums = {name: getattr(a, name) + getattr(b, name) for name in ("groups", "parsed", "scores", "void", "unearned",
                                                                   "partner_calls", "seconds_partner")}
    return Rollouts(**sums, rewards=torch.cat([a.rewards, b.rewards]), shown=a.shown)


PHASES = {"perception": perception, "reasoning": reasoning, "joint": joint, "thinking": functools.partial(reasoning, plain=True)}


# ---------------------------------------------------------------------------------------------
# The loop


def train(s, read_boxes=parse_boxes, score=evaluation.score, resume=False):
    """Run PRA-GRPO with Settings `s`; with `resume`, go on with the run in the folder s.out. Returns the run folder.

    read_boxes: text -> crop.Parsed. score: (text, example) -> eval.Score. Another reward or another
    box format is another function here; tests and benchmarks inject theirs the same way.
    Raises InputError for what the user can mend, after saving if it happens in the loop; a reward is never invented.
    """
    s.check()
    examples = evaluation.load_data(s.data, s.images, s.skip_bad)
    held_out = evaluation.load_data(s.eval_data, s.images, s.skip_bad, "--eval-data") if s.eval_data else []
    source, device = find(s.model), evaluation.device()
    policy, codec = load(source, s.max_pixels, device)
    codec.check(example.question for example in examples + held_out)
    examples, held_out = (fitting(codec, some, s.text_tokens, max(s.perceive_tokens, s.reason_tokens), s.skip_bad)
                          for some in (examples, held_out))
    judge = evaluation.Judge.load(s.judge, device) if s.judge not in ("self", "none") else None
    run = Path(s.out) if resume else grpo.new_run_folder(s)
    # Activation checkpointing on language and vision layers; transformers renamed the switch in 5.2x.
    checkpointing = getattr(policy, "activation_checkpointing_enable", None) or policy.gradient_checkpointing_enable
    checkpointing({"use_reentrant": False})
    optimizer = grpo.MasterAdamW(policy, s.lr, weight_decay=s.weight_decay)
    last, state = grpo.go_on(run, s, examples) if resume else (None, {})
    step, report, bad_steps = state.get("step", 0), state.get("report", {}), state.get("bad_steps", 0)
    if last:
        optimizer.load_masters(last)

    how = evaluation.Protocol(evidence=s.evidence, max_pixels=s.max_pixels, perceive_tokens=s.perceive_tokens,
                              reason_tokens=s.reason_tokens, penalty=1.0, batch=s.partner_batch)

    def measure():
        return evaluation.evaluate(policy, codec, held_out, how, judge)  # a model never grades itself here

    def save():
        """All that the next step depends on, beside what `draw` and the sampler's seed derive from its number."""
        tensors, fixed = optimizer.state(), {}
        if step % s.steps:
            tensors["frozen"] = dict(frozen.named_parameters())
            fixed = {place: play.fixed[example][0] for place, example in enumerate(examples) if example in play.fixed}
        else:
            del tensors["optimizer"]  # the next phase starts with a frozen copy, boxes and moments of its own
        grpo.save_checkpoint(run, source, tensors, dict(
            step=step, iteration=iteration, phase=phase, settings=dataclasses.asdict(s), data=grpo.data_key(examples),
            fixed=fixed, report=report, bad_steps=bad_steps, random=grpo.random_state()))

    print(grpo.disk_use(run, policy))
    real = policy.num_parameters() > 1e8
    if real:
        print("estimated peak memory: " + ", ".join(f"{gib:.0f} GiB {doing}" for doing, gib in grpo.estimate_memory(policy, s).items()))
    iteration, phase, end = 1, SCHEDULES[s.schedule][0], 0
    with grpo.kept(run, save) as asked_to_stop, tqdm(total=s.total, initial=step, unit="step") as bar:
        if held_out:
            report = report or {"before": measure(), "during": []}
            grpo.write_json(run / "eval.json", report)
        for iteration, phase in itertools.product(range(1, s.iterations + 1), SCHEDULES[s.schedule]):
            end += s.steps
            if step >= end:
                continue  # this phase was over before the run was resumed
            # One frozen copy for the whole phase: it plays the other role and anchors the KL.
            frozen = copy.deepcopy(policy).eval().requires_grad_(False)
            grade = functools.partial(evaluation.grade, rule=score,
                                      judge=evaluation.Judge(frozen, codec.tokenizer) if s.judge == "self" else judge)
            play = Players(policy, frozen, codec, read_boxes, grade, fixed={})
            optimizer.reset()
            if step % s.steps:  # resumed inside this phase
                grpo.read_into(last / "frozen.safetensors", dict(frozen.named_parameters()))
                optimizer.load_moments(last)
                play.fixed = {examples[int(i)]: (text, read_boxes(text)) for i, text in state["fixed"].items()}
            bar.set_description(f"iteration {iteration} {phase}")
            while step < end:
                due = held_out and s.eval_every and step > 0 and step % s.eval_every == 0
                if due and step not in [row["step"] for row in report["during"]]:
                    report["during"].append({"step": step, **measure()})
                    grpo.write_json(run / "eval.json", report)
                start = time.perf_counter()
                batch = draw(examples, step, s)
                generator = torch.Generator(device).manual_seed(s.seed * 1_000_003 + step)
                rollouts = PHASES[phase](play, batch, s, generator)  # ends, as the update does, by fetching results: the GPU is done
                sampled = time.perf_counter()
                update = grpo.update_batch(
                    policy, frozen, optimizer, rollouts.groups, grpo.group_advantages(rollouts.rewards),
                    banned=codec.banned, kl=s.kl, clip=s.clip, max_norm=s.max_grad_norm, updates=s.updates)
                step += 1
                update["nonfinite"] = bad = [batch[q].id for q in update["nonfinite"]]
                bad_steps = bad_steps + 1 if bad else 0  # in a row
                metrics = {"step": step, "iteration": iteration, "phase": phase, **summary(rollouts), **update, "skipped": int(bool(bad)),
                           "seconds_rollout": sampled - start - rollouts.seconds_partner,
                           "seconds_partner": rollouts.seconds_partner, "seconds_update": time.perf_counter() - sampled,
                           "peak_gib": grpo.peak_gib(device), "lr": s.lr}
                metrics["tokens_per_s"] = metrics["tokens"] / metrics["seconds_rollout"]
                grpo.append_json(run / "metrics.jsonl", metrics)
                if real and bar.n == bar.initial:
                    hours = (s.total - step) * (time.perf_counter() - start) / 3600
                    tqdm.write(f"time left, estimated from the first step: {hours:.1f} hours")
                if s.sample_every and (step == 1 or step % s.sample_every == 0):
                    save_sample(run, step, phase, *rollouts.shown)
                bar.set_postfix(reward=f"{metrics['reward_mean']:.2f}", kl=f"{metrics['kl']:.3f}")
                bar.update()
                if bad:
                    tqdm.write(f"step {step} updated nothing: loss or gradient is not finite for question {', '.join(bad)}")
                if bad_steps >= 3:
                    raise InputError(f"{bad_steps} updates in a row were not finite: look at question {', '.join(bad)}, or lower --lr")
                if step == s.total or asked_to_stop or (s.save_every and step % s.save_every == 0):
                    save()
                if asked_to_stop:
                    sys.exit(128 + asked_to_stop[0])
            del play, grade, frozen  # before the next copy is made
        if held_out:
            report["after"] = measure()
            grpo.write_json(run / "eval.json", report)
        grpo.save_model(policy, source, run / "final")
        grpo.finish(run, step)
    if held_out:
        evaluation.print_report(report)
    print(f"run folder: {run} (metrics.jsonl, samples/, final/)")
    return run


def draw(examples, step, s):
    """The Q questions of a step: shuffled passes over the data, one after another.

    A function of (seed, step) alone: no state to lose, and any step can be looked up later.
    """
    places = range(step * s.questions, (step + 1) * s.questions)
    orders = {}
    for epoch in {place // len(examples) for place in places}:
        orders[epoch] = random.Random(f"{s.seed}-{epoch}").sample(examples, len(examples))
    return [orders[place // len(examples)][place % len(examples)] for place in places]


def summary(rollouts):
    """The metrics of one batch's rollouts; README.md says what each one tells."""
    completions = [c for group in rollouts.groups for c in group.completions]
    tokens, boxes = sum(len(c.ids) for c in completions), [b for p in rollouts.parsed for b in p.boxes]
    mean = evaluation.mean
    return {
        "reward_mean": rollouts.rewards.mean().item(),
        "reward_std": rollouts.rewards.std(dim=1).mean().item(),
        "zero_variance": mean(grpo.equal_groups(rollouts.rewards)),
        "tokens": tokens,
        "response_tokens": tokens / len(completions),
        "truncated": mean(not c.ended for c in completions),
        "unparsable": mean(not p.parsable for p in rollouts.parsed),
        "unanswered": mean(not score.answered for score in rollouts.scores),
        "judged": mean(score.judged for score in rollouts.scores),
        "void": rollouts.void / len(completions),
        **{f"boxes_{name}": mean(name in tricks(p) for p in rollouts.parsed) for name in ("whole", "nested", "many")},
        "unparsable_rewarded": rollouts.unearned / len(completions),
        "boxes": len(boxes) / len(rollouts.parsed),
        "box_area": mean((b.x2 - b.x1) * (b.y2 - b.y1) / 1e6 for b in boxes),
        "partner_calls": rollouts.partner_calls,
    }


def save_sample(run, step, phase, example, boxes, perceived, reasoned, reward):
    texts = [("perceiver", perceived), ("reasoner", reasoned), ("truth", example.answer), ("reward", f"{reward:g}")]
    page = picture(example.load_image(), boxes, example.question, [(title, str(text)) for title, text in texts])
    (run / "samples").mkdir(exist_ok=True)
    page.save(run / "samples" / f"{step:05d}-{phase}.png")


def main(arguments=None):
    """The command line, made from Settings. Explicit flags win over the toy's values."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    evaluation.add_flags(parser, Settings)
    parser.add_argument("--resume", metavar="RUN",
                        help="go on with this run folder; may come with --" + ", --".join(sorted(grpo.MAY_CHANGE)).replace("_", "-"))
    explicit = vars(parser.parse_args(arguments))
    resume = explicit.pop("resume")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        settings = (grpo.settings_of(resume, Settings, explicit) if resume else
                    Settings(**((toy.defaults() if "model" not in explicit else {}) | explicit)))
        if resume and grpo.finished(settings.out) == settings.total:
            print(f"{resume} is finished: its weights are in {resume}/final (a larger --iterations would train it further)")
            return 0
        print("\n".join(f"{name:16} {value}" for name, value in dataclasses.asdict(settings).items()))
        train(settings, **({"resume": True} if resume else {}))
    except InputError as error:
        print(f"p2r_min.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
