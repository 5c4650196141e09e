"""Models that are hard to trace, and what every traced model must hold to."""
