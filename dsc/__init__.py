"""dsc: a graph compiler for the DeepSeek-V3 family of models."""
