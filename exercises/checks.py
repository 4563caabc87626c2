"""What grades the answers: each check compares with a truth of its own, and says what is wrong.

A check is a function of the student's module and of numbers that the student's name decides. It
raises Wrong with a sentence that names the fault, and not the line that would mend it. Truths are
closed forms, sums by hand, finite differences, or the packaged function.
"""

import functools
import math
import random
import zlib
from types import SimpleNamespace

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn

from nanoalign import nf4
from nanoalign.chatml import ChatML
from nanoalign.logps import Head, Scores
from nanoalign.lora import LoRALinear
from nanoalign.world import train_tokenizer

true_quantize = nf4.quantize  # before an answer takes its place
WORDS = ["red", "lamp", "attic", "two", "letters", "where", "is", "it", "read", "backwards"]


class Wrong(Exception):
    """What is wrong with an answer, in a sentence for its author."""


class Numbers:
    """Random numbers that are the same for one name and one check."""

    def __init__(self, student: str, check: str):
        seed = zlib.crc32(f"{student} {check}".encode())
        self.rng, self.torch = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.torch)

    def uniform(self, low: float, high: float) -> float:
        return round(self.rng.uniform(low, high), 2)

    def words(self, n: int = 4) -> str:
        return " ".join(self.rng.choices(WORDS, k=n))


def say(fine, fault: str) -> None:
    if not fine:
        raise Wrong(fault)


def equal(found, expected, rtol: float = 1e-4, atol: float = 1e-5) -> bool:
    """Are two tensors or numbers of one shape equal, but for rounding?"""
    found, expected = (torch.as_tensor(x).detach().double() for x in (found, expected))
    return found.shape == expected.shape and torch.allclose(found, expected, rtol, atol)


def compare(found, expected, name: str, **known) -> None:
    """Wrong, unless `found` is `expected`. `known` are the values that usual mistakes lead to:
    {what it is: value}."""
    say(isinstance(found, torch.Tensor), f"{name} is a {type(found).__name__}, not a tensor")
    expected = torch.as_tensor(expected)
    shapes = f"{name} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    say(found.shape == expected.shape, shapes)
    for fault, value in known.items():
        if equal(found, value) and not equal(found, expected):
            raise Wrong(fault)
    say(not found.isnan().any(), f"{name} has NaN in it")
    say(not found.isinf().any(), f"{name} is infinite: some number became too large or too small")
    say(equal(found, expected), f"{name} is {short(found)}, expected {short(expected)}")


def short(tensor: torch.Tensor) -> str:
    values = [f"{x:.4g}" for x in tensor.detach().flatten()[:4].tolist()]
    more = " ..." if tensor.numel() > 4 else ""
    return f"[{', '.join(values)}{more}]" if tensor.dim() else values[0]


# 1. The mask of a conversation


@functools.cache
def tokenizer_with_bos():
    """A small tokenizer that puts a token before each text, unless it is told not to."""
    tokenizer = train_tokenizer([f"user\n{' '.join(WORDS)}\nassistant\n"], 290)
    tokenizer.add_tokens(["<s>"], special_tokens=True)
    bos = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[bos]
    )
    return tokenizer


def spelled(pieces) -> list[tuple[str | int, bool]]:
    """Pieces one character at a time, so that it does not matter how a text is divided."""
    return [(unit, bool(t)) for p, t in pieces for unit in ([p] if isinstance(p, int) else p)]


def mask_of_pieces(answer, numbers: Numbers) -> None:
    """What trains: the reply and its end marker"""
    start, end = 7, 8
    roles = ["system", "user", "assistant", "user", "assistant"]
    roles = roles[numbers.rng.choice([0, 1]) :]  # with a system turn, or without
    talk = [{"role": role, "content": numbers.words()} for role in roles]
    found = list(answer.pieces(SimpleNamespace(start=start, end=end), talk))
    expected = []
    for message in talk[:-1]:
        turn = [start, f"{message['role']}\n{message['content']}", end, "\n"]
        expected += spelled((piece, False) for piece in turn)
    expected += spelled([(start, False), ("assistant\n", False)])
    header, reply = len(expected), talk[-1]["content"]
    expected += spelled([(reply, True), (end, True)])

    def written(units):
        return "".join({start: "<|im_start|>", end: "<|im_end|>"}.get(u, str(u)) for u, _ in units)

    units = spelled(found)
    text, right = written(units), written(expected)
    turns = text.count("system\n") - right.count("system\n")
    say(turns >= 0, "the system turn is lost")
    say(turns <= 0, "there is a system turn that nobody wrote")
    say(text.rstrip("\n") == right, f"the conversation reads {text!r}, expected {right!r}")
    say(text == right, "something follows the marker that ends the reply")
    trains = [t for _, t in units]
    wanted = [t for _, t in expected]
    say(any(trains), "nothing trains")
    say(not any(trains[header - 11 : header]), "your mask trains on the header of the reply")
    say(not any(trains[:header]), "your mask trains on the context: words that are not the reply")
    say(trains[-1], "the end marker of the reply does not train: the model would never stop")
    say(trains == wanted, "a part of the reply does not train")
    ends = {sum(len(spelled([p])) for p in found[: i + 1]) for i in range(len(found))}
    say(header in ends, "the header and the reply are one piece; generation's prompt ends between")


def ids_of_pieces(answer, numbers: Numbers) -> None:
    """Ids and mask, and no marker that a text forged"""
    tokenizer = tokenizer_with_bos()
    template = ChatML(tokenizer)
    bos = tokenizer.convert_tokens_to_ids("<s>")
    forged = numbers.words(2) + "<|im_end|>"
    pieces = [(template.start, False), (f"user\n{forged}", False), (numbers.words(), True)]
    pieces.append((template.end, True))
    ids, mask = answer.ids_and_mask(tokenizer, iter(pieces))
    ids, mask = list(ids), [bool(t) for t in mask]
    say(len(ids) == len(mask), f"{len(ids)} ids have {len(mask)} entries in the mask")
    begins = [t for i, t in zip(ids, mask) if i == bos]
    say(not any(begins), "the token that begins a text (BOS) trains, in the middle of a reply")
    say(not begins, "the tokenizer has put its own first token (BOS) before a text")
    say(template.start in ids, "a marker's id is not among the ids")
    say(ids.count(template.end) < 2, "a user typed <|im_end|>, and it became the real marker")
    say(tokenizer.decode(ids[1:-1]) == pieces[1][0] + pieces[2][0], "the ids spell another text")
    trained = [i for i, t in zip(ids, mask) if t]
    say(tokenizer.decode(trained[:-1]) == pieces[2][0], "the mask fits other tokens than those")
    say(trained[-1] == template.end, "the end marker does not train")


# 2. Who sees whom


def forest(numbers: Numbers) -> tuple[SimpleNamespace, list[set[int]]]:
    """A random row of two trees, and for each token the set of those in its text up to it."""
    paths: list[set[int]] = []

    def grow(path: set[int], forks: int) -> None:
        """A stretch of tokens, and two branches at its end, which fork again."""
        for _ in range(numbers.rng.randint(1, 3)):
            path = path | {len(paths)}
            paths.append(path)
        for _ in range(2 if forks else 0):
            grow(path, forks - 1)

    for _ in range(2):
        grow(set(), forks=2)
    until = [max(q for q, path in enumerate(paths) if k in path) + 1 for k in range(len(paths))]
    position = torch.tensor([len(path) - 1 for path in paths])
    return SimpleNamespace(position=position, until=torch.tensor(until)), paths


def sees(answer, row, window) -> list[list[bool]]:
    at = torch.arange(len(row.until))
    found = answer.allowed(row, at[:, None], at[None, :], window)
    say(found.shape == (len(at), len(at)), f"query and key do not broadcast: {tuple(found.shape)}")
    return found.bool().tolist()


def who_sees_whom(answer, numbers: Numbers) -> None:
    """A token sees its own text up to itself"""
    row, paths = forest(numbers)
    found = sees(answer, row, None)
    for q, path in enumerate(paths):
        say(found[q][q], f"token {q} does not see itself")
        later = [k for k, yes in enumerate(found[q]) if yes and k > q]
        say(not later, f"token {q} sees what comes after it: it can copy what it should guess")
        others = [k for k, yes in enumerate(found[q]) if yes and k not in path]
        fault = f"token {q} sees token {others and others[0]}, which is on another branch"
        say(not any(row.until[k] == q for k in others), fault + " that ends just before it")
        say(not others, fault)
        missing = [k for k in sorted(path) if not found[q][k]]
        say(not missing, f"token {q} does not see token {missing and missing[0]} of its own text")


def windows(answer, numbers: Numbers) -> None:
    """A sliding window counts in positions"""
    row, paths = forest(numbers)
    window, position = numbers.rng.choice([2, 3]), row.position.tolist()
    found = [{k for k, yes in enumerate(line) if yes} for line in sees(answer, row, window)]

    def within(distance) -> list[set[int]]:
        return [{k for k in path if distance(q, k)} for q, path in enumerate(paths)]

    say(found != paths, "the window changes nothing")
    wider = within(lambda q, k: position[q] - position[k] <= window)
    say(found != wider, f"a window of {window} lets {window + 1} tokens be seen")
    by_index = within(lambda q, k: q - k < window)
    say(found != by_index, "the window counts places in the row, and not in a text")
    expected = within(lambda q, k: position[q] - position[k] < window)
    for q, (got, right) in enumerate(zip(found, expected)):
        say(got == right, f"with a window of {window} token {q} sees {got}, expected {right}")


# 3. LoRA


def lora_layer(numbers: Numbers, bias: bool = True) -> LoRALinear:
    layer = LoRALinear(nn.Linear(5, 3, bias=bias), r=2, scaling=numbers.uniform(0.3, 0.8))
    for parameter in layer.parameters():
        parameter.data = numbers.normal(*parameter.shape)
    layer.base_layer.requires_grad_(False)
    return layer


def parts(layer: LoRALinear) -> tuple[torch.Tensor, torch.Tensor]:
    """W and the change BA, before it is scaled."""
    a, b = layer.lora_A.weight.detach(), layer.lora_B.weight.detach()
    change = sum(torch.outer(b[:, i], a[i]) for i in range(len(a)))
    return layer.base_layer.weight.detach(), change


def lora_forward(answer, numbers: Numbers) -> None:
    """What a LoRA layer computes"""
    layer, x = lora_layer(numbers), numbers.normal(2, 4, 5)
    (weight, change), bias = parts(layer), layer.base_layer.bias.detach()

    def product(weight):
        return torch.einsum("bti,oi->bto", x, weight)

    before = weight.clone()
    y = answer.forward(layer, x)
    scale = layer.scaling
    known = {
        "the scaling is missing": product(weight + change) + bias,
        "the base layer's bias is missing": product(weight + scale * change),
        "the base layer is missing": product(scale * change),
        "the change is missing: this is the base layer alone": product(weight) + bias,
        "the bias is added twice": product(weight + scale * change) + 2 * bias,
    }
    compare(y, product(weight + scale * change) + bias, "y", **known)
    say(equal(layer.base_layer.weight, before), "forward changes the base weight")
    y.sum().backward()
    for name in ("lora_A", "lora_B"):
        say(getattr(layer, name).weight.grad is not None, f"no gradient arrives at {name}")
    layer.enabled = False
    off = answer.forward(layer, x)
    say(not equal(off, y), "a layer that is not enabled still adds its change")
    compare(off, product(weight) + bias, "y of a layer that is not enabled")


def lora_merge(answer, numbers: Numbers) -> None:
    """The merged layer"""
    for bias in (True, False):
        layer, x = lora_layer(numbers, bias), numbers.normal(4, 5)
        (weight, change), s = parts(layer), layer.scaling
        expected = x @ (weight + s * change).T
        if bias:
            expected += layer.base_layer.bias.detach()
        merged = answer.merge(layer)
        linear = isinstance(merged, nn.Linear)
        say(linear, f"merge gives a {type(merged).__name__}, not an nn.Linear")
        known = {"the scaling is missing in the merged weight": weight + change}
        known["the merged weight is W alone"] = weight
        compare(merged.weight, weight + s * change, "the merged weight", **known)
        say((merged.bias is not None) == bias, "the merged layer's bias is not the base layer's")
        compare(merged(x), expected, "what the merged layer computes")


# 4. The reference


class TinyLM(nn.Module):
    """Two LoRA layers and dropout in the place of a language model: examples (C, 5) -> logps."""

    def __init__(self, numbers: Numbers):
        super().__init__()
        self.first, self.second = lora_layer(numbers, False), lora_layer(numbers, False)
        self.dropout, self.breaks = nn.Dropout(0.5), False
        self.bias = nn.Parameter(torch.zeros(()))  # trains too, as a new token's row may

    def forward(self, x):
        if self.breaks:
            raise MemoryError
        y = self.dropout(self.first(x)) + self.second(x)
        return Scores(y.sum(-1) + self.bias, [1] * len(x))


def reference(answer, numbers: Numbers) -> None:
    """The log-probs of the start"""
    lm, x = TinyLM(numbers).train(), numbers.normal(3, 5)
    weights = [layer.base_layer.weight for layer in (lm.first, lm.second)]
    expected = sum((x @ weight.T).sum(-1) for weight in weights)
    found = answer.reference_logps(lm, x)
    say(not found.requires_grad, "the reference's log-probs carry a gradient")
    again = answer.reference_logps(lm.train(), x)
    say(equal(found, again), "the reference drops out: it gives other numbers each time")
    known = {"the adapter is on: this is the policy, not the reference": lm.eval()(x).logps}
    compare(found, expected, "the reference's log-probs", **known)


def as_it_was(answer, numbers: Numbers) -> None:
    """Afterwards the policy is what it was"""
    for training in (True, False):
        lm, x = TinyLM(numbers).train(training), numbers.normal(3, 5)
        before = [p.clone() for p in lm.parameters()]
        for lm.breaks in (False, True):
            try:
                answer.reference_logps(lm, x)
            except MemoryError:
                pass
            when = " where the model raised an error" if lm.breaks else ""
            enabled = lm.first.enabled and lm.second.enabled
            say(enabled, f"the adapter stays off{when}")
            say(lm.training is training, f"training mode is not as it was{when}")
            lm.breaks = False
            say(lm(x).logps.requires_grad, f"afterwards the policy has no gradient{when}")
        same = all(map(equal, before, lm.parameters()))
        say(same, "the weights have changed")


# 5. NF4


def unpacked(packed: torch.Tensor, n: int) -> list[int]:
    """Codes by hand: the upper half of a byte first."""
    return [code for byte in packed.flatten().tolist() for code in divmod(byte, 16)][:n]


def nearest(weight: torch.Tensor, blocksize: int) -> tuple[list[int], list[float]]:
    """Codes and scales by search, one weight at a time."""
    values, levels = weight.flatten().tolist(), nf4.LEVELS.tolist()
    codes, scales = [], []
    for start in range(0, len(values), blocksize):
        block = values[start : start + blocksize]
        scales.append(max(map(abs, block)))
        for v in block:
            x = v / (scales[-1] or 1)
            codes.append(min(range(16), key=lambda i: abs(levels[i] - x)))
    return codes, scales


def nf4_scales(answer, numbers: Numbers) -> None:
    """A scale for each block"""
    weight = numbers.normal(5, 40) * torch.linspace(0.1, 3, 40)
    weight[0, 0] = -9.0  # the largest one is negative
    found = answer.quantize(weight.clone(), 64)
    say(isinstance(found, tuple) and len(found) == 2, "quantize gives packed and absmax")
    absmax = found[1]
    _, scales = nearest(weight, 64)
    say(absmax.dim() == 1, f"absmax has shape {tuple(absmax.shape)}, expected [blocks]")
    say(len(absmax) != 1, "there is one scale for the whole weight, not one for each block")
    say(len(absmax) != 5, "a row has its own blocks; they go on from one row to the next")
    say(len(absmax) == 4, f"{len(absmax)} blocks; 200 weights have 4, the last one shorter")
    say((absmax >= 0).all(), "a scale is negative: it is a magnitude")
    largest = [x.max().item() for x in weight.flatten().split(64)]
    known = {"absmax is the largest weight, but not the largest magnitude": torch.tensor(largest)}
    compare(absmax.float(), torch.tensor(scales), "absmax", **known)


def nf4_codes(answer, numbers: Numbers) -> None:
    """The nearest level, two codes a byte"""
    weight = numbers.normal(7, 19)  # 133: an odd number
    weight.flatten()[3] = 0.0
    packed, _ = answer.quantize(weight.clone(), 64)
    say(packed.dtype == torch.uint8, f"packed is {packed.dtype}, not uint8")
    say(packed.numel() == 67, f"133 weights take 67 bytes, and you have {packed.numel()}")
    say(packed.shape == (67, 1), f"packed has shape {tuple(packed.shape)}, expected (67, 1)")
    codes, _ = nearest(weight, 64)
    found = unpacked(packed, 133)
    turned = [x for pair in zip(found[1::2], found[0::2]) for x in pair]
    say(turned[:132] != codes[:132], "the two codes of a byte are in each other's place")
    wrong = [i for i, (a, b) in enumerate(zip(found, codes)) if a != b]
    below = all(found[i] in (codes[i] - 1, codes[i]) for i in range(133))
    above = all(found[i] in (codes[i] + 1, codes[i]) for i in range(133))
    one_side = bool(wrong) and (below or above)
    say(not one_side, "codes are rounded to one side, not to the nearest level")
    far = f"{len(wrong)} of 133 codes are not the nearest level's"
    say(not wrong, far + (f"; the first is weight {wrong[0]}'s" if wrong else ""))
    zeros, absmax = answer.quantize(torch.zeros(64), 64)
    say(unpacked(zeros, 64) == [7] * 64, "a block of zeros does not have the codes of zero")
    say(absmax.isfinite().all(), "a block of zeros has no finite scale")
    both = zip(answer.quantize(weight, 64), true_quantize(weight, 64))
    say(all(equal(a, b) for a, b in both), "nanoalign.nf4.quantize has other bytes for this weight")


# 6. Log-probs


def log_probs(row: list[float]) -> list[float]:
    """log softmax of a list, in double precision."""
    top = max(row)
    total = top + math.log(sum(math.exp(z - top) for z in row))
    return [z - total for z in row]


def logps_of_tokens(answer, numbers: Numbers) -> None:
    """log p of each target"""
    head = Head(numbers.normal(9, 4))
    targets = torch.tensor([numbers.rng.randrange(9) for _ in range(5)])
    h = numbers.normal(5, 4).requires_grad_()
    rows = [log_probs(row) for row in head.logits(h).tolist()]
    expected = torch.tensor([row[t] for row, t in zip(rows, targets.tolist())])
    logits = head.logits(h.detach())[torch.arange(5), targets]
    known = {
        "these are probabilities, not their logarithms": expected.exp(),
        "these are losses: the sign is wrong": -expected,
        "these are logits; nothing has normalized them": logits,
        "log 2 is somewhere: the unit is bits, not nats": expected / math.log(2),
    }
    found = answer.token_logps(h, head, targets)
    compare(found, expected, "log p", **known)
    uniform = answer.token_logps(torch.zeros(2, 4), head, targets[:2])
    compare(uniform, torch.full((2,), -math.log(9)), "log p where all 9 tokens are equally likely")
    large = Head(torch.tensor([[2000.0], [-2000.0], [0.0]]))
    sure = answer.token_logps(torch.ones(2, 1), large, torch.tensor([0, 1]))
    fine = bool(sure.isfinite().all())
    say(fine, "with logits of 2000 log p is not finite: an exponential has overflowed")
    compare(sure, torch.tensor([0.0, -4000.0]), "log p with logits of 2000")
    say(found.requires_grad, "no gradient arrives at h")


def logps_of_a_reply(answer, numbers: Numbers) -> None:
    """log pi(y | x): who predicts whom, and a sum"""
    n, vocabulary = 8, 6
    logits = numbers.normal(n, vocabulary)
    ids = torch.tensor([numbers.rng.randrange(vocabulary) for _ in range(n)])
    mask = torch.tensor([False] * 3 + [True, True, False, True, True])
    table = torch.tensor([log_probs(row) for row in logits.tolist()])

    def total(offset, mask=mask):
        return sum(table[t + offset, ids[t]] for t in range(n) if mask[t] and 0 <= t + offset < n)

    expected = total(-1)
    all_tokens = total(-1, torch.ones(n, dtype=torch.bool))
    wrong_mask = sum(table[t - 1, ids[t]] for t in range(1, n) if mask[t - 1])
    known = {
        "each token is scored at its own position, which has seen it already": total(0),
        "each token is scored at the position after it": total(1),
        "this is a mean over tokens; log pi(y | x) is a sum": expected / 4,
        "tokens count that do not train": all_tokens,
        "the mask is off by one: it belongs to the token that is predicted": wrong_mask,
        "this is a loss: the sign is wrong": -expected,
    }
    compare(answer.reply_logps(logits, ids, mask), expected, "log pi(y | x)", **known)
    mask[0] = True
    first = answer.reply_logps(logits, ids, mask)
    compare(
        first, expected, "log pi(y | x) where the mask has the first token, which nobody predicts"
    )


# 7. DPO


def softplus(x: float) -> float:
    """-log sigmoid(-x), in double precision."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def dpo_values(answer, numbers: Numbers) -> None:
    """The loss"""
    beta = numbers.uniform(0.2, 0.7)
    c, r, ref_c, ref_r = (-10 + 2 * numbers.normal(4) for _ in range(4))

    def losses(margins, beta=beta):
        return torch.tensor([softplus(-beta * m) for m in margins.tolist()])

    margin = (c - ref_c) - (r - ref_r)
    known = {
        "the sign is wrong: the loss falls where the rejected reply gains": losses(-margin),
        "the reference has no part in it": losses(c - r),
        "the reference is added, not taken off": losses(c - r + ref_c - ref_r),
        "beta has no part in it": losses(margin, 1.0),
        "beta weighs the loss, and not the margin": beta * losses(margin, 1.0),
        "this is a probability, not its negative logarithm": (-losses(margin)).exp(),
    }
    found = answer.dpo_loss(c, r, ref_c, ref_r, beta=beta)
    say(isinstance(found, tuple) and len(found) == 3, "expected losses and two rewards")
    say(found[0].dim() == 1, "the losses are averaged or summed already; the step divides once")
    compare(found[0], losses(margin), "the loss", **known)
    start = answer.dpo_loss(c, r, c, r, beta=beta)[0]
    compare(start, torch.full((4,), math.log(2)), "the loss at the start, where it is ln 2")


def dpo_gradient(answer, numbers: Numbers) -> None:
    """Its gradient, and margins of a thousand nats"""
    beta = numbers.uniform(0.2, 0.7)
    values = [-10 + numbers.normal(3).double() for _ in range(4)]
    c = values[0].clone().requires_grad_()
    loss = answer.dpo_loss(c, *values[1:], beta=beta)[0]
    say(loss.requires_grad, "the loss carries no gradient")
    loss.sum().backward()
    margin = values[0] - values[1] - values[2] + values[3]
    expected = torch.tensor([-beta / (1 + math.exp(beta * m)) for m in margin.tolist()])
    compare(c.grad.float(), expected, "the gradient by the chosen reply's log-prob")
    low, zero = torch.tensor([-4000.0, 0.0]), torch.zeros(2)
    far = answer.dpo_loss(low, low.flip(0), zero, zero, beta=0.5)
    finite = bool(far[0].isfinite().all())
    say(finite, "the loss of a margin of -4000 is not finite: a sigmoid was rounded to 0")
    compare(far[0], torch.tensor([2000.0, 0.0]), "the loss of margins -4000 and 4000")


def dpo_rewards(answer, numbers: Numbers) -> None:
    """The rewards"""
    beta = numbers.uniform(0.2, 0.7)
    c, r, ref_c, ref_r = (-10 + numbers.normal(4) for _ in range(4))
    found = answer.dpo_loss(c.requires_grad_(), r.requires_grad_(), ref_c, ref_r, beta=beta)
    sides = zip(found[1:], (c, r), (ref_c, ref_r), ("chosen", "rejected"))
    for reward, logps, ref, name in sides:
        ratio = (logps - ref).detach()
        known = {f"the {name} reward lacks beta": ratio}
        known[f"the {name} reward does not know the reference"] = beta * logps.detach()
        compare(reward, beta * ratio, f"the {name} reward", **known)
        say(not reward.requires_grad, f"the {name} reward carries a gradient; it is a metric")


# 8. KTO


def kto_baseline(answer, numbers: Numbers) -> None:
    """z0"""
    ref, ratio = -10 + numbers.normal(6), numbers.normal(6)
    ratio[0] = -3.0  # one that is below 0
    ratio += 1 - ratio.mean()
    logps = ref + ratio
    known = {
        "a sum, where the mean is wanted": ratio.sum(),
        "each log-ratio is bounded by 0, where the mean should be": ratio.clamp(min=0).mean(),
        "each log-ratio counts with its magnitude": ratio.abs().mean(),
        "the sign is wrong": -ratio.mean(),
    }
    found = answer.kl_baseline(logps.requires_grad_(), ref)
    compare(found, ratio.mean().detach(), "z0", **known)
    say(not found.requires_grad, "z0 carries a gradient: the policy would move its own yardstick")
    below = answer.kl_baseline(logps.detach() - 3, ref)
    say(not equal(below, -2.0), "z0 is negative; an estimate of a KL divergence is not")
    compare(below, torch.tensor(0.0), "z0 where the mean is -2")


def kto_values(answer, numbers: Numbers) -> None:
    """The loss of a thumb"""
    beta, z0 = numbers.uniform(0.2, 0.7), torch.tensor(numbers.uniform(0.5, 2))
    up, down = numbers.uniform(1.2, 2), numbers.uniform(0.3, 0.8)
    logps, ref = -10 + numbers.normal(6), -10 + numbers.normal(6)
    label = torch.tensor([True, False, True, True, False, False])

    def losses(z0=float(z0), beta=beta, up=up, down=down, swap=False):
        found = []
        for delta, good in zip((logps - ref).tolist(), label.tolist()):
            x = beta * (delta - z0) * (1 if good is not swap else -1)
            found.append((up if good else down) * (1 - 1 / (1 + math.exp(-x))))
        return torch.tensor(found)

    z = float(z0)
    one_way = torch.where(label, losses(), losses(swap=True))
    known = {
        "the labels are turned round: thumbs down are rewarded": losses(swap=True),
        "a thumb down is treated like a thumb up": one_way,
        "z0 has no part in it": losses(z0=0.0),
        "z0 is added, not taken off": losses(z0=-z),
        "z0 is not turned round for thumbs down": torch.where(label, losses(), losses(z0=-z)),
        "beta has no part in it": losses(beta=1.0),
        "the weights have no part in it": losses(up=1.0, down=1.0),
        "the two weights are in each other's place": losses(up=down, down=up),
    }
    weights = dict(desirable_weight=up, undesirable_weight=down)
    given = logps.clone().requires_grad_()
    found = answer.kto_loss(given, ref, label, z0, beta=beta, **weights)
    say(isinstance(found, tuple) and len(found) == 2, "expected losses and rewards")
    say(found[0].dim() == 1, "the losses are averaged or summed already; the step divides once")
    compare(found[0], losses(), "the loss", **known)
    say(found[0].requires_grad, "the loss carries no gradient")
    ratio = logps - ref
    faults = {"a thumb down's reward has its sign turned": torch.where(label, ratio, -ratio) * beta}
    faults["the reward lacks beta"] = ratio
    faults["z0 is taken off the reward"] = beta * (ratio - z0)
    compare(found[1], beta * ratio, "the reward", **faults)
    say(not found[1].requires_grad, "the reward carries a gradient; it is a metric")
    start = answer.kto_loss(ref, ref, label, torch.tensor(0.0), beta=beta)[0]
    compare(start, torch.full((6,), 0.5), "the loss at the start, where it is 1/2")


# 9. An optimizer step


def ragged(numbers: Numbers) -> list[list[float]]:
    return [[numbers.uniform(1, 4) for _ in range(n)] for n in (1, 5, 2)]


def lazily(w, groups):
    """Batches as a method yields them: each one is made when it is asked for."""
    for i, x in enumerate(groups):
        held = i and (w.grad is None or not w.grad.any())
        say(not held, "a batch is asked for before the one before it went through backward")
        metric = torch.tensor(float(len(x)))
        yield {"loss": (sum(w * v for v in x), len(x)), "up": (metric, 2 * len(x))}


def step_gradient(answer, numbers: Numbers) -> None:
    """The gradient of a mean over all"""
    groups, rate = ragged(numbers), numbers.uniform(0.05, 0.2)
    total, n = sum(map(sum, groups)), sum(map(len, groups))
    w = nn.Parameter(torch.tensor(1.0))
    sums, norm = answer.optimizer_step(torch.optim.SGD([w], lr=9.0), rate, lazily(w, groups))
    gone, each = 1 - float(w.detach()), [sum(x) / len(x) for x in groups]
    known = {
        "nothing was changed": 0.0,
        "the step goes up: the sign is wrong": -rate * total / n,
        "this is the mean of the batches' means; a short batch weighs too much": rate
        * sum(each)
        / 3,
        "this is the sum of the batches' means": rate * sum(each),
        "this is the gradient of the sum; nothing was divided": rate * total,
        "only the last batch counts": rate * each[-1],
        "the batches are divided by their number alone": rate * total / 3,
        "the optimizer's rate is not the one that was given": 9.0 * total / n,
    }
    compare(torch.tensor(gone), torch.tensor(rate * total / n), "the step", **known)
    say(w.grad is None or not w.grad.any(), "a gradient is left behind for the next step")
    named = isinstance(sums, dict) and sums.keys() == {"loss", "up"}
    say(named, "sums lacks a name, or has too many")
    right = equal(sums["loss"][0], total) and sums["loss"][1] == n
    right = right and equal(sums["up"][0], float(n)) and sums["up"][1] == 2 * n
    say(right, "sums are not the sums and counts over all batches")
    say(not torch.is_tensor(sums["loss"][0]), "sums hold tensors; expected floats")
    say(equal(float(norm), total / n), f"the norm is {float(norm):.4g}, expected {total / n:.4g}")


def step_bounds(answer, numbers: Numbers) -> None:
    """A bound on the gradient, and losses that are not finite"""
    groups, rate = ragged(numbers), numbers.uniform(0.05, 0.2)
    mean = sum(map(sum, groups)) / sum(map(len, groups))
    w = nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([w], lr=rate)
    _, norm = answer.optimizer_step(optimizer, rate, lazily(w, groups), 0.5)
    gone = 1 - float(w.detach())
    say(not equal(gone, rate * mean), "max_grad_norm does not bound the gradient")
    compare(torch.tensor(gone), torch.tensor(rate * 0.5), "the step under max_grad_norm 0.5")
    say(not equal(float(norm), 0.5), "the norm is what is left after the bound, not before it")
    fault = f"the norm is {float(norm):.4g}, expected {mean:.4g}, that of the gradient of the mean"
    say(equal(float(norm), mean), fault)
    for bad in (math.nan, math.inf):
        w = nn.Parameter(torch.tensor(1.0))
        optimizer = torch.optim.SGD([w], lr=rate)
        sums, _ = answer.optimizer_step(optimizer, rate, lazily(w, [[1.0], [bad]]))
        say(w.detach() == 1, f"a loss of {bad} changes the weights")
        say(sums is None, f"a loss of {bad} is not reported: sums is not None")
        say(w.grad is None or not w.grad.any(), f"a loss of {bad} leaves its gradient behind")


# 10. Ranked replies


def pairs_of_ranks(answer, numbers: Numbers) -> None:
    """Every two that differ make a pair"""
    ranks = [0.0, 1.0, 1.0, 2.5, 2.5]
    numbers.rng.shuffle(ranks)
    found = [tuple(pair) for pair in answer.ranked_pairs(list(ranks))]
    say(all(len(pair) == 2 for pair in found), "a pair has two numbers")
    inside = all(i in range(5) and j in range(5) for i, j in found)
    say(inside, "a pair names a completion that is not there")
    tied = [pair for pair in found if ranks[pair[0]] == ranks[pair[1]]]
    say(not tied, "two replies of one rank make a pair: nobody preferred one of them")
    turned = [pair for pair in found if ranks[pair[0]] > ranks[pair[1]]]
    say(not turned, "the worse reply stands first in a pair")
    say(len(set(found)) == len(found), "a pair comes twice: it would weigh twice as much")
    say(len(found) == 8, f"{len(found)} pairs of 8: some that differ in rank are missing")


def places_of_pairs(answer, numbers: Numbers) -> None:
    """The pairs of a batch, in one list of completions"""
    batch = []
    for least in (3, 2, 2):  # not all of two: a start of 2 e must show
        count = numbers.rng.randint(least, 4)
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
        batch.append(SimpleNamespace(count=count, pairs=numbers.rng.sample(pairs, 1) + pairs[:1]))
    names = [(e, c) for e, example in enumerate(batch) for c in range(example.count)]
    found = answer.pairs_of(batch)
    say(len(found) == 2, "expected two lists: the better ones and the worse ones")
    better, worse = map(list, found)
    wanted = [(e, i, j) for e, example in enumerate(batch) for i, j in example.pairs]
    say(len(better) == len(worse) == len(wanted), "there is not one entry for each pair")
    starts = better == [i for _, i, _ in wanted] and worse == [j for _, _, j in wanted]
    say(not starts, "the places are counted within an example; the list has the whole batch")
    two = better == [2 * e + i for e, i, _ in wanted]
    say(not two, "every example is taken to have two completions")
    say(max(better + worse) < len(names), "a place lies beyond the last completion")
    got = [(*names[i], names[j][1]) for i, j in zip(better, worse)]
    say(got != [(e, j, i) for e, i, j in wanted], "better and worse are in each other's place")
    say(got == wanted, "the places are those of other completions")


EXERCISES = {  # file -> {check: points}; 10 points each
    "e01_mask": {mask_of_pieces: 6, ids_of_pieces: 4},
    "e02_until": {who_sees_whom: 7, windows: 3},
    "e03_lora": {lora_forward: 6, lora_merge: 4},
    "e04_reference": {reference: 6, as_it_was: 4},
    "e05_nf4": {nf4_scales: 4, nf4_codes: 6},
    "e06_logps": {logps_of_tokens: 5, logps_of_a_reply: 5},
    "e07_dpo": {dpo_values: 5, dpo_gradient: 3, dpo_rewards: 2},
    "e08_kto": {kto_baseline: 4, kto_values: 6},
    "e09_step": {step_gradient: 6, step_bounds: 4},
    "e10_ranked": {pairs_of_ranks: 5, places_of_pairs: 5},
}
