"""Every architecture and option against the dense formula in float64: values, every term, every gradient."""

import copy

import pytest
import torch
from architectures import D_SAE, SETTINGS, batch, build, dense

import fastsae
from fastsae.testing import assert_accurate, backends

IDS = [f"{name} {options}" for name, options in SETTINGS]
every = pytest.mark.parametrize(("name", "options"), SETTINGS, ids=IDS)
# The modules are elementwise work around operators that are tested on every backend: one native and the plain one do.
BATCHES = 3
FAST = [backend for backend in backends() if not backend.interpreted] or backends()
PLAIN_AND_BEST = [FAST[0], FAST[-1]] if len(FAST) > 1 else FAST


@every
@pytest.mark.parametrize("backend", PLAIN_AND_BEST, ids=str)
def test_loss_terms_and_gradients(backend, name, options):
    """Over several batches: a loss is one number, and one number may be exact by luck."""
    with backend.active():
        sae = build(name, options)
        batches = [batch(sae) for _ in range(BATCHES)]
        losses, found = [], []
        for x, target in batches:
            sae.zero_grad()
            loss = sae.loss(x, target)
            loss.total.backward()
            losses.append(torch.stack([part.detach() for part in loss.parts().values()]))
            found.append([p.grad.clone() for p in sae.parameters()])
        assert all(any(grad.any() for grad in grads) for grads in zip(*found, strict=True)), "everything learns"
        formula = dense(sae)
        inputs = [t for pair in batches for t in pair]
        parameters = [p.detach() for p in sae.parameters()]
        assert list(formula(*batches[0], *parameters)) == list(loss.parts())

        def run(*inputs):
            leaves = [p.detach().requires_grad_() for p in inputs[2 * BATCHES :]]
            for x, target in zip(inputs[0 : 2 * BATCHES : 2], inputs[1 : 2 * BATCHES : 2], strict=True):
                parts = formula(x, target, *leaves)
                yield (
                    torch.stack([part.detach() for part in parts.values()]),
                    torch.autograd.grad(parts["total"], leaves),
                )

        def values(*inputs):
            return list(torch.stack([parts for parts, _ in run(*inputs)]).unbind(dim=1))

        def gradients(*inputs):
            return [torch.stack(grads) for grads in zip(*(grads for _, grads in run(*inputs)), strict=True)]

        assert_accurate(list(torch.stack(losses).unbind(dim=1)), values, *inputs, *parameters)
        assert_accurate([torch.stack(g) for g in zip(*found, strict=True)], gradients, *inputs, *parameters)


@every
def test_output(name, options):
    """`sae(x)` in evaluation mode is decode of encode, on the scale of the target."""
    sae = build(name, options).eval()
    x, target = batch(sae)
    out = sae(x)
    assert out.sae_out.shape == (x if target is None else target).shape
    assert torch.equal(out.sae_out, sae.decode(sae.encode(x), x))
    # The error of the output is that of the loss, where both encode by the same rule.
    residual = ((out.sae_out - (x if target is None else target)) * scale_of(sae)).flatten(1)
    if sae.normalize_activations != "layer_norm":
        assert residual.square().sum(1).mean().item() == pytest.approx(sae.loss(x, target).mse.item(), rel=1e-5)


def scale_of(sae):
    if sae.normalize_activations != "scalar":
        return 1.0
    return (sae.target_scale if sae.is_transcoder else sae.activation_scale)[..., None]


@every
def test_files_and_copies_keep_everything(name, options, tmp_path):
    sae = build(name, options)
    x, target = batch(sae)
    sae.loss(x, target)
    sae.save_pretrained(tmp_path)
    for again in (fastsae.load(tmp_path), copy.deepcopy(sae)):
        assert type(again) is type(sae)
        assert again.config() == sae.config()
        assert torch.equal(again.eval().loss(x, target).total, sae.eval().loss(x, target).total)
        sae.train()


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(name, options, dtype):
    sae = build(name, options, dtype)
    x, target = batch(sae)
    sae.loss(x, target).total.backward()
    for parameter, value in sae.named_parameters():
        assert value.dtype == (torch.float32 if "threshold" in parameter else dtype)
        assert value.grad.dtype == value.dtype
        assert value.grad.isfinite().all()
    assert sae(x).sae_out.dtype == dtype
    kept = {key: value.dtype for key, value in sae.state_dict().items() if key in sae._kept_dtypes}
    cast = copy.deepcopy(sae).to(torch.float32).to(torch.bfloat16)
    assert {key: cast.state_dict()[key].dtype for key in kept} == kept


@every
def test_any_leading_dimensions(name, options):
    sae = build(name, options).eval()
    x, target = batch(sae, 12)
    flat = sae(x)
    shaped = sae(x.reshape(3, 4, *x.shape[1:]))
    assert shaped.codes.shape == (3, 4, D_SAE)
    assert torch.equal(shaped.sae_out.reshape(flat.sae_out.shape), flat.sae_out)
    assert sae(x[:0]).sae_out.shape == (0, *flat.sae_out.shape[1:])
    assert sae(x[0]).sae_out.shape == flat.sae_out.shape[1:]
    two = sae.loss(x.reshape(3, 4, *x.shape[1:]), None if target is None else target.reshape(3, 4, *target.shape[1:]))
    assert torch.equal(two.total, sae.loss(x, target).total)


@every
def test_a_bad_token_stays_alone(name, options):
    sae = build(name, options).eval()
    x, _ = batch(sae)
    clean = sae(x).sae_out
    x.reshape(len(x), -1)[3, 5], x.reshape(len(x), -1)[7, 2] = torch.nan, torch.inf
    out = sae(x).sae_out
    assert not out[3].isfinite().any()
    assert not out[7].isfinite().all()
    others = [n for n in range(len(x)) if n not in (3, 7)]
    if "BatchTopK" in name or "Matryoshka" in name:
        # Its share of the batch's budget goes to the others, who then keep more.
        assert out[others].isfinite().all()
    else:
        assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("name", ["ReLUSAE", "JumpReLUSAE", "GatedSAE", "BatchTopKSAE", "MatryoshkaSAE", "TopKSAE"])
def test_gradcheck(name):
    """Where no estimator stands in for a derivative, ours is the derivative."""
    options = {"k": 5} if "TopK" in name or "Matryoshka" in name else {}
    if name == "JumpReLUSAE":
        options = {"penalty": "tanh", "bandwidth": 1e-9, "threshold_init": 0.3}
    if name == "GatedSAE":
        # A frozen decoder is left out of the derivative on purpose.
        options = {"freeze_decoder": False}
    sae = build(name, options, torch.float64)
    x, _ = batch(sae, 6)
    x = x.double()
    names = [name for name, _ in sae.named_parameters() if name != "threshold"]
    sae.eval()

    def total(*values):
        return torch.func.functional_call(
            _LossOf(sae), {f"sae.{n}": v for n, v in zip(names, values, strict=True)}, (x,)
        )

    values = [sae.get_parameter(n).detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(total, values, fast_mode=True)


class _LossOf(torch.nn.Module):
    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, x):
        return self.sae.loss(x).total
