"""Single files of whole models: which model, which tensors, and the parts that they hold."""
