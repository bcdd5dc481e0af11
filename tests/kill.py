"""Proof that a killed run comes back as if nothing had happened.

    python tests/kill.py                  # 20 kills; some five minutes on 2 cores
    python tests/kill.py --kills 3

Runs the toy once undisturbed: two iterations, 12 steps, a checkpoint every second one. Then, 20 times, runs it again,
ends it with SIGKILL, resumes it with --resume, and compares with the undisturbed run, bit for bit: final weights, float32
masters, metrics (all but times, speed and memory), accuracies and sample pictures. Every fourth kill falls into the writing
of a checkpoint, every fourth beside a phase switch, the others anywhere in the loop; every fifth run is killed twice.
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
STEPS, TOTAL = 3, 12      # a phase has three steps: switches after 3, 6 and 9, checkpoints after 2, 4, 6 (a switch), ...
MEASURED = ("seconds_rollout", "seconds_partner", "seconds_update", "tokens_per_s", "peak_gib")  # differ from run to run


def command(run, data):
    """The whole run; the resumed one is `--resume RUN`. One thread each, so that several can run side by side."""
    return [sys.executable, ROOT / "p2r_min.py", "--model", ROOT / "assets" / "toy", "--data", data / "train", "--eval-data",
            data / "held_out", "--out", run, "--iterations", 2, "--steps", STEPS, "--questions", 4, "--group", 4, "--lr", 3e-4,
            "--max-pixels", 64 * 64, "--perceive-tokens", 48, "--reason-tokens", 16, "--rollout-batch", 4, "--save-every", 2,
            "--eval-every", 4, "--sample-every", 2]


def start(arguments, log):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([str(a) for a in arguments], stdout=log, stderr=subprocess.STDOUT, env=environment)


def lines(run):
    return (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0


def writing(run):
    """The checkpoints that are half-written at this moment."""
    return [path.name for path in (run / "checkpoints").glob("*.new")]


def kill(process, run, kind, rng, seconds):
    """Wait for the moment, then SIGKILL. Returns what it fell into, or None if the process was done before."""
    if kind == "writing":
        which = f"step-{rng.choice([2, 4, 6, 8, 10, 12]):05d}.new"
        moment, delay = lambda: which in writing(run), rng.uniform(0, 0.02)
    elif kind == "switch":
        step = rng.choice([3, 6, 9])
        moment, delay = lambda: lines(run) >= step, rng.uniform(0, seconds / TOTAL)
    else:
        began = time.time()  # config.json is written when the loop is about to begin, and again on --resume
        moment = lambda: (run / "config.json").exists() and (run / "config.json").stat().st_mtime > began
        delay = rng.uniform(0, seconds)
    while process.poll() is None and not moment():
        time.sleep(0.0005)
    time.sleep(delay)
    found = f"{lines(run)} steps logged" + "".join(f", {name} half-written" for name in writing(run))
    process.send_signal(signal.SIGKILL)
    return found if process.wait() == -signal.SIGKILL else None


def differences(run, other):
    """What is not the same, bit for bit."""
    def metrics(folder):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]

    files = ["final/model.safetensors", f"checkpoints/step-{TOTAL:05d}/model.safetensors", "eval.json",
             *sorted(f"samples/{path.name}" for path in (other / "samples").iterdir())]
    found = [name for name in files if (run / name).read_bytes() != (other / name).read_bytes()]
    return found + ["metrics.jsonl"] * (metrics(run) != metrics(other))


def trial(number, folder, data, seconds, seed):
    """One run, killed once or twice, resumed, compared. Returns (same?, a line that tells the story)."""
    rng, run, story = random.Random(f"{seed}-{number}"), folder / f"killed-{number}", []
    kinds = [("writing", "switch", "any", "any")[number % 4]] + ["any"] * (number % 5 == 0)
    with (folder / f"killed-{number}.log").open("w+") as log:
        while True:
            # Without a config.json the kill came before the run began: there is nothing to resume yet.
            began = (run / "config.json").exists()
            process = start([sys.executable, ROOT / "p2r_min.py", "--resume", run] if began else command(run, data), log)
            if not kinds:
                break
            moment = kill(process, run, kinds[0], rng, seconds)
            if moment:
                story.append(f"{moment} ({kinds.pop(0)})")
            elif process.returncode:
                break  # it failed by itself
            elif story:
                kinds.clear()  # the resumed run was done before its second kill
            else:
                shutil.rmtree(run)  # done before its kill: the same again, at another moment
        status = process.wait()
        log.seek(0)
        said = [line.replace(str(run), "").replace("resuming ", "").strip() for line in log.read().splitlines()
                if line.startswith(("resuming", "warning")) or "starting over" in line]
    wrong = differences(run, folder / "undisturbed") if status == 0 else [f"exit code {status}"]
    return not wrong, f"killed with {'; then '.join(story)}; resumed {'; '.join(said)}: " + ("same" if not wrong else f"DIFFERENT {wrong}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="runs to kill")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    import toy
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = folder / "data"
        toy.write_data(data / "train", 10, "kill")       # 12 steps of 4: several passes over the data
        toy.write_data(data / "held_out", 4, "kill, held out")
        with (folder / "undisturbed.log").open("w") as log:
            process = start(command(folder / "undisturbed", data), log)
            while process.poll() is None and not (folder / "undisturbed" / "config.json").exists():
                time.sleep(0.01)
            began = time.perf_counter()
            status = process.wait()
            seconds = time.perf_counter() - began
        if status:
            sys.exit((folder / "undisturbed.log").read_text())
        print(f"undisturbed: {seconds:.1f} s in the loop", flush=True)
        same = 0
        with ThreadPoolExecutor(args.jobs) as pool:
            for number, (good, story) in enumerate(pool.map(lambda n: trial(n, folder, data, seconds, args.seed), range(args.kills)), 1):
                same += good
                print(f"{number:3} of {args.kills}: {story}", flush=True)
        print(f"{same} of {args.kills}")
        sys.exit(same != args.kills)


if __name__ == "__main__":
    main()
