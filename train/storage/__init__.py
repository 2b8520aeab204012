"""Crash-safe storage: row shards, checksums, fingerprints and locks."""
