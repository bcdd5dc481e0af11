"""grpo.py against hand-computed numbers, one-by-one forwards of the library, and torch's own AdamW."""

import gc
import math
import weakref

import pytest
import torch
from conftest import prompts_of
from transformers import Qwen3VLForConditionalGeneration

from grpo import (MasterAdamW, checkpoint_activations, group_advantages, grpo_loss, k3, pack,
                  response_logprobs, update_batch)
from rollout import load, sample


def tensor(*values):
    return torch.tensor(values)


# --- advantages


def test_advantages_by_hand():
    """Rewards 1, 0, 0, 1: mean 0.5, unbiased std sqrt(1/3), so +-0.8660; and 1, 0: +-0.5 / 0.7071."""
    for rewards, expected in (
            (tensor(1.0, 0, 0, 1), tensor(0.86602, -0.86602, -0.86602, 0.86602)),
            (tensor(1.0, 1, 1, 0), tensor(0.5, 0.5, 0.5, -1.5)),
            (tensor(1.0, 0), tensor(0.70711, -0.70711))):
        assert torch.allclose(group_advantages(rewards), expected, atol=1e-4)


def test_equal_rewards_give_exactly_zero():
    """In float32 the mean of twelve 1.1 is not 1.1, and a tiny eps would blow the difference up."""
    assert group_advantages(torch.full((12,), 1.1)).eq(0).all()
    assert group_advantages(torch.zeros(8)).eq(0).all()


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="compares samples"):
        group_advantages(torch.ones(1))


# --- the loss


def test_k3_by_hand():
    assert k3(tensor(-1.0), tensor(-1.0)) == 0
    assert k3(tensor(-2.0), tensor(-1.0)).item() == pytest.approx(math.e - 2)           # d = 1
    assert k3(tensor(-1.0), tensor(-2.0)).item() == pytest.approx(1 / math.e)           # d = -1
    assert k3(tensor(-90.0), tensor(-1.0)).item() == 10 and k3(tensor(-1.0), tensor(-90.0)).item() == 10


def test_the_gradient_at_ratio_one_is_reinforce():
    """d loss / d logp = -A / tokens for every token, of long and of short responses alike."""
    logp = tensor(-1.0, -2.0, -3.0, -0.5, -0.1).requires_grad_()
    advantage = tensor(2.0, 2.0, 2.0, 2.0, -1.0)                                        # four tokens, then one
    old = logp.detach()
    loss, clipped = grpo_loss(logp, old, old, advantage, kl=0.5, clip=0.2, tokens=10)
    loss.backward()
    assert loss.item() == pytest.approx(-0.7)                    # -(4 * 2 - 1) / 10
    assert torch.allclose(logp.grad, -advantage / 10)            # the KL's is 0 where ref = policy
    assert not clipped.any()


def test_the_loss_with_clip_and_kl_by_hand():
    """Ratios 1.5 and 0.5 with both signs of the advantage. PPO keeps the worse of the two sides."""
    old, ref = torch.zeros(4), torch.zeros(4)
    logp = tensor(1.5, 1.5, 0.5, 0.5).log().requires_grad_()
    advantage = tensor(1.0, -1.0, 1.0, -1.0)
    # gain: min(1.5, 1.2) = 1.2; min(-1.5, -1.2) = -1.5; min(0.5, 0.8) = 0.5; min(-0.5, -0.8) = -0.8
    # k3, d = -log ratio: 1/1.5 + log 1.5 - 1 = 0.0721318 twice; 1/0.5 + log 0.5 - 1 = 0.3068528 twice
    loss, _ = grpo_loss(logp, old, ref, advantage, kl=0.1, clip=0.2, tokens=4)
    assert loss.item() == pytest.approx((0.6 + 0.1 * 2 * (0.0721318 + 0.3068528)) / 4, abs=1e-6)
    loss, clipped = grpo_loss(logp, old, ref, advantage, kl=0.0, clip=0.2, tokens=4)
    loss.backward()
    assert torch.allclose(logp.grad, tensor(0.0, 1.5, -0.5, 0.0) / 4, atol=1e-6)  # clipped: no push
    assert clipped.all()
    near = tensor(1.19, 1.21, 0.81, 0.79).log()
    _, clipped = grpo_loss(near, old, ref, advantage, kl=0.0, clip=0.2, tokens=4)
    assert clipped.tolist() == [False, True, False, True]


def test_parts_of_a_batch_add_up():
    torch.manual_seed(0)
    logp, old, ref, advantage = torch.randn(4, 30).unbind()
    whole, _ = grpo_loss(logp, old, ref, advantage, kl=0.1, clip=0.2, tokens=30)
    summed = 0.0
    for a, b in ((0, 7), (7, 8), (8, 30)):
        summed += grpo_loss(logp[a:b], old[a:b], ref[a:b], advantage[a:b],
                            kl=0.1, clip=0.2, tokens=30)[0]
    assert torch.allclose(whole, summed, atol=1e-6)


# --- one group, one row


def responses_of(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=g) for n in (5, 1, 9, 5)]


def one_by_one(model, codec, prompt, responses):
    """The oracle: every response behind its own prompt, positions from the library, full logits."""
    logps = []
    for response in responses:
        ids = torch.cat([prompt.ids, response])[None]
        kinds = (ids == codec.image_token_id).int()
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids),
                       pixel_values=prompt.pixels, image_grid_thw=prompt.grids,
                       mm_token_type_ids=kinds).logits
        logits = logits[0, len(prompt.ids) - 1:-1].clone()
        logits[:, codec.banned] = float("-inf")
        logps.append(torch.log_softmax(logits, -1)[range(len(response)), response])
    return torch.cat(logps)


@pytest.mark.parametrize("crops", [0, 1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_packed_row_is_the_same_function_as_separate_forwards(tiny, crops, checkpointing):
    model, codec = tiny
    prompt = prompts_of(codec)[{0: 0, 1: 1, 3: 2}[crops]]
    assert len(prompt.grids) == crops + 1
    responses = responses_of(model)
    weights = torch.randn(20, generator=torch.Generator().manual_seed(1))
    expected = one_by_one(model, codec, prompt, responses)
    (expected * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        checkpoint_activations(model)
        model.train()
    logp, entropy = response_logprobs(model, pack(prompt, responses), codec.banned, chunk=7)
    assert torch.allclose(logp, expected, atol=1e-5)
    (logp * weights).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad - gradients[name]).norm() <= 1e-4 * gradients[name].norm() + 1e-7, name
        assert gradients[name].norm() > 0, name                  # the vision tower trains, too
    assert not entropy.requires_grad


def dense_mask(P, lengths):
    """(1, 1, L, L) bool: causal, and no response sees another. What group_attention does, plainly."""
    owner = torch.tensor([-1] * P).long()
    owner = torch.cat([owner, torch.arange(len(lengths)).repeat_interleave(lengths)])
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    return (causal & ((owner[None, :] == -1) | (owner[None, :] == owner[:, None])))[None, None]


@pytest.mark.parametrize("crops", [0, 1, 3])
def test_attention_without_a_mask_equals_one_dense_mask(tiny, folder, crops):
    """The library's own SDPA under an explicit (L, L) mask is the oracle, for log-probs and all gradients."""
    model, codec = tiny
    prompt, responses = prompts_of(codec)[{0: 0, 1: 1, 3: 2}[crops]], responses_of(model)
    row = pack(prompt, responses)
    plain = Qwen3VLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa")
    hidden = plain.model(
        input_ids=row.ids, position_ids=row.positions, pixel_values=row.pixels,
        attention_mask=dense_mask(len(prompt.ids), row.lengths), image_grid_thw=row.grids,
        use_cache=False).last_hidden_state[0, row.predictors]
    logits = plain.lm_head(hidden).index_fill(-1, codec.banned, float("-inf"))
    expected = logits.log_softmax(-1)[range(20), row.targets]
    logp, _ = response_logprobs(model, row, codec.banned)
    assert model.config.text_config._attn_implementation == "group"
    assert torch.allclose(logp, expected, atol=1e-5)
    weights = torch.randn(20, generator=torch.Generator().manual_seed(1))
    for result in (logp, expected):
        (result * weights).sum().backward()
    for (name, p), oracle in zip(model.named_parameters(), plain.parameters()):
        assert (p.grad - oracle.grad).norm() <= 1e-4 * oracle.grad.norm() + 1e-7, name


def test_the_entropy_is_that_of_the_full_distribution(tiny):
    model, codec = tiny
    model.lm_head.weight.data.zero_()
    prompt = prompts_of(codec)[0]
    _, entropy = response_logprobs(model, pack(prompt, responses_of(model)), codec.banned)
    uniform = math.log(model.config.text_config.vocab_size - 4)
    assert torch.allclose(entropy, tensor(uniform).expand(20))


def test_log_probs_at_sampling_are_those_of_training(tiny):
    model, codec = tiny
    for group in groups_of(model, codec):
        row = pack(group.prompt, [c.ids for c in group.completions])
        logp, _ = response_logprobs(model, row, codec.banned)
        sampled = torch.cat([c.logps for c in group.completions])
        assert torch.allclose(logp, sampled, atol=1e-5)


def test_packing_leaves_the_prompt_alone_and_refuses_empty_responses(tiny):
    _, codec = tiny
    prompt = prompts_of(codec)[1]
    before = prompt.ids.clone(), prompt.positions.clone()
    row = pack(prompt, [torch.tensor([1, 2]), torch.tensor([3])])
    row.ids.zero_(), row.positions.zero_()
    assert torch.equal(prompt.ids, before[0]) and torch.equal(prompt.positions, before[1])
    with pytest.raises(ValueError, match="lengths"):
        pack(prompt, [torch.tensor([1]), torch.tensor([], dtype=torch.long)])


# --- the update


class Recorder:
    """Stands in for the optimizer: keeps the summed gradient of every parameter."""
    def __init__(self, model):
        self.model = model

    def step(self, max_norm):
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters()}
        self.model.zero_grad()
        return 0.0


def test_the_gradient_does_not_depend_on_order_or_split(tiny, folder):
    """The divisor is the token count of the whole batch: three groups in any order, or each alone
    scaled to that count, give one gradient."""
    model, codec = tiny
    reference = load_again(folder)
    reference.lm_head.weight.data.mul_(1.1)                                             # so that the KL matters
    groups = groups_of(model, codec)
    rewards = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0], [3, 2, 1, 0]])
    for group, row in zip(groups, rewards):
        group.advantages = group_advantages(row)
    tokens = [sum(len(c.ids) for c in g.completions) for g in groups]

    def gradient(order):
        recorder = Recorder(model)
        metrics = update_batch(
            model, reference, recorder, [groups[q] for q in order],
            banned=codec.banned, kl=0.5, clip=0.2, max_norm=1.0)
        return recorder.gradients, metrics

    whole, metrics = gradient((0, 1, 2))
    permuted, again = gradient((2, 0, 1))
    alone = [gradient((q,))[0] for q in range(3)]
    for name, expected in whole.items():
        summed = sum(alone[q][name] * tokens[q] / sum(tokens) for q in range(3))
        for other in (permuted[name], summed):
            assert (other - expected).norm() <= 1e-4 * expected.norm() + 1e-8, name
    assert metrics["kl"] > 0 and metrics["kl"] == pytest.approx(again["kl"], rel=1e-4)
    assert metrics["sampler_gap"] < 1e-5 and metrics["clip_fraction"] == 0


def test_more_updates_move_the_ratio_off_one(tiny, folder):
    model, codec = tiny
    groups = groups_of(model, codec, advantages=[1.0, -1, 1, -1])
    metrics = update_batch(
        model, load_again(folder), MasterAdamW(model, lr=3e-2), groups,
        banned=codec.banned, kl=0.0, clip=0.2, max_norm=1.0, updates=2)
    assert metrics["clip_fraction"] > 0


def groups_of(model, codec, advantages=(0, 0, 0, 0)):
    """Three sampled groups of four, of different token counts: every third id ends a response."""
    codec.stop_ids = torch.arange(0, model.config.text_config.vocab_size, 3)
    generator = torch.Generator().manual_seed(0)
    groups = list(sample(
        model, codec, prompts_of(codec), group=4, max_tokens=9, rows=3, generator=generator))
    assert len({len(c.ids) for g in groups for c in g.completions}) > 2
    assert len({sum(len(c.ids) for c in g.completions) for g in groups}) == 3
    for group in groups:
        group.advantages = torch.tensor(advantages, dtype=torch.float32)
    return groups


def load_again(folder):
    return load(folder, 64 * 64)[0]


def test_the_kl_pulls_back_to_the_reference(tiny, folder):
    """No advantage, only KL: a policy that was moved away comes back on the sampled tokens."""
    model, codec = tiny
    reference = load_again(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.model.language_model.layers.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    groups = groups_of(model, codec)
    optimizer = MasterAdamW(model, lr=1e-4)
    kls = []
    for _ in range(8):
        metrics = update_batch(
            model, reference, optimizer, groups,
            banned=codec.banned, kl=1.0, clip=0.2, max_norm=1.0)
        kls.append(metrics["kl"])
    assert 0 < kls[-1] < 0.7 * kls[0]


# --- the optimizer


def test_masters_let_a_bf16_weight_move_by_steps_of_1e_6():
    """0.01 in bf16 has steps of 6e-5: plain bf16 AdamW never leaves it, masters do after some 60."""
    model, plain = (torch.nn.Linear(8, 8, bias=False).bfloat16() for _ in range(2))
    for m in (model, plain):
        m.weight.data.fill_(0.01)
    before = model.weight.detach().clone()
    optimizer = MasterAdamW(model, lr=1e-6, weight_decay=0.0)
    naive = torch.optim.AdamW(plain.parameters(), lr=1e-6, weight_decay=0.0)
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    for step in range(100):
        model(x).sum().backward()
        optimizer.step(max_norm=1e9)
        plain(x).sum().backward()
        naive.step(), naive.zero_grad()
        if step == 9:
            assert torch.equal(model.weight, before)             # masters moved, bf16 not yet
            assert torch.allclose(optimizer.masters[0], before.float() - 1e-5, atol=1e-7)
    assert torch.equal(plain.weight, before)
    assert (model.weight < before).all()


def test_in_float32_it_is_torchs_own_adamw():
    """Same weights after five steps as torch.optim.AdamW with clip_grad_norm_, on summed gradients."""
    torch.manual_seed(0)
    mine, theirs = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)
    theirs.load_state_dict(mine.state_dict())
    optimizer = MasterAdamW(mine, lr=1e-2)
    oracle = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.01)
    for _ in range(5):
        batches = torch.randn(2, 4, 6)
        for x in batches:
            mine(x).pow(2).sum().backward()
        (theirs(batches[0]).pow(2).sum() + theirs(batches[1]).pow(2).sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        assert optimizer.step(1.0) == pytest.approx(norm.item(), rel=1e-5)
        oracle.step(), oracle.zero_grad()
    assert torch.allclose(mine.weight, theirs.weight, atol=1e-6) and mine.weight.grad is None


def test_a_phase_start_forgets_the_moments_and_keeps_the_weights():
    model = torch.nn.Linear(2, 2)
    optimizer = MasterAdamW(model, lr=1e-2)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step(1.0)
    moved = model.weight.detach().clone()
    assert len(optimizer.adam.state) == 2
    optimizer.forget_moments()
    assert len(optimizer.adam.state) == 0 and torch.equal(model.weight, moved)


def test_offloaded_it_takes_the_same_steps():
    """On a CPU the two homes are one, so the bits agree; on a GPU rounding may differ."""
    torch.manual_seed(0)
    here, away = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)
    away.load_state_dict(here.state_dict())
    optimizers = MasterAdamW(here, lr=1e-2), MasterAdamW(away, lr=1e-2, offload=True)
    for _ in range(3):
        x = torch.randn(4, 6)
        for model, optimizer in zip((here, away), optimizers):
            model(x).pow(2).sum().backward()
            optimizer.step(1.0)
    assert torch.equal(here.weight, away.weight)
    assert all(master.device.type == "cpu" for master in optimizers[1].masters)


def test_a_frozen_parameter_is_left_alone():
    """What LoRA needs: only trainable parameters have masters."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = MasterAdamW(model, lr=1e-1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step(1.0)
    assert optimizer.names == ["1.weight", "1.bias"] and torch.equal(model[0].weight, before)


def test_the_reference_is_asked_once_a_group_whatever_the_updates(tiny, folder):
    model, codec = tiny
    reference, calls = load_again(folder), []
    reference.model.register_forward_hook(lambda *_: calls.append(1))
    groups = groups_of(model, codec, advantages=[1.0, -1, 1, -1])
    update_batch(model, reference, MasterAdamW(model, lr=1e-4), groups,
                 banned=codec.banned, kl=0.1, clip=0.2, max_norm=1.0, updates=3)
    assert len(calls) == 3


def test_an_optimizer_goes_with_its_last_user(tiny):
    """The hooks on the model's parameters must not keep masters and moments alive."""
    model, _ = tiny
    optimizer = MasterAdamW(model, 1e-3)
    seen = weakref.ref(optimizer.masters[0])
    del optimizer
    gc.collect()
    assert seen() is None
