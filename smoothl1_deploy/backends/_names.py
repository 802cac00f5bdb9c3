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

#: Backends that are PyTorch itself: what the others are compared with.
REFERENCES = ("torch", "torch-cuda")
