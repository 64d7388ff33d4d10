"""Calls that something else wants to see: they take the default, as torch's own function would have been called."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as _forward

_C = torch._C
_autocast = _C._is_any_autocast_enabled
_function_modes = _C._len_torch_function_stack
_dispatch_modes = _C._len_torch_dispatch_stack
_transforms = _C._functorch.peek_interpreter_stack
_plain_types = frozenset({torch.Tensor, torch.nn.Parameter})


def is_intercepted(*tensors: torch.Tensor) -> bool:
    """Whether autocast, a mode, a transform, forward-mode differentiation or a tensor subclass is at work."""
    return (
        not _plain_types.issuperset(map(type, tensors))
        or _function_modes() > 0
        or _dispatch_modes() > 0
        or _transforms() is not None
        or _autocast()
        or _forward._current_level >= 0
    )


def is_plain(*tensors: torch.Tensor) -> bool:
    """Whether a fast path may take a call on these tensors: not intercepted, no gradient, no determinism asked for."""
    return not (
        is_intercepted(*tensors)
        or torch.are_deterministic_algorithms_enabled()
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )
