"""Whether operations are more than carried out: autograd functions of ours would be in the way then."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def traced() -> bool:
    """Whether a compiler, a tracer, a transformation of functions or forward differentiation looks on."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )
