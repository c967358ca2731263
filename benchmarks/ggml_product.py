"""llama.cpp's product of a Q4_0 weight with float32 activations, through its shared library.

The library is built from llama.cpp's own sources with its defaults; `folder` holds the three files
`libggml-base.so`, `libggml-cpu.so` and `libggml.so`. A weight goes into the first buffer type that
takes it of those that the library lists as extra for this processor (AMX tiles, rows repacked by
eights), as llama.cpp does when it loads a model, else into a plain one.

Only the computation of the graph is in a call: activations lie ready and the result stays where it
is, which suits the library.
"""

import ctypes
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32, Q4_0 = 0, 2  # of enum ggml_type
BLOCK = 32  # columns that share a scale
TENSORS = 64 << 10  # bytes for the names and shapes of a graph


class _Params(Structure):
    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [_Params]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buft_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_buffer_get_base": (c_void_p, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_tensor_alloc": (c_int, [c_void_p, c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
}


class Library:
    """The library, a number of threads, and the memory that weights share.

    Raises OSError where a file is missing or cannot be loaded.
    """

    def __init__(self, folder: Path, threads: int, rows: int, columns: int, tokens: int) -> None:
        names = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
        files = [ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in names]
        for name, (result, arguments) in _SIGNATURES.items():
            function = next(getattr(file, name) for file in files if hasattr(file, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_").removeprefix("backend_"), function)
        self.rows, self.columns = rows, columns
        self.backend = self.cpu_init()
        self.cpu_set_n_threads(self.backend, threads)
        self.plain = self.cpu_buffer_type()
        self.out = self.buft_alloc_buffer(self.plain, 4 * rows * tokens)
        self.inputs: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def context(self, size: int = TENSORS) -> Any:
        """Return a context that holds descriptions, not data."""
        return self.init(_Params(size, None, True))

    def buffer_types(self) -> list[Any]:
        """Return the buffer types for weights, best first."""
        device = self.get_device(self.backend)
        name = b"ggml_backend_dev_get_extra_bufts"
        address = self.reg_get_proc_address(self.dev_backend_reg(device), name)
        found = []
        if address:
            listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
            at = 0
            while listed and listed[at]:
                found.append(listed[at])
                at += 1
        return [*found, self.plain]

    def input(self, x: NDArray[np.float32]) -> Any:
        """Return the tensor that holds activations of as many tokens, filled the first time."""
        if len(x) not in self.inputs:
            context = self.context()
            tensor = self.new_tensor_2d(context, F32, x.shape[1], len(x))
            self.alloc_ctx_tensors_from_buft(context, self.plain)
            self.tensor_set(tensor, x.ctypes.data, 0, x.nbytes)
            self.inputs[len(x)] = tensor
        return self.inputs[len(x)]


class Weight:
    """One weight in the library, and the graph of its product for each number of tokens."""

    def __init__(self, library: Library, blocks: NDArray[np.uint8]) -> None:
        self.library = library
        self.graphs: dict[int, tuple[Any, Any]] = {}
        device = library.get_device(library.backend)
        for kind in library.buffer_types():
            context = library.context()
            self.tensor = library.new_tensor_2d(context, Q4_0, library.columns, library.rows)
            if not library.alloc_ctx_tensors_from_buft(context, kind):
                continue
            x = library.new_tensor_2d(context, F32, library.columns, 1)
            if library.dev_supports_op(device, library.mul_mat(context, self.tensor, x)):
                self.buffer = library.buft_name(kind).decode()
                break
        library.tensor_set(self.tensor, blocks.ctypes.data, 0, blocks.nbytes)

    def multiply(self, x: NDArray[np.float32]) -> None:
        """Compute the product with float32 [tokens, columns]; the result stays in the library."""
        tokens = len(x)
        if tokens not in self.graphs:
            own = self.library
            context = own.context()
            result = own.mul_mat(context, self.tensor, own.input(x))
            own.tensor_alloc(own.out, result, own.buffer_get_base(own.out))
            graph = own.new_graph_custom(context, 8, False)
            own.build_forward_expand(graph, result)
            self.graphs[tokens] = graph, result
        if self.library.graph_compute(self.library.backend, self.graphs[tokens][0]) != 0:
            raise RuntimeError("llama.cpp did not compute")

    def result(self, tokens: int) -> NDArray[np.float32]:
        """Return what the last product with as many tokens gave: float32 [tokens, rows]."""
        found = np.empty((tokens, self.library.rows), np.float32)
        self.library.tensor_get(self.graphs[tokens][1], found.ctypes.data, 0, found.nbytes)
        return found


def blocks(codes: NDArray[np.uint8], scale: NDArray[np.float16]) -> NDArray[np.uint8]:
    """Return a weight as the library stores Q4_0.

    codes    uint8 [rows, columns] in 0..15, which stand for -8..7
    scale    float16 [rows, columns / 32]
    returns  uint8 [rows, columns / 32, 18]: a scale, then 16 bytes whose low digits are the first
             half of a block and whose high digits are the second
    """
    rows, columns = codes.shape
    halves = codes.reshape(rows, columns // BLOCK, 2, BLOCK // 2)
    found = np.empty((rows, columns // BLOCK, 2 + BLOCK // 2), np.uint8)
    found[..., :2] = scale[..., None].view(np.uint8)
    found[..., 2:] = halves[:, :, 0] | halves[:, :, 1] << 4
    return found
