"""Text -> boxes -> evidence: what happens between the two roles. Pillow only.

The Perceiver answers with text. This module turns the text into boxes, the boxes into what the
Reasoner is shown (an annotated copy of the image and up to three enlarged crops), and all of it
into one picture for people. Paper: arXiv 2607.01191, "Evidence" step of the inference pipeline.

Coordinates come in two kinds and never mix:
    a *Box*  lives in 0..1000 on both axes, relative to width and height (the Qwen convention);
    a *rect* lives in pixels of the original image: (left, top, right, bottom), right/bottom open.
The model's text is data: it is never evaluated, and no pattern here backtracks.
"""

import json
import math
import re
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

MAX_CROPS = 3          # every box is drawn, only the first three are cropped (paper)
PAD_SHARE = 0.10       # a crop grows by 10 % of the image's size on each side ...
PAD_PIXELS = 600       # ... but by at most this many pixels (paper)
MAX_RATIO = 200        # longest side by shortest that Qwen's image processor accepts
MAX_IOU = 0.5          # two boxes that overlap more than this void a perception rollout (paper)
WHOLE = 0.9            # a box of at least this share of the image points at nothing
NESTED = 0.9           # a box with at least this share of its area inside another one is nested in it
COLOURS = {"red": "#ff0000", "green": "#00c800", "blue": "#0060ff", "orange": "#ff9000",
           "purple": "#a000ff", "cyan": "#00c8dc"}  # one per box, red first, then round again
PLACEHOLDER = "what is inside"  # the label of the example in the Perceiver's prompt; a copy earns 0


class Box(NamedTuple):
    """One region, 0..1000 on both axes, x1 < x2 and y1 < y2."""
    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""


class Parsed(NamedTuple):
    """What was read from one Perceiver output."""
    boxes: list            # the usable boxes, in the model's order
    parsable: bool         # False: neither a usable box nor an explicit `[]` was found
    dropped: int           # JSON objects that looked like boxes but were not usable


# ---------------------------------------------------------------------------------------------
# Text -> boxes


def parse_boxes(text):
    """Read the Perceiver's boxes from its text.

    A box is a flat JSON object, so every innermost {...} is read on its own. That one idea covers
    code fences, prose around the list, wrappers such as {"objects": [...]}, a stray brace and a
    list that was cut off by the token limit, in time linear in the text.

    Returns a Parsed. Never raises: whatever the text is, it is an answer of the model.

    >>> parse_boxes('[{"bbox_2d": [10, 20, 300, 400], "label": "sign"}]').boxes
    [Box(x1=10.0, y1=20.0, x2=300.0, y2=400.0, label='sign')]
    >>> parse_boxes("[]"), parse_boxes("I see a sign.")
    (Parsed(boxes=[], parsable=True, dropped=0), Parsed(boxes=[], parsable=False, dropped=0))
    """
    boxes, dropped = [], 0
    for found in re.findall(r"\{[^{}]*\}", text):
        box = _read_box(found)
        if box is None:
            dropped += 1
        else:
            boxes.append(box)
    empty_list = not boxes and not dropped and re.search(r"\[\s*\]", text) is not None
    return Parsed(boxes, bool(boxes) or empty_list, dropped)


def _read_box(text):
    """One {...} -> Box, or None where it holds no four usable numbers."""
    fields = _loads(text) or _loads(text.replace("'", '"'))  # Python-style quotes are common
    if not fields:
        return None
    value = next((fields[key] for key in ("bbox_2d", "bbox", "box_2d", "box") if key in fields), None)
    if isinstance(value, list) and len(value) == 1:  # [[x1, y1, x2, y2]]
        value = value[0]
    if not isinstance(value, list) or len(value) != 4:  # null, an integer, nine numbers of a 3-D box
        return None
    numbers = [_number(v) for v in value]
    if None in numbers:
        return None
    x1, y1, x2, y2 = (min(max(n, 0.0), 1000.0) for n in numbers)
    (x1, x2), (y1, y2) = sorted((x1, x2)), sorted((y1, y2))  # inverted corners mean the same region
    if x1 == x2 or y1 == y2:  # no area, or wholly outside the image
        return None
    label = fields.get("label")
    return Box(x1, y1, x2, y2, "" if label is None else str(label).strip())


def _loads(text):
    """A JSON object as a dict, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _number(value):
    """A finite float from a JSON number or a numeric string, else None. Booleans are no numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def iou(a, b):
    """Intersection over union of two boxes (or two rects), 0..1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def violation(boxes):
    """Why these boxes void a perception rollout: "label", "overlap" or None (paper, reward rule).

    The rule keeps the Perceiver from winning by repeating one region or by copying the example.
    """
    if any(box.label.lower() in ("", PLACEHOLDER, "label") for box in boxes):
        return "label"
    if any(iou(a, b) > MAX_IOU for i, a in enumerate(boxes) for b in boxes[:i]):
        return "overlap"
    return None


def tricks(parsed):
    """Ways around pointing that `violation` leaves open, as a set: "whole" (a box over the whole image), "nested" (one box
    inside another, yet below MAX_IOU), "many" (more boxes than crops), "unparsable" (earns what `[]` earns).

    All are logged. With --strict-boxes they earn 0; in the paper, and by default, they don't.
    """
    found = {"many"} if len(parsed.boxes) > MAX_CROPS else set()
    found |= set() if parsed.parsable else {"unparsable"}
    for i, a in enumerate(parsed.boxes):
        area = (a.x2 - a.x1) * (a.y2 - a.y1)
        found |= {"whole"} if area >= WHOLE * 1000**2 else set()
        for b in parsed.boxes[:i] + parsed.boxes[i + 1:]:
            width, height = min(a.x2, b.x2) - max(a.x1, b.x1), min(a.y2, b.y2) - max(a.y1, b.y1)
            found |= {"nested"} if min(width, height) > 0 and width * height >= NESTED * area else set()
    return found


# ---------------------------------------------------------------------------------------------
# Boxes -> evidence


def to_rgb(image):
    """Any picture as a person sees it: upright, 8-bit RGB, what is transparent on white.

    Raises ValueError for floating point images, whose white nobody knows.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("a floating point image has no defined white; convert it to 8 bits a channel")
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip it to white
        values = np.asarray(image).clip(0, 65535).astype(np.uint16)
        return Image.fromarray((values >> (8 if values.max() > 255 else 0)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_rect(box, size):
    """A Box -> pixels of an image of size (width, height): inside it, at least 1 x 1."""
    width, height = size
    left = min(int(box[0] / 1000 * width), width - 1)
    top = min(int(box[1] / 1000 * height), height - 1)
    right = min(max(math.ceil(box[2] / 1000 * width), left + 1), width)
    bottom = min(max(math.ceil(box[3] / 1000 * height), top + 1), height)
    return left, top, right, bottom


def padded(rect, size):
    """A rect with context around it: min(10 % of that dimension, 600 px) on each side (paper).

    On images more than 20 times as long as wide it is a little more, or a sliver along an edge
    would be thinner than the image processor accepts.
    """
    pad_x, pad_y = (max(min(int(side * PAD_SHARE), PAD_PIXELS), math.ceil(other / MAX_RATIO))
                    for side, other in (size, size[::-1]))
    return (max(rect[0] - pad_x, 0), max(rect[1] - pad_y, 0),
            min(rect[2] + pad_x, size[0]), min(rect[3] + pad_y, size[1]))


def gather(image, boxes):
    """The evidence: (annotated copy of the image, list of at most three crops).

    Boxes are drawn on, and crops are cut from, the *original* resolution: the detail is still
    there, it is only the model's view of the whole image that is too coarse for it. Crops are cut
    before anything is drawn. Without boxes the annotated copy is the image itself.
    """
    rects = [to_rect(box, image.size) for box in boxes]
    crops = [image.crop(padded(rect, image.size)) for rect in rects[:MAX_CROPS]]
    if not rects:
        return image, crops
    annotated = image.copy()
    draw = ImageDraw.Draw(annotated)
    line = max(3, round(0.003 * image.width))
    for rect, colour in zip(rects, _cycle(len(rects))):
        # Pillow's rectangle includes its right and bottom edge.
        draw.rectangle((rect[0], rect[1], rect[2] - 1, rect[3] - 1), outline=colour, width=line)
    return annotated, crops


def _cycle(count):
    colours = list(COLOURS.values())
    return [colours[i % len(colours)] for i in range(count)]


# ---------------------------------------------------------------------------------------------
# Evidence -> one picture for people


def picture(image, boxes, question, texts, width=1200):
    """One image that tells the whole story: annotated image, numbered crops, question, texts.

    image: the original (RGB), of any size and shape: the layout follows its shape, the text is always
    20 pixels high (Latin letters only: that is what Pillow's own font has). boxes: list of Box. texts: list of (title, text) written below, such
    as ("perceiver", "[...]"). Returns an RGB image `width` pixels wide; its height follows.
    """
    _, crops = gather(image, boxes)
    gap, font, line_height = 20, ImageFont.load_default(20), 28
    inner = width - 2 * gap
    count, row = max(len(crops), 1), True
    if image.width > 2 * image.height or not crops:      # a panorama: crops in a row below
        main = _fit(image, inner, 700)
        left, top, tall = gap, main.height + 2 * gap, 420
    else:                                                # else beside it: in a row if it is upright, in a column if not
        main = _fit(image, inner * 2 // 3 - gap, 760)
        left, top, row = main.width + 2 * gap, gap, image.height > 1.3 * image.width
        tall = max(main.height, 450) if row else (max(main.height, 450) + gap) // count - gap
    each = (width - left) // count - gap if row else width - left - gap
    main, _ = gather(main, boxes)                        # drawn again at this scale, or thin lines would vanish
    placed = [(main, gap, gap)]
    for crop in crops:
        placed.append((_fit(crop, each, tall), left, top))
        left, top = (left + placed[-1][0].width + gap, top) if row else (left, top + placed[-1][0].height + gap)
    top = max(y + max(tile.height, line_height) for tile, _, y in placed) + gap
    lines = _wrap([("question", question), *texts], font, inner)
    page = Image.new("RGB", (width, top + line_height * len(lines) + gap), "white")
    draw = ImageDraw.Draw(page)
    for number, ((tile, x, y), colour) in enumerate(zip(placed, ["#cccccc", *_cycle(len(crops))])):
        page.paste(tile, (x, y))
        draw.rectangle((x - 4, y - 4, x + tile.width + 3, y + tile.height + 3), outline=colour, width=4 if number else 1)
        if number:
            draw.rectangle((x, y, x + 26, y + 28), fill=colour)
            draw.text((x + 8, y + 2), str(number), fill="white", font=font)
    for row, (title, line) in enumerate(lines):
        draw.text((gap, top + row * line_height), title, fill="#888888", font=font)
        draw.text((gap + 130, top + row * line_height), line, fill="black", font=font)
    return page


def _fit(image, width, height):
    """Scale an image, up or down, to fit into width x height; never to nothing. Blown-up pixels stay sharp."""
    scale = min(width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.NEAREST if scale > 4 else Image.Resampling.LANCZOS)


def _wrap(texts, font, width):
    """[(title, text)] -> [(title or "", line)], each line at most `width` - 130 px wide."""
    lines = []
    for title, text in texts:
        for paragraph in text.split("\n"):
            line = ""
            for word in re.findall(r"\S{1,40}\s*|\s+", paragraph) or [""]:
                if line and font.getlength(line + word) > width - 130:
                    lines.append((title, line))
                    title, line = "", ""
                line += word
            lines.append((title, line))
            title = ""
    return lines
