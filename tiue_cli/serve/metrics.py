"""What Prometheus is told: counts, times and sizes; never a prompt."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
SECONDS_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30, 60)

STAGE_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        """All at zero."""
        self.registry = CollectorRegistry()
        self.requests = Counter("tiue_requests", "Requests for images", ["outcome"], registry=self.registry)
        self.images = Counter("tiue_images", "Images drawn and sent", registry=self.registry)
        self.queue = Gauge("tiue_queue_requests", "Images that wait for the model", registry=self.registry)
        self.batch_size = Histogram(
            "tiue_batch_size", "Images computed at once", buckets=BATCH_BUCKETS, registry=self.registry
        )
        self.request_seconds = Histogram(
            "tiue_request_seconds", "From request to answer", buckets=SECONDS_BUCKETS, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "tiue_batch_seconds", "The model's time for a batch", buckets=SECONDS_BUCKETS, registry=self.registry
        )
        self.stage_seconds = Histogram(
            "tiue_stage_seconds",
            "Seconds of the model's parts for a batch, and of encoding an image (png, jpeg, webp)",
            ["stage"],
            buckets=STAGE_BUCKETS,
            registry=self.registry,
        )
        self.kept_images = Gauge("tiue_kept_images", "Images kept for response_format url", registry=self.registry)
        self.model_info = Gauge(
            "tiue_model_info",
            "The model that is served",
            ["model", "backend", "precision", "k"],
            registry=self.registry,
        )

    def observe_batch(self, size: int, seconds: float) -> None:
        """Count a batch of ``size`` images that took ``seconds``."""
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def observe_stage(self, stage: str, seconds: float) -> None:
        """Count ``seconds`` of a part of the model for a batch, or of encoding one image."""
        self.stage_seconds.labels(stage).observe(seconds)

    def text(self) -> bytes:
        """The page of ``/metrics``."""
        return generate_latest(self.registry)
