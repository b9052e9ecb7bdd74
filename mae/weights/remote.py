"""Weights by an address: models of the Hugging Face Hub and artifacts of Weights & Biases, and uploads to the Hub.

Both are fetched once into a cache of this machine, and opened from there.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mae.errors import UserError
from mae.runs.checkpoints import MANIFEST, step_name
from mae.runs.file_system import user_cache
from mae.runs.files import read_json, replacing
from mae.runs.layout import CHECKPOINTS, CLASSES, CONFIG
from mae.runs.locks import file_lock

HUB, ARTIFACT = "hf://", "wandb:"
TOKEN = "log in with `hf auth login`, or set HF_TOKEN to a token"


def fetched(source: str) -> str | None:
    """The folder on this machine of `hf://USER/NAME` or `wandb:ENTITY/PROJECT/ARTIFACT`; None for any other name.

    Raises UserError where it does not exist, or cannot be fetched.
    """
    if source.startswith(HUB):
        return str(from_hub(source))
    return str(from_wandb(source)) if source.startswith(ARTIFACT) else None


# ---------------------------------------------------------------- the Hugging Face Hub


def from_hub(source: str) -> Path:
    """A model of the Hub, in the Hub's own cache (HF_HUB_CACHE): its safetensors, or where it has none its .bin."""
    from huggingface_hub import HfApi

    name, _, revision = source.removeprefix(HUB).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"init={source} is no model's name: type init=hf://USER/NAME, or hf://USER/NAME@REVISION.")
    folder = Path()
    with hub_errors(f"init={source}", "read"):
        for suffix in ("*.safetensors", "*.bin"):
            folder = Path(HfApi().snapshot_download(name, revision=revision or None, allow_patterns=["*.json", suffix]))
            if any(folder.glob(suffix)):
                return folder
    return folder


def push_to_hub(name: str, files: Sequence[Path]) -> str:
    """Uploads the files of an export to the model `name` of the Hub, made where it is not there; returns its address.

    A card becomes README.md, and a file of safetensors model.safetensors, where readers look for them.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    names = {".md": "README.md", ".safetensors": "model.safetensors"}
    operations = [CommitOperationAdd(names.get(file.suffix, file.name), file) for file in files]
    with hub_errors(f"task.push_to_hub={name}", "write"):
        api = HfApi()
        address = str(api.create_repo(name, exist_ok=True))
        api.create_commit(name, operations, commit_message="Upload an export of mae-experiments")
    return address


@contextmanager
def hub_errors(start: str, access: str) -> Iterator[None]:
    """Errors of the Hub as UserErrors that begin with `start`; `access` is what a token must allow."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{start}: the model is on the Hub, and has no such revision.") from error
    except errors.RepositoryNotFoundError as error:
        reason = "is not on the Hub, or is private: check the name, or"
        raise UserError(f"{start} {reason} {TOKEN} that may {access}.") from error
    except errors.HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        if code in (401, 403):
            raise UserError(f"{start}: the Hub refuses it ({code}): {TOKEN} that may {access}.") from error
        reason = "has no such file" if code == 404 else f"answered {code}: try again later"
        raise UserError(f"{start}: the Hub {reason}.") from error
    except OSError as error:
        raise UserError(unreachable(start, error)) from error
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise UserError(unreachable(start, error)) from error


def unreachable(start: str, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return f"{start}: the Hub cannot be reached, and the cache of this machine does not hold it ({reason})."


# ---------------------------------------------------------------- Weights & Biases


def from_wandb(source: str) -> Path:
    """A checkpoint that `wandb.artifacts=true` kept, laid out as a run in this machine's cache."""
    import wandb

    name = source.removeprefix(ARTIFACT)
    if not re.fullmatch(r"[^/:]+/[^/:]+/[^/:]+(:[^/:]+)?", name):
        raise UserError(f"init={source} is no artifact's name: type init=wandb:ENTITY/PROJECT/ARTIFACT[:ALIAS].")
    try:
        artifact = wandb.Api().artifact(name if ":" in name else f"{name}:latest", type="model")
        run = user_cache() / "wandb" / f"{name.partition(':')[0]}-{artifact.version}"
        with file_lock(run.with_name(f".{run.name}.lock")):
            if not run.is_dir():
                with replacing(run) as temporary:
                    artifact.download(str(temporary / CHECKPOINTS / "downloaded"))
                    as_run(temporary)
    except (wandb.Error, ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"init={source} could not be fetched ({reason}). Check entity, project, artifact and alias, and log in "
            "with `wandb login`, or set WANDB_API_KEY."
        ) from error
    return run


def as_run(folder: Path) -> None:
    """Moves a downloaded checkpoint, and what lies beside it, to where a run has them."""
    downloaded = folder / CHECKPOINTS / "downloaded"
    for name in (CONFIG, CLASSES):
        if (downloaded / name).is_file():
            (downloaded / name).rename(folder / name)
    step = read_json(downloaded / MANIFEST).get("step")
    if not isinstance(step, int):
        raise UserError("it holds no checkpoint of this program: wandb.artifacts=true keeps one")
    downloaded.rename(downloaded.with_name(step_name(step)))
