"""The experiments with weights, rows and masks: they run, and their arithmetic is the truth."""

import math

import pytest
import torch

from experiments import mask, merge_4bit, nf4_error, packing, prefix
from experiments.lab import Report, load
from nanoalign.packing import Example, pack


@pytest.fixture(autouse=True, scope="module")
def elsewhere(tmp_path_factory):
    """One directory for all, so that the world is written once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("experiments"))
        yield


def check(report: Report) -> None:
    """A report that can be printed and drawn."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    assert all(len(row) == len(report.columns) for row in report.rows)
    assert report.table().count("\n") == len(report.rows) + 1
    assert report.held and all(type(held) is bool for _, held in report.held)
    report.draw(Figure())


# --------------------------------------------------------------------------------- nf4_error


@pytest.mark.parametrize("blocksize", [64, 256])
def test_rounding_to_nf4_is_the_packages_own(blocksize):
    from nanoalign import nf4

    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    packed, absmax = nf4.quantize(weight, blocksize)
    expected = nf4.dequantize(packed, absmax, weight.shape, torch.float32, blocksize)
    torch.testing.assert_close(nf4_error.rounded(weight, nf4.LEVELS, blocksize), expected)


def test_the_levels_are_those_of_the_formats():
    """Four bits: 15 values of int4 and FP4 (0 has two signs), 16 of NF4; all from -1 to 1."""
    for name, levels in nf4_error.LEVELS.items():
        assert len(levels) == (16 if name == "NF4" else 15) and (levels.diff() > 0).all()
        assert levels[0] == -1 and levels[-1] == 1 and 0 in levels


def test_the_integral_of_two_levels():
    """With the levels -1, 0 and 1 and blocks of 2, worked out by simulation."""
    levels = torch.tensor([-1.0, 0.0, 1.0])
    normal = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0))
    simulated = nf4_error.error([normal], levels, 2)
    assert nf4_error.expected_error(levels, 2) == pytest.approx(simulated, rel=0.005)


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_the_scales_of_gpus_fit_in_eight_bits(name):
    """MXFP4's are powers of two; NVFP4's, in the tensor's unit, are floats of four digits; and
    absmax is at 4 to 8, or at 6, of the levels' own units."""
    _, _, scale = nf4_error.OF_GPUS[name]
    absmax = torch.linspace(0.01, 5, 1000).double()
    units = scale(absmax) / 6
    if name == "MXFP4":
        assert (units.log2() % 1 == 0).all() and (
            (4 <= absmax / units) & (absmax / units < 8)
        ).all()
    else:
        mantissa, _ = torch.frexp(scale(absmax) / absmax.max() * 448)
        assert ((mantissa * 16).round() - mantissa * 16).abs().max() < 1e-9  # four binary digits
        assert (absmax / units / 6 - 1).abs().max() < 1 / 15
    assert len(units.unique()) <= 256


def test_the_integral_has_what_a_scale_clips():
    normal = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    for how in nf4_error.OF_GPUS.values():
        simulated = nf4_error.error([normal], *how)
        assert nf4_error.expected_error(*how) == pytest.approx(simulated, rel=0.005)


def test_perplexities_are_of_the_model_itself(model_dir):
    """In all fifteen formats; and the first is that of another way to compute it."""
    found = nf4_error.perplexities(model_dir)
    assert len(found) == 15 and found["NF4, 64"] != found["NF4, 256"] != found["as it is"]
    assert found["int8"] == pytest.approx(found["as it is"], rel=0.01)
    policy = load(model_dir)
    ids = nf4_error.prose(policy.tokenizer, windows=8).tolist()
    logps = policy([Example([], [(row, [True] * 512)]) for row in ids]).logps
    assert found["as it is"] == pytest.approx(math.exp(-logps.sum().item() / (8 * 511)), rel=1e-4)


# -------------------------------------------------------------------------------- merge_4bit


def test_rounding_twice_rounds_once():
    """So what is far from exact in a merge that is rounded again is the adapter, not the base."""
    once = merge_4bit.round4(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(merge_4bit.round4(once), once)


# ---------------------------------------------------------------------------- packing, prefix


def test_packing_runs():
    report = packing.run(small=True)
    check(report)
    assert report.held[0][1]  # the same losses and gradients: that needs no long run


def test_prefix_runs():
    report = prefix.run(small=True)
    check(report)
    assert report.held[0][1]


def test_the_prefix_formula_counts_the_tokens_of_the_row():
    """The row leaves out the last token of each reply, which predicts nothing."""
    [shared] = prefix.examples(1, prompt=30, reply=10, vocabulary=50)
    apart = prefix.unshared([shared])
    tokens = [len(pack(batch).input_ids) for batch in ([shared], apart)]
    assert tokens == [30 + 2 * 9, 2 * 30 + 2 * 9]
    assert prefix.formula(30, 9) == tokens[0] / tokens[1]


# ----------------------------------------------------------------------------- mask, neftune


def test_a_prompt_that_trains():
    example = mask.on_prompts_too(Example([1, 2, 3], [([4, 5], [True, True])]))
    assert example.prompt == [1] and example.texts == [([2, 3, 4, 5], [True] * 4)]
    row = pack([example])
    assert row.predictors.tolist() == [0, 1, 2, 3] and row.targets.tolist() == [2, 3, 4, 5]
