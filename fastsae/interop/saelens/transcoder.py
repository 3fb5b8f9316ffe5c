"""Transcoders of SAELens: with a ReLU or a JumpReLU, with or without a linear skip connection."""

from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder, SkipTranscoder, Transcoder
from torch import Tensor

from fastsae.interop.saelens.base import Fast, chosen_of
from fastsae.interop.saelens.jumprelu import Thresholded
from fastsae.interop.saelens.relu import Rectified


class _FastTranscoder(Fast):
    def _input(self, x: Tensor) -> Tensor:
        return self.run_time_activation_norm_fn_in(self.hook_sae_input(x.to(self.dtype)))

    @property
    def _subtracted(self) -> None:
        return None

    def _output(self, y: Tensor) -> Tensor:
        return y

    def forward_with_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As the library's."""
        with self._handing_on("forward_with_activations"):
            y, acts = super().forward_with_activations(x)
        chosen = chosen_of(acts)
        return y, acts if chosen is None else chosen.codes.to_dense()


class FastTranscoder(_FastTranscoder, Rectified, Transcoder):
    """SAELens' Transcoder on fastsae's operators."""

    original = Transcoder


class FastSkipTranscoder(_FastTranscoder, Rectified, SkipTranscoder):
    """SAELens' SkipTranscoder on fastsae's operators."""

    original = SkipTranscoder


class FastJumpReLUTranscoder(_FastTranscoder, Thresholded, JumpReLUTranscoder):
    """SAELens' JumpReLUTranscoder on fastsae's operators."""

    original = JumpReLUTranscoder


class FastJumpReLUSkipTranscoder(_FastTranscoder, Thresholded, JumpReLUSkipTranscoder):
    """SAELens' JumpReLUSkipTranscoder on fastsae's operators."""

    original = JumpReLUSkipTranscoder
