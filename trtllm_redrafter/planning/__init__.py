"""Estimate a model's memory per rank and time per step on a target GPU, by arithmetic alone: no GPU is needed."""
