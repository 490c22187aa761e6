import ast
from pathlib import Path

import pytest

import dpo_lightning

PACKAGE = Path(dpo_lightning.__file__).parent
# What each part may import of the package, besides itself: arrows point one way.
FOUNDATION = {"errors", "paths"}
ALLOWED = {
    "functional": set(),
    "batch": set(),
    "errors": set(),
    "paths": set(),
    "cpu": set(),
    "ranks": set(),
    "recipes": {"errors"},
    "checkpoints": FOUNDATION,
    "losses": {"batch", "errors", "functional"},
    "models": {"batch", "functional", *FOUNDATION},
    "data": {"batch", "ranks", "recipes", *FOUNDATION},
    "references": {"batch", "functional", "models", "errors"},
    "generation": {"checkpoints", "data", "export", "journal", "models", "scorers", "server", *FOUNDATION},
    "metrics": {"batch"},
    "modules": {
        "batch",
        "checkpoints",
        "cpu",
        "functional",
        "losses",
        "metrics",
        "models",
        "ranks",
        "recipes",
        "references",
        "errors",
    },
    "memory": {"batch", "models", "modules", "references", "paths"},
    "strategies": {"checkpoints", "models", "errors"},
    "export": {"checkpoints", "data", "losses", "models", "modules", "recipes", *FOUNDATION},
    "callbacks": {
        *("batch", "checkpoints", "data", "evaluation", "export", "generation", "journal", "memory", "metrics"),
        *("models", "modules", "ranks", "references", "scorers", "errors"),
    },
    "journal": {"errors"},
    "scorers": {"batch", "checkpoints", "data", "export", "journal", "models", "modules", "recipes", *FOUNDATION},
    "server": {"errors"},
    "judges": {"data", "journal", "recipes", "scorers", "server", "errors"},
    "labelling": {"data", "generation", "journal", "judges", "recipes", "scorers", *FOUNDATION},
    "evaluation": {
        *("batch", "data", "generation", "journal", "judges", "metrics", "models", "recipes", "scorers"),
        *FOUNDATION,
    },
    "explain": set(),
    "tools": {"explain"},
    "inspection": {"data", "errors"},
    "resuming": {"checkpoints", "errors"},
    "cli": {
        *("callbacks", "checkpoints", "data", "explain", "inspection", "losses", "modules", "references"),
        *("resuming", "scorers", "tools", "errors"),
    },
    "quickstart": {"cli", "generation"},
    "__main__": {"cli"},
    "__init__": {"batch", "data", "models", "modules", "strategies"},
}


def part(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = part(path)
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("dpo_lightning.")}
    assert parts - {own} <= ALLOWED[own]


@pytest.mark.parametrize("path", sorted((PACKAGE / "functional").glob("*.py")), ids=lambda path: path.name)
def test_mathematics_imports_torch_alone(path):
    standard = {"__future__", "collections", "dataclasses", "functools", "inspect", "math", "typing"}
    assert {name.split(".")[0] for name in imported(path)} <= {"torch", "dpo_lightning", *standard}


def test_every_part_is_in_the_table():
    assert {part(path) for path in FILES} == set(ALLOWED)
