"""The metrics of an engine for Prometheus. Independent of HTTP."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from flex_nano_vllm.inference import Inference
from flex_nano_vllm.outputs import RequestOutput


class Metrics:
    """Counts of the engine, read at each scrape, and latencies of finished requests."""

    def __init__(self, engine: Inference):
        self.engine = engine
        self.registry = CollectorRegistry()
        self.registry.register(self)
        seconds = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

        def histogram(name: str, text: str, scale: float = 1.0) -> Histogram:
            buckets = [scale * bound for bound in seconds]
            return Histogram(f"flex_nano_vllm_{name}", text, registry=self.registry, buckets=buckets)

        self.ttft = histogram("time_to_first_token_seconds", "Seconds from arrival to the first token.")
        self.tpot = histogram(
            "time_per_output_token_seconds", "Mean seconds per token after the first, by request.", 0.1
        )
        self.latency = histogram("e2e_request_latency_seconds", "Seconds from arrival to the last token.")

    def collect(self) -> Iterable[Metric]:
        stats = self.engine.stats()
        gauges = dict(
            num_requests_running=(stats.num_running, "Running sequences."),
            num_requests_waiting=(stats.num_waiting, "Waiting sequences."),
            kv_cache_usage_perc=(stats.kv_usage, "Used pages as a share of the usable pages, 0 to 1."),
        )
        counters = dict(
            num_preemptions=(stats.num_preemptions, "Preemptions of sequences because pages ran out."),
            prompt_tokens=(stats.num_prompt_tokens, "Prompt tokens."),
            generation_tokens=(stats.num_generated_tokens, "Generated tokens."),
            prefix_cache_hits=(stats.num_cached_tokens, "Prompt tokens found in the prefix cache."),
        )
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"flex_nano_vllm_{name}", text, value)
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(f"flex_nano_vllm_{name}", text, value)
        ended = CounterMetricFamily("flex_nano_vllm_request_success", "Finished sequences.", labels=["finished_reason"])
        for reason, number in stats.finish_reasons.items():
            ended.add_metric([reason], number)
        yield ended

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def observe(self, output: RequestOutput) -> None:
        """Record the latencies of a request, unless it was aborted."""
        if any(completion.finish_reason == "abort" for completion in output.outputs):
            return
        metrics = output.metrics
        if metrics.ttft is not None:
            self.ttft.observe(metrics.ttft)
        if (tpot := metrics.tpot(max(len(completion.token_ids) for completion in output.outputs))) is not None:
            self.tpot.observe(tpot)
        self.latency.observe(metrics.finished_time - metrics.arrival_time)
