"""Measures this machine: what experts, devices, layers and whole models take."""
