"""What the documents say of the tree is so: variables, paths, links, pinned versions."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = [
    path
    for folder in ("fastsae", "csrc", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
] + [ROOT / "setup.py"]
# Variables are read by a quoted name. Macros of the C++ code are called alike and never quoted.
VARIABLE = re.compile(r'["\'](FASTSAE_[A-Z_]+)["\'=]')


def read_variables():
    return {name for path in SOURCES for name in VARIABLE.findall(path.read_text())}


def test_every_variable_is_documented():
    documented = set(re.findall(r"`(FASTSAE_[A-Z_]+)`", (ROOT / "docs/environment.md").read_text()))
    read = read_variables()
    assert read - documented == set(), "read in the source, absent from docs/environment.md"
    assert documented - read == set(), "in docs/environment.md, read nowhere"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    local = [target.split("#")[0] for target in targets if "://" not in target]
    missing = [target for target in local if target and not (document.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(document):
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    # A path is what stands in backquotes and starts with a folder of the tree.
    paths = re.findall(r"`((?:csrc|fastsae|tests|benchmarks|docs)/[\w./{},*-]+)`", text)
    patterns = [pattern for path in paths for pattern in expand(path)]
    missing = [pattern for pattern in patterns if not any(ROOT.glob(pattern.rstrip("/")))]
    # NAME stands for a primitive to come; the library has a suffix of its Python.
    missing = [pattern for pattern in missing if "NAME" not in pattern and pattern != "fastsae/_cpu"]
    assert missing == []


def expand(path):
    """a/{b,c}.py -> a/b.py, a/c.py."""
    found = re.search(r"\{([^}]*)\}", path)
    if not found:
        return [path]
    return [p for part in found[1].split(",") for p in expand(path[: found.start()] + part + path[found.end() :])]


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line.split(" ;")[0] for line in lines if line and not line.startswith("#")]


def test_hooks_run_the_pinned_tools():
    wanted = re.findall(r"additional_dependencies: \[(.+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert wanted
    assert [pin for pin in wanted if pin not in pins()] == []


def test_every_dependency_is_pinned():
    text = (ROOT / "pyproject.toml").read_text()
    tables = text.split("[project.scripts]")[0]
    names = set(re.findall(r'"([A-Za-z][\w-]*)>=', tables))
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins()}
    assert {"torch", "pytest", "pybind11", "ninja"} <= {name.lower() for name in names}
    assert {name for name in names if name.lower().replace("_", "-") not in pinned} == set()


def test_no_machine_of_ours_is_named():
    """Files in the tree name no home or work folder of the machine they were written on."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    folders = re.compile(r"/(?:home/\w|root/|Users/\w|wo" + r"rk/)")
    named = []
    for name in files.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".cpp", ".h", ".json", ".yaml", ".txt") and path.is_file():
            named += [name] if folders.search(path.read_text(errors="replace")) else []
    assert named == []
