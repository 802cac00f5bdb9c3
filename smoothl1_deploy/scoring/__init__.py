"""Scoring of data larger than memory: sources → shards → pieces → an engine → one exact result."""
