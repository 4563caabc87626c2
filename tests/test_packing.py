"""Packing: the row of a worked example, who sees whom, and the plain padded way as the judge."""

import random
from functools import partial
from itertools import product, takewhile

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from nanoalign import InputError
from nanoalign.fast import attention as fast
from nanoalign.fast import flex as gpu
from nanoalign.logps import PackedLM
from nanoalign.lora import LoRALinear, add_lora
from nanoalign.model import probe
from nanoalign.packing import (
    Example,
    attention,
    in_rows,
    pack,
    packed,
    packed_attention,
    pairs_of,
    shared,
)

# ------------------------------------------------------------------------------------ the row

WORKED = [
    Example([10, 11, 12], [([20, 21, 22], [False, True, True]), ([30], [True])]),
    Example([40], [([50, 51], [True, True])]),
]


def test_a_worked_row():
    """| 10 11 12 | 20 21 | | 40 | 50 |: 22, 30 and 51 are last tokens and predict nothing."""
    row = pack(WORKED)
    assert row.input_ids.tolist() == [10, 11, 12, 20, 21, 40, 50]
    assert row.geometry.position.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert row.geometry.until.tolist() == [5, 5, 5, 5, 5, 7, 7]
    assert row.geometry.runs == [(0, 5), (0, 2)]  # nothing is new in the text that ends in 30
    # 21 is predicted where 20 stands, 22 where 21 does, 30 at the prompt's end (12), ...
    assert row.predictors.tolist() == [3, 4, 2, 5, 6]
    assert row.targets.tolist() == [21, 22, 30, 50, 51]
    assert row.completion.tolist() == [0, 0, 1, 2, 2]
    assert row.trained == [2, 1, 2] and row.geometry.longest() == [6, 6, 6, 6, 6, 3, 3]


def test_without_a_prompt_the_first_token_is_predicted_by_nothing():
    row = pack([Example([], [([60, 61], [True, True])])])
    assert row.input_ids.tolist() == [60]
    assert row.predictors.tolist() == [0] and row.targets.tolist() == [61]
    assert row.trained == [1]


def test_sequences_are_cut_in_rows_without_a_token_too_many():
    lengths = [3, 4, 9, 1, 1, 6, 2]
    sequences = [Example(list(range(n - 1)), [([7], [True])]) for n in lengths]

    def rows(tokens):
        return [[len(example) for example in part] for part in in_rows(sequences, tokens)]

    assert rows(8) == [[3, 4], [9], [1, 1, 6], [2]]  # 9 is too long, and stands alone
    assert rows(7) == [[3, 4], [9], [1, 1], [6], [2]]
    assert rows(1) == [[n] for n in lengths] and rows(26) == [lengths]
    assert in_rows(sequences, 26) == [sequences] and in_rows([], 8) == []


def random_sequences(seed=0, vocabulary=320):
    """Prompts shared by 1, 2 and 3 completions, with masks that have holes."""
    g = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(3, vocabulary, (n,), generator=g).tolist()

    def completion(n):
        mask = (torch.rand(n, generator=g) < 0.7).tolist()
        return ids(n), [*mask[:-1], True]

    return [
        Example(ids(9), [completion(11)]),
        Example(ids(7), [completion(1), completion(12)]),
        Example(ids(12), [completion(6), completion(9), completion(3)]),
        Example(ids(1), [completion(4), completion(1)]),
    ]


@pytest.mark.parametrize("window", [None, 1, 5])
def test_the_predicate_against_a_brute_force_mask(window):
    sequences = random_sequences()
    tokens = []  # (example, branch, position) of each token: no two completions begin alike
    for number, example in enumerate(sequences):
        prompt, completions = example.prompt, example.texts
        tokens += [(number, None, i) for i in range(len(prompt))]
        for branch, (ids, _) in enumerate(completions):
            tokens += [(number, branch, len(prompt) + i) for i in range(len(ids) - 1)]

    def sees(query, key):
        (example, branch, i), (other, its, j) = query, key
        return (
            example == other
            and (its is None or its == branch)
            and j <= i
            and (window is None or i - j < window)
        )

    geometry = pack(sequences).geometry
    index = torch.arange(len(tokens))
    mask = geometry.allowed(index[:, None], index[None], window)
    assert mask.tolist() == [[sees(q, k) for k in tokens] for q in tokens]


# ------------------------------------------------------------------------------------ a forest


def test_a_conversation_with_thoughts_by_hand():
    """u1 t1 a1 is followed by u1 a1 u2 t2 a2, which does not see t1: one completion of two texts.
    The row is u1 t1 | a1 u2 t2: last tokens, a1 the first time and a2, are not in it."""
    u1, t1, a1, u2, t2, a2 = range(10, 16)
    texts = [([t1, a1], [True, True]), ([a1, u2, t2, a2], [False, False, True, True])]
    example = Example([u1], texts, completions=[0, 0])
    row = pack([example])
    assert row.input_ids.tolist() == [u1, t1, a1, u2, t2]
    assert row.geometry.position.tolist() == [0, 1, 1, 2, 3]
    assert row.geometry.until.tolist() == [5, 2, 5, 5, 5]
    assert row.geometry.runs == [(0, 2), (1, 3)]
    assert row.geometry.longest() == [5, 3, 5, 5, 5]
    assert row.predictors.tolist() == [0, 1, 3, 4] and row.targets.tolist() == [t1, a1, t2, a2]
    assert row.completion.tolist() == [0] * 4 and row.trained == [4]
    assert (example.tokens, len(example), example.count) == (7, 7, 1)


def test_ranked_replies_by_hand():
    """Three replies: 20 21 22, 30 31 and 20 21 40, which stands beside the first: they share 20 21,
    which trains in both."""
    reply = [([20, 21, 22], [True] * 3), ([30, 31], [True] * 2), ([20, 21, 40], [True] * 3)]
    example = Example([10], reply, pairs=[(0, 1), (0, 2), (1, 2)])
    row = pack([example, example])
    assert row.input_ids.tolist() == [10, 20, 21, 30] * 2
    assert row.geometry.until.tolist() == [4, 3, 3, 4, 8, 7, 7, 8]
    assert row.trained == [3, 2, 3] * 2
    assert row.completion.tolist()[:8] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert row.predictors.tolist()[:8] == [0, 1, 2, 0, 3, 0, 1, 2]
    assert row.targets.tolist()[:8] == [20, 21, 22, 30, 31, 20, 21, 40]
    assert (example.tokens, len(example), example.count) == (7, 11, 3)
    assert pairs_of([example, example]) == ([0, 0, 1, 3, 3, 4], [1, 2, 2, 4, 5, 5])


def test_what_texts_share_by_counting():
    """Up to the first difference, or all of the shorter one; its last token counts, too."""
    for a, b in product(product((1, 2), repeat=3), repeat=2):
        for text in (list(b[:n]) for n in range(4)):
            count = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, text))))
            assert shared(list(a), text) == shared(text, list(a)) == count
    inside = Example([10], [([20, 21, 22], [True] * 3), ([20, 21], [True] * 2)])
    assert inside.tokens == 4 and Example([10], inside.texts[:1] * 2).tokens == 4


def random_tree(rng, vocabulary=320):
    """Texts that branch off each other anywhere, repeat, end inside others, and train anywhere; a
    completion has one of them or several."""
    texts = [[rng.randrange(3, vocabulary) for _ in range(rng.randint(2, 14))]]
    for _ in range(rng.randint(0, 6)):
        text = rng.choice(texts)
        start = rng.randint(0, len(text))
        more = [rng.randrange(3, vocabulary) for _ in range(rng.choice([0, 1, 5]))]
        texts.append(text[:start] + more or [7])
    prompt = [rng.randrange(3, vocabulary) for _ in range(rng.choice([0, 1, 6]))]
    if not prompt:  # then a first token is predicted by nothing
        texts = [[5, *text] for text in texts]
    masks = [[rng.random() < 0.6 for _ in text[:-1]] + [True] for text in texts]
    owners = sorted(rng.randrange(len(texts)) for _ in texts)
    owners = [sorted(set(owners)).index(owner) for owner in owners]
    return Example(prompt, list(zip(texts, masks)), completions=rng.choice([None, owners]))


@pytest.mark.parametrize("window", [None, 1, 5])
def test_the_predicate_in_random_trees(window):
    """Each distinct beginning of a text stands in the row once, and sees the beginnings of itself
    (that are within the window), nothing else."""
    rng = random.Random(0)
    for _ in range(60):
        batch = [random_tree(rng) for _ in range(rng.randint(1, 3))]
        row = pack(batch)
        index, position = torch.arange(len(row.input_ids)), row.geometry.position
        seen = row.geometry.allowed(index[:, None], index[None], None)
        example = position.eq(0).cumsum(0) - 1  # each tree has one first token
        beginnings = [(n, *row.input_ids[s].tolist()) for n, s in zip(example.tolist(), seen)]
        texts = [(n, e.prompt + ids) for n, e in enumerate(batch) for ids, _ in e.texts]
        wanted = {(n, *text[:end]) for n, text in texts for end in range(1, len(text))}
        assert len(set(beginnings)) == len(beginnings) and wanted == set(beginnings)
        assert len(beginnings) <= sum(example.tokens for example in batch)

        def sees(query, key):
            near = window is None or len(query) - len(key) < window
            return query[: len(key)] == key and near

        expected = [[sees(query, key) for key in beginnings] for query in beginnings]
        assert row.geometry.allowed(index[:, None], index[None], window).tolist() == expected


def alone(batch):
    """Each text of each completion as an example of its own, and which completion it belongs to."""
    texts, owners, first = [], [], 0
    for example in batch:
        own = example.completions or range(len(example.texts))
        texts += [Example(example.prompt, [text]) for text in example.texts]
        owners += [first + owner for owner in own]
        first += example.count
    return texts, owners


@pytest.mark.parametrize("way", [(128, 1024), (3, 1024), (3, 2)], ids=["whole", "blocks", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "qwen2-window", "gemma2"])
def test_random_trees_equal_their_texts_alone(kind, way, monkeypatch):
    """Values and gradients, in fp32; a token that two completions share counts in both."""
    monkeypatch.setattr(fast, "BLOCK", way[0])
    monkeypatch.setattr(fast, "SHORT", way[1])
    rng, lm = random.Random(1), a_model(kind, lora=True)
    for _ in range(4):
        batch = [random_tree(rng) for _ in range(3)]
        texts, owners = alone(batch)
        lm.model.set_attn_implementation("eager")
        expected = torch.zeros(max(owners) + 1)
        expected = expected.index_add(0, torch.tensor(owners), padded_logps(lm.model, texts))
        expected_gradients = gradients(lm.model, expected)
        lm.model.set_attn_implementation(packed())
        got = lm(batch)
        assert torch.allclose(got.logps, expected, rtol=1e-5, atol=1e-5)
        assert deviation(gradients(lm.model, got.logps), expected_gradients) < 2e-5


# ------------------------------------------------------------------------------ the attention


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "softcap"])
@pytest.mark.parametrize("window", [None, 5], ids=["", "window"])
def test_every_way_is_the_definition(window, softcap, monkeypatch):
    """The way of a GPU and the ways of a CPU. Flex forward only, as it has no backward on a CPU;
    and traced as for a GPU, but run without making a kernel."""
    traced = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(gpu, "compiled_flex", gpu.compiled_flex.__wrapped__)
    geometry = pack(random_sequences()).geometry
    tokens = len(geometry.position)
    g = torch.Generator().manual_seed(1)
    q = torch.randn(1, 4, tokens, 16, generator=g)
    k, v = (torch.randn(1, 2, tokens, 16, generator=g) for _ in range(2))
    how = geometry, 0.3, window, softcap
    flex = gpu.flex(q, k, v, *how)
    again = gpu.flex(q.double(), k.double(), v, *how)  # v's dtype wins
    dense = [fast.attention(q, k, v, *how)]
    monkeypatch.setattr(fast, "BLOCK", 3)
    dense.append(fast.attention(q, k, v, *how))
    monkeypatch.setattr(fast, "SHORT", 2)  # torch's own attention from three keys on
    dense.append(fast.attention(q, k, v, *how))

    expected = attention(q, k, v, *how)
    for way in dense:
        assert torch.allclose(way, expected, atol=1e-5)
    assert torch.allclose(flex, expected, atol=1e-5) and torch.equal(flex, again)
    assert list(geometry.block_masks) == [window]  # made once a row


def test_the_definition_of_attention_by_hand():
    """One head, values 1, 10, 100: a token sees its prompt and its own branch, evenly where all
    scores are alike."""
    geometry = pack([Example([5], [([6, 7], [True] * 2), ([8, 9], [True] * 2)])]).geometry
    value = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 3, 1)
    out = attention(torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 3, 1), value, geometry, 1.0)
    assert out.flatten().tolist() == [1.0, 5.5, 50.5]


@pytest.mark.parametrize("way", [(128, 1024), (3, 1024), (3, 2)], ids=["whole", "blocks", "sdpa"])
def test_dropout_of_the_weights(way, monkeypatch):
    """All scores are alike and the values one-hot, so the output is the weights: 1 / (i + 1), of
    which a share of 1/4 drops (to five sigma) and the others grow by 4/3."""
    monkeypatch.setattr(fast, "BLOCK", way[0])
    monkeypatch.setattr(fast, "SHORT", way[1])
    geometry = pack([Example(list(range(60)), [([7], [True])])]).geometry
    q, value = torch.zeros(1, 2, 60, 60), torch.eye(60).expand(1, 2, 60, 60)
    how, even = dict(geometry=geometry, scaling=1.0), 1 / torch.arange(1, 61)[:, None]
    torch.manual_seed(0)
    for dropout in (0.0, 0.25):
        out = packed_attention(None, q, q, value, None, dropout=dropout, **how)[0][0]  # (T, H, T)
        for weights in out.unbind(1):
            seen = torch.ones(60, 60).tril().bool()
            assert not weights[~seen].any()
            left = weights / even * (1 - dropout)
            assert torch.allclose(left[left > 0], torch.ones(()), atol=1e-6)
            dropped = (left[seen] == 0).float().mean()
            assert abs(dropped - dropout) <= 5 * (dropout * (1 - dropout) / seen.sum()) ** 0.5
    assert not torch.equal(*out.unbind(1))  # each head has its own


def test_a_keyword_that_changes_attention_is_refused():
    geometry = pack(WORKED).geometry
    q = torch.randn(1, 2, 7, 8)
    known = dict(geometry=geometry, scaling=1.0)
    packed_attention(None, q, q, q, None, **known, s_aux=None)  # given, but not in use
    with pytest.raises(InputError, match="its attention takes s_aux, which packing does not know"):
        packed_attention(None, q, q, q, None, **known, s_aux=torch.zeros(2))
    with pytest.raises(InputError, match="its layers do not pass the row's geometry on"):
        packed_attention(None, q, q, q, None, scaling=1.0)


# --------------------------------------------------------------- against the plain padded way

CONFIGS = {
    "llama": tiny(LlamaConfig, attention_bias=True),
    "qwen2": tiny(Qwen2Config),
    "qwen2-window": tiny(
        Qwen2Config, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": tiny(Qwen3Config),
    "gemma2": tiny(
        Gemma2Config,
        sliding_window=5,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": tiny(
        Gemma3TextConfig,
        sliding_window=5,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral-window": tiny(MistralConfig, sliding_window=5),
}


def a_model(kind, lora):
    """fp32, random in every weight (norms and biases too), with what trains, ready for packing."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if lora:
        add_lora(model, r=4, scaling=2.0)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                torch.nn.init.normal_(module.lora_B.weight, std=0.1)
    return PackedLM(model, *probe(AutoModelForCausalLM.from_config, CONFIGS[kind], kind), None)


def padded_logps(model, sequences):
    """As everybody computes them: every completion with its own prompt, padded on the right to the
    longest, an attention mask, all logits, cross-entropy. -> (C,)"""
    pairs = [(e.prompt, e.texts) for e in sequences]
    examples = [(x + y, [False] * len(x) + m) for x, ys in pairs for y, m in ys]
    longest = max(len(ids) for ids, _ in examples)
    rest = [longest - len(ids) for ids, _ in examples]
    ids = torch.tensor([ids + [0] * n for (ids, _), n in zip(examples, rest)])
    mask = torch.tensor([m + [False] * n for (_, m), n in zip(examples, rest)])
    real = torch.tensor([[1] * (longest - n) + [0] * n for n in rest])
    logits = model(ids, attention_mask=real, use_cache=False).logits[:, :-1]  # (C, L - 1, V)
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return -(losses * mask[:, 1:]).sum(1)


def gradients(model, logps):
    """Of a sum in which every completion has another weight: name -> gradient."""
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def deviation(got, expected):
    """The largest relative deviation of a gradient. One that is nothing but rounding (a bias of
    keys shifts all scores of a query alike) is measured against the whole gradient."""
    assert got.keys() == expected.keys()
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    return max(
        float((got[n] - g).norm() / max(g.norm(), 1e-3 * whole)) for n, g in expected.items()
    )


@pytest.mark.parametrize("way", [(128, 1024), (3, 1024), (3, 2)], ids=["whole", "blocks", "sdpa"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_equals_padded(kind, lora, way, monkeypatch):
    monkeypatch.setattr(fast, "BLOCK", way[0])  # three ways to compute attention on a CPU
    monkeypatch.setattr(fast, "SHORT", way[1])
    lm, sequences = a_model(kind, lora), random_sequences()
    expected = padded_logps(lm.model, sequences)
    expected_gradients = gradients(lm.model, expected)
    lm.model.set_attn_implementation(packed())
    got = lm(sequences).logps
    got_gradients = gradients(lm.model, got)

    assert torch.allclose(got, expected, rtol=1e-5, atol=0)
    trained = [n for n, p in lm.model.named_parameters() if p.requires_grad]
    assert sorted(got_gradients) == sorted(trained)
    assert deviation(got_gradients, expected_gradients) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral-window"])
def test_a_layer_recomputed_in_backward_keeps_its_geometry(kind, monkeypatch):
    """Gradient checkpointing calls the layers a second time: same keywords, same gradients."""
    lm, sequences = a_model(kind, lora=True), random_sequences()
    lm.model.set_attn_implementation(packed())
    lm.train()
    expected = gradients(lm.model, lm(sequences).logps)
    lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    calls, by_run = [], fast.by_run

    def counted(*args):
        calls.append(args[3])  # the geometry
        return by_run(*args)

    monkeypatch.setattr(fast, "by_run", counted)
    got = gradients(lm.model, lm(sequences).logps)
    assert len(calls) == 4 and len({id(geometry) for geometry in calls}) == 1  # 2 layers, twice
    assert deviation(got, expected) < 1e-6


def test_what_an_example_scores_does_not_depend_on_its_neighbours():
    lm, sequences = a_model("qwen2-window", lora=False), random_sequences()
    lm.model.set_attn_implementation(packed())
    together = lm(sequences)
    alone = [lm([Example(e.prompt, [c])]).logps for e in sequences for c in e.texts]
    assert torch.allclose(together.logps, torch.cat(alone), rtol=1e-5)
    assert together.tokens == [sum(mask) for e in sequences for _, mask in e.texts]
