"""The training texts of the reference model as tokens: which domains, which tokenizer, which order.

1. Nine domains are read, one JSON-lines file each: public domain or permissively licensed, nothing else.
2. A byte-level BPE of 8,192 tokens is trained on the training texts. `<|endoftext|>` is put before every
   text, so the first real token has a context; it also ends texts and pads batches.
3. Texts are laid end to end in a fresh order each epoch and cut into rows of equal length (no padding,
   attention may cross a text's border, which `<|endoftext|>` marks).

The order depends on the seed and the epoch alone, so a resumed run sees the rows that an unbroken one would.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moe_interp.errors import BadData

DOMAINS = (
    "english_literature",
    "french_literature",
    "python_code",
    "grade_school_math",
    "science_abstracts",
    "chinese_classical",
    "chinese_poetry",
    "chinese_educational",
    "competition_math",
)
END = "<|endoftext|>"
VOCAB_SIZE = 8192


@dataclass(frozen=True)
class TokenStream:
    """Texts as one run of token ids, each text beginning with `<|endoftext|>`.

    `ids` [T] int32, every text's tokens in reading order; `starts` [N + 1], where each text begins, then T.
    """

    ids: Tensor
    starts: Tensor

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """The same tokens [T] with the texts in another order."""
        texts = self.ids.split(self.starts.diff().tolist())
        return torch.cat([texts[i] for i in torch.randperm(len(texts), generator=generator).tolist()])


def corpus_files(folder: Path, split: str) -> dict[str, Path]:
    """The file of every domain of `split` ("train" or "validation"). Raises BadData where one is missing."""
    files = {domain: folder / split / f"{domain}.jsonl" for domain in DOMAINS}
    for path in files.values():
        if not path.is_file():
            raise BadData(
                "training corpus",
                expected=f"a file {path.name} in {path.parent}",
                got="none",
                do="Give --corpus the folder that holds train/ and validation/.",
            )
    return files


def read_texts(folder: Path, split: str) -> dict[str, list[str]]:
    """Domain -> its texts, in file order."""
    files = corpus_files(folder, split)
    return {
        domain: [json.loads(line)["text"] for line in path.open(encoding="utf-8")] for domain, path in files.items()
    }


def corpus_hash(folder: Path) -> str:
    """SHA-256 over the training files, sorted by name: what the weights were made from."""
    digest = hashlib.sha256()
    for path in sorted(corpus_files(folder, "train").values()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def train_tokenizer(texts: dict[str, list[str]], context_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE fitted to `texts`; the same texts in the same order give the same merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for domain in texts.values() for text in domain), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Tensor]:
    """Each text's token ids [S], the leading `<|endoftext|>` included, whatever the context length."""
    return [torch.tensor(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: dict[str, list[str]]) -> TokenStream:
    """All texts of all domains as one TokenStream."""
    ids = [document for domain in texts.values() for document in encode(tokenizer, domain)]
    lengths = torch.tensor([0, *map(len, ids)])
    return TokenStream(torch.cat(ids).int(), lengths.cumsum(0))


def batches(stream: TokenStream, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of rows [batch, length + 1]: `length` inputs and, one to the right, their targets.

    Raises BadData where the texts do not fill one batch.
    """
    if len(stream.ids) <= batch * length:
        raise BadData(
            "training corpus",
            expected=f"at least {batch * length + 1} tokens",
            got=str(len(stream.ids)),
            do="Give more texts, or fewer rows.",
        )
    for epoch in count():
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        tokens = stream.shuffled(generator).long()
        rows = tokens.unfold(0, length + 1, length)
        order = torch.randperm(len(rows), generator=generator)
        for chosen in order[: len(rows) // batch * batch].split(batch):
            yield rows[chosen]
