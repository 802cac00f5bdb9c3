"""How tensors travel: the Open Inference Protocol over HTTP and gRPC, in binary, never in JSON.

The messages are tritonclient's. A request is sent again only where no connection could be made,
so that the server can't have counted it; one whose connection broke later is an error.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from ..errors import (
    ArtefactError,
    InvalidInputError,
    ServerError,
    SmoothL1DeployError,
    SpecError,
    require,
)
from ..floats import Array

__all__ = ["GrpcTransport", "HttpTransport", "Transport", "open_transport"]

_FIRST_WAIT = 0.1  # seconds before the second try; doubled for each further one


class Transport(ABC):
    """A connection to one server; every method may be called from many threads at once.

    Args:
        address: `host:port`, for HTTP with a base path after it if there is one.
        tls: whether to encrypt, and to check the server's certificate.
        timeout: seconds for one answer.
        retries: further tries to connect.

    Attributes:
        retried: tries that were repeated because no connection could be made.
    """

    def __init__(self, address: str, tls: bool, timeout: float, retries: int) -> None:
        self.address, self.tls, self.timeout, self.retries = address, tls, timeout, retries
        self.retried = 0

    @abstractmethod
    def metadata(self, model: str, version: str) -> dict[str, Any]:
        """Inputs and outputs of a model: `name`, `datatype` and `shape` of each."""

    @abstractmethod
    def infer(
        self, model: str, version: str, arrays: Mapping[str, Array], request_id: str = ""
    ) -> dict[str, Array]:
        """Every output of a model; the id goes to the server's logs and traces."""

    @abstractmethod
    def close(self) -> None:
        """Give the connections back."""

    def _wait(self, attempt: int) -> bool:
        """Whether to try once more, after a pause."""
        if attempt >= self.retries:
            return False
        self.retried += 1
        time.sleep(_FIRST_WAIT * 2**attempt)
        return True

    def _unreachable(self, reason: object) -> ServerError:
        return ServerError(
            f"no connection to {self.address} after {self.retries + 1} tries ({reason}); is a "
            "server running there? smoothl1-deploy serve starts one"
        )

    def _late(self) -> ServerError:
        return ServerError(
            f"{self.address} gave no answer within {self.timeout:g} s; it was not asked again, "
            "since it may still be at work. Raise timeout="
        )

    def _senseless(self, reason: object) -> ServerError:
        return ServerError(
            f"{self.address} answered what no Open Inference server does ({reason}); is it the "
            "right address?"
        )

    def _described(self, found: Any) -> dict[str, Any]:
        """Metadata, if they describe inputs and outputs."""
        try:
            for port in (*found["inputs"], *found["outputs"]):
                str(port["name"]), str(port["datatype"]), [int(dim) for dim in port["shape"]]
        except (LookupError, TypeError, ValueError) as exc:
            raise self._senseless(f"metadata without {exc}") from exc
        return dict(found)

    def _lost(self, reason: object) -> ServerError:
        return ServerError(
            f"the connection to {self.address} was lost ({reason}); the request was not "
            "repeated, since the server may have counted it"
        )


def open_transport(url: str, timeout: float, retries: int) -> Transport:
    """The transport of a URL: `http://`, `https://`, `grpc://` or `grpcs://`.

    Raises:
        SpecError: for any other URL, a timeout <= 0, and retries that are no whole number >= 0.
        MissingDependencyError: without tritonclient.
    """
    refusal = SpecError(
        f"{url!r} is no address of a server; write http://HOST:PORT or grpc://HOST:PORT "
        "(https:// or grpcs:// for TLS)"
    )
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https", "grpc", "grpcs") and parts.hostname is not None
        known = known and parts.port != 0
    except ValueError as exc:  # half an IPv6 address, or a port that can't be
        raise refusal from exc
    if not known:
        raise refusal
    if not timeout > 0 or retries < 0 or retries % 1:
        raise SpecError(
            f"timeout={timeout!r} must be > 0 and retries={retries!r} a whole number >= 0"
        )
    if parts.scheme.startswith("http"):
        address = parts.netloc + parts.path.rstrip("/")
        return HttpTransport(address, parts.scheme == "https", timeout, retries)
    return GrpcTransport(parts.netloc, parts.scheme == "grpcs", timeout, retries)


def _inputs(module: Any, arrays: Mapping[str, Array]) -> list[Any]:
    """tritonclient's messages of the arrays."""
    utils = require("tritonclient.utils", "serve", "the client")
    inputs = []
    for name, array in arrays.items():
        tensor = module.InferInput(name, list(array.shape), utils.np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(np.ascontiguousarray(array).reshape(array.shape))
        inputs.append(tensor)
    return inputs


def _server_error(kind: type[SmoothL1DeployError], status: object, text: str) -> Exception:
    return kind(f"the server says ({status}): {text}")


class HttpTransport(Transport):
    """HTTP: tritonclient makes and reads the bodies, urllib3 carries them.

    tritonclient's own HTTP client is bound to one thread and to gevent.
    """

    def __init__(self, address: str, tls: bool, timeout: float, retries: int) -> None:
        super().__init__(address, tls, timeout, retries)
        self._triton = require("tritonclient.http", "serve", "the HTTP client")
        self._error = require("tritonclient.utils", "serve", "the client").InferenceServerException
        self._urllib3 = require("urllib3", "serve", "the HTTP client")
        self._pool = self._urllib3.PoolManager(maxsize=64, retries=False)
        self._root = f"{'https' if tls else 'http'}://{address}/v2"

    def metadata(self, model: str, version: str) -> dict[str, Any]:
        """As `Transport.metadata`."""
        response = self._request("GET", _path(model, version))
        try:
            found = json.loads(response.data)
        except ValueError as exc:
            raise self._senseless(exc) from exc
        return self._described(found)

    def infer(
        self, model: str, version: str, arrays: Mapping[str, Array], request_id: str = ""
    ) -> dict[str, Array]:
        """As `Transport.infer`."""
        client = self._triton.InferenceServerClient
        body, json_size = client.generate_request_body(
            _inputs(self._triton, arrays), request_id=request_id
        )
        headers = {"Content-Type": "application/octet-stream"}
        if json_size is not None:
            headers["Inference-Header-Content-Length"] = str(json_size)
        response = self._request("POST", f"{_path(model, version)}/infer", body, headers)
        size = response.headers.get("Inference-Header-Content-Length")
        try:
            result = client.parse_response_body(
                response.data, header_length=None if size is None else int(size)
            )
            names = [output["name"] for output in result.get_response()["outputs"]]
            return {name: result.as_numpy(name) for name in names}
        except (LookupError, TypeError, ValueError, self._error) as exc:
            raise self._senseless(exc) from exc

    def _request(
        self, method: str, path: str, body: bytes | None = None, headers: Any = None
    ) -> Any:
        errors = self._urllib3.exceptions
        timeout = self._urllib3.Timeout(total=self.timeout)
        attempt = 0
        while True:
            try:
                response = self._pool.request(
                    method, f"{self._root}/{path}", body=body, headers=headers, timeout=timeout
                )
                break
            except (errors.NewConnectionError, errors.ConnectTimeoutError) as exc:
                if not self._wait(attempt):
                    raise self._unreachable(exc) from exc
                attempt += 1
            except errors.ReadTimeoutError as exc:
                raise self._late() from exc
            except errors.HTTPError as exc:
                raise self._lost(exc) from exc
        if response.status != 200:
            kinds = {400: InvalidInputError, 404: ArtefactError}
            raise _server_error(
                kinds.get(response.status, ServerError), response.status, _error_text(response.data)
            )
        return response

    def close(self) -> None:
        """As `Transport.close`."""
        self._pool.clear()


def _path(model: str, version: str) -> str:
    path = f"models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def _error_text(data: bytes) -> str:
    text = data.decode(errors="replace")
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text[:500]


class GrpcTransport(Transport):
    """gRPC, by tritonclient's own client."""

    def __init__(self, address: str, tls: bool, timeout: float, retries: int) -> None:
        super().__init__(address, tls, timeout, retries)
        self._triton = require("tritonclient.grpc", "serve", "the gRPC client")
        self._error = require("tritonclient.utils", "serve", "the client").InferenceServerException
        self._client = self._triton.InferenceServerClient(address, ssl=tls)

    def metadata(self, model: str, version: str) -> dict[str, Any]:
        """As `Transport.metadata`."""
        return self._described(
            self._call(
                self._client.get_model_metadata,
                model,
                version,
                as_json=True,
                client_timeout=self.timeout,
            )
        )

    def infer(
        self, model: str, version: str, arrays: Mapping[str, Array], request_id: str = ""
    ) -> dict[str, Array]:
        """As `Transport.infer`."""
        inputs = _inputs(self._triton, arrays)
        options = {"request_id": request_id, "client_timeout": self.timeout}
        result = self._call(self._client.infer, model, inputs, version, **options)
        names = [output.name for output in result.get_response().outputs]
        return {name: result.as_numpy(name) for name in names}

    def _call(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        attempt = 0
        while True:
            try:
                return method(*args, **kwargs)
            except self._error as exc:
                status = (exc.status() or "").removeprefix("StatusCode.")
                text = exc.message() or ""
                # gRPC says UNAVAILABLE for a lost connection too; these words, for one never made.
                if status == "UNAVAILABLE" and "failed to connect to all addresses" in text:
                    if not self._wait(attempt):
                        raise self._unreachable(text) from exc
                    attempt += 1
                    continue
                if status == "DEADLINE_EXCEEDED":
                    raise self._late() from exc
                kinds = {"INVALID_ARGUMENT": InvalidInputError, "NOT_FOUND": ArtefactError}
                # What the server itself says of a model that isn't loaded is UNAVAILABLE as well.
                if status == "UNAVAILABLE" and "unknown model" not in text.lower():
                    raise self._lost(text) from exc
                raise _server_error(kinds.get(status, ServerError), status, text) from exc

    def close(self) -> None:
        """As `Transport.close`."""
        self._client.close()
