"""What every accelerated training SAE of SAELens shares."""

from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from fastsae.interop.saelens.base import Chosen, Fast, _made, chosen_of
from fastsae.interop.saelens.on_demand import of_formula


class FastTraining(Fast):
    """Mixed in before a training class of SAELens, whose `training_forward_pass` runs on codes."""

    def _why_not(self) -> str:
        if self.hook_z_reshaping_mode and self._fast.method == "training_forward_pass":
            return "hook_z reshaping is on in a training step"
        return super()._why_not()

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As the library's."""
        with self._handing_on("training_forward_pass"):
            return super().training_forward_pass(step_input)

    def encode(self, x: Tensor) -> Tensor:
        """As the library's."""
        method = self._fast.method
        chosen = self._encoded(x)
        if isinstance(chosen, str):
            self._record.took_original(method or "encode", chosen)
            return super(Fast, self).encode_with_hidden_pre(x)[0]
        if method is None:
            self._took_fastsae("encode")
            return chosen.codes.to_dense()
        return self._on_demand(chosen, method)

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As the library's."""
        method = self._fast.method
        if method is None:
            self._record.took_original("encode_with_hidden_pre", "its pre-activations are a dense tensor")
            return super().encode_with_hidden_pre(x)
        chosen = self._encoded(x)
        if isinstance(chosen, str):
            self._record.took_original(method, chosen)
            return super().encode_with_hidden_pre(x)
        return self._on_demand(chosen, method), self._hidden_pre(chosen)

    def _hidden_pre(self, chosen: Chosen) -> Tensor:
        """The library's pre-activations, made if somebody reads them."""
        b_dec = chosen.b_dec

        def formula(x: Tensor, *parameters: Tensor) -> Tensor:
            if b_dec is None:
                return self._pre_activations(x, *parameters)
            return self._pre_activations(x - parameters[-1], *parameters[:-1])

        def noted(asked_by: str) -> None:
            self._record.took_original("hidden_pre", _made(asked_by))

        parameters = self._encoder_parameters() if b_dec is None else (*self._encoder_parameters(), b_dec)
        return of_formula(formula, chosen.codes.shape, noted, chosen.x, *parameters)

    def _encoder_parameters(self) -> tuple[Tensor, ...]:
        return self.W_enc, self.b_enc

    @staticmethod
    def _pre_activations(sae_in: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        return sae_in @ W_enc + b_enc

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """As the library's."""
        chosen = chosen_of(feature_acts)
        if chosen is None:
            return super().calculate_aux_loss(
                step_input=step_input, feature_acts=feature_acts, hidden_pre=hidden_pre, sae_out=sae_out
            )
        with torch.autocast(sae_out.device.type, enabled=False):
            return self._aux_losses(chosen, step_input, sae_out)

    def _aux_losses(self, chosen: Chosen, step_input: TrainStepInput, sae_out: Tensor) -> dict[str, Tensor]:
        """The losses of `calculate_aux_loss`, from the codes."""
        raise NotImplementedError

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """As the library's; in the plain layout."""
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()
