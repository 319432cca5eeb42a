"""A tokenizer for tiny random models: each character is a token."""


class StubTokenizer:
    """Characters to ids 3 ... 92, one to one for printable ASCII below "}"; no special tokens."""

    def __call__(self, text: str, verbose: bool = True, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [3 + (ord(character) - 32) % 90 for character in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(32 + token - 3) for token in ids)
