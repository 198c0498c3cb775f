"""What a tensor or its storage asks of torch's build, where it should ask the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.storage import UntypedStorage, _StorageBase


def put(module: Any, names: dict[str, Any]) -> None:
    for name, value in names.items():
        setattr(module, name, value)


def patch_tensors(kind: str) -> None:
    """Storages are moved to the device and cloned on it; tensors are pinned for it."""

    def moved(move: Callable[..., Any]) -> Callable[..., Any]:
        def to(self: Any, device: Any, *, non_blocking: bool = False) -> Any:
            device = torch.device(device)
            if isinstance(self, UntypedStorage) and device.type == kind:
                return whole(self).to(device, non_blocking=non_blocking).untyped_storage()
            return move(self, device=device, non_blocking=non_blocking)

        return to

    def cloned(clone: Callable[..., Any]) -> Callable[..., Any]:
        def copy(self: Any) -> Any:
            on_device = isinstance(self, UntypedStorage) and self.device.type == kind
            return whole(self).clone().untyped_storage() if on_device else clone(self)

        return copy

    put(_StorageBase, {"to": moved(_StorageBase.to), "clone": cloned(_StorageBase.clone)})
    put(_StorageBase, {"mps": lambda self: self.to("mps")})
    pretend = torch.ops.pretend
    put(torch.Tensor, {"pin_memory": lambda self, device=None: pretend.pin(self)})
    put(torch.Tensor, {"record_stream": lambda self, stream: None})
    put(torch.Tensor, {"is_pinned": lambda self, device=None: pretend.is_pinned(self)})


def whole(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
