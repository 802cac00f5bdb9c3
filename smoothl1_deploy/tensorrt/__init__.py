"""ONNX to TensorRT: one adapter for both flavours, engines with sidecars, a cache of them."""
