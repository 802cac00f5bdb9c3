"""`ort-cuda`, and what it shares with the providers of `_ort_tensorrt`: ONNX Runtime on the GPU.

A provider that can't be made, or that doesn't take a node, is replaced by the CPU's without an
error: ONNX Runtime warns at most. So each session is asked which provider took which node, and a
node that computes on data anywhere but on the GPU is an error here.

`ort-cuda` was run on an H200 with onnxruntime-gpu 1.31.1; the providers for TensorRT were not.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import onnx

from .. import ops
from .._device import Device
from .._model import ELEMENT_TYPE, Port, inputs_of
from .._model import inlined as without_functions
from ..errors import (
    BackendUnavailableError,
    InvalidInputError,
    SmoothL1DeployError,
    UnsupportedError,
    require,
)
from ..graph._functions import DOMAIN
from ._gpu import GpuBackend, GpuRunner
from ._ort_cpu import SILENT, OrtCpuBackend
from ._runner import Runner

#: Operators whose output holds no number of their input.
_OF_THE_SHAPE = ("Shape", "Size")


def inlined(model: onnx.ModelProto, kept: Iterable[tuple[str, str]] = ()) -> onnx.ModelProto:
    """A copy without local functions but those `kept`, in which every node has its own name."""
    whole = without_functions(model, kept)
    used: set[str] = set()
    for index, node in enumerate(whole.graph.node):
        if not node.name or node.name in used:
            node.name = f"{node.op_type}_{index}_{len(used)}"
        used.add(node.name)
    return whole


def host_nodes(model: onnx.ModelProto) -> frozenset[str]:
    """The names of the nodes that a provider may leave to the CPU.

    They work on shapes and constants alone. ONNX Runtime puts that arithmetic on the CPU on
    purpose, where its numbers are (how many elements a mean divides by); anything else there is a
    silent fall-back.
    """
    data = {value.name for value in inputs_of(model)}
    names = set()
    for node in model.graph.node:  # in topological order
        if node.op_type not in _OF_THE_SHAPE and any(name in data for name in node.input):
            data.update(node.output)
        elif not any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute):
            names.add(node.name)
    return frozenset(names)


class OrtGpuRunner(GpuRunner):
    """One session on a stream of its own; inputs and outputs are bound, nothing is copied."""

    def __init__(
        self, model: onnx.ModelProto, device: Device, ort: Any, session: Any, stream: Any
    ) -> None:
        super().__init__(model, device)
        self._model, self._session, self._stream = model, session, stream
        self._of_nothing: Runner | None = None
        # The caller's stream waits for ours; the host need not.
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def _compute(self, feeds: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        if 0 in shape:
            return self._compute_nothing(feeds, shape)
        binding, device = self._session.io_binding(), self.device
        spare = device.empty((1,), "float32")  # an empty tensor has no address of its own
        outputs = {
            port.name: device.empty(self._shape_of(port, feeds, shape), port.dtype)
            for port in self.signature.outputs
        }
        for role, tensor in feeds.items():
            port = self.signature.inputs[role]
            binding.bind_input(*self._place(port, tensor, spare))
        for port in self.signature.outputs:
            binding.bind_output(*self._place(port, outputs[port.name], spare))

        def work(_: int) -> None:
            self._session.run_with_iobinding(binding, self._run_options)

        try:
            device.launch(self._stream, work)
        except Exception as exc:
            raise InvalidInputError(f"ONNX Runtime refused the inputs: {exc}") from exc
        return outputs

    def _compute_nothing(self, feeds: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """The CPU's answer: CUDA's ReduceSum refuses an axis of length 0 (1.31.1)."""
        if self._of_nothing is None:
            self._of_nothing = OrtCpuBackend().load(self._model)
        arrays = {role: self.device.download(tensor) for role, tensor in feeds.items()}
        outputs = self._of_nothing._execute(arrays, shape)
        return {name: self.device.upload(array) for name, array in outputs.items()}

    def _place(self, port: Port, tensor: Any, spare: Any) -> tuple[Any, ...]:
        """What a binding wants to know of a tensor."""
        address = tensor.data_ptr() or spare.data_ptr()
        element = ELEMENT_TYPE[port.dtype]
        return port.name, self.device.kind, self.device.index, element, tuple(tensor.shape), address

    def _shape_of(
        self, port: Port, feeds: Mapping[str, Any], shape: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The shape of an output: by the spec, or by the names of its axes."""
        if self.spec is not None:
            return tuple(self._output_shape(port, feeds, shape))
        known: dict[Any, int] = {}
        for role, tensor in feeds.items():
            known.update(zip(self.signature.inputs[role].shape or (), tensor.shape, strict=False))
        found = [dim if isinstance(dim, int) else known.get(dim) for dim in port.shape or ()]
        if port.shape is None or None in found:
            raise UnsupportedError(
                f"the model carries no spec and doesn't say the shape of its output {port.name!r}; "
                "name its axes as the inputs' are named, or use the backend ort-cpu"
            )
        return tuple(size for size in found if size is not None)


class OrtGpuBackend(GpuBackend):
    """What the backends share: a provider, how it is asked for, and the graph it gets."""

    provider: str
    extra = "gpu"

    def __init__(self, device: Device | None = None) -> None:
        self._ort = require("onnxruntime", self.extra, f"the {self.name} backend")
        self._check_provider()
        super().__init__(device)

    def _check_provider(self) -> None:
        known = self._ort.get_available_providers()
        if self.provider not in known:
            raise BackendUnavailableError(
                f"the {self.name} backend needs an onnxruntime with the {self.provider}; version "
                f"{self._ort.__version__} here has {', '.join(known)}. Exchange it: pip uninstall "
                f"onnxruntime, then pip install 'smoothl1-deploy[{self.extra}]'"
            )

    def load(self, model: onnx.ModelProto) -> OrtGpuRunner:
        """Open a session in which the provider has every node that computes on data.

        Raises:
            UnsupportedError: when it doesn't take them, or can't load the model.
            BackendUnavailableError: when the provider can't be made on this machine.
        """
        graph, stream = self._graph(model), self._device.new_stream()
        session = self._session(graph, str(int(stream.cuda_stream)))
        version = self._ort.__version__
        if self.provider not in session.get_providers():
            raise BackendUnavailableError(
                f"ONNX Runtime {version} could not make its {self.provider} here and would run on "
                f"{', '.join(session.get_providers())}. It needs a GPU, its driver, and the "
                f"libraries it was built for (CUDA {getattr(self._ort, 'cuda_version', '') or 13}, "
                "cuDNN 9; for TensorRT also libnvinfer 10) where the loader finds them"
            )
        free = host_nodes(graph)
        found = [
            f"{node.name} ({node.op_type}) to {part.ep_name}"
            for part in session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
            if part.ep_name != self.provider and node.name not in free
        ]
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise UnsupportedError(
                f"{self.provider} didn't take the whole graph; ONNX Runtime gave "
                f"{', '.join(found[:5])}{more}, and results of this backend would be those of "
                "another. Use the backend ort-cpu, or export by the route inlined"
            )
        return OrtGpuRunner(model, self._device, self._ort, session, stream)

    def _session(self, graph: onnx.ModelProto, stream: str) -> Any:
        """A session on the stream of that handle."""
        options = self._ort.SessionOptions()
        options.log_severity_level = SILENT
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        settings = {
            "device_id": str(self._device.index),
            "has_user_compute_stream": "1",
            "user_compute_stream": stream,
            **self._settings(graph),
        }
        try:
            return self._open(graph.SerializeToString(), options, settings)
        except SmoothL1DeployError:
            raise
        except Exception as exc:  # pybind raises a class of its own for each status code
            if type(exc) is RuntimeError:  # no status: the provider's own libraries are missing
                raise BackendUnavailableError(
                    f"ONNX Runtime {self._ort.__version__} can't use its {self.provider} here: "
                    f"{exc}"
                ) from exc
            raise UnsupportedError(f"{self.provider} can't load the model: {exc}") from exc

    def _graph(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The model as the provider is to see it."""
        return inlined(model)

    def _settings(self, graph: onnx.ModelProto) -> dict[str, str]:
        """Options of the provider beside device and stream."""
        return {}

    def _open(self, data: bytes, options: Any, settings: dict[str, str]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of, `get_providers` tells
            return self._ort.InferenceSession(
                data, options, providers=[(self.provider, settings)], enable_fallback=0
            )


class OrtCudaBackend(OrtGpuBackend):
    """ONNX Runtime's CUDA provider, with the operators of `ops` where those for CUDA were built.

    What they have no kernel for runs operator by operator.
    """

    name = "ort-cuda"
    provider = "CUDAExecutionProvider"

    def __init__(self, device: Device | None = None) -> None:
        super().__init__(device)
        self._operators = ops.operators("cuda") if ops.is_built("cuda") else frozenset()

    def load_body(self, model: onnx.ModelProto) -> OrtGpuRunner | None:
        """Open a session without the operators, where one with them may run other code."""
        if not self._operators or not model.functions:
            return None
        bare = copy.copy(self)
        bare._operators = frozenset()
        return bare.load(model)

    def _graph(self, model: onnx.ModelProto) -> onnx.ModelProto:
        return inlined(model, ((DOMAIN, name) for name in self._operators))

    def _open(self, data: bytes, options: Any, settings: dict[str, str]) -> Any:
        if self._operators:
            ops.register(options, "cuda")
        return super()._open(data, options, settings)

    def _settings(self, graph: onnx.ModelProto) -> dict[str, str]:
        return {"use_tf32": "0"}
