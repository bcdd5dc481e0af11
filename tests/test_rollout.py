"""rollout.py against the library: its processor, its image sizes, its layers, its generate()."""

import itertools
import json
import shutil
from types import SimpleNamespace

import bench
import numpy
import pytest
import torch
from conftest import BOXES, noise, prompts_of
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen3_vl import modeling_qwen3_vl as library

import grpo
import rollout
from crop import Box, Parsed, gather
from rollout import InputError, load, sample


class ImageOnlyProcessor(Qwen3VLProcessor):
    """The library's own processor; only its video part, which needs torchvision, is left out."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def greedy(model, codec, prompts, max_tokens=12, rows=8, **how):
    return list(sample(model, codec, prompts, greedy=True, max_tokens=max_tokens, rows=rows, **how))


def replayed(model, codec, prompt, ids):
    """Log-probs (R + 1, V) of what follows `prompt`, from the library's forward of one sequence."""
    whole = torch.cat([prompt.ids, ids])[None]
    with torch.no_grad():
        logits = model(input_ids=whole, attention_mask=torch.ones_like(whole),
                       pixel_values=prompt.pixels, image_grid_thw=prompt.grids,
                       mm_token_type_ids=(whole == codec.image_token_id).int()).logits
    logits = logits[0, len(prompt.ids) - 1:]
    logits[:, codec.banned] = float("-inf")
    return logits.log_softmax(-1)


def check_replay(model, codec, prompt, completion):
    """The completion's log-probs are those of a forward of its own."""
    logps = replayed(model, codec, prompt, completion.ids)[:-1].gather(1, completion.ids[:, None])
    assert torch.allclose(logps[:, 0], completion.logps, atol=1e-5)


@pytest.fixture
def forwards(monkeypatch):
    """The shape of the input ids of every forward of a model, prefill and decode."""
    shapes, forward = [], library.Qwen3VLModel.forward

    def spied(self, *args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(library.Qwen3VLModel, "forward", spied)
    return shapes


# --- prompts


def test_a_prompt_is_the_chat_format_written_out(tiny):
    """The exact string of the Qwen format, with one image_pad for every visual token."""
    _, codec = tiny
    prompt = rollout.perceiver_prompt(codec, noise(512, 512), "Where is it?")
    # 64 x 64 pixels, 16 x 16 pixels a token
    vision = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"
    text = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            + vision + rollout.PERCEIVER.format(question="Where is it?")
            + "<|im_end|>\n<|im_start|>assistant\n")
    assert codec.tokenizer.decode(prompt.ids) == text
    assert prompt.ids.tolist() == codec.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_prompt_equals_what_the_librarys_processor_makes(tiny, count):
    model, codec = tiny
    image, boxes = noise(640, 300), BOXES[count]
    prompt = rollout.reasoner_prompt(codec, image, boxes, "Which way?", "na")
    annotated, crops = gather(image, boxes)
    text = rollout.REASONER.format(regions=rollout.REGIONS["both"] if boxes else "",
                                   question="Which way?", form=rollout.FORMS["na"])
    codec.image_processor.size = codec.size
    processor = ImageOnlyProcessor(codec.image_processor, codec.tokenizer, None,
                                   chat_template=codec.tokenizer.chat_template)
    images = [{"type": "image", "image": image} for image in (annotated, *crops)]
    messages = [{"role": "system",
                 "content": [{"type": "text", "text": "You are a helpful assistant."}]},
                {"role": "user", "content": [*images, {"type": "text", "text": text}]}]
    expected = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True,
                                             return_dict=True, return_tensors="pt")
    assert len(crops) == count and len(prompt.grids) == count + 1
    assert torch.equal(prompt.ids, expected["input_ids"][0])
    assert torch.equal(prompt.pixels, expected["pixel_values"])
    assert torch.equal(prompt.grids, expected["image_grid_thw"])
    positions, _ = model.model.get_rope_index(
        expected["input_ids"], expected["mm_token_type_ids"], expected["image_grid_thw"])
    assert torch.equal(prompt.positions, positions[:, 0])


@pytest.mark.parametrize("evidence, sizes", [
    ("both", [(300, 200), (120, 100)]), ("annotated", [(300, 200)]), ("crops", [(120, 100)]),
    ("none", [(300, 200)])])
def test_the_evidence_that_the_reasoner_is_given(tiny, monkeypatch, evidence, sizes):
    """A box of 60 x 60 px in an image of 300 x 200, padded by 30 and 20: images and words."""
    codec, seen = tiny[1], []
    monkeypatch.setattr(codec, "encode", lambda text, images: seen.append((text, images)))
    image = noise(300, 200)
    box = Box(100, 200, 300, 500, "a")
    rollout.reasoner_prompt(codec, image, [box], "Which way?", "na", evidence)
    rollout.reasoner_prompt(codec, image, [], "Which way?", "na", evidence)
    (text, images), (plain, alone) = seen
    assert [i.size for i in images] == sizes
    assert alone == [image] and "regions" not in plain      # without boxes all are the plain image
    drawn = evidence in ("both", "annotated")
    assert ("Coloured boxes" in text) == drawn
    assert ("regions" in text) == (evidence != "none")
    assert (images[0].getpixel((30, 40)) == (255, 0, 0)) == drawn


@pytest.mark.parametrize("size", [(3000, 2000), (200, 1800), (40, 30), (512, 512)])
@pytest.mark.parametrize("budget", [256, 4096, 60_000])
def test_visual_tokens_are_what_the_library_counts_and_the_budget_holds(folder, size, budget):
    _, codec = load(folder, budget)
    prompt = rollout.perceiver_prompt(codec, noise(*size), "Where?")
    tokens = (prompt.ids == codec.image_token_id).sum()
    patches = codec.image_processor.get_number_of_image_patches(
        size[1], size[0], {"min_pixels": min(4096, budget), "max_pixels": budget})
    assert tokens == patches // 4
    # The library may overshoot for slivers and tiny images.
    if size[0] * size[1] > budget and max(size) < 2 * min(size):
        assert patches * 8 * 8 <= budget


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (21, 90), (1000, 400)])
def test_a_scaled_image_has_the_pixels_that_the_model_sees(folder, size):
    """Patches of the scaled image, which needs no more resizing, are those of the image."""
    _, codec = load(folder, 8192)
    image = noise(*size)
    seen = codec.image_processor(images=[image], size=codec.size, return_tensors="pt")
    ours = codec.image_processor(images=[codec.scaled(image)], do_resize=False, return_tensors="pt")
    assert torch.equal(ours["pixel_values"], seen["pixel_values"])
    assert torch.equal(ours["image_grid_thw"], seen["image_grid_thw"])


def test_a_crop_of_a_small_image_is_scaled_up_to_the_checkpoints_least_size(folder, tmp_path):
    """Qwen3-VL's own settings: patches of 16, merged 2 x 2, shortest_edge 65,536. By hand: the crop
    below is 256 x 192 px, 1.155 times that is 295.6 x 221.7, rounded up to 320 x 224: 70 tokens."""
    shutil.copytree(folder, tmp_path / "m")
    file = tmp_path / "m" / "preprocessor_config.json"
    size = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_size": 16, "size": size}))
    model, _ = load(folder, 4096)
    model.config.vision_config.patch_size = 16
    codec = rollout.Codec(tmp_path / "m", model, 2_097_152)
    _, (crop,) = gather(noise(640, 480), [Box(300, 300, 500, 500)])
    assert crop.size == (256, 192)
    prompt = codec.encode("Which way?", [crop])
    assert (prompt.ids == codec.image_token_id).sum() == 70
    assert rollout.Codec(tmp_path / "m", model, 4096).size["shortest_edge"] == 4096


def test_a_budget_below_one_visual_token_is_refused(folder):
    with pytest.raises(InputError, match="16 x 16 pixels"):
        load(folder, max_pixels=255)


def test_a_question_that_contains_the_image_token_is_refused(tiny):
    with pytest.raises(InputError, match="image_pad"):
        rollout.perceiver_prompt(tiny[1], noise(64, 64), "what is <|image_pad|>?")


def question(name, text, form="na"):
    """An example without an image: whoever opens it fails."""
    return SimpleNamespace(id=name, question=text, answer_form=form)


def test_only_questions_whose_text_fits_are_kept(tiny, capsys):
    """The longer of the two prompts' texts, written out here, has exactly as many tokens as fit."""
    _, codec = tiny
    texts = {"short": "Which way?", "long": "Which way? " * 300, "image": "What is <|image_pad|>?"}
    short, long, image = (question(name, text) for name, text in texts.items())
    asked = rollout.REASONER.format(regions=rollout.REGIONS["both"], question="Which way?",
                                    form=rollout.FORMS["na"])
    vision = "<|vision_start|><|image_pad|><|vision_end|>" * 4
    text = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"{vision}{asked}<|im_end|>\n<|im_start|>assistant\n")
    tokens = len(codec.tokenizer(text, add_special_tokens=False)["input_ids"])
    room = 4096 - 4 * 16 - tokens                         # the tiny model has 4096 positions
    assert rollout.fitting(codec, [short], room) == [short]
    with pytest.raises(InputError, match=rf"1 of 1 .* short \({tokens} .*, {tokens - 1} allowed"):
        rollout.fitting(codec, [short], room + 1, skip_bad=True)
    with pytest.raises(InputError, match=r"2 of 3 .* long .*512 allowed.* image \(contains"):
        rollout.fitting(codec, [short, long, image], 10)
    assert rollout.fitting(codec, [short, long, image], 10, skip_bad=True) == [short]
    assert capsys.readouterr().out.startswith("skipped: 2 of 3 questions")


# --- loading


def test_a_folder_of_another_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        load(tmp_path, 4096)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="qwen2"):
        load(tmp_path, 4096)


@pytest.mark.parametrize("name, content", [
    ("config.json", "{"), ("config.json", '{"model_type": "nonsense"}'),
    ("model.safetensors", "version https://git-lfs"), ("model.safetensors", None),
    ("preprocessor_config.json", None)])
def test_a_broken_model_folder_is_one_sentence(folder, tmp_path, name, content):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    if content is not None:
        (tmp_path / "m" / name).write_text(content)
    with pytest.raises(InputError, match="cannot be loaded") as error:
        load(tmp_path / "m", 4096)
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_or_of_another_shape_are_not_made_up(folder, tmp_path):
    """The library would fill them with random numbers, and say so only in a log that is switched off."""
    model = shutil.copytree(folder, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file({key: value for key, value in weights.items() if key != name}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"lacks 1 of the model's weights, such as .*{name}"):
        load(model, 4096)
    save_file(weights | {name: weights[name][:-1].clone()}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="cannot be loaded"):
        load(model, 4096)


def test_no_room_for_any_text_is_no_fault_of_the_questions(tiny):
    with pytest.raises(InputError, match="no room for text .* lower --max-pixels"):
        rollout.fitting(tiny[1], [], tiny[1].max_positions)


def test_cudnn_attention_is_off_once_a_model_is_loaded(folder):
    torch.backends.cuda.enable_cudnn_sdp(True)
    load(folder, 4096)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_quick_layers_equal_the_librarys(folder, tiny):
    """Values, gradients and parameter names; in bf16 the norm differs by a rounding at most."""
    quick = tiny[0]
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    names = [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in quick.named_parameters()] == names
    pairs = [(a, b) for a, b in zip(quick.modules(), theirs.modules()) if type(a) is not type(b)]
    assert {type(b) for _, b in pairs} == {library.Qwen3VLTextRMSNorm,
                                           library.Qwen3VLVisionPatchEmbed}
    torch.manual_seed(0)
    for ours, their in pairs:
        shape = (30, 384) if hasattr(their, "proj") else (2, 5, len(their.weight))
        x = 3 * torch.randn(shape)
        y = x.clone()
        if not hasattr(their, "proj"):
            torch.nn.init.normal_(their.weight, 1.0, 0.2)
        ours.load_state_dict(their.state_dict())
        outputs = ours(x.requires_grad_()), their(y.requires_grad_())
        torch.testing.assert_close(*outputs, atol=3e-5, rtol=1e-4)
        weight = torch.randn_like(outputs[0])
        for output in outputs:
            (output * weight).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-4)
        for a, b in zip(ours.parameters(), their.parameters()):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
        if not hasattr(their, "proj"):
            x = torch.randn(shape, dtype=torch.bfloat16)
            a, b = ours.bfloat16()(x), their.bfloat16()(x)
            torch.testing.assert_close(a, b, atol=0.0, rtol=2**-7)


# --- sampling


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("penalty", [1.0, 1.05, 1.3])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_greedy_equals_the_librarys_generate(tiny, penalty, rows):
    """One prompt at a time there. Here fewer rows than prompts, or more; 0, 1 and 3 crops."""
    model, codec = tiny
    prompts = prompts_of(codec)
    prompts += prompts_of(codec, ((160, 400), (512, 512), (300, 200)))
    codec.stop_ids = torch.arange(0, model.config.text_config.vocab_size, 5)
    model.generation_config.eos_token_id = codec.stop_ids.tolist()
    model.generation_config.pad_token_id = 0
    found = greedy(model, codec, prompts, rows=rows, penalty=penalty)
    assert len({len(group.completions[0].ids) for group in found}) > 1
    for group, prompt in zip(found, prompts, strict=True):
        theirs = model.generate(
            input_ids=prompt.ids[None], attention_mask=torch.ones_like(prompt.ids[None]),
            pixel_values=prompt.pixels, image_grid_thw=prompt.grids,
            mm_token_type_ids=(prompt.ids == codec.image_token_id).int()[None],
            do_sample=False, max_new_tokens=12, suppress_tokens=codec.banned.tolist(),
            repetition_penalty=penalty)
        assert group.prompt is prompt
        assert group.completions[0].ids.tolist() == theirs[0, len(prompt.ids):].tolist()


def test_a_repetition_penalty_changes_what_is_said(tiny):
    model, codec = tiny
    plain = greedy(model, codec, prompts_of(codec))
    penalised = greedy(model, codec, prompts_of(codec), penalty=1.3)
    texts = [[group.completions[0].ids.tolist() for group in run] for run in (plain, penalised)]
    assert texts[0] != texts[1]


def test_a_table_of_rows_gives_what_each_prompt_gives_alone(tiny):
    model, codec = tiny
    prompts = prompts_of(codec)
    assert len({len(p.ids) for p in prompts}) == 3
    together = greedy(model, codec, prompts)
    for prompt, group in zip(prompts, together):
        alone, = greedy(model, codec, [prompt])
        a, b = group.completions[0], alone.completions[0]
        assert a.ids.tolist() == b.ids.tolist()
        assert torch.allclose(a.logps, b.logps, atol=1e-5)


def test_samples_follow_the_enumerated_distribution(tiny):
    """Three tokens are left, one of which ends a response; so there are 15 responses of at most
    three tokens, and the library's forward gives their probabilities. Chi-squared at p = 1e-4."""
    model, codec = tiny
    stop, *others = 65, 66, 67
    V = model.config.text_config.vocab_size
    codec.stop_ids = torch.tensor([stop])
    codec.banned = torch.tensor([i for i in range(V) if i not in (stop, *others)])
    prompts = prompts_of(codec)
    generator = torch.Generator().manual_seed(0)
    groups = sample(model, codec, 20 * prompts, group=40, max_tokens=3, rows=4, generator=generator)
    drawn = [[] for _ in prompts]
    for i, group in enumerate(groups):
        drawn[i % 3] += [tuple(c.ids.tolist()) for c in group.completions]
    responses = [(stop,), *((a, stop) for a in others)]
    responses += [(*head, last) for head in itertools.product(others, others)
                  for last in (stop, *others)]
    for prompt, ours in zip(prompts, drawn):
        chances = []
        for response in responses:
            logps = replayed(model, codec, prompt, torch.tensor(response))
            chances.append(sum(logps[t, token] for t, token in enumerate(response)).exp().item())
        expected = 800 * numpy.array(chances)
        assert expected.sum() == pytest.approx(800, abs=0.01)
        counts = numpy.array([ours.count(response) for response in responses])
        assert counts.sum() == 800
        # Responses that are expected fewer than five times share one cell.
        rare = expected < 5
        counts = numpy.append(counts[~rare], counts[rare].sum())
        expected = numpy.append(expected[~rare], max(expected[rare].sum(), 1e-9))
        if expected[-1] < 5:
            counts, expected = counts[:-1], expected[:-1]
        assert len(expected) >= 3
        # The 0.9999 quantile of chi-squared for up to 14 degrees of freedom is 42.6.
        assert ((counts - expected)**2 / expected).sum() < 42.6


def test_a_group_draws_different_first_tokens_from_the_pure_distribution(tiny):
    """Uniform logits: G different tokens, log-prob -log(V - banned), no vision id, whatever the
    model's generation_config says about top_k, top_p and temperature."""
    model, codec = tiny
    model.lm_head.weight.data.zero_()
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, temperature=0.1)
    codec.stop_ids = torch.tensor([], dtype=torch.long)
    group, = sample(model, codec, prompts_of(codec)[:1], group=400, max_tokens=1, rows=1)
    first = torch.cat([c.ids for c in group.completions])
    V = model.config.text_config.vocab_size
    assert len(first.unique()) > V // 2
    assert not torch.isin(first, codec.banned).any()
    expected = -torch.tensor(float(V - 4)).log()
    assert torch.allclose(torch.cat([c.logps for c in group.completions]), expected.expand(400))


def test_both_end_ids_end_a_completion_which_keeps_them(tiny):
    model, codec = tiny
    ends = ["<|endoftext|>", "<|im_end|>"]
    assert codec.tokenizer.convert_ids_to_tokens(codec.stop_ids) == ends
    prompt = prompts_of(codec)[1]
    codec.stop_ids = torch.tensor([], dtype=torch.long)
    endless = greedy(model, codec, [prompt], max_tokens=6)[0].completions[0]
    assert len(endless.ids) == len(endless.logps) == 6 and not endless.ended
    # Now each of two of its tokens in turn, and then both, end a completion.
    ids = endless.ids.tolist()
    for stops in ([ids[3]], [ids[4]], sorted({ids[3], ids[4]})):
        codec.stop_ids = torch.tensor(stops)
        place = min(ids.index(stop) for stop in stops)
        stopped = greedy(model, codec, [prompt], max_tokens=6)[0].completions[0]
        assert stopped.ids.tolist() == ids[:place + 1] and stopped.ended
        assert torch.allclose(stopped.logps, endless.logps[:place + 1], atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_responses_of_many_lengths_in_rows_that_are_reused(tiny, rows):
    """Responses that end early, in rows that others take over: each equals its own replay."""
    model, codec = tiny
    V = model.config.text_config.vocab_size
    codec.stop_ids = torch.arange(0, V, 3)                  # a third of all tokens end a response
    prompts = prompts_of(codec) + prompts_of(codec, ((512, 200), (100, 400), (90, 90)))
    generator = torch.Generator().manual_seed(3)
    groups = list(sample(model, codec, prompts, group=6, max_tokens=9, rows=rows,
                         generator=generator))
    assert len({len(c.ids) for group in groups for c in group.completions}) > 3
    for prompt, group in zip(prompts, groups, strict=True):
        assert group.prompt is prompt and len(group.completions) == 6
        for c in group.completions:
            check_replay(model, codec, prompt, c)
            *others, last = c.ids.tolist()
            assert c.ended == (last % 3 == 0) and all(i % 3 for i in others)
            assert c.ended or len(c.ids) == 9


def test_the_sampler_and_the_trainer_score_alike(tiny):
    model, codec = tiny
    codec.stop_ids = torch.arange(0, model.config.text_config.vocab_size, 3)
    for group in sample(model, codec, prompts_of(codec), group=5, max_tokens=9, rows=2):
        row = grpo.pack(group.prompt, [c.ids for c in group.completions])
        with torch.no_grad():
            scored = grpo.response_logprobs(model, row, codec.banned)[0]
        assert torch.allclose(scored, torch.cat([c.logps for c in group.completions]), atol=1e-5)


def test_the_same_generator_gives_the_same_samples(tiny):
    model, codec = tiny
    runs = []
    for _ in range(2):
        groups = sample(model, codec, prompts_of(codec), group=3, max_tokens=5, rows=2,
                        generator=torch.Generator().manual_seed(5))
        runs.append([(c.ids.tolist(), c.logps.tolist()) for g in groups for c in g.completions])
    assert runs[0] == runs[1] and len({tuple(ids) for ids, _ in runs[0]}) > 3


def test_a_long_response_holds_up_its_own_row_only():
    """Two rows, and lengths 9, 2, 2, 3, 4: by hand, one row takes the 9, the other all the rest."""
    lengths = [[9, 5], [2, 2], [2, 2], [2, 3], [4, 2]]
    groups, steps = bench.scripted(lengths, rows=2)
    assert [[len(c.ids) for c in group.completions] for group in groups] == lengths
    # A row whose responses have ended misses the forward that follows: the prefill of the next
    # prompt is in its place, and gives the first token.
    assert [sorted(step) for step in steps] == [[0, 1], [0], [0, 2], [0], [0, 3], [0, 3], [0],
                                                [0, 4], [4], [4]]


def test_the_bench_writes_its_figures(tmp_path):
    """`steps` also checks its own bound: forwards at most 1.1 times the ideal."""
    file = tmp_path / "bench.json"
    bench.main(["--rows", "update,rollout,steps,partner,phases", "--tiny", "--repeats", "1",
                "--warmup", "0", "--questions", "2", "--json", str(file)])
    update, rollouts, *steps, partner, perceiving, reasoning = json.loads(file.read_text())
    assert update["max_logprob_diff"] < 1e-4 and update["max_gradient_diff"] < 1e-3
    assert rollouts["max_logprob_diff"] < 1e-4
    assert [row["rows"] for row in steps] == [16, 8]
    assert all(1.0 <= row["over_ideal"] <= 1.1 for row in steps)
    assert partner["our_calls"] < partner["their_calls"] == 16
    assert (perceiving["row"], reasoning["row"]) == ("perception", "reasoning")
    assert perceiving["partner_calls"] == 4 and reasoning["shape"][1:] == [8, 4]


def test_prompts_are_read_only_as_rows_become_free(tiny):
    """A generator of prompts keeps those in memory that are in the table, not the whole set."""
    model, codec = tiny
    made = []

    def prompts():
        for prompt in prompts_of(codec):
            made.append(prompt)
            yield prompt

    groups = sample(model, codec, prompts(), greedy=True, max_tokens=1, rows=1)
    next(groups)
    assert len(made) == 1


def test_prefill_in_pieces_is_prefill_at_once(tiny, monkeypatch, forwards):
    """Three prompts of different lengths: one forward, or one each."""
    model, codec = tiny
    codec.stop_ids = torch.arange(0, model.config.text_config.vocab_size, 3)
    prompts, runs = prompts_of(codec), []
    lengths = [len(p.ids) for p in prompts]
    alone = [(1, length) for length in lengths]
    for bound, expected in ((rollout.PREFILL, [(3, max(lengths))]), (100, alone)):
        monkeypatch.setattr(rollout, "PREFILL", bound)
        forwards.clear()
        runs.append(list(sample(model, codec, prompts, group=4, max_tokens=9, rows=3,
                                generator=torch.Generator().manual_seed(0))))
        assert forwards[:len(expected)] == expected
    for whole, pieces in zip(*runs):
        for a, b in zip(whole.completions, pieces.completions):
            assert torch.equal(a.ids, b.ids) and a.ended == b.ended
            assert torch.allclose(a.logps, b.logps, atol=1e-5)


def test_a_decode_step_computes_only_rows_in_use(tiny, forwards):
    """No prompts are left: a row that ends is not computed any more, wherever it was."""
    model, codec = tiny
    codec.stop_ids = torch.arange(0, model.config.text_config.vocab_size, 3)
    groups = list(sample(model, codec, prompts_of(codec), group=4, max_tokens=9, rows=3,
                         generator=torch.Generator().manual_seed(0)))
    longest = [max(len(c.ids) for c in g.completions) for g in groups]
    assert len(set(longest)) > 1
    expected = [(sum(n > step for n in longest), 4) for step in range(1, max(longest))]
    assert forwards[1:] == expected


def tables(monkeypatch):
    """Every Table that sampling makes from here on."""
    made, init = [], rollout.Table.__init__

    def spied(self):
        init(self)
        made.append(self)

    monkeypatch.setattr(rollout.Table, "__init__", spied)
    return made


def test_the_table_is_allocated_once_and_grows_with_a_longer_prompt(tiny, monkeypatch):
    """A prompt longer than all before, while another one is in the middle of its responses."""
    model, codec = tiny
    monkeypatch.setattr(rollout, "STRIDE", 8)
    made = tables(monkeypatch)
    codec.stop_ids = torch.arange(0, model.config.text_config.vocab_size, 4)
    short, middle, long = sorted(prompts_of(codec), key=lambda prompt: len(prompt.ids))
    generator = torch.Generator().manual_seed(1)
    prompts, storages = [short, short, middle, short, long, short, long], []

    def watched():
        for prompt in prompts:
            storages.append([t.data_ptr() for layer in made[-1].layers for t in layer])
            yield prompt

    groups = list(sample(model, codec, watched(), group=3, max_tokens=9, rows=2,
                         generator=generator))
    for prompt, group in zip(prompts, groups, strict=True):
        for c in group.completions:
            check_replay(model, codec, prompt, c)
    table, = made
    assert table.rows == 2 and table.columns >= len(long.ids) + 3 * 9
    assert {t.shape[:2] for layer in table.layers for t in layer} == {(2, table.columns)}
    assert len({tuple(s) for s in storages if s}) <= 3      # as allocated, grown once, grown twice


def test_a_table_has_no_more_rows_than_prompts(tiny, monkeypatch):
    model, codec = tiny
    made = tables(monkeypatch)
    greedy(model, codec, prompts_of(codec), max_tokens=3, rows=100)
    assert made[0].rows == 3


def test_outputs_that_are_not_numbers_stop_the_sampler(tiny):
    model, codec = tiny
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match="not a number"):
        greedy(model, codec, prompts_of(codec))


@pytest.mark.parametrize("stage", ["prefill", "decode_step", "draw"])
def test_running_out_of_memory_names_the_remedy(tiny, monkeypatch, stage):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model, codec = tiny
    monkeypatch.setattr(rollout, stage, full)
    with pytest.raises(InputError, match="ran out while sampling: halve --rollout-batch"):
        greedy(model, codec, prompts_of(codec))


class Launches(TorchDispatchMode):
    """Counts operations that are no views: on a GPU each launches a kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        free = func.is_view or func.name() in ("aten::_unsafe_view", "aten::lift_fresh")
        if not free:
            self.count += 1
        return out


def test_a_decode_step_of_28_layers_is_below_1000_launches(tiny, monkeypatch):
    """The 2B's number of layers and heads, made narrow. On a GPU F.rms_norm is one kernel; the CPU
    takes it apart, so a single operation stands in for it here."""
    model, codec = tiny
    config = model.config
    text = config.text_config
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 28, 16, 8
    text.head_dim, text.layer_types = 32, ["full_attention"] * 28
    deep = rollout.quicken(Qwen3VLForConditionalGeneration._from_config(
        config, attn_implementation={"text_config": "group", "vision_config": "sdpa"}))
    counts, decode = [], rollout.decode_step

    def counted(*args):
        with Launches() as launches, monkeypatch.context() as patch:
            patch.setattr(rollout.F, "rms_norm", lambda x, *_: x.tanh())
            logits = decode(*args)
        counts.append(launches.count)
        return logits

    monkeypatch.setattr(rollout, "decode_step", counted)
    codec.stop_ids = torch.tensor([], dtype=torch.long)
    list(sample(deep, codec, prompts_of(codec), group=8, max_tokens=3, rows=3))
    print("launches of a decode step:", counts)
    assert len(counts) == 2 and max(counts) < 1000


# --- verbs


def test_perceive_reads_the_boxes_with_the_modules_parser(tiny, monkeypatch):
    """Every completion's own text goes through rollout.parse_boxes, which a fork may replace."""
    model, codec = tiny
    monkeypatch.setattr(rollout, "parse_boxes", lambda text: Parsed([text], True))
    examples = [SimpleNamespace(load_image=lambda: noise(90, 90), question=f"Where is {i}?")
                for i in range(3)]
    groups = list(rollout.perceive(model, codec, examples, group=2, max_tokens=4, rows=2))
    for i, group in enumerate(groups):
        assert f"Where is {i}?" in codec.decode(group.prompt.ids)
        for completion in group.completions:
            assert completion.parsed.boxes == [completion.text]


# --- the hub


def test_a_typo_of_a_local_path_is_told_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    assert rollout.find("runs/one") == rollout.Path("runs/one")
    for name in ("runs/two", "./model", "/nowhere/model", "~/no-such-model", "../a/b"):
        with pytest.raises(InputError, match=f"--model {name}: there is no such file or folder"):
            rollout.find(name)


def test_a_run_folder_is_no_model(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=f"weights are in {tmp_path / 'final'}"):
        rollout.find(str(tmp_path))
    assert rollout.find(str(tmp_path), "--data", "dataset") == tmp_path


@pytest.mark.parametrize("name, files, refused", [
    ("a/b", ["README.md", "data.jsonl", "test.parquet"], None),
    ("a/b", ["data/x-00000-of-00002.parquet", "data/x-00001-of-00002.parquet"], None),
    ("a/b", ["data/x.parquet", "data/x.tsv"], "a/b/data/x.parquet or a/b/data/x.tsv"),
    ("a/b", ["x.parquet", ".cache/x.json"], None),
    ("a/b", ["train.parquet", "test.parquet"], "as a/b/test.parquet or a/b/train.parquet"),
    ("a/b/4k", ["4k/x.tsv", "8k/x.tsv", "4k.tsv"], None),
    ("a/b/4k", ["4k/x.tsv", "4k/y.csv"], "a/b/4k/x.tsv or a/b/4k/y.csv")])
def test_a_data_set_of_several_files_is_refused_before_it_comes_down(tmp_path, monkeypatch, name,
                                                                     files, refused):
    downloads = []

    def download(repository, **how):
        downloads.append((repository, how["allow_patterns"]))
        (tmp_path / "4k").mkdir(exist_ok=True)
        return str(tmp_path)

    monkeypatch.setattr(rollout, "list_repo_files", lambda repository, repo_type: files)
    monkeypatch.setattr(rollout, "snapshot_download", download)
    if refused:
        with pytest.raises(InputError, match=f"--data {name} holds several .*{refused}"):
            rollout.find(name, "--data", "dataset")
        assert not downloads
    else:
        rollout.find(name, "--data", "dataset")
        inside = ["4k", "4k/*"] if name.endswith("4k") else None
        assert downloads == [("a/b", inside)]
