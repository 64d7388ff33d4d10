"""Calls that something else wants to see: they take the default, as torch's own function would have been called.

Each of the names here is one C function. The public functions ask `function_mode` and `deterministic` at every call;
the rest is in what a guard compares (`calls.guards`).
"""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_mode

from layerzero_runtime.serving.execution import watch_captures

_C = torch._C
autocast = _C._is_any_autocast_enabled
function_mode = _C._is_torch_function_mode_enabled
dispatch_modes = _C._len_torch_dispatch_stack
transforms = _C._functorch.peek_interpreter_stack
deterministic = _C._get_deterministic_algorithms
grad_enabled = torch.is_grad_enabled
watch_captures()
PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})


def is_intercepted(*tensors: torch.Tensor) -> bool:
    """Whether autocast, a mode, a transform, forward-mode differentiation or a tensor subclass is at work."""
    return (
        not PLAIN_TYPES.issuperset(map(type, tensors))
        or function_mode()
        or dispatch_modes() > 0
        or transforms() is not None
        or autocast()
        or forward_mode._current_level >= 0
    )
