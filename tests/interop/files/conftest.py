"""The libraries whose files these are, imported without a network as tests/peers imports them."""

import peers.conftest  # noqa: F401
import pytest


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
