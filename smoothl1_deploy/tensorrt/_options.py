"""`BuildOptions`: what can be chosen about a build, and how a flavour is told.

An option that a flavour or version doesn't know is refused by name, never dropped: an engine
must be what was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any

from .._records import Record
from ..errors import BuildError, SpecError, UnsupportedError
from ._flavour import Flavour

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
class BuildOptions(Record):
    """What an engine is built for.

    Args:
        compute_capabilities: GPUs to build for, such as `"8.6"` or `"SM86"`; `"current"` is this
            machine's. Empty leaves it to the flavour: `tensorrt_rtx` targets 8.0 and later,
            `tensorrt` builds for this machine's GPU and knows no list.

    Raises:
        SpecError: on values that mean nothing.

    >>> BuildOptions(["12.0", "SM86", 8.6]).compute_capabilities
    ('8.6', '12.0')
    """

    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given: Any = self.compute_capabilities
        listed = [given] if isinstance(given, (str, int, float)) else given
        # Bytes are a sequence too, and an array of rank 0 says that it can be iterated over.
        if isinstance(listed, bytes) or not isinstance(listed, (Sequence, Set)):
            raise SpecError(f"compute_capabilities must be a list such as ['8.6'], got {given!r}")
        wanted = {_capability(value) for value in listed}
        if "current" in wanted and len(wanted) > 1:
            raise SpecError("compute capability 'current' stands alone; list others without it")
        # They are sorted, each once, because their order changes the engine's bytes.
        order = wanted if "current" in wanted else sorted(wanted, key=float)
        object.__setattr__(self, "compute_capabilities", tuple(order))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BuildOptions:
        """The inverse of `to_dict`; an option of another version that was not used is passed over.

        Raises:
            SpecError: on an unknown field that was used, or a bad value.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(name for name in set(values) - known if values[name]):
            raise SpecError(
                f"unknown build option(s) {', '.join(unknown)}, of another version of "
                "smoothl1-deploy"
            )
        return cls(**{name: value for name, value in values.items() if name in known})


def configure(config: Any, options: BuildOptions, flavour: Flavour) -> tuple[str, ...]:
    """Write `options` into a builder config, and what every loss needs.

    STRICT_NANS, where it exists, keeps NaN. TF32, which is TensorRT's default, would compute
    float32 products with 10 bits of mantissa, and the loss is to equal PyTorch's: it is cleared.

    Returns:
        The names of the builder flags that are then set, sorted.

    Raises:
        UnsupportedError: for what the flavour doesn't know; names flavour, version and option.
        BuildError: when TensorRT refuses what it should know.
    """
    with flavour.capture() as log:
        config.clear_flag(flavour.trt.BuilderFlag.TF32)
        strict_nans = flavour.member("BuilderFlag", "STRICT_NANS")
        if strict_nans is not None:
            config.set_flag(strict_nans)
        if options.compute_capabilities:
            _set_capabilities(config, flavour, options.compute_capabilities)
        if log.errors:
            raise BuildError(f"{flavour} refused the build options: {log.reason()}")
    flags = flavour.trt.BuilderFlag.__members__
    return tuple(sorted(name for name, flag in flags.items() if config.get_flag(flag)))


def _set_capabilities(config: Any, flavour: Flavour, wanted: tuple[str, ...]) -> None:
    if flavour.member("IBuilderConfig", "set_compute_capability") is None:
        raise UnsupportedError(
            f"{flavour} takes no compute capabilities: it builds for this machine's GPU; leave "
            "them out, or use the flavour tensorrt_rtx"
        )
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        name = "CURRENT" if capability == "current" else "SM" + capability.replace(".", "")
        member = flavour.member("ComputeCapability", name)
        if member is None:
            hopper = capability == "9.0"
            hint = "; Hopper (9.0) runs engines of the flavour tensorrt" if hopper else ""
            raise UnsupportedError(
                f"{flavour} can't build for compute capability {capability}; "
                f"it knows {', '.join(flavour.capabilities)}{hint}"
            )
        if not config.set_compute_capability(member, index):
            raise BuildError(f"{flavour} refused to build for compute capability {capability}")
