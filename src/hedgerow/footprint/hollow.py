"""Hollow tensors: what a computation holds, found by going through it with tensors without values.

PyTorch computes shapes and types on its `meta` device, and nothing else. Within `Held` the code of
a method runs on such tensors as on others: what it copies to the CPU stays hollow, and numbers that
it reads are 0. Whatever memory real ones would take is counted, by what it is for.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from torch import Tensor

_ops = torch.ops.aten


@dataclass
class _Mark:
    """Memory that is held."""

    size: int
    """Bytes."""
    label: str
    """What it is for."""


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count of the memory of all tensors that are made while it is entered, until they are freed.

    Attributes:
        now: bytes that are held, by what they are for.
        peak: the same, at the moment at which they were most since the last `begin`.
    """

    def __init__(self, *, on_cpu: bool = False) -> None:
        """Count nothing yet.

        Args:
            on_cpu: whether the tensors stand for some on the CPU, which are there already where
                somebody asks for them there (`Tensor.cpu`).
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._label = ""
        self._total = self._most = 0
        self._live: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._functions = _Functions(on_cpu)

    def __enter__(self) -> Held:
        self._functions.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._functions.__exit__(*error)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Forget the peak so far."""
        self._most, self.peak = self._total, +self.now

    @contextmanager
    def made_for(self, label: str) -> Iterator[None]:
        """Count what is made in the block as being for `label`."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    def are_for(self, label: str, tensors: Iterable[Tensor]) -> None:
        """Count these tensors, whenever they were made, as being for `label`."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage in self._live:
                mark = self._live[storage]
                self.now[mark.label] -= mark.size
                self.now[label] += mark.size
                mark.label = label
            else:
                self._count(tensor, label)

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(options or {})
        given = [a for a in tree_leaves((arguments, options)) if isinstance(a, torch.Tensor)]
        if any(tensor.is_meta for tensor in given):
            if function is _ops._local_scalar_dense.default:
                return 0.0 if given[0].is_floating_point() else 0
            if function is _ops._to_copy.default:
                options["device"] = torch.device("meta")
            if function is _ops.copy_.default and not given[0].is_meta:
                return given[0]
        made = function(*arguments, **options)
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor, self._label)
        return made

    def _count(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        if storage in self._live:
            return
        mark = _Mark(storage.nbytes(), label)
        self._live[storage] = mark
        weakref.finalize(storage, self._free, mark)
        self.now[label] += mark.size
        self._total += mark.size
        if self._total > self._most:
            self._most, self.peak = self._total, +self.now

    def _free(self, mark: _Mark) -> None:
        self.now[mark.label] -= mark.size
        self._total -= mark.size


class _Functions(TorchFunctionMode):
    """What hollow tensors answer above PyTorch's dispatcher.

    Attention by the kernel that the CPU takes for other tensors: on the meta device it would be the
    one that makes all weights of attention. Lists of numbers, which are 0. Tensors on the
    CPU, where they stand for some that are there.
    """

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()
        self._on_cpu = on_cpu

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(options or {})
        if function is torch.nn.functional.scaled_dot_product_attention:
            found = _fused(*arguments, **options)
            if found is not None:
                return found
        if function is torch.Tensor.cpu and self._on_cpu and arguments[0].is_meta:
            return arguments[0]
        if function is torch.Tensor.tolist and arguments[0].is_meta:
            return torch.zeros(arguments[0].shape, dtype=arguments[0].dtype).tolist()
        return function(*arguments, **options)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Attention by the fused kernel, where tensors are hollow and it would be taken; else None."""
    if not query.is_meta:
        return None

    # The choice is made by types and by all sizes but the lengths, so one token each is enough.
    sizes = ((*t.shape[:2], 1, t.shape[3]) for t in (query, key, value))
    q, k, v = (torch.empty(size, dtype=query.dtype) for size in sizes)
    mask = None if attn_mask is None else torch.empty(1, 1, dtype=attn_mask.dtype)
    choice = torch._fused_sdp_choice(
        q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if choice != SDPBackend.FLASH_ATTENTION.value:
        return None
    found: Tensor = _ops._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return found
