"""Log-probs without logits, against log_softmax(logits).gather: values, gradients, memory."""

import math
import shutil
from argparse import Namespace

import pytest
import torch
from conftest import tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from nanoalign.fast import head as fast
from nanoalign.fast.head import token_logps
from nanoalign.logps import Head, PackedLM, Scores
from nanoalign.logps import token_logps as definition
from nanoalign.lora import add_token_rows
from nanoalign.packing import Example, pack, packed

N, D, V = 37, 24, 97
ROWS = [5, 96]  # vocabulary entries that train on their own
BOTH = "weight and bias"
HEADS = {
    "product": {},
    "scale": dict(scale=0.25),
    "softcap": dict(softcap=2.0),
    "both": dict(scale=3.0, softcap=4.0),
}


def tensors(dtype=torch.float32, seed=0):
    """Hidden states, a head's weight and bias, and targets, some of them among ROWS."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(N, D, generator=g).to(dtype)
    weight = (0.5 * torch.randn(V, D, generator=g)).to(dtype)
    bias = torch.randn(V, generator=g).to(dtype)
    targets = torch.randint(0, V, (N,), generator=g)
    targets[::10] = 5
    return h, weight, bias, targets, torch.rand(N, generator=g) - 0.3


def test_the_definition_by_hand():
    """Logits 0, ln 2 and ln 5 are probabilities 1/8, 2/8 and 5/8."""
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    logps = definition(torch.ones(2, 1), Head(weight), torch.tensor([1, 2]))
    assert logps.exp().tolist() == pytest.approx([2 / 8, 5 / 8])


@pytest.mark.parametrize("kind", HEADS)
def test_the_fast_way_is_the_definition(kind):
    """Values and gradients, of rows that train too."""
    h, weight, bias, targets, upstream = tensors()
    results = []
    for way in (definition, token_logps):
        states, rows = h.clone().requires_grad_(), nn.Parameter(weight[ROWS].clone())
        head = Head(weight, bias, **HEADS[kind], rows=torch.tensor(ROWS), row_weight=rows)
        logps = way(states, head, targets)
        (logps * upstream).sum().backward()
        results.append((logps, states.grad, rows.grad))
    for one, other in zip(*results):
        assert torch.allclose(one, other, atol=1e-5)


def plain(h, weight, bias, targets, scale=1.0, softcap=None):
    """The usual way: all the logits, then log_softmax, then gather."""
    z = scale * nn.functional.linear(h, weight, bias).float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("chunk", [1, 3, 128])
@pytest.mark.parametrize(
    "biased, trains",
    [(False, ""), (False, "weight"), (True, ""), (True, "weight"), (True, "bias"), (True, BOTH)],
)
@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients(kind, biased, trains, chunk):
    h, weight, bias, targets, upstream = tensors()
    leaves = {"h": h, "weight": weight} | ({"bias": bias} if biased else {})
    ours = {n: t.clone().requires_grad_(n == "h" or n in trains) for n, t in leaves.items()}
    theirs = {n: t.clone().requires_grad_(n == "h" or n in trains) for n, t in leaves.items()}
    head = Head(ours["weight"], ours.get("bias"), **HEADS[kind])
    got = token_logps(ours["h"], head, targets, chunk)
    expected = plain(theirs["h"], theirs["weight"], theirs.get("bias"), targets, **HEADS[kind])
    (got * upstream).sum().backward()
    (expected * upstream).sum().backward()

    assert got.dtype == torch.float32 and torch.allclose(got, expected, atol=1e-5)
    for name in leaves:
        if name == "h" or name in trains:
            scale = theirs[name].grad.abs().max()
            assert torch.allclose(ours[name].grad, theirs[name].grad, atol=1e-5 * scale), name
        else:
            assert ours[name].grad is None


KERNELS = [("aot_eager", kind, trains) for kind in HEADS for trains in ("", BOTH)]


@pytest.mark.parametrize("backend, kind, trains", [*KERNELS, ("inductor", "both", "")])
def test_the_gpus_one_kernel(backend, kind, trains, monkeypatch):
    """What a GPU compiles, compiled for this machine: chunks of 16, 16 and 5 rows, and one of 1
    without gradient."""
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("no compiler")
    torch._dynamo.reset()
    kernel = torch.compile(fast.expression, dynamic=True, backend=backend)
    monkeypatch.setattr(fast, "way_for", lambda *_: kernel)
    test_values_and_gradients(kind, True, trains, 16)
    h, weight, _, targets, _ = tensors(torch.bfloat16)
    got = token_logps(h[:33], Head(weight, **HEADS[kind]), targets[:33], 16)
    expected = plain(h[:33], weight, None, targets[:33], **HEADS[kind])
    assert torch.allclose(got, expected, atol=1e-5)


def test_rows_at_a_time(monkeypatch):
    """On a GPU they fill the tiles of a product; on a small one, and on a CPU, they are fewer."""
    sizes = iter([16, 24, 24, 24])  # GiB
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: Namespace(total_memory=next(sizes) * 2**30)
    )
    gpu = torch.device("cuda")
    assert [fast.chunk_rows(128_256, gpu) for _ in range(2)] == [256, 1024]
    assert fast.chunk_rows(32_000, gpu) == 4096 and fast.chunk_rows(2**20, gpu) == 256
    assert fast.chunk_rows(128_256, torch.device("cpu")) == 130


def test_a_product_in_parts_of_the_vocabulary():
    """For Apple's GPU, and as torch computes it in one elsewhere."""
    g = torch.Generator().manual_seed(0)
    dz = torch.randn(5, 2 * fast.LONGEST + 9, generator=g, dtype=torch.float64)
    weight = torch.randn(dz.shape[1], 8, generator=g, dtype=torch.float64)
    for product in fast.product, fast.in_parts:
        out = torch.full((5, 8), math.nan, dtype=torch.float64)
        assert torch.allclose(product(dz, weight, out), dz @ weight) and not out.isnan().any()


@pytest.mark.parametrize("chunk", [1, 3, 128])
@pytest.mark.parametrize("kind", HEADS)
def test_rows_that_train_while_the_rest_is_frozen(kind, chunk):
    h, weight, bias, targets, upstream = tensors()
    row_weight = nn.Parameter(weight[ROWS].clone())
    ours, theirs = (h.clone().requires_grad_() for _ in range(2))
    head = Head(weight, bias, **HEADS[kind], rows=torch.tensor(ROWS), row_weight=row_weight)
    (token_logps(ours, head, targets, chunk) * upstream).sum().backward()

    whole = weight.clone().requires_grad_()
    (plain(theirs, whole, bias, targets, **HEADS[kind]) * upstream).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    assert torch.allclose(row_weight.grad, whole.grad[ROWS], atol=1e-5 * whole.grad.abs().max())


def test_only_rows_train():
    """Hidden states that need no gradient (nothing below the head trains)."""
    h, weight, _, targets, upstream = tensors()
    row_weight = nn.Parameter(weight[ROWS].clone())
    head = Head(weight, rows=torch.tensor(ROWS), row_weight=row_weight)
    (token_logps(h, head, targets) * upstream).sum().backward()
    whole = weight.clone().requires_grad_()
    (plain(h, whole, None, targets) * upstream).sum().backward()
    assert torch.allclose(row_weight.grad, whole.grad[ROWS], atol=1e-5)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("chunk", [3, 128])
def test_in_bfloat16(chunk, trains):
    """The product runs in bf16, the softmax in fp32: values are those of the same bf16 logits, and
    gradients are bf16's rounding away from the exact ones."""
    h, weight, _, targets, upstream = tensors(torch.bfloat16)
    ours = h.clone().requires_grad_()
    our_weight = weight.clone().requires_grad_(trains)
    got = token_logps(ours, Head(our_weight), targets, chunk)
    assert got.dtype == torch.float32
    expected = plain(h, weight, None, targets)
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.equal(definition(h, Head(weight), targets), expected)

    exact, exact_weight = (t.double().requires_grad_() for t in (h, weight))
    (plain(exact, exact_weight, None, targets) * upstream).sum().backward()
    (got * upstream).sum().backward()
    error = (ours.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert ours.grad.dtype == torch.bfloat16 and error < 0.01
    if trains:
        error = (our_weight.grad.double() - exact_weight.grad).norm() / exact_weight.grad.norm()
        assert our_weight.grad.dtype == torch.bfloat16 and error < 0.01


def test_a_head_of_another_dtype_computes_in_that_of_the_hidden_states():
    """Full fine-tuning: fp32 weights, bf16 hidden states, an fp32 gradient."""
    h, weight, _, targets, _ = tensors()
    weight.requires_grad_()
    got = token_logps(h.bfloat16(), Head(weight), targets)
    assert torch.allclose(got, plain(h.bfloat16(), weight.bfloat16(), None, targets), atol=1e-5)
    got.sum().backward()
    assert weight.grad.dtype == torch.float32


# --------------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """The largest tensor, in elements, that any operation returns within the block."""

    def __enter__(self):
        self.elements = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_no_logits_matrix_is_ever_made(kind, trains):
    """All is O(chunk V + V d + N d), and what autograd keeps is O(N d)."""
    n, d, v, chunk = 60, 8, 500, 16
    g = torch.Generator().manual_seed(0)
    h = torch.randn(n, d, generator=g).requires_grad_()
    weight = torch.randn(v, d, generator=g).requires_grad_(trains)
    targets = torch.randint(0, v, (n,), generator=g)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.numel()), t)[1], lambda t: t
    )
    with Largest() as largest:
        with hooks:
            logps = token_logps(h, Head(weight, **HEADS[kind]), targets, chunk)
        logps.sum().backward()
    assert 0 < largest.elements <= chunk * v
    assert n * d <= sum(kept) <= n * d + 2 * n
    with Largest() as usual:  # the measure sees the matrix where it is made
        plain(h, weight, None, targets).sum().backward()
    assert usual.elements == n * v


def test_prompts_never_meet_the_head():
    """One trained token in 60 is one row of logits; 60 are 60."""
    lm, ids = a_model(), list(range(3, 63))
    largest = {}
    for trained in (1, 60):
        mask = [False] * (60 - trained) + [True] * trained
        with Largest() as measured, torch.no_grad():
            lm([Example([70], [(ids, mask)])])
        largest[trained] = measured.elements
    assert largest[60] == 60 * 320 > largest[1]


# --------------------------------------------------------------------------------- the model


def a_model(**more):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny(LlamaConfig, **more))
    lm = PackedLM(model, 1.0, None, None)
    model.set_attn_implementation(packed())
    return lm


SEQUENCES = [
    Example(list(range(3, 10)), [([20, 21, 22], [True, False, True]), ([23, 24], [True, True])]),
    Example([30], [([31, 32, 33, 34], [True] * 4)]),
]


def test_scores_and_the_mean_logits():
    """logps and the metric logits/*: sums over a completion's trained tokens, the latter of the
    plain mean over the vocabulary."""
    lm = a_model()
    scores = lm(SEQUENCES)
    assert scores.tokens == [2, 2, 4] and scores.lengths.tolist() == [2.0, 2.0, 4.0]
    expected_logps, expected_logits = [], []
    lm.model.set_attn_implementation("eager")
    for prompt, completions in [(e.prompt, e.texts) for e in SEQUENCES]:
        for ids, mask in completions:
            z = lm.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logps = z.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            expected_logps.append(logps[torch.tensor(mask)].sum())
            expected_logits.append(z.mean(-1)[torch.tensor(mask)].sum())
    assert torch.allclose(scores.logps, torch.stack(expected_logps), rtol=1e-5)
    assert torch.allclose(scores.logits, torch.stack(expected_logits), rtol=1e-4, atol=1e-5)
    assert scores.logps.requires_grad and not scores.logits.requires_grad


def test_the_mean_logits_follow_a_head_that_trains():
    lm = a_model()
    before = lm(SEQUENCES).logits
    with torch.no_grad():
        lm.head().weight.mul_(2)
    assert torch.allclose(lm(SEQUENCES).logits, 2 * before, rtol=1e-5)
    lm.requires_grad_(False)  # a frozen head is averaged once
    lm(SEQUENCES)
    mean = lm.mean_weight
    lm(SEQUENCES)
    assert lm.mean_weight is mean


def test_the_mean_logits_follow_rows_that_train_in_a_frozen_head():
    lm = a_model()
    lm.model.requires_grad_(False)
    add_token_rows(lm.model, {"lm_head": [5, 96]})
    for size in (0.0, 3.0):
        with torch.no_grad():
            lm.head().row_weight.add_(size)
            row = pack(SEQUENCES)
            z = lm.head().logits(lm.hidden(row)[row.predictors]).mean(-1)
        expected = torch.zeros(3).index_add(0, row.completion, z)
        assert torch.allclose(lm(SEQUENCES).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_mean_over_a_vocabulary_is_taken_in_fp32():
    weight = tensors(torch.bfloat16)[1]
    expected = weight.double().mean(0)
    assert torch.allclose(fast.mean_weight(Head(weight)).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("more", ["scale", "softcap", "bias"])
def test_no_mean_logits_for_heads_that_do_more(more):
    lm = a_model()
    if more == "bias":
        lm.model.lm_head.bias = nn.Parameter(torch.ones(320))
    else:
        setattr(lm, more, 5.0)
    assert lm(SEQUENCES).logits is None


def test_take():
    scores = Scores(torch.tensor([1.0, 2.0, 3.0]), [4, 5, 6], torch.tensor([7.0, 8.0, 9.0]))
    some = scores.take([2, 0])
    assert some.logps.tolist() == [3, 1] and some.tokens == [6, 4]
    assert some.logits.tolist() == [9, 7]
    nothing = scores.take([])
    assert nothing.logps.shape == (0,) and nothing.tokens == []


# ----------------------------------------------------------------------------------- NEFTune


def noise_of(lm, alpha):
    """What the decoder gets beyond the embeddings: (T, d)."""
    seen = []
    hook = lm.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    torch.manual_seed(0)
    lm(SEQUENCES, neftune_alpha=alpha)
    hook.remove()
    row = pack(SEQUENCES)
    return (seen[0] - lm.model.get_input_embeddings()(row.input_ids)).detach(), row


def test_neftune_noise_is_uniform_within_alpha_over_root_length_times_width():
    lm = a_model().train()
    noise, row = noise_of(lm, 5.0)
    # texts of 7 + 3, 7 + 2 and 1 + 4 tokens, of which the row leaves out each last one
    assert row.geometry.longest() == [10] * 9 + [9] + [5] * 4
    for length, in_row in ((10, 9), (5, 4)):
        part = noise[torch.tensor(row.geometry.longest()) == length]
        bound = 5.0 / (length * 32) ** 0.5  # the width is 32
        assert len(part) == in_row
        assert 0.9 * bound < part.abs().max() < bound * 1.0001
        assert abs(part.std() / bound - 3**-0.5) < 0.06 and abs(part.mean()) < 0.15 * bound


def test_neftune_only_in_training_and_not_at_zero():
    lm = a_model()
    assert noise_of(lm.train(), 0.0)[0].eq(0).all()
    assert noise_of(lm.eval(), 5.0)[0].eq(0).all()
    assert noise_of(lm.train(), 5.0)[0].ne(0).any()
