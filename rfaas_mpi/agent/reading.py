"""The library of csrc/agent/reading.c: what an agent does too often to do it in Python."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_double, c_int64, c_size_t, c_void_p
from pathlib import Path

__all__ = ["reading"]

reading = ctypes.CDLL(str(Path(__file__).with_name("_reading.so")))

reading.rfm_read_masks.argtypes = (c_char_p, c_void_p, c_size_t)
reading.rfm_read_ticks.argtypes = (c_void_p, c_void_p, c_void_p, c_size_t)
reading.rfm_quiet_sample.argtypes = (c_void_p, c_size_t, c_double, c_double, c_int64, c_int64, *[c_void_p] * 5)
for function in (reading.rfm_read_masks, reading.rfm_read_ticks, reading.rfm_quiet_sample):
    function.restype = c_int64
