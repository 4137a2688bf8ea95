"""Engines compiled by TensorRT itself: the whole ReDrafter step as one network, without TensorRT-LLM."""
