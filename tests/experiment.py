"""The experiment that the paper leaves out: is it the two roles, is it the alternation, or is it just more RL?

    python tests/experiment.py --out runs/experiment                        # on the toy; two runs at a time on 2 cores
    python tests/experiment.py --out runs/experiment --draw                 # table, assets/experiment.json and .png, assets/curves.png
    python tests/experiment.py --draw --from-json assets/experiment.json    # the same from the results that are kept here
    python tests/experiment.py --out runs/experiment-2b --jobs 1 --seeds 3 --steps 156 -- --model Qwen/Qwen3-VL-2B-Instruct --eval-data FILE

Every variant is p2r_min.py itself with other --schedule, --iterations and --steps; everything else is the same: warm start,
data and their order, number of updates, questions and samples an update. The second axis, one long alternation against several
short ones, keeps the total of updates too, so a phase is shorter and the frozen copy is renewed more often.

Stopped with Ctrl-C, the same command goes on: finished runs are kept, a begun one is resumed. What follows `--` goes to
p2r_min.py (--questions 32, --lr 2e-6, ...; paths start from this repository). After a run its final weights, bf16 as they are
saved, are asked again with other evidence, in both roles.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
import grpo  # noqa: E402
import rollout  # noqa: E402
import toy  # noqa: E402
from p2r_min import SCHEDULES, Settings  # noqa: E402

VARIANTS = {**{name: (name, 1) for name in SCHEDULES}, "alternate x 2": ("alternate", 2), "alternate x 4": ("alternate", 4)}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 % quantile of t, n - 1 degrees


def commands(args, more):
    """{run folder: its p2r_min.py command}, a seed's variants together, so that a part of the experiment is balanced."""
    toys = [] if any(flag.split("=")[0] == "--model" for flag in more) else [f"--{name.replace('_', '-')}={value}" for name, value in (toy.defaults("toy-both") | {"questions": 10}).items()]
    if not toys and not any(flag.split("=")[0] == "--eval-data" for flag in more):
        sys.exit("experiment.py: --model needs --eval-data, or there is nothing to compare")
    for seed in range(args.seeds):
        for name, (schedule, times) in VARIANTS.items():
            run = args.out / f"{name.replace(' ', '')}-seed{seed}"
            phases = times * len(SCHEDULES[schedule])
            steps, rest = divmod(2 * args.steps, phases)
            if rest:
                sys.exit(f"experiment.py: 2 x --steps {args.steps} updates cannot be shared among {phases} phases; choose a multiple of 4")
            yield run, [*toys, "--eval-every", str(args.steps // 2), "--sample-every", "0", *more, "--schedule", schedule, "--iterations", str(times),
                        "--steps", str(steps), "--seed", str(seed), "--out", str(run)]


def settings_parser():
    """p2r_min.py's own flags."""
    parser = argparse.ArgumentParser()
    evaluation.add_flags(parser, Settings)
    return parser


def play(run, flags, threads):
    """Start, continue or keep one run, then ask its weights with each kind of evidence. Returns what went wrong, or None."""
    quiet = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if (run / "config.json").exists():
        known, asked = json.loads((run / "config.json").read_text()), vars(settings_parser().parse_args(flags))
        if changed := [f"{name} was {known[name]}, is {value}" for name, value in asked.items() if known[name] != value]:
            return f"{run} holds another run ({'; '.join(changed)}): choose another --out"
    if (run / "evidence.json").exists():
        return None
    begun = ["--resume", str(run)] if (run / "config.json").exists() else flags
    for command in ([sys.executable, "p2r_min.py", *begun], [sys.executable, __file__, "--out", str(run), "--ask-again"]):
        done = subprocess.run(command, **quiet)
        if done.returncode:
            return f"{run}: {' '.join(command[1:3])} ended with {done.returncode}: {done.stderr.splitlines()[-1:]}"


def ask_with_evidence(run):
    """run/evidence.json: accuracy of the final weights when the Reasoner sees both pictures and crops, or less."""
    s = Settings(**{k: v for k, v in json.loads((run / "config.json").read_text()).items() if k in Settings.__dataclass_fields__})
    examples = evaluation.load_data(s.eval_data, s.images, s.skip_bad)
    model, codec = rollout.load(run / "final", s.max_pixels, evaluation.device())
    how = evaluation.Protocol(max_pixels=s.max_pixels, perceive_tokens=s.perceive_tokens, reason_tokens=s.reason_tokens,
                              penalty=1.0, batch=s.partner_batch)
    found = {kind: evaluation.mean(r["reward"] for r in evaluation.ask(model, codec, examples, replace(how, evidence=kind)))
             for kind in rollout.REGIONS}
    grpo.write_json(run / "evidence.json", found)


def collect(out):
    """All finished runs -> {variant: [one dict a seed]}, with everything the table and the pictures need."""
    found = {}
    for name, (schedule, times) in VARIANTS.items():
        for run in sorted(out.glob(f"{name.replace(' ', '')}-seed*")):
            if not (run / "evidence.json").exists():
                continue
            report, config = (json.loads((run / f"{part}.json").read_text()) for part in ("eval", "config"))
            steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            own = "plain" if schedule == "think" else "p2r"  # a schedule without roles is measured without roles
            points = [(0, report["before"]), *((r["step"], r) for r in report["during"]), (len(steps), report["after"])]
            found.setdefault(name, []).append({
                "seed": config["seed"], "n": report["after"]["n"], "own": own,
                "curve": [[step, r[own]] for step, r in points],
                # Where the data has no true boxes there is nothing to hit: not a number, in the table and in the pictures.
                **{k: [[step, math.nan if r[k] is None else r[k]] for step, r in points] for k in ("hit", "oracle")},
                "categories": {c: pair[own == "plain"] for c, pair in report["after"]["categories"].items()},
                "calls": sum(m["partner_calls"] for m in steps) + len(steps) * config["questions"] * config["group"],
                "boxes": [m["boxes"] for m in steps], "box_area": [m["box_area"] for m in steps],
                "reward": [m["reward_mean"] for m in steps],
                "evidence": json.loads((run / "evidence.json").read_text())})
    return found


def interval(values):
    """Mean and half width of its 95 % confidence interval (Student's t over seeds; infinite for one seed, a little wide for over 10)."""
    mean, n = sum(values) / len(values), len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1))
    return mean, STUDENT.get(n, 2.262) * deviation / math.sqrt(n) if n > 1 else math.inf


def last(row, key):
    return row[key][-1][1]


def gain(row):
    return 100 * (last(row, "curve") - row["curve"][0][1])


def table(found):
    """Accuracy after training, by variant, and each variant's difference to the paper's schedule, seed by seed."""
    print(f"{'':16}{'seeds':>6}{'before':>8}{'after':>8}{'95 % interval':>16}{'less alternate':>18}{'hit':>7}{'oracle':>8}"
          f"{'calls/point':>13}  " + " ".join(f"{c:>6}" for c in next(iter(found.values()))[0]["categories"]))
    base = {r["seed"]: last(r, "curve") for r in found.get("alternate", [])}
    for name, rows in found.items():
        mean, half = interval([last(r, "curve") for r in rows])
        paired = [last(r, "curve") - base[r["seed"]] for r in rows if r["seed"] in base]
        less = "{:+.3f} ± {:.3f}".format(*interval(paired)) if name != "alternate" and paired else ""
        points = sum(map(gain, rows)) / len(rows)
        calls = f"{sum(r['calls'] for r in rows) / len(rows) / points:,.0f}" if points > 1 else "no gain"
        cells = [sum(last(r, k) for r in rows) / len(rows) for k in ("hit", "oracle")]
        kinds = [sum(r["categories"][c] for r in rows) / len(rows) for c in rows[0]["categories"]]
        print(f"{name:16}{len(rows):6}{rows[0]['curve'][0][1]:8.3f}{mean:8.3f}{f'{mean - half:.3f} to {mean + half:.3f}':>16}{less:>18}"
              f"{cells[0]:7.3f}{cells[1]:8.3f}{calls:>13}  " + " ".join(f"{k:6.3f}" for k in kinds))


def draw(found, folder):
    """assets/experiment.png (what came out) and assets/curves.png (how it went)."""
    try:
        import matplotlib
    except ImportError:
        sys.exit('experiment.py: --draw needs matplotlib: pip install -e ".[plots]"')
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colours = dict(zip(VARIANTS, plt.get_cmap("tab10").colors))

    def dots(axis, key, title):
        for place, (name, rows) in enumerate(found.items()):
            values = [key(r) for r in rows]
            mean, half = interval(values)
            axis.errorbar(mean, place, xerr=half if math.isfinite(half) else 0, fmt="o", capsize=4, color=colours[name])
            axis.plot(values, [place + 0.22] * len(values), "|", color=colours[name], alpha=0.7)
        axis.set(title=title, yticks=range(len(found)), yticklabels=list(found), ylim=(len(found) - 0.5, -0.5))
        axis.grid(axis="x", alpha=0.3)

    def band(axis, name, series, title, xs=None, smooth=1):
        series = [[sum(v[max(0, i - smooth + 1):i + 1]) / min(i + 1, smooth) for i in range(len(v))] for v in series]  # each seed by itself
        means, halves = zip(*(interval(values) for values in zip(*series)))
        xs = xs or range(1, len(means) + 1)
        axis.plot(xs, means, color=colours[name], label=name)
        if all(map(math.isfinite, halves)):
            axis.fill_between(xs, [m - h for m, h in zip(means, halves)], [m + h for m, h in zip(means, halves)], color=colours[name], alpha=0.15)
        axis.set(title=title, xlabel="update")
        axis.grid(alpha=0.3)

    figure, axes = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
    dots(axes[0, 0], lambda r: last(r, "curve"), "held-out accuracy after training\n(mean over seeds, 95 % interval; ticks: seeds)")
    dots(axes[0, 1], lambda r: last(r, "hit"), "hit: the boxes hold all that was asked about")
    gains = {name: [r for r in rows if gain(r) > 1] for name, rows in found.items()}
    for place, (name, rows) in enumerate(gains.items()):
        values = [r["calls"] / gain(r) for r in rows]
        axes[1, 0].plot(values, [place] * len(values), "o", alpha=0.6, color=colours[name])
        if not values:
            axes[1, 0].text(0.02, place, "no gain", transform=axes[1, 0].get_yaxis_transform(), va="center", color=colours[name])
    axes[1, 0].set(title="calls to the model (sampled or frozen) for each point gained\n(a dot for each seed that gained more than a point)", yticks=range(len(gains)), yticklabels=list(gains),
                   ylim=(len(gains) - 0.5, -0.5))
    axes[1, 0].set_xlim(left=0)
    axes[1, 0].grid(axis="x", alpha=0.3)
    kinds = list(rollout.REGIONS)
    for place, (name, rows) in enumerate(found.items()):
        means, halves = zip(*(interval([r["evidence"][kind] for r in rows]) for kind in kinds))
        axes[1, 1].errorbar([i + 0.09 * (place - 3) for i in range(len(kinds))], means, yerr=[h if math.isfinite(h) else 0 for h in halves],
                            fmt="o", capsize=2, color=colours[name], label=name)
    axes[1, 1].set(title="what the Reasoner sees, after training", xticks=range(len(kinds)), xticklabels=kinds, ylim=(0, 1))
    axes[1, 1].legend(fontsize=7)
    axes[1, 1].grid(axis="y", alpha=0.3)
    figure.savefig(folder / "experiment.png", dpi=110)

    figure, axes = plt.subplots(2, 3, figsize=(15, 7.5), layout="constrained")
    for name, rows in found.items():
        for axis, key, title in ((axes[0, 0], "curve", "held-out accuracy"), (axes[0, 1], "hit", "hit"), (axes[0, 2], "oracle", "oracle: with the true boxes")):
            band(axis, name, [[value for _, value in r[key]] for r in rows], title, [step for step, _ in rows[0][key]])
            axis.set_ylim(0, 1)
        band(axes[1, 0], name, [r["reward"] for r in rows], "sampled reward of the trained role (mean of 8 updates)", smooth=8)
        if rows[0]["own"] == "p2r":
            band(axes[1, 1], name, [r["boxes"] for r in rows], "boxes a list (mean of 8 updates)", smooth=8)
            band(axes[1, 2], name, [[100 * (a or 0) for a in r["box_area"]] for r in rows], "box size, % of the image (mean of 8 updates)", smooth=8)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(folder / "curves.png", dpi=100)
    print(f"drew {folder}/experiment.png and {folder}/curves.png")


def main():
    parser = argparse.ArgumentParser(description="Compare schedules of training at equal numbers of updates.")
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="half of a run's updates: one of the two phases of one iteration")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; 1 on a GPU")
    parser.add_argument("--draw", action="store_true", help="print the table of finished runs, write experiment.json, draw it")
    parser.add_argument("--to", type=Path, default=ROOT / "assets", help="with --draw: folder for experiment.json and the pictures")
    parser.add_argument("--from-json", type=Path, help="with --draw: take the results from this file instead of --out")
    parser.add_argument("--ask-again", action="store_true", help=argparse.SUPPRESS)  # internal: one finished run is asked again
    parser.add_argument("more", nargs="*", help="after --: flags for p2r_min.py")
    args = parser.parse_args()
    if args.ask_again:
        return ask_with_evidence(args.out)
    if args.draw:
        found = json.loads(args.from_json.read_text()) if args.from_json else collect(args.out)
        if not found:
            sys.exit(f"experiment.py: there is no finished run in {args.out}")
        table(found)
        found = json.loads(json.dumps(found), parse_float=lambda number: round(float(number), 4))
        (args.to / "experiment.json").write_text(json.dumps(found) + "\n")
        return draw(found, args.to)
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    runs = dict(commands(args, args.more))
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        wrong = [w for w in tqdm(pool.map(lambda run: play(*run, threads), runs.items()), "runs", total=len(runs)) if w]
    print("\n".join(wrong) or f"done: python tests/experiment.py --out {args.out} --draw")
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
