"""A TensorRT made of the attribute names of a real version (api/<version>.json).

Those files list, by class, what the Python bindings of that version have; a name a version lacks
raises AttributeError here too. The behaviour is the little that the adapter relies on, and where
TensorRT misleads the fake does so as well: float64 is narrowed in silence, `create_network`
returns None for the flags of another version, a build without a profile returns None.

With `gpu = True` the module also runs what it built, on memory of the host: it does what the
documentation says of execution, and asserts what that forbids. No GPU has been seen to agree.
"""

from __future__ import annotations

import ctypes
import json
import math
import threading
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx

API = Path(__file__).with_name("api")
KNOWN_BAD = "Foo"  # an operator the fake parser doesn't know
_DATA_TYPE = {1: "FLOAT", 10: "HALF", 16: "BF16", 11: "FLOAT", 6: "INT32", 7: "INT64", 9: "BOOL"}


def _stub(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("the adapter was not expected to call this")


class FakeTensorRT:
    """A module; a name that its version lacks can neither be read nor be set."""

    def __init__(self, version: str) -> None:
        self.__version__ = version.removeprefix("rtx-")
        self.built = 0
        self.api = json.loads((API / f"{version}.json").read_text())
        for name, content in self.api.items():
            made = IntEnum(name, content) if isinstance(content, dict) else None
            setattr(self, name, made or self._class(name, content))

    def _class(self, name: str, attributes: list[str]) -> type:
        behaviour = vars(BEHAVIOUR.get(name, object))

        def put(obj: Any, attr: str, value: Any) -> None:
            if not attr.startswith("_") and attr not in attributes:
                raise AttributeError(f"{name!r} object has no attribute {attr!r}")
            object.__setattr__(obj, attr, value)

        body = {attr: behaviour.get(attr, _stub) for attr in attributes}
        body |= {k: v for k, v in behaviour.items() if k.startswith("_") and callable(v)}
        return type(name, (), body | {"__setattr__": put, "_fake": self})


class _Logger:
    def __init__(self) -> None:
        pass


def say(logger: Any, severity: str, text: str) -> None:
    logger.log(SimpleNamespace(name=severity), text)


class _Builder:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> Any:
        typed = self._fake.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        if flags != 1 << int(typed):
            say(self._logger, "ERROR", f"unknown network flags {flags}")
            return None
        return self._fake.INetworkDefinition()

    def create_builder_config(self) -> Any:
        return self._fake.IBuilderConfig(self._logger)

    def create_optimization_profile(self) -> Any:
        return self._fake.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        monitor = config._monitor()
        if monitor is not None:
            monitor.phase_start("Building engine", None, 3)
            for step in range(3):
                if not monitor.step_complete("Building engine", step):
                    say(self._logger, "ERROR", "Build canceled by user")
                    return None
            monitor.phase_finish("Building engine")
        if any(-1 in tensor._shape for tensor in network._inputs) and not config._profiles:
            say(self._logger, "ERROR", "network has dynamic inputs, but no optimization profile")
            return None
        self._fake.built += 1
        flags = sorted(flag.name for flag in config._flags)
        text = f"fake engine of {object.__getattribute__(network, 'name')} {flags} {config._extras}"
        return self._fake.IHostMemory(text.encode() + b"\0" + network._onnx)


class _HostMemory:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bytes__(self) -> bytes:
        return self._data


class _Tensor:
    def __init__(self, value: onnx.ValueInfoProto, fake: FakeTensorRT) -> None:
        tensor = value.type.tensor_type
        self._shape = tuple(
            dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim
        )
        self.name, self.shape, self.is_shape_tensor = value.name, self._shape, False
        self.dtype = fake.DataType.__members__[_DATA_TYPE[tensor.elem_type]]


class _Network:
    def __init__(self) -> None:
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self.name, self.num_inputs, self.num_outputs = "Unnamed Network 0", 0, 0

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]


class _Parser:
    def __init__(self, network: Any, logger: Any) -> None:
        self._network, self._errors, self.num_errors = network, [], 0

    def parse(self, data: bytes) -> bool:
        graph = onnx.load_model_from_string(data).graph
        for index, node in enumerate(graph.node):
            if node.op_type == KNOWN_BAD:
                self._errors.append(self._fake.ParserError(index, node))
                self.num_errors = 1
                return False
        constants = {tensor.name for tensor in graph.initializer}
        network, make = self._network, self._fake.ITensor
        network._onnx = data
        network._inputs += [make(v, self._fake) for v in graph.input if v.name not in constants]
        network._outputs += [make(v, self._fake) for v in graph.output]
        network.num_inputs, network.num_outputs = len(network._inputs), len(network._outputs)
        return True

    def get_error(self, index: int) -> Any:
        return self._errors[index]


class _ParserError:
    def __init__(self, index: int, node: onnx.NodeProto) -> None:
        self._index, self._node = index, node

    def code(self) -> Any:
        return self._fake.ErrorCode.UNSUPPORTED_NODE

    def desc(self) -> str:
        return "no importer"

    def node(self) -> int:
        return self._index

    def node_name(self) -> str:
        return self._node.name

    def node_operator(self) -> str:
        return self._node.op_type

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0


class _Config:
    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._flags = {self._fake.BuilderFlag.__members__["TF32"]}  # on, as TensorRT has it
        self._profiles: list[Any] = []
        self._extras: dict[str, Any] = {}

    def _monitor(self) -> Any:
        return vars(self).get("progress_monitor")

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self._flags

    def set_compute_capability(self, capability: Any, index: int) -> bool:
        self._extras[f"cc{index}"] = capability.name
        return index < self.num_compute_capabilities

    def add_optimization_profile(self, profile: Any) -> int:
        if any(low > high for low, high in profile._bounds):
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1


class _Profile:
    def __init__(self) -> None:
        self._bounds: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None:
        if not len(low) == len(usual) == len(high):
            raise ValueError("The shapes provided are of different ranks")
        self._bounds.append((tuple(low), tuple(high)))


class _Monitor:
    def __init__(self) -> None:
        pass


class _Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        if not getattr(self._fake, "gpu", False):
            say(self._logger, "ERROR", "CUDA initialization failure with error: 35")
            return None
        return self._fake.ICudaEngine(data.split(b"\0", 1)[1], self._logger)

    def get_engine_validity(self, data: bytes) -> tuple[Any, int]:
        invalid = self._fake.EngineValidity.__members__["INVALID"]
        return invalid, getattr(self._fake, "diagnostics", 0)


class _Engine:
    """Runs the model it was "built" from with ONNX Runtime, on memory of the host."""

    def __init__(self, data: bytes, logger: Any) -> None:
        import onnxruntime

        self._logger = logger
        self._graph = onnx.load_model_from_string(data).graph
        self._session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        self._contexts: list[Any] = []

    def create_execution_context(self, how: Any = None) -> Any:
        context = self._fake.IExecutionContext(self, how)
        self._contexts.append(context)
        return context

    def create_runtime_config(self) -> Any:
        return self._fake.IRuntimeConfig()

    def create_engine_inspector(self) -> Any:
        return self._fake.EngineInspector(self._graph)


class _RuntimeConfig:
    def __init__(self) -> None:
        self._strategy, self._cache = None, None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> Any:
        return self._fake.IRuntimeCache()

    def set_runtime_cache(self, cache: Any) -> bool:
        self._cache = cache
        return True


class _RuntimeCache:
    def __init__(self) -> None:
        self._content = b"kernels"

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels"):
            return False
        self._content = bytes(blob)
        return True

    def serialize(self) -> Any:
        return self._fake.IHostMemory(self._content)


class _Inspector:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph

    def get_engine_information(self, format: Any) -> str:
        assert format.name == "JSON"
        return json.dumps({"Layers": [node.name for node in self._graph.node], "Bindings": []})


class _Context:
    """Refuses, as TensorRT would or by what it forbids, to be used by two threads at once."""

    def __init__(self, engine: Any, how: Any) -> None:
        self._engine, self._how, self._busy = engine, how, threading.Lock()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        # TensorRT gives the first context of an engine profile 0, and the others none.
        self.active_optimization_profile = -1 if engine._contexts else 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.active_optimization_profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory > 0, f"no address for {name}"
        self._addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return [i.name for i in self._engine._session.get_inputs() if self._of(i) is None]

    def _of(self, value: Any) -> tuple[int, ...] | None:
        if all(isinstance(dim, int) for dim in value.shape):
            return tuple(value.shape)
        return self._shapes.get(value.name)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        zeros = {i.name: np.zeros(self._of(i), _NUMPY[i.type]) for i in self._inputs()}
        return next(o.shape for n, o in self._outputs(zeros) if n == name)

    def _inputs(self) -> Any:
        return self._engine._session.get_inputs()

    def _outputs(self, feeds: dict[str, Any]) -> list[tuple[str, Any]]:
        session = self._engine._session
        names = [output.name for output in session.get_outputs()]
        return [*zip(names, map(np.asarray, session.run(names, feeds)), strict=True)]

    def update_device_memory_size_for_shapes(self) -> int:
        return 1000

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= 1000
        self._memory = (memory, size)

    def is_stream_capturable(self, stream: int) -> bool:
        return not getattr(self._fake, "never_capturable", False)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream != 0, "the default stream"
        assert self.active_optimization_profile == 0
        assert self._memory or vars(self).get("device_memory"), "no scratch memory"
        assert self._busy.acquire(blocking=False), "one context, two threads"
        try:
            if getattr(self._fake, "broken", False):
                say(self._engine._logger, "ERROR", "an illegal memory access was encountered")
                return False
            feeds = {
                i.name: _at(self._addresses[i.name], self._of(i), _NUMPY[i.type])
                for i in self._inputs()
            }
            for name, value in self._outputs(feeds):
                _at(self._addresses[name], value.shape, value.dtype)[...] = value
            return True
        finally:
            self._busy.release()


_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def _at(address: int, shape: Any, dtype: Any) -> Any:
    """The memory at `address` as an array; a zero-size one is not read."""
    count = math.prod(shape)
    if count == 0:
        return np.zeros(shape, dtype)
    kind = ctypes.c_char * (count * np.dtype(dtype).itemsize)
    return np.frombuffer(kind.from_address(address), dtype).reshape(shape)


BEHAVIOUR: dict[str, type] = {
    "EngineInspector": _Inspector,
    "ICudaEngine": _Engine,
    "IExecutionContext": _Context,
    "IRuntimeCache": _RuntimeCache,
    "IRuntimeConfig": _RuntimeConfig,
    "Builder": _Builder,
    "IBuilderConfig": _Config,
    "IHostMemory": _HostMemory,
    "ILogger": _Logger,
    "INetworkDefinition": _Network,
    "IOptimizationProfile": _Profile,
    "IProgressMonitor": _Monitor,
    "ITensor": _Tensor,
    "OnnxParser": _Parser,
    "ParserError": _ParserError,
    "Runtime": _Runtime,
}
