"""Fused operations as functions, each beside its plain-torch twin."""
