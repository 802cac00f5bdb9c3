"""Forms of the loss, node for node, side by side under ONNX Runtime's CPU provider.

    python bench/forms.py [threads]

Interleaved in one process after a warm-up; medians. The figures in bench/NOTES.md are its output.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import numpy as np
import onnx.parser
import onnxruntime as ort

THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 1
REPEATS = {2**10: 300, 2**16: 60, 2**20: 30, 2**24: 7}

#: name -> nodes from d = input - target to the element losses l; b is beta, h is 0.5.
ELEMENTS = {
    "plain exporter": "a=Abs(d) lt=Less(a,b) q0=Mul(a,h) q1=Mul(q0,a) q=Div(q1,b) hb=Mul(b,h) "
    "li=Sub(a,hb) l=Where(lt,q,li)",
    "(c/b)*(d-c/2)": "c=Clip(d,nb,b) g=Div(c,b) ch=Mul(c,h) e=Sub(d,ch) l=Mul(g,e)",
    "|(c/b)*(d-c/2)|": "c=Clip(d,nb,b) g=Div(c,b) ch=Mul(c,h) e=Sub(d,ch) p=Mul(g,e) l=Abs(p)",
    "(min/b)*(a-min/2)": "a=Abs(d) c=Min(a,b) g=Div(c,b) ch=Mul(c,h) e=Sub(a,ch) l=Mul(g,e)",
    "|d-c|+c*(c/2b)": "c=Clip(d,nb,b) u=Sub(d,c) a=Abs(u) g=Div(c,b2) q=Mul(c,g) l=Add(a,q)",
    "|d-c|+(c/2)*(c/b)": "c=Clip(d,nb,b) u=Sub(d,c) a=Abs(u) g=Div(c,b) k=Mul(h,c) q=Mul(k,g) "
    "l=Add(a,q)",
}
#: name -> nodes from l to the output.
REDUCTIONS = {
    "none": "loss=Identity(l)",
    "mean, float32": "loss=ReduceMean<keepdims=0>(l)",
    "sum, cast to float64": "x=Cast<to=11>(l) s=ReduceSum<keepdims=0>(x) loss=Cast<to=1>(s)",
    "sum, rows of 64, then float64": "shape=Constant<value_ints=[-1,64]>() "
    "axis=Constant<value_ints=[1]>() r=Reshape(l,shape) p=ReduceSum<keepdims=0>(r,axis) "
    "x=Cast<to=11>(p) s=ReduceSum<keepdims=0>(x) loss=Cast<to=1>(s)",
}
PAIRS = [(form, "none") for form in ELEMENTS] + [
    ("plain exporter", "mean, float32"),
    ("|d-c|+(c/2)*(c/b)", "sum, cast to float64"),
    ("|d-c|+(c/2)*(c/b)", "sum, rows of 64, then float64"),
]


def session(form: str, reduction: str) -> ort.InferenceSession:
    """A session of one form with one reduction."""
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
    g (float[N] input, float[N] target) => (float{"[N]" if reduction == "none" else ""} loss) {{
      b = Constant<value_float=0.5>()  nb = Constant<value_float=-0.5>()
      h = Constant<value_float=0.5>()  b2 = Constant<value_float=1.0>()
      d = Sub(input, target) {ELEMENTS[form]} {REDUCTIONS[reduction]} }}"""
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    model = onnx.parser.parse_model(text).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Print a table a size: microseconds, and the ratio to the plain exporter's form."""
    sessions = {pair: session(*pair) for pair in PAIRS}
    rng = np.random.default_rng(0)
    for size, repeats in REPEATS.items():
        feeds = {k: rng.standard_normal(size, dtype=np.float32) for k in ("input", "target")}
        times: dict[tuple[str, str], list[float]] = {pair: [] for pair in PAIRS}
        for repeat in range(repeats + 2):
            for pair, one in sessions.items():
                started = time.perf_counter()
                one.run(None, feeds)
                if repeat >= 2:
                    times[pair].append(time.perf_counter() - started)
        print(f"{size} elements, {THREADS} thread(s)")
        for pair, found in times.items():
            base = ("plain exporter", "none" if pair[1] == "none" else "mean, float32")
            ratio = median(times[base]) / median(found)
            print(f"  {median(found) * 1e6:9.0f} us  x{ratio:.2f}  {pair[0]}; {pair[1]}")


if __name__ == "__main__":
    main()
