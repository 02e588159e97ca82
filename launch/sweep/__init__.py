"""Sweeps over rank, side and seed: one detection, one arm per combination, and what to choose."""
