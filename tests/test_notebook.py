"""The notebook runs from top to bottom, and what it says of its numbers and pictures holds."""

import contextlib
import io
import json
import re
from pathlib import Path

import jax
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "edp_in_ten_minutes.ipynb"


def test_every_cell_runs(monkeypatch, quick_networks):
    """With a hundredth of the updates, one hidden layer and one network call for an action."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for part, smaller in (
        ("%matplotlib inline", ""),
        ("=300", "=3, num_solver_calls=1, solver_order=1"),
        ("2000", "20"),
    ):
        assert part in code
        code = code.replace(part, smaller)
    monkeypatch.chdir(NOTEBOOK.parent)
    with contextlib.redirect_stdout(io.StringIO()) as out, jax.numpy_rank_promotion("allow"), plt.rc_context():
        exec(code, {})
    plt.close("all")
    assert "final score" in out.getvalue()


def test_the_outputs_that_are_kept_are_small_and_as_the_text_says():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 6
    assert max(map(len, pictures)) < 160_000  # characters, of 120 kB
    printed = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    assert float(re.search(r"final score: ([\d.]+)", printed)[1]) > 90
    pays = {eta: float(share) for eta, share in re.findall(r"eta = (\d): ([\d.]+) %", printed)}
    assert pays["1"] > 90
    assert 10 < pays["0"] < 40, "one mode of four"
