"""Mistakes that a person could make, planted one at a time: does a test fail for each of them?

    python tests/mutants.py                                # all of them
    python tests/mutants.py --file losses.py
    python tests/mutants.py --only "the margin's sign"

mutants.txt lists them. Each is planted in a copy of the tree, and its tests run there. If they
pass, they have a hole, unless the list says why the mutant computes the same. pytest does not run
this file; test_mutants.py looks whether each old text is still in its file, once.
"""

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

HOME = Path(__file__).parent.parent
SECONDS = 600  # that a mutant's tests may take; if it hangs, it is killed


@dataclass
class Mutant:
    file: str
    tests: str  # what pytest is given, in tests/
    name: str
    lines: dict[str, list[str]] = field(default_factory=lambda: {"-": [], "+": [], "=": []})
    old = property(lambda self: "\n".join(self.lines["-"]))  # it is in the file once
    new = property(lambda self: "\n".join(self.lines["+"]))
    equal = property(lambda self: " ".join(self.lines["="]))  # why it computes the same


def listed() -> list[Mutant]:
    """What mutants.txt says: "%" a file and its tests, "#" a mutant's name, "-" the text that it
    changes and "+" what it becomes; "@" other tests, or "=" why it computes the same."""
    mutants, file, tests = [], "", ""
    for line in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines():
        kind, words = line[:1], line[2:]
        if kind == "%":
            file, _, tests = words.partition(" ")
        elif kind == "#":
            mutants.append(Mutant(file, tests, words))
        elif kind == "@":
            mutants[-1].tests = words
        elif kind:
            mutants[-1].lines[kind].append(words)
    return mutants


def passes(tests: str, copy: Path) -> bool:
    """Do the tests pass in the copy of the tree? A fork of this process runs them: torch and
    transformers are imported here already, which takes longer than most tests."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    signal.alarm(SECONDS)
    os.chdir(copy)
    sys.path.remove(str(HOME / "tests"))
    for stream in (1, 2):
        os.dup2(os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    given = [f"tests/{word}" if ".py" in word else word for word in shlex.split(tests)]
    os._exit(import_module("pytest").main(["-x", "-q", "-p", "no:xdist", *given]))


def survives(mutant: Mutant, copy: Path) -> bool:
    """Do its tests pass with the mutant? Afterwards the copy is as before."""
    path = copy / "nanoalign" / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        sys.exit(f"{mutant.file}, {mutant.name}: found {text.count(mutant.old)} times")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return passes(mutant.tests, copy)
    finally:
        path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--file", default="", help="only the mutants of this file")
    parser.add_argument("--only", default="", help="only those with this in their names")
    asked, table = parser.parse_args(), Counter()
    chosen = [m for m in listed() if asked.file in ("", m.file) and asked.only in m.name]
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True  # a mutant may have its file's size, in the same second
    for name in ("torch", "transformers.models.llama.modeling_llama", "hypothesis"):
        import_module(name)
    with tempfile.TemporaryDirectory() as home:
        unwanted = shutil.ignore_patterns(".git", "__pycache__", "runs", ".*cache", ".hypothesis")
        copy = Path(shutil.copytree(HOME, Path(home, "tree"), ignore=unwanted))
        for tests in dict.fromkeys(m.tests for m in chosen if not m.equal):
            if not passes(tests, copy):
                sys.exit(f"{tests} fails without a mutant:\n{(copy / 'output.txt').read_text()}")
        for mutant in chosen:
            found = "equal" if mutant.equal else "killed"
            if not mutant.equal and survives(mutant, copy):
                found = "survived"
            print(f"{found:8}  {mutant.file}: {mutant.name}", flush=True)
            table[mutant.file, found] += 1
    print("\n| file | mutants | killed | equal |\n|---|---|---|---|")
    for file in dict.fromkeys(m.file for m in chosen):
        killed, equal, survived = (table[file, how] for how in ("killed", "equal", "survived"))
        print(f"| {file} | {killed + equal + survived} | {killed} | {equal} |")
    sys.exit(1 if any(how == "survived" for _, how in table) else 0)


if __name__ == "__main__":
    main()
