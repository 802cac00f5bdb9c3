"""Which backends there are; a shell that completes them imports nothing that they live on."""

from __future__ import annotations

from collections.abc import Mapping

#: name -> (module of this package that holds it, its class).
BACKENDS: Mapping[str, tuple[str, str]] = {
    "torch": ("_torch", "TorchBackend"),
    "onnx-reference": ("_onnx_reference", "ReferenceBackend"),
    "ort-cpu": ("_ort_cpu", "OrtCpuBackend"),
    "ort-cpu-bare": ("_ort_cpu", "OrtBareBackend"),
    "trt-network": ("_trt_network", "TrtNetworkBackend"),
    "torch-cuda": ("_torch", "TorchCudaBackend"),
    "torch-triton": ("_torch_triton", "TorchTritonBackend"),
    "ort-cuda": ("_ort_gpu", "OrtCudaBackend"),
    "ort-tensorrt": ("_ort_tensorrt", "OrtTensorrtBackend"),
    "ort-tensorrt-rtx": ("_ort_tensorrt", "OrtTensorrtRtxBackend"),
    "trt": ("_trt", "TrtBackend"),
    "triton-http": ("_triton", "TritonHttpBackend"),
    "triton-grpc": ("_triton", "TritonGrpcBackend"),
}

#: The group of entry points by which other packages add theirs: `name = "module:Class"`.
GROUP = "smoothl1_deploy.backends"

#: Backends that are PyTorch itself: what the others are compared with.
REFERENCES = ("torch", "torch-cuda")


def others() -> dict[str, str]:
    """The backends of other packages that are installed: name -> `module:Class`.

    None has a name of ours: what an artefact was proved on has to be what its name says.
    """
    from importlib.metadata import entry_points

    points = entry_points(group=GROUP)
    return {point.name: point.value for point in points if point.name not in BACKENDS}
