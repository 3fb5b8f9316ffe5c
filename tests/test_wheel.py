"""The package as it is shipped: built in isolation, installed elsewhere, run from outside the source tree."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHIPPED = ["csrc", "fastsae", "docs", "tests", "MANIFEST.in", "Makefile", "constraints.txt", "LICENSE", "setup.py"]
TYPICAL = """
import json, sys, torch, fastsae
sae = fastsae.TopKSAE(d_in=16, d_sae=512, k=4)
x = torch.randn(5, 16)
codes = sae.encode(x)
dense = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
kept = dense.topk(4, dim=1).values
assert torch.allclose(codes.values, kept, atol=1e-5), (codes.values, kept)
assert torch.allclose(sae.decode(codes), codes.to_dense() @ sae.W_dec + sae.b_dec, atol=1e-5)
from fastsae.backends import native
print(json.dumps({"file": fastsae.__file__, "native": native.cpu is not None, "why_not": native.why_not_cpu}))
"""


def environment(**variables):
    """This process's environment without what would lead back to the source tree or to another build."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FASTSAE_") and name not in ("PYTHONPATH", "VIRTUAL_ENV", "CXX")
    }
    return kept | variables


def run(command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A copy of the source tree without anything that was built in it."""
    copy = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for path in [*(ROOT / name for name in SHIPPED), *ROOT.glob("*.md"), ROOT / "pyproject.toml"]:
        if path.is_dir():
            shutil.copytree(path, copy / path.name, ignore=ignored)
        elif path.exists():
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="session")
def sdist(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, tree], env=environment())
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def native_wheel(sdist, tmp_path_factory):
    """The wheel that pip builds from the source archive in its isolated environment, and what pip said."""
    out = tmp_path_factory.mktemp("native")
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", out, sdist]
    log = run(command, env=environment(FASTSAE_REQUIRE_NATIVE="1"))
    (wheel,) = out.glob("*.whl")
    return wheel, log


def pure_wheel(tree, out, **variables):
    # Copied anew: a build leaves its folder in the tree. Without isolation, since these two differ from the
    # isolated build only in what setup.py finds.
    shutil.copytree(tree, out / "tree")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out]
    run([*command, out / "tree"], env=environment(**variables))
    (wheel,) = out.glob("*.whl")
    return wheel


class Installed:
    """A clean virtual environment with a wheel in it, which finds torch and the like where this process does."""

    def __init__(self, folder, wheel):
        self.folder, self.elsewhere = folder / "venv", folder / "elsewhere"
        self.elsewhere.mkdir()
        venv.create(self.folder, symlinks=True)
        self.bin = self.folder / ("Scripts" if os.name == "nt" else "bin")
        install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
        run([sys.executable, "-m", "pip", "--python", self.python, *install], env=environment())
        (site,) = {Path(p) for p in self.python_says("import sysconfig; print(sysconfig.get_path('purelib'))").split()}
        # Behind the wheel on sys.path, and without the .pth files there, of which one is the editable install's.
        (site / "outer.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")

    @property
    def python(self):
        return self.bin / "python"

    def python_says(self, code, **variables):
        done = subprocess.run(
            [self.python, "-c", code], cwd=self.elsewhere, env=environment(**variables), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def fastsae(self, *arguments):
        """Runs the installed script; its exit code and output."""
        command = [self.bin / "fastsae", *arguments]
        done = subprocess.run(command, cwd=self.elsewhere, env=environment(), capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def check_typical_use(self, native):
        said = json.loads(self.python_says(TYPICAL).splitlines()[-1])
        assert Path(said["file"]).is_relative_to(self.folder)
        assert said["native"] == native, said["why_not"]


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_source_archive_is_whole(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = [path for path in ROOT.joinpath("csrc").rglob("*") if path.is_file()]
    assert {str(path.relative_to(ROOT)) for path in tracked} <= names
    assert {"setup.py", "LICENSE", "CHANGELOG.md", "constraints.txt", "Makefile", "tests/conftest.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_an_isolated_build_downloads_no_torch(native_wheel):
    _, log = native_wheel
    collected = [line.split()[1] for line in log.splitlines() if line.strip().startswith("Collecting ")]
    assert collected, log[-2000:]
    assert {name.split(">")[0].split("=")[0] for name in collected} <= {"setuptools", "pybind11", "ninja"}


def test_the_wheel_holds_what_runs(native_wheel):
    wheel, _ = native_wheel
    names = names_in(wheel)
    assert [name for name in names if name.startswith("fastsae/_cpu") and name.endswith((".so", ".pyd"))]
    assert "py3-none-any" not in wheel.name
    source = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fastsae").rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    assert source - set(names) == set()
    assert not [name for name in names if name.startswith(("csrc", "tests", "build"))]


def test_the_wheel_runs(native_wheel, tmp_path):
    wheel, _ = native_wheel
    installed = Installed(tmp_path, wheel)
    installed.check_typical_use(native=True)
    code, output = installed.fastsae("doctor")
    assert code == 0, output
    assert str(installed.folder) in output
    code, output = installed.fastsae("--help")
    assert code == 0
    assert "doctor" in output
    help_of_module = installed.python_says(
        "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module('fastsae', run_name='__main__')"
    )
    assert "doctor" in help_of_module


def test_without_native_code_it_serves_in_pure_pytorch(tree, tmp_path):
    wheel = pure_wheel(tree, tmp_path, FASTSAE_NO_NATIVE="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    installed = Installed(tmp_path, wheel)
    installed.check_typical_use(native=False)
    code, output = installed.fastsae("doctor")
    assert code == 0, output
    assert "Missing: the native CPU library is not there" in output
    assert "install a C++17 compiler" in output


def test_without_a_compiler_it_installs(tree, tmp_path):
    # Nothing but Python on the path.
    wheel = pure_wheel(tree, tmp_path, PATH=str(Path(sys.executable).parent))
    assert wheel.name.endswith("-py3-none-any.whl")


def test_a_compiler_that_fails_leaves_pure_pytorch(tree, tmp_path):
    wheel = pure_wheel(tree, tmp_path, CXX="false")
    assert not [name for name in names_in(wheel) if name.startswith("fastsae/_cpu")]
    Installed(tmp_path, wheel).check_typical_use(native=False)


@pytest.mark.parametrize("cxx", ["false", "no-such-compiler"])
def test_requiring_native_code_fails_without_it(tree, tmp_path, cxx):
    shutil.copytree(tree, tmp_path / "tree")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
    options = {"cwd": tmp_path / "tree", "capture_output": True, "text": True}
    done = subprocess.run(command, env=environment(FASTSAE_REQUIRE_NATIVE="1", CXX=cxx), **options)
    assert done.returncode != 0
    assert not list(tmp_path.rglob("_cpu*.so"))


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("has_nvcc", [False, True])
def test_a_cuda_library_that_cannot_be_built(tree, tmp_path, has_nvcc, required):
    shutil.copytree(tree, tmp_path / "tree")
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    if has_nvcc:
        nvcc.write_text("#!/bin/sh\nexit 1\n")
        nvcc.chmod(0o755)
    # CXX=false: the CPU library is not what this is about.
    variables = {"CXX": "false", "CUDA_HOME": str(tmp_path / "cuda"), "FASTSAE_CUDA": "1"}
    if required:
        variables["FASTSAE_REQUIRE_CUDA"] = "1"
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
    options = {"cwd": tmp_path / "tree", "capture_output": True, "text": True}
    done = subprocess.run(command, env=environment(**variables), **options)
    assert (done.returncode != 0) == required, done.stdout + done.stderr
    assert ("CUDA library was not built" if has_nvcc else "no nvcc found") in done.stderr or required
    assert not list(tmp_path.rglob("_cuda*.so"))
