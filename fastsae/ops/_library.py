"""How an operator is declared: schema, kernel by dispatch, fake kernel, autograd, once and in one place."""

from collections.abc import Callable

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
) -> Callable:
    """Declares torch.ops.fastsae.<name>; the tensor argument called `by` decides device and dtype.

    Autograd is registered where `backward` is given. An operator made of others is one `kernel` for every backend.
    """
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    position = [argument.split()[-1] for argument in schema[1:].split(")")[0].split(", ")].index(by)

    def call(*args):
        tensor: Tensor = args[position]
        if kernel is not None:
            return kernel(*args)
        return dispatch.call(name, tensor.device, tensor.dtype, *args)

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
