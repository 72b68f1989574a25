"""Kernels: how they travel, how they are checked, and that they stay callable here."""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import math
import operator
import os
import pickle
import socket
import statistics
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import cloudpickle
import numpy as np
import pytest

import rfaas_mpi
from rfaas_mpi import kernels, native
from rfaas_mpi.errors import BadKernel, KernelChanged, KernelError
from rfaas_mpi.kernels import Kernel, kernel, load_blob, object_kernel

LIBRARY = Path(rfaas_mpi.__file__).parent / "_native_kernels.so"
FACTOR = 2


@kernel
def doubled(x):
    """Twice x."""
    return 2 * x


@kernel(name="into")
def added(x, y, out):
    np.add(x, y, out=out)


def plain(x):
    return x + 1


def there(made: Kernel):
    """What a worker calls for this kernel."""
    kind, found = load_blob(made.digest, made.blob)
    assert kind == made.kind
    return found


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(source) → a freshly imported module with that source."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = []

    def write(source: str):
        name = f"kernels_of_a_test_{tmp_path.name}_{len(names)}"
        (tmp_path / f"{name}.py").write_text(source)
        names.append(name)
        importlib.invalidate_caches()
        return importlib.import_module(name)
    yield write
    for name in names:
        sys.modules.pop(name, None)


def in_a_fresh_interpreter(source: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", source, *args], capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOAD_BLOB = """
import hashlib, sys
from rfaas_mpi import kernels
blob = open(sys.argv[1], "rb").read()
try:
    _, function = kernels.load_blob(hashlib.sha256(blob).digest(), blob)
    print(function(21))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


# --- staying callable here ----------------------------------------------------------

def test_a_kernel_is_still_the_function():
    assert doubled(4) == 8 and doubled(x=4) == 8
    assert (doubled.__name__, doubled.__doc__, doubled.__wrapped__(3)) == ("doubled", "Twice x.", 6)
    out = np.empty(2)
    added(np.ones(2), np.ones(2), out=out)
    assert out.tolist() == [2, 2]


def test_facts_about_kernels():
    assert (doubled.kind, doubled.name, doubled.wants_out) == (kernels.KIND_PYTHON, "doubled", False)
    assert (added.name, added.wants_out) == ("into", True)
    assert len(doubled.digest) == 32 and doubled.settled and doubled.fn(1) == 2
    assert kernel(doubled) is doubled and kernel(plain).fn is plain
    assert kernel(np.add).wants_out and not kernel(math.sqrt).wants_out


def test_what_is_no_kernel_is_refused():
    async def waits():
        pass

    def yields():
        yield 1
    for thing, says in ((3, "can't be called"), (waits, "coroutine"), (yields, "generator")):
        with pytest.raises(BadKernel, match=says):
            kernel(thing)
    with pytest.raises(TypeError):
        object_kernel(3)


# --- by reference -----------------------------------------------------------------------

def test_an_importable_kernel_travels_as_a_name():
    assert len(doubled.blob) < 500
    assert there(doubled) is doubled.fn
    assert there(object_kernel(plain)) is plain
    assert object_kernel(doubled).digest != doubled.digest, "a kind of its own is a kernel of its own"


def test_methods_of_classes_and_modules_are_importable(module):
    mod = module("class C:\n    @staticmethod\n    def f(x):\n        return x * 3\n")
    assert there(object_kernel(mod.C.f)) is mod.C.f
    assert b"f" in object_kernel(statistics.mean).blob and len(object_kernel(statistics.mean).blob) < 500


def test_a_module_that_was_edited_is_an_error_that_says_so(module, tmp_path):
    mod = module("from rfaas_mpi import kernel\n@kernel\ndef f(x):\n    return x * 2\n")
    blob = tmp_path / "blob"
    blob.write_bytes(mod.f.blob)
    assert in_a_fresh_interpreter(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + LOAD_BLOB, str(blob)) == "42"
    Path(mod.__file__).write_text("def f(x):\n    return x * 3\n")
    says = in_a_fresh_interpreter(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + LOAD_BLOB, str(blob))
    assert says.startswith("KernelChanged: module kernels_of_a_test")
    assert mod.__file__ in says and "edited" in says and "start the program again" in says
    assert mod.f(1) == 2, "the rank goes on with what it has"


def test_the_source_counts_as_it_was_when_the_kernel_was_made(module):
    mod = module("from rfaas_mpi import kernel\n@kernel\ndef f(x):\n    return x * 2\n")
    source = Path(mod.__file__).read_text()
    Path(mod.__file__).write_text(source + "# edited before the first use\n")
    blob = mod.f.blob
    sys.modules.pop(mod.__name__)
    kernels._sources.pop(mod.__name__)
    with pytest.raises(KernelChanged):
        load_blob(hashlib.sha256(blob).digest(), blob)


def test_a_module_that_the_rank_reloaded_is_reloaded_by_a_worker(module):
    mod = module("def f(x):\n    return x * 2\n")
    old = object_kernel(mod.f)
    here = kernels._sources[mod.__name__]
    Path(mod.__file__).write_text("def f(x):\n    return x * 3 + 0\n")
    importlib.reload(mod)
    new = object_kernel(mod.f)
    assert new.digest != old.digest
    # A worker that imported the module before.
    mod.__spec__ = here[0]
    kernels._sources[mod.__name__] = here
    assert there(new)(1) == 3


def test_two_modules_of_one_name_are_told_apart(module, tmp_path):
    mod = module("def f(x):\n    return x * 2\n")
    blob = tmp_path / "blob"
    blob.write_bytes(object_kernel(mod.f).blob)
    other = tmp_path / "other"
    other.mkdir()
    (other / f"{mod.__name__}.py").write_text("def f(x):\n    return x\n")
    says = in_a_fresh_interpreter(f"import sys; sys.path.insert(0, {str(other)!r})\n" + LOAD_BLOB, str(blob))
    assert "KernelChanged" in says and str(other) in says and mod.__file__ in says


def test_a_directory_that_the_rank_added_to_its_path_is_found(module, tmp_path):
    mod = module("def f(x):\n    return x * 2\n")
    blob = tmp_path / "blob"
    blob.write_bytes(object_kernel(mod.f).blob)
    assert in_a_fresh_interpreter(LOAD_BLOB, str(blob)) == "42"


def test_a_module_that_can_not_be_imported_there_is_named(module, tmp_path):
    mod = module("import sys\nassert not hasattr(sys, 'refuse'), 'only in the rank'\ndef f(x):\n    return x\n")
    blob = tmp_path / "blob"
    blob.write_bytes(object_kernel(mod.f).blob)
    says = in_a_fresh_interpreter("import sys; sys.refuse = 1\n" + LOAD_BLOB, str(blob))
    assert "BadKernel" in says and f"{mod.__name__}.f" in says and "only in the rank" in says


def test_a_module_that_the_node_lacks_is_named_with_the_node_and_where_it_was_looked_for(module, tmp_path):
    mod = module("import sys\nif hasattr(sys, 'far'):\n    import no_such_module\ndef f(x):\n    return x\n")
    blob = tmp_path / "blob"
    blob.write_bytes(object_kernel(mod.f).blob)
    says = in_a_fresh_interpreter("import sys; sys.far = 1\n" + LOAD_BLOB, str(blob))
    assert all(word in says for word in ("BadKernel", "no_such_module", socket.gethostname(), sys.executable,
                                         os.path.dirname(np.__path__[0])))


# --- by value -----------------------------------------------------------------------------

def made_in_main(source: str) -> dict:
    """What a script defines: functions whose module is `__main__`."""
    scope = {"__name__": "__main__"}
    exec(source, scope)
    return scope


def test_functions_of_main_travel_by_value_with_what_they_use():
    scope = made_in_main("import math\nn = 3\ndef helper(x):\n    return x + n\n"
                         "def f(x):\n    return math.sqrt(helper(x))\n")
    f = there(object_kernel(scope["f"]))
    assert f is not scope["f"] and f(13) == 4


def test_a_local_call_of_a_kernel_has_no_frame_of_ours_around_it():
    @kernel
    def caller():
        return sys._getframe(1)

    assert caller() is sys._getframe()


def test_a_kernel_that_calls_itself_or_another_one_travels():
    scope = made_in_main(
        "from rfaas_mpi import kernel\n"
        "@kernel\ndef fac(n):\n    return 1 if n < 2 else n * fac(n - 1)\n"
        "@kernel\ndef even(n):\n    return True if n == 0 else odd(n - 1)\n"
        "@kernel\ndef odd(n):\n    return False if n == 0 else even(n - 1)\n")
    assert there(scope["fac"])(5) == 120
    assert there(scope["even"])(10) is True


def test_lambdas_closures_and_partials_travel():
    base = 10
    for function, want in ((lambda x: x + base, 15), (functools.partial(operator.add, 3), 8), ("{:+d}".format, "+5"),
                           (functools.partial(lambda a, b: a * b, 4), 20), (math.factorial, 120), (float, 5.0)):
        assert there(object_kernel(function))(5) == want


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor

    def method(self, x):
        return x + self.factor


def test_a_callable_object_runs_as_it_is_at_the_call():
    scale = Scale(2)
    for function in (scale, scale.method):
        first = object_kernel(function)
        assert there(first)(5) in (10, 7)
        assert not first.settled, "an object may change at any time"
    scale.factor = 3
    assert there(object_kernel(scale))(5) == 15 and there(object_kernel(scale.method))(5) == 8


def test_an_unchanged_lambda_is_pickled_once():
    function = made_in_main("import math\nk = 3\nf = lambda x, y=(1, 2): math.floor(x) * k + y[0]")["f"]
    first = object_kernel(function)
    assert not first.settled, "it may be one of a million, and never come again"
    assert object_kernel(function) is first and first.settled


CHANGES = {
    "a global": ("k = 1\ndef f(x):\n    return x + k\n", "k = 2"),
    "a global of a helper": ("k = 1\ndef h(x):\n    return x + k\ndef f(x):\n    return h(x)\n", "k = 2"),
    "the helper": ("def h(x):\n    return x + 1\ndef f(x):\n    return h(x)\n", "def h(x):\n    return x + 2"),
    "a default": ("def f(x, k=1):\n    return x + k\n", "f.__defaults__ = (2,)"),
    "a keyword's default": ("def f(x, *, k=1):\n    return x + k\n", "f.__kwdefaults__ = {'k': 2}"),
    "the closure": ("def make():\n    k = 1\n    def f(x):\n        return x + k\n    def up():\n        nonlocal k\n"
                    "        k = 2\n    return f, up\nf, up = make()\n", "up()"),
    "the code": ("def f(x):\n    return x + 1\n", "f.__code__ = (lambda x: x + 2).__code__"),
    "a name that was missing": ("def f(x):\n    try:\n        return x + k\n    except NameError:\n"
                                "        return x + 1\n", "k = 2"),
    "inside a list": ("k = [1]\ndef f(x):\n    return x + k[0]\n", "k[0] = 2"),
    "inside an array": ("import numpy\nk = numpy.ones(1)\ndef f(x):\n    return x + k[0]\n", "k[0] = 2"),
    "an attribute": ("class C:\n    k = 1\ndef f(x):\n    return x + C.k\n", "C.k = 2"),
    "the function's own attribute": ("def f(x):\n    return x + f.k\nf.k = 1\n", "f.k = 2"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_submitted_function_refers_to_is_never_stale(what):
    source, change = CHANGES[what]
    scope = made_in_main(source)
    assert there(object_kernel(scope["f"]))(10) == 11
    assert there(object_kernel(scope["f"]))(10) == 11
    exec(change, scope)
    assert scope["f"](10) == 12
    assert there(object_kernel(scope["f"]))(10) == 12


def test_a_decorated_kernel_notices_names_that_were_bound_anew():
    scope = made_in_main("from rfaas_mpi import kernel\nk = 1\n@kernel\ndef f(x):\n    return x + k\n")
    before = scope["f"].digest
    assert scope["f"].digest == before
    scope["k"] = 2
    assert scope["f"].digest != before and there(scope["f"])(10) == 12


def test_new_callables_are_not_kept_for_ever():
    class Big:
        pass
    big = Big()
    gone = weakref.ref(big)
    object_kernel(functools.partial(print, big))
    del big
    gc.collect()
    assert gone() is None
    for number in range(1000):
        object_kernel(made_in_main(f"f = lambda x: x + {number}")["f"])
    assert len(kernels._objects) <= 256


def test_what_can_not_be_pickled_is_named_with_a_way_out():
    lock = threading.Lock()
    scope = {"__name__": "__main__", "lock": lock}
    exec("f = lambda: lock", scope)
    for function, names in ((lambda: lock, "closure's variable 'lock'"), (scope["f"], "global 'lock'"),
                            (functools.partial(print, lock), "argument 0"), (Scale(lock), "attribute 'factor'"),
                            (Scale(lock).method, "object it is a method of"),
                            (lambda x=lock: x, "default of a parameter")):
        with pytest.raises(BadKernel) as caught:
            object_kernel(function)
        assert names in str(caught.value) and "lock" in str(caught.value)
        assert "pass what it is made from as an argument" in caught.value.hint


# --- kernels as objects -----------------------------------------------------------------------

def test_kernels_can_be_pickled():
    assert pickle.loads(pickle.dumps(doubled)) is doubled
    scope = made_in_main("from rfaas_mpi import kernel\n@kernel(name='n')\ndef f(x, out):\n    out[...] = x\n")
    for again in (pickle.loads(pickle.dumps(scope["f"])), cloudpickle.loads(cloudpickle.dumps(scope["f"]))):
        assert (again.name, again.kind, again.wants_out) == ("n", kernels.KIND_PYTHON, True)
        out = np.zeros(2)
        again(np.ones(2), out)
        assert out.tolist() == [1, 1]
    echo = Kernel.from_library(LIBRARY, "rfm_echo")
    again = pickle.loads(pickle.dumps(echo))
    assert (again.kind, again.name, again.digest) == (echo.kind, echo.name, echo.digest)


def test_code_that_is_not_what_its_digest_says_is_refused():
    with pytest.raises(BadKernel, match="digest"):
        load_blob(doubled.digest, doubled.blob + b" ")
    with pytest.raises(BadKernel, match="digest"):
        load_blob(bytes(32), doubled.blob)


# --- native ----------------------------------------------------------------------------------------

def test_native_kernels_run_here_on_arrays():
    x = np.arange(6.0)
    out = np.empty(6)
    assert Kernel.from_library(LIBRARY, "rfm_scale2")(x, out=out) is out
    np.testing.assert_array_equal(out, 2 * x)
    echo = Kernel.from_library(LIBRARY, "rfm_plain_echo", abi="plain")
    assert echo.kind == kernels.KIND_PLAIN
    assert echo(np.arange(4, dtype="i4"), out=np.zeros(4, "i4")).tolist() == [0, 1, 2, 3]
    total, count = np.zeros(1), np.zeros(1, "i8")
    Kernel.from_library(LIBRARY, "rfm_sum")(x, x, out=(total, count))
    assert (total[0], count[0]) == (30, 12)


def test_native_failures_are_told_here_as_by_a_worker():
    x, out = np.arange(3, dtype="u1") + np.uint8(5), np.zeros(3, "u1")
    with pytest.raises(KernelError, match="rfm_bad_negative returned -5"):
        Kernel.from_library(LIBRARY, "rfm_bad_negative")(x, out=out)
    with pytest.raises(KernelError, match="wrote 4 bytes to output 0, which holds 3"):
        Kernel.from_library(LIBRARY, "rfm_bad_length")(x, out=out)
    assert Kernel.from_library(LIBRARY, "rfm_half").run((x,), (np.zeros(4, "u1"),)) == (2,)
    with pytest.raises(BadKernel, match="one input and one output"):
        Kernel.from_library(LIBRARY, "rfm_plain_echo", abi="plain")(x, x, out=out)
    with pytest.raises(BadKernel, match="contiguous"):
        Kernel.from_library(LIBRARY, "rfm_echo")(x, out=np.zeros((3, 2), "u1")[:, 0])


def test_black_scholes_agrees_with_the_formula():
    scipy_special = pytest.importorskip("scipy.special")
    rng = np.random.default_rng(7)
    n = 10_001
    spot, strike = rng.uniform(5, 200, n), rng.uniform(5, 200, n)
    rate, volatility, years = rng.uniform(0, .1, n), rng.uniform(.05, .9, n), rng.uniform(.05, 4, n)
    put = rng.integers(0, 2, n).astype(np.uint8)
    d1 = (np.log(spot / strike) + (rate + volatility ** 2 / 2) * years) / (volatility * np.sqrt(years))
    d2 = d1 - volatility * np.sqrt(years)
    sign = np.where(put, -1.0, 1.0)
    ndtr = scipy_special.ndtr
    want = sign * (spot * ndtr(sign * d1) - strike * np.exp(-rate * years) * ndtr(sign * d2))
    black_scholes = Kernel.from_library(LIBRARY, "rfm_black_scholes")
    got = black_scholes(spot, strike, rate, volatility, years, put, out=np.empty(n))
    # A price far below the spot is a difference of larger numbers, here and there.
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    together = np.stack([spot, strike, rate, volatility, years])
    np.testing.assert_array_equal(black_scholes(together, put, out=np.empty(n)), got)
    with pytest.raises(KernelError, match="returned -22"):
        black_scholes(spot, put, out=np.empty(n))


def test_loading_native_kernels_leaves_floating_point_alone():
    """gcc's start-up code for -ffast-math would switch denormals off for the whole process."""
    Kernel.from_library(LIBRARY, "rfm_echo")(np.ones(1), out=np.ones(1))
    assert np.array([1e-310])[0] * np.float64(0.5) > 0


def test_a_library_is_checked_before_it_travels(tmp_path):
    for path, symbol, abi, says in (
            (LIBRARY, "no_such", "rfm", "no function no_such.*it exports rfm_"),
            (LIBRARY, "rfm_echo", "c++", "'c\\+\\+' is no ABI"),
            (tmp_path / "missing.so", "f", "rfm", "can't be read: No such file"),
            (Path(__file__), "f", "rfm", "no ELF shared library"),
            (Path(sys.executable).resolve(), "f", "rfm", "can't be used|has no function f")):
        with pytest.raises(BadKernel, match=says):
            Kernel.from_library(path, symbol, abi=abi)


def built(tmp_path: Path, source: str, *flags: str, name: str = "k.c") -> Path:
    path = tmp_path / name
    path.write_text(source)
    library = path.with_suffix(".so")
    subprocess.run(["cc", "-shared", "-fPIC", f"-I{rfaas_mpi.get_include()}", *flags, "-o", str(library), str(path)],
                   check=True, timeout=60)
    return library


FILL = '#include <string.h>\n#include "rfm_call.h"\n' \
       "int32_t fill(const struct rfm_call *c)\n{\n    memset(c->outputs[0].ptr, %d, c->outputs[0].capacity);\n" \
       "    return 0;\n}\n"


def test_a_library_counts_as_it_was_when_it_was_read(tmp_path):
    first = Kernel.from_library(built(tmp_path, FILL % 1), "fill")
    second = Kernel.from_library(built(tmp_path, FILL % 2), "fill")
    (tmp_path / "k.so").unlink()
    assert first(out=np.zeros(2, "u1")).tolist() == [1, 1]
    assert second(out=np.zeros(2, "u1")).tolist() == [2, 2]
    assert first(out=np.zeros(2, "u1")).tolist() == [1, 1]


def test_hidden_and_foreign_symbols_are_explained(tmp_path):
    with pytest.raises(BadKernel, match="exports no function at all.*hidden"):
        Kernel.from_library(built(tmp_path, FILL % 1, "-fvisibility=hidden"), "fill")
    mangled = FILL.replace("fill", "_Z4fillPK8rfm_call") % 1
    with pytest.raises(BadKernel, match='extern "C"'):
        Kernel.from_library(built(tmp_path, mangled, name="cpp.c"), "fill")


def test_a_library_whose_own_libraries_are_missing_says_so(tmp_path):
    other = built(tmp_path, "int helper(void) { return 1; }\n", name="libhelper.c")
    library = built(tmp_path, '#include "rfm_call.h"\nint helper(void);\n'
                    "int32_t f(const struct rfm_call *c) { (void)c; return helper(); }\n",
                    f"-L{tmp_path}", "-Wl,--no-as-needed", "-lhelper", name="needs.c")
    other.unlink()
    with pytest.raises(BadKernel, match="libhelper.so.*link them statically"):
        Kernel.from_library(library, "f")(out=np.zeros(1))


def test_a_damaged_library_is_refused_not_followed():
    data = LIBRARY.read_bytes()
    rng = np.random.default_rng(3)
    for _ in range(200):
        broken = bytearray(data)
        for at in rng.integers(0, 64, 3):
            broken[at] = rng.integers(0, 256)
        try:
            native.check_symbol("broken.so", bytes(broken[:rng.integers(1, len(broken))]), "rfm_echo")
        except BadKernel as error:
            assert "broken.so" in str(error)


def test_a_library_is_unloaded_with_its_last_kernel(tmp_path):
    made = Kernel.from_library(built(tmp_path, FILL % 1, name="unloaded.c"), "fill")
    made(out=np.zeros(1, "u1"))
    assert "unloaded.so" in Path("/proc/self/maps").read_text()
    del made
    gc.collect()
    assert "unloaded.so" not in Path("/proc/self/maps").read_text()


# --- numba --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tripled():
    numba = pytest.importorskip("numba")

    @kernel
    @numba.cfunc("uint32(CPointer(float64), uint32, CPointer(float64))")
    def tripled(x, size, out):
        for i in range(size // 8):
            out[i] = 3 * x[i]
        return size
    return tripled


def test_a_numba_function_is_compiled_where_it_is_loaded(tripled):
    assert tripled.kind == kernels.KIND_PLAIN and tripled.name.endswith("tripled")
    assert tripled(np.arange(3.0), out=np.zeros(3)).tolist() == [0, 3, 6]
    found = there(tripled)
    assert found.address != tripled._origin.local().address
    assert found(np.arange(3.0), out=np.zeros(3)).tolist() == [0, 3, 6]


def test_a_numba_function_of_the_rfm_abi_and_one_of_neither():
    numba = pytest.importorskip("numba")
    assert kernel(numba.cfunc("int32(voidptr)")(lambda call: -3)).kind == kernels.KIND_NATIVE
    with pytest.raises(KernelError, match="returned -3"):
        kernel(numba.cfunc("int32(voidptr)")(lambda call: -3))(out=np.zeros(1))
    with pytest.raises(BadKernel, match="float64.*which no kernel has"):
        kernel(numba.cfunc("float64(float64)")(lambda x: x))


def test_a_worker_without_numba_says_what_to_install(tripled, monkeypatch):
    blob = kernels._NumbaBlob(tripled.fn or plain, None, {}, {})
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(BadKernel, match=r"needs numba.*rfaas_mpi\[numba\]"):
        blob.compile()


# --- calling Python kernels on arrays -------------------------------------------------------------------

def run(function, inputs, outputs):
    return kernel(function).run(inputs, outputs)


def test_results_go_to_out_by_parameter_or_by_return():
    x, y, out, second = np.arange(3.0), np.ones(3), np.zeros(3), np.zeros(())
    run(lambda a, b: a + b, (x, y), (out,))
    assert out.tolist() == [1, 2, 3]
    run(lambda a, out: np.multiply(a, 5, out=out), (x,), (out,))
    assert out.tolist() == [0, 5, 10]
    run(lambda a: (a - 1, a.sum()), (x,), (out, second))
    assert out.tolist() == [-1, 0, 1] and second == 3

    def both(a, out):
        out[0][...] = a
        out[1][...] = 7
    run(both, (x,), (out, second))
    assert out.tolist() == [0, 1, 2] and second == 7
    seen = []
    run(lambda a: seen.append(a.tolist()), (x,), ())
    assert seen == [[0, 1, 2]]


def test_inputs_are_read_only_and_scalars_are_scalars():
    def spoil(a):
        a[0] = 1
    x = np.zeros(2)
    with pytest.raises(ValueError, match="read-only"):
        run(spoil, (x,), (np.zeros(2),))
    assert x.tolist() == [0, 0] and x.flags.writeable
    kinds = []
    run(lambda n, s: kinds.append((type(n), type(s), n, s)), (np.array(3), np.array(0.5, "f4")), ())
    assert kinds == [(np.int64, np.float32, 3, 0.5)]


def test_a_bound_kernel_reads_its_inputs_anew_at_each_call():
    x, n, out = np.zeros(2), np.array(1), np.zeros(2)
    thunk = kernel(lambda a, k: a + k).bind((x, n), (out,))
    for value in range(3):
        x[:] = value
        n[...] = 10 * value
        thunk()
        assert out.tolist() == [11 * value] * 2


@pytest.mark.parametrize(("function", "out", "says"), [
    (lambda a: np.zeros(4), np.zeros(3), r"shape \(4,\) for its result.*output has \(3,\)"),
    (lambda a: a.sum(), np.zeros(3), r"shape \(\) for its result.*output has \(3,\)"),
    (lambda a: None, np.zeros(3), "returned None.*named out"),
    (lambda a: a + 0.5, np.zeros(3, int), "float64 for its result, which does not fit the output's int64"),
    (lambda a: 1 << 40, np.zeros((), "i4"), "does not fit the output's int32"),
    (lambda a: [[1], [1, 2]], np.zeros(3), "no array"),
    (lambda a: "text", np.zeros(()), "does not fit"),
    (lambda a, out: a * 2, np.zeros(3), "has a parameter out, but returned another array"),
])
def test_a_result_that_does_not_fit_is_a_kernel_error_with_both_facts(function, out, says):
    before = out.copy()
    with pytest.raises(KernelError, match=says):
        run(function, (np.arange(3.0),), (out,))
    np.testing.assert_array_equal(out, before)


def test_the_wrong_number_of_results_is_told():
    outs = (np.zeros(3), np.zeros(3))
    for function, says in ((lambda a: a, "one ndarray for 2 outputs"),
                           (lambda a: (a, a, a), "3 results for 2 outputs")):
        with pytest.raises(KernelError, match=says):
            run(function, (np.arange(3.0),), outs)
    with pytest.raises(KernelError, match=r"shape \(2,\) for result 1"):
        run(lambda a: (a, a[:2]), (np.arange(3.0),), outs)


def test_results_are_converted_where_nothing_is_lost():
    for result, out in ((3, np.zeros(1)), (True, np.zeros((), bool)), ([1, 2, 3], np.zeros(3)),
                        (np.arange(3), np.zeros(3, "f4")), (np.arange(3.0), np.zeros(3, "f4")),
                        (np.float64(2), np.zeros((1, 1))), (2, np.zeros((), "u1"))):
        run(lambda result=result: result, (), (out,))
        np.testing.assert_array_equal(out.ravel(), np.ravel(result))


def test_the_fabric_has_the_same_numbers():
    fabric = pytest.importorskip("rfaas_mpi.fabric")
    for name in ("KIND_PYTHON", "KIND_NATIVE", "KIND_PLAIN", "KIND_NUMBA", "KIND_OBJECT"):
        assert getattr(kernels, name) == getattr(fabric, name)
