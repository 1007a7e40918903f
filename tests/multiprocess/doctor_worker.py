"""The doctor in a job of two processes, for test_doctor.py."""

import contextlib
import io

from jax_ep._src import compat, doctor


def run(*flags):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = doctor.main(["doctor", "--json", *flags])
    return {"code": code, "out": out.getvalue()}


def all_run_it():
    return run()


def one_runs_it():
    return run("--timeout=1") if compat.distributed_process()[0] == 0 else None
