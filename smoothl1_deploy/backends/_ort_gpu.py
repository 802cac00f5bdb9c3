"""`ort-cuda`, and what it shares with the providers of `_ort_tensorrt`: ONNX Runtime on the GPU.

A provider that can't be made, or that doesn't take a node, is replaced by the CPU's without an
error: ONNX Runtime warns at most. So each session is asked which provider took which node, and a
node that computes on data anywhere but on the GPU is an error here.

`ort-cuda` was run on an H200 with onnxruntime-gpu 1.31.1; the providers for TensorRT were not.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
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
    copy = without_functions(model, kept)
    used: set[str] = set()
    for index, node in enumerate(copy.graph.node):
        if not node.name or node.name in used:
            node.name = f"{node.op_type}_{index}_{len(used)}"
        used.add(node.name)
    return copy


def host_nodes(model: onnx.ModelProto) -> frozenset[str]:
    """The names of the nodes that work on shapes and constants alone."""
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
        self,
        model: onnx.ModelProto,
        device: Device,
        ort: Any,
        provider: str,
        open_session: Callable[[Any, str], Any],
        graph: onnx.ModelProto,
    ) -> None:
        """Args: `open_session` makes a session from options and the handle of a stream."""
        super().__init__(model, device)
        self._model = model
        self._of_nothing: Runner | None = None
        self._ort = ort
        self._stream = device.new_stream()
        options = ort.SessionOptions()
        options.log_severity_level = SILENT
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            self._session = open_session(options, str(int(self._stream.cuda_stream)))
        except SmoothL1DeployError:
            raise
        except Exception as exc:  # pybind raises a class of its own for each status code
            if type(exc) is RuntimeError:  # no status: the provider's own libraries are missing
                raise BackendUnavailableError(
                    f"ONNX Runtime {ort.__version__} can't use its {provider} here: {exc}"
                ) from exc
            raise UnsupportedError(f"{provider} can't load the model: {exc}") from exc
        if provider not in self._session.get_providers():
            raise BackendUnavailableError(
                f"ONNX Runtime {ort.__version__} could not make its {provider} here and would run "
                f"on {', '.join(self._session.get_providers())}. It needs a GPU, its driver, and "
                f"the libraries it was built for (CUDA {getattr(ort, 'cuda_version', '') or 13}, "
                "cuDNN 9; for TensorRT also libnvinfer 10) where the loader finds them"
            )
        self._check_assignment(graph, provider)
        # The caller's stream waits for ours; the host need not.
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def _check_assignment(self, graph: onnx.ModelProto, provider: str) -> None:
        """Refuse a session whose provider didn't take every node that computes on data.

        Raises:
            UnsupportedError: names the nodes, their operators and who has them.
        """
        free = host_nodes(graph)
        found = [
            f"{node.name} ({node.op_type}) to {part.ep_name}"
            for part in self._session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
            if part.ep_name != provider and node.name not in free
        ]
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise UnsupportedError(
                f"{provider} didn't take the whole graph; ONNX Runtime gave "
                f"{', '.join(found[:5])}{more}, and results of this backend would be those of "
                "another. Use the backend ort-cpu, or export by the route inlined"
            )

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
                "name its axes as the inputs' are named, or use backend='ort-cpu'"
            )
        return tuple(size for size in found if size is not None)


class OrtGpuBackend(GpuBackend):
    """What the three share: a provider, how it is asked for, and the graph it gets."""

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
        graph = self._graph(model)
        settings = self._settings(graph)

        def open_session(options: Any, stream: str) -> Any:
            chosen = {
                "device_id": str(self._device.index),
                "has_user_compute_stream": "1",
                "user_compute_stream": stream,
                **settings,
            }
            return self._open(graph.SerializeToString(), options, chosen)

        return OrtGpuRunner(model, self._device, self._ort, self.provider, open_session, graph)

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
