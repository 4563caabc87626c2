"""The notebooks run from top to bottom, and are committed as a reader should find them."""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest

from nanoalign.run.report import read_run

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook: dict) -> list[dict]:
    return [o for cell in notebook["cells"] for o in cell.get("outputs", [])]


def test_there_are_nine():
    assert [path.stem[0] for path in NOTEBOOKS] == list("123456789")


def test_they_begin_alike():
    """One cell finds the package; only one line of it is the reader's to fill in."""
    notebooks = [json.loads(path.read_text(encoding="utf-8")) for path in NOTEBOOKS]
    (first,) = {"".join(notebook["cells"][1]["source"]) for notebook in notebooks}
    assert first.count("REPOSITORY = ") == 1 and "# !" not in first


@each
def test_runs(path, tmp_path, monkeypatch):
    """In a directory of its own, with nothing around it but the package."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for needed in ("ipykernel", "matplotlib"):
        pytest.importorskip(needed)
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    shutil.copy(path, tmp_path / "home")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(tmp_path / "home")}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()  # raises on an error
    assert [p.name for p in (tmp_path / "home").iterdir()] == [path.name]  # writes nothing here


def test_the_clinic_has_its_files():
    """Of each patient and each healthy run what a stranger would send, small, and no answer."""
    ward = importlib.import_module("notebooks.clinic.ward")
    names = [f"healthy-{task}" for task in ward.TASKS] + [str(n) for n in ward.PATIENTS]
    folders = [path for path in ward.HERE.iterdir() if path.name[0] not in "_." and path.is_dir()]
    assert sorted(names) == sorted(path.name for path in folders)
    for path in folders:
        assert {file.name for file in path.iterdir()} == {"metrics.jsonl", "replies.txt"}
        assert all(file.stat().st_size < 4096 for file in path.iterdir())
        assert [line["step"] for line in read_run(path)][-1] in (16, 150)
        assert len((path / "replies.txt").read_text(encoding="utf-8").splitlines()) == 6
    for patient in ward.PATIENTS.values():  # an ill run is a healthy one but for something
        done = {**patient.get("flags", {}), **patient.get("chat", {})} or patient["merged_into"]
        assert done and patient["task"] in ward.TASKS


@each
def test_as_committed(path):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    prose = "".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not any(
        o.get("name") == "stderr" or o["output_type"] == "error" for o in outputs(notebook)
    )
    pictures = [
        o["data"]["image/png"] for o in outputs(notebook) if "image/png" in o.get("data", {})
    ]
    assert len(pictures) >= 3 and max(map(len, pictures)) < 130_000  # base64: 100 KB
    assert len(text) < 400_000
    said = json.dumps([o for o in outputs(notebook) if "image/png" not in o.get("data", {})])
    assert not re.search(r"/(home|root|tmp|Users|work)/", said)
    assert prose.count("<details>") == prose.count("</details>") == 1 + 8 * (path.stem[0] == "9")
    assert "## A question" in prose and "## Change this line" in prose
