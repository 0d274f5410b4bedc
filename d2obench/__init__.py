"""d2obench: what a KV-cache policy buys on your model and hardware, and what it costs in quality."""

__version__ = "0.1.0"
