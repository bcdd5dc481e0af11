"""One model, two roles: prompts, sampling, and the verbs `perceive` and `reason`.

    Perceiver: whole image + question                 -> JSON list of boxes
    Reasoner:  annotated image + crops + question     -> <think>..</think><answer>..</answer>

What the trainer needs later leaves this module as token ids, so what is trained is exactly what was
sampled; log-probs come along, so that the trainer's can be compared with them. Text exists only for
parsing and for rewards.

Shapes, here and in grpo.py: Q questions, G samples a group, P prompt tokens, R response tokens,
V vocabulary; here also n, the rows of the sampler's table that are in use, B the rows of a batch, L
their length, and d the size of an attention head.

Paper: arXiv 2607.01191. The two roles and their inputs are its inference pipeline; the wording of
the prompts is ours.
"""

import contextlib
import inspect
import itertools
import json
import os
import re
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import list_repo_files, snapshot_download
from PIL import Image
from safetensors import SafetensorError
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig, AutoTokenizer,
                          Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration,
                          RepetitionPenaltyLogitsProcessor)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLModel, Qwen3VLTextRMSNorm, Qwen3VLVisionPatchEmbed)

from crop import MAX_CROPS, PLACEHOLDER, gather, parse_boxes

# ---------------------------------------------------------------------------------------------
# The prompts. Training and evaluation use the same ones. (The toy's tokenizer and its warm start
# were made for these exact sentences: whoever changes one rebuilds them, tests/build_toy.py.)

SYSTEM = "You are a helpful assistant."

PERCEIVER = """{question}

Which regions of the image hold the evidence for answering this? Do not answer the question. \
Reply with JSON only, the most important region first:
[{{"bbox_2d": [x1, y1, x2, y2], "label": "LABEL"}}]
Coordinates go from 0 to 1000, relative to the width and the height of the image. \
If the whole image is needed, reply [].""".replace("LABEL", PLACEHOLDER)

REGIONS = {  # what the Reasoner is told of its evidence; without boxes nothing
    "both": """Coloured boxes in the first image mark the regions that matter. The images after \
it show the first of them enlarged, in this order: red, green, blue.

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


def perceiver_prompt(codec, image, question):
    """The Perceiver's prompt: the whole image, scaled to the pixel budget, then the question."""
    return codec.encode(PERCEIVER.format(question=question), [image])


def reasoner_prompt(codec, image, boxes, question, answer_form, evidence="both"):
    """The Reasoner's prompt: annotated image, crops, question.

    evidence: "both", or only the "annotated" image, only the "crops", or "none" of them (the
    paper's comparison). Without boxes, or with "none", it is the plain image and a prompt that does
    not mention regions; that is also the baseline "think and answer on the plain image".
    Raises InputError for an unknown answer form.
    """
    if answer_form not in FORMS:
        raise InputError(f"the answer form {answer_form!r} is none of {', '.join(FORMS)}")

    # Nothing to point at, nothing said about regions.
    if not boxes:
        evidence = "none"
    annotated, crops = gather(image, boxes)
    images = {"both": [annotated, *crops], "annotated": [annotated],
              "crops": crops, "none": [image]}[evidence]
    text = REASONER.format(regions=REGIONS[evidence], question=question, form=FORMS[answer_form])
    return codec.encode(text, images)


# ---------------------------------------------------------------------------------------------
# A prompt as tensors, and what is sampled from it


@dataclass
class Prompt:
    """One encoded prompt, on the CPU, without padding. `Codec.encode` makes it: the chat template
    around images, then text, in which one token stands for each square of 32 x 32 pixels (in the
    toy: of 16 x 16)."""
    ids: torch.Tensor        # (P,) token ids, every image expanded to its visual tokens
    positions: torch.Tensor  # (3, P) along time, height and width: Qwen's rotary positions, M-RoPE
    pixels: torch.Tensor     # (patches, channels * temporal * patch * patch)
    grids: torch.Tensor      # (images, 3) patches per image along time, height, width


@dataclass
class Completion:
    """One sampled response."""
    ids: torch.Tensor      # (R,) the end token included, where there is one
    logps: torch.Tensor    # (R,) the sampler's log-probs, float32
    ended: bool            # False: cut off by the token limit
    text: str
    parsed: object = None  # crop.Parsed, if it comes from `perceive`

    def __str__(self):
        """The text as people are shown it."""
        return self.text if self.ended else self.text + " [cut off by the token limit]"


@dataclass
class Group:
    """One prompt and its G completions: the unit that GRPO compares, and one row of training."""
    prompt: Prompt
    completions: list

    # A phase of p2r_min.py adds what became of each completion, and what it is worth.
    rollouts: list = field(default_factory=list)  # of p2r_min.Rollout, G
    advantages: torch.Tensor = None               # (G,)


# ---------------------------------------------------------------------------------------------
# The sampler: a table of rows
#
# A row of the table holds one prompt and the keys and values of its G responses, here G = 2:
#
#     column   0 1 2 3 4 5 6 7 8 9 10 11 12 13
#     row 0    p p p p p p p a b a b  a  b  .     P = 7, three tokens each
#     row 1    p p p p a b . . . . .  .  .  .     P = 4, one token each
#     row 2    . . . . . . . . . . .  .  .  .     free: the next prompt moves in
#
# Token t of response g is in column P + t G + g. So what response g may see follows from (P, t, g)
# alone: the prompt, and of the columns c after it its own, where (c - P) % G == g. Nothing is
# padded on the left, and prompts of any length, each at a t of its own, share one decode step.
#
# (A column is only a place to keep things. The position that a token is told, for M-RoPE, counts on
# from the prompt, as if each response were the only one.)
#
# A row is computed as a whole, so a response that has ended keeps drawing until the last one of its
# row has; what it draws is thrown away. Then the row is harvested, and the next prompt moves in. So
# a long response holds up its own row only, and the number of decode steps is close to
# (sum over prompts of the longest response) / rows.
#
# Below the skip line: `InProgress` is a row's prompt and responses, `Table` its keys and values;
# `prefill` reads new prompts into the table, `decode_step` feeds each response's newest token.


@torch.no_grad()
def sample(model, codec, prompts, *, group=1, greedy=False, max_tokens, rows, generator=None,
           penalty=1.0):
    """Sample `group` completions for every prompt. Yields one Group per prompt, in order.

    prompts: any iterable; one is taken whenever a row is free. rows: rows of the table.
    greedy=False is the pure distribution: temperature 1, no top-k, no top-p. It is also what the
    loss scores, so the log-probs of the two agree (metric `sampler_gap`). penalty: evaluation's
    repetition penalty, see `penalised`; training has none.
    Raises InputError if the model's output is not a number, or the GPU's memory runs out.
    """
    model.eval()  # in train mode activation checkpointing switches every cache off
    stops = set(codec.stop_ids.tolist())
    banned = codec.banned.to(model.device)
    prompts = enumerate(prompts)
    table, active = Table(), []  # the rows in use are always the first ones of the table
    finished, due = {}, 0        # groups that wait for an earlier one, and which one is next

    with out_of_memory("sampling", "halve --rollout-batch and --partner-batch (after that, in a "
                                   "new run, --max-pixels or --reason-tokens); of eval.py --batch"):
        while True:
            # 1. Free rows take the next prompts. What their prefill predicts is the first token
            #    of all G responses; older rows are in the middle of theirs.
            taken = itertools.islice(prompts, rows - len(active))
            newcomers = [InProgress(order, prompt, group) for order, prompt in taken]
            if newcomers:
                columns = max(row.P for row in newcomers) + group * max_tokens
                table.reserve(len(newcomers), columns)
                first = prefill(model, table, len(active), newcomers)           # (new, V)
                first = first[:, None].expand(-1, group, -1)                    # (new, G, V)

                # (The older rows' `logits` are from stage 4, below.)
                logits = torch.cat([logits, first]) if active else first        # (n, G, V)
                active += newcomers
            if not active:
                return

            # 2. Every response draws a token, unless the logits are damaged.
            if not logits.isfinite().all():
                raise NotANumber("the model's output is not a number for one of these prompts: its "
                                 "weights are damaged, or an image overflows its number format")
            logits = penalised(logits, active, penalty, codec)
            ids, logps = draw(logits, banned, greedy, generator)                # (n, G) each
            for row, row_ids, row_logps in zip(active, ids.tolist(), logps.tolist()):
                row.take(row_ids, row_logps, stops, max_tokens)

            # 3. Finished rows are harvested. The last row in use moves to the place of a finished
            #    one: the rows in use stay together, and a decode step computes nothing else.
            #    (Backwards, so that the row which moves in has been looked at already.)
            for place in reversed(range(len(active))):
                row = active[place]
                if not row.alive:
                    finished[row.order] = row.as_group(codec)
                    active[place] = active[-1]
                    active.pop()
                    if place < len(active):
                        table.move(len(active), place)
            while due in finished:
                yield finished.pop(due)
                due += 1

            # 4. One forward of the rows that go on.
            if active:
                logits = decode_step(model, table, active)                      # (n, G, V)


def draw(logits, banned, greedy, generator):
    """One token for each response, and its log-prob. logits: (n, G, V). Returns (n, G) twice."""
    scores = logits.float().index_fill(-1, banned, float("-inf")).log_softmax(-1)   # (n, G, V)
    if greedy:
        ids = scores.argmax(-1)                                                 # (n, G)
    else:
        flat = scores.exp().flatten(0, 1)                                       # (n G, V)
        ids = torch.multinomial(flat, 1, generator=generator).view(scores.shape[:2])
    return ids, scores.gather(-1, ids[..., None])[..., 0]


# ---------------------------------------------------------------------------------------------
# Attention for responses that share a prompt


def shared_prefix_attention(query, key, value, lengths, scaling):
    """The prompt is causal; each response sees the prompt and, causally, itself.

    query: (B, heads, L, d); key, value: (B, KV heads, L, d). lengths: P, R1 .. RG of a prompt and
    its responses, which follow each other along L. (B is 1 in training; `prefill` passes B padded
    prompts, without responses.) Returns (B, heads, L, d).

    In training and in `prefill` the library calls it in every layer, through `group_attention`,
    which is registered below as an attention of the library. The lengths come where a mask would,
    as the forward's attention_mask.
    """
    # A dense (L, L) mask says the same, but takes 0.6 GB at L = 25,000 and keeps PyTorch off its
    # flash kernel.
    P, *responses = lengths
    q, k, v = (part.split(lengths, dim=2) for part in (query, key, value))
    how = dict(scale=scaling, enable_gqa=True)
    parts = [F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True, **how)]
    for i, R in enumerate(responses, start=1):
        keys = torch.cat([k[0], k[i]], dim=2)                                   # (B, ., P + R, d)
        values = torch.cat([v[0], v[i]], dim=2)
        parts.append(F.scaled_dot_product_attention(
            q[i], keys, values, attn_mask=causal_lower_right(R, P + R), **how))
    return torch.cat(parts, dim=2)


# ---------------------------------------------------------------------------------------------
# The two verbs. An `example` has .load_image(), .question and .answer_form.


def perceive(model, codec, examples, **how):
    """Examples -> one Group of box lists each; every completion has its boxes in `.parsed`.

    `how` goes to `sample`. Used in training, where one role is sampled and the other is greedy,
    and in evaluation.
    """
    # (`prefetch` makes a few prompts ahead, in threads, while the model is busy.)
    def prompt(example):
        return perceiver_prompt(codec, example.load_image(), example.question)

    for group in sample(model, codec, prefetch(prompt, examples), **how):
        for completion in group.completions:
            completion.parsed = parse_boxes(completion.text)
        yield group


def reason(model, codec, cases, evidence="both", **how):
    """(example, boxes) pairs -> one Group of answers each. `how` goes to `sample`."""
    def prompt(case):
        example, boxes = case
        return reasoner_prompt(codec, example.load_image(), boxes, example.question,
                               example.answer_form, evidence)

    return sample(model, codec, prefetch(prompt, cases), **how)


# =============================================================================================
# Skip on a first reading: what the method needs but does not explain: errors, progress bars,
# encoding, the sampler's table, loading a model, the hub


class InputError(ValueError):
    """Something a user can mend. The message is one sentence; the programs print it and exit 2."""


def need(fine, problem):
    """Raises InputError with this sentence unless `fine`."""
    if not fine:
        raise InputError(problem)


class NotANumber(InputError):
    """The model's output is not a number. Its weights, finite or not, are not worth saving."""


@contextlib.contextmanager
def out_of_memory(doing, remedy):
    """Turns a GPU that is out of memory into an InputError that names the remedy."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(f"the GPU's memory ran out while {doing}: {remedy}") from error


def prefetch(make, items, depth=16):
    """map(make, items), made in threads while the model works. An image of eight megapixels and its
    crops take 1.7 seconds to prepare; `depth` bounds how many wait in memory."""
    items = iter(items)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        waiting = deque(pool.submit(make, item) for item in itertools.islice(items, depth))
        while waiting:
            made = waiting.popleft().result()
            for item in itertools.islice(items, 1):
                waiting.append(pool.submit(make, item))
            yield made


def progress(items, text):
    """A progress bar for what takes longer than a few seconds; it leaves no trace."""
    return tqdm(list(items), text, leave=False, delay=5, unit="prompt", disable=None)


# ---------------------------------------------------------------------------------------------
# A baseline of evaluation: no roles, no reasoning

DIRECT = """{question}

Reply with the answer alone. {form}"""


def direct(model, codec, examples, **how):
    """Examples -> one Group of immediate answers each. `how` goes to `sample`."""
    def prompt(example):
        text = DIRECT.format(question=example.question, form=FORMS[example.answer_form])
        return codec.encode(text, [example.load_image()])

    return sample(model, codec, prefetch(prompt, examples), **how)


# ---------------------------------------------------------------------------------------------
# Text and images <-> tensors


class Codec:
    """Encodes text and images for one model, and decodes its tokens.

    max_pixels: the budget *per image*, the whole image and each crop alike (paper: 2,097,152 in
    training). Larger images are scaled down to it. Smaller ones are scaled up to the checkpoint's
    own `shortest_edge` (an area, 65,536 px for Qwen3-VL), as the authors' loaders do in effect.
    Raises InputError if the budget is smaller than one visual token.
    """

    def __init__(self, folder, model, max_pixels):
        # Images: scaled to a number of pixels, cut into patches. (The PIL back end everywhere:
        # torchvision resizes a little differently, and two machines would see different pixels.)
        config = model.config
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.merge = config.vision_config.spatial_merge_size
        self.token_side = config.vision_config.patch_size * self.merge  # pixels of a visual token
        self.dtype = model.dtype
        need(max_pixels >= self.token_side**2,
             f"--max-pixels {max_pixels} is smaller than one visual token of this model, which "
             f"covers {self.token_side} x {self.token_side} pixels; raise it")
        least = min(self.image_processor.size["shortest_edge"], max_pixels)
        self.size = {"shortest_edge": least, "longest_edge": max_pixels}  # areas, despite the names

        # Text. One token stands for an image; `encode` repeats it for each of its visual tokens.
        self.tokenizer = tokenizer_of(folder)
        self.image_token_id = config.image_token_id
        self.image_token = self.tokenizer.convert_ids_to_tokens(config.image_token_id)

        # The ids that end a response: Qwen has <|im_end|> *and* <|endoftext|>. Nothing else of
        # generation_config is used: its top_k, top_p, temperature would change the distribution.
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        self.stop_ids = torch.tensor(sorted(ends - {None}))

        # A policy can sample vision ids, which would break its next forward: they are banned when
        # sampling, and in the scored distribution too (grpo.response_logprobs).
        self.banned = torch.tensor([config.image_token_id, config.video_token_id,
                                    config.vision_start_token_id, config.vision_end_token_id])

        # Positions, by the library's own M-RoPE. (It reads the config only.)
        self.rope_index = model.model.get_rope_index
        self.max_positions = config.get_text_config().max_position_embeddings

    def encode(self, text, images):
        """One user turn of images, then text -> Prompt.

        Raises InputError if the text contains the token that stands for an image.
        """
        need(self.image_token not in text, f"a question contains {self.image_token}, which stands "
                                           f"for an image: {text[:80]!r}; remove it")

        # Images become patches. In the text the token that stands for an image is repeated, once
        # for each of its visual tokens.
        vision = self.image_processor(images=images, size=self.size, return_tensors="pt")
        counts = vision["image_grid_thw"].prod(dim=1) // self.merge**2          # (images,)
        expanded, *pieces = self.render(text, len(images)).split(self.image_token)
        for count, piece in zip(counts.tolist(), pieces):
            expanded += self.image_token * count + piece
        ids = torch.tensor(self.tokenizer(expanded, add_special_tokens=False)["input_ids"])  # (P,)

        # M-RoPE. A text token advances all three axes together; inside an image height and width
        # count on their own.
        positions, _ = self.rope_index(
            ids[None], mm_token_type_ids=(ids == self.image_token_id).int()[None],
            image_grid_thw=vision["image_grid_thw"])                            # (3, 1, P)
        return Prompt(ids, positions[:, 0], vision["pixel_values"].to(self.dtype),
                      vision["image_grid_thw"])

    def render(self, text, count):
        """One user turn -> the chat template's text, with `count` image tokens before the words."""
        content = [{"type": "image"}] * count + [{"type": "text", "text": text}]
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False,
                                                  add_generation_prompt=True)

    def decode(self, ids):
        """Token ids -> text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def scaled(self, image):
        """The image with the pixels that the model sees."""
        height, width = smart_resize(
            image.height, image.width, self.token_side, self.size["shortest_edge"],
            self.size["longest_edge"])
        return image.resize((width, height), Image.Resampling(self.image_processor.resample))


# ---------------------------------------------------------------------------------------------
# The sampler's table: a row's responses, where keys and values are, the two kinds of forwards

# Prompt tokens in one forward at most (one prompt at least): bounds the memory it works in.
PREFILL = 16_384

# The columns that attention reads are rounded up to this. A GPU likes to see few shapes; on a CPU
# every column costs.
STRIDE = 256 if torch.cuda.is_available() else 16


class InProgress:
    """What a row in use holds: a prompt, and its G responses so far."""

    def __init__(self, order, prompt, group):
        self.order = order                   # groups come out in the order in which they were asked
        self.prompt = prompt
        self.P = len(prompt.ids)
        self.start = prompt.positions.max().item() + 1  # position of every response's first token
        self.responses = [[] for _ in range(group)]     # G lists of (token id, log-prob)
        self.alive = set(range(group))       # the responses that have not ended
        self.t = 0                           # tokens of each response that is alive

        # (G,) the ids drawn last. Responses that have ended keep drawing, as a row is computed as a
        # whole; what they draw is fed to the model, but not kept.
        self.newest = []

    def take(self, ids, logps, stops, max_tokens):
        """Note one token of each response; those that end with it are no longer alive."""
        self.newest = ids
        self.t += 1
        for g in sorted(self.alive):
            self.responses[g].append((ids[g], logps[g]))
            if ids[g] in stops or self.t == max_tokens:
                self.alive.remove(g)

    def as_group(self, codec):
        """The finished row as a Group."""
        completions = []
        for response in self.responses:
            ids, logps = zip(*response)
            ids, logps = torch.tensor(ids), torch.tensor(logps)                 # (R,) each
            ended = torch.isin(ids[-1], codec.stop_ids).item()
            completions.append(Completion(ids, logps, ended, codec.decode(ids)))
        return Group(self.prompt, completions)


class Table:
    """Keys and values of all rows, in place of the library's cache.

    Every layer's are allocated once, and only a longer prompt than all before makes them grow.
    """

    def __init__(self):
        self.rows = self.columns = 0
        self.layers = []  # [keys, values] of each layer, both (rows, columns, KV heads, head dim)

        # Where the next forward writes: indices of rows and columns that broadcast to (n, L). What
        # it attends to: the table's first (rows, columns); None: only what it writes itself.
        self.target = self.read = None

    def reserve(self, rows, columns):
        """Make room for rows of `columns` columns. The first call decides how many rows: it comes
        with as many prompts as there are, or with as many as there are rows."""
        self.rows = self.rows or rows
        if columns > self.columns:
            # By an eighth at least, so that it happens rarely; layer by layer, so that two tables
            # never exist at once. Zeros, because attention multiplies what it does not see by 0.
            columns = max(columns, self.columns * 9 // 8)
            self.columns = -(-columns // STRIDE) * STRIDE
            for layer in self.layers:
                for i, old in enumerate(layer):
                    layer[i] = F.pad(old, (0, 0, 0, 0, 0, self.columns - old.shape[1]))

    def update(self, keys, values, layer, *_, **__):
        """Called by each layer's attention with new keys and values, (n, KV heads, L, head dim).
        Returns those to attend to, (n, KV heads, columns, head dim)."""
        # The first prefill tells how many layers there are, and their sizes.
        if layer == len(self.layers):
            shape = (self.rows, self.columns, keys.shape[1], keys.shape[3])
            self.layers.append([keys.new_zeros(shape), values.new_zeros(shape)])
        for stored, new in zip(self.layers[layer], (keys, values)):
            stored[self.target] = new.transpose(1, 2)
        if self.read is None:
            return keys, values
        n, width = self.read
        return [stored[:n, :width].transpose(1, 2) for stored in self.layers[layer]]

    def move(self, source, target):
        """Copy a row over another one."""
        for layer in self.layers:
            for stored in layer:
                stored[target] = stored[source]


def prefill(model, table, place, newcomers):
    """Read new prompts into the table's rows from `place` on. Returns next-token logits (n, V).

    Prompts are padded on the right: no token sees what comes after it, so plain causal attention
    hides the padding, and responses later overwrite it.
    """
    parts, size = [], max(1, PREFILL // max(row.P for row in newcomers))
    for start in range(0, len(newcomers), size):
        prompts = [row.prompt for row in newcomers[start:start + size]]
        inputs = right_padded(prompts, model.device)
        n, P = inputs["input_ids"].shape
        rows = torch.arange(place + start, place + start + n, device=model.device)
        table.target = rows[:, None], torch.arange(P, device=model.device)
        table.read = None

        # A layout (see group_attention) of a prompt without responses means: causal.
        hidden = model.model(**inputs, attention_mask=torch.tensor([[[[P]]]]), use_cache=True,
                             **{CACHE: table}).last_hidden_state                # (n, P, hidden)
        last = torch.tensor([len(prompt.ids) - 1 for prompt in prompts], device=model.device)
        parts.append(model.lm_head(hidden[torch.arange(n, device=model.device), last]))
    return torch.cat(parts)                                                     # (n, V)


def right_padded(prompts, device):
    """n Prompts -> one batch of model inputs, (n, P) tokens, padded on the right."""
    ids = pad_sequence([p.ids for p in prompts], batch_first=True)              # (n, P)
    positions = pad_sequence([p.positions.T for p in prompts], batch_first=True)    # (n, P, 3)
    return {"input_ids": ids.to(device),
            "position_ids": positions.permute(2, 0, 1).to(device),
            "pixel_values": torch.cat([p.pixels.to(device) for p in prompts]),
            "image_grid_thw": torch.cat([p.grids for p in prompts]).to(device)}


def decode_step(model, table, active):
    """One step: each response's newest token goes in. Returns next-token logits (n, G, V)."""
    n, G, device = len(active), len(active[0].responses), model.device
    newest = torch.tensor([row.newest for row in active], device=device)        # (n, G)
    facts = torch.tensor([(row.P, row.t - 1, row.start) for row in active], device=device)
    P, t, start = facts.T[:, :, None]                                           # (n, 1) each
    own = P + t * G + torch.arange(G, device=device)                            # (n, G) columns

    # What a response sees, by the arithmetic of the drawing. The mask is made once a step in the
    # form in which attention adds it: the query heads that share a KV head are further queries.
    width = max(row.P + row.t * G for row in active)
    width = -(-width // STRIDE) * STRIDE
    columns = torch.arange(width, device=device)
    back = own[:, :, None] - columns                                            # (n, G, width)
    own_earlier = (back >= 0) & (back % G == 0)
    seen = (columns < P[:, :, None]) | own_earlier
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=device)
    mask = mask.masked_fill(~seen, float("-inf"))
    config = model.config.get_text_config()
    mask = mask.repeat(1, config.num_attention_heads // config.num_key_value_heads, 1)[:, None]

    # All three axes of a text token's position are equal, and count on from the prompt's highest.
    table.target = torch.arange(n, device=device)[:, None], own
    table.read = n, width
    return model(input_ids=newest, position_ids=(start + t).expand(3, n, G), attention_mask=mask,
                 use_cache=True, **{CACHE: table}).logits


def penalised(logits, active, penalty, codec):
    """Evaluation's repetition penalty (CTRL, arXiv 1909.05858), over prompt and response.

    At 1, as in training, the logits (n, G, V) are as they were.
    """
    if penalty == 1:
        return logits
    past = []
    for row in active:
        for response in row.responses:
            drawn = torch.tensor([token for token, _ in response], dtype=torch.long)
            past.append(torch.cat([row.prompt.ids, drawn]))

    # Padded with a token that is banned anyway, so that it moves no score.
    past = pad_sequence(past, batch_first=True, padding_value=codec.banned[0].item())
    process = RepetitionPenaltyLogitsProcessor(penalty)
    scores = process(past.to(logits.device), logits.flatten(0, 1).float())      # (n G, V)
    return scores.view(logits.shape)


def group_attention(module, query, key, value, mask, scaling, **more):
    """The language model's attention, as the library calls it. Returns ((B, L, heads, d), None).

    query: (B, heads, L, d); key, value: (B, KV heads, columns, d). Three callers, told apart by
    their mask (the library hands 4-D masks through untouched):

    bool or None               the library's own, in its `generate`.
    int64 (1, 1, 1, 1 + G)     prefill and training: no mask, but the lengths P, R1 .. RG.
    float (n, 1, q, columns)   a step of the sampler: what `decode_step` made.
    """
    if mask is None or mask.dtype == torch.bool:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **more)
    if mask.dtype == torch.long:
        output = shared_prefix_attention(query, key, value, mask.flatten().tolist(), scaling)
        return output.transpose(1, 2), None

    # Query heads that share a KV head become further queries of it: repeating the keys instead, as
    # is usual, would copy the table at every step.
    folded = query.reshape(*key.shape[:2], -1, query.shape[3])          # (n, KV heads, q, d)
    output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(query.shape).transpose(1, 2), None


AttentionInterface.register("group", group_attention)
AttentionMaskInterface.register("group", sdpa_mask)  # the library's masks, where it makes one


# ---------------------------------------------------------------------------------------------
# Loading a model

# The library's name for the cache that a forward takes; the old one is gone from 5.40 on.
NEW_NAME = "cache" in inspect.signature(Qwen3VLModel.forward).parameters
CACHE = "cache" if NEW_NAME else "past_key_values"


class FusedRMSNorm(Qwen3VLTextRMSNorm):
    """The library's norm as one kernel; its own is six, a third of a decode step's launches."""

    def forward(self, hidden):
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)


class LinearPatchEmbed(Qwen3VLVisionPatchEmbed):
    """The library's patch embedding: a convolution over exactly one patch is a linear layer on the
    same parameter, and takes a quarter of the time (an image on an H100: 0.36 ms, not 1.5)."""

    def forward(self, patches):
        weight = self.proj.weight.flatten(1)                                    # (hidden, patch)
        return F.linear(patches.to(weight.dtype), weight, self.proj.bias)


def quicken(model):
    """Replace two slow layer classes of the library by the faster ones above. Parameters and their
    names stay, so checkpoints do, too."""
    quick = {Qwen3VLTextRMSNorm: FusedRMSNorm, Qwen3VLVisionPatchEmbed: LinearPatchEmbed}
    for module in model.modules():
        if type(module) in quick:
            module.__class__ = quick[type(module)]
    return model


def load(folder, max_pixels, device=None):
    """A local Qwen3-VL folder -> (model in eval mode, Codec).

    bf16 on a GPU, float32 on a CPU; without `device` on a GPU if there is one. Raises InputError
    where the folder is not a Qwen3-VL checkpoint or the budget is too small.
    """
    folder = Path(folder)
    need((folder / "config.json").is_file(),
         f"{folder} is not a model folder: it has no config.json")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    # On Hopper cuDNN is the first choice of PyTorch's attention. It makes a plan for every new
    # shape (0.1 to 2 s on an H100), and with prompts and responses of all lengths nearly every
    # shape is new.
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        need(kind == "qwen3_vl", f"{folder} holds a {kind} model; this code knows Qwen3-VL only")

        # Safetensors only: pickled weights (.bin, .pt) could run code. They are never opened.
        # (Vision layers attend image by image, without a mask: they need no attention of ours.)
        model, loading = Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
            use_safetensors=True, output_loading_info=True,
            attn_implementation={"text_config": "group", "vision_config": "sdpa"})

        # The library would begin with random numbers where the file has none.
        missing = sorted(loading["missing_keys"])
        if missing:
            raise InputError(f"{folder} lacks {len(missing)} of the model's weights, such as "
                             f"{missing[0]}: its files are incomplete")
        codec = Codec(folder, model, max_pixels)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"the model folder {folder} cannot be loaded: "
                         f"{' '.join(str(error).split())}") from error
    return quicken(model).to(device).eval(), codec


def tokenizer_of(folder):
    """The tokenizer with its chat template. Raises InputError where there is none."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    template = Path(folder, "chat_template.json")  # some repositories keep it beside
    if tokenizer.chat_template is None and template.is_file():
        tokenizer.chat_template = json.loads(template.read_text())["chat_template"]
    need(tokenizer.chat_template, f"{folder} has no chat template: is it an Instruct model?")
    return tokenizer


TEXT_TOKENS = 512  # room for the text of a prompt. At the paper's budget of 2048 visual tokens an
#                    image it gives the paper's prompt limits: 2048 + 512 and 4 x 2048 + 512.


def fitting(codec, examples, response_tokens, skip_bad=False):
    """The examples whose text fits into both roles' prompts.

    A text may have TEXT_TOKENS tokens; the prompt (an image, all crops, the text) and the response
    together as many as the model has positions. No image is opened: the pixel budget bounds them.
    Raises InputError that lists the first ten that don't fit; with `skip_bad` they are printed and
    left out. Raises it, too, if there is no room for any text.
    """
    # Visual tokens are taken at their most, so that the boxes cannot matter.
    visual = (1 + MAX_CROPS) * (codec.size["longest_edge"] // codec.token_side**2)
    limit = min(TEXT_TOKENS, codec.max_positions - visual - response_tokens)
    need(limit > 0, f"{visual} visual tokens and a response of {response_tokens} leave no room for "
                    f"text in the model's {codec.max_positions} positions: lower --max-pixels, "
                    f"--perceive-tokens or --reason-tokens")
    fit, bad = [], []
    for example in examples:
        # The text around the images counts, too: their tokens' stand-ins, the chat's own.
        reasoner = REASONER.format(regions=REGIONS["both"], question=example.question,
                                   form=FORMS[example.answer_form])
        rendered = (codec.render(PERCEIVER.format(question=example.question), 1),
                    codec.render(reasoner, 1 + MAX_CROPS))
        ids = codec.tokenizer(list(rendered), add_special_tokens=False)["input_ids"]
        text = max(map(len, ids))
        if codec.image_token in example.question:
            bad.append(f"{example.id} (contains {codec.image_token}, which stands for an image)")
        elif text > limit:
            bad.append(f"{example.id} ({text} tokens of text, {limit} allowed)")
        else:
            fit.append(example)

    if bad:
        told = (f"{len(bad)} of {len(examples)} questions do not fit into a prompt: "
                f"{', '.join(bad[:10])}")
        need(skip_bad and fit, f"{told}; shorten them, or leave them out with --skip-bad")
        print(f"skipped: {told}")
    return fit


# ---------------------------------------------------------------------------------------------
# The hub and the cache folder


def find(name, flag="--model", kind="model"):
    """A local path as it is; anything else is a hub id, downloaded once -> Path.

    `owner/name/path` is one file or folder of a hub repository. kind: "model" or "dataset".
    Raises InputError that names `flag`.
    """
    path = Path(name).expanduser()
    need(kind != "model" or not (path / "metrics.jsonl").is_file(),
         f"{flag} {name} is a training run, not a model: once it has finished, its weights are in "
         f"{path / 'final'}")
    if path.exists():
        return path

    # What looks like a path, or begins with a folder that is here, is a typo and no hub id.
    owner, _, rest = str(name).partition("/")
    repository, _, inside = rest.partition("/")
    need(re.fullmatch(r"[\w-][\w.-]*", owner) and repository and not Path(owner).exists(),
         f"{flag} {name}: there is no such file or folder, and it does not look like a hub id "
         f"(owner/name)")
    repository = f"{owner}/{repository}"
    if kind == "dataset":
        # Refused before gigabytes come down. (If the hub cannot be asked, the download says why, or
        # has it all from before.)
        listed, below = [], f"{inside}/" if inside else ""
        with contextlib.suppress(Exception):
            listed = list_repo_files(repository, repo_type="dataset")
        one_data_set([f[len(below):] for f in listed if f.startswith(below)], name, flag)
    try:
        wanted = [SHARD.sub("-*-of-", inside), f"{inside}/*"] if inside else None
        folder = Path(snapshot_download(repository, repo_type=kind, allow_patterns=wanted))
    except Exception as error:  # the hub's many errors share no narrower class across its versions
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{flag} {name}: there is no such file or folder, and the hub did not "
                         f"give it ({reason})") from error
    need((folder / inside).exists(), f"{flag} {name}: the hub's {repository} has no {inside}")
    return folder / inside


DATA_FILES = (".jsonl", ".json", ".tsv", ".csv", ".parquet")
SHARD = re.compile(r"-\d+-of-")  # of a data file in several parts: x-00001-of-00007.parquet


def one_data_set(files, name, flag):
    """Of the paths inside the folder or hub repository `name` those of its one data set: a file, or
    all of its shards; [] if there is none. Raises InputError where there are several."""
    # What begins with a dot holds no data: version control and caches keep JSON of their own.
    files = sorted(f for f in files if f.endswith(DATA_FILES) and not f.startswith("."))

    # Beside a data.jsonl other names (annotations among the images, say) don't count. But one set
    # in two formats would be read twice, and halve the error bar.
    if "data.jsonl" in files:
        files = [f for f in files if f.rpartition(".")[0] == "data"]
    choice = " or ".join(f"{name}/{f}" for f in files[:4])
    need(len({SHARD.sub("-of-", f) for f in files}) <= 1,
         f"{flag} {name} holds several data files: name one of them, as {choice}")
    return files


def cached(name, fill):
    """The folder `name` in ~/.cache/p2r-min (or $XDG_CACHE_HOME), made once by fill(folder).

    Returns its Path. It appears under its name only when it is complete. Raises InputError where it
    cannot be written.
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
        # Another process may have been faster; what it wrote is the same.
        if not folder.exists():
            raise InputError(f"cannot write {folder} ({error}): free some space, or set "
                             f"XDG_CACHE_HOME to a folder that has it") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder
