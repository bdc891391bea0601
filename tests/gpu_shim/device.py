"""Tensors on a GPU that is not there: torch takes them for tensors on cuda:0, and their numbers lie in CPU tensors."""

from __future__ import annotations

import functools
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
SYNC_WARNING = "called a synchronizing CUDA operation"
"""How torch's warning of an operation that waits for the GPU starts. vLLM makes an error of it."""
WAITS = (
    *("item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "masked_select"),
    *("_unique2", "unique_dim", "unique_consecutive", "bincount"),
)
WAITS_IF_INDEXED_BY_BOOL = ("index", "index_put", "index_put_", "_index_put_impl_")
MAY_MIX = ("copy_", "to", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "type_as", "lift_fresh")
COPIES = ("to", "_to_copy", "copy_")
UNREAD = {True: float("nan"), False: 113}
"""Numbers of memory that a GPU has not written to yet, by whether they are floats."""

ALLOCATES = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")

PYTHON_OPS: dict[str, Callable[..., Any]] = {}
"""vLLM's custom operators in Python, by qualified name."""


class Memory:
    """What a GPU's tensors share that are views of one another.

    It is freed when the last of them is gone. A graph that was captured with it does not keep it: what a replay reads
    there is of whoever has it then.

    Attributes:
        of_graph: whether it was made in a capture, whose graph has it to itself.
        captured: whether a graph reads or writes it.
    """

    __slots__ = ("__weakref__", "captured", "of_graph", "storage")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage, self.of_graph, self.captured = storage, GPU.tape is not None, False

    def __del__(self) -> None:
        if self.captured and not self.of_graph:
            self.storage.fill_(0xFF)  # NaN for floats, -1 for integers


MEMORIES: WeakValueDictionary[int, Memory] = WeakValueDictionary()
"""By the address of torch's storage."""


class GpuTensor(torch.Tensor):
    """A tensor of cuda:0. ``inner`` is the CPU tensor that has its numbers; views share memory as on a GPU."""

    inner: torch.Tensor
    memory: Memory
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> GpuTensor:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **layout, device=CUDA)
        made.inner = inner
        storage = inner.untyped_storage()
        known = MEMORIES.get(storage._cdata)
        made.memory = MEMORIES.setdefault(storage._cdata, Memory(storage)) if known is None else known
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return GPU.run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"GpuTensor({self.inner!r})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def set_(self, *memory: Any) -> GpuTensor:  # type: ignore[override]
        """As torch's, but the tensor is another one: the sizes of this one are fixed."""
        return GpuTensor(torch.empty(0, dtype=self.dtype).set_(*memory))

    def record_stream(self, stream: Any) -> None:
        """Nothing: memory is not given to another tensor while this one is used."""

    def tolist(self) -> Any:
        GPU.wait("tolist")
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy


class Mode(TorchDispatchMode):
    """Sees operations that have no tensor of the GPU yet: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return GPU.run(func, args, kwargs or {})


@dataclass(frozen=True)
class Copy:
    """A copy between pinned memory of the host and a GPU, which the host has not waited for.

    Attributes:
        number: of launches before it.
        host: the host's side.
        numbers: those that it had when it was read, or will have when it is written.
        reads: whether the GPU reads it.
        caller: the code that asked for it.
    """

    number: int
    host: torch.Tensor
    numbers: torch.Tensor
    reads: bool
    caller: str

    def end(self) -> None:
        """The host has waited for it.

        Raises:
            RuntimeError: the host has written to memory that the GPU was still to read.
        """
        if not self.reads:
            self.host.copy_(self.numbers)
        elif not torch.equal(_bytes(self.host), _bytes(self.numbers)):
            raise RuntimeError(f"the host wrote to memory of a copy that might not have begun, of {self.caller}")


class Gpu:
    """Runs the operations of all tensors, and notes what a GPU would be asked to do.

    A GPU may copy from and to pinned memory at any time until the host has waited for it. So what it reads there must
    not change until then, and what it writes there is UNREAD until then.

    Attributes:
        launches: the kernels and copies so far, by name. Views and allocations are none.
        calls: the numbers of launches in each call of vLLM's operators in Python, by name.
        triton: Triton's kernels that were launched, as "module:name".
        tape: what is launched is appended here while a graph is captured; None: no graph is.
        number: of the launches so far, with those of replays.
        copies: those that the host has not waited for.
        warns: whether operations that wait for the GPU are reported, as ``torch.cuda.set_sync_debug_mode`` says.
    """

    def __init__(self) -> None:
        self.mode = Mode()
        self.launches: Counter[str] = Counter()
        self.calls: defaultdict[str, list[int]] = defaultdict(list)
        self.triton: set[str] = set()
        self.tape: list[Callable[[], None]] | None = None
        self.number = 0
        self.copies: list[Copy] = []
        self.warns = False

    def finish(self, number: int) -> None:
        """The host has waited for so many launches (raises RuntimeError: as ``Copy.end``)."""
        ended = [copy for copy in self.copies if copy.number <= number]
        self.copies = [copy for copy in self.copies if copy.number > number]
        with _disable_current_modes(), torch.inference_mode():
            for copy in ended:
                copy.end()

    def wait(self, name: str) -> None:
        """Report an operation for which the host waits."""
        if self.tape is not None:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        if self.warns:
            warnings.warn(f"{SYNC_WARNING}: {name}", stacklevel=2)
        self.finish(self.number)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What __torch_dispatch__ does."""
        qualified = func._schema.name
        if qualified in PYTHON_OPS:
            before = self.launches.total()
            with self.mode:
                out = PYTHON_OPS[qualified](*args, **kwargs)
            self.calls[qualified].append(self.launches.total() - before)
            return out
        name = qualified.partition("::")[2]
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        on_gpu = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
        asked = next((leaf.type for leaf in leaves if isinstance(leaf, torch.device)), None)
        if name == "is_pinned":
            return not on_gpu and is_pinned(tensors[0])
        if name in ("pin_memory", "_pin_memory"):
            return pinned(tensors[0].clone())
        pins = bool(kwargs.get("pin_memory"))
        goes_to = asked or ("cuda" if on_gpu else "cpu")
        if name == "to" and len(tensors) == 2:
            goes_to = tensors[1].device.type
        if not on_gpu and goes_to == "cpu" and not pins:
            return func(*args, **kwargs)
        non_blocking = _argument(func, args, kwargs, "non_blocking")
        self._check(name, tensors, on_gpu, goes_to, non_blocking)
        counts = name == "repeat_interleave" and func._overloadname != "self_int"
        if counts and _argument(func, args, kwargs, "output_size") is None:
            self.wait(name)
        args, kwargs = tree_unflatten([_on_cpu(leaf) for leaf in leaves], spec)
        if pins:
            kwargs["pin_memory"] = False
        moves = name in ("to", "_to_copy") and tensors[0].device.type != goes_to
        kernel = _copying(func) if moves else func
        out = self.launch(name, kernel, args, kwargs, tensors, goes_to, func._schema.is_mutable)
        if pins or (moves and goes_to == "cpu"):
            pinned(out)
        if name in COPIES and non_blocking:
            self._note_copy(name, tensors, out)
        return out

    def _note_copy(self, name: str, tensors: list[torch.Tensor], out: torch.Tensor) -> None:
        """Note a copy for which the host does not wait, if it is one between pinned memory and the GPU."""
        source, target = (tensors[-1], tensors[0]) if name == "copy_" else (tensors[0], out)
        host, reads = (source, True) if isinstance(target, GpuTensor) else (target, False)
        is_other = isinstance(source, GpuTensor) != isinstance(target, GpuTensor)
        if self.tape is not None or not is_other or not is_pinned(host):
            return
        caller = next(str(frame) for frame in reversed(traceback.extract_stack()) if not _is_here(frame.filename))
        with _disable_current_modes(), torch.inference_mode():
            self.copies.append(Copy(self.number, host, host.clone(), reads, caller))
            if not reads:
                host.fill_(UNREAD[host.dtype.is_floating_point] if host.dtype != torch.bool else True)

    def _check(self, name: str, tensors: list[Any], on_gpu: list[Any], goes_to: str, non_blocking: Any) -> None:
        """Refuse operands on two devices, and report operations that wait."""
        mixed = on_gpu and any(tensor.dim() for tensor in tensors if not isinstance(tensor, GpuTensor))
        if mixed and name not in MAY_MIX:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu")
        if name in WAITS or (name == "where" and len(tensors) == 1):
            self.wait(name)
        if name in WAITS_IF_INDEXED_BY_BOOL:
            indexes = tensors[1:] if name == "index" else tensors[1:-1]
            by_bool = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in indexes)
            fills = name != "index" and tensors[-1].numel() == 1  # torch has masked_fill for it
            if mixed or (by_bool and not fills):
                self.wait(name)
        if name in COPIES:
            source = tensors[-1] if name == "copy_" else tensors[0]
            target = tensors[0].device.type if name == "copy_" else goes_to
            if source.device.type != target and not non_blocking:
                self.wait(f"{name} from {source.device.type} to {target}")

    def launch(
        self,
        name: str,
        kernel: Callable[..., Any],
        args: Any,
        kwargs: Any,
        tensors: list[torch.Tensor],
        goes_to: str = "cuda",
        writes: bool = True,
    ) -> Any:
        """Run a kernel on CPU tensors, and note it for the graph that is being captured.

        Args:
            tensors: the operands, in place of whose numbers the kernel has those of ``args``.
            goes_to: the type of the device on which new tensors are.
            writes: whether it may write to its operands. If not, and nothing it returns is new, it makes a view.
        """
        with _disable_current_modes():
            out = kernel(*args, **kwargs)
        known = {id(_on_cpu(tensor)): tensor for tensor in tensors}
        memory = {_on_cpu(tensor).untyped_storage()._cdata for tensor in tensors}
        outs = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor)]
        new = [leaf for leaf in outs if leaf.untyped_storage()._cdata not in memory]
        if (writes or new) and name not in ALLOCATES:
            self.launches[name] += 1
            self.number += 1
            if self.tape is not None:
                for tensor in tensors:
                    if isinstance(tensor, GpuTensor):
                        tensor.memory.captured = True
                self.tape.append(functools.partial(_again, kernel, args, kwargs, out, new))

        def wrapped(leaf: torch.Tensor) -> torch.Tensor:
            if id(leaf) in known:
                return known[id(leaf)]
            if goes_to != "cuda":
                return leaf
            is_view = not any(leaf is one for one in new)
            with torch.inference_mode(tensors[0].is_inference() if is_view else torch.is_inference_mode_enabled()):
                return GpuTensor(leaf)

        return tree_map_only(torch.Tensor, wrapped, out)

    def call(self, name: str, kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Launch a kernel that is no operator of torch: Triton's, or one of FlashAttention's."""
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        args, kwargs = tree_unflatten([_on_cpu(leaf) for leaf in leaves], spec)
        return self.launch(name, kernel, args, kwargs, tensors)


GPU = Gpu()


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, GpuTensor):
        return leaf.inner
    return CPU if isinstance(leaf, torch.device) else leaf


def _argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """What an operator is given as the argument of this name; None: nothing."""
    places = {argument.name: place for place, argument in enumerate(func._schema.arguments)}
    return args[places[name]] if places.get(name, len(args)) < len(args) else kwargs.get(name)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor[None].view(torch.uint8)


def _is_here(file: str) -> bool:
    return file == __file__ or "/torch/" in file


def _copying(func: Any) -> Callable[..., Any]:
    """An operator ``to`` whose result never is its operand, since it is on another device."""

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = func(*args, **kwargs)
        return out.clone() if out.untyped_storage()._cdata == args[0].untyped_storage()._cdata else out

    return run


def _again(kernel: Callable[..., Any], args: Any, kwargs: Any, out: Any, new: list[torch.Tensor]) -> None:
    """Run a kernel of a graph again: on the memory that it had in the capture, whatever is there now."""
    again = kernel(*args, **kwargs)
    if new:
        for old, fresh in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
            if any(old is one for one in new):
                old.copy_(fresh)


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().is_pinned_here = True
    return tensor


def is_pinned(tensor: torch.Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "is_pinned_here", False)
