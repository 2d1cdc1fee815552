"""Finding the parts of a model by structure, changing them by edits, and loading the result with transformers."""
