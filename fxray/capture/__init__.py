"""From a draft to a running model that records: rewrite, then record."""
