"""p2r_min.py: who is frozen and who is trained when, what is paid, and what a run writes."""

import json
import shutil
import weakref

import pytest
import torch
from conftest import chance, go, metrics, noise, small
from safetensors.torch import load_file
from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import eval as evaluation
import p2r_min
import rollout
import toy
from build_toy import CHAT_TEMPLATE, words
from crop import Box, Parsed
from eval import Score
from p2r_min import Settings, main, questions_of


def weights(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()]).clone()


def trained(model):
    return any(p.requires_grad for p in model.parameters())


# --- who plays


def test_the_frozen_copy_is_what_each_phase_says(folder, data, tmp_path, monkeypatch, scripted):
    """At each phase start it equals the policy, which is where the last phase ended; it never
    changes within a phase; it answers as the other role; it is the KL's reference; Adam is fresh."""
    seen, roles = [], []

    def spy_phase(name, phase):
        def spied(players, *args):
            assert players.policy is not players.frozen and not trained(players.frozen)
            seen.append((name, weights(players.policy), weights(players.frozen)))
            return phase(players, *args)
        return spied

    def spy_update(policy, reference, optimizer, *args, _real=p2r_min.grpo.update_batch, **how):
        fresh = len(optimizer.adam.state) == 0
        result = _real(policy, reference, optimizer, *args, **how)
        seen.append((fresh, weights(policy), weights(reference)))
        return result

    for verb in ("perceive", "reason"):
        def spied(model, *args, _verb=verb, _real=getattr(p2r_min, verb), **how):
            roles.append((_verb, how.get("greedy", False), trained(model)))
            return _real(model, *args, **how)
        monkeypatch.setattr(p2r_min, verb, spied)
    monkeypatch.setattr(p2r_min.grpo, "update_batch", spy_update)
    phases = {name: spy_phase(name, phase) for name, phase in p2r_min.PHASES.items()}
    monkeypatch.setattr(p2r_min, "PHASES", phases)
    go(small(folder, data, tmp_path / "run", iterations=2))

    before, after = seen[::2], seen[1::2]
    order = ["perception", "perception", "reasoning", "reasoning"] * 2
    assert [name for name, _, _ in before] == order
    assert [fresh for fresh, _, _ in after] == [True, False] * 4     # fresh moments every phase
    for step in range(8):
        (_, policy, frozen), (_, updated, reference) = before[step], after[step]
        assert torch.equal(frozen, reference)                        # partner = KL reference
        assert torch.equal(policy, frozen) == (step % 2 == 0)        # equal at a phase start only
        assert not torch.equal(policy, updated)
        if step:
            assert torch.equal(policy, after[step - 1][1])           # goes on from where it was
        if step % 2:
            assert torch.equal(frozen, before[step - 1][2])          # unchanged within the phase
    perception = [("perceive", False, True), ("reason", True, False)] * 2
    reasoning = [("perceive", True, False), ("reason", False, True)] * 2
    assert roles == (perception + reasoning) * 2


ASKED = {  # one step of each phase with four questions: (verb, greedy, by the policy, asked)
    "perception": [("perceive", False, True, 4), ("reason", True, False, None)],
    "reasoning": [("perceive", True, False, 4), ("reason", False, True, 4)],
    "joint": [("perceive", False, True, 2), ("reason", True, False, None),
              ("perceive", True, False, 2), ("reason", False, True, 2)],
    "thinking": [("reason", False, True, 4)],
}


@pytest.mark.parametrize("schedule, phases", [
    ("alternate", ["perception", "reasoning"]), ("joint", ["joint"] * 2),
    ("perceiver", ["perception"] * 2), ("reasoner", ["reasoning"] * 2), ("think", ["thinking"])])
def test_schedules_differ_in_who_is_trained_and_in_nothing_else(
        folder, data, tmp_path, monkeypatch, scripted, schedule, phases):
    """The same questions, updates and frozen copies; without roles, no boxes."""
    asked, fresh, places = [], [], []
    codec = rollout.load(folder, 64 * 64)[1]
    for verb in ("perceive", "reason"):
        def spied(model, codec, cases, *args, _verb=verb, _real=getattr(p2r_min, verb), **how):
            cases, greedy = list(cases), how.get("greedy", False)
            count = None if _verb == "reason" and greedy else len(cases)
            asked.append((_verb, greedy, trained(model), count))
            if schedule == "think":
                assert all(boxes == [] for _, boxes in cases)
            return _real(model, codec, cases, *args, **how)
        monkeypatch.setattr(p2r_min, verb, spied)

    def spy(policy, frozen, optimizer, groups, *args, _real=p2r_min.grpo.update_batch, **how):
        fresh.append(len(optimizer.adam.state) == 0)
        texts = [codec.decode(group.prompt.ids) for group in groups]
        places.append([int(text.split("Which way, ")[1][0]) for text in texts])
        return _real(policy, frozen, optimizer, groups, *args, **how)
    monkeypatch.setattr(p2r_min.grpo, "update_batch", spy)

    s = small(folder, data, tmp_path / "run", schedule=schedule, questions=4, steps=1, iterations=2)
    rows = metrics(go(s))
    expected = []
    for phase in phases * 2:
        expected += ASKED[phase]
    assert asked == expected and [row["phase"] for row in rows] == phases * 2
    assert all(fresh) and len(fresh) == s.total == 2 * len(phases)
    examples = evaluation.load_data(s.data)
    for step, found in enumerate(places):
        assert found == [examples.index(e) for e in questions_of(examples, step, s)]
    if schedule == "think":
        assert all(row["partner_calls"] == 0 and row["boxes"] is None for row in rows)


# --- what is paid


def test_every_group_gets_its_own_rewards(folder, data, tmp_path, monkeypatch, scripted):
    """Question i earns i, in a joint update: advantages come in the order of the groups."""
    rewards, paid = [], []
    codec = rollout.load(folder, 64 * 64)[1]
    real = p2r_min.grpo.group_advantages
    monkeypatch.setattr(p2r_min.grpo, "group_advantages",
                        lambda group: rewards.append(group.tolist()) or real(group))

    def spy(policy, frozen, optimizer, groups, *args, **how):
        paid.extend(codec.decode(group.prompt.ids) for group in groups)
        return {"loss": 0.0, "kl": 0.0, "nonfinite": []}
    monkeypatch.setattr(p2r_min.grpo, "update_batch", spy)
    scripted(lambda text: Parsed([], True),
             lambda text, example, whole_text=False: Score(float(example.question[-2]), True))
    go(small(folder, data, tmp_path / "run", schedule="joint", questions=4, steps=1))

    assert len(paid) == len(rewards) == 8
    for place, (text, group) in enumerate(zip(paid, rewards)):
        assert len(group) == 3 and len(set(group)) == 1
        assert f"Which way, {group[0]:.0f}?" in text
        assert ("bbox_2d" in text) == (place % 4 < 2)            # the first half perceives


def test_each_distinct_evidence_is_asked_once_and_void_rollouts_never(
        folder, data, tmp_path, scripted):
    """G = 4 of one question: the same boxes twice (other labels), no boxes, overlapping boxes."""
    a, b = Box(100, 100, 400, 400, "a"), Box(110, 110, 410, 410, "b")
    lists = iter([[a], [a._replace(label="other")], [], [a, b]] * 100)
    scripted(lambda text: Parsed(next(lists), True),
             lambda text, example, whole_text=False: Score(1.0, True))
    run = go(small(folder, data, tmp_path / "run", steps=1, questions=1, group=4))
    first = metrics(run)[0]
    assert first["partner_calls"] == 2 and first["void"] == 0.25
    assert first["reward_mean"] == 0.75 and first["boxes"] == 1.0    # (1 + 1 + 0 + 2) / 4
    assert first["box_area"] == pytest.approx(0.09)


def test_metrics_by_hand(folder, data, tmp_path, scripted):
    """G = 4 of one question in the perception phase: a whole-image box, garbage, two small boxes."""
    whole, left, right = Box(0, 0, 1000, 950, "w"), Box(0, 0, 100, 100, "l"), Box(900, 0, 1000, 100, "r")
    lists = iter([Parsed([whole], True), Parsed([], False),
                  Parsed([left, right], True), Parsed([left], True)] * 9)
    answered = iter([True, False, True, True] * 9)
    scripted(lambda text: next(lists),
             lambda text, example, whole_text=False: Score(float(whole_text), next(answered)))
    first, second = metrics(go(small(folder, data, tmp_path / "run", steps=1, questions=1, group=4)))
    assert first["unparsable"] == 0.25 and first["boxes"] == 1.0 and first["whole_boxes"] == 0.25
    assert first["box_area"] == pytest.approx((0.95 + 0.01 * 3) / 4)
    assert first["reward_mean"] == 1.0 and first["zero_variance"] == 1.0 and first["reward_std"] == 0
    assert first["untagged"] == 0.25 and first["unanswered"] is None     # the frozen Reasoner's
    assert second["unanswered"] == 0.25 and second["untagged"] is None   # the trained one's
    assert second["reward_mean"] == 0.0                                  # it needs its tags


def test_a_frozen_reasoner_without_tags_is_read_as_a_whole(folder, data, tmp_path, monkeypatch):
    """The real rule: the text "down" pays in the perception phase, not in the reasoning phase."""
    monkeypatch.setattr(rollout.Codec, "decode", lambda self, ids: "down")
    first, second = metrics(go(small(folder, data, tmp_path / "run", steps=1)))
    assert (first["reward_mean"], first["untagged"]) == (1.0, 1.0)
    assert (second["reward_mean"], second["unanswered"]) == (0.0, 1.0)


def test_the_frozen_copy_judges_and_evidence_and_bad_rows_are_as_asked(
        folder, data, tmp_path, monkeypatch, scripted):
    """The default judge is the frozen copy, never the policy; it settles every open answer."""
    asked, seen = [], []

    def judge(self, cases):
        asked.append(trained(self.model))
        return [True] * len(cases)

    def spied(codec, image, boxes, question, form, evidence, _real=rollout.reasoner_prompt):
        seen.append(evidence)
        return _real(codec, image, boxes, question, form, evidence)

    monkeypatch.setattr(evaluation.Judge, "__call__", judge)
    monkeypatch.setattr(rollout, "reasoner_prompt", spied)
    scripted(score=lambda text, example, whole_text=False: Score(0.0, True, open=True))
    data.write_text(data.read_text() + "{}\n")
    rows = metrics(go(small(folder, data, tmp_path / "run", steps=1, group=2, judge="self",
                            evidence="crops", skip_bad=True)))
    assert [row["judged"] for row in rows] == [row["reward_mean"] for row in rows] == [1.0, 1.0]
    assert asked == [False, False] and set(seen) == {"crops"}


def test_a_reward_may_be_any_number(folder, data, tmp_path, monkeypatch, scripted):
    """`reward_of` is where forks pay something else: an int or a bool is a reward, too."""
    for kind in (int, bool):
        monkeypatch.setattr(p2r_min, "reward_of",
                            lambda rollout, kind=kind: kind(chance(rollout.sampled.text, None).reward))
        rows = metrics(go(small(folder, data, tmp_path / kind.__name__, steps=1)))
        assert all(0 <= row["reward_mean"] <= 1 for row in rows)


def test_a_steps_prompts_are_gone_when_the_next_one_begins(
        folder, data, tmp_path, monkeypatch, scripted):
    """Their pixels are gigabytes."""
    prompts, alive = [], []
    for name, phase in list(p2r_min.PHASES.items()):
        def watched(*inputs, _real=phase):
            alive.append(sum(prompt() is not None for prompt in prompts))
            experience = _real(*inputs)
            prompts.extend(weakref.ref(group.prompt) for group in experience.groups)
            return experience
        monkeypatch.setitem(p2r_min.PHASES, name, watched)
    go(small(folder, data, tmp_path / "run"))
    assert alive == [0, 0, 0, 0] and len(prompts) == 8


def test_data_is_shuffled_passes_that_depend_on_seed_and_step_only():
    s = Settings(questions=3)
    examples = list(range(6))
    steps = [questions_of(examples, step, s) for step in range(4)]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == examples
    assert steps[0] + steps[1] != steps[2] + steps[3]
    assert questions_of(examples, 2, s) == steps[2]
    other = Settings(questions=3, seed=1)
    assert [questions_of(examples, step, other) for step in range(4)] != steps
    assert len(questions_of(examples, 1, Settings(questions=4))) == 4    # across the end of a pass


# --- what a run writes


def test_the_run_folder(folder, data, tmp_path, scripted):
    run = go(small(folder, data, tmp_path / "run", eval_data=str(data), eval_every=2, save_every=3))
    rows = metrics(run)
    assert [(row["step"], row["phase"]) for row in rows] == [
        (1, "perception"), (2, "perception"), (3, "reasoning"), (4, "reasoning")]
    assert all(row["sampler_gap"] < 1e-5 and row["peak_gib"] is None for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    accuracy = [json.loads(line) for line in (run / "accuracy.jsonl").open()]
    assert [row["step"] for row in accuracy] == [0, 2, 4]
    assert all({"p2r", "hit", "plain", "oracle"} <= set(row) and row["n"] == 4 for row in accuracy)
    assert json.loads((run / "config.json").read_text())["lr"] == 1e-3
    assert len(list((run / "samples").glob("*.png"))) == 4

    # Each phase's end, and the run's, is an ordinary bf16 model folder, with the run's budgets.
    names = {file.name for file in folder.iterdir()}
    ends = [run / "phases" / "1-perception", run / "phases" / "2-reasoning", run / "final"]
    for end in ends:
        assert {file.name for file in end.iterdir()} == names | {"p2r.json"}
        assert json.loads((end / "p2r.json").read_text())["perceive_tokens"] == 6
        stored = load_file(end / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        assert set(stored) == set(load_file(folder / "model.safetensors"))   # tied weights once
    first, last, final = [weights(rollout.load(end, 4096)[0]) for end in ends]
    assert not torch.equal(first, last) and torch.equal(last, final)
    mask = (run / "config.json").stat().st_mode
    assert all(path.stat().st_mode == mask for path in run.rglob("*") if path.is_file())


def test_accuracy_without_true_boxes_is_null_where_they_are_needed(folder, data, tmp_path, scripted):
    rows = [json.loads(line) for line in data.open()]
    data.write_text("".join(json.dumps(row | {"boxes": []}) + "\n" for row in rows))
    run = go(small(folder, data, tmp_path / "run", eval_data=str(data), steps=1))
    before = json.loads((run / "accuracy.jsonl").read_text().splitlines()[0])
    assert before["hit"] is None and before["oracle"] is None and before["n"] == 4


def test_without_checkpointing_the_update_is_the_same(folder, data, tmp_path, scripted):
    runs = [go(small(folder, data, tmp_path / str(on), checkpointing=on)) for on in (False, True)]
    a, b = (load_file(run / "final" / "model.safetensors") for run in runs)
    assert all(torch.allclose(a[name].float(), b[name].float(), atol=1e-5) for name in a)


def test_offload_is_the_same_run_on_a_cpu(folder, data, tmp_path, scripted):
    runs = [go(small(folder, data, tmp_path / str(on), offload=on)) for on in (False, True)]
    a, b = (load_file(run / "final" / "model.safetensors") for run in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- what a user may get wrong


@pytest.mark.parametrize("where, flag", [("lm_head", "--rollout-batch"), ("mlp", "--max-pixels")])
def test_a_gpu_out_of_memory_names_the_flag_to_halve(
        folder, data, tmp_path, capsys, monkeypatch, where, flag):
    """Raised where a GPU would raise it: in the sampler's last layer, or in a layer in training. What
    the frames of the error hold is free before the run is saved."""
    held, alive_at_save = [], []

    def forward(self, *args, _real=torch.nn.Linear.forward):
        if torch.is_grad_enabled() == (where == "mlp"):
            activation = torch.ones(1)
            held.append(weakref.ref(activation))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return _real(self, *args)

    def save(*args, _real=p2r_min.save_checkpoint):
        alive_at_save.extend(activation() is not None for activation in held)
        _real(*args)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    monkeypatch.setattr(p2r_min, "save_checkpoint", save)
    code = program(["--model", folder, "--data", data, "--max-pixels", 4096, "--steps", 1,
                    "--questions", 1, "--perceive-tokens", 3, "--reason-tokens", 3,
                    "--out", tmp_path / "run"])
    printed = capsys.readouterr().err
    assert code == 2 and "memory ran out" in printed and f"halve {flag}" in printed
    assert alive_at_save == [False]


def test_out_of_memory_when_resuming_is_not_the_checkpoint_s_fault(
        folder, data, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert program(["--model", folder, "--data", data, "--max-pixels", 4096, "--steps", 1,
                    "--questions", 1, "--perceive-tokens", 3, "--reason-tokens", 3,
                    "--out", run]) == 0

    def load_optimizer(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(p2r_min.grpo, "load_optimizer", load_optimizer)
    assert program(["--resume", run, "--iterations", 2]) == 2
    printed = capsys.readouterr().err
    assert "memory ran out" in printed and "move it away" not in printed


def program(arguments):
    """The program's exit code."""
    return evaluation.run_program("p2r_min.py", main, [str(a) for a in arguments])


@pytest.mark.parametrize("flags, needle", [
    (["--model", "no/such/folder"], "no/such/folder"),
    (["--model", "someone/not-downloaded"], "someone/not-downloaded"),
    (["--data", "nothing.jsonl"], "nothing.jsonl"),
    (["--data", "EMPTY"], "is empty"),
    (["--data", ""], "--data"),
    (["--group", "1"], "--group 1"),
    (["--max-pixels", "100"], "one visual token"),
    (["--steps", "0"], "--steps 0"),
    (["--save-every", "-1"], "--save-every -1"),
    (["--lr", "nan"], "--lr nan"),
    (["--kl", "-0.1"], "--kl -0.1"),
    (["--weight-decay", "-1"], "--weight-decay -1"),
    (["--seed", "99999999999"], "--seed 99999999999"),
    (["--schedule", "both"], "--schedule both"),
    (["--evidence", "all"], "--evidence all"),
    (["--model", ""], "--model is empty"),
    (["--out", ""], "--out is empty"),
    (["--eval-data", ""], "--eval-data is empty"),
    (["--out", "FULL"], "is not empty"),
    (["--resume", ""], "--resume is empty"),
    (["--resume", "RUN/checkpoints/step-00003"], "there is no such folder"),
    (["--resume", "nowhere"], "config.json"),
    (["--lr", "inf"], "--lr inf must be finite"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(folder, data, tmp_path, capsys, flags, needle):
    (tmp_path / "empty.jsonl").touch()
    named = {"EMPTY": str(tmp_path / "empty.jsonl"), "FULL": str(tmp_path)}
    flags = [named.get(flag, flag) for flag in flags]
    usual = ["--model", folder, "--data", data, "--max-pixels", 4096, "--out", tmp_path / "run"]
    if flags[0] == "--resume":
        usual = []
    assert program([*usual, *flags]) == 2
    message = capsys.readouterr().err.strip()
    assert needle in message and "Traceback" not in message and message.count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_without_a_model_the_toy_fills_in_and_explicit_flags_win(monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(p2r_min, "train", lambda s, run: taken.append(s))
    main(["--group", "5", "--lr", "0.25"])
    s = taken[0]
    assert (s.group, s.lr, s.max_pixels) == (5, 0.25, toy.BUDGET)
    assert s.kl == Settings.kl                               # the paper's, unless toy.py differs
    assert "lr               0.25" in capsys.readouterr().out


# --- it learns, and it fits the real layout


def test_a_short_toy_run_earns_more(tmp_path):
    """From final answers alone: the sampled reward of the perception phase rises in 10 steps (at
    twice the default learning rate)."""
    s = Settings(**toy.defaults() | dict(
        out=str(tmp_path / "run"), schedule="perceiver", steps=5, lr=4e-4, eval_data="",
        sample_every=0, save_every=0))
    rewards = [row["reward_mean"] for row in metrics(go(s))]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def true_layout(path):
    """A folder with Qwen3-VL-2B's token ids, heads, image-processor settings and chat format, but
    three layers a tower, and an eighth of the language model's width: at full width the checkpoint
    alone takes 8 GB. (test_memory.py has the full one.) build_toy's template renders as Qwen's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # So many words that the special tokens get Qwen's own ids.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = alphabet + [f"unused{i}" for i in range(151643 - len(alphabet))]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("endoftext im_start im_end object_ref_start object_ref_end box_start box_end "
             "quad_start quad_end vision_start vision_end vision_pad image_pad video_pad").split()
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False) for name in names])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in words()])  # short prompts
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)

    (path / "preprocessor_config.json").write_text(json.dumps(dict(
        size=dict(longest_edge=16777216, shortest_edge=65536), patch_size=16, temporal_patch_size=2,
        merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        image_processor_type="Qwen2VLImageProcessorFast")))
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=151936, hidden_size=256, intermediate_size=768, num_hidden_layers=3,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=5_000_000.0,
                                 mrope_section=[24, 20, 20], mrope_interleaved=True)),
        vision_config=dict(
            depth=3, hidden_size=256, num_heads=4, intermediate_size=1024, patch_size=16,
            out_hidden_size=256, num_position_embeddings=2304, deepstack_visual_indexes=[0, 1, 2]),
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652,
        vision_end_token_id=151653, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).bfloat16()
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=20, top_p=0.8, temperature=0.7, eos_token_id=[151645, 151643])
    model.save_pretrained(path)
    (path / "README.md").write_text("a file that is not weights")
    return path


def test_two_phases_in_the_layout_of_the_real_model(tmp_path, monkeypatch, scripted):
    """The code path of `--model Qwen/Qwen3-VL-2B-Instruct`, on images of eight megapixels."""
    source = true_layout(tmp_path / "qwen")
    rows = []
    for i, size in enumerate([(4000, 2000), (2400, 3400), (3000, 3000)]):
        noise(*size, i).save(tmp_path / f"{i}.jpg")
        rows.append({"image": f"{i}.jpg", "question": "Which sign?", "answer": "B",
                     "answer_form": "mca", "options": ["a", "b"]})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    s = Settings(
        model=str(source), data=str(tmp_path / "data.jsonl"), out=str(tmp_path / "run"), steps=1,
        questions=1, group=3, lr=1e-4, max_pixels=16 * 1024, perceive_tokens=5, reason_tokens=5,
        sample_every=0, save_every=0, judge="none")
    counts, paid = iter(range(999)), iter(range(999))
    lists = ([], [Box(100, 100, 400, 400, "a")],
             [Box(0, 0, 200, 200, "a"), Box(300, 300, 500, 500, "b"), Box(600, 600, 900, 900, "c")])
    scripted(lambda text: Parsed(lists[next(counts) % 3], True),
             lambda text, example, whole_text=False: Score(float(next(paid) % 2), True))
    run = go(s)

    assert [row["phase"] for row in metrics(run)] == ["perception", "reasoning"]
    assert all(row["grad_norm"] > 0 and row["sampler_gap"] < 1e-4 for row in metrics(run))
    old = Qwen3VLForConditionalGeneration.from_pretrained(source, dtype="auto")
    new = Qwen3VLForConditionalGeneration.from_pretrained(run / "final", dtype="auto")
    assert new.dtype == torch.bfloat16
    changed = set()
    for (name, a), b in zip(old.named_parameters(), new.parameters()):
        if not torch.equal(a, b):
            changed.add(name)
    # (With three language layers the third DeepStack feature reaches no response.)
    for part in ("visual.patch_embed", "visual.blocks.2", "deepstack_merger_list.1",
                 "language_model.layers.2", "embed_tokens"):
        assert any(part in name for name in changed), part
    for file in source.iterdir():
        if file.name != "model.safetensors":
            assert (run / "final" / file.name).read_bytes() == file.read_bytes(), file.name
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(source)
