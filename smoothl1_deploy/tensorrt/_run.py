"""`Program`: a deserialised engine and the execution contexts that run it on a GPU.

The calls are the same in tensorrt 10.0 to 11.4 and tensorrt_rtx 1.7; what only some of them have
is looked up by name. Written against the documented API and tested with a fake made of the real
attribute names. On the one GPU there was, an H200, tensorrt_rtx refuses every engine; no other has
run this module.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .._device import Device
from .._files import refusal_told, write_atomic
from ..errors import (
    BackendUnavailableError,
    InvalidInputError,
    SpecError,
    UnsupportedError,
)
from ._engine import Engine
from ._flavour import Flavour

_ALIGNMENT = 256  # bytes: every address that TensorRT is given is a multiple of it


def deserialize(engine: Engine, flavour: Flavour) -> tuple[Any, Any]:
    """The runtime and the engine it made of verified bytes; the runtime must outlive the engine.

    Raises:
        BackendUnavailableError: when TensorRT refuses the engine on this machine, with its reason.
    """
    with flavour.capture() as log:
        try:
            runtime = flavour.trt.Runtime(flavour.logger)
            made = None if runtime is None else runtime.deserialize_cuda_engine(engine.data)
        except (TypeError, RuntimeError) as exc:  # pybind11 says a null pointer by these
            raise BackendUnavailableError(
                f"{flavour} can't be used to run engines here ({log.reason()}; {exc}): it needs a "
                "GPU and its driver"
            ) from exc
    if made is None:
        raise BackendUnavailableError(
            f"{flavour} can't run the engine of {engine.sidecar.graph_name!r} here: "
            f"{log.reason()}. Build it again on this machine, or for its GPU's compute capability"
        )
    return runtime, made


def engine_layers(engine: Engine, flavour: Flavour) -> list[str]:
    """The names of its layers, by TensorRT's engine inspector.

    Raises:
        BackendUnavailableError: when the engine can't be deserialised on this machine.
        UnsupportedError: when the inspector's answer can't be read.
    """
    _runtime, made = deserialize(engine, flavour)
    text = made.create_engine_inspector().get_engine_information(
        flavour.need("LayerInformationFormat", "JSON", "the engine inspector")
    )
    try:
        return [str(layer) for layer in json.loads(text)["Layers"]]
    except (ValueError, KeyError, TypeError) as exc:
        raise UnsupportedError(
            f"the engine inspector of {flavour} gave what can't be read as layers: {text[:200]!r}"
        ) from exc


class Program:
    """An engine that is ready to run, from many threads at once.

    Args:
        engine: as `build_engine` or `read_engine` gives it, checked against its sidecar.
        flavour: the one that built it.
        device: the one to run on.
        contexts: how many calls may be prepared at a time; a further one waits.
        kernels: the file for the kernels that `tensorrt_rtx` compiles; None keeps none.

    Raises:
        SpecError: for fewer than one context.
        BackendUnavailableError: when the engine can't be deserialised here.
    """

    def __init__(
        self,
        engine: Engine,
        flavour: Flavour,
        device: Device,
        *,
        contexts: int = 4,
        kernels: Path | None = None,
    ) -> None:
        if contexts < 1:
            raise SpecError(f"contexts must be at least 1, got {contexts}")
        self.sidecar = engine.sidecar
        self.flavour = flavour
        self.device = device
        self._kernels: _Kernels | None = None
        self._runtime, self._engine = deserialize(engine, flavour)
        self._config = self._runtime_config(kernels)
        self._guard = threading.Lock()
        self._free = threading.Semaphore(contexts)
        self._idle: list[Context] = []
        self._met: set[tuple[tuple[int, ...], ...]] = set()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Launch the engine on tensors of the device, by the names of its inputs.

        Returns:
            New tensors, ready in the order of torch's current stream.

        Raises:
            InvalidInputError: for a shape that the engine's profile doesn't cover.
            UnsupportedError: when TensorRT refuses to run.
        """
        with self._context() as context:
            outputs = context.execute(feeds)
        if self._kernels is not None:
            shapes = tuple(tuple(tensor.shape) for tensor in feeds.values())
            with self._guard:
                if shapes not in self._met:
                    self._met.add(shapes)
                    self._kernels.save()
        return outputs

    def new_context(self) -> Context:
        """A context of the caller's own, outside the pool: a CUDA graph needs one for itself."""
        with self._guard:
            return Context(self, self._engine, self._config)

    @contextlib.contextmanager
    def _context(self) -> Iterator[Context]:
        with self._free:
            with self._guard:
                taken = self._idle.pop() if self._idle else None
            context = taken or self.new_context()
            yield context  # a context that failed doesn't come back to the idle ones
            with self._guard:
                self._idle.append(context)

    def _runtime_config(self, kernels: Path | None) -> Any:
        """How contexts are to be made: a runtime configuration, or a strategy before 10.16.

        Scratch memory is ours to give: TensorRT would take, for each context, what the largest
        shape of the profile needs.
        """
        flavour = self.flavour
        managed = flavour.need("ExecutionContextAllocationStrategy", "USER_MANAGED", "scratch")
        if flavour.member("ICudaEngine", "create_runtime_config") is None:
            return managed
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        eager = flavour.member("DynamicShapesKernelSpecializationStrategy", "EAGER")
        if eager is not None:
            # LAZY answers with other kernels until a background thread is done: which ones ran
            # would be a matter of time, and a CUDA graph would keep the first.
            config.dynamic_shapes_kernel_specialization_strategy = eager
        if kernels is not None and flavour.member("IRuntimeConfig", "create_runtime_cache"):
            self._kernels = _Kernels(kernels, config)
        return config


class _Kernels:
    """The kernels that `tensorrt_rtx` compiled for this GPU, in a file that processes share.

    An engine of `tensorrt_rtx` holds none for the GPU at hand: they are compiled when an execution
    context first meets a shape. Of two processes the last one to write wins.
    """

    def __init__(self, path: Path, config: Any) -> None:
        self._path, self._cache = path, config.create_runtime_cache()
        with contextlib.suppress(OSError):  # kernels that can't be read are compiled again
            # The runtime itself checks that they fit the GPU, the driver and the version.
            self._cache.deserialize(path.read_bytes())
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what there is.

        Raises:
            OutputError: when the file can't be written.
        """
        remedy = "choose a folder that you may write to"
        with refusal_told(f"can't keep compiled kernels in {self._path}", remedy):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, bytes(self._cache.serialize()))


class Context:
    """One execution context with a stream of its own; for one thread at a time.

    Its stream keeps two calls in a row apart on the GPU, whatever streams their callers are on.
    """

    def __init__(self, program: Program, engine: Any, config: Any) -> None:
        self._program = program
        flavour, device = program.flavour, program.device
        self._stream = device.new_stream()
        with flavour.capture() as log:
            self._context = engine.create_execution_context(config)
        if self._context is None:
            raise UnsupportedError(f"{flavour} made no execution context: {log.reason()}")
        if self._context.active_optimization_profile != 0:  # another context has the first claim
            done = device.launch(
                self._stream, lambda s: self._context.set_optimization_profile_async(0, s)
            )
            if not done:
                raise UnsupportedError(f"{flavour} refused its optimization profile")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._output_shapes: dict[str, tuple[int, ...]] = {}
        self._scratch = device.empty((_ALIGNMENT,), "uint8")

    def execute(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """What `Program.run` does, on this context."""
        device, context = self._program.device, self._context
        shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
        if shapes != self._shapes:
            self._shapes = {}  # taking the new shapes may fail half-way
            self._take_shapes(shapes)
            self._shapes = shapes
        ports = self._program.sidecar.outputs
        outputs = {p.name: device.empty(self._output_shapes[p.name], p.dtype) for p in ports}
        aligned = {name: _aligned(tensor) for name, tensor in feeds.items()}
        for name, tensor in [*aligned.items(), *outputs.items()]:
            # An empty tensor has no address, and TensorRT wants one, which it never reads.
            context.set_tensor_address(name, tensor.data_ptr() or self._scratch.data_ptr())
        with self._program.flavour.capture() as log:
            done = device.launch(self._stream, context.execute_async_v3)
        if not done:
            raise UnsupportedError(f"{self._program.flavour} failed to run: {log.reason()}")
        return outputs

    def check_recordable(self) -> None:
        """Raise where the context says that a CUDA graph can't record it; only rtx can be asked."""
        ask = getattr(self._context, "is_stream_capturable", None)
        if ask is not None and not ask(int(self._stream.cuda_stream)):
            raise UnsupportedError(
                f"{self._program.flavour} says that this engine can't be recorded in a CUDA graph"
            )

    def _take_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Tell the context its input shapes, and learn from it what the outputs and it need."""
        context, program = self._context, self._program
        with program.flavour.capture() as log:
            for port in program.sidecar.inputs:
                shape = shapes[port.name]
                _check_profile(port.name, shape, program.sidecar.profile.ranges)
                if -1 in port.shape and not context.set_input_shape(port.name, shape):
                    raise InvalidInputError(
                        f"{program.flavour} refused the shape {shape} of {port.name}: "
                        f"{log.reason()}"
                    )
            lacking = context.infer_shapes()
        if lacking:
            raise UnsupportedError(f"the engine needs more than shapes: {', '.join(lacking)}")
        for port in program.sidecar.outputs:
            shape = tuple(int(size) for size in context.get_tensor_shape(port.name))
            if -1 in shape:
                raise UnsupportedError(
                    f"the shape of {port.name} depends on the numbers in the inputs, which a loss "
                    "has no use for and this runner no memory for"
                )
            self._output_shapes[port.name] = shape
        size = max(int(context.update_device_memory_size_for_shapes()), _ALIGNMENT)
        self._scratch = program.device.empty((size,), "uint8")
        if program.flavour.member("IExecutionContext", "set_device_memory") is None:
            context.device_memory = self._scratch.data_ptr()  # versions before 10.4 have this alone
        else:
            context.set_device_memory(self._scratch.data_ptr(), size)


def _aligned(tensor: Any) -> Any:
    """The tensor, copied where a view of the caller's begins at an address TensorRT can't take."""
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _check_profile(name: str, shape: tuple[int, ...], ranges: Mapping[str, Any]) -> None:
    if name not in ranges:
        return
    low, _, high = ranges[name]
    if not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
        texts = ("x".join(map(str, each)) for each in (low, high))
        raise InvalidInputError(
            f"{name} has the shape {shape}, and the engine was built for {' to '.join(texts)}; "
            f"build it with a profile that covers it, as in --profile {name}=MIN,OPT,MAX"
        )
