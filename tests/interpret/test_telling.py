"""The ranking of latents, on firings made by hand."""

import torch

from fastsae.interpret import Firings, most_telling
from fastsae.interpret.telling import MAX_DENSITY, MIN_FIRINGS, MIN_WINDOWS

N_WINDOWS, LENGTH = 100, 60
N_LATENTS = 7


def firings(latents: dict[int, tuple[list[int], float]]) -> Firings:
    """Firings from {latent: (places, activation)} over windows whose token at position p of window w is made below."""
    windows = torch.arange(LENGTH).repeat(N_WINDOWS, 1) + LENGTH * torch.arange(N_WINDOWS)[:, None]
    # The same token stands at position 10 of every window, another at 20; what is at 31 follows different tokens.
    windows[:, 10], windows[:, 20], windows[:, 31] = 7, 8, 9
    places = [torch.tensor(latents.get(f, ([], 0.0))[0], dtype=torch.int64) for f in range(N_LATENTS)]
    values = [torch.full((len(p),), latents.get(f, ([], 0.0))[1]) for f, p in enumerate(places)]
    counts = torch.tensor([len(p) for p in places])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Firings(windows, torch.cat(values), torch.cat(places), offsets, windows.numel())


def at(position: int, n: int) -> list[int]:
    return [window * LENGTH + position for window in range(n)]


def test_concentration_on_a_token_or_its_successor_beats_scattered_strength():
    found = most_telling(firings({0: (at(10, 30), 2.0), 1: (at(15, 30), 9.0), 2: (at(30, 30), 3.0)}), 5)
    assert found.tolist() == [2, 0, 1]


def test_of_equal_concentration_the_strongest_comes_first():
    assert most_telling(firings({0: (at(10, 30), 2.0), 1: (at(20, 30), 2.5)}), 5).tolist() == [1, 0]


def test_dense_rare_and_local_latents_are_left_out():
    n_dense = int(MAX_DENSITY * N_WINDOWS * LENGTH) + 1
    local = [place for window in range(MIN_WINDOWS - 1) for place in range(window * LENGTH, window * LENGTH + 5)]
    assert n_dense <= N_WINDOWS
    assert len(local) >= MIN_FIRINGS
    found = most_telling(
        firings({0: (at(10, n_dense), 9.0), 1: (at(20, MIN_FIRINGS - 1), 9.0), 2: (local, 9.0), 3: (at(30, 40), 1.0)}),
        5,
    )
    assert found.tolist() == [3]


def test_of_latents_on_the_same_token_only_the_first_is_shown():
    assert most_telling(firings({0: (at(10, 30), 2.0), 1: (at(10, 31), 2.5), 2: (at(20, 30), 1.0)}), 5).tolist() == [
        1,
        2,
    ]


def test_no_more_than_asked_and_none_of_none():
    several = firings({0: (at(10, 30), 2.0), 1: (at(20, 30), 2.5), 2: (at(30, 30), 1.0)})
    assert most_telling(several, 2).tolist() == [1, 0]
    assert most_telling(firings({}), 5).tolist() == []
