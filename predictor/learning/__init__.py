"""From events to a version directory: data, training, evaluation."""
