"""grpo.py against another implementation: TRL's GRPOTrainer, on the same tensors.

TRL is not needed here. tests/trl_numbers.py draws the tensors, and where TRL is installed it prints
the numbers below: those of Q = 3 micro-batches, a group each, whose gradients TRL accumulates.
"""

import pytest
import torch

from grpo import group_advantages, grpo_loss, k3
from trl_numbers import GROUP_TOKENS, LENGTHS, REWARDS, SETTINGS, G, Q, tensors

TRL = {'versions': {'trl': '1.16.0', 'torch': '2.13.0+cpu', 'transformers': '5.24.0'},
       'advantages': [0.86587542, -0.86587542, -0.86587542, 0.86587542, 1.49970007, -0.49990001,
                      -0.49990001, -0.49990001, 0.0, 0.0, 0.0, 0.0],
       'cases': [{'beta': 0.0,
                  'ratio_one': True,
                  'loss': [0.18675745, -0.08821766, 0.0],
                  'kl': [],
                  'clip_ratio': [0.0, 0.0, 0.0],
                  'grad_norm': 0.11002795,
                  'grad': [-0.01697795, -0.02940588, 0.0]},
                 {'beta': 0.0,
                  'ratio_one': False,
                  'loss': [0.20824695, -0.10004089, 0.0],
                  'kl': [],
                  'clip_ratio': [0.29411766, 0.36842105, 0.0],
                  'grad_norm': 0.09076829,
                  'grad': [-0.01123193, 0.0, 0.0]},
                 {'beta': 0.01,
                  'ratio_one': True,
                  'loss': [0.18687701, -0.08806925, 9.422e-05],
                  'kl': [0.03587003, 0.03983669, 0.03203493],
                  'clip_ratio': [0.0, 0.0, 0.0],
                  'grad_norm': 0.10999416,
                  'grad': [-0.01705939, -0.02936981, -9.172e-05]},
                 {'beta': 0.01,
                  'ratio_one': False,
                  'loss': [0.20836651, -0.09989247, 9.422e-05],
                  'kl': [0.03587003, 0.03983669, 0.03203493],
                  'clip_ratio': [0.29411766, 0.36842105, 0.0],
                  'grad_norm': 0.09075428,
                  'grad': [-0.01131337, 3.608e-05, -9.172e-05]}]}


def test_the_advantages_are_trls():
    # TRL adds 1e-4 to the std, and does not let it be chosen.
    rewards = torch.tensor(REWARDS).view(Q, G)
    advantages = torch.cat([group_advantages(group, eps=1e-4) for group in rewards])
    assert advantages.tolist() == pytest.approx(TRL["advantages"], abs=1e-6)


@pytest.mark.parametrize("case", TRL["cases"])
def test_loss_gradient_and_metrics_are_trls(case):
    logp, old_logp, ref_logp = tensors()                                         # (T,) each
    logp.requires_grad_()

    # On-policy the policy that sampled is the policy itself.
    if case["ratio_one"]:
        old_logp = logp.detach()
    advantages = torch.tensor(TRL["advantages"]).repeat_interleave(torch.tensor(LENGTHS))

    # One group after the other, as in update_batch; `tokens` is the whole batch's.
    losses, kls, clip_ratios = [], [], []
    parts = [flat.split(GROUP_TOKENS) for flat in (logp, old_logp, ref_logp, advantages)]
    for new, old, ref, advantage in zip(*parts):
        loss, clipped = grpo_loss(new, old, ref, advantage, kl=case["beta"],
                                  clip=SETTINGS["epsilon"], tokens=sum(LENGTHS))
        losses.append(loss)
        kls.append(k3(new, ref).mean().item())

        # We count every ratio outside the clip. TRL counts those that the clip takes the gradient
        # from: too high already where the advantage is positive, too low where it is negative.
        stopped = clipped & ((new - old) * advantage > 0)
        clip_ratios.append(stopped.float().mean().item())

    # Of the gradient, its norm and its entry at the first token of each group are kept.
    sum(losses).backward()
    firsts = [part[0].item() for part in logp.grad.split(GROUP_TOKENS)]
    assert [loss.item() for loss in losses] == pytest.approx(case["loss"], abs=1e-6)
    assert logp.grad.norm().item() == pytest.approx(case["grad_norm"], abs=1e-6)
    assert firsts == pytest.approx(case["grad"], abs=1e-7)
    assert clip_ratios == pytest.approx(case["clip_ratio"], abs=1e-6)
    if case["kl"]:  # TRL measures no KL if its coefficient is 0
        assert kls == pytest.approx(case["kl"], abs=1e-6)
