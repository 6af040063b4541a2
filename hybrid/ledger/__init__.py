"""Predicted beside measured times, and what a run tells of itself."""
