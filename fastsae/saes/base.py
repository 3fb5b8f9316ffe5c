"""What every SAE shares: parameters and their memory, input checks, normalisation, firing counts, files."""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from fastsae.codes import SparseCodes
from fastsae.ops import decode, normalize_rows_, project_rows_
from fastsae.saes import files, normalization
from fastsae.saes.age import AgeBound
from fastsae.saes.initialization import SCHEMES, geometric_median, initialize


class SAEOutput(NamedTuple):
    """What `sae(x)` returns."""

    sae_out: Tensor  # the reconstruction, [..., d_in]
    codes: SparseCodes


@dataclass
class SAELoss:
    """A loss and its named parts, 0-dimensional tensors; `total` is the one to call backward on.

    total: what training minimises.
    mse: mean over tokens of ‖x̂ - x‖² (summed over d_in), in the normalised space that is encoded.
    fvu: fraction of variance unexplained, Σ‖x̂ - x‖² / Σ‖x - mean(x)‖²; 1 - fvu is the explained variance.
    auxk: FVU of the residual under the dead latents alone; 0 when none is dead.
    codes: what the batch was encoded to.
    """

    total: Tensor
    mse: Tensor
    fvu: Tensor
    auxk: Tensor
    codes: SparseCodes

    def parts(self) -> dict[str, Tensor]:
        """Every term by name, without the codes."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "codes"}


def feature_major(d_in: int, d_sae: int, **kwargs: Any) -> nn.Parameter:
    """A parameter [d_in, d_sae] whose memory is a contiguous [d_sae, d_in]: a latent's direction is one row."""
    return nn.Parameter(torch.zeros(d_sae, d_in, **kwargs).T)


class SAE(
    nn.Module,
    ModelHubMixin,
    library_name="fastsae",
    tags=["sparse-autoencoder", "interpretability"],
    repo_url="https://github.com/fastsae/fastsae",
):
    """Parameters W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in], and the work around them.

    Both weights are feature-major in memory: W_enc.T and W_dec are contiguous.

    Args:
        d_in: width of an activation.
        d_sae: number of latents.
        apply_b_dec_to_input: subtract b_dec from x before encoding.
        normalize_decoder: keep the rows of W_dec at unit norm (see `register_optimizer_hooks`).
        normalize_activations: "none", "scalar" (times `activation_scale`) or "layer_norm".
        init: "openai" or "anthropic" (see fastsae.saes.initialization).
        device, dtype: of the parameters.

    Raises ValueError or TypeError for an argument out of its range.
    """

    architecture: str

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        apply_b_dec_to_input: bool = True,
        normalize_decoder: bool = True,
        normalize_activations: str = "none",
        init: str = "openai",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, size in (("d_in", d_in), ("d_sae", d_sae)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} = {size!r}: expected an int of at least 1")
        _one_of("normalize_activations", normalize_activations, normalization.MODES)
        _one_of("init", init, SCHEMES)
        if init == "anthropic" and normalize_decoder:
            raise ValueError(
                "init='anthropic' starts decoder rows at norm 0.1, normalize_decoder=True keeps them at 1: "
                "expected one of them; pass normalize_decoder=False"
            )
        self.d_in, self.d_sae = d_in, d_sae
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.normalize_decoder = normalize_decoder
        self.normalize_activations = normalize_activations
        self.init = init
        kind = {"device": device, "dtype": dtype}
        self.W_enc = feature_major(d_in, d_sae, **kind)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, **kind))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in, **kind))
        self.b_dec = nn.Parameter(torch.zeros(d_in, **kind))
        self.register_buffer("activation_scale", torch.ones((), device=device, dtype=torch.float32))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, device=device, dtype=torch.int64))
        self._oldest = AgeBound()
        if not self.W_dec.is_meta:
            initialize(self.W_enc, self.W_dec, init)

    # What a file records beside the tensors; the arguments that build the same module again.
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        return {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "normalize_decoder": self.normalize_decoder,
            "normalize_activations": self.normalize_activations,
            "init": self.init,
        }

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    def _checked(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x is {getattr(x, 'dtype', type(x))}: expected a floating tensor [..., {self.d_in}]")
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected [..., d_in] with d_in = {self.d_in}")
        if x.device != self.device:
            raise ValueError(f"x is on {x.device} and the SAE on {self.device}: move one to the other")
        return x.to(self.dtype)

    def _normalized(self, x: Tensor) -> normalization.Normalized:
        return normalization.normalize(self._checked(x), self.normalize_activations, self.activation_scale)

    def encode(self, x: Tensor) -> SparseCodes:
        """Activations [..., d_in] -> their codes over d_sae latents. x is cast to the SAE's dtype."""
        normalized = self._normalized(x)
        codes = self._encode_normalized(normalized.x)
        codes.input_statistics = normalized.statistics
        return codes

    def _encode_normalized(self, x: Tensor) -> SparseCodes:
        raise NotImplementedError

    def decode(self, codes: SparseCodes) -> Tensor:
        """Codes -> reconstruction [..., d_in], on the scale of the activations that were encoded."""
        y = decode(codes, self.W_dec, self.b_dec)
        return normalization.denormalize(y, self.normalize_activations, self.activation_scale, codes.input_statistics)

    def forward(self, x: Tensor) -> SAEOutput:
        """Encodes and decodes: SAEOutput(sae_out [..., d_in], codes)."""
        codes = self.encode(x)
        return SAEOutput(self.decode(codes), codes)

    def loss(self, x: Tensor) -> SAELoss:
        """The training loss of a batch [..., d_in]; in training mode it also counts which latents fired."""
        raise NotImplementedError

    @torch.no_grad()
    def count_firing(self, codes: SparseCodes) -> None:
        """Updates `tokens_since_fired` [d_sae] with a batch; `loss` does so in training mode."""
        fired = codes.feature_counts() > 0
        with self._oldest.growing(self.tokens_since_fired, codes.n_tokens):
            self.tokens_since_fired.add_(codes.n_tokens).masked_fill_(fired, 0)

    @torch.no_grad()
    def set_activation_scale(self, scale: float) -> None:
        """The factor of normalize_activations='scalar'; `estimate_activation_scale` finds the usual one."""
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale = {scale!r}: expected a finite number above 0")
        if self.normalize_activations != "scalar":
            raise ValueError(
                f"normalize_activations = {self.normalize_activations!r} uses no scale: build with 'scalar'"
            )
        self.activation_scale.fill_(scale)

    def estimate_activation_scale(self, x: Tensor) -> float:
        """Sets and returns √d_in / mean‖x‖ over a sample [..., d_in]."""
        scale = normalization.scale_of(self._checked(x))
        self.set_activation_scale(scale)
        return scale

    @torch.no_grad()
    def initialize_b_dec(self, x: Tensor) -> None:
        """Starts b_dec at the geometric median of a sample of activations [..., d_in] (Bricken et al. 2023)."""
        normalized = self._normalized(x).x.reshape(-1, self.d_in)
        self.b_dec.copy_(geometric_median(normalized))

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scales the rows of W_dec to unit norm, if normalize_decoder is on; after each optimizer step."""
        if self.normalize_decoder:
            normalize_rows_(self.W_dec)

    @torch.no_grad()
    def project_decoder_grad_(self) -> None:
        """Takes from W_dec.grad the part along each row, if normalize_decoder is on; before each optimizer step."""
        if self.normalize_decoder and self.W_dec.grad is not None:
            project_rows_(self.W_dec.grad, self.W_dec)

    def register_optimizer_hooks(self, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Makes each `optimizer.step()` project W_dec's gradient before and normalise W_dec after; returns handles.

        For loops that are not one's own; in one's own, `fastsae.training.update` does the same and takes less memory.
        """
        before = optimizer.register_step_pre_hook(lambda *_: self.project_decoder_grad_())
        after = optimizer.register_step_post_hook(lambda *_: self.normalize_decoder_())
        return before, after

    save_pretrained = files.save_pretrained
    _from_pretrained = classmethod(files.from_pretrained)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}: expected one of {', '.join(map(repr, allowed))}")
