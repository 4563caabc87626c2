"""The experiments in a setting of seconds: that they run to their verdict, whatever it says."""

import pytest

from experiments import __main__ as command
from experiments import lab

pytest.importorskip("matplotlib")


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A directory to stand in; pictures go there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "draw", lambda on, path: draw(on, tmp_path / path.name))
    return tmp_path


draw = command.draw


@pytest.mark.parametrize("name", command.names())
def test_it_runs(name, there):
    text, line = command.carry_out(name, small=True)
    assert text.startswith("| ") and "holds" in text + line
    assert (there / f"{name}.png").exists() == (".png)" in text)


def test_a_table_and_a_verdict():
    report = lab.Report(["a", "long"], [["x", 1.23456], ["yy", 2]], [("so", True)])
    assert report.table().splitlines() == [
        "| a  | long |",
        "| -- | ---- |",
        "| x  | 1.23 |",
        "| yy | 2    |",
    ]
    assert report.holds and not lab.Report([], [], [("so", True), ("not so", False)]).holds


def test_the_command(monkeypatch, tmp_path, capsys):
    (tmp_path / "one.py").write_text('"""A claim.\n\nAnd more.\n"""\n')
    (tmp_path / "lab.py").write_text("")
    (tmp_path / "__main__.py").write_text("")
    monkeypatch.setattr(command, "HERE", tmp_path)
    monkeypatch.setattr(command, "carry_out", lambda name: ("| table |", f"{name}: holds"))
    command.main([])
    assert capsys.readouterr().out == "one             A claim.\n"
    command.main(["one"])
    assert capsys.readouterr().out == "| table |\none: holds\n"
    with pytest.raises(SystemExit, match="two: one of one, all"):
        command.main(["two"])
