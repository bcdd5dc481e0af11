"""Draw the curves of one run: reward, held-out accuracy, boxes and their size, step by step.

    python tests/plot.py runs/toy-1                  # writes runs/toy-1/curves.png
    python tests/plot.py runs/toy-1 --out my.png     # or .pdf, .svg

Needs matplotlib: pip install -e ".[plots]"
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window: this writes a file
import matplotlib.pyplot as plt

INK = "#222222"
SHADES = {"perception": "#dbe9f6", "reasoning": "#fdebd0"}  # other phases: grey
ACCURACY = {  # what is measured on held-out questions -> colour, and what it means
    "p2r": ("#222222", "p2r: perceive, then reason"),
    "hit": ("#1f6fb4", "hit: the boxes hold what was asked about"),
    "oracle": ("#d97706", "oracle: reason with the true boxes"),
    "plain": ("#999999", "plain: reason on the plain image"),
}


def read(file):
    """The rows of a log of one JSON object a line; a missing file has none."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def values(rows, name):
    """Steps and values of one metric. Null is a gap: there was nothing to take a mean of."""
    steps = [row["step"] for row in rows]
    return steps, [math.nan if row.get(name) is None else row[name] for row in rows]


def smooth(numbers, width=9):
    """The mean over the `width` steps around each: single steps are noisy."""
    means = []
    for i in range(len(numbers)):
        window = numbers[max(0, i - width // 2):i + width // 2 + 1]
        known = [number for number in window if not math.isnan(number)]
        means.append(sum(known) / len(known) if known else math.nan)
    return means


def draw(folder):
    """The figure of the run in `folder`."""
    # What the run wrote while it ran.
    steps_a_phase = json.loads((folder / "config.json").read_text())["steps"]
    rows, accuracy = read(folder / "metrics.jsonl"), read(folder / "accuracy.jsonl")
    plt.rcParams.update({"font.size": 10, "axes.edgecolor": INK, "text.color": INK,
                         "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.6), height_ratios=(3, 2), sharex=True,
                                layout="constrained")

    # Three metrics of training, each step as it is, pale, and smoothed.
    for place, name, title in (
            ((0, 0), "reward_mean", "reward of training, mean of a step"),
            ((1, 0), "boxes", "boxes in a Perceiver output"),
            ((1, 1), "box_area", "share of the image that a box covers")):
        steps, numbers = values(rows, name)
        axes[place].plot(steps, numbers, color="#1f6fb4", alpha=0.3, linewidth=1)
        axes[place].plot(steps, smooth(numbers), color="#1f6fb4", linewidth=2)
        axes[place].set_title(title, loc="left")

    # What was measured between the steps, greedily, on questions that training never sees.
    for name, (colour, meaning) in ACCURACY.items():
        steps, numbers = values(accuracy, name)
        axes[0, 1].plot(steps, numbers, "o-", color=colour, markersize=4, label=meaning,
                        clip_on=not accuracy)
    axes[0, 1].set_title("held-out accuracy, greedy", loc="left")
    figure.legend(fontsize=8, frameon=False, ncols=4, loc="outside lower center")

    # Everything starts at 0, and shares end at 1, so that a small change looks small.
    for axis in axes[0]:
        axis.set_ylim(0, 1.02)
    for axis in axes[1]:
        axis.set_ylim(0, 1.3 * axis.get_ylim()[1])
    axes[1, 1].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))

    # The phases: who is trained between which steps.
    for start in range(0, len(rows), steps_a_phase):
        phase, end = rows[start]["phase"], min(start + steps_a_phase, len(rows))
        for axis in axes.flat:
            axis.axvspan(start, end, color=SHADES.get(phase, "#eeeeee"), linewidth=0, zorder=0)
            axis.text((start + end) / 2, 0.03, phase, ha="center", fontsize=9, color="#666666",
                      transform=axis.get_xaxis_transform())
    for axis in axes[1]:
        axis.set_xlabel("step")
        axis.set_xlim(0, len(rows))
    return figure


def main():
    parser = argparse.ArgumentParser(description="Draw the curves of one run.")
    parser.add_argument("run", type=Path, help="a run folder of p2r_min.py")
    parser.add_argument("--out", type=Path, help="the picture; default: RUN/curves.png")
    args = parser.parse_args()
    for name in ("config.json", "metrics.jsonl"):
        if not (args.run / name).exists() or not (args.run / name).stat().st_size:
            parser.error(f"{args.run} is no run that has begun: {name} is missing or empty")
    out = args.out or args.run / "curves.png"
    draw(args.run).savefig(out, dpi=130)
    print(out)


if __name__ == "__main__":
    main()
