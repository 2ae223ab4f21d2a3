"""From what a user types to a folder on this disk: an embedded name, a local folder, or a hub id.

No torch. Of a hub repository only what we use is fetched: configs first, so that a family that we cannot use is
refused before gigabytes travel; then one set of safetensors. Pickles are never fetched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tiue_cli.errors import ModelFolderError, UsageError
from tiue_cli.files.access import exists, is_file, is_folder, user_path
from tiue_cli.files.students import LORA_FILE, RUN_MANIFEST, STUDENT_MANIFEST
from tiue_cli.model import parts
from tiue_cli.model.folder import refuse_other_pipelines
from tiue_cli.model.sd_configs import check_unet_config
from tiue_cli.model.weights import WEIGHT_STEMS, read_json

EMBEDDED = "papercut"
"""The model that is shipped in the package: its one-pass student."""
EMBEDDED_TEACHER = "papercut-teacher"
EMBEDDED_STUDENT = "papercut-student"
EMBEDDED_NAMES = (EMBEDDED, EMBEDDED_TEACHER, EMBEDDED_STUDENT)
EMBEDDED_GUIDANCE = 2.0
"""Papercut's teacher follows its captions best at this guidance; Stable Diffusion's customary one is far above it."""
NAMED_VAES = {"taesd": "madebyollin/taesd"}
"""Autoencoders by a short name. TAESD decodes the latents of Stable Diffusion 1.x and 2.x, which share one space: a
twentieth of the KL-VAE's arithmetic, and softer fine detail, such as faces and writing."""
TEACHER_STEPS = 25
TEACHER_GUIDANCE = 7.5

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_HUB_PAGE = re.compile(rf"https?://(?:www\.)?huggingface\.co/({_HUB_ID.pattern})")
_CONFIG_PATTERNS = (
    "model_index.json",
    STUDENT_MANIFEST,
    "README.md",
    *(f"{part}/*.json" for part in ("scheduler", "text_encoder", "tokenizer", "unet", "vae")),
    "tokenizer/*.txt",
)
_ADAPTER_FILES = (STUDENT_MANIFEST, "README.md", LORA_FILE)


def resolve_model(source: str | Path, *, revision: str | None = None) -> Path:
    """The local folder behind an embedded name, a path, or a hub id ``OWNER/NAME`` (downloaded into the hub's cache).

    A checkpoint file is converted into the user's cache once, and stands for that folder.

    Whether it is a usable model folder is ``check_model_folder``'s question. Raises ModelFolderError.
    """
    if str(source) in EMBEDDED_NAMES:
        return _embedded(str(source))
    if not is_hub_id(source):
        return _local(source)
    return _download_model(str(source), revision)


def resolve_vae(source: str | Path, *, revision: str | None = None) -> Path:
    """The local folder behind an autoencoder's short name, path or hub id. Raises ModelFolderError.

    A folder here goes before a short name of ``NAMED_VAES``.
    """
    if isinstance(source, str) and source in NAMED_VAES and not exists(source, error=ModelFolderError):
        source = NAMED_VAES[source]
    if not is_hub_id(source):
        path = user_path(source, error=ModelFolderError)
        if is_file(path, error=ModelFolderError):
            from tiue_cli.model.checkpoint.cache import vae_checkpoint_folder

            return vae_checkpoint_folder(path)
        return _local(source)
    names = [
        "config.json",
        "vae/config.json",
        *_plain_weights("", "vae"),
        *_plain_weights("vae/", "vae"),
    ]
    return _snapshot(str(source), revision, names)


def list_hub_files(hub_id: str) -> list[str]:
    """The files of a repository of the hub; where it cannot be asked, those that the cache holds.

    Raises ModelFolderError.
    """
    import huggingface_hub
    from huggingface_hub import errors

    transport = getattr(errors, "HTTPError", OSError)
    try:
        return list(huggingface_hub.list_repo_files(hub_id))
    except (OSError, ValueError, transport):
        folder = _snapshot(hub_id, None, ["*.safetensors"])  # says why, where the cache has nothing either
        return [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]


def download_files(hub_id: str, names: Sequence[str]) -> Path:
    """The folder in the hub's cache with ``names``, as far as the repository has them. Raises ModelFolderError."""
    return _snapshot(hub_id, None, names)


def is_hub_id(source: str | Path) -> bool:
    """Whether ``source`` can only mean a hub repository.

    A Path, and whatever exists or looks like a path, is local. ``models/studnet`` with a folder ``models`` here is a
    mistyped path and not a question to the hub.
    """
    if isinstance(source, Path) or _HUB_ID.fullmatch(source) is None:
        return False
    owner, name = source.split("/")
    if Path(name).suffix in (".safetensors", ".ckpt", ".bin", ".pt", ".json", ".onnx"):
        return False
    return not exists(source, error=ModelFolderError) and not is_folder(owner, error=ModelFolderError)


def place_base(models: Sequence[str | Path], base: str) -> None:
    """Put the adapters among ``models`` together with their base, which lies at ``base``: later calls find them whole.

    Raises UsageError where no model is an adapter, ModelFolderError where the base is not there or is another model.
    """
    from tiue_cli.model.lora.student import full_student_folder

    adapters = [folder for model in models if (folder := adapter_folder(model)) is not None]
    if not adapters:
        raise UsageError(
            f"--base is for a student that is an adapter, and {' or '.join(map(str, models)) or 'nothing'} is not one",
            hint="leave --base out",
        )
    for path in adapters:
        full_student_folder(path, base=base)


def _out_of_run(path: Path) -> Path:
    """The folder of a distillation stands for what came out of it."""
    run, student = path / RUN_MANIFEST, path / "student"
    is_run = is_file(run, error=ModelFolderError) and is_folder(student, error=ModelFolderError)
    return student if is_run else path


def adapter_folder(source: str | Path) -> Path | None:
    """The folder of the student that is an adapter behind ``source``; None for any other model.

    Raises ModelFolderError where nothing is there.
    """
    from tiue_cli.model.lora.student import is_adapter_student

    if str(source) in EMBEDDED_NAMES:
        return None
    hub = is_hub_id(source)
    folder = _snapshot(str(source), None, _ADAPTER_FILES) if hub else _out_of_run(_existing(source))
    return folder if is_adapter_student(folder) else None


def _existing(source: str | Path) -> Path:
    """The path behind ``source``. Raises ModelFolderError where nothing is there."""
    path = user_path(source, error=ModelFolderError)
    if exists(path, error=ModelFolderError):
        return path
    names, page = _similar(path), _HUB_PAGE.match(str(source))
    hint = f"did you mean {names[0]}?" if names else "check the path, or give a hub id OWNER/NAME"
    raise ModelFolderError(
        f"model folder {source if page else path} does not exist",
        hint=f"of a page of the hub give the id: {page[1]}" if page else hint,
    )


def _local(source: str | Path) -> Path:
    path = _out_of_run(_existing(source))
    if is_folder(path, error=ModelFolderError):
        return _with_base(path)
    if is_file(path, error=ModelFolderError):
        from tiue_cli.model.checkpoint.cache import checkpoint_folder

        return checkpoint_folder(path)
    return path


def _with_base(folder: Path) -> Path:
    """A student that is an adapter stands for the full one, put together with its base; any other folder for itself."""
    from tiue_cli.model.lora.student import full_student_folder, is_adapter_student

    return full_student_folder(folder) if is_adapter_student(folder) else folder


def _similar(path: Path) -> list[str]:
    """Folders beside the missing one whose names are close to its own."""
    import difflib

    try:
        names = [folder.name for folder in path.parent.iterdir() if folder.is_dir()]
    except OSError:  # only a suggestion
        return []
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=1)]


def _embedded(name: str) -> Path:
    folders = {
        EMBEDDED: ("student", "teacher"),
        EMBEDDED_TEACHER: ("teacher",),
        EMBEDDED_STUDENT: ("student",),
    }[name]
    for folder in folders:
        if is_folder(parts.PACKAGED / folder, error=ModelFolderError):
            return parts.PACKAGED / folder
    raise ModelFolderError(
        f"the embedded model is missing from this installation ({parts.PACKAGED / folders[-1]})",
        hint="install the package again: python -m pip install --force-reinstall --no-deps tiue",
    )


def _download_model(hub_id: str, revision: str | None) -> Path:
    folder = _snapshot(hub_id, revision, _CONFIG_PATTERNS)
    if is_file(folder / "model_index.json", error=ModelFolderError):
        refuse_other_pipelines(read_json(folder / "model_index.json"), hub_id)
    elif is_file(folder / STUDENT_MANIFEST, error=ModelFolderError):
        return _with_base(_snapshot(hub_id, revision, _ADAPTER_FILES))
    unet = folder / "unet" / "config.json"
    if is_file(unet, error=ModelFolderError):
        check_unet_config(read_json(unet), where=f"{hub_id}/unet/config.json")
    # Plain names first: repositories also carry fp16 and non-ema copies, and all of them together are tens of GB.
    plain = [name for part in WEIGHT_STEMS for name in _plain_weights(f"{part}/", part)]
    folder = _snapshot(hub_id, revision, [*_CONFIG_PATTERNS, *plain])
    bare = [part for part in WEIGHT_STEMS if not any((folder / part).glob("*.safetensors"))]
    if bare:
        halves = [f"{part}/{WEIGHT_STEMS[part]}*fp16*.safetensors" for part in bare]
        folder = _snapshot(hub_id, revision, [*_CONFIG_PATTERNS, *plain, *halves])
    missing = [part for part in WEIGHT_STEMS if not any((folder / part).glob("*.safetensors"))]
    if missing:
        raise ModelFolderError(
            f"{hub_id} has no safetensors in {', '.join(part + '/' for part in missing)} (pickles are not fetched)",
            hint="choose a repository with diffusers folders and .safetensors files",
        )
    return folder


def _plain_weights(prefix: str, part: str) -> list[str]:
    stem = f"{prefix}{WEIGHT_STEMS[part]}"
    return [f"{stem}.safetensors", f"{stem}-*-of-*.safetensors", f"{stem}.safetensors.index.json"]


def _snapshot(hub_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """huggingface_hub.snapshot_download with every way to fail turned into one clear error."""
    import huggingface_hub
    from huggingface_hub import errors

    # Refusals of the server derive from it, whatever HTTP library the installed version is built on.
    transport = getattr(errors, "HTTPError", OSError)
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError, transport) as error:
        _raise_hub_error(error, hub_id, revision)


def _raise_hub_error(error: Exception, hub_id: str, revision: str | None) -> NoReturn:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        raise ModelFolderError(
            f"{hub_id} is gated: its owner asks for an agreement first",
            hint=f"accept it at https://huggingface.co/{hub_id}, then log in: hf auth login",
        ) from error
    if isinstance(error, errors.RepositoryNotFoundError):
        raise ModelFolderError(
            f"there is neither a folder {hub_id} here nor a public model {hub_id} on the hub",
            hint="check the spelling; for a private model log in: hf auth login",
        ) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise ModelFolderError(
            f"{hub_id} has no revision {revision}", hint="check the branch, tag or commit"
        ) from error
    if isinstance(error, errors.HFValidationError):
        raise ModelFolderError(
            f"{hub_id} is not a valid hub id: {error}", hint="give a folder or OWNER/NAME"
        ) from error
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        raise ModelFolderError(
            f"{hub_id} cannot be stored: {error.strerror or error}",
            hint="free some space, or point HF_HOME to another disk",
        ) from error
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    reason = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    raise ModelFolderError(
        f"there is no folder {hub_id} here, {reason}, and the hub's cache does not hold the whole model",
        hint="unset HF_HUB_OFFLINE" if offline else "check the spelling and the connection, or give a local folder",
    ) from error
