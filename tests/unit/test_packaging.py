"""The package as such: both its names, what it imports, what is shipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rate_limiter

ROOT = Path(__file__).parents[2]


def run(code, *path):
    """Run the code in a new interpreter, in which only these directories are added to the path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


SHORT = """
from rate_limiter.token_bucket import TokenBucket
from rate_limiter.exceptions import RateLimitExceeded
"""
LONG = SHORT.replace("from ", "from src.")
SAME = """
import sys, rate_limiter, rate_limiter.celery, src.rate_limiter, src.rate_limiter.celery
assert rate_limiter is src.rate_limiter
assert rate_limiter.TokenBucket is src.rate_limiter.token_bucket.TokenBucket is TokenBucket
assert rate_limiter.RateLimitExceeded is RateLimitExceeded
assert rate_limiter.__version__ == src.rate_limiter.__version__ > "0"
assert src.rate_limiter.exceptions.RateLimitExceeded is RateLimitExceeded
assert rate_limiter.celery.throttle is src.rate_limiter.celery.throttle
names = [name for name in sys.modules if name.startswith("rate_limiter")]
assert all(sys.modules["src." + name] is sys.modules[name] for name in names)
"""


@pytest.mark.parametrize("first", [[SHORT, LONG], [LONG, SHORT]], ids=["short first", "long first"])
@pytest.mark.parametrize("path", [[ROOT], [ROOT, ROOT / "src"]], ids=["checkout", "installed too"])
def test_two_names_for_one_thing(first, path):
    """Both names give the same modules and classes, whichever is imported first, installed or not."""
    if path == [ROOT] and first[0] == SHORT:
        first = ["import src", *first]  # there is no short name before that
    done = run("\n".join([*first, SAME]), *path)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def stale(tmp_path):
    """Return a directory in which an old copy of the package is installed."""
    (tmp_path / "rate_limiter").mkdir()
    (tmp_path / "rate_limiter" / "__init__.py").write_text("")
    return tmp_path


def test_stale_copy_that_is_in_use(stale):
    """A copy that was imported from elsewhere is not passed off as the checkout: both are named."""
    done = run("import rate_limiter, src.rate_limiter", stale, ROOT)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ImportError: ")
    assert str(ROOT / "src") in error
    assert str(stale / "rate_limiter" / "__init__.py") in error


def test_stale_copy_that_is_not_in_use(stale):
    """A copy that lies about does not get in front of the checkout."""
    done = run(
        "from src.rate_limiter import TokenBucket; import rate_limiter; print(rate_limiter.__file__)",
        stale,
        ROOT,
    )
    assert Path(done.stdout.strip()).parent == ROOT / "src" / "rate_limiter", done.stderr


@pytest.mark.parametrize("module", ["rate_limiter", "rate_limiter.testing", "rate_limiter.bucket"])
def test_the_core_imports_nothing(module):
    """The core is of use without Celery, kombu or Redis, and does not load them."""
    done = run(
        f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})",
        ROOT / "src",
    )
    loaded = set(done.stdout.split())
    assert "rate_limiter" in loaded, done.stderr
    assert not loaded & {"celery", "kombu", "redis", "billiard", "amqp", "gevent"}


def test_what_is_shipped():
    """Type checkers find ``py.typed``, and ``__all__`` names what is there."""
    package = Path(rate_limiter.__file__).parent
    assert package == ROOT / "src" / "rate_limiter"
    assert (package / "py.typed").is_file()
    assert {"Bucket", "RateLimitExceeded", "TokenBucket"} <= set(rate_limiter.__all__)
    assert all(hasattr(rate_limiter, name) for name in rate_limiter.__all__)
