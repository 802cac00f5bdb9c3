"""`trt-network`: the network that TensorRT's ONNX parser makes of a model, evaluated in numpy.

The network is checked, the GPU's kernels are not; `smoothl1_deploy.tensorrt._network` says what
that leaves out. It runs on any machine, with no GPU.
"""

from __future__ import annotations

import onnx

from .._floats import Array
from ..tensorrt._flavour import Flavour, get_flavour
from ..tensorrt._network import plan
from ..tensorrt._parse import parse
from ._base import OfTensorrt
from ._runner import Runner
from ._whole import Session


class TrtNetworkRunner(Runner):
    """One parsed network; `run` may be called from many threads at once.

    Attributes:
        parsed: the network and what must outlive it; `parsed.notes` says what was narrowed.
    """

    def __init__(self, model: onnx.ModelProto, flavour: Flavour, clip_drops_nan: bool) -> None:
        super().__init__(model)
        self.parsed = parse(model, flavour)
        self._plan = plan(self.parsed, clip_drops_nan=clip_drops_nan)

    def _execute(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        return self._plan.run(self._named(feeds))


class TrtNetworkBackend(OfTensorrt):
    """TensorRT's parser on the CPU, which needs a fixed rank; `threads` changes nothing here.

    Args:
        flavour: `"tensorrt"`, `"tensorrt_rtx"`, or `"auto"` for the first that can be used.
        clip_drops_nan: whether Clip swallows NaN, as TensorRT's kernels may; see `plan`.

    Raises:
        MissingDependencyError: when the flavour is not installed.
        BackendUnavailableError: when it is installed and can't be used on this machine.
    """

    name = "trt-network"
    large = False

    def __init__(self, flavour: str | Flavour = "auto", clip_drops_nan: bool = True) -> None:
        self._flavour = get_flavour(flavour)
        self._clip_drops_nan = clip_drops_nan

    def load(self, model: onnx.ModelProto) -> TrtNetworkRunner:
        """Parse `model` and read the network.

        Raises:
            UnsupportedError: for float64, an unknown rank, and layers the evaluator doesn't know.
            BuildError: when TensorRT's parser refuses the model.
        """
        return TrtNetworkRunner(model, self._flavour, self._clip_drops_nan)

    def open(self, model: onnx.ModelProto) -> Session:
        """Parse the whole of `model` and read the network."""
        return plan(parse(model, self._flavour), clip_drops_nan=self._clip_drops_nan).run
