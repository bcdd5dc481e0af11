"""eval.py's loader: every format in its exact layout, made here; and pictures of every kind."""

import base64
import csv
import datetime
import io
import json
import shutil
import sys

import pytest
from conftest import noise
from PIL import Image

import rollout
from crop import Box, to_rgb
from eval import Example, clean_question, load_data, split_options
from rollout import InputError

GOOD = {"image": "a.png", "question": "What colour?", "answer": "red"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(seed=0, size=(40, 30)):
    data = io.BytesIO()
    noise(*size, seed).save(data, "png")
    return data.getvalue()


def write(folder, *rows):
    Image.new("RGB", (8, 6), "red").save(folder / "a.png")
    Image.new("RGB", (2010, 10), "red").save(folder / "sliver.png")
    file = folder / "data.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_a_line_becomes_an_example(tmp_path, capsys):
    file = write(tmp_path, GOOD, "", {**GOOD, "answer": "B", "answer_form": "mca", "options": ["red", "blue"],
                                      "category": "colour", "id": 7, "boxes": [[0, 10, 500.5, 1000]]},
                 {**GOOD, "answer": 3, "answer_form": "na"})
    plain, choice, number = load_data(file)
    assert plain == Example(tmp_path / "a.png", "What colour?", "red", id="1")
    assert choice.question == "What colour?\nA. red\nB. blue" and choice.options == ("red", "blue")
    assert (choice.category, choice.id, choice.boxes) == ("colour", "7", (Box(0, 10, 500.5, 1000),))
    assert number.answer == "3" and number.load_image().size == (8, 6)
    assert "read 3 examples" in (said := capsys.readouterr().out) and "1 free_form, 1 mca, 1 na" in said
    assert load_data(tmp_path)[0] == plain                       # a folder that holds data.jsonl
    (tmp_path / "elsewhere").mkdir()
    moved = write(tmp_path / "elsewhere", GOOD).rename(tmp_path / "moved.jsonl")
    assert load_data(moved, images=tmp_path / "elsewhere")[0].image == tmp_path / "elsewhere" / "a.png"


@pytest.mark.parametrize("row, needles", [
    ("{", ["line 2", "not a JSON object"]),
    ("[1]", ["line 2", "list"]),
    ({k: v for k, v in GOOD.items() if k != "question"}, ["line 2", "'question'", "missing", "problem"]),
    ({**GOOD, "question": 3}, ["line 2", "'question'"]),
    ({**GOOD, "question": "<image>"}, ["line 2", "'question'"]),
    ({**GOOD, "answer": " "}, ["line 2", "'answer'", "no word"]),
    ({**GOOD, "answer": None}, ["line 2", "'answer'"]),
    ({**GOOD, "answer": ["red"]}, ["line 2", "'answer'", "text"]),
    ({**GOOD, "answer_form": "essay"}, ["line 2", "'answer_form'", "mca, na, free_form"]),
    ({**GOOD, "answer_form": "mca", "answer": "Apple"}, ["line 2", "'answer'", "Apple"]),
    ({**GOOD, "answer": "B"}, ["line 2", "letter 'B'", "no options", "image, question, answer"]),
    ({**GOOD, "question": "Which? (A) red (B) blue", "answer": "(b)"}, ["line 2", "letter '(b)'", "no options"]),
    ({**GOOD, "optoins": ["red", "blue"], "answer": "A."}, ["line 2", "letter 'A.'", "optoins"]),
    ({**GOOD, "options": "['red', 'blue"}, ["line 2", "'options'", "list"]),
    ({**GOOD, "options": ["red", ["blue"]]}, ["line 2", "'options'", "text"]),
    ({**GOOD, "options": ["red", "bl<|im_end|>ue"], "answer": "A"}, ["line 2", "<|im_end|>"]),
    ({**GOOD, "question": "What is <|image_pad|> this?"}, ["line 2", "'question'", "<|image_pad|>"]),
    ({**GOOD, "question": "What \ud800 is it?"}, ["line 2", "'question'", "no text"]),
    ({**GOOD, "answer": "\udfff"}, ["line 2", "'answer'", "no text"]),
    ({**GOOD, "category": "a\0b"}, ["line 2", "'category'", "no text"]),
    ({**GOOD, "id": ["7"]}, ["line 2", "'id'", "text"]),
    ({**GOOD, "image": "a\0.png"}, ["line 2", "'image'", "no text"]),
    ({**GOOD, "image": "\ud800.png"}, ["line 2", "'image'", "no text"]),
    ({**GOOD, "image": 7}, ["line 2", "'image'", "path"]),
    ({**GOOD, "question": [{"role": "user", "content": [{"type": "text", "text": "Look."}, "What?"]}]}, ["line 2", "'question'", "chat part"]),
    ({**GOOD, "question": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, ["line 2", "'question'", "text"]),
    ({**GOOD, "question": [{"role": "user", "content": [{"type": "video"}]}]}, ["line 2", "'question'", "text"]),
    ({**GOOD, "question": [{"role": "system", "content": "Be kind."}]}, ["line 2", "'question'", "text"]),
    ({**GOOD, "boxes": "[[1, 2"}, ["line 2", "'boxes'", "list"]),
    ({**GOOD, "boxes": [7]}, ["line 2", "'boxes'"]),
    ({**GOOD, "boxes": [[1, 2, 3, float("nan")]]}, ["line 2", "'boxes'"]),
    ({**GOOD, "options": "red"}, ["line 2", "'options'"]),
    ({**GOOD, "A": "red", "C": "blue"}, ["line 2", "options A, C"]),
    ({**GOOD, "answer_form": ["mca"]}, ["line 2", "'answer_form'"]),
    ({**GOOD, "options": ["red", "blue"], "answer": 0}, ["line 2", "'answer'", "no option"]),
    ({**GOOD, "question": "Which?\n" + "\n".join(f"{c}. {c}x" for c in "ABCDEFG"), "answer": "G"}, ["line 2", "'options'", "more than 6"]),
    ({**GOOD, "image": "x" * 300}, ["line 2", "'image'"]),
    ({**GOOD, "image": {"unpacked": "a.png"}}, ["line 2", "'image'", "must be a path"]),
    ({**GOOD, "image": {"unpacked": "/etc/hostname"}}, ["line 2", "'image'", "must be a path"]),
    ("[" * 100_000, ["line 2", "not a JSON object"]),
    ({**GOOD, "answer_form": "mca", "answer": "E", "options": ["red", "blue"]}, ["line 2", "'answer'", "A to B"]),
    ({**GOOD, "answer": "?!"}, ["line 2", "'answer'", "no word"]),
    ({**GOOD, "image": "sliver.png"}, ["line 2", "'image'", "2010 x 10"]),
    ({**GOOD, "image": ["a.png", "a.png"]}, ["line 2", "'image'", "2 images"]),
    ({**GOOD, "image": "../a.png"}, ["line 2", "'image'", "outside", "--images"]),
    ({**GOOD, "image": "/etc/hostname"}, ["line 2", "'image'", "outside"]),
    ({**GOOD, "image": "x/../../a.png"}, ["line 2", "'image'", "outside"]),
    ({**GOOD, "boxes": [[0, 0, 1200, 10]]}, ["line 2", "'boxes'"]),
    ({**GOOD, "boxes": [[10, 0, 5, 10]]}, ["line 2", "'boxes'"]),
    ({**GOOD, "image": "b.png"}, ["line 2", "'image'", "b.png", "does not exist"]),
    ({**GOOD, "image": "data.jsonl"}, ["line 2", "'image'", "cannot be read"]),
])
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, row, needles, capsys):
    file = write(tmp_path, GOOD, row, GOOD)
    with pytest.raises(InputError) as error:
        load_data(file)
    assert all(needle in str(error.value) for needle in [str(file), *needles])
    assert "\n" not in str(error.value)
    assert [e.id for e in load_data(file, skip_bad=True)] == ["1", "3"]
    assert "bad rows skipped: 1" in capsys.readouterr().out


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    file = write(tmp_path, GOOD)
    file.write_bytes(file.read_bytes() + b'{"image": "\xff"}\n')
    with pytest.raises(InputError, match="line 2"):
        load_data(file)


def test_no_data(tmp_path):
    with pytest.raises(InputError, match="--data .*no such file"):
        load_data(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no example"):
        load_data(write(tmp_path))
    with pytest.raises(InputError, match="no example.*line 1"):
        load_data(write(tmp_path, "{"), skip_bad=True)
    (tmp_path / "void").mkdir()
    with pytest.raises(InputError, match="no file that ends in .jsonl"):
        load_data(tmp_path / "void")


def test_which_file_of_a_folder(tmp_path):
    for name in ("hr_bench_4k.json", "hr_bench_8k.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(InputError, match="name one of them, as .*hr_bench_4k.json or .*hr_bench_8k.json"):
        load_data(tmp_path)
    shards = tmp_path / "data"
    shards.mkdir()
    for i in range(2):
        write(shards, {**GOOD, "id": i}).rename(shards / f"train-0000{i}-of-00002.jsonl")
    assert [e.id for e in load_data(shards)] == ["0", "1"]


def test_one_set_in_two_formats_is_refused_naming_both(tmp_path):
    write(tmp_path, GOOD)
    (tmp_path / "data.tsv").write_text("image\tquestion\tanswer\na.png\tWhat?\tred\n")
    with pytest.raises(InputError, match="several data files.*data.jsonl or .*data.tsv"):
        load_data(tmp_path)
    (tmp_path / "data.tsv").rename(tmp_path / "annotations.tsv")                   # beside a data.jsonl other names don't count
    assert len(load_data(tmp_path)) == 1
    (tmp_path / "data.jsonl").rename(tmp_path / "annotations.jsonl")
    with pytest.raises(InputError, match="annotations.jsonl or .*annotations.tsv"):
        load_data(tmp_path)


def test_numbers_that_no_rule_reads_become_free_form_with_a_note(tmp_path, capsys):
    rows = [{**GOOD, "answer_form": "na", "answer": answer} for answer in ("12:30", "3-4", "many", "3\u00bd", "one hundred", 7, 2.5)]
    forms = {e.answer: e.answer_form for e in load_data(write(tmp_path, *rows))}
    assert forms == {"12:30": "free_form", "3-4": "free_form", "many": "free_form", "3\u00bd": "na", "one hundred": "na", "7": "na", "2.5": "na"}
    assert "answers of form na that are not one number: 3, such as '12:30'" in capsys.readouterr().out


def test_a_letter_that_is_no_options_letter(tmp_path):
    """With an answer_form the row says what it means; without one a letter beyond F cannot be meant as an option."""
    rows = [{**GOOD, "answer": "B", "answer_form": "free_form"}, {**GOOD, "answer": "B", "answer_form": "mca"}, {**GOOD, "answer": "R"}]
    assert [e.answer_form for e in load_data(write(tmp_path, *rows))] == ["free_form", "mca", "free_form"]


def test_images_are_read_to_their_end_where_bad_rows_are_left_out(tmp_path, capsys):
    file = write(tmp_path, GOOD, {**GOOD, "image": "cut.png"}, GOOD)
    (tmp_path / "cut.png").write_bytes(png(size=(64, 64))[:300])
    cut = load_data(file)[1]                                                       # its header is fine ...
    with pytest.raises(InputError, match="cut.png of example 2.*--skip-bad"):      # ... and the loop says what to do
        cut.load_image()
    assert [e.id for e in load_data(file, skip_bad=True)] == ["1", "3"]
    assert "line 2" in capsys.readouterr().out


def test_a_folder_called_snapshots_opens_no_door(tmp_path):
    """Only the hub's own layout, datasets--owner--name/snapshots/commit with links into blobs, may lead outside."""
    plain, hub = tmp_path / "snapshots" / "mine", tmp_path / "datasets--me--mine" / "snapshots" / "abc"
    for folder in (plain, hub):
        folder.mkdir(parents=True)
        blobs = folder.parents[1] / "blobs"
        blobs.mkdir()
        noise(20, 20).save(blobs / "1.png")
        noise(20, 20).save(folder.parents[1] / "secret.png")
        write(folder, {**GOOD, "image": "linked.png"})
        (folder / "linked.png").symlink_to(blobs / "1.png")
    assert len(load_data(hub)) == 1
    with pytest.raises(InputError, match="outside"):
        load_data(plain)
    for name in ("../../secret.png", "../../blobs/1.png"):
        for folder in (plain, hub):
            with pytest.raises(InputError, match="outside"):
                load_data(write(folder, {**GOOD, "image": name}))
    (hub / "out.png").symlink_to(tmp_path / "datasets--me--mine" / "secret.png")
    with pytest.raises(InputError, match="outside"):
        load_data(write(hub, {**GOOD, "image": "out.png"}))


def test_a_bare_file_name_guards_its_folder_too(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    noise(20, 20).save(tmp_path / "secret.png")
    write(tmp_path / "in", {**GOOD, "image": "../secret.png"})
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises(InputError, match="outside"):
        load_data("data.jsonl")


def test_a_hub_id(tmp_path, monkeypatch):
    write(tmp_path, GOOD)
    asked = []

    def download(name, **how):
        asked.append((name, how["repo_type"], how["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(rollout, "snapshot_download", download)
    assert len(load_data("someone/some-data")) == len(load_data("someone/some-data/data.jsonl")) == 1
    assert asked == [("someone/some-data", "dataset", None), ("someone/some-data", "dataset", ["data.jsonl", "data.jsonl/*"])]
    with pytest.raises(InputError, match="has no other.json"):
        load_data("someone/some-data/other.json")


def test_images_that_may_still_be_in_an_archive(tmp_path):
    file = write(tmp_path, {**GOOD, "image": "images/1.png"})
    with pytest.raises(InputError, match="1.png, which does not exist.*--images.*archives"):
        load_data(file)


def test_mini_o3_train_json(tmp_path):
    noise(40, 30).save(tmp_path / "1.jpg")
    (tmp_path / "train.json").write_text(json.dumps([
        {"images": ["1.jpg"], "problem": "<image>\nWhat is written on the sign?", "solution": "EXIT", "doc_id": "d-1", "data_source": "vp"},
        {"images": ["1.jpg"], "problem": "<image>\nWhich?\nA. cat\nB. dog\nAnswer with the option's letter.", "solution": "B", "doc_id": 2,
         "data_source": "vp"}]))
    sign, pet = load_data(tmp_path)
    assert sign == Example(tmp_path / "1.jpg", "What is written on the sign?", "EXIT", category="vp", id="d-1")
    assert pet == Example(tmp_path / "1.jpg", "Which?\nA. cat\nB. dog", "B", "mca", ("cat", "dog"), "vp", id="2")


def write_tsv(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    return path


def test_vlmevalkit_tsv(tmp_path, cache):
    """HR-Bench: base64 images, the second row of an image refers to the first by its index."""
    rows = [{"index": i, "question": "What?\nLook closely.", "image": base64.b64encode(png(i)).decode() if i != 1 else "0", "A": "red",
             "B": "blue", "C": "", "D": "", "answer": "B", "category": "single", "cycle_category": f"cycle_{i}"} for i in range(3)]
    examples = load_data(write_tsv(tmp_path / "HRBench4K.tsv", rows))
    assert [(e.id, e.rotation, e.category, e.answer_form) for e in examples] == [(str(i), f"cycle_{i}", "single", "mca") for i in range(3)]
    assert examples[0].question == "What?\nLook closely.\nA. red\nB. blue" and examples[0].options == ("red", "blue")
    assert examples[0].image == examples[1].image != examples[2].image            # equal images are stored once
    assert examples[2].load_image().tobytes() == noise(40, 30, 2).tobytes()
    made = {f: f.stat().st_mtime_ns for f in cache.rglob("*")}
    assert load_data(tmp_path / "HRBench4K.tsv") == examples
    assert {f: f.stat().st_mtime_ns for f in cache.rglob("*")} == made            # unpacked once
    rows[0]["image"], rows[1]["image"] = "1", rows[0]["image"]                    # the image may stand in a later row, and be wrapped
    rows[2]["image"] = "data:image/png;base64," + base64.encodebytes(png(2)).decode()
    swapped = load_data(write_tsv(tmp_path / "HRBench4K.tsv", rows))
    assert [e.load_image().tobytes() for e in swapped] == [e.load_image().tobytes() for e in examples]
    rows[2]["image"] = "7"
    write_tsv(tmp_path / "HRBench4K.tsv", rows)
    with pytest.raises(InputError, match="HRBench4K.tsv, row 3: the field 'image'"):
        load_data(tmp_path / "HRBench4K.tsv")


def test_mme_realworld_lite_of_vlmevalkit(tmp_path):
    """Its options are a Python list in one cell."""
    row = {"index": 0, "image": base64.b64encode(png()).decode(), "question": "Which?", "answer": "C",
           "multi-choice options": "['(A) a car', '(B) the bus\\'s door', '(C) no']", "category": "Perception/Monitoring"}
    example, = load_data(write_tsv(tmp_path / "MME-RealWorld-Lite.tsv", [row]))
    assert example.options == ("a car", "the bus's door", "no") and (example.answer, example.answer_form) == ("C", "mca")
    assert example.question == "Which?\nA. a car\nB. the bus's door\nC. no"
    for evil in ("__import__('os').system('true')", "[" * 5_000, "['a', 'b'"):
        with pytest.raises(InputError, match="row 1: the field 'options' must be a list"):
            load_data(write_tsv(tmp_path / "MME-RealWorld-Lite.tsv", [row | {"multi-choice options": evil}]))


@pytest.mark.parametrize("cell", ["!" * 100, base64.b64encode(png()).decode()[:-3], "\u00e9" * 100, base64.b64encode(b"no image" * 20).decode(), "A" * 2000])
def test_odd_base64_is_that_rows_one_sentence(tmp_path, cell, capsys):
    rows = [{"index": i, "image": base64.b64encode(png(i)).decode(), "question": "What?", "answer": "red"} for i in range(3)]
    rows[1]["image"] = cell
    file = write_tsv(tmp_path / "odd.tsv", rows)
    with pytest.raises(InputError, match="odd.tsv, row 2: the field 'image'"):
        load_data(file)
    assert [e.id for e in load_data(file, skip_bad=True)] == ["0", "2"]


def test_more_cells_than_columns(tmp_path):
    noise(40, 30).save(tmp_path / "1.jpg")
    (tmp_path / "zwz.csv").write_text("image,question,answer\n1.jpg,What is it?,sign\n1.jpg,What, here?,sign\n")
    with pytest.raises(InputError, match="zwz.csv, row 2: there are more cells"):
        load_data(tmp_path / "zwz.csv")
    assert len(load_data(tmp_path / "zwz.csv", skip_bad=True)) == 1


def test_csv(tmp_path):
    """ZwZ-RL-VQA-mini."""
    noise(40, 30).save(tmp_path / "1.jpg")
    (tmp_path / "zwz.csv").write_text('original_images,crop_images,problem,answer\n1.jpg,c.jpg,"What, here?",sign\n')
    assert load_data(tmp_path / "zwz.csv") == [Example(tmp_path / "1.jpg", "What, here?", "sign", id="1")]


PARQUET = {
    "p2r_10k": ({"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "<image>How many?"}], "images": [{"bytes": png()}],
                 "reward_model": {"ground_truth": "3", "style": "rule"}, "extra_info": {"answer_form": "na", "index": 5}, "data_source": "zwz"},
                dict(question="How many?", answer="3", answer_form="na", category="zwz", id="5")),
    "p2r_10k_paths": ({"prompt": [{"role": "user", "content": "<image>How?"}], "images": ["x/1.png"], "reward_model": {"ground_truth": "so"},
                       "extra_info": {"index": 5}, "data_source": "zwz"},
                      dict(question="How?", answer="so", category="zwz", id="5")),
    "vstar": ({"image": {"bytes": png(), "path": None}, "text": "What is it?\n(A) rubber\n(B) cotton\nAnswer with the option's letter from the "
               "given choices directly.", "category": "direct_attributes", "label": "A", "question_id": "0"},
              dict(question="What is it?\nA. rubber\nB. cotton", answer="A", answer_form="mca", options=("rubber", "cotton"),
                   category="direct_attributes", id="0")),
    "hr_bench": ({"index": 3, "question": "Which?", "answer": "D", "category": "cross", "A": "1", "B": "2", "C": "3", "D": "4",
                  "cycle_category": "cycle_2", "image": base64.b64encode(png()).decode()},
                 dict(question="Which?\nA. 1\nB. 2\nC. 3\nD. 4", answer="D", answer_form="mca", options=("1", "2", "3", "4"), category="cross",
                      rotation="cycle_2", id="3")),
    "mme": ({"index": 9, "bytes": base64.b64encode(png()).decode(), "question": "Which?", "multi-choice options": ["(A) car", "(B) bus", "(E) no"],
             "answer": "B", "category": "Perception/Remote Sensing", "l2-category": "color"},
            dict(question="Which?\nA. (A) car\nB. (B) bus\nC. (E) no", answer="B", answer_form="mca", options=("(A) car", "(B) bus", "(E) no"),
                 category="Perception/Remote Sensing", id="9")),
}
PARQUET["mme"][0]["multi-choice options"][2] = "(C) no"
PARQUET["mme"][1].update(question="Which?\nA. car\nB. bus\nC. no", options=("car", "bus", "no"))


@pytest.mark.parametrize("name", PARQUET)
def test_parquet(tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    row, expected = PARQUET[name]
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
    (tmp_path / "x").mkdir()
    noise(40, 30).save(tmp_path / "x" / "1.png")
    example, = load_data(tmp_path)
    assert example == Example(example.image, **expected)
    assert example.load_image().tobytes() == noise(40, 30).tobytes()


def test_no_cell_of_a_parquet_file_names_a_path_elsewhere(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    noise(20, 20).save(tmp_path / "secret.png")
    for cell in ({"unpacked": str(tmp_path / "secret.png")}, {"path": str(tmp_path / "secret.png")}, "../secret.png", {"path": "../secret.png"}):
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist([PARQUET["p2r_10k"][0] | {"images": None, "image": cell}]), folder / "a.parquet")
        with pytest.raises(InputError, match="a.parquet, row 1: the field 'image'"):
            load_data(folder)


def test_what_pandas_leaves_in_a_parquet(tmp_path):
    """NaN for what is missing; and a file that is cut off is named."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    row = PARQUET["hr_bench"][0] | {"C": float("nan"), "D": float("nan"), "answer": "B", "cycle_category": float("nan")}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    example, = load_data(tmp_path)
    assert example.options == ("1", "2") and example.rotation == ""
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match="a.parquet cannot be read"):
        load_data(tmp_path / "a.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r'pip install -e "\.\[data\]"'):
        load_data(tmp_path / "train.parquet")


@pytest.mark.parametrize("sentence", [
    "Answer with the option's letter from the given choices directly.", "Just output the letter.", "Directly answer the question.",
    "Select the best answer to the above multiple-choice question based on the image.", "Answer in short.", "Only output the option letter.",
    "Respond with only the letter (A, B, C, D, or E) of the correct option.", "Your response should only contain the letter.",
    "Please select the correct answer from the options above.", "Answer the question using a single word or phrase.",
    "Please answer directly with only the letter of the correct option and nothing else.", "Your answer should be one word.",
    "Think first, call **image_zoom_in_tool** if needed, then answer. Format strictly as:  <think>...</think>  <tool_call>...</tool_call> "
    "(if tools needed)  <answer>...</answer>", "Put your final answer within \\boxed{}.", "Please think step by step.", "Let's think step by step.",
    "You FIRST think about the reasoning process. The reasoning process MUST BE enclosed within <think> </think> tags.",
    "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "Reason step by step, and give the final answer inside <answer></answer>.", "Provide the letter of the correct option.",
])
def test_instructions_are_cut(sentence):
    assert clean_question(f"<image>\nWhat colour is the U.S. flag's 3.5 m pole?\n{sentence}") == "What colour is the U.S. flag's 3.5 m pole?"
    assert clean_question(f"{sentence}\nWhat colour is it?") == "What colour is it?"
    assert clean_question("Question: What colour is it?\nOptions:\nThe best answer is:") == "What colour is it?"


@pytest.mark.parametrize("question", [
    "Select the colour of the car.", "Give the first letter on the sign.", "The image shows a gate. Give the letters on the sign.",
    "Which option is written on the door?", "Can you answer directly what is on the left?", "Think of the sign. What does it say?",
    "Give the number on the bus.", "What is the correct answer on the poster?", "Answer with the option's letter.",
    "You see a street. Give the colour of the car directly behind the bus.", "Look at the bus. Give the single number on its front.",
    "Think about the person directly left of the tree. What is he holding?", "This is a menu. Choose the best choice for a vegetarian.",
    "The answer sheet has one number circled. What number is it?", "Look. Select the tool in the man's hand.",
    "Here is a street. Read the letters on the left. Write the word on the sign.", "It is a form. Select the option that the pen points at.",
    "This is a poster. Count the panels of the step by step guide.",
    "Look at the picture. Answer the question: what is the colour of the car", "Here is a worksheet. Write the answer to question 5.",
])
def test_questions_stay(question):
    assert clean_question(question) == question


def test_a_question_is_not_lost_between_its_options(tmp_path):
    file = write(tmp_path, {**GOOD, "question": "Select the number on the jersey of the player directly in front of the goal.\nA. 7\nB. 9", "answer": "B"},
                 {**GOOD, "question": "Answer with the letter on the sign.\nA. Q\nB. R\nAnswer with the option's letter.", "answer": "B"})
    assert [e.question.split("\n")[0] for e in load_data(file)] == ["Select the number on the jersey of the player directly in front of the goal.",
                                                                   "Answer with the letter on the sign."]


def test_options_in_the_text():
    assert split_options("Which?\n(A) red\n(B) blue") == ("Which?", ["red", "blue"])
    assert split_options("Which?\nA. red\nB: blue\nC) green") == ("Which?", ["red", "blue", "green"])
    for untouched in ("Which?", "Which gate?\nA. only one", "Which?\nB. blue\nC. green", "A. red B. blue"):
        assert split_options(untouched) == (untouched, [])


def test_a_thousand_rows_cost_little_memory(tmp_path):
    """Rows hold paths, not pixels: 1,000 of them in well under the 1 GiB that 40 decoded images would take."""
    import tracemalloc
    noise(64, 64).save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({**GOOD, "id": i}) + "\n" for i in range(1_000)))
    tracemalloc.start()
    assert len(load_data(tmp_path)) == 1_000
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


# ---------------------------------------------------------------------------------------------
# Pictures of every kind


def sixteen_bit():
    return Image.frombytes("I;16", (2, 1), (65535).to_bytes(2, "little") + (0).to_bytes(2, "little"))


def palette():
    image = Image.new("P", (4, 3), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return image


def see_through():
    image = Image.new("RGBA", (4, 3), (0, 0, 0, 0))                # transparent black is white on paper
    image.putpixel((0, 0), (0, 0, 255, 255))
    return image


@pytest.mark.parametrize("image, suffix, size, corner, other", [
    (Image.new("CMYK", (4, 3), (0, 255, 255, 0)), "tif", (4, 3), (255, 0, 0), (255, 0, 0)),
    (palette(), "png", (4, 3), (255, 0, 0), (255, 0, 0)),
    (see_through(), "png", (4, 3), (0, 0, 255), (255, 255, 255)),
    (sixteen_bit(), "png", (2, 1), (255, 255, 255), (0, 0, 0)),
    (Image.new("I", (2, 1), 200), "tif", (2, 1), (200, 200, 200), (200, 200, 200)),
    (Image.new("L", (1, 1), 7), "png", (1, 1), (7, 7, 7), (7, 7, 7)),
    (Image.new("1", (4, 3), 1), "png", (4, 3), (255, 255, 255), (255, 255, 255)),
    (Image.new("LA", (4, 3), (9, 255)), "png", (4, 3), (9, 9, 9), (9, 9, 9)),
    (Image.new("RGB", (400, 20), (1, 2, 3)), "png", (400, 20), (1, 2, 3), (1, 2, 3)),
    (Image.new("RGB", (7680, 4320), (1, 2, 3)), "png", (7680, 4320), (1, 2, 3), (1, 2, 3)),
])
def test_every_kind_of_picture_becomes_rgb(tmp_path, image, suffix, size, corner, other):
    image.save(tmp_path / f"a.{suffix}")
    loaded = load_data(write_over(tmp_path, f"a.{suffix}"))[0].load_image()
    assert (loaded.mode, loaded.size) == ("RGB", size)
    assert loaded.getpixel((0, 0)) == corner and loaded.getpixel((size[0] - 1, size[1] - 1)) == other


def write_over(folder, image):
    (folder / "data.jsonl").write_text(json.dumps({**GOOD, "image": image}))
    return folder


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                              # the camera was held upright
    Image.new("RGB", (40, 20)).save(tmp_path / "r.jpg", exif=exif)
    assert Example(tmp_path / "r.jpg", "q", "a").load_image().size == (20, 40)


def test_a_truncated_image_is_an_error_by_name(tmp_path):
    (tmp_path / "cut.png").write_bytes(png(size=(64, 64))[:300])
    with pytest.raises(InputError, match="cut.png of example 9"):
        Example(tmp_path / "cut.png", "q", "a", id="9").load_image()


def test_a_floating_point_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="floating point"):
        to_rgb(Image.new("F", (2, 2)))
    Image.new("F", (2, 2)).save(tmp_path / "f.tif")
    with pytest.raises(InputError, match="f.tif, whose pixels are floating point"):
        load_data(write_over(tmp_path, "f.tif"))


def test_options_in_a_column_and_in_the_question_are_listed_once(tmp_path):
    row = {**GOOD, "question": "Which?\n(A) red\n(B) blue", "answer": "A"}
    for options in (["red", "blue"], ["A. red", "B. blue"]):
        [example] = load_data(write(tmp_path, row | {"options": options}))
        assert example.question == "Which?\nA. red\nB. blue" and example.options == ("red", "blue")
    [example] = load_data(write(tmp_path, row | {"options": ["one", "two", "three"]}))   # the lines are something else
    assert example.question == "Which?\n(A) red\n(B) blue\nA. one\nB. two\nC. three"


def test_cells_that_json_does_not_know_are_read_or_refused(tmp_path):
    """Typed writers (DuckDB, Spark) make binary and decimal columns; pandas a float column of whole numbers with a gap."""
    pyarrow = pytest.importorskip("pyarrow")
    from decimal import Decimal
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")

    def load(**columns):
        row = {name: [value] for name, value in ({"image": "a.png", "question": "How many?", "answer": "3"} | columns).items()}
        pyarrow.parquet.write_table(pyarrow.table(row), tmp_path / "data.parquet")
        return load_data(tmp_path / "data.parquet")[0]

    import pyarrow.parquet
    assert load(answer=Decimal("3.50"), answer_form="na").answer == "3.5"
    assert load(answer=3.0).answer == "3" and load(question=b"How many?").question == "How many?"
    assert load(mask=b"\xff\xfe").answer == "3"                                # bytes that nobody asks for
    with pytest.raises(InputError, match="'question'.*bytes"):
        load(question=b"\xff\xfe")
    with pytest.raises(InputError, match="'answer'.*date"):
        load(answer=datetime.date(2020, 1, 2))


def test_options_that_cannot_be_all_of_them(tmp_path):
    with pytest.raises(InputError, match="one option only"):          # as numpy prints an array
        load_data(write(tmp_path, {**GOOD, "options": "['(A) red' '(B) blue']", "answer": "A"}))
    letters = {letter: f"option {letter}" for letter in "ABCDEFG"}
    with pytest.raises(InputError, match="more than 6"):
        load_data(write(tmp_path, {**GOOD, **letters, "answer": "B"}))
    [example] = load_data(write(tmp_path, {**GOOD, **letters, "G": float("nan"), "answer": "B"}))   # pandas' nothing
    assert len(example.options) == 6
    [example] = load_data(write(tmp_path, {**GOOD, "G": "another column"}))
    assert example.options == ()
    with pytest.raises(InputError, match="names a letter 'A. red'"):
        load_data(write(tmp_path, {**GOOD, "question": "Which? A. red B. blue", "answer": "A. red"}))


def test_broken_exif_is_found_where_images_are_read_to_their_end(tmp_path):
    file = write(tmp_path, GOOD)
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png", exif=b"Exif\0\0no exif at all")
    with pytest.raises(InputError, match="no example"):
        load_data(file, skip_bad=True)


def test_a_shard_stands_for_its_set_and_a_part_is_no_whole(tmp_path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    for split, count in (("test", 1), ("train", 3)):
        for i in range(count):
            name = f"{split}-{i:05d}-of-{count:05d}.jsonl"
            (tmp_path / name).write_text(json.dumps({**GOOD, "question": f"What is {name}?"}))
    with pytest.raises(InputError, match="several data files"):
        load_data(tmp_path)
    assert len(load_data(tmp_path / "train-00001-of-00003.jsonl")) == 3
    assert len(load_data(tmp_path / "test-00000-of-00001.jsonl")) == 1
    (tmp_path / "train-00002-of-00003.jsonl").unlink()
    with pytest.raises(InputError, match="of its 3 shards 2 are here"):
        load_data(tmp_path / "train-00001-of-00003.jsonl")
    (tmp_path / "train-00001-of-00003.jsonl").rename(tmp_path / "train-00003-of-00003.jsonl")
    shutil.copy(tmp_path / "train-00000-of-00003.jsonl", tmp_path / "train-00007-of-00003.jsonl")
    with pytest.raises(InputError, match=r"3 are here, with the numbers \[0, 3, 7\]"):
        load_data(tmp_path / "train-00003-of-00003.jsonl")
