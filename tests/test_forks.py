"""Several samples of one prompt equal the outputs of separate requests, and share the computed prompt."""

import pytest
from engines import SIZES, own_model, prompt_of

from flex_nano_vllm import Inference, SamplingParams

PROMPT_LENGTHS = [1, 3, 4, 5, 8, 9, 14, 15, 19]  # with pages of 4 tokens, and a window of 12


def sampling(n=1, seed=7, max_tokens=6):
    return SamplingParams(n=n, seed=seed, max_tokens=max_tokens, ignore_eos=True)


def drawn(engine, prompt, n):
    (output,) = engine.generate(prompt, sampling(n), use_tqdm=False)
    assert [completion.index for completion in output.outputs] == list(range(n))
    return [completion.token_ids for completion in output.outputs]


@pytest.fixture(scope="module")
def separately():
    """The outputs of separate requests, by (prompt length, sample), in an engine without prefix caching."""
    with Inference(own_model("separately"), None, **SIZES, enable_prefix_caching=False) as engine:
        prompts = [prompt_of(length) for length in PROMPT_LENGTHS]
        samples = {
            (length, i): engine.generate(prompt, sampling(seed=7 + i), use_tqdm=False)[0].outputs[0].token_ids
            for length, prompt in zip(PROMPT_LENGTHS, prompts)
            for i in range(5)
        }
        assert len({tuple(tokens) for tokens in samples.values()}) > 30, "most outputs must differ"
        return samples


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize("n", [2, 5])  # with five samples in three rows, the last two start when others have ended
def test_each_sample_equals_the_output_of_a_separate_request(n, caching, release, separately):
    options = dict(SIZES, enable_prefix_caching=caching, enable_window_release=release)
    with Inference(own_model("forks"), None, **options) as engine:
        for length in PROMPT_LENGTHS:
            expected = [separately[length, i] for i in range(n)]
            assert drawn(engine, prompt_of(length), n) == expected
            engine.check_invariants()
            assert engine.stats().num_used_pages == 0


@pytest.mark.parametrize("caching", [True, False])
def test_samples_equal_the_outputs_of_separate_requests_under_preemption(caching, separately):
    options = dict(SIZES, n_pages=8, max_num_batched_tokens=8, watermark=0, enable_prefix_caching=caching)
    with Inference(own_model("forks"), None, **options) as engine:
        requests = [prompt_of(14), prompt_of(9), prompt_of(5)]
        outputs = engine.generate(requests, sampling(n=3), use_tqdm=False)
        for length, output in zip((14, 9, 5), outputs):
            assert [completion.token_ids for completion in output.outputs] == [separately[length, i] for i in range(3)]
        assert engine.stats().num_preemptions > 0
        engine.check_invariants()


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
@pytest.mark.parametrize("n", [3, 5])
def test_a_prompt_of_any_length_is_computed_once_and_for_late_samples_at_most_twice(length, n):
    """Only the last token of the prompt is computed again, because each sample needs its logits.

    The fourth and fifth sample start when a row is released, after the other samples have generated tokens. If pages of
    the prompt were released because they are out of the window, the prompt is computed a second time.
    """
    with Inference(own_model("forks"), None, **SIZES, enable_prefix_caching=False) as engine:
        engine.generate(prompt_of(length), sampling(n=n, max_tokens=3), use_tqdm=False)
        computed = engine.stats().num_computed_tokens
    assert computed == length + n - 1 + n * 2 if n == 3 else computed <= 2 * length + n - 1 + n * 2


def test_forks_are_correct_if_their_physical_pages_differ_between_the_pools(separately):
    with Inference(own_model("forks"), None, **SIZES, enable_prefix_caching=False) as engine:
        other = engine.add_request(prompt_of(20), sampling(max_tokens=12))
        for _ in range(6):
            engine.run_one_step()
        request_id = engine.add_request(prompt_of(14), sampling(n=3))
        lie_apart, outputs = False, {}
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.run_one_step()}
            for sequence in engine.scheduler.running:
                full, windowed = (table.page(sequence.row, 3) for table in engine.kv.pools.values())
                lie_apart |= sequence.request_id == request_id and full != windowed
        assert lie_apart and other in outputs
        assert [c.token_ids for c in outputs[request_id].outputs] == [separately[14, i] for i in range(3)]


def test_the_prompt_is_computed_once_and_only_its_last_page_is_copied():
    with Inference(own_model("forks"), None, **SIZES, enable_prefix_caching=False) as engine:
        engine.add_request(prompt_of(14), sampling(n=3))
        engine.run_one_step()
        assert engine.stats().num_computed_tokens == 14 and engine.stats().num_used_pages == 4
        engine.run_one_step()  # a decode of the first sample, and the last prompt token for each of the others
        assert engine.stats().num_computed_tokens == 14 + 3
        assert engine.stats().num_used_pages == 4 + 2, "three full pages are shared, the fourth is copied"
        rows = [sequence.row for sequence in engine.scheduler.running]
        pages = [[engine.page_table.page(row, logical) for logical in range(4)] for row in rows]
        assert pages[0][:3] == pages[1][:3] == pages[2][:3]
        assert len({row_pages[3] for row_pages in pages}) == 3
        engine.abort(0)


def test_a_request_ends_with_its_last_sample_and_abort_ends_all_samples():
    with Inference(own_model("forks"), None, **SIZES) as engine:
        request_id = engine.add_request(prompt_of(9), sampling(n=5, max_tokens=3))
        steps = []
        while engine.has_unfinished_requests():
            steps.append(engine.run_one_step())
        assert all(not outputs for outputs in steps[:-1])
        (output,) = steps[-1]
        assert output.request_id == request_id and len(output.outputs) == 5
        assert {completion.finish_reason for completion in output.outputs} == {"length"}
        assert engine.stats().num_finished_requests == 1

        request_id = engine.add_request(prompt_of(9), sampling(n=5))
        for _ in range(3):
            engine.run_one_step()
        output = engine.abort(request_id)
        assert [completion.finish_reason for completion in output.outputs] == ["abort"] * 5
        assert [len(completion.token_ids) for completion in output.outputs] == [3, 2, 2, 0, 0]
        assert not engine.has_unfinished_requests() and engine.stats().num_used_pages == 0
