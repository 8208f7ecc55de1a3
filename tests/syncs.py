"""Find operations that would make the host wait for a GPU, by running them on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that return values to the host, or whose output has a size that depends on values.
_OPERATORS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2",
    "unique_consecutive", "unique_dim", "bincount",
}  # fmt: skip
# Methods that read the memory of a CPU tensor directly, without an operator.
_METHODS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu"}


class SyncCounter(TorchDispatchMode):
    """Context in which `names` collects the name of each such operation, while `active` is set.

    The context applies to the current thread. It takes every CPU tensor for one on a GPU, so a
    move to a `torch.device` may be one to the GPU; a move to "cpu" is one to the host. Between two
    devices, a copy to the host or from memory of the host that is not pinned is counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.active = True
        self._methods = _Methods(self)

    def __enter__(self) -> SyncCounter:
        self._methods.__enter__()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = func.name().split("::")[1].split(".")[0], kwargs or {}
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if self.active and (name in _OPERATORS or masks or _waits_for_copy(name, args, kwargs)):
            self.names.append(f"{name} with a mask" if masks else name)
        return func(*args, **kwargs)


def _waits_for_copy(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operator copies between a GPU and memory of the host that is not pinned."""
    if name == "_to_copy":
        source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
    elif name == "copy_":
        source, target = args[1], args[0].device
    else:
        return False
    if source.device.type == target.type:
        return False
    return target.type == "cpu" or (source.device.type == "cpu" and not source.is_pinned())


class _Methods(TorchFunctionMode):
    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.counter.active:
            if func in _METHODS:
                self.counter.names.append(_METHODS[func])
            targets = (*args[1:2], kwargs.get("device")) if func is Tensor.to else ()
            if any(isinstance(target, str) and target.startswith("cpu") for target in targets):
                self.counter.names.append("to cpu")
        return func(*args, **kwargs)
