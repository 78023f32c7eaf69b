"""What is published: the sdist, the wheel that is built from it, and the files beside them."""

import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import hatchling.build
import pytest
import yaml

import dca_jax

REPOSITORY = Path(__file__).resolve().parent.parent
ADDRESS = "https://example.org/owner/dca_jax"
VERSION = dca_jax.__version__
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the sdist unpacks to; it is built as the release workflow builds it."""
    folder = tmp_path_factory.mktemp("sdist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.setenv("DCA_JAX_REPOSITORY", ADDRESS)
        name = hatchling.build.build_sdist(str(folder))
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    return folder / name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that the unpacked sdist builds, without the address in the environment."""
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sdist)
        patch.delenv("DCA_JAX_REPOSITORY", raising=False)
        name = hatchling.build.build_wheel(str(folder))
    assert name == f"dca_jax-{VERSION}-py3-none-any.whl"
    return zipfile.ZipFile(folder / name)


def test_the_sdist_has_what_a_clone_has(sdist):
    """All but what only the repository's own services read."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    own = re.compile(r"\.(ci|github|readthedocs|python-version)|conda/")
    expected = {name for name in listed.stdout.splitlines() if not own.match(name)}
    found = {str(f.relative_to(sdist)) for f in sdist.rglob("*") if f.is_file()}
    assert expected - found == set()
    extra = {name for name in found - expected if not (REPOSITORY / name).is_file()}
    assert extra == {"PKG-INFO"}  # others are new, and not in the index yet


def test_the_wheel_has_both_packages_and_nothing_else(wheel):
    modules = {
        str(path.relative_to(REPOSITORY))
        for package in ("dca_jax", "checkpoints_convert")
        for path in (REPOSITORY / package).rglob("*.py")
    }
    modules |= {"dca_jax/py.typed", "checkpoints_convert/py.typed"}
    info = f"dca_jax-{VERSION}.dist-info"
    described = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    assert set(wheel.namelist()) == modules | {f"{info}/{name}" for name in described}
    entry = wheel.read(f"{info}/entry_points.txt").decode()
    assert "dca-jax = dca_jax.cli:main" in entry


def test_metadata(wheel):
    metadata = email.message_from_bytes(wheel.read(f"dca_jax-{VERSION}.dist-info/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("dca_jax", VERSION)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.12"
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras == set(PROJECT["optional-dependencies"])
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL"))
    assert urls["Source"] == ADDRESS
    assert urls["Changelog"] == f"{ADDRESS}/blob/v{VERSION}/CHANGELOG.md"
    text = str(metadata.get_payload())
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert f"{ADDRESS}/blob/v{VERSION}/LICENSE" in targets
    assert [t for t in targets if not t.startswith(("https://", "#", '"'))] == []


def test_a_readme_without_an_address_has_no_link_that_leads_nowhere(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY)
    import hatch_build

    text = "[a](docs/a.md), [b](https://b.org)\n![c](c.png)\n```python\n[x](y)\n```\n"
    assert hatch_build.with_links(text, "", "v1") == (
        "a, [b](https://b.org)\n```python\n[x](y)\n```\n"
    )
    assert hatch_build.with_links(text, "https://h/o/n", "v1") == (
        "[a](https://h/o/n/blob/v1/docs/a.md), [b](https://b.org)\n"
        "![c](https://h/o/n/raw/v1/c.png)\n```python\n[x](y)\n```\n"
    )
    assert set(hatch_build.urls("", "v1")) == {"Paper"}


def test_every_file_names_this_version():
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.findall(r"^## \[(.+?)\] - (\S+)$", changelog, re.MULTILINE)[0]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    recipe = yaml.safe_load((REPOSITORY / "conda/recipe.yaml").read_text(encoding="utf-8"))
    assert version == citation["version"] == recipe["context"]["version"] == VERSION
    assert date == str(citation["date-released"])
    (paper,) = citation["references"]
    assert paper["title"] == "Training-Free Long-Context Scaling of Large Language Models"


def test_the_conda_recipe_needs_what_the_wheel_needs():
    recipe = yaml.safe_load((REPOSITORY / "conda/recipe.yaml").read_text(encoding="utf-8"))
    _python, *needed = recipe["requirements"]["run"]
    renamed = [line.replace("matplotlib-base", "matplotlib").replace(" ", "") for line in needed]
    assert sorted(renamed) == sorted(PROJECT["dependencies"])
    assert recipe["context"]["python_min"] == PROJECT["requires-python"].removeprefix(">=")


def test_workflows_name_commits_and_may_little():
    paths = sorted((REPOSITORY / ".github/workflows").glob("*.yml"))
    assert len(paths) == 3
    for path in paths:
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] in ({}, {"contents": "read"}), path
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        for action in [step["uses"] for step in steps if "uses" in step]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action


@pytest.mark.parametrize("name", ["README", "CONTRIBUTING", "CHANGELOG", "SECURITY"])
def test_links_of_pages_outside_the_documentation_lead_somewhere(name):
    """Those of `docs/` are followed by the strict build."""
    text = (REPOSITORY / f"{name}.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", text):
        if not target.startswith("https://") and target not in ('"', "'"):
            assert (REPOSITORY / target).exists(), target


def test_what_a_clean_environment_runs_has_every_extra():
    sys.path.insert(0, str(REPOSITORY / "tests"))
    import installed

    tried = {extra for names in installed.CHECKS for extra in names.split(",")} - {""}
    own = {"dev", "docs"}  # `make test` and the workflow of the documentation install them
    assert tried | set(installed.RESOLVED) == set(PROJECT["optional-dependencies"]) - own
