"""The store: what it reads, in which order, and what it says about files that do not fit."""

import itertools

import numpy
import pytest
import torch
from safetensors.torch import save_file

from fastsae.activations.store import ActivationStore

N, D = 103, 4


@pytest.fixture
def folder(tmp_path):
    """Tokens 0, 1, 2, ... over three files of both kinds; token n is [n, n, n, n]."""
    tokens = torch.arange(N, dtype=torch.float32)[:, None].expand(N, D).contiguous()
    numpy.save(tmp_path / "a.npy", tokens[:60].reshape(6, 10, D).numpy())
    save_file({"x": tokens[60:61].clone()}, tmp_path / "b.safetensors")
    save_file({"x": tokens[61:].clone(), "labels": torch.zeros(3)}, tmp_path / "c.safetensors")
    (tmp_path / "notes.txt").write_text("not read")
    return tmp_path


@pytest.fixture
def store(folder):
    return ActivationStore(folder, tensor="x")


def taken(batches, count):
    return torch.stack(list(itertools.islice(batches, count)))


def test_order_of_the_files(store):
    assert (len(store), store.n_tokens, store.d_in, store.dtype) == (N, N, D, torch.float32)
    batches = list(store.in_order(25))
    assert [len(batch) for batch in batches] == [25, 25, 25, 25, 3]
    assert torch.cat(batches)[:, 0].tolist() == list(range(N))
    assert torch.cat(list(store.in_order(25, 30)))[:, 2].tolist() == list(range(30))
    assert store.rows(59, 62)[:, 1].tolist() == [59, 60, 61]
    assert store.rows(5, 5).shape == (0, D)


@pytest.mark.parametrize(("block", "buffer"), [(1, 1), (7, 3), (16, 2), (500, 64)])
def test_each_pass_has_every_token_once(store, block, buffer):
    drawn = taken(store.batches(10, block_tokens=block, buffer_blocks=buffer), 31)[..., 0].flatten().tolist()
    passes = [drawn[start : start + N] for start in range(0, 3 * N, N)]
    assert all(sorted(tokens) == list(range(N)) for tokens in passes)
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] != list(range(N))


def test_same_seed_same_order(store):
    first = taken(store.batches(10, seed=1, block_tokens=8, buffer_blocks=2), 25)
    assert torch.equal(first, taken(store.batches(10, seed=1, block_tokens=8, buffer_blocks=2), 25))
    assert not torch.equal(first, taken(store.batches(10, seed=2, block_tokens=8, buffer_blocks=2), 25))


@pytest.mark.parametrize("start", [0, 1, 3, 10, 11, 24])
def test_start_goes_on_where_another_stopped(store, start):
    settings = {"block_tokens": 8, "buffer_blocks": 2}
    whole = taken(store.batches(10, **settings), 30)
    assert torch.equal(taken(store.batches(10, start=start, **settings), 30 - start), whole[start:])


def test_batches_larger_than_a_pass(store):
    (batch,) = itertools.islice(store.batches(250), 1)
    assert len(batch) == 250
    assert sorted(batch[:N, 0].tolist()) == list(range(N))


def test_bad_arguments(store):
    with pytest.raises(ValueError, match="batch_size = 0: expected an int of at least 1"):
        store.batches(0)
    with pytest.raises(ValueError, match="start = -1"):
        store.batches(1, start=-1)
    with pytest.raises(ValueError, match="batch_size = 0"):
        next(store.in_order(0))


def test_bad_files(tmp_path, folder):
    def refused(error, message, *paths, tensor=None):
        with pytest.raises(error, match=message):
            ActivationStore([tmp_path / path for path in paths], tensor=tensor)

    refused(FileNotFoundError, "nowhere.npy does not exist", "nowhere.npy")
    refused(ValueError, "paths is empty")
    refused(ValueError, r"c.safetensors holds the tensors \['labels', 'x'\]", "c.safetensors")
    refused(ValueError, r"c.safetensors: labels is torch.float32 \[3\]", "c.safetensors", tensor="labels")
    refused(ValueError, "notes.txt: expected a file that ends in .npy or .safetensors", "notes.txt")
    (tmp_path / "empty").mkdir()
    refused(FileNotFoundError, "empty holds no .npy or .safetensors file", "empty")

    numpy.save(tmp_path / "wide.npy", numpy.zeros((3, D + 1), dtype=numpy.float32))
    refused(ValueError, "wide.npy holds torch.float32 activations of width 5", "a.npy", "wide.npy")
    numpy.save(tmp_path / "half.npy", numpy.zeros((3, D), dtype=numpy.float16))
    refused(ValueError, "half.npy holds torch.float16", "a.npy", "half.npy")
    numpy.save(tmp_path / "whole.npy", numpy.zeros((3, D), dtype=numpy.int64))
    refused(ValueError, r"whole.npy is torch.int64 \[3, 4\]", "whole.npy")
    numpy.save(tmp_path / "fortran.npy", numpy.asfortranarray(numpy.zeros((3, D))))
    refused(ValueError, "fortran.npy is in Fortran order", "fortran.npy")
    numpy.save(tmp_path / "none.npy", numpy.zeros((0, D), dtype=numpy.float32))
    refused(ValueError, "none.npy: expected at least one activation", "none.npy")


class Touch:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numpy.save("pickle.npy", numpy.array([[Touch()]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"pickle.npy is not a whole .npy file"):
        ActivationStore("pickle.npy")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["a.npy", "c.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.9])
def test_truncated_files(folder, name, kept):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=name):
        ActivationStore(folder / name, tensor="x")
