"""rollout.py against the library: its processor, its image sizes, its generate()."""

import shutil

import pytest
import torch
from conftest import BOXES, noise, prompts_of
from transformers import Qwen3VLProcessor

import rollout
from crop import Box
from rollout import InputError, load, sample


class ImageOnlyProcessor(Qwen3VLProcessor):
    """The library's own processor; only its video part, which needs torchvision, is left out."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def greedy(model, codec, prompts, max_tokens=12, batch=8, **how):
    return list(sample(model, codec, prompts, greedy=True, max_tokens=max_tokens, batch=batch, **how))


# --- prompts


def test_a_prompt_is_the_chat_format_written_out(tiny):
    """The exact string of the Qwen format, with one image_pad for every visual token."""
    _, codec = tiny
    prompt = rollout.perceiver_prompt(codec, noise(512, 512), "Where is it?")
    vision = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"   # 64 x 64 px, 16 x 16 px a token
    text = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" + vision
            + rollout.PERCEIVER.format(question="Where is it?") + "<|im_end|>\n<|im_start|>assistant\n")
    assert codec.tokenizer.decode(prompt.ids) == text
    assert prompt.ids.tolist() == codec.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_prompt_equals_what_the_librarys_processor_makes(tiny, count):
    model, codec = tiny
    image, boxes = noise(640, 300), BOXES[count]
    prompt = rollout.reasoner_prompt(codec, image, boxes, "Which way?", "na")
    annotated, crops = rollout.gather(image, boxes)
    text = rollout.REASONER.format(regions=rollout.REGIONS["both"] if boxes else "", question="Which way?", form=rollout.FORMS["na"])
    codec.image_processor.size = codec.size
    processor = ImageOnlyProcessor(codec.image_processor, codec.tokenizer, None, chat_template=codec.tokenizer.chat_template)
    expected = processor.apply_chat_template(
        [{"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
         {"role": "user", "content": [*({"type": "image", "image": i} for i in (annotated, *crops)),
                                      {"type": "text", "text": text}]}],
        tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert len(crops) == count and len(prompt.grids) == count + 1
    assert torch.equal(prompt.ids, expected["input_ids"][0])
    assert torch.equal(prompt.pixels, expected["pixel_values"])
    assert torch.equal(prompt.grids, expected["image_grid_thw"])
    positions, _ = model.model.get_rope_index(expected["input_ids"], expected["mm_token_type_ids"], expected["image_grid_thw"])
    assert torch.equal(prompt.positions, positions[:, 0])


@pytest.mark.parametrize("evidence, sizes", [("both", [(300, 200), (120, 100)]), ("annotated", [(300, 200)]), ("crops", [(120, 100)]),
                                             ("none", [(300, 200)])])
def test_the_evidence_that_the_reasoner_is_given(tiny, monkeypatch, evidence, sizes):
    """A box of 60 x 60 px in an image of 300 x 200, padded by 30 and 20: the images that reach the encoder, and the words."""
    codec, seen = tiny[1], []
    monkeypatch.setattr(codec, "encode", lambda text, images: seen.append((text, images)))
    image = noise(300, 200)
    rollout.reasoner_prompt(codec, image, [Box(100, 200, 300, 500, "a")], "Which way?", "na", evidence)
    rollout.reasoner_prompt(codec, image, [], "Which way?", "na", evidence)
    (text, images), (plain, alone) = seen
    assert [i.size for i in images] == sizes
    assert alone == [image] and "regions" not in plain                    # without boxes all are the plain image
    assert ("Coloured boxes" in text) == (evidence in ("both", "annotated")) and ("regions" in text) == (evidence != "none")
    assert (images[0].getpixel((30, 40)) == (255, 0, 0)) == (evidence in ("both", "annotated"))


@pytest.mark.parametrize("size", [(3000, 2000), (200, 1800), (40, 30), (512, 512)])
@pytest.mark.parametrize("budget", [256, 4096, 60_000])
def test_visual_tokens_are_what_the_library_counts_and_the_budget_holds(folder, size, budget):
    _, codec = load(folder, budget)
    prompt = rollout.perceiver_prompt(codec, noise(*size), "Where?")
    patches = codec.image_processor.get_number_of_image_patches(size[1], size[0], {"min_pixels": min(4096, budget), "max_pixels": budget})
    assert (prompt.ids == codec.image_token_id).sum() == patches // 4
    if size[0] * size[1] > budget and max(size) < 2 * min(size):  # the library may overshoot for slivers and tiny images
        assert patches * 8 * 8 <= budget


def test_a_budget_below_one_visual_token_is_refused(folder):
    with pytest.raises(InputError, match="16 x 16 = 256 pixels"):
        load(folder, max_pixels=255)


def test_a_question_that_contains_the_image_token_is_refused(tiny):
    with pytest.raises(InputError, match="image_pad"):
        rollout.perceiver_prompt(tiny[1], noise(64, 64), "what is <|image_pad|>?")


def test_a_folder_of_another_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        load(tmp_path, 4096)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="qwen2"):
        load(tmp_path, 4096)


@pytest.mark.parametrize("name, content", [
    ("config.json", "{"), ("config.json", '{"model_type": "nonsense"}'), ("model.safetensors", "version https://git-lfs"),
    ("model.safetensors", None), ("preprocessor_config.json", None)])
def test_a_broken_model_folder_is_one_sentence(folder, tmp_path, name, content):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    if content is not None:
        (tmp_path / "m" / name).write_text(content)
    with pytest.raises(InputError, match="cannot be loaded") as error:
        load(tmp_path / "m", 4096)
    assert "\n" not in str(error.value)


# --- sampling


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_the_librarys_generate(tiny, penalty):
    """One prompt at a time there, all in one padded batch here; with a repetition penalty, too."""
    model, codec = tiny
    prompts, ours = prompts_of(codec), []
    for mine, prompt in zip(greedy(model, codec, prompts, penalty=penalty), prompts):
        theirs = model.generate(
            input_ids=prompt.ids[None], attention_mask=torch.ones_like(prompt.ids[None]), pixel_values=prompt.pixels,
            image_grid_thw=prompt.grids, mm_token_type_ids=(prompt.ids == codec.image_token_id).int()[None], do_sample=False,
            max_new_tokens=12, suppress_tokens=codec.banned.tolist(), repetition_penalty=penalty)
        assert mine.completions[0].ids.tolist() == theirs[0, len(prompt.ids):].tolist()
        ours += mine.completions
    if penalty != 1:
        plain = [g.completions[0] for g in greedy(model, codec, prompts)]
        assert any(a.ids.tolist() != b.ids.tolist() for a, b in zip(ours, plain))


def test_a_batch_gives_what_each_prompt_gives_alone(tiny):
    """Left padding, positions and the rows of pixel_values: prompts with 0, 1 and 3 crops."""
    model, codec = tiny
    prompts = prompts_of(codec)
    assert len({len(p.ids) for p in prompts}) == 3
    together, alone = greedy(model, codec, prompts), greedy(model, codec, prompts, batch=1)
    for a, b in zip(together, alone):
        assert a.completions[0].ids.tolist() == b.completions[0].ids.tolist()
        assert torch.allclose(a.completions[0].logps, b.completions[0].logps, atol=1e-5)


def test_a_group_draws_different_first_tokens_from_the_pure_distribution(tiny):
    """Uniform logits: G different tokens, log-prob -log(V - banned), no vision id, whatever the
    model's generation_config says about top_k, top_p and temperature."""
    model, codec = tiny
    model.lm_head.weight.data.zero_()
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, temperature=0.1)
    codec.stop_ids = torch.tensor([], dtype=torch.long)
    group, = sample(model, codec, prompts_of(codec)[:1], group=400, max_tokens=1, batch=1)
    first = torch.cat([c.ids for c in group.completions])
    V = model.config.text_config.vocab_size
    assert len(first.unique()) > V // 2
    assert not torch.isin(first, codec.banned).any()
    expected = -torch.tensor(float(V - 4)).log()
    assert torch.allclose(torch.cat([c.logps for c in group.completions]), expected.expand(400))


def test_both_end_ids_end_a_completion_which_keeps_them(tiny):
    model, codec = tiny
    assert codec.tokenizer.convert_ids_to_tokens(codec.stop_ids) == ["<|endoftext|>", "<|im_end|>"]
    prompt = prompts_of(codec)[1]
    codec.stop_ids = torch.tensor([], dtype=torch.long)
    endless = greedy(model, codec, [prompt], max_tokens=6)[0].completions[0]
    assert len(endless.ids) == len(endless.logps) == 6 and not endless.ended
    place = endless.ids.tolist().index(endless.ids[3])                      # make the fourth token an end token
    codec.stop_ids = endless.ids[3:4]
    stopped = greedy(model, codec, [prompt], max_tokens=6)[0].completions[0]
    assert stopped.ids.tolist() == endless.ids[:place + 1].tolist() and stopped.ended
    assert torch.allclose(stopped.logps, endless.logps[:place + 1], atol=1e-6)


def test_rows_that_end_early_do_not_disturb_the_others(tiny):
    """Finished rows leave the batch and the cache; every completion still equals its own replay."""
    model, codec = tiny
    codec.stop_ids = torch.arange(0, model.config.text_config.vocab_size, 3)    # a third of all tokens end a row
    prompts = prompts_of(codec)
    groups = list(sample(model, codec, prompts, group=6, max_tokens=9, batch=3, generator=torch.Generator().manual_seed(3)))
    lengths = {len(c.ids) for g in groups for c in g.completions}
    assert len(lengths) > 2
    for prompt, group in zip(prompts, groups):
        assert group.prompt is prompt and len(group.completions) == 6
        for c in group.completions:
            ids = torch.cat([prompt.ids, c.ids])[None]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=prompt.pixels, image_grid_thw=prompt.grids,
                           mm_token_type_ids=(ids == codec.image_token_id).int()).logits[0, len(prompt.ids) - 1:-1]
            logits[:, codec.banned] = float("-inf")
            assert torch.allclose(logits.log_softmax(-1).gather(1, c.ids[:, None])[:, 0], c.logps, atol=1e-5)
            assert c.ended == (int(c.ids[-1]) % 3 == 0) and all(int(i) % 3 for i in c.ids[:-1])


def test_the_same_generator_gives_the_same_samples(tiny):
    model, codec = tiny
    runs = [[c.ids.tolist() for g in sample(model, codec, prompts_of(codec), group=3, max_tokens=5, batch=2,
                                            generator=torch.Generator().manual_seed(5)) for c in g.completions] for _ in range(2)]
    assert runs[0] == runs[1] and len({tuple(ids) for ids in runs[0]}) > 3


def test_prompts_are_read_only_as_they_are_needed(tiny):
    """A generator of prompts keeps one batch in memory, not the whole set."""
    model, codec = tiny
    made = []

    def prompts():
        for prompt in prompts_of(codec):
            made.append(prompt)
            yield prompt

    groups = sample(model, codec, prompts(), greedy=True, max_tokens=1, batch=1)
    next(groups)
    assert len(made) == 1


def test_prefill_in_pieces_is_prefill_at_once(tiny, monkeypatch):
    """Three prompts of different lengths: one forward, or one each, padded together afterwards."""
    model, codec = tiny
    codec.stop_ids = torch.arange(0, model.config.text_config.vocab_size, 3)     # responses of many lengths
    how = dict(group=4, max_tokens=9, batch=3)
    whole = list(sample(model, codec, prompts_of(codec), generator=torch.Generator().manual_seed(0), **how))
    calls, forward = [], type(model.model).forward
    monkeypatch.setattr(type(model.model), "forward", lambda self, *a, **k: calls.append(k["input_ids"].shape) or forward(self, *a, **k))
    monkeypatch.setattr(rollout, "PREFILL", 100)
    pieces = list(sample(model, codec, prompts_of(codec), generator=torch.Generator().manual_seed(0), **how))
    assert [shape[0] for shape in calls[:3]] == [1, 1, 1] and len({shape[1] for shape in calls[:3]}) == 3
    for a, b in zip(whole, pieces):
        for c, d in zip(a.completions, b.completions):
            assert torch.equal(c.ids, d.ids) and c.ended == d.ended and torch.allclose(c.logps, d.logps, atol=1e-5)


def test_a_group_shares_one_row_of_the_cache_and_finished_rows_leave_it(tiny, monkeypatch):
    """Columns: the prompt once, then at every step one for each response of the longest row that goes on."""
    model, codec = tiny
    prompts, seen, forward = prompts_of(codec), [], type(model.model).forward
    widest = max(len(p.ids) for p in prompts)
    codec.stop_ids = torch.arange(0, model.config.text_config.vocab_size, 3)

    def spied(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        seen.append((tuple(kwargs["input_ids"].shape), tuple(out.past_key_values.layers[0].keys.shape)))
        return out

    monkeypatch.setattr(type(model.model), "forward", spied)
    groups = list(sample(model, codec, prompts, group=4, max_tokens=9, batch=3, generator=torch.Generator().manual_seed(0)))
    lengths = [[len(c.ids) for c in g.completions] for g in groups]
    columns = widest
    for step, (ids, keys) in enumerate(seen[1:], start=1):
        going = [sum(n > step or (n == step and not c.ended) for n, c in zip(row, g.completions)) for row, g in zip(lengths, groups)]
        columns += max(going)
        assert ids == (sum(n > 0 for n in going), max(going)) and keys[0] == ids[0] and keys[2] == columns
    assert len(seen) == max(map(max, lengths)) and seen[-1][0] != seen[1][0]
