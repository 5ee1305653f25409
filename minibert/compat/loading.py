"""The arguments of transformers' `from_pretrained`: which mean something here, which nothing, which are refused.

`torch_dtype` is `dtype`; `device_map` names one device ("auto": a GPU if there is one); `use_safetensors` chooses the
files; `use_auth_token` is `token`; `attn_implementation` may be "sdpa" or "eager", which are one here.
`trust_remote_code` does nothing: no code of a checkpoint is ever executed. What would change the numbers or the place
of the weights and is not here (quantization, offloading, tensor parallelism, TensorFlow) is refused by name.
"""

from __future__ import annotations

from typing import Any

import torch

ATTENTIONS = (None, "sdpa", "eager")  # one kernel computes here, and maps are there when asked for
# Without effect here: how transformers loads, and what it executes
IGNORED = frozenset(
    """low_cpu_mem_usage trust_remote_code resume_download proxies weights_only mirror code_revision _fast_init
    _commit_hash _from_auto _from_pipeline adapter_kwargs generation_config max_memory offload_folder offload_state_dict
    offload_buffers experts_implementation""".split()
)
# Would change what is computed, or from which files: only None and False are taken
REFUSED = frozenset(
    """force_download quantization_config load_in_8bit load_in_4bit gguf_file tp_plan tp_size device_mesh
    distributed_config from_tf from_flax key_mapping use_kernels kernel_config adapter_name""".split()
)


def take_ignored(options: dict[str, Any]) -> None:
    """Take out what has no effect. Raises ValueError for what would have one that is not here."""
    for name in IGNORED & options.keys():
        del options[name]
    for name in sorted(REFUSED & options.keys()):
        value = options.pop(name)
        if value is not None and value is not False:
            raise ValueError(f"{name}={value!r}: minibert has nothing of the kind; leave it out")


def take_location(options: dict[str, Any], where: dict[str, Any]) -> None:
    """Move what says where the files are into `where`, the arguments of `minibert.weights.hub.Source`.

    Raises ValueError for two different tokens, without saying them.
    """
    if (token := options.pop("use_auth_token", None)) is not None:
        if where.get("token") not in (None, token):
            raise ValueError("token and use_auth_token are two names of one argument: give one of them")
        where["token"] = token
    if (use_safetensors := options.pop("use_safetensors", None)) is not None:
        where["formats"] = (".safetensors",) if use_safetensors else (".bin",)


def one_of(names: tuple[str, str], first: Any, second: Any) -> Any:
    """Whichever of two spellings of one argument is given. Raises ValueError if they differ."""
    if first is not None and second is not None and first != second:
        raise ValueError(f"{names[0]}={first!r} and {names[1]}={second!r}: give one of them")
    return second if first is None else first


def one_device(device_map: Any) -> Any:
    """The device that a `device_map` names. Raises ValueError if it names several, or none that computes."""
    if isinstance(device_map, dict):
        devices = list(dict.fromkeys(device_map.values()))
        if len(devices) != 1:
            raise ValueError(f"device_map={device_map!r}: must name one device for the whole model")
        device_map = devices[0]
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device_map == "disk":
        raise ValueError('device_map="disk": minibert computes from memory; name a device')
    return f"cuda:{device_map}" if type(device_map) is int else device_map


def check_attention(name: str | None) -> None:
    """Raise ValueError for an attention implementation that is not here."""
    if name not in ATTENTIONS:
        raise ValueError(f"attn_implementation={name!r}: must be None or one of sdpa, eager")
