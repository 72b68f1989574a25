"""Where the header for native kernels lies: in the package, or in csrc/ of a checkout."""

from __future__ import annotations

from pathlib import Path

__all__ = ["get_include"]


def get_include() -> str:
    """Directory that holds `rfm_call.h`, for a compiler's `-I`.

    Raises FileNotFoundError where the package was installed without it.
    """
    package = Path(__file__).resolve().parent
    for directory in (package / "include", package.parent / "csrc"):
        if (directory / "rfm_call.h").is_file():
            return str(directory)
    raise FileNotFoundError(
        f"rfm_call.h is not in {package / 'include'}: reinstall rfaas_mpi")
