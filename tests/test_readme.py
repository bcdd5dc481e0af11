"""README.md names only what exists: commands, flags, files, functions and metrics.

It goes by structure (fences, code spans, links, the metrics table), never by wording, and quotes no
code. A fork that rewrites the README may delete this file.
"""

import importlib
import re
from pathlib import Path

import pytest
from conftest import go, metrics, small

import eval as evaluation
import p2r_min

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "tests/README.md")}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def spans(text):
    """Code spans outside of fences."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def flags_of(program):
    """The long flags that a program takes, by its settings or its source."""
    known = set(re.findall(r'"(--[a-z][\w-]*)"', (ROOT / program).read_text()))
    settings = {"p2r_min.py": [p2r_min.Settings], "eval.py": [evaluation.Task, evaluation.Protocol]}
    for kind in settings.get(program, []):
        for name in kind.__dataclass_fields__:
            known |= {"--" + name.replace("_", "-"), "--no-" + name.replace("_", "-")}
    return known


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_of_programs_and_flags_that_exist(page):
    found = 0
    for language, block in FENCE.findall(PAGES[page]):
        for line in block.splitlines():
            command = re.search(r"\bpython (\S+\.py)([^#]*)", line)
            if language == "bash" and command:
                found += 1
                program, rest = command.groups()
                assert (ROOT / program).is_file(), line
                # What follows a lone -- goes to p2r_min.py.
                for part, owner in zip(re.split(r" -- ", rest), (program, "p2r_min.py")):
                    unknown = set(re.findall(r"(?<!\S)--[a-z][\w-]*", part)) - flags_of(owner)
                    assert not unknown, f"{line}: {unknown}"
    assert found > 3


@pytest.mark.parametrize("page", PAGES)
def test_flags_files_and_names_exist(page):
    everywhere = set()
    for program in ROOT.glob("**/*.py"):
        everywhere |= flags_of(str(program.relative_to(ROOT)))
    modules = [path.stem for path in ROOT.glob("*.py")]
    for span in spans(PAGES[page]):
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", span):
            assert flag in everywhere, flag
        path = re.fullmatch(r"(tests|assets)/[\w./-]+", span)
        assert not path or (ROOT / span).exists(), span
        name = re.fullmatch(rf"({'|'.join(modules)})\.([A-Za-z_]\w*)(\.\w+)?", span)
        if name and name[2] != "py":
            assert hasattr(importlib.import_module(name[1]), name[2]), span
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGES[page]):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_metrics_of_the_table_are_logged(folder, data, tmp_path, scripted):
    logged = set()
    for row in metrics(go(small(folder, data, tmp_path / "run", steps=1))):
        logged |= set(row)
    table = PAGES["README.md"].split("| metric |")[1].split("\n\n")[0]
    named = []
    for row in table.splitlines()[2:]:
        named += re.findall(r"`(\w+\*?)`", row.split("|")[1])
    assert len(named) >= 10
    for name in named:
        stem = name.rstrip("*")
        assert any(key == name or (name != stem and key.startswith(stem)) for key in logged), name
