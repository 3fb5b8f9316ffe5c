"""compile_check: what it reads from ptxas, what it calls a fault, and that it catches a kernel that spills."""

import pytest

from fastsae.backends import compile_check
from fastsae.backends.compile_check import Usage, parse_ptxas

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5cleanPf' for 'sm_90'
ptxas info    : Function properties for _Z5cleanPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 576 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 12.3 ms
ptxas info    : Compiling entry function '_Z6spillyPf' for 'sm_100a'
ptxas info    : Function properties for _Z6spillyPf
    8 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 8 bytes cumulative stack size
"""
# Two hundred values live at once, in a block that leaves 64 registers for each thread.
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024) spills(float* p) {
  float v[200];
#pragma unroll
  for (int i = 0; i < 200; ++i) v[i] = p[threadIdx.x + i * 1024];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 200; ++i) p[threadIdx.x + i * 1024] = v[i] * v[199 - i];
}
"""
CLEAN = 'extern "C" __global__ void clean(float* p) { p[threadIdx.x] *= 2.0f; }'

needs_nvcc = pytest.mark.skipif(compile_check.nvcc() is None, reason="needs nvcc")


def test_what_ptxas_says():
    assert parse_ptxas(PTXAS) == [
        Usage("_Z5cleanPf", "90", registers=32, shared=576),
        Usage("_Z6spillyPf", "100a", registers=255, spilled=20),
    ]
    assert parse_ptxas("ptxas fatal   : Unresolved extern function") == []


def test_what_a_fault_is():
    assert Usage("k", "90", registers=255, shared=227 << 10).fault == ""
    assert "spills 4 bytes" in Usage("k", "90", spilled=4).fault
    assert "256 registers" in Usage("k", "90", registers=256).fault
    assert "shared memory" in Usage("k", "80", shared=(163 << 10) + 1).fault
    assert Usage("k", "90", shared=(163 << 10) + 1).fault == ""
    assert "shared memory" in Usage("k", "100a", shared=(227 << 10) + 1).fault
    assert Usage("k", "90", error="nvcc: no").fault == "nvcc: no"


@needs_nvcc
def test_a_spilling_kernel_is_caught(tmp_path):
    source = tmp_path / "kernels.cu"
    source.write_text(SPILLS + CLEAN)
    usages = {usage.kernel: usage for usage in compile_check.check_cuda(source, "90")}
    assert "spills" in usages["spills"].fault
    assert usages["clean"].fault == ""
    assert usages["clean"].registers > 0


@needs_nvcc
def test_a_file_that_does_not_compile_is_caught(tmp_path):
    source = tmp_path / "kernels.cu"
    source.write_text("__global__ void broken( {}")
    (usage,) = compile_check.check_cuda(source, "90")
    assert "error" in usage.fault


@needs_nvcc
def test_a_kernel_of_the_package_passes():
    usages = compile_check.check_cuda(compile_check.ROOT / "csrc" / "cuda" / "transpose.cu", "90")
    names = compile_check.readable([usage.kernel for usage in usages])
    assert sorted(names.values()) == ["finish_kernel", "keys_kernel"]
    assert [usage.fault for usage in usages] == ["", ""]


def test_a_triton_kernel_passes():
    pytest.importorskip("triton")
    # In a process of its own: this one runs kernels in Triton's interpreter.
    import concurrent.futures
    import multiprocessing

    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        usages = pool.submit(compile_check.check_triton, "unit_rows", ["90"]).result()
    assert usages
    assert [usage.fault for usage in usages if usage.fault] == []
    assert all(usage.registers > 0 for usage in usages)


def test_without_nvcc_and_triton_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(compile_check, "nvcc", lambda: None)
    monkeypatch.setattr(compile_check.importlib.util, "find_spec", lambda name: None)
    assert compile_check.main(["--archs", "90"]) == 0
    output = capsys.readouterr().out
    assert "nvcc is not found" in output
    assert "Triton is not installed" in output


def test_a_fault_is_an_exit_code(monkeypatch, capsys):
    usages = [Usage("good", "90", registers=10), Usage("bad", "90", registers=10, spilled=4)]
    monkeypatch.setattr(compile_check, "check_all", lambda archs, jobs: (usages, []))
    assert compile_check.main([]) == 1
    assert "bad on sm_90: spills 4 bytes" in capsys.readouterr().out
