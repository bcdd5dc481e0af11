"""GRPO on groups that share a prompt: advantages, KL, loss, log-probs, update; the optimizer.

Paper: arXiv 2607.01191 (PRA-GRPO). GRPO is from DeepSeekMath (arXiv 2402.03300), its clip from PPO
(arXiv 1707.06347), the k3 estimator of the KL from http://joschu.net/blog/kl-approx.html.

The one idea here that is not in the papers is *one group, one row*. The G responses of a group
share a prompt of thousands of visual tokens, so it is encoded once and the responses follow it:

    [ prompt | response 1 | response 2 | ... | response G ]

Each response attends to the prompt and to itself, and each starts at the same position, right after
the prompt. The result equals G separate forwards (tests/test_grpo.py compares them), but it costs
P + G R tokens instead of G (P + R).

Where GRPO code differs, this is the paper's choice: advantages are divided by the group's std; the
loss is a mean over all tokens of the batch, not of each response; the KL is a term of the loss, not
of the reward; there is one update a batch, so the clip never acts unless --updates asks for more.

Shapes: Q questions, G samples a group, P prompt tokens, R response tokens, V vocabulary. T is the
sum of a group's R: every per-token tensor of a group is one flat (T,), response after response.
"""

import math
import weakref
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint

from rollout import out_of_memory

# ---------------------------------------------------------------------------------------------
# The algorithm: pure functions


def group_advantages(rewards, eps=1e-6):
    """A = (r - mean) / (std + eps) within one group (GRPO; unbiased std, eps as in the paper).

    rewards: (G,), G >= 2. Returns (G,) float32.
    Raises ValueError for G < 2: a single sample has nothing to be compared with.
    """
    if len(rewards) < 2:
        raise ValueError(f"a group of {len(rewards)} has no advantage: GRPO compares samples")

    # The mean of equal floats can be off by a rounding error, and a tiny std would blow that up.
    if (rewards == rewards[0]).all():
        return torch.zeros(len(rewards))                                         # (G,)

    rewards = rewards.double()
    return ((rewards - rewards.mean()) / (rewards.std() + eps)).float()          # (G,)


def k3(logp, ref_logp):
    """Per-token estimate of KL(policy || reference): exp(d) - d - 1 with d = ref - policy. (T,)

    For samples of the policy it is unbiased, never negative and low in variance. (Its *gradient*
    is, as in GRPO, that of the reverse, KL(reference || policy). Both pull to the reference.) The
    clamps are the authors' guard against overflow; above 10 the KL has no gradient any more. In
    bf16 rounding alone makes the two models' log-probs differ as soon as weights move, so the
    metric `kl` has a floor: look at its growth.
    """
    d = (ref_logp - logp).clamp(-20, 20)                                         # (T,)
    return (d.exp() - d - 1).clamp(max=10)                                       # (T,)


def grpo_loss(logp, old_logp, ref_logp, advantage, *, kl, clip, tokens):
    """One group's part of the batch's loss. Returns (loss, clipped); the parts of a batch add up.

    The loss is a scalar, all other tensors are (T,). logp carries the gradient; old_logp is of the
    policy that sampled, ref_logp of the reference; advantage is that of each token's response;
    clipped says where the ratio was bounded.
    kl: coefficient of the KL. clip: 0.2. tokens: response tokens of the *whole batch*. Divided by
    these, the groups' losses and gradients add up to those of the batch's mean, in which every
    token weighs the same, in short responses and in long ones.
    """
    # The importance ratio. At the first update on a batch (strictly on-policy) its value is exactly
    # 1, and its gradient is that of logp: the gradient is then REINFORCE's, and the KL's.
    ratio = (logp - old_logp).exp()                                              # (T,)

    # PPO's pessimistic bound: beyond the clip there is nothing more to gain, but still to lose.
    bounded = ratio.clamp(1 - clip, 1 + clip)                                    # (T,)
    gain = torch.min(ratio * advantage, bounded * advantage)                     # (T,)

    # Stay near the reference: the KL is a term of the loss, not of the reward.
    loss = (kl * k3(logp, ref_logp) - gain).sum() / tokens
    return loss, bounded != ratio


# ---------------------------------------------------------------------------------------------
# One group, one row


@dataclass
class Row:
    """A prompt and its G responses as one sequence of length L = P + T."""
    ids: torch.Tensor         # (1, L)
    positions: torch.Tensor   # (3, 1, L) every response restarts right after the prompt
    layout: torch.Tensor      # (1, 1, 1, 1 + G) on the CPU: P, then every R
    pixels: torch.Tensor      # (patches, channels * temporal * patch * patch)
    grids: torch.Tensor       # (images, 3)
    predictors: torch.Tensor  # (T,) the place in the row that predicts each response token
    targets: torch.Tensor     # (T,) the response tokens
    lengths: torch.Tensor     # (G,) R of each response


def pack(prompt, responses, device="cpu"):
    """A rollout.Prompt and G response id tensors, (R,) each -> Row on `device`.

    Raises ValueError for an empty group or an empty response; the sampler makes neither.
    """
    lengths = torch.tensor([len(response) for response in responses])            # (G,)
    if len(lengths) == 0 or lengths.min() == 0:
        raise ValueError(f"cannot train on responses of lengths {lengths.tolist()}")

    P = len(prompt.ids)
    targets = torch.cat(list(responses))                                         # (T,)
    place = torch.cat([torch.arange(n) for n in lengths])                        # (T,) 0 .. R-1

    # M-RoPE: text goes on at the same number on all three axes, one above the largest so far.
    after = prompt.positions.max() + 1 + place                                   # (T,)
    positions = torch.cat([prompt.positions, after.expand(3, -1)], dim=1)        # (3, L)

    # The last *prompt* token predicts the first token of every response; from there on each
    # response token predicts the next one.
    own = P + torch.arange(len(targets))                                         # (T,) its place
    predictors = torch.where(place == 0, P - 1, own - 1)                         # (T,)

    layout = torch.cat([torch.tensor([P]), lengths])                             # (1 + G,)
    return Row(
        ids=torch.cat([prompt.ids, targets])[None].to(device),
        positions=positions[:, None].to(device),
        layout=layout[None, None, None],
        pixels=prompt.pixels.to(device),
        grids=prompt.grids.to(device),
        predictors=predictors.to(device),
        targets=targets.to(device),
        lengths=lengths)


def response_logprobs(model, row, banned, chunk=512):
    """Log-probs of all response tokens of one Row under `model`.

    banned: ids that cannot be sampled; they are left out here, too, so both distributions agree.
    Returns logp (T,) float32 with gradient, and entropy (T,) without.
    """
    # One forward over the whole row. The layout goes in the place of a mask: it reaches
    # rollout.shared_prefix_attention untouched. What is kept are the places that predict a response
    # token.
    hidden = model.model(
        input_ids=row.ids, position_ids=row.positions, attention_mask=row.layout,
        pixel_values=row.pixels, image_grid_thw=row.grids, use_cache=False).last_hidden_state
    hidden = hidden[0, row.predictors]                                           # (T, hidden size)
    banned = banned.to(hidden.device)

    def score(hidden, target):
        logits = model.lm_head(hidden).float()                                   # (chunk, V)
        logits = logits.index_fill(-1, banned, float("-inf"))
        logps = logits.log_softmax(-1)                                           # (chunk, V)
        with torch.no_grad():
            entropy = torch.special.entr(logps.exp()).sum(-1)                    # entr(0) = 0
        return logps.gather(1, target[:, None])[:, 0], entropy                   # (chunk,) both

    # The logits of all T tokens at once would be gigabytes (T = 8192 and V = 151,936 in float32:
    # 4.6 GiB). They exist for one chunk at a time, in the forward and again in the backward pass.
    logp, entropy = [], []
    for hidden_part, target_part in zip(hidden.split(chunk), row.targets.split(chunk)):
        scored = checkpoint(score, hidden_part, target_part, use_reentrant=False)
        logp.append(scored[0])
        entropy.append(scored[1])
    return torch.cat(logp), torch.cat(entropy)                                   # (T,) both


# ---------------------------------------------------------------------------------------------
# The update


@out_of_memory("updating", "halve --max-pixels in a new run (then --reason-tokens or --group), "
                           "or add --offload")
def update_batch(policy, reference, optimizer, groups, *, banned, kl, clip, max_norm, updates=1):
    """The GRPO update on one batch: every group forward and backward, then one optimizer step
    (and all of this `updates` times).

    groups: list of rollout.Group, with their .advantages; groups may differ in size.
    updates: optimizer steps on this batch; 1 in the paper, so that the ratio is always 1.
    Returns the metrics of the last of these steps; means are over all response tokens:
        loss           at ratio 1 the advantages of a group nearly cancel: no measure of progress
        kl, entropy    mean, nats a token; see `k3` for what `kl` reads in bf16
        clip_fraction  share of tokens whose ratio was outside the clip; 0 with `updates` = 1
        grad_norm      before it is scaled down
        sampler_gap    (of the first step) mean |log-prob when sampled - log-prob now|: rounding,
                       unless there is a bug
        nonfinite      the groups whose loss was not finite, or all of them if only the gradient's
                       norm was not. Such a step changes nothing, and the rest of `updates` is left
                       out; training goes on with the next batch
    """
    # Fixed before the loop: see grpo_loss.
    tokens = sum(len(c.ids) for group in groups for c in group.completions)
    old_logps, ref_logps = {}, {}
    gap = 0.0
    policy.train()  # for activation checkpointing; Qwen3-VL has no dropout

    for _ in range(updates):
        metrics = {"loss": 0.0, "kl": 0.0, "entropy": 0.0, "clip_fraction": 0.0}
        nonfinite = []

        # Memory is that of one group: its gradient is added up and its graph freed before the next.
        for q, group in enumerate(groups):
            row = pack(group.prompt, [c.ids for c in group.completions], policy.device)
            advantage = group.advantages.repeat_interleave(row.lengths)          # (T,)
            advantage = advantage.to(policy.device)

            # The reference does not change within a phase: once for each group and batch.
            if q not in ref_logps:
                with torch.no_grad():
                    ref_logps[q], _ = response_logprobs(reference, row, banned)  # (T,)

            # In the first step the policy *is* the policy that sampled, so its own log-probs are
            # the old ones. The sampler's must be equal, up to rounding.
            logp, entropy = response_logprobs(policy, row, banned)               # (T,) both
            if q not in old_logps:
                old_logps[q] = logp.detach()
                sampled = torch.cat([c.logps for c in group.completions]).to(logp.device)
                gap += (sampled - logp.detach()).abs().sum().item()

            loss, clipped = grpo_loss(
                logp, old_logps[q], ref_logps[q], advantage, kl=kl, clip=clip, tokens=tokens)
            if not loss.isfinite():
                nonfinite.append(group)
                continue  # the other groups are only looked at, so that all bad ones are named

            # Hooks of the optimizer take each gradient over as soon as it is complete: it is added
            # to a float32 sum, and p.grad is None again. `step` scales the sum down to max_norm,
            # lets AdamW update the float32 masters, rounds those into the weights, and begins a new
            # sum.
            loss.backward()

            metrics["loss"] += loss.item()
            metrics["kl"] += k3(logp.detach(), ref_logps[q]).sum().item() / tokens
            metrics["entropy"] += entropy.sum().item() / tokens
            metrics["clip_fraction"] += clipped.sum().item() / tokens

        # The sum lacks this group's gradient now, so it is not the batch's: nothing is updated.
        if nonfinite:
            optimizer.discard()
            metrics["grad_norm"] = math.nan
            break
        metrics["grad_norm"] = optimizer.step(max_norm)
        if not math.isfinite(metrics["grad_norm"]):
            nonfinite = groups
            break

    return metrics | {"sampler_gap": gap / tokens, "nonfinite": nonfinite}


# =============================================================================================
# Skip on a first reading: AdamW for bf16 weights, its checkpoint; activation checkpointing


class MasterAdamW:
    """AdamW on float32 master copies of a model's trainable parameters.

    A step of 1e-6 on a bf16 weight of 0.01 rounds to nothing: bf16 has eight significant bits. So
    the model computes in bf16, while masters, moments and the summed gradient are float32.

    offload: masters and moments live in the computer's memory and AdamW runs there. The gradient is
    still summed on the GPU and crosses once a step; the rounded weights cross on the way back.
    """

    def __init__(self, model, lr, weight_decay=0.01, offload=False):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.options = {"lr": lr, "weight_decay": weight_decay, "fused": True}

        home = "cpu" if offload else self.params[0].device
        self.masters = [p.detach().to(home, torch.float32, copy=True) for p in self.params]
        if offload and torch.cuda.is_available():
            self.masters = [master.pin_memory() for master in self.masters]      # faster crossings
        self.forget_moments()

        # Every gradient is added to its float32 sum the moment it is complete, and freed. So there
        # is one full-size gradient buffer, and summing over many groups loses nothing. (Within a
        # group autograd sums the parts of a tied embedding's gradient, in bf16.)
        self.sums = [None] * len(self.params)
        for place, param in enumerate(self.params):
            param.register_post_accumulate_grad_hook(self._collector(place))

    def _collector(self, place):
        # (A weak reference, as a hook lives as long as the model: masters and moments must not.)
        owner = weakref.ref(self)

        def collect(param):
            optimizer = owner()
            if optimizer is None:
                return
            if optimizer.sums[place] is None:
                optimizer.sums[place] = param.grad.float()
            else:
                optimizer.sums[place].add_(param.grad)
            param.grad = None
        return collect

    def forget_moments(self):
        """A fresh AdamW. Each phase of the paper is a launch of its own, so moments start over."""
        self.adam = torch.optim.AdamW(self.masters, **self.options)

    def discard(self):
        """Forget the summed gradient; masters, moments and weights stay as they are."""
        self.sums = [None] * len(self.params)

    @torch.no_grad()
    def step(self, max_norm):
        """Scale the gradient down to `max_norm`, update the masters, round them into the weights.

        Returns the norm before scaling, a float. If it is not finite, nothing is updated.
        """
        # A parameter that no response depends on has no gradient, and stays as it is.
        sums = [total for total in self.sums if total is not None]
        norm = torch.nn.utils.get_total_norm(sums)
        if not norm.isfinite():
            self.discard()
            return norm.item()

        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for master, total in zip(self.masters, self.sums):
            if total is not None:
                master.grad = total.mul_(scale).to(master.device)
        self.adam.step()
        self.adam.zero_grad()
        self.discard()
        self.round_weights()
        return norm.item()

    @torch.no_grad()
    def round_weights(self):
        """The masters, rounded to the type that the model computes in, become its weights."""
        # (With --offload: non-blocking, or the CPU would do the rounding, and slowly.)
        for param, master in zip(self.params, self.masters):
            param.copy_(master, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------
# The optimizer in a checkpoint; activation checkpointing


def optimizer_state(optimizer):
    """What a checkpoint keeps, as {file: {name: tensor}}: masters and Adam's moments."""
    # The weights are not kept: they are the masters, rounded.
    moments = {}
    for name, master in zip(optimizer.names, optimizer.masters):
        for kind, value in optimizer.adam.state[master].items():
            moments[f"{name}.{kind}"] = value
    return {"masters": dict(zip(optimizer.names, optimizer.masters)), "moments": moments}


def load_optimizer(optimizer, folder):
    """Masters, weights and moments from the safetensors files of a checkpoint folder."""
    master_of = dict(zip(optimizer.names, optimizer.masters))
    load_into(master_of, folder / "masters.safetensors")
    optimizer.round_weights()

    # Adam makes its moments at the first step, so there are none to copy into.
    optimizer.forget_moments()
    with safe_open(folder / "moments.safetensors", "pt") as file:
        for key in file.keys():
            name, _, kind = key.rpartition(".")
            master, value = master_of[name], file.get_tensor(key)

            # (On a CPU the value is the file itself, mapped: it is copied, as the file will go.)
            optimizer.adam.state[master][kind] = value.to(master.device, copy=True)


@torch.no_grad()
def load_into(tensors, file):
    """Copy a safetensors file into the existing tensors {name: tensor}, one at a time."""
    with safe_open(file, "pt") as stored:
        for name, tensor in tensors.items():
            tensor.copy_(stored.get_tensor(name))


def checkpoint_activations(policy):
    """Let the policy's layers keep only their inputs, and compute the rest again in the backward
    pass: a third more work, for a fraction of the memory. It acts in train mode only."""
    if hasattr(policy, "activation_checkpointing_enable"):  # its name since transformers 5.2x
        policy.activation_checkpointing_enable({"use_reentrant": False})
    else:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
