"""A TensorRT made of the attribute names of a real version (api/<version>.json).

Those files list, by class, what the Python bindings of that version have; a name a version lacks
raises AttributeError here too. The behaviour is the little that the adapter relies on, and where
TensorRT misleads the fake does so as well: float64 is narrowed in silence, `create_network`
returns None for the flags of another version, a build without a profile returns None.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
from onnx import TensorProto

API = Path(__file__).with_name("api")
VERSIONS = ("10.0.1", "10.4.0", "10.9.0", "10.16.1", "11.4.0", "rtx-1.7.1")
KNOWN_BAD = "Foo"  # an operator the fake parser doesn't know
_DATA_TYPE = {1: "FLOAT", 10: "HALF", 16: "BF16", 11: "FLOAT", 6: "INT32", 7: "INT64", 9: "BOOL"}


class Member(int):
    """A member of an enumeration, as pybind makes them: a number with a name."""

    name: str


class Enumeration:
    def __init__(self, name: str, members: dict[str, int], touched: set[tuple[str, str]]) -> None:
        self._name, self._touched = name, touched
        self.__members__ = {}
        for key, value in members.items():
            self.__members__[key] = Member(value)
            self.__members__[key].name = key

    def __getattr__(self, key: str) -> Member:
        if key.startswith("__") or key not in self.__members__:
            raise AttributeError(f"type object {self._name!r} has no attribute {key!r}")
        self._touched.add((self._name, key))
        return self.__members__[key]

    def __dir__(self) -> list[str]:
        return list(self.__members__)


def _stub(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("the adapter was not expected to call this")


class FakeTensorRT:
    """A module; `touched` collects the (class, attribute) pairs that were used."""

    def __init__(self, version: str) -> None:
        self.__version__ = version.removeprefix("rtx-")
        self.touched: set[tuple[str, str]] = set()
        self.built = 0
        self.api = json.loads((API / f"{version}.json").read_text())
        for name, content in self.api.items():
            if isinstance(content, dict):
                setattr(self, name, Enumeration(name, content, self.touched))
            else:
                setattr(self, name, self._class(name, content))

    def _class(self, name: str, attributes: list[str]) -> type:
        touched, fake = self.touched, self
        behaviour = vars(BEHAVIOUR.get(name, object))

        def get(obj: Any, attr: str) -> Any:
            if not attr.startswith("_"):
                touched.add((name, attr))
            return object.__getattribute__(obj, attr)

        def put(obj: Any, attr: str, value: Any) -> None:
            if not attr.startswith("_"):
                touched.add((name, attr))
                if attr not in attributes:
                    raise AttributeError(f"{name!r} object has no attribute {attr!r}")
            object.__setattr__(obj, attr, value)

        body = {attr: behaviour.get(attr, _stub) for attr in attributes}
        body |= {k: v for k, v in behaviour.items() if k.startswith("_") and callable(v)}
        body |= {"__getattribute__": get, "__setattr__": put, "_fake": fake}
        return type(name, (), body)


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
        return self._fake.IHostMemory(text.encode())


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
        self._cache: Any = None

    def _monitor(self) -> Any:
        return vars(self).get("progress_monitor")

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self._flags

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self._extras[pool.name] = size

    def set_compute_capability(self, capability: Any, index: int) -> bool:
        self._extras[f"cc{index}"] = capability.name
        return index < self.num_compute_capabilities

    def add_optimization_profile(self, profile: Any) -> int:
        if any(low > high for low, high in profile._bounds):
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, data: bytes) -> Any:
        if data.startswith(b"damaged"):
            return None
        return self._fake.ITimingCache(data)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache is None or b"other GPU" in cache._data:
            say(self._logger, "WARNING", "timing cache of another device")
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        self._cache._data += b"|measured"
        return self._cache


class _TimingCache:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def combine(self, other: Any, ignore_mismatch: bool) -> bool:
        self._data += b"+" + other._data
        return True

    def serialize(self) -> Any:
        return self._fake.IHostMemory(self._data)


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

    def get_engine_validity(self, data: bytes) -> tuple[Any, int]:
        invalid = self._fake.EngineValidity.__members__["INVALID"]
        return invalid, getattr(self._fake, "diagnostics", 0)


BEHAVIOUR: dict[str, type] = {
    "Builder": _Builder,
    "IBuilderConfig": _Config,
    "IHostMemory": _HostMemory,
    "ILogger": _Logger,
    "INetworkDefinition": _Network,
    "IOptimizationProfile": _Profile,
    "IProgressMonitor": _Monitor,
    "ITensor": _Tensor,
    "ITimingCache": _TimingCache,
    "OnnxParser": _Parser,
    "ParserError": _ParserError,
    "Runtime": _Runtime,
}

assert TensorProto.DOUBLE == 11
