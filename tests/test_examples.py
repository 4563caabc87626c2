"""The fourth method: GRPO on a tiny model, with a reward that it can reach."""

import runpy

import pytest
import torch
from conftest import make_tokenizer, tiny
from safetensors.torch import load_file
from scripts import ROOT, argv, metrics, write_rows
from transformers import AutoModelForCausalLM, Gemma2Config

from nanoalign import InputError
from nanoalign.formats.layouts import DPO
from nanoalign.logps import PackedLM
from nanoalign.model import generation
from nanoalign.packing import Example, pack, pairs_of
from nanoalign.run.flags import DPOConfig, parse
from nanoalign.run.record import fit
from nanoalign.run.session import start


def words_of(model_dir, tmp_path, *more):
    pairs = [dict(prompt=f"What is {i}?", chosen="Good.", rejected="Bad.") for i in range(8)]
    words = ["--model_name_or_path", str(model_dir), "--device", "cpu", "--logging_steps", "10"]
    words += ["--dataset_name", str(write_rows(tmp_path / "p.jsonl", pairs))]
    words += ["--output_dir", str(tmp_path / "out"), "--learning_rate", "1e-2", "--max_steps", "40"]
    return [*words, "--max_completion_length", "6", "--num_generations", "4", *more]


@pytest.fixture
def script(monkeypatch):
    """Ids below 100 are wanted: their share of a reply is its reward."""
    script = runpy.run_path(str(ROOT / "examples" / "train_grpo.py"))
    wanted = "reward", lambda _, ids: sum(i < 100 for i in ids) / len(ids)
    monkeypatch.setitem(script["run_grpo"].__globals__, *wanted)
    return script


def test_grpo_improves_its_reward(script, model_dir, tmp_path, monkeypatch):
    """It rises from a third or so. What is counted are the tokens that were sampled."""
    rows, tokens, whole = [], [], PackedLM.forward

    def counted(lm, examples, *more):
        rows.append([(len(e.prompt), len(e.texts)) for e in examples])
        tokens.append(sum(len(e.prompt) + len(ids) for e in examples for ids, _ in e.texts))
        return whole(lm, examples, *more)

    monkeypatch.setattr(PackedLM, "forward", counted)
    words = words_of(model_dir, tmp_path)
    script["run_grpo"](parse(script["GRPOConfig"], words, {}))
    lines = metrics(tmp_path / "out")
    found = [line["reward"] for line in lines]
    assert len(found) == 4 and found[0] < 0.6 and found[-1] > found[0] + 0.2
    _, *rows = rows  # the first is the probe's
    assert len(rows) == 40 and rows[0] == [(n, 4) for n, _ in rows[0]]  # a prompt once a group
    assert [line["num_tokens"] for line in lines] == [
        sum(tokens[1 : n + 1]) for n in (10, 20, 30, 40)
    ]
    assert torch.isfinite(torch.tensor(found)).all()
    with pytest.raises(InputError, match="--num_generations 1: must be more than 1"):
        parse(script["GRPOConfig"], [*words[:-1], "1"], {})  # a group of one has no spread


def test_grpo_trains_the_policy_that_it_samples_from(script, model_dir, tmp_path):
    """At a temperature, its log-probs are those of the logits divided by it."""
    words = words_of(model_dir, tmp_path, "--temperature", "0.5")
    words[words.index("--max_steps") + 1] = "1"
    policy = script["run_grpo"](parse(script["GRPOConfig"], words, {})).policy
    prompt, reply = [5, 6, 7], [8, 9, 10, 11]
    with generation(policy) as model, torch.no_grad():
        logits = model(torch.tensor([prompt + reply])).logits[0, 2:-1]
    expected = (logits / 0.5).log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).sum()
    policy.lm.eval()
    got = policy([Example(prompt, [(reply, [True] * 4)])]).logps[0]
    torch.testing.assert_close(got, expected)


def test_grpo_at_a_temperature_refuses_a_cap(script, tmp_path):
    """softmax(logits / temperature) is no other scale there."""
    model = AutoModelForCausalLM.from_config(tiny(Gemma2Config))
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    words = words_of(tmp_path / "model", tmp_path, "--temperature", "0.5")
    with pytest.raises(InputError, match="--temperature: must be 1 for a model that caps"):
        script["run_grpo"](parse(script["GRPOConfig"], words, {}))


@pytest.mark.parametrize("use_peft", ["true", "false"])
def test_a_head_that_a_script_adds_is_saved(use_peft, model_dir, data, tmp_path):
    """A reward model. A run that is finished takes the head from its result, although the script
    has made a new one; and the result of a later run without a head has none."""
    given = dict(model_name_or_path=model_dir, dataset_name=str(data / "dpo.jsonl"), device="cpu")
    given |= dict(output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, use_peft=use_peft)

    def begun(**more):
        cfg = parse(DPOConfig, argv(given | more), {})
        return cfg, start(cfg, DPO)

    def trained(**more):
        cfg, run = begun(**more)
        lm = run.policy.lm
        lm.reward = torch.nn.Linear(32, 1, bias=False)
        new = lm.reward.weight.detach().clone()

        def reward(batches):
            for batch in batches:
                row = pack(batch, lm.device, lm.windows)
                ends = row.predictors[torch.tensor(row.trained).cumsum(0) - 1]
                rewards = lm.reward(lm.hidden(row)[ends])[:, 0]
                chosen, rejected = (rewards[index] for index in pairs_of(batch))
                yield {"loss": (torch.relu(1 - chosen + rejected).sum(), len(batch))}

        fit(cfg, run, reward)
        return new, lm.reward.weight.detach()

    new, head = trained()
    saved = load_file(tmp_path / "heads.safetensors")
    assert saved.keys() == {"reward.weight"} and torch.equal(saved["reward.weight"], head)
    assert not torch.equal(new, head)
    other, again = trained(resume_from_checkpoint="last")
    assert torch.equal(new, other) and torch.equal(again, head)
    (tmp_path / "heads.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="heads.safetensors: not there"):
        trained(resume_from_checkpoint="last")
    (tmp_path / "elsewhere").rename(tmp_path / "heads.safetensors")
    cfg, run = begun(overwrite_output_dir="true")
    fit(cfg, run, lambda batches: ({"loss": (-run.policy(b).logps.sum(), 1)} for b in batches))
    assert (tmp_path / "run.json").exists() and not (tmp_path / "heads.safetensors").exists()
