"""How an operator is declared: schema, kernel by dispatch, fake kernel, autograd, once and in one place."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae.backends import dispatch

_library = torch.library.Library("fastsae", "DEF")


def define(
    name: str,
    schema: str,
    *,
    by: str,
    fake: Callable,
    kernel: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    options: Sequence[str] = (),
) -> Callable:
    """Declares torch.ops.fastsae.<name>; the tensor argument called `by` decides device and dtype.

    Autograd is registered where `backward` is given. An operator made of others is one `kernel` for every backend.
    `options` names arguments that a backend's kernel may lack; those that a call makes use of count in the choice.
    """
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    names = [argument.split()[-1] for argument in schema[1 : schema.index(" -> ") - 1].split(", ")]
    position = names.index(by)
    places = {option: names.index(option) for option in options}

    def call(*args):
        tensor: Tensor = args[position]
        if kernel is not None:
            return kernel(*args)
        used = tuple(option for option, place in places.items() if _in_use(args[place]))
        return dispatch.call(name, tensor.device, tensor.dtype, *args, options=used)

    def run(*args):
        tensor: Tensor = args[position]
        if torch.is_autocast_enabled(tensor.device.type):
            # A kernel's own products are in the precision its contract states.
            with torch.autocast(tensor.device.type, enabled=False):
                return call(*args)
        return call(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastsae::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"fastsae::{name}", backward, setup_context=setup_context, lib=_library)
    return getattr(torch.ops.fastsae, name).default


def _in_use(value: Any) -> bool:
    return value is not None and value is not False and not (isinstance(value, Sequence) and len(value) == 0)
