"""What a trained model has learned: embeddings, attention, coherence of its stories."""
