"""A student that is an adapter of its teacher: its folder, and the full student that it stands for.

    FOLDER/tiue.json                        what a student is, and its base by name and hash
    FOLDER/pytorch_lora_weights.safetensors diffusers' format

Wherever a model is named the folder will do: it is put together with its base once, in the user's cache.
"""

from __future__ import annotations

from pathlib import Path

from tiue_cli.errors import ModelFolderError, full_installation
from tiue_cli.files.access import is_file
from tiue_cli.files.caches import user_cache
from tiue_cli.files.hashes import fingerprint_of
from tiue_cli.files.manifests import read_manifest
from tiue_cli.files.students import LORA_FILE, STUDENT_MANIFEST, StudentManifest


def is_adapter_student(path: Path) -> bool:
    """Whether the folder is a student that needs its base; any other LoRA's folder has no tiue.json."""
    return all(is_file(path / name, error=ModelFolderError) for name in (STUDENT_MANIFEST, LORA_FILE)) and not is_file(
        path / "model_index.json", error=ModelFolderError
    )


def full_student_folder(path: Path, *, base: str | None = None) -> Path:
    """The full student in the cache, put together at the first call; ``base`` is where the base lies now.

    Raises ModelFolderError where the base is not there or is another model, ManifestError, AdapterError, OutputError.
    """
    files = {name: path / name for name in (STUDENT_MANIFEST, LORA_FILE)}
    key = fingerprint_of(files, error=ModelFolderError)
    folder = user_cache() / "students" / f"{path.resolve().name[:60]}-{key[:16]}"
    if not is_file(folder / "model_index.json", error=ModelFolderError):
        write_full_student(path, folder, base=base)
    elif base is not None:
        _find_base(path, _manifest_of(path), base)  # a wrong one is not passed over because it is not needed
    return folder


def write_full_student(path: Path, out: Path, *, base: str | None = None, overwrite: bool = False) -> Path:
    """Write the adapter in ``path`` and its base as a full student; ``base`` is where the base lies now.

    Raises ModelFolderError where the base is not there or is another model, ManifestError, AdapterError, OutputError.
    """
    manifest = _manifest_of(path)
    folder = _find_base(path, manifest, base)
    with full_installation("a student that is an adapter"):
        from tiue_cli.model.lora.merge import merged_components
        from tiue_cli.model.student import StudentModel, save_student

    parts = merged_components(folder, [str(path / LORA_FILE)])
    student = StudentModel(
        tokenizer=parts.tokenizer,
        text_encoder=parts.text_encoder,
        unet=parts.unet,
        vae=parts.vae,
        scheduler_config=parts.scheduler_config,
        manifest=manifest.model_copy(update={"base": None}),
        source=str(path),
    )
    return save_student(student, out, overwrite=overwrite)


def _manifest_of(path: Path) -> StudentManifest:
    manifest = read_manifest(path / STUDENT_MANIFEST, StudentManifest)
    if manifest.base is None:
        raise ModelFolderError(
            f"{path / STUDENT_MANIFEST} names no base for the adapter", hint="restore the file that was changed"
        )
    return manifest


def _find_base(path: Path, manifest: StudentManifest, base: str | None) -> Path:
    """The base's folder: where ``base`` says, or where the adapter's manifest does."""
    from tiue_cli.model.identity import unchanged_model

    assert manifest.base is not None
    source = base or manifest.base.source
    try:
        return unchanged_model(source, manifest.base.sha256)
    except ModelFolderError as error:
        raise ModelFolderError(
            f"{path} is an adapter of {source}, which cannot be used: {error.message}",
            hint="say where it is: --base MODEL",
        ) from error
