"""A trained model in the formats of other programs, with its model card."""
