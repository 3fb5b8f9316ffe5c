"""Reading and replacing activations of a real transformers model, and mixing them."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastsae.activations import activation_batches, capture, replace_output, shuffled

HOOK = "transformer.h.0.mlp.act"


@pytest.fixture
def model():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2, n_inner=24)).eval()


@torch.no_grad()
def test_capture_is_what_the_module_returns(model):
    tokens = torch.randint(0, 50, (3, 12))
    seen = []
    handle = model.get_submodule(HOOK).register_forward_hook(lambda m, a, out: seen.append(out))
    model(input_ids=tokens)
    handle.remove()
    assert torch.equal(capture(model, HOOK, tokens), seen[0])


def test_capture_stops_there_and_leaves_no_hook(model):
    ran = []
    model.transformer.h[1].register_forward_hook(lambda *_: ran.append(1))
    capture(model, HOOK, torch.randint(0, 50, (3, 12)))
    assert not ran
    assert not model.get_submodule(HOOK)._forward_hooks


def test_capture_of_a_block_takes_its_hidden_states(model):
    assert capture(model, "transformer.h.0", torch.randint(0, 50, (3, 12))).shape == (3, 12, 8)


@torch.no_grad()
def test_replacing_by_the_same_changes_nothing(model):
    tokens = torch.randint(0, 50, (3, 12))
    expected = model(input_ids=tokens).logits
    with replace_output(model, HOOK, lambda activation: activation.clone()):
        assert torch.equal(model(input_ids=tokens).logits, expected)
    with replace_output(model, HOOK, torch.zeros_like):
        assert not torch.equal(model(input_ids=tokens).logits, expected)
    assert torch.equal(model(input_ids=tokens).logits, expected)


def test_replacing_by_another_shape_is_an_error(model):
    with (
        replace_output(model, HOOK, lambda activation: activation[..., :3]),
        pytest.raises(ValueError, match=r"returned \(3, 12, 3\)"),
    ):
        model(input_ids=torch.randint(0, 50, (3, 12)))


def test_shuffled_serves_each_row_once_in_an_order_of_its_seed():
    blocks = list(torch.arange(1000.0).reshape(-1, 1).split(37))

    def served(seed):
        return list(shuffled(blocks, 200, 32, torch.Generator().manual_seed(seed)))

    rows = torch.cat(served(0))[:, 0]
    assert torch.equal(rows.sort().values, torch.arange(1000.0))
    assert not torch.equal(rows, torch.arange(1000.0))
    assert all(len(batch) == 32 for batch in served(0)[:-1])
    assert torch.equal(torch.cat(served(0)), torch.cat(served(0)))
    assert not torch.equal(torch.cat(served(0)), torch.cat(served(1)))


def test_batches_leave_the_first_position_out(model):
    tokens = torch.randint(0, 50, (4, 12))
    every = capture(model, HOOK, tokens)
    batches = activation_batches(model, HOOK, tokens, batch_size=11, capacity=44, seed=3)
    rows = torch.cat([next(batches) for _ in range(4)])
    kept = {tuple(row) for row in every[:, 1:].flatten(0, 1).tolist()}
    assert all(min((row - torch.tensor(list(kept))).abs().amax(1)) < 1e-5 for row in rows)
