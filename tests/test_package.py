import ast
import email
import inspect
import re
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import drifa_attn
from tests._process import run

ROOT = Path(__file__).parent.parent


def test_import_loads_neither_timm_nor_triton():
    """torch itself may not load triton either, or this could not tell."""
    for code, expected in (("import sys, torch", set()), ("import sys, drifa_attn", {"drifa_attn", "einops"})):
        loaded = run(sys.executable, "-c", f"{code}; print({{name.partition('.')[0] for name in sys.modules}})")
        packages = {"timm", "triton", "torchvision", "safetensors", "numpy.testing", "rich", "matplotlib", "pytorch_grad_cam"}
        assert ast.literal_eval(loaded) & {"drifa_attn", "einops", *packages} == expected


def test_every_public_function_says_what_it_takes_and_what_it_raises():
    for name in drifa_attn.__all__:
        thing = getattr(drifa_attn, name)
        assert re.match(r".+[.:]\n|.+\.$", thing.__doc__), f"{name} has no sentence to begin with"
        if inspect.isfunction(thing):
            assert "Raises:" in thing.__doc__ or "Args, Raises:" in thing.__doc__, name
            options = [p for p in inspect.signature(thing).parameters.values() if p.kind is p.KEYWORD_ONLY]
            assert all(f"{p.name}:" in thing.__doc__ or f"{p.name}," in thing.__doc__ for p in options), name


@pytest.mark.parametrize("name", ["HIFA", "CLIA", "MFA", "MGIFA", "MLIFA", "MIFA", "RRA"])
def test_every_layer_names_its_figure_and_where_it_differs(name):
    doc = getattr(drifa_attn, name).__doc__
    assert all(word in doc for word in ("Fig.", "Args:", "Shape:", "Raises:", "Differs:"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the source distribution."""
    pytest.importorskip("build", reason="the module that builds is not there")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--sdist", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def source(built):
    (found,) = built.glob("*.tar.gz")
    return found


def test_an_index_would_take_both(wheel, source):
    """`README.md` renders there, and no warning is left."""
    pytest.importorskip("twine", reason="the module that checks is not there")
    said = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", wheel, source)
    assert said.count("PASSED") == 2


def test_the_metadata_says_whose_it_is_and_where_it_runs(wheel):
    name = f"drifa_attn-{drifa_attn.__version__}.dist-info/METADATA"
    says = email.message_from_bytes(zipfile.ZipFile(wheel).read(name))
    assert says["Version"] == drifa_attn.__version__
    assert says["Author"] == "The drifa_attn developers"
    assert says.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2412.01248"]
    minors = [
        int(c.rpartition(".")[2]) for c in says.get_all("Classifier") if c.startswith("Programming Language :: Python :: 3.")
    ]
    text = says.get_payload()
    assert says["Description-Content-Type"] == "text/markdown"
    assert text.startswith("# drifa_attn")
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]*)\)", text)), "a link needs the repository"
    assert minors == list(range(int(says["Requires-Python"].removeprefix(">=3.")), minors[-1] + 1))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout")
def test_the_source_distribution_holds_what_git_does_not_ignore(source):
    """What else lies about in a checkout, environments above all, is not sent to an index."""
    ours = set(run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines())
    names = {name.partition("/")[2] for name in tarfile.open(source).getnames()}
    assert names - {"PKG-INFO"} <= ours
    assert {path for path in ours if path.startswith(("drifa_attn/", "tests/", "examples/"))} <= names


def test_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"drifa_attn", f"drifa_attn-{drifa_attn.__version__}.dist-info"}
    assert "drifa_attn/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "drifa_attn").rglob("*.py")}
    assert {name for name in names if name.startswith("drifa_attn/")} == sources | {"drifa_attn/py.typed"}


def test_wheel_works_in_an_environment_of_its_own(wheel, tmp_path):
    """A new environment with the dependencies within reach, but not this checkout, gets the wheel and wraps a network."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run(sys.executable, "-m", "pip", "--quiet", "--python", python, "install", "--no-deps", "--no-index", wheel)
    code = "import drifa_attn, timm, torch; m = drifa_attn.wrap(timm.create_model('test_vit')); "
    code += "print(drifa_attn.__file__, m(torch.zeros(1, 3, 160, 160)).shape)"
    printed = run(python, "-I", "-c", code, cwd=tmp_path)
    assert printed.startswith(site)
    assert "torch.Size([1, 1000])" in printed
    listed = run(tmp_path / "env" / "bin" / "drifa-attn", cwd=tmp_path)
    assert "example: drifa-attn plan resnet50" in listed
