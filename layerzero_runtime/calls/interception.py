"""Calls that something else wants to see: they take the default, as torch's own function would have been called.

The public functions write `is_plain` out, because a call and a loop would cost more than the checks; each of the names
here is one C function or attribute.
"""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_mode

from layerzero_runtime.serving.execution import watch_captures

_C = torch._C
autocast = _C._is_any_autocast_enabled
function_modes = _C._len_torch_function_stack
dispatch_modes = _C._len_torch_dispatch_stack
transforms = _C._functorch.peek_interpreter_stack
deterministic = _C._get_deterministic_algorithms
grad_enabled = _C.is_grad_enabled if hasattr(_C, "is_grad_enabled") else torch.is_grad_enabled
watch_captures()
PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})


def is_intercepted(*tensors: torch.Tensor) -> bool:
    """Whether autocast, a mode, a transform, forward-mode differentiation or a tensor subclass is at work."""
    return (
        not PLAIN_TYPES.issuperset(map(type, tensors))
        or function_modes() > 0
        or dispatch_modes() > 0
        or transforms() is not None
        or autocast()
        or forward_mode._current_level >= 0
    )


def cuda_device(*tensors: torch.Tensor) -> torch.device | None:
    """The CUDA device that all tensors are on, None where there is no such one."""
    device = tensors[0].device
    if device.type != "cuda" or any(tensor.device != device for tensor in tensors):
        return None
    return device
