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

import contextlib
import itertools
import json
import os
import re
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig, AutoTokenizer, Qwen2VLImageProcessorPil,
                          Qwen3VLForConditionalGeneration, RepetitionPenaltyLogitsProcessor)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from crop import MAX_CROPS, PLACEHOLDER, gather


class InputError(ValueError):
    """Something a user can mend. The message is one sentence; the programs print it and exit with 2."""


@contextlib.contextmanager
def out_of_memory(doing, remedy):
    """Turns a GPU that is out of memory into an InputError that names the remedy."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(f"the GPU's memory ran out while {doing}: {remedy}") from error


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


def fitting(codec, examples, text_tokens, response_tokens, skip=False):
    """The examples whose prompts are not too long. The others are counted, the first ten listed: in a line that is printed
    where `skip` leaves them out, else in an InputError. No pixels are read.

    With V = the pixel budget in visual tokens, the Perceiver's prompt has room for V + text_tokens, the Reasoner's (image
    and three crops) for 4 V + text_tokens, visual tokens counted (crops as V), and prompt + response for the model's positions.
    At the paper's budget V = 2048: the default of 512 gives its limits, 2560 and 8704.
    """
    budget, long = codec.size["longest_edge"] // codec.token_side**2, {}
    for e in examples:
        reasoner = REASONER.format(regions=REGIONS["both"], question=e.question, form=FORMS[e.answer_form])
        for text, crops in ((PERCEIVER.format(question=e.question), 0), (reasoner, MAX_CROPS)):
            words = len(codec.tokenizer(codec.render(text, 0), add_special_tokens=False)["input_ids"]) + 2  # around the image
            tokens = words + codec.visual_tokens(*e.size) + crops * (budget + 2)
            limit = min((1 + crops) * budget + text_tokens, codec.positions - response_tokens)
            if tokens > limit:
                long[e] = f"{e.id} ({tokens} tokens, {limit} allowed)"
    if long:
        told = f"{len(long)} of {len(examples)} questions make prompts that are too long: {', '.join([*long.values()][:10])}"
        if not skip or len(long) == len(examples):
            raise InputError(f"{told}; shorten them, leave them out with --skip-bad, or raise --text-tokens")
        print(f"skipped: {told}")
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
        # (Vision layers attend image by image, without a mask: they need no attention of ours.)
        model = Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, attn_implementation={"text_config": "group", "vision_config": "sdpa"})
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


@out_of_memory("sampling", "halve --rollout-batch and --partner-batch (after that, in a new run, --max-pixels or --reason-tokens)")
@torch.no_grad()
def _sample_chunk(model, codec, prompts, group, greedy, max_tokens, generator, penalty):
    """One prefill a prompt, then all responses together. The G responses of a prompt share one row of the
    cache: the prompt once, then one column a step for each response that goes on; the mask keeps them apart."""
    model.eval()  # in train mode activation checkpointing would drop the cache
    device, count = model.device, len(prompts) * group
    cache, logits, real, position = prefill(model, prompts)                      # (Q, V), (Q, P), (Q,)
    if logits.isnan().any():
        raise InputError("the model's output is not a number for one of these prompts: its weights are damaged, or an image "
                         "overflows its number format")
    logits = logits[:, None].expand(-1, group, -1)                               # (Q, S, V), S = G at first
    slots = torch.arange(count, device=device).view(-1, group)                   # (Q, S) which response; count = none
    owner = torch.where(real, -1, -2)                                            # (Q, columns) -1 prompt, -2 padding

    ids = torch.full((count + 1, max_tokens), -1, device=device)                 # (QG + 1, R) the last row is for `none`
    logps = torch.zeros(count + 1, max_tokens, device=device)
    banned, stops = codec.banned.to(device), codec.stop_ids.to(device)
    penalise = penalty != 1 and RepetitionPenaltyLogitsProcessor(penalty)
    if penalise:  # of the prompt's tokens, too. Padding counts as an image token, which is banned: it moves no score.
        past = pad_sequence([p.ids for p in prompts], batch_first=True, padding_value=codec.image_token_id).to(device)
        past = past[torch.arange(count + 1, device=device).clamp(max=count - 1) // group]  # (QG + 1, P)
    for step in range(max_tokens):
        if penalise:
            past_ids = torch.cat([past[slots], ids[slots, :step].clamp(min=0)], dim=-1).flatten(0, 1)  # (QS, P + step)
            logits = penalise(past_ids, logits.flatten(0, 1).float()).view(logits.shape)
        scores = logits.float().index_fill(-1, banned, float("-inf")).log_softmax(-1)  # (Q, S, V)
        token = (scores.argmax(-1) if greedy else                                # (Q, S)
                 torch.multinomial(scores.exp().flatten(0, 1), 1, generator=generator).view(slots.shape))
        ids[slots, step] = token
        logps[slots, step] = scores.gather(-1, token[..., None])[..., 0]
        done = torch.isin(token, stops)
        if done.any():  # finished responses leave: S shrinks to the longest row, empty rows go with their cache
            slots, order = slots.masked_fill(done, count).sort(dim=1)            # the ones that go on come first
            going = (slots < count).sum(dim=1)                                   # (Q,)
            if not going.any():
                break
            keep, width = going.nonzero()[:, 0], going.max()
            slots, token = slots[keep, :width], token.gather(1, order)[keep, :width]
            if len(keep) < len(going):
                owner, position = owner[keep], position[keep]
                cache.batch_select_indices(keep)
        if step + 1 == max_tokens:
            break
        owner = torch.cat([owner, slots], dim=1)
        seen = (owner[:, None] == -1) | (owner[:, None] == slots[..., None])     # (Q, S, columns)
        logits = model(input_ids=token, attention_mask=seen[:, None],
                       position_ids=(position + step)[None, :, None].expand(3, -1, slots.shape[1]),
                       past_key_values=cache, use_cache=True).logits             # (Q, S, V)

    lengths, ended = (ids >= 0).sum(dim=1).tolist(), torch.isin(ids, stops).any(dim=1).tolist()
    ids, logps = ids.cpu(), logps.cpu()
    completions = [Completion(ids[i, :n].clone(), logps[i, :n].clone(), ended[i], codec.decode(ids[i, :n]))
                   for i, n in enumerate(lengths[:count])]
    return [Group(p, completions[i * group:(i + 1) * group]) for i, p in enumerate(prompts)]


PREFILL = 16_384  # prompt tokens in one forward at most (one prompt at least): bounds the memory it works in


def prefill(model, prompts):
    """Q prompts -> (cache of Q rows, next-token logits (Q, V), real (Q, P) False at padding, next position (Q,))."""
    longest = max(len(p.ids) for p in prompts)
    size, parts = max(1, PREFILL // longest), []
    for i in range(0, len(prompts), size):
        inputs, cache = collate(prompts[i:i + size], model.device), Cache(layer_class_to_replicate=GrowingLayer)
        logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        real = F.pad(inputs["attention_mask"], (longest - inputs["attention_mask"].shape[1], 0)).bool()
        parts.append((cache, logits, real, inputs["position_ids"].amax(dim=(0, 2)) + 1))
    caches, logits, real, position = zip(*parts)
    for layers in zip(*(cache.layers for cache in caches)) if len(parts) > 1 else ():  # one by one: never two caches
        for name in ("keys", "values"):
            parts = [vars(layer).pop(name) for layer in layers]                  # (rows, KV heads, P, d) each
            setattr(layers[0], name, torch.cat([F.pad(t, (0, 0, longest - t.shape[2], 0)) for t in parts]))
    return caches[0], torch.cat(logits), torch.cat(real), torch.cat(position)


class GrowingLayer(DynamicLayer):
    """A cache layer with spare columns ahead. The library's own copies the whole cache at every token."""
    room = None  # keys and values with those columns

    def update(self, key_states, value_states, *args, **kwargs):
        start, stop = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        if start == 0:
            return super().update(key_states, value_states)
        if self.room is None or self.room[0].shape[2] < stop or len(self.room[0]) != len(self.keys):
            self.room = [F.pad(t, (0, 0, 0, stop - start + 255)) for t in (self.keys, self.values)]
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, start:stop] = new
        self.keys, self.values = (room[:, :, :stop] for room in self.room)       # (rows, KV heads, columns, d)
        return self.keys, self.values


def group_attention(module, query, key, value, mask, scaling, **more):
    """Attention for G responses that share a prompt, in training and in sampling. Returns (B, L, heads, d), None.

    query: (B, heads, L, d); key, value: (B, KV heads, columns, d). In training grpo.Row.layout comes in place of a mask
    (the library hands 4-D masks through): the prompt is causal, each response sees the prompt and itself. A dense (L, L)
    mask does the same (tests/test_grpo.py), but takes 0.6 GB at L = 25,000 and keeps SDPA off its flash kernel. In
    sampling the heads that share a KV head become further queries of it, or the long cache would be copied for each.
    """
    if mask is not None and mask.dtype == torch.long:
        P, *lengths = mask.flatten().tolist()
        q, k, v = (t.split([P, *lengths], dim=2) for t in (query, key, value))
        attend = partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=True)
        parts = [attend(q[0], k[0], v[0], is_causal=True)]
        for i, R in enumerate(lengths, start=1):
            seen, values = torch.cat([k[0], k[i]], dim=2), torch.cat([v[0], v[i]], dim=2)  # (1, KV heads, P + R, d)
            parts.append(attend(q[i], seen, values, causal_lower_right(R, P + R)))
        return torch.cat(parts, dim=2).transpose(1, 2), None
    if mask is not None and query.shape[2] < key.shape[2]:
        folded = query.reshape(*key.shape[:2], -1, query.shape[3])              # (B, KV heads, heads / KV heads * L, d)
        mask = mask.repeat(1, 1, folded.shape[2] // query.shape[2], 1)
        output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
        return output.reshape(query.shape).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **more)


AttentionInterface.register("group", group_attention)
AttentionMaskInterface.register("group", sdpa_mask)  # the library's masks, where it makes one


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
