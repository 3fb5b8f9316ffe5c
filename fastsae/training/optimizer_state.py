"""The state of any torch optimizer as named tensors and plain JSON values, and back."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

PLAIN = (bool, int, float, str, type(None))


def parameter_names(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    """The names that `module` gives to the parameters of each group of `optimizer`.

    Raises ValueError if the optimizer holds a parameter of something else.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
    if any(name is None for group in groups for name in group):
        raise ValueError(
            f"optimizer ({type(optimizer).__name__}) holds parameters that are not of this SAE: build it from "
            "sae.parameters()"
        )
    return groups


def describe(optimizer: Optimizer, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor of the state as "<parameter>.<key>", contiguous, and a description of the rest for JSON.

    The description holds the optimizer's class, the settings of its groups, state that is no tensor, and the dtype and
    shape of each tensor. Raises TypeError for state of another kind (lists of tensors and so on).
    """
    names = parameter_names(optimizer, module)
    state_dict = optimizer.state_dict()
    flat_names = [name for group in names for name in group]
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, state in state_dict["state"].items():
        for key, value in state.items():
            name = f"{flat_names[index]}.{key}"
            if isinstance(value, Tensor):
                tensors[name] = value.detach().contiguous()
            else:
                values[name] = _plain(f"state {name}", value)
    groups = []
    for group, group_names in zip(state_dict["param_groups"], names, strict=True):
        settings = {key: _plain(f"setting {key}", value) for key, value in group.items() if key != "params"}
        groups.append({"parameters": group_names, "settings": settings})
    layout = {name: _layout(tensor) for name, tensor in tensors.items()}
    return tensors, {
        "class": type(optimizer).__name__,
        "groups": groups,
        "values": values,
        "tensors": layout,
    }


def restore(
    optimizer: Optimizer, module: nn.Module, tensors: dict[str, Tensor], description: dict[str, Any]
) -> dict[str, Any]:
    """What `describe` returned, as the argument of `optimizer.load_state_dict`; the optimizer itself is not changed.

    A tensor of its parameter's shape also gets its parameter's strides: fused optimizers walk the memory of both in
    one order. Raises ValueError if class, groups, tensor names, dtypes or shapes do not fit.
    """
    if description["class"] != type(optimizer).__name__:
        raise ValueError(
            f"the state of {description['class']}: expected that of {type(optimizer).__name__}, the optimizer of this "
            "Trainer; pass optimizer= of the class that was saved"
        )
    names = parameter_names(optimizer, module)
    if [group["parameters"] for group in description["groups"]] != names:
        saved = [group["parameters"] for group in description["groups"]]
        raise ValueError(f"parameter groups {saved}: expected {names}, those of this Trainer's optimizer")
    _check_layout(tensors, description["tensors"])
    index_of = {name: index for index, name in enumerate(name for group in names for name in group)}
    parameters = dict(module.named_parameters())
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**description["values"], **tensors}.items():
        parameter_name, _, key = name.rpartition(".")
        if parameter_name not in index_of:
            raise ValueError(f"{name} belongs to none of the parameters {sorted(index_of)}")
        if isinstance(value, Tensor) and value.shape == parameters[parameter_name].shape:
            value = _with_strides_of(parameters[parameter_name], value)
        state.setdefault(index_of[parameter_name], {})[key] = value
    groups, start = [], 0
    for saved, group in zip(description["groups"], optimizer.param_groups, strict=True):
        # JSON knows no tuples.
        settings = {
            key: tuple(value) if isinstance(group.get(key), tuple) else value
            for key, value in saved["settings"].items()
        }
        stop = start + len(saved["parameters"])
        groups.append({**settings, "params": list(range(start, stop))})
        start = stop
    return {"state": state, "param_groups": groups}


def _check_layout(tensors: dict[str, Tensor], layout: dict[str, Any]) -> None:
    missing, unknown = sorted(set(layout) - set(tensors)), sorted(set(tensors) - set(layout))
    if missing or unknown:
        raise ValueError(f"missing tensors {missing}, unknown tensors {unknown}")
    for name, tensor in tensors.items():
        if _layout(tensor) != layout[name]:
            raise ValueError(f"{name} is {_layout(tensor)}: expected {layout[name]}")


def _with_strides_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def _layout(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, PLAIN) or (isinstance(value, (tuple, list)) and all(isinstance(v, PLAIN) for v in value)):
        return value
    raise TypeError(
        f"{name} of the optimizer is a {type(value).__name__}: a checkpoint holds tensors for parameters, numbers, "
        "strings and tuples of them"
    )
