"""The tools beside training: the mask shown, advice, curves, the model card."""

import io
import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import transformers as t
from conftest import make_tokenizer, tiny
from huggingface_hub import ModelCard
from scripts import write_rows

from nanoalign import InputError
from nanoalign.formats.peft import LoRAConfig
from nanoalign.model import generation
from nanoalign.packing import Example
from nanoalign.run.advice import advice, length_advice, suggested_weights
from nanoalign.run.flags import DPOConfig, KTOConfig, SFTConfig
from nanoalign.run.log import printable
from nanoalign.run.policy import load_policy, save_policy
from nanoalign.run.report import afterthought, write_card
from nanoalign.tools import chat, plot
from nanoalign.tools import data as show
from nanoalign.tools.thumbs import read_rows

# -------------------------------------------------------------------------------------------- flags


def test_a_tool_takes_flags_of_the_scripts(capsys, monkeypatch):
    """But for one: after --load_in_4bit the scripts take a value, here that is the directory."""
    opened = []
    monkeypatch.setattr(chat, "open_policy", opened.append)
    monkeypatch.setattr(chat, "say", lambda *given: None)
    chat.main(["--load_in_4bit", "there", "--max_new_tokens", "9", "--prompt", "Hello"])
    args = vars(opened[0])
    assert args.pop("directory") == "there" and args.pop("prompt") == "Hello"
    assert args == dict(system="", temperature=0.7, top_p=0.95, max_new_tokens=9, seed=None,
                        feedback=None, web=False, port=7860,
                        chat_template=None, chat_template_kwargs={}, load_in_4bit=True,
                        device="auto",
                        trust_remote_code=False)  # fmt: skip
    with pytest.raises(SystemExit):
        chat.main(["there", "--chat_template", "llama"])
    said = capsys.readouterr().err
    assert said.startswith("chat: error: argument --chat_template: invalid choice: 'llama'")
    with pytest.raises(SystemExit):
        chat.main(["--help"])
    assert "the tokenizer's own template" in " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------------------------------------- chat


def opened(directory):
    """Through the tool's own flags."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        load = chat.open_policy
        patch.setattr(chat, "open_policy", lambda args: found.append(load(args)))
        patch.setattr(chat, "say", lambda *given: None)
        chat.main([str(directory), "--device", "cpu", "--prompt", "Hello"])
    return found[0]


IDS = torch.arange(1, 25)[None]
TRAINED = {  # what trains beside LoRA
    "LoRA": {},
    "the head": dict(lora_modules_to_save=["lm_head"]),
    "embedding and norms": dict(lora_modules_to_save=["embed_tokens", "norm"]),
    "biases": dict(lora_bias="all"),
    "LoRA on tables": dict(lora_target_modules=["q_proj", "lm_head", "embed_tokens"]),
}


@pytest.mark.parametrize("what", TRAINED)
def test_the_base_in_a_comparison_is_the_base(what, tmp_path):
    """Bit for bit; and after it the adapter is back."""
    torch.manual_seed(0)
    config = tiny(t.LlamaConfig, attention_bias=True)
    for part in (t.LlamaForCausalLM(config), make_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    cfg = SFTConfig(str(tmp_path / "base"), device="cpu", **TRAINED[what])
    trained = load_policy(cfg)
    for parameter in trained.model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    save_policy(trained, tmp_path / "adapter")
    base = t.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    policy = opened(tmp_path / "adapter")
    with torch.no_grad(), generation(policy) as model, generation(trained) as expected:
        before = model(IDS).logits
        assert torch.equal(before, expected(IDS).logits)
        assert (before - base(IDS).logits).abs().max() > 0.1
        with policy.reference():
            assert torch.equal(model(IDS).logits, base(IDS).logits)
        assert torch.equal(model(IDS).logits, before)


def test_a_model_in_the_chat_is_only_read(model_dir):
    policy = opened(model_dir)
    assert policy.lora is None and not any(p.requires_grad for p in policy.model.parameters())
    plain = t.AutoModelForCausalLM.from_pretrained(model_dir)
    assert sorted(policy.model.state_dict()) == sorted(plain.state_dict())


@pytest.mark.parametrize(
    "words, fault",
    [
        (["--max_new_tokens", "0"], "--max_new_tokens 0: must be more than 0"),
        (["--temperature", "nan"], "--temperature nan: must be at least 0 and finite"),
        (["--temperature", "inf"], "--temperature inf: must be at least 0 and finite"),
        (["--temperature", "-1"], "--temperature -1.0: must be at least 0 and finite"),
        (["--top_p", "0"], "--top_p 0.0: must be above 0 and at most 1"),
        (["--top_p", "nan"], "--top_p nan: must be above 0 and at most 1"),
        (["--seed", str(2**70)], f"--seed {2**70}: must be at least 0 and less than 2**63"),
        (["--prompt", b"caf\xe9".decode(errors="surrogateescape")], "the prompt: is not UTF-8"),
        (["--system", b"caf\xe9".decode(errors="surrogateescape")], "--system: is not UTF-8"),
        (["--prompt", ""], "nothing to reply to: give --prompt TEXT or pipe text in"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_chat_can_t_use_is_refused_before_a_model_is_read(words, fault, capsys):
    with pytest.raises(SystemExit) as stop:
        chat.main(["nowhere", "--prompt", "Hello", *words])
    assert stop.value.code == 2 and capsys.readouterr().err == f"chat: error: {fault}\n"


@pytest.mark.parametrize(
    "raw, read",
    [
        ("  你好 \n".encode(), "你好"),
        (b"caf\xe9", "chat: error: the prompt: is not UTF-8\n"),
        (b" \n", "chat: error: nothing to reply to: give --prompt TEXT or pipe text in\n"),
    ],
)
@pytest.mark.parametrize("encoding, errors", [("utf-8", "strict"), ("ascii", "surrogateescape")])
def test_what_is_piped_in_is_utf_8_in_any_locale(raw, read, encoding, errors, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(chat, "open_policy", lambda args: None)
    monkeypatch.setattr(chat, "say", lambda policy, messages, args: asked.extend(messages))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding, errors))
    if "error" not in read:
        chat.main(["there"])
        assert asked == [{"role": "user", "content": read}]
    else:
        with pytest.raises(SystemExit):
            chat.main(["there"])
        assert capsys.readouterr().err == read and not asked


def test_a_conversation_goes_on_after_a_line_that_can_t_be_read_or_is_too_long(monkeypatch, capsys):
    lines = iter(["hi", UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "no"), "\udce9", "long", "你"])

    def typed(prompt):
        line = next(lines, EOFError())
        if isinstance(line, Exception):
            raise line
        return line.encode().decode("ascii", "surrogateescape") if line == "你" else line

    asked = []

    def reply(policy, history, args):
        if history[-1]["content"] == "long":
            raise InputError("the model has 20 learned positions")
        asked.append([message["content"] for message in history])
        return "ok"

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(chat, "say", reply)
    chat.talk(None, Namespace(system="", directory="there", feedback=None))
    assert asked == [["hi"], ["hi", "ok", "你"]]
    said = "this line is not UTF-8\nthis line is not UTF-8\nthe model has 20 learned positions\n"
    assert capsys.readouterr().out == said


# ------------------------------------------------------------------------------------------ thumbs


@pytest.fixture(scope="module")
def adapter(model_dir, tmp_path_factory):
    """One that replies otherwise than its base."""
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    policy = load_policy(SFTConfig(model_name_or_path=model_dir, device="cpu"))
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    save_policy(policy, directory)
    return str(directory)


@pytest.fixture
def terminal(monkeypatch, capsys, tmp_path):
    """terminal(directory, lines) -> what chat prints; judgements go to t.jsonl."""

    def type_in(directory, *lines):
        typed = iter(lines)
        monkeypatch.setattr("builtins.input", lambda prompt: next(typed, ""))
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        flags = ["--feedback", str(tmp_path / "t.jsonl"), "--max_new_tokens=5", "--device=cpu"]
        chat.main([directory, "--temperature=0", *flags])
        return capsys.readouterr().out

    return type_in


def test_thumbs_at_the_terminal(terminal, model_dir, tmp_path):
    said = terminal(model_dir, "/good", "/a", "/choose", "Hi", "/good", "/bad", "/nonsense")
    assert said.startswith("0 thumbs: 0 up, 0 down; 0 choices\n")
    assert said.count("there is nothing to judge yet") == 2 and "/choose TEXT asks" in said
    assert said.count(f"kept in {tmp_path / 't.jsonl'}") == 2 and "/good /bad /choose" in said
    (row,) = read_rows(tmp_path / "t.jsonl")
    assert row["prompt"] == [{"role": "user", "content": "Hi"}] and row["label"] is False
    assert printable(row["completion"][0]["content"]) in said and row["model"] == model_dir
    assert terminal(model_dir, "Hi", "/good", "/undo").startswith("1 thumbs: 0 up, 1 down")
    assert read_rows(tmp_path / "t.jsonl") == [row]


def test_choices_at_the_terminal(terminal, model_dir, adapter, tmp_path):
    """Of base and adapter, in an order of chance."""
    for _ in range(8):
        said = terminal(adapter, "/choose Hi", "/a", "/b", "So?", "/a")
        row = read_rows(tmp_path / "t.pairs.jsonl")[-1]
        assert {row["model"], row["rejected_model"]} == {adapter, model_dir}
        a, b = said.index("[a] " + printable(row["rejected"][0]["content"])), said.index("[b] ")
        assert a < b and "there is nothing to judge yet" in said  # the next question ends it
    rows = read_rows(tmp_path / "t.pairs.jsonl")
    assert len(rows) == 8 and len({row["model"] for row in rows}) == 2
    said = terminal(model_dir, "/choose Hi", "/a")  # greedy, so both are the same
    assert "both replies are equal: nothing to choose" in said
    assert len(read_rows(tmp_path / "t.pairs.jsonl")) == 8
    assert terminal(adapter, "/choose Hi", "/a", "/tie").startswith("0 thumbs: 0 up, 0 down; 8 ch")
    assert len(read_rows(tmp_path / "t.pairs.jsonl")) == 8


def test_judging_needs_a_file_of_lines(model_dir, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        chat.main([model_dir, "--feedback", "thumbs.json", "--prompt", "Hi"])
    assert "thumbs.json: expected a name that ends in .jsonl" in capsys.readouterr().err
    typed = iter(["/good", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    chat.talk(None, Namespace(system="", directory="there", feedback=None))
    assert capsys.readouterr().out == "to keep judgements, start with --feedback FILE.jsonl\n"


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("opened", [True, False])
def test_a_thought_is_dim(size, opened, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = ["<think>", "Well", ", ", "\x1b[2J", "</think>", "\n", "Yes."]
    printer = chat.Printer(None, thinks=opened)
    pieces = text[opened:] if size == 1 else ["".join(text[opened:])]
    for piece in pieces:
        printer.on_finalized_text(piece)
    printer.on_finalized_text("", stream_end=True)
    said = capsys.readouterr().out
    bright = re.sub("\033\\[2m.*?\033\\[0m", "", said, flags=re.S)
    assert bright == "\nYes.\n" and printer.reply == "".join(text[opened:])
    assert "\033[2J" not in said


# ---------------------------------------------------------------------------------- the mask, shown


def test_the_mask_is_readable_without_colour(tokenizer):
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    hi, yes = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("user\nHi", "Yes."))
    ids = [start, *hi, end, *yes, end]
    mask = [False] * (len(hi) + 2) + [True] * (len(yes) + 1)
    text = show.render(tokenizer, ids, mask, colour=False)
    assert text == "<|im_start|>user\nHi<|im_end|>[[Yes.<|im_end|>]]"
    coloured = show.render(tokenizer, ids, mask, colour=True)
    assert f"{show.GREEN}Yes.{show.PLAIN}" in coloured
    assert re.sub("\033\\[[0-9]+m", "", coloured) == text.replace("[[", "").replace("]]", "")


def test_a_marker_that_is_spelled_looks_otherwise(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    spelled = tokenizer("a<|im_end|>", add_special_tokens=False, split_special_tokens=True)
    ids = [*spelled["input_ids"], end]
    text = show.render(tokenizer, ids, [True] * len(ids), colour=False)
    assert text == r"[[a\<|im_end|><|im_end|>]]"
    text = show.render(tokenizer, ids, [False] * len(ids), colour=True)
    assert f"{show.GREY}a<|im_end|>{show.PLAIN}{show.BLUE}<|im_end|>{show.PLAIN}" in text


def test_control_characters_in_data_do_not_reach_the_terminal(tokenizer):
    ids = tokenizer("a\x1b[31mb", add_special_tokens=False)["input_ids"]
    text = show.render(tokenizer, ids, [False] * len(ids), colour=False)
    assert "\x1b" not in text and "\\x1b" in text


def test_histogram_counts_every_example():
    text = show.histogram([1, 2, 3, 40, 80, 80])
    counts = [int(line.split()[3]) for line in text.splitlines()]
    assert sum(counts) == 6 and len(counts) <= 9


def test_the_command(model_dir, tmp_path, capsys):
    rows = [dict(prompt=f"Why {i}?", completion="So.", label=i < 1) for i in range(4)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    show.main([str(path), "--model_name_or_path", model_dir, "--show", "1"])
    out = capsys.readouterr().out
    assert "as KTO data" in out and "4 rows, 4 examples" in out and "[[So.<|im_end|>]]" in out
    assert "1 desirable, 3 undesirable" in out and "--desirable_weight 3.00 to 4.00" in out
    path.write_text("".join(json.dumps(row | {"label": True, "id": 7}) + "\n" for row in rows))
    show.main([str(path), "--model_name_or_path", model_dir])
    out = capsys.readouterr().out
    assert "warning: one label only" in out and "balanced" not in out
    assert f"{path}: not read: column id (4)" in out
    long = {"prompt": "word " * 2000, "completion": "So.", "label": True}
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], long, "")))
    show.main([str(path), "--model_name_or_path", model_dir, "--skip_bad_rows", "1"])
    out = capsys.readouterr().out
    assert f"passed over: {path}, line 3: " in out and "1 skipped: refused" in out
    assert "advice: prompts fill --max_length 1024 in 1 rows" in out
    with pytest.raises(SystemExit) as stop:
        show.main([str(tmp_path / "nix.jsonl"), "--model_name_or_path", model_dir])
    assert stop.value.code == 2


# ------------------------------------------------------------------------------------------- advice


def examples(up, down):
    return [Example([1], [([2], [True])], i < up) for i in range(up + down)]


def test_show_draws_the_tree_of_an_example(model_dir, tmp_path, capsys):
    """What texts share stands once, each branch under what it continues."""
    thinks = {"role": "assistant", "content": "B", "reasoning_content": "hm"}
    talk = [{"role": "user", "content": "Q"}, thinks, {"role": "user", "content": "R"}]
    path = write_rows(tmp_path / "sft.jsonl", [{"messages": [*talk, {**thinks, "content": "C"}]}])
    show.main([str(path), "--model_name_or_path", model_dir, "--method", "sft"])
    out = capsys.readouterr().out
    body = out[out.index("\n", out.index("--- ")) + 1 : out.index("--- tokens of")]
    assert body == (
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n\n"
        "    [[<think>\n    hm\n    </think>\n\n    B<|im_end|>]]\n"
        "    B<|im_end|>\n    <|im_start|>user\n    R<|im_end|>\n    <|im_start|>assistant\n"
        "    [[<think>\n    hm\n    </think>\n\n    C<|im_end|>]]\n"
    )
    row = {"prompt": "Q", "responses": ["B1", "A1", "B2"]}
    path = write_rows(tmp_path / "dpo.jsonl", [row])
    show.main([str(path), "--model_name_or_path", model_dir, "--method", "dpo"])
    out = capsys.readouterr().out
    assert "\n    [[B]]\n        [[1<|im_end|>]]\n        [[2<|im_end|>]]\n    [[A1<|im" in out


@pytest.mark.parametrize(
    "up, down, weights, expected",
    [
        (10, 10, (1, 1), None),
        (12, 10, (1, 1), None),
        (14, 10, (1, 1), None),  # past 4:3, and not past 3:2
        (16, 10, (1, 1), "undesirable_weight 1.20 to 1.60"),
        (10, 20, (1, 1), "desirable_weight 2.00 to 2.67"),
        (20, 10, (1, 1), "undesirable_weight 1.50 to 2.00"),
        (10, 20, (2, 1), None),
        (10, 20, (1, 0.5), None),
        (100, 300, (1, 2), "100 : 600; --desirable_weight 6.00 to 8.00"),
        (10, 20, (4, 1), "40 : 20; --desirable_weight 2.00 to 2.67"),
        (20, 10, (3, 1), "60 : 10; --undesirable_weight 4.50 to 6.00"),
        (10, 20, (2, 0), "20 : 0; --undesirable_weight 0.75 to 1.00"),
        (20, 10, (0, 2), "0 : 20; --desirable_weight 1.00 to 1.33"),
    ],
)
def test_class_weights(up, down, weights, expected):
    said = suggested_weights(up, down, *weights)
    assert said is expected or expected in said


def test_kto_advice():
    def said(**flags):
        return "\n".join(advice(KTOConfig(**flags), examples(10, 10)))

    assert said(per_device_train_batch_size=16) == ""
    assert "16 to 128" in said(per_device_train_batch_size=8)
    assert "4 at least" in said(per_device_train_batch_size=2)
    assert "16 to 128" in said(per_device_train_batch_size=64, gradient_accumulation_steps=4)
    full = dict(per_device_train_batch_size=16, use_peft=False)
    assert "5e-7 to 5e-6" in said(**full, learning_rate=1e-4)
    assert said(**full, learning_rate=1e-6) == ""


def test_other_advice():
    def said(*given, **more):
        return list(advice(*given, **more))

    data = examples(5, 5)
    assert said(SFTConfig(), data, cut=0) == []
    assert "max_length" in said(SFTConfig(), data, cut=3)[0]
    assert "all-linear" in said(SFTConfig(lora_target_modules=["q_proj", "v_proj"]), data)[0]
    assert said(SFTConfig(lora_target_modules=["q_proj", "up_proj"]), data) == []
    assert "beta" in said(DPOConfig(beta=5.0), data)[0]
    assert "beta" in said(DPOConfig(beta=0.001), data)[0]


LLAMA = dict(rope_type="default", rope_theta=1e4)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
LONG = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, rope_theta=1e4)
LENGTHS = {  # a model's config, the longest max_length that is nothing to say of, what is said
    "rope": (tiny(t.LlamaConfig), 512, "advice: .*was made for 512 positions"),
    "learned": (t.GPT2Config(n_positions=512), 512, "error: .*has 512 learned positions"),
    "dynamic": (tiny(t.LlamaConfig, rope_parameters=DYNAMIC), 512, "error: .*dynamic.*at most 512"),
    "one dynamic": (
        tiny(t.Gemma3TextConfig,
             rope_parameters=dict(full_attention=DYNAMIC, sliding_attention=LLAMA)),
        512, "error: .*at most 512",
    ),
    "longrope": (
        tiny(t.Phi3Config, rope_parameters=LONG, original_max_position_embeddings=64),
        64, "error: .*longrope.*at most 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LENGTHS)
def test_a_length_that_positions_do_not_serve(case, tmp_path):
    """In longrope and dynamic, a longer example would change what its neighbours in the row get."""
    model_config, longest, expected = LENGTHS[case]
    model_config.save_pretrained(tmp_path)

    def said(max_length):
        try:
            lines = length_advice(SFTConfig(max_length=max_length), str(tmp_path))
            return "".join(f"advice: {line}" for line in lines)
        except InputError as error:
            return f"error: {error}"

    assert said(longest) == ""
    assert re.match(expected, said(longest + 1)) and "\n" not in said(longest + 1)
    assert f"--max_length {longest + 1}: {tmp_path}" in said(longest + 1)


def test_both_rewards_falling_is_explained():
    def line(chosen, rejected):
        rewards = {"rewards/chosen": chosen, "rewards/rejected": rejected}
        return {**rewards, "rewards/margins": chosen - rejected}

    assert "normal" in afterthought([line(0, 0), line(-1, -3)])
    assert afterthought([line(0, 0), line(0.5, -3)]) is None
    assert afterthought([line(0, 0), line(-3, -1)]) is None
    assert afterthought([{"loss": 1.0}]) is None


# ------------------------------------------------------------------------------------------- curves


def test_curves(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": i, "loss": 1 / i, "kl": 0.1 * i} for i in range(1, 5)]
    lines.append({"step": 4, "eval_loss": 0.3})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot.main([str(run), str(run)])
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for arguments, fault in (
        ([tmp_path / "nix"], "expected a directory of a run\n"),
        (
            [run, "--out", tmp_path / "nix" / "a.png"],
            "a.png: not saved: No such file or directory\n",
        ),
        ([run, "--out", tmp_path / "a.pgn"], "expected .png, .pdf or .svg\n"),
        ([run, "--out", tmp_path / "a"], "expected .png, .pdf or .svg\n"),
        ([tmp_path], "nothing to draw: no metrics yet\n"),
    ):
        (tmp_path / "metrics.jsonl").write_text("")
        with pytest.raises(SystemExit):
            plot.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert said.err.startswith("plot: error: ") and said.err.endswith(fault) and not said.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "run"]


@pytest.mark.parametrize(
    "line", ["3", "[]", "null", "{", '{"loss": 1}', '{"step": 1, "loss": "1"}', "[" * 9999, "\x00"]
)
def test_a_line_that_is_no_metrics(line, tmp_path, capsys):
    text = '{"step": 1, "loss": 1.0}\n' + line + "\n"
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "metrics.jsonl, line 2: not a run's metrics; expected numbers by name" in said


def test_runs_of_one_name_are_drawn_apart(tmp_path, monkeypatch):
    """By their paths; runs whose last names differ, by these."""
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda runs, out: drawn.append(list(runs)) or True)
    for name in ("a/dpo", "b/dpo", "b/kto"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    monkeypatch.chdir(tmp_path)
    plot.main(["a/dpo", "b/dpo", "b/kto"])
    plot.main(["a/dpo/", "b/kto"])
    monkeypatch.chdir(tmp_path / "a" / "dpo")
    plot.main([".", "../../b/kto"])
    paths = [str(Path(name)) for name in ("a/dpo", "b/dpo", "b/kto")]
    assert drawn == [paths, ["dpo", "kto"], ["dpo", "kto"]]


# --------------------------------------------------------------------------------------------- card


def carded(lora, stop_ids, **saved):
    """What a model card says of a policy."""
    tokenizer, template = Namespace(init_kwargs=saved), Namespace(stop_ids=stop_ids)
    return Namespace(lora=lora, tokenizer=tokenizer, template=template)


@pytest.mark.parametrize("lora", [LoRAConfig(base_model_name_or_path="org/base"), None])
def test_the_hub_reads_the_card(tmp_path, lora):
    """Its library is the judge. Files of one's own are no data sets of the hub."""
    data = ["owner/name-v1.2", "squad", "runs/x.jsonl", str(tmp_path), "../there", "x.CSV"]
    cfg = DPOConfig(model_name_or_path="org/model", dataset_name=data)
    policy = carded(lora, [2, 5], nanoalign_template_kwargs={"enable_thinking": False})
    write_card(cfg, policy, tmp_path, 7, {"step": 3, "loss": 0.5, "time": 1})
    card = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    assert card.data.base_model == ("org/base" if lora else "org/model")
    assert card.data.library_name == ("peft" if lora else "transformers")
    assert card.data.datasets == ["owner/name-v1.2", "squad"]
    assert set(card.data.tags) == {"dpo", "nanoalign"} | ({"lora"} if lora else set())
    opener = "AutoPeftModelForCausalLM" if lora else "AutoModelForCausalLM"
    assert f"from {card.data.library_name} import {opener}\n" in card.text
    assert f"model = {opener}.from_pretrained(" in card.text and "trained with DPO by" in card.text
    assert "eos_token_id=[2, 5])" in card.text and "enable_thinking=False,\n)\nreply" in card.text
    assert "7 examples" in card.text and "loss 0.5" in card.text and "time" not in card.text


@pytest.mark.parametrize("absolute", [True, False])
def test_a_base_of_ones_own_is_no_model_of_the_hub(absolute, tmp_path, monkeypatch):
    """Nor does its path say where on this machine it lay."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    base = str(tmp_path / "runs" / "mine") if absolute else "runs/mine"
    cfg = SFTConfig(dataset_name=["squad"])
    write_card(cfg, carded(LoRAConfig(base_model_name_or_path=base), [2]), tmp_path, 7, {})
    card = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    assert card.data.base_model is None and base not in str(card)
    assert "\nmine, trained with supervised fine-tuning" in card.text


def test_the_card_s_code_runs(model_dir, tmp_path):
    """On what a run saved."""
    policy = load_policy(SFTConfig(model_name_or_path=model_dir, use_peft=False, device="cpu"))
    save_policy(policy, tmp_path)
    write_card(SFTConfig(model_name_or_path="m"), policy, tmp_path, 7, {})
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    seen = {}
    exec(code.replace("DIRECTORY", str(tmp_path)), seen)
    assert seen["reply"].shape[1] > seen["prompt"]["input_ids"].shape[1]
