"""setup.py's choices: whether the CUDA library is built, with which nvcc, for which architectures."""

import runpy
from pathlib import Path

import pytest

setup = runpy.run_path(str(Path(__file__).parents[1] / "setup.py"), run_name="choices")


@pytest.mark.parametrize(
    ("variable", "archs"),
    [
        (None, ["80", "90", "100"]),
        ("", ["80", "90", "100"]),
        ("90", ["90"]),
        ("100, 80", ["80", "100"]),
        ("90a;80", ["80", "90a"]),
        ("90 90", ["90"]),
    ],
)
def test_architectures(variable, archs):
    assert setup["cuda_archs"]({} if variable is None else {"FASTSAE_CUDA_ARCHS": variable}) == archs


def test_an_architecture_that_is_none():
    with pytest.raises(SystemExit, match="sm_90"):
        setup["cuda_archs"]({"FASTSAE_CUDA_ARCHS": "sm_90"})


def test_machine_code_for_each_and_ptx_of_the_newest():
    assert setup["gencode"](["80", "90"]) == (
        "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 "
        "-gencode arch=compute_90,code=compute_90"
    )


@pytest.mark.parametrize(
    ("environment", "here", "wanted"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"FASTSAE_CUDA": "1"}, False, True),
        ({"FASTSAE_REQUIRE_CUDA": "1"}, False, True),
        ({"FASTSAE_CUDA": "0"}, False, False),
        ({"FASTSAE_NO_CUDA": "1"}, True, False),
        ({"FASTSAE_NO_CUDA": "1", "FASTSAE_CUDA": "1"}, True, False),
    ],
)
def test_the_cuda_library_is_built_where_it_can_run_or_is_asked_for(environment, here, wanted):
    assert setup["cuda_wanted"](environment, here) is wanted


def test_nvcc_is_that_of_cuda_home(tmp_path):
    for home in ("a", "b"):
        (tmp_path / home / "bin").mkdir(parents=True)
        (tmp_path / home / "bin" / "nvcc").touch(mode=0o755)
    path = {"PATH": str(tmp_path / "b" / "bin")}
    assert setup["nvcc"](path) == str(tmp_path / "b" / "bin" / "nvcc")
    assert setup["nvcc"]({**path, "CUDA_HOME": str(tmp_path / "a")}) == str(tmp_path / "a" / "bin" / "nvcc")
    assert setup["nvcc"]({**path, "CUDA_HOME": str(tmp_path / "c")}) is None
