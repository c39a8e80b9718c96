"""The documentation: links, names, settings and examples in it are real, and the API page is current."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kdsearch_jax
from kdsearch_jax.runs.config import SETTINGS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "launch" / "README.md"])
WRITTEN = [page for page in PAGES if page.name not in ("coverage.md", "api.md")]
NOT_SETTINGS = {"run.json", "gates.npz", "search.ends"}  # but named like one
CODE = re.compile(r"```python\n(.*?)```", re.S)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def current(page: Path) -> str:
    """The text of a page, without what it says about version 0.1."""
    text = page.read_text()
    if page.name != "CHANGELOG.md":
        return text
    return "\n".join(line.split(" | ")[-1] for line in text.split("\n## 0.1.0")[0].splitlines() if line[:1] == "|")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+://", target):
            continue
        other = (page.parent / path).resolve() if path else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            missing.append(target)
    assert not missing


def exists(name: str) -> bool:
    """Whether a dotted name of the package can be imported, or is an attribute of what can."""
    path, rest = name.split("."), []
    while path:
        try:
            value = importlib.import_module(".".join(path))
            break
        except ModuleNotFoundError:
            rest.insert(0, path.pop())
    else:
        return False
    for attribute in rest:
        value = getattr(value, attribute, None)
    return value is not None


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_names_and_settings_exist(page):
    text = current(page)
    names = set(re.findall(r"kdsearch_jax(?:\.[A-Za-z_]\w*)+", text)) | {
        name.replace("kd.", "kdsearch_jax.") for name in re.findall(r"\bkd\.\w+", text)
    }
    assert not [name for name in names if not exists(name)]
    files = re.findall(r"\b(?:kdsearch_jax|benchmarks|launch|scripts|tests|configs)/[\w/]+\.\w+", text)
    assert not [file for file in files if not (ROOT / file).exists()]
    sections = {setting.split(".")[0] for setting in SETTINGS if "." in setting}
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z]+\.[a-z0-9-]+)", text)}
    quoted = {name for name in re.findall(r"`([a-z]+\.[a-z0-9_]+)`", text) if name.split(".")[0] in sections}
    unknown = (flags | quoted) - {*SETTINGS, *NOT_SETTINGS}
    assert not unknown


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_code_is_python(page):
    for code in CODE.findall(page.read_text()):
        ast.parse(code)


def test_the_api_page_is_current():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import api_docs  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.pop(0)
    assert api_docs.PAGE.read_text() == api_docs.page(), "run python scripts/api_docs.py"


def test_the_readme_is_short_and_the_version_is_one():
    assert len((ROOT / "README.md").read_text().split()) <= 900
    assert f"\nversion: {kdsearch_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_loop_in_the_readme_runs(python, tmp_path):
    (code,) = re.findall(r"<!-- own loop -->\n+```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    costs = [int(line.split()[1].replace(",", "")) for line in done.stdout.splitlines()]
    assert costs[1] <= 0.2 * costs[0]
