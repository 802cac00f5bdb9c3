"""Certificates: what a verification found, beside the artefact it was found of.

A certificate is strict JSON in `<artefact>.certificate.json`. It names the artefact by the sha256
of its file, so that a changed file is seen, and carries a hash of its own content, so that an edit
by hand is seen. It is no signature: whoever can write the files can write a new certificate.
Weights in other files, where torch.onnx.export leaves those of a model, are named by theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx

from .. import __version__
from .._artefact import read_model, sha256
from .._certainty import Certainty
from .._files import read_file, write_atomic
from .._model import external_locations
from .._records import plain
from ..errors import ArtefactError, reason_of
from ._verify import Verification
from ._whole import ModelVerification

FORMAT = 1  # raised when a reader would have to change
_SUFFIX = ".certificate.json"
_WORST = 5  # cases given in full

State = Literal["absent", "matches", "stale", "red", "damaged"]


def certificate_path(artefact: str | os.PathLike[str]) -> Path:
    """`loss.onnx` -> `loss.onnx.certificate.json`, in the same folder."""
    path = Path(artefact)
    return path.with_name(path.name + _SUFFIX)


def _content_hash(content: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in content.items() if key != "content_sha256"}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _file_bytes(path: Path) -> bytes:
    try:
        return read_file(path)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise ArtefactError(
            f"can't read the artefact {path}: {reason_of(exc)}; give the path of its file"
        ) from exc


def _check_is_the_verified(
    path: Path, data: bytes, verification: Verification | ModelVerification
) -> list[str]:
    """The files of its weights. The artefact may have changed since, or be another one."""
    if sha256(data) == verification.sha256:  # an engine, or a model that was verified as a file
        return []
    try:
        shallow = onnx.load_model_from_string(data)
    except Exception as exc:  # protobuf has many
        raise ArtefactError(f"{path} can't be read as an ONNX model: {exc}") from exc
    weights = external_locations(shallow)
    read = read_model(path if weights else data)
    if sha256(read.SerializeToString(deterministic=True)) != verification.sha256:
        raise ArtefactError(
            f"{path} is not the model that was verified ({verification.name}); it changed since, "
            "or is another file: verify it, then certify"
        )
    return weights


def _sha256_of(path: Path) -> str | None:
    """Of a file of any size; None where there is none that can be read."""
    # Neither of a pipe, which would wait for a writer, nor of a device.
    with contextlib.suppress(OSError):
        if path.is_file():
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return None


def _content(
    verification: Verification | ModelVerification,
    artefact: Path,
    data: bytes,
    weights: Sequence[str],
) -> dict[str, Any]:
    losses = verification.losses
    results = [r for loss in losses.values() for r in loss.every_result]
    worst = sorted(results, key=lambda result: result.verdict.badness, reverse=True)
    content: dict[str, Any] = {
        "format": FORMAT,
        "verdict": "green" if verification else "red",
        "certainty": Certainty.SAMPLES,
        "artefact": {"file": artefact.name, "sha256": sha256(data), "bytes": len(data)},
        "graph": verification.name,
        "families": list(dict.fromkeys(r.case.family for r in results)),
        "seeds": sorted({loss.seed for loss in losses.values()}),
        "cases": len(results),
        "red_cases": sum(len(loss.failures) for loss in losses.values()),
        "worst": [result.to_dict() for result in worst[:_WORST]],
        "backend": verification.backend,
        "environment": plain(verification.environment),
        "tool": {"name": "smoothl1-deploy", "version": __version__},
        "date": verification.date,
    }
    if weights:
        hashes = {name: _sha256_of(artefact.parent / name) for name in weights}
        content["artefact"]["weights"] = hashes
    if isinstance(verification, ModelVerification):
        content["losses"] = {
            name: {"spec": loss.spec.to_dict(), "verdict": "green" if loss else "red"}
            for name, loss in losses.items()
        }
        content["runs"] = plain(verification.runs)
    if len(losses) == 1:
        (found,) = (loss.to_dict() for loss in losses.values())
        content |= {key: found[key] for key in ("spec", "drift", "diagnoses")}
    return content


def certify(verification: Verification | ModelVerification, path: str | os.PathLike[str]) -> Path:
    """Write the certificate of the artefact at `path`, green or red as the verification is.

    Args:
        verification: what `verify` gave for this very file.
        path: of the artefact, an existing file.

    Returns:
        The path of the certificate.

    Raises:
        ArtefactError: when the file can't be read or is not what was verified.
        OutputError: when the certificate can't be written.
    """
    artefact = Path(path)
    data = _file_bytes(artefact)
    weights = _check_is_the_verified(artefact, data, verification)
    content = _content(verification, artefact, data, weights)
    content["content_sha256"] = _content_hash(content)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    return write_atomic(certificate_path(artefact), text.encode())


@dataclass(frozen=True, slots=True)
class CertificateStatus:
    """What the certificate beside an artefact says, and whether it still holds.

    True only for `matches`.

    Attributes:
        state: `"absent"`: there is none. `"damaged"`: it can't be read, or was edited.
            `"stale"`: the artefact changed since. `"red"`: it is of this file and says that the
            file is wrong. `"matches"`: it is of this file, and green.
        message: one sentence for people.
        path: of the certificate.
        content: of the certificate; empty where it is absent or damaged.
    """

    state: State
    message: str
    path: Path
    content: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.state == "matches"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the state, the message, and what a listing shows of the content."""
        shown = ("verdict", "certainty", "spec", "backend", "date", "tool", "red_cases", "cases")
        return {
            "state": self.state,
            "message": self.message,
            "certificate": self.path.name,
            **{key: self.content[key] for key in shown if key in self.content},
        }


def read_certificate(artefact: str | os.PathLike[str]) -> CertificateStatus:
    """The state of the certificate beside an artefact.

    Raises:
        ArtefactError: when there is no such artefact.
    """
    data = _file_bytes(Path(artefact))
    path = certificate_path(artefact)

    def status(state: State, message: str, content: Any = None) -> CertificateStatus:
        return CertificateStatus(state, message, path, content or {})

    if not os.path.exists(path):
        return status("absent", "no certificate; smoothl1-deploy verify --certificate writes one")
    try:
        content = json.loads(read_file(path))
        if content["format"] != FORMAT:
            why = f"format {content['format']!r} is not {FORMAT}: another version's"
            return status("damaged", why)
        intact = content["content_sha256"] == _content_hash(content)
        certified, verdict = content["artefact"]["sha256"], content["verdict"]
        weights = content["artefact"].get("weights", {}).items()
        date, red, cases = content["date"], content["red_cases"], content["cases"]
        # One from before the word was in use says the same.
        certainty = content.get("certainty", Certainty.SAMPLES)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
        return status("damaged", f"{path.name} can't be read ({type(exc).__name__}: {exc})")
    if not intact:
        return status("damaged", f"{path.name} was edited: its content does not match its hash")
    folder = Path(artefact).parent
    if certified != sha256(data) or any(_sha256_of(folder / n) != known for n, known in weights):
        why = f"the artefact changed since it was certified on {date}; verify it again"
        return status("stale", why, content)
    if verdict != "green" or red:
        return status("red", f"{red} of {cases} cases were red on {date}", content)
    return status("matches", f"{cases} cases green on {date}, {certainty}", content)
