"""Weights of a model that may be sharded over processes (FSDP), whole.

PyTorch shards a parameter along its first axis and refuses scalars.
"""

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

_SCALARS = "scalar_parameters"


def give_scalars_a_dimension(model: nn.Module) -> None:
    """Make every scalar parameter of a model one of shape (1,); `full_state_dict` gives them back as scalars."""
    scalars = []
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                shaped = nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)
                module.register_parameter(name, shaped)
                scalars.append(f"{prefix}.{name}".lstrip("."))
    setattr(model, _SCALARS, tuple(scalars))


def full_state_dict(model: nn.Module, is_sharded: bool = False) -> dict[str, Tensor]:
    """All weights by their plain names.

    If they are sharded, all processes must call this together; the first gets them, on its CPU, the others nothing.
    """
    if not is_sharded:
        return _bare(model).state_dict()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    scalars = getattr(_bare(model), _SCALARS, ())
    return {name: value.reshape(()) if name in scalars else value for name, value in state.items()}


def load_full_state_dict(model: nn.Module, state: dict[str, Tensor], is_sharded: bool = False) -> None:
    """Load what `full_state_dict` gave; every process reads it for itself.

    Raises:
        RuntimeError: listing the keys that are missing or too many.
    """
    if not is_sharded:
        _bare(model).load_state_dict(state)
        return
    scalars = getattr(_bare(model), _SCALARS, ())
    state = {name: value.reshape(1) if name in scalars else value for name, value in state.items()}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def _bare(model: nn.Module) -> nn.Module:
    wrappers = torch.nn.parallel.DistributedDataParallel, torch.distributed.fsdp.FullyShardedDataParallel
    while isinstance(model, wrappers):
        model = model.module
    return model
