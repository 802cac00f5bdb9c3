"""`Device`: a CUDA device as torch gives it: memory, streams, graphs, and arrays in and out.

Everything this package asks of torch.cuda stands here, so that what runs on a GPU can be tested
with a small fake where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .errors import BackendUnavailableError, InvalidInputError, require

if TYPE_CHECKING:
    from ._floats import Array

T = TypeVar("T")

_CUDA = 2  # DLPack's kDLCUDA


def is_on_device(value: Any) -> bool:
    """Whether `value` is a tensor in the memory of a CUDA device, whoever made it."""
    flag = getattr(value, "is_cuda", None)  # torch's: a quick answer to a question of every call
    if isinstance(flag, bool):
        return flag
    place = getattr(value, "__dlpack_device__", None)
    try:
        return place is not None and int(place()[0]) == _CUDA
    except Exception:  # the caller's code: whoever reads the value says what is wrong with it
        return False


def find_device(what: str) -> Device:
    """The CUDA device that torch uses in this thread.

    Args:
        what: who needs it, for the message: `"the trt backend"`.

    Raises:
        MissingDependencyError: when torch is not installed.
        BackendUnavailableError: when torch is built without CUDA, or finds no GPU.
    """
    torch = require("torch", "torch", what)
    version = torch.__version__
    if torch.version.cuda is None:
        raise BackendUnavailableError(
            f"{what} needs an NVIDIA GPU and a torch built for CUDA; torch {version} here is built "
            "without. On a machine with a GPU, install the CUDA build of torch"
        )
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"{what} needs an NVIDIA GPU; torch {version}, built for CUDA {torch.version.cuda}, "
            "finds none. Run it on a machine with a GPU and a driver for that CUDA version"
        )
    return Device(torch, torch.cuda.current_device())


@dataclass(frozen=True, slots=True)
class Captured(Generic[T]):
    """A computation recorded in a CUDA graph; its tensors keep their addresses.

    Attributes:
        result: what the computation returned. `replay` writes it anew from what is then in the
            tensors the computation read.
    """

    result: T
    graph: Any = field(repr=False)
    kept: Any = field(repr=False, default=None)  # what the recorded kernels read besides

    def replay(self) -> T:
        """Run the recorded kernels again, on the caller's stream, without waiting for them."""
        self.graph.replay()
        return self.result


class Device:
    """One CUDA device; what is launched here is ordered by the caller's current torch stream."""

    kind = "cuda"

    def __init__(self, torch: Any, index: int) -> None:
        self._torch = torch
        self.index = index
        self._place = torch.device(self.kind, index)

    @property
    def name(self) -> str:
        """The name that the driver gives it, for instance `"NVIDIA L4"`."""
        return str(self._torch.cuda.get_device_name(self.index))

    @property
    def capability(self) -> str:
        """Its compute capability, for instance `"8.9"`."""
        major, minor = self._torch.cuda.get_device_capability(self.index)
        return f"{major}.{minor}"

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A tensor with nothing in it yet."""
        return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self._place)

    def empty_beside(self, tensor: Any, shape: tuple[int, ...]) -> Any:
        """What `empty` gives in the dtype of a contiguous tensor of this device, more quickly."""
        return self._torch.empty_like(tensor) if tensor.shape == shape else tensor.new_empty(shape)

    def filled(self, value: float, dtype: str) -> Any:
        """A tensor of rank 0, made on the device."""
        return self._torch.full((), value, dtype=getattr(self._torch, dtype), device=self._place)

    def upload(self, array: Array) -> Any:
        """A copy of a numpy array in the memory of the device."""
        from ._dlpack import to_torch

        return to_torch(array).to(self._place, copy=True)

    def download(self, tensor: Any) -> Array:
        """The tensor as a numpy array; waits for it."""
        from ._dlpack import from_torch

        return from_torch(tensor.detach().cpu())

    def adopt(self, value: Any, what: str) -> Any:
        """`value` as a contiguous torch tensor over the same memory (a copy where it has strides).

        Raises:
            InvalidInputError: for a tensor of another device, or without data.
        """
        from ._dlpack import adopted

        tensor = adopted(value, what, lambda plain: plain, self._torch.from_dlpack)
        if tensor.device != self._place:
            raise InvalidInputError(
                f"{what} is on {tensor.device}, and the artefact was loaded on {self._place}; "
                "move it there, or load the artefact on that device"
            )
        return tensor.contiguous()

    def as_it_is(self, value: Any) -> tuple[Any, Any] | None:
        """Shape and dtype of a torch tensor that `adopt` would leave alone; None for all else."""
        torch = self._torch
        if (
            type(value) is torch.Tensor
            and value.device == self._place
            and not value.requires_grad
            and value.layout is torch.strided
            and value.is_contiguous()
            and not value.is_neg()
            and value.untyped_storage().nbytes()  # 0: no element, or a storage that was freed
        ):
            return value.shape, value.dtype
        return None

    def convert(self, tensor: Any, dtype: str) -> Any:
        """The tensor in `dtype`: itself where that is its own."""
        return tensor.to(getattr(self._torch, dtype))

    def selected(self) -> AbstractContextManager[None]:
        """A context in which kernels that aren't torch's are launched on this device."""
        cuda = self._torch.cuda
        scope: AbstractContextManager[None] = (
            nullcontext() if cuda.current_device() == self.index else cuda.device(self.index)
        )
        return scope

    def new_stream(self) -> Any:
        """A stream of its own; `launch` orders it."""
        return self._torch.cuda.Stream(self._place)

    def launch(self, stream: Any, work: Callable[[int], T]) -> T:
        """Call `work` with the handle of `stream`, ordered after and before the caller's stream.

        What `work` reads and writes must have been allocated on the caller's stream: as that waits
        for `stream` in turn, its allocator may hand the memory out again without a race.
        """
        current = self._torch.cuda.current_stream(self._place)
        stream.wait_stream(current)
        try:
            return work(int(stream.cuda_stream))
        finally:
            current.wait_stream(stream)

    def capture(self, compute: Callable[[], T]) -> Captured[T]:
        """Record what `compute` launches in a CUDA graph, after a first call that is not recorded.

        What is compiled or allocated once and for all happens in the first call.
        """
        torch = self._torch
        side = torch.cuda.Stream(self._place)
        side.wait_stream(torch.cuda.current_stream(self._place))
        with torch.cuda.stream(side):
            compute()
        torch.cuda.current_stream(self._place).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = compute()
        return Captured(result, graph, compute)
