"""Which instruction sets there are, and how one is chosen."""

import pytest
import torch

from fastsae.backends import native
from fastsae.testing import backends

if native.cpu is None:
    pytest.skip(native.why_not_cpu, allow_module_level=True)


@pytest.fixture(autouse=True)
def _restored():
    before = native.cpu.isa()
    yield
    native.cpu.select_isa(before)


def test_portable_code_runs_everywhere():
    assert native.cpu.isas()[0] == ("portable", True, True)


def test_every_one_that_runs_here_can_be_selected():
    for name, _, runs_here in native.cpu.isas():
        assert native.cpu.select_isa(name) == runs_here
        assert not runs_here or native.cpu.isa() == name


def test_an_unknown_one_is_refused_and_changes_nothing():
    before = native.cpu.isa()
    assert not native.cpu.select_isa("avx1024")
    assert native.cpu.isa() == before


def test_the_environment_names_one(monkeypatch):
    monkeypatch.setenv("FASTSAE_ISA", "portable")
    native._load()
    assert native.cpu.isa() == "portable"


def test_the_environment_names_none_that_is_there(monkeypatch):
    monkeypatch.setenv("FASTSAE_ISA", "avx1024")
    with pytest.raises(ValueError, match=r"FASTSAE_ISA='avx1024': this machine and build have portable"):
        native._load()


def test_an_active_backend_selects_its_own_and_puts_the_last_one_back():
    before = native.cpu.isa()
    for backend in backends():
        with backend.active():
            assert native.cpu.isa() == (backend.isa or before)
        assert native.cpu.isa() == before


def test_threads_are_those_of_torch():
    """One OpenMP runtime in the process: torch.set_num_threads rules the kernels too."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert native.cpu.max_threads() == 3
    finally:
        torch.set_num_threads(before)
