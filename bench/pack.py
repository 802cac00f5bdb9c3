"""What `card.py` needs on a machine with a GPU and no network, in pieces that reach it.

    python bench/pack.py PYTHON3.10 [FOLDER]      # in the root of this repository; FOLDER: .card

Two archives: ONNX Runtime for CUDA, for the machine's own Python, and TensorRT 8.5.3.1 with a
Python 3.10 that its bindings are for (549 MB, for use and not for passing on: FOLDER is ignored by
git). With them goes a script that unpacks what has arrived and runs `card.py`, and what to call is
printed. Of ONNX Runtime's library the machine code of other cards is left out; TensorRT's licence
lets no file of it be changed, so it goes whole. Needs pip, gcc, nm and ldd.
"""

from __future__ import annotations

import hashlib
import lzma
import math
import mmap
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

TENSORRT = "tensorrt==8.5.3.1"
ONNXRUNTIME = "onnxruntime-gpu==1.31.1"
THEIR_PYTHON = "3.12"  # of the machine with the card, with torch, onnx, onnxscript and typer
MISSING = ("platformdirs", "pytest")  # of which it has none, or one that may be too old
CAPABILITY = 90  # of its card
PIECE = 57 << 20  # bytes: below 60 MB, and a call carries 64 MiB, the working tree among them
BLOCK = 128 << 20  # bytes that are packed at a time
#: Of xz: what makes jumps of machine code alike first.
FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9}]
#: What a worker doesn't need of a standard library.
LEFT_OUT = ("test", "idlelib", "tkinter", "ensurepip", "lib2to3", "site-packages", "__pycache__")
#: What a session doesn't need of onnxruntime-gpu.
UNUSED = ("transformers", "quantization", "tools", "capi/libonnxruntime.so.*", "capi/*_tensorrt.so")
#: Libraries that every machine with this kernel's C library has.
SYSTEM = re.compile(r"ld-linux|lib(c|m|dl|rt|pthread|util)\.so")
ELF = 2  # kind of an entry of a fat binary; 1 is PTX


def run(*command: object) -> str:
    """The output of a command that has to succeed."""
    done = subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def download(wheels: Sequence[str], folder: Path, python: str, abi: str, platform: str) -> None:
    """Wheels, of the versions of constraints.txt or their own, for a Python that isn't this one."""
    print("downloading", *wheels, flush=True)
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
        "--python-version", python, "--implementation", "cp", "--abi", abi, "--platform", platform,
        "--constraint", "constraints.txt", "--dest", folder, *wheels)  # fmt: skip


def copy_python(binary: Path, home: Path) -> None:
    """A Python without site-packages, and the libraries that it and its modules load."""
    code = "import sys; print(sys.base_prefix, sys.version_info[:2] == (3, 10))"
    prefix, fits = run(binary, "-c", code).rsplit(maxsplit=1)
    if fits != "True":
        raise SystemExit(f"{binary} is no Python 3.10; the wheel's bindings are for no other")
    source = Path(prefix) / "lib" / "python3.10"
    ignore = shutil.ignore_patterns(*LEFT_OUT, "config-*", "*.a", "_tkinter*")
    shutil.copytree(source, home / "lib" / "python3.10", ignore=ignore)
    (home / "bin").mkdir()
    shutil.copy(Path(prefix) / "bin" / "python3.10", home / "bin")
    loads = [home / "bin" / "python3.10", *(home / "lib" / "python3.10" / "lib-dynload").iterdir()]
    for loaded in loads:
        for path in re.findall(r"=> (/\S+)", run("ldd", loaded)):
            if not SYSTEM.match(Path(path).name):
                shutil.copy(path, home / "lib")


def add_stand_ins(home: Path) -> None:
    """Libraries in the place of those that only TensorRT's plugins call."""
    plugins = home / "site" / "tensorrt" / "libnvinfer_plugin.so.8"
    wanted: dict[str, list[str]] = {}
    for symbol, library in re.findall(r" U (cu(?:blas|dnn)\w+)@+(\S+)", run("nm", "-D", plugins)):
        wanted.setdefault(library, []).append(symbol)
    for library, symbols in wanted.items():
        source = home / f"{library}.c"
        source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in symbols))
        versions = home / f"{library}.map"
        versions.write_text(f"{library} {{ global: *; }};\n")
        made = home / "lib" / library
        run("gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", f"-Wl,--version-script,{versions}",
            source, "-o", made)  # fmt: skip
        source.unlink()
        versions.unlink()


def make_tensorrt(binary: Path, temporary: Path) -> Path:
    """The folder of the worker, which is tried as far as it goes without a card."""
    home = temporary / "tensorrt85"
    (home / "lib").mkdir(parents=True)
    copy_python(binary, home)
    download([TENSORRT], temporary, "3.10", "none", "manylinux_2_17_x86_64")
    shutil.unpack_archive(next(temporary.glob("tensorrt-*.whl")), home / "site", "zip")
    add_stand_ins(home)
    code = "import sys, tensorrt; print(tensorrt.__version__, *sys.version_info[:2])"
    print(run("env", f"PYTHONHOME={home}", f"PYTHONPATH={home / 'site'}",
              f"LD_LIBRARY_PATH={home / 'lib'}", home / "bin" / "python3.10", "-S", "-c", code),
          end="", flush=True)  # fmt: skip
    return home


def blank(library: Path, capability: int) -> None:
    """Put zeros, which pack to nothing, in the place of the machine code of every other card.

    A fat binary is a header (its second half: the bytes after it) and entries, each a header (kind;
    at 4 its own size, at 8 that of what follows, at 28 the card's number) and the code. A driver
    passes entries of other cards by.
    """
    with library.open("r+b") as file, mmap.mmap(file.fileno(), 0) as held:
        at = 0
        while (at := held.find(b"\x50\xed\x55\xba\x01\x00\x10\x00", at)) >= 0:
            end = at + 16 + int(struct.unpack_from("<Q", held, at + 8)[0])
            at += 16
            while at < end:
                kind, _, header, size = struct.unpack_from("<HHIQ", held, at)
                number = struct.unpack_from("<I", held, at + 28)[0]
                at += header
                if kind == ELF and number != capability:
                    held[at : at + size] = bytes(size)
                at += size


def make_onnxruntime(temporary: Path) -> Path:
    """The folder that the machine's Python is to find before its own onnxruntime."""
    home, wheels = temporary / "onnxruntime", temporary / "wheels"
    abi = f"cp{THEIR_PYTHON.replace('.', '')}"
    download([ONNXRUNTIME], wheels, THEIR_PYTHON, abi, "manylinux_2_28_x86_64")
    download(MISSING, wheels, THEIR_PYTHON, "none", "any")
    for wheel in wheels.iterdir():
        shutil.unpack_archive(wheel, home, "zip")
    for path in [path for name in UNUSED for path in (home / "onnxruntime").glob(name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    blank(home / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so", CAPABILITY)
    return home


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Of no owner and time: the same files give the same bytes."""
    entry.mtime = entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def packed(home: Path, folder: Path) -> tuple[list[str], str]:
    """The names of the pieces of an archive of `home`, and the archive's sha256."""
    archive = home.with_suffix(".tar")
    with tarfile.open(archive, "w") as tar:
        for path in sorted(home.rglob("*")):
            tar.add(path, path.relative_to(home), recursive=False, filter=anonymous)
    with archive.open("rb") as file, ThreadPoolExecutor() as pool:
        blocks = iter(lambda: file.read(BLOCK), b"")
        streams = pool.map(partial(lzma.compress, filters=FILTERS), blocks)
        whole = b"".join(streams)  # which in a row are one
    names = [f"{home.name}-{number:02}" for number in range(math.ceil(len(whole) / PIECE))]
    for number, name in enumerate(names):
        (folder / name).write_bytes(whole[number * PIECE : (number + 1) * PIECE])
    return names, hashlib.sha256(whole).hexdigest()


#: Run by bash where the pieces are, in the root of this repository. An archive of which one is
#: missing is left out, and `card.py` says so of what needs it.
ARRIVED = """\
cd /tmp
for archive in {archives}; do
    name=${{archive%=*}}
    cat $name-[0-9][0-9] > $name.tar.xz && echo "${{archive#*=}}  $name.tar.xz" | sha256sum -c &&
        mkdir -p $name && python3 -m tarfile -e $name.tar.xz $name
done
cd "$OLDPWD"
PYTHONPATH=/tmp/onnxruntime:. TENSORRT85=/tmp/tensorrt85 exec python3 -m bench.card "$@"
"""


def main() -> None:
    """Make the pieces and print the calls."""
    if not 2 <= len(sys.argv) <= 3:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[2] if len(sys.argv) == 3 else ".card")
    libraries = sorted(Path("smoothl1_deploy/ops/c").glob("libsmoothl1_deploy*.so"))
    if len(libraries) < 2:
        raise SystemExit(
            "the operators are not built here: pip install -e . where gcc and nvcc are"
        )
    folder.mkdir(exist_ok=True)
    pieces, archives = [], []
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        # The smaller one is carried first: the machine's time may run out.
        for home in (make_onnxruntime(temporary), make_tensorrt(Path(sys.argv[1]), temporary)):
            print(f"packing {home.name}", flush=True)
            for old in folder.glob(f"{home.name}-[0-9][0-9]"):
                old.unlink()
            names, whole = packed(home, folder)
            pieces += names
            archives.append(f"{home.name}={whole}")
    (folder / "run").write_text(ARRIVED.format(archives=" ".join(archives)))
    carried = " ".join(map(str, (folder / "run", *libraries)))
    print("One call a piece, each within half a minute of the one before:\n")
    for piece in pieces:
        print(f"    carry {folder}/{piece}: cp {folder}/{piece} /tmp")
    print(f"\nthen, with 9 minutes:\n\n    carry {carried}: bash {folder}/run $OUT")


if __name__ == "__main__":
    main()
