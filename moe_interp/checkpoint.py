"""Checkpoints: the bundled reference model, a hub id or a folder, loaded into their own class and opened."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_interp.adapters.formats import check_weights
from moe_interp.errors import BadCheckpoint, MoEError
from moe_interp.model import MoEModel
from moe_interp.opening import wrap

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForTokenClassification",
    "AutoModel",
)
_PATHS = ("/", "./", "../", "~", ".\\", "..\\")  # what no hub id begins with
_WHERE = ("revision", "subfolder", "cache_dir", "token")  # options that say where files are
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
    """The first line of an error, without the token that was given."""
    text = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    token = options.get("token")
    return text.replace(token, "(token)") if isinstance(token, str) and token else text


def _cause(error: Exception, options: Mapping[str, Any]) -> Exception | None:
    """What a traceback may show of an error: nothing where a token was given, which any line of it might tell."""
    return None if isinstance(options.get("token"), str) else error


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


def load(name: str | Path | None = None, *, trust_remote_code: bool = False, **options: Any) -> MoEModel:
    """Load a checkpoint and open it: the bundled reference model, a hub id, or a folder.

    Args:
        name: None for the bundled model, which needs no network.
        trust_remote_code: whether code that lies beside the checkpoint may run.
        options: as for ``from_pretrained``: ``dtype``, ``device_map``, ``revision``, ... The bundled model computes in
            float32 unless ``dtype`` says otherwise; others in the dtype of their checkpoint, as in transformers.
            ``revision``, ``subfolder``, ``cache_dir`` and ``token`` hold for the tokenizer too.

    Raises:
        UnsupportedModel: an unknown or dense architecture.
        BadCheckpoint: nothing there, not readable, or weights that are missing or not finite.
    """
    source = str(REFERENCE if name is None else name)
    if not Path(source).exists() and (isinstance(name, Path) or source.startswith(_PATHS)):
        raise BadCheckpoint(f"cannot load {source!r}", expected="a folder with config.json", got="no such folder")
    if name is None:
        options = {"dtype": "float32"} | options
    try:
        loader, options = _loader(source, trust_remote_code, options)
        # Safetensors only: a pickled checkpoint could run anything.
        hf, report = loader.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
        tokenizer = _tokenizer(source, trust_remote_code, _where(options))
    except MoEError:
        raise
    except Exception as error:  # whatever a damaged checkpoint or a wrong option sets off underneath
        shown = {key: "(not shown)" if key == "token" else value for key, value in options.items()}
        raise BadCheckpoint(
            f"cannot load {source!r}" + (f" with {shown}" if name is not None and options else ""),
            expected="a hub id or a folder with config.json and *.safetensors, and options that from_pretrained takes",
            got=_told(error, options),
        ) from _cause(error, options)
    if report["missing_keys"]:
        raise BadCheckpoint(
            f"cannot load {source!r}", expected="all weights", got=f"none for {sorted(report['missing_keys'])[:3]}"
        )
    check_weights(hf)
    return wrap(hf.eval(), tokenizer, name="reference" if name is None else str(name))
