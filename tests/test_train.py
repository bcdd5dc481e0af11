"""p2r_min.py: who is frozen when, the run folder, errors, and runs on the toy and on a full-width model."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import noise
from safetensors.torch import load_file
from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import p2r_min
import rollout
import toy
from crop import Box, Parsed
from eval import Score
from p2r_min import Settings, draw, main, train


@pytest.fixture
def data(tmp_path):
    """Four questions on noise, with boxes to measure against."""
    for i in range(4):
        noise(200, 120, i).save(tmp_path / f"{i}.png")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(
        {"image": f"{i}.png", "question": f"Which way, {i}?", "answer": "down", "boxes": [[100, 100, 300, 300]]}) + "\n" for i in range(4)))
    return tmp_path / "data.jsonl"


def small(folder, data, run, **more):
    return Settings(**dict(dict(model=str(folder), data=str(data), out=str(run), steps=2, questions=2, group=3, lr=1e-3,
                                max_pixels=64 * 64, perceive_tokens=6, reason_tokens=5, rollout_batch=2, sample_every=1, judge="none"), **more))


class Cycle:
    """Boxes and rewards for a random model, whose own text holds none: 0, 1 and 3 boxes in turn."""
    LISTS = ([], [Box(100, 100, 400, 400, "a")],
             [Box(0, 0, 200, 200, "a"), Box(300, 300, 500, 500, "b"), Box(600, 600, 900, 900, "c")])

    def __init__(self):
        self.counts, self.scored = [], 0

    def read_boxes(self, text):
        self.counts.append(len(self.counts) % 3)
        return Parsed(self.LISTS[self.counts[-1]], True, 0)

    def score(self, text, example):
        self.scored += 1
        return Score(float(self.scored % 2), True)


def weights(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()]).clone()


def test_the_frozen_copy_is_what_each_phase_says(folder, data, tmp_path, monkeypatch):
    """At each phase start it equals the policy, which is where the last phase ended; it never changes
    within a phase; it answers as the other role; it is the KL's reference; Adam starts fresh."""
    seen = []

    def spy_on(name, phase):
        def spied(play, *args):
            assert play.policy is not play.frozen and not any(p.requires_grad for p in play.frozen.parameters())
            seen.append((name, "start", weights(play.policy), weights(play.frozen)))
            return phase(play, *args)
        return spied

    def spy_update(policy, reference, optimizer, *args, **kwargs):
        fresh = len(optimizer.adam.state) == 0
        result = update(policy, reference, optimizer, *args, **kwargs)
        seen.append(("update", fresh, weights(policy), weights(reference)))
        return result

    roles = []
    for verb in ("perceive", "reason"):
        def spied(model, *args, _verb=verb, _real=getattr(p2r_min, verb), **how):
            roles.append((_verb, how["greedy"] if "greedy" in how else False, any(p.requires_grad for p in model.parameters())))
            return _real(model, *args, **how)
        monkeypatch.setattr(p2r_min, verb, spied)
    update = p2r_min.grpo.update_batch
    monkeypatch.setattr(p2r_min.grpo, "update_batch", spy_update)
    monkeypatch.setattr(p2r_min, "PHASES", {n: spy_on(n, f) for n, f in p2r_min.PHASES.items()})
    cycle = Cycle()
    train(small(folder, data, tmp_path / "run", iterations=2), cycle.read_boxes, cycle.score)

    assert [s[0] for s in seen[::2]] == ["perception"] * 2 + ["reasoning"] * 2 + ["perception"] * 2 + ["reasoning"] * 2
    assert [s[1] for s in seen[1::2]] == [True, False] * 4                       # fresh moments at each phase start
    for i in range(0, len(seen), 2):
        (_, _, policy, frozen), (_, _, after, reference) = seen[i], seen[i + 1]
        assert torch.equal(frozen, reference)                                    # partner = KL reference
        assert torch.equal(policy, frozen) == (i % 4 == 0)                       # equal at a phase start only
        assert not torch.equal(policy, after)
        if i:
            assert torch.equal(policy, seen[i - 1][2])                           # goes on from where it was
        if i % 4:
            assert torch.equal(frozen, seen[i - 2][3])                           # unchanged within the phase
    perception = [("perceive", False, True), ("reason", True, False)] * 2        # sampled by the policy, answered greedily
    reasoning = [("perceive", True, False), ("reason", False, True)] * 2
    assert roles == (perception + reasoning) * 2


ASKED = {  # one step of each phase: (verb, greedy, by the policy, questions asked)
    "perception": [("perceive", False, True, 4), ("reason", True, False, None)],
    "reasoning": [("perceive", True, False, 4), ("reason", False, True, 4)],
    "joint": [("perceive", False, True, 2), ("reason", True, False, None), ("perceive", True, False, 2), ("reason", False, True, 2)],
    "thinking": [("perceive", True, False, 0), ("reason", False, True, 4)],
}


@pytest.mark.parametrize("schedule, phases", [("alternate", ["perception", "reasoning"]), ("joint", ["joint"] * 2),
                                              ("perceiver", ["perception"] * 2), ("reasoner", ["reasoning"] * 2), ("think", ["thinking"] * 2)])
def test_schedules_differ_in_who_is_trained_and_in_nothing_else(folder, data, tmp_path, monkeypatch, schedule, phases):
    """Who is asked in a step; the same questions, updates and frozen copies under every schedule; without roles, no boxes."""
    asked, copies, trained = [], [], []
    for verb in ("perceive", "reason"):
        def spied(model, codec, cases, *args, _verb=verb, _real=getattr(p2r_min, verb), **how):
            cases = list(cases)
            asked.append((_verb, how.get("greedy", False), any(p.requires_grad for p in model.parameters()),
                          None if _verb == "reason" and how.get("greedy") else len(cases)))
            if schedule == "think":                                              # whatever would be read in a text
                assert all(boxes == [] for _, boxes in cases)
            return _real(model, codec, cases, *args, **how)
        monkeypatch.setattr(p2r_min, verb, spied)

    def spy(policy, frozen, optimizer, groups, *args, _real=p2r_min.grpo.update_batch, **how):
        copies.append((len(optimizer.adam.state) == 0, id(frozen)))
        trained.append([next(i for i in range(4) if f"Which way, {i}?" in codec.decode(group.prompt.ids)) for group in groups])
        return _real(policy, frozen, optimizer, groups, *args, **how)
    monkeypatch.setattr(p2r_min.grpo, "update_batch", spy)
    codec = rollout.load(folder, 64 * 64)[1]
    s = small(folder, data, tmp_path / "run", schedule=schedule, questions=4, steps=1, iterations=2)
    cycle = Cycle()
    run = train(s, cycle.read_boxes, cycle.score)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [row["phase"] for row in rows] == phases * 2 and s.total == 4
    assert asked == sum((ASKED[phase] for phase in phases * 2), [])
    assert all(fresh for fresh, _ in copies)                                     # one copy, and fresh moments, for every phase
    examples = p2r_min.evaluation.load_data(s.data)
    assert trained == [[examples.index(e) for e in draw(examples, step, s)] for step in range(4)]
    if schedule == "think":
        assert all(row["partner_calls"] == 0 and row["boxes"] == 0 for row in rows)


def test_a_joint_update_pays_each_question_its_own_rewards(folder, data, tmp_path, monkeypatch):
    """Question i earns i: the rewards that reach the advantages stand in the order of the groups, perceived ones first."""
    paid, codec = [], rollout.load(folder, 64 * 64)[1]

    def spy(policy, frozen, optimizer, groups, *args, **how):
        paid.append(([codec.decode(g.prompt.ids) for g in groups], rewards[-1]))
        return {"loss": 0.0, "kl": 0.0, "nonfinite": []}
    rewards, real = [], p2r_min.grpo.group_advantages
    monkeypatch.setattr(p2r_min.grpo, "group_advantages", lambda r: rewards.append(r) or real(r))
    monkeypatch.setattr(p2r_min.grpo, "update_batch", spy)
    train(small(folder, data, tmp_path / "run", schedule="joint", questions=4, steps=1), lambda text: Parsed([], True, 0),
          lambda text, example: Score(float(example.question[-2]), True))
    for texts, given in paid:
        assert given.shape == (4, 3)
        for place, (text, row) in enumerate(zip(texts, given.tolist())):
            assert f"Which way, {row[0]:.0f}?" in text and len(set(row)) == 1
            assert ("bbox_2d" in text) == (place < 2)


def test_each_distinct_evidence_is_asked_once_and_voided_rollouts_never(folder, data, tmp_path):
    """G = 4 of one question: the same boxes twice (with other labels), no boxes, and overlapping boxes."""
    a, b = Box(100, 100, 400, 400, "a"), Box(110, 110, 410, 410, "b")
    lists = iter([[a], [a._replace(label="other")], [], [a, b]] * 100)
    scored = []

    def score(text, example):
        scored.append(text)
        return Score(1.0, True)

    run = train(small(folder, data, tmp_path / "run", steps=1, questions=1, group=4), lambda text: Parsed(next(lists), True, 0), score)
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["partner_calls"] == 2 and first["void"] == 0.25
    assert first["reward_mean"] == 0.75 and first["boxes"] == 1.0                # (1 + 1 + 0 + 2) / 4
    assert first["box_area"] == pytest.approx(0.09)


def test_the_frozen_copy_judges_and_evidence_and_bad_rows_are_as_asked(folder, data, tmp_path, monkeypatch):
    """The default judge is the frozen copy, never the policy; it settles every open answer, and each phase asks the Reasoner with
    the evidence that was chosen; a bad row is left out."""
    asked, seen = [], []

    def judge(self, cases):
        asked.append((any(p.requires_grad for p in self.model.parameters()), len(cases)))
        return [True] * len(cases)

    def spied(codec, image, boxes, question, form, evidence, _real=rollout.reasoner_prompt):
        seen.append(evidence)
        return _real(codec, image, boxes, question, form, evidence)

    monkeypatch.setattr(p2r_min.evaluation.Judge, "__call__", judge)
    monkeypatch.setattr(rollout, "reasoner_prompt", spied)
    data.write_text(data.read_text() + "{}\n")
    settings = small(folder, data, tmp_path / "run", steps=1, group=2, judge="self", evidence="crops", skip_bad=True)
    run = train(settings, Cycle().read_boxes, lambda text, example: Score(0.0, True, open=True))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["judged"] for m in metrics] == [m["reward_mean"] for m in metrics] == [1.0, 1.0]
    assert [trained for trained, _ in asked] == [False, False] and asked[1][1] == 4 and set(seen) == {"crops"}
    assert Settings().judge == "self" and Settings().data == "hongxingli/P2R-10k"      # the defaults for a real model


def test_the_frozen_perceiver_is_asked_once_a_phase(folder, data, tmp_path):
    """Four questions, two a step, four steps: the second pass over the data needs no new boxes."""
    run = train(small(folder, data, tmp_path / "run", steps=4))
    calls = [(m["phase"], m["partner_calls"]) for m in map(json.loads, (run / "metrics.jsonl").open())]
    assert [c for phase, c in calls if phase == "reasoning"] == [2, 2, 0, 0]


def test_the_run_folder(folder, data, tmp_path):
    run = train(small(folder, data, tmp_path / "run", eval_data=str(data), steps=2, eval_every=2, save_every=3))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [m["step"] for m in lines] == [1, 2, 3, 4]
    assert [(m["iteration"], m["phase"]) for m in lines] == [(1, "perception")] * 2 + [(1, "reasoning")] * 2
    for name in ("reward_mean reward_std zero_variance kl entropy grad_norm response_tokens truncated unparsable boxes box_area "
                 "partner_calls sampler_gap seconds_rollout seconds_partner seconds_update tokens_per_s peak_gib lr").split():
        assert all(name in m for m in lines), name
    assert all(m["sampler_gap"] < 1e-5 and m["peak_gib"] > 0 and m["tokens_per_s"] > 0 for m in lines)
    report = json.loads((run / "eval.json").read_text())
    assert {"p2r", "hit", "plain", "oracle"} <= set(report["before"]) and report["after"]["n"] == 4
    assert [r["step"] for r in report["during"]] == [2]
    assert json.loads((run / "config.json").read_text())["lr"] == 1e-3
    assert len(list((run / "samples").glob("*.png"))) == 4
    for folder_name in ("final",):
        assert {f.name for f in folder.iterdir()} == {f.name for f in (run / folder_name).iterdir()}
    assert {tensor.dtype for tensor in load_file(run / "final" / "model.safetensors").values()} == {torch.bfloat16}
    original = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    assert set(load_file(run / "final" / "model.safetensors")) == set(load_file(folder / "model.safetensors"))  # tied weights once
    again = rollout.load(run / "final", 4096)[0]
    assert weights(again).shape == weights(original).shape


def test_accuracy_without_true_boxes_is_null_where_they_are_needed(folder, data, tmp_path):
    rows = [{k: v for k, v in json.loads(line).items() if k != "boxes"} for line in data.open()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(small(folder, data, tmp_path / "run", eval_data=str(data), steps=1))
    before = json.loads((run / "eval.json").read_text())["before"]
    assert before["hit"] is None and before["oracle"] is None and before["p2r"] == 0.0 and before["n"] == 4


def test_data_is_shuffled_passes_that_depend_on_seed_and_step_only():
    s = Settings(questions=3)
    examples = list(range(6))
    steps = [draw(examples, step, s) for step in range(4)]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == examples
    assert steps[0] + steps[1] != steps[2] + steps[3] and draw(examples, 2, s) == steps[2]
    assert [draw(examples, step, Settings(questions=3, seed=1)) for step in range(4)] != steps
    assert len(draw(examples, 1, Settings(questions=4))) == 4                    # across the end of a pass


def test_the_clocks_and_counters_are_true(folder, data, tmp_path, monkeypatch):
    """By a clock that only moves in the three parts: 10 s for the policy's sampling, 3 for the partner, 5 for the update."""
    clock, tokens = [0.0], []

    def slow(name, seconds, module=p2r_min):
        def spied(*args, _real=getattr(module, name), **how):
            out = _real(*args, **how)
            out = out if isinstance(out, dict) else list(out)
            clock[0] += seconds(how)
            if name == "update_batch":
                tokens.append(sum(len(c.ids) for group in args[3] for c in group.completions))
            return out
        monkeypatch.setattr(module, name, spied)

    for verb in ("perceive", "reason"):
        slow(verb, lambda how: 3 if how.get("greedy") else 10)
    slow("update_batch", lambda how: 5, p2r_min.grpo)
    monkeypatch.setattr(p2r_min, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    cycle = Cycle()
    run = train(small(folder, data, tmp_path / "run"), cycle.read_boxes, cycle.score)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [(m["seconds_rollout"], m["seconds_partner"], m["seconds_update"]) for m in lines] == [(10, 3, 5)] * 4
    assert [m["tokens"] for m in lines] == tokens and [m["tokens_per_s"] for m in lines] == [n / 10 for n in tokens]
    status = Path("/proc/self/status")
    if status.exists():  # Linux's own account of this process's peak, in KiB
        peak = next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM"))
        assert 0.9 * peak / 2**20 <= lines[-1]["peak_gib"] <= 1.5 * peak / 2**20


# --- what a user may get wrong


@pytest.mark.parametrize("where, flag", [("lm_head", "--rollout-batch"), ("mlp", "--max-pixels")])
def test_a_gpu_out_of_memory_names_the_flag_to_halve(folder, data, tmp_path, capsys, monkeypatch, where, flag):
    """The error is raised where the GPU would raise it: in the sampler's last layer, or in a layer under training."""
    def forward(self, *args, _real=torch.nn.Linear.forward):
        if (where == "lm_head" and not torch.is_grad_enabled()) or (where == "mlp" and torch.is_grad_enabled()):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return _real(self, *args)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    assert main(["--model", str(folder), "--data", str(data), "--max-pixels", "4096", "--out", str(tmp_path / "run"), "--steps", "1",
                 "--questions", "1", "--perceive-tokens", "3", "--reason-tokens", "3"]) == 2
    printed = capsys.readouterr().err
    assert "memory ran out" in printed and f"halve {flag}" in printed and "Traceback" not in printed


@pytest.mark.parametrize("flags, needle", [
    (["--model", "no/such/folder"], "no such file or folder"),
    (["--model", "someone/not-downloaded"], "the hub did not give it"),
    (["--data", "nothing.jsonl"], "nothing.jsonl"),
    (["--data", "EMPTY"], "is empty"),
    (["--group", "1"], "--group 1"),
    (["--max-pixels", "100"], "one visual token"),
    (["--steps", "0"], "--steps 0"),
    (["--out", "FULL"], "not empty"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(folder, data, tmp_path, capsys, flags, needle):
    (tmp_path / "empty.jsonl").touch()
    flags = [{"EMPTY": str(tmp_path / "empty.jsonl"), "FULL": str(tmp_path)}.get(flag, flag) for flag in flags]
    usual = ["--model", str(folder), "--data", str(data), "--max-pixels", "4096", "--out", str(tmp_path / "run")]
    assert main(usual + flags) == 2
    message = capsys.readouterr().err.strip()
    assert needle in message and "Traceback" not in message and message.count("\n") == 0


def test_a_model_without_data_is_asked_for_it(folder, capsys):
    assert main(["--model", str(folder)]) == 2
    assert "--data" in capsys.readouterr().err


def test_without_a_model_the_toy_fills_in_and_explicit_flags_win(monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(p2r_min, "train", taken.append)
    assert main(["--group", "5", "--lr", "0.25"]) == 0
    s = taken[0]
    assert (s.group, s.lr, s.max_pixels) == (5, 0.25, toy.BUDGET)
    assert s.kl == Settings.kl                                                    # the paper's, unless toy.py says otherwise
    assert "lr               0.25" in capsys.readouterr().out


# --- it learns, and it fits the real layout


def test_a_short_toy_run_earns_more(tmp_path):
    """From final answers alone: the sampled reward of the perception phase rises within twenty steps."""
    s = Settings(**toy.defaults() | dict(out=str(tmp_path / "run"), schedule="perceiver", steps=10, eval_data="", sample_every=0, save_every=0))
    rewards = [json.loads(line)["reward_mean"] for line in (train(s) / "metrics.jsonl").open()]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def true_layout(path):
    """A folder with Qwen3-VL-2B's widths, token ids, image-processor settings and chat format (toy.py's
    template renders the same), but three layers a tower."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [f"unused{i}" for i in range(151643 - len(alphabet))]       # so that special ids fall where Qwen's do
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = ("endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start vision_end "
             "vision_pad image_pad video_pad").split()
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False) for name in names])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in toy.words()])  # short prompts: a fast test
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = toy.CHAT_TEMPLATE
    fast.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(dict(
        size=dict(longest_edge=16777216, shortest_edge=65536), patch_size=16, temporal_patch_size=2, merge_size=2,
        image_mean=[0.5] * 3, image_std=[0.5] * 3, image_processor_type="Qwen2VLImageProcessorFast")))
    config = Qwen3VLConfig(
        text_config=dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=3, num_attention_heads=16,
                         num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, rope_parameters=dict(
                             rope_type="default", rope_theta=5_000_000.0, mrope_section=[24, 20, 20], mrope_interleaved=True)),
        vision_config=dict(depth=3, hidden_size=1024, num_heads=16, intermediate_size=4096, patch_size=16, out_hidden_size=2048,
                           num_position_embeddings=2304, deepstack_visual_indexes=[0, 1, 2]),
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).bfloat16()
    model.generation_config = GenerationConfig(do_sample=True, top_k=20, top_p=0.8, temperature=0.7, eos_token_id=[151645, 151643])
    model.save_pretrained(path)
    (path / "README.md").write_text("a file that is not weights")
    return path


def test_two_steps_a_phase_in_the_layout_of_the_real_model(tmp_path, monkeypatch):
    """The code path of `--model Qwen/Qwen3-VL-2B-Instruct`, on images of eight megapixels."""
    source = true_layout(tmp_path / "qwen")
    for i, size in enumerate([(4000, 2000), (2400, 3400), (3000, 3000)]):
        noise(*size, i).save(tmp_path / f"{i}.jpg")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(
        {"image": f"{i}.jpg", "question": "Which sign?", "answer": "B", "answer_form": "mca", "options": ["a", "b"]}) + "\n" for i in range(3)))
    shown, real = [], rollout.Codec.encode

    def spied(self, text, images):
        shown.append(len(images))
        return real(self, text, images)

    monkeypatch.setattr(rollout.Codec, "encode", spied)
    cycle, s = Cycle(), Settings(model=str(source), data=str(tmp_path / "data.jsonl"), out=str(tmp_path / "run"), steps=2, questions=1,
                                 group=3, lr=1e-4, max_pixels=16 * 1024, perceive_tokens=5, reason_tokens=5, sample_every=0, save_every=0)
    run = train(s, cycle.read_boxes, cycle.score)
    # Each perception step: the image for the policy, then 0, 1 and 3 crops for the partner. Then two
    # reasoning steps: the image for the partner, then 0 and 1 crops for the policy.
    assert sorted(shown) == sorted([1, 1, 2, 4] * 2 + [1, 1] + [1, 2])            # threads prepare them in any order
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [m["phase"] for m in lines] == ["perception"] * 2 + ["reasoning"] * 2
    assert all(m["grad_norm"] > 0 and m["sampler_gap"] < 1e-4 for m in lines)
    old, new = (Qwen3VLForConditionalGeneration.from_pretrained(path, dtype="auto") for path in (source, run / "final"))
    assert new.dtype == torch.bfloat16
    changed = {name for (name, a), b in zip(old.named_parameters(), new.parameters()) if not torch.equal(a, b)}
    # (With three language layers the third DeepStack feature enters after the last one: it reaches no response.)
    for part in ("visual.patch_embed", "visual.blocks.2", "deepstack_merger_list.1", "language_model.layers.2", "embed_tokens"):
        assert any(part in name for name in changed), part
    for file in source.iterdir():
        if file.name != "model.safetensors":
            assert (run / "final" / file.name).read_bytes() == file.read_bytes(), file.name
    shutil.rmtree(tmp_path / "run"), shutil.rmtree(source)
