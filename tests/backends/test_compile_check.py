"""compile_check: what it reads from ptxas, what it calls a fault, and that it catches a kernel that spills."""

import pytest

from fastsae.backends import compile_check
from fastsae.backends.compile_check import Usage, check_case, parse_ptxas, workers

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


@pytest.fixture(scope="module")
def pool():
    """Kernels are compiled in a process of its own: this one runs them in Triton's interpreter."""
    pytest.importorskip("triton")
    with workers(1) as pool:
        yield pool


def check_sum(most_registers):
    """What a Triton kernel takes that holds 64 numbers a lane and may use so many registers."""
    import triton
    import triton.language as tl

    from fastsae.backends.triton._cases import case

    def body(x, y, BLOCK: tl.constexpr):
        places = tl.arange(0, BLOCK)
        row = tl.load(x + places)
        tl.store(y + places, row * tl.sum(row, axis=0))

    constexprs = {"BLOCK": 2048}
    return check_case(
        case("sum", triton.jit(body), "x *fp32 y *fp32", constexprs, num_warps=1, maxnreg=most_registers), "90"
    )


def test_a_triton_kernel_that_spills_is_caught(pool):
    assert "spills" in pool.submit(check_sum, 32).result().fault
    usage = pool.submit(check_sum, 255).result()
    assert usage.fault == ""
    assert 64 < usage.registers < 255


def test_a_stack_that_is_no_spill_is_no_fault():
    """As ptxas has it where a kernel calls a function."""
    (usage,) = parse_ptxas(
        PTXAS.split("ptxas info    : Compiling entry function '_Z6")[0].replace("0 bytes st", "8 bytes st")
    )
    assert usage.fault == ""


@pytest.mark.parametrize("arch", ["80", "100"])
def test_a_triton_kernel_of_the_package_passes(pool, arch):
    usage = pool.submit(compile_check.check_triton, "unit_rows", 0, arch).result()
    assert usage.fault == ""
    assert usage.registers > 0


def test_cases_that_compile_to_the_same_are_compiled_once(pool):
    cases = pool.submit(compile_check.distinct_cases, "decode").result()
    names = [name for _, name, _ in cases]
    assert "decode fp32 768/2304/4096 fixed k" in names
    assert len(names) == len(set(names)) == 12


def test_without_nvcc_and_triton_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(compile_check, "nvcc", lambda: None)
    monkeypatch.setattr(compile_check.importlib.util, "find_spec", lambda name: None)
    assert compile_check.main(["--archs", "90"]) == 0
    output = capsys.readouterr().out
    assert "csrc/cuda was NOT checked" in output
    assert "The Triton kernels were NOT checked" in output
    assert compile_check.main(["--archs", "90", "--require", "nvcc"]) == 1
    assert compile_check.main(["--archs", "90", "--require", "nvcc,triton"]) == 1


def test_a_compiler_that_is_not_known_is_refused(capsys):
    with pytest.raises(SystemExit):
        compile_check.main(["--require", "gcc"])
    assert "expected nvcc or triton" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--each"]], ids=str)
def test_a_fault_is_an_exit_code(monkeypatch, capsys, arguments):
    usages = [
        Usage("sum wide", "90", registers=10),
        Usage("sum narrow", "90", registers=77, spilled=4),
        Usage("broken", "90", error="no"),
    ]
    monkeypatch.setattr(compile_check, "check_all", lambda archs, jobs: (usages, ["nvcc"]))
    assert compile_check.main(arguments) == 1
    output = capsys.readouterr().out
    assert "sum narrow on sm_90: spills 4 bytes" in output
    assert "broken on sm_90: no" in output
    assert ("sum wide" in output) == bool(arguments)
    monkeypatch.setattr(compile_check, "check_all", lambda archs, jobs: (usages[:1], ["nvcc"]))
    assert compile_check.main(arguments) == 0
