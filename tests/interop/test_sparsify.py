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


def by_formula(options, dead=None):
    """The library with torch's gradient of its own formula: see peers.coders.by_autograd."""

    def run(inputs):
        with coders.by_autograd():
            return one_batch(options, False, dead=dead)(inputs)

    return run


@every_dtype
@every_option
def test_fixed_gradients(options, dtype):
    """Tokens without a positive pre-activation among them: a latent that is kept with activation 0 learns nothing."""
    ours = one_batch(options, True, fix_gradients=True)
    assert_agrees(dtype, ours, by_formula(options), problems(options, silent=True))


@every_dtype
@pytest.mark.parametrize("name", ["topk", "groupmax", "multi_topk"])
def test_fixed_gradients_of_auxk(name, dtype):
    dead, options = dead_latents(15), OPTIONS[name]
    ours = one_batch(options, True, dead=dead, fix_gradients=True)
    assert_agrees(dtype, ours, by_formula(options, dead), problems(options, dead=dead, dead_bias=0.0))


@pytest.mark.parametrize("accelerated", [None, {}, {"fix_gradients": True}], ids=["library", "default", "fixed"])
def test_losses_on_pre_activations_train_the_encoder_only_where_that_is_fixed(accelerated):
    """FusedEncoder.backward ignores the gradient of pre_acts, in 1.3.3 as before."""
    for name, loss, dead in (("topk", "auxk_loss", dead_latents(15)), ("multi_topk", "multi_topk_fvu", None)):
        inputs = problems(OPTIONS[name], dead=dead, dead_bias=0.0)[0]
        x = inputs.pop("x")
        coder = coders.build(inputs, **OPTIONS[name])
        if accelerated is not None:
            fastsae.accelerate(coder, **accelerated)
        out = coder(x, dead_mask=dead)
        (gradient,) = torch.autograd.grad(getattr(out, loss), coder.encoder.weight, allow_unused=True)
        learns = gradient is not None and bool((gradient != 0).any())
        assert learns == (accelerated == {"fix_gradients": True}), loss


@pytest.mark.parametrize("accelerated", [None, {}, {"fix_gradients": True}], ids=["library", "default", "fixed"])
def test_a_latent_kept_at_zero_learns_unless_that_is_fixed(accelerated):
    """FusedEncoder.backward has no mask for ReLU. (All latents are kept here, so there is no choice among zeros.)"""
    inputs = problems({})[0]
    x = inputs.pop("x")
    coder = coders.build(inputs, k=D_SAE)
    if accelerated is not None:
        fastsae.accelerate(coder, **accelerated)
    found = coder.encode(x)
    silent = torch.zeros(x.shape[0], D_SAE).scatter(-1, found.top_indices, found.top_acts)[0] == 0
    assert 0 < silent.sum() < D_SAE
    found.top_acts[0].sum().backward()
    learns = coder.encoder.bias.grad != 0
    assert learns[~silent].all()
    assert learns[silent].all() == (accelerated != {"fix_gradients": True})


@pytest.mark.parametrize("accelerated", [False, True], ids=["library", "accelerated"])
def test_auxk_adds_no_b_dec(accelerated):
    """As 1.3.3 has it: its residual has b_dec in it already. (1.3.0 added it once more.)"""
    inputs = problems({}, dead=dead_latents(15), dead_bias=0.0)[0]
    x = inputs.pop("x")
    coder = coders.build(inputs, k=3)
    if accelerated:
        fastsae.accelerate(coder)
    out = coder(x, dead_mask=dead_latents(15))
    # The gradient of AuxK to b_dec goes through the encoder alone, which it does not train: there is none.
    (gradient,) = torch.autograd.grad(out.auxk_loss, coder.b_dec, allow_unused=True)
    assert out.auxk_loss > 0
    assert gradient is None or not gradient.any()


def ten_steps(options, accelerated):
    """As the Trainer trains, with Adam; k falls from 6 to that of the options on the way."""

    def run(inputs):
        weights = dict(inputs)
        x, target = weights.pop("x"), weights.pop("target", None)
        coder = coders.build(weights, **options)
        if accelerated:
            fastsae.accelerate(coder)
        optimizer = torch.optim.Adam(coder.parameters(), lr=1e-2)
        losses = []
        for step in range(10):
            coder.cfg.k = max(options["k"], 6 - step) if coder.cfg.activation == "topk" else options["k"]
            rows = torch.arange(29).roll(step)
            if not coder.cfg.transcode:
                coder.set_decoder_norm_to_unit_norm()
            out = coder(x[rows], None if target is None else target[rows])
            assert out.latent_indices.shape[1] == coder.cfg.k * (4 if coder.cfg.multi_topk else 1)
            (out.fvu + out.multi_topk_fvu / 8).backward()
            if not coder.cfg.transcode:
                coder.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(out.fvu.detach())
        if accelerated:
            assert served_by_fastsae(coder)
        return {name: p.detach() for name, p in coder.named_parameters()} | {"losses": torch.stack(losses)}

    return run


@every_dtype
@pytest.mark.parametrize("name", ["topk", "groupmax", "multi_topk", "transcoder", "skip transcoder"])
def test_ten_steps(name, dtype):
    options = OPTIONS[name]
    assert_agrees(dtype, ten_steps(options, True), ten_steps(options, False), problems(options))


@pytest.fixture
def coder():
    inputs = problems({})[0]
    del inputs["x"]
    return coders.build(inputs, k=3)


def test_parameters_and_state_dict_stay(coder, tmp_path):
    before, parameters = dict(coder.state_dict()), dict(coder.named_parameters())
    assert fastsae.accelerate(coder) is coder
    assert isinstance(coder, sparsify.SparseCoder)
    assert {name: id(p) for name, p in coder.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    after = coder.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert_same_bits(after[name], tensor)
    coder.save_to_disk(tmp_path)
    loaded = sparsify.SparseCoder.load_from_disk(tmp_path)
    assert type(loaded) is sparsify.SparseCoder
    for name, tensor in before.items():
        assert_same_bits(loaded.state_dict()[name], tensor)


def test_restore(coder):
    fields = set(coder.__dict__)
    fastsae.accelerate(coder, fix_gradients=True)
    assert type(coder) is not sparsify.SparseCoder
    assert fastsae.restore(coder) is coder
    assert type(coder) is sparsify.SparseCoder
    assert set(coder.__dict__) == fields


def test_pre_activations_exist_only_where_they_are_read(coder):
    fastsae.accelerate(coder)
    x = torch.randn(37, D_IN)
    found = coder.encode(x)
    assert isinstance(found.pre_acts, torch.Tensor)
    assert found.pre_acts.shape == (37, D_SAE)
    assert served_by_fastsae(coder)
    expected = torch.nn.functional.linear(x - coder.b_dec, coder.encoder.weight, coder.encoder.bias).relu()
    torch.testing.assert_close(found.pre_acts.clone(), expected)
    assert [reason for _, path, reason in record_of(coder).calls if path == "sparsify"] == ["made dense for clone"]


def test_pre_activations_of_other_weights_are_an_error(coder):
    fastsae.accelerate(coder)
    found = coder.encode(torch.randn(37, D_IN))
    with torch.no_grad():
        coder.encoder.weight.mul_(2)
    with pytest.raises(RuntimeError, match="has changed since"):
        found.pre_acts.sum()


def test_any_leading_dimensions(coder):
    x = torch.randn(2, 3, 5, D_IN)
    with torch.no_grad():
        expected = coder.encode(x)
        found = fastsae.accelerate(coder).encode(x)
    for part, other in zip(found, expected, strict=True):
        assert part.shape == other.shape
        assert part.dtype == other.dtype
    dense = [torch.zeros(2, 3, 5, D_SAE).scatter(-1, f.top_indices, f.top_acts) for f in (found, expected)]
    torch.testing.assert_close(*dense)


def test_under_autocast(coder):
    """In bfloat16 as the library; the products themselves stay more exact."""
    x = torch.randn(37, D_IN)
    runs = []
    for accelerated in (False, True):
        if accelerated:
            fastsae.accelerate(coder)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            runs.append(coder.encode(x)[:2] + coder(x)[:4])
    assert [part.dtype for part in runs[0]] == [part.dtype for part in runs[1]]
    assert served_by_fastsae(coder)
    exact = fastsae.restore(coder)(x).fvu
    assert (runs[1][-1] - exact).abs() <= 2 * (runs[0][-1] - exact).abs() + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda coder: (coder.double(), torch.randn(7, D_IN).double()), "float32 and bfloat16, not torch.float64"),
        (lambda coder: (coder.bfloat16(), torch.randn(7, D_IN)), "the input is torch.float32"),
        (lambda coder: (coder, torch.randn(7, D_IN + 1)), "another width"),
    ],
    ids=["float64", "mixed", "width"],
)
def test_what_falls_back_runs_the_library_and_says_why(coder, prepare, reason):
    coder, x = prepare(coder)
    fastsae.accelerate(coder)
    with contextlib.suppress(RuntimeError):
        # Where the library refuses, so does what derives from it.
        coder.encode(x)
    (((method, path, why), _),) = record_of(coder).calls.items()
    assert (method, path) == ("encode", "sparsify")
    assert reason in why


def test_a_class_of_ones_own_stays_as_it_is():
    class Own(sparsify.SparseCoder):
        pass

    coder = Own(D_IN, sparsify.SparseCoderConfig(num_latents=D_SAE))
    fastsae.accelerate(coder)
    assert type(coder) is Own
    assert "not sparsify's own" in record_of(coder).why_not
    assert record_of(fastsae.restore(coder)) is None


def test_an_option_that_the_adapter_does_not_have(coder):
    with pytest.raises(TypeError, match="faster"):
        fastsae.accelerate(coder, faster=True)


def test_the_kernel_chosen_at_import_is_not_asked(coder, monkeypatch):
    """The library takes Triton's where triton can be imported, whatever device its tensors are on."""

    def refused(*_):
        raise AssertionError("decoder_impl was called")

    monkeypatch.setattr(sparsify.sparse_coder, "decoder_impl", refused)
    x, dead = torch.randn(37, D_IN), dead_latents(15)
    with pytest.raises(AssertionError, match="decoder_impl"):
        coder(x)
    fastsae.accelerate(coder)
    out = coder(x, dead_mask=dead)
    (out.fvu + out.auxk_loss).backward()


def test_in_inference_mode(coder):
    x = torch.randn(37, D_IN)
    with torch.inference_mode():
        expected = coder.encode(x)
        output = coder(x).sae_out
        fastsae.accelerate(coder)
        found = coder.encode(x)
        torch.testing.assert_close(coder(x).sae_out, output)
        torch.testing.assert_close(found.pre_acts + 0, expected.pre_acts)
        torch.testing.assert_close(found.pre_acts.topk(5).values, expected.pre_acts.topk(5).values)


def test_an_empty_batch(coder):
    expected = coder.encode(torch.randn(0, D_IN))
    found = fastsae.accelerate(coder).encode(torch.randn(0, D_IN))
    assert [part.shape for part in found] == [part.shape for part in expected]
