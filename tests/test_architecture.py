"""What may import what, and what an import may do."""

import ast
import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import COMMANDS, ROOT

CORE_MAY_IMPORT = {"torch", "numpy", "PIL", "safetensors", "jaxtyping", "ddpm_core", *sys.stdlib_module_names}
MORE = {
    "ddpm_core/storage.py": {"pyarrow", "s3fs"},
    "ddpm_core/step_loop.py": {"greenlet"},
    "ddpm_core/images.py": {"pillow_heif"},
    "ddpm_core/kernels.py": {"triton"},
}
PACKAGES: dict[str, set[str]] = {
    "common": set(),
    "inventory": {"common"},
    "verification": {"common"},
    "reports": {"common"},
    "datasets": {"common"},
    "translation": {"datasets", "reports", "common"},
    "training": {"datasets", "reports", "common"},
    "evaluation": {"translation", "datasets", "reports", "common"},
    "tuning": {"training", "evaluation", "translation", "datasets", "reports", "common"},
    "suite": {"evaluation", "translation", "datasets", "reports", "common"},
    "benchmarks": {"tuning", "training", "evaluation", "translation", "datasets", "reports", "common", "commands"},
}
"""What each package of `jobs` may import of the others; a package stands below those that import it."""
RAY_LIBRARIES = {
    "ray.train": {"training", "tuning"},
    "ray.tune": {"tuning"},
    "optuna": {"tuning"},
    "ray.data": {"common"},
}
"""Which packages of `jobs` use which library, benchmarks aside."""


@functools.cache
def sources() -> dict[str, ast.Module]:
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for package in ("ddpm_core", "jobs", "serve")
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(package: str) -> Iterator[tuple[str, str]]:
    """(file, module) of every absolute import in a package; `from a import b` gives a and a.b."""
    for path, tree in sources().items():
        for node in ast.walk(tree) if path.startswith(f"{package}/") else ():
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                yield path, node.module
                yield from ((path, f"{node.module}.{alias.name}") for alias in node.names)


def importing(package: str, *forbidden: str) -> list[tuple[str, str]]:
    return [found for found in imports(package) if found[1].partition(".")[0] in forbidden]


def package_of(module: str) -> str:
    """The package of `jobs` that a module belongs to; "commands" for the entry points."""
    parts = module.split(".")
    return "commands" if parts[1] in COMMANDS else parts[1]


def test_the_core_stands_on_five_libraries() -> None:
    found = [
        (path, name)
        for path, name in imports("ddpm_core")
        if name.partition(".")[0] not in CORE_MAY_IMPORT | MORE.get(path, set())
    ]
    assert found == []


def test_at_the_top_of_jobs_are_commands_and_nothing_else() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == {*COMMANDS, "__init__"}
    assert {path.name for path in (ROOT / "jobs").iterdir() if (path / "__init__.py").exists()} == set(PACKAGES)
    entry_points = [
        path
        for path, tree in sources().items()
        if path.startswith("jobs/")
        and any(isinstance(each, ast.FunctionDef) and each.name == "main" for each in tree.body)
    ]
    assert sorted(entry_points) == sorted(f"jobs/{name}.py" for name in COMMANDS)


def test_packages_import_what_stands_below_them() -> None:
    found = [
        (path, name)
        for path, name in imports("jobs")
        if name.startswith("jobs.")
        and package_of(module_name(path)) != "commands"
        and package_of(name) not in PACKAGES[package_of(module_name(path))] | {package_of(module_name(path))}
    ]
    assert found == []
    for package, below in PACKAGES.items():  # no circles
        for other in below - {"commands"}:
            assert package not in PACKAGES[other], (package, other)


def test_commands_do_not_import_commands() -> None:
    found = [
        (path, name)
        for path, name in imports("jobs")
        if name.startswith("jobs.")
        and package_of(name) == "commands"
        and package_of(module_name(path)) == "commands"
        and name != module_name(path)
    ]
    assert found == []


def test_no_module_imports_in_circles() -> None:
    """At import time; an import within a function may go up again."""
    below: dict[str, set[str]] = {}
    for path, tree in sources().items():
        names = [
            name
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        ]
        below[module_name(path)] = {name for name in names if name != module_name(path)}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " → ".join([*above, module])
        if module in below and module not in done:
            for name in sorted(below[module]):
                visit(name, (*above, module))
            done.add(module)

    for module in below:
        visit(module, ())


def test_rays_libraries_stay_in_their_packages() -> None:
    found = [
        (path, name)
        for path, name in imports("jobs")
        for library, packages in RAY_LIBRARIES.items()
        if (name == library or name.startswith(f"{library}."))
        and package_of(module_name(path)) not in packages | {"benchmarks"}
    ]
    assert found == []


def test_jobs_and_serve_do_not_know_each_other() -> None:
    """But for a benchmark."""
    assert {path for path, _ in importing("jobs", "serve")} == {"jobs/benchmarks/serve.py"}
    assert importing("serve", "jobs") == []


def test_serve_imports_itself_relatively() -> None:
    """`import serve` would read like Ray's library of that name."""
    assert importing("serve", "serve") == []


def test_ray_libraries_are_written_in_full() -> None:
    """`from ray import train, data` would read like `jobs.train` and `jobs.data`."""
    short = [
        (path, alias.name)
        for path, tree in sources().items()
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
        for path, tree in sources().items()
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
    names = json.dumps([module_name(path) for path in sources()])
    command = [sys.executable, "-W", "ignore", "-c", code, names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "False False\n"), done.stderr


def test_what_evaluates_and_translates_loads_nothing_that_takes_seconds_for_nothing() -> None:
    """PyTorch's compiler, and torchmetrics with SciPy and Matplotlib: each takes as long as PyTorch itself."""
    code = (
        "import sys, jobs.evaluation.driver, jobs.translation.driver, serve.app\n"
        "print(*{'torch._dynamo', 'torchmetrics', 'scipy', 'matplotlib'} & {*sys.modules})"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_lists_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main: Any = importlib.import_module(f"jobs.{name}").main
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code in (0, None)
    assert f"usage: python -m jobs.{name}" in capsys.readouterr().out
