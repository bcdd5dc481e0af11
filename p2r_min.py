"""PRA-GRPO for Perceive-to-Reason, on one GPU, in plain PyTorch.

    python p2r_min.py                                        # a tiny world, on a laptop's CPU
    python p2r_min.py --model Qwen/Qwen3-VL-2B-Instruct --data train.jsonl

One vision-language model plays two roles. As *Perceiver* it looks at the whole image and answers
with boxes around the evidence; as *Reasoner* it sees the boxes drawn, the crops enlarged, and
answers. Training knows only whether the final answer is right. It alternates two phases; in each,
one role is sampled and trained with GRPO while a frozen copy of the model plays the other role:

    for every iteration, for every phase in (perception, reasoning):
        frozen <- copy of the model             # the other role, and the reference of the KL
        for every batch of questions:
            perception: sample G box lists; frozen reasoner answers from each;  reward = is it right
            reasoning:  frozen perceiver gives boxes; sample G answers;         reward = is it right
            update the model with GRPO on the sampled tokens

Read in this order: p2r_min.py, rollout.py, crop.py, grpo.py, eval.py, toy.py.

Paper: arXiv 2607.01191. Where we depart from it or from the authors' code, and why:
 1. One process. The sampler, the frozen partner and the trainer share one GPU and take turns, so
    there are no servers, no weight transfer, and the log-probs of sampler and trainer can be compared.
 2. One frozen copy a phase is both partner and KL reference. (The authors serve the partner apart,
    with the same weights.)
 3. An answer without <answer> tags earns 0 in training as in evaluation. (The authors score the
    whole text in training, and the model is then marked wrong in evaluation for the same habit.)
 4. Prompts are worded by us, and are the same in training and in evaluation.
 5. Vision tokens cannot be sampled; they would break the next forward. Neither are they scored.
 6. Evidence reaches the partner as pixels, not through JPEG: what is trained is what was seen.
 7. The frozen perceiver may write --perceive-tokens, as when it is trained (the authors: 2048).
 8. Free-form answers are right when they match the truth word for word (the authors ask a judge).
    Option letters and numbers are read by stricter rules (eval.py), boxes by a more patient one (crop.py).
 9. Masters in float32 live on across phases; Adam's moments start fresh in each, as in the paper,
    where each phase is a launch of its own.
10. Questions are drawn in shuffled passes over the data that run on across phases; the paper makes
    one pass a phase. At its sizes (10k questions, 156 steps of 64) that is the same to 0.2 %.
11. Prompts have no length limit of their own: the pixel budget bounds them. Images below 4,096 px are
    scaled up to it in both roles.
12. Accuracy is measured as training samples: same budget and limits, greedy, no repetition penalty.
    (The authors evaluate at 4,194,304 px with penalty 1.05 and 256 / 1024 tokens.)
"""

import argparse
import copy
import dataclasses
import json
import random
import shutil
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
from crop import parse_boxes, picture, violation
from rollout import InputError, find_model, load, perceive, reason


def setting(default, group, text):
    return dataclasses.field(default=default, metadata={"group": group, "help": text})


@dataclass
class Settings:
    """Everything that can be chosen. Defaults are the paper's; the command line is made from this."""
    model: str = setting("", "what", "Qwen3-VL: a hub id or a folder; without it the embedded toy")
    data: str = setting("", "what", "training questions, JSONL (eval.py tells the fields)")
    eval_data: str = setting("", "what", "held-out questions, JSONL; without it accuracy is not measured")
    images: str = setting("", "what", "folder that relative image paths start from; default: the data file's")
    out: str = setting("", "what", "run folder; default: the first free runs/NAME-1, -2, ...")

    iterations: int = setting(1, "schedule", "times perception + reasoning")
    steps: int = setting(156, "schedule", "optimizer steps a phase")
    questions: int = setting(64, "schedule", "questions a step (Q)")
    eval_every: int = setting(0, "schedule", "steps between measurements; 0: only before and after")
    save_every: int = setting(50, "schedule", "steps between checkpoints; 0: only at the end")
    sample_every: int = setting(10, "schedule", "steps between sample pictures; 0: none")
    seed: int = setting(0, "schedule", "of the data order and the sampler")

    group: int = setting(8, "algorithm", "samples a question (G)")
    lr: float = setting(1e-6, "algorithm", "learning rate, constant")
    kl: float = setting(0.01, "algorithm", "coefficient of the KL to the frozen copy; 0 switches it off")
    clip: float = setting(0.2, "algorithm", "the ratio is clipped to 1 +- this; acts only from the second update on")
    updates: int = setting(1, "algorithm", "optimizer steps on each batch")
    weight_decay: float = setting(0.01, "algorithm", "of AdamW, betas are 0.9 and 0.999")
    max_grad_norm: float = setting(1.0, "algorithm", "the gradient is scaled down to this norm")

    max_pixels: int = setting(2_097_152, "limits", "pixel budget of every image the model sees, crops too")
    perceive_tokens: int = setting(1024, "limits", "longest Perceiver response")
    reason_tokens: int = setting(2048, "limits", "longest Reasoner response")
    rollout_batch: int = setting(8, "limits", "questions sampled together, G responses each. At 2B the cache takes 112 KiB a "
                                 "token: of each prompt once, and of each response")
    partner_batch: int = setting(16, "limits", "prompts that the frozen partner, or evaluation, answers together")

    def check(self):
        """Raises InputError for the first setting that cannot work."""
        if not self.data:
            raise InputError("--model needs --data: a JSONL file with image, question and answer on each line")
        if self.group < 2:
            raise InputError(f"--group {self.group}: GRPO compares the samples of a group, so it needs at least 2")
        for name in ("iterations", "steps", "questions", "updates", "max_pixels", "perceive_tokens",
                     "reason_tokens", "rollout_batch", "partner_batch", "lr", "clip", "max_grad_norm"):
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
    score: object             # (text, example) -> eval.Score
    fixed: dict               # reasoning phase: example -> (the frozen perceiver's text, its Parsed)


@dataclass
class Rollouts:
    """One batch, sampled and rewarded."""
    groups: list              # Q rollout.Groups, each with G completions of the trained role
    rewards: torch.Tensor     # (Q, G)
    parsed: list              # crop.Parsed of every perceiver output of the batch
    scores: list              # eval.Score of every reasoner output of the batch
    void: int                 # rollouts that earned 0 by their boxes alone
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
    cases = {evidence(q, p): (batch[q], p.boxes) for q, row in enumerate(parsed) for p in row if not violation(p.boxes)}
    answers = reason(play.frozen, play.codec, waiting(cases.values(), "frozen reasoner"), greedy=True,
                     max_tokens=s.reason_tokens, batch=s.partner_batch)
    texts = {key: group.completions[0].text for key, group in zip(cases, answers)}
    scores = {key: play.score(text, batch[key[0]]) for key, text in texts.items()}
    rewards = torch.tensor([[0.0 if violation(p.boxes) else scores[evidence(q, p)].reward for p in row]
                            for q, row in enumerate(parsed)])                            # (Q, G)
    seconds = time.perf_counter() - start
    flat, first = [p for row in parsed for p in row], parsed[0][0]
    shown = (batch[0], first.boxes, groups[0].completions[0].text,
             texts.get(evidence(0, first), f"(not asked: {violation(first.boxes)})"), rewards[0, 0].item())
    return Rollouts(groups, rewards, flat, list(scores.values()), sum(bool(violation(p.boxes)) for p in flat),
                    len(cases), seconds, shown)


def evidence(q, parsed):
    """Equal keys, equal evidence: the question's place in the batch and the coordinates in order."""
    return q, tuple(box[:4] for box in parsed.boxes)


def reasoning(play, batch, s, generator):
    """The frozen copy perceives, once a question and phase; the policy reasons, G times; its answers pay."""
    start = time.perf_counter()
    new = [example for example in dict.fromkeys(batch) if example not in play.fixed]
    found = perceive(play.frozen, play.codec, waiting(new, "frozen perceiver"), greedy=True,
                     max_tokens=s.perceive_tokens, batch=s.partner_batch)
    for example, group in zip(new, found):
        text = group.completions[0].text
        play.fixed[example] = text, play.read_boxes(text)
    seconds = time.perf_counter() - start
    cases = [(example, play.fixed[example][1].boxes) for example in batch]
    groups = list(reason(play.policy, play.codec, waiting(cases, "sampling answers"), group=s.group,
                         max_tokens=s.reason_tokens, batch=s.rollout_batch, generator=generator))
    scores = [[play.score(c.text, example) for c in group.completions] for example, group in zip(batch, groups)]
    rewards = torch.tensor([[score.reward for score in row] for row in scores])          # (Q, G)
    shown = (*cases[0], play.fixed[batch[0]][0], groups[0].completions[0].text, rewards[0, 0].item())
    return Rollouts(groups, rewards, [play.fixed[example][1] for example in batch],
                    [score for row in scores for score in row], 0, len(new), seconds, shown)


PHASES = {"perception": perception, "reasoning": reasoning}


# ---------------------------------------------------------------------------------------------
# The alternating loop


def train(s, read_boxes=parse_boxes, score=evaluation.score):
    """Run PRA-GRPO with Settings `s`. Returns the run folder.

    read_boxes: text -> crop.Parsed. score: (text, example) -> eval.Score. Another reward or another
    box format is another function here; tests and benchmarks inject theirs the same way.
    Raises InputError for input that the user can mend: all but broken pixels before the first step.
    """
    s.check()
    examples = evaluation.load_data(s.data, s.images)
    held_out = evaluation.load_data(s.eval_data, s.images) if s.eval_data else []
    source = find_model(s.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy, codec = load(source, s.max_pixels, device)
    codec.check(example.question for example in examples + held_out)
    run = new_run_folder(s)
    # Activation checkpointing on language and vision layers; transformers renamed the switch in 5.2x.
    checkpointing = getattr(policy, "activation_checkpointing_enable", None) or policy.gradient_checkpointing_enable
    checkpointing({"use_reentrant": False})
    optimizer = grpo.MasterAdamW(policy, s.lr, weight_decay=s.weight_decay)

    def measure():
        return evaluation.evaluate(policy, codec, held_out, perceive_tokens=s.perceive_tokens,
                                   reason_tokens=s.reason_tokens, batch=s.partner_batch)

    report = {}
    if held_out:
        report = {"before": measure(), "during": []}
        write_json(run / "eval.json", report)
    step, total = 0, s.iterations * len(PHASES) * s.steps
    if policy.num_parameters() > 1e8:
        parts = grpo.estimate_memory(policy, s).items()
        print("estimated peak memory: " + ", ".join(f"{gib:.0f} GiB {doing}" for doing, gib in parts))
    bar = tqdm(total=total, unit="step")
    for iteration in range(1, s.iterations + 1):
        for phase, collect in PHASES.items():
            # One frozen copy for the whole phase: it plays the other role and anchors the KL.
            frozen = copy.deepcopy(policy).eval().requires_grad_(False)
            play = Players(policy, frozen, codec, read_boxes, score, fixed={})
            optimizer.reset()
            bar.set_description(f"iteration {iteration} {phase}")
            for _ in range(s.steps):
                start = time.perf_counter()
                batch = draw(examples, step, s)
                generator = torch.Generator(device).manual_seed(s.seed * 1_000_003 + step)
                rollouts = collect(play, batch, s, generator)  # ends, as the update does, by fetching results: the GPU is done
                sampled = time.perf_counter()
                update = grpo.update_batch(
                    policy, frozen, optimizer, rollouts.groups, grpo.group_advantages(rollouts.rewards),
                    banned=codec.banned, kl=s.kl, clip=s.clip, max_norm=s.max_grad_norm, updates=s.updates)
                step += 1
                metrics = {"step": step, "iteration": iteration, "phase": phase, **summary(rollouts), **update,
                           "seconds_rollout": sampled - start - rollouts.seconds_partner,
                           "seconds_partner": rollouts.seconds_partner, "seconds_update": time.perf_counter() - sampled,
                           "peak_gib": peak_gib(device), "lr": s.lr}
                metrics["tokens_per_s"] = metrics["tokens"] / metrics["seconds_rollout"]
                log(run, metrics)
                if step == 1 and policy.num_parameters() > 1e8:
                    hours = (total - 1) * (time.perf_counter() - start) / 3600
                    tqdm.write(f"time left, estimated from the first step: {hours:.1f} hours")
                if s.sample_every and (step == 1 or step % s.sample_every == 0):
                    save_sample(run, step, phase, *rollouts.shown)
                bar.set_postfix(reward=f"{metrics['reward_mean']:.2f}", kl=f"{metrics['kl']:.3f}")
                bar.update()
                if s.save_every and step % s.save_every == 0 and step < total:
                    save_model(policy, source, run / "checkpoint")
                if held_out and s.eval_every and step % s.eval_every == 0 and step < total:
                    report["during"].append({"step": step, **measure()})
                    write_json(run / "eval.json", report)
            del play, frozen  # before the next copy is made
    bar.close()
    save_model(policy, source, run / "final")
    if held_out:
        report["after"] = measure()
        write_json(run / "eval.json", report)
        evaluation.print_table(report)
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


# ---------------------------------------------------------------------------------------------
# Log, pictures, checkpoints


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
        "void": rollouts.void / len(completions),
        "boxes": len(boxes) / len(rollouts.parsed),
        "box_area": mean((b.x2 - b.x1) * (b.y2 - b.y1) / 1e6 for b in boxes),
        "partner_calls": rollouts.partner_calls,
    }


def waiting(items, text):
    """A progress bar for what takes longer than a few seconds; it leaves no trace."""
    return tqdm(list(items), text, leave=False, delay=5, unit="prompt")


def peak_gib(device):
    """Peak memory so far: of the GPU, or of the process on a CPU, in GiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return None
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(30 if sys.platform == "darwin" else 20)  # bytes or KiB


def log(run, metrics):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics) + "\n")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def save_sample(run, step, phase, example, boxes, perceived, reasoned, reward):
    texts = [("perceiver", perceived), ("reasoner", reasoned), ("truth", example.answer), ("reward", f"{reward:g}")]
    (run / "samples").mkdir(exist_ok=True)
    picture(example.load_image(), boxes, example.question, texts).save(run / "samples" / f"{step:05d}-{phase}.png")


WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf", ".h5", ".msgpack", ".onnx")


def save_model(policy, source, folder):
    """bf16 weights and every other file of the original folder: from_pretrained and vLLM can load it."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    weights = {name: p.detach().to(torch.bfloat16) for name, p in policy.named_parameters()}  # tied ones once
    policy.save_pretrained(new, state_dict=weights)
    for file in Path(source).rglob("*"):
        place = file.relative_to(source)
        if file.is_file() and not file.name.endswith(WEIGHT_FILES) and not place.parts[0].startswith("."):
            (new / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, new / place)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)  # a killed run leaves the old one or the new one, never half of one


def new_run_folder(s):
    """Make the run folder and write config.json. Raises InputError rather than mix two runs."""
    if s.out:
        run = Path(s.out)
    else:
        run = next(path for i in range(1, sys.maxsize) if not (path := Path(f"runs/{Path(s.model).name}-{i}")).exists())
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise InputError(f"--out {run} already exists and is not empty: choose another folder")
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", dataclasses.asdict(s) | {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}})
    return run


def main(arguments=None):
    """The command line, made from Settings. Explicit flags win over the toy's values."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    groups = {}
    for field in dataclasses.fields(Settings):
        group = field.metadata["group"]
        groups.setdefault(group, parser.add_argument_group(group)).add_argument(
            "--" + field.name.replace("_", "-"), type=field.type, default=argparse.SUPPRESS,
            help=f"{field.metadata['help']} (default: {'none' if field.default == '' else field.default})".replace("%", "%%"))
    explicit = vars(parser.parse_args(arguments))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        settings = Settings(**((toy.defaults() if "model" not in explicit else {}) | explicit))
        print("\n".join(f"{name:16} {value}" for name, value in dataclasses.asdict(settings).items()))
        train(settings)
    except InputError as error:
        print(f"p2r_min.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
