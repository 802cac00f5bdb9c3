"""The library of `smoothl1_deploy.ops`, compiled where a C compiler is. The rest: pyproject.toml.

It is no module of Python's: one file serves every Python, and the package is installed without it
where it can't be compiled.
"""

from pathlib import PurePath

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildLibrary(build_ext):
    """A file of the name that was asked for, without the version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Where the library goes, below the root of the packages."""
        return str(PurePath(*fullname.split("."))) + ".so"


class AnyPythonWheel(bdist_wheel):
    """A wheel for one platform and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, its binary interface, and the platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
    ext_modules=[
        Extension(
            "smoothl1_deploy.ops.c.libsmoothl1_deploy",
            ["smoothl1_deploy/ops/c/smooth_l1.c"],
            depends=["smoothl1_deploy/ops/c/loops.h", "smoothl1_deploy/ops/c/ort.h"],
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
