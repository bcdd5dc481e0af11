"""Proof that a killed run comes back as if nothing had happened.

    python tests/kill.py                  # 24 kills; some ten minutes on 2 cores
    python tests/kill.py --kills 3

Runs the toy once undisturbed: two iterations, 12 steps, a checkpoint every second one. Then, 24
times, runs it again, ends it with SIGKILL, resumes it with --resume, and compares with the
undisturbed run, bit for bit: final weights, weights of all phases, masters and moments, metrics
(all but times and memory), accuracies and sample pictures. Every fourth kill falls into the writing
of a checkpoint, every fourth beside a phase switch, the others anywhere; every fifth run is killed
twice.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import toy  # noqa: E402

STEPS, TOTAL = 3, 12  # phases switch after 3, 6 and 9 steps; checkpoints after 2, 4, 6 (a switch), ...
MEASURED = ("seconds_rollout", "seconds_partner", "seconds_update", "peak_gib")


def command(run, data):
    """The whole run; the resumed one is `--resume RUN`."""
    return [ROOT / "p2r_min.py", "--model", ROOT / "assets" / "toy", "--data", data / "train",
            "--eval-data", data / "held_out", "--out", run, "--iterations", 2, "--steps", STEPS,
            "--questions", 4, "--group", 4, "--lr", 3e-4, "--max-pixels", 64 * 64,
            "--perceive-tokens", 48, "--reason-tokens", 16, "--rollout-batch", 4, "--save-every", 2,
            "--eval-every", 4, "--sample-every", 2, "--judge", "none"]


def start(arguments, log):
    """One thread each, so that several can run side by side."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment,
                            stdout=log, stderr=subprocess.STDOUT)


def steps_logged(run):
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def half_written(run):
    """The names of what is being written at this moment."""
    return [path.name for path in run.glob("*/*.new")]


def kill(process, run, kind, rng, seconds):
    """Wait for the moment, then SIGKILL. Returns what it fell into; None: the run was done before.

    kind: "writing", "switch" or "any". seconds: how long the undisturbed run's loop took.
    """
    began = time.time()
    target = f"step-{rng.choice([2, 4, 6, 8, 10, 12]):05d}.new"
    switch = rng.choice([3, 6, 9])

    def is_moment():
        if kind == "writing":
            return target in half_written(run)
        if kind == "switch":
            return steps_logged(run) >= switch
        # config.json is written when the loop is about to begin, and again on --resume.
        config = run / "config.json"
        return config.exists() and config.stat().st_mtime > began

    delays = {"writing": 0.02, "switch": seconds / TOTAL, "any": seconds}
    while process.poll() is None and not is_moment():
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, delays[kind]))
    found = f"{steps_logged(run)} steps logged"
    for name in half_written(run):
        found += f", {name} half-written"
    process.send_signal(signal.SIGKILL)
    return found if process.wait() == -signal.SIGKILL else None


def contents(run):
    """Everything of a finished run that must not depend on kills: {name: bytes or rows}."""
    found = {}
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if path.is_file() and name not in ("lock", "config.json", "metrics.jsonl"):
            found[name] = path.read_bytes()
    rows = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        rows.append({key: v for key, v in json.loads(line).items() if key not in MEASURED})
    return found | {"metrics.jsonl": rows}


def trial(number, folder, data, seconds, seed):
    """One run, killed once or twice, resumed, compared. Returns (same?, a line about it)."""
    rng, run = random.Random(f"{seed}-{number}"), folder / f"killed-{number}"
    kinds = [("writing", "switch", "any", "any")[number % 4]]
    if number % 5 == 0:
        kinds.append("any")

    story, log = [], (folder / f"killed-{number}.log").open("w+")
    while True:
        # Without a config.json the kill came before the run began: there is nothing to resume.
        resumable = (run / "config.json").exists()
        again = [ROOT / "p2r_min.py", "--resume", run]
        process = start(again if resumable else command(run, data), log)
        if not kinds:
            break
        moment = kill(process, run, kinds[0], rng, seconds)
        if moment:
            story.append(f"{moment} ({kinds.pop(0)})")
        elif process.returncode:
            break  # it failed by itself: told below
        elif story:
            kinds.clear()  # the resumed run was done before its second kill
        else:
            shutil.rmtree(run)  # done before its kill: the same again, at another moment

    status = process.wait()
    told = f"killed with {'; then '.join(story)}: "
    if status:
        log.seek(0)
        return False, told + f"FAILED with {status}: {log.read()[-2000:]}"
    mine, whole = contents(run), contents(folder / "undisturbed")
    different = [name for name in mine | whole if mine.get(name) != whole.get(name)]
    return not different, told + (f"DIFFERENT {different}" if different else "same")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=24, help="runs to kill")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        # Ten questions: 12 steps of 4 make several passes over the data.
        folder = Path(name)
        toy.write_data(folder / "train", 10, "kill")
        toy.write_data(folder / "held_out", 4, "kill, held out")

        # The undisturbed run, and how long its loop takes.
        with (folder / "undisturbed.log").open("w") as log:
            process = start(command(folder / "undisturbed", folder), log)
            while process.poll() is None and not (folder / "undisturbed/config.json").exists():
                time.sleep(0.01)
            began = time.perf_counter()
            if process.wait():
                sys.exit((folder / "undisturbed.log").read_text())
            seconds = time.perf_counter() - began
        print(f"undisturbed: {seconds:.1f} s in the loop", flush=True)

        same = 0
        with ThreadPoolExecutor(args.jobs) as pool:
            trials = [pool.submit(trial, number, folder, folder, seconds, args.seed)
                      for number in range(args.kills)]
            for number, done in enumerate(trials, start=1):
                good, story = done.result()
                same += good
                print(f"{number:3} of {args.kills}: {story}", flush=True)
    print(f"{same} of {args.kills}")
    sys.exit(same != args.kills)


if __name__ == "__main__":
    main()
