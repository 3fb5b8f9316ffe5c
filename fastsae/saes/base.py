"""What every SAE shares: parameters and their memory, input checks, normalisation, the frame of a loss, files."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from fastsae.codes import SparseCodes
from fastsae.ops import decode, normalize_rows_, project_rows_, squared_error
from fastsae.saes import files, normalization
from fastsae.saes.age import AgeBound
from fastsae.saes.code_gradients import HasCodeGradients
from fastsae.saes.decoder_norms import with_norms
from fastsae.saes.initialization import SCHEMES, geometric_median, initialize
from fastsae.saes.inputs import HasInputs
from fastsae.saes.loss import RECONSTRUCTIONS, Penalty, Reconstruction, SAELoss, objective_of, variance
from fastsae.saes.options import flag, one_of, size


class SAEOutput(NamedTuple):
    """What `sae(x)` returns."""

    sae_out: Tensor  # the reconstruction, [..., d_out]
    codes: SparseCodes


class Weights(NamedTuple):
    """The weights as one loss uses them: each through one node of autograd's graph."""

    # W_enc.T, once for all its uses: autograd then meets their gradients before it transposes, where the sparse rows of
    # an auxiliary loss can still be added to the dense ones.
    encoder_rows: Tensor
    W_dec: Tensor
    # [d_sae], where the architecture weighs its penalties by them.
    decoder_norms: Tensor | None


class Active(NamedTuple):
    """What a loss knows of its latents; `codes` are the activations that are decoded."""

    codes: SparseCodes
    extra: Any = None  # what the architecture's penalties need beside them


class SAEOptions(TypedDict, total=False):
    """The options that every architecture passes on to SAE, which explains them."""

    d_out: int | None
    skip: bool
    sites: int | None
    sites_out: int | None
    apply_b_dec_to_input: bool | None
    normalize_decoder: bool
    normalize_activations: str
    init: str
    reconstruction: str
    dead_after_tokens: int
    device: torch.device | str | None
    dtype: torch.dtype | None


def feature_major(d_in: int, d_sae: int, **kwargs: Any) -> nn.Parameter:
    """A parameter [d_in, d_sae] whose memory is a contiguous [d_sae, d_in]: a latent's direction is one row."""
    return nn.Parameter(torch.zeros(d_sae, d_in, **kwargs).T)


class SAE(
    HasCodeGradients,
    HasInputs,
    ModelHubMixin,
    library_name="fastsae",
    tags=["sparse-autoencoder", "interpretability"],
    repo_url="https://github.com/fastsae/fastsae",
):
    """Parameters W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out], and the work around them.

    Both weights are feature-major in memory: W_enc.T and W_dec are contiguous.

    A transcoder (Dunefsky, Chlenski, Nanda 2024) is any SAE with `d_out`: it reconstructs a target other than its
    input, `sae.loss(x, target)`. A crosscoder (Lindsey et al. 2024) is any SAE with `sites`: it reads several layers or
    models at once, x [..., sites, d_in], into one set of codes, and writes them all (or `sites_out` of d_out).

    Args:
        d_in: width of an activation.
        d_sae: number of latents.
        d_out: width of the target; None where the target is the input.
        skip: a transcoder's linear path around the latents, W_skip [d_out, d_in] from zero (Paulo, Shabalin, Belrose
            2025, "Transcoders Beat Sparse Autoencoders for Interpretability").
        sites: number of layers or models whose activations are encoded together; None for activations [..., d_in].
        sites_out: the same of the target of a transcoder.
        apply_b_dec_to_input: subtract b_dec from x before encoding; None is True unless the target is another one.
        normalize_decoder: keep the rows of W_dec at unit norm (see `register_optimizer_hooks`).
        normalize_activations: "none", "scalar" (times `activation_scale`) or "layer_norm".
        init: "openai" or "anthropic" (see fastsae.saes.initialization).
        reconstruction: what the loss counts of the error: "fvu", "mse" (summed over d_out, mean over tokens) or
            "mse_mean" (mean over both).
        dead_after_tokens: a latent that has not fired for so many tokens is dead (10 million in Gao et al. 2024).
        device, dtype: of the parameters.

    Attributes:
        sparsity_scale: a number that multiplies the sparsity coefficients; schedules that warm them up set it.

    Raises ValueError or TypeError for an argument out of its range.
    """

    architecture: str
    # Whether penalties are weighed by the norms of decoder rows.
    _weighs_by_norms = False
    # Tensors that keep their dtype when the module is cast: their digits matter more than their size.
    _kept_dtypes: ClassVar[dict[str, torch.dtype]] = {"activation_scale": torch.float32, "target_scale": torch.float32}

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        d_out: int | None = None,
        skip: bool = False,
        sites: int | None = None,
        sites_out: int | None = None,
        apply_b_dec_to_input: bool | None = None,
        normalize_decoder: bool = True,
        normalize_activations: str = "none",
        init: str = "openai",
        reconstruction: str = "mse",
        dead_after_tokens: int = 10_000_000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (("d_in", d_in), ("d_sae", d_sae)):
            size(name, value)
        for name, value in (("d_out", d_out), ("sites", sites), ("sites_out", sites_out)):
            if value is not None:
                size(name, value)
        for name, value in (("skip", skip), ("normalize_decoder", normalize_decoder)):
            flag(name, value)
        one_of("normalize_activations", normalize_activations, normalization.MODES)
        one_of("init", init, SCHEMES)
        one_of("reconstruction", reconstruction, RECONSTRUCTIONS)
        size("dead_after_tokens", dead_after_tokens)
        if init == "anthropic" and normalize_decoder:
            raise ValueError(
                "init='anthropic' starts decoder rows at norm 0.1, normalize_decoder=True keeps them at 1: "
                "expected one of them; pass normalize_decoder=False"
            )
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_in if d_out is None else d_out
        self.sites, self.sites_out = sites, sites if d_out is None else sites_out
        self.is_transcoder = d_out is not None
        if sites_out is not None and not self.is_transcoder:
            raise ValueError(f"sites_out = {sites_out} without d_out: expected both, or `sites` alone")
        if skip and not self.is_transcoder:
            raise ValueError("skip = True without d_out: expected a transcoder; pass d_out, the width of its target")
        if apply_b_dec_to_input is None:
            apply_b_dec_to_input = not self.is_transcoder
        flag("apply_b_dec_to_input", apply_b_dec_to_input)
        if apply_b_dec_to_input and self.is_transcoder:
            raise ValueError(
                "apply_b_dec_to_input = True with d_out: expected False, as b_dec is a bias of the target and not of x"
            )
        if normalize_activations == "layer_norm" and (self.is_transcoder or sites):
            raise ValueError(
                "normalize_activations = 'layer_norm' with d_out or sites: expected 'none' or 'scalar', since the "
                "statistics that undo it are those of one input"
            )
        self.skip = skip
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.normalize_decoder = normalize_decoder
        self.normalize_activations = normalize_activations
        self.init = init
        self.reconstruction = reconstruction
        self.dead_after_tokens = dead_after_tokens
        self.sparsity_scale = 1.0
        kind = {"device": device, "dtype": dtype}
        width_in, width_out = d_in * (sites or 1), self.d_out * (self.sites_out or 1)
        self.W_enc = feature_major(width_in, d_sae, **kind)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, **kind))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, width_out, **kind))
        self.b_dec = nn.Parameter(torch.zeros(width_out, **kind))
        if skip:
            self.W_skip = nn.Parameter(torch.zeros(width_out, width_in, **kind))
        for name, count, wanted in (
            ("activation_scale", sites, True),
            ("target_scale", sites_out, self.is_transcoder),
        ):
            if wanted:
                shape = () if count is None else (count,)
                self.register_buffer(name, torch.ones(shape, device=device, dtype=torch.float32))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, device=device, dtype=torch.int64))
        self._oldest = AgeBound()
        if not self.W_dec.is_meta:
            initialize(self.W_enc, self.W_dec, init, tied=not self.is_transcoder)

    # What a file records beside the tensors; the arguments that build the same module again.
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        transcoder = {"d_out": self.d_out, "skip": self.skip, "sites_out": self.sites_out} if self.is_transcoder else {}
        return {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            **transcoder,
            **({} if self.sites is None else {"sites": self.sites}),
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "normalize_decoder": self.normalize_decoder,
            "normalize_activations": self.normalize_activations,
            "init": self.init,
            "reconstruction": self.reconstruction,
            "dead_after_tokens": self.dead_after_tokens,
        }

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    def _apply(self, fn, *args: Any, **kwargs: Any) -> "SAE":
        super()._apply(fn, *args, **kwargs)
        for name, dtype in self._kept_dtypes.items():
            tensor = getattr(self, name, None)
            if tensor is not None and tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
        return self

    def encode(self, x: Tensor) -> SparseCodes:
        """Activations [..., d_in] -> their codes over d_sae latents. x is cast to the SAE's dtype."""
        normalized = self._normalized(x)
        codes = self._encode_normalized(normalized.x)
        codes.input_statistics = normalized.statistics
        return codes

    def _encode_normalized(self, x: Tensor) -> SparseCodes:
        raise NotImplementedError

    def decode(self, codes: SparseCodes, x: Tensor | None = None) -> Tensor:
        """Codes -> reconstruction [..., d_out], on the scale of the activations (or the target) it reconstructs.

        A transcoder with a skip connection also needs the x that was encoded.
        """
        y = decode(codes, self.W_dec, self.b_dec)
        if self.skip:
            if x is None:
                raise ValueError("x is missing: expected decode(codes, x) of an SAE with skip=True")
            y = y + self._normalized(x).x @ self.W_skip.T
        scale = self.target_scale if self.is_transcoder else self.activation_scale
        if self.sites_out is not None:
            y, scale = y.unflatten(-1, (self.sites_out, self.d_out)), scale[:, None]
        return normalization.denormalize(y, self.normalize_activations, scale, codes.input_statistics)

    def forward(self, x: Tensor) -> SAEOutput:
        """Encodes and decodes: SAEOutput(sae_out [..., d_out], codes)."""
        codes = self.encode(x)
        return SAEOutput(self.decode(codes, x), codes)

    def loss(self, x: Tensor, target: Tensor | None = None) -> SAELoss:
        """The training loss of a batch [..., d_in], in the normalised space that is encoded.

        `target` [..., d_out] is for transcoders alone. In training mode the batch also updates `tokens_since_fired`,
        and what acts on dead latents acts on those then dead.

        Raises TypeError or ValueError for tensors that do not fit.
        """
        x, target = self._batch(x, target)
        return self._loss(x, target, self._weights())[0]

    def _loss(self, x: Tensor, target: Tensor, weights: Weights) -> tuple[SAELoss, Active, Reconstruction]:
        active = self._activate(x, weights)
        if self.training:
            self.count_firing(active.codes)
        error = self._reconstruct(active, x, target, weights)
        total, terms = error.objective, dict(error.terms)
        for name, penalty in self._penalties(active, x, target, error, weights).items():
            terms[name] = penalty.value
            if penalty.coefficient:
                total = total + penalty.coefficient * penalty.value.to(total.dtype)
        return SAELoss(total, terms, active.codes), active, error

    def _weights(self) -> Weights:
        if self._weighs_by_norms:
            return Weights(self.W_enc.T, *with_norms(self.W_dec, self.sites_out or 1))
        return Weights(self.W_enc.T, self.W_dec, None)

    def _activate(self, x: Tensor, weights: Weights) -> Active:
        """The codes of a training batch, and what the penalties need beside them."""
        raise NotImplementedError

    def _reconstruct(self, active: Active, x: Tensor, target: Tensor, weights: Weights) -> Reconstruction:
        scale = variance(target)
        if self.skip:
            target = target - x @ self.W_skip.T
        residual, squared = squared_error(active.codes, weights.W_dec, self.b_dec, target)
        mse = squared.mean()
        fvu = mse / scale
        objective = objective_of(mse, fvu, self.reconstruction, target.shape[1])
        return Reconstruction(residual, objective, {"mse": mse, "fvu": fvu})

    def _penalties(
        self, active: Active, x: Tensor, target: Tensor, error: Reconstruction, weights: Weights
    ) -> dict[str, Penalty]:
        """Terms beside the reconstruction, by name."""
        raise NotImplementedError

    @property
    def _b_dec_of_input(self) -> Tensor | None:
        return self.b_dec if self.apply_b_dec_to_input else None

    @torch.no_grad()
    def count_firing(self, codes: SparseCodes) -> None:
        """Updates `tokens_since_fired` [d_sae] with a batch; `loss` does so in training mode."""
        fired = codes.feature_counts() > 0
        with self._oldest.growing(self.tokens_since_fired, codes.n_tokens):
            self.tokens_since_fired.add_(codes.n_tokens).masked_fill_(fired, 0)

    def dead_latents(self) -> Tensor:
        """The latents that have not fired for `dead_after_tokens` tokens: int64, ascending."""
        return (self.tokens_since_fired >= self.dead_after_tokens).nonzero()[:, 0]

    def _dead_in_training(self) -> Tensor | None:
        """`dead_latents` in training mode; None where there is none, found out without asking a GPU in each step."""
        if not self.training or not self._oldest.reaches(self.tokens_since_fired, self.dead_after_tokens):
            return None
        dead = self.dead_latents()
        return dead if len(dead) else None

    @torch.no_grad()
    def initialize_b_dec(self, x: Tensor) -> None:
        """Starts b_dec at the geometric median of a sample of activations [..., d_in] (Bricken et al. 2023).

        Of a transcoder the sample is one of its targets, [..., d_out].
        """
        if self.is_transcoder:
            x = self._checked(x, "target")
            scale = self.target_scale if self.sites_out is None else self.target_scale[:, None]
            normalized = normalization.normalize(x, self.normalize_activations, scale).x
        else:
            normalized = self._normalized(x).x
        self.b_dec.copy_(geometric_median(normalized.reshape(-1, self.b_dec.numel())))

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

    def save(self, path: str | PathLike, format: str = "fastsae", *, metadata: Mapping[str, Any] | None = None) -> None:
        """Writes the SAE in fastsae's format or another library's; `fastsae.load` and that library read it.

        Args:
            path: a folder; for "openai" and "gemma_scope" also a file that ends in .pt or .npz.
            format: "fastsae", "saelens", "sparsify", "dictionary_learning", "openai", "openmoss" or "gemma_scope".
            metadata: what the config of "saelens", "dictionary_learning" or "openmoss" says besides, as JSON can hold
                it, such as model_name and hook_name for SAELens.

        Each file is written beside, synced and renamed. Raises ValueError, before anything is written, where the format
        cannot say what this SAE computes; docs/files.md lists which can.
        """
        # Formats know the SAEs, and not the other way.
        from fastsae.interop.files import save

        save(self, path, format, metadata=metadata)

    save_pretrained = files.save_pretrained
    _from_pretrained = classmethod(files.from_pretrained)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())
