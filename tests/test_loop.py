"""The loop on one parameter: each number of a step is also computed by hand, in plain Python."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nanoalign.packing import Example
from nanoalign.run.flags import SFTConfig
from nanoalign.train import Machine, evaluate, make_optimizer, means, optimizer_step, train

EXAMPLES = [Example([1], [([2], [True])], number=i) for i in range(11)]  # of two tokens each


class Toy(nn.Module):
    """The loss of an example is (w - its number)^2 / 2."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.tensor(3.0), requires_grad=False)
        self.row_tokens, self.modes = 99, []

    def method(self, batches):
        for batch in batches:
            self.modes.append(self.training)
            loss = sum((self.w - e.number) ** 2 / 2 for e in batch)
            yield {
                "loss": (loss, len(batch)),
                "numbers": (sum(e.number for e in batch), len(batch)),
            }


def config(**more):
    how = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=3)
    how |= dict(learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=0.01)
    return SFTConfig(**how | dict(weight_decay=0.1, max_grad_norm=2.0, seed=5) | more)


def in_pairs(examples, epoch, seed, shuffle):
    """An order of its own for each epoch and seed, which is easy to tell by hand."""
    return examples[epoch + seed :] + examples[: epoch + seed] if shuffle else examples


def by_hand(w, steps, cfg):
    """AdamW as published (arXiv 1711.05101, algorithm 2), with clipping and a linear schedule."""
    m = v = 0.0
    for t in range(1, steps + 1):
        epoch, step = (t - 1) // 3, (t - 1) % 3  # 4, 4 and 3 examples an epoch
        start = epoch + cfg.seed
        numbers = [(start + i) % 11 for i in range(11)][4 * step : 4 * step + 4]
        loss = sum((w - n) ** 2 / 2 for n in numbers) / len(numbers)
        gradient = sum(w - n for n in numbers) / len(numbers)
        norm, rate = abs(gradient), cfg.learning_rate * (steps - t + 1) / steps
        if cfg.max_grad_norm and norm > cfg.max_grad_norm:
            gradient *= cfg.max_grad_norm / (norm + 1e-6)
        m = cfg.adam_beta1 * m + (1 - cfg.adam_beta1) * gradient
        v = cfg.adam_beta2 * v + (1 - cfg.adam_beta2) * gradient**2
        m_hat, v_hat = m / (1 - cfg.adam_beta1**t), v / (1 - cfg.adam_beta2**t)
        w -= rate * (m_hat / (math.sqrt(v_hat) + cfg.adam_epsilon) + cfg.weight_decay * w)
        yield t, numbers, loss, norm, rate, w


@pytest.mark.parametrize("clip", [0.0, 2.0])
def test_every_step_of_a_run(clip):
    lm, cfg = Toy().eval(), config(max_grad_norm=clip)
    expected = list(by_hand(2.0, 9, cfg))
    assert max(norm for *_, norm, _, _ in expected) > 2.0 > min(norm for *_, norm, _, _ in expected)
    steps = train(cfg, SimpleNamespace(lm=lm), EXAMPLES, lm.method, order=in_pairs)
    for (number, numbers, loss, norm, rate, w), step in zip(expected, steps, strict=True):
        assert step.number == number and [e.number for e in step.examples] == numbers
        mean = sum(numbers) / len(numbers)
        assert step.metrics == pytest.approx({"loss": loss, "numbers": mean})
        assert step.grad_norm == pytest.approx(norm)
        assert step.learning_rate == pytest.approx(rate)
        assert lm.w.item() == pytest.approx(w)
    assert all(lm.modes) and lm.frozen == 3.0


def test_a_run_goes_on_where_it_was():
    lm, cfg = Toy(), config()
    steps = train(cfg, SimpleNamespace(lm=lm), EXAMPLES, lm.method, first=4, order=in_pairs)
    found = [(step.number, [e.number for e in step.examples]) for step in steps]
    assert found == [(t, numbers) for t, numbers, *_ in by_hand(2.0, 9, cfg)][4:]


def test_a_batch_is_cut_into_rows_and_the_step_is_the_same():
    lm, cfg = Toy(), config(max_row_tokens=4, per_device_train_batch_size=4, max_steps=1)
    [step] = train(cfg, SimpleNamespace(lm=lm), EXAMPLES, lm.method, order=in_pairs)
    assert len(lm.modes) == 4 and len(step.examples) == 8  # examples of two tokens each
    assert step.metrics["loss"] == pytest.approx(
        sum((2 - e.number) ** 2 / 2 for e in step.examples) / 8
    )


def test_only_what_trains_is_given_to_the_optimizer():
    lm = Toy()
    [group] = make_optimizer(config(), lm).param_groups
    assert group["params"] == [lm.w] and group["betas"] == (0.8, 0.9)


def test_a_loss_scale_is_divided_by_the_tokens_of_the_step():
    """A sum over a step, times 65,536, would not fit into float16; the step is the same."""
    results = []
    for scale in (1.0, 2.0**16):
        lm, seen = Toy(), []
        lm.w.register_hook(seen.append)
        given = config(max_steps=1), SimpleNamespace(lm=lm), EXAMPLES, lm.method
        [step] = train(*given, order=in_pairs, machine=Machine(scale=scale))
        results.append((step.metrics["loss"], step.grad_norm, lm.w.item()))
        # (2 - 5) + (2 - 6) = -7 and (2 - 7) + (2 - 8) = -11; 4 examples of 2 tokens
        assert [g.item() for g in seen] == pytest.approx([-7 * scale / 8, -11 * scale / 8])
    assert results[1] == pytest.approx(results[0])


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(bad):
    w = nn.Parameter(torch.tensor([0.0, 1.0]))
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=0.9)
    # the root of 0 is 0, and its slope infinite; w + infinity has a slope of 1
    loss = w.sum() + math.inf if bad == "loss" else w[0].sqrt()
    sums, norm = optimizer_step(optimizer, 0.5, [{"loss": (loss, 1)}])
    assert sums is None and math.isfinite(norm) is (bad == "loss")
    assert w.tolist() == [0.0, 1.0] and not optimizer.state and w.grad is None
    sums, _ = optimizer_step(optimizer, 0.5, [{"loss": (w.sum(), 1)}])
    assert w.tolist() == [-0.5, 0.5] and sums["loss"] == (1.0, 1)


def test_an_evaluation_is_one_mean_without_dropout_and_without_gradient():
    lm, losses = Toy().train(), []

    def method():
        for batch in (EXAMPLES[:8], EXAMPLES[8:]):
            for sums in lm.method([batch]):
                losses.append(sums["loss"][0])
                yield sums

    found = evaluate(lm, method())
    expected = {"loss": sum((2 - n) ** 2 / 2 for n in range(11)) / 11, "numbers": 5.0}
    assert found == pytest.approx(expected)
    assert lm.modes == [False, False] and lm.training
    assert not any(loss.requires_grad for loss in losses)


def test_a_margin_is_what_the_chosen_have_more():
    sums = {"rewards/chosen": (6.0, 3), "rewards/rejected": (1.0, 2), "nothing": (0.0, 0)}
    assert means(sums)["rewards/margins"] == 1.5 and "nothing" not in means(sums)
