# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
# cython: cdivision=True
"""The Cython layer over csrc: one error gate, one owner for each resource.

This file is the compile root; each concept is a chapter of its own.
"""

cimport cython
from cpython.buffer cimport (PyBUF_FULL_RO, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo,
                             PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer)
from cpython.exc cimport PyErr_CheckSignals
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport errno
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from libcpp cimport bool as cbool

from rfaas_mpi.fabric cimport librfm as c

import os

from rfaas_mpi import errors

__all__ = [
    "BAD_KERNEL", "BUSY", "Block", "Board", "CANCELLED", "Calls", "Channel", "Invoker", "KERNEL_ERROR",
    "KIND_NATIVE", "KIND_NUMBA", "KIND_OBJECT", "KIND_PLAIN", "KIND_PYTHON", "KernelRef",
    "LARGE", "LOST", "NO_ROOM", "NO_WORKER", "OK", "PENDING", "Request", "TIMEOUT", "Worker",
    "bench_roundtrips", "bench_throughput", "load_verbs", "monotonic_ns", "start_all", "transports",
    "verbs_report", "wait_all", "wait_any",
]

PENDING = c.RFM_PENDING
OK = c.RFM_DONE
KERNEL_ERROR = c.RFM_KERNEL_ERROR
BAD_KERNEL = c.RFM_BAD_KERNEL
LARGE = c.RFM_LARGE
LOST = c.RFM_LOST
TIMEOUT = c.RFM_TIMED_OUT
CANCELLED = c.RFM_CANCELLED
NO_WORKER = c.RFM_NO_WORKER
BUSY = c.RFM_BUSY
NO_ROOM = c.RFM_NO_ROOM

KIND_PYTHON = 1
KIND_NATIVE = 2
KIND_PLAIN = 3
KIND_NUMBA = 4
KIND_OBJECT = 5

include "gate.pxi"
include "transports.pxi"
include "memory.pxi"
include "invoker.pxi"
include "request.pxi"
include "wait.pxi"
include "board.pxi"
include "calls.pxi"
include "worker.pxi"
