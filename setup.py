"""Builds the Cython extension over csrc/ and the library of native kernels; the rest is in pyproject.toml."""

from __future__ import annotations

import shutil
from glob import glob
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

C_FLAGS = ["-std=c11", "-O3", "-g", "-Wall", "-Wextra"]
HIDDEN = "-fvisibility=hidden"
# What Cython writes is not ours to tidy up.
CYTHON_FLAGS = ["-Wno-unused-parameter", "-Wno-unused-function",
                "-Wno-missing-field-initializers"]

# What is copied into the package, where it is not installed as a checkout:
# directory in the package → files.
COPIES = {
    # For a user's own native kernels: rfaas_mpi.get_include().
    "include": ["csrc/rfm_call.h"],
    # What `rfaas demo` runs.
    "apps": ["apps/blackscholes.py", "apps/thumbnails.py"],
}

# Libraries of their own, no part of the data plane.
KERNELS = "csrc/kernels.c"
BENCH = "csrc/bench.c"


def data_plane_sources() -> list[str]:
    """All of csrc/ that is linked into the extension: not kernels, bench and tests."""
    return sorted(set(glob("csrc/*.c")) - {KERNELS, BENCH})


class PlainLibrary(Extension):
    """A shared library that is loaded with dlopen and knows nothing of Python."""


class BuildExt(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        extension = self.ext_map.get(fullname)
        if isinstance(extension, PlainLibrary):
            return fullname.replace(".", "/") + ".so"
        return super().get_ext_filename(fullname)


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for directory, files in COPIES.items():
            target = Path(self.build_lib, "rfaas_mpi", directory)
            target.mkdir(parents=True, exist_ok=True)
            for file in files:
                shutil.copy2(file, target)


headers = sorted(glob("csrc/*.h"))
fabric = Extension(
    "rfaas_mpi.fabric._fabric",
    sources=["rfaas_mpi/fabric/_fabric.pyx", *data_plane_sources()],
    include_dirs=["csrc"],
    depends=[*headers, *sorted(glob("rfaas_mpi/fabric/*.pxi")),
             *sorted(glob("rfaas_mpi/fabric/*.pxd"))],
    extra_compile_args=[*C_FLAGS, HIDDEN, *CYTHON_FLAGS],
    libraries=["pthread"],
)




def plain_library(name: str, *sources: str, flags: tuple[str, ...]) -> PlainLibrary:
    return PlainLibrary(name, sources=list(sources), include_dirs=["csrc"], depends=headers,
                        extra_compile_args=[*C_FLAGS, *flags], libraries=["m", "pthread"])


setup(
    ext_modules=[
        *cythonize([fabric], language_level=3),
        # -ffast-math: only then does glibc declare the vector forms of log and
        # exp. Never for the link: it would switch denormals off in the process.
        plain_library("rfaas_mpi._native_kernels", KERNELS, flags=("-ffast-math",)),
        # What the data plane is compared with shares its wait loop, nothing else.
        plain_library("rfaas_mpi.bench._bench", BENCH, "csrc/poller.c", flags=(HIDDEN,)),
    ],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
