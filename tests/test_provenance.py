"""provenance.py: results name the sources that they are of, also in a copy whose git knows an older commit."""

import subprocess

import provenance
import pytest


@pytest.fixture
def repository(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    git("init", "-q")
    (tmp_path / ".gitignore").write_text("build\n")
    (tmp_path / "kernel.cu").write_text("old")
    git("add", "-A")
    git("commit", "-qm", "old")
    return tmp_path, lambda *arguments: git(*arguments).strip()


def test_a_checkout_says_what_has_changed(repository, monkeypatch):
    monkeypatch.delenv("JAX_EP_COMMIT", raising=False)
    root, git = repository
    assert provenance.sources(root) == {"commit": git("rev-parse", "--short=12", "HEAD"), "dirty": False}
    (root / "kernel.cu").write_text("new")
    assert provenance.sources(root)["dirty"]


def test_a_copy_is_compared_with_the_tree_that_is_named(repository, monkeypatch):
    root, git = repository
    old = git("rev-parse", "HEAD")
    (root / "kernel.cu").write_text("new")
    git("commit", "-qam", "new")
    new, tree = git("rev-parse", "--short=12", "HEAD"), git("rev-parse", "HEAD^{tree}")
    git("reset", "-q", "--soft", old)  # as in a copy of the files with the git of before
    monkeypatch.setenv("JAX_EP_COMMIT", new)
    assert provenance.sources(root) == {"commit": new, "dirty": True}
    monkeypatch.setenv("JAX_EP_COMMIT", f"{new}:{tree}")
    assert provenance.sources(root) == {"commit": new, "dirty": False}
    (root / "build").write_text("what git ignores is no source")
    assert not provenance.sources(root)["dirty"]
    index = git("diff", "--cached", "--name-only")
    (root / "kernel.cu").write_text("newer")
    assert provenance.sources(root)["dirty"]
    assert git("diff", "--cached", "--name-only") == index, "the index stays as it is"
