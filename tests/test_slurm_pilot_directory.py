"""Where a pilot's files are: several of one user may begin at once on nodes that share a directory for them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from rfaas_mpi.slurm import filling, run


def test_pilots_that_begin_together_keep_nobody_out_of_what_is_his(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    name = f"rfaas-pilot-{os.geteuid()}"
    others = {number: run.private(tmp_path / f"{name}-{number}") for number in ("1", "2", "3")}
    for number in "23":
        os.utime(others[number], times=(0, 0))
    tried: list[Path] = []
    held = run.held

    def seen(path: Path) -> contextlib.AbstractContextManager[None]:
        tried.append(path)
        return held(path)

    with held(others["3"]):
        monkeypatch.setattr(run, "held", seen)
        with filling.pilot_directory("4") as own:
            assert others["1"] not in tried, "its pilot was just about to hold it, and would have ended"
            assert sorted(tmp_path.iterdir()) == [others["1"], others["3"], own]
    assert not own.exists()
