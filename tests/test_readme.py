"""README.md is honest: every command it shows is accepted by the program's own argument parser, those marked quick are
run, and every file, flag, metric and function it names exists.

It goes by structure, not by wording: fences, code spans, links, and the table under `| metric |`. A command in a fence is
marked quick by a comment at its end that has the word in it; the quick commands of a fence run in order in one temporary
folder, so that a later one can use what an earlier one wrote. Each test lists all that it found, with line numbers.
"""

import argparse
import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from conftest import noise

from p2r_min import Settings, train

ROOT = Path(__file__).resolve().parent.parent
README, PYPROJECT = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "pyproject.toml"))
MODULES = re.findall(r'"(\w+)"', re.search(r"^py-modules = \[(.*?)\]", PYPROJECT, re.M | re.S)[1])  # tomllib needs Python 3.11
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
           for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")])}
PROGRAMS = [name for name, text in SOURCES.items() if "argparse.ArgumentParser(" in text and "test_" not in name]

FOREIGN_FLAGS = {"-e", "--index-url", "-k", "-q"}  # pip's and pytest's; all others must be ours
FOREIGN_PROGRAMS = {"git", "cd", "source"}         # may be shown unchecked
ELSEWHERE = {                                      # files that are neither here nor in the folder of a short training run
    r"runs/.+": "any run's own folder",
    r"samples/\d{5}-(perception|reasoning)\.png": "written by a longer training run",
    r"results\.jsonl": "written by eval.py",
    r"gpu\.json": "written by tests/bench.py",
    r"train\.json": "a part of Mini-o3's data",
}

# --- reading: by offset into README, so that a complaint can name its line

FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.M | re.S)
PROSE = FENCE.sub(lambda fence: re.sub(r"[^\n]", " ", fence[0]), README)  # fences blanked
SPANS = [(m.start(), " ".join(m[1].split())) for m in re.finditer(r"(?<!`)`([^`\n]+(?:\n *[^`\s][^`\n]*)*)`(?!`)", PROSE)]
COMMAND = re.compile(r" *(\$ )?(\w+=\S+ )*(python3? |pip |pytest( |$))")


def at(offset):
    return f"README.md:{README.count(chr(10), 0, offset) + 1}:"


class Command(NamedTuple):
    where: str      # line and words, for complaints
    settings: list  # NAME=VALUE in front of it
    words: list
    quick: bool
    fence: object   # where its fence begins; None: it is a code span


def commands():
    """All of the README: every line of a bash fence; elsewhere, lines of fences and code spans that begin like a command."""
    lines = [(fence.start(2) + m.start(), m[0].replace("\\\n", " "), fence.start()) for fence in FENCE.finditer(README)
             for m in re.finditer(r"(?:[^\n]*\\\n)*[^\n]+", fence[2]) if fence[1] == "bash" or COMMAND.match(m[0])]
    for offset, text, fence in lines + [(offset, span, None) for offset, span in SPANS if COMMAND.match(span)]:
        lexer, parts, comment = shlex.shlex(text, posix=True, punctuation_chars=True), [[]], ""
        lexer.whitespace_split, lexer.commenters = True, ""
        for word in lexer:
            if word.startswith("#"):  # the rest is not lexed: a comment may hold an apostrophe
                comment = word + lexer.instream.read()
                break
            if word and set(word) <= set("&|;"):
                parts.append([])
            elif word not in ("$", "..."):
                parts[-1].append(word)
        for part in filter(None, parts):
            words = list(itertools.dropwhile(re.compile(r"\w+=").match, part))
            if words:
                quick = bool(re.search(r"\bquick\b", comment))
                yield Command(f"{at(offset)} {shlex.join(part)}", part[:len(part) - len(words)], words, quick, fence)


# --- asking


class Caught(BaseException):
    """Carries a parser out of its program, past every `except Exception`."""


@functools.cache
def parser_of(program):
    """The program's own parser: the program is run until it would parse its arguments, and no further."""
    def catch(parser, *_):
        raise Caught(parser)

    threads = torch.get_num_threads()  # toy.py changes them on its way
    try:
        with mock.patch.object(argparse.ArgumentParser, "parse_args", catch), mock.patch.object(sys, "argv", [program]):
            runpy.run_path(str(ROOT / program), run_name="__main__")
    except Caught as caught:
        return caught.args[0]
    finally:
        torch.set_num_threads(threads)
    raise AssertionError(f"{program} ended without parsing its arguments")


def refusal(program, arguments):
    """What the program's parser says against the arguments; "" if it takes them."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            parser_of(program).parse_args(arguments)
        except SystemExit as end:  # --help ends with 0
            return said.getvalue().strip().split("\n")[-1] if end.code else ""
    return ""


def objection(words):
    """What is wrong with a command; "" if nothing is."""
    program, *rest = words
    if program in ("python", "python3"):
        return refusal(rest[0], rest[1:]) if rest[:1] and rest[0] in PROGRAMS else f"not one of {', '.join(PROGRAMS)}"
    if program == "pip":
        extras = re.findall(r"^([\w-]+) *=", PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M)
        missing = [extra for word in rest if word.startswith(".[") for extra in word[2:-1].split(",") if extra not in extras]
    elif program == "pytest":  # a name after -k is a part of the name of a test, or of its file
        names = " ".join([*SOURCES, *re.findall(r"def (test_\w+)", "".join(SOURCES.values())), "and or not"])
        missing = [name for flag, word in zip(rest, rest[1:]) if flag == "-k" for name in re.findall(r"\w+", word) if name not in names]
    else:
        return "" if program in FOREIGN_PROGRAMS else "how shall this be checked?"
    return f"there is no {', '.join(missing)}" if missing else ""


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """The folder of the smallest training run: one question, one step a phase."""
    data = tmp_path_factory.mktemp("readme") / "data.jsonl"
    noise(200, 120).save(data.parent / "0.png")
    data.write_text(json.dumps({"image": "0.png", "question": "Which way?", "answer": "down"}) + "\n")
    return train(Settings(model=str(folder), data=str(data), eval_data=str(data), out=str(data.parent / "run"), steps=1, questions=1,
                          group=2, max_pixels=64 * 64, perceive_tokens=3, reason_tokens=3, judge="none"))


def keys(run):
    return {key for row in (run / "metrics.jsonl").open() for key in json.loads(row)}


# --- the tests


def complain(wrong):
    if wrong:
        pytest.fail("\n".join(["README.md is not honest:", *dict.fromkeys(wrong)]), pytrace=False)


def test_every_command_is_accepted():
    found = list(commands())
    assert found
    complain([f"{c.where}: {why}" for c in found if (why := objection(c.words))])


def test_quick_commands_run(tmp_path):
    quick = [c for c in commands() if c.quick]
    assert quick, "no command is marked `# quick`, so this test would test nothing"
    for fence, group in itertools.groupby(quick, key=lambda c: c.fence):
        here = tmp_path / f"fence-{fence}"
        here.mkdir()
        (here / "assets").symlink_to(ROOT / "assets")
        for c in group:
            assert c.words[0] == "python", f"{c.where}: only python commands can be marked quick"
            cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}  # the toy's scenes: not into the user's home, and drawn once
            done = subprocess.run(["env", *c.settings, sys.executable, ROOT / c.words[1], *c.words[2:]], cwd=here, env=os.environ | cache,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
            assert done.returncode == 0, f"{c.where}: ended with {done.returncode}\n{done.stdout[-3000:]}"


def test_every_flag_exists():
    """Anywhere in the text; and a span such as `--mode think` is accepted, value and all, by a program that has the flag."""
    known = {program: set(parser_of(program)._option_string_actions) for program in PROGRAMS}
    ours = set().union(*known.values())
    named = [(at(m.start()), m[0]) for m in re.finditer(r"(?<![\w-])--[a-z][\w-]*", README)]
    named += [(c.where, word) for c in commands() if c.words[0] in ("pip", "pytest") for word in c.words if word.startswith("-")]
    wrong = [f"{where} no program knows {flag}" for where, flag in named if flag not in ours | FOREIGN_FLAGS]
    for offset, (flag, *values) in ((offset, span.split()) for offset, span in SPANS):
        if flag in ours and values and not any(value.isupper() for value in values):  # the N of `--limit N` is no value
            said = [refusal(program, [flag, *values]) for program in PROGRAMS if flag in known[program]]  # no abbreviations
            wrong += [] if "" in said else [f"{at(offset)} no program takes {flag} {' '.join(values)}"]
    complain(wrong)


def test_every_name_exists(run):
    """module.name anywhere in the text; and a span that is one name with an underscore is a metric, or stands in the sources."""
    def exists(name):
        module, *parts = name.split(".")
        return functools.reduce(lambda found, part: getattr(found, part, None), parts, importlib.import_module(module)) is not None

    named = re.finditer(rf"(?<![\w./-])(?:{'|'.join(MODULES)})(?:\.[A-Za-z_]\w*)+", README)
    wrong = [f"{at(m.start())} there is no {m[0]}" for m in named if not re.search(r"\.(py|png|jsonl?|md)$", m[0]) and not exists(m[0])]
    words = keys(run) | set(re.findall(r"\w+", " ".join(SOURCES.values())))
    complain(wrong + [f"{at(offset)} nothing is called {span}" for offset, span in SPANS
                      if re.fullmatch(r"\w*[a-z]_\w+", span) and span not in words])


def test_every_path_exists(run):
    """Relative paths with a usual suffix, folders in code spans, targets of links; and every picture in assets/ is shown."""
    links = [(m.start(), m[1]) for m in re.finditer(r"""(?:\]\(|src="|href=")([^\s")]+)""", PROSE) if ":" not in m[1]]
    paths = [(m.start(), m[0]) for m in re.finditer(r"(?<![\w./~-])\w[\w./-]*\.(?:py|png|jsonl?|md|toml)\b", README)]
    paths += [(m.start(), m[0].rstrip(".")) for m in re.finditer(r"(?<![\w./-])assets/[\w./-]+", README)]
    paths += [(offset, span.replace("-N/", "-*/")) for offset, span in SPANS if re.fullmatch(r"[\w-]+(/[\w-]+)*/", span)]
    paths += [(offset, path) for offset, link in links if (path := link.split("#")[0])]
    headings = {re.sub(r"[^\w -]", "", m[1].lower()).replace(" ", "-") for m in re.finditer(r"^#+ (.+)$", PROSE, re.M)}
    wrong = [f"{at(offset)} there is no {path}" for offset, path in paths if not any(re.fullmatch(known, path) for known in ELSEWHERE)
             and not any(any(place.glob(path)) for place in (ROOT, run))]
    wrong += [f"{at(offset)} no heading fits {link}" for offset, link in links if link[0] == "#" and link[1:] not in headings]
    shown = {link for _, link in links}
    complain(wrong + [f"assets/{png.name} is not shown" for png in ROOT.glob("assets/*.png") if f"assets/{png.name}" not in shown])


def test_the_metrics_table_is_what_a_step_logs(run):
    logged = keys(run)
    table = re.search(r"^\| *metric *\|.*\n((?:\|.*\n)+)", README, re.M)
    assert table, "no table has the header `| metric |`"
    named = {name for row in table[1].splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    complain([f"the table of metrics has {name}, which no step logs" for name in sorted(named - logged)]
             + [f"the table of metrics leaves out {name}" for name in sorted(logged - named - {"step", "iteration", "phase"})])


def test_what_a_diff_takes_away_stands_in_the_code():
    """Diffs name their file in a comment; between two @@, context and removed lines are consecutive lines of that file."""
    diffs, wrong = [fence for fence in FENCE.finditer(README) if fence[1] == "diff"], []
    assert diffs
    for fence in diffs:
        for name, body in re.findall(r"^# (\S+)\n((?:[^#\n].*\n?|\n)+)", fence[2], re.M):
            for hunk in re.split(r"^@@\n", body, flags=re.M):
                old = "".join(line[1:] + "\n" for line in hunk.splitlines() if line[:1] in (" ", "-"))
                assert old, f"{at(fence.start())} a part of the diff of {name} has no line to find its place by"
                wrong += [] if old in SOURCES[name] else [f"{at(fence.start())} {name} has no such lines:\n{old}"]
    complain(wrong)
