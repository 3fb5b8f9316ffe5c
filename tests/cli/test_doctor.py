"""`fastsae doctor`: the facts, the findings, and the exit code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import fastsae
from fastsae.backends import dispatch, native
from fastsae.cli import doctor as module

needs_native = pytest.mark.skipif(native.cpu is None, reason=f"no native library: {native.why_not_cpu}")


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(module.doctor)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def levels(report):
    return {finding.level for finding in report.findings}


def test_this_process_is_healthy(run):
    result = run()
    assert result.exit_code == 0, result.output
    assert f"fastsae  {fastsae.__version__}" in re.sub(" +", "  ", result.output)
    assert "Broken" not in result.output


@needs_native
def test_json_holds_the_facts(run):
    facts = json.loads(run("--json").stdout)["facts"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["native library"]["instruction set"] == native.cpu.isa()
    assert {isa["name"] for isa in facts["native library"]["instruction sets"]} >= {"portable", "avx2", "avx512"}
    assert facts["threads"]["native library"] == torch.get_num_threads()
    assert facts["operators"]["screen of encode_topk"] in ("float32", "bfloat16", "int8")
    assert facts["operators"]["cpu float32"]["decode"]["backend"] == "cpu"


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_the_library_shares_the_openmp_of_torch():
    # In a process of its own: a test run may have loaded packages that bring another runtime.
    code = "from fastsae.cli.doctor import examine; print(*examine().facts['threads']['OpenMP runtimes'])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(output.split()) == 1, output
    assert Path(output.strip()).is_relative_to(Path(torch.__file__).parent) or "site-packages" not in output


def test_a_missing_library_is_not_an_error(run, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "cpu", None)
    monkeypatch.setattr(native, "why_not_cpu", "the native CPU library is not there (x); to get it, do this")
    monkeypatch.setattr(fastsae, "__file__", str(tmp_path / "__init__.py"))
    result = run()
    assert result.exit_code == 0
    assert "Missing: the native CPU library is not there (x)\n  -> do this" in result.output


def test_switching_the_library_off_is_not_an_error(monkeypatch):
    monkeypatch.setattr(native, "cpu", None)
    monkeypatch.setattr(native, "why_not_cpu", "FASTSAE_NO_NATIVE=1 is set")
    monkeypatch.setenv("FASTSAE_NO_NATIVE", "1")
    report = module.examine()
    assert not report.broken
    assert any(finding.how == "unset FASTSAE_NO_NATIVE" for finding in report.findings)


def test_a_library_that_does_not_load_is_broken(run, monkeypatch, tmp_path):
    (tmp_path / "_cpu.abi.so").touch()
    monkeypatch.setattr(native, "cpu", None)
    monkeypatch.setattr(native, "why_not_cpu", "the native CPU library is not there (bad magic); to get it, do this")
    monkeypatch.setattr(fastsae, "__file__", str(tmp_path / "__init__.py"))
    result = run()
    assert result.exit_code == 1
    assert "Broken: the native CPU library is not there (bad magic)" in result.output


@needs_native
def test_wrong_results_are_broken(run, monkeypatch):
    monkeypatch.setattr(dispatch.BACKENDS["torch"], "decode", lambda *_: torch.zeros(4, 16))
    result = run()
    assert result.exit_code == 1
    assert "Broken: the native library computes wrong results" in result.output


@pytest.mark.parametrize("name", ["FASTSAE_SCREEN", "FASTSAE_BACKEND"])
def test_a_bad_variable_is_broken(run, monkeypatch, name):
    monkeypatch.setenv(name, "nonsense")
    result = run()
    assert result.exit_code == 1
    assert f"{name}='nonsense'" in result.output


def test_each_openmp_runtime_counts_once(tmp_path):
    real = tmp_path / "libgomp.so.1.0.0"
    real.touch()
    (tmp_path / "libgomp.so.1").symlink_to(real)
    other = tmp_path / "libiomp5.so"
    mapped = [str(real), str(tmp_path / "libgomp.so.1"), str(tmp_path / "libc.so.6")]
    assert module.openmp_libraries(mapped) == [str(real)]
    assert module.openmp_libraries([*mapped, str(other)]) == [str(real), str(other)]


def test_two_openmp_runtimes_are_slow_but_not_broken(monkeypatch):
    monkeypatch.setattr(module, "_mapped_files", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    report = module.examine()
    assert "slow" in levels(report)
    assert not report.broken


def test_missing_extras_are_named(monkeypatch):
    monkeypatch.setattr(module, "EXTRAS", {"demo": ("a_package_nobody_has",)})
    (finding,) = [f for f in module.examine().findings if "a_package_nobody_has" in f.what]
    assert finding.level == "missing"
    assert finding.how == "pip install 'fastsae[demo]'"


def test_extras_are_those_of_pyproject():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for extra, packages in module.EXTRAS.items():
        listed = re.search(rf"^{extra} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
        assert listed, extra
        assert tuple(re.findall(r'"([\w-]+)', listed[1])) == packages


def test_the_cuda_library_is_reported(monkeypatch, tmp_path):
    class Library:
        __file__ = "/x/_cuda.so"

        @staticmethod
        def architectures():
            return "80 90"

    monkeypatch.setattr(native, "cuda", Library)
    assert module.examine().facts["CUDA library"] == {"file": "/x/_cuda.so", "architectures": "80 90"}
    monkeypatch.setattr(native, "cuda", None)
    monkeypatch.setattr(native, "why_not_cuda", "the CUDA library is not there (x); to get it, do this")
    monkeypatch.setattr(fastsae, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = module.examine()
    assert report.facts["CUDA library"] == {"file": None, "why not": "the CUDA library is not there (x)"}
    assert not [finding for finding in report.findings if "CUDA" in finding.what]
    (tmp_path / "_cuda.abi.so").touch()
    report = module.examine()
    assert report.broken
    assert [finding.how for finding in report.findings if "CUDA" in finding.what] == ["do this"]
