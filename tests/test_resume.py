"""Nothing lost, nothing silent: resume, faults in the middle of a run, numbers that go wrong, hostile input.

tests/kill.py is the long proof with real kills; here a run is cut off in-process, at chosen places, and once for real.
"""

import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from conftest import noise
from safetensors.torch import load_file
from transformers import Qwen3VLForConditionalGeneration

import grpo
import p2r_min
import rollout
from crop import Box, Parsed, parse_boxes, tricks
from eval import Example, Score, load_data
from p2r_min import Settings, main, train
from rollout import InputError

MEASURED = ("seconds_rollout", "seconds_partner", "seconds_update", "tokens_per_s", "peak_gib")
ROOT = Path(p2r_min.__file__).parent


class Killed(BaseException):
    """Stands in for SIGKILL: no handler of the program may catch it and tidy up."""


def write_data(path):
    """Four questions on noise; the held-out set is the same."""
    for i in range(4):
        noise(200, 120, i).save(path / f"{i}.png")
    (path / "data.jsonl").write_text("".join(json.dumps(
        {"image": f"{i}.png", "question": f"Which way, {i}?", "answer": "down", "id": f"q{i}"}) + "\n" for i in range(4)))
    return path / "data.jsonl"


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


def settings(folder, data, run, **more):
    """Two phases of three steps; checkpoints after steps 2, 4 and 6."""
    return Settings(**dict(dict(model=str(folder), data=str(data), eval_data=str(data), out=str(run), steps=3, questions=2, group=3,
                                lr=1e-3, max_pixels=64 * 64, perceive_tokens=6, reason_tokens=5, rollout_batch=2, save_every=2,
                                eval_every=3, sample_every=2), **more))


# A random model writes no boxes and is never right, so both are made from its text: pure functions, like the real ones.
LISTS = ([], [Box(100, 100, 400, 400, "a")], [Box(0, 0, 200, 200, "a"), Box(300, 300, 500, 500, "b"), Box(600, 600, 900, 900, "c")])


def boxes_from(text):
    return Parsed(LISTS[zlib.crc32(text.encode()) % 3], True, 0)


def chance(text, example):
    return Score(float(zlib.crc32(text.encode()) % 2), True)


def go(s, resume=False):
    return train(s, boxes_from, chance, resume=resume)


def outcome(run):
    """Everything of a run that must not depend on interruptions."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = ["final/model.safetensors", "checkpoints/step-00006/model.safetensors", "eval.json"]
    files += sorted(f"samples/{path.name}" for path in (run / "samples").iterdir())
    return ([{k: v for k, v in row.items() if k not in MEASURED} for row in rows], {name: (run / name).read_bytes() for name in files})


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed")
    return outcome(go(settings(folder, write_data(path), path / "run")))


def cut_off(monkeypatch, owner, name, when):
    """Kill the program at a call of owner.name for which when(*arguments) holds, before the call does anything."""
    real = getattr(owner, name)

    def spied(*args, **kwargs):
        if when(*args, **kwargs):
            monkeypatch.setattr(owner, name, real)
            raise Killed
        return real(*args, **kwargs)
    monkeypatch.setattr(owner, name, spied)


# --- resume


def test_a_run_killed_anywhere_comes_back_bit_for_bit(folder, data, tmp_path, monkeypatch, undisturbed):
    """Cut off after a step was logged (3 is the last of a phase), and halfway through the writing of a checkpoint.
    A second undisturbed run shows determinism: same seed, same machine, same bits."""
    assert len(undisturbed[0]) == 6 and any(row["grad_norm"] > 0 for row in undisturbed[0])
    again = outcome(go(settings(folder, data, tmp_path / "again")))
    assert again == undisturbed
    for step in (3, 5):
        s = settings(folder, data, tmp_path / f"step-{step}")
        cut_off(monkeypatch, grpo, "append_json", lambda path, row: row["step"] == step)
        with pytest.raises(Killed):
            go(s)
        assert outcome(go(s, resume=True)) == undisturbed, step
    for name in ("model.safetensors", "frozen.safetensors"):
        s = settings(folder, data, tmp_path / name)
        cut_off(monkeypatch, grpo, "save_file", lambda tensors, path, **_: path.name == name and "step-00004" in str(path))
        with pytest.raises(Killed):
            go(s)
        left = tmp_path / name / "checkpoints"
        assert {path.name for path in left.iterdir()} == {"step-00002", "step-00004.new"}   # the old one is whole, the new one is not named
        assert outcome(go(s, resume=True)) == undisturbed, name
        assert {path.name for path in left.iterdir()} == {"step-00004", "step-00006"}       # the newest two


def test_a_real_sigkill_inside_a_checkpoint(folder, data, tmp_path):
    """The program itself, as a process of its own, killed by the kernel while step-00002.new is there."""
    flags = ["--model", folder, "--data", data, "--steps", 2, "--questions", 2, "--group", 2, "--lr", 1e-3, "--max-pixels", 4096,
             "--perceive-tokens", 6, "--reason-tokens", 5, "--save-every", 1, "--sample-every", 0]
    flags = [str(flag) for flag in flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, ROOT / "p2r_min.py", *flags, "--out", run], env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (run / "checkpoints" / "step-00002.new").exists():
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert main(["--resume", str(run)]) == 0 and main([*flags, "--out", str(tmp_path / "whole")]) == 0
    for name in ("final/model.safetensors", "checkpoints/step-00004/model.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] == [1, 2, 3, 4]


def test_a_run_killed_before_its_first_checkpoint_starts_over(folder, data, tmp_path, monkeypatch, capsys, undisturbed):
    s = settings(folder, data, tmp_path / "run")
    cut_off(monkeypatch, grpo, "append_json", lambda path, row: row["step"] == 2)
    with pytest.raises(Killed):
        go(s)
    assert outcome(go(s, resume=True)) == undisturbed
    assert "no checkpoint yet: starting over" in capsys.readouterr().out


def damage(path, how):
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "missing":
        path.unlink()
    else:  # one bit
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("file, how", [("model.safetensors", "truncated"), ("optimizer.safetensors", "flipped"), ("state.json", "flipped"),
                                       ("manifest.json", "truncated"), ("manifest.json", "missing"), ("tokenizer.json", "missing")])
def test_a_damaged_checkpoint_is_recognised(folder, data, tmp_path, capsys, file, how):
    (tmp_path / "run").mkdir()
    for step in (3, 7):
        grpo.save_checkpoint(tmp_path / "run", folder, {"model": {"a": torch.ones(9)}, "optimizer": {"a": torch.zeros(9)}}, {"step": step})
    assert grpo.newest_checkpoint(tmp_path / "run")[1] == {"step": 7}
    damage(tmp_path / "run" / "checkpoints" / "step-00007" / file, how)
    path, state = grpo.newest_checkpoint(tmp_path / "run")
    assert path.name == "step-00003" and state == {"step": 3}
    warning = capsys.readouterr().err
    assert "step-00007 is incomplete or damaged" in warning and warning.count("\n") == 1
    damage(path / file, how)
    assert grpo.newest_checkpoint(tmp_path / "run") == (None, {})


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(folder, data, tmp_path, undisturbed):
    run = go(settings(folder, data, tmp_path / "run"))
    damage(run / "checkpoints" / "step-00006" / "model.safetensors", "flipped")
    shutil.rmtree(run / "final")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "itera')                                          # a line that was cut off
    assert outcome(go(settings(folder, data, run), resume=True)) == undisturbed
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00004", "step-00006"}


def test_what_a_checkpoint_holds(folder, data, tmp_path):
    """Masters, moments, frozen copy, generators, boxes, settings; no pickle; and it is an ordinary model folder."""
    run = go(settings(folder, data, tmp_path / "run", save_every=5))
    inside, switch = run / "checkpoints" / "step-00005", run / "checkpoints" / "step-00006"
    state = json.loads((inside / "state.json").read_text())
    assert (state["step"], state["iteration"], state["phase"], state["settings"]["group"]) == (5, 1, "reasoning", 3)
    examples = load_data(data)
    asked = {examples.index(e) for step in (3, 4) for e in p2r_min.draw(examples, step, settings(folder, data, run))}
    assert {int(place) for place in state["fixed"]} == asked and state["report"]["during"][0]["step"] == 3 and len(state["random"]) == 3
    assert {path.suffix for path in inside.iterdir()} <= {".json", ".safetensors", ".jinja"}
    masters, moments = load_file(inside / "model.safetensors"), load_file(inside / "optimizer.safetensors")
    assert {t.dtype for t in masters.values()} == {torch.float32} and {float(moments[f"{n}.step"]) for n in masters} == {2.0}
    assert not torch.equal(torch.cat([t.flatten() for t in masters.values()]),
                           torch.cat([t.flatten() for t in load_file(inside / "frozen.safetensors").values()]))
    told = float(re.search(r"up to (\S+) GiB", grpo.disk_use(run, rollout.load(folder, 4096)[0]))[1])
    assert told == pytest.approx(sum(path.stat().st_size for path in inside.glob("*.safetensors")) / 2**30, rel=0.1)
    assert not (switch / "optimizer.safetensors").exists() and not (switch / "frozen.safetensors").exists()
    model = Qwen3VLForConditionalGeneration.from_pretrained(inside, dtype=torch.float32)
    assert all(torch.equal(p, masters[name]) for name, p in model.named_parameters())
    again = go(settings(inside, data, tmp_path / "again", steps=1))               # as another run's --model
    assert {path.name for path in (again / "final").iterdir()} == {path.name for path in folder.iterdir()}


def test_weights_come_back_as_the_rounded_masters(folder, tmp_path):
    """In bf16: what a resumed run computes with is, bit for bit, what the killed one did; so are its next updates."""
    def make():
        model = rollout.load(folder, 4096)[0].bfloat16()
        return model, grpo.MasterAdamW(model, lr=1e-3)

    def update(model, optimizer, seed):
        torch.manual_seed(seed)
        for master in optimizer.masters:
            master.grad = torch.randn_like(master)
        optimizer.step(1.0)

    model, optimizer = make()
    for seed in range(3):
        update(model, optimizer, seed)
    grpo.save_checkpoint(tmp_path, folder, optimizer.state(), {"step": 3})
    other, resumed = make()
    resumed.load_masters(tmp_path / "checkpoints" / "step-00003")
    resumed.load_moments(tmp_path / "checkpoints" / "step-00003")
    for seed in (3, 4):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
        update(model, optimizer, seed), update(other, resumed, seed)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.masters, resumed.masters))
    assert optimizer.masters[0].dtype == torch.float32 and next(other.parameters()).dtype == torch.bfloat16


def test_the_random_generators_come_back():
    import random
    state = json.loads(json.dumps(grpo.random_state()))
    expected = random.random(), torch.rand(3)
    grpo.set_random_state(state)
    assert random.random() == expected[0] and torch.equal(torch.rand(3), expected[1])


@pytest.mark.parametrize("flags, needle", [
    (["--group", "16"], "--group cannot change from 3 to 16 on --resume: the steps before and after would belong to two algorithms"),
    (["--seed", "1"], "the order of the questions"), (["--questions", "3"], "--questions"), (["--steps", "9"], "--steps"),
    (["--max-pixels", "8192"], "would not compare"), (["--data", "other.jsonl"], "one set of questions"), (["--kl", "0"], "--kl"),
    (["--strict-boxes"], "--strict-boxes"),
])
def test_settings_that_may_not_change_on_resume(folder, data, tmp_path, capsys, flags, needle):
    run = tmp_path / "run"
    run.mkdir()
    grpo.write_json(run / "config.json", vars(settings(folder, data, run)))
    before = (run / "config.json").read_bytes()
    assert main(["--resume", str(run), *flags]) == 2
    message = capsys.readouterr().err
    assert needle in message and message.count("\n") == 1 and (run / "config.json").read_bytes() == before


def test_the_learning_rate_may_change_and_is_noted(folder, data, tmp_path, monkeypatch, capsys):
    flags = ["--model", folder, "--data", data, "--steps", 2, "--questions", 2, "--group", 2, "--max-pixels", 4096, "--perceive-tokens", 4,
             "--reason-tokens", 4, "--save-every", 1, "--sample-every", 0, "--out", tmp_path / "run"]
    cut_off(monkeypatch, grpo, "append_json", lambda path, row: row["step"] == 3)
    with pytest.raises(Killed):
        main([str(flag) for flag in flags])
    assert main(["--resume", str(tmp_path / "run"), "--lr", "2e-6", "--group", "2"]) == 0     # the same --group is no change
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["lr"] == 2e-6 and config["resumed"] == [{"step": 2, "changed": {"lr": [1e-6, 2e-6]}}]
    assert [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").open()] == [1e-6, 1e-6, 2e-6, 2e-6]
    # Finished: one sentence, and nothing is touched. A larger --iterations trains it further.
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["--resume", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "is finished" in out and out.count("\n") == 1
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main(["--resume", str(tmp_path / "run"), "--iterations", "2"]) == 0
    assert [json.loads(line)["iteration"] for line in (tmp_path / "run" / "metrics.jsonl").open()] == [1] * 4 + [2] * 4


def test_resume_of_what_is_no_run(tmp_path, capsys):
    assert main(["--resume", str(tmp_path / "nothing")]) == 2
    assert "config.json" in capsys.readouterr().err


def test_changed_questions_are_noticed(folder, data, tmp_path):
    run = go(settings(folder, data, tmp_path / "run"))
    data.write_text(data.read_text().replace("Which way, 2?", "Which colour, 2?"))
    with pytest.raises(InputError, match="no longer holds the questions"):
        go(settings(folder, data, run), resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(folder, data, tmp_path, capsys, undisturbed, number):
    calls, s = [], settings(folder, data, tmp_path / "run", save_every=0)

    def interrupted(text, example):
        calls.append(text)
        if len(calls) == 3:  # in the middle of the first step
            os.kill(os.getpid(), number)
        return chance(text, example)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train(s, boxes_from, interrupted)
    assert stopped.value.code == 128 + number and signal.getsignal(number) is before
    assert f"python p2r_min.py --resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert outcome(go(s, resume=True)) == undisturbed


def test_a_second_ctrl_c_stops_at_once(folder, data, tmp_path):
    started = signal.signal(signal.SIGINT, signal.default_int_handler)            # a shell's background jobs start deaf to it
    before = signal.getsignal(signal.SIGINT)

    def impatient(text, example):
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is not before:                      # the first one is being handled
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("went on")

    try:
        with pytest.raises(KeyboardInterrupt):
            train(settings(folder, data, tmp_path / "run", eval_data=""), boxes_from, impatient)
    finally:
        signal.signal(signal.SIGINT, started)


# --- no invented rewards


def test_an_image_that_breaks_during_the_run_stops_it_after_saving(folder, data, tmp_path, capsys, undisturbed):
    """... with the cause, the file and the command that goes on; no reward was made up, so the mended run ends as the undisturbed one."""
    s, whole, log = settings(folder, data, tmp_path / "run"), {}, tmp_path / "run" / "metrics.jsonl"

    def breaking(text, example):
        if not whole and log.exists() and log.read_text().count("\n") == 2:       # in step 3, which shows no sample
            for path in data.parent.glob("?.png"):
                whole[path] = path.read_bytes()
                os.truncate(path, 100)
        return chance(text, example)

    with pytest.raises(InputError) as error:
        train(s, boxes_from, breaking)
    assert re.search(r"cannot read the image .*\d\.png of example q\d: .*; saved, continue with: python p2r_min.py --resume", str(error.value))
    assert grpo.newest_checkpoint(tmp_path / "run")[1]["step"] == log.read_text().count("\n") < 6
    for path, content in whole.items():
        path.write_bytes(content)
    assert outcome(go(s, resume=True)) == undisturbed


def test_unknown_answer_forms_and_empty_groups_are_errors(tiny, tmp_path):
    _, codec = tiny
    noise(100, 100).save(tmp_path / "a.png")
    odd = Example(tmp_path / "a.png", "Which way?", "down", "essay", id="q7")
    with pytest.raises(InputError, match="essay"):
        rollout.reasoner_prompt(codec, odd.load_image(), [], odd.question, odd.answer_form)
    with pytest.raises(InputError, match="essay.*q7"):
        p2r_min.evaluation.score("<answer>down</answer>", odd)
    with pytest.raises(InputError, match="at least one token"):
        grpo.pack(rollout.perceiver_prompt(codec, odd.load_image(), "Which way?"), [])


def test_cut_off_texts_are_marked_in_the_samples(tmp_path, monkeypatch):
    shown = []
    noise(100, 100).save(tmp_path / "a.png")
    monkeypatch.setattr(p2r_min, "picture", lambda image, boxes, question, texts: shown.extend(texts) or image)
    cut = rollout.Completion(torch.tensor([1]), torch.zeros(1), False, "I think")
    p2r_min.save_sample(tmp_path, 1, "perception", Example(tmp_path / "a.png", "q", "a"), [], cut, "(not asked: overlap)", 0.0)
    assert dict(shown)["perceiver"] == "I think [cut off by the token limit]" and dict(shown)["reasoner"] == "(not asked: overlap)"


def test_overlong_prompts_are_counted_as_they_will_be_encoded(tiny, tmp_path):
    """The count for the Perceiver is the length of its encoded prompt; for the Reasoner, that with three crops of a whole image each.
    A question that just fits is not listed, one token more is."""
    _, codec = tiny
    image = noise(500, 500)
    image.save(tmp_path / "a.png")
    example = Example(tmp_path / "a.png", "Which way, then?", "down", size=image.size, id="long")
    lengths = [len(rollout.perceiver_prompt(codec, image, example.question).ids)]
    texts = rollout.REASONER.format(regions=rollout.REGIONS["both"], question=example.question, form=rollout.FORMS["free_form"])
    lengths.append(len(codec.encode(texts, [image] * 4).ids))                     # square: each takes the whole budget of 16 tokens
    fits = max(lengths[0] - 16, lengths[1] - 4 * 16)
    assert rollout.fitting(codec, [example], fits, 10) == rollout.fitting(codec, [example], 10**6, 10) == [example]
    with pytest.raises(InputError) as error:
        rollout.fitting(codec, [example], fits - 1, 10)
    tokens, limit = map(int, re.search(r"long \((\d+) tokens, (\d+) allowed", str(error.value)).groups())
    assert tokens - limit == 1 and tokens in lengths
    with pytest.raises(InputError, match=rf"{lengths[1]} tokens, {lengths[1] - 1} allowed"):
        rollout.fitting(codec, [example], 10**6, 4096 - lengths[1] + 1)           # the model has 4096 positions
    panorama = noise(900, 30)
    count = codec.encode("x", [panorama]).ids.eq(codec.image_token_id).sum()
    assert codec.visual_tokens(*panorama.size) == count


def test_the_default_limits_are_the_papers():
    budget = Settings.max_pixels // 32**2                                         # Qwen3-VL: 32 x 32 pixels a visual token
    assert (budget + Settings.text_tokens, 4 * budget + Settings.text_tokens) == (2560, 8704)


def test_overlong_questions_are_listed_and_refused_before_training(folder, data, tmp_path, capsys):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for i in (1, 3):
        rows[i]["question"] = "Which way? " * 200
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["--model", str(folder), "--data", str(data), "--max-pixels", "4096", "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "2 of 4 questions" in message and "q1 (" in message and "q3 (" in message and "q0" not in message
    assert message.count("\n") == 1 and not (tmp_path / "run").exists()


def test_overlong_questions_are_skipped_and_counted(tiny, capsys):
    _, codec = tiny
    examples = [Example(None, text, "down", id=name, size=(99, 99)) for name, text in (("a", "Which way?"), ("b", "Which way? " * 200))]
    assert rollout.fitting(codec, examples, 512, 10, skip=True) == examples[:1]
    assert capsys.readouterr().out.startswith("skipped: 1 of 2 questions") and rollout.fitting(codec, examples[:1], 512, 10) == examples[:1]
    with pytest.raises(InputError, match=r"1 of 1 .* b \(\d+ tokens, \d+ allowed\)"):
        rollout.fitting(codec, examples[1:], 512, 10, skip=True)


# --- numbers that go wrong


def poison(monkeypatch, how, steps):
    """Make the second group's loss (or only its gradient) not finite in the given update_batch calls."""
    real_loss, real_update, calls = grpo.grpo_loss, grpo.update_batch, {"update": 0, "loss": 0}

    def loss(logp, *args, **kwargs):
        calls["loss"] += 1
        value = real_loss(logp, *args, **kwargs)
        if calls["update"] in steps and calls["loss"] == 2:
            # sqrt at 0: the value is a finite 0, its gradient is infinite.
            return value * math.nan if how == "loss" else value + (logp * 0).sum().clamp(min=0).sqrt()
        return value

    def update(*args, **kwargs):
        calls.update(update=calls["update"] + 1, loss=0)
        return real_update(*args, **kwargs)
    monkeypatch.setattr(grpo, "grpo_loss", loss)
    monkeypatch.setattr(grpo, "update_batch", update)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_non_finite_update_is_skipped_and_its_question_named(folder, data, tmp_path, monkeypatch, capsys, how):
    """Weights, masters and moments are what they were; the next update counts as the first would have."""
    poison(monkeypatch, how, {2})
    s = settings(folder, data, tmp_path / "run", eval_data="", save_every=1, steps=2, sample_every=0)
    kept = {}
    real = grpo.save_checkpoint
    monkeypatch.setattr(grpo, "save_checkpoint", lambda run, source, tensors, state: kept.update(
        {state["step"]: {name: t.clone() for name, t in tensors["model"].items()}}) or real(run, source, tensors, state))
    run = go(s)
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in (run / "metrics.jsonl").open()]
    assert [row["skipped"] for row in rows] == [0, 1, 0, 0]
    second = p2r_min.draw(load_data(data), 1, s)[1].id
    assert rows[1]["nonfinite"] == [second] and rows[1]["grad_norm"] is None and rows[0]["nonfinite"] == []
    assert all(torch.equal(kept[1][name], t) for name, t in kept[2].items())
    assert any(not torch.equal(kept[0 + 1][name], t) for name, t in kept[3].items())
    assert all(t.isfinite().all() for step in kept.values() for t in step.values())


def test_three_non_finite_updates_in_a_row_stop_the_run_with_a_whole_checkpoint(folder, data, tmp_path, monkeypatch):
    s = settings(folder, data, tmp_path / "run", eval_data="", sample_every=0)
    with monkeypatch.context() as patch:
        poison(patch, "loss", {1, 3, 4, 5})                                       # one alone does not stop it
        with pytest.raises(InputError, match=r"3 updates in a row were not finite: look at question q\d.*--resume"):
            go(s)
    path, state = grpo.newest_checkpoint(tmp_path / "run")
    assert state["step"] == 5 and all(t.isfinite().all() for t in load_file(path / "model.safetensors").values())
    assert load_file(path / "optimizer.safetensors") == {}                        # both updates of this phase were skipped
    go(s, resume=True)
    assert [json.loads(line)["skipped"] for line in (tmp_path / "run" / "metrics.jsonl").open()] == [1, 0, 1, 1, 1, 0]


def test_a_norm_that_overflows_is_skipped_too(tiny):
    model, _ = tiny
    optimizer = grpo.MasterAdamW(model, lr=1e-3)
    before = [m.clone() for m in optimizer.masters]
    for master in optimizer.masters:
        master.grad = torch.full_like(master, 1e30)                               # finite, its square is not
    assert not math.isfinite(optimizer.step(1.0)) and all(torch.equal(a, b) for a, b in zip(before, optimizer.masters))
    assert not optimizer.adam.state


def test_outputs_that_are_not_numbers_stop_the_sampler(tiny):
    model, codec = tiny
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = math.nan
    with pytest.raises(InputError, match="not a number"):
        list(rollout.sample(model, codec, [rollout.perceiver_prompt(codec, noise(99, 99), "Which way?")], greedy=True, max_tokens=3, batch=1))


# --- reward hacking is visible


@pytest.mark.parametrize("boxes, expected", [
    ([], set()),
    ([(100, 100, 400, 400)], set()),
    ([(0, 0, 1000, 1000)], {"whole"}), ([(20, 0, 980, 950)], {"whole"}), ([(0, 0, 900, 990)], set()),    # 91 % and 89 %
    ([(100, 100, 900, 900), (200, 200, 400, 400)], {"nested"}), ([(200, 200, 400, 400), (100, 100, 900, 900)], {"nested"}),
    ([(100, 100, 900, 900), (800, 800, 1000, 1000)], set()),                      # a corner in common
    ([(0, 0, 200, 200), (300, 0, 500, 200), (600, 0, 800, 200), (0, 300, 200, 500)], {"many"}),
    ([(0, 0, 1000, 1000), (0, 0, 200, 200)], {"whole", "nested"}),
])
def test_tricks(boxes, expected):
    assert tricks(Parsed([Box(*map(float, box), "a") for box in boxes], True, 0)) == expected


def test_garbage_is_a_trick_and_an_empty_list_is_not():
    assert tricks(parse_boxes("what?")) == {"unparsable"} and tricks(parse_boxes("[]")) == set()


@pytest.mark.parametrize("strict, earned, calls", [(False, 1.0, 5), (True, 0.2, 1)])
def test_strict_boxes_earn_nothing_and_every_share_is_logged(folder, data, tmp_path, strict, earned, calls):
    whole, inner = Box(0, 0, 1000, 1000, "a"), Box(100, 100, 300, 300, "b")
    lists = iter([Parsed([inner], True, 0), Parsed([whole], True, 0), Parsed([whole._replace(x2=800.0), inner], True, 0), Parsed([], False, 0),
                  Parsed([Box(200.0 * i, 0, 200.0 * i + 100, 100, "c") for i in range(4)], True, 0)] * 9)
    run = train(settings(folder, data, tmp_path / "run", eval_data="", steps=1, questions=1, group=5, strict_boxes=strict),
                lambda text: next(lists), lambda text, example: Score(1.0, True))
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert row["reward_mean"] == pytest.approx(earned) and row["partner_calls"] == calls and row["void"] == pytest.approx(1 - earned)
    assert [row[f"boxes_{name}"] for name in ("whole", "nested", "many")] == pytest.approx([0.2] * 3) and row["unparsable"] == pytest.approx(0.2)
    assert row["unparsable_rewarded"] == pytest.approx(0.0 if strict else 0.2)


# --- disks and folders


@pytest.fixture
def small_disk():
    """No file may grow beyond 2 MB; the kernel refuses as it does when a disk is full (another number, the same kind of error)."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(folder, data, tmp_path, small_disk, undisturbed):
    s, run = settings(folder, data, tmp_path / "run"), tmp_path / "run"

    def filling(text, example):
        if (run / "checkpoints" / "step-00002").exists():
            small_disk()
        return chance(text, example)

    with pytest.raises(InputError) as error:
        train(s, boxes_from, filling)
    assert re.fullmatch(r"cannot write to \S+: .*; what was there is whole, .*--resume \S+", str(error.value))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00002"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert outcome(go(s, resume=True)) == undisturbed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_log_that_cannot_be_written_stops_the_run(folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "disk_use", lambda run, policy: (run / "metrics.jsonl").symlink_to("/dev/full"))
    with pytest.raises(InputError, match="No space left on device"):
        go(settings(folder, data, tmp_path / "run", eval_data=""))
    assert not (tmp_path / "run" / "final").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(folder, data, tmp_path, capsys):
    (tmp_path / "file").touch()                                                   # (root may write to read-only folders)
    for out in (tmp_path / "file" / "run", tmp_path / "file"):
        assert main(["--model", str(folder), "--data", str(data), "--max-pixels", "4096", "--out", str(out)]) == 2
        message = capsys.readouterr().err
        assert str(out) in message and message.count("\n") == 1 and "Traceback" not in message


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    grpo.write_json(path, {"a": 1})
    with pytest.raises(OSError):
        with grpo.replacing(path) as new:
            new.write_text("{")
            raise OSError(28, "No space left on device")
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


# --- hostile input


def png_header(path, width, height):
    """A PNG of which only the header is there: what Pillow reads before it decodes."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def line(tmp_path, image):
    path = tmp_path / "data" / "data.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"image": str(image), "question": "Which way?", "answer": "down"}) + "\n")
    return path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_and_large_photos_are_not(tmp_path):
    path = line(tmp_path, "bomb.png")
    for width, height in ((20_000, 10_000), (60_000, 60_000)):
        png_header(path.parent / "bomb.png", width, height)
        with pytest.raises(InputError, match="line 1.*'image'.*decompression bomb"):
            load_data(path)
    png_header(path.parent / "bomb.png", 12_000, 10_000)
    assert load_data(path)[0].size == (12_000, 10_000)


def test_paths_that_leave_the_data_folder_are_refused(tmp_path):
    noise(50, 50).save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", tmp_path / "secret.png", "link.png", "a/../../secret.png"):
        with pytest.raises(InputError, match="line 1.*'image'.*outside.*--images"):
            load_data(line(tmp_path, name))
    assert load_data(line(tmp_path, "../secret.png".removeprefix("../")), images=tmp_path)     # --images says where they may be
    noise(50, 50).save(tmp_path / "data" / "own.png")
    assert load_data(line(tmp_path, tmp_path / "data" / "own.png"))               # absolute, but inside
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    noise(50, 50).save(blobs / "x.png")
    (snapshot / "own.png").symlink_to(blobs / "x.png")
    assert load_data(line(tmp_path, "own.png"), images=snapshot)                  # as a hub download looks


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


def test_the_code_holds_no_door_for_foreign_code():
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"torch\.load|torch\.save|import pickle|trust_remote_code=True|(?<![\w.])(eval|exec)\(|os\.system", text), path.name


def test_model_output_is_data():
    """Format strings, markup and a megabyte of brackets are text like any other."""
    start = time.perf_counter()
    assert parse_boxes("{[" * 500_000).boxes == [] and parse_boxes("{0.__class__} %s {}" * 1000).boxes == []
    assert time.perf_counter() - start < 1.0
