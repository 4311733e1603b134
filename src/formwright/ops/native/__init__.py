"""The compiled ops: one shared library, built at install from every ``ops/<name>/native.cpp``, called through ctypes.

It needs neither PyTorch's headers nor Python's, so one build serves every version of both. Threads are PyTorch's own:
the library runs on the OpenMP pool that PyTorch has loaded, within ``torch.get_num_threads()``. Where nothing was built
or the processor lacks what an op needs, the op's other forms run; :func:`why` says so in a sentence.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formwright.ops.rows import even

#: Instruction sets, in the library's numbers.
LEVELS = ("portable", "avx2", "avx512-vnni")
#: Types whose memory is what it seems; a subclass may hold anything.
PLAIN = (Tensor, torch.nn.Parameter)


class Norm(ctypes.Structure):
    """LayerNorm as a struct of the library; without a gain it is none."""

    _fields_ = (("gain", ctypes.c_void_p), ("shift", ctypes.c_void_p), ("eps", ctypes.c_float))

    @classmethod
    def of(cls, gain: Tensor | None = None, shift: Tensor | None = None, eps: float = 0.0) -> Norm:
        return cls(*(None if t is None else t.data_ptr() for t in (gain, shift)), eps)


class Tokens(ctypes.Structure):
    """A tensor whose rows of channels are ``stride`` values apart, as a struct of the library."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64))


def fields(*groups: tuple[Any, str]) -> tuple[tuple[str, Any], ...]:
    """``(type, "names of fields")``, in the library's order -> what a struct is declared with."""
    return tuple((name, kind) for kind, names in groups for name in names.split())


class Call(ctypes.Structure):
    """What the library is told in one call, and whatever its pointers point to; derive and declare ``_fields_``."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self._held: list[Any] = []

    def give(self, **values: Tensor | Sequence[int] | None) -> None:
        """Point fields to tensors, (B, L, F) with any stride between tokens where a field is :class:`Tokens` and
        contiguous ones elsewhere, or to lists of whole numbers. None leaves a field null."""
        strided = self._strided()
        for name, value in values.items():
            if value is None:
                continue
            held: Any
            if not isinstance(value, Tensor):
                held = (ctypes.c_int64 * len(value))(*value)
                setattr(self, name, ctypes.addressof(held))
            elif name in strided:
                held = even(value)
                setattr(self, name, Tokens(held.data_ptr(), held.stride(1)))
            else:
                held = value.contiguous()
                setattr(self, name, held.data_ptr())
            self._held.append(held)

    @classmethod
    @functools.cache
    def _strided(cls) -> frozenset[str]:
        return frozenset(name for name, kind in cls._fields_ if kind is Tokens)  # type: ignore[misc]

    def run(self, entry: str) -> None:
        """Call the library's function ``entry``, on PyTorch's number of threads."""
        getattr(library(), entry)(ctypes.byref(self), torch.get_num_threads())


@functools.lru_cache(maxsize=1)
def library() -> Any:
    """The loaded library, or None."""
    found = importlib.util.find_spec("formwright._native")
    if found is None or found.origin is None:
        return None
    try:
        made = ctypes.CDLL(found.origin)
    except OSError:
        return None
    made.fw_int8_packed_bytes.restype = ctypes.c_int64
    pool = _pool()
    if pool is not None:
        made.fw_use_runtime(*pool)
    return made


def _pool() -> tuple[ctypes.c_void_p, ctypes.c_void_p] | None:
    """What starts the threads of the OpenMP runtime that PyTorch has loaded, where work then runs, and what says which
    of them is running."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line}
    own = sorted(paths, key=lambda path: "torch" not in path)  # another package may have brought one as well
    for path in own:
        try:
            runtime = ctypes.CDLL(path)
            start, number = runtime.GOMP_parallel, runtime.omp_get_thread_num
            return ctypes.cast(start, ctypes.c_void_p), ctypes.cast(number, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None


def level(most: int = -1) -> str | None:
    """The instruction set in use; ``most`` keeps to that one and below from now on. None where nothing is built."""
    made = library()
    return None if made is None else LEVELS[made.fw_level(most)]


def why() -> str:
    """One line for ``doctor``."""
    name = level()
    if name is None:
        return "not built (no C++17 compiler at install): PyTorch's own kernels run, int8 and ragged batches slower"
    threads = "PyTorch's threads" if _pool() is not None else "one thread (no OpenMP runtime found)"
    return f"{name}, {threads}" + ("" if name == LEVELS[-1] else "; AVX-512 VNNI would be several times faster")


def watched() -> bool:
    """Whether somebody traces, transforms or counts operations, and would not see a kernel run."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return bool(torch._C._len_torch_dispatch_stack()) or torch.jit.is_tracing()


def usable(*tensors: Tensor) -> bool:
    """Whether plain pointers may be handed over: float32 on the CPU, no gradient wanted, nobody watching."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return reachable(*tensors)


def reachable(*tensors: Tensor | None) -> bool:
    """The same for a kernel that has a backward pass of its own: a wanted gradient is no hindrance. None is passed
    over."""
    if library() is None or watched():
        return False
    for t in tensors:
        if t is not None and (type(t) not in PLAIN or t.dtype != torch.float32 or not t.is_cpu):
            return False
    return True


def differentiated(general: Any, tensors: list, wanted: Any, grads: tuple) -> list[Tensor | None]:
    """Gradients of ``general(*tensors)`` with a graph of their own, None where none is wanted."""
    outputs = [(out, grad) for out, grad in zip(general(*tensors), grads) if grad is not None]
    needed = [t for t, want in zip(tensors, wanted) if want]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in outputs], needed, [grad for _, grad in outputs], create_graph=True, allow_unused=True
        )
    )
    return [next(found) if want else None for want in wanted]
