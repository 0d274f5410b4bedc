"""Yardsticks: what our policies are compared with, that is, another library's cache or method, or another engine.

A :class:`Yardstick` can be given wherever a suite takes a policy, and is a dataclass of its parameters, as a policy is.
It has no rule for our cache. It names the session that runs it, which ``d2obench.external.open_session`` opens; the
other library is not imported before that.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from d2obench.errors import PolicyError, UsageError
from d2obench.suite.grammar import show_value


@dataclass(frozen=True)
class Yardstick:
    """Base class of everything that a suite runs as a policy without being one of ours."""

    name: ClassVar[str] = ""
    about: ClassVar[str] = ""
    takes_budget: ClassVar[bool] = False
    session: ClassVar[str] = "d2obench.external.library:LibrarySession"
    """``module:class`` of its session, called with the model, this instance, the budget and the options of
    :class:`d2obench.cache.session.Session`."""
    methods: ClassVar[bool] = False
    """Whether a method is named after a colon, as in ``kvpress:SnapKVPress``; it is passed as ``method``."""
    loads: ClassVar[str] = ""
    """``module:function`` that loads its models, with the signature of ``d2obench.models.load``; empty to use that
    one."""
    isolated: ClassVar[bool] = False
    """Whether its cells need a separate worker process, which does not share the weights of the other cells."""
    environment: ClassVar[str] = ""
    """The name of the Python environment it needs, if it can't be imported into ours."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions are written to a cell's record."""
    imports: ClassVar[tuple[str, str]] = ("", "")
    """A module that must be importable in our environment, and the extra that installs it."""
    several_devices: ClassVar[bool] = False
    """Whether it can run a model whose layers are on several devices."""
    speed_only: ClassVar[bool] = False
    """Whether it returns no probability distributions, so that tasks that score text can't use it."""
    method: str = field(default="", kw_only=True)
    """The part after the colon, ``SnapKVPress`` of ``kvpress:SnapKVPress``; empty if there is none."""

    @classmethod
    def opens(cls) -> Any:
        """The class of its session."""
        module, _, name = cls.session.partition(":")
        return getattr(importlib.import_module(module), name)

    def check(self) -> None:
        """Raises a PolicyError if a parameter is out of its range."""

    def installed(self) -> None:
        """Raises a UsageError if the extra that it needs is not installed in our environment."""
        module, extra = self.imports
        if module and not _found(module):
            raise UsageError(
                f"{self.name} needs {module}", why="it isn't installed", remedy=f"pip install 'd2obench[{extra}]'"
            )

    def flags(self, versions: Mapping[str, str | None]) -> list[str]:
        """Flags that every view must show beside its figures; ``versions`` are those of ``packages`` in the environment
        it ran in."""
        return []


@dataclass(frozen=True)
class HfDynamic(Yardstick):
    """Keeps everything, in transformers' own dynamic cache; for comparison with full."""

    name: ClassVar[str] = "hf-dynamic"
    several_devices: ClassVar[bool] = True


@dataclass(frozen=True)
class HfStatic(Yardstick):
    """Keeps everything, in transformers' own static cache; for comparison with full."""

    name: ClassVar[str] = "hf-static"
    several_devices: ClassVar[bool] = True


@dataclass(frozen=True)
class SdpaStatic(Yardstick):
    """Keeps everything, with torch's SDPA on a preallocated cache; for comparison with full."""

    name: ClassVar[str] = "sdpa-static"
    several_devices: ClassVar[bool] = True


@dataclass(frozen=True)
class HfQuantized(Yardstick):
    """Keeps everything, in transformers' own quantised cache (optimum-quanto); for comparison with quant.

    Args:
        bits: bits per stored number.
        group: numbers that share a scale.
        residual: number of newest tokens kept unquantised.
    """

    bits: Literal[2, 4] = 4
    group: int = 64
    residual: int = 128
    name: ClassVar[str] = "hf-quantized"
    session: ClassVar[str] = "d2obench.external.library:QuantisedSession"
    packages: ClassVar[tuple[str, ...]] = ("optimum-quanto",)
    imports: ClassVar[tuple[str, str]] = ("optimum.quanto", "hf-quantized")

    def check(self) -> None:
        """Raises a PolicyError unless the sizes are positive."""
        if self.group < 1 or self.residual < 1:
            raise PolicyError("hf-quantized needs group and residual of 1 or more")


@dataclass(frozen=True)
class Kvpress(Yardstick):
    """A method of NVIDIA's kvpress, as kvpress:SnapKVPress(window_size=64), in an environment of its own."""

    params: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    name: ClassVar[str] = "kvpress"
    takes_budget: ClassVar[bool] = True
    methods: ClassVar[bool] = True
    session: ClassVar[str] = "d2obench.external.kvpress:KvpressSession"
    isolated: ClassVar[bool] = True
    environment: ClassVar[str] = "kvpress"
    packages: ClassVar[tuple[str, ...]] = ("kvpress", "transformers", "torch")

    def check(self) -> None:
        """Raises a PolicyError unless a press is named and its compression ratio is left to the budget."""
        if not self.method.isidentifier() or self.method.startswith("_"):
            raise PolicyError("kvpress needs the name of a press", remedy="write kvpress:SnapKVPress")
        if "compression_ratio" in self.params:
            given = show_value(self.params["compression_ratio"])
            raise PolicyError(
                f"kvpress:{self.method}: the budget sets compression_ratio, not {given}",
                remedy="leave it out and give --budget; the ratio is 1 − budget",
            )

    def flags(self, versions: Mapping[str, str | None]) -> list[str]:
        """States the versions it ran with, because it uses another transformers than ours."""
        return [f"other environment: transformers {versions.get('transformers')}, kvpress {versions.get('kvpress')}"]


@dataclass(frozen=True)
class LlamaCpp(Yardstick):
    """llama.cpp on the CPU with the same GGUF file; speed only.

    Args:
        cache: type of its keys and values.
    """

    cache: Literal["f16", "q8_0", "q4_0"] = "f16"
    name: ClassVar[str] = "llama.cpp"
    session: ClassVar[str] = "d2obench.external.llama_cpp:LlamaCppSession"
    loads: ClassVar[str] = "d2obench.external.llama_cpp:load"
    isolated: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ("xllamacpp",)
    imports: ClassVar[tuple[str, str]] = ("xllamacpp", "llama-cpp")
    speed_only: ClassVar[bool] = True

    def flags(self, versions: Mapping[str, str | None]) -> list[str]:
        """States that another engine ran it."""
        return [f"another engine: llama.cpp (xllamacpp {versions.get('xllamacpp')}), weights as in the GGUF"]


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
