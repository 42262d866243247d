"""From the name of an expert to a pipeline, and from an ensemble folder to an ensemble."""
