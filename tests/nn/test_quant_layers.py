from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbin.errors import SchemeError
from halfbin.nn import EXACT, Geometry, QuantConv, QuantConv1D, QuantEmbedding, QuantLinear, QuantModule
from halfbin.tensor import dequantize, parse_scheme, quantize

SCHEMES = [
    "int8-channel",
    "int4-g32-asym-f16",
    "fp8_e4m3-tensor",
    "nf4-g8-bf16",
    "mxfp4",
    "int4-b4x8",
    "ternary-channel",
]
schemes = pytest.mark.parametrize("spelling", [pytest.param(s, id=s) for s in SCHEMES])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(spelling: str) -> QuantLinear:
    return QuantLinear(quantize(normal(12, 40), parse_scheme(spelling)), nn.Parameter(normal(12, seed=1)))


@schemes
@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)) for d in (torch.float32, torch.bfloat16)])
def test_a_quantized_linear_is_exactly_the_float_one_with_dequantized_weights(
    spelling: str, dtype: torch.dtype
) -> None:
    layer = linear(spelling).to(dtype)
    layer.choose(EXACT)
    plain = nn.Linear(40, 12, dtype=dtype)
    plain.weight.data = dequantize(layer.qtensor, dtype)
    assert layer.bias is not None
    plain.bias = layer.bias
    x = normal(2, 5, 40).to(dtype)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.weight, plain.weight)


@schemes
@pytest.mark.parametrize("ids", [pytest.param([[3, 0, 29], [7, 7, 4]], id="matrix"), pytest.param([], id="none")])
def test_a_quantized_embedding_is_exactly_the_float_one_with_a_dequantized_table(
    spelling: str, ids: list[list[int]]
) -> None:
    q = quantize(normal(30, 40), parse_scheme(spelling))
    layer = QuantEmbedding(q, padding_idx=3)
    where = torch.tensor(ids, dtype=torch.int64)
    assert torch.equal(layer(where), nn.functional.embedding(where, dequantize(q)))
    assert layer.to(torch.bfloat16)(where).dtype == torch.bfloat16


CONVOLUTIONS = [
    pytest.param(nn.Conv1d(4, 6, 3), (2, 4, 9), id="1d"),
    pytest.param(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 9, 8), id="2d-stride"),
    pytest.param(nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2), (2, 4, 9, 8), id="2d-same"),
    pytest.param(nn.Conv2d(4, 8, 3, groups=4, padding=(1, 2)), (4, 9, 8), id="2d-depthwise-unbatched"),
    pytest.param(nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 9, 8), id="2d-reflect"),
    pytest.param(nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"), (2, 4, 9), id="1d-same-even-circular"),
    pytest.param(nn.Conv3d(4, 6, 2), (2, 4, 5, 6, 7), id="3d"),
]


@schemes
@pytest.mark.parametrize(("conv", "shape"), CONVOLUTIONS)
def test_a_quantized_convolution_is_exactly_the_float_one_with_dequantized_weights(
    conv: nn.Conv2d, shape: tuple[int, ...], spelling: str
) -> None:
    q = quantize(conv.weight.detach().flatten(1), parse_scheme(spelling))
    layer = QuantConv(q, Geometry.of(conv), conv._parameters["bias"])
    plain = copy.deepcopy(conv)
    plain.weight.data = dequantize(q).reshape(conv.weight.shape)
    assert torch.equal(layer(normal(*shape)), plain(normal(*shape)))
    assert torch.equal(layer.weight, plain.weight)


@schemes
def test_a_quantized_conv1d_holds_the_transposed_weight_and_gives_what_conv1d_gives(spelling: str) -> None:
    conv = Conv1D(12, 40)
    conv.bias.data = normal(12)
    q = quantize(conv.weight.detach().T.contiguous(), parse_scheme(spelling))
    layer = QuantConv1D(q, conv.bias, kernels=EXACT)
    conv.weight.data = dequantize(q).T
    x = normal(2, 5, 40)
    # Both sum 40 products in float32, in different orders.
    torch.testing.assert_close(
        layer(x), conv(x), rtol=0, atol=40 * 1.2e-7 * float(x.abs().max() * conv.weight.abs().max())
    )
    assert layer.weight.shape == conv.weight.shape == (40, 12)
    assert (layer.nf, layer.nx) == (12, 40)


CASTS = [
    pytest.param(lambda m: m.to(torch.bfloat16), torch.bfloat16, id="to-bf16"),
    pytest.param(lambda m: m.half(), torch.float16, id="half"),
    pytest.param(lambda m: m.double(), torch.float64, id="double"),
    pytest.param(lambda m: nn.Sequential(m).to("cpu", torch.bfloat16)[0], torch.bfloat16, id="parent-to"),
]


@schemes
@pytest.mark.parametrize(("cast", "dtype"), CASTS)
def test_casting_a_module_changes_no_code_and_no_scale(spelling: str, cast: object, dtype: torch.dtype) -> None:
    layer = linear(spelling)
    before = copy.deepcopy(layer.qtensor)
    cast(layer)  # type: ignore[operator]  # a parameter of the test
    after = layer.qtensor  # checks the types of codes and scale
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.scale.view(torch.uint8), before.scale.view(torch.uint8))
    assert layer.dtype == layer.weight.dtype == dtype
    assert layer.bias is not None
    assert layer.bias.dtype == dtype


@schemes
def test_moving_a_module_moves_its_scales(spelling: str) -> None:
    layer = linear(spelling).to("meta")
    assert {b.device.type for b in layer.buffers()} == {"meta"}
    assert layer.scale.dtype == layer.scheme.scale_format.dtype


def test_a_cast_that_fails_leaves_the_scale_where_it_was() -> None:
    layer = linear("int8-channel")
    with pytest.raises(ZeroDivisionError):
        layer._apply(lambda t: 1 / 0)  # type: ignore[arg-type,return-value]  # it must fail
    assert isinstance(layer.scale, Tensor)


def pickled(layer: QuantModule) -> QuantModule:
    # By torch's own writer: plain pickle cannot read e8m0 storages back (torch 2.13), its legacy format has no name for them.
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: QuantModule = torch.load(file, weights_only=False)
    return loaded


def through_a_state(layer: QuantModule) -> QuantModule:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = QuantLinear(quantize(normal(12, 40, seed=7), layer.scheme), nn.Parameter(torch.zeros(12)))
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@schemes
@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(pickled, id="pickle"),
        pytest.param(through_a_state, id="state_dict"),
    ],
)
def test_a_copy_computes_the_same(spelling: str, copied: object) -> None:
    layer = linear(spelling)
    other = copied(layer)  # type: ignore[operator]  # a parameter of the test
    x = normal(3, 40)
    assert torch.equal(other(x), layer(x))
    assert other.scheme == layer.scheme
    assert other.codes.data_ptr() != layer.codes.data_ptr()


def test_the_state_holds_codes_scale_zero_point_and_bias_only() -> None:
    assert set(linear("int4-g32-asym-f16").state_dict()) == {"codes", "scale", "zero_point", "bias"}
    assert set(linear("int8-channel").state_dict()) == {"codes", "scale", "bias"}


@pytest.mark.parametrize(
    "other", [pytest.param("int4-g32-asym", id="scale"), pytest.param("uint4-g32-asym-f16", id="codes")]
)
def test_a_state_of_other_types_is_refused_instead_of_cast(other: str) -> None:
    with pytest.raises(SchemeError, match="another scheme"):
        linear("int4-g32-asym-f16").load_state_dict(linear(other).state_dict())


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        pytest.param(
            linear("int4-g8"), "in_features=40, out_features=12, bias=True, int4-g8, kernel=reference", id="linear"
        ),
        pytest.param(
            QuantEmbedding(quantize(normal(3, 4), parse_scheme("nf4"))), "[3, 4], nf4-channel", id="embedding"
        ),
        pytest.param(
            QuantConv(quantize(normal(6, 36), parse_scheme("int8")), Geometry.of(nn.Conv2d(4, 6, 3, padding=1)), None),
            "[6, 4, 3, 3], padding=(1, 1), bias=False, int8-channel",
            id="convolution",
        ),
    ],
)
def test_what_is_printed_names_the_scheme(layer: QuantModule, words: str) -> None:
    assert words in repr(layer)
