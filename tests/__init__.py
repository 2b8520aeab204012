"""Tests of GKC."""
