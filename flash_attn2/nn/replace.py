"""Swap the attention of an existing model."""

from typing import TypeVar

from torch import nn

from .mha import MultiheadAttention

Model = TypeVar("Model", bound=nn.Module)


def replace_mha(model: Model) -> Model:
    """Turn every ``torch.nn.MultiheadAttention`` in model into this package's, in place.

    The modules keep their identity and only change class: parameters stay the same objects (an
    optimizer made before stays valid), and so do hooks, training flag, device, dtype and the
    sharing of one module by several parents. The whole ``nn.Transformer`` family is covered.

    Only modules whose class is exactly ``torch.nn.MultiheadAttention`` are turned: a subclass may
    have a forward of its own. So call this before wrappers that change a module's class, such as
    ``fully_shard`` and ``torch.nn.utils.parametrize``.

    Args:
        model: any module; may itself be a ``torch.nn.MultiheadAttention``.

    Returns:
        model, which is the module that was passed in.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = MultiheadAttention
    return model
