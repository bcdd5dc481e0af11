"""crop.py: reading boxes from text, pixels, evidence. Expected values are written by hand."""

import json
import random

import pytest
from PIL import Image

import crop
from crop import Box, gather, iou, padded, parse_boxes, picture, to_rect, violation

ONE = '{"bbox_2d": [10, 20, 300, 400], "label": "sign"}'
SIGN = (10, 20, 300, 400, "sign")


@pytest.mark.parametrize("text, boxes, parsable, dropped", [
    (f"[{ONE}]", [SIGN], True, 0),
    (f"```json\n[\n  {ONE}\n]\n```", [SIGN], True, 0),
    (f"Here are the regions: [{ONE}] I hope this helps.", [SIGN], True, 0),
    (f"[{ONE}, {ONE}]", [SIGN, SIGN], True, 0),                               # duplicates are kept: the rule sees them
    (ONE, [SIGN], True, 0),
    (f'{{"objects": [{ONE}]}}', [SIGN], True, 0),                             # a wrapper
    (f"[{{{ONE}]", [SIGN], True, 0),                                          # a stray brace
    (f"[[{ONE}]]", [SIGN], True, 0),
    (f'[{ONE}, {{"bbox_2d": [50, 60, 7', [SIGN], True, 0),                    # cut off by the token limit
    ("[{'bbox_2d': [10, 20, 300, 400], 'label': 'sign'}]", [SIGN], True, 0),  # Python quotes
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "man\'s hat"}]', [(1, 2, 3, 4, "man's hat")], True, 0),
    ('[{"bbox": [10, 20, 300, 400], "label": "sign"}]', [SIGN], True, 0),     # another key
    ('[{"bbox_2d": [[10, 20, 300, 400]], "label": "sign"}]', [SIGN], True, 0),
    ('[{"bbox_2d": ["10", "20.0", 300, 400], "label": "sign"}]', [SIGN], True, 0),
    ('[{"bbox_2d": [300, 400, 10, 20], "label": "sign"}]', [SIGN], True, 0),  # inverted corners
    ('[{"bbox_2d": [-5, 20, 300, 1200], "label": " sign "}]', [(0, 20, 300, 1000, "sign")], True, 0),
    ('[{"bbox_2d": [10, 20, 300, 400]}]', [(10, 20, 300, 400, "")], True, 0),
    ('[{"bbox_2d": [10, 20, 300, 400], "label": null}]', [(10, 20, 300, 400, "")], True, 0),
    ('[{"bbox_2d": [10, 20, 300, 400], "label": 7}]', [(10, 20, 300, 400, "7")], True, 0),
    ("[]", [], True, 0),
    ("```json\n[ ]\n```", [], True, 0),
    ("", [], False, 0),
    ("The sign is on the left.", [], False, 0),
    ('[{"bbox_2d": null, "label": "sign"}]', [], False, 1),
    ('[{"bbox_2d": 5, "label": "sign"}]', [], False, 1),
    ('[{"bbox_2d": [1, 2, 3], "label": "sign"}]', [], False, 1),
    ('[{"bbox_2d": [1, 2, 3, 4, 5, 6, 7, 8, 9], "label": "3-D"}]', [], False, 1),
    ('[{"bbox_2d": [1, 2, NaN, 4], "label": "sign"}]', [], False, 1),
    ('[{"bbox_2d": [1, 2, Infinity, 4], "label": "sign"}]', [], False, 1),
    ('[{"bbox_2d": [1, 2, "nan", 4], "label": "sign"}]', [], False, 1),
    ('[{"bbox_2d": [true, 2, 30, 40], "label": "sign"}]', [], False, 1),
    ('[{"bbox_2d": [1' + "0" * 400 + ', 2, 30, 40], "label": "sign"}]', [], False, 1),
    ('[{"bbox_2d": [10, 20, 10, 400], "label": "sign"}]', [], False, 1),      # no area
    ('[{"bbox_2d": [1100, 20, 1200, 400], "label": "sign"}]', [], False, 1),  # outside
    (f'[{ONE}, {{"bbox_2d": null, "label": "x"}}]', [SIGN], True, 1),
])
def test_parse(text, boxes, parsable, dropped):
    found = parse_boxes(text)
    assert [tuple(box) for box in found.boxes] == boxes
    assert (found.parsable, found.dropped) == (parsable, dropped)


def test_hostile_text_never_raises_and_boxes_stay_inside():
    """Random damage to a good answer, and nesting that would overflow a recursive parser."""
    rng = random.Random(0)
    alphabet = '{}[]",:0123456789.-eE \'\\\nabNI'
    for _ in range(20_000):
        text = list(f"```json\n[{ONE}, {ONE}]\n```")
        for _ in range(rng.randint(1, 12)):
            place = rng.randrange(len(text))
            text[place:place + rng.randint(0, 3)] = rng.choice(alphabet)
        size = (rng.randint(1, 3000), rng.randint(1, 3000))
        for box in parse_boxes("".join(text)).boxes:
            left, top, right, bottom = to_rect(box, size)
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    for text in ("{[" * 500_000, "{" * 1_000_000, "[" * 1_000_000, '{"bbox_2d": ' + "[" * 100_000 + "}"):
        assert parse_boxes(text).boxes == []


def test_pixels_on_a_wide_image():
    """0..1000 is relative to each side: x by the width, y by the height."""
    assert to_rect(Box(250, 250, 500, 750), (4000, 1000)) == (1000, 250, 2000, 750)
    assert to_rect(Box(0, 0, 1000, 1000), (33, 7)) == (0, 0, 33, 7)
    assert to_rect(Box(999.5, 999.5, 1000, 1000), (100, 100)) == (99, 99, 100, 100)  # at least one pixel
    assert to_rect(Box(0, 0, 0.1, 0.1), (100, 100)) == (0, 0, 1, 1)
    assert to_rect(Box(5, 5, 6, 6), (1, 1)) == (0, 0, 1, 1)


def test_padding_is_ten_percent_up_to_600_pixels():
    assert padded((1000, 300, 1200, 400), (4000, 1000)) == (600, 200, 1600, 500)
    assert padded((5000, 5000, 5100, 5100), (10000, 10000)) == (4400, 4400, 5700, 5700)  # capped at 600
    assert padded((0, 0, 50, 1000), (100, 1000)) == (0, 0, 60, 1000)                     # inside the image


@pytest.mark.parametrize("size", [(6000, 140), (140, 6000), (28000, 140), (200, 1)])
def test_a_crop_is_never_too_thin_for_the_image_processor(size):
    """A full-width sliver along an edge of a panorama gets its context on one side only."""
    for box in (Box(0, 0, 1000, 0.1), Box(0, 999.9, 1000, 1000), Box(0, 0, 0.1, 1000), Box(999.9, 0, 1000, 1000)):
        left, top, right, bottom = padded(to_rect(box, size), size)
        assert max(right - left, bottom - top) <= 200 * min(right - left, bottom - top)


def test_iou_by_hand():
    assert iou(Box(0, 0, 10, 10), Box(5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert iou(Box(0, 0, 10, 10), Box(10, 0, 20, 10)) == 0
    assert iou(Box(0, 0, 10, 10), Box(0, 0, 10, 10)) == 1


@pytest.mark.parametrize("boxes, why", [
    ([], None),
    ([Box(0, 0, 100, 100, "a")], None),
    ([Box(0, 0, 100, 100, "a"), Box(0, 0, 100, 40, "b")], None),           # IoU 0.4: nested boxes are free (paper)
    ([Box(0, 0, 100, 100, "a"), Box(0, 0, 100, 50, "b")], None),           # IoU exactly 0.5 is not above it
    ([Box(0, 0, 100, 100, "a"), Box(0, 0, 100, 51, "b")], "overlap"),
    ([Box(0, 0, 100, 100, "a"), Box(500, 0, 600, 9, "b"), Box(500, 0, 600, 9, "c")], "overlap"),
    ([Box(0, 0, 100, 100, "")], "label"),
    ([Box(0, 0, 100, 100, crop.PLACEHOLDER)], "label"),
])
def test_what_voids_a_rollout(boxes, why):
    assert violation(boxes) == why


def test_evidence_is_cut_from_the_original_before_anything_is_drawn():
    image = Image.effect_noise((1000, 400), 80).convert("RGB")
    before = image.tobytes()
    boxes = [Box(100, 250, 200, 500, "a"), Box(500, 0, 600, 250, "b"), Box(0, 0, 50, 50, "c"), Box(900, 0, 1000, 99, "d")]
    annotated, crops = gather(image, boxes)
    assert image.tobytes() == before                                        # the original is left alone
    assert len(crops) == 3                                                  # four boxes drawn, three cropped
    assert crops[0].tobytes() == image.crop((0, 60, 300, 240)).tobytes()    # (100, 100, 200, 200) + 100 and 40 px
    red, green, orange = (255, 0, 0), (0, 200, 0), (255, 144, 0)
    assert annotated.getpixel((100, 150)) == annotated.getpixel((102, 150)) == annotated.getpixel((199, 150)) == red
    assert annotated.getpixel((103, 150)) == image.getpixel((103, 150))     # line width max(3, 0.3 %) = 3
    assert annotated.getpixel((200, 150)) == image.getpixel((200, 150))
    assert annotated.getpixel((500, 50)) == green and annotated.getpixel((900, 20)) == orange
    assert gather(image, []) == (image, [])


def test_line_width_grows_with_the_image():
    annotated, _ = gather(Image.new("RGB", (4000, 100)), [Box(500, 0, 1000, 1000, "a")])
    reds = [x for x in range(2000, 2100) if annotated.getpixel((x, 50)) == (255, 0, 0)]
    assert len(reds) == 12                                                  # 0.3 % of 4000


@pytest.mark.parametrize("size", [(640, 480), (300, 1200), (3000, 150), (1, 1)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_picture_holds_everything(size, count):
    boxes = [Box(300 * i, 100, 300 * i + 200, 800, "x") for i in range(count)]
    page = picture(Image.new("RGB", size, "navy"), boxes, "What is it? " * 30, [("perceiver", json.dumps([1])), ("reasoner", "x" * 900)])
    assert page.width == 1200 and page.height > 300
    assert (0, 0, 128) in {colour for _, colour in page.getcolors(maxcolors=1 << 24)}
