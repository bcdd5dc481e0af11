"""tests/experiment.py: all variants get the same budget, and the arithmetic of the table."""

import argparse
import json
from pathlib import Path

import pytest

import experiment
from p2r_min import Settings


def settings_of(flags):
    return Settings(**vars(experiment.settings_parser().parse_args(flags)))


def test_variants_differ_in_schedule_and_in_nothing_else():
    args = argparse.Namespace(out=Path("x"), seeds=2, steps=32)
    runs = {run.name: settings_of(flags) for run, flags in experiment.commands(args, ["--questions", "6"])}
    assert len(runs) == 2 * 7
    assert {(s.total, s.questions, s.group, s.lr, s.model, s.data, s.eval_data, s.eval_every) for s in runs.values()} == {
        (64, 6, 8, 3e-4, runs["joint-seed0"].model, runs["joint-seed0"].data, runs["joint-seed0"].eval_data, 16)}
    assert {(name.split("-seed")[0], s.schedule, s.iterations, s.steps) for name, s in runs.items()} == {
        ("alternate", "alternate", 1, 32), ("alternatex2", "alternate", 2, 16), ("alternatex4", "alternate", 4, 8),
        ("joint", "joint", 1, 32), ("perceiver", "perceiver", 1, 32), ("reasoner", "reasoner", 1, 32), ("think", "think", 1, 32)}
    assert [runs[f"think-seed{seed}"].seed for seed in (0, 1)] == [0, 1]
    with pytest.raises(SystemExit, match="--steps 30 updates cannot be shared among 8"):
        list(experiment.commands(argparse.Namespace(out=Path("x"), seeds=1, steps=30), []))
    with pytest.raises(SystemExit, match="needs --eval-data"):
        list(experiment.commands(args, ["--model", "M"]))


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(questions=10, steps=32)))
    (tmp_path / "evidence.json").write_text("{}")
    assert experiment.play(tmp_path, ["--questions", "10", "--steps", "32"], 1) is None
    assert "questions was 10, is 6" in experiment.play(tmp_path, ["--questions", "6", "--steps", "32"], 1)


def test_the_interval_is_students():
    """1 to 5: mean 3, standard deviation 1.5811, t(4) = 2.7764; 3 +- 2.7764 * 1.5811 / sqrt(5) = 3 +- 1.9632."""
    assert experiment.interval([1, 2, 3, 4, 5]) == pytest.approx((3, 1.9632), abs=3e-4)
    assert experiment.interval([7])[1] == float("inf")


def fake_run(folder, schedule, seed, before, after, calls):
    """What p2r_min.py leaves, as far as it is read: two steps of 3 questions x 4 samples."""
    folder.mkdir()
    row = dict(n=50, hit=0.5, oracle=0.9, p2r=before, plain=0.1, categories={"one": [0.8, 0.2]})
    (folder / "eval.json").write_text(json.dumps({"before": row, "during": [], "after": row | dict(p2r=after, plain=0.3)}))
    (folder / "config.json").write_text(json.dumps(dict(seed=seed, questions=3, group=4)))
    step = dict(partner_calls=calls, tokens=9, boxes=1.0, box_area=None, reward_mean=0.5, seconds_rollout=1.0, seconds_update=2.0)
    (folder / "metrics.jsonl").write_text((json.dumps(step) + "\n") * 2)
    (folder / "evidence.json").write_text(json.dumps(dict(both=after, annotated=0.1, crops=0.2, none=0.3)))


def test_the_table_by_hand(tmp_path, capsys):
    """Calls: 2 steps x (12 sampled + partner's). alternate gains 20 and 30 points for 2 x (12 + 8) = 40 calls: 40 / 25 = 1.6 a point.
    joint is 0.1 and 0.2 better with the same seeds: +0.150, t(1) = 12.706 times 0.0707 / sqrt(2) = 0.635. think is measured without
    roles: 0.1 to 0.3. A run without its last file is not finished."""
    for seed, (a, j) in enumerate(((0.6, 0.7), (0.7, 0.9))):
        fake_run(tmp_path / f"alternate-seed{seed}", "alternate", seed, 0.4, a, 8)
        fake_run(tmp_path / f"joint-seed{seed}", "joint", seed, 0.4, j, 3)
        fake_run(tmp_path / f"think-seed{seed}", "think", seed, 0.4, 0.0, 0)
    fake_run(tmp_path / "alternate-seed2", "alternate", 2, 0.4, 0.0, 8)
    (tmp_path / "alternate-seed2" / "evidence.json").unlink()
    found = experiment.collect(tmp_path)
    assert [len(rows) for rows in found.values()] == [2, 2, 2]
    experiment.table(found)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert lines["alternate"][1:4] == ["2", "0.400", "0.650"] and lines["alternate"][-2:] == ["2", "0.800"]
    assert lines["joint"][3] == "0.800" and lines["joint"][7:10] == ["+0.150", "±", "0.635"]
    assert lines["think"][2:4] == ["0.100", "0.300"] and lines["think"][-1] == "0.200"
