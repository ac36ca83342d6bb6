"""`--without FEATURE`: instructions that this process does without, in our compiled code and in torch, as if the processor had none.

A benchmark imports this before anything that loads torch, whose libraries look at the environment once; so the command line is read on import.
`add_option` puts the option into the benchmark's own parser. The tests use it too (`CRUCIBLE_TEST_WITHOUT`, see tests/conftest.py). Other
processes that this one starts compile with all instructions.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Collection

FEATURES = {
    "amx": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
"""What torch's libraries are told. Without AVX-512 there is no AMX either; it comes last, because its words are the narrower ones."""
NO_AMX = ("-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8")


def features(text: str) -> list[str]:
    """Names with commas between them."""
    names = text.split(",")
    for name in names:
        if name not in FEATURES:
            raise argparse.ArgumentTypeError(f"{name!r} cannot be switched off; choose from {', '.join(FEATURES)}")
    return names


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--without`, which has done its work when the benchmark's own parser reads it."""
    parser.add_argument(
        "--without",
        metavar="FEATURE",
        type=features,
        action="extend",
        default=[],
        help=f"switch off {' or '.join(FEATURES)}; several with commas or by repeating the option",
    )


def switch_off(names: Collection[str]) -> None:
    """Tells torch, the compiler of our code, and whoever asks torch what the processor can do."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise SystemExit(f"{' and '.join(names)} cannot be switched off: this is {platform.machine()}, not x86_64.")
    if "torch" in sys.modules:
        raise SystemExit("torch is loaded already and has chosen its instructions. Import `instructions` before it.")
    for name, words in FEATURES.items():
        if name in names:
            os.environ.update(words)

    import torch

    from crucible_framework.backends.local import native

    gone: tuple[str, ...]
    if "avx512" in names:
        native.FLAGS = tuple("-march=x86-64-v3" if flag == "-march=native" else flag for flag in native.FLAGS)
        gone = ("amx", "avx512", "avx10")
    else:
        native.FLAGS = (*native.FLAGS, *NO_AMX)
        gone = ("amx",)
    has = {name: value and not name.startswith(gone) if isinstance(value, bool) else value for name, value in torch.cpu.get_capabilities().items()}
    torch.cpu.get_capabilities = lambda: dict(has)


def _asked() -> list[str]:
    """What the command line says, whatever else it says."""
    parser = argparse.ArgumentParser(add_help=False)
    add_option(parser)
    return list(parser.parse_known_args()[0].without)


if asked := _asked():
    switch_off(asked)
