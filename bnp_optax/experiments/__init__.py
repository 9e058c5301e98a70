"""The paper's experiments: data, models, methods, training, figures and the command line."""
