"""Memory at full size without a GPU and without weights: the peak of the real code on fake tensors,
against p2r_min.estimate_memory; and what lives on in the sampler from one step to the next.

A fake tensor has a shape, a type and a storage with a size, but no values. So the 2B model can be
built, prompted, sampled and trained here in seconds, and every storage can be counted. Two kernels
are played by others, because the CPU's stand-ins for them allocate what the GPU's do not:

    F.rms_norm             one kernel on a GPU, several on a CPU: played by layer_norm
    causal_lower_right     flash attention on a GPU, a mask on a CPU: played by no mask at all

What is not seen: the driver, fragmentation, and workspaces inside of kernels.
"""

import copy
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3VLForConditionalGeneration

import grpo
import hours
import rollout
from bench import full_config
from conftest import prompts_of
from p2r_min import Settings, check_memory, estimate_memory
from rollout import Completion, Group, InputError, Prompt

GIB = 2**30


def tensors_of(tree):
    """The tensors in a tensor, or in lists and dicts of them: called twice an operation, so quick."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    found = []
    for branch in tree:
        found += tensors_of(branch)
    return found


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak.

    Under a FakeTensorMode it also decides what is fake: floating-point tensors are. Those of
    integers stay real, because the model's code asks for their values (the images' grids, the
    lengths of responses, which tokens are an image's).
    """

    def __init__(self):
        super().__init__()
        self.sizes = {}            # storage -> bytes
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = self.call(func, args, kwargs or {})

        # A storage is counted when it is seen first, until Python sees it go.
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.bytes)
        return result

    def free(self, storage):
        self.bytes -= self.sizes.pop(storage, 0)

    def forget(self, tensors):
        """Count these no longer: they are in the computer's memory, not in the GPU's."""
        for tensor in tensors:
            self.free(tensor.untyped_storage()._cdata)

    def call(self, func, args, kwargs):
        name = func._schema.name.removeprefix("aten::")
        inputs = tensors_of((args, kwargs))
        fake = [tensor for tensor in inputs if isinstance(tensor, FakeTensor)]

        # A loss, a norm, or "is it finite?": all is well.
        if fake and name == "_local_scalar_dense":
            return True if inputs[0].dtype == torch.bool else 0.5

        # How many values a mask picks is known from the mask: as on a GPU, it becomes indices.
        if fake and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            args = (args[0], self.indices(args[1]), *args[2:])

        # What is made of nothing, or of real tensors only, is real, unless it is a weight.
        made_real = name in ("arange", "linspace", "scalar_tensor")
        dtype = kwargs.get("dtype")
        if dtype is not None and not dtype.is_floating_point:
            made_real = True
        if fake or (not inputs and not made_real):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def indices(self, places):
        found = []
        with unset_fake_temporarily():
            for place in places:
                if place is not None and place.dtype == torch.bool:
                    found += place.nonzero().unbind(1)
                else:
                    found.append(place)
        return found


@pytest.fixture
def card(monkeypatch):
    """A GPU of fake tensors; yields its Live."""
    monkeypatch.setattr(F, "rms_norm", lambda x, size, weight, eps: F.layer_norm(x, size, weight))
    monkeypatch.setattr(rollout, "causal_lower_right", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda _: torch.ones((), dtype=torch.bool))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        yield live


def model_2b(layers=None):
    """Qwen3-VL-2B, or the first few layers of both its towers: all is as wide, and quicker."""
    config = full_config()
    if layers:
        config.text_config.num_hidden_layers = config.vision_config.depth = layers
        config.vision_config.deepstack_visual_indexes = [0, 1, 2]
    return rollout.quicken(Qwen3VLForConditionalGeneration._from_config(
        config, dtype=torch.bfloat16,
        attn_implementation={"text_config": "group", "vision_config": "sdpa"}))


def longest_prompt(config, images, max_pixels, text=300):
    """A Prompt of `images` images, each at the pixel budget, then `text` text tokens."""
    patches = max_pixels // 16**2
    visual = patches // 4
    with unset_fake_temporarily():
        grids = torch.tensor([[1, 32, patches // 32]] * images)
        ids = torch.full((images * visual + text,), 100)
        ids[10:10 + images * visual] = config.image_token_id
        positions = torch.arange(len(ids)).expand(3, -1)
    pixels = torch.empty(images * patches, 3 * 2 * 16**2, dtype=torch.bfloat16)
    return Prompt(ids, positions, pixels, grids)


def estimate(model, s):
    return estimate_memory(model.config, model.num_parameters(), 2, s)


def players(card, s, layers=None):
    """The 2B model as its training has it: (policy, frozen copy, optimizer with moments)."""
    policy = model_2b(layers)
    if s.checkpointing:
        grpo.checkpoint_activations(policy)
    frozen = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer = grpo.MasterAdamW(policy, 1e-6)

    # Adam makes its moments at the first step. With --offload none of this is on the card.
    optimizer.sums = gradients(policy)
    optimizer.step(1.0)
    if s.offload:
        card.forget(tensors_of(list(grpo.optimizer_state(optimizer).values())))
    return policy, frozen, optimizer


def gradients(policy):
    return [torch.zeros_like(p, dtype=torch.float32) for p in policy.parameters()]


def update_peak(card, s, policy, frozen, optimizer):
    """Peak GiB of the update by a group of the longest responses."""
    prompt = longest_prompt(policy.config, 4, s.max_pixels)
    with unset_fake_temporarily():
        ids = [torch.full((s.reason_tokens,), 100) for _ in range(s.group)]
    group = Group(prompt, [Completion(i, torch.zeros(len(i)), True, "") for i in ids],
                  advantages=torch.ones(s.group))

    # The sum of the gradients of earlier groups is there, as for all groups but the first.
    optimizer.sums = gradients(policy)
    card.peak = card.bytes
    grpo.update_batch(policy, frozen, optimizer, [group], banned=torch.tensor([151655]),
                      kl=0.01, clip=0.2, max_norm=1.0)
    return card.peak / GIB


# README's flags for a card of 24 GB.
FOR_24_GB = dict(offload=True, max_pixels=524_288, perceive_tokens=512, reason_tokens=1024,
                 rollout_batch=4, partner_batch=16)


# (The last has the second's pixels, but no --offload and longer responses: three layers show that.)
@pytest.mark.parametrize("flags, layers", [
    ({}, None), (FOR_24_GB, None), (dict(max_pixels=524_288), 3)])
def test_the_update_peaks_just_below_the_estimate(card, flags, layers):
    s = Settings(**flags)
    policy, *others = players(card, s, layers)
    peak, most = update_peak(card, s, policy, *others), estimate(policy, s)["updating"]
    print(f"updating: {peak:.2f} GiB, estimate {most:.2f}")
    assert 0.85 * most < peak < most


@pytest.mark.parametrize("mistake", ["none", "activations", "moments", "logits"])
def test_an_update_that_wastes_memory_exceeds_the_estimate(card, monkeypatch, mistake):
    """So the test above can fail. Three layers, which are enough for it and quick."""
    s = Settings()
    keeps = Settings(checkpointing=mistake != "activations")
    policy, frozen, optimizer = players(card, keeps, layers=3)
    if mistake == "moments":
        for state in optimizer.adam.state.values():
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind] = state[kind].double()
    if mistake == "logits":
        monkeypatch.setattr(grpo.response_logprobs, "__defaults__", (10**9,))

    peak, most = update_peak(card, s, policy, frozen, optimizer), estimate(policy, s)["updating"]
    print(f"{mistake} wasted: {peak:.2f} GiB, estimate {most:.2f}")
    assert (peak > most) == (mistake != "none")


def sampling_peak(card, s, model, rows, G):
    """Peak GiB beside one model: prompts are read, and all responses' last tokens are drawn."""
    prompt = longest_prompt(model.config, 4, s.max_pixels)
    table = rollout.Table()
    active = [rollout.InProgress(order, prompt, G) for order in range(rows)]
    at_once = max(1, rollout.PREFILL // len(prompt.ids))
    before = card.peak = card.bytes
    columns = len(prompt.ids) + G * s.reason_tokens
    with torch.no_grad():
        # The first prompt makes the table; then come some that are a little longer, and it grows.
        for needed, newcomers in ((columns - 50, active[:1]), (columns, active[:at_once])):
            table.reserve(rows, needed)
            rollout.prefill(model, table, 0, newcomers)
        for row in active:
            row.newest, row.t = [100] * G, s.reason_tokens - 1
        logits = rollout.decode_step(model, table, active)
        rollout.draw(logits, torch.tensor([151655]), False, None)
    return (card.peak - before) / GIB


@pytest.mark.parametrize("flags", [{}, FOR_24_GB])
def test_sampling_peaks_just_below_the_estimate(card, flags):
    s = Settings(**flags)
    model = model_2b().eval()

    # What sampling finds there: this and the frozen copy; in float32 masters and two moments.
    static = card.bytes / GIB * 2
    if not s.offload:
        static *= 4

    # Both tables with the longest prompts: of the role that is trained, and of its partner.
    trained = sampling_peak(card, s, model, s.rollout_batch, s.group)
    partner = sampling_peak(card, s, model, s.partner_batch, 1)
    peak, most = static + max(trained, partner), estimate(model, s)["sampling"]
    print(f"sampling: {peak:.2f} GiB, estimate {most:.2f}")
    assert 0.85 * most < peak < most


def test_offload_leaves_the_two_copies_and_the_sum_of_gradients(card):
    policy, frozen, optimizer = players(card, Settings(offload=True))
    assert card.bytes / GIB == pytest.approx(7.9, abs=0.1)
    optimizer.sums = gradients(policy)
    assert card.bytes / GIB == pytest.approx(15.8, abs=0.1)


def test_small_budgets_fit_a_card_of_24_gb_and_48_partner_rows_one_of_80_gb():
    """What README says of --offload. (The cards have about 79 and 23.6 GiB.)"""
    # Weights on the meta device: only their number is asked for.
    with torch.device("meta"):
        model = model_2b()
    assert max(estimate(model, Settings(**FOR_24_GB)).values()) < 22
    assert max(estimate(model, Settings(offload=True, partner_batch=48)).values()) < 75


def test_a_run_that_cannot_fit_the_card_is_refused_in_one_sentence(monkeypatch, capsys):
    # As much of a model as is asked for its size, on cards of any size.
    class OnCard:
        config, dtype, device = full_config(), torch.bfloat16, torch.device("cuda")

        def num_parameters(self, only_trainable=False):
            return 2_127_532_032

        def get_memory_footprint(self):
            return 4 * GIB

    def card_of(gib, judge=0):
        # The policy has 4 GiB of it, and the allocator one more in reserve.
        for name, of_it in (("memory_allocated", 4 + judge), ("memory_reserved", 5 + judge)):
            monkeypatch.setattr(torch.cuda, name, lambda _, of_it=of_it: of_it * GIB)
        left = (gib - 5 - judge) * GIB
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (left, 80 * GIB))

    card_of(79)
    check_memory(OnCard(), Settings())
    assert re.fullmatch(r"memory, computed: 70\.\d GiB while sampling, 49\.3 GiB while updating; "
                        r"the GPU has 79\.0 for it\n", capsys.readouterr().out)

    card_of(79, judge=14)
    with pytest.raises(InputError, match="65.0 for it: lower --rollout-batch"):
        check_memory(OnCard(), Settings())

    card_of(23.6)
    check_memory(OnCard(), Settings(**FOR_24_GB))
    assert "34 GiB of the computer's memory" in capsys.readouterr().out
    with pytest.raises(InputError, match="23.6 for it: lower --rollout-batch .*, or add --offload$"):
        check_memory(OnCard(), Settings())
    card_of(19)
    with pytest.raises(InputError, match="19.0 for it: lower --max-pixels, --group or --reason-tokens$"):
        check_memory(OnCard(), Settings(**FOR_24_GB))


# --- the table


class Steps:
    """Wraps rollout.decode_step; notes what is alive before each step, and what the step adds to it."""

    def __init__(self, live, leak):
        self.live, self.leak, self.decode = live, leak, rollout.decode_step
        self.before, self.added, self.kept = [], [], []

    def __call__(self, model, table, active):
        live = self.live
        self.before.append(dict(live.sizes))
        live.peak = live.bytes
        logits = self.decode(model, table, active)
        self.added.append(live.peak - sum(self.before[-1].values()))
        if self.leak:
            self.kept.append(logits.clone())
        return logits


@pytest.mark.parametrize("leak", [False, True])
def test_nothing_lives_on_or_grows_from_one_step_to_the_next(tiny, monkeypatch, leak):
    """Real tensors of a tiny model: 100 tokens each, of two groups that move in together."""
    model, codec = tiny
    codec.stop_ids = torch.tensor([], dtype=torch.long)
    with Live() as live:
        steps = Steps(live, leak)
        monkeypatch.setattr(rollout, "decode_step", steps)
        groups = list(rollout.sample(model, codec, prompts_of(codec)[:2], group=3, max_tokens=100,
                                     rows=2))
    assert [len(c.ids) for group in groups for c in group.completions] == [100] * 6

    # Before all steps but the first, the same storages: table, logits and no more.
    alive = {tuple(sorted(sizes.values())) for sizes in steps.before[1:]}
    assert (len(alive) == 1) != leak

    # The work of a step grows only by its masks: 3 x 2 responses that may see up to 300 columns
    # more, at 64 bytes or less for each.
    if not leak:
        assert max(steps.added) - min(steps.added) < 6 * 300 * 64


# --- tests/hours.py


def test_the_hours_follow_from_the_numbers_that_are_given(capsys):
    """Half of the card's speed takes longer, but not twice as long: decoding stays as it was."""
    totals = []
    for flags in ([], ["--mfu", str(hours.Numbers.mfu / 2)]):
        hours.main(flags)
        defaults = capsys.readouterr().out.splitlines()[4]
        totals.append(float(defaults.split()[4]))
    assert 1.2 * totals[0] < totals[1] < 2 * totals[0]


def test_decode_steps_of_equal_lengths_are_waves():
    """Seven prompts of 10 tokens on three rows take three waves."""
    assert hours.decode_steps(7, 3, 2, mean=10, sigma=0, limit=99) == pytest.approx((30, 10))


def test_what_is_not_trained_has_no_second_copy_no_masters_and_no_gradients():
    """LoRA: 4 % of the weights trained. Two thirds of what is static, and nearly all gradients, go."""
    config, all_of_them = full_config(), 2_127_532_032
    full = estimate_memory(config, all_of_them, 2, Settings())
    part = estimate_memory(config, all_of_them, 2, Settings(), trained=all_of_them // 25)
    saved = all_of_them * 24 / 25 / GIB
    assert full["sampling"] - part["sampling"] == pytest.approx(saved * (2 + 12), abs=0.01)
    assert full["updating"] - part["updating"] == pytest.approx(saved * (2 + 12 + 4) + 0.58, abs=0.01)
