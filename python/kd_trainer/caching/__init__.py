"""Making, filling and examining teacher caches: what ``kdk cache`` does."""
