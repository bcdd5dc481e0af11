"""What came out of tests/experiment.py: the tables, and the paper's figures on the toy.

    python tests/figures.py table           # every schedule, with intervals, as markdown
    python tests/figures.py interference    # what training one role does to the other
    python tests/figures.py components      # the paper's figure 5, drawn into assets/. Further:
                                            # rewards (6), iterations (8), phases (9), boxes (10),
                                            # evidence (12)
    python tests/figures.py throughput      # 11, measured here and now

All but the last are drawn from assets/experiment.json. Mean and 95 % Student interval are over
seeds; differences to `alternate` are taken seed by seed.
"""

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import experiment
from experiment import BOTH, ROOT, SCHEDULES, UPDATES

import eval as evaluation
from crop import gather
from eval import mean
from rollout import REGIONS, InputError, find, load, perceive, reason

# ---------------------------------------------------------------------------------------------
# Statistics

# The 97.5 % quantile of Student's t, for 1, 2, ... 30 degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
           2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
           2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def interval(values):
    """(mean, half of its 95 % interval) of one number a seed. One seed has no interval: infinite.

    Beyond 31 values the quantile of 31 is used, which is a little wide.
    """
    n = len(values)
    if n == 1:
        return values[0], math.inf
    quantile = STUDENT[min(n - 2, len(STUDENT) - 1)]
    return mean(values), quantile * statistics.stdev(values) / math.sqrt(n)


class Results:
    """assets/experiment.json. A run is a dict, as experiment.collect_run makes it."""

    def __init__(self, found):
        self.updates = found["updates"]
        # Schedule -> its runs, in the order in which schedules are listed everywhere.
        self.runs = {}
        for name in SCHEDULES:
            runs = [run for run in found["runs"] if run["schedule"] == name]
            if runs:
                self.runs[name] = runs

    def of(self, name):
        if name not in self.runs:
            raise InputError(f"there is no finished run of {name} in the results")
        return self.runs[name]

    def at(self, run, key, step=None):
        """What was measured at this step; without one, at the updates that are compared."""
        if step is None:
            step = self.updates
        return run["curve"][key][run["curve"]["step"].index(step)]

    def reached(self, name):
        return [self.at(run, "accuracy") for run in self.of(name)]

    def less_alternate(self, name):
        """Accuracy less that of `alternate` with the same seed, as two lists: after equal updates,
        and after as many calls as `alternate` had made by then.

        Between two measurements accuracy is taken to be a straight line. A run that made fewer
        calls to its end is not in the second list.
        """
        base = {run["seed"]: run for run in self.of("alternate")}
        by_updates, by_calls = [], []
        for run in self.of(name):
            # A seed whose `alternate` has not finished yet has nothing to be compared with.
            if run["seed"] not in base:
                continue
            other = base[run["seed"]]
            reached = self.at(other, "accuracy")
            by_updates.append(self.at(run, "accuracy") - reached)

            # Interpolated, never extrapolated.
            curve, calls = run["curve"], self.at(other, "calls")
            if calls <= curve["calls"][-1]:
                then = float(np.interp(calls, curve["calls"], curve["accuracy"]))
                by_calls.append(then - reached)
        return by_updates, by_calls


# ---------------------------------------------------------------------------------------------
# Tables


def table(results):
    """How good every schedule gets, and at what price."""
    kinds = list(results.of("alternate")[0]["kinds"])
    print_row("schedule", "seeds", "before", f"after {results.updates}", "less alternate",
              "same, equal calls", "last quarter", "hit", "oracle", "calls", "seconds",
              " / ".join(kinds))
    print("|---" * 12 + "|")
    for name, runs in results.runs.items():
        less = ["", ""]
        if name != "alternate":
            by_updates, by_calls = results.less_alternate(name)
            less = [told(by_updates), told(by_calls)]
            if len(by_calls) < len(by_updates):
                less[1] += f" ({len(by_calls)} of {len(by_updates)} seeds)"

        # Is the curve flat by then? (Six phases are measured at two thirds, not three quarters.)
        earlier = results.updates * 3 // 4
        if name == "alternate x 3":
            earlier = results.updates * 2 // 3
        late = [results.at(run, "accuracy") - results.at(run, "accuracy", earlier) for run in runs]

        # These are means over seeds; calls and seconds are those of one update.
        before = mean(run["curve"]["accuracy"][0] for run in runs)
        hit = mean(results.at(run, "hit") for run in runs)
        oracle = mean(results.at(run, "oracle") for run in runs)
        calls = mean(results.at(run, "calls") for run in runs) / results.updates
        seconds = mean(results.at(run, "seconds") for run in runs) / results.updates

        # Questions about one thing, about two, and counting fail for different reasons.
        by_kind = []
        for kind in kinds:
            right = mean(run["kinds"][kind] for run in runs)
            by_kind.append(f"{right:.2f}")
        print_row(name, len(runs), f"{before:.3f}", told(results.reached(name), ""), *less,
                  told(late), f"{hit:.3f}", f"{oracle:.3f}", f"{calls:.0f}", f"{seconds:.2f}",
                  " / ".join(by_kind))


def interference(results):
    """What a phase does to either role; and what, at its end, a step for one does to the other.

    hit is the Perceiver's, oracle the Reasoner's: in a phase that trains the one, a change of the
    other is interference, or transfer. Cosines: see experiment.overlap.
    """
    pairs = [f"{one} on {other}" for one in BOTH for other in BOTH]
    print_row("schedule", "phase", "hit", "oracle", *pairs)
    print("|---" * 8 + "|")
    for name, runs in results.runs.items():
        # The start is no phase, but it has cosines. Schedules without them have empty cells.
        steps = round(SCHEDULES[name].share * results.updates)
        phases = SCHEDULES[name].phases[:results.updates // steps]
        for number, phase in enumerate(("start", *phases)):
            changes = {"hit": [], "oracle": []}
            for key, values in changes.items():
                for run in runs:
                    if number > 0:
                        now = results.at(run, key, number * steps)
                        values.append(now - results.at(run, key, (number - 1) * steps))
            cosines = []
            for pair in pairs:
                values = [run["overlap"].get(f"{number}-{phase}", {}).get(pair) for run in runs]
                cosines.append(told([value for value in values if value is not None]))
            print_row(name, f"{number}-{phase}", told(changes["hit"]), told(changes["oracle"]),
                      *cosines)


def told(values, sign="+"):
    """An interval as text; empty for no values."""
    if not values:
        return ""
    middle, half = interval(values)
    return f"{middle:{sign}.3f} ± {half:.3f}"


def print_row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


# ---------------------------------------------------------------------------------------------
# The paper's figures: two panels each


def lines(axis, results, names, part, key, title):
    """One line a schedule, over updates. part: "curve", what was measured, or "logged"."""
    # A part of the experiment can be drawn, too: what is not there yet is left out.
    for name in names:
        if name in results.runs:
            runs = results.of(name)
            band(axis, runs[0][part]["step"], [run[part][key] for run in runs], name)
    axis.set(title=title, xlabel="update")


def band(axis, steps, series, label):
    """The mean of some seeds' curves, and its 95 % interval. series: (seeds, points)."""
    kept, means, halves = [], [], []
    for step, *values in zip(steps, *series):
        # No boxes in any list have no mean size.
        values = [value for value in values if value is not None]
        if values:
            middle, half = interval(values)
            kept.append(step)
            means.append(middle)
            halves.append(half if math.isfinite(half) else 0)
    means, halves = np.array(means), np.array(halves)
    axis.plot(kept, means, label=label)
    axis.fill_between(kept, means - halves, means + halves, alpha=0.15)


def dots(axis, rows, title):
    """Intervals of {label: one value a seed}, one below the other; a tick is a seed."""
    for place, values in enumerate(rows.values()):
        middle, half = interval(values)
        # One seed has no interval to draw; it still has a dot.
        error = half if math.isfinite(half) else 0
        axis.errorbar(middle, place, xerr=error, fmt="o", capsize=4)
        axis.plot(values, [place + 0.25] * len(values), "|k", alpha=0.5)
    axis.set(title=title, yticks=range(len(rows)), yticklabels=list(rows))
    axis.invert_yaxis()


def components(results, left, right):
    """Figure 5: which part of the training brings what."""
    rows = {name: results.reached(name) for name in results.runs}
    dots(left, rows, f"accuracy after {results.updates} updates")

    # Which role learned it: in the middle rows the other one is played by the warm start.
    runs = results.of("alternate")
    rows = {"neither role trained": [run["curve"]["p2r"][0] for run in runs],
            "Reasoner trained": [run["swapped"]["reasoner"] for run in runs],
            "Perceiver trained": [run["swapped"]["perceiver"] for run in runs],
            "both trained": [run["evidence"]["both"] for run in runs]}
    dots(right, rows, "alternate, its roles exchanged for the warm start's")


def rewards(results, left, right):
    """Figure 6: the sampled reward. It jumps where a phase begins, for another role is sampled."""
    roles = ("alternate", "joint", "perceiver", "reasoner", "think", "shuffled")
    lines(left, results, roles, "logged", "reward_mean", "reward")
    lines(right, results, roles, "logged", "zero_variance", "groups that teach nothing")


def iterations(results, left, right):
    """Figure 8: the same number of updates as one, two, three and four alternations."""
    names = [name for name in results.runs if name.startswith("alternate")]
    lines(left, results, names, "curve", "p2r", "accuracy")
    rows = {name: results.reached(name) for name in names}
    dots(right, rows, f"accuracy after {results.updates} updates")


def phases(results, left, right):
    """Figure 9: accuracy through both phases, beside what moves by itself."""
    for axis, name in ((left, "alternate"), (right, "shuffled")):
        runs = results.of(name)
        for key in ("p2r", "hit", "oracle", "plain"):
            band(axis, runs[0]["curve"]["step"], [run["curve"][key] for run in runs], key)
        axis.axvline(results.updates / 2, color="grey", linestyle=":")
        axis.set(title=f"{name}: perception, then reasoning", xlabel="update", ylim=(0, 1))


def boxes(results, left, right):
    """Figure 10: number and size of the boxes."""
    names = ("alternate", "joint", "perceiver", "reasoner", "shuffled", "dense")
    lines(left, results, names, "logged", "boxes", "boxes of a list")
    lines(right, results, names, "logged", "box_area", "share of the image that a box covers")
    right.set_ylim(0, 0.1)  # the toy's boxes stay 1/16 of the image: that should look flat


def evidence(results, left, right):
    """Figure 12: what the Reasoner sees."""
    for axis, name in ((left, "alternate"), (right, "perceiver")):
        rows = {}
        for kind in REGIONS:
            rows[kind] = [run["evidence"][kind] for run in results.of(name)]
        dots(axis, rows, f"{name}: accuracy by evidence")


FIGURES = {"components": components, "rewards": rewards, "iterations": iterations,
           "phases": phases, "boxes": boxes, "evidence": evidence}


def draw(name, results, file):
    try:
        import matplotlib
    except ImportError as error:
        raise InputError('figures need matplotlib: pip install -e ".[plots]"') from error
    matplotlib.use("Agg")  # there may be no screen
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    FIGURES[name](results, *axes)

    # Panels of dots name their rows on the axis and need no legend.
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    print(f"drew {file}")


# ---------------------------------------------------------------------------------------------
# Figure 11: throughput


@dataclass
class Picture:
    """An example whose image is in memory: a crop that the Perceiver looks at once more."""
    image: object
    question: str
    answer_form: str

    def load_image(self):
        return self.image


def throughput(rounds=5, count=64):
    """Questions a second of the toy: without roles, with both, and with one more zoom."""
    s = experiment.settings("alternate", 0, UPDATES, "unused")
    model, codec = load(find(s.model), s.max_pixels)
    examples = evaluation.load_data(s.eval_data)[:count]
    how = {"greedy": True, "rows": count}

    # The two calls, and the three pipelines made of them.
    def look(pictures):
        groups = perceive(model, codec, pictures, max_tokens=s.perceive_tokens, **how)
        return [group.completions[0].parsed.boxes for group in groups]

    def answer(pictures, boxes):
        return list(reason(model, codec, list(zip(pictures, boxes)), max_tokens=s.reason_tokens,
                           **how))

    def think():
        answer(examples, [[]] * count)

    def p2r():
        answer(examples, look(examples))

    def zoom():
        # The Perceiver looks again, into its first crop, and that is what the Reasoner gets.
        closer = []
        for example, boxes in zip(examples, look(examples)):
            image = example.load_image()
            _, crops = gather(image, boxes)
            first = crops[0] if crops else image
            closer.append(Picture(first, example.question, example.answer_form))
        answer(closer, look(closer))

    # In turn, so that a busy minute of the machine meets all three.
    seconds = {think: [], p2r: [], zoom: []}
    for _ in range(rounds):
        for pipeline, measured in seconds.items():
            started = time.perf_counter()
            pipeline()
            measured.append(time.perf_counter() - started)
    print_row("pipeline", "questions a second", "time, p2r = 1")
    print("|---|---|---|")
    base = statistics.median(seconds[p2r])
    for pipeline, measured in seconds.items():
        middle = statistics.median(measured)
        print_row(pipeline.__name__, f"{count / middle:.1f}", f"{middle / base:.2f}")


def main(arguments=None):
    """Raises InputError for what the user can mend."""
    tables = {"table": table, "interference": interference}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=(*tables, *FIGURES, "throughput"))
    parser.add_argument("--results", type=Path, default=ROOT / "assets" / "experiment.json")
    parser.add_argument("--to", type=Path, default=ROOT / "assets", help="folder of the figures")
    args = parser.parse_args(arguments)
    if args.what == "throughput":
        throughput()
        return

    # A broken or missing file is the user's to make.
    try:
        results = Results(json.loads(args.results.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--results {args.results} cannot be read ({error!r}): python "
                         f"tests/experiment.py collect writes it") from error
    if args.what in tables:
        tables[args.what](results)
    else:
        draw(args.what, results, args.to / f"experiment-{args.what}.png")


if __name__ == "__main__":
    sys.exit(evaluation.run_program("figures.py", main))
