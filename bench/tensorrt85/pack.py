"""TensorRT 8.5.3.1 and a Python 3.10 to run it, in pieces that reach a machine without a network.

    python bench/tensorrt85/pack.py PYTHON3.10 [FOLDER]      # some minutes; FOLDER: .tensorrt85

Downloads NVIDIA's wheel (549 MB, for use and not for passing on: FOLDER is ignored by git), adds
stand-ins for cublas and cudnn, which the builder is told not to use, packs all of it with the
Python whose binary is given, and prints what to run where the pieces arrive. `card.py` is what is
run there. Needs pip, gcc, nm, ldd, tar and xz.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WHEEL = "tensorrt==8.5.3.1"
PIECE = 52 << 20  # bytes; a call to the machine carries 64 MiB, the working tree among them
HOME = "/tmp/tensorrt85"
#: What a worker doesn't need of a standard library.
LEFT_OUT = ("test", "idlelib", "tkinter", "ensurepip", "lib2to3", "site-packages", "__pycache__")
#: Libraries that every machine with this kernel's C library has.
SYSTEM = re.compile(r"ld-linux|lib(c|m|dl|rt|pthread|util)\.so")


def run(*command: object) -> str:
    """The output of a command that has to succeed."""
    done = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
    return done.stdout


def copy_python(binary: Path, home: Path) -> None:
    """A Python without site-packages, and the libraries that it and its modules load."""
    code = "import sys; print(sys.base_prefix, sys.version_info[:2] == (3, 10))"
    prefix, fits = run(binary, "-c", code).rsplit(maxsplit=1)
    if fits != "True":
        raise SystemExit(f"{binary} is no Python 3.10; the wheel's bindings are for no other")
    source = Path(prefix) / "lib" / "python3.10"
    ignore = shutil.ignore_patterns(*LEFT_OUT, "config-*", "*.a")
    shutil.copytree(source, home / "lib" / "python3.10", ignore=ignore)
    (home / "bin").mkdir()
    shutil.copy(Path(prefix) / "bin" / "python3.10", home / "bin")
    loads = [home / "bin" / "python3.10", *(home / "lib" / "python3.10" / "lib-dynload").iterdir()]
    for loaded in loads:
        for path in re.findall(r"=> (/\S+)", run("ldd", loaded)):
            if not SYSTEM.match(Path(path).name):
                shutil.copy(path, home / "lib")


def copy_tensorrt(wheel: Path, home: Path) -> None:
    """The package, and libraries in the place of those that only its plugins call."""
    shutil.unpack_archive(wheel, home / "site", "zip")
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


def main() -> None:
    """Make the pieces and print the commands."""
    if not 2 <= len(sys.argv) <= 3:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[2] if len(sys.argv) == 3 else ".tensorrt85").absolute()
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "home"
        (home / "lib").mkdir(parents=True)
        print(f"downloading {WHEEL}", flush=True)
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
            "--only-binary", ":all:", "--python-version", "3.10", "--implementation", "cp",
            "--abi", "none", "--platform", "manylinux_2_17_x86_64",
            "--dest", temporary, WHEEL)  # fmt: skip
        copy_python(Path(sys.argv[1]), home)
        copy_tensorrt(next(Path(temporary).glob("tensorrt*.whl")), home)
        code = "import sys, tensorrt; print(tensorrt.__version__, *sys.version_info[:2])"
        print(run("env", f"PYTHONHOME={home}", f"PYTHONPATH={home / 'site'}",
                  f"LD_LIBRARY_PATH={home / 'lib'}", home / "bin" / "python3.10", "-S", "-c", code),
              "packing", flush=True)  # fmt: skip
        for old in folder.glob("piece-*"):
            old.unlink()
        # Sorted, and of one owner and time: the same files give the same bytes.
        same = ["--sort=name", "--mtime=@0", "--owner=0", "--group=0"]
        tar = ["tar", "-C", str(home), *same, "-c", "."]
        with subprocess.Popen(tar, stdout=subprocess.PIPE) as tarred:
            packed = subprocess.Popen(
                ["xz", "-6", "-T0", "-c"], stdin=tarred.stdout, stdout=subprocess.PIPE
            )
            assert packed.stdout is not None
            whole, number = hashlib.sha256(), 0
            while piece := packed.stdout.read(PIECE):
                whole.update(piece)
                (folder / f"piece-{number:02}").write_bytes(piece)
                number += 1
            if packed.wait() or tarred.wait():
                raise SystemExit("tar or xz failed; see above")
    print(f"""{number} pieces in {folder}. On the machine, one piece a call, in this order:

    cat piece-NN >> {HOME}.tar.xz          # a piece that comes twice spoils it: begin again

then, once all are there:

    echo '{whole.hexdigest()}  {HOME}.tar.xz' | sha256sum -c && mkdir -p {HOME} &&
    tar -C {HOME} -xJf {HOME}.tar.xz && TENSORRT85={HOME} python3 -m bench.tensorrt85.card $OUT""")


if __name__ == "__main__":
    main()
