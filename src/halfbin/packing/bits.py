"""STUB, replaced by the files branch."""
from __future__ import annotations
import torch
from torch import Tensor
def packed_size(num_codes: int, bits: int) -> int: return -(-num_codes*bits//8)
def pack(codes: Tensor, bits: int) -> Tensor:
    *lead, n = codes.shape
    b = (codes[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    b = b.reshape(*lead, n*bits)
    size = packed_size(n, bits)
    full = torch.zeros(*lead, size*8, dtype=torch.uint8); full[..., :n*bits] = b
    return (full.reshape(*lead, size, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)
def unpack(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    *lead, size = packed.shape
    b = ((packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(*lead, size*8)[..., :num_codes*bits]
    return (b.reshape(*lead, num_codes, bits) << torch.arange(bits, dtype=torch.uint8)).sum(-1).to(torch.uint8)
def pack_words(codes: Tensor, bits: int) -> Tensor:
    p = pack(codes, bits); *lead, size = p.shape
    full = torch.zeros(*lead, -(-size//4)*4, dtype=torch.uint8); full[..., :size] = p
    return full.contiguous().view(torch.int32)
def unpack_words(words: Tensor, bits: int, num_codes: int) -> Tensor:
    return unpack(words.contiguous().view(torch.uint8), bits, num_codes)
