"""Analysis of trained models: their embeddings, attention and activations, and their stories."""
