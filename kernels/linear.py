"""A linear layer that keeps its weight packed and multiplies with it as it is.

`PackedLinear` stands where a model had `nn.Linear` or GPT-2's `Conv1D`. Its weight is one buffer
of bytes (`packed`, the panels of `kernels/blocked.py`), which `.to(dtype)` leaves alone; how to
read them are plain attributes, which travel in `state_dict` as the extra state, so that bytes of
another scheme are refused instead of misread.
"""

import json
from dataclasses import replace
from threading import Lock
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn

from unicomp.errors import UnicompError, UnsupportedError
from unicomp.kernels import backend as backends
from unicomp.kernels import head
from unicomp.kernels.blocked import Blocked, Compute, kind_of, unblock
from unicomp.kernels.packed import PackedTensor, Scheme


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` with a weight in panels; for inference.

    packed   uint8 [bytes], the panels
    bias     floating [out], or None
    kind, in_features, out_features, scheme, scale_dtype    how to read the panels
    compute  `int8`: activations are rounded per token and span; `exact`: they are not
    backend  which implementation computes, of `kernels/backend.py`

    Inputs are floating [..., in], outputs [..., out] in their dtype. Gradients reach the input,
    never the weight.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Blocked,
        bias: Tensor | None = None,
        *,
        compute: Compute = "int8",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_compute(compute)
        self.backend = backends.choose(backend, weight.data.device.type)
        self.compute = compute
        self.kind = weight.kind
        self.out_features, self.in_features = weight.shape
        self.scheme = weight.scheme
        self.scale_dtype = weight.scale_dtype
        self._view = weight
        self.register_buffer("packed", weight.data)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_packed(
        cls,
        tensor: PackedTensor,
        bias: Tensor | None = None,
        *,
        compute: Compute = "int8",
        backend: str | None = None,
    ) -> Self:
        """Lay a quantized weight out in panels and make a layer of it.

        A group as wide as a row is one scale a row; two bits that hold -1, 0 and 1 alone are
        packed five to a byte.
        """
        scheme, columns = tensor.scheme, tensor.codes.shape[1]
        if scheme.group_size >= columns:
            scheme = Scheme(scheme.bits, -1, scheme.symmetric)
            tensor = PackedTensor(tensor.codes, tensor.scale, tensor.zero_point, scheme)
        ternary = scheme.bits == 2 and scheme.symmetric and not bool((tensor.codes == -2).any())
        weight = backends.block(tensor, kind_of(scheme, ternary=ternary))
        return cls(weight, bias, compute=compute, backend=backend)

    @property
    def blocked(self) -> Blocked:
        """The weight as kernels take it."""
        data = self._buffers["packed"]
        if data is not None and data is not self._view.data:  # loaded, or moved
            self._view = replace(self._view, data=data)
        return self._view

    def forward(self, x: Tensor) -> Tensor:
        """Return the product; x is floating [..., in]."""
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            product: Tensor = backends.packed_linear(
                x,
                self.packed,
                self.bias,
                self.kind,
                self.out_features,
                self.in_features,
                self.scheme.bits,
                self.scheme.group_size,
                self.scheme.symmetric,
                str(self.scale_dtype).removeprefix("torch."),
                self.compute,
                self.backend,
            )
            return product
        return backends.multiply(
            x, self.blocked, self.bias, compute=self.compute, backend=self.backend
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [out, in] that the codes stand for."""
        return unblock(self.blocked).dequantize(dtype)

    def extra_repr(self) -> str:
        """Say what is packed, how, and what computes."""
        group = "row" if self.scheme.group_size == -1 else str(self.scheme.group_size)
        kind = "symmetric" if self.scheme.symmetric else "asymmetric"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.scheme.bits}, group={group}, {kind}, "
            f"kind={self.kind}, bytes={self.packed.numel()}, compute={self.compute}, "
            f"backend={self.backend}"
        )

    def get_extra_state(self) -> Tensor:
        """Return how to read `packed`, JSON in uint8: files of tensors alone can hold it."""
        return torch.tensor(list(json.dumps(self._meaning()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse bytes that mean another weight than this layer's."""
        found, own = json.loads(bytes(state.tolist())), self._meaning()
        if found != own:
            raise UnicompError(
                f"a packed weight of {found} does not fit a layer of {own}",
                hint="load it into a model made from the same checkpoint",
            )

    def _meaning(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": [self.out_features, self.in_features],
            "bits": self.scheme.bits,
            "group_size": self.scheme.group_size,
            "symmetric": self.scheme.symmetric,
            "scale": str(self.scale_dtype).removeprefix("torch."),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.backend == "cpu" and backends.missing() is not None:
            self.backend = backends.choose()  # pickled where there was a kernel


class DenseLinear(nn.Linear):
    """A linear of bfloat16 that is not packed, in a model that is otherwise: mostly its head.

    Where the processor has no instructions for bfloat16, a kernel multiplies a few tokens
    (`head.py`). Where it has, oneDNN reads such a weight for one token at half the rate of memory,
    torch's own product at all of it (head of 131 MB, 2 threads: 13 and 23 GB/s; torch 2.13, AVX-512
    with bfloat16): so oneDNN is switched off around it, and torch has its threads back if a step
    took them. The switch belongs to the process, hence the lock.
    """

    _switch = Lock()

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """Return a layer with the very weight and bias of another; the weight may move."""
        with torch.device("meta"):
            found = cls(linear.in_features, linear.out_features, linear.bias is not None)
        found.weight, found.bias = linear.weight, linear.bias
        head.settle(found.weight)
        return found.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product; x is floating [..., in]."""
        if torch.compiler.is_compiling() or x.numel() > head.TOKENS * self.in_features:
            return super().forward(x)
        learns = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if self.bias is None and not learns and head.usable(x, self.weight):
            return head.multiply(x, self.weight)
        if x.numel() > self.in_features:
            return super().forward(x)
        switch: Any = torch.backends.mkldnn
        with self._switch:
            before, taken = switch.enabled, backends.return_cores()
            switch.enabled = False
            try:
                return super().forward(x)
            finally:
                switch.enabled = before
                if taken:
                    backends.take_cores()


def check_compute(compute: str) -> None:
    """Refuse a way of computing that there is not."""
    if compute not in get_args(Compute):
        known = " or ".join(f"`{name}`" for name in get_args(Compute))
        raise UnsupportedError(f"unknown compute `{compute}`", hint=f"use {known}")
