"""What may import what, and what an import may do."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT

CORE_MAY_IMPORT = {"torch", "numpy", "PIL", "safetensors", "jaxtyping", "ddpm_core", *sys.stdlib_module_names}
SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for package in ("ddpm_core", "jobs", "serve")
    for path in sorted((ROOT / package).rglob("*.py"))
}
ENTRY_POINTS = [
    path
    for path, tree in SOURCES.items()
    if path.startswith("jobs/") and any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
]


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(package: str) -> Iterator[tuple[str, str]]:
    """(file, module) of every absolute import in a package; `from a import b` gives a and a.b."""
    for path, tree in SOURCES.items():
        for node in ast.walk(tree) if path.startswith(f"{package}/") else ():
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                yield path, node.module
                yield from ((path, f"{node.module}.{alias.name}") for alias in node.names)


def importing(package: str, *forbidden: str) -> list[tuple[str, str]]:
    return [found for found in imports(package) if found[1].partition(".")[0] in forbidden]


def test_the_core_stands_on_five_libraries() -> None:
    assert [found for found in imports("ddpm_core") if found[1].partition(".")[0] not in CORE_MAY_IMPORT] == []


def test_jobs_and_serve_do_not_know_each_other() -> None:
    assert importing("jobs", "serve") == []
    assert importing("serve", "jobs") == []


def test_serve_imports_itself_relatively() -> None:
    """`import serve` would read like Ray's library of that name."""
    assert importing("serve", "serve") == []


def test_ray_libraries_are_written_in_full() -> None:
    """`from ray import train, data` would read like `jobs.train` and `jobs.data`."""
    short = [
        (path, alias.name)
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "ray"
        for alias in node.names
    ]
    assert short == []


def test_no_python_in_cluster_and_no_packages_in_tests() -> None:
    assert list((ROOT / "cluster").rglob("*.py")) == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: everything but the bodies of functions."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_import(child)


def test_no_module_reads_the_environment_when_imported() -> None:
    readers = {"environ", "getenv"}
    found = [
        path
        for path, tree in SOURCES.items()
        for node in at_import(tree)
        if isinstance(node, ast.Attribute) and node.attr in readers and not is_main_guard(tree, node)
    ]
    assert found == []


def is_main_guard(tree: ast.Module, node: ast.AST) -> bool:
    """Whether `node` is below `if __name__ == "__main__"`, which an import does not run."""
    guards = [part for part in tree.body if isinstance(part, ast.If) and "__main__" in ast.unparse(part.test)]
    return any(node is inner for guard in guards for inner in ast.walk(guard))


def test_importing_everything_starts_nothing() -> None:
    code = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "import ray, torch\n"
        "print(ray.is_initialized(), torch.cuda.is_initialized())"
    )
    names = json.dumps([module_name(path) for path in SOURCES])
    command = [sys.executable, "-W", "ignore", "-c", code, names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "False False\n"), done.stderr


@pytest.mark.parametrize("path", ENTRY_POINTS)
def test_every_command_lists_its_options(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    main: Any = importlib.import_module(module_name(path)).main
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code in (0, None)
    assert f"usage: python -m {module_name(path)}" in capsys.readouterr().out
