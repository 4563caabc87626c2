"""--plain: the lesson's definitions train alone, at the numbers of their twins."""

import json
from functools import partial

import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file
from scripts import METHODS
from torch import nn

import nanoalign
from nanoalign import InputError, chatml, logps, lora, nf4, packing
from nanoalign.fast import attention, dropout, encode, head
from nanoalign.fast import nf4 as fast_nf4
from nanoalign.run.flags import parse


@pytest.fixture(autouse=True)
def with_twins():
    """Every test begins and ends with the twins in their places."""
    nanoalign.plain(False)
    yield
    nanoalign.plain(False)


@pytest.fixture
def no_twins(monkeypatch):
    """The twins raise."""

    def refuse(name, *given, **more):
        raise AssertionError(f"the twin {name} was called")

    twins = [(attention, "attention"), (head, "token_logps"), (encode, "each")]
    for module, name in (*twins, (dropout, "Dropout"), (fast_nf4, "rebuild")):
        monkeypatch.setattr(module, name, partial(refuse, name))


def run(method, model_dir, data, out, *flags):
    """-> what trained, and the lines of metrics."""
    kind, go = METHODS[method]
    given = ["--model_name_or_path", model_dir, "--dataset_name", str(data / f"{method}.jsonl")]
    given += ["--output_dir", str(out), "--max_steps", "2", "--logging_steps", "1"]
    given += ["--learning_rate", "1e-3", "--max_length", "128", "--device", "cpu"]
    go(parse(kind, [*given, "--disable_dropout", "true", *flags], {}))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return load_file(out / "adapter_model.safetensors"), lines


@pytest.mark.parametrize("bits", [[], ["--load_in_4bit", "--use_bnb_nested_quant"]])
@pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
def test_the_definitions_train_at_the_same_numbers(
    method, bits, model_dir, data, tmp_path, no_curves, request
):
    expected, lines = run(method, model_dir, data, tmp_path / "twins", *bits)
    request.getfixturevalue("no_twins")
    found, plain_lines = run(method, model_dir, data, tmp_path / "plain", "--plain", *bits)
    for name, tensor in expected.items():  # AdamW's steps are all of one size: the sign counts
        assert (found[name] - tensor).abs().mean() < 2e-6, name
    for line, other in zip(lines, plain_lines, strict=True):
        for key in line.keys() - {"time", "tokens_per_second"}:
            assert other[key] == pytest.approx(line[key], rel=1e-5, abs=2e-5), key


def test_what_the_table_names_is_what_runs(no_twins):
    """The table has every twin that a lesson file calls as fast.NAME."""
    nanoalign.plain()
    for module in (chatml, packing, lora, nf4, logps):
        assert module.fast is module
    assert lora.LoRALinear(nn.Linear(4, 4), 2, 1.0).dropout.p == 0
    with pytest.raises(AssertionError, match="the twin rebuild"):
        nanoalign.plain(False)
        nf4.NF4Linear.from_linear(nn.Linear(64, 2)).dequantize()


def test_a_function_of_ones_own_takes_a_definitions_place():
    definition = logps.token_logps
    nanoalign.plain(token_logps=lambda h, head, targets: torch.zeros(len(h)))
    assert logps.fast.token_logps(torch.ones(3, 2), None, None).tolist() == [0, 0, 0]
    nanoalign.plain()
    assert logps.fast.token_logps is definition
    nanoalign.plain(False)
    assert logps.fast is head and logps.token_logps is definition
    with pytest.raises(InputError, match="no definition atention; there are .*attention"):
        nanoalign.plain(atention=print)


def test_text_that_needs_care_is_refused():
    """A name of a special token that the tokenizer reads as the token."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>"])  # not declared special: it is found in plain text
    pieces = [("say <tool>", True)]
    assert tokenizer.convert_tokens_to_ids("<tool>") not in chatml.encode(tokenizer, [pieces])[0][0]
    nanoalign.plain()
    with pytest.raises(InputError, match="'say <tool>' holds the name of a special token"):
        chatml.encode(tokenizer, [pieces])
    assert chatml.encode(tokenizer, [[("say", True)]]) == [
        chatml.ids_and_mask(tokenizer, [("say", True)])
    ]


def test_dropout_and_the_compiler_are_refused():
    kind, _ = METHODS["sft"]
    given = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--plain"]
    with pytest.raises(InputError, match="--plain: needs --disable_dropout true"):
        parse(kind, given, {})
    with pytest.raises(InputError, match="--plain and --torch_compile contradict"):
        parse(kind, [*given, "--disable_dropout", "true", "--torch_compile"], {})
