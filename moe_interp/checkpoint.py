"""Checkpoints: the bundled reference model, a hub id or a folder, loaded into their own class and opened."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from moe_interp.adapters.formats import check_weights
from moe_interp.arguments import checked, frames_up
from moe_interp.errors import BadCheckpoint, MoEError
from moe_interp.model import MoEModel
from moe_interp.opening import wrap
from moe_interp.options import check_options, has_secrets, told, without_secrets
from moe_interp.paths import looks_like_path, without_credentials

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForTokenClassification",
    "AutoModel",
)
_WHERE = ("revision", "subfolder", "cache_dir", "token", "proxies", "local_files_only")  # they say where files are
_LONGEST = 2**28  # bytes of a .json file
_HDF5 = b"\x89HDF\r\n\x1a\n"  # what every netCDF-4 file begins with
_OWN = ("use_safetensors", "output_loading_info", "weights_only", "ignore_mismatched_sizes")  # as load has them
REFERENCE = Path(__file__).parent / "zoo" / "reference"


def _tokenizer(source: str, trust_remote_code: bool, where: Mapping[str, Any]) -> Any:
    """The tokenizer beside a checkpoint; None if there is none, for token ids need none."""
    import transformers

    # Without files transformers would make up a tokenizer that knows no text.
    files = ("*token*", "*vocab*", "*.model", "*.tiktoken")
    folder = Path(source) / (where.get("subfolder") or "")
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in files):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **where)
    except Exception as error:
        raise BadCheckpoint(
            f"cannot load the tokenizer of {source!r}",
            expected="tokenizer files that transformers reads",
            got=_told(error, where),
        ) from _cause(error, where)


def _told(error: Exception, options: Mapping[str, Any]) -> str:
    """The first line of an error, without what may be secret of the options."""
    text = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return without_secrets(without_credentials(text), options)


def _cause(error: Exception, options: Mapping[str, Any]) -> Exception | None:
    """What a traceback may show of an error: nothing where a secret was given, which any line of it might tell."""
    return None if has_secrets(options) else error


def _loader(source: str, trust_remote_code: bool, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class that loads a checkpoint, and the options for it."""
    import transformers

    where = _where(options)
    published, _ = transformers.PreTrainedConfig.get_config_dict(source, **where)
    if published.get("model_type") == "deepseek":
        from moe_interp.adapters.deepseek import DeepseekV1ForCausalLM, native_config

        return DeepseekV1ForCausalLM, {"dtype": "auto", "config": native_config(published), **options}
    if trust_remote_code and "auto_map" in published:
        return transformers.AutoModelForCausalLM, {"trust_remote_code": True, **options}
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **where)
    return _own_class(config), {"trust_remote_code": trust_remote_code, **options}


def _where(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in _WHERE if key in options}


def _own_class(config: Any) -> Any:
    """The class that a checkpoint was saved from, or the first auto class that takes its config."""
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    fitting = (getattr(transformers, name) for name in AUTO_CLASSES)
    return next((auto for auto in fitting if type(config) in auto._model_mapping), transformers.AutoModelForCausalLM)


@checked
def load(name: str | Path | None = None, *, trust_remote_code: bool = False, **options: Any) -> MoEModel:
    """Load a checkpoint and open it: the bundled reference model, a hub id, or a folder.

    Args:
        name: None for the bundled model, which needs no network. What looks like a path is never asked of the hub.
        trust_remote_code: whether code that lies beside the checkpoint may run.
        options: as for ``from_pretrained``: ``dtype``, ``device_map``, ``revision``, ... The bundled model computes in
            float32 unless ``dtype`` says otherwise; others in the dtype of their checkpoint, as in transformers.
            ``revision``, ``subfolder``, ``cache_dir``, ``token``, ``proxies`` and ``local_files_only`` hold for the
            tokenizer too.

    Weights of the checkpoint that the model has no place for are left out with a warning.

    Raises:
        UnsupportedModel: an unknown or dense architecture.
        BadCheckpoint: nothing there, not readable, a file that is no safetensors, or weights that are missing or not
            finite.
        BadInput: no name or path, or an option that must be True or False and is another value.
    """
    check_options(options)
    options = {key: value for key, value in options.items() if key not in _OWN}
    source = str(REFERENCE if name is None else name)
    _check_source(source, name, str(options.get("subfolder") or ""))
    if name is None:
        options = {"dtype": "float32"} | options
    hf, tokenizer, report = _read(source, trust_remote_code, options, bundled=name is None)
    _check_report(source, report)
    check_weights(hf)
    return wrap(hf.eval(), tokenizer, name="reference" if name is None else source)


def _read(source: str, trust_remote_code: bool, options: dict[str, Any], bundled: bool) -> tuple[Any, Any, Any]:
    """The model, its tokenizer, and what transformers reports of the weights."""
    given = options
    try:
        _check_weights_are_safetensors(source, options)
        loader, options = _loader(source, trust_remote_code, options)
        # Safetensors only: a pickled checkpoint could run anything.
        hf, report = loader.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
        return hf, _tokenizer(source, trust_remote_code, _where(options)), report
    except MoEError:
        raise
    except Exception as error:  # whatever a damaged checkpoint or a wrong option sets off underneath
        shown = f" with {told(options)}" if options and not bundled else ""
        raise BadCheckpoint(
            f"cannot load {source!r}{shown}",
            expected="a hub id or a folder with config.json and *.safetensors, and options that from_pretrained takes",
            got=_told(error, given),
        ) from _cause(error, given)


def _check_source(source: str, name: str | Path | None, subfolder: str) -> None:
    """Refuse a path that is no folder, and a folder with files that nothing can read to their end."""
    shown, folder = without_credentials(source), Path(source)
    if not source or "\0" in source:
        raise BadCheckpoint(f"cannot load {shown!r}", expected="a hub id or a folder", got="no name of either")
    if os.path.isdir(source):
        for one in {folder, folder / subfolder}:
            for file in one.iterdir() if one.is_dir() else ():
                _check_file(file)
    elif os.path.exists(source):
        raise _no_folder(folder, shown)
    elif name is not None and looks_like_path(name):
        raise BadCheckpoint(f"cannot load {shown!r}", expected="a folder with config.json", got="no such folder")


def _check_file(file: Path) -> None:
    if file.exists() and not file.is_file() and not file.is_dir():
        raise BadCheckpoint(f"cannot read {file}", expected="regular files", got="a pipe, a device or the like")
    if file.suffix == ".json" and file.is_file() and file.stat().st_size > _LONGEST:
        raise BadCheckpoint(
            f"cannot read {file}", expected=f"at most {_LONGEST} bytes of JSON", got=f"{file.stat().st_size}"
        )


def _no_folder(file: Path, shown: str) -> BadCheckpoint:
    """What to do with a file in place of a folder."""
    if not file.is_file():
        return BadCheckpoint(f"cannot load {shown!r}", expected="a folder", got="a pipe, a device or the like")
    with file.open("rb") as opened:
        result = opened.read(len(_HDF5)) == _HDF5
    if result or file.suffix == ".nc":
        return BadCheckpoint(
            f"cannot load {shown!r} as a model",
            expected="a folder with config.json",
            got="a saved result of an analysis",
            do="moe_interp.results.load(path) reads it.",
        )
    do = "moe.TunedLens.load(path) reads a tuned lens." if file.suffix == ".safetensors" else None
    return BadCheckpoint(f"cannot load {shown!r}", expected="a folder with config.json", got="a file", do=do)


def _check_weights_are_safetensors(source: str, options: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that makes transformers unpickle a file, whatever its own files are called.

    An index of safetensors may name other files, a config another file of weights, and an adapter may be pickled.
    """
    variant = f".{options['variant']}" if options.get("variant") else ""
    names = {f"model.safetensors.index{variant}.json"}
    named = _json_beside(source, "config.json", options).get("transformers_weights")
    if named is not None and not _is_shard(str(named).removesuffix(".index.json")):
        raise _no_safetensors(source, "safetensors as 'transformers_weights' of config.json", named)
    for name in sorted(names | ({str(named)} if str(named).endswith(".index.json") else set())):
        index = _json_beside(source, name, options)
        shards = index.get("weight_map", {})
        for shard in shards.values() if isinstance(shards, dict) else [shards]:
            if not _is_shard(shard):
                raise _no_safetensors(source, f"only *.safetensors beside {name} in it", shard)
    pickled = not _beside(source, "adapter_model.safetensors", options)
    if pickled and _beside(source, "adapter_config.json", options):
        raise _no_safetensors(source, "adapter_model.safetensors beside adapter_config.json", "none")


def _beside(source: str, name: str, options: Mapping[str, Any]) -> str | None:
    """The path of a file of a checkpoint, fetched if need be; None if it has none of that name."""
    from transformers.utils.hub import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(source, name, **_where(options), **quiet)


def _json_beside(source: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    found = _beside(source, name, options)
    read = {} if found is None else json.loads(Path(found).read_text("utf-8"))
    if not isinstance(read, dict):
        raise BadCheckpoint(f"cannot load {source!r}", expected=f"a JSON object in {name}", got=type(read).__name__)
    return read


def _no_safetensors(source: str, expected: str, got: Any) -> BadCheckpoint:
    return BadCheckpoint(
        f"cannot load {source!r}",
        expected=expected,
        got=repr(got)[:80],
        do="A pickled checkpoint can run any code. Convert it to safetensors where you trust it.",
    )


def _is_shard(name: Any) -> bool:
    if not isinstance(name, str) or not name.endswith(".safetensors") or "\\" in name:
        return False
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _check_report(source: str, report: Mapping[str, Any]) -> None:
    """Refuse a model some of whose weights are not in the checkpoint; tell of weights that have no place in it."""
    if missing := sorted(report["missing_keys"]):
        raise BadCheckpoint(
            f"cannot load {source!r}", expected="all weights", got=f"none for {len(missing)}, such as {missing[:3]}"
        )
    if unexpected := sorted(report["unexpected_keys"]):
        warnings.warn(
            f"{len(unexpected)} weights of {source} have no place in the model and were left out, such as "
            f"{unexpected[:3]}",
            stacklevel=frames_up(3),
        )
