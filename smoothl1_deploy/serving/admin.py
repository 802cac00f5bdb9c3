"""The restricted APIs of a running Triton: models loaded, unloaded and described."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import ArtefactError, ServerError, require
from .model_config import CONFIG_FILE, read_config

__all__ = ["ADMIN_HEADER", "Admin"]

#: The HTTP header that opens the restricted APIs; over gRPC `triton-grpc-protocol-` goes before it.
ADMIN_HEADER = "admin-key"

_LOAD_SECONDS = 120.0


class Admin:
    """Asks one server, over HTTP.

    Args:
        http: a pool of connections of urllib3.
        address: of the server, as `host:port`.
        key: what opens the restricted APIs.
        repository: the folder of its models.
    """

    def __init__(self, http: Any, address: str, key: str, repository: Path) -> None:
        self._http = http
        self._address = address
        self._key = key
        self._repository = repository

    def is_live(self) -> bool:
        """Whether the server says that it lives.

        Raises:
            ServerError: when it doesn't answer.
        """
        return self._ask("GET", "health/live", timeout=1.0)[0] == 200

    def _ask(self, method: str, path: str, timeout: float, body: Any = None) -> tuple[int, Any]:
        import urllib3

        try:
            response = self._http.request(
                method,
                f"http://{self._address}/v2/{path}",
                json=body if method == "POST" else None,
                headers={ADMIN_HEADER: self._key},
                timeout=timeout,
            )
            data = response.json() if response.data else {}
        except (urllib3.exceptions.HTTPError, ValueError) as exc:
            raise ServerError(f"the Triton server does not answer ({exc})") from exc
        return response.status, data

    def load(self, model: str, version: str = "") -> None:
        """Load a model, or load it anew; the old one serves until the new one can.

        Args:
            model: its name.
            version: the one to serve; empty for what its config says, as a rule the newest.

        Raises:
            ArtefactError: when the server refuses it, with the server's reason.
            ServerError: when the server doesn't answer.
        """
        self._manage(model, "load", self._pinned(model, version) if version else {})

    def _pinned(self, model: str, version: str) -> dict[str, Any]:
        """A load request that overrides the version policy; it takes a whole config."""
        json_format = require("google.protobuf.json_format", "serve", "serving")
        config = read_config((self._repository / model / CONFIG_FILE).read_bytes())
        config.ClearField("version_policy")
        config.version_policy.specific.versions.append(int(version))
        text = json_format.MessageToJson(config, preserving_proto_field_name=True, indent=None)
        return {"parameters": {"config": text}}

    def unload(self, model: str) -> None:
        """Take a model out of service; nothing is said of one that was not in it.

        Raises:
            ServerError: when the server doesn't answer.
        """
        self._manage(model, "unload", {})

    def _manage(self, model: str, verb: str, body: dict[str, Any]) -> None:
        path = f"repository/models/{quote(model, safe='')}/{verb}"
        status, answer = self._ask("POST", path, _LOAD_SECONDS, body)
        if status != 200:
            raise ArtefactError(
                f"the Triton server can't {verb} the model {model!r}: {_reason(answer, status)}"
            )

    def metadata(self, model: str) -> dict[str, Any]:
        """Name, versions, inputs and outputs of a loaded model, as the server tells them.

        Raises:
            ServerError: when it is not loaded, or the server doesn't answer.
        """
        status, answer = self._ask("GET", f"models/{quote(model, safe='')}", 10.0)
        if status != 200:
            raise ServerError(f"the model {model!r} is not served: {_reason(answer, status)}")
        return dict(answer)


def _reason(answer: Any, status: int) -> str:
    """The server's text in one line, without the call stack of the Python backend."""
    text = str(answer.get("error", f"status {status}")).partition("\n\nAt:\n")[0]
    return " ".join(text.split())
