"""TopKSAE against the dense formula: outputs, losses, gradients, options, and the memory of its parameters."""

import copy
import itertools

import pytest
import torch

import fastsae
from fastsae.testing import assert_accurate, gradients

OPTIONS = [
    {},
    {"relu": "before"},
    {"apply_b_dec_to_input": False},
    {"normalize_activations": "scalar"},
    {"normalize_activations": "layer_norm"},
    {"normalize_decoder": False, "init": "anthropic"},
]


def build(d_in=24, d_sae=300, k=5, dtype=torch.float32, **options):
    sae = fastsae.TopKSAE(d_in, d_sae, k, dtype=dtype, **options)
    with torch.no_grad():
        # Biases that matter: zeros would hide a term left out.
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_(std=0.5)
    if options.get("normalize_activations") == "scalar":
        sae.set_activation_scale(0.5)
    return sae


def dense(sae):
    """The whole module in dense PyTorch, of (x, W_enc, b_enc, W_dec, b_dec) in any dtype: x̂, total loss."""

    def run(x, W_enc, b_enc, W_dec, b_dec):
        scale = sae.activation_scale.to(x.dtype)
        mean = std = None
        if sae.normalize_activations == "scalar":
            x = x * scale
        elif sae.normalize_activations == "layer_norm":
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            x = (x - mean) / (std + 1e-5)
        pre = (x - b_dec if sae.apply_b_dec_to_input else x) @ W_enc + b_enc
        values, indices = pre.topk(sae.k, dim=-1)
        acts = torch.zeros_like(pre).scatter(-1, indices, values.relu())
        y = acts @ W_dec + b_dec
        fvu = (y - x).square().sum(-1).mean() / x.var(dim=0, unbiased=False).sum().detach()
        out = y
        if sae.normalize_activations == "scalar":
            out = y / scale
        elif sae.normalize_activations == "layer_norm":
            out = y * std + mean
        return out, fvu

    return run


def parameters(sae):
    return [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]


@pytest.mark.costly
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_output_and_loss_match_the_dense_formula(backend, options):
    sae = build(**options)
    # One number may be exact by luck: the error of a loss is measured over several batches.
    batches = torch.randn(16, 37, 24)
    losses = torch.stack([sae.loss(x).total for x in batches])

    def formula(batches, *weights):
        results = [dense(sae)(x, *weights) for x in batches]
        return torch.stack([out for out, _ in results]), torch.stack([fvu for _, fvu in results])

    assert_accurate([sae(batches).sae_out, losses], formula, batches, *parameters(sae))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_match_the_dense_formula(backend, options):
    sae = build(**options)
    x = torch.randn(37, 24, requires_grad=True)
    sae.loss(x).total.backward()
    actual = [x.grad, *(p.grad for p in parameters(sae))]

    def formula(x, *weights):
        return gradients(lambda *inputs: dense(sae)(*inputs)[1], [x, *weights], torch.ones((), dtype=x.dtype))

    if options.get("normalize_activations") == "layer_norm" or not options:
        # FVU's denominator is a constant here, as in training; x's own gradient follows.
        assert x.grad is not None
    assert_accurate(actual, formula, x.detach(), *(p.detach() for p in parameters(sae)))


def test_gradcheck():
    sae = build(d_in=6, d_sae=40, k=3, dtype=torch.float64)
    x = torch.randn(9, 6, dtype=torch.float64)

    def total(*weights):
        return torch.func.functional_call(LossOf(sae), dict(zip(names, weights, strict=True)), (x,))

    names = [f"sae.{name}" for name, _ in sae.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in sae.parameters()]
    assert torch.autograd.gradcheck(total, weights)


class LossOf(torch.nn.Module):
    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, x):
        return self.sae.loss(x).total


def test_b_dec_gets_both_of_its_gradients(backend):
    """From the reconstruction and, through x - b_dec, from the encoder; each is tested by taking the other away."""
    x = torch.randn(37, 24)
    with_encoder, without = build(), build(apply_b_dec_to_input=False)
    without.load_state_dict(with_encoder.state_dict())
    for sae in (with_encoder, without):
        sae.loss(x).total.backward()
    assert not torch.allclose(with_encoder.b_dec.grad, without.b_dec.grad)


def test_memory_is_feature_major_and_stays_so():
    sae = build()
    x = torch.randn(37, 24)
    optimizer = torch.optim.Adam(sae.parameters(), fused=True)
    sae.loss(x).total.backward()
    optimizer.step()
    moved = copy.deepcopy(sae).to(torch.bfloat16)
    tensors = [sae.W_enc, sae.W_enc.grad, optimizer.state[sae.W_enc]["exp_avg"], moved.W_enc]
    assert all(t.shape == (24, 300) and t.T.is_contiguous() for t in tensors)
    assert sae.W_dec.grad.is_contiguous()


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD], ids=["Adam", "SGD"])
def test_hooks_keep_decoder_rows_at_unit_norm(backend, optimizer):
    sae = build()
    opt = optimizer(sae.parameters(), lr=0.1)
    sae.register_optimizer_hooks(opt)
    x = torch.randn(37, 24)
    sae.loss(x).total.backward()
    seen = {}
    opt.register_step_pre_hook(lambda *_: seen.update(grad=sae.W_dec.grad.clone(), W_dec=sae.W_dec.detach().clone()))
    opt.step()
    along = (seen["grad"].double() * seen["W_dec"].double()).sum(dim=1)
    scale = seen["grad"].double().norm(dim=1)
    assert (along.abs() <= torch.finfo(torch.float32).eps * 24 * scale).all()
    norms = sae.W_dec.double().norm(dim=1)
    assert (norms - 1).abs().max() <= 24 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("auxk", [3, 64], ids=["fewer than dead", "more than dead"])
def test_auxk_matches_the_dense_formula(backend, auxk):
    sae = build(auxk=auxk, dead_after_tokens=1000)
    x = torch.randn(37, 24)
    dead = torch.arange(0, 300, 7)
    with torch.no_grad():
        sae.b_enc[dead] = -100.0
    sae.tokens_since_fired[dead] = 1000
    loss = sae.loss(x)
    loss.total.backward()
    actual = [loss.auxk, loss.total, *(p.grad for p in parameters(sae))]

    def formula(x, *weights):
        def run(W_enc, b_enc, W_dec, b_dec):
            y, fvu = dense(sae)(x, W_enc, b_enc, W_dec, b_dec)
            error = (x - y).detach()
            pre = (x - b_dec) @ W_enc[:, dead] + b_enc[dead]
            values, indices = pre.topk(min(auxk, len(dead)))
            acts = torch.zeros_like(pre).scatter(1, indices, values.relu())
            missed = (acts @ W_dec[dead] - error).square().sum(1).mean()
            aux = missed / error.var(dim=0, unbiased=False).sum()
            return aux, fvu + sae.auxk_coefficient * aux

        inputs = [w.detach().requires_grad_() for w in weights]
        aux, total = run(*inputs)
        return [aux.detach(), total.detach(), *torch.autograd.grad(total, inputs)]

    assert_accurate(actual, formula, x, *(p.detach() for p in parameters(sae)))


def test_auxk_costs_grow_with_the_dead_alone(monkeypatch):
    """The auxiliary encode sees as many latents as are dead."""
    seen = []
    from fastsae.saes import auxk, topk

    original = topk.encode_topk
    for module in (topk, auxk):
        monkeypatch.setattr(
            module, "encode_topk", lambda x, W, *a, **k: (seen.append(W.shape[1]), original(x, W, *a, **k))[1]
        )
    sae = build(dead_after_tokens=10)
    sae.tokens_since_fired[:17] = 10
    with torch.no_grad():
        sae.b_enc[:17] = -100.0
    sae.loss(torch.randn(3, 24))
    assert seen == [300, 17]


def test_firing_counts():
    sae = build()
    x = torch.randn(37, 24)
    loss = sae.loss(x)
    fired = loss.codes.feature_counts() > 0
    assert (sae.tokens_since_fired[fired] == 0).all()
    assert (sae.tokens_since_fired[~fired] == 37).all()
    sae.eval()
    sae.loss(x)
    assert (sae.tokens_since_fired[~fired] == 37).all(), "evaluation does not count"


def test_evaluation_has_no_auxk():
    sae = build(dead_after_tokens=1).eval()
    sae.tokens_since_fired.fill_(100)
    loss = sae.loss(torch.randn(37, 24))
    assert loss.auxk.item() == 0
    assert loss.total.item() == loss.fvu.item()


@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (24,), (2, 3, 24), (2, 0, 24)], ids=str)
def test_any_leading_dimensions(backend, shape):
    sae = build()
    x = torch.randn(*shape)
    out = sae(x)
    assert out.sae_out.shape == shape
    assert out.codes.shape == (*shape[:-1], 300)
    flat = sae(x.reshape(-1, 24)).sae_out.reshape(shape)
    assert torch.equal(out.sae_out, flat)


def test_a_bad_token_stays_alone(backend):
    sae = build()
    x = torch.randn(37, 24)
    clean = sae(x).sae_out
    x[3, 5], x[7, 2] = float("nan"), float("inf")
    out = sae(x).sae_out
    others = [n for n in range(37) if n not in (3, 7)]
    assert torch.equal(out[others], clean[others])
    assert not out[3].isfinite().any()
    assert not out[7].isfinite().all()


def test_layer_norm_codes_decode_anywhere_and_others_are_refused():
    sae = build(normalize_activations="layer_norm")
    x = torch.randn(4, 9, 24)
    codes = sae.encode(x)
    assert torch.equal(sae.decode(codes), sae(x).sae_out)
    assert torch.equal(sae.decode(codes.rows(slice(3, 8))), sae(x).sae_out.reshape(-1, 24)[3:8])
    bare = fastsae.SparseCodes(codes.values.detach(), codes.indices, codes.d_sae)
    with pytest.raises(ValueError, match="input_statistics"):
        sae.decode(bare)


def test_estimated_scale_gives_the_usual_norm():
    sae = fastsae.TopKSAE(24, 300, 5, normalize_activations="scalar")
    x = 7 * torch.randn(5, 100, 24)
    scale = sae.estimate_activation_scale(x)
    assert (x * scale).norm(dim=-1).mean().item() == pytest.approx(24**0.5, rel=1e-6)


def test_k_may_change_at_any_time():
    sae = build()
    sae.k = 2
    assert sae.encode(torch.randn(3, 24)).values.shape == (3, 2)


def test_initialize_b_dec_is_the_geometric_median():
    sae = build()
    x = torch.cat([torch.randn(99, 24), 1e4 * torch.ones(1, 24)])
    sae.initialize_b_dec(x)
    here = (x - sae.b_dec).norm(dim=1).sum()
    around = [(x - sae.b_dec - step).norm(dim=1).sum() for step in 0.1 * torch.randn(20, 24)]
    assert all(here <= other for other in around)
    assert sae.b_dec.norm() < 10, "one outlier does not move a median far"


def test_initialization_names():
    openai, anthropic = (
        fastsae.TopKSAE(24, 300, 5),
        fastsae.TopKSAE(24, 300, 5, normalize_decoder=False, init="anthropic"),
    )
    for sae, norm in ((openai, 1.0), (anthropic, 0.1)):
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.full((300,), norm))
        assert torch.equal(sae.W_enc, sae.W_dec.T)


BAD = [
    ({"k": 0}, "k = 0"),
    ({"k": 301}, "k = 301"),
    ({"k": True}, "k = True"),
    ({"d_in": 0}, "d_in = 0"),
    ({"d_sae": -1, "k": 1}, "d_sae = -1"),
    ({"relu": "never"}, "relu = 'never'"),
    ({"auxk": -1}, "auxk = -1"),
    ({"auxk_coefficient": float("nan")}, "auxk_coefficient = nan"),
    ({"dead_after_tokens": 0}, "dead_after_tokens = 0"),
    ({"normalize_activations": "batch"}, "normalize_activations = 'batch'"),
    ({"init": "zeros"}, "init = 'zeros'"),
    ({"init": "anthropic"}, "normalize_decoder=False"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fastsae.TopKSAE(**{"d_in": 24, "d_sae": 300, "k": 5} | options)


def test_bad_inputs_are_named():
    sae = build()
    with pytest.raises(TypeError, match=r"x is torch.int64"):
        sae(torch.zeros(3, 24, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x has shape \(3, 23\).*d_in = 24"):
        sae(torch.zeros(3, 23))
    with pytest.raises(ValueError, match=r"x is on meta and the SAE on cpu"):
        sae(torch.zeros(3, 24, device="meta"))
    with pytest.raises(ValueError, match="uses no scale"):
        sae.set_activation_scale(2.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    sae = build(dtype=dtype)
    out = sae(torch.randn(37, 24))
    assert out.sae_out.dtype == dtype
    sae.loss(torch.randn(37, 24, dtype=dtype)).total.backward()
    assert all(p.grad.dtype == dtype for p in sae.parameters())


@pytest.mark.parametrize("normalize", ["none", "scalar", "layer_norm"])
def test_compiles_whole(normalize):
    sae = build(normalize_activations=normalize).eval()
    x = torch.randn(37, 24)
    compiled = torch.compile(lambda x: sae.loss(x).total, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()
    loss = compiled(x)
    loss.backward()
    compiled_grads = [p.grad.clone() for p in sae.parameters()]
    sae.zero_grad()
    expected = sae.loss(x).total
    expected.backward()
    assert torch.equal(loss, expected)
    for grad, p in zip(compiled_grads, sae.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)


def test_autocast_does_not_change_the_result():
    sae = build()
    x = torch.randn(37, 24)
    expected = sae(x).sae_out
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sae(x).sae_out, expected)


def test_training_learns_a_sparse_dictionary():
    """Ground truth: 64 directions in 32 dimensions, 3 active; a TopK SAE explains most of it within 300 steps."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    sae = fastsae.TopKSAE(32, 128, 3)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    sae.register_optimizer_hooks(optimizer)
    for _ in itertools.repeat(None, 300):
        places = torch.rand(256, 64, generator=generator).argsort(dim=1)[:, :3]
        x = (torch.rand(256, 3, 1, generator=generator) + 0.5).mul(directions[places]).sum(dim=1)
        optimizer.zero_grad()
        loss = sae.loss(x)
        loss.total.backward()
        optimizer.step()
    assert loss.fvu.item() < 0.15
