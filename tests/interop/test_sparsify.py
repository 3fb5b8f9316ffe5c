"""sparsify's SparseCoder and Trainer before and after fastsae.accelerate, as installed (eai-sparsify 1.3.3).

"Before" is the library's own code, by which fastsae.testing measures what rounding may do.
"""

import contextlib

import pytest
import torch
from interop.installed import sparsify
from peers import coders
from peers.comparison import D_IN, D_SAE, SEEDS, assert_agrees, dead_latents, draw, gradients

import fastsae
from fastsae.interop.record import record_of
from fastsae.testing import assert_same_bits

DTYPES = [torch.float32, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
# With 3 latents kept every token of these problems has as many that are positive.
OPTIONS = {
    "topk": {"k": 3},
    "every latent kept": {"k": D_SAE},
    "groupmax": {"k": 4, "activation": "groupmax"},
    "multi_topk": {"k": 2, "multi_topk": True},
    "groupmax, multi_topk": {"k": 4, "activation": "groupmax", "multi_topk": True},
    "transcoder": {"k": 3, "transcode": True},
    "skip transcoder": {"k": 3, "transcode": True, "skip_connection": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def problems(options, **kwargs):
    names = ("b_enc", "W_skip") if options.get("skip_connection") else ("b_enc",)
    drawn = [draw(seed, *names, **{"d_out": D_IN, "silent": False} | kwargs) for seed in range(SEEDS)]
    for problem in drawn:
        if options.get("skip_connection"):
            problem["W_skip"] = problem["W_skip"][:, :D_IN]
        if options.get("transcode"):
            problem["target"] = problem["x"].roll(1, 0) * 0.5
    return drawn


def served_by_fastsae(coder):
    calls = record_of(coder).calls
    return calls and {path for _, path, _ in calls} == {"fastsae"}


def one_batch(options, accelerated, *, dead=None, fix_gradients=False):
    """What `encode` and `forward` return, and the gradients of fvu + AuxK / 4 + Multi-TopK / 8."""

    def run(inputs):
        weights = dict(inputs)
        x, target = weights.pop("x"), weights.pop("target", None)
        x = x.clone().requires_grad_()
        coder = coders.build(weights, **options)
        if accelerated:
            fastsae.accelerate(coder, fix_gradients=fix_gradients)
        found = coder.encode(x)
        out = coder(x, target, dead_mask=dead)
        (out.fvu + 0.25 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        if accelerated:
            assert served_by_fastsae(coder)
        results = {
            "activations": torch.zeros_like(found.pre_acts).scatter(-1, found.top_indices, found.top_acts),
            "output": out.sae_out,
            "latents": torch.zeros(x.shape[0], D_SAE, dtype=x.dtype).scatter(-1, out.latent_indices, out.latent_acts),
            "fvu": out.fvu,
            "auxk": out.auxk_loss,
            "multi_topk": out.multi_topk_fvu,
            "pre-activations": found.pre_acts + 0,
            "gradient of x": x.grad,
        }
        results = {name: value.detach() for name, value in results.items()}
        return results | gradients(coder, weights, coders.NAMES)

    return run


@every_dtype
@every_option
def test_a_batch(options, dtype):
    assert_agrees(dtype, one_batch(options, True), one_batch(options, False), problems(options))


@every_dtype
@pytest.mark.parametrize("n_dead", [6, 10, 15])
@pytest.mark.parametrize("name", ["topk", "groupmax", "multi_topk", "skip transcoder"])
def test_auxk(name, n_dead, dtype):
    """d_in // 2 = 10 of the dead are wanted."""
    dead, options = dead_latents(n_dead), OPTIONS[name]
    runs = (one_batch(options, accelerated, dead=dead) for accelerated in (True, False))
    assert_agrees(dtype, *runs, problems(options, dead=dead, dead_bias=0.0))
