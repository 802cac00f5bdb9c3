"""How a spec becomes ONNX: the functions, the three routes, and the metadata that names them."""
