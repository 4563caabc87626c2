"""The kernels of a GPU are the definitions: run without one, forward and every gradient.

inductor writes what it would write for an H100, and triton's interpreter executes it; what of a GPU
is not seen so, interpreter.py says. A few cases of each kernel are in the suite; all of them are

    KERNELS=all python -m pytest tests/test_kernels.py
"""

import os
import random
from functools import partial
from types import SimpleNamespace

import interpreter
import pytest
import torch
from test_gpu import error, examples, policy_of
from torch._inductor.utils import run_and_get_code

from nanoalign import nf4
from nanoalign.fast import attention as fast
from nanoalign.fast import head as fast_head
from nanoalign.logps import Head, token_logps
from nanoalign.packing import Example, attention, pack
from nanoalign.run.device import compile_layers

if reason := interpreter.missing():
    pytest.skip(reason, allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find an active CPU backend"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's of log(0), which is -inf
]
minutes = pytest.mark.skipif(os.environ.get("KERNELS") != "all", reason="takes minutes")


@pytest.fixture(autouse=True, scope="module")
def as_on_a_gpu():
    with interpreter.as_on_a_gpu():
        yield


@pytest.fixture(autouse=True)
def compiled_anew():
    torch.compiler.reset()


def assert_exact(got, expected, plain):
    """All that is `got` is `expected`, which is in float64, as nearly as what the definition gives
    in that dtype (`plain`): sums have another order, and a GPU rounds to 16 bits elsewhere."""
    for name in expected:
        least = max(2e-6, 3 * torch.finfo(got[name].dtype).eps)
        bound = max(least, 1.3 * error(plain[name], expected[name]))
        assert error(got[name], expected[name]) < bound, name


def kernels_of(function, *given) -> int:
    """How many kernels the emitted code of a call has."""
    _, code = run_and_get_code(function, *given)
    return sum(text.count("@triton.jit") for text in code)


# ------------------------------------------------------------------------------------- the head


def test_what_lies_between_the_head_s_products_is_one_kernel():
    z, target = torch.randn(5, 1003, dtype=torch.bfloat16), torch.arange(5)[:, None]
    assert kernels_of(fast_head.one_kernel(), z, target, 0.5, 2.0, 1.0) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "trains, bias, scale, softcap",
    [
        (False, False, 1.0, None),
        (False, True, 0.5, 2.0),
        (True, True, 0.5, 2.0),
        pytest.param(False, False, 1.0, 2.0, marks=minutes),
        pytest.param(True, False, 1.0, None, marks=minutes),
    ],
)
def test_the_head(trains, bias, scale, softcap, dtype):
    """At a vocabulary that is no multiple of a block, in chunks of which the last is not full."""
    g = torch.Generator().manual_seed(0)
    h, weight, bias = (
        torch.randn(21, 32, generator=g),
        torch.randn(1003, 32, generator=g),
        (torch.randn(1003, generator=g) if bias else None),
    )
    targets, upstream = torch.randint(0, 1003, (21,), generator=g), torch.randn(21, generator=g)

    def run(way, kind):
        given = {
            name: x.to(dtype).to(kind).requires_grad_(name == "h" or trains)
            for name, x in dict(h=h, weight=weight, bias=bias).items()
            if x is not None
        }
        head = Head(given["weight"], given.get("bias"), scale, softcap)
        logps = way(given["h"], head, targets)
        leaves = {name: x for name, x in given.items() if x.requires_grad}
        grads = torch.autograd.grad(logps, list(leaves.values()), upstream.to(logps.dtype))
        return {"logps": logps} | dict(zip(leaves, grads))

    got = run(partial(fast_head.token_logps, chunk=16), dtype)
    assert_exact(got, run(token_logps, torch.float64), run(token_logps, dtype))


# ------------------------------------------------------------------------------------------ NF4


@pytest.mark.parametrize("double", [False, True], ids=["plain", "doubled"])
@pytest.mark.parametrize("size", [(300, 128), (65, 31)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_nf4_bit_for_bit(dtype, size, double):
    torch.manual_seed(0)
    layer = nf4.NF4Linear.from_linear(torch.nn.Linear(*size, dtype=dtype), double_quant=double)
    absmax = layer.absmax
    if double:
        absmax = nf4.double_dequantize(absmax, layer.absmax2, layer.offset)
    expected = nf4.dequantize(layer.packed, absmax, size[::-1], dtype)
    assert torch.equal(layer.dequantize(), expected)


def test_decoding_is_one_kernel():
    """It reads 4 bits a weight and writes 16, and nothing in between goes to memory."""
    layer = nf4.NF4Linear.from_linear(torch.nn.Linear(64, 100), double_quant=True)
    assert kernels_of(layer.dequantize) == 1


@pytest.mark.parametrize("double", [False, True], ids=["plain", "doubled"])
def test_the_product_with_a_4_bit_weight(double):
    """As a compiled layer has it, one operator."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(96, 80), torch.randn(7, 96, dtype=torch.float64)
    layer, upstream = nf4.NF4Linear.from_linear(linear, double_quant=double), torch.randn(7, 80)
    exact = layer.dequantize().double()
    given = x.float().requires_grad_()
    y = torch.compile(layer, dynamic=True, fullgraph=True)(given)
    dx, dbias = torch.autograd.grad(y, [given, layer.bias], upstream)
    assert error(y, x @ exact.T + layer.bias.double()) < 1e-6
    assert error(dx, upstream.double() @ exact) < 1e-6
    assert error(dbias, upstream.double().sum(0)) < 1e-6


# ------------------------------------------------------------------------------------ attention


def random_trees(rng) -> list[Example]:
    """Texts that branch off each other anywhere, in rows of some hundreds of tokens."""

    def ids(least, most):
        return [rng.randrange(3, 300) for _ in range(rng.randint(least, most))]

    def tree():
        texts = [ids(2, 200)]
        for _ in range(rng.randint(0, 4)):
            text = rng.choice(texts)
            texts.append(text[: rng.randint(0, len(text))] + ids(1, 100))
        return Example(ids(1, 100), [(text, [True] * len(text)) for text in texts])

    return [tree() for _ in range(rng.randint(1, 3))]


# the second block of 128 queries sees all of the first block of keys, and the last text's queries
# nothing of the first block that the kernel looks at for those beside them
A_ROW = examples(((140, [150, 40]), (60, [40, 31]), (5, [33, 2, 17])))
A_FOREST = random_trees(random.Random(2))
SHORT_ROWS = [examples(((tokens, [1]),)) for tokens in (1, 127, 128, 256)]


@pytest.mark.parametrize(
    "row, dtype, size, window, softcap",
    [
        (A_ROW, torch.float32, 16, None, None),
        (A_FOREST, torch.float32, 32, 200, 2.0),
        (A_ROW, torch.bfloat16, 64, 40, None),
        *(
            pytest.param(*case, marks=minutes)
            for case in [
                (A_ROW, torch.float16, 64, None, 2.0),
                (A_FOREST, torch.bfloat16, 128, None, None),
                (A_ROW, torch.bfloat16, 128, 40, 20.0),
                (A_ROW, torch.bfloat16, 256, 40, 2.0),
                (A_ROW, torch.float32, 128, 2, None),
                *((row, torch.float32, 16, 100, 2.0) for row in SHORT_ROWS),
            ]
        ),
    ],
)
def test_attention_and_its_gradients(row, dtype, size, window, softcap):
    assert_attention(row, dtype, size, window, softcap)


def assert_attention(row, dtype, size, window, softcap):
    """Two query heads share a key and value head."""
    geometry, g = pack(row).geometry, torch.Generator().manual_seed(0)
    tokens, names = len(geometry.position), ("query", "key", "value")
    inputs = [torch.randn(1, n, tokens, size, generator=g).to(dtype) for n in (2, 1, 1, 2)]

    def run(way, kind):
        *qkv, upstream = (x.to(kind).requires_grad_() for x in inputs)
        out = way(*qkv, geometry, 0.3, window, softcap)
        grads = torch.autograd.grad(out, qkv, upstream.detach())
        return {"out": out} | dict(zip(names, grads))

    got = run(fast.attention, dtype)
    assert_exact(got, run(attention, torch.float64), run(attention, dtype))


@minutes
@pytest.mark.parametrize("window", [None, 30, 150])
def test_random_forests(window):
    rng = random.Random(window)
    for _ in range(70):
        assert_attention(random_trees(rng), torch.float32, 16, window, None)


# ------------------------------------------------------------------------------------ whole layers


def by_definition(patch):
    """The lesson's own lines, and no twin of attention and head."""
    patch.setattr(fast, "attention", attention)
    patch.setattr(fast_head, "token_logps", token_logps)


@pytest.mark.parametrize(
    "kind, four_bits, checkpointing, dtype",
    [
        ("llama", False, False, torch.float32),
        pytest.param("llama", True, True, torch.float32, marks=minutes),
        pytest.param("llama", False, False, torch.bfloat16, marks=minutes),
        pytest.param("gemma2", False, False, torch.float32, marks=minutes),
        pytest.param("gemma2", True, True, torch.float32, marks=minutes),
    ],
)
def test_compiled_layers_and_their_gradients(kind, four_bits, checkpointing, dtype, monkeypatch):
    """A model of them, with LoRA and without (the reference): log-probs of a row of trees, and the
    gradient of everything that trains."""
    batch = examples(((9, [60]), (30, [20, 31]), (5, [13])))

    def run(dtype, compiled=False):
        policy = policy_of(kind, four_bits, "cpu")
        lm = policy.lm.double().train() if dtype == torch.float64 else policy.lm.train()
        for p in lm.parameters():  # what trains stays in fp32, or in fp64
            p.data = p.data if p.requires_grad else p.data.to(dtype)
        if compiled:
            flags = dict(
                torch_compile=None, gradient_checkpointing=checkpointing, sharded=False, plain=False
            )
            if checkpointing:
                lm.model.gradient_checkpointing_enable({"use_reentrant": False})
            compile_layers(SimpleNamespace(**flags), lm)
        logps = lm(batch).logps
        logps.sum().backward()
        with torch.no_grad(), policy.reference():
            found = {"logps": logps, "reference": lm(batch).logps}
        trained = {name: p.grad for name, p in lm.named_parameters() if p.requires_grad}
        assert len(trained) > 20 and all(grad.any() for grad in trained.values())
        return found | trained

    got = run(dtype, compiled=True)
    by_definition(monkeypatch)
    assert_exact(got, run(torch.float64), run(dtype))
