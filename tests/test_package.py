"""What gets installed: the wheel holds every room, stands without the checkout, and starts without torch."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("configs", "datasets", "leaderboard", "tasks", "zoo")
NOT_SHIPPED = ("leaderboard/site/",)


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Files of the repository, without the tests and dot folders."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [Path(name) for name in listed.split("\0") if name]
    return [p for p in paths if p.parts[0] != "tests" and not p.parts[0].startswith(".") and (ROOT / p).is_file()]


@pytest.fixture(scope="module")
def wheel(tracked: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the tracked files, built in a copy so that the checkout stays clean."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for path in tracked:
        (copy / path.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, copy / path)
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy, cwd=copy)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a fresh environment with the wheel; this environment lends it the dependencies."""
    home = tmp_path_factory.mktemp("venv")
    _run(sys.executable, "-m", "venv", "--without-pip", home)
    python = home / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    # Unlike PYTHONPATH or a site folder, a path in a .pth file does not run the .pth files in it, so the editable
    # install of the checkout stays out.
    folders = [entry for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}]
    site = next(home.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text("\n".join(folders))
    return home / "bin"


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_wheel_holds_all_code_and_data_of_the_rooms(tracked: list[Path], wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    # Per-unit scores are large and only `leaderboard run` needs them.
    scores = {p for p in tracked if p.parts[:2] == ("leaderboard", "results") and p.suffix == ".parquet"}
    expected = {p for p in tracked if p.suffix == ".py" or p.parts[0] in ROOMS or p.name == "py.typed"} - scores
    missing = sorted(
        path.as_posix()
        for path in expected
        if not path.as_posix().startswith(NOT_SHIPPED) and f"moezoo/{path.as_posix()}" not in names
    )
    assert not missing, "name its folder under `packages` or `package-data` in pyproject.toml"


def test_wheel_takes_no_other_name_in_site_packages(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"moezoo"}
    assert not any(name.startswith("moezoo/tests/") for name in zipfile.ZipFile(wheel).namelist())


def test_every_module_imports_from_the_wheel(tracked: list[Path], installed: Path, tmp_path: Path) -> None:
    modules = sorted(_module(path) for path in tracked if path.suffix == ".py")
    code = "import importlib, sys; [print(importlib.import_module(name).__file__) for name in sys.argv[1:]]"
    files = _run(installed / "python", "-c", code, *modules, cwd=tmp_path).splitlines()
    assert len(files) == len(modules)
    assert all(Path(file).is_relative_to(installed.parent) for file in files)


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(["moezoo", *(parts[:-1] if parts[-1] == "__init__" else parts)])


def test_commands_run_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    assert "usage: moezoo" in _run(installed / "moezoo", "--help", cwd=tmp_path)
    assert "ranking/awmoe" in _run(installed / "moezoo", "list", cwd=tmp_path)
    shown = _run(installed / "moezoo", "show", "ranking/awmoe", cwd=tmp_path)
    assert shown == (ROOT / "configs/ranking/awmoe.yaml").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "code",
    [
        "import moezoo; dir(moezoo); moezoo.list_recipes()",
        "from moezoo.cli import main; main(['--help'])",
        "from moezoo.cli import main; main(['list'])",
        "from moezoo.cli import main; main(['show', 'ranking/awmoe'])",
        "from moezoo.cli import main; main(['fit', '--config', 'ranking/no_such_recipe'])",
        "import moezoo.leaderboard.report",
    ],
)
def test_light_commands_import_no_torch(code: str, tmp_path: Path) -> None:
    heavy = "{'torch', 'pytorch_lightning', 'torchmetrics', 'huggingface_hub'} & set(sys.modules)"
    out = _run(sys.executable, "-c", f"import sys; {code}; print(sorted({heavy}))", cwd=tmp_path)
    assert out.splitlines()[-1] == "[]"


def test_core_imports_torch_and_jaxtyping_alone() -> None:
    graph = grimp.build_graph("moezoo", include_external_packages=True, cache_dir=None)
    core = {"moezoo.zoo.core", *graph.find_descendants("moezoo.zoo.core")}
    imported = set().union(*(graph.find_modules_directly_imported_by(module) for module in core)) - core
    assert "torch" in imported
    assert imported - sys.stdlib_module_names <= {"torch", "jaxtyping", "triton"}
    # Triton comes with torch, but not on every platform: no import but that of the kernels may need it.
    kernels = {module for module in core if "triton" in graph.find_modules_directly_imported_by(module)}
    assert kernels == {"moezoo.zoo.core.grouped_triton"}
    code = "import sys, moezoo.zoo.core; sys.exit('triton.language' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
