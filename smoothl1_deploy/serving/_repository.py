"""Models in a Triton model repository: written, certified, and named to a cluster.

A model is a folder, which appears whole or not at all:

<repository>/<name>/config.pbtxt
<repository>/<name>/1/model.onnx
<repository>/<name>_trt/config.pbtxt
<repository>/<name>_trt/1/model.plan, model.plan.json (its sidecar)
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .._artefact import ModelSource, read_model, sha256, sidecar_path
from .._files import folders_made, refusal_told
from .._model import Loss, every_node
from .._records import Record
from .._shapes import Dim
from .._spec import LossSpec
from ..errors import ArtefactError, OutputError, SpecError, UnsupportedError
from ..graph._attach import loss_part, read_losses
from ..graph._export import export
from ..graph._functions import DOMAIN
from ..graph._metadata import warn_if_changed
from ..ops import library
from ..parity._certificate import certify
from ..parity._verify import Verification, verify_loss
from ..parity._whole import ModelVerification
from ..tensorrt._engine import Engine, read_verified
from ._config import (
    CONFIG_FILE,
    ONNX_FILE,
    ONNX_PLATFORM,
    PLAN_FILE,
    PLAN_PLATFORM,
    dump_config,
    engine_ports,
    make_config,
    onnx_ports,
)
from ._graph import ServedGraph, serve

#: How many rows Triton may put into one batch where nothing else is said.
MAX_BATCH_SIZE = 64

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

_SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_STORAGE_URI = re.compile(r"[a-z][a-z0-9+.-]*://\S+")


@dataclass(frozen=True, slots=True)
class ServedModel(Record):
    """A model that was written into a repository.

    Attributes:
        name: the name of the model and of its folder.
        folder: `<repository>/<name>`.
        file: the model file in the folder.
        platform: Triton's word for the kind of the model file.
        max_batch_size: how many rows of requests are batched together; 0 where none are.
        unbatched: why rows must not be batched; None where they may.

    >>> from smoothl1_deploy import LossSpec
    >>> from smoothl1_deploy.serving import write_loss
    >>> (mean,) = write_loss("models", LossSpec(), name="mean")
    >>> mean.max_batch_size, mean.unbatched is None  # rows of two requests must not meet
    (0, False)
    """

    name: str
    folder: Path
    file: Path
    platform: str
    max_batch_size: int
    unbatched: str | None


def write_loss(
    repository: str | os.PathLike[str],
    spec: LossSpec,
    shape: Sequence[Dim] = ("N", 16),
    *,
    route: str | None = None,
    name: str | None = None,
    max_batch_size: int | None = None,
    engine: str | os.PathLike[str] | None = None,
    ops: bool = False,
    overwrite: bool = False,
) -> tuple[ServedModel, ...]:
    """Write a loss of its own as a served model.

    Args:
        repository: the folder of the models, which is made where it is missing.
        spec: the loss to compute.
        shape: the shape of input and target, a name for the rows first, as in `("N", 16)`.
        route: a route of `export`; by default `"inlined"`, plain ONNX, which any server reads, and
            with `ops` `"function"`.
        name: the name of the model; the spec's by default.
        max_batch_size: how many rows Triton may batch; by default 64 where the rows are independent
            (`none` and per sample) and 0 where they are not.
        engine: a TensorRT engine of this served graph, for a second model `<name>_trt`.
        ops: whether the server is to run the loss by this installation's library of operators,
            which it must find at the same path.
        overwrite: whether to replace a model of that name.

    Raises:
        SpecError: on a shape or a max_batch_size that makes no sense, and on a graph in which the
            operators have nothing to run.
        BackendUnavailableError: for `ops` where the operators were not built.
        ArtefactError: when the engine is not what its sidecar says, or is of another graph.
        UnsupportedError: for an engine that Triton can't load.
        OutputError: when the model is there already, or the folder can't be written.
        MissingDependencyError: without tritonclient.

    Example:
        >>> import tempfile
        >>> from smoothl1_deploy import LossSpec
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (written,) = write_loss(folder, LossSpec(per_sample=True), ("N", 16), name="score")
        ...     sorted(str(path.relative_to(folder)) for path in written.folder.rglob("*.*"))
        ['score/1/model.onnx', 'score/config.pbtxt']
        >>> written.max_batch_size, written.unbatched
        (64, None)
    """
    return write_model(
        repository,
        served_loss(spec, shape, route or ("function" if ops else "inlined")).model,
        name=name or spec.name,
        max_batch_size=max_batch_size,
        engine=engine,
        ops=ops,
        overwrite=overwrite,
    )


def served_loss(spec: LossSpec, shape: Sequence[Dim], route: str = "inlined") -> ServedGraph:
    """The served graph of a spec.

    Raises:
        SpecError: on a shape whose first axis has no name.
    """
    if not shape or not isinstance(shape[0], str):
        raise SpecError(
            f"a served loss takes any number of rows, got the shape {tuple(shape)!r}; give a name "
            "for the first axis, such as N"
        )
    return serve(export(spec, route, shape))


def write_model(
    repository: str | os.PathLike[str],
    model: ModelSource,
    *,
    name: str | None = None,
    max_batch_size: int | None = None,
    engine: str | os.PathLike[str] | None = None,
    ops: bool = False,
    overwrite: bool = False,
) -> tuple[ServedModel, ...]:
    """Write a model, such as one with a loss attached, as a served model.

    Args and errors are those of `write_loss`; by default the model has the name of the file. A
    model that something else has changed since it was exported is written with a `ModelWarning`,
    and stays known as changed.

    Example:
        >>> import tempfile
        >>> from smoothl1_deploy import LossSpec, export
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (written,) = write_model(folder, export(LossSpec(), shape=("N", 16)), name="mean")
        >>> written.max_batch_size, written.unbatched.split(":")[0]
        (0, 'loss is a mean over all rows of a batch')
    """
    given = model if isinstance(model, (str, os.PathLike)) else None
    read = read_model(model)
    warn_if_changed(read)
    served = serve(read)
    if ops and all(node.domain != DOMAIN for node in every_node(served.model.graph.node)):
        raise SpecError(
            f"the operators compute nodes of the domain {DOMAIN}, and the model has none; export "
            "or attach its loss by the route 'function', or leave ops out"
        )
    name = name or (Path(given).stem if given else served.model.graph.name)
    if not _NAME.fullmatch(name):
        raise SpecError(
            f"{name!r} can't be a model's name, which is a folder's and part of a URL; use "
            "letters, digits, '_', '-' and '.'"
        )
    batch = _batch_size(served, max_batch_size)
    data = served.model.SerializeToString(deterministic=True)
    plan = None if engine is None else _readable_plan(Path(engine), sha256(data))

    operators = str(library()) if ops else ""
    config = make_config(name, ONNX_PLATFORM, onnx_ports(served.model), batch, operators)
    made = [(config, {ONNX_FILE: data})]
    if plan is not None:
        config = make_config(f"{name}_trt", PLAN_PLATFORM, engine_ports(plan.sidecar), batch)
        sidecar = sidecar_path(Path(PLAN_FILE)).name
        made.append((config, {PLAN_FILE: plan.data, sidecar: plan.sidecar.dumps()}))
    root, folders, models = Path(repository), {}, []
    for config, files in made:
        version = {f"1/{file}": content for file, content in files.items()}
        folders[config.name] = {CONFIG_FILE: dump_config(config), **version}
        folder, file = root / config.name, next(iter(version))  # the model file is the first
        batching = batch, served.unbatched
        models.append(ServedModel(config.name, folder, folder / file, config.platform, *batching))
    _write_folders(root, folders, overwrite)
    return tuple(models)


def _batch_size(served: ServedGraph, asked: int | None) -> int:
    if served.unbatched is None:
        return MAX_BATCH_SIZE if asked is None else asked
    if asked:
        raise SpecError(
            f"max_batch_size {asked}, but requests must not be batched together: "
            f"{served.unbatched}. Leave it out, or serve a loss with per_sample"
        )
    return 0


def _readable_plan(path: Path, digest: str) -> Engine:
    engine = read_verified(path)
    sidecar = engine.sidecar
    if sidecar.flavour != "tensorrt":
        raise UnsupportedError(
            f"{path} is an engine of {sidecar.flavour} {sidecar.version}, and Triton's backend "
            "loads those of tensorrt alone; build it with --flavour tensorrt on a machine with a "
            "GPU, with the version in the container that serves it"
        )
    if sidecar.onnx_sha256 != digest:
        raise ArtefactError(
            f"{path} was built from another graph than the served one; write the repository "
            "without --engine, build from its 1/model.onnx, and write it again with --engine and "
            "--overwrite"
        )
    return engine


def _write_folders(root: Path, folders: dict[str, dict[str, bytes]], overwrite: bool) -> None:
    """Write beside, then rename: a model's folder is there whole, or as it was before."""
    for name in folders:
        if os.path.exists(root / name) and not overwrite:
            raise OutputError(
                f"{root / name} exists; choose another name with --name, or replace it with "
                "--overwrite"
            )
    remedy = "choose a folder that you may write to"
    with (
        refusal_told(f"can't write into {root}", remedy),
        folders_made(root),
        tempfile.TemporaryDirectory(dir=root, prefix=".", ignore_cleanup_errors=True) as staging,
    ):
        for name, files in folders.items():
            for file, data in files.items():
                path = Path(staging, name, file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        for name in folders:
            _swap(Path(staging, name), root / name)


def _swap(new: Path, target: Path) -> None:
    """Rename a folder to a path, and bring back the folder that was there if that fails."""
    old = new.with_name(f"{new.name}.old")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(new, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise


# Certificates


def losses_of(model: ModelSource) -> tuple[Loss, ...]:
    """The losses of a model.

    Raises:
        ArtefactError: when it has none, for which no certificate can vouch.
    """
    losses = read_losses(read_model(model))
    if not losses:
        raise ArtefactError(
            "the model says of no loss that it computes it, and a certificate is of losses; attach "
            "one, or leave the certificate out"
        )
    return losses


def certify_model(
    path: str | os.PathLike[str], *, drift: bool = True
) -> tuple[Verification | ModelVerification, Path]:
    """Verify a served model and write its certificate beside it, green or red.

    Of a model with losses attached, each is verified, from prediction and target to its output:
    nothing here can judge what the rest of the model computes.

    Args:
        path: the model file.
        drift: whether to look for an error that grows with the size too, as `verify` does.

    Returns:
        What was found, and the path of the certificate.

    Raises:
        ArtefactError: when the file is no model with a loss.
        MissingDependencyError: without torch or ONNX Runtime.

    Example:
        >>> import tempfile
        >>> from smoothl1_deploy import LossSpec
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (written,) = write_loss(folder, LossSpec(), name="mean")
        ...     found, certificate = certify_model(written.file, drift=False)
        >>> bool(found), certificate.name
        (True, 'model.onnx.certificate.json')
    """
    model = read_model(path)
    digest = sha256(model.SerializeToString(deterministic=True))
    verified: dict[str, Verification] = {}
    for loss in losses_of(model):
        part, output = loss_part(model, loss), loss.outputs["loss"]
        verified[output] = verify_loss(part, drift=drift)
        if part is not model:
            name = f"{model.graph.name}: the loss {output}"
            verified[output] = replace(verified[output], name=name, sha256=digest)
    found: Verification | ModelVerification = next(iter(verified.values()))
    if len(verified) > 1:
        whole = model.graph.name, digest, found.backend, verified, ()
        found = ModelVerification(*whole, found.environment)
    return found, certify(found, path)


# In a container

#: Triton's: the runtime that KServe ships by itself, 23.05, has CVE-2025-23319.
CONTAINER = "25.07-py3"

#: The autoscaler measures use against what is requested. Source of the fields: the v1beta1 types
#: and the webhook's checks of kserve/kserve, `pkg/apis/serving/v1beta1`.
_INFERENCE_SERVICE = """\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
  annotations:
    serving.kserve.io/deploymentMode: Standard
    serving.kserve.io/autoscalerClass: hpa
spec:
  predictor:
    minReplicas: 1
    maxReplicas: 4
    scaleMetric: cpu
    scaleTarget: 80
    model:
      modelFormat: {{name: triton}}
      runtime: kserve-tritonserver
      runtimeVersion: {container}
      protocolVersion: v2
      storageUri: {storage_uri}
      resources:
        requests: {{cpu: "1", memory: 2Gi}}
        limits: {{cpu: "2", memory: 4Gi{gpus}}}
"""


def inference_service(name: str, storage_uri: str, gpus: int = 0) -> str:
    """The KServe `InferenceService`, as YAML, that serves a whole repository, scaled by load.

    The text passes a schema of the API's fields; it was never applied to a cluster by this
    package's authors.

    Args:
        name: lower-case letters, digits and `-`, a letter first; 63 characters at most.
        storage_uri: where the cluster finds the repository, as in `pvc://models/smooth_l1`.
        gpus: for each replica; TensorRT plans need one.

    Raises:
        SpecError: on values that KServe would refuse.
    """
    if not _SERVICE_NAME.fullmatch(name) or len(name) > 63:
        raise SpecError(
            f"{name!r} can't be the name of an InferenceService, which is the folder's; use "
            "lower-case letters, digits and '-', a letter first, 63 characters at most"
        )
    if not _STORAGE_URI.fullmatch(storage_uri):
        raise SpecError(
            f"the storage URI {storage_uri!r} has no scheme; write where the cluster finds the "
            "repository, as in pvc://CLAIM/FOLDER or s3://BUCKET/FOLDER"
        )
    return _INFERENCE_SERVICE.format(
        name=json.dumps(name),  # a string of JSON is one of YAML
        container=CONTAINER,
        storage_uri=json.dumps(storage_uri),
        gpus=f', nvidia.com/gpu: "{gpus}"' if gpus else "",
    )
