"""Which Triton there is: the `tritonserver` on PATH, else the embedded one, set up on request.

The embedded Triton is the real server (2.51.0) from inside the package nvidia-pytriton, which is
frozen: the version and its hash are fixed here. It goes into a folder of its own, since a normal
install would pin numpy below 2.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_data_path

from .._environment import TELEMETRY
from ..errors import BackendUnavailableError, MissingDependencyError
from ._private import PrivateFolder

_VERSION = "0.7.0"
_REQUIREMENT = (
    f"nvidia-pytriton=={_VERSION} "
    "--hash=sha256:21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df\n"
)


@dataclass(frozen=True, slots=True)
class Triton:
    """A server that can be started.

    Attributes:
        binary: the executable.
        home: the folder with the backends, stubs and libraries of the embedded server; None for a
            server on PATH, which knows its own.
    """

    binary: Path
    home: Path | None = None

    @property
    def embedded(self) -> bool:
        """Whether the server is the one that `install` set up."""
        return self.home is not None

    @property
    def stub(self) -> Path:
        """The program that runs a model of the embedded server with this version of Python."""
        assert self.home is not None
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stubs = self.home / "pytriton/tritonserver/python_backend_stubs"
        return stubs / version / "triton_python_backend_stub"

    def environment(self, folder: Path) -> dict[str, str]:
        """The environment to start the server in: its libraries, libpython, and this Python first.

        Args:
            folder: a folder with a plain path, for links to the libraries, since the loader splits
                its list of folders at `;` and `:`.
        """
        environment = {TELEMETRY: "1", **os.environ}
        if self.home is None:
            return environment
        libraries = {"libtriton": self.home / "nvidia_pytriton.libs"}
        if libdir := sysconfig.get_config_var("LIBDIR"):
            libraries["libpython"] = Path(libdir)
        for name, target in libraries.items():
            (folder / name).symlink_to(target)
        folders = [*(str(folder / name) for name in libraries), environment.get("LD_LIBRARY_PATH")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
        # The stub takes its packages from the first python3 on PATH.
        programs = [os.path.dirname(sys.executable), environment.get("PATH")]
        environment["PATH"] = os.pathsep.join(filter(None, programs))
        return environment


def install_path() -> Path:
    """Where the embedded Triton is, or would be: in the user's data folder."""
    return user_data_path("smoothl1-deploy") / "triton" / f"nvidia-pytriton-{_VERSION}"


def find_triton() -> Triton:
    """The `tritonserver` on PATH, else the embedded one.

    Raises:
        MissingDependencyError: where there is neither.
        BackendUnavailableError: where the embedded Triton can't run on this machine.
    """
    if on_path := shutil.which("tritonserver"):
        return Triton(Path(on_path))
    home = install_path()
    if not home.is_dir():
        raise MissingDependencyError(
            f"there is no Triton Inference Server: no tritonserver on PATH, and none in {home}; "
            "install it with: smoothl1-deploy serve --install (55 MB, Linux on x86-64), or put a "
            "tritonserver on PATH, as in NVIDIA's container"
        )
    return _checked(home)


def _checked(home: Path) -> Triton:
    """The embedded Triton in a folder, after its programs were loaded once."""
    triton = Triton(home / "pytriton/tritonserver/bin/tritonserver", home)
    if not triton.stub.exists():
        raise BackendUnavailableError(
            f"the embedded Triton has no stub for Python {platform.python_version()}, only for "
            f"{', '.join(sorted(path.name for path in triton.stub.parent.parent.iterdir()))}; use "
            "one of these, or put a tritonserver on PATH"
        )
    with PrivateFolder() as folder:
        environment = triton.environment(folder)
        for program, remedy in (
            (triton.binary, "it needs glibc 2.35 or newer"),
            (triton.stub, "it needs Python's shared library: on Debian the package libpython3"),
        ):
            done = subprocess.run(
                [program, "--help"], env=environment, capture_output=True, text=True
            )
            missing = "error while loading shared libraries" in done.stderr
            if done.returncode in (126, 127) or missing:
                raise BackendUnavailableError(
                    f"{program} can't run here ({done.stderr.strip()}); {remedy}, or put a "
                    "tritonserver on PATH"
                )
    return triton


def install() -> Triton:
    """Set up the embedded Triton, unless it is there already.

    Its folder appears whole or not at all, and of two installations one waits for the other.

    Raises:
        BackendUnavailableError: on a machine that its binary is not made for, and when the
            download or its hash fails; the message holds pip's last words.
    """
    home = install_path()
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise BackendUnavailableError(
            f"the embedded Triton runs on Linux on x86-64, and this is {platform.system()} on "
            f"{platform.machine()}; put a tritonserver on PATH, as in NVIDIA's container"
        )
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(home.parent / ".lock"):
        if not home.is_dir():
            with tempfile.TemporaryDirectory(dir=home.parent, prefix=".new-") as folder:
                target = Path(folder) / "target"
                _pip_install(target, Path(folder) / "requirements.txt")
                server = target / "pytriton/tritonserver"
                # A wheel's files may come without the permission to run them.
                for program in (*server.glob("bin/*"), *server.glob("python_backend_stubs/*/*")):
                    program.chmod(0o755)
                os.rename(target, home)
    return _checked(home)


def _pip_install(target: Path, requirements: Path) -> None:
    requirements.write_text(_REQUIREMENT)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    options = ["--no-deps", "--no-compile", "--only-binary=:all:", "--require-hashes"]
    done = subprocess.run(
        [*pip, *options, "--target", target, "-r", requirements], capture_output=True, text=True
    )
    if done.returncode:
        raise BackendUnavailableError(
            f"pip could not install {_REQUIREMENT.split()[0]}: {done.stderr.strip()[-500:]}; mend "
            "that, or put a tritonserver on PATH"
        )
