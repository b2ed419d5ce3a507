"""Build hook: compiles the native CPU kernels and puts the library into the wheel.

The library is plain C++ behind ctypes, so one wheel per platform (``py3-none-<platform>``) serves every
Python. Without a C++ compiler the wheel stays pure Python (``py3-none-any``), a warning says so, and the
kernels are compiled on first use where there is a compiler. Editable installs always take that way, so that
edits of the sources count. ``OPENXLSTM_BUILD_NATIVE=0`` asks for a pure wheel; ``=1`` makes a missing library
an error.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

NATIVE = "openxlstm/ops/native"


class NativeLibrary(BuildHookInterface):
    """Compiles the library for the wheel of this machine."""

    PLUGIN_NAME = "custom"
    _work: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the library and the platform's tag to the wheel, or leave it pure and say why."""
        if version == "editable":
            return
        wanted = os.environ.get("OPENXLSTM_BUILD_NATIVE", "")
        if wanted not in ("", "0", "1"):
            raise ValueError(
                f"OPENXLSTM_BUILD_NATIVE={wanted}: expected 0 (pure wheel) or 1 (library required)"
            )
        if wanted == "0":
            self._pure("OPENXLSTM_BUILD_NATIVE=0")
            return
        build = _build_module(Path(self.root) / "src" / NATIVE / "build.py")
        self._work = tempfile.TemporaryDirectory(prefix="openxlstm-")
        name = f"libopenxlstm{build.SUFFIX}"
        library = Path(self._work.name) / name
        try:
            if os.name != "posix":
                raise build.BuildError("native kernels need Linux or macOS")
            build.build(build.find_compiler(), library)
        except build.BuildError as error:
            if wanted == "1":
                raise
            self._pure(str(error))
            return
        build_data["force_include"][str(library)] = f"{NATIVE}/{name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the working directory."""
        if self._work is not None:
            self._work.cleanup()

    def _pure(self, reason: str) -> None:
        self.app.display_warning(
            f"pure Python wheel, without the native library ({reason}): kernels are compiled on first use, "
            "or PyTorch does their work"
        )


def _build_module(path: Path) -> ModuleType:
    """``build.py`` alone: importing the package would need PyTorch."""
    spec = importlib.util.spec_from_file_location("openxlstm_native_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _platform() -> str:
    """This platform's plain tag: a promise about older C libraries (manylinux) is auditwheel's to make."""
    return next(tag for tag in platform_tags() if not tag.startswith(("manylinux", "musllinux")))
