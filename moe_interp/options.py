"""Options of loading: which are True or False, which may be told in messages, and which hold secrets.

A message shows the values of the options in `TOLD` alone. Strings in any other option, such as a token, a proxy with a
password or a header, may be secrets: `without_secrets` takes them and their parts out of what other libraries say.
"""

import base64
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from moe_interp.arguments import check_flag
from moe_interp.errors import BadInput

TOLD: tuple[str, ...] = (
    "dtype",
    "torch_dtype",
    "device_map",
    "revision",
    "subfolder",
    "variant",
    "cache_dir",
    "trust_remote_code",
)
TOLD += ("attn_implementation", "experts_implementation", "local_files_only", "force_download", "low_cpu_mem_usage")
BOOLEANS: tuple[str, ...] = (
    "trust_remote_code",
    "local_files_only",
    "force_download",
    "ignore_mismatched_sizes",
    "low_cpu_mem_usage",
)
BOOLEANS += ("use_safetensors", "output_loading_info", "offload_buffers", "offload_state_dict", "weights_only")
BOOLEANS += ("use_kernels", "allow_all_kernels", "disable_mmap", "load_in_8bit", "load_in_4bit", "resume_download")
_SAFE = {"use_safetensors": True, "weights_only": True, "ignore_mismatched_sizes": False}
_SCHEMES = ("http", "https", "socks5", "socks5h", "bearer", "basic", "token")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of ``from_pretrained`` that are no flags where flags are due, or that would make loading unsafe.

    Raises:
        BadInput: such an option.
    """
    for name in BOOLEANS:
        if name in options:
            check_flag(name, options[name])
    for name, safe in _SAFE.items():
        if options.get(name, safe) != safe:
            raise BadInput(
                f"{name}={options[name]} is not possible",
                expected=f"{name}={safe}: safetensors alone are read, and every weight has the model's shape",
                got=repr(options[name]),
                do="A pickled checkpoint can run any code. Convert it to safetensors where you trust it.",
            )


def told(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a message may show them."""
    return {name: value if name in TOLD else "(not shown)" for name, value in options.items()}


def has_secrets(options: Mapping[str, Any]) -> bool:
    """Whether an option may hold a secret."""
    return any(True for _ in _secrets(options))


def without_secrets(text: str, options: Mapping[str, Any]) -> str:
    """A text in which the names of options stand for strings that they hold, and for parts of these."""
    for secret, name in sorted(_secrets(options), key=lambda pair: -len(pair[0])):
        text = text.replace(secret, f"({name})")
    return text


def _secrets(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in options.items():
        for leaf in _strings(value) if name not in TOLD else ():
            parts = [one for one in re.split(r"[\s:/@]+", leaf) if len(one) > 2 and one.lower() not in _SCHEMES]
            logins = re.findall(r"(?<=//)[^/@]+(?=@)", leaf)
            encoded = [base64.b64encode(unquote(one).encode()).decode() for one in logins]
            yield from ((one, name) for one in {leaf, repr(leaf)[1:-1], *parts, *map(unquote, parts), *encoded} if one)


def _strings(value: Any) -> Iterator[str]:
    """Every string in a value, however deep."""
    if isinstance(value, bytes):
        yield value.decode("utf-8", "replace")
    elif isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list | tuple | set | frozenset):
        for one in value:
            yield from _strings(one)
