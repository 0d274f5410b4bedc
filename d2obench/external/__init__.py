"""Caches and engines that are not ours: transformers' own caches, kvpress and llama.cpp.

Imported by ``run`` and ``tasks``; imports ``cache``.
"""
