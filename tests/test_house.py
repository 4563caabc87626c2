"""The house: who may import whom, and how long the lesson may be."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LESSON = ["chatml", "packing", "lora", "nf4", "logps", "losses", "data", "model", "train"]
ROOMS = {  # room -> the rooms that it may import; a lesson file only those above it
    "fast": {"fast"},
    "lesson": {"lesson", "fast"},
    "world": {"lesson"},
    "formats": {"lesson", "formats"},
    "run": {"lesson", "fast", "world", "formats", "run"},
    "tools": {"lesson", "fast", "world", "formats", "run", "tools"},
    "scripts": {"lesson", "world", "formats", "run"},
}
PACKAGE = {  # "formats.rows" -> its file
    ".".join(path.relative_to(ROOT / "nanoalign").with_suffix("").parts): path
    for path in (ROOT / "nanoalign").rglob("*.py")
    if path.name != "__init__.py"
}
SCRIPTS = {path.stem: path for path in [*ROOT.glob("*.py"), *ROOT.glob("examples/*.py")]}


def room(name: str) -> str:
    first, _, rest = name.partition(".")
    return first if rest or first == "world" else "lesson" if name in PACKAGE else "scripts"


def imports(path: Path) -> list[tuple[str, bool]]:
    """The package's modules that a file imports, and whether at its top."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        modules = {name.removeprefix("nanoalign.") for name in names} & PACKAGE.keys()
        found += [(module, node in tree.body) for module in sorted(modules)]
    return found


def test_the_lesson_is_nine_files_of_bounded_length():
    files = {path.stem: path for path in (ROOT / "nanoalign").glob("*.py")}
    lines = sum(len(path.read_text().splitlines()) for n, path in files.items() if n in LESSON)
    assert files.keys() == {*LESSON, "world", "__init__"} and lines <= 1680


def test_imports_go_one_way():
    for name, path in (PACKAGE | SCRIPTS).items():
        for other, at_the_top in imports(path):
            assert at_the_top, f"{name} imports {other} inside a function"
            assert room(other) in ROOMS[room(name)], f"{name} imports {other}"
            if room(name) == room(other) == "lesson":
                assert LESSON.index(other) < LESSON.index(name), f"{name} imports {other}"
    TopologicalSorter({n: [m for m, _ in imports(p)] for n, p in PACKAGE.items()}).prepare()


def test_a_twin_belongs_to_one_lesson_file():
    """Files of fast/ may share one; run/ and tools/ may ask a twin for its sizes."""
    users = {}
    for name, path in PACKAGE.items():
        for other, _ in imports(path):
            if room(other) == "fast" and room(name) in ("fast", "lesson"):
                users.setdefault(other, set()).add(name)
    assert sorted(users) == sorted(name for name in PACKAGE if room(name) == "fast")
    lessons = {name: [n for n in names if room(n) == "lesson"] for name, names in users.items()}
    assert all(len(names) <= 1 for names in lessons.values()), users


def test_help_does_not_wait_for_the_compiler():
    """Imports of seconds, which a flag's line of help can do without, come when they are needed."""
    late = ["torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp"]
    late += ["transformers.modeling_utils", "accelerate", "sympy"]
    ask = f"import sys, train_dpo; print([name for name in {late} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
