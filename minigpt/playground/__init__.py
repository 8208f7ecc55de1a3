"""Local web page to generate stories and explore the embeddings and attention of models."""
