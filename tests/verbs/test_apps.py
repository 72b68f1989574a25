"""Apps give the right answer over verbs, at sizes at which an emulated machine has done with them soon."""

from __future__ import annotations

from pathlib import Path

import pytest
import transports

APPS = Path(__file__).resolve().parents[2] / "apps"
# What numpy runs, or is there already: nothing has to be compiled.
SMALLEST = {
    "blackscholes": ("--options", "40000"),
    "matmul": ("--n", "64", "--kernel", "blas"),
    "jacobi": ("--n", "64", "--sweeps", "4", "--kernel", "numpy"),
    "transport": ("--histories", "4", "--batches", "16", "--generations", "6", "--skip", "2", "--sigma", "1",
                  "--kernel", "numpy"),
}


@pytest.mark.parametrize("name", SMALLEST)
def test_an_app_s_verdict_is_right_where_its_work_is_divided_over_verbs(nodes, name):
    from rfaas_mpi.bench.rounds import Rounds

    with transports.executor_over("verbs") as executor:
        # As the planner says, and all of it at the worker: so little is never worth while.
        for where in ("both", "workers"):
            app = Rounds(APPS / f"{name}.py", executor, where, rounds=1, arguments=SMALLEST[name])
            assert [app.run(turn)[1] for turn in app.turns] == ["", ""], where
            app.close()
