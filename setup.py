"""The library of `smoothl1_deploy.ops`, compiled where a C compiler is. The rest: pyproject.toml.

It is no module of Python's: one file serves every Python, and the package is installed without it
where it can't be compiled.
"""

import re
from pathlib import Path, PurePath

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


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


class AnyPythonWheel(bdist_wheel):
    """A wheel for one platform and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, its binary interface, and the platform: manylinux where libc is all it needs."""
        platform = super().get_tag()[2]
        for library in Path(self.bdist_dir).rglob("*.so"):
            names = library.read_bytes()
            versions = map(int, re.findall(rb"\0GLIBC_2\.(\d+)", names))
            if {*re.findall(rb"\0([\w.+-]+\.so\.\d+)(?=\0)", names)} == {b"libc.so.6"}:
                platform = platform.replace("linux_", f"manylinux_2_{max(17, *versions)}_")
        return "py3", "none", platform


setup(
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
    ext_modules=[
        Extension(
            "smoothl1_deploy.ops.c.libsmoothl1_deploy",
            ["smoothl1_deploy/ops/c/operators.c", "smoothl1_deploy/ops/c/smooth_l1.c"],
            depends=[f"smoothl1_deploy/ops/c/{name}.h" for name in ("job", "loops", "ort")],
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
                "-ffp-contract=off",  # the same bits on every processor
                "-fno-math-errno",
                "-fvisibility=hidden",
            ],
            extra_link_args=["-s"],
            optional=True,
        )
    ],
)
