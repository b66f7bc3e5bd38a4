"""Attention: softmax(q k^T) v without the matrix between them, forward and deterministic backward."""
