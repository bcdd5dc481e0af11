"""tests/experiment.py and tests/figures.py: equal budgets, forks, and the statistics by hand."""

import json
import math

import pytest
import torch
from conftest import noise, small

import experiment
import figures
import grpo
import p2r_min
import rollout
from crop import Box
from eval import Example
from experiment import SCHEDULES, right_texts, settings
from p2r_min import Experience, Players, Rollout
from rollout import InputError

PHASES = {name: schedule.phases for name, schedule in SCHEDULES.items()}


# --- budgets


def test_every_schedule_gets_the_same_updates_and_differs_in_nothing_else(monkeypatch, tmp_path):
    """168 updates: phases of 84, 42, 28 and 21. The longer ones go on to 252."""
    monkeypatch.setattr(p2r_min, "SCHEDULES", PHASES)
    runs = {name: settings(name, 3, 168, tmp_path) for name in SCHEDULES}
    assert {name: (s.steps, s.total) for name, s in runs.items()} == {
        "alternate": (84, 168), "alternate x 2": (42, 168), "alternate x 3": (28, 168),
        "alternate x 4": (21, 168), "joint": (84, 252), "perceiver": (84, 168),
        "reasoner": (84, 252), "think": (252, 252), "shuffled": (84, 168), "dense": (84, 168)}
    others = {(s.questions, s.group, s.lr, s.kl, s.model, s.data, s.eval_data, s.seed)
              for s in runs.values()}
    assert len(others) == 1

    # Accuracy is measured at the end of each phase, and at the updates that are compared.
    for s in runs.values():
        assert s.measures_at(168)
        for step in range(0, s.total + 1, s.steps):
            assert s.measures_at(step)


@pytest.mark.parametrize("name", ["alternate", "joint", "perceiver", "reasoner", "think"])
def test_the_products_own_schedules_are_the_beginning_of_these(name):
    product = p2r_min.SCHEDULES[name]
    assert PHASES[name][:len(product)] == product
    assert PHASES["alternate x 3"] == p2r_min.SCHEDULES["alternate"] * 3


def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(p2r_min, "SCHEDULES", dict(p2r_min.SCHEDULES))  # play() adds its own
    monkeypatch.setattr(p2r_min, "PHASES", dict(p2r_min.PHASES))
    with pytest.raises(rollout.InputError, match="--updates 160 cannot be shared"):
        settings("alternate", 0, 160, tmp_path)
    with pytest.raises(rollout.InputError, match="--model needs --eval-data"):
        settings("alternate", 0, 168, tmp_path, {"model": "M"})
    (tmp_path / "config.json").write_text(json.dumps(vars(settings("joint", 0, 48, tmp_path))))
    with pytest.raises(rollout.InputError, match="holds another run .steps was 24 and is 84"):
        experiment.play("joint", settings("joint", 0, 168, tmp_path), 168)


# --- the forks


def test_shuffled_rewards_keep_every_group_and_forget_who_earned_what():
    """Each group keeps its advantages; over many steps every sample gets each equally often."""
    dealt = torch.tensor([3.0, -1.0, -1.0, -1.0])
    same = torch.zeros(4)

    def phase(players, questions, s, generator):
        return Experience([rollout.Group(None, [], advantages=a.clone()) for a in (dealt, same)])

    control = experiment.shuffled(phase)
    total = torch.zeros(4)
    for seed in range(400):
        found = control(None, None, None, torch.Generator().manual_seed(seed))
        first, second = [group.advantages for group in found.groups]
        assert sorted(first.tolist()) == sorted(dealt.tolist()) and torch.equal(second, same)
        total += first
    assert total.abs().max() < 4 * 400**0.5 * 3**0.5  # 4 standard deviations of 0
    again = control(None, None, None, torch.Generator().manual_seed(399)).groups[0].advantages
    assert torch.equal(again, first)                  # a resumed run deals out the same


def example(kind, question, answer):
    return Example("none.png", question, answer, "na" if kind == "count" else "free_form",
                   category=kind)


def test_right_texts_are_all_that_lead_to_the_truth():
    """Three things of four ways: 4 + 16 + 64 thoughts. None runs down in 3 + 9 + 27 of them, one
    in 1 + 2 x 3 + 3 x 9, two in 1 + 3 x 3, three in 1: together all 84."""
    texts = [right_texts(example("count", "How many run down: the red circle, ...?", str(n)))
             for n in range(4)]
    assert [len(found) for found in texts] == [39, 34, 10, 1]
    assert texts[3] == ["<think>They run down, down, down.</think>\n<answer>3</answer>"]
    assert right_texts(example("two", "Which way ...?", "uphill and down")) == [
        "<think>They run uphill, down.</think>\n<answer>uphill and down</answer>"]
    assert right_texts(example("street", "What is it?", "a cat")) == ["<answer>a cat</answer>"]


def test_the_likelihood_of_the_truth_is_the_librarys(tiny, monkeypatch):
    """Against the library's own forward of prompt and text, one text at a time."""
    model, codec = tiny
    with torch.no_grad():
        model.lm_head.weight *= 0.01  # all texts about equally likely, so that all matter
    image = noise(200, 120)
    asked = example("count", "How many run down: the red circle?", "0")
    monkeypatch.setattr(Example, "load_image", lambda self: image)
    boxes = [Box(100, 100, 400, 400, "a")]
    monkeypatch.setattr(Rollout, "boxes", boxes)
    players = Players(model, model, codec, None)
    found = experiment.log_likelihood(players, Rollout(asked, None), "both")

    prompt = rollout.reasoner_prompt(codec, image, boxes, asked.question, "na")
    total = 0.0
    for text in right_texts(asked):
        ids = torch.tensor(codec.tokenizer(text, add_special_tokens=False)["input_ids"])
        whole = torch.cat([prompt.ids, ids])[None]
        with torch.no_grad():
            logits = model(
                input_ids=whole, pixel_values=prompt.pixels, image_grid_thw=prompt.grids,
                mm_token_type_ids=(whole == codec.image_token_id).int()).logits[0]
        logits[:, codec.banned] = -math.inf
        logps = logits.log_softmax(-1)[len(prompt.ids) - 1:-1]
        total += math.exp(logps.gather(1, ids[:, None]).sum().item() + 100)
    assert found == pytest.approx(math.log(total) - 100, abs=1e-3)


def test_a_dense_phase_pays_by_boxes(folder, data, tmp_path, scripted, monkeypatch):
    """Equal boxes are read once and earn the same; void ones earn the floor."""
    asked = []

    def by_count(players, rollout, evidence):
        asked.append(len(rollout.boxes))
        return -float(len(rollout.boxes))

    monkeypatch.setattr(experiment, "log_likelihood", by_count)
    monkeypatch.setattr(experiment, "violation",
                        lambda boxes: "overlap" if len(boxes) == 3 else None)
    s = small(folder, data, tmp_path / "run", group=8, questions=2)
    examples, _, policy, codec, _ = p2r_min.prepare(s)
    players = Players(policy, p2r_min.frozen_copy(policy), codec, None)
    generator = torch.Generator().manual_seed(0)
    found = experiment.dense_perception(players, examples[:2], s, generator)
    earned = {len(r.boxes): r.reward for r in found.rollouts}
    assert earned == {0: 0.0, 1: -1.0, 3: experiment.FLOOR}
    assert found.partner_calls == len(asked) == 4    # two questions, two readable lists each
    assert [len(group.advantages) for group in found.groups] == [8, 8]
    p2r_min.metrics_of(found)                        # what the loop logs of it


# --- overlap


def test_the_gradient_that_is_kept_is_that_of_the_loss(tiny):
    """Gradient keeps what autograd finds for one group of update_batch's loss, and never steps."""
    model, codec = tiny
    image = noise(100, 100)
    prompt = rollout.perceiver_prompt(codec, image, "Where?")
    group = next(rollout.sample(model, codec, [prompt], group=3, max_tokens=4, rows=1,
                                generator=torch.Generator().manual_seed(0)))
    advantage = group.advantages = torch.tensor([1.0, -1.0, 0.5])
    before = [p.detach().clone() for p in model.parameters()]

    # At the sampling policy the gradient of the loss is REINFORCE's, and the KL's is zero.
    row = grpo.pack(prompt, [c.ids for c in group.completions])
    logps, _ = grpo.response_logprobs(model, row, codec.banned)
    loss = -(logps * advantage.repeat_interleave(row.lengths)).sum() / len(logps)
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True,
                                   materialize_grads=True)
    expected = torch.cat([gradient.flatten() for gradient in expected])

    # A second batch starts from nothing.
    keeper = experiment.Gradient(model, 1.0)
    for _ in range(2):
        grpo.update_batch(model, p2r_min.frozen_copy(model), keeper, [group],
                          banned=codec.banned, kl=0.01, clip=0.2, max_norm=1.0)
    assert experiment.cosine(keeper.vector, expected) == pytest.approx(1, abs=1e-4)
    assert keeper.vector.norm() == pytest.approx(expected.norm().item(), rel=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert experiment.cosine(keeper.vector, torch.zeros_like(expected)) is None


def test_overlap_compares_a_step_with_the_gradient_on_other_questions(tiny, monkeypatch):
    """Gradients by hand: Adam's step for (4, -0.1) is (1, -1), and that for (0, 2) is (0, 1)."""
    made = iter([(4.0, -0.1), (3.0, 4.0), (0.0, 2.0), (0.0, -5.0)])
    asked = []

    def phase(players, questions, s, generator):
        asked.append(questions)
        return Experience([])

    def update(policy, reference, keeper, *args, **how):
        keeper.vector = torch.tensor(next(made))

    monkeypatch.setattr(p2r_min, "PHASES", {"perception": phase, "reasoning": phase})
    monkeypatch.setattr(grpo, "update_batch", update)
    s = p2r_min.Settings(questions=2)
    found = experiment.overlap(*tiny, list(range(100)), s)
    assert found == pytest.approx({
        "perception on perception": -0.141421, "perception on reasoning": 0.707107,
        "reasoning on perception": 0.8, "reasoning on reasoning": -1.0}, abs=1e-5)
    assert asked[0] == asked[2] and asked[1] == asked[3] and not set(asked[0]) & set(asked[1])


# --- the statistics


def test_the_interval_is_students():
    """1 to 5: mean 3, deviation 1.5811, t(4) = 2.7764: 3 +- 2.7764 x 1.5811 / sqrt 5 = 1.9632.
    Twelve values, six 0 and six 1: deviation 0.52223, t(11) = 2.2010, half 0.33181."""
    assert figures.interval([1, 2, 3, 4, 5]) == pytest.approx((3, 1.9632), abs=3e-4)
    assert figures.interval([0, 1] * 6) == pytest.approx((0.5, 0.33181), abs=2e-5)
    assert figures.interval([7]) == (7, math.inf)


def fake_run(out, name, seed, p2r, plain, partner_calls):
    """What p2r_min.py and play() leave, as far as it is read: 24 updates of 3 questions x 4."""
    folder = experiment.folder_of(out, name, seed)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"seed": seed, "questions": 3, "group": 4}))
    row = {"boxes": 1.0, "box_area": None, "reward_mean": 0.5, "zero_variance": 0.2, "entropy": 1,
           "seconds_rollout": 1.0, "seconds_partner": 0.5, "seconds_update": 2.0,
           "partner_calls": partner_calls}
    (folder / "metrics.jsonl").write_text((json.dumps(row) + "\n") * 24)
    lines = []
    for step, with_roles, without in zip((0, 12, 18, 24), p2r, plain):
        lines.append(json.dumps({
            "step": step, "p2r": with_roles, "plain": without, "hit": with_roles / 2,
            "oracle": 0.9, "n": 50, "categories": {"one": [0.8, 0.2]}}) + "\n")
    (folder / "accuracy.jsonl").write_text("".join(lines))
    afterwards = {"evidence": {}, "swapped": {}, "overlap": {
        "1-perception": {"perception on perception": 0.5, "perception on reasoning": None,
                         "reasoning on perception": 0.1}}}
    (folder / "afterwards.json").write_text(json.dumps(afterwards))
    return folder


@pytest.fixture
def results(tmp_path):
    """alternate makes (12 + 8) x 24 = 480 calls. think makes 12 an update, so 288 in all: never as
    many. perceiver makes 12 + 18 = 30 an update and gets to 480 after 16, two thirds of the way
    from the measurement at 12 to that at 18."""
    for seed, (a, b) in enumerate(((0.6, 0.7), (0.7, 0.9))):
        fake_run(tmp_path, "alternate", seed, (0.4, 0.5, 0.5, a), (0.1,) * 4, 8)
        fake_run(tmp_path, "perceiver", seed, (0.4, 0.4, b, b), (0.1,) * 4, 18)
        fake_run(tmp_path, "think", seed, (0.4,) * 4, (0.1, 0.2, 0.2, 0.3), 0)
    unfinished = fake_run(tmp_path, "alternate", 2, (0.4,) * 4, (0.1,) * 4, 8)
    (unfinished / "afterwards.json").unlink()
    fake_run(tmp_path, "perceiver", 2, (0.4,) * 4, (0.1,) * 4, 18)
    return figures.Results(experiment.collect(tmp_path, 24))


def test_differences_are_paired_and_at_equal_calls_interpolated(results):
    """perceiver with equal updates: .7 - .6 and .9 - .7. After 480 calls it is at .4 + 2/3 x .3 =
    .6 and at .4 + 2/3 x .5 = .7333. Its third seed has nothing to be compared with."""
    by_updates, by_calls = results.less_alternate("perceiver")
    assert by_updates == pytest.approx([0.1, 0.2])
    assert by_calls == pytest.approx([0.0, 0.03333], abs=1e-4)
    by_updates, by_calls = results.less_alternate("think")
    assert by_updates == pytest.approx([-0.3, -0.4]) and by_calls == []


def test_the_table_by_hand(results, capsys):
    """+.150: deviation .0707, t(1) = 12.706: .635. 3.5 seconds an update; think is measured
    without roles."""
    figures.table(results)
    lines = capsys.readouterr().out.splitlines()
    cells = {}
    for line in lines[2:]:
        name, *rest = (cell.strip() for cell in line.strip("| ").split(" | "))
        cells[name] = rest
    assert cells["alternate"] == [
        "2", "0.400", "0.650 ± 0.635", "", "", "+0.150 ± 0.635", "0.325", "0.900", "20", "3.50",
        "0.80"]
    perceiver = [0.7, 0.9, 0.4]
    assert cells["perceiver"][:2] == ["3", "0.400"]
    assert cells["perceiver"][2].startswith(f"{sum(perceiver) / 3:.3f}")
    assert cells["perceiver"][3:5] == ["+0.150 ± 0.635", "+0.017 ± 0.212"]
    assert cells["think"][:3] == ["2", "0.100", "0.300 ± 0.000"] and cells["think"][-1] == "0.20"


def test_interference_is_told_phase_by_phase(results, capsys):
    """hit is half of p2r: .2 to .25 in the first phase, then to .3 and .35: +.05 and +.1."""
    figures.interference(results)
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    alternate = {row[1]: row[2:] for row in rows if row[0] == "alternate"}
    assert alternate["1-perception"] == [
        "+0.050 ± 0.000", "+0.000 ± 0.000", "+0.500 ± 0.000", "", "+0.100 ± 0.000", ""]
    assert alternate["2-reasoning"][0] == "+0.075 ± 0.318"


def test_results_of_other_updates_are_refused(tmp_path):
    fake_run(tmp_path, "joint", 0, (0.4,) * 4, (0.1,) * 4, 8)
    with pytest.raises(rollout.InputError, match="was not measured at 168 updates"):
        experiment.collect(tmp_path, 168)
    with pytest.raises(rollout.InputError, match="no finished run"):
        experiment.collect(tmp_path / "elsewhere", 168)


def test_more_seeds_are_added_to_the_results():
    def result(*runs, updates=168):
        return {"updates": updates, "runs": [{"schedule": name, "seed": seed, "n": n} for name, seed, n in runs]}

    both = experiment.added(result(("joint", 0, 1), ("think", 1, 2)), result(("joint", 2, 3), ("think", 1, 4)))
    assert both == result(("joint", 0, 1), ("think", 1, 4), ("joint", 2, 3))
    with pytest.raises(InputError, match="168 updates, the runs of 24"):
        experiment.added(result(), result(updates=24))
