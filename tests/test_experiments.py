"""The experiments in a setting of seconds: that they run to their verdict, whatever it says."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from experiments import __main__ as command
from experiments import dpo_noise, dpo_optimum, lab
from nanoalign import world
from nanoalign.losses import dpo_loss
from nanoalign.run import report

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One directory for all, so that the world is built once, of a few questions; and no curves of
    the runs, which take longer than such runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "EACH", 16)
        patch.setattr(world, "HELD_OUT", 4)
        patch.setattr(report, "draw", lambda *_: False)
        yield tmp_path_factory.mktemp("experiments")


@pytest.fixture
def there(home, monkeypatch):
    """A directory to stand in; pictures go there too."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(command, "draw", lambda on, path: draw(on, home / path.name))
    return home


draw = command.draw


@pytest.mark.parametrize("name", command.names())
def test_it_runs(name, there):
    text, line = command.carry_out(name, small=True)
    table = [row.count(" | ") for row in text.splitlines() if row.startswith("|")]
    assert len(table) > 2 and set(table) == {table[0]} and "hold" in text and "hold" in line
    assert (there / f"{name}.png").exists() and ".png)" in text


def test_a_table_and_a_verdict():
    report = lab.Report(["a", "long"], [["x", 1.23456], ["yy", 2]], [("so", True)])
    assert report.table().splitlines() == [
        "| a  | long |",
        "| -- | ---- |",
        "| x  | 1.23 |",
        "| yy | 2    |",
    ]
    assert report.holds and not lab.Report([], [], [("so", True), ("not so", False)]).holds


@pytest.fixture
def page(monkeypatch, tmp_path):
    """A house of two experiments, of which the second fails; -> the page."""
    for name in ("one", "two", "lab", "__main__"):
        (tmp_path / f"{name}.py").write_text(f'"""The claim of {name}.\n\nAnd more.\n"""\n')
    report = lab.Report(["a"], [[1]], [("so", True), ("not so", False)], notes=["and why"])
    modules = {"experiments.one": SimpleNamespace(run=lambda small: report)}
    monkeypatch.setattr(command, "import_module", modules.__getitem__)
    monkeypatch.setattr(command, "HERE", tmp_path)
    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda n, *_: ThreadPoolExecutor(n))
    monkeypatch.setattr(lab, "sft_model", lambda small: None)
    return tmp_path / "README.md"


def test_the_command(page, capsys):
    command.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "one             The claim of one." and len(lines) == 2
    command.main(["one"])
    assert "- holds: so\n- does not hold: not so\n- note: and why\n" in capsys.readouterr().out
    assert not page.exists()
    with pytest.raises(SystemExit):
        command.main(["three"])
    assert "choose from" in capsys.readouterr().err


def test_all_writes_the_page(page, capsys):
    """What fails is said and keeps its section; the table counts what holds."""
    command.write({"two": "## two\n\nOld claim.\n\n- holds: it\n", "one": "## one\n\nOld.\n"})
    command.main(["all"])
    printed, text = capsys.readouterr().out, page.read_text()
    assert "one: does not hold" in printed and "two: failed (KeyError" in printed
    assert "2 of 2\n" in printed
    assert "| [one](#one) | The claim of one. | does not hold, 1 of 2 |\n" in text
    assert "| [two](#two) | Old claim. | holds, 1 of 1 |\n" in text
    assert text.count("## ") == 2 and "Old.\n" not in text and text.index("## one\n\nThe") > 0
    command.main(["one", "--write"])
    assert page.read_text().replace(" ", "") == text.replace(" ", "")


def test_the_optimum_of_dpo_is_the_best_of_all_policies():
    """h = R / beta has the highest R q - beta KL(q || p) of all shares q, tried one by one."""
    odds, reward, beta = torch.tensor([0.3]), 2.0, 0.8
    p, q = odds.sigmoid(), torch.linspace(0.0005, 0.9995, 1000)
    kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    best = (reward * q - beta * kl).argmax()
    share, found = dpo_optimum.share_and_kl(odds, reward / beta)
    assert share == pytest.approx(q[best].item(), abs=1e-3)
    assert found == pytest.approx(kl[best].item(), abs=5e-3)


def test_flip():
    rows = [dict(prompt=str(i), chosen="a", rejected="b") for i in range(1000)]
    assert lab.flip(rows, 0.0, 0) == rows
    assert {row["chosen"] for row in lab.flip(rows, 1.0, 0)} == {"b"}
    some = lab.flip(rows, 0.3, 0)
    assert 250 < sum(row["chosen"] == "b" for row in some) < 350
    assert some == lab.flip(rows, 0.3, 0) != lab.flip(rows, 0.3, 1)


@pytest.mark.parametrize("method", ["DPO", "cDPO", "robust", "IPO"])
@pytest.mark.parametrize("flipped, e", [(0.0, 0.2), (0.2, 0.2), (0.4, 0.4)])
def test_the_optima_under_noise(method, flipped, e):
    """The formula is where the loss, averaged over right and flipped labels, is lowest; where it
    has none, the loss is lowest at the end of whatever is tried."""
    tried, zero = torch.linspace(-1, 12, 13001), torch.zeros(13001)
    how = dict(beta=dpo_noise.BETA, loss_type={"robust": "robust", "IPO": "ipo"}.get(method))
    how["loss_type"] = how["loss_type"] or "sigmoid"
    how |= {"label_smoothing": e} if method in ("cDPO", "robust") else {}
    right, wrong = (dpo_loss(sign * tried, zero, zero, zero, **how)[0] for sign in (1, -1))
    best = tried[((1 - flipped) * right + flipped * wrong).argmin()].item()
    goal = dpo_noise.formula(method, flipped, e)
    assert best == pytest.approx(12 if goal is None else goal, abs=0.02)
