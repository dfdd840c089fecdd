"""Reports the server's metrics in Prometheus's format, read from the engine at every scrape."""

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from fusion_jax.server.engine import Engine


class Metrics:
    """Everything that /metrics reports.

    Attributes:
      responses: chat requests by HTTP status. first: seconds from acceptance to the first text.
    """

    def __init__(self, engine: Engine):
        self.engine, self.registry = engine, prometheus.CollectorRegistry()
        self.responses = prometheus.Counter(
            "fusion_responses", "Chat requests by HTTP status; 499: the caller left", ["status"], registry=self.registry
        )
        self.first = prometheus.Histogram(
            "fusion_first_text_seconds", "From acceptance to the first text", registry=self.registry
        )
        prometheus.ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def collect(self):
        """Yields the metrics that the engine counts; called by the registry."""
        engine, counts = self.engine, self.engine.statistics
        prefixes = engine.batch.prefills.prefixes
        for name, text, value in (
            ("fusion_rows", "Requests answered at once at most", engine.rows),
            ("fusion_rows_busy", "Requests being answered", engine.busy),
            ("fusion_requests_waiting", "Requests that wait for a row", engine.waiting),
            ("fusion_requests_open", "Requests accepted and not finished", engine.reserved),
            ("fusion_recompilations", "Programs compiled since the warm-up", engine.recompilations),
            (
                "fusion_programs_pending",
                "Smaller prefills that are still to be compiled",
                engine.batch.prefills.pending,
            ),
            ("fusion_prefix_bytes", "Bytes of kept prompts", prefixes.bytes),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        for name, text, value in (
            ("fusion_prompt_tokens", "Positions of prompts, visual and kept ones included", counts.prompt_tokens),
            ("fusion_answer_tokens", "Tokens generated", counts.answer_tokens),
            ("fusion_prefills", "Prompts prefilled", counts.prefills),
            ("fusion_decode_chunks", "Chunks decoded", counts.chunks),
            ("fusion_prefix_hits", "Prompts that continued the kept one of the turn before", prefixes.hits),
            ("fusion_prefix_misses", "Prompts of later turns that were prefilled whole", prefixes.misses),
        ):
            yield CounterMetricFamily(name, text, value=value)
        ended = CounterMetricFamily("fusion_answers", "Answers by how they ended", labels=["finish"])
        for finish, count in counts.finished.copy().items():
            ended.add_metric([finish], count)
        yield ended
