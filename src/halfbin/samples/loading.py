"""From what the user gave to samples: files, a tokenizer, how many and how long."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from halfbin import demo
from halfbin.errors import DataError, HalfbinError
from halfbin.samples.cutting import Samples, pack, separate, spread
from halfbin.samples.documents import TOKEN_FILES, Document, read_documents, read_tokens, words_of

EMBEDDED = "halfbin's calibration text (Python source)"
LINE_CHARACTERS = 20  # of a text that is read line by line, shorter ones are headings and brackets


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    @property
    def bos_token_id(self) -> int | None:
        """The begin-of-sequence token, if there is one."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token, if there is one."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Text to `input_ids`."""
        ...


def load_samples(
    path: Path | None,
    tokenizer: Callable[[], Tokenizer],
    *,
    num_samples: int,
    length: int,
    seed: int = 0,
    packed: bool = True,
    pad: int | None = None,
) -> Samples:
    """Calibration samples from a file or folder; see `documents` for what it may be.

    Args:
      path: None means the text that ships with halfbin: Python source. It serves any model to begin with; a text like those
        that the model will read serves better.
      tokenizer: gives the model's own; it may fail where the file holds tokens: nothing is put before them then.
      num_samples: how many at most.
      length: tokens of each, at most.
      seed: of the choice.
      packed: join documents and cut them anew; otherwise each line or document is a sample, with the special tokens that the
        tokenizer puts around it, as encoders read sentences.
      pad: the model's padding, which is cut off both ends of samples that were made beforehand.

    Raises:
      DataError: the file gives no tokens.
    """
    name = EMBEDDED if path is None else path.name
    if path is not None and path.suffix in TOKEN_FILES:
        tokens = read_tokens(path)
        if isinstance(tokens, Tensor):
            bos = _bos(tokenizer) if packed else None
            return pack([tokens], num_samples=num_samples, length=length, seed=seed, bos=bos, eos=None, name=name)
        rows = [_without(pad, row) for row in tokens]
        return separate(rows, num_samples=num_samples, length=length, seed=seed, name=name)
    its = tokenizer()
    documents = [Document(demo.calibration_text())] if path is None else list(read_documents(path))
    if packed:
        ids = [_ids(its, _words(its, d)) for d in documents]
        return pack(
            [i for i in ids if len(i)],
            num_samples=num_samples,
            length=length,
            seed=seed,
            bos=its.bos_token_id,
            eos=its.eos_token_id,
            name=name,
        )
    texts = [text for d in documents for text in _lines(_words(its, d))]
    # Chosen before they are tokenized: a text of a million lines gives 128 of them.
    chosen = [_ids(its, texts[i], special=True, at_most=length) for i in spread(len(texts), num_samples, seed)]
    return separate(chosen, num_samples=num_samples, length=length, seed=seed, name=name)


def _bos(tokenizer: Callable[[], Tokenizer]) -> int | None:
    try:
        return tokenizer().bos_token_id
    except HalfbinError:
        return None


def _without(pad: int | None, row: Tensor) -> Tensor:
    """A sample without padding at its ends."""
    text = torch.nonzero(row != pad).flatten() if pad is not None else torch.arange(len(row))
    return row[int(text[0]) : int(text[-1]) + 1] if len(text) else row[:0]


def _lines(text: str) -> Sequence[str]:
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if len(line) >= LINE_CHARACTERS] or [text]


def _words(tokenizer: Tokenizer, document: Document) -> str:
    """A conversation as the model would be given it, where its tokenizer knows how."""
    content = document.content
    if isinstance(content, str):
        return content
    render = getattr(tokenizer, "apply_chat_template", None)
    if render is None or not getattr(tokenizer, "chat_template", None):
        return "\n".join(filter(None, map(words_of, content)))
    try:
        return str(render(content, tokenize=False))
    except Exception as error:  # a template is a program of the model's author
        raise DataError(f"the model's chat template refuses a conversation: {type(error).__name__}: {error}") from error


def _ids(tokenizer: Tokenizer, text: str, *, special: bool = False, at_most: int | None = None) -> Tensor:
    cut: dict[str, Any] = {} if at_most is None else {"truncation": True, "max_length": at_most}
    found = tokenizer(text, add_special_tokens=special, verbose=False, **cut)["input_ids"] if text else []
    return torch.tensor(found, dtype=torch.int64)
