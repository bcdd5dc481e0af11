"""Text -> boxes -> evidence: what happens between the two roles.

The Perceiver answers with text. This module turns the text into boxes, and the boxes into what the
Reasoner is shown: an annotated copy of the image, and up to three crops of its full resolution, on
each of which the model can spend as many pixels as on the whole image. Paper: arXiv 2607.01191, the
evidence step of its inference pipeline.

Coordinates come in two kinds and never mix:
    a *Box*  lives in 0..1000 on both axes, relative to width and height (the Qwen convention);
    a *rect* lives in pixels of the original image: (left, top, right, bottom), right/bottom open.

The model's text is data. It is never evaluated, and every reader here takes time linear in it.
"""

import itertools
import json
import math
import re
import textwrap
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

MAX_CROPS = 3          # every box is drawn, only the first three are cropped (paper)
PAD_SHARE = 0.10       # a crop grows by 10 % of the image's size on each side ...
PAD_PIXELS = 600       # ... but by at most this many pixels (paper)
MAX_IOU = 0.5          # two boxes that overlap more than this void a rollout (paper)
WHOLE = 0.9            # a box of at least this share counts as the whole image (a metric only)
MAX_RATIO = 200        # longest side by shortest that Qwen's image processor accepts
PLACEHOLDER = "what is inside"  # the label of the example in the Perceiver's prompt
COLOURS = {            # one per box, red first, then round again
    "red": "#ff0000", "green": "#00c800", "blue": "#0060ff",
    "orange": "#ff9000", "purple": "#a000ff", "cyan": "#00c8dc",
}


class Box(NamedTuple):
    """One region, 0..1000 on both axes, x1 < x2 and y1 < y2."""
    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""

    @property
    def area(self):
        """Share of the image, 0..1."""
        return (self.x2 - self.x1) * (self.y2 - self.y1) / 1000**2


class Parsed(NamedTuple):
    """What was read from one Perceiver output."""
    boxes: list            # the usable boxes, in the model's order
    parsable: bool         # False: neither a usable box nor an explicit `[]` was found


# ---------------------------------------------------------------------------------------------
# Text -> boxes

# Where a JSON object begins: a brace, then its first key. A brace inside a label is no beginning.
OBJECT = re.compile(r"""\{\s*["']\w+["']\s*:""")
BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box")
DECODER = json.JSONDecoder(strict=False)  # a label may hold a raw new line


def parse_boxes(text):
    """Read the Perceiver's boxes from its text -> Parsed.

    The text is cut wherever an object begins, and each piece is read on its own. That one idea
    covers code fences, prose around the list, wrappers such as {"objects": [...]}, stray braces,
    and a list that was cut off by the token limit. Swapped corners are put in order, and what
    reaches beyond the image is cut off (`_read_box`).

    Never raises: whatever the text is, it is an answer of the model.

    >>> parse_boxes('[{"bbox_2d": [10, 20, 300, 400], "label": "sign"}]').boxes
    [Box(x1=10.0, y1=20.0, x2=300.0, y2=400.0, label='sign')]
    >>> parse_boxes("[]"), parse_boxes("I see a sign.")
    (Parsed(boxes=[], parsable=True), Parsed(boxes=[], parsable=False))
    """
    starts = [match.start() for match in OBJECT.finditer(text)]
    ends = starts[1:] + [len(text)]
    boxes, broken = [], False
    for start, end in zip(starts, ends):
        piece = text[start:end]

        # Without a key of ours it is no broken box, but a wrapper.
        if not any(f"{key}{quote}" in piece for key in BOX_KEYS for quote in "\"'"):
            continue
        box = _read_box(piece)
        if box is None:
            broken = True
        else:
            boxes.append(box)

    # `[]` says "the whole image is needed", unless it is what is left of a broken box.
    empty_list = not broken and re.search(r"\[\s*\]", text) is not None
    return Parsed(boxes, bool(boxes) or empty_list)


# ---------------------------------------------------------------------------------------------
# The rule that voids a perception rollout


def violation(boxes):
    """Why these boxes void a perception rollout: "label", "overlap" or None (paper, reward rule).

    The rule keeps the Perceiver from winning by repeating one region or by copying the example
    of its prompt. A label is void if it is missing, empty, or that example's.
    """
    for box in boxes:
        if box.label.lower() in ("", PLACEHOLDER):
            return "label"
    for i, box in enumerate(boxes):
        for other in boxes[:i]:
            if iou(box, other) > MAX_IOU:
                return "overlap"
    return None


# ---------------------------------------------------------------------------------------------
# Boxes -> evidence


def gather(image, boxes):
    """The evidence: (annotated copy of the image, list of at most three crops).

    Boxes are drawn on, and crops are cut from, the *original* resolution: the detail is still
    there, only the model's view of the whole image is too coarse for it. Without boxes the
    annotated copy is the image itself, and there are no crops.
    """
    if not boxes:
        return image, []
    rects = [to_rect(box, image.size) for box in boxes]

    # Crops are cut from the image without lines: one might hide what they are to show.
    crops = [image.crop(padded(rect, image.size)) for rect in rects[:MAX_CROPS]]

    # The line is as wide as in the paper. Pillow's rectangle includes its right and bottom edge.
    annotated = image.copy()
    draw = ImageDraw.Draw(annotated)
    line = max(3, round(0.003 * image.width))
    for (left, top, right, bottom), colour in zip(rects, itertools.cycle(COLOURS.values())):
        draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=line)
    return annotated, crops


def to_rect(box, size):
    """A Box -> a rect of an image of size (width, height): inside it, at least 1 x 1.

    Rounded outwards, to whole pixels that hold all of the box. (The authors round inwards, so a
    crop of theirs may be a pixel smaller.)
    """
    # Floor on one side, ceiling on the other; a box without a whole pixel is given one.
    width, height = size
    left = min(int(box.x1 * width / 1000), width - 1)
    top = min(int(box.y1 * height / 1000), height - 1)
    right = min(max(math.ceil(box.x2 * width / 1000), left + 1), width)
    bottom = min(max(math.ceil(box.y2 * height / 1000), top + 1), height)
    return left, top, right, bottom


def padded(rect, size):
    """A rect with context around it: min(10 % of that dimension, 600 px) on each side (paper).

    Where that is less than a 200th of the other side (MAX_RATIO) it is a little more, or a crop
    along an edge would be thinner than the image processor accepts.
    """
    # Each axis has its own margin, and the crop stays inside the image.
    width, height = size
    pad_x = max(min(int(width * PAD_SHARE), PAD_PIXELS), math.ceil(height / MAX_RATIO))
    pad_y = max(min(int(height * PAD_SHARE), PAD_PIXELS), math.ceil(width / MAX_RATIO))
    left, top, right, bottom = rect
    return (max(left - pad_x, 0), max(top - pad_y, 0),
            min(right + pad_x, width), min(bottom + pad_y, height))


# =============================================================================================
# Skip on a first reading: single values, any image as RGB, and the picture for people


def _read_box(piece):
    """Text that begins with an object -> Box, or None where it holds no four usable numbers."""
    # Python-style quotes are common, and so are quotes inside a label: "a sign with "EXIT" on it".
    fields = _read_object(piece) or _read_object(piece.replace("'", '"'))
    fields = fields or _read_object(_quotes_escaped(piece))
    if not fields:
        return None
    found = [fields[key] for key in BOX_KEYS if key in fields]
    value = found[0] if found else None

    # Seen in the wild and meant well: [[x1, y1, x2, y2]]. Not meant as a box of ours: null, an
    # integer, the nine numbers of a 3-D box.
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, list) or len(value) != 4:
        return None
    numbers = [_read_number(v) for v in value]
    if None in numbers:
        return None

    # Inverted corners mean the same region. What reaches beyond the image is cut off; a box that
    # is wholly outside has no area left.
    x1, y1, x2, y2 = [min(max(number, 0.0), 1000.0) for number in numbers]
    x1, x2 = sorted((x1, x2))
    y1, y2 = sorted((y1, y2))
    if x1 == x2 or y1 == y2:
        return None

    # A missing label and a null are empty ones: `violation` knows what to think of them.
    label = fields.get("label")
    return Box(x1, y1, x2, y2, "" if label is None else str(label).strip())


def _quotes_escaped(piece):
    """The same piece with the quotes inside its label escaped, if the label comes last."""
    found = re.search(r'"label"\s*:\s*"', piece)
    if not found:
        return ""

    # The label ends with the last quote that there is.
    label, _, rest = piece[found.end():].rpartition('"')
    return piece[:found.end() - 1] + json.dumps(label) + rest


def _read_object(piece):
    """The JSON object at the beginning of a text, as a dict; None where there is none."""
    try:
        value, _ = DECODER.raw_decode(piece)
    except (ValueError, RecursionError):
        return None
    return value


def _read_number(value):
    """A JSON number or a numeric string -> a finite float, else None. A boolean is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def iou(a, b):
    """Intersection over union of two boxes, 0..1."""
    width = max(min(a.x2, b.x2) - max(a.x1, b.x1), 0)
    height = max(min(a.y2, b.y2) - max(a.y1, b.y1), 0)
    shared = width * height
    area_a = (a.x2 - a.x1) * (a.y2 - a.y1)
    area_b = (b.x2 - b.x1) * (b.y2 - b.y1)
    return shared / (area_a + area_b - shared)


def to_rgb(image):
    """Any picture as a person sees it: upright, 8-bit RGB, what is transparent on white.

    Raises ValueError for floating point images, whose white nobody knows.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("a floating point image has no defined white; convert it to 8-bit RGB")

    # 16 bits a pixel: Pillow's own conversion would clip them to white. An image without a value
    # above 255 is taken for 8 bits in a wider format.
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535)
        if values.max() > 255:
            values = values // 256
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")

    # What is transparent: on white, as a viewer on a page shows it.
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


PAGE = 1200            # width of the picture for people; its height follows. All in pixels
GAP = 20
CELL = 256             # side of a small tile, at most: four of them fill a row
MAIN = PAGE - 2 * CELL - 4 * GAP  # the large one leaves room for two of them beside it
CAPTION = 24
LINE = 28              # a line of text below the tiles
INDENT = 130           # where the text itself begins, after its title
CHARACTERS = 76        # of one line: even capitals fit into the page
MOST_LINES = 200       # of one text


def picture(image, boxes, question, texts, scaled):
    """One picture that tells the whole story of a rollout. Returns an RGB image, PAGE wide.

    image: the original (RGB), of any size and shape; it is shown large, with the boxes drawn.
    scaled: gives an image the pixels that the model sees (Codec.scaled). The whole image and the
    first crop are shown so, too: what cannot be seen there is why the model must point. texts: list
    of (title, text) written below, such as ("perceiver", "[...]"). Latin letters only: that is
    what Pillow's own font has.
    """
    # The large image. Its boxes are drawn at the page's scale: the original's lines might vanish.
    wide = image.width > 2 * image.height
    main = _fit(image, PAGE - 2 * GAP if wide else MAIN, MAIN)
    main, _ = gather(main, boxes)
    _, crops = gather(image, boxes)

    # The small tiles: (image, caption, colour of the frame).
    tiles = []
    for number, view in enumerate([image, *crops[:1]]):
        view = scaled(view)
        what = "what it sees of crop 1" if number else "what the model sees"
        tiles.append((view, f"{what}: {view.width} x {view.height}", "#000000"))
    for number, (crop, colour) in enumerate(zip(crops, COLOURS.values()), start=1):
        tiles.append((crop, f"crop {number}", colour))
    tiles = [(_fit(tile, CELL, CELL), *more) for tile, *more in tiles]

    # They stand in rows: beside the large image, or below it if it takes the whole width.
    first = GAP if wide else 2 * GAP + main.width
    x, y, tallest = first, GAP, 0
    if wide:
        y += main.height + GAP
    places = []
    for tile, _, _ in tiles:
        if x + CELL + GAP > PAGE:
            x, y, tallest = first, y + tallest, 0
        places.append((x, y))
        x += CELL + GAP
        tallest = max(tallest, CAPTION + tile.height + GAP)

    # Below all of them comes the text. Once it is broken into lines, the page's height is known.
    top = max(main.height + 2 * GAP, y + tallest)
    lines = _lines([("question", question), *texts])
    page = Image.new("RGB", (PAGE, top + LINE * len(lines) + GAP), "white")
    draw = ImageDraw.Draw(page)
    small, large = ImageFont.load_default(16), ImageFont.load_default(20)

    # Everything on its place: images, captions, text.
    page.paste(main, (GAP, GAP))
    for (tile, caption, colour), (x, y) in zip(tiles, places):
        draw.text((x, y), caption, fill="black", font=small)
        y += CAPTION
        draw.rectangle((x - 3, y - 3, x + tile.width + 2, y + tile.height + 2), fill=colour)
        page.paste(tile, (x, y))
    for row, (title, line) in enumerate(lines):
        y = top + LINE * row
        draw.text((GAP, y), title, fill="#888888", font=large)
        draw.text((GAP + INDENT, y), line, fill="black", font=large)
    return page


def _fit(image, width, height):
    """Scale an image to fit into width x height. Small ones grow without smoothing."""
    # A whole number of page pixels for each pixel of the image, or they come out uneven.
    scale = min(width / image.width, height / image.height)
    how = Image.Resampling.LANCZOS
    if scale >= 2:
        scale, how = int(scale), Image.Resampling.NEAREST
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, how)


def _lines(texts):
    """[(title, text)] -> [(title or "", line)], each line short enough for the page."""
    lines = []
    for title, text in texts:
        broken = []
        for paragraph in text.split("\n"):
            # An empty paragraph is an empty line.
            broken += textwrap.wrap(paragraph, CHARACTERS) or [""]

        # A policy that has collapsed may write thousands of lines.
        if len(broken) > MOST_LINES:
            broken[MOST_LINES:] = [f"(and {len(broken) - MOST_LINES} more lines)"]
        lines += zip([title] + [""] * len(broken), broken)
    return lines
