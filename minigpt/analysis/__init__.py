"""Analysis of trained models: embeddings, attention, coherence of their stories."""
