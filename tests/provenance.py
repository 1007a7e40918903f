"""Which sources a result is of: for the records of tests and benchmarks.

JAX_EP_COMMIT=COMMIT:TREE names them where git does not know the commit, as in a copy of the working tree on another machine; TREE is
`git rev-parse COMMIT^{tree}`. With JAX_EP_COMMIT=COMMIT alone the copy's own git says what has changed since its HEAD.
"""

import os
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def sources(root=ROOT):
    """The commit, and whether the files that git tracks, or would, are others than its."""
    named, _, tree = os.environ.get("JAX_EP_COMMIT", "").partition(":")
    commit = named or git(root, "rev-parse", "--short=12", "HEAD")
    changed = tree_of(root) != tree if tree else bool(git(root, "status", "--porcelain", "--untracked-files=no"))
    return {"commit": commit, "dirty": changed}


def tree_of(root):
    """The hash of a tree of the files as they are; the index stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        index = os.environ | {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        git(root, "add", "--all", ".", env=index)
        return git(root, "write-tree", env=index)


def git(root, *arguments, env=None):
    """What it prints; None where it fails."""
    result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False, env=env)
    return result.stdout.strip() if result.returncode == 0 else None
