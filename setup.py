"""The libraries of `smoothl1_deploy.ops`, compiled where a compiler is. The rest: pyproject.toml.

They are no modules of Python's: one file serves every Python, and the package is installed without
one that can't be compiled. The one for CUDA takes nvcc 15 s on one core, for all its devices; the
environment variable NVCC names another nvcc, and none if it is empty.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path, PurePath

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

FOLDER = "smoothl1_deploy/ops/c"
#: Compute capabilities, of which nvcc compiles for those that it knows; newer ones translate the
#: PTX of the last.
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)


class BuildLibrary(build_ext):
    """A file of the name that was asked for, without the version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Where the library goes, below the root of the packages."""
        return str(PurePath(*fullname.split("."))) + ".so"

    def build_extensions(self) -> None:
        """Without the folder of Python's own library, which some Pythons have the linker note."""
        linker = getattr(self.compiler, "linker_so", [])  # a compiler for Windows has none
        self.compiler.linker_so = [word for word in linker if not word.startswith("-Wl,-rpath")]
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """By nvcc, where there are sources for it."""
        if not any(source.endswith(".cu") for source in ext.sources):
            super().build_extension(ext)
            return
        found = shutil.which("nvcc", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
        nvcc = os.environ.get("NVCC", found or "")
        if not nvcc:
            self.warn(f"{ext.name} is left out: there is no nvcc")
            return
        target = self.get_ext_fullpath(ext.name)
        if not (self.force or newer_group([*ext.sources, *ext.depends], target)):
            return
        try:
            known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
        except (OSError, subprocess.SubprocessError) as exc:  # which setuptools wouldn't go on from
            raise CompileError(f"{nvcc} can't be asked what it compiles for: {exc}") from exc
        devices = [device for device in CAPABILITIES if f"sm_{device}" in known]
        if not devices:
            raise CompileError(f"{nvcc} compiles for none of {CAPABILITIES}")
        codes = [(device, f"sm_{device}") for device in devices]
        codes.append((devices[-1], f"compute_{devices[-1]}"))
        options = [f"-gencode=arch=compute_{device},code={code}" for device, code in codes]
        self.mkpath(str(Path(target).parent))
        self.spawn([nvcc, *options, *ext.extra_compile_args, "-o", target, *ext.sources])


class AnyPythonWheel(bdist_wheel):
    """A wheel for one platform and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, its binary interface, and the platform: manylinux where libc is all it needs."""
        platform = super().get_tag()[2]
        names = b"".join(library.read_bytes() for library in Path(self.bdist_dir).rglob("*.so"))
        versions = map(int, re.findall(rb"\0GLIBC_2\.(\d+)", names))
        if {*re.findall(rb"\0([\w.+-]+\.so\.\d+)(?=\0)", names)} == {b"libc.so.6"}:
            platform = platform.replace("linux_", f"manylinux_2_{max(17, *versions)}_")
        return "py3", "none", platform


setup(
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
    ext_modules=[
        Extension(
            "smoothl1_deploy.ops.c.libsmoothl1_deploy",
            [f"{FOLDER}/operators.c", f"{FOLDER}/smooth_l1.c"],
            depends=[f"{FOLDER}/{name}.h" for name in ("job", "loops", "ort")],
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
                "-ffp-contract=off",  # the same bits on every processor
                "-fno-math-errno",
                "-fvisibility=hidden",
            ],
            extra_link_args=["-s"],
            optional=True,
        ),
        Extension(
            "smoothl1_deploy.ops.c.libsmoothl1_deploy_cuda",
            [f"{FOLDER}/operators.c", f"{FOLDER}/smooth_l1.cu"],
            depends=[f"{FOLDER}/{name}.h" for name in ("job", "ort")],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fmad=false",  # the bits of the file's own body
                "-shared",
                "-cudart=static",  # so that it loads where there is no CUDA
                "-Xfatbin=-compress-all",
                "-Xcompiler=-fPIC,-fvisibility=hidden",
                "-Xlinker=-s",
                "--threads=0",
            ],
            optional=True,
        ),
    ],
)
