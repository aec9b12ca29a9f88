"""Record which of this project's operators a piece of code calls, and the arguments."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OperatorCalls(TorchDispatchMode):
    """`with OperatorCalls() as calls:` keeps (operator, args, kwargs) of the last call of each in `calls.made`."""

    def __enter__(self):
        self.made: dict[str, tuple[Any, tuple, dict]] = {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "lrnn":
            self.made[function.name()] = (function, args, kwargs or {})
        return function(*args, **(kwargs or {}))

    def opcheck(self):
        """Run torch.library.opcheck on each: schema, fake implementation, autograd registration, dynamic shapes."""
        for name, (function, args, kwargs) in self.made.items():
            leaves = name.endswith("forward")  # the others have no gradients
            args = [
                x.detach().clone().requires_grad_(leaves and x.is_floating_point()) if torch.is_tensor(x) else x
                for x in args
            ]
            torch.library.opcheck(function, tuple(args), kwargs)
