"""Examples, objectives and the seam into `transformers.Trainer`."""
