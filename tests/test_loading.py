"""`Inference.from_pretrained`: a folder gives the same tokens as its model, and code in the folder is never run."""

import json

import pytest
import torch
from engines import byte_model, greedy
from tiny_models import hf_generate

from benchmarks.random_models import byte_tokenizer
from flex_nano_vllm import Inference

SIZES = dict(max_batch_size=2, max_seq_length=64, n_pages=9, page_size=16, compile=False)


@pytest.fixture
def folder(tmp_path):
    byte_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_a_saved_model_gives_the_same_tokens(folder):
    with Inference.from_pretrained(str(folder), device="cpu", dtype=torch.float64, **SIZES) as engine:
        (output,) = engine.generate("hello", greedy(5), use_tqdm=False)
    assert output.outputs[0].token_ids == hf_generate(byte_model(), byte_tokenizer()("hello").input_ids, 5, True)


@pytest.mark.parametrize("model_type", ["gemma2", "never-heard-of"])
def test_code_in_a_model_folder_is_rejected_and_not_run(folder, model_type, monkeypatch):
    """transformers would ask on the terminal, and run the code if the answer is yes."""
    canary = folder / "canary"
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w')", encoding="utf-8")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    change_config(folder, model_type=model_type, auto_map=auto_map)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=r"contains its own code \(auto_map\)"):
        Inference.from_pretrained(str(folder), device="cpu", **SIZES)
    assert not canary.exists()


def test_pickled_weights_are_rejected(folder):
    (folder / "model.safetensors").unlink()
    torch.save(byte_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        Inference.from_pretrained(str(folder), device="cpu", **SIZES)


def test_a_folder_without_a_tokenizer_is_rejected(folder):
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises((ValueError, OSError), match="tokenizer"):
        Inference.from_pretrained(str(folder), device="cpu", **SIZES)
