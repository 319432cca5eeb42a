"""What we learn: one module for each question, a model and texts (or recorded figures) in, labelled results out."""
