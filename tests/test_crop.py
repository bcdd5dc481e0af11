"""crop.py: reading boxes from text, pixels, evidence. Expected values are written by hand."""

import io
import random
import time

import pytest
from PIL import Image

import crop
from crop import Box, gather, iou, padded, parse_boxes, picture, to_rect, to_rgb, violation

ONE = '{"bbox_2d": [10, 20, 300, 400], "label": "sign"}'
SIGN = (10, 20, 300, 400, "sign")


@pytest.mark.parametrize("text, boxes, parsable", [
    (f"[{ONE}]", [SIGN], True),
    (f"```json\n[\n  {ONE}\n]\n```", [SIGN], True),
    (f"Here are the regions: [{ONE}] I hope this helps.", [SIGN], True),
    (f"[{ONE}, {ONE}]", [SIGN, SIGN], True),              # duplicates are kept for the rule
    (ONE, [SIGN], True),
    (f'{{"objects": [{ONE}]}}', [SIGN], True),             # a wrapper
    (f'{{"boxes": [{ONE}]}}', [SIGN], True),               # called like a box
    (f'{{"objects": [{ONE}, {{"bbox_2d": [50, 60', [SIGN], True),
    ('{"objects": []}', [], True),
    (f"[{{{ONE}]", [SIGN], True),                          # a stray brace
    (f"}} {{}} [{ONE}}}, {{ {ONE}] {{", [SIGN, SIGN], True),
    (f"[[{ONE}]]", [SIGN], True),
    (f'[{ONE}, {{"bbox_2d": [50, 60, 7', [SIGN], True),    # cut off by the token limit
    (f'[{ONE}, {{"bbox_2d"', [SIGN], True),
    ("[{'bbox_2d': [10, 20, 300, 400], 'label': 'sign'}]", [SIGN], True),  # Python's quotes
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "man\'s hat"}]', [(1, 2, 3, 4, "man's hat")], True),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "sign {A}"}]', [(1, 2, 3, 4, "sign {A}")], True),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "a }, { b"}, ' + ONE, [(1, 2, 3, 4, "a }, { b"), SIGN],
     True),
    ('[{"label": "{{}", "bbox_2d": [1, 2, 3, 4]}]', [(1, 2, 3, 4, "{{}")], True),
    ("[{'bbox_2d': [1, 2, 3, 4], 'label': 'sign {A}'}]", [(1, 2, 3, 4, "sign {A}")], True),
    (r'[{"bbox_2d": [1, 2, 3, 4], "label": "a \"b\" [c]"}]', [(1, 2, 3, 4, 'a "b" [c]')], True),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "open}, ' + ONE, [SIGN], True),  # a lost quote
    ('[{"id": 1, "bbox": [10, 20, 300, 400], "label": "sign"}]', [SIGN], True),  # other keys
    ('[{"bbox_2d": [[10, 20, 300, 400]], "label": "sign"}]', [SIGN], True),
    ('[{"bbox_2d": ["10", "20.0", 300, 400], "label": "sign"}]', [SIGN], True),
    ('[{"bbox_2d": [300, 400, 10, 20], "label": "sign"}]', [SIGN], True),  # inverted corners
    ('[{"bbox_2d": [-5, 20, 300, 1200], "label": " sign "}]', [(0, 20, 300, 1000, "sign")],
     True),
    ('[{"bbox_2d": [10, 20, 300, 400]}]', [(10, 20, 300, 400, "")], True),
    ('[{"bbox_2d": [10, 20, 300, 400], "label": null}]', [(10, 20, 300, 400, "")], True),
    ('[{"bbox_2d": [10, 20, 300, 400], "label": 7}]', [(10, 20, 300, 400, "7")], True),
    ("[]", [], True),
    ("```json\n[ ]\n```", [], True),
    ("", [], False),
    ("The sign is on the left.", [], False),
    ('[{"bbox_2d": [], "label": "sign"}]', [], False),
    ('[{"bbox_2d": null, "label": "sign"}]', [], False),
    ('[{"bbox_2d": 5, "label": "sign"}]', [], False),
    ('[{"bbox_2d": [1, 2, 3], "label": "sign"}]', [], False),
    ('[{"bbox_2d": [1, 2, 3, 4, 5, 6, 7, 8, 9], "label": "3-D"}]', [], False),
    ('[{"bbox_2d": [1, 2, NaN, 4], "label": "sign"}]', [], False),
    ('[{"bbox_2d": [1, 2, Infinity, 4], "label": "sign"}]', [], False),
    ('[{"bbox_2d": [1, 2, "nan", 4], "label": "sign"}]', [], False),
    ('[{"bbox_2d": [true, 2, 30, 40], "label": "sign"}]', [], False),
    ('[{"bbox_2d": [1' + "0" * 400 + ', 2, 30, 40], "label": "sign"}]', [], False),
    ('[{"bbox_2d": [10, 20, 10, 400], "label": "sign"}]', [], False),      # no area
    ('[{"bbox_2d": [1100, 20, 1200, 400], "label": "sign"}]', [], False),  # outside
    (f'[{ONE}, {{"bbox_2d": null, "label": "x"}}]', [SIGN], True),
])
def test_parse(text, boxes, parsable):
    found = parse_boxes(text)
    assert [tuple(box) for box in found.boxes] == boxes
    assert found.parsable == parsable


def test_hostile_text_never_raises_and_boxes_stay_inside():
    """Random damage to a good answer."""
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


def fastest(text):
    """Processor seconds to read a text: the best of two, as the machine may be busy."""
    seconds = []
    for _ in range(2):
        begin = time.process_time()
        parse_boxes(text)
        seconds.append(time.process_time() - begin)
    return min(seconds)


@pytest.mark.parametrize("start", ["", '{"', '{"box": [', '[{"bbox_2d": [1, 2, 3, 4], "label": "'])
def test_time_is_linear_in_the_text_whatever_it_is(start):
    """Nesting, quotes, backslashes: whatever a model may repeat until its token limit."""
    units = ["{", "}", "[{", "[", "[]", "[ ", '{"', "{'", '"', "'", "\\", '\\"', '{\\"', "{ ",
             "{\n", '{"a', '{"a":', "{'a':", '{"box":', "{'box':[", '{"box": 1, ', "9", "1e", " ",
             "<", "é"]
    for unit in units:
        # 16 times the text takes at most 40 times as long; what is quadratic would take 256.
        text = (start + unit * 100_000)[:100_000]
        short, long = fastest(text[:6_250]), fastest(text)
        assert long < 40 * short + 0.02, (unit, short, long)


def test_pixels_on_a_wide_image():
    """0..1000 is relative to each side: x by the width, y by the height."""
    assert to_rect(Box(250, 250, 500, 750), (4000, 1000)) == (1000, 250, 2000, 750)
    assert to_rect(Box(0, 0, 1000, 1000), (33, 7)) == (0, 0, 33, 7)
    assert to_rect(Box(1, 1, 998, 998), (100, 100)) == (0, 0, 100, 100)         # outwards
    assert to_rect(Box(999.5, 999.5, 1000, 1000), (100, 100)) == (99, 99, 100, 100)
    assert to_rect(Box(0, 0, 0.1, 0.1), (100, 100)) == (0, 0, 1, 1)
    assert to_rect(Box(290, 70, 300, 80), (100, 100)) == (29, 7, 30, 8)     # 0.29 * 100 is 28.999..
    assert to_rect(Box(5, 5, 6, 6), (1, 1)) == (0, 0, 1, 1)


def test_padding_is_ten_percent_up_to_600_pixels():
    assert padded((1000, 300, 1200, 400), (4000, 1000)) == (600, 200, 1600, 500)
    assert padded((5000, 5000, 5100, 5100), (10_000, 10_000)) == (4400, 4400, 5700, 5700)
    assert padded((0, 0, 50, 1000), (100, 1000)) == (0, 0, 60, 1000)      # inside the image


@pytest.mark.parametrize("size", [(6000, 140), (140, 6000), (28000, 140), (200, 1)])
def test_a_crop_is_never_too_thin_for_the_image_processor(size):
    """A full-width sliver along an edge of a panorama gets its context on one side only."""
    for box in (Box(0, 0, 1000, 0.1), Box(0, 999.9, 1000, 1000),
                Box(0, 0, 0.1, 1000), Box(999.9, 0, 1000, 1000)):
        left, top, right, bottom = padded(to_rect(box, size), size)
        assert max(right - left, bottom - top) <= 200 * min(right - left, bottom - top)


def test_area_and_iou_by_hand():
    assert Box(0, 0, 1000, 1000).area == 1 and Box(100, 200, 600, 400).area == pytest.approx(0.1)
    assert iou(Box(0, 0, 10, 10), Box(5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert iou(Box(0, 0, 10, 10), Box(10, 0, 20, 10)) == 0
    assert iou(Box(0, 0, 10, 10), Box(0, 0, 10, 10)) == 1


@pytest.mark.parametrize("boxes, why", [
    ([], None),
    ([Box(0, 0, 100, 100, "a")], None),
    ([Box(0, 0, 100, 100, "label")], None),                                # a fair answer
    ([Box(0, 0, 100, 100, "a"), Box(0, 0, 100, 40, "b")], None),           # IoU 0.4, nested: free
    ([Box(0, 0, 100, 100, "a"), Box(0, 0, 100, 50, "b")], None),           # 0.5 is not above it
    ([Box(0, 0, 100, 100, "a"), Box(0, 0, 100, 51, "b")], "overlap"),
    ([Box(0, 0, 9, 9, "a"), Box(5, 0, 6, 9, "b"), Box(5, 0, 6, 9, "c")], "overlap"),
    ([Box(0, 0, 100, 100, "")], "label"),
    ([Box(0, 0, 9, 9, "a"), Box(50, 0, 60, 9, "")], "label"),
    ([Box(0, 0, 100, 100, crop.PLACEHOLDER)], "label"),
    ([Box(0, 0, 100, 100, crop.PLACEHOLDER.upper())], "label"),
])
def test_what_voids_a_rollout(boxes, why):
    assert violation(boxes) == why


def test_a_missing_label_voids_and_the_word_label_does_not():
    """From the text on: what is written on the label? is a fair question."""
    voids = [violation(parse_boxes('[{"bbox_2d": [1, 2, 3, 4]%s}]' % label).boxes)
             for label in ("", ', "label": null', ', "label": " "', ', "label": "label"')]
    assert voids == ["label", "label", "label", None]


def test_evidence_is_cut_from_the_original_before_anything_is_drawn():
    image = Image.effect_noise((1000, 400), 80).convert("RGB")
    before = image.tobytes()
    boxes = [Box(100, 250, 200, 500, "a"), Box(500, 0, 600, 250, "b"), Box(0, 0, 50, 50, "c"),
             Box(900, 0, 1000, 99, "d")]
    annotated, crops = gather(image, boxes)
    assert image.tobytes() == before                       # the original is left alone
    assert len(crops) == 3                                 # four boxes drawn, three cropped

    # The first box is (100, 100, 200, 200) in pixels; 100 and 40 pixels of context around it.
    assert crops[0].tobytes() == image.crop((0, 60, 300, 240)).tobytes()

    # Its line is max(3, 0.3 %) = 3 pixels wide and lies inside; the other boxes have other colours.
    drawn = [annotated.getpixel((x, 150)) for x in (100, 102, 199)]
    assert drawn == [(255, 0, 0)] * 3
    for x in (103, 200):
        assert annotated.getpixel((x, 150)) == image.getpixel((x, 150))
    assert annotated.getpixel((500, 50)) == (0, 200, 0)
    assert annotated.getpixel((900, 20)) == (255, 144, 0)
    assert gather(image, []) == (image, [])


def test_line_width_grows_with_the_image():
    annotated, _ = gather(Image.new("RGB", (4000, 100)), [Box(500, 0, 1000, 1000, "a")])
    reds = [x for x in range(2000, 2100) if annotated.getpixel((x, 50)) == (255, 0, 0)]
    assert len(reds) == 12                                 # 0.3 % of 4000


# -------------------------------------------------------------------------------------------------
# Any image as RGB


def colours_of(image):
    return {colour for _, colour in image.getcolors(maxcolors=1 << 24)}


def of_mode(mode, value, size=(3, 2), **info):
    image = Image.new(mode, size, value)
    image.info.update(info)
    return image


def with_palette(mode, colour, **info):
    image = of_mode(mode, 1 if mode == "P" else (1, 255), **info)
    image.putpalette([0, 0, 0, *colour])
    return image


@pytest.mark.parametrize("image, colour", [
    (of_mode("1", 1), (255, 255, 255)),
    (of_mode("1", 0), (0, 0, 0)),
    (of_mode("L", 100), (100, 100, 100)),
    (of_mode("L", 100, transparency=100), (255, 255, 255)),
    (of_mode("LA", (100, 255)), (100, 100, 100)),
    (of_mode("LA", (0, 0)), (255, 255, 255)),
    (with_palette("P", (9, 80, 200)), (9, 80, 200)),
    (with_palette("P", (9, 80, 200), transparency=1), (255, 255, 255)),
    (with_palette("P", (9, 80, 200), transparency=b"\xff\x00"), (255, 255, 255)),
    (with_palette("PA", (9, 80, 200)), (9, 80, 200)),
    (of_mode("RGB", (9, 80, 200)), (9, 80, 200)),
    (of_mode("RGB", (9, 80, 200), transparency=(9, 80, 200)), (255, 255, 255)),
    (of_mode("RGBA", (9, 80, 200, 255)), (9, 80, 200)),
    (of_mode("RGBA", (9, 80, 200, 0)), (255, 255, 255)),
    (of_mode("RGBA", (255, 0, 0, 51)), (255, 204, 204)),
    (of_mode("RGBa", (51, 0, 0, 51)), (255, 204, 204)),
    (of_mode("RGBX", (9, 80, 200, 0)), (9, 80, 200)),
    (of_mode("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    (of_mode("YCbCr", (76, 85, 255)), (254, 0, 0)),           # red, rounded
    (of_mode("HSV", (0, 255, 255)), (255, 0, 0)),
    (of_mode("LAB", (128, 128, 128)), (119, 119, 119)),       # half as light: L* 50
    (of_mode("I", 100), (100, 100, 100)),
    (of_mode("I", 25_600), (100, 100, 100)),                  # 16 bits in a wider format
    (of_mode("I", 1_000_000), (255, 255, 255)),
    (of_mode("I", -5), (0, 0, 0)),
    (of_mode("I;16", 25_600), (100, 100, 100)),
    (of_mode("I;16B", 25_600), (100, 100, 100)),
    (of_mode("RGB", (9, 80, 200), size=(1, 1)), (9, 80, 200)),
    (of_mode("RGBA", (9, 80, 200, 255), size=(200, 1)), (9, 80, 200)),
    (of_mode("L", 7, size=(1, 900)), (7, 7, 7)),
])
def test_any_image_becomes_what_a_person_sees(image, colour):
    seen = to_rgb(image)
    assert (seen.mode, seen.size) == ("RGB", image.size)
    assert colours_of(seen) == {colour}


def test_an_image_without_a_defined_white_is_refused():
    with pytest.raises(ValueError, match="8-bit RGB"):
        to_rgb(Image.new("F", (2, 2)))


@pytest.mark.parametrize("orientation, corner, turned", [
    (1, (0, 0), False), (2, (1, 0), False), (3, (1, 1), False), (4, (0, 1), False),
    (5, (0, 0), True), (6, (1, 0), True), (7, (1, 1), True), (8, (0, 1), True),
])
def test_a_photo_stands_upright(orientation, corner, turned):
    """The EXIF standard's table: where the stored first pixel belongs, and whether sides swap."""
    stored = Image.new("RGB", (5, 3))
    stored.putpixel((0, 0), (255, 0, 0))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    stored.save(file, "PNG", exif=exif)
    seen = to_rgb(Image.open(file))
    assert seen.size == ((3, 5) if turned else (5, 3))
    place = corner[0] * (seen.width - 1), corner[1] * (seen.height - 1)
    assert seen.getpixel(place) == (255, 0, 0)


# -------------------------------------------------------------------------------------------------
# The picture for people


@pytest.mark.parametrize("size", [(512, 512), (640, 480), (300, 1200), (3000, 150), (1, 1)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_picture_holds_everything(size, count):
    """Each image has a colour of its own, and that colour is on the page."""
    boxes = [Box(300 * i, 100, 300 * i + 200, 800, "x") for i in range(count)]
    seen = iter([Image.new("RGB", (64, 48), "olive"), Image.new("RGB", (64, 64), "teal")])
    texts = [("perceiver", "[1]"), ("reasoner", "x" * 900)]
    page = picture(Image.new("RGB", size, "navy"), boxes, "What is it? " * 30, texts,
                   lambda _: next(seen))
    assert page.width == 1200 and page.height > 300
    expected = {(0, 0, 128), (128, 128, 0)}
    if count:
        expected |= {(0, 128, 128), (255, 0, 0)}
    assert expected <= colours_of(page)


def test_what_the_model_sees_is_enlarged_without_smoothing():
    """A chessboard of single pixels stays black and white, in squares of equal size."""
    board = Image.new("RGB", (64, 64))
    for place in range(64 * 64):
        x, y = place % 64, place // 64
        board.putpixel((x, y), (255, 0, 255) if (x + y) % 2 else (0, 255, 255))
    page = picture(Image.new("RGB", (512, 512)), [], "?", [], lambda _: board)
    counts = {colour: count for count, colour in page.getcolors(maxcolors=1 << 24)}
    assert counts[255, 0, 255] == counts[0, 255, 255] == 64 * 64 // 2 * 4 * 4


def test_more_text_makes_a_longer_picture_and_none_of_it_is_lost():
    """Long lines are broken: nothing reaches beyond the right margin, capitals included."""
    image = Image.new("RGB", (64, 64), "white")
    texts = [[("reasoner", text)] for text in ("word", "THE QUICK BROWN FOX, JUMPING! " * 100)]
    short, long = [picture(image, [], "?", some, Image.Image.copy) for some in texts]
    assert long.height > short.height + 20 * 28
    margin = long.crop((1180, 0, 1200, long.height))
    assert colours_of(margin) == {(255, 255, 255)}


def test_thousands_of_lines_do_not_make_a_picture_of_gigabytes():
    """A policy that collapsed to newlines wrote 30,000 of them: 1200 x 840,572 pixels, once."""
    image = Image.new("RGB", (64, 64), "white")
    texts = [("reasoner", "\n" * 30_000), ("truth", "red")]
    page = picture(image, [], "?", texts, Image.Image.copy)
    assert page.height < 10_000


@pytest.mark.parametrize("label", ['sign with "EXIT" on it', "two\nlines", '"EXIT"'])
def test_a_label_that_is_no_json_string_costs_no_box(label):
    text = '[{"bbox_2d": [1, 2, 3, 4], "label": "%s"}, {"bbox_2d": [5, 6, 7, 8], "label": "b"}]' % label
    assert parse_boxes(text) == ([Box(1, 2, 3, 4, label), Box(5, 6, 7, 8, "b")], True)
