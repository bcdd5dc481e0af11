"""One model, two roles: prompts, encoding, sampling, and the verbs `perceive` and `reason`.

    Perceiver: whole image + question                    -> JSON list of boxes
    Reasoner:  annotated image + crops + question        -> <think>..</think><answer>..</answer>

Everything that the trainer needs later leaves this module as ids and log-probs, so what is trained
is exactly what was sampled; text exists only for parsing and for rewards.

Shapes, here and in grpo.py: Q questions, G samples a group, P prompt tokens, R response tokens,
V vocabulary, B = rows in a batch.

Paper: arXiv 2607.01191. The two roles and their inputs are its inference pipeline; the wording of
the prompts is ours.
"""

import itertools
import json
import os
import re
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (AutoConfig, AutoTokenizer, DynamicCache, Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration,
                          RepetitionPenaltyLogitsProcessor)

from crop import MAX_CROPS, PLACEHOLDER, gather


class InputError(ValueError):
    """Something a user can mend. The message is one sentence; the programs print it and exit with 2."""


# ---------------------------------------------------------------------------------------------
# Prompts. Training and evaluation use the same ones. (toy.py's warm start was trained on these
# exact sentences: whoever changes one rebuilds it with `python toy.py`.)

SYSTEM = "You are a helpful assistant."

PERCEIVER = """{question}

Which regions of the image hold the evidence for answering this? Do not answer the question. \
Reply with JSON only, the most important region first:
[{{"bbox_2d": [x1, y1, x2, y2], "label": "%s"}}]
Coordinates go from 0 to 1000, relative to the width and the height of the image. \
If the whole image is needed, reply [].""" % PLACEHOLDER

REGIONS = {  # what the Reasoner is told of its evidence; without boxes nothing
    "both": """Coloured boxes in the first image mark the regions that matter. The images after it \
show the first of them enlarged, in this order: red, green, blue.

""",
    "annotated": """Coloured boxes in the image mark the regions that matter.

""",
    "crops": """The images show the regions that matter, enlarged, the most important first.

""",
    "none": "",
}

REASONER = """{regions}{question}

Reason about what you see inside <think> </think>, then give the final answer inside \
<answer> </answer>. {form}"""

FORMS = {  # the last sentence depends on the kind of answer
    "mca": "The answer is the letter of the right option and nothing else.",
    "na": "The answer is a number and nothing else.",
    "free_form": "The answer is a word or a short phrase and nothing else.",
}

DIRECT = """{question}

Reply with the answer alone. {form}"""  # no roles and no reasoning: a baseline of evaluation


def perceiver_prompt(codec, image, question):
    """The Perceiver's prompt: the whole image, scaled to the pixel budget, then the question."""
    return codec.encode(PERCEIVER.format(question=question), [image])


def reasoner_prompt(codec, image, boxes, question, answer_form, evidence="both"):
    """The Reasoner's prompt: annotated image, crops, question.

    evidence: "both", or only the "annotated" image, only the "crops", or "none" of them (the paper's
    comparison). Without boxes, or with "none", it is the plain image and a prompt that does not
    mention regions; that is also the baseline "think and answer on the plain image".
    """
    if not boxes or evidence == "none":
        boxes, evidence = (), "none"
    annotated, crops = gather(image, boxes)
    if answer_form not in FORMS:
        raise InputError(f"the answer form {answer_form!r} is unknown; there are {', '.join(FORMS)}")
    images = {"both": [annotated, *crops], "annotated": [annotated], "crops": crops, "none": [image]}[evidence]
    text = REASONER.format(regions=REGIONS[evidence], question=question, form=FORMS[answer_form])
    return codec.encode(text, images)


def direct_prompt(codec, image, question, answer_form):
    """No roles: the plain image, the question, and the answer at once."""
    return codec.encode(DIRECT.format(question=question, form=FORMS[answer_form]), [image])


def overlong(codec, examples, text_tokens, response_tokens):
    """The examples whose prompts are too long: a list of (example, tokens, limit). No pixels are read.

    With V = the pixel budget in visual tokens, the Perceiver's prompt has room for V + text_tokens, the Reasoner's (image
    and three crops) for 4 V + text_tokens, visual tokens counted (crops as V), and prompt + response for the model's positions.
    At the paper's budget V = 2048: the default of 512 gives its limits, 2560 and 8704.
    """
    budget, found = codec.size["longest_edge"] // codec.token_side**2, {}
    for e in examples:
        reasoner = REASONER.format(regions=REGIONS["both"], question=e.question, form=FORMS[e.answer_form])
        for text, crops in ((PERCEIVER.format(question=e.question), 0), (reasoner, MAX_CROPS)):
            words = len(codec.tokenizer(codec.render(text, 0), add_special_tokens=False)["input_ids"]) + 2  # around the image
            tokens = words + codec.visual_tokens(*e.size) + crops * (budget + 2)
            limit = min((1 + crops) * budget + text_tokens, codec.positions - response_tokens)
            if tokens > limit:
                found[e] = tokens, limit
    return [(e, *numbers) for e, numbers in found.items()]


def fitting(codec, examples, text_tokens, response_tokens, skip=False):
    """The examples without the overlong ones. Those are counted, the first ten listed: in a line that is printed where
    `skip` leaves them out, else in an InputError."""
    found = overlong(codec, examples, text_tokens, response_tokens)
    if found:
        names = ", ".join(f"{e.id} ({tokens} tokens, {limit} allowed)" for e, tokens, limit in found[:10])
        told = f"{len(found)} of {len(examples)} questions make prompts that are too long: {names}{', ...' * (len(found) > 10)}"
        if not skip or len(found) == len(examples):
            raise InputError(f"{told}; shorten them, leave them out with --skip-bad, or raise --text-tokens")
        print(f"skipped: {told}")
    long = {e for e, *_ in found}
    return [e for e in examples if e not in long]


# ---------------------------------------------------------------------------------------------
# Text and images <-> tensors


@dataclass
class Prompt:
    """One encoded prompt, on the CPU, without padding."""
    ids: torch.Tensor        # (P,) token ids, every image expanded to its visual tokens
    positions: torch.Tensor  # (3, P) temporal, height and width positions (M-RoPE)
    pixels: torch.Tensor     # (patches, channels * temporal * patch * patch)
    grids: torch.Tensor      # (images, 3) patches per image along time, height, width


@dataclass
class Completion:
    """One sampled response."""
    ids: torch.Tensor    # (R,) the end token included, where there is one
    logps: torch.Tensor  # (R,) the sampler's log-probs, float32
    ended: bool          # False: cut off by the token limit
    text: str

    def __str__(self):
        """The text as people are shown it."""
        return self.text + ("" if self.ended else " [cut off by the token limit]")


@dataclass
class Group:
    """One prompt and its G completions: the unit that GRPO compares, and one row of training."""
    prompt: Prompt
    completions: list


class Codec:
    """Encodes text and images for one model, and decodes its tokens.

    max_pixels: the budget *per image*, the whole image and each crop alike (paper: 2,097,152 in
    training). Larger images are scaled down to it, images under min_pixels are scaled up.
    Raises InputError if the budget is smaller than one visual token.
    """

    def __init__(self, folder, model, max_pixels, min_pixels=4096):
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if self.tokenizer.chat_template is None:  # some repositories keep it beside the tokenizer
            template = Path(folder, "chat_template.json")
            if not template.is_file():
                raise InputError(f"{folder} has no chat template, neither in its tokenizer_config.json nor as "
                                 f"chat_template.json: is it an Instruct model?")
            self.tokenizer.chat_template = json.loads(template.read_text())["chat_template"]
        # The PIL back end everywhere: torchvision, where it is installed, resizes a little
        # differently, and then two machines would see different pixels.
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        vision = model.config.vision_config
        self.merge = vision.spatial_merge_size
        self.token_side = side = vision.patch_size * self.merge
        if max_pixels < side**2:
            raise InputError(f"--max-pixels {max_pixels} is smaller than one visual token of this model, which "
                             f"covers {side} x {side} = {side**2} pixels; raise it")
        self.size = {"shortest_edge": min(min_pixels, max_pixels), "longest_edge": max_pixels}  # areas!
        self.image_token = self.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        self.image_token_id = model.config.image_token_id
        # A policy can sample vision ids, which would break its next forward: they are banned when
        # sampling, and in the scored distribution too (grpo.response_logprobs).
        self.banned = torch.tensor([model.config.image_token_id, model.config.video_token_id,
                                    model.config.vision_start_token_id, model.config.vision_end_token_id])
        # Qwen ends on <|im_end|> *or* <|endoftext|>. Nothing else is taken from generation_config:
        # its top_k, top_p and temperature would silently change the sampled distribution.
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        self.stop_ids = torch.tensor(sorted(ends - {None}))
        self.position_ids = model.model.get_rope_index  # the library's own M-RoPE; reads the config only
        self.positions = model.config.get_text_config().max_position_embeddings
        self.dtype = model.dtype

    def check(self, questions):
        """Raises InputError for a question that contains the model's image token."""
        for text in questions:
            if self.image_token in text:
                raise InputError(f"a question contains {self.image_token}, which stands for an image: {text[:80]!r}; remove it")

    def encode(self, text, images):
        """One user turn of images, then text -> Prompt. Raises InputError as `check` does."""
        self.check([text])
        pieces = self.render(text, len(images)).split(self.image_token)
        vision = self.image_processor(images=images, size=self.size, return_tensors="pt")
        counts = (vision["image_grid_thw"].prod(dim=1) // self.merge**2).tolist()  # visual tokens per image
        expanded = pieces[0] + "".join(self.image_token * n + piece for n, piece in zip(counts, pieces[1:]))
        ids = torch.tensor(self.tokenizer(expanded, add_special_tokens=False)["input_ids"])  # (P,)
        positions, _ = self.position_ids(
            ids[None], mm_token_type_ids=(ids == self.image_token_id).int()[None],
            image_grid_thw=vision["image_grid_thw"])
        return Prompt(ids, positions[:, 0], vision["pixel_values"].to(self.dtype), vision["image_grid_thw"])

    def render(self, text, images):
        """One user turn -> the chat template's text, with one image token for each image."""
        content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def visual_tokens(self, width, height):
        """Visual tokens of an image of this size, by the library's own arithmetic."""
        patches = self.image_processor.get_number_of_image_patches(height, width, {
            "min_pixels": self.size["shortest_edge"], "max_pixels": self.size["longest_edge"]})
        return patches // self.merge**2

    def decode(self, ids):
        """Token ids -> text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def find(name, flag="--model", kind="model"):
    """A local path as it is; anything else is a hub id, downloaded once by huggingface_hub -> Path.

    `owner/name/path` is one file or folder of a hub repository. Raises InputError that names `flag`.
    """
    if Path(name).exists():
        return Path(name)
    owner, _, rest = str(name).partition("/")
    repository, _, inside = rest.partition("/")
    if not re.fullmatch(r"[\w-][\w.-]*", owner) or not repository:
        raise InputError(f"{flag} {name}: there is no such file or folder, and it does not look like a hub id (owner/name)")
    try:
        folder = Path(snapshot_download(f"{owner}/{repository}", repo_type=kind,
                                        allow_patterns=[inside, f"{inside}/*"] if inside else None))
    except Exception as error:  # the hub's many errors share no narrower class across its versions
        raise InputError(f"{flag} {name}: there is no such file or folder, and the hub did not give it "
                         f"({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error
    if not (folder / inside).exists():
        raise InputError(f"{flag} {name}: the hub's {owner}/{repository} has no {inside}")
    return folder / inside


def cached(name, fill):
    """The folder `name` in ~/.cache/p2r-min (or $XDG_CACHE_HOME), made once by fill(folder) -> Path.

    It appears under its name only when it is complete. Raises InputError where it cannot be written.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2r-min" / name
    if folder.exists():
        return folder
    new = folder.with_name(f"{name}.{os.getpid()}")
    try:
        new.mkdir(parents=True)
        fill(new)
        new.rename(folder)
    except OSError as error:
        if not folder.exists():  # else another process was faster; what it wrote is the same
            raise InputError(f"cannot write {folder} ({error}): free some space, or set XDG_CACHE_HOME to a folder "
                             f"that has it") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def load(folder, max_pixels, device="cpu", min_pixels=4096):
    """A local Qwen3-VL folder -> (model in eval mode, Codec). bf16 on a GPU, float32 on a CPU.

    Raises InputError where the folder is not a Qwen3-VL checkpoint or the budget is too small.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json")
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    try:
        kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        if kind != "qwen3_vl":
            raise InputError(f"{folder} holds a {kind} model; this code knows Qwen3-VL only")
        # Safetensors only: pickled weights (.bin, .pt) could run code. They are never opened.
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa",
                                                                use_safetensors=True)
        codec = Codec(folder, model, max_pixels, min_pixels)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the model folder {folder} cannot be loaded: {' '.join(str(error).split())}") from error
    return model.to(device).eval(), codec


def collate(prompts, device):
    """Prompts -> one left-padded batch of model inputs. Positions come along, so padding moves none."""
    width = max(len(p.ids) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)                   # (B, P)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)                  # (B, P) 1 = real token
    positions = torch.zeros(3, len(prompts), width, dtype=torch.long)          # (3, B, P)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt.ids)
        ids[row, start:], mask[row, start:] = prompt.ids, 1
        positions[:, row, start:] = prompt.positions
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "position_ids": positions.to(device),
            "pixel_values": torch.cat([p.pixels for p in prompts]).to(device),
            "image_grid_thw": torch.cat([p.grids for p in prompts]).to(device)}


# ---------------------------------------------------------------------------------------------
# Sampling


def sample(model, codec, prompts, *, group=1, greedy=False, max_tokens, batch, generator=None, penalty=1.0):
    """Sample `group` completions for every prompt. Yields one Group per prompt, in order.

    prompts: any iterable, read `batch` prompts at a time: a generator keeps only those in memory.
    greedy=False is the pure distribution: temperature 1, no top-k, no top-p. It is also what the
    loss scores, so the log-probs of the two agree (metric `sampler_gap`). `penalty` is evaluation's
    repetition penalty (CTRL, arXiv 1909.05858), over prompt and response; training has none.
    """
    prompts = iter(prompts)
    while chunk := list(itertools.islice(prompts, batch)):
        yield from _sample_chunk(model, codec, chunk, group, greedy, max_tokens, generator, penalty)


@torch.no_grad()
def _sample_chunk(model, codec, prompts, group, greedy, max_tokens, generator, penalty):
    """One prefill per prompt, its cache repeated G times, then all rows decoded together."""
    model.eval()  # in train mode activation checkpointing would drop the cache
    device = model.device
    inputs = collate(prompts, device)
    cache = DynamicCache(config=model.config.get_text_config())
    logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]  # (Q, V)
    if logits.isnan().any():
        raise InputError("the model's output is not a number for one of these prompts: its weights are damaged, or an image "
                         "overflows its number format")
    cache.batch_repeat_interleave(group)
    logits = logits.repeat_interleave(group, dim=0)                              # (QG, V)
    mask = inputs["attention_mask"].repeat_interleave(group, dim=0)              # (QG, P)
    position = (inputs["position_ids"].amax(dim=(0, 2)) + 1).repeat_interleave(group)  # (QG,)

    count = len(prompts) * group
    ids = torch.zeros(count, max_tokens, dtype=torch.long, device=device)        # (QG, R)
    logps = torch.zeros(count, max_tokens, device=device)                        # (QG, R)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    banned, stops = codec.banned.to(device), codec.stop_ids.to(device)
    alive = torch.arange(count, device=device)  # which completion each decoded row belongs to
    # What the penalty looks at. Padding counts as an image token, which is banned: it moves no score.
    prompt_ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, codec.image_token_id)
    history = prompt_ids.repeat_interleave(group, dim=0)                         # (QG, P)
    penalise = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1 else None
    for step in range(max_tokens):
        if penalise:
            logits = penalise(torch.cat([history[alive], ids[alive, :step]], dim=1), logits.float())
        scores = logits.float().index_fill(-1, banned, float("-inf")).log_softmax(-1)  # (alive, V)
        token = scores.argmax(-1) if greedy else torch.multinomial(scores.exp(), 1, generator=generator)[:, 0]
        ids[alive, step] = token
        logps[alive, step] = scores.gather(1, token[:, None])[:, 0]
        lengths[alive] = step + 1
        done = torch.isin(token, stops)
        if done.any():  # finished rows leave the batch and the cache
            ended[alive[done]] = True
            keep = (~done).nonzero()[:, 0]
            if len(keep) == 0:
                break
            alive, token, mask, position = alive[keep], token[keep], mask[keep], position[keep]
            cache.batch_select_indices(keep)
        if step + 1 == max_tokens:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = model(input_ids=token[:, None], attention_mask=mask,
                       position_ids=(position + step)[None, :, None].expand(3, -1, 1),
                       past_key_values=cache, use_cache=True).logits[:, -1]      # (alive, V)

    ids, logps, lengths, ended = ids.cpu(), logps.cpu(), lengths.tolist(), ended.tolist()
    completions = [Completion(ids[i, :n].clone(), logps[i, :n].clone(), ended[i], codec.decode(ids[i, :n]))
                   for i, n in enumerate(lengths)]
    return [Group(p, completions[i * group:(i + 1) * group]) for i, p in enumerate(prompts)]


# ---------------------------------------------------------------------------------------------
# The two verbs. An `example` is anything with .load_image(), .question and .answer_form.


def perceive(model, codec, examples, **how):
    """Examples -> one Group of box lists (as text) each. `how` goes to `sample`."""
    return sample(model, codec, ahead(lambda e: perceiver_prompt(codec, e.load_image(), e.question), examples), **how)


def reason(model, codec, cases, evidence="both", **how):
    """(example, boxes) pairs -> one Group of answers (as text) each. `how` goes to `sample`."""
    return sample(model, codec, ahead(lambda case: reasoner_prompt(
        codec, case[0].load_image(), case[1], case[0].question, case[0].answer_form, evidence), cases), **how)


def direct(model, codec, examples, **how):
    """Examples -> one Group of immediate answers (as text) each. `how` goes to `sample`."""
    return sample(model, codec, ahead(lambda e: direct_prompt(codec, e.load_image(), e.question, e.answer_form), examples), **how)


def waiting(items, text):
    """A progress bar for what takes longer than a few seconds; it leaves no trace."""
    return tqdm(list(items), text, leave=False, delay=5, unit="prompt")


def ahead(make, items, depth=16):
    """map(make, items), made in threads while the model works. An image of eight megapixels and its
    crops take 1.7 seconds to prepare; `depth` bounds how many wait in memory."""
    items = iter(items)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        waiting = deque(pool.submit(make, item) for item in itertools.islice(items, depth))
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(pool.submit(make, item) for item in itertools.islice(items, 1))
            yield made
