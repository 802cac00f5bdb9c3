"""Targets on serving: names in a repository that reach Triton, and bodies that reach a server."""

from __future__ import annotations

import atexit
import functools
import http.client
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from smoothl1_deploy import LossSpec
from smoothl1_deploy.serving import Client
from smoothl1_deploy.serving._private import Mirror, models_of
from smoothl1_deploy.serving._repository import write_loss
from smoothl1_deploy.serving._server import Server

from .damage import BYTE_EDITS, damage_bytes
from .target import Target
from .values import JSON, NAMES, mostly

#: None leads out of the folder it is made in.
_ODD = st.text("$(`)&;|<>'\"\\\n *?~#!{}[]a1-_é", min_size=1, max_size=12)
_PLAIN = st.text("az_-.,:=@%+1", min_size=1, max_size=12).map(lambda text: f"a{text}")


def _mirror(case: tuple[str, str, str], folder: Path) -> None:
    above, name, instance = case
    root = folder / above / name
    (root / "1").mkdir(parents=True)
    (root / "config.pbtxt").write_text(f"instance_group {{ name: {json.dumps(instance)} }}")
    models, _ = models_of(root.parent)
    (folder / "private").mkdir()
    mirror = Mirror(root.parent, folder / "private" / "models", models)
    for model in models:
        shown = f"{mirror.folder}/{model}/1 {instance}"
        echoed = subprocess.run(
            ["sh", "-c", f"printf '%s ' {shown}"], capture_output=True, check=True, cwd=folder
        )
        assert echoed.stdout.decode().rstrip() == shown.rstrip()
        assert (mirror.folder / model / "1").resolve() == (root / "1").resolve()


@functools.cache
def _server() -> Server:
    """One for all the cases of a process; it ends with it, however that ends."""
    repository = tempfile.mkdtemp(prefix="repository-")
    write_loss(repository, LossSpec(), name="mean")
    server = Server(repository, private=True)
    server.start()
    atexit.register(server.stop, at_once=True)
    server.load("mean")
    return server


_REQUEST = json.dumps(
    {
        "inputs": [
            {"name": name, "shape": [1, 16], "datatype": "FP32", "data": [number] * 16}
            for name, number in (("input", 1), ("target", 0))
        ]
    }
).encode()


@st.composite
def _bodies(draw: st.DrawFn) -> tuple[bytes, dict[str, str]]:
    kind = draw(st.integers(0, 3))
    if kind == 0:
        body = json.dumps({"inputs": draw(JSON)}, default=str).encode("utf-8", "replace")
    elif kind == 1:
        body = b"[" * draw(st.sampled_from([1, 1000, 10_000])) + _REQUEST
    else:
        body = damage_bytes(_REQUEST, draw(BYTE_EDITS))
    sizes = st.sampled_from(["0", "-1", "x", "99999999999999999999", str(len(body))])
    names = ("Inference-Header-Content-Length", "Content-Encoding")
    return body, draw(st.dictionaries(st.sampled_from(names), sizes | st.just("gzip"), max_size=2))


def _body(case: tuple[bytes, dict[str, str]], folder: Path) -> Any:
    server, (body, headers) = _server(), case
    connection = http.client.HTTPConnection(server.addresses.http, timeout=30)
    try:
        connection.request("POST", "/v2/models/mean/infer", body, headers)
        connection.getresponse().read()
    except http.client.HTTPException:
        pass  # it may hang up
    finally:
        connection.close()
    with Client(server.addresses.to_dict()["http"], "mean", timeout=30) as client:
        assert client.loss(np.ones((1, 16), "f4"), np.zeros((1, 16), "f4")) == 0.5
    assert server.exit_code is None


_MIRRORED = st.tuples(_ODD, mostly(_PLAIN, _ODD), mostly(_PLAIN, NAMES))
TARGETS = [
    Target("mirror", _MIRRORED, _mirror, share=5),
    Target("body", _bodies(), _body, share=5),
]
