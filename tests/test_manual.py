"""The manual: its commands and blocks parse and run, its links lead somewhere, its generated pages are the source's."""

import ast
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

from contrastive_align import demo
from contrastive_align.losses import LOSSES


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TEXTS = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "recipes").rglob("*.md")]


@pytest.fixture(scope="module")
def manual():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("manual")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def generate():
    sys.path.insert(0, str(DOCS))
    yield importlib.import_module("generate")
    sys.path.remove(str(DOCS))


# -------------------------------------------------------------------------------------------------- blocks, commands


def test_every_block_and_command_is_parsed(manual):
    found = [block for page in manual.PAGES for block in manual.blocks(page)]
    for block in found:
        manual.check(block)
    languages = [block.language for block in found]
    assert languages.count("bash") > 40 and languages.count("python") > 15


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("contrastive-align reward --los_type=NCA", "los_type"),
        ("contrastive-align reward --beta=high", "beta"),
        ("contrastive-align rewards", "no command rewards"),
        ("contrastive-align sample --model=x --prmpt=x", "prmpt"),
        ("contrastive-align data rows.csv --colums=a", "colums"),
        ("python benchmarks/nothing.py", "no script"),
        ("trian model", "unknown program trian"),
    ],
)
def test_a_command_that_is_wrong_is_found(manual, text, said):
    with pytest.raises(ValueError, match=f"README.md:1: .*{said}"):
        manual.check(manual.Block(ROOT / "README.md", 1, "bash", text + "\n"))


def test_blocks_of_python_run(manual, tmp_path, monkeypatch):
    """All of the README's and of two guides; ``benchmarks/manual.py`` runs the others, and the commands."""
    monkeypatch.chdir(tmp_path)
    ran = 0
    for page in (ROOT / "README.md", DOCS / "losses.md", DOCS / "scored.md"):
        for block in manual.blocks(page):
            if block.language == "python" and block.runs:
                manual.run(block, demo.MODEL_PATH)
                ran += 1
    assert ran == 4 and (tmp_path / "mine.py").is_file()


def test_commands_on_data_run(manual, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = manual.workspace(tmp_path)
    for block in manual.blocks(DOCS / "data.md"):
        if block.language == "bash":
            manual.run(block, model)
    assert (tmp_path / "canonical.jsonl").is_file() and "groups" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- pages


def test_the_readme_is_short_and_tests_are_run_as_it_says(manual):
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    ci = (ROOT / ".ci" / "run").read_text()
    bash = [block for block in manual.blocks(ROOT / "README.md") if "pytest" in block.text]
    assert len(bash) == 1 and len(manual.commands(bash[0])) == 2
    assert bash[0].text.strip().replace("\n", " && ") in ci


def slug(heading: str) -> str:
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_images_and_anchors_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            assert re.match(r"https://(arxiv\.org/abs/\d{4}\.\d{5}|\w)", target), target
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            slugs = {slug(line.lstrip("#")) for line in prose(there).splitlines() if line.startswith("#")}
            assert anchor in slugs, f"{page.name}: {target}"


def test_every_page_is_reached_from_the_first(generate):
    seen, todo = set(), [DOCS / "index.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", prose(page))
        todo += [(page.parent / link).resolve() for link in links if not link.startswith("http")]
    assert set(DOCS.rglob("*.md")) <= seen
    text = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert str(page.relative_to(DOCS)) in text, f"{page.name} is not in the navigation of mkdocs.yml"


def test_generated_pages_are_those_of_the_source(generate):
    for name, text in generate.pages().items():
        assert (DOCS / "reference" / name).read_text() == text, f"{name} is stale: run python docs/generate.py"


def test_every_option_has_a_sentence(generate):
    assert sum(map(len, generate.documented().values())) > 60
    assert generate.without_sentence() == []


# ------------------------------------------------------------------------------------------------------ architecture


def run_tests_in(folder: Path, tests: list[str]) -> None:
    """Run tests of a copy of the package, in a process of their own, and end it with pytest's exit status."""
    os.chdir(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "contrastive_align"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "--doctest-modules"]
    with open("said.txt", "w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = pytest.main([*options, *tests])
    sys.exit(int(status))


def test_the_additions_of_the_architecture_page_work(manual, tmp_path):
    """The edits are made in a copy of the package's source, and the tests that they add are run there."""
    tests = []
    for file in (ROOT / "contrastive_align").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts and "demo" not in file.parts:
            there = tmp_path / file.relative_to(ROOT)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(file.read_bytes())
    for block in manual.blocks(DOCS / "architecture.md"):
        if block.mark != "edit":
            continue
        name, how = block.what.split(" ", 1)
        file = tmp_path / name
        if how == "new":
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
            tests.append(name)
            continue
        text = file.read_text()
        place, _, anchor = how.partition(": ")
        assert place == "end" or text.count(anchor) >= 1, block.place
        if place == "before":
            at = text.index(anchor.rstrip() if anchor.startswith(" ") else anchor)
            between = "\n\n" if block.text.startswith(("def ", "class ")) else ""
            text = text[:at] + block.text + between + text[at:]
        elif place == "after":
            text = text.replace(anchor, anchor + block.text.rstrip("\n"), 1)
        else:
            text = f"{text}\n\n{block.text}"
        file.write_text(text)
    assert len(tests) == 4
    losses = "contrastive_align/losses/{0}.py::contrastive_align.losses.{0}.{1}"
    doctests = [losses.format("contrastive", "hinge"), losses.format("divergences", "squared_hellinger")]
    # Forked, torch and transformers are not imported again; where autograd has threads for a GPU, no child may use it.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    child = context.Process(target=run_tests_in, args=(tmp_path, [*tests, *doctests]))
    child.start()
    child.join()
    assert child.exitcode == 0, (tmp_path / "said.txt").read_text()[-3000:]
    assert "hinge" in (tmp_path / "contrastive_align/losses/contrastive.py").read_text() and "hinge" not in LOSSES


# --------------------------------------------------------------------------------------------- what stands beside it


def test_version_citation_and_changelog_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert citation["authors"] == project["authors"] == [{"name": "The contrastive_align authors"}]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
    cited = {reference["identifiers"][0]["value"].removeprefix("arXiv:") for reference in citation["references"]}
    assert cited == set(re.findall(r"arxiv\.org/abs/([\d.]+)", (ROOT / "README.md").read_text()))


def test_pre_commit_checks_what_ci_checks():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    ci = (ROOT / ".ci" / "run").read_text()
    for hook in hooks:
        assert " ".join(hook["entry"].replace(" --parse", "").split()[:2]).removesuffix(" --force-exclude") in ci


@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_small_and_have_outputs(path):
    assert path.stat().st_size < 200_000 and f"({path.name})" in (DOCS / "notebooks" / "index.md").read_text()
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        ast.parse("".join(cell["source"]))
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
    assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) - 1


def test_the_published_pattern_on_a_few_groups(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    pattern = importlib.import_module("published_pattern")
    rows = [dict(row) for row in demo.load_reward_dataset()["train"].select(range(12))]
    found = pattern.run(demo.MODEL_PATH, pattern.SETTINGS["NCA"], 2, 0, rows[:8], rows[8:])
    assert found["best"] != 0 and found["best"] != found["rest"]
    runs = [{"steps": 2, "seed": seed, "setting": "NCA", **found, "rest": seed} for seed in (0, 2)]
    header, _, line = pattern.table(runs).splitlines()
    assert line.count("|") == header.count("|") and "| 2 | NCA | 2 |" in line and "+1.00 +- 12.71" in line
