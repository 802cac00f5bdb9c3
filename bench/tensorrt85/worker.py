"""TensorRT 8.5.3.1 in a process of its own, asked through pipes: `engine.py` is the other end.

Its bindings are for Python 3.10 and the rest of this project needs 3.11, so this file is run by the
Python that `pack.py` packs. It uses the standard library, tensorrt, and the driver by ctypes: no
numpy and no CUDA runtime have to be there. A message, either way, is a line of JSON and the bytes
of its buffers, whose sizes the line tells.
"""

import ctypes
import json
import os
import statistics
import sys

BYTES = {"float32": 4, "float16": 2, "int32": 4, "bool": 1}


def send(stream, header, *buffers):
    """Write one message: `header`, a dict for JSON, and buffers of bytes."""
    line = json.dumps({**header, "buffers": [memoryview(b).nbytes for b in buffers]})
    stream.write(line.encode() + b"\n")
    for buffer in buffers:
        stream.write(buffer)
    stream.flush()


def receive(stream):
    """The next message as its header and its buffers; (None, []) where the other end is gone."""
    line = stream.readline()
    if not line:
        return None, []
    header = json.loads(line)
    sizes = header.pop("buffers")
    buffers = [stream.read(size) for size in sizes]
    return (header, buffers) if [*map(len, buffers)] == sizes else (None, [])


def serve(start):
    """Answer requests from stdin until it ends.

    A request's `do` names a method of what `start` gives, which takes the request's other entries
    by name, and its buffers, and gives a header and buffers. What it or `start` raises is answered
    as `{"error": text}`. What libraries print goes to stderr: the pipe of the answers is out of
    their reach.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    engines = None
    while True:
        request, buffers = receive(sys.stdin.buffer)
        if request is None:
            return
        try:
            engines = engines or start()
            answer, made = getattr(engines, request.pop("do"))(*buffers, **request)
        except Exception as exc:
            answer, made = {"error": f"{type(exc).__name__}: {exc}"}, ()
        send(answers, answer, *made)


class Cuda:
    """Device 0 through the driver's own library: memory, one stream, events."""

    def __init__(self):
        self._driver = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.stream = ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        # The primary context is the one that TensorRT's own CUDA runtime uses.
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.call("cuStreamCreate", ctypes.byref(self.stream), 1)

    def call(self, name, *arguments):
        """A function of the driver; RuntimeError with the driver's word for what went wrong."""
        status = getattr(self._driver, name)(*arguments)
        if status:
            told = ctypes.c_char_p()
            self._driver.cuGetErrorName(status, ctypes.byref(told))
            raise RuntimeError(f"{name}: {(told.value or b'error').decode()} ({status})")

    def allocate(self, size):
        """The address of `size` bytes; an empty tensor has an address too."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address

    def free(self, address):
        """Give back what `allocate` gave."""
        self.call("cuMemFree_v2", address)

    def upload(self, address, data):
        """Bytes to the device."""
        if data:
            self.call("cuMemcpyHtoD_v2", address, ctypes.c_char_p(data), ctypes.c_size_t(len(data)))

    def download(self, address, size):
        """`size` bytes from the device."""
        host = ctypes.create_string_buffer(max(size, 1))
        if size:
            self.call("cuMemcpyDtoH_v2", host, address, ctypes.c_size_t(size))
        return host.raw[:size]

    def wait(self):
        """Until everything of the stream is done."""
        self.call("cuStreamSynchronize", self.stream)

    def milliseconds(self, work, repeats):
        """Of `work`, which enqueues on the stream: the median of `repeats` measured by events."""
        events = [ctypes.c_void_p() for _ in range(2)]
        for event in events:
            self.call("cuEventCreate", ctypes.byref(event), 0)
        found = []
        for _ in range(repeats + 3):  # the first calls load kernels
            self.call("cuEventRecord", events[0], self.stream)
            work()
            self.call("cuEventRecord", events[1], self.stream)
            self.call("cuEventSynchronize", events[1])
            taken = ctypes.c_float()
            self.call("cuEventElapsedTime", ctypes.byref(taken), *events)
            found.append(taken.value)
        return statistics.median(found[3:])


class TensorRT:
    """Builds engines and runs them."""

    def __init__(self):
        import tensorrt

        self._trt = trt = tensorrt
        self._said = said = []

        class Log(trt.ILogger):
            def __init__(self):
                trt.ILogger.__init__(self)

            def log(self, severity, text):
                if severity <= trt.ILogger.Severity.WARNING:
                    said.append(text)

        self._log = Log()
        self._cuda = Cuda()
        self._runtime = trt.Runtime(self._log)
        self._engines = []
        self._names = {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16"}

    def build(self, model, profile, half=False):
        """An engine of an ONNX file, TF32 off and no cublas or cudnn in it.

        Args:
            model: bytes of the file, without local functions, which this parser doesn't know.
            profile: input -> its smallest, usual and largest shape, for dynamic inputs.
            half: let TensorRT choose float16 for what is not float32 in the file: where it
                refuses inputs and outputs of float16 otherwise.
        """
        trt = self._trt
        del self._said[:]
        builder = trt.Builder(self._log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse(model):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise ValueError(f"the parser refuses the model: {'; '.join(errors)}")
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
        config.set_tactic_sources(0)
        config.clear_flag(trt.BuilderFlag.TF32)
        if half:
            config.set_flag(trt.BuilderFlag.FP16)
            config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
            for layer in (network.get_layer(i) for i in range(network.num_layers)):
                outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
                if all(output.dtype == trt.DataType.FLOAT for output in outputs):
                    layer.precision = trt.DataType.FLOAT
        if profile:
            shapes = builder.create_optimization_profile()
            for name, (least, usual, most) in profile.items():
                shapes.set_shape(name, least, usual, most)
            config.add_optimization_profile(shapes)
        made = builder.build_serialized_network(network, config)
        if made is None:
            raise ValueError(f"no engine: {'; '.join(self._said[-5:])}")
        return self.deserialize(bytes(made))

    def deserialize(self, data):
        """An engine of its bytes."""
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise ValueError(f"not deserialised: {'; '.join(self._said[-5:])}")
        self._engines.append((engine, engine.create_execution_context()))
        ports = {}
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            dtype = engine.get_tensor_dtype(name)
            ports[name] = [str(engine.get_tensor_mode(name)), self._names.get(dtype, str(dtype))]
        header = {"engine": len(self._engines) - 1, "ports": ports, "said": self._said[-20:]}
        return header, (data,)

    def run(self, *arrays, engine, inputs, repeats=0):
        """The outputs for arrays, and how long it takes where `repeats` is more than 0.

        Args:
            arrays: the bytes of each input.
            engine: number of it, as `build` tells.
            inputs: name and shape of each array.
            repeats: calls to time.
        """
        found, context = self._engines[engine]
        cuda, held = self._cuda, []

        def place(name, size):
            held.append(cuda.allocate(size))
            context.set_tensor_address(name, held[-1].value)
            return held[-1]

        try:
            for (name, shape), data in zip(inputs, arrays, strict=True):
                if not context.set_input_shape(name, shape):
                    raise ValueError(f"{name} of shape {shape}: {'; '.join(self._said[-2:])}")
                cuda.upload(place(name, len(data)), data)
            outputs = []
            for i in range(found.num_io_tensors):
                name = found.get_tensor_name(i)
                if found.get_tensor_mode(name) == self._trt.TensorIOMode.OUTPUT:
                    shape = list(context.get_tensor_shape(name))
                    dtype = self._names[found.get_tensor_dtype(name)]
                    size = BYTES[dtype]
                    for axis in shape:
                        size *= axis
                    outputs.append((name, dtype, shape, place(name, size), size))

            def execute():
                if not context.execute_async_v3(cuda.stream.value):
                    raise RuntimeError(f"not executed: {'; '.join(self._said[-3:])}")

            execute()
            cuda.wait()
            made = [cuda.download(address, size) for *_, address, size in outputs]
            header = {"outputs": [output[:3] for output in outputs]}
            if repeats:
                header["milliseconds"] = cuda.milliseconds(execute, repeats)
            return header, made
        finally:
            for address in held:
                cuda.free(address)

    def copy(self, size, repeats):
        """Milliseconds of a copy of `size` bytes within the memory of the device."""
        cuda = self._cuda
        source, target = cuda.allocate(size), cuda.allocate(size)
        try:
            taken = cuda.milliseconds(
                lambda: cuda.call(
                    "cuMemcpyDtoDAsync_v2", target, source, ctypes.c_size_t(size), cuda.stream
                ),
                repeats,
            )
            return {"milliseconds": taken}, ()
        finally:
            cuda.free(source)
            cuda.free(target)


if __name__ == "__main__":
    serve(TensorRT)
