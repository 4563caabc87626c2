"""Tiny models and a ChatML tokenizer, made in the process: the tests need no network."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
# Tiny tensors: a second thread costs more than it brings. In the environment, so that the scripts
# that tests start add up in the same order as the test itself: what they write is compared.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: test_kernels.py

import transformers
from scripts import write_data
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()

TEXT = [
    "system user assistant Be brief. What is the capital of France? "
    "Paris is the capital of France.",
    "Why is the sky blue? Light is scattered. How are you? I am fine, thank you. Hello! Bye.",
]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in two processes, where pytest-xdist is there: a file in one of them,
    because README's commands, say, go on from one another."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ and not config.option.usepdb
    whole = config.args_source is config.ArgsSource.TESTPATHS
    if whole and alone and config.pluginmanager.hasplugin("xdist"):
        if config.option.numprocesses is None:
            config.option.numprocesses, config.option.dist = 2, "loadfile"


def make_tokenizer(special=("<|im_start|>", "<|im_end|>", "<|endoftext|>")):
    """A byte-level BPE of about 300 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[-1])


def tiny(kind, **more):
    """A config of any Llama-like kind, small enough for a test."""
    size = dict(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.2,  # far from uniform predictions, so that errors show
    )
    return kind(**(size | more))


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """The bytes that autograd keeps, but for those of `others`."""

    def __init__(self, others):
        self.storages = {tensor.untyped_storage()._cdata: None for tensor in others}
        super().__init__(self.note, lambda tensor: tensor)

    def note(self, tensor):
        storage = tensor.untyped_storage()
        self.storages.setdefault(storage._cdata, storage)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values() if storage is not None)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny random Llama with its ChatML tokenizer, saved as an ordinary model directory."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny(LlamaConfig)).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A directory with sft.jsonl, dpo.jsonl and kto.jsonl."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def no_curves():
    """No curves.png: they take longer than the tiny runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        yield
