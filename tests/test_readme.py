"""The examples of README.md and docs/overlap.md run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_only_code(text, cwd):
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    command = [sys.executable, "-W", "error", "-c", code]
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}  # as users run it
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, cwd=cwd, env=env
    )  # not among the sources
    assert done.returncode == 0, done.stderr
    return code, done.stdout


def test_the_example_runs_and_is_at_most_25_lines(tmp_path):
    code, printed = run_only_code((ROOT / "README.md").read_text(), tmp_path)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    assert re.fullmatch(r"\(\d+, 128\) \(\d+, 128, 256\)\n", printed)


def test_the_overlap_of_two_batches_runs(tmp_path):
    _, printed = run_only_code((ROOT / "docs" / "overlap.md").read_text(), tmp_path)
    assert re.fullmatch(r"\(\d+, 32\)\n", printed)
