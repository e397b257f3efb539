"""The language model with item tokens: one composite module that the trainer owns and the decoder reads."""
