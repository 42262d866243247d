"""How much memory an ensemble will take, and where to keep its experts so that it fits."""
