"""Training of the tiny model: its training data, and a stopped run that continues."""

import dataclasses
import functools
import random

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from examples import train_tiny_gemma2 as training
from examples.train_tiny_gemma2 import EOS, IGNORED, PAD, Options
from flex_nano_vllm import Inference
from flex_nano_vllm.models import EMBEDDED_MODELS

OPTIONS = Options(output_dir="", steps=4, tokens_per_step=400, checkpoint_every=2)


@pytest.fixture(scope="module")
def tokenizer():
    return training.train_tokenizer(seed=0)


def train(tokenizer, checkpoint):
    model = training.new_model(len(tokenizer), seed=0)
    training.train(model, tokenizer, OPTIONS, checkpoint, Console(quiet=True))
    return model.state_dict()


def test_a_stopped_run_continues_with_the_same_data(tokenizer, tmp_path, monkeypatch):
    expected = train(tokenizer, tmp_path / "whole.pt")
    save = torch.save

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(tokenizer, tmp_path / "stopped.pt")
    resumed = train(tokenizer, tmp_path / "stopped.pt")
    untrained = training.new_model(len(tokenizer), seed=0).state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(resumed[name], weight)
        assert not torch.equal(weight, untrained[name])


def test_a_run_with_other_options_does_not_continue_from_a_checkpoint(tokenizer, tmp_path):
    train(tokenizer, tmp_path / "checkpoint.pt")
    model = training.new_model(len(tokenizer), seed=0)
    for change in ({"seed": 1}, {"steps": 5}, {"tokens_per_step": 401}, {"learning_rate": 0.1}):
        options = dataclasses.replace(OPTIONS, **change)
        with pytest.raises(SystemExit, match=next(iter(change))):
            training.train(model, tokenizer, options, tmp_path / "checkpoint.pt", Console(quiet=True))


def test_the_command_line_writes_a_model_that_an_engine_can_load(tmp_path, monkeypatch, capsys):
    """The model learns nothing in two steps. But the script writes all files and prints the accuracies.

    It also deletes the checkpoint.
    """
    arguments = ["--steps", "2", "--tokens_per_step", "400", "--questions", "2", "--output_dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["train_tiny_gemma2.py", *arguments])
    monkeypatch.setattr(training, "TASKS", ["months", "sums"])
    monkeypatch.setattr(Inference, "from_pretrained", functools.partial(Inference.from_pretrained, compile=False))
    training.main()
    shown, card = capsys.readouterr().out, (tmp_path / "README.md").read_text(encoding="utf-8")
    assert all(task in shown and f"| {task} | 2 | 0 | 0 |" in card for task in training.TASKS)
    assert "Below the aim:\nmonths, bare (0 of 2); months, chat (0 of 2).\n" in card
    assert "--steps 2 --tokens_per_step 400 --learning_rate 0.006 --seed 0" in card
    assert not (tmp_path / "checkpoint.pt").exists()
    with Inference.from_pretrained(str(tmp_path), device="cpu", max_seq_length=32) as engine:
        assert engine.model.dtype == torch.bfloat16
        assert engine.input_processor.eos_token_ids == {EOS, training.END_OF_TURN}


def test_the_tokenizer_in_the_package_equals_the_one_that_training_makes(tokenizer):
    shipped = AutoTokenizer.from_pretrained(EMBEDDED_MODELS["tiny-gemma2"])
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert shipped.chat_template == tokenizer.chat_template


def test_labels_are_the_answer_and_its_end_token(tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        questions = training.draw_questions(rng, training.WEIGHTS, max_pairs=10)
        assert not any(question.held_out for question in questions)
        ids, labels = training.document(tokenizer, questions[:1], as_chat=False)
        assert [i for i, label in zip(ids, labels) if label != IGNORED] == [i for i in labels if i != IGNORED]
        answer = [label for label in labels if label != IGNORED]
        assert tokenizer.decode(answer[:-1]).strip() == questions[0].answer and answer[-1] == EOS
        assert tokenizer.decode(ids, skip_special_tokens=True).startswith(questions[0].prompt)


def test_a_chat_document_has_the_tokens_of_the_chat_template(tokenizer):
    """In a conversation, the model gets the same tokens as in training."""
    rng = random.Random(1)
    for _ in range(50):
        questions = training.draw_questions(rng, training.WEIGHTS, max_pairs=5)
        ids, _ = training.document(tokenizer, questions, as_chat=True)
        messages = [
            {"role": role, "content": content}
            for question in questions
            for role, content in (("user", question.prompt), ("assistant", question.answer))
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer(text.removesuffix("\n"), add_special_tokens=False).input_ids == ids


def test_batches_of_a_step_have_enough_tokens_pad_on_the_right_and_are_repeatable(tokenizer):
    batches = training.batches_of_step(tokenizer, OPTIONS, step=3)
    rows = [row for ids, _ in batches for row in ids.tolist()]
    assert sum(token != PAD for row in rows for token in row) >= OPTIONS.tokens_per_step
    for row in rows:
        padding = row.index(PAD) if PAD in row else len(row)
        assert set(row[padding:]) <= {PAD}
    again = training.batches_of_step(tokenizer, OPTIONS, step=3)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(batches, again, strict=True))
