"""What all pictures have in common: they are figures without pyplot, load late, and say what to install."""

import subprocess
import sys
from io import BytesIO

import pytest
import timm
import torch
from PIL import Image

import drifa_attn
from drifa_attn import plot

matplotlib = pytest.importorskip("matplotlib")

from tests._plot import gates_of, moved, result_of  # noqa: E402 - they need matplotlib


def gates_picture():
    gates, labels = gates_of()
    return plot.gates(gates, labels)


def modalities_picture():
    one = {"refiners.0.a": torch.rand(4, 3), "refiners.0.b": torch.rand(4, 3)}
    return plot.modalities({"all": one, "no b": {"refiners.0.a": torch.rand(4, 3)}})


PICTURES = {
    "gates": gates_picture,
    "spread": lambda: plot.spread(gates_of()[0]),
    "plan": lambda: plot.plan(drifa_attn.plan(timm.create_model("test_resnet"))),
    "modalities": modalities_picture,
    "reliability": lambda: plot.reliability(result_of(torch.rand(9, 4).softmax(1)), torch.arange(9) % 4),
    "risk_coverage": lambda: plot.risk_coverage(result_of(torch.rand(9, 4).softmax(1), torch.rand(9)), torch.arange(9) % 4),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_a_figure_without_pyplot_and_changes_no_rule(name):
    before = dict(matplotlib.rcParams)
    figure = PICTURES[name]()
    assert isinstance(figure, matplotlib.figure.Figure)
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    with Image.open(BytesIO(figure._repr_png_())) as image:
        assert len(image.convert("L").getcolors()) > 20


@pytest.mark.parametrize("name", [*PICTURES, "cam"])
def test_without_matplotlib_it_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=rf'plot.{name} needs matplotlib: pip install "drifa-attn\[plots\]"'):
        plot.cam(*moved()) if name == "cam" else PICTURES[name]()


def test_every_picture_is_public():
    assert sorted([*PICTURES, "cam"]) == plot.__all__


def test_the_room_is_loaded_when_it_is_asked_for_and_matplotlib_later():
    code = "import sys, drifa_attn; loaded = lambda: [n in sys.modules for n in ('drifa_attn.plot', 'matplotlib')]\n"
    code += "print(loaded()); drifa_attn.plot.spread; print(loaded(), hasattr(drifa_attn, 'plott'))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "[False, False]\n[True, False] False\n"
