"""Does a fork still train? Two steps of each phase on the toy, with non-zero gradients in both.

    python tests/check_fork.py                # flags that follow go to p2r_min.py
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import p2r_min  # noqa: E402


def main():
    # Without the KL no gradient is left but that of the reward.
    flags = ["--steps", "2", "--kl", "0", "--eval-data", "", "--sample-every", "0"]
    with tempfile.TemporaryDirectory() as folder:
        p2r_min.main([*flags, "--out", f"{folder}/run", *sys.argv[1:]])
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").open()]

    for row in rows:
        print(f"step {row['step']} {row['phase']:10} reward {row['reward_mean']:.3f} "
              f"loss {row['loss']:+.5f} grad_norm {row['grad_norm'] or 0:.5f}")

    # (A single step may have none, if the samples of every group earn the same.)
    for phase in {row["phase"] for row in rows}:
        if not any(row["grad_norm"] for row in rows if row["phase"] == phase):
            sys.exit(f"no gradient in the {phase} phase: this fork does not train")
    print("gradients in every phase")


if __name__ == "__main__":
    main()
