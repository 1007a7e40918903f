"""The README's example runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs_and_is_at_most_25_lines(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=tmp_path)  # not among the sources
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\(\d+, 128\) \(\d+, 128, 256\)\n", done.stdout)
