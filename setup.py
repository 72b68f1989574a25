"""Builds the Cython extension over csrc/ and the library of native kernels; the rest is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
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
    # What `rfaas demo` and `rfaas app` run.
    "apps": sorted([*glob("apps/*.py"), *glob("apps/*.c")]),
}

# The verbs transport: built where its headers are, loaded where its library is. The
# other one needs no library and no device; it is what its own cost is measured with.
VERBS, VERBS_NULL, VERBS_BENCH = "rfaas_mpi._verbs", "rfaas_mpi.bench._verbs_null", "rfaas_mpi.bench._verbs_bench"
VERBS_HEADER = "infiniband/verbs.h"
VERBS_SOURCES = sorted(glob("csrc/verbs/*.c"))
NULL_SOURCES = sorted(glob("csrc/verbs/null/*.c"))
PAIR_SOURCES = sorted(glob("csrc/verbs/bench/*.c"))

# Libraries of their own, no part of the data plane.
KERNELS = "csrc/kernels.c"
BENCH = ["csrc/bench.c", "csrc/bench_net.c"]


def data_plane_sources() -> list[str]:
    """All of csrc/ that is linked into the extension: not kernels, bench and tests."""
    return sorted(set(glob("csrc/*.c")) - {KERNELS, *BENCH})


def has_header(name: str) -> bool:
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    return subprocess.run([*compiler, "-E", "-x", "c", "-", "-o", os.devnull], input=f"#include <{name}>\n",
                          text=True, stderr=subprocess.DEVNULL, check=False).returncode == 0


class PlainLibrary(Extension):
    """A shared library that is loaded with dlopen and knows nothing of Python."""


class PlainProgram(Extension):
    """A program that knows nothing of Python."""


class BuildExt(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        if not has_header(VERBS_HEADER):
            print(f"not built: the verbs transport, since there is no {VERBS_HEADER} here "
                  "(Debian: libibverbs-dev); everything else works without")
            self.extensions = [ext for ext in self.extensions if ext.name not in (VERBS, VERBS_NULL, VERBS_BENCH)]

    def get_ext_filename(self, fullname: str) -> str:
        extension = self.ext_map.get(fullname)
        if isinstance(extension, PlainLibrary):
            return fullname.replace(".", "/") + ".so"
        if isinstance(extension, PlainProgram):
            return fullname.replace(".", "/")
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        if not isinstance(ext, PlainProgram):
            super().build_extension(ext)
            return
        objects = self.compiler.compile(ext.sources, output_dir=self.build_temp, depends=ext.depends,
                                        extra_preargs=ext.extra_compile_args)
        program = Path(self.get_ext_fullpath(ext.name))
        program.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_executable(objects, str(program))


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


headers = sorted([*glob("csrc/*.h"), *glob("csrc/verbs/*.h"), *glob("csrc/verbs/null/*.h"),
                  *glob("csrc/verbs/bench/*.h")])
fabric = Extension(
    "rfaas_mpi.fabric._fabric",
    sources=["rfaas_mpi/fabric/_fabric.pyx", *data_plane_sources()],
    include_dirs=["csrc"],
    depends=[*headers, *sorted(glob("rfaas_mpi/fabric/*.pxi")),
             *sorted(glob("rfaas_mpi/fabric/*.pxd"))],
    extra_compile_args=[*C_FLAGS, HIDDEN, *CYTHON_FLAGS],
    libraries=["pthread"],
)


def plain_library(name: str, *sources: str, flags: tuple[str, ...], libraries: tuple[str, ...] = ()) -> PlainLibrary:
    return PlainLibrary(name, sources=list(sources), include_dirs=["csrc"], depends=headers,
                        extra_compile_args=[*C_FLAGS, *flags], extra_link_args=["-Wl,--no-undefined"],
                        libraries=["m", "pthread", *libraries])



setup(
    ext_modules=[
        *cythonize([fabric], language_level=3),
        # -ffast-math: only then does glibc declare the vector forms of log and
        # exp. Never for the link: it would switch denormals off in the process.
        plain_library("rfaas_mpi._native_kernels", KERNELS, flags=("-ffast-math",)),
        # What the node agent reads many times a second.
        plain_library("rfaas_mpi.agent._reading", "csrc/agent/reading.c", flags=(HIDDEN,)),
        # What Slurm's Prolog and Epilog run: it needs no library, and Python would take too long.
        PlainProgram("rfaas_mpi.agent.rfaas-hook", ["csrc/hook/hook.c"], extra_compile_args=C_FLAGS),
        # What the data plane is compared with shares its wait loop and its kind of memory, nothing else.
        plain_library("rfaas_mpi.bench._bench", *BENCH, "csrc/pages.c", "csrc/poller.c", flags=(HIDDEN,)),
        plain_library(VERBS, *VERBS_SOURCES, flags=(HIDDEN,), libraries=("ibverbs",)),
        plain_library(VERBS_NULL, *VERBS_SOURCES, *NULL_SOURCES, *PAIR_SOURCES, flags=(HIDDEN,)),
        # What it is compared with chooses its device as it does, and shares nothing else that is used.
        plain_library(VERBS_BENCH, *VERBS_SOURCES, *PAIR_SOURCES, flags=(HIDDEN,), libraries=("ibverbs",)),
    ],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
