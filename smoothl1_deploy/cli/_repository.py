"""`smoothl1-deploy repository`: models for a Triton server, and the lint of a repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._files import check_writable, write_atomic
from .._spec import ROUTES, LossSpec
from ..errors import SpecError, require
from ._console import print_fields, print_json, print_lines, print_table, typed
from ._options import AsJson, Next, end_unless, one_of, options_of, parse_shape, takes_spec

if TYPE_CHECKING:
    from ..serving._repository import ServedModel

EXAMPLE = "smoothl1-deploy repository models --per-sample --name smooth_l1_per_sample"

_SHAPE = "N,16"


@takes_spec("upstream", panel="A loss of its own")
def repository(
    given: dict[str, Any],
    *,
    folder: Annotated[Path | None, typer.Argument()] = None,
    lint: Path | None = None,
    model: Path | None = None,
    name: str | None = None,
    max_batch_size: Annotated[int | None, typer.Option(min=0)] = None,
    engine: Path | None = None,
    certify: bool = False,
    ops: bool = False,
    overwrite: bool = False,
    tensorrt_version: str | None = None,
    shape: str | None = None,
    route: Annotated[str | None, one_of(*ROUTES)] = None,
    kserve: Path | None = None,
    storage_uri: str | None = None,
    as_json: AsJson = False,
) -> Next:
    """Write a model into a Triton model repository, or check one with --lint.

    The graph is made fit for a server: the loss in the shape [1], or [N,1] for a score a row, and
    a target of another number of rows is an error. --lint exits with 1 where it finds a fault.

    Options:
        folder: The repository to write into; made where missing.
        lint: Check a repository, anyone's, and write nothing.
        model: An ONNX file to serve, such as one of attach.
        name: The model's name; the spec's or the file's by default.
        max_batch_size: Rows of different requests that may be computed together; by default 64
            where rows are independent, else 0.
        engine: A TensorRT engine of the served graph, for a second model NAME_trt.
        certify: Verify each loss of the model, and write the certificate beside it; needs torch.
        ops: Have the server load this installation's operators, which compute the loss in one pass
            on the CPU.
        overwrite: Replace a model of that name.
        tensorrt_version: With --lint: the server's TensorRT, as in 10.13.

    A loss of its own:
        shape: The axes of input and target, a name for the rows first; N,16 by default.
        route: A route of export; inlined by default, function with --ops.

    On a cluster:
        kserve: Also write a KServe InferenceService here.
        storage_uri: Where the cluster finds the repository; pvc://models/FOLDER by default.
    """
    loss = options_of({**given, **{k: v for k, v in (("shape", shape), ("route", route)) if v}})
    if lint is not None:
        if loss or any((folder, model, name, engine, kserve, ops)):
            raise SpecError("--lint writes nothing; give the folder to check alone")
        _lint(lint, tensorrt_version, as_json)
        return [typed("serve", lint)]
    if folder is None:
        raise SpecError("give the folder to write into, or --lint FOLDER to check one")
    if model is not None and loss:
        raise SpecError(
            f"--model brings its own loss, and {', '.join(loss)} would be ignored; leave "
            "them out, or attach another loss first"
        )
    if tensorrt_version is not None:
        raise SpecError("--tensorrt-version is what --lint holds plans against; leave it out")
    if kserve is None and storage_uri:
        raise SpecError("--storage-uri is what --kserve FILE says; give that too, or leave it out")

    from ..serving._repository import (
        certify_model,
        inference_service,
        losses_of,
        write_loss,
        write_model,
    )

    service = ""
    if kserve is not None:  # before anything is written
        check_writable(kserve)
        called = folder.resolve().name
        name_of_service = re.sub("[^a-z0-9]+", "-", called.lower()).strip("-")
        service = inference_service(
            name_of_service, storage_uri or f"pvc://models/{called}", gpus=1 if engine else 0
        )
    if certify:
        require("torch", "torch", "--certify, which compares with PyTorch,")
        if model is not None:
            losses_of(str(model))
    common: dict[str, Any] = {
        "name": name,
        "max_batch_size": max_batch_size,
        "engine": engine,
        "ops": ops,
        "overwrite": overwrite,
    }
    if model is not None:
        written = write_model(folder, model, **common)
    else:
        axes = parse_shape(_SHAPE if shape is None else shape) or ()
        written = write_loss(folder, LossSpec(**given), axes, route=route, **common)
    if kserve is not None:
        write_atomic(kserve, service.encode())
    green = not certify or bool(certify_model(written[0].file)[0])
    _show(written, kserve, as_json)
    end_unless(green)
    return [typed("serve", folder)]


def _show(written: tuple[ServedModel, ...], kserve: Path | None, as_json: bool) -> None:
    from ..parity._certificate import read_certificate

    certificates = {model.name: read_certificate(model.file) for model in written}
    if as_json:
        models = [{**each.to_dict(), "certificate": certificates[each.name]} for each in written]
        print_json({"models": models, "kserve": kserve})
        return
    for model in written:
        batching = f"up to {model.max_batch_size} rows of any requests together"
        if not model.max_batch_size:
            batching = f"none: {model.unbatched}" if model.unbatched else "none"
        print_fields(
            {
                "wrote": str(model.folder),
                "platform": model.platform,
                "batching": batching,
                "certificate": certificates[model.name].message,
            }
        )
    if kserve is not None:
        print_fields({"wrote": str(kserve)})


def _lint(folder: Path, tensorrt_version: str | None, as_json: bool) -> None:
    from ..serving._lint import lint

    report = lint(folder, tensorrt_version=tensorrt_version)
    if as_json:
        print_json(report.to_dict())
    else:
        files = [(file, status.message) for file, status in report.certificates.items()]
        print_table(("model file", "certificate"), files)
        for finding in report.findings:
            print_lines([f"{finding.model}: {finding.rule}: {finding.problem}"])
            print_lines([f"    {finding.remedy}"])
        count, models = len(report.findings), len(report.models)
        print_lines([f"{count or 'no'} finding{'s' * (count != 1)} in {models} models"])
        if report.note:
            print_lines([f"what Triton itself refuses was not asked: {report.note}"])
    end_unless(report)
