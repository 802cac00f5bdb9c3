"""`BuildOptions`: what can be chosen about a build, and how a flavour is told.

An option that a flavour or version doesn't know is refused by name, never dropped: an engine
must be what was asked for. The two whose defaults depend on the flavour, `tf32` and
`strict_nans`, say so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import BuildError, SpecError, UnsupportedError
from .flavour import Flavour

__all__ = ["BuildOptions", "check_timing_cache", "configure"]

_LEVELS = ("none", "ampere_plus", "same_compute_capability")
_CAPABILITY = re.compile(r"(?:sm_?)?(\d{1,2})\.?(\d)", re.IGNORECASE)


def _capability(value: object) -> str:
    """`"8.6"` from `"8.6"`, `"86"`, `86`, `8.6`, `"SM86"` or `"sm_86"`; `"current"` is kept."""
    text = str(value).strip()
    if text.lower() == "current":
        return "current"
    match = _CAPABILITY.fullmatch(text)
    if match is None or isinstance(value, bool):
        raise SpecError(
            f"can't read the compute capability {value!r}; "
            "write it as '8.6' or 'SM86' (or 'current' for the GPU of this machine)"
        )
    return f"{match[1]}.{match[2]}"


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What an engine is built for, and how.

    Args:
        compute_capabilities: GPUs to build for, such as `"8.6"` or `"SM86"`; `"current"` is this
            machine's. Empty leaves it to the flavour: `tensorrt_rtx` targets 8.0 and later,
            `tensorrt` builds for this machine's GPU and knows no list.
        hardware_compatibility: `"none"`, `"ampere_plus"` or `"same_compute_capability"`;
            `tensorrt` only.
        version_compatible: let later runtimes of the same major version run the engine.
        tf32: let float32 products run on tensor cores with 10 bits of mantissa. Off, because
            the loss is to equal PyTorch's; TensorRT's own default is on.
        strict_nans: keep NaN semantics; None means wherever the flavour has the flag.
        refit: weights can be replaced later; needs a GPU to build.
        strip_plan: leave the weights out; the engine must be refitted before it runs.
        workspace: limit of scratch memory in bytes; None is TensorRT's own.
        timing_cache: file of measured kernel timings to read and update, guarded by a lock file
            beside it; `tensorrt` only. What it holds is no part of an engine's cache key.

    Raises:
        SpecError: on values that mean nothing.
    """

    compute_capabilities: tuple[str, ...] = ()
    hardware_compatibility: str | None = None
    version_compatible: bool = False
    tf32: bool = False
    strict_nans: bool | None = None
    refit: bool = False
    strip_plan: bool = False
    workspace: int | None = None
    timing_cache: str | None = None

    def __post_init__(self) -> None:
        given: Any = self.compute_capabilities
        listed = [given] if isinstance(given, (str, int, float)) else given
        # Bytes are a sequence of numbers, and an array of rank 0 says that it can be iterated over.
        if isinstance(listed, bytes) or not isinstance(listed, (Sequence, Set)):
            raise SpecError(f"compute_capabilities must be a list such as ['8.6'], got {given!r}")
        wanted = {_capability(value) for value in listed}
        if "current" in wanted and len(wanted) > 1:
            raise SpecError("compute capability 'current' stands alone; list others without it")
        # Sorted, each once: the order is part of the engine's bytes.
        order = wanted if "current" in wanted else sorted(wanted, key=float)
        object.__setattr__(self, "compute_capabilities", tuple(order))
        level: Any = self.hardware_compatibility
        if level is not None:
            if not isinstance(level, str) or level.lower() not in _LEVELS:
                raise SpecError(
                    f"unknown hardware_compatibility {level!r}; choose one of {', '.join(_LEVELS)}"
                )
            object.__setattr__(self, "hardware_compatibility", level.lower())
        size: Any = self.workspace
        if size is not None and (
            not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 2**63
        ):
            raise SpecError(f"workspace must be a number of bytes, 1 to 2^63 - 1, got {size!r}")
        for name in ("version_compatible", "tf32", "strict_nans", "refit", "strip_plan"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "strict_nans" and value is None):
                raise SpecError(f"{name} must be true or false, got {value!r}")
        if self.timing_cache is not None:
            object.__setattr__(self, "timing_cache", str(self.timing_cache))

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready."""
        return {**asdict(self), "compute_capabilities": list(self.compute_capabilities)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BuildOptions:
        """The inverse of `to_dict`.

        Raises:
            SpecError: on an unknown field (a newer version wrote it) or a bad value.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise SpecError(
                f"unknown build option(s) {', '.join(unknown)}; upgrade smoothl1-deploy"
            )
        return cls(**values)


def configure(config: Any, options: BuildOptions, flavour: Flavour) -> tuple[str, ...]:
    """Write `options` into a builder config.

    Returns:
        The names of the builder flags that are then set, sorted.

    Raises:
        UnsupportedError: for what the flavour doesn't know; names flavour, version and option.
        BuildError: when TensorRT refuses what it should know.
    """
    with flavour.capture() as log:
        _set_flag(config, flavour, "TF32", options.tf32, "tf32")
        _set_flag(config, flavour, "STRICT_NANS", options.strict_nans, "strict_nans")
        _set_flag(
            config, flavour, "VERSION_COMPATIBLE", options.version_compatible, "version_compatible"
        )
        _set_flag(config, flavour, "REFIT", options.refit, "refit")
        _set_flag(config, flavour, "STRIP_PLAN", options.strip_plan, "strip_plan")
        _set_capabilities(config, flavour, options.compute_capabilities)
        _set_hardware_level(config, flavour, options.hardware_compatibility)
        check_timing_cache(options, flavour)
        if options.workspace is not None:
            pool = flavour.need("MemoryPoolType", "WORKSPACE", "workspace")
            config.set_memory_pool_limit(pool, options.workspace)
        if log.errors:
            raise BuildError(f"{flavour} refused the build options: {log.reason()}")
    return tuple(sorted(name for name, flag in flavour.flags().items() if config.get_flag(flag)))


def check_timing_cache(options: BuildOptions, flavour: Flavour) -> None:
    """Whether `flavour` has a use for the timing cache, where one is given.

    Raises:
        UnsupportedError: for `tensorrt_rtx`.
    """
    if options.timing_cache is not None and flavour.name == "tensorrt_rtx":
        # It takes one, warns that this is deprecated and does nothing (tried with 1.7.1).
        raise UnsupportedError(
            f"timing_cache has no effect on {flavour}, which measures no kernels when it builds; "
            "leave it out"
        )


def _set_flag(config: Any, flavour: Flavour, name: str, wanted: bool | None, option: str) -> None:
    """Set or clear a flag; None sets it where it exists, and a missing flag is clear already."""
    flag = flavour.member("BuilderFlag", name)
    if wanted:
        flag = flavour.need("BuilderFlag", name, f"the option {option}")
    elif flag is None:
        return
    if wanted is False:
        config.clear_flag(flag)
    else:
        config.set_flag(flag)


def _set_capabilities(config: Any, flavour: Flavour, wanted: tuple[str, ...]) -> None:
    if not wanted:
        return
    if flavour.member("IBuilderConfig", "set_compute_capability") is None:
        raise UnsupportedError(
            f"compute_capabilities is not supported by {flavour}, which builds for the GPU of this "
            "machine; use hardware_compatibility there, or flavour='tensorrt_rtx'"
        )
    members = []
    for capability in wanted:
        name = "CURRENT" if capability == "current" else "SM" + capability.replace(".", "")
        member = flavour.member("ComputeCapability", name)
        if member is None:
            listed = ", ".join(flavour.capabilities)
            hint = (
                "; Hopper (9.0) runs engines of flavour='tensorrt'" if capability == "9.0" else ""
            )
            raise UnsupportedError(
                f"{flavour} can't build for compute capability {capability}; "
                f"it knows {listed}{hint}"
            )
        members.append(member)
    config.num_compute_capabilities = len(members)
    for index, member in enumerate(members):
        if not config.set_compute_capability(member, index):
            raise BuildError(f"{flavour} refused to build for compute capability {wanted[index]}")


def _set_hardware_level(config: Any, flavour: Flavour, level: str | None) -> None:
    if level is None:
        return
    if flavour.name == "tensorrt_rtx":
        # It takes one, warns that it is unsupported and goes on (tried with 1.7.1).
        raise UnsupportedError(
            f"hardware_compatibility is not supported by {flavour}; "
            "name the GPUs with compute_capabilities, as in ['8.6', '12.0']"
        )
    what = f"hardware_compatibility={level!r}"
    config.hardware_compatibility_level = flavour.need(
        "HardwareCompatibilityLevel", level.upper(), what
    )
