#!/bin/sh
# Makes sure that there is a C compiler, Python's headers and venv, and with the
# argument `tests` also what tests of RDMA need; installs with apt what is
# missing, where this user may, else says what to type.
set -eu
python=${1:-python3}
purpose=${2:-use}

if ! command -v "$python" >/dev/null 2>&1; then
    echo "$python not found: install Python 3.11 or newer" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$("$python" --version) is too old: rfaas_mpi needs 3.11 or newer;" \
         "name one with: make PYTHON=python3.11 ..." >&2
    exit 1
fi

packages=
need() { packages="$packages $1"; }

command -v gcc >/dev/null 2>&1 || need gcc
# libc's headers only come with gcc when apt follows recommendations.
[ -e /usr/include/stdio.h ] || need libc6-dev
"$python" - <<'EOF' || need python3-dev
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
EOF
"$python" -c 'import ensurepip, venv' 2>/dev/null || need python3-venv
# The emulator, the tools that make and show verbs devices, headers and drivers,
# others' programs that ours are checked against, and the compiler that fuzzes.
if [ "$purpose" = tests ]; then
    program() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null 2>&1 || need "$2"; }
    program qemu-system-x86_64 qemu-system-x86
    program rdma iproute2
    program ibv_devices ibverbs-utils
    program rping rdmacm-utils
    program ib_write_lat perftest
    program clang clang
    program llvm-cov llvm
    ls "$(clang -print-resource-dir 2>/dev/null)"/lib/*/libclang_rt.fuzzer*.a >/dev/null 2>&1 || need libclang-rt-dev
    program munged munge
    program slurmctld slurmctld
    program slurmd slurmd
    program srun slurm-client
    program shellcheck shellcheck
    ls /usr/lib/*/slurm-wlm/select_cons_tres.so >/dev/null 2>&1 || need slurm-wlm-basic-plugins
    # srun --mpi=pmix loads libpmix.so, by that name.
    ls /usr/lib/*/pmix2/lib/libpmix.so >/dev/null 2>&1 || need libpmix-dev
    ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || need postgresql
    program bwrap bubblewrap
    [ -e /usr/include/infiniband/verbs.h ] || need libibverbs-dev
    [ -e /usr/include/rdma/rdma_cma.h ] || need librdmacm-dev
    ls /usr/lib/*/libibverbs/librxe-*.so >/dev/null 2>&1 || need ibverbs-providers
    [ -d /usr/lib/python3/dist-packages/pyverbs ] || need python3-pyverbs
fi
[ -z "$packages" ] && exit 0

as_root=
if [ "$(id -u)" -ne 0 ]; then
    if sudo -n true 2>/dev/null; then as_root="sudo -n"; fi
fi
if ! command -v apt-get >/dev/null 2>&1 ||
   { [ "$(id -u)" -ne 0 ] && [ -z "$as_root" ]; }; then
    echo "missing:$packages; install them as root with:" >&2
    echo "    apt-get install$packages" >&2
    exit 1
fi
echo "installing:$packages"
$as_root apt-get update -qq
case $packages in *postgresql*)
    # Tests start servers of their own: Debian's package is not to start one of the system's.
    if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
        $as_root mkdir -p /etc/postgresql-common
        echo "create_main_cluster = false" | $as_root tee /etc/postgresql-common/createcluster.conf >/dev/null
    fi ;;
esac
# shellcheck disable=SC2086
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages
