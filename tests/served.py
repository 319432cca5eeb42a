"""Checkpoints in folders, nnsight models of them without weights, and a server that has the weights."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nnsight
from nnsight import TransformersModel
from nnsight.modeling import huggingface
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SERVER = Path(__file__).parent / "remote_server.py"
nnsight.CONFIG.APP.REMOTE_LOGGING = False


def tokenizer() -> PreTrainedTokenizerFast:
    """Each printable character is a token, 3 ... 92, as in `tests.stub_tokenizer`."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(32 + number): 3 + number for number in range(90)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def saved(hf: PreTrainedModel, folder: Path) -> str:
    """A folder with a model and its tokenizer."""
    hf.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def unloaded(folder: str, **options: Any) -> TransformersModel:
    """An nnsight model of a folder, its weights on the meta device until they are needed here."""
    huggingface._ID_CACHE[folder] = folder  # else its name is looked up on a hub
    lm = TransformersModel(folder, task="text-generation", tokenizer=tokenizer(), **options)
    assert not lm.dispatched
    return lm


@contextmanager
def server() -> Iterator[str]:
    """The address of a server of its own process, in which moe_interp cannot be imported."""
    process = subprocess.Popen([sys.executable, str(SERVER)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
