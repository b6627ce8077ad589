"""Files of text, and files of tokens, as they come from users.

notes.txt                        one document; any other ending but those below is read as text too
chat.jsonl                       a document a line: {"text": "..."} or {"messages": [{"role": "user", "content": ".."}]}
a folder                         all such files in it, in the order of their names
tokens.npy, tokens.safetensors   integers, one stream [num_tokens] or samples [num_samples, length]; in a safetensors file
                                 the tensor `input_ids`, or the only one
"""

from __future__ import annotations

import json
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
    files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
    files = [f for f in files if f.suffix not in TOKEN_FILES]
    if not files:
        raise DataError(f"{path}: the folder holds no files of text; expected .txt or .jsonl files")
    return files


def _text(file: Path) -> str:
    try:
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
        content = value.get("text", value.get("messages"))
        if isinstance(content, str):
            _require_text(content, where)
            return Document(content)
        if isinstance(content, list) and content and all(map(_is_message, content)):
            for message in content:
                _require_text(message["content"], where)
            return Document(content)
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
    return (
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )


def read_tokens(path: Path) -> Tensor:
    """Tokens that were made beforehand, int64 [num_tokens] or [num_samples, length].

    Raises:
      DataError: the file is no such thing.
    """
    found = _numpy(path) if path.suffix == ".npy" else _safetensors(path)
    if found.ndim not in (1, 2) or found.is_floating_point() or found.dtype == torch.bool or not found.numel():
        raise DataError(
            f"{path}: expected integers of one or two dimensions, found {found.dtype} of shape {list(found.shape)}"
        )
    tokens = found.to(torch.int64)
    if int(tokens.min()) < 0:
        raise DataError(f"{path}: token {int(tokens.min())} is negative; padding must be cut off")
    return tokens


def _numpy(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
        if array.dtype == np.uint64 or not np.issubdtype(array.dtype, np.integer):
            raise DataError(f"{path}: expected integers, found {array.dtype}")
        return torch.from_numpy(array.astype(np.int64))
    except DataError:
        raise
    except (OSError, ValueError, EOFError, AttributeError, MemoryError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: no NumPy array that can be read without pickle: {error}") from error


def _safetensors(path: Path) -> Tensor:
    from halfbin.formats.safetensors import SafetensorsFile

    try:
        file = SafetensorsFile(path)
    except FormatError as error:
        raise DataError(str(error)) from error
    try:
        names = list(file.tensors)
        if "input_ids" not in names and len(names) != 1:
            raise DataError(f"{path}: expected a tensor 'input_ids', or one tensor alone; found {', '.join(names[:5])}")
        return file.read("input_ids" if "input_ids" in names else names[0])
    finally:
        file.close()
