"""Numbers for Prometheus."""

from mimi_jax.streams.pool import Pool, Step

# Seconds; a frame is 0.08.
BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.32, 0.64, 1.28)


class Metrics:
    """Counts what a pool does.

    Args:
        frame_seconds: of the model. A frame whose result takes longer is late.
    """

    def __init__(self, frame_seconds: float):
        import prometheus_client as prometheus

        self._frame_seconds, self._registry = frame_seconds, prometheus.CollectorRegistry()
        half = {"labelnames": ["half"], "registry": self._registry}
        self._steps = prometheus.Histogram(
            "mimi_step_seconds", "From the start of a step to its results", buckets=BUCKETS, **half
        )
        self._delays = prometheus.Histogram(
            "mimi_frame_delay_seconds",
            "From when a frame was the next of its stream to its result",
            buckets=BUCKETS,
            **half,
        )
        self._late = prometheus.Counter("mimi_late_frames", "Frames that took longer than they last", **half)
        self._rows = prometheus.Gauge("mimi_rows", "Rows of the last step", **half)
        self._sessions = prometheus.Gauge("mimi_sessions", "Open sessions", **half)
        self._waiting = prometheus.Gauge("mimi_waiting_frames", "Frames that wait for a step", **half)
        self._ended = prometheus.Counter(
            "mimi_sessions_ended", "Sessions by how they ended", ["reason"], registry=self._registry
        )

    def count_step(self, step: Step) -> None:
        """Is called after each step of the pool."""
        self._steps.labels(step.half).observe(step.seconds)
        self._rows.labels(step.half).set(step.rows)
        delays = self._delays.labels(step.half)
        for delay in step.delays:
            delays.observe(delay)
        self._late.labels(step.half).inc(sum(delay > self._frame_seconds for delay in step.delays))

    def count_end(self, reason: str) -> None:
        """A session has ended, for one of a few reasons."""
        self._ended.labels(reason).inc()

    def text(self, pool: Pool) -> bytes:
        """All numbers, in the format of Prometheus."""
        import prometheus_client as prometheus

        for half, count in pool.num_sessions().items():
            self._sessions.labels(half).set(count)
        for half, count in pool.num_waiting().items():
            self._waiting.labels(half).set(count)
        return prometheus.generate_latest(self._registry)
