"""GRPO on groups that share a prompt: advantages, log-probs, loss, optimizer; at the end, a run's files and the way back from them.

Paper: arXiv 2607.01191 (PRA-GRPO). GRPO is from DeepSeekMath (arXiv 2402.03300), its clip from PPO
(arXiv 1707.06347), the k3 estimator of the KL from http://joschu.net/blog/kl-approx.html.

The one idea here that is not in the papers is *one group, one row*: the G responses of a group share
a prompt of thousands of visual tokens, so that prompt is encoded once, and the responses follow it,

    [ prompt | response 1 | response 2 | ... | response G ]

each attending to the prompt and to itself, each starting at the same position. The result equals G
separate forwards (tests/test_grpo.py checks it); it just costs P + G R tokens, not G (P + R).

Shapes: Q questions, G samples a group, P prompt tokens, R response tokens, V vocabulary.
T = the sum of a group's R, so every per-token tensor of a group is one flat (T,).
"""

import contextlib
import dataclasses
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from rollout import MAX_CROPS, PREFILL, InputError, out_of_memory

# ---------------------------------------------------------------------------------------------
# The algorithm: pure functions


def group_advantages(rewards, eps=1e-6):
    """A = (r - mean) / (std + eps) inside each group (GRPO; unbiased std, eps as in the paper).

    rewards: (Q, G) with G >= 2. Returns (Q, G) float32; a group of equal rewards gives exactly 0,
    also where the float mean of equal numbers is off by a rounding error.
    Raises ValueError for G < 2: one sample has nothing to be compared with.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"a group of {rewards.shape[1]} has no advantage: GRPO needs at least 2 samples")
    rewards = rewards.double()
    centred = rewards - rewards.mean(dim=1, keepdim=True)                       # (Q, G)
    scaled = centred / (rewards.std(dim=1, keepdim=True) + eps)                 # (Q, G)
    return scaled.masked_fill(equal_groups(rewards)[:, None], 0.0).float()


def equal_groups(rewards):
    """(Q,) True where all samples of a group earned the same: no policy gradient comes from it."""
    return (rewards == rewards[:, :1]).all(dim=1)


def k3(logp, ref_logp):
    """Per-token estimate of KL(policy || reference): exp(d) - d - 1, d = ref - policy (k3).

    Unbiased, never negative, low in variance. The clamps are the authors' guard against overflow.
    """
    d = (ref_logp - logp).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)


def grpo_loss(logp, old_logp, ref_logp, advantage, kl, clip, tokens):
    """The part of the batch's loss that comes from these tokens; parts simply add up.

    All of (T,) except the numbers: logp carries the gradient, old_logp is the policy that sampled,
    ref_logp the reference, advantage that of each token's response. kl: coefficient. clip: 0.2.
    tokens: the response tokens of the *whole batch*, fixed before the first part, so neither the
    order nor the split of the groups changes the gradient, and long answers weigh what they say.
    """
    ratio = (logp - old_logp).exp()                                             # 1 at the first update
    gain = torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return (kl * k3(logp, ref_logp) - gain).sum() / tokens


# ---------------------------------------------------------------------------------------------
# One group, one row


@dataclass
class Row:
    """A prompt and its G responses as one sequence of length L = P + T."""
    ids: torch.Tensor        # (1, L)
    positions: torch.Tensor  # (3, 1, L) every response restarts right after the prompt
    layout: torch.Tensor     # (1, 1, 1, 1 + G) on the CPU: P, then R of each response; see rollout.group_attention
    pixels: torch.Tensor     # (patches, ...)
    grids: torch.Tensor      # (images, 3)
    predictors: torch.Tensor  # (T,) where in the row each response token is predicted
    targets: torch.Tensor    # (T,) the response tokens, response after response
    lengths: list            # R of each response


def pack(prompt, responses, device="cpu"):
    """A rollout.Prompt and G response id tensors, each (R,), -> Row on `device`.

    Raises InputError for an empty group or response: the sampler never makes one.
    """
    lengths = [len(r) for r in responses]
    if not lengths or min(lengths) == 0:
        raise InputError(f"cannot train on responses of lengths {lengths}: each needs at least one token")
    P, targets = len(prompt.ids), torch.cat(list(responses))                    # (T,)
    offset = torch.cat([torch.arange(n) for n in lengths])                      # (T,) 0 .. R-1 inside it
    positions = torch.cat([prompt.positions, (prompt.positions.max() + 1 + offset).expand(3, -1)], dim=1)
    # The *last prompt token* predicts the first token of every response; then each predicts the next.
    predictors = torch.where(offset == 0, P - 1, P - 1 + torch.arange(len(targets)))  # (T,)
    return Row(torch.cat([prompt.ids, targets])[None].to(device), positions[:, None].to(device),
               torch.tensor([[[[P, *lengths]]]]), prompt.pixels.to(device), prompt.grids.to(device),
               predictors.to(device), targets.to(device), lengths)


def response_logprobs(model, row, banned, chunk=512):
    """Log-probs of all response tokens of one Row under `model`.

    Returns (logp (T,) float32 with gradient, entropy (T,) without). The (T, V) logits exist only
    `chunk` tokens at a time, in the forward and again in the backward pass: at T = 8192 and Qwen's
    vocabulary all of them would be 4.6 GiB. `banned` ids are excluded just as in sampling.
    """
    hidden = model.model(input_ids=row.ids, position_ids=row.positions, attention_mask=row.layout,
                         pixel_values=row.pixels, image_grid_thw=row.grids, use_cache=False).last_hidden_state
    hidden = hidden[0, row.predictors]                                          # (T, hidden size)
    banned = banned.to(hidden.device)

    def score(h, target):
        logits = model.lm_head(h).float().index_fill(-1, banned, float("-inf"))  # (chunk, V)
        logps = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = torch.special.entr(logps.exp()).sum(-1)                   # entr(0) = 0: no inf * 0
        return logps.gather(1, target[:, None])[:, 0], entropy

    parts = [checkpoint(score, h, t, use_reentrant=False)
             for h, t in zip(hidden.split(chunk), row.targets.split(chunk))]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


# ---------------------------------------------------------------------------------------------
# The optimizer


class MasterAdamW:
    """AdamW on float32 master copies of a model's parameters.

    A step of 1e-6 on a bf16 weight of 0.01 rounds to nothing: bf16 has eight bits of mantissa.
    So the model computes in bf16 while masters, moments and the summed gradients are float32.
    Every .grad is added to its master's the moment it is complete and then freed, so there is one
    full-size gradient buffer and summing over many groups loses nothing.
    """

    def __init__(self, model, lr, betas=(0.9, 0.999), weight_decay=0.01):
        self.names, self.params = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
        self.broken = torch.zeros((), dtype=torch.bool, device=self.params[0].device)  # a gradient was not finite
        self.masters = [p.detach().clone().float() for p in self.params]
        self.settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay,
                         "fused": self.params[0].is_cuda}
        self.reset()
        for param, master in zip(self.params, self.masters):
            param.register_post_accumulate_grad_hook(self._collector(master))

    def _collector(self, master):
        def collect(param):
            self.broken |= ~param.grad.isfinite().all()  # stays on the device: no waiting
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            master.grad.add_(param.grad)
            param.grad = None
        return collect

    def reset(self):
        """Forget the moments: each phase of the paper is a launch of its own. Weights stay."""
        self.adam = torch.optim.AdamW(self.masters, **self.settings)

    def discard(self):
        """Forget the summed gradient: masters, moments and weights stay as they are. Returns NaN, as its norm."""
        self.adam.zero_grad()
        self.broken.zero_()
        return math.nan

    def state(self):
        """What a checkpoint holds of it, as {file: {name: tensor}}: masters, from which the weights follow, and moments."""
        moments = {f"{name}.{key}": value for name, master in zip(self.names, self.masters)
                   for key, value in self.adam.state.get(master, {}).items()}
        return {"model": dict(zip(self.names, self.masters)), "optimizer": moments}

    @torch.no_grad()
    def load_masters(self, folder):
        """Masters from a checkpoint, and the weights from them as `step` rounds them."""
        read_into(folder / "model.safetensors", dict(zip(self.names, self.masters)))
        self._round()

    def load_moments(self, folder):
        """Adam's moments from a checkpoint; lr and the like stay what this run was started with."""
        with safe_open(folder / "optimizer.safetensors", "pt") as file:
            for key in file.keys():  # none, if no update has succeeded yet
                name, _, kind = key.rpartition(".")
                master = self.masters[self.names.index(name)]
                self.adam.state[master][kind] = file.get_tensor(key).to(master.device)

    def _round(self):
        for param, master in zip(self.params, self.masters):
            param.copy_(master)  # rounds to the compute type

    @torch.no_grad()
    def step(self, max_norm):
        """Clip the gradient to `max_norm`, update masters, then weights. Returns the norm before; if that
        is not finite, nothing was updated."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm)
        if norm.isfinite():
            self.adam.step()
        self.discard()
        self._round()
        return norm.item()


@torch.no_grad()
def read_into(file, tensors):
    """Copy a safetensors file into existing tensors {name: tensor}, one at a time."""
    with safe_open(file, framework="pt") as stored:
        for name, tensor in tensors.items():
            tensor.copy_(stored.get_tensor(name))


def peak_gib(device):
    """Peak memory so far: of the GPU, or of the process on a CPU, in GiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return None
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(30 if sys.platform == "darwin" else 20)  # bytes or KiB


@out_of_memory("updating", "halve --max-pixels in a new run (after that --reason-tokens or --group)")
def update_batch(policy, reference, optimizer, groups, advantages, *, banned, kl, clip, max_norm, updates=1):
    """The GRPO update on one batch: every group forward and backward, then one optimizer step.

    groups: rollout.Group list of length Q. advantages: (Q, G). Memory is that of a single group:
    their gradients are summed. With `updates` = 1 (the paper) the old policy *is* the current one,
    so its log-probs need no forward of their own, the ratio is 1 and the clip never acts.
    Returns the averages over all response tokens of the last pass: loss, kl, entropy, grad_norm,
    clip_fraction, and of the first: sampler_gap (mean |sampler's - trainer's log-prob|).
    If a loss or a gradient is not finite nothing is updated: `nonfinite` lists the groups it came from.
    """
    tokens = sum(len(c.ids) for g in groups for c in g.completions)  # fixed before the loop
    old, gap, nonfinite = {}, 0.0, []
    policy.train()  # activation checkpointing; Qwen3-VL has no dropout
    for _ in range(updates):
        sums = dict.fromkeys(("loss", "kl", "entropy", "clip_fraction"), 0.0)
        for q, group in enumerate(groups):
            row = pack(group.prompt, [c.ids for c in group.completions], policy.device)
            advantage = torch.repeat_interleave(advantages[q], torch.tensor(row.lengths)).to(policy.device)  # (T,)
            with torch.no_grad():
                ref_logp, _ = response_logprobs(reference, row, banned)
            logp, entropy = response_logprobs(policy, row, banned)
            if q not in old:
                old[q] = logp.detach()
                sampled = torch.cat([c.logps for c in group.completions]).to(logp.device)
                gap += (sampled - old[q]).abs().sum().item()
            loss = grpo_loss(logp, old[q], ref_logp, advantage, kl, clip, tokens)
            loss.backward()
            if not loss.isfinite() or optimizer.broken:  # every gradient so far was finite, so it is this group's
                nonfinite.append(q)
                optimizer.broken.zero_()
            with torch.no_grad():
                sums["loss"] += loss.item()
                sums["kl"] += k3(logp, ref_logp).sum().item() / tokens
                sums["entropy"] += entropy.sum().item() / tokens
                outside = ((logp - old[q]).exp() - 1).abs() > clip
                sums["clip_fraction"] += outside.sum().item() / tokens
        sums["grad_norm"] = optimizer.step(max_norm) if not nonfinite else optimizer.discard()
        if not math.isfinite(sums["grad_norm"]):
            nonfinite = nonfinite or list(range(len(groups)))  # finite gradients whose norm is not
            break
    return sums | {"sampler_gap": gap / tokens, "nonfinite": nonfinite}


def estimate_memory(model, s):
    """Peak GiB on a GPU under settings `s`, as {"sampling": ..., "updating": ...}: arithmetic, not a measurement."""
    c, v, w = model.config.text_config, model.config.vision_config, model.dtype.itemsize
    n, patches = model.num_parameters(), s.max_pixels / v.patch_size**2         # of one image
    static = n * (2 * w + 12)  # policy and frozen copy in the compute type; masters and two moments in float32
    P = [images * patches / v.spatial_merge_size**2 + 300 for images in (1, 1 + MAX_CROPS)]  # both roles'; 300 for the text
    R = [s.perceive_tokens, s.reason_tokens]
    # A token's keys and values, for a prompt once and its G responses (policy) or for prompts of their own (partner).
    columns = max(max(s.rollout_batch * (p + s.group * r), s.partner_batch * (p + r)) for p, r in zip(P, R))
    cache = columns * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * w
    # A layer at work: per token the MLP's three inner tensors and some ten of the hidden size; likewise per patch.
    layer = w * max(3 * c.intermediate_size + 10 * c.hidden_size,
                    (2 * v.intermediate_size + 10 * v.hidden_size) * v.spatial_merge_size**2)
    # The update: float32 gradients, every layer's input, one layer recomputed with its gradients, three chunks of logits.
    L = P[1] + s.group * R[1]
    inputs = (L * c.hidden_size * c.num_hidden_layers + (1 + MAX_CROPS) * patches * v.hidden_size * v.depth) * w
    update = 4 * n + inputs + 2 * L * layer + 3 * 512 * c.vocab_size * 4
    return {"sampling": (static + cache + max(PREFILL, P[1]) * layer) / 2**30, "updating": (static + update) / 2**30}


# ---------------------------------------------------------------------------------------------
# What a run leaves on disk, and the way back from it. Nothing here knows the algorithm.
#
# A checkpoint is a folder RUN/checkpoints/step-N, written beside the older ones, flushed, then renamed; two are kept:
#     model.safetensors      the float32 masters. With config.json, tokenizer etc. beside it the folder is an ordinary model
#                            folder too, for from_pretrained or --model
#     optimizer.safetensors  Adam's moments and step counts     } neither after a phase's last step: the next phase
#     frozen.safetensors     the frozen copy, compute type      } starts with moments and a copy of its own
#     state.json             step, iteration, phase, settings, the boxes of the frozen Perceiver, accuracies so far, and all
#                            random generators (the loop draws from none of them: see `draw` and the sampler's seed)
#     manifest.json          size and checksum of every file above
# There is no pickle anywhere: tensors are safetensors, the rest is JSON.


@contextlib.contextmanager
def replacing(path):
    """Yields path.new for a file or a folder; flushes it and renames it to `path`, which so appears as a whole or not at all."""
    new = path.with_name(path.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        yield new
        for part in (new, *new.rglob("*"), path.parent) if os.name == "posix" else ():  # Windows cannot flush a folder
            handle = os.open(part, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        shutil.rmtree(path, ignore_errors=True)
        new.replace(path)
    except (OSError, SafetensorError):
        shutil.rmtree(new) if new.is_dir() else new.unlink(missing_ok=True)
        raise


def write_text(path, text):
    with replacing(path) as new:
        new.write_text(text)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_json(path, row):
    """Add one line. What is not finite becomes null, or other JSON readers would stumble."""
    row = {key: None if isinstance(value, float) and value - value != 0 else value for key, value in row.items()}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf", ".h5", ".msgpack", ".onnx")


def fill_model_folder(folder, weights, source):
    """An ordinary model folder: weights {name: tensor}, tied ones once, and every other file of the folder `source`."""
    for file in Path(source).rglob("*"):
        place = file.relative_to(source)
        ours = place.name in ("state.json", "manifest.json")  # of a checkpoint that became another run's --model
        if file.is_file() and not file.name.endswith(WEIGHT_FILES) and not place.parts[0].startswith(".") and not ours:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / place)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_model(policy, source, folder):
    """bf16 weights and every other file of the original folder: from_pretrained and vLLM can load it."""
    with replacing(folder) as new:
        new.mkdir()
        fill_model_folder(new, {name: p.detach().to(torch.bfloat16) for name, p in policy.named_parameters()}, source)


def save_checkpoint(run, source, tensors, state):
    """Write RUN/checkpoints/step-N and keep the newest two. source: the model folder whose other files come along.
    tensors: {file: {name: tensor}}, the masters as "model". state: JSON, with the step. Raises OSError, SafetensorError."""
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    with replacing(folder / f"step-{state['step']:05d}") as new:
        new.mkdir()
        fill_model_folder(new, tensors.pop("model"), source)
        for name, group in tensors.items():
            save_file(group, new / f"{name}.safetensors")
        (new / "state.json").write_text(json.dumps(state))
        # Written last: a folder is a checkpoint if every file is what the manifest says.
        manifest = {str(path.relative_to(new)): fingerprint(path) for path in new.rglob("*") if path.is_file()}
        (new / "manifest.json").write_text(json.dumps(manifest))
    keep = [path for path in sorted(folder.glob("step-*[0-9]")) if int(path.name[5:]) <= state["step"]][-2:]
    for path in set(folder.glob("step-*")) - set(keep):  # older, damaged and passed over, or half of a killed write
        shutil.rmtree(path, ignore_errors=True)


def newest_checkpoint(run):
    """The newest undamaged checkpoint -> (its folder, its state), or (None, {}). Warns of those it passes over."""
    for path in sorted((run / "checkpoints").glob("step-*[0-9]"), reverse=True):
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            damaged = [name for name, known in manifest.items() if fingerprint(path / name) != known]
            if not damaged:
                return path, json.loads((path / "state.json").read_text())
        except (OSError, ValueError, AttributeError) as error:
            damaged = [str(error)]
        print(f"warning: {path} is incomplete or damaged ({', '.join(damaged)}), so the one before it is taken", file=sys.stderr)
    return None, {}


def fingerprint(path):
    """[bytes, CRC-32] of a file: shows that it was cut off or damaged."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return [os.path.getsize(path), crc]


def new_run_folder(s):
    """Make the run folder and write config.json. Raises InputError rather than mix two runs."""
    if s.out:
        run = Path(s.out)
    else:
        run = next(path for i in range(1, sys.maxsize) if not (path := Path(f"runs/{Path(s.model).name}-{i}")).exists())
    try:
        if run.exists() and (not run.is_dir() or any(path.suffix != ".new" for path in run.iterdir())):
            raise InputError(f"--out {run} already exists and is not empty: choose another folder, or go on with --resume {run}")
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "config.json", dataclasses.asdict(s) | {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__}})
    except OSError as error:
        raise InputError(f"cannot write to the run folder {run}: {error.strerror}; choose another with --out") from error
    return run


# What --resume may change. config.json notes when; rollout_batch changes the draws, not what they are drawn from.
MAY_CHANGE = {"lr", "weight_decay", "max_grad_norm", "iterations", "rollout_batch", "partner_batch", "eval_every", "save_every", "sample_every", "images"}
FIXED = {  # why it may not change any other setting, by the setting's group
    "what": "a run is one model on one set of questions",
    "schedule": "the phases and the order of the questions follow from it",
    "algorithm": "the steps before and after would belong to two algorithms",
    "limits": "it decides what the model sees and may write, so rewards before and after would not compare"}


def settings_of(run, kind, flags):
    """The settings (dataclass `kind`) of a run, changed by those flags that --resume may change. Raises InputError."""
    try:
        config = json.loads((Path(run) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--resume {run}: there is no config.json that can be read, so nothing to continue; start the run "
                         f"with its own command") from error
    values = {field.name: config.get(field.name, field.default) for field in dataclasses.fields(kind)} | {"out": str(run)}
    for field in dataclasses.fields(kind):
        old, new = values[field.name], flags.get(field.name, values[field.name])
        if new != old and field.name not in MAY_CHANGE:
            raise InputError(f"--{field.name.replace('_', '-')} cannot change from {old} to {new} on --resume: "
                             f"{FIXED[field.metadata['group']]}; start a new run")
    return kind(**values | flags)


def data_key(examples):
    """A number that changes with the questions, their answers or their order."""
    return zlib.crc32(repr([(e.id, e.question, e.answer) for e in examples]).encode())


def go_on(run, s, examples):
    """Cut the log back to the newest undamaged checkpoint -> (its folder, its state), or (None, {}) to start over.
    Changed settings are noted in config.json. Raises InputError if the questions are no longer those of the start."""
    last, state = newest_checkpoint(run)
    step, log = state.get("step", 0), run / "metrics.jsonl"
    if last and state["data"] != data_key(examples):
        raise InputError(f"--data {s.data} no longer holds the questions that {run} began with: put them back, or start a new run")
    config, new = json.loads((run / "config.json").read_text()), dataclasses.asdict(s)
    changed = {name: [config.get(name), value] for name, value in new.items() if config.get(name) != value}
    try:
        write_json(run / "config.json", config | new | {"resumed": [*config.get("resumed", []), {"step": step, "changed": changed}]})
        write_text(log, "".join(log.read_text().splitlines(keepends=True)[:step]) if log.exists() else "")  # one line a step
    except OSError as error:
        raise InputError(f"cannot write to {run}: {error.strerror}; it is as it was") from error
    if last:
        set_random_state(state["random"])
    print(f"resuming {run} after step {step}" if last else f"{run} has no checkpoint yet: starting over")
    return last, state


def finish(run, step):
    """Note in config.json that the run has written its final/ after this step."""
    write_json(run / "config.json", json.loads((run / "config.json").read_text()) | {"finished": step})


def finished(run):
    """The step after which the run was finished, or None."""
    return json.loads((Path(run) / "config.json").read_text()).get("finished")


def random_state():
    """Python's generator, torch's, and one of each GPU, as JSON."""
    return [random.getstate(), torch.get_rng_state().tolist(), [state.tolist() for state in torch.cuda.get_rng_state_all()]]


def set_random_state(state):
    (version, words, gauss), cpu, cuda = state
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(torch.ByteTensor(cpu))
    for device, values in enumerate(cuda[:torch.cuda.device_count()]):
        torch.cuda.set_rng_state(torch.ByteTensor(values), device)


def disk_use(run, policy):
    """One sentence on what checkpoints will take."""
    size = sum(p.numel() * (12 + p.element_size()) for p in policy.parameters()) / 2**30  # masters, two moments, frozen copy
    return (f"checkpoints: up to {size:.2g} GiB each, the newest two are kept (a third while it is written); "
            f"{shutil.disk_usage(run).free / 2**30:.1f} GiB are free")


@contextlib.contextmanager
def kept(run, save):
    """A loop that nothing ends unsaved. Yields a list that the first Ctrl-C or SIGTERM (a second one acts at once) puts its
    number into: the loop then saves and exits. An InputError saves too. Either way the user is told how to continue."""
    def ask(number, frame):
        asked.append(number)
        signal.signal(number, before[number])
        os.write(2, b"\nfinishing this step, then saving; once more stops at once\n")

    asked, how = [], f"continue with: python p2r_min.py --resume {shlex.quote(str(run))}"
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            yield asked
        except InputError as error:
            save()
            raise InputError(f"{error}; saved, {how}") from error
        except SystemExit:
            print(f"stopped and saved; {how}")
            raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write to {run}: {reason}; what was there is whole, so mend this and {how}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
