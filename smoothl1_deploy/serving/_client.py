"""`Client`: ask a Triton server for a loss, over HTTP or gRPC."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from .._artefact import ROLES
from .._dlpack import as_array
from .._floats import Array
from ..backends._runner import as_beta, promote
from ..errors import ArtefactError, InvalidInputError
from ._transport import Declared, open_transport

#: A data type of the Open Inference Protocol -> dtype name.
_DTYPES = {"FP16": "float16", "BF16": "bfloat16", "FP32": "float32", "FP64": "float64"}


class Client:
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

    def __enter__(self) -> Client:
        return self

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
    def dtype(self) -> str:
        """The dtype of the model's input, such as `"bfloat16"`.

        Raises:
            ArtefactError: for a model that takes no `input` and `target`, and as `metadata`.
            ServerError: when there is no answer.
        """
        kind = self._inputs()["input"]
        if kind not in _DTYPES:
            raise ArtefactError(
                f"the model {self.model!r} takes {kind}, which is no number format of a loss"
            )
        return _DTYPES[kind]

    def loss(
        self, input: Any, target: Any, *, weight: Any = None, beta: float | None = None
    ) -> Array:
        """The loss of `input` and `target`, as `run` gives it; the arguments are `run`'s."""
        outputs = self.run(input, target, weight=weight, beta=beta)
        return outputs["loss"] if "loss" in outputs else next(iter(outputs.values()))

    def run(
        self, input: Any, target: Any, *, weight: Any = None, beta: float | None = None
    ) -> dict[str, Array]:
        """Every output of a model that takes `input` and `target`.

        Args:
            input: a numpy array or anything with `__dlpack__`, of the model's dtype or of one
                that promotes to it.
            target: likewise, in the same shape.
            weight: likewise, where the model takes a weight.
            beta: a number, where the model takes a beta.

        Returns:
            Name -> array of the model's dtype. A loss that the server gives as [1] has rank 0
            here; scores of rows, which it gives as [N, 1], have the shape [N], unless the input is
            [N, 1] too.

        Raises:
            InvalidInputError: for arrays that don't fit; where the server refused them, the message
                has its words.
            ArtefactError: when the server has no such model, or it takes something else.
            ServerError: when there is no answer, or the model failed.
        """
        given = {"input": input, "target": target, "weight": weight, "beta": beta}
        self._check_given(given)
        arrays = {
            name: as_array(value, name)
            for name, value in given.items()
            if value is not None and name != "beta"
        }
        feeds = promote(arrays, self.dtype)
        if beta is not None:
            feeds["beta"] = as_beta(beta).reshape(1)
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

    def _inputs(self) -> dict[str, str]:
        """Name -> data type of the inputs of a model that takes what a loss takes."""
        inputs = {port["name"]: port["datatype"] for port in self.metadata()["inputs"]}
        if not {"input", "target"} <= set(inputs) <= set(ROLES):
            raise ArtefactError(
                f"the model {self.model!r} takes {', '.join(inputs)}; a loss takes input and "
                "target. Send the arrays by these names, with infer()"
            )
        return inputs

    def _declared(self, target: tuple[int, ...] | None = None) -> dict[str, Declared]:
        """Name -> data type and shape of each output, where an axis of -1 can have any length.

        Args:
            target: the shape of a loss's target, which the loss and its gradient share; None for
                outputs of another kind.
        """
        declared = {}
        for port in self.metadata()["outputs"]:
            name, kind, dims = port["name"], port["datatype"], port["shape"]
            of_loss = target is not None and name in ("loss", "grad_input")
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

    def _check_given(self, given: Mapping[str, Any]) -> None:
        ports = self._inputs()
        for name, value in given.items():
            if value is None and name in ports:
                raise InvalidInputError(f"{name} is missing; the model takes {', '.join(ports)}")
            if value is not None and name not in ports:
                raise InvalidInputError(
                    f"the model takes {', '.join(ports)}, and no {name}; leave it out"
                )

    def _narrowed(self, name: str, array: Array) -> Array:
        """An output without the axis that a server needs and a loss doesn't have."""
        known = self.metadata()
        declared = {port["name"]: port["shape"] for port in (*known["inputs"], *known["outputs"])}
        if name != "loss" or declared[name] == declared["input"]:
            return array
        if declared[name] == [1]:
            return array.reshape(())
        return array.reshape(len(array)) if declared[name][1:] == [1] else array
