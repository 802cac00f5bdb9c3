"""The suite for anyone's loss: cases, both references, the comparison and its bounds, by pytest.

    pytest --pyargs smoothl1_deploy.conformance --loss mine:loss

calls `loss(input, target, beta=0.5, reduction="mean")` of the module `mine` with numpy arrays. A
runner of ONNX files, which is a subclass of `smoothl1_deploy.backends.Backend`, is tried by
`--backend mine:Runner`.

>>> from smoothl1_deploy import LossSpec
>>> from smoothl1_deploy.conformance._subject import LossBackend
>>> from smoothl1_deploy.conformance._suite import wrong
>>> wrong(LossBackend(lambda a, b, beta, reduction: abs(a - b)), LossSpec(0.0, "none"))
[]
"""
