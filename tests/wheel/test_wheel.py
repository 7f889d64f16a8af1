"""The wheel, in environments of its own: `uv run pytest -n 0 -m wheel`. It needs uv and a package index."""

import functools
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

import rate_limiter

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "rate_limiter"
EXAMPLES = ROOT / "examples"


def run(*command, cwd, check=True):
    """Run a command where nothing of the checkout is on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def uv(tmp_path_factory):
    """Return what runs uv."""
    command = os.environ.get("UV") or shutil.which("uv")
    assert command, "uv is not installed"
    return functools.partial(run, command, cwd=tmp_path_factory.mktemp("uv"))


@pytest.fixture(scope="module")
def wheel(uv, tmp_path_factory):
    """Build the source archive, and the wheel from that."""
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "--out-dir", folder, ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel):
    """Return the metadata, which end with the README."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(
            next(name for name in archive.namelist() if name.endswith("/METADATA"))
        ).decode()


@pytest.fixture(scope="module")
def environment(uv, wheel, tmp_path_factory):
    """Return what installs the wheel with some extras, and other packages, and returns the Python there."""

    @functools.cache
    def install(extras, *others):
        folder = tmp_path_factory.mktemp("environment")
        uv("venv", folder)
        python = folder / "bin" / "python"
        uv("pip", "install", "--python", python, f"{wheel}[{extras}]", *others)
        return python

    return install


def test_contents(wheel):
    """It has all files of the package, ``py.typed`` and the Lua script too; no ``src``, and no tests."""
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {PACKAGE / "py.typed", PACKAGE / "redis_bucket.lua"} <= files
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {str(path.relative_to(PACKAGE.parent)) for path in files}


def test_description(uv, wheel, metadata):
    """A package index can render it, and each of its links leads somewhere from there too."""
    uv(
        "tool",
        "run",
        "twine",
        "check",
        "--strict",
        wheel,
        wheel.with_name(wheel.name.split("-py3")[0] + ".tar.gz"),
    )
    links = re.findall(r"\]\(([^)\s]*)", metadata)
    assert {link for link in links if not link.startswith(("https://", "#"))} == set()
    (repository,) = re.findall(r"^Project-URL: Repository, (.*)$", metadata, re.MULTILINE)
    files = [
        match
        for link in links
        if (match := re.fullmatch(rf"{repository}/(?:raw|blob)/main/([^#]*)(?:#.*)?", link))
    ]
    assert files
    assert [match[0] for match in files if not (ROOT / match[1]).exists()] == []


def test_version(environment, metadata):
    """The metadata say the version that the code says."""
    code = "import importlib.metadata, rate_limiter; print(rate_limiter.__version__, rate_limiter.__file__)"
    version, file = run(environment(""), "-c", code, cwd=ROOT / "tests").stdout.split()
    assert version == rate_limiter.__version__
    assert f"\nVersion: {version}\n" in metadata
    assert ROOT not in Path(file).parents


def test_the_core_alone(uv, environment, tmp_path):
    """Without an extra nothing else is installed, and the core and its clock for tests are there."""
    python = environment("")
    installed = json.loads(uv("pip", "list", "--format", "json", "--python", python).stdout)
    assert [package["name"] for package in installed] == ["celery-token-bucket"]
    code = "import rate_limiter.testing as testing; print(rate_limiter.TokenBucket(1, 1).allow())"
    assert run(python, "-c", f"import rate_limiter; {code}", cwd=tmp_path).stdout == "True\n"


@pytest.mark.parametrize(
    ("module", "extra", "missing"),
    [
        ("celery", "celery", "celery"),
        ("kombu", "kombu", "kombu"),
        ("redis_bucket", "redis", "redis"),
        ("otel", "otel", "opentelemetry"),
    ],
)
def test_an_extra_that_is_missing(environment, tmp_path, module, extra, missing):
    """The error of an import names the extra that brings what is missing."""
    done = run(environment(""), "-c", f"import rate_limiter.{module}", cwd=tmp_path, check=False)
    assert done.stderr.splitlines()[-1] == (
        f"""ModuleNotFoundError: No module named '{missing}': pip install "celery-token-bucket[{extra}]\""""
    )


def test_a_celery_that_is_too_old(environment, tmp_path):
    """Nothing but an extra asks for a version, so the import does too."""
    done = run(
        environment("", "celery==5.4.0"), "-c", "import rate_limiter.celery", cwd=tmp_path, check=False
    )
    assert done.stderr.splitlines()[-1] == (
        "ImportError: celery 5.4 is too old, needed is 5.5 or newer: "
        'pip install "celery-token-bucket[celery]"'
    )


def test_the_extra_redis(environment, tmp_path):
    """A bucket in Redis works without Celery. Its script is in the wheel."""
    code = "from rate_limiter.redis_bucket import RedisTokenBucket as R; R('a', 1, 1, url='redis://localhost')"
    run(environment("redis"), "-c", code, cwd=tmp_path)


def test_kombu_without_celery(environment, tmp_path):
    """A plain kombu consumer with limits runs where no Celery is installed."""
    python = environment("kombu")
    assert run(python, "-c", "import celery", cwd=tmp_path, check=False).returncode
    done = run(python, EXAMPLES / "kombu_consumer" / "consumer.py", cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "Every limit was held."


def test_celery(environment, tmp_path):
    """The quickstart runs with the extra ``celery`` alone, and ``celery limits`` is there."""
    python = environment("celery")
    done = run(python, EXAMPLES / "quickstart.py", cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "Every limit was held."
    command = (python.with_name("celery"), "--workdir", EXAMPLES, "-A", "emails", "limits", "check")
    assert run(*command, cwd=tmp_path).stdout == "All limits are well: 1.\n"


def test_types(environment, tmp_path):
    """Mypy and pyright, strict, find nothing in a user's file. It has every public name."""
    checkers = ("mypy", "pyright[nodejs]", "celery-types", "pytest")
    python = environment("celery,cli,kombu,otel,redis", *checkers)
    file = shutil.copy(Path(__file__).with_name("user.py"), tmp_path)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    run(python, "-m", "mypy", "--strict", file, cwd=tmp_path)
    run(python, "-m", "pyright", "--pythonpath", python, file, cwd=tmp_path)
