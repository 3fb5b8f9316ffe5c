"""An SAE as evaluators of other libraries see one: dense codes, weights by their usual names, a config."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.codes import SparseCodes
from fastsae.saes.base import SAE


@dataclass
class DenseViewConfig:
    """What SAEBench (`CustomSAEConfig`) and SAELens (`SAEConfig`, its `metadata`) ask of an SAE's `cfg`."""

    d_in: int
    d_sae: int
    architecture: str
    dtype: str
    device: str
    apply_b_dec_to_input: bool
    model_name: str = ""
    hook_name: str = ""
    hook_layer: int | None = None
    hook_head_index: int | None = None
    context_size: int | None = None
    prepend_bos: bool = True
    training_tokens: int = -100_000
    seqpos_slice: tuple[int | None, ...] = (None,)
    # The view takes activations as they are and normalises them itself, so nobody else should.
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    exclude_special_tokens: bool = False
    dataset_path: str = ""
    neuronpedia_id: str | None = None
    sae_lens_training_version: str | None = None

    @property
    def metadata(self) -> "DenseViewConfig":
        """SAELens keeps the fields about the model one level deeper."""
        return self

    @property
    def model_from_pretrained_kwargs(self) -> dict[str, Any]:
        return {}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class DenseView(nn.Module):
    """Wraps an SAE for SAEBench and for SAELens' evals: they take [..., d_in] and want codes as dense [..., d_sae].

    It shares the SAE's parameters and computes with its operators; only the codes are spread out, so a batch takes
    n_tokens · d_sae numbers. With normalize_activations="layer_norm", `decode` undoes the statistics of what was
    encoded last, as SAELens and OpenAI's library do.

    SAEBench wants decoder rows of unit norm, which `check_decoder_norms` tells.

    Args:
        sae: any SAE of one site; put it in eval mode, as BatchTopK selects over a batch in training mode.
        about: fields of DenseViewConfig that fastsae's SAEs do not know: model_name, hook_name, hook_layer, ...

    Raises ValueError for an SAE with several sites, TypeError for an unknown field.
    """

    def __init__(self, sae: SAE, **about: Any):
        super().__init__()
        if sae.sites is not None or sae.sites_out is not None:
            raise ValueError(f"sae has sites = {sae.sites}: expected one of activations [..., d_in]")
        self.sae = sae
        self.cfg = DenseViewConfig(
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            architecture=sae.architecture,
            dtype=str(sae.dtype).removeprefix("torch."),
            device=str(sae.device),
            apply_b_dec_to_input=sae.apply_b_dec_to_input,
            **about,
        )
        self._statistics: tuple[Tensor, Tensor] | None = None

    @property
    def W_enc(self) -> Tensor:
        return self.sae.W_enc

    @property
    def b_enc(self) -> Tensor | None:
        """None of a GatedSAE, as in SAELens."""
        return self.sae.b_enc

    @property
    def W_dec(self) -> Tensor:
        return self.sae.W_dec

    @property
    def b_dec(self) -> Tensor:
        return self.sae.b_dec

    @property
    def threshold(self) -> Tensor:
        """Of a JumpReLUSAE [d_sae], of a BatchTopKSAE a scalar; other SAEs have no such attribute."""
        return self.sae.thresholds() if hasattr(self.sae, "thresholds") else self.sae.threshold

    @property
    def dtype(self) -> torch.dtype:
        return self.sae.dtype

    @property
    def device(self) -> torch.device:
        return self.sae.device

    def encode(self, x: Tensor) -> Tensor:
        """Activations [..., d_in] -> dense codes [..., d_sae]."""
        codes = self.sae.encode(x)
        self._statistics = codes.input_statistics
        return codes.to_dense()

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Dense codes [..., d_sae], changed or not, -> reconstruction [..., d_out].

        Raises ValueError if layer_norm is to be undone and the codes are not of what was encoded last.
        """
        codes = SparseCodes.from_dense(feature_acts.to(self.dtype))
        if self._statistics is not None:
            encoded = tuple(self._statistics[0].shape[:-1])
            if encoded != tuple(feature_acts.shape[:-1]):
                raise ValueError(
                    f"feature_acts has tokens {tuple(feature_acts.shape[:-1])} and what was encoded last {encoded}: "
                    "expected codes of the same tokens, whose layer norm is undone"
                )
            codes.input_statistics = self._statistics
        return self.sae.decode(codes)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction [..., d_out]."""
        return self.sae(x).sae_out

    def to(self, *args: Any, **kwargs: Any) -> "DenseView":
        """As nn.Module.to; cfg follows."""
        super().to(*args, **kwargs)
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)
        return self

    @torch.no_grad()
    def check_decoder_norms(self) -> bool:
        """Whether every row of W_dec has unit norm, within 1e-2 in half precision and 1e-5 else (SAEBench's rule)."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        return bool(((self.W_dec.norm(dim=1) - 1).abs() <= (1e-2 if half else 1e-5)).all())
