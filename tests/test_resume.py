"""The run folder: nothing lost, nothing silent. Resume, faults in the middle of a run, bad numbers.

tests/kill.py is the long proof with real kills; here a run is cut off in-process, at chosen places.
"""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import chance, go, metrics, small, write_data
from safetensors.torch import load_file

import grpo
import p2r_min
import rollout
from eval import load_data
from p2r_min import main, questions_of
from rollout import InputError

MEASURED = ("seconds_rollout", "seconds_partner", "seconds_update", "peak_gib")
ROOT = Path(p2r_min.__file__).parent


class Killed(BaseException):
    """Stands in for SIGKILL: no handler of the program may catch it and tidy up."""


def settings(folder, data, out, **more):
    """Two phases of three steps; checkpoints after steps 2, 4 and 6."""
    values = dict(steps=3, save_every=2, eval_every=3, sample_every=2,
                  eval_data=str(data.with_name("held_out.jsonl")))
    return small(folder, data, out, **values | more)


def outcome(run):
    """Everything of a run that must not depend on interruptions."""
    rows = []
    for row in metrics(run):
        rows.append({name: value for name, value in row.items() if name not in MEASURED})
    files = ["final/model.safetensors", "phases/1-perception/model.safetensors", "accuracy.jsonl",
             "checkpoints/step-00006/masters.safetensors",
             "checkpoints/step-00006/moments.safetensors"]
    files += sorted(f"samples/{path.name}" for path in (run / "samples").iterdir())
    return rows, {name: (run / name).read_bytes() for name in files}


@pytest.fixture
def undisturbed(folder, tmp_path_factory, scripted, request):
    """What an undisturbed run writes; made once."""
    known = request.config.stash.setdefault(KEY, [])
    if not known:
        path = tmp_path_factory.mktemp("undisturbed")
        known.append(outcome(go(settings(folder, write_data(path), path / "run"))))
    return known[0]


KEY = pytest.StashKey()


def cut_off(monkeypatch, owner, name, when):
    """Kill the program at a call of owner.name for which when(*arguments) holds, before it acts."""
    real = getattr(owner, name)

    def spied(*args, **kwargs):
        if when(*args, **kwargs):
            monkeypatch.setattr(owner, name, real)
            raise Killed
        return real(*args, **kwargs)
    monkeypatch.setattr(owner, name, spied)


# --- resume


def test_the_same_seed_gives_the_same_bits(folder, data, tmp_path, undisturbed):
    assert len(undisturbed[0]) == 6 and all(row["grad_norm"] > 0 for row in undisturbed[0])
    assert outcome(go(settings(folder, data, tmp_path / "again"))) == undisturbed


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_a_run_killed_while_it_logs_comes_back(
        folder, data, tmp_path, monkeypatch, undisturbed, step):
    """1: before the first checkpoint; 3: at the end of a phase; 4: where a checkpoint is due."""
    s = settings(folder, data, tmp_path / "run")
    cut_off(monkeypatch, p2r_min, "append_json", lambda path, row: row["step"] == step
            and path.name == "metrics.jsonl")
    with pytest.raises(Killed):
        go(s)
    assert outcome(go(s, resumed=True)) == undisturbed


@pytest.mark.parametrize("name", ["masters", "moments", "frozen"])
def test_a_run_killed_while_it_saves_comes_back(
        folder, data, tmp_path, monkeypatch, undisturbed, name):
    s = settings(folder, data, tmp_path / "run")
    cut_off(monkeypatch, p2r_min, "save_file",
            lambda tensors, path, **_: f"step-00004.new/{name}" in str(path))
    with pytest.raises(Killed):
        go(s)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-00002", "step-00004.new"}
    assert outcome(go(s, resumed=True)) == undisturbed
    assert {path.name for path in checkpoints.iterdir()} == {"step-00004", "step-00006"}


def test_a_run_killed_between_a_phase_and_its_checkpoint_comes_back(
        folder, data, tmp_path, monkeypatch, undisturbed):
    s = settings(folder, data, tmp_path / "run")
    cut_off(monkeypatch, p2r_min.Run, "save", lambda run: run.step == 6)
    with pytest.raises(Killed):
        go(s)
    assert (tmp_path / "run" / "phases" / "2-reasoning").is_dir()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "pha')                           # a line that was cut off
    assert outcome(go(s, resumed=True)) == undisturbed


def test_a_real_sigkill_inside_a_checkpoint(folder, data, tmp_path):
    """The program as a process of its own, killed by the kernel while step-00002.new is there."""
    flags = ["--model", folder, "--data", data, "--steps", 2, "--questions", 2, "--group", 2,
             "--lr", 1e-3, "--max-pixels", 4096, "--perceive-tokens", 6, "--reason-tokens", 5,
             "--save-every", 1, "--sample-every", 0]
    flags = [str(flag) for flag in flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, ROOT / "p2r_min.py", *flags, "--out", run], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (run / "checkpoints" / "step-00002.new").exists():
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    main(["--resume", str(run)])
    main([*flags, "--out", str(tmp_path / "whole")])
    for name in ("final/model.safetensors", "checkpoints/step-00004/masters.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize("part", ["", "final", "phases/1-perception", "checkpoints/step-00002"])
def test_a_finished_run_goes_on_with_more_iterations(
        folder, data, tmp_path, scripted, capsys, part):
    """Every folder inside a run means the run; a given flag wins, and is told."""
    go(settings(folder, data, tmp_path / "run", eval_data="", sample_every=0, steps=1))
    main(["--resume", str(tmp_path / "run" / part), "--iterations", "2", "--lr", "2e-6"])
    printed = capsys.readouterr().out
    assert "changed: --iterations from 1 to 2" in printed and "--lr from 0.001 to 2e-06" in printed
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == 2e-6


def test_resume_with_another_out_is_refused(folder, data, tmp_path, scripted):
    go(settings(folder, data, tmp_path / "run", eval_data="", sample_every=0))
    with pytest.raises(InputError, match="leave --out away"):
        main(["--resume", str(tmp_path / "run"), "--out", str(tmp_path / "other")])


def test_a_checkpoint_that_cannot_be_read_is_refused_and_nothing_is_lost(
        folder, data, tmp_path, undisturbed):
    s = settings(folder, data, tmp_path / "run")
    run = go(s)
    log = (run / "metrics.jsonl").read_bytes()
    newest = run / "checkpoints" / "step-00006"
    os.truncate(newest / "moments.safetensors", 1000)
    with pytest.raises(InputError, match="step-00006 cannot be read.*move it away"):
        go(s, resumed=True)
    assert (run / "metrics.jsonl").read_bytes() == log and newest.is_dir()
    newest.rename(tmp_path / "away")
    assert outcome(go(s, resumed=True)) == undisturbed


def test_what_lies_beside_the_checkpoints_is_left_alone(folder, data, tmp_path, scripted):
    run = tmp_path / "run"
    go(settings(folder, data, run, eval_data="", save_every=1))
    for name in ("step-00002-mine", "step-best", "notes"):
        (run / "checkpoints" / name).mkdir()
    go(settings(folder, data, run, eval_data="", save_every=1, iterations=2), resumed=True)
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {"step-00002-mine", "step-best", "notes", "step-00011", "step-00012"}


def test_what_a_checkpoint_holds(folder, data, tmp_path, scripted):
    """Masters and moments in float32, the frozen copy; no pickle."""
    run = go(settings(folder, data, tmp_path / "run", save_every=5, eval_data=""))
    inside = run / "checkpoints" / "step-00005"
    assert {path.name for path in inside.iterdir()} == {
        "masters.safetensors", "moments.safetensors", "frozen.safetensors"}
    masters = load_file(inside / "masters.safetensors")
    moments = load_file(inside / "moments.safetensors")
    frozen = load_file(inside / "frozen.safetensors")
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
    assert {float(moments[f"{name}.step"]) for name in masters} == {2.0}     # of this phase
    assert set(frozen) == set(masters)
    assert any(not torch.equal(frozen[name], masters[name]) for name in masters)


def test_weights_come_back_as_the_rounded_masters(folder, tmp_path):
    """In bf16: a resumed run computes with the killed one's bits; so are its next updates."""
    def make():
        model = rollout.load(folder, 4096)[0].bfloat16()
        return model, grpo.MasterAdamW(model, lr=1e-3)

    def update(optimizer, seed):
        torch.manual_seed(seed)
        optimizer.sums = [torch.randn_like(master) for master in optimizer.masters]
        optimizer.step(1.0)

    model, optimizer = make()
    for seed in range(3):
        update(optimizer, seed)
    for name, tensors in grpo.optimizer_state(optimizer).items():
        p2r_min.save_file(tensors, tmp_path / f"{name}.safetensors")
    other, resumed = make()
    grpo.load_optimizer(resumed, tmp_path)
    for seed in (3, 4):
        for a, b in zip(model.parameters(), other.parameters()):
            assert torch.equal(a, b)
        update(optimizer, seed)
        update(resumed, seed)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.masters, resumed.masters))
    assert resumed.masters[0].dtype == torch.float32


def test_a_run_folder_is_used_by_one_process(folder, data, tmp_path, scripted):
    run = go(settings(folder, data, tmp_path / "run", eval_data=""))
    held = p2r_min.evaluation.lock(run / "lock")
    with pytest.raises(InputError, match="used by another process"):
        go(settings(folder, data, run, eval_data=""), resumed=True)
    held.close()


# --- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
        folder, data, tmp_path, capsys, scripted, undisturbed, number):
    calls, s = [], settings(folder, data, tmp_path / "run", save_every=0)

    def interrupted(text, example, whole_text=False):
        calls.append(text)
        if len(calls) == 9:  # after the six of the first measurement: inside the first step
            os.kill(os.getpid(), number)
        return chance(text, example)

    before = signal.getsignal(number)
    scripted(score=interrupted)
    with pytest.raises(SystemExit) as stopped:
        go(s)
    assert stopped.value.code == 128 + number and signal.getsignal(number) is before
    assert f"python p2r_min.py --resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert len(metrics(tmp_path / "run")) == 1
    scripted()
    assert outcome(go(s, resumed=True)) == undisturbed


@pytest.mark.parametrize("measurement", [0, 3, 6])
def test_a_signal_while_accuracy_is_measured_saves_after_it(
        folder, data, tmp_path, monkeypatch, undisturbed, measurement):
    """Not after the step that would come next, which takes minutes; nor never, after the last one."""
    run = tmp_path / "run"
    s, real = settings(folder, data, run, save_every=0), p2r_min.measure

    def interrupted(*inputs):
        if len(metrics(run)) == measurement:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*inputs)
    monkeypatch.setattr(p2r_min, "measure", interrupted)
    with pytest.raises(SystemExit):
        go(s)
    assert len(metrics(run)) == measurement
    monkeypatch.setattr(p2r_min, "measure", real)
    assert outcome(go(s, resumed=True)) == undisturbed


def test_a_second_ctrl_c_stops_at_once(folder, data, tmp_path, scripted):
    """(Python's own handler is put in place first: a shell's background jobs start without it.)"""
    started = signal.signal(signal.SIGINT, signal.default_int_handler)

    def impatient(text, example, whole_text=False):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("went on")

    scripted(score=impatient)
    try:
        with pytest.raises(KeyboardInterrupt):
            go(settings(folder, data, tmp_path / "run", eval_data=""))
    finally:
        signal.signal(signal.SIGINT, started)


def test_a_second_sigterm_is_told_as_one(folder, data, tmp_path, scripted):
    def impatient(text, example, whole_text=False):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("went on")

    scripted(score=impatient)
    with pytest.raises(KeyboardInterrupt) as stopped:
        go(settings(folder, data, tmp_path / "run", eval_data=""))
    assert stopped.value.args == (signal.SIGTERM,)


# --- no invented rewards


def test_an_image_that_breaks_during_the_run_stops_it_after_saving(
        folder, data, tmp_path, scripted, undisturbed):
    """... with cause, file and the command that goes on; the mended run ends as the undisturbed."""
    s, whole = settings(folder, data, tmp_path / "run"), {}
    log = tmp_path / "run" / "metrics.jsonl"

    def breaking(text, example, whole_text=False):
        if not whole and log.exists() and log.read_text().count("\n") == 2:
            for path in data.parent.glob("?.png"):
                whole[path] = path.read_bytes()
                os.truncate(path, 100)
        return chance(text, example)

    scripted(score=breaking)
    with pytest.raises(InputError, match=r"\d\.png.*go on with: python p2r_min.py --resume"):
        go(s)
    assert 2 <= len(metrics(tmp_path / "run")) < 6
    for path, content in whole.items():
        path.write_bytes(content)
    scripted()
    assert outcome(go(s, resumed=True)) == undisturbed


def test_an_update_that_was_cut_short_is_not_saved(folder, data, tmp_path, monkeypatch, scripted):
    """Of two updates on a batch the first one is done when an error comes: nobody may go on there."""
    flags = dict(eval_data="", sample_every=0, save_every=1, updates=2)
    s = settings(folder, data, tmp_path / "run", **flags)
    real, calls = grpo.grpo_loss, []

    def fails(*args, **how):
        calls.append(1)
        if len(calls) == (2 + 2 + 1) * s.questions + 1:    # step 3, its second update, the first group
            raise InputError("the GPU's memory ran out")
        return real(*args, **how)

    monkeypatch.setattr(grpo, "grpo_loss", fails)
    with pytest.raises(InputError, match="ran out; go on with"):
        go(s)
    assert len(metrics(tmp_path / "run")) == 2
    go(s, resumed=True)
    go(settings(folder, data, tmp_path / "whole", **flags))
    ends = [(tmp_path / run / "final" / "model.safetensors").read_bytes() for run in ("run", "whole")]
    assert ends[0] == ends[1]


def test_a_kill_before_the_logs_are_begun_is_no_dead_end(folder, data, tmp_path, monkeypatch, scripted):
    s = settings(folder, data, tmp_path / "run", eval_data="", sample_every=0)
    cut_off(monkeypatch, p2r_min, "cut_back", lambda log, step: log.name == "accuracy.jsonl")
    with pytest.raises(Killed):
        go(s)
    main(["--resume", str(tmp_path / "run")])
    assert len(metrics(tmp_path / "run")) == 6


def test_resume_leaves_a_broken_image_out(folder, data, tmp_path, scripted):
    """With --skip-bad, as the message says: its body is cut off, its header can be read."""
    os.truncate(data.parent / "2.png", (data.parent / "2.png").stat().st_size // 2)
    s = settings(folder, data, tmp_path / "run", eval_data="")
    with pytest.raises(InputError, match=r"2\.png.*--skip-bad.*go on with"):
        go(s)
    main(["--resume", str(tmp_path / "run"), "--skip-bad"])
    assert len(metrics(tmp_path / "run")) == 6


# --- numbers that go wrong


def poison(monkeypatch, how, step):
    """Make the second group's loss, or only its gradient, not finite in one update_batch call."""
    real_loss, real_update = grpo.grpo_loss, grpo.update_batch
    calls = {"update": 0, "loss": 0}

    def loss(logp, *args, **kwargs):
        calls["loss"] += 1
        value, clipped = real_loss(logp, *args, **kwargs)
        if calls["update"] == step and calls["loss"] == 2:
            if how == "loss":
                value = value * math.nan
            else:  # sqrt at 0: the value is a finite 0, its gradient is infinite
                value = value + (logp * 0).sum().clamp(min=0).sqrt()
        return value, clipped

    def update(*args, **kwargs):
        calls.update(update=calls["update"] + 1, loss=0)
        return real_update(*args, **kwargs)
    monkeypatch.setattr(grpo, "grpo_loss", loss)
    monkeypatch.setattr(grpo, "update_batch", update)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_non_finite_update_changes_nothing_and_names_its_question(
        folder, data, tmp_path, monkeypatch, scripted, how):
    poison(monkeypatch, how, 2)
    s = settings(folder, data, tmp_path / "run", eval_data="", save_every=1, sample_every=0)
    kept, real = {}, p2r_min.Run.save

    def spied(run):
        kept[run.step] = [master.clone() for master in run.optimizer.masters]
        real(run)
    monkeypatch.setattr(p2r_min.Run, "save", spied)
    rows = metrics(go(s))
    assert [bool(row["nonfinite"]) for row in rows] == [False, True] + [False] * 4
    second = questions_of(load_data(s.data), 1, s)[1].id
    assert second in rows[1]["nonfinite"] and rows[1]["grad_norm"] is None
    assert len(rows[1]["nonfinite"]) == (1 if how == "loss" else 2)
    assert all(torch.equal(a, b) for a, b in zip(kept[1], kept[2]))
    assert any(not torch.equal(a, b) for a, b in zip(kept[2], kept[3]))


def test_a_norm_that_overflows_updates_nothing(tiny):
    model, _ = tiny
    optimizer = grpo.MasterAdamW(model, lr=1e-3)
    before = [master.clone() for master in optimizer.masters]
    optimizer.sums = [torch.full_like(m, 1e30) for m in before]      # finite, its square is not
    assert not math.isfinite(optimizer.step(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.masters))
    assert not optimizer.adam.state


def test_weights_that_are_not_finite_are_not_saved(folder, data, tmp_path, monkeypatch, scripted):
    def broken(policy, frozen, optimizer, *args, _real=grpo.update_batch, **how):
        found = _real(policy, frozen, optimizer, *args, **how)
        optimizer.masters[0].fill_(math.nan)
        return found
    monkeypatch.setattr(grpo, "update_batch", broken)
    with pytest.raises(InputError, match="not finite after step 1"):
        go(settings(folder, data, tmp_path / "run", eval_data="", save_every=1))
    assert not list((tmp_path / "run" / "checkpoints").glob("step-?????"))


def test_a_policy_that_no_longer_computes_is_not_saved(folder, data, tmp_path, scripted):
    """At this rate the weights stay finite, and what they compute does not."""
    s = settings(folder, data, tmp_path / "run", eval_data="", lr=1e30, sample_every=0)
    with pytest.raises(InputError, match="not a number.*not saved. With a lower --lr, go on with"):
        go(s)
    assert not (tmp_path / "run" / "checkpoints").exists()
    main(["--resume", str(tmp_path / "run"), "--lr", "1e-6"])
    assert len(metrics(tmp_path / "run")) == 6


# --- disks and folders


@pytest.fixture
def small_disk():
    """No file may grow beyond 2 MB; the kernel refuses as it does when a disk is full."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(
        folder, data, tmp_path, small_disk, scripted, undisturbed):
    s, run = settings(folder, data, tmp_path / "run"), tmp_path / "run"

    def filling(text, example, whole_text=False):
        if (run / "checkpoints" / "step-00002").exists():
            small_disk()
        return chance(text, example)

    scripted(score=filling)
    with pytest.raises(InputError, match=r"cannot read or write: .*--resume \S+"):
        go(s)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00002"]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, limit))
    scripted()
    assert outcome(go(s, resumed=True)) == undisturbed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_log_that_cannot_be_written_stops_the_run(folder, data, tmp_path, monkeypatch, scripted):
    def full(path, row):
        with open("/dev/full", "a") as file:
            file.write(json.dumps(row))
    monkeypatch.setattr(p2r_min, "append_json", full)
    with pytest.raises(InputError, match="No space left on device"):
        go(settings(folder, data, tmp_path / "run", eval_data=""))
    assert not (tmp_path / "run" / "final").exists()


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    with p2r_min.written(path) as new:
        new.mkdir()
        (new / "file").write_text("old")
    with pytest.raises(OSError):
        with p2r_min.written(path) as new:
            new.mkdir()
            raise OSError(28, "No space left on device")
    assert (path / "file").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


# --- no foreign code


def test_pickled_weights_are_never_opened(folder, tmp_path):
    """A folder whose only weights are a .bin that would run code when unpickled."""
    import pickle

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="cannot be loaded"):
        rollout.load(tmp_path / "model", 4096)
    assert not (tmp_path / "executed").exists()


# --- what a user may do


def test_a_run_inside_its_model_folder_does_not_copy_itself(folder, data, tmp_path, scripted):
    model = shutil.copytree(folder, tmp_path / "model")
    go(settings(model, data, model / "runs" / "one", eval_data="", sample_every=0))
    final = model / "runs" / "one" / "final"
    assert {path.name for path in final.iterdir()} == {path.name for path in Path(folder).iterdir()} | {"p2r.json"}


def test_a_finished_run_without_checkpoints_is_refused(folder, data, tmp_path, scripted):
    run = go(settings(folder, data, tmp_path / "run", eval_data="", sample_every=0))
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="checkpoints are gone"):
        main(["--resume", str(run), "--iterations", "2"])
    assert (run / "metrics.jsonl").read_bytes() == before


def test_steps_and_held_out_questions_stay_what_they_are(folder, data, tmp_path, scripted):
    run = go(settings(folder, data, tmp_path / "run", sample_every=0))
    with pytest.raises(InputError, match="--steps cannot change from 3 to 2 any more"):
        main(["--resume", str(run), "--iterations", "2", "--steps", "2"])
    other = shutil.copy(data, tmp_path / "other.jsonl")
    with pytest.raises(InputError, match="ask its weights other questions"):
        main(["--resume", str(run), "--eval-data", str(other)])


def test_a_run_goes_on_from_another_folder(folder, data, tmp_path, monkeypatch, scripted):
    """Paths are kept as absolute ones; and a run may be called as a part of one."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(data.parent)
    flags = ["--model", str(folder), "--max-pixels", "4096", "--steps", "1", "--questions", "2", "--group", "2",
             "--perceive-tokens", "4", "--reason-tokens", "4"]
    main([*flags, "--data", data.name, "--out", str(tmp_path / "a" / "checkpoints" / "one")])
    monkeypatch.chdir(tmp_path / "a" / "checkpoints")
    main(["--resume", "one", "--iterations", "2"])
    assert len(metrics(tmp_path / "a" / "checkpoints" / "one")) == 4


def test_what_a_kill_left_half_written_goes_with_the_next_checkpoint(folder, data, tmp_path, scripted):
    half = tmp_path / "run" / "checkpoints" / "step-00001.new"
    half.mkdir(parents=True)
    s = settings(folder, data, tmp_path / "run", eval_data="", sample_every=0)
    go(s, resumed=True)
    assert not half.exists()


def test_a_signal_to_a_run_whose_terminal_is_gone_saves_it(folder, data, tmp_path):
    """Ctrl-C reaches `tee`, too: nobody reads what the run prints from then on."""
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "p2r_min.py"), "--model", str(folder), "--data", str(data), "--max-pixels", "4096",
               "--questions", "2", "--group", "2", "--perceive-tokens", "4", "--reason-tokens", "4", "--save-every", "0", "--out", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (run / "metrics.jsonl").exists() or not metrics(run):
        assert process.poll() is None
        time.sleep(0.05)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert list((run / "checkpoints").glob("step-*"))
