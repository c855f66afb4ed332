"""Weights stored in fewer bits and read back block by block: GGUF's blocks, NF4, int8, and a tensor that holds them."""
