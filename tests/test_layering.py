"""Who may import whom, from the syntax trees; and what `import kd_kernels` must not load, seen in a child process."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "kd_kernels"
TRAINER = ROOT / "python" / "kd_trainer"
HEAVY = {"transformers", "accelerate", "datasets", "tokenizers", "kd_trainer"}
SUBJECTS = ("loss", "sampling", "stats", "targets")


def imports(path: Path) -> list[tuple[str, str | None]]:
    """(module, name) of every import anywhere in a file, made absolute; name is None for `import module`."""
    base = path.parent.relative_to(ROOT / "python" if TRAINER in path.parents else ROOT).parts
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(base[: len(base) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            found += [(module, alias.name) for alias in node.names]
    return found


def modules_of(path: Path) -> set[str]:
    """Every kd_kernels module that a file imports, submodules named in `from package import module` included."""
    found = set()
    for module, name in imports(path):
        if module.split(".")[0] == "kd_kernels":
            found.add(module)
            if name and (ROOT / (module.replace(".", "/") + f"/{name}.py")).exists():
                found.add(f"{module}.{name}")
    return found


def test_library_imports_nothing_above_it() -> None:
    for path in LIBRARY.rglob("*.py"):
        heavy = {module.split(".")[0] for module, _ in imports(path)} & HEAVY
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


def test_library_does_not_import_its_tests_helper() -> None:
    for path in LIBRARY.rglob("*.py"):
        assert "kd_kernels.testing" not in modules_of(path), path


def test_trainer_uses_public_names_only() -> None:
    public_modules = {"kd_kernels", "kd_kernels.cache", "kd_kernels.divergences"}
    for path in TRAINER.rglob("*.py"):
        for module, name in imports(path):
            if module.split(".")[0] != "kd_kernels":
                continue
            where = f"{path.relative_to(ROOT)}: {module} {name or ''}"
            assert module in public_modules, f"{where}: not a public module"
            if name is not None and module != "kd_kernels.divergences":
                exported = __import__(module, fromlist=["__all__"]).__all__
                assert name in exported, f"{where}: not in __all__"


@pytest.mark.parametrize("subject", SUBJECTS)
def test_inside_a_subject_imports_point_one_way(subject: str) -> None:
    """api -> implementations; an implementation never knows the api, nor the package's front door."""
    for path in (LIBRARY / subject).glob("*.py"):
        if path.stem in ("api", "__init__"):
            continue
        forbidden = {m for m in modules_of(path) if m == "kd_kernels" or m.endswith(".api")}
        forbidden.discard("kd_kernels" if any(n for m, n in imports(path) if m == "kd_kernels") else "")
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_implementations_are_reached_through_their_api() -> None:
    """Nobody outside a subject's folder imports its *_impl modules."""
    for path in [*LIBRARY.rglob("*.py"), *TRAINER.rglob("*.py")]:
        for module in modules_of(path):
            parts = module.split(".")
            if parts[-1].endswith("_impl"):
                assert LIBRARY / parts[1] == path.parent, f"{path.relative_to(ROOT)} imports {module}"


def test_only_the_binding_knows_python() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh") and path.name != "binding.cpp":
            for word in ("pybind11", "Python.h", "torch/", "ATen/"):
                assert f"#include <{word}" not in path.read_text(), f"{path.relative_to(ROOT)} includes {word}"


# ---------------------------------------------------------------------------------------------------------- at run time


def child(code: str) -> str:
    """Run a program in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_neither_triton_nor_transformers_nor_the_extension() -> None:
    printed = child("""
        import sys, torch
        before = set(sys.modules)
        import kd_kernels
        heavy = lambda name: name.split(".")[0] in ("triton", "transformers", "numpy") or "._C" in name
        print(sorted(filter(heavy, set(sys.modules) - before)), torch.cuda.is_initialized())
    """)
    assert printed == "[] False"


def test_works_where_none_of_them_is_installed() -> None:
    printed = child("""
        import sys

        for name in ("triton", "transformers", "accelerate", "datasets", "kd_kernels._C"):
            sys.modules[name] = None  # an import of it raises, as where it is not installed
        import torch
        from kd_kernels import LinearLogits, kd_loss, topk_targets
        hidden = torch.randn(3, 4, requires_grad=True)
        student, teacher = LinearLogits(hidden, torch.randn(9, 4)), torch.randn(3, 9)
        kd_loss(student, teacher, "jsd(beta=0.5)", backend="reference").loss.backward()
        print(hidden.grad.isfinite().all().item())
        try:
            kd_loss(student, teacher, backend="cpp")
        except RuntimeError as error:
            print(error)
    """)
    first, message = printed.split("\n", 1)
    assert first == "True"
    assert 'backend "cpp" must be built, got no extension kd_kernels._C' in message and 'backend="reference"' in message
