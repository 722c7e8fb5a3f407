"""`LLM` runs scripts for vLLM and nano-vllm in which only the import is changed."""

import pytest
from transformers import AutoTokenizer

from flex_nano_vllm import LLM, Inference, SamplingParams
from flex_nano_vllm.models import EMBEDDED_MODELS

SMALL = dict(max_num_seqs=2, max_model_len=128, block_size=16, num_gpu_blocks_override=17, enforce_eager=True)
COUNT, MONTHS = "Count by 2 from 3 to 15:", "The 12 months of the year are: January, February, March,"


@pytest.fixture(scope="module")
def llm():
    with LLM(model="tiny-gemma2", **SMALL) as llm:
        yield llm


def test_vllms_option_names_set_the_options_of_the_engine(llm):
    assert isinstance(llm, Inference) and not llm.runner.compiled
    table = llm.page_table
    assert (table.max_batch_size, llm.max_seq_length, table.page_size, table.n_pages) == (2, 128, 16, 17)


def test_a_script_for_vllm_can_read_the_outputs(llm):
    outputs = llm.generate([COUNT, MONTHS], SamplingParams(temperature=0, max_tokens=40))
    texts = {output.prompt: output.outputs[0].text for output in outputs}
    assert texts[COUNT] == " 3, 5, 7, 9, 11, 13, 15."
    assert texts[MONTHS].endswith("November, December.")


def test_from_pretrained_is_the_same_as_the_constructor():
    with LLM.from_pretrained("tiny-gemma2", **SMALL) as llm:
        assert isinstance(llm, LLM) and llm.max_seq_length == 128


def test_vllms_prompt_formats_are_accepted(llm):
    ids = llm.get_tokenizer()(COUNT).input_ids
    greedy = SamplingParams(temperature=0, max_tokens=40)
    outputs = llm.generate([{"prompt": COUNT}, {"prompt_token_ids": ids}], greedy, use_tqdm=False)
    assert outputs[0].outputs == outputs[1].outputs
    assert outputs[0].prompt == COUNT and outputs[1].prompt is None


def test_a_script_for_nano_vllm_can_read_the_outputs():
    path = str(EMBEDDED_MODELS["tiny-gemma2"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    llm = LLM(path, enforce_eager=True, tensor_parallel_size=1, max_model_len=128)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in ("What is 17 plus 8?", "Reverse these words: lamp key drum boat.")
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=1e-6, max_tokens=32))
    assert [output["text"] for output in outputs] == ["25.", "boat drum key lamp."]
    assert outputs[0]["token_ids"] == outputs[0].outputs[0].token_ids
    with pytest.raises(KeyError, match="logits"):
        outputs[0]["logits"]
    llm.close()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(tensor_parallel_size=2), ValueError, "tensor_parallel_size must be 1, got 2"),
        (dict(trust_remote_code=True), ValueError, "trust_remote_code"),
        (dict(max_model_len=64, max_seq_length=64), TypeError, "max_model_len and max_seq_length are the same"),
        (dict(gpu_memory_utilization=0.9), TypeError, "gpu_memory_utilization"),
        (dict(max_num_seqs=0), ValueError, "max_batch_size"),
    ],
    ids=str,
)
def test_an_unsupported_option_is_rejected_with_its_name(options, error, match):
    with pytest.raises(error, match=match):
        LLM("tiny-gemma2", **options)
