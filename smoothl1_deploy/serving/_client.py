"""`Client`: ask a Triton server for a loss, over HTTP or gRPC."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

from .._artefact import NUMBERS, ROLES
from .._dlpack import as_array
from .._floats import Array
from .._model import Port
from .._spec import ELEMENTS
from ..backends._runner import as_number, promote
from ..backends._whole import checked
from ..errors import ArtefactError, InvalidInputError
from ._transport import Declared, open_transport

#: A data type of the Open Inference Protocol -> dtype name.
_DTYPES = {"FP16": "float16", "BF16": "bfloat16", "FP32": "float32", "FP64": "float64"}


class Client(AbstractContextManager["Client"]):
    """A client of one served model; it may be used from many threads at once.

    Args:
        url: `http://HOST:PORT` or `grpc://HOST:PORT`; `https://` and `grpcs://` with TLS.
        model: the name of the model.
        version: the version of the model; empty for the one that the server takes.
        timeout: seconds for one whole answer, with the tries to connect. The first call asks for
            the metadata too, and so for two answers.
        retries: how many further tries there are where no connection can be made. A request that
            was sent is never repeated, because the server may have counted it.

    Raises:
        SpecError: on a URL or number that makes no sense.
        MissingDependencyError: without tritonclient.

    Example:
        with Client("http://127.0.0.1:8000", "mean") as client:
            input, target = np.full((4, 16), 3.0, "f4"), np.zeros((4, 16), "f4")
            assert client.loss(input, target) == 2.5  # rank 0, as PyTorch gives it
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        version: str = "",
        timeout: float = 10.0,
        retries: int = 3,
    ) -> None:
        self.model, self.version = model, str(version)
        self._url = url
        self._transport = open_transport(url, timeout, retries)
        self._known: dict[str, Any] | None = None

    def __repr__(self) -> str:
        version = f", version {self.version}" if self.version else ""
        return f"<Client of {self.model}{version} at {re.sub('//[^/]*@', '//', self._url)}>"

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def retried(self) -> int:
        """How many times the client tried again to connect."""
        return self._transport.retried

    def metadata(self) -> dict[str, Any]:
        """What the server says of the model: `inputs` and `outputs`, each with name and shape.

        The server is asked once.

        Raises:
            ArtefactError: when the server has no such model.
            ServerError: when there is no answer.
        """
        if self._known is None:
            self._known = self._transport.metadata(self.model, self.version)
        return self._known

    @property
    def inputs(self) -> dict[str, Port]:
        """What the model takes, by name.

        Raises:
            ArtefactError: for an input of anything but numbers, and as `metadata`.
            ServerError: when there is no answer.
        """
        ports = {}
        for port in self.metadata()["inputs"]:
            name, kind = port["name"], port["datatype"]
            if kind == "BYTES":
                raise ArtefactError(
                    f"the model {self.model!r} takes {name} as BYTES, and only tensors of numbers "
                    "can be given here; ask it with infer()"
                )
            axes = tuple(None if dim < 0 else dim for dim in port["shape"])
            ports[name] = Port(name, self._transport.dtype(kind).name, axes)
        return ports

    @property
    def is_loss(self) -> bool:
        """Whether the model takes what a loss takes, and nothing else.

        Raises:
            ArtefactError, ServerError: as `metadata`.
        """
        return {"input", "target"} <= {*self._kinds()} <= {*ROLES}

    @property
    def dtype(self) -> str:
        """The dtype of a loss's input, such as `"bfloat16"`.

        Raises:
            ArtefactError: for a model that is no loss, and as `metadata`.
            ServerError: when there is no answer.
        """
        kinds = self._kinds()
        if not self.is_loss:
            raise ArtefactError(
                f"the model {self.model!r} takes {', '.join(kinds)}; a loss takes input and target"
            )
        kind = kinds["input"]
        if kind not in _DTYPES:
            raise ArtefactError(
                f"the model {self.model!r} takes {kind}, which is no number format of a loss"
            )
        return _DTYPES[kind]

    def loss(self, input: Any, target: Any, *, weight: Any = None, beta: Any = None) -> Array:
        """The loss of `input` and `target`, as `run` gives it; the arguments are `run`'s."""
        outputs = self.run(input, target, weight=weight, beta=beta)
        return outputs["loss"] if "loss" in outputs else next(iter(outputs.values()))

    def run(self, input: Any = None, target: Any = None, **arrays: Any) -> dict[str, Array]:
        """Every output of a model: of a loss, or of a whole one by the names of its inputs.

            client.run(images=images, boxes_gt=boxes)["loss"]

        Args:
            input: of a loss, a numpy array or anything with `__dlpack__`, of the model's dtype or
                of one that promotes to it.
            target: likewise, in the same shape.
            arrays: of a loss `weight` and `mask`, and the numbers `beta` (or an array of them) and
                `divisor`, where it takes them. Of any other model an array for each input, by its
                name, of the input's dtype and a shape that fits.

        Returns:
            Name -> array. A loss that the server gives as [1] has rank 0 here; scores of rows,
            which it gives as [N, 1], have the shape [N], unless the input is [N, 1] too. What a
            whole model gives has the shapes of the server.

        Raises:
            InvalidInputError: for arrays that don't fit; where the server refused them, the message
                has its words.
            ArtefactError: when the server has no such model, or it takes something else.
            ServerError: when there is no answer, or the model failed.
        """
        given = {"input": input, "target": target, **arrays}
        given = {name: value for name, value in given.items() if value is not None}
        if not self.is_loss:
            return self.infer(checked(self.inputs, given))
        self._check_given(given)
        numbers = {}
        for port in self.metadata()["inputs"]:
            if (name := port["name"]) in NUMBERS:  # a server has a number as [1]
                shape = tuple(port["shape"])
                kind = _DTYPES.get(port["datatype"], "float32")
                number = as_number(given.pop(name), name, kind, shape if shape != (1,) else ())
                numbers[name] = number.reshape(shape)
        feeds = promote({name: as_array(value, name) for name, value in given.items()}, self.dtype)
        feeds |= numbers
        outputs = self._transport.infer(
            self.model, self.version, feeds, declared=self._declared(feeds["target"].shape)
        )
        return {name: self._narrowed(name, array) for name, array in outputs.items()}

    def infer(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Send arrays as they are, by the names of the model's inputs; every output comes back.

        Raises:
            InvalidInputError, ArtefactError, ServerError: as `run`.
        """
        arrays = {name: as_array(array, name) for name, array in arrays.items()}
        declared = self._declared()
        return self._transport.infer(self.model, self.version, arrays, declared=declared)

    def close(self) -> None:
        """Give the connections back."""
        self._transport.close()

    def _kinds(self) -> dict[str, str]:
        """Name -> data type of each input."""
        return {port["name"]: port["datatype"] for port in self.metadata()["inputs"]}

    def _declared(self, target: tuple[int, ...] | None = None) -> dict[str, Declared]:
        """Name -> data type and shape of each output, where an axis of -1 can have any length.

        Args:
            target: the shape of a loss's target, which the loss and its gradient share; None for
                outputs of another kind.
        """
        declared = {}
        for port in self.metadata()["outputs"]:
            name, kind, dims = port["name"], port["datatype"], port["shape"]
            of_loss = target is not None and name in ("loss", "grad_input", *ELEMENTS)
            if kind not in _DTYPES if of_loss else target is not None and kind == "BYTES":
                raise ArtefactError(
                    f"the model {self.model!r} gives {name} as {kind}, which is no number format "
                    "of a loss; ask it with infer()"
                )
            if of_loss:
                lengths = itertools.zip_longest(dims, (target or ())[: len(dims)], fillvalue=-1)
                dims = [length if dim == -1 else dim for dim, length in lengths]
            declared[name] = kind, dims
        return declared

    def _check_given(self, given: Collection[str]) -> None:
        ports = self._kinds()
        takes = ", ".join(ports)
        for name in ports:
            if name not in given:
                raise InvalidInputError(f"{name} is missing; the model takes {takes}")
        for name in given:
            if name not in ports:
                raise InvalidInputError(f"the model takes {takes}, and no {name}; leave it out")

    def _narrowed(self, name: str, array: Array) -> Array:
        """An output without the axis that a server needs and a loss doesn't have."""
        known = self.metadata()
        declared = {port["name"]: port["shape"] for port in (*known["inputs"], *known["outputs"])}
        if name != "loss" or declared[name] == declared["input"]:
            return array
        if declared[name] == [1]:
            return array.reshape(())
        return array.reshape(len(array)) if declared[name][1:] == [1] else array
