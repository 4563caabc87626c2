"""The list of mutants keeps up with the code; python tests/mutants.py plants them."""

from mutants import HOME, listed


def test_each_text_that_a_mutant_changes_is_in_its_file_once():
    mutants = listed()
    assert len({(m.file, m.name) for m in mutants}) == len(mutants) > 200
    texts = {m.file: (HOME / "nanoalign" / m.file).read_text(encoding="utf-8") for m in mutants}
    lost = [f"{m.file}: {m.name}" for m in mutants if texts[m.file].count(m.old) != 1]
    assert not lost, f"tests/mutants.txt has other texts than the code: {lost}"
    for mutant in mutants:
        text = texts[mutant.file]
        changed = text.replace(mutant.old, mutant.new)
        assert changed != text
        compile(changed, mutant.file, "exec")


def test_the_tests_that_a_mutant_names_are_there():
    for tests in {mutant.tests for mutant in listed()}:
        path, _, name = tests.split()[0].partition("::")
        assert f"def {name}" in (HOME / "tests" / path).read_text(encoding="utf-8"), tests
