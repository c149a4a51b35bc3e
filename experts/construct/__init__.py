"""From the declaration of an expert to the function over rows that it names, and what its rows look like."""
