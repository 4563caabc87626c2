"""NF4: bit for bit against bitsandbytes, against golden bytes, and as a layer that trains."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanoalign import InputError, nf4
from nanoalign.fast import nf4 as fast
from nanoalign.formats.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from nanoalign.nf4 import (
    NF4Linear,
    dequantize,
    double_dequantize,
    double_quantize,
    quantize,
)

STATE = "l.weight.quant_state.bitsandbytes__nf4"
TABLES = nf4.LEVELS, nf4.DYNAMIC_MAP
BOTH = pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def a_linear(out=48, inp=80, bias=True, dtype=torch.float32):
    linear = nn.Linear(inp, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(randn(out, inp, seed=1) * 0.05)
    return linear


def peer():
    warnings.simplefilter("ignore")
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional as bnb

    return bnb


# ---------------------------------------------------------------------------- golden, needs no peer


def test_levels_are_the_quantiles_of_a_normal():
    assert (nf4.derive_levels() - nf4.LEVELS).abs().max() < 1e-6
    assert nf4.LEVELS[7] == 0 and len(nf4.LEVELS) == 16


def test_golden_bytes():
    """Every level is its own code; the even element is the high nibble."""
    packed, absmax = quantize(nf4.LEVELS * 3, 64)
    assert packed.flatten().tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert packed.dtype == torch.uint8 and packed.shape == (8, 1)
    assert absmax.tolist() == [3.0] and absmax.dtype == torch.float32
    back = dequantize(packed, absmax, (2, 8), torch.float32)
    assert torch.equal(back, (nf4.LEVELS * 3).view(2, 8))


def test_halfway_takes_the_lower_level():
    x = torch.cat([nf4.MIDPOINTS, torch.ones(1)])
    assert quantize(x)[0].flatten().tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    above = torch.nextafter(nf4.MIDPOINTS, torch.tensor(2.0))
    codes = quantize(torch.cat([above, torch.ones(1)]))[0].flatten().tolist()
    assert codes == [0x12, 0x34, 0x56, 0x78, 0x9A, 0xBC, 0xDE, 0xFF]


def test_odd_length_and_zero_block():
    packed, absmax = quantize(torch.tensor([1.0, -1.0, 0.5]))
    assert packed.flatten().tolist() == [0xF0, 0xC7]  # the last low nibble is 7, the zero
    packed, absmax = quantize(torch.zeros(64))
    assert absmax.item() == 0 and set(packed.flatten().tolist()) == {0x77}
    assert torch.equal(dequantize(packed, absmax, (64,), torch.float32), torch.zeros(64))


def test_error_on_normal_weights_and_idempotence():
    for dtype in (torch.float32, torch.bfloat16):
        w = randn(512, 512, dtype=dtype)
        packed, absmax = quantize(w)
        back = dequantize(packed, absmax, w.shape, dtype)
        error = (back.float() - w.float()).square().mean().sqrt() / w.float().square().mean().sqrt()
        assert abs(error - 0.0919) < 0.001
        again, absmax_again = quantize(back)
        assert torch.equal(again, packed) and torch.equal(absmax_again, absmax)


def test_dequantize_rounds_the_fp32_product_once():
    w = randn(64, 64)
    packed, absmax = quantize(w)
    codes = torch.stack([packed[:, 0] >> 4, packed[:, 0] & 15], -1).flatten().long()
    exact = (nf4.LEVELS[codes].view(-1, 64) * absmax[:, None]).view(64, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(packed, absmax, w.shape, dtype), exact.to(dtype))


@pytest.mark.parametrize("chunk", [128, fast.CHUNK])
@pytest.mark.parametrize("blocksize", [32, 64, 96, 128])
def test_each_twin_is_its_definition_bit_for_bit(chunk, blocksize, monkeypatch):
    """Chunks do not show; neither do odd sizes, an incomplete last block, or pairs of levels."""
    monkeypatch.setattr(fast, "CHUNK", chunk)
    for shape in (37, 53), (64, 96), (1, 1), (3, 5, 7), (700, 512):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            w = randn(*shape, dtype=dtype)
            whole, parts = quantize(w, blocksize), fast.in_chunks(quantize, w, blocksize)
            for a, b in zip(whole, parts):
                assert a.dtype == b.dtype and torch.equal(a, b)
            dense = dequantize(*whole, shape, dtype, blocksize)
            packed, absmax = whole
            quick = fast.rebuild(packed, [absmax], shape, dtype, blocksize, *TABLES)
            assert dense.dtype == quick.dtype == dtype and torch.equal(dense, quick)


def test_quantize_leaves_its_input_alone():
    w = randn(4, 64)
    before = w.clone()
    quantize(w)
    assert torch.equal(w, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight_is_refused_by_name(bad):
    linear = a_linear()
    with torch.no_grad():
        linear.weight[3, 5] = bad
    with pytest.raises(InputError, match="layers.0.q_proj"):
        NF4Linear.from_linear(linear, name="layers.0.q_proj")


def test_double_quantization_is_the_nearest_code():
    absmax = randn(1000).abs()
    codes, absmax2, offset = double_quantize(absmax)
    assert codes.dtype == torch.uint8 and len(absmax2) == 4 and offset == absmax.mean()
    scaled = (absmax - offset) / absmax2.repeat_interleave(256)[:1000]
    distance = (scaled[:, None] - nf4.DYNAMIC_MAP).abs()  # (1000, 256)
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    assert (chosen <= distance.amin(1) + 1e-7).all()
    back = double_dequantize(codes, absmax2, offset)
    assert torch.equal(
        back, nf4.DYNAMIC_MAP[codes.long()] * absmax2.repeat_interleave(256)[:1000] + offset
    )


def test_double_quantization_of_equal_scales():
    absmax = torch.full((300,), 0.25)
    assert torch.equal(double_dequantize(*double_quantize(absmax)), absmax)


def test_dynamic_map():
    m = nf4.DYNAMIC_MAP
    assert len(m) == 256 and m[127] == 0 and m[255] == 1 and (m[1:] > m[:-1]).all()
    assert abs(m[0] + 0.99296874) < 1e-7


# ---------------------------------------------------------------------------- bitsandbytes, live

SHAPES = [(64, 128), (48, 80), (7, 33), (1, 1), (3, 64 * 5 + 2), (1, 130)]


@pytest.mark.parametrize("blocksize", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bytes_and_scales_are_bitsandbytes_own(dtype, blocksize):
    bnb = peer()
    for seed, shape in enumerate(SHAPES):
        w = randn(*shape, seed=seed, dtype=dtype)
        w.view(-1)[:blocksize] *= seed % 2  # a zero block in every other
        theirs, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type="nf4")
        packed, absmax = quantize(w, blocksize)
        assert torch.equal(packed, theirs) and packed.shape == theirs.shape
        assert torch.equal(absmax, state.absmax)
        if shape[-1] % blocksize == 0 or shape[-1] % 16:  # elsewhere theirs is wrong on AVX512
            ours = dequantize(packed, absmax, shape, dtype, blocksize)
            assert torch.equal(ours, bnb.dequantize_4bit(theirs, state).view(shape))


def test_weights_next_to_a_midpoint():
    """One bit more or less in the scaled value is another code: full blocks multiply by the
    reciprocal, the incomplete last block divides."""
    bnb = peer()
    for seed in range(20):
        peak = 1 + torch.rand(1, generator=torch.Generator().manual_seed(seed))
        near = nf4.MIDPOINTS * peak
        near = torch.cat([near, near.nextafter(peak), near.nextafter(-peak)])
        block = torch.cat([peak, near, near[:18]])  # 64
        w = torch.cat([block, block, block[:46]])[None]
        theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
        packed, absmax = quantize(w)
        assert torch.equal(packed, theirs) and torch.equal(absmax, state.absmax)


def test_weights_of_every_magnitude():
    bnb = peer()
    w = randn(64, 64) * 10.0 ** torch.arange(-44, 20)[:, None].double()
    w = w.float()  # down to denormals
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    packed, absmax = quantize(w)
    assert torch.equal(packed, theirs) and torch.equal(absmax, state.absmax)


def test_double_quantization_against_bitsandbytes():
    bnb = peer()
    w = randn(512, 512)
    _, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes, absmax2, offset = double_quantize(quantize(w)[1])
    assert torch.equal(nf4.DYNAMIC_MAP, state.state2.code)
    assert torch.equal(offset, state.offset) and torch.equal(absmax2, state.state2.absmax)
    off = (codes.int() - state.absmax.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.01  # their CPU table is coarser
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(double_dequantize(state.absmax, state.state2.absmax, state.offset), theirs)


# ---------------------------------------------------------------------------- the layer


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_a_dense_linear(dtype, double):
    linear = a_linear(dtype=dtype)
    layer = NF4Linear.from_linear(linear, double_quant=double)
    dense = copy.deepcopy(linear)
    dense.weight.data = layer.dequantize()
    x = randn(2, 5, 80, seed=3, dtype=dtype).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    y, y2 = layer(x), dense(x2)
    grad = randn(2, 5, 48, seed=4, dtype=dtype)
    y.backward(grad)
    y2.backward(grad)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert y.dtype == dtype and torch.allclose(y, y2, atol=tolerance)
    assert torch.allclose(x.grad, x2.grad, atol=tolerance)
    assert torch.allclose(layer.bias.grad, dense.bias.grad, atol=tolerance)
    assert [n for n, _ in layer.named_parameters()] == ["bias"]  # no gradient for the weight


def test_frozen_bias_and_no_bias():
    linear = a_linear()
    linear.bias.requires_grad_(False)
    layer = NF4Linear.from_linear(linear)
    layer(randn(3, 80).requires_grad_()).sum().backward()
    assert layer.bias.grad is None
    assert not layer(randn(3, 80)).requires_grad
    bare = NF4Linear.from_linear(a_linear(bias=False))
    assert bare.bias is None
    assert torch.allclose(bare(randn(3, 80)), layer(randn(3, 80)) - layer.bias, atol=1e-6)


def test_input_of_another_dtype_sees_the_same_weights():
    layer = NF4Linear.from_linear(a_linear(dtype=torch.bfloat16))
    x = randn(3, 80).requires_grad_()
    y = layer(x)
    expected = x @ layer.dequantize().float().T + layer.bias.float()
    assert y.dtype == torch.float32 and torch.allclose(y, expected, atol=1e-6)
    y.sum().backward()
    assert torch.allclose(x.grad[0], layer.dequantize().float().sum(0), atol=1e-6)
    half = layer(x.detach().half())
    assert half.dtype == torch.float16


def test_autocast_trains():
    layer = NF4Linear.from_linear(a_linear())
    x = randn(3, 80).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert torch.allclose(x.grad[0], layer.dequantize().sum(0), atol=0.02)


def saved_bytes(f):
    seen = {}

    def pack(t):
        seen[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        f()
    return sum(seen.values())


@BOTH
def test_backward_keeps_only_packed_bytes(double):
    linear = a_linear(256, 512, dtype=torch.bfloat16)
    layer = NF4Linear.from_linear(linear, double_quant=double)
    n = 256 * 512
    x = randn(4, 512, dtype=torch.bfloat16).requires_grad_()
    blocks = n // 64
    expected = n // 2 + (blocks + 4 * blocks // 256 + 4 if double else 4 * blocks)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == expected
    assert saved_bytes(lambda: layer(x)) == 0  # it is the layer that is remembered
    bits = 8 * expected / n
    assert abs(bits - (4.127 if double else 4.5)) < 1e-3
    assert f"{bits:.2f} bits" in repr(layer)


@BOTH
def test_checkpointing_gives_the_same_gradients(double):
    layer = NF4Linear.from_linear(a_linear(), double_quant=double)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        x = randn(3, 80).requires_grad_()
        layer.bias.grad = None
        run(x).square().sum().backward()
        grads.append((x.grad, layer.bias.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


@BOTH
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_compiled_model_trains_and_keeps_only_packed_bytes(double, checkpointed):
    """Inlined into the graph, the compiler would keep the dense weight: 4 bytes a weight here."""
    torch.compiler.reset()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = NF4Linear.from_linear(a_linear(80, 80), double_quant=double)
            self.b = NF4Linear.from_linear(a_linear(80, 80), double_quant=double)

        def body(self, x):
            return self.b(self.a(x.sin()).cos())

        def forward(self, x):
            y = checkpoint(self.body, x, use_reentrant=False) if checkpointed else self.body(x)
            return y.exp()

    model = Model()
    x = randn(3, 80).requires_grad_()
    model(x).sum().backward()
    expected = [x.grad] + [p.grad for p in model.parameters()]
    x.grad = None
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="aot_eager")
        compiled(x).sum().backward()
        got = [x.grad] + [p.grad for p in model.parameters()]
        assert all(torch.allclose(g, e, rtol=1e-5, atol=1e-6) for g, e in zip(got, expected))
        activations = 5 * x.nbytes
        assert saved_bytes(lambda: compiled(x)) <= 2 * 80 * 80 * 4.5 / 8 + activations


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_of_compiled_layers_is_the_product_bit_for_bit(double, dtype):
    """Called, checkpointed, and in one graph, with and without a checkpoint in it."""
    torch.compiler.reset()
    layer = NF4Linear.from_linear(a_linear(dtype=dtype), double_quant=double)
    x = randn(2, 3, 80, dtype=dtype)

    def results(run):
        leaf, layer.bias.grad = x.clone().requires_grad_(), None
        y = run(leaf)
        y.square().sum().backward()
        return y, leaf.grad, layer.bias.grad

    def operator(x):
        return layer.product(x, layer)

    def checkpointed(x):
        return checkpoint(operator, x, use_reentrant=False)

    one_graph = dict(backend="aot_eager", fullgraph=True, dynamic=True)
    ways = operator, checkpointed, *(torch.compile(f, **one_graph) for f in (layer, checkpointed))
    for way in ways:
        assert all(torch.equal(a, b) for a, b in zip(results(way), results(layer)))
    scales = [layer.absmax, layer.absmax2, layer.offset] if double else [layer.absmax]
    stored = layer.packed, scales, [48, 80], dtype, 64
    product = torch.ops.nanoalign.nf4_product
    torch.library.opcheck(product, (x.requires_grad_(), layer.bias, *stored, False))


@BOTH
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_fused_expression_is_the_same_decode(compiled, double):
    """What a GPU compiles and what a CPU loops over give the bits of the definition."""
    if compiled and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler here")
    decode = torch.compile(fast.decode) if compiled else fast.decode
    for shape in (32, 64), (48, 64), (700, 96):
        packed, absmax = quantize(randn(*shape))
        scales = nf4.double_quantize(absmax) if double else [absmax]
        absmax = nf4.double_dequantize(*scales) if double else absmax
        packed = packed.view(-1, 32)
        for dtype in (torch.float32, torch.bfloat16):
            plain = decode(packed, scales, *TABLES, dtype)
            assert torch.equal(plain, fast.decode_cpu(packed, scales, *TABLES, dtype))
            assert torch.equal(plain.flatten(), dequantize(packed, absmax, shape, dtype).flatten())


def test_deepcopy_and_state_dict_round_trip():
    for double in (False, True):
        layer = NF4Linear.from_linear(a_linear(), double_quant=double)
        x = randn(3, 80)
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        other = NF4Linear.from_linear(nn.Linear(80, 48), double_quant=double)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), layer(x))


@BOTH
def test_a_move_of_dtype_leaves_codes_and_scales(double):
    layer = NF4Linear.from_linear(a_linear(), double_quant=double)
    before = {k: v.clone() for k, v in layer.named_buffers()}
    for move in (
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.float64),
        lambda m: m.to("cpu", torch.bfloat16),
    ):
        move(nn.Sequential(layer))
        for name, buffer in layer.named_buffers():
            assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    assert layer.bias.dtype == torch.bfloat16
    meta = layer.to("meta")
    assert all(b.is_meta for b in meta.buffers()) and meta.absmax.dtype == before["absmax"].dtype


def test_pack_fills_a_layer_made_without_weights():
    linear = a_linear(bias=False, dtype=torch.bfloat16)
    layer = NF4Linear(80, 48)
    layer.pack(linear.weight.detach())
    x = randn(3, 80, dtype=torch.bfloat16)
    assert torch.equal(layer(x), NF4Linear.from_linear(linear)(x))


# ---------------------------------------------------------------------------- on disk


@BOTH
def test_on_disk_round_trip(double):
    layer = NF4Linear.from_linear(a_linear(dtype=torch.bfloat16), double_quant=double)
    back = from_bitsandbytes(to_bitsandbytes(layer, "l"), "l", (48, 80))
    assert back.dtype == torch.bfloat16 and back.double_quant == double
    theirs, ours = back.state_dict(), layer.state_dict()
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[k], ours[k]) and theirs[k].shape == ours[k].shape for k in ours)


@BOTH
def test_on_disk_is_what_bitsandbytes_writes_and_reads(double):
    peer()
    import bitsandbytes as bnb

    linear = a_linear(128, 256, dtype=torch.bfloat16)
    theirs = bnb.nn.Linear4bit(
        256, 128, quant_type="nf4", compress_statistics=double, compute_dtype=torch.bfloat16
    ).bfloat16()
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")  # this quantizes; train mode, as eval repacks the weight in place
    saved = {f"l.{k}": v for k, v in theirs.state_dict().items()}

    read = from_bitsandbytes(saved, "l", (128, 256))
    written = to_bitsandbytes(read, "l")
    assert sorted(written) == sorted(saved)
    for key, tensor in saved.items():
        assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor), key

    ours = to_bitsandbytes(NF4Linear.from_linear(linear, double_quant=double), "l")
    stats = {k.removeprefix("l.weight."): v for k, v in ours.items() if k.startswith("l.weight.")}
    opened = bnb.nn.Params4bit.from_prequantized(ours["l.weight"], stats, device="cpu")
    dense = bnb.functional.dequantize_4bit(opened.data, opened.quant_state)
    assert torch.equal(dense, from_bitsandbytes(ours, "l").dequantize())
    if not double:  # doubled codes may differ by one
        assert all(torch.equal(ours[k], saved[k]) for k in saved)


def test_two_layers_fit_in_one_file():
    """safetensors refuses tensors that share memory, as the levels of all layers might."""
    save = pytest.importorskip("safetensors.torch").save
    layers = [NF4Linear.from_linear(a_linear(), double_quant=True) for _ in range(2)]
    save(to_bitsandbytes(layers[0], "a") | to_bitsandbytes(layers[1], "b"))


def test_the_state_is_json_byte_for_byte():
    layer = NF4Linear.from_linear(a_linear(dtype=torch.bfloat16))
    assert bytes(to_bitsandbytes(layer, "l")[STATE].tolist()) == (
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [48, 80]}'
    )


@pytest.mark.parametrize(
    "change, key",
    [
        (dict(quant_type="fp4"), STATE),
        (dict(blocksize=63), STATE),
        (dict(blocksize=0), STATE),
        (dict(shape=[80, 48]), STATE),
        (dict(shape=[48]), STATE),
        (dict(dtype="int3"), STATE),
        (dict(nested_offset=0.1), STATE),
        (dict(blocksize=128), "l.weight.absmax"),
        (dict(nested_offset=None, nested_blocksize=256, nested_dtype="float32"), STATE),
        (dict(nested_offset=0.1, nested_blocksize=128, nested_dtype="float32"), STATE),
    ],
)
def test_a_wrong_state_is_refused_by_name(change, key):
    tensors = to_bitsandbytes(NF4Linear.from_linear(a_linear()), "l")
    state = json.loads(bytes(tensors[STATE].tolist())) | change
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(InputError, match=f"^{key}:"):
        from_bitsandbytes(tensors, "l", (48, 80))


@pytest.mark.parametrize(
    "suffix",
    [
        "",
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
        ".quant_state.bitsandbytes__nf4",
    ],
)
def test_a_missing_or_odd_tensor_is_refused_by_name(suffix):
    tensors = to_bitsandbytes(NF4Linear.from_linear(a_linear(), double_quant=True), "l")
    key = "l.weight" + suffix
    with pytest.raises(InputError, match=f"^{key}: missing"):
        from_bitsandbytes({k: t for k, t in tensors.items() if k != key}, "l")
    for wrong in (tensors[key][:-1], tensors[key].to(torch.float64)):
        with pytest.raises(InputError, match=f"^{key}:"):
            from_bitsandbytes(tensors | {key: wrong}, "l")
    if suffix.endswith("map"):
        with pytest.raises(InputError, match=f"^{key}: other levels"):
            from_bitsandbytes(tensors | {key: tensors[key] + 1e-3}, "l")


def test_a_bias_of_another_length_is_refused():
    tensors = to_bitsandbytes(NF4Linear.from_linear(a_linear()), "l")
    with pytest.raises(InputError, match=r"^l.bias: shape \(3,\), expected \(48,\)"):
        from_bitsandbytes(tensors | {"l.bias": torch.zeros(3)}, "l")


# ---------------------------------------------------------------------------- layers in general


@BOTH
def test_merge_gives_the_linear_layer_that_it_computes(double):
    layer = NF4Linear.from_linear(a_linear(dtype=torch.bfloat16), double_quant=double)
    dense, x = layer.merge(), randn(3, 80, dtype=torch.bfloat16)
    assert type(dense) is nn.Linear and dense.weight.dtype == torch.bfloat16
    assert torch.equal(dense(x), layer(x)) and dense.bias is layer.bias
    assert not dense.weight.requires_grad
