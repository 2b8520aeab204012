"""State dictionaries of models that may be sharded over processes (FSDP).

FSDP shards a parameter along its first axis and does not support scalar parameters.
"""

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

_SCALARS = "scalar_parameters"


def reshape_scalar_parameters(model: nn.Module) -> None:
    """Reshape all scalar parameters of a model to (1,); `full_state_dict` returns them as scalars."""
    scalars = []
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                shaped = nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)
                module.register_parameter(name, shaped)
                scalars.append(f"{prefix}.{name}".lstrip("."))
    setattr(model, _SCALARS, tuple(scalars))


def full_state_dict(model: nn.Module, is_sharded: bool = False) -> dict[str, Tensor]:
    """Return the unsharded weights of a model by their names without wrappers.

    Args:
        model: The model, possibly wrapped for several processes.
        is_sharded: Whether the model is sharded. All processes must then call this together.

    Returns:
        The weights. For a sharded model they are on the CPU of the first process, and the other processes get an
        empty dictionary.
    """
    if not is_sharded:
        return _unwrap(model).state_dict()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    scalars = getattr(_unwrap(model), _SCALARS, ())
    return {name: value.reshape(()) if name in scalars else value for name, value in state.items()}


def load_full_state_dict(model: nn.Module, state: dict[str, Tensor], is_sharded: bool = False) -> None:
    """Load weights that `full_state_dict` returned.

    Args:
        model: The model, possibly wrapped for several processes.
        state: The unsharded weights, in every process.
        is_sharded: Whether the model is sharded. All processes must then call this together.

    Raises:
        RuntimeError: Keys are missing or unexpected; the message lists them.
    """
    if not is_sharded:
        _unwrap(model).load_state_dict(state)
        return
    scalars = getattr(_unwrap(model), _SCALARS, ())
    state = {name: value.reshape(1) if name in scalars else value for name, value in state.items()}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def _unwrap(model: nn.Module) -> nn.Module:
    """Return a model without the wrappers of DDP and FSDP."""
    wrappers = torch.nn.parallel.DistributedDataParallel, torch.distributed.fsdp.FullyShardedDataParallel
    while isinstance(model, wrappers):
        model = model.module
    return model
