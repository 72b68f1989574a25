"""What is built and shipped: an sdist, a wheel from it, and a header that compiles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import rfaas_mpi

REPOSITORY = Path(__file__).resolve().parent.parent
# What a fresh clone does not have.
BUILT = shutil.ignore_patterns(".venv", ".git", "build", "dist", "out", "*.egg-info", "__pycache__",
                               ".pytest_cache", ".hypothesis", "*.so", "*.o", "_fabric.c")


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    clone = tmp_path_factory.mktemp("clone") / "rfaas_mpi"
    shutil.copytree(REPOSITORY, clone, ignore=BUILT)
    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=clone)
    (made,) = clone.glob("dist/*.tar.gz")
    return made


def test_an_sdist_holds_everything_that_is_needed_to_test_it(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "Makefile", "pyproject.toml", "setup.py", "csrc/rfm.h",
            "csrc/kernels.c", "rfaas_mpi/fabric/_fabric.pyx", "rfaas_mpi/fabric/librfm.pxd",
            "apps/blackscholes.py", "tests/conftest.py", "tools/system_packages.sh"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", "_fabric.c", "/rfaas-hook"))]


@pytest.mark.timeout(400)
def test_a_wheel_from_the_sdist_works_on_its_own(sdist, tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation",
        "--wheel-dir", tmp_path, sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
        # Slurm runs it: pip keeps who may.
        assert archive.getinfo("rfaas_mpi/agent/rfaas-hook").external_attr >> 16 & 0o777 == 0o755
    assert "rfaas_mpi/include/rfm_call.h" in names
    apps = {f"rfaas_mpi/apps/{path.name}" for kind in ("py", "c") for path in (REPOSITORY / "apps").glob(f"*.{kind}")}
    assert "rfaas_mpi/apps/blackscholes.py" in apps and apps <= set(names)
    assert "rfaas_mpi/_native_kernels.so" in names
    assert not [name for name in names if name.startswith(("tests", "csrc", "apps"))]
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    answer = run(
        sys.executable, "-P", "-c",
        "import rfaas_mpi as rf\n"
        "from rfaas_mpi.cli.demo import apps_directory\n"
        "with rf.Executor(transport='inline') as ex:\n"
        "    print(rf.get_include(), apps_directory(), sum(ex.map(abs, [-1, 2])), sep='\\n')",
        cwd=tmp_path, PYTHONPATH=str(site), RFAAS_RUNTIME_DIR=str(runtime))
    assert answer.splitlines() == [str(site / "rfaas_mpi/include"), str(site / "rfaas_mpi/apps"), "3"]


@pytest.mark.parametrize("compiler", [("gcc", "-std=c99"), ("gcc", "-std=c11"), ("gcc", "-std=c17")],
                         ids=lambda command: command[1])
def test_a_kernel_compiles_with_the_installed_header_alone(tmp_path, compiler):
    source = tmp_path / "twice.c"
    source.write_text("""
        #include "rfm_call.h"
        int32_t twice(const struct rfm_call *call)
        {
            const double *x = call->inputs[0].ptr;
            double *y = call->outputs[0].ptr;
            for (uint64_t i = 0; i < call->inputs[0].size / sizeof(*x); i++) {
                y[i] = 2.0 * x[i];
            }
            return 0;
        }
    """)
    run(*compiler, "-Wall", "-Werror", "-O2", "-fPIC", "-shared", "-I", rfaas_mpi.get_include(),
        "-o", "libtwice.so", source, cwd=tmp_path)
    kernel = rfaas_mpi.Kernel.from_library(tmp_path / "libtwice.so", "twice")
    import numpy as np
    x = np.arange(5.0)
    assert np.array_equal(kernel(x, out=np.empty(5)), 2 * x)


def test_importing_the_package_needs_and_loads_nothing_of_mpi():
    loaded = run(sys.executable, "-c", "import sys, rfaas_mpi; rfaas_mpi.Executor, rfaas_mpi.kernel; "
                 "print(sorted(name for name in sys.modules if 'mpi4py' in name))", cwd=REPOSITORY)
    assert loaded.strip() == "[]"
