"""The arithmetic of a round."""
