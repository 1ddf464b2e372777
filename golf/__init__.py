"""The 16 MB contest: trainer, artifact, tokenizers, scorer."""
