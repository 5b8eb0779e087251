"""Who may import what, how fast `--help` is, and what must not stand in a tracked file."""

from __future__ import annotations

import ast
import importlib
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SEARCH_ENGINES = {"ray", "optuna"}
SLOW_TO_IMPORT = {"torch", "torchvision", "ray", "optuna", "plotly", "pandas", "sklearn"}

# In acmds_tune: who imports Ray or Optuna at the top, and who may inside a function.
ENGINE_ROOMS = {"ray_backend.py", "samplers.py", "storage.py", "study.py", "trainable.py"}
LAZY_ENGINE_ROOMS = ENGINE_ROOMS | {"report.py", "doctor.py", "cli.py"}

HELP_LIMIT_S = 1.0
COMMANDS = {"acmds-train": "acmds_optimizer.cli", "acmds-tune": "acmds_tune.cli"}


def python_files(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no Python files under {package}"
    return files


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every absolute import in a file: its full dotted name, and whether importing the file leaves it undone.

    It does for an import inside a function, and for one that only the type checker reads.
    """

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", lazy) for alias in node.names if node.level == 0)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in node.body:
                yield from visit(statement, True)
            for statement in node.orelse:
                yield from visit(statement, lazy)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def top_package(name: str) -> str:
    return name.split(".")[0]


def offenders(package: str, forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in python_files(package)
        for name, _ in imports(path)
        if top_package(name) in forbidden
    ]


def run_python(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def modules_after(statement: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after `statement`."""
    return set(run_python(f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})").split())


def test_imports_are_told_apart_by_whether_importing_the_file_runs_them(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text(
        "if 1:\n    import ray.tune as t\n"
        "def f():\n    from optuna import trial\n"
        "if TYPE_CHECKING:\n    import optuna\nelse:\n    import ray\n"
        "from . import near\n"
    )
    assert list(imports(file)) == [("ray.tune", False), ("optuna.trial", True), ("optuna", True), ("ray", False)]


def test_the_trainer_names_neither_ray_nor_optuna_nor_the_tuner() -> None:
    assert offenders("acmds_optimizer", SEARCH_ENGINES | {"acmds_tune"}) == []


def test_importing_the_trainer_loads_neither_ray_nor_optuna_nor_the_tuner() -> None:
    loaded = modules_after("import acmds_optimizer; acmds_optimizer.ACMDSTrainer")
    assert "torch" in loaded
    assert not loaded & (SEARCH_ENGINES | {"acmds_tune"})


def test_in_the_tuner_few_files_import_ray_or_optuna_and_the_others_only_inside_functions() -> None:
    wrong = []
    for path in python_files("acmds_tune"):
        for name, lazy in imports(path):
            allowed = LAZY_ENGINE_ROOMS if lazy else ENGINE_ROOMS
            if top_package(name) in SEARCH_ENGINES and path.name not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}: {name}{' (lazily)' if lazy else ''}")
    assert wrong == []


def test_the_rule_of_the_controller_imports_no_torch_clock_or_files() -> None:
    law = ROOT / "acmds_optimizer" / "memory" / "law.py"
    forbidden = {"torch", "time", "datetime", "os", "pathlib", "io", "random", "logging"}
    assert [name for name, _ in imports(law) if top_package(name) in forbidden] == []


def test_only_the_memory_room_of_the_trainer_reads_or_caps_device_memory() -> None:
    calls = re.compile(
        r"\b(mem_get_info|memory_stats\w*|memory_reserved|memory_allocated|max_memory_\w+|reset_peak_memory_stats"
        r"|set_per_process_memory_fraction)\b"
    )
    wrong = []
    for path in python_files("acmds_optimizer"):
        if path.parent.name == "memory":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and calls.fullmatch(node.attr):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.attr}")
    assert wrong == []


@pytest.mark.parametrize("module", ["acmds_optimizer.config", "acmds_optimizer.errors", "acmds_tune.space_load"])
def test_modules_that_the_command_lines_need_at_once_load_nothing_slow(module: str) -> None:
    assert not modules_after(f"import {module}") & SLOW_TO_IMPORT


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_within_a_second_and_imports_nothing_slow(command: str) -> None:
    code = f"""
import sys
sys.argv = ["{command}", "--help"]
from {COMMANDS[command]} import main
try:
    code = main()
except SystemExit as end:
    code = end.code
print("exit code:", code or 0)
print("loaded:", *{{name.split(".")[0] for name in sys.modules}})
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    help_text, loaded = run_python(code).split("loaded:")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # on a busy machine too
    assert "usage: " + command in help_text.replace("Usage", "usage")
    assert "exit code: 0" in help_text
    assert not set(loaded.split()) & SLOW_TO_IMPORT
    assert seconds < HELP_LIMIT_S


def test_the_commands_of_the_distribution_exist() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert set(scripts) == set(COMMANDS)
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_no_tracked_file_names_a_package_registry_or_a_path_of_one_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there are no tracked files to read")
    # written so that this file does not match itself
    hosts = "|".join(["pypi[.]org", "pythonhosted[.]org", "npmjs[.]org", "debian[.]org", "download[.]pytorch[.]org"])
    pattern = re.compile(rf"(?<![\w.])/(?:opt|work|root)/|{hosts}".encode())
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    wrong = []
    for name in filter(None, listed.decode().split("\0")):
        path = ROOT / name
        if not path.is_file():  # deleted and not yet committed
            continue
        content = path.read_bytes()
        if b"\0" in content[:8192]:  # a picture, or Parquet
            continue
        wrong += [f"{name}: {match.group().decode()}" for match in pattern.finditer(content)]
    assert wrong == []
