"""`GpuRunner`: what the backends of a CUDA device share.

numpy arrays in give numpy arrays out, copied both ways. CUDA tensors in (torch's, or anything with
`__dlpack__` on the device) give torch CUDA tensors out: inputs are read where they lie, outputs are
written where they stay, and nothing waits for the GPU. Work is ordered by torch's current stream.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import onnx

from .._device import Captured, Device, find_device, is_on_device
from .._floats import Array
from ..errors import InvalidInputError, UnsupportedError
from ._base import Backend
from ._runner import Runner, by_role

#: Computes a tensor for each output, from tensors by role and the shape they broadcast to.
Compute = Callable[[dict[str, Any], tuple[int, ...]], dict[str, Any]]


class GpuRunner(Runner):
    """A loaded artefact on a CUDA device; `run` answers tensors of it with torch tensors of it.

    Tensors that are not contiguous, or of a dtype that is promoted, are copied on the device. An
    answer is ready in the order of torch's current stream. Arrays of which some are on the device
    and others are not are refused.

    Attributes:
        device: where it runs.
    """

    def __init__(self, model: onnx.ModelProto, device: Device) -> None:
        super().__init__(model)
        self.device = device
        self._good_pair: tuple[Any, Any] | None = None  # shape and dtype of the last it took as is

    def _at_once(self, input: Any, target: Any) -> dict[str, Any] | None:
        # A small loss takes the GPU a few microseconds, and PyTorch a few more to launch.
        good, as_it_is = self._good_pair, self.device.as_it_is
        if good is not None and as_it_is(input) == good == as_it_is(target):
            return self._compute({"input": input, "target": target}, good[0])
        return super()._at_once(input, target)

    def _checked(self, given: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
        if not any(map(is_on_device, given.values())):
            return super()._checked(given, numbers)
        feeds, shape = self._adopted(given, numbers)
        as_it_is = self.device.as_it_is(given["input"])
        if self._takes_a_pair and as_it_is == self.device.as_it_is(given["target"]):
            self._good_pair = as_it_is
        return self._of_the_spec(self._compute(feeds, shape), shape)

    def capture(
        self,
        input: Any,
        target: Any,
        *,
        weight: Any = None,
        mask: Any = None,
        beta: Any = None,
        divisor: float | None = None,
        grad_output: Any = None,
    ) -> Captured[dict[str, Any]]:
        """Record the loss of these very tensors in a CUDA graph.

        Write new numbers into the tensors and call `replay()`: the tensors in `result` then hold
        their loss. What is left of the call is one launch.

        Args:
            input: a contiguous tensor of the device, of the artefact's dtype.
            target: another such tensor.
            weight: a third, where the artefact takes one.
            mask: a boolean tensor, likewise.
            beta: a number or an array on the CPU, recorded as it is.
            divisor: another.
            grad_output: a tensor like the others, where the artefact takes one.

        Raises:
            InvalidInputError: for anything else than such tensors: a graph would keep reading the
                copy made of them.
            UnsupportedError: where the backend can't record.
        """
        given, numbers = by_role(input, target, weight, mask, beta, divisor, grad_output)
        feeds, shape = self._adopted(given, numbers)
        for name, value in given.items():
            same = getattr(value, "data_ptr", lambda: None)() == feeds[name].data_ptr()
            if not same or not is_on_device(value):
                raise InvalidInputError(
                    f"{name} would be copied, and the graph go on reading the copy; give a "
                    f"contiguous torch tensor of {self.signature.input.dtype} on the GPU"
                )
        compute = self._recordable()
        return self.device.capture(lambda: self._of_the_spec(compute(feeds, shape), shape))

    def _adopted(
        self, given: dict[str, Any], numbers: dict[str, Any]
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        """Checked tensors by role, in the artefact's dtype, and the shape they broadcast to."""
        tensors = {}
        for name, value in given.items():
            if not is_on_device(value):
                raise InvalidInputError(
                    f"{name} is not on the GPU, and another of the arrays is; give all of them as "
                    "CUDA tensors, or all as numpy arrays"
                )
            tensors[name] = self.device.adopt(value, name)
        shape = self._checked_shape(tensors, numbers)
        dtype = self.signature.input.dtype
        feeds = {
            name: self.device.convert(x, "bool" if name == "mask" else dtype)
            for name, x in tensors.items()
        }
        for name, value in numbers.items():
            number = self._number(name, value)
            if number.size == 1:  # which is made there, and not copied
                filled = self.device.filled(float(number.item()), number.dtype.name)
                feeds[name] = filled.reshape(number.shape)
            else:
                feeds[name] = self.device.upload(number)
        return feeds, shape

    def _execute(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        tensors = {role: self.device.upload(array) for role, array in feeds.items()}
        outputs = self._compute(tensors, shape)
        return {name: self.device.download(tensor) for name, tensor in outputs.items()}

    @abstractmethod
    def _compute(self, feeds: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """Launch the work on checked, contiguous tensors of the device; see `Runner._execute`."""

    def _recordable(self) -> Compute:
        """A computation that a CUDA graph may record and keep for itself."""
        raise UnsupportedError(
            f"{type(self).__name__} can't be recorded in a CUDA graph; use the backend trt"
        )


class GpuBackend(Backend):
    """A backend that lives on a CUDA device.

    Raises:
        MissingDependencyError: when torch is not installed.
        BackendUnavailableError: when torch has no CUDA, or finds no GPU.
    """

    def __init__(self, device: Device | None = None) -> None:
        self._device = device if device is not None else find_device(f"the {self.name} backend")
