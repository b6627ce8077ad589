"""Files of text, and files of tokens, as they come from users.

notes.txt                        one document; any other ending but those below is read as text too
chat.jsonl                       a document a line: {"text": "..."} or {"messages": [{"role": "user", "content": ".."}]}
a folder                         all such files in it and in the folders below, in the order of their paths; no hidden ones
tokens.npy, tokens.safetensors   integers, one stream [num_tokens] or samples [num_samples, length]; in a safetensors file
                                 the tensor `input_ids`, or the only one, and `attention_mask`, 0 where a token is padding
"""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from halfbin.errors import DataError, FormatError

LINE_FILES = (".jsonl", ".ndjson", ".json")
TOKEN_FILES = (".npy", ".safetensors")
BYTES_MAX = 2 * 2**30  # of one file; calibration reads a few MB

Messages: TypeAlias = "list[dict[str, Any]]"


@dataclass(frozen=True, slots=True)
class Document:
    """One document: a text, or the messages of a conversation."""

    content: str | Messages


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a file, or of all files in a folder.

    Raises:
      DataError: nothing there, no text, or a line of JSON that holds none; names file and line.
    """
    for file in _files(path):
        text = _text(file)
        if file.suffix in LINE_FILES:
            # Not splitlines: U+2028 and the like may stand inside a string of JSON.
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    yield _document(line, f"{file}, line {number}")
        elif text.strip():
            yield Document(text)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    # Links to folders are not followed: they may lead round in a circle.
    below = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    seen = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    files = sorted(file for file in seen if file.is_file() and file.suffix not in TOKEN_FILES)
    if not files:
        raise DataError(f"{path}: the folder holds no files of text; expected .txt or .jsonl files")
    return files


def _require_regular(file: Path) -> None:
    """A pipe would be waited for, and a device has no end."""
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode):
        raise DataError(f"{file}: is no regular file; write what it gives into one, and name that")


def _text(file: Path) -> str:
    try:
        _require_regular(file)
        if file.stat().st_size > BYTES_MAX:
            raise DataError(f"{file} has {file.stat().st_size} bytes; calibration needs a few MB: give a part of it")
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is no UTF-8 text (byte {error.start} is {error.object[error.start]:#04x})") from error
    if "\0" in text:
        raise DataError(
            f"{file}: holds zero bytes and is no text; expected text, JSONL, or tokens in .npy or .safetensors"
        )
    return text


def _document(line: str, where: str) -> Document:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error
    if isinstance(value, dict):
        text, messages = value.get("text"), value.get("messages")
        if isinstance(text, str):
            _require_text(text, where)
            return Document(text)
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            for message in messages:
                _require_text(words_of(message), where)
            return Document(messages)
    keys = ", ".join(map(repr, list(value)[:5])) if isinstance(value, dict) else type(value).__name__
    raise DataError(
        f'{where}: expected {{"text": "..."}} or {{"messages": [...]}} with role and content, found {keys:.200}'
    )


def _require_text(content: str, where: str) -> None:
    """JSON may spell half a character, which no tokenizer takes."""
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: character {error.start} is half of a surrogate pair; mend the file") from error


def _is_message(message: object) -> bool:
    """Whether a model's chat template may be given it: content may be missing beside a call of a tool, or come in parts."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content", 0)
    if isinstance(content, list):
        return all(isinstance(part, Mapping) and isinstance(part.get("text", ""), str) for part in content)
    return content is None or isinstance(content, str)


def words_of(message: Mapping[str, Any]) -> str:
    """What a message says; pictures and calls of tools say nothing."""
    content = message["content"] or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def read_tokens(path: Path) -> Tensor | list[Tensor]:
    """Tokens that were made beforehand: a stream, int64 [num_tokens], or samples, int64 [length] each, without masked tokens.

    Raises:
      DataError: the file is no such thing.
    """
    try:
        _require_regular(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    found, mask = (_numpy(path), None) if path.suffix == ".npy" else _safetensors(path)
    if found.ndim not in (1, 2) or found.is_floating_point() or found.dtype == torch.bool or not found.numel():
        raise DataError(
            f"{path}: expected integers of one or two dimensions, found {found.dtype} of shape {list(found.shape)}"
        )
    if mask is not None and mask.shape != found.shape:
        raise DataError(f"{path}: attention_mask has shape {list(mask.shape)}, and the tokens {list(found.shape)}")
    tokens = found.to(torch.int64)
    kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
    if bool((tokens[kept] < 0).any()):
        raise DataError(f"{path}: token {int(tokens[kept].min())} is negative; padding must be cut off or masked")
    return tokens[kept] if tokens.ndim == 1 else [row[keep] for row, keep in zip(tokens, kept, strict=True)]


def _numpy(path: Path) -> Tensor:
    try:
        array = np.load(
            path, allow_pickle=False, mmap_mode="r"
        )  # mapped: a header cannot ask for more than the file has
        if array.dtype == np.uint64 or not np.issubdtype(array.dtype, np.integer):
            raise DataError(f"{path}: expected integers, found {array.dtype}")
        return torch.from_numpy(np.array(array, dtype=np.int64))
    except DataError:
        raise
    except (OSError, ValueError, EOFError, AttributeError, MemoryError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: no NumPy array that can be read without pickle: {error}") from error


def _safetensors(path: Path) -> tuple[Tensor, Tensor | None]:
    from halfbin.formats.safetensors import SafetensorsFile

    try:
        file = SafetensorsFile(path)
    except FormatError as error:
        raise DataError(str(error)) from error
    try:
        mask = file.read("attention_mask") if "attention_mask" in file.tensors else None
        names = [name for name in file.tensors if name != "attention_mask"]
        if "input_ids" not in names and len(names) != 1:
            raise DataError(f"{path}: expected a tensor 'input_ids', or one tensor alone; found {', '.join(names[:5])}")
        return file.read("input_ids" if "input_ids" in names else names[0]), mask
    finally:
        file.close()
