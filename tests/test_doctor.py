"""`hedgerow doctor`: what is said of an installation, by packages whose metadata a test writes."""

import importlib
import json
import platform
import sys
from importlib import metadata

import pytest

import hedgerow as hr

HEDGEROW = """\
Requires-Dist: torch>=2.9
Requires-Dist: core-one>=1.5,<2
Requires-Dist: elsewhere>=1; sys_platform == "none"
Provides-Extra: first
Requires-Dist: core-one; extra == "first"
Requires-Dist: optional-one[more]>=1; extra == "first"
Provides-Extra: second
Requires-Dist: optional-two; extra == "second"
Provides-Extra: both
Requires-Dist: hedgerow[first,second]; extra == "both"
Provides-Extra: elsewhere
Requires-Dist: optional-two; (sys_platform == "none") and extra == "elsewhere"
Provides-Extra: all
Requires-Dist: hedgerow[both]; extra == "all"
Provides-Extra: dev
Requires-Dist: never; extra == "dev"
"""
MORE = 'Requires-Dist: optional-zero\nProvides-Extra: more\nRequires-Dist: deep; extra == "more"\n'


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Have a package be installed here, before all others of its name."""
    monkeypatch.syspath_prepend(tmp_path / "packages")

    def install(name, version, requires=""):
        folder = tmp_path / "packages" / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        head = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n"
        (folder / "METADATA").write_text(head + requires)
        importlib.invalidate_caches()

    install("hedgerow", hr.__version__, HEDGEROW)
    return install


def by_name(found):
    return {each["name"]: each for each in found}


def test_everything_is_here(hedgerow, installed):
    for name, version in {"core-one": "1.9", "optional-two": "0.1", "deep": "1"}.items():
        installed(name, version)
    installed("optional-one", "1.0", MORE)
    result = hedgerow("doctor", "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert (found["hedgerow"], found["python"]) == (hr.__version__, platform.python_version())
    assert found["torch"].startswith(metadata.version("torch"))
    assert found["devices"][-1]["name"] == "cpu"
    assert found["devices"][-1]["memory"] > 10**8
    assert found["processors"] >= found["free_processors"] >= 1
    # Not what another platform needs, nor extras that are no feature.
    assert list(by_name(found["libraries"])) == ["torch", "core-one"]
    assert by_name(found["libraries"])["core-one"] == {
        "name": "core-one",
        "needed": "<2,>=1.5",
        "installed": "1.9",
        "will_do": True,
    }
    assert {each["name"]: (each["lacks"], each["command"]) for each in found["features"]} == {
        "both": ([], ""),
        "elsewhere": ([], ""),
        "first": ([], ""),
        "second": ([], ""),
    }
    assert found["problem"] == ""


def test_what_is_optional_may_be_missing(hedgerow, installed):
    installed("core-one", "1.5")
    installed("optional-one", "1.0", MORE)
    result = hedgerow("doctor", "--json")
    assert result.code == 0
    features = by_name(json.loads(result.out)["features"])
    lacks = {name: [each["name"] for each in f["lacks"]] for name, f in features.items()}
    # `deep` is what the extra of another package needs.
    assert lacks == {
        "both": ["deep", "optional-two"],
        "elsewhere": [],
        "first": ["deep"],
        "second": ["optional-two"],
    }
    assert features["both"]["command"] == "pip install 'hedgerow[both]'"
    shown = hedgerow("doctor")
    assert shown.code == 0
    [row] = [line for line in shown.out.splitlines() if "second" in line and "both" not in line]
    assert "no" in row
    assert "optional-two" in row
    assert "pip install 'hedgerow[second]'" in row


def test_an_optional_library_may_be_too_old(hedgerow, installed):
    installed("core-one", "1.5")
    installed("optional-one", "0.9", MORE)
    result = hedgerow("doctor")
    assert result.code == 0
    assert "optional-one>=1 (here is 0.9)" in result.out


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, "core-one<2,>=1.5:"),
        ("1.4", "core-one<2,>=1.5 (here is 1.4):"),
        ("2.0", "core-one<2,>=1.5 (here is 2.0):"),
    ],
)
def test_a_core_library_that_is_missing_or_wrong_fails(hedgerow, installed, version, words):
    if version is not None:
        installed("core-one", version)
    for options in ([], ["--json"]):
        result = hedgerow("doctor", *options)
        assert result.code == 1
        assert result.err == f"hedgerow: hedgerow needs {words} pip install hedgerow\n"
    assert json.loads(result.out)["problem"] in result.err


def test_a_prerelease_of_a_library_will_do(hedgerow, installed):
    installed("core-one", "1.6rc1")
    assert hedgerow("doctor").code == 0


def test_a_torch_that_cannot_be_imported_is_told(hedgerow, installed, monkeypatch):
    class Broken:
        def __getattr__(self, name):
            raise ImportError("libcudart.so.13: cannot open shared object file")

    installed("core-one", "1.5")
    monkeypatch.setattr("hedgerow.doctor.torch", Broken())
    result = hedgerow("doctor")
    assert result.code == 1
    assert result.err.startswith("hedgerow: torch is installed, but cannot be imported (libcudart")
    assert "pip install --force-reinstall torch" in result.err
    assert "cannot be imported" in result.out


def test_a_gpu_whose_driver_does_not_answer_is_told(hedgerow, installed, monkeypatch):
    def lost(index):
        raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be …")

    installed("core-one", "1.5")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lost)
    result = hedgerow("doctor")
    assert (result.code, result.err) == (0, "")
    said = " ".join(result.out.split())
    assert "cannot be asked (CUDA error: unspecified launch failure CUDA kernel" in said
    assert "mend its driver, or give model.device=cpu" in said
    found = json.loads(hedgerow("doctor", "--json").out)
    assert found["silent"].startswith("CUDA error: unspecified launch failure")
    assert [device["name"] for device in found["devices"]] == ["cpu"]


@pytest.mark.parametrize("error", [AttributeError, OSError, ValueError, None])
def test_a_system_that_does_not_say_its_memory(hedgerow, installed, monkeypatch, error):
    def sysconf(name):
        if error is None:
            return -1
        raise error(name)

    installed("core-one", "1.5")
    monkeypatch.setattr("os.sysconf", sysconf)
    result = hedgerow("doctor")
    assert (result.code, result.err) == (0, "")
    assert "memory unknown" in result.out
    found = json.loads(hedgerow("doctor", "--json").out)
    assert [device["memory"] for device in found["devices"]][-1:] == [None]


def test_a_package_that_is_only_on_the_path_has_no_metadata(hedgerow, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", missing)
    result = hedgerow("doctor")
    assert result.code == 2
    assert result.err.startswith("hedgerow: hedgerow is on Python's path, but is not installed")


def test_the_real_installation(hedgerow):
    """Its extras' names, by which commands say what to install, are what pip knows them by."""
    result = hedgerow("doctor", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert by_name(found["libraries"])["torch"]["installed"] == metadata.version("torch")
    assert {"flower", "privacy", "quantized"} <= by_name(found["features"]).keys()
    assert sys.version.startswith(found["python"])
